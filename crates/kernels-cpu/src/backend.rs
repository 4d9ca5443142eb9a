//! [`CpuBackend`]: the operations of [`Backend`] on the CPU.

use crate::activation::QuantBlock;
use crate::affinity;
use crate::attention;
use crate::footprint::CpuFootprint;
use crate::kv::{CpuKvPool, Turns};
use crate::linear::{Engine, Epilogue, Product};
use crate::memory::{Arena, Floats, release_code, release_free_pages};
use crate::pool::Pool;
use crate::processor::{Isa, Processor};
use crate::rows::{Add, Norm, NormInPlace, RopeTable, Rotate, ScaleAndCap};
use crate::weight::CpuWeight;
use exrail_kernels::{
    Activation, AttentionShape, AttentionSpan, Backend, Draws, GateActivation, KernelError, KvMove,
    KvShape, KvSlot, Largest, NormKind, PageId, Rope, Span, TokenId, WeightShape, WeightView,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Values of a row operation that one thread handles in about 5 µs.
const ROW_WORK: usize = 1 << 14;
/// Values that a thread copies alone: as many as a row of logits has.
const COPY_ALONE: usize = 1 << 17;

/// How to start a [`CpuBackend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads in all, the caller's included. `None`: one a physical core that this process may
    /// use.
    pub threads: Option<usize>,
    /// How quantised weights meet activations. F32, F16 and BF16 weights always meet f32.
    pub activation: Activation,
    /// The instruction set. `None`: the fastest of this CPU.
    pub isa: Option<Isa>,
    /// Bytes from which a head of Q8_0 that meets int8 activations is stored in two halves of its
    /// bits, so that its largest output may be found from one. It takes longer to read such a head
    /// whole (`bench/record/kernels-cpu-2026-11-25.md`), so that small ones, which caches hold, are
    /// better in one piece. No value depends on it.
    pub split_heads_from: usize,
}

/// [`CpuOptions::split_heads_from`].
const SPLIT_HEADS_FROM: usize = 64 << 20;

impl Default for CpuOptions {
    fn default() -> CpuOptions {
        let activation = Activation::Int8;
        CpuOptions { threads: None, activation, isa: None, split_heads_from: SPLIT_HEADS_FROM }
    }
}

/// f32 values in memory.
#[derive(Debug)]
pub struct CpuBuffer(Floats);

/// The CPU as a device. Clones share the threads; their operations take turns.
///
/// The results do not depend on the number of threads, on the instruction set, or on how many rows
/// a batch has: all of them give the same bits.
#[derive(Clone, Debug)]
pub struct CpuBackend {
    shared: Arc<Shared>,
    activation: Activation,
}

#[derive(Debug)]
struct Shared {
    processor: Processor,
    split_heads_from: usize,
    pool: Pool,
    arena: Arena,
    scratch: Mutex<Scratch>,
}

/// Memory that operations reuse.
#[derive(Debug, Default)]
struct Scratch {
    quantised: Vec<QuantBlock>,
    partials: Vec<f32>,
    /// The last two rotations: Gemma 3 turns by two, in turns.
    rope: [RopeTable; 2],
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`KernelError::UnsupportedIsa`] when this CPU lacks the instruction set asked for.
    pub fn new(options: CpuOptions) -> Result<CpuBackend, KernelError> {
        let processor = match options.isa {
            None => Processor::best(),
            Some(isa) => Processor::of(isa)
                .ok_or_else(|| KernelError::UnsupportedIsa { isa: isa.to_string() })?,
        };
        let cores = affinity::cores();
        let threads = options.threads.unwrap_or(cores.len()).max(1);
        let shared = Shared {
            processor,
            split_heads_from: options.split_heads_from,
            pool: Pool::new(threads, &cores),
            arena: Arena::default(),
            scratch: Mutex::default(),
        };
        Ok(CpuBackend { shared: Arc::new(shared), activation: options.activation })
    }

    /// The same threads with another treatment of activations.
    #[must_use]
    pub fn with_activation(&self, activation: Activation) -> CpuBackend {
        CpuBackend { shared: Arc::clone(&self.shared), activation }
    }

    /// The instruction set in use.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.shared.processor.isa()
    }

    /// Threads in all, the caller's included.
    #[must_use]
    pub fn n_threads(&self) -> usize {
        self.shared.pool.n_threads()
    }

    /// How quantised weights meet activations.
    #[must_use]
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// What it allocates.
    #[must_use]
    pub fn footprint(&self) -> CpuFootprint {
        let split_heads_from = self.shared.split_heads_from;
        CpuFootprint { activation: self.activation, split_heads_from }
    }

    /// What runs kernels, and on which threads.
    pub(crate) fn parts(&self) -> (Processor, &Pool) {
        (self.shared.processor, &self.shared.pool)
    }

    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        // Scratch holds no invariant that a panic could break: every use fills it anew.
        self.shared.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn products(&self, x: &CpuBuffer, n_rows: usize, products: &mut [Product<'_>]) {
        let scratch = &mut *self.scratch();
        self.engine(&mut scratch.quantised).products(&x.0, n_rows, products);
    }

    fn engine<'a>(&'a self, quantised: &'a mut Vec<QuantBlock>) -> Engine<'a> {
        Engine {
            processor: self.shared.processor,
            pool: &self.shared.pool,
            activation: self.activation,
            quantised,
        }
    }

    /// What `of` finds in each row of x `(T, width)`, the rows on several threads.
    fn found_in(
        &self,
        x: &[f32],
        width: usize,
        of: &(dyn Fn(usize, &[f32]) -> Largest + Sync),
    ) -> Vec<Largest> {
        let mut found = vec![Largest { index: 0, value: f32::NAN }; x.len() / width];
        self.shared.pool.run_chunks(&mut found, 1, &|i, found| {
            // None where there are no rows.
            if let [found] = found {
                *found = of(i, &x[i * width..(i + 1) * width]);
            }
        });
        found
    }

    /// Runs `run(first_row, rows)` over runs of rows of `width` values, on several threads when
    /// there is enough to do.
    fn rows(&self, x: &mut [f32], width: usize, run: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let per_chunk = (ROW_WORK / width.max(1)).max(1);
        self.shared
            .pool
            .run_chunks(x, per_chunk * width.max(1), &|i, rows| run(i * per_chunk, rows));
    }
}

/// One product of an operation.
fn product<'a>(
    weight: &'a CpuWeight,
    bias: Option<&'a CpuBuffer>,
    epilogue: Epilogue<'a>,
    out: &'a mut CpuBuffer,
) -> Product<'a> {
    Product { weight, bias: bias.map(|bias| &bias.0[..]), epilogue, out: &mut out.0 }
}

impl Backend for CpuBackend {
    type Weight = CpuWeight;
    type Buffer = CpuBuffer;
    type KvPool = CpuKvPool;
    type Found = Vec<Largest>;

    fn name(&self) -> String {
        let activation = match self.activation {
            Activation::F32 => "f32",
            Activation::Int8 => "int8",
        };
        let threads = match self.n_threads() {
            1 => "1 thread".to_owned(),
            n => format!("{n} threads"),
        };
        format!("cpu {}, {threads}, {activation} activations", self.isa())
    }

    fn host_threads(&self) -> usize {
        self.n_threads()
    }

    fn release_unused(&self) {
        self.shared.arena.release_rest();
        release_free_pages();
        release_code();
    }

    fn weight(&self, view: &WeightView<'_>) -> Result<CpuWeight, KernelError> {
        let kind = self.footprint().kind(&WeightShape::of(view));
        CpuWeight::pack(view, kind, (&self.shared.arena, &self.shared.pool), || self.name())
    }

    fn weight_shape(&self, weight: &CpuWeight) -> (usize, usize) {
        (weight.rows(), weight.columns())
    }

    fn buffer(&self, len: usize) -> Result<CpuBuffer, KernelError> {
        // Buffers are as large as the largest step: one that is never made should cost nothing.
        let values = Floats::zeros(len).ok_or_else(|| KernelError::OutOfMemory {
            what: "activations".to_owned(),
            wanted_bytes: len.saturating_mul(4),
            device: self.name(),
        })?;
        Ok(CpuBuffer(values))
    }

    fn write(&self, buffer: &mut CpuBuffer, values: &[f32]) {
        buffer.0[..values.len()].copy_from_slice(values);
    }

    fn read(&self, buffer: &CpuBuffer, values: &mut [f32]) {
        let from = &buffer.0[..values.len()];
        self.shared.pool.run_chunks(values, COPY_ALONE, &|i, values| {
            values.copy_from_slice(&from[i * COPY_ALONE..][..values.len()]);
        });
    }

    fn kv_pool(&self, shape: KvShape) -> Result<CpuKvPool, KernelError> {
        CpuKvPool::new(shape, || self.name())
    }

    fn kv_copy_page(&self, pool: &mut CpuKvPool, from: PageId, to: PageId) {
        pool.copy_page(from, to);
    }

    fn kv_move(&self, pool: &mut CpuKvPool, layer: usize, moves: &[KvMove], rope: Option<&Rope>) {
        let turns = Turns::new(rope, moves, pool.shape().head_dim);
        pool.move_slots(&self.shared.pool, layer, moves, &turns);
    }

    fn kv_page_bytes(&self, pool: &CpuKvPool) -> usize {
        pool.page_bytes()
    }

    fn kv_read_page(&self, pool: &CpuKvPool, page: PageId, bytes: &mut [u8]) {
        pool.read_page(page, bytes);
    }

    fn kv_write_page(&self, pool: &mut CpuKvPool, page: PageId, bytes: &[u8]) {
        pool.write_page(page, bytes);
    }

    fn embed(&self, table: &CpuWeight, ids: &[TokenId], scale: f32, out: &mut CpuBuffer) {
        let width = table.columns();
        self.rows(&mut out.0[..ids.len() * width], width, &|first, rows| {
            for (row, id) in rows.chunks_exact_mut(width).zip(&ids[first..]) {
                assert!((id.0 as usize) < table.rows(), "token {} of {}", id.0, table.rows());
                table.dequantise_row(id.0 as usize, row);
            }
            self.shared.processor.run(ScaleAndCap { x: rows, scale, soft_cap: None });
        });
    }

    fn norm(
        &self,
        kind: NormKind,
        x: &CpuBuffer,
        n_rows: usize,
        weight: &CpuBuffer,
        eps: f32,
        out: &mut CpuBuffer,
    ) {
        let width = weight.0.len();
        let x = &x.0[..n_rows * width];
        self.rows(&mut out.0[..n_rows * width], width, &|first, out| {
            let x = &x[first * width..][..out.len()];
            self.shared.processor.run(Norm { kind, x, weight: &weight.0, eps, adds: false, out });
        });
    }

    fn norm_in_place(
        &self,
        kind: NormKind,
        x: &mut CpuBuffer,
        n_rows: usize,
        weight: &CpuBuffer,
        eps: f32,
    ) {
        let width = weight.0.len();
        self.rows(&mut x.0[..n_rows * width], width, &|_, x| {
            self.shared.processor.run(NormInPlace { kind, x, weight: &weight.0, bias: None, eps });
        });
    }

    fn norm_add(
        &self,
        kind: NormKind,
        x: &CpuBuffer,
        n_rows: usize,
        weight: &CpuBuffer,
        eps: f32,
        y: &mut CpuBuffer,
    ) {
        let width = weight.0.len();
        let x = &x.0[..n_rows * width];
        self.rows(&mut y.0[..n_rows * width], width, &|first, out| {
            let x = &x[first * width..][..out.len()];
            self.shared.processor.run(Norm { kind, x, weight: &weight.0, eps, adds: true, out });
        });
    }

    fn layer_norm(
        &self,
        x: &mut CpuBuffer,
        n_rows: usize,
        weight: &CpuBuffer,
        bias: &CpuBuffer,
        eps: f32,
    ) {
        let width = weight.0.len();
        self.rows(&mut x.0[..n_rows * width], width, &|_, x| {
            let (kind, bias) = (NormKind::Layer, Some(&bias.0[..width]));
            self.shared.processor.run(NormInPlace { kind, x, weight: &weight.0, bias, eps });
        });
    }

    fn linear(
        &self,
        x: &CpuBuffer,
        n_rows: usize,
        weight: &CpuWeight,
        bias: Option<&CpuBuffer>,
        out: &mut CpuBuffer,
    ) {
        self.products(x, n_rows, &mut [product(weight, bias, Epilogue::Store, out)]);
    }

    fn largest(&self, x: &CpuBuffer, n_rows: usize, width: usize, limit: usize) -> Vec<Largest> {
        self.found_in(&x.0[..n_rows * width], width, &|_, row| Largest::of(&row[..limit]))
    }

    fn draw(&self, x: &mut CpuBuffer, width: usize, draws: Draws<'_>) -> Vec<Largest> {
        self.found_in(&x.0[..draws.rows.len() * width], width, &|i, row| {
            let one = Draws { limit: draws.limit, rows: &draws.rows[i..=i] };
            one.of_rows(row, width)[0]
        })
    }

    fn found(&self, found: &Vec<Largest>) -> Vec<Largest> {
        found.clone()
    }

    fn linear_largest(
        &self,
        x: &CpuBuffer,
        n_rows: usize,
        weight: &CpuWeight,
        limit: usize,
        work: &mut CpuBuffer,
    ) -> Vec<Largest> {
        let scratch = &mut *self.scratch();
        let mut engine = self.engine(&mut scratch.quantised);
        // Several rows share what is read of the head, and together need most of it.
        if n_rows == 1 {
            return vec![engine.largest(&x.0, weight, limit)];
        }
        engine.products(&x.0, n_rows, &mut [product(weight, None, Epilogue::Store, work)]);
        self.largest(work, n_rows, weight.rows(), limit)
    }

    fn linear_qkv(
        &self,
        x: &CpuBuffer,
        n_rows: usize,
        weights: [&CpuWeight; 3],
        biases: Option<[&CpuBuffer; 3]>,
        outs: [&mut CpuBuffer; 3],
    ) {
        let biases = biases.map_or([None; 3], |biases| biases.map(Some));
        let [q, k, v] = outs;
        let store = Epilogue::Store;
        let mut products = [
            product(weights[0], biases[0], store, q),
            product(weights[1], biases[1], store, k),
            product(weights[2], biases[2], store, v),
        ];
        self.products(x, n_rows, &mut products);
    }

    fn linear_add(
        &self,
        x: &CpuBuffer,
        n_rows: usize,
        weight: &CpuWeight,
        bias: Option<&CpuBuffer>,
        scale: f32,
        y: &mut CpuBuffer,
    ) {
        self.products(x, n_rows, &mut [product(weight, bias, Epilogue::Add { scale }, y)]);
    }

    fn linear_add_rows(
        &self,
        x: &CpuBuffer,
        weight: &CpuWeight,
        rows: &[u32],
        scales: &[f32],
        y: &mut CpuBuffer,
    ) {
        assert_eq!(rows.len(), scales.len(), "one scale a row");
        if rows.is_empty() {
            return;
        }
        let epilogue = Epilogue::AddRows { rows, scales };
        self.products(x, rows.len(), &mut [product(weight, None, epilogue, y)]);
    }

    fn linear_gate(
        &self,
        x: &CpuBuffer,
        n_rows: usize,
        gate: &CpuWeight,
        up: &CpuWeight,
        activation: GateActivation,
        out: &mut CpuBuffer,
    ) {
        let scratch = &mut *self.scratch();
        self.engine(&mut scratch.quantised).gate(&x.0, n_rows, [gate, up], activation, &mut out.0);
    }

    fn linear_gelu(
        &self,
        x: &CpuBuffer,
        n_rows: usize,
        weight: &CpuWeight,
        bias: &CpuBuffer,
        out: &mut CpuBuffer,
    ) {
        self.products(x, n_rows, &mut [product(weight, Some(bias), Epilogue::Gelu, out)]);
    }

    fn rope(
        &self,
        x: &mut CpuBuffer,
        n_heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) {
        assert!(2 * rope.inverse_frequencies.len() <= head_dim, "rotated width of {head_dim}");
        let scratch = &mut *self.scratch();
        let tables = &mut scratch.rope;
        if !tables[0].holds(positions, rope) {
            tables.swap(0, 1);
        }
        tables[0].fill(positions, rope);
        let table = &tables[0];
        let style = rope.style;
        let width = n_heads * head_dim;
        self.rows(&mut x.0[..positions.len() * width], width, &|first_row, x| {
            let rotate = Rotate { x, first_row, n_heads, head_dim, table, style };
            self.shared.processor.run(rotate);
        });
    }

    fn kv_write(
        &self,
        pool: &mut CpuKvPool,
        layer: usize,
        k: &CpuBuffer,
        v: &CpuBuffer,
        slots: &[KvSlot],
    ) {
        pool.write(&self.shared.pool, layer, (&k.0, &v.0), slots);
    }

    fn attention(
        &self,
        q: &CpuBuffer,
        pool: &CpuKvPool,
        layer: usize,
        shape: AttentionShape,
        spans: &[AttentionSpan<'_>],
        out: &mut CpuBuffer,
    ) {
        let Shared { processor, pool: threads, .. } = &*self.shared;
        let kv = (pool, layer);
        let partials = &mut self.scratch().partials;
        let io = (&q.0[..], &mut out.0[..]);
        attention::attention(*processor, threads, io, kv, (shape, spans), partials);
    }

    fn attention_full(
        &self,
        q: &CpuBuffer,
        k: &CpuBuffer,
        v: &CpuBuffer,
        shape: AttentionShape,
        spans: &[Span],
        out: &mut CpuBuffer,
    ) {
        let Shared { processor, pool: threads, .. } = &*self.shared;
        let kv = (&k.0[..], &v.0[..]);
        attention::attention_full(*processor, threads, (&q.0, &mut out.0), kv, shape, spans);
    }

    fn gather_rows(&self, x: &CpuBuffer, width: usize, rows: &[u32], out: &mut CpuBuffer) {
        for (out, &row) in out.0[..rows.len() * width].chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(&x.0[row as usize * width..][..width]);
        }
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer, len: usize) {
        self.shared.processor.run(Add { x: &mut x.0[..len], y: &y.0[..len] });
    }

    fn scale_and_cap(&self, x: &mut CpuBuffer, len: usize, scale: f32, soft_cap: Option<f32>) {
        self.rows(&mut x.0[..len], 1, &|_, x| {
            self.shared.processor.run(ScaleAndCap { x, scale, soft_cap });
        });
    }

    fn mean_rows(&self, x: &CpuBuffer, width: usize, spans: &[Span], out: &mut CpuBuffer) {
        let processor = self.shared.processor;
        for (out, span) in out.0[..spans.len() * width].chunks_exact_mut(width).zip(spans) {
            out.fill(0.0);
            let rows = &x.0[span.first_row * width..][..span.n_rows * width];
            for row in rows.chunks_exact(width) {
                processor.run(Add { x: out, y: row });
            }
            for value in out {
                *value /= span.n_rows as f32;
            }
        }
    }
}
