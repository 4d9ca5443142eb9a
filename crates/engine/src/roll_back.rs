//! Where an answer can go back to when it goes round in a circle (G-19), once.
//!
//! At the start and every [`EVERY`] tokens what is no part of the cache is remembered: the sampler's counts, the text with its
//! stop strings, what JSON is open, where the grammar stands. The cache needs no memory of its own: a sequence that goes back is computed
//! anew from the tokens that are left, most of which it finds among its own pages. A rotation forgets
//! everything, since what was dropped then is gone.

use std::collections::VecDeque;

use crate::constraint::Mark;
use crate::loops::Loop;
use crate::open_json::OpenJson;
use crate::output::AnswerText;
use crate::sampler::Sampler;

/// Tokens between two places to go back to.
const EVERY: usize = 128;
/// Places that are remembered: as many as reach over the longest loop that is looked for.
const MOST: usize = 10;

/// An answer as it was.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// Tokens of the context.
    pub(crate) n_tokens: usize,
    /// Token events.
    pub(crate) n_completion: usize,
    pub(crate) n_sampled: usize,
    /// Bytes of text that were sent.
    pub(crate) n_text: usize,
    pub(crate) entropy_sum: Option<f64>,
    pub(crate) sampler: Sampler,
    pub(crate) answer: AnswerText,
    pub(crate) json: Option<OpenJson>,
    /// Of the grammar's state.
    pub(crate) grammar: Option<Mark>,
}

/// The places of one answer.
#[derive(Debug, Default)]
pub(crate) struct RollBack {
    places: VecDeque<Checkpoint>,
    due: Option<Checkpoint>,
}

impl RollBack {
    /// Whether a place is to be remembered behind so many tokens of the answer.
    pub(crate) fn wants(n_completion: usize) -> bool {
        n_completion.is_multiple_of(EVERY)
    }

    pub(crate) fn remember(&mut self, place: Checkpoint) {
        if self.places.len() == MOST {
            self.places.pop_front();
        }
        self.places.push_back(place);
    }

    pub(crate) fn forget(&mut self) {
        self.places.clear();
    }

    /// Decides to go back to the last place in front of a loop that ends behind `n_completion` tokens; says
    /// whether there is one.
    pub(crate) fn decide(&mut self, found: Loop, n_completion: usize) -> bool {
        let before = n_completion.saturating_sub(found.n_tokens);
        let is_before = |place: &Checkpoint| place.n_completion <= before;
        let at = self.places.iter().rposition(is_before);
        self.due = at.and_then(|at| self.places.remove(at));
        self.due.is_some()
    }

    /// Whether it was decided.
    pub(crate) fn is_due(&self) -> bool {
        self.due.is_some()
    }

    /// The place to go back to.
    pub(crate) fn take(&mut self) -> Option<Checkpoint> {
        self.due.take()
    }
}
