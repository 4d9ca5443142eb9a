//! `exrail ask`.

use std::sync::Arc;

use anyhow::Result;
use clap::{Args, builder::RangedU64ValueParser};
use exrail_server::{
    BootBoard,
    pipeline::{ASK_K, ASK_MAX_TOKENS, AskCall, Asked, ask_sampling},
};
use exrail_verify::{CitationSource, MAX_STEPS};
use serde_json::{Value, json};

use crate::{
    Ended,
    load::{AsItIs, Boot, CollectionSpec},
    options::{EncoderArgs, EngineArgs, Sources},
    output::Output,
};

/// Answer one question from a collection, with citations, or refuse with `not in context`.
#[derive(Debug, Args)]
pub(crate) struct Ask {
    /// The question.
    question: String,
    /// The collection: a name, a folder, or NAME=DIR.
    #[arg(long, value_name = "NAME|DIR", default_value = "default")]
    collection: String,
    /// Snippets to put into the prompt.
    #[arg(long, value_name = "N", default_value_t = ASK_K)]
    k: usize,
    /// Limit on generated tokens.
    #[arg(long, value_name = "N", default_value_t = ASK_MAX_TOKENS)]
    max_tokens: usize,
    /// Make the answer step by step, at most so many (1 to 8): a step that no source supports, or that says nothing new,
    /// is taken back and drawn anew.
    #[arg(long, value_name = "N",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_STEPS as u64))]
    steps: Option<usize>,
    /// Seed of the draw.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    sources: Sources,
}

impl Ask {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let spec = CollectionSpec::parse(&self.collection)?;
        let name = spec.name.clone();
        let services = Boot {
            board: &Arc::new(BootBoard::new()),
            keys: None,
            retries: 0,
            declared: None,
            traces: None,
            output: *output,
            sources: &self.sources,
            engine: &self.engine,
            encoder: Some(&self.encoder),
            collections: vec![spec],
            prepare: &AsItIs,
            in_place_of: None,
        }
        .run()?;
        let mut sampling = ask_sampling();
        sampling.seed = self.seed;
        let (k, max_tokens, steps) = (self.k, self.max_tokens, self.steps);
        let call = AskCall { k, max_tokens, steps, sampling, ..AskCall::default() };
        let asker = &services.collections[&name];
        let asked = asker.ask(&self.question, &call)?;
        output.value(&value(&asked));
        print(*output, &asked);
        Ok(Ended::Done)
    }
}

fn value(asked: &Asked) -> Value {
    let outcome = &asked.outcome;
    json!({
        "answer": outcome.text,
        "refusal": outcome.refusal.is_some(),
        "reason": outcome.refusal.as_ref().map(|reason| reason.in_words()),
        "segments": outcome.segments,
        "steps": asked.steps(),
        "gate": outcome.gate,
        "retrieved": asked.found.iter().map(|hit| json!({
            "snippet_id": hit.chunk.snippet_id,
            "section_id": hit.chunk.section_id,
            "tokens": hit.chunk.tokens,
            "cosine": hit.cosine,
            "text": hit.chunk.text,
        })).collect::<Vec<_>>(),
        "retrieve_ms": asked.retrieve_ms,
        "total_ms": asked.total_ms,
    })
}

/// The answer with its sources, for people.
fn print(output: Output, asked: &Asked) {
    let outcome = &asked.outcome;
    output.line(&outcome.text);
    if let Some(reason) = &outcome.refusal {
        output.line(format!("  ({})", reason.in_words()));
    }
    let mut shown: Vec<&str> = Vec::new();
    for segment in &outcome.segments {
        for id in &segment.snippet_ids {
            let hit = outcome.evidence.iter().find(|hit| hit.chunk.snippet_id == *id);
            let Some(hit) = hit.filter(|_| !shown.contains(&id.as_str())) else { continue };
            shown.push(id);
            let by = match segment.citation_source {
                Some(CitationSource::Model) => "cited by the model",
                Some(CitationSource::Attributed) | None => "matched by the engine",
            };
            let chunk = &hit.chunk;
            output.line(format!(
                "  {id}  {} lines {}–{}, {by}",
                chunk.section_id, chunk.span.line_start, chunk.span.line_end
            ));
        }
    }
    if let Some(rollbacks) = outcome.rollbacks() {
        output.line(format!("  taken back: {rollbacks}"));
    }
    let first = asked.measured.and_then(|measured| measured.first_token_ms);
    let first = first.map_or("nothing generated".into(), |ms| format!("first token {ms:.0} ms"));
    output.line(format!(
        "  search {:.0} ms, {first}, total {:.0} ms",
        asked.retrieve_ms, asked.total_ms
    ));
}
