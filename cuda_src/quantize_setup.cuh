// What the quantiser is compiled for, how its work is dealt out, and how a range becomes a scale.
#pragma once

#include "params.cuh"
#include "platform.cuh"

namespace intfa {

constexpr int D = INTFA_D;
constexpr int Dp = INTFA_DP;
constexpr int kInput = INTFA_IN;             // element type of q, k and v
constexpr bool kSmooth = INTFA_SMOOTH;       // subtract K's mean
constexpr bool kEqualize = INTFA_EQUALIZE;   // multiply Q and divide K by a factor per channel
constexpr bool kHadamard = INTFA_HADAMARD;   // rotate Q and K
constexpr bool kLseShift = INTFA_LSE_SHIFT;  // q . mean(K), where K is smoothed and somebody wants the log-sum-exp
constexpr int kQueryFormat = INTFA_Q_FORMAT;
constexpr int kKeyFormat = INTFA_K_FORMAT;
constexpr int kValueFormat = INTFA_V_FORMAT;
constexpr int kQueryScale = INTFA_Q_SCALE;
constexpr int kKeyScale = INTFA_K_SCALE;
constexpr int kValueScale = INTFA_V_SCALE;

constexpr bool kKeyStatistics = kSmooth || kEqualize;
constexpr bool kQueryStatistics = kEqualize;
constexpr bool kHeadRanges = kQueryScale == kScaleHead || kKeyScale == kScaleHead;
constexpr bool kPrepared = kSmooth || kEqualize || kHadamard;

constexpr int kUnit = 8;
constexpr int kGroup = 32;                   // channels that share a scale
constexpr int kLanes = Dp / kUnit;           // lanes that hold a row
constexpr int kStatisticsThreads = 256;
constexpr int kStatisticsRows = kStatisticsThreads / kLanes;  // rows at a time
constexpr int kStatisticsSteps = 16;
constexpr int kChunkRows = kStatisticsRows * kStatisticsSteps;
constexpr int kFinishThreads = 1024;
// Q and K are packed by parts of a row: 32 channels, of which 16 lie in each half of the row.
constexpr int kPart = 32;
constexpr int kParts = Dp / kPart;           // lanes that hold a row
constexpr int kHalfRow = Dp / 2;
constexpr int kPackThreads = 2 * Dp;
constexpr int kPackRows = kPackThreads / kParts;  // 64 rows at a time
constexpr int kPackSteps = kTileKeys / kPackRows;
constexpr int kWordKeys = 4;                 // V is packed by words of 4 keys for each of 8 channels
constexpr int kValueSlots = kPackThreads / kLanes;  // words at a time
constexpr int kValueWords = kTileKeys / kWordKeys / kValueSlots;
// Blocks per multiprocessor that registers must allow: 24 warps, or 16 where a thread holds more: its parts of a whole
// tile, float32 as it was read, a rotation of several blocks, numbers on their way to FP8; and for Blackwell, for which
// the compiler takes more.
constexpr bool kHeldTile = kKeyScale == kScaleGroup || kKeyScale == kScaleTile;
constexpr bool kLean = !kHeldTile && kInput != kFloat32 && (D == Dp || !kHadamard) && kQueryFormat < kE4M3 &&
                       kArchitecture < 1000;
constexpr int kPackBlocks = (kLean ? 768 : 512) / kPackThreads;
constexpr int kStatisticsAhead = kInput == kFloat32 ? 2 : 8;  // loads under way of a thread
constexpr int kTransposeStride = kTileKeys / 4 + 1;  // words per channel of the transposed tile of V

static_assert(D <= Dp && (Dp == 64 || Dp == 128 || Dp == 256), "the head dimension is padded to 64, 128 or 256");
static_assert(kPackRows == 64 && kValueSlots == 16, "a block packs a tile in two steps");
static_assert(kSmooth || !kLseShift, "there is a mean of K where it is smoothed");
static_assert(!kHeldTile || kKeyFormat == kInt8, "only int8 keys share scales");

constexpr float kSmallest = 1e-30f;          // least range that a scale is made for
constexpr float kRoundingMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low byte

// --- ranges and scales -------------------------------------------------------------------------------------------

// |x| as an integer that orders like it, with infinity and NaN on top: a maximum that no NaN slips through.
__device__ __forceinline__ int magnitude(float x) { return __float_as_int(x) & 0x7fffffff; }
__device__ __forceinline__ bool is_finite(int magnitude_) { return magnitude_ < 0x7f800000; }

struct Scale {
    float scale;    // NaN for a range that is not finite
    float inverse;  // 0 then
};

constexpr bool is_fp8(int format) { return format == kE4M3 || format == kE5M2; }

// What the range of numbers under one scale becomes.
constexpr float levels(int format) {
    return format == kInt8 ? 127.0f : format == kInt4 ? 7.0f : format == kE4M3 ? 448.0f : 57344.0f;
}

// x / levels and levels / x as IEEE division rounds them, for x of kSmallest or more, in a few instructions. The
// quotient of a reciprocal that is rounded correctly, corrected once by its exact remainder, is.
template <int format>
__device__ __forceinline__ float divide_by(float x) {
    constexpr float divisor = levels(format), reciprocal = 1.0f / divisor;
    const float quotient = mul_rn(x, reciprocal);
    return fmaf(fmaf(-quotient, divisor, x), reciprocal, quotient);
}

template <int format>
__device__ __forceinline__ float levels_over(float x) {
    const float shrink = x > 0x1p64f ? 0x1p-64f : 1.0f;  // the reciprocal stays above the subnormals
    const float divisor = mul_rn(x, shrink);
    float reciprocal = reciprocal_near(divisor);
    reciprocal = fmaf(fmaf(-divisor, reciprocal, 1.0f), reciprocal, reciprocal);
    const float quotient = mul_rn(levels(format), reciprocal);
    return mul_rn(fmaf(fmaf(-divisor, quotient, levels(format)), reciprocal, quotient), shrink);
}

// as_given: the numbers are those of the input, so that fp16 needs no scale where it came as fp16; else its scale
// is a power of two that keeps it in range.
template <int format, bool as_given = true>
__device__ __forceinline__ Scale scale_of(int range) {
    if (!is_finite(range)) return {not_a_number(), 0.0f};
    if (format == kHalf) {
        if ((as_given && kInput == kFloat16) || range == 0) return {1.0f, 1.0f};
        const int exponent = max((range >> 23) - 126 - 12, -126);  // range = 0.5..1 times 2^(exponent + 12)
        return {__int_as_float((127 + exponent) << 23), __int_as_float((127 - exponent) << 23)};
    }
    const float safe = fmaxf(__int_as_float(range), kSmallest);
    return {divide_by<format>(safe), levels_over<format>(safe)};
}

// x * inverse rounded once, to an integer, half to even, in the low byte. |x| is within the range that inverse was made
// for, so the result is within -127..127; meaningless where inverse is 0.
__device__ __forceinline__ uint32 rounded(float x, float inverse) {
    return static_cast<uint32>(__float_as_int(fmaf(x, inverse, kRoundingMagic)));
}

__device__ __forceinline__ float round_bf16(float x) {
    return Element<kBFloat16>::load(Element<kBFloat16>::store(x));
}

}  // namespace intfa
