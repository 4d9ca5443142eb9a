//! Rotation in place: what moves, who may read it, and one broken rule at a time.
//!
//! Keys and values of a model of one layer depend on their token and position alone, so that there, and only
//! there, both policies give the same answer; the tests of moving and turning compare the two. Tests of who
//! may read what is kept need the second layer, where it encodes what was dropped.

use exrail_kernels::reference::Reference;
use exrail_kernels::{KvMove, PAGE_TOKENS};
use exrail_testkit::TinyLlama;

use super::super::tests::Bench;
use super::tests::{Said, bench, bench_of, request, rotation, run};
use crate::event::{Event, Finish};
use crate::request::GenerateRequest;
use crate::rotation::{RotatePolicy, Rotated, Rotation, RotationOptions};

fn one_layer(runs_ahead: bool) -> Bench {
    bench_of(TinyLlama { n_layers: 1, ..TinyLlama::default() }, 16, runs_ahead)
}

/// With four sinks.
fn in_place(rotate_at: usize, window: usize) -> Rotation {
    let policy = RotatePolicy::SinkWindow;
    let (rotate_at, window) = (Some(rotate_at), Some(window));
    let options = RotationOptions { policy, rotate_at, window, sink: None };
    Rotation { options, ..Rotation::default() }
}

/// The same by the other policy, which pins the sinks.
fn anew(request: &GenerateRequest) -> GenerateRequest {
    let mut request = request.clone();
    request.rotation.options.policy = RotatePolicy::Reprefill;
    request.rotation.pinned.push(0..4);
    request
}

/// Without what says how it was done.
fn outcome(mut said: Said) -> (Vec<u32>, Vec<(usize, Rotated)>) {
    said.rotations.iter_mut().for_each(|(_, one)| one.policy = RotatePolicy::Off);
    (said.ids, said.rotations)
}

#[test]
fn c7_one_layer_rotated_in_place_says_what_it_says_computed_anew() {
    for runs_ahead in [false, true] {
        // Within a page, over the edges of pages, and with a range in the middle that is pinned.
        for (n_prompt, rotate_at, window, pinned) in
            [(40, 80, 20, None), (90, 600, 300, None), (300, 700, 260, Some(37..290))]
        {
            let max_tokens = rotate_at - n_prompt as usize + 400;
            let mut asked = request(n_prompt, max_tokens, in_place(rotate_at, window));
            asked.rotation.pinned.extend(pinned);
            // What is no part of the cache goes on over what was dropped.
            asked.sampling.repetition_penalty = 1.5;
            let mut bench = one_layer(runs_ahead);
            let other = bench.send(request(33, 500, Rotation::default()));
            let moved = run(&mut bench, &asked);
            assert_eq!(moved.finish(), Some(Finish::Length));
            assert!(moved.rotations.len() >= 2, "{}", moved.rotations.len());
            let first = &moved.rotations[0].1;
            assert_eq!(first.policy, RotatePolicy::SinkWindow);
            assert_eq!((first.tokens_before, first.kept[0].start), (rotate_at, 0));
            let fresh = run(&mut one_layer(false), &anew(&asked));
            assert_eq!(outcome(moved), outcome(fresh), "{rotate_at}");
            let free = run(&mut one_layer(false), &request(33, 500, Rotation::default()));
            assert_eq!(Said::of(&other).ids, free.ids, "nobody else is moved");
            let counters = bench.gauges.snapshot();
            assert_eq!((counters.kv_faults, counters.kv_restarts, counters.panics), (0, 0, 0));
            assert_eq!(counters.pages_free, counters.pages_total);
        }
    }
}

/// Its first rotation is done by hand: the moves as `change` has them.
fn moved_by_hand(change: impl Fn(KvMove) -> KvMove) -> Vec<u32> {
    let mut bench = one_layer(false);
    let events = bench.send(request(40, 80, in_place(80, 20)));
    while bench.worker.running.is_empty() || bench.worker.running[0].feeds_its_next_token() {
        bench.turn();
    }
    bench.worker.step();
    let moves: Vec<KvMove> =
        bench.worker.running[0].rotate_in_place().into_iter().map(change).collect();
    let super::super::Loaded { decoder, .. } = &bench.worker.loaded;
    decoder.move_cached(&Reference, &mut bench.worker.pool, &moves);
    bench.finish();
    Said::of(&events).ids
}

#[test]
fn without_the_turn_or_the_move_keys_of_other_positions_would_reach_the_user() {
    let right = run(&mut one_layer(false), &anew(&request(40, 80, in_place(80, 20)))).ids;
    assert_eq!(moved_by_hand(|one| one), right);
    let unturned = moved_by_hand(|one| KvMove { distance: 0, ..one });
    let unmoved = moved_by_hand(|one| KvMove { to: one.from, distance: 0, ..one });
    for wrong in [unturned, unmoved] {
        assert_eq!(wrong[..40], right[..40]);
        assert_ne!(wrong[40..], right[40..], "the client sees it");
    }
}

/// The tokens of a whole page and some more that an answer goes on with behind its rotation, and what `read`
/// leaves of the next request with these very tokens: its answer and the tokens that it found in the cache.
fn behind_a_rotation(change: impl FnOnce(&mut Bench)) -> (Vec<u32>, usize) {
    let mut bench = bench(16, false);
    let events = bench.send(request(300, 500, in_place(600, 290)));
    let mut said = Said::default();
    while said.rotations.is_empty() {
        bench.turn();
        said = Said::of(&events);
    }
    let context = bench.worker.running[0].tokens.clone();
    assert!(context.len() > PAGE_TOKENS);
    change(&mut bench);
    bench.finish();
    let mut next = GenerateRequest::new(context, 40);
    next.sampling = request(1, 1, Rotation::default()).sampling;
    next.stop_at_eos = false;
    let events = bench.send(next);
    bench.finish();
    let said = Said::of(&events);
    let usage = said.end.as_ref().unwrap().usage;
    (said.ids, usage.cached_tokens)
}

/// The oracle is not applicable to such pages: no prefill of their tokens gives what they hold.
#[test]
fn what_was_rotated_in_place_is_read_by_nobody_else() {
    let (right, n_cached) = behind_a_rotation(|_| {});
    assert_eq!(n_cached, 0);
    // Mutation: its pages are made known, and the next one reads keys that encode what it never said.
    let (wrong, n_cached) = behind_a_rotation(|bench| {
        let namespace = crate::cache::Namespace {
            pins: std::sync::Arc::clone(&bench.worker.pins),
            tenant: None,
        };
        bench.worker.running[0].namespace = Some(namespace);
    });
    assert_eq!(n_cached, PAGE_TOKENS);
    assert_ne!(wrong, right, "another request sees it");
}

#[test]
fn before_its_rotation_it_reads_the_cache_and_leaves_its_pages_there() {
    let plain = request(600, 20, Rotation::default());
    let mut asked = request(600, 200, in_place(900, 300));
    let cold = run(&mut bench(16, false), &asked);
    let mut bench = bench(16, false);
    run(&mut bench, &plain);
    let warm = run(&mut bench, &asked);
    assert_eq!((&warm.ids, warm.rotations.len()), (&cold.ids, 0));
    assert_eq!(warm.end.unwrap().usage.cached_tokens, 2 * PAGE_TOKENS);
    // It ended unrotated: who goes on from its answer finds a page more than the prompt has.
    asked.prompt.extend(&warm.ids);
    let next = run(&mut bench, &asked);
    assert_eq!(next.end.unwrap().usage.cached_tokens, 3 * PAGE_TOKENS);
    assert_eq!(next.ids, run(&mut self::bench(16, false), &asked).ids);
    let counters = bench.gauges.snapshot();
    assert_eq!((counters.kv_faults, counters.pages_free), (0, 16));
}

/// A pool that holds the prefix or its copy, not both.
#[test]
fn where_there_is_no_room_for_a_copy_the_prefix_is_computed() {
    let mut bench = bench(4, false);
    run(&mut bench, &request(600, 20, Rotation::default()));
    let asked = request(600, 600, in_place(1000, 300));
    let said = run(&mut bench, &asked);
    assert_eq!((said.finish(), said.rotations.len()), (Some(Finish::Length), 1));
    assert_eq!(said.end.unwrap().usage.cached_tokens, 0);
    assert_eq!(said.ids, run(&mut self::bench(16, false), &asked).ids);
    assert_eq!(bench.gauges.snapshot().pages_free, 4);
}

/// Two answers with one prefix, of which the second rotates while the first still reads it; `change` comes
/// when both run.
fn beside_a_reader(change: impl FnOnce(&mut Bench)) -> (Said, Bench) {
    let mut bench = bench(16, false);
    let reader = bench.send(request(600, 300, Rotation::default()));
    while bench.worker.running.is_empty() || bench.worker.running[0].n_completion() < 3 {
        bench.turn();
    }
    let writer = bench.send(request(600, 300, in_place(700, 300)));
    while bench.worker.running.len() < 2 {
        bench.turn();
    }
    change(&mut bench);
    bench.finish();
    assert_eq!(Said::of(&writer).rotations.len(), 1);
    (Said::of(&reader), bench)
}

/// The writer's first page is the reader's own.
fn alias(bench: &mut Bench) {
    let [reader, writer] = &mut bench.worker.running[..] else { panic!("two run") };
    writer.pages[0] = reader.pages[0];
    writer.page_table[0] = reader.page_table[0];
}

#[test]
fn a_page_that_others_read_is_never_written() {
    let right = run(&mut bench(16, false), &request(600, 300, Rotation::default())).ids;
    let (reader, bench) = beside_a_reader(|_| {});
    assert_eq!(reader.ids, right);
    assert_eq!(bench.gauges.snapshot().kv_faults, 0);
    // Mutation: without copies and without the check of the tables, the reader's answer changes.
    let (reader, _) = beside_a_reader(|bench| {
        bench.worker.cache.switch_guards_off();
        alias(bench);
    });
    assert_eq!(reader.ids.len(), 300);
    assert_ne!(reader.ids, right, "the reader sees it");
}

#[test]
fn a_page_that_turns_out_to_be_shared_is_withdrawn_before_it_is_written() {
    let right = run(&mut bench(16, false), &request(600, 300, Rotation::default())).ids;
    let mut bench = bench(16, false);
    let reader = bench.send(request(600, 300, Rotation::default()));
    let writer = bench.send(request(600, 300, in_place(700, 300)));
    while bench.worker.running.len() < 2 || bench.worker.running[1].feeds_its_next_token() {
        bench.turn();
    }
    bench.worker.step();
    alias(&mut bench);
    let broken = bench.worker.cache.check_owned(&bench.worker.running[1].pages);
    assert!(broken.is_err(), "{broken:?}");
    bench.worker.rotate_due();
    assert!(bench.gauges.snapshot().kv_faults > 0);
    bench.finish();
    let reader: Vec<Event> = reader.drain().collect();
    let ids = reader.iter().filter_map(|event| match event {
        Event::Token(token) => Some(token.id),
        Event::Started { .. }
        | Event::Rotated(_)
        | Event::RolledBack { .. }
        | Event::Tail(_)
        | Event::Finished(_)
        | Event::Failed(_) => None,
    });
    let ids: Vec<u32> = ids.collect();
    assert_eq!(ids, right[..ids.len()], "no token of a page that was written over");
    drop(writer);
}

/// One that waits for an object to close, as by the other policy.
#[test]
fn an_open_object_is_not_cut_in_place_either() {
    let mut bench = bench(8, false);
    let mut asked = request(30, 300, in_place(70, 20));
    asked.rotation.waits_for_json = true;
    // Nothing but one letter, which neither opens nor closes anything.
    let is_letter = |&id: &u32| bench.worker.loaded.tokenizer.token_bytes(id) == Some(b"a");
    let letter = (0..260).find(is_letter).expect("a token of one letter");
    asked.sampling.logit_bias = vec![(letter, 100.0)];
    let events = bench.send(asked);
    while bench.worker.running.is_empty() || bench.worker.running[0].feeds_its_next_token() {
        bench.turn();
    }
    bench.worker.running[0].rotating().push_text(b"{\"a\": \"");
    for _ in 0..20 {
        bench.turn();
    }
    assert!(bench.worker.running[0].tokens.len() > 85);
    bench.worker.running[0].rotating().push_text(b"\"}");
    bench.turn();
    let said = Said::of(&events);
    assert!(said.rotations[0].0 >= 58, "{}", said.rotations[0].0);
    assert_eq!(bench.worker.running[0].tokens.len(), 24);
}

/// A device that fails while it moves: the sequence ends by name, and the others go on.
#[test]
fn a_panic_while_moving_ends_that_sequence_alone() {
    let mut bench = bench(8, false);
    let other = bench.send(request(33, 60, Rotation::default()));
    let events = bench.send(request(40, 80, in_place(80, 20)));
    while bench.worker.running.len() < 2 || bench.worker.running[1].feeds_its_next_token() {
        bench.turn();
    }
    bench.worker.step();
    bench.worker.running[1].page_table[0].0 = 99;
    bench.worker.rotate_due();
    bench.finish();
    let last = events.drain().last();
    assert!(matches!(last, Some(Event::Failed(_))), "{last:?}");
    assert_eq!(Said::of(&other).ids.len(), 60);
    assert_eq!(bench.gauges.snapshot().panics, 1);
}

#[test]
fn sinks_are_kept_beside_what_is_pinned() {
    let mut asked = request(40, 80, in_place(80, 20));
    asked.rotation.options.sink = Some(7);
    asked.rotation.pinned.push(10..12);
    let said = run(&mut bench(8, false), &asked);
    assert_eq!(said.rotations[0].1.kept, [0..7, 10..12, 60..80]);
    assert_eq!(said.rotations[0].1.dropped, [7..10, 12..60]);
    let by_the_other = run(&mut bench(8, false), &request(40, 80, rotation(80, 20, 0..1)));
    assert_eq!(by_the_other.rotations[0].1.kept, [0..1, 60..80], "sinks are of one policy");
}
