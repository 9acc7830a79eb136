// What happens to rows between the products: norm, rotation, rounding, addition, the cache.
#include "device.cuh"
#include "geometry.cuh"

// Words of a row of bf16, padded to whole chunks of 32 values.
__device__ inline u64 row_words(int values) { return static_cast<u64>((values + 31) / 32) * 16; }

// The number of this thread among all, for kernels without rows.
__device__ inline u64 flat_index() {
    return static_cast<u64>(blockIdx.x) * FLAT_THREADS + threadIdx.x;
}

// Values 2 i and 2 i + 1 of a row, zeros beyond its end.
__device__ inline float2 pair_of(const float* row, int i, int len) {
    return {2 * i < len ? row[2 * i] : 0.0f, 2 * i + 1 < len ? row[2 * i + 1] : 0.0f};
}

// The sum over the block, the same in every thread: across the lanes by halves, then over the warps
// in ascending order.
__device__ inline float block_sum(float value) {
    __shared__ float sums[NORM_THREADS / WARP];
    for (int mask = WARP / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (lane() == 0) sums[warp()] = value;
    block_sync();
    float sum = sums[0];
    for (int i = 1; i < NORM_THREADS / WARP; i++) sum += sums[i];
    return sum;
}

// y = x / sqrt(mean(x^2) + eps) * weight, one block a row, as f32 `[rows, len]`, as bf16 with
// padded rows, or both; either pointer may be null. May be done in place.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
rms_norm(const float* x, const float* weight, float eps, int len, int rows, float* y32, u32* y16) {
    const u64 number = blockIdx.x;
    if (number >= static_cast<u64>(rows)) return;
    const float* row = x + number * len;
    float squares = 0.0f;
    for (int i = thread(); i < len; i += NORM_THREADS) squares = fmaf(row[i], row[i], squares);
    const float scale = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(len) + eps);

    const int words = static_cast<int>(row_words(len));
    for (int i = thread(); i < words; i += NORM_THREADS) {
        const float2 v = pair_of(row, i, len), w = pair_of(weight, i, len);
        const float2 normed = {v.x * scale * w.x, v.y * scale * w.y};
        if (y16 != nullptr) y16[number * words + i] = pack_bf16(normed.x, normed.y);
        if (y32 == nullptr) continue;
        if (2 * i < len) y32[number * len + 2 * i] = normed.x;
        if (2 * i + 1 < len) y32[number * len + 2 * i + 1] = normed.y;
    }
}

// Rotates all heads in place, half-split pairing: value i with value i + head_dim / 2. x is
// `[rows, heads, head_dim]`, cos and sin are `[rows, head_dim / 2]`. A thread turns one pair.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
rope(float* x, int rows, int heads, int head_dim, const float* cos, const float* sin) {
    const int half = head_dim / 2;
    const u64 index = flat_index();
    if (index >= static_cast<u64>(rows) * heads * half) return;
    const u64 head = index / half, row = head / heads;
    const int i = static_cast<int>(index % half);
    float* first = x + head * head_dim + i;
    const float a = *first, b = first[half], c = cos[row * half + i], s = sin[row * half + i];
    *first = a * c - b * s;
    first[half] = b * c + a * s;
}

// Rounds keys and values, `[rows, kv_heads, head_dim]`, into the cache,
// `[block][kv_head][16][head_dim]`; row r goes to slot `slots[r]`, which is block * 16 + offset. A
// thread rounds two neighbours.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
write_kv(u16* keys, u16* values, const u32* slots, int rows, int kv_heads, int head_dim,
         const float* k, const float* v) {
    const int half = head_dim / 2;
    const u64 index = flat_index();
    if (index >= static_cast<u64>(rows) * kv_heads * half) return;
    const u64 row = index / half / kv_heads, head = index / half % kv_heads, at = index % half;
    const u64 slot = slots[row];
    const u64 to = ((slot / KV_BLOCK * kv_heads + head) * KV_BLOCK + slot % KV_BLOCK) * half + at;
    reinterpret_cast<u32*>(keys)[to] = pack_bf16(k[2 * index], k[2 * index + 1]);
    reinterpret_cast<u32*>(values)[to] = pack_bf16(v[2 * index], v[2 * index + 1]);
}

// x += delta.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
add(float* x, const float* delta, int n) {
    const u64 index = flat_index();
    if (index < static_cast<u64>(n)) x[index] += delta[index];
}

// Rounds rows of f32 to bf16, padded with zeros.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
round_rows(const float* x, int rows, int len, u32* y16) {
    const u64 index = flat_index(), words = row_words(len);
    if (index >= rows * words) return;
    const float2 v = pair_of(x + index / words * len, static_cast<int>(index % words), len);
    y16[index] = pack_bf16(v.x, v.y);
}
