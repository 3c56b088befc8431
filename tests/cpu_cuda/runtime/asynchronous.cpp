// Work that runs beside the thread that issued it.
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

}  // namespace

void begin_asynchronous() {
    put_off_work.clear();
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

}  // namespace cpu_cuda
