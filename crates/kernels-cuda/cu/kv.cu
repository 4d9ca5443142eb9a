// Writing keys and values to their pages: one warp a key or a value of one head.
#include "common.cuh"
#include "pages.cuh"

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
