// Rounding activations to int8, 32 at a time, once or twice: the rounding of the CPU's fast mode.
//
// Rounded once, x = scale * q with scale = max|x| / 127; rounded twice, x = scale * (256 q + r) with a
// 256th of that scale. Below 1e-35 a block becomes zeros; one with a NaN or an infinity gets a NaN
// scale, so that the fault reaches the output of its row.
#include "common.cuh"
#include "quantised.cuh"

__device__ __forceinline__ int half_warp_sum(int x) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

// x (T, K) as `n_blocks` blocks of 32; one warp a block.
EXTERN void quantise(const float *x, Quantised out, uint32_t n_blocks, uint32_t twice) {
    const uint32_t block = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (block >= n_blocks) return;
    const float value = x[(size_t)block * 32 + lane];
    // As integers, which puts a NaN after infinity.
    uint32_t bits = __float_as_uint(fabsf(value));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffff, bits, step);
        bits = bits > other ? bits : other;
    }
    const float largest = __uint_as_float(bits);
    const bool usable = largest >= 1e-35f && largest < INFINITY;
    const float step = largest / 127.0f, inverse = 127.0f / largest;
    const float first = usable ? rintf(value * inverse) : 0;
    float second = 0;
    if (usable && twice) {
        const float parts = fmaf(first, -step, value) * inverse * 256.0f;
        second = rintf(fmaxf(-127.0f, fminf(127.0f, parts)));
    }
    const size_t at = (size_t)block * 32 + lane;
    out.first[at] = (int8_t)first;
    if (twice) out.second[at] = (int8_t)second;
    const int sum = half_warp_sum(twice ? 256 * (int)first + (int)second : (int)first);
    const int upper = __shfl_sync(0xffffffff, sum, 16);
    if (lane == 0) {
        const float scale = twice ? step / 256.0f : step;
        const float fault = largest >= 1e-35f || isnan(largest) ? NAN : 0.0f;
        out.heads[block] = {usable ? scale : fault, sum, upper};
    }
}
