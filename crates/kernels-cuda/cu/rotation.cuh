// How pairs of a step's rows turn.
#pragma once
#include <stdint.h>

// The sine and cosine of every pair of every row. `src/rows.rs` has the same fields in the same order.
struct Rotation {
    const float2 *turns;  // (T, pairs), cosine and sine
    uint32_t n_pairs;     // 0: none
    uint32_t interleaved; // pairs (2i, 2i + 1), else (i, i + pairs)

    __device__ __forceinline__ void turn(float &a, float &b, uint32_t t, uint32_t pair) const {
        const float2 turn = turns[(size_t)t * n_pairs + pair];
        const float first = a * turn.x - b * turn.y;
        b = a * turn.y + b * turn.x;
        a = first;
    }

    // The pair of a head.
    __device__ __forceinline__ void turn(float *head, uint32_t t, uint32_t pair) const {
        turn(head[interleaved ? 2 * pair : pair], head[interleaved ? 2 * pair + 1 : pair + n_pairs], t, pair);
    }
};
