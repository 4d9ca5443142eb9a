//! Attention: keys and values are streamed once, with an online softmax (Milakov and Gimelshein
//! 2018, arXiv:1805.02867).
//!
//! ```text
//! for each tile of 4 or fewer queries of one KV head (parallel)
//!   for each segment of 128 tokens (parallel where there are few queries)
//!     for each 16 tokens
//!       scores = cap(scale * K q), one lane a token     K is read once for all queries
//!       if a score exceeds the maximum so far: shrink sum and accumulators
//!       p = exp(scores - maximum); sum += p; accumulators += p V
//!   fold the segments, first to last
//!   out = accumulators / sum
//! ```
//!
//! What one query computes depends on its own position only, not on its tile, its batch or the
//! threads: the segments of a sequence are always the same, and so is the order of their sum.
#![expect(unsafe_code, reason = "threads write disjoint heads of one output")]

mod source;
mod tasks;

use crate::disjoint::MatrixBlocks;
use crate::kv::{CpuKvPool, TOKENS, padded_head};
use crate::lanes::{Kernel, Lanes};
use crate::linear::store_part;
use crate::math;
use crate::pool::Pool;
use crate::processor::Processor;
use crate::product::{ByteElement, Element, HalfElement, SingleElement};
use exrail_kernels::{AttentionShape, AttentionSpan, KvDtype, Span};
use source::{Packed, Paged, Source};
use std::marker::PhantomData;
use std::ops::Range;
use tasks::{Places, Task, Tasks};

/// Tokens of a segment.
const SEGMENT: usize = 128;

/// The queries of one span that read one KV head: query i is row `i / group`, head
/// `kv_head * group + i % group`.
#[derive(Clone, Copy)]
struct Queries<'a> {
    q: &'a [f32],
    out: MatrixBlocks<'a>,
    shape: AttentionShape,
    kv_head: usize,
    first_row: usize,
    n_rows: usize,
    visible: Visible,
}

/// How many tokens a row sees.
#[derive(Clone, Copy)]
enum Visible {
    /// All before it and itself, from this position on.
    Causal(usize),
    /// This many.
    All(usize),
}

impl<'a> Queries<'a> {
    fn group(&self) -> usize {
        self.shape.n_heads / self.shape.n_kv_heads
    }

    /// Row of the batch, head, and visible tokens of a query.
    fn locate(&self, query: usize) -> (usize, usize, Range<usize>) {
        let row = query / self.group();
        let end = match self.visible {
            Visible::Causal(first) => first + row + 1,
            Visible::All(n) => n,
        };
        let start = self.shape.window.map_or(0, |window| end.saturating_sub(window));
        (self.first_row + row, self.kv_head * self.group() + query % self.group(), start..end)
    }

    fn vector(&self, query: usize) -> &'a [f32] {
        let (row, head, _) = self.locate(query);
        let start = (row * self.shape.n_heads + head) * self.shape.head_dim;
        &self.q[start..start + self.shape.head_dim]
    }

    /// Writes the output of a query.
    ///
    /// # Safety
    /// Nobody else has this query's output.
    #[inline(always)]
    unsafe fn finish<L: Lanes>(&self, lanes: L, query: usize, total: &[[f32; 16]]) {
        let (row, head, _) = self.locate(query);
        let width = self.shape.head_dim;
        // SAFETY: rows and heads identify queries, and the caller has this one alone.
        let mut block = unsafe { self.out.block(row..row + 1, head * width..(head + 1) * width) };
        let sum = lanes.splat(lanes.sum(lanes.load(&total[1])));
        for (out, value) in block.row(row).chunks_mut(16).zip(&total[2..]) {
            store_part(lanes, lanes.div(lanes.load(value), sum), out);
        }
    }
}

/// [`exrail_kernels::Backend::attention`].
pub(crate) fn attention(
    processor: Processor,
    pool: &Pool,
    (q, out): (&[f32], &mut [f32]),
    (kv, layer): (&CpuKvPool, usize),
    (shape, spans): (AttentionShape, &[AttentionSpan<'_>]),
    partials: &mut Vec<f32>,
) {
    assert!(shape.window != Some(0), "a window holds at least one key");
    let n_rows = spans.iter().map(|s| s.first_row + s.n_rows).max().unwrap_or(0);
    let out = MatrixBlocks::new(out, n_rows, shape.n_heads * shape.head_dim);
    let tasks = Tasks::plan(shape, spans, pool.n_threads());
    let width = padded_head(shape.head_dim) / 16;
    partials.clear();
    partials.resize(tasks.n_partials * (2 + width) * 16, 0.0);
    let partials = MatrixBlocks::new(partials, tasks.n_partials, (2 + width) * 16);
    let queries = |span: &AttentionSpan<'_>, kv_head: usize| {
        let visible = Visible::Causal(span.first_position);
        Queries { q, out, shape, kv_head, first_row: span.first_row, n_rows: span.n_rows, visible }
    };
    let run = |i: usize| {
        let Task { span, kv_head, ref range, segment } = tasks.all[i];
        let queries = queries(&spans[span], kv_head);
        let part = match segment {
            None => Part::All,
            Some(segment) => {
                Part::One { segment, partials, places: tasks.places(span, kv_head, shape) }
            }
        };
        let source = Paged { pool: kv, pages: spans[span].pages, layer, head: kv_head };
        let range = range.clone();
        match kv.shape().dtype {
            KvDtype::F32 => {
                processor.run(Attend::<_, SingleElement>::new(queries, range, part, source));
            }
            KvDtype::F16 => {
                processor.run(Attend::<_, HalfElement>::new(queries, range, part, source));
            }
            KvDtype::Int8 => {
                processor.run(Attend::<_, ByteElement>::new(queries, range, part, source));
            }
        }
    };
    if tasks.alone {
        (0..tasks.all.len()).for_each(run);
        return;
    }
    pool.run(tasks.all.len(), &run);
    if tasks.n_partials == 0 {
        return;
    }
    for (i, span) in spans.iter().enumerate() {
        for kv_head in 0..shape.n_kv_heads {
            let places = tasks.places(i, kv_head, shape);
            processor.run(Join { queries: queries(span, kv_head), partials, places });
        }
    }
}

/// What a task computes of its queries.
enum Part<'a> {
    /// The output.
    All,
    /// What one segment contributes: maximum, sums and accumulators.
    One { segment: usize, partials: MatrixBlocks<'a>, places: Places },
}

/// [`exrail_kernels::Backend::attention_full`].
pub(crate) fn attention_full(
    processor: Processor,
    pool: &Pool,
    (q, out): (&[f32], &mut [f32]),
    (k, v): (&[f32], &[f32]),
    shape: AttentionShape,
    spans: &[Span],
) {
    assert!(shape.window.is_none(), "only causal attention has a window");
    let n_rows = spans.iter().map(|s| s.first_row + s.n_rows).max().unwrap_or(0);
    let out = MatrixBlocks::new(out, n_rows, shape.n_heads * shape.head_dim);
    let run = |i: usize| {
        let (span, kv_head) = (spans[i / shape.n_kv_heads], i % shape.n_kv_heads);
        let packed = Packed::new(k, v, shape, span, kv_head);
        let visible = Visible::All(span.n_rows);
        let queries = Queries {
            q,
            out,
            shape,
            kv_head,
            first_row: span.first_row,
            n_rows: span.n_rows,
            visible,
        };
        let range = 0..span.n_rows * queries.group();
        processor.run(Attend::<_, SingleElement>::new(queries, range, Part::All, &packed));
    };
    pool.run(spans.len() * shape.n_kv_heads, &run);
}

/// A range of queries over one head.
struct Attend<'a, S, E> {
    queries: Queries<'a>,
    range: Range<usize>,
    part: Part<'a>,
    source: S,
    _element: PhantomData<E>,
}

impl<'a, S: Source, E: Element> Attend<'a, S, E> {
    fn new(queries: Queries<'a>, range: Range<usize>, part: Part<'a>, source: S) -> Self {
        Attend { queries, range, part, source, _element: PhantomData }
    }
}

impl<S: Source, E: Element> Kernel for Attend<'_, S, E> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let width = padded_head(self.queries.shape.head_dim) / 16;
        // Heads of up to 128 values need no allocation, and those of 64 less to clear.
        match 4 * (2 + width) + 4 * width {
            0..=40 => self.tiles(lanes, &mut [[0.0; 16]; 40]),
            41..=72 => self.tiles(lanes, &mut [[0.0; 16]; 72]),
            n_rows => self.tiles(lanes, &mut vec![[0.0; 16]; n_rows]),
        }
    }
}

impl<S: Source, E: Element> Attend<'_, S, E> {
    #[inline(always)]
    fn tiles<L: Lanes>(&self, lanes: L, memory: &mut [[f32; 16]]) {
        let mut next = self.range.start;
        if L::WIDEST >= 4 {
            while next + 4 <= self.range.end {
                self.tile::<L, 4>(lanes, next, memory);
                next += 4;
            }
            // Three and two are also usual numbers of query heads a KV head.
            if next + 3 == self.range.end {
                self.tile::<L, 3>(lanes, next, memory);
                next += 3;
            }
            if next + 2 == self.range.end {
                self.tile::<L, 2>(lanes, next, memory);
                next += 2;
            }
        }
        while next < self.range.end {
            self.tile::<L, 1>(lanes, next, memory);
            next += 1;
        }
    }
}

/// The online softmax of N queries.
struct Softmax<V, const N: usize> {
    maxima: [f32; N],
    sums: [V; N],
    /// This tile's probabilities, times the scales of its values.
    p: [[f32; TOKENS]; N],
    /// Which of this tile's tokens each query sees, from and to.
    first_token: [usize; N],
    n_tokens: [usize; N],
}

impl<S: Source, E: Element> Attend<'_, S, E> {
    #[inline(always)]
    fn tile<L: Lanes, const N: usize>(&self, lanes: L, first: usize, memory: &mut [[f32; 16]]) {
        let queries = &self.queries;
        let mut q: [&[f32]; N] = [&[]; N];
        let mut visible: [Range<usize>; N] = std::array::from_fn(|_| 0..0);
        for n in 0..N {
            q[n] = queries.vector(first + n);
            visible[n] = queries.locate(first + n).2;
        }
        let width = padded_head(queries.shape.head_dim) / 16;
        let (totals, acc) = memory.split_at_mut(N * (2 + width));
        let acc = &mut acc[..N * width];
        totals.chunks_exact_mut(2 + width).for_each(empty);
        // Segments before the first window are not read.
        let least = visible.iter().map(|v| v.start).min().unwrap_or(0);
        let most = visible.iter().map(|v| v.end).max().unwrap_or(0);
        let segments = match self.part {
            Part::All => least / SEGMENT..most.div_ceil(SEGMENT),
            Part::One { segment, .. } => segment..segment + 1,
        };
        for segment in segments {
            let (start, end) = (segment * SEGMENT, (segment + 1) * SEGMENT);
            let tiles = least.max(start) / TOKENS..most.min(end).div_ceil(TOKENS);
            let softmax = self.segment(lanes, tiles, (&q, &visible), acc);
            for n in 0..N {
                if visible[n].start >= end || visible[n].end <= start {
                    continue;
                }
                let acc = &acc[n * width..(n + 1) * width];
                let total = &mut totals[n * (2 + width)..(n + 1) * (2 + width)];
                fold(lanes, (softmax.maxima[n], softmax.sums[n], acc), total);
            }
        }
        for (n, total) in totals.chunks_exact(2 + width).enumerate() {
            match &self.part {
                // SAFETY: tasks of all segments are disjoint ranges of queries.
                Part::All => unsafe { queries.finish(lanes, first + n, total) },
                Part::One { segment, partials, places } => {
                    let place = places.of(first + n, *segment);
                    // SAFETY: tasks are disjoint in their queries or their segment.
                    let mut block =
                        unsafe { partials.block(place..place + 1, 0..16 * total.len()) };
                    block.row(place).copy_from_slice(total.as_flattened());
                }
            }
        }
    }

    /// The softmax of some tiles, and its products with their values in `acc`.
    #[inline(always)]
    fn segment<L: Lanes, const N: usize>(
        &self,
        lanes: L,
        tiles: Range<usize>,
        (q, visible): (&[&[f32]; N], &[Range<usize>; N]),
        acc: &mut [[f32; 16]],
    ) -> Softmax<L::V, N> {
        let shape = &self.queries.shape;
        let mut softmax = Softmax {
            maxima: [f32::NEG_INFINITY; N],
            sums: [lanes.splat(0.0); N],
            p: [[0.0; TOKENS]; N],
            first_token: [0; N],
            n_tokens: [0; N],
        };
        let width = acc.len() / N;
        acc.fill([0.0; 16]);
        let ahead = if tiles.is_empty() { 0 } else { self.source.ahead(lanes, tiles.start) };
        for tile in tiles.clone().take(ahead) {
            self.source.prefetch(lanes, tile);
        }
        for tile in tiles.clone() {
            if ahead > 0 && tile + ahead < tiles.end {
                self.source.prefetch(lanes, tile + ahead);
            }
            let scores = scores::<L, E, N>(lanes, self.source.keys(tile), q);
            let scales = self.source.scales(tile);
            for n in 0..N {
                let in_tile = |end: usize| end.saturating_sub(tile * TOKENS).min(TOKENS);
                softmax.first_token[n] = in_tile(visible[n].start);
                softmax.n_tokens[n] = in_tile(visible[n].end);
                let mut scores = lanes.mul(scores[n], lanes.splat(shape.scale));
                if let Some([keys, _]) = scales {
                    scores = lanes.mul(scores, lanes.load_f32(keys));
                }
                if let Some(cap) = shape.soft_cap {
                    scores = math::soft_cap(lanes, scores, cap);
                }
                softmax.step(lanes, n, scores, &mut acc[n * width..(n + 1) * width]);
                if let Some([_, values]) = scales {
                    let p = lanes.load(&softmax.p[n]);
                    lanes.store(lanes.mul(p, lanes.load_f32(values)), &mut softmax.p[n]);
                }
            }
            softmax.add_values::<L, E>(lanes, self.source.values(tile), width, acc);
        }
        softmax
    }
}

/// Folds the partial results of the queries of one span and KV head.
struct Join<'a> {
    queries: Queries<'a>,
    partials: MatrixBlocks<'a>,
    places: Places,
}

impl Kernel for Join<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let rows = 2 + padded_head(self.queries.shape.head_dim) / 16;
        let mut total = vec![[0.0; 16]; rows];
        for query in 0..self.queries.n_rows * self.queries.group() {
            let visible = self.queries.locate(query).2;
            empty(&mut total);
            for segment in visible.start / SEGMENT..visible.end.div_ceil(SEGMENT) {
                let place = self.places.of(query, segment);
                // SAFETY: the tasks are done, and each result is read here alone.
                let mut block = unsafe { self.partials.block(place..place + 1, 0..16 * rows) };
                let partial = block.row(place).as_chunks::<16>().0;
                fold(lanes, (partial[0][0], lanes.load(&partial[1]), &partial[2..]), &mut total);
            }
            // SAFETY: the folds run one after the other, and the tasks are done.
            unsafe { self.queries.finish(lanes, query, &total) };
        }
    }
}

/// No tokens seen: the maximum, the sums, and the accumulators.
#[inline(always)]
fn empty(total: &mut [[f32; 16]]) {
    total.fill([0.0; 16]);
    total[0] = [f32::NEG_INFINITY; 16];
}

/// Adds a segment, of which at least one token was seen.
#[inline(always)]
fn fold<L: Lanes>(
    lanes: L,
    (maximum, sums, acc): (f32, L::V, &[[f32; 16]]),
    total: &mut [[f32; 16]],
) {
    let before = total[0][0];
    // A maximum of -inf is a NaN among the scores, which this difference keeps.
    let highest = if before > maximum { before } else { maximum };
    let old = math::exp(lanes, lanes.splat(before - highest));
    let new = math::exp(lanes, lanes.splat(maximum - highest));
    total[0] = [highest; 16];
    let kept = lanes.mul(lanes.load(&total[1]), old);
    lanes.store(lanes.fma(sums, new, kept), &mut total[1]);
    for (total, acc) in total[2..].iter_mut().zip(acc) {
        let kept = lanes.mul(lanes.load(total), old);
        lanes.store(lanes.fma(lanes.load(acc), new, kept), total);
    }
}

/// `K q` of sixteen tokens, four partial sums over D.
#[inline(always)]
fn scores<L: Lanes, E: Element, const N: usize>(
    lanes: L,
    keys: &[u8],
    q: &[&[f32]; N],
) -> [L::V; N] {
    let mut partial = [[lanes.splat(0.0); 4]; N];
    let whole = q[0].len() / 4 * 4;
    for (d, four) in keys.chunks_exact(4 * E::LANE_BYTES).enumerate() {
        for c in 0..4 {
            let k = E::load(lanes, &four[c * E::LANE_BYTES..(c + 1) * E::LANE_BYTES]);
            for n in 0..N {
                partial[n][c] = lanes.fma(k, lanes.splat(q[n][4 * d + c]), partial[n][c]);
            }
        }
    }
    for d in whole..q[0].len() {
        let k = E::load(lanes, &keys[d * E::LANE_BYTES..(d + 1) * E::LANE_BYTES]);
        for n in 0..N {
            partial[n][0] = lanes.fma(k, lanes.splat(q[n][d]), partial[n][0]);
        }
    }
    let mut out = [lanes.splat(0.0); N];
    for n in 0..N {
        let [a, b, c, d] = partial[n];
        out[n] = lanes.add(lanes.add(a, b), lanes.add(c, d));
    }
    out
}

/// Lane numbers, to cut the tokens that a query does not see.
const LANES: [f32; TOKENS] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

impl<V: Copy, const N: usize> Softmax<V, N> {
    /// Takes sixteen scores of query n in; `acc` is its row of accumulators.
    #[inline(always)]
    fn step<L: Lanes<V = V>>(&mut self, lanes: L, n: usize, scores: V, acc: &mut [[f32; 16]]) {
        let (first, n_tokens) = (self.first_token[n], self.n_tokens[n]);
        if first >= n_tokens {
            return;
        }
        let mut scores = scores;
        if n_tokens < TOKENS {
            // Slots that nobody wrote yet may hold anything, also NaN.
            let bound = lanes.splat(n_tokens as f32);
            let unseen = lanes.splat(f32::NEG_INFINITY);
            scores = lanes.select_less(lanes.load(&LANES), bound, scores, unseen);
        }
        if first > 0 {
            let bound = lanes.splat(first as f32);
            let unseen = lanes.splat(f32::NEG_INFINITY);
            scores = lanes.select_less(lanes.load(&LANES), bound, unseen, scores);
        }
        let largest = lanes.maximum(scores);
        if largest > self.maxima[n] {
            let shrink = lanes.splat(self.maxima[n] - largest);
            let shrink = math::exp(lanes, shrink);
            self.sums[n] = lanes.mul(self.sums[n], shrink);
            for acc in acc {
                let shrunk = lanes.mul(lanes.load(acc), shrink);
                lanes.store(shrunk, acc);
            }
            self.maxima[n] = largest;
        }
        let p = math::exp(lanes, lanes.sub(scores, lanes.splat(self.maxima[n])));
        self.sums[n] = lanes.add(self.sums[n], p);
        lanes.store(p, &mut self.p[n]);
    }

    /// `acc += p V`. Values of tokens that a query does not see are not touched: they may be NaN.
    #[inline(always)]
    fn add_values<L: Lanes<V = V>, E: Element>(
        &self,
        lanes: L,
        values: &[u8],
        width: usize,
        acc: &mut [[f32; 16]],
    ) {
        let all = self.n_tokens.iter().all(|&n| n == TOKENS)
            && self.first_token.iter().all(|&first| first == 0);
        let least = self.first_token.iter().copied().min().unwrap_or(0);
        let most = self.n_tokens.iter().copied().max().unwrap_or(0);
        let row_bytes = width * E::LANE_BYTES;
        for d in 0..width {
            let mut sums = [lanes.splat(0.0); N];
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = lanes.load(&acc[n * width + d]);
            }
            for t in least..most {
                let at = t * row_bytes + d * E::LANE_BYTES;
                let v = E::load(lanes, &values[at..at + E::LANE_BYTES]);
                for (n, sum) in sums.iter_mut().enumerate() {
                    if all || (self.first_token[n]..self.n_tokens[n]).contains(&t) {
                        *sum = lanes.fma(v, lanes.splat(self.p[n][t]), *sum);
                    }
                }
            }
            for (n, &sum) in sums.iter().enumerate() {
                lanes.store(sum, &mut acc[n * width + d]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Isa, affinity};
    use exrail_kernels::{KvShape, KvSlot, PAGE_TOKENS, PageId};

    /// What is asked for ahead lies in the sequence, whatever CPU this runs on: with windows, prompts
    /// and the first token, too.
    #[test]
    fn asking_ahead_changes_no_bit_and_stays_in_the_sequence() {
        let (n_heads, n_kv_heads, head_dim, n_tokens) = (3, 1, 64, 2 * PAGE_TOKENS);
        let kv = KvShape { n_layers: 1, n_pages: 2, n_kv_heads, head_dim, dtype: KvDtype::F16 };
        let threads = Pool::new(2, &affinity::cores());
        let mut pool = CpuKvPool::new(kv, || "test".to_owned()).expect("128 KiB");
        let value = |i: usize| ((i * 7919) % 1000) as f32 / 500.0 - 1.0;
        let keys: Vec<f32> = (0..n_tokens * head_dim).map(value).collect();
        let page = |i: usize| PageId((i / PAGE_TOKENS) as u32);
        let slot = |i: usize| KvSlot { page: page(i), offset: (i % PAGE_TOKENS) as u32 };
        let slots: Vec<KvSlot> = (0..n_tokens).map(slot).collect();
        pool.write(&threads, 0, (&keys, &keys), &slots);
        let pages = [PageId(0), PageId(1)];
        for (first_position, n_rows, window) in
            [(0, 1, None), (15, 1, None), (511, 1, None), (500, 1, Some(20)), (300, 40, Some(130))]
        {
            let q: Vec<f32> = (0..n_rows * n_heads * head_dim).map(value).collect();
            let pages = &pages[..(first_position + n_rows).div_ceil(PAGE_TOKENS)];
            let span = AttentionSpan { first_row: 0, n_rows, first_position, pages };
            let (scale, soft_cap) = (0.125, None);
            let shape = AttentionShape { n_heads, n_kv_heads, head_dim, scale, window, soft_cap };
            for isa in Isa::available() {
                let processor = Processor::of(isa).expect("listed as available");
                let outputs = [0, 4 << 10, 8 << 10, 1 << 20].map(|ahead| {
                    let (processor, mut out) = (processor.asking(ahead), vec![0.0; q.len()]);
                    let (spans, mut partials) = ([span], Vec::new());
                    let inputs = (&pool, 0);
                    attention(
                        processor,
                        &threads,
                        (&q, &mut out),
                        inputs,
                        (shape, &spans),
                        &mut partials,
                    );
                    out.iter().map(|x: &f32| x.to_bits()).collect::<Vec<_>>()
                });
                assert!(outputs.iter().all(|out| *out == outputs[0]), "{isa}, {first_position}");
            }
        }
    }
}
