// What the kernels ask of the device, and the only file with instructions of one: everything else
// is plain C++ over these names. A test that runs the kernels without a GPU puts a file of its own
// in this one's place, so what is not listed here must not be used elsewhere.
//
// From the compiler itself come threadIdx, blockIdx, gridDim, the vector types (uint2, uint4,
// float2, float4), fmaf, sqrtf, the function and memory qualifiers, and nothing else: no header of
// the host or the toolkit is included, so that the run-time compiler needs no path.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARP = 32;

// --- Where this thread is ---

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int lane() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / WARP; }

// --- Bits ---

__device__ inline float bits_to_float(u32 bits) { return __uint_as_float(bits); }
__device__ inline u32 float_to_bits(float value) { return __float_as_uint(value); }

// The two values of a word of bf16, widened: exact.
__device__ inline float low_bf16(u32 word) { return bits_to_float(word << 16); }
__device__ inline float high_bf16(u32 word) { return bits_to_float(word & 0xffff0000u); }

// Two values rounded to bf16, nearest, ties to even, in one word.
__device__ inline u32 pack_bf16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// The products of the two values of two words of bf16, rounded to nearest, subnormal ones too.
__device__ inline u32 multiply_bf16(u32 a, u32 b) {
    // Devices before sm_90 multiply by adding -0, which changes nothing.
    u32 word;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(0x80008000u));
    return word;
}

// Four of the eight bytes of two words, those of `low` being 0 to 3: each of the four lowest hex
// digits of `which` chooses one.
__device__ inline u32 permute_bytes(u32 low, u32 high, u32 which) {
    return __byte_perm(low, high, which);
}

// --- Tensor cores ---

// c += a * b on a 16 x 8 tile over 16 inputs, bf16 in, f32 accumulated: mma.m16n8k16 of the PTX
// manual, whose fragments a lane holds in that order. All lanes of the warp together.
__device__ inline void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- Memory ---

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline void* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    return shared_bytes;
}

// 16 or 8 bytes of global memory that nothing writes while the kernel runs and that this SM will
// not want again, so that they take no place in its L1.
__device__ inline uint4 load_stream(const uint4* global) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

__device__ inline uint2 load_stream(const uint2* global) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(global));
    return v;
}

// Has the L2 cache fetch `bytes` from `global` on, both multiples of 16, with one instruction of
// one lane where the device has one for it. It changes when something is there, never what.
__device__ inline void prefetch_l2(const void* global, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes));
#endif
}

// Begins to copy 16 bytes from global to shared memory, past L1; zeros where `valid` is false, and
// then nothing is read.
__device__ inline void copy_async_16(void* shared, const void* global, bool valid) {
    u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(global), "r"(bytes)
                 : "memory");
}

// Ends a group of copies of this thread.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `PENDING` latest groups of this thread are under way. What the others
// brought is visible to this thread only after a barrier that they have passed as well.
template <int PENDING>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- Threads together ---

__device__ inline void block_sync() { __syncthreads(); }
__device__ inline void warp_sync() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`; all lanes together.
__device__ inline float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of lane `from`; all lanes together.
__device__ inline float shuffle(float value, int from) {
    return __shfl_sync(0xffffffffu, value, from);
}
