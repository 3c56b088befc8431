// How the four lanes of a fragment's row store what they hold of it: of every 8 channels, lane q has 2q and 2q + 1.
#pragma once

#include "platform.cuh"

namespace intfa {

// The lane without the bit keeps low and gets its partner's low for high, the one with it keeps high.
__device__ __forceinline__ void exchange_words(uint32& low, uint32& high, int bit, int quad) {
    const bool upper = quad & bit;
    const uint32 other = __shfl_xor_sync(kFullWarp, upper ? low : high, bit);
    if (upper)
        low = other;
    else
        high = other;
}

// 32 channels of a row at an address that is a multiple of 16 bytes. Of 16 bits each, the lanes exchange theirs first,
// so that each has eight neighbours: four bytes at a time, a warp's stores would touch each line of memory four times.
__device__ __forceinline__ void store_pairs(uint32 (&pair)[4], void* row, int quad, bool inside) {
    exchange_words(pair[0], pair[1], 1, quad);
    exchange_words(pair[2], pair[3], 1, quad);
    exchange_words(pair[0], pair[2], 2, quad);
    exchange_words(pair[1], pair[3], 2, quad);
    if (inside) static_cast<uint4*>(row)[quad] = {pair[0], pair[1], pair[2], pair[3]};
}

__device__ __forceinline__ void store_pairs(const float2 (&pair)[4], void* row, int quad, bool inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (inside) static_cast<float2*>(row)[4 * i + quad] = pair[i];
}

}  // namespace intfa
