// The runtime's own state: one launch at a time, on the thread that called it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../include/cpu_cuda.h"
#include "fibre.h"

namespace cpu_cuda {

enum class Fault : int {
    none,
    out_of_bounds,
    data_race,
    uninitialised,
    divergence,
    undefined_behaviour,
    unsupported,
};

// A variable in shared memory: its place in the library's thread-local block (see harness.py).
struct SharedVariable {
    const char* name;
    std::uint64_t offset;
    std::uint64_t bytes;
};

// The order in which blocks, warps and lanes run between two barriers.
enum class Order : std::uint32_t { ascending, descending, shuffled };

// What a caller asks for, and what became of it. harness.py mirrors it field by field.
struct Launch {
    void (*entry)(void** arguments);
    void** arguments;
    char* shared_base;
    std::uint64_t shared_bytes;
    const SharedVariable* shared_variables;
    std::uint64_t shared_variable_count;
    std::uint64_t seed;
    std::uint64_t access_limit;
    std::uint32_t grid[3];
    std::uint32_t block[3];
    Order order;
    std::uint32_t uninitialised_shared_is_a_fault;
    std::uint32_t races_are_faults;
    std::uint32_t asynchronous_is_late;
    // results
    std::uint64_t accesses;
    std::uint64_t fault_pc;
    Fault fault;
    char message[1024];
};

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kStackBytes = 256 * 1024;

enum class State { ready, at_block_barrier, in_warp_collective, at_memory_barrier, done };

struct Fibre {
    Context context;
    char* stack = nullptr;
    Index thread{};
    unsigned linear = 0;
    State state = State::done;
    Op op{};
    Site site{};
    unsigned mask = 0;
    int predicate = 0;
    bool (*holds)(const void*) = nullptr;  // at_memory_barrier: when it opens
    const void* memory = nullptr;

    unsigned warp() const { return linear / kWarp; }
    unsigned lane() const { return linear % kWarp; }
};

// --- memory (memory.cpp) ------------------------------------------------------------------------------------

// Everything a thread does between two points where it waits is one segment. A memory cell remembers the segment
// that wrote it last and the one that read it last; whether that segment happens before the current one decides
// whether an access is a race. Segments are numbered upwards through all launches; the lowest bit of a number in
// a cell says that the access was atomic.
using SegmentId = std::uint32_t;

constexpr std::uint16_t kManyWarps = 0xffff;
constexpr std::uint8_t kManyLanes = 0xff;

struct Segment {
    std::uint16_t warp;
    std::uint8_t lane;
    std::uint32_t warp_epoch;
};

void begin_launch(const Launch& launch);
void begin_block();
void begin_block_epoch();                                // after a barrier of the block
void begin_warp_epoch(unsigned warp);                    // after a barrier of the warp
void begin_segment(unsigned warp, std::uint8_t lane);    // from now on accesses are this lane's
void begin_warp_segment(unsigned warp);                  // ... or those of all lanes of the warp
void end_segment();                                      // before another thread runs
void check_read(const void* address, std::size_t bytes, void* pc);
void check_write(void* address, std::size_t bytes, void* pc);

// --- execution (block.cpp) ----------------------------------------------------------------------------------

void begin_asynchronous();  // at the start of a block (asynchronous.cpp)

extern Fibre* current;  // null while the scheduler itself runs
extern Launch* launch;

// Record what went wrong and abandon the launch.
[[noreturn]] void fail(Fault fault, void* pc, const std::string& what);
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
bool on_a_stack(std::uintptr_t address);

// All lanes of `mask` meet here; the last one to come calls complete(payloads), indexed by lane, for all of them.
void warp_collective(Op op, unsigned mask, Site site, void* payload, void (*complete)(Op op, void** payloads));

}  // namespace cpu_cuda
