// Takes the place of the undefined-behaviour sanitizer's library: each finding ends the launch with its own words.
#include <cstring>

#include "runtime.h"

namespace {

using cpu_cuda::format;

// The compiler's descriptions of places and types.
struct Location {
    const char* file;
    std::uint32_t line;
    std::uint32_t column;
};

struct Type {
    std::uint16_t kind;  // 0: integer
    std::uint16_t info;  // of an integer: bit 0 signed, the rest log2 of the width in bits
    char name[1];
};

using Value = std::uintptr_t;

std::string text(const Type* type, Value value) {
    if (type->kind != 0) return type->name;
    const int width = 1 << (type->info >> 1);
    if (width > 64) return type->name;
    if ((type->info & 1) == 0) return format("%llu", static_cast<unsigned long long>(value));
    const auto bits = static_cast<long long>(value << (64 - width)) >> (64 - width);
    return format("%lld", bits);
}

[[noreturn]] void report(const Location& where, const std::string& what) {
    const char* file = where.file != nullptr ? std::strrchr(where.file, '/') : nullptr;
    const std::string message = format("%s:%u:%u: ", file != nullptr ? file + 1 : where.file, where.line, where.column);
    cpu_cuda::fail(cpu_cuda::Fault::undefined_behaviour, nullptr, message + what);
}

struct Overflow {
    Location where;
    const Type* type;
};
struct Shift {
    Location where;
    const Type* left;
    const Type* right;
};
struct Bounds {
    Location where;
    const Type* array;
    const Type* index;
};
struct Mismatch {
    Location where;
    const Type* type;
    unsigned char log_alignment;
    unsigned char kind;
};
struct Conversion {
    Location where;
    const Type* from;
    const Type* to;
};
struct Place {
    Location where;
};

}  // namespace

// Each handler exists twice: code that may continue calls the plain name, code that must not the other.
#define CPU_CUDA_FINDING(name, parameters, body)                                     \
    extern "C" [[noreturn]] void __ubsan_handle_##name parameters body               \
    extern "C" [[noreturn]] void __ubsan_handle_##name##_abort parameters body

CPU_CUDA_FINDING(add_overflow, (const Overflow* d, Value a, Value b), {
    report(d->where, format("overflow: %s + %s in %s", text(d->type, a).c_str(), text(d->type, b).c_str(), d->type->name));
})
CPU_CUDA_FINDING(sub_overflow, (const Overflow* d, Value a, Value b), {
    report(d->where, format("overflow: %s - %s in %s", text(d->type, a).c_str(), text(d->type, b).c_str(), d->type->name));
})
CPU_CUDA_FINDING(mul_overflow, (const Overflow* d, Value a, Value b), {
    report(d->where, format("overflow: %s * %s in %s", text(d->type, a).c_str(), text(d->type, b).c_str(), d->type->name));
})
CPU_CUDA_FINDING(negate_overflow, (const Overflow* d, Value a), {
    report(d->where, format("overflow: -%s in %s", text(d->type, a).c_str(), d->type->name));
})
CPU_CUDA_FINDING(divrem_overflow, (const Overflow* d, Value a, Value b), {
    report(d->where, format("division of %s by %s in %s", text(d->type, a).c_str(), text(d->type, b).c_str(), d->type->name));
})
CPU_CUDA_FINDING(shift_out_of_bounds, (const Shift* d, Value a, Value b), {
    report(d->where, format("shift of %s by %s in %s", text(d->left, a).c_str(), text(d->right, b).c_str(), d->left->name));
})
CPU_CUDA_FINDING(out_of_bounds, (const Bounds* d, Value index), {
    report(d->where, format("index %s outside of %s", text(d->index, index).c_str(), d->array->name));
})
CPU_CUDA_FINDING(type_mismatch_v1, (const Mismatch* d, Value pointer), {
    const char* what = pointer == 0 ? "null pointer to"
                       : pointer & ((Value{1} << d->log_alignment) - 1) ? "misaligned pointer to" : "too little memory for";
    report(d->where, format("%s %s", what, d->type->name));
})
CPU_CUDA_FINDING(float_cast_overflow, (const Conversion* d, Value), {
    report(d->where, format("a value of %s outside of the range of %s", d->from->name, d->to->name));
})
CPU_CUDA_FINDING(load_invalid_value, (const Overflow* d, Value value), {
    report(d->where, format("%s is no value of %s", text(d->type, value).c_str(), d->type->name));
})
CPU_CUDA_FINDING(pointer_overflow, (const Place* d, Value, Value), { report(d->where, "pointer arithmetic wraps around"); })
CPU_CUDA_FINDING(vla_bound_not_positive, (const Overflow* d, Value), { report(d->where, "array without elements"); })
CPU_CUDA_FINDING(nonnull_arg, (const Place* d), { report(d->where, "null argument"); })
CPU_CUDA_FINDING(nonnull_return_v1, (const void*, const Location* where), { report(*where, "null result"); })
CPU_CUDA_FINDING(invalid_builtin, (const Place* d), { report(d->where, "zero passed to a bit-counting builtin"); })
extern "C" [[noreturn]] void __ubsan_handle_builtin_unreachable(const Place* d) { report(d->where, "unreachable code"); }
extern "C" [[noreturn]] void __ubsan_handle_missing_return(const Place* d) { report(d->where, "no return value"); }
