// Norms of rows, one block of threads a row.
#include "common.cuh"

// `src/rows.rs` has the same constants.
enum Kind { RMS, LAYER };
enum Into { REPLACE, ADD_TO };

// out[t] = norm(x[t]) * weight (+ bias), or added to it; x, out (T, C), may be the same.
EXTERN void norm_rows(const float *x, const float *weight, const float *bias, float *out, uint32_t width,
                 float eps, uint32_t kind, uint32_t into) {
    begin();
    const float *row = x + (size_t)blockIdx.x * width;
    float *to = out + (size_t)blockIdx.x * width;
    float mean = 0;
    if (kind == LAYER) {
        float sum = 0;
        for (uint32_t c = threadIdx.x; c < width; c += blockDim.x) sum += row[c];
        mean = block_sum(sum) / (float)width;
    }
    float squares = 0;
    for (uint32_t c = threadIdx.x; c < width; c += blockDim.x) {
        const float d = row[c] - mean;
        squares = fmaf(d, d, squares);
    }
    const float inverse = 1.0f / sqrtf(block_sum(squares) / (float)width + eps);
    for (uint32_t c = threadIdx.x; c < width; c += blockDim.x) {
        float y = (row[c] - mean) * inverse * weight[c];
        if (bias) y += bias[c];
        to[c] = into == ADD_TO ? to[c] + y : y;
    }
}
