// Warp-level tensor-core products (mma.sync, sm_80 and later), their operand loads and asynchronous copies.
//
// Fragments of m16n8 products, lane = 4r + q:
//   A (16 rows, 32 bytes deep)   words 0..3: {row r, bytes 4q..4q+3}, {row r+8, same}, {row r, bytes 16+4q..}, {row r+8}
//   B (8 columns, 32 bytes deep) words 0..1: column r, bytes 4q..4q+3 and 16+4q..16+4q+3
//   C                            elements 0..3: {row r, columns 2q, 2q+1}, {row r+8, same}
// A depth of 32 bytes is 32 8-bit or 16 16-bit elements: seen as bytes, all formats have the same fragments.
#pragma once

#include "copy.cuh"
#include "platform.cuh"
#include "shared_memory.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "attention_mma needs sm_80 or later: earlier tensor cores have no m16n8k32 integer product and no cp.async"
#endif

namespace intfa {

// One thread can copy a whole tile (cp.async.bulk).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif

// --- integer products: d = a b + c -----------------------------------------------------------------------------
//
// Where the sum starts is an operand of its own. Starting at kIntegerMagic makes the result, read as a float, the
// number kFloatMagic + a b, as long as |a b| < 2^22: no conversion is needed.

constexpr int kIntegerMagic = 0x4B400000;
constexpr float kFloatMagic = 12582912.0f;  // 1.5 * 2^23

__device__ __forceinline__ void mma_s8s8(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

__device__ __forceinline__ void mma_u8u8(int (&d)[4], const uint32* a, uint32 b0, uint32 b1, const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// --- floating products: d += a b -------------------------------------------------------------------------------

#define INTFA_MMA_FLOAT(shape_and_types)                                                                         \
    asm("mma.sync.aligned." shape_and_types                                                                      \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                       \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <int format>
__device__ __forceinline__ void mma_float(float* d, const uint32* a, uint32 b0, uint32 b1) {
    if constexpr (format == kHalf) {
        INTFA_MMA_FLOAT("m16n8k16.row.col.f32.f16.f16.f32");
    } else if constexpr (format == kBrain) {
        INTFA_MMA_FLOAT("m16n8k16.row.col.f32.bf16.bf16.f32");
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    } else if constexpr (format == kE4M3) {
        INTFA_MMA_FLOAT("m16n8k32.row.col.f32.e4m3.e4m3.f32");
    } else if constexpr (format == kE5M2) {
        INTFA_MMA_FLOAT("m16n8k32.row.col.f32.e5m2.e5m2.f32");
#endif
    } else {
        static_assert(format < 0, "this architecture has no product of this format (FP8 needs sm_89)");
    }
}
#undef INTFA_MMA_FLOAT

// --- operands from shared memory -------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements (8 rows of 16 bytes each); lane l gives the address of row l % 8 of matrix
// l / 8 and gets bytes 4q..4q+3 of row r of each.
__device__ __forceinline__ void load_matrices(uint32 (&x)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}

// The same, each matrix transposed: elements (2q, r) and (2q+1, r).
__device__ __forceinline__ void load_matrices_transposed(uint32 (&x)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}

// 16 bytes, global to shared, asynchronous; see copy_commit and copy_wait_groups.
__device__ __forceinline__ void copy16_async(uint32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The thread's number, read where it is needed: what is derived from it cannot stay in registers over the main loop.
__device__ __forceinline__ uint32 thread_now() {
    uint32 x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// The same value, of which the compiler knows nothing any more.
__device__ __forceinline__ void forget(uint32& x) { asm volatile("mov.u32 %0, %0;" : "+r"(x)); }

// The same value, which the compiler must keep in a register: it cannot know how to compute it again.
__device__ __forceinline__ uint32 kept(uint32 x) {
    return __shfl_sync(kFullWarp, x, static_cast<int>(threadIdx.x % 32));
}

// --- two floats to a smaller format, the first one low ------------------------------------------------------------

template <int format>
__device__ __forceinline__ uint32 pack2(float x, float y) {
    uint32 word = 0;
    if constexpr (format == kHalf) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
    } else if constexpr (format == kBrain) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    } else {
        unsigned short pair;
        if constexpr (format == kE4M3)
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(y), "f"(x));
        else
            asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(y), "f"(x));
        word = pair;
#endif
    }
    return word;
}

// a b + c, rounded down.
__device__ __forceinline__ float fma_down(float a, float b, float c) { return __fmaf_rd(a, b, c); }

// Bytes of eight 4-bit numbers, times 16: the low nibbles of the word's four bytes, and the high ones.
__device__ __forceinline__ uint32 low_nibbles(uint32 word) { return word << 4 & 0xf0f0f0f0u; }
__device__ __forceinline__ uint32 high_nibbles(uint32 word) { return word & 0xf0f0f0f0u; }

// All elements of a word negated (8-bit integers must not be -128).
template <int format>
__device__ __forceinline__ uint32 negate(uint32 word) {
    if constexpr (format == kHalf || format == kBrain)
        return word ^ 0x80008000u;
    else if constexpr (format == kE4M3 || format == kE5M2)
        return word ^ 0x80808080u;
    else
        return __vneg4(word);
}

}  // namespace intfa
