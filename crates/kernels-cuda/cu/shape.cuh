// The heads of an attention call.
#pragma once
#include <stdint.h>

// `src/attention.rs` has the same fields in the same order.
struct Shape {
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t window; // 0: none
    float scale;
    float soft_cap; // 0: none

    // The score of a product of a query and a key.
    __device__ __forceinline__ float score(float dot) const {
        float score = dot * scale;
        if (soft_cap > 0) score = soft_cap * tanhf(score / soft_cap);
        return score;
    }
};
