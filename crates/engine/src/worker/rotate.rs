//! Rotation of the sequences whose context is full; see [`crate::rotation`].
//!
//! A rotated sequence gives its pages back and comes before the queue, as one whose pages were withdrawn: it
//! owned as many as it needs, so that it has them again in the next turn. It never writes the pages that it
//! had, since others may read them.

use exrail_kernels::Backend;

use super::Worker;
use crate::counters::Total;
use crate::event::Finish;
use crate::rotation::Due;
use crate::sequence::Ending;

impl<B: Backend> Worker<B> {
    /// Behind a step: rotates what is full, and ends what may not be rotated. No step was asked for behind
    /// the token that filled a context, see [`crate::sequence::Running::feeds_its_next_token`].
    pub(super) fn rotate_due(&mut self) {
        for at in (0..self.running.len()).rev() {
            match self.running[at].rotation_due() {
                Due::No => {}
                Due::Now => self.rotate(at),
                Due::End => self.retire(at, Ending::finish(Finish::RotationRequired)),
            }
        }
    }

    fn rotate(&mut self, at: usize) {
        let n_pages = self.running[at].pages.len();
        let mut sequence = self.take_out(at, Some(n_pages));
        self.gauges.count(sequence.traffic, Total::Rotations, 1);
        sequence.rotate();
        // They come from the last to the first.
        self.suspended.push_front(sequence);
        self.publish();
    }
}

#[cfg(test)]
mod tests;
