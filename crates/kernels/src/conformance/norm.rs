//! RMS norm and layer norm.
//!
//! **RMS.** The squares are positive, so their mean errs by C · u relative and its inverse root by
//! half of that; eight roundings follow at most.
//!
//! **Layer.** The mean errs by e = C · u · mean|x|. The variance around that mean is the true one
//! plus e², with C · u relative: a kernel must subtract the mean before it squares, since E[x²] - E[x]²
//! misses this bound by cancellation.

use super::{ConformanceError, ROW_COUNTS, Suite, U, defined};
use crate::Backend;
use crate::reference::Reference;

const WIDTHS: [usize; 6] = [1, 7, 31, 64, 100, 576];

impl<B: Backend> Suite<'_, B> {
    /// Both norms over odd widths.
    pub(super) fn norm(&mut self) -> Result<(), ConformanceError> {
        for width in WIDTHS {
            for n_rows in ROW_COUNTS {
                self.rms_norm(n_rows, width)?;
                self.layer_norm(n_rows, width)?;
            }
        }
        Ok(())
    }

    fn rms_norm(&mut self, n_rows: usize, width: usize) -> Result<(), ConformanceError> {
        self.next_case();
        let case = format!("rms_norm C={width} T={n_rows}");
        let x = self.random.activations(n_rows, width);
        let weight = self.random.normals(width, 1.0, 0.3);
        let mut out = self.output(&case, n_rows * width)?;
        // The width is the length of the weight, so this buffer has no tail.
        let mut weight_tested = super::accepted(&case, self.backend.buffer(width))?;
        self.backend.write(&mut weight_tested, &weight);
        for eps in [1e-5, 0.5] {
            let x_tested = self.upload(&case, &x)?;
            self.backend.rms_norm(&x_tested, n_rows, &weight_tested, eps, &mut out);
            let expected =
                defined(n_rows * width, |r, out| r.rms_norm(&x, n_rows, &weight, eps, out));
            let relative = (width as f64 / 2.0 + 8.0) * U;
            self.check(&case, &out, &expected, |i| {
                relative * f64::from(expected[i].abs()) + f64::from(f32::MIN_POSITIVE)
            })?;
        }
        Ok(())
    }

    fn layer_norm(&mut self, n_rows: usize, width: usize) -> Result<(), ConformanceError> {
        self.next_case();
        let case = format!("layer_norm C={width} T={n_rows}");
        let x: Vec<f32> = self.random.activations(n_rows, width).iter().map(|x| x + 10.0).collect();
        let weight = self.random.normals(width, 1.0, 0.3);
        let bias = self.random.normals(width, 0.0, 0.3);
        let mut tested = self.upload(&case, &x)?;
        let mut weight_tested = super::accepted(&case, self.backend.buffer(width))?;
        self.backend.write(&mut weight_tested, &weight);
        let mut bias_tested = super::accepted(&case, self.backend.buffer(width))?;
        self.backend.write(&mut bias_tested, &bias);
        let eps = 1e-5;
        self.backend.layer_norm(&mut tested, n_rows, &weight_tested, &bias_tested, eps);
        let mut expected = x.clone();
        Reference.layer_norm(&mut expected, n_rows, &weight, &bias, eps);
        let n = width as f64;
        self.check(&case, &tested, &expected, |i| {
            let row = &x[i / width * width..(i / width + 1) * width];
            let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let magnitude = row.iter().map(|&x| f64::from(x.abs())).sum::<f64>() / n;
            let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
            let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
            let mean_error = (n + 2.0) * U * magnitude;
            let inverse_error = (n + 8.0) * U + (mean_error * inverse).powi(2);
            let weight = f64::from(weight[i % width].abs());
            let centred = (f64::from(x[i]) - mean).abs();
            let normed = weight * inverse * (centred + mean_error);
            weight * inverse * mean_error * (1.0 + inverse_error)
                + normed * inverse_error
                + 4.0 * U * (normed + f64::from(bias[i % width].abs()))
        })
    }
}
