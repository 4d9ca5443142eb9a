//! `exrail probe`.

mod checks;
mod distributions;
pub(super) mod injection;
mod lambda;
pub(super) mod quant;
mod retrieval;

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use exrail_server::{BootBoard, Services, oracle::EngineOracle};
use exrail_text::Specials;
use exrail_verify::{CacheFault, CacheReport, ProbeText, Verdict, cache_probe};
use serde_json::{Value, json};

use self::{
    checks::ChecksProbe, distributions::DistributionProbe, injection::InjectionProbe,
    lambda::LambdaProbe, quant::QuantProbe, retrieval::RetrievalProbe,
};
use crate::{
    Ended,
    load::{AsItIs, Boot},
    options::{EngineArgs, Sources},
    output::Output,
    pack::sample_text,
};

/// Tokens that are probed when nobody says how many: enough for drift and slow growth, and the prefills of the
/// oracle, whose tokens grow with the square, still take seconds on a CPU.
const DEFAULT_TOKENS: usize = 4096;

/// Measure one part of a model by itself.
#[derive(Debug, Args)]
pub(crate) struct Probe {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Compare a live KV cache with fresh prefills of the same tokens.
    ///
    /// Reads a text token by token, as an answer is, and every 256 tokens compares the next-token
    /// distribution with that of a fresh prefill. Prints after how many tokens the cache drifted, or the
    /// bound up to which it did not, and the loss by position: one that rises while the cache is right is a
    /// context beyond the model's range, which no rotation cures. Exits 0 when the cache is right, 3 when
    /// it is not or cannot be told.
    #[command(after_help = "Examples:
  exrail probe cache model.gguf                          4,096 tokens of the sample corpus
  exrail probe cache model.gguf --text book.txt --tokens 16384")]
    Cache(CacheProbe),
    /// Try to inject control tokens, roles and leaks with 180 texts of strangers.
    ///
    /// Each text stands where a user speaks. Counts how many become control tokens, how many change what the
    /// chat template writes around them, and how many answers tell a stretch of the system message past the leak
    /// guard. Prints the share that may get through at most, with 95 % confidence. Exits 0 when none did, 3
    /// otherwise.
    #[command(after_help = "Examples:
  exrail probe injection model.gguf                its template and tokenizer; a stub that always obeys
  exrail probe injection model.gguf --generate     and what the model itself says")]
    Injection(InjectionProbe),
    /// Compare what a model computes with the distributions that its manifest keeps.
    ///
    /// Behind each eighth of 256 tokens the next-token distribution is compared with the golden one. A server with
    /// `--manifest FILE` does the same before it is ready. Exits 0 when each is within 0.02 nats, 3 otherwise.
    #[command(after_help = "Examples:
  exrail preflight model.gguf --write model.manifest.json
  exrail probe distributions model.gguf --manifest model.manifest.json --write    once, on a machine that is right
  exrail probe distributions model.gguf --manifest model.manifest.json            behind a change of anything")]
    Distributions(DistributionProbe),
    /// Compare int8 and int4 of a model with the model, token by token.
    ///
    /// All of them read the same text, and every next-token distribution is compared with that of the stored weights
    /// in exact arithmetic: divergence, most likely token, perplexity, and what rounding costs each matrix. Nothing is
    /// generated, and no distribution is kept. The limits are for models from 3 billion parameters; below, the
    /// verdict is inconclusive unless int4 is nearer than int8. Exits 0 when all pass, 3 otherwise.
    #[command(after_help = "Examples:
  exrail probe quant model-f16.gguf                       the sample corpus, 4,096 tokens
  exrail probe quant checkpoint/ --text wiki.txt --text prompts.txt --tokens 16384 --json > fidelity.json
  exrail probe quant model-q4_k_m.gguf --modes int8       what int8 would cost what is in the file
  exrail probe quant checkpoint/ --against checkpoint-int4/ --modes as-served")]
    Quant(QuantProbe),
    /// Compare what int8 and int4 of a model answer with what the model answers, over the same evidence.
    ///
    /// Each of a few gold questions is asked in three wordings with two seeds, by one mode after the other, over evidence
    /// that was retrieved once; the model as it is served also over what each wording retrieves. Answers that say the same
    /// are one class. Prints λ of each mode, the share of questions whose state or majority answer flips, right answers
    /// won and lost, citations, and whether every mode finds the same evidence to the bit. Exits 0 when all pass, which
    /// needs 50 questions, 3 otherwise.
    #[command(after_help = "Examples:
  exrail ingest docs/ --collection docs
  exrail probe lambda model-f16.gguf --gold gold.jsonl --collection docs                8 questions, a screen
  exrail probe lambda checkpoint/ --gold gold.jsonl --collection docs --items 60 --json > lambda.json
  exrail probe lambda model-q4_k_m.gguf --gold gold.jsonl --collection docs --modes as-served,int8")]
    Lambda(LambdaProbe),
    /// Measure what a collection finds of the evidence of gold questions. No generator is loaded.
    ///
    /// Prints recall, nDCG@10 and mean reciprocal rank of the questions and of their other wordings, for five weights of
    /// words against vectors, with what another weight than the served one would change; coverage by the number of snippets,
    /// and how many are enough; and the questions whose evidence comes late. Exits 0 when the first 50 snippets hold
    /// all evidence of 85 % of the questions, 3 otherwise.
    #[command(after_help = "Examples:
  exrail ingest docs/ --collection docs
  exrail probe retrieval --gold gold.jsonl --collection docs
  exrail probe retrieval --gold gold.jsonl --collection docs --json > retrieval.json")]
    Retrieval(RetrievalProbe),
    /// Measure what is done beside the generation of an answer: its vectors, its checks, its record.
    ///
    /// Goes through the answerable questions of a gold set as the server does, with the evidence itself as the answer.
    /// Prints median and 99th percentile of the vector of a question, of the comparisons of an answer with what it cites,
    /// of its record and the contract that it is held to, and of the vector of an answer. No generator is loaded. Exits 0
    /// when comparisons and contract together take at most 1 ms (p99) and the vector of a question at most 6 ms (median),
    /// 3 otherwise.
    #[command(after_help = "Examples:
  exrail ingest docs/ --collection docs
  exrail probe checks --gold gold.jsonl --collection docs
  exrail probe checks --gold gold.jsonl --collection docs --rounds 50 --json > checks.json")]
    Checks(ChecksProbe),
}

/// The model that is probed.
#[derive(Clone, Debug, Args)]
struct ProbedModel {
    /// Generator: a name of the registry, a GGUF file or a Hugging Face folder.
    #[arg(value_name = "MODEL")]
    probed: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sources: Sources,
}

#[derive(Debug, Args)]
struct CacheProbe {
    #[command(flatten)]
    model: ProbedModel,
    /// One long document, UTF-8; the sample corpus when absent.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens to probe, at least 2,048 and at most the context; 4,096 when absent, or the context or the
    /// text if that is shorter.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
}

impl Probe {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        match &self.part {
            Part::Cache(probe) => probe.run(*output),
            Part::Injection(probe) => probe.run(*output),
            Part::Distributions(probe) => probe.run(*output),
            Part::Quant(probe) => probe.run(*output),
            Part::Lambda(probe) => probe.run(*output),
            Part::Retrieval(probe) => probe.run(*output),
            Part::Checks(probe) => probe.run(*output),
        }
    }
}

impl ProbedModel {
    /// What it is called.
    fn name(&self) -> &str {
        self.probed.as_ref().unwrap_or(&self.engine.model)
    }

    fn boot(&self, output: Output) -> Result<Services> {
        self.boot_with(output, self.engine.clone())
    }

    /// Boots it with other options of the engine.
    fn boot_with(&self, output: Output, mut engine: EngineArgs) -> Result<Services> {
        self.name().clone_into(&mut engine.model);
        Boot {
            board: &Arc::new(BootBoard::new()),
            keys: None,
            retries: 0,
            declared: None,
            traces: None,
            output,
            sources: &self.sources,
            engine: &engine,
            encoder: None,
            collections: Vec::new(),
            prepare: &AsItIs,
            in_place_of: None,
        }
        .run()
    }
}

impl CacheProbe {
    fn run(&self, output: Output) -> Result<Ended> {
        let text = match &self.text {
            Some(file) => {
                std::fs::read_to_string(file).with_context(|| format!("text {}", file.display()))?
            }
            None => sample_text(),
        };
        let services = self.model.boot(output)?;
        let engine = &services.engine;
        let (facts, tokenizer) = (engine.facts(), engine.tokenizer());
        let ids = tokenizer.encode(&text, Specials::AsText)?;
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let there = ids.len() + usize::from(bos.is_some());
        let n_tokens = self.tokens.unwrap_or(DEFAULT_TOKENS.min(facts.context).min(there));
        let oracle = EngineOracle::new(engine);
        let text = ProbeText { bos, ids: &ids };
        let mut told = |n| tracing::info!("{n} of {n_tokens} tokens compared");
        let report = cache_probe(&oracle, text, n_tokens, oracle.width(), &mut told)?;
        output.value(&as_json(&report, &services.model_name, &facts.backend));
        for line in lines(&report, &services.model_name, &facts.backend) {
            output.line(line);
        }
        engine.shutdown();
        Ok(match report.verdict {
            Verdict::Pass => Ended::Done,
            Verdict::Review | Verdict::Fail | Verdict::Inconclusive => Ended::NotPassed,
        })
    }
}

fn as_json(report: &CacheReport, model: &str, device: &str) -> Value {
    json!({ "model": model, "device": device, "cache": report, "advice": advice(report) })
}

fn lines(report: &CacheReport, model: &str, device: &str) -> Vec<String> {
    let CacheReport { tokens, tokens_until_drift, oracle_kl_max, limit, noise_p99, .. } = report;
    let loss = |from: usize| {
        let bins = &report.bins[from..];
        #[expect(clippy::cast_precision_loss, reason = "a probe has few bins")]
        let n = bins.len() as f64;
        bins.iter().map(|bin| bin.nll).sum::<f64>() / n
    };
    let verdict = match report.verdict {
        Verdict::Pass => "pass",
        Verdict::Review => "review",
        Verdict::Fail => "fail",
        Verdict::Inconclusive => "inconclusive",
    };
    let mut lines = vec![
        format!("model              {model}, {device}"),
        format!("tokens             {tokens}, {} checkpoints", report.checkpoints.len()),
        format!("until drift        {tokens_until_drift}"),
        format!(
            "oracle KL          at most {oracle_kl_max:.2e} nats; limit {limit:.2e}, noise p99 {noise_p99:.2e}"
        ),
        format!(
            "loss by position   {:.3} nats in the second bin of 512 tokens, {:.3} in the last two; slope \
             {:+.3} per 1,000 tokens",
            report.bins[1].nll,
            loss(report.bins.len() - 2),
            report.nll_slope_per_1k
        ),
        format!(
            "                   {:+.3} nats at the end against the same tokens in a short context",
            report.nll_excess
        ),
        format!("page books         {} violations", report.violations),
        format!("verdict            {verdict}"),
    ];
    lines.extend(advice(report).map(|advice| format!("                   {advice}")));
    lines
}

/// What a fault means and what to do.
fn advice(report: &CacheReport) -> Option<&'static str> {
    Some(match report.fault? {
        CacheFault::KvIntegrity => {
            "the page books broke: run again, and if it stays, report it with this output"
        }
        CacheFault::Noise => {
            "decode and prefill differ on the first page already: compare the kernels first (exrail probe \
             cache --device cpu, or --batch-invariant)"
        }
        CacheFault::CacheDrift => {
            "the live cache is not what a fresh prefill is: rotate below that many tokens, or use --kv f16; \
             report it with this output"
        }
        CacheFault::LastCheckpoint => {
            "the last checkpoint alone is over the limit: probe 512 tokens more"
        }
        CacheFault::ContextRange => {
            "context-range fault: the loss rises although the cache is right. Rotation will not cure it; keep \
             --max-context below that, or use a model that is trained for it"
        }
    })
}
