// cuda_src/shared_memory.cuh for the host: a 32-bit shared address is an offset from the kernel's shared array.
//
// As with all headers here that stand in for one of PTX, only a source given as text finds this file: one that lies
// in cuda_src finds its neighbour.
#pragma once

namespace intfa {

// The array starts at this address, as aligned as the array itself, so that 0 is none.
constexpr unsigned kSharedStart = 1024;
static unsigned char* shared_base = nullptr;  // static, for an inline one would be the same in all libraries

inline unsigned shared_address(const void* pointer) {
    shared_base = static_cast<unsigned char*>(const_cast<void*>(pointer));
    return kSharedStart;
}
inline unsigned char* shared_pointer(unsigned address) { return shared_base + (address - kSharedStart); }
template <class T>
inline T& shared_at(unsigned address) {
    return *reinterpret_cast<T*>(shared_pointer(address));
}

inline void store_float(unsigned address, float x) { shared_at<float>(address) = x; }
inline void store_int4(unsigned address, int x, int y, int z, int w) { shared_at<int4>(address) = {x, y, z, w}; }
inline int4 load_int4(unsigned address) { return shared_at<int4>(address); }
inline float load_float(unsigned address) { return shared_at<float>(address); }
inline float2 load_float2(unsigned address) { return shared_at<float2>(address); }
inline float4 load_float4(unsigned address) { return shared_at<float4>(address); }

}  // namespace intfa
