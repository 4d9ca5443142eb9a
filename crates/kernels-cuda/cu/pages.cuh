// The KV page pool, as `kv.cu` writes and `attention.cu` reads it.
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>

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
