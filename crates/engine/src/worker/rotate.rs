//! Rotation of the sequences whose context is full; see [`crate::rotation`].
//!
//! A sequence that is rotated anew gives its pages back and comes before the queue, as one whose pages were
//! withdrawn: it owned as many as it needs, so that it has them again in the next turn. It never writes the
//! pages that it had, since others may read them.
//!
//! One that is rotated in place stays where it is and writes its own pages. That they are its own it has been
//! promised at its admission, and it is checked here once more: a page that breaks the promise is withdrawn, as
//! any broken page is, and the sequence computed anew before it is rotated.

use std::panic::{AssertUnwindSafe, catch_unwind};

use exrail_kernels::Backend;

use super::Worker;
use super::step::panic_message;
use crate::counters::Total;
use crate::event::{Finish, SequenceFault};
use crate::load::Loaded;
use crate::rotation::Due;
use crate::sequence::{Ending, Traffic};

impl<B: Backend> Worker<B> {
    /// Behind a step: rotates what is full, and ends what may not be rotated. No step was asked for behind
    /// the token that filled a context, see [`crate::sequence::Running::feeds_its_next_token`].
    pub(super) fn rotate_due(&mut self) {
        let mut broken = None;
        for at in (0..self.running.len()).rev() {
            match self.running[at].rotation_due() {
                Due::No => {}
                Due::Now if self.running[at].owns_its_pages() => {
                    match self.cache.check_owned(&self.running[at].pages) {
                        Ok(()) => self.rotate_in_place(at),
                        Err(fault) => broken = Some(fault),
                    }
                }
                Due::Now => self.rotate_anew(at),
                Due::End => self.retire(at, Ending::finish(Finish::RotationRequired)),
            }
        }
        // It moves sequences; another broken page is found in the next turn.
        if let Some(fault) = broken {
            self.contain(fault);
        }
    }

    fn rotate_anew(&mut self, at: usize) {
        let n_pages = self.running[at].pages.len();
        let mut sequence = self.take_out(at, Some(n_pages));
        self.gauges.count(sequence.traffic, Total::Rotations, 1);
        sequence.rotate_anew();
        // They come from the last to the first.
        self.suspended.push_front(sequence);
        self.publish();
    }

    /// A device that panics leaves keys that nobody knows, of this sequence alone.
    fn rotate_in_place(&mut self, at: usize) {
        let sequence = &mut self.running[at];
        self.gauges.count(sequence.traffic, Total::Rotations, 1);
        let moves = sequence.rotate_in_place();
        let Loaded { decoder, backend, .. } = &self.loaded;
        let pool = &mut self.pool;
        let moved = AssertUnwindSafe(|| decoder.move_cached(backend, pool, &moves));
        if let Err(panic) = catch_unwind(moved) {
            let message = panic_message(panic.as_ref());
            let fault = SequenceFault::StepPanicked { step: self.n_steps, message };
            tracing::error!(%fault, "a rotation panicked");
            self.gauges.count(Traffic::User, Total::Panics, 1);
            self.panics_in_a_row += 1;
            self.retire(at, Ending::Fault(fault));
        }
    }
}

#[cfg(test)]
mod in_place_tests;
#[cfg(test)]
mod real_tests;
#[cfg(test)]
mod tests;
