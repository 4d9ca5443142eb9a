//! [`CpuKvPool`]: the KV pages.
//!
//! A page holds, for each layer and then each KV head, the keys as sixteen tiles of sixteen tokens,
//! `(256 / 16, D, 16)`, and then the values as `(256, D')`, D' being D rounded up to sixteen. A key
//! tile gives sixteen scores at once without a horizontal sum; a value row is read whole. A pool of
//! int8 has the f32 scales of the keys and then of the values behind them, `(256)` each.
#![expect(unsafe_code, reason = "threads write disjoint heads of one pool")]

use std::collections::BTreeMap;
use std::ops::Range;

use crate::disjoint::Parts;
use crate::memory::Bytes;
use crate::pool::Pool;
use exrail_kernels::{
    KernelError, KvDtype, KvMove, KvShape, KvSlot, PAGE_TOKENS, PageId, Rope, RopeStyle, int8_scale,
};
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

    /// Moves keys and values of a layer one after the other, several heads at once.
    pub(crate) fn move_slots(
        &mut self,
        threads: &Pool,
        layer: usize,
        moves: &[KvMove],
        turns: &Turns,
    ) {
        let shape = self.shape;
        let parts = Parts::new(&mut self.bytes, head_bytes(&shape));
        threads.run(shape.n_kv_heads, &|head: usize| {
            let (mut bits, mut key) = (Bits::default(), vec![0.0; shape.head_dim]);
            for &KvMove { from, to, distance } in moves {
                // SAFETY: this call has the parts of one head, of which it uses one at a time.
                let bytes = unsafe { parts.part(head_index(&shape, from.page, layer, head)) };
                bits.read(&shape, bytes, from.offset as usize);
                // SAFETY: as above, and the part in front is not used any more.
                let bytes = unsafe { parts.part(head_index(&shape, to.page, layer, head)) };
                bits.write(&shape, bytes, to.offset as usize);
                if let Some(turn) = turns.by(distance) {
                    read_key(&shape, bytes, to.offset as usize, &mut key);
                    turn.apply(&mut key);
                    write_key(&shape, bytes, to.offset as usize, &key);
                }
            }
        });
    }
}

/// How keys turn by the distances of some moves.
pub(crate) struct Turns<'a> {
    rope: Option<&'a Rope>,
    /// Cosines and sines `(pairs)` of each distance.
    by_distance: BTreeMap<i32, Vec<(f32, f32)>>,
}

/// How one key turns.
struct Turn<'a> {
    style: RopeStyle,
    pairs: &'a [(f32, f32)],
}

impl<'a> Turns<'a> {
    /// Moves have few distances, one for each range that is kept.
    ///
    /// # Panics
    /// When the pairs do not fit a head of `head_dim`.
    pub(crate) fn new(rope: Option<&'a Rope>, moves: &[KvMove], head_dim: usize) -> Turns<'a> {
        let mut by_distance = BTreeMap::new();
        if let Some(rope) = rope {
            let n_pairs = rope.inverse_frequencies.len();
            assert!(2 * n_pairs <= head_dim, "{n_pairs} pairs do not fit a head of {head_dim}");
            // Angles are f64, as those of the rotation are.
            let pair = |distance: i32, frequency: f32| {
                let (sin, cos) = (f64::from(distance) * f64::from(frequency)).sin_cos();
                (cos as f32, sin as f32)
            };
            for &KvMove { distance, .. } in moves {
                let pairs =
                    || rope.inverse_frequencies.iter().map(|&f| pair(distance, f)).collect();
                by_distance.entry(distance).or_insert_with(pairs);
            }
        }
        Turns { rope, by_distance }
    }

    /// `None`: it keeps its bits.
    fn by(&self, distance: i32) -> Option<Turn<'_>> {
        let rope = self.rope.filter(|_| distance != 0)?;
        Some(Turn { style: rope.style, pairs: self.by_distance.get(&distance)? })
    }
}

impl Turn<'_> {
    fn apply(&self, key: &mut [f32]) {
        for (i, &(cos, sin)) in self.pairs.iter().enumerate() {
            let (first, second) = match self.style {
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                RopeStyle::Halves => (i, i + self.pairs.len()),
            };
            let (a, b) = (key[first], key[second]);
            key[first] = a * cos - b * sin;
            key[second] = a * sin + b * cos;
        }
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
    write_key(shape, bytes, offset, k);
    write_value(shape, bytes, offset, v);
}

/// Stores the key of one token in its head's part of a page.
fn write_key(shape: &KvShape, bytes: &mut [u8], offset: usize, k: &[f32]) {
    let Entry { keys, scales, key, .. } = entry(shape, bytes, offset);
    match shape.dtype {
        KvDtype::F32 => {
            let keys = keys.as_chunks_mut::<4>().0;
            for (d, &x) in k.iter().enumerate() {
                keys[key + d * TOKENS] = x.to_le_bytes();
            }
        }
        KvDtype::F16 => {
            let keys = keys.as_chunks_mut::<2>().0;
            // A slice at a time: the crate asks for the processor's instruction once a call.
            let mut halves = [f16::ZERO; 64];
            for (i, k) in k.chunks(64).enumerate() {
                let halves = &mut halves[..k.len()];
                halves.convert_from_f32_slice(k);
                for (d, x) in halves.iter().enumerate() {
                    keys[key + (64 * i + d) * TOKENS] = x.to_le_bytes();
                }
            }
        }
        KvDtype::Int8 => {
            let (factor, scale) = int8_scale(k);
            scales.as_chunks_mut::<4>().0[offset] = scale.to_le_bytes();
            for (d, &x) in k.iter().enumerate() {
                keys[key + d * TOKENS] = int8(factor * x);
            }
        }
    }
}

/// Stores the value of one token in its head's part of a page.
fn write_value(shape: &KvShape, bytes: &mut [u8], offset: usize, v: &[f32]) {
    let Entry { values, scales, value, .. } = entry(shape, bytes, offset);
    match shape.dtype {
        KvDtype::F32 => {
            for (to, &x) in values.as_chunks_mut::<4>().0[value..].iter_mut().zip(v) {
                *to = x.to_le_bytes();
            }
        }
        KvDtype::F16 => {
            let mut halves = [f16::ZERO; 64];
            let values = &mut values.as_chunks_mut::<2>().0[value..];
            for (to, v) in values.chunks_mut(64).zip(v.chunks(64)) {
                let halves = &mut halves[..v.len()];
                halves.convert_from_f32_slice(v);
                for (to, x) in to.iter_mut().zip(halves.iter()) {
                    *to = x.to_le_bytes();
                }
            }
        }
        KvDtype::Int8 => {
            let (factor, scale) = int8_scale(v);
            scales.as_chunks_mut::<4>().0[PAGE_TOKENS + offset] = scale.to_le_bytes();
            for (to, &x) in values[value..].iter_mut().zip(v) {
                *to = int8(factor * x);
            }
        }
    }
}

/// The key of one token, as attention reads it, into `k` `(D)`.
fn read_key(shape: &KvShape, bytes: &mut [u8], offset: usize, k: &mut [f32]) {
    let Entry { keys, scales, key, .. } = entry(shape, bytes, offset);
    let at = |d: usize| key + d * TOKENS;
    match shape.dtype {
        KvDtype::F32 => {
            let keys = keys.as_chunks::<4>().0;
            k.iter_mut().enumerate().for_each(|(d, k)| *k = f32::from_le_bytes(keys[at(d)]));
        }
        KvDtype::F16 => {
            let keys = keys.as_chunks::<2>().0;
            let value = |d: usize| f16::from_le_bytes(keys[at(d)]).to_f32();
            k.iter_mut().enumerate().for_each(|(d, k)| *k = value(d));
        }
        KvDtype::Int8 => {
            let scale = f32::from_le_bytes(scales.as_chunks::<4>().0[offset]);
            let value = |d: usize| scale * f32::from(keys[at(d)].cast_signed());
            k.iter_mut().enumerate().for_each(|(d, k)| *k = value(d));
        }
    }
}

/// One token's place in its head's part of a page: the parts, and where its first elements are in them.
struct Entry<'a> {
    keys: &'a mut [u8],
    values: &'a mut [u8],
    scales: &'a mut [u8],
    /// Elements in front of it; element d is d tiles of tokens behind.
    key: usize,
    /// Elements in front of it.
    value: usize,
}

fn entry<'a>(shape: &KvShape, bytes: &'a mut [u8], offset: usize) -> Entry<'a> {
    assert!(offset < PAGE_TOKENS, "slot offset {offset}");
    let (keys, rest) = bytes.split_at_mut(key_bytes(shape));
    let (values, scales) = rest.split_at_mut(value_bytes(shape));
    let key = offset / TOKENS * TOKENS * shape.head_dim + offset % TOKENS;
    Entry { keys, values, scales, key, value: offset * padded_head(shape.head_dim) }
}

/// What one token has in its head's part of a page, bit for bit.
#[derive(Default)]
struct Bits {
    key: Vec<u8>,
    value: Vec<u8>,
    scales: [[u8; 4]; 2],
}

impl Bits {
    fn read(&mut self, shape: &KvShape, bytes: &mut [u8], offset: usize) {
        let width = element_bytes(shape);
        let Entry { keys, values, scales, key, value } = entry(shape, bytes, offset);
        self.key.clear();
        for element in keys[key * width..].chunks(TOKENS * width).take(shape.head_dim) {
            self.key.extend_from_slice(&element[..width]);
        }
        self.value.clear();
        self.value.extend_from_slice(&values[value * width..][..shape.head_dim * width]);
        for (scale, at) in self.scales.iter_mut().zip([offset, PAGE_TOKENS + offset]) {
            *scale = scales.as_chunks::<4>().0.get(at).copied().unwrap_or_default();
        }
    }

    fn write(&self, shape: &KvShape, bytes: &mut [u8], offset: usize) {
        let width = element_bytes(shape);
        let Entry { keys, values, scales, key, value } = entry(shape, bytes, offset);
        let to = keys[key * width..].chunks_mut(TOKENS * width);
        for (to, element) in to.zip(self.key.chunks_exact(width)) {
            to[..width].copy_from_slice(element);
        }
        values[value * width..][..self.value.len()].copy_from_slice(&self.value);
        for (scale, at) in self.scales.iter().zip([offset, PAGE_TOKENS + offset]) {
            if let Some(to) = scales.as_chunks_mut::<4>().0.get_mut(at) {
                *to = *scale;
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
