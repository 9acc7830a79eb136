// The primitives of model/src/kernels/cuda/device.cuh on the engine. Nothing here is fast, and what
// a device leaves open is done in the most unkind way that it permits.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARP = 32;

static inline int thread() { return int(threadIdx.x); }
static inline int lane() { return int(threadIdx.x) % WARP; }
static inline int warp() { return int(threadIdx.x) / WARP; }

static inline float bits_to_float(u32 bits) { return __uint_as_float(bits); }
static inline u32 float_to_bits(float value) { return __float_as_uint(value); }

static inline void block_sync(int line = __builtin_LINE()) {
    entente_emulator_meet(MEET_BLOCK, line, nullptr);
}

static inline void warp_sync(int line = __builtin_LINE()) {
    entente_emulator_meet(MEET_WARP, line, nullptr);
}

static inline float shuffle(float value, int lane, int line = __builtin_LINE()) {
    ShuffleDeposit deposit = {value, lane, 0.0f};
    entente_emulator_meet(MEET_SHUFFLE, line, &deposit);
    return deposit.result;
}

static inline float shuffle_xor(float value, int mask, int line = __builtin_LINE()) {
    ShuffleDeposit deposit = {value, mask, 0.0f};
    entente_emulator_meet(MEET_SHUFFLE_XOR, line, &deposit);
    return deposit.result;
}

static inline void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2],
                            int line = __builtin_LINE()) {
    MmaDeposit deposit = {c, a, b};
    entente_emulator_meet(MEET_MMA, line, &deposit);
}

static inline void copy_async_16(void* shared, const void* global, bool valid,
                                 int line = __builtin_LINE()) {
    entente_emulator_copy(shared, global, valid, line);
}

static inline void copy_commit() { entente_emulator_copy_commit(); }

template <int groups_left> static inline void copy_wait() {
    entente_emulator_copy_wait(groups_left);
}

// Nothing is fetched, but what is asked for must be there: both ends are looked at.
static inline void prefetch_l2(const void* global, int bytes) {
    if ((reinterpret_cast<u64>(global) | bytes) % 16 != 0) __builtin_trap();
    const volatile char* at = static_cast<const volatile char*>(global);
    if (bytes > 0) (void)(at[0] + at[bytes - 1]);
}

static inline uint4 load_stream(const uint4* global) { return *global; }
static inline uint2 load_stream(const uint2* global) { return *global; }

static inline void* dynamic_shared() { return entente_emulator_dynamic_shared(); }

// Nearest, ties to even; a NaN stays one.
static inline u32 round_bf16(float value) {
    u32 bits = float_to_bits(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline u32 pack_bf16(float low, float high) {
    return round_bf16(low) | round_bf16(high) << 16;
}

static inline float low_bf16(u32 pair) { return bits_to_float(pair << 16); }
static inline float high_bf16(u32 pair) { return bits_to_float(pair & 0xffff0000u); }

static inline u32 multiply_bf16(u32 a, u32 b) {
    return pack_bf16(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b));
}

static inline u32 permute_bytes(u32 low, u32 high, u32 which) {
    const u64 bytes = u64(high) << 32 | low;
    u32 chosen = 0;
    for (int i = 0; i < 4; i++) {
        const u32 digit = which >> (4 * i) & 15;
        // The digits from 8 on repeat a byte's sign.
        if (digit > 7) __builtin_trap();
        chosen |= u32(bytes >> (8 * digit) & 0xff) << (8 * i);
    }
    return chosen;
}
