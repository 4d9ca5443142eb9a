//! The boot: every phase from a name to services that have proved themselves, for all commands. Which
//! phases there are and in which order they run is `exrail_server::BootPlan`'s to say.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use anyhow::{Context, Result, anyhow, bail};
use exrail_checkpoint::{CheckpointFiles, SplitName};
use exrail_engine::{
    Admission, Engine, EngineHandle, Loaded, Need, ROUND_TRIP, SentenceEncoder, WarmUpPlan,
    WarmUpReport, load_admitted, warm_up_told,
};
use exrail_hub::{HubError, Kind, Resolved};
use exrail_kernels::{Backend, DeviceCounters};
use exrail_kernels_cpu::CpuBackend;
use exrail_retrieval::{Collection, Encode};
use exrail_server::{
    BootBoard, BootOwner, BootPlan, BootState, BootStatus, Pace, Phase, PhaseRecord, Retrieval,
    ServedEncoder, Services, TraceLog,
    pipeline::{ASK_K, Asker},
    sentinel,
};
use exrail_text::{Specials, Tokenizer};
use exrail_verify::{
    CollectionIndex, CorpusCalibration, DeltaSGate, EvidenceGate, LiveChecker, Retrieve, Signal,
};
use serde_json::{Value, json};

use crate::{
    device::{Device, Job, Measured},
    memory,
    options::{EncoderArgs, EngineArgs, Sources},
    output::{Output, explain},
    paths,
    preflight::{Compared, Declared},
    progress::Bars,
    swap::InPlaceOf,
};

/// A collection to open.
#[derive(Clone, Debug)]
pub(crate) struct CollectionSpec {
    /// The name in requests.
    pub(crate) name: String,
    /// Its folder.
    pub(crate) dir: PathBuf,
}

impl CollectionSpec {
    /// Reads `NAME`, `DIR` or `NAME=DIR`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        if let Some((name, dir)) = text.split_once('=') {
            return Ok(Self { name: name.into(), dir: dir.into() });
        }
        let dir = paths::collection(text)?;
        let name = dir.file_name().with_context(|| format!("collection `{text}`: no name"))?;
        Ok(Self { name: name.to_string_lossy().into_owned(), dir })
    }
}

/// What to boot.
pub(crate) struct Boot<'a> {
    pub(crate) board: &'a Arc<BootBoard>,
    pub(crate) output: Output,
    /// What keys there are; none where nobody can ask from outside.
    pub(crate) keys: Option<&'static str>,
    /// Further attempts when a model could not be fetched.
    pub(crate) retries: u32,
    /// What is declared of the generator.
    pub(crate) declared: Option<&'a Declared>,
    /// Where it is stamped that mismatches were overlooked.
    pub(crate) traces: Option<&'a TraceLog>,
    pub(crate) sources: &'a Sources,
    pub(crate) engine: &'a EngineArgs,
    /// None: no encoder, no collections.
    pub(crate) encoder: Option<&'a EncoderArgs>,
    pub(crate) collections: Vec<CollectionSpec>,
    pub(crate) prepare: &'a dyn Prepare,
    /// Who has the place on the device; none where it is free.
    pub(crate) in_place_of: Option<InPlaceOf<'a>>,
}

/// What a command does between the phases.
pub(crate) trait Prepare {
    /// Whether it makes something before it is opened.
    fn retrieval(&self) -> Retrieval {
        Retrieval::AsItIs
    }

    /// When the encoder is loaded, before the collections are opened; returns a line for people.
    fn corpus(&self, _encoder: &dyn Encode, _bars: &mut Bars) -> Result<String> {
        Ok(String::new())
    }

    /// When a collection is open, before its gate is set.
    fn calibration(&self, _index: &CollectionIndex, _dir: &Path, _bars: &mut Bars) -> Result<()> {
        Ok(())
    }
}

/// Takes everything as it lies on disk.
pub(crate) struct AsItIs;

impl Prepare for AsItIs {}

impl Boot<'_> {
    /// The phases that this boot runs.
    pub(crate) fn plan(&self) -> Result<BootPlan> {
        let retrieval = self.encoder.map_or(Retrieval::Without, |_| self.prepare.retrieval());
        Ok(BootPlan::of_generator(retrieval, self.keys.is_some())?)
    }

    /// Runs every phase; the services have answered the sentinel when this returns.
    pub(crate) fn run(&self) -> Result<Services> {
        let pace = Pace { patience: self.engine.boot_patience, ..Pace::default() };
        let output = self.output;
        let owner = self.board.own(self.plan()?, pace, move |status| give_up(output, status))?;
        loop {
            let attempt = Attempt { boot: self, owner: &owner };
            match attempt.run() {
                Err(error) if may_pass(&error) && self.board.status().attempt <= self.retries => {
                    self.output.note(format!("boot: {}; trying again", explain(&error)));
                    if !owner.again(self.retries) {
                        return Err(error);
                    }
                }
                ended => return ended,
            }
        }
    }
}

/// Ends the process of a boot whose time is up: the thread in it hangs, and nothing can end that alone.
fn give_up(output: Output, status: &BootStatus) {
    let (phase, reason) = (
        status.phase().name(),
        match &status.state {
            BootState::Failed { reason, .. } | BootState::Retrying { reason, .. } => {
                reason.as_str()
            }
            BootState::Starting { .. } | BootState::Ready { .. } => "expected to have failed",
        },
    );
    output.error(&anyhow!("boot phase `{phase}`: {reason}\n  {}", status.dump().join("\n  ")));
    std::process::exit(1);
}

/// Makes what the first request for a structured answer would wait for. A model whose vocabulary cannot be
/// constrained is served all the same, and such requests are refused by name.
fn grammars(engine: &EngineHandle) -> String {
    match engine.grammars().and_then(|compiler| compiler.prepare()) {
        Ok(()) => format!("masks over {} tokens", engine.facts().vocab_len),
        Err(error) => format!("not available: {error}"),
    }
}

/// Whether trying again may help: a source that did not answer may do so later. Everything else that a boot
/// reads lies on this machine and will be the same.
fn may_pass(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        matches!(
            cause.downcast_ref(),
            Some(HubError::AllSourcesFailed { .. } | HubError::Source { .. })
        )
    })
}

/// One run through the phases.
struct Attempt<'a, 'b> {
    boot: &'a Boot<'b>,
    owner: &'a BootOwner,
}

impl Attempt<'_, '_> {
    fn run(&self) -> Result<Services> {
        let mut bars = Bars::of_boot(self.boot.output, self.owner.progress());
        self.phase(Phase::Config, || Ok(()), |()| Ok("frozen".into()))?;
        if let Some(keys) = self.boot.keys {
            self.phase(Phase::Secrets, || Ok(()), |()| Ok(keys.into()))?;
        }
        let (model, encoder, compared) = self.preflight(&mut bars)?;
        if let Some(former) = &self.boot.in_place_of {
            former.take_place(self.boot, &model, &self.owner.progress())?;
        }
        let device = self.device()?;
        let (engine, warm_up) =
            device.run(Generator { attempt: self, model: &model, bars: &mut bars })?;
        if self.boot.keys.is_some() {
            self.phase(Phase::Grammar, || Ok(grammars(&engine)), |told| Ok(told.clone()))?;
        }
        let encoder = encoder.map(|found| self.encoder(&device, found)).transpose()?;
        let collections = match &encoder {
            Some(served) => self.collections(&engine, &served.encoder, &mut bars)?,
            None => BTreeMap::new(),
        };
        bars.clear();
        let services = match &self.boot.in_place_of {
            Some(former) => former.call.shelf.services(model.name, engine, Some(warm_up)),
            None => Services {
                model_name: model.name,
                engine,
                warm_up: Some(warm_up),
                encoder,
                collections,
                loaded_at: jiff::Timestamp::now().as_second(),
                tool_format: OnceLock::new(),
            },
        };
        let bytes = model_bytes(&model.path);
        let sentinel = || {
            let progress = self.owner.progress();
            progress.of_bytes(bytes);
            progress.doing("answering a request");
            // A command that answers once is not kept waiting as long as a server.
            let n_tokens = if self.boot.keys.is_some() { sentinel::SERVED } else { sentinel::ONCE };
            let told = sentinel::run(&services, n_tokens, &mut || progress.made())?;
            let Some(golden) = compared.as_ref().and_then(Compared::golden) else {
                return Ok(told);
            };
            progress.doing("comparing golden distributions");
            let compared = sentinel::golden(&services.engine, golden, &mut || progress.made())?;
            Ok(format!("{told}; {compared}"))
        };
        self.phase(Phase::Sentinel, sentinel, |detail| Ok(detail.clone()))?;
        Ok(services)
    }

    fn phase<T>(
        &self,
        phase: Phase,
        work: impl FnOnce() -> Result<T>,
        probe: impl FnOnce(&T) -> Result<String>,
    ) -> Result<T> {
        let work = || {
            self.boot.engine.disturb(phase)?;
            work()
        };
        self.owner.run(phase, work, probe)
    }

    fn preflight(&self, bars: &mut Bars) -> Result<(Resolved, Option<Resolved>, Option<Compared>)> {
        let Boot { sources, engine, encoder, declared, traces, .. } = self.boot;
        let resolve = || {
            let model = sources.resolve(&engine.model, Kind::Generator, bars)?;
            let encoder = encoder
                .map(|args| sources.resolve(&args.encoder, Kind::Encoder, bars))
                .transpose()?;
            let compared = declared.map(|it| it.compare(&model.path, bars)).transpose()?.flatten();
            Ok((model, encoder, compared))
        };
        self.phase(Phase::Preflight, resolve, |(model, _, compared)| {
            let generator = format!("generator {}", model.path.display());
            let Some(compared) = compared else { return Ok(generator) };
            let verdict = compared.verdict()?;
            if let Some(reason) = compared.overlooked() {
                tracing::warn!(reason, "preflight: {verdict}");
                traces.iter().for_each(|traces| traces.stamp(reason));
            }
            Ok(format!("{generator}; {verdict}"))
        })
    }

    fn device(&self) -> Result<Device> {
        let open = || {
            let engine = &self.boot.engine;
            let (device, no_gpu) =
                Device::open(engine.device, engine.cpu(), engine.batch_invariant)?;
            let why = no_gpu.map_or_else(String::new, |why| format!(" ({why})"));
            // A program without kernels for a GPU had nothing to choose from.
            if cfg!(feature = "cuda") {
                self.boot.output.note(format!("device: {}{why}", device.name()));
            }
            Ok(device)
        };
        self.phase(Phase::Device, open, |device| Ok(device.name()))
    }

    fn weights<B: Measured>(
        &self,
        backend: &B,
        model: &Resolved,
        bars: &mut Bars,
    ) -> Result<Loaded<B>> {
        let args = self.boot.engine;
        let load = || {
            let path = &model.path;
            self.owner.progress().of_bytes(model_bytes(path));
            let (device, free) = backend.memory(args.memory);
            let admission = Admission { device, free, need: Need::Engine(args.engine()) };
            let mut told = |step| bars.load(&step);
            load_admitted(backend.clone(), path, args.load(), &admission, &mut told)
                .map_err(memory::refused)
        };
        let loaded = self.phase(Phase::Weights, load, |loaded| {
            Ok(format!("{}, {}", loaded.model_name, loaded.quant))
        })?;
        bars.clear();
        let tokenizer = &loaded.tokenizer;
        self.phase(Phase::Tokenizer, || Ok(()), |()| golden_strings(tokenizer))?;
        Ok(loaded)
    }

    fn engine<B: Backend>(
        &self,
        loaded: Loaded<B>,
        model: &Resolved,
        bars: &mut Bars,
    ) -> Result<(EngineHandle, WarmUpReport)> {
        let start = || Ok(Engine::start(loaded, self.boot.engine.engine())?);
        let engine = self.phase(Phase::KvPool, start, |engine| {
            let facts = engine.facts();
            Ok(format!("{} pages, {} MiB", facts.kv_pages, facts.kv_bytes >> 20))
        })?;
        let warm = || {
            self.owner.progress().of_bytes(model_bytes(&model.path));
            let mut told = |done, total| bars.warm_up(done, total);
            Ok(warm_up_told(&engine, &WarmUpPlan::of(&engine), &mut told)?)
        };
        let report = self.phase(Phase::WarmUp, warm, warmed)?;
        bars.clear();
        Ok((engine, report))
    }

    fn encoder(&self, device: &Device, found: Resolved) -> Result<ServedEncoder> {
        let load = || {
            let cpu = device.cpu().cloned();
            let cpu = cpu.map_or_else(|| CpuBackend::new(self.boot.engine.cpu()), Ok)?;
            let encoder = load_encoder(cpu, &found)?;
            Ok(ServedEncoder { name: found.name, encoder })
        };
        self.phase(Phase::Encoder, load, |served| {
            let vectors = served.encoder.encode(&["A cold start."])?;
            unit_length(&vectors)?;
            Ok(format!("{}, {} dimensions", served.name, served.encoder.facts().dim))
        })
    }

    fn collections(
        &self,
        engine: &EngineHandle,
        encoder: &Arc<dyn Encode>,
        bars: &mut Bars,
    ) -> Result<BTreeMap<String, Arc<Asker>>> {
        let open_all = || {
            let prepared = self.boot.prepare.corpus(&**encoder, bars)?;
            let mut indexes = Vec::new();
            let mut detail = prepared;
            for spec in &self.boot.collections {
                let collection = open(spec, &**encoder)?;
                detail = format!("{detail} {}: {} chunks;", spec.name, collection.len());
                let index = CollectionIndex::new(collection, Arc::clone(encoder));
                indexes.push((spec.clone(), index));
            }
            Ok((indexes, detail.trim().to_owned()))
        };
        let (indexes, _) = self.phase(Phase::Index, open_all, |(_, detail)| Ok(detail.clone()))?;
        let set_gates = || {
            let mut askers = BTreeMap::new();
            let mut details = Vec::new();
            for (spec, index) in indexes {
                self.boot.prepare.calibration(&index, &spec.dir, bars)?;
                let scale = scale(&spec, &index);
                let (gate, note) = gate(&scale, &index);
                details.push(format!("{}: ΔS gate {note}", spec.name));
                let live = LiveChecker::new(index.encoder(), scale.as_ref().ok());
                let asker = Asker::new(engine.clone(), index, (gate, note), live)?;
                if askers.insert(spec.name.clone(), Arc::new(asker)).is_some() {
                    return Err(anyhow!("collection `{}`: given twice", spec.name));
                }
            }
            Ok((askers, details.join("; ")))
        };
        let (askers, _) = self.phase(Phase::Policy, set_gates, |(_, detail)| Ok(detail.clone()))?;
        Ok(askers)
    }
}

/// Bytes that reading a model takes, for its deadline only: of what cannot be read the loader will say why.
pub(crate) fn model_bytes(path: &Path) -> u64 {
    if path.is_dir() {
        let files = CheckpointFiles::of_folder(path).and_then(|files| files.len_bytes());
        return files.unwrap_or(0);
    }
    // The parts of a split file are about as long as its first one.
    let n_parts = SplitName::of(path).map_or(1, |name| u64::from(name.count()));
    n_parts * path.metadata().map_or(0, |file| file.len())
}

/// A vector of a sentence encoder has length 1 (G-24 P).
fn unit_length(vectors: &[Vec<f32>]) -> Result<()> {
    let [vector] = vectors else {
        bail!("encoder: expected one vector for a sentence, found {}", vectors.len())
    };
    let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if (length - 1.0).abs() < 1e-3 {
        return Ok(());
    }
    bail!("encoder: expected a vector of length 1, found {length}")
}

/// Prints the phases of a boot that ended.
pub(crate) fn print_phases(status: &BootStatus, output: Output) {
    for record in &status.phases {
        let ms = record.took.as_secs_f64() * 1e3;
        output.line(format!("  {:10} {ms:8.0} ms  {}", record.phase.name(), record.detail));
    }
}

/// The same for programs.
pub(crate) fn phases_json(status: &BootStatus) -> Value {
    let phase = |record: &PhaseRecord| {
        json!({
            "phase": record.phase.name(),
            "ms": record.took.as_secs_f64() * 1e3,
            "detail": record.detail,
        })
    };
    status.phases.iter().map(phase).collect()
}

/// What the warm-up has to show.
fn warmed(report: &WarmUpReport) -> Result<String> {
    if !report.is_stable {
        bail!("warm-up: expected the same greedy tokens on every run, found others");
    }
    Ok(format!(
        "{} buckets, {} tokens; cold start {:.1}x a warm one, paid here, {:.2}x behind the fence{}",
        report.buckets.len(),
        report.n_tokens,
        report.cold_ratio,
        report.ready_ratio,
        built(&report.built)
    ))
}

/// What a device had built when the warm-up fence closed, for people; nothing of one that builds nothing.
fn built(counters: &DeviceCounters) -> String {
    let named = counters.named().into_iter().filter(|&(_, n)| n > 0);
    let named: Vec<String> = named.map(|(name, n)| format!("{name} {n}")).collect();
    if named.is_empty() {
        return String::new();
    }
    format!("; built: {}", named.join(", "))
}

/// The phases from weights to an engine that has generated tokens.
struct Generator<'a, 'b> {
    attempt: &'a Attempt<'a, 'b>,
    model: &'a Resolved,
    bars: &'a mut Bars,
}

impl Job for Generator<'_, '_> {
    type Out = (EngineHandle, WarmUpReport);

    fn run<B: Measured>(self, backend: B) -> Result<Self::Out> {
        let loaded = self.attempt.weights(&backend, self.model, self.bars)?;
        self.attempt.engine(loaded, self.model, self.bars)
    }
}

/// Loads a sentence encoder.
pub(crate) fn load_encoder(backend: CpuBackend, found: &Resolved) -> Result<Arc<dyn Encode>> {
    // The encoder keeps f32 activations: its cosines are what the ΔS gate reads.
    let exact = backend.with_activation(exrail_kernels::Activation::F32);
    let encoder = SentenceEncoder::load(exact, &found.path)
        .with_context(|| format!("encoder {}", found.path.display()))?;
    Ok(Arc::new(encoder))
}

/// Opens a collection.
pub(crate) fn open(spec: &CollectionSpec, encoder: &dyn Encode) -> Result<Collection> {
    Collection::open(&spec.dir, encoder).with_context(|| {
        format!(
            "collection `{}` in {}; make one with `exrail ingest PATH --collection {}`",
            spec.name,
            spec.dir.display(),
            spec.name
        )
    })
}

/// The stored calibration of a collection, or why there is none that holds.
pub(crate) fn scale(
    spec: &CollectionSpec,
    index: &CollectionIndex,
) -> Result<CorpusCalibration, String> {
    let path = paths::calibration(&spec.dir);
    if !path.exists() {
        return Err("run `exrail calibrate`".into());
    }
    let calibration = CorpusCalibration::load(&path).map_err(|error| error.to_string())?;
    let held = calibration.check(index.encoder_fp(), index.index_hash(), ASK_K);
    held.map_err(|error| error.to_string())?;
    Ok(calibration)
}

/// The gate that a calibration allows, and where it came from.
pub(crate) fn gate(
    scale: &Result<CorpusCalibration, String>,
    index: &CollectionIndex,
) -> (EvidenceGate, String) {
    let gate = match scale {
        Ok(calibration) => {
            EvidenceGate::new(Some(calibration), index).map_err(|error| error.to_string())
        }
        Err(reason) => Err(reason.clone()),
    };
    let gate = match gate {
        Ok(gate) => gate,
        Err(reason) => {
            return (EvidenceGate::not_calibrated(), format!("not calibrated: {reason}"));
        }
    };
    let note = match (gate.deciding(), gate.delta_s()) {
        (Some(Signal::Encoder), _) => "calibrated",
        (Some(Signal::Lexical), _) => "calibrated: the question's words decide",
        (Some(Signal::Joint), _) => "calibrated: ΔS and the question's words decide together",
        (None, DeltaSGate::NotCalibrated) => "not calibrated",
        (None, DeltaSGate::Calibrated(_) | DeltaSGate::ReportOnly(_)) => {
            "report-only: no signal is fit for this corpus"
        }
    };
    (gate, note.into())
}

/// Strings must survive the round trip before a tokenizer is trusted, whatever a manifest says (G-09).
fn golden_strings(tokenizer: &Tokenizer) -> Result<String> {
    for text in ROUND_TRIP {
        let ids = tokenizer.encode(text, Specials::AsText)?;
        let back = tokenizer.decode(&ids);
        if back != text {
            bail!("tokenizer: expected `{text}` back, found `{back}`");
        }
    }
    Ok(format!("{} tokens, {} golden strings", tokenizer.vocab_len(), ROUND_TRIP.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_did_not_answer_is_tried_again_and_nothing_else_is() {
        let silent = HubError::Source { origin: "hub".into(), reason: "timed out".into() };
        assert!(may_pass(&anyhow::Error::from(silent).context("model `m`")));
        let all = HubError::AllSourcesFailed { name: "m".into(), reasons: vec!["offline".into()] };
        assert!(may_pass(&all.into()));
        let absent = HubError::NotCached { name: "m".into(), cache: "/cache".into() };
        assert!(!may_pass(&absent.into()));
        assert!(!may_pass(&anyhow!("file `x.gguf`: truncated")));
    }

    #[test]
    fn a_vector_of_another_length_than_one_is_no_encoder() {
        unit_length(&[vec![0.6, 0.8]]).unwrap();
        let told = |vectors: &[Vec<f32>]| unit_length(vectors).unwrap_err().to_string();
        assert_eq!(told(&[vec![3.0, 4.0]]), "encoder: expected a vector of length 1, found 5");
        assert!(told(&[vec![f32::NAN]]).contains("found NaN"));
        assert!(told(&[]).contains("found 0"));
    }
}
