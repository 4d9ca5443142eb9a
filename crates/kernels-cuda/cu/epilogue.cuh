// What happens to the outputs of a product.
#pragma once
#include <stdint.h>

// `src/linear.rs` has the same constants.
enum Finish { STORE, ADD, ADD_ROWS, SILU, GELU_TANH, TIMES, GELU };

// `src/linear.rs` has the same fields in the same order.
struct Epilogue {
    float *out;            // (T, N), or more rows with ADD_ROWS
    const float *bias;     // (N), or null
    const uint32_t *rows;  // ADD_ROWS: where row t goes
    const float *scales;   // ADD_ROWS: times what
    float scale;           // ADD: times what
    uint32_t finish;

    // Ends output n of row t.
    __device__ __forceinline__ void put(uint32_t t, uint32_t n, uint32_t n_outputs, float sum) const {
        if (bias) sum += bias[n];
        const size_t row = finish == ADD_ROWS ? rows[t] : t;
        float *at = out + row * n_outputs + n;
        switch (finish) {
        case STORE: *at = sum; break;
        case ADD: *at = fmaf(scale, sum, *at); break;
        case ADD_ROWS: *at = fmaf(scales[t], sum, *at); break;
        case SILU: *at = sum / (1.0f + expf(-sum)); break;
        case GELU_TANH: {
            const float inner = 0.7978845608028654f * (sum + 0.044715f * sum * sum * sum);
            *at = 0.5f * sum * (1.0f + tanhf(inner));
            break;
        }
        case TIMES: *at *= sum; break;
        case GELU: *at = 0.5f * sum * (1.0f + erff(sum * 0.7071067811865476f)); break;
        }
    }
};
