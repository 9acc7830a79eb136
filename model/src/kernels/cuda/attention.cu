// Grouped-query attention of single rows over the paged cache, in f32 but for what the cache holds.
//
// The positions of a sequence are cut into splits of 256 by their absolute number, a block each, and
// the splits of a row are joined in ascending order. So the order of every sum follows from the
// row's own position and window: not from other rows, and not from how long their sequences are.
//
// A block has one key-value head, whose keys and values it reads once for four query heads at a
// time. Within a split each of the four warps has 64 positions, that is four blocks of the cache.
// A lane asks for 64 bytes of keys, then 128 of values, before it needs the first: with five blocks
// an SM 40 KB or more are on their way.
#include "device.cuh"
#include "geometry.cuh"
#include "math.cuh"

// Query heads that share what is read.
constexpr int HEADS = 4;
// Blocks that the registers are shared out for.
constexpr int BLOCKS_PER_SM = 5;
constexpr int WARPS = ATTENTION_THREADS / WARP;
constexpr int WARP_BLOCKS = SPLIT_POSITIONS / WARPS / KV_BLOCK;
// Lanes that share a key, and keys that a warp multiplies side by side.
constexpr int KEY_LANES = 8;
constexpr int KEYS = WARP / KEY_LANES;
// Values of 16 bytes.
constexpr int PIECE = 8;

static_assert(HEADS == WARPS, "a warp turns the scores of one head into weights");
static_assert(KV_BLOCK == KEYS * 4, "a lane has four keys of a block of the cache");

// Numbers of a split: the largest score, the sum of the weights, the weighted sum of the values.
__device__ inline float* partial_of(float* partial, u64 row_and_head, int splits, int split,
                                    int head_dim) {
    return partial + (row_and_head * splits + split) * (2 + head_dim);
}

// What a block looks at: one row, one key-value head, some positions.
struct Slice {
    const u32* table;
    int kv_head, kv_heads, head_dim;
    // First position of the split; positions that the row sees.
    int start, from, to;

    __device__ bool sees(int position) const { return from <= position && position < to; }

    // First position of block `b` of this warp.
    __device__ int first(int b) const { return start + (warp() * WARP_BLOCKS + b) * KV_BLOCK; }

    __device__ bool sees_any_from(int first, int count) const {
        return first < to && from < first + count;
    }

    // Keys or values of a block of the cache, `[position of the block][head_dim]`.
    __device__ const u16* block(const u16* cache, int first) const {
        const u64 number = static_cast<u64>(table[first / KV_BLOCK]) * kv_heads + kv_head;
        return cache + number * KV_BLOCK * head_dim;
    }
};

struct Shared {
    float queries[HEADS][HEAD_DIM_MAX];
    float scores[HEADS][SPLIT_POSITIONS];
    float sums[WARPS][HEADS][HEAD_DIM_MAX];
};

// sum + q * k over the eight values of a piece, in ascending order.
__device__ inline float dot(const float4& q0, const float4& q1, const uint4& k, float sum) {
    sum = fmaf(q0.x, low_bf16(k.x), sum);
    sum = fmaf(q0.y, high_bf16(k.x), sum);
    sum = fmaf(q0.z, low_bf16(k.y), sum);
    sum = fmaf(q0.w, high_bf16(k.y), sum);
    sum = fmaf(q1.x, low_bf16(k.z), sum);
    sum = fmaf(q1.y, high_bf16(k.z), sum);
    sum = fmaf(q1.z, low_bf16(k.w), sum);
    return fmaf(q1.w, high_bf16(k.w), sum);
}

// Scores of 16 positions from `first`. Eight lanes share a key, piece by piece; their parts are
// added by halves.
__device__ inline void score_block(const Slice& slice, const u16* keys, int first, float scale,
                                   int heads, Shared& shared) {
    const u16* block = slice.block(keys, first);
    const int slot = lane() / KEY_LANES;
    float dots[HEADS][4] = {};
    for (int at = lane() % KEY_LANES * PIECE; at < slice.head_dim; at += KEY_LANES * PIECE) {
        uint4 key[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int offset = i * KEYS + slot;
            key[i] = {0, 0, 0, 0};
            // What the row does not see may never have been written.
            if (slice.sees(first + offset)) {
                key[i] = load_stream(reinterpret_cast<const uint4*>(
                    block + offset * slice.head_dim + at));
            }
        }
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const float4* query = reinterpret_cast<const float4*>(&shared.queries[h][at]);
            #pragma unroll
            for (int i = 0; i < 4; i++) dots[h][i] = dot(query[0], query[1], key[i], dots[h][i]);
        }
    }
    #pragma unroll
    for (int i = 0; i < HEADS * 4; i++) {
        const int h = i / 4, offset = i % 4 * KEYS + slot;
        float sum = dots[h][i % 4];
        for (int mask = 1; mask < KEY_LANES; mask *= 2) sum += shuffle_xor(sum, mask);
        if (h < heads && lane() % KEY_LANES == 0 && slice.sees(first + offset)) {
            shared.scores[h][first - slice.start + offset] = sum * scale;
        }
    }
}

// Turns the scores of one head into weights, the largest being 1; a warp together. Positions that
// the row does not see have the score -infinity and so the weight 0.
__device__ inline void weigh(float (&scores)[SPLIT_POSITIONS], float* partial) {
    constexpr int EACH = SPLIT_POSITIONS / WARP;
    float most = minus_infinity(), sum = 0.0f;
    for (int i = 0; i < EACH; i++) most = fmaxf(most, scores[i * WARP + lane()]);
    for (int mask = WARP / 2; mask > 0; mask /= 2) most = fmaxf(most, shuffle_xor(most, mask));
    for (int i = 0; i < EACH; i++) {
        float& score = scores[i * WARP + lane()];
        score = exponential(score - most);
        sum += score;
    }
    for (int mask = WARP / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane() == 0) {
        partial[0] = most;
        partial[1] = sum;
    }
}

// Weighted sums of this warp's values, four of a head a lane, positions in ascending order.
__device__ inline void sum_values(const Slice& slice, const u16* values, int at, Shared& shared) {
    float sums[HEADS][4] = {};
    for (int b = 0; b < WARP_BLOCKS; b++) {
        const int first = slice.first(b);
        if (!slice.sees_any_from(first, KV_BLOCK)) continue;
        const u16* block = slice.block(values, first);
        uint2 value[KV_BLOCK];
        #pragma unroll
        for (int i = 0; i < KV_BLOCK; i++) {
            value[i] = {0, 0};
            if (slice.sees(first + i)) {
                value[i] = *reinterpret_cast<const uint2*>(block + i * slice.head_dim + at);
            }
        }
        #pragma unroll
        for (int i = 0; i < KV_BLOCK; i++) {
            #pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float weight = shared.scores[h][first - slice.start + i];
                sums[h][0] = fmaf(weight, low_bf16(value[i].x), sums[h][0]);
                sums[h][1] = fmaf(weight, high_bf16(value[i].x), sums[h][1]);
                sums[h][2] = fmaf(weight, low_bf16(value[i].y), sums[h][2]);
                sums[h][3] = fmaf(weight, high_bf16(value[i].y), sums[h][3]);
            }
        }
    }
    #pragma unroll
    for (int h = 0; h < HEADS; h++) {
        const float4 sum = {sums[h][0], sums[h][1], sums[h][2], sums[h][3]};
        *reinterpret_cast<float4*>(&shared.sums[warp()][h][at]) = sum;
    }
}

// One split for `heads` query heads, at most HEADS; `partial` is the first one's. Every loop that
// fills shared memory is followed by a barrier, and so is the last that reads what the next call
// fills first.
__device__ inline void attend(const Slice& slice, const float* q, const u16* keys,
                              const u16* values, int heads, float scale, float* partial,
                              int partial_stride, Shared& shared) {
    const int dim = slice.head_dim;
    for (int i = thread(); i < HEADS * SPLIT_POSITIONS; i += ATTENTION_THREADS) {
        shared.scores[i / SPLIT_POSITIONS][i % SPLIT_POSITIONS] = minus_infinity();
    }
    for (int i = thread(); i < HEADS * dim; i += ATTENTION_THREADS) {
        shared.queries[i / dim][i % dim] = i < heads * dim ? q[i] : 0.0f;
    }
    block_sync();
    for (int b = 0; b < WARP_BLOCKS; b++) {
        const int first = slice.first(b);
        if (slice.sees_any_from(first, KV_BLOCK)) {
            score_block(slice, keys, first, scale, heads, shared);
        }
    }
    block_sync();
    if (warp() < heads) weigh(shared.scores[warp()], partial + warp() * partial_stride);
    block_sync();
    for (int at = 4 * lane(); at < dim; at += 4 * WARP) sum_values(slice, values, at, shared);
    block_sync();
    for (int i = thread(); i < heads * dim; i += ATTENTION_THREADS) {
        const int h = i / dim, at = i % dim;
        float sum = shared.sums[0][h][at];
        for (int w = 1; w < WARPS; w++) sum += shared.sums[w][h][at];
        partial[h * partial_stride + 2 + at] = sum;
    }
}

// The part of each row's attention that falls into one split. q is `[rows, heads, head_dim]`, keys
// and values are `[block][kv_head][16][head_dim]`, `rows[i]` has the row's first index into
// `tables`, its position and its number. Key j is seen by position i iff 0 <= i - j, and < window if
// there is one. The grid is [rows, kv_heads, splits]; a split that a row sees nothing of is left
// with the sum 0.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, BLOCKS_PER_SM)
attention_split(const float* q, const u16* keys, const u16* values, const u32* tables,
                const uint4* rows, int heads, int kv_heads, int head_dim, int window, float scale,
                int splits, float* partial) {
    __shared__ Shared shared;
    const uint4 row = rows[blockIdx.x];
    const int kv_head = static_cast<int>(blockIdx.y), split = static_cast<int>(blockIdx.z);
    const int group = heads / kv_heads, to = static_cast<int>(row.y) + 1;
    const int from = window > 0 ? max(to - window, 0) : 0;
    const Slice slice = {tables + row.x, kv_head, kv_heads, head_dim,
                         split * SPLIT_POSITIONS, from, to};
    const u64 head = static_cast<u64>(row.z) * heads + kv_head * group;
    float* first = partial_of(partial, head, splits, split, head_dim);
    const int stride = splits * (2 + head_dim);
    if (!slice.sees_any_from(slice.start, SPLIT_POSITIONS)) {
        for (int h = thread(); h < group; h += ATTENTION_THREADS) {
            first[h * stride] = minus_infinity();
            first[h * stride + 1] = 0.0f;
        }
        return;
    }
    for (int h = 0; h < group; h += HEADS) {
        attend(slice, q + (head + h) * head_dim, keys, values, min(group - h, HEADS), scale,
               first + h * stride, stride, shared);
    }
}

// Joins the splits of a row in ascending order, those that have anything. out is
// `[rows, heads, head_dim]`, the grid [rows, heads].
extern "C" __global__ void __launch_bounds__(JOIN_THREADS)
attention_join(const float* partial, int rows, int heads, int head_dim, int splits, float* out) {
    const u64 row_and_head = static_cast<u64>(blockIdx.x) * heads + blockIdx.y;
    if (blockIdx.x >= static_cast<u32>(rows)) return;
    const int stride = 2 + head_dim;
    const float* first = partial + row_and_head * splits * stride;
    float most = minus_infinity();
    for (int s = 0; s < splits; s++) most = fmaxf(most, first[s * stride]);
    for (int at = thread(); at < head_dim; at += JOIN_THREADS) {
        float sum = 0.0f, weights = 0.0f;
        for (int s = 0; s < splits; s++) {
            const float* part = first + s * stride;
            if (part[1] == 0.0f) continue;
            const float factor = exponential(part[0] - most);
            weights = fmaf(factor, part[1], weights);
            sum = fmaf(factor, part[2 + at], sum);
        }
        out[row_and_head * head_dim + at] = sum / weights;
    }
}
