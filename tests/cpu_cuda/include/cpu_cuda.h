// What the shim's CUDA headers ask of its runtime. Kernels do not include this file themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace cpu_cuda {

// Where in the kernel's source a collective stands: threads that meet must have come to the same place.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// threadIdx and its like, of the thread that runs now.
struct Index {
    unsigned x, y, z;
};
struct Builtins {
    Index thread, block, block_size, grid_size;
};
extern Builtins builtins;

// --- collectives of a block or a warp -----------------------------------------------------------------------

enum class Op : int {
    block_barrier,
    block_barrier_count,
    block_barrier_and,
    block_barrier_or,
    warp_barrier,
    shuffle,
    shuffle_up,
    shuffle_down,
    shuffle_xor,
    ballot,
    reduce_add,
    reduce_min,
    reduce_max,
    reduce_min_signed,
    reduce_max_signed,
    reduce_and,
    reduce_or,
    reduce_xor,
    fragment_load,
    fragment_store,
    fragment_mma,
    memory_barrier,
};

struct Votes {
    int nonzero;  // threads with a predicate other than 0
    int threads;  // threads that took part
};
Votes block_barrier(Op op, int predicate, Site site);
void warp_barrier(unsigned mask, Site site);
// Let other threads run until holds(memory): a barrier that is a variable.
void wait_until(bool (*holds)(const void*), const void* memory, Site site, Op op = Op::memory_barrier);
// Who has arrived somewhere and goes on may be late too.
inline void wait_perhaps(Site site) {
    wait_until([](const void*) { return true; }, nullptr, site);
}
std::uint64_t shuffle(Op op, std::uint64_t bits, int operand, int width, unsigned mask, Site site);
unsigned ballot(unsigned mask, int predicate, Site site);
unsigned reduce(Op op, unsigned mask, unsigned value, Site site);

// --- matrix fragments ---------------------------------------------------------------------------------------

enum class Element : int { s8, u8, f16, bf16, s32, f32 };
enum class Role : int { a, b, accumulator };

// One lane's part of a matrix fragment, without its type.
struct Fragment {
    void* elements;
    Role role;
    Element element;
    int rows;
    int columns;
};
void fragment_load(Fragment destination, const void* source, unsigned stride, bool row_major, Site site);
void fragment_store(void* destination, Fragment source, unsigned stride, bool row_major, Site site);
void fragment_mma(Fragment d, Fragment a, Fragment b, Fragment c, Site site);

// --- asynchronous work --------------------------------------------------------------------------------------

// What runs beside the thread that issued it is done at one of two extremes, as the launch asks: at once, or as late
// as possible, when somebody waits for it.
bool works_late();
void put_off(std::uint64_t key, void (*run)(const void* what), const void* what, std::size_t bytes);
bool is_put_off(std::uint64_t key);
// Do what was put off under the key, in the order in which it was put off.
void carry_out(std::uint64_t key);
// These bytes of shared memory hold no value any more; do they all hold one?
void forget(void* memory, std::size_t bytes);
bool holds_value(const void* memory, std::size_t bytes);

constexpr std::size_t kWorkBytes = 64;

// Do work() now or put it off. The memory that it will write holds no value until then.
template <class Work>
inline void start(std::uint64_t key, void* written, std::size_t bytes, const Work& work) {
    static_assert(sizeof(Work) <= kWorkBytes && std::is_trivially_copyable<Work>::value, "work is kept as bytes");
    if (!works_late()) return work();
    if (written != nullptr) forget(written, bytes);
    put_off(key, [](const void* what) { (*static_cast<const Work*>(what))(); }, &work, sizeof work);
}

// --- the rest -----------------------------------------------------------------------------------------------

// Check an atomic access to memory that all threads see; the caller then performs it.
void atomic_access(const void* address, std::size_t bytes);
[[noreturn]] void trap(const char* what, Site site);

}  // namespace cpu_cuda
