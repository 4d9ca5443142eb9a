// Products of hundreds of rows on Hopper's tensor cores, which take both operands from shared memory
// (`wgmma`). The weights are written out as halves first: for so many rows that costs a tenth of the
// product, and what is read then comes with a single copy a tile.
//
// A block of threads stays on its multiprocessor and takes tiles of 128 rows by 256 outputs in turn. One
// of its threads keeps asking for the columns to come, of the next tile too; two groups of four warps
// have 64 rows each.
#include "common.cuh"
#include "epilogue.cuh"
#include "halves.cuh"

// The weights of `n_outputs` rows of all parts from row `first` on, as tiles; a thread has a block of 32.
template <class F>
__device__ __forceinline__ void unpack(const Parts &parts, char *to, uint32_t first, uint32_t n_outputs) {
    begin();
    const uint32_t columns = parts.each[0].weight.columns, n_blocks = columns / 32;
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t output = at / n_blocks, k = at % n_blocks;
    if (output >= n_outputs) return;
    const Where place = where(parts, first + output);
    Raw<F> raw;
    load(parts.each[place.part].weight, place.row, k, raw);
    uint4 chunks[4];
    weights(raw, chunks);
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) *(uint4 *)(to + Tile::at(output, 4 * k + i, columns)) = chunks[i];
}

#define UNPACK(name, F)                                                                            \
    EXTERN __launch_bounds__(256) void unpack_##name(const __grid_constant__ Parts parts, char *to, \
                                                     uint32_t first, uint32_t n_outputs) {         \
        unpack<F>(parts, to, first, n_outputs);                                                    \
    }
EACH_FORMAT(UNPACK)

// Outputs of a tile, and steps of 64 columns on their way; `src/linear.rs` has the same.
#define TILE_N 256
#define STAGES 4
// Warps that compute.
#define CONSUMERS 8
// What a step takes: a tile of rows and two of weights.
#define STEP_BYTES (3 * Tile::BYTES)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Barriers in shared memory; a phase ends when all have arrived and all bytes are there.
__device__ __forceinline__ void make_barrier(uint32_t barrier, uint32_t n_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void await(uint32_t barrier, uint32_t parity) {
    uint32_t ended = 0;
    while (!ended) {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(ended)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    }
}

// Copies a tile to shared memory and tells the barrier.
__device__ __forceinline__ void copy_tile(uint32_t to, const char *from, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                     "r"(to), "l"(from), "r"(Tile::BYTES), "r"(barrier)
                 : "memory");
}

// What tensor cores are told of an operand in tiles: groups of eight rows are 1,024 bytes apart.
__device__ __forceinline__ uint64_t operand(uint32_t at) {
    return (uint64_t)(at >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

#define SUMS_8(i)                                                                                  \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)

// d (64, 256) = a (64, 16) b (256, 16)^T, added to what was there if `more`.
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b, uint32_t more) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127},"
        " %128, %129, p, 1, 1, 0, 0;\n}"
        : SUMS_32(0), SUMS_32(32), SUMS_32(64), SUMS_32(96)
        : "l"(a), "l"(b), "r"(more));
}

// Keeps the compiler from moving what touches the sums.
__device__ __forceinline__ void fence(float (&d)[128]) {
#pragma unroll
    for (int i = 0; i < 128; i++) asm volatile("" : "+f"(d[i])::"memory");
}
#endif

// Tiles of 128 rows of `x` and 256 of the `n_outputs` outputs from `first` on, whose weights are `w`.
template <Finish FINISH, bool PAIRED>
__device__ __forceinline__ void matmul_tiles(const Parts &parts, const char *w, const Halves &x,
                                             const Epilogue &end, uint32_t n_rows, uint32_t first,
                                             uint32_t n_outputs) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint4 shared[];
    __shared__ uint64_t barriers[2 * STAGES];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t n_steps = parts.each[0].weight.columns / Tile::COLUMNS;
    const uint32_t n_down = (n_rows + Tile::ROWS - 1) / Tile::ROWS;
    const uint32_t n_tiles = n_down * ((n_outputs + TILE_N - 1) / TILE_N);
    const uint32_t stages = ((uint32_t)__cvta_generic_to_shared(shared) + 1023) / 1024 * 1024;
    const uint32_t full = (uint32_t)__cvta_generic_to_shared(barriers), empty = full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) make_barrier(full + 8 * i, 1), make_barrier(empty + 8 * i, CONSUMERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    begin();
    uint32_t slot = 0, phase = 0;
    auto advance = [&] {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    };
    if (warp >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x != 32 * CONSUMERS) return;
        // What kernels before wrote is read by another unit than theirs.
        asm volatile("fence.proxy.async;" ::: "memory");
        for (uint32_t tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
            const size_t run = (size_t)n_steps * Tile::BYTES;
            const char *rows = (const char *)x.values + tile % n_down * run;
            const char *outputs = w + tile / n_down * (TILE_N / Tile::ROWS) * run;
            for (uint32_t step = 0; step < n_steps; step++) {
                await(empty + 8 * slot, phase ^ 1); // The first time round it is.
                const uint32_t to = stages + slot * STEP_BYTES, told = full + 8 * slot;
                const size_t at = (size_t)step * Tile::BYTES;
                arrive_and_expect(told, STEP_BYTES);
                copy_tile(to, rows + at, told);
                copy_tile(to + Tile::BYTES, outputs + at, told);
                copy_tile(to + 2 * Tile::BYTES, outputs + run + at, told);
                advance();
            }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const uint32_t group = warp / 4;
    for (uint32_t tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
        float sums[128];
        uint32_t before = 0;
        for (uint32_t step = 0; step < n_steps; step++) {
            await(full + 8 * slot, phase);
            const uint32_t at = stages + slot * STEP_BYTES;
            const uint64_t a = operand(at + group * (Tile::BYTES / 2)), b = operand(at + Tile::BYTES);
            fence(sums);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (uint32_t k = 0; k < Tile::COLUMNS / 16; k++) wgmma(sums, a + 2 * k, b + 2 * k, step + k);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            fence(sums);
            // The step before has been read.
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (step > 0 && lane == 0) arrive(empty + 8 * before);
            before = slot;
            advance();
        }
        fence(sums);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        fence(sums);
        if (lane == 0) arrive(empty + 8 * before);
        const uint32_t row = tile % n_down * Tile::ROWS + 16 * warp + lane / 4;
        const uint32_t output = tile / n_down * TILE_N + 2 * (lane % 4);
        const float factors[2] = {x.factors[min(row, n_rows - 1)], x.factors[min(row + 8, n_rows - 1)]};
#pragma unroll
        for (uint32_t j = 0; j < TILE_N / 8; j++) {
            if (output + 8 * j >= n_outputs) break;
            const Where place = where(parts, first + output + 8 * j);
            const Part &part = parts.each[place.part];
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                const float low = factors[i] * sums[4 * j + 2 * i], high = factors[i] * sums[4 * j + 2 * i + 1];
                if (row + 8 * i >= n_rows) continue;
                if constexpr (PAIRED) {
                    end.put_gated<FINISH>(parts.each[0], row + 8 * i, place.row, low, high);
                } else {
                    end.put_pair<FINISH>(part, row + 8 * i, place.row, low, high);
                }
            }
        }
    }
#endif
}

#define MATMUL(name, FINISH, PAIRED)                                                               \
    EXTERN __launch_bounds__(32 * (CONSUMERS + 4), 1) void matmul_tiles_##name(                    \
        const __grid_constant__ Parts parts, const char *w, Halves x, Epilogue end, uint32_t n_rows, \
        uint32_t first, uint32_t n_outputs) {                                                      \
        matmul_tiles<FINISH, PAIRED>(parts, w, x, end, n_rows, first, n_outputs);                  \
    }
MATMUL(store, STORE, false)
MATMUL(add, ADD, false)
MATMUL(silu, SILU, true)
MATMUL(gelu_tanh, GELU_TANH, true)
