//! The boot: every phase from a name to services that have proved themselves, for all commands.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, anyhow, bail};
use exrail_engine::{
    Admission, Engine, EngineHandle, Loaded, Need, SentenceEncoder, WarmUpPlan, load_admitted,
    warm_up,
};
use exrail_hub::{Kind, Resolved};
use exrail_kernels::{Backend, DeviceCounters};
use exrail_kernels_cpu::CpuBackend;
use exrail_retrieval::{Collection, Encode};
use exrail_server::{
    BootBoard, Phase, ServedEncoder, Services,
    pipeline::{ASK_K, Asker},
    sentinel,
};
use exrail_text::{Specials, Tokenizer};
use exrail_verify::{CollectionIndex, CorpusCalibration, DeltaSGate, Retrieve};

use crate::{
    device::{Device, Job, Measured},
    memory,
    options::{EncoderArgs, EngineArgs, Sources},
    output::Output,
    paths,
    progress::Bars,
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
    pub(crate) board: &'a BootBoard,
    pub(crate) output: Output,
    pub(crate) sources: &'a Sources,
    pub(crate) engine: &'a EngineArgs,
    /// None: no encoder, no collections.
    pub(crate) encoder: Option<&'a EncoderArgs>,
    pub(crate) collections: Vec<CollectionSpec>,
    pub(crate) prepare: &'a dyn Prepare,
}

/// What a command does between the phases.
pub(crate) trait Prepare {
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
    /// Runs every phase; the services have answered the sentinel when this returns.
    pub(crate) fn run(&self) -> Result<Services> {
        let mut bars = Bars::new(self.output);
        let (model, encoder) = self.preflight(&mut bars)?;
        let device = self.device()?;
        let engine = device.run(Generator { boot: self, model: &model, bars: &mut bars })?;
        let encoder = encoder.map(|found| self.encoder(&device, found)).transpose()?;
        let collections = match &encoder {
            Some(served) => self.collections(&engine, &served.encoder, &mut bars)?,
            None => std::collections::BTreeMap::new(),
        };
        bars.clear();
        let services = Services {
            model_name: model.name,
            engine,
            encoder,
            collections,
            loaded_at: jiff::Timestamp::now().as_second(),
        };
        self.board.run(Phase::Sentinel, || {
            sentinel::run(&services).map(|detail| ((), detail)).map_err(anyhow::Error::from)
        })?;
        Ok(services)
    }

    fn preflight(&self, bars: &mut Bars) -> Result<(Resolved, Option<Resolved>)> {
        self.board.run(Phase::Preflight, || {
            let model = self.sources.resolve(&self.engine.model, Kind::Generator, bars)?;
            let encoder = self
                .encoder
                .map(|args| self.sources.resolve(&args.encoder, Kind::Encoder, bars))
                .transpose()?;
            let detail = format!("generator {}", model.path.display());
            Ok(((model, encoder), detail))
        })
    }

    fn device(&self) -> Result<Device> {
        self.board.run(Phase::Device, || {
            let (device, no_gpu) = {
                let engine = &self.engine;
                Device::open(engine.device, engine.cpu(), engine.batch_invariant)?
            };
            let name = device.name();
            let why = no_gpu.map_or_else(String::new, |why| format!(" ({why})"));
            // A program without kernels for a GPU had nothing to choose from.
            if cfg!(feature = "cuda") {
                self.output.note(format!("device: {name}{why}"));
            }
            Ok((device, name))
        })
    }

    fn weights<B: Measured>(
        &self,
        backend: &B,
        model: &Resolved,
        bars: &mut Bars,
    ) -> Result<Loaded<B>> {
        let loaded = self.board.run(Phase::Weights, || {
            let path = &model.path;
            let options = self.engine.load();
            let (device, free) = backend.memory(self.engine.memory);
            let need = Need::Engine(self.engine.engine());
            let admission = Admission { device, free, need };
            let mut told = |step| bars.load(&step);
            let loaded = load_admitted(backend.clone(), path, options, &admission, &mut told)
                .map_err(memory::refused)?;
            let detail = format!("{}, {}", loaded.model_name, loaded.quant);
            anyhow::Ok((loaded, detail))
        })?;
        bars.clear();
        self.board.run(Phase::Tokenizer, || golden_strings(&loaded.tokenizer))?;
        Ok(loaded)
    }

    fn engine<B: Backend>(&self, loaded: Loaded<B>) -> Result<EngineHandle> {
        let engine = self.board.run(Phase::KvPool, || {
            let engine = Engine::start(loaded, self.engine.engine())?;
            let facts = engine.facts();
            let detail = format!("{} pages, {} MiB", facts.kv_pages, facts.kv_bytes >> 20);
            anyhow::Ok((engine, detail))
        })?;
        self.board.run(Phase::WarmUp, || {
            let report = warm_up(&engine, &WarmUpPlan::of(&engine))?;
            if !report.is_stable {
                bail!("warm-up: expected the same greedy tokens on every run, found others");
            }
            let detail = format!(
                "{} buckets, {} tokens; cold start {:.1}x a warm one, paid here{}",
                report.buckets.len(),
                report.n_tokens,
                report.cold_ratio,
                built(&report.built)
            );
            Ok(((), detail))
        })?;
        Ok(engine)
    }

    fn encoder(&self, device: &Device, found: Resolved) -> Result<ServedEncoder> {
        self.board.run(Phase::Encoder, || {
            let cpu = device.cpu().cloned();
            let cpu = cpu.map_or_else(|| CpuBackend::new(self.engine.cpu()), Ok)?;
            let encoder = load_encoder(cpu, &found)?;
            let detail = format!("{}, {} dimensions", found.name, encoder.facts().dim);
            Ok((ServedEncoder { name: found.name, encoder }, detail))
        })
    }

    fn collections(
        &self,
        engine: &EngineHandle,
        encoder: &Arc<dyn Encode>,
        bars: &mut Bars,
    ) -> Result<std::collections::BTreeMap<String, Arc<Asker>>> {
        let indexes = self.board.run(Phase::Index, || {
            let prepared = self.prepare.corpus(&**encoder, bars)?;
            let mut indexes = Vec::new();
            let mut detail = prepared;
            for spec in &self.collections {
                let collection = open(spec, &**encoder)?;
                detail = format!("{detail} {}: {} chunks;", spec.name, collection.len());
                let index = CollectionIndex::new(collection, Arc::clone(encoder));
                indexes.push((spec.clone(), index));
            }
            anyhow::Ok((indexes, detail.trim().to_owned()))
        })?;
        self.board.run(Phase::Policy, || {
            let mut askers = std::collections::BTreeMap::new();
            let mut details = Vec::new();
            for (spec, index) in indexes {
                self.prepare.calibration(&index, &spec.dir, bars)?;
                let (gate, note) = gate(&spec, &index);
                details.push(format!("{}: ΔS gate {note}", spec.name));
                let asker = Asker::new(engine.clone(), index, gate, note)?;
                if askers.insert(spec.name.clone(), Arc::new(asker)).is_some() {
                    return Err(anyhow!("collection `{}`: given twice", spec.name));
                }
            }
            Ok((askers, details.join("; ")))
        })
    }
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
    boot: &'a Boot<'b>,
    model: &'a Resolved,
    bars: &'a mut Bars,
}

impl Job for Generator<'_, '_> {
    type Out = EngineHandle;

    fn run<B: Measured>(self, backend: B) -> Result<EngineHandle> {
        let loaded = self.boot.weights(&backend, self.model, self.bars)?;
        self.boot.engine(loaded)
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

/// The gate that the stored calibration allows, and where it came from.
fn gate(spec: &CollectionSpec, index: &CollectionIndex) -> (DeltaSGate, String) {
    let not_calibrated = |note: String| (DeltaSGate::NotCalibrated, note);
    let path = paths::calibration(&spec.dir);
    if !path.exists() {
        return not_calibrated("not calibrated: run `exrail verify --calibrate`".into());
    }
    let calibration = match CorpusCalibration::load(&path) {
        Ok(calibration) => calibration,
        Err(error) => return not_calibrated(format!("not calibrated: {error}")),
    };
    let (encoder_fp, hash) = (index.encoder_fp(), index.index_hash());
    if let Err(error) = calibration.check(encoder_fp, hash, ASK_K) {
        return not_calibrated(format!("not calibrated: {error}"));
    }
    let gate = DeltaSGate::from_calibration(calibration.qe.calibration());
    let note = match &gate {
        DeltaSGate::Calibrated(_) => "calibrated",
        DeltaSGate::ReportOnly(_) => "report-only: encoder unfit for this corpus",
        DeltaSGate::NotCalibrated => "not calibrated",
    };
    (gate, note.into())
}

/// Strings that must survive the round trip before a tokenizer is trusted (G-09, first cut).
const GOLDEN_STRINGS: [&str; 8] = [
    "Hello, world!",
    "  two spaces\tand\ttabs \n\n",
    "1234567890 3.14159",
    "naïve café, Übergröße, ß",
    "日本語 と 한국어",
    "👩‍👩‍👧‍👦 🇩🇪",
    "fn main() { println!(\"{}\", 1 << 3); }",
    "<not a special token>",
];

fn golden_strings(tokenizer: &Tokenizer) -> Result<((), String)> {
    for text in GOLDEN_STRINGS {
        let ids = tokenizer.encode(text, Specials::AsText)?;
        let back = tokenizer.decode(&ids);
        if back != text {
            bail!("tokenizer: expected `{text}` back, found `{back}`");
        }
    }
    let detail =
        format!("{} tokens, {} golden strings", tokenizer.vocab_len(), GOLDEN_STRINGS.len());
    Ok(((), detail))
}
