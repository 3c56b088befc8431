// Kernels with one mistake each, behind a switch: bad == 0 is correct, bad != 0 must be caught.
#include <mma.h>

namespace wmma = nvcuda::wmma;

// The barrier between writing and reading another warp's word is missing.
extern "C" __global__ void missing_barrier(int* out, int bad) {
    __shared__ int words[64];
    words[threadIdx.x] = 0;
    __syncthreads();
    words[threadIdx.x] = threadIdx.x;
    if (!bad) __syncthreads();
    out[threadIdx.x] = words[63 - threadIdx.x];
}

// The barrier between reading a buffer and filling it again is missing.
extern "C" __global__ void missing_second_barrier(const int* in, int* out, int steps, int bad) {
    __shared__ int words[64];
    int sum = 0;
    for (int step = 0; step < steps; ++step) {
        words[threadIdx.x] = in[step * 64 + threadIdx.x];
        __syncthreads();
        sum += words[(threadIdx.x + 32) % 64];
        if (!bad) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

// Lanes of one warp exchange words without __syncwarp; a shuffle in between does not order memory.
extern "C" __global__ void missing_warp_barrier(int* out, int bad) {
    __shared__ int words[32];
    words[threadIdx.x] = 0;
    __syncwarp();
    words[threadIdx.x] = threadIdx.x;
    const int lane = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 31 - threadIdx.x);
    if (!bad) __syncwarp();
    out[threadIdx.x] = words[lane];
}

// A fragment is loaded from what the lanes have just written.
extern "C" __global__ void missing_fragment_barrier(int* out, int bad) {
    __shared__ __align__(32) int tile[256];
    for (int i = threadIdx.x; i < 256; i += 32) tile[i] = i;
    if (!bad) __syncwarp();
    wmma::fragment<wmma::accumulator, 16, 16, 16, int> f;
    wmma::load_matrix_sync(f, tile, 16, wmma::mem_row_major);
    wmma::store_matrix_sync(out, f, 16, wmma::mem_row_major);
}

// Two blocks write the same element.
extern "C" __global__ void blocks_collide(int* out, int bad) {
    out[bad ? threadIdx.x : blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x;
}

// Threads of several warps raise one flag: harmless if they all write the same value.
extern "C" __global__ void one_flag(int* out, int bad) { out[0] = bad ? threadIdx.x : 7; }

// A block reads what another block writes.
extern "C" __global__ void blocks_communicate(int* x, int bad) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int n = gridDim.x * blockDim.x;
    x[i] += bad ? x[(i + blockDim.x) % n] : 1;
}

extern "C" __global__ void global_read(const float* x, float* out, int n, int bad) {
    const int i = threadIdx.x + bad;
    if (i < n + bad) out[threadIdx.x] = x[i];
}

extern "C" __global__ void global_write(float* out, int bad) { out[static_cast<int>(threadIdx.x) - bad] = 1; }

// A 16-byte load whose last bytes are not part of the row.
extern "C" __global__ void wide_read(const unsigned char* x, uint4* out, int row, int bad) {
    out[threadIdx.x] = *reinterpret_cast<const uint4*>(x + threadIdx.x * row + 16 * bad);
}

extern "C" __global__ void shared_read(int* out, int bad) {
    extern __shared__ int words[];
    words[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = words[threadIdx.x + bad];
}

// Past the end of a static variable. Only an index shows it: there is no red zone between such variables.
extern "C" __global__ void static_shared_write(int* out, int bad) {
    __shared__ int words[32];
    words[threadIdx.x + bad] = 1;
    __syncthreads();
    out[threadIdx.x] = words[threadIdx.x];
}

extern "C" __global__ void fragment_read(const signed char* x, int* out, int bad) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, signed char, wmma::row_major> a;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, signed char, wmma::col_major> b;
    wmma::fragment<wmma::accumulator, 16, 16, 16, int> c;
    wmma::fill_fragment(c, 0);
    wmma::load_matrix_sync(a, x, 16);
    wmma::load_matrix_sync(b, x, 16 + 16 * bad);
    wmma::mma_sync(c, a, b, c);
    wmma::store_matrix_sync(out, c, 16, wmma::mem_row_major);
}

extern "C" __global__ void misaligned_fragment(const signed char* x, int* out, int bad) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, signed char, wmma::row_major> a;
    wmma::load_matrix_sync(a, x + 8 * bad, 16);
    if (threadIdx.x == 0) out[0] = a.x[0];
}

extern "C" __global__ void null_pointer(int* out, int bad) {
    int* const p = bad ? nullptr : out;
    if (threadIdx.x == 9) *p = 1;
}

extern "C" __global__ void wild_pointer(int* out, int bad) {
    int* const p = bad ? reinterpret_cast<int*>(std::uintptr_t{0x123456789000}) : out;
    p[threadIdx.x] = 1;
}

// A pointer to a local variable, handed to another thread.
extern "C" __global__ void foreign_local(int* out, int bad) {
    __shared__ int* pointers[32];
    int local = threadIdx.x;
    pointers[threadIdx.x] = bad ? &local : out + threadIdx.x;
    __syncthreads();
    *pointers[31 - threadIdx.x] = 1;
    __syncthreads();
    if (local < 0) out[0] = local;
}

extern "C" __global__ void uninitialised_shared(int* out, int bad) {
    __shared__ int words[32];
    if (!bad || threadIdx.x != 5) words[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = words[31 - threadIdx.x];
}

extern "C" __global__ void uninitialised_global(const int* x, int* scratch, int* out, int bad) {
    if (!bad) scratch[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = scratch[threadIdx.x];
}

// Half of a warp, or of the block, stands at another barrier.
extern "C" __global__ void divergent_barrier(int* out, int bad) {
    if (bad ? threadIdx.x % 2 == 0 : true) __syncthreads();
    out[threadIdx.x] = 1;
    __syncthreads();
}

extern "C" __global__ void divergent_warps(int* out, int bad) {
    if (bad && threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

// Nobody does what one thread waits for.
extern "C" __global__ void closed_memory_barrier(int* out, int bad) {
    __shared__ int arrived[1];
    if (threadIdx.x == 0) arrived[0] = 0;
    __syncthreads();
    if (threadIdx.x == 63 && !bad) arrived[0] = 1;
    const auto open = [](const void* memory) __attribute__((no_sanitize("thread"))) {
        return *static_cast<const int*>(memory) != 0;
    };
    if (threadIdx.x == 0) cpu_cuda::wait_until(open, arrived, cpu_cuda::Site::here());
    out[threadIdx.x] = 1;
}

extern "C" __global__ void divergent_shuffle(int* out, int bad) {
    int value = threadIdx.x;
    if (!bad || threadIdx.x != 3) value = __shfl_xor_sync(0xffffffffu, value, 1);
    out[threadIdx.x] = value;
}

extern "C" __global__ void divergent_product(int* out, int bad) {
    wmma::fragment<wmma::accumulator, 16, 16, 16, int> f;
    wmma::fill_fragment(f, 1);
    if (bad && threadIdx.x == 31) return;
    wmma::store_matrix_sync(out, f, 16, wmma::mem_row_major);
}

extern "C" __global__ void lane_outside_of_mask(int* out, int bad) {
    int value = threadIdx.x;
    if (threadIdx.x < 16 || bad) value = __shfl_xor_sync(0x0000ffffu, value, 1);
    out[threadIdx.x] = value;
}

extern "C" __global__ void signed_overflow(int* out, int x, int bad) { out[threadIdx.x] = x + bad; }

extern "C" __global__ void wide_shift(int* out, int bad) { out[threadIdx.x] = 1 << (threadIdx.x % 31 + 31 * bad); }

extern "C" __global__ void float_to_int(int* out, float x, int bad) {
    out[threadIdx.x] = static_cast<int>(bad ? x * 1e10f : x);
}

extern "C" __global__ void array_index(int* out, int bad) {
    int local[4] = {0, 1, 2, 3};
    local[threadIdx.x % 4] = 5;
    out[threadIdx.x] = local[threadIdx.x % 4 + 4 * bad];
}

extern "C" __global__ void misaligned_vector(const int* x, int4* out, int bad) {
    out[threadIdx.x] = *reinterpret_cast<const int4*>(x + 4 * threadIdx.x + bad);
}

extern "C" __global__ void endless(volatile int* out, int bad) {
    while (bad && out[threadIdx.x] != 2) {
    }
    out[threadIdx.x] = 1;
}
