//! ΔS, the semantic stress of two texts: `1 − cos`, with its undefined states, over windows and
//! over sets of chunks (§1.1). Does not encode text; it takes the encoder's vectors.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How far a vector's norm may be from 1 before ΔS refuses it (G-24). Vectors are never quietly
/// renormalised: a wrong norm means another encoder, pooling or dtype.
const NORM_TOLERANCE: f64 = 1e-3;

/// The raw semantic stress of two texts, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ds {
    /// `1 − <a, b>` of unit vectors, in [0, 2]; 0 is the same direction, 1 is orthogonal.
    Value(f64),
    /// No number exists; a gate that meets this fails closed.
    Undefined(UndefinedDs),
}

impl Ds {
    /// The number, if there is one.
    #[must_use]
    pub fn value(self) -> Option<f64> {
        match self {
            Ds::Value(value) => Some(value),
            Ds::Undefined(_) => None,
        }
    }
}

/// Why ΔS of two texts is undefined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UndefinedDs {
    /// A text is empty, so it has no windows or its vector has no entries.
    EmptyText,
    /// A vector holds NaN or an infinity.
    NotFinite,
    /// A vector is zero.
    ZeroNorm,
    /// A vector's norm differs from 1 by more than 1e-3.
    NotUnitNorm,
    /// The vectors have different lengths, hence come from different encoders.
    LengthMismatch,
}

impl fmt::Display for UndefinedDs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            UndefinedDs::EmptyText => "a text is empty",
            UndefinedDs::NotFinite => "an embedding is not finite",
            UndefinedDs::ZeroNorm => "an embedding has norm zero",
            UndefinedDs::NotUnitNorm => "an embedding's norm is not 1",
            UndefinedDs::LengthMismatch => "the embeddings have different lengths",
        })
    }
}

/// Raw ΔS of two unit vectors of one encoder, summed in f64 (§1.1.2).
#[must_use]
pub fn ds(a: &[f32], b: &[f32]) -> Ds {
    if a.is_empty() || b.is_empty() {
        return Ds::Undefined(UndefinedDs::EmptyText);
    }
    if a.len() != b.len() {
        return Ds::Undefined(UndefinedDs::LengthMismatch);
    }
    for vector in [a, b] {
        let norm = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Ds::Undefined(UndefinedDs::NotFinite);
        }
        if norm == 0.0 {
            return Ds::Undefined(UndefinedDs::ZeroNorm);
        }
        if (norm - 1.0).abs() > NORM_TOLERANCE {
            return Ds::Undefined(UndefinedDs::NotUnitNorm);
        }
    }
    let dot: f64 = a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
    // Norms within 1e-3 of 1 can carry the value 2e-3 outside the range.
    Ds::Value((1.0 - dot).clamp(0.0, 2.0))
}

/// Raw ΔS of a text and the windows of a longer text: the minimum over the windows (§1.1.3).
/// No windows is an empty text; one undefined window makes the whole undefined, because the
/// minimum over the others could hide a broken vector.
#[must_use]
pub fn ds_windows(text: &[f32], windows: &[Vec<f32>]) -> Ds {
    let mut least = Ds::Undefined(UndefinedDs::EmptyText);
    for window in windows {
        match (ds(text, window), least) {
            (Ds::Undefined(reason), _) => return Ds::Undefined(reason),
            (Ds::Value(value), Ds::Value(least_value)) if value >= least_value => {}
            (Ds::Value(value), _) => least = Ds::Value(value),
        }
    }
    least
}

/// ΔS of a question and the set of chunks that entered the prompt (§1.1.5).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SetDs {
    /// The set holds at least one chunk and every chunk has a value.
    Values {
        /// The nearest chunk: is there support? This is the headline that gates.
        min: f64,
        /// Mean weighted by the chunks' tokens: is there contamination?
        mean: f64,
        /// The farthest chunk.
        max: f64,
    },
    /// No chunk entered the prompt; the gate fails closed.
    NoEvidence,
    /// At least one chunk's ΔS is undefined.
    Undefined(UndefinedDs),
}

/// Aggregates ΔS over chunks given as `(ΔS, tokens)`. A chunk of zero tokens counts as one, so
/// that it cannot vanish from the mean.
#[must_use]
pub fn set_ds(chunks: &[(Ds, usize)]) -> SetDs {
    if chunks.is_empty() {
        return SetDs::NoEvidence;
    }
    let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
    let (mut weighted, mut weight) = (0.0, 0.0);
    for &(value, n_tokens) in chunks {
        match value {
            Ds::Undefined(reason) => return SetDs::Undefined(reason),
            Ds::Value(value) => {
                #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
                let n_tokens = n_tokens.max(1) as f64;
                min = min.min(value);
                max = max.max(value);
                weighted += value * n_tokens;
                weight += n_tokens;
            }
        }
    }
    // Rounding must not carry the mean outside the range of its members.
    SetDs::Values { min, mean: (weighted / weight).clamp(min, max), max }
}

/// The named pairs of texts between which ΔS is taken (§1.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// Question and retrieved chunk.
    DsQr,
    /// Retrieved chunk and anchor.
    DsRa,
    /// Question and anchor: a property of the gold item.
    DsQa,
    /// Adjacent chunks.
    DsJoin,
    /// Answer and cited chunks.
    DsAc,
    /// Turn and goal.
    DsTurn,
}

impl Probe {
    /// The family whose calibration map holds for this probe (§1.1.7).
    #[must_use]
    pub fn family(self) -> Family {
        match self {
            Probe::DsQr | Probe::DsQa => Family::QuestionEvidence,
            Probe::DsRa | Probe::DsJoin | Probe::DsAc | Probe::DsTurn => Family::TextText,
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Probe::DsQr => "ds_qr",
            Probe::DsRa => "ds_ra",
            Probe::DsQa => "ds_qa",
            Probe::DsJoin => "ds_join",
            Probe::DsAc => "ds_ac",
            Probe::DsTurn => "ds_turn",
        })
    }
}

/// What has a calibration map of its own (§1.1.7): the two kinds of pairs of ΔS, and the signals
/// beside it, which no probe of ΔS belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Family {
    /// A question against text that may answer it.
    #[serde(rename = "qe")]
    QuestionEvidence,
    /// A text against a text of the same kind, pairs of answers and of paraphrases included.
    #[serde(rename = "tt")]
    TextText,
    /// How much of a question's words the evidence lacks.
    #[serde(rename = "lexical")]
    Lexical,
    /// ΔS and words together.
    #[serde(rename = "joint")]
    Joint,
}

impl fmt::Display for Family {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Family::QuestionEvidence => "qe",
            Family::TextText => "tt",
            Family::Lexical => "lexical",
            Family::Joint => "joint",
        })
    }
}

/// The bands of the calibrated scale, a partition of [0, 1] without holes (§1.1.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Band {
    /// [0, 0.40)
    Stable,
    /// [0.40, 0.45]: passes, at the edge.
    PassEdge,
    /// (0.45, 0.60)
    Review,
    /// [0.60, 0.85)
    Fail,
    /// [0.85, 1]: no nearer than off-topic text.
    Danger,
}

impl Band {
    /// The band of a calibrated ΔS. NaN lands in `Danger`: an unknown must not pass.
    #[must_use]
    pub fn of(calibrated: f64) -> Band {
        if calibrated < 0.40 {
            Band::Stable
        } else if calibrated <= 0.45 {
            Band::PassEdge
        } else if calibrated < 0.60 {
            Band::Review
        } else if calibrated < 0.85 {
            Band::Fail
        } else {
            Band::Danger
        }
    }

    /// Whether this band opens the gate: calibrated ΔS ≤ 0.45.
    #[must_use]
    pub fn passes(self) -> bool {
        matches!(self, Band::Stable | Band::PassEdge)
    }
}

impl fmt::Display for Band {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Band::Stable => "stable",
            Band::PassEdge => "pass_edge",
            Band::Review => "review",
            Band::Fail => "fail",
            Band::Danger => "danger",
        })
    }
}

/// How much farther the best wrong chunk is from the question than the anchor's chunk, on the
/// calibrated scale (§1.1.9). At or below 0.05 the boundaries are flat: re-chunk or re-embed.
#[must_use]
pub fn decoy_margin(best_decoy: f64, anchor_chunk: f64) -> f64 {
    best_decoy - anchor_chunk
}

/// The two curves over k of §1.1.10 and what they say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KSweep {
    /// `(k, ds_min, ds_mean)`, calibrated, in the order given.
    pub points: Vec<(usize, f64, f64)>,
    /// The nearest chunk is far at k = 20 and no nearer than at k = 5: suspect the index, the
    /// metric or the normalisation.
    pub flat_high: bool,
    /// `ds_mean` falls by more than 0.05 from one k to the next: the ranker orders by something
    /// else than this similarity.
    pub ranker_split: bool,
}

/// Reads the curves `(k, ds_min, ds_mean)`, ascending in k. The flags are about the first and
/// the last point, which are k = 5 and k = 20 in the specification.
#[must_use]
pub fn k_sweep(points: &[(usize, f64, f64)]) -> KSweep {
    let flat_high = match (points.first(), points.last()) {
        (Some(first), Some(last)) if points.len() > 1 => last.1 >= 0.60 && first.1 - last.1 <= 0.05,
        _ => false,
    };
    let ranker_split = points.windows(2).any(|pair| pair[0].2 - pair[1].2 > 0.05);
    KSweep { points: points.to_vec(), flat_high, ranker_split }
}

/// The residual norm `√(2·ds)`, which for unit vectors is their Euclidean distance (§1.4.1).
#[must_use]
pub fn residual(raw: f64) -> f64 {
    (2.0 * raw).sqrt()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unit(vector: &[f32]) -> Vec<f32> {
        let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
        vector.iter().map(|x| x / norm).collect()
    }

    #[test]
    fn undefined_is_never_a_number() {
        let a = [1.0, 0.0];
        assert_eq!(ds(&a, &[]), Ds::Undefined(UndefinedDs::EmptyText));
        assert_eq!(ds(&a, &[0.0, 0.0]), Ds::Undefined(UndefinedDs::ZeroNorm));
        assert_eq!(ds(&a, &[f32::NAN, 0.0]), Ds::Undefined(UndefinedDs::NotFinite));
        assert_eq!(ds(&a, &[2.0, 0.0]), Ds::Undefined(UndefinedDs::NotUnitNorm));
        assert_eq!(ds(&a, &[1.0, 0.0, 0.0]), Ds::Undefined(UndefinedDs::LengthMismatch));
        assert_eq!(ds_windows(&a, &[]), Ds::Undefined(UndefinedDs::EmptyText));
    }

    #[test]
    fn known_angles() {
        assert_eq!(ds(&[1.0, 0.0], &[1.0, 0.0]), Ds::Value(0.0));
        assert_eq!(ds(&[1.0, 0.0], &[0.0, 1.0]), Ds::Value(1.0));
        assert_eq!(ds(&[1.0, 0.0], &[-1.0, 0.0]), Ds::Value(2.0));
    }

    #[test]
    fn empty_set_is_no_evidence() {
        assert_eq!(set_ds(&[]), SetDs::NoEvidence);
        let broken = [(Ds::Value(0.1), 10), (Ds::Undefined(UndefinedDs::ZeroNorm), 5)];
        assert_eq!(set_ds(&broken), SetDs::Undefined(UndefinedDs::ZeroNorm));
    }

    #[test]
    fn mean_is_weighted_by_tokens() {
        let SetDs::Values { min, mean, max } =
            set_ds(&[(Ds::Value(0.2), 30), (Ds::Value(0.6), 10)])
        else {
            panic!("both members have values")
        };
        assert!((min - 0.2).abs() < 1e-12 && (max - 0.6).abs() < 1e-12);
        assert!((mean - 0.3).abs() < 1e-12);
    }

    #[test]
    fn bands_leave_no_hole() {
        let cases = [
            (0.0, Band::Stable),
            (0.399_999, Band::Stable),
            (0.40, Band::PassEdge),
            (0.45, Band::PassEdge),
            (0.450_000_1, Band::Review),
            (0.599_999, Band::Review),
            (0.60, Band::Fail),
            (0.849_999, Band::Fail),
            (0.85, Band::Danger),
            (1.0, Band::Danger),
            (f64::NAN, Band::Danger),
        ];
        for (value, band) in cases {
            assert_eq!(Band::of(value), band, "{value}");
        }
    }

    #[test]
    fn flat_high_needs_far_and_flat() {
        assert!(k_sweep(&[(5, 0.66, 0.7), (10, 0.65, 0.7), (20, 0.64, 0.7)]).flat_high);
        assert!(!k_sweep(&[(5, 0.75, 0.8), (10, 0.70, 0.8), (20, 0.64, 0.8)]).flat_high);
        assert!(!k_sweep(&[(5, 0.30, 0.5), (20, 0.30, 0.6)]).flat_high);
        assert!(k_sweep(&[(5, 0.30, 0.6), (20, 0.30, 0.5)]).ranker_split);
        assert!(!k_sweep(&[]).flat_high);
    }

    proptest! {
        #[test]
        fn ds_is_symmetric_in_range_and_the_residual_is_the_distance(
            a in prop::collection::vec(-1.0f32..1.0, 8), b in prop::collection::vec(-1.0f32..1.0, 8)
        ) {
            prop_assume!(a.iter().any(|x| x.abs() > 0.05) && b.iter().any(|x| x.abs() > 0.05));
            let (a, b) = (unit(&a), unit(&b));
            let raw = ds(&a, &b).value().expect("unit vectors have a ds");
            prop_assert_eq!(Some(raw), ds(&b, &a).value());
            prop_assert!((0.0..=2.0).contains(&raw));
            let distance: f64 =
                a.iter().zip(&b).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt();
            // ‖a−b‖² = ‖a‖² + ‖b‖² − 2<a,b>; f32 unit norms are off by at most a few 1e-7.
            prop_assert!((residual(raw).powi(2) - distance.powi(2)).abs() < 1e-5);
        }

        #[test]
        fn set_is_ordered_and_min_falls_with_k(
            values in prop::collection::vec((0.0f64..2.0, 1usize..200), 1..20)
        ) {
            let chunks: Vec<_> = values.iter().map(|&(v, n)| (Ds::Value(v), n)).collect();
            let mut last = f64::INFINITY;
            for k in 1..=chunks.len() {
                let SetDs::Values { min, mean, max } = set_ds(&chunks[..k]) else { unreachable!() };
                prop_assert!(min <= mean && mean <= max && min <= last);
                last = min;
            }
        }
    }
}
