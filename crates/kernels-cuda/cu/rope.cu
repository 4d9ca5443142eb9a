// Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34): one thread a pair.
#include "common.cuh"

// x (T, H * D) in place; angles in f64, as the reference has them.
EXTERN void rope(float *x, const uint32_t *positions, const float *inverse_frequencies,
                 uint32_t n_rows, uint32_t n_heads, uint32_t head_dim, uint32_t n_pairs,
                 float magnitude, uint32_t interleaved) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)n_rows * n_heads * n_pairs) return;
    const uint32_t pair = at % n_pairs;
    const size_t head = at / n_pairs;
    double sine, cosine;
    sincos((double)positions[head / n_heads] * (double)inverse_frequencies[pair], &sine, &cosine);
    const float s = (float)(magnitude * sine), c = (float)(magnitude * cosine);
    float *values = x + head * head_dim;
    const uint32_t first = interleaved ? 2 * pair : pair;
    const uint32_t second = interleaved ? 2 * pair + 1 : pair + n_pairs;
    const float a = values[first], b = values[second];
    values[first] = a * c - b * s;
    values[second] = a * s + b * c;
}
