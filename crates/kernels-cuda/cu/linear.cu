// Products x W^T of packed weights: one warp computes one output feature for a tile of rows. A lane
// takes every 32nd block, so that a warp reads 512 consecutive bytes of nibbles at once.
//
// A row's result does not depend on the other rows of the batch: its sums have one order.
#include "common.cuh"
#include "epilogue.cuh"
#include "quantised.cuh"

#define WARPS 8
#define LANES 32

// The value of a block times one row of activations, as integers.
template <class F, bool TWICE>
__device__ __forceinline__ float block_product(const uint32_t (&q)[8], const Affine &w,
                                               const Quantised &x, size_t block) {
    const int4 *first = (const int4 *)(x.first + block * 32);
    int sums[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int4 v = first[half];
        int s = __dp4a((int)q[4 * half], v.x, 0);
        s = __dp4a((int)q[4 * half + 1], v.y, s);
        s = __dp4a((int)q[4 * half + 2], v.z, s);
        sums[half] = __dp4a((int)q[4 * half + 3], v.w, s);
    }
    if constexpr (TWICE) {
        const int4 *second = (const int4 *)(x.second + block * 32);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int4 v = second[half];
            int s = __dp4a((int)q[4 * half], v.x, 256 * sums[half]);
            s = __dp4a((int)q[4 * half + 1], v.y, s);
            s = __dp4a((int)q[4 * half + 2], v.z, s);
            sums[half] = __dp4a((int)q[4 * half + 3], v.w, s);
        }
    }
    const QuantHead head = x.heads[block];
    float out;
    if constexpr (F::HALVES) {
        out = w.scale[0] * (float)(sums[0] - F::BIAS * head.sums[0]) +
              w.scale[1] * (float)(sums[1] - F::BIAS * head.sums[1]);
        if constexpr (F::MINIMA) {
            out += w.minimum[0] * (float)head.sums[0] + w.minimum[1] * (float)head.sums[1];
        }
    } else {
        const int sum = head.sums[0] + head.sums[1];
        out = w.scale[0] * (float)(sums[0] + sums[1] - F::BIAS * sum);
        if constexpr (F::MINIMA) out += w.minimum[0] * (float)sum;
    }
    return head.scale * out;
}

// Rows of activations that one warp decodes a weight for, T of `n_rows`.
template <class F, bool TWICE, int T>
__device__ __forceinline__ void linear_int8(Planes w, Quantised x, Epilogue end, uint32_t n_rows) {
    const uint32_t n = blockIdx.x * WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const uint32_t first_row = blockIdx.y * T;
    if (n >= w.rows) return;
    const uint32_t n_blocks = w.columns / 32;
    float sums[T] = {};
    for (uint32_t b = lane; b < n_blocks; b += LANES) {
        const size_t block = (size_t)n * n_blocks + b;
        uint32_t q[8];
        codes<F>(w, block, q);
        const Affine scales = affine<F>(w, block);
#pragma unroll
        for (int t = 0; t < T; t++) {
            const uint32_t row = min(first_row + t, n_rows - 1);
            sums[t] += block_product<F, TWICE>(q, scales, x, (size_t)row * n_blocks + b);
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        const float sum = warp_sum(sums[t]);
        if (lane == 0 && first_row + t < n_rows) end.put(first_row + t, n, w.rows, sum);
    }
}

// The exact mode: f32 activations, each weight as the checkpoint has it.
template <class F, int T>
__device__ __forceinline__ void linear_f32(Planes w, const float *x, Epilogue end, uint32_t n_rows) {
    const uint32_t n = blockIdx.x * WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const uint32_t first_row = blockIdx.y * T;
    if (n >= w.rows) return;
    const uint32_t n_blocks = w.columns / 32;
    float sums[T] = {};
    for (uint32_t b = lane; b < n_blocks; b += LANES) {
        const size_t block = (size_t)n * n_blocks + b;
        uint32_t q[8];
        codes<F>(w, block, q);
        const Affine scales = affine<F>(w, block);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float weights[4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                weights[c] = fmaf(scales.scale[i / 4], code_value<F>(q[i], c), scales.minimum[i / 4]);
            }
#pragma unroll
            for (int t = 0; t < T; t++) {
                const uint32_t row = min(first_row + t, n_rows - 1);
                // Not a vector load: an activation buffer need not start on 16 bytes.
                const float *v = x + (size_t)row * w.columns + b * 32 + 4 * i;
#pragma unroll
                for (int c = 0; c < 4; c++) sums[t] = fmaf(weights[c], v[c], sums[t]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        const float sum = warp_sum(sums[t]);
        if (lane == 0 && first_row + t < n_rows) end.put(first_row + t, n, w.rows, sum);
    }
}

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__half x) { return __half2float(x); }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }

// Weights that are floats, with any number of columns; f32 activations in both modes.
template <class W, int T>
__device__ __forceinline__ void linear_float(Planes w, const float *x, Epilogue end,
                                             uint32_t n_rows) {
    const uint32_t n = blockIdx.x * WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const uint32_t first_row = blockIdx.y * T;
    if (n >= w.rows) return;
    const W *weights = (const W *)w.low + (size_t)n * w.columns;
    float sums[T] = {};
    for (uint32_t k = lane; k < w.columns; k += LANES) {
        const float weight = number(weights[k]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            const uint32_t row = min(first_row + t, n_rows - 1);
            sums[t] = fmaf(weight, x[(size_t)row * w.columns + k], sums[t]);
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        const float sum = warp_sum(sums[t]);
        if (lane == 0 && first_row + t < n_rows) end.put(first_row + t, n, w.rows, sum);
    }
}

#define INT8(name, F, T)                                                                           \
    EXTERN void linear_once_##name##_##T(Planes w, Quantised x, Epilogue end, uint32_t n) {        \
        linear_int8<F, false, T>(w, x, end, n);                                                    \
    }                                                                                              \
    EXTERN void linear_twice_##name##_##T(Planes w, Quantised x, Epilogue end, uint32_t n) {       \
        linear_int8<F, true, T>(w, x, end, n);                                                     \
    }
#define F32(name, F, T)                                                                            \
    EXTERN void linear_f32_##name##_##T(Planes w, const float *x, Epilogue end, uint32_t n) {      \
        linear_f32<F, T>(w, x, end, n);                                                            \
    }
#define FLOAT(name, W, T)                                                                          \
    EXTERN void linear_f32_##name##_##T(Planes w, const float *x, Epilogue end, uint32_t n) {      \
        linear_float<W, T>(w, x, end, n);                                                          \
    }
#define FORMAT(name, F) INT8(name, F, 1) INT8(name, F, 8) F32(name, F, 1) F32(name, F, 8)
EACH_FORMAT(FORMAT)
FLOAT(f32, float, 1) FLOAT(f32, float, 8)
FLOAT(f16, __half, 1) FLOAT(f16, __half, 8)
FLOAT(bf16, __nv_bfloat16, 1) FLOAT(bf16, __nv_bfloat16, 8)
