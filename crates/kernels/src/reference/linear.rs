//! Matrix products `x Wᵀ` and what is fused behind them.

use super::ReferenceWeight;
use super::activation::{gate as activated, gelu};
use crate::GateActivation;

/// See [`crate::Backend::linear`].
pub(super) fn linear(
    x: &[f32],
    n_rows: usize,
    weight: &ReferenceWeight,
    bias: Option<&Vec<f32>>,
    out: &mut [f32],
) {
    products(x, n_rows, weight, bias, out, |_, product| product as f32);
}

/// See [`crate::Backend::linear_add`].
pub(super) fn linear_add(
    x: &[f32],
    n_rows: usize,
    weight: &ReferenceWeight,
    bias: Option<&Vec<f32>>,
    scale: f32,
    y: &mut [f32],
) {
    products(x, n_rows, weight, bias, y, |before, product| {
        (f64::from(before) + f64::from(scale) * product) as f32
    });
}

/// See [`crate::Backend::linear_add_rows`].
pub(super) fn linear_add_rows(
    x: &[f32],
    weight: &ReferenceWeight,
    rows: &[u32],
    scales: &[f32],
    y: &mut [f32],
) {
    assert_eq!(rows.len(), scales.len(), "one scale a row");
    let (width, columns) = (weight.rows, weight.columns);
    for (i, (&row, &scale)) in rows.iter().zip(scales).enumerate() {
        let x = &x[i * columns..(i + 1) * columns];
        let y = &mut y[row as usize * width..(row as usize + 1) * width];
        linear_add(x, 1, weight, None, scale, y);
    }
}

/// See [`crate::Backend::linear_gelu`].
pub(super) fn linear_gelu(
    x: &[f32],
    n_rows: usize,
    weight: &ReferenceWeight,
    bias: &Vec<f32>,
    out: &mut [f32],
) {
    products(x, n_rows, weight, Some(bias), out, |_, product| gelu(product) as f32);
}

/// See [`crate::Backend::linear_gate`].
pub(super) fn linear_gate(
    x: &[f32],
    n_rows: usize,
    gate: &ReferenceWeight,
    up: &ReferenceWeight,
    activation: GateActivation,
    out: &mut [f32],
) {
    assert_eq!((gate.rows, gate.columns), (up.rows, up.columns), "gate and up have one shape");
    for t in 0..n_rows {
        for n in 0..gate.rows {
            let g = dot(row(x, t, gate.columns), row(&gate.values, n, gate.columns));
            let u = dot(row(x, t, up.columns), row(&up.values, n, up.columns));
            out[t * gate.rows + n] = (activated(activation, g) * u) as f32;
        }
    }
}

/// Replaces each `out[t, n]` by `finish(out[t, n], x[t] · w[n] + bias[n])`.
fn products(
    x: &[f32],
    n_rows: usize,
    weight: &ReferenceWeight,
    bias: Option<&Vec<f32>>,
    out: &mut [f32],
    finish: impl Fn(f32, f64) -> f32,
) {
    for t in 0..n_rows {
        for n in 0..weight.rows {
            let product = dot(row(x, t, weight.columns), row(&weight.values, n, weight.columns));
            let product = product + bias.map_or(0.0, |bias| f64::from(bias[n]));
            let value = &mut out[t * weight.rows + n];
            *value = finish(*value, product);
        }
    }
}

fn row(matrix: &[f32], index: usize, columns: usize) -> &[f32] {
    &matrix[index * columns..(index + 1) * columns]
}

/// Σᵢ `a[i] * b[i]` in f64; each product of two f32 is exact there.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
