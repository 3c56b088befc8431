// Shared-memory barriers and bulk copies of Hopper (sm_90): the few lines of PTX that move tiles.
#pragma once

namespace intfa {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// --- mbarrier: a phase completes when all arrivals and all announced bytes are in ---------------------------

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; a block barrier must follow.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same where `condition` holds, without a branch.
__device__ __forceinline__ void barrier_arrive_if(unsigned barrier, bool condition) {
    asm volatile(
        "{\n"
        ".reg .pred go;\n"
        "setp.ne.b32 go, %1, 0;\n"
        "@go mbarrier.arrive.shared::cta.b64 _, [%0];\n"
        "}\n" ::"r"(barrier), "r"(static_cast<int>(condition))
        : "memory");
}

// One arrival that also announces bytes to come from bulk copies.
__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the phase of the given parity. A fresh barrier answers parity 1 at once.
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(parity)
        : "memory");
}

// Has the phase of the given parity completed? An answer in advance, to be followed by a wait when it is no.
__device__ __forceinline__ bool barrier_test(unsigned barrier, unsigned parity) {
    int done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// --- copies -------------------------------------------------------------------------------------------------

// Global -> shared, contiguous, both 16-byte aligned, a multiple of 16 bytes; completes on the barrier.
__device__ __forceinline__ void bulk_copy(unsigned shared, const void* global, int bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}

// 16 or 4 bytes per thread, without registers; zeros when not inside.
__device__ __forceinline__ void copy16_async(unsigned shared, const void* global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(inside ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy4_async(unsigned shared, const void* global, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(inside ? 4 : 0)
                 : "memory");
}

// Until this thread's asynchronous copies have landed.
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Ordinary stores of this thread become visible to wgmma and to the copy engine.
__device__ __forceinline__ void shared_store_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- registers between warpgroups ---------------------------------------------------------------------------

template <int count>
__device__ __forceinline__ void registers_release() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void registers_claim() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace intfa
