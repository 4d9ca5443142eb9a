//! [`CudaKvPool`]: the page pool; see `cu/pages.cuh`.

#![expect(unsafe_code, reason = "plain data that kernels take by value")]

use std::sync::Arc;

use cudarc::driver::DeviceRepr;
use exrail_kernels::{
    HeadRows, KernelError, KvDtype, KvMove, KvShape, KvSlot, PAGE_TOKENS, PageId, Rope, RopeStyle,
};

use crate::CudaBuffer;
use crate::footprint::{entries_of_page, entry_bytes};
use crate::fresh::Fresh;
use crate::linear::Placement;
use crate::memory::{bytes_of_u32, narrow};
use crate::moves::{Uploads, launches};
use crate::rows::Rotation;
use crate::stream::{Address, Grid, Memory, Stream};

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Pages {
    elements: Address,
    scales: Address,
    n_layers: u32,
    n_kv_heads: u32,
    head_dim: u32,
    dtype: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Pages {}

impl Pages {
    pub(crate) const NONE: Pages = Pages {
        elements: Address(0),
        scales: Address(0),
        n_layers: 0,
        n_kv_heads: 0,
        head_dim: 0,
        dtype: 0,
    };
}

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Heads {
    queries: Address,
    keys: Address,
    values: Address,
    query_norm: Address,
    key_norm: Address,
    eps: f32,
    n_heads: u32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Heads {}

/// Keys and values of all pages, on the device.
#[derive(Debug)]
pub struct CudaKvPool {
    pub(crate) shape: KvShape,
    pub(crate) fresh: Fresh,
    elements: Memory,
    scales: Memory,
}

impl CudaKvPool {
    pub(crate) fn new(stream: &Arc<Stream>, shape: KvShape) -> Result<CudaKvPool, KernelError> {
        let n_entries = entries_of_page(&shape).and_then(|n| n.checked_mul(shape.n_pages));
        let (element_bytes, scale_bytes) = entry_bytes(&shape);
        // What no number holds no device has.
        let of = |bytes: usize| n_entries.map_or(usize::MAX, |n| n.saturating_mul(bytes));
        Ok(CudaKvPool {
            shape,
            fresh: Fresh::new(shape.n_pages),
            elements: Memory::zeroed(stream, of(element_bytes), "the KV pool")?,
            scales: Memory::zeroed(stream, of(scale_bytes), "the KV pool's scales")?,
        })
    }

    /// What kernels take.
    pub(crate) fn pages(&self) -> Pages {
        let dtype = match self.shape.dtype {
            KvDtype::F32 => 0,
            KvDtype::F16 => 1,
            KvDtype::Int8 => 2,
        };
        Pages {
            elements: self.elements.address(),
            scales: self.scales.address(),
            n_layers: narrow(self.shape.n_layers),
            n_kv_heads: narrow(self.shape.n_kv_heads),
            head_dim: narrow(self.shape.head_dim),
            dtype,
        }
    }

    /// See [`exrail_kernels::Backend::kv_copy_page`].
    pub(crate) fn copy_page(&mut self, stream: &Stream, from: PageId, to: PageId) {
        self.check_page(from);
        self.check_page(to);
        if from == to {
            return;
        }
        let (elements, scales) = self.part_bytes();
        let copy = |memory: &Memory, bytes: usize| {
            let Address(start) = memory.address();
            let page = |page: PageId| Address(start + page.0 as u64 * bytes as u64);
            stream.copy(page(from), page(to), bytes);
        };
        copy(&self.elements, elements);
        if scales > 0 {
            copy(&self.scales, scales);
        }
    }

    /// Bytes of a page's elements, and of its scales.
    fn part_bytes(&self) -> (usize, usize) {
        let n_entries = entries_of_page(&self.shape).expect("the pool has more");
        let (element_bytes, scale_bytes) = entry_bytes(&self.shape);
        (n_entries * element_bytes, n_entries * scale_bytes)
    }

    /// See [`exrail_kernels::Backend::kv_page_bytes`].
    pub(crate) fn page_bytes(&self) -> usize {
        let (elements, scales) = self.part_bytes();
        elements + scales
    }

    /// See [`exrail_kernels::Backend::kv_read_page`]: the elements, then the scales.
    pub(crate) fn read_page(&self, page: PageId, bytes: &mut [u8]) {
        self.check_page(page);
        assert_eq!(bytes.len(), self.page_bytes(), "bytes of a page");
        let (elements, scales) = bytes.split_at_mut(self.part_bytes().0);
        self.elements.read_at(page.0 as usize * elements.len(), elements);
        self.scales.read_at(page.0 as usize * scales.len(), scales);
    }

    /// See [`exrail_kernels::Backend::kv_write_page`].
    pub(crate) fn write_page(&mut self, page: PageId, bytes: &[u8]) {
        self.check_page(page);
        assert_eq!(bytes.len(), self.page_bytes(), "bytes of a page");
        let (elements, scales) = bytes.split_at(self.part_bytes().0);
        self.elements.write_at(page.0 as usize * elements.len(), elements);
        self.scales.write_at(page.0 as usize * scales.len(), scales);
    }

    /// See [`exrail_kernels::Backend::kv_write`].
    pub(crate) fn write(
        &mut self,
        stream: &Stream,
        layer: usize,
        k: &CudaBuffer,
        v: &CudaBuffer,
        slots: &[KvSlot],
    ) {
        let at = self.slots(stream, layer, slots);
        let n_values = slots.len() * self.shape.n_kv_heads * self.shape.head_dim;
        let (k, v) = (k.at(n_values), v.at(n_values));
        let (pages, layer, n) = (self.pages(), narrow(layer), narrow(slots.len()));
        let grid = Grid::warps(2 * slots.len() * self.shape.n_kv_heads);
        stream.launch("kv_write", grid, &[&pages, &layer, &k, &v, &at, &n]);
    }

    /// See [`exrail_kernels::Backend::kv_move`].
    pub(crate) fn move_slots(
        &mut self,
        stream: &Stream,
        layer: usize,
        moves: &[KvMove],
        rope: Option<&Rope>,
    ) {
        const WARPS: usize = 4;
        let KvShape { n_kv_heads, head_dim, n_layers, .. } = self.shape;
        assert!(layer < n_layers, "layer {layer} of {n_layers}");
        for launch in launches(moves) {
            let list = stream.list();
            for KvMove { from, to, .. } in launch {
                self.check_slot(*from);
                self.check_slot(*to);
                self.fresh.note(list, to.page.0 as usize, to.offset);
            }
            let Uploads { moves, turns } = Uploads::new(launch, rope);
            let rotation = Rotation::from_table(stream.upload(&turns), rope, head_dim);
            let at = stream.upload(&moves);
            let (pages, layer, n) = (self.pages(), narrow(layer), narrow(launch.len()));
            let grid = Grid {
                blocks: ((launch.len() * n_kv_heads * 2).div_ceil(WARPS), 1),
                threads: 32 * WARPS,
                ..Grid::one(4 * WARPS * head_dim)
            };
            stream.launch("kv_move", grid, &[&pages, &rotation, &layer, &at, &n]);
            stream.hand_over();
        }
    }

    /// Where products leave the heads of a step themselves: in floats, with pairs that are neighbours and
    /// without a norm.
    pub(crate) fn placement(
        &mut self,
        stream: &Stream,
        heads: &HeadRows<'_, CudaBuffer>,
        positions: &[u32],
        layer: usize,
        slots: &[KvSlot],
    ) -> Option<Placement> {
        let are_neighbours = heads.rope.is_none_or(|rope| rope.style == RopeStyle::Interleaved);
        let is_plain = heads.norms.is_none() && self.shape.dtype != KvDtype::Int8;
        if !are_neighbours || !is_plain || !heads.head_dim.is_multiple_of(2) {
            return None;
        }
        self.check_heads(heads);
        let rotation = Rotation::of(stream, heads.rope, positions, heads.head_dim);
        let slots = self.slots(stream, layer, slots);
        Some(Placement { rotation, pages: self.pages(), slots, layer: narrow(layer), padding: 0 })
    }

    fn check_heads(&self, heads: &HeadRows<'_, CudaBuffer>) {
        let KvShape { n_kv_heads, head_dim, .. } = self.shape;
        assert_eq!((heads.n_kv_heads, heads.head_dim), (n_kv_heads, head_dim), "heads of the pool");
    }

    /// See [`exrail_kernels::Backend::place_heads`].
    pub(crate) fn place_heads(
        &mut self,
        stream: &Stream,
        heads: HeadRows<'_, CudaBuffer>,
        positions: &[u32],
        layer: usize,
        slots: &[KvSlot],
    ) {
        const WARPS: usize = 4;
        self.check_heads(&heads);
        let HeadRows { queries, keys, values, n_heads, n_kv_heads, head_dim, norms, rope } = heads;
        let at = self.slots(stream, layer, slots);
        let n_rows = slots.len();
        let n_cached = n_rows * n_kv_heads * head_dim;
        let norm = |weight: Option<&CudaBuffer>| weight.map_or(Address(0), |w| w.at(head_dim));
        let heads = Heads {
            queries: queries.at(n_rows * n_heads * head_dim),
            keys: keys.at(n_cached),
            values: values.at(n_cached),
            query_norm: norm(norms.as_ref().map(|norms| norms.query)),
            key_norm: norm(norms.as_ref().map(|norms| norms.key)),
            eps: norms.as_ref().map_or(0.0, |norms| norms.eps),
            n_heads: narrow(n_heads),
        };
        let rotation = Rotation::of(stream, rope, positions, head_dim);
        let (pages, layer, n) = (self.pages(), narrow(layer), narrow(n_rows));
        let grid = Grid {
            blocks: ((n_rows * (n_heads + 2 * n_kv_heads)).div_ceil(WARPS), 1),
            threads: 32 * WARPS,
            ..Grid::one(4 * WARPS * head_dim)
        };
        stream.launch("place_heads", grid, &[&heads, &rotation, &pages, &layer, &at, &n]);
    }

    /// Where the slots of rows are, after checking that the pool has them; they are written next.
    fn slots(&mut self, stream: &Stream, layer: usize, slots: &[KvSlot]) -> Address {
        let list = stream.list();
        assert!(layer < self.shape.n_layers, "layer {layer} of {}", self.shape.n_layers);
        for slot in slots {
            self.check_slot(*slot);
            self.fresh.note(list, slot.page.0 as usize, slot.offset);
        }
        let each = slots.iter().flat_map(|slot| [slot.page.0 as usize, slot.offset as usize]);
        stream.upload(&bytes_of_u32(each))
    }

    fn check_slot(&self, slot: KvSlot) {
        self.check_page(slot.page);
        assert!((slot.offset as usize) < PAGE_TOKENS, "offset {}", slot.offset);
    }

    pub(crate) fn check_page(&self, page: PageId) {
        assert!(
            (page.0 as usize) < self.shape.n_pages,
            "page {} of {}",
            page.0,
            self.shape.n_pages
        );
    }
}
