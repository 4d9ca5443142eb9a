//! `exrail probe checks`: what is done beside the generation of an answer, and how long it takes.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use clap::Args;
use exrail_hub::Kind;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_metrics::quantile;
use exrail_retrieval::{Collection, Encode, prepare};
use exrail_server::{
    Recorded,
    pipeline::{AskCall, Asked, Grounds},
};
use exrail_verify::{
    CollectionIndex, Generated, GeneratedEnd, GoldSet, LiveChecker, ResolvedItem, Retrieve as _,
    trace::{Contract, seal},
};
use exrail_wire::{Pins, TRACE_SCHEMA_VERSION, TraceBody, TraceEnvelope, schemas};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    Ended, environment,
    load::{self, CollectionSpec},
    options::{EncoderArgs, Sources},
    output::Output,
    progress::Bars,
};

/// What comparing and recording an answer may take.
const CHECKS_MS: f64 = 1.0;
/// What the vector of a question may take.
const QUESTION_MS: f64 = 6.0;

#[derive(Debug, Args)]
pub(super) struct ChecksProbe {
    /// The gold set, JSON lines.
    #[arg(long, value_name = "FILE")]
    gold: PathBuf,
    /// The collection: a name, a folder, or NAME=DIR.
    #[arg(long, value_name = "NAME|DIR", default_value = "default")]
    collection: String,
    /// How often every answerable question is gone through; the first time is not counted.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Threads; one per physical core when absent.
    #[arg(long, value_name = "N", env = environment::THREADS)]
    threads: Option<usize>,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    sources: Sources,
}

impl ChecksProbe {
    pub(super) fn run(&self, output: Output) -> Result<Ended> {
        let gold = GoldSet::read(&self.gold)?;
        let spec = CollectionSpec::parse(&self.collection)?;
        let mut bars = Bars::new(output);
        let found = self.sources.resolve(&self.encoder.encoder, Kind::Encoder, &mut bars)?;
        bars.clear();
        let backend =
            CpuBackend::new(CpuOptions { threads: self.threads, ..CpuOptions::default() })?;
        let encoder = load::load_encoder(backend, &found)?;
        let index = CollectionIndex::new(load::open(&spec, &*encoder)?, Arc::clone(&encoder));
        let items = gold.resolve(&index)?;
        let scale = load::scale(&spec, &index);
        let gate = load::gate(&scale, &index);
        let live = LiveChecker::new(&encoder, scale.as_ref().ok());
        let grounds = Grounds::new(index, gate, live)?;
        let bench = Bench { grounds: &grounds, collection: &spec.name, contract: Contract::new() };
        let mut times = Times::default();
        for round in 0..=self.rounds {
            let mut of_round = Times::default();
            for item in &items {
                bench.answer(item, &mut of_round)?;
            }
            if round > 0 {
                times.add(of_round);
            }
        }
        report(&spec.name, &times, output)
    }
}

/// Seconds of each part, answer by answer.
#[derive(Debug, Default)]
struct Times {
    /// The vector of a question.
    question: Vec<f64>,
    /// The comparisons of an answer with what it cites.
    comparisons: Vec<f64>,
    /// Its record: written out, sealed, read back and held against the contract.
    contract: Vec<f64>,
    /// Both of them.
    checks: Vec<f64>,
    /// The vector of an answer whose snippets have theirs.
    answer: Vec<f64>,
}

impl Times {
    fn add(&mut self, other: Times) {
        let Times { question, comparisons, contract, checks, answer } = other;
        self.question.extend(question);
        self.comparisons.extend(comparisons);
        self.contract.extend(contract);
        self.checks.extend(checks);
        self.answer.extend(answer);
    }
}

struct Bench<'a> {
    grounds: &'a Grounds,
    collection: &'a str,
    contract: Contract,
}

impl Bench<'_> {
    /// Goes through one question whose answer is the evidence itself, sentence by sentence.
    fn answer(&self, item: &ResolvedItem, times: &mut Times) -> Result<()> {
        let index = self.grounds.index();
        let question = &*item.item.question;
        times.question.push(self.encode(question, &**index.encoder())?);
        let call = AskCall::default();
        let options = exrail_retrieval::SearchOptions { k: call.k, ..<_>::default() };
        let found = index.search(question, &options)?;
        let quotes: Vec<&str> = item.spans.iter().map(|span| span.text().trim()).collect();
        let reply = Generated {
            text: quotes.join(" "),
            end: GeneratedEnd::Stop,
            n_prompt_tokens: 1,
            n_output_tokens: 1,
            n_cached_tokens: 0,
        };
        let Some(asked) = self.grounds.decide(question, found, reply) else { return Ok(()) };
        let recorded =
            Recorded { grounds: self.grounds, collection: self.collection, question, call: &call };
        let contract = self.record(&recorded, &asked, index.collection())?;
        let comparisons = asked.checks.took;
        times.comparisons.push(comparisons.as_secs_f64());
        times.contract.push(contract.as_secs_f64());
        times.checks.push((comparisons + contract).as_secs_f64());
        times.answer.extend(asked.checks.embedding_took.map(|took| took.as_secs_f64()));
        Ok(())
    }

    fn encode(&self, question: &str, encoder: &dyn Encode) -> Result<f64> {
        let text = format!("{}{}", encoder.facts().query_prefix, prepare(question));
        let begun = Instant::now();
        encoder.encode(&[&text])?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// What the trace log does with an answer before it writes.
    fn record(
        &self,
        recorded: &Recorded<'_>,
        asked: &Asked,
        collection: &Collection,
    ) -> Result<Duration> {
        let body = TraceBody::Answer(Box::new(recorded.answer(asked)));
        let envelope = self.envelope(body);
        let begun = Instant::now();
        let line = seal(&serde_json::to_value(&envelope)?.to_string());
        let read: Value = serde_json::from_str(&line)?;
        let findings = self.contract.check(&read, Some(collection));
        let took = begun.elapsed();
        if let Err(breach) = findings.first() {
            bail!("the record of {}: {breach}", recorded.question);
        }
        Ok(took)
    }

    /// A record as the log has it. No model is loaded whose fingerprint it could carry.
    fn envelope(&self, body: TraceBody) -> TraceEnvelope {
        let index = self.grounds.index();
        TraceEnvelope {
            schema_version: TRACE_SCHEMA_VERSION,
            ts: jiff::Timestamp::now().to_string(),
            trace_id: "trace-probe".into(),
            request_id: "ask-probe".into(),
            session_id: None,
            agent_id: None,
            mem_rev: 0,
            mem_hash: None,
            forced: None,
            pins: Pins {
                model_fp: "none".into(),
                tok_fp: "none".into(),
                encoder_fp: Some(index.encoder_fp().into()),
                index_hash: Some(index.index_hash().into()),
                template_hash: None,
                schema_hash: schemas::SHA256.into(),
                quant: "none".into(),
                kv_dtype: "none".into(),
                tp: 1,
                engine_build: exrail_server::ENGINE_BUILD.into(),
            },
            body,
        }
    }
}

/// Milliseconds of one part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Part {
    n: usize,
    median_ms: f64,
    p99_ms: f64,
}

impl Part {
    /// None of a part that never ran.
    fn of(seconds: &[f64]) -> Result<Option<Part>> {
        if seconds.is_empty() {
            return Ok(None);
        }
        let ms = |share| -> Result<f64> { Ok(1e3 * quantile(seconds, share)?) };
        Ok(Some(Part { n: seconds.len(), median_ms: ms(0.5)?, p99_ms: ms(0.99)? }))
    }
}

fn report(collection: &str, times: &Times, output: Output) -> Result<Ended> {
    let (Some(checks), Some(question)) = (Part::of(&times.checks)?, Part::of(&times.question)?)
    else {
        bail!("expected a gold set with a question that the gate lets in, found none");
    };
    let (comparisons, contract) = (Part::of(&times.comparisons)?, Part::of(&times.contract)?);
    let answer = Part::of(&times.answer)?;
    let passes = checks.p99_ms <= CHECKS_MS && question.median_ms <= QUESTION_MS;
    output.value(&json!({
        "collection": collection,
        "question_vector": question,
        "comparisons": comparisons,
        "contract": contract,
        "checks": checks,
        "answer_vector": answer,
        "goals": { "checks_p99_ms": CHECKS_MS, "question_vector_median_ms": QUESTION_MS },
        "passes": passes,
    }));
    let rows = [
        ("question vector", Some(question), format!("median at most {QUESTION_MS} ms")),
        ("comparisons", comparisons, String::new()),
        ("contract", contract, String::new()),
        ("both", Some(checks), format!("p99 at most {CHECKS_MS} ms")),
        ("answer vector", answer, String::new()),
    ];
    output.line(format!("{:<18}{:>8}{:>12}{:>12}", "milliseconds", "n", "median", "p99"));
    for (name, part, goal) in rows {
        output.line(match part {
            Some(Part { n, median_ms, p99_ms }) => {
                format!("{name:<18}{n:>8}{median_ms:>12.3}{p99_ms:>12.3}   {goal}")
            }
            None => format!("{name:<18}{:>8}   no scale to measure it on: exrail calibrate", "–"),
        });
    }
    Ok(if passes { Ended::Done } else { Ended::NotPassed })
}
