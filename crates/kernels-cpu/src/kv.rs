//! [`CpuKvPool`]: the KV pages.
//!
//! A page holds, for each layer and then each KV head, the keys as sixteen tiles of sixteen tokens,
//! `(256 / 16, D, 16)`, and then the values as `(256, D')`, D' being D rounded up to sixteen. A key
//! tile gives sixteen scores at once without a horizontal sum; a value row is read whole. A pool of
//! int8 has the f32 scales of the keys and then of the values behind them, `(256)` each.

use crate::memory::Bytes;
use exrail_kernels::{KernelError, KvDtype, KvShape, KvSlot, PAGE_TOKENS, PageId, int8_scale};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Tokens of a key tile.
pub(crate) const TOKENS: usize = 16;

/// The KV page pool of the CPU.
#[derive(Debug)]
pub struct CpuKvPool {
    shape: KvShape,
    bytes: Bytes,
}

/// The parts of one head of a page.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    pub(crate) keys: &'a [u8],
    pub(crate) values: &'a [u8],
    /// Of the keys and of the values; empty but for int8.
    pub(crate) scales: &'a [u8],
}

impl CpuKvPool {
    pub(crate) fn new(
        shape: KvShape,
        device: impl Fn() -> String,
    ) -> Result<CpuKvPool, KernelError> {
        let len = [shape.n_pages, shape.n_layers, shape.n_kv_heads]
            .into_iter()
            .try_fold(head_bytes(&shape), usize::checked_mul);
        let bytes = len.and_then(Bytes::alone).ok_or_else(|| KernelError::OutOfMemory {
            what: "the KV page pool".to_owned(),
            wanted_bytes: len.unwrap_or(usize::MAX),
            device: device(),
        })?;
        Ok(CpuKvPool { shape, bytes })
    }

    pub(crate) fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Copies all layers of a page.
    pub(crate) fn copy_page(&mut self, from: PageId, to: PageId) {
        let len = self.shape.n_layers * self.shape.n_kv_heads * head_bytes(&self.shape);
        let from = from.0 as usize * len;
        self.bytes.copy_within(from..from + len, to.0 as usize * len);
    }

    /// One head of one layer of one page.
    #[inline(always)]
    pub(crate) fn head(&self, page: PageId, layer: usize, head: usize) -> Head<'_> {
        let start = self.head_start(page, layer, head);
        let bytes = &self.bytes[start..start + head_bytes(&self.shape)];
        let (keys, rest) = bytes.split_at(key_bytes(&self.shape));
        let (values, scales) = rest.split_at(value_bytes(&self.shape));
        Head { keys, values, scales }
    }

    /// Stores rows `(T, K * D)`.
    pub(crate) fn write(&mut self, layer: usize, k: &[f32], v: &[f32], slots: &[KvSlot]) {
        let width = self.shape.head_dim;
        let row = self.shape.n_kv_heads * width;
        let (k, v) = (&k[..slots.len() * row], &v[..slots.len() * row]);
        let heads = k.chunks_exact(width.max(1)).zip(v.chunks_exact(width.max(1)));
        for (i, (k, v)) in heads.enumerate() {
            let (slot, head) = (slots[i / self.shape.n_kv_heads], i % self.shape.n_kv_heads);
            self.write_head(slot, layer, head, (k, v));
        }
    }

    fn write_head(&mut self, slot: KvSlot, layer: usize, head: usize, (k, v): (&[f32], &[f32])) {
        let offset = slot.offset as usize;
        assert!(offset < PAGE_TOKENS, "slot offset {offset}");
        let start = self.head_start(slot.page, layer, head);
        let shape = self.shape;
        let bytes = &mut self.bytes[start..start + head_bytes(&shape)];
        let (keys, rest) = bytes.split_at_mut(key_bytes(&shape));
        let (values, scales) = rest.split_at_mut(value_bytes(&shape));
        let tile = offset / TOKENS * TOKENS * shape.head_dim;
        let value_row = offset * padded_head(shape.head_dim);
        match shape.dtype {
            KvDtype::F32 => {
                let (keys, values) = (keys.as_chunks_mut::<4>().0, values.as_chunks_mut::<4>().0);
                for (d, &x) in k.iter().enumerate() {
                    keys[tile + d * TOKENS + offset % TOKENS] = x.to_le_bytes();
                }
                for (d, &x) in v.iter().enumerate() {
                    values[value_row + d] = x.to_le_bytes();
                }
            }
            KvDtype::F16 => {
                let (keys, values) = (keys.as_chunks_mut::<2>().0, values.as_chunks_mut::<2>().0);
                // A slice at a time: the crate asks for the processor's instruction once a call.
                let mut halves = [f16::ZERO; 64];
                for (i, (k, v)) in k.chunks(64).zip(v.chunks(64)).enumerate() {
                    let halves = &mut halves[..k.len()];
                    halves.convert_from_f32_slice(k);
                    for (d, x) in halves.iter().enumerate() {
                        keys[tile + (64 * i + d) * TOKENS + offset % TOKENS] = x.to_le_bytes();
                    }
                    halves.convert_from_f32_slice(v);
                    for (d, x) in halves.iter().enumerate() {
                        values[value_row + 64 * i + d] = x.to_le_bytes();
                    }
                }
            }
            KvDtype::Int8 => {
                let scales = scales.as_chunks_mut::<4>().0;
                let (factor, scale) = int8_scale(k);
                scales[offset] = scale.to_le_bytes();
                for (d, &x) in k.iter().enumerate() {
                    keys[tile + d * TOKENS + offset % TOKENS] = int8(factor * x);
                }
                let (factor, scale) = int8_scale(v);
                scales[PAGE_TOKENS + offset] = scale.to_le_bytes();
                for (d, &x) in v.iter().enumerate() {
                    values[value_row + d] = int8(factor * x);
                }
            }
        }
    }

    fn head_start(&self, page: PageId, layer: usize, head: usize) -> usize {
        let shape = &self.shape;
        assert!(layer < shape.n_layers && head < shape.n_kv_heads, "layer {layer}, head {head}");
        ((page.0 as usize * shape.n_layers + layer) * shape.n_kv_heads + head) * head_bytes(shape)
    }
}

/// D rounded up to whole vectors.
pub(crate) fn padded_head(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// The two's complement of the nearest integer.
fn int8(x: f32) -> u8 {
    (x.round_ties_even() as i8).cast_unsigned()
}

fn element_bytes(shape: &KvShape) -> usize {
    match shape.dtype {
        KvDtype::F32 => 4,
        KvDtype::F16 => 2,
        KvDtype::Int8 => 1,
    }
}

fn key_bytes(shape: &KvShape) -> usize {
    PAGE_TOKENS * shape.head_dim * element_bytes(shape)
}

fn value_bytes(shape: &KvShape) -> usize {
    PAGE_TOKENS * padded_head(shape.head_dim) * element_bytes(shape)
}

fn head_bytes(shape: &KvShape) -> usize {
    let scales = match shape.dtype {
        KvDtype::F32 | KvDtype::F16 => 0,
        KvDtype::Int8 => 2 * PAGE_TOKENS * 4,
    };
    key_bytes(shape) + value_bytes(shape) + scales
}
