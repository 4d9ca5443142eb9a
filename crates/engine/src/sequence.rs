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

mod constrained;

use crate::cache::{Admitted, Namespace, PageRef, TableView};
use crate::constraint::Constraint;
use crate::counters::Total;
use crate::distribution::{Summary, largest};
use crate::event::{
    Alternative, Event, Finish, Finished, LatePhase, SequenceFault, SequenceId, Timings,
    TokenEvent, TokenLogprob, Usage,
};
use crate::loops::{LoopGuard, LoopMonitor, OnLoop};
use crate::output::AnswerText;
use crate::queue::Queued;
use crate::request::{GenerateRequest, Priority};
use crate::roll_back::{Checkpoint, RollBack};
use crate::rotation::{Due, Kept, Rotating, RotationPlan};
use crate::sampler::{Sampler, SamplerScratch};
use crate::scheduler::{Demand, LogitRows};

/// Times that a sequence is computed anew before it is given up.
const MAX_RESTARTS: usize = 3;

/// Whether a sequence counts in the public counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traffic {
    User,
    /// Leaves no trace (G-05).
    WarmUp,
}

/// A submitted sequence that has not been admitted.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) id: SequenceId,
    pub(crate) traffic: Traffic,
    /// Positions at the front that nobody computes: their keys and values are whatever their pages hold. What
    /// warms up needs long contexts, not what they say.
    pub(crate) blank: usize,
    pub(crate) submitted: Instant,
    pub(crate) job: Job,
}

/// What is to be computed.
#[derive(Debug)]
pub(crate) enum Job {
    Generate {
        request: Box<GenerateRequest>,
        /// Of its grammar.
        constraint: Option<Box<Constraint>>,
        /// `None`: it fits as it is.
        rotation: Option<RotationPlan>,
        events: flume::Sender<Event>,
    },
    Score {
        ids: Vec<u32>,
        scoring: Scoring,
        rows: ScoreRows,
    },
}

/// Where the rows of a score go, `(V,)` each.
pub(crate) type ScoreRows = flume::Sender<Result<Vec<f32>, SequenceFault>>;

/// How a sequence is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scoring {
    /// In chunks; every row is delivered.
    Chunks,
    /// As a prompt is read; the row of the last token is delivered.
    Last,
    /// Token by token, as an answer is fed; the rows at multiples of `every` tokens are delivered.
    Steps { every: usize },
}

impl Queued for Waiting {
    fn tenant(&self) -> Option<&str> {
        match &self.job {
            Job::Generate { request, .. } => request.tenant.as_deref(),
            Job::Score { .. } => None,
        }
    }

    fn priority(&self) -> Priority {
        match &self.job {
            Job::Generate { request, .. } => request.priority,
            Job::Score { .. } => Priority::Normal,
        }
    }

    fn cost(&self) -> u64 {
        self.positions() as u64
    }
}

impl Waiting {
    /// When it is of no use any more.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.job {
            Job::Generate { request, .. } => request.deadline,
            Job::Score { .. } => None,
        }
    }

    /// Whether nobody listens any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        match &self.job {
            Job::Generate { events, .. } => events.is_disconnected(),
            Job::Score { rows, .. } => rows.is_disconnected(),
        }
    }

    /// Positions of the KV cache that the sequence can fill. The last sampled token is never fed.
    pub(crate) fn positions(&self) -> usize {
        match &self.job {
            Job::Generate { rotation: Some(rotation), .. } => rotation.positions(),
            Job::Generate { request, rotation: None, .. } => {
                request.prompt.len() + request.max_tokens - 1
            }
            Job::Score { ids, .. } => ids.len(),
        }
    }

    /// What it reads of the cache's prefixes: its tokens and its tenant. Scores need the logits of every
    /// row, what warms up leaves no trace, and a request may ask for neither.
    pub(crate) fn prefix(&self) -> Option<(&[u32], Option<&str>)> {
        match (&self.job, self.traffic) {
            (Job::Generate { request, .. }, Traffic::User) if request.prefix_cache => {
                Some((&request.prompt, request.tenant.as_deref()))
            }
            (Job::Generate { .. } | Job::Score { .. }, _) => None,
        }
    }

    /// Whether its pages must be its own, since it will write those that it has filled.
    pub(crate) fn owns_its_pages(&self) -> bool {
        match &self.job {
            Job::Generate { rotation, .. } => {
                rotation.as_ref().is_some_and(RotationPlan::is_in_place)
            }
            Job::Score { .. } => false,
        }
    }

    /// Tells the caller that the sequence ends before it started.
    pub(crate) fn end(self, ending: Ending) {
        match self.job {
            Job::Generate { request, constraint, events, .. } => {
                let queue_ms = milliseconds(self.submitted, Instant::now());
                let event = match ending {
                    Ending::Fault(fault) => Event::Failed(fault),
                    Ending::Finish { finish, stop_string } => Event::Finished(Finished {
                        finish,
                        stop_string,
                        usage: Usage { prompt_tokens: request.prompt.len(), ..Usage::default() },
                        timings: Timings { queue_ms, ..Timings::default() },
                        entropy_mean: request.entropy.then_some(0.0),
                        constrained: constraint.map(|mut constraint| constraint.told()),
                    }),
                    Ending::Gone => return,
                };
                drop(events.send(event)); // the caller may be gone
            }
            Job::Score { rows, .. } => fail_score(&rows, ending),
        }
    }
}

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

#[derive(Debug)]
struct Generating {
    prompt_tokens: usize,
    max_tokens: usize,
    top_logprobs: Option<usize>,
    stop_at_eos: bool,
    stop: Vec<String>,
    sampler: Sampler,
    answer: AnswerText,
    events: flume::Sender<Event>,
    submitted: Instant,
    admitted: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// Positions sampled, the end-of-sequence token included.
    n_sampled: usize,
    /// Token events sent.
    n_completion: usize,
    /// Of all sampled positions, if asked for.
    entropy_sum: Option<f64>,
    needs_only_tokens: bool,
    /// Bytes of text sent.
    n_text: usize,
    loop_guard: LoopGuard,
    loops: Option<LoopMonitor>,
    /// `None`: a loop ends the answer.
    roll_back: Option<Box<RollBack>>,
    /// `None`: it fits as it is.
    rotation: Option<Box<Rotating>>,
    /// `None`: it may say anything.
    constraint: Option<Box<Constraint>>,
}

/// A token that was chosen.
#[derive(Debug)]
struct Chosen {
    id: u32,
    /// Whether the answer ends instead: `id` is an end-of-sequence token then.
    ends: bool,
    logprob: Option<TokenLogprob>,
    /// Where it was measured.
    entropy: Option<f32>,
}

impl Chosen {
    /// One of which nothing else is known.
    fn of(id: u32) -> Chosen {
        Chosen { id, ends: false, logprob: None, entropy: None }
    }
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
                let needs_only_tokens = request.needs_only_tokens();
                let n_prompt = request.prompt.len();
                let mut generating = Generating {
                    needs_only_tokens,
                    prompt_tokens: n_prompt,
                    max_tokens: request.max_tokens,
                    top_logprobs: request.logprobs,
                    stop_at_eos: request.stop_at_eos,
                    answer: AnswerText::new(request.stop.clone()),
                    stop: request.stop,
                    sampler: Sampler::new(request.sampling),
                    events,
                    submitted: waiting.submitted,
                    admitted: Instant::now(),
                    first_token: None,
                    last_token: None,
                    n_sampled: 0,
                    n_completion: 0,
                    entropy_sum: request.entropy.then_some(0.0),
                    n_text: 0,
                    loop_guard: request.loop_guard.unwrap_or_default(),
                    loops: request.loop_guard.map(LoopMonitor::new),
                    roll_back: request
                        .loop_guard
                        .filter(|guard| guard.on_loop == OnLoop::RollBack)
                        .map(|_| Box::default()),
                    rotation: rotation.map(|plan| Box::new(Rotating::new(plan, n_prompt))),
                    constraint,
                };
                if generating.roll_back.is_some() {
                    generating.remember(n_prompt);
                }
                (request.prompt, Purpose::Generate(Box::new(generating)))
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
            Purpose::Score { scoring: Scoring::Steps { .. }, .. } => {
                let unfed = unfed.min(1);
                Demand { unfed, logits: LogitRows::Last, lane, is_answer: false }
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
            (Purpose::Score { scoring, rows }, Row::Logits(logits)) => {
                let is_asked = match scoring {
                    Scoring::Chunks | Scoring::Last => true,
                    Scoring::Steps { every } => self.fed.is_multiple_of(*every),
                };
                let is_heard = !is_asked || rows.send(Ok(logits.to_vec())).is_ok();
                (!is_heard).then_some(Ending::Gone)
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

impl Generating {
    /// The next token, and what was asked for beside it.
    fn choose(
        &mut self,
        row: Row<'_>,
        tokens: &[u32],
        shared: &mut Shared<'_>,
    ) -> Result<Chosen, SequenceFault> {
        let logits = match row {
            Row::Logits(logits) => logits,
            Row::Found(Largest { index, value }) => {
                if !value.is_finite() {
                    return Err(self.not_finite());
                }
                assert!(self.constraint.is_none(), "a sequence with a grammar asks for logits");
                self.sampler.note(index);
                return Ok(Chosen::of(index));
            }
        };
        let rotation = self.rotation.take();
        let history = rotation.as_deref().map_or(tokens, |rotation| rotation.history(tokens));
        let chosen = self.choose_of(logits, history, shared);
        self.rotation = rotation;
        chosen
    }

    fn choose_of(
        &mut self,
        logits: &[f32],
        tokens: &[u32],
        shared: &mut Shared<'_>,
    ) -> Result<Chosen, SequenceFault> {
        let is_watched = self.loops.as_ref().is_some_and(LoopMonitor::wants_entropy);
        let is_measured = self.top_logprobs.is_some() || self.entropy_sum.is_some() || is_watched;
        if !is_measured && self.constraint.is_none() {
            let id = self.sampler.sample(logits, tokens, shared.scratch);
            return id.map(Chosen::of).ok_or_else(|| self.not_finite());
        }
        let summary = Summary::of(logits).ok_or_else(|| self.not_finite())?;
        let (id, ends) = if self.constraint.is_some() {
            self.choose_allowed((logits, &summary), tokens, shared)?
        } else {
            let id = self.sampler.sample(logits, tokens, shared.scratch);
            (id.ok_or_else(|| self.not_finite())?, false)
        };
        let logprob =
            self.top_logprobs.map(|n| describe(shared.tokenizer, &summary, logits, id, n));
        Ok(Chosen { id, ends, logprob, entropy: is_measured.then_some(summary.entropy) })
    }

    fn not_finite(&self) -> SequenceFault {
        SequenceFault::NumericFault { step: self.n_sampled }
    }

    fn accept(
        &mut self,
        row: Row<'_>,
        tokens: &mut Vec<u32>,
        shared: &mut Shared<'_>,
    ) -> Option<Ending> {
        let Chosen { id, ends, logprob, entropy } = match self.choose(row, tokens, shared) {
            Ok(chosen) => chosen,
            Err(fault) => return Some(Ending::Fault(fault)),
        };
        self.n_sampled += 1;
        if let (Some(sum), Some(entropy)) = (&mut self.entropy_sum, entropy) {
            *sum += f64::from(entropy);
        }
        if ends || self.stop_at_eos && shared.eos.contains(&id) {
            tokens.push(id);
            self.note_time();
            return Some(self.ending_at_eos(id));
        }
        let told = entropy.filter(|_| self.entropy_sum.is_some());
        if let Some(ending) = self.say(id, (logprob, told), tokens, shared) {
            return Some(ending);
        }
        let bytes = text_bytes(shared.tokenizer, id);
        if let Some(ending) = self.watch(id, bytes, entropy, tokens.len()) {
            return Some(ending);
        }
        self.follow(tokens, shared)
    }

    fn note_time(&mut self) {
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
    }

    /// Adds a token to the answer and tells the caller; `Some` when the answer ends with it.
    fn say(
        &mut self,
        id: u32,
        (logprob, entropy): (Option<TokenLogprob>, Option<f32>),
        tokens: &mut Vec<u32>,
        shared: &Shared<'_>,
    ) -> Option<Ending> {
        tokens.push(id);
        self.note_time();
        let bytes = text_bytes(shared.tokenizer, id);
        if let Some(rotation) = &mut self.rotation {
            rotation.push(id, bytes);
        }
        let piece = self.answer.push(bytes);
        self.n_text += piece.text.len();
        if let Some(constraint) = &mut self.constraint {
            constraint.keep(&piece.text);
        }
        let event = TokenEvent { id, text: piece.text, logprob, entropy };
        self.n_completion += 1;
        if self.events.send(Event::Token(event)).is_err() {
            return Some(Ending::Gone);
        }
        if let Some(index) = piece.stopped {
            return Some(self.ending_at_stop(index, shared.tokenizer));
        }
        self.ending_by_itself()
    }

    /// Looks for a loop behind a token, with so many tokens of the context; `Some` when the answer ends with it.
    fn watch(
        &mut self,
        id: u32,
        bytes: &[u8],
        entropy: Option<f32>,
        n_tokens: usize,
    ) -> Option<Ending> {
        let found = self.loops.as_mut().and_then(|loops| loops.note(id, bytes, entropy));
        let Some(roll_back) = &mut self.roll_back else {
            return found.map(|_| Ending::finish(Finish::Degenerate));
        };
        if let Some(found) = found {
            let goes_back = roll_back.decide(found, self.n_completion);
            return (!goes_back).then(|| Ending::finish(Finish::Degenerate));
        }
        if RollBack::wants(self.n_completion) {
            self.remember(n_tokens);
        }
        None
    }

    /// Remembers the answer as it is, where it may go back; with so many tokens of the context.
    fn remember(&mut self, n_tokens: usize) {
        let place = Checkpoint {
            n_tokens,
            n_completion: self.n_completion,
            n_sampled: self.n_sampled,
            n_text: self.n_text,
            entropy_sum: self.entropy_sum,
            sampler: self.sampler.clone(),
            answer: self.answer.clone(),
            json: self.rotation.as_deref().map(Rotating::json),
            grammar: self.constraint.as_deref().map(Constraint::mark),
        };
        if let Some(roll_back) = &mut self.roll_back {
            roll_back.remember(place);
        }
    }

    /// Is as it was, but for the sampler's penalty, and tells the caller. `n_back` tokens are gone. Or says why it
    /// cannot go on.
    fn go_back(&mut self, place: Checkpoint, n_back: usize) -> Option<SequenceFault> {
        let Checkpoint {
            n_completion,
            n_sampled,
            n_text,
            entropy_sum,
            sampler,
            answer,
            json,
            grammar,
            ..
        } = place;
        (self.n_completion, self.n_sampled, self.n_text) = (n_completion, n_sampled, n_text);
        (self.entropy_sum, self.answer) = (entropy_sum, answer);
        self.sampler.go_back(sampler);
        self.needs_only_tokens = false;
        if let (Some(rotation), Some(json)) = (&mut self.rotation, json) {
            rotation.go_back(n_back, json);
        }
        self.loops = Some(LoopMonitor::new(self.loop_guard));
        drop(self.events.send(Event::RolledBack { n_tokens: n_completion, n_text }));
        self.constraint_goes_back(grammar)
    }

    /// A send fails only when the caller is gone; then nobody needs the event.
    fn end(&mut self, ending: Ending, cached_tokens: usize) {
        let (mut finish, mut stop_string) = match ending {
            Ending::Finish { finish, stop_string } => (finish, stop_string),
            Ending::Fault(fault) => {
                drop(self.events.send(Event::Failed(fault)));
                return;
            }
            Ending::Gone => return,
        };
        if stop_string.is_none() {
            let tail = self.answer.finish();
            stop_string = tail.stopped.and_then(|index| self.stop.get(index).cloned());
            finish = self.finish_of_tail(finish, tail.stopped.is_some());
            if !tail.text.is_empty() {
                drop(self.events.send(Event::Tail(tail.text)));
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "answers are far below 2^52 tokens")]
        let n = self.n_sampled.max(1) as f64;
        #[expect(clippy::cast_possible_truncation, reason = "entropies are reported in f32")]
        let entropy_mean = self.entropy_sum.map(|sum| (sum / n) as f32);
        let end = Instant::now();
        let first = self.first_token.unwrap_or(end);
        drop(self.events.send(Event::Finished(Finished {
            finish,
            stop_string,
            usage: Usage {
                prompt_tokens: self.prompt_tokens,
                completion_tokens: self.n_completion,
                cached_tokens,
            },
            timings: Timings {
                queue_ms: milliseconds(self.submitted, self.admitted),
                prefill_ms: milliseconds(self.admitted, first),
                decode_ms: milliseconds(first, self.last_token.unwrap_or(first)),
            },
            entropy_mean,
            constrained: self.constraint.as_deref_mut().map(Constraint::told),
        })));
    }
}

/// Control tokens are structure, not text: they are reported as tokens and show nothing.
fn text_bytes(tokenizer: &Tokenizer, id: u32) -> &[u8] {
    if tokenizer.is_control(id) { &[] } else { tokenizer.token_bytes(id).unwrap_or(&[]) }
}

fn describe(
    tokenizer: &Tokenizer,
    summary: &Summary,
    logits: &[f32],
    id: u32,
    n_top: usize,
) -> TokenLogprob {
    let top = largest(logits, n_top)
        .into_iter()
        .map(|(id, x)| Alternative {
            id,
            logprob: summary.logprob(x),
            bytes: text_bytes(tokenizer, id).to_vec(),
        })
        .collect();
    TokenLogprob {
        logprob: summary.logprob(logits[id as usize]),
        bytes: text_bytes(tokenizer, id).to_vec(),
        top,
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
