//! Faults on demand in a step; in a build without them nothing of it is left. See [`crate::faults`].

use std::time::Duration;

use exrail_kernels::{Backend, Largest};

use super::Worker;
use crate::faults::{Fault, Switchboard};
use crate::scheduler::PlannedSpan;
use crate::sequence::{Row, Traffic};

/// What a delayed step takes longer.
const DELAY: Duration = Duration::from_millis(300);

impl<B: Backend> Worker<B> {
    /// Before a step: what is to go wrong next, and what goes wrong at once.
    pub(super) fn disturb(&mut self) {
        self.cache.switchboard.advance(self.n_steps);
        if self.running.is_empty() {
            return;
        }
        self.cache.disturb();
        for (fault, time) in [(Fault::Delay, DELAY), (Fault::Hang, self.cache.switchboard.hang())] {
            if self.cache.switchboard.injects(fault) {
                std::thread::sleep(time);
            }
        }
    }

    /// Whether a step of these rows panics: one of its sequences is a victim, or is made one.
    pub(super) fn is_to_panic(&mut self, spans: &[PlannedSpan]) -> bool {
        let switchboard = &mut self.cache.switchboard;
        let sequences = || spans.iter().map(|span| &self.running[span.sequence_idx]);
        if let Some(user) = sequences().find(|one| one.traffic == Traffic::User)
            && switchboard.injects(Fault::Panic)
        {
            switchboard.picks(user.id.0);
        }
        sequences().any(|one| switchboard.is_victim(one.id.0))
    }
}

/// The row itself, or no numbers in its place.
pub(super) fn disturbed<'a>(row: Row<'a>, switchboard: &Switchboard) -> Row<'a> {
    if !switchboard.injects(Fault::Nan) {
        return row;
    }
    Row::Found(Largest { index: 0, value: f32::NAN })
}
