// Quantisation of Q, K and V into the packed format that every attention kernel reads (intfa_cupy/packing.py).
//
// Three launches, each one pass over memory; only what the recipe asks for is compiled in:
//   quantize_statistics   reads K (sum, range per channel), Q (range per channel) and V (range per channel, or per
//                         key), and leaves a partial result per chunk of rows
//   quantize_finish       one block per key/value head puts the partial results together, in a fixed order: K's mean,
//                         the channel factors, V's scales
//   quantize_pack         reads Q, K and V again, prepares (mean, factors, Hadamard rotation), rounds and packs them
//
// The arithmetic is float32 in the order that intfa_cupy/quantize.py states, without contraction into FMA, so that
// both give the same integers from the same statistics. Nothing depends on the order in which blocks run.
//
// Work is dealt out in units of 8 consecutive channels of a row: Dp / 8 neighbouring lanes of a warp hold a row.
// A row's maximum and the rotation are shuffles between those lanes.

#include "params.cuh"
#include "platform.cuh"

namespace intfa {

constexpr int D = INTFA_D;
constexpr int Dp = INTFA_DP;
constexpr int kInput = INTFA_IN;             // element type of q, k and v
constexpr bool kSmooth = INTFA_SMOOTH;       // subtract K's mean
constexpr bool kEqualize = INTFA_EQUALIZE;   // multiply Q and divide K by a factor per channel
constexpr bool kHadamard = INTFA_HADAMARD;   // rotate Q and K
constexpr int kKeyScale = INTFA_K_SCALE;
constexpr int kValueScale = INTFA_V_SCALE;
constexpr bool kHalfV = INTFA_V_HALF;        // V stays fp16, under a power of two

constexpr bool kKeyStatistics = kSmooth || kEqualize;
constexpr bool kQueryStatistics = kEqualize;

constexpr int kUnit = 8;
constexpr int kLanes = Dp / kUnit;           // lanes that hold a row
constexpr int kStatisticsThreads = 256;
constexpr int kStatisticsRows = kStatisticsThreads / kLanes;  // rows at a time
constexpr int kStatisticsSteps = 16;
constexpr int kChunkRows = kStatisticsRows * kStatisticsSteps;
constexpr int kFinishThreads = 1024;
constexpr int kPackThreads = 2 * Dp;         // 16 rows at a time, 8 times: a tile of 128
constexpr int kPackRows = kPackThreads / kLanes;
constexpr int kPackSteps = kTileKeys / kPackRows;
constexpr int kAhead = 4;                    // loads under way of a thread that packs
// Blocks per multiprocessor that registers must allow: 24 warps, or 16 where a thread holds more: the values of a whole
// tile, units of float32, a rotation of parts of a unit.
constexpr int kPackBlocks =
    (kKeyScale == kScaleToken && kInput != kFloat32 && D % kUnit == 0 ? 768 : 512) / kPackThreads;
constexpr int kStatisticsAhead = kInput == kFloat32 ? 2 : 8;  // loads under way of a thread
constexpr int kTransposeStride = kTileKeys / 4 + 1;  // words per channel of the transposed tile of V

static_assert(D <= Dp && (Dp == 64 || Dp == 128 || Dp == 256), "the head dimension is padded to 64, 128 or 256");
static_assert(kPackRows == 16 && kPackSteps == 8, "a block packs a tile in eight steps");

constexpr float kLevels = 127.0f;
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

__device__ __forceinline__ Scale scale_of(int range) {
    if (!is_finite(range)) return {not_a_number(), 0.0f};
    const float safe = fmaxf(__int_as_float(range), kSmallest);
    return {div_rn(safe, kLevels), div_rn(kLevels, safe)};
}

// x * inverse rounded to an integer, half to even, in the low byte. |x| is within the range that inverse was made for,
// so the result is within -127..127; meaningless where inverse is 0.
__device__ __forceinline__ uint32 rounded(float x, float inverse) {
    return static_cast<uint32>(__float_as_int(add_rn(mul_rn(x, inverse), kRoundingMagic)));
}

__device__ __forceinline__ float round_bf16(float x) {
    return Element<kBFloat16>::load(Element<kBFloat16>::store(x));
}

// --- reading ---------------------------------------------------------------------------------------------------------

// 8 consecutive channels of a row as they lie in memory.
struct Unit {
    static constexpr int kWords = kInput == kFloat32 ? 8 : 4;
    uint32 word[kWords];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = 0;
    }

    // row: its first channel; first: the unit's. Channels beyond D are zero.
    __device__ __forceinline__ void load(const void* row, int first, int64 stride, bool vector) {
        if (vector) {
            if (first >= D) return clear();
            const uint4* from = reinterpret_cast<const uint4*>(static_cast<const uint8*>(row) + first * (kWords / 2));
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) {
                const uint4 four = from[i];
                word[4 * i] = four.x;
                word[4 * i + 1] = four.y;
                word[4 * i + 2] = four.z;
                word[4 * i + 3] = four.w;
            }
            return;
        }
        clear();
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
            if (first + i >= D) break;
            if (kInput == kFloat32)
                word[i % kWords] = static_cast<const uint32*>(row)[(first + i) * stride];
            else
                word[i / 2] |= static_cast<uint32>(static_cast<const unsigned short*>(row)[(first + i) * stride])
                               << (i % 2 * 16);
        }
    }

    __device__ __forceinline__ void get(float (&x)[kUnit]) const {
        if (kInput == kFloat32) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) x[i] = __int_as_float(static_cast<int>(word[i % kWords]));
        } else {
            constexpr int kind = kInput == kFloat32 ? kFloat16 : kInput;
#pragma unroll
            for (int i = 0; i < kUnit / 2; ++i) Element<kind>::unpack(word[i], x[2 * i], x[2 * i + 1]);
        }
    }
};

constexpr int kElementBytes = kInput == kFloat32 ? 4 : 2;

// One head of an input. The rows that a thread reads in its steps lie a constant distance apart.
struct Head {
    const uint8* data;
    int64 row;  // bytes
    int64 channel;
    bool vector;

    __device__ __forceinline__ Head(const Strided& x, int batch, int head, int vector_)
        : data(static_cast<const uint8*>(x.data) + (batch * x.batch + head * x.head) * kElementBytes),
          row(x.row * kElementBytes),
          channel(x.channel),
          vector(vector_ != 0) {}

    __device__ __forceinline__ void load(Unit& unit, int index, int rows, int first) const {
        if (index < rows)
            unit.load(data + index * row, first, channel, vector);
        else
            unit.clear();
    }
};

// --- the rotation ------------------------------------------------------------------------------------------------------

constexpr bool kOneBlock = (D & (D - 1)) == 0 && D == Dp;  // the rotation is one Hadamard matrix of all lanes

// Size of the Hadamard block that a channel is in: D as a sum of powers of two, the largest first. 1 beyond D.
__device__ __forceinline__ int block_size(int channel) {
    if (kOneBlock) return D;
    int start = 0, size = 1;
#pragma unroll
    for (int bit = 8; bit >= 0; --bit) {
        if (D >> bit & 1) {
            if (channel >= start && channel < start + (1 << bit)) size = 1 << bit;
            start += 1 << bit;
        }
    }
    return size;
}

__device__ __forceinline__ float inverse_sqrt(int power_of_two) {
    float x = 1.0f;
#pragma unroll
    for (int bit = 1; bit <= 8; ++bit)
        if (power_of_two == 1 << bit) x = (bit % 2 ? 0.70710678118654752f : 1.0f) / static_cast<float>(1 << bit / 2);
    return x;
}

// Butterflies between channels i and i ^ h, h = 1, 2, 4, .. within each block: the lower becomes a + b, the upper a - b.
// Blocks of less than 8 channels can only be in the last unit of a row.
__device__ __forceinline__ void rotate(float (&x)[kUnit], int first) {
    const int size = block_size(first);
#pragma unroll
    for (int h = 1; h < kUnit; h *= 2) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
            if (i & h) continue;
            if (D % kUnit != 0 && h >= block_size(first + i)) continue;
            const float a = x[i], b = x[i + h];
            x[i] = a + b;
            x[i + h] = a - b;
        }
    }
#pragma unroll
    for (int h = kUnit; 2 * h <= Dp; h *= 2) {
        if (2 * h > D) continue;
        const float sign = first & h ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
            const float other = __shfl_xor_sync(kFullWarp, x[i], h / kUnit);
            const float y = fmaf(x[i], sign, other);  // exactly other + x or other - x
            if (kOneBlock || h < size) x[i] = y;
        }
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
        x[i] = mul_rn(x[i], inverse_sqrt(D % kUnit == 0 ? size : block_size(first + i)));
}

// Over the lanes of a row.
__device__ __forceinline__ int row_max(int x) {
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) x = max(x, __shfl_xor_sync(kFullWarp, x, lanes));
    return x;
}

__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
    return x;
}

__device__ __forceinline__ int range_of(const float (&x)[kUnit]) {
    float range = 0.0f;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) range = max_magnitude(range, x[i]);
    return magnitude(range);
}

// --- statistics ----------------------------------------------------------------------------------------------------------

enum class Reduce { sum, smallest, largest };

template <Reduce how>
__device__ __forceinline__ float reduce(float a, float b) {
    return how == Reduce::sum ? a + b : how == Reduce::smallest ? fminf(a, b) : fmaxf(a, b);
}

// Combines the units that the block's threads hold for the same channels and stores the channel's result.
// The results of Reduce::largest are magnitudes or ordinary floats that are not negative where NaN matters.
template <Reduce how>
__device__ __forceinline__ void combine_channels(const float (&x)[kUnit], float* shared, float* result) {
    const int t = threadIdx.x;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kUnit; i += 4)
        *reinterpret_cast<float4*>(shared + t * kUnit + i) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
    __syncthreads();
    if (t < Dp) {
        float y = shared[t];
        for (int r = 1; r < kStatisticsRows; ++r) y = reduce<how>(y, shared[r * Dp + t]);
        result[t] = y;
    }
}

__device__ __forceinline__ float largest_magnitude(float a, float b) {
    return __int_as_float(max(__float_as_int(a), __float_as_int(b)));
}

// Runs visit(x, row) for the units of a chunk that belong to this thread, several loads ahead.
template <typename Visit>
__device__ __forceinline__ void for_chunk(const Head& head, int chunk, int rows, Visit visit) {
    constexpr int ahead = kStatisticsAhead;
    const int first = threadIdx.x % kLanes * kUnit;
    const int row0 = chunk * kChunkRows + static_cast<int>(threadIdx.x) / kLanes;
#pragma unroll 1
    for (int step = 0; step < kStatisticsSteps; step += ahead) {
        Unit unit[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) head.load(unit[i], row0 + (step + i) * kStatisticsRows, rows, first);
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            float x[kUnit];
            unit[i].get(x);
            visit(x, row0 + (step + i) * kStatisticsRows);
        }
    }
}

__device__ __forceinline__ void query_statistics(const QuantizeParams& p, int head, int chunk, float* shared) {
    float largest[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) largest[i] = 0.0f;
    for_chunk(Head(p.q, head / p.heads, head % p.heads, p.vector_q), chunk, p.queries,
              [&](const float (&x)[kUnit], int) {
#pragma unroll
                  for (int i = 0; i < kUnit; ++i)
                      if (is_finite(magnitude(x[i]))) largest[i] = fmaxf(largest[i], fabsf(x[i]));
              });
    combine_channels<Reduce::largest>(largest, shared, p.q_partial + (int64(head) * p.q_chunks + chunk) * Dp);
}

__device__ __forceinline__ void key_statistics(const QuantizeParams& p, int head, int chunk, float* shared) {
    float sum[kUnit], smallest[kUnit], largest[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
        sum[i] = 0.0f;
        smallest[i] = infinity();
        largest[i] = -infinity();
    }
    for_chunk(Head(p.k, head / p.kv_heads, head % p.kv_heads, p.vector_k), chunk, p.keys,
              [&](const float (&x)[kUnit], int row) {
                  if (row >= p.keys) return;
#pragma unroll
                  for (int i = 0; i < kUnit; ++i) {
                      sum[i] += x[i];
                      smallest[i] = fminf(smallest[i], x[i]);
                      largest[i] = fmaxf(largest[i], x[i]);
                  }
              });
    float* const result = p.k_partial + (int64(head) * p.k_chunks + chunk) * (3 * Dp);
    combine_channels<Reduce::sum>(sum, shared, result);
    combine_channels<Reduce::smallest>(smallest, shared, result + Dp);
    combine_channels<Reduce::largest>(largest, shared, result + 2 * Dp);
}

__device__ __forceinline__ void value_statistics(const QuantizeParams& p, int head, int chunk, float* shared) {
    const Head source(p.v, head / p.kv_heads, head % p.kv_heads, p.vector_v);
    const int64 place = int64(head) * p.k_chunks + chunk;
    const int t = threadIdx.x;
    if (kValueScale != kValueToken) {
        int range[kUnit];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) range[i] = 0;
        for_chunk(source, chunk, p.keys, [&](const float (&x)[kUnit], int) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) range[i] = max(range[i], magnitude(x[i]));
        });
        int* const words = reinterpret_cast<int*>(shared);
#pragma unroll
        for (int i = 0; i < kUnit; i += 4)
            *reinterpret_cast<int4*>(words + t * kUnit + i) = {range[i], range[i + 1], range[i + 2], range[i + 3]};
        __syncthreads();
        if (t < Dp) {
            int y = words[t];
            for (int r = 1; r < kStatisticsRows; ++r) y = max(y, words[r * Dp + t]);
            p.v_partial[place * Dp + t] = __int_as_float(y);
        }
        return;
    }
    float sum = 0.0f, largest = 0.0f;
    for_chunk(source, chunk, p.keys, [&](const float (&x)[kUnit], int row) {
        const float range = __int_as_float(row_max(range_of(x)));
        sum += range;
        largest = largest_magnitude(largest, range);
        if (t % kLanes == 0 && row < p.keys) p.v_token[int64(head) * (p.tiles * kTileKeys) + row] = range;
    });
    if (t % kLanes == 0) {
        shared[t / kLanes] = sum;
        shared[kStatisticsRows + t / kLanes] = largest;
    }
    __syncthreads();
    if (t == 0) {
        for (int r = 1; r < kStatisticsRows; ++r) {
            sum += shared[r];
            largest = largest_magnitude(largest, shared[kStatisticsRows + r]);
        }
        p.v_partial[place * 2] = sum;
        p.v_partial[place * 2 + 1] = largest;
    }
}

// --- statistics of a head ------------------------------------------------------------------------------------------------

// The scale of V in fp16: a power of two that keeps it in range; 1 for what came as fp16.
__device__ __forceinline__ float half_scale(int range) {
    if (!is_finite(range)) return not_a_number();
    if (kInput == kFloat16 || range == 0) return 1.0f;
    const int exponent = (range >> 23) - 126 - 12;  // range = 0.5..1 times 2^(exponent + 12)
    return __int_as_float((max(exponent, -126) + 127) << 23);
}

__device__ __forceinline__ void finish_keys(const QuantizeParams& p, int head, double* shared) {
    constexpr int slices = kFinishThreads / Dp;
    const int t = threadIdx.x;
    const int channel = t % Dp;
    const int slice = t / Dp;
    float* const partial = reinterpret_cast<float*>(shared + kFinishThreads);

    double sum = 0.0;
    float smallest = infinity(), largest = -infinity(), query = 0.0f;
    const float* k = p.k_partial + int64(head) * p.k_chunks * (3 * Dp) + channel;
#pragma unroll 4
    for (int i = slice; i < p.k_chunks; i += slices) {
        sum += k[int64(i) * (3 * Dp)];
        smallest = fminf(smallest, k[int64(i) * (3 * Dp) + Dp]);
        largest = fmaxf(largest, k[int64(i) * (3 * Dp) + 2 * Dp]);
    }
    if (kQueryStatistics) {
        const int64 group = p.heads / p.kv_heads;
        const float* q = p.q_partial + (head / p.kv_heads * p.heads + head % p.kv_heads * group) * p.q_chunks * Dp;
#pragma unroll 4
        for (int64 i = slice; i < group * p.q_chunks; i += slices) query = fmaxf(query, q[i * Dp + channel]);
    }
    shared[t] = sum;
    partial[t] = smallest;
    partial[kFinishThreads + t] = largest;
    partial[2 * kFinishThreads + t] = query;
    __syncthreads();
    float mean = 0.0f, ratio = 0.0f;
    if (slice == 0) {
        for (int s = 1; s < slices; ++s) {
            const int other = s * Dp + channel;
            sum += shared[other];
            smallest = fminf(smallest, partial[other]);
            largest = fmaxf(largest, partial[kFinishThreads + other]);
            query = fmaxf(query, partial[2 * kFinishThreads + other]);
        }
        if (kSmooth && channel < D) {
            // Without the largest and the smallest value, so that a single huge key does not move it.
            int count = p.keys;
            if (count > 2) {
                sum = sum - largest - smallest;
                count -= 2;
            }
            mean = round_bf16(static_cast<float>(sum / count));
        }
        if (kSmooth) p.k_mean[int64(head) * Dp + channel] = mean;
    }
    if (!kEqualize) return;

    // Half the difference of the logarithms of the two ranges, relative to its mean over the channels.
    const float key = fmaxf(largest - mean, mean - smallest);
    if (slice == 0 && channel < D && is_finite(magnitude(key)) && key > 0.0f && query > 0.0f)
        ratio = 0.5f * (log2f(key) - log2f(query));
    __syncthreads();
    shared[t] = ratio;  // 0 for all but the first slice
    for (int stride = kFinishThreads / 2; stride > 0; stride /= 2) {
        __syncthreads();
        if (t < stride) shared[t] += shared[t + stride];
    }
    __syncthreads();
    if (slice == 0) {
        float factor = 1.0f;
        if (channel < D) {
            const float centred = static_cast<float>(ratio - shared[0] / D);
            factor = round_bf16(fminf(fmaxf(exp2f(centred), 1e-3f), 1e3f));
        }
        p.equalizer[int64(head) * (2 * Dp) + channel] = factor;
        p.equalizer[int64(head) * (2 * Dp) + Dp + channel] = div_rn(1.0f, factor);
    }
}

__device__ __forceinline__ void finish_values(const QuantizeParams& p, int head, double* shared) {
    const int t = threadIdx.x;
    if (kValueScale == kValueToken) {
        int* const largest = reinterpret_cast<int*>(shared + kFinishThreads);
        double sum = 0.0;
        int range = 0;
        for (int i = t; i < p.k_chunks; i += kFinishThreads) {
            const int64 place = (int64(head) * p.k_chunks + i) * 2;
            sum += p.v_partial[place];
            range = max(range, __float_as_int(p.v_partial[place + 1]));
        }
        __syncthreads();
        shared[t] = sum;
        largest[t] = range;
        for (int stride = kFinishThreads / 2; stride > 0; stride /= 2) {
            __syncthreads();
            if (t < stride) {
                shared[t] += shared[t + stride];
                largest[t] = max(largest[t], largest[t + stride]);
            }
        }
        __syncthreads();
        range = largest[0];
        // A sixteenth of the mean range, rounded down to a power of two.
        const float mean = static_cast<float>(shared[0] / p.keys / 16);
        const float floor = mean < kSmallest ? kSmallest : __int_as_float(__float_as_int(mean) & 0x7f800000);
        if (t == 0) {
            p.v_statistic[int64(head) * Dp] = floor;
            p.guard[head] = is_finite(range) ? 0.0f : not_a_number();
        }
        const float scale = scale_of(max(range, __float_as_int(floor))).scale;
        if (t < Dp) p.v_scale[int64(head) * Dp + t] = scale;
        return;
    }
    int* const words = reinterpret_cast<int*>(shared);
    int range = 0;
#pragma unroll 4
    for (int i = t / Dp; i < p.k_chunks; i += kFinishThreads / Dp)
        range = max(range, __float_as_int(p.v_partial[(int64(head) * p.k_chunks + i) * Dp + t % Dp]));
    __syncthreads();
    words[t] = range;
    for (int stride = kFinishThreads / 2; stride >= Dp; stride /= 2) {
        __syncthreads();
        if (t < stride) words[t] = max(words[t], words[t + stride]);
    }
    __syncthreads();
    range = t < Dp ? words[t] : 0;
    __syncthreads();
    words[t] = range;
    for (int stride = kFinishThreads / 2; stride > 0; stride /= 2) {
        __syncthreads();
        if (t < stride) words[t] = max(words[t], words[t + stride]);
    }
    __syncthreads();
    if (t == 0) p.guard[head] = is_finite(words[0]) ? 0.0f : not_a_number();
    if (kValueScale == kValueHead) range = words[0];
    if (t < Dp) {
        p.v_statistic[int64(head) * Dp + t] = __int_as_float(range);
        p.v_scale[int64(head) * Dp + t] = kHalfV ? half_scale(range) : scale_of(range).scale;
    }
}

// --- packing -----------------------------------------------------------------------------------------------------------

struct Factors {
    float mean[kUnit];
    float factor[kUnit];

    // inverse: K's factors, 1 / c
    __device__ __forceinline__ void load(const QuantizeParams& p, int kv_head, int first, bool inverse) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
            mean[i] = kSmooth ? p.k_mean[int64(kv_head) * Dp + first + i] : 0.0f;
            factor[i] = kEqualize ? p.equalizer[int64(kv_head) * (2 * Dp) + (inverse ? Dp : 0) + first + i] : 1.0f;
        }
    }

    __device__ __forceinline__ void prepare(float (&x)[kUnit], int first) const {
        if (kEqualize) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) x[i] = mul_rn(x[i], factor[i]);
        }
        if (kHadamard) rotate(x, first);
    }
};

__device__ __forceinline__ uint2 pack_unit(const float (&x)[kUnit], float inverse) {
    uint32 b[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) b[i] = rounded(x[i], inverse);
    const uint2 words = {pack_low_bytes(b[0], b[1], b[2], b[3]), pack_low_bytes(b[4], b[5], b[6], b[7])};
    return inverse == 0.0f ? uint2{0, 0} : words;
}

__device__ __forceinline__ void pack_queries(const QuantizeParams& p, int head, int tile) {
    const int t = threadIdx.x;
    const int first = t % kLanes * kUnit;
    const int row0 = tile * kTileKeys + t / kLanes;
    const Head source(p.q, head / p.heads, head % p.heads, p.vector_q);
    Factors factors;
    factors.load(p, head / p.heads * p.kv_heads + head % p.heads / (p.heads / p.kv_heads), first, false);
    Unit unit[kAhead];
#pragma unroll
    for (int u = 0; u < kPackSteps; ++u) {
        if (u % kAhead == 0) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                source.load(unit[i], row0 + (u + i) * kPackRows, p.queries, first);
        }
        const int row = row0 + u * kPackRows;
        const int64 place = int64(head) * p.queries + row;
        float x[kUnit];
        unit[u % kAhead].get(x);
        if (kSmooth) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < kUnit; ++i) dot = fmaf(x[i], factors.mean[i], dot);
            dot = row_sum(dot);
            if (t % kLanes == 0 && row < p.queries) p.lse_shift[place] = dot;
        }
        factors.prepare(x, first);
        const Scale scale = scale_of(row_max(range_of(x)));
        if (row >= p.queries) continue;
        *reinterpret_cast<uint2*>(p.q8 + place * Dp + first) = pack_unit(x, scale.inverse);
        if (t % kLanes == 0) p.q_scale[place] = scale.scale;
    }
}

// Where 8 channels of a key lie within a packed tile of K.
__device__ __forceinline__ int key_place(int key, int first) {
    constexpr int line = Dp < 128 ? 64 : 128;
    const int chunk = first % line / 16 ^ (line == 64 ? key / 2 % 4 : key % 8);
    return first / line * (kTileKeys * line) + key * line + chunk * 16 + first % 16;
}

__device__ __forceinline__ void pack_keys(const QuantizeParams& p, int head, int tile, int* shared) {
    const int t = threadIdx.x;
    const int first = t % kLanes * kUnit;
    const int slot = t / kLanes;  // this thread's keys of the tile: slot + 16u, all of one group of keys
    const Head source(p.k, head / p.kv_heads, head % p.kv_heads, p.vector_k);
    Unit unit[kAhead];
    Factors factors;
    factors.load(p, head, first, true);
    const int64 place = int64(head) * p.tiles + tile;
    int8* const packed = p.k8 + place * (kTileKeys * Dp);
    const auto prepare = [&](float (&x)[kUnit], int u) {
        if (u % kAhead == 0) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                source.load(unit[i], tile * kTileKeys + slot + (u + i) * kPackRows, p.keys, first);
        }
        unit[u % kAhead].get(x);
        if (kSmooth) {
            // Beyond the last key the tile stays zero: the mean is not subtracted there.
            const bool inside = tile * kTileKeys + slot + u * kPackRows < p.keys;
#pragma unroll
            for (int i = 0; i < kUnit; ++i)
                x[i] = inside ? add_rn(x[i], -factors.mean[i]) : 0.0f;
        }
        factors.prepare(x, first);
    };

    int worst = 0;
    if (kKeyScale == kScaleToken) {
#pragma unroll
        for (int u = 0; u < kPackSteps; ++u) {
            const int key = slot + u * kPackRows;
            float x[kUnit];
            prepare(x, u);
            const int range = row_max(range_of(x));
            worst = max(worst, range);
            const Scale scale = scale_of(range);
            *reinterpret_cast<uint2*>(packed + key_place(key, first)) = pack_unit(x, scale.inverse);
            if (t % kLanes == 0) p.k_scale[place * kTileKeys + key] = scale.scale;
        }
    } else {
        float x[kPackSteps][kUnit];
#pragma unroll
        for (int u = 0; u < kPackSteps; ++u) {
            prepare(x[u], u);
            worst = max(worst, range_of(x[u]));
        }
        worst = row_max(worst);
        if (t % kLanes == 0) shared[slot] = worst;
        __syncthreads();
        int range = 0;
        for (int s = 0; s < kPackRows; ++s)
            if (kKeyScale == kScaleTile || s % 8 / 2 == slot % 8 / 2) range = max(range, shared[s]);
        const Scale scale = scale_of(range);
#pragma unroll
        for (int u = 0; u < kPackSteps; ++u)
            *reinterpret_cast<uint2*>(packed + key_place(slot + u * kPackRows, first)) = pack_unit(x[u], scale.inverse);
        if (kKeyScale == kScaleTile && t == 0) p.k_scale[place] = scale.scale;
        if (kKeyScale == kScaleGroup && t % kLanes == 0 && slot < 8 && slot % 2 == 0)
            p.k_scale[place * 4 + slot / 2] = scale.scale;
    }
    if (!is_finite(worst)) p.guard[head] = not_a_number();
}

// Four keys of a tile whose packed positions are 4 * word .. 4 * word + 3: the first one, then + 1, + 8, + 9.
__device__ __forceinline__ int first_key(int word) { return word / 8 * 32 + word / 4 % 2 * 16 + word % 4 * 2; }
__device__ __forceinline__ int key_of(int word, int i) { return first_key(word) + i / 2 * 8 + i % 2; }

__device__ __forceinline__ void pack_values(const QuantizeParams& p, int head, int tile, uint32* shared) {
    const int t = threadIdx.x;
    const int first = t % kLanes * kUnit;
    const int slot = t / kLanes;  // this thread's words of four keys: slot and slot + 16
    const Head source(p.v, head / p.kv_heads, head % p.kv_heads, p.vector_v);
    Unit unit[kAhead];
    static_assert(kAhead == 4, "the keys of a word");
    const auto load = [&](int w) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            source.load(unit[i], tile * kTileKeys + key_of(slot + w * 16, i), p.keys, first);
    };
    load(0);

    const int64 place = int64(head) * p.tiles + tile;
    float inverse[kUnit];  // per channel, or per key
    if (kValueScale == kValueToken) {
        const float floor = p.v_statistic[int64(head) * Dp];
        const float head_scale = p.v_scale[int64(head) * Dp];
#pragma unroll
        for (int u = 0; u < kPackSteps; ++u) {
            const int key = key_of(slot + u / 4 * 16, u % 4);
            float* const range = p.v_token + place * kTileKeys + key;
            const bool inside = tile * kTileKeys + key < p.keys;
            const Scale scale = scale_of(max(inside ? __float_as_int(*range) : 0, __float_as_int(floor)));
            inverse[u] = scale.inverse;
            __syncwarp();  // every lane of the row has read the range
            if (t % kLanes == 0) {
                *range = scale.scale;
                *reinterpret_cast<float2*>(p.v_fold + (place * kTileKeys + key) * 2) = {
                    log2f(div_rn(scale.scale, head_scale)), div_rn(head_scale, scale.scale)};
            }
        }
    } else if (kHalfV) {
        const float scale = p.v_scale[int64(head) * Dp];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) inverse[i] = scale == scale ? div_rn(1.0f, scale) : 0.0f;
    } else {
#pragma unroll
        for (int i = 0; i < kUnit; ++i)
            inverse[i] = scale_of(__float_as_int(p.v_statistic[int64(head) * Dp + first + i])).inverse;
    }

    if (kHalfV) {
#pragma unroll
        for (int u = 0; u < kPackSteps; ++u) {
            if (u == kAhead) load(1);
            float x[kUnit];
            unit[u % kAhead].get(x);
#pragma unroll
            for (int i = 0; i < kUnit; ++i) x[i] = inverse[i] == 0.0f ? 0.0f : mul_rn(x[i], inverse[i]);
            const int key = key_of(slot + u / 4 * 16, u % 4);
            const uint4 halves = {pack_halves(x[0], x[1]), pack_halves(x[2], x[3]), pack_halves(x[4], x[5]),
                                  pack_halves(x[6], x[7])};
            reinterpret_cast<uint4*>(p.v8)[((place * kTileKeys + key) * Dp + first) / kUnit] = halves;
        }
        return;
    }

    // Transpose through shared memory: one word holds four positions of a channel.
#pragma unroll
    for (int w = 0; w < 2; ++w) {
        if (w == 1) load(1);
        uint32 byte[4][kUnit];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int u = w * 4 + k;
            float x[kUnit];
            unit[k].get(x);
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                const float scale = kValueScale == kValueToken ? inverse[u] : inverse[i];
                byte[k][i] = scale == 0.0f ? 0 : rounded(x[i], scale);
            }
        }
#pragma unroll
        for (int i = 0; i < kUnit; ++i)
            shared[(first + i) * kTransposeStride + slot + w * 16] =
                pack_low_bytes(byte[0][i], byte[1][i], byte[2][i], byte[3][i]);
    }
    __syncthreads();
    uint4* const packed = reinterpret_cast<uint4*>(static_cast<int8*>(p.v8) + place * (Dp * kTileKeys));
#pragma unroll
    for (int i = 0; i < Dp * 8 / kPackThreads; ++i) {
        const int index = i * kPackThreads + t;
        const int channel = index / 8;
        const int chunk = index % 8;
        const uint32* from = shared + channel * kTransposeStride + chunk * 4;
        packed[channel * 8 + (chunk ^ channel % 8)] = {from[0], from[1], from[2], from[3]};
    }
}

}  // namespace intfa

using namespace intfa;

// Blocks: the chunks of K, then those of Q, then those of V, as far as the recipe needs them.
extern "C" __global__ void __launch_bounds__(kStatisticsThreads) quantize_statistics(const QuantizeParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    float* const shared = reinterpret_cast<float*>(shared_memory);
    int block = blockIdx.x;
    if (kKeyStatistics) {
        const int blocks = p.batches * p.kv_heads * p.k_chunks;
        if (block < blocks) return key_statistics(p, block / p.k_chunks, block % p.k_chunks, shared);
        block -= blocks;
    }
    if (kQueryStatistics) {
        const int blocks = p.batches * p.heads * p.q_chunks;
        if (block < blocks) return query_statistics(p, block / p.q_chunks, block % p.q_chunks, shared);
        block -= blocks;
    }
    value_statistics(p, block / p.k_chunks, block % p.k_chunks, shared);
}

// One block per key/value head.
extern "C" __global__ void __launch_bounds__(kFinishThreads) quantize_finish(const QuantizeParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    double* const shared = reinterpret_cast<double*>(shared_memory);
    if (kKeyStatistics) finish_keys(p, blockIdx.x, shared);
    finish_values(p, blockIdx.x, shared);
}

// Blocks: the tiles of V, then those of K, then the blocks of 128 rows of Q.
extern "C" __global__ void __launch_bounds__(kPackThreads, kPackBlocks) quantize_pack(const QuantizeParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    int block = blockIdx.x;
    const int blocks = p.batches * p.kv_heads * p.tiles;
    if (block < blocks) return pack_values(p, block / p.tiles, block % p.tiles, reinterpret_cast<uint32*>(shared_memory));
    block -= blocks;
    if (block < blocks) return pack_keys(p, block / p.tiles, block % p.tiles, reinterpret_cast<int*>(shared_memory));
    block -= blocks;
    const int query_tiles = (p.queries + kTileKeys - 1) / kTileKeys;
    pack_queries(p, block / query_tiles, block % query_tiles);
}
