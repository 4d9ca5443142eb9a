//! The suite that every backend runs: each operation on seeded random inputs against
//! [`crate::reference`], with odd sizes and tails.
//!
//! Bounds are derived, not tuned. With u = 2⁻²³ (twice the rounding unit of f32, so second-order
//! terms are covered) a sum of n products in any order errs by at most n · u · Σ|wᵢxᵢ| (Higham,
//! *Accuracy and Stability of Numerical Algorithms*, §3.1); each topic file states how its bound
//! follows. The reference sums in f64, so its own error does not enter.
//!
//! Outputs start as NaN, so that an operation that adds to what it should overwrite is caught.
//! Every second case gives each buffer a tail of NaN that must neither be read nor written, and the
//! cached positions that no row sees are NaN too: a fault in one sequence must not reach another.

mod attention;
mod draw;
mod fused;
mod linear;
mod memory;
mod moves;
mod norm;
mod random;
mod rope;

use thiserror::Error;

use crate::reference::Reference;
use crate::{Activation, Backend, KernelError, Largest};
use random::Random;

/// Twice the unit roundoff of f32.
const U: f64 = 1.0 / 8_388_608.0;

/// Rows in a batch that each operation is tried with: decode, the widths around a SIMD tile, and
/// more than a tile.
const ROW_COUNTS: [usize; 5] = [1, 2, 3, 7, 33];

/// NaN values behind the used part of a buffer, in every second case.
const TAIL_LEN: usize = 5;

/// The first case that a backend got wrong.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConformanceError {
    /// A value is further from the reference than the bound allows.
    #[error(
        "{case}: value {index}: expected {expected:e} within {bound:e}, found {found:e} ({device})"
    )]
    Value {
        /// Operation, format and sizes.
        case: String,
        /// Index into the output.
        index: usize,
        /// What the reference computes.
        expected: f32,
        /// The distance allowed.
        bound: f64,
        /// What the backend computed.
        found: f32,
        /// Backend name.
        device: String,
    },
    /// The operation wrote behind its output.
    #[error("{case}: expected {len} values written, found value {index} changed ({device})")]
    Overrun {
        /// Operation, format and sizes.
        case: String,
        /// Values that the output has.
        len: usize,
        /// Index that changed.
        index: usize,
        /// Backend name.
        device: String,
    },
    /// A weight or buffer that must be accepted was refused.
    #[error("{case}: expected the backend to accept it, found a refusal")]
    Refused {
        /// What was asked for.
        case: String,
        /// The backend's reason.
        source: KernelError,
    },
    /// A malformed weight was accepted.
    #[error("{case}: expected a refusal, found it accepted ({device})")]
    Accepted {
        /// What was wrong with it.
        case: String,
        /// Backend name.
        device: String,
    },
    /// A page of the cache was read or written, and holds something else now.
    #[error("{case}: page {page}: expected the bytes that it had, found others ({device})")]
    Page {
        /// Cache format and sizes.
        case: String,
        /// The page.
        page: u32,
        /// Backend name.
        device: String,
    },
    /// A prepared weight does not report the shape that it was made with.
    #[error("{case}: expected shape {expected:?}, found {found:?} ({device})")]
    Shape {
        /// Format and sizes.
        case: String,
        /// Rows and columns given.
        expected: (usize, usize),
        /// Rows and columns reported.
        found: (usize, usize),
        /// Backend name.
        device: String,
    },
    /// The largest or drawn output is not that of the backend's own logits.
    #[error("{case} row {t}: expected {expected}, found {found} ({device})")]
    Found {
        /// Format and sizes.
        case: String,
        /// Row of logits.
        t: usize,
        /// What the definition finds in them.
        expected: String,
        /// What the backend found.
        found: String,
        /// Backend name.
        device: String,
    },
}

/// A part of the suite. Its inputs depend on no other part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// Buffers, weights that must be refused, and what works element by element.
    Memory,
    /// Norms.
    Norm,
    /// Rotations by position.
    Rope,
    /// Embeddings and matrix products.
    Linear,
    /// Attention to a cache, and pages that are copied, read and written.
    Attention,
    /// Attention to all rows of a span.
    AttentionFull,
    /// Keys and values that move inside a pool.
    Moves,
    /// Several operations in one.
    Fused,
    /// Tokens drawn from logits.
    Draws,
}

impl Topic {
    /// In the order of [`run`]: the longest last.
    pub const ALL: [Topic; 9] = [
        Topic::Memory,
        Topic::Norm,
        Topic::Rope,
        Topic::Linear,
        Topic::Attention,
        Topic::AttentionFull,
        Topic::Moves,
        Topic::Fused,
        Topic::Draws,
    ];
}

/// Runs every operation of `backend` against the reference; `activation` says how the backend under
/// test treats the activations of its matrix products.
///
/// The inputs are the same in every run.
///
/// # Errors
/// The first case that fails, with its operation, format and sizes.
pub fn run<B: Backend>(backend: &B, activation: Activation) -> Result<(), ConformanceError> {
    Topic::ALL.into_iter().try_for_each(|topic| run_topic(backend, activation, topic))
}

/// Runs one part of [`run`].
///
/// # Errors
/// As [`run`].
pub fn run_topic<B: Backend>(
    backend: &B,
    activation: Activation,
    topic: Topic,
) -> Result<(), ConformanceError> {
    let mut suite = Suite { backend, activation, random: Random::new(0x5eed), n_cases: 0 };
    match topic {
        Topic::Memory => suite.memory(),
        Topic::Norm => suite.norm(),
        Topic::Rope => suite.rope(),
        Topic::Linear => suite.linear(),
        Topic::Attention => suite.attention(),
        Topic::AttentionFull => suite.attention_full(),
        Topic::Moves => suite.moves(),
        Topic::Fused => suite.fused(),
        Topic::Draws => suite.draws(),
    }
}

/// State of one run.
struct Suite<'a, B> {
    backend: &'a B,
    activation: Activation,
    random: Random,
    n_cases: usize,
}

impl<B: Backend> Suite<'_, B> {
    /// Starts a case: flips between exact buffers and buffers with a tail.
    fn next_case(&mut self) {
        self.n_cases += 1;
    }

    fn tail_len(&self) -> usize {
        self.n_cases % 2 * TAIL_LEN
    }

    /// A device buffer that holds `values`, with a tail of NaN in every second case.
    fn upload(&self, case: &str, values: &[f32]) -> Result<B::Buffer, ConformanceError> {
        let mut padded = values.to_vec();
        padded.resize(values.len() + self.tail_len(), f32::NAN);
        let mut buffer = accepted(case, self.backend.buffer(padded.len()))?;
        self.backend.write(&mut buffer, &padded);
        Ok(buffer)
    }

    /// A device buffer for `len` results, all NaN.
    fn output(&self, case: &str, len: usize) -> Result<B::Buffer, ConformanceError> {
        self.upload(case, &vec![f32::NAN; len])
    }

    /// Compares what was found in every row; beside NaN it may be any index.
    fn check_found(
        &self,
        case: &str,
        found: &[Largest],
        expected: &[Largest],
    ) -> Result<(), ConformanceError> {
        for (t, expected) in expected.iter().enumerate() {
            let found = found.get(t);
            let same = found.is_some_and(|found| {
                found.index == expected.index && found.value == expected.value
                    || found.value.is_nan() && expected.value.is_nan()
            });
            if !same {
                let (case, device) = (case.to_owned(), self.backend.name());
                let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
                return Err(ConformanceError::Found { case, t, expected, found, device });
            }
        }
        Ok(())
    }

    /// Compares the head of `buffer` with the reference, where NaN must stay NaN, and its tail with
    /// NaN.
    fn check(
        &self,
        case: &str,
        buffer: &B::Buffer,
        expected: &[f32],
        bound: impl Fn(usize) -> f64,
    ) -> Result<(), ConformanceError> {
        let len = expected.len();
        let mut found = vec![0.0; len + self.tail_len()];
        self.backend.read(buffer, &mut found);
        let device = || self.backend.name();
        for (index, (&expected, &found)) in expected.iter().zip(&found).enumerate() {
            if expected.is_nan() && found.is_nan() {
                continue;
            }
            let bound = bound(index);
            let distance = (f64::from(expected) - f64::from(found)).abs();
            if distance.is_nan() || distance > bound {
                let (case, device) = (case.to_owned(), device());
                return Err(ConformanceError::Value {
                    case,
                    index,
                    expected,
                    bound,
                    found,
                    device,
                });
            }
        }
        match found[len..].iter().position(|value| !value.is_nan()) {
            Some(offset) => {
                let (case, device) = (case.to_owned(), device());
                Err(ConformanceError::Overrun { case, len, index: len + offset, device })
            }
            None => Ok(()),
        }
    }
}

/// Turns a backend's refusal into a failed case.
fn accepted<T>(case: &str, result: Result<T, KernelError>) -> Result<T, ConformanceError> {
    result.map_err(|source| ConformanceError::Refused { case: case.to_owned(), source })
}

/// Runs a reference operation that writes `len` values.
fn defined(len: usize, operation: impl FnOnce(&Reference, &mut Vec<f32>)) -> Vec<f32> {
    let mut out = vec![0.0; len];
    operation(&Reference, &mut out);
    out
}
