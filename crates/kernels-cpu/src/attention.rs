//! Attention: keys and values are streamed once, with an online softmax (Milakov and Gimelshein
//! 2018, arXiv:1805.02867).
//!
//! ```text
//! for each tile of 4 or fewer queries of one KV head (parallel)
//!   for each 16 tokens
//!     scores = cap(scale * K q), one lane a token       K is read once for all queries
//!     if a score exceeds the maximum so far: shrink sum and accumulators
//!     p = exp(scores - maximum); sum += p; accumulators += p V
//!   out = accumulators / sum
//! ```
//!
//! What one query computes depends on its own position only, not on its tile or its batch.
#![expect(unsafe_code, reason = "threads write disjoint heads of one output")]

use crate::disjoint::{MatrixBlock, MatrixBlocks};
use crate::kv::{CpuKvPool, TOKENS, padded_head};
use crate::lanes::{Kernel, Lanes};
use crate::linear::store_part;
use crate::math;
use crate::pool::Pool;
use crate::processor::Processor;
use crate::product::{Element, HalfElement, SingleElement};
use exrail_kernels::{AttentionShape, AttentionSpan, KvDtype, PAGE_TOKENS, PageId, Span};
use std::marker::PhantomData;
use std::ops::Range;

/// Multiplications below which one thread does it all (about 5 µs).
const ALONE: usize = 1 << 17;
/// Queries of a task when there are plenty.
const TASK_QUERIES: usize = 16;

/// Where the keys and values of one head are.
trait Source: Copy {
    /// A `(D, 16)` tile.
    fn keys(&self, tile: usize) -> &[u8];
    /// `(16, D')`.
    fn values(&self, tile: usize) -> &[u8];
}

#[derive(Clone, Copy)]
struct Paged<'a> {
    pool: &'a CpuKvPool,
    pages: &'a [PageId],
    layer: usize,
    head: usize,
}

impl Source for Paged<'_> {
    #[inline(always)]
    fn keys(&self, tile: usize) -> &[u8] {
        let (keys, _) =
            self.pool.head(self.pages[tile * TOKENS / PAGE_TOKENS], self.layer, self.head);
        let len = keys.len() / (PAGE_TOKENS / TOKENS);
        &keys[tile % (PAGE_TOKENS / TOKENS) * len..][..len]
    }
    #[inline(always)]
    fn values(&self, tile: usize) -> &[u8] {
        let (_, values) =
            self.pool.head(self.pages[tile * TOKENS / PAGE_TOKENS], self.layer, self.head);
        let len = values.len() / (PAGE_TOKENS / TOKENS);
        &values[tile % (PAGE_TOKENS / TOKENS) * len..][..len]
    }
}

/// The queries of one span that read one KV head: query i is row `i / group`, head
/// `kv_head * group + i % group`.
#[derive(Clone, Copy)]
struct Queries<'a> {
    q: &'a [f32],
    out: MatrixBlocks<'a>,
    shape: AttentionShape,
    kv_head: usize,
    first_row: usize,
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

    /// # Safety
    /// Nobody else has this query's output.
    unsafe fn output(&self, query: usize) -> (MatrixBlock<'a>, usize) {
        let (row, head, _) = self.locate(query);
        let width = self.shape.head_dim;
        // SAFETY: rows and heads identify queries, and the caller has this one alone.
        let block = unsafe { self.out.block(row..row + 1, head * width..(head + 1) * width) };
        (block, row)
    }
}

/// [`exrail_kernels::Backend::attention`].
pub(crate) fn attention(
    processor: Processor,
    pool: &Pool,
    (q, out): (&[f32], &mut [f32]),
    (kv, layer): (&CpuKvPool, usize),
    shape: AttentionShape,
    spans: &[AttentionSpan<'_>],
) {
    assert!(shape.window != Some(0), "a window holds at least one key");
    let n_rows = spans.iter().map(|s| s.first_row + s.n_rows).max().unwrap_or(0);
    let out = MatrixBlocks::new(out, n_rows, shape.n_heads * shape.head_dim);
    let group = shape.n_heads / shape.n_kv_heads;
    let work: usize = spans
        .iter()
        .map(|s| {
            let n_seen = (s.first_position + s.n_rows).min(shape.window.unwrap_or(usize::MAX));
            s.n_rows * n_seen * shape.n_heads * shape.head_dim
        })
        .sum();
    let n_queries: usize = spans.iter().map(|s| s.n_rows * group).sum::<usize>() * shape.n_kv_heads;
    let alone = work < ALONE;
    // Queries that share a task read the keys once; enough tasks to keep all threads busy.
    let task_queries = if alone {
        group.max(4)
    } else {
        (n_queries / (4 * pool.n_threads())).clamp(1, TASK_QUERIES)
    };
    let mut tasks = Vec::new();
    for (s, span) in spans.iter().enumerate() {
        for head in 0..shape.n_kv_heads {
            let n = span.n_rows * group;
            tasks.extend(
                (0..n).step_by(task_queries).map(|i| (s, head, i..n.min(i + task_queries))),
            );
        }
    }
    let run = |i: usize| {
        let (span, kv_head, range) = tasks[i].clone();
        let span = &spans[span];
        let visible = Visible::Causal(span.first_position);
        let queries = Queries { q, out, shape, kv_head, first_row: span.first_row, visible };
        let source = Paged { pool: kv, pages: span.pages, layer, head: kv_head };
        match kv.shape().dtype {
            KvDtype::F32 => processor.run(Attend::<_, SingleElement>::new(queries, range, source)),
            KvDtype::F16 => processor.run(Attend::<_, HalfElement>::new(queries, range, source)),
        }
    };
    if alone { (0..tasks.len()).for_each(run) } else { pool.run(tasks.len(), &run) }
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
        let queries = Queries { q, out, shape, kv_head, first_row: span.first_row, visible };
        let range = 0..span.n_rows * queries.group();
        processor.run(Attend::<_, SingleElement>::new(queries, range, &packed));
    };
    pool.run(spans.len() * shape.n_kv_heads, &run);
}

/// Keys and values of one head of one text, in the layout of a page.
struct Packed {
    keys: Vec<u8>,
    values: Vec<u8>,
    head_dim: usize,
}

impl Packed {
    fn new(k: &[f32], v: &[f32], shape: AttentionShape, span: Span, head: usize) -> Packed {
        let width = shape.head_dim;
        let n_tokens = span.n_rows.next_multiple_of(TOKENS);
        let mut keys = vec![0; n_tokens * width * 4];
        let mut values = vec![0; n_tokens * padded_head(width) * 4];
        let (key_cells, value_cells) = (keys.as_chunks_mut::<4>().0, values.as_chunks_mut::<4>().0);
        for t in 0..span.n_rows {
            let start = ((span.first_row + t) * shape.n_kv_heads + head) * width;
            for d in 0..width {
                key_cells[t / TOKENS * TOKENS * width + d * TOKENS + t % TOKENS] =
                    k[start + d].to_le_bytes();
                value_cells[t * padded_head(width) + d] = v[start + d].to_le_bytes();
            }
        }
        Packed { keys, values, head_dim: width }
    }
}

impl Source for &Packed {
    #[inline(always)]
    fn keys(&self, tile: usize) -> &[u8] {
        let len = self.head_dim * TOKENS * 4;
        &self.keys[tile * len..][..len]
    }
    #[inline(always)]
    fn values(&self, tile: usize) -> &[u8] {
        let len = padded_head(self.head_dim) * TOKENS * 4;
        &self.values[tile * len..][..len]
    }
}

/// A range of queries over one head.
struct Attend<'a, S, E> {
    queries: Queries<'a>,
    range: Range<usize>,
    source: S,
    _element: PhantomData<E>,
}

impl<'a, S: Source, E: Element> Attend<'a, S, E> {
    fn new(queries: Queries<'a>, range: Range<usize>, source: S) -> Self {
        Attend { queries, range, source, _element: PhantomData }
    }
}

impl<S: Source, E: Element> Kernel for Attend<'_, S, E> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let mut accumulators = vec![[0.0; 16]; 4 * padded_head(self.queries.shape.head_dim) / 16];
        let mut next = self.range.start;
        if L::WIDEST >= 4 {
            while next + 4 <= self.range.end {
                self.tile::<L, 4>(lanes, next, &mut accumulators);
                next += 4;
            }
            // Three is also the usual number of query heads a KV head.
            if next + 3 == self.range.end {
                self.tile::<L, 3>(lanes, next, &mut accumulators);
                next += 3;
            }
        }
        while next < self.range.end {
            self.tile::<L, 1>(lanes, next, &mut accumulators);
            next += 1;
        }
    }
}

/// The online softmax of N queries.
struct Softmax<V, const N: usize> {
    maxima: [f32; N],
    sums: [V; N],
    /// This tile's probabilities.
    p: [[f32; TOKENS]; N],
    /// Which of this tile's tokens each query sees, from and to.
    first_token: [usize; N],
    n_tokens: [usize; N],
}

impl<S: Source, E: Element> Attend<'_, S, E> {
    #[inline(always)]
    fn tile<L: Lanes, const N: usize>(&self, lanes: L, first: usize, acc: &mut [[f32; 16]]) {
        let queries = &self.queries;
        let mut q: [&[f32]; N] = [&[]; N];
        let mut visible: [Range<usize>; N] = std::array::from_fn(|_| 0..0);
        for n in 0..N {
            q[n] = queries.vector(first + n);
            visible[n] = queries.locate(first + n).2;
        }
        let mut softmax = Softmax {
            maxima: [f32::NEG_INFINITY; N],
            sums: [lanes.splat(0.0); N],
            p: [[0.0; TOKENS]; N],
            first_token: [0; N],
            n_tokens: [0; N],
        };
        let width = padded_head(queries.shape.head_dim) / 16;
        let acc = &mut acc[..N * width];
        acc.fill([0.0; 16]);
        // Tiles before the first window are not read.
        let least = visible.iter().map(|v| v.start).min().unwrap_or(0);
        let most = visible.iter().map(|v| v.end).max().unwrap_or(0);
        for tile in least / TOKENS..most.div_ceil(TOKENS) {
            let scores = scores::<L, E, N>(lanes, self.source.keys(tile), &q);
            for n in 0..N {
                let in_tile = |end: usize| end.saturating_sub(tile * TOKENS).min(TOKENS);
                softmax.first_token[n] = in_tile(visible[n].start);
                softmax.n_tokens[n] = in_tile(visible[n].end);
                let mut scores = lanes.mul(scores[n], lanes.splat(queries.shape.scale));
                if let Some(cap) = queries.shape.soft_cap {
                    scores = math::soft_cap(lanes, scores, cap);
                }
                softmax.step(lanes, n, scores, &mut acc[n * width..(n + 1) * width]);
            }
            softmax.add_values::<L, E>(lanes, self.source.values(tile), width, acc);
        }
        for n in 0..N {
            // SAFETY: tasks are disjoint ranges of queries.
            let (mut block, row) = unsafe { queries.output(first + n) };
            let sum = lanes.splat(lanes.sum(softmax.sums[n]));
            let out = block.row(row).chunks_mut(16);
            for (out, value) in out.zip(&acc[n * width..(n + 1) * width]) {
                store_part(lanes, lanes.div(lanes.load(value), sum), out);
            }
        }
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
