// Quantisation of Q, K and V into the packed format that every attention kernel reads (intfa_cupy/packing.py).
//
// Three launches, or four, each one pass over memory; only what the recipe and the caller ask for is compiled in:
//   quantize_statistics   reads K (sum, range per channel), Q (range per channel) and V (range per channel, or per
//                         key), and leaves a partial result per chunk of rows
//   quantize_finish       one block per key/value head puts the partial results together, in a fixed order: K's mean,
//                         the channel factors, V's scales
//   quantize_ranges       where Q or K has one scale per head: reads them again, prepared as below, for their range
//   quantize_pack         reads Q, K and V again, prepares (mean, factors, Hadamard rotation), rounds and packs them
//
// The arithmetic is float32 in the order that intfa_cupy/quantize.py states, without contraction into FMA, so that
// both give the same integers from the same statistics. Nothing depends on the order in which blocks run.
//
// Neighbouring lanes of a warp hold a row: 8 channels each for statistics and V, 32 each for the packing of Q and K,
// where a row's range and most of the rotation's stages want few shuffles.

#include "quantize_pack.cuh"
#include "quantize_statistics.cuh"

using namespace intfa;

// Blocks: the chunks of K, then those of Q, then those of V, as far as the recipe needs them.
extern "C" __global__ void __launch_bounds__(kStatisticsThreads) quantize_statistics(const QuantizeParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    float* const shared = reinterpret_cast<float*>(shared_memory);
    int block = blockIdx.x;
    if (kKeyStatistics) {
        const int blocks = p.batches * p.kv_heads * p.k_chunks;
        if (block < blocks) return key_statistics(p, block / p.k_chunks, block % p.k_chunks, shared);
        block -= blocks;
    }
    if (kQueryStatistics) {
        const int blocks = p.batches * p.heads * p.q_chunks;
        if (block < blocks) return query_statistics(p, block / p.q_chunks, block % p.q_chunks, shared);
        block -= blocks;
    }
    value_statistics(p, block / p.k_chunks, block % p.k_chunks, shared);
}

// One block per key/value head.
extern "C" __global__ void __launch_bounds__(kFinishThreads) quantize_finish(const QuantizeParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    double* const shared = reinterpret_cast<double*>(shared_memory);
    if (kKeyStatistics) finish_keys(p, blockIdx.x, shared);
    finish_values(p, blockIdx.x, shared);
}

// Blocks: the tiles of K, then the blocks of 128 rows of Q. Empty where there is no scale per head.
extern "C" __global__ void __launch_bounds__(kPackThreads, kPackBlocks) quantize_ranges(const QuantizeParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    if constexpr (kHeadRanges) {
        float* const shared = reinterpret_cast<float*>(shared_memory);
        const int block = blockIdx.x, blocks = p.batches * p.kv_heads * p.tiles;
        if (block < blocks)
            key_range(p, block / p.tiles, block % p.tiles, shared);
        else
            query_range(p, (block - blocks) / query_tiles(p), (block - blocks) % query_tiles(p), shared);
    }
}

// Blocks: the tiles of V, then those of K, then the blocks of 128 rows of Q. (Taking turns is slower: the three do not
// fit the instruction cache together.)
extern "C" __global__ void __launch_bounds__(kPackThreads, kPackBlocks) quantize_pack(const QuantizeParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    float* const shared = reinterpret_cast<float*>(shared_memory);
    int block = blockIdx.x;
    const int blocks = p.batches * p.kv_heads * p.tiles;
    if (block < blocks) return pack_values(p, block / p.tiles, block % p.tiles, shared);
    block -= blocks;
    if (block < blocks) return pack_keys(p, block / p.tiles, block % p.tiles, shared);
    block -= blocks;
    pack_queries(p, block / query_tiles(p), block % query_tiles(p), shared);
}
