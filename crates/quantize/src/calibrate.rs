//! [`calibrate`]: rounding with error feedback (GPTQ: Frantar et al. 2022, arXiv:2210.17323).
//!
//! Columns are rounded one after another; what a column's rounding does to the output is made good
//! by the columns that are still free, as far as the calibration inputs allow. Columns with the
//! largest inputs come first ("act-order"), while each group keeps the scale that it was given
//! beforehand ("static groups"): so groups stay runs of neighbouring columns and the result runs on
//! the same kernels as any other int4.

use exrail_tensor::IntGrid;

use crate::codes::{Codes, step};
use crate::factor::inverse_factor;
use crate::{Hessian, QuantizeError};

/// Share of the mean diagonal that is added to the diagonal at first; the value of the paper.
const DAMPING: f64 = 0.01;
/// With more damping than this, calibration says nothing.
const MAX_DAMPING: f64 = 10.0;
/// Rows that are rounded together, so that a row of U is read from the cache.
const ROWS: usize = 8;

/// A calibrated matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibrated {
    /// The matrix.
    pub codes: Codes,
    /// Share of the mean diagonal of H that was added to make it positive definite.
    pub damping: f64,
}

/// Rounds `values` `(N, K)` so that the outputs for the inputs of `hessian` change least.
///
/// # Errors
/// [`QuantizeError::Calibration`] when the inputs are not finite, or so degenerate that no damping
/// helps. `name` is the matrix in that message.
///
/// # Panics
/// When `values` are not whole rows of the Hessian's columns, or those not whole groups.
pub fn calibrate(
    name: &str,
    grid: IntGrid,
    values: &[f32],
    hessian: &Hessian,
    group: usize,
) -> Result<Calibrated, QuantizeError> {
    let k = hessian.columns();
    assert!(values.len().is_multiple_of(k), "whole rows of {k}");
    assert!(k.is_multiple_of(group), "{k} columns in groups of {group}");
    let diagonal: Vec<f64> = (0..k).map(|i| hessian.lower()[i * k + i]).collect();
    let order = falling(&diagonal);
    let (factor, damping) = damped_factor(name, hessian, &diagonal, &order)?;
    let scales = scales(grid, values, &diagonal, group);
    let mut codes = vec![0; values.len()];
    let problem = Problem { grid, group, k, order: &order, factor: &factor };
    let rows = values.chunks(ROWS * k).zip(codes.chunks_mut(ROWS * k));
    for ((values, codes), scales) in rows.zip(scales.chunks(ROWS * k / group)) {
        problem.round_rows(values, scales, codes);
    }
    let codes = Codes { grid, rows: values.len() / k, columns: k, group, scales, codes };
    Ok(Calibrated { codes, damping })
}

/// Indices of `diagonal`, largest value first, equal ones in order.
fn falling(diagonal: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..diagonal.len()).collect();
    order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
    order
}

/// A scale for each group (N, G), fitted to its weights, each as important as its input is large.
fn scales(grid: IntGrid, values: &[f32], diagonal: &[f64], group: usize) -> Vec<u16> {
    let k = diagonal.len();
    // Only ratios count; a column that the calibration never saw still has to be representable.
    let mean = diagonal.iter().sum::<f64>() / k as f64;
    let importance: Vec<f32> = if mean > 0.0 {
        diagonal.iter().map(|d| (d / mean + DAMPING) as f32).collect()
    } else {
        vec![1.0; k]
    };
    let rows = values.chunks_exact(k);
    rows.flat_map(|row| {
        let groups = row.chunks_exact(group).zip(importance.chunks_exact(group));
        groups.map(|(values, importance)| grid.scale(values, Some(importance)))
    })
    .collect()
}

/// U of the damped Hessian with columns in `order`, and the damping that it took.
fn damped_factor(
    name: &str,
    hessian: &Hessian,
    diagonal: &[f64],
    order: &[usize],
) -> Result<(Vec<f64>, f64), QuantizeError> {
    let (k, lower) = (order.len(), hessian.lower());
    let mean = diagonal.iter().sum::<f64>() / k as f64;
    if !mean.is_finite() {
        return Err(QuantizeError::Calibration {
            tensor: name.to_owned(),
            problem: "its calibration inputs are not finite",
        });
    }
    let mut damping = DAMPING;
    while damping <= MAX_DAMPING {
        let mut h = vec![0.0; k * k];
        for (i, &row) in order.iter().enumerate() {
            for (j, &column) in order[..=i].iter().enumerate() {
                h[i * k + j] = lower[row.max(column) * k + row.min(column)];
            }
            // A column without inputs: any value does, its weight is rounded by itself.
            let alone = if diagonal[row] == 0.0 { 1.0_f64.max(mean) } else { 0.0 };
            h[i * k + i] += damping * mean + alone;
        }
        if let Some(factor) = inverse_factor(&h, k) {
            return Ok((factor, damping));
        }
        damping *= 10.0;
    }
    Err(QuantizeError::Calibration {
        tensor: name.to_owned(),
        problem: "its calibration inputs are degenerate; calibrate with more and more varied text",
    })
}

/// What all rows of a matrix share.
struct Problem<'a> {
    grid: IntGrid,
    group: usize,
    k: usize,
    order: &'a [usize],
    factor: &'a [f64], // (K, K), upper triangular, in `order`
}

impl Problem<'_> {
    /// Rounds a few rows: column i of each, then its error divided by U[i, i] times the rest of row
    /// i of U is taken from the columns behind it.
    fn round_rows(&self, values: &[f32], scales: &[u16], codes: &mut [i8]) {
        let (k, n_groups) = (self.k, self.k / self.group);
        let mut free: Vec<f64> = Vec::with_capacity(values.len());
        for row in values.chunks_exact(k) {
            free.extend(self.order.iter().map(|&column| f64::from(row[column])));
        }
        for (i, &column) in self.order.iter().enumerate() {
            let factor = &self.factor[i * k + i..(i + 1) * k];
            let rows = free.chunks_exact_mut(k).zip(codes.chunks_exact_mut(k));
            for ((free, codes), scales) in rows.zip(scales.chunks_exact(n_groups)) {
                let free = &mut free[i..];
                let step = step(scales[column / self.group]);
                let code = self.grid.code(free[0] as f32, step);
                codes[column] = code;
                let error = (free[0] - f64::from(step) * f64::from(code)) / factor[0];
                for (value, u) in free.iter_mut().zip(factor) {
                    *value -= error * u;
                }
            }
        }
    }
}
