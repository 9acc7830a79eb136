// GEMM of many rows: as fast as the tensor cores multiply.
//
// A block multiplies eight panels, one a warp, with up to 128 rows. What bounds it beside the tensor
// cores, for a chunk of 32 inputs at the 800 or so cycles that they take for it on an H100:
//
// - L2 cache: 16 KB of weights and 8 KB of rows, 30 bytes a cycle and SM. A tile of 128 outputs
//   would want 40, more than there is.
// - shared memory: each warp reads all rows, 64 KB in all, 512 cycles.
// - registers: 128 accumulators a lane. The sum of the segments before would be 128 more, so it is
//   kept in shared memory, 128 KB of it; it is touched at three borders only.
//
// Weights need no shared memory: a panel is one warp's alone, and lies such that a lane's 16 bytes
// are its fragments. They go from the cache to registers one chunk ahead. Rows are every warp's;
// they pass through a ring of stages, copied asynchronously, three chunks ahead. A warp reads 8
// rows of 64 bytes, which follow one another: no two lanes meet in a bank.
#pragma once

#include "panel.cuh"

static_assert(PREFILL_THREADS == PREFILL_PANELS * WARP, "a warp multiplies one panel");
static_assert(PREFILL_SHARED_BYTES ==
                  PREFILL_STAGES * PREFILL_ROWS * ROW_PIECES * 16 +
                      PREFILL_PANELS * PANEL * PREFILL_ROWS * 4,
              "a ring of rows and the totals");

// Rows of a tile, as they stream through shared memory: [stage][row][piece].
template <int ROWS>
struct RowRing {
    static constexpr int STAGE = ROWS * ROW_PIECES;
    static constexpr int COPIES = STAGE / PREFILL_THREADS;

    uint4* slots;
    // Where this thread's pieces come from; absent for rows that the tile does not have.
    const uint4* sources[COPIES];

    template <class Job>
    __device__ explicit RowRing(const Job& job) : slots(static_cast<uint4*>(dynamic_shared())) {
        #pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int piece = thread() + i * PREFILL_THREADS, row = piece / ROW_PIECES;
            sources[i] = row < job.rows ? job.row(row) + piece % ROW_PIECES : nullptr;
        }
    }

    // Begins to copy a chunk, with zeros for absent rows.
    __device__ void copy(int chunk) const {
        uint4* stage = slots + chunk % PREFILL_STAGES * STAGE + thread();
        #pragma unroll
        for (int i = 0; i < COPIES; i++) {
            copy_async_16(stage + i * PREFILL_THREADS, sources[i] + chunk * ROW_PIECES,
                          sources[i] != nullptr);
        }
    }

    // This lane's piece of row g of eight.
    __device__ const uint4& at(int chunk, int tile) const {
        return slots[chunk % PREFILL_STAGES * STAGE + tile * 8 * ROW_PIECES + lane()];
    }
};

// The panel of a warp, as it streams through registers.
struct PanelStream {
    const uint4* panel;
    int pairs;

    // A warp without a panel multiplies zeros, so that it meets the others at the barriers.
    __device__ PanelStream(const uint4* panel, int inputs)
        : panel(panel), pairs(panel == nullptr ? 0 : divide_up(inputs, 2)) {}

    __device__ void load(int chunk, uint4 (&w)[4]) const {
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            LanePiece piece(chunk, j);
            w[j] = {0, 0, 0, 0};
            if (piece.pair < pairs) w[j] = load_stream(panel + piece.at);
        }
    }
};

// The sum of the segments so far, each value touched by its own thread only until the end.
template <int TILES>
struct SharedTotals {
    float4* slots;

    __device__ explicit SharedTotals(void* shared) : slots(static_cast<float4*>(shared)) {}

    __device__ float4& at(int tile, int odd, int thread) const {
        return slots[(tile * 2 + odd) * PREFILL_THREADS + thread];
    }

    // Joins a segment: the first is the sum, and the sum after the last is left in `totals`.
    __device__ void add(int segment, Totals (&totals)[TILES]) const {
        #pragma unroll
        for (int i = 0; i < TILES * 2; i++) {
            float4& sum = at(i / 2, i % 2, thread());
            float4 value = totals[i / 2].outputs(i % 2);
            if (segment > 0) value = sum + value;
            if (segment < SEGMENTS - 1) {
                sum = value;
                totals[i / 2].set(i % 2, {0.0f, 0.0f, 0.0f, 0.0f});
            } else {
                totals[i / 2].set(i % 2, value);
            }
        }
    }
};

// Sums all chunks, segment by segment.
template <int ROWS>
__device__ inline void prefill_sum(const RowRing<ROWS>& ring, const PanelStream& panel, int inputs,
                                   const SharedTotals<ROWS / 8>& sums, Totals (&totals)[ROWS / 8]) {
    constexpr int AHEAD = PREFILL_STAGES - 1, GROUP = 4;
    const int chunks = chunks_of(inputs), length = segment_chunks(inputs);
    for (int chunk = 0; chunk < AHEAD; chunk++) {
        if (chunk < chunks) ring.copy(chunk);
        copy_commit();
    }
    uint4 next[4];
    panel.load(0, next);
    int chunk = 0;
    for (int segment = 0; segment < SEGMENTS; segment++) {
        const int end = min((segment + 1) * length, chunks);
        for (; chunk < end; chunk++) {
            uint4 w[4] = {next[0], next[1], next[2], next[3]};
            panel.load(chunk + 1, next);
            // A group a chunk, also where nothing is left to copy, so that the count holds. After
            // the barrier all threads' pieces of this chunk are there, and nobody reads the stage
            // of the chunk before any more, which is the one to fill.
            copy_wait<AHEAD - 1>();
            block_sync();
            if (chunk + AHEAD < chunks) ring.copy(chunk + AHEAD);
            copy_commit();
            #pragma unroll
            for (int n = 0; n < ROWS / 8; n += GROUP) {
                const uint4 x[GROUP] = {ring.at(chunk, n), ring.at(chunk, n + 1),
                                        ring.at(chunk, n + 2), ring.at(chunk, n + 3)};
                multiply(totals + n, w, x);
            }
        }
        sums.add(segment, totals);
    }
}

// Multiplies the panels of a block with the rows of its tile, at most `ROWS`.
template <int ROWS, class Job>
__device__ void prefill(const Job& job) {
    constexpr int TILES = ROWS / 8, HALF = PREFILL_PANELS / 2;
    const RowRing<ROWS> ring(job);
    const SharedTotals<TILES> sums(ring.slots + PREFILL_STAGES * RowRing<ROWS>::STAGE);
    Totals totals[TILES];
    prefill_sum(ring, PanelStream(job.panel(warp()), job.inputs), job.inputs, sums, totals);

    const int quad = lane() / 4;
    if constexpr (Job::FUSED) {
        // The warps of up hand their totals to those of gate.
        if (warp() >= HALF) {
            #pragma unroll
            for (int i = 0; i < TILES * 2; i++) {
                sums.at(i / 2, i % 2, thread()) = totals[i / 2].outputs(i % 2);
            }
        }
        block_sync();
        if (warp() >= HALF) return;
    }
    #pragma unroll
    for (int i = 0; i < TILES * 2; i++) {
        const int row = i / 2 * 8 + lane() % 4 * 2 + i % 2;
        if (row >= job.rows) continue;
        const float4 value = totals[i / 2].outputs(i % 2);
        if constexpr (Job::FUSED) {
            const float4 partner = sums.at(i / 2, i % 2, thread() + HALF * WARP);
            job.store(row, warp(), quad, value, partner);
        } else {
            job.store(row, warp(), quad, value);
        }
    }
}

// The same for a tile of few rows with half the work, for the same bits.
template <class Job>
__device__ void prefill(const Job& job) {
    if (job.rows <= 0) return;
    if (job.rows <= PREFILL_ROWS / 2) {
        prefill<PREFILL_ROWS / 2>(job);
    } else {
        prefill<PREFILL_ROWS>(job);
    }
}

// Which outputs and which tile a block multiplies, so that blocks that run at the same time share
// what they read: eight tiles with the same outputs follow one another, then the next outputs. So
// the L2 cache brings a panel to eight tiles and a row to all outputs, where blocks in the order of
// the grid would read all weights from memory for each tile.
struct BlockOrder {
    int outputs, tile;

    __device__ BlockOrder() {
        constexpr int HEIGHT = 8;
        const u32 width = gridDim.x, number = blockIdx.y * width + blockIdx.x;
        const u32 first = number / (HEIGHT * width) * HEIGHT, within = number % (HEIGHT * width);
        const u32 height = min(static_cast<u32>(HEIGHT), gridDim.y - first);
        outputs = static_cast<int>(within / height);
        tile = static_cast<int>(first + within % height);
    }
};
