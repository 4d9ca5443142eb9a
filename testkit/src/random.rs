//! [`Random`]: SplitMix64 and near-Gaussian numbers, the same on every platform.

/// A seeded stream of numbers (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The stream of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random { state: seed }
    }

    /// The stream of `seed` and a name, independent of the streams of other names.
    #[must_use]
    pub fn named(seed: u64, name: &str) -> Random {
        // FNV-1a.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut random = Random::new(seed ^ hash);
        random.u64();
        random
    }

    /// A uniform 64-bit number.
    pub fn u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A uniform number below `limit`, which must not be 0. Slightly biased for huge limits.
    ///
    /// # Panics
    /// When `limit` is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.u64() % limit as u64).expect("below a usize")
    }

    /// A number of mean 0 and variance 1: the sum of twelve uniform numbers less six
    /// (Irwin-Hall), which needs no logarithm and therefore no platform's mathematics library.
    pub fn gaussian(&mut self) -> f32 {
        let mut sum = 0_u64;
        for _ in 0..6 {
            let bits = self.u64();
            sum += (bits >> 32) + (bits & 0xffff_ffff);
        }
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            reason = "36 bits are exact in f64; rounding to f32 is the result's precision"
        )]
        let value = (sum as f64 / 4_294_967_296.0 - 6.0) as f32;
        value
    }

    /// `len` Gaussian numbers times `scale`.
    pub fn gaussians(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.gaussian() * scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_numbers_are_those_of_the_reference_implementation() {
        let mut random = Random::new(1_234_567);
        assert_eq!(random.u64(), 6_457_827_717_110_365_317);
        assert_eq!(random.u64(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn gaussian_has_mean_zero_and_variance_one() {
        let values = Random::new(1).gaussians(100_000, 1.0);
        let n = 100_000.0;
        let mean = values.iter().sum::<f32>() / n;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n;
        // Four standard errors of each.
        assert!(mean.abs() < 0.013, "{mean}");
        assert!((variance - 1.0).abs() < 0.018, "{variance}");
    }
}
