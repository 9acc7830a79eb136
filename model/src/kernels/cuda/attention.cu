// Grouped-query attention over the paged cache.
//
// The positions of a sequence are cut into splits of 256 by their absolute number, a block each,
// and the splits of a row are joined in ascending order. Within a split each of four warps has 64
// positions, that is four blocks of the cache, and their sums are joined in ascending order too. So
// the order of every sum follows from the row's own position and window: not from other rows, and
// not from how long their sequences are.
//
// A query is one head of one row. Sixteen of them are multiplied at once on the tensor cores: the
// heads that share a key-value head, of one row or of neighbours in a sequence, which share what is
// read. The tensor core keeps its rows apart, so a query's value does not depend on its company; a
// position that it does not see has the weight 0, which adds nothing.
//
// The cache is bf16, queries and weights are not: each is two values of bf16, the rounded and the
// rest, and is multiplied twice, which leaves an error of 2^-17 of it.
//
// A lane asks for 128 bytes of keys, later for 256 of values, before it needs the first: with two
// blocks an SM 32 KB of keys or 64 KB of values are on their way.
#include "device.cuh"
#include "geometry.cuh"
#include "math.cuh"

// Blocks that the registers are shared out for.
constexpr int BLOCKS_PER_SM = 2;
constexpr int WARPS = ATTENTION_THREADS / WARP;
constexpr int WARP_POSITIONS = SPLIT_POSITIONS / WARPS;
constexpr int WARP_BLOCKS = WARP_POSITIONS / KV_BLOCK;
// Values of 16 bytes.
constexpr int PIECE = 8;
// Positions that are a fragment's columns, and how often a warp has so many.
constexpr int KEYS = 8;
constexpr int KEY_TILES = WARP_POSITIONS / KEYS;
// Values of a head that are multiplied with queries at once, and with weights.
constexpr int KEY_CHUNK = 32;
constexpr int VALUE_CHUNK = 64;
// A row of sums in shared memory, such that neighbours lie in other banks.
constexpr int SUMS_STRIDE = VALUE_CHUNK + 4;

static_assert(WARP_BLOCKS == 4 && KEY_TILES == 2 * WARP_BLOCKS, "a warp has four blocks");

// What a block looks at: some rows of a sequence, one key-value head, one split.
struct Slice {
    int head_dim, window;
    // The first position of the split, and of the warp; that of the first row; how many rows.
    int start, warp_start, position, rows;
    // Where the warp's blocks are in the cache, counted in blocks of one key-value head.
    u32 blocks[WARP_BLOCKS];

    __device__ Slice(const u32* table, int kv_head, int kv_heads, int head_dim, int window,
                     int start, int position, int rows)
        : head_dim(head_dim), window(window), start(start),
          warp_start(start + warp() * WARP_POSITIONS), position(position), rows(rows) {
        #pragma unroll
        for (int b = 0; b < WARP_BLOCKS; b++) {
            const int first = warp_start + b * KV_BLOCK;
            // The table ends with the block of the last row.
            const bool there = first < position + rows;
            blocks[b] = there ? table[first / KV_BLOCK] * kv_heads + kv_head : 0;
        }
    }

    // First position that a row at `position` sees.
    __device__ int from(int position) const {
        return window > 0 ? max(position + 1 - window, 0) : 0;
    }
    __device__ bool any_seen() const {
        return start < position + rows && from(position) < start + SPLIT_POSITIONS;
    }
    // 16 bytes of the key or value at place `offset` of the warp's block `b`, from value `at` on.
    // Zeros if there is none, or no row sees it: then it may never have been written.
    __device__ uint4 load(const u16* cache, int b, int offset, int at) const {
        const int key = warp_start + b * KV_BLOCK + offset;
        if (key < from(position) || key >= position + rows || at >= head_dim) return {0, 0, 0, 0};
        // In pieces of 16 bytes 32 bits reach 64 GB, and addresses take half the registers.
        const u32 piece = (blocks[b] * KV_BLOCK + offset) * (head_dim / PIECE) + at / PIECE;
        return load_stream(reinterpret_cast<const uint4*>(cache) + piece);
    }
};

// The queries of a tile: those from `first` on of all that the block has, row by row.
struct Queries {
    int first, count, heads, group, kv_head;

    __device__ bool valid(int i) const { return first + i < count; }
    // Which of the block's rows a query belongs to.
    __device__ int row(int i) const { return (first + i) / group; }
    // Its place in `[rows, heads]`, counted from the block's first row.
    __device__ u64 head(int i) const {
        return static_cast<u64>(row(i)) * heads + kv_head * group + (first + i) % group;
    }
};

struct Shared {
    // Fragments of the queries, [chunk][step of 16][rounded, rest][lane].
    uint4 queries[HEAD_DIM_MAX / KEY_CHUNK][2][2][WARP];
    float largest[WARPS][ATTENTION_QUERIES];
    float weights[WARPS][ATTENTION_QUERIES];
    float sums[WARPS][ATTENTION_QUERIES][SUMS_STRIDE];
};

// Two values as bf16, and what rounding took from them as bf16.
struct Halves {
    u32 rounded, rest;
    __device__ Halves(float a, float b) : rounded(pack_bf16(a, b)) {
        rest = pack_bf16(a - low_bf16(rounded), b - high_bf16(rounded));
    }
};

// Words of two rows as words of two columns.
__device__ inline u32 low_halves(u32 a, u32 b) { return (a & 0xffffu) | b << 16; }
__device__ inline u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000u); }

// Brings the queries of a tile into fragments. Row g of a fragment is query g; of each 32 values a
// lane has pairs 4t..4t+3, as of the keys, whose 16 bytes they meet.
__device__ inline void load_queries(const Queries& queries, const float* q, int head_dim,
                                    Shared& shared) {
    const int pieces = (head_dim + KEY_CHUNK - 1) / KEY_CHUNK * 2 * WARP;
    for (int i = thread(); i < pieces; i += ATTENTION_THREADS) {
        const int chunk = i / (2 * WARP), step = i / WARP % 2, g = i % WARP / 4, t = i % 4;
        auto halves = [&](int query, int pair) {
            const int at = chunk * KEY_CHUNK + 2 * pair;
            if (!queries.valid(query) || at >= head_dim) return Halves(0.0f, 0.0f);
            const float* values = q + queries.head(query) * head_dim + at;
            return Halves(values[0], values[1]);
        };
        const int pair = 4 * t + 2 * step;
        const Halves a = halves(g, pair), b = halves(g + 8, pair);
        const Halves c = halves(g, pair + 1), d = halves(g + 8, pair + 1);
        shared.queries[chunk][step][0][i % WARP] = {a.rounded, b.rounded, c.rounded, d.rounded};
        shared.queries[chunk][step][1][i % WARP] = {a.rest, b.rest, c.rest, d.rest};
    }
}

__device__ inline void multiply(float (&c)[4], const uint4& a, u32 b0, u32 b1) {
    const u32 fragment_a[4] = {a.x, a.y, a.z, a.w}, fragment_b[2] = {b0, b1};
    mma_bf16(c, fragment_a, fragment_b);
}

// Products of the queries and this warp's keys: of tile n, queries g and g+8 with positions 8n + 2t
// and 8n + 2t + 1.
__device__ inline void score(const Slice& slice, const u16* keys, const Shared& shared,
                             float (&scores)[KEY_TILES][4]) {
    const int g = lane() / 4, t = lane() % 4;
    #pragma unroll 1
    for (int chunk = 0; chunk * KEY_CHUNK < slice.head_dim; chunk++) {
        uint4 key[KEY_TILES];
        #pragma unroll
        for (int n = 0; n < KEY_TILES; n++) {
            key[n] = slice.load(keys, n / 2, n % 2 * KEYS + g, chunk * KEY_CHUNK + 8 * t);
        }
        #pragma unroll
        for (int step = 0; step < 2; step++) {
            #pragma unroll
            for (int part = 0; part < 2; part++) {
                const uint4 query = shared.queries[chunk][step][part][lane()];
                #pragma unroll
                for (int n = 0; n < KEY_TILES; n++) {
                    multiply(scores[n], query, step == 0 ? key[n].x : key[n].z,
                             step == 0 ? key[n].y : key[n].w);
                }
            }
        }
    }
}

// Turns scores into weights e^(score - largest of the split). `half` is that of the fragment:
// query g or g+8.
__device__ inline void mask(const Slice& slice, const Queries& queries, float scale, int half,
                            Shared& shared, float (&scores)[KEY_TILES][4]) {
    const int query = lane() / 4 + 8 * half, position = slice.position + queries.row(query);
    const int from = slice.from(position);
    float largest = minus_infinity();
    #pragma unroll
    for (int i = 0; i < KEY_TILES * 2; i++) {
        float& score = scores[i / 2][2 * half + i % 2];
        const int key = slice.warp_start + i / 2 * KEYS + lane() % 4 * 2 + i % 2;
        score = from <= key && key <= position ? score * scale : minus_infinity();
        largest = fmaxf(largest, score);
    }
    for (int bit = 1; bit < 4; bit *= 2) largest = fmaxf(largest, shuffle_xor(largest, bit));
    if (lane() % 4 == 0) shared.largest[warp()][query] = largest;
}

__device__ inline float largest_of(const Shared& shared, int query) {
    float largest = shared.largest[0][query];
    for (int w = 1; w < WARPS; w++) largest = fmaxf(largest, shared.largest[w][query]);
    return largest;
}

__device__ inline void weigh(int half, Shared& shared, float (&scores)[KEY_TILES][4]) {
    const int query = lane() / 4 + 8 * half;
    const float largest = largest_of(shared, query);
    // A query that sees nothing of the split has no largest score, and all its weights are 0.
    const float zero = largest == minus_infinity() ? 0.0f : largest;
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < KEY_TILES * 2; i++) {
        float& score = scores[i / 2][2 * half + i % 2];
        score = exponential(score - zero);
        sum += score;
    }
    for (int bit = 1; bit < 4; bit *= 2) sum += shuffle_xor(sum, bit);
    if (lane() % 4 == 0) shared.weights[warp()][query] = sum;
}

// Weights as a first operand: they are where it is wanted already.
struct Weights {
    uint4 rounded[WARP_BLOCKS], rest[WARP_BLOCKS];

    __device__ explicit Weights(const float (&w)[KEY_TILES][4]) {
        #pragma unroll
        for (int i = 0; i < WARP_BLOCKS; i++) {
            const float(&first)[4] = w[2 * i], (&second)[4] = w[2 * i + 1];
            const Halves a(first[0], first[1]), b(first[2], first[3]);
            const Halves c(second[0], second[1]), d(second[2], second[3]);
            rounded[i] = {a.rounded, b.rounded, c.rounded, d.rounded};
            rest[i] = {a.rest, b.rest, c.rest, d.rest};
        }
    }
};

// Weighted sums of this warp's values `at..at + 64`, left in shared memory. Of the values a lane
// reads 8g..8g+7 at four positions of a block, of which it makes columns: value 8g + j is column g
// of tile j.
__device__ inline void sum_values(const Slice& slice, const u16* values, int at,
                                  const Weights& weights, Shared& shared) {
    const int g = lane() / 4, t = lane() % 4;
    float sums[8][4] = {};
    #pragma unroll
    for (int b = 0; b < WARP_BLOCKS; b++) {
        uint4 v[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = slice.load(values, b, i / 2 * 8 + 2 * t + i % 2, at + 8 * g);
        }
        const u32 words[4][4] = {
            {v[0].x, v[1].x, v[2].x, v[3].x},
            {v[0].y, v[1].y, v[2].y, v[3].y},
            {v[0].z, v[1].z, v[2].z, v[3].z},
            {v[0].w, v[1].w, v[2].w, v[3].w},
        };
        #pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32(&w)[4] = words[j / 2];
            const u32 first = j % 2 == 0 ? low_halves(w[0], w[1]) : high_halves(w[0], w[1]);
            const u32 second = j % 2 == 0 ? low_halves(w[2], w[3]) : high_halves(w[2], w[3]);
            multiply(sums[j], weights.rounded[b], first, second);
            multiply(sums[j], weights.rest[b], first, second);
        }
    }
    // A lane has columns 2t and 2t + 1, so values 16t..16t+15.
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        const int half = i / 4, column = i / 2 % 2, j = i % 2 * 4, c = 2 * half + column;
        float* to = &shared.sums[warp()][g + 8 * half][16 * t + 8 * column + j];
        *reinterpret_cast<float4*>(to) = {sums[j][c], sums[j + 1][c], sums[j + 2][c],
                                          sums[j + 3][c]};
    }
}

// One tile of queries. Everything that fills shared memory is followed by a barrier. What is read
// at the end is filled again only behind the first barrier of the next tile.
__device__ inline void attend(const Slice& slice, const Queries& queries, const float* q,
                              const u16* keys, const u16* values, float scale, int splits,
                              float* partial, Shared& shared) {
    const int dim = slice.head_dim, stride = 2 + dim;
    load_queries(queries, q, dim, shared);
    block_sync();
    float scores[KEY_TILES][4] = {};
    score(slice, keys, shared, scores);
    #pragma unroll
    for (int half = 0; half < 2; half++) mask(slice, queries, scale, half, shared, scores);
    block_sync();
    #pragma unroll
    for (int half = 0; half < 2; half++) weigh(half, shared, scores);
    const Weights weights(scores);
    #pragma unroll 1
    for (int at = 0; at < dim; at += VALUE_CHUNK) {
        sum_values(slice, values, at, weights, shared);
        block_sync();
        for (int i = thread(); i < ATTENTION_QUERIES * VALUE_CHUNK; i += ATTENTION_THREADS) {
            const int query = i / VALUE_CHUNK, value = i % VALUE_CHUNK;
            if (!queries.valid(query) || at + value >= dim) continue;
            float sum = shared.sums[0][query][value];
            for (int w = 1; w < WARPS; w++) sum += shared.sums[w][query][value];
            partial[queries.head(query) * splits * stride + 2 + at + value] = sum;
        }
        block_sync();
    }
    if (thread() < ATTENTION_QUERIES && queries.valid(thread())) {
        float sum = shared.weights[0][thread()];
        for (int w = 1; w < WARPS; w++) sum += shared.weights[w][thread()];
        float* to = partial + queries.head(thread()) * splits * stride;
        to[0] = largest_of(shared, thread());
        to[1] = sum;
    }
}

// The part of each row's attention that falls into one split: largest score, sum of the weights,
// weighted sum of the values. q is `[rows, heads, head_dim]`, keys and values are
// `[block][kv_head][16][head_dim]`, partial is `[rows, heads, splits, 2 + head_dim]`. A run is one
// row, or neighbours in a sequence: first index into `tables`, position and number of the first
// row, number of rows; a run of none is nothing. Key j is seen from position i iff 0 <= i - j, and < window if
// there is one. head_dim is a multiple of 8. The grid is [runs, kv_heads, splits]; a split that a
// row sees nothing of is left with the sum 0.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, BLOCKS_PER_SM)
attention_split(const float* q, const u16* keys, const u16* values, const u32* tables,
                const uint4* runs, int heads, int kv_heads, int head_dim, int window, float scale,
                int splits, float* partial) {
    __shared__ Shared shared;
    const uint4 run = runs[blockIdx.x];
    const int kv_head = static_cast<int>(blockIdx.y), split = static_cast<int>(blockIdx.z);
    const int start = split * SPLIT_POSITIONS, group = heads / kv_heads;
    const int count = static_cast<int>(run.w);
    const Slice slice(tables + run.x, kv_head, kv_heads, head_dim, window, start,
                      static_cast<int>(run.y), count);
    const u64 first_head = static_cast<u64>(run.z) * heads;
    partial += (first_head * splits + split) * (2 + head_dim);
    Queries queries = {0, count * group, heads, group, kv_head};
    for (; queries.first < queries.count; queries.first += ATTENTION_QUERIES) {
        if (slice.any_seen()) {
            attend(slice, queries, q + first_head * head_dim, keys, values, scale, splits, partial,
                   shared);
        } else if (thread() < ATTENTION_QUERIES && queries.valid(thread())) {
            float* to = partial + queries.head(thread()) * splits * (2 + head_dim);
            to[0] = minus_infinity();
            to[1] = 0.0f;
        }
    }
}

// Joins the splits of a row in ascending order, those that have anything. out is
// `[rows, heads, head_dim]`, the grid [rows, heads].
extern "C" __global__ void __launch_bounds__(JOIN_THREADS)
attention_join(const float* partial, int rows, int heads, int head_dim, int splits, float* out) {
    if (blockIdx.x >= static_cast<u32>(rows)) return;
    const u64 row_and_head = static_cast<u64>(blockIdx.x) * heads + blockIdx.y;
    const int stride = 2 + head_dim;
    const float* first = partial + row_and_head * splits * stride;
    float largest = minus_infinity();
    for (int s = 0; s < splits; s++) largest = fmaxf(largest, first[s * stride]);
    for (int at = thread(); at < head_dim; at += JOIN_THREADS) {
        float sum = 0.0f, weights = 0.0f;
        for (int s = 0; s < splits; s++) {
            const float* part = first + s * stride;
            if (part[1] == 0.0f) continue;
            const float factor = exponential(part[0] - largest);
            weights = fmaf(factor, part[1], weights);
            sum = fmaf(factor, part[2 + at], sum);
        }
        out[row_and_head * head_dim + at] = sum / weights;
    }
}
