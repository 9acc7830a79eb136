// Products with one matrix: projections of attention and the head.
#include "gemm.cuh"

// Neighbouring rows in, neighbouring rows out.
struct DenseRows {
    int first;
    const uint4* x;
    float* y;

    __device__ const uint4* from(int r, int inputs) const {
        return x + (first + r) * row_pieces(inputs);
    }
    __device__ void store(int r, int output, int outputs, const float4& v) const {
        store_f32(y + static_cast<u64>(first + r) * outputs, output, outputs, v);
    }
};

// y = x * w^T: x bf16 `[rows, inputs]`, padded, y f32 `[rows, outputs]`. The grid is
// [blocks of outputs, tiles of rows].
template <class Weights>
__device__ inline void matmul_few(const uint4* w, const uint4* x, int rows, int inputs, int outputs,
                                  float* y) {
    const int first = static_cast<int>(blockIdx.y) * DECODE_ROWS;
    const int block = static_cast<int>(blockIdx.x);
    decode(Product<Weights, DECODE_PANELS, DenseRows>{{first, x, y}, w, inputs, outputs, block,
                                                      min(rows - first, DECODE_ROWS)});
}

template <class Weights>
__device__ inline void matmul_many(const uint4* w, const uint4* x, int rows, int inputs,
                                   int outputs, float* y) {
    const BlockOrder order;
    const int first = order.tile * Weights::PREFILL_ROWS;
    prefill(Product<Weights, PREFILL_PANELS, DenseRows>{{first, x, y}, w, inputs, outputs,
                                                        order.outputs,
                                                        min(rows - first, Weights::PREFILL_ROWS)});
}

extern "C" __global__ void __launch_bounds__(DECODE_THREADS, DECODE_BLOCKS)
matmul_16(const uint4* w, const uint4* x, int rows, int inputs, int outputs, float* y) {
    matmul_few<Bf16Weights>(w, x, rows, inputs, outputs, y);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS)
matmul_128(const uint4* w, const uint4* x, int rows, int inputs, int outputs, float* y) {
    matmul_many<Bf16Weights>(w, x, rows, inputs, outputs, y);
}

extern "C" __global__ void __launch_bounds__(DECODE_THREADS, DECODE_BLOCKS)
fp8_matmul_16(const uint4* w, const uint4* x, int rows, int inputs, int outputs, float* y) {
    matmul_few<Fp8Weights>(w, x, rows, inputs, outputs, y);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS)
fp8_matmul_64(const uint4* w, const uint4* x, int rows, int inputs, int outputs, float* y) {
    matmul_many<Fp8Weights>(w, x, rows, inputs, outputs, y);
}
