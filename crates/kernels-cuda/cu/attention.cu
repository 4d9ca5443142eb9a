// Scaled dot-product attention with grouped heads, causal over pages or unmasked inside spans.
//
// Over pages, `attention_run` gives one block of threads a run of positions of one head of one row,
// and `attention_merge` puts the runs together (Dao et al. 2023, "Flash-Decoding for long-context
// inference"). Heads of an odd width, and spans, go to `attend`, where one block has one head of one
// row; its warps take every WARPS-th position and keep a running softmax each (Milakov and Gimelshein
// 2018, arXiv:1805.02867), which are merged in a fixed order.
#include "common.cuh"
#include "pages.cuh"

#define WARPS 8
// Elements of a head that one lane holds: heads up to 512 wide.
#define EACH 16

// `src/attention.rs` has the same fields in the same order.
struct Shape {
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t window; // 0: none
    float scale;
    float soft_cap; // 0: none
};

// One row: where it lies, the keys that it sees, and where its pages are in the table.
struct Row {
    uint32_t row;
    uint32_t first;
    uint32_t end;
    uint32_t pages_at; // unmasked: the first row of its span
};

// Keys and values in pages.
template <class E> struct Paged {
    Pages pages;
    uint32_t layer;
    const uint32_t *table;

    __device__ __forceinline__ float at(const Row &row, uint32_t value, uint32_t head,
                                        uint32_t position, uint32_t d) const {
        const uint32_t page = table[row.pages_at + position / PAGE_TOKENS];
        const size_t entry = pages.entry(page, layer, value, head, position % PAGE_TOKENS);
        const E element = ((const E *)pages.elements)[entry * pages.head_dim + d];
        if constexpr (sizeof(E) == 1) return pages.scales[entry] * (float)element;
        return (float)element;
    }
};

// Keys and values of an encoder's batch, (T, K * D).
struct Direct {
    const float *k;
    const float *v;
    uint32_t width;
    uint32_t head_dim;

    __device__ __forceinline__ float at(const Row &row, uint32_t value, uint32_t head,
                                        uint32_t position, uint32_t d) const {
        const size_t start = (size_t)(row.pages_at + position) * width + head * head_dim;
        return (value ? v : k)[start + d];
    }
};

template <class Source>
__device__ void attend(const float *q, const Source &source, Shape shape, const Row *rows,
                       float *out) {
    const Row row = rows[blockIdx.x];
    const uint32_t h = blockIdx.y, head = h / (shape.n_heads / shape.n_kv_heads);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = shape.head_dim;
    const size_t start = ((size_t)row.row * shape.n_heads + h) * D;
    float query[EACH], sums[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t d = lane + 32 * i;
        query[i] = d < D ? q[start + d] : 0;
        sums[i] = 0;
    }
    float highest = -INFINITY, total = 0;
    for (uint32_t position = row.first + warp; position < row.end; position += WARPS) {
        float dot = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint32_t d = lane + 32 * i;
            if (d < D) dot = fmaf(query[i], source.at(row, 0, head, position, d), dot);
        }
        float score = warp_sum(dot) * shape.scale;
        if (shape.soft_cap > 0) score = shape.soft_cap * tanhf(score / shape.soft_cap);
        // A NaN must not be lost: `fmaxf` would drop it, the comparison keeps it out of `highest`
        // and `p` has it.
        const float next = score > highest ? score : highest;
        const float keep = highest == -INFINITY ? 0.0f : expf(highest - next);
        const float p = expf(score - next);
        total = total * keep + p;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint32_t d = lane + 32 * i;
            if (d < D) sums[i] = fmaf(p, source.at(row, 1, head, position, d), sums[i] * keep);
        }
        highest = next;
    }
    __shared__ float highests[WARPS], totals[WARPS];
    extern __shared__ float merged[]; // (WARPS, D)
    if (lane == 0) highests[warp] = highest, totals[warp] = total;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t d = lane + 32 * i;
        if (d < D) merged[warp * D + d] = sums[i];
    }
    __syncthreads();
    highest = highests[0];
    for (int w = 1; w < WARPS; w++) highest = highests[w] > highest ? highests[w] : highest;
    for (uint32_t d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0, weight = 0;
        for (int w = 0; w < WARPS; w++) {
            // A warp without a position has nothing; one with nothing but NaN keeps its NaN.
            const float factor = highests[w] == -INFINITY ? (totals[w] == 0 ? 0.0f : 1.0f)
                                                          : expf(highests[w] - highest);
            sum = fmaf(factor, merged[w * D + d], sum);
            weight = fmaf(factor, totals[w], weight);
        }
        out[start + d] = sum / weight;
    }
}

#define PAGED(name, E)                                                                             \
    EXTERN void attention_##name(const float *q, Pages pages, uint32_t layer, const uint32_t *table, \
                                 Shape shape, const Row *rows, float *out) {                       \
        attend(q, Paged<E>{pages, layer, table}, shape, rows, out);                                \
    }
PAGED(f32, float)
PAGED(f16, __half)
PAGED(int8, int8_t)

EXTERN void attention_full(const float *q, const float *k, const float *v, Shape shape,
                           const Row *rows, float *out) {
    const uint32_t width = shape.n_kv_heads * shape.head_dim;
    attend(q, Direct{k, v, width, shape.head_dim}, shape, rows, out);
}

// Positions that one block of `attention_part` attends to: a run that starts on a multiple of it, so
// that what a row gives does not depend on the other rows of its batch.
#define RUN 128
// Elements that a lane takes at once.
#define VECTOR 8

// Eight consecutive elements as numbers, without the scale of int8.
__device__ __forceinline__ void eight(const float *at, float (&out)[VECTOR]) {
    const float4 low = ((const float4 *)at)[0], high = ((const float4 *)at)[1];
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}
__device__ __forceinline__ void eight(const __half *at, float (&out)[VECTOR]) {
    const uint4 packed = *(const uint4 *)at;
    const __half2 *pairs = (const __half2 *)&packed;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = __half22float2(pairs[i]);
        out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void eight(const int8_t *at, float (&out)[VECTOR]) {
    const uint2 packed = *(const uint2 *)at;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[i] = (float)(int8_t)(packed.x >> (8 * i));
        out[i + 4] = (float)(int8_t)(packed.y >> (8 * i));
    }
}

// One run of one head of one row, heads of a multiple of eight: first all scores, then all values.
// Writes the sum of the values by the weights, their total and the highest score behind each other,
// or, where there is one run alone, the result.
template <class E>
__device__ void attend_run(const float *q, const Pages &pages, uint32_t layer, const uint32_t *table,
                           Shape shape, const Row *rows, float *out, float *parts) {
    __shared__ float weights[RUN];
    extern __shared__ float sums[]; // (groups, D)
    const Row row = rows[blockIdx.x];
    const uint32_t h = blockIdx.y, head = h / (shape.n_heads / shape.n_kv_heads);
    const uint32_t D = shape.head_dim, n_vectors = D / VECTOR;
    // Lanes that share a position: a power of two, so that they lie in one warp.
    uint32_t lanes = 1;
    while (lanes < n_vectors && lanes < 32) lanes *= 2;
    const uint32_t lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
    const uint32_t n_groups = blockDim.x / lanes;
    const uint32_t start = blockIdx.z * RUN;
    const size_t at = ((size_t)row.row * shape.n_heads + h) * D;
    float *part = parts + (((size_t)blockIdx.x * shape.n_heads + h) * gridDim.z + blockIdx.z) * (D + 2);
    if (start >= row.end || start + RUN <= row.first) {
        if (threadIdx.x == 0) part[D] = 0, part[D + 1] = -INFINITY;
        return;
    }
    const size_t keys = pages.entry(table[row.pages_at + start / PAGE_TOKENS], layer, 0, head,
                                    start % PAGE_TOKENS);
    const size_t values = pages.entry(table[row.pages_at + start / PAGE_TOKENS], layer, 1, head,
                                      start % PAGE_TOKENS);
    const E *elements = (const E *)pages.elements;
    for (uint32_t p = group; p < RUN; p += n_groups) {
        const bool seen = start + p >= row.first && start + p < row.end;
        float dot = 0;
        for (uint32_t v = lane; v < n_vectors && seen; v += lanes) {
            float key[VECTOR];
            eight(elements + (keys + p) * D + v * VECTOR, key);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) dot = fmaf(q[at + v * VECTOR + i], key[i], dot);
        }
        for (uint32_t step = lanes / 2; step > 0; step /= 2) {
            dot += __shfl_xor_sync(0xffffffff, dot, step);
        }
        if (lane == 0) {
            if (sizeof(E) == 1 && seen) dot *= pages.scales[keys + p];
            float score = dot * shape.scale;
            if (shape.soft_cap > 0) score = shape.soft_cap * tanhf(score / shape.soft_cap);
            weights[p] = seen ? score : -INFINITY;
        }
    }
    __syncthreads();
    // Every warp finds the highest score and the total by itself, in one order.
    float highest = -INFINITY, total = 0;
    for (uint32_t p = threadIdx.x % 32; p < RUN; p += 32) highest = fmaxf(highest, weights[p]);
    highest = warp_max(highest);
    for (uint32_t p = threadIdx.x % 32; p < RUN; p += 32) {
        const bool seen = start + p >= row.first && start + p < row.end;
        total += seen ? expf(weights[p] - highest) : 0.0f;
    }
    total = warp_sum(total);
    for (uint32_t v = lane; v < n_vectors; v += lanes) {
        float sum[VECTOR] = {};
        for (uint32_t p = group; p < RUN; p += n_groups) {
            if (start + p < row.first || start + p >= row.end) continue;
            float weight = expf(weights[p] - highest);
            if (sizeof(E) == 1) weight *= pages.scales[values + p];
            float value[VECTOR];
            eight(elements + (values + p) * D + v * VECTOR, value);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) sum[i] = fmaf(weight, value[i], sum[i]);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sums[group * D + v * VECTOR + i] = sum[i];
    }
    __syncthreads();
    for (uint32_t d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0;
        for (uint32_t g = 0; g < n_groups; g++) sum += sums[g * D + d];
        if (gridDim.z == 1) {
            out[at + d] = sum / total;
        } else {
            part[d] = sum;
        }
    }
    if (threadIdx.x == 0) part[D] = total, part[D + 1] = highest;
}

// Puts the runs of every head of every row together, in their order.
EXTERN void attention_merge(const float *parts, Shape shape, const Row *rows, float *out,
                            uint32_t n_runs) {
    const uint32_t D = shape.head_dim;
    const Row row = rows[blockIdx.x];
    const float *part = parts + ((size_t)blockIdx.x * shape.n_heads + blockIdx.y) * n_runs * (D + 2);
    float highest = -INFINITY;
    for (uint32_t r = 0; r < n_runs; r++) highest = fmaxf(highest, part[r * (D + 2) + D + 1]);
    for (uint32_t d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0, total = 0;
        for (uint32_t r = 0; r < n_runs; r++) {
            const float *run = part + r * (D + 2);
            // A run without a position has nothing; one with nothing but NaN keeps its NaN.
            if (run[D] == 0 && run[D + 1] == -INFINITY) continue;
            const float factor = run[D + 1] == -INFINITY ? 1.0f : expf(run[D + 1] - highest);
            sum = fmaf(factor, run[d], sum);
            total = fmaf(factor, run[D], total);
        }
        out[((size_t)row.row * shape.n_heads + blockIdx.y) * D + d] = sum / total;
    }
}

#define RUNS(name, E)                                                                              \
    EXTERN void attention_run_##name(const float *q, Pages pages, uint32_t layer,                  \
                                     const uint32_t *table, Shape shape, const Row *rows,          \
                                     float *out, float *parts) {                                   \
        attend_run<E>(q, pages, layer, table, shape, rows, out, parts);                            \
    }
RUNS(f32, float)
RUNS(f16, __half)
RUNS(int8, int8_t)
