//! The grammar of one sequence: where its answer stands, which token may come next, and how it ends in time.
//!
//! The state belongs to the sequence and to nothing else. It goes on by one for each token that the answer
//! takes, and back by one for each that is taken back; so that batching, a prefix that is computed anew, a
//! rotation or a roll-back leave it where the answer is (field faults B8, B12, B13). What draws the tokens sees
//! the allowed ones alone, see [`crate::sampler::Sampler::draw_allowed`].
//!
//! # The end in time
//! With few tokens left, an answer must not begin what it cannot end. A way to an end that fits is looked for
//! at the start and then again whenever an eighth of the tokens that are to spare were used, at last behind
//! every token. One behind which no end fits is taken back, and the way that was open before it is followed.
//! What is to spare shrinks by two for a token that opens a bracket, and by as many as a key is long for
//! one that begins a member; where that outruns the search, or where no end was ever found, the answer ends
//! as [`crate::Finish::SchemaIncomplete`], and is never told as whole.

use std::collections::VecDeque;
use std::time::Duration;

use exrail_grammar::{Grammar, Mask, Matcher, MatcherError};
use exrail_text::{Specials, Tokenizer};

use crate::event::{Constrained, LOW_MASS_STEPS, MIN_ALLOWED_MASS};
use crate::masks::{Computed, MaskThreads};
use crate::request::GenerateRequest;

/// Part of the tokens to spare behind which an end is looked for again.
const SPARE_PART: usize = 8;
/// Tokens behind which an end is looked for again where none was found.
const LOST_TOKENS: usize = 16;

/// The grammar state of one sequence.
#[derive(Debug)]
pub(crate) struct Constraint {
    grammar: Grammar,
    place: Place,
    /// Tokens that the matcher has taken.
    n_taken: usize,
    /// Tokens left at which an end is looked for again.
    look_at: usize,
    /// Whether an end that fits is known to be there; a search that fails costs hundreds of masks.
    has_way: bool,
    /// The rest of the only end that fits.
    must: VecDeque<u32>,
    /// The text that was sent; `None`: no stop string can cut it.
    text: Option<String>,
    tally: Tally,
    /// Whether what was said is a whole answer, once that is decided.
    ended: Option<bool>,
    #[cfg(test)]
    pub(crate) broken: Broken,
}

/// What tests break by hand.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Broken {
    #[default]
    Nothing,
    /// Every token may come.
    Mask,
    /// The mask ends where text does: control tokens behind it are drawn as if it did not know of them.
    Width,
    /// Nobody looks for an end.
    Closing,
    /// What was cut is told as whole.
    Telling,
    /// What is taken back stays taken.
    RollBack,
    /// The automaton fails.
    Automaton,
}

/// Where the matcher is.
#[derive(Debug)]
enum Place {
    Here {
        matcher: Box<Matcher>,
        /// Of the next token, if it was computed.
        mask: Option<Mask>,
    },
    /// With a thread that computes the mask of the next token.
    Away(flume::Receiver<Computed>),
    /// It failed, and with what.
    Lost(MatcherError),
}

/// What was done so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) n_masked: usize,
    pub(crate) n_forced: usize,
    pub(crate) n_closing: usize,
    pub(crate) n_argmax_masked: usize,
    mass_sum: f64,
    mass_min: Option<f32>,
    low_run: usize,
    pub(crate) is_mass_low: bool,
    pub(crate) mask_time: Duration,
}

/// A place to come back to.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    n_taken: usize,
    n_text: usize,
    tally: Tally,
}

/// What became of a drawn token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The answer goes on with this one, which may be another.
    Token(u32),
    /// The answer was whole before it, and nothing behind it could become whole in time.
    End,
}

impl Constraint {
    /// The state before the first token of a request; `None`: it has no grammar. Takes as long as a copy of the
    /// grammar's state and a first look for an end: in the caller's thread, not in the engine's.
    pub(crate) fn of(request: &GenerateRequest) -> Option<Box<Constraint>> {
        let grammar = request.grammar.clone()?;
        let mut matcher = grammar.matcher();
        let way = matcher.closing(request.max_tokens);
        let mut constraint = Constraint {
            place: Place::Here { matcher: Box::new(matcher), mask: None },
            grammar,
            n_taken: 0,
            look_at: 0,
            has_way: false,
            must: VecDeque::new(),
            text: (!request.stop.is_empty()).then(String::new),
            tally: Tally::default(),
            ended: None,
            #[cfg(test)]
            broken: Broken::Nothing,
        };
        match way {
            Some(way) => constraint.know(way, request.max_tokens),
            None => constraint.lose(request.max_tokens),
        }
        Some(Box::new(constraint))
    }

    /// The matcher, wherever it was.
    fn matcher(&mut self) -> Result<&mut Matcher, MatcherError> {
        #[cfg(test)]
        if self.broken == Broken::Automaton {
            return Err(MatcherError::Failed("out of fuel".to_owned()));
        }
        if let Place::Away(back) = &self.place {
            self.place = match back.recv() {
                Ok(Computed { matcher, mask, time }) => {
                    self.tally.mask_time += time;
                    match mask {
                        Ok(mask) => Place::Here { matcher, mask: Some(mask) },
                        Err(error) => Place::Lost(error),
                    }
                }
                Err(flume::RecvError::Disconnected) => {
                    let what = "the thread that computes masks is gone";
                    Place::Lost(MatcherError::Failed(what.to_owned()))
                }
            };
        }
        match &mut self.place {
            Place::Here { matcher, .. } => Ok(matcher),
            Place::Lost(error) => Err(error.clone()),
            Place::Away(_) => unreachable!("it has just come back"),
        }
    }

    /// Has the next mask computed beside the engine's thread, where there is a core for it.
    pub(crate) fn ask_mask(&mut self, threads: &mut MaskThreads) {
        if !threads.have_a_core() {
            return;
        }
        if !self.must.is_empty() || !matches!(self.place, Place::Here { mask: None, .. }) {
            return;
        }
        let lost = Place::Lost(MatcherError::Failed("its matcher was not given back".to_owned()));
        if let Place::Here { matcher, .. } = std::mem::replace(&mut self.place, lost) {
            self.place = Place::Away(threads.compute(matcher));
        }
    }

    /// Which tokens may come next.
    pub(crate) fn mask(&mut self) -> Result<Mask, MatcherError> {
        self.matcher()?;
        if let Place::Here { mask, .. } = &mut self.place
            && let Some(mask) = mask.take()
        {
            return Ok(mask);
        }
        let begun = std::time::Instant::now();
        let mask = self.matcher()?.mask()?;
        self.tally.mask_time += begun.elapsed();
        Ok(mask)
    }

    /// The token that must come next, whatever the model says.
    pub(crate) fn must(&self) -> Option<u32> {
        self.must.front().copied()
    }

    /// Notes what a draw under a mask came from. True: the third low one in a row, once.
    pub(crate) fn note_draw(&mut self, mass: f32, has_first_choice: bool) -> bool {
        let tally = &mut self.tally;
        tally.n_masked += 1;
        tally.n_argmax_masked += usize::from(!has_first_choice);
        tally.mass_sum += f64::from(mass);
        tally.mass_min = Some(tally.mass_min.map_or(mass, |least| least.min(mass)));
        tally.low_run = if mass < MIN_ALLOWED_MASS { tally.low_run + 1 } else { 0 };
        let is_new = tally.low_run == LOW_MASS_STEPS && !tally.is_mass_low;
        tally.is_mass_low |= is_new;
        is_new
    }

    /// Goes on by a token that was drawn or must come, with so many left behind it.
    pub(crate) fn take(&mut self, id: u32, n_left: usize) -> Result<Taken, MatcherError> {
        #[cfg(test)]
        if self.broken == Broken::Mask {
            return Ok(Taken::Token(id));
        }
        self.advance(id)?;
        if self.must.front() == Some(&id) {
            self.must.pop_front();
            self.tally.n_closing += 1;
            return Ok(Taken::Token(id));
        }
        if n_left > self.look_at || self.is_over() {
            return Ok(Taken::Token(id));
        }
        #[cfg(test)]
        if self.broken == Broken::Closing {
            return Ok(Taken::Token(id));
        }
        if let Some(way) = self.matcher()?.closing(n_left) {
            self.know(way, n_left);
            return Ok(Taken::Token(id));
        }
        if !self.has_way {
            self.lose(n_left);
            return Ok(Taken::Token(id));
        }
        self.go_back_by(1)?;
        match self.matcher()?.closing(n_left + 1) {
            None => {
                self.advance(id)?;
                self.lose(n_left);
                Ok(Taken::Token(id))
            }
            Some(mut way) if !way.is_empty() => {
                let first = way.remove(0);
                self.advance(first)?;
                self.tally.n_closing += 1;
                self.know(way, n_left);
                Ok(Taken::Token(first))
            }
            Some(_) => {
                self.ended = Some(true);
                Ok(Taken::End)
            }
        }
    }

    /// A way to an end was found, with so many tokens left.
    fn know(&mut self, way: Vec<u32>, n_left: usize) {
        let n_spare = n_left.saturating_sub(way.len());
        self.look_at = n_left.saturating_sub((n_spare / SPARE_PART).max(1));
        self.has_way = true;
        self.must.clear();
        if n_spare == 0 {
            self.must.extend(way);
        }
    }

    /// No way was found, with so many tokens left.
    fn lose(&mut self, n_left: usize) {
        self.has_way = false;
        self.look_at = n_left.saturating_sub(LOST_TOKENS);
    }

    /// The next tokens that are bound to come, in the tokenizer's spelling; nothing is taken of them.
    pub(crate) fn bound(&mut self) -> Result<Vec<u32>, MatcherError> {
        if !self.must.is_empty() {
            return Ok(self.must.iter().copied().collect());
        }
        Ok(self.matcher()?.forced())
    }

    /// Takes one of them.
    pub(crate) fn take_bound(&mut self, id: u32) -> Result<(), MatcherError> {
        self.advance(id)?;
        if self.must.pop_front().is_some() {
            self.tally.n_closing += 1;
        } else {
            self.tally.n_forced += 1;
        }
        Ok(())
    }

    fn advance(&mut self, id: u32) -> Result<(), MatcherError> {
        self.matcher()?.advance(id)?;
        self.forget_mask();
        self.n_taken += 1;
        Ok(())
    }

    fn go_back_by(&mut self, n_tokens: usize) -> Result<(), MatcherError> {
        #[cfg(test)]
        if self.broken == Broken::RollBack {
            return Ok(());
        }
        if n_tokens > 0 {
            self.matcher()?.roll_back(n_tokens)?;
        }
        self.forget_mask();
        self.n_taken -= n_tokens;
        Ok(())
    }

    fn forget_mask(&mut self) {
        if let Place::Here { mask, .. } = &mut self.place {
            *mask = None;
        }
    }

    /// Takes the end-of-sequence token; says whether the answer is whole.
    pub(crate) fn end(&mut self, eos: u32) -> Result<bool, MatcherError> {
        #[cfg(test)]
        if self.broken == Broken::Mask {
            return Ok(true);
        }
        let matcher = self.matcher()?;
        let is_whole = matcher.is_complete() || {
            // One that the grammar itself spells out.
            matcher.advance(eos)?;
            matcher.is_over() || matcher.is_complete()
        };
        self.ended = Some(is_whole);
        Ok(is_whole)
    }

    /// Whether the answer is whole and nothing can follow.
    pub(crate) fn is_over(&mut self) -> bool {
        self.matcher().is_ok_and(|matcher| matcher.is_over())
    }

    /// Whether what was said so far is a whole answer.
    pub(crate) fn is_complete(&mut self) -> bool {
        #[cfg(test)]
        if self.broken == Broken::Telling {
            return true;
        }
        let now = |matcher: &mut Matcher| matcher.is_over() || matcher.is_complete();
        self.ended.unwrap_or_else(|| self.matcher().is_ok_and(now))
    }

    /// Keeps what was sent, for [`Constraint::cut`].
    pub(crate) fn keep(&mut self, text: &str) {
        if let Some(kept) = &mut self.text {
            kept.push_str(text);
        }
    }

    /// A stop string took part of what the matcher has read: whether what was sent before it is a whole
    /// answer by itself.
    pub(crate) fn cut(&mut self, tokenizer: &Tokenizer) -> bool {
        let mut fresh = self.grammar.matcher();
        let text = self.text.as_deref().unwrap_or_default();
        let is_read = match tokenizer.encode(text, Specials::AsText) {
            Ok(ids) => ids.into_iter().all(|id| fresh.advance(id).is_ok()),
            Err(_) => false,
        };
        let is_whole = is_read && (fresh.is_over() || fresh.is_complete());
        self.ended = Some(is_whole);
        self.is_complete()
    }

    /// The answer is not whole, whatever the matcher says.
    pub(crate) fn spoil(&mut self) {
        self.ended = Some(false);
    }

    /// The state as it is, to come back to.
    pub(crate) fn mark(&self) -> Mark {
        let n_text = self.text.as_ref().map_or(0, String::len);
        Mark { n_taken: self.n_taken, n_text, tally: self.tally.clone() }
    }

    /// Is as it was, with so many tokens left. What it cost to come here stays counted.
    pub(crate) fn go_back(&mut self, to: Mark, n_left: usize) -> Result<(), MatcherError> {
        let Mark { n_taken, n_text, tally } = to;
        self.go_back_by(self.n_taken - n_taken)?;
        self.must.clear();
        // An end was known there, or else the next search tells.
        self.has_way = true;
        self.look_at = n_left;
        self.tally = Tally { mask_time: self.tally.mask_time, ..tally };
        if let Some(text) = &mut self.text {
            text.truncate(n_text);
        }
        Ok(())
    }

    /// What was done so far.
    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// What its caller is told at the end.
    pub(crate) fn told(&mut self) -> Constrained {
        let is_complete = self.is_complete();
        let tally = &self.tally;
        #[expect(clippy::cast_precision_loss, reason = "answers are far below 2^52 tokens")]
        let mean = tally.mass_sum / tally.n_masked.max(1) as f64;
        #[expect(clippy::cast_possible_truncation, reason = "a share of 1, reported in f32")]
        let mean = mean as f32;
        Constrained {
            is_complete,
            n_masked: tally.n_masked,
            n_forced: tally.n_forced,
            n_closing: tally.n_closing,
            n_argmax_masked: tally.n_argmax_masked,
            allowed_mass_min: tally.mass_min.unwrap_or(1.0),
            allowed_mass_mean: if tally.n_masked > 0 { mean } else { 1.0 },
            is_mass_low: tally.is_mass_low,
        }
    }
}
