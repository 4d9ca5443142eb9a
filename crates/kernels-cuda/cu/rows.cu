// Operations on rows of activations.
#include "common.cuh"
#include "found.cuh"

// Tokens lie `stride` words apart: alone, or each in front of its logit, as `largest` left them. Beside a
// logit that is no number there may be anything.
__device__ __forceinline__ uint32_t id_of(const Planes &table, const uint32_t *ids, uint32_t stride,
                                          size_t t) {
    return min(ids[t * stride], table.rows - 1);
}

// out (T, C) = scale * rows `ids` of a packed table; one thread a block of 32.
template <class F>
__device__ void embed(const Planes &table, const uint32_t *ids, uint32_t stride, float scale, float *out,
                      uint32_t n_ids) {
    begin();
    const uint32_t n_blocks = table.columns / 32;
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_ids * n_blocks) return;
    const uint32_t t = at / n_blocks, b = at % n_blocks;
    Raw<F> raw;
    load(table, id_of(table, ids, stride, t), b, raw);
    uint32_t q[8];
    codes(raw, q);
    const Affine w = affine(raw);
    float *row = out + (size_t)t * table.columns + b * 32;
    for (int k = 0; k < 32; k++) {
        const int half = k / 16;
        row[k] = scale * fmaf(w.scale[half], code_value<F>(q[k / 4], k % 4), w.minimum[half]);
    }
}

template <class W>
__device__ void embed_float(const Planes &table, const uint32_t *ids, uint32_t stride, float scale,
                            float *out, uint32_t n_ids) {
    begin();
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)n_ids * table.columns) return;
    const size_t id = id_of(table, ids, stride, at / table.columns);
    out[at] = scale * (float)((const W *)table.low)[id * table.columns + at % table.columns];
}

#define EMBED(name, F)                                                                             \
    EXTERN void embed_##name(Planes table, const uint32_t *ids, uint32_t stride, float scale,      \
                             float *out, uint32_t n_ids) {                                         \
        embed<F>(table, ids, stride, scale, out, n_ids);                                           \
    }
#define EMBED_FLOAT(name, W)                                                                       \
    EXTERN void embed_##name(Planes table, const uint32_t *ids, uint32_t stride, float scale,      \
                             float *out, uint32_t n_ids) {                                         \
        embed_float<W>(table, ids, stride, scale, out, n_ids);                                     \
    }
EACH_FORMAT(EMBED)
EMBED_FLOAT(f32, float)
EMBED_FLOAT(f16, __half)
EMBED_FLOAT(bf16, __nv_bfloat16)

// out[i] = x[rows[i]]; x (T, width).
EXTERN void gather_rows(const float *x, const uint32_t *rows, float *out, uint32_t n_rows,
                        uint32_t width) {
    begin();
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)n_rows * width) return;
    out[at] = x[rows[at / width] * (size_t)width + at % width];
}

EXTERN void add(float *x, const float *y, uint32_t len) {
    begin();
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < len) x[at] += y[at];
}

// x = scale * x, then, with a cap above zero, cap * tanh(x / cap).
EXTERN void scale_and_cap(float *x, uint32_t len, float scale, float cap) {
    begin();
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= len) return;
    const float scaled = scale * x[at];
    x[at] = cap > 0 ? cap * tanhf(scaled / cap) : scaled;
}

// out[s] = mean over rows spans[s].x .. + spans[s].y of x (T, width).
EXTERN void mean_rows(const float *x, const uint2 *spans, float *out, uint32_t n_spans,
                      uint32_t width) {
    begin();
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_spans * width) return;
    const uint2 span = spans[at / width];
    float sum = 0;
    for (uint32_t i = 0; i < span.y; i++) sum += x[(size_t)(span.x + i) * width + at % width];
    out[at] = sum / (float)span.y;
}

__device__ __forceinline__ Largest larger(Largest a, Largest b) {
    if (isnan(a.value) || isnan(b.value)) return {a.index, NAN};
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// The largest that any thread of the block has, in its first warp.
__device__ __forceinline__ Largest largest_of_block(Largest own) {
    __shared__ Largest of_warps[32];
    for (int round = 0; round < 2; round++) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const uint32_t index = __shfl_xor_sync(0xffffffff, own.index, step);
            own = larger(own, {index, __shfl_xor_sync(0xffffffff, own.value, step)});
        }
        if (round == 1) break;
        if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = own;
        __syncthreads();
        const bool has = threadIdx.x % 32 < blockDim.x / 32;
        own = has ? of_warps[threadIdx.x % 32] : Largest{0xffffffff, -INFINITY};
    }
    return own;
}

// out[t] = the first largest of the first `limit` values of row t of x (T, width); `seen`, memory of the
// host, gets the same. The blocks (x) of a row share it; the last to end looks through their `parts`
// (T, blocks). `n_done` (T) is zero before and after.
EXTERN void largest(const float *x, Largest *out, Largest *seen, Largest *parts, uint32_t *n_done,
                    uint32_t width, uint32_t limit) {
    begin();
    __shared__ bool is_last;
    const uint32_t t = blockIdx.y, n_parts = gridDim.x;
    const float *row = x + (size_t)t * width;
    Largest own = {0xffffffff, -INFINITY};
    for (uint32_t n = blockIdx.x * blockDim.x + threadIdx.x; n < limit; n += n_parts * blockDim.x) {
        own = larger(own, {n, isfinite(row[n]) ? row[n] : NAN});
    }
    own = largest_of_block(own);
    if (threadIdx.x == 0) {
        parts[t * n_parts + blockIdx.x] = own;
        __threadfence();
        is_last = atomicAdd(&n_done[t], 1) == n_parts - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    own = {0xffffffff, -INFINITY};
    for (uint32_t i = threadIdx.x; i < n_parts; i += blockDim.x) own = larger(own, parts[t * n_parts + i]);
    own = largest_of_block(own);
    if (threadIdx.x == 0) out[t] = own, seen[t] = own, n_done[t] = 0;
}
