// GEMM of many rows: as fast as the tensor cores multiply.
//
// A block multiplies eight panels, one a warp, with up to 128 rows, or 64 where weights are fp8. What
// bounds it beside the tensor cores, for a chunk of 32 inputs at the 800 or so cycles that they take
// for it on an H100, in bf16:
//
// - L2 cache: 16 KB of weights and 8 KB of rows, 30 bytes a cycle and SM. A tile of 128 outputs
//   would want 40, more than there is.
// - shared memory: each warp reads all rows, 64 KB in all, 512 cycles.
// - registers: 128 accumulators a lane. The sum of the segments before would be 128 more, so it is
//   kept in shared memory, 128 KB of it; it is touched at three borders only.
//
// In fp8 the sum of a block of inputs stands beside that of its segment, for which half as many rows
// leave room. Weights are half the bytes, so the cache is asked for no more than in bf16; but each is
// widened for 64 rows only. That takes 3 or 4 integer operations for two weights, and their units 200
// to 250 of the 410 cycles of a chunk; one warp of a scheduler widens while another multiplies.
//
// Weights need no shared memory: a panel is one warp's alone, and lies such that a lane's 16 bytes,
// or 8, are parts of its own fragments. They go from memory to the cache ahead of time, 64 KB an SM,
// and from there to registers one chunk ahead. Rows are every warp's; they pass through a ring of
// stages, copied asynchronously, three chunks ahead. A warp reads 8 rows of 64 bytes, which follow
// one another: no two lanes meet in a bank.
#pragma once

#include "panel.cuh"

static_assert(PREFILL_THREADS == PREFILL_PANELS * WARP, "a warp multiplies one panel");

// The fewest rows for which each thread has something to copy.
constexpr int PREFILL_ROWS_MIN = PREFILL_THREADS / ROW_PIECES;

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

// The panel of a warp, as it streams through registers. Of each pair a lane has outputs 4g..4g+3.
template <class Weights>
struct PanelStream {
    typedef typename Weights::Quad Quad;

    const uint4* panel;
    QuadScales<Weights> scales;
    int pairs;

    // A warp without a panel multiplies zeros, so that it meets the others at the barriers.
    __device__ PanelStream(const uint4* panel, int inputs)
        : panel(panel), scales(panel, inputs, lane() / 4),
          pairs(panel == nullptr ? 0 : divide_up(inputs, 2)) {}

    __device__ void load(int chunk, Quad (&quads)[4]) const {
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            const int pair = lane_pair(chunk, j), at = pair * QUADS + lane() / 4;
            quads[j] = Quad();
            if (pair < pairs) quads[j] = load_stream(reinterpret_cast<const Quad*>(panel) + at);
        }
    }

    // Asks for chunks from `chunk` on, so that what comes from memory is in the cache once it is
    // loaded: at tiles of few rows a chunk takes less time than memory does. A chunk lies in one
    // piece; one lane asks for all of it.
    __device__ void prefetch(int chunk, int count) const {
        const int first = min(chunk * (CHUNK / 2), pairs);
        const int here = min(count * (CHUNK / 2), pairs - first);
        if (lane() != 0 || here <= 0) return;
        prefetch_l2(panel + first * Weights::PAIR_PIECES, here * Weights::PAIR_PIECES * 16);
    }
};

// The sums of the segments so far, each value touched by its own thread only until the end.
struct SharedTotals {
    float4* slots;

    __device__ float4& at(int tile, int half, int thread) const {
        return slots[(tile * 2 + half) * PREFILL_THREADS + thread];
    }
    __device__ void put(int tile, const Totals& totals) const {
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const float(&c)[4] = totals.c[half];
            at(tile, half, thread()) = {c[0], c[1], c[2], c[3]};
        }
    }
    __device__ Totals get(int tile, int thread) const {
        const float4 a = at(tile, 0, thread), b = at(tile, 1, thread);
        return {{{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}}};
    }
};

// What a warp does: its panel times the rows of the tile.
template <class Weights, int ROWS>
struct PrefillWarp {
    typedef typename Weights::Quad Quad;

    static constexpr int TILES = ROWS / 8;
    // Tiles whose rows are read together.
    static constexpr int GROUP = 4;
    static constexpr int AHEAD = PREFILL_STAGES - 1;
    // Chunks of weights that are asked for before they are loaded: 8 KB of a panel.
    static constexpr int FAR = 32 / Weights::PAIR_PIECES;

    const RowRing<ROWS>& ring;
    const PanelStream<Weights>& panel;
    const SharedTotals& joined;
    // Chunks in all, chunks of a segment, the segment under way and the chunk after it.
    int chunks, length, segment, border;
    uint4 first_rows[GROUP];
    Sums<Weights, TILES> sums;

    __device__ PrefillWarp(const RowRing<ROWS>& ring, const PanelStream<Weights>& panel,
                           const SharedTotals& joined, int inputs)
        : ring(ring), panel(panel), joined(joined), chunks(chunks_of(inputs)),
          length(segment_chunks<Weights>(inputs)), segment(0), border(length) {}

    __device__ void read_rows(int chunk, int tile, uint4 (&x)[GROUP]) const {
        #pragma unroll
        for (int i = 0; i < GROUP; i++) x[i] = ring.at(chunk, tile + i);
    }

    // Adds the segment to those before it and begins the next; after the last, the sum of all is
    // left in `sums.totals`.
    __device__ void end_segment() {
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            Totals& total = sums.totals[tile];
            if (segment > 0) total = joined.get(tile, thread()) + total;
            if (segment < SEGMENTS - 1) {
                joined.put(tile, total);
                total = Totals();
            }
        }
        segment++;
        border += length;
    }

    // Multiplies a chunk with `w` and asks for the next one's weights, for which there is thus the
    // whole chunk's time.
    __device__ void step(int chunk, Quad (&next)[4]) {
        // A fragment is half of one piece and half of another, so they must be moved in any case.
        const uint4 w[4] = {Weights::words(next[0]), Weights::words(next[1]),
                            Weights::words(next[2]), Weights::words(next[3])};
        // A group a chunk, also where nothing is left to copy, so that the count holds. After the
        // barrier the next chunk is there, all threads' pieces of it, and nobody reads the stage of
        // the chunk before any more, which is the one to fill.
        copy_wait<AHEAD - 2>();
        block_sync();
        panel.load(chunk + 1, next);
        sums.begin_chunk(chunk, panel.scales);
        // These were read before the barrier, so that no warp waits for shared memory behind it.
        multiply(sums.chain(), w, first_rows);
        if (chunk + AHEAD < chunks) ring.copy(chunk + AHEAD);
        copy_commit();
        #pragma unroll
        for (int tile = GROUP; tile < TILES; tile += GROUP) {
            uint4 x[GROUP];
            read_rows(chunk, tile, x);
            multiply(sums.chain() + tile, w, x);
        }
        // After the last chunk these are any bytes, and not used.
        read_rows(chunk + 1, 0, first_rows);
        panel.prefetch(chunk + FAR, 1);
        sums.end_chunk(chunk, chunks);
        if (chunk + 1 == border) end_segment();
    }

    // Sums all chunks, segment by segment.
    __device__ void sum() {
        for (int chunk = 0; chunk < AHEAD; chunk++) {
            if (chunk < chunks) ring.copy(chunk);
            copy_commit();
        }
        Quad next[4];
        panel.load(0, next);
        panel.prefetch(1, FAR - 1);
        copy_wait<AHEAD - 1>();
        block_sync();
        read_rows(0, 0, first_rows);
        for (int chunk = 0; chunk < chunks; chunk++) step(chunk, next);
        // A segment that is not full, and those that have nothing: they too are added.
        while (segment < SEGMENTS) end_segment();
    }
};

// Hands the sums to the job. Lanes have outputs 4g..4g+3 of rows 2t and 2t+1 of each eight.
template <int TILES, class Job>
__device__ void prefill_store(const Job& job, const Totals (&totals)[TILES],
                              const SharedTotals& joined) {
    constexpr int HALF = PREFILL_PANELS / 2;
    if constexpr (Job::FUSED) {
        // The warps of up hand theirs to those of gate.
        if (warp() >= HALF) {
            #pragma unroll
            for (int tile = 0; tile < TILES; tile++) joined.put(tile, totals[tile]);
        }
        block_sync();
        if (warp() >= HALF) return;
    }
    #pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        Totals partner;
        if constexpr (Job::FUSED) partner = joined.get(tile, thread() + HALF * WARP);
        #pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int row = tile * 8 + lane() % 4 * 2 + odd, quad = lane() / 4;
            if (row >= job.rows) continue;
            const float4 value = totals[tile].outputs(odd);
            if constexpr (Job::FUSED) {
                job.store(row, warp(), quad, value, partner.outputs(odd));
            } else {
                job.store(row, warp(), quad, value);
            }
        }
    }
}

// Multiplies the panels of a block with the rows of its tile, at most `ROWS`.
template <int ROWS, class Job>
__device__ void prefill(const Job& job) {
    typedef typename Job::Weights Weights;
    const RowRing<ROWS> ring(job);
    const PanelStream<Weights> panel(job.panel(warp()), job.inputs);
    const SharedTotals joined = {
        reinterpret_cast<float4*>(ring.slots + PREFILL_STAGES * RowRing<ROWS>::STAGE)};
    PrefillWarp<Weights, ROWS> work(ring, panel, joined, job.inputs);
    work.sum();
    prefill_store(job, work.sums.totals, joined);
}

// The same for a tile of few rows with less work, for the same bits.
template <class Job>
__device__ void prefill(const Job& job) {
    constexpr int ROWS = Job::Weights::PREFILL_ROWS;
    static_assert(Job::Weights::PREFILL_SHARED_BYTES ==
                      PREFILL_STAGES * ROWS * ROW_PIECES * 16 + PREFILL_PANELS * PANEL * ROWS * 4,
                  "a ring of rows and the totals");
    if (job.rows <= 0) return;
    if (job.rows <= PREFILL_ROWS_MIN) {
        prefill<PREFILL_ROWS_MIN>(job);
    } else if constexpr (ROWS > PREFILL_ROWS_MIN) {
        prefill<ROWS>(job);
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
