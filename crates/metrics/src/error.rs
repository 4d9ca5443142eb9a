//! What can be wrong with the numbers that a caller passes in.

use crate::delta_s::{Family, Probe};

/// Why a statistic has no value.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// A statistic of nothing was asked for.
    #[error("{statistic}: expected at least one value, found none")]
    Empty {
        /// Name of the statistic.
        statistic: &'static str,
    },
    /// A NaN or an infinity is among the values.
    #[error("{statistic}: expected finite values, found {found} at index {index}")]
    NotFinite {
        /// Name of the statistic.
        statistic: &'static str,
        /// Position of the first value that is not finite.
        index: usize,
        /// The value itself.
        found: f64,
    },
    /// A parameter lies outside the range on which the statistic is defined.
    #[error("{statistic}: expected {expected}, found {found}")]
    OutOfRange {
        /// Name of the statistic.
        statistic: &'static str,
        /// The range in words.
        expected: &'static str,
        /// The value itself.
        found: f64,
    },
    /// Two series that belong together have different lengths.
    #[error("{statistic}: expected two series of one length, found {left} and {right}")]
    LengthMismatch {
        /// Name of the statistic.
        statistic: &'static str,
        /// Length of the first series.
        left: usize,
        /// Length of the second series.
        right: usize,
    },
    /// A calibration set is too small for its quantile to mean anything.
    #[error("calibration set {set}: expected at least {needed} values, found {found}")]
    TooFew {
        /// Name of the set.
        set: &'static str,
        /// Smallest admissible number of values.
        needed: usize,
        /// Number of values given.
        found: usize,
    },
    /// A probe was put on the scale of the other family (§1.1.7).
    #[error("probe {probe} belongs to the {} map, found the {found} map", .probe.family())]
    WrongFamily {
        /// The probe.
        probe: Probe,
        /// The family of the map that was used.
        found: Family,
    },
}

/// Checks that `values` is not empty and wholly finite.
pub(crate) fn finite(statistic: &'static str, values: &[f64]) -> Result<(), MetricsError> {
    if values.is_empty() {
        return Err(MetricsError::Empty { statistic });
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(MetricsError::NotFinite { statistic, index, found: values[index] }),
        None => Ok(()),
    }
}
