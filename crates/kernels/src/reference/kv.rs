//! The paged key/value pool.

use half::f16;

use super::{rope, zeroed};
use crate::{KernelError, KvDtype, KvMove, KvShape, KvSlot, PAGE_TOKENS, PageId, Rope, int8_scale};

/// Keys and values of all pages, `(page, layer, offset, K * D)` each, held as f32. They are rounded
/// when they are written: in a pool of [`KvDtype::F16`] each value to half precision (to nearest,
/// ties to even), in one of [`KvDtype::Int8`] each head of a row as [`int8_scale`] says.
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

    /// Keys of a page, and as many values.
    fn page_len(&self) -> usize {
        self.shape.n_layers * PAGE_TOKENS * self.row_len()
    }

    /// See [`crate::Backend::kv_page_bytes`].
    pub(super) fn page_bytes(&self) -> usize {
        2 * size_of::<f32>() * self.page_len()
    }

    /// See [`crate::Backend::kv_read_page`]: the keys, then the values.
    pub(super) fn read_page(&self, page: PageId, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), self.page_bytes(), "bytes of a page");
        let start = self.row_start(0, page, 0);
        let range = start..start + self.page_len();
        let floats = self.keys[range.clone()].iter().chain(&self.values[range]);
        for (bytes, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(floats) {
            *bytes = x.to_le_bytes();
        }
    }

    /// See [`crate::Backend::kv_write_page`].
    pub(super) fn write_page(&mut self, page: PageId, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.page_bytes(), "bytes of a page");
        let start = self.row_start(0, page, 0);
        let range = start..start + self.page_len();
        let floats = self.keys[range.clone()].iter_mut().chain(&mut self.values[range]);
        for (x, bytes) in floats.zip(bytes.as_chunks::<4>().0) {
            *x = f32::from_le_bytes(*bytes);
        }
    }

    /// See [`crate::Backend::kv_copy_page`].
    pub(super) fn copy_page(&mut self, from: PageId, to: PageId) {
        let len = self.page_len();
        let (from, to) = (from.0 as usize * len, to.0 as usize * len);
        self.keys.copy_within(from..from + len, to);
        self.values.copy_within(from..from + len, to);
    }

    /// See [`crate::Backend::kv_write`].
    pub(super) fn write(&mut self, layer: usize, k: &[f32], v: &[f32], slots: &[KvSlot]) {
        let (width, head_dim) = (self.row_len(), self.shape.head_dim);
        for (t, slot) in slots.iter().enumerate() {
            let start = self.row_start(layer, slot.page, slot.offset as usize);
            for c in (0..width).step_by(head_dim) {
                let (from, to) = (t * width + c, start + c);
                let (k, v) = (&k[from..from + head_dim], &v[from..from + head_dim]);
                store(self.shape.dtype, k, &mut self.keys[to..to + head_dim]);
                store(self.shape.dtype, v, &mut self.values[to..to + head_dim]);
            }
        }
    }

    /// See [`crate::Backend::kv_move`].
    pub(super) fn move_slots(&mut self, layer: usize, moves: &[KvMove], rope: Option<&Rope>) {
        let (width, head_dim) = (self.row_len(), self.shape.head_dim);
        for &KvMove { from, to, distance } in moves {
            let from = self.row_start(layer, from.page, from.offset as usize);
            let to = self.row_start(layer, to.page, to.offset as usize);
            self.keys.copy_within(from..from + width, to);
            self.values.copy_within(from..from + width, to);
            let Some(rope) = rope.filter(|_| distance != 0) else { continue };
            for key in self.keys[to..to + width].chunks_exact_mut(head_dim) {
                let mut turned = key.to_vec();
                rope::turn(&mut turned, f64::from(distance), rope, 1.0);
                store(self.shape.dtype, &turned, key);
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
}

/// Rounds one key or value.
fn store(dtype: KvDtype, x: &[f32], out: &mut [f32]) {
    match dtype {
        KvDtype::F32 => out.copy_from_slice(x),
        KvDtype::F16 => {
            for (out, &x) in out.iter_mut().zip(x) {
                *out = f16::from_f32(x).to_f32();
            }
        }
        KvDtype::Int8 => {
            let (factor, scale) = int8_scale(x);
            for (out, &x) in out.iter_mut().zip(x) {
                *out = scale * (factor * x).round_ties_even();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn int8_moves_a_value_by_half_a_step_at_most_and_keeps_faults() {
        let x: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let mut stored = vec![0.0; x.len()];
        store(KvDtype::Int8, &x, &mut stored);
        let largest = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        for (x, stored) in x.iter().zip(&stored) {
            assert!((x - stored).abs() <= largest / 254.0 * 1.0001, "{x} became {stored}");
        }
        assert!(stored.iter().any(|stored| stored.abs() >= largest * 0.9999));

        let mut stored = [1.0; 3];
        store(KvDtype::Int8, &[0.0, -0.0, 1e-36], &mut stored);
        assert_eq!(stored, [0.0; 3]);
        for fault in [f32::NAN, f32::INFINITY] {
            store(KvDtype::Int8, &[0.0, fault, 1.0], &mut stored);
            assert!(stored.iter().all(|x| x.is_nan()));
        }
    }
}
