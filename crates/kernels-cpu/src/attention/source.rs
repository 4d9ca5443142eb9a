//! Where attention reads keys and values: from pages, or packed for one call.

use crate::codes::LINE;
use crate::kv::{CpuKvPool, Head, TOKENS, padded_head};
use crate::lanes::Lanes;
use exrail_kernels::{AttentionShape, PAGE_TOKENS, PageId, Span};

/// Bytes of a page of memory, which a processor's own prefetchers do not leave.
const PAGE_BYTES: usize = 4096;
/// Tiles of a page.
const PAGE_TILES: usize = PAGE_TOKENS / TOKENS;

/// Where the keys and values of one head are.
pub(super) trait Source: Copy {
    /// A `(D, 16)` tile.
    fn keys(&self, tile: usize) -> &[u8];
    /// `(16, D')`.
    fn values(&self, tile: usize) -> &[u8];
    /// Sixteen f32 for the keys, and for the values: none but for int8.
    fn scales(&self, tile: usize) -> Option<[&[u8; 64]; 2]>;

    /// How many tiles ahead the CPU wants to be asked for keys and values: none where it follows weights by
    /// itself within a page of memory, because it follows these, too, and requests are in its way.
    #[inline(always)]
    fn ahead<L: Lanes>(&self, lanes: L, tile: usize) -> usize {
        let len_bytes = self.keys(tile).len() + self.values(tile).len();
        if lanes.ahead() < PAGE_BYTES { 0 } else { lanes.ahead().div_ceil(len_bytes.max(1)) }
    }

    /// Asks for a tile's keys and values.
    #[inline(always)]
    fn prefetch<L: Lanes>(&self, lanes: L, tile: usize) {
        for part in [self.keys(tile), self.values(tile)] {
            for line in (0..part.len()).step_by(LINE) {
                lanes.prefetch(part, line);
            }
        }
    }
}

/// Keys and values in pages.
#[derive(Clone, Copy)]
pub(super) struct Paged<'a> {
    pub(super) pool: &'a CpuKvPool,
    pub(super) pages: &'a [PageId],
    pub(super) layer: usize,
    pub(super) head: usize,
}

impl Paged<'_> {
    /// The head's part of a tile's page, and the tile's place there.
    #[inline(always)]
    fn place(&self, tile: usize) -> (Head<'_>, usize) {
        let page = self.pages[tile / PAGE_TILES];
        (self.pool.head(page, self.layer, self.head), tile % PAGE_TILES)
    }
}

impl Source for Paged<'_> {
    #[inline(always)]
    fn keys(&self, tile: usize) -> &[u8] {
        let (Head { keys, .. }, tile) = self.place(tile);
        let len = keys.len() / PAGE_TILES;
        &keys[tile * len..][..len]
    }
    #[inline(always)]
    fn values(&self, tile: usize) -> &[u8] {
        let (Head { values, .. }, tile) = self.place(tile);
        let len = values.len() / PAGE_TILES;
        &values[tile * len..][..len]
    }
    #[inline(always)]
    fn scales(&self, tile: usize) -> Option<[&[u8; 64]; 2]> {
        let (Head { scales, .. }, tile) = self.place(tile);
        let tiles = scales.as_chunks::<64>().0;
        (!tiles.is_empty()).then(|| [&tiles[tile], &tiles[PAGE_TILES + tile]])
    }
}

/// Keys and values of one head of one text, in the layout of a page.
pub(super) struct Packed {
    keys: Vec<u8>,
    values: Vec<u8>,
    head_dim: usize,
}

impl Packed {
    pub(super) fn new(
        k: &[f32],
        v: &[f32],
        shape: AttentionShape,
        span: Span,
        head: usize,
    ) -> Packed {
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
    #[inline(always)]
    fn scales(&self, _tile: usize) -> Option<[&[u8; 64]; 2]> {
        None
    }
}
