// One kernel per feature of the shim; test_cpu_cuda_shim.py compares each with NumPy.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

namespace wmma = nvcuda::wmma;

#define LANE (threadIdx.x % 32)

// --- indices and barriers ------------------------------------------------------------------------------------

struct Range {
    int* data;
    int n;
    float unused[3];
};

// By-value structures, three-dimensional grids and blocks.
extern "C" __global__ void __launch_bounds__(64) indices(const Range range, short add) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    if (i < range.n) range.data[i] = i + add;
}

// A tree in dynamic shared memory, a static variable beside it.
extern "C" __global__ void block_sum(const float* x, float* out, int n) {
    extern __shared__ __align__(16) float partial[];
    __shared__ float total;
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) total = partial[0];
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) out[blockIdx.x] = total;
}

// Two names for the same dynamic shared memory.
extern "C" __global__ void reinterpret(const float* x, unsigned* out) {
    {
        extern __shared__ float as_floats[];
        as_floats[threadIdx.x] = x[threadIdx.x];
    }
    __syncthreads();
    extern __shared__ unsigned as_words[];
    out[threadIdx.x] = as_words[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void block_votes(const int* x, int* out) {
    const int predicate = x[threadIdx.x];
    const int count = __syncthreads_count(predicate);
    const int all = __syncthreads_and(predicate);
    const int any = __syncthreads_or(predicate);
    out[threadIdx.x] = count | all << 16 | any << 17;
}

// Threads that have ended do not hold up a barrier.
extern "C" __global__ void early_exit(int* out, int n) {
    __shared__ int words[64];
    if (static_cast<int>(threadIdx.x) >= n) return;
    words[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = words[n - 1 - threadIdx.x];
}

// --- warps ---------------------------------------------------------------------------------------------------

extern "C" __global__ void shuffles(const float* x, float* out, int operand, int width) {
    const float value = x[threadIdx.x];
    float* row = out + threadIdx.x;
    row[0 * blockDim.x] = __shfl_sync(0xffffffffu, value, operand, width);
    row[1 * blockDim.x] = __shfl_up_sync(0xffffffffu, value, operand, width);
    row[2 * blockDim.x] = __shfl_down_sync(0xffffffffu, value, operand, width);
    row[3 * blockDim.x] = __shfl_xor_sync(0xffffffffu, value, operand, width);
}

extern "C" __global__ void wide_shuffle(const double* x, double* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 9);
}

// Both halves of a warp at once, each with its own mask and at its own place.
extern "C" __global__ void half_warps(const int* x, int* out) {
    int value = x[threadIdx.x];
    if (LANE < 16) {
        for (int step = 8; step > 0; step /= 2) value += __shfl_xor_sync(0x0000ffffu, value, step);
    } else {
        for (int step = 8; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0xffff0000u, value, step));
    }
    out[threadIdx.x] = value;
}

extern "C" __global__ void votes(const int* x, unsigned* out) {
    const int predicate = x[threadIdx.x];
    const unsigned ballot = __ballot_sync(0xffffffffu, predicate);
    const unsigned any = __any_sync(0xffffffffu, predicate);
    const unsigned all = __all_sync(0xffffffffu, predicate);
    out[threadIdx.x * 3 + 0] = ballot;
    out[threadIdx.x * 3 + 1] = any;
    out[threadIdx.x * 3 + 2] = all;
}

extern "C" __global__ void reductions(const int* x, int* out) {
    const int value = x[threadIdx.x];
    const unsigned bits = static_cast<unsigned>(value);
    int* row = out + threadIdx.x;
    row[0 * blockDim.x] = __reduce_add_sync(0xffffffffu, value);
    row[1 * blockDim.x] = __reduce_min_sync(0xffffffffu, value);
    row[2 * blockDim.x] = __reduce_max_sync(0xffffffffu, value);
    row[3 * blockDim.x] = static_cast<int>(__reduce_min_sync(0xffffffffu, bits));
    row[4 * blockDim.x] = static_cast<int>(__reduce_max_sync(0xffffffffu, bits));
    row[5 * blockDim.x] = static_cast<int>(__reduce_and_sync(0xffffffffu, bits));
    row[6 * blockDim.x] = static_cast<int>(__reduce_or_sync(0xffffffffu, bits));
    row[7 * blockDim.x] = static_cast<int>(__reduce_xor_sync(0xffffffffu, bits));
}

// A transpose inside each warp, ordered by __syncwarp alone.
extern "C" __global__ void warp_transpose(const int* x, int* out) {
    __shared__ int tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x / 32 * 32 + 31 - LANE];
}

extern "C" __global__ void atomics(const int* x, int* sums, float* total, int* largest, int* last) {
    const int value = x[blockIdx.x * blockDim.x + threadIdx.x];
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, value);
    atomicAdd(total, static_cast<float>(value));
    atomicMax(largest, value);
    atomicCAS(last, 7, 8);
    __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// --- matrix fragments ----------------------------------------------------------------------------------------

template <class T, class Sum, class LayoutA, class LayoutB>
__device__ void product(const T* a, const T* b, const Sum* c, Sum* d, int k, wmma::layout_t layout) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, T, LayoutA> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, T, LayoutB> right;
    wmma::fragment<wmma::accumulator, 16, 16, 16, Sum> sum;
    wmma::load_matrix_sync(sum, c, 16, layout);
    const bool a_rows = std::is_same<LayoutA, wmma::row_major>::value;
    const bool b_rows = std::is_same<LayoutB, wmma::row_major>::value;
    for (int i = 0; i < k; i += 16) {
        wmma::load_matrix_sync(left, a_rows ? a + i : a + i * 16, a_rows ? k : 16);
        wmma::load_matrix_sync(right, b_rows ? b + i * 16 : b + i, b_rows ? 16 : k);
        wmma::mma_sync(sum, left, right, sum);
    }
    wmma::store_matrix_sync(d, sum, 16, layout);
}

#define PRODUCT(name, T, Sum)                                                                            \
    extern "C" __global__ void name(const T* a, const T* b, const Sum* c, Sum* d, int k, int columns) {  \
        if (columns)                                                                                     \
            product<T, Sum, wmma::col_major, wmma::col_major>(a, b, c, d, k, wmma::mem_col_major);       \
        else                                                                                             \
            product<T, Sum, wmma::row_major, wmma::row_major>(a, b, c, d, k, wmma::mem_row_major);       \
    }
PRODUCT(product_s8, signed char, int)
PRODUCT(product_u8, unsigned char, int)
PRODUCT(product_half, __half, float)
PRODUCT(product_bf16, __nv_bfloat16, float)

// Which matrix element each lane's elements are.
extern "C" __global__ void layout_of_fragments(const int* numbers, int* out) {
    wmma::fragment<wmma::accumulator, 16, 16, 16, int> f;
    wmma::load_matrix_sync(f, numbers, 16, wmma::mem_row_major);
    for (int i = 0; i < f.num_elements; ++i) out[threadIdx.x * f.num_elements + i] = f.x[i];
}

// Elementwise work, which needs no knowledge of the layout.
extern "C" __global__ void scaled_fill(float* out, float value, float factor) {
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> f;
    wmma::fill_fragment(f, value);
    for (int i = 0; i < f.num_elements; ++i) f.x[i] *= factor;
    wmma::store_matrix_sync(out, f, 16, wmma::mem_row_major);
}

// --- numbers -------------------------------------------------------------------------------------------------

#define FOR_EACH(n) for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)

extern "C" __global__ void widen(const __half* h, const __nv_bfloat16* b, float* from_h, float* from_b, int n) {
    FOR_EACH(n) {
        from_h[i] = __half2float(h[i]);
        from_b[i] = __bfloat162float(b[i]);
    }
}

extern "C" __global__ void narrow(const float* x, __half* h, __nv_bfloat16* b, int n) {
    FOR_EACH(n) {
        h[i] = __float2half_rn(x[i]);
        b[i] = __float2bfloat16_rn(x[i]);
    }
}

extern "C" __global__ void half_arithmetic(const __half2* x, const __half2* y, const __half2* z, __half2* out, int n) {
    FOR_EACH(n) {
        out[0 * n + i] = __hadd2(x[i], y[i]);
        out[1 * n + i] = __hmul2(x[i], y[i]);
        out[2 * n + i] = __hfma2(x[i], y[i], z[i]);
        out[3 * n + i] = __hmax2(x[i], y[i]);
        out[4 * n + i] = __halves2half2(__high2half(x[i]), __low2half(x[i]));
    }
}

extern "C" __global__ void conversions(const float* x, int* to_int, unsigned* to_unsigned, int* bits, int n) {
    FOR_EACH(n) {
        to_int[i] = __float2int_rn(x[i]);
        to_unsigned[i] = __float2uint_rn(x[i]);
        bits[i] = __float_as_int(__int_as_float(__float_as_int(x[i])));
    }
}

extern "C" __global__ void bytes(const uint2* x, const unsigned* selectors, uint4* out, int n) {
    FOR_EACH(n) {
        const uint2 w = x[i];
        out[i] = make_uint4(__byte_perm(w.x, w.y, selectors[i]),
                            static_cast<unsigned>(__dp4a(static_cast<int>(w.x), static_cast<int>(w.y), 7)),
                            __dp4a(w.x, w.y, 7u), __funnelshift_r(w.x, w.y, selectors[i] & 31u));
    }
}

extern "C" __global__ void negative_and_largest(const int4* x, int2* out, int n) {
    FOR_EACH(n) out[i] = make_int2(static_cast<int>(__vneg4(x[i].x)), __vimax3_s32(x[i].y, x[i].z, x[i].w));
}

extern "C" __global__ void arithmetic(const float4* x, float4* out, int n) {
    FOR_EACH(n) {
        const float4 v = __ldg(x + i);
        out[i] = make_float4(__fmaf_rn(v.x, v.y, v.z), __fmul_rn(v.x, v.y), __fdiv_rn(v.x, v.y), exp2f(v.w));
    }
}
