//! Warm equals cold, whatever came before: random prompts that begin alike, cancels and a small pool.

use std::collections::BTreeMap;

use exrail_engine::{EngineHandle, EngineOptions, Finish, GenerateRequest, Generation};
use proptest::prelude::*;

use crate::support::{
    Answer, Faults, assert_all_pages_return, collect, generate, options, plain, prompt, start_with,
};

/// What a random client does.
#[derive(Clone, Debug)]
enum Action {
    Submit(Ask),
    Cancel(usize),
    Read(usize),
}

/// A prompt: the first `n_shared` tokens of one of two texts, and some of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Ask {
    text: u32,
    n_shared: u32,
    own: u32,
    max_tokens: usize,
    tenant: Option<u8>,
}

impl Ask {
    fn request(self) -> GenerateRequest {
        let prompt = [prompt(self.text, self.n_shared), prompt(2 + self.own, 3)].concat();
        let mut request = plain(prompt, self.max_tokens);
        request.tenant = self.tenant.map(|tenant| tenant.to_string());
        request
    }
}

fn asks() -> impl Strategy<Value = Ask> {
    let n_shared = prop_oneof![Just(253_u32), Just(254), Just(256), Just(512), 200..600_u32];
    let tenant = prop_oneof![3 => Just(None), 1 => (0..2_u8).prop_map(Some)];
    (0..2_u32, n_shared, 0..3_u32, 1..30_usize, tenant).prop_map(
        |(text, n_shared, own, max_tokens, tenant)| Ask { text, n_shared, own, max_tokens, tenant },
    )
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        4 => asks().prop_map(Action::Submit),
        1 => any::<usize>().prop_map(Action::Cancel),
        2 => any::<usize>().prop_map(Action::Read),
    ];
    prop::collection::vec(action, 1..24)
}

/// Answers of an engine that shares nothing.
struct Cold {
    engine: EngineHandle,
    answers: BTreeMap<Ask, Vec<u32>>,
}

impl Cold {
    fn ids(&mut self, ask: Ask) -> &[u32] {
        let engine = &self.engine;
        self.answers.entry(ask).or_insert_with(|| generate(engine, ask.request()).ids())
    }
}

fn check(answer: &Answer, ask: Ask, cold: &mut Cold) -> Result<(), TestCaseError> {
    let expected = cold.ids(ask);
    let finished = answer.finished();
    match finished.finish {
        Finish::Length => prop_assert_eq!(answer.ids(), expected),
        Finish::Cancelled => prop_assert!(expected.starts_with(&answer.ids())),
        Finish::Stop | Finish::Degenerate | Finish::RotationRequired => {
            prop_assert!(false, "nothing stops these");
        }
    }
    let cached = finished.usage.cached_tokens;
    let is_whole = cached.is_multiple_of(256) && cached < ask.request().prompt.len();
    prop_assert!(is_whole, "{}", cached);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]
    /// In debug builds the worker audits the whole pool after every step of it.
    #[test]
    fn warm_equals_cold(actions in actions(), runs_ahead in any::<bool>(), kv_pages in 4..9_usize) {
        let with = EngineOptions { max_sequences: 4, kv_pages: Some(kv_pages), ..options() };
        let engine = start_with(Faults::default(), runs_ahead, with);
        let without = EngineOptions { prefix_cache: false, ..with };
        let cold = start_with(Faults::default(), false, without);
        let mut cold = Cold { engine: cold, answers: BTreeMap::new() };
        let mut live: Vec<(Generation, Ask)> = Vec::new();
        let mut submitted = 0;
        for action in actions {
            match action {
                Action::Submit(ask) => {
                    live.push((engine.submit(ask.request()).unwrap(), ask));
                    submitted += 1;
                }
                Action::Cancel(at) if !live.is_empty() => live[at % live.len()].0.cancel(),
                Action::Read(at) if !live.is_empty() => {
                    let (generation, ask) = live.swap_remove(at % live.len());
                    check(&collect(&generation), ask, &mut cold)?;
                }
                Action::Cancel(_) | Action::Read(_) => {}
            }
        }
        for (generation, ask) in &live {
            check(&collect(generation), *ask, &mut cold)?;
        }
        assert_all_pages_return(&engine);
        let counters = engine.counters();
        prop_assert_eq!((counters.submitted, counters.kv_restarts, counters.failed), (submitted, 0, 0));
        prop_assert_eq!(counters.finished + counters.cancelled, submitted);
        prop_assert!(counters.pages_cached <= counters.pages_free);
    }
}

/// The property means nothing where nothing is shared and nothing evicted.
#[test]
fn a_small_pool_shares_and_evicts() {
    let engine = start_with(
        Faults::default(),
        true,
        EngineOptions { max_sequences: 4, kv_pages: Some(4), ..options() },
    );
    let ask = |text, own| Ask { text, n_shared: 520, own, max_tokens: 20, tenant: None };
    for own in 0..3 {
        for text in 0..2 {
            let generation = engine.submit(ask(text, own).request()).unwrap();
            assert_eq!(collect(&generation).tokens.len(), 20);
        }
    }
    let counters = engine.counters();
    assert!(counters.prefix_hits >= 4, "{counters:?}");
    assert!(counters.prefix_evictions >= 1, "{counters:?}");
    assert!(counters.kv_audits > 0, "{counters:?}");
    assert_all_pages_return(&engine);
}
