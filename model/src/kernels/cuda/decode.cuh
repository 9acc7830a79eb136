// GEMM of at most 16 rows: as fast as the weights come from memory.
//
// A block multiplies two panels. Each of its four warps walks one segment of the inputs, so that a
// sum needs nothing of another warp before its end; the four totals meet in shared memory.
//
// Bytes in flight decide. By Little's law 3.35 TB/s at 0.7 us take 2.3 MB, or 18 KB an SM of an
// H100, and twice that to be sure. Here a chunk of two panels is 4 KB; three are under way in each
// of four warps, 48 KB a block, and two blocks share an SM (80 KB of shared memory each, which
// an A100 has twice as well): 96 KB, so that what one block cannot ask for while it starts or ends
// the other does. Held in registers, so many bytes would take all of them; so the copies go to
// shared memory, asynchronously.
//
// No lane reads what another has copied: its slots are its own, which is why there is no barrier
// in the loop, and lanes side by side have their slots side by side, which is why no two meet in a
// bank. With each chunk come this lane's pieces of the 16 rows, from the L2 cache: 1 KB more, a
// fifth of the traffic.
#pragma once

#include "panel.cuh"

// Pieces that a lane copies for a chunk: four of each panel, then one for each 8 rows.
constexpr int DECODE_WEIGHTS = 4 * DECODE_PANELS;
constexpr int DECODE_TILES = DECODE_ROWS / 8;
constexpr int DECODE_PIECES = DECODE_WEIGHTS + DECODE_TILES;

static_assert(DECODE_THREADS == SEGMENTS * WARP, "a warp walks one segment");
static_assert(DECODE_THREADS == DECODE_ROWS * PAIR_PIECES, "a thread stores four outputs of a row");
static_assert(DECODE_SHARED_BYTES == SEGMENTS * DECODE_STAGES * DECODE_PIECES * WARP * 16, "");
// The totals of a warp take the place of its first stage.
static_assert(DECODE_PANELS * DECODE_TILES * 2 <= DECODE_WEIGHTS, "");

// The slots of one warp: [stage][piece][lane], each touched by its own lane only until the end.
struct DecodeRing {
    uint4* slots;

    __device__ explicit DecodeRing(int warp)
        : slots(static_cast<uint4*>(dynamic_shared()) +
                warp * (DECODE_STAGES * DECODE_PIECES * WARP)) {}

    __device__ uint4& at(int chunk, int piece, int lane) const {
        return slots[(chunk % DECODE_STAGES * DECODE_PIECES + piece) * WARP + lane];
    }

    // Where the total of outputs 4g..4g+3 of a row is left.
    __device__ float4& total(int panel, int tile, int odd, int lane) const {
        int piece = (panel * DECODE_TILES + tile) * 2 + odd;
        return reinterpret_cast<float4&>(slots[piece * WARP + lane]);
    }
};

// What a lane copies: where its rows and panels are, how far they go.
struct DecodeSource {
    const uint4* panels[DECODE_PANELS];
    const uint4* rows[DECODE_TILES];
    int pairs;

    template <class Job>
    __device__ explicit DecodeSource(const Job& job) : pairs(divide_up(job.inputs, 2)) {
        for (int i = 0; i < DECODE_PANELS; i++) panels[i] = job.panel(i);
        for (int n = 0; n < DECODE_TILES; n++) {
            int row = n * 8 + lane() / 4;
            rows[n] = row < job.rows ? job.row(row) : nullptr;
        }
    }

    // Begins to copy a chunk. What is not there becomes zeros: pairs beyond the last input, a panel
    // beyond the last output, rows that the tile does not have.
    __device__ void copy(const DecodeRing& ring, int chunk) const {
        #pragma unroll
        for (int i = 0; i < DECODE_WEIGHTS; i++) {
            LanePiece piece(chunk, i % 4);
            const uint4* panel = panels[i / 4];
            copy_async_16(&ring.at(chunk, i, lane()), panel + piece.at,
                          panel != nullptr && piece.pair < pairs);
        }
        #pragma unroll
        for (int n = 0; n < DECODE_TILES; n++) {
            const uint4* row = rows[n];
            copy_async_16(&ring.at(chunk, DECODE_WEIGHTS + n, lane()),
                          row + chunk * ROW_PIECES + lane() % 4, row != nullptr);
        }
    }
};

// Sums the chunks `begin..end`.
__device__ inline void decode_segment(const DecodeSource& source, const DecodeRing& ring, int begin,
                                      int end, Totals (&totals)[DECODE_PANELS][DECODE_TILES]) {
    constexpr int AHEAD = DECODE_STAGES - 1;
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
        uint4 x[DECODE_TILES];
        #pragma unroll
        for (int n = 0; n < DECODE_TILES; n++) x[n] = ring.at(chunk, DECODE_WEIGHTS + n, lane());
        #pragma unroll
        for (int i = 0; i < DECODE_PANELS; i++) {
            uint4 w[4];
            #pragma unroll
            for (int j = 0; j < 4; j++) w[j] = ring.at(chunk, 4 * i + j, lane());
            multiply(totals[i], w, x);
        }
    }
}

// ((s0 + s1) + s2) + s3 of outputs 4 quad..4 quad + 3 of a row.
__device__ inline float4 decode_join(int panel, int row, int quad) {
    auto total = [&](int segment) {
        return DecodeRing(segment).total(panel, row / 8, row % 2, 4 * quad + row % 8 / 2);
    };
    float4 sum = total(0);
    for (int segment = 1; segment < SEGMENTS; segment++) sum = sum + total(segment);
    return sum;
}

// Multiplies the panels of a block with the rows of its tile.
template <class Job>
__device__ void decode(const Job& job) {
    // A tile without rows is left by the whole block, before any barrier.
    if (job.rows <= 0) return;
    const DecodeRing ring(warp());
    const int length = segment_chunks(job.inputs);
    const int chunks = chunks_of(job.inputs);
    const int begin = min(warp() * length, chunks), end = min(begin + length, chunks);

    Totals totals[DECODE_PANELS][DECODE_TILES];
    decode_segment(DecodeSource(job), ring, begin, end, totals);

    #pragma unroll
    for (int i = 0; i < DECODE_PANELS * DECODE_TILES * 2; i++) {
        const int panel = i / (DECODE_TILES * 2), tile = i / 2 % DECODE_TILES, odd = i % 2;
        ring.total(panel, tile, odd, lane()) = totals[panel][tile].outputs(odd);
    }
    block_sync();
    const int row = thread() / PAIR_PIECES, quad = thread() % PAIR_PIECES;
    if (row >= job.rows) return;
    const float4 first = decode_join(0, row, quad), second = decode_join(1, row, quad);
    if constexpr (Job::FUSED) {
        job.store(row, 0, quad, first, second);
    } else {
        job.store(row, 0, quad, first);
        job.store(row, 1, quad, second);
    }
}
