// How a panel of weights and a row of activations meet in the tensor core, for all GEMMs.
//
// Weights lie in memory as processors have them (model/src/kernels/matrix.rs, `Layout::Bf16`): a
// panel is [pair of inputs][32 outputs] of words, a word being both inputs of the pair. Rows are
// bf16, padded with zeros to a multiple of 32 inputs.
//
// Weights are the A operand, so that the tensor core's 16 rows are outputs and its 8 columns are
// rows of activations. Which output and which input stands for which row and column of a fragment
// is free, as long as A, B and the reader of C agree. It is chosen such that what a lane needs lies
// side by side. A lane is 4 g + t, g in 0..8, t in 0..4. It has outputs 4g..4g+3, a `uint4` of a
// pair, and of each 32 inputs pairs 4t..4t+3, a `uint4` of a row:
//
//   A  two tiles of 16 outputs: rows g and g+8 are outputs 4g and 4g+1 in the first tile, 4g+2 and
//      4g+3 in the second; of the two steps of 16 inputs, step s has pair 4t+2s in columns 2t, 2t+1
//      and pair 4t+2s+1 in columns 2t+8, 2t+9
//   B  row g of 8, the same pairs
//   C  outputs 4g..4g+3 of rows 2t and 2t+1
//
// Order of the sum: the inputs are cut into four segments, whose lengths follow from their number
// alone. Each is one chain of tensor core operations, from zero, in ascending order; the segments
// are added in ascending order in f32. Every kernel does exactly this, whatever the rows.
#pragma once

#include "device.cuh"
#include "geometry.cuh"

// Inputs that are multiplied at once.
constexpr int CHUNK = 32;
// 16-byte pieces of a row in a chunk.
constexpr int ROW_PIECES = 4;
// The same of a pair of inputs in a panel.
constexpr int PAIR_PIECES = PANEL / 4;

__device__ inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Chunks of so many inputs, the last perhaps partly beyond the end.
__device__ inline int chunks_of(int inputs) { return divide_up(inputs, CHUNK); }

// Chunks of a segment; the last segments may have fewer, or none.
__device__ inline int segment_chunks(int inputs) { return chunks_of(divide_up(inputs, SEGMENTS)); }

// 16-byte pieces of a stored row.
__device__ inline u64 row_pieces(int values) {
    return static_cast<u64>(chunks_of(values)) * ROW_PIECES;
}

// Panel `number` of a matrix, absent beyond the last.
__device__ inline const uint4* panel_of(const uint4* matrix, int number, int inputs, int outputs) {
    if (number * PANEL >= outputs) return nullptr;
    return matrix + static_cast<u64>(number) * divide_up(inputs, 2) * PAIR_PIECES;
}

// The piece of a panel that is piece `j` of this lane in a chunk.
struct LanePiece {
    int pair;
    int at;
    __device__ LanePiece(int chunk, int j) {
        pair = chunk * (CHUNK / 2) + lane() % 4 * 4 + j;
        at = pair * PAIR_PIECES + lane() / 4;
    }
};

// Accumulators of a panel and 8 rows: two tiles of 16 outputs, as the tensor core holds them.
struct Totals {
    float c[2][4] = {};

    // Outputs 4g..4g+3 of row 2t + odd.
    __device__ float4 outputs(int odd) const {
        return {c[0][odd], c[0][2 + odd], c[1][odd], c[1][2 + odd]};
    }
};

__device__ inline Totals operator+(const Totals& a, const Totals& b) {
    Totals sum;
    #pragma unroll
    for (int i = 0; i < 8; i++) sum.c[i / 4][i % 4] = a.c[i / 4][i % 4] + b.c[i / 4][i % 4];
    return sum;
}

// Adds a chunk to the totals of N times 8 rows: `w` are this lane's four pieces of the panel, `x`
// its pieces of row g of each eight. The first 16 inputs of all come before the last 16 of any, so
// that 2 N operations are independent of one another.
template <int N>
__device__ inline void multiply(Totals* totals, const uint4 (&w)[4], const uint4 (&x)[N]) {
    #pragma unroll
    for (int step = 0; step < 2; step++) {
        const uint4 &first = w[2 * step], &second = w[2 * step + 1];
        const u32 a0[4] = {first.x, first.y, second.x, second.y};
        const u32 a1[4] = {first.z, first.w, second.z, second.w};
        #pragma unroll
        for (int n = 0; n < N; n++) {
            const u32 b[2] = {step == 0 ? x[n].x : x[n].z, step == 0 ? x[n].y : x[n].w};
            mma_bf16(totals[n].c[0], a0, b);
            mma_bf16(totals[n].c[1], a1, b);
        }
    }
}

__device__ inline float4 operator+(const float4& a, const float4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Writes values `first..first + 4` of a row of `len` as f32, those that there are.
__device__ inline void store_f32(float* row, int first, int len, const float4& v) {
    if (len % 4 == 0) {
        if (first < len) *reinterpret_cast<float4*>(row + first) = v;
        return;
    }
    const float values[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; i++) {
        if (first + i < len) row[first + i] = values[i];
    }
}

// Writes values `first..first + 4` of a row of `len` as bf16, and zeros beyond its end: the outputs
// that a panel has too many are the padding of the row.
__device__ inline void store_bf16(uint4* row, int first, int len, const float4& v) {
    auto valid = [&](int i, float value) { return first + i < len ? value : 0.0f; };
    const u32 low = pack_bf16(valid(0, v.x), valid(1, v.y));
    const u32 high = pack_bf16(valid(2, v.z), valid(3, v.w));
    reinterpret_cast<uint2*>(row)[first / 4] = {low, high};
}
