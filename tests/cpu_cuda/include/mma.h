// nvcuda::wmma for the host. How a matrix is spread over the lanes is the runtime's secret (see runtime/warp.cpp).
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

namespace detail {

template <class T>
struct ElementOf;
template <>
struct ElementOf<signed char> { static constexpr auto value = cpu_cuda::Element::s8; };
template <>
struct ElementOf<unsigned char> { static constexpr auto value = cpu_cuda::Element::u8; };
template <>
struct ElementOf<__half> { static constexpr auto value = cpu_cuda::Element::f16; };
template <>
struct ElementOf<__nv_bfloat16> { static constexpr auto value = cpu_cuda::Element::bf16; };
template <>
struct ElementOf<int> { static constexpr auto value = cpu_cuda::Element::s32; };
template <>
struct ElementOf<float> { static constexpr auto value = cpu_cuda::Element::f32; };

template <class Use, int m, int n, int k>
struct Shape;
template <int m, int n, int k>
struct Shape<matrix_a, m, n, k> { static constexpr auto role = cpu_cuda::Role::a; static constexpr int rows = m, columns = k; };
template <int m, int n, int k>
struct Shape<matrix_b, m, n, k> { static constexpr auto role = cpu_cuda::Role::b; static constexpr int rows = k, columns = n; };
template <int m, int n, int k>
struct Shape<accumulator, m, n, k> { static constexpr auto role = cpu_cuda::Role::accumulator; static constexpr int rows = m, columns = n; };

}  // namespace detail

template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
    static_assert((m == 16 && n == 16 && k == 16) || (m == 32 && n == 8 && k == 16) || (m == 8 && n == 32 && k == 16),
                  "no such fragment shape");
    using shape = detail::Shape<Use, m, n, k>;
    using element_type = T;
    enum { num_elements = shape::rows * shape::columns / 32 };
    T x[num_elements];

    // Filled with ones: a NaN, or an implausible integer. Real fragments start with whatever the registers hold.
    fragment() { __builtin_memset(static_cast<void*>(x), 0xff, sizeof x); }
};

namespace detail {

template <class Use, int m, int n, int k, class T, class Layout>
cpu_cuda::Fragment erased(const fragment<Use, m, n, k, T, Layout>& f) {
    using S = Shape<Use, m, n, k>;
    return {const_cast<T*>(f.x), S::role, ElementOf<T>::value, S::rows, S::columns};
}

}  // namespace detail

template <class Use, int m, int n, int k, class T, class Layout>
inline void fill_fragment(fragment<Use, m, n, k, T, Layout>& f, const cpu_cuda::Argument<T>& value) {
    for (int i = 0; i < f.num_elements; ++i) f.x[i] = value;
}

template <class Use, int m, int n, int k, class T, class Layout>
inline void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& f, const T* source, unsigned stride,
                             cpu_cuda::Site site = cpu_cuda::Site::here()) {
    static_assert(!std::is_void<Layout>::value, "an accumulator is loaded with its layout as the last argument");
    cpu_cuda::fragment_load(detail::erased(f), source, stride, std::is_same<Layout, row_major>::value, site);
}

template <int m, int n, int k, class T>
inline void load_matrix_sync(fragment<accumulator, m, n, k, T>& f, const T* source, unsigned stride, layout_t layout,
                             cpu_cuda::Site site = cpu_cuda::Site::here()) {
    cpu_cuda::fragment_load(detail::erased(f), source, stride, layout == mem_row_major, site);
}

template <int m, int n, int k, class T>
inline void store_matrix_sync(T* destination, const fragment<accumulator, m, n, k, T>& f, unsigned stride,
                              layout_t layout, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    cpu_cuda::fragment_store(destination, detail::erased(f), stride, layout == mem_row_major, site);
}

template <int m, int n, int k, class A, class LayoutA, class B, class LayoutB, class D, class C>
inline void mma_sync(fragment<accumulator, m, n, k, D>& d, const fragment<matrix_a, m, n, k, A, LayoutA>& a,
                     const fragment<matrix_b, m, n, k, B, LayoutB>& b, const fragment<accumulator, m, n, k, C>& c,
                     cpu_cuda::Site site = cpu_cuda::Site::here()) {
    static_assert(std::is_same<A, B>::value, "both factors have one type");
    static_assert(std::is_integral<A>::value ? std::is_same<C, int>::value && std::is_same<D, int>::value
                                             : !std::is_integral<C>::value && !std::is_integral<D>::value,
                  "no such product");
    cpu_cuda::fragment_mma(detail::erased(d), detail::erased(a), detail::erased(b), detail::erased(c), site);
}

}  // namespace wmma
}  // namespace nvcuda
