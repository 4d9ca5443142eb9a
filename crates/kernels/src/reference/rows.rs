//! Operations that move or add whole rows.

use super::ReferenceWeight;
use super::activation;
use crate::{Span, TokenId};

/// See [`crate::Backend::embed`].
pub(super) fn embed(table: &ReferenceWeight, ids: &[TokenId], scale: f32, out: &mut [f32]) {
    let width = table.columns;
    for (t, id) in ids.iter().enumerate() {
        let start = id.0 as usize * width;
        let row = &table.values[start..start + width];
        for (out, &value) in out[t * width..(t + 1) * width].iter_mut().zip(row) {
            *out = scale * value;
        }
    }
}

/// See [`crate::Backend::gather_rows`].
pub(super) fn gather_rows(x: &[f32], width: usize, rows: &[u32], out: &mut [f32]) {
    for (i, &row) in rows.iter().enumerate() {
        let start = row as usize * width;
        out[i * width..(i + 1) * width].copy_from_slice(&x[start..start + width]);
    }
}

/// See [`crate::Backend::add`].
pub(super) fn add(x: &mut [f32], y: &[f32], len: usize) {
    for (x, &y) in x[..len].iter_mut().zip(&y[..len]) {
        *x += y;
    }
}

/// See [`crate::Backend::scale_and_cap`].
pub(super) fn scale_and_cap(x: &mut [f32], len: usize, scale: f32, soft_cap: Option<f32>) {
    for x in &mut x[..len] {
        *x = activation::soft_cap(f64::from(scale) * f64::from(*x), soft_cap) as f32;
    }
}

/// See [`crate::Backend::mean_rows`].
pub(super) fn mean_rows(x: &[f32], width: usize, spans: &[Span], out: &mut [f32]) {
    for (s, span) in spans.iter().enumerate() {
        for c in 0..width {
            let sum: f64 = (span.first_row..span.first_row + span.n_rows)
                .map(|row| f64::from(x[row * width + c]))
                .sum();
            out[s * width + c] = (sum / span.n_rows as f64) as f32;
        }
    }
}
