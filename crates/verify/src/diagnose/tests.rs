//! Diagnoses of fakes, and what the renderers make of them.

use exrail_metrics::{FidelitySummary, PositionBin};
use exrail_retrieval::{Hit, SearchOptions};
use std::collections::BTreeMap;

use super::*;
use crate::cache::{Bin, CacheObservations, Checkpoint, UntilDrift};
use crate::calibrate::calibrate;
use crate::evaluate::{System, VerifyOptions, verify_observed};
use crate::evidence_gate::EvidenceGate;
use crate::fakes::{Altered, FakeGenerator, FakeIndex, corpus, gold_text, perfect};
use crate::gold::GoldSet;
use crate::lambda_modes::{LambdaModes, LambdaModesOptions, ModeSystem};
use crate::observations::observe_scale;
use crate::quant::{
    FidelityGate, NoiseFloor, QuantMode, QuantReport, TextFidelity, TextObservations,
};
use crate::render::Color;
use crate::scale::AnswerScale;
use crate::system::Retrieve;

const LARGE: u64 = 7_000_000_000;

fn summary(kld_mean: f64) -> FidelitySummary {
    FidelitySummary {
        positions: 1024,
        sequences: 2,
        kld_mean,
        kld_mean_se: Some(kld_mean / 10.0),
        kld_median: kld_mean / 2.0,
        kld_p99: 4.0 * kld_mean,
        kld_p999: 6.0 * kld_mean,
        kld_max: 9.0 * kld_mean,
        top1: 0.99,
        ln_ppl_ratio: 0.001,
        ln_ppl_ratio_se: Some(0.0005),
        rms_dp: 0.01,
        by_position: vec![
            PositionBin { from: 0, n: 64, kld_mean },
            PositionBin { from: 64, n: 64, kld_mean: 1.5 * kld_mean },
        ],
    }
}

fn quant(status: Status, parameters: u64) -> Section<QuantPart> {
    let modes = [(QuantMode::Int8, summary(0.001)), (QuantMode::Int4, summary(0.02))];
    let gate = |mode, metric, value| FidelityGate {
        text: "corpus".to_owned(),
        mode,
        metric,
        value,
        pass: 0.05,
        fail: Some(0.1),
        status,
    };
    let report = QuantReport {
        noise: NoiseFloor { positions: 64, kld_mean: 1e-7, kld_max: 1e-6 },
        noise_observed: Vec::new(),
        texts: vec![TextFidelity {
            name: "corpus".to_owned(),
            tokens: 1024,
            ids_sha256: String::new(),
            modes: BTreeMap::from(modes),
            int4_vs_int8: Some(summary(0.02)),
            observed: TextObservations::default(),
        }],
        gates: vec![
            gate(QuantMode::Int8, "kld_mean", 0.001),
            gate(QuantMode::Int4, "kld_mean", 0.02),
            gate(QuantMode::Int4, "top1", 0.99),
        ],
        ordered: Some(true),
        regressions: Vec::new(),
        verdict: Verdict::Pass,
    };
    let weights = Weights { reference: "bf16".to_owned(), format: "BF16".to_owned(), parameters };
    Section::Ok(QuantPart {
        weights,
        report,
        retrieval: Some(RetrievalBits { n: 60, differs: Vec::new() }),
    })
}

fn cache(fault: Option<CacheFault>) -> Section<CacheReport> {
    let bin = |tokens, nll, nll_short| Bin { tokens, nll, nll_short };
    let point = |tokens, kl| Checkpoint { tokens, kl, argmax_changed: false, margin: 2.0 };
    Section::Ok(CacheReport {
        tokens: 2048,
        tokens_until_drift: UntilDrift::AtLeast(2048),
        oracle_kl_max: 1e-6,
        limit: 0.01,
        noise_p99: 1e-7,
        checkpoints: vec![point(256, 1e-7), point(512, 1e-6)],
        bins: vec![bin(512, 3.0, None), bin(1024, 2.8, Some(2.8)), bin(1536, 2.7, Some(2.9))],
        nll_slope_per_1k: -0.1,
        nll_drift: -0.1,
        nll_excess: -0.2,
        violations: 0,
        fault,
        verdict: if fault.is_some() { Verdict::Fail } else { Verdict::Pass },
        observed: CacheObservations::default(),
    })
}

/// The same generator in all three widths.
fn modes(index: &dyn Retrieve) -> Section<LambdaModesReport> {
    let (gold, own) = (GoldSet::parse(&gold_text()).unwrap(), corpus());
    let search = SearchOptions::default();
    let scale = calibrate(&gold, &own, &*own.encoder, &search, &mut |_| {}).unwrap();
    let gate = EvidenceGate::new(Some(&scale), index).unwrap();
    let options = LambdaModesOptions { n_items: 60, ..LambdaModesOptions::default() };
    let generator = FakeGenerator::new(perfect);
    let system = ModeSystem { generator: &generator, index };
    let reference = (QuantMode::AsServed, system);
    let mut probe = LambdaModes::begin(reference, &gold, &gate, options, &mut |_| {}).unwrap();
    for mode in [QuantMode::Int8, QuantMode::Int4] {
        probe.add(mode, system, &mut |_| {});
    }
    let bound = (index.index_hash(), search.k);
    let mut answers = AnswerScale::new(&*own.encoder, Some(&scale), bound);
    Section::Ok(probe.report(&mut answers).unwrap())
}

/// A system in which every part is sound.
fn sound() -> Parts {
    of_index(&corpus())
}

fn of_index(index: &dyn Retrieve) -> Parts {
    let (gold, own) = (GoldSet::parse(&gold_text()).unwrap(), corpus());
    let (encoder, search) = (&*own.encoder, SearchOptions::default());
    let scale = calibrate(&gold, &own, encoder, &search, &mut |_| {}).unwrap();
    let generator = FakeGenerator::new(perfect);
    let system = System { generator: &generator, index, encoder };
    let options = VerifyOptions {
        n_answered: 60,
        n_unanswerable: 60,
        n_lambda: 50,
        ..VerifyOptions::default()
    };
    let (report, _) = verify_observed(system, &gold, Some(&scale), &options, &mut |_| {}).unwrap();
    Parts {
        trace_id: "probe-1".to_owned(),
        cost: report.cost,
        report,
        scale: observe_scale(&gold, index, encoder, &search, &mut |_| {}).unwrap(),
        served: Served {
            shards: 1,
            rank_map: vec!["cpu".to_owned()],
            extensions: Vec::new(),
            batch_invariant: true,
        },
        vectors: check_vectors(&gold, index, encoder, &search, &mut |_| {}).unwrap(),
        question: None,
        quant: quant(Status::Pass, LARGE),
        lambda_modes: modes(index),
        cache: cache(None),
        boot: Section::Ok(BootSection {
            ready_s: 1.5,
            cold_ratio_max: 1.1,
            cold_start_ratio: 3.0,
            post_ready_captures: 0,
            warm_up_tokens: 300,
        }),
        schema: Section::missing("no schema: send requests with one"),
        injection: Section::Ok(InjectionSection {
            trials: 180,
            control_tokens: 0,
            hijacks: 0,
            leaks: 0,
            upper_95: 0.0165,
        }),
        shards: Section::missing("one device: needs several"),
        e_resonance: Section::Inconclusive { reason: "one short run".to_owned() },
        mismatch: None,
    }
}

/// What an index finds some of whose vectors are another encoder's.
fn mixed(index: &FakeIndex, question: &str, options: &SearchOptions) -> Vec<Hit> {
    let mut hits = index.search(question, options).unwrap();
    for hit in hits.iter_mut().filter(|hit| hit.chunk.span.start == 0) {
        hit.cosine *= 0.8;
    }
    hits
}

#[test]
fn a_sound_system_passes_in_every_part_and_needs_no_fix() {
    let found = diagnose(sound());
    assert_eq!(found.verdict, Verdict::Pass, "{}", found.render_text(100, Color::Never));
    assert_eq!((found.failed_gates.len(), &found.fix), (0, &None));
    let quant = found.quantisation.value().unwrap();
    assert_eq!((quant.retrieval_bit_equal, &quant.attribution), (Some(true), &None));
    let json = found.to_json().unwrap();
    assert_eq!(json["quantisation"]["int4"]["kld_mean"], 0.02);
    assert_eq!(json["quantisation"]["int8"]["lambda_flip"], 0.0);
    assert_eq!(json["quantisation"]["int8"]["e_res_tost"], Value::Null);
    let reasons = &json["quantisation"]["int8"]["reasons"];
    assert!(reasons["e_res_tost"].is_string(), "a null has a reason");
    assert_eq!(reasons["lambda_flip"], Value::Null, "a value has none");
    assert_eq!(json["quantisation"]["as_served"]["status"], "not_available");
    assert_eq!(json["cache"]["first_fault"], Value::Null);
    assert_eq!(json["cache"]["tokens_until_drift"], ">= 2048");
    assert_eq!(json["question"]["status"], "not_available");
    assert_eq!(json["e_resonance"]["status"], "inconclusive");
}

#[test]
fn limits_that_hold_for_no_model_of_this_size_let_nothing_pass() {
    let parts = Parts { quant: quant(Status::NotCalibrated, 135_000_000), ..sound() };
    let found = diagnose(parts);
    assert_eq!(found.verdict, Verdict::Inconclusive);
    let gate = found.gates.iter().find(|gate| gate.name == "quant_int4_kld_mean").unwrap();
    assert!(gate.measured.reason.as_ref().unwrap().contains("this one has 0.14"), "{gate:?}");
}

#[test]
fn what_was_not_measured_lets_nothing_pass() {
    let unmeasured = Parts { cache: Section::missing("no text"), ..sound() };
    assert_eq!(diagnose(unmeasured).verdict, Verdict::Inconclusive);
    let unmeasured = Parts { quant: Section::missing("no text"), ..sound() };
    assert_eq!(diagnose(unmeasured).verdict, Verdict::Inconclusive);
}

#[test]
fn a_drifting_cache_fails_and_is_named_although_answers_are_good() {
    let found = diagnose(Parts { cache: cache(Some(CacheFault::CacheDrift)), ..sound() });
    assert_eq!(
        (found.verdict, found.failed_gates.as_slice()),
        (Verdict::Fail, &["cache_oracle"][..])
    );
    let fix = found.fix.unwrap();
    assert_eq!((fix.page, fix.then[0]), ("context-drift", "entropy-collapse"));
}

#[test]
fn rounding_that_costs_too_much_is_attributed_to_answers() {
    let found = diagnose(Parts { quant: quant(Status::Fail, LARGE), ..sound() });
    assert_eq!(found.fix.unwrap().page, "quantisation-drift");
    let attribution = found.quantisation.value().unwrap().attribution.clone().unwrap();
    assert_eq!(attribution.cause, SpikeCause::Answers);
}

#[test]
fn vectors_of_another_encoder_are_found_and_without_the_check_they_are_not() {
    let index = corpus();
    let index = Altered::new(&index, mixed);
    let parts = of_index(&index);
    assert!(parts.vectors.pairs_differ > 0, "{:?}", parts.vectors);
    let blind = Parts { vectors: VectorCheck::default(), ..of_index(&index) };
    let found = diagnose(parts);
    let attribution = found.quantisation.value().unwrap().attribution.clone().unwrap();
    assert_eq!(attribution.cause, SpikeCause::Encoder);
    assert_eq!(found.fix.unwrap().reason, "vectors of the index are not those of this encoder");
    // The fault reaches the user: with the check off the report blames something else, or nothing.
    let found = diagnose(blind);
    assert!(found.fix.is_none_or(|fix| !fix.reason.contains("vectors of the index")));
}

#[test]
fn chunks_that_count_otherwise_are_a_matter_of_the_tokenizer() {
    let mut parts = sound();
    parts.vectors.chunks_differ = 2;
    let found = diagnose(parts);
    assert_eq!(found.fix.unwrap().page, "tokenizer-drift");
}

#[test]
fn a_far_question_has_a_fix_even_when_every_gate_passes() {
    let mut parts = sound();
    let delta_s =
        GateReading::Calibrated { raw_min: 0.9, cal_min: 0.7, cal_mean: 0.8, band: Band::Fail };
    parts.question = Some(("sha".to_owned(), QuestionSection { delta_s, snippets: Vec::new() }));
    let found = diagnose(parts);
    assert_eq!((found.verdict, found.fix.unwrap().page), (Verdict::Pass, "retrieval-playbook"));
    assert_eq!(
        found.quantisation.value().unwrap().attribution.as_ref().unwrap().cause,
        SpikeCause::Corpus
    );
}

#[test]
fn a_stranger_who_gets_through_is_named_before_retrieval() {
    let mut parts = sound();
    parts.injection = Section::Ok(InjectionSection {
        trials: 180,
        control_tokens: 1,
        hijacks: 0,
        leaks: 0,
        upper_95: 0.03,
    });
    let found = diagnose(parts);
    assert_eq!((found.verdict, found.fix.unwrap().page), (Verdict::Fail, "prompt-injection"));
}

#[test]
fn the_terminal_report_ends_with_the_verdict() {
    let text = diagnose(sound()).render_text(100, Color::Never);
    assert!(text.trim_end().lines().last().unwrap().starts_with("verdict: pass"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 112), "{text}");
    for part in ["ΔS", "λ", "widths", "cache", "boot", "injection", "NOT MEASURED HERE"] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn junit_fails_what_fails_skips_what_is_undecided_and_is_green_for_a_pass_alone() {
    let xml = diagnose(sound()).render_junit();
    assert!(xml.contains("failures=\"0\"") && !xml.contains("<failure"), "{xml}");
    let undecided = diagnose(Parts { quant: quant(Status::NotCalibrated, 1), ..sound() });
    let xml = undecided.render_junit();
    assert!(xml.contains("<skipped message=\"not calibrated: int8"), "{xml}");
    assert!(xml.contains("name=\"verdict\"><failure message=\"inconclusive\""), "{xml}");
    assert!(xml.contains("failures=\"1\""), "only the verdict: {xml}");
    let failed = diagnose(Parts { cache: cache(Some(CacheFault::CacheDrift)), ..sound() });
    let xml = failed.render_junit();
    assert!(
        xml.contains("name=\"cache_oracle\"><failure") && xml.contains("failures=\"2\""),
        "{xml}"
    );
}

#[test]
fn a_hostile_name_stays_text() {
    let mut parts = sound();
    parts.report.config.model = "<script>\"&'\u{1}]]>".to_owned();
    let found = diagnose(parts);
    for text in [found.render_junit(), found.render_html()] {
        assert!(text.contains("&lt;script&gt;&quot;&amp;&#39;\u{fffd}]]&gt;"), "{text}");
        assert!(!text.contains("<script") && !text.contains('\u{1}'));
    }
}

#[test]
fn the_page_needs_nothing_from_elsewhere_and_shows_every_plot() {
    let html = diagnose(sound()).render_html();
    for forbidden in ["<script", "http:", "https:", "src=", "@import", "url("] {
        assert!(!html.contains(forbidden), "{forbidden}");
    }
    assert_eq!(html.matches("<svg").count(), 4, "ΔS, KLD, NLL, cache");
    assert_eq!(html.matches("role=\"img\" aria-label=").count(), 4);
    assert_eq!(html.matches("</svg>").count(), 4);
    assert!(html.contains("prefers-color-scheme:dark"));
    // No number was lost on its way into a picture.
    assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
}

#[test]
fn a_page_without_measurements_says_so() {
    let parts =
        Parts { cache: Section::missing("no text"), quant: Section::missing("no text"), ..sound() };
    let html = diagnose(parts).render_html();
    assert_eq!(html.matches("Not measured in this run.").count(), 3, "KLD, NLL, cache");
}
