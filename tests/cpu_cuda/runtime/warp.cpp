// What the lanes of a warp do together: votes, shuffles, reductions and matrix fragments.
#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <random>

#include "../include/small_float.h"
#include "runtime.h"

namespace cpu_cuda {
namespace {

// --- votes, shuffles, reductions -----------------------------------------------------------------------------

void synchronise(Op, void**) { begin_warp_epoch(current->warp()); }

struct Shuffle {
    std::uint64_t in;
    std::uint64_t out;
    int operand;
    int width;
    int bad_source;
};

void complete_shuffle(Op op, void** payloads) {
    for (int lane = 0; lane < static_cast<int>(kWarp); ++lane) {
        auto* mine = static_cast<Shuffle*>(payloads[lane]);
        if (mine == nullptr) continue;
        const int base = lane / mine->width * mine->width;
        int source = lane;
        switch (op) {
            case Op::shuffle: source = base + (mine->operand & (mine->width - 1)); break;
            case Op::shuffle_up: source = lane - mine->operand; break;
            case Op::shuffle_down: source = lane + mine->operand; break;
            default: source = lane ^ mine->operand; break;
        }
        if (op == Op::shuffle_up && source < base) source = lane;
        if (op == Op::shuffle_down && source >= base + mine->width) source = lane;
        // An exclusive-or may reach a lower segment, never a higher one.
        if (op == Op::shuffle_xor && source >= base + mine->width) source = lane;
        const auto* theirs = source < 32 && source >= 0 ? static_cast<Shuffle*>(payloads[source]) : nullptr;
        mine->bad_source = theirs == nullptr ? source : -1;
        if (theirs != nullptr) mine->out = theirs->in;
    }
}

struct Vote {
    int predicate;
    unsigned result;
};

void complete_ballot(Op, void** payloads) {
    unsigned result = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane)
        if (payloads[lane] != nullptr && static_cast<Vote*>(payloads[lane])->predicate != 0) result |= 1u << lane;
    for (unsigned lane = 0; lane < kWarp; ++lane)
        if (payloads[lane] != nullptr) static_cast<Vote*>(payloads[lane])->result = result;
}

unsigned combine(Op op, unsigned a, unsigned b) {
    switch (op) {
        case Op::reduce_add: return a + b;
        case Op::reduce_min: return std::min(a, b);
        case Op::reduce_max: return std::max(a, b);
        case Op::reduce_min_signed: return static_cast<int>(a) < static_cast<int>(b) ? a : b;
        case Op::reduce_max_signed: return static_cast<int>(a) > static_cast<int>(b) ? a : b;
        case Op::reduce_and: return a & b;
        case Op::reduce_or: return a | b;
        default: return a ^ b;
    }
}

void complete_reduce(Op op, void** payloads) {
    bool started = false;
    unsigned result = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (payloads[lane] == nullptr) continue;
        const unsigned value = *static_cast<unsigned*>(payloads[lane]);
        result = started ? combine(op, result, value) : value;
        started = true;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane)
        if (payloads[lane] != nullptr) *static_cast<unsigned*>(payloads[lane]) = result;
}

// --- fragments -----------------------------------------------------------------------------------------------

constexpr int kLargest = 512;  // elements of a fragment

// Which element of a matrix each lane holds: lane * (elements / 32) + i -> position. The hardware's own layout is
// unspecified; this one is a different random permutation for each role, so that no code can rely on either.
const std::vector<std::uint16_t>& layout(Role role, int elements) {
    static std::map<std::pair<int, int>, std::vector<std::uint16_t>> layouts;
    auto& order = layouts[{static_cast<int>(role), elements}];
    if (order.empty()) {
        order.resize(elements);
        std::iota(order.begin(), order.end(), std::uint16_t{0});
        std::mt19937 random(static_cast<unsigned>(elements * 8 + static_cast<int>(role)));
        std::shuffle(order.begin(), order.end(), random);
    }
    return order;
}

std::size_t size_of(Element element) {
    switch (element) {
        case Element::s8:
        case Element::u8: return 1;
        case Element::f16:
        case Element::bf16: return 2;
        default: return 4;
    }
}

template <class T>
T get(const void* data, int index) {
    T value;
    std::memcpy(&value, static_cast<const char*>(data) + index * sizeof(T), sizeof(T));
    return value;
}

struct Transfer {
    Fragment fragment;
    char* memory;
    unsigned stride;
    bool row_major;
    const char* problem;
};

void complete_transfer(Op op, void** payloads) {
    const Transfer& first = *static_cast<Transfer*>(payloads[0]);
    const Fragment& shape = first.fragment;
    const std::size_t size = size_of(shape.element);
    const int lines = first.row_major ? shape.rows : shape.columns;
    const int length = first.row_major ? shape.columns : shape.rows;
    const char* problem = nullptr;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        const Transfer& t = *static_cast<Transfer*>(payloads[lane]);
        if (t.memory != first.memory || t.stride != first.stride || t.row_major != first.row_major)
            problem = "the lanes of a warp give different addresses, strides or layouts";
    }
    if (first.stride * size % 16 != 0) problem = "the stride is no multiple of 16 bytes";
    if (reinterpret_cast<std::uintptr_t>(first.memory) % std::min<std::size_t>(32, length * size) != 0)
        problem = "the matrix does not start at a multiple of its line or 32 bytes";
    for (unsigned lane = 0; lane < kWarp; ++lane) static_cast<Transfer*>(payloads[lane])->problem = problem;
    if (problem != nullptr) return;

    begin_warp_segment(current->warp());
    for (int line = 0; line < lines; ++line) {
        char* start = first.memory + std::size_t{first.stride} * line * size;
        if (op == Op::fragment_load)
            check_read(start, length * size, nullptr);
        else
            check_write(start, length * size, nullptr);
    }
    const auto& order = layout(shape.role, shape.rows * shape.columns);
    const int per_lane = shape.rows * shape.columns / static_cast<int>(kWarp);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        char* elements = static_cast<char*>(static_cast<Transfer*>(payloads[lane])->fragment.elements);
        for (int i = 0; i < per_lane; ++i) {
            const int position = order[lane * per_lane + i];
            const int row = position / shape.columns;
            const int column = position % shape.columns;
            const std::size_t at = first.row_major ? std::size_t{first.stride} * row + column
                                                   : std::size_t{first.stride} * column + row;
            if (op == Op::fragment_load)
                std::memcpy(elements + i * size, first.memory + at * size, size);
            else
                std::memcpy(first.memory + at * size, elements + i * size, size);
        }
    }
}

struct Product {
    Fragment d, a, b, c;
};

// The whole matrix, from the parts that the lanes hold.
template <class T, class Part>
void gather(T* matrix, void** payloads, Fragment Product::*which, Part part) {
    const Fragment& shape = static_cast<Product*>(payloads[0])->*which;
    const auto& order = layout(shape.role, shape.rows * shape.columns);
    const int per_lane = shape.rows * shape.columns / static_cast<int>(kWarp);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        const void* elements = (static_cast<Product*>(payloads[lane])->*which).elements;
        for (int i = 0; i < per_lane; ++i) matrix[order[lane * per_lane + i]] = part(elements, i);
    }
}

template <class T>
void gather_as(T* matrix, void** payloads, Fragment Product::*which) {
    switch ((static_cast<Product*>(payloads[0])->*which).element) {
        case Element::s8: return gather(matrix, payloads, which, get<signed char>);
        case Element::u8: return gather(matrix, payloads, which, get<unsigned char>);
        case Element::s32: return gather(matrix, payloads, which, get<int>);
        case Element::f32: return gather(matrix, payloads, which, get<float>);
        case Element::f16:
            return gather(matrix, payloads, which, [](const void* data, int i) {
                return Binary16::to_float(get<std::uint16_t>(data, i));
            });
        case Element::bf16:
            return gather(matrix, payloads, which, [](const void* data, int i) {
                return Bfloat16::to_float(get<std::uint16_t>(data, i));
            });
    }
}

template <class T, class Put>
void scatter(const T* matrix, void** payloads, Put put) {
    const Fragment& shape = static_cast<Product*>(payloads[0])->d;
    const auto& order = layout(shape.role, shape.rows * shape.columns);
    const int per_lane = shape.rows * shape.columns / static_cast<int>(kWarp);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        void* elements = static_cast<Product*>(payloads[lane])->d.elements;
        for (int i = 0; i < per_lane; ++i) put(elements, i, matrix[order[lane * per_lane + i]]);
    }
}

template <class T>
void multiply(const T* a, const T* b, T* c, int m, int n, int k) {
    for (int row = 0; row < m; ++row)
        for (int inner = 0; inner < k; ++inner) {
            const T factor = a[row * k + inner];
            for (int column = 0; column < n; ++column) c[row * n + column] += factor * b[inner * n + column];
        }
}

void complete_mma(Op, void** payloads) {
    const Product& p = *static_cast<Product*>(payloads[0]);
    const int m = p.a.rows;
    const int n = p.b.columns;
    const int k = p.a.columns;
    if (p.d.element == Element::s32) {
        // Unsigned, because the accumulator wraps around.
        unsigned a[kLargest], b[kLargest], c[kLargest];
        gather_as(a, payloads, &Product::a);
        gather_as(b, payloads, &Product::b);
        gather_as(c, payloads, &Product::c);
        multiply(a, b, c, m, n, k);
        scatter(c, payloads, [](void* data, int i, unsigned value) {
            std::memcpy(static_cast<char*>(data) + i * 4, &value, 4);
        });
        return;
    }
    float a[kLargest], b[kLargest], c[kLargest];
    gather_as(a, payloads, &Product::a);
    gather_as(b, payloads, &Product::b);
    gather_as(c, payloads, &Product::c);
    multiply(a, b, c, m, n, k);
    if (p.d.element == Element::f32) {
        scatter(c, payloads, [](void* data, int i, float value) {
            std::memcpy(static_cast<char*>(data) + i * 4, &value, 4);
        });
    } else {
        scatter(c, payloads, [](void* data, int i, float value) {
            const std::uint16_t bits = Binary16::from_float(value);
            std::memcpy(static_cast<char*>(data) + i * 2, &bits, 2);
        });
    }
}

void transfer(Op op, Fragment fragment, char* memory, unsigned stride, bool row_major, Site site) {
    Transfer mine{fragment, memory, stride, row_major, nullptr};
    warp_collective(op, 0xffffffffu, site, &mine, complete_transfer);
    if (mine.problem != nullptr) trap(mine.problem, site);
}

}  // namespace

void warp_barrier(unsigned mask, Site site) {
    int token = 0;
    // A barrier of some lanes only counts as one of the whole warp: lenient, but never wrong to the kernel.
    warp_collective(Op::warp_barrier, mask, site, &token, synchronise);
}

std::uint64_t shuffle(Op op, std::uint64_t bits, int operand, int width, unsigned mask, Site site) {
    Shuffle mine{bits, bits, operand, width, -1};
    if (width <= 0 || width > 32 || (width & (width - 1)) != 0) trap("the width of a shuffle is no power of two", site);
    warp_collective(op, mask, site, &mine, complete_shuffle);
    if (mine.bad_source >= 0) trap("a shuffle reads a lane that does not take part", site);
    return mine.out;
}

unsigned ballot(unsigned mask, int predicate, Site site) {
    Vote mine{predicate, 0};
    warp_collective(Op::ballot, mask, site, &mine, complete_ballot);
    return mine.result;
}

unsigned reduce(Op op, unsigned mask, unsigned value, Site site) {
    warp_collective(op, mask, site, &value, complete_reduce);
    return value;
}

void fragment_load(Fragment destination, const void* source, unsigned stride, bool row_major, Site site) {
    transfer(Op::fragment_load, destination, static_cast<char*>(const_cast<void*>(source)), stride, row_major, site);
}

void fragment_store(void* destination, Fragment source, unsigned stride, bool row_major, Site site) {
    transfer(Op::fragment_store, source, static_cast<char*>(destination), stride, row_major, site);
}

void fragment_mma(Fragment d, Fragment a, Fragment b, Fragment c, Site site) {
    Product mine{d, a, b, c};
    warp_collective(Op::fragment_mma, 0xffffffffu, site, &mine, complete_mma);
}

}  // namespace cpu_cuda
