// What surrounds the arithmetic of attention_wgmma.cu: a block's constants, its shared memory, the order in which it
// takes its work, and the warps that bring in data. The macros are described there.
#pragma once

#include "copy.cuh"
#include "mask.cuh"
#include "params.cuh"
#include "shared_memory.cuh"
#include "wgmma.cuh"

// Whether the products of a warp run beside its other work. It takes registers besides those of the scores. (With a
// running maximum the compiler has the products wait for each other.)
#define PIPELINED (P_TILE_MAX && (DP == 64 || (DP == 128 && K_SCALE == 1)))

namespace intfa {

// --- shape of a block ---------------------------------------------------------------------------------------

constexpr unsigned kStages = STAGES;
static_assert((kStages & (kStages - 1)) == 0, "the number of stages is a power of two");
constexpr int kConsumers = CONSUMERS;     // warpgroups that compute
constexpr int kGroupRows = 64;            // query rows of each
constexpr int kBlockRows = kConsumers * kGroupRows;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 24;
constexpr int kQueryLoaders = 64;         // threads that copy Q
constexpr int kConsumerRegisters = 480 / kConsumers;  // 128 * (24 + 480) of the SM's 65536

// --- what runs beside what: found by measurement ------------------------------------------------------------

// The exponentials run in blocks of 16 keys; a block starts after the probabilities of the one kChain before are
// packed (there are 8 blocks). Left to itself the compiler puts all exponentials in one run, and all packing behind it.
constexpr int kChain = !PIPELINED  ? (DP == 128 && !MASKED ? 3 : 4)
                       : DP == 128 ? (MASKED ? 3 : 1)
                                   : (K_SCALE == 1 && (kConsumers == 3 || MASKED) ? 8 : 4);
// The next tile's S is issued as soon as its array is free, not only together with this tile's P V.
constexpr bool kScoresFirst = PIPELINED && DP == 128 && !MASKED;
// Where O and l stand is settled while P V is under way, not before it is issued.
constexpr bool kSettleLate = PIPELINED ? kConsumers == 2 && (MASKED || K_SCALE != 1) : DP < 256;
// Fewer instructions for float16 results; at d = 64 the compiler makes a loop 6 % slower of it.
constexpr bool kSaturateAtOnce = DP > 64;
// Whether the next keys are there is looked up late in a step: earlier, the answer costs a register too many.
constexpr bool kTestLate = MASKED;

// Scores stay integers until the exponent when one scale covers all keys of a thread; else they become floats first.
constexpr bool kRaw = K_SCALE == kScaleGroup;
constexpr bool kFolded = V_FOLDED;
constexpr bool kTileMax = P_TILE_MAX;
static_assert(K_SCALE == kScaleGroup || K_SCALE == kScaleToken, "K scale per token or per group");
static_assert(!kFolded || K_SCALE == kScaleToken, "folded V goes with token scales of K");
static_assert(DP == 64 || DP == 128 || DP == 256, "head dimension is padded to 64, 128 or 256");
static_assert(kConsumers == 2 || (kConsumers == 3 && DP == 64), "what the registers allow");

// Whether the product of 64 channels takes half of the array that the scores were in.
constexpr bool kHalves = DP == 64 && !PIPELINED;

constexpr float kLevels = P_LEVELS;
static_assert(P_LEVELS == 255 || P_LEVELS == 127, "LEVELS");
// The exponent of a row's largest P.
constexpr float kLargest = P_LEVELS == 255 ? 7.99435343685886f : 6.98868468677217f;

constexpr int kTileBytes = kTileKeys * DP;             // of K and of V
constexpr int kQueryBytes = kBlockRows * DP;
constexpr int kScaleBytes = kRaw ? 16 : 4 * kTileKeys;
constexpr int kAuxBytes = kScaleBytes + (kFolded ? 8 * kTileKeys : 0);

constexpr int kRowBytes = DP == 64 ? 64 : 128;         // of a swizzled row of Q or K
constexpr unsigned kScoreHigh = descriptor_high(kRowBytes);
constexpr unsigned kValueHigh = descriptor_high(128);

// A hidden score, as it stands in the array: below every real one. An integer, a float before the scale of its row
// (not infinite: that scale may be 0), or with folded V an exponent.
constexpr int kHidden = kRaw ? -(1 << 30) : kFolded ? static_cast<int>(0xff800000u) : static_cast<int>(0xff7fffffu);

constexpr int kRecordBytes = 16 * kConsumers + 32;
constexpr int kItemSlots = 4;  // a record is read until the item's output is written, one item later; the producers
                               // are at most two items ahead of that

struct SharedMap {
    unsigned query, key, value, aux, query_scale, value_scale, item, barriers;
    __device__ __forceinline__ explicit SharedMap(unsigned base)
        : query(base),
          key(query + 2 * kQueryBytes),
          value(key + kStages * kTileBytes),
          aux(value + kStages * kTileBytes),
          query_scale(aux + kStages * kAuxBytes),
          value_scale(query_scale + 2 * kBlockRows * 4),
          item(value_scale + kItemSlots * DP * 4),
          barriers(item + kItemSlots * kRecordBytes) {}
    __device__ __forceinline__ unsigned key_full(int stage) const { return barriers + 8 * stage; }
    __device__ __forceinline__ unsigned key_empty(int stage) const { return barriers + 8 * (kStages + stage); }
    __device__ __forceinline__ unsigned value_full(int stage) const { return barriers + 8 * (2 * kStages + stage); }
    __device__ __forceinline__ unsigned value_empty(int stage) const { return barriers + 8 * (3 * kStages + stage); }
    __device__ __forceinline__ unsigned query_full(int buffer) const { return barriers + 8 * (4 * kStages + buffer); }
    __device__ __forceinline__ unsigned query_empty(int buffer) const {
        return barriers + 8 * (4 * kStages + 2 + buffer);
    }
    __device__ __forceinline__ unsigned record_full(int buffer) const {
        return barriers + 8 * (4 * kStages + 4 + buffer);
    }
    __device__ __forceinline__ unsigned record(int round) const {
        return item + (round & (kItemSlots - 1)) * kRecordBytes;
    }
};

// --- items: (batch, head, block of rows), dealt to the blocks of the grid ----------------------------------

struct Item {
    int head;     // b * H + h
    int kv_head;  // b * Hkv + h / group
    int row;      // first query row
};

// Item of this block in its round-th turn; false when there is none. Under a causal mask the long rows come first,
// and the deal goes back and forth over the blocks, which evens out their sums.
__device__ __forceinline__ bool find_item(const AttentionParams& p, int round, Item& item) {
    const int all_heads = p.batches * p.heads;
    const int turn = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int index = round * static_cast<int>(gridDim.x) + turn;
    if (index >= all_heads * p.row_blocks) return false;
    int block;
    if (p.right != kUnbounded) {
        block = p.row_blocks - 1 - index / all_heads;
        item.head = index % all_heads;
    } else {
        item.head = index / p.row_blocks;
        block = index % p.row_blocks;
    }
    const int b = item.head / p.heads;
    item.kv_head = b * p.kv_heads + (item.head - b * p.heads) / (p.heads / p.kv_heads);
    item.row = block * kBlockRows;
    return true;
}

// Tiles of an item, never none: a block that sees no key takes one hidden tile, so that it writes its rows.
__device__ __forceinline__ void item_tiles(const AttentionParams& p, const Item& item, int& begin, int& end) {
    const int last = item.row + kBlockRows < p.queries ? item.row + kBlockRows : p.queries;
    const BlockRange range = block_range(p, item.row, last);
    begin = range.tile_begin < p.tiles ? range.tile_begin : p.tiles - 1;
    end = range.tile_end > begin ? range.tile_end : begin + 1;
}

// What the other warps need to know of an item, written by one thread of the producing warpgroup, so that the index
// arithmetic costs the consumers nothing. In shared memory: for each warpgroup the 16 bytes
//     {first tile, end of its tiles, first and end of the tiles that need no mask}      (end = 0: no item is left)
// then {first query row, b * H + h, b * Hkv + h / group, b} and the guard.
constexpr int kRecordItem = 16 * kConsumers;
constexpr int kRecordGuard = kRecordItem + 16;

__device__ __forceinline__ void produce_records(const AttentionParams& p, const SharedMap& map) {
    for (int round = 0;; ++round) {
        const int buffer = round & 1;
        barrier_wait(map.query_empty(buffer), (round >> 1 & 1) ^ 1);
        const unsigned record = map.record(round);
        Item item = {0, 0, 0};
        const bool more = find_item(p, round, item);
        int begin = 0, end = 0;
        if (more) {
            store_int4(record + kRecordItem, item.row, item.head, item.kv_head, item.head / p.heads);
            store_float(record + kRecordGuard, p.guard[item.kv_head]);
            item_tiles(p, item, begin, end);
        }
#pragma unroll 1
        for (int g = 0; g < kConsumers; ++g) {
            const int row = item.row + g * kGroupRows;
            const int plain_begin = (visible_keys(p, row + kGroupRows - 1).begin + kTileKeys - 1) / kTileKeys;
            store_int4(record + 16 * g, begin, end, plain_begin, visible_keys(p, row).end / kTileKeys);
        }
        barrier_arrive(map.record_full(buffer));
        if (!more) return;
    }
}

// Place in the ring of stages.
struct Ring {
    unsigned count = 0;  // tiles so far
    __device__ __forceinline__ void advance() { ++count; }
    __device__ __forceinline__ unsigned stage() const { return count % kStages; }
    __device__ __forceinline__ unsigned previous_stage() const { return (count - 1) % kStages; }
    __device__ __forceinline__ unsigned phase() const { return count / kStages & 1; }
};

// --- producers ----------------------------------------------------------------------------------------------

// Tiles of K and V, in the order in which the consumers take them; which ones, the records say.
__device__ __forceinline__ void produce_tiles(const AttentionParams& p, const SharedMap& map) {
    Ring ring;
    for (int round = 0;; ++round) {
        barrier_wait(map.record_full(round & 1), round >> 1 & 1);
        const int4 tiles = load_int4(map.record(round));
        if (tiles.y == 0) return;
        const int kv_head = load_int4(map.record(round) + kRecordItem).z;
        long long tile = static_cast<long long>(kv_head) * p.tiles + tiles.x;
        int count = tiles.y - tiles.x;
#pragma unroll 1
        for (; count > 0; --count, ++tile) {
            const unsigned key_full = map.key_full(ring.stage());
            barrier_wait(map.key_empty(ring.stage()), ring.phase() ^ 1);
            barrier_expect(key_full, kTileBytes + kAuxBytes);
            bulk_copy(map.key + ring.stage() * kTileBytes, p.k + tile * kTileBytes, kTileBytes, key_full);
            const unsigned aux = map.aux + ring.stage() * kAuxBytes;
            bulk_copy(aux, p.k_scale + tile * (kScaleBytes / 4), kScaleBytes, key_full);
            if (kFolded) bulk_copy(aux + kScaleBytes, p.v_fold + tile * (2 * kTileKeys), 8 * kTileKeys, key_full);
            const unsigned value_full = map.value_full(ring.stage());
            barrier_wait(map.value_empty(ring.stage()), ring.phase() ^ 1);
            barrier_expect(value_full, kTileBytes);
            bulk_copy(map.value + ring.stage() * kTileBytes, static_cast<const signed char*>(p.v) + tile * kTileBytes,
                      kTileBytes, value_full);
            ring.advance();
        }
    }
}

// Where the c-th 16 bytes of a block's rows of Q lie in shared memory.
__device__ __forceinline__ unsigned query_offset(int c) {
    const int row = c / (DP / 16);
    const int chunk = c % (DP / 16);
    const int r = row % kGroupRows;
    const unsigned offset = (row / kGroupRows) * (kGroupRows * DP) + r * kRowBytes;
    if (DP == 64) return offset + ((chunk ^ (r >> 1 & 3)) << 4);
    return offset + (chunk / 8) * (kGroupRows * 128) + ((chunk % 8 ^ (r & 7)) << 4);
}

// Negates 16 bytes of shared memory; none is -128.
__device__ __forceinline__ void negate16(unsigned address) {
    const int4 x = load_int4(address);
    store_int4(address, __vneg4(x.x), __vneg4(x.y), __vneg4(x.z), __vneg4(x.w));
}

// Q, its scales and those of V. Rows beyond Sq become zeros.
__device__ __forceinline__ void produce_queries(const AttentionParams& p, const SharedMap& map, int thread) {
    constexpr int chunks = DP / 16;  // 16-byte chunks of a row
    for (int round = 0;; ++round) {
        const int buffer = round & 1;
        barrier_wait(map.record_full(buffer), round >> 1 & 1);
        if (load_int4(map.record(round)).y == 0) {
            barrier_arrive(map.query_full(buffer));
            return;
        }
        const int4 item = load_int4(map.record(round) + kRecordItem);  // row, head, kv_head, batch
        const long long first = static_cast<long long>(item.y) * p.queries + item.x;
        const signed char* source = p.q + first * DP;
        const unsigned target = map.query + buffer * kQueryBytes;
        const int rows = p.queries - item.x;
#pragma unroll 1
        for (int c = thread; c < kBlockRows * chunks; c += kQueryLoaders) {
            const bool inside = c / chunks < rows;
            copy16_async(target + query_offset(c), inside ? source + c * 16 : p.q, inside);
        }
        const unsigned scales = map.query_scale + buffer * kBlockRows * 4;
#pragma unroll 1
        for (int row = thread; row < kBlockRows; row += kQueryLoaders) {
            const bool inside = row < rows;
            copy4_async(scales + row * 4, inside ? p.q_scale + first + row : p.q_scale, inside);
        }
        const float* v_scale = p.v_scale + static_cast<long long>(item.z) * DP;
#pragma unroll 1
        for (int channel = thread; channel < DP; channel += kQueryLoaders)
            copy4_async(map.value_scale + (round % kItemSlots * DP + channel) * 4, v_scale + channel, true);
        copies_wait();
        if (p.scale_log2 < 0.0f) {  // a negative softmax scale goes into Q, so that larger scores weigh more
#pragma unroll 1
            for (int c = thread; c < kBlockRows * chunks; c += kQueryLoaders) negate16(target + query_offset(c));
        }
        shared_store_fence();
        barrier_arrive(map.query_full(buffer));
    }
}

}  // namespace intfa
