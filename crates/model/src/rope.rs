//! From a [`RopeConfig`] to the frequencies of a rotary embedding.

use std::f64::consts::TAU;

use exrail_checkpoint::{RopeConfig, RopePairs, RopeScaling};
use exrail_kernels::{Rope, RopeStyle};

/// Pair i turns by position · theta^(-2i/R) (Su et al. 2021, arXiv:2104.09864, §3.2.2), stretched
/// as the configuration says for a context of `context_len` tokens.
pub(crate) fn rope(config: &RopeConfig, context_len: usize) -> Rope {
    let n_pairs = config.dim / 2;
    let theta = config.theta_for(context_len);
    let plain = |i: usize| theta.powf(-(i as f64) / n_pairs as f64);
    let divided = |factors: &[f32]| -> Vec<f64> {
        (0..n_pairs).map(|i| plain(i) / f64::from(factors[i])).collect()
    };
    let mut magnitude = 1.0;
    let frequencies: Vec<f64> = match &config.scaling {
        // Dynamic NTK is a change of theta, which is done above.
        RopeScaling::None | RopeScaling::DynamicNtk { .. } => (0..n_pairs).map(plain).collect(),
        RopeScaling::Linear { factor } => {
            (0..n_pairs).map(|i| plain(i) / f64::from(*factor)).collect()
        }
        RopeScaling::Factors(factors) => divided(factors),
        RopeScaling::Long { short, long, original_len, magnitude: stated } => {
            magnitude = *stated;
            divided(if context_len > *original_len { long } else { short })
        }
        &RopeScaling::Llama3 {
            factor,
            low_frequency_factor,
            high_frequency_factor,
            original_len,
        } => {
            let (low, high) = (f64::from(low_frequency_factor), f64::from(high_frequency_factor));
            let stretch = |frequency: f64| {
                let turns = original_len as f64 * frequency / TAU;
                let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - keep) * frequency / f64::from(factor) + keep * frequency
            };
            (0..n_pairs).map(|i| stretch(plain(i))).collect()
        }
        &RopeScaling::Yarn {
            factor,
            original_len,
            beta_fast,
            beta_slow,
            magnitude: stated,
            truncate,
        } => {
            magnitude = stated.unwrap_or(if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 });
            // The pair that turns `rotations` times within the trained length.
            let pair = |rotations: f32| {
                let wave = original_len as f64 / (f64::from(rotations) * TAU);
                config.dim as f64 * wave.ln() / (2.0 * theta.ln())
            };
            let (low, high) = (pair(beta_fast), pair(beta_slow));
            let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, high) = (low.max(0.0), high.min(config.dim as f64 - 1.0));
            let span = if high > low { high - low } else { 0.001 };
            (0..n_pairs)
                .map(|i| {
                    let ramp = ((i as f64 - low) / span).clamp(0.0, 1.0);
                    plain(i) / f64::from(factor) * ramp + plain(i) * (1.0 - ramp)
                })
                .collect()
        }
    };
    let style = match config.pairs {
        RopePairs::Adjacent => RopeStyle::Interleaved,
        RopePairs::Halves => RopeStyle::Halves,
    };
    let inverse_frequencies = frequencies.into_iter().map(|f| f as f32).collect();
    Rope { inverse_frequencies, style, magnitude }
}
