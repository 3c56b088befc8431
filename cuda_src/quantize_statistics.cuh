// What the quantiser must know of a head before it can round: statistics of chunks of rows, put together per head.
#pragma once

#include "quantize_rows.cuh"

namespace intfa {

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
        head.load(unit, row0 + step * kStatisticsRows, rows, first, [](int i) { return i * kStatisticsRows; });
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
        const float range = __int_as_float(row_max<kLanes>(range_of<kUnit>(x)));
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

// --- statistics of a head ----------------------------------------------------------------------------------------

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
        const float scale = scale_of<kValueFormat>(max(range, __float_as_int(floor))).scale;
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
        p.v_scale[int64(head) * Dp + t] = kValueScale == kValueNone ? 1.0f : scale_of<kValueFormat>(range).scale;
    }
}

}  // namespace intfa
