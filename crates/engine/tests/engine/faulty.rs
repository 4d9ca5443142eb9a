//! A backend with faults on demand. The tests of the server include this file, too.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use exrail_kernels::{
    AttentionShape, AttentionSpan, Backend, DeviceCounters, Draws, GateActivation, KernelError,
    KvMove, KvShape, KvSlot, Largest, NormKind, PAGE_TOKENS, PageId, Rope, Span, TokenId,
    WeightView,
};

/// A backend that computes what the inner one does and fails on some tokens.
#[derive(Clone, Debug)]
pub(crate) struct Faulty<B> {
    pub(crate) inner: B,
    pub(crate) faults: Faults,
    /// Writes of the KV cache so far.
    pub(crate) n_writes: Arc<AtomicUsize>,
    pub(crate) runs_ahead: bool,
    /// What it has built; `None`: it builds nothing.
    pub(crate) shapes: Option<Arc<Mutex<Shapes>>>,
    /// Embedding this token hangs until the sender of the channel is gone.
    pub(crate) hang: Option<(u32, flume::Receiver<Infallible>)>,
    /// Time that each step takes longer.
    pub(crate) delay: Duration,
    /// While this is set each step takes [`SLOW`] longer.
    pub(crate) slow: Arc<AtomicBool>,
    /// Time that each row takes longer.
    pub(crate) row_delay: Duration,
    /// The token that it finds, whatever is the most likely one.
    pub(crate) stuck_on: Option<u32>,
    /// Whether what it computes depends on the number of rows beside.
    pub(crate) depends_on_the_batch: bool,
    /// Whether the pages of a new pool hold no numbers.
    pub(crate) poisons_pages: bool,
    /// Weights, buffers and pools that it was asked for so far.
    pub(crate) n_allocated: Arc<AtomicUsize>,
    /// Dropped when the last of what uses the backend is.
    #[expect(dead_code, reason = "it is there to be dropped")]
    pub(crate) end: Option<Arc<dyn Debug + Send + Sync>>,
}

impl<B> Faulty<B> {
    /// Without faults.
    pub(crate) fn new(inner: B) -> Faulty<B> {
        Faulty {
            inner,
            faults: Faults::default(),
            n_writes: Arc::default(),
            runs_ahead: false,
            shapes: None,
            hang: None,
            delay: Duration::ZERO,
            slow: Arc::default(),
            row_delay: Duration::ZERO,
            stuck_on: None,
            depends_on_the_batch: false,
            poisons_pages: false,
            n_allocated: Arc::default(),
            end: None,
        }
    }

    fn count_allocation(&self) {
        self.n_allocated.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a step of a slow device takes longer: more than a busy machine makes of a tiny model's step.
pub(crate) const SLOW: Duration = Duration::from_millis(300);

/// What a device builds for every number of rows, and for every power of two of positions.
#[derive(Debug, Default)]
pub(crate) struct Shapes {
    pub(crate) rows: BTreeSet<usize>,
    pub(crate) contexts: BTreeSet<usize>,
    /// Whether it builds no more where the fence is closed.
    pub(crate) heeds_fence: bool,
    pub(crate) is_closed: bool,
    /// Rows that it computed.
    pub(crate) n_computed: usize,
}

impl Shapes {
    fn build(&mut self, shape: impl FnOnce(&mut Shapes) -> (&mut BTreeSet<usize>, usize)) {
        if self.heeds_fence && self.is_closed {
            return;
        }
        let (built, of) = shape(self);
        built.insert(of);
    }
}

/// The tokens that a [`Faulty`] backend fails on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Embedding this token gives NaN.
    pub(crate) nan: Option<u32>,
    /// Embedding this token panics.
    pub(crate) panic: Option<u32>,
    /// Behind so many writes of the KV cache the first page loses its first key.
    pub(crate) rot: Option<usize>,
}

macro_rules! forward {
    ($($name:ident(&self $(, $argument:ident: $kind:ty)*);)*) => {
        $(fn $name(&self $(, $argument: $kind)*) { self.inner.$name($($argument),*) })*
    };
}

impl<B: Backend> Backend for Faulty<B> {
    type Weight = B::Weight;
    type Buffer = B::Buffer;
    type KvPool = B::KvPool;
    type Found = B::Found;

    fn name(&self) -> String {
        format!("faulty {}", self.inner.name())
    }
    fn runs_ahead(&self) -> bool {
        self.runs_ahead
    }
    fn built(&self) -> DeviceCounters {
        self.shapes.as_ref().map_or_else(DeviceCounters::default, |shapes| DeviceCounters {
            module_loads: 1,
            graph_captures: {
                let shapes = shapes.lock().unwrap();
                (shapes.rows.len() + shapes.contexts.len()) as u64
            },
            ..DeviceCounters::default()
        })
    }
    fn close_fence(&self, closed: bool) {
        if let Some(shapes) = &self.shapes {
            shapes.lock().unwrap().is_closed = closed;
        }
    }
    fn attention(
        &self,
        q: &B::Buffer,
        pool: &B::KvPool,
        layer: usize,
        shape: AttentionShape,
        spans: &[AttentionSpan<'_>],
        out: &mut B::Buffer,
    ) {
        if let Some(shapes) = &self.shapes {
            let ends = spans.iter().map(|span| span.first_position + span.n_rows);
            let longest = ends.max().unwrap_or(0).max(PAGE_TOKENS).next_power_of_two();
            shapes.lock().unwrap().build(|shapes| (&mut shapes.contexts, longest));
        }
        self.inner.attention(q, pool, layer, shape, spans, out);
    }
    fn largest(&self, x: &B::Buffer, n_rows: usize, width: usize, limit: usize) -> B::Found {
        self.inner.largest(x, n_rows, width, limit)
    }
    fn draw(&self, x: &mut B::Buffer, width: usize, draws: Draws<'_>) -> B::Found {
        self.inner.draw(x, width, draws)
    }
    fn found(&self, found: &B::Found) -> Vec<Largest> {
        let mut found = self.inner.found(found);
        if let Some(index) = self.stuck_on {
            found.iter_mut().for_each(|found| found.index = index);
        }
        found
    }
    fn weight(&self, view: &WeightView<'_>) -> Result<B::Weight, KernelError> {
        self.count_allocation();
        self.inner.weight(view)
    }
    fn weight_shape(&self, weight: &B::Weight) -> (usize, usize) {
        self.inner.weight_shape(weight)
    }
    fn buffer(&self, len: usize) -> Result<B::Buffer, KernelError> {
        self.count_allocation();
        self.inner.buffer(len)
    }
    fn kv_pool(&self, shape: KvShape) -> Result<B::KvPool, KernelError> {
        self.count_allocation();
        let mut pool = self.inner.kv_pool(shape)?;
        if self.poisons_pages {
            // All bits set are no number in any float.
            let poison = vec![0xff; self.inner.kv_page_bytes(&pool)];
            for page in 0..u32::try_from(shape.n_pages).unwrap() {
                self.inner.kv_write_page(&mut pool, PageId(page), &poison);
            }
        }
        Ok(pool)
    }

    fn kv_page_bytes(&self, pool: &B::KvPool) -> usize {
        self.inner.kv_page_bytes(pool)
    }

    fn embed(&self, table: &B::Weight, ids: &[TokenId], scale: f32, out: &mut B::Buffer) {
        assert!(!ids.iter().any(|id| Some(id.0) == self.faults.panic), "injected panic");
        let n_rows = u32::try_from(ids.len()).unwrap();
        let slow = if self.slow.load(Ordering::Acquire) { SLOW } else { Duration::ZERO };
        std::thread::sleep(self.delay + slow + self.row_delay * n_rows);
        if let Some((token, released)) = &self.hang
            && ids.iter().any(|id| id.0 == *token)
        {
            assert!(released.recv().is_err(), "nothing is ever sent");
        }
        if let Some(shapes) = &self.shapes {
            let mut shapes = shapes.lock().unwrap();
            shapes.n_computed += ids.len();
            shapes.build(|shapes| (&mut shapes.rows, ids.len()));
        }
        self.inner.embed(table, ids, scale, out);
        let width = self.inner.weight_shape(table).1;
        let mut values = vec![0.0; ids.len() * width];
        self.inner.read(out, &mut values);
        for (row, id) in values.chunks_mut(width).zip(ids) {
            if Some(id.0) == self.faults.nan {
                row.fill(f32::NAN);
            }
        }
        if self.depends_on_the_batch {
            // As if sums were taken in another order, only more so.
            let more = 1.0 + 0.01 * f32::from(u16::try_from(ids.len()).unwrap());
            values.iter_mut().for_each(|x| *x *= more);
        }
        self.inner.write(out, &values);
    }

    fn kv_write(
        &self,
        pool: &mut B::KvPool,
        layer: usize,
        k: &B::Buffer,
        v: &B::Buffer,
        slots: &[KvSlot],
    ) {
        self.inner.kv_write(pool, layer, k, v, slots);
        if self.faults.rot == Some(self.n_writes.fetch_add(1, Ordering::Relaxed)) {
            let first = KvSlot { page: PageId(0), offset: 0 };
            self.inner.kv_write(pool, layer, k, v, &[first]);
        }
    }

    forward! {
        write(&self, buffer: &mut B::Buffer, values: &[f32]);
        read(&self, buffer: &B::Buffer, values: &mut [f32]);
        kv_copy_page(&self, pool: &mut B::KvPool, from: PageId, to: PageId);
        kv_move(&self, pool: &mut B::KvPool, layer: usize, moves: &[KvMove], rope: Option<&Rope>);
        kv_read_page(&self, pool: &B::KvPool, page: PageId, bytes: &mut [u8]);
        kv_write_page(&self, pool: &mut B::KvPool, page: PageId, bytes: &[u8]);
        norm(&self, kind: NormKind, x: &B::Buffer, n_rows: usize, weight: &B::Buffer, eps: f32,
            out: &mut B::Buffer);
        norm_in_place(&self, kind: NormKind, x: &mut B::Buffer, n_rows: usize, weight: &B::Buffer,
            eps: f32);
        norm_add(&self, kind: NormKind, x: &B::Buffer, n_rows: usize, weight: &B::Buffer, eps: f32,
            y: &mut B::Buffer);
        layer_norm(&self, x: &mut B::Buffer, n_rows: usize, weight: &B::Buffer, bias: &B::Buffer,
            eps: f32);
        linear(&self, x: &B::Buffer, n_rows: usize, weight: &B::Weight, bias: Option<&B::Buffer>,
            out: &mut B::Buffer);
        linear_qkv(&self, x: &B::Buffer, n_rows: usize, weights: [&B::Weight; 3],
            biases: Option<[&B::Buffer; 3]>, outs: [&mut B::Buffer; 3]);
        linear_add(&self, x: &B::Buffer, n_rows: usize, weight: &B::Weight,
            bias: Option<&B::Buffer>, scale: f32, y: &mut B::Buffer);
        linear_add_rows(&self, x: &B::Buffer, weight: &B::Weight, rows: &[u32], scales: &[f32],
            y: &mut B::Buffer);
        linear_gate(&self, x: &B::Buffer, n_rows: usize, gate: &B::Weight, up: &B::Weight,
            activation: GateActivation, out: &mut B::Buffer);
        linear_gelu(&self, x: &B::Buffer, n_rows: usize, weight: &B::Weight, bias: &B::Buffer,
            out: &mut B::Buffer);
        rope(&self, x: &mut B::Buffer, n_heads: usize, head_dim: usize, positions: &[u32],
            rope: &Rope);
        attention_full(&self, q: &B::Buffer, k: &B::Buffer, v: &B::Buffer, shape: AttentionShape,
            spans: &[Span], out: &mut B::Buffer);
        gather_rows(&self, x: &B::Buffer, width: usize, rows: &[u32], out: &mut B::Buffer);
        add(&self, x: &mut B::Buffer, y: &B::Buffer, len: usize);
        scale_and_cap(&self, x: &mut B::Buffer, len: usize, scale: f32, soft_cap: Option<f32>);
        mean_rows(&self, x: &B::Buffer, width: usize, spans: &[Span], out: &mut B::Buffer);
    }
}
