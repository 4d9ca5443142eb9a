//! What is refused, and what breaks.

use thiserror::Error;

/// A grammar that cannot be honoured.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GrammarError {
    /// A keyword or construct that cannot be enforced.
    #[error("{pointer}: {reason}")]
    Unsupported {
        /// JSON pointer into the schema, or line and column of a text.
        pointer: String,
        /// What it is and what to write instead.
        reason: String,
    },
    /// Not a grammar at all.
    #[error("the grammar does not parse: {0}")]
    Malformed(String),
    /// It takes more than a limit allows.
    #[error("the grammar is too large: {what}: expected at most {limit}, found {found}")]
    TooLarge {
        /// What is counted.
        what: &'static str,
        /// The limit.
        limit: u64,
        /// What was found, or the limit where counting stopped.
        found: u64,
    },
    /// The vocabulary cannot be constrained.
    #[error("this vocabulary cannot be constrained: {0}")]
    Vocabulary(String),
}

impl GrammarError {
    /// The same fault of one of several schemas.
    pub(crate) fn below(self, schema_idx: usize) -> GrammarError {
        match self {
            GrammarError::Unsupported { pointer, reason } => {
                GrammarError::Unsupported { pointer: format!("/{schema_idx}{pointer}"), reason }
            }
            GrammarError::Malformed(_)
            | GrammarError::TooLarge { .. }
            | GrammarError::Vocabulary(_) => self,
        }
    }
}

/// A matcher that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MatcherError {
    /// A token that the grammar does not allow here.
    #[error("token {id} is not allowed here")]
    NotAllowed {
        /// Its id.
        id: u32,
    },
    /// The automaton gave up: fuel, states, or a fault of its own.
    #[error("the grammar failed: {0}")]
    Failed(String),
}
