// Memory that kernels may touch, byte by byte: where it ends, whether it was written, and who touched it last.
//
// Kernels are compiled with the compiler's thread-sanitizer instrumentation, which calls a function before every
// load and store; the functions below take the place of the sanitizer's own library.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>

#include "runtime.h"

namespace cpu_cuda {
namespace {

struct Cell {
    SegmentId writer;
    SegmentId reader;
    bool operator==(const Cell& other) const { return writer == other.writer && reader == other.reader; }
};

constexpr SegmentId kOutside = 0;     // writer of a byte that belongs to no buffer
constexpr SegmentId kHost = 2;        // written by the host
constexpr SegmentId kUnwritten = 4;   // allocated, but without a value
constexpr SegmentId kFirst = 16;
constexpr SegmentId kAtomicBit = 1;

// --- global memory: buffers in a reserved range, far apart ---------------------------------------------------

constexpr std::size_t kArenaBytes = std::size_t{1} << 38;
constexpr unsigned kPageShift = 14;
constexpr std::size_t kPage = std::size_t{1} << kPageShift;
constexpr std::size_t kGap = 16 * kPage;  // at least this much between two buffers

struct Buffer {
    std::size_t bytes;
    std::string name;
};

char* arena = nullptr;
Cell** pages = nullptr;
std::map<std::uintptr_t, Buffer> buffers;  // by address
std::uintptr_t cursor = 0;

void open_arena() {
    if (arena != nullptr) return;
    void* range = mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void* table = mmap(nullptr, (kArenaBytes >> kPageShift) * sizeof(Cell*), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED || table == MAP_FAILED) std::abort();
    arena = static_cast<char*>(range);
    pages = static_cast<Cell**>(table);
    cursor = reinterpret_cast<std::uintptr_t>(arena) + kGap;
}

// --- shared memory: the thread-local block of the kernel's library -------------------------------------------

std::vector<Cell> shared_cells;
std::uintptr_t shared_begin = 0;
std::vector<SharedVariable> shared_open;  // the variables whose cells are in use

// --- the kernel's library: constants and device variables, which are not checked further ----------------------

std::uintptr_t image_begin = 0;
std::uintptr_t image_end = 0;
const void* image_of = nullptr;

int find_image(dl_phdr_info* info, std::size_t, void* wanted) {
    std::uintptr_t begin = ~std::uintptr_t{0};
    std::uintptr_t end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
        const std::uintptr_t first = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
        begin = first < begin ? first : begin;
        end = first + info->dlpi_phdr[i].p_memsz > end ? first + info->dlpi_phdr[i].p_memsz : end;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(wanted);
    if (address < begin || address >= end) return 0;
    image_begin = begin;
    image_end = end;
    return 1;
}

// --- order of segments ---------------------------------------------------------------------------------------

SegmentId next_segment = kFirst;
SegmentId launch_first = kFirst;
SegmentId block_first = kFirst;
SegmentId epoch_first = kFirst;
std::vector<Segment> epoch_segments;  // the details of segments from epoch_first on
std::vector<std::uint32_t> warp_epochs;
std::vector<SegmentId> warp_segments;  // of all lanes of a warp in its present epoch; 0: none yet
SegmentId many_warps_segment = 0;
SegmentId segment = kFirst;
Segment self{};

SegmentId new_segment(Segment details) {
    epoch_segments.push_back(details);
    next_segment += 2;
    if (next_segment > 0xfffffff0u) std::abort();  // after two thousand million segments
    return next_segment - 2;
}

SegmentId warp_segment(unsigned warp) {
    SegmentId& id = warp_segments[warp];
    if (id == 0) id = new_segment({static_cast<std::uint16_t>(warp), kManyLanes, warp_epochs[warp]});
    return id;
}

bool in_another_block(SegmentId s) { return s >= launch_first && s < block_first; }

const Segment* present(SegmentId s) {
    return s >= epoch_first ? &epoch_segments[(s - epoch_first) / 2] : nullptr;
}

// Does all of segment s happen before what runs now?
bool ordered(SegmentId s) {
    s &= ~kAtomicBit;
    if (const Segment* other = present(s)) {
        if (other->warp != self.warp) return false;
        if (other->lane == self.lane && self.lane != kManyLanes) return true;
        return other->warp_epoch < warp_epochs[self.warp];
    }
    return !in_another_block(s);
}

// The segment to remember when the current one joins one that is not ordered before it.
SegmentId joined(SegmentId s) {
    s &= ~kAtomicBit;
    if (s == 0 || ordered(s)) return segment;
    if (in_another_block(s)) return launch_first;  // stands for several blocks
    if (present(s)->warp == self.warp) return warp_segment(self.warp);
    if (many_warps_segment == 0) many_warps_segment = new_segment({kManyWarps, kManyLanes, 0});
    return many_warps_segment;
}

std::string describe(SegmentId s) {
    s &= ~kAtomicBit;
    if (s == launch_first) return "several blocks";
    if (in_another_block(s)) return "another block";
    const Segment* d = present(s);
    if (d == nullptr) return "an earlier access";
    if (d->warp == kManyWarps) return "threads of several warps";
    if (d->lane == kManyLanes) return format("several lanes of warp %u", d->warp);
    return format("thread %u (warp %u, lane %u)", d->warp * kWarp + d->lane, d->warp, d->lane);
}

// --- faults --------------------------------------------------------------------------------------------------

enum class Access { read, write, atomic };

const char* verb(Access access) {
    return access == Access::read ? "read" : access == Access::write ? "write" : "atomic access";
}

std::string describe_address(std::uintptr_t address) {
    if (!shared_cells.empty() && address - shared_begin < shared_cells.size()) {
        const std::uintptr_t offset = address - shared_begin;
        const SharedVariable* best = nullptr;
        for (std::uint64_t i = 0; i < launch->shared_variable_count; ++i) {
            const SharedVariable& v = launch->shared_variables[i];
            if (v.offset <= offset && (best == nullptr || v.offset > best->offset)) best = &v;
        }
        if (best == nullptr) return "shared memory before the first variable";
        return format("byte %lld of shared `%s` (%llu bytes)", static_cast<long long>(offset - best->offset),
                      best->name, static_cast<unsigned long long>(best->bytes));
    }
    if (!buffers.empty()) {
        auto next = buffers.upper_bound(address);
        auto nearest = next == buffers.begin() ? next : std::prev(next);
        if (nearest != next && next != buffers.end() &&
            address - (nearest->first + nearest->second.bytes) > next->first - address &&
            address >= nearest->first + nearest->second.bytes)
            nearest = next;
        const std::uintptr_t arena_begin = reinterpret_cast<std::uintptr_t>(arena);
        if (address - arena_begin < kArenaBytes)
            return format("byte %lld of buffer `%s` (%llu bytes)", static_cast<long long>(address - nearest->first),
                          nearest->second.name.c_str(), static_cast<unsigned long long>(nearest->second.bytes));
    }
    return format("address 0x%llx, which is in no buffer", static_cast<unsigned long long>(address));
}

[[noreturn, gnu::noinline, gnu::cold]] void access_fault(Fault fault, Access access, std::uintptr_t address,
                                                         std::size_t bytes, void* pc, SegmentId other) {
    std::string text = format("%s of %zu bytes at ", verb(access), bytes) + describe_address(address);
    if (fault == Fault::out_of_bounds) text = "out of bounds: " + text;
    if (fault == Fault::uninitialised) text = "never written: " + text;
    if (fault == Fault::data_race) text = "no barrier between this and " + describe(other) + ": " + text;
    if (pc == nullptr) text += format(" (line %d)", current->site.line);  // a collective, which knows its place
    fail(fault, pc, text);
}

// --- writes that race, but perhaps with the same value ----------------------------------------------------------

// Threads may agree on a value without a barrier, such as a flag that all of them raise. What a thread is about to
// store is not known at the check, so that memory is compared afterwards.
struct DoubtfulWrite {
    std::uintptr_t address;
    std::size_t bytes;
    void* pc;
    SegmentId other;
    char before[16];
};
std::vector<DoubtfulWrite> doubtful;

void settle() {
    for (const DoubtfulWrite& w : doubtful) {
        if (std::memcmp(reinterpret_cast<const void*>(w.address), w.before, w.bytes) == 0) continue;
        const DoubtfulWrite worst = w;
        doubtful.clear();
        access_fault(Fault::data_race, Access::write, worst.address, worst.bytes, worst.pc, worst.other);
    }
    doubtful.clear();
}

// --- the check -----------------------------------------------------------------------------------------------

// The cell after an access of `bytes` bytes, `left` of them from `address` on.
template <Access access>
Cell checked(Cell cell, std::uintptr_t address, std::size_t left, std::size_t bytes, void* pc) {
    const SegmentId writer = cell.writer;
    if (writer == kOutside) access_fault(Fault::out_of_bounds, access, address, bytes, pc, 0);
    if (writer == kUnwritten) {
        if (access != Access::write) access_fault(Fault::uninitialised, access, address, bytes, pc, 0);
    } else if (!ordered(writer) && !(access == Access::atomic && (writer & kAtomicBit)) && launch->races_are_faults) {
        if (access != Access::write || left > sizeof DoubtfulWrite::before)
            access_fault(Fault::data_race, access, address, bytes, pc, writer);
        DoubtfulWrite write{address, left, pc, writer, {}};
        std::memcpy(write.before, reinterpret_cast<const void*>(address), left);
        doubtful.push_back(write);
    }
    if (access == Access::read) {
        cell.reader = joined(cell.reader);
        return cell;
    }
    if (cell.reader != 0 && !ordered(cell.reader) && launch->races_are_faults)
        access_fault(Fault::data_race, access, address, bytes, pc, cell.reader);
    return {joined(writer) | (access == Access::atomic ? kAtomicBit : 0), 0};
}

template <Access access>
void check_cells(Cell* cells, std::uintptr_t address, std::size_t bytes, std::size_t whole, void* pc) {
    Cell before = cells[0];
    Cell after = checked<access>(before, address, bytes, whole, pc);
    cells[0] = after;
    for (std::size_t i = 1; i < bytes; ++i) {
        if (!(cells[i] == before)) {
            before = cells[i];
            after = checked<access>(before, address + i, bytes - i, whole, pc);
        }
        cells[i] = after;
    }
}

template <Access access>
inline void check(std::uintptr_t address, std::size_t bytes, void* pc) {
    if (current == nullptr) return;  // static initialisers
    if (!doubtful.empty()) settle();
    if (address - reinterpret_cast<std::uintptr_t>(current->stack) < kStackBytes) return;
    if (address - reinterpret_cast<std::uintptr_t>(&builtins) < sizeof builtins) return;
    if (++launch->accesses > launch->access_limit) fail(Fault::unsupported, pc, "too many memory accesses: endless loop?");
    const std::uintptr_t in_shared = address - shared_begin;
    if (in_shared < shared_cells.size()) {
        if (bytes > shared_cells.size() - in_shared)
            access_fault(Fault::out_of_bounds, access, address, bytes, pc, 0);
        check_cells<access>(&shared_cells[in_shared], address, bytes, bytes, pc);
        return;
    }
    const std::uintptr_t in_arena = address - reinterpret_cast<std::uintptr_t>(arena);
    if (in_arena < kArenaBytes - kGap) {
        for (std::size_t done = 0; done < bytes;) {
            const std::uintptr_t offset = in_arena + done;
            std::size_t part = kPage - offset % kPage;
            part = part < bytes - done ? part : bytes - done;
            Cell* page = pages[offset >> kPageShift];
            if (page == nullptr) access_fault(Fault::out_of_bounds, access, address + done, bytes, pc, 0);
            check_cells<access>(page + offset % kPage, address + done, part, bytes, pc);
            done += part;
        }
        return;
    }
    if (on_a_stack(address)) fail(Fault::out_of_bounds, pc, "access to a local variable of another thread");
    if (address - image_begin < image_end - image_begin) return;
    access_fault(Fault::out_of_bounds, access, address, bytes, pc, 0);
}

}  // namespace

void begin_launch(const Launch& request) {
    open_arena();
    launch_first = next_segment;
    next_segment += 2;  // launch_first itself stands for several blocks
    shared_begin = reinterpret_cast<std::uintptr_t>(request.shared_base);
    for (const SharedVariable& v : shared_open)
        std::fill_n(shared_cells.begin() + static_cast<std::ptrdiff_t>(v.offset), v.bytes, Cell{kOutside, 0});
    shared_open.assign(request.shared_variables, request.shared_variables + request.shared_variable_count);
    shared_cells.resize(request.shared_bytes, Cell{kOutside, 0});
    const void* entry = reinterpret_cast<const void*>(request.entry);
    if (image_of != entry) {
        dl_iterate_phdr(find_image, const_cast<void*>(entry));
        image_of = entry;
    }
}

void begin_block() {
    block_first = next_segment;
    const unsigned warps = (launch->block[0] * launch->block[1] * launch->block[2] + kWarp - 1) / kWarp;
    warp_epochs.assign(warps, 0);
    const SegmentId fresh = launch->uninitialised_shared_is_a_fault ? kUnwritten : kHost;
    for (std::uint64_t i = 0; i < launch->shared_variable_count; ++i) {
        const SharedVariable& v = launch->shared_variables[i];
        // All ones: a NaN as a floating-point number, -1 as an integer.
        std::memset(launch->shared_base + v.offset, 0xff, v.bytes);
        std::fill_n(shared_cells.begin() + static_cast<std::ptrdiff_t>(v.offset), v.bytes, Cell{fresh, 0});
    }
    begin_block_epoch();
}

void begin_block_epoch() {
    epoch_first = next_segment;
    epoch_segments.clear();
    doubtful.clear();
    many_warps_segment = 0;
    warp_segments.assign(warp_epochs.size(), 0);
}

void begin_warp_epoch(unsigned warp) {
    ++warp_epochs[warp];
    warp_segments[warp] = 0;
}

void end_segment() {
    if (!doubtful.empty()) settle();
}

void begin_segment(unsigned warp, std::uint8_t lane) {
    self = {static_cast<std::uint16_t>(warp), lane, warp_epochs[warp]};
    segment = new_segment(self);
}

void begin_warp_segment(unsigned warp) {
    segment = warp_segment(warp);
    self = {static_cast<std::uint16_t>(warp), kManyLanes, warp_epochs[warp]};
}

void check_read(const void* address, std::size_t bytes, void* pc) {
    check<Access::read>(reinterpret_cast<std::uintptr_t>(address), bytes, pc);
}

void check_write(void* address, std::size_t bytes, void* pc) {
    check<Access::write>(reinterpret_cast<std::uintptr_t>(address), bytes, pc);
}

// The cells of bytes of shared memory, and none other.
static Cell* cells_of_shared(const void* memory, std::size_t bytes, Access access, void* pc) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const std::uintptr_t first = address - shared_begin;
    if (first >= shared_cells.size() || bytes > shared_cells.size() - first)
        access_fault(Fault::out_of_bounds, access, address, bytes, pc, 0);
    Cell* cells = &shared_cells[first];
    if (std::any_of(cells, cells + bytes, [](const Cell& cell) { return cell.writer == kOutside; }))
        access_fault(Fault::out_of_bounds, access, address, bytes, pc, 0);
    return cells;
}

void forget(void* memory, std::size_t bytes) {
    Cell* cells = cells_of_shared(memory, bytes, Access::write, __builtin_return_address(0));
    if (launch->uninitialised_shared_is_a_fault) std::fill_n(cells, bytes, Cell{kUnwritten, 0});
}

bool holds_value(const void* memory, std::size_t bytes) {
    const Cell* cells = cells_of_shared(memory, bytes, Access::read, __builtin_return_address(0));
    return std::none_of(cells, cells + bytes, [](const Cell& cell) { return cell.writer == kUnwritten; });
}

void atomic_access(const void* address, std::size_t bytes) {
    check<Access::atomic>(reinterpret_cast<std::uintptr_t>(address), bytes, __builtin_return_address(0));
}

}  // namespace cpu_cuda

// --- what the host calls -------------------------------------------------------------------------------------

using namespace cpu_cuda;

// Reserve `bytes` (which may be far more than the machine has) under a name. Nothing in it is accessible yet.
extern "C" char* cpu_cuda_reserve(std::uint64_t bytes, const char* name) {
    open_arena();
    const auto begin = reinterpret_cast<std::uintptr_t>(arena);
    const std::size_t room = (bytes + kPage - 1) / kPage * kPage + kGap;
    for (int lap = 0; lap < 2; ++lap) {
        auto next = buffers.lower_bound(cursor);
        if (next != buffers.begin()) {  // the cursor may have wrapped into a live buffer
            auto before = std::prev(next);
            const std::uintptr_t end = before->first + (before->second.bytes + kPage - 1) / kPage * kPage + kGap;
            if (end > cursor) cursor = end;
        }
        while (cursor + room <= begin + kArenaBytes) {
            if (next == buffers.end() || cursor + room <= next->first) {
                const std::uintptr_t address = cursor;
                buffers[address] = {bytes, name};
                cursor += room;
                return reinterpret_cast<char*>(address);
            }
            cursor = next->first + (next->second.bytes + kPage - 1) / kPage * kPage + kGap;
            ++next;
        }
        cursor = begin + kGap;
    }
    return nullptr;
}

// Make `count` windows of `bytes` each, `offset` apart as listed, accessible; written: they hold values.
extern "C" void cpu_cuda_open(char* buffer, const std::uint64_t* offsets, std::uint64_t count, std::uint64_t bytes,
                              int written) {
    const Cell cell{written ? kHost : kUnwritten, 0};
    for (std::uint64_t i = 0; i < count; ++i) {
        const std::uint64_t first = static_cast<std::uint64_t>(buffer - arena) + offsets[i];
        for (std::uint64_t at = first; at < first + bytes;) {
            Cell*& page = pages[at >> kPageShift];
            if (page == nullptr) {
                char* data = arena + (at >> kPageShift << kPageShift);
                if (mprotect(data, kPage, PROT_READ | PROT_WRITE) != 0) std::abort();
                page = static_cast<Cell*>(std::calloc(kPage, sizeof(Cell)));
            }
            const std::uint64_t end = ((at >> kPageShift) + 1) << kPageShift;
            for (; at < first + bytes && at < end; ++at) page[at % kPage] = cell;
        }
    }
}

extern "C" void cpu_cuda_release(char* buffer) {
    auto found = buffers.find(reinterpret_cast<std::uintptr_t>(buffer));
    if (found == buffers.end()) return;
    const std::uint64_t first = static_cast<std::uint64_t>(buffer - arena) >> kPageShift;
    const std::uint64_t count = (found->second.bytes + kPage - 1) / kPage;
    for (std::uint64_t page = first; page < first + count; ++page) {
        if (pages[page] == nullptr) continue;
        std::free(pages[page]);
        pages[page] = nullptr;
        madvise(arena + (page << kPageShift), kPage, MADV_DONTNEED);
        mprotect(arena + (page << kPageShift), kPage, PROT_NONE);
    }
    buffers.erase(found);
}

// Which bytes of [address, address + bytes) hold a value: 1 or 0 each.
extern "C" void cpu_cuda_written(const char* address, std::uint64_t bytes, unsigned char* result) {
    for (std::uint64_t i = 0; i < bytes; ++i) {
        const auto at = static_cast<std::uint64_t>(address + i - arena);
        const Cell* page = pages[at >> kPageShift];
        result[i] = page != nullptr && page[at % kPage].writer != kOutside && page[at % kPage].writer != kUnwritten;
    }
}

// --- what instrumented code calls ----------------------------------------------------------------------------

#define CPU_CUDA_HOOK(name, access, bytes)                                                                \
    extern "C" void __tsan_##name(void* address) {                                                        \
        check<access>(reinterpret_cast<std::uintptr_t>(address), bytes, __builtin_return_address(0));     \
    }
#define CPU_CUDA_HOOKS(bytes)                           \
    CPU_CUDA_HOOK(read##bytes, Access::read, bytes)     \
    CPU_CUDA_HOOK(write##bytes, Access::write, bytes)   \
    CPU_CUDA_HOOK(unaligned_read##bytes, Access::read, bytes)   \
    CPU_CUDA_HOOK(unaligned_write##bytes, Access::write, bytes)
CPU_CUDA_HOOKS(1)
CPU_CUDA_HOOKS(2)
CPU_CUDA_HOOKS(4)
CPU_CUDA_HOOKS(8)
CPU_CUDA_HOOKS(16)

extern "C" void __tsan_read_range(void* address, std::size_t bytes) {
    check<Access::read>(reinterpret_cast<std::uintptr_t>(address), bytes, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, std::size_t bytes) {
    check<Access::write>(reinterpret_cast<std::uintptr_t>(address), bytes, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_func_entry(void*) {
    if (current == nullptr) return;
    const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
    if (here - reinterpret_cast<std::uintptr_t>(current->stack) < 16 * 1024)
        fail(Fault::unsupported, __builtin_return_address(0), "a thread's stack is used up");
}
