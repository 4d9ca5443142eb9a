//! Operations that move or add whole rows.

use super::ReferenceWeight;
use crate::{Span, TokenId};

/// See [`crate::Backend::embed`].
pub(super) fn embed(table: &ReferenceWeight, ids: &[TokenId], out: &mut [f32]) {
    let width = table.columns;
    for (t, id) in ids.iter().enumerate() {
        let start = id.0 as usize * width;
        out[t * width..(t + 1) * width].copy_from_slice(&table.values[start..start + width]);
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
