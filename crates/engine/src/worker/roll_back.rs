//! Answers that go back to before a loop; see [`crate::roll_back`].
//!
//! As one that is rotated anew, such a sequence gives its pages back and comes before the queue. A row of it that
//! is in flight belongs to what is taken back, and is nobody's.

use exrail_kernels::Backend;

use super::Worker;
use crate::counters::Total;
use crate::sequence::Ending;

impl<B: Backend> Worker<B> {
    /// Behind a step.
    pub(super) fn roll_back_due(&mut self) {
        for at in (0..self.running.len()).rev() {
            if self.running[at].roll_back_due() {
                self.roll_back(at);
            }
        }
    }

    fn roll_back(&mut self, at: usize) {
        self.share_at_the_end(at);
        let n_pages = self.running[at].pages.len();
        let mut sequence = self.take_out(at, Some(n_pages));
        if let Some(flight) = &mut self.flight {
            flight.disown(sequence.id);
        }
        self.gauges.count(sequence.traffic, Total::RollBacks, 1);
        if let Some(fault) = sequence.roll_back() {
            return self.finish(sequence, Ending::Fault(fault));
        }
        // They come from the last to the first.
        self.suspended.push_front(sequence);
        self.publish();
    }
}

#[cfg(test)]
mod tests;
