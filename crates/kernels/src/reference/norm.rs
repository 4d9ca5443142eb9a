//! Row normalisations.

/// See [`crate::Backend::rms_norm`] (Zhang and Sennrich 2019, arXiv:1910.07467).
pub(super) fn rms_norm(x: &[f32], n_rows: usize, weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for t in 0..n_rows {
        let x = &x[t * width..(t + 1) * width];
        let mean_square =
            x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / width as f64;
        let inverse = 1.0 / (mean_square + f64::from(eps)).sqrt();
        let out = &mut out[t * width..(t + 1) * width];
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = (f64::from(x) * inverse * f64::from(weight)) as f32;
        }
    }
}

/// See [`crate::Backend::layer_norm`] (Ba et al. 2016, arXiv:1607.06450); the variance is the biased
/// one, over `width`.
pub(super) fn layer_norm(x: &mut [f32], n_rows: usize, weight: &[f32], bias: &[f32], eps: f32) {
    let width = weight.len();
    assert_eq!(width, bias.len(), "weight and bias have one length");
    for t in 0..n_rows {
        let x = &mut x[t * width..(t + 1) * width];
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
        let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
        let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
        for ((x, &weight), &bias) in x.iter_mut().zip(weight).zip(bias) {
            *x = ((f64::from(*x) - mean) * inverse * f64::from(weight) + f64::from(bias)) as f32;
        }
    }
}
