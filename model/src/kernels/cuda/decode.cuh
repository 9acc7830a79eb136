// GEMM of at most 16 rows: as fast as the weights come from memory.
//
// A block multiplies two panels. Each of its four warps walks one segment of the inputs, so that a
// sum needs nothing of another warp before its end; the four totals meet in shared memory.
//
// Bytes in flight decide. By Little's law 3.35 TB/s at 0.7 us take 2.3 MB, or 18 KB an SM of an
// H100, and twice that to be sure. In bf16 a chunk of two panels is 4 KB; three are under way in each
// of four warps, 48 KB a block, and two blocks share an SM (80 KB of shared memory each, which
// an A100 has twice as well): 96 KB, so that what one block cannot ask for while it starts or ends
// the other does. In fp8 a chunk is 2 KB, and five are under way: 40 KB a block, 80 KB in two. Held
// in registers, so many bytes would take all of them; so the copies go to shared memory,
// asynchronously.
//
// No lane reads what another has copied: its slots are its own, which is why there is no barrier
// in the loop, and lanes side by side have their slots side by side, which is why no two meet in a
// bank. With each chunk come this lane's pieces of the 16 rows, from the L2 cache: 1 KB more, a
// fifth of the traffic or, in fp8, a third. Scales are few, and go to registers.
//
// The 16-byte pieces that both panels have of a pair of inputs are dealt out to the eight g of a
// warp, as many to each as there are: in bf16 piece g of one panel and of the other, in fp8 one
// piece, of the first panel for g < 4. Either way a lane has twice four outputs.
#pragma once

#include "panel.cuh"

constexpr int DECODE_TILES = DECODE_ROWS / 8;
// Blocks that share an SM by their shared memory, so that the compiler saves no registers for more.
constexpr int DECODE_BLOCKS = 2;
// Fours of outputs that a lane has.
constexpr int DECODE_QUADS = DECODE_PANELS * QUADS / 8;

static_assert(DECODE_THREADS == SEGMENTS * WARP, "a warp walks one segment");
static_assert(DECODE_THREADS == DECODE_ROWS * QUADS, "a thread stores four outputs of a row");

// What a lane has of two panels in this form.
template <class Weights>
struct DecodeShare {
    // Panels that it has a piece of, and fours of outputs of a piece.
    static constexpr int PANELS = DECODE_PANELS * Weights::PAIR_PIECES / 8;
    static constexpr int PIECE_QUADS = QUADS / Weights::PAIR_PIECES;
    // Pieces that it copies for a chunk: of each such panel four, then one for each 8 rows.
    static constexpr int WEIGHTS = 4 * PANELS;
    static constexpr int PIECES = WEIGHTS + DECODE_TILES;

    static_assert(Weights::DECODE_SHARED_BYTES ==
                      SEGMENTS * Weights::DECODE_STAGES * PIECES * WARP * 16, "");
    static_assert(DECODE_QUADS * DECODE_TILES * 2 <= Weights::DECODE_STAGES * PIECES,
                  "the totals of a warp take the place of its first stages");

    // Which panel is the lane's panel `i`, and which piece of its pairs it has.
    __device__ static int panel(int i) { return i + lane() / 4 / Weights::PAIR_PIECES; }
    __device__ static int piece() { return lane() / 4 % Weights::PAIR_PIECES; }
};

// The slots of one warp: [stage][piece][lane], each touched by its own lane only until the end.
template <class Weights>
struct DecodeRing {
    static constexpr int STAGES = Weights::DECODE_STAGES;
    static constexpr int PIECES = DecodeShare<Weights>::PIECES;

    uint4* slots;

    __device__ explicit DecodeRing(int warp)
        : slots(static_cast<uint4*>(dynamic_shared()) + warp * (STAGES * PIECES * WARP)) {}

    __device__ uint4& at(int chunk, int piece, int lane) const {
        return slots[(chunk % STAGES * PIECES + piece) * WARP + lane];
    }

    // Where the total of a lane's four outputs `quad` of a row is left.
    __device__ float4& total(int quad, int tile, int odd, int lane) const {
        int piece = (quad * DECODE_TILES + tile) * 2 + odd;
        return reinterpret_cast<float4&>(slots[piece * WARP + lane]);
    }
};

// What a lane copies: where its rows and panels are, how far they go.
template <class Weights>
struct DecodeSource {
    typedef DecodeShare<Weights> Share;

    const uint4* panels[Share::PANELS];
    const uint4* rows[DECODE_TILES];
    int pairs;

    template <class Job>
    __device__ explicit DecodeSource(const Job& job) : pairs(divide_up(job.inputs, 2)) {
        for (int i = 0; i < Share::PANELS; i++) panels[i] = job.panel(Share::panel(i));
        for (int n = 0; n < DECODE_TILES; n++) {
            int row = n * 8 + lane() / 4;
            rows[n] = row < job.rows ? job.row(row) : nullptr;
        }
    }

    // Begins to copy a chunk. What is not there becomes zeros: pairs beyond the last input, a panel
    // beyond the last output, rows that the tile does not have.
    __device__ void copy(const DecodeRing<Weights>& ring, int chunk) const {
        #pragma unroll
        for (int i = 0; i < Share::WEIGHTS; i++) {
            const int pair = lane_pair(chunk, i % 4);
            const uint4* panel = panels[i / 4];
            copy_async_16(&ring.at(chunk, i, lane()),
                          panel + (pair * Weights::PAIR_PIECES + Share::piece()),
                          panel != nullptr && pair < pairs);
        }
        #pragma unroll
        for (int n = 0; n < DECODE_TILES; n++) {
            const uint4* row = rows[n];
            copy_async_16(&ring.at(chunk, Share::WEIGHTS + n, lane()),
                          row + chunk * ROW_PIECES + lane() % 4, row != nullptr);
        }
    }

    // The scales of the lane's four outputs `quad`.
    __device__ QuadScales<Weights> scales(int quad, int inputs) const {
        constexpr int EACH = Share::PIECE_QUADS;
        return {panels[quad / EACH], inputs, Share::piece() * EACH + quad % EACH};
    }
};

// What a lane sums: for each of its fours of outputs and each row.
template <class Weights>
struct DecodeSums {
    typedef DecodeShare<Weights> Share;

    Sums<Weights, DECODE_TILES> sums[DECODE_QUADS];

    // Multiplies a chunk that has arrived.
    __device__ void multiply_chunk(const DecodeRing<Weights>& ring, int chunk) {
        uint4 x[DECODE_TILES];
        #pragma unroll
        for (int n = 0; n < DECODE_TILES; n++) x[n] = ring.at(chunk, Share::WEIGHTS + n, lane());
        #pragma unroll
        for (int i = 0; i < Share::PANELS; i++) {
            uint4 pieces[4];
            #pragma unroll
            for (int j = 0; j < 4; j++) pieces[j] = ring.at(chunk, 4 * i + j, lane());
            #pragma unroll
            for (int quad = 0; quad < Share::PIECE_QUADS; quad++) {
                uint4 w[4];
                #pragma unroll
                for (int j = 0; j < 4; j++) w[j] = Weights::words(Weights::quad(pieces[j], quad));
                multiply(sums[i * Share::PIECE_QUADS + quad].chain(), w, x);
            }
        }
    }

    // Sums the chunks `begin..end`, which are whole blocks but for the last of all.
    __device__ void sum(const DecodeSource<Weights>& source, const DecodeRing<Weights>& ring,
                        int inputs, int begin, int end) {
        constexpr int AHEAD = Weights::DECODE_STAGES - 1;
        QuadScales<Weights> scales[DECODE_QUADS];
        #pragma unroll
        for (int quad = 0; quad < DECODE_QUADS; quad++) scales[quad] = source.scales(quad, inputs);
        for (int chunk = begin; chunk < begin + AHEAD; chunk++) {
            if (chunk < end) source.copy(ring, chunk);
            copy_commit();
        }
        for (int chunk = begin; chunk < end; chunk++) {
            // A group a chunk, also where nothing is left to copy: so the count of those that may
            // still be under way is the same at the end.
            copy_wait<AHEAD - 1>();
            // The stage that this goes to was read in the round before.
            if (chunk + AHEAD < end) source.copy(ring, chunk + AHEAD);
            copy_commit();
            #pragma unroll
            for (int quad = 0; quad < DECODE_QUADS; quad++) {
                sums[quad].begin_chunk(chunk, scales[quad]);
            }
            multiply_chunk(ring, chunk);
            #pragma unroll
            for (int quad = 0; quad < DECODE_QUADS; quad++) sums[quad].end_chunk(chunk, end);
        }
    }

    // Leaves the totals where the others find them.
    __device__ void leave(const DecodeRing<Weights>& ring) const {
        #pragma unroll
        for (int i = 0; i < DECODE_QUADS * DECODE_TILES * 2; i++) {
            const int quad = i / (DECODE_TILES * 2), tile = i / 2 % DECODE_TILES, odd = i % 2;
            ring.total(quad, tile, odd, lane()) = sums[quad].totals[tile].outputs(odd);
        }
    }
};

// ((s0 + s1) + s2) + s3 of outputs 4 quad..4 quad + 3 of a row.
template <class Weights>
__device__ inline float4 decode_join(int panel, int row, int quad) {
    // Its number among those of both panels, which are dealt out piece by piece.
    constexpr int EACH = DecodeShare<Weights>::PIECE_QUADS;
    const int number = panel * QUADS + quad, piece = number / EACH;
    const int own = piece / 8 * EACH + number % EACH, lane = piece % 8 * 4 + row % 8 / 2;
    auto total = [&](int segment) {
        return DecodeRing<Weights>(segment).total(own, row / 8, row % 2, lane);
    };
    float4 sum = total(0);
    for (int segment = 1; segment < SEGMENTS; segment++) sum = sum + total(segment);
    return sum;
}

// Multiplies the panels of a block with the rows of its tile.
template <class Job>
__device__ void decode(const Job& job) {
    typedef typename Job::Weights Weights;
    // A tile without rows is left by the whole block, before any barrier.
    if (job.rows <= 0) return;
    const DecodeRing<Weights> ring(warp());
    const int length = segment_chunks<Weights>(job.inputs);
    const int chunks = chunks_of(job.inputs);
    const int begin = min(warp() * length, chunks), end = min(begin + length, chunks);

    DecodeSums<Weights> sums;
    sums.sum(DecodeSource<Weights>(job), ring, job.inputs, begin, end);
    sums.leave(ring);
    block_sync();
    const int row = thread() / QUADS, quad = thread() % QUADS;
    if (row >= job.rows) return;
    const float4 first = decode_join<Weights>(0, row, quad);
    const float4 second = decode_join<Weights>(1, row, quad);
    if constexpr (Job::FUSED) {
        job.store(row, 0, quad, first, second);
    } else {
        job.store(row, 0, quad, first);
        job.store(row, 1, quad, second);
    }
}
