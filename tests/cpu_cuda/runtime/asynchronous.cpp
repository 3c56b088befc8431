// Work that runs beside the thread that issued it, and barriers of some of a block's warps.
#include <cstring>
#include <unordered_map>

#include "runtime.h"

namespace cpu_cuda {
namespace {

struct Work {
    void (*run)(const void* what);
    alignas(16) unsigned char what[kWorkBytes];
};
std::unordered_map<std::uint64_t, std::vector<Work>> put_off_work;

struct NumberedBarrier {
    int expected;     // threads, while some of them have arrived
    int arrived;
    unsigned opened;  // how often
};
constexpr int kNumberedBarriers = 16;
NumberedBarrier numbered[kNumberedBarriers];

struct Arrived {
    const NumberedBarrier& at;
    unsigned opened;  // before that
};

}  // namespace

void begin_asynchronous() {
    put_off_work.clear();
    for (NumberedBarrier& barrier : numbered) barrier = {};
}

bool works_late() { return launch->asynchronous_is_late != 0; }

void put_off(std::uint64_t key, void (*run)(const void*), const void* what, std::size_t bytes) {
    Work work{run, {}};
    std::memcpy(work.what, what, bytes);
    put_off_work[key].push_back(work);
}

bool is_put_off(std::uint64_t key) { return put_off_work.count(key) != 0; }

void carry_out(std::uint64_t key) {
    // The work may wait for other threads, which may put off and carry out more.
    auto node = put_off_work.extract(key);
    if (node.empty()) return;
    for (const Work& work : node.mapped()) {
        const Work here = work;  // the kernel's code may look at its own stack
        here.run(here.what);
    }
}

void numbered_barrier(int number, int threads, bool wait, Site site) {
    if (number < 1 || number >= kNumberedBarriers)
        trap("a numbered barrier is one of 1 to 15; 0 is __syncthreads'", site);
    if (threads < 1 || threads % kWarp != 0) trap("a numbered barrier is for whole warps", site);
    NumberedBarrier& barrier = numbered[number];
    if (barrier.arrived != 0 && barrier.expected != threads)
        trap("threads disagree on how many meet at a numbered barrier", site);
    const Arrived mine{barrier, barrier.opened};
    barrier.expected = threads;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.opened;
    }
    if (!wait) return wait_perhaps(site);
    const auto opened = [](const void* memory) {
        const auto* since = static_cast<const Arrived*>(memory);
        return since->at.opened != since->opened;
    };
    wait_until(opened, &mine, site, Op::numbered_barrier);
}

}  // namespace cpu_cuda
