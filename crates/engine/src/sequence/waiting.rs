//! A sequence in the queue: what is to be computed, for whom, and until when.

use std::time::Instant;

use super::{Ending, fail_score, milliseconds};
use crate::constraint::Constraint;
use crate::event::{Event, Finished, SequenceFault, SequenceId, Timings, Usage};
use crate::queue::Queued;
use crate::request::{GenerateRequest, Priority};
use crate::rotation::RotationPlan;

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
