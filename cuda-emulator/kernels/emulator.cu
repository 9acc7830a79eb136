// Kernels that try the engine itself: what it must do, and mistakes that it must find.
#include "device.cuh"

// A block's sum by a tree in shared memory.
extern "C" __global__ void emulator_block_sum(const float* x, float* sums) {
    __shared__ float tree[256];
    u32 thread = threadIdx.x;
    tree[thread] = x[blockIdx.x * blockDim.x + thread];
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        block_sync();
        if (thread < half) tree[thread] += tree[thread + half];
    }
    if (thread == 0) sums[blockIdx.x] = tree[0];
}

// The same without the barrier that keeps the levels of the tree apart.
extern "C" __global__ void emulator_block_sum_unsynchronised(const float* x, float* sums) {
    __shared__ float tree[256];
    u32 thread = threadIdx.x;
    tree[thread] = x[blockIdx.x * blockDim.x + thread];
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (thread < half) tree[thread] += tree[thread + half];
    }
    if (thread == 0) sums[blockIdx.x] = tree[0];
}

// y = a sum over each warp by exchanges, then the value of lane 5 times ten.
extern "C" __global__ void emulator_shuffle(const float* x, float* y) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = x[at];
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    y[at] = sum + 10.0f * shuffle(x[at], 5);
}

// c += a·b of one warp: a is 16 x 16 and b 16 x 8 bf16, c 16 x 8 f32, all row by row; where each
// lane's part lies is what the PTX ISA says of mma.m16n8k16.
extern "C" __global__ void emulator_mma(const u16* a, const u16* b, float* c) {
    u32 group = threadIdx.x / 4, place = threadIdx.x % 4;
    u32 fragment_a[4], fragment_b[2];
    for (u32 i = 0; i < 4; i++) {
        const u16* pair = a + (group + 8 * (i % 2)) * 16 + 2 * place + 8 * (i / 2);
        fragment_a[i] = pair[0] | u32(pair[1]) << 16;
    }
    for (u32 i = 0; i < 2; i++) {
        const u16* pair = b + (2 * place + 8 * i) * 8 + group;
        fragment_b[i] = pair[0] | u32(pair[8]) << 16;
    }
    float* top = c + group * 8 + 2 * place;
    float fragment_c[4] = {top[0], top[1], top[64], top[65]};
    mma_bf16(fragment_c, fragment_a, fragment_b);
    top[0] = fragment_c[0];
    top[1] = fragment_c[1];
    top[64] = fragment_c[2];
    top[65] = fragment_c[3];
}

// Copies by way of shared memory; the last `missing` of the words are not there and read as zero.
template <bool waits> static __device__ void copy(const uint4* from, uint4* to, int missing) {
    __shared__ uint4 staged[32];
    int at = int(threadIdx.x);
    copy_async_16(&staged[at], from + at, at < int(blockDim.x) - missing);
    copy_commit();
    if (waits) copy_wait<0>();
    block_sync();
    to[at] = staged[blockDim.x - 1 - at];
}

extern "C" __global__ void emulator_copy(const uint4* from, uint4* to, int missing) {
    copy<true>(from, to, missing);
}

extern "C" __global__ void emulator_copy_unwaited(const uint4* from, uint4* to, int missing) {
    copy<false>(from, to, missing);
}

// A barrier that the last thread does not come to.
extern "C" __global__ void emulator_left_barrier(float* y) {
    if (threadIdx.x + 1 == blockDim.x) return;
    block_sync();
    y[threadIdx.x] = 1.0f;
}

// A barrier that the last warp does not come to.
extern "C" __global__ void emulator_left_warp(float* y) {
    if (threadIdx.x / 32 + 1 == blockDim.x / 32) return;
    block_sync();
    y[threadIdx.x] = 1.0f;
}

// Lanes of one warp that wait in two places.
extern "C" __global__ void emulator_diverged(float* y) {
    if (threadIdx.x % 2 == 0) {
        warp_sync();
    } else {
        y[threadIdx.x] = shuffle(1.0f, 0);
    }
}

// The same primitive, but in two places.
extern "C" __global__ void emulator_diverged_alike(float* y) {
    if (threadIdx.x % 2 == 0) {
        y[threadIdx.x] = shuffle_xor(1.0f, 1);
    } else {
        y[threadIdx.x] = shuffle_xor(2.0f, 1);
    }
}

// What fresh shared memory holds.
extern "C" __global__ void emulator_fresh_shared(float* y) {
    __shared__ float fresh[32];
    float* dynamic = static_cast<float*>(dynamic_shared());
    y[threadIdx.x] = fresh[threadIdx.x];
    y[blockDim.x + threadIdx.x] = dynamic[threadIdx.x];
    fresh[threadIdx.x] = dynamic[threadIdx.x] = 0.0f;
}

// One number too far.
extern "C" __global__ void emulator_beyond(float* y) { y[threadIdx.x + 1] = 1.0f; }

// An access that is not aligned.
extern "C" __global__ void emulator_unaligned(u32* y) {
    *reinterpret_cast<uint2*>(y + threadIdx.x) = {0, 0};
}

// An index beyond an array in shared memory.
extern "C" __global__ void emulator_beyond_shared(u32* y) {
    __shared__ u32 values[63];
    values[threadIdx.x] = 0;
    y[threadIdx.x] = values[0];
}

// What an argument of each kind arrives as, and where a thread stands.
struct EmulatorPair { float scale; unsigned char offset; };

extern "C" __global__ void emulator_arguments(u32* y, EmulatorPair pair, long long add, int n) {
    u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    u32 thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    u32 at = block * blockDim.x * blockDim.y * blockDim.z + thread;
    if (at < u32(n)) y[at] = u32(pair.scale * float(at)) + pair.offset + u32(add);
}
