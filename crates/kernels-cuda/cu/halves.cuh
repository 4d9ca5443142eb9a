// Activations and weights as halves, for tensor cores.
//
// Rows of activations are scaled by a power of two to at most one (`halve`), so that none leaves the
// range of a half; a weight is rounded to a half, 2^-12 of it, which is less than int8 activations lose.
#pragma once
#include "common.cuh"

// How an operand lies. `src/linear.rs` has the same constants.
enum Order {
    ROWS,
    LANES_OF_MMA, // every eight rows of four blocks of 32 columns as the lanes of `matmul_few` take them
    TILES,        // see `Tile`
};

// A tile of an operand of `matmul_tiles`: 128 rows of 64 columns, 16 KB, behind those of the same rows
// and the columns before. A row has 128 bytes, and eight rows lie so that tensor cores read a column of
// theirs without conflicts: chunk c of 16 bytes of row r is at c ^ (r % 8).
struct Tile {
    static constexpr uint32_t ROWS = 128, COLUMNS = 64, BYTES = 2 * ROWS * COLUMNS;

    // Where 16-byte chunk `chunk` of a row of `columns` is, in bytes.
    static __device__ __forceinline__ size_t at(uint32_t row, uint32_t chunk, uint32_t columns) {
        const size_t tile = (size_t)(row / ROWS) * (columns / COLUMNS) + chunk / 8;
        return tile * BYTES + row % ROWS * 128 + (chunk % 8 ^ row % 8) * 16;
    }
};

// Rows of activations as halves. `src/linear.rs` has the same fields in the same order.
struct Halves {
    __half *values; // (T, K), as `order` says
    float *factors; // (T): what the products of a row are multiplied by
    uint32_t order;

    // Where columns c and c + 1 of a row of K are, c even.
    __device__ __forceinline__ __half2 *at(uint32_t row, uint32_t c, uint32_t K) const {
        if (order == ROWS) return (__half2 *)(values + (size_t)row * K + c);
        if (order == TILES) return (__half2 *)((char *)values + Tile::at(row, c / 8, K)) + c % 8 / 2;
        // A lane has a row of one of four blocks, and takes eight halves at once.
        const size_t chunk = (size_t)(row / 8) * ((K + 127) / 128) + c / 128;
        const uint32_t lane = row % 8 * 4 + c % 128 / 32;
        return (__half2 *)values + ((chunk * 4 + c % 32 / 8) * 32 + lane) * 4 + c % 8 / 2;
    }
};

// Two pairs of codes of a word as halves, what a code is biased by taken off.
template <class F> __device__ __forceinline__ void halves(uint32_t codes, __half2 (&out)[2]) {
    // 0x6400 is 1024, whose last bit is one.
    constexpr int BIAS = F::MEANING == CODE ? F::BIAS : 128;
    if constexpr (F::MEANING != CODE) codes ^= 0x80808080;
    const __half2 bias = __half2half2(__int2half_rn(1024 + BIAS));
    const uint32_t low = __byte_perm(codes, 0x64646464, 0x4140);
    const uint32_t high = __byte_perm(codes, 0x64646464, 0x4342);
    out[0] = __hsub2(*(const __half2 *)&low, bias);
    out[1] = __hsub2(*(const __half2 *)&high, bias);
}

// The 32 weights of a block as halves, in order, to 16-byte aligned memory.
template <class F> __device__ __forceinline__ void weights(const Raw<F> &raw, uint4 *to) {
    uint32_t q[8];
    codes(raw, q);
    const Affine w = affine(raw);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __half2 scale = __half2half2(__float2half_rn(w.scale[i / 2]));
        const __half2 minimum = __half2half2(__float2half_rn(w.minimum[i / 2]));
        __half2 out[4];
#pragma unroll
        for (int word = 0; word < 2; word++) {
            __half2 pairs[2];
            halves<F>(q[2 * i + word], pairs);
#pragma unroll
            for (int p = 0; p < 2; p++) {
                out[2 * word + p] = F::MINIMA ? __hfma2(pairs[p], scale, minimum) : __hmul2(pairs[p], scale);
            }
        }
        to[i] = *(const uint4 *)out;
    }
}
