// 16-bit floating-point numbers, rounded to nearest even. Arithmetic is exact in wider types and rounded once.
#pragma once

#include <cstdint>

namespace cpu_cuda {

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

struct Binary16 {
    static std::uint16_t from_float(float value) {
        const std::uint32_t bits = bit_cast<std::uint32_t>(value);
        const std::uint32_t sign = bits >> 16 & 0x8000u;
        std::uint32_t magnitude = bits & 0x7fffffffu;
        std::uint32_t result;
        if (magnitude > 0x7f800000u) return 0x7fffu;           // NaN, as the hardware writes it
        if (magnitude >= 0x477ff000u) {
            result = 0x7c00u;                                  // 65520 and more: infinity
        } else if (magnitude < 0x38800000u) {                  // below 2^-14: multiples of 2^-24
            const float shifted = bit_cast<float>(magnitude) + 0.5f;
            result = bit_cast<std::uint32_t>(shifted) - 0x3f000000u;
        } else {
            magnitude += 0xfffu + (magnitude >> 13 & 1u);
            result = (magnitude - 0x38000000u) >> 13;
        }
        return static_cast<std::uint16_t>(sign | result);
    }
    static float to_float(std::uint16_t half) {
        const std::uint32_t sign = (half & 0x8000u) << 16;
        const std::uint32_t magnitude = (half & 0x7fffu) << 13;
        std::uint32_t result;
        if (magnitude >= 0x7c00u << 13)
            result = (magnitude + 0x70000000u) | (magnitude > 0x7c00u << 13 ? 0x400000u : 0u);  // infinity, quiet NaN
        else
            result = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
        return bit_cast<float>(sign | result);
    }
};

struct Bfloat16 {
    static std::uint16_t from_float(float value) {
        const std::uint32_t bits = bit_cast<std::uint32_t>(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
        return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    static float to_float(std::uint16_t value) { return bit_cast<float>(std::uint32_t{value} << 16); }
};

// a * b + c with one rounding to Format: the product is exact in a double; the sum is rounded to odd there, so that
// rounding it again gives what rounding the exact sum would.
template <class Format>
inline std::uint16_t fused(float a, float b, float c) {
    const double product = static_cast<double>(a) * b;
    const double sum = product + c;
    const double part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    double odd = sum;
    if (error != 0 && error == error && (bit_cast<std::uint64_t>(sum) & 1) == 0)
        odd = bit_cast<double>(bit_cast<std::uint64_t>(sum) + ((error > 0) == (sum > 0) ? 1 : -1));
    // Once more to odd on the way to float, which has bits to spare over both formats.
    float narrow = static_cast<float>(odd);
    if (narrow != odd && narrow == narrow && (bit_cast<std::uint32_t>(narrow) & 1) == 0 &&
        (bit_cast<std::uint32_t>(narrow) & 0x7f800000u) != 0x7f800000u)
        narrow = bit_cast<float>(bit_cast<std::uint32_t>(narrow) +
                                 ((static_cast<double>(narrow) < odd) == (odd > 0) ? 1u : ~0u));
    return Format::from_float(narrow);
}

template <class Format>
struct SmallFloat {
    std::uint16_t bits;

    SmallFloat() = default;
    SmallFloat(float value) : bits(Format::from_float(value)) {}
    SmallFloat(double value) : bits(Format::from_float(static_cast<float>(value))) {}
    SmallFloat(int value) : bits(Format::from_float(static_cast<float>(value))) {}
    operator float() const { return Format::to_float(bits); }

    static SmallFloat from_bits(unsigned short bits) {
        SmallFloat value;
        value.bits = bits;
        return value;
    }

    // A float holds sums, products and quotients of two such numbers precisely enough to be rounded again.
    friend SmallFloat operator+(SmallFloat a, SmallFloat b) { return float(a) + float(b); }
    friend SmallFloat operator-(SmallFloat a, SmallFloat b) { return float(a) - float(b); }
    friend SmallFloat operator*(SmallFloat a, SmallFloat b) { return float(a) * float(b); }
    friend SmallFloat operator/(SmallFloat a, SmallFloat b) { return float(a) / float(b); }
    friend SmallFloat operator-(SmallFloat a) { return from_bits(a.bits ^ 0x8000u); }
    friend bool operator==(SmallFloat a, SmallFloat b) { return float(a) == float(b); }
    friend bool operator!=(SmallFloat a, SmallFloat b) { return float(a) != float(b); }
    friend bool operator<(SmallFloat a, SmallFloat b) { return float(a) < float(b); }
    friend bool operator>(SmallFloat a, SmallFloat b) { return float(a) > float(b); }
    friend bool operator<=(SmallFloat a, SmallFloat b) { return float(a) <= float(b); }
    friend bool operator>=(SmallFloat a, SmallFloat b) { return float(a) >= float(b); }
};

template <class T>
struct alignas(4) Pair {
    T x;
    T y;
};

}  // namespace cpu_cuda
