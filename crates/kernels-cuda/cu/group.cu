// Causal attention of single rows on tensor cores: the rows of their operands are the heads that share keys
// and values. One block of threads has a run of the positions that a row sees; its warps take turns with
// them, 16 at a time, each with a ring of its own and a running softmax (Milakov and Gimelshein 2018,
// arXiv:1805.02867). The blocks of a cluster, or else the last block to end, put the runs together (Dao
// et al. 2023, "Flash-Decoding for long-context inference"). Queries and weights of positions are rounded to halves, as keys and values are.
#include "common.cuh"
#include "copy.cuh"
#include "pages.cuh"
#include "runs.cuh"
#include "shape.cuh"
#include "softmax.cuh"
#include "tensor.cuh"

// `src/attention.rs` has the same constants.
#define POSITIONS 16 // of a warp at once
// Heads that share keys, and blocks of a cluster, at most.
#define HEADS 16
#define CLUSTER 8

// Sums of a warp over its positions.
template <int D> struct Sums {
    float of[D / 8][4] = {};
    float highest[2] = {-INFINITY, -INFINITY};
    float total[2] = {0, 0}; // of this lane's positions

    // Takes 16 positions' keys and values from shared memory, of which those in from..end count.
    __device__ __forceinline__ void add(const uint32_t (&query)[D / 16][4], uint32_t keys, uint32_t values,
                                        const Shape &shape, uint32_t position, uint32_t from, uint32_t end) {
        constexpr int WIDTH = D + 8;
        const uint32_t lane = threadIdx.x % 32;
        float scores[2][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t b[4];
            matrices(b, keys + (lane / 16 * 8 + lane % 8) * WIDTH * 2 + k * 32 + lane / 8 % 2 * 16);
            mma(scores[0], query[k], b[0], b[1]);
            mma(scores[1], query[k], b[2], b[3]);
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t at = position + 8 * n + 2 * (lane % 4) + i % 2;
                const float score = shape.score(scores[n][i]);
                scores[n][i] = at >= from && at < end ? score : -INFINITY;
            }
        }
        float keep[2];
        weigh(scores, highest, total, keep);
        uint32_t weights[4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            weights[2 * n] = pair_of(scores[n][0], scores[n][1]);
            weights[2 * n + 1] = pair_of(scores[n][2], scores[n][3]);
        }
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) of[2 * d][i] *= keep[i / 2], of[2 * d + 1][i] *= keep[i / 2];
            uint32_t b[4];
            transposed(b, values + lane % 16 * WIDTH * 2 + (16 * d + lane / 16 * 8) * 2);
            mma(of[2 * d], weights, b[0], b[1]);
            mma(of[2 * d + 1], weights, b[2], b[3]);
        }
    }
};

// A part is what a run knows of a head: the sum of the values by their weights, the total and the highest
// score. It has room for four more numbers than a head, so that it starts on 16 bytes.
template <int D> struct Part {
    static constexpr uint32_t SIZE = D + 4;

    // Of one head, in all runs; a warp. `parts` is that of the first run, and `step` from run to run.
    static __device__ __forceinline__ void merge(const float *parts, size_t step, uint32_t n_runs, float *out) {
        const uint32_t lane = threadIdx.x % 32;
        float most = -INFINITY, all = 0;
        for (uint32_t r = lane; r < n_runs; r += 32) most = fmaxf(most, parts[r * step + D + 1]);
        most = warp_max(most);
        float4 sum = {0, 0, 0, 0};
        for (uint32_t base = 0; base < n_runs; base += 32) {
            const uint32_t n = min(32, n_runs - base);
            const float *own = parts + (base + lane) * step;
            const float factor = lane < n ? Softmax::factor(own[D + 1], most) : 0;
            if (lane < n) all = fmaf(factor, own[D], all);
#pragma unroll 8
            for (uint32_t i = 0; i < n; i++) {
                const float f = __shfl_sync(0xffffffff, factor, i);
                if (lane >= D / 4) continue;
                const float4 of = *(const float4 *)(parts + (base + i) * step + 4 * lane);
                sum.x = fmaf(f, of.x, sum.x), sum.y = fmaf(f, of.y, sum.y);
                sum.z = fmaf(f, of.z, sum.z), sum.w = fmaf(f, of.w, sum.w);
            }
        }
        all = warp_sum(all);
        if (lane < D / 4) ((float4 *)out)[lane] = {sum.x / all, sum.y / all, sum.z / all, sum.w / all};
    }
};

// Blocks (z) of this one's cluster.
__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t n = 1;
#if __CUDA_ARCH__ == 900
    asm("mov.u32 %0, %%cluster_nctaid.z;" : "=r"(n));
#endif
    return n;
}

// Says that this block of threads has come here; `wait_for_cluster` waits for all blocks of the cluster that
// go on, and sees what they wrote before they said so.
__device__ __forceinline__ void meet_cluster() {
#if __CUDA_ARCH__ == 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ == 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes to shared memory of a block of the cluster, where this one has `to`.
__device__ __forceinline__ void send(uint32_t rank, float *to, float value) {
#if __CUDA_ARCH__ == 900
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "st.shared::cluster.f32 [there], %2;\n}" ::"r"(at), "r"(rank), "f"(value)
                 : "memory");
#endif
}

// Runs of `run` positions, which are whole steps of WARPS * POSITIONS and at most 32 pages. `n_done` (T, K) is
// zero before and after.
template <int D, int WARPS>
__device__ __forceinline__ void attend_group(const float *q, const Pages &pages, uint32_t layer,
                                             const uint32_t *table, const Shape &shape, const Row *rows,
                                             uint32_t run, float *out, float *parts, uint32_t *n_done) {
    // Halves of a row in shared memory: ldmatrix reads eight rows without conflicts.
    constexpr int STEP = WARPS * POSITIONS, WIDTH = D + 8, BYTES = POSITIONS * WIDTH * 2, EIGHTS = D / 8;
    extern __shared__ uint4 shared[];
    __shared__ Softmax of_warps[WARPS][HEADS], of_runs[CLUSTER][HEADS];
    __shared__ bool is_last;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t head = blockIdx.y, group = shape.n_heads / shape.n_kv_heads;
    // Rows, pages and old positions are there at any time.
    const Row row = rows[blockIdx.x];
    const uint32_t first_run = row.first / run, n_runs = (row.end + run - 1) / run - first_run;
    if (blockIdx.z >= n_runs) return;
    const bool is_cluster = cluster_size() > 1;
    if (is_cluster) meet_cluster();
    const uint32_t start = (first_run + blockIdx.z) * run, end = min(row.end, start + run);
    const uint32_t from = max(start, row.first / STEP * STEP), n_steps = (end - from + STEP - 1) / STEP;
    const uint32_t first_page = from / PAGE_TOKENS, n_pages = (end - 1) / PAGE_TOKENS + 1 - first_page;
    const uint32_t own_page = lane < n_pages ? table[row.pages_at + first_page + lane] : 0;
    char *ring = (char *)shared + warp * DEPTH * 2 * BYTES;
    const uint32_t ring_at = (uint32_t)__cvta_generic_to_shared(ring);
    const __half *elements = (const __half *)pages.elements;
    const auto position = [&](uint32_t step) { return from + step * STEP + warp * POSITIONS; };

    uint32_t asked = 0;
    const auto ask = [&] {
        const uint32_t at = position(asked), slot = asked % DEPTH * 2 * BYTES;
        const uint32_t page = __shfl_sync(0xffffffff, own_page, at / PAGE_TOKENS - first_page);
        if (asked++ < n_steps) {
            const size_t keys = pages.entry(page, layer, 0, head, at % PAGE_TOKENS);
            const size_t values = pages.entry(page, layer, 1, head, at % PAGE_TOKENS);
#pragma unroll
            for (uint32_t i = 0; i < 2 * POSITIONS * EIGHTS / 32; i++) {
                const uint32_t each = 32 * i + lane, value = each / (POSITIONS * EIGHTS);
                const uint32_t p = each / EIGHTS % POSITIONS, part = each % EIGHTS;
                const uint32_t to = slot + value * BYTES + p * WIDTH * 2 + part * 16;
                if (at + p >= row.first && at + p < end) {
                    copy_16(ring_at + to, elements + ((value ? values : keys) + p) * D + part * 8);
                } else {
                    // A weight of zero does not hide a value that is no number.
                    *(uint4 *)(ring + to) = {0, 0, 0, 0};
                }
            }
        }
        end_of_chunk();
    };
    while (asked < DEPTH - 1 && position(asked) + POSITIONS <= row.old) ask();
    begin();
    while (asked < DEPTH - 1) ask();

    const size_t heads_at = (size_t)row.row * shape.n_heads + head * group;
    uint32_t query[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t g = lane / 4 + 8 * (i % 2);
            const float *at = q + (heads_at + g) * D + 16 * k + 2 * (lane % 4) + 8 * (i / 2);
            const float2 two = g < group ? *(const float2 *)at : float2{0, 0};
            query[k][i] = pair_of(two.x, two.y);
        }
    }
    Sums<D> sums;
    for (uint32_t step = 0; step < n_steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory");
        __syncwarp(); // What is asked for lies where the step before this one was read.
        ask();
        const uint32_t keys = ring_at + step % DEPTH * 2 * BYTES;
        sums.add(query, keys, keys + BYTES, shape, position(step), row.first, end);
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    float *of_all = (float *)shared; // (WARPS, group, D)
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t g = lane / 4 + 8 * i;
        float total = sums.total[i];
        total += __shfl_xor_sync(0xffffffff, total, 1);
        total += __shfl_xor_sync(0xffffffff, total, 2);
        if (lane % 4 == 0) of_warps[warp][g] = {sums.highest[i], total};
        if (g >= group) continue;
        float *at = of_all + (warp * group + g) * D + 2 * (lane % 4);
#pragma unroll
        for (int d = 0; d < D / 8; d++) *(float2 *)(at + 8 * d) = {sums.of[d][2 * i], sums.of[d][2 * i + 1]};
    }
    __syncthreads();
    // Outputs that each block of a cluster puts together, and what the blocks send it of these.
    const uint32_t n_own = (group * D + n_runs - 1) / n_runs;
    constexpr uint32_t RINGS = WARPS * DEPTH * 2 * BYTES / 4;
    float *sent = (float *)shared + max(RINGS, WARPS * group * D); // (runs, n_own)
    if (is_cluster) wait_for_cluster(); // Nothing is sent to a block that has not begun.
    const size_t in_all = (size_t)blockIdx.x * shape.n_kv_heads + head;
    const size_t of_run = (size_t)group * Part<D>::SIZE;
    float *first_part = parts + in_all * gridDim.z * of_run, *part = first_part + blockIdx.z * of_run;
    for (uint32_t i = threadIdx.x; i < group * D; i += 32 * WARPS) {
        const uint32_t g = i / D, c = i % D;
        float most = -INFINITY, total = 0, merged = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, of_warps[w][g].highest);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = Softmax::factor(of_warps[w][g].highest, most);
            total = fmaf(factor, of_warps[w][g].total, total);
            merged = fmaf(factor, of_all[(w * group + g) * D + c], merged);
        }
        if (n_runs == 1) {
            out[(heads_at + g) * D + c] = merged / total;
        } else if (is_cluster) {
            send(i / n_own, &sent[blockIdx.z * n_own + i % n_own], merged);
            if (c < n_runs) send(c, &of_runs[blockIdx.z][g].highest, most);
            if (c < n_runs) send(c, &of_runs[blockIdx.z][g].total, total);
        } else {
            part[g * Part<D>::SIZE + c] = merged;
            if (c == 0) part[g * Part<D>::SIZE + D] = total, part[g * Part<D>::SIZE + D + 1] = most;
        }
    }
    if (n_runs == 1) return;
    if (is_cluster) {
        meet_cluster();
        wait_for_cluster();
        for (uint32_t own = threadIdx.x; own < n_own; own += 32 * WARPS) {
            const uint32_t i = blockIdx.z * n_own + own, g = i / D;
            if (i >= group * D) break;
            float most = -INFINITY, total = 0, merged = 0;
#pragma unroll
            for (uint32_t r = 0; r < CLUSTER; r++) {
                if (r < n_runs) most = fmaxf(most, of_runs[r][g].highest);
            }
#pragma unroll
            for (uint32_t r = 0; r < CLUSTER; r++) {
                if (r >= n_runs) break;
                const float factor = Softmax::factor(of_runs[r][g].highest, most);
                total = fmaf(factor, of_runs[r][g].total, total);
                merged = fmaf(factor, sent[r * n_own + own], merged);
            }
            out[heads_at * D + i] = merged / total;
        }
        return;
    }
    // What this block wrote is there before it is counted; who counts the last sees all parts.
    __syncthreads();
    if (threadIdx.x == 0) is_last = counted(&n_done[in_all]) == n_runs - 1;
    __syncthreads();
    if (!is_last) return;
    if (threadIdx.x == 0) n_done[in_all] = 0;
    for (uint32_t g = warp; g < group; g += WARPS) {
        Part<D>::merge(first_part + g * Part<D>::SIZE, of_run, n_runs, out + (heads_at + g) * D);
    }
}

#define GROUP(name, D, WARPS, BLOCKS)                                                              \
    EXTERN __launch_bounds__(32 * WARPS, BLOCKS) void attention_##name##_##D(                        \
        const float *q, Pages pages, uint32_t layer, const uint32_t *table, Shape shape,           \
        const Row *rows, uint32_t run, float *out, float *parts, uint32_t *n_done) {               \
        attend_group<D, WARPS>(q, pages, layer, table, shape, rows, run, out, parts, n_done);      \
    }
GROUP(group, 32, 4, 2) GROUP(group, 64, 4, 2) GROUP(group, 96, 4, 2) GROUP(group, 128, 4, 2)
GROUP(wide, 32, 8, 1) GROUP(wide, 64, 8, 1)
