//! Boot phases (guardrails G-01): who is starting, how far it is, and why it is not ready.
//!
//! One thread boots and writes the board; every request reads it. `ready` is not a flag that somebody
//! sets: [`BootBoard::ready`] refuses until the phases that prove it have succeeded.

use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::watch;

/// The phases, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Options and configuration were read and frozen.
    Config,
    /// Keys are present and well formed.
    Secrets,
    /// Files were compared with their declared hashes and with each other.
    Preflight,
    /// The device answers and has the instructions it needs.
    Device,
    /// Devices agree on their order.
    Collectives,
    /// Weights are loaded and repacked.
    Weights,
    /// The tokenizer and the chat template passed their checks.
    Tokenizer,
    /// KV pages are allocated.
    KvPool,
    /// Real 10-token generations ran.
    WarmUp,
    /// Grammars are compiled.
    Grammar,
    /// The sentence encoder is loaded.
    Encoder,
    /// Collections are open and their contracts hold.
    Index,
    /// Gates and calibrations are loaded.
    Policy,
    /// A real request ran through the production path and its answer was checked.
    Sentinel,
    /// Requests are served.
    Ready,
}

impl Phase {
    /// The name in `/readyz`, traces and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Secrets => "secrets",
            Self::Preflight => "preflight",
            Self::Device => "device",
            Self::Collectives => "collectives",
            Self::Weights => "weights",
            Self::Tokenizer => "tokenizer",
            Self::KvPool => "kv_pool",
            Self::WarmUp => "warmup",
            Self::Grammar => "grammar",
            Self::Encoder => "encoder",
            Self::Index => "index",
            Self::Policy => "policy",
            Self::Sentinel => "sentinel",
            Self::Ready => "ready",
        }
    }

    /// How long the phase usually takes at most, for `Retry-After`.
    fn usual(self) -> Duration {
        match self {
            Self::Weights | Self::WarmUp => Duration::from_secs(5),
            Self::Config
            | Self::Secrets
            | Self::Preflight
            | Self::Device
            | Self::Collectives
            | Self::Tokenizer
            | Self::KvPool
            | Self::Grammar
            | Self::Encoder
            | Self::Index
            | Self::Policy
            | Self::Sentinel
            | Self::Ready => Duration::from_secs(1),
        }
    }
}

/// Phases without which nothing is served (G-01 R, G-05 R).
const PROOF: [Phase; 2] = [Phase::WarmUp, Phase::Sentinel];

/// A phase that ended.
#[derive(Clone, Debug, PartialEq)]
pub struct PhaseRecord {
    /// Which.
    pub phase: Phase,
    /// Whether it succeeded.
    pub ok: bool,
    /// What it found.
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

/// Everything that is known about the boot.
#[derive(Clone, Debug, PartialEq)]
pub struct BootStatus {
    /// Where it stands.
    pub state: BootState,
    /// The phases that ended, in order.
    pub phases: Vec<PhaseRecord>,
    started: Instant,
}

impl BootStatus {
    /// Whether requests are served.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self.state, BootState::Ready { .. })
    }

    /// The phase to show.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match &self.state {
            BootState::Starting { phase, .. } | BootState::Failed { phase, .. } => *phase,
            BootState::Ready { .. } => Phase::Ready,
        }
    }

    /// Seconds for `Retry-After`, at least 1; absent after a failure, which waiting does not cure.
    #[must_use]
    pub fn retry_after_s(&self) -> Option<u64> {
        match &self.state {
            BootState::Starting { phase, .. } => Some(phase.usual().as_secs().max(1)),
            BootState::Ready { .. } | BootState::Failed { .. } => None,
        }
    }
}

/// `ready` was asked for without its proof.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("boot: expected phase `{missing}` to have succeeded before `ready`")]
pub struct NotProved {
    missing: &'static str,
}

/// The board itself. One writer: the boot thread.
#[derive(Debug)]
pub struct BootBoard {
    status: watch::Sender<BootStatus>,
}

impl Default for BootBoard {
    fn default() -> Self {
        Self::new()
    }
}

impl BootBoard {
    /// A board in phase `config`.
    #[must_use]
    pub fn new() -> Self {
        let now = Instant::now();
        let state = BootState::Starting { phase: Phase::Config, since: now };
        let status = BootStatus { state, phases: Vec::new(), started: now };
        Self { status: watch::Sender::new(status) }
    }

    /// What the board says now.
    #[must_use]
    pub fn status(&self) -> BootStatus {
        self.status.borrow().clone()
    }

    /// Runs one phase and records how it ended. `work` returns its result and a line for people.
    ///
    /// # Errors
    /// What `work` returned; the boot is then failed in this phase.
    pub fn run<T, E: std::fmt::Display>(
        &self,
        phase: Phase,
        work: impl FnOnce() -> Result<(T, String), E>,
    ) -> Result<T, E> {
        let since = Instant::now();
        self.status.send_modify(|status| status.state = BootState::Starting { phase, since });
        let result = work();
        let took = since.elapsed();
        self.status.send_modify(|status| {
            let (ok, detail) = match &result {
                Ok((_, detail)) => (true, detail.clone()),
                Err(error) => (false, error.to_string()),
            };
            if !ok {
                status.state = BootState::Failed { phase, reason: detail.clone() };
            }
            status.phases.push(PhaseRecord { phase, ok, detail, took });
        });
        result.map(|(value, _)| value)
    }

    /// Opens the fence.
    ///
    /// # Errors
    /// A phase of the proof has not succeeded.
    pub fn ready(&self) -> Result<(), NotProved> {
        let status = self.status();
        for phase in PROOF {
            if !status.phases.iter().any(|record| record.phase == phase && record.ok) {
                return Err(NotProved { missing: phase.name() });
            }
        }
        self.status.send_modify(|status| {
            status.state = BootState::Ready { took: status.started.elapsed() };
        });
        Ok(())
    }

    /// Waits until the boot ended; true when it is ready.
    pub async fn ended(&self) -> bool {
        let mut watch = self.status.subscribe();
        let ended = watch
            .wait_for(|status| !matches!(status.state, BootState::Starting { .. }))
            .await
            .map(|status| status.is_ready());
        // The board outlives every watcher: it is owned by the state that watches it.
        ended.unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(board: &BootBoard, phase: Phase) {
        board.run(phase, || Ok::<_, NotProved>(((), String::new()))).unwrap();
    }

    #[test]
    fn ready_is_refused_without_a_generation() {
        let board = BootBoard::new();
        pass(&board, Phase::Weights);
        pass(&board, Phase::Sentinel);
        assert_eq!(board.ready(), Err(NotProved { missing: "warmup" }));
        assert!(!board.status().is_ready());
    }

    #[test]
    fn a_failed_phase_ends_in_a_named_state() {
        let board = BootBoard::new();
        board.run(Phase::Weights, || Err::<((), String), _>("truncated")).unwrap_err();
        let status = board.status();
        assert_eq!(
            status.state,
            BootState::Failed { phase: Phase::Weights, reason: "truncated".into() }
        );
        assert_eq!(status.retry_after_s(), None);
        assert!(board.ready().is_err());
    }

    #[test]
    fn all_proofs_open_the_fence() {
        let board = BootBoard::new();
        pass(&board, Phase::WarmUp);
        pass(&board, Phase::Sentinel);
        board.ready().unwrap();
        assert_eq!(board.status().phase(), Phase::Ready);
    }
}
