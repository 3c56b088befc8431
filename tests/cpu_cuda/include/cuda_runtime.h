// CUDA C++ as kernels see it, for the host: qualifiers, vector types, built-in variables and functions.
// The harness includes it before the kernel's source, as nvcc does.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu_cuda.h"
#include "small_float.h"

// --- qualifiers ----------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// A local thread_local variable is static, and an extern one may be an array without a size, as __shared__ allows.
// All fibres run on one system thread, so they share it. The harness finds the variables in the library's symbols.
#define __shared__ thread_local

// --- vector types --------------------------------------------------------------------------------------------

#define CPU_CUDA_VECTORS(type, name)                                                            \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
    struct name##3 { type x, y, z; };                                                           \
    struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                 \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CPU_CUDA_VECTORS(signed char, char)
CPU_CUDA_VECTORS(unsigned char, uchar)
CPU_CUDA_VECTORS(short, short)
CPU_CUDA_VECTORS(unsigned short, ushort)
CPU_CUDA_VECTORS(int, int)
CPU_CUDA_VECTORS(unsigned int, uint)
CPU_CUDA_VECTORS(long long, longlong)
CPU_CUDA_VECTORS(unsigned long long, ulonglong)
CPU_CUDA_VECTORS(float, float)
CPU_CUDA_VECTORS(double, double)
#undef CPU_CUDA_VECTORS

// --- built-in variables --------------------------------------------------------------------------------------

#define threadIdx (::cpu_cuda::builtins.thread)
#define blockIdx (::cpu_cuda::builtins.block)
#define blockDim (::cpu_cuda::builtins.block_size)
#define gridDim (::cpu_cuda::builtins.grid_size)
constexpr int warpSize = 32;

// --- barriers, votes, shuffles -------------------------------------------------------------------------------

inline void __syncthreads(cpu_cuda::Site site = cpu_cuda::Site::here()) {
    cpu_cuda::block_barrier(cpu_cuda::Op::block_barrier, 0, site);
}
inline int __syncthreads_count(int predicate, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    return cpu_cuda::block_barrier(cpu_cuda::Op::block_barrier_count, predicate, site).nonzero;
}
inline int __syncthreads_and(int predicate, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    const cpu_cuda::Votes votes = cpu_cuda::block_barrier(cpu_cuda::Op::block_barrier_and, predicate, site);
    return votes.nonzero == votes.threads;
}
inline int __syncthreads_or(int predicate, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    return cpu_cuda::block_barrier(cpu_cuda::Op::block_barrier_or, predicate, site).nonzero != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    cpu_cuda::warp_barrier(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    return cpu_cuda::ballot(mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    return cpu_cuda::ballot(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    return cpu_cuda::ballot(mask, !predicate, site) == 0;
}

namespace cpu_cuda {
template <class T>
inline T shuffle_value(Op op, T value, int operand, int width, unsigned mask, Site site) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles move up to 8 bytes");
    std::uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    bits = shuffle(op, bits, operand, width, mask, site);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
}  // namespace cpu_cuda

#define CPU_CUDA_SHUFFLE(name, op)                                                                            \
    template <class T>                                                                                        \
    inline T name(unsigned mask, T value, int operand, int width = 32,                                        \
                  cpu_cuda::Site site = cpu_cuda::Site::here()) {                                             \
        return cpu_cuda::shuffle_value(cpu_cuda::Op::op, value, operand, width, mask, site);                  \
    }
CPU_CUDA_SHUFFLE(__shfl_sync, shuffle)
CPU_CUDA_SHUFFLE(__shfl_up_sync, shuffle_up)
CPU_CUDA_SHUFFLE(__shfl_down_sync, shuffle_down)
CPU_CUDA_SHUFFLE(__shfl_xor_sync, shuffle_xor)
#undef CPU_CUDA_SHUFFLE

#define CPU_CUDA_REDUCE(name, type, op)                                                                       \
    inline type name(unsigned mask, type value, cpu_cuda::Site site = cpu_cuda::Site::here()) {               \
        return static_cast<type>(cpu_cuda::reduce(cpu_cuda::Op::op, mask, static_cast<unsigned>(value), site)); \
    }
CPU_CUDA_REDUCE(__reduce_add_sync, unsigned, reduce_add)
CPU_CUDA_REDUCE(__reduce_add_sync, int, reduce_add)
CPU_CUDA_REDUCE(__reduce_min_sync, unsigned, reduce_min)
CPU_CUDA_REDUCE(__reduce_min_sync, int, reduce_min_signed)
CPU_CUDA_REDUCE(__reduce_max_sync, unsigned, reduce_max)
CPU_CUDA_REDUCE(__reduce_max_sync, int, reduce_max_signed)
CPU_CUDA_REDUCE(__reduce_and_sync, unsigned, reduce_and)
CPU_CUDA_REDUCE(__reduce_or_sync, unsigned, reduce_or)
CPU_CUDA_REDUCE(__reduce_xor_sync, unsigned, reduce_xor)
#undef CPU_CUDA_REDUCE

[[noreturn]] inline void __trap(cpu_cuda::Site site = cpu_cuda::Site::here()) { cpu_cuda::trap("__trap", site); }

// --- atomics (blocks run one after another, so plain arithmetic does) ------------------------------------------

namespace cpu_cuda {
template <class T, class Update>
__attribute__((no_sanitize("thread"))) inline T atomic(T* address, Update update) {
    atomic_access(address, sizeof(T));
    const T before = *address;
    *address = update(before);
    return before;
}
template <class T>
struct Same {
    using type = T;
};
template <class T>
using Argument = typename Same<T>::type;  // converted to T, not deduced
}  // namespace cpu_cuda

#define CPU_CUDA_ATOMIC(name, expression)                                              \
    template <class T>                                                                 \
    inline T name(T* address, cpu_cuda::Argument<T> value) {                           \
        return cpu_cuda::atomic(address, [value](T before) -> T { return expression; }); \
    }
CPU_CUDA_ATOMIC(atomicAdd, before + value)
CPU_CUDA_ATOMIC(atomicSub, before - value)
CPU_CUDA_ATOMIC(atomicMin, value < before ? value : before)
CPU_CUDA_ATOMIC(atomicMax, before < value ? value : before)
CPU_CUDA_ATOMIC(atomicAnd, before & value)
CPU_CUDA_ATOMIC(atomicOr, before | value)
CPU_CUDA_ATOMIC(atomicXor, before ^ value)
CPU_CUDA_ATOMIC(atomicExch, (static_cast<void>(before), value))
#undef CPU_CUDA_ATOMIC
template <class T>
inline T atomicCAS(T* address, cpu_cuda::Argument<T> expected, cpu_cuda::Argument<T> value) {
    return cpu_cuda::atomic(address, [=](T before) -> T { return before == expected ? value : before; });
}

// --- loads and stores with hints -----------------------------------------------------------------------------

template <class T>
inline T __ldg(const T* address) { return *address; }
template <class T>
inline T __ldcs(const T* address) { return *address; }
template <class T>
inline T __ldcg(const T* address) { return *address; }
template <class T>
inline void __stcs(T* address, cpu_cuda::Argument<T> value) { *address = value; }
template <class T>
inline void __stcg(T* address, cpu_cuda::Argument<T> value) { *address = value; }

// --- reinterpretation and conversion -------------------------------------------------------------------------

inline int __float_as_int(float x) { return cpu_cuda::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return cpu_cuda::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return cpu_cuda::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return cpu_cuda::bit_cast<float>(x); }

// Out of range: the nearest integer; NaN: 0.
inline int __float2int_rn(float x) {
    if (!(x == x)) return 0;
    if (x >= 2147483648.0f) return 2147483647;
    if (x < -2147483648.0f) return -2147483647 - 1;
    return static_cast<int>(nearbyintf(x));
}
inline unsigned __float2uint_rn(float x) {
    if (!(x > 0.0f)) return 0;
    if (x >= 4294967296.0f) return 4294967295u;
    return static_cast<unsigned>(nearbyintf(x));
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// --- arithmetic ----------------------------------------------------------------------------------------------

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __exp2f(float a) { return exp2f(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((std::uint64_t{a} * b) >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((std::uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((std::uint64_t{high} << 32 | low) >> (shift & 31));
}

// Four bytes picked from the eight of (b, a); a selector with bit 3 set repeats the byte's sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> (4 * i) & 15u;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7u))) & 255u;
        if (pick & 8u) byte = byte & 128u ? 255u : 0u;
        result |= byte << (8 * i);
    }
    return result;
}

// Each byte's negative, which wraps around.
inline unsigned __vneg4(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; i += 8) result |= ((0u - (x >> i & 255u)) & 255u) << i;
    return result;
}
inline int __vimax3_s32(int a, int b, int c) {
    const int x = a > b ? a : b;
    return x > c ? x : c;
}

// Sums wrap around, as the hardware's do.
inline int __dp4a(int a, int b, int sum) {
    unsigned result = static_cast<unsigned>(sum);
    for (int i = 0; i < 32; i += 8)
        result += static_cast<unsigned>(static_cast<signed char>(static_cast<unsigned>(a) >> i & 255u) *
                                        static_cast<signed char>(static_cast<unsigned>(b) >> i & 255u));
    return static_cast<int>(result);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 255u) * (b >> i & 255u);
    return sum;
}

inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
template <class A, class B, class = std::enable_if_t<std::is_integral<A>::value && std::is_integral<B>::value>>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B, class = std::enable_if_t<std::is_integral<A>::value && std::is_integral<B>::value>>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

// --- how the harness calls a kernel --------------------------------------------------------------------------

namespace cpu_cuda {
template <class... Parameters, std::size_t... index>
__attribute__((no_sanitize("thread"))) inline void call(void (*kernel)(Parameters...), void** arguments,
                                                        std::index_sequence<index...>) {
    kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[index])...);
}
template <class... Parameters>
inline void call(void (*kernel)(Parameters...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<Parameters...>{});
}
// The sizes of a kernel's parameters, ended by 0.
template <class... Parameters>
inline const std::size_t* parameter_sizes(void (*)(Parameters...)) {
    static const std::size_t sizes[] = {sizeof(Parameters)..., 0};
    return sizes;
}
}  // namespace cpu_cuda

#define CPU_CUDA_EXPORT(symbol, ...)                                                                          \
    extern "C" void cpu_cuda_call_##symbol(void** arguments) { cpu_cuda::call(__VA_ARGS__, arguments); }      \
    extern "C" const std::size_t* cpu_cuda_sizes_##symbol() { return cpu_cuda::parameter_sizes(__VA_ARGS__); }
