// What the portable kernels need from the platform, in one place: every line of inline PTX or architecture
// test of quantize.cu and attention_wmma.cu is in this file, each with a plain C++ fallback beside it.
//
// These two sources also run on a host without a GPU (tests/cpu_cuda builds them with g++). Apart from plain
// C++17 they use only:
//   qualifiers    extern "C" __global__, __device__ __forceinline__, __launch_bounds__
//   memory        one shared array, dynamic: `extern __shared__ unsigned char shared_memory[];` (128-byte aligned)
//   built-ins     threadIdx.x blockIdx.x gridDim.x blockDim.x (one-dimensional grids and blocks)
//   barriers      __syncthreads, __syncwarp() (full warps), __any_sync
//   shuffles      __shfl_xor_sync (float, int; full mask)
//   vectors       int4, uint4, int2, uint2, float2, float4 (16- and 8-byte loads and stores)
//   reinterpret   __float_as_int, __int_as_float
//   nvcuda::wmma  16x16x16 fragments: signed char, unsigned char -> int; __half -> float; row_major A,
//                 row_major and col_major B, mem_row_major accumulators; fill, load, store, mma_sync
//   types         __half, __nv_bfloat16 with __half2float, __float2half_rn, __bfloat162float, __float2bfloat16_rn
//   math          fminf fmaxf fabsf rintf log2f exp2f logf expf fmaf
// and the functions below.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.cuh"

namespace intfa {

using int8 = signed char;
using uint8 = unsigned char;
using uint32 = unsigned int;
using int64 = long long;

constexpr unsigned kFullWarp = 0xffffffffu;

// What is compiled for, 900 for sm_90; 0 on a host.
#ifdef __CUDA_ARCH__
constexpr int kArchitecture = __CUDA_ARCH__;
#else
constexpr int kArchitecture = 0;
#endif

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// The i-th of four.
__device__ __forceinline__ float one_of(const float4& x, int i) { return i & 2 ? (i & 1 ? x.w : x.z) : i & 1 ? x.y : x.x; }

// --- arithmetic that must not be contracted into FMA (the quantiser is bit-equal to its NumPy model) ----------

__device__ __forceinline__ float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

__device__ __forceinline__ float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

__device__ __forceinline__ float div_rn(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// 1 / x to about a unit in the last place, for x and 1 / x in the normal range.
__device__ __forceinline__ float reciprocal_near(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

// The larger of a and |b| for a >= 0, NaN if either is: no NaN slips through a maximum.
__device__ __forceinline__ float max_magnitude(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(fabsf(b)));
    return c;
#else
    const int x = __float_as_int(a), y = __float_as_int(b) & 0x7fffffff;
    return __int_as_float(x > y ? x : y);  // as integers: NaN lies above infinity, infinity above numbers
#endif
}

// 2**x to about two units in the last place; 2**-inf = 0; results below the normal range become 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// --- bytes ----------------------------------------------------------------------------------------------------

// The low bytes of four words, the first one lowest.
__device__ __forceinline__ uint32 pack_low_bytes(uint32 a, uint32 b, uint32 c, uint32 d) {
#ifdef __CUDA_ARCH__
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
#else
    return (a & 255u) | (b & 255u) << 8 | (c & 255u) << 16 | d << 24;
#endif
}

// Whether one instruction rounds and packs two bytes. Elsewhere (and it is slow there) use float16's subnormals: their
// bits are integers.
constexpr bool kRoundsBytes = kArchitecture == 0 || kArchitecture >= 860;

// The word of four floats rounded to unsigned bytes, half to even, the first one lowest. What is beyond a byte's range
// becomes its end, NaN 0.
__device__ __forceinline__ uint32 round_bytes(float a, float b, float c, float d) {
#ifdef __CUDA_ARCH__
    uint32 word;
    asm("{\n"
        ".reg .s32 a, b, c, d;\n"
        ".reg .b32 high;\n"
        "cvt.rni.s32.f32 a, %1;\n"
        "cvt.rni.s32.f32 b, %2;\n"
        "cvt.rni.s32.f32 c, %3;\n"
        "cvt.rni.s32.f32 d, %4;\n"
        "cvt.pack.sat.u8.s32.b32 high, d, c, 0;\n"
        "cvt.pack.sat.u8.s32.b32 %0, b, a, high;\n"
        "}"
        : "=r"(word)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
#else
    const float x[4] = {a, b, c, d};
    uint32 word = 0;
    for (int i = 0; i < 4; ++i) {
        const float y = x[i] > 0.0f ? x[i] < 255.0f ? __builtin_rintf(x[i]) : 255.0f : 0.0f;
        word |= static_cast<uint32>(y) << 8 * i;
    }
    return word;
#endif
}

// sum + the sum of the four unsigned bytes of a word.
__device__ __forceinline__ uint32 add_bytes(uint32 word, uint32 sum) {
#ifdef __CUDA_ARCH__
    return __dp4a(word, 0x01010101u, sum);
#else
    return sum + (word & 255u) + (word >> 8 & 255u) + (word >> 16 & 255u) + (word >> 24);
#endif
}

// The word of two elements of 16 bits, the first one low.
template <class T>
__device__ __forceinline__ uint32 join_halves(T low, T high) {
#ifdef __CUDA_ARCH__
    return *reinterpret_cast<const unsigned short*>(&low) |
           static_cast<uint32>(*reinterpret_cast<const unsigned short*>(&high)) << 16;
#else
    const T pair[2] = {low, high};
    uint32 word;
    __builtin_memcpy(&word, pair, sizeof word);
    return word;
#endif
}

// Two floats rounded to halves, the first one low.
__device__ __forceinline__ uint32 pack_halves(float a, float b) {
#ifdef __CUDA_ARCH__
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32*>(&pair);
#else
    return join_halves(__float2half_rn(a), __float2half_rn(b));
#endif
}

// A float within an FP8 format's range, or NaN, rounded to it, half to even.
template <int format>
__device__ __forceinline__ uint32 to_fp8(float x) {
    constexpr int mantissa = format == kE4M3 ? 3 : 2;
    constexpr int bias = format == kE4M3 ? 7 : 15;
    constexpr int shift = 23 - mantissa;
    const uint32 word = static_cast<uint32>(__float_as_int(x)), magnitude = word & 0x7fffffffu;
    uint32 byte;
    if (magnitude > 0x7f800000u) {
        byte = 0x7f;
    } else if (magnitude < static_cast<uint32>(128 - bias) << 23) {
        // Subnormal: a multiple of 2^(1 - bias - mantissa), the last place of the number that is added.
        constexpr int magic = (127 + 24 - bias - mantissa) << 23 | 0x400000;
        byte = static_cast<uint32>(__float_as_int(add_rn(__int_as_float(static_cast<int>(magnitude)),
                                                         __int_as_float(magic)))) & 0xffu;
    } else {
        const uint32 rounded = magnitude + (1u << (shift - 1)) - 1 + (magnitude >> shift & 1u);
        byte = (rounded >> shift) - ((127 - bias) << mantissa);
    }
    return byte | (word >> 24 & 0x80u);
}

// Four of them, the first one lowest.
template <int format>
__device__ __forceinline__ uint32 pack_fp8(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    unsigned short low, high;
    if constexpr (format == kE4M3) {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    } else {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    }
    return low | static_cast<uint32>(high) << 16;
#else
    return to_fp8<format>(a) | to_fp8<format>(b) << 8 | to_fp8<format>(c) << 16 | to_fp8<format>(d) << 24;
#endif
}

// x, but the compiler cannot tell: what is computed from it is computed here, not kept in registers over a loop.
__device__ __forceinline__ uint32 opaque(uint32 x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// --- global -> shared copies of 16 bytes: asynchronous where the architecture has them -----------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy16(void* shared, const void* global) {
    const uint32 address = static_cast<uint32>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
// Wait until this thread's copies have landed; a barrier must follow before other threads read them.
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
// Close a group of copies; wait until at most `pending` groups are under way.
__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int pending>
__device__ __forceinline__ void copy_wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
#else
__device__ __forceinline__ void copy16(void* shared, const void* global) {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
}
__device__ __forceinline__ void copy_wait() {}
__device__ __forceinline__ void copy_commit() {}
template <int pending>
__device__ __forceinline__ void copy_wait_groups() {}
#endif

// --- element types --------------------------------------------------------------------------------------------

// load and store convert one element; unpack converts the two elements of a word, the low one first, and store_pair
// two neighbours into the Pair that they are in memory.
template <int dtype>
struct Element;
template <>
struct Element<kFloat16> {
    using type = __half;
    static __device__ __forceinline__ float load(type x) { return __half2float(x); }
    static __device__ __forceinline__ void unpack(uint32 word, float& low, float& high) {
#ifdef __CUDA_ARCH__
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
        low = pair.x;
        high = pair.y;
#else
        type pair[2];
        __builtin_memcpy(pair, &word, sizeof word);
        low = load(pair[0]);
        high = load(pair[1]);
#endif
    }
    // Saturates: a rounded P can carry an output past the largest V by a little. NaN stays.
    static __device__ __forceinline__ type store(float x) {
        return __float2half_rn(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
    }
    using Pair = uint32;
    // at_once: one instruction instead of three, which does not please the compiler everywhere.
    template <bool at_once = false>
    static __device__ __forceinline__ Pair store_pair(float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        uint32 word;
        if (at_once) {
            asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
            return word;
        }
        word = pack_halves(x, y);
        asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(word) : "r"(0x7bff7bffu));  // 65504
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(word) : "r"(0xfbfffbffu));
        return word;
#else
        return join_halves(store(x), store(y));
#endif
    }
};
template <>
struct Element<kBFloat16> {
    using type = __nv_bfloat16;
    static __device__ __forceinline__ float load(type x) { return __bfloat162float(x); }
    static __device__ __forceinline__ void unpack(uint32 word, float& low, float& high) {
        low = __int_as_float(static_cast<int>(word << 16));
        high = __int_as_float(static_cast<int>(word & 0xffff0000u));
    }
    static __device__ __forceinline__ type store(float x) { return __float2bfloat16_rn(x); }
    using Pair = uint32;
    template <bool = false>
    static __device__ __forceinline__ Pair store_pair(float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        uint32 word;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
        return word;
#else
        return join_halves(store(x), store(y));
#endif
    }
};
template <>
struct Element<kFloat32> {
    using type = float;
    static __device__ __forceinline__ float load(type x) { return x; }
    static __device__ __forceinline__ type store(float x) { return x; }
    using Pair = float2;
    template <bool = false>
    static __device__ __forceinline__ Pair store_pair(float x, float y) { return {x, y}; }
};

}  // namespace intfa
