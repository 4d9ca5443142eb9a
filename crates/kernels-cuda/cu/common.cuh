// What the kernels share: planes of packed weights, reductions, and how a block of 32 weights is read.
//
// Letters: T rows of activations, N rows of a weight, K columns.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define EXTERN extern "C" __global__

// The first call of every kernel. On a card where kernels overlap, the next one may start, and the
// ones before have ended when this returns: what they wrote is there.
__device__ __forceinline__ void begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A packed weight, N rows of K / 32 blocks, row after row in every plane. `src/weight.rs` has the same
// fields in the same order. Nothing is rounded: a block gives the f32 that its checkpoint's gives.
//
// | plane  | a block has                                                                          |
// |--------|--------------------------------------------------------------------------------------|
// | low    | 16 bytes of nibbles: byte j is weight j and, in its high nibble, j + 16; or 32 bytes   |
// | high   | the bits above the nibble: bit j of a word is weight j (5 bits); of two words (6 bits) |
// | scales | f16, bf16, f16 pairs, or the bytes of a superblock's groups; `shared`                  |
// | supers | f16 pairs (d, dmin), one for eight blocks                                              |
struct Planes {
    const uint8_t *low;
    const uint32_t *high;
    const uint8_t *scales;
    const __half2 *supers;
    uint32_t rows;
    uint32_t columns;
    uint32_t shared;      // 2^shared neighbours of a row have one entry in the plane of scales
    uint32_t scale_bytes; // of a row in that plane: a multiple of four

    __device__ __forceinline__ const uint8_t *scales_of(size_t row) const {
        return scales + row * scale_bytes;
    }
};

// How scales are stored.
enum Scales { HALF, BRAIN, HALF_MIN, SUPER_32, SUPER_16, SUPER_MIN_32, SUPER_MIN_16 };
// What a code stands for.
enum Meaning { CODE, SIGNED, IQ4, E2M1 };

// A block format: bits of a code (LOW + HIGH), its scales, and what is taken from a code.
template <int LOW_, int HIGH_, Scales SCALES_, Meaning MEANING_, int BIAS_> struct Format {
    static constexpr int LOW = LOW_, HIGH = HIGH_, BIAS = BIAS_;
    static constexpr Scales SCALES = SCALES_;
    static constexpr Meaning MEANING = MEANING_;
    // Whether the two halves of a block have scales of their own.
    static constexpr bool HALVES = SCALES_ == SUPER_16 || SCALES_ == SUPER_MIN_16;
    static constexpr bool MINIMA =
        SCALES_ == HALF_MIN || SCALES_ == SUPER_MIN_32 || SCALES_ == SUPER_MIN_16;
    // Bytes of a block in the plane of scales.
    static constexpr int SCALE_BYTES = SCALES_ == HALF_MIN || SCALES_ == SUPER_MIN_16 ? 4
                                       : SCALES_ == SUPER_32                          ? 1
                                                                                      : 2;
    static constexpr bool SUPERS = SCALES_ >= SUPER_32;
};

using Q4_0 = Format<4, 0, HALF, CODE, 8>;
using Q4_1 = Format<4, 0, HALF_MIN, CODE, 0>;
using Q5_0 = Format<4, 1, HALF, CODE, 16>;
using Q5_1 = Format<4, 1, HALF_MIN, CODE, 0>;
using Q8_0 = Format<8, 0, HALF, SIGNED, 0>;
using Q2_K = Format<4, 0, SUPER_MIN_16, CODE, 0>;
using Q3_K = Format<4, 0, SUPER_16, CODE, 4>;
using Q4_K = Format<4, 0, SUPER_MIN_32, CODE, 0>;
using Q5_K = Format<4, 1, SUPER_MIN_32, CODE, 0>;
using Q6_K = Format<4, 2, SUPER_16, CODE, 32>;
using IQ4_NL = Format<4, 0, HALF, IQ4, 0>;
using IQ4_XS = Format<4, 0, SUPER_32, IQ4, 0>;
using MXFP4 = Format<4, 0, BRAIN, E2M1, 0>;

// F(kernel suffix, format) for every block format; the suffixes are those of `DType` in Rust.
#define EACH_FORMAT(F)                                                                             \
    F(q4_0, Q4_0) F(q4_1, Q4_1) F(q5_0, Q5_0) F(q5_1, Q5_1) F(q8_0, Q8_0) F(q2_k, Q2_K)            \
    F(q3_k, Q3_K) F(q4_k, Q4_K) F(q5_k, Q5_K) F(q6_k, Q6_K) F(iq4_nl, IQ4_NL) F(iq4_xs, IQ4_XS)    \
    F(mxfp4, MXFP4)

__device__ const int8_t IQ4_TABLE[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                         1,    13,   25,  38,  53,  69,  89,  113};
// Twice the value of an E2M1 float; the scale has the half.
__device__ const int8_t E2M1_TABLE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// A block as it lies in the planes.
template <class F> struct Raw {
    uint4 low[F::LOW / 4];
    uint32_t high[F::HIGH ? F::HIGH : 1];
    uint32_t scales;
    __half2 super;
};

// An entry of the plane of scales, wherever it lies.
template <class F> __device__ __forceinline__ uint32_t scale_entry(const uint8_t *at) {
    if constexpr (F::SCALE_BYTES == 4) return *(const uint32_t *)at;
    if constexpr (F::SCALE_BYTES == 2) return *(const uint16_t *)at;
    return *at;
}

// Block `k` of a row.
template <class F>
__device__ __forceinline__ void load(const Planes &planes, size_t row, uint32_t k, Raw<F> &raw) {
    constexpr int LOW = F::LOW / 4;
    const size_t block = row * (planes.columns / 32) + k;
#pragma unroll
    for (int i = 0; i < LOW; i++) raw.low[i] = __ldg((const uint4 *)planes.low + block * LOW + i);
#pragma unroll
    for (int i = 0; i < F::HIGH; i++) raw.high[i] = __ldg(planes.high + block * F::HIGH + i);
    const uint8_t *at = planes.scales_of(row) + (k >> planes.shared) * F::SCALE_BYTES;
    raw.scales = scale_entry<F>(at);
    if constexpr (F::SUPERS) raw.super = planes.supers[block / 8];
}

// Scale and minimum of the halves of a block: w = scale * (code - BIAS) + minimum.
struct Affine {
    float scale[2];
    float minimum[2];
};

template <class F> __device__ __forceinline__ Affine affine(const Raw<F> &raw) {
    Affine out = {{0, 0}, {0, 0}};
    const auto byte = [&](int i) { return (uint8_t)(raw.scales >> (8 * i)); };
    const auto half = [&](int i) { return __ushort_as_half((uint16_t)(raw.scales >> (16 * i))); };
    if constexpr (F::SCALES == HALF) {
        out.scale[0] = __half2float(half(0));
    } else if constexpr (F::SCALES == BRAIN) {
        out.scale[0] = __uint_as_float(raw.scales << 16);
    } else if constexpr (F::SCALES == HALF_MIN) {
        out.scale[0] = __half2float(half(0));
        out.minimum[0] = __half2float(half(1));
    } else {
        // Exact: an 11-bit significand times a byte.
        const float2 super = __half22float2(raw.super);
        if constexpr (F::SCALES == SUPER_32) {
            out.scale[0] = super.x * (float)(int8_t)byte(0);
        } else if constexpr (F::SCALES == SUPER_16) {
            out.scale[0] = super.x * (float)(int8_t)byte(0);
            out.scale[1] = super.x * (float)(int8_t)byte(1);
        } else if constexpr (F::SCALES == SUPER_MIN_32) {
            out.scale[0] = super.x * (float)byte(0);
            out.minimum[0] = -super.y * (float)byte(1);
        } else {
            out.scale[0] = super.x * (float)byte(0);
            out.scale[1] = super.x * (float)byte(1);
            out.minimum[0] = -super.y * (float)byte(2);
            out.minimum[1] = -super.y * (float)byte(3);
        }
    }
    if constexpr (!F::HALVES) {
        out.scale[1] = out.scale[0];
        out.minimum[1] = out.minimum[0];
    }
    return out;
}

// Four codes by a table of sixteen signed bytes.
template <Meaning MEANING> __device__ __forceinline__ uint32_t looked_up(uint32_t codes) {
    uint32_t out = 0;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const int8_t *table = MEANING == IQ4 ? IQ4_TABLE : E2M1_TABLE;
        out |= (uint32_t)(uint8_t)table[(codes >> (8 * c)) & 15] << (8 * c);
    }
    return out;
}

// Bit c of `bits` (or bits 2c, 2c + 1) at bit 4 of byte c. A factor places copies side by side, of which
// the mask leaves one field each.
template <int HIGH> __device__ __forceinline__ uint32_t spread(uint32_t bits) {
    if constexpr (HIGH == 1) return (bits & 0xf) * 0x02040810 & 0x10101010;
    // Copies of neighbouring fields would overlap.
    return ((bits & 0x33) * 0x00010010 & 0x00300030) | ((bits & 0xcc) * 0x00400400 & 0x30003000);
}

// The codes of a block, weights 4i..4i+4 in word i. Below 64 each, or signed bytes.
template <class F> __device__ __forceinline__ void codes(const Raw<F> &raw, uint32_t (&out)[8]) {
    if constexpr (F::LOW == 8) {
        const uint4 first = raw.low[0], second = raw.low[F::LOW / 4 - 1];
        out[0] = first.x, out[1] = first.y, out[2] = first.z, out[3] = first.w;
        out[4] = second.x, out[5] = second.y, out[6] = second.z, out[7] = second.w;
        return;
    }
    const uint32_t words[4] = {raw.low[0].x, raw.low[0].y, raw.low[0].z, raw.low[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[i] = words[i] & 0x0f0f0f0f;
        out[i + 4] = (words[i] >> 4) & 0x0f0f0f0f;
    }
    if constexpr (F::HIGH == 1) {
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] |= spread<1>(raw.high[0] >> (4 * i));
    } else if constexpr (F::HIGH == 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] |= spread<2>(raw.high[0] >> (8 * i));
            out[i + 4] |= spread<2>(raw.high[F::HIGH - 1] >> (8 * i));
        }
    }
    if constexpr (F::MEANING == IQ4 || F::MEANING == E2M1) {
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = looked_up<F::MEANING>(out[i]);
    }
}

// Code c of a word as a number, its bias taken off.
template <class F> __device__ __forceinline__ float code_value(uint32_t word, int c) {
    return (float)((int)(int8_t)(word >> (8 * c)) - F::BIAS);
}

// Sum over the lanes of a warp, in all lanes; always in the same order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}

// Sum over a block of at most 1,024 threads, in all of them.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    x = lane < (blockDim.x + 31) / 32 ? sums[lane] : 0;
    return warp_sum(x);
}
