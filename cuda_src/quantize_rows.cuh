// Rows of Q, K and V in the registers of the quantiser: reading, preparing (mean, factors, rotation), ranges.
#pragma once

#include "quantize_setup.cuh"

namespace intfa {

// --- reading -----------------------------------------------------------------------------------------------------

// The channel of element i of a part.
__device__ __forceinline__ int channel_of(int part, int i) { return part * 16 + i % 16 + i / 16 * kHalfRow; }

// 8 consecutive channels of a row as they lie in memory.
struct Unit {
    static constexpr int kWords = kInput == kFloat32 ? 8 : 4;
    uint32 word[kWords];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = 0;
    }

    // from: 8 channels side by side
    __device__ __forceinline__ void load(const void* from) {
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
            const uint4 four = static_cast<const uint4*>(from)[i];
            word[4 * i] = four.x;
            word[4 * i + 1] = four.y;
            word[4 * i + 2] = four.z;
            word[4 * i + 3] = four.w;
        }
    }

    // row: its first channel; first: the unit's. Channels beyond D are zero.
    __device__ __forceinline__ void gather(const void* row, int first, int64 stride) {
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

    __device__ __forceinline__ void get(float* x) const {
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

// Fills units one after the other, for the long way: unrolled, it would take many registers. The units move up, since
// a register has no index that the compiler does not know.
template <int count, typename Fill>
__device__ __forceinline__ void fill_in_turn(Unit (&unit)[count], Fill fill) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
#pragma unroll
        for (int j = 0; j + 1 < count; ++j) unit[j] = unit[j + 1];
        unit[count - 1].clear();
        fill(unit[count - 1], i);
    }
}

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

    // Loads a unit of each of the rows index + offset(i), those beyond the last row as zeros.
    template <int count, typename Offset>
    __device__ __forceinline__ void load(Unit (&unit)[count], int index, int rows, int first, Offset offset) const {
        if (D != Dp && first >= D) {
#pragma unroll
            for (int i = 0; i < count; ++i) unit[i].clear();
            return;
        }
        const uint8* const from = data + index * row;
        if (vector && index + offset(count - 1) < rows) {
            const uint8* const here = from + first * kElementBytes;
#pragma unroll
            for (int i = 0; i < count; ++i) unit[i].load(here + offset(i) * row);
            return;
        }
        fill_in_turn(unit, [&](Unit& one, int i) {
            if (index + offset(i) >= rows) return;
            if (!vector)
                one.gather(from + offset(i) * row, first, channel);
            else
                one.load(from + offset(i) * row + first * kElementBytes);
        });
    }

    // Loads a part of a row, zeros beyond the last row.
    __device__ __forceinline__ void load_part(Unit (&unit)[kPart / kUnit], int index, int rows, int part) const {
        const uint8* const from = data + index * row;
        if (!vector) {
            fill_in_turn(unit, [&](Unit& one, int i) {
                if (index < rows) one.gather(from, channel_of(part, i * kUnit), channel);
            });
            return;
        }
#pragma unroll
        for (int i = 0; i < kPart / kUnit; ++i) {
            const int first = channel_of(part, i * kUnit);
            unit[i].clear();
            if (index < rows && (D == Dp || first < D)) unit[i].load(from + first * kElementBytes);
        }
    }
};

// --- the rotation ------------------------------------------------------------------------------------------------

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

// Butterflies between channels i and i ^ h, h = 1, 2, 4, .. within each block: the lower becomes a + b, the upper
// a - b. h below 16 and the largest are between elements of a part, the others between lanes. Not normalised: that is
// among the factors which came before.
__device__ __forceinline__ void rotate(float (&x)[kPart], int part) {
    const int sizes[2] = {block_size(channel_of(part, 0)), block_size(channel_of(part, 16))};
    const auto size = [&](int i) { return D % 16 == 0 ? sizes[i / 16] : block_size(channel_of(part, i)); };
#pragma unroll
    for (int h = 1; h < 16; h *= 2) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
            if (i & h) continue;
            if (D % 16 != 0 && h >= size(i)) continue;  // else blocks are of 16 at least, or zero
            const float a = x[i], b = x[i + h];
            x[i] = a + b;
            x[i + h] = a - b;
        }
    }
#pragma unroll
    for (int h = 16; h < kHalfRow; h *= 2) {
        if (2 * h > D) continue;
        const float sign = part * 16 & h ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
            const float other = __shfl_xor_sync(kFullWarp, x[i], h / 16);
            const float y = fmaf(x[i], sign, other);  // exactly other + x or other - x
            if (kOneBlock || h < size(i)) x[i] = y;
        }
    }
    if (kOneBlock) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float a = x[i], b = x[i + 16];
            x[i] = a + b;
            x[i + 16] = a - b;
        }
    }
}

// Over the lanes that hold a row.
template <int lanes_of_row>
__device__ __forceinline__ int row_max(int x) {
#pragma unroll
    for (int lanes = 1; lanes < lanes_of_row; lanes *= 2) x = max(x, __shfl_xor_sync(kFullWarp, x, lanes));
    return x;
}

__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int lanes = 1; lanes < kParts; lanes *= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
    return x;
}

template <int count>
__device__ __forceinline__ int range_of(const float* x) {
    float range = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i) range = max_magnitude(range, x[i]);
    return magnitude(range);
}

// The ranges of this lane's row, and of what shares a scale with each half of its part.
struct Ranges {
    int row;
    int half[2];
};

__device__ __forceinline__ Ranges ranges_of(const float (&x)[kPart], int scale) {
    int half[2] = {range_of<16>(x), range_of<16>(x + 16)};
    if (scale == kScaleChannel) {  // groups of 32 channels: the same half of a neighbouring lane
#pragma unroll
        for (int i = 0; i < 2; ++i) half[i] = max(half[i], __shfl_xor_sync(kFullWarp, half[i], 1));
    }
    const int row = row_max<kParts>(max(half[0], half[1]));
    if (scale != kScaleChannel) return {row, {row, row}};
    return {row, {half[0], half[1]}};
}

// --- preparation of Q and K --------------------------------------------------------------------------------------

// K's mean and the factors of a head, those of the channels times the rotation's normalisation, in shared memory in the
// order of parts. Padded, so that lanes of different parts read different banks.
struct Factors {
    static constexpr int kStride = kPart + 4;
    static constexpr int kFloats = 2 * kParts * kStride;
    float* mean;
    float* factor;

    // For all threads of a block at once. of_keys: with 1 / c as the factors
    __device__ __forceinline__ Factors(const QuantizeParams& p, int kv_head, bool of_keys, float* shared)
        : mean(shared), factor(shared + kParts * kStride) {
        if (!kPrepared) return;
        for (int t = threadIdx.x; t < Dp; t += blockDim.x) {
            const int place = t % kHalfRow / 16 * kStride + t / kHalfRow * 16 + t % 16;
            if (kSmooth && (of_keys || kLseShift)) mean[place] = p.k_mean[int64(kv_head) * Dp + t];
            float c = kEqualize ? p.equalizer[int64(kv_head) * (2 * Dp) + (of_keys ? Dp : 0) + t] : 1.0f;
            if (kHadamard) c = mul_rn(c, inverse_sqrt(block_size(t)));
            factor[place] = c;
        }
        __syncthreads();
    }

    // Calls visit(i, value) for the values of a part.
    template <typename Visit>
    __device__ __forceinline__ void each(const float* values, int part, Visit visit) const {
#pragma unroll
        for (int i = 0; i < kPart; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(values + part * kStride + i);
            visit(i, four.x);
            visit(i + 1, four.y);
            visit(i + 2, four.z);
            visit(i + 3, four.w);
        }
    }

    __device__ __forceinline__ void prepare(float (&x)[kPart], int part) const {
        if (kEqualize || kHadamard) each(factor, part, [&](int i, float c) { x[i] = mul_rn(x[i], c); });
        if (kHadamard) rotate(x, part);
    }

    // Beyond the last key the tile stays zero: the mean is not subtracted there.
    __device__ __forceinline__ void prepare_key(float (&x)[kPart], int part, bool inside) const {
        if (kSmooth) each(mean, part, [&](int i, float m) { x[i] = inside ? add_rn(x[i], -m) : 0.0f; });
        prepare(x, part);
    }
};

// Runs visit(x, step) for this thread's parts of a tile of Q or K, rows row0 + step * kPackRows, the next one's loads
// under way. Not unrolled, for the instruction cache, unless what the steps make stays in registers.
template <int unroll = 1, typename Visit>
__device__ __forceinline__ void for_tile(const Head& head, int row0, int rows, int part, Visit visit) {
    constexpr bool ahead = kInput != kFloat32;
    Unit unit[kPart / kUnit];
    if (ahead) head.load_part(unit, row0, rows, part);
#pragma unroll unroll
    for (int step = 0; step < kPackSteps; ++step) {
        if (!ahead) head.load_part(unit, row0 + step * kPackRows, rows, part);
        float x[kPart];
#pragma unroll
        for (int i = 0; i < kPart / kUnit; ++i) unit[i].get(x + i * kUnit);
        if (ahead && step + 1 < kPackSteps) head.load_part(unit, row0 + (step + 1) * kPackRows, rows, part);
        visit(x, step);
    }
}

}  // namespace intfa
