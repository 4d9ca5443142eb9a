//! The paged key/value pool.

use half::f16;

use super::zeroed;
use crate::{KernelError, KvDtype, KvShape, KvSlot, PAGE_TOKENS, PageId};

/// Keys and values of all pages, `(page, layer, offset, K * D)` each, held as f32; a pool of
/// [`KvDtype::F16`] rounds each value to half precision (to nearest, ties to even) when it is
/// written.
#[derive(Clone, Debug)]
pub struct ReferenceKvPool {
    shape: KvShape,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl ReferenceKvPool {
    /// A zeroed pool.
    pub(super) fn new(shape: KvShape) -> Result<Self, KernelError> {
        let len = [shape.n_layers, PAGE_TOKENS, shape.n_kv_heads, shape.head_dim]
            .iter()
            .fold(shape.n_pages, |len, &factor| len.saturating_mul(factor));
        let keys = zeroed(len, "cached keys")?;
        let values = zeroed(len, "cached values")?;
        Ok(Self { shape, keys, values })
    }

    /// The shape it was made with.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// See [`crate::Backend::kv_copy_page`].
    pub(super) fn copy_page(&mut self, from: PageId, to: PageId) {
        let len = self.shape.n_layers * PAGE_TOKENS * self.row_len();
        let (from, to) = (from.0 as usize * len, to.0 as usize * len);
        self.keys.copy_within(from..from + len, to);
        self.values.copy_within(from..from + len, to);
    }

    /// See [`crate::Backend::kv_write`].
    pub(super) fn write(&mut self, layer: usize, k: &[f32], v: &[f32], slots: &[KvSlot]) {
        let width = self.row_len();
        for (t, slot) in slots.iter().enumerate() {
            let start = self.row_start(layer, slot.page, slot.offset as usize);
            for c in 0..width {
                self.keys[start + c] = self.stored(k[t * width + c]);
                self.values[start + c] = self.stored(v[t * width + c]);
            }
        }
    }

    /// Key of one head at one slot.
    pub(super) fn key(&self, layer: usize, slot: KvSlot, head: usize) -> &[f32] {
        let start = self.row_start(layer, slot.page, slot.offset as usize);
        let start = start + head * self.shape.head_dim;
        &self.keys[start..start + self.shape.head_dim]
    }

    /// Value of one head at one slot.
    pub(super) fn value(&self, layer: usize, slot: KvSlot, head: usize) -> &[f32] {
        let start = self.row_start(layer, slot.page, slot.offset as usize);
        let start = start + head * self.shape.head_dim;
        &self.values[start..start + self.shape.head_dim]
    }

    fn row_len(&self) -> usize {
        self.shape.n_kv_heads * self.shape.head_dim
    }

    fn row_start(&self, layer: usize, page: PageId, offset: usize) -> usize {
        assert!(layer < self.shape.n_layers, "layer {layer} of {}", self.shape.n_layers);
        assert!(offset < PAGE_TOKENS, "offset {offset} of {PAGE_TOKENS}");
        let page = page.0 as usize;
        assert!(page < self.shape.n_pages, "page {page} of {}", self.shape.n_pages);
        ((page * self.shape.n_layers + layer) * PAGE_TOKENS + offset) * self.row_len()
    }

    fn stored(&self, value: f32) -> f32 {
        match self.shape.dtype {
            KvDtype::F32 => value,
            KvDtype::F16 => f16::from_f32(value).to_f32(),
        }
    }
}
