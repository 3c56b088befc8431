// Attention forward on mma.sync, everything in registers: Ampere, Ada and later.
//
// Per query row i and tile t of 128 keys, exponents to base 2:
//
//     S   = q . k                                      int32, exact (floating formats: float32)
//     x   = S * q_scale * k_scale * scale * log2(e)    V folded: + log2 of the key's V scale
//     m_t = max of x over the visible keys of the tile
//     P   = round(LEVELS * 2^(x - m_t))                unsigned bytes, against the tile's own maximum
//     O  += (P (v + 128)) * 2^(m_t - m_ref)            int32 product of one tile, exact; float accumulator
//     c  += sum(P) * 2^(m_t - m_ref)
//     l  += sum(P) * 2^(m_t - m_ref)                   V folded: LEVELS * sum(2^(x - m_t) / V scale) instead
//     out = (O - 128 c) * v_scale / l
//
// V is stored as v + 128, so that products are not negative: an integer below 2^24 is, read as the bits of a float,
// 2^-149 times itself (the subnormals and the first normals), and joins O without a conversion. Floating P and V are
// multiplied as they are, and added to O at once.
//
// m_ref is the maximum of the row's first visible tile and moves, O, c and l with it, only when a tile exceeds it by
// more than 60. With kRunning P stands against m_ref itself, which then follows the running maximum: the online softmax.
//
// A warp owns 16 query rows and all keys; Q, S, P and O are register fragments. Lane 4r+q of a score
// fragment holds keys 8i+2q, 8i+2q+1 of rows r and r+8. A 16-bit operand of the second product wants just these; an
// 8-bit one wants four neighbours 4q..4q+3, and the quantiser stores V's keys in the order that makes them coincide
// (packing.py). So P never moves between lanes.
//
// Within a tile a warp takes the maxima beside Q K^T, fragment by fragment, and P V beside the exponentials, 32 keys at
// a time. The rest of the waiting is left to the other warps of the SM: more warps beat more work per warp.
//
// The warps of a block share tiles of K and V, which arrive as they lie in global memory: the quantiser swizzled them
// for conflict-free ldmatrix. With two buffers, tile t+1 is fetched from the softmax of tile t on. With one, the least
// memory, V of tile t arrives during its Q K^T, and K of tile t+1 during the softmax and P V of tile t.
// All threads copy by cp.async, 16 bytes each at a time, and block barriers say when a buffer is full and when it is
// free. From sm_90 on one thread has whole tiles copied; barriers in shared memory say the same, and no warp waits for
// the others, but for the one with that thread, which finds that they have long left the buffer. Of 16-bit V, which is
// swizzled on its way, that holds for K alone.
//
// Shared memory (dynamic, SMEM bytes): K buffers, V buffers, two buffers of scales, Q if it does not stay in registers,
// scores and scales of Q's groups for which there are no registers, what the loop seldom needs, barriers.
//
// Formats. Q: plain rows of Dp elements. K: tiles of 128 keys, rows of Dp elements in slabs of up to 128 bytes,
// swizzled. V: 8-bit: transposed tiles, swizzled; 16-bit: plain rows of Dp elements. 4-bit rows: byte c of each 16
// holds channels c (low nibble) and 16 + c (high) of a group of 32.

#include "mask.cuh"
#include "mma.cuh"
#include "output.cuh"
#include "params.cuh"
#include "softmax.cuh"

namespace intfa {

// --- the tile and the recipe, given by tiles.py ------------------------------------------------------------------

constexpr int Dp = INTFA_DP;
constexpr int kWarps = INTFA_WARPS;
constexpr int kBuffers = INTFA_BUFFERS;                  // of K and of V
constexpr int kBeside = INTFA_BESIDE;                    // 16-channel blocks of integer P V beside the exponentials
constexpr bool kQueryInRegisters = INTFA_QUERY_IN_REGISTERS;
constexpr int kQueryFormat = INTFA_Q_FORMAT;
constexpr int kKeyFormat = INTFA_K_FORMAT;
constexpr int kValueFormat = INTFA_V_FORMAT;             // of P, too: kInt8 means unsigned bytes for P
constexpr int kLevels = INTFA_P_LEVELS;                  // what the probability 1 is stored as
constexpr bool kRunning = INTFA_P_RUNNING;
constexpr int kKeyScale = INTFA_K_SCALE;
constexpr bool kQueryChannelScale = INTFA_Q_CHANNEL_SCALE;  // Q has a scale per token and 32 channels (4-bit Q)
constexpr bool kFolded = INTFA_V_FOLDED;
constexpr int kStash = INTFA_STASH;                      // fragments of 8 keys whose scores wait in shared memory
// What takes fewer registers and overlaps less, a sum of 1: loads of Q K^T stay in their block, 2: those of P V, too;
// 4: addresses of K are worked out anew for each tile, 8: those of V.
constexpr int kFence = INTFA_FENCE;
// The caller knows that every row sees every key and that Sk is a multiple of 128 (0), or not (1).
constexpr bool kMasked = INTFA_MASKED;
// The caller knows that D = Dp, that channels of out are neighbours, and that its rows start at multiples of 16 bytes.
constexpr bool kOutPairs = INTFA_OUT_PAIRS;
using Out = Element<INTFA_OUT>;

constexpr int kRows = kWarps * 16;
constexpr int kThreads = kWarps * 32;

// What a score is before it is scaled.
constexpr bool kInteger = kKeyFormat == kInt8 || kKeyFormat == kInt4;
constexpr bool kGrouped = kKeyScale == kScaleChannel;    // summed in float over groups of 32 channels
// One scale covers all keys of a thread: scores stay integers until the exponent, unless V's scales are added to them.
constexpr bool kShared = kInteger && (kKeyScale == kScaleGroup || kKeyScale == kScaleTile);
constexpr bool kRaw = kShared && !kFolded;
// Integer scores start at kIntegerMagic, or have it added at the end: where they start takes registers.
constexpr bool kMagic = Dp < 256;
constexpr bool kTokenScale = kKeyScale == kScaleToken;
constexpr bool kIntegerP = kValueFormat == kInt8;
constexpr bool kWideV = kValueFormat == kHalf || kValueFormat == kBrain;
// l sums the rounded P where V's scale is not folded: bytes are counted, of 16 bits the product has one more column.
constexpr bool kCountedSum = kIntegerP && !kFolded;
constexpr bool kProductSum = kWideV;

// Running maximum: m_ref may lag behind by as much as costs 16-bit P no precision.
constexpr float kSlack = kRunning ? (kWideV ? 8.0f : 0.0f) : kReferenceSlack;
constexpr double log2_of(double x) {
    double log = 0.0;
    for (; x >= 2.0; x /= 2.0) log += 1.0;
    for (double bit = 0.5; bit > 1e-9; bit /= 2.0) {
        x *= x;
        if (x >= 2.0) {
            x /= 2.0;
            log += bit;
        }
    }
    return log;
}

// Where no instruction rounds to bytes, an integer P is worked out in units of the smallest float16, 2^-24: the bits of
// the float16 are then the integer, and it is rounded once.
constexpr bool kSubnormalP = kIntegerP && !kRoundsBytes;
constexpr float kUnit = kSubnormalP ? 0x1p-24f : 1.0f;
constexpr float kLargest = static_cast<float>(log2_of(kLevels) - (kSubnormalP ? 24 : 0));  // the largest's exponent

static_assert(Dp == 64 || Dp == 128 || Dp == 256, "the head dimension is padded to 64, 128 or 256");
static_assert(kLevels >= 1 && (kLevels <= 255 || !kIntegerP), "levels of P: what its format holds");
static_assert(log2_of(255) > 7.9943534 && log2_of(255) < 7.9943535 && log2_of(256) == 8, "the logarithm");
static_assert(kInteger == (kQueryFormat == kInt8 || kQueryFormat == kInt4), "Q and K: both integers or both not");
static_assert(kInteger || kQueryFormat == kKeyFormat, "floating Q and K have one format");
static_assert(kInteger || kKeyScale == kScaleHead, "floating K has one scale per head");
static_assert(!kGrouped || kInteger, "floating K has no scales per group of channels");
static_assert(kGrouped || !kQueryChannelScale, "scales per group of channels: Q only where K has them");
static_assert(kIntegerP || (kRunning && !kFolded), "floating P is taken against the running maximum");
static_assert(kBuffers == 1 || kBuffers == 2, "buffers");
static_assert(kStash >= 0 && kStash <= 16 && kStash % 2 == 0, "pairs of the 16 fragments");
static_assert(kBeside >= 0 && kBeside <= Dp / 16, "no more channels than there are");

constexpr int kQueryBits = kQueryFormat == kInt4 ? 8 : format_bits(kQueryFormat);  // in registers
constexpr int kSteps = Dp * kQueryBits / 256;                    // of the first product, 32 bytes deep each
constexpr int kQueryRowBytes = Dp * format_bits(kQueryFormat) / 8;
constexpr int kKeyRowBytes = Dp * format_bits(kKeyFormat) / 8;
constexpr int kKeyWidth = kKeyRowBytes < 128 ? kKeyRowBytes : 128;  // of a row in a slab
constexpr int kKeyBytes = kTileKeys * kKeyRowBytes;              // of a tile
constexpr int kValueBytes = kTileKeys * Dp * format_bits(kValueFormat) / 8;
constexpr int kGroups = Dp / 32;                                 // of channels
// Whether registers are so short that the loop keeps nothing in them that it can read again.
constexpr bool kShort = Dp == 256   ? kIntegerP || kQueryChannelScale
                        : Dp == 128 ? kFolded || kKeyFormat == kE4M3 || kKeyFormat == kE5M2
                                    : false;
constexpr int kScaleBytes = kTokenScale ? 4 * kTileKeys : kGrouped ? 4 * kTileKeys * kGroups : 0;  // of a tile
constexpr bool kGroupsInShared = kQueryChannelScale && Dp > 64;  // scales of Q's groups of channels
constexpr int kAuxBytes = kScaleBytes + (kFolded ? 8 * kTileKeys : 0);

// Where tiles can be copied whole (kBulkCopies), one thread does it, and a barrier in shared memory says when one is
// there. Is V copied so, too?
constexpr bool kBulk = kBulkCopies && !kWideV;

struct Map {
    static constexpr int key = 0;
    static constexpr int value = key + kBuffers * kKeyBytes;
    static constexpr int aux = value + kBuffers * kValueBytes;
    static constexpr int query = aux + 2 * kAuxBytes;
    static constexpr int stash = query + (kQueryInRegisters ? 0 : kRows * Dp * kQueryBits / 8);
    static constexpr int groups = stash + kStash * kThreads * 16;
    static constexpr int seldom = groups + (kGroupsInShared ? kThreads * kGroups * 8 : 0);
    // kBulk: two barriers each. Two buffers: of K and V in the same one; one: of K, of V.
    static constexpr int full = seldom + 32;
    static constexpr int empty = full + 8 * 2;
    static constexpr int total = empty + 8 * 2;
};
static_assert(Map::total == INTFA_SMEM, "tiles.py and this file disagree on shared memory");

// --- the block's part --------------------------------------------------------------------------------------------

struct Item {
    int head;     // b * H + h
    int kv_head;  // b * Hkv + h / group
    int row;      // first of the block

    // Neighbouring blocks share a head. Under a causal mask the last rows take longest and must come first, over a
    // section of heads: as many as the L2 cache holds keys and values of.
    __device__ __forceinline__ Item(const AttentionParams& p, int block) {
        const int group = p.heads / p.kv_heads;
        const int all_heads = p.batches * p.heads;
        int block_row;
        if (!kMasked || p.right == kUnbounded) {
            head = block / p.row_blocks;
            block_row = block - head * p.row_blocks;
        } else {
            constexpr int64 cache = 24 << 20;
            const int64 fit = cache / (static_cast<int64>(p.tiles) * (kKeyBytes + kValueBytes));
            const int section = static_cast<int>(max(int64{1}, min(fit, static_cast<int64>(all_heads)))) * group;
            const int first = block / (section * static_cast<int64>(p.row_blocks)) * section;
            const int rest = block - first * p.row_blocks;
            const int heads = min(section, all_heads - first);
            block_row = rest / heads;
            head = first + rest - block_row * heads;
            block_row = p.row_blocks - 1 - block_row;
        }
        row = block_row * kRows;
        kv_head = head / group;
    }
};

// --- copies ------------------------------------------------------------------------------------------------------

// For large heads registers are short, and the thread's number is read again for every tile.
__device__ __forceinline__ uint32 thread_of() { return Dp == 256 ? thread_now() : threadIdx.x; }

template <int bytes>
__device__ __forceinline__ void copy_linear(uint32 shared, const void* global) {
    static_assert(bytes % 16 == 0, "copies are 16 bytes wide");
    const uint32 thread = thread_of();
    const char* const source = static_cast<const char*>(global) + thread * 16;
    const uint32 target = shared + thread * 16;
#pragma unroll
    for (int i = 0; i < bytes / 16; i += kThreads)
        if (i + kThreads <= bytes / 16 || thread < bytes / 16 - i)
            copy16_async(target + i * 16, source + i * 16);
}

// Plain rows of 16-bit V into slabs of 64 channels, 128 keys of 128 bytes each, swizzled.
__device__ __forceinline__ void copy_wide_value(uint32 shared, const void* global) {
    constexpr int chunks = Dp / 8;           // of 16 bytes per row
    constexpr int rows = kThreads / chunks;  // at a time
    static_assert(rows % 4 == 0 && kTileKeys % rows == 0, "all threads copy, and see two swizzles at most");
    const uint32 thread = thread_of();
    const uint32 row = thread / chunks;
    const uint32 chunk = thread % chunks;
    const char* const source = static_cast<const char*>(global) + thread * 16;
    const uint32 target = shared + chunk / 8 * (kTileKeys * 128) + row * 128 + ((chunk % 8 ^ row % 8) << 4);
#pragma unroll
    for (int i = 0; i < kTileKeys / rows; ++i)
        copy16_async((target ^ i * rows % 8 << 4) + i * (rows * 128), source + i * (kThreads * 16));
}

// The tiles of the block, and who may read and write their buffers when.
struct Tiles {
    const AttentionParams& p;
    uint32 shared;
    int first;  // index of the head's first tile
    int begin;
    int end;

    // Where registers are short, these numbers are read again for every tile.
    __device__ __forceinline__ Tiles recalled() const {
        if (!kShort) return *this;
        const int4 x = load_int4(shared + Map::seldom + 16);
        return {p, shared, x.x, x.y, x.z};
    }

    // K's scale of the thread's keys, where they share one.
    __device__ __forceinline__ float scale_of(int tile) const {
        const int64 index = first + tile;
        if (kKeyScale == kScaleGroup) return p.k_scale[index * 4 + thread_of() % 4];
        if (kKeyScale == kScaleTile) return p.k_scale[index];
        return 1.0f;
    }

    // Buffers of a tile's K and V; the scales of its softmax have two in any case.
    __device__ __forceinline__ int parity_of(int tile) const {
        return kShort && !kBulk ? tile & 1 : (tile - begin) % 2;
    }
    __device__ __forceinline__ int buffer_of(int tile) const { return kBuffers == 2 ? parity_of(tile) : 0; }

    __device__ __forceinline__ void start() const {
        if constexpr (kBulkCopies) {
            if (threadIdx.x == 0) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    barrier_init(shared + Map::full + 8 * i, 1);
                    barrier_init(shared + Map::empty + 8 * i, kWarps);
                }
                barrier_init_fence();
            }
            __syncthreads();
        } else if (begin >= end) {
            __syncthreads();  // else the loop has one between what the beginning writes and the end reads
        }
        if (begin >= end) return;
        if (!kBulk || threadIdx.x == 0) {
            if (kBulk || !kBulkCopies || threadIdx.x == 0) copy_key(begin);
            if (kBuffers == 2) copy_value(begin);
        }
        if (!kBulk) copy_commit();
    }

    // Return when K of the tile is here; with two buffers V, too.
    __device__ __forceinline__ void await_key(int tile) const {
        if constexpr (kBulk) {
            if (kBuffers == 1 && threadIdx.x == 0) {
                if (tile > begin) barrier_wait(shared + Map::empty + 8, (tile - 1 - begin) % 2);
                copy_value(tile);
            }
            barrier_wait(shared + Map::full + 8 * buffer_of(tile), (tile - begin) / kBuffers % 2);
        } else {
            copy_wait();
            __syncthreads();  // and nobody reads the tile before
            if (kBulkCopies) barrier_wait(shared + Map::full + 8 * buffer_of(tile), (tile - begin) / kBuffers % 2);
            if (kBuffers == 1) {
                copy_value(tile);
                copy_commit();
            }
        }
    }

    // The warp has read K.
    __device__ __forceinline__ void leave_key() const {
        if (kBuffers == 2) return;
        if constexpr (kBulk)
            leave(0);
        else
            __syncthreads();
    }

    // What the next tile needs and there is room for.
    __device__ __forceinline__ void copy_next(int tile) const {
        if (tile + 1 < end && (!kBulk || threadIdx.x == 0)) {
            if (kBulk && kBuffers == 1) barrier_wait(shared + Map::empty, (tile - begin) % 2);
            if (kBulk && kBuffers == 2 && tile > begin)
                barrier_wait(shared + Map::empty + 8 * buffer_of(tile + 1), (tile - 1 - begin) / 2 % 2);
            if (kBulk || !kBulkCopies || threadIdx.x == 0) copy_key(tile + 1);
            if (kBuffers == 2) copy_value(tile + 1);
        }
        if (!kBulk) copy_commit();
    }

    // Return when V of the tile is here.
    __device__ __forceinline__ void await_value(int tile) const {
        if (kBuffers == 2) return;
        if constexpr (kBulk) {
            barrier_wait(shared + Map::full + 8, (tile - begin) % 2);
        } else {
            copy_wait_groups<1>();
            __syncthreads();
        }
    }

    // The warp has read V.
    __device__ __forceinline__ void leave_value(int tile) const {
        if constexpr (kBulk) leave(kBuffers == 2 ? buffer_of(tile) : 1);
    }

private:
    __device__ __forceinline__ void leave(int buffer) const {
        __syncwarp();
        if (thread_of() % 32 == 0) barrier_arrive(shared + Map::empty + 8 * buffer);
    }

    // K of a tile and the scales of its softmax.
    __device__ __forceinline__ void copy_key(int tile) const {
        const int64 index = first + tile;
        const uint32 target = shared + Map::key + buffer_of(tile) * kKeyBytes;
        const uint32 aux = shared + Map::aux + parity_of(tile) * kAuxBytes;
        const char* const scale = reinterpret_cast<const char*>(p.k_scale) + index * kScaleBytes;
        const char* const fold = reinterpret_cast<const char*>(p.v_fold) + index * (8 * kTileKeys);
        if constexpr (kBulkCopies) {
            const uint32 full = shared + Map::full + 8 * buffer_of(tile);
            barrier_expect(full, kKeyBytes + kAuxBytes + (kBulk && kBuffers == 2 ? kValueBytes : 0));
            bulk_copy(target, p.k + index * kKeyBytes, kKeyBytes, full);
            if (kScaleBytes > 0) bulk_copy(aux, scale, kScaleBytes, full);
            if (kFolded) bulk_copy(aux + kScaleBytes, fold, 8 * kTileKeys, full);
        } else {
            copy_linear<kKeyBytes>(target, reinterpret_cast<const char*>(p.k) + index * kKeyBytes);
            if constexpr (kScaleBytes > 0) copy_linear<kScaleBytes>(aux, scale);
            if constexpr (kFolded) copy_linear<8 * kTileKeys>(aux + kScaleBytes, fold);
        }
    }

    __device__ __forceinline__ void copy_value(int tile) const {
        const char* const source = static_cast<const char*>(p.v) + static_cast<int64>(first + tile) * kValueBytes;
        const uint32 target = shared + Map::value + buffer_of(tile) * kValueBytes;
        if constexpr (kBulk) {
            const uint32 full = shared + Map::full + 8 * (kBuffers == 2 ? buffer_of(tile) : 1);
            if (kBuffers == 1) barrier_expect(full, kValueBytes);
            bulk_copy(target, source, kValueBytes, full);
        } else if constexpr (kWideV) {
            copy_wide_value(target, source);
        } else {
            copy_linear<kValueBytes>(target, source);
        }
    }
};

// Loads from shared memory do not move over it.
template <int which>
__device__ __forceinline__ void fence() {
    if (kFence & which) __syncwarp();
}

// Nothing that follows from the address is known before.
template <int which>
__device__ __forceinline__ void fence_address(uint32& address) {
    if (kFence & which) forget(address);
}

// --- small arithmetic ----------------------------------------------------------------------------------------------

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 1);
    return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// --- a warp --------------------------------------------------------------------------------------------------------

// kFloatMagic plus an integer score, as bits; and its value.
__device__ __forceinline__ int magic_of(int x) { return kMagic ? x : x + kIntegerMagic; }
__device__ __forceinline__ float score_of(int x) { return __int_as_float(magic_of(x)) - kFloatMagic; }

struct Warp {
    const AttentionParams& p;
    uint32 shared;
    uint32 key_lane, value_lane;  // this lane's part of ldmatrix addresses
    uint32 query;                 // this lane's part of Q in shared memory
    uint32 aux_lane;              // the same of scales
    int start[4];                 // where integer scores start

    uint32 q[kQueryInRegisters ? kSteps : 1][4];
    float q_group[2][kQueryChannelScale && !kGroupsInShared ? kGroups : 1];
    float q_scale[2];         // of the exponent; positive
    int s[16][4];             // scores: integers or bits of floats
    int top[2];               // largest of them
    uint32 prob[kWideV ? 32 : 16];
    float o[Dp / 8][4];       // integer P: in units of kUnitOfO
    float reference[2];
    float l[2];               // kProductSum: the whole sum, else this lane's share; kCountedSum: in units of kUnitOfO
    float count[2];           // V folded: this lane's share of c, in units of kUnitOfO; c is l elsewhere
    float maximum[2];         // of the tile; -inf where the row sees nothing of it
    bool higher;                  // than some row's reference may be
    float factor[2];          // from the tile's product to O and its unit

    __device__ __forceinline__ Warp(const AttentionParams& p_, uint32 shared_, const Item& item)
        : p(p_), shared(shared_) {
        const int lane = threadIdx.x % 32;
        const int warp = threadIdx.x / 32;
        // Lane l of ldmatrix gives row l % 8 of matrix l / 8. Keys and V^T: matrices 0, 1 are two neighbouring 16-byte
        // chunks of eight rows, 2, 3 the same of the next eight rows. 16-bit V, transposed: the rows of 0, 1 are keys
        // 0..7 and 8..15, and 2, 3 are the next chunk.
        const int row = lane / 16 * 8 + lane % 8;
        const int chunk = lane / 8 % 2;
        const int swizzle = kKeyWidth == 128 ? lane % 8 : kKeyWidth == 64 ? lane % 8 / 2 : lane % 8 / 4;
        key_lane = shared + Map::key + row * kKeyWidth + ((chunk ^ swizzle) << 4);
        if (kWideV)
            value_lane = shared + Map::value + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
        else
            value_lane = shared + Map::value + row * 128 + ((chunk ^ lane % 8) << 4);
        aux_lane = shared + Map::aux + lane % 4 * 8;
        if (Dp < 256) {
            key_lane = kept(key_lane);
            value_lane = kept(value_lane);
        }
        query = shared + Map::query + (warp * kSteps * 32 + lane) * 16;

#pragma unroll
        for (int i = 0; i < 4; ++i) start[i] = kMagic ? kIntegerMagic : 0;
        load_query(item);
#pragma unroll
        for (int n = 0; n < Dp / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[n][i] = 0.0f;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            reference[h] = -infinity();
            l[h] = 0.0f;
            count[h] = 0.0f;
        }
    }

    // What only this lane reads again, in shared memory: scales of Q's groups, scores.
    __device__ __forceinline__ uint32 groups_of(int g) const {
        return shared + Map::groups + g * (kThreads * 8) + thread_now() * 8;
    }
    __device__ __forceinline__ uint32 stash_of(int n) const {
        return shared + Map::stash + n * (kThreads * 16) + thread_now() * 16;
    }

    // Row h (0: r, 1: r + 8) of the thread's fragment.
    static __device__ __forceinline__ int row_of(int block_row, int thread, int h) {
        return block_row + thread / 32 * 16 + thread % 32 / 4 + 8 * h;
    }

    // Fragments and scales of the warp's rows; zero beyond Sq. A negative softmax scale goes into Q, so that larger
    // scores are larger exponents. A scale that is zero, or not a number, becomes tiny: -inf times it stays -inf.
    __device__ __forceinline__ void load_query(const Item& item) {
        const bool negative = p.scale_log2 < 0.0f;
        const float head_scale = kKeyScale == kScaleHead ? p.k_scale[item.kv_head] : 1.0f;
        uint32 x[kSteps][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = row_of(item.row, threadIdx.x, h);
            const bool inside = row < p.queries;
            const int64 index = static_cast<int64>(item.head) * p.queries + row;
            const char* const source =
                reinterpret_cast<const char*>(p.q) + index * kQueryRowBytes + 4 * (threadIdx.x % 4);
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                if (kQueryFormat == kInt4) {
                    const uint32 word = inside ? *reinterpret_cast<const uint32*>(source + 16 * k) : 0;
                    x[k][h] = low_nibbles(word);
                    x[k][h + 2] = high_nibbles(word);
                } else {
                    x[k][h] = inside ? *reinterpret_cast<const uint32*>(source + 32 * k) : 0;
                    x[k][h + 2] = inside ? *reinterpret_cast<const uint32*>(source + 32 * k + 16) : 0;
                }
            }
            float scale = fabsf(p.scale_log2) * head_scale;
            if (kQueryChannelScale) {
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    const float x = inside ? p.q_scale[index * kGroups + g] * nibble_scale() : 0.0f;
                    if (kGroupsInShared)
                        store_float(groups_of(g) + 4 * h, x);
                    else
                        q_group[h][kQueryChannelScale && !kGroupsInShared ? g : 0] = x;
                }
            } else {
                scale *= inside ? p.q_scale[index] * nibble_scale() : 0.0f;
            }
            q_scale[h] = fmaxf(scale, 1e-37f);
        }
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (negative) x[k][i] = negate<kQueryFormat>(x[k][i]);
            if (kQueryInRegisters) {
#pragma unroll
                for (int i = 0; i < 4; ++i) q[kQueryInRegisters ? k : 0][i] = x[k][i];
            } else {
                store_int4(query + k * 512, x[k][0], x[k][1], x[k][2], x[k][3]);  // only this lane reads it
            }
        }
    }

    // 4-bit numbers are unpacked to 16 times their value.
    static constexpr __device__ float nibble_scale() {
        return (kQueryFormat == kInt4 ? 0.0625f : 1.0f) * (kKeyFormat == kInt4 ? 0.0625f : 1.0f);
    }

    // --- S = Q K^T of 16 keys ----------------------------------------------------------------------------------------

    __device__ __forceinline__ void load_query_step(uint32 (&x)[4], int k) const {
        if (kQueryInRegisters) {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] = q[kQueryInRegisters ? k : 0][i];
        } else {
            const int4 word = load_int4(query + k * 512);
            x[0] = word.x;
            x[1] = word.y;
            x[2] = word.z;
            x[3] = word.w;
        }
    }

    // The words of keys 16 * block .. + 15 at depth steps 2j and 2j + 1: [fragment of 8 keys][step][word].
    __device__ __forceinline__ void load_keys(uint32 (&b)[2][2][2], int buffer, int block, int j) const {
        const uint32 base = buffer * kKeyBytes + block * (16 * kKeyWidth);
        if constexpr (kKeyFormat == kInt4) {  // a chunk is a whole step
            uint32 x[4];
            load_matrices(x, (key_lane ^ 2 * j << 4) + base);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    b[n][k][0] = low_nibbles(x[2 * n + k]);
                    b[n][k][1] = high_nibbles(x[2 * n + k]);
                }
        } else {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int chunk = 2 * (2 * j + k);
                uint32 x[4];
                load_matrices(x, (key_lane ^ chunk % 8 << 4) + base + chunk / 8 * (kTileKeys * 128));
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    b[n][k][0] = x[2 * n];
                    b[n][k][1] = x[2 * n + 1];
                }
            }
        }
    }

    static constexpr int kWide = Dp == 256 ? 2 : 4;  // fragments at a time, which do not wait for each other

    // S of fragments first .. first + kWide - 1, of 8 keys each.
    __device__ __forceinline__ void multiply_keys(int buffer, int first, int aux_buffer) {
        float sum[kWide][4];  // floating scores
#pragma unroll
        for (int n = 0; n < kWide; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[n][i] = 0.0f;
#pragma unroll
        for (int j = 0; j < kSteps / 2; ++j) {
            uint32 b[kWide / 2][2][2][2];
#pragma unroll
            for (int w = 0; w < kWide / 2; ++w) load_keys(b[w], buffer, first / 2 + w, j);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int step = 2 * j + k;
                uint32 a[4];
                load_query_step(a, step);
                float group_scale[2];
                if (kQueryChannelScale) {
                    if (kGroupsInShared) {
                        const float2 x = load_float2(groups_of(step));
                        group_scale[0] = x.x;
                        group_scale[1] = x.y;
                    } else {
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            group_scale[h] = q_group[h][kQueryChannelScale && !kGroupsInShared ? step : 0];
                    }
                }
#pragma unroll
                for (int n = 0; n < kWide; ++n) {
                    const uint32(&word)[2] = b[n / 2][n % 2][k];
                    float2 scale;
                    if (kGrouped)
                        scale = load_float2(aux_lane + aux_buffer * kAuxBytes + step * (4 * kTileKeys) +
                                            (first + n) * 32);
                    int(&here)[4] = s[first + n];
                    if constexpr (kGrouped) {
                        int group[4];
                        mma_s8s8(group, a, word[0], word[1], start);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            float x = score_of(group[i]);
                            if (kQueryChannelScale) x *= group_scale[i / 2];
                            sum[n][i] = fmaf(x, i % 2 ? scale.y : scale.x, sum[n][i]);
                        }
                    } else if constexpr (kInteger) {
                        if (step == 0)
                            mma_s8s8(here, a, word[0], word[1], start);
                        else
                            mma_s8s8(here, a, word[0], word[1], here);
                    } else {
                        mma_float<kKeyFormat>(sum[n], a, word[0], word[1]);
                    }
                }
            }
        }
        if (kGrouped || !kInteger) {
#pragma unroll
            for (int n = 0; n < kWide; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[first + n][i] = __float_as_int(sum[n][i]);
        }
    }

    // --- softmax -----------------------------------------------------------------------------------------------------

    // The lane's first of V's scales, from its address of K's scales: here it has four keys next to each other.
    __device__ __forceinline__ uint32 fold_of(uint32 aux) const {
        return aux + kScaleBytes + (aux_lane - (shared + Map::aux));
    }

    // Scores of fragment n to floats, where each key has its own scale; V folded: the whole exponent.
    __device__ __forceinline__ void scale_scores(int n, uint32 aux, uint32 fold, const float (&q_by_k)[2]) {
        float2 scale = {1.0f, 1.0f};
        if (kTokenScale) scale = load_float2(aux + 32 * n);
        float2 value;
        if (kFolded) value = load_float2(fold + 64 * (n / 2) + 8 * (n % 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float x = kTokenScale || kShared ? score_of(s[n][i]) : __int_as_float(s[n][i]);
            if (kTokenScale) x *= i % 2 ? scale.y : scale.x;
            if (kFolded) x = fmaf(x, q_by_k[i / 2], i % 2 ? value.y : value.x);
            s[n][i] = __float_as_int(x);
        }
    }

    // Integer scores are still floats around kFloatMagic: positive, in the order of their bits.
    static __device__ __forceinline__ int larger(int a, int b) {
        return kRaw ? max(a, b) : __float_as_int(fmaxf(__int_as_float(a), __int_as_float(b)));
    }

    __device__ __forceinline__ void update_top(int n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int x = larger(s[n][2 * h], s[n][2 * h + 1]);
            top[h] = n == 0 ? x : larger(x, top[h]);
        }
    }

    // S of a tile, and its largest elements. key_scale: of the thread's keys (kShared).
    __device__ __forceinline__ void scores(int buffer, int parity, int key0, float key_scale) {
        fence_address<4>(key_lane);
        const uint32 aux = aux_lane + parity * kAuxBytes;
        const uint32 fold = fold_of(aux);
        float q_by_k[2];
        for (int h = 0; h < 2; ++h) q_by_k[h] = kShared ? q_scale[h] * key_scale : q_scale[h];
#pragma unroll
        for (int first = 0; first < 16; first += kWide) {
            fence<1>();
            multiply_keys(buffer, first, parity);
#pragma unroll
            for (int n = first; n < first + kWide; ++n) {
                if (kTokenScale || kFolded) scale_scores(n, aux, fold, q_by_k);
                if (kRaw) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) s[n][i] = magic_of(s[n][i]);
                }
                update_top(n);
                if (n < kStash) put_scores(n);
            }
        }
        if (!kMasked) return;
        const int4 seldom = load_int4(shared + Map::seldom);  // keys that all rows of the block see; head, row
        if (key0 < seldom.x || key0 + kTileKeys > seldom.y) {
            hide_scores(key0, seldom.w);
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                update_top(n);
                if (n < kStash) put_scores(n);
            }
        }
    }

    __device__ __forceinline__ void put_scores(int n) const {
        store_int4(stash_of(n), s[n][0], s[n][1], s[n][2], s[n][3]);
    }
    __device__ __forceinline__ void take_scores(int n) {
        const int4 x = load_int4(stash_of(n));
        s[n][0] = x.x;
        s[n][1] = x.y;
        s[n][2] = x.z;
        s[n][3] = x.w;
    }

    // Hidden keys get the bits of -inf: less than any score, as an integer and as a float.
    __device__ __forceinline__ void hide_scores(int key0, int block_row) {
        const int thread = static_cast<int>(thread_now());
#pragma unroll
        for (int n = 0; n < kStash; ++n) take_scores(n);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const KeyRange keys = visible_keys(p, row_of(block_row, thread, h));
            const int begin = keys.begin - key0 - thread % 4 * 2;
            const int end = keys.end - key0 - thread % 4 * 2;
#pragma unroll
            for (int n = 0; n < 16; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    if (8 * n + c < begin || 8 * n + c >= end) s[n][2 * h + c] = static_cast<int>(0xff800000u);
        }
    }

    // From the largest scores: exponent = score * scale + shift. key_scale: of the thread's keys (kRaw).
    // meanwhile(): work for the time that lanes wait for each other.
    template <class Work>
    __device__ __forceinline__ void exponent_of(float (&scale)[2], float (&shift)[2], float key_scale,
                                                const Work& meanwhile) {
        float x[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            scale[h] = kRaw ? fmaxf(q_scale[h] * key_scale, 1e-37f) : q_scale[h];
            x[h] = __int_as_float(top[h]);
            if (kRaw) x[h] -= kFloatMagic;
            if (!kFolded) x[h] *= scale[h];
            maximum[h] = __shfl_xor_sync(kFullWarp, x[h], 1);
        }
        meanwhile();
        bool grow = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            x[h] = fmaxf(x[h], maximum[h]);
            maximum[h] = fmaxf(x[h], __shfl_xor_sync(kFullWarp, x[h], 2));
            grow |= maximum[h] - reference[h] > kSlack;  // also from -inf
            if (kRaw) grow |= scale[h] > kCoarse;
        }
        higher = __any_sync(kFullWarp, grow);
        if (kRunning) settle();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float stand = kRunning ? reference[h] : maximum[h];
            float y = kLargest - (kMasked && stand == -infinity() ? 0.0f : stand);
            // No rounding may lift the maximum to LEVELS + 1/2: stay below LEVELS where it could.
            if (kSubnormalP) y -= fmaxf(fmaf(fabsf(y), 2.4e-7f, -0.002f), 0.0f);
            shift[h] = kRaw ? fma_down(-kFloatMagic, scale[h], y) : y;
        }
        if (kRaw && higher && __any_sync(kFullWarp, fmaxf(scale[0], scale[1]) > kCoarse)) use_differences(scale, shift);
    }

    // Scores whose unit is larger than this still have kFloatMagic in them, times which a float is too coarse for shift.
    static constexpr float kCoarse = 0.125f;
    // Beyond this, they are for the other exponents of an 8-bit P, too: the row becomes NaN.
    static constexpr float kLost = kRaw || kWideV ? 0x1p127f : kLostExponent;

    // Scores less the lane's largest, a difference that is exact, in place of scores.
    __device__ __forceinline__ void use_differences(const float (&scale)[2], float (&shift)[2]) {
#pragma unroll
        for (int n = 0; n < kStash; ++n) take_scores(n);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float largest = __int_as_float(top[h]);
            if (largest == -infinity()) continue;
            const float x = (largest - kFloatMagic) * scale[h];
            shift[h] = kLargest + (x - (kRunning ? reference[h] : maximum[h]));
#pragma unroll
            for (int n = 0; n < 16; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    s[n][2 * h + c] = __float_as_int(__int_as_float(s[n][2 * h + c]) - largest);
        }
#pragma unroll
        for (int n = 0; n < kStash; ++n) put_scores(n);
    }

    // Where O and l stand, and the factor of the tile's product. Nothing that P waits for, unless it stands there, too.
    __device__ __forceinline__ void settle() {
        if (higher) move_reference();
        if (kRunning) return;
#pragma unroll
        for (int h = 0; h < 2; ++h)
            factor[h] = kProductRoom * (kMasked ? exp2_from(maximum[h], reference[h])
                                                : exp2_fast(maximum[h] - reference[h]));
    }

    __device__ __forceinline__ void move_reference() {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const bool grow = maximum[h] - reference[h] > kSlack;
            const float down = grow ? exp2_fast(reference[h] - maximum[h]) : 1.0f;
            if (grow) reference[h] = maximum[h];
            l[h] *= down;
            if (kFolded) count[h] *= down;
#pragma unroll
            for (int n = 0; n < Dp / 8; ++n) {
                o[n][2 * h] *= down;
                o[n][2 * h + 1] *= down;
            }
        }
    }

    // P of 16 keys. sum: this lane's share of the unrounded P.
    __device__ __forceinline__ void exponentials(int block, uint32 fold, const float (&scale)[2],
                                                 const float (&shift)[2], float (&sum)[2]) {
        float4 value;
        if (2 * block < kStash) {
            take_scores(2 * block);
            take_scores(2 * block + 1);
        }
        if (kFolded) value = load_float4(fold + 4 * kTileKeys + 64 * block);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float e[4];  // keys 2q, 2q+1, 8+2q, 9+2q
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float x = __int_as_float(s[2 * block + i / 2][2 * h + i % 2]);
                e[i] = exp2_fast(kFolded ? x + shift[h] : fmaf(x, scale[h], shift[h]));
                if (kFolded)
                    sum[h] = fmaf(e[i], one_of(value, i), sum[h]);
                else if (!kCountedSum && !kProductSum)
                    sum[h] += e[i];
            }
            if (kWideV) {
                prob[4 * block + h] = pack2<kValueFormat>(e[0], e[1]);
                prob[kWideV ? 4 * block + 2 + h : 0] = pack2<kValueFormat>(e[2], e[3]);
            } else if (kIntegerP) {
                prob[2 * block + h] =
                    kRoundsBytes ? round_bytes(e[0], e[1], e[2], e[3])
                                 : __byte_perm(pack2<kHalf>(e[0], e[1]), pack2<kHalf>(e[2], e[3]), 0x6420);
            } else {
                prob[2 * block + h] =
                    __byte_perm(pack2<kValueFormat>(e[0], e[1]), pack2<kValueFormat>(e[2], e[3]), 0x5410);
            }
        }
    }

    // --- O += P V ----------------------------------------------------------------------------------------------------
    //
    // A step is 32 bytes of P per row: 32 keys, or 16 of a 16-bit P.

    static constexpr int kValueSteps = kWideV ? 8 : 4;

    // V of one step and 16 channels: [8 channels][word].
    __device__ __forceinline__ void load_values(uint32 (&b)[4], int buffer, int block, int step) const {
        const uint32 base = buffer * kValueBytes;
        if (kWideV)
            load_matrices_transposed(b, (value_lane ^ block % 4 << 5) + base + block / 4 * (kTileKeys * 128) +
                                            step * (16 * 128));
        else
            load_matrices(b, (value_lane ^ 2 * step << 4) + base + block * (16 * 128));
    }

    using Product = int[2][4];

    __device__ __forceinline__ void multiply_values(Product& product, int buffer, int block, int step) {
        uint32 b[4];
        load_values(b, buffer, block, step);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const uint32* const a = prob + 4 * step;
            if constexpr (!kIntegerP)
                mma_float<kValueFormat>(o[2 * block + n], a, b[2 * n], b[2 * n + 1]);
            else if (step == 0)
                mma_u8u8(product[n], a, b[2 * n], b[2 * n + 1], {0, 0, 0, 0});
            else
                mma_u8u8(product[n], a, b[2 * n], b[2 * n + 1], product[n]);
        }
    }

    // A product or a sum of P, its bits read as a float's. With a running maximum P stands at the reference already.
    __device__ __forceinline__ void add(float& y, int product, float scale) const {
        y = fmaf(__int_as_float(product), kRunning ? kProductRoom : scale, y);
    }

    __device__ __forceinline__ void add_product(const Product& product, int block) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) add(o[2 * block + n][i], product[n][i], factor[i / 2]);
    }

    // What a tile's scores add to O and l.
    __device__ __forceinline__ void values(int buffer, int parity, const float (&scale)[2],
                                           const float (&shift)[2]) {
        constexpr int beside = kIntegerP ? kBeside : Dp / 16;
        constexpr int kept = kIntegerP && beside > 0 ? beside : 1;
        fence_address<8>(value_lane);
        const uint32 fold = fold_of(aux_lane + parity * kAuxBytes);
        Product product[kept];
        float sum[2];
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int step = 0; step < kValueSteps; ++step) {
            fence<2>();
            if (kWideV) {
                exponentials(step, fold, scale, shift, sum);
            } else {
                exponentials(2 * step, fold, scale, shift, sum);
                exponentials(2 * step + 1, fold, scale, shift, sum);
            }
#pragma unroll
            for (int block = 0; block < beside; ++block)
                multiply_values(product[kIntegerP ? block : 0], buffer, block, step);
        }
        if (!kRunning) settle();
        add_sums(sum);
        if constexpr (kIntegerP) {
#pragma unroll
            for (int block = 0; block < beside; ++block) add_product(product[block], block);
#pragma unroll
            for (int block = beside; block < Dp / 16; ++block) {
                fence<2>();
#pragma unroll
                for (int step = 0; step < kValueSteps; ++step) multiply_values(product[0], buffer, block, step);
                add_product(product[0], block);
            }
        }
    }

    __device__ __forceinline__ void add_sums(const float (&share)[2]) {
        if constexpr (kIntegerP) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32 sum = 0;
#pragma unroll
                for (int word = h; word < 16; word += 2) sum = __dp4a(prob[word], 0x01010101u, sum);
                add(kFolded ? count[h] : l[h], static_cast<int>(sum), factor[h]);
            }
        }
        if constexpr (kProductSum) {
            constexpr uint32 ones = kValueFormat == kHalf ? 0x3c003c00u : 0x3f803f80u;
            float sum[4] = {l[0], 0.0f, l[1], 0.0f};
#pragma unroll
            for (int step = 0; step < kValueSteps; ++step)
                mma_float<kValueFormat>(sum, prob + 4 * step, ones, ones);
            l[0] = sum[0];
            l[1] = sum[2];
        } else if constexpr (!kCountedSum) {
#pragma unroll
            for (int h = 0; h < 2; ++h)
                l[h] = kRunning ? l[h] + share[h] * (1.0f / kUnit)
                                : fmaf(share[h] * (1.0f / (kUnit * kProductRoom)), factor[h], l[h]);
        }
    }

    // --- the end -----------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void finish() const {
        const int thread = static_cast<int>(thread_now());
        const int quad = thread % 4;
        const int4 seldom = load_int4(shared + Map::seldom);
        const int head = seldom.z;
        const int batch = head / p.heads;
        const int64 kv_head = load_int4(shared + Map::seldom + 16).w;
        // Loads come first: the compiler lifts none over a store, and one after the other they would be waited for.
        const float guard = p.guard[kv_head];
        const float* const v_scale = p.v_scale + kv_head * Dp + 2 * quad;
        const float head_scale = kWideV ? *v_scale : 1.0f;
        float2 scale[kAtOnce];
        if (!kWideV) load_scales(scale, v_scale);
        float inverse[2], bias[2], q_scale[2];
        bool inside[2], sees[2];
        Out::type* target[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = row_of(seldom.w, thread, h);
            inside[h] = row < p.queries;
            sees[h] = true;
            if (kMasked) {
                const KeyRange keys = visible_keys(p, row);
                sees[h] = keys.begin < keys.end;
            }
            const int64 index = static_cast<int64>(head) * p.queries + row;
            q_scale[h] = sees[h] && inside[h] ? p.q_scale[kQueryChannelScale ? index * kGroups : index] : 0.0f;
            target[h] = static_cast<Out::type*>(p.out) + batch * p.out_batch + (head - batch * p.heads) * p.out_head +
                        row * p.out_row;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float sum = kProductSum ? l[h] : quad_sum(l[h]);
            const float total = kCountedSum ? sum * (1.0f / kUnitOfO) : sum;
            bias[h] = kValueBias * (kFolded ? quad_sum(count[h]) : sum);
            // A row that sees a key has a sum, unless its scores are beyond what floats can tell apart.
            const bool lost = sees[h] && !(total > 0.0f && fabsf(reference[h]) < kLost);
            const float bad = lost ? not_a_number() : poison(guard, q_scale[h]) + total * 0.0f;
            inverse[h] = finish_factor(total, bad) * (kIntegerP ? 1.0f / kUnitOfO : head_scale);
            if (p.lse != nullptr && quad == 0 && inside[h]) {
                const int64 index = static_cast<int64>(head) * p.queries + row_of(seldom.w, thread, h);
                const float shift = p.lse_shift == nullptr ? 0.0f : p.lse_shift[index] * p.scale;
                const float from = reference[h] - (kFolded ? kFoldOffset : 0.0f);
                p.lse[index] = log_sum_exp(from, total, static_cast<float>(kLevels), shift, bad);
            }
        }
#pragma unroll
        for (int first = 0; first < Dp / 8; first += kAtOnce) {
            if (!kWideV && first > 0) load_scales(scale, v_scale + 8 * first);
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int n = 0; n < kAtOnce; n += 4) {
                    float x[8];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 more = kWideV ? float2{1.0f, 1.0f} : scale[n + i];  // 16 bits: one scale, 2^n
                        x[2 * i] = finished(o[first + n + i][2 * h], bias[h], inverse[h]) * more.x;
                        x[2 * i + 1] = finished(o[first + n + i][2 * h + 1], bias[h], inverse[h]) * more.y;
                    }
                    store(x, target[h], 8 * (first + n), quad, inside[h]);
                }
        }
    }

    // An element of the result, before v_scale, from one of O and 128 c.
    static __device__ __forceinline__ float finished(float x, float bias, float inverse) {
        return (kIntegerP ? x - bias : x) * inverse;
    }

    static constexpr int kAtOnce = Dp == 128 ? 16 : 8;  // fragments whose scales of V are loaded at a time

    static __device__ __forceinline__ void load_scales(float2 (&scale)[kAtOnce], const float* from) {
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) scale[n] = *reinterpret_cast<const float2*>(from + 8 * n);
    }

    // 32 channels of a row, of which the lane has 2q and 2q + 1 of every 8.
    __device__ __forceinline__ void store(const float (&x)[8], Out::type* row, int first, int quad, bool inside) const {
        if (kOutPairs) {
            Out::Pair pair[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) pair[i] = Out::store_pair(x[2 * i], x[2 * i + 1]);
            store_pairs(pair, row + first, quad, inside);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int channel = first + i / 2 * 8 + quad * 2 + i % 2;
                if (inside && channel < p.channels) row[channel * p.out_channel] = Out::store(x[i]);
            }
        }
    }
};

}  // namespace intfa

using namespace intfa;

extern "C" __global__ void __launch_bounds__(kThreads, INTFA_MIN_BLOCKS) attention_mma(const AttentionParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    const uint32 shared = shared_address(shared_memory);

    const Item item(p, blockIdx.x);
    BlockRange range = {0, p.tiles, {0, 0}};
    if (kMasked) range = block_range(p, item.row, min(item.row + kRows, p.queries));
    const int begin = kMasked ? range.tile_begin : 0;
    const int end = range.tile_end;
    const Tiles whole{p, shared, item.kv_head * p.tiles, begin, end};
    if (threadIdx.x == 0) {
        store_int4(shared + Map::seldom, range.common.begin, range.common.end, item.head, item.row);
        const int4 again = kShort ? int4{whole.first, begin, end, 0} : int4{0, 0, 0, 0};
        store_int4(shared + Map::seldom + 16, again.x, again.y, again.z, item.kv_head);
    }
    whole.start();
    Warp warp(p, shared, item);

    // Fetch K's scale a tile ahead, if there is a register for it all the time.
    constexpr bool kAhead = Dp < 256;
    float next_scale = kAhead && begin < end ? whole.scale_of(begin) : 1.0f;
    if (kShort) __syncthreads();  // all threads recall what one has written
    for (int tile = begin; tile < whole.recalled().end; ++tile) {
        float key_scale = next_scale;
        float scale[2], shift[2];
        const Tiles tiles = whole.recalled();
        const int parity = tiles.parity_of(tile);
        const int buffer = tiles.buffer_of(tile);

        if (!kAhead && kFolded) key_scale = tiles.scale_of(tile);
        tiles.await_key(tile);
        warp.scores(buffer, parity, tile * kTileKeys, key_scale);
        if (!kAhead && !kFolded) key_scale = tiles.scale_of(tile);
        tiles.leave_key();
        warp.exponent_of(scale, shift, key_scale, [&] {
            if (kAhead && tile + 1 < tiles.end) next_scale = tiles.scale_of(tile + 1);
            tiles.recalled().copy_next(tile);
        });
        tiles.await_value(tile);
        warp.values(buffer, parity, scale, shift);
        tiles.leave_value(tile);
    }
    warp.finish();
}
