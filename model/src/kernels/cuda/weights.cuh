// Forms of weights. A GEMM is a template over one of them: how a panel of 32 outputs lies in memory,
// what of it a lane takes, how that becomes what the tensor core multiplies, and how its sums become
// those of the product. Processors have the same bytes (model/src/kernels/matrix.rs).
//
// What all forms have in common: a panel is [pair of inputs][32 outputs][input of the pair], and a
// lane takes four outputs of a pair at a time, a `Quad`.
#pragma once

#include "device.cuh"
#include "geometry.cuh"

// Inputs that are multiplied at once.
constexpr int CHUNK = 32;
// Fours of outputs of a panel.
constexpr int QUADS = PANEL / 4;

__device__ inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Chunks of so many inputs, the last perhaps partly beyond the end.
__device__ inline int chunks_of(int inputs) { return divide_up(inputs, CHUNK); }

// `Layout::Bf16`: words, each both inputs of a pair.
struct Bf16Weights {
    typedef uint4 Quad;

    // 16-byte pieces of a pair.
    static constexpr int PAIR_PIECES = QUADS;
    // Chunks that are summed before a scale is applied; the whole segment where there is none.
    static constexpr int BLOCK_CHUNKS = 0;

    static constexpr int DECODE_STAGES = ::DECODE_STAGES;
    static constexpr int DECODE_SHARED_BYTES = ::DECODE_SHARED_BYTES;
    static constexpr int PREFILL_ROWS = ::PREFILL_ROWS;
    static constexpr int PREFILL_SHARED_BYTES = ::PREFILL_SHARED_BYTES;

    // 16-byte pieces of a panel.
    __device__ static u64 panel_pieces(int inputs) {
        return static_cast<u64>(divide_up(inputs, 2)) * PAIR_PIECES;
    }

    __device__ static Quad quad(const uint4& piece, int) { return piece; }
    __device__ static uint4 words(const Quad& quad) { return quad; }
};

// Four weights in e4m3, two inputs of one output and of the next, as words of bf16: exact.
//
// The seven bits below the sign, laid where exponent and fraction of bf16 meet, are 2^-120 times the
// weight: the exponents' biases are 7 and 127. That holds of subnormal weights too, as the product
// of two bf16 knows subnormal ones. Packed weights are numbers; the two codes that are none would
// become 480.
__device__ inline uint2 widen_e4m3(u32 four) {
    constexpr u32 SCALE = 0x7b807b80;
    const u32 upper = (four & 0x80808080) | (four >> 4 & 0x07070707);
    const u32 lower = four << 4 & 0xf0f0f0f0;
    return {multiply_bf16(permute_bytes(lower, upper, 0x5140), SCALE),
            multiply_bf16(permute_bytes(lower, upper, 0x7362), SCALE)};
}

// `Layout::Fp8`: bytes in e4m3, and behind them for each 128 inputs the scales of the 32 outputs.
struct Fp8Weights {
    typedef uint2 Quad;

    static constexpr int PAIR_PIECES = QUADS / 2;
    static constexpr int BLOCK_CHUNKS = FP8_BLOCK / CHUNK;

    static constexpr int DECODE_STAGES = FP8_DECODE_STAGES;
    static constexpr int DECODE_SHARED_BYTES = FP8_DECODE_SHARED_BYTES;
    static constexpr int PREFILL_ROWS = FP8_PREFILL_ROWS;
    static constexpr int PREFILL_SHARED_BYTES = FP8_PREFILL_SHARED_BYTES;

    // 16-byte pieces of the scales of a panel for one block of inputs.
    static constexpr int SCALE_PIECES = QUADS;

    // 16-byte pieces of a panel before its scales.
    __device__ static u64 scales_at(int inputs) {
        return static_cast<u64>(divide_up(inputs, 2)) * PAIR_PIECES;
    }
    __device__ static u64 panel_pieces(int inputs) {
        return scales_at(inputs) + static_cast<u64>(divide_up(inputs, FP8_BLOCK)) * SCALE_PIECES;
    }

    __device__ static Quad quad(const uint4& piece, int i) {
        return i == 0 ? Quad{piece.x, piece.y} : Quad{piece.z, piece.w};
    }
    __device__ static uint4 words(const Quad& quad) {
        const uint2 first = widen_e4m3(quad.x), second = widen_e4m3(quad.y);
        return {first.x, first.y, second.x, second.y};
    }
};

// Whether sums of this form of weights are made block by block, each with a scale.
template <class Weights>
constexpr bool SCALED = Weights::BLOCK_CHUNKS > 0;

// Chunks of a segment, whole blocks of them; the last segments may have fewer, or none.
template <class Weights>
__device__ inline int segment_chunks(int inputs) {
    const int chunks = chunks_of(divide_up(inputs, SEGMENTS));
    if constexpr (!SCALED<Weights>) return chunks;
    else return divide_up(chunks, Weights::BLOCK_CHUNKS) * Weights::BLOCK_CHUNKS;
}

// Panel `number` of a matrix, absent beyond the last.
template <class Weights>
__device__ inline const uint4* panel_of(const uint4* matrix, int number, int inputs, int outputs) {
    if (number * PANEL >= outputs) return nullptr;
    return matrix + number * Weights::panel_pieces(inputs);
}
