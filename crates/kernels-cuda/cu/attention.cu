// Scaled dot-product attention with grouped heads, causal over pages or unmasked inside spans.
//
// Over pages, `attention_run` gives one block of threads a run of positions of the heads of one row that
// share them; the last block to end puts the runs together (Dao et al. 2023, "Flash-Decoding for long-context
// inference"). Heads of other widths, and spans, go to `attend`, where one block has one head of one
// row; its warps take every WARPS-th position and keep a running softmax each (Milakov and Gimelshein
// 2018, arXiv:1805.02867), which are merged in a fixed order.
#include "common.cuh"
#include "pages.cuh"
#include "runs.cuh"
#include "shape.cuh"

#define WARPS 8
// Elements of a head that one lane holds: heads up to 512 wide.
#define EACH 16

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
    begin();
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
        const float score = shape.score(warp_sum(dot));
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

// Positions that one block of `attention_run` attends to: a run that starts on a multiple of it, so that
// what a row gives does not depend on the other rows of its batch; its warps share it evenly.
#define RUN 128
#define RUN_OF_WARP (RUN / WARPS)
// Elements that a lane has of a head, and the most keys and values that it asks for at once.
#define VECTOR 8
#define AHEAD 8

// Eight consecutive elements as numbers, without the scale of int8.
__device__ __forceinline__ void eight(const float *at, float (&out)[VECTOR]) {
    const float4 low = ((const float4 *)at)[0], high = ((const float4 *)at)[1];
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}
__device__ __forceinline__ void eight(const __half *at, float (&out)[VECTOR]) {
    const __half2 *pairs = (const __half2 *)at;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = __half22float2(pairs[i]);
        out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void eight(const int8_t *at, float (&out)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) out[i] = (float)at[i];
}

// Eight elements as they lie in memory.
template <class E> struct alignas(8 * sizeof(E)) Packed {
    E elements[VECTOR];

    // Keeps the compiler from unpacking it once for all heads, which takes more registers than there are.
    __device__ __forceinline__ void stay() {
        uint32_t *words = (uint32_t *)elements;
#pragma unroll
        for (int i = 0; i < (int)(2 * sizeof(E)); i++) asm volatile("" : "+r"(words[i]));
    }
};

// One run of some of the heads that share keys and values, of one row: every warp has its positions' keys
// and values on their way at once. A part is, for each head, the sum of the values by their weights, the
// total and the highest score; where there is one run alone, the result is written at once. The last
// block to end puts the parts together. `n_done` (T, blocks of heads) is zero before and after. LANES share
// a position.
template <class E, int LANES>
__device__ void attend_run(const float *q, const Pages &pages, uint32_t layer, const uint32_t *table,
                           Shape shape, const Row *rows, float *out, float *parts, uint32_t *n_done) {
    constexpr uint32_t AT_ONCE = 32 / LANES; // positions of a warp
    constexpr uint32_t STEPS = RUN_OF_WARP / AT_ONCE > 0 ? RUN_OF_WARP / AT_ONCE : 1;
    constexpr int BATCH = STEPS < AHEAD ? STEPS : AHEAD;
    __shared__ Softmax of_warps[WARPS];
    __shared__ bool is_last;
    extern __shared__ float sums[]; // (warps, D)
    // Rows, pages and old positions are there at any time.
    const Row row = rows[blockIdx.x];
    const uint32_t n_runs = gridDim.z, group = shape.n_heads / gridDim.y;
    const uint32_t head = blockIdx.y / (gridDim.y / shape.n_kv_heads);
    const uint32_t D = shape.head_dim, start = blockIdx.z * RUN;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % LANES, own = threadIdx.x % 32 / LANES;
    const uint32_t d = lane * VECTOR;
    const size_t in_all = (size_t)blockIdx.x * gridDim.y + blockIdx.y;
    float *first_part = parts + in_all * n_runs * group * (D + 2);
    float *part = first_part + (size_t)blockIdx.z * group * (D + 2);
    const bool any = start < row.end && start + RUN > row.first;
    const uint32_t page = any ? table[row.pages_at + start / PAGE_TOKENS] : 0;
    const size_t keys = pages.entry(page, layer, 0, head, start % PAGE_TOKENS);
    const size_t values = pages.entry(page, layer, 1, head, start % PAGE_TOKENS);
    const E *elements = (const E *)pages.elements;

    Packed<E> key[BATCH], value[BATCH];
    float key_scale[BATCH], value_scale[BATCH];
    const auto position = [&](uint32_t step) { return warp * RUN_OF_WARP + step * AT_ONCE + own; };
    const auto seen = [&](uint32_t step) {
        const uint32_t p = start + position(step);
        return any && step * AT_ONCE + own < RUN_OF_WARP && p >= row.first && p < row.end;
    };
    const auto ask = [&](uint32_t first, uint32_t from, uint32_t to) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const uint32_t p = position(first + i);
            if (!seen(first + i) || start + p < from || start + p >= to) continue;
            if (d < D) {
                key[i] = *(const Packed<E> *)(elements + (keys + p) * D + d);
                value[i] = *(const Packed<E> *)(elements + (values + p) * D + d);
            }
            if (sizeof(E) == 1) {
                key_scale[i] = pages.scales[keys + p];
                value_scale[i] = pages.scales[values + p];
            }
        }
    };
    const auto clear = [&] {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            key[i] = value[i] = {};
            key_scale[i] = value_scale[i] = 0;
        }
    };
    clear();
    if (STEPS == BATCH) ask(0, 0, row.old);
    begin();
    if (STEPS == BATCH) ask(0, row.old, row.end);
    for (uint32_t g = 0; g < group && any; g++) {
        const size_t at = ((size_t)row.row * shape.n_heads + blockIdx.y * group + g) * D;
        float query[VECTOR] = {};
        if (d < D) eight(q + at + d, query);
        float highest = -INFINITY, total = 0, sum[VECTOR] = {};
        for (uint32_t first = 0; first < STEPS; first += BATCH) {
            if (STEPS > BATCH) clear(), ask(first, 0, row.end);
            float scores[BATCH], next = highest;
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                float k[VECTOR], dot = 0;
                key[i].stay();
                eight(key[i].elements, k);
#pragma unroll
                for (int e = 0; e < VECTOR; e++) dot = fmaf(query[e], k[e], dot);
#pragma unroll
                for (int step = LANES / 2; step > 0; step /= 2) {
                    dot += __shfl_xor_sync(0xffffffff, dot, step);
                }
                if (sizeof(E) == 1) dot *= key_scale[i];
                const float score = shape.score(dot);
                scores[i] = seen(first + i) ? score : -INFINITY;
                next = fmaxf(next, scores[i]);
            }
#pragma unroll
            for (int step = LANES; step < 32; step *= 2) {
                next = fmaxf(next, __shfl_xor_sync(0xffffffff, next, step));
            }
            const float keep = Softmax::factor(highest, next);
            highest = next;
            total *= keep;
#pragma unroll
            for (int e = 0; e < VECTOR; e++) sum[e] *= keep;
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                // A score that is no number gives a weight that is none.
                const float weight = scores[i] == -INFINITY ? 0.0f : expf(scores[i] - highest);
                total += weight;
                float v[VECTOR];
                value[i].stay();
                eight(value[i].elements, v);
                const float scaled = sizeof(E) == 1 ? weight * value_scale[i] : weight;
#pragma unroll
                for (int e = 0; e < VECTOR; e++) sum[e] = fmaf(scaled, v[e], sum[e]);
            }
        }
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
            total += __shfl_xor_sync(0xffffffff, total, step);
#pragma unroll
            for (int e = 0; e < VECTOR; e++) sum[e] += __shfl_xor_sync(0xffffffff, sum[e], step);
        }
        if (threadIdx.x % 32 == 0) of_warps[warp] = {highest, total};
        if (own == 0 && d < D) {
#pragma unroll
            for (int e = 0; e < VECTOR; e++) sums[warp * D + d + e] = sum[e];
        }
        __syncthreads();
        float most = -INFINITY, all = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, of_warps[w].highest);
        float factors[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            factors[w] = Softmax::factor(of_warps[w].highest, most);
            all = fmaf(factors[w], of_warps[w].total, all);
        }
        for (uint32_t c = threadIdx.x; c < D; c += blockDim.x) {
            float merged = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) merged = fmaf(factors[w], sums[w * D + c], merged);
            if (n_runs == 1) {
                out[at + c] = merged / all;
            } else {
                part[g * (D + 2) + c] = merged;
            }
        }
        if (threadIdx.x == 0) part[g * (D + 2) + D] = all, part[g * (D + 2) + D + 1] = most;
        __syncthreads();
    }
    if (n_runs == 1) return;
    // What this block wrote is there before it is counted; who counts the last sees all parts.
    if (threadIdx.x == 0) is_last = counted(&n_done[in_all]) == n_runs - 1;
    __syncthreads();
    if (!is_last) return;
    if (threadIdx.x == 0) n_done[in_all] = 0;
    const uint32_t first_run = row.first / RUN, end_run = (row.end + RUN - 1) / RUN;
    const uint32_t in_warp = threadIdx.x % 32, c = threadIdx.x;
    const size_t step = (size_t)group * (D + 2);
    for (uint32_t g = 0; g < group; g++) {
        const float *of_head = first_part + g * (D + 2);
        float most = -INFINITY, all = 0, merged = 0;
        for (uint32_t r = first_run + in_warp; r < end_run; r += 32) {
            most = fmaxf(most, of_head[r * step + D + 1]);
        }
        most = warp_max(most);
        for (uint32_t base = first_run; base < end_run; base += 32) {
            const uint32_t r = base + in_warp, n = min(32, end_run - base);
            const float own = in_warp < n ? Softmax::factor(of_head[r * step + D + 1], most) : 0;
            if (in_warp < n) all = fmaf(own, of_head[r * step + D], all);
#pragma unroll 8
            for (uint32_t i = 0; i < n; i++) {
                const float factor = __shfl_sync(0xffffffff, own, i);
                if (c < D) merged = fmaf(factor, of_head[(base + i) * step + c], merged);
            }
        }
        all = warp_sum(all);
        if (c < D) out[((size_t)row.row * shape.n_heads + blockIdx.y * group + g) * D + c] = merged / all;
    }
}

#define RUNS(name, E, LANES)                                                                       \
    EXTERN __launch_bounds__(32 * WARPS, 2) void attention_run_##name##_##LANES(                      \
        const float *q, Pages pages, uint32_t layer, const uint32_t *table, Shape shape,           \
        const Row *rows, float *out, float *parts, uint32_t *n_done) {                             \
        attend_run<E, LANES>(q, pages, layer, table, shape, rows, out, parts, n_done);             \
    }
#define WIDTHS(name, E)                                                                            \
    RUNS(name, E, 1) RUNS(name, E, 2) RUNS(name, E, 4) RUNS(name, E, 8) RUNS(name, E, 16)          \
    RUNS(name, E, 32)
WIDTHS(f32, float)
WIDTHS(f16, __half)
WIDTHS(int8, int8_t)
