//! Where an answer stands in its grammar.

use std::sync::Arc;

use llguidance::TokenParser;
use toktrie::SimpleVob;

use crate::{MatcherError, Vocabulary, closing};

/// The state of one sequence.
pub struct Matcher {
    inner: llguidance::Matcher,
    vocabulary: Vocabulary,
    /// Tokens taken, ends among them.
    n_tokens: usize,
    /// Ends taken behind an answer that was over.
    n_ends: usize,
    /// The mask before the first token, which all sequences of a grammar share.
    first: Option<Arc<SimpleVob>>,
}

/// Which tokens may come next.
#[derive(Clone)]
pub struct Mask {
    bits: SimpleVob,
}

impl Mask {
    /// Whether a token may come next; false for every id outside the vocabulary.
    #[must_use]
    pub fn allows(&self, id: u32) -> bool {
        (id as usize) < self.bits.len() && self.bits.is_allowed(id)
    }

    /// The ids that may come next, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.bits.iter()
    }

    /// Tokens that may come next.
    #[must_use]
    pub fn n_allowed(&self) -> usize {
        self.bits.num_set()
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mask").field("n_allowed", &self.n_allowed()).finish()
    }
}

impl Matcher {
    pub(crate) fn new(parser: TokenParser, vocabulary: Vocabulary) -> Result<Matcher, String> {
        let inner = llguidance::Matcher::new(Ok(parser));
        match inner.get_error() {
            Some(error) => Err(error),
            None => Ok(Matcher { inner, vocabulary, n_tokens: 0, n_ends: 0, first: None }),
        }
    }

    /// A state of its own, which shares nothing that is written to.
    pub(crate) fn deep_clone(&self) -> Matcher {
        Matcher {
            inner: self.inner.deep_clone(),
            vocabulary: self.vocabulary.clone(),
            n_tokens: self.n_tokens,
            n_ends: self.n_ends,
            first: self.first.clone(),
        }
    }

    /// This state, which has taken nothing yet, with its mask.
    pub(crate) fn begun(mut self) -> Result<Matcher, MatcherError> {
        self.first = Some(Arc::new(self.mask()?.bits));
        Ok(self)
    }

    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// The tokens that may come next, end-of-sequence tokens among them exactly where the answer may end. Never
    /// empty; behind a whole answer that cannot go on, nothing but ends.
    ///
    /// # Errors
    /// [`MatcherError::Failed`].
    pub fn mask(&mut self) -> Result<Mask, MatcherError> {
        if let Some(first) = self.first.as_ref().filter(|_| self.n_tokens == 0) {
            return Ok(Mask { bits: SimpleVob::clone(first) });
        }
        let bits = self.inner.compute_mask_or_eos().map_err(|error| failed(&error))?;
        Ok(Mask { bits })
    }

    /// Goes on by one token, which may be an end.
    ///
    /// # Errors
    /// [`MatcherError::NotAllowed`], after which nothing has changed; [`MatcherError::Failed`].
    pub fn advance(&mut self, id: u32) -> Result<(), MatcherError> {
        if id as usize >= self.vocabulary.len() {
            return Err(MatcherError::NotAllowed { id });
        }
        if self.is_over() {
            if !self.vocabulary.is_end(id) {
                return Err(MatcherError::NotAllowed { id });
            }
            self.n_ends += 1;
            self.n_tokens += 1;
            return Ok(());
        }
        match self.inner.try_consume_tokens(&[id]) {
            Ok(1) => {
                self.n_tokens += 1;
                Ok(())
            }
            Ok(_) => Err(MatcherError::NotAllowed { id }),
            Err(error) => Err(failed(&error)),
        }
    }

    /// The tokens that are bound to follow, in the tokenizer's own spelling; nothing is taken of them. Empty
    /// where there is a choice, and where an end is all that is left.
    pub fn forced(&mut self) -> Vec<u32> {
        if self.inner.is_stopped() { Vec::new() } else { self.inner.compute_ff_tokens() }
    }

    /// Goes back by this many tokens, forced ones and ends among them.
    ///
    /// # Errors
    /// [`MatcherError::Failed`]; for more tokens than were taken, nothing has changed.
    pub fn roll_back(&mut self, n_tokens: usize) -> Result<(), MatcherError> {
        if n_tokens > self.n_tokens {
            let taken = self.n_tokens;
            let reason = format!("to go back {n_tokens} tokens: expected at most {taken}");
            return Err(MatcherError::Failed(reason));
        }
        let n_ends = self.n_ends.min(n_tokens);
        self.inner.rollback(n_tokens - n_ends).map_err(|error| failed(&error))?;
        self.n_ends -= n_ends;
        self.n_tokens -= n_tokens;
        Ok(())
    }

    /// Whether what came so far is a whole answer.
    pub fn is_complete(&mut self) -> bool {
        self.inner.is_accepting().unwrap_or(false)
    }

    /// Whether it is a whole answer, and nothing but an end may follow.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.inner.is_stopped() && !self.inner.is_error()
    }

    /// Tokens, at most this many, that make what came so far a whole answer; nothing is taken of them. The end-of-
    /// sequence token is not among them. `None`: no way was found; not for certain that there is none. They are a
    /// short way and not always the shortest.
    pub fn closing(&mut self, most: usize) -> Option<Vec<u32>> {
        if self.is_complete() {
            return Some(Vec::new());
        }
        if most == 0 || self.inner.is_error() {
            return None;
        }
        closing::search(self, most)
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher").field("is_stopped", &self.inner.is_stopped()).finish()
    }
}

fn failed(error: &anyhow::Error) -> MatcherError {
    MatcherError::Failed(error.to_string())
}
