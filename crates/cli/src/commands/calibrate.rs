//! `exrail calibrate`: fits the gate in front of the generator to an encoder and a collection (§1.1.7).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use clap::Args;
use exrail_hub::Kind;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_metrics::Calibration;
use exrail_retrieval::{Collection, Encode};
use exrail_server::pipeline::ASK_K;
use exrail_verify::{
    AskPolicy, CalibrationError, CollectionIndex, CorpusCalibration, FamilyFit, GoldKind, GoldSet,
    HeldOut, Rate, Retrieve, Signal, calibrate, unfit_in_words,
};
use serde_json::json;

use crate::{
    Ended, environment,
    load::{self, CollectionSpec},
    options::{EncoderArgs, Sources},
    output::Output,
    paths,
    progress::Bars,
};

/// The signals in the order of their columns.
const SIGNALS: [Signal; 3] = [Signal::Encoder, Signal::Lexical, Signal::Joint];

/// Fit the gate that keeps unanswerable questions from the generator, and store it beside the
/// collection. No generator is loaded.
///
/// Fits the scale of ΔS and two signals beside it on the answerable, unanswerable and off-topic
/// questions of a gold set, and measures each on halves that it was not fitted on. Exits 3 when no
/// signal is fit.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exrail calibrate --gold packs/stability/gold.jsonl --collection stability
  exrail calibrate --collection stability --check
  exrail calibrate --gold gold.jsonl --collection docs --json")]
pub(crate) struct Calibrate {
    /// The gold set, JSON lines.
    #[arg(long, value_name = "FILE", required_unless_present = "check")]
    gold: Option<PathBuf>,
    /// The collection: a name, a folder, or NAME=DIR.
    #[arg(long, value_name = "NAME|DIR", default_value = "default")]
    collection: String,
    /// Fit nothing; say whether the stored calibration holds for this encoder, index and number of
    /// snippets, and with --gold for this gold set. Exits 3 when it does not.
    #[arg(long)]
    check: bool,
    /// Threads; one per physical core when absent.
    #[arg(long, value_name = "N", env = environment::THREADS)]
    threads: Option<usize>,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    sources: Sources,
}

impl Calibrate {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let gold = self.gold.as_deref().map(GoldSet::read).transpose()?;
        let spec = CollectionSpec::parse(&self.collection)?;
        let mut bars = Bars::new(*output);
        let found = self.sources.resolve(&self.encoder.encoder, Kind::Encoder, &mut bars)?;
        bars.clear();
        let backend =
            CpuBackend::new(CpuOptions { threads: self.threads, ..CpuOptions::default() })?;
        let encoder = load::load_encoder(backend, &found)?;
        if self.check {
            return check(*output, &spec, &*encoder, gold.as_ref());
        }
        let gold = gold.context("expected --gold FILE")?;
        let index = CollectionIndex::new(load::open(&spec, &*encoder)?, Arc::clone(&encoder));
        let before = stored(&spec.dir, bound_to(&index), Some(&gold));
        let fitted = fit(&index, &spec.dir, &gold, &mut bars)?;
        let shown = Shown { spec: &spec, gold: &gold, index: &index, before, fitted: &fitted };
        shown.print(*output)?;
        Ok(if fitted.deciding().is_some() { Ended::Done } else { Ended::NotPassed })
    }
}

/// How questions are searched for in production.
pub(crate) fn policy() -> AskPolicy {
    let mut policy = AskPolicy::default();
    policy.search.k = ASK_K;
    policy
}

/// Fits the gate and stores it.
pub(crate) fn fit(
    index: &CollectionIndex,
    dir: &Path,
    gold: &GoldSet,
    bars: &mut Bars,
) -> Result<CorpusCalibration> {
    let search = policy().search;
    let fitted = calibrate(gold, index, &**index.encoder(), &search, &mut |step| bars.probe(step))?;
    bars.clear();
    fitted.save(&paths::calibration(dir))?;
    Ok(fitted)
}

/// What a calibration has to fit: fingerprint of the encoder, hash of the index.
pub(crate) fn bound_to(index: &CollectionIndex) -> (&str, &str) {
    (index.encoder_fp(), index.index_hash())
}

/// What lies beside a collection.
pub(crate) enum Stored {
    /// Nothing.
    None,
    /// A calibration that holds.
    Valid(Box<CorpusCalibration>),
    /// One that does not, or no calibration at all.
    Void(CalibrationError),
}

impl Stored {
    fn status(&self) -> &'static str {
        match self {
            Stored::None => "none",
            Stored::Valid(_) => "valid",
            Stored::Void(_) => "void",
        }
    }

    fn reason(&self) -> Option<String> {
        match self {
            Stored::None | Stored::Valid(_) => None,
            Stored::Void(error) => Some(error.to_string()),
        }
    }
}

/// Reads what lies beside a collection and checks it against what it is bound to.
pub(crate) fn stored(dir: &Path, bound_to: (&str, &str), gold: Option<&GoldSet>) -> Stored {
    let path = paths::calibration(dir);
    if !path.exists() {
        return Stored::None;
    }
    let checked = CorpusCalibration::load(&path).and_then(|stored| {
        stored.check(bound_to.0, bound_to.1, ASK_K)?;
        if let Some(gold) = gold {
            stored.check_gold(gold)?;
        }
        Ok(stored)
    });
    match checked {
        Ok(stored) => Stored::Valid(Box::new(stored)),
        Err(error) => Stored::Void(error),
    }
}

/// Says whether what is stored holds. The collection is read without its own check of the encoder,
/// so that another encoder is a void calibration and no error.
fn check(
    output: Output,
    spec: &CollectionSpec,
    encoder: &dyn Encode,
    gold: Option<&GoldSet>,
) -> Result<Ended> {
    let collection = Collection::read(&spec.dir)
        .with_context(|| format!("collection `{}` in {}", spec.name, spec.dir.display()))?;
    let found = stored(&spec.dir, (encoder.fingerprint(), collection.index_hash()), gold);
    let deciding = match &found {
        Stored::Valid(calibration) => calibration.deciding(),
        Stored::None | Stored::Void(_) => None,
    };
    output.value(&json!({
        "collection": spec.name,
        "status": found.status(),
        "reason": found.reason(),
        "deciding": deciding,
    }));
    let anew = format!("fit one with `exrail calibrate --gold FILE --collection {}`", spec.name);
    Ok(match &found {
        Stored::Valid(_) => {
            output.line(format!("valid: {}", in_words(deciding)));
            Ended::Done
        }
        Stored::None => {
            output.line(format!("none: {anew}"));
            Ended::NotPassed
        }
        Stored::Void(error) => {
            output.line(format!("void: {error}; {anew}"));
            Ended::NotPassed
        }
    })
}

fn in_words(deciding: Option<Signal>) -> String {
    match deciding {
        Some(Signal::Encoder) => "ΔS decides".to_owned(),
        Some(Signal::Lexical) => "the question's words decide".to_owned(),
        Some(Signal::Joint) => "ΔS and the question's words decide together".to_owned(),
        None => "encoder_unfit, and no other signal is fit: the gate refuses nothing".to_owned(),
    }
}

/// A fit with everything that is printed of it.
struct Shown<'a> {
    spec: &'a CollectionSpec,
    gold: &'a GoldSet,
    index: &'a CollectionIndex,
    before: Stored,
    fitted: &'a CorpusCalibration,
}

impl Shown<'_> {
    fn print(&self, output: Output) -> Result<()> {
        output.value(&json!({
            "collection": self.spec.name,
            "path": paths::calibration(&self.spec.dir),
            "before": { "status": self.before.status(), "reason": self.before.reason() },
            "circular": self.is_circular(),
            "deciding": self.fitted.deciding(),
            "calibration": serde_json::to_value(self.fitted).context("calibration")?,
        }));
        self.head(output);
        self.signals(output);
        self.wordings(output);
        output.line(format!("gate          {}", in_words(self.fitted.deciding())));
        Ok(())
    }

    fn is_circular(&self) -> bool {
        // The collection refuses a search with any other encoder.
        self.index.encoder_fp() == self.fitted.encoder_fp
    }

    fn head(&self, output: Output) {
        let id = |text: &str| text.chars().take(12).collect::<String>();
        let (fitted, gold) = (self.fitted, self.gold);
        let n = |kind| gold.of_kind(kind).count();
        output.line(format!(
            "collection    {}, {} chunks, {} per question [{}]",
            self.spec.name,
            self.index.n_chunks(),
            fitted.k,
            id(&fitted.index_hash)
        ));
        let circular = if self.is_circular() { "; circular: the index ranks by it" } else { "" };
        let name = self.index.encoder().facts().name;
        output.line(format!("encoder       {name} [{}]{circular}", id(&fitted.encoder_fp)));
        output.line(format!(
            "gold set      {} answerable (A), {} unanswerable (U), {} off topic (O), {} readings \
             without a value [{}]",
            n(GoldKind::Answerable),
            n(GoldKind::Unanswerable),
            n(GoldKind::OffTopic),
            fitted.n_without_evidence,
            id(&fitted.gold_sha256)
        ));
        let before = match &self.before {
            Stored::None => "none".to_owned(),
            Stored::Valid(_) => "a valid one, fitted anew".to_owned(),
            Stored::Void(error) => error.to_string(),
        };
        output.line(format!("before        {before}"));
    }

    fn signals(&self, output: Output) {
        let row = |name: &str, cell: &dyn Fn(Signal) -> String| {
            let cells = SIGNALS.map(|signal| format!("{:>22}", cell(signal))).concat();
            output.line(format!("{name:<24}{cells}"));
        };
        let number = |of: &dyn Fn(&Calibration) -> String, signal| {
            self.fitted.map(signal).calibration().map_or_else(|| "–".to_owned(), of)
        };
        output.line("");
        row("", &|signal| signal.to_string());
        row("fitness", &|signal| match self.fitted.map(signal) {
            FamilyFit::NotCalibrated { .. } => "not calibrated".to_owned(),
            FamilyFit::Fitted(map) if map.is_fit() => "fit".to_owned(),
            FamilyFit::Fitted(_) => "unfit".to_owned(),
        });
        row("t_pass", &|signal| number(&|map| format!("{:.3}", map.t_pass), signal));
        row("t_fail", &|signal| number(&|map| format!("{:.3}", map.t_fail), signal));
        row("t_rand", &|signal| number(&|map| format!("{:.3}", map.t_rand), signal));
        row("AUROC A, U", &|signal| number(&|map| format!("{:.3}", map.auroc), signal));
        row("A in between", &|signal| number(&|map| percent(map.share_between), signal));
        row("AUROC A, A masked", &|signal| {
            self.fitted
                .masked(signal)
                .map_or_else(|| "–".to_owned(), |it| format!("{:.3}", it.auroc))
        });
        let half = |signal, of: &dyn Fn(&HeldOut) -> String| {
            self.fitted.held_out(signal).map_or_else(|| "too few".to_owned(), of)
        };
        for (name, half_of) in [("both halves", None), ("half 1", Some(0)), ("half 0", Some(1))] {
            let of = |it: &HeldOut| half_of.map_or(it.pooled, |at: usize| it.halves[at]);
            let let_in = |it: &HeldOut| rate(&of(it).let_in);
            row(&format!("let in, {name}"), &|signal| half(signal, &let_in));
            let lost = |it: &HeldOut| rate(&of(it).lost);
            row(&format!("lost, {name}"), &|signal| half(signal, &lost));
        }
        let masked = |it: &HeldOut| it.pooled.masked_let_in.as_ref().map_or("–".to_owned(), rate);
        row("masked let in", &|signal| half(signal, &masked));
        let worded = |it: &HeldOut| it.pooled.lost_worded.as_ref().map_or("–".to_owned(), rate);
        row("other wordings lost", &|signal| half(signal, &worded));
        let splits = |it: &HeldOut| {
            let s = &it.splits;
            format!("{}, {}", percent(s.let_in_mean), percent(s.lost_mean))
        };
        row("mean of 20 splits", &|signal| half(signal, &splits));
        for signal in SIGNALS {
            if let Some(why) = why_unfit(self.fitted.map(signal)) {
                output.line(format!("{signal:<14}{why}"));
            }
        }
        output.line("");
    }

    /// The map of pairs of texts, which the report uses for ΔS of answers and of wordings.
    fn wordings(&self, output: Output) {
        let words = match (&self.fitted.tt, why_unfit(&self.fitted.tt)) {
            (_, Some(why)) => why,
            (FamilyFit::Fitted(map), None) => format!(
                "fit: pass at {:.3}, fail at {:.3}, off topic at {:.3}, AUROC {:.3}, {} in between",
                map.t_pass,
                map.t_fail,
                map.t_rand,
                map.auroc,
                percent(map.share_between)
            ),
            (FamilyFit::NotCalibrated { reason }, None) => reason.clone(),
        };
        output.line(format!("text and text {words}"));
    }
}

/// Why a map may not gate.
fn why_unfit(fit: &FamilyFit) -> Option<String> {
    match fit {
        FamilyFit::NotCalibrated { reason } => Some(format!("not calibrated: {reason}")),
        FamilyFit::Fitted(map) => unfit_in_words(map).map(|why| format!("unfit: {why}")),
    }
}

/// `10/130 7.7% (4–14)`: count, share and Wilson's interval in percent.
fn rate(rate: &Rate) -> String {
    let Rate { n, of, share, interval } = rate;
    let (low, high) = (100.0 * interval.low, 100.0 * interval.high);
    format!("{n}/{of} {} ({low:.0}–{high:.0})", percent(*share))
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_fits_its_column() {
        let interval = exrail_metrics::Interval { low: 0.9, high: 1.0 };
        let said = rate(&Rate { n: 293, of: 293, share: 1.0, interval });
        assert_eq!(said, "293/293 100.0% (90–100)");
    }
}
