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
};
