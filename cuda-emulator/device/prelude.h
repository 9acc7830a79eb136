// The words of CUDA C++ that C++ lacks, and the door to the engine.
//
// It is included before a kernel file and outside the nameless namespace in which that file is
// compiled: what is here has one definition in the library, what is there belongs to its file.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after another, so one place will do for the shared memory of all. They lie in a
// section of their own, whose ends the linker knows: the engine poisons it before each block.
#define __shared__ static __attribute__((section("entente_shared")))

struct uint2 { unsigned x, y; } __align__(8);
struct uint3 { unsigned x, y, z; };
struct uint4 { unsigned x, y, z, w; } __align__(16);
struct int2 { int x, y; } __align__(8);
struct int4 { int x, y, z, w; } __align__(16);
struct float2 { float x, y; } __align__(8);
struct float4 { float x, y, z, w; } __align__(16);

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Set by the engine whenever it lets a thread go on; never constant to the compiler.
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" {

// All lanes of a warp meet: the engine does what `kind` says once the last one is there. `line` is
// where in the source they stand, which must be the same place for all.
void entente_emulator_meet(int kind, int line, void* deposit);

// An asynchronous copy of 16 bytes, of zeros where it is not valid; done when it is waited for.
void entente_emulator_copy(void* to, const void* from, int valid, int line);
void entente_emulator_copy_commit();
void entente_emulator_copy_wait(int groups_left);

// Where the shared memory begins that the launch asked for.
void* entente_emulator_dynamic_shared();

}

// As `Kind` in src/engine/lane.rs.
enum { MEET_BLOCK = 0, MEET_WARP = 1, MEET_SHUFFLE = 2, MEET_SHUFFLE_XOR = 3, MEET_MMA = 4 };

struct ShuffleDeposit { float value; int operand; float result; };
struct MmaDeposit { float* c; const unsigned* a; const unsigned* b; };

// How the engine calls a kernel that it knows by name only.
struct Kernel {
    const char* name;
    void (*call)(void* const* arguments);
    const unsigned* sizes;
    unsigned parameters;
};

struct KernelTable {
    const Kernel* kernels;
    unsigned count;
};

template <auto function> struct Entry;

template <typename... P, void (*function)(P...)> struct Entry<function> {
    static constexpr unsigned sizes[sizeof...(P) + 1] = {sizeof(P)..., 0};

    template <size_t... i> static void pass(void* const* arguments, std::index_sequence<i...>) {
        function(*static_cast<P*>(arguments[i])...);
    }

    static void call(void* const* arguments) {
        pass(arguments, std::make_index_sequence<sizeof...(P)>());
    }

    static constexpr Kernel named(const char* name) { return {name, call, sizes, sizeof...(P)}; }
};
