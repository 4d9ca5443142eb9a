//! `exrail probe lambda`: whether a model rounded to int8 and int4 still answers the same over the same evidence.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Result, bail};
use clap::Args;
use exrail_hub::Kind;
use exrail_retrieval::Encode;
use exrail_server::{
    BootBoard, Services,
    pipeline::{ASK_K, ASK_MAX_TOKENS, EngineGenerate, ask_sampling},
};
use exrail_verify::{
    AnswerScale, CorpusCalibration, EvidenceGate, GoldSet, LambdaModes, LambdaModesOptions,
    LambdaModesReport, ModeSystem, ModesProgress, QuantMode, Retrieve, Verdict,
};
use serde::Serialize;
use serde_json::json;

use super::{
    ProbedModel,
    quant::{ModeOption, Reference, weigh},
};
use crate::{
    Ended,
    commands::{calibrate::policy, verify::Calibrate},
    load::{AsItIs, Boot, CollectionSpec, Prepare},
    options::{EncoderArgs, EngineArgs},
    output::{Output, explain},
    paths,
    progress::Bars,
};

#[derive(Debug, Args)]
pub(super) struct LambdaProbe {
    #[command(flatten)]
    model: ProbedModel,
    /// The gold set, JSON lines.
    #[arg(long, value_name = "FILE")]
    gold: PathBuf,
    /// The collection: a name, a folder, or NAME=DIR.
    #[arg(long, value_name = "NAME|DIR", default_value = "default")]
    collection: String,
    /// Fit the scale of ΔS anew, even when a valid one is stored.
    #[arg(long)]
    calibrate: bool,
    /// Answerable questions to ask; a pass needs at least 50.
    #[arg(long, value_name = "N", default_value_t = LambdaModesOptions::default().n_items)]
    items: usize,
    /// Seed that chooses them.
    #[arg(long, value_name = "N", default_value_t = LambdaModesOptions::default().seed)]
    sample_seed: u64,
    /// What is compared; as-served is what the others are compared with.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "as-served,int8,int4")]
    modes: Vec<ModeOption>,
    #[command(flatten)]
    encoder: EncoderArgs,
}

/// What stays of the reference when its engine is gone.
struct Served {
    model: String,
    model_sha256: Option<String>,
    device: String,
    format: String,
    encoder: Arc<dyn Encode>,
    index_hash: String,
}

/// What was told before the bulk was asked.
#[derive(Clone, Copy, Debug, Serialize)]
struct Planned {
    /// Replies, at most.
    generations: usize,
    /// Seconds at the pace of single answers; none where the gate refused them.
    seconds: Option<f64>,
}

/// Bars and the plan, while modes are asked.
struct Watch {
    output: Output,
    bars: Bars,
    n_modes: usize,
    planned: Option<Planned>,
}

impl LambdaProbe {
    pub(super) fn run(&self, output: Output) -> Result<Ended> {
        let others = self.others()?;
        let gold = GoldSet::read(&self.gold)?;
        let spec = CollectionSpec::parse(&self.collection)?;
        let path = self.path(output)?;
        let mut watch =
            Watch { output, bars: Bars::new(output), n_modes: 1 + others.len(), planned: None };
        let prepare = Calibrate { gold: &gold, anew: self.calibrate };
        let services = self.boot(&spec, &prepare, self.engine(ModeOption::AsServed), output)?;
        let served = Served::of(&services, &spec)?;
        let calibration = CorpusCalibration::load(&paths::calibration(&spec.dir))
            .ok()
            .filter(|of| of.check(served.encoder.fingerprint(), &served.index_hash, ASK_K).is_ok());
        let index = services.collections[&spec.name].index();
        let gate = EvidenceGate::new(calibration.as_ref(), index)?;
        let options = LambdaModesOptions {
            policy: policy(),
            n_items: self.items,
            seed: self.sample_seed,
            ..LambdaModesOptions::default()
        };
        let mut probe = with_system(&services, &spec, |system| {
            let reference = (QuantMode::AsServed, system);
            LambdaModes::begin(reference, &gold, &gate, options, &mut |step| watch.told(step))
        })?;
        // No two models are loaded at the same time.
        services.engine.shutdown();
        drop(services);
        for mode in others {
            self.ask(mode, &spec, &mut probe, &mut watch);
        }
        watch.bars.clear();
        let bound = (served.index_hash.as_str(), ASK_K);
        let report =
            probe.report(&mut AnswerScale::new(&*served.encoder, calibration.as_ref(), bound))?;
        self.tell(&report, &served, (&path, &spec, &gold), watch.planned, output)?;
        Ok(if report.verdict == Verdict::Pass { Ended::Done } else { Ended::NotPassed })
    }

    /// The modes beside the reference, in order.
    fn others(&self) -> Result<Vec<ModeOption>> {
        if self.model.engine.quant.is_some() {
            bail!("--quant: expected none, because both widths are compared; choose with --modes");
        }
        let mut modes: BTreeSet<ModeOption> = self.modes.iter().copied().collect();
        if !modes.remove(&ModeOption::AsServed) || modes.is_empty() {
            bail!(
                "--modes: expected as-served, which the others are compared with, and at least one other, found {}",
                self.modes.iter().map(|mode| mode.mode().name()).collect::<Vec<_>>().join(",")
            );
        }
        Ok(modes.into_iter().collect())
    }

    fn path(&self, output: Output) -> Result<PathBuf> {
        let mut bars = Bars::new(output);
        let found = self.model.sources.resolve(self.model.name(), Kind::Generator, &mut bars)?;
        bars.clear();
        Ok(found.path)
    }

    /// Asks one mode; one that cannot be loaded is not available.
    fn ask(
        &self,
        mode: ModeOption,
        spec: &CollectionSpec,
        probe: &mut LambdaModes<'_>,
        watch: &mut Watch,
    ) {
        match self.boot(spec, &AsItIs, self.engine(mode), watch.output) {
            Ok(services) => {
                with_system(&services, spec, |system| {
                    probe.add(mode.mode(), system, &mut |step| watch.told(step));
                });
                services.engine.shutdown();
            }
            Err(error) => probe.leave_out(mode.mode(), explain(&error)),
        }
    }

    /// The options as given, for one mode.
    fn engine(&self, mode: ModeOption) -> EngineArgs {
        let quant = mode.quant();
        EngineArgs { quant, rounds_blocks: quant.is_some(), ..self.model.engine.clone() }
    }

    /// Each mode gets an encoder and an index of its own, so that what it retrieves is what a server of that mode would.
    fn boot(
        &self,
        spec: &CollectionSpec,
        prepare: &dyn Prepare,
        mut engine: EngineArgs,
        output: Output,
    ) -> Result<Services> {
        self.model.name().clone_into(&mut engine.model);
        Boot {
            board: &Arc::new(BootBoard::new()),
            keys: None,
            retries: 0,
            declared: None,
            traces: None,
            output,
            sources: &self.model.sources,
            engine: &engine,
            encoder: Some(&self.encoder),
            collections: vec![spec.clone()],
            prepare,
            in_place_of: None,
        }
        .run()
    }

    fn tell(
        &self,
        report: &LambdaModesReport,
        served: &Served,
        (path, spec, gold): (&Path, &CollectionSpec, &GoldSet),
        planned: Option<Planned>,
        output: Output,
    ) -> Result<()> {
        let (parameters, is_packed) = weigh(path)?;
        let reference = Reference::of(is_packed, served.format.clone(), parameters);
        output.value(&json!({
            "model": served.model,
            "model_sha256": served.model_sha256,
            "device": served.device,
            "activation": self.model.engine.activation,
            "collection": spec.name,
            "encoder_fp": served.encoder.fingerprint(),
            "index_hash": served.index_hash,
            "gold_sha256": gold.sha256(),
            "sample_seed": self.sample_seed,
            "weights": reference,
            "planned": planned,
            "lambda": report.to_json()?,
        }));
        output.line(format!(
            "model              {}, {parameters} parameters, {}",
            served.model, served.device
        ));
        output.line(format!("reference          {}, as it is served", reference.in_words()));
        report.lines().into_iter().for_each(|line| output.line(line));
        Ok(())
    }
}

impl Served {
    fn of(services: &Services, spec: &CollectionSpec) -> Result<Served> {
        let (facts, index) = (services.engine.facts(), services.collections[&spec.name].index());
        Ok(Served {
            model: services.model_name.clone(),
            model_sha256: facts.model_sha256.wait().ok().map(|hash| hash.to_string()),
            device: facts.backend.clone(),
            format: facts.quant.clone(),
            encoder: Arc::clone(index.encoder()),
            index_hash: index.index_hash().to_owned(),
        })
    }
}

/// Calls with the generator and the index of what was booted.
fn with_system<T>(
    services: &Services,
    spec: &CollectionSpec,
    call: impl FnOnce(ModeSystem<'_>) -> T,
) -> T {
    let generator = EngineGenerate::new(&services.engine, ask_sampling(), ASK_MAX_TOKENS);
    call(ModeSystem { generator: &generator, index: services.collections[&spec.name].index() })
}

impl Watch {
    fn told(&mut self, step: ModesProgress) {
        match step {
            ModesProgress::Planned { per_mode, live, single_answer_s } => {
                let generations = self.n_modes * per_mode + live;
                #[expect(clippy::cast_precision_loss, reason = "a probe has few replies")]
                let seconds = single_answer_s.map(|one| one * generations as f64);
                self.planned = Some(Planned { generations, seconds });
                let at_most = seconds.map_or(String::new(), |seconds| {
                    format!(", {seconds:.0} s if each took as long as a single answer")
                });
                self.bars.clear();
                self.output.line(format!(
                    "plan               at most {generations} replies in {} modes{at_most}",
                    self.n_modes
                ));
            }
            ModesProgress::Asked { mode, n_done, n_total } => {
                self.bars.bench(&format!("ask {}", mode.name()), n_done, n_total);
            }
        }
    }
}
