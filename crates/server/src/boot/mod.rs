//! Boot phases (guardrails G-01, G-02, G-04): who is starting, how far it is, and why it is not ready.
//!
//! One owner boots and writes the board; every request reads it. The owner runs the phases of a checked
//! [`BootPlan`] in its order: a phase out of turn is refused. `ready` is not a flag that somebody sets:
//! [`BootBoard::ready`] refuses until every phase before it has succeeded.
//!
//! Beside the owner a thread takes the boot's pulse each second. A phase that is past its deadline, or has
//! made no progress for 120 s, is failed by it: what the phase returns later no longer counts. The thread
//! that hangs cannot be ended, so whoever started the boot is told, and ends the process.

mod phase;
mod plan;
mod pulse;

use std::{
    fmt::Display,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use thiserror::Error;
use tokio::sync::watch;

pub use self::{
    phase::Phase,
    plan::{BootPlan, Deadline, GraphError, Node, Retrieval},
    pulse::Pace,
};

/// A phase that ended.
#[derive(Clone, Debug, PartialEq)]
pub struct PhaseRecord {
    /// Which.
    pub phase: Phase,
    /// Whether it succeeded.
    pub ok: bool,
    /// What its probe found.
    pub detail: String,
    /// How long it took.
    pub took: Duration,
}

/// Where the boot stands.
#[derive(Clone, Debug, PartialEq)]
pub enum BootState {
    /// In this phase since then.
    Starting {
        /// The phase.
        phase: Phase,
        /// When it began.
        since: Instant,
    },
    /// A phase failed for a reason that may pass; the boot begins again.
    Retrying {
        /// The phase that failed.
        phase: Phase,
        /// Why.
        reason: String,
        /// When it begins again.
        at: Instant,
    },
    /// Serving.
    Ready {
        /// Boot time.
        took: Duration,
    },
    /// Given up.
    Failed {
        /// The phase that failed.
        phase: Phase,
        /// Why.
        reason: String,
    },
}

/// Who waits for whom (G-04).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Who waits.
    pub waiter: Phase,
    /// What it needs that is not done.
    pub holders: Vec<Phase>,
}

/// Everything that is known about the boot.
#[derive(Clone, Debug, PartialEq)]
pub struct BootStatus {
    /// Where it stands.
    pub state: BootState,
    /// The phases of this attempt that ended, in order.
    pub phases: Vec<PhaseRecord>,
    /// Attempts begun, from 1.
    pub attempt: u32,
    /// What the phase said last that it is doing; empty when it said nothing.
    pub doing: String,
    /// Seconds' beats since the boot began; they stop when nobody watches over it.
    pub heartbeats: u64,
    /// Since the phase began or last made progress.
    pub quiet: Duration,
    plan: Option<Arc<BootPlan>>,
    pace: Pace,
    /// What the phase has to read.
    bytes: u64,
    started: Instant,
}

impl BootStatus {
    /// Whether requests are served.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self.state, BootState::Ready { .. })
    }

    /// Since the boot began; of one that is ready, what it took.
    #[must_use]
    pub fn took(&self) -> Duration {
        match self.state {
            BootState::Ready { took } => took,
            BootState::Starting { .. } | BootState::Retrying { .. } | BootState::Failed { .. } => {
                self.started.elapsed()
            }
        }
    }

    /// The phase to show.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match &self.state {
            BootState::Starting { phase, .. }
            | BootState::Retrying { phase, .. }
            | BootState::Failed { phase, .. } => *phase,
            BootState::Ready { .. } => Phase::Ready,
        }
    }

    /// Whether a phase runs that has made no progress for 10 s (G-01 P).
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        matches!(self.state, BootState::Starting { .. }) && self.quiet > self.pace.stall
    }

    /// Seconds for `Retry-After`, at least 1; absent after a failure, which waiting does not cure.
    #[must_use]
    pub fn retry_after_s(&self) -> Option<u64> {
        match &self.state {
            BootState::Starting { phase, .. } => Some(phase.usual().as_secs().max(1)),
            BootState::Retrying { at, .. } => {
                Some(at.saturating_duration_since(Instant::now()).as_secs() + 1)
            }
            BootState::Ready { .. } | BootState::Failed { .. } => None,
        }
    }

    /// The phases that have not ended and need one that has not, in order.
    #[must_use]
    pub fn waits(&self) -> Vec<Wait> {
        let done = |phase: Phase| self.phases.iter().any(|it| it.phase == phase && it.ok);
        let nodes = self.plan.iter().flat_map(|plan| plan.order());
        nodes
            .filter(|node| !self.is_ready() && !done(node.phase))
            .map(|node| Wait {
                waiter: node.phase,
                holders: node.needs.iter().copied().filter(|&need| !done(need)).collect(),
            })
            .filter(|wait| !wait.holders.is_empty())
            .collect()
    }

    /// The dump of a boot that does not go on, one line each: what runs, then who waits for whom.
    #[must_use]
    pub fn dump(&self) -> Vec<String> {
        let doing = if self.doing.is_empty() { "said nothing" } else { &self.doing };
        let quiet = self.quiet.as_secs_f64();
        let mut lines =
            vec![format!("`{}`: last progress {quiet:.1} s ago: {doing}", self.phase().name())];
        lines.extend(self.waits().iter().map(|wait| {
            let holders: Vec<_> = wait.holders.iter().map(|it| it.name()).collect();
            format!("`{}` waits for {}", wait.waiter.name(), holders.join(", "))
        }));
        lines
    }

    /// The next phase of the plan, when one is owned.
    fn next(&self) -> Option<&Node> {
        self.plan.as_ref()?.order().get(self.phases.len())
    }
}

/// `ready` was asked for without its proof.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("boot: expected phase `{missing}` to have succeeded before `ready`")]
pub struct NotProved {
    missing: &'static str,
}

/// Somebody else boots already.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("boot: expected one owner, found a second one")]
pub struct AlreadyOwned;

/// A phase that the board did not let through.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootFault {
    /// Not the next phase of the plan.
    #[error("boot: expected phase `{expected}` next, found `{found}`")]
    OutOfTurn {
        /// The next one.
        expected: &'static str,
        /// The one that was begun.
        found: &'static str,
    },
    /// The phase ended after its time was up.
    #[error("boot phase `{phase}`: {reason}")]
    Expired {
        /// The phase.
        phase: &'static str,
        /// Which limit.
        reason: String,
    },
}

/// The board itself. One writer: its owner, and the thread that takes its pulse.
#[derive(Debug)]
pub struct BootBoard {
    status: watch::Sender<BootStatus>,
    is_owned: AtomicBool,
    heartbeats: AtomicU64,
    /// Milliseconds from the start to the last progress.
    progress_ms: AtomicU64,
}

impl Default for BootBoard {
    fn default() -> Self {
        Self::new()
    }
}

impl BootBoard {
    /// A board in phase `config` that nobody owns.
    #[must_use]
    pub fn new() -> Self {
        let now = Instant::now();
        let status = BootStatus {
            state: BootState::Starting { phase: Phase::Config, since: now },
            phases: Vec::new(),
            attempt: 1,
            doing: String::new(),
            heartbeats: 0,
            quiet: Duration::ZERO,
            plan: None,
            pace: Pace::default(),
            bytes: 0,
            started: now,
        };
        Self {
            status: watch::Sender::new(status),
            is_owned: AtomicBool::new(false),
            heartbeats: AtomicU64::new(0),
            progress_ms: AtomicU64::new(0),
        }
    }

    /// What the board says now.
    #[must_use]
    pub fn status(&self) -> BootStatus {
        let mut status = self.status.borrow().clone();
        let last = Duration::from_millis(self.progress_ms.load(Ordering::Acquire));
        status.quiet = status.started.elapsed().saturating_sub(last);
        status.heartbeats = self.heartbeats.load(Ordering::Acquire);
        status
    }

    /// Takes the boot: its phases are those of `plan`. `expired` hears of a phase whose time is up, with
    /// the status at that moment; the thread in it may hang for ever, so it should end the process.
    ///
    /// # Errors
    /// Somebody owns it.
    pub fn own(
        self: &Arc<Self>,
        plan: BootPlan,
        pace: Pace,
        expired: impl FnOnce(&BootStatus) + Send + 'static,
    ) -> Result<BootOwner, AlreadyOwned> {
        if self.is_owned.swap(true, Ordering::AcqRel) {
            return Err(AlreadyOwned);
        }
        self.status.send_modify(|status| {
            status.plan = Some(Arc::new(plan));
            status.pace = pace;
        });
        let watch = pulse::watch(self, pace, expired);
        Ok(BootOwner { board: Arc::clone(self), _watch: watch })
    }

    /// Opens the fence.
    ///
    /// # Errors
    /// A phase of the plan has not succeeded, or there is no plan.
    pub fn ready(&self) -> Result<(), NotProved> {
        let missing = |status: &BootStatus| match &status.plan {
            None => Some(Phase::WarmUp),
            Some(_) if matches!(status.state, BootState::Failed { .. }) => Some(status.phase()),
            Some(_) => status.next().map(|node| node.phase).filter(|&phase| phase != Phase::Ready),
        };
        let mut refused = None;
        self.status.send_if_modified(|status| {
            refused = missing(status).map(|phase| NotProved { missing: phase.name() });
            if refused.is_none() {
                status.state = BootState::Ready { took: status.started.elapsed() };
            }
            refused.is_none()
        });
        refused.map_or(Ok(()), Err)
    }

    /// Waits until the boot ended; true when it is ready.
    pub async fn ended(&self) -> bool {
        let mut watch = self.status.subscribe();
        let ended = watch
            .wait_for(|status| {
                matches!(status.state, BootState::Ready { .. } | BootState::Failed { .. })
            })
            .await
            .map(|status| status.is_ready());
        // The board outlives every watcher: it is owned by the state that watches it.
        ended.unwrap_or(false)
    }

    fn progressed(&self) {
        let ms = self.status.borrow().started.elapsed().as_millis();
        self.progress_ms.store(u64::try_from(ms).unwrap_or(u64::MAX), Ordering::Release);
    }

    /// Fails the phase that runs; false when it has ended meanwhile.
    fn expire(&self, expired: Phase, why: &str) -> bool {
        self.status.send_if_modified(|status| {
            let BootState::Starting { phase, .. } = status.state else { return false };
            if phase == expired {
                status.state = BootState::Failed { phase, reason: why.to_owned() };
            }
            phase == expired
        })
    }
}

/// Who boots. There is one for a board at a time.
#[derive(Debug)]
pub struct BootOwner {
    board: Arc<BootBoard>,
    /// Ends the pulse when it is dropped.
    _watch: flume::Sender<std::convert::Infallible>,
}

impl Drop for BootOwner {
    fn drop(&mut self) {
        self.board.is_owned.store(false, Ordering::Release);
    }
}

impl BootOwner {
    /// What a phase says while it goes on.
    #[must_use]
    pub fn progress(&self) -> BootProgress {
        BootProgress { board: Arc::clone(&self.board) }
    }

    /// Runs the next phase: `work`, and `probe`, which shows that its result is what it should be and says
    /// so in a line for people.
    ///
    /// # Errors
    /// What either of them returned, and [`BootFault`]; the boot is then failed in this phase.
    pub fn run<T, E: Display + From<BootFault>>(
        &self,
        phase: Phase,
        work: impl FnOnce() -> Result<T, E>,
        probe: impl FnOnce(&T) -> Result<String, E>,
    ) -> Result<T, E> {
        let since = Instant::now();
        self.begin(phase, since)?;
        let result = work().and_then(|value| {
            let detail = probe(&value)?;
            Ok((value, detail))
        });
        let took = since.elapsed();
        let mut late = None;
        self.board.status.send_modify(|status| {
            if let BootState::Failed { phase, reason } = &status.state {
                late = Some(BootFault::Expired { phase: phase.name(), reason: reason.clone() });
                return;
            }
            let (ok, detail) = match &result {
                Ok((_, detail)) => (true, detail.clone()),
                Err(error) => (false, error.to_string()),
            };
            if !ok {
                status.state = BootState::Failed { phase, reason: detail.clone() };
            }
            status.phases.push(PhaseRecord { phase, ok, detail, took });
        });
        match late {
            Some(fault) => Err(fault.into()),
            None => result.map(|(value, _)| value),
        }
    }

    fn begin(&self, phase: Phase, since: Instant) -> Result<(), BootFault> {
        let mut refused = None;
        self.board.status.send_modify(|status| {
            let expected = status.next().map_or("nothing", |node| node.phase.name());
            if expected == phase.name() && !matches!(status.state, BootState::Failed { .. }) {
                status.state = BootState::Starting { phase, since };
                status.doing.clear();
                status.bytes = 0;
                return;
            }
            let fault = BootFault::OutOfTurn { expected, found: phase.name() };
            status.state = BootState::Failed { phase, reason: fault.to_string() };
            refused = Some(fault);
        });
        self.board.progressed();
        refused.map_or(Ok(()), Err)
    }

    /// Begins again after a failure: waits 3 s × 2ⁿ and up to a second more, at most `most` times. False
    /// when the boot has not failed or has been begun so often already.
    #[must_use]
    pub fn again(&self, most: u32) -> bool {
        let board = &self.board;
        let mut wait = Duration::ZERO;
        let begins = board.status.send_if_modified(|status| {
            let BootState::Failed { phase, reason } = &status.state else { return false };
            if status.attempt > most {
                return false;
            }
            wait = status.pace.back_off(status.attempt);
            let at = Instant::now() + wait;
            status.state = BootState::Retrying { phase: *phase, reason: reason.clone(), at };
            true
        });
        if begins {
            std::thread::sleep(wait);
            board.progressed();
            board.status.send_modify(|status| {
                let since = Instant::now();
                status.state = BootState::Starting { phase: Phase::Config, since };
                status.phases.clear();
                status.attempt += 1;
            });
        }
        begins
    }
}

/// How a phase that takes long says that it goes on.
#[derive(Clone, Debug)]
pub struct BootProgress {
    board: Arc<BootBoard>,
}

impl BootProgress {
    /// The phase got further.
    pub fn made(&self) {
        self.board.progressed();
    }

    /// The phase got further, and this is what it does now.
    pub fn doing(&self, what: &str) {
        self.made();
        self.board.status.send_if_modified(|status| {
            let is_new = status.doing != what;
            if is_new {
                what.clone_into(&mut status.doing);
            }
            is_new
        });
    }

    /// What the phase has to read, for its deadline.
    pub fn of_bytes(&self, bytes: u64) {
        self.board.status.send_modify(|status| status.bytes = bytes);
    }
}

#[cfg(test)]
mod tests;
