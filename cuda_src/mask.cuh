// Which keys a query row sees, and what that means for a block of rows and a tile of keys.
//
// Row i stands at key position p = i + Sk - Sq (the last query on the last key) and sees the keys
// p - left <= j <= p + right. Causal attention has right = 0. Both ends of the range grow with i.
#pragma once

#include "params.cuh"

namespace intfa {

// Keys [begin, end) of one row, within [0, Sk]. Empty when end <= begin.
struct KeyRange {
    int begin;
    int end;
};

__device__ __forceinline__ KeyRange visible_keys(const AttentionParams& p, int row) {
    const long long position = static_cast<long long>(row) + p.keys - p.queries;
    long long begin = 0;
    long long end = p.keys;
    if (p.left != kUnbounded && position - p.left > 0) begin = position - p.left;
    if (p.right != kUnbounded && position + p.right + 1 < end) end = position + p.right + 1;
    if (begin > p.keys) begin = p.keys;
    if (end < 0) end = 0;
    return {static_cast<int>(begin), static_cast<int>(end)};
}

// Tiles [begin, end) that rows [row0, row1) see, and the keys that all of those rows see.
struct BlockRange {
    int tile_begin;
    int tile_end;
    KeyRange common;

    // Is some key of [key0, key0 + n) hidden from some row of the block?
    __device__ __forceinline__ bool needs_mask(int key0, int n) const {
        return key0 < common.begin || static_cast<long long>(key0) + n > common.end;
    }
};

// row1 is clamped to Sq by the caller; row0 < row1. tile_keys: keys per kernel tile.
__device__ __forceinline__ BlockRange block_range(const AttentionParams& p, int row0, int row1,
                                                  int tile_keys = kTileKeys) {
    const KeyRange first = visible_keys(p, row0);
    const KeyRange last = visible_keys(p, row1 - 1);
    BlockRange range;
    range.tile_begin = first.begin / tile_keys;
    range.tile_end = static_cast<int>((static_cast<long long>(last.end) + tile_keys - 1) / tile_keys);
    if (last.end <= first.begin) range.tile_end = range.tile_begin;
    range.common = {last.begin, first.end};
    return range;
}

}  // namespace intfa
