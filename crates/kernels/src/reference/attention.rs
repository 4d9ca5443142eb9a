//! Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) with grouped heads
//! (Ainslie et al. 2023, arXiv:2305.13245), causal over pages and unmasked inside spans.

use std::ops::Range;

use super::ReferenceKvPool;
use super::activation::soft_cap;
use super::linear::dot;
use crate::{AttentionShape, AttentionSpan, KvSlot, PAGE_TOKENS, Span};

/// See [`crate::Backend::attention`]; the pool comes with its layer.
pub(super) fn attention(
    q: &[f32],
    (pool, layer): (&ReferenceKvPool, usize),
    shape: AttentionShape,
    spans: &[AttentionSpan<'_>],
    out: &mut [f32],
) {
    assert!(shape.window != Some(0), "a window holds at least one key");
    for span in spans {
        let slot = |position: usize| KvSlot {
            page: span.pages[position / PAGE_TOKENS],
            offset: (position % PAGE_TOKENS) as u32,
        };
        for i in 0..span.n_rows {
            let end = span.first_position + i + 1;
            let first = shape.window.map_or(0, |window| end.saturating_sub(window));
            attend((span.first_row + i, first..end), shape, q, out, |head, position| {
                let slot = slot(position);
                (pool.key(layer, slot, head), pool.value(layer, slot, head))
            });
        }
    }
}

/// See [`crate::Backend::attention_full`]; keys come with values.
pub(super) fn attention_full(
    q: &[f32],
    (k, v): (&[f32], &[f32]),
    shape: AttentionShape,
    spans: &[Span],
    out: &mut [f32],
) {
    assert!(shape.window.is_none(), "only causal attention has a window");
    let width = shape.n_kv_heads * shape.head_dim;
    for span in spans {
        for i in 0..span.n_rows {
            attend((span.first_row + i, 0..span.n_rows), shape, q, out, |head, position| {
                let start = (span.first_row + position) * width + head * shape.head_dim;
                let range = start..start + shape.head_dim;
                (&k[range.clone()], &v[range])
            });
        }
    }
}

/// All heads of one row over the positions that it sees; `cached(kv head, position)` gives the key
/// and the value.
fn attend<'a>(
    (row, seen): (usize, Range<usize>),
    shape: AttentionShape,
    q: &[f32],
    out: &mut [f32],
    cached: impl Fn(usize, usize) -> (&'a [f32], &'a [f32]),
) {
    let group = shape.n_heads / shape.n_kv_heads;
    assert_eq!(group * shape.n_kv_heads, shape.n_heads, "heads divide into groups");
    for h in 0..shape.n_heads {
        let start = (row * shape.n_heads + h) * shape.head_dim;
        let q = &q[start..start + shape.head_dim];
        let scores: Vec<f64> = seen
            .clone()
            .map(|position| dot(q, cached(h / group, position).0) * f64::from(shape.scale))
            .map(|score| soft_cap(score, shape.soft_cap))
            .collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut total = 0.0;
        let mut sums = vec![0.0; shape.head_dim];
        for (position, score) in seen.clone().zip(&scores) {
            let p = (score - highest).exp();
            total += p;
            for (sum, &v) in sums.iter_mut().zip(cached(h / group, position).1) {
                *sum += p * f64::from(v);
            }
        }
        for (out, sum) in out[start..start + shape.head_dim].iter_mut().zip(sums) {
            *out = (sum / total) as f32;
        }
    }
}
