//! The factor that error feedback needs: the upper triangular U with H⁻¹ = Uᵀ U.
//!
//! Frantar et al. 2022 (arXiv:2210.17323, §3.3, step 3) invert H and take the Cholesky
//! factor of the inverse. One factorisation does: with the order of the columns reversed,
//! H = R Rᵀ for an upper triangular R, hence H⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹.

/// Lanes of a dot product, for the compiler's vectoriser; the order of the sum is fixed.
const LANES: usize = 8;

/// U of the symmetric matrix `h` (n, n), of which only the lower triangle is read; `None` when it
/// is not positive definite to working precision.
///
/// # Panics
/// When `h` is not n · n long.
pub(crate) fn inverse_factor(h: &[f64], n: usize) -> Option<Vec<f64>> {
    assert_eq!(h.len(), n * n, "a square matrix");
    let lower = reversed_cholesky(h, n)?;
    Some(reversed_inverse(&lower, n))
}

/// L with L Lᵀ = H, where rows and columns of H are taken last to first.
fn reversed_cholesky(h: &[f64], n: usize) -> Option<Vec<f64>> {
    let mut lower = vec![0.0; n * n];
    for i in 0..n {
        let (before, rest) = lower.split_at_mut(i * n);
        let row = &mut rest[..n];
        for j in 0..i {
            let other = &before[j * n..j * n + j];
            // Reversed, entry (i, j) is (n-1-j, n-1-i) of the lower triangle.
            let value = h[(n - 1 - j) * n + n - 1 - i] - dot(&row[..j], other);
            row[j] = value / before[j * n + j];
        }
        let pivot = h[(n - 1 - i) * n + n - 1 - i] - dot(&row[..i], &row[..i]);
        // A pivot lost to rounding is not a pivot: NaN and infinity end here as well.
        if !(pivot > 0.0 && pivot.is_finite()) {
            return None;
        }
        row[i] = pivot.sqrt();
    }
    Some(lower)
}

/// The inverse of the lower triangle `lower`, rows and columns put back in order: upper triangular.
fn reversed_inverse(lower: &[f64], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n]; // lower triangular
    for i in 0..n {
        let (before, rest) = inverse.split_at_mut(i * n);
        let row = &mut rest[..=i];
        for k in 0..i {
            let factor = lower[i * n + k];
            for (sum, value) in row.iter_mut().zip(&before[k * n..=k * n + k]) {
                *sum -= factor * value;
            }
        }
        let pivot = lower[i * n + i];
        row[i] = 1.0;
        row.iter_mut().for_each(|value| *value /= pivot);
    }
    inverse.reverse();
    inverse
}

/// Σ a · b of slices that are equally long.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; LANES];
    let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        // H = A Aᵀ + I of a fixed A.
        let n = 13;
        let a: Vec<f64> = (0..n * n).map(|i| ((i * 37 + 11) % 29) as f64 / 29.0 - 0.5).collect();
        let mut h = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                h[i * n + j] = dot(&a[i * n..(i + 1) * n], &a[j * n..(j + 1) * n]);
            }
            h[i * n + i] += 1.0;
        }
        let u = inverse_factor(&h, n).unwrap();
        for i in 0..n {
            assert!(u[i * n..i * n + i].iter().all(|&x| x == 0.0), "row {i} is not upper");
            for j in 0..n {
                // (Uᵀ U H)[i, j] is the identity.
                let mut sum = 0.0;
                for k in 0..n {
                    let inverse: f64 = (0..n).map(|m| u[m * n + i] * u[m * n + k]).sum();
                    sum += inverse * h[k * n + j];
                }
                let expected = if i == j { 1.0 } else { 0.0 };
                assert!((sum - expected).abs() < 1e-12, "({i}, {j}): {sum}");
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        assert!(inverse_factor(&[1.0, 2.0, 2.0, 1.0], 2).is_none());
        assert!(inverse_factor(&[f64::NAN], 1).is_none());
        assert!(inverse_factor(&[0.0], 1).is_none());
    }
}
