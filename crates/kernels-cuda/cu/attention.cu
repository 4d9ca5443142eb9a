// Scaled dot-product attention with grouped heads, causal over pages or unmasked inside spans. One
// block of threads has one head of one row; its warps take every WARPS-th position and keep a running
// softmax each (Milakov and Gimelshein 2018, arXiv:1805.02867), which are merged in a fixed order.
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
