// What surrounds the arithmetic of attention_wgmma.cu: a block's constants, its shared memory, the order in which it
// takes its work, and the warps that bring in data. The macros are described there.
#pragma once

#include "copy.cuh"
#include "mask.cuh"
#include "params.cuh"
#include "shared_memory.cuh"
#include "wgmma.cuh"

// Scores stay integers until the exponent when one scale covers all keys of a thread and V's scales are not added to
// them; else they become floats first.
#define RAW (K_SCALE == 1 && !V_FOLDED)
// Whether the products of a warp run beside its other work. It takes registers besides those of the scores. (With a
// running maximum the compiler has the products wait for each other.)
#define PIPELINED (P_TILE_MAX && DP == 64 && RAW && CONSUMERS < 4)

namespace intfa {

// --- shape of a block ---------------------------------------------------------------------------------------

constexpr unsigned kStages = STAGES;
static_assert((kStages & (kStages - 1)) == 0, "the number of stages is a power of two");
constexpr int kConsumers = CONSUMERS;     // warpgroups that compute
constexpr int kGroupRows = 64;            // query rows of each
constexpr int kBlockRows = kConsumers * kGroupRows;
constexpr int kThreads = 128 * (1 + kConsumers);
// A block starts with 65536 / kThreads registers a thread, in eights, and has no more in sum: 96 with five warpgroups,
// 128 with four, 168 with three.
constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
constexpr int kQueryLoaders = 64;         // threads that copy Q
constexpr int kConsumerRegisters = kConsumers == 4 ? 112 : kConsumers == 3 ? 160 : 232;

// --- what runs beside what: found by measurement ------------------------------------------------------------

constexpr bool kRaw = RAW;
constexpr bool kFolded = V_FOLDED;
constexpr bool kTileMax = P_TILE_MAX;
static_assert(kScaleGroup == 1, "RAW");
static_assert(K_SCALE == kScaleGroup || K_SCALE == kScaleToken, "K scale per token or per group");

// The exponentials run in blocks of block_words words of P (each of 4 keys of a row), row_words of the same row next to
// each other. A block's exponentials of a row start after a word of the row is packed, of the block `chain` before; left
// to itself the compiler puts most exponentials in one run, and all packing behind it.
struct Order {
    int row_words, block_words, chain;
};
constexpr Order order() {
    if (kFolded) {
        if (DP == 64) return {1, 2, MASKED ? 5 : 6};
        if (DP == 256) return {1, 2, MASKED ? 6 : 1};
        return {1, 2, K_SCALE == kScaleToken && !MASKED ? 3 : 1};
    }
    if (!kTileMax) return DP == 128 && !MASKED ? Order{1, 2, 3} : Order{2, 2, 3};
    if (!kRaw) return {1, 2, 6};
    if (DP == 256) return MASKED ? Order{1, 2, 2} : Order{2, 4, 4};
    if (DP == 128) return MASKED ? Order{2, 4, 3} : Order{4, 4, 3};
    return kConsumers == 4 ? Order{1, 4, 5} : Order{4, 4, 2};
}
constexpr Order kOrder = order();
static_assert(!kFolded || kOrder.row_words == 1, "the sum of P takes both rows of a key");
// The sum of P is taken while P V is under way, not before it is issued.
constexpr bool kSettleLate = PIPELINED ? kConsumers == 2 : !kTileMax || (kRaw && DP == 64);
// K and V of a tile come and go together: fewer instructions for the consumers. With two stages, K must go earlier.
constexpr bool kTogether = kStages > 2;
// Whether the next K (and V, if it comes alone) is there is looked up behind the exponentials, not before.
constexpr bool kTestLate = !PIPELINED && (kFolded ? DP > 64 : kTileMax ? DP == 256 && !MASKED : DP == 128);
// The sum of P is made by the tensor cores, not by dp4a.
constexpr bool kSumByProduct = DP == 128 || !kRaw;
// The scales of a tile are loaded before the scores are waited for, not after.
constexpr bool kScalesFirst = !kRaw || DP == 256;
// Fewer instructions for float16 results; at d = 64 the compiler made a slower loop of it.
constexpr bool kSaturateAtOnce = DP > 64;

static_assert(DP == 64 || DP == 128 || DP == 256, "head dimension is padded to 64, 128 or 256");
static_assert(kConsumers == 2 || (kConsumers == 3 && DP <= 128) || (kConsumers == 4 && DP == 64 && !MASKED),
              "what the registers allow");

// Whether the product of 64 channels takes half of the array that the scores were in, and P the place of scores that are
// done with.
constexpr bool kHalves = DP == 64 && !PIPELINED;
constexpr bool kInPlace = kConsumers == 4;
static_assert(!kInPlace || kOrder.row_words == 1, "a word of P has the place of a score that is done with");

// The shift that O and l of a row stand at that has seen nothing.
constexpr float kNowhere = 3.402823466e38f;

constexpr float kLevels = P_LEVELS;
static_assert(P_LEVELS == 255 || P_LEVELS == 127, "LEVELS");
// The exponent of a row's largest P.
constexpr float kLargest = P_LEVELS == 255 ? 7.99435343685886f : 6.98868468677217f;

constexpr int kTileBytes = kTileKeys * DP;             // of K and of V
constexpr int kQueryBytes = kBlockRows * DP;
constexpr int kScaleBytes = K_SCALE == kScaleGroup ? 16 : 4 * kTileKeys;
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
    unsigned query, key, value, aux, query_scale, value_scale, item, deal, barriers;
    __device__ __forceinline__ explicit SharedMap(unsigned base)
        : query(base),
          key(query + 2 * kQueryBytes),
          value(key + kStages * kTileBytes),
          aux(value + kStages * kTileBytes),
          query_scale(aux + kStages * kAuxBytes),
          value_scale(query_scale + 2 * kBlockRows * 4),
          item(value_scale + kItemSlots * DP * 4),
          deal(item + kItemSlots * kRecordBytes),
          barriers(deal + 32) {}
    // stage: of a Ring, 8 bytes each
    __device__ __forceinline__ unsigned key_full(unsigned stage) const { return barriers + stage; }
    __device__ __forceinline__ unsigned key_empty(unsigned stage) const { return barriers + 8 * kStages + stage; }
    __device__ __forceinline__ unsigned value_full(unsigned stage) const {
        return kTogether ? key_full(stage) : barriers + 16 * kStages + stage;
    }
    __device__ __forceinline__ unsigned value_empty(unsigned stage) const {
        return kTogether ? key_empty(stage) : barriers + 24 * kStages + stage;
    }
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

// --- items: up to kConsumers neighbouring groups of 64 rows of a head, dealt to the blocks of the grid ------

struct Item {
    int head;    // b * H + h
    int row;     // first query row
    int groups;  // of 64 rows; the warpgroups beyond have nothing to do
};

__device__ __forceinline__ int divide_up(int x, int y) { return (x + y - 1) / y; }

// How items are dealt, in shared memory. The deal goes back and forth over the blocks.
//
// With a causal mask the long rows come first, which evens out the sums; what a head has too few groups for is its
// first, shortest rows. Without, all full items take the same time: as many as make whole rounds come first, and the
// rest is cut so small, if that is possible, that one more round takes it. Left are then the next head from some group
// on, all later heads, and the ends of the heads before: {whole, head, group, size} and the items {of the head, of a
// later one, of all later ones, of an end}.
__device__ __forceinline__ void plan_deal(const AttentionParams& p, const SharedMap& map) {
    const int heads = p.batches * p.heads;
    const int groups = p.row_blocks;
    const int blocks = static_cast<int>(gridDim.x);
    const int full = groups / kConsumers;  // full items of a head
    const int whole = heads * full / blocks * blocks;
    const int head = full > 0 ? whole / full : 0;
    const int group = full > 0 ? whole % full * kConsumers : 0;
    for (int size = 1;; ++size) {
        const int first = head < heads ? divide_up(groups - group, size) : 0;
        const int later = divide_up(groups, size);
        const int all_later = head < heads ? (heads - head - 1) * later : 0;
        const int end = divide_up(groups % kConsumers, size);
        if (size < kConsumers && first + all_later + head * end > blocks) continue;
        store_int4(map.deal, whole, head, group, size);
        store_int4(map.deal + 16, first, later, all_later, end);
        return;
    }
}

// Item of this block in its round-th turn; false when there is none.
__device__ __forceinline__ bool find_item(const AttentionParams& p, const SharedMap& map, int round, Item& item) {
    const int groups = p.row_blocks;
    const int blocks = static_cast<int>(gridDim.x);
    int index = round * blocks + static_cast<int>(round & 1 ? blocks - 1 - blockIdx.x : blockIdx.x);
    int first, end;  // groups
    if (p.right != kUnbounded) {
        const int heads = p.batches * p.heads;
        item.head = index % heads;
        end = groups - index / heads * kConsumers;
        first = max(end - kConsumers, 0);
        if (end <= 0) return false;
    } else {
        const int4 plan = load_int4(map.deal);
        int size = kConsumers;
        if (index < plan.x) {
            item.head = index / (groups / kConsumers);
            first = index % (groups / kConsumers) * kConsumers;
        } else {
            const int4 items = load_int4(map.deal + 16);
            index -= plan.x;
            size = plan.w;
            if (index < items.x) {
                item.head = plan.y;
                first = plan.z + index * size;
            } else if ((index -= items.x) < items.z) {
                item.head = plan.y + 1 + index / items.y;
                first = index % items.y * size;
            } else {
                index -= items.z;
                if (index >= plan.y * items.w) return false;
                item.head = index / items.w;
                first = groups / kConsumers * kConsumers + index % items.w * size;
            }
        }
        end = min(first + size, groups);
    }
    item.row = first * kGroupRows;
    item.groups = end - first;
    return true;
}

// Tiles of an item, never none: an item that sees no key takes one hidden tile, so that its rows are written.
__device__ __forceinline__ void item_tiles(const AttentionParams& p, const Item& item, int& begin, int& end) {
    const int last = min(item.row + item.groups * kGroupRows, p.queries);
    const BlockRange range = block_range(p, item.row, last);
    begin = range.tile_begin < p.tiles ? range.tile_begin : p.tiles - 1;
    end = range.tile_end > begin ? range.tile_end : begin + 1;
}

// What the other warps need to know of an item, written by one thread of the producing warpgroup, so that the index
// arithmetic costs the consumers nothing. In shared memory: for each warpgroup the 16 bytes
//     {first tile, end of its tiles, first and end of the tiles that need no mask}      (end = 0: no item is left)
// with ~first where the warpgroup has no rows,
// then {first query row, b * H + h, b * Hkv + h / group, b}, the guard, and the number of warpgroups with rows.
constexpr int kRecordItem = 16 * kConsumers;
constexpr int kRecordGuard = kRecordItem + 16;

__device__ __forceinline__ void produce_records(const AttentionParams& p, const SharedMap& map) {
    for (int round = 0;; ++round) {
        const int buffer = round & 1;
        barrier_wait(map.query_empty(buffer), (round >> 1 & 1) ^ 1);
        const unsigned record = map.record(round);
        Item item = {0, 0, 0};
        const bool more = find_item(p, map, round, item);
        const int batch = item.head / p.heads;
        const int kv_head = batch * p.kv_heads + item.head % p.heads / (p.heads / p.kv_heads);
        store_int4(record + kRecordItem, item.row, item.head, kv_head, batch);
        store_int4(record + kRecordGuard, __float_as_int(p.guard[kv_head]), item.groups, 0, 0);
        int begin = 0, end = 0;
        if (more) item_tiles(p, item, begin, end);
#pragma unroll 1
        for (int g = 0; g < kConsumers; ++g) {
            const int row = load_int4(record + kRecordItem).x + g * kGroupRows;  // registers are short
            const bool idle = g >= load_int4(record + kRecordGuard).y;
            const int plain_begin = (visible_keys(p, row + kGroupRows - 1).begin + kTileKeys - 1) / kTileKeys;
            store_int4(record + 16 * g, idle ? ~begin : begin, end, plain_begin, visible_keys(p, row).end / kTileKeys);
        }
        barrier_arrive(map.record_full(buffer));
        if (!more) return;
    }
}

// Place in the ring of stages, in steps of the 8 bytes of a barrier, for few instructions.
struct Ring {
    unsigned count = 0;  // 8 times the tiles so far, or since turn_back()
    __device__ __forceinline__ void advance() { count += 8; }
    // To the same place, but two or three rounds from the start: so the count never comes to 0 again.
    __device__ __forceinline__ void turn_back() { count = count % (16 * kStages) + 16 * kStages; }
    __device__ __forceinline__ unsigned stage() const { return count % (8 * kStages); }
    __device__ __forceinline__ unsigned previous_stage() const { return (count - 8) % (8 * kStages); }
    __device__ __forceinline__ unsigned phase() const { return count / (8 * kStages) & 1; }
};

// Of what lies in shared memory once for each stage.
__device__ __forceinline__ unsigned stage_offset(unsigned stage, int bytes) { return stage * (bytes / 8); }

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
            barrier_expect(key_full, kTileBytes + kAuxBytes + (kTogether ? kTileBytes : 0));
            bulk_copy(map.key + stage_offset(ring.stage(), kTileBytes), p.k + tile * kTileBytes, kTileBytes, key_full);
            const unsigned aux = map.aux + stage_offset(ring.stage(), kAuxBytes);
            bulk_copy(aux, p.k_scale + tile * (kScaleBytes / 4), kScaleBytes, key_full);
            if (kFolded) bulk_copy(aux + kScaleBytes, p.v_fold + tile * (2 * kTileKeys), 8 * kTileKeys, key_full);
            const unsigned value_full = map.value_full(ring.stage());
            if (!kTogether) {
                barrier_wait(map.value_empty(ring.stage()), ring.phase() ^ 1);
                barrier_expect(value_full, kTileBytes);
            }
            bulk_copy(map.value + stage_offset(ring.stage(), kTileBytes),
                      static_cast<const signed char*>(p.v) + tile * kTileBytes, kTileBytes, value_full);
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

// Where the scale of a block's row lies, so that a thread finds those of its two rows by few instructions: of a
// warpgroup, first the rows that are the first of a thread.
__device__ __forceinline__ unsigned query_scale_place(int row) {
    const int group = row / kGroupRows, r = row % kGroupRows;
    return 4 * (group * kGroupRows + r / 8 % 2 * 32 + r / 16 * 8 + r % 8);
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
        const int rows = min(p.queries - item.x, load_int4(map.record(round) + kRecordGuard).y * kGroupRows);
#pragma unroll 1
        for (int c = thread; c < kBlockRows * chunks; c += kQueryLoaders) {
            const bool inside = c / chunks < rows;
            copy16_async(target + query_offset(c), inside ? source + c * 16 : p.q, inside);
        }
        const unsigned scales = map.query_scale + buffer * kBlockRows * 4;
#pragma unroll 1
        for (int row = thread; row < kBlockRows; row += kQueryLoaders)
            store_float(scales + query_scale_place(row),
                        row < rows ? p.q_scale[first + row] * fabsf(p.scale_log2) : 0.0f);
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
