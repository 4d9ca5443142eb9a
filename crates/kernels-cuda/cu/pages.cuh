// The KV page pool, as `kv.cu` writes and `attention.cu` reads it.
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>

#include "common.cuh"

#define PAGE_TOKENS 256

// `src/kv.rs` has the same constants.
enum KvDtype { KV_F32, KV_F16, KV_INT8 };

// Elements are (page, layer, key or value, K, PAGE_TOKENS, D); scales, of int8 alone, the same
// without D. `src/kv.rs` has the same fields in the same order.
struct Pages {
    void *elements;
    float *scales;
    uint32_t n_layers;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t dtype;

    // Which key (0) or value (1) of all that the pool has.
    __device__ __forceinline__ size_t entry(uint32_t page, uint32_t layer, uint32_t value,
                                            uint32_t head, uint32_t offset) const {
        return ((((size_t)page * n_layers + layer) * 2 + value) * n_kv_heads + head) * PAGE_TOKENS +
               offset;
    }
};

// Stores a key or a value (D); one warp. Int8 rounds as `int8_scale` in Rust says.
__device__ __forceinline__ void store(const Pages &pages, size_t entry, const float *from) {
    const uint32_t lane = threadIdx.x % 32, D = pages.head_dim;
    if (pages.dtype == KV_F32) {
        for (uint32_t d = lane; d < D; d += 32) ((float *)pages.elements)[entry * D + d] = from[d];
        return;
    }
    if (pages.dtype == KV_F16) {
        __half *to = (__half *)pages.elements + entry * D;
        for (uint32_t d = lane; d < D; d += 32) to[d] = __float2half_rn(from[d]);
        return;
    }
    uint32_t bits = 0; // As integers, which puts a NaN after infinity.
    for (uint32_t d = lane; d < D; d += 32) bits = max(bits, __float_as_uint(fabsf(from[d])));
    bits = __reduce_max_sync(0xffffffff, bits);
    const float largest = __uint_as_float(bits);
    const bool finite = largest < INFINITY, usable = finite && largest >= 1e-35f;
    const float factor = usable ? 127.0f / largest : 0;
    int8_t *to = (int8_t *)pages.elements + entry * D;
    for (uint32_t d = lane; d < D; d += 32) to[d] = usable ? (int8_t)rintf(factor * from[d]) : 0;
    if (lane == 0) pages.scales[entry] = usable ? largest / 127.0f : finite ? 0.0f : NAN;
}
