// Rounding rows of activations to int8, 32 at a time; see `input.cuh`.
#include "common.cuh"
#include "input.cuh"

// x (T, K), each row through an RMS norm if there is one; one block of threads a row.
EXTERN void quantise(Row row, Quantised out, uint32_t width) {
    begin();
    __shared__ Inverse inverse;
    const uint32_t n_blocks = width / 32;
    const size_t start = (size_t)blockIdx.x * n_blocks;
    row.x += (size_t)blockIdx.x * width;
    const auto put = [&](uint32_t block, uint32_t part, uint32_t q, uint32_t r, float scale, int lower,
                         int upper) {
        const size_t at = (start + block) * 8 + part;
        ((uint32_t *)out.first)[at] = q;
        ((uint32_t *)out.second)[at] = r;
        if (part == 0) out.heads[start + block] = {scale, {lower, upper}};
    };
    inverse.share(round_row(row, n_blocks, put));
    __syncthreads();
    if (threadIdx.x == 0) out.inverses[blockIdx.x] = inverse.value(row, width);
}
