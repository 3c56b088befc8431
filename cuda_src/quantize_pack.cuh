// Rounding of a tile of 128 rows, and where its numbers go in the packed format.
#pragma once

#include "quantize_rows.cuh"

namespace intfa {

// x * inverse as FP8 takes it: within the format's range, NaN for what is not finite.
template <int format>
__device__ __forceinline__ float limited(float x, float inverse) {
    const float y = fminf(fmaxf(mul_rn(x, inverse), -levels(format)), levels(format));
    return is_finite(magnitude(x)) ? y : not_a_number();
}

// Four channels as bytes, INT4 as int8; 0 for integers where inverse is 0.
template <int format>
__device__ __forceinline__ uint32 pack_word(const float* x, float inverse) {
    if constexpr (is_fp8(format)) {
        return pack_fp8<format>(limited<format>(x[0], inverse), limited<format>(x[1], inverse),
                                limited<format>(x[2], inverse), limited<format>(x[3], inverse));
    } else {
        const uint32 word = pack_low_bytes(rounded(x[0], inverse), rounded(x[1], inverse), rounded(x[2], inverse),
                                           rounded(x[3], inverse));
        return inverse == 0.0f ? 0 : word;
    }
}

__device__ __forceinline__ uint32 pack_finite_halves(float a, float b, float inverse) {
    return pack_halves(is_finite(magnitude(a)) ? mul_rn(a, inverse) : not_a_number(),
                       is_finite(magnitude(b)) ? mul_rn(b, inverse) : not_a_number());
}

// Stores a part of a row of Q or K, if inside: 16 bytes at a time at at(first byte in the row). The halves have scales
// of their own. For all lanes of a warp at once.
template <int format, typename At>
__device__ __forceinline__ void store_part(const float (&x)[kPart], const Scale (&scale)[2], int part, bool inside,
                                           At at) {
    uint4 words[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float* const y = x + 16 * half;
        const float inverse = scale[half].inverse;
        if constexpr (format == kHalf) {
#pragma unroll
            for (int i = 0; i < 16; i += 8) {
                words[0] = {pack_finite_halves(y[i], y[i + 1], inverse),
                            pack_finite_halves(y[i + 2], y[i + 3], inverse),
                            pack_finite_halves(y[i + 4], y[i + 5], inverse),
                            pack_finite_halves(y[i + 6], y[i + 7], inverse)};
                if (inside) *reinterpret_cast<uint4*>(at(2 * channel_of(part, 16 * half + i))) = words[0];
            }
        } else {
            words[half] = {pack_word<format>(y, inverse), pack_word<format>(y + 4, inverse),
                           pack_word<format>(y + 8, inverse), pack_word<format>(y + 12, inverse)};
            if (format != kInt4 && inside) *reinterpret_cast<uint4*>(at(channel_of(part, 16 * half))) = words[half];
        }
    }
    if constexpr (format == kInt4) {
        // Of a group of 32 channels two lanes have 16 each, for the low and the high halves of the same bytes: the even
        // lane puts together what is in the first half of the row, the odd one the second.
        const bool odd = part & 1;
        const auto both = [&](uint32 first, uint32 second) {
            const uint32 other =
                static_cast<uint32>(__shfl_xor_sync(kFullWarp, static_cast<int>(odd ? first : second), 1));
            const uint32 low = odd ? other : first, high = odd ? second : other;
            return (low & 0x0f0f0f0fu) | (high << 4 & 0xf0f0f0f0u);
        };
        const uint4 bytes = {both(words[0].x, words[1].x), both(words[0].y, words[1].y), both(words[0].z, words[1].z),
                             both(words[0].w, words[1].w)};
        if (inside) *reinterpret_cast<uint4*>(at((part / 2 * kGroup + (odd ? kHalfRow : 0)) / 2)) = bytes;
    }
}

// The largest of the threads' ranges. For all threads of a block at once.
__device__ __forceinline__ int block_range(int range, int* shared) {
    const int t = threadIdx.x;
    shared[t] = range;
    for (int stride = kPackThreads / 2; stride > 0; stride /= 2) {
        __syncthreads();
        if (t < stride) shared[t] = max(shared[t], shared[t + stride]);
    }
    __syncthreads();
    return shared[0];
}

// The largest of the tiles' ranges of a head.
__device__ __forceinline__ int head_range(const float* ranges, int tiles, int* shared) {
    int range = 0;
    for (int i = threadIdx.x; i < tiles; i += kPackThreads) range = max(range, __float_as_int(ranges[i]));
    return block_range(range, shared);
}

__device__ __forceinline__ int query_tiles(const QuantizeParams& p) { return (p.queries + kTileKeys - 1) / kTileKeys; }
__device__ __forceinline__ int kv_head_of(const QuantizeParams& p, int head) {
    return head / p.heads * p.kv_heads + head % p.heads / (p.heads / p.kv_heads);
}

__device__ __forceinline__ void query_range(const QuantizeParams& p, int head, int tile, float* shared) {
    const int part = threadIdx.x % kParts;
    const Factors factors(p, kv_head_of(p, head), false, shared);
    int range = 0;
    for_tile(Head(p.q, head / p.heads, head % p.heads, p.vector_q), tile * kTileKeys + threadIdx.x / kParts, p.queries,
             part, [&](float (&x)[kPart], int) {
                 factors.prepare(x, part);
#pragma unroll
                 for (int i = 0; i < kPart; ++i)
                     if (is_finite(magnitude(x[i]))) range = max(range, magnitude(x[i]));
             });
    range = block_range(range, reinterpret_cast<int*>(shared + Factors::kFloats));
    if (threadIdx.x == 0) p.q_range[int64(head) * query_tiles(p) + tile] = __int_as_float(range);
}

__device__ __forceinline__ void key_range(const QuantizeParams& p, int head, int tile, float* shared) {
    const int part = threadIdx.x % kParts;
    const int row0 = tile * kTileKeys + threadIdx.x / kParts;
    const Factors factors(p, head, true, shared);
    int range = 0;
    for_tile(Head(p.k, head / p.kv_heads, head % p.kv_heads, p.vector_k), row0, p.keys, part,
             [&](float (&x)[kPart], int step) {
                 factors.prepare_key(x, part, row0 + step * kPackRows < p.keys);
                 range = max(range, range_of<kPart>(x));
             });
    range = block_range(range, reinterpret_cast<int*>(shared + Factors::kFloats));
    if (threadIdx.x == 0) p.k_range[int64(head) * p.tiles + tile] = __int_as_float(range);
}

__device__ __forceinline__ void pack_queries(const QuantizeParams& p, int head, int tile, float* shared) {
    constexpr int row_bytes = Dp * format_bits(kQueryFormat) / 8;
    const int part = threadIdx.x % kParts;
    const int row0 = tile * kTileKeys + threadIdx.x / kParts;
    const Factors factors(p, kv_head_of(p, head), false, shared);
    Scale scale[2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
    if (kQueryScale == kScaleHead) {
        const float* const ranges = p.q_range + int64(head) * query_tiles(p);
        scale[0] = scale[1] = scale_of<kQueryFormat, !kPrepared>(
            head_range(ranges, query_tiles(p), reinterpret_cast<int*>(shared + Factors::kFloats)));
        if (tile == 0 && threadIdx.x == 0) p.q_head_scale[head] = scale[0].scale;
    }
    const Head source(p.q, head / p.heads, head % p.heads, p.vector_q);
    for_tile(source, row0, p.queries, part, [&](float (&x)[kPart], int step) {
        const int row = row0 + step * kPackRows;
        const bool inside = row < p.queries;
        const int64 place = int64(head) * p.queries + row;
        if (kLseShift) {
            float dot = 0.0f;
            factors.each(factors.mean, part, [&](int i, float m) { dot = fmaf(x[i], m, dot); });
            dot = row_sum(dot);
            if (part == 0 && inside) p.lse_shift[place] = dot;
        }
        factors.prepare(x, part);
        const Ranges range = ranges_of(x, kQueryScale);
        const bool finite = is_finite(range.row);
        if (kQueryScale == kScaleToken) scale[0] = scale[1] = scale_of<kQueryFormat>(range.row);
        if (kQueryScale == kScaleChannel) {
#pragma unroll
            for (int i = 0; i < 2; ++i) scale[i] = scale_of<kQueryFormat>(finite ? range.half[i] : range.row);
        }
        store_part<kQueryFormat>(x, scale, part, inside, [&](int byte) {
            return static_cast<uint8*>(p.q8) + place * row_bytes + byte;
        });
        if (!inside) return;
        if (kQueryScale == kScaleChannel) {
            if (part % 2 == 0) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    p.q_scale[place * (Dp / kGroup) + channel_of(part, 16 * i) / kGroup] = scale[i].scale;
            }
        } else if (part == 0) {
            p.q_scale[place] = finite ? scale[0].scale : not_a_number();
        }
    });
}

// Where a byte of a key's row lies within a packed tile of K.
__device__ __forceinline__ int key_place(int key, int byte) {
    constexpr int row_bytes = Dp * format_bits(kKeyFormat) / 8;
    constexpr int line = row_bytes < 128 ? row_bytes : 128;
    const int chunk = byte % line / 16 ^ key * (line / 16) / 8 % (line / 16);
    return byte / line * (kTileKeys * line) + key * line + chunk * 16 + byte % 16;
}

__device__ __forceinline__ void pack_keys(const QuantizeParams& p, int head, int tile, float* shared) {
    int* const words = reinterpret_cast<int*>(shared + Factors::kFloats);
    const int part = threadIdx.x % kParts;
    const int slot = threadIdx.x / kParts;  // this thread's keys of the tile: slot and slot + 64, of one group of keys
    const int row0 = tile * kTileKeys + slot;
    const Head source(p.k, head / p.kv_heads, head % p.kv_heads, p.vector_k);
    const Factors factors(p, head, true, shared);
    const int64 place = int64(head) * p.tiles + tile;
    uint8* const packed = static_cast<uint8*>(p.k8) + place * (kTileKeys * Dp * format_bits(kKeyFormat) / 8);
    const auto store = [&](const float (&x)[kPart], int step, const Scale (&scale)[2]) {
        const int key = slot + step * kPackRows;
        store_part<kKeyFormat>(x, scale, part, true, [&](int byte) { return packed + key_place(key, byte); });
    };

    int worst = 0;
    Scale scale[2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
    if (!kHeldTile) {
        if (kKeyScale == kScaleHead) {
            worst = head_range(p.k_range + int64(head) * p.tiles, p.tiles, words);
            scale[0] = scale[1] = scale_of<kKeyFormat, !kPrepared>(worst);
        }
        if ((kKeyScale == kScaleHead || kKeyScale == kScaleNone) && tile == 0 && threadIdx.x == 0)
            p.k_scale[head] = scale[0].scale;
        for_tile(source, row0, p.keys, part, [&](float (&x)[kPart], int step) {
            const int key = slot + step * kPackRows;
            factors.prepare_key(x, part, row0 + step * kPackRows < p.keys);
            if (kKeyScale != kScaleHead) {
                const Ranges range = ranges_of(x, kKeyScale);
                worst = max(worst, range.row);
                if (kKeyScale == kScaleToken) scale[0] = scale[1] = scale_of<kKeyFormat>(range.row);
                if (kKeyScale == kScaleChannel) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) scale[i] = scale_of<kKeyFormat>(range.half[i]);
                }
            }
            store(x, step, scale);
            if (kKeyScale == kScaleToken && part == 0) p.k_scale[place * kTileKeys + key] = scale[0].scale;
            if (kKeyScale == kScaleChannel && part % 2 == 0) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    p.k_scale[(place * (Dp / kGroup) + channel_of(part, 16 * i) / kGroup) * kTileKeys + key] =
                        scale[i].scale;
            }
        });
    } else {
        float x[kPackSteps][kPart];
        for_tile<kPackSteps>(source, row0, p.keys, part, [&](float (&y)[kPart], int step) {
            factors.prepare_key(y, part, row0 + step * kPackRows < p.keys);
            worst = max(worst, range_of<kPart>(y));
#pragma unroll
            for (int i = 0; i < kPart; ++i) x[step][i] = y[i];
        });
        worst = row_max<kParts>(worst);
        if (part == 0) words[slot] = worst;
        __syncthreads();
        constexpr bool of_tile = kKeyScale == kScaleTile;
        int range = 0;
        for (int s = of_tile ? 0 : slot % 8 / 2 * 2; s < kPackRows; s += of_tile ? 2 : 8)
            range = max(range, max(words[s], words[s + 1]));
        scale[0] = scale[1] = scale_of<kKeyFormat>(range);
#pragma unroll
        for (int step = 0; step < kPackSteps; ++step) store(x[step], step, scale);
        if (kKeyScale == kScaleTile && threadIdx.x == 0) p.k_scale[place] = scale[0].scale;
        if (kKeyScale == kScaleGroup && part == 0 && slot < 8 && slot % 2 == 0)
            p.k_scale[place * 4 + slot / 2] = scale[0].scale;
    }
    if (!is_finite(worst)) p.guard[head] = not_a_number();
}

// Four keys of a tile whose packed positions are 4 * word .. 4 * word + 3: the first one, then + 1, + 8, + 9.
__device__ __forceinline__ int first_key(int word) { return word / 8 * 32 + word / 4 % 2 * 16 + word % 4 * 2; }
__device__ __forceinline__ int key_of(int word, int i) { return first_key(word) + i / 2 * 8 + i % 2; }

// The packed position of a key of a tile.
__device__ __forceinline__ int position_of(int key) {
    return key / 16 * 16 + key % 8 / 2 * 4 + key % 16 / 8 * 2 + key % 2;
}

// The scale of key threadIdx.x of a tile of folded V, what it means for P, and its reciprocal in shared memory.
__device__ __forceinline__ void scale_token(const QuantizeParams& p, int head, int tile, float* shared) {
    const int key = threadIdx.x;
    if (key < kTileKeys) {
        const float floor = p.v_statistic[int64(head) * Dp];
        const float head_scale = p.v_scale[int64(head) * Dp];
        const int64 place = (int64(head) * p.tiles + tile) * kTileKeys + key;
        const int range = tile * kTileKeys + key < p.keys ? __float_as_int(p.v_token[place]) : 0;
        const Scale scale = scale_of<kValueFormat>(max(range, __float_as_int(floor)));
        shared[key] = scale.inverse;
        p.v_token[place] = scale.scale;
        float* const fold = p.v_fold + (place - key) * 2 + position_of(key);
        fold[0] = kFoldOffset + log2f(div_rn(scale.scale, head_scale));
        fold[kTileKeys] = div_rn(head_scale, scale.scale);
    }
    __syncthreads();
}

__device__ __forceinline__ void pack_values(const QuantizeParams& p, int head, int tile, float* shared_floats) {
    uint32* const shared = reinterpret_cast<uint32*>(shared_floats + kTileKeys);
    const int t = threadIdx.x;
    const int first = t % kLanes * kUnit;
    const int slot = t / kLanes;  // this thread's words of four keys: slot and slot + kValueSlots
    const Head source(p.v, head / p.kv_heads, head % p.kv_heads, p.vector_v);
    Unit unit[kWordKeys];
    const auto load = [&](int w) {
        source.load(unit, tile * kTileKeys + first_key(slot + w * kValueSlots), p.keys, first,
                    [](int i) { return i / 2 * 8 + i % 2; });
    };
    load(0);

    const int64 place = int64(head) * p.tiles + tile;
    float inverse[kUnit];  // per channel
    if (kValueScale == kValueToken) {
        scale_token(p, head, tile, shared_floats);
    } else {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
            const int range = __float_as_int(p.v_statistic[int64(head) * Dp + first + i]);
            inverse[i] = kValueScale == kValueNone ? 1.0f : scale_of<kValueFormat>(range).inverse;
        }
    }

    if (kValueFormat == kHalf) {
#pragma unroll
        for (int u = 0; u < kValueWords * kWordKeys; ++u) {
            if (u == kWordKeys) load(1);
            float x[kUnit];
            unit[u % kWordKeys].get(x);
#pragma unroll
            for (int i = 0; i < kUnit; ++i) x[i] = inverse[i] == 0.0f ? 0.0f : mul_rn(x[i], inverse[i]);
            const int key = key_of(slot + u / kWordKeys * kValueSlots, u % kWordKeys);
            const uint4 halves = {pack_halves(x[0], x[1]), pack_halves(x[2], x[3]), pack_halves(x[4], x[5]),
                                  pack_halves(x[6], x[7])};
            reinterpret_cast<uint4*>(p.v8)[((place * kTileKeys + key) * Dp + first) / kUnit] = halves;
        }
        return;
    }

    // Transpose through shared memory: one word holds four positions of a channel.
#pragma unroll
    for (int w = 0; w < kValueWords; ++w) {
        if (w == 1) load(1);
        float x[kWordKeys][kUnit];
#pragma unroll
        for (int k = 0; k < kWordKeys; ++k) unit[k].get(x[k]);
        float token[kWordKeys];
#pragma unroll
        for (int k = 0; k < kWordKeys; ++k)
            token[k] = kValueScale == kValueToken ? shared_floats[key_of(slot + w * kValueSlots, k)] : 0.0f;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
            uint32 word;
            if constexpr (is_fp8(kValueFormat)) {
                const float channel[4] = {x[0][i], x[1][i], x[2][i], x[3][i]};
                word = inverse[i] == 0.0f ? 0 : pack_word<kValueFormat>(channel, inverse[i]);
            } else {
                uint32 byte[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float scale = kValueScale == kValueToken ? token[k] : inverse[i];
                    byte[k] = scale == 0.0f ? 0 : rounded(x[k][i], scale);
                }
                // v + 128 for the kernels; see packing.py.
                word = pack_low_bytes(byte[0], byte[1], byte[2], byte[3]) ^ 0x80808080u;
            }
            shared[(first + i) * kTransposeStride + slot + w * kValueSlots] = word;
        }
    }
    __syncthreads();
    uint4* const packed = reinterpret_cast<uint4*>(static_cast<uint8*>(p.v8) + place * (Dp * kTileKeys));
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
