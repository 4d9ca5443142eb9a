// Draws of tokens, as `kernels/src/draw.rs` defines them: from equal logits the same token to the last bit.
//
// w[n] = e^((x[n] - max) / temperature), each operation rounded once; mass = floor(w * 2^40). Sums are of
// integers, so that the order of threads does not matter. `largest` of rows.cu has run before and left each
// row's largest value, or NaN, beside its index, which is the token of a row without temperature. What is
// cut off, by top-k and top-p, is found by the bits of the weights, which order as they do: counts and masses
// in bins of their leading bits, most likely first, then of the bits behind those in the one bin where the
// cut is, and again; weights with equal bits are kept from the lowest id on.
//
// draw_weigh: several blocks a row; reads and writes the row once.
// draw_pick: one block of 1,024 threads a row; reads it once, and twice more for each of top-k and top-p.
#include "common.cuh"
#include "found.cuh"

// `src/draw.rs` has the same fields in the same order.
struct Draw {
    uint64_t numerator; // of 2^53
    uint64_t share;     // of 2^32: what top-p keeps
    float temperature;
    uint32_t top_k; // 0: all
    uint32_t least; // bits of the least weight that min-p keeps
    uint32_t unused;
};

constexpr uint32_t LEAST = 0x2b800000; // bits of 2^-40, the least weight that has mass
constexpr uint32_t COARSE = 20;        // bits behind those that choose the first bin
constexpr uint32_t FINE = 10;          // and fewer by these each time
constexpr uint32_t N_BINS = 1 << FINE;
constexpr uint32_t N_COARSE = ((0x3f800000 - LEAST) >> COARSE) + 1; // up to 1.0; `src/draw.rs` knows it
constexpr uint32_t N_PARTS = 4, PART_BITS = 11;

struct Sum {
    uint64_t mass;
    uint32_t count;
};

__device__ __forceinline__ Sum operator+(Sum a, Sum b) { return {a.mass + b.mass, a.count + b.count}; }
__device__ __forceinline__ Sum operator-(Sum a, Sum b) { return {a.mass - b.mass, a.count - b.count}; }

// Counts and masses of bins, in shared memory, which adds words of 32 bits alone at full speed: a mass of 41
// bits is added in parts, whose sums have room for 2^21 values.
struct Tally {
    uint32_t *words; // count, then parts, (1 + N_PARTS, n_bins)
    uint32_t n_bins;

    __device__ void clear() {
        for (uint32_t i = threadIdx.x; i < (1 + N_PARTS) * n_bins; i += blockDim.x) words[i] = 0;
    }

    __device__ void add(uint32_t bin, uint64_t mass) {
        atomicAdd(&words[bin], 1);
#pragma unroll
        for (uint32_t i = 0; i < N_PARTS; i++) {
            const uint32_t part = (uint32_t)(mass >> (PART_BITS * i)) & ((1 << PART_BITS) - 1);
            if (part) atomicAdd(&words[(1 + i) * n_bins + bin], part);
        }
    }

    __device__ Sum of(uint32_t bin) const {
        Sum sum = {0, words[bin]};
#pragma unroll
        for (uint32_t i = 0; i < N_PARTS; i++) {
            sum.mass += (uint64_t)words[(1 + i) * n_bins + bin] << (PART_BITS * i);
        }
        return sum;
    }
};

// `exp_nonpositive` of kernels/src/draw.rs, in its steps: none of them may be fused with the next.
__device__ __forceinline__ float exp_nonpositive(float x) {
    const float ROUND = 12582912.0f;
    const float bounded = fmaxf(x, -87.0f);
    const float shifted = __fadd_rn(__fmul_rn(bounded, 1.44269504088896340736f), ROUND);
    const float n = __fsub_rn(shifted, ROUND);
    const float r = __fadd_rn(__fsub_rn(bounded, __fmul_rn(n, 0.693359375f)),
                              __fmul_rn(n, 2.12194440e-4f));
    float p = 1.9875691500e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
    const float power = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
    const uint32_t exponent = (__float_as_uint(shifted) - __float_as_uint(ROUND) + 127) << 23;
    return x < -87.0f ? 0.0f : __fmul_rn(power, __uint_as_float(exponent));
}

// floor(w * 2^40) of a weight from 0 to 1.
__device__ __forceinline__ uint64_t mass_of(uint32_t bits) {
    const uint64_t significand = (bits & 0x007fffff) | 0x00800000;
    return (significand << 17) >> min(127 - (bits >> 23), 63u);
}

// Whether the token of a row is still to be drawn: of one without temperature, and of one that is not
// finite, `largest` has said what there is to say.
__device__ __forceinline__ bool is_drawn(const Draw &draw, const Largest &largest) {
    return draw.temperature > 0 && !isnan(largest.value);
}

// x[t] = the weights of row t's first `limit` values, 0 where there is no mass; masses and counts
// (T, N_COARSE) get those of the bins. They are zero before.
EXTERN void draw_weigh(float *x, const Largest *out, const Draw *draws, uint64_t *masses,
                       uint32_t *counts, uint32_t width, uint32_t limit) {
    begin();
    extern __shared__ uint32_t words[];
    const uint32_t t = blockIdx.y;
    const float temperature = draws[t].temperature, max = out[t].value;
    if (!is_drawn(draws[t], out[t])) return;
    Tally tally = {words, N_COARSE};
    tally.clear();
    __syncthreads();
    float *row = x + (size_t)t * width;
    for (uint32_t n = blockIdx.x * blockDim.x + threadIdx.x; n < limit; n += gridDim.x * blockDim.x) {
        const float weight = exp_nonpositive(__fdiv_rn(__fsub_rn(row[n], max), temperature));
        const uint32_t bits = __float_as_uint(weight);
        const bool has_mass = bits >= LEAST;
        row[n] = has_mass ? weight : 0;
        if (has_mass) tally.add((bits - LEAST) >> COARSE, mass_of(bits));
    }
    __syncthreads();
    for (uint32_t bin = threadIdx.x; bin < N_COARSE; bin += blockDim.x) {
        const Sum sum = tally.of(bin);
        if (sum.count == 0) continue;
        atomicAdd((unsigned long long *)&masses[t * N_COARSE + bin], (unsigned long long)sum.mass);
        atomicAdd(&counts[t * N_COARSE + bin], sum.count);
    }
}

// Of this lane and those below it.
template <class T> __device__ __forceinline__ T up_to_lane(T x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const T below = __shfl_up_sync(0xffffffff, x, step);
        if (threadIdx.x % 32 >= step) x += below;
    }
    return x;
}

__device__ __forceinline__ Sum up_to_lane(Sum x) {
    return {up_to_lane<unsigned long long>(x.mass), up_to_lane<uint32_t>(x.count)};
}

__device__ __forceinline__ Sum of_lane(Sum x, int lane) {
    return {__shfl_sync(0xffffffff, (unsigned long long)x.mass, lane),
            __shfl_sync(0xffffffff, x.count, lane)};
}

// Of the threads in front of this one; `total`: of all 1,024.
__device__ __forceinline__ Sum before_thread(Sum own, Sum &total) {
    __shared__ Sum of_warps[32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Sum up_to = up_to_lane(own);
    if (lane == 31) of_warps[warp] = up_to;
    __syncthreads();
    const Sum of_warp = of_warps[lane], up_to_warp = up_to_lane(of_warp);
    total = of_lane(up_to_warp, 31);
    const Sum before = of_lane(up_to_warp - of_warp, warp) + (up_to - own);
    __syncthreads();
    return before;
}

// How many of the most likely are wanted, or how much of their mass.
struct Wanted {
    bool is_mass;
    uint64_t amount;

    __device__ uint64_t of(const Sum &sum) const { return is_mass ? sum.mass : sum.count; }
};

// The bin in which what is wanted is reached, where thread i has bin N_BINS - 1 - i; `above` is what is
// above all bins, and then above that one.
__device__ __forceinline__ uint32_t reached(const Wanted &wanted, Sum own, Sum &above) {
    __shared__ uint32_t bin;
    __shared__ Sum above_bin;
    Sum total;
    const Sum front = above + before_thread(own, total);
    if (wanted.of(front) < wanted.amount && wanted.amount <= wanted.of(front + own)) {
        bin = N_BINS - 1 - threadIdx.x;
        above_bin = front;
    }
    __syncthreads();
    const uint32_t found = bin;
    above = above_bin;
    __syncthreads();
    return found;
}

// What is kept: weights above these bits, and of those that equal them the first by id.
struct Cut {
    uint32_t bits;
    uint32_t n_equal;
    Sum above; // of the weights above

    __device__ uint64_t mass() const { return above.mass + n_equal * mass_of(bits); }
};

// Where what is wanted is reached, in a row whose coarse bins are `coarse`, one a thread as above.
__device__ __forceinline__ Cut cut(const float *row, uint32_t limit, uint32_t *words, Sum coarse,
                                   const Wanted &wanted) {
    Tally tally = {words, N_BINS};
    Sum above = {0, 0};
    uint32_t low = LEAST + (reached(wanted, coarse, above) << COARSE);
    for (int shift = COARSE - FINE; shift >= 0; shift -= FINE) {
        tally.clear();
        __syncthreads();
        for (uint32_t n = threadIdx.x; n < limit; n += blockDim.x) {
            const uint32_t bits = __float_as_uint(row[n]), place = (bits - low) >> shift;
            if (bits >= low && place < N_BINS) tally.add(place, mass_of(bits));
        }
        __syncthreads();
        low += reached(wanted, tally.of(N_BINS - 1 - threadIdx.x), above) << shift;
    }
    const uint64_t left = wanted.amount - wanted.of(above);
    const uint64_t each = wanted.is_mass ? mass_of(low) : 1;
    return {low, (uint32_t)((left + each - 1) / each), above};
}

// ceil(share * total / 2^32); share is at most 2^32.
__device__ __forceinline__ uint64_t part_of(uint64_t share, uint64_t total) {
    const uint64_t low = share * total, rounded = low + 0xffffffff;
    const uint64_t high = __umul64hi(share, total) + (rounded < low);
    return (high << 32) | (rounded >> 32);
}

// Where the token is looked for: behind what is kept of smaller ids.
struct Place {
    uint64_t left;    // mass between there and the draw
    uint32_t n_equal; // of the weights that equal the cut, so many are still kept
};

// Lane i has the mass above the cut of part i, and the count of what equals it. Returns the part on whose
// mass the draw falls, and moves the place to it. The draw is known, or it is `numerator` of the total.
__device__ __forceinline__ uint32_t part_with(Sum own, uint64_t each, Place &place, bool is_known,
                                              uint64_t numerator) {
    const uint32_t n_before = up_to_lane<uint32_t>(own.count) - own.count;
    const uint32_t n_kept = n_before < place.n_equal ? min(place.n_equal - n_before, own.count) : 0;
    const uint64_t mass = own.mass + n_kept * each;
    const uint64_t up_to = up_to_lane<unsigned long long>(mass);
    if (!is_known) {
        const uint64_t total = __shfl_sync(0xffffffff, (unsigned long long)up_to, 31);
        place.left = (__umul64hi(numerator, total) << 11) | ((numerator * total) >> 53);
    }
    const uint32_t part = __ffs(__ballot_sync(0xffffffff, place.left < up_to)) - 1;
    place.left -= __shfl_sync(0xffffffff, (unsigned long long)(up_to - mass), part);
    place.n_equal -= min(__shfl_sync(0xffffffff, n_before, part), place.n_equal);
    return part;
}

// What of the weights `first`.. `end` is above the cut, and how many equal it, in all lanes of the warp.
__device__ __forceinline__ Sum kept(const float *row, uint32_t first, uint32_t end, uint32_t cut_bits) {
    Sum sum = {0, 0};
#pragma unroll 4
    for (uint32_t n = first + threadIdx.x % 32; n < end; n += 32) {
        const uint32_t bits = __float_as_uint(row[n]);
        if (bits > cut_bits) sum.mass += mass_of(bits);
        if (bits == cut_bits) sum.count++;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        sum.mass += __shfl_xor_sync(0xffffffff, (unsigned long long)sum.mass, step);
        sum.count += __shfl_xor_sync(0xffffffff, sum.count, step);
    }
    return sum;
}

// The token on which the draw falls, in the order of ids: the part of 32 in which it is, and the part of
// that, down to single ones.
__device__ __forceinline__ uint32_t chosen(const float *row, uint32_t limit, const Cut &cut,
                                           uint64_t numerator) {
    __shared__ Sum parts[32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint64_t each = mass_of(cut.bits);
    Place place = {0, cut.n_equal};
    uint32_t first = 0, len = limit;
    for (bool is_known = false; len > 32; is_known = true) {
        const uint32_t part_len = ((len + 31) / 32 + 31) / 32 * 32;
        const uint32_t start = min(warp * part_len, len), end = min(start + part_len, len);
        const Sum own = kept(row, first + start, first + end, cut.bits);
        if (lane == 0) parts[warp] = own;
        __syncthreads();
        const uint32_t part = part_with(parts[lane], each, place, is_known, numerator);
        __syncthreads();
        first += part * part_len;
        len = min(part_len, len - part * part_len);
    }
    const uint32_t bits = lane < len ? __float_as_uint(row[first + lane]) : 0;
    const Sum own = {bits > cut.bits ? mass_of(bits) : 0, bits == cut.bits && lane < len};
    return first + part_with(own, each, place, limit > 32, numerator);
}

// The tokens of the rows that `draw_weigh` weighed. Masses and counts are zero afterwards.
EXTERN void __launch_bounds__(1024)
    draw_pick(const float *x, Largest *out, Largest *seen, const Draw *draws, uint64_t *masses,
              uint32_t *counts, uint32_t width, uint32_t limit) {
    begin();
    extern __shared__ uint32_t words[];
    const uint32_t t = blockIdx.x, bin = N_BINS - 1 - threadIdx.x;
    const Draw draw = draws[t];
    if (!is_drawn(draw, out[t])) return;
    const float *row = x + (size_t)t * width;
    Sum coarse = {0, 0};
    if (bin < N_COARSE) {
        coarse = {masses[t * N_COARSE + bin], counts[t * N_COARSE + bin]};
        masses[t * N_COARSE + bin] = 0, counts[t * N_COARSE + bin] = 0;
    }
    Sum total;
    before_thread(coarse, total);
    Cut left = {0, 0, total};
    if (draw.top_k > 0 && draw.top_k < total.count) {
        left = cut(row, limit, words, coarse, {false, draw.top_k});
    }
    if (draw.share < 1ull << 32) {
        left = cut(row, limit, words, coarse, {true, part_of(draw.share, left.mass())});
    }
    // All that equal the least are kept: none equals what is one below.
    if (left.bits < draw.least) left.bits = draw.least - 1, left.n_equal = 0;
    const uint32_t index = chosen(row, limit, left, draw.numerator);
    if (threadIdx.x == 0) out[t].index = index, seen[t].index = index;
}
