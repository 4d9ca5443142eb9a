// Writing keys and values to their pages, and moving them there: one warp a key or a value of one head.
#include "common.cuh"
#include "pages.cuh"
#include "rotation.cuh"

// k, v (T, K * D) to slots[t] = (page, offset) of one layer.
EXTERN void kv_write(Pages pages, uint32_t layer, const float *k, const float *v, const uint2 *slots,
                     uint32_t n_rows) {
    begin();
    const uint32_t warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (warp >= n_rows * pages.n_kv_heads * 2) return;
    const uint32_t value = warp % 2, head = warp / 2 % pages.n_kv_heads;
    const uint32_t t = warp / 2 / pages.n_kv_heads;
    const float *from = (value ? v : k) + ((size_t)t * pages.n_kv_heads + head) * pages.head_dim;
    store(pages, pages.entry(slots[t].x, layer, value, head, slots[t].y), from);
}

// Of a key that keeps its bits.
#define NO_TURN 0xffffffffu

// A key and a value that go from one (page, offset) to another. `src/moves.rs` has the same fields in the same
// order.
struct Move {
    uint32_t from_page, from_offset;
    uint32_t to_page, to_offset;
    uint32_t turn; // row of the rotation's table, or NO_TURN
};
static_assert(sizeof(Move) == 20, "as it is uploaded");

// The bits of a key or a value, elsewhere.
template <typename T>
__device__ __forceinline__ void copy(const Pages &pages, size_t from, size_t to) {
    const uint32_t lane = threadIdx.x % 32, D = pages.head_dim;
    T *elements = (T *)pages.elements;
    for (uint32_t d = lane; d < D; d += 32) elements[to * D + d] = elements[from * D + d];
}

// A key (D) as attention reads it.
__device__ __forceinline__ void load(const Pages &pages, size_t from, float *head) {
    const uint32_t lane = threadIdx.x % 32, D = pages.head_dim;
    const float scale = pages.dtype == KV_INT8 ? pages.scales[from] : 1;
    for (uint32_t d = lane; d < D; d += 32) {
        head[d] = pages.dtype == KV_F32   ? ((const float *)pages.elements)[from * D + d]
                  : pages.dtype == KV_F16 ? __half2float(((const __half *)pages.elements)[from * D + d])
                                          : scale * (float)((const int8_t *)pages.elements)[from * D + d];
    }
}

// Moves of one layer, all at once: no move of a launch writes what another one reads or writes. A move is
// read whole by its warp before it is written, so that from and to may be the same. Bytes moved: each key and
// value once in and once out.
EXTERN void kv_move(Pages pages, Rotation rotation, uint32_t layer, const Move *moves, uint32_t n_moves) {
    begin();
    extern __shared__ float in_block[]; // (warps, D)
    const uint32_t warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= n_moves * pages.n_kv_heads * 2) return;
    const uint32_t value = warp % 2, head = warp / 2 % pages.n_kv_heads;
    const Move move = moves[warp / 2 / pages.n_kv_heads];
    const size_t from = pages.entry(move.from_page, layer, value, head, move.from_offset);
    const size_t to = pages.entry(move.to_page, layer, value, head, move.to_offset);
    if (value || move.turn == NO_TURN) {
        if (pages.dtype == KV_F32) copy<float>(pages, from, to);
        if (pages.dtype == KV_F16) copy<__half>(pages, from, to);
        if (pages.dtype == KV_INT8) copy<int8_t>(pages, from, to);
        if (pages.dtype == KV_INT8 && lane == 0) pages.scales[to] = pages.scales[from];
        return;
    }
    float *key = in_block + threadIdx.x / 32 * pages.head_dim;
    load(pages, from, key);
    __syncwarp();
    for (uint32_t pair = lane; pair < rotation.n_pairs; pair += 32) rotation.turn(key, move.turn, pair);
    __syncwarp();
    store(pages, to, key);
}
