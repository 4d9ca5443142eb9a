//! A diagnosis of the small world of [`crate::fakes`]: everything that its index and its generator have is measured, and
//! what they do not have (weights, a cache, a boot) is as a sound model has it.

use std::collections::BTreeMap;

use exrail_metrics::{FidelitySummary, PositionBin};
use exrail_retrieval::SearchOptions;

use crate::cache::{Bin, CacheFault, CacheObservations, CacheReport, Checkpoint, UntilDrift};
use crate::calibrate::calibrate;
use crate::diagnose::{
    AssemblySystem, BootSection, InjectionSection, Parts, QuantPart, RetrievalBits, Section,
    Served, Weights, check_assembly, check_repeats, check_vectors, schema_probe,
};
use crate::evaluate::{System, VerifyOptions, verify_observed};
use crate::evidence_gate::EvidenceGate;
use crate::fakes::{FakeGenerator, corpus, gold_text, perfect};
use crate::gold::GoldSet;
use crate::lambda_modes::{LambdaModes, LambdaModesOptions, LambdaModesReport, ModeSystem};
use crate::observations::observe_scale;
use crate::quant::{
    FidelityGate, NoiseFloor, QuantMode, QuantReport, TextFidelity, TextObservations,
};
use crate::report::{Status, Verdict};
use crate::scale::AnswerScale;
use crate::system::{Generate, Retrieve};

/// Parameters of a model for which the limits of fidelity hold.
pub const LARGE: u64 = 7_000_000_000;

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

/// Widths of which each gate of fidelity has this status.
#[must_use]
pub fn quant(status: Status, parameters: u64) -> Section<QuantPart> {
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
        resonance: <_>::default(),
        weights,
        report,
        retrieval: Some(RetrievalBits { n: 60, differs: Vec::new() }),
    })
}

/// A cache that was looked at, with a fault or without.
#[must_use]
pub fn cache(fault: Option<CacheFault>) -> Section<CacheReport> {
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
    let (gold, own) = (GoldSet::parse(&gold_text()).expect("the small world holds"), corpus());
    let search = SearchOptions::default();
    let scale =
        calibrate(&gold, &own, &*own.encoder, &search, &mut |_| {}).expect("the small world holds");
    let gate = EvidenceGate::new(Some(&scale), index).expect("the small world holds");
    let options = LambdaModesOptions { n_items: 60, ..LambdaModesOptions::default() };
    let generator = FakeGenerator::new(perfect);
    let system = ModeSystem { generator: &generator, index };
    let reference = (QuantMode::AsServed, system);
    let mut probe = LambdaModes::begin(reference, &gold, &gate, options, &mut |_| {})
        .expect("the small world holds");
    for mode in [QuantMode::Int8, QuantMode::Int4] {
        probe.add(mode, system, &mut |_| {});
    }
    let bound = (index.index_hash(), search.k);
    let mut answers = AnswerScale::new(&*own.encoder, Some(&scale), bound);
    Section::Ok(probe.report(&mut answers).expect("the small world holds"))
}

/// A system in which every part is sound.
#[must_use]
pub fn sound() -> Parts {
    of_index(&corpus())
}

/// The same over this index.
#[must_use]
pub fn of_index(index: &dyn Retrieve) -> Parts {
    of(index, &FakeGenerator::new(perfect), 1)
}

/// What a diagnosis measures of this index and this generator, with this seed; what neither has is sound.
///
/// # Panics
/// A part of the system fails.
#[must_use]
pub fn of(index: &dyn Retrieve, generator: &dyn Generate, seed: u64) -> Parts {
    let (gold, own) = (GoldSet::parse(&gold_text()).expect("the small world holds"), corpus());
    let (encoder, search) = (&*own.encoder, SearchOptions::default());
    let scale =
        calibrate(&gold, &own, encoder, &search, &mut |_| {}).expect("the small world holds");
    let system = System { generator, index, encoder };
    let options = VerifyOptions {
        seed,
        n_answered: 60,
        n_unanswerable: 60,
        n_lambda: 50,
        ..VerifyOptions::default()
    };
    let gate = EvidenceGate::new(Some(&scale), index).expect("the small world holds");
    let policy = &options.policy;
    let assembling = AssemblySystem { generator, index, encoder, gate: &gate, policy };
    let (report, _) = verify_observed(system, &gold, Some(&scale), &options, &mut |_| {})
        .expect("the small world holds");
    Parts {
        trace_id: "probe-1".to_owned(),
        cost: report.cost,
        report,
        scale: observe_scale(&gold, index, encoder, &search, &mut |_| {})
            .expect("the small world holds"),
        served: Served {
            shards: 1,
            rank_map: vec!["cpu".to_owned()],
            extensions: Vec::new(),
            batch_invariant: true,
        },
        vectors: check_vectors(&gold, index, encoder, &search, &mut |_| {})
            .expect("the small world holds"),
        assembly: check_assembly(assembling, &gold, (None, seed), &mut |_| {})
            .expect("the small world holds"),
        repeats: check_repeats(assembling, &gold, seed).expect("the small world holds"),
        manifest: None,
        weights: Section::missing("nothing to compare with"),
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
        schema: Section::Ok(schema_probe(generator, &gold, seed).expect("the small world holds")),
        injection: Section::Ok(InjectionSection {
            trials: 180,
            control_tokens: 0,
            hijacks: 0,
            leaks: 0,
            upper_95: 0.0165,
        }),
        shards: Section::missing("one device: needs several"),
        e_resonance: Section::Inconclusive { reason: "one short run".to_owned() },
    }
}
