// Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34), and what happens to the heads of a step
// on their way to attention.
#include "common.cuh"
#include "pages.cuh"
#include "rotation.cuh"

// turns (T, pairs) of rows at `positions`; angles in f64, as the reference has them.
EXTERN void rope_turns(const uint32_t *positions, const float *inverse_frequencies, float2 *turns,
                       uint32_t n_rows, uint32_t n_pairs, float magnitude) {
    begin();
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)n_rows * n_pairs) return;
    double sine, cosine;
    sincos((double)positions[at / n_pairs] * (double)inverse_frequencies[at % n_pairs], &sine, &cosine);
    turns[at] = {(float)(magnitude * cosine), (float)(magnitude * sine)};
}

// x (T, H * D) in place: one thread a pair.
EXTERN void rope(float *x, Rotation rotation, uint32_t n_rows, uint32_t n_heads, uint32_t head_dim) {
    begin();
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)n_rows * n_heads * rotation.n_pairs) return;
    const size_t head = at / rotation.n_pairs;
    rotation.turn(x + head * head_dim, head / n_heads, at % rotation.n_pairs);
}

// Queries, keys and values of a step. `src/rows.rs` has the same fields in the same order.
struct Heads {
    float *queries;      // (T, H * D), in place
    const float *keys;   // (T, K * D)
    const float *values; // (T, K * D)
    const float *query_norm; // (D), or null
    const float *key_norm;   // (D), or null
    float eps;
    uint32_t n_heads;
};

// Norms queries and keys head by head, rotates both, and stores keys and values at slots[t] = (page,
// offset) of one layer: one warp a head.
EXTERN void place_heads(Heads heads, Rotation rotation, Pages pages, uint32_t layer, const uint2 *slots,
                        uint32_t n_rows) {
    begin();
    extern __shared__ float in_block[]; // (warps, D)
    const uint32_t warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t H = heads.n_heads, K = pages.n_kv_heads, D = pages.head_dim;
    if (warp >= n_rows * (H + 2 * K)) return;
    const uint32_t t = warp / (H + 2 * K), h = warp % (H + 2 * K);
    const bool query = h < H, value = h >= H + K;
    const uint32_t own = query ? h : value ? h - H - K : h - H;
    const float *from = query   ? heads.queries + ((size_t)t * H + own) * D
                        : value ? heads.values + ((size_t)t * K + own) * D
                                : heads.keys + ((size_t)t * K + own) * D;
    float *head = in_block + threadIdx.x / 32 * D;
    const float *norm = query ? heads.query_norm : value ? nullptr : heads.key_norm;
    float squares = 0;
    for (uint32_t d = lane; d < D; d += 32) {
        head[d] = from[d];
        squares = fmaf(head[d], head[d], squares);
    }
    if (norm) {
        const float inverse = 1.0f / sqrtf(warp_sum(squares) / (float)D + heads.eps);
        for (uint32_t d = lane; d < D; d += 32) head[d] = head[d] * inverse * norm[d];
    }
    __syncwarp();
    if (!value) {
        for (uint32_t pair = lane; pair < rotation.n_pairs; pair += 32) rotation.turn(head, t, pair);
        __syncwarp();
    }
    if (query) {
        float *to = heads.queries + ((size_t)t * H + own) * D;
        for (uint32_t d = lane; d < D; d += 32) to[d] = head[d];
    } else {
        store(pages, pages.entry(slots[t].x, layer, value, own, slots[t].y), head);
    }
}
