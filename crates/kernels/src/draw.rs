//! [`Draw`]: which token of a row of logits a draw gives, to the last bit the same on every device.
//!
//! The weight of a token is w = e^((x - max) / temperature) in f32, each operation rounded once and none
//! fused, with the exponential of [`exp_nonpositive`]. Its mass is ⌊w · 2⁴⁰⌋, an integer, so that no sum
//! depends on its order; a token without mass is never drawn. With candidates ordered by weight, the
//! heavier first and the lower id first on a tie:
//!
//! 1. top-k leaves the first k;
//! 2. top-p leaves the smallest head whose mass reaches ⌈share · total / 2³²⌉, where total is the mass
//!    that top-k left and share = ⌈top_p · 2³²⌉;
//! 3. min-p leaves weights of at least `min_p`;
//! 4. what is left is laid out in the order of ids, and the token is the one on whose mass the place
//!    ⌊numerator · total / 2⁵³⌋ falls, where total is the mass that is left.

use std::cmp::Ordering;

use crate::Largest;

/// First guess of how many candidates top-p keeps; grown until the mass is reached.
const FIRST_HEAD: usize = 64;
/// Values whose exponents are looked at together.
const BLOCK: usize = 256;
const LANES: usize = 16;

/// How the token of one row is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Logits are divided by it; 0: the largest one, the lowest id on a tie.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens with this part of the mass, (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this part of the most likely one's weight, [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// The uniform number in [0, 1) that decides, times 2⁵³: below that.
    pub numerator: u64,
}

/// How the tokens of some rows are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draws<'a> {
    /// Values of a row that may be drawn, the first ones; at least 1.
    pub limit: usize,
    /// One a row, `(T)`.
    pub rows: &'a [Draw],
}

/// Buffers that draws share; they grow to the vocabulary once.
#[derive(Debug, Default)]
pub struct DrawScratch {
    candidates: Vec<Candidate>,
}

/// A token that may be drawn, and its weight: 1 for the most likely one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    id: u32,
    weight: f32,
}

impl Draw {
    /// The largest value.
    pub const LARGEST: Draw =
        Draw { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, numerator: 0 };

    /// Draws a token: its index, beside the largest of `values`, which is NaN where one of them is not
    /// finite; the index may then be any.
    ///
    /// # Panics
    /// When there is no value.
    #[must_use]
    pub fn of(&self, values: &[f32], scratch: &mut DrawScratch) -> Largest {
        assert!(!values.is_empty(), "a row has outputs");
        if !all_finite(values) {
            return Largest { index: 0, value: f32::NAN };
        }
        let value = maximum(values);
        let index = if self.is_greedy() {
            u32::try_from(argmax(values)).expect("outputs are numbered in 32 bits")
        } else {
            let candidates = &mut scratch.candidates;
            weigh(values, value, self.temperature, candidates);
            self.truncate(candidates);
            self.choose(candidates)
        };
        Largest { index, value }
    }

    /// Whether the largest value is drawn, whatever it decides by.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0
    }

    /// ⌈top_p · 2³²⌉: of so many parts of the mass, top-p keeps 2³².
    #[must_use]
    pub fn share(&self) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a whole number from 1 to 2^32"
        )]
        let share = (f64::from(self.top_p) * 4_294_967_296.0).ceil() as u64;
        share
    }

    /// Top-k, then top-p, then min-p. Leaves at least one candidate, and the order of ids.
    fn truncate(&self, candidates: &mut Vec<Candidate>) {
        let k = self.top_k as usize;
        let mut is_sorted = true;
        if k > 0 && k < candidates.len() {
            sort_head(candidates, k);
            candidates.truncate(k);
            is_sorted = false;
        }
        if self.top_p < 1.0 {
            let wanted =
                (u128::from(self.share()) * u128::from(total(candidates))).div_ceil(1 << 32);
            let kept = reaching(candidates, wanted);
            candidates.truncate(kept);
            is_sorted = false;
        }
        if self.min_p > 0.0 {
            // The most likely token has weight 1 and is never cut by the filters above.
            candidates.retain(|candidate| candidate.weight >= self.min_p);
        }
        if !is_sorted {
            candidates.sort_unstable_by_key(|candidate| candidate.id);
        }
    }

    /// The candidate on whose mass the draw falls.
    fn choose(&self, candidates: &[Candidate]) -> u32 {
        let place = (u128::from(self.numerator) * u128::from(total(candidates))) >> 53;
        let mut left = u64::try_from(place).expect("a numerator is below 2^53");
        for candidate in candidates {
            match left.checked_sub(mass(candidate.weight)) {
                Some(rest) => left = rest,
                None => return candidate.id,
            }
        }
        unreachable!("the place is below the total, which is above 0: {self:?}");
    }
}

impl Draws<'_> {
    /// Draws from the first `limit` values of each row of `values` `(T, width)`.
    ///
    /// # Panics
    /// When `limit` is zero or more than `width`, or there are not as many rows as draws.
    #[must_use]
    pub fn of_rows(&self, values: &[f32], width: usize) -> Vec<Largest> {
        assert_eq!(values.len(), self.rows.len() * width, "a row for each draw");
        let mut scratch = DrawScratch::default();
        let rows = values.chunks_exact(width).zip(self.rows);
        rows.map(|(row, draw)| draw.of(&row[..self.limit], &mut scratch)).collect()
    }
}

/// ⌊weight · 2⁴⁰⌋ of a weight from 0 to 1, by its bits: a significand of 24 and an exponent.
fn mass(weight: f32) -> u64 {
    let bits = weight.to_bits();
    let significand = u64::from(bits & 0x007f_ffff | 0x0080_0000);
    (significand << 17) >> (127 - (bits >> 23)).min(63)
}

fn total(candidates: &[Candidate]) -> u64 {
    candidates.iter().map(|candidate| mass(candidate.weight)).sum()
}

/// Fills `candidates` with every token that has mass, in the order of ids.
fn weigh(values: &[f32], max: f32, temperature: f32, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    candidates.extend(
        (0_u32..)
            .zip(values)
            .map(|(id, &x)| Candidate { id, weight: exp_nonpositive((x - max) / temperature) }),
    );
    candidates.retain(|candidate| candidate.weight >= LEAST_WEIGHT);
}

/// 2⁻⁴⁰, the least weight that has mass.
const LEAST_WEIGHT: f32 = 1.0 / 1_099_511_627_776.0;

/// How many candidates have the mass together, which they all reach, in their order; they are in front
/// then.
fn reaching(candidates: &mut [Candidate], wanted: u128) -> usize {
    let mut head = FIRST_HEAD;
    loop {
        let n = sort_head(candidates, head);
        let mut sum = 0;
        let reached = candidates[..n].iter().position(|candidate| {
            sum += u128::from(mass(candidate.weight));
            sum >= wanted
        });
        match reached {
            Some(last) => return last + 1,
            None if n == candidates.len() => return n,
            None => head *= 4,
        }
    }
}

/// Brings the `n` most likely candidates to the front, in their order; returns how many there are.
fn sort_head(candidates: &mut [Candidate], n: usize) -> usize {
    let order = |a: &Candidate, b: &Candidate| -> Ordering {
        b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
    };
    let n = n.min(candidates.len());
    if n > 0 && n < candidates.len() {
        candidates.select_nth_unstable_by(n - 1, order);
    }
    candidates[..n].sort_unstable_by(order);
    n
}

/// e^x for x ≤ 0, written so that the compiler can vectorise it: libm's costs 4 ns a value, and a
/// vocabulary of 49,152 values is read at every token. Every device computes it in these steps, each
/// rounded to f32.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; e^r by the polynomial of Cephes `expf`. Relative error below
/// 2e-7; below -87 the result is 0 (true value under 2e-38).
#[inline]
#[must_use]
#[expect(clippy::excessive_precision, reason = "coefficients as Cephes prints them")]
pub fn exp_nonpositive(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    let shifted = x.max(-87.0) * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x.max(-87.0) - n * 0.693_359_375 + n * 2.121_944_40e-4;
    let mut p = 1.987_569_150_0e-4_f32;
    for coefficient in [
        1.398_199_950_7e-3,
        8.333_451_907_3e-3,
        4.166_579_589_4e-2,
        1.666_666_545_9e-1,
        5.000_000_120_1e-1,
    ] {
        p = p * r + coefficient;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let value = (p * r * r + r + 1.0) * f32::from_bits(exponent);
    if x < -87.0 { 0.0 } else { value }
}

/// Whether no value is NaN or infinite. Exponent bits all set mean one of these; an OR over integers
/// vectorises, `all` does not.
#[must_use]
pub fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    values
        .chunks(BLOCK)
        .all(|block| !block.iter().fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT)))
}

/// The largest of finite values; of none, -∞.
#[must_use]
pub fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |max, &x| max.max(x))
}

/// The index of the largest value, the lowest one on a tie.
///
/// # Panics
/// No value, or NaN among them.
#[must_use]
pub fn argmax(values: &[f32]) -> usize {
    #[expect(clippy::float_cmp, reason = "the maximum is one of the values, bit for bit or ±0")]
    let at = |max: f32| values.iter().position(|&x| x == max);
    at(maximum(values)).expect("finite values have a maximum")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_within_its_bound() {
        for i in 0..43_500_u16 {
            let x = -f32::from(i) / 500.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_nonpositive(x)) - exact).abs() / exact;
            assert!(error < 2e-7, "{x}: {error}");
        }
        assert!(exp_nonpositive(0.0).to_bits() == 1.0_f32.to_bits());
        assert!(exp_nonpositive(-88.0) == 0.0);
        assert!(exp_nonpositive(f32::NEG_INFINITY) == 0.0);
    }

    #[test]
    fn a_mass_is_its_weight_in_whole_parts_of_2_to_the_minus_40() {
        let one = 1_u64 << 40;
        let cases = [(1.0, one), (0.75, one / 4 * 3), (LEAST_WEIGHT, 1), (1.5 * LEAST_WEIGHT, 1)];
        for (weight, expected) in cases {
            assert_eq!(mass(weight), expected, "{weight:e}");
        }
        // The next f32 below, and what is far below, down to nothing.
        for weight in [f32::from_bits(LEAST_WEIGHT.to_bits() - 1), 1e-20, 1e-38, 1e-45, 0.0] {
            assert_eq!(mass(weight), 0, "{weight:e}");
        }
        for i in 0..10_000_u16 {
            let weight = exp_nonpositive(-f32::from(i) / 400.0);
            // Both steps are exact, so that only the fraction is lost.
            assert_eq!(mass(weight), (f64::from(weight) * one as f64) as u64, "{weight:e}");
        }
    }

    /// Candidates of a wide distribution, in the order of ids or in another one.
    fn candidates(is_shuffled: bool) -> Vec<Candidate> {
        let n = 50_000_u32;
        let id = |i: u32| if is_shuffled { (i * 7919 + 31) % n } else { i };
        (0..n)
            .map(|i| {
                let id = id(i);
                let x = -((u64::from(id) * 104_729 % 99_991) as f32) / 6000.0;
                Candidate { id, weight: exp_nonpositive(x) }
            })
            .collect()
    }

    #[test]
    fn sums_do_not_depend_on_their_order_where_those_of_floats_do() {
        let [ordered, shuffled] = [candidates(false), candidates(true)];
        assert_ne!(ordered, shuffled);
        assert_eq!(total(&ordered), total(&shuffled));
        let floats = |candidates: &[Candidate]| -> f64 {
            candidates.iter().map(|candidate| f64::from(candidate.weight)).sum()
        };
        assert_ne!(floats(&ordered).to_bits(), floats(&shuffled).to_bits());
        let filtered = Draw { top_k: 20_000, top_p: 0.9, min_p: 0.01, ..Draw::LARGEST };
        let kept = |mut candidates: Vec<Candidate>| {
            filtered.truncate(&mut candidates);
            candidates
        };
        assert_eq!(kept(ordered), kept(shuffled));
    }

    #[test]
    fn top_p_grows_its_head_over_flat_distributions() {
        let flat = vec![0.0_f32; 1000];
        let mut candidates = Vec::new();
        weigh(&flat, 0.0, 1.0, &mut candidates);
        Draw { top_p: 0.9, ..Draw::LARGEST }.truncate(&mut candidates);
        assert_eq!(candidates.len(), 900);
        assert!(candidates.iter().zip(0..).all(|(candidate, id)| candidate.id == id));
    }

    #[test]
    fn the_whole_is_kept_at_one_and_a_part_of_it_below() {
        let share = |top_p| Draw { top_p, ..Draw::LARGEST }.share();
        assert_eq!(share(1.0), 1 << 32);
        assert_eq!(share(0.5), 1 << 31);
        assert_eq!(share(f32::MIN_POSITIVE), 1);
        assert!(share(0.999_999_94) < 1 << 32);
    }

    #[test]
    fn the_most_likely_is_the_first_of_equal_ones() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), 1);
        let drawn = Draw::LARGEST.of(&[1.0, 3.0, 3.0, 2.0], &mut DrawScratch::default());
        assert_eq!(drawn, Largest { index: 1, value: 3.0 });
    }
}
