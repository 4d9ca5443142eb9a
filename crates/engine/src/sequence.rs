//! One sequence from submit to its last event, as a state machine without device or clock of its
//! own.
//!
//! `Waiting` (in the queue, owns nothing) → `Running` (owns every page it can need; unfed prompt
//! tokens, then one unfed token a step) → retired by the worker with one final event. A running sequence
//! whose pages were withdrawn is suspended: it owns nothing, knows all its tokens, and is computed anew. So is
//! one that was rotated, from what is left of its tokens.

use std::ops::Range;
use std::time::Instant;

use exrail_kernels::{Draw, KvMove, KvSlot, Largest, PAGE_TOKENS, PageId};
use exrail_text::Tokenizer;

use crate::cache::{Admitted, Namespace, PageRef, TableView};
use crate::counters::Total;
use crate::event::{Event, Finish, LatePhase, SequenceFault, SequenceId};
use crate::queue::Queued;
use crate::roll_back::RollBack;
use crate::rotation::{Due, Kept, Rotating};
use crate::sampler::SamplerScratch;
use crate::scheduler::{Demand, LogitRows};

mod constrained;
mod generating;
mod waiting;

use generating::Generating;
pub(crate) use waiting::{Job, ScoreRows, Scoring, Traffic, Waiting};

/// Times that a sequence is computed anew before it is given up.
const MAX_RESTARTS: usize = 3;

/// How a sequence ends.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ending {
    Finish {
        finish: Finish,
        stop_string: Option<String>,
    },
    Fault(SequenceFault),
    /// Nobody listens any more.
    Gone,
}

impl Ending {
    pub(crate) fn cancelled() -> Ending {
        Ending::Finish { finish: Finish::Cancelled, stop_string: None }
    }

    pub(crate) fn finish(finish: Finish) -> Ending {
        Ending::Finish { finish, stop_string: None }
    }

    /// Where the ending is counted.
    pub(crate) fn total(&self) -> Total {
        match self {
            Ending::Finish {
                finish:
                    Finish::Stop
                    | Finish::Length
                    | Finish::Degenerate
                    | Finish::RotationRequired
                    | Finish::SchemaIncomplete,
                ..
            } => Total::Finished,
            Ending::Finish { finish: Finish::Cancelled, .. } | Ending::Gone => Total::Cancelled,
            Ending::Fault(_) => Total::Failed,
        }
    }

    /// Whether what its pages hold is beyond doubt.
    pub(crate) fn is_sound(&self) -> bool {
        match self {
            Ending::Finish { .. }
            | Ending::Gone
            | Ending::Fault(
                SequenceFault::DeadlineExceeded { .. } | SequenceFault::GrammarFault { .. },
            ) => true,
            Ending::Fault(
                SequenceFault::NumericFault { .. }
                | SequenceFault::KvIntegrity(_)
                | SequenceFault::StepPanicked { .. }
                | SequenceFault::Stopped,
            ) => false,
        }
    }
}

/// What the sequences of one engine share while tokens are accepted.
pub(crate) struct Shared<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) eos: &'a [u32],
    pub(crate) scratch: &'a mut SamplerScratch,
}

/// An admitted sequence.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) id: SequenceId,
    pub(crate) traffic: Traffic,
    /// Of prompt and answer what its cache is of: all, unless it was rotated.
    pub(crate) tokens: Vec<u32>,
    prompt_tokens: usize,
    /// Tokens whose keys and values are in the cache.
    pub(crate) fed: usize,
    /// Positions that it may fill.
    positions: usize,
    /// Whose prefixes it reads and adds to; `None`: nobody's, as of pages that hold what no prefill of their
    /// tokens gives.
    pub(crate) namespace: Option<Namespace>,
    /// Pages at the front that were shared or offered, or will be at the end.
    n_shared: usize,
    /// Prompt tokens that were cached when it was admitted.
    cached_tokens: usize,
    /// Times it was computed anew.
    n_restarts: usize,
    /// When it is of no use any more.
    pub(crate) deadline: Option<Instant>,
    /// Whose it is.
    pub(crate) tenant: Option<Box<str>>,
    pub(crate) pages: Vec<PageRef>,
    /// The same pages as the attention call wants them.
    pub(crate) page_table: Vec<PageId>,
    purpose: Purpose,
}

#[derive(Debug)]
enum Purpose {
    Generate(Box<Generating>),
    Score { scoring: Scoring, rows: ScoreRows },
}

/// What the device says of one row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Row<'a> {
    /// The tokenizer's vocabulary only.
    Logits(&'a [f32]),
    /// The token that it gets: the most likely one, or one that was drawn.
    Found(Largest),
}

impl Running {
    /// Admits a waiting sequence with the pages it was promised.
    pub(crate) fn admit(
        waiting: Waiting,
        admitted: Admitted,
        namespace: Option<Namespace>,
    ) -> Running {
        let (positions, deadline) = (waiting.positions(), waiting.deadline());
        let tenant = waiting.tenant().map(Box::from);
        let (tokens, purpose) = match waiting.job {
            Job::Score { ids, scoring, rows } => (ids, Purpose::Score { scoring, rows }),
            Job::Generate { request, constraint, rotation, events } => {
                let (tokens, generating) =
                    Generating::admit(*request, (constraint, rotation), events, waiting.submitted);
                (tokens, Purpose::Generate(Box::new(generating)))
            }
        };
        let Waiting { id, traffic, blank, .. } = waiting;
        let prompt_tokens = tokens.len();
        let mut running = Running {
            id,
            traffic,
            tokens,
            prompt_tokens,
            fed: 0,
            positions,
            namespace,
            n_shared: 0,
            cached_tokens: admitted.n_cached * PAGE_TOKENS,
            n_restarts: 0,
            deadline,
            tenant,
            pages: Vec::new(),
            page_table: Vec::new(),
            purpose,
        };
        running.take(admitted);
        running.fed = running.fed.max(blank);
        running
    }

    /// Goes on behind what the pages hold already.
    pub(crate) fn take(&mut self, admitted: Admitted) {
        self.fed = admitted.n_cached * PAGE_TOKENS;
        self.n_shared = admitted.n_cached;
        self.page_table = admitted.pages.iter().map(|entry| entry.page).collect();
        self.pages = admitted.pages;
    }

    /// Gives its pages out of hand.
    pub(crate) fn take_pages(&mut self) -> Vec<PageRef> {
        self.page_table.clear();
        std::mem::take(&mut self.pages)
    }

    /// To be computed anew from its tokens; the next one is the same then.
    pub(crate) fn restart(&mut self) {
        self.fed = 0;
        self.n_shared = 0;
        self.n_restarts += 1;
    }

    /// Whether it can be computed anew: a score has delivered rows already, and a fault that comes back
    /// each time is its end.
    pub(crate) fn can_restart(&self) -> bool {
        matches!(self.purpose, Purpose::Generate(_)) && self.n_restarts < MAX_RESTARTS
    }

    /// Pages of its table.
    pub(crate) fn n_pages(&self) -> usize {
        self.positions.div_ceil(PAGE_TOKENS)
    }

    /// Its table as the cache's checks want it.
    pub(crate) fn view(&self) -> TableView<'_> {
        TableView { tokens: &self.tokens, pages: &self.pages, n_fed: self.fed }
    }

    /// Whether it will write pages that it has filled, so that they are its own until it ends.
    pub(crate) fn owns_its_pages(&self) -> bool {
        match &self.purpose {
            Purpose::Generate(generating) => {
                generating.rotation.as_deref().is_some_and(Rotating::is_in_place)
            }
            Purpose::Score { .. } => false,
        }
    }

    /// Pages that were shared, or may be: those that [`Running::newly_full`] has counted.
    pub(crate) fn n_full(&self) -> usize {
        self.n_shared
    }

    /// Right behind an accepted token: pages that became whole since the last call. The row of that
    /// token was computed from all positions before it, and its logits were finite.
    pub(crate) fn newly_full(&mut self) -> Option<usize> {
        // Fed may be more, of a step in flight, or less, where tokens were forced.
        let n_full = self.fed.min(self.tokens.len() - 1) / PAGE_TOKENS;
        let is_new = n_full > self.n_shared;
        self.n_shared = self.n_shared.max(n_full);
        is_new.then_some(n_full)
    }

    /// Tells the caller of the admission, once the counters show it.
    pub(crate) fn announce(&self) {
        match &self.purpose {
            Purpose::Generate(generating) => {
                let queue_ms = milliseconds(generating.submitted, generating.admitted);
                drop(
                    generating
                        .events
                        .send(Event::Started { queue_ms, cached_tokens: self.cached_tokens }),
                );
            }
            Purpose::Score { .. } => {}
        }
    }

    /// Its rows of a step, in a lane of the tenants.
    pub(crate) fn demand(&self, lane: usize) -> Demand {
        let unfed = self.tokens.len() - self.fed;
        match self.purpose {
            Purpose::Generate(_) => {
                let is_answer = self.fed >= self.prompt_tokens;
                Demand { unfed, logits: LogitRows::Last, lane, is_answer }
            }
            Purpose::Score { scoring: Scoring::Last, .. } => {
                Demand { unfed, logits: LogitRows::Last, lane, is_answer: false }
            }
            Purpose::Score { scoring: Scoring::Chunks, .. } => {
                Demand { unfed, logits: LogitRows::All, lane, is_answer: false }
            }
            // As if the next one were the last that is known.
            Purpose::Score { scoring: Scoring::Steps { every }, .. } => {
                let unfed = unfed.min(1);
                let is_read = (self.fed + unfed).is_multiple_of(every);
                let logits = if is_read { LogitRows::Last } else { LogitRows::None };
                Demand { unfed, logits, lane, is_answer: false }
            }
        }
    }

    /// Notes that the next `n_rows` tokens are in the cache; returns how many of them were prompt.
    pub(crate) fn feed(&mut self, n_rows: usize) -> usize {
        let before = self.fed.min(self.prompt_tokens);
        self.fed += n_rows;
        self.fed.min(self.prompt_tokens) - before
    }

    /// Token events so far.
    pub(crate) fn n_completion(&self) -> usize {
        match &self.purpose {
            Purpose::Generate(generating) => generating.n_completion,
            Purpose::Score { .. } => 0,
        }
    }

    /// Whether nobody listens any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        match &self.purpose {
            Purpose::Generate(generating) => generating.events.is_disconnected(),
            Purpose::Score { rows, .. } => rows.is_disconnected(),
        }
    }

    /// What its caller is told when that has passed.
    pub(crate) fn lateness(&self) -> SequenceFault {
        let n_tokens = self.n_completion();
        let phase = if n_tokens > 0 { LatePhase::Decode } else { LatePhase::Prefill };
        SequenceFault::DeadlineExceeded { phase, n_tokens }
    }

    /// How the device may find its next token, where [`Row::Found`] is all that it needs, with `n_pending`
    /// tokens in front of it that were asked for and not accepted.
    pub(crate) fn draw(&self, n_pending: u64) -> Option<Draw> {
        match &self.purpose {
            Purpose::Generate(generating) => {
                generating.needs_only_tokens.then(|| generating.sampler.draw(n_pending))
            }
            Purpose::Score { .. } => None,
        }
    }

    /// Whether the token that it gets next, should it go on, is fed: one that reaches `max_tokens` is not,
    /// and has no position, and one that fills its place may be fed at another.
    pub(crate) fn feeds_its_next_token(&self) -> bool {
        match &self.purpose {
            Purpose::Generate(generating) => {
                let n_next = self.tokens.len() + 1;
                let fills_its_place = |rotation: &Rotating| rotation.is_full(n_next);
                generating.n_completion + 1 < generating.max_tokens
                    && !generating.rotation.as_deref().is_some_and(fills_its_place)
            }
            Purpose::Score { .. } => false,
        }
    }

    /// Whether it is to be rotated, or to end because it may not be.
    pub(crate) fn rotation_due(&mut self) -> Due {
        match &mut self.purpose {
            Purpose::Generate(generating) => {
                let Generating { rotation: Some(rotation), constraint, .. } = &mut **generating
                else {
                    return Due::No;
                };
                if !rotation.is_full(self.tokens.len()) {
                    return Due::No;
                }
                let waits = rotation.waits();
                let constraint = constraint.as_deref_mut().filter(|_| waits);
                let is_open = constraint.map(|constraint| !constraint.is_complete());
                rotation.due(self.tokens.len(), is_open)
            }
            Purpose::Score { .. } => Due::No,
        }
    }

    /// Drops tokens and tells the caller; returns the positions of what is left. What is no part of the cache
    /// stays as it is.
    fn drop_tokens(&mut self) -> Vec<Range<usize>> {
        let Purpose::Generate(generating) = &mut self.purpose else { return Vec::new() };
        let Some(rotation) = &mut generating.rotation else { return Vec::new() };
        let Kept { rotated, positions } = rotation.rotate(&mut self.tokens);
        if let Some(roll_back) = &mut generating.roll_back {
            roll_back.forget();
        }
        drop(generating.events.send(Event::Rotated(rotated)));
        // What is read again is nobody's prompt.
        self.prompt_tokens = 0;
        positions
    }

    /// Whether it goes round in a circle and is to go back.
    pub(crate) fn roll_back_due(&self) -> bool {
        match &self.purpose {
            Purpose::Generate(generating) => {
                generating.roll_back.as_deref().is_some_and(RollBack::is_due)
            }
            Purpose::Score { .. } => false,
        }
    }

    /// Takes back what it said since it was as it is to be again, and is to be computed anew from there; or says
    /// why it cannot go on.
    pub(crate) fn roll_back(&mut self) -> Option<SequenceFault> {
        let Purpose::Generate(generating) = &mut self.purpose else { return None };
        // Once: the next loop ends it.
        let place = generating.roll_back.take().and_then(|mut one| one.take())?;
        let n_back = self.tokens.len() - place.n_tokens;
        self.tokens.truncate(place.n_tokens);
        let fault = generating.go_back(place, n_back);
        self.fed = 0;
        self.n_shared = 0;
        // What is read again is nobody's prompt.
        self.prompt_tokens = 0;
        fault
    }

    /// Drops tokens, and is to be computed anew from what is left.
    pub(crate) fn rotate_anew(&mut self) {
        self.drop_tokens();
        self.fed = 0;
        self.n_shared = 0;
    }

    /// Drops tokens, and says how keys and values of what is left move to the front. They were computed
    /// beside what is dropped and still encode it, so that from here on nobody reads them for their tokens.
    pub(crate) fn rotate_in_place(&mut self) -> Vec<KvMove> {
        let n_fed = self.fed;
        let kept = self.drop_tokens();
        let slot = |position: usize| KvSlot {
            page: self.page_table[position / PAGE_TOKENS],
            offset: u32::try_from(position % PAGE_TOKENS).expect("pages are small"),
        };
        let cached = kept.into_iter().flatten().filter(|&from| from < n_fed);
        let moves: Vec<(usize, usize)> = cached.enumerate().collect();
        self.fed = moves.len();
        self.namespace = None;
        let moved = moves.into_iter().filter(|(to, from)| to != from);
        moved
            .map(|(to, from)| {
                let back = i32::try_from(from - to).expect("a context is far below 2^31");
                KvMove { from: slot(from), to: slot(to), distance: -back }
            })
            .collect()
    }

    /// Takes one row; `Some` when the sequence ends with it.
    pub(crate) fn accept(&mut self, row: Row<'_>, shared: &mut Shared<'_>) -> Option<Ending> {
        match (&mut self.purpose, row) {
            (Purpose::Generate(generating), row) => {
                generating.accept(row, &mut self.tokens, shared)
            }
            (Purpose::Score { rows, .. }, Row::Logits(logits)) => {
                // Only rows that are read were asked for.
                rows.send(Ok(logits.to_vec())).is_err().then_some(Ending::Gone)
            }
            (Purpose::Score { .. }, Row::Found(_)) => {
                unreachable!("a score needs every logit, and the worker asks before")
            }
        }
    }

    /// Whether every row of a scored sequence was delivered.
    pub(crate) fn is_scored(&self) -> bool {
        matches!(self.purpose, Purpose::Score { .. }) && self.fed == self.tokens.len()
    }

    /// Sends the last event. The pages were released before, so whoever sees it sees them free.
    pub(crate) fn end(mut self, ending: Ending) {
        match &mut self.purpose {
            Purpose::Generate(generating) => generating.end(ending, self.cached_tokens),
            Purpose::Score { rows, .. } => fail_score(rows, ending),
        }
    }
}

/// What tests break by hand.
#[cfg(test)]
impl Running {
    pub(crate) fn rotating(&mut self) -> &mut Rotating {
        match &mut self.purpose {
            Purpose::Generate(generating) => {
                generating.rotation.as_deref_mut().expect("it may rotate")
            }
            Purpose::Score { .. } => panic!("a score never rotates"),
        }
    }
}

/// A complete score ends by closing its channel; anything else must be told apart from that.
fn fail_score(rows: &ScoreRows, ending: Ending) {
    match ending {
        Ending::Fault(fault) => drop(rows.send(Err(fault))),
        Ending::Finish { finish: Finish::Cancelled, .. } => {
            drop(rows.send(Err(SequenceFault::Stopped)));
        }
        Ending::Finish {
            finish:
                Finish::Stop
                | Finish::Length
                | Finish::Degenerate
                | Finish::RotationRequired
                | Finish::SchemaIncomplete,
            ..
        }
        | Ending::Gone => {}
    }
}

fn milliseconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1000.0
}
