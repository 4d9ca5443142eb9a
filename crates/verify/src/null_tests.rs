//! A system that knows nothing gets no `pass`, however often it is tried.

use exrail_retrieval::{Hit, SearchOptions};

use crate::calibrate::{CorpusCalibration, calibrate};
use crate::evaluate::{System, VerifyOptions, verify};
use crate::fakes::{Altered, FakeGenerator, FakeIndex, corpus, gold_text, perfect, sources};
use crate::gold::GoldSet;
use crate::prompt::FrameMessage;
use crate::report::{Report, Verdict};
use crate::system::{Generate, Retrieve};

/// Seeds per kind of null.
const TRIES: u64 = 100;

/// A counter-based generator of numbers: splitmix64 of Steele, Lea and Flood (2014).
fn random(seed: u64, counter: u64) -> u64 {
    let mut x =
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ counter.wrapping_mul(0xd1b5_4a32_d192_ed03);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Chunks that have nothing to do with the question, with their true cosines.
fn at_random(
    index: &FakeIndex,
    (question, seed): (&str, u64),
    options: &SearchOptions,
) -> Vec<Hit> {
    let all = SearchOptions { k: usize::MAX, ..options.clone() };
    let mut hits = index.search(question, &all).unwrap();
    let key = |hit: &Hit| random(seed ^ hash(question), hash(&hit.chunk.snippet_id));
    hits.sort_by_cached_key(key);
    hits.truncate(options.k);
    hits
}

/// A world with its gold set, and a sample that is large enough to pass.
struct World {
    index: FakeIndex,
    gold: GoldSet,
}

impl World {
    fn new() -> World {
        World { index: corpus(), gold: GoldSet::parse(&gold_text()).unwrap() }
    }

    fn calibrate(&self, index: &dyn Retrieve) -> CorpusCalibration {
        let search = SearchOptions::default();
        calibrate(&self.gold, index, &*self.index.encoder, &search, &mut |_| {}).unwrap()
    }

    fn report(
        &self,
        generator: &dyn Generate,
        index: &dyn Retrieve,
        calibration: &CorpusCalibration,
        seed: u64,
    ) -> Report {
        let options = VerifyOptions {
            seed,
            n_answered: 50,
            n_unanswerable: 50,
            n_lambda: 50,
            ..VerifyOptions::default()
        };
        let system = System { generator, index, encoder: &*self.index.encoder };
        verify(system, &self.gold, Some(calibration), &options, &mut |_| {}).unwrap()
    }
}

/// Every seed must be kept out; the honest system of the same size must not be, or the nulls would
/// show nothing.
fn never_passes(world: &World, mut report: impl FnMut(u64) -> Report) {
    let calibration = world.calibrate(&world.index);
    let honest = world.report(&FakeGenerator::new(perfect), &world.index, &calibration, 1);
    assert_eq!(honest.verdict, Verdict::Pass, "{:?}", honest.gates);
    for seed in 1..=TRIES {
        let report = report(seed);
        assert_ne!(report.verdict, Verdict::Pass, "seed {seed}: {:?}", report.gates);
    }
}

#[test]
fn random_retrieval_never_passes() {
    let world = World::new();
    let honest = world.calibrate(&world.index);
    never_passes(&world, |seed| {
        let index = Altered::new(&world.index, |index, question, options| {
            at_random(index, (question, seed), options)
        });
        // Some fit a scale to what they have, the others trust that of the index as it was.
        let fitted = if seed % 4 == 0 { world.calibrate(&index) } else { honest.clone() };
        world.report(&FakeGenerator::new(perfect), &index, &fitted, seed)
    });
}

#[test]
fn an_empty_index_never_passes() {
    let world = World::new();
    let honest = world.calibrate(&world.index);
    let mut empty = corpus();
    empty.finds_nothing = true;
    never_passes(&world, |seed| {
        let fitted = if seed % 4 == 0 { world.calibrate(&empty) } else { honest.clone() };
        world.report(&FakeGenerator::new(perfect), &empty, &fitted, seed)
    });
}

/// The sources of a prompt and a number that depends on all of it.
fn drawn(messages: &[FrameMessage], draw: u64) -> (Vec<String>, u64) {
    (sources(messages), random(draw, hash(&messages[1].content)))
}

fn pick(n: u64, from: usize) -> usize {
    usize::try_from(n % u64::try_from(from).unwrap()).unwrap()
}

#[test]
fn a_model_that_draws_its_source_never_passes() {
    let world = World::new();
    let calibration = world.calibrate(&world.index);
    never_passes(&world, |seed| {
        let any_source = FakeGenerator::new(move |messages: &[FrameMessage], draw| {
            let (sources, number) = drawn(messages, seed.wrapping_mul(1_000_003) ^ draw);
            let at = pick(number, sources.len());
            format!("[S{}] {}", at + 1, sources[at])
        });
        world.report(&any_source, &world.index, &calibration, seed)
    });
}

#[test]
fn a_model_that_shuffles_its_words_never_passes() {
    let world = World::new();
    let calibration = world.calibrate(&world.index);
    never_passes(&world, |seed| {
        let babbling = FakeGenerator::new(move |messages: &[FrameMessage], draw| {
            let (sources, number) = drawn(messages, seed.wrapping_mul(1_000_003) ^ draw);
            let joined = sources.join(" ");
            let words: Vec<&str> = joined.split_whitespace().collect();
            let word = |at: u64| words[pick(random(number, at), words.len())];
            let said: Vec<&str> = (0..8).map(word).collect();
            format!("[S{}] {}.", pick(number, sources.len()) + 1, said.join(" "))
        });
        world.report(&babbling, &world.index, &calibration, seed)
    });
}
