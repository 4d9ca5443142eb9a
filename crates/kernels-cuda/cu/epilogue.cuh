// Which matrices a product has, and what happens to its outputs.
#pragma once
#include "common.cuh"
#include "pages.cuh"
#include "rotation.cuh"

// One matrix of a product. `src/linear.rs` has the same fields in the same order.
struct Part {
    Planes weight;
    float *out;        // (T, N), or more rows with ADD_ROWS
    const float *bias; // (N), or null
    uint32_t heads;    // PLACE: which of QUERIES, KEYS and VALUES the outputs are
    uint32_t padding;
};

// `src/linear.rs` has the same fields in the same order.
struct Parts {
    Part each[3];
    uint32_t n;       // matrices
    uint32_t paired;  // of two matrices the rows take turns: a gate's and the one that it lets through
    uint32_t n_outputs; // rows of all matrices
    uint32_t n_pairs;   // of rows that are computed together
};

// Where a row of the run lies.
struct Where {
    uint32_t part;
    uint32_t row;
};

__device__ __forceinline__ Where where(const Parts &parts, uint32_t row) {
    if (parts.paired) return {row % 2, row / 2};
    uint32_t part = 0;
    while (part + 1 < parts.n && row >= parts.each[part].weight.rows) {
        row -= parts.each[part].weight.rows;
        part++;
    }
    return {part, row};
}

// `src/linear.rs` has the same constants.
enum Finish { STORE, ADD, ADD_ROWS, SILU, GELU_TANH, TIMES, GELU, PLACE };
enum OfHeads { QUERIES, KEYS, VALUES };

// PLACE: how queries and keys turn, and where keys and values go: slots[t] = (page, offset) of a layer.
// `src/linear.rs` has the same fields in the same order.
struct Placement {
    Rotation rotation; // interleaved
    Pages pages;       // of floats
    const uint2 *slots;
    uint32_t layer;
    uint32_t padding;
};

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ __forceinline__ float gelu_tanh(float x) {
    const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

// `src/linear.rs` has the same fields in the same order.
struct Epilogue {
    const uint32_t *rows;  // ADD_ROWS: where row t goes
    const float *scales;   // ADD_ROWS: times what
    float scale;           // ADD: times what
    uint32_t finish;
    Placement placement;

    // Where output n of row t goes.
    __device__ __forceinline__ float *place_of(const Part &part, uint32_t t, uint32_t n) const {
        const size_t row = finish == ADD_ROWS ? rows[t] : t;
        return part.out + row * part.weight.rows + n;
    }

    // Ends output n of row t.
    __device__ __forceinline__ void put(const Part &part, uint32_t t, uint32_t n, float sum) const {
        put(part, t, n, sum, finish == ADD ? *place_of(part, t, n) : 0);
    }
    // The same where `old` is what an ADD adds to.
    __device__ __forceinline__ void put(const Part &part, uint32_t t, uint32_t n, float sum, float old) const {
        if (part.bias) sum += part.bias[n];
        float *at = place_of(part, t, n);
        switch (finish) {
        case STORE: *at = sum; break;
        case ADD: *at = fmaf(scale, sum, old); break;
        case ADD_ROWS: *at = fmaf(scales[t], sum, *at); break;
        case SILU: *at = silu(sum); break;
        case GELU_TANH: *at = gelu_tanh(sum); break;
        case TIMES: *at *= sum; break;
        case PLACE: break; // `place` ends those, two at a time.
        case GELU: *at = 0.5f * sum * (1.0f + erff(sum * 0.7071067811865476f)); break;
        }
    }

    // The same of outputs n and n + 1 of STORE or ADD, n and the part's number of rows even.
    template <Finish FINISH>
    __device__ __forceinline__ void put_pair(const Part &part, uint32_t t, uint32_t n, float low,
                                             float high) const {
        static_assert(FINISH == STORE || FINISH == ADD);
        if (part.bias) low += part.bias[n], high += part.bias[n + 1];
        float2 *at = (float2 *)(part.out + (size_t)t * part.weight.rows + n);
        if (FINISH == STORE) {
            *at = {low, high};
        } else {
            const float2 old = *at;
            *at = {fmaf(scale, low, old.x), fmaf(scale, high, old.y)};
        }
    }

    // Ends outputs n and n + 1, n even, of row t of PLACE.
    __device__ __forceinline__ void place(const Part &part, uint32_t t, uint32_t n, float low,
                                          float high) const {
        const Pages &pages = placement.pages;
        const uint32_t D = pages.head_dim, h = n / D, d = n % D;
        if (part.bias) low += part.bias[n], high += part.bias[n + 1];
        if (part.heads != VALUES && d / 2 < placement.rotation.n_pairs) {
            placement.rotation.turn(low, high, t, d / 2);
        }
        if (part.heads == QUERIES) {
            *(float2 *)(part.out + (size_t)t * part.weight.rows + n) = {low, high};
            return;
        }
        const uint2 slot = placement.slots[t];
        const size_t at = pages.entry(slot.x, placement.layer, part.heads == VALUES, h, slot.y) * D + d;
        if (pages.dtype == KV_F16) {
            *(__half2 *)((__half *)pages.elements + at) = __floats2half2_rn(low, high);
        } else {
            *(float2 *)((float *)pages.elements + at) = {low, high};
        }
    }

    // Ends output n of row t of a gate and what it lets through.
    template <Finish FINISH>
    __device__ __forceinline__ void put_gated(const Part &gate, uint32_t t, uint32_t n, float sum,
                                              float up) const {
        const float open = FINISH == SILU ? silu(sum) : gelu_tanh(sum);
        gate.out[(size_t)t * gate.weight.rows + n] = open * up;
    }
    __device__ __forceinline__ void put_gated(const Part &gate, uint32_t t, uint32_t n, float sum,
                                              float up) const {
        finish == SILU ? put_gated<SILU>(gate, t, n, sum, up) : put_gated<GELU_TANH>(gate, t, n, sum, up);
    }
};
