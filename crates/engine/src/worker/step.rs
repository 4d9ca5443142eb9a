//! One step: planned, asked of the device, and accepted; where the device runs ahead, a turn later.
//!
//! # In flight
//! A device that computes while the host goes on ([`Backend::runs_ahead`]) would wait between two steps
//! for the host to accept tokens and to ask for more. Where the tokens are all that a step's sequences need,
//! the device therefore finds them, the most likely ones or drawn ones; and where each sequence gets one and
//! goes on, the next step is asked for first, with the tokens as the device found them, and the tokens are
//! accepted meanwhile. What a draw depends on (seed, sequence, step) is known before them. When something has changed (a sequence came,
//! ended or was cancelled), what is in flight is accepted first, and the next turn plans anew.
//!
//! - A row belongs to the sequence whose id it carries. A sequence that has ended by then, as only its
//!   token could tell, was computed once too often, and nobody gets that row.
//! - Its pages may have another owner already, although the step in flight writes one position of them:
//!   the device runs steps in order, so that the new owner writes later, and it reads nothing that it
//!   did not write.
//! - Pages were promised for `max_tokens`: a step whose token is the last of a sequence is not followed.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use exrail_kernels::{AttentionSpan, Backend, Draw, Draws, Largest, TokenId};
use exrail_model::Batch;

use super::disturb::disturbed;
use super::{SCORE_ROWS, Worker};
use crate::counters::Total;
use crate::event::{Finish, SequenceFault, SequenceId};
use crate::faults::Guard;
use crate::load::Loaded;
use crate::scheduler::{Demand, PlannedSpan, StepLimits, lanes, plan};
use crate::sequence::{Ending, Row, Running, Shared, Traffic};

/// A step that was asked for.
pub(super) struct Flight<Found> {
    /// In the order of the logit rows; sequences may have ended since.
    rows: Vec<FlightRows>,
    asked: Asked<Found>,
    step: u64,
}

/// The id of rows that nobody gets; no sequence has it.
const NOBODY: SequenceId = SequenceId(u64::MAX);

/// The rows of one sequence.
pub(super) struct FlightRows {
    pub(super) id: SequenceId,
    n_logit_rows: usize,
}

/// Where the results of a step will be.
enum Asked<Found> {
    /// The tokens, which are all that its sequences need.
    Tokens(Found),
    /// In the scratch, until the next step.
    Logits,
    /// Nowhere, and why.
    Panicked(String),
}

impl<B: Backend> Worker<B> {
    /// Asks for a step and accepts one: the same, or the one in flight before it.
    pub(super) fn step(&mut self) {
        if self.options.guards {
            self.check_tables();
        }
        let next = match self.flight.take() {
            Some(last) if self.can_follow(&last) => {
                let next = self.launch(&self.one_row_each(), Some(&last));
                self.land(last);
                next
            }
            Some(last) => return self.land(last),
            None => {
                let spans = self.planned();
                if spans.is_empty() {
                    return;
                }
                let asked = Instant::now();
                let next = self.launch(&spans, None);
                if !self.runs_ahead {
                    self.land(next);
                    let prompts = spans.iter().map(|span| span.n_rows).filter(|&n| n > 1);
                    return self.pace.note(prompts.sum(), asked.elapsed());
                }
                next
            }
        };
        if self.runs_ahead && next.gives_each_a_token() {
            self.flight = Some(next);
        } else {
            self.land(next);
        }
    }

    /// Whether the sequences of a step are all that there are, and each is fed the token that it gets.
    fn can_follow(&self, last: &Flight<B::Found>) -> bool {
        let same = |(rows, running): (&FlightRows, &Running)| rows.id == running.id;
        last.rows.len() == self.running.len()
            && last.rows.iter().zip(&self.running).all(same)
            && self.running.iter().all(Running::feeds_its_next_token)
    }

    /// The step behind one that [`Flight::gives_each_a_token`].
    fn one_row_each(&self) -> Vec<PlannedSpan> {
        let span = |sequence_idx| PlannedSpan { sequence_idx, n_rows: 1, n_logit_rows: 1 };
        (0..self.running.len()).map(span).collect()
    }

    fn planned(&mut self) -> Vec<PlannedSpan> {
        let limits = StepLimits { prefill_chunk: self.pace.chunk(), score_rows: SCORE_ROWS };
        if let Some(alone) = self.planned_alone(limits) {
            return alone;
        }
        let tenants: Vec<_> = self.running.iter().map(|one| one.tenant.as_deref()).collect();
        let lanes = lanes(&tenants);
        let demands = self.running.iter().zip(lanes).map(|(running, lane)| running.demand(lane));
        let demands: Vec<Demand> = demands.collect();
        plan(&demands, limits)
    }

    /// Asks for the forward pass of these rows, whose tokens are known or those that `last` gives.
    fn launch(
        &mut self,
        spans: &[PlannedSpan],
        last: Option<&Flight<B::Found>>,
    ) -> Flight<B::Found> {
        self.n_steps += 1;
        let users =
            spans.iter().any(|span| self.running[span.sequence_idx].traffic == Traffic::User);
        self.gauges.count(if users { Traffic::User } else { Traffic::WarmUp }, Total::Steps, 1);
        let last = last.and_then(|last| match &last.asked {
            Asked::Tokens(found) => Some(found),
            Asked::Logits | Asked::Panicked(_) => None,
        });
        self.ask_masks(spans);
        let asked = self.forward(spans, last);
        let rows = |span: &PlannedSpan| FlightRows {
            id: self.running[span.sequence_idx].id,
            n_logit_rows: span.n_logit_rows,
        };
        let flight = Flight { rows: spans.iter().map(rows).collect(), asked, step: self.n_steps };
        if !matches!(flight.asked, Asked::Panicked(_)) {
            for span in spans {
                let sequence = &mut self.running[span.sequence_idx];
                let n_prompt = sequence.feed(span.n_rows);
                self.gauges.count(sequence.traffic, Total::PromptTokens, n_prompt);
            }
        }
        flight
    }

    /// Has the masks computed that this step's tokens are drawn under, while it is computed. A sequence with a
    /// grammar needs logits, so that no step is asked for behind one whose token is not taken: a mask is never
    /// of another place than the token (B12).
    fn ask_masks(&mut self, spans: &[PlannedSpan]) {
        for span in spans.iter().filter(|span| span.n_logit_rows > 0) {
            self.running[span.sequence_idx].ask_mask(&mut self.masks);
        }
    }

    /// How the device finds the token of each logit row, where it does. One that computes in this thread
    /// finds the most likely tokens faster than all logits, and draws no faster than the sampler.
    fn draws(&self, spans: &[PlannedSpan], n_pending: u64) -> Option<Vec<Draw>> {
        let asked = spans.iter().filter(|span| span.n_logit_rows > 0);
        let draws = asked.map(|span| self.running[span.sequence_idx].draw(n_pending));
        let draws: Option<Vec<Draw>> = draws.collect();
        draws.filter(|draws| self.runs_ahead || draws.iter().all(Draw::is_greedy))
    }

    fn forward(&mut self, spans: &[PlannedSpan], last: Option<&B::Found>) -> Asked<B::Found> {
        let draws = self.draws(spans, u64::from(last.is_some()));
        let is_to_panic = self.is_to_panic(spans);
        let (mut ids, mut logit_rows) = (Vec::new(), Vec::new());
        let mut attention = Vec::with_capacity(spans.len());
        let mut end_row = 0;
        for span in spans {
            let sequence = &self.running[span.sequence_idx];
            let first_row = end_row;
            end_row += span.n_rows;
            // Those that `last` gives are not known here.
            let unfed = sequence.tokens.get(sequence.fed..sequence.fed + span.n_rows);
            ids.extend(unfed.unwrap_or_default().iter().map(|&id| TokenId(id)));
            logit_rows.extend((end_row - span.n_logit_rows..end_row).map(row_index));
            attention.push(AttentionSpan {
                first_row,
                n_rows: span.n_rows,
                first_position: sequence.fed,
                pages: &sequence.page_table,
            });
        }
        let batch = Batch { ids: &ids, spans: &attention, logit_rows: &logit_rows };
        let Loaded { decoder, backend, .. } = &self.loaded;
        let (scratch, pool, limit) = (&mut self.scratch, &mut self.pool, self.vocab_len);
        let step = AssertUnwindSafe(|| {
            assert!(!is_to_panic, "injected panic");
            let Some(rows) = draws else {
                decoder.forward(backend, scratch, pool, &batch);
                return Asked::Logits;
            };
            let draws = Draws { limit, rows: &rows };
            Asked::Tokens(match last {
                Some(last) => decoder.follow_drawn(backend, scratch, pool, last, &attention, draws),
                None => decoder.forward_drawn(backend, scratch, pool, &batch, draws),
            })
        });
        catch_unwind(step).unwrap_or_else(|panic| Asked::Panicked(panic_message(panic.as_ref())))
    }

    /// Waits for a step and hands its results to the sequences that are still there.
    fn land(&mut self, flight: Flight<B::Found>) {
        let Flight { rows, asked, step } = flight;
        let backend = &self.loaded.backend;
        let was_fed = !matches!(asked, Asked::Panicked(_));
        let found = match asked {
            Asked::Tokens(found) => {
                let wait = AssertUnwindSafe(|| backend.found(&found));
                let found = catch_unwind(wait).map_err(|panic| panic_message(panic.as_ref()));
                found.map(Some)
            }
            Asked::Logits => Ok(None),
            Asked::Panicked(message) => Err(message),
        };
        match found {
            Ok(found) => {
                self.panics_in_a_row = 0;
                self.gauges.progress();
                self.acquit(&rows);
                self.accept(&rows, found.as_deref(), step);
            }
            Err(message) => {
                // What a suspect does alone is no news of the engine.
                self.panics_in_a_row += u32::from(!self.is_suspect(&rows));
                self.gauges.count(Traffic::User, Total::Panics, 1);
                self.cache.switchboard.caught(Guard::Panics);
                let fault = SequenceFault::StepPanicked { step, message };
                tracing::error!(%fault, n_sequences = rows.len(), "a step panicked");
                self.blame(&rows, &fault, was_fed);
            }
        }
    }

    /// Where a sequence is, at `from` or behind.
    pub(super) fn find(&self, id: SequenceId, from: usize) -> Option<usize> {
        (from..self.running.len()).find(|&at| self.running[at].id == id)
    }

    /// Hands the results out. Ends are collected first: retiring moves sequences.
    fn accept(&mut self, rows: &[FlightRows], found: Option<&[Largest]>, step: u64) {
        let mut ended = Vec::new();
        let (mut next, mut end_row) = (0, 0);
        for rows in rows {
            let first_row = end_row;
            end_row += rows.n_logit_rows;
            // Sequences keep their order, so that each is behind the last.
            let Some(at) = self.find(rows.id, next) else { continue };
            next = at + 1;
            let ending = self.accept_rows(at, first_row..end_row, found, step);
            if rows.n_logit_rows > 0 {
                self.share_full_pages(at, ending.as_ref());
            }
            if let Some(ending) = ending {
                ended.push((at, ending));
            }
        }
        for (at, ending) in ended.into_iter().rev() {
            self.retire(at, ending);
        }
    }

    /// Right behind an admission: what the grammar forces before anything is computed. `Some`: it is the whole
    /// answer.
    pub(super) fn begin(&mut self, at: usize) -> Option<Ending> {
        let Loaded { tokenizer, .. } = &self.loaded;
        let sequence = &mut self.running[at];
        let mut shared = Shared { tokenizer, eos: &self.eos, scratch: &mut self.sampling };
        let begun = catch_unwind(AssertUnwindSafe(|| sequence.begin(&mut shared)));
        let ending = begun.unwrap_or_else(|panic| {
            let (step, message) = (self.n_steps, panic_message(panic.as_ref()));
            Some(Ending::Fault(SequenceFault::StepPanicked { step, message }))
        });
        let n_tokens = sequence.n_completion();
        self.gauges.count(sequence.traffic, Total::GeneratedTokens, n_tokens);
        ending
    }

    fn accept_rows(
        &mut self,
        at: usize,
        rows: Range<usize>,
        found: Option<&[Largest]>,
        step: u64,
    ) -> Option<Ending> {
        let Loaded { backend, tokenizer, .. } = &self.loaded;
        let sequence = &mut self.running[at];
        let mut shared = Shared { tokenizer, eos: &self.eos, scratch: &mut self.sampling };
        for row in rows {
            let given = match found {
                Some(found) => Row::Found(found[row]),
                None => {
                    self.scratch.logits(backend, row, &mut self.logits);
                    // Rows beyond the tokenizer are padding of the output matrix and never sampled
                    // (E11).
                    Row::Logits(&self.logits[..self.vocab_len])
                }
            };
            let given = if sequence.can_restart() {
                disturbed(given, &self.cache.switchboard)
            } else {
                given
            };
            let before = sequence.n_completion();
            let accepted = catch_unwind(AssertUnwindSafe(|| sequence.accept(given, &mut shared)));
            let ending = accepted.unwrap_or_else(|panic| {
                let message = panic_message(panic.as_ref());
                Some(Ending::Fault(SequenceFault::StepPanicked { step, message }))
            });
            let n_tokens = sequence.n_completion() - before;
            self.gauges.count(sequence.traffic, Total::GeneratedTokens, n_tokens);
            if let Some(Ending::Fault(SequenceFault::NumericFault { .. })) = &ending {
                self.cache.switchboard.caught(Guard::Numbers);
            }
            if ending.is_some() {
                return ending;
            }
        }
        sequence.is_scored().then(|| Ending::finish(Finish::Length))
    }
}

impl<Found> Flight<Found> {
    /// Its rows of a sequence are nobody's: they may come from a page that broke an invariant.
    pub(super) fn disown(&mut self, id: SequenceId) {
        for rows in self.rows.iter_mut().filter(|rows| rows.id == id) {
            rows.id = NOBODY;
        }
    }

    /// Whether it is one token for every sequence in it, so that the device knows the next step's.
    fn gives_each_a_token(&self) -> bool {
        matches!(self.asked, Asked::Tokens(_))
            && self.rows.iter().all(|rows| rows.n_logit_rows == 1)
    }
}

fn row_index(row: usize) -> u32 {
    u32::try_from(row).expect("a batch has at most prefill_chunk + max_sequences rows")
}

pub(super) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    if let Some(message) = panic.downcast_ref::<&str>() {
        return (*message).to_owned();
    }
    panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;
    use crate::event::{Event, Finished};
    use crate::handle::Command;
    use crate::request::{GenerateRequest, Sampling};

    /// The tokens and the end of one sequence.
    #[derive(Debug, Default, PartialEq)]
    struct Answer {
        ids: Vec<u32>,
        text: String,
        finish: Option<Finish>,
        stop_string: Option<String>,
        n_completion: usize,
    }

    fn answer(events: &flume::Receiver<Event>) -> Answer {
        let mut answer = Answer::default();
        for event in events.drain() {
            match event {
                Event::Started { .. } | Event::Rotated(_) | Event::RolledBack { .. } => {}
                Event::Token(token) => {
                    answer.ids.push(token.id);
                    answer.text.push_str(&token.text);
                }
                Event::Tail(text) => answer.text.push_str(&text),
                Event::Finished(Finished { finish, stop_string, usage, .. }) => {
                    assert_eq!(answer.finish.replace(finish), None, "one end");
                    answer.stop_string = stop_string;
                    answer.n_completion = usage.completion_tokens;
                }
                Event::Failed(fault) => panic!("{fault}"),
            }
        }
        answer
    }

    fn bench(runs_ahead: bool) -> Bench {
        let mut bench = Bench::new();
        bench.worker.runs_ahead = runs_ahead;
        bench
    }

    impl<B: Backend> Bench<B> {
        pub(in crate::worker) fn is_idle(&self) -> bool {
            let worker = &self.worker;
            worker.n_admitted() == 0 && worker.waiting.is_empty() && worker.flight.is_none()
        }

        /// Turns until nothing is left to do.
        pub(in crate::worker) fn finish(&mut self) {
            for _ in 0..1000 {
                if self.is_idle() && self.commands.is_empty() {
                    return;
                }
                self.turn();
            }
            panic!("it goes on and on");
        }
    }

    /// What a request alone gives on a device that does not run ahead.
    fn alone(request: GenerateRequest) -> Answer {
        let mut bench = bench(false);
        let events = bench.send(request);
        bench.finish();
        answer(&events)
    }

    /// One that is drawn, nearly at random, so that tokens tell numbers apart.
    fn drawn(n_prompt: u32, max_tokens: usize) -> GenerateRequest {
        let mut request = Bench::request(n_prompt, max_tokens);
        let seed = u64::from(n_prompt);
        request.sampling = Sampling { temperature: 4.0, top_p: 0.99, seed, ..Sampling::default() };
        request
    }

    /// The last place of an answer whose token did not come before in it.
    fn new_token(ids: &[u32]) -> usize {
        let is_new = |&at: &usize| !ids[..at].contains(&ids[at]);
        let at = (0..ids.len()).rfind(is_new).expect("the first one is new");
        assert!(at > 1, "{ids:?}");
        at
    }

    /// Different lengths, one that ends by itself, one by a stop string, and two that come later.
    fn requests() -> Vec<GenerateRequest> {
        let plain: Vec<_> = [(4, 20), (30, 9), (11, 30), (2, 25), (7, 12), (19, 1)]
            .map(|(n_prompt, max_tokens)| Bench::request(n_prompt, max_tokens))
            .into();
        let mut requests = plain;
        let whole = alone(requests[3].clone()).text;
        let ends: Vec<usize> = whole.char_indices().map(|(at, _)| at).collect();
        let (from, to) = (ends[ends.len() / 2], ends[ends.len() / 2 + 2]);
        requests[3].stop = vec![whole[from..to].to_owned()];
        requests[2].stop_at_eos = true;
        requests
    }

    /// Runs all of them, the last two submitted when four run.
    fn together(runs_ahead: bool, eos: u32) -> (Vec<Answer>, Bench) {
        let mut bench = bench(runs_ahead);
        bench.worker.eos = vec![eos];
        let requests = requests();
        let mut events: Vec<_> =
            requests[..4].iter().map(|request| bench.send(request.clone())).collect();
        for _ in 0..5 {
            bench.turn();
        }
        events.extend(requests[4..].iter().map(|request| bench.send(request.clone())));
        bench.finish();
        (events.iter().map(answer).collect(), bench)
    }

    #[test]
    fn the_answers_are_those_of_steps_that_wait_for_each_other() {
        let ids = alone(Bench::request(11, 30)).ids;
        let eos_at = new_token(&ids);
        let (expected, plain) = together(false, ids[eos_at]);
        let (found, ahead) = together(true, ids[eos_at]);
        assert_eq!(found, expected);
        assert_eq!(found[2].ids, ids[..eos_at]);
        assert_eq!(found[2].finish, Some(Finish::Stop));
        assert!(found[3].stop_string.is_some());
        for (answer, n_tokens) in [(&found[0], 20), (&found[1], 9), (&found[4], 12), (&found[5], 1)]
        {
            assert_eq!((answer.finish, answer.ids.len()), (Some(Finish::Length), n_tokens));
        }
        let [plain, ahead] = [plain, ahead].map(|bench| bench.gauges.snapshot());
        let totals = |c: &crate::Counters| {
            (c.tokens_prompt, c.tokens_generated, c.finished, c.failed, c.panics, c.pages_free)
        };
        assert_eq!(totals(&ahead), totals(&plain));
        assert_eq!(ahead.pages_free, ahead.pages_total);
        // Ends that only the token could tell cost a row each, in a step that may have had no other.
        assert!((plain.steps..=plain.steps + 2).contains(&ahead.steps), "{ahead:?} {plain:?}");
    }

    #[test]
    fn the_next_step_is_asked_for_before_the_last_is_read() {
        let mut bench = bench(true);
        let events = bench.submit(4, 3);
        let fed =
            |bench: &Bench| (bench.worker.running[0].fed, bench.worker.running[0].tokens.len());
        bench.turn();
        assert_eq!(fed(&bench), (4, 4));
        assert_eq!(events.drain().count(), 1, "Started");
        bench.turn();
        assert_eq!(fed(&bench), (5, 5), "the step of the first token is in flight");
        assert_eq!(events.drain().count(), 1, "the first token");
        bench.turn();
        // The third token is the last: it is not fed.
        assert_eq!(fed(&bench), (6, 6));
        assert_eq!(events.drain().count(), 1, "the second token");
        bench.turn();
        assert!(bench.is_idle());
        assert_eq!(answer(&events).n_completion, 3);
        assert_eq!(bench.gauges.snapshot().steps, 3);
    }

    #[test]
    fn a_device_that_does_not_run_ahead_has_nothing_in_flight() {
        let mut bench = bench(false);
        let events = bench.submit(4, 3);
        for _ in 0..3 {
            bench.turn();
            assert!(bench.worker.flight.is_none());
        }
        assert_eq!(answer(&events).n_completion, 3);
    }

    /// What is in flight when the last sequence ends is taken down before the thread sleeps.
    #[test]
    fn an_end_in_front_of_a_step_in_flight_leaves_nothing_behind() {
        let ids = alone(Bench::request(5, 20)).ids;
        let eos_at = new_token(&ids);
        let mut bench = bench(true);
        bench.worker.eos = vec![ids[eos_at]];
        let mut request = Bench::request(5, 20);
        request.stop_at_eos = true;
        let events = bench.send(request);
        while bench.worker.running.is_empty() == bench.worker.flight.is_none() {
            bench.turn();
        }
        assert!(bench.worker.running.is_empty() && bench.worker.flight.is_some());
        let counters = bench.gauges.snapshot();
        assert_eq!(counters.pages_free, counters.pages_total);
        bench.turn();
        assert!(bench.is_idle());
        assert_eq!(answer(&events).ids, ids[..eos_at]);
        let counters = bench.gauges.snapshot();
        assert_eq!(counters.tokens_generated, eos_at as u64);
        assert_eq!(counters.steps, eos_at as u64 + 2, "the prompt, its tokens, and one too many");
    }

    /// Drawn and greedy sequences are followed alike, and the ends that only a token tells are those of steps
    /// that wait for each other.
    #[test]
    fn drawn_tokens_are_asked_for_before_the_last_are_read() {
        let ids = alone(drawn(5, 20)).ids;
        let eos_at = new_token(&ids);
        let mut bench = bench(true);
        bench.worker.eos = vec![ids[eos_at]];
        let mut request = drawn(5, 20);
        request.stop_at_eos = true;
        // Together they are one chunk.
        let requests = [request, drawn(9, 12), Bench::request(2, 15)];
        let events = requests.clone().map(|request| bench.send(request));
        for n_tokens in 0..4 {
            bench.turn();
            assert!(bench.worker.flight.is_some());
            let counts = [0, 1, 2].map(|at| bench.worker.running[at].n_completion());
            assert_eq!(counts, [n_tokens; 3], "one token behind what is asked for");
        }
        bench.finish();
        let answers = events.each_ref().map(answer);
        assert_eq!(answers[0].ids, ids[..eos_at]);
        assert_eq!(answers[0].finish, Some(Finish::Stop));
        assert_eq!(answers[1], alone(drawn(9, 12)));
        assert_eq!(answers[2], alone(Bench::request(2, 15)));
        let counters = bench.gauges.snapshot();
        assert_eq!(counters.tokens_generated, (eos_at + 12 + 15) as u64);
        assert_eq!((counters.pages_free, counters.panics), (counters.pages_total, 0));
    }

    #[test]
    fn cancelled_beside_it_a_drawn_sequence_goes_on_by_its_own_numbers() {
        let mut bench = bench(true);
        let cancelled = bench.send(drawn(4, 50));
        let kept = bench.send(drawn(9, 30));
        for _ in 0..4 {
            bench.turn();
        }
        bench.commands.send(Command::Cancel(SequenceId(0))).unwrap();
        bench.finish();
        assert_eq!(answer(&cancelled).finish, Some(Finish::Cancelled));
        assert_eq!(answer(&kept), alone(drawn(9, 30)));
    }

    #[test]
    fn beside_a_sequence_that_needs_logits_nothing_is_drawn_ahead() {
        let mut penalised = drawn(6, 8);
        penalised.sampling.presence_penalty = 1.0;
        let mut bench = bench(true);
        let plain = bench.send(drawn(4, 20));
        let other = bench.send(penalised.clone());
        bench.turn();
        while bench.worker.running.len() == 2 {
            assert!(bench.worker.flight.is_none());
            bench.turn();
        }
        bench.turn();
        assert!(bench.worker.flight.is_some(), "alone again");
        bench.finish();
        assert_eq!(answer(&plain), alone(drawn(4, 20)));
        assert_eq!(answer(&other), alone(penalised));
    }

    /// Pages of a sequence that is cancelled while a step of it is in flight are free at once, and whoever
    /// gets them has its own answer.
    #[test]
    fn cancelled_in_flight_frees_pages_that_may_be_used_at_once() {
        let expected = (alone(Bench::request(9, 60)), alone(Bench::request(21, 40)).ids);
        let mut bench = bench(true);
        let kept = bench.submit(9, 60);
        let cancelled = bench.submit(4, 1600); // 7 of 8 pages
        for _ in 0..4 {
            bench.turn();
        }
        let late = bench.submit(21, 1600); // needs all of them
        bench.turn();
        assert!(late.is_empty() && bench.worker.flight.is_some());
        assert_eq!(bench.gauges.snapshot().pages_free, 0);
        let used = bench.worker.running[1].page_table[0];
        bench.commands.send(Command::Cancel(SequenceId(1))).unwrap();
        bench.turn();
        assert!(bench.worker.running[1].page_table.contains(&used), "used again at once");
        let n_tokens = answer(&cancelled).ids.len();
        while late.len() <= 40 {
            bench.turn();
        }
        bench.commands.send(Command::Cancel(SequenceId(2))).unwrap();
        bench.finish();
        assert_eq!(answer(&cancelled), Answer::default(), "nothing behind the end");
        let late = answer(&late);
        assert_eq!((answer(&kept), &late.ids[..40]), (expected.0, &expected.1[..]));
        let counters = bench.gauges.snapshot();
        assert_eq!((counters.pages_free, counters.cancelled), (8, 2));
        assert_eq!(counters.tokens_generated, (60 + late.ids.len() + n_tokens) as u64);
    }

    #[test]
    fn a_sequence_whose_last_token_is_on_its_way_is_not_fed_it() {
        let mut bench = bench(true);
        let events = bench.submit(250, 7); // 256 positions, a page
        bench.finish();
        assert_eq!(answer(&events).ids.len(), 7);
        assert_eq!(bench.gauges.snapshot().panics, 0);
    }

    // Mutations: the test breaks one rule by hand; what the rule is for must be seen.

    #[test]
    fn without_the_ids_of_its_rows_a_step_would_answer_another_sequence() {
        let run = |is_mutated: bool| {
            let mut bench = bench(true);
            let ended = bench.submit(4, 50);
            let other = bench.submit(9, 50);
            for _ in 0..4 {
                bench.turn();
            }
            bench.commands.send(Command::Cancel(SequenceId(0))).unwrap();
            if is_mutated {
                // By place: the other sequence is the first when the step lands.
                let flight = bench.worker.flight.as_mut().unwrap();
                flight.rows.remove(1);
                flight.rows[0].id = SequenceId(1);
            }
            bench.finish();
            drop(ended);
            answer(&other).ids
        };
        let expected = alone(Bench::request(9, 50)).ids;
        assert_eq!(run(false), expected);
        assert_ne!(run(true), expected);
    }

    #[test]
    fn without_the_pending_token_a_step_would_draw_by_the_number_before() {
        let expected = alone(drawn(4, 20)).ids;
        let second = |n_pending| {
            let mut bench = bench(true);
            let _events = bench.send(drawn(4, 20));
            bench.turn();
            let Worker { flight, loaded, scratch, pool, running, vocab_len, .. } =
                &mut bench.worker;
            let Some(Flight { asked: Asked::Tokens(last), .. }) = flight.take() else {
                panic!("the first token is in flight");
            };
            let running = &running[0];
            let rows = [running.draw(n_pending).expect("it needs no logits")];
            let draws = Draws { limit: *vocab_len, rows: &rows };
            let (n_rows, first_position) = (1, running.fed);
            let pages = &running.page_table;
            let span = AttentionSpan { first_row: 0, n_rows, first_position, pages };
            let Loaded { decoder, backend, .. } = loaded;
            let found = decoder.follow_drawn(backend, scratch, pool, &last, &[span], draws);
            assert_eq!(backend.found(&last)[0].index, expected[0]);
            backend.found(&found)[0].index
        };
        assert_eq!(second(1), expected[1]);
        assert_ne!(second(0), expected[1]);
    }

    #[test]
    fn without_the_end_by_length_a_step_would_leave_the_pages_of_its_sequence() {
        let mut bench = bench(true);
        let events = bench.submit(250, 7);
        while bench.worker.flight.is_none() || bench.worker.running[0].n_completion() < 6 {
            bench.turn();
        }
        let last = bench.worker.flight.take().unwrap();
        assert!(!bench.worker.can_follow(&last));
        let next = bench.worker.launch(&bench.worker.one_row_each(), Some(&last));
        assert!(matches!(next.asked, Asked::Panicked(_)), "position 256 of one page");
        bench.worker.land(last);
        bench.worker.land(next);
        assert_eq!(answer(&events).ids.len(), 7, "its tokens were there before");
        assert_eq!(bench.gauges.snapshot().panics, 1);
        assert_eq!(bench.gauges.snapshot().failed, 0);
    }
}
