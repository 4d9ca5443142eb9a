//! Norms of rows: both kinds, into another buffer, in place, and added; and layer norm with a bias.
//!
//! **RMS.** The squares are positive, so their mean errs by C · u relative and its inverse root by
//! half of that; eight roundings follow at most.
//!
//! **Layer.** The mean errs by e = C · u · mean|x|. The variance around that mean is the true one
//! plus e², with C · u relative: a kernel must subtract the mean before it squares, since E[x²] - E[x]²
//! misses this bound by cancellation.
//!
//! **Added.** The sum with y rounds once more.

use super::{ConformanceError, ROW_COUNTS, Suite, U, defined};
use crate::reference::Reference;
use crate::{Backend, NormKind};

/// Odd widths, and a head's.
const WIDTHS: [usize; 6] = [1, 7, 31, 64, 100, 576];

/// Rows and their weights, as the backend and the reference see them.
struct Rows<B: Backend> {
    case: String,
    kind: NormKind,
    n_rows: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
    weight_tested: B::Buffer,
}

impl<B: Backend> Suite<'_, B> {
    /// All norms over odd widths.
    pub(super) fn norm(&mut self) -> Result<(), ConformanceError> {
        for width in WIDTHS {
            for n_rows in ROW_COUNTS {
                for kind in [NormKind::Rms, NormKind::Layer] {
                    self.next_case();
                    let rows = self.norm_rows(kind, n_rows, width)?;
                    for eps in [1e-5, 0.5] {
                        self.norm_case(&rows, eps)?;
                        self.norm_in_place(&rows, eps)?;
                        self.norm_add(&rows, eps)?;
                    }
                }
                self.layer_norm(n_rows, width)?;
            }
        }
        Ok(())
    }

    fn norm_rows(
        &mut self,
        kind: NormKind,
        n_rows: usize,
        width: usize,
    ) -> Result<Rows<B>, ConformanceError> {
        let case = format!("{kind:?} C={width} T={n_rows}");
        let mut x = self.random.activations(n_rows, width);
        if kind == NormKind::Layer {
            // A mean that is large beside the deviation.
            x.iter_mut().for_each(|x| *x += 10.0);
        }
        let weight = self.random.normals(width, 1.0, 0.3);
        let weight_tested = self.whole(&case, &weight)?;
        Ok(Rows { case, kind, n_rows, x, weight, weight_tested })
    }

    /// A buffer without a tail: the width of a norm is the length of its weight.
    pub(super) fn whole(&self, case: &str, values: &[f32]) -> Result<B::Buffer, ConformanceError> {
        let mut buffer = super::accepted(case, self.backend.buffer(values.len()))?;
        self.backend.write(&mut buffer, values);
        Ok(buffer)
    }

    fn norm_case(&self, rows: &Rows<B>, eps: f32) -> Result<(), ConformanceError> {
        let Rows { kind, n_rows, x, weight, weight_tested, .. } = rows;
        let case = format!("norm {} eps={eps}", rows.case);
        let mut out = self.output(&case, x.len())?;
        let x_tested = self.upload(&case, x)?;
        self.backend.norm(*kind, &x_tested, *n_rows, weight_tested, eps, &mut out);
        let expected = defined(x.len(), |r, out| r.norm(*kind, x, *n_rows, weight, eps, out));
        let bounds = norm_bounds(rows, eps);
        self.check(&case, &out, &expected, |i| bounds[i])
    }

    fn norm_in_place(&self, rows: &Rows<B>, eps: f32) -> Result<(), ConformanceError> {
        let Rows { kind, n_rows, x, weight, weight_tested, .. } = rows;
        let case = format!("norm_in_place {} eps={eps}", rows.case);
        let mut tested = self.upload(&case, x)?;
        self.backend.norm_in_place(*kind, &mut tested, *n_rows, weight_tested, eps);
        let mut expected = x.clone();
        Reference.norm_in_place(*kind, &mut expected, *n_rows, weight, eps);
        let bounds = norm_bounds(rows, eps);
        self.check(&case, &tested, &expected, |i| bounds[i])
    }

    fn norm_add(&mut self, rows: &Rows<B>, eps: f32) -> Result<(), ConformanceError> {
        let Rows { kind, n_rows, x, weight, weight_tested, .. } = rows;
        let case = format!("norm_add {} eps={eps}", rows.case);
        let y = self.random.normals(x.len(), 0.0, 10.0);
        let mut tested = self.upload(&case, &y)?;
        let x_tested = self.upload(&case, x)?;
        self.backend.norm_add(*kind, &x_tested, *n_rows, weight_tested, eps, &mut tested);
        let mut expected = y.clone();
        Reference.norm_add(*kind, x, *n_rows, weight, eps, &mut expected);
        let bounds = norm_bounds(rows, eps);
        self.check(&case, &tested, &expected, |i| bounds[i] + U * f64::from(expected[i].abs()))
    }

    fn layer_norm(&mut self, n_rows: usize, width: usize) -> Result<(), ConformanceError> {
        self.next_case();
        let rows = self.norm_rows(NormKind::Layer, n_rows, width)?;
        let case = format!("layer_norm C={width} T={n_rows}");
        let bias = self.random.normals(width, 0.0, 0.3);
        let bias_tested = self.whole(&case, &bias)?;
        let mut tested = self.upload(&case, &rows.x)?;
        let eps = 1e-5;
        self.backend.layer_norm(&mut tested, n_rows, &rows.weight_tested, &bias_tested, eps);
        let mut expected = rows.x.clone();
        Reference.layer_norm(&mut expected, n_rows, &rows.weight, &bias, eps);
        let bounds = norm_bounds(&rows, eps);
        self.check(&case, &tested, &expected, |i| {
            bounds[i] + 4.0 * U * f64::from(bias[i % width].abs())
        })
    }
}

/// How far each value of a norm may lie from the reference, `(T, C)`.
fn norm_bounds<B: Backend>(rows: &Rows<B>, eps: f32) -> Vec<f64> {
    let n = rows.weight.len() as f64;
    let mut bounds = Vec::with_capacity(rows.x.len());
    for row in rows.x.chunks_exact(rows.weight.len()) {
        let (mean, mean_error) = match rows.kind {
            NormKind::Rms => (0.0, 0.0),
            NormKind::Layer => {
                let magnitude = row.iter().map(|&x| f64::from(x.abs())).sum::<f64>() / n;
                (row.iter().map(|&x| f64::from(x)).sum::<f64>() / n, (n + 2.0) * U * magnitude)
            }
        };
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
        let inverse_error = match rows.kind {
            NormKind::Rms => (n / 2.0 + 4.0) * U,
            NormKind::Layer => (n + 8.0) * U + (mean_error * inverse).powi(2),
        };
        for (&x, &weight) in row.iter().zip(&rows.weight) {
            let weight = f64::from(weight.abs());
            let normed = weight * inverse * ((f64::from(x) - mean).abs() + mean_error);
            bounds.push(
                weight * inverse * mean_error * (1.0 + inverse_error)
                    + normed * (inverse_error + 4.0 * U)
                    + f64::from(f32::MIN_POSITIVE),
            );
        }
    }
    bounds
}
