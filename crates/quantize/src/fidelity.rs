//! [`WeightError`]: how far a quantised matrix is from its original.

use serde::{Deserialize, Serialize};

use crate::factor::dot;
use crate::{Codes, Hessian};

/// Errors of one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightError {
    /// Root mean square of the weight errors over that of the weights.
    pub relative_rms: f64,
    /// Largest magnitude of a weight error.
    pub max: f64,
    /// Root mean square of the output errors over that of the outputs, for the calibration inputs.
    /// Only where there are some.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub output_relative_rms: Option<f64>,
}

impl WeightError {
    /// Errors of `codes` against `values`, `(N, K)` both.
    ///
    /// # Panics
    /// When the shapes differ.
    #[must_use]
    pub fn measure(codes: &Codes, values: &[f32], hessian: Option<&Hessian>) -> WeightError {
        let k = codes.columns;
        assert_eq!(values.len(), codes.rows * k, "one value a code");
        let (mut error, mut power, mut max) = (0.0, 0.0, 0.0_f64);
        let (mut output_error, mut output_power) = (0.0, 0.0);
        for (row, values) in values.chunks_exact(k).enumerate() {
            let values: Vec<f64> = values.iter().map(|&value| f64::from(value)).collect();
            let errors: Vec<f64> =
                codes.row(row).zip(&values).map(|(code, value)| f64::from(code) - value).collect();
            error += square(&errors);
            power += square(&values);
            max = errors.iter().fold(max, |max, error| max.max(error.abs()));
            if let Some(hessian) = hessian {
                output_error += quadratic(&errors, hessian);
                output_power += quadratic(&values, hessian);
            }
        }
        let output_relative_rms = hessian.map(|_| ratio(output_error, output_power));
        WeightError { relative_rms: ratio(error, power), max, output_relative_rms }
    }
}

fn square(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum()
}

/// Σ over the calibration inputs x of (v · x)², which is vᵀ H v.
fn quadratic(v: &[f64], hessian: &Hessian) -> f64 {
    let (k, lower) = (hessian.columns(), hessian.lower());
    let mut sum = 0.0;
    for (i, &factor) in v.iter().enumerate() {
        let off = dot(&lower[i * k..i * k + i], &v[..i]);
        sum += factor * (2.0 * off + lower[i * k + i] * factor);
    }
    sum
}

/// sqrt(error / power); 0 for a matrix of zeros that stayed so. Rounding may leave sums a little
/// below zero.
fn ratio(error: f64, power: f64) -> f64 {
    if error <= 0.0 { 0.0 } else { (error / power).sqrt() }
}
