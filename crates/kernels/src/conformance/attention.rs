//! Attention over fragmented pages and inside spans.
//!
//! **Bound.** A score errs by s = (D + 8) · u · scale · ‖q‖‖k‖, by Cauchy-Schwarz over the largest
//! norms of the case; the eight stand for the scaling, the subtraction of the maximum and the
//! argument of exp. A soft cap does not magnify that, since |tanh'| <= 1; a kernel's own tanh and the
//! operations around it err by 8 u of the cap more. A probability then errs by 2 (eˢ - 1) relative, plus 8 u for a kernel's own exp
//! and its division, and the sums over S positions by S · u each: together `relative`, applied to
//! Σ p|v|, which the reference computes from |v|.
//!
//! A device that rounds activations of products ([`Activation::Int8`]) may also round queries, keys,
//! values and probabilities to halves on their way, 2⁻¹¹ relative each, where the cache has no more
//! bits: s grows by 2 · 2⁻¹¹ · scale · ‖q‖‖k‖ and `relative` by 4 · 2⁻¹¹; a probability below 2⁻²⁴ of the
//! highest may vanish, S · 2⁻²⁴ · max|v| in all.
//!
//! Cached values are rounded to half precision, or to int8 as [`int8_scale`] says, by one rule, so
//! both sides see the same ones; rounding lengthens a key by 2⁻¹¹ or by √D / 254 at most.

use super::{ConformanceError, Suite, U, accepted, defined};
use crate::reference::{Reference, ReferenceKvPool};
use crate::{
    Activation, AttentionShape, AttentionSpan, Backend, KvDtype, KvShape, KvSlot, PAGE_TOKENS,
    PageId, Span,
};

const N_LAYERS: usize = 2;
const N_PAGES: usize = 9;

/// H, K, D: one head, groups of 1, 2, 3 and 8, head widths with and without SIMD tails.
const HEADS: [(usize, usize, usize); 7] =
    [(1, 1, 8), (4, 2, 16), (9, 3, 64), (8, 1, 20), (3, 3, 33), (2, 1, 128), (1, 1, 256)];

/// Sequences of one call: page table, first position, rows. Pages are out of order and interleaved;
/// rows start at, cross and end at page edges; the first sequence decodes, the last has T = 70.
const SEQUENCES: [(&[u32], usize, usize); 5] =
    [(&[7, 2, 5], 600, 1), (&[4], 0, 7), (&[1, 8], 254, 3), (&[6], 255, 1), (&[3, 0], 240, 70)];

/// Soft caps and windows. Windows hold the row alone, end inside a tile of sixteen, fill some tiles,
/// and cross page edges; the last is longer than most sequences.
const MASKS: [(Option<f32>, Option<usize>); 7] = [
    (None, None),
    (Some(2.5), None),
    (None, Some(1)),
    (None, Some(7)),
    (None, Some(32)),
    (Some(30.0), Some(100)),
    (None, Some(300)),
];

/// A page that no pool has, for pages that no row sees.
const NO_PAGE: PageId = PageId(u32::MAX);

/// The pools of one case.
pub(super) struct Pools<P> {
    pub(super) tested: P,
    pub(super) reference: ReferenceKvPool,
    pub(super) magnitudes: ReferenceKvPool, // the same keys, |v|
    pub(super) key_norm: f64,
    pub(super) key_error: f64, // length by which a key may differ from the reference's
    pub(super) highest_value: f64,
    pub(super) dtype: KvDtype,
}

impl<B: Backend> Suite<'_, B> {
    /// Causal attention, cache writes and page copies.
    pub(super) fn attention(&mut self) -> Result<(), ConformanceError> {
        for (n_heads, n_kv_heads, head_dim) in HEADS {
            let scale = 1.0 / (head_dim as f32).sqrt();
            for (soft_cap, window) in MASKS {
                let shape =
                    AttentionShape { n_heads, n_kv_heads, head_dim, scale, soft_cap, window };
                // With queries twenty times as large one position takes nearly all the weight, and
                // exp without the subtraction of the maximum overflows.
                let deviations: &[f32] = match (soft_cap, window) {
                    (None, None) => &[1.0, 20.0],
                    (Some(_), _) => &[20.0],
                    (None, Some(_)) => &[1.0],
                };
                for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Int8] {
                    for &deviation in deviations {
                        self.attention_case(shape, dtype, deviation)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn attention_case(
        &mut self,
        shape: AttentionShape,
        dtype: KvDtype,
        deviation: f32,
    ) -> Result<(), ConformanceError> {
        let AttentionShape { n_heads, n_kv_heads, head_dim, window, .. } = shape;
        let case = format!("attention {dtype:?} cache, {}, queries x{deviation}", label(shape));
        let kv_shape =
            KvShape { n_layers: N_LAYERS, n_kv_heads, head_dim, n_pages: N_PAGES, dtype };
        let tables: Vec<Vec<PageId>> = SEQUENCES
            .iter()
            .map(|&(pages, first_position, _)| {
                let unseen = first_seen(first_position, window) / PAGE_TOKENS;
                let page = |(i, &page)| if i < unseen { NO_PAGE } else { PageId(page) };
                pages.iter().enumerate().map(page).collect()
            })
            .collect();
        let mut pools = self.filled_pools(&case, kv_shape, window)?;
        for layer in 0..N_LAYERS {
            self.next_case();
            let mut spans = Vec::new();
            let mut n_rows = 0;
            for ((_, first_position, rows), pages) in SEQUENCES.iter().zip(&tables) {
                let (first_position, rows) = (*first_position, *rows);
                spans.push(AttentionSpan {
                    first_row: n_rows,
                    n_rows: rows,
                    first_position,
                    pages,
                });
                n_rows += rows;
            }
            let q = self.random.normals(n_rows * n_heads * head_dim, 0.0, deviation);
            let case = format!("{case}, layer {layer}");
            self.attend(&case, &pools, layer, shape, &spans, &q)?;
            // One sequence alone, as a decode step has it.
            self.attend(&case, &pools, layer, shape, &spans[..1], &q[..n_heads * head_dim])?;
        }

        // The first sequence goes on with a copy of its last page, as a fork of it would.
        self.backend.kv_copy_page(&mut pools.tested, PageId(5), PageId(3));
        Reference.kv_copy_page(&mut pools.reference, PageId(5), PageId(3));
        Reference.kv_copy_page(&mut pools.magnitudes, PageId(5), PageId(3));
        let mut pages = tables[0].clone();
        pages[2] = PageId(3);
        let first_position = SEQUENCES[0].1;
        let span = AttentionSpan { first_row: 0, n_rows: 1, first_position, pages: &pages };
        let q = self.random.normals(n_heads * head_dim, 0.0, deviation);
        for layer in 0..N_LAYERS {
            let case = format!("{case}, layer {layer} after kv_copy_page");
            self.attend(&case, &pools, layer, shape, &[span], &q)?;
        }
        self.moved_pages(&case, &mut pools, shape)
    }

    /// A sequence whose pages leave the pool, are written over there and come back to other places reads
    /// what it read before, and no byte of other pages has changed.
    fn moved_pages(
        &mut self,
        case: &str,
        pools: &mut Pools<B::KvPool>,
        shape: AttentionShape,
    ) -> Result<(), ConformanceError> {
        let (left, back) = ([PageId(1), PageId(8)], [PageId(5), PageId(2)]);
        let left_bytes = left.map(|page| self.page(&pools.tested, page));
        let others: Vec<PageId> =
            (0..N_PAGES as u32).map(PageId).filter(|page| !back.contains(page)).collect();
        let before: Vec<_> = others.iter().map(|&page| self.page(&pools.tested, page)).collect();
        for ((from, to), bytes) in left.into_iter().zip(back).zip(&left_bytes) {
            self.backend.kv_write_page(&mut pools.tested, to, bytes);
            Reference.kv_copy_page(&mut pools.reference, from, to);
            Reference.kv_copy_page(&mut pools.magnitudes, from, to);
        }
        for (page, bytes) in back.iter().zip(&left_bytes).chain(others.iter().zip(&before)) {
            if self.page(&pools.tested, *page) != *bytes {
                let (case, device) = (case.to_owned(), self.backend.name());
                return Err(ConformanceError::Page { case, page: page.0, device });
            }
        }
        let (_, first_position, n_rows) = SEQUENCES[2];
        let span = AttentionSpan { first_row: 0, n_rows, first_position, pages: &back };
        let q = self.random.normals(n_rows * shape.n_heads * shape.head_dim, 0.0, 1.0);
        for layer in 0..N_LAYERS {
            let case = format!("{case}, layer {layer} after kv_write_page");
            self.attend(&case, pools, layer, shape, &[span], &q)?;
        }
        Ok(())
    }

    fn page(&self, pool: &B::KvPool, page: PageId) -> Vec<u8> {
        let mut bytes = vec![0xaa; self.backend.kv_page_bytes(pool)];
        self.backend.kv_read_page(pool, page, &mut bytes);
        bytes
    }

    /// Compares attention to the tested pool with that to the reference.
    pub(super) fn attend(
        &self,
        case: &str,
        pools: &Pools<B::KvPool>,
        layer: usize,
        shape: AttentionShape,
        spans: &[AttentionSpan<'_>],
        q: &[f32],
    ) -> Result<(), ConformanceError> {
        let q_tested = self.upload(case, q)?;
        let mut out = self.output(case, q.len())?;
        self.backend.attention(&q_tested, &pools.tested, layer, shape, spans, &mut out);
        let q = q.to_vec();
        let expected = defined(q.len(), |r, out| {
            r.attention(&q, &pools.reference, layer, shape, spans, out);
        });
        let reach = defined(q.len(), |r, out| {
            r.attention(&q, &pools.magnitudes, layer, shape, spans, out);
        });
        let n_seen = spans.iter().map(|s| s.first_position + s.n_rows).max().unwrap_or(0);
        let halves = self.activation == Activation::Int8 && pools.dtype != KvDtype::F32;
        let norms = (norm(&q, shape.head_dim), pools.key_norm);
        let other_keys = f64::from(shape.scale) * norms.0 * pools.key_error;
        let relative = relative_bound(shape, n_seen, norms, halves) + 2.0 * other_keys.exp_m1();
        let vanished = match halves {
            true => n_seen as f64 * pools.highest_value / 16_777_216.0,
            false => 0.0,
        };
        self.check(case, &out, &expected, |i| relative * f64::from(reach[i]) + vanished)
    }

    /// Pools with every position of [`SEQUENCES`] written, a few rows a call, and NaN in those that
    /// no row sees: before the first row's window and behind the last row.
    fn filled_pools(
        &mut self,
        case: &str,
        shape: KvShape,
        window: Option<usize>,
    ) -> Result<Pools<B::KvPool>, ConformanceError> {
        let mut pools = Pools {
            tested: accepted(case, self.backend.kv_pool(shape))?,
            reference: accepted(case, Reference.kv_pool(shape))?,
            magnitudes: accepted(case, Reference.kv_pool(shape))?,
            key_norm: 0.0,
            key_error: 0.0,
            highest_value: 0.0,
            dtype: shape.dtype,
        };
        let width = shape.n_kv_heads * shape.head_dim;
        for (pages, first_position, n_rows) in SEQUENCES {
            let seen = first_seen(first_position, window)..first_position + n_rows;
            let slots: Vec<KvSlot> = (0..pages.len() * PAGE_TOKENS)
                .map(|position| KvSlot {
                    page: PageId(pages[position / PAGE_TOKENS]),
                    offset: (position % PAGE_TOKENS) as u32,
                })
                .collect();
            for layer in 0..shape.n_layers {
                let mut position = 0;
                let parts = [0..seen.start, seen.clone(), seen.end..slots.len()];
                for slots in parts.into_iter().flat_map(|part| slots[part].chunks(37)) {
                    let (k, v) = if seen.contains(&position) {
                        let k = self.random.normals(slots.len() * width, 0.0, 1.0);
                        let lengthened = match shape.dtype {
                            KvDtype::F32 => 1.0,
                            KvDtype::F16 => 1.001,
                            KvDtype::Int8 => 1.001 + (shape.head_dim as f64).sqrt() / 254.0,
                        };
                        let key_norm = lengthened * norm(&k, shape.head_dim);
                        pools.key_norm = pools.key_norm.max(key_norm);
                        let v = self.random.normals(slots.len() * width, 0.0, 1.0);
                        let highest = v.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
                        pools.highest_value = pools.highest_value.max(f64::from(highest));
                        (k, v)
                    } else {
                        (vec![f32::NAN; slots.len() * width], vec![f32::NAN; slots.len() * width])
                    };
                    let k_tested = self.upload(case, &k)?;
                    let v_tested = self.upload(case, &v)?;
                    self.backend.kv_write(&mut pools.tested, layer, &k_tested, &v_tested, slots);
                    Reference.kv_write(&mut pools.reference, layer, &k, &v, slots);
                    let v = v.iter().map(|v| v.abs()).collect();
                    Reference.kv_write(&mut pools.magnitudes, layer, &k, &v, slots);
                    position += slots.len();
                }
            }
        }
        Ok(pools)
    }

    /// Attention inside spans that leave some rows out.
    pub(super) fn attention_full(&mut self) -> Result<(), ConformanceError> {
        let spans = [(0, 1), (1, 2), (3, 3), (8, 7), (15, 33)]
            .map(|(first_row, n_rows)| Span { first_row, n_rows });
        let n_rows = 48;
        for (n_heads, n_kv_heads, head_dim) in HEADS {
            let scale = 1.0 / (head_dim as f32).sqrt();
            for (soft_cap, deviation) in [(None, 1.0), (None, 20.0), (Some(2.5), 20.0)] {
                let shape =
                    AttentionShape { n_heads, n_kv_heads, head_dim, scale, soft_cap, window: None };
                self.next_case();
                let case = format!("attention_full {}, queries x{deviation}", label(shape));
                let q = self.random.normals(n_rows * n_heads * head_dim, 0.0, deviation);
                let kv_len = n_rows * n_kv_heads * head_dim;
                let k = self.random.normals(kv_len, 0.0, 1.0);
                let v = self.random.normals(kv_len, 0.0, 1.0);
                let magnitudes = v.iter().map(|v| v.abs()).collect();
                let q_tested = self.upload(&case, &q)?;
                let k_tested = self.upload(&case, &k)?;
                let v_tested = self.upload(&case, &v)?;
                // Rows in no span keep the zeros that the reference starts from.
                let mut out = self.upload(&case, &vec![0.0; q.len()])?;
                self.backend
                    .attention_full(&q_tested, &k_tested, &v_tested, shape, &spans, &mut out);
                let expected =
                    defined(q.len(), |r, out| r.attention_full(&q, &k, &v, shape, &spans, out));
                let reach = defined(q.len(), |r, out| {
                    r.attention_full(&q, &k, &magnitudes, shape, &spans, out);
                });
                let norms = (norm(&q, head_dim), norm(&k, head_dim));
                let relative = relative_bound(shape, n_rows, norms, false);
                self.check(&case, &out, &expected, |i| relative * f64::from(reach[i]))?;
            }
        }
        Ok(())
    }
}

/// The first position that the row at `first_position` sees.
fn first_seen(first_position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (first_position + 1).saturating_sub(window))
}

fn label(shape: AttentionShape) -> String {
    let AttentionShape { n_heads, n_kv_heads, head_dim, soft_cap, window, .. } = shape;
    let mut text = format!("H={n_heads} K={n_kv_heads} D={head_dim}");
    if let Some(cap) = soft_cap {
        text += &format!(" cap={cap}");
    }
    if let Some(window) = window {
        text += &format!(" window={window}");
    }
    text
}

/// `relative` of the file header.
fn relative_bound(
    shape: AttentionShape,
    n_seen: usize,
    (q_norm, k_norm): (f64, f64),
    halves: bool,
) -> f64 {
    let rounded = if halves { 1.0 / 2048.0 } else { 0.0 };
    let reach = f64::from(shape.scale) * q_norm * k_norm;
    let capped = 8.0 * U * shape.soft_cap.map_or(0.0, f64::from);
    let score_error = ((shape.head_dim + 8) as f64 * U + 2.0 * rounded) * reach + capped;
    2.0 * score_error.exp_m1() + (2 * n_seen + 16) as f64 * U + 4.0 * rounded
}

/// The largest Euclidean norm of a head.
pub(super) fn norm(x: &[f32], head_dim: usize) -> f64 {
    x.chunks_exact(head_dim)
        .map(|head| head.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt())
        .fold(0.0, f64::max)
}
