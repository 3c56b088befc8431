// Integer wgmma of Hopper (sm_90a): 64 rows of A by N columns of B, 32 deep, int32 accumulators.
//
// A warpgroup (four warps) issues each product together. Lane 4r+q of warp w holds rows 16w+r and 16w+r+8 of the
// accumulator: element 4i+{0,1} is row r, columns 8i+2q+{0,1}; 4i+{2,3} the same columns of row r+8.
// A product runs asynchronously: its registers must not be touched between issue and wait. Every wait therefore
// takes the registers it makes valid, which keeps the compiler from moving their uses before it.
#pragma once

namespace intfa {

// --- descriptors of operands in shared memory, rows contiguous along the depth ------------------------------

constexpr unsigned kDescriptorStep32 = 2;  // 32 bytes further along a row

// Low half: address (in 16 bytes) and the unused leading offset; the only half that moves with the address.
__device__ __forceinline__ unsigned descriptor_low(unsigned address) {
    return (address & 0x3ffffu) >> 4 | 1u << 16;
}

// High half for rows of `row_bytes`, 64 (64-byte swizzle) or 128 (128-byte swizzle): eight rows make one atom.
constexpr unsigned descriptor_high(int row_bytes) {
    return static_cast<unsigned>(8 * row_bytes) >> 4 | (row_bytes == 128 ? 1u : 2u) << 30;
}

__device__ __forceinline__ unsigned long long descriptor(unsigned low, unsigned high) {
    unsigned long long d;
    asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(low), "r"(high));
    return d;
}

// --- lists of registers -------------------------------------------------------------------------------------

#define INTFA_R8(a, i) \
    "+r"((a)[i]), "+r"((a)[i + 1]), "+r"((a)[i + 2]), "+r"((a)[i + 3]), "+r"((a)[i + 4]), "+r"((a)[i + 5]), \
        "+r"((a)[i + 6]), "+r"((a)[i + 7])
#define INTFA_R16(a, i) INTFA_R8(a, i), INTFA_R8(a, i + 8)
#define INTFA_R32(a, i) INTFA_R16(a, i), INTFA_R16(a, i + 16)
#define INTFA_R64(a) INTFA_R32(a, 0), INTFA_R32(a, 32)
#define INTFA_D32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define INTFA_D64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// --- products -----------------------------------------------------------------------------------------------

// Before the first product, and wherever its registers were written by other instructions.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` committed groups are under way; acc is what the caller reads next.
template <int pending>
__device__ __forceinline__ void wgmma_wait(int (&acc)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : INTFA_R64(acc) : "n"(pending) : "memory");
}

// The same; the operand words in registers become writable too.
template <int pending>
__device__ __forceinline__ void wgmma_wait(int (&acc)[64], unsigned (&a)[16]) {
    asm volatile("wgmma.wait_group.sync.aligned %80;" : INTFA_R64(acc), INTFA_R16(a, 0) : "n"(pending) : "memory");
}

template <int pending>
__device__ __forceinline__ void wgmma_wait(int (&acc)[32], unsigned (&a)[16]) {
    asm volatile("wgmma.wait_group.sync.aligned %48;" : INTFA_R32(acc, 0), INTFA_R16(a, 0) : "n"(pending) : "memory");
}

// acc (64 x 128) = A B, or += where `add`, both signed bytes in shared memory.
__device__ __forceinline__ void wgmma_s8s8(int (&acc)[64], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" INTFA_D64 "}, %64, %65, add;\n}"
        : INTFA_R64(acc)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// The same with unsigned A in registers: words {row r, depth 4q..}, {row r+8}, {row r, depth 16+4q..}, {row r+8}.
__device__ __forceinline__ void wgmma_u8u8(int (&acc)[64], const unsigned* a, unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.u8 {" INTFA_D64 "}, {%64, %65, %66, %67}, %68, add;\n}"
        : INTFA_R64(acc)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

// The two with 64 columns.
__device__ __forceinline__ void wgmma_s8s8(int (&acc)[32], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" INTFA_D32 "}, %32, %33, add;\n}"
        : INTFA_R32(acc, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void wgmma_u8u8(int (&acc)[32], const unsigned* a, unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8 {" INTFA_D32 "}, {%32, %33, %34, %35}, %36, add;\n}"
        : INTFA_R32(acc, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

// --- sums of rows, warp by warp --------------------------------------------------------------------------------

// To sums[0] and sums[2], those of rows r and r+8 of 32 unsigned bytes each, in registers like an unsigned A. (A
// product with ones; sums[1] and sums[3] are the same once more.)
__device__ __forceinline__ void add_row_sums(int (&sums)[4], const unsigned* a) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %8}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(0x01010101u));
}

#undef INTFA_D64
#undef INTFA_D32
#undef INTFA_R64
#undef INTFA_R32
#undef INTFA_R16
#undef INTFA_R8

}  // namespace intfa
