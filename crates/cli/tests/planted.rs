//! Faults planted one by one, and what the diagnosis makes of each: a confusion matrix of fault and diagnosis, which the
//! test suite prints. Twenty sound systems are diagnosed beside them and have to stay without a fix.
//!
//! What a fault is of is real: the files, tokenizers, templates, caches and locks are the engine's own over tiny models.
//! Retrieval and answers are those of a small world in which a sound system passes every gate, so that nothing else is
//! there to be blamed. Each fault is diagnosed a second time without the part that looks for it: then it is not named,
//! which shows that no other part would have told.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use exrail_checkpoint::{Checkpoint, Gguf};
use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Identity, LoadOptions, checkpoint_losses,
    prepare_generator, standing_out,
};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_retrieval::{Hit, SearchOptions};
use exrail_server::oracle::EngineOracle;
use exrail_server::pipeline::{AnswerLock, EngineGenerate, ask_sampling};
use exrail_tensor::DType;
use exrail_testkit::{Random, TinyLlama, tiny_llama};
use exrail_text::ChatTemplate;
use exrail_verify::fakes::{
    Altered, FakeGenerator, FakeIndex, corpus, gold_text, perfect, with_pages,
};
use exrail_verify::sound::{of, of_index};
use exrail_verify::{
    AskPolicy, AssemblyCheck, AssemblySystem, CacheOracle, CacheReport, EvidenceGate, FrameMessage,
    GenerateError, GoldSet, KvWidth, Manifest, Parts, ProbeText, RepeatCheck, Retrieve,
    SchemaSection, Section, VectorCheck, WeightsSection, WrongMatrix, cache_probe, check_assembly,
    check_repeats, diagnose, schema_probe,
};
use tempfile::TempDir;

/// Sound systems.
const CLEAN: u64 = 20;
/// Those of them whose cache is probed, too: 2,048 steps each.
const WITH_CACHE: u64 = 2;
/// Positions of the tiny models.
const CONTEXT: usize = 2048;
/// Tokens that a window without sinks keeps.
const WINDOW: usize = 256;
/// Tokens of a reply.
const REPLY: usize = 64;

/// A fault, and what has to be said of it.
struct Planted {
    fault: &'static str,
    page: &'static str,
    stage: &'static str,
    /// What the evidence has to name.
    evidence: &'static str,
    parts: Parts,
    /// Takes away the part that looks for it.
    blind: fn(Parts) -> Parts,
}

/// The tiny model, whole as a file and in memory.
fn tiny(seed: u64, spec: TinyLlama) -> Vec<u8> {
    tiny_llama(seed, TinyLlama { context_len: CONTEXT, ..spec })
}

fn engine(seed: u64, template: Option<&str>) -> EngineHandle {
    let threads = Some(2);
    let backend = CpuBackend::new(CpuOptions { threads, ..CpuOptions::default() }).unwrap();
    let gguf = Gguf::parse(tiny(seed, TinyLlama::default())).unwrap();
    let who = Identity { name: "tiny".into(), sha256: "0".repeat(64) };
    let (checkpoint, load) = (Checkpoint::Gguf(gguf), LoadOptions::default());
    let mut loaded = prepare_generator(backend, &checkpoint, who, load, &mut |_| {}).unwrap();
    if let Some(template) = template {
        loaded.template = Some(Arc::new(ChatTemplate::compile(template, "", "").unwrap()));
    }
    Engine::start(loaded, EngineOptions { kv_pages: Some(24), ..EngineOptions::default() }).unwrap()
}

/// What is measured of a real engine behind the small world's index.
struct OfEngine {
    assembly: AssemblyCheck,
    repeats: RepeatCheck,
    schema: SchemaSection,
}

/// `lock` holds structured replies to their schema.
fn of_engine(engine: &EngineHandle, seed: u64, lock: AnswerLock) -> OfEngine {
    let (index, gold) = (corpus(), GoldSet::parse(&gold_text()).unwrap());
    let generator = EngineGenerate::new(engine, ask_sampling(), REPLY);
    let (gate, policy) = (EvidenceGate::new(None, &index).unwrap(), AskPolicy::default());
    let encoder = &*index.encoder;
    let system = AssemblySystem {
        generator: &generator,
        index: &index,
        encoder,
        gate: &gate,
        policy: &policy,
    };
    let assembly = check_assembly(system, &gold, (None, seed), &mut |_| {}).unwrap();
    // A template that a guard refuses gives no answers to compare.
    let repeats = check_repeats(system, &gold, seed).unwrap();
    let locked = EngineGenerate::new(engine, ask_sampling(), REPLY).locked(lock);
    OfEngine { assembly, repeats, schema: schema_probe(&locked, &gold, seed).unwrap() }
}

fn text() -> Vec<u32> {
    let mut random = Random::new(5);
    (0..CONTEXT).map(|_| 3 + u32::try_from(random.below(200)).unwrap()).collect()
}

fn cache_of(oracle: &dyn CacheOracle) -> CacheReport {
    let ids = text();
    let probed = ProbeText { bos: None, ids: &ids };
    cache_probe(oracle, probed, CONTEXT, KvWidth::Sixteen, &mut |_| {}).unwrap()
}

/// A cache that keeps the last tokens and none of the first.
struct WithoutSinks<'a>(EngineOracle<'a>);

impl CacheOracle for WithoutSinks<'_> {
    fn live(
        &self,
        ids: &[u32],
        every: NonZeroUsize,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), GenerateError> {
        self.0.live(&ids[..ids.len().min(WINDOW)], every, visit)?;
        for end in (WINDOW + 1..=ids.len()).filter(|end| end.is_multiple_of(every.get())) {
            let mut last = Vec::new();
            self.0.rows(&ids[end - WINDOW..end], &mut |_, row| last = row.to_vec())?;
            visit(end - 1, &last);
        }
        Ok(())
    }

    fn rows(&self, ids: &[u32], visit: &mut dyn FnMut(usize, &[f32])) -> Result<(), GenerateError> {
        self.0.rows(ids, visit)
    }

    fn violations(&self) -> u64 {
        self.0.violations()
    }
}

/// Files in a folder of their own.
struct Files(TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// What a manifest of the sound file says of another one. The hash of the file is left out: it tells that something is
/// another, and not what.
fn against_manifest(sound: &[u8], found: &[u8]) -> Manifest {
    let files = Files::new();
    let declared =
        exrail_engine::Manifest::of(&files.put("a.gguf", sound), &mut |_| Ok(())).unwrap();
    let rows = declared.check(&files.put("b.gguf", found), &mut |_| Ok(())).unwrap();
    let differ = rows.iter().filter(|row| !row.agrees() && !row.path.contains("sha256"));
    let paths: Vec<&str> = differ.map(|row| row.path.as_str()).collect();
    let differs = (!paths.is_empty()).then(|| paths.join(", "));
    Manifest { values: rows.len(), differs, overlooked: None }
}

fn replaced(file: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = file.windows(from.len()).position(|bytes| bytes == from).unwrap();
    let mut file = file.to_vec();
    file[at..at + to.len()].copy_from_slice(to);
    file
}

/// The names of the two control tokens that begin and end a turn, in each other's place.
fn with_swapped_tokens(file: &[u8]) -> Vec<u8> {
    let name =
        |text: &str| [&u64::try_from(text.len()).unwrap().to_le_bytes(), text.as_bytes()].concat();
    let [start, end] = ["<|im_start|>", "<|im_end|>"].map(name);
    replaced(file, &[&*start, &*end].concat(), &[&*end, &*start].concat())
}

fn with_other_rope(file: &[u8]) -> Vec<u8> {
    let key = "llama.rope.freq_base".as_bytes();
    let of = |base: f32| [key, &6_u32.to_le_bytes(), &base.to_le_bytes()].concat();
    replaced(file, &of(10_000.0), &of(500_000.0))
}

/// The weights of `found` against those of `reference`, as `exrail diagnose --made-of` compares them.
fn weights(reference: &Path, found: &Path) -> WeightsSection {
    let losses = checkpoint_losses(reference, found).unwrap();
    let wrong = standing_out(&losses).into_iter().map(|of| WrongMatrix {
        told: of.in_words(),
        tensor: of.tensor,
        sqnr_db: of.sqnr_db,
        expected_db: of.expected_db,
    });
    WeightsSection {
        against: "reference".to_owned(),
        matrices: losses.len(),
        wrong: wrong.collect(),
        observed: Vec::new(),
    }
}

/// A Q4_0 file and what it was made of, with a change of the blocks of some matrices.
fn changed_weights(seed: u64, of: &str, change: impl Fn(&mut [u8])) -> WeightsSection {
    let spec = TinyLlama { n_layers: 5, ..TinyLlama::default() };
    let files = Files::new();
    let reference = files.put("reference.gguf", &tiny(seed, spec));
    let mut bytes = tiny(seed, TinyLlama { dtype: DType::Q4_0, ..spec });
    let path = files.put("found.gguf", &bytes);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tensors = checkpoint.tensors();
    let names = tensors.names().filter(|name| name.ends_with(".weight") && name.contains(of));
    for name in names {
        let matrix = tensors.tensor(name).unwrap();
        if matrix.dtype == DType::Q4_0 {
            let blocks = matrix.bytes.to_vec();
            let at = bytes.windows(blocks.len()).position(|bytes| *bytes == blocks).unwrap();
            change(&mut bytes[at..at + blocks.len()]);
        }
    }
    weights(&reference, &files.put("found.gguf", &bytes))
}

const Q4_0_BLOCK: usize = 18;

/// Two groups with the scale of the first.
fn merge_groups(blocks: &mut [u8]) {
    for pair in blocks.chunks_exact_mut(2 * Q4_0_BLOCK) {
        pair.copy_within(0..2, Q4_0_BLOCK);
    }
}

/// Each scale, an f16, twice as large: one more in its exponent.
fn double_scales(blocks: &mut [u8]) {
    for block in blocks.chunks_exact_mut(Q4_0_BLOCK) {
        let scale = u16::from_le_bytes([block[0], block[1]]) + (1 << 10);
        block[..2].copy_from_slice(&scale.to_le_bytes());
    }
}

/// Chunks that begin and end within sentences: "The gamma7 of alpha7 beta7| is 107 units."
fn moved(text: &str) -> Vec<std::ops::Range<usize>> {
    let mut cuts = vec![0];
    cuts.extend(text.match_indices(" is ").map(|(at, _)| at));
    cuts.push(text.trim_end().len());
    cuts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// One vector in twenty, three of sixty, of another encoder.
fn mixed(index: &FakeIndex, question: &str, options: &SearchOptions) -> Vec<Hit> {
    let mut hits = index.search(question, options).unwrap();
    let others = ["page4.md", "page9.md", "page14.md"];
    let is_other =
        |hit: &&mut Hit| hit.chunk.span.start == 0 && others.contains(&&*hit.chunk.doc_id);
    hits.iter_mut().filter(is_other).for_each(|hit| hit.cosine *= 0.8);
    hits
}

/// Another of several ways to say it each time, whatever the seed is.
fn unseeded(calls: &AtomicUsize, messages: &[FrameMessage]) -> String {
    let said = perfect(messages, 0);
    let call = calls.fetch_add(1, Ordering::Relaxed) as u64;
    match Random::new(call).below(3) {
        0 => said,
        1 => format!("{said} That is what the source says."),
        _ => exrail_verify::REFUSAL_TOKEN.to_owned(),
    }
}

/// `ChatML` with the last message first.
const REVERSED: &str = "{% for message in messages | reverse %}{{ '<|im_start|>' + message['role'] + '\n' \
    + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn with_manifest(found: fn(&[u8]) -> Vec<u8>) -> Parts {
    let sound = tiny(3, TinyLlama::default());
    let manifest = Some(against_manifest(&sound, &found(&sound)));
    Parts { manifest, ..of_index(&corpus()) }
}

fn with_weights(weights: WeightsSection) -> Parts {
    Parts { weights: Section::Ok(weights), ..of_index(&corpus()) }
}

fn without_manifest(parts: Parts) -> Parts {
    Parts { manifest: None, ..parts }
}

fn without_weights(parts: Parts) -> Parts {
    Parts { weights: Section::missing("nothing to compare with"), ..parts }
}

fn without_vectors(parts: Parts) -> Parts {
    Parts { vectors: VectorCheck::default(), ..parts }
}

fn without_assembly(parts: Parts) -> Parts {
    Parts { assembly: AssemblyCheck::default(), ..parts }
}

fn without_repeats(parts: Parts) -> Parts {
    Parts { repeats: RepeatCheck::default(), ..parts }
}

fn of_files() -> Vec<Planted> {
    vec![
        Planted {
            fault: "swapped added tokens",
            page: "predeploy-collapse",
            stage: "boot",
            evidence: "tokens.fingerprint",
            parts: with_manifest(with_swapped_tokens),
            blind: without_manifest,
        },
        Planted {
            fault: "RoPE base wrong",
            page: "predeploy-collapse",
            stage: "boot",
            evidence: "rope",
            parts: with_manifest(with_other_rope),
            blind: without_manifest,
        },
        Planted {
            fault: "group size read as its double",
            page: "quantisation-drift",
            stage: "weights",
            evidence: "36 of 36",
            parts: with_weights(changed_weights(7, "", merge_groups)),
            blind: without_weights,
        },
        Planted {
            fault: "a layer with wrong scales",
            page: "quantisation-drift",
            stage: "weights",
            evidence: "blk.3.ffn_down.weight",
            parts: with_weights(changed_weights(7, "blk.3.ffn_down", double_scales)),
            blind: without_weights,
        },
    ]
}

fn of_the_index() -> Vec<Planted> {
    let sound = corpus();
    let mut mistaken = corpus();
    mistaken.mistake("page3.md", "page5.md");
    let moved = with_pages(|pages| FakeIndex::cut(pages, moved));
    vec![
        Planted {
            fault: "5 % of vectors of another encoder",
            page: "embedding-vs-semantic",
            stage: "index",
            evidence: "vectors are another encoder's",
            parts: of_index(&Altered::new(&sound, mixed)),
            blind: without_vectors,
        },
        Planted {
            fault: "wrong document in the index",
            page: "structural-lock",
            stage: "index",
            evidence: "4 of 60 chunks say something else",
            parts: of_index(&mistaken),
            blind: without_vectors,
        },
        Planted {
            fault: "chunk boundaries moved",
            page: "chunking-checklist",
            stage: "index",
            evidence: "coverage",
            parts: of_index(&moved),
            blind: |mut parts| {
                parts.report.gates.retain(|gate| gate.name != "coverage");
                parts.report.delta_s.decoy_margin = None;
                parts
            },
        },
    ]
}

fn of_the_generator() -> Vec<Planted> {
    let (index, calls) = (corpus(), AtomicUsize::new(0));
    let reversed = engine(3, Some(REVERSED));
    let plain = engine(3, None);
    let upside_down = of_engine(&reversed, 1, AnswerLock::Enforce);
    let unlocked = of_engine(&plain, 1, AnswerLock::Off);
    let cache = cache_of(&WithoutSinks(EngineOracle::new(&plain)));
    [reversed, plain].iter().for_each(EngineHandle::shutdown);
    let cut = FakeGenerator { reads: 40, ..FakeGenerator::new(perfect) };
    let unseeded = FakeGenerator::new(|messages: &[FrameMessage], _| unseeded(&calls, messages));
    vec![
        Planted {
            fault: "evidence truncated in the prompt",
            page: "prompt-lint",
            stage: "assemble",
            evidence: "read with another number of tokens",
            parts: of(&index, &cut, 1),
            blind: without_repeats,
        },
        Planted {
            fault: "template with slots reordered",
            page: "prompt-lint",
            stage: "assemble",
            evidence: "slots out of order",
            parts: Parts { assembly: upside_down.assembly, ..of_index(&index) },
            blind: without_assembly,
        },
        Planted {
            fault: "seed ignored",
            page: "batch-invariance",
            stage: "reason",
            evidence: "asked twice",
            parts: of(&index, &unseeded, 1),
            blind: without_repeats,
        },
        Planted {
            fault: "KV window without sinks",
            page: "context-drift",
            stage: "cache",
            evidence: "live cache to fresh prefill",
            parts: Parts { cache: Section::Ok(cache), ..of_index(&index) },
            blind: |parts| Parts { cache: Section::missing("not probed"), ..parts },
        },
        Planted {
            fault: "schema only in the prompt",
            page: "prompt-injection",
            stage: "reply",
            evidence: "structured replies do not conform",
            parts: Parts { schema: Section::Ok(unlocked.schema), ..of_index(&index) },
            blind: |parts| Parts { schema: Section::missing("not probed"), ..parts },
        },
    ]
}

/// Fault and diagnosis.
#[derive(Default)]
struct Matrix(BTreeMap<&'static str, BTreeMap<String, usize>>);

const NOTHING: &str = "no fix";

impl Matrix {
    fn add(&mut self, fault: &'static str, diagnosis: String) {
        *self.0.entry(fault).or_default().entry(diagnosis).or_default() += 1;
    }

    fn print(&self) -> String {
        let columns: BTreeSet<&String> = self.0.values().flat_map(BTreeMap::keys).collect();
        let mut text =
            String::from("Planted faults (rows) and what the diagnosis says (columns)\n\n");
        for (at, column) in columns.iter().enumerate() {
            writeln!(text, "  {} = {column}", letter(at)).unwrap();
        }
        write!(text, "\n{:36}", "").unwrap();
        (0..columns.len()).for_each(|at| write!(text, "{:>4}", letter(at)).unwrap());
        for (fault, found) in &self.0 {
            write!(text, "\n{fault:36}").unwrap();
            for column in &columns {
                match found.get(*column) {
                    Some(n) => write!(text, "{n:>4}").unwrap(),
                    None => write!(text, "{:>4}", "·").unwrap(),
                }
            }
        }
        text + "\n"
    }
}

fn letter(at: usize) -> char {
    char::from(b'a' + u8::try_from(at).unwrap())
}

/// Page and stage of the fix, and what it rests on.
fn diagnosed(parts: Parts) -> (String, String) {
    match diagnose(parts).fix {
        Some(fix) => (format!("{} at {}", fix.page, fix.stage.name()), fix.evidence),
        None => (NOTHING.to_owned(), String::new()),
    }
}

/// A sound system, each seed with another model, another sample and other weights.
fn clean(seed: u64) -> Parts {
    let engine = engine(100 + seed, None);
    let OfEngine { assembly, repeats, schema } = of_engine(&engine, seed, AnswerLock::Enforce);
    let cache = (seed < WITH_CACHE).then(|| cache_of(&EngineOracle::new(&engine)));
    engine.shutdown();
    let file = tiny(100 + seed, TinyLlama::default());
    let parts = of(&corpus(), &FakeGenerator::new(perfect), seed);
    Parts {
        manifest: Some(against_manifest(&file, &file)),
        weights: Section::Ok(changed_weights(100 + seed, "", |_| {})),
        assembly,
        repeats,
        schema: Section::Ok(schema),
        cache: cache.map_or(parts.cache, Section::Ok),
        ..parts
    }
}

#[test]
fn every_planted_fault_is_named_with_its_page_and_its_stage_and_a_sound_system_needs_no_fix() {
    let mut matrix = Matrix::default();
    let mut wrong = Vec::new();
    for seed in 0..CLEAN {
        let (found, evidence) = diagnosed(clean(seed));
        if found != NOTHING {
            wrong.push(format!("a sound system, seed {seed}: {found}: {evidence}"));
        }
        matrix.add("(none)", found);
    }
    for planted in [of_files(), of_the_index(), of_the_generator()].into_iter().flatten() {
        let Planted { fault, page, stage, evidence, parts, .. } = planted;
        let (found, told) = diagnosed(parts);
        if found != format!("{page} at {stage}") || !told.contains(evidence) {
            wrong.push(format!(
                "{fault}: expected {page} at {stage} by {evidence}, found {found}: {told}"
            ));
        }
        matrix.add(fault, found);
    }
    let printed = matrix.print();
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("planted-faults.txt");
    std::fs::write(place, &printed).unwrap();
    assert!(wrong.is_empty(), "{}\n{printed}", wrong.join("\n"));
}

/// Mutation: without the part that looks for it, a fault is not named.
#[test]
fn without_the_part_that_looks_for_it_no_fault_is_named() {
    for planted in [of_files(), of_the_index(), of_the_generator()].into_iter().flatten() {
        let Planted { fault, page, stage, evidence, parts, blind } = planted;
        let (found, told) = diagnosed(blind(parts));
        let is_named = found == format!("{page} at {stage}") && told.contains(evidence);
        assert!(!is_named, "{fault}: {found}: {told}");
    }
}
