//! What an answer under a grammar does otherwise than a free one: which tokens it may draw, which it takes without
//! a draw, and how it ends. See [`crate::constraint`].
//!
//! # Forced tokens
//! Tokens that are bound to follow are said at once and fed together in the next step, as the rows of a prompt
//! are. They count as tokens of the answer, in penalties and in the numbers of the draws, so that what is said
//! is the same with and without them; the loop monitor does not judge them. An answer whose log-probabilities
//! or entropies were asked for takes no token without its row: each is then drawn, from a mask that allows
//! one.

use exrail_grammar::MatcherError;
use exrail_text::Tokenizer;

use super::generating::Generating;
use super::{Ending, Purpose, Running, Shared};
use crate::constraint::{Mark, Taken, Tally};
use crate::distribution::Summary;
use crate::event::{Finish, SequenceFault};
use crate::masks::MaskThreads;
use crate::roll_back::RollBack;
use crate::sampler::NotDrawn;

impl Running {
    /// Has its next mask computed beside the engine's thread, if it has a grammar.
    pub(crate) fn ask_mask(&mut self, threads: &mut MaskThreads) {
        if let Purpose::Generate(generating) = &mut self.purpose
            && let Some(constraint) = &mut generating.constraint
        {
            constraint.ask_mask(threads);
        }
    }

    /// Says what its grammar forces before anything is computed; `Some` when that is all.
    pub(crate) fn begin(&mut self, shared: &mut Shared<'_>) -> Option<Ending> {
        match &mut self.purpose {
            Purpose::Generate(generating) => generating.follow(&mut self.tokens, shared),
            Purpose::Score { .. } => None,
        }
    }

    /// What its grammar did so far; `None`: it has none.
    pub(crate) fn tally(&self) -> Option<&Tally> {
        match &self.purpose {
            Purpose::Generate(generating) => {
                generating.constraint.as_deref().map(|constraint| constraint.tally())
            }
            Purpose::Score { .. } => None,
        }
    }

    #[cfg(test)]
    pub(crate) fn constraint(&mut self) -> &mut crate::constraint::Constraint {
        match &mut self.purpose {
            Purpose::Generate(generating) => {
                generating.constraint.as_deref_mut().expect("it has a grammar")
            }
            Purpose::Score { .. } => panic!("a score has no grammar"),
        }
    }
}

impl Generating {
    /// The next token of an answer under a grammar, and whether it ends there instead.
    pub(super) fn choose_allowed(
        &mut self,
        (logits, summary): (&[f32], &Summary),
        tokens: &[u32],
        shared: &mut Shared<'_>,
    ) -> Result<(u32, bool), SequenceFault> {
        let n_left = self.max_tokens - self.n_completion - 1;
        let Some(constraint) = &mut self.constraint else {
            unreachable!("whoever asks has looked");
        };
        #[cfg(test)]
        if constraint.broken == crate::constraint::Broken::Mask {
            let id = self.sampler.sample(logits, tokens, shared.scratch).expect("finite");
            return Ok((id, false));
        }
        let step = self.n_completion;
        let failed =
            |error: &MatcherError| SequenceFault::GrammarFault { step, message: error.to_string() };
        #[cfg(test)]
        if constraint.broken == crate::constraint::Broken::Width {
            let id = self.sampler.sample(logits, tokens, shared.scratch).expect("finite");
            let is_end = shared.eos.contains(&id);
            if !is_end && shared.tokenizer.is_control(id) {
                constraint.take(id, n_left).map_err(|error| failed(&error))?;
            }
            return Ok((id, is_end));
        }
        let id = if let Some(id) = constraint.must() {
            id
        } else {
            let mask = constraint.mask().map_err(|error| failed(&error))?;
            let drawn = self.sampler.draw_allowed((logits, summary), tokens, &mask, shared.scratch);
            let allowed = drawn.map_err(|why| match why {
                NotDrawn::NotFinite => SequenceFault::NumericFault { step: self.n_sampled },
                NotDrawn::NothingAllowed => {
                    let message = "no token is allowed".to_owned();
                    SequenceFault::GrammarFault { step, message }
                }
            })?;
            if constraint.note_draw(allowed.mass, allowed.has_first_choice) {
                let mass = allowed.mass;
                tracing::warn!(mass, "the model is forced: its prompt and the grammar disagree");
            }
            allowed.id
        };
        let is_end = shared.eos.contains(&id);
        let taken = if is_end { Ok(Taken::Token(id)) } else { constraint.take(id, n_left) };
        let (id, ends) = match taken.map_err(|error| failed(&error))? {
            Taken::Token(id) => (id, is_end),
            Taken::End => (shared.eos.first().copied().unwrap_or(id), true),
        };
        self.sampler.note(id);
        Ok((id, ends))
    }

    /// Says what is bound to follow; `Some` when the answer ends with it.
    pub(super) fn follow(
        &mut self,
        tokens: &mut Vec<u32>,
        shared: &mut Shared<'_>,
    ) -> Option<Ending> {
        if self.constraint.as_deref_mut()?.is_over() {
            return Some(Ending::finish(Finish::Stop));
        }
        if self.top_logprobs.is_some() || self.entropy_sum.is_some() {
            return None;
        }
        loop {
            let bound = match self.constraint.as_deref_mut()?.bound() {
                Ok(bound) if bound.is_empty() => return None,
                Ok(bound) => bound,
                Err(error) => return Some(Ending::Fault(self.grammar_fault(&error))),
            };
            for id in bound {
                let is_full = |n_tokens| {
                    self.rotation.as_deref().is_some_and(|rotation| rotation.is_full(n_tokens))
                };
                let is_due = self.roll_back.as_deref().is_some_and(RollBack::is_due);
                if is_full(tokens.len()) || is_due || shared.eos.contains(&id) {
                    return None;
                }
                if let Err(error) = self.constraint.as_deref_mut()?.take_bound(id) {
                    return Some(Ending::Fault(self.grammar_fault(&error)));
                }
                self.sampler.note(id);
                if let Some(ending) = self.say(id, (None, None), tokens, shared) {
                    return Some(ending);
                }
                if self.roll_back.is_some() && RollBack::wants(self.n_completion) {
                    self.remember(tokens.len());
                }
            }
        }
    }

    /// The end-of-sequence token came, or comes instead of a token.
    pub(super) fn ending_at_eos(&mut self, eos: u32) -> Ending {
        let Some(constraint) = &mut self.constraint else { return Ending::finish(Finish::Stop) };
        match constraint.end(eos) {
            Ok(true) => Ending::finish(Finish::Stop),
            Ok(false) => Ending::finish(Finish::SchemaIncomplete),
            Err(error) => Ending::Fault(self.grammar_fault(&error)),
        }
    }

    /// A stop string came.
    pub(super) fn ending_at_stop(&mut self, index: usize, tokenizer: &Tokenizer) -> Ending {
        let stop_string = self.stop.get(index).cloned();
        let is_whole =
            self.constraint.as_deref_mut().is_none_or(|constraint| constraint.cut(tokenizer));
        let finish = if is_whole { Finish::Stop } else { Finish::SchemaIncomplete };
        Ending::Finish { finish, stop_string }
    }

    /// Behind a token: nothing can follow, or the tokens are used up. A value that is whole and could have gone
    /// on, such as a number, was cut by its length all the same.
    pub(super) fn ending_by_itself(&mut self) -> Option<Ending> {
        let is_last = self.n_completion == self.max_tokens;
        let Some(constraint) = &mut self.constraint else {
            return is_last.then(|| Ending::finish(Finish::Length));
        };
        if constraint.is_over() {
            return Some(Ending::finish(Finish::Stop));
        }
        is_last.then(|| {
            let is_whole = constraint.is_complete();
            Ending::finish(if is_whole { Finish::Length } else { Finish::SchemaIncomplete })
        })
    }

    /// The last text of an answer may hold a stop string, whose place nobody has read then.
    pub(super) fn finish_of_tail(&mut self, finish: Finish, is_stopped: bool) -> Finish {
        let Some(constraint) = self.constraint.as_deref_mut().filter(|_| is_stopped) else {
            return finish;
        };
        constraint.spoil();
        if finish == Finish::Stop { Finish::SchemaIncomplete } else { finish }
    }

    /// The grammar is where it was; or why it cannot be.
    pub(super) fn constraint_goes_back(&mut self, to: Option<Mark>) -> Option<SequenceFault> {
        let n_left = self.max_tokens - self.n_completion;
        let gone_back = self.constraint.as_deref_mut()?.go_back(to?, n_left);
        gone_back.err().map(|error| self.grammar_fault(&error))
    }

    fn grammar_fault(&self, error: &MatcherError) -> SequenceFault {
        SequenceFault::GrammarFault { step: self.n_completion, message: error.to_string() }
    }
}
