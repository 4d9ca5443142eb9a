//! `constrained`: what an answer under a grammar costs beside a free one of as many tokens, in turns.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Event, GenerateRequest, LoadOptions, Sampling,
    load_generator,
};
use exrail_grammar::{Grammar, Source};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_metrics::quantile;
use exrail_text::Specials;
use serde_json::{Value, json};

use crate::{
    machine::{self, Busy},
    record,
};

const MOST_TOKENS: usize = 200;

#[derive(Debug, Args)]
pub(crate) struct ConstrainedArguments {
    /// The model's file
    #[arg(long)]
    model: PathBuf,

    /// A JSON Schema; by default one of long fixed names and short values
    #[arg(long)]
    schema: Option<PathBuf>,

    /// Pairs of a free and a constrained answer
    #[arg(long, default_value_t = 15)]
    turns: u64,

    /// Threads; by default all cores
    #[arg(long)]
    threads: Option<usize>,

    /// Measure although the machine is busy
    #[arg(long)]
    force: bool,

    /// Where a record goes; none is written without it
    #[arg(long)]
    record: Option<PathBuf>,
}

/// One answer, from its request to its last event.
#[derive(Clone, Copy, Debug)]
struct Answer {
    n_tokens: usize,
    n_forced: usize,
    n_steps: u64,
    seconds: f64,
}

impl Answer {
    fn rate(&self) -> f64 {
        self.n_tokens as f64 / self.seconds
    }
}

/// Measures and prints.
///
/// # Errors
/// The model or the schema cannot be used, or the machine is busy.
pub(crate) fn run(arguments: &ConstrainedArguments) -> Result<()> {
    let schema = match &arguments.schema {
        Some(path) => {
            serde_json::from_slice(&fs::read(path).with_context(|| path.display().to_string())?)
                .with_context(|| path.display().to_string())?
        }
        None => long_names(),
    };
    ensure!(arguments.turns > 0, "turns: expected at least 1, found 0");
    let busy = if arguments.force { Busy::Accept } else { Busy::Refuse };
    let idle = machine::wait_until_idle(Duration::from_secs(3), Duration::from_secs(120), busy)?;
    let engine = start(arguments)?;
    let grammar = engine.grammars()?.compile(&Source::JsonSchema(schema.clone()))?;
    let mut pairs = Vec::new();
    // The first pair warms up.
    for n in 0..=arguments.turns {
        let locked = answer(&engine, request(&engine, n, MOST_TOKENS, Some(&grammar))?)?;
        let free = answer(&engine, request(&engine, n, locked.n_tokens, None)?)?;
        ensure!(
            free.n_tokens == locked.n_tokens,
            "a free answer: expected {} tokens, found {}",
            locked.n_tokens,
            free.n_tokens
        );
        if n > 0 {
            pairs.push((free, locked));
        }
    }
    let result = report(&engine, &schema, idle, &pairs)?;
    writeln!(io::stdout(), "{result:#}")?;
    if let Some(folder) = &arguments.record {
        let mut whole = record::head("constrained");
        whole["result"] = result;
        let path = record::write(folder, "constrained", &whole)?;
        writeln!(io::stdout(), "{}", path.display())?;
    }
    Ok(())
}

fn start(arguments: &ConstrainedArguments) -> Result<EngineHandle> {
    let backend =
        CpuBackend::new(CpuOptions { threads: arguments.threads, ..CpuOptions::default() })?;
    let loaded = load_generator(backend, &arguments.model, LoadOptions::default(), &mut |_| {})?;
    Ok(Engine::start(loaded, EngineOptions { kv_pages: Some(8), ..EngineOptions::default() })?)
}

/// Greedy, and its prompt is read anew. A free answer goes on past the end of a text, so that it has as many tokens.
fn request(
    engine: &EngineHandle,
    n: u64,
    max_tokens: usize,
    grammar: Option<&Grammar>,
) -> Result<GenerateRequest> {
    let text = format!("Answer {n} in JSON:\n");
    let mut request =
        GenerateRequest::new(engine.tokenizer().encode(&text, Specials::AsText)?, max_tokens);
    request.sampling = Sampling::greedy();
    request.prefix_cache = false;
    request.stop_at_eos = grammar.is_some();
    request.grammar = grammar.cloned();
    Ok(request)
}

fn answer(engine: &EngineHandle, request: GenerateRequest) -> Result<Answer> {
    let (before, begun) = (engine.counters().steps, Instant::now());
    let generation = engine.submit(request)?;
    loop {
        match generation.events.recv().context("an answer ends with an event")? {
            Event::Started { .. }
            | Event::Rotated(_)
            | Event::RolledBack { .. }
            | Event::Token(_)
            | Event::Tail(_) => {}
            Event::Failed(fault) => bail!("the answer failed: {fault}"),
            Event::Finished(finished) => {
                return Ok(Answer {
                    seconds: begun.elapsed().as_secs_f64(),
                    n_tokens: finished.usage.completion_tokens,
                    n_forced: finished.constrained.map_or(0, |told| told.n_forced),
                    n_steps: engine.counters().steps - before,
                });
            }
        }
    }
}

/// Ratios are those of pairs, which share what the machine did meanwhile.
fn report(
    engine: &EngineHandle,
    schema: &Value,
    idle: f64,
    pairs: &[(Answer, Answer)],
) -> Result<Value> {
    let rates = |side: fn(&(Answer, Answer)) -> &Answer| -> Vec<f64> {
        pairs.iter().map(|pair| side(pair).rate()).collect()
    };
    let ratios: Vec<f64> = pairs.iter().map(|(free, locked)| locked.rate() / free.rate()).collect();
    let (free, locked) = (rates(|pair| &pair.0), rates(|pair| &pair.1));
    let of = |read: fn(&Answer) -> f64| {
        spread(&pairs.iter().map(|(_, locked)| read(locked)).collect::<Vec<_>>())
    };
    Ok(json!({
        "model": engine.facts().model_name,
        "kernels": engine.facts().backend,
        "schema": schema,
        "idle_at_start": idle,
        "pairs": pairs.len(),
        "tokens": of(|it| it.n_tokens as f64)?,
        "forced": of(|it| it.n_forced as f64)?,
        "steps": of(|it| it.n_steps as f64)?,
        "free_tokens_per_s": spread(&free)?,
        "constrained_tokens_per_s": spread(&locked)?,
        "ratio": spread(&ratios)?,
    }))
}

fn spread(values: &[f64]) -> Result<Value> {
    let at = |share| quantile(values, share);
    Ok(json!({"median": at(0.5)?, "least": at(0.0)?, "most": at(1.0)?}))
}

/// Long fixed names, short values: what forced tokens are for.
fn long_names() -> Value {
    let names =
        ["customer_reference_number", "is_delivery_expected_tomorrow", "preferred_language"];
    let flags = names.map(|name| (name.to_owned(), json!({"enum": [true, false]})));
    let members: serde_json::Map<_, _> = flags.into_iter().collect();
    json!({"type": "object", "properties": members, "required": names,
        "additionalProperties": false})
}
