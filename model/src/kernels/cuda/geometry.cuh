// Sizes that the host must know to launch a kernel. geometry.rs has the same ones; a test compares.
// One constant a line, with a number: that test reads this file.
#pragma once

// Outputs of a panel of weights, see model/src/kernels/matrix.rs.
constexpr int PANEL = 32;
// Parts of the inner dimension that are summed by themselves, then joined in ascending order.
constexpr int SEGMENTS = 4;
// Inputs of which each output has one scale, where weights are fp8.
constexpr int FP8_BLOCK = 128;

// GEMM of at most 16 rows, `_16`: one warp a segment.
constexpr int DECODE_ROWS = 16;
constexpr int DECODE_THREADS = 128;
// Panels that a block multiplies: gate and up of the same outputs, or two neighbours.
constexpr int DECODE_PANELS = 2;
constexpr int DECODE_STAGES = 4;
constexpr int DECODE_SHARED_BYTES = 81920;
// With weights in fp8 a stage has half as many bytes of them, so there are more of them.
constexpr int FP8_DECODE_STAGES = 6;
constexpr int FP8_DECODE_SHARED_BYTES = 73728;

// GEMM of at most 128 rows, `_128`: one warp a panel.
constexpr int PREFILL_ROWS = 128;
constexpr int PREFILL_THREADS = 256;
constexpr int PREFILL_PANELS = 8;
constexpr int PREFILL_STAGES = 4;
constexpr int PREFILL_SHARED_BYTES = 163840;
// With weights in fp8, `_64`: the sums of a block of inputs take as many registers as the totals.
constexpr int FP8_PREFILL_ROWS = 64;
constexpr int FP8_PREFILL_SHARED_BYTES = 81920;

// GEMM in f32: a block takes one panel and so many rows.
constexpr int EXACT_ROWS = 4;
constexpr int EXACT_THREADS = 1024;

// Threads of a block of `rms_norm`, which is one row.
constexpr int NORM_THREADS = 256;
// Threads of a block of a kernel that treats each value, or each pair of values, by itself.
constexpr int FLAT_THREADS = 256;

// Positions that share a block of the key-value cache.
constexpr int KV_BLOCK = 16;
// Positions of a split of attention.
constexpr int SPLIT_POSITIONS = 256;
constexpr int ATTENTION_THREADS = 128;
// Queries, that is heads of rows, that a block multiplies at once.
constexpr int ATTENTION_QUERIES = 16;
constexpr int HEAD_DIM_MAX = 256;
// Threads of a block of `attention_join`, which is one row and one head.
constexpr int JOIN_THREADS = 128;

// Threads of a block of `draw`, which is one row.
constexpr int DRAW_THREADS = 1024;
constexpr int VOCAB_MAX = 524288;
