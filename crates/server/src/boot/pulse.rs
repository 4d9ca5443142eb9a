//! The thread beside a boot: a heartbeat each second, a word when nothing moves, and the end of a phase whose
//! time is up (G-01 P, G-04).

use std::{
    convert::Infallible,
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use super::{BootBoard, BootState, BootStatus, Phase};
use crate::ids;

/// How patient a boot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// Silence after which a phase is called stalled.
    pub stall: Duration,
    /// Silence after which it is ended, whatever its deadline.
    pub deadlock: Duration,
    /// Wait before the second attempt; each further one is twice as long.
    pub back_off: Duration,
    /// What every deadline is multiplied by, for slow machines.
    pub patience: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            stall: Duration::from_secs(10),
            deadlock: Duration::from_secs(120),
            back_off: Duration::from_secs(3),
            patience: 1,
        }
    }
}

impl Pace {
    /// The wait after so many attempts, from 1, with up to a third of `back_off` more: many servers that
    /// lost the same source must not come back at once.
    pub(super) fn back_off(&self, attempts: u32) -> Duration {
        let doubled = self.back_off.saturating_mul(1 << attempts.saturating_sub(1).min(8));
        let third = u64::try_from(self.back_off.as_millis() / 3).unwrap_or(u64::MAX).max(1);
        // Without randomness the wait is merely the same for all.
        let jitter = ids::seed().map_or(0, |seed| seed % third);
        doubled + Duration::from_millis(jitter)
    }

    /// Which limit a phase has passed, if any: since it began, and since it last made progress.
    pub(super) fn passed(&self, status: &BootStatus) -> Option<(Phase, String)> {
        let BootState::Starting { phase, since } = status.state else { return None };
        let node = status.plan.as_ref()?.order().iter().find(|node| node.phase == phase)?;
        let (whole, silence) = node.deadline.limits(status.bytes);
        let patient = |limit: Duration| limit.saturating_mul(self.patience);
        let (took, quiet) = (since.elapsed(), status.quiet.min(since.elapsed()));
        let silence = silence.unwrap_or(self.deadlock).min(self.deadlock);
        let told = |limit: Duration, what: &str| {
            let doing = status.doing.as_str();
            let doing = if doing.is_empty() { String::new() } else { format!(", during: {doing}") };
            let limit = limit.as_secs_f64();
            format!(
                "expected {what} within {limit} s, found none{doing}; --boot-patience 2 doubles the limits"
            )
        };
        if let Some(whole) = whole.map(patient).filter(|&whole| took > whole) {
            return Some((phase, told(whole, "its end")));
        }
        let silence = patient(silence);
        (quiet > silence).then(|| (phase, told(silence, "progress")))
    }
}

/// Starts the thread; it ends with the sender, with the board, or with the boot.
pub(super) fn watch(
    board: &Arc<BootBoard>,
    pace: Pace,
    expired: impl FnOnce(&BootStatus) + Send + 'static,
) -> flume::Sender<Infallible> {
    let (owner, ends) = flume::bounded(0);
    let board = Arc::downgrade(board);
    let thread = std::thread::Builder::new().name("exrail-boot-pulse".into());
    let started = thread.spawn(move || {
        if let Some(status) = beat_until_over(&board, &pace, &ends) {
            expired(&status);
        }
    });
    if let Err(error) = started {
        tracing::error!(%error, "nobody watches over the boot: expected a thread, found none");
    }
    owner
}

/// Beats; returns the status of a phase whose time was up.
fn beat_until_over(
    board: &Weak<BootBoard>,
    pace: &Pace,
    ends: &flume::Receiver<Infallible>,
) -> Option<BootStatus> {
    let mut told = None;
    loop {
        match ends.recv_timeout(pace.heartbeat) {
            Err(flume::RecvTimeoutError::Timeout) => {}
            Ok(never) => match never {},
            Err(flume::RecvTimeoutError::Disconnected) => return None,
        }
        let board = board.upgrade()?;
        board.heartbeats.fetch_add(1, Ordering::AcqRel);
        let status = board.status();
        if status.is_ready() {
            return None;
        }
        if let Some((phase, why)) = pace.passed(&status)
            && board.expire(phase, &why)
        {
            let status = board.status();
            tracing::error!(phase = phase.name(), "boot given up: {why}");
            status.dump().iter().for_each(|line| tracing::error!("{line}"));
            return Some(status);
        }
        if status.is_stalled() && told != Some(status.phase()) {
            told = Some(status.phase());
            tracing::warn!(phase = status.phase().name(), "STALL: {}", status.dump().join("; "));
        }
    }
}
