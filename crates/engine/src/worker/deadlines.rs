//! The one place where a deadline is decided, whatever state a sequence is in.
//!
//! Once a turn, between two steps: whoever is late by then ends by name and gives its pages back. Nobody is
//! told earlier than its deadline, and nobody later than the step in which it passes.

use std::time::Instant;

use exrail_kernels::Backend;

use super::Worker;
use crate::event::{LatePhase, SequenceFault};
use crate::sequence::{Ending, Waiting};

impl<B: Backend> Worker<B> {
    /// Ends what is late.
    pub(super) fn end_late(&mut self) {
        let now = Instant::now();
        let is_late = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let late = self.waiting.extract(|waiting: &Waiting| is_late(waiting.deadline()));
        for waiting in late {
            let fault = SequenceFault::DeadlineExceeded { phase: LatePhase::Queue, n_tokens: 0 };
            self.end_waiting(waiting, Ending::Fault(fault));
        }
        for at in (0..self.running.len()).rev() {
            if is_late(self.running[at].deadline) {
                let fault = self.running[at].lateness();
                self.retire(at, Ending::Fault(fault));
            }
        }
        for at in (0..self.suspended.len()).rev() {
            if is_late(self.suspended[at].deadline) {
                let fault = self.suspended[at].lateness();
                self.end_suspended(at, Ending::Fault(fault));
            }
        }
    }
}
