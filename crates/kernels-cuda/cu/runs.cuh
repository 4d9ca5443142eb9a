// Runs of the positions that a row sees: what blocks of threads that share a row have in common.
#pragma once
#include <stdint.h>

// One row: where it lies, the keys that it sees, and where its pages are in the table.
struct Row {
    uint32_t row;
    uint32_t first;
    uint32_t end;
    uint32_t pages_at; // unmasked: the first row of its span
    uint32_t old;      // positions before it were written before this step
    uint32_t padding;
};

// Counts one up; what this block of threads wrote is seen by who counts later, and the other way round.
// All its threads have met before.
__device__ __forceinline__ uint32_t counted(uint32_t *counter) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// What a warp, or a run, knows of a head: the sum of the values by their weights is beside it.
struct Softmax {
    float highest, total;

    // Takes a part's sums times this. A part without a position has nothing; one whose scores are no
    // numbers keeps its total, which is none either.
    __device__ __forceinline__ static float factor(float highest, float of_all) {
        return highest == -INFINITY ? 0.0f : expf(highest - of_all);
    }
};
