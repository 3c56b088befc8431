// Runs the threads of one block after another, each until it waits, and the blocks one after another.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>

#include "runtime.h"

namespace cpu_cuda {

Fibre* current = nullptr;
Launch* launch = nullptr;
Builtins builtins{};

namespace {

Context scheduler;
std::vector<Fibre> fibres;
char* stacks = nullptr;
std::vector<unsigned> warp_order;
std::vector<unsigned> lane_order;
Votes votes{};
std::mt19937_64 delays;
std::uint64_t late_warps = 0;  // at barriers in memory, until all others wait

// A collective that some lanes of a warp have reached and others not yet.
struct Meeting {
    Op op{};
    Site site{};
    unsigned mask = 0;
    unsigned arrived = 0;
    void* payloads[kWarp] = {};
};
std::vector<std::vector<Meeting>> meetings;  // per warp

const char* name(Op op) {
    switch (op) {
        case Op::block_barrier: return "__syncthreads";
        case Op::block_barrier_count: return "__syncthreads_count";
        case Op::block_barrier_and: return "__syncthreads_and";
        case Op::block_barrier_or: return "__syncthreads_or";
        case Op::warp_barrier: return "__syncwarp";
        case Op::shuffle: return "__shfl_sync";
        case Op::shuffle_up: return "__shfl_up_sync";
        case Op::shuffle_down: return "__shfl_down_sync";
        case Op::shuffle_xor: return "__shfl_xor_sync";
        case Op::ballot: return "a warp vote";
        case Op::fragment_load: return "load_matrix_sync";
        case Op::fragment_store: return "store_matrix_sync";
        case Op::fragment_mma: return "mma_sync";
        case Op::memory_barrier: return "a barrier in memory";
        default: return "a warp reduction";
    }
}

bool same_place(Op op_a, Site a, Op op_b, Site b) {
    return op_a == op_b && a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

std::string place(const Fibre& f) {
    switch (f.state) {
        case State::done: return "ended";
        case State::ready: return "runs";
        default: break;
    }
    const char* file = std::strrchr(f.site.file, '/');
    std::string text =
        format("%s at %s:%d", name(f.op), file != nullptr ? file + 1 : f.site.file, f.site.line);
    if (f.state == State::in_warp_collective) text += format(" with mask 0x%08x", f.mask);
    return text;
}

// Who waits where: "threads 0-15: __syncthreads at a.cu:3; threads 16-31: ended".
std::string roll_call() {
    std::string text;
    for (std::size_t first = 0, next; first < fibres.size(); first = next) {
        const std::string where = place(fibres[first]);
        for (next = first + 1; next < fibres.size() && place(fibres[next]) == where;) ++next;
        if (!text.empty()) text += "; ";
        if (text.size() > 600) return text + "...";
        text += format("threads %zu-%zu: ", first, next - 1) + where;
    }
    return text;
}

void run_thread() {
    launch->entry(launch->arguments);
    end_segment();
    current->state = State::done;
    switch_context(current->context, scheduler);
    __builtin_unreachable();
}

void wait_for_others() {
    Fibre* me = current;
    end_segment();
    switch_context(me->context, scheduler);
}

void resume(Fibre& fibre) {
    current = &fibre;
    builtins.thread = fibre.thread;
    begin_segment(fibre.warp(), static_cast<std::uint8_t>(fibre.lane()));
    switch_context(scheduler, fibre.context);
    current = nullptr;
}

// Let every lane of the warp go as far as it can without the rest of the block.
void run_warp(unsigned warp) {
    for (bool progress = true; progress;) {
        progress = false;
        for (unsigned lane : lane_order) {
            const unsigned index = warp * kWarp + lane;
            if (index >= fibres.size() || fibres[index].state != State::ready) continue;
            resume(fibres[index]);
            if (launch->fault != Fault::none) return;
            progress = true;
        }
    }
}

// Let go on who waits for what meanwhile holds; is there anybody?
bool open_memory_barriers() {
    bool any = false;
    if (launch->order == Order::shuffled) late_warps = delays();
    for (Fibre& f : fibres) {
        if (f.state != State::at_memory_barrier || !f.holds(f.memory)) continue;
        f.state = State::ready;
        any = true;
    }
    return any;
}

// All threads wait or have ended: open the barrier they stand at, or say why it cannot open.
void open_barrier() {
    const Fibre* first = nullptr;
    votes = {0, 0};
    for (const Fibre& f : fibres) {
        if (f.state == State::done) continue;
        if (first == nullptr) first = &f;
        if (f.state != State::at_block_barrier || !same_place(f.op, f.site, first->op, first->site)) {
            launch->fault = Fault::divergence;
            std::snprintf(launch->message, sizeof launch->message, "threads wait for each other: %s",
                          roll_call().c_str());
            return;
        }
        votes.threads += 1;
        votes.nonzero += f.predicate != 0;
    }
    begin_block_epoch();
    for (Fibre& f : fibres)
        if (f.state == State::at_block_barrier) f.state = State::ready;
}

void run_block() {
    begin_block();
    begin_asynchronous();
    for (auto& of_warp : meetings) of_warp.clear();
    for (Fibre& f : fibres) {
        f.state = State::ready;
        // Stacks that start at different offsets of a page do not compete for the same lines of the cache.
        prepare_context(f.context, f.stack, kStackBytes - f.linear % 31 * 192, run_thread);
    }
    for (;;) {
        for (unsigned warp : warp_order) {
            run_warp(warp);
            if (launch->fault != Fault::none) return;
        }
        if (open_memory_barriers()) continue;
        if (std::all_of(fibres.begin(), fibres.end(), [](const Fibre& f) { return f.state == State::done; })) return;
        open_barrier();
        if (launch->fault != Fault::none) return;
    }
}

void arrange(std::vector<unsigned>& order, std::size_t count, Order how, std::mt19937_64& random) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0u);
    if (how == Order::descending) std::reverse(order.begin(), order.end());
    if (how == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
}

}  // namespace

std::string format(const char* text, ...) {
    char line[1024];
    va_list values;
    va_start(values, text);
    std::vsnprintf(line, sizeof line, text, values);
    va_end(values);
    return line;
}

bool on_a_stack(std::uintptr_t address) {
    return address - reinterpret_cast<std::uintptr_t>(stacks) < kMaxThreads * kStackBytes;
}

void fail(Fault fault, void* pc, const std::string& what) {
    launch->fault = fault;
    launch->fault_pc = reinterpret_cast<std::uintptr_t>(pc);
    std::snprintf(launch->message, sizeof launch->message, "block (%u, %u, %u), thread (%u, %u, %u): %s",
                  builtins.block.x, builtins.block.y, builtins.block.z, builtins.thread.x, builtins.thread.y,
                  builtins.thread.z, what.c_str());
    switch_context(current->context, scheduler);  // and never come back
    __builtin_unreachable();
}

Votes block_barrier(Op op, int predicate, Site site) {
    current->state = State::at_block_barrier;
    current->op = op;
    current->site = site;
    current->predicate = predicate;
    wait_for_others();
    return votes;
}

void wait_until(bool (*holds)(const void*), const void* memory, Site site, Op op) {
    // Who need not wait may be late all the same.
    if (holds(memory) && !(late_warps >> current->warp() & 1u)) return;
    current->state = State::at_memory_barrier;
    current->op = op;
    current->site = site;
    current->holds = holds;
    current->memory = memory;
    wait_for_others();
}

void warp_collective(Op op, unsigned mask, Site site, void* payload, void (*complete)(Op, void**)) {
    Fibre& me = *current;
    const unsigned warp = me.warp();
    const std::size_t lanes = std::min<std::size_t>(kWarp, fibres.size() - warp * kWarp);
    const unsigned present = lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1;
    if (!(mask >> me.lane() & 1u))
        fail(Fault::divergence, nullptr, format("%s with mask 0x%08x by lane %u", name(op), mask, me.lane()));
    me.op = op;
    me.site = site;
    me.mask = mask;

    auto& of_warp = meetings[warp];
    auto meeting = std::find_if(of_warp.begin(), of_warp.end(), [&](const Meeting& m) {
        return m.mask == mask && same_place(m.op, m.site, op, site);
    });
    if (meeting == of_warp.end()) {
        of_warp.push_back({op, site, mask, 0, {}});
        meeting = of_warp.end() - 1;
    }
    meeting->arrived |= 1u << me.lane();
    meeting->payloads[me.lane()] = payload;
    if (meeting->arrived != (mask & present)) {
        me.state = State::in_warp_collective;
        wait_for_others();
        return;
    }

    Meeting complete_one = *meeting;
    of_warp.erase(meeting);
    end_segment();
    complete(op, complete_one.payloads);
    end_segment();
    for (unsigned lane = 0; lane < kWarp; ++lane)
        if (complete_one.payloads[lane] != nullptr) fibres[warp * kWarp + lane].state = State::ready;
    begin_segment(warp, static_cast<std::uint8_t>(me.lane()));
}

void trap(const char* what, Site site) {
    const char* file = std::strrchr(site.file, '/');
    fail(Fault::undefined_behaviour, nullptr,
         format("%s at %s:%d", what, file != nullptr ? file + 1 : site.file, site.line));
}

}  // namespace cpu_cuda

using namespace cpu_cuda;

extern "C" int cpu_cuda_launch(Launch* request) {
    launch = request;
    launch->accesses = 0;
    launch->fault_pc = 0;
    launch->fault = Fault::none;
    launch->message[0] = 0;
    const unsigned threads = request->block[0] * request->block[1] * request->block[2];
    if (stacks == nullptr) {
        void* range = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) return -1;
        stacks = static_cast<char*>(range);
    }
    fibres.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fibre& f = fibres[i];
        f.stack = stacks + i * kStackBytes;
        f.linear = i;
        f.thread = {i % request->block[0], i / request->block[0] % request->block[1],
                    i / request->block[0] / request->block[1]};
    }
    std::mt19937_64 random(request->seed);
    delays.seed(request->seed);
    late_warps = 0;
    const std::size_t warps = (threads + kWarp - 1) / kWarp;
    meetings.resize(warps);
    std::vector<unsigned> blocks;
    arrange(blocks, std::size_t{request->grid[0]} * request->grid[1] * request->grid[2], request->order, random);
    builtins.block_size = {request->block[0], request->block[1], request->block[2]};
    builtins.grid_size = {request->grid[0], request->grid[1], request->grid[2]};
    begin_launch(*request);
    for (unsigned block : blocks) {
        builtins.block = {block % request->grid[0], block / request->grid[0] % request->grid[1],
                          block / request->grid[0] / request->grid[1]};
        arrange(warp_order, warps, request->order, random);
        arrange(lane_order, kWarp, request->order, random);
        run_block();
        if (launch->fault != Fault::none) break;
    }
    current = nullptr;
    const int fault = static_cast<int>(launch->fault);
    launch = nullptr;
    return fault;
}
