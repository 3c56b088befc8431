// Quantisation of Q, K and V into the packed format that every attention kernel reads (intfa_cupy/packing.py).
//
// Three launches, or four, each one pass over memory; only what the recipe and the caller ask for is compiled in:
//   quantize_statistics   reads Q (range per channel), K (sum, range per channel) and V (range per channel, or per
//                         key), and leaves a partial result per chunk of rows
//   quantize_finish       one block per key/value head puts the partial results together, in a fixed order: K's mean,
//                         the channel factors, V's scales
//   quantize_ranges       where Q or K has one scale per head: reads them again, prepared as below, for their range
//   quantize_pack         reads V, K and Q again, prepares (mean, factors, Hadamard rotation), rounds and packs them
//
// The arithmetic is float32 in the order that intfa_cupy/quantize.py states, an FMA only where it says so, so that
// both give the same integers from the same statistics. Nothing depends on the order in which blocks run.
//
// Neighbouring lanes of a warp hold a row: 8 channels each for statistics and V, 32 each for the packing of Q and K,
// where a row's range and most of the rotation's stages want few shuffles.

#include "quantize_pack.cuh"
#include "quantize_statistics.cuh"

using namespace intfa;

// Blocks: the chunks of Q, then those of K, then those of V, as far as the recipe needs them.
extern "C" __global__ void __launch_bounds__(kStatisticsThreads) quantize_statistics(const QuantizeParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    float* const shared = reinterpret_cast<float*>(shared_memory);
    int block = blockIdx.x;
    if (kQueryStatistics) {
        const int blocks = p.batches * p.heads * p.q_chunks;
        if (block < blocks) return query_statistics(p, block / p.q_chunks, block % p.q_chunks, shared);
        block -= blocks;
    }
    const int blocks = p.batches * p.kv_heads * p.k_chunks;
    if (kKeyStatistics) {
        if (block < blocks) return key_statistics(p, block / p.k_chunks, block % p.k_chunks, shared);
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

// Blocks: the tiles of V, then those of K, then the blocks of 128 rows of Q, each from the last to the first: the order
// of quantize_statistics backwards, since what it read last may still be in the L2 cache. (Taking turns is slower: the
// three do not fit the instruction cache together.)
extern "C" __global__ void __launch_bounds__(kPackThreads, kPackBlocks) quantize_pack(const QuantizeParams p) {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    float* const shared = reinterpret_cast<float*>(shared_memory);
    const int block = gridDim.x - 1 - blockIdx.x;
    const int tiles = p.batches * p.kv_heads * p.tiles, values = gridDim.x - tiles, keys = values - tiles;
    if (block >= values) return pack_values(p, (block - values) / p.tiles, (block - values) % p.tiles, shared);
    if (block >= keys) return pack_keys(p, (block - keys) / p.tiles, (block - keys) % p.tiles, shared);
    pack_queries(p, block / query_tiles(p), block % query_tiles(p), shared);
}
