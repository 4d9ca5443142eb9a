// Activations in int8, as `quantise.cu` writes and `linear.cu` reads them.
#pragma once
#include <stdint.h>

// What a block of 32 has beside its integers.
struct QuantHead {
    float scale;
    // Sums of the integers (of 256 q + r when rounded twice) of weights 0..16 and 16..32.
    int sums[2];
};

// `src/linear.rs` has the same fields in the same order.
struct Quantised {
    int8_t *first;
    int8_t *second;
    QuantHead *heads;
};
