//! Whose fault a panic is.
//!
//! A step that panics while it is asked for has fed nobody: every sequence in it can be asked for again, and
//! writes the same keys and values to the same positions. Each of them is therefore a suspect and runs alone
//! next, with at least the rows that it had. The one that panics alone fails; the others are cleared and go
//! on. A panic that comes only where several run together costs time and nobody's answer.
//!
//! Where a step panics while its tokens are waited for, they are lost and what was fed is not known; all of
//! its sequences fail then.

use exrail_kernels::Backend;

use super::Worker;
use super::step::FlightRows;
use crate::event::SequenceFault;
use crate::scheduler::{PlannedSpan, StepLimits, plan};
use crate::sequence::Ending;

impl<B: Backend> Worker<B> {
    /// The step of the next suspect alone; `None`: there is none.
    pub(super) fn planned_alone(&mut self, limits: StepLimits) -> Option<Vec<PlannedSpan>> {
        let at = loop {
            let id = *self.suspects.last()?;
            match self.find(id, 0) {
                Some(at) => break at,
                // It ended meanwhile.
                None => drop(self.suspects.pop()),
            }
        };
        let mut spans = plan(&[self.running[at].demand(0)], limits);
        spans.iter_mut().for_each(|span| span.sequence_idx = at);
        Some(spans)
    }

    /// Whoever was in a step that went well is no suspect.
    pub(super) fn acquit(&mut self, rows: &[FlightRows]) {
        self.suspects.retain(|id| rows.iter().all(|rows| rows.id != *id));
    }

    /// Whether these are the rows of a suspect alone.
    pub(super) fn is_suspect(&self, rows: &[FlightRows]) -> bool {
        matches!(rows, [alone] if self.suspects.contains(&alone.id))
    }

    /// Ends whoever a panic is the fault of, or sets out to find it.
    pub(super) fn blame(&mut self, rows: &[FlightRows], fault: &SequenceFault, was_fed: bool) {
        if rows.len() > 1 && !was_fed {
            self.suspects = rows.iter().map(|rows| rows.id).collect();
            return;
        }
        for rows in rows {
            if let Some(at) = self.find(rows.id, 0) {
                self.retire(at, Ending::Fault(fault.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::super::{EngineState, Turn};
    use crate::event::{Event, SequenceFault};

    /// Three answers, of which the second has no page that a step could read.
    fn broken() -> (Bench, Vec<flume::Receiver<Event>>) {
        let mut bench = Bench::new();
        let events: Vec<_> = (4..7).map(|n_prompt| bench.submit(n_prompt, 9)).collect();
        bench.turn();
        assert_eq!(bench.worker.running.len(), 3);
        bench.worker.running[1].page_table.clear();
        (bench, events)
    }

    fn is_whole(events: &flume::Receiver<Event>) -> bool {
        matches!(events.drain().last(), Some(Event::Finished(_)))
    }

    /// H2: one error, and the others as if nothing had been.
    #[test]
    fn a_panic_ends_the_sequence_whose_fault_it_is() {
        let alone = |n_prompt| {
            let mut bench = Bench::new();
            let events = bench.submit(n_prompt, 9);
            bench.finish();
            events.drain().filter_map(token).collect::<Vec<u32>>()
        };
        let (mut bench, events) = broken();
        bench.finish();
        let fault = events[1].drain().last();
        assert!(
            matches!(fault, Some(Event::Failed(SequenceFault::StepPanicked { .. }))),
            "{fault:?}"
        );
        for (events, n_prompt) in [(&events[0], 4), (&events[2], 6)] {
            assert_eq!(events.drain().filter_map(token).collect::<Vec<u32>>(), alone(n_prompt));
        }
        let counters = bench.gauges.snapshot();
        assert_eq!((counters.failed, counters.finished, counters.pages_free), (1, 2, 8));
        assert_eq!(counters.panics, 2, "together and alone");
    }

    fn token(event: Event) -> Option<u32> {
        match event {
            Event::Token(token) => Some(token.id),
            Event::Started { .. }
            | Event::Rotated(_)
            | Event::RolledBack { .. }
            | Event::Tail(_)
            | Event::Finished(_)
            | Event::Failed(_) => None,
        }
    }

    /// The mutation: with nobody under suspicion the same step panics until the engine gives up, and
    /// everybody fails.
    #[test]
    fn without_suspects_one_sequence_takes_everybody_along() {
        let (mut bench, events) = broken();
        let end = loop {
            bench.worker.suspects.clear();
            match bench.worker.turn() {
                Turn::Next => {}
                Turn::End(state) => break state,
            }
        };
        assert_eq!(end, EngineState::Faulted);
        bench.worker.stop(end);
        assert!(!events.iter().any(is_whole));
    }
}
