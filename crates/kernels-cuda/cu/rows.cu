// Operations on rows of activations.
#include "common.cuh"

// out (T, C) = scale * rows `ids` of a packed table; one thread a block of 32.
template <class F>
__device__ void embed(const Planes &table, const uint32_t *ids, float scale, float *out,
                      uint32_t n_ids) {
    const uint32_t n_blocks = table.columns / 32;
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_ids * n_blocks) return;
    const uint32_t t = at / n_blocks, b = at % n_blocks;
    const size_t block = (size_t)ids[t] * n_blocks + b;
    uint32_t q[8];
    codes<F>(table, block, q);
    const Affine w = affine<F>(table, block);
    float *row = out + (size_t)t * table.columns + b * 32;
    for (int k = 0; k < 32; k++) {
        const int half = k / 16;
        row[k] = scale * fmaf(w.scale[half], code_value<F>(q[k / 4], k % 4), w.minimum[half]);
    }
}

template <class W>
__device__ void embed_float(const Planes &table, const uint32_t *ids, float scale, float *out,
                            uint32_t n_ids) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)n_ids * table.columns) return;
    const size_t k = at % table.columns;
    out[at] = scale * (float)((const W *)table.low)[ids[at / table.columns] * (size_t)table.columns + k];
}

#define EMBED(name, F)                                                                             \
    EXTERN void embed_##name(Planes table, const uint32_t *ids, float scale, float *out,           \
                             uint32_t n_ids) {                                                     \
        embed<F>(table, ids, scale, out, n_ids);                                                   \
    }
#define EMBED_FLOAT(name, W)                                                                       \
    EXTERN void embed_##name(Planes table, const uint32_t *ids, float scale, float *out,           \
                             uint32_t n_ids) {                                                     \
        embed_float<W>(table, ids, scale, out, n_ids);                                             \
    }
EACH_FORMAT(EMBED)
EMBED_FLOAT(f32, float)
EMBED_FLOAT(f16, __half)
EMBED_FLOAT(bf16, __nv_bfloat16)

// out[i] = x[rows[i]]; x (T, width).
EXTERN void gather_rows(const float *x, const uint32_t *rows, float *out, uint32_t n_rows,
                        uint32_t width) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)n_rows * width) return;
    out[at] = x[rows[at / width] * (size_t)width + at % width];
}

EXTERN void add(float *x, const float *y, uint32_t len) {
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < len) x[at] += y[at];
}

// x = scale * x, then, with a cap above zero, cap * tanh(x / cap).
EXTERN void scale_and_cap(float *x, uint32_t len, float scale, float cap) {
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= len) return;
    const float scaled = scale * x[at];
    x[at] = cap > 0 ? cap * tanhf(scaled / cap) : scaled;
}

// out[s] = mean over rows spans[s].x .. + spans[s].y of x (T, width).
EXTERN void mean_rows(const float *x, const uint2 *spans, float *out, uint32_t n_spans,
                      uint32_t width) {
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_spans * width) return;
    const uint2 span = spans[at / width];
    float sum = 0;
    for (uint32_t i = 0; i < span.y; i++) sum += x[(size_t)(span.x + i) * width + at % width];
    out[at] = sum / (float)span.y;
}

struct Largest {
    uint32_t index;
    float value;
};

// The first largest of the first `limit` values of every row of x (T, N), one block a row. A value
// that is not finite makes that of its row NaN.
EXTERN void largest(const float *x, Largest *out, uint32_t width, uint32_t limit) {
    const float *row = x + (size_t)blockIdx.x * width;
    float value = -INFINITY;
    uint32_t index = 0xffffffff;
    bool finite = true;
    for (uint32_t n = threadIdx.x; n < limit; n += blockDim.x) {
        finite &= isfinite(row[n]) != 0;
        if (row[n] > value) value = row[n], index = n;
    }
    __shared__ float values[32];
    __shared__ uint32_t indices[32];
    finite = __syncthreads_and(finite);
    for (int round = 0; round < 2; round++) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const float v = __shfl_xor_sync(0xffffffff, value, step);
            const uint32_t i = __shfl_xor_sync(0xffffffff, index, step);
            if (v > value || (v == value && i < index)) value = v, index = i;
        }
        if (round == 1) break;
        if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, indices[threadIdx.x / 32] = index;
        __syncthreads();
        const bool has = threadIdx.x % 32 < blockDim.x / 32;
        value = has ? values[threadIdx.x % 32] : -INFINITY;
        index = has ? indices[threadIdx.x % 32] : 0xffffffff;
    }
    if (threadIdx.x == 0) out[blockIdx.x] = {index, finite ? value : NAN};
}
