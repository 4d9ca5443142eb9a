// Copies from global to shared memory that go on by themselves.
#pragma once
#include <stdint.h>

// What a warp has room for of that which it copies on its way, such as pairs of chunks; one is being used.
// `src/device.rs` has the same: cards other than those with a compute capability of 9.0 may have less shared
// memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define DEPTH 3
#else
#define DEPTH 2
#endif

__device__ __forceinline__ void copy_16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_8(uint32_t to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_4(uint32_t to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void end_of_chunk() { asm volatile("cp.async.commit_group;" ::: "memory"); }
