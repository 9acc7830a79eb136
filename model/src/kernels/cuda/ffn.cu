// The gated feed-forward of many experts in one launch: down(silu(gate(x)) * up(x)).
//
// A tile is some rows of one expert, and the grid is [blocks of outputs, tiles], so that experts
// with many rows and with few share the device. The host cuts an expert's rows into tiles of 16 or
// of 128, 64 where weights are fp8, and launches the kernel of that size; both give the same bits.
#include "gemm.cuh"
#include "math.cuh"

// Some rows of one expert, `assignments[first..first + rows]`.
struct FfnTile {
    const uint4 *gate, *up, *down;
    int first, rows;
};

// An assignment is a row given to an expert: x, the row of the input; y, that of the output.
typedef uint2 Assignment;

// silu(gate * x) * (up * x), rounded to bf16. Panels of a block: half of them of gate, then as many
// of up, for the same outputs.
template <class Form, int PANELS>
struct GateUp {
    typedef Form Weights;
    static constexpr bool FUSED = true;
    static constexpr int WIDTH = PANELS / 2;

    FfnTile tile;
    const Assignment* assignments;
    const uint4* x;
    int inputs, outputs;
    uint4* h;
    int block, rows;

    __device__ const uint4* panel(int i) const {
        const uint4* matrix = i < WIDTH ? tile.gate : tile.up;
        return panel_of<Weights>(matrix, block * WIDTH + i % WIDTH, inputs, outputs);
    }
    __device__ const uint4* row(int r) const {
        return x + assignments[tile.first + r].x * row_pieces(inputs);
    }
    __device__ float4 joined(const float4& g, const float4& u) const {
        return {silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w};
    }
    // Of panel `i` of gate and its partner of up, four outputs.
    __device__ void store(int r, int i, int quad, const float4& g, const float4& u) const {
        const int panel = block * WIDTH + i;
        if (panel * PANEL >= outputs) return;
        uint4* to = h + (tile.first + r) * row_pieces(outputs);
        store_bf16(to, panel * PANEL + 4 * quad, outputs, joined(g, u));
    }
};

// The rows of a tile on their way through down: from where gate and up left them to where the
// assignments say.
struct DownRows {
    int first;
    const Assignment* assignments;
    const uint4* h;
    uint4* y16;
    float* y32;

    __device__ const uint4* from(int r, int inputs) const {
        return h + (first + r) * row_pieces(inputs);
    }
    __device__ void store(int r, int output, int outputs, const float4& v) const {
        const u64 row = assignments[first + r].y;
        if (y16 != nullptr) store_bf16(y16 + row * row_pieces(outputs), output, outputs, v);
        else store_f32(y32 + row * outputs, output, outputs, v);
    }
};

// x is bf16 `[rows, hidden]`, h bf16 `[assignments, inner]`, the rows of both padded with zeros.
template <class Weights>
__device__ inline void gate_up_few(const FfnTile* tiles, const Assignment* assignments,
                                   const uint4* x, int hidden, int inner, uint4* h) {
    const FfnTile tile = tiles[blockIdx.y];
    const int block = static_cast<int>(blockIdx.x);
    decode(GateUp<Weights, DECODE_PANELS>{tile, assignments, x, hidden, inner, h, block,
                                          tile.rows});
}

template <class Weights>
__device__ inline void gate_up_many(const FfnTile* tiles, const Assignment* assignments,
                                    const uint4* x, int hidden, int inner, uint4* h) {
    const BlockOrder order;
    const FfnTile tile = tiles[order.tile];
    prefill(GateUp<Weights, PREFILL_PANELS>{tile, assignments, x, hidden, inner, h, order.outputs,
                                            tile.rows});
}

// y is `[rows, hidden]`, as bf16 with padded rows or as f32; the other pointer is null.
template <class Weights>
__device__ inline void down_few(const FfnTile* tiles, const Assignment* assignments, const uint4* h,
                                int inner, int hidden, uint4* y16, float* y32) {
    const FfnTile tile = tiles[blockIdx.y];
    const int block = static_cast<int>(blockIdx.x);
    const DownRows rows = {tile.first, assignments, h, y16, y32};
    decode(Product<Weights, DECODE_PANELS, DownRows>{rows, tile.down, inner, hidden, block,
                                                     tile.rows});
}

template <class Weights>
__device__ inline void down_many(const FfnTile* tiles, const Assignment* assignments,
                                 const uint4* h, int inner, int hidden, uint4* y16, float* y32) {
    const BlockOrder order;
    const FfnTile tile = tiles[order.tile];
    const DownRows rows = {tile.first, assignments, h, y16, y32};
    prefill(Product<Weights, PREFILL_PANELS, DownRows>{rows, tile.down, inner, hidden,
                                                       order.outputs, tile.rows});
}

extern "C" __global__ void __launch_bounds__(DECODE_THREADS, DECODE_BLOCKS)
ffn_gate_up_16(const FfnTile* tiles, const Assignment* assignments, const uint4* x, int hidden,
               int inner, uint4* h) {
    gate_up_few<Bf16Weights>(tiles, assignments, x, hidden, inner, h);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS)
ffn_gate_up_128(const FfnTile* tiles, const Assignment* assignments, const uint4* x, int hidden,
                int inner, uint4* h) {
    gate_up_many<Bf16Weights>(tiles, assignments, x, hidden, inner, h);
}

extern "C" __global__ void __launch_bounds__(DECODE_THREADS, DECODE_BLOCKS)
ffn_down_16(const FfnTile* tiles, const Assignment* assignments, const uint4* h, int inner,
            int hidden, uint4* y16, float* y32) {
    down_few<Bf16Weights>(tiles, assignments, h, inner, hidden, y16, y32);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS)
ffn_down_128(const FfnTile* tiles, const Assignment* assignments, const uint4* h, int inner,
             int hidden, uint4* y16, float* y32) {
    down_many<Bf16Weights>(tiles, assignments, h, inner, hidden, y16, y32);
}

extern "C" __global__ void __launch_bounds__(DECODE_THREADS, DECODE_BLOCKS)
fp8_ffn_gate_up_16(const FfnTile* tiles, const Assignment* assignments, const uint4* x, int hidden,
                   int inner, uint4* h) {
    gate_up_few<Fp8Weights>(tiles, assignments, x, hidden, inner, h);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS)
fp8_ffn_gate_up_64(const FfnTile* tiles, const Assignment* assignments, const uint4* x, int hidden,
                   int inner, uint4* h) {
    gate_up_many<Fp8Weights>(tiles, assignments, x, hidden, inner, h);
}

extern "C" __global__ void __launch_bounds__(DECODE_THREADS, DECODE_BLOCKS)
fp8_ffn_down_16(const FfnTile* tiles, const Assignment* assignments, const uint4* h, int inner,
                int hidden, uint4* y16, float* y32) {
    down_few<Fp8Weights>(tiles, assignments, h, inner, hidden, y16, y32);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS)
fp8_ffn_down_64(const FfnTile* tiles, const Assignment* assignments, const uint4* h, int inner,
                int hidden, uint4* y16, float* y32) {
    down_many<Fp8Weights>(tiles, assignments, h, inner, hidden, y16, y32);
}
