// Chunks of weights on their way to a warp: copied to shared memory without a register, and awaited in
// their order.
//
// A chunk is 32 blocks of one row, one for each lane, or what is left of it; chunks of two rows travel
// together.
#pragma once
#include "common.cuh"
#include "copy.cuh"

#define LANES 32

template <class F> struct Ring {
    // Where in a chunk's place what lies. Halves of blocks of 32 bytes lie apart.
    static constexpr int LOW = F::LOW / 4, HIGH_AT = LANES * 16 * LOW;
    static constexpr int SCALES_AT = HIGH_AT + LANES * 4 * F::HIGH;
    static constexpr int SUPERS_AT = SCALES_AT + LANES * F::SCALE_BYTES;
    // `src/linear.rs` has the same.
    static constexpr int CHUNK_BYTES = SUPERS_AT + (F::SUPERS ? 16 : 0);
    static constexpr int PAIR_BYTES = 2 * CHUNK_BYTES;

    const char *place;
    uint32_t address;

    // The place of this warp; `shared` starts on 16 bytes.
    __device__ __forceinline__ explicit Ring(char *shared) {
        place = shared + threadIdx.x / LANES * (DEPTH * PAIR_BYTES);
        address = (uint32_t)__cvta_generic_to_shared(place);
    }

    // Asks for blocks `k`.. of a row, `n` of them, the first or second of a pair; `end_of_chunk` must
    // follow both.
    __device__ __forceinline__ void ask(int slot, int second, const Planes &w, uint32_t row, uint32_t k,
                                        uint32_t n) const {
        const uint32_t lane = threadIdx.x % LANES;
        const uint32_t to = address + slot * PAIR_BYTES + second * CHUNK_BYTES;
        const size_t block = (size_t)row * (w.columns / 32) + k;
        if (lane < n) {
#pragma unroll
            for (int i = 0; i < LOW; i++) {
                copy_16(to + (i * LANES + lane) * 16, w.low + ((block + lane) * LOW + i) * 16);
            }
            if constexpr (F::HIGH == 1) copy_4(to + HIGH_AT + lane * 4, w.high + block + lane);
            if constexpr (F::HIGH == 2) copy_8(to + HIGH_AT + lane * 8, w.high + 2 * (block + lane));
        }
        // k is a multiple of 32, rows of scales start on four bytes.
        const uint8_t *scales = w.scales_of(row) + (k >> w.shared) * F::SCALE_BYTES;
        const uint32_t n_entries = (n + (1 << w.shared) - 1) >> w.shared;
        const uint32_t n_words = (n_entries * F::SCALE_BYTES + 3) / 4;
        if (lane < n_words) copy_4(to + SCALES_AT + lane * 4, scales + lane * 4);
        if constexpr (F::SUPERS) {
            if (lane < n / 8) copy_4(to + SUPERS_AT + lane * 4, w.supers + block / 8 + lane);
        }
    }

    // Waits for the oldest pair that was asked for.
    __device__ __forceinline__ void wait() const {
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory");
        __syncwarp();
    }

    // This lane's block of a chunk.
    __device__ __forceinline__ void read(int slot, int second, uint32_t shared, Raw<F> &raw) const {
        const uint32_t lane = threadIdx.x % LANES;
        const char *at = place + slot * PAIR_BYTES + second * CHUNK_BYTES;
#pragma unroll
        for (int i = 0; i < LOW; i++) raw.low[i] = ((const uint4 *)at)[i * LANES + lane];
#pragma unroll
        for (int i = 0; i < F::HIGH; i++) {
            raw.high[i] = ((const uint32_t *)(at + HIGH_AT))[F::HIGH * lane + i];
        }
        const char *scales = at + SCALES_AT + (lane >> shared) * F::SCALE_BYTES;
        raw.scales = scale_entry<F>((const uint8_t *)scales);
        if constexpr (F::SUPERS) raw.super = ((const __half2 *)(at + SUPERS_AT))[lane / 8];
    }
};
