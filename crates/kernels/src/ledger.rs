//! [`Ledger`]: a device that allocates nothing and notes what would be. What loads a model and starts an
//! engine on a device says so of a ledger, too, by the same code.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{
    AttentionShape, AttentionSpan, Backend, Draws, Extent, Footprint, GateActivation, KernelError,
    KvMove, KvShape, KvSlot, Largest, NormKind, PageId, Rope, Span, TokenId, WeightShape,
    WeightView,
};

/// A matrix that would be on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerWeight {
    /// Tensor name.
    pub name: String,
    /// Format, rows and columns.
    pub shape: WeightShape,
    /// Bytes on the device.
    pub bytes: Extent,
}

/// What was asked for so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// Matrices, in the order of the calls.
    pub weights: Vec<LedgerWeight>,
    /// Bytes of all buffers.
    pub buffer_bytes: usize,
    /// Bytes of all page pools.
    pub kv_bytes: usize,
}

/// Counts allocations by a [`Footprint`]. Clones share the count. A view's bytes may be empty.
///
/// # Panics
/// Every operation does: there is nothing to compute with.
#[derive(Clone)]
pub struct Ledger {
    footprint: Arc<dyn Footprint>,
    entries: Arc<Mutex<Entries>>,
}

impl Ledger {
    /// An empty one.
    #[must_use]
    pub fn new(footprint: Arc<dyn Footprint>) -> Ledger {
        Ledger { footprint, entries: Arc::default() }
    }

    /// What was asked for since the last call.
    #[must_use]
    pub fn take(&self) -> Entries {
        std::mem::take(&mut *self.entries())
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Every change is one addition: nothing is half done.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn too_much(&self, what: &str) -> KernelError {
        KernelError::OutOfMemory {
            what: what.to_owned(),
            wanted_bytes: usize::MAX,
            device: self.name(),
        }
    }
}

/// Operations that nobody asks of a ledger.
macro_rules! nothing_to_compute_with {
    ($($name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {$(
        fn $name(&self, $($argument: $type),*) {
            $(let _ = $argument;)*
            unreachable!("a ledger has nothing to compute `{}` with", stringify!($name));
        }
    )*};
}

impl Backend for Ledger {
    type Weight = (usize, usize);
    type Buffer = usize;
    type KvPool = ();
    type Found = ();

    fn name(&self) -> String {
        self.footprint.name()
    }

    fn weight(&self, view: &WeightView<'_>) -> Result<(usize, usize), KernelError> {
        let shape = WeightShape::of(view);
        if shape.dtype.row_bytes(shape.columns).is_none() {
            view.row_bytes()?;
        }
        let bytes = self.footprint.weight_bytes(&shape);
        let bytes = bytes.ok_or_else(|| self.too_much(&format!("weight `{}`", view.name)))?;
        let name = view.name.to_owned();
        self.entries().weights.push(LedgerWeight { name, shape, bytes });
        Ok((view.rows, view.columns))
    }

    fn weight_shape(&self, weight: &(usize, usize)) -> (usize, usize) {
        *weight
    }

    fn buffer(&self, len: usize) -> Result<usize, KernelError> {
        let bytes = self.footprint.buffer_bytes(len).ok_or_else(|| self.too_much("activations"))?;
        let mut entries = self.entries();
        entries.buffer_bytes = entries.buffer_bytes.saturating_add(bytes);
        Ok(len)
    }

    fn write(&self, _buffer: &mut usize, _values: &[f32]) {}

    fn kv_pool(&self, shape: KvShape) -> Result<(), KernelError> {
        let bytes = self.footprint.kv_pool_bytes(&shape);
        let bytes = bytes.ok_or_else(|| self.too_much("the KV page pool"))?;
        let mut entries = self.entries();
        entries.kv_bytes = entries.kv_bytes.saturating_add(bytes);
        Ok(())
    }

    fn found(&self, (): &()) -> Vec<Largest> {
        unreachable!("a ledger never finds the largest of anything");
    }

    fn kv_page_bytes(&self, (): &()) -> usize {
        unreachable!("a ledger has no pages");
    }

    nothing_to_compute_with! {
        largest(x: &usize, n_rows: usize, width: usize, limit: usize);
        draw(x: &mut usize, width: usize, draws: Draws<'_>);
        read(buffer: &usize, values: &mut [f32]);
        kv_copy_page(pool: &mut (), from: PageId, to: PageId);
        kv_move(pool: &mut (), layer: usize, moves: &[KvMove], rope: Option<&Rope>);
        kv_read_page(pool: &(), page: PageId, bytes: &mut [u8]);
        kv_write_page(pool: &mut (), page: PageId, bytes: &[u8]);
        embed(table: &(usize, usize), ids: &[TokenId], scale: f32, out: &mut usize);
        norm(kind: NormKind, x: &usize, n_rows: usize, weight: &usize, eps: f32, out: &mut usize);
        norm_in_place(kind: NormKind, x: &mut usize, n_rows: usize, weight: &usize, eps: f32);
        norm_add(kind: NormKind, x: &usize, n_rows: usize, weight: &usize, eps: f32,
            y: &mut usize);
        layer_norm(x: &mut usize, n_rows: usize, weight: &usize, bias: &usize, eps: f32);
        linear(x: &usize, n_rows: usize, weight: &(usize, usize), bias: Option<&usize>,
            out: &mut usize);
        linear_qkv(x: &usize, n_rows: usize, weights: [&(usize, usize); 3],
            biases: Option<[&usize; 3]>, outs: [&mut usize; 3]);
        linear_add(x: &usize, n_rows: usize, weight: &(usize, usize), bias: Option<&usize>,
            scale: f32, y: &mut usize);
        linear_add_rows(x: &usize, weight: &(usize, usize), rows: &[u32], scales: &[f32],
            y: &mut usize);
        linear_gate(x: &usize, n_rows: usize, gate: &(usize, usize), up: &(usize, usize),
            activation: GateActivation, out: &mut usize);
        linear_gelu(x: &usize, n_rows: usize, weight: &(usize, usize), bias: &usize,
            out: &mut usize);
        rope(x: &mut usize, n_heads: usize, head_dim: usize, positions: &[u32], rope: &Rope);
        kv_write(pool: &mut (), layer: usize, k: &usize, v: &usize, slots: &[KvSlot]);
        attention(q: &usize, pool: &(), layer: usize, shape: AttentionShape,
            spans: &[AttentionSpan<'_>], out: &mut usize);
        attention_full(q: &usize, k: &usize, v: &usize, shape: AttentionShape, spans: &[Span],
            out: &mut usize);
        gather_rows(x: &usize, width: usize, rows: &[u32], out: &mut usize);
        add(x: &mut usize, y: &usize, len: usize);
        scale_and_cap(x: &mut usize, len: usize, scale: f32, soft_cap: Option<f32>);
        mean_rows(x: &usize, width: usize, spans: &[Span], out: &mut usize);
    }
}
