//! Row normalisations.

use crate::NormKind;

/// See [`crate::Backend::norm`].
pub(super) fn norm(
    kind: NormKind,
    x: &[f32],
    n_rows: usize,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    normalize(kind, x, n_rows, weight, eps, |i, value| out[i] = value as f32);
}

/// See [`crate::Backend::norm_in_place`].
pub(super) fn norm_in_place(
    kind: NormKind,
    x: &mut [f32],
    n_rows: usize,
    weight: &[f32],
    eps: f32,
) {
    let before = x.to_vec();
    norm(kind, &before, n_rows, weight, eps, x);
}

/// See [`crate::Backend::norm_add`].
pub(super) fn norm_add(
    kind: NormKind,
    x: &[f32],
    n_rows: usize,
    weight: &[f32],
    eps: f32,
    y: &mut [f32],
) {
    normalize(kind, x, n_rows, weight, eps, |i, value| y[i] = (f64::from(y[i]) + value) as f32);
}

/// See [`crate::Backend::layer_norm`].
pub(super) fn layer_norm(x: &mut [f32], n_rows: usize, weight: &[f32], bias: &[f32], eps: f32) {
    let width = weight.len();
    assert_eq!(width, bias.len(), "weight and bias have one length");
    let before = x.to_vec();
    normalize(NormKind::Layer, &before, n_rows, weight, eps, |i, value| {
        x[i] = (value + f64::from(bias[i % width])) as f32;
    });
}

/// Hands every index with its normed and weighted value to `put`. The formulas are those of
/// [`NormKind`].
fn normalize(
    kind: NormKind,
    x: &[f32],
    n_rows: usize,
    weight: &[f32],
    eps: f32,
    mut put: impl FnMut(usize, f64),
) {
    let width = weight.len();
    for t in 0..n_rows {
        let row = &x[t * width..(t + 1) * width];
        let mean = match kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => row.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64,
        };
        let variance =
            row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
        let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
        for (c, (&x, &weight)) in row.iter().zip(weight).enumerate() {
            put(t * width + c, (f64::from(x) - mean) * inverse * f64::from(weight));
        }
    }
}
