// Products in f32 multiply-adds, for the gate: rounding its inputs must not decide which experts a
// row goes to. Few outputs, so that its speed matters little beside the experts'.
#include "device.cuh"
#include "geometry.cuh"

constexpr int EXACT_WARPS = EXACT_THREADS / WARP;
// Pairs whose weights a lane asks for at once.
constexpr int EXACT_AHEAD = 8;

// Words of a panel, `[pair][32 outputs]`, both inputs of the pair in one: bf16, widened exactly.
struct WidenedPairs {
    const u32* words;
    __device__ WidenedPairs(const u32* w, int panel, int pairs)
        : words(w + static_cast<u64>(panel) * pairs * PANEL + lane()) {}
    __device__ float2 pair(int p) const {
        const u32 word = words[p * PANEL];
        return {low_bf16(word), high_bf16(word)};
    }
};

// `[pair][input of the pair: 2][32 outputs]` in f32.
struct FloatPairs {
    const float* values;
    __device__ FloatPairs(const float* w, int panel, int pairs)
        : values(w + static_cast<u64>(panel) * pairs * 2 * PANEL + lane()) {}
    __device__ float2 pair(int p) const {
        return {values[2 * p * PANEL], values[(2 * p + 1) * PANEL]};
    }
};

// Values 2 p and 2 p + 1 of a row, zero beyond its end.
__device__ inline float2 pair_at(const float* row, int p, int len) {
    // Rows of an even length begin where two values can be read at once.
    if (len % 2 == 0) return reinterpret_cast<const float2*>(row)[p];
    return {row[2 * p], 2 * p + 1 < len ? row[2 * p + 1] : 0.0f};
}

// One panel and four rows a block: a lane has one output, a warp one of 32 parts of the inputs,
// which it adds in ascending order; the parts are then added in ascending order. Weights are read
// once for the four rows, of which each is summed by itself. A gate has so few panels that a few
// blocks read the whole matrix: hence the many warps, each with eight lines of weights on their way.
template <class Pairs, class Word>
__device__ void matmul_exact(const Word* w, const float* x, int rows, int inputs, int outputs,
                             float* y) {
    __shared__ float sums[EXACT_WARPS][EXACT_ROWS][PANEL];
    const int panel = static_cast<int>(blockIdx.x);
    const int first = static_cast<int>(blockIdx.y) * EXACT_ROWS;
    const int pairs = (inputs + 1) / 2, part = (pairs + EXACT_WARPS - 1) / EXACT_WARPS;
    const int begin = min(warp() * part, pairs), end = min(begin + part, pairs);

    const float* row[EXACT_ROWS];
    float sum[EXACT_ROWS] = {};
    // A row beyond the last is read as the last, and not stored.
    for (int r = 0; r < EXACT_ROWS; r++) {
        row[r] = x + static_cast<u64>(min(first + r, rows - 1)) * inputs;
    }
    const Pairs weights(w, panel, pairs);
    #pragma unroll 1
    for (int p = begin; p < end; p += EXACT_AHEAD) {
        float2 weight[EXACT_AHEAD];
        #pragma unroll
        for (int i = 0; i < EXACT_AHEAD; i++) weight[i] = weights.pair(min(p + i, end - 1));
        #pragma unroll
        for (int i = 0; i < EXACT_AHEAD; i++) {
            if (p + i >= end) break;
            #pragma unroll
            for (int r = 0; r < EXACT_ROWS; r++) {
                const float2 v = pair_at(row[r], p + i, inputs);
                sum[r] = fmaf(v.x, weight[i].x, sum[r]);
                sum[r] = fmaf(v.y, weight[i].y, sum[r]);
            }
        }
    }
    for (int r = 0; r < EXACT_ROWS; r++) sums[warp()][r][lane()] = sum[r];
    block_sync();

    const int r = warp(), output = panel * PANEL + lane();
    if (r >= EXACT_ROWS || first + r >= rows || output >= outputs) return;
    float total = sums[0][r][lane()];
    for (int i = 1; i < EXACT_WARPS; i++) total += sums[i][r][lane()];
    y[static_cast<u64>(first + r) * outputs + output] = total;
}

// y = x * w^T, both `[rows, ..]` in f32. The grid is [panels, rows / 4].
extern "C" __global__ void __launch_bounds__(EXACT_THREADS)
matmul_exact_bf16(const u32* w, const float* x, int rows, int inputs, int outputs, float* y) {
    matmul_exact<WidenedPairs>(w, x, rows, inputs, outputs, y);
}

extern "C" __global__ void __launch_bounds__(EXACT_THREADS)
matmul_exact_f32(const float* w, const float* x, int rows, int inputs, int outputs, float* y) {
    matmul_exact<FloatPairs>(w, x, rows, inputs, outputs, y);
}
