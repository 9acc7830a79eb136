// What a row of logits says of the token that follows it.
//
// The token is the one that the coordinator's sampler takes of the same logits on a processor: the
// same operations in the same order (coordinator/src/engine/logits.rs and sampler.rs), of which the
// compiler joins none.
#include "device.cuh"
#include "geometry.cuh"
#include "math.cuh"

// Logits that are summed by themselves, and how many such sums there are side by side.
constexpr int DRAW_BLOCK = 1024;
constexpr int DRAW_LANES = 16;
constexpr int DRAW_BLOCKS_MAX = VOCAB_MAX / DRAW_BLOCK;

static_assert(DRAW_THREADS == WARP * WARP, "the parts of the warps are one warp's lanes");
static_assert(DRAW_THREADS == DRAW_BLOCK, "a thread for each logit of a block");

// How the token of a row is chosen.
struct Draw {
    // One over the temperature.
    float scale;
    // Smaller weights count as none.
    float weight_min;
    // Where in the sum of all weights the token lies, in [0, 1); less than 0 for the likeliest token.
    double uniform;
};

// A token's logit; the token.
struct Likeliest {
    float logit;
    int token;
};

// The greatest value that a thread of the block has, the same in every thread. None is NaN.
// `parts` is shared, a value for each warp, and used once.
__device__ inline float block_max(float value, float* parts) {
    for (int mask = WARP / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    if (lane() == 0) parts[warp()] = value;
    block_sync();
    value = parts[lane()];
    for (int mask = WARP / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

// The likeliest token, the lowest among equals: a NaN is no logit, and a row of nothing else has
// token 0 and minus infinity. Numbers of tokens travel as floats, which are exact that far.
__device__ inline Likeliest likeliest(const float* row, int len) {
    __shared__ float parts[2][WARP];
    float best = minus_infinity();
    int first = len;
    // Loads that do not wait for one another: a block has the row's whole way to itself.
    #pragma unroll 8
    for (int i = thread(); i < len; i += DRAW_THREADS) {
        const float logit = row[i];
        // Minus infinity, where there is nothing greater, is a logit as well.
        if (logit > best || (logit == best && first == len)) {
            best = logit;
            first = i;
        }
    }
    const float greatest = block_max(best, parts[0]);
    const int mine = best == greatest ? first : len;
    const int lowest = -static_cast<int>(block_max(-static_cast<float>(mine), parts[1]));
    return {greatest, lowest < len ? lowest : 0};
}

// The weight of a logit: e^x for x up to 0; 0 for less than -87 and for NaN.
__device__ inline float weigh(float logit, float greatest, const Draw& draw) {
    const float x = (logit - greatest) * draw.scale;
    // 1.5 * 2^23: added to a small number, it leaves the nearest integer in the low bits.
    const float round = 12582912.0f;
    const float shifted = x * 1.44269504f + round;
    const float n = shifted - round;
    const float r = x - n * 0.6933594f + n * 2.1219444e-4f;
    float p = 1.9875691e-4f * r + 1.3981999e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + (r + 1.0f);
    const float weight = p * bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
    return x >= -87.0f && weight >= draw.weight_min ? weight : 0.0f;
}

// The sum of the weights of each block of logits: by lanes in f32, then over the lanes in f64, both
// in ascending order.
__device__ inline void block_sums(const float* row, int len, float greatest, const Draw& draw,
                                  double* sums) {
    const int own = thread() / DRAW_LANES, begin = lane() / DRAW_LANES * DRAW_LANES;
    for (int first = 0; first * DRAW_BLOCK < len; first += DRAW_THREADS / DRAW_LANES) {
        const int start = (first + own) * DRAW_BLOCK;
        float sum = 0.0f;
        #pragma unroll 4
        for (int i = start + lane() - begin; i < min(start + DRAW_BLOCK, len); i += DRAW_LANES) {
            sum += weigh(row[i], greatest, draw);
        }
        double total = 0.0;
        for (int i = 0; i < DRAW_LANES; i++) total += static_cast<double>(shuffle(sum, begin + i));
        if (lane() == begin && start < len) sums[first + own] = total;
    }
}

// Chooses a token of each row. logits is `[rows, len]` of at most VOCAB_MAX each, a block takes one
// row.
extern "C" __global__ void __launch_bounds__(DRAW_THREADS)
draw(const float* logits, int len, const Draw* draws, u32* tokens) {
    __shared__ double sums[DRAW_BLOCKS_MAX];
    __shared__ float weights[DRAW_BLOCK];
    // The block that the token is in, and how much of the block's weights is left of it.
    __shared__ int found;
    __shared__ double left;
    const float* row = logits + static_cast<u64>(blockIdx.x) * len;
    const Draw draw = draws[blockIdx.x];
    const Likeliest best = likeliest(row, len);
    // What nothing else is found for, as rounding leaves a sliver behind the last weight.
    if (thread() == 0) tokens[blockIdx.x] = static_cast<u32>(best.token);
    if (draw.uniform < 0.0) return;

    block_sums(row, len, best.logit, draw, sums);
    block_sync();
    const int blocks = (len + DRAW_BLOCK - 1) / DRAW_BLOCK;
    if (thread() == 0) {
        double total = 0.0;
        for (int b = 0; b < blocks; b++) total += sums[b];
        left = draw.uniform * total;
        for (found = 0; found < blocks && !(left < sums[found]); found++) left -= sums[found];
    }
    block_sync();
    if (found == blocks) return;
    const int start = found * DRAW_BLOCK;
    const bool there = start + thread() < len;
    weights[thread()] = there ? weigh(row[start + thread()], best.logit, draw) : 0.0f;
    block_sync();
    if (thread() > 0) return;
    double rest = left;
    for (int i = 0; i < DRAW_BLOCK; i++) {
        rest -= static_cast<double>(weights[i]);
        if (!(rest < 0.0)) continue;
        tokens[blockIdx.x] = static_cast<u32>(start + i);
        return;
    }
}
