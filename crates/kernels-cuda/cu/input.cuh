// Activations in int8, as products meet them: rounded before, by `quantise.cu`, or on the way in.
//
// x = scale * (256 q + r) with scale = max|x| / 127 / 256: an int8 and another for the remainder, 16 bits
// in all. (One int8 alone is what the CPU takes where a model tolerates it; here the weights' bytes are
// what a product takes its time for.) Below 1e-35 a block becomes zeros; one with a NaN or an infinity gets
// a NaN scale, so that the fault reaches the output of its row.
#pragma once
#include "common.cuh"
#include "row.cuh"

// Warps of a block of threads of a product and of a norm: the order of a norm's sum.
#define WARPS 16

// 32 activations that meet a block of weights.
template <class F> struct Activations {
    uint4 first[2];
    uint4 second[2];
    float scale;
    // Sums of the integers 256 q + r: of 0..16 and 16..32 where the halves of a block of weights have
    // scales of their own, else of all.
    int sums[F::HALVES ? 2 : 1];
};

// What a block of 32 has beside its integers.
struct QuantHead {
    float scale;
    int sums[2];
};

// Rows of activations, rounded. `src/linear.rs` has the same fields in the same order.
struct Quantised {
    int8_t *first;
    int8_t *second;
    QuantHead *heads;
    float *inverses; // of normed rows (T): what their products are multiplied by

    template <class F> __device__ __forceinline__ Activations<F> at(size_t block) const {
        Activations<F> out;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            out.first[half] = ((const uint4 *)(first + block * 32))[half];
            out.second[half] = ((const uint4 *)(second + block * 32))[half];
        }
        const QuantHead head = heads[block];
        out.scale = head.scale;
        if constexpr (F::HALVES) {
            out.sums[0] = head.sums[0], out.sums[1] = head.sums[1];
        } else {
            out.sums[0] = head.sums[0] + head.sums[1];
        }
        return out;
    }
};

// How a block of 32 is rounded. `bits` are those of its largest magnitude, as an integer, which puts
// a NaN after infinity.
struct Rounding {
    float step, inverse, scale;
    bool usable;

    __device__ __forceinline__ explicit Rounding(uint32_t bits) {
        const float largest = __uint_as_float(bits);
        usable = largest >= 1e-35f && largest < INFINITY;
        step = largest * (1.0f / 127.0f);
        inverse = 127.0f * __frcp_rn(largest);
        const float fault = largest >= 1e-35f || isnan(largest) ? NAN : 0.0f;
        scale = usable ? step / 256.0f : fault;
    }

    __device__ __forceinline__ int first(float value) const {
        return usable ? (int)rintf(value * inverse) : 0;
    }

    __device__ __forceinline__ int second(float value, int first) const {
        if (!usable) return 0;
        const float parts = fmaf((float)first, -step, value) * inverse * 256.0f;
        return (int)rintf(fmaxf(-127.0f, fminf(127.0f, parts)));
    }
};

// Asks for the weight of a norm, which no kernel writes, before it is needed.
__device__ __forceinline__ void prefetch(const Row &row, uint32_t width) {
    if (!row.norm || blockIdx.x > 0) return;
    for (uint32_t c = 32 * threadIdx.x; c < width; c += 32 * WARPS * 32) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(row.norm + c));
    }
}

// Rounds values 4i..4i + 4 of a row, and adds their squares to those seen, if there is a norm's weight.
template <class Put>
__device__ __forceinline__ void round_four(float4 four, const float4 *weight, uint32_t i, float &squares,
                                           Put put) {
    float values[4] = {four.x, four.y, four.z, four.w};
    if (weight) {
#pragma unroll
        for (int c = 0; c < 4; c++) squares = fmaf(values[c], values[c], squares);
        values[0] *= weight->x, values[1] *= weight->y;
        values[2] *= weight->z, values[3] *= weight->w;
    }
    uint32_t bits = 0;
#pragma unroll
    for (int c = 0; c < 4; c++) bits = max(bits, __float_as_uint(fabsf(values[c])));
    const uint32_t lanes = 0xffu << (threadIdx.x % 32 / 8 * 8);
#pragma unroll
    for (int step = 4; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(lanes, bits, step));
    const Rounding rounding(bits);
    uint32_t first = 0, second = 0;
    int sum = 0;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const int a = rounding.first(values[c]), b = rounding.second(values[c], a);
        first |= (uint32_t)(uint8_t)(int8_t)a << (8 * c);
        second |= (uint32_t)(uint8_t)(int8_t)b << (8 * c);
        sum += 256 * a + b;
    }
    sum += __shfl_xor_sync(lanes, sum, 1);
    sum += __shfl_xor_sync(lanes, sum, 2);
    put(i / 8, i % 8, first, second, rounding.scale, sum, __shfl_xor_sync(lanes, sum, 4));
}

// Rounds a row, of an RMS norm x * weight: the root of the mean square is a factor of the whole row,
// which rounds alike without it. Eight lanes have a block, four values each; `put(block, part, first,
// second, scale, lower, upper)` takes them, with the sums of the block's halves. Called by all of WARPS
// warps; gives the sum of squares that this thread has seen.
template <class Put>
__device__ __forceinline__ float round_row(const Row &row, uint32_t n_blocks, Put put) {
    // Values that a thread asks for at once, four each: what it rounds goes to memory, behind which the
    // compiler would not dare to ask for more.
    constexpr int AT_ONCE = 4;
    const uint32_t n = 8 * n_blocks, step = WARPS * 32;
    float squares = 0;
    for (uint32_t begin = threadIdx.x; begin < n; begin += AT_ONCE * step) {
        float4 values[AT_ONCE], weights[AT_ONCE];
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            const uint32_t i = begin + e * step;
            if (i < n) values[e] = ((const float4 *)row.x)[i];
            if (i < n && row.norm) weights[e] = __ldg((const float4 *)row.norm + i);
        }
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            const uint32_t i = begin + e * step;
            if (i < n) round_four(values[e], row.norm ? &weights[e] : nullptr, i, squares, put);
        }
    }
    return squares;
}

// One over the root of the mean square of a row, of what each thread has seen, when all have called
// `share` and met; the sums have one order.
struct Inverse {
    float squares[WARPS];

    __device__ __forceinline__ void share(float seen) {
        const float sum = warp_sum(seen);
        if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    }

    __device__ __forceinline__ float value(const Row &row, uint32_t width) const {
        if (!row.norm) return 1.0f;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += squares[w];
        return rsqrtf(sum / (float)width + row.eps);
    }
};

// A row in shared memory, rounded. Halves of blocks lie apart, so that lanes read without conflicts.
template <class F> struct Rounded {
    uint4 *first, *second;
    float *scales;
    int *sums;
    uint32_t n_blocks;

    __device__ __forceinline__ Rounded(uint4 *shared, uint32_t n_blocks) : n_blocks(n_blocks) {
        first = shared;
        second = first + 2 * n_blocks;
        scales = (float *)(second + 2 * n_blocks);
        sums = (int *)(scales + n_blocks);
    }

    // Bytes that it takes; `src/linear.rs` has the same.
    static __device__ __forceinline__ uint32_t bytes(uint32_t n_blocks) {
        return (n_blocks * (64 + 4 + (F::HALVES ? 8 : 4)) + 15) / 16 * 16;
    }

    __device__ __forceinline__ Activations<F> at(uint32_t block) const {
        Activations<F> out;
        out.first[0] = first[block], out.first[1] = first[n_blocks + block];
        out.second[0] = second[block], out.second[1] = second[n_blocks + block];
        out.scale = scales[block];
        out.sums[0] = sums[block];
        if constexpr (F::HALVES) out.sums[1] = sums[n_blocks + block];
        return out;
    }

    __device__ __forceinline__ float fill(const Row &row) const {
        const auto put = [&](uint32_t block, uint32_t part, uint32_t q, uint32_t r, float scale,
                             int lower, int upper) {
            const uint32_t half = part / 4 * n_blocks + block;
            ((uint32_t *)(first + half))[part % 4] = q;
            ((uint32_t *)(second + half))[part % 4] = r;
            if (part > 0) return;
            scales[block] = scale;
            if constexpr (F::HALVES) {
                sums[block] = lower, sums[n_blocks + block] = upper;
            } else {
                sums[block] = lower + upper;
            }
        };
        return round_row(row, n_blocks, put);
    }
};
