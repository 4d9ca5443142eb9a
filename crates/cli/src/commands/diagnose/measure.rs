//! Measures part by part, and tells what each took.

use std::{collections::BTreeMap, path::PathBuf, time::Instant};

use anyhow::Result;
use exrail_engine::{EngineHandle, WeightLoss, checkpoint_losses, standing_out};
use exrail_hub::Kind;
use exrail_metrics::{MODE_PROMPTS, TREND_SIZE};
use exrail_server::{
    Services,
    oracle::EngineOracle,
    pipeline::{ASK_MAX_TOKENS, EngineGenerate, ask_sampling},
    sentinel,
    writing::EngineWriter,
};
use exrail_text::Specials;
use exrail_verify::{
    AnswerScale, AssemblyCheck, AssemblySystem, BootSection, CacheReport, CollectionIndex,
    CorpusCalibration, Cost, Diagnosis, EvidenceGate, FrozenRuns, GoldSet, InjectionSection,
    InjectionTally, LambdaModes, LambdaModesOptions, LambdaModesReport, MIN_PROBE_TOKENS,
    MODE_TOKENS, Manifest, MatrixObservation, ModeResonance, ModeSystem, ModesProgress,
    Observations, Parts, ProbeText, QuantMode, QuantPart, QuantText, RepeatCheck, ReplyWindows,
    Report, ResonanceSection, RetrievalBits, Retrieve as _, RetrievedBits, RowOracle, Section,
    Served, TREND_TOKENS, Weights, WeightsSection, WrongMatrix, ask_index, cache_probe,
    check_assembly, check_repeats, check_vectors, diagnose, long_replies, observe_scale,
    quant_probe, retrieved_bits, schema_probe,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::Diagnose;
use crate::{
    commands::{calibrate::policy, probe, verify},
    load::CollectionSpec,
    options::{ActivationOption, EngineArgs, KvOption, QuantOption},
    output::Output,
    paths,
    progress::Bars,
};

/// Tokens of a sequence on which widths are compared.
const WINDOW: usize = 512;
/// Tokens that a reply of the trend and its question need.
const TREND_CONTEXT: usize = TREND_TOKENS + 256;
/// Pages of 256 tokens in the KV pool of a width beside the one that is served: a prompt and its answer, with room.
const PAGES_BESIDE: usize = 32;

/// One run over booted services.
pub(super) struct Run<'a> {
    pub(super) options: &'a Diagnose,
    pub(super) services: &'a Services,
    /// The collection as it is served, with an encoder that computes each text once: every part asks the same questions.
    pub(super) index: &'a CollectionIndex,
    pub(super) gold: &'a GoldSet,
    pub(super) spec: &'a CollectionSpec,
    pub(super) output: Output,
    pub(super) started: Instant,
    pub(super) ready_s: f64,
    /// Whether nobody waits for it any more; looked at between its parts.
    pub(super) is_over: &'a dyn Fn() -> bool,
}

/// Nobody waits any more.
#[derive(Debug)]
pub(super) struct Over;

impl std::fmt::Display for Over {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nobody waits for the diagnosis any more")
    }
}

impl std::error::Error for Over {}

impl Run<'_> {
    /// The diagnosis and what its numbers were computed from, line by line.
    pub(super) fn measure(&self) -> Result<(Diagnosis, Vec<Value>)> {
        let trace_id = verify::probe_id();
        let search = policy().search;
        let (index, encoder) = (self.index, self.index.encoder());
        self.tell("boot", self.started);
        let manifest = self.manifest()?;
        let weights = self.part("weights", || self.weights())?;
        let before = retrieved_bits(self.gold, self.served_index(), &search)?;
        let (report, observed) = self.part("gold set", || {
            let sample = self.options.sample();
            verify::observe(self.services, (self.spec, index), self.gold, sample, self.output)
        })?;
        let mut bars = Bars::new(self.output);
        let scale = self.part("scale of ΔS", || {
            Ok(observe_scale(self.gold, index, &**encoder, &search, &mut |step| bars.probe(step))?)
        })?;
        let vectors = self.part("vectors", || {
            Ok(check_vectors(self.gold, index, &**encoder, &search, &mut |step| bars.probe(step))?)
        })?;
        bars.clear();
        let gate = self.gate()?;
        let (assembly, repeats) = self.part("prompts", || self.prompts(&gate))?;
        let schema = self.part("schema", || {
            let seed = self.options.sample.sample_seed;
            Ok(Section::Ok(schema_probe(&generate(self.services), self.gold, seed)?))
        })?;
        let injection = self.part("injection", || self.injection())?;
        let cache = self.part("cache", || self.cache())?;
        let e_resonance = self.trend()?;
        let (quant, lambda_modes) =
            self.part("widths", || self.widths(&before, observed.frozen.clone()))?;
        let question = self.options.question.as_deref();
        let asked = |question| ask_index(question, index, &gate, &search);
        let mut lines =
            vec![json!({ "kind": "run", "trace_id": trace_id, "gold_sha256": self.gold.sha256() })];
        lines.push(line("scale", &scale));
        lines.push(line("vectors", &vectors.observed));
        lines.extend(assembly.observed.iter().map(|of| line("assembly", of)));
        lines.extend(repeats.observed.iter().map(|of| line("repeat", of)));
        lines.extend(of_section(&schema, |of| &of.observed).map(|of| line("schema", of)));
        lines.extend(of_section(&weights, |of| &of.observed).map(|of| line("matrix", of)));
        lines.extend(of_section(&e_resonance, |of| &of.observed).map(|of| line("trend", of)));
        observe(&mut lines, (&observed, &report), (&cache, &quant));
        let parts = Parts {
            trace_id,
            scale,
            served: self.served(),
            vectors,
            assembly,
            repeats,
            manifest,
            weights,
            question: question.map(asked).transpose()?,
            cost: self.cost(&report, lambda_modes.value(), at_length(&e_resonance, &quant)),
            quant,
            lambda_modes,
            cache,
            boot: self.boot(),
            injection,
            schema,
            shards: Section::missing("the model runs on one device: needs several"),
            e_resonance,
            report,
        };
        Ok((diagnose(parts), lines))
    }

    /// Runs a part and tells what it took.
    fn part<T>(&self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if (self.is_over)() {
            return Err(Over.into());
        }
        let started = Instant::now();
        let done = work()?;
        self.tell(name, started);
        Ok(done)
    }

    fn tell(&self, name: &str, started: Instant) {
        self.output.note(format!("  {name:<14}{:6.1} s", started.elapsed().as_secs_f64()));
    }

    /// The collection with the encoder that is served, which computes every time that it is asked.
    fn served_index(&self) -> &CollectionIndex {
        self.services.collections[&self.spec.name].index()
    }

    /// The stored scale, if it holds.
    fn calibration(&self) -> Option<CorpusCalibration> {
        let index = self.index;
        let stored = CorpusCalibration::load(&paths::calibration(&self.spec.dir)).ok();
        let k = policy().search.k;
        stored.filter(|it| it.check(index.encoder_fp(), index.index_hash(), k).is_ok())
    }

    /// The gate as the server has it.
    fn gate(&self) -> Result<EvidenceGate> {
        Ok(EvidenceGate::new(self.calibration().as_ref(), self.index)?)
    }

    fn served(&self) -> Served {
        let facts = self.services.engine.facts();
        Served {
            shards: 1,
            rank_map: vec![facts.backend.clone()],
            extensions: Vec::new(),
            // The kernels of the CPU sum every row in the same order whatever else is in the batch.
            batch_invariant: self.options.engine.batch_invariant
                || !facts.backend.starts_with("cuda"),
        }
    }

    fn boot(&self) -> Section<BootSection> {
        let Some(warm_up) = &self.services.warm_up else {
            return Section::missing("the engine was not warmed up");
        };
        let built = self.services.engine.counters().built_after_fence.unwrap_or_default();
        Section::Ok(BootSection {
            ready_s: self.ready_s,
            cold_ratio_max: warm_up.ready_ratio,
            cold_start_ratio: warm_up.cold_ratio,
            post_ready_captures: built.named().iter().map(|&(_, n)| n).sum(),
            warm_up_tokens: warm_up.n_tokens,
        })
    }

    /// Replies and their tokens, and the time of everything.
    fn cost(&self, report: &Report, modes: Option<&LambdaModesReport>, long: [usize; 2]) -> Cost {
        let of_modes = modes.map_or_else(Cost::default, |modes| modes.cost);
        let [of_trend, of_widths] = long;
        let tokens_at_length = of_trend * TREND_TOKENS + of_widths * MODE_TOKENS;
        Cost {
            generations: report.cost.generations + of_modes.generations + of_trend + of_widths,
            tokens: report.cost.tokens + of_modes.tokens + tokens_at_length,
            seconds: self.started.elapsed().as_secs_f64(),
        }
    }

    /// The model against what was declared of it.
    fn manifest(&self) -> Result<Option<Manifest>> {
        if self.options.declared.manifest.is_none() {
            return Ok(None);
        }
        let mut bars = Bars::new(self.output);
        let compared =
            self.options.declared.compare(&self.path(self.options.model())?, &mut bars)?;
        bars.clear();
        let Some(compared) = compared else { return Ok(None) };
        let mut manifest = compared.section();
        if let (None, Some(golden)) = (&manifest.differs, compared.golden()) {
            let found = sentinel::golden(&self.services.engine, golden, &mut || ());
            manifest.differs = found.err().map(|error| error.to_string());
        }
        Ok(Some(manifest))
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        let mut bars = Bars::new(self.output);
        let found = self.options.sources.resolve(name, Kind::Generator, &mut bars);
        bars.clear();
        Ok(found?.path)
    }

    /// Matrix by matrix against what the model was made of.
    fn weights(&self) -> Result<Section<WeightsSection>> {
        let Some(made_of) = &self.options.made_of else {
            return Ok(Section::missing(
                "nothing to compare with: give the checkpoint that the model was quantised from with --made-of",
            ));
        };
        let (model, reference) = (self.path(self.options.model())?, self.path(made_of)?);
        let losses = checkpoint_losses(&reference, &model)?;
        let wrong = standing_out(&losses).into_iter().map(|found| WrongMatrix {
            told: found.in_words(),
            tensor: found.tensor,
            sqnr_db: found.sqnr_db,
            expected_db: found.expected_db,
        });
        Ok(Section::Ok(WeightsSection {
            against: made_of.clone(),
            matrices: losses.len(),
            wrong: wrong.collect(),
            observed: losses.into_iter().map(observed_loss).collect(),
        }))
    }

    /// How prompts are put together, and a few of them answered twice.
    fn prompts(&self, gate: &EvidenceGate) -> Result<(AssemblyCheck, RepeatCheck)> {
        let index = self.index;
        let (generator, policy) = (generate(self.services), policy());
        let encoder = &**index.encoder();
        let system =
            AssemblySystem { generator: &generator, index, encoder, gate, policy: &policy };
        let mut bars = Bars::new(self.output);
        let sample = (self.options.n_prompts(), self.options.sample.sample_seed);
        let assembly = check_assembly(system, self.gold, sample, &mut |step| bars.probe(step))?;
        bars.clear();
        let repeats = check_repeats(system, self.gold, self.options.sample.sample_seed)?;
        Ok((assembly, repeats))
    }

    fn injection(&self) -> Result<Section<InjectionSection>> {
        if self.services.engine.template().is_none() {
            return Ok(Section::missing("the model carries no chat template to inject into"));
        }
        let tallies = probe::injection::count_structural(&self.services.engine)?;
        let [control, hijack, leak] = tallies;
        let all = tallies.iter().map(InjectionTally::upper_95).collect::<Result<Vec<_>, _>>()?;
        Ok(Section::Ok(InjectionSection {
            trials: control.trials,
            control_tokens: control.successes,
            hijacks: hijack.successes,
            leaks: leak.successes,
            upper_95: all.into_iter().fold(0.0, f64::max),
        }))
    }

    /// The documents of the collection one after the other.
    fn corpus(&self) -> Result<String> {
        let index = self.index;
        let mut text = String::new();
        for doc_id in index.doc_ids() {
            if let Some(document) = index.document(&doc_id)? {
                text.push_str(&document.text);
                text.push_str("\n\n");
            }
        }
        Ok(text)
    }

    fn cache(&self) -> Result<Section<CacheReport>> {
        let engine = &self.services.engine;
        let tokenizer = engine.tokenizer();
        let ids = tokenizer.encode(&self.corpus()?, Specials::AsText)?;
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let there = (ids.len() + usize::from(bos.is_some())).min(engine.facts().context);
        let (asked, most, _) = self.options.tokens();
        let n_tokens = asked.unwrap_or(most.min(there));
        if asked.is_none() && n_tokens < MIN_PROBE_TOKENS {
            return Ok(Section::missing(format!(
                "needs {MIN_PROBE_TOKENS} tokens of text and of context, found {there}: exrail probe cache MODEL --text FILE"
            )));
        }
        let oracle = EngineOracle::new(engine);
        let text = ProbeText { bos, ids: &ids };
        let mut told = |n| tracing::info!("{n} of {n_tokens} tokens compared");
        Ok(Section::Ok(cache_probe(&oracle, text, n_tokens, oracle.width(), &mut told)?))
    }

    /// E over replies at length.
    fn trend(&self) -> Result<Section<ResonanceSection>> {
        if !self.options.deep {
            let reason = "one short run cannot tell: needs 20 replies of 3,200 tokens: --deep";
            return Ok(Section::Inconclusive { reason: reason.to_owned() });
        }
        let context = self.services.engine.facts().context;
        if context < TREND_CONTEXT {
            let needed = format!("needs a context of {TREND_CONTEXT} tokens, found {context}");
            return Ok(Section::missing(needed));
        }
        let size = (TREND_SIZE.0, TREND_TOKENS);
        let replies = self.part("at length", || self.replies(&self.services.engine, size))?;
        Ok(match ResonanceSection::of(replies)? {
            Ok(section) => Section::Ok(section),
            Err(reason) => Section::Inconclusive { reason },
        })
    }

    /// Replies at length, window by window.
    fn replies(&self, engine: &EngineHandle, size: (usize, usize)) -> Result<Vec<ReplyWindows>> {
        let mut bars = Bars::new(self.output);
        let asked = (size.0, size.1, self.options.sample.sample_seed);
        let (writer, encoder) = (EngineWriter::new(engine), &**self.index.encoder());
        let mut told = |step| bars.probe(step);
        let replies = long_replies(&writer, encoder, self.gold, asked, &mut told);
        bars.clear();
        Ok(replies?)
    }

    /// E of every width on the same prompts.
    fn resonance(&self, booted: &BTreeMap<QuantMode, Services>) -> Result<ModeResonance> {
        if !self.options.deep {
            return Ok(ModeResonance::default());
        }
        let served = [(QuantMode::AsServed, self.services)];
        let all = served.into_iter().chain(booted.iter().map(|(&mode, of)| (mode, of)));
        let size = (MODE_PROMPTS, MODE_TOKENS);
        let replies = all.map(|(mode, of)| Ok((mode, self.replies(&of.engine, size)?)));
        Ok(ModeResonance::of(replies.collect::<Result<_>>()?)?)
    }

    /// Other widths of the weights, loaded beside the one that is served.
    fn widths(
        &self,
        before: &[RetrievedBits],
        known: FrozenRuns,
    ) -> Result<(Section<QuantPart>, Section<LambdaModesReport>)> {
        if self.options.modes.is_empty() {
            let reason = "a server holds one set of weights: exrail diagnose MODEL";
            return Ok((Section::missing(reason), Section::missing(reason)));
        }
        let booted = self.part("  boots", || self.boot_widths())?;
        let quant = self.part("  fidelity", || self.quant(&booted, before));
        let modes = quant.and_then(|quant| {
            Ok((quant, self.part("  λ of widths", || self.lambda_modes(&booted, known))?))
        });
        booted.values().for_each(|services| services.engine.shutdown());
        modes
    }

    /// The model in every width that is compared, side by side: much of a boot is work of one thread.
    fn boot_widths(&self) -> Result<BTreeMap<QuantMode, Services>> {
        std::thread::scope(|scope| {
            let boot = |&width: &QuantOption| {
                let mode = match width {
                    QuantOption::Int8 => QuantMode::Int8,
                    QuantOption::Int4 => QuantMode::Int4,
                };
                let engine =
                    EngineArgs { quant: Some(width), rounds_blocks: true, ..self.beside() };
                let options = self.options;
                scope.spawn(move || Ok((mode, options.boot(&engine, None, Output::silent())?)))
            };
            let boots: Vec<_> = self.options.modes.iter().map(boot).collect();
            let ended = boots.into_iter().map(|boot| boot.join());
            ended
                .map(|boot| boot.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }

    /// The options as given, with a cache for one sequence at a time unless it is to hold more.
    fn beside(&self) -> EngineArgs {
        let served = self.options.engine();
        EngineArgs { kv_pages: served.kv_pages.or(Some(PAGES_BESIDE)), ..served }
    }

    fn quant(
        &self,
        booted: &BTreeMap<QuantMode, Services>,
        before: &[RetrievedBits],
    ) -> Result<Section<QuantPart>> {
        let mut bars = Bars::new(self.output);
        let (sources, model) = (&self.options.sources, self.options.model());
        let path = sources.resolve(model, Kind::Generator, &mut bars)?.path;
        bars.clear();
        let (parameters, is_packed) = probe::quant::weigh(&path)?;
        let Some(texts) = self.texts(&self.services.engine)? else {
            return Ok(Section::missing(format!(
                "needs {WINDOW} tokens of text: exrail probe quant MODEL --text FILE"
            )));
        };
        let (activation, kv) = (ActivationOption::F32, KvOption::F32);
        let exact = EngineArgs { activation, kv, quant: None, ..self.beside() };
        let reference = self.options.boot(&exact, None, self.output)?;
        let oracles: BTreeMap<QuantMode, EngineOracle<'_>> = booted
            .iter()
            .map(|(&mode, of)| (mode, EngineOracle::new(&of.engine)))
            .chain([(QuantMode::AsServed, EngineOracle::new(&self.services.engine))])
            .collect();
        let rows: BTreeMap<QuantMode, &RowOracle<'_>> =
            oracles.iter().map(|(&mode, oracle)| (mode, oracle as &RowOracle<'_>)).collect();
        let exact = EngineOracle::new(&reference.engine);
        let mut told = |n| tracing::info!("{n} tokens compared");
        let report = quant_probe(&exact, &rows, &texts, parameters, &mut told);
        let format = reference.engine.facts().quant.clone();
        reference.engine.shutdown();
        let meanwhile = retrieved_bits(self.gold, self.served_index(), &policy().search)?;
        let shown = if is_packed { "as_loaded".to_owned() } else { format.to_lowercase() };
        Ok(Section::Ok(QuantPart {
            weights: Weights { reference: shown, format, parameters },
            report: report?,
            retrieval: RetrievalBits::between(before, &meanwhile),
            resonance: self.resonance(booted)?,
        }))
    }

    /// The same questions over the same evidence, answered in each width; what the served one said is known.
    fn lambda_modes(
        &self,
        booted: &BTreeMap<QuantMode, Services>,
        known: FrozenRuns,
    ) -> Result<Section<LambdaModesReport>> {
        let n_items = self.options.sample().lambda;
        if n_items == 0 || booted.is_empty() {
            return Ok(Section::missing("no item was asked for: --lambda N and --modes int8,int4"));
        }
        let index = self.index;
        let calibration = self.calibration();
        let gate = self.gate()?;
        let options = LambdaModesOptions {
            policy: policy(),
            n_items,
            seed: self.options.sample.sample_seed,
            // The gold set was asked live already.
            live: false,
            timed: false,
            ..LambdaModesOptions::default()
        };
        let served = generate(self.services);
        let reference = (QuantMode::AsServed, ModeSystem { generator: &served, index });
        let mut told = |_: ModesProgress| ();
        let asked = (options, &mut told as &mut dyn FnMut(ModesProgress));
        let mut probe = LambdaModes::begin_with(known, reference, self.gold, &gate, asked)?;
        for (&mode, services) in booted {
            let generator = generate(services);
            probe.add(mode, ModeSystem { generator: &generator, index }, &mut told);
        }
        let bound = (index.index_hash(), policy().search.k);
        let mut scale = AnswerScale::new(&**index.encoder(), calibration.as_ref(), bound);
        Ok(Section::Ok(probe.report(&mut scale)?))
    }

    /// Whole windows of the corpus; none where there is less than one.
    fn texts(&self, engine: &EngineHandle) -> Result<Option<Vec<QuantText>>> {
        let tokenizer = engine.tokenizer();
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let ids = tokenizer.encode(&self.corpus()?, Specials::AsText)?;
        let (_, _, n_tokens) = self.options.tokens();
        let windows = ids.chunks_exact(WINDOW - usize::from(bos.is_some())).take(n_tokens / WINDOW);
        let sequence = |ids: &[u32]| bos.iter().chain(ids).copied().collect();
        let sequences: Vec<Vec<u32>> = windows.map(sequence).collect();
        let text = QuantText { name: "corpus".to_owned(), sequences };
        Ok((!text.sequences.is_empty()).then(|| vec![text]))
    }
}

/// Replies at length: of the trend, and of the widths.
fn at_length(trend: &Section<ResonanceSection>, quant: &Section<QuantPart>) -> [usize; 2] {
    let of_widths = quant.value().map(|part| part.resonance.observed.values().map(Vec::len).sum());
    [trend.value().map_or(0, |trend| trend.replies), of_widths.unwrap_or(0)]
}

fn observed_loss(loss: WeightLoss) -> MatrixObservation {
    let WeightLoss { tensor, format, sqnr_db, format_db } = loss;
    MatrixObservation { tensor, format, sqnr_db, format_db }
}

/// What a section was made of, if it was.
fn of_section<'s, T, U: 's>(
    section: &'s Section<T>,
    of: fn(&T) -> &Vec<U>,
) -> impl Iterator<Item = &'s U> {
    section.value().into_iter().flat_map(of)
}

/// A generator as the server asks it.
fn generate(services: &Services) -> EngineGenerate<'_> {
    EngineGenerate::new(&services.engine, ask_sampling(), ASK_MAX_TOKENS)
}

/// One line a thing that was observed.
fn observe(
    lines: &mut Vec<Value>,
    (observed, report): (&Observations, &Report),
    (cache, quant): (&Section<CacheReport>, &Section<QuantPart>),
) {
    lines.extend(observed.retrieval.iter().map(|of| line("retrieval", of)));
    lines.extend(observed.sweep.iter().map(|of| line("sweep", of)));
    lines.extend(observed.answers.iter().map(|of| line("answer", of)));
    lines.extend(observed.refusals.iter().map(|of| line("refusal", of)));
    lines.extend(report.lambda.items.iter().map(|of| line("lambda", of)));
    if let Some(report) = cache.value() {
        lines.push(line(
            "cache",
            &json!({ "checkpoints": report.checkpoints, "of": report.observed }),
        ));
    }
    if let Some(part) = quant.value() {
        lines.extend(part.retrieval.as_ref().map(|bits| line("bits", bits)));
        lines.push(line("noise", &json!({ "klds": part.report.noise_observed })));
        for (mode, replies) in &part.resonance.observed {
            let mode = mode.name();
            lines
                .extend(replies.iter().map(|of| line("reply", &json!({ "mode": mode, "of": of }))));
        }
        for text in &part.report.texts {
            lines.push(line("fidelity", &json!({ "text": text.name, "of": text.observed })));
        }
    }
}

/// An object with its kind in front.
fn line(kind: &str, value: &impl Serialize) -> Value {
    let mut value = serde_json::to_value(value).unwrap_or_default();
    if let Some(fields) = value.as_object_mut() {
        fields.insert("kind".to_owned(), kind.into());
    }
    value
}
