// cuda_src/mma.cuh for the host: the same functions in plain C++, so that attention_mma.cu runs on the shim.
//
// Only a source given as text finds this file: one that lies in cuda_src finds its neighbour. What the PTX manual says
// of fragments is written out here once more, independently of the kernel.
#pragma once

#include "copy.cuh"
#include "platform.cuh"
#include "shared_memory.cuh"

namespace intfa {

#ifdef CPU_CUDA_BULK
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif

constexpr int kIntegerMagic = 0x4B400000;
constexpr float kFloatMagic = 12582912.0f;

// --- lanes of a warp tell each other words, past the checks of memory ---------------------------------------------

struct Exchange {
    uint32 word[32][2][32][8];  // by warp, turn and lane
    unsigned turn[1024];        // of each thread
};
inline Exchange exchange{};

// Give eight words; return where those of all lanes lie. A lane comes here again only when all have come, so that two
// places, taking turns, are enough.
__attribute__((no_sanitize("thread"), noinline)) inline const uint32 (*meet(const uint32 (&mine)[8]))[8] {
    const unsigned thread = threadIdx.x;
    auto& place = exchange.word[thread / 32][exchange.turn[thread]++ % 2];
    for (int i = 0; i < 8; ++i) place[thread % 32][i] = mine[i];
    __syncwarp();
    return place;
}

// --- products -------------------------------------------------------------------------------------------------------

template <int format>
inline float number(uint32 bits) {
    if (format == kHalf) return cpu_cuda::Binary16::to_float(static_cast<std::uint16_t>(bits));
    if (format == kBrain) return cpu_cuda::Bfloat16::to_float(static_cast<std::uint16_t>(bits));
    const int mantissa = format == kE4M3 ? 3 : 2;
    const int bias = format == kE4M3 ? 7 : 15;
    const int exponent = static_cast<int>(bits >> mantissa & (0x7fu >> mantissa));
    const int fraction = static_cast<int>(bits & ((1u << mantissa) - 1));
    if (format == kE4M3 ? (bits & 0x7fu) == 0x7fu : exponent == 31) return not_a_number();
    const float size = exponent == 0 ? ldexpf(static_cast<float>(fraction), 1 - bias - mantissa)
                                     : ldexpf(static_cast<float>(fraction + (1 << mantissa)), exponent - bias - mantissa);
    return bits & 0x80u ? -size : size;
}

// Element k of a row of A (16 rows, 32 bytes) or of a column of B, from the words of its four lanes.
template <int bits>
__attribute__((no_sanitize("thread"))) inline uint32 element(const uint32 (*words)[8], int first_lane, int low_word, int high_word, int k) {
    const int byte = k * bits / 8;
    const uint32 word = words[first_lane + byte % 16 / 4][byte < 16 ? low_word : high_word];
    return word >> (byte % 4 * 8) & ((1u << bits) - 1);
}

template <int bits, class Sum, class Multiply>
__attribute__((no_sanitize("thread"))) inline void multiply(Sum* d, const uint32* a, uint32 b0, uint32 b1, const Sum* c,
                                                            const Multiply& add) {
    const uint32(*const words)[8] = meet({a[0], a[1], a[2], a[3], b0, b1, 0, 0});
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8;
        const int column = lane % 4 * 2 + i % 2;
        Sum sum = c[i];
        for (int k = 0; k < 256 / bits; ++k)
            sum = add(sum, element<bits>(words, row % 8 * 4, row / 8, row / 8 + 2, k),
                      element<bits>(words, column * 4, 4, 5, k));
        d[i] = sum;
    }
}

inline void mma_s8s8(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
    multiply<8>(d, a, b0, b1, c, [](int sum, uint32 x, uint32 y) {
        return sum + static_cast<signed char>(x) * static_cast<signed char>(y);
    });
}

inline void mma_u8u8(int (&d)[4], const uint32* a, uint32 b0, uint32 b1, const int (&c)[4]) {
    multiply<8>(d, a, b0, b1, c, [](int sum, uint32 x, uint32 y) {
        return sum + static_cast<int>(x * y);
    });
}

template <int format>
inline void mma_float(float* d, const uint32* a, uint32 b0, uint32 b1) {
    multiply<format_bits(format)>(d, a, b0, b1, d, [](float sum, uint32 x, uint32 y) {
        return sum + number<format>(x) * number<format>(y);
    });
}

// --- operands from shared memory ----------------------------------------------------------------------------------

__attribute__((no_sanitize("thread"))) inline uint32 matrix_row(int matrix, uint32 address, int row) {
    const uint32(*const words)[8] = meet({address, 0, 0, 0, 0, 0, 0, 0});
    return words[8 * matrix + row][0];
}

inline void load_matrices(uint32 (&x)[4], uint32 address) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int i = 0; i < 4; ++i)
        x[i] = shared_at<uint32>(matrix_row(i, address, lane / 4) + static_cast<uint32>(lane % 4 * 4));
}

inline void load_matrices_transposed(uint32 (&x)[4], uint32 address) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int i = 0; i < 4; ++i) {
        const uint32 low = matrix_row(i, address, lane % 4 * 2), high = matrix_row(i, address, lane % 4 * 2 + 1);
        const uint32 column = static_cast<uint32>(lane / 4 * 2);
        x[i] = shared_at<unsigned short>(low + column) |
               static_cast<uint32>(shared_at<unsigned short>(high + column)) << 16;
    }
}

// A thread's own copies are done at once: the host's copy_wait_groups waits for nothing.
inline void copy16_async(uint32 shared, const void* global) {
    shared_at<uint4>(shared) = *static_cast<const uint4*>(global);
}

// --- the rest -------------------------------------------------------------------------------------------------------

inline uint32 thread_now() { return threadIdx.x; }
inline uint32 kept(uint32 x) { return x; }
inline void forget(uint32&) {}

template <int format>
inline uint32 pack2(float x, float y) {
    if (format == kHalf) return pack_halves(x, y);
    if (format == kBrain) {
        const __nv_bfloat16 low = __float2bfloat16_rn(x), high = __float2bfloat16_rn(y);
        return low.bits | static_cast<uint32>(high.bits) << 16;
    }
    return to_fp8<format == kE5M2 ? kE5M2 : kE4M3>(x) | to_fp8<format == kE5M2 ? kE5M2 : kE4M3>(y) << 8;
}

inline float fma_down(float a, float b, float c) {
    const double exact = static_cast<double>(a) * b + c;  // but for the last places of a double
    const float nearest = static_cast<float>(exact);
    return nearest > exact ? nextafterf(nearest, -infinity()) : nearest;
}

inline uint32 low_nibbles(uint32 word) { return word << 4 & 0xf0f0f0f0u; }
inline uint32 high_nibbles(uint32 word) { return word & 0xf0f0f0f0u; }

template <int format>
inline uint32 negate(uint32 word) {
    if (format == kHalf || format == kBrain) return word ^ 0x80008000u;
    if (format == kE4M3 || format == kE5M2) return word ^ 0x80808080u;
    uint32 result = 0;
    for (int i = 0; i < 32; i += 8) result |= (0u - (word >> i & 255u) & 255u) << i;
    return result;
}

}  // namespace intfa
