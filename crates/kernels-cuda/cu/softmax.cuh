// The running softmax of rows of `mma` tiles (Milakov and Gimelshein 2018, arXiv:1805.02867). Four lanes
// share two rows: a lane has scores 4n + 2i, 4n + 2i + 1 of row i of each tile n.
#pragma once
#include <math.h>
#include <stdint.h>

// Turns scores, of which those that do not count are infinitely low, into weights, whose sum it adds to
// this lane's totals. What the rows had before is to be multiplied by `keep`.
template <int N>
__device__ __forceinline__ void weigh(float (&scores)[N][4], float (&highest)[2], float (&totals)[2],
                                      float (&keep)[2]) {
    float next[2] = {highest[0], highest[1]};
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) next[i / 2] = fmaxf(next[i / 2], scores[n][i]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        next[i] = fmaxf(next[i], __shfl_xor_sync(0xffffffff, next[i], 1));
        next[i] = fmaxf(next[i], __shfl_xor_sync(0xffffffff, next[i], 2));
        keep[i] = highest[i] == -INFINITY ? 0.0f : __expf(highest[i] - next[i]);
        highest[i] = next[i];
        // Of a row that has seen nothing yet all scores are infinitely low.
        if (next[i] == -INFINITY) next[i] = 0;
        totals[i] *= keep[i];
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[n][i] = __expf(scores[n][i] - next[i / 2]);
            totals[i / 2] += scores[n][i];
        }
    }
}
