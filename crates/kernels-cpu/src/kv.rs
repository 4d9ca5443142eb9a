//! [`CpuKvPool`]: the KV pages.
//!
//! A page holds, for each layer and then each KV head, the keys as sixteen tiles of sixteen tokens,
//! `(256 / 16, D, 16)`, and then the values as `(256, D')`, D' being D rounded up to sixteen. A key
//! tile gives sixteen scores at once without a horizontal sum; a value row is read whole. A pool of
//! int8 has the f32 scales of the keys and then of the values behind them, `(256)` each.
#![expect(unsafe_code, reason = "threads write disjoint heads of one pool")]

use std::ops::Range;

use crate::disjoint::Parts;
use crate::memory::Bytes;
use crate::pool::Pool;
use exrail_kernels::{KernelError, KvDtype, KvShape, KvSlot, PAGE_TOKENS, PageId, int8_scale};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Slots that one thread fills alone (about 1 µs a slot).
const FEW_SLOTS: usize = 4;
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
        let len = pool_bytes(&shape);
        let bytes = len.and_then(Bytes::alone).ok_or_else(|| KernelError::OutOfMemory {
            what: "the KV page pool".to_owned(),
            wanted_bytes: len.unwrap_or(usize::MAX),
            device: device(),
        })?;
        Ok(CpuKvPool { shape, bytes })
    }

    /// Bytes of all pages.
    #[cfg(test)]
    pub(crate) fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Bytes of all layers of a page.
    pub(crate) fn page_bytes(&self) -> usize {
        self.shape.n_layers * self.shape.n_kv_heads * head_bytes(&self.shape)
    }

    /// Where a page is.
    fn page(&self, page: PageId) -> Range<usize> {
        let len = self.page_bytes();
        let start = page.0 as usize * len;
        start..start + len
    }

    /// Copies all layers of a page.
    pub(crate) fn copy_page(&mut self, from: PageId, to: PageId) {
        let (from, to) = (self.page(from), self.page(to));
        self.bytes.copy_within(from, to.start);
    }

    /// Copies all layers of a page out.
    pub(crate) fn read_page(&self, page: PageId, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.bytes[self.page(page)]);
    }

    /// Copies all layers of a page in.
    pub(crate) fn write_page(&mut self, page: PageId, bytes: &[u8]) {
        let range = self.page(page);
        self.bytes[range].copy_from_slice(bytes);
    }

    /// One head of one layer of one page.
    #[inline(always)]
    pub(crate) fn head(&self, page: PageId, layer: usize, head: usize) -> Head<'_> {
        let len = head_bytes(&self.shape);
        let bytes = &self.bytes[head_index(&self.shape, page, layer, head) * len..][..len];
        let (keys, rest) = bytes.split_at(key_bytes(&self.shape));
        let (values, scales) = rest.split_at(value_bytes(&self.shape));
        Head { keys, values, scales }
    }

    /// Stores rows `(T, K * D)`, several heads at once if there are enough rows.
    pub(crate) fn write(
        &mut self,
        threads: &Pool,
        layer: usize,
        (k, v): (&[f32], &[f32]),
        slots: &[KvSlot],
    ) {
        let shape = self.shape;
        let (n_heads, width) = (shape.n_kv_heads, shape.head_dim);
        let (k, v) = (&k[..slots.len() * n_heads * width], &v[..slots.len() * n_heads * width]);
        let parts = Parts::new(&mut self.bytes, head_bytes(&shape));
        let write = |head: usize| {
            for (i, slot) in slots.iter().enumerate() {
                // SAFETY: this call has the parts of one head, of which it uses one at a time.
                let bytes = unsafe { parts.part(head_index(&shape, slot.page, layer, head)) };
                let start = (i * n_heads + head) * width;
                let row = start..start + width;
                write_head(&shape, bytes, slot.offset as usize, (&k[row.clone()], &v[row]));
            }
        };
        if slots.len() < FEW_SLOTS {
            return (0..n_heads).for_each(write);
        }
        threads.run(n_heads, &write);
    }
}

/// Bytes of a pool; `None`: more than a number holds.
pub(crate) fn pool_bytes(shape: &KvShape) -> Option<usize> {
    let factors = [shape.n_pages, shape.n_layers, shape.n_kv_heads];
    factors.into_iter().try_fold(head_bytes(shape), usize::checked_mul)
}

/// The number of a head's part among those of all pages.
fn head_index(shape: &KvShape, page: PageId, layer: usize, head: usize) -> usize {
    assert!(layer < shape.n_layers && head < shape.n_kv_heads, "layer {layer}, head {head}");
    (page.0 as usize * shape.n_layers + layer) * shape.n_kv_heads + head
}

/// Stores the keys and values of one token in its head's part of a page.
fn write_head(shape: &KvShape, bytes: &mut [u8], offset: usize, (k, v): (&[f32], &[f32])) {
    assert!(offset < PAGE_TOKENS, "slot offset {offset}");
    let (keys, rest) = bytes.split_at_mut(key_bytes(shape));
    let (values, scales) = rest.split_at_mut(value_bytes(shape));
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
