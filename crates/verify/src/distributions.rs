//! Golden next-token distributions (G-09): what a model gave when its manifest was written, and how far it is from
//! that now. Hashes say that the files are the same; this says that the weights compute the same.

use std::num::NonZeroUsize;

use exrail_metrics::kld_probabilities;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{CacheOracle, GenerateError};

/// Places at which the distributions are compared (G-09).
pub const GOLDEN_PLACES: usize = 32;
/// Largest divergence at any of them, in nats (G-09).
pub const GOLDEN_KL: f64 = 0.02;
/// Tokens between two places.
const EVERY: NonZeroUsize = NonZeroUsize::new(8).unwrap();
/// Most likely tokens of a place that are kept; the others are one class. Joining classes lowers a divergence and never
/// raises it.
const TOP: usize = 64;

/// The distributions of one model behind a fixed text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenDistributions {
    /// Device and kernels that made them, for people.
    made_on: String,
    /// The text.
    ids: Vec<u32>,
    /// In the order of the text, one behind each eighth token.
    places: Vec<Place>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    /// The most likely tokens, the first the most likely.
    ids: Vec<u32>,
    /// Of each.
    p: Vec<f64>,
}

/// How far a model is from its golden distributions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GoldenDivergence {
    /// `KL(golden ‖ now)` at each place, in nats, over the golden tokens and one class of all others.
    pub kl: Vec<f64>,
    /// The largest one.
    pub max: f64,
    /// Tokens in front of the place that has it.
    pub behind: usize,
    /// Most that is allowed, [`GOLDEN_KL`].
    pub limit: f64,
    /// What made the golden ones.
    pub made_on: String,
}

impl GoldenDivergence {
    /// Whether every place is within the limit.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.max <= self.limit
    }
}

/// Golden distributions cannot be made or compared.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GoldenError {
    /// Too short a text, or too small a context.
    #[error("golden distributions: expected a text of {expected} tokens, found {found}")]
    TooShort {
        /// Tokens needed.
        expected: usize,
        /// Tokens there are.
        found: usize,
    },
    /// What was read is no such thing.
    #[error("golden distributions: expected {expected}, found {found}; write them again")]
    Malformed {
        /// What stands in them.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// The model gave no distribution.
    #[error("golden distributions: expected finite logits behind {behind} tokens, found others")]
    NoDistribution {
        /// Tokens in front of the place.
        behind: usize,
    },
    /// The generator failed.
    #[error(transparent)]
    Generate(#[from] GenerateError),
}

impl GoldenDistributions {
    /// Tokens of the text.
    pub const TOKENS: usize = GOLDEN_PLACES * EVERY.get();

    /// Of the model behind `oracle`, along the first tokens of `text`.
    ///
    /// # Errors
    /// [`GoldenError::TooShort`], [`GoldenError::NoDistribution`], [`GoldenError::Generate`].
    pub fn of(
        oracle: &dyn CacheOracle,
        text: &[u32],
        made_on: String,
    ) -> Result<GoldenDistributions, GoldenError> {
        let ids = text
            .get(..Self::TOKENS)
            .ok_or(GoldenError::TooShort { expected: Self::TOKENS, found: text.len() })?;
        let mut places = Vec::with_capacity(GOLDEN_PLACES);
        along(oracle, ids, &mut |row| {
            let top = most_likely(row);
            let mut p = probabilities(row, &top)?;
            // What is left for the others follows from these.
            p.pop();
            places.push(Place { ids: top, p });
            Some(())
        })?;
        Ok(GoldenDistributions { made_on, ids: ids.to_vec(), places })
    }

    /// From what [`GoldenDistributions`] serialises to.
    ///
    /// # Errors
    /// [`GoldenError::Malformed`].
    pub fn from_json(value: &serde_json::Value) -> Result<GoldenDistributions, GoldenError> {
        let malformed = |expected: &str, found: String| GoldenError::Malformed {
            expected: expected.to_owned(),
            found,
        };
        let read: GoldenDistributions = serde_json::from_value(value.clone())
            .map_err(|error| malformed("text and places", error.to_string()))?;
        if read.ids.len() != Self::TOKENS {
            return Err(malformed(&format!("{} tokens", Self::TOKENS), read.ids.len().to_string()));
        }
        if read.places.len() != GOLDEN_PLACES {
            let found = read.places.len().to_string();
            return Err(malformed(&format!("{GOLDEN_PLACES} places"), found));
        }
        for place in &read.places {
            let in_range = place.p.iter().all(|p| (0.0..=1.0).contains(p));
            let total: f64 = place.p.iter().sum();
            if place.ids.len() != place.p.len()
                || place.p.is_empty()
                || !in_range
                || total > 1.0 + 1e-9
            {
                let found = format!("{} tokens, {} of sum {total}", place.ids.len(), place.p.len());
                return Err(malformed("a probability for each token, 1 together at most", found));
            }
        }
        Ok(read)
    }

    /// How far the model behind `oracle` is from them. `told` hears of each place.
    ///
    /// # Errors
    /// [`GoldenError::NoDistribution`], [`GoldenError::Generate`].
    pub fn compare(
        &self,
        oracle: &dyn CacheOracle,
        told: &mut dyn FnMut(),
    ) -> Result<GoldenDivergence, GoldenError> {
        let mut kl = Vec::with_capacity(GOLDEN_PLACES);
        let mut places = self.places.iter();
        along(oracle, &self.ids, &mut |row| {
            told();
            let place = places.next()?;
            let now = probabilities(row, &place.ids)?;
            let mut golden = place.p.clone();
            golden.push((1.0 - golden.iter().sum::<f64>()).max(0.0));
            kl.push(kld_probabilities(&golden, &now).ok()?);
            Some(())
        })?;
        let largest = kl.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
        let (at, max) = largest.map_or((0, 0.0), |(at, &max)| (at, max));
        let behind = (at + 1) * EVERY.get();
        Ok(GoldenDivergence { kl, max, behind, limit: GOLDEN_KL, made_on: self.made_on.clone() })
    }
}

/// Calls `visit` with the row of each place; `None` of it means that the row is no distribution.
fn along(
    oracle: &dyn CacheOracle,
    ids: &[u32],
    visit: &mut dyn FnMut(&[f32]) -> Option<()>,
) -> Result<(), GoldenError> {
    let mut broken = None;
    oracle.live(ids, EVERY, &mut |at, row| {
        if broken.is_none() && visit(row).is_none() {
            broken = Some(at + 1);
        }
    })?;
    broken.map_or(Ok(()), |behind| Err(GoldenError::NoDistribution { behind }))
}

/// Ids of the largest logits, the largest first; of equal ones the lower id.
fn most_likely(row: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..u32::try_from(row.len()).unwrap_or(u32::MAX)).collect();
    let logit = |id: u32| row.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    ids.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)).then(a.cmp(&b)));
    ids.truncate(TOP);
    ids
}

/// Softmax of the row at `ids`, and of all other tokens together. `None`: a logit is not finite, or an id is outside.
fn probabilities(row: &[f32], ids: &[u32]) -> Option<Vec<f64>> {
    if row.iter().any(|logit| !logit.is_finite()) {
        return None;
    }
    let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let mut weights: Vec<f64> = row.iter().map(|&it| (f64::from(it) - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut found = Vec::with_capacity(ids.len() + 1);
    for &id in ids {
        found.push(std::mem::take(weights.get_mut(id as usize)?) / total);
    }
    found.push(weights.iter().sum::<f64>() / total);
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model of 200 tokens whose logits depend on the position, and on what is wrong with it.
    struct Fake {
        /// Added to every second logit.
        tilt: f32,
        nan_at: Option<usize>,
    }

    const RIGHT: Fake = Fake { tilt: 0.0, nan_at: None };

    impl Fake {
        fn row(&self, at: usize) -> Vec<f32> {
            let logit = |id: usize| {
                let tilt = if id.is_multiple_of(2) { self.tilt } else { 0.0 };
                #[expect(clippy::cast_precision_loss, reason = "small numbers")]
                let base = ((id * 37 + at * 11) % 101) as f32 / 12.0;
                if self.nan_at == Some(at) { f32::NAN } else { base + tilt }
            };
            (0..200).map(logit).collect()
        }
    }

    impl CacheOracle for Fake {
        fn live(
            &self,
            ids: &[u32],
            every: NonZeroUsize,
            visit: &mut dyn FnMut(usize, &[f32]),
        ) -> Result<(), GenerateError> {
            for at in (every.get()..=ids.len()).step_by(every.get()) {
                visit(at - 1, &self.row(at - 1));
            }
            Ok(())
        }

        fn rows(&self, _: &[u32], _: &mut dyn FnMut(usize, &[f32])) -> Result<(), GenerateError> {
            Ok(())
        }

        fn violations(&self) -> u64 {
            0
        }
    }

    fn golden() -> GoldenDistributions {
        let text: Vec<u32> = (0..300).map(|at| at % 200).collect();
        GoldenDistributions::of(&RIGHT, &text, "fake".into()).unwrap()
    }

    #[test]
    fn the_same_model_is_at_distance_zero_through_a_file() {
        let written = serde_json::to_string(&golden()).unwrap();
        let read = GoldenDistributions::from_json(&serde_json::from_str(&written).unwrap());
        let mut n_told = 0;
        let found = read.unwrap().compare(&RIGHT, &mut || n_told += 1).unwrap();
        assert_eq!((found.kl.len(), n_told), (GOLDEN_PLACES, GOLDEN_PLACES));
        assert!(found.passes() && found.max < 1e-9, "{}", found.max);
    }

    #[test]
    fn another_model_is_told_by_how_far_and_where() {
        // Logits half a nat apart move the odds by e^0.5: KL of two classes of about a half each is about 0.03.
        let found = golden().compare(&Fake { tilt: 0.5, nan_at: None }, &mut || ()).unwrap();
        assert!(!found.passes() && (0.02..0.05).contains(&found.max), "{}", found.max);
        assert!(found.behind.is_multiple_of(8) && found.behind <= GoldenDistributions::TOKENS);
        let nearly = golden().compare(&Fake { tilt: 0.1, nan_at: None }, &mut || ()).unwrap();
        assert!(nearly.passes() && nearly.max > 1e-4, "{}", nearly.max);
    }

    #[test]
    fn a_class_of_the_others_is_a_lower_bound_of_the_whole_divergence() {
        let other = Fake { tilt: 0.5, nan_at: None };
        let found = golden().compare(&other, &mut || ()).unwrap();
        for (at, kl) in (7..).step_by(8).zip(&found.kl) {
            let whole = exrail_metrics::kld_from_logits(&RIGHT.row(at), &other.row(at)).unwrap();
            assert!(*kl <= whole + 1e-9 && *kl > 0.8 * whole, "{kl} of {whole}");
        }
    }

    #[test]
    fn what_is_no_distribution_is_an_error_with_its_place() {
        let broken = Fake { tilt: 0.0, nan_at: Some(15) };
        let error = golden().compare(&broken, &mut || ()).unwrap_err();
        assert!(matches!(error, GoldenError::NoDistribution { behind: 16 }), "{error}");
        let short = GoldenDistributions::of(&RIGHT, &[1; 255], String::new()).unwrap_err();
        assert!(matches!(short, GoldenError::TooShort { expected: 256, found: 255 }), "{short}");
    }

    #[test]
    fn a_file_that_was_changed_is_refused() {
        let whole = serde_json::to_value(golden()).unwrap();
        for change in ["/places/3/p/0", "/ids", "/places", "/places/3/ids"] {
            let mut changed = whole.clone();
            *changed.pointer_mut(change).unwrap() = serde_json::json!([]);
            GoldenDistributions::from_json(&changed).unwrap_err();
        }
        let mut above = whole;
        above["places"][0]["p"][0] = serde_json::json!(1.5);
        GoldenDistributions::from_json(&above).unwrap_err();
    }
}
