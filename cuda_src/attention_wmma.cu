// INT8 attention on WMMA fragments: the portable kernel, for every architecture since sm_75.
//
// A block of kWarps warps owns 16 * kWarps query rows of one head; each warp owns 16 of them, alone. The block
// walks over the tiles of 128 keys that its rows see and, for each tile:
//
//   K    all threads copy the tile of K to shared memory.
//   S    each warp: S = Q K^T for its 16 rows, 16x16x16 int8 fragments, stored to its own scores (int32).
//   P    two lanes per row, 64 keys each: exponents x = S * scales (+ log2 of V's scale, when V is folded), their
//        maximum m, P = round(levels * 2^(x - m)), written over the scores. What O needs to know of each row, such
//        as the weight of this tile, goes to the warp's `rows`.
//   V    all threads have copied the tile of V^T meanwhile.
//   O    each warp: P V, 16x16x16 fragments again, exact in int32; O += weight * (P V), O in float registers.
//
// P is taken against the maximum of its own tile, and O and l are relative to a reference exponent that only
// moves when a tile's maximum exceeds it by more than 60 (softmax.cuh). With kRunning, P is taken against the
// running maximum and O is rescaled in every tile: Algorithm 1 of INT-FlashAttention (arXiv 2409.16997). With
// kHalfPV, P and V are fp16 and O accumulates inside the fragments.
//
// WMMA multiplies u8 by u8 or s8 by s8, not u8 by s8. P is unsigned, and an integer V is stored as v + 128: the sums
// start at -128 * rowsum(P), which makes the result exactly P v.
//
// The layout of a fragment is the compiler's secret, and nothing here depends on it: S and P go through shared
// memory, and a warp learns the row of each accumulator element by loading a matrix of row numbers.
//
// Shared memory, in this order (Dp = D padded to 64, 128 or 256):
//   K        128 x Dp bytes as 16x16 blocks of 256 bytes: block (key / 16, channel / 16), rows of 16 bytes. Copies
//            and fragment loads are both free of bank conflicts that way, without padding.
//   V        Dp x 128 bytes, v + 128, as blocks (channel / 16, position / 16), too; kHalfPV: 128 rows of Dp + 8 halves.
//            With kBuffers = 1, K and V take turns in one place.
//   k_scale  128 floats, if K has a scale per key
//   fold     2 x 128 floats by position, if V is folded: kFoldOffset + log2 of the keys' scales, their reciprocals
//   for each warp:
//     scores 16 x 136 int32; at the start Q, at the end O
//     P      8 blocks of 16x16 bytes, or 16 x 136 halves: over the scores if they fit in registers (kKeepScores)
//     rows   16 x {weight, bias, rescale}
//     query  16 x Dp bytes as blocks, if Q does not stay in registers
//
// The packed K and V^T in global memory are swizzled for wgmma (quantize.cu): the copy undoes that. V's keys are
// permuted within groups of 32 into positions; P is written at the same positions, so the sum does not notice.

#include <mma.h>

#include "mask.cuh"
#include "params.cuh"
#include "platform.cuh"
#include "softmax.cuh"

namespace wmma = nvcuda::wmma;

namespace intfa {

// --- the tile and the recipe, given by tiles.py ------------------------------------------------------------------

constexpr int Dp = INTFA_DP;
constexpr int kWarps = INTFA_WARPS;
constexpr int kBuffers = INTFA_BUFFERS;                  // 2: K and V have their own memory; 1: they share it
constexpr bool kQueryInRegisters = INTFA_QUERY_IN_REGISTERS;
constexpr bool kKeepScores = INTFA_KEEP_SCORES;          // hold exponents in registers, or compute them twice
constexpr float kLevels = INTFA_P_LEVELS;                // what the probability 1 is stored as
constexpr bool kRunning = INTFA_P_RUNNING;
constexpr int kKeyScale = INTFA_K_SCALE;
constexpr bool kFolded = INTFA_V_FOLDED;
constexpr bool kHalfPV = INTFA_HALF_PV;
using Out = Element<INTFA_OUT>;

constexpr int kRowsPerWarp = 16;
constexpr int kRows = kWarps * kRowsPerWarp;
constexpr int kThreads = kWarps * 32;
constexpr int kBlock = 256;                              // bytes of a 16x16 block of bytes
constexpr int kStride = 136;                             // elements per row of scores, of halves of P, of staged O
constexpr int kValueStride = Dp + 8;                     // halves per row of an fp16 V
constexpr int kKeyBlocks = kTileKeys / 16;
constexpr int kChannelBlocks = Dp / 16;
constexpr int kWide = Dp < 256 ? 4 : 2;                   // accumulators in flight: they hide the latency of mma

static_assert(Dp == 64 || Dp == 128 || Dp == 256, "the head dimension is padded to 64, 128 or 256");
static_assert(!kHalfPV || (kRunning && !kFolded), "fp16 P is taken against the running maximum");

constexpr int larger(int a, int b) { return a > b ? a : b; }

struct Map {
    static constexpr int key = 0;
    static constexpr int key_bytes = kTileKeys * Dp;
    static constexpr int value_bytes = kHalfPV ? kTileKeys * kValueStride * 2 : Dp * kTileKeys;
    static constexpr int value = kBuffers == 2 ? key_bytes : 0;
    static constexpr int k_scale = kBuffers == 2 ? key_bytes + value_bytes : larger(key_bytes, value_bytes);
    static constexpr int fold = k_scale + (kKeyScale == kScaleToken ? kTileKeys * 4 : 0);
    static constexpr int warps = fold + (kFolded ? kTileKeys * 8 : 0);
    // from the start of a warp's part
    static constexpr int score_bytes = kRowsPerWarp * kStride * 4;
    static constexpr int p = kKeepScores ? 0 : score_bytes;
    static constexpr int p_bytes = kHalfPV ? kRowsPerWarp * kStride * 2 : kRowsPerWarp * kTileKeys;
    static constexpr int rows = kKeepScores ? score_bytes : p + p_bytes;
    static constexpr int query = rows + kRowsPerWarp * 16;
    static constexpr int warp_bytes = query + (kQueryInRegisters ? 0 : kRowsPerWarp * Dp);
    static constexpr int total = warps + kWarps * warp_bytes;
};
static_assert(Map::total == INTFA_SMEM, "tiles.py and this file disagree on shared memory");

// What O must know of a row after a tile's P: written by the row's lanes, read by those that hold its accumulators.
struct alignas(16) Row {
    float weight;   // of this tile's product
    int bias;       // -128 * rowsum(P)
    float rescale;  // factor for what O holds already
};

// Keeps the compiler from loading the operands of the next step long before they fit into registers.
__device__ __forceinline__ void fence_registers() { __syncwarp(); }

// --- copies to shared memory ---------------------------------------------------------------------------------------

// A packed tile into blocks, undoing the swizzle: slabs of `rows` rows of 4 or 8 chunks of 16 bytes. Eight lanes take
// the same chunk of eight rows, four times that make a warp's step: the destinations of eight lanes lie side by side,
// and two of them share a sector of the source. The addresses of a thread's steps differ by constants.
template <int rows, int chunks, int slabs>
__device__ __forceinline__ void copy_tile(unsigned char* shared, const int8* global) {
    constexpr int quads = chunks / 4;
    constexpr int units = 2 * quads;  // warp steps of 16 rows: octet of rows, four chunks
    constexpr int octets = kWarps < units ? 2 : 1;
    static_assert(kWarps % quads == 0 && (kWarps >= units || kWarps == quads), "warps divide the steps of 16 rows");
    constexpr int step = kWarps < units ? 1 : kWarps / units;

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int row = (kWarps < units ? 0 : warp / quads % 2 * 8) + lane % 8;
    const int chunk = warp % quads * 4 + lane / 8;
    const int column = chunk ^ (chunks == 8 ? row % 8 : row / 2 % 4);
    const int first = warp / units;  // of the groups of 16 rows
    unsigned char* to = shared + (first * slabs * chunks + column) * kBlock + row * 16;
    const int8* from = global + (first * 16 + row) * (chunks * 16) + chunk * 16;
#pragma unroll
    for (int slab = 0; slab < slabs; ++slab)
#pragma unroll
        for (int group = 0; group < rows / 16; group += step)
#pragma unroll
            for (int octet = 0; octet < octets; ++octet)
                copy16(to + (group * slabs + slab) * chunks * kBlock + octet * 128,
                       from + (slab * rows + group * 16 + octet * 8) * (chunks * 16));
}

__device__ __forceinline__ void copy_key(unsigned char* shared, const AttentionParams& p, int tile) {
    const int64 index = tile;
    copy_tile<kTileKeys, Dp == 64 ? 4 : 8, Dp == 64 ? 1 : Dp / 128>(shared + Map::key, p.k + index * (kTileKeys * Dp));
    const int t = threadIdx.x;
    if (kKeyScale == kScaleToken && t < kTileKeys / 4)
        copy16(shared + Map::k_scale + t * 16, p.k_scale + index * kTileKeys + t * 4);
    if (kFolded && t < kTileKeys / 2)
        copy16(shared + Map::fold + t * 16, p.v_fold + index * (kTileKeys * 2) + t * 4);
}

__device__ __forceinline__ void copy_value(unsigned char* shared, const AttentionParams& p, int tile) {
    const int64 index = tile;
    if (kHalfPV) {
        constexpr int row_chunks = Dp / 8;
        static_assert(kThreads % row_chunks == 0, "a thread stays in its column");
        const int row = threadIdx.x / row_chunks;
        const int column = threadIdx.x % row_chunks;
        unsigned char* to = shared + Map::value + row * (kValueStride * 2) + column * 16;
        const int8* from = static_cast<const int8*>(p.v) + index * (kTileKeys * Dp * 2) + threadIdx.x * 16;
#pragma unroll
        for (int i = 0; i < kTileKeys * row_chunks / kThreads; ++i)
            copy16(to + i * (kThreads / row_chunks) * (kValueStride * 2), from + i * kThreads * 16);
    } else {
        copy_tile<Dp, 8, 1>(shared + Map::value, static_cast<const int8*>(p.v) + index * (Dp * kTileKeys));
    }
}

// The warp's 16 query rows, as blocks; rows beyond Sq are zero.
__device__ __forceinline__ void load_query(unsigned char* blocks, const AttentionParams& p, int head, int row0) {
    for (int i = threadIdx.x % 32; i < kRowsPerWarp * (Dp / 16); i += 32) {
        const int row = i % kRowsPerWarp;
        const int column = i / kRowsPerWarp;
        uint4 chunk = {0, 0, 0, 0};
        if (row0 + row < p.queries)
            chunk = *reinterpret_cast<const uint4*>(p.q + (int64(head) * p.queries + row0 + row) * Dp + column * 16);
        *reinterpret_cast<uint4*>(blocks + column * kBlock + row * 16) = chunk;
    }
}

// --- S = Q K^T -------------------------------------------------------------------------------------------------------

using QueryFragment = wmma::fragment<wmma::matrix_a, 16, 16, 16, signed char, wmma::row_major>;
using KeyFragment = wmma::fragment<wmma::matrix_b, 16, 16, 16, signed char, wmma::col_major>;
using ScoreFragment = wmma::fragment<wmma::accumulator, 16, 16, 16, int>;

struct Query {
    const int8* blocks;
    QueryFragment fragment[kQueryInRegisters ? kChannelBlocks : 1];

    __device__ __forceinline__ void load(const unsigned char* from) {
        blocks = reinterpret_cast<const int8*>(from);
        if (kQueryInRegisters) {
#pragma unroll
            for (int c = 0; c < kChannelBlocks; ++c)
                wmma::load_matrix_sync(fragment[kQueryInRegisters ? c : 0], blocks + c * kBlock, 16);
        }
    }

    // The warp's scores of one tile.
    __device__ __forceinline__ void multiply(int* scores, const unsigned char* key) {
#pragma unroll
        for (int j = 0; j < kKeyBlocks; j += kWide) {
            fence_registers();
            ScoreFragment s[kWide];
#pragma unroll
            for (int w = 0; w < kWide; ++w) wmma::fill_fragment(s[w], 0);
#pragma unroll
            for (int c = 0; c < kChannelBlocks; ++c) {
                QueryFragment& q = fragment[kQueryInRegisters ? c : 0];
                if (!kQueryInRegisters) wmma::load_matrix_sync(q, blocks + c * kBlock, 16);
#pragma unroll
                for (int w = 0; w < kWide; ++w) {
                    KeyFragment k;
                    wmma::load_matrix_sync(
                        k, reinterpret_cast<const int8*>(key) + ((j + w) * kChannelBlocks + c) * kBlock, 16);
                    wmma::mma_sync(s[w], q, k, s[w]);
                }
            }
#pragma unroll
            for (int w = 0; w < kWide; ++w)
                wmma::store_matrix_sync(scores + (j + w) * 16, s[w], kStride, wmma::mem_row_major);
        }
    }
};

// The row of its warp, 0..15, whose softmax this lane works on.
__device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / 2; }

// --- P -----------------------------------------------------------------------------------------------------------

// Lane 2r + h works on keys 8i + 4h .. 8i + 4h + 3 (i = 0..15) of row r of its warp: of each sixteen keys, just those
// whose permuted positions are 8h .. 8h + 7.
struct Softmax {
    float scale;      // of the row: q_scale * softmax scale * log2(e)
    float reference;  // exponent that O and l are relative to
    float sum;        // this lane's share of l

    __device__ __forceinline__ void begin(const AttentionParams& p, int head, int warp_row) {
        const int row = min(warp_row + lane_row(), p.queries - 1);
        scale = p.q_scale[int64(head) * p.queries + row] * p.scale_log2;
        reference = -infinity();
        sum = 0.0f;
    }

    // Where the pair of keys 4 * chunk, + 1 lies by position; the next pair is two further.
    static __device__ __forceinline__ int fold_place(int chunk) {
        return chunk / 4 * 8 + chunk % 2 * 4 + chunk / 2 % 2;
    }

    // Exponents of keys 4 * chunk .. 4 * chunk + 3 of the tile.
    template <bool masked>
    __device__ __forceinline__ void exponents(float (&x)[4], int chunk, const int4* scores, const float4* k_scale,
                                              const float2* fold, float low, float high, KeyRange keys) const {
        const int4 s = scores[chunk];
        x[0] = static_cast<float>(s.x);
        x[1] = static_cast<float>(s.y);
        x[2] = static_cast<float>(s.z);
        x[3] = static_cast<float>(s.w);
        if (kKeyScale == kScaleToken) {
            const float4 k = k_scale[chunk];
            x[0] *= k.x;
            x[1] *= k.y;
            x[2] *= k.z;
            x[3] *= k.w;
        }
        if (kFolded) {
            const float2 a = fold[fold_place(chunk)];
            const float2 b = fold[fold_place(chunk) + 2];
            x[0] = fmaf(x[0], low, a.x);
            x[1] = fmaf(x[1], low, a.y);
            x[2] = fmaf(x[2], high, b.x);
            x[3] = fmaf(x[3], high, b.y);
        } else {  // not to be contracted with what follows: the maximum and the exponentials must agree
            x[0] = mul_rn(x[0], low);
            x[1] = mul_rn(x[1], low);
            x[2] = mul_rn(x[2], high);
            x[3] = mul_rn(x[3], high);
        }
        if (masked) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (4 * chunk + j < keys.begin || 4 * chunk + j >= keys.end) x[j] = -infinity();
        }
    }

    // Turns the warp's scores into P and fills in its rows. True if some row must rescale O. `keys`: those of the
    // tile that the lane's row sees, counted from the tile's first.
    template <bool masked>
    __device__ __forceinline__ bool run(unsigned char* warp_memory, const unsigned char* shared,
                                        const float* shared_scale, KeyRange keys) {
        constexpr int kSteps = kTileKeys / 8;
        constexpr int kUnroll = kKeepScores ? kSteps : 4;
        const int lane = threadIdx.x % 32;
        const int half = lane % 2;
        const int4* const scores = reinterpret_cast<const int4*>(warp_memory + lane / 2 * (kStride * 4));
        unsigned char* const p = warp_memory + Map::p;
        const float4* const k_scale = reinterpret_cast<const float4*>(shared + Map::k_scale);
        const float2* const fold = reinterpret_cast<const float2*>(shared + Map::fold);
        float low = scale, high = scale;
        if (kKeyScale == kScaleGroup) {
            low *= shared_scale[2 * half];
            high *= shared_scale[2 * half + 1];
        } else if (kKeyScale == kScaleTile) {
            low *= shared_scale[0];
            high = low;
        }

        float x[kKeepScores ? kSteps : 1][4];
        float maximum = -infinity();
#pragma unroll kUnroll
        for (int i = 0; i < kSteps; ++i) {
            float(&here)[4] = x[kKeepScores ? i : 0];
            exponents<masked>(here, 2 * i + half, scores, k_scale, fold, low, high, keys);
            maximum = fmaxf(maximum, fmaxf(fmaxf(here[0], here[1]), fmaxf(here[2], here[3])));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, 1));

        bool move;
        float weight = 1.0f, rescale = 1.0f;
        if (kRunning) {
            move = true;
            maximum = fmaxf(maximum, reference);
            rescale = exp2_from(reference, maximum);
            reference = maximum;
        } else {
            const bool first = reference == -infinity();
            if (first) reference = maximum;
            move = !first && maximum - reference > kReferenceSlack;
            if (move) {
                rescale = exp2_fast(reference - maximum);
                reference = maximum;
            }
            weight = exp2_from(maximum, reference);
        }
        const float from = maximum == -infinity() ? 0.0f : maximum;

        __syncwarp();        // kKeepScores: every lane has its scores, P may overwrite them
        float exact = 0.0f;             // what l counts if it does not count the rounded P
        uint32 rounded = 0;             // sum of the rounded P
#pragma unroll kUnroll
        for (int i = 0; i < kSteps; i += 2) {
            float e[2][4];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int chunk = 2 * (i + c) + half;
                float(&here)[4] = x[kKeepScores ? i + c : 0];
                if (!kKeepScores) exponents<masked>(here, chunk, scores, k_scale, fold, low, high, keys);
#pragma unroll
                for (int j = 0; j < 4; ++j) e[c][j] = exp2_fast(here[j] - from);
                if (kFolded) {
                    const float2 a = fold[kTileKeys / 2 + fold_place(chunk)];
                    const float2 b = fold[kTileKeys / 2 + fold_place(chunk) + 2];
                    exact = fmaf(e[c][0], a.x, exact);
                    exact = fmaf(e[c][1], a.y, exact);
                    exact = fmaf(e[c][2], b.x, exact);
                    exact = fmaf(e[c][3], b.y, exact);
                }
                if (kHalfPV) {  // keys stay in order
                    exact += (e[c][0] + e[c][1]) + (e[c][2] + e[c][3]);
                    const uint2 halves = {pack_halves(e[c][0], e[c][1]), pack_halves(e[c][2], e[c][3])};
                    reinterpret_cast<uint2*>(p + lane / 2 * (kStride * 2))[chunk] = halves;
                }
            }
            if (!kHalfPV) {  // keys go to their positions
                const uint2 words = {round4(e[0][0], e[0][1], e[1][0], e[1][1], kLevels),
                                     round4(e[0][2], e[0][3], e[1][2], e[1][3], kLevels)};
                rounded = add_bytes(words.x, add_bytes(words.y, rounded));
                *reinterpret_cast<uint2*>(p + i / 2 * kBlock + lane / 2 * 16 + half * 8) = words;
            }
        }
        const float counted = kHalfPV ? exact : kFolded ? exact * kLevels : static_cast<float>(rounded);
        sum = fmaf(counted, weight, sum * rescale);

        const int row_sum = static_cast<int>(rounded) + __shfl_xor_sync(kFullWarp, static_cast<int>(rounded), 1);
        Row* const rows = reinterpret_cast<Row*>(warp_memory + Map::rows);
        if (half == 0) {
            rows[lane / 2].weight = weight;
            rows[lane / 2].bias = -static_cast<int>(kValueBias) * row_sum;
            rows[lane / 2].rescale = rescale;
        }
        return kRunning || __any_sync(kFullWarp, move);
    }
};

// --- O += P V ------------------------------------------------------------------------------------------------------

// The row of each accumulator element of a lane, four bits each.
template <typename Fragment, typename Word>
struct ElementRows {
    static_assert(Fragment::num_elements <= 8, "eight elements of four bits");
    uint32 rows;

    __device__ __forceinline__ void find(Word* table) {
        const int lane = threadIdx.x % 32;
        for (int i = lane; i < 256; i += 32) table[i] = static_cast<Word>(i / 16);
        __syncwarp();
        Fragment fragment;
        wmma::load_matrix_sync(fragment, table, 16, wmma::mem_row_major);
        rows = 0;
#pragma unroll
        for (int e = 0; e < Fragment::num_elements; ++e) rows |= static_cast<uint32>(fragment.x[e]) << (4 * e);
        __syncwarp();
    }

    // Taken apart at each use: eight row numbers kept over the loop would cost eight registers.
    __device__ __forceinline__ void get(int (&row_of)[Fragment::num_elements]) const {
        const uint32 packed = opaque(rows);
#pragma unroll
        for (int e = 0; e < Fragment::num_elements; ++e) row_of[e] = packed >> (4 * e) & 15;
    }
};

// Integer P and V: a tile's product is exact in int32 and joins O in float.
struct IntegerOutput {
    using P = wmma::fragment<wmma::matrix_a, 16, 16, 16, unsigned char, wmma::row_major>;
    using V = wmma::fragment<wmma::matrix_b, 16, 16, 16, unsigned char, wmma::col_major>;
    using Sum = wmma::fragment<wmma::accumulator, 16, 16, 16, int>;
    static constexpr int kElements = Sum::num_elements;

    float o[kChannelBlocks][kElements];  // in the places of Sum's elements
    ElementRows<Sum, int> element_rows;

    __device__ __forceinline__ void begin(unsigned char* memory) {
        element_rows.find(reinterpret_cast<int*>(memory));
#pragma unroll
        for (int n = 0; n < kChannelBlocks; ++n)
#pragma unroll
            for (int e = 0; e < kElements; ++e) o[n][e] = 0.0f;
    }

    __device__ __forceinline__ void rescale(const Row* rows) {
        int row_of[kElements];
        element_rows.get(row_of);
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
            const float factor = rows[row_of[e]].rescale;
#pragma unroll
            for (int n = 0; n < kChannelBlocks; ++n) o[n][e] *= factor;
        }
    }

    __device__ __forceinline__ void add(const unsigned char* p, const unsigned char* value, const Row* rows) {
#pragma unroll
        for (int n = 0; n < kChannelBlocks; n += kWide) {
            fence_registers();
            int row_of[kElements];
            element_rows.get(row_of);
            Sum sum[kWide];
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
                const int bias = rows[row_of[e]].bias;
#pragma unroll
                for (int w = 0; w < kWide; ++w) sum[w].x[e] = bias;
            }
#pragma unroll 2
            for (int j = 0; j < kKeyBlocks; ++j) {
                P a;
                wmma::load_matrix_sync(a, p + j * kBlock, 16);
#pragma unroll
                for (int w = 0; w < kWide; ++w) {
                    V b;
                    wmma::load_matrix_sync(b, value + ((n + w) * kKeyBlocks + j) * kBlock, 16);
                    wmma::mma_sync(sum[w], a, b, sum[w]);
                }
            }
            element_rows.get(row_of);
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
                const float weight = kRunning ? 1.0f : rows[row_of[e]].weight;
#pragma unroll
                for (int w = 0; w < kWide; ++w)
                    o[n + w][e] = fmaf(static_cast<float>(sum[w].x[e]), weight, o[n + w][e]);
            }
        }
    }

    // 16 channels of O, as 16 rows of kStride floats.
    __device__ __forceinline__ void store(float* stage, int n) const {
        Sum bits;
#pragma unroll
        for (int e = 0; e < kElements; ++e) bits.x[e] = __float_as_int(o[n][e]);
        wmma::store_matrix_sync(reinterpret_cast<int*>(stage), bits, kStride, wmma::mem_row_major);
    }
};

// Half P and V: O accumulates in the fragments.
struct HalfOutput {
    using P = wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major>;
    using V = wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major>;
    using Sum = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;
    static constexpr int kElements = Sum::num_elements;

    Sum o[kChannelBlocks];
    ElementRows<Sum, float> element_rows;

    __device__ __forceinline__ void begin(unsigned char* memory) {
        element_rows.find(reinterpret_cast<float*>(memory));
#pragma unroll
        for (int n = 0; n < kChannelBlocks; ++n) wmma::fill_fragment(o[n], 0.0f);
    }

    __device__ __forceinline__ void rescale(const Row* rows) {
        int row_of[kElements];
        element_rows.get(row_of);
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
            const float factor = rows[row_of[e]].rescale;
#pragma unroll
            for (int n = 0; n < kChannelBlocks; ++n) o[n].x[e] *= factor;
        }
    }

    __device__ __forceinline__ void add(const unsigned char* p, const unsigned char* value, const Row*) {
#pragma unroll
        for (int j = 0; j < kKeyBlocks; ++j) {
            P a;
            wmma::load_matrix_sync(a, reinterpret_cast<const __half*>(p) + j * 16, kStride);
#pragma unroll
            for (int n = 0; n < kChannelBlocks; ++n) {
                V b;
                wmma::load_matrix_sync(
                    b, reinterpret_cast<const __half*>(value) + j * 16 * kValueStride + n * 16, kValueStride);
                wmma::mma_sync(o[n], a, b, o[n]);
            }
        }
    }

    __device__ __forceinline__ void store(float* stage, int n) const {
        wmma::store_matrix_sync(stage, o[n], kStride, wmma::mem_row_major);
    }
};

template <bool half>
struct OutputOf {
    using type = IntegerOutput;
};
template <>
struct OutputOf<true> {
    using type = HalfOutput;
};
using Output = OutputOf<kHalfPV>::type;

// Where a warp works. Blocks of one head are neighbours; the last rows come first: under a causal mask they take the
// longest. Worked out again after the loop over tiles rather than kept in registers.
struct Place {
    int head;     // b * H + h
    int kv_head;  // b * Hkv + h / (H / Hkv)
    int block_row;
    int warp_row;

    __device__ __forceinline__ explicit Place(const AttentionParams& p) {
        const int block = static_cast<int>(opaque(blockIdx.x));
        head = block / p.row_blocks;
        kv_head = head / p.heads * p.kv_heads + head % p.heads / (p.heads / p.kv_heads);
        block_row = (p.row_blocks - 1 - block % p.row_blocks) * kRows;
        warp_row = block_row + static_cast<int>(threadIdx.x) / 32 * kRowsPerWarp;
    }
};

// Finishes the warp's rows and writes them: out = O * v_scale / l.
__device__ __forceinline__ void write_rows(const Output& output, const Softmax& softmax, unsigned char* warp_memory,
                                           const AttentionParams& p) {
    const Place place(p);
    const int lane = threadIdx.x % 32;
    const int row = place.warp_row + lane / 2;
    const int rows_here = min(kRowsPerWarp, p.queries - place.warp_row);
    Row* const rows = reinterpret_cast<Row*>(warp_memory + Map::rows);
    float* const stage = reinterpret_cast<float*>(warp_memory);

    const float l = softmax.sum + __shfl_xor_sync(kFullWarp, softmax.sum, 1);
    __syncwarp();
    if (lane % 2 == 0 && row < p.queries) {
        const int64 index = int64(place.head) * p.queries + row;
        const KeyRange keys = visible_keys(p, row);
        const float bad = poison(p.guard[place.kv_head], keys.begin < keys.end ? p.q_scale[index] : 0.0f);
        rows[lane / 2].weight = finish_factor(l, bad);
        if (p.lse != nullptr) {
            const float shift = p.lse_shift == nullptr ? 0.0f : p.lse_shift[index] * p.scale;
            p.lse[index] = log_sum_exp(softmax.reference - (kFolded ? kFoldOffset : 0.0f), l, kLevels, shift, bad);
        }
    }

    const int64 base = place.head / p.heads * p.out_batch + place.head % p.heads * p.out_head +
                       place.warp_row * p.out_row;
    Out::type* const out = static_cast<Out::type*>(p.out) + base;
    constexpr int kPass = Dp < 128 ? Dp : 128;  // channels staged at a time
#pragma unroll
    for (int first = 0; first < Dp; first += kPass) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < kPass / 16; ++n) output.store(stage + n * 16, first / 16 + n);
        __syncwarp();
        for (int c = lane; c < kPass && first + c < p.channels; c += 32) {
            const float v_scale = p.v_scale[int64(place.kv_head) * Dp + first + c];
            Out::type* to = out + (first + c) * p.out_channel;
#pragma unroll 1
            for (int r = 0; r < rows_here; ++r, to += p.out_row)
                *to = Out::store(stage[r * kStride + c] * rows[r].weight * v_scale);
        }
    }
}

}  // namespace intfa

using namespace intfa;

extern "C" __global__ void __launch_bounds__(kThreads, INTFA_MIN_BLOCKS) attention_wmma(const AttentionParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    unsigned char* const shared = shared_memory;

    const Place place(p);
    const int warp_row = place.warp_row;
    const bool idle = warp_row >= p.queries;  // a warp without rows still helps to copy
    const BlockRange block = block_range(p, place.block_row, min(place.block_row + kRows, p.queries));
    const BlockRange mine = block_range(p, min(warp_row, p.queries - 1), min(warp_row + kRowsPerWarp, p.queries));

    const int first_tile = place.kv_head * p.tiles;
    if (block.tile_begin < block.tile_end) copy_key(shared, p, first_tile + block.tile_begin);

    unsigned char* const warp_memory = shared + Map::warps + static_cast<int>(threadIdx.x) / 32 * Map::warp_bytes;
    Row* const rows = reinterpret_cast<Row*>(warp_memory + Map::rows);
    Output output;
    output.begin(warp_memory);

    unsigned char* const query_blocks = warp_memory + (kQueryInRegisters ? 0 : Map::query);
    load_query(query_blocks, p, place.head, warp_row);
    __syncwarp();
    Query query;
    query.load(query_blocks);
    __syncwarp();

    Softmax softmax;
    softmax.begin(p, place.head, warp_row);

    for (int tile = block.tile_begin; tile < block.tile_end; ++tile) {
        const bool active = !idle && tile >= mine.tile_begin && tile < mine.tile_end;
        copy_wait();
        __syncthreads();  // K is here, and nobody reads the last V any more
        if (kBuffers == 2) copy_value(shared, p, first_tile + tile);

        if (active) {
            query.multiply(reinterpret_cast<int*>(warp_memory), shared + Map::key);
            __syncwarp();
            const int key0 = tile * kTileKeys;
            const float* shared_scale = nullptr;  // K's scales of the tile, where keys share them
            if (kKeyScale == kScaleGroup) shared_scale = p.k_scale + int64(first_tile + tile) * 4;
            if (kKeyScale == kScaleTile) shared_scale = p.k_scale + (first_tile + tile);
            bool rescale;
            if (mine.needs_mask(key0, kTileKeys)) {
                const KeyRange keys = visible_keys(p, min(warp_row + lane_row(), p.queries - 1));
                rescale = softmax.run<true>(warp_memory, shared, shared_scale,
                                            {keys.begin - key0, keys.end - key0});
            } else {
                rescale = softmax.run<false>(warp_memory, shared, shared_scale, {0, kTileKeys});
            }
            __syncwarp();
            if (rescale) output.rescale(rows);
        }

        if (kBuffers == 1) {
            __syncthreads();  // nobody reads K any more
            copy_value(shared, p, first_tile + tile);
        }
        copy_wait();
        __syncthreads();  // V is here, and nobody reads K any more
        if (kBuffers == 2 && tile + 1 < block.tile_end) copy_key(shared, p, first_tile + tile + 1);

        if (active) output.add(warp_memory + Map::p, shared + Map::value, rows);

        if (kBuffers == 1 && tile + 1 < block.tile_end) {
            __syncthreads();  // nobody reads V any more
            copy_key(shared, p, first_tile + tile + 1);
        }
    }

    __syncwarp();
    if (!idle) write_rows(output, softmax, warp_memory, p);
}
