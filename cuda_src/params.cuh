// The arguments of every kernel, as plain data. intfa_cupy/gpu/params.py mirrors both structs field by field as NumPy
// structured types; a test compares sizes and offsets. Keep 8-byte fields first, so that no padding appears.
#pragma once

namespace intfa {

// Element types of inputs and outputs.
constexpr int kFloat16 = 0;
constexpr int kBFloat16 = 1;
constexpr int kFloat32 = 2;

// What elements of Q, K, P or V are stored as.
constexpr int kInt8 = 0;
constexpr int kInt4 = 1;   // two to a byte: of 32 channels byte c holds channel c below and channel 16 + c above
constexpr int kHalf = 2;
constexpr int kBrain = 3;  // bfloat16
constexpr int kE4M3 = 4;
constexpr int kE5M2 = 5;

constexpr int format_bits(int format) {
    return format == kInt4 ? 4 : format == kHalf || format == kBrain ? 16 : 8;
}

// What one scale of Q or K covers.
constexpr int kScaleToken = 0;    // one query or key
constexpr int kScaleGroup = 1;    // K: the 32 keys j of a tile with the same (j % 8) / 2
constexpr int kScaleTile = 2;     // K: the 128 keys of a tile
constexpr int kScaleChannel = 3;  // one query or key and 32 channels
constexpr int kScaleHead = 4;     // a head
constexpr int kScaleNone = 5;     // there is none: it is 1

// What one scale of V covers.
constexpr int kValueChannel = 0;  // one channel of a head
constexpr int kValueHead = 1;     // a head
constexpr int kValueToken = 2;    // one key; folded into the exponent
constexpr int kValueNone = 3;     // there is none: it is 1

// Keys of one tile, aligned to absolute key 0. P is quantised within a tile.
constexpr int kTileKeys = 128;

// Added to the logarithms of folded V's scales: most exponents are then positive, and order like integers.
constexpr float kFoldOffset = 32.0f;

// A window side without bound.
constexpr int kUnbounded = 0x7fffffff;

// Shapes below: B batches, H query heads, Hkv key/value heads (H a multiple), Sq queries, Sk keys, D channels,
// Dp = D rounded up to 64, 128 or 256, nT = ceil(Sk / 128).
struct AttentionParams {
    const signed char* q;     // (B, H, Sq, Dp) plain rows, zero beyond D
    const float* q_scale;     // (B, H, Sq), channel (B, H, Sq, Dp / 32); NaN marks a row with a non-finite query
    const signed char* k;     // (B, Hkv, nT, 128 rows of Dp elements) swizzled tiles
    const float* k_scale;     // token (B, Hkv, nT * 128), group (B, Hkv, nT, 4), tile (B, Hkv, nT),
                              // channel (B, Hkv, nT, Dp / 32, 128), head and none (B, Hkv)
    const void* v;            // (B, Hkv, nT, Dp * 128) transposed swizzled tiles of bytes, or 16-bit rows
                              // (B, Hkv, nT * 128, Dp)
    const float* v_scale;     // (B, Hkv, Dp)
    const float* v_fold;      // (B, Hkv, nT, 2, 128) kFoldOffset + log2(sv / head), then head / sv, each in the order of
                              // V's keys; or null
    const float* guard;       // (B, Hkv): 0, or NaN where a key or value is not finite
    const float* lse_shift;   // (B, H, Sq): q . mean(K), or null when K was not smoothed or lse is null
    void* out;                // (B, H, Sq, D) at the strides below
    float* lse;               // (B, H, Sq) contiguous, or null
    long long out_batch;      // strides of out in elements
    long long out_head;
    long long out_row;
    long long out_channel;
    int batches;              // B
    int heads;                // H
    int kv_heads;             // Hkv
    int queries;              // Sq
    int keys;                 // Sk
    int channels;             // D
    int tiles;                // nT
    int row_blocks;           // blocks of query rows per head: ceil(Sq / rows of a block; wgmma: of a warpgroup, 64)
    int left;                 // keys before the diagonal that a row sees, or kUnbounded
    int right;                // keys after it (0: causal), or kUnbounded
    float scale;              // softmax scale
    float scale_log2;         // scale * log2(e)
};

// A strided input of the quantiser: element (b, h, s, d) is at data[b*batch + h*head + s*row + d*channel].
struct Strided {
    const void* data;
    long long batch;
    long long head;
    long long row;
    long long channel;
};

struct QuantizeParams {
    Strided q;
    Strided k;
    Strided v;
    // statistics of a chunk of rows: nQ chunks per head of q, nK per head of k and v
    float* q_partial;         // (B, H, nQ, Dp) largest finite |q| per channel
    float* k_partial;         // (B, Hkv, nK, 3, Dp) sum, smallest, largest per channel
    float* v_partial;         // (B, Hkv, nK, Dp) largest |v| per channel; token: (B, Hkv, nK, 2) sum and largest of v_token
    // and of tiles of 128 rows, where Q or K has one scale per head, else null
    float* q_range;           // (B, H, ceil(Sq / 128)) largest finite |q| after preparation
    float* k_range;           // (B, Hkv, nT) largest |k| after preparation
    // statistics of a head
    float* k_mean;            // (B, Hkv, Dp), or null
    float* equalizer;         // (B, Hkv, 2, Dp): c and 1 / c, or null
    float* v_statistic;       // (B, Hkv, Dp) largest |v| per channel; head: the same for all; token: [0] is the floor
    // results; see AttentionParams
    void* q8;
    float* q_scale;
    float* q_head_scale;      // (B, H) where Q has a scale per head, or null
    float* lse_shift;         // or null where nobody wants the log-sum-exp
    void* k8;
    float* k_scale;
    void* v8;
    float* v_scale;
    float* v_fold;
    float* v_token;           // token: (B, Hkv, nT * 128) largest |v| of each key, in the end its scale
    float* guard;
    int batches;
    int heads;
    int kv_heads;
    int queries;
    int keys;
    int channels;
    int tiles;                // nT
    int q_chunks;             // nQ
    int k_chunks;             // nK
    int vector_q;             // 1: rows of q can be read 16 bytes at a time
    int vector_k;
    int vector_v;
};

}  // namespace intfa
