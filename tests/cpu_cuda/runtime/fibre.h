// Fibres: one stack and one saved stack pointer per CUDA thread, switched without the kernel's help.
#pragma once

#include <cstddef>

// Elsewhere ucontext does the same, slower. CPU_CUDA_UCONTEXT asks for it, to test it.
#if defined(__x86_64__) && !defined(CPU_CUDA_UCONTEXT)
#define CPU_CUDA_SWITCH_X86_64
#endif

namespace cpu_cuda {

struct Context {
    void* stack_pointer = nullptr;
    void* portable = nullptr;  // a ucontext_t
};

// Save the running context in `from` and continue `to`.
void switch_context(Context& from, Context& to);

// Prepare `context` to run entry() on the given stack when it is first switched to. entry must never return.
void prepare_context(Context& context, void* stack, std::size_t bytes, void (*entry)());

}  // namespace cpu_cuda
