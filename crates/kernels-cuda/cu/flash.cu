// Causal attention of many rows on tensor cores (Dao 2023, arXiv:2307.08691): a block of threads has 64
// rows of one head, walks through their positions 64 at a time, and keeps a running softmax (Milakov and
// Gimelshein 2018, arXiv:1805.02867). Queries and weights of positions are rounded to halves, as keys and
// values are.
#include "common.cuh"
#include "copy.cuh"
#include "pages.cuh"
#include "shape.cuh"
#include "softmax.cuh"
#include "tensor.cuh"

// Rows and positions of a step; warps have 16 rows each.
#define TILE 64

// Up to TILE rows of one sequence. `src/attention.rs` has the same fields in the same order.
struct Tile {
    uint32_t first_row;
    uint32_t n_rows;
    uint32_t first_position; // of the first row
    uint32_t pages_at;       // where the sequence's pages are in the table
};

// Eight elements of a key or a value as halves.
__device__ __forceinline__ uint4 eight_halves(const int8_t *at, float scale) {
    const uint2 packed = *(const uint2 *)at;
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t word = i < 2 ? packed.x : packed.y;
        out[i] = pair_of(scale * (float)(int8_t)(word >> (16 * (i % 2))),
                         scale * (float)(int8_t)(word >> (16 * (i % 2) + 8)));
    }
    return {out[0], out[1], out[2], out[3]};
}

template <class E, int D>
__device__ __forceinline__ void attend_tile(const float *q, const Pages &pages, uint32_t layer,
                                            const uint32_t *table, Shape shape, const Tile *tiles,
                                            float *out) {
    // Halves of a row in shared memory: ldmatrix reads eight rows without conflicts.
    constexpr int WIDTH = D + 8, BYTES = TILE * WIDTH * 2, PARTS = D / 8;
    extern __shared__ uint4 shared[]; // two steps of keys and values
    begin();
    const Tile tile = tiles[blockIdx.x];
    const uint32_t h = blockIdx.y, head = h / (shape.n_heads / shape.n_kv_heads);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t first = lane / 4, pair = 2 * (lane % 4);
    const uint32_t last = tile.first_position + tile.n_rows - 1;
    const uint32_t from =
        shape.window > 0 && tile.first_position + 1 > shape.window ? tile.first_position + 1 - shape.window : 0;
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    const E *elements = (const E *)pages.elements;

    auto ask = [&](uint32_t start) {
        if (start <= last) {
            const uint32_t stage = start / TILE % 2;
            // A page holds whole steps.
            const uint32_t page = table[tile.pages_at + start / PAGE_TOKENS];
            for (uint32_t i = threadIdx.x; i < 2 * TILE * PARTS; i += blockDim.x) {
                const uint32_t value = i / (TILE * PARTS), p = i / PARTS % TILE, part = i % PARTS;
                const uint32_t to = ((2 * stage + value) * TILE + p) * WIDTH * 2 + part * 16;
                // A weight of zero does not hide a value that is no number.
                if (start + p > last || start + p < from) {
                    *(uint4 *)((char *)shared + to) = {0, 0, 0, 0};
                    continue;
                }
                const size_t entry = pages.entry(page, layer, value, head, start % PAGE_TOKENS + p);
                const E *at = elements + entry * D + part * 8;
                if constexpr (sizeof(E) == 2) {
                    copy_16(base + to, at);
                } else {
                    *(uint4 *)((char *)shared + to) = eight_halves(at, pages.scales[entry]);
                }
            }
        }
        end_of_chunk();
    };

    // Rows beyond the last are computed like the last and not written.
    uint32_t rows[2];
#pragma unroll
    for (int i = 0; i < 2; i++) rows[i] = min(16 * warp + first + 8 * i, tile.n_rows - 1);
    uint32_t query[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const size_t row = tile.first_row + rows[i % 2];
            const float *at = q + (row * shape.n_heads + h) * D + 16 * k + pair + 8 * (i / 2);
            query[k][i] = pair_of(at[0], at[1]);
        }
    }
    float sums[D / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, totals[2] = {0, 0};
    ask(from / TILE * TILE);
    for (uint32_t start = from / TILE * TILE; start <= last; start += TILE) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads(); // What this asks for lies where the step before this one was read.
        ask(start + TILE);
        const uint32_t keys = base + 2 * (start / TILE % 2) * BYTES, values = keys + BYTES;
        float scores[TILE / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
#pragma unroll
            for (int n = 0; n < TILE / 16; n++) {
                uint32_t b[4];
                const uint32_t position = 16 * n + lane / 16 * 8 + lane % 8;
                matrices(b, keys + position * WIDTH * 2 + k * 32 + lane / 8 % 2 * 16);
                mma(scores[2 * n], query[k], b[0], b[1]);
                mma(scores[2 * n + 1], query[k], b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t position = start + 8 * n + pair + i % 2;
                const uint32_t own = tile.first_position + rows[i / 2];
                const bool seen = position <= own && (shape.window == 0 || position + shape.window > own);
                const float score = shape.score(scores[n][i]);
                scores[n][i] = seen ? score : -INFINITY;
            }
        }
        float keep[2];
        weigh(scores, highest, totals, keep);
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[d][i] *= keep[i / 2];
        }
#pragma unroll
        for (int n = 0; n < TILE / 16; n++) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *of = &scores[2 * n + i / 2][2 * (i % 2)];
                a[i] = pair_of(of[0], of[1]);
            }
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                uint32_t b[4];
                transposed(b, values + (16 * n + lane % 16) * WIDTH * 2 + (16 * d + lane / 16 * 8) * 2);
                mma(sums[2 * d], a, b[0], b[1]);
                mma(sums[2 * d + 1], a, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        totals[i] += __shfl_xor_sync(0xffffffff, totals[i], 1);
        totals[i] += __shfl_xor_sync(0xffffffff, totals[i], 2);
        if (16 * warp + first + 8 * i >= tile.n_rows) continue;
        float *at = out + ((size_t)(tile.first_row + rows[i]) * shape.n_heads + h) * D;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            at[8 * d + pair] = sums[d][2 * i] / totals[i];
            at[8 * d + pair + 1] = sums[d][2 * i + 1] / totals[i];
        }
    }
}

#define TILES(name, E, D)                                                                          \
    EXTERN __launch_bounds__(128) void attention_tile_##name##_##D(                                \
        const float *q, Pages pages, uint32_t layer, const uint32_t *table, Shape shape,           \
        const Tile *tiles, float *out) {                                                           \
        attend_tile<E, D>(q, pages, layer, table, shape, tiles, out);                              \
    }
#define WIDTHS(name, E) TILES(name, E, 32) TILES(name, E, 64) TILES(name, E, 96) TILES(name, E, 128)
WIDTHS(f16, __half)
WIDTHS(int8, int8_t)
