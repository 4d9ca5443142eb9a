// Products x W^T of one to three matrices that share their input.
//
// A block of threads has a run of pairs of rows, and its warps share the run's weights evenly, chunk by
// chunk, each with a ring of chunks on their way (`ring.cuh`): a pair's rows meet the activations at the
// same time. Where two warps meet in a pair, their sums are added in the warps' order.
//
// A row's result does not depend on the other rows of the batch: its sums have one order.
#include "common.cuh"
#include "epilogue.cuh"
#include "input.cuh"
#include "ring.cuh"

// Two rows that are computed together: a gate's and the one that it lets through, or neighbours. The last
// row of a matrix may be alone, and is then there twice.
struct Pair {
    uint32_t first, second; // rows
    uint32_t part, of_second;

    __device__ __forceinline__ Pair(const Parts &parts, uint32_t pair) {
        part = 0, of_second = 1, first = second = pair;
        if (parts.paired) return;
        while (part + 1 < parts.n && pair >= (parts.each[part].weight.rows + 1) / 2) {
            pair -= (parts.each[part].weight.rows + 1) / 2;
            part++;
        }
        of_second = part;
        first = 2 * pair;
        second = min(first + 1, parts.each[part].weight.rows - 1);
    }
};

// `total` and the value of a block times one row of activations.
template <class F>
__device__ __forceinline__ float block_product(const uint32_t (&q)[8], const Affine &w,
                                               const Activations<F> &x, float total) {
    int sums[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 v = x.first[half];
        int s = __dp4a((int)q[4 * half], (int)v.x, 0);
        s = __dp4a((int)q[4 * half + 1], (int)v.y, s);
        s = __dp4a((int)q[4 * half + 2], (int)v.z, s);
        sums[half] = __dp4a((int)q[4 * half + 3], (int)v.w, s);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 v = x.second[half];
        int s = __dp4a((int)q[4 * half], (int)v.x, 256 * sums[half]);
        s = __dp4a((int)q[4 * half + 1], (int)v.y, s);
        s = __dp4a((int)q[4 * half + 2], (int)v.z, s);
        sums[half] = __dp4a((int)q[4 * half + 3], (int)v.w, s);
    }
    // Each step is named, so that kernels for one and for several rows round alike.
    float out;
    if constexpr (F::HALVES) {
        out = __fmul_rn(w.scale[0], (float)(sums[0] - F::BIAS * x.sums[0]));
        out = fmaf(w.scale[1], (float)(sums[1] - F::BIAS * x.sums[1]), out);
        if constexpr (F::MINIMA) {
            out = fmaf(w.minimum[0], (float)x.sums[0], out);
            out = fmaf(w.minimum[1], (float)x.sums[1], out);
        }
    } else {
        out = __fmul_rn(w.scale[0], (float)(sums[0] + sums[1] - F::BIAS * x.sums[0]));
        if constexpr (F::MINIMA) out = fmaf(w.minimum[0], (float)x.sums[0], out);
    }
    return fmaf(x.scale, out, total);
}

// What the warps of a block of threads tell each other.
template <int T> struct Results {
    float begun[WARPS][2][T]; // the sums of a pair that an earlier warp began
    int begun_pair[WARPS];    // which, or -1
};

// `shared` has the rings and, behind them, room for 2 T results of each pair of the run. `prepare` makes
// what `at(t, block)` gives: the activations of row t of the tile; `factor(t)` multiplies what they gave.
template <class F, int T, class Prepare, class At, class Factor>
__device__ __forceinline__ void product(const Parts &parts, const Epilogue &end, char *shared,
                                        uint32_t first_row, uint32_t n_rows, Prepare prepare, At at,
                                        Factor factor) {
    __shared__ Results<T> results;
    const uint32_t warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const Ring<F> ring(shared);
    float *sums = (float *)(shared + WARPS * DEPTH * Ring<F>::PAIR_BYTES); // (pairs, 2, T)
    const uint32_t n_blocks = parts.each[0].weight.columns / 32;
    const uint32_t chunks_of_row = (n_blocks + LANES - 1) / LANES;
    const uint32_t start = (uint32_t)((uint64_t)parts.n_pairs * blockIdx.x / gridDim.x);
    const uint32_t stop = (uint32_t)((uint64_t)parts.n_pairs * (blockIdx.x + 1) / gridDim.x);
    const uint32_t n_local = stop - start, n_chunks = n_local * chunks_of_row;
    const uint32_t from = n_chunks * warp / WARPS, to = n_chunks * (warp + 1) / WARPS;

    uint32_t asked_pair = from / chunks_of_row, asked_chunk = from % chunks_of_row, n_left = to - from;
    Pair asked(parts, start + asked_pair);
    auto ask = [&](int slot) {
        if (n_left > 0) {
            const uint32_t k = asked_chunk * LANES, n = min(LANES, n_blocks - k);
            ring.ask(slot, 0, parts.each[asked.part].weight, asked.first, k, n);
            ring.ask(slot, 1, parts.each[asked.of_second].weight, asked.second, k, n);
            n_left--;
            if (++asked_chunk == chunks_of_row) {
                asked_chunk = 0, asked_pair++;
                if (n_left > 0) asked = Pair(parts, start + asked_pair);
            }
        }
        end_of_chunk();
    };
#pragma unroll 1
    for (int slot = 0; slot < DEPTH - 1; slot++) ask(slot);
    // What the first of this thread's outputs is added to is asked for before it is needed.
    const bool adds = T == 1 && end.finish == ADD && !parts.paired;
    auto old_place = [&](uint32_t i) {
        const Pair rows(parts, start + i / 2);
        return end.place_of(parts.each[rows.part], first_row, i % 2 == 0 ? rows.first : rows.second);
    };
    const float *first_place = adds && threadIdx.x < n_local * 2 ? old_place(threadIdx.x) : nullptr;
    begin(); // Weights are there at any time; all else comes from the kernels before.
    const float first_old = first_place ? *first_place : 0;
    prepare();
    if (lane == 0) results.begun_pair[warp] = -1;
    __syncthreads();

    uint32_t pair = from / chunks_of_row, chunk = from % chunks_of_row;
    bool whole = chunk == 0; // whether this warp began the pair
    float totals[2][T] = {};
    auto close = [&] {
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int t = 0; t < T; t++) {
                const float total = warp_sum(totals[r][t]);
                if (lane == 0) *(whole ? &sums[(2 * pair + r) * T + t] : &results.begun[warp][r][t]) = total;
                totals[r][t] = 0;
            }
        }
        if (lane == 0 && !whole) results.begun_pair[warp] = (int)pair;
        whole = true;
    };
    const uint32_t shared_scales = parts.each[0].weight.shared;
    int slot = 0;
    for (uint32_t c = from; c < to; c++) {
        ring.wait();
        ask(slot == 0 ? DEPTH - 1 : slot - 1); // Into the place of the chunks before.
        const uint32_t block = chunk * LANES + lane;
        if (block < n_blocks) {
            uint32_t q[2][8];
            Affine scales[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                Raw<F> raw;
                ring.read(slot, r, shared_scales, raw);
                codes(raw, q[r]);
                scales[r] = affine(raw);
            }
#pragma unroll
            for (int t = 0; t < T; t++) {
                const Activations<F> x = at(t, block);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    totals[r][t] = block_product<F>(q[r], scales[r], x, totals[r][t]);
                }
            }
        }
        slot = slot == DEPTH - 1 ? 0 : slot + 1;
        const bool is_last = ++chunk == chunks_of_row;
        if (is_last || c + 1 == to) close();
        if (is_last) chunk = 0, pair++;
    }
    __syncthreads();

    auto total = [&](uint32_t pair, int r, int t) {
        float sum = sums[(2 * pair + r) * T + t];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (results.begun_pair[w] == (int)pair) sum += results.begun[w][r][t];
        }
        return T == 1 ? sum : factor(t) * sum;
    };
    // What differs between the ways to end comes last, behind one copy of the sums.
    const bool at_once = parts.paired || end.finish == PLACE;
    const float of_all = T == 1 && threadIdx.x < n_local * 2 ? factor(0) : 1.0f;
    for (uint32_t i = threadIdx.x; i < n_local * 2 * T; i += WARPS * LANES) {
        const uint32_t pair = i / (2 * T);
        const int r = i / T % 2, t = i % T;
        if (first_row + t >= n_rows) continue;
        if (at_once && r == 1) continue;
        const Pair rows(parts, start + pair);
        const Part &part = parts.each[rows.part];
        const float sum = of_all * total(pair, r, t), next = at_once ? of_all * total(pair, 1, t) : 0;
        if (parts.paired) {
            end.put_gated(part, first_row + t, rows.first, sum, next);
        } else if (end.finish == PLACE) {
            end.place(part, first_row + t, rows.first, sum, next);
        } else if (r == 0 || rows.second > rows.first) {
            const uint32_t n = r == 0 ? rows.first : rows.second;
            const bool is_there = adds && i < WARPS * LANES;
            const float old = is_there ? first_old : end.finish == ADD ? *end.place_of(part, first_row + t, n) : 0;
            end.put(part, first_row + t, n, sum, old);
        }
    }
}

// One row, which every block of threads rounds for itself while its weights are coming.
template <class F>
__device__ __forceinline__ void linear_one(const Parts &parts, const Row &row, const Epilogue &end) {
    extern __shared__ uint4 shared[];
    __shared__ Inverse inverse;
    const uint32_t width = parts.each[0].weight.columns, n_blocks = width / 32;
    const Rounded<F> rounded(shared, n_blocks);
    prefetch(row, width);
    product<F, 1>(
        parts, end, (char *)shared + rounded.bytes(n_blocks), 0, 1,
        [&] { inverse.share(rounded.fill(row)); },
        [&](int, uint32_t block) { return rounded.at(block); },
        [&](int) { return inverse.value(row, width); });
}

// T of `n_rows` rows, rounded before.
template <class F, int T>
__device__ __forceinline__ void linear_tile(const Parts &parts, const Quantised &x, const Epilogue &end,
                                            uint32_t n_rows) {
    extern __shared__ uint4 shared[];
    const uint32_t n_blocks = parts.each[0].weight.columns / 32, first_row = blockIdx.y * T;
    product<F, T>(
        parts, end, (char *)shared, first_row, n_rows, [] {},
        [&](int t, uint32_t block) {
            const uint32_t row = min(first_row + t, n_rows - 1);
            return x.at<F>((size_t)row * n_blocks + block);
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
#define ROUNDED(name, F)                                                                           \
    EXTERN THREADS void linear_##name##_1(const __grid_constant__ Parts parts, Row row,            \
                                          Epilogue end) {                                          \
        linear_one<F>(parts, row, end);                                                            \
    }                                                                                              \
    EXTERN THREADS void linear_##name##_8(const __grid_constant__ Parts parts, Quantised x,        \
                                          Epilogue end, uint32_t n) {                              \
        linear_tile<F, 8>(parts, x, end, n);                                                       \
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
#define FORMAT(name, F) ROUNDED(name, F) F32(name, F, 1) F32(name, F, 8)
EACH_FORMAT(FORMAT)
FLOAT(f32, float, 1) FLOAT(f32, float, 8)
FLOAT(f16, __half, 1) FLOAT(f16, __half, 8)
FLOAT(bf16, __nv_bfloat16, 1) FLOAT(bf16, __nv_bfloat16, 8)
