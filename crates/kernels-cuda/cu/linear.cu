// Products x W^T of one to three matrices that share their input.
//
// A block of threads has a run of the outputs, and its warps share the run's weights evenly, chunk by
// chunk, each with a ring of chunks on their way (`ring.cuh`). Where two warps meet in a row, their sums
// are added in the warps' order.
//
// A row's result does not depend on the other rows of the batch: its sums have one order.
#include "common.cuh"
#include "epilogue.cuh"
#include "input.cuh"
#include "ring.cuh"

// The chunks of a warp, one after the other.
struct Walk {
    uint32_t row, chunk, chunks_of_row;

    __device__ __forceinline__ void next() {
        if (++chunk == chunks_of_row) chunk = 0, row++;
    }
};

// The value of a block times one row of activations.
template <class F, bool TWICE>
__device__ __forceinline__ float block_product(const uint32_t (&q)[8], const Affine &w,
                                               const Activations<F, TWICE> &x) {
    int sums[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 v = x.first[half];
        int s = __dp4a((int)q[4 * half], (int)v.x, 0);
        s = __dp4a((int)q[4 * half + 1], (int)v.y, s);
        s = __dp4a((int)q[4 * half + 2], (int)v.z, s);
        sums[half] = __dp4a((int)q[4 * half + 3], (int)v.w, s);
    }
    if constexpr (TWICE) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 v = x.second[half];
            int s = __dp4a((int)q[4 * half], (int)v.x, 256 * sums[half]);
            s = __dp4a((int)q[4 * half + 1], (int)v.y, s);
            s = __dp4a((int)q[4 * half + 2], (int)v.z, s);
            sums[half] = __dp4a((int)q[4 * half + 3], (int)v.w, s);
        }
    }
    float out;
    if constexpr (F::HALVES) {
        out = w.scale[0] * (float)(sums[0] - F::BIAS * x.sums[0]) +
              w.scale[1] * (float)(sums[1] - F::BIAS * x.sums[1]);
        if constexpr (F::MINIMA) {
            out += w.minimum[0] * (float)x.sums[0] + w.minimum[1] * (float)x.sums[1];
        }
    } else {
        out = w.scale[0] * (float)(sums[0] + sums[1] - F::BIAS * x.sums[0]);
        if constexpr (F::MINIMA) out += w.minimum[0] * (float)x.sums[0];
    }
    return x.scale * out;
}

// What the warps of a block of threads tell each other.
template <int T> struct Results {
    float begun[WARPS][T]; // the sum of a row that an earlier warp began
    int begun_row[WARPS];  // which, or -1
};

// `sums` has room for T results of each row of the run, behind it lie the rings. `prepare` makes what
// `at(t, block)` gives: the activations of row t of the tile; `factor(t)` multiplies what they gave.
template <class F, bool TWICE, int T, class Prepare, class At, class Factor>
__device__ __forceinline__ void product(const Parts &parts, const Epilogue &end, char *shared,
                                        uint32_t first_row, uint32_t n_rows, Prepare prepare, At at,
                                        Factor factor) {
    __shared__ Results<T> results;
    const uint32_t warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const Ring<F> ring(shared);
    float *sums = (float *)(shared + WARPS * DEPTH * Ring<F>::CHUNK_BYTES);
    const uint32_t n_blocks = parts.each[0].weight.columns / 32;
    const uint32_t chunks_of_row = (n_blocks + LANES - 1) / LANES;
    const uint32_t width = parts.paired ? 2 : 1;
    const uint32_t start = width * (uint32_t)((uint64_t)parts.n_units * blockIdx.x / gridDim.x);
    const uint32_t stop = width * (uint32_t)((uint64_t)parts.n_units * (blockIdx.x + 1) / gridDim.x);
    const uint32_t n_local = stop - start, n_chunks = n_local * chunks_of_row;
    const uint32_t from = n_chunks * warp / WARPS, to = n_chunks * (warp + 1) / WARPS;

    Walk ahead = {from / chunks_of_row, from % chunks_of_row, chunks_of_row};
    uint32_t n_left = to - from;
    auto ask = [&](int slot) {
        if (n_left > 0) {
            const Where place = where(parts, start + ahead.row);
            const uint32_t k = ahead.chunk * LANES;
            ring.ask(slot, parts.each[place.part].weight, place.row, k, min(LANES, n_blocks - k));
            ahead.next();
            n_left--;
        }
        end_of_chunk();
    };
#pragma unroll
    for (int slot = 0; slot < DEPTH - 1; slot++) ask(slot);
    begin(); // Weights are there at any time; all else comes from the kernels before.
    prepare();
    if (lane == 0) results.begun_row[warp] = -1;
    __syncthreads();

    Walk walk = {from / chunks_of_row, from % chunks_of_row, chunks_of_row};
    bool whole = walk.chunk == 0; // whether this warp began the row
    float totals[T] = {};
    auto close = [&](uint32_t row) {
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float total = warp_sum(totals[t]);
            if (lane == 0) {
                if (whole) {
                    sums[row * T + t] = total;
                } else {
                    results.begun[warp][t] = total;
                    results.begun_row[warp] = (int)row;
                }
            }
            totals[t] = 0;
        }
        whole = true;
    };
    const uint32_t shared_scales = parts.each[0].weight.shared;
    int slot = 0;
    for (uint32_t c = from; c < to; c++) {
        ring.wait();
        ask(slot == 0 ? DEPTH - 1 : slot - 1); // Into the place of the chunk before.
        const uint32_t block = walk.chunk * LANES + lane;
        if (block < n_blocks) {
            Raw<F> raw;
            ring.read(slot, shared_scales, raw);
            uint32_t q[8];
            codes(raw, q);
            const Affine scales = affine(raw);
#pragma unroll
            for (int t = 0; t < T; t++) {
                totals[t] += block_product<F, TWICE>(q, scales, at(t, block));
            }
        }
        slot = slot == DEPTH - 1 ? 0 : slot + 1;
        const uint32_t row = walk.row;
        walk.next();
        if (walk.chunk == 0) close(row);
    }
    if (walk.chunk != 0 && from < to) close(walk.row);
    __syncthreads();

    auto total = [&](uint32_t row, int t) {
        float sum = sums[row * T + t];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (results.begun_row[w] == (int)row) sum += results.begun[w][t];
        }
        return factor(t) * sum;
    };
    for (uint32_t i = threadIdx.x; i < n_local / width * T; i += WARPS * LANES) {
        const uint32_t row = i / T * width;
        const int t = i % T;
        if (first_row + t >= n_rows) continue;
        const Where place = where(parts, start + row);
        if (parts.paired) {
            end.put_gated(parts.each[0], first_row + t, place.row, total(row, t), total(row + 1, t));
        } else {
            end.put(parts.each[place.part], first_row + t, place.row, total(row, t));
        }
    }
}

// One row, which every block of threads rounds for itself while its weights are coming.
template <class F, bool TWICE>
__device__ __forceinline__ void linear_one(const Parts &parts, const Row &row, const Epilogue &end) {
    extern __shared__ uint4 shared[];
    __shared__ Inverse inverse;
    const uint32_t width = parts.each[0].weight.columns, n_blocks = width / 32;
    const Rounded<F, TWICE> rounded(shared, n_blocks);
    prefetch(row, width);
    product<F, TWICE, 1>(
        parts, end, (char *)shared + rounded.bytes(n_blocks), 0, 1,
        [&] { inverse.share(rounded.fill(row)); },
        [&](int, uint32_t block) { return rounded.at(block); },
        [&](int) { return inverse.value(row, width); });
}

// T of `n_rows` rows, rounded before.
template <class F, bool TWICE, int T>
__device__ __forceinline__ void linear_tile(const Parts &parts, const Quantised &x, const Epilogue &end,
                                            uint32_t n_rows) {
    extern __shared__ uint4 shared[];
    const uint32_t n_blocks = parts.each[0].weight.columns / 32, first_row = blockIdx.y * T;
    product<F, TWICE, T>(
        parts, end, (char *)shared, first_row, n_rows, [] {},
        [&](int t, uint32_t block) {
            const uint32_t row = min(first_row + t, n_rows - 1);
            return x.at<F, TWICE>((size_t)row * n_blocks + block);
        },
        [&](int t) { return x.inverses[min(first_row + t, n_rows - 1)]; });
}

// The exact mode: f32 activations, each weight as the checkpoint has it; a warp has one output.
template <class F, int T>
__device__ __forceinline__ void linear_f32(const Part &part, const float *x, const Epilogue &end,
                                           uint32_t n_rows) {
    const Planes &w = part.weight;
    const uint32_t n = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    const uint32_t lane = threadIdx.x % LANES, first_row = blockIdx.y * T;
    if (n >= w.rows) return;
    const uint32_t n_blocks = w.columns / 32;
    float sums[T] = {};
    for (uint32_t b = lane; b < n_blocks; b += LANES) {
        Raw<F> raw;
        load(w, n, b, raw);
        uint32_t q[8];
        codes(raw, q);
        const Affine scales = affine(raw);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float weights[4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                weights[c] = fmaf(scales.scale[i / 4], code_value<F>(q[i], c), scales.minimum[i / 4]);
            }
#pragma unroll
            for (int t = 0; t < T; t++) {
                const uint32_t row = min(first_row + t, n_rows - 1);
                const float *v = x + (size_t)row * w.columns + b * 32 + 4 * i;
#pragma unroll
                for (int c = 0; c < 4; c++) sums[t] = fmaf(weights[c], v[c], sums[t]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        const float sum = warp_sum(sums[t]);
        if (lane == 0 && first_row + t < n_rows) end.put(part, first_row + t, n, sum);
    }
}

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__half x) { return __half2float(x); }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }

// Weights that are floats, with any number of columns; f32 activations in both modes.
template <class W, int T>
__device__ __forceinline__ void linear_float(const Part &part, const float *x, const Epilogue &end,
                                             uint32_t n_rows) {
    const Planes &w = part.weight;
    const uint32_t n = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    const uint32_t lane = threadIdx.x % LANES, first_row = blockIdx.y * T;
    if (n >= w.rows) return;
    const W *weights = (const W *)w.low + (size_t)n * w.columns;
    float sums[T] = {};
    for (uint32_t k = lane; k < w.columns; k += LANES) {
        const float weight = number(weights[k]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            const uint32_t row = min(first_row + t, n_rows - 1);
            sums[t] = fmaf(weight, x[(size_t)row * w.columns + k], sums[t]);
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        const float sum = warp_sum(sums[t]);
        if (lane == 0 && first_row + t < n_rows) end.put(part, first_row + t, n, sum);
    }
}

#define THREADS __launch_bounds__(WARPS * LANES, 2)
#define ROUNDED(mode, TWICE, name, F)                                                              \
    EXTERN THREADS void linear_##mode##_##name##_1(const __grid_constant__ Parts parts, Row row,   \
                                                   Epilogue end) {                                 \
        linear_one<F, TWICE>(parts, row, end);                                                     \
    }                                                                                              \
    EXTERN THREADS void linear_##mode##_##name##_8(const __grid_constant__ Parts parts,            \
                                                   Quantised x, Epilogue end, uint32_t n) {        \
        linear_tile<F, TWICE, 8>(parts, x, end, n);                                                \
    }
#define F32(name, F, T)                                                                            \
    EXTERN void linear_f32_##name##_##T(Part part, const float *x, Epilogue end, uint32_t n) {     \
        begin();                                                                                   \
        linear_f32<F, T>(part, x, end, n);                                                         \
    }
#define FLOAT(name, W, T)                                                                          \
    EXTERN void linear_f32_##name##_##T(Part part, const float *x, Epilogue end, uint32_t n) {     \
        begin();                                                                                   \
        linear_float<W, T>(part, x, end, n);                                                       \
    }
#define FORMAT(name, F)                                                                            \
    ROUNDED(once, false, name, F) ROUNDED(twice, true, name, F) F32(name, F, 1) F32(name, F, 8)
EACH_FORMAT(FORMAT)
FLOAT(f32, float, 1) FLOAT(f32, float, 8)
FLOAT(f16, __half, 1) FLOAT(f16, __half, 8)
FLOAT(bf16, __nv_bfloat16, 1) FLOAT(bf16, __nv_bfloat16, 8)
