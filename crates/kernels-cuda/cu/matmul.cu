// Products of several rows on tensor cores: weights and activations as halves, sums in f32.
//
// `matmul_few` streams the weights as decode does: a block of threads has some outputs and its warps take
// turns with the chunks of their columns. `matmul_many` is compute-bound: tiles of rows by outputs. For
// hundreds of rows on Hopper see `tiles.cu`.
#include "common.cuh"
#include "epilogue.cuh"
#include "copy.cuh"
#include "halves.cuh"
#include "row.cuh"
#include "tensor.cuh"

// x (T, K), each row through an RMS norm if there is one; one block of threads a row.
EXTERN void halve(Row row, Halves out, uint32_t width) {
    begin();
    __shared__ uint32_t most;
    const float *x = row.x + (size_t)blockIdx.x * width;
    if (threadIdx.x == 0) most = 0;
    __syncthreads();
    float squares = 0;
    uint32_t bits = 0; // As integers, which puts a NaN after infinity.
    for (uint32_t c = threadIdx.x; c < width; c += blockDim.x) {
        squares = fmaf(x[c], x[c], squares);
        const float value = row.norm ? x[c] * row.norm[c] : x[c];
        bits = max(bits, __float_as_uint(fabsf(value)));
    }
    bits = __reduce_max_sync(0xffffffff, bits);
    if (threadIdx.x % 32 == 0) atomicMax(&most, bits);
    const float sum = block_sum(squares);
    __syncthreads();
    const float largest = __uint_as_float(most);
    const bool finite = largest < INFINITY;
    // The power of two above the largest: denormals stay what they are.
    const int exponent = max((int)(most >> 23) - 126, -125);
    const float down = finite ? ldexpf(1.0f, -exponent) : 0;
    const float inverse = row.norm ? 1.0f / sqrtf(sum / (float)width + row.eps) : 1.0f;
    for (uint32_t c = 2 * threadIdx.x; c < width; c += 2 * blockDim.x) {
        float2 pair = *(const float2 *)(x + c);
        if (row.norm) pair.x *= row.norm[c], pair.y *= row.norm[c + 1];
        const __half2 scaled = __floats2half2_rn(pair.x * down, pair.y * down);
        *out.at(blockIdx.x, c, width) = finite ? scaled : __half2half2(__float2half(0.0f));
    }
    if (threadIdx.x == 0) out.factors[blockIdx.x] = finite ? inverse * ldexpf(1.0f, exponent) : NAN;
}

// What a block of 32 weights for each lane of a warp takes in a ring. Each lane reads what it asked for, so
// that nobody waits for another.
template <class F> struct Column {
    static constexpr int LOW = F::LOW / 4, HIGH_AT = 512 * LOW, SCALES_AT = HIGH_AT + 128 * F::HIGH;
    static constexpr int SUPERS_AT = SCALES_AT + 128, BYTES = SUPERS_AT + (F::SUPERS ? 128 : 0);

    // Asks for block k of a row; `end_of_chunk` must follow.
    static __device__ __forceinline__ void ask(uint32_t to, const Planes &w, uint32_t row, uint32_t k) {
        const uint32_t lane = threadIdx.x % 32;
        const size_t block = (size_t)row * (w.columns / 32) + k;
#pragma unroll
        for (int i = 0; i < LOW; i++) {
            copy_16(to + (i * 32 + lane) * 16, w.low + (block * LOW + i) * 16);
        }
        if constexpr (F::HIGH == 1) copy_4(to + HIGH_AT + lane * 4, w.high + block);
        if constexpr (F::HIGH == 2) copy_8(to + HIGH_AT + lane * 8, w.high + 2 * block);
        // The word that has the entry.
        const uint32_t entry = (k >> w.shared) * F::SCALE_BYTES;
        copy_4(to + SCALES_AT + lane * 4, w.scales_of(row) + entry / 4 * 4);
        if constexpr (F::SUPERS) copy_4(to + SUPERS_AT + lane * 4, w.supers + block / 8);
    }

    static __device__ __forceinline__ void read(const char *at, const Planes &w, uint32_t k, Raw<F> &raw) {
        const uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < LOW; i++) raw.low[i] = ((const uint4 *)at)[i * 32 + lane];
#pragma unroll
        for (int i = 0; i < F::HIGH; i++) raw.high[i] = ((const uint32_t *)(at + HIGH_AT))[F::HIGH * lane + i];
        const uint32_t entry = (k >> w.shared) * F::SCALE_BYTES;
        raw.scales = scale_entry<F>((const uint8_t *)at + SCALES_AT + lane * 4 + entry % 4);
        if constexpr (F::SUPERS) raw.super = ((const __half2 *)(at + SUPERS_AT))[lane];
    }
};

// Outputs of a block of threads of `matmul_few` that takes N tiles of eight rows: as many as its registers
// allow. `src/layout.rs` has the same.
#define FEW_TILES(N) (N < 8 ? 2 : 1)

// N tiles of eight rows of activations, and M of sixteen outputs. A lane has eight outputs' weights of one
// of the four blocks of a chunk, as they come from memory: the operands of `mma` may have their columns in
// any order, if it is the same. Step s of a chunk has columns 4s..4s + 4 of each of its blocks.
template <class F, int N, int M = FEW_TILES(N)>
__device__ __forceinline__ void matmul_few(const Parts &parts, const Halves &x, const Epilogue &end,
                                           uint32_t n_rows) {
    extern __shared__ uint4 shared[];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
    const uint32_t n_blocks = parts.each[0].weight.columns / 32, n_chunks = (n_blocks + 3) / 4;
    const uint32_t first = lane / 4, own = lane % 4;
    constexpr uint32_t OUTPUTS = 16 * M, CHUNK_BYTES = 2 * M * Column<F>::BYTES;
    // An output beyond the last one reads that again.
    const uint32_t n_outputs = parts.n_outputs, first_output = blockIdx.x * OUTPUTS;
    Where places[2 * M];
#pragma unroll
    for (int r = 0; r < 2 * M; r++) places[r] = where(parts, min(first_output + first + 8 * r, n_outputs - 1));
    const char *ring = (char *)shared + warp * DEPTH * CHUNK_BYTES;
    const uint32_t ring_at = (uint32_t)__cvta_generic_to_shared(ring);
    uint32_t asked = warp;
    auto ask = [&](int slot) {
        const uint32_t k = 4 * asked + own;
        if (k < n_blocks) {
#pragma unroll
            for (int r = 0; r < 2 * M; r++) {
                const uint32_t to = ring_at + slot * CHUNK_BYTES + r * Column<F>::BYTES;
                Column<F>::ask(to, parts.each[places[r].part].weight, places[r].row, k);
            }
        }
        asked += n_warps;
        end_of_chunk();
    };
#pragma unroll
    for (int slot = 0; slot < DEPTH - 1; slot++) ask(slot);
    begin();
    // Behind the last column there may be anything, and behind the last tile of rows no memory.
    auto b_of = [&](uint32_t chunk, int n, int i) {
        const uint4 *at = (const uint4 *)x.values + (((size_t)n * n_chunks + chunk) * 4 + i) * 32 + lane;
        return 4 * chunk + own < n_blocks ? *at : uint4{0, 0, 0, 0};
    };
    const auto has_rows = [&](int n) { return n == 0 || 8 * n < n_rows; };
    // Of one tile of rows those to come are on their way, too.
    uint4 next[4] = {};
    auto fetch = [&](uint32_t chunk) {
#pragma unroll
        for (int i = 0; i < 4; i++) next[i] = b_of(chunk, 0, i);
    };
    if constexpr (N == 1) fetch(warp);
    float sums[M][N][4] = {};
    int slot = 0;
    for (uint32_t chunk = warp; chunk < n_chunks; chunk += n_warps) {
        const uint32_t k = 4 * chunk + own;
        uint4 b[4];
        if constexpr (N == 1) {
#pragma unroll
            for (int i = 0; i < 4; i++) b[i] = next[i];
            fetch(chunk + n_warps);
        }
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory");
        ask(slot == 0 ? DEPTH - 1 : slot - 1); // Into the place of the chunk before.
        const char *at = ring + slot * CHUNK_BYTES;
        slot = slot == DEPTH - 1 ? 0 : slot + 1;
#pragma unroll
        for (int m = 0; m < M; m++) {
            uint4 halves[2][4] = {};
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (k >= n_blocks) continue;
                const Planes &w = parts.each[places[2 * m + r].part].weight;
                Raw<F> raw;
                Column<F>::read(at + (2 * m + r) * Column<F>::BYTES, w, k, raw);
                weights(raw, halves[r]);
            }
            const uint4 (&low)[4] = halves[0], (&high)[4] = halves[1];
#pragma unroll
            for (int n = 0; n < N; n++) {
                if (!has_rows(n)) break;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if constexpr (N > 1) b[i] = b_of(chunk, n, i);
                    mma(sums[m][n], {low[i].x, high[i].x, low[i].y, high[i].y}, b[i].x, b[i].y);
                    mma(sums[m][n], {low[i].z, high[i].z, low[i].w, high[i].w}, b[i].z, b[i].w);
                }
            }
        }
    }
    // Where the rings were.
    __syncthreads();
    float *sums_of_warps = (float *)shared;
    // (warps, 8 N, OUTPUTS), padded so that what a warp stores lies in different banks.
    constexpr uint32_t WIDTH = OUTPUTS + 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t row = warp * 8 * N + 8 * n + 2 * own + i % 2;
                sums_of_warps[row * WIDTH + 16 * m + first + 8 * (i / 2)] = sums[m][n][i];
            }
        }
    }
    __syncthreads();
    auto total = [&](uint32_t row, uint32_t n) {
        float sum = 0;
        for (uint32_t v = 0; v < n_warps; v++) sum += sums_of_warps[(v * 8 * N + row) * WIDTH + n];
        return x.factors[row] * sum;
    };
    const uint32_t step = parts.paired || end.finish == PLACE ? 2 : 1, n_sums = OUTPUTS / step;
    for (uint32_t i = threadIdx.x; i < n_rows * n_sums; i += blockDim.x) {
        const uint32_t row = i / n_sums, n = i % n_sums * step;
        if (first_output + n >= n_outputs) continue;
        const Where place = where(parts, first_output + n);
        if (parts.paired) {
            end.put_gated(parts.each[0], row, place.row, total(row, n), total(row, n + 1));
        } else if (end.finish == PLACE) {
            end.place(parts.each[place.part], row, place.row, total(row, n), total(row, n + 1));
        } else {
            end.put(parts.each[place.part], row, place.row, total(row, n));
        }
    }
}

// Rows of activations and outputs of a tile, and columns of a step.
#define TILE_T 128
#define TILE_N 128
#define TILE_K 64
// Steps of activations on their way.
#define STAGES 3
// Bytes of a row of a step in shared memory.
#define ROW_64 144

// A tile: warps have 64 rows and 32 outputs each. `first` is the tile's first output.
template <class F>
__device__ __forceinline__ void matmul_many(const Parts &parts, const Halves &x, const Epilogue &end,
                                            uint32_t n_rows) {
    extern __shared__ uint4 shared[];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t K = parts.each[0].weight.columns, n_blocks = K / 32;
    const uint32_t n_steps = (K + TILE_K - 1) / TILE_K;
    const uint32_t n_outputs = parts.n_outputs;
    const uint32_t first_row = blockIdx.x * TILE_T, first_output = blockIdx.y * TILE_N;
    char *x_tiles = (char *)shared, *w_tiles = x_tiles + STAGES * TILE_T * ROW_64;
    const uint32_t x_at = (uint32_t)__cvta_generic_to_shared(x_tiles);
    const uint32_t w_at = (uint32_t)__cvta_generic_to_shared(w_tiles);
    // This thread's block of the weights of a step.
    const uint32_t w_row = threadIdx.x / 2, w_block = threadIdx.x % 2;
    const Where place = where(parts, min(first_output + w_row, n_outputs - 1));
    const Planes &w = parts.each[place.part].weight;

    auto ask = [&](uint32_t step) {
        if (step < n_steps) {
#pragma unroll
            for (int i = 0; i < TILE_T * TILE_K / 8 / 256; i++) {
                const uint32_t at = threadIdx.x + 256 * i, row = at / 8, part = at % 8;
                const uint32_t from = min(first_row + row, n_rows - 1), k = step * TILE_K + 8 * part;
                const uint32_t to = x_at + (step % STAGES * TILE_T + row) * ROW_64 + part * 16;
                if (k < K) copy_16(to, x.values + (size_t)from * K + k);
            }
        }
        end_of_chunk();
    };
    auto fetch = [&](uint32_t step, Raw<F> &raw) {
        const uint32_t k = 2 * step + w_block;
        if (k < n_blocks) load(w, place.row, k, raw);
    };
    auto unpack = [&](uint32_t step, const Raw<F> &raw) {
        uint4 *to = (uint4 *)(w_tiles + (step % 2 * TILE_N + w_row) * ROW_64 + w_block * 64);
        if (2 * step + w_block < n_blocks) {
            weights(raw, to);
        } else {
            for (int i = 0; i < 4; i++) to[i] = {0, 0, 0, 0};
        }
    };
    Raw<F> next;
    fetch(0, next);
    begin();
    // What lies behind the last column meets zeros, and must be a number.
    for (uint32_t i = threadIdx.x; i < STAGES * TILE_T * ROW_64 / 16; i += 256) shared[i] = {0, 0, 0, 0};
    __syncthreads();
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) ask(step);
    unpack(0, next);
    fetch(1, next);
    float sums[4][4][4] = {};
    const uint32_t row_of_warp = warp / 4 * 64, output_of_warp = warp % 4 * 32;
    for (uint32_t step = 0; step < n_steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
        ask(step + STAGES - 1);
        if (step + 1 < n_steps) {
            unpack(step + 1, next);
            if (step + 2 < n_steps) fetch(step + 2, next);
        }
        const uint32_t x_tile = x_at + step % STAGES * TILE_T * ROW_64;
        const uint32_t w_tile = w_at + step % 2 * TILE_N * ROW_64;
#pragma unroll
        for (int k = 0; k < TILE_K / 16; k++) {
            uint32_t a[4][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 4; m++) {
                matrices(a[m], x_tile + (row_of_warp + 16 * m + lane % 16) * ROW_64 + k * 32 + lane / 16 * 16);
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const uint32_t output = output_of_warp + 16 * n + lane / 16 * 8 + lane % 8;
                matrices(b[n], w_tile + output * ROW_64 + k * 32 + lane / 8 % 2 * 16);
            }
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int n = 0; n < 4; n++) mma(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
        }
    }
    const uint32_t first = lane / 4, pair = 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t row = first_row + row_of_warp + 16 * m + first + 8 * i;
            if (row >= n_rows) continue;
            const float factor = x.factors[row];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const uint32_t output = first_output + output_of_warp + 8 * n + pair;
                const float low = factor * sums[m][n][2 * i], high = factor * sums[m][n][2 * i + 1];
                if (output >= n_outputs) continue;
                const Where place = where(parts, output);
                if (parts.paired) {
                    end.put_gated(parts.each[0], row, place.row, low, high);
                    continue;
                }
                end.put(parts.each[place.part], row, place.row, low);
                if (output + 1 >= n_outputs) continue;
                const Where second = where(parts, output + 1);
                end.put(parts.each[second.part], row, second.row, high);
            }
        }
    }
}

#define FEW(name, F, N)                                                                            \
    EXTERN __launch_bounds__(512, 1) void matmul_few_##name##_##N(                                 \
        const __grid_constant__ Parts parts, Halves x, Epilogue end, uint32_t n_rows) {            \
        matmul_few<F, N>(parts, x, end, n_rows);                                                   \
    }
#define FORMAT(name, F)                                                                            \
    FEW(name, F, 1) FEW(name, F, 2) FEW(name, F, 4) FEW(name, F, 8)                                \
    EXTERN __launch_bounds__(256, 2) void matmul_many_##name(                               \
        const __grid_constant__ Parts parts, Halves x, Epilogue end, uint32_t n_rows) {            \
        matmul_many<F>(parts, x, end, n_rows);                                                     \
    }
EACH_FORMAT(FORMAT)
