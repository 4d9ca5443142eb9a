//! `exrail probe retrieval`: what an index finds of a gold set, without a generator.

use std::{path::PathBuf, sync::Arc};

use anyhow::Result;
use clap::Args;
use exrail_hub::Kind;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_verify::{
    Asked, CollectionIndex, DEPTHS, GoldSet, PairedDifference, RetrievalQuality, Verdict,
    WeightRow, retrieval_quality,
};
use serde_json::json;

use crate::{
    Ended, environment,
    load::{self, CollectionSpec},
    options::{EncoderArgs, Sources},
    output::Output,
    progress::Bars,
};

/// Questions that are named.
const TOLD: usize = 8;

#[derive(Debug, Args)]
pub(super) struct RetrievalProbe {
    /// The gold set, JSON lines.
    #[arg(long, value_name = "FILE")]
    gold: PathBuf,
    /// The collection: a name, a folder, or NAME=DIR.
    #[arg(long, value_name = "NAME|DIR", default_value = "default")]
    collection: String,
    /// Threads; one per physical core when absent.
    #[arg(long, value_name = "N", env = environment::THREADS)]
    threads: Option<usize>,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    sources: Sources,
}

impl RetrievalProbe {
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
        let quality = retrieval_quality(&gold, &index, &*encoder, &mut |step| bars.probe(step))?;
        bars.clear();
        output.value(&json!({ "collection": spec.name, "retrieval": quality }));
        output.line(format!("collection         {}, {} chunks", spec.name, quality.chunks));
        for line in lines(&quality) {
            output.line(line);
        }
        Ok(match quality.verdict {
            Verdict::Pass => Ended::Done,
            Verdict::Review | Verdict::Fail | Verdict::Inconclusive => Ended::NotPassed,
        })
    }
}

fn lines(quality: &RetrievalQuality) -> Vec<String> {
    let mut lines = table("questions", &quality.questions);
    lines.extend(table("other wordings", &quality.wordings));
    for at in &quality.coverage {
        lines.push(format!(
            "coverage           {} of the evidence by {} snippets, {} of the questions to 0.70",
            share(at.mean),
            at.k,
            share(at.covered)
        ));
    }
    lines.push(match quality.k_needed {
        Some(k) => format!("                   {k} snippets cover 95 % of the questions to 0.70"),
        None => "                   no number of these covers 95 % of the questions".to_owned(),
    });
    let stage = &quality.first_stage;
    let interval = stage.interval.map_or(String::new(), |interval| {
        format!(" ({:.2} to {:.2})", interval.low, interval.high)
    });
    lines.push(format!(
        "gate               evidence among the first 50 as served: {}{interval}, needed {:.2}: {}",
        share(stage.value),
        stage.needed,
        stage.status
    ));
    let n_missed = quality.missed.len();
    for missed in quality.missed.iter().take(TOLD) {
        let first = missed.first_at.map_or("not found".to_owned(), |at| format!("first at {at}"));
        lines.push(format!("late               {}: {first}", missed.id));
    }
    if n_missed > TOLD {
        lines.push(format!("                   and {} more", n_missed - TOLD));
    }
    lines.push(format!("verdict            {}", quality.verdict));
    lines
}

/// Recall, nDCG and reciprocal rank by weight.
fn table(name: &str, asked: &Asked) -> Vec<String> {
    let depths = DEPTHS.map(|k| format!("{:>6}", format!("@{k}"))).concat();
    let (words, ndcg, mrr) = ("words", "nDCG@10", "MRR");
    let mut lines = vec![format!(
        "{name:<19}{:<12}{words:>6}   recall{depths}{ndcg:>9}{mrr:>7}",
        format!("{} asked", asked.n)
    )];
    lines.extend(asked.weights.iter().map(row));
    lines
}

fn row(of: &WeightRow) -> String {
    let recall = of.recall.map(|value| format!("{:>6}", share(value))).concat();
    let against = match &of.against_served {
        None => "   as served".to_owned(),
        Some(difference) => format!("   {:+.3} {}", difference.mean, in_words(difference)),
    };
    format!(
        "{:<31}{:>6.2}         {recall}{:>9}{:>7}{against}",
        "",
        of.lexical,
        share(of.ndcg_10),
        share(of.mrr)
    )
}

fn in_words(difference: &PairedDifference) -> &'static str {
    match difference.side() {
        Some(std::cmp::Ordering::Greater) => "better",
        Some(std::cmp::Ordering::Less) => "worse",
        Some(std::cmp::Ordering::Equal) | None => "no difference that can be told",
    }
}

fn share(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.2}"))
}
