// From a checkpoint's blocks to planes, once, when a weight is loaded: one thread a block of 32.
#include "common.cuh"

// One block of 32 weights of a checkpoint, taken apart.
struct Block {
    uint8_t codes[32];
    uint8_t scales[4]; // as the plane stores them
    uint8_t supers[4]; // f16 d, f16 dmin
};

__device__ void copy(uint8_t *to, const uint8_t *from, int n) {
    for (int i = 0; i < n; i++) to[i] = from[i];
}

// Nibbles of 32 weights as most formats have them: byte j is weight j and, high, j + 16.
__device__ void nibbles(Block &out, const uint8_t *from) {
    for (int j = 0; j < 16; j++) {
        out.codes[j] = from[j] & 15;
        out.codes[j + 16] = from[j] >> 4;
    }
}

// Fifth bits: bit j of a word is weight j.
__device__ void fifth_bits(Block &out, const uint8_t *from) {
    for (int j = 0; j < 32; j++) out.codes[j] |= ((from[j / 8] >> (j % 8)) & 1) << 4;
}

// Nibbles of Q4_K and Q5_K: 32 bytes have 64 weights, the first 32 low.
__device__ void group_nibbles(Block &out, const uint8_t *from, int group) {
    for (int j = 0; j < 32; j++) out.codes[j] = (from[32 * (group / 2) + j] >> (4 * (group % 2))) & 15;
}

// Two-bit values of Q2_K, Q3_K: 32 bytes have 128 weights.
__device__ void pairs(Block &out, const uint8_t *from, int group) {
    for (int j = 0; j < 32; j++) out.codes[j] = (from[32 * (group / 4) + j] >> (2 * (group % 4))) & 3;
}

// Scale and minimum of a group of Q4_K and Q5_K.
__device__ void group_scales(Block &out, const uint8_t *packed, int j) {
    if (j < 4) {
        out.scales[0] = packed[j] & 63;
        out.scales[1] = packed[j + 4] & 63;
    } else {
        out.scales[0] = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
        out.scales[1] = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
    }
}

// The layouts are those of `exrail_tensor`; `at` is the checkpoint's block, `g` the run of 32 in it.
template <class F> struct Checkpoint;
template <> struct Checkpoint<Q4_0> {
    static constexpr int BYTES = 18, RUNS = 1;
    __device__ static void take(Block &out, const uint8_t *at, int) {
        copy(out.scales, at, 2);
        nibbles(out, at + 2);
    }
};
template <> struct Checkpoint<IQ4_NL> : Checkpoint<Q4_0> {};
template <> struct Checkpoint<Q4_1> {
    static constexpr int BYTES = 20, RUNS = 1;
    __device__ static void take(Block &out, const uint8_t *at, int) {
        copy(out.scales, at, 4);
        nibbles(out, at + 4);
    }
};
template <> struct Checkpoint<Q5_0> {
    static constexpr int BYTES = 22, RUNS = 1;
    __device__ static void take(Block &out, const uint8_t *at, int) {
        copy(out.scales, at, 2);
        nibbles(out, at + 6);
        fifth_bits(out, at + 2);
    }
};
template <> struct Checkpoint<Q5_1> {
    static constexpr int BYTES = 24, RUNS = 1;
    __device__ static void take(Block &out, const uint8_t *at, int) {
        copy(out.scales, at, 4);
        nibbles(out, at + 8);
        fifth_bits(out, at + 4);
    }
};
template <> struct Checkpoint<Q8_0> {
    static constexpr int BYTES = 34, RUNS = 1;
    __device__ static void take(Block &out, const uint8_t *at, int) {
        copy(out.scales, at, 2);
        copy(out.codes, at + 2, 32);
    }
};
template <> struct Checkpoint<MXFP4> {
    static constexpr int BYTES = 17, RUNS = 1;
    __device__ static void take(Block &out, const uint8_t *at, int) {
        // Half of 2^(e - 127) as bfloat16, denormal below 2^-126; the table has twice the values.
        const uint32_t e = at[0];
        const uint32_t bits = e >= 2 ? (e - 1) << 7 : 0x20 << e;
        out.scales[0] = bits & 255;
        out.scales[1] = bits >> 8;
        nibbles(out, at + 1);
    }
};
template <> struct Checkpoint<Q2_K> {
    static constexpr int BYTES = 84, RUNS = 8;
    __device__ static void take(Block &out, const uint8_t *at, int g) {
        pairs(out, at + 16, g);
        for (int half = 0; half < 2; half++) {
            out.scales[half] = at[2 * g + half] & 15;
            out.scales[half + 2] = at[2 * g + half] >> 4;
        }
        copy(out.supers, at + 80, 4);
    }
};
template <> struct Checkpoint<Q3_K> {
    static constexpr int BYTES = 110, RUNS = 8;
    __device__ static void take(Block &out, const uint8_t *at, int g) {
        pairs(out, at + 32, g);
        for (int j = 0; j < 32; j++) out.codes[j] |= ((at[j] >> g) & 1) << 2;
        const uint8_t *packed = at + 96;
        for (int half = 0; half < 2; half++) {
            const int j = 2 * g + half;
            const int low = (packed[j % 8] >> (4 * (j / 8))) & 15;
            const int high = (packed[8 + j % 4] >> (2 * (j / 4))) & 3;
            out.scales[half] = (uint8_t)((low | high << 4) - 32);
        }
        copy(out.supers, at + 108, 2);
    }
};
template <> struct Checkpoint<Q4_K> {
    static constexpr int BYTES = 144, RUNS = 8;
    __device__ static void take(Block &out, const uint8_t *at, int g) {
        copy(out.supers, at, 4);
        group_scales(out, at + 4, g);
        group_nibbles(out, at + 16, g);
    }
};
template <> struct Checkpoint<Q5_K> {
    static constexpr int BYTES = 176, RUNS = 8;
    __device__ static void take(Block &out, const uint8_t *at, int g) {
        copy(out.supers, at, 4);
        group_scales(out, at + 4, g);
        group_nibbles(out, at + 48, g);
        for (int j = 0; j < 32; j++) out.codes[j] |= ((at[16 + j] >> g) & 1) << 4;
    }
};
template <> struct Checkpoint<Q6_K> {
    static constexpr int BYTES = 210, RUNS = 8;
    __device__ static void take(Block &out, const uint8_t *at, int g) {
        const int part = g / 4, quarter = g % 4;
        for (int j = 0; j < 32; j++) {
            const uint8_t low = at[64 * part + 32 * (quarter % 2) + j] >> (4 * (quarter / 2));
            const uint8_t high = at[128 + 32 * part + j] >> (2 * quarter);
            out.codes[j] = (low & 15) | (high & 3) << 4;
        }
        copy(out.scales, at + 192 + 2 * g, 2);
        copy(out.supers, at + 208, 2);
    }
};
template <> struct Checkpoint<IQ4_XS> {
    static constexpr int BYTES = 136, RUNS = 8;
    __device__ static void take(Block &out, const uint8_t *at, int g) {
        copy(out.supers, at, 2);
        const int high = ((at[2 + g / 4] >> (2 * (g % 4))) & 3) << 4;
        const int low = (at[4 + g / 2] >> (4 * (g % 2))) & 15;
        out.scales[0] = (uint8_t)((low | high) - 32);
        nibbles(out, at + 8 + 16 * g);
    }
};

// `differ` becomes one where a block does not have the scale that its neighbours share.
template <class F>
__device__ void repack(const uint8_t *from, Planes to, uint32_t n_blocks, uint32_t *differ) {
    const uint32_t block = blockIdx.x * blockDim.x + threadIdx.x;
    begin();
    if (block >= n_blocks) return;
    using C = Checkpoint<F>;
    Block out = {};
    C::take(out, from + (size_t)(block / C::RUNS) * C::BYTES, block % C::RUNS);
    uint8_t *low = (uint8_t *)to.low + (size_t)block * (F::LOW * 4);
    if constexpr (F::LOW == 8) {
        copy(low, out.codes, 32);
    } else {
        for (int j = 0; j < 16; j++) low[j] = (out.codes[j] & 15) | out.codes[j + 16] << 4;
    }
    if constexpr (F::HIGH > 0) {
        uint32_t *high = (uint32_t *)to.high + (size_t)block * F::HIGH;
        for (int word = 0; word < F::HIGH; word++) {
            uint32_t bits = 0;
            constexpr int EACH = 32 / F::HIGH;
            for (int j = 0; j < EACH; j++) {
                bits |= (uint32_t)(out.codes[word * EACH + j] >> 4) << (F::HIGH * j);
            }
            high[word] = bits;
        }
    }
    const uint32_t of_row = to.columns / 32, k = block % of_row;
    const uint32_t leader = k >> to.shared << to.shared;
    if (k == leader) {
        uint8_t *scales = (uint8_t *)to.scales_of(block / of_row);
        copy(scales + (k >> to.shared) * F::SCALE_BYTES, out.scales, F::SCALE_BYTES);
    } else {
        Block first = {};
        const uint32_t at = block - (k - leader);
        C::take(first, from + (size_t)(at / C::RUNS) * C::BYTES, at % C::RUNS);
        for (int i = 0; i < F::SCALE_BYTES; i++) {
            if (first.scales[i] != out.scales[i]) *differ = 1;
        }
    }
    if constexpr (F::SUPERS) {
        if (block % 8 == 0) copy((uint8_t *)(to.supers + block / 8), out.supers, 4);
    }
}

#define KERNEL(name, F)                                                                            \
    EXTERN void repack_##name(const uint8_t *from, Planes to, uint32_t n_blocks,                   \
                              uint32_t *differ) {                                                  \
        repack<F>(from, to, n_blocks, differ);                                                     \
    }
EACH_FORMAT(KERNEL)
