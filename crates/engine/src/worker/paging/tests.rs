//! Sharing, and one broken rule at a time: with the guards on it is caught and nobody else is touched;
//! with the guards off it reaches the user.

use exrail_kernels::{KvDtype, PageId};

use super::super::tests::Bench;
use super::*;
use crate::event::{Event, Finished, SequenceId};
use crate::faults::Fault;
use crate::handle::{Command, EngineOptions};
use crate::places::PlaceLimits;
use crate::request::{GenerateRequest, Sampling};
use crate::sequence::{Job, Scoring};

/// What a sequence said: its tokens, and its end if there was one.
#[derive(Debug, Default)]
struct Said {
    ids: Vec<u32>,
    cached: Option<usize>,
    end: Option<Result<Finished, SequenceFault>>,
}

impl Said {
    fn hear(&mut self, events: &flume::Receiver<Event>) {
        for event in events.drain() {
            match event {
                Event::Started { cached_tokens, .. } => {
                    assert_eq!(self.cached.replace(cached_tokens), None, "it starts once");
                }
                Event::Token(token) => self.ids.push(token.id),
                Event::Rotated(_) | Event::RolledBack { .. } | Event::Tail(_) => {}
                Event::Finished(finished) => self.end = Some(Ok(finished)),
                Event::Failed(fault) => self.end = Some(Err(fault)),
            }
        }
    }

    fn of(events: &flume::Receiver<Event>) -> Said {
        let mut said = Said::default();
        said.hear(events);
        said
    }

    fn fault(&self) -> &PageFault {
        match &self.end {
            Some(Err(SequenceFault::KvIntegrity(fault))) => fault,
            other => panic!("expected a broken page, found {other:?}"),
        }
    }

    /// The tokens of an answer that came to its end.
    fn whole(&self) -> &[u32] {
        assert!(matches!(&self.end, Some(Ok(_))), "{:?}", self.end);
        &self.ids
    }
}

fn options(kv_pages: usize) -> EngineOptions {
    EngineOptions {
        max_sequences: 4,
        kv_pages: Some(kv_pages),
        prefill_chunk: 64,
        kv_dtype: KvDtype::F32,
        step_target: None,
        ..EngineOptions::default()
    }
}

fn bench(kv_pages: usize, runs_ahead: bool) -> Bench {
    let mut bench = Bench::with(options(kv_pages));
    bench.worker.runs_ahead = runs_ahead;
    bench
}

/// Ordinary tokens, different for each `n`.
fn tokens(n: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| 3 + (n * 37 + i * 11 + i * i) % 250).collect()
}

/// `n_shared` tokens that all have, and `n_own` that only `n` has.
fn prompt(n_shared: u32, n: u32, n_own: u32) -> Vec<u32> {
    [tokens(0, n_shared), tokens(n, n_own)].concat()
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    let mut request = GenerateRequest::new(prompt, max_tokens);
    request.sampling = Sampling::greedy();
    request.stop_at_eos = false;
    request
}

/// The tokens of an engine that has seen nothing before and shares nothing.
fn cold(request: &GenerateRequest) -> Vec<u32> {
    let mut bench = Bench::with(EngineOptions { prefix_cache: false, ..options(8) });
    let events = bench.send(request.clone());
    bench.finish();
    let said = Said::of(&events);
    assert_eq!(said.cached, Some(0));
    said.whole().to_vec()
}

fn one(bench: &mut Bench, request: &GenerateRequest) -> Said {
    let events = bench.send(request.clone());
    bench.finish();
    Said::of(&events)
}

/// Turns until the sequence has said `n` tokens.
fn turn_until(bench: &mut Bench, said: &mut Said, events: &flume::Receiver<Event>, n: usize) {
    for _ in 0..200 {
        said.hear(events);
        if said.ids.len() >= n {
            return;
        }
        let can_go_on = !bench.is_idle() || !bench.commands.is_empty();
        assert!(can_go_on, "expected {n} tokens, found {said:?}");
        bench.turn();
    }
    panic!("expected {n} tokens, found {said:?}");
}

/// Everybody is gone: whatever is not in quarantine can be handed out.
fn assert_whole(bench: &mut Bench, quarantined: usize) {
    assert!(bench.is_idle());
    bench.worker.audit();
    let counters = bench.gauges.snapshot();
    assert_eq!(counters.pages_quarantined, quarantined, "{counters:?}");
    assert_eq!(counters.pages_free + quarantined, counters.pages_total, "{counters:?}");
}

/// C11 of the field faults: what a second request finds in the cache is its own prefix.
#[test]
fn a_warm_answer_is_the_cold_one() {
    for runs_ahead in [false, true] {
        let mut bench = bench(8, runs_ahead);
        // The page of the last token is computed always: 512 tokens use one page of the two.
        for (n_shared, n_own, n_cached) in
            [(600, 0, 0), (600, 0, 512), (512, 0, 256), (513, 0, 512), (300, 50, 256), (200, 99, 0)]
        {
            let request = greedy(prompt(n_shared, 9, n_own), 12);
            let said = one(&mut bench, &request);
            assert_eq!(said.whole(), cold(&request), "{n_shared} {n_own}");
            assert_eq!(said.cached, Some(n_cached), "{n_shared} {n_own}");
            let Some(Ok(finished)) = said.end else { unreachable!("checked above") };
            assert_eq!(finished.usage.cached_tokens, n_cached);
        }
        let counters = bench.gauges.snapshot();
        assert_eq!((counters.prefix_hits, counters.prefix_misses), (2 + 1 + 2 + 1, 2 + 1));
        assert_eq!(counters.tokens_prompt, 600 + 88 + 256 + 1 + 94 + 299);
        assert_whole(&mut bench, 0);
    }
}

#[test]
fn the_next_turn_of_a_chat_finds_the_answer_of_the_last() {
    let mut bench = bench(8, false);
    let first = greedy(tokens(1, 240), 30);
    let answer = one(&mut bench, &first);
    let next = greedy([first.prompt, answer.ids, tokens(2, 20)].concat(), 10);
    let said = one(&mut bench, &next);
    assert_eq!((said.cached, said.whole()), (Some(256), &cold(&next)[..]));
}

#[test]
fn running_sequences_share_pages_that_are_counted_once() {
    let mut bench = bench(8, true);
    let requests: Vec<_> = (1..4).map(|n| greedy(prompt(520, n, 20), 40)).collect();
    let first = bench.send(requests[0].clone());
    let mut heard = Said::default();
    turn_until(&mut bench, &mut heard, &first, 2);
    let others: Vec<_> = requests[1..].iter().map(|r| bench.send(r.clone())).collect();
    bench.turn();
    // 3 pages each, of which 2 are the same.
    assert_eq!(bench.gauges.snapshot().pages_free, 8 - 2 - 3);
    bench.finish();
    heard.hear(&first);
    assert_eq!(heard.whole(), cold(&requests[0]));
    for (events, request) in others.iter().zip(&requests[1..]) {
        let said = Said::of(events);
        assert_eq!((said.cached, said.whole()), (Some(512), &cold(request)[..]));
    }
    assert_whole(&mut bench, 0);
}

#[test]
fn the_oldest_prefix_goes_first_and_its_end_before_its_beginning() {
    let mut bench = bench(4, false);
    let [a, b] = [1, 2].map(|n| greedy(tokens(n, 513), 2)); // 3 pages, 2 of them whole
    one(&mut bench, &a);
    assert_eq!(bench.gauges.snapshot().pages_cached, 2);
    one(&mut bench, &b); // 2 are free, so that one of `a` goes
    let counters = bench.gauges.snapshot();
    assert_eq!((counters.prefix_evictions, counters.pages_cached), (1, 3));
    assert_eq!(one(&mut bench, &a).cached, Some(256));
    assert_eq!(one(&mut bench, &b).cached, Some(256));
    assert_whole(&mut bench, 0);
}

#[test]
fn warm_up_and_scores_leave_nothing_and_read_nothing() {
    let mut bench = bench(8, false);
    let request = greedy(tokens(1, 300), 4);
    let events = bench.send_as(request.clone(), Traffic::WarmUp);
    bench.finish();
    let (rows, received) = flume::unbounded();
    let job = Job::Score { ids: request.prompt.clone(), scoring: Scoring::Chunks, rows };
    let submitted = std::time::Instant::now();
    bench.gauges.enter_queue(None, PlaceLimits::NONE).unwrap();
    let id = SequenceId(99);
    let score = Waiting { id, traffic: Traffic::User, blank: 0, submitted, job };
    bench.commands.send(Command::Submit(score)).unwrap();
    bench.finish();
    assert_eq!(received.drain().count(), 300);
    let counters = bench.gauges.snapshot();
    assert_eq!((counters.pages_cached, counters.prefix_misses), (0, 0));
    assert_eq!(one(&mut bench, &request).cached, Some(0));
    // Nor is it read: the next run of a warm-up computes what the first did.
    let again = bench.send_as(request, Traffic::WarmUp);
    bench.finish();
    assert_eq!(Said::of(&again).cached, Some(0));
    assert_eq!(Said::of(&events).ids.len(), 4);
}

#[test]
fn without_the_cache_nothing_is_kept() {
    let mut bench = Bench::with(EngineOptions { prefix_cache: false, ..options(8) });
    let request = greedy(tokens(1, 300), 4);
    for _ in 0..2 {
        assert_eq!(one(&mut bench, &request).cached, Some(0));
    }
    let counters = bench.gauges.snapshot();
    assert_eq!((counters.pages_cached, counters.prefix_hits, counters.prefix_misses), (0, 0, 0));
}

/// C17 of the field faults: nobody learns of another tenant's prompt by a hit.
#[test]
fn tenants_share_nothing_and_without_that_rule_they_would() {
    let run = |faults: &[Fault]| {
        let mut bench = bench(8, false);
        bench.worker.cache.inject(faults);
        let tenants = [None, Some("a"), Some("b"), Some("a")];
        tenants.map(|tenant| {
            let mut request = greedy(tokens(1, 300), 4);
            request.tenant = tenant.map(str::to_owned);
            one(&mut bench, &request).cached.unwrap()
        })
    };
    assert_eq!(run(&[]), [0, 0, 0, 256]);
    assert_eq!(run(&[Fault::OneTenant]), [0, 256, 256, 256]);
}

#[test]
fn other_pins_share_nothing() {
    let mut bench = bench(8, false);
    let request = greedy(tokens(1, 300), 4);
    one(&mut bench, &request);
    Arc::make_mut(&mut bench.worker.pins).model_sha256 = Some("another".to_owned());
    assert_eq!(one(&mut bench, &request).cached, Some(0));
    assert_eq!(one(&mut bench, &request).cached, Some(256));
}

#[test]
fn equal_hashes_share_nothing_and_without_the_comparison_they_would() {
    let run = |faults: &[Fault]| {
        let mut bench = bench(8, false);
        bench.worker.cache.inject(faults);
        let requests = [1, 2].map(|n| greedy(tokens(n, 300), 12));
        one(&mut bench, &requests[0]);
        (one(&mut bench, &requests[1]).ids, cold(&requests[1]))
    };
    let (warm, expected) = run(&[Fault::OneHash]);
    assert_eq!(warm, expected);
    let (warm, expected) = run(&[Fault::OneHash, Fault::TrustHash]);
    assert_ne!(warm, expected);
}

#[test]
fn what_a_failed_sequence_has_left_is_found_by_nobody() {
    let mut bench = bench(8, false);
    let request = greedy(tokens(1, 300), 20);
    let events = bench.send(request.clone());
    turn_until(&mut bench, &mut Said::default(), &events, 1);
    bench.worker.retire(0, Ending::Fault(SequenceFault::NumericFault { step: 1 }));
    assert_eq!(bench.gauges.snapshot().pages_cached, 0);
    assert_eq!(one(&mut bench, &request).cached, Some(0));
}

// Faults. In each, `a` runs when the fault happens, and the others come after it.

/// A prompt of one whole page and more, with an answer that ends in the second page.
fn long(n_shared: u32, n: u32) -> GenerateRequest {
    greedy(prompt(n_shared, n, 300 - n_shared), 150)
}

/// A bench where `a` has said three tokens.
fn with_a(guards: bool, runs_ahead: bool) -> (Bench, Said, flume::Receiver<Event>) {
    let mut bench = bench(4, runs_ahead);
    bench.worker.options.guards = guards;
    if !guards {
        // Beside what an option turns off, what has no option.
        bench.worker.cache.switch_guards_off();
    }
    let events = bench.send(long(280, 1));
    let mut said = Said::default();
    turn_until(&mut bench, &mut said, &events, 3);
    (bench, said, events)
}

/// Other keys and values in a page that its books know nothing of.
fn change_bytes(bench: &mut Bench, page: PageId) {
    let worker = &mut bench.worker;
    let mut device = PoolPages { backend: &worker.loaded.backend, pool: &mut worker.pool };
    let mut bytes = vec![0; device.page_bytes()];
    device.read(page, &mut bytes);
    // The signs, so that whoever reads it says something else.
    bytes.iter_mut().for_each(|byte| *byte ^= 0x80);
    device.write(page, &bytes);
}

#[test]
fn a_page_whose_bytes_changed_is_withdrawn_before_its_next_reader() {
    let run = |guards: bool| {
        let (mut bench, _, events) = with_a(guards, false);
        let page = bench.worker.running[0].pages[0].page;
        bench.finish();
        drop(events);
        change_bytes(&mut bench, page);
        one(&mut bench, &greedy(tokens(7, 20), 4));
        let said = one(&mut bench, &long(280, 1));
        let quarantined = bench.gauges.snapshot().pages_quarantined;
        (said.cached, said.whole() == cold(&long(280, 1)), quarantined)
    };
    assert_eq!(run(true), (Some(0), true, 1));
    assert_eq!(run(false), (Some(256), false, 0), "its reader says what nobody computed");
}

#[test]
fn a_reader_of_changed_bytes_fails_by_name_and_others_go_on() {
    for runs_ahead in [false, true] {
        let (mut bench, mut said, events) = with_a(true, runs_ahead);
        let other = greedy(tokens(7, 20), 30);
        let others = bench.send(other.clone());
        bench.turn();
        let page = bench.worker.running[0].pages[0].page;
        change_bytes(&mut bench, page);
        bench.finish();
        said.hear(&events);
        assert_eq!(said.fault(), &PageFault::Bytes { page: page.0 });
        assert_eq!(Said::of(&others).whole(), cold(&other));
        assert_whole(&mut bench, 1);
    }
}

#[test]
fn each_audit_looks_at_the_next_page_that_can_be_found() {
    let mut bench = bench(8, false);
    let events = bench.send(greedy(tokens(1, 1030), 200));
    let mut said = Said::default();
    turn_until(&mut bench, &mut said, &events, 10);
    // Any of the four, within a round of audits.
    let page = bench.worker.running[0].pages[3].page;
    change_bytes(&mut bench, page);
    for _ in 0..4 {
        if !bench.is_idle() {
            bench.turn();
        }
    }
    said.hear(&events);
    assert_eq!(said.fault(), &PageFault::Bytes { page: page.0 });
}

/// A fault that leaves the page of two sequences with one reference: `a` goes, a third one gets the page,
/// and what the second says is returned beside what it would say alone.
fn orphaned_reader(fault: impl Fn(&mut Bench, &GenerateRequest) -> flume::Receiver<Event>) {
    let (mut bench, _, a) = with_a(false, false);
    let b = long(280, 2);
    let events = fault(&mut bench, &b);
    let mut said = Said::default();
    turn_until(&mut bench, &mut said, &events, 2);
    bench.commands.send(Command::Cancel(SequenceId(0))).unwrap();
    let other = bench.send(greedy(tokens(5, 300), 300)); // 3 pages of the 4: the shared one, too
    bench.finish();
    said.hear(&events);
    assert_ne!(said.ids, cold(&b), "overwritten under its reader");
    drop((a, other));
}

fn submit_uncounted(bench: &mut Bench, request: &GenerateRequest) -> flume::Receiver<Event> {
    bench.worker.cache.inject(&[Fault::SkipReference]);
    let events = bench.send(request.clone());
    bench.turn();
    bench.worker.cache.inject(&[]);
    events
}

#[test]
fn a_skipped_reference_is_caught() {
    for runs_ahead in [false, true] {
        let (mut bench, mut a, a_events) = with_a(true, runs_ahead);
        let b_events = submit_uncounted(&mut bench, &long(280, 2));
        let b = Said::of(&b_events);
        assert!(matches!(b.fault(), PageFault::References { expected: 2, found: 1, .. }));
        assert_eq!(b.ids, [0; 0], "no token came of it");
        bench.finish();
        a.hear(&a_events);
        assert_eq!(a.whole(), cold(&long(280, 1)), "computed anew, and the same");
        assert_eq!(one(&mut bench, &long(280, 2)).whole(), cold(&long(280, 2)));
        let counters = bench.gauges.snapshot();
        assert_eq!((counters.kv_faults, counters.kv_restarts, counters.failed), (1, 1, 1));
        assert_whole(&mut bench, 1);
    }
    orphaned_reader(submit_uncounted);
}

fn submit_and_flip(bench: &mut Bench, request: &GenerateRequest) -> flume::Receiver<Event> {
    let events = bench.send(request.clone());
    bench.turn();
    let page = bench.worker.running[0].page_table[0];
    bench.worker.cache.flip_references(page, 0b11); // 2 becomes 1
    events
}

#[test]
fn a_flipped_bit_of_the_books_is_caught() {
    for runs_ahead in [false, true] {
        let (mut bench, mut a, a_events) = with_a(true, runs_ahead);
        let b_events = submit_and_flip(&mut bench, &long(280, 2));
        bench.finish();
        let b = Said::of(&b_events);
        assert!(matches!(b.fault(), PageFault::Seal { .. }));
        assert!(cold(&long(280, 2)).starts_with(&b.ids), "what it said was right");
        a.hear(&a_events);
        assert_eq!(a.whole(), cold(&long(280, 1)));
        let counters = bench.gauges.snapshot();
        assert_eq!((counters.kv_faults, counters.kv_restarts, counters.failed), (1, 1, 1));
        assert_whole(&mut bench, 1);
    }
    orphaned_reader(submit_and_flip);
}

/// What `a` and `c` say when `c` is given a page of `a`.
fn reused_early(faults: &[Fault], guards: bool, runs_ahead: bool) -> (Bench, Said, Said) {
    let (mut bench, mut a, a_events) = with_a(guards, runs_ahead);
    bench.worker.cache.inject(faults);
    let c_events = bench.send(long(0, 2));
    bench.turn();
    bench.worker.cache.inject(&[]);
    bench.finish();
    a.hear(&a_events);
    (bench, a, Said::of(&c_events))
}

#[test]
fn a_page_that_is_reused_early_is_caught() {
    for runs_ahead in [false, true] {
        let (mut bench, a, c) = reused_early(&[Fault::ReuseEarly], true, runs_ahead);
        assert!(matches!(a.fault(), PageFault::Generation { .. }));
        assert!(cold(&long(280, 1)).starts_with(&a.ids), "what it said was right");
        assert_eq!(c.whole(), cold(&long(0, 2)), "computed anew on another page");
        let counters = bench.gauges.snapshot();
        assert_eq!((counters.kv_faults, counters.kv_restarts, counters.failed), (1, 1, 1));
        assert_whole(&mut bench, 1);
    }
    let (_, a, _) = reused_early(&[Fault::ReuseEarly], false, false);
    assert_ne!(a.ids, cold(&long(280, 1)));
}

#[test]
fn a_page_that_is_reused_early_under_its_old_generation_is_caught() {
    let faults = [Fault::ReuseEarly, Fault::KeepGeneration];
    for runs_ahead in [false, true] {
        let (mut bench, a, c) = reused_early(&faults, true, runs_ahead);
        assert!(matches!(c.fault(), PageFault::References { .. }), "{c:?}");
        assert_eq!(a.whole(), cold(&long(280, 1)));
        assert_eq!(bench.gauges.snapshot().kv_restarts, 1);
        assert_whole(&mut bench, 1);
    }
    let (_, a, _) = reused_early(&faults, false, false);
    assert_ne!(a.ids, cold(&long(280, 1)));
}

/// What `a` and `b` say when a page of `a` can be found before all of it is written.
fn shared_early(guards: bool) -> (Bench, Said, Said) {
    let mut bench = bench(4, false);
    bench.worker.options.guards = guards;
    let a_events = bench.send(long(280, 1));
    bench.turn(); // 64 positions
    let a = &bench.worker.running[0];
    let namespace = a.namespace.clone().unwrap();
    bench.worker.cache.share(&namespace, &a.tokens, &a.pages, 1);
    let b_events = bench.send(long(280, 2));
    bench.turn();
    if !guards {
        // Or else `a` would have written all of it before `b` has its first row.
        bench.commands.send(Command::Cancel(SequenceId(0))).unwrap();
    }
    bench.finish();
    (bench, Said::of(&a_events), Said::of(&b_events))
}

#[test]
fn a_page_that_is_shared_before_it_is_whole_is_caught() {
    let (mut bench, a, b) = shared_early(true);
    assert!(matches!(b.fault(), PageFault::Alias { .. }), "{b:?}");
    assert_eq!(a.whole(), cold(&long(280, 1)));
    assert_whole(&mut bench, 1);
    let (_, _, b) = shared_early(false);
    assert_ne!(b.ids, cold(&long(280, 2)));
}

#[test]
fn a_lost_generation_is_found_by_the_audit_and_nobody_fails() {
    let (mut bench, mut a, a_events) = with_a(true, true);
    bench.worker.cache.inject(&[Fault::KeepGeneration]);
    let other = bench.send(greedy(tokens(2, 5), 2)); // its page comes back with its old generation
    while Said::of(&other).end.is_none() {
        bench.turn();
    }
    bench.worker.cache.inject(&[]);
    bench.finish();
    a.hear(&a_events);
    assert_eq!(a.whole(), cold(&long(280, 1)));
    let counters = bench.gauges.snapshot();
    assert!(counters.kv_faults > 0 && counters.kv_restarts > 0, "{counters:?}");
    assert_eq!(counters.failed, 0);
    assert_whole(&mut bench, 0);
}

/// What `a` and `c` say when the pool gives `c` no pages although it has some.
fn without_pages(guards: bool) -> (Bench, Said, Said) {
    let (mut bench, mut a, a_events) = with_a(guards, false);
    bench.worker.cache.inject(&[Fault::FailAllocation]);
    let c_events = bench.send(long(280, 2));
    bench.turn();
    bench.worker.cache.inject(&[]);
    bench.finish();
    a.hear(&a_events);
    (bench, a, Said::of(&c_events))
}

#[test]
fn an_allocation_that_fails_is_told_of_and_nobody_fails() {
    let (mut bench, a, c) = without_pages(true);
    assert_eq!(a.whole(), cold(&long(280, 1)));
    assert_eq!(c.whole(), cold(&long(280, 2)));
    let counters = bench.gauges.snapshot();
    assert!(counters.kv_faults > 0, "{counters:?}");
    assert_eq!((counters.failed, counters.panics), (0, 0));
    assert_whole(&mut bench, 0);
    // The mutation: a table without its pages is a panic, and an answer that nobody gets.
    let (bench, _, c) = without_pages(false);
    assert!(!matches!(c.end, Some(Ok(_))), "{c:?}");
    assert!(bench.gauges.snapshot().panics > 0);
}

#[test]
fn a_lost_page_is_found_by_the_audit_and_nobody_fails() {
    let (mut bench, mut a, a_events) = with_a(true, false);
    bench.worker.cache.lose_a_page();
    bench.finish();
    a.hear(&a_events);
    assert_eq!(a.whole(), cold(&long(280, 1)));
    assert_eq!(bench.gauges.snapshot().kv_faults, 1);
    assert_whole(&mut bench, 0);
}

#[test]
fn a_queue_behind_lost_pages_does_not_hang() {
    let mut bench = bench(4, false);
    bench.worker.cache.lose_a_page();
    let request = greedy(tokens(1, 800), 100); // all of the pages
    let said = one(&mut bench, &request);
    assert_eq!(said.whole().len(), 100, "admitted after the books started anew");
}

#[test]
fn a_flipped_token_of_a_cached_page_is_found_before_it_is_read() {
    let mut bench = bench(4, false);
    one(&mut bench, &long(280, 1));
    let page = (0..4).map(PageId).find(|&page| bench.worker.cache.is_kept(page)).unwrap();
    bench.worker.cache.flip_token(page);
    // Found by the audit behind the first step of whoever comes next.
    let said = one(&mut bench, &long(280, 2));
    assert_eq!(said.whole(), cold(&long(280, 2)));
    assert_eq!((said.cached, bench.gauges.snapshot().kv_faults), (Some(0), 1));
    assert_whole(&mut bench, 1);
}

#[test]
fn a_sequence_that_no_longer_fits_is_told_so() {
    let mut bench = bench(4, false);
    let wide = greedy(tokens(1, 4), 1000);
    bench.worker.cache.quarantine(PageId(2));
    let said = one(&mut bench, &wide);
    assert_eq!(*said.fault(), PageFault::TooFew { needed: 4, usable: 3 });
    assert_eq!(one(&mut bench, &long(280, 1)).whole(), cold(&long(280, 1)));
    assert_whole(&mut bench, 1);
}

#[test]
fn a_fault_that_comes_back_each_time_ends_the_sequence() {
    let (mut bench, mut a, a_events) = with_a(true, true);
    for _ in 0..10 {
        bench.worker.cache.lose_a_page();
        for _ in 0..8 {
            if !bench.is_idle() {
                bench.turn();
            }
        }
    }
    a.hear(&a_events);
    assert!(matches!(a.fault(), PageFault::Conservation { .. }));
    assert_eq!(bench.gauges.snapshot().kv_restarts, 3);
    bench.finish();
    assert_whole(&mut bench, 0);
}

#[test]
fn a_suspended_sequence_can_be_cancelled_and_abandoned() {
    let (mut bench, mut a, a_events) = with_a(true, true);
    let b_events = bench.send(long(280, 2));
    bench.turn();
    bench.worker.start_anew(&PageFault::NotHeld { page: 0 });
    assert_eq!((bench.worker.suspended.len(), bench.gauges.snapshot().sequences_running), (2, 2));
    bench.commands.send(Command::Cancel(SequenceId(0))).unwrap();
    drop(b_events);
    bench.turn();
    a.hear(&a_events);
    assert_eq!(a.whole().len(), a.ids.len());
    bench.finish();
    assert_eq!(bench.gauges.snapshot().cancelled, 2);
    assert_whole(&mut bench, 0);
}

/// A pool of three pages, and room for what leaves it.
fn two_tiers() -> Bench {
    Bench::with(EngineOptions { kv_host_bytes: 8 << 20, ..options(3) })
}

/// Asks once, lets another prompt take the room, and does something to what has left.
fn asked_and_left(request: &GenerateRequest, then: impl FnOnce(&mut Bench)) -> Bench {
    let mut bench = two_tiers();
    one(&mut bench, request);
    one(&mut bench, &greedy(tokens(5, 600), 12));
    let host = bench.worker.cache.host();
    assert_eq!((host.pages, host.stored), (2, 2), "{host:?}");
    then(&mut bench);
    bench
}

#[test]
fn a_page_that_made_room_comes_back_from_the_host() {
    let request = greedy(prompt(600, 9, 0), 12);
    let mut bench = asked_and_left(&request, |_| {});
    let said = one(&mut bench, &request);
    assert_eq!((said.cached, said.whole()), (Some(512), &cold(&request)[..]));
    let host = bench.gauges.snapshot().host;
    assert_eq!((host.returned, host.stored, host.pages, host.corrupt), (2, 4, 2, 0));
    assert_whole(&mut bench, 0);
}

#[test]
fn a_tenant_gets_nothing_back_that_another_one_left() {
    let mut request = greedy(prompt(600, 9, 0), 12);
    let mut bench = asked_and_left(&request, |_| {});
    request.tenant = Some("other".to_owned());
    assert_eq!(one(&mut bench, &request).cached, Some(0));
    assert_eq!(bench.worker.cache.host().returned, 0);
}

#[test]
fn a_bit_that_flips_in_the_host_is_found_and_the_prefix_is_computed() {
    let request = greedy(prompt(600, 9, 0), 12);
    let mut bench = asked_and_left(&request, |bench| bench.worker.cache.flip_host_bits());
    let said = one(&mut bench, &request);
    assert_eq!((said.cached, said.whole()), (Some(0), &cold(&request)[..]));
    assert_eq!(bench.gauges.snapshot().host.corrupt, 1);
    assert_whole(&mut bench, 0);
}

#[test]
fn mutation_without_the_checksum_flipped_bits_reach_the_user() {
    let request = greedy(prompt(600, 9, 0), 12);
    let mut bench = asked_and_left(&request, |bench| {
        bench.worker.cache.flip_host_bits();
        bench.worker.cache.switch_guards_off();
    });
    let said = one(&mut bench, &request);
    assert_eq!(said.cached, Some(512));
    let wrong = !matches!(said.end, Some(Ok(_))) || said.ids != cold(&request);
    assert!(wrong, "the fault reaches the user");
}

#[test]
fn what_left_while_the_books_were_wrong_does_not_come_back() {
    let request = greedy(prompt(600, 9, 0), 12);
    for reset in [false, true] {
        let mut bench = asked_and_left(&request, |bench| match reset {
            true => bench.worker.cache.reset(),
            false => bench.worker.cache.quarantine(PageId(2)),
        });
        assert_eq!(bench.worker.cache.host().pages, 0);
        bench.worker.cache.reset();
        let short = greedy(prompt(300, 9, 0), 12);
        let said = one(&mut bench, &short);
        assert_eq!((said.cached, said.whole()), (Some(0), &cold(&short)[..]));
    }
}

#[test]
fn a_host_tier_that_holds_nothing_is_refused() {
    let gguf = exrail_checkpoint::Gguf::parse(exrail_testkit::tiny_llama(
        7,
        exrail_testkit::TinyLlama::default(),
    ));
    let checkpoint = exrail_checkpoint::Checkpoint::Gguf(gguf.unwrap());
    let load = || {
        let who = crate::load::Identity { name: "tiny".to_owned(), sha256: String::new() };
        let load = crate::load::LoadOptions::default();
        let reference = exrail_kernels::reference::Reference;
        crate::load::prepare_generator(reference, &checkpoint, who, load, &mut |_| {}).unwrap()
    };
    for (prefix_cache, expected) in
        [(true, "0, or one page of"), (false, "0 without a prefix cache")]
    {
        let with = EngineOptions { kv_host_bytes: 100, prefix_cache, ..options(3) };
        let error = crate::handle::Engine::start(load(), with).unwrap_err().to_string();
        assert!(error.contains("kv_host_bytes") && error.contains(expected), "{error}");
    }
}
