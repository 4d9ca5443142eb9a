//! `exrail verify`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use clap::Args;
use exrail_server::{
    BootBoard, Retrieval, Services,
    pipeline::{ASK_MAX_TOKENS, EngineGenerate, ask_sampling},
};
use exrail_verify::{
    CollectionIndex, Color, CorpusCalibration, GoldSet, Observations, Report, System, Verdict,
    VerifyOptions, verify_observed,
};

use crate::{
    Ended,
    commands::calibrate::{Stored, bound_to, fit, policy, stored},
    load::{Boot, CollectionSpec, Prepare},
    options::{EncoderArgs, EngineArgs, Sources},
    output::Output,
    paths,
    progress::Bars,
};

/// Measure a collection and a model against a gold set: ΔS, coverage, citations, refusals, λ.
///
/// Exits 0 when every gate passes and 3 when one does not.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The gold set, JSON lines.
    #[arg(long, value_name = "FILE")]
    gold: PathBuf,
    /// The collection: a name, a folder, or NAME=DIR.
    #[arg(long, value_name = "NAME|DIR", default_value = "default")]
    collection: String,
    /// Fit the scale of ΔS anew, even when a valid one is stored.
    #[arg(long)]
    calibrate: bool,
    #[command(flatten)]
    sample: SampleArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    sources: Sources,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Sample")]
pub(crate) struct SampleArgs {
    /// Answerable questions to answer; all of them go through retrieval anyway.
    #[arg(long, value_name = "N", default_value_t = VerifyOptions::default().n_answered)]
    pub(crate) answered: usize,
    /// Unanswerable questions to ask.
    #[arg(long, value_name = "N", default_value_t = VerifyOptions::default().n_unanswerable)]
    pub(crate) unanswerable: usize,
    /// Questions to probe for λ, 12 generations each.
    #[arg(long, value_name = "N", default_value_t = VerifyOptions::default().n_lambda)]
    pub(crate) lambda: usize,
    /// Seed that chooses the samples.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) sample_seed: u64,
}

impl Verify {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let gold = GoldSet::read(&self.gold)?;
        let spec = CollectionSpec::parse(&self.collection)?;
        let services = Boot {
            board: &Arc::new(BootBoard::new()),
            keys: None,
            retries: 0,
            declared: None,
            traces: None,
            output: *output,
            sources: &self.sources,
            engine: &self.engine,
            encoder: Some(&self.encoder),
            collections: vec![spec.clone()],
            prepare: &Calibrate { gold: &gold, anew: self.calibrate },
            in_place_of: None,
        }
        .run()?;
        let report = measure(&services, &spec, &gold, self.sample, *output)?;
        print(*output, &report)?;
        Ok(match report.verdict {
            Verdict::Pass => Ended::Done,
            Verdict::Review | Verdict::Fail | Verdict::Inconclusive => Ended::NotPassed,
        })
    }
}

/// Makes sure that the scale of ΔS is there.
pub(crate) struct Calibrate<'a> {
    pub(crate) gold: &'a GoldSet,
    pub(crate) anew: bool,
}

impl Prepare for Calibrate<'_> {
    fn retrieval(&self) -> Retrieval {
        Retrieval::Prepared
    }

    fn calibration(&self, index: &CollectionIndex, dir: &Path, bars: &mut Bars) -> Result<()> {
        ensure_calibration(index, dir, self.gold, self.anew, bars)
    }
}

/// Fits and stores the gate unless a valid one is there.
pub(crate) fn ensure_calibration(
    index: &CollectionIndex,
    dir: &Path,
    gold: &GoldSet,
    anew: bool,
    bars: &mut Bars,
) -> Result<()> {
    match stored(dir, bound_to(index), Some(gold)) {
        Stored::Valid(_) if !anew => {}
        Stored::Valid(_) | Stored::None | Stored::Void(_) => {
            fit(index, dir, gold, bars)?;
        }
    }
    Ok(())
}

/// Names a report in traces.
pub(super) fn probe_id() -> String {
    format!("probe-{}", jiff::Timestamp::now().as_millisecond())
}

/// Runs the gold set against booted services.
pub(crate) fn measure(
    services: &Services,
    spec: &CollectionSpec,
    gold: &GoldSet,
    sample: SampleArgs,
    output: Output,
) -> Result<Report> {
    let index = services.collections[&spec.name].index().remembering();
    Ok(observe(services, (spec, &index), gold, sample, output)?.0)
}

/// [`measure`] over this index, with what its numbers were computed from.
pub(super) fn observe(
    services: &Services,
    (spec, index): (&CollectionSpec, &CollectionIndex),
    gold: &GoldSet,
    sample: SampleArgs,
    output: Output,
) -> Result<(Report, Observations)> {
    let generator = EngineGenerate::new(&services.engine, ask_sampling(), ASK_MAX_TOKENS);
    let system = System { generator: &generator, index, encoder: &**index.encoder() };
    let calibration = CorpusCalibration::load(&paths::calibration(&spec.dir)).ok();
    let options = VerifyOptions {
        policy: policy(),
        seed: sample.sample_seed,
        n_answered: sample.answered,
        n_unanswerable: sample.unanswerable,
        n_lambda: sample.lambda,
        max_chunk_tokens: index.collection().contract().chunking.max,
        ..VerifyOptions::default()
    };
    let mut bars = Bars::new(output);
    let mut told = |step| bars.probe(step);
    let observed = verify_observed(system, gold, calibration.as_ref(), &options, &mut told);
    bars.clear();
    Ok(observed?)
}

/// The report, whose last line is the verdict.
pub(crate) fn print(output: Output, report: &Report) -> Result<()> {
    output.value(&report.to_json().context("report")?);
    let color = if output.is_terminal() { Color::Always } else { Color::Never };
    output.line(report.render_text(output.width(), color).trim_end());
    Ok(())
}
