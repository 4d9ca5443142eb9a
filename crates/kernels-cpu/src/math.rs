//! Elementary functions of sixteen lanes. Each states its error, which the tests here measure
//! against f64.

use crate::lanes::Lanes;

/// e^x within 2 ulp for x in -87..=88; zero below -87.3, infinity above 88.4, NaN for NaN.
///
/// e^x = 2^n e^r with n = round(x / ln 2); ln 2 is split in two so that r is exact to f32, and e^r
/// is the degree-7 polynomial of Cephes `expf` (Moshier 1989).
#[inline(always)]
pub(crate) fn exp<L: Lanes>(lanes: L, x: L::V) -> L::V {
    let lowest = lanes.splat(-87.3);
    let clamped = lanes.max(lowest, lanes.min(lanes.splat(88.4), x));
    let n = lanes.round(lanes.mul(clamped, lanes.splat(std::f32::consts::LOG2_E)));
    let r = lanes.fma(n, lanes.splat(-0.693_359_4), clamped);
    let r = lanes.fma(n, lanes.splat(2.121_944_4e-4), r);
    let p = horner(
        lanes,
        lanes.splat(1.987_569_1e-4),
        r,
        &[1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5],
    );
    let p = lanes.add(lanes.fma(p, lanes.mul(r, r), r), lanes.splat(1.0));
    let value = lanes.mul(p, lanes.exp2i(n));
    lanes.select_less(x, lowest, lanes.splat(0.0), value)
}

/// silu(x) = x / (1 + e^-x), within 4 ulp above -87; below, zero of the same sign.
#[inline(always)]
pub(crate) fn silu<L: Lanes>(lanes: L, x: L::V) -> L::V {
    let negated = lanes.sub(lanes.splat(0.0), x);
    lanes.div(x, lanes.add(lanes.splat(1.0), exp(lanes, negated)))
}

/// x/2 (1 + tanh(u)) with u = sqrt(2/π) (x + 0.044715 x³), within `3e-7 * |x|`.
///
/// Computed as x / (1 + e^-2u), the same function without the cancellation of 1 + tanh.
#[inline(always)]
pub(crate) fn gelu_tanh<L: Lanes>(lanes: L, x: L::V) -> L::V {
    // -2 sqrt(2/π) and that times 0.044715.
    let squared = lanes.mul(x, x);
    let factor = lanes.fma(squared, lanes.splat(-7.135_481_3e-2), lanes.splat(-1.595_769));
    lanes.div(x, lanes.add(lanes.splat(1.0), exp(lanes, lanes.mul(x, factor))))
}

/// tanh(x) within 3 ulp; NaN for NaN.
///
/// Below 0.625 the polynomial of Cephes `tanhf` (Moshier 1989), beyond it 1 - 2 / (e^2|x| + 1).
#[inline(always)]
pub(crate) fn tanh<L: Lanes>(lanes: L, x: L::V) -> L::V {
    let t = lanes.abs(x);
    let s = lanes.mul(x, x);
    let near = horner(
        lanes,
        lanes.splat(-5.704_988_7e-3),
        s,
        &[2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1],
    );
    let near = lanes.fma(lanes.mul(near, s), x, x);
    let one = lanes.splat(1.0);
    let power = exp(lanes, lanes.add(t, t));
    let far = lanes.sub(one, lanes.div(lanes.splat(2.0), lanes.add(power, one)));
    lanes.select_less(lanes.splat(0.625), t, lanes.copy_sign(far, x), near)
}

/// cap tanh(x / cap), within 5 ulp.
#[inline(always)]
pub(crate) fn soft_cap<L: Lanes>(lanes: L, x: L::V, cap: f32) -> L::V {
    let cap = lanes.splat(cap);
    lanes.mul(cap, tanh(lanes, lanes.div(x, cap)))
}

/// erf(x) within 2 ulp.
///
/// Two ranges, after N. Juffa: near zero x + x p(x²); beyond 475/512, 1 - e^q(|x|) with a minimax q.
#[inline(always)]
pub(crate) fn erf<L: Lanes>(lanes: L, x: L::V) -> L::V {
    let t = lanes.abs(x);
    let s = lanes.mul(x, x);
    let near = horner(
        lanes,
        lanes.splat(-5.967_617e-4),
        s,
        &[4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_2e-1, -3.761_253_4e-1, 1.283_791_7e-1],
    );
    let near = lanes.fma(near, x, x);
    let r = lanes.fma(lanes.splat(-1.728_534_7e-5), t, lanes.splat(3.831_972_6e-4));
    let u = lanes.fma(lanes.splat(-3.883_964_4e-3), t, lanes.splat(2.425_462_2e-2));
    // Horner in pairs of terms: r s + u is the upper part.
    let r =
        horner(lanes, lanes.fma(r, s, u), t, &[-1.067_778_8e-1, -6.348_467e-1, -1.287_175_1e-1]);
    let r = lanes.fma(r, t, lanes.sub(lanes.splat(0.0), t));
    let far = lanes.copy_sign(lanes.sub(lanes.splat(1.0), exp(lanes, r)), x);
    lanes.select_less(lanes.splat(475.0 / 512.0), t, far, near)
}

/// `((value x + c0) x + c1) x + ...`
#[inline(always)]
fn horner<L: Lanes>(lanes: L, mut value: L::V, x: L::V, coefficients: &[f32]) -> L::V {
    for &coefficient in coefficients {
        value = lanes.fma(value, x, lanes.splat(coefficient));
    }
    value
}

/// gelu(x) = x/2 (1 + erf(x / sqrt 2)), within `3e-7 * max(|x|, |gelu(x)|)`.
#[inline(always)]
pub(crate) fn gelu<L: Lanes>(lanes: L, x: L::V) -> L::V {
    let scaled = lanes.mul(x, lanes.splat(std::f32::consts::FRAC_1_SQRT_2));
    let half = lanes.mul(x, lanes.splat(0.5));
    lanes.fma(half, erf(lanes, scaled), half)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Scalar;

    /// The largest error in ulp of the exact value over a grid.
    fn worst(
        range: std::ops::Range<f64>,
        got: impl Fn([f32; 16]) -> [f32; 16],
        exact: impl Fn(f64) -> f64,
        unit: impl Fn(f64, f64) -> f64,
    ) -> f64 {
        let n = 200_000;
        let mut worst = 0.0_f64;
        for i in 0..n {
            let x = (range.start + (range.end - range.start) * f64::from(i) / f64::from(n)) as f32;
            let expected = exact(f64::from(x));
            let error = (f64::from(got([x; 16])[0]) - expected).abs();
            worst = worst.max(error / unit(f64::from(x), expected));
        }
        worst
    }

    fn ulp(_x: f64, y: f64) -> f64 {
        2.0_f64.powi(y.abs().max(1e-38).log2().floor() as i32 - 23)
    }

    /// NIST DLMF 7.6.2; all terms positive, enough of them below 4.5.
    fn exact_erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= 2.0 * x * x / f64::from(2 * n + 1);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let error = worst(-87.0..88.0, |x| exp(Scalar, x), f64::exp, ulp);
        assert!(error <= 2.0, "{error} ulp");
        assert_eq!(exp(Scalar, [-100.0; 16])[0], 0.0);
        assert_eq!(exp(Scalar, [f32::NEG_INFINITY; 16])[0], 0.0);
        assert_eq!(exp(Scalar, [89.0; 16])[0], f32::INFINITY);
        assert!(exp(Scalar, [f32::NAN; 16])[0].is_nan());
    }

    #[test]
    fn silu_is_within_four_ulp() {
        let silu_f64 = |x: f64| x / (1.0 + (-x).exp());
        let error = worst(-87.0..87.0, |x| silu(Scalar, x), silu_f64, ulp);
        assert!(error <= 4.0, "{error} ulp");
    }

    #[test]
    fn tanh_is_within_three_ulp() {
        for range in [-12.0..12.0, -1.0..1.0, -1e-3..1e-3] {
            let error = worst(range.clone(), |x| tanh(Scalar, x), f64::tanh, ulp);
            assert!(error <= 3.0, "{error} ulp in {range:?}");
        }
        assert_eq!(tanh(Scalar, [f32::INFINITY; 16])[0], 1.0);
        assert_eq!(tanh(Scalar, [f32::NEG_INFINITY; 16])[0], -1.0);
        assert!(tanh(Scalar, [f32::NAN; 16])[0].is_nan());
    }

    #[test]
    fn soft_cap_is_within_five_ulp() {
        let exact = |x: f64| 30.0 * (x / 30.0).tanh();
        let error = worst(-200.0..200.0, |x| soft_cap(Scalar, x, 30.0), exact, ulp);
        assert!(error <= 5.0, "{error} ulp");
    }

    #[test]
    fn gelu_by_tanh_is_within_its_bound() {
        let exact = |x: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        };
        let unit = |x: f64, _: f64| 3e-7 * x.abs().max(1e-30);
        let error = worst(-12.0..12.0, |x| gelu_tanh(Scalar, x), exact, unit);
        assert!(error <= 1.0, "{error} of the bound");
    }

    #[test]
    fn erf_is_within_two_ulp() {
        let error = worst(1e-3..4.5, |x| erf(Scalar, x), exact_erf, ulp);
        assert!(error <= 2.0, "{error} ulp");
        let mirrored = worst(-4.5..-1e-3, |x| erf(Scalar, x), exact_erf, ulp);
        assert!(mirrored <= 2.0, "{mirrored} ulp");
    }

    #[test]
    fn gelu_is_within_its_bound() {
        let exact = |x: f64| 0.5 * x * (1.0 + exact_erf(x * std::f64::consts::FRAC_1_SQRT_2));
        let unit = |x: f64, y: f64| 3e-7 * x.abs().max(y.abs()).max(1e-30);
        let error = worst(-6.0..6.0, |x| gelu(Scalar, x), exact, unit);
        assert!(error <= 1.0, "{error} of the bound");
    }
}
