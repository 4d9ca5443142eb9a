//! `grammar`: what a mask costs at a real vocabulary, in processor time of one thread, over the valid instances of
//! MaskBench and over an answer with citations.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use exrail_grammar::{Compiler, Grammar, Limits, Source, Vocabulary, written};
use exrail_text::Tokenizer;
use rustix::{
    thread::{CpuSet, sched_getcpu, sched_setaffinity},
    time::{ClockId, clock_gettime},
};
use serde_json::{Value, json};

use crate::record;

/// Pairs of snippet and section in the answer with citations.
const N_PAIRS: usize = 20;

#[derive(Debug, Args)]
pub(crate) struct GrammarArguments {
    /// A vocabulary: a table of `scripts/vocabularies`, or a tokenizer.json
    #[arg(long)]
    vocabulary: PathBuf,

    /// The folder of MaskBench: files with `schema` and `tests`
    #[arg(long)]
    data: PathBuf,

    /// Where a record goes; none is written without it
    #[arg(long)]
    record: Option<PathBuf>,
}

/// Times in microseconds of processor.
#[derive(Debug, Default)]
struct Times {
    masks: Vec<f64>,
    /// To find that nothing is forced, in front of each of them.
    looks: Vec<f64>,
    /// From a schema to its first mask.
    firsts: Vec<f64>,
    /// The same as a client waits for it, by the clock.
    waits: Vec<f64>,
    n_tokens: usize,
    n_forced: usize,
    n_refused: usize,
    n_lost: usize,
}

/// Measures and prints.
///
/// # Errors
/// A file cannot be read, or the vocabulary cannot be constrained.
pub(crate) fn run(arguments: &GrammarArguments) -> Result<()> {
    let processor = stay_on_one_processor()?;
    let tokenizer = tokenizer(&arguments.vocabulary)?;
    let since = now_us(ClockId::ProcessCPUTime);
    let vocabulary = Vocabulary::new(&tokenizer)?;
    let limits = Limits { cache_bytes: 0, compile_ms: 60_000, ..Limits::default() };
    let compiler = Compiler::new(vocabulary, limits)?;
    compiler.prepare()?;
    let once_ms = (now_us(ClockId::ProcessCPUTime) - since) / 1000.0;
    let mut bench = Times::default();
    for path in cases(&arguments.data)? {
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        let case: Value =
            serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
        let valid = case["tests"].as_array().into_iter().flatten().filter(|it| it["valid"] == true);
        let texts: Vec<String> = valid.map(|it| written(&it["data"])).collect();
        measure(&compiler, &case["schema"], &texts, &mut bench)?;
    }
    let mut contract = Times::default();
    for _ in 0..20 {
        measure(&compiler, &contract_schema(), &[contract_answer()], &mut contract)?;
    }
    let result = json!({
        "vocabulary": record::last_part(&arguments.vocabulary.to_string_lossy()),
        "tokens": compiler.vocabulary().len(),
        "on_processor": processor,
        "once_ms": once_ms,
        "maskbench": bench.report(),
        "contract_20_pairs": contract.report(),
    });
    writeln!(io::stdout(), "{result:#}")?;
    if let Some(folder) = &arguments.record {
        let mut whole = record::head("grammar");
        whole["result"] = result;
        let path = record::write(folder, "grammar", &whole)?;
        writeln!(io::stdout(), "{}", path.display())?;
    }
    Ok(())
}

/// The times are those of one thread. A grammar is compiled in another one than its masks are computed in, and between
/// two processors the cold caches of the second one are measured, too.
fn stay_on_one_processor() -> Result<usize> {
    let processor = sched_getcpu();
    let mut only = CpuSet::new();
    only.set(processor);
    sched_setaffinity(None, &only).context("staying on one processor")?;
    Ok(processor)
}

fn cases(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "json") {
            found.push(path);
        }
    }
    found.sort();
    ensure!(!found.is_empty(), "{}: expected cases of MaskBench, found none", folder.display());
    Ok(found)
}

fn measure(compiler: &Compiler, schema: &Value, texts: &[String], times: &mut Times) -> Result<()> {
    let source = Source::JsonSchema(schema.clone());
    let (begun, since) = (Instant::now(), now_us(ClockId::ProcessCPUTime));
    let Ok(grammar) = compiler.compile(&source) else {
        times.n_refused += 1;
        return Ok(());
    };
    grammar.matcher().mask()?;
    times.firsts.push(now_us(ClockId::ProcessCPUTime) - since);
    times.waits.push(begun.elapsed().as_secs_f64() * 1e6);
    for text in texts {
        walk(compiler, &grammar, text, times)?;
    }
    Ok(())
}

/// Masks along the tokens of a text; those that are forced need none, as in a server.
fn walk(compiler: &Compiler, grammar: &Grammar, text: &str, times: &mut Times) -> Result<()> {
    let mut matcher = grammar.matcher();
    let ids = compiler.vocabulary().spell(text);
    let mut at = 0;
    while at < ids.len() {
        let since = now_us(ClockId::ThreadCPUTime);
        let forced = matcher.forced();
        let looked = now_us(ClockId::ThreadCPUTime);
        let n_forced = forced.iter().zip(&ids[at..]).take_while(|(a, b)| a == b).count();
        if n_forced == 0 {
            let begun = now_us(ClockId::ThreadCPUTime);
            matcher.mask()?;
            times.masks.push(now_us(ClockId::ThreadCPUTime) - begun);
            times.looks.push(looked - since);
        }
        for &id in &ids[at..at + n_forced.max(1)] {
            if matcher.advance(id).is_err() {
                times.n_lost += 1;
                return Ok(());
            }
        }
        times.n_forced += n_forced;
        times.n_tokens += n_forced.max(1);
        at += n_forced.max(1);
    }
    Ok(())
}

impl Times {
    fn report(&self) -> Value {
        let share = |over: f64| {
            self.masks.iter().filter(|&&it| it > over).count() as f64
                / self.masks.len().max(1) as f64
        };
        json!({
            "mask_us": percentiles(&self.masks),
            "look_for_forced_us": percentiles(&self.looks),
            "share_over_1_ms": share(1_000.0),
            "share_over_10_ms": share(10_000.0),
            "first_mask_us": percentiles(&self.firsts),
            "first_mask_wait_us": percentiles(&self.waits),
            "tokens": self.n_tokens,
            "forced_share": self.n_forced as f64 / self.n_tokens.max(1) as f64,
            "refused_schemas": self.n_refused,
            "lost_texts": self.n_lost,
        })
    }
}

fn percentiles(times: &[f64]) -> Value {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let last = sorted.len().saturating_sub(1);
        sorted.get((last as f64 * share).round() as usize).copied()
    };
    let mean = sorted.iter().sum::<f64>() / sorted.len().max(1) as f64;
    json!({
        "n": sorted.len(), "mean": mean, "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p999": at(0.999),
        "max": sorted.last(),
    })
}

/// The answer with citations: each pair of snippet and section is one branch, and the answer has no `maxLength`.
fn contract_schema() -> Value {
    let pairs: Vec<Value> = (0..N_PAIRS)
        .map(|at| {
            json!({"type": "object", "properties": {
                "snippet_id": {"const": snippet(at)}, "section_id": {"const": section(at)},
                "tokens": {"type": "object", "properties": {
                    "start": {"type": "integer", "minimum": 0}, "end": {"type": "integer", "minimum": 0}},
                    "required": ["start", "end"], "additionalProperties": false}},
                "required": ["snippet_id", "section_id", "tokens"], "additionalProperties": false})
        })
        .collect();
    json!({"type": "object", "properties": {
        "citations": {"type": "array", "items": {"anyOf": pairs}, "minItems": 1},
        "answer": {"type": "string"}, "confidence": {"type": "number", "minimum": 0, "maximum": 1}},
        "required": ["citations", "answer", "confidence"], "additionalProperties": false})
}

fn contract_answer() -> String {
    let citation = |at: usize| json!({"snippet_id": snippet(at), "section_id": section(at), "tokens": {"start": at, "end": at + 40}});
    written(&json!({"citations": [citation(3), citation(17)],
        "answer": "The lease ends on the last day of the month in which notice was given, and not before.",
        "confidence": 0.75}))
}

fn snippet(at: usize) -> String {
    format!("{:016x}", (at as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

fn section(at: usize) -> String {
    format!("handbook/section-{}", at % 7)
}

fn now_us(clock: ClockId) -> f64 {
    let now = clock_gettime(clock);
    now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
}

fn tokenizer(path: &Path) -> Result<Arc<Tokenizer>> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    let table: Value =
        serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
    if table.get("tokens").is_none() {
        return Ok(Arc::new(Tokenizer::from_json(&bytes)?));
    }
    let text = |key: &str| table[key].as_str().unwrap_or_default().to_owned();
    let id = |key: &str| table[key].as_u64().and_then(|id| u32::try_from(id).ok());
    let texts = |key: &str| serde_json::from_value(table[key].clone()).unwrap_or_default();
    let vocabulary = exrail_text::Vocabulary {
        model: text("model"),
        pre: text("pre"),
        tokens: serde_json::from_value(table["tokens"].clone())?,
        kinds: serde_json::from_value(table["kinds"].clone()).unwrap_or_default(),
        merges: texts("merges"),
        scores: serde_json::from_value(table["scores"].clone()).unwrap_or_default(),
        bos: id("bos"),
        eos: id("eos"),
        unknown: id("unknown"),
        add_space_prefix: table["add_space_prefix"].as_bool().unwrap_or_default(),
        ..exrail_text::Vocabulary::default()
    };
    Ok(Arc::new(Tokenizer::from_vocabulary(vocabulary)?))
}
