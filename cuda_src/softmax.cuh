// Pieces of the softmax that all attention kernels share. Exponents are to base 2 throughout: x = score * log2(e).
#pragma once

#include "platform.cuh"

namespace intfa {

// O and l are kept relative to a reference exponent: the maximum of the first tile that the row sees. It stays
// where it is until a tile's maximum exceeds it by more than this; float32 has room for the growth.
constexpr float kReferenceSlack = 60.0f;

// From here on floats tell exponents apart too coarsely for a P of 8 bits, and a row becomes NaN.
constexpr float kLostExponent = 0x1p24f;

// V of one byte is stored as v + this: P V has only products that are not negative, and the sum of P takes the rest away
// again.
constexpr float kValueBias = 128.0f;

// What 1 is when the bits of an integer below 2^24 are read as a float, and where O is instead to have it: 2^-149 has no
// room for factors below 1. A factor of up to 2^kReferenceSlack times this is still finite.
constexpr float kProductUnit = 0x1p-149f;
constexpr float kProductRoom = 0x1p66f;
constexpr float kUnitOfO = kProductUnit * kProductRoom;  // what 1 is in O then

// Adding this to 0 <= x < 2^22 leaves round-to-nearest-even(x) in the low bits of the float.
constexpr float kRoundingMagic = 12582912.0f;  // 1.5 * 2^23

// The word of four probabilities, rounded to integers 0..levels: e in [0, 1].
__device__ __forceinline__ uint32 round4(float e0, float e1, float e2, float e3, float levels) {
    return pack_low_bytes(static_cast<uint32>(__float_as_int(fmaf(e0, levels, kRoundingMagic))),
                          static_cast<uint32>(__float_as_int(fmaf(e1, levels, kRoundingMagic))),
                          static_cast<uint32>(__float_as_int(fmaf(e2, levels, kRoundingMagic))),
                          static_cast<uint32>(__float_as_int(fmaf(e3, levels, kRoundingMagic))));
}

// 2**(x - reference) for a maximum x that may be -inf (nothing visible); the reference is then arbitrary.
__device__ __forceinline__ float exp2_from(float x, float reference) {
    return x == -infinity() ? 0.0f : exp2_fast(x - reference);
}

// NaN if the row's query or anything in its keys or values is not finite, else 0.
__device__ __forceinline__ float poison(float guard, float q_scale) {
    return guard + q_scale * 0.0f;
}

// Factor from the accumulator to the output (before v_scale): 1 / l; 0 for a row that sees nothing.
// l counts in units of 1 / levels of a probability when the accumulator does.
__device__ __forceinline__ float finish_factor(float l, float poison_) {
    return (l > 0.0f ? 1.0f / l : 0.0f) + poison_;
}

// log-sum-exp of the scaled scores; -inf for a row that sees nothing. `shift` is q . mean(K) * scale.
__device__ __forceinline__ float log_sum_exp(float reference, float l, float levels, float shift, float poison_) {
    constexpr float kLn2 = 0.693147180559945f;
    if (!(l > 0.0f)) return -infinity() + poison_;
    return kLn2 * (reference + log2f(l / levels)) + shift + poison_;
}

}  // namespace intfa
