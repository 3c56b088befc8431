// Fully INT8 attention forward for Hopper (sm_90a): Q K^T and P V are both integer wgmma.
//
// The algorithm, per query row i and tile t of 128 keys (all exponents to base 2):
//
//     S   = q8 . k8                                    int32, exact
//     x   = S * a                 a = q_scale * scale * log2(e) * k_scale; V folded: + log2 of the key's V scale
//     m_t = max of x over the visible keys of the tile
//     P   = round(LEVELS * 2^(x - m_t))                unsigned bytes, against the tile's own maximum
//     O  += (P (v8 + 128)) * 2^(m_t - m_ref)           int32 product of one tile, exact; float accumulator
//     c  += sum(P) * 2^(m_t - m_ref)
//     l  += sum(P) * 2^(m_t - m_ref)                   V folded: LEVELS * sum(2^(x - m_t) / V scale) instead
//     out = (O - 128 c) * v_scale / l
//
// V is stored as v8 + 128, so that products are not negative: an integer below 2^24 is, read as the bits of a float,
// 2^-149 times itself (the subnormals and the first normals), and joins O without a conversion.
//
// m_ref is the maximum of the row's first visible tile. It moves, and O and l with it, only when a tile exceeds
// it by more than 60: float32 has room for the growth. With P_TILE_MAX=0 (the paper's scheme) m_t and m_ref are the
// running maximum instead, with which O and l are rescaled whenever it moves.
//
// A block is persistent, one per SM. Its warpgroup 0 brings data in with few registers: one thread issues 1-D bulk
// copies of packed K and V tiles (already swizzled and transposed by the quantiser) into a ring of stages, one works
// out the items (batch, head, block of rows) and leaves a record of each, two warps copy and swizzle the rows of Q.
// The other warpgroups, CONSUMERS of them, own 64 rows each; they share the tiles and meet in the ring. Those for which
// an item has no rows go by its tiles.
//
// In general the products of a warpgroup follow each other in one array of 64 accumulators, that of the scores:
//
//     S | row maxima | exponentials to P | P V | O += P V
//
// and three warpgroups fill each other's gaps; DP = 256 has registers for two, DP = 64 without a mask for four: the
// last scores are done with first, P takes their place and P V the place of the first ones. With a mask, DP = 64 has
// registers for an array of its own for P V (PIPELINED, with group scales of K and P against the tile's maximum), and its
// products run beside its own other work:
//
//     step j:  row maxima of S(j) | wait P V(j-1) | O += P V(j-1) beside the exponentials of S(j) to P
//              | issue S(j+1), P V(j)
//
// No branch stands between the sum and the exponentials, so that the compiler mixes them: exponentials alone leave the
// other pipes idle, a sum alone theirs. An item's last product is waited for, and its output written, between two steps.
//
// P never leaves registers. Lane 4r+q of an accumulator holds the keys 8i+2q, 8i+2q+1, an 8-bit A operand wants
// four neighbours 4q..4q+3: the quantiser stores V's keys in the order that makes the two coincide.
//
// What the compiler needs. A wgmma accumulator keeps its registers from its first use to its last, so exponentials
// are written over the scores they come from (elsewhere there is no room), every wait names the registers that it
// makes valid, and scalars are kept few: index arithmetic is done by the producers, or is the same in all lanes.
//
// Shared memory (dynamic, nothing static), ROWS = 64 * CONSUMERS:
//     Q         2 x ROWS * DP         two buffers: [warpgroup][DP / 128][64 rows][128 bytes], swizzled
//     K         STAGES x 128 * DP
//     V^T       STAGES x DP * 128
//     scales    STAGES x kAuxBytes    K scales of the tile, then V's when folded: their logarithms, their reciprocals
//     q_scale   2 x ROWS floats
//     v_scale   4 x DP floats
//     records   4 x kRecordBytes
//     deal      32 bytes
//     barriers  4 * STAGES + 6      2 * STAGES of them V's, unused where it comes and goes with K
//
// Compile-time constants (-D):
//     DP          64, 128, 256    padded head dimension
//     K_SCALE     kScaleToken (0) or kScaleGroup (1)
//     V_FOLDED    1: V has a scale per key, folded into the exponent
//     P_TILE_MAX  1: P against the tile's maximum; 0: against the running maximum
//     P_LEVELS    255 or 127
//     CONSUMERS   3, or 2; 4 with DP 64 and MASKED 0
//     STAGES      ring depth, a power of two
//     OUT_DTYPE   kFloat16 (0), kBFloat16 (1), kFloat32 (2)
//     OUT_PAIRS   1: the caller knows that D = DP, out_channel = 1, and that rows of out start at multiples of 16
//                 bytes, so that 16 bytes can be stored at once; 0: it may not be so
//     MASKED      0: the caller knows that every row sees every key and that Sk is a multiple of 128 (less code)
//
// Launch: 128 * (1 + CONSUMERS) threads, min(SMs, batches * heads * row_blocks) blocks, row_blocks = ceil(Sq / 64).
// Sq, Sk >= 1. `lse` and `lse_shift` may be null. The result does not depend on the grid: no atomics.

#include "output.cuh"
#include "softmax.cuh"
#include "wgmma_block.cuh"

namespace intfa {

// --- small arithmetic ---------------------------------------------------------------------------------------

// Largest of the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
    return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

__device__ __forceinline__ int quad_max(int x) {
    x = max(x, __shfl_xor_sync(kFullWarp, x, 1));
    return max(x, __shfl_xor_sync(kFullWarp, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 1);
    return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Largest of three, one instruction.
__device__ __forceinline__ int max3(int x, int y, int z) {
    return __vimax3_s32(x, y, z);
}

// Accumulator element of the n-th key of a word of P: the two rows alternate from word to word, and the four keys are
// 2q, 2q+1, 8+2q, 9+2q of the word's 16.
__device__ __forceinline__ constexpr int score_of(int word, int n) {
    return 8 * (word >> 1) + 2 * (word & 1) + 4 * (n >> 1) + (n & 1);
}

// The v-th word of P in the order in which they are made: kOrder.row_words of a row, then of the other.
__device__ __forceinline__ constexpr int word_of(int v) {
    if (kInPlace) return (v + 12) % 16;  // first those whose scores make room for all
    return v / (2 * kOrder.row_words) * (2 * kOrder.row_words) + v / kOrder.row_words % 2 + v % kOrder.row_words * 2;
}

// Row (0 or 1) of accumulator element i.
__device__ __forceinline__ constexpr int row_of(int i) {
    return i >> 1 & 1;
}

// --- consumer -----------------------------------------------------------------------------------------------

using Output = Element<OUT_DTYPE>;

// Place in a consumer's stream of tiles. The same in all lanes, and written so that the compiler can tell.
struct Cursor {
    Ring ring;
    int round = 0;
    unsigned first = 0, last = 0;        // the item's tiles, as counts of the ring
    int end = 0;                         // past the item's last tile; 0 past the last item
    bool idle = false;                   // the item has no rows for this warpgroup
    int plain_begin = 0, plain_end = 0;  // tiles of the item that need no mask
    unsigned query = 0;                  // descriptor of the item's queries
    unsigned scales = 0;                 // address of their scales
};

// What a step needs to know of its tile.
struct Place {
    Ring ring;
    int round, tile;
    bool last;  // of its item
    bool masked;
};

struct Consumer {
    const AttentionParams& p;
    const SharedMap& map;
    int group;         // warpgroup, from 0
    int lane;
    int row_in_block;  // first of the thread's two rows; the other is 8 below
    int quad;          // lane within a row
    unsigned query_low, key_low, value_low;  // descriptors
    unsigned never;    // 0, which the compiler cannot know

    // Accumulators, P and the state of the two rows.
    float o[DP / 2];    // in units of kUnitOfO
    unsigned own[kInPlace ? 1 : 16];  // P
    float standing[2];  // the shift that O and l stand at; kNowhere: the row has seen nothing
    float l[2];         // in O's unit unless V is folded; the lanes' shares make it up, but for whole_row()
    float count[2];     // V folded: c, which is l elsewhere
    float factor[2];    // of the product under way, from the bits of an integer to O
    Cursor at;

    __device__ __forceinline__ Consumer(const AttentionParams& p_, const SharedMap& map_, int group_, int thread)
        : p(p_), map(map_), group(group_), lane(thread & 31),
          row_in_block(group_ * kGroupRows + thread / 32 * 16 + (thread & 31) / 4), quad(thread & 3) {
        never = blockIdx.y;
        query_low = held(descriptor_low(map.query + group * kGroupRows * DP));
        key_low = held(descriptor_low(map.key));
        value_low = held(descriptor_low(map.value));
#pragma unroll
        for (int i = 0; i < DP / 2; ++i) o[i] = 0.0f;
        for (int r = 0; r < 2; ++r) factor[r] = 0.0f;
#pragma unroll
        for (unsigned& word : own) word = 0;
    }

    __device__ __forceinline__ void arrive(unsigned barrier) const {
        barrier_arrive_if(barrier, lane == 0);
    }

    // The same, of memory that the thread has loaded from. read: made of all that it loaded, which is then waited for.
    // An arrival alone orders the loads before it against other threads, not against bulk copies: some launches had a row
    // with what the next copy had brought.
    __device__ __forceinline__ void arrive_after(unsigned barrier, float read) const {
        arrive(barrier | (static_cast<unsigned>(__float_as_int(read)) & never));
    }

    // A value that is the same in all lanes, kept in a register: the compiler would work it out again at every use.
    static __device__ __forceinline__ int held(int x) { return __reduce_max_sync(kFullWarp, x); }

    // Waits for the queries of the item of this round, and takes from its record what the steps need.
    __device__ __forceinline__ void enter_item() {
        barrier_wait(map.query_full(at.round & 1), at.round >> 1 & 1);
        const int4 tiles = load_int4(map.record(at.round) + 16 * group);
        const int begin = held(tiles.x);
        at.idle = begin < 0;
        at.end = held(tiles.y);
        if (at.round > 0) at.ring.turn_back();
        at.first = at.ring.count;
        at.last = at.first + 8 * (at.end - (at.idle ? ~begin : begin) - 1);
        if (MASKED && PIPELINED) {
            at.plain_begin = held(tiles.z);
            at.plain_end = held(tiles.w);
        }
        at.query = query_low + (at.round & 1) * (kQueryBytes >> 4);
        at.scales = map.query_scale + ((at.round & 1) * kBlockRows + group * kGroupRows) * 4;
    }

    __device__ __forceinline__ Place place() const {
        const int tile = at.end - 1 - static_cast<int>(at.last - at.ring.count) / 8;
        int begin = at.plain_begin, end = at.plain_end;
        if (MASKED && !PIPELINED) {  // registers are short
            const int4 tiles = load_int4(map.record(at.round) + 16 * group);
            begin = held(tiles.z);
            end = held(tiles.w);
        }
        return {at.ring, at.round, tile, at.ring.count == at.last, MASKED && (tile < begin || tile >= end)};
    }

    // Half of an array of scores: the accumulator of 64 columns.
    template <int which>
    static __device__ __forceinline__ int (&half(int (&s)[64]))[32] {
        return reinterpret_cast<int(&)[32]>(s[32 * which]);
    }

    // Word w of P. In place: in the last 16 scores, which are done with first, in the order of word_of().
    __device__ __forceinline__ unsigned& prob(int (&s)[64], int w) {
        return kInPlace ? reinterpret_cast<unsigned&>(s[48 + (w + 4) % 16]) : own[kInPlace ? 0 : w];
    }

    // S = Q K^T of the cursor's tile. Past the last item the product repeats old data, so that the code has one path.
    __device__ __forceinline__ void issue_scores(int (&s)[64]) const {
        const unsigned a = at.query;
        const unsigned b = key_low + stage_offset(at.ring.stage(), kTileBytes >> 4);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DP / 32; ++k) {
            const unsigned step = k % 4 * kDescriptorStep32;
            const unsigned long long da = descriptor(a + k / 4 * (kGroupRows * 128 >> 4) + step, kScoreHigh);
            const unsigned long long db = descriptor(b + k / 4 * (kTileKeys * 128 >> 4) + step, kScoreHigh);
            if (kHalves && !kInPlace) {  // or the compiler would not use half of the array for something else
                wgmma_s8s8(half<0>(s), da, db, k > 0);
                wgmma_s8s8(half<1>(s), da, descriptor(b + (64 * kRowBytes >> 4) + step, kScoreHigh), k > 0);
            } else {
                wgmma_s8s8(s, da, db, k > 0);
            }
        }
        wgmma_commit();
    }

    // acc = P V of 2 n channels from the given one.
    template <int n>
    __device__ __forceinline__ void issue_values(int (&acc)[n], int (&s)[64], unsigned stage, int channel) {
        const unsigned b = value_low + stage_offset(stage, kTileBytes >> 4) + channel * (128 >> 4);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
            wgmma_u8u8(acc, &prob(s, 4 * k), descriptor(b + k * kDescriptorStep32, kValueHigh), k > 0);
        wgmma_commit();
    }

    // O += the product, from o[first] on.
    template <int n>
    __device__ __forceinline__ void add_product(const int (&acc)[n], int first) {
#pragma unroll
        for (int i = 0; i < n; ++i)
            o[first + i] = fmaf(__int_as_float(acc[i]), factor[row_of(i)], o[first + i]);
    }

    // The keys of the tile that row r of this thread sees, of the 32 that the thread holds: bit 2i + c is key
    // 8i + 2 quad + c.
    __device__ __forceinline__ unsigned visible_bits(const Place& place, int r) const {
        const int first = load_int4(map.record(place.round) + kRecordItem).x;
        const int t = opaque(threadIdx.x) % 128;  // worked out again, for want of registers in the loop
        const int row = PIPELINED ? row_in_block : group * kGroupRows + t / 32 * 16 + t % 32 / 4;
        const KeyRange keys = visible_keys(p, first + row + 8 * r);
        const int base = place.tile * kTileKeys + 2 * quad;
        return low_bits(keys.end - base) & ~low_bits(keys.begin - base);
    }

    // Bits of the thread's keys below a key relative to its first.
    static __device__ __forceinline__ unsigned low_bits(int key) {
        const int count = key <= 0 ? 0 : 2 * (key >> 3) + ((key & 7) < 2 ? key & 7 : 2);
        return count >= 32 ? 0xffffffffu : (1u << count) - 1u;
    }

    // Scores to floats: S * k_scale for a scale per token; with folded V the whole exponent.
    __device__ __forceinline__ void scale_scores(int (&s)[64], unsigned stage, const float (&scale)[2]) const {
        const unsigned aux = map.aux + stage_offset(stage, kAuxBytes);
#pragma unroll
        for (int j = 0; j < 64; j += 8) {
            const int i = K_SCALE == kScaleGroup ? j % 16 * 4 + j / 16 * 8 : j;  // for speed; for registers
            float x[8];
#pragma unroll
            for (int n = 0; n < 8; ++n) x[n] = static_cast<float>(s[i + n]);
            if (K_SCALE == kScaleToken) {
#pragma unroll
                for (int n = 0; n < 8; n += 4) {
                    const float2 key = load_float2(aux + 8 * quad + 8 * (i + n));
#pragma unroll
                    for (int c = 0; c < 4; ++c) x[n + c] *= c & 1 ? key.y : key.x;
                }
            }
            if (kFolded) {
                const float4 fold = load_float4(aux + kScaleBytes + 16 * quad + 8 * i);
#pragma unroll
                for (int n = 0; n < 8; ++n) x[n] = fmaf(x[n], scale[row_of(n)], of_key(fold, n));
            }
#pragma unroll
            for (int n = 0; n < 8; ++n) s[i + n] = __float_as_int(x[n]);
        }
    }

    // Of four values of keys that follow each other in V's order, that of accumulator element n.
    static __device__ __forceinline__ float of_key(const float4& x, int n) { return one_of(x, n / 4 * 2 + n % 2); }

    __device__ __forceinline__ void hide_scores(int (&s)[64], const Place& place) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const unsigned bits = visible_bits(place, r);
#pragma unroll
            for (int i = 2 * r; i < 64; i += 4) {
                s[i] = bits & 1u << (i - 2 * r) / 2 ? s[i] : kHidden;
                s[i + 1] = bits & 2u << (i - 2 * r) / 2 ? s[i + 1] : kHidden;
            }
        }
    }

    // Zero the probabilities of hidden keys: a tiny scale would let them through.
    __device__ __forceinline__ void hide_probabilities(int (&s)[64], const Place& place) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const unsigned bits = visible_bits(place, r);
#pragma unroll
            for (int w = r; w < 16; w += 2)
                prob(s, w) &= ((bits >> 2 * (w - r) & 15u) * 0x00204081u & 0x01010101u) * 255u;
        }
    }

    // Largest exponent of each of the two rows; -inf when the tile shows nothing. scale: to exponents. With folded V a
    // negative one may be wrong.
    template <bool masked>
    __device__ __forceinline__ void row_maxima(const int (&s)[64], const float (&scale)[2], float (&m)[2]) const {
        if (kRaw || kFolded) {
            // With folded V they are floats, which order like integers unless they are negative.
            int x[2][4];  // four chains a row, for the latency
#pragma unroll
            for (int i = 0; i < 64; i += 2) {
                int& y = x[row_of(i)][i / 4 % 4];
                y = i < 16 ? max(s[i], s[i + 1]) : max3(y, s[i], s[i + 1]);
            }
            int top[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) top[r] = max3(max(x[r][0], x[r][1]), x[r][2], x[r][3]);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (kFolded)
                    m[r] = __int_as_float(quad_max(top[r]));
                else
                    m[r] = masked && top[r] == kHidden ? -infinity() : static_cast<float>(top[r]) * scale[r];
            }
            if (kFolded) return;
        } else {
            float x[2][4];
#pragma unroll
            for (int i = 0; i < 64; i += 2) {
                float& y = x[row_of(i)][i / 4 % 4];
                const float z = fmaxf(__int_as_float(s[i]), __int_as_float(s[i + 1]));
                y = i < 16 ? z : fmaxf(y, z);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float y = fmaxf(fmaxf(x[r][0], x[r][1]), fmaxf(x[r][2], x[r][3]));
                m[r] = masked && y == __int_as_float(kHidden) ? -infinity() : y * scale[r];
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) m[r] = quad_max(m[r]);
    }

    // From the rows' maxima: the shift of the exponents, with which the largest becomes LEVELS. (Rounding may lift it
    // above: round_bytes stops there, at 255; 127 has room.) Of a row that the tile shows nothing, the one that O and l
    // stand at, for a factor of 1: P is hidden in any case.
    template <bool masked>
    __device__ __forceinline__ void choose_shift(const int (&s)[64], float (&m)[2], float (&shift)[2]) {
        to_shift<masked>(m, shift);
        if (kFolded) {  // one branch for all that is rare
            const bool negative = (__float_as_int(m[0]) | __float_as_int(m[1])) < 0;
            if (__builtin_expect(__any_sync(kFullWarp, negative || too_far(shift, 0) || too_far(shift, 1)), 0)) {
                maxima_of_floats(s, m);
                to_shift<masked>(m, shift);
                move_standing(shift);
            }
        } else if (!kTileMax) {
            move_standing(shift);
        }
        if (!kTileMax) {
#pragma unroll
            for (int r = 0; r < 2; ++r) shift[r] = standing[r];
        }
    }

    template <bool masked>
    __device__ __forceinline__ void to_shift(const float (&m)[2], float (&shift)[2]) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) shift[r] = masked && m[r] <= -kNowhere ? standing[r] : kLargest - m[r];
    }

    // With folded V, the rows' maxima whatever their signs.
    __device__ __forceinline__ void maxima_of_floats(const int (&s)[64], float (&m)[2]) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float y = -infinity();
#pragma unroll
            for (int i = 2 * r; i < 64; i += 4) y = fmaxf(y, fmaxf(__int_as_float(s[i]), __int_as_float(s[i + 1])));
            m[r] = quad_max(y);
        }
    }

    // Whether a tile's maximum is too far above that of where O and l are.
    __device__ __forceinline__ bool too_far(const float (&shift)[2], int r) const {
        return standing[r] - shift[r] > (kTileMax ? kReferenceSlack : 0.0f);
    }

    // If it is, O and l go to the tile's shift.
    __device__ __forceinline__ void move_standing(const float (&shift)[2]) {
        const bool grow[2] = {too_far(shift, 0), too_far(shift, 1)};
        if (!__builtin_expect(__any_sync(kFullWarp, grow[0] || grow[1]), 0)) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float down = grow[r] ? exp2_fast(shift[r] - standing[r]) : 1.0f;
            if (grow[r]) standing[r] = shift[r];
            l[r] *= down;
            if (kFolded) count[r] *= down;
#pragma unroll
            for (int i = 0; i < DP / 2; ++i)
                if (row_of(i) == r) o[i] *= down;
        }
    }

    // The sums of the two rows' P: of all lanes' keys if kSumByProduct, else of this lane's.
    __device__ __forceinline__ void sum_probabilities(int (&s)[64], int (&counted)[2]) {
        int part[2][4] = {};  // two chains, for the latency
        if (kSumByProduct) {
#pragma unroll
            for (int w = 0; w < 16; w += 4) add_row_sums(part[w / 8], &prob(s, w));
        } else {
#pragma unroll
            for (int w = 0; w < 16; ++w) {
                int& y = part[w / 8][2 * (w & 1)];
                y = static_cast<int>(__dp4a(prob(s, w), 0x01010101u, static_cast<unsigned>(y)));
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) counted[r] = part[0][2 * r] + part[1][2 * r];
    }

    // Of a sum over the keys of all tiles: that of the four lanes that share a row.
    static __device__ __forceinline__ float whole_row(float sum) { return kSumByProduct ? sum : quad_sum(sum); }

    // The factor of this tile's product, and l. sum: see exponentials(). Nothing that P waits for, so it can run beside
    // the product.
    __device__ __forceinline__ void settle(int (&s)[64], const float (&shift)[2], const float (&sum)[2]) {
        if (kTileMax && !kFolded) move_standing(shift);
        int counted[2];
        sum_probabilities(s, counted);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float up = kTileMax ? exp2_fast(standing[r] - shift[r]) : 1.0f;
            factor[r] = kProductRoom * up;
            float& c = kFolded ? count[r] : l[r];
            c = fmaf(__int_as_float(counted[r]), factor[r], c);
            if (kFolded) l[r] = fmaf(sum[r], up, l[r]);
        }
    }

    // x, but not before y is known. The bits that decide it are zero, which the compiler cannot know.
    __device__ __forceinline__ float after(float x, unsigned y) const {
        return __int_as_float(__float_as_int(x) | static_cast<int>(y & never));
    }

    // P from the scores, and with folded V this lane's sum of it before rounding, each over its key's scale of V. The
    // exponentials take the place of the scores: no further registers are free.
    template <bool masked>
    __device__ __forceinline__ void exponentials(int (&s)[64], const float (&scale)[2], const float (&shift)[2],
                                                 const Place& place, float (&sum)[2]) {
        const unsigned aux = map.aux + stage_offset(place.ring.stage(), kAuxBytes);
        const unsigned fold = aux + kScaleBytes + 4 * kTileKeys + 16 * quad;  // reciprocals of V's scales
        sum[0] = sum[1] = 0.0f;
        float shifts[2] = {shift[0], shift[1]};
#pragma unroll
        for (int first = 0; first < 16; first += kOrder.block_words) {
            if (first >= kOrder.chain * kOrder.block_words) {
#pragma unroll
                for (int v = first; v < first + min(kOrder.block_words, 2 * kOrder.row_words); v += kOrder.row_words) {
                    const int r = word_of(v) & 1;
                    shifts[r] = after(shifts[r], prob(s, word_of(v - kOrder.chain * kOrder.block_words)));
                }
            }
#pragma unroll
            for (int v = first; v < first + kOrder.block_words; ++v) {
                const int w = word_of(v);
                const int r = w & 1;
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    int& y = s[score_of(w, n)];
                    float x = kRaw ? static_cast<float>(y) : __int_as_float(y);
                    x = kFolded ? x + shifts[r] : fmaf(x, scale[r], shifts[r]);
                    y = __float_as_int(exp2_fast(x));
                }
            }
            if (kFolded) {
#pragma unroll
                for (int v = first; v < first + kOrder.block_words; v += 2) {
                    const int i = 4 * word_of(v);
                    const float4 value = load_float4(fold + 8 * i);
#pragma unroll
                    for (int n = 0; n < 8; ++n)
                        sum[row_of(n)] = fmaf(__int_as_float(s[i + n]), of_key(value, n), sum[row_of(n)]);
                }
            }
#pragma unroll
            for (int v = first; v < first + kOrder.block_words; ++v) {
                const int w = word_of(v);
                prob(s, w) = round_bytes(__int_as_float(s[score_of(w, 0)]), __int_as_float(s[score_of(w, 1)]),
                                         __int_as_float(s[score_of(w, 2)]), __int_as_float(s[score_of(w, 3)]));
            }
        }
        if (masked && !kFolded && __builtin_expect(place.masked, 0)) hide_probabilities(s, place);
    }

    // The rows of the cursor's item. The first tile that they see moves the reference.
    __device__ __forceinline__ void begin_item() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            standing[r] = kNowhere;
            l[r] = query_scale(r) * 0.0f;  // NaN for a poisoned row, and so it stays
            count[r] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < DP / 2; ++i) o[i] = 0.0f;
    }

    __device__ __forceinline__ void store_one(long long index, float x) const {
        static_cast<Output::type*>(p.out)[index] = Output::store(x);
    }

    // Writes the rows of the round-th item.
    __device__ __forceinline__ void finish_item(int round) const {
        const int4 item = load_int4(map.record(round) + kRecordItem);  // row, head, kv_head, batch
        const int batch = item.w;
        const int head = item.y;
        const int4 rest = load_int4(map.record(round) + kRecordGuard);
        const float guard = __int_as_float(rest.x);
        const int groups = rest.y;
        const unsigned v_scale = map.value_scale + (round % kItemSlots * DP + 2 * quad) * 4;
        float inverse[2], bias[2];
        bool inside[2];
        long long index[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = item.x + row_in_block + 8 * r;
            inside[r] = row < p.queries && row_in_block < groups * kGroupRows;
            bool sees = true;
            if (MASKED) {
                const KeyRange keys = visible_keys(p, row);
                sees = keys.begin < keys.end;
            }
            const float sum = kFolded ? quad_sum(l[r]) : whole_row(l[r]);
            const float total = kFolded ? sum : sum * (1.0f / kUnitOfO);
            // A row that sees a key has a sum, unless its scores are beyond what floats can tell apart.
            const float reference = kLargest - standing[r];
            const bool lost = sees && !(total > 0.0f && fabsf(reference) < kLostExponent);
            const float poisoned = lost ? not_a_number() : guard + total * 0.0f;
            inverse[r] = finish_factor(total, poisoned) * (1.0f / kUnitOfO);
            bias[r] = kValueBias * (kFolded ? whole_row(count[r]) : sum);
            index[r] = batch * p.out_batch + (head - batch * p.heads) * p.out_head + row * p.out_row;
            if (p.lse != nullptr && quad == 0 && inside[r]) {
                const long long at_row = static_cast<long long>(head) * p.queries + row;
                const float offset = p.lse_shift != nullptr ? p.lse_shift[at_row] * p.scale : 0.0f;
                const float from = reference - (kFolded ? kFoldOffset : 0.0f);
                p.lse[at_row] = log_sum_exp(from, total, kLevels, offset, poisoned);
            }
        }
        if (OUT_PAIRS) {
#pragma unroll
            for (int i = 0; i < DP / 8; i += 4) {
                float2 scale[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) scale[n] = load_float2(v_scale + 32 * (i + n));
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    Output::Pair pair[4];
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const float* x = o + 4 * (i + n) + 2 * r;
                        pair[n] = Output::store_pair<kSaturateAtOnce>((x[0] - bias[r]) * inverse[r] * scale[n].x,
                                                                      (x[1] - bias[r]) * inverse[r] * scale[n].y);
                    }
                    store_pairs(pair, static_cast<Output::type*>(p.out) + index[r] + 8 * i, quad, inside[r]);
                }
            }
        } else {
#pragma unroll
            for (int r = 0; r < 2; ++r) index[r] += 2 * quad * p.out_channel;
#pragma unroll
            for (int i = 0; i < DP / 8; ++i) {
                const float2 scale = load_float2(v_scale + 32 * i);
                const int channel = 8 * i + 2 * quad;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float* x = o + 4 * i + 2 * r;
                    if (inside[r] && channel < p.channels)
                        store_one(index[r], (x[0] - bias[r]) * inverse[r] * scale.x);
                    if (inside[r] && channel + 1 < p.channels)
                        store_one(index[r] + p.out_channel, (x[1] - bias[r]) * inverse[r] * scale.y);
                    index[r] += 8 * p.out_channel;
                }
            }
        }
    }

    // Of row r of this thread, with the softmax scale in it: see query_scale_place().
    __device__ __forceinline__ float query_scale(int r) const {
        return load_float(at.scales + (threadIdx.x & 0x7cu) + 128 * r);
    }

    // The scales of the two rows for the cursor's tile; token scales of K come in later.
    __device__ __forceinline__ void read_scales(float (&scale)[2]) const {
        const unsigned aux = map.aux + stage_offset(at.ring.stage(), kAuxBytes);
        const float key_scale = K_SCALE == kScaleGroup ? load_float(aux + 4 * quad) : 1.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) scale[r] = query_scale(r) * key_scale;
    }

    // From S to the row maxima: everything of a step before the product under way is needed. scale: of the two rows.
    template <bool masked>
    __device__ __forceinline__ void first_half(int (&s)[64], const Place& place, const float (&scale)[2],
                                               float (&m)[2]) {
        if (kRaw && !kTogether) arrive_after(map.key_empty(place.ring.stage()), scale[0]);
        if (!kRaw) scale_scores(s, place.ring.stage(), scale);
        if (masked && __builtin_expect(place.masked, 0)) hide_scores(s, place);
        row_maxima<masked>(s, scale, m);
    }

    __device__ __forceinline__ bool value_here(const Place& place) const {
        return barrier_test(map.value_full(place.ring.stage()), place.ring.phase());
    }

    __device__ __forceinline__ bool next_key_ready() const {
        Ring next = at.ring;
        next.advance();
        return barrier_test(map.key_full(next.stage()), next.phase());
    }

    __device__ __forceinline__ void wait_key(bool ready) const {
        if (!ready && at.end != 0) barrier_wait(map.key_full(at.ring.stage()), at.ring.phase());
    }

    // From the row maxima to P. sum: see exponentials().
    template <bool masked>
    __device__ __forceinline__ void second_half(int (&s)[64], const Place& place, const float (&scale)[2],
                                                float (&m)[2], float (&shift)[2], float (&sum)[2]) {
        bool value_ready = kTogether;
        if (!kTogether && !kTestLate) value_ready = value_here(place);
        choose_shift<masked>(s, m, shift);
        exponentials<masked>(s, scale, shift, place, sum);
        if (!kTogether && kTestLate) value_ready = value_here(place);
        if (!value_ready) barrier_wait(map.value_full(place.ring.stage()), place.ring.phase());
    }

    // After an item's last scores. Its scales have been read long before.
    __device__ __forceinline__ void leave_queries() const { arrive(map.query_empty(at.round & 1)); }

    // Of an item that has no rows for this warpgroup, goes by all tiles but the last, giving back what the others work
    // on. The last one is worked out, for nothing, so that all items end alike.
    __device__ __forceinline__ void pass_tiles() {
#pragma unroll 1
        while (at.ring.count != at.last) {
            if (PIPELINED && at.ring.count > 0) arrive(map.value_empty(at.ring.previous_stage()));
            wait_key(false);
            if (!kTogether) {
                arrive(map.key_empty(at.ring.stage()));
                barrier_wait(map.value_full(at.ring.stage()), at.ring.phase());
            }
            if (!PIPELINED) arrive(map.value_empty(at.ring.stage()));
            at.ring.advance();
        }
        at.first = at.last;
        wait_key(false);
    }

#if PIPELINED
    // S becomes P, and the product before is added to O. masked: the tile needs a mask.
    template <bool masked>
    __device__ __forceinline__ void probabilities(int (&s)[64], int (&product)[32], const Place& here,
                                                  const float (&scale)[2], float (&shift)[2], float (&sum)[2]) {
        float m[2];
        if (!masked) first_half<masked>(s, here, scale, m);
        wgmma_wait<0>(product, own);
        if (here.ring.count > 0) arrive(map.value_empty(here.ring.previous_stage()));
        add_product(product, 0);
        if (masked) first_half<masked>(s, here, scale, m);  // hiding scores needs the product's registers
        second_half<masked>(s, here, scale, m, shift, sum);
    }

    // A step of the pipeline: S of the cursor's tile is in s, the product of the tile before under way. S of the next
    // tile and the tile's own product follow.
    __device__ __forceinline__ void step(int (&s)[64], int (&product)[32]) {
        float scale[2], shift[2], sum[2];
        const Place here = place();
        // With a mask the answer costs a register too many for so long.
        bool key_ready = !MASKED && next_key_ready();
        read_scales(scale);
        if (MASKED && __builtin_expect(here.masked, 0))
            probabilities<true>(s, product, here, scale, shift, sum);
        else
            probabilities<false>(s, product, here, scale, shift, sum);
        if (MASKED) key_ready = next_key_ready();
        if (!kSettleLate) settle(s, shift, sum);
        at.ring.advance();
        if (__builtin_expect(here.last, 0)) {
            leave_queries();
            ++at.round;
            enter_item();
        }
        wait_key(key_ready);
        issue_scores(s);
        issue_values(product, s, here.ring.stage(), 0);
        if (kSettleLate) settle(s, shift, sum);
    }

    // At the first tile of an item: ends the item before, whose last product is under way. True past the last item.
    __device__ __forceinline__ bool change_item(int (&product)[32]) {
        wgmma_wait<0>(product, own);
        if (at.round > 0) {
            add_product(product, 0);
            finish_item(at.round - 1);
        }
        if (at.end == 0) return true;
        if (at.idle) pass_tiles();
        begin_item();
#pragma unroll
        for (int i = 0; i < 32; ++i) product[i] = 0;  // it is in O
        // The next step adds it once more, with this factor: NaN, after a lost row, would make NaN of it. (A factor set
        // to 0 would do as well, but makes the compiler order all steps otherwise than they were measured.)
        for (int r = 0; r < 2; ++r) factor[r] = fminf(factor[r], 0x1p126f);
        return false;
    }

    __device__ __forceinline__ void run() {
        int s[64], product[32];
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) product[i] = 0;
        enter_item();
        if (at.end == 0) return;
        wait_key(false);
        issue_scores(s);
        wgmma_wait<0>(s);
        while (true) {
            wgmma_wait<1>(s);
            if (__builtin_expect(at.ring.count == at.first, 0))
                if (change_item(product)) break;
            step(s, product);
        }
    }
#else
    // Gives back what lies beside K, too, if the exponentials read it: then l has all that was read in it.
    __device__ __forceinline__ void settle_and_leave(int (&s)[64], const float (&shift)[2], const float (&sum)[2],
                                                     const Place& place) {
        settle(s, shift, sum);
        if (!kRaw && !kTogether) arrive_after(map.key_empty(place.ring.stage()), l[0]);
    }

    // After the product. What was loaded from beside K and V is in it, or (the reciprocals of V's scales) in l.
    __device__ __forceinline__ void leave_values(unsigned stage) const {
        if (kFolded && kTogether)
            arrive_after(map.value_empty(stage), l[0]);
        else
            arrive(map.value_empty(stage));
    }

    // What a product takes of the array that the scores were in.
    static __device__ __forceinline__ auto& product_of(int (&s)[64]) {
        if constexpr (kHalves)
            return half<kInPlace ? 0 : 1>(s);
        else
            return s;
    }

    // P and its product, which is part of s or is s.
    template <int n>
    __device__ __forceinline__ void wait_values(int (&product)[n], int (&s)[64]) {
        if constexpr (n < 64 && kInPlace)
            wgmma_wait<0>(s);
        else
            wgmma_wait<0>(product, own);
    }

    __device__ __forceinline__ void run() {
        int s[64];
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] = 0;
        for (;; ++at.round) {
            enter_item();
            if (at.end == 0) break;
            if (at.idle) pass_tiles();
            begin_item();
            wait_key(false);
            issue_scores(s);
            while (true) {
                float scale[2], m[2], shift[2], sum[2];
                const Place here = place();
                if (kScalesFirst) read_scales(scale);
                wgmma_wait<0>(s);
                if (!kScalesFirst) read_scales(scale);
                first_half<MASKED>(s, here, scale, m);
                bool key_ready = false;
                if (!kTestLate) key_ready = next_key_ready();
                second_half<MASKED>(s, here, scale, m, shift, sum);
                if (!kSettleLate) settle_and_leave(s, shift, sum, here);
                if (kTestLate) key_ready = next_key_ready();
                constexpr int width = kHalves ? 64 : 128;  // channels of a product
#pragma unroll
                for (int channel = 0; channel < DP; channel += width) {
                    auto& product = product_of(s);
                    issue_values(product, s, here.ring.stage(), channel);
                    if (kSettleLate && channel == 0) settle_and_leave(s, shift, sum, here);
                    wait_values(product, s);
                    add_product(product, channel / 2);
                }
                leave_values(here.ring.stage());
                at.ring.advance();
                if (here.last) break;
                wait_key(key_ready);
                issue_scores(s);
            }
            leave_queries();
            finish_item(at.round);
        }
    }
#endif
};

}  // namespace intfa

extern "C" __global__ void __launch_bounds__(intfa::kThreads, 1)
    attention_wgmma(const __grid_constant__ intfa::AttentionParams p) {
    using namespace intfa;
    extern __shared__ __align__(1024) unsigned char shared[];
    const SharedMap map(shared_address(shared));
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < 8 * kStages; i += 8) {
            barrier_init(map.key_full(i), 1);
            barrier_init(map.key_empty(i), 4 * kConsumers);
            if (kTogether) continue;
            barrier_init(map.value_full(i), 1);
            barrier_init(map.value_empty(i), 4 * kConsumers);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(map.query_full(i), kQueryLoaders);
            barrier_init(map.query_empty(i), 4 * kConsumers);
            barrier_init(map.record_full(i), 1);
        }
        barrier_init_fence();
        plan_deal(p, map);
    }
    __syncthreads();
    const int thread = threadIdx.x % 128;
    if (threadIdx.x < 128) {
        registers_release<kProducerRegisters>();
        if (thread >= 64)
            produce_queries(p, map, thread - 64);
        else if (thread == 32)
            produce_records(p, map);
        else if (thread == 0)
            produce_tiles(p, map);
    } else {
        registers_claim<kConsumerRegisters>();
        // The result of a warp reduction is known to be the same in all lanes.
        const int group = static_cast<int>(__reduce_max_sync(kFullWarp, threadIdx.x / 128)) - 1;
        Consumer consumer(p, map, group, thread);
        consumer.run();
    }
}
