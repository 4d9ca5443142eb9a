// Writing keys and values to their pages: one warp a key or a value of one head.
#include "common.cuh"
#include "pages.cuh"

// k, v (T, K * D) to slots[t] = (page, offset) of one layer. Int8 rounds as `int8_scale` in Rust says.
EXTERN void kv_write(Pages pages, uint32_t layer, const float *k, const float *v, const uint2 *slots,
                     uint32_t n_rows) {
    const uint32_t warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= n_rows * pages.n_kv_heads * 2) return;
    const uint32_t value = warp % 2, head = warp / 2 % pages.n_kv_heads;
    const uint32_t t = warp / 2 / pages.n_kv_heads, D = pages.head_dim;
    const float *from = (value ? v : k) + ((size_t)t * pages.n_kv_heads + head) * D;
    const size_t entry = pages.entry(slots[t].x, layer, value, head, slots[t].y);
    if (pages.dtype == KV_F32) {
        for (uint32_t d = lane; d < D; d += 32) ((float *)pages.elements)[entry * D + d] = from[d];
        return;
    }
    if (pages.dtype == KV_F16) {
        __half *to = (__half *)pages.elements + entry * D;
        for (uint32_t d = lane; d < D; d += 32) to[d] = __float2half_rn(from[d]);
        return;
    }
    uint32_t bits = 0; // As integers, which puts a NaN after infinity.
    for (uint32_t d = lane; d < D; d += 32) bits = max(bits, __float_as_uint(fabsf(from[d])));
    bits = __reduce_max_sync(0xffffffff, bits);
    const float largest = __uint_as_float(bits);
    const bool finite = largest < INFINITY, usable = finite && largest >= 1e-35f;
    const float factor = usable ? 127.0f / largest : 0;
    int8_t *to = (int8_t *)pages.elements + entry * D;
    for (uint32_t d = lane; d < D; d += 32) to[d] = usable ? (int8_t)rintf(factor * from[d]) : 0;
    if (lane == 0) pages.scales[entry] = usable ? largest / 127.0f : finite ? 0.0f : NAN;
}
