//! Philox4x32-10, the counter-based generator of Random123.
//!
//! A draw is a pure function of (seed, sequence, step), so co-batched traffic, admission order and
//! restarts cannot change it. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy
//! as 1, 2, 3" (SC 2011), and the known answers of the Random123 distribution.

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Key increments a round: the golden ratio and sqrt(3) - 1, as 32-bit fractions.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The block function: a 128-bit counter under a 64-bit key gives 128 random bits.
#[must_use]
pub(crate) fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut block = counter;
    let mut key = key;
    for _ in 0..ROUNDS {
        let (high0, low0) = wide_product(MULTIPLIERS[0], block[0]);
        let (high1, low1) = wide_product(MULTIPLIERS[1], block[2]);
        block = [high1 ^ block[1] ^ key[0], low1, high0 ^ block[3] ^ key[1], low0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    block
}

/// A uniform number in [0, 1) with 53 random bits, times 2⁵³, for one step of one sequence.
///
/// The key is the seed; the counter is (step, sequence).
#[must_use]
pub(crate) fn numerator(seed: u64, sequence: u64, step: u64) -> u64 {
    let [step_low, step_high] = halves(step);
    let [sequence_low, sequence_high] = halves(sequence);
    let block = philox4x32([step_low, step_high, sequence_low, sequence_high], halves(seed));
    let high = u64::from(block[0] >> 5); // 27 bits
    let low = u64::from(block[1] >> 6); // 26 bits
    (high << 26) | low
}

/// The same as a number in [0, 1).
#[cfg(test)]
pub(crate) fn uniform(seed: u64, sequence: u64, step: u64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "the value has 53 bits, which f64 holds exactly"
    )]
    let numerator = numerator(seed, sequence, step) as f64;
    numerator / 9_007_199_254_740_992.0 // 2^53
}

fn wide_product(a: u32, b: u32) -> (u32, u32) {
    let [low, high] = halves(u64::from(a) * u64::from(b));
    (high, low)
}

/// `[low, high]` 32-bit halves.
#[expect(clippy::cast_possible_truncation, reason = "the cut into halves is the purpose")]
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of Random123, lines `philox4x32 10`.
    #[test]
    fn block_function_gives_the_known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    #[test]
    fn uniform_depends_on_each_coordinate_and_stays_in_range() {
        let base = uniform(1, 2, 3);
        assert!(base.to_bits() == uniform(1, 2, 3).to_bits());
        for other in [uniform(2, 2, 3), uniform(1, 3, 3), uniform(1, 2, 4), uniform(1 << 32, 2, 3)]
        {
            assert!(base.to_bits() != other.to_bits());
        }
        let n = 20_000_u32;
        let mean = (0..n).map(|step| uniform(7, 0, u64::from(step))).sum::<f64>() / f64::from(n);
        // Standard error of the mean of uniforms: sqrt(1/12/n) = 0.0020; five of them.
        assert!((mean - 0.5).abs() < 0.0102, "{mean}");
        assert!((0..n).all(|step| (0.0..1.0).contains(&uniform(7, 1, u64::from(step)))));
    }
}
