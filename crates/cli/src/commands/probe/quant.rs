//! `exrail probe quant`: a model rounded to int8 and int4 against itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use exrail_checkpoint::Checkpoint;
use exrail_engine::{
    EngineHandle, StandsOut, WeightLoss, checkpoint_losses, rounding_losses, standing_out,
};
use exrail_hub::Kind;
use exrail_server::{Services, oracle::EngineOracle};
use exrail_tensor::IntGrid;
use exrail_text::Specials;
use exrail_verify::{
    FidelityBaseline, QuantMode, QuantReport, QuantText, RowOracle, Verdict, quant_probe,
};
use serde::Serialize;
use serde_json::json;

use super::ProbedModel;
use crate::{
    Ended,
    options::{ActivationOption, EngineArgs, KvOption, QuantOption},
    output::Output,
    pack::sample_text,
    progress::Bars,
};

/// Matrices that are shown.
const WORST: usize = 5;
/// Tokens of a page of the KV pool.
const PAGE_TOKENS: usize = 256;

#[derive(Debug, Args)]
pub(super) struct QuantProbe {
    #[command(flatten)]
    model: ProbedModel,
    /// Text to read, UTF-8; several are reported apart. The sample corpus when absent.
    #[arg(long, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Tokens of each text, at most.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    tokens: usize,
    /// Tokens of a sequence, which begins anew.
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,
    /// What an earlier run gave with --json: divergences may be a fifth larger, and a model that the limits do not
    /// hold for passes by that alone.
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Another checkpoint of the same vocabulary to compare with the model, such as its quantised folder.
    #[arg(long, value_name = "NAME|PATH")]
    against: Option<String>,
    /// What is compared with the stored weights in exact arithmetic.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "as-served,int8,int4")]
    modes: Vec<ModeOption>,
}

/// What the model is loaded as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum ModeOption {
    /// As `exrail serve` would with the same options.
    AsServed,
    /// Matrices rounded to int8.
    Int8,
    /// Matrices of the layers rounded to int4, embedding and head to int8.
    Int4,
}

impl ModeOption {
    pub(super) fn mode(self) -> QuantMode {
        match self {
            ModeOption::AsServed => QuantMode::AsServed,
            ModeOption::Int8 => QuantMode::Int8,
            ModeOption::Int4 => QuantMode::Int4,
        }
    }

    pub(super) fn quant(self) -> Option<QuantOption> {
        match self {
            ModeOption::AsServed => None,
            ModeOption::Int8 => Some(QuantOption::Int8),
            ModeOption::Int4 => Some(QuantOption::Int4),
        }
    }
}

/// What is known of the stored weights.
#[derive(Serialize)]
pub(super) struct Reference {
    /// `as_loaded` where the file holds blocks, whose values are then the reference; else its format.
    reference: String,
    /// Format of most weights.
    format: String,
    /// Parameters.
    parameters: u64,
}

impl Reference {
    pub(super) fn of(is_packed: bool, format: String, parameters: u64) -> Self {
        let reference = if is_packed { "as_loaded".to_owned() } else { format.to_lowercase() };
        Self { reference, format, parameters }
    }

    pub(super) fn in_words(&self) -> String {
        if self.reference == "as_loaded" {
            format!("as loaded: the values of the {} blocks, no 16-bit weights", self.format)
        } else {
            format!("the stored {} weights", self.format)
        }
    }
}

impl QuantProbe {
    pub(super) fn run(&self, output: Output) -> Result<Ended> {
        if self.window < 2 || self.tokens < self.window {
            let (window, tokens) = (self.window, self.tokens);
            bail!("--window {window}: expected 2 to --tokens, which is {tokens}");
        }
        if self.model.engine.quant.is_some() {
            bail!("--quant: expected none, because both widths are compared; choose with --modes");
        }
        let baseline = self.baseline.as_deref().map(read_baseline).transpose()?;
        let mut bars = Bars::new(output);
        let path = self.model.sources.resolve(self.model.name(), Kind::Generator, &mut bars)?.path;
        bars.clear();
        let (parameters, is_packed) = weigh(&path)?;
        let (activation, kv) = (ActivationOption::F32, KvOption::F32);
        let exact = EngineArgs { activation, kv, ..self.engine(None) };
        let reference = self.model.boot_with(output, exact)?;
        let mut modes = BTreeMap::new();
        for mode in self.modes.iter().collect::<BTreeSet<_>>() {
            let services = self.model.boot_with(output, self.engine(mode.quant()))?;
            modes.insert(mode.mode(), services);
        }
        if let Some(against) = &self.against {
            modes.insert(QuantMode::Against, self.other(against, &reference, output)?);
        }
        let texts = self.texts(&reference.engine)?;
        let mut report = compare(&reference.engine, &modes, &texts, parameters, self.tokens)?;
        if let Some(baseline) = &baseline {
            report.compare_with(baseline)?;
        }
        let format = reference.engine.facts().quant.clone();
        let about = Reference::of(is_packed, format, parameters);
        let mut losses = losses(&path, &modes)?;
        if let Some(other) = self.other_path(output)? {
            losses.insert(QuantMode::Against, checkpoint_losses(&path, &other)?);
        }
        self.tell(&report, &about, &losses, &reference, output);
        modes.values().chain([&reference]).for_each(|services| services.engine.shutdown());
        Ok(if report.verdict == Verdict::Pass { Ended::Done } else { Ended::NotPassed })
    }

    /// Another checkpoint, whose tokens have to be the same.
    fn other(&self, name: &str, reference: &Services, output: Output) -> Result<Services> {
        let model = ProbedModel { probed: Some(name.to_owned()), ..self.model.clone() };
        let services = model.boot_with(output, self.engine(None))?;
        let [expected, found] =
            [reference, &services].map(|of| of.engine.tokenizer().fingerprint());
        if expected != found {
            services.engine.shutdown();
            bail!(
                "--against {name}: expected the vocabulary of {}, {expected}, found {found}; only models that read \
                 the same tokens can be compared",
                self.model.name()
            );
        }
        Ok(services)
    }

    /// Where that is.
    fn other_path(&self, output: Output) -> Result<Option<PathBuf>> {
        let Some(name) = &self.against else { return Ok(None) };
        let mut bars = Bars::new(output);
        let path = self.model.sources.resolve(name, Kind::Generator, &mut bars)?.path;
        bars.clear();
        Ok(Some(path))
    }

    /// The options as given; the cache holds one sequence unless it is to hold more.
    fn engine(&self, quant: Option<QuantOption>) -> EngineArgs {
        EngineArgs {
            quant,
            rounds_blocks: quant.is_some(),
            kv_pages: self.model.engine.kv_pages.or(Some(self.window.div_ceil(PAGE_TOKENS) + 1)),
            ..self.model.engine.clone()
        }
    }

    fn texts(&self, engine: &EngineHandle) -> Result<Vec<QuantText>> {
        if self.text.is_empty() {
            return Ok(vec![self.cut("sample corpus".to_owned(), &sample_text(), engine)?]);
        }
        let read = |file: &PathBuf| {
            let shown = file.display().to_string();
            let text = std::fs::read_to_string(file).with_context(|| format!("text {shown}"))?;
            self.cut(shown, &text, engine)
        };
        self.text.iter().map(read).collect()
    }

    /// Whole windows of a text, or what there is of it.
    fn cut(&self, name: String, text: &str, engine: &EngineHandle) -> Result<QuantText> {
        let tokenizer = engine.tokenizer();
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let ids = tokenizer.encode(text, Specials::AsText)?;
        let own = self.window - usize::from(bos.is_some());
        if ids.len() < own {
            bail!(
                "text {name}: expected at least --window {} tokens, found {}; lower --window or give a longer text",
                self.window,
                ids.len()
            );
        }
        let windows = ids.chunks_exact(own).take(self.tokens / self.window);
        let sequence = |ids: &[u32]| bos.iter().chain(ids).copied().collect();
        Ok(QuantText { name, sequences: windows.map(sequence).collect() })
    }

    fn tell(
        &self,
        report: &QuantReport,
        about: &Reference,
        losses: &BTreeMap<QuantMode, Vec<WeightLoss>>,
        services: &Services,
        output: Output,
    ) {
        let device = &services.engine.facts().backend;
        output.value(&json!({
            "model": services.model_name,
            "model_sha256": services.engine.facts().model_sha256.wait().ok(),
            "device": device,
            "activation": self.model.engine.activation,
            "window": self.window,
            "weights": about,
            "fidelity": report,
            "rounding": losses,
            "stand_out": stand_out(losses),
        }));
        let name = &services.model_name;
        output
            .line(format!("model              {name}, {} parameters, {device}", about.parameters));
        output.line(format!("reference          {}; exact arithmetic", about.in_words()));
        for line in lines(report, losses) {
            output.line(line);
        }
    }
}

/// Reads what `--json` printed.
fn read_baseline(file: &Path) -> Result<FidelityBaseline> {
    let shown = || format!("baseline {}", file.display());
    let text = std::fs::read_to_string(file).with_context(shown)?;
    let mut report: serde_json::Value = serde_json::from_str(&text).with_context(shown)?;
    let fidelity = report.get_mut("fidelity").map(serde_json::Value::take).unwrap_or_default();
    serde_json::from_value(fidelity)
        .with_context(|| format!("{}: expected what `exrail probe quant --json` prints", shown()))
}

/// Parameters of a checkpoint, and whether some are in blocks.
pub(in crate::commands) fn weigh(path: &Path) -> Result<(u64, bool)> {
    let checkpoint = Checkpoint::open(path)?;
    let tensors = checkpoint.tensors();
    let (mut parameters, mut is_packed) = (0, false);
    for info in tensors.names().filter_map(|name| tensors.info(name)) {
        parameters += info.shape.iter().map(|&n| n as u64).product::<u64>();
        is_packed |= info.dtype.is_quantised();
    }
    Ok((parameters, is_packed))
}

fn compare(
    reference: &EngineHandle,
    modes: &BTreeMap<QuantMode, Services>,
    texts: &[QuantText],
    parameters: u64,
    n_tokens: usize,
) -> Result<QuantReport> {
    let oracles: BTreeMap<QuantMode, EngineOracle<'_>> =
        modes.iter().map(|(&mode, of)| (mode, EngineOracle::new(&of.engine))).collect();
    let rows: BTreeMap<QuantMode, &RowOracle<'_>> =
        oracles.iter().map(|(&mode, oracle)| (mode, oracle as &RowOracle<'_>)).collect();
    let all = n_tokens * texts.len();
    let mut told = |n| tracing::info!("{n} of at most {all} tokens compared");
    Ok(quant_probe(&EngineOracle::new(reference), &rows, texts, parameters, &mut told)?)
}

/// Matrices that lost more than their peers in other layers, by mode.
fn stand_out(losses: &BTreeMap<QuantMode, Vec<WeightLoss>>) -> BTreeMap<QuantMode, Vec<StandsOut>> {
    losses.iter().map(|(&mode, losses)| (mode, standing_out(losses))).collect()
}

/// What rounding costs each matrix, of the modes that round.
fn losses(
    path: &Path,
    modes: &BTreeMap<QuantMode, Services>,
) -> Result<BTreeMap<QuantMode, Vec<WeightLoss>>> {
    let mut losses = BTreeMap::new();
    for (mode, grid) in [(QuantMode::Int8, IntGrid::Int8), (QuantMode::Int4, IntGrid::Int4)] {
        if modes.contains_key(&mode) {
            losses.insert(mode, rounding_losses(path, grid)?);
        }
    }
    Ok(losses)
}

/// The matrices that lost most, and those that lost more than their peers.
fn matrix_lines(mode: QuantMode, losses: &[WeightLoss]) -> Vec<String> {
    let mut worst: Vec<(f64, &str)> =
        losses.iter().filter_map(|loss| Some((loss.sqnr_db?, loss.tensor.as_str()))).collect();
    worst.sort_by(|a, b| a.0.total_cmp(&b.0));
    let shown = worst.iter().take(WORST).map(|(db, tensor)| format!("{tensor} {db:.1} dB"));
    let mut lines = vec![format!(
        "{:<19}signal to noise of the matrices, worst of {}: {}",
        mode.name(),
        worst.len(),
        shown.collect::<Vec<_>>().join(", ")
    )];
    for found in standing_out(losses).iter().take(WORST) {
        lines.push(format!(
            "                   stands out: {}; look at its scales",
            found.in_words()
        ));
    }
    lines
}

fn lines(report: &QuantReport, losses: &BTreeMap<QuantMode, Vec<WeightLoss>>) -> Vec<String> {
    let noise = report.noise;
    let mut lines = vec![format!(
        "noise floor        mean {:.1e} nats, at most {:.1e}: the reference row by row and in chunks",
        noise.kld_mean, noise.kld_max
    )];
    for text in &report.texts {
        let n = text.modes.values().next().map_or(0, |summary| summary.sequences);
        lines.push(format!(
            "text               {}: {} tokens in {n} sequences",
            text.name, text.tokens
        ));
        lines.push(format!(
            "                   {:<13}{:>8} {:>9} {:>8} {:>7} {:>7} {:>7} {:>7} {:>18} {:>7}",
            "divergence",
            "mean",
            "± s.e.",
            "median",
            "p99",
            "p99.9",
            "max",
            "top-1",
            "ln PPL ratio",
            "RMS Δp"
        ));
        let named = text.modes.iter().map(|(mode, summary)| (mode.name(), summary));
        let between = text.int4_vs_int8.iter().map(|summary| ("int4 vs int8", summary));
        for (name, of) in named.chain(between) {
            let error = |se: Option<f64>| se.map_or("-".to_owned(), |se| format!("{se:.1e}"));
            lines.push(format!(
                "                   {name:<13}{:>8.4} {:>9} {:>8.4} {:>7.3} {:>7.3} {:>7.2} {:>5.1} % {:>+8.4} ± {:>7} {:>5.1} %",
                of.kld_mean, error(of.kld_mean_se), of.kld_median, of.kld_p99, of.kld_p999, of.kld_max,
                100.0 * of.top1, of.ln_ppl_ratio, error(of.ln_ppl_ratio_se), 100.0 * of.rms_dp
            ));
        }
    }
    lines.extend(losses.iter().flat_map(|(&mode, losses)| matrix_lines(mode, losses)));
    for gate in &report.gates {
        let fail = gate.fail.map_or(String::new(), |fail| format!(", fails from {fail}"));
        lines.push(format!(
            "gate               {} {} on {}: {:.4}, passes at {}{fail}: {}",
            gate.mode.name(),
            gate.metric,
            gate.text,
            gate.value,
            gate.pass,
            gate.status
        ));
    }
    for of in &report.regressions {
        lines.push(format!(
            "baseline           {} on {}: {:.4}, was {:.4}, may be a fifth more: {}",
            of.mode.name(),
            of.text,
            of.kld_mean,
            of.before,
            of.status
        ));
    }
    if report.ordered == Some(false) {
        lines.push("order              int4 is nearer to the reference than int8: files or grids were mixed up".into());
    }
    let small = report.gates.iter().any(|gate| gate.status == exrail_verify::Status::NotCalibrated);
    if small && report.regressions.is_empty() {
        lines.push("                   the limits are for models from 3 billion parameters; compare this one with its past (--baseline)".into());
    }
    lines.push(format!("verdict            {}", report.verdict));
    lines
}
