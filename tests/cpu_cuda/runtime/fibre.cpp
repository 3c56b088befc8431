#include "fibre.h"

#include <cstdint>

#if defined(CPU_CUDA_SWITCH_X86_64)

// Callee-saved registers of the System V ABI. MXCSR and the x87 control word are never changed by a kernel.
asm(R"(
.text
.p2align 4
.type cpu_cuda_switch, @function
cpu_cuda_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cpu_cuda_switch, .-cpu_cuda_switch
)");
extern "C" void cpu_cuda_switch(void** save, void* load);

namespace cpu_cuda {

void switch_context(Context& from, Context& to) { cpu_cuda_switch(&from.stack_pointer, to.stack_pointer); }

void prepare_context(Context& context, void* stack, std::size_t bytes, void (*entry)()) {
    auto top = (reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t{63};
    auto* slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;                          // entry's return address; keeps the stack aligned as after a call
    *--slot = reinterpret_cast<void*>(entry);   // where the first switch returns to
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    context.stack_pointer = slot;
}

}  // namespace cpu_cuda

#else

#include <ucontext.h>

namespace cpu_cuda {

static ucontext_t* portable(Context& context) {
    if (context.portable == nullptr) context.portable = new ucontext_t;
    return static_cast<ucontext_t*>(context.portable);
}

void switch_context(Context& from, Context& to) { swapcontext(portable(from), portable(to)); }

void prepare_context(Context& context, void* stack, std::size_t bytes, void (*entry)()) {
    ucontext_t* u = portable(context);
    getcontext(u);
    u->uc_stack.ss_sp = stack;
    u->uc_stack.ss_size = bytes;
    u->uc_link = nullptr;
    makecontext(u, entry, 0);
}

}  // namespace cpu_cuda

#endif
