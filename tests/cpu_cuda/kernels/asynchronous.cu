// Asynchronous copies and products, and barriers of some of a block's threads: right when bad = 0; any other number
// is a mistake.
#include "copy.cuh"
#include "wgmma.cuh"

using namespace intfa;

// C (64, 128) = A (64, 128) B^T, B (128, 128), by one warpgroup.
extern "C" __global__ void product(const signed char* a, const signed char* b, int* out, int bad) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned a_shared = shared_address(shared), b_shared = a_shared + 64 * 128;
    for (int c = threadIdx.x; c < (64 + 128) * 8; c += 128) {
        const int row = c / 8, chunk = c % 8;
        const signed char* source = row < 64 ? a + row * 128 : b + (row - 64) * 128;
        copy16_async(a_shared + row * 128 + ((chunk ^ row % 8) << 4), source + chunk * 16, true);
    }
    copies_wait();
    __syncthreads();
    int acc[64] = {};
    if (bad != 1) wgmma_fence();
    for (int k = 0; k < 4; ++k) {
        const unsigned step = k * kDescriptorStep32, high = descriptor_high(128);
        wgmma_s8s8(acc, descriptor(descriptor_low(a_shared) + step, high),
                   descriptor(descriptor_low(b_shared) + step, high), k > 0);
    }
    wgmma_commit();
    if (bad == 2) store_int4(a_shared + threadIdx.x * 16, 0, 0, 0, 0);
    if (bad != 3) wgmma_wait<0>(acc);
    for (int i = 0; i < 64; ++i) {
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
        out[row * 128 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = acc[i];
    }
}

// 128 numbers through a buffer of 64.
extern "C" __global__ void transfer(const int* in, int* out, int bad) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned barrier = shared_address(shared), data = barrier + 16;
    if (threadIdx.x == 0) barrier_init(barrier, bad == 1 ? 2 : 1);
    __syncthreads();
    for (int round = 0; round < 2; ++round) {
        if (threadIdx.x == 0) {
            barrier_expect(barrier, 256);
            if (bad == 2) barrier_arrive(barrier);
            bulk_copy(data, in + 64 * round + (bad == 3), 256, barrier);
        }
        if (bad != 4) barrier_wait(barrier, round);
        out[64 * round + threadIdx.x] = load_int4(data + threadIdx.x / 4 * 16).x + static_cast<int>(threadIdx.x % 4);
        if (bad != 5) __syncthreads();
    }
}
