//! Activation functions in f64: silu, gelu by the error function and by tanh, the soft cap.

use crate::GateActivation;

/// The activation of a gate.
pub(super) fn gate(activation: GateActivation, x: f64) -> f64 {
    match activation {
        GateActivation::Silu => silu(x),
        GateActivation::GeluTanh => gelu_tanh(x),
    }
}

/// silu(x) = x / (1 + e^-x) (Elfwing et al. 2018, arXiv:1702.03118).
fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// gelu(x) = x/2 * (1 + erf(x / sqrt 2)) (Hendrycks and Gimpel 2016, arXiv:1606.08415, §2), not the
/// tanh approximation: BERT checkpoints with `hidden_act: gelu` were trained with this one.
pub(super) fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))
}

/// The approximation of [`gelu`] by tanh (same paper, §2), which Gemma checkpoints were trained
/// with.
fn gelu_tanh(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

/// cap · tanh(x / cap), or x without a cap (Gemma Team 2024, arXiv:2408.00118, §2).
pub(super) fn soft_cap(x: f64, cap: Option<f32>) -> f64 {
    match cap {
        Some(cap) => f64::from(cap) * (x / f64::from(cap)).tanh(),
        None => x,
    }
}

/// The error function, within 1e-14.
///
/// Below 3: the series erf(x) = 2/sqrt(pi) * e^-x² * Σ 2^n x^(2n+1) / (2n+1)!! (NIST DLMF 7.6.2),
/// whose terms are all positive. Above: 1 - erfc(x) by the continued fraction of DLMF 7.9.1,
/// evaluated backwards from a fixed depth.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let gaussian = (-a * a).exp();
    let value = if a < 3.0 {
        let mut term = a;
        let mut sum = a;
        for n in 1..100 {
            term *= 2.0 * a * a / f64::from(2 * n + 1);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * gaussian * sum
    } else {
        let mut tail = a;
        for n in (1..=60).rev() {
            tail = a + f64::from(n) / 2.0 / tail;
        }
        1.0 - gaussian * 0.5 * std::f64::consts::FRAC_2_SQRT_PI / tail
    };
    value.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_agrees_with_published_digits() {
        // From Python's math.erf; the first four are also in Abramowitz and Stegun, table 7.1.
        let table = [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_8),
            (2.0, 0.995_322_265_018_952_7),
            (2.999, 0.999_977_769_831_400_2),
            (3.0, 0.999_977_909_503_001_4),
            (4.0, 0.999_999_984_582_742_1),
        ];
        for (x, expected) in table {
            assert!((erf(x) - expected).abs() < 1e-14, "erf({x}) = {}", erf(x));
            assert!((erf(-x) + expected).abs() < 1e-14);
        }
    }

    #[test]
    fn gelu_by_tanh_agrees_with_published_digits() {
        // PyTorch's documentation gives the formula; the digits are from Python's math.tanh.
        let table = [
            (0.0, 0.0),
            (0.5, 0.345_714_009_825_143_9),
            (1.0, 0.841_191_990_608_276_8),
            (-2.0, -0.045_402_305_912_224_9),
        ];
        for (x, expected) in table {
            assert!((gelu_tanh(x) - expected).abs() < 1e-14, "{}", gelu_tanh(x));
        }
        assert_eq!(gelu_tanh(-200.0), 0.0);
        assert_eq!(gelu_tanh(200.0), 200.0);
    }

    #[test]
    fn a_soft_cap_bounds_and_keeps_small_values() {
        assert_eq!(soft_cap(1e9, Some(30.0)), 30.0);
        assert_eq!(soft_cap(-1e9, Some(30.0)), -30.0);
        assert_eq!(soft_cap(1e9, None), 1e9);
        assert!((soft_cap(1e-3, Some(30.0)) - 1e-3).abs() < 1e-12);
    }

    #[test]
    fn far_tails_are_finite() {
        assert_eq!(gelu(-200.0), 0.0);
        assert_eq!(gelu(200.0), 200.0);
        assert!(silu(-1000.0).abs() < 1e-300);
        assert_eq!(silu(1000.0), 1000.0);
    }
}
