// How a panel of weights and a row of activations meet in the tensor core, for all GEMMs.
//
// Weights are in one of the forms of weights.cuh; rows are bf16, padded with zeros to a multiple of
// 32 inputs.
//
// Weights are the A operand, so that the tensor core's 16 rows are outputs and its 8 columns are
// rows of activations. Which output and which input stands for which row and column of a fragment
// is free, as long as A, B and the reader of C agree. It is chosen such that what a lane needs lies
// side by side. A lane is 4 g + t, g in 0..8, t in 0..4. It has four neighbouring outputs, here 0 to
// 3, and of each 32 inputs pairs 4t..4t+3, a `uint4` of a row:
//
//   A  two tiles of 16 outputs: rows g and g+8 are outputs 0 and 1 in the first tile, 2 and 3 in the
//      second; of the two steps of 16 inputs, step s has pair 4t+2s in columns 2t, 2t+1 and pair
//      4t+2s+1 in columns 2t+8, 2t+9
//   B  row g of 8, the same pairs
//   C  outputs 0 to 3 of rows 2t and 2t+1
//
// Which four outputs a lane has is each kernel's own: no sum depends on it.
//
// Order of the sum: the inputs are cut into four segments, whose lengths follow from their number
// alone. Each is one chain of tensor core operations, from zero, in ascending order, or, where
// weights have scales, the sum of one such chain for each block of inputs that shares them, each
// multiplied with its scale and added in ascending order. The segments are added in ascending order
// in f32. Every kernel does exactly this, whatever the rows.
#pragma once

#include "weights.cuh"

// 16-byte pieces of a row in a chunk.
constexpr int ROW_PIECES = 4;

// 16-byte pieces of a stored row.
__device__ inline u64 row_pieces(int values) {
    return static_cast<u64>(chunks_of(values)) * ROW_PIECES;
}

// The pair of inputs that is pair `j` of this lane in a chunk.
__device__ inline int lane_pair(int chunk, int j) {
    return chunk * (CHUNK / 2) + lane() % 4 * 4 + j;
}

// Accumulators of a panel and 8 rows: two tiles of 16 outputs, as the tensor core holds them.
struct Totals {
    float c[2][4] = {};

    // The four outputs of row 2t + odd.
    __device__ float4 outputs(int odd) const {
        return {c[0][odd], c[0][2 + odd], c[1][odd], c[1][2 + odd]};
    }
    // Adds `block`, whose four outputs have these scales.
    __device__ void add_scaled(const float4& scale, const Totals& block) {
        const float scales[4] = {scale.x, scale.y, scale.z, scale.w};
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            c[i / 4][i % 4] = fmaf(scales[i / 2], block.c[i / 4][i % 4], c[i / 4][i % 4]);
        }
    }
};

__device__ inline Totals operator+(const Totals& a, const Totals& b) {
    Totals sum;
    #pragma unroll
    for (int i = 0; i < 8; i++) sum.c[i / 4][i % 4] = a.c[i / 4][i % 4] + b.c[i / 4][i % 4];
    return sum;
}

// Adds a chunk to the totals of N times 8 rows: `w` are this lane's four outputs of its four pairs in
// bf16, `x` its pieces of row g of each eight. The first 16 inputs of all come before the last 16 of
// any, so that 2 N operations are independent of one another.
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

// The sums of four outputs a lane and N times 8 rows. Products are added to `chain`; at the end of a
// segment `totals` are its sum.
template <class Weights, int N, bool = SCALED<Weights>>
struct Sums {
    Totals totals[N];

    __device__ Totals* chain() { return totals; }
    // Before and after each chunk; `blocks` are the scales of the lane's outputs.
    template <class Blocks>
    __device__ void begin_chunk(int, const Blocks&) {}
    __device__ void end_chunk(int, int) {}
};

// Of weights with scales: the block that is summed is added to the totals when it is whole.
template <class Weights, int N>
struct Sums<Weights, N, true> {
    Totals totals[N], block[N];
    // Asked for when a block begins, a block's time before they are used.
    float4 scale;

    __device__ Totals* chain() { return block; }
    template <class Blocks>
    __device__ void begin_chunk(int chunk, const Blocks& blocks) {
        if (chunk % Weights::BLOCK_CHUNKS == 0) scale = blocks.scale(chunk / Weights::BLOCK_CHUNKS);
    }
    // `end` is the chunk after the last of all: the last block may have fewer.
    __device__ void end_chunk(int chunk, int end) {
        if ((chunk + 1) % Weights::BLOCK_CHUNKS != 0 && chunk + 1 != end) return;
        #pragma unroll
        for (int n = 0; n < N; n++) {
            totals[n].add_scaled(scale, block[n]);
            block[n] = Totals();
        }
    }
};

// Where the scales of four outputs of a panel are, block after block; nowhere if there are none.
template <class Weights, bool = SCALED<Weights>>
struct QuadScales {
    __device__ QuadScales() {}
    __device__ QuadScales(const uint4*, int, int) {}
};

template <class Weights>
struct QuadScales<Weights, true> {
    const uint4* first;

    __device__ QuadScales() : first(nullptr) {}
    __device__ QuadScales(const uint4* panel, int inputs, int quad)
        : first(panel == nullptr ? nullptr : panel + Weights::scales_at(inputs) + quad) {}

    // Zeros where there is no panel, as its weights are.
    __device__ float4 scale(int block) const {
        if (first == nullptr) return {0, 0, 0, 0};
        const uint4 bits = load_stream(first + block * Weights::SCALE_PIECES);
        return {bits_to_float(bits.x), bits_to_float(bits.y), bits_to_float(bits.z),
                bits_to_float(bits.w)};
    }
};

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
