//! Two models that are fakes, and what the probe says of them.

use exrail_metrics::LambdaState;
use exrail_retrieval::{Hit, SearchOptions};
use serde_json::Value;

use super::*;
use crate::calibrate::{CorpusCalibration, calibrate};
use crate::fakes::{Altered, FakeGenerator, FakeIndex, corpus, gold_text, perfect, sources};
use crate::prompt::{FrameMessage, PromptFrame};
use crate::report::{Status, Verdict};
use crate::system::{GenerateError, Generated, OfSchema, Placed};

const N_ITEMS: usize = 60;

/// A corpus with its gold set and scale.
struct World {
    index: FakeIndex,
    gold: GoldSet,
    calibration: CorpusCalibration,
}

impl World {
    fn new() -> World {
        let (index, gold) = (corpus(), GoldSet::parse(&gold_text()).unwrap());
        let search = SearchOptions::default();
        let calibration = calibrate(&gold, &index, &*index.encoder, &search, &mut |_| {}).unwrap();
        World { index, gold, calibration }
    }

    fn scale(&self) -> AnswerScale<'_> {
        let bound = (self.index.hash.as_str(), SearchOptions::default().k);
        AnswerScale::new(&*self.index.encoder, Some(&self.calibration), bound)
    }

    /// A reference that copies the best source, and int8.
    fn against(&self, int8: &dyn Generate, n_items: usize) -> LambdaModesReport {
        self.pair(&FakeGenerator::new(perfect), int8, n_items, &mut self.scale())
    }

    fn pair(
        &self,
        reference: &dyn Generate,
        int8: &dyn Generate,
        n_items: usize,
        scale: &mut AnswerScale<'_>,
    ) -> LambdaModesReport {
        let gate = EvidenceGate::not_calibrated();
        let options = LambdaModesOptions { n_items, ..LambdaModesOptions::default() };
        let index = &self.index;
        let system = ModeSystem { generator: reference, index };
        let served = (QuantMode::AsServed, system);
        let mut probe =
            LambdaModes::begin(served, &self.gold, &gate, options, &mut |_| {}).unwrap();
        probe.add(QuantMode::Int8, ModeSystem { generator: int8, index }, &mut |_| {});
        probe.report(scale).unwrap()
    }
}

/// The number of the fact that is the best source.
fn fact_of(messages: &[FrameMessage]) -> usize {
    let best = &sources(messages)[0];
    best.split_whitespace().nth(1).unwrap().trim_start_matches("gamma").parse().unwrap()
}

/// Copies the second source and cites it.
fn second(messages: &[FrameMessage], _seed: u64) -> String {
    format!("[S2] {}", sources(messages)[1])
}

/// Copies five sources, in their order or turned round: longer than what is compared by words.
fn at_length(turned: bool) -> impl Fn(&[FrameMessage], u64) -> String {
    move |messages, _| {
        let cited = sources(messages).into_iter().zip(1..);
        let mut said: Vec<String> = cited.map(|(text, n)| format!("[S{n}] {text}")).collect();
        if turned {
            said.reverse();
        }
        said.join(" ")
    }
}

/// Fails as it is told, or else copies the best source.
struct Failing(fn(u64) -> Option<GenerateError>);

impl Generate for Failing {
    fn generate(&self, prompt: &PromptFrame, seed: u64) -> Result<Generated, GenerateError> {
        (self.0)(seed).map_or_else(|| FakeGenerator::new(perfect).generate(prompt, seed), Err)
    }

    fn generate_step(
        &self,
        prompt: &PromptFrame,
        so_far: &str,
        seed: u64,
    ) -> Result<Generated, GenerateError> {
        FakeGenerator::new(perfect).generate_step(prompt, so_far, seed)
    }

    fn generate_of_schema(
        &self,
        messages: &[FrameMessage],
        schema: &Value,
        seed: u64,
    ) -> Result<OfSchema, GenerateError> {
        FakeGenerator::new(perfect).generate_of_schema(messages, schema, seed)
    }

    fn place(&self, prompt: &PromptFrame) -> Result<Placed, GenerateError> {
        FakeGenerator::new(perfect).place(prompt)
    }

    fn count_tokens(&self, messages: &[FrameMessage]) -> Result<usize, GenerateError> {
        FakeGenerator::new(perfect).count_tokens(messages)
    }

    fn token_ends(&self, text: &str) -> Result<Vec<usize>, GenerateError> {
        FakeGenerator::new(perfect).token_ends(text)
    }

    fn prompt_limit(&self) -> usize {
        FakeGenerator::new(perfect).prompt_limit()
    }

    fn facts(&self) -> Result<GeneratorFacts, GenerateError> {
        FakeGenerator::new(perfect).facts()
    }
}

/// What an index finds whose encoder shares weights with the generator: one cosine moves by one unit in the last place.
fn nudged(index: &FakeIndex, question: &str, options: &SearchOptions) -> Vec<Hit> {
    let mut hits = index.search(question, options).unwrap();
    if question.contains("gamma7 ") {
        hits[1].cosine = f32::from_bits(hits[1].cosine.to_bits() + 1);
    }
    hits
}

#[test]
fn the_same_model_twice_never_flips_and_passes() {
    let report = World::new().against(&FakeGenerator::new(perfect), N_ITEMS);
    assert_eq!(report.verdict, Verdict::Pass, "{}", report.lines().join("\n"));
    let [comparison] = &report.comparisons[..] else { panic!("one pair") };
    assert_eq!(comparison.name(), "int8_vs_as_served");
    assert_eq!((comparison.lambda_flip.value, comparison.n_undecided), (Some(0.0), 0));
    assert_eq!(comparison.citations_same.value, Some(1.0));
    assert_eq!(comparison.citations_same.status, Status::Reported);
    assert_eq!((comparison.ds_drift.value, comparison.ds_drift.n), (Some(0.0), N_ITEMS));
    assert_eq!((report.retrieval.bit_equal, report.retrieval.n_queries), (Some(true), 240));
    for item in &report.items {
        let served = &item.modes[&QuantMode::AsServed];
        assert_eq!(served.stages.reason, Some(LambdaState::Convergent));
        assert_eq!((served.fault, served.matches_gold), (None, Some(true)));
        assert_eq!(served.frozen.runs.len(), 6);
        assert!(served.live.is_some() && item.modes[&QuantMode::Int8].live.is_none());
        assert!(served.ds_ac.is_some());
    }
    // Three items are asked once more for the time of a single answer.
    let generations = |mode| report.modes[&mode].cost.unwrap().generations;
    assert_eq!(generations(QuantMode::AsServed), 12 * N_ITEMS + 3);
    assert_eq!(generations(QuantMode::Int8), 6 * N_ITEMS + 3);
}

#[test]
fn flips_are_counted_over_pooled_classes() {
    let other = FakeGenerator::new(|messages: &[FrameMessage], seed| {
        if fact_of(messages).is_multiple_of(4) {
            second(messages, seed)
        } else {
            perfect(messages, seed)
        }
    });
    let report = World::new().against(&other, N_ITEMS);
    let comparison = &report.comparisons[0];
    assert_eq!(comparison.lambda_flip.value, Some(0.25));
    assert_eq!(comparison.lambda_flip.status, Status::Fail);
    assert_eq!(
        (comparison.flips_net.value, comparison.flips_gross.value),
        (Some(-0.25), Some(0.25))
    );
    assert_eq!(comparison.citations_same.value, Some(0.75));
    assert_eq!(report.verdict, Verdict::Fail);
    assert!(report.failed_gates.contains(&"int8_vs_as_served.lambda_flip".to_owned()));
    for (item, of) in comparison.items.iter().zip(&report.items) {
        // Either mode by itself has one class, number 0: only the pooled numbers say that they differ.
        let alone = |mode| of.modes[&mode].frozen.classes();
        assert_eq!(alone(QuantMode::AsServed), alone(QuantMode::Int8));
        assert!(!item.state_differs);
        let is_other = item.flip == Some(true);
        assert_eq!(item.mode_classes, [usize::from(is_other); 6]);
        assert_eq!((&item.reference_classes[..], item.majority_differs), (&[0; 6][..], is_other));
        assert_eq!(item.stage, is_other.then_some(FaultStage::Reason));
    }
}

#[test]
fn a_mode_that_depends_on_the_seed_is_another_state() {
    let torn = FakeGenerator::new(|messages: &[FrameMessage], seed| {
        if seed == 1 { perfect(messages, seed) } else { second(messages, seed) }
    });
    let report = World::new().against(&torn, N_ITEMS);
    let item = &report.comparisons[0].items[0];
    assert_eq!((item.flip, item.state_differs, item.majority_differs), (Some(true), true, false));
    let int8 = &report.items[0].modes[&QuantMode::Int8];
    assert_eq!(
        (int8.frozen.state, int8.fault),
        (Some(LambdaState::Divergent), Some(FaultStage::Reason))
    );
    let shown = report.lines().join("\n");
    assert!(shown.contains("convergent to divergent (seed sensitive)"), "{shown}");
}

#[test]
fn what_only_an_encoder_could_compare_is_undecided() {
    let world = World::new();
    let (in_order, turned) =
        (FakeGenerator::new(at_length(false)), FakeGenerator::new(at_length(true)));
    let mut none = AnswerScale::new(&*world.index.encoder, None, ("", 5));
    let report = world.pair(&in_order, &turned, N_ITEMS, &mut none);
    let comparison = &report.comparisons[0];
    assert_eq!((comparison.n_undecided, comparison.items[0].flip), (N_ITEMS, None));
    assert_eq!(comparison.lambda_flip.status, Status::Inconclusive);
    assert_eq!(comparison.ds_drift.status, Status::NotCalibrated);
    assert_eq!(comparison.ds_drift.value, None);
    assert_eq!(report.verdict, Verdict::Inconclusive);
    // The same words, so the encoder of the corpus says that they mean the same.
    let report = world.pair(&in_order, &turned, N_ITEMS, &mut world.scale());
    assert_eq!(report.comparisons[0].lambda_flip.status, Status::Pass, "{:?}", report.lines());
}

#[test]
fn few_items_cannot_pass_but_can_fail() {
    let world = World::new();
    let same = world.against(&FakeGenerator::new(perfect), 8);
    assert_eq!((same.n_items, same.verdict), (8, Verdict::Inconclusive));
    let reason = same.comparisons[0].lambda_flip.reason.as_deref();
    assert_eq!(reason, Some("8 items; a pass needs at least 50"));
    let other = world.against(&FakeGenerator::new(second), 8);
    assert_eq!(other.comparisons[0].lambda_flip.status, Status::Fail);
    assert_eq!(other.verdict, Verdict::Fail);
}

#[test]
fn replies_that_are_none_are_classes_of_their_own() {
    let late = Failing(|seed| (seed == 2).then_some(GenerateError::TimedOut { limit_ms: 5 }));
    let report = World::new().against(&late, 8);
    let item = &report.comparisons[0].items[0];
    assert_eq!(item.mode_classes, [0, 1, 0, 2, 0, 3]);
    let frozen = &report.items[0].modes[&QuantMode::Int8].frozen;
    assert_eq!(frozen.state, Some(LambdaState::Chaotic));
    assert_eq!((item.flip, frozen.runs[1].valid), (Some(true), false));
}

#[test]
fn a_mode_that_fails_is_not_available_and_says_why() {
    let world = World::new();
    let broken = Failing(|_| Some(GenerateError::Engine("no more pages".into())));
    let report = world.against(&broken, 8);
    let section = &report.modes[&QuantMode::Int8];
    assert_eq!(section.status, Status::NotAvailable);
    assert_eq!(section.reason.as_deref(), Some("generator: no more pages"));
    assert!(section.cost.is_none() && report.comparisons[0].items.is_empty());
    for (name, measured) in report.comparisons[0].measured() {
        assert_eq!((measured.status, measured.value), (Status::NotAvailable, None), "{name}");
        assert!(measured.reason.as_deref().unwrap().contains("int8: generator: no more pages"));
    }
    assert_eq!(report.retrieval.status, Status::NotAvailable);
    assert_eq!(report.verdict, Verdict::Inconclusive);
    assert_eq!(report.items[0].modes.len(), 1);
}

#[test]
fn int4_is_compared_with_int8_as_well_and_their_citations_gate() {
    let world = World::new();
    let gate = EvidenceGate::not_calibrated();
    let same = FakeGenerator::new(perfect);
    let system = ModeSystem { generator: &same, index: &world.index };
    let options = LambdaModesOptions { n_items: N_ITEMS, ..LambdaModesOptions::default() };
    let served = (QuantMode::AsServed, system);
    let mut probe = LambdaModes::begin(served, &world.gold, &gate, options, &mut |_| {}).unwrap();
    probe.add(QuantMode::Int8, system, &mut |_| {});
    let other = FakeGenerator::new(second);
    probe.add(QuantMode::Int4, ModeSystem { generator: &other, ..system }, &mut |_| {});
    let report = probe.report(&mut world.scale()).unwrap();
    let names: Vec<String> = report.comparisons.iter().map(ModeComparison::name).collect();
    assert_eq!(names, ["int8_vs_as_served", "int4_vs_as_served", "int4_vs_int8"]);
    let flips = report.comparisons.iter().map(|of| of.lambda_flip.value);
    assert_eq!(flips.collect::<Vec<_>>(), [Some(0.0), Some(1.0), Some(1.0)]);
    let citations = report.comparisons.iter().map(|of| of.citations_same.status);
    let expected = [Status::Reported, Status::Reported, Status::Fail];
    assert_eq!(citations.collect::<Vec<_>>(), expected);
    // A mode that could not be loaded takes its comparisons along, and no others.
    probe.leave_out(QuantMode::Int4, "too large".to_owned());
    let report = probe.report(&mut world.scale()).unwrap();
    let statuses = report.comparisons.iter().map(|of| of.lambda_flip.status);
    let expected = [Status::Pass, Status::NotAvailable, Status::NotAvailable];
    assert_eq!(statuses.collect::<Vec<_>>(), expected);
}

/// The same answers, over an index that one mode moves by one bit.
fn leaking(check: RetrievalCheck) -> LambdaModesReport {
    let world = World::new();
    let (same, gate) = (FakeGenerator::new(perfect), EvidenceGate::not_calibrated());
    let system = ModeSystem { generator: &same, index: &world.index };
    let options =
        LambdaModesOptions { n_items: N_ITEMS, retrieval: check, ..LambdaModesOptions::default() };
    let served = (QuantMode::AsServed, system);
    let mut probe = LambdaModes::begin(served, &world.gold, &gate, options, &mut |_| {}).unwrap();
    let index = Altered::new(&world.index, nudged);
    probe.add(QuantMode::Int8, ModeSystem { index: &index, ..system }, &mut |_| {});
    probe.report(&mut world.scale()).unwrap()
}

#[test]
fn one_bit_of_a_cosine_is_a_leak_into_retrieval_and_fails() {
    let report = leaking(RetrievalCheck::Enforce);
    assert_eq!((report.verdict, report.retrieval.bit_equal), (Verdict::Fail, Some(false)));
    assert_eq!(report.failed_gates, ["retrieval_bit_equal"]);
    assert_eq!(report.retrieval.attribution, Some(LeakCause::Unknown));
    let [first, ..] = &report.retrieval.differences[..] else { panic!("a difference") };
    assert_eq!((first.item.as_str(), first.place, first.mode), ("a7", 2, QuantMode::Int8));
    assert_ne!(
        first.expected.as_ref().unwrap().cosine_bits,
        first.found.as_ref().unwrap().cosine_bits
    );
    let shown = report.lines().join("\n");
    assert!(shown.contains("item a7") && shown.contains("leaks into retrieval"), "{shown}");
}

/// Mutation: without the comparison the same fault passes, and nobody says so.
#[test]
fn without_the_comparison_a_leak_passes() {
    let report = leaking(RetrievalCheck::Off);
    assert_eq!(report.verdict, Verdict::Pass);
    assert!(report.retrieval.differences.is_empty());
    assert!(!report.lines().join("\n").contains("leaks"));
}

#[test]
fn a_probe_without_items_is_refused() {
    let world = World::new();
    let (same, gate) = (FakeGenerator::new(perfect), EvidenceGate::not_calibrated());
    let system = ModeSystem { generator: &same, index: &world.index };
    let options = LambdaModesOptions { n_items: 0, ..LambdaModesOptions::default() };
    let served = (QuantMode::AsServed, system);
    let refused = LambdaModes::begin(served, &world.gold, &gate, options, &mut |_| {});
    assert!(refused.err().unwrap().to_string().contains("`items`: expected at least 1"));
}

/// A diagnosis asks the gold set first: what the served model said there is not asked again, and says the same.
#[test]
fn runs_of_the_gold_set_are_those_of_the_reference() {
    let world = World::new();
    let gate = EvidenceGate::new(Some(&world.calibration), &world.index).unwrap();
    let seeded = |_: &[FrameMessage], seed: u64| format!("[S1] Seed {seed} says so.");
    let generator = FakeGenerator::new(seeded);
    let system = crate::System {
        generator: &generator,
        index: &world.index,
        encoder: &*world.index.encoder,
    };
    let options = crate::VerifyOptions { n_lambda: 3, ..crate::VerifyOptions::default() };
    let scale = Some(&world.calibration);
    let asked = crate::verify_observed(system, &world.gold, scale, &options, &mut |_| {});
    let frozen = asked.unwrap().1.frozen;
    assert_eq!(frozen.0.len(), 3);

    let begin = |known: FrozenRuns, generator: &dyn Generate| {
        let options = LambdaModesOptions {
            n_items: 3,
            live: false,
            timed: false,
            ..LambdaModesOptions::default()
        };
        let served = (QuantMode::AsServed, ModeSystem { generator, index: &world.index });
        let probe =
            LambdaModes::begin_with(known, served, &world.gold, &gate, (options, &mut |_| {}));
        probe.unwrap().report(&mut world.scale()).unwrap()
    };
    let silent = FakeGenerator::new(|_: &[FrameMessage], _| panic!("it was asked before"));
    let (known, anew) = (begin(frozen, &silent), begin(FrozenRuns::default(), &generator));
    assert_eq!(known.items, anew.items);
    let generations = |report: &LambdaModesReport| report.cost.generations;
    assert_eq!((generations(&known), generations(&anew)), (0, 18));
}
