//! The engine thread: it alone owns the decoder, its scratch, the KV pool and the sequences.
//!
//! One turn: take commands → drop cancelled sequences → admit from the queue → one step → audit.
//! Cancelling therefore frees pages before another forward pass is asked for, in every state of a
//! sequence. One that was asked for before may still compute a row of it, which nobody gets; see
//! `worker/step.rs`.
//!
//! # Faults
//! Non-finite logits or a panic while sampling fail that sequence; `worker/paging.rs` says what a broken
//! page does. Whose fault a panic inside the forward pass is, `worker/suspects.rs` finds out: that sequence
//! fails, and the others go on. The scratch needs no repair, because every step writes what it reads. After
//! [`MAX_PANICS_IN_A_ROW`] panics without a good step between them the engine stops with
//! [`EngineState::Faulted`].

mod deadlines;
mod disturb;
mod paging;
mod roll_back;
mod rotate;
mod sessions;
mod step;
mod suspects;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use exrail_kernels::{Backend, DeviceCounters};
use exrail_model::Scratch;

use self::step::Flight;
use crate::cache::{KvCache, Pins};
use crate::constraint::Tally;
use crate::counters::{EngineState, Gauges, Total};
use crate::error::EngineError;
use crate::event::{Finish, SequenceFault, SequenceId};
use crate::faults::Switchboard;
use crate::fence::Fence;
use crate::handle::{Command, EngineFacts, EngineOptions};
use crate::load::Loaded;
use crate::masks::MaskThreads;
use crate::pace::Pace;
use crate::places::Left;
use crate::queue::{FairQueue, Queued};
use crate::sampler::SamplerScratch;
use crate::sequence::{Ending, Running, Traffic, Waiting};

/// Panicking steps after which the engine gives up.
pub(crate) const MAX_PANICS_IN_A_ROW: u32 = 3;
/// Rows of logits that a scored sequence may take a step.
const SCORE_ROWS: usize = 32;

/// State of the engine thread.
pub(crate) struct Worker<B: Backend> {
    loaded: Loaded<B>,
    scratch: Scratch<B>,
    pool: B::KvPool,
    cache: KvCache,
    /// Of what this engine computes.
    pins: Arc<Pins>,
    waiting: FairQueue<Waiting>,
    running: Vec<Running>,
    /// Admitted, and without pages since theirs were withdrawn; they come before the queue.
    suspended: VecDeque<Running>,
    options: EngineOptions,
    eos: Vec<u32>,
    vocab_len: usize,
    commands: flume::Receiver<Command>,
    gauges: Arc<Gauges>,
    sampling: SamplerScratch,
    masks: MaskThreads,
    /// One row, `(V,)`.
    logits: Vec<f32>,
    /// Whether the device computes while this thread goes on.
    runs_ahead: bool,
    /// The step whose tokens are yet to be accepted.
    flight: Option<Flight<B::Found>>,
    /// What the device had built when warming ended; `None` before.
    fence: Option<Fence>,
    /// Sequences of a step that panicked, each of which runs alone next.
    suspects: Vec<SequenceId>,
    pace: Pace,
    n_steps: u64,
    panics_in_a_row: u32,
}

/// Pages of the second tier, of which there is one.
fn host_pages(options: &EngineOptions, page_bytes: usize) -> Result<usize, EngineError> {
    let found = options.kv_host_bytes;
    let expected = match options.prefix_cache {
        false => "0 without a prefix cache".to_owned(),
        true if found < page_bytes => format!("0, or one page of {page_bytes} bytes at least"),
        true => return Ok(found / page_bytes),
    };
    Err(EngineError::BadOption { field: "kv_host_bytes", expected, found: found.to_string() })
}

/// Whether the thread goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Next,
    End(EngineState),
}

impl<B: Backend> Worker<B> {
    /// Allocates everything the engine will ever hold on the device.
    pub(crate) fn new(
        loaded: Loaded<B>,
        facts: &EngineFacts,
        commands: flume::Receiver<Command>,
        gauges: Arc<Gauges>,
    ) -> Result<Worker<B>, EngineError> {
        let options = facts.options;
        let max_rows = options.prefill_chunk + options.max_sequences;
        let max_logit_rows = SCORE_ROWS + options.max_sequences;
        let scratch = loaded.decoder.scratch(&loaded.backend, max_rows, max_logit_rows)?;
        let shape = loaded.decoder.kv_shape(facts.kv_pages, options.kv_dtype);
        let pool = loaded.backend.kv_pool(shape)?;
        let mut cache = KvCache::new(facts.kv_pages, Switchboard::new(gauges.faults()));
        if options.kv_host_bytes > 0 {
            let page_bytes = loaded.backend.kv_page_bytes(&pool);
            cache.keep_on_host(host_pages(&options, page_bytes)?, page_bytes)?;
        }
        gauges.set_host(&cache.host());
        gauges.set_built(&loaded.backend.built(), None);
        Ok(Worker {
            scratch,
            pool,
            cache,
            pins: Arc::new(Pins::of(&loaded, options.kv_dtype)),
            waiting: FairQueue::default(),
            running: Vec::new(),
            suspended: VecDeque::new(),
            options,
            eos: loaded.tokenizer.eos_ids().to_vec(),
            vocab_len: facts.vocab_len,
            commands,
            gauges,
            sampling: SamplerScratch::default(),
            masks: MaskThreads::beside(loaded.backend.host_threads()),
            logits: vec![0.0; loaded.config.vocab_size],
            runs_ahead: loaded.backend.runs_ahead(),
            flight: None,
            fence: None,
            suspects: Vec::new(),
            pace: Pace::new(
                options.prefill_chunk,
                options.step_target.filter(|_| !loaded.backend.runs_ahead()),
            ),
            n_steps: 0,
            panics_in_a_row: 0,
            loaded,
        })
    }

    /// Runs until shutdown. `alive` is dropped when the thread is done and its memory is given back, whichever
    /// way.
    pub(crate) fn run(mut self, alive: flume::Sender<Infallible>) {
        // Everything is made: what a load left free, and the code that it ran, need not stay.
        self.loaded.backend.release_unused();
        let state = loop {
            // A panic outside the guarded parts is a bug of this file; it must still reach every
            // caller as a fault and not as silence.
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(Turn::Next) => {}
                Ok(Turn::End(state)) => break state,
                Err(_) => break EngineState::Faulted,
            }
        };
        self.stop(state);
        self.give_back();
        drop(alive);
    }

    /// Drops everything that it holds on the device; the next model may need that place.
    fn give_back(self) {
        let Loaded { backend, decoder, tokenizer, template, .. } = self.loaded;
        drop((self.pool, self.scratch, decoder));
        drop((self.cache, tokenizer, template));
        backend.release_unused();
    }

    /// State first, then the channel: see `EngineHandle::enqueue`.
    fn stop(&mut self, state: EngineState) {
        self.gauges.set_state(state);
        for command in self.commands.drain() {
            command.submitted().into_iter().for_each(|waiting| self.waiting.push(waiting));
        }
        self.fail_all(&SequenceFault::Stopped);
    }

    fn turn(&mut self) -> Turn {
        if let Turn::End(state) = self.take_commands() {
            return Turn::End(state);
        }
        self.drop_abandoned();
        self.end_late();
        self.admit();
        self.disturb();
        if !self.running.is_empty() || self.flight.is_some() {
            self.step();
            self.roll_back_due();
            self.rotate_due();
            if self.options.guards {
                self.watch_fence();
            }
            if self.options.guards && self.n_steps.is_multiple_of(self.options.kv_audit_every) {
                self.audit();
            }
        } else if !self.waiting.is_empty() || !self.suspended.is_empty() {
            // With nothing running every page is free and the head fits; if it was not admitted,
            // pages were lost, and the audit starts the books anew.
            self.audit();
        }
        if self.panics_in_a_row >= MAX_PANICS_IN_A_ROW {
            return Turn::End(EngineState::Faulted);
        }
        Turn::Next
    }

    /// Blocks for a command only when there is nothing to compute.
    fn take_commands(&mut self) -> Turn {
        let is_idle = self.n_admitted() == 0 && self.waiting.is_empty() && self.flight.is_none();
        let first = if is_idle { self.commands.recv().ok() } else { self.commands.try_recv().ok() };
        if is_idle && first.is_none() {
            return Turn::End(EngineState::Stopped); // every handle is gone
        }
        let mut next = first;
        while let Some(command) = next {
            match command {
                Command::Submit(waiting) => {
                    self.gauges.count(waiting.traffic, Total::Submitted, 1);
                    self.waiting.push(waiting);
                }
                Command::SubmitTogether(waiting) => {
                    for waiting in waiting {
                        self.gauges.count(waiting.traffic, Total::Submitted, 1);
                        self.waiting.push(waiting);
                    }
                }
                Command::Cancel(id) => self.cancel(id),
                Command::OpenFence => {
                    self.loaded.backend.close_fence(false);
                    self.fence = None;
                    self.watch_fence();
                }
                Command::CloseFence(sender) => self.close_fence(&sender),
                Command::Pages(command) => self.page_command(command),
                Command::Inject(plan) => {
                    let (every, n_pages) = (self.options.kv_audit_every, self.cache.usable());
                    self.cache.switchboard.follow(plan, every, n_pages);
                }
                Command::Shutdown => return Turn::End(EngineState::Stopped),
            }
            next = self.commands.try_recv().ok();
        }
        Turn::Next
    }

    /// Whoever asked may have gone.
    fn close_fence(&mut self, sender: &flume::Sender<DeviceCounters>) {
        self.loaded.backend.close_fence(true);
        let built = self.loaded.backend.built();
        self.fence = Some(Fence::closed_at(built));
        self.watch_fence();
        sender.send(built).ok();
    }

    /// Publishes what the device has built, and warns of what it built behind the fence.
    fn watch_fence(&mut self) {
        let built = self.loaded.backend.built();
        let after_fence = self.fence.as_mut().map(|fence| fence.check(&built));
        self.gauges.set_built(&built, after_fence.as_ref());
    }

    /// An id that is not here has ended already.
    fn cancel(&mut self, id: SequenceId) {
        if let Some(waiting) = self.waiting.extract(|waiting| waiting.id == id).pop() {
            self.end_waiting(waiting, Ending::cancelled());
        } else if let Some(at) = self.running.iter().position(|running| running.id == id) {
            self.retire(at, Ending::cancelled());
        } else if let Some(at) = self.suspended.iter().position(|suspended| suspended.id == id) {
            self.end_suspended(at, Ending::cancelled());
        }
    }

    /// Sequences whose receiver is gone, such as a score whose caller unwound.
    fn drop_abandoned(&mut self) {
        for waiting in self.waiting.extract(Waiting::is_abandoned) {
            self.end_waiting(waiting, Ending::Gone);
        }
        for at in (0..self.running.len()).rev() {
            if self.running[at].is_abandoned() {
                self.retire(at, Ending::Gone);
            }
        }
        for at in (0..self.suspended.len()).rev() {
            if self.suspended[at].is_abandoned() {
                self.end_suspended(at, Ending::Gone);
            }
        }
    }

    /// Takes a sequence out, frees its pages, publishes that, and only then tells the caller.
    fn retire(&mut self, at: usize, ending: Ending) {
        // Which of its pages had a part in a fault is unknown.
        let found_by_nobody = if ending.is_sound() { self.running[at].pages.len() } else { 0 };
        if ending.is_sound() {
            self.share_at_the_end(at);
        }
        let sequence = self.take_out(at, Some(found_by_nobody));
        self.finish(sequence, ending);
    }

    /// Tells the caller of a sequence without pages.
    fn end_suspended(&mut self, at: usize, ending: Ending) {
        if let Some(sequence) = self.suspended.remove(at) {
            self.finish(sequence, ending);
        }
    }

    fn finish(&mut self, sequence: Running, ending: Ending) {
        self.count_end(sequence.traffic, &ending);
        if let Some(tally) = sequence.tally() {
            self.count_constrained(sequence.traffic, tally, &ending);
        }
        self.publish();
        sequence.end(ending);
    }

    /// Tells the caller of a sequence that leaves the queue without having started.
    fn end_waiting(&mut self, waiting: Waiting, ending: Ending) {
        self.count_end(waiting.traffic, &ending);
        self.gauges.leave_queue(waiting.tenant(), Left::Gone);
        waiting.end(ending);
    }

    fn count_end(&self, traffic: Traffic, ending: &Ending) {
        self.gauges.count(traffic, ending.total(), 1);
        if matches!(ending, Ending::Fault(SequenceFault::DeadlineExceeded { .. })) {
            self.gauges.count(traffic, Total::Late, 1);
        }
        if matches!(ending, Ending::Finish { finish: Finish::Degenerate, .. }) {
            self.gauges.count(traffic, Total::Degenerate, 1);
        }
    }

    /// What a grammar did to an answer.
    fn count_constrained(&self, traffic: Traffic, tally: &Tally, ending: &Ending) {
        let is_incomplete =
            matches!(ending, Ending::Finish { finish: Finish::SchemaIncomplete, .. });
        let is_fault = matches!(ending, Ending::Fault(SequenceFault::GrammarFault { .. }));
        let mask_us = usize::try_from(tally.mask_time.as_micros()).unwrap_or(usize::MAX);
        for (total, n) in [
            (Total::Constrained, 1),
            (Total::SchemaIncomplete, usize::from(is_incomplete)),
            (Total::GrammarFaults, usize::from(is_fault)),
            (Total::MaskedTokens, tally.n_masked),
            (Total::ForcedTokens, tally.n_forced),
            (Total::ClosingTokens, tally.n_closing),
            (Total::ArgmaxMasked, tally.n_argmax_masked),
            (Total::LowMass, usize::from(tally.is_mass_low)),
            (Total::MaskMicroseconds, mask_us),
        ] {
            self.gauges.count(traffic, total, n);
        }
    }

    fn fail_all(&mut self, fault: &SequenceFault) {
        for at in (0..self.running.len()).rev() {
            self.retire(at, Ending::Fault(fault.clone()));
        }
        while !self.suspended.is_empty() {
            self.end_suspended(0, Ending::Fault(fault.clone()));
        }
        for waiting in self.waiting.extract(|_| true) {
            self.end_waiting(waiting, Ending::Fault(fault.clone()));
        }
    }

    /// Sequences that were admitted and have not ended.
    fn n_admitted(&self) -> usize {
        self.running.len() + self.suspended.len()
    }

    fn publish(&self) {
        let cache = &self.cache;
        self.gauges.set_pages(cache.available(), cache.kept(), cache.quarantined());
        self.gauges.set_host(&cache.host());
        self.gauges.set_running(self.n_admitted());
    }
}

#[cfg(test)]
mod constrained_tests;
#[cfg(test)]
mod scheduling_tests;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use exrail_checkpoint::{Checkpoint, Gguf};
    use exrail_kernels::reference::Reference;
    use exrail_testkit::{TinyLlama, tiny_llama};

    use super::*;
    use crate::constraint::Constraint;
    use crate::event::Event;
    use crate::handle::resolve;
    use crate::load::{Identity, LoadOptions, prepare_generator};
    use crate::places::PlaceLimits;
    use crate::request::{GenerateRequest, Sampling};
    use crate::rotation::{Lengths, RotationOptions, RotationPlan};
    use crate::sequence::Job;

    /// A worker whose turns the test drives by hand.
    pub(super) struct Bench<B: Backend = Reference> {
        pub(super) worker: Worker<B>,
        pub(super) commands: flume::Sender<Command>,
        pub(super) gauges: Arc<Gauges>,
        n_submitted: u64,
        context: usize,
    }

    impl Bench {
        pub(super) fn new() -> Bench {
            Bench::with(EngineOptions {
                max_sequences: 4,
                kv_pages: Some(8),
                prefill_chunk: 16,
                ..EngineOptions::default()
            })
        }

        pub(super) fn with(options: EngineOptions) -> Bench {
            Bench::of_model(TinyLlama::default(), options)
        }

        pub(super) fn of_model(model: TinyLlama, options: EngineOptions) -> Bench {
            let checkpoint = Checkpoint::Gguf(Gguf::parse(tiny_llama(7, model)).unwrap());
            let who = Identity { name: "tiny".to_owned(), sha256: String::new() };
            let load = LoadOptions::default();
            let loaded = prepare_generator(Reference, &checkpoint, who, load, &mut |_| {}).unwrap();
            Bench::of(loaded, options)
        }

        /// A greedy request that runs to `max_tokens`.
        pub(super) fn request(n_prompt: u32, max_tokens: usize) -> GenerateRequest {
            let mut request = GenerateRequest::new((3..3 + n_prompt).collect(), max_tokens);
            request.sampling = Sampling::greedy();
            request.stop_at_eos = false;
            request
        }
    }

    impl<B: Backend> Bench<B> {
        pub(super) fn of(loaded: Loaded<B>, options: EngineOptions) -> Bench<B> {
            let facts = resolve(&loaded, options).unwrap();
            let gauges = Arc::new(Gauges::new(facts.kv_pages));
            let (commands, receiver) = flume::unbounded();
            let worker = Worker::new(loaded, &facts, receiver, Arc::clone(&gauges)).unwrap();
            Bench { worker, commands, gauges, n_submitted: 0, context: facts.context }
        }

        pub(super) fn submit(
            &mut self,
            n_prompt: u32,
            max_tokens: usize,
        ) -> flume::Receiver<Event> {
            self.send(Bench::request(n_prompt, max_tokens))
        }

        pub(super) fn send(&mut self, request: GenerateRequest) -> flume::Receiver<Event> {
            self.send_as(request, Traffic::User)
        }

        pub(super) fn send_as(
            &mut self,
            request: GenerateRequest,
            traffic: Traffic,
        ) -> flume::Receiver<Event> {
            let (sender, events) = flume::unbounded();
            let tenant = request.tenant.clone();
            self.gauges.enter_queue(tenant.as_deref(), PlaceLimits::NONE).unwrap();
            let lengths = Lengths {
                prompt: request.prompt.len(),
                max_tokens: request.max_tokens,
                has_bos: false,
                context: self.context,
                usual: RotationOptions::default(),
            };
            let rotation = RotationPlan::of(&request.rotation, lengths).unwrap();
            let constraint = Constraint::of(&request);
            let request = Box::new(request);
            let job = Job::Generate { request, constraint, rotation, events: sender };
            let id = SequenceId(self.n_submitted);
            self.n_submitted += 1;
            let submitted = Instant::now();
            let waiting = Waiting { id, traffic, blank: 0, submitted, job };
            self.commands.send(Command::Submit(waiting)).unwrap();
            events
        }

        /// # Panics
        /// There is nothing to do: a real engine would wait for a command, and a test would for ever.
        pub(super) fn turn(&mut self) {
            let worker = &self.worker;
            let is_idle = worker.n_admitted() == 0 && worker.waiting.is_empty();
            let is_still = is_idle && worker.flight.is_none() && worker.commands.is_empty();
            assert!(!is_still, "a turn of an idle bench");
            assert_eq!(self.worker.turn(), Turn::Next);
        }
    }

    fn last(events: &flume::Receiver<Event>) -> Event {
        events.drain().last().expect("an event")
    }

    #[test]
    fn cancel_frees_pages_within_one_turn() {
        let mut bench = Bench::new();
        let decoding = bench.submit(4, 500); // 503 positions: 2 pages
        let prefilling = bench.submit(200, 400); // 599 positions: 3 pages
        bench.turn();
        bench.turn();
        assert_eq!(bench.gauges.snapshot().pages_free, 3);
        bench.commands.send(Command::Cancel(SequenceId(1))).unwrap();
        bench.turn();
        assert_eq!(bench.gauges.snapshot().pages_free, 6);
        assert!(matches!(last(&prefilling), Event::Finished(_)));
        drop(decoding); // without a cancel: the closed channel is enough
        bench.submit(1, 1);
        bench.turn();
        assert_eq!(bench.gauges.snapshot().pages_free, 8);
    }

    #[test]
    fn a_decode_row_and_a_prompt_chunk_share_every_step() {
        let mut bench = Bench::new();
        let decoding = bench.submit(4, 100);
        bench.turn();
        assert_eq!(decoding.drain().count(), 2, "Started and the first token");
        let prompt = bench.submit(100, 5);
        for _ in 0..6 {
            bench.turn();
            assert_eq!(decoding.drain().count(), 1, "one token a step beside a long prompt");
        }
        assert_eq!(bench.worker.running[1].fed, 96);
        assert_eq!(prompt.len(), 1, "Started");
    }

    #[test]
    fn the_head_of_the_queue_is_never_passed() {
        let mut bench = Bench::new();
        let first = bench.submit(4, 1000); // 4 pages
        let wide = bench.submit(4, 1500); // 6 pages: must wait
        let narrow = bench.submit(4, 5); // 1 page: would fit, must not pass
        bench.turn();
        assert!(wide.is_empty() && narrow.is_empty());
        bench.commands.send(Command::Cancel(SequenceId(0))).unwrap();
        bench.turn();
        assert!(!wide.is_empty() && !narrow.is_empty());
        assert!(matches!(last(&first), Event::Finished(_)));
    }
}
