// cuda_src/wgmma.cuh for the host: integer wgmma as the PTX manual has it, written out independently of the kernel.
//
// A product is asynchronous work of the runtime, with the thread's group of products for its key. Put off, it is
// carried out at the wait for it, on the registers and the shared memory that it finds then.
#pragma once

#include "shared_memory.cuh"

namespace intfa {

// --- descriptors ------------------------------------------------------------------------------------------------

constexpr unsigned kDescriptorStep32 = 2;

constexpr unsigned descriptor_low(unsigned address) { return address >> 4 & 0x3fffu; }
constexpr unsigned descriptor_high(int row_bytes) {
    return static_cast<unsigned>(8 * row_bytes) >> 4 | (row_bytes == 128 ? 1u : 2u) << 30;
}
constexpr unsigned long long descriptor(unsigned low, unsigned high) {
    return static_cast<unsigned long long>(high) << 32 | low;
}

// 32 bytes of a row of an operand in shared memory. Eight rows of 128 or 64 bytes lie together, and the 16 bytes'
// place in them is exchanged with others by bits of the address. What nobody wrote reads as some number: the kernel
// issues a last product that it makes no use of.
constexpr unsigned kNothing = 0x5aa57d83u;
struct Row {
    uint4 half[2];
};
inline Row read_row(unsigned long long descriptor, unsigned row) {
    const unsigned start = static_cast<unsigned>(descriptor & 0x3fff) << 4;
    const unsigned stride = static_cast<unsigned>(descriptor >> 32 & 0x3fff) << 4;
    const unsigned mode = static_cast<unsigned>(descriptor >> 62);
    if (mode != 1 && mode != 2) __trap();
    const unsigned row_bytes = mode == 1 ? 128 : 64;
    const unsigned address = start + row / 8 * stride + row % 8 * row_bytes;
    Row bytes;
    for (unsigned i = 0; i < 2; ++i) {
        const unsigned chunk = address + 16 * i;
        const auto& source = shared_at<uint4>(chunk ^ (chunk >> 7 & (row_bytes / 16 - 1)) << 4);
        bytes.half[i] = cpu_cuda::holds_value(&source, 16) ? source : uint4{kNothing, kNothing, kNothing, kNothing};
    }
    return bytes;
}

// --- groups of products -----------------------------------------------------------------------------------------

struct Issuer {
    unsigned committed;  // groups so far
    unsigned carried_out;
    bool fenced;
    std::uint64_t key(unsigned group) const { return std::uint64_t{threadIdx.x + 1} << 48 | group; }
};
static Issuer issuers[1024];

// All of a warp issue these together.
inline Issuer& issuer(cpu_cuda::Site site) {
    __syncwarp(0xffffffffu, site);
    return issuers[threadIdx.x];
}

inline void wgmma_fence(cpu_cuda::Site site = cpu_cuda::Site::here()) { issuer(site).fenced = true; }

inline void wgmma_commit(cpu_cuda::Site site = cpu_cuda::Site::here()) {
    Issuer& me = issuer(site);
    ++me.committed;
    me.fenced = false;
}

inline void wait_for_groups(unsigned pending, cpu_cuda::Site site) {
    Issuer& me = issuer(site);
    while (me.committed - me.carried_out > pending) cpu_cuda::carry_out(me.key(me.carried_out++));
}
template <int pending, int n>
inline void wgmma_wait(int (&)[n], cpu_cuda::Site site = cpu_cuda::Site::here()) {
    wait_for_groups(pending, site);
}
template <int pending, int n>
inline void wgmma_wait(int (&)[n], unsigned (&)[16], cpu_cuda::Site site = cpu_cuda::Site::here()) {
    wait_for_groups(pending, site);
}

// --- products ---------------------------------------------------------------------------------------------------

// The thread's two rows of A, from shared memory or from the registers of the four lanes that have them.
inline void read_a(Row (&a)[2], unsigned long long descriptor) {
    const unsigned row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    for (unsigned r = 0; r < 2; ++r) a[r] = read_row(descriptor, row + 8 * r);
}
inline void read_a(Row (&a)[2], const unsigned* words) {
    const int first = static_cast<int>(threadIdx.x % 32 / 4 * 4);
    for (unsigned i = 0; i < 4; ++i) {
        uint4& target = a[i % 2].half[i / 2];
        unsigned* const target_words[4] = {&target.x, &target.y, &target.z, &target.w};
        for (int lane = 0; lane < 4; ++lane) *target_words[lane] = __shfl_sync(0xffffffffu, words[i], first + lane);
    }
}

template <class A, class B>
__attribute__((no_sanitize("thread"))) inline int dot(const Row& a, const Row& b, int sum) {
    A x[32];
    B y[32];
    __builtin_memcpy(x, &a, sizeof x);
    __builtin_memcpy(y, &b, sizeof y);
    for (int k = 0; k < 32; ++k) sum += x[k] * y[k];
    return sum;
}

// acc = A B, or +=: 64 rows, 2 n columns, 32 deep. A, B: the types of their elements; Source: where A's are.
template <class A, class B, int n, class Source>
inline void multiply(int (&acc)[n], Source source, unsigned long long b, bool add) {
    Row a[2];
    read_a(a, source);
    for (unsigned i = 0; i < n; i += 4)
        for (unsigned c = 0; c < 2; ++c) {
            const Row column = read_row(b, 2 * i + threadIdx.x % 4 * 2 + c);
            for (unsigned r = 0; r < 2; ++r) {
                int& sum = acc[i + 2 * r + c];
                sum = dot<A, B>(a[r], column, add ? sum : 0);
            }
        }
}

template <class A, class B, int n, class Source>
inline void issue(int (&acc)[n], Source source, unsigned long long b, bool add, cpu_cuda::Site site) {
    const Issuer& me = issuers[threadIdx.x];
    if (!me.fenced) cpu_cuda::trap("a product without a fence before it", site);
    // Until the wait, a product that does not add leaves nothing of use in its registers.
    if (!add)
        for (int& x : acc) x = kNothing;
    cpu_cuda::start(me.key(me.committed), nullptr, 0,
                    [&acc, source, b, add] { multiply<A, B>(acc, source, b, add); });
}

template <int n>
inline void wgmma_s8s8(int (&acc)[n], unsigned long long a, unsigned long long b, bool add,
                       cpu_cuda::Site site = cpu_cuda::Site::here()) {
    issue<signed char, signed char>(acc, a, b, add, site);
}
template <int n>
inline void wgmma_u8u8(int (&acc)[n], const unsigned* a, unsigned long long b, bool add,
                       cpu_cuda::Site site = cpu_cuda::Site::here()) {
    issue<unsigned char, unsigned char>(acc, a, b, add, site);
}

// --- sums of rows -----------------------------------------------------------------------------------------------

inline void add_row_sums(int (&sums)[4], const unsigned* a) {
    Row rows[2];
    read_a(rows, a);
    for (int i = 0; i < 4; ++i) {
        unsigned char bytes[32];
        __builtin_memcpy(bytes, &rows[i / 2], sizeof bytes);
        for (const int byte : bytes) sums[i] += byte;
    }
}

}  // namespace intfa
