// cuda_src/copy.cuh for the host: Hopper's barriers and copies. The copies are asynchronous work of the runtime.
// Threads are numbered by threadIdx.x alone.
#pragma once

#include "shared_memory.cuh"

namespace intfa {

// --- barriers in shared memory ------------------------------------------------------------------------------------

// What the 8 bytes of a barrier hold here.
struct alignas(8) Arrival {
    unsigned char expected;  // arrivals of a phase
    unsigned char arrivals;  // still to come in this one
    unsigned short phases;   // completed
    int bytes;               // still to come

    void settle() {
        if (arrivals != 0 || bytes != 0) return;
        arrivals = expected;
        ++phases;
    }
};

inline void barrier_init(unsigned barrier, int arrivals, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    if (arrivals < 1 || arrivals > 255) cpu_cuda::trap("this barrier does not count so many arrivals", site);
    const auto count = static_cast<unsigned char>(arrivals);
    shared_at<Arrival>(barrier) = {count, count, 0, 0};
}
inline void barrier_init_fence() {}

inline void barrier_expect(unsigned barrier, int bytes, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    Arrival& here = shared_at<Arrival>(barrier);
    if (here.arrivals == 0) cpu_cuda::trap("one arrival too many at a barrier", site);
    --here.arrivals;
    here.bytes += bytes;
    here.settle();
    cpu_cuda::wait_perhaps(site);
}
inline void barrier_arrive(unsigned barrier, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    barrier_expect(barrier, 0, site);
}

inline void barrier_arrive_if(unsigned barrier, bool condition, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    if (condition) barrier_arrive(barrier, site);
}

inline bool barrier_test(unsigned barrier, unsigned parity) {
    return shared_at<Arrival>(barrier).phases % 2 != parity;
}

// Copies that were put off until somebody waits for their barrier have it for their key.
inline std::uint64_t copies_to(const void* barrier) { return reinterpret_cast<std::uintptr_t>(barrier); }

template <unsigned parity>
inline bool phase_can_end(const void* barrier) {
    return static_cast<const Arrival*>(barrier)->phases % 2 != parity || cpu_cuda::is_put_off(copies_to(barrier));
}
inline void barrier_wait(unsigned barrier, unsigned parity, cpu_cuda::Site site = cpu_cuda::Site::here()) {
    const void* const here = shared_pointer(barrier);
    do {
        cpu_cuda::wait_until(parity != 0 ? phase_can_end<1> : phase_can_end<0>, here, site);
        cpu_cuda::carry_out(copies_to(here));
    } while (!barrier_test(barrier, parity));
}

// --- copies ---------------------------------------------------------------------------------------------------------

// `bytes` from global to shared memory, zeros when not inside; T is what is moved at a time.
template <class T>
inline void copy_now(unsigned shared, const void* global, int bytes, bool inside) {
    for (int i = 0; i < bytes / static_cast<int>(sizeof(T)); ++i)
        reinterpret_cast<T*>(shared_pointer(shared))[i] = inside ? static_cast<const T*>(global)[i] : T{};
}

inline void bulk_copy(unsigned shared, const void* global, int bytes, unsigned barrier,
                      cpu_cuda::Site site = cpu_cuda::Site::here()) {
    if ((shared | reinterpret_cast<std::uintptr_t>(global) | static_cast<unsigned>(bytes)) % 16 != 0)
        cpu_cuda::trap("a bulk copy is not a multiple of 16 bytes", site);
    cpu_cuda::start(copies_to(shared_pointer(barrier)), shared_pointer(shared), bytes, [=] {
        copy_now<uint4>(shared, global, bytes, true);
        Arrival& here = shared_at<Arrival>(barrier);
        here.bytes -= bytes;
        here.settle();
    });
}

// Copies of a thread's own have the thread for their key.
template <class T>
inline void copy_async(unsigned shared, const void* global, bool inside) {
    constexpr int bytes = sizeof(T);
    cpu_cuda::start(threadIdx.x, shared_pointer(shared), bytes, [=] { copy_now<T>(shared, global, bytes, inside); });
}
inline void copy16_async(unsigned shared, const void* global, bool inside) {
    copy_async<uint4>(shared, global, inside);
}
inline void copy4_async(unsigned shared, const void* global, bool inside) {
    copy_async<std::uint32_t>(shared, global, inside);
}
inline void copies_wait() { cpu_cuda::carry_out(threadIdx.x); }
inline void shared_store_fence() {}

// --- registers between warpgroups -----------------------------------------------------------------------------------

template <int count>
inline void registers_release(cpu_cuda::Site site = cpu_cuda::Site::here()) {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256, "what setmaxnreg takes");
    __syncwarp(0xffffffffu, site);
}
template <int count>
inline void registers_claim(cpu_cuda::Site site = cpu_cuda::Site::here()) {
    registers_release<count>(site);
}

}  // namespace intfa
