//! The sentinel (G-01): before `ready`, a real request runs through the production path, and its
//! answer and its refusal are checked.

use exrail_engine::{EngineHandle, Event, Finish, GenerateRequest, Sampling};
use exrail_text::ChatMessage;
use exrail_verify::{Begun, CollectionIndex, DeltaSGate, Nonce, REFUSAL_TOKEN, Retrieve, begin};
use thiserror::Error;

use crate::{state::Services, translate};

/// Tokens of the sentinel's generation (G-05 P).
const TOKENS: usize = 10;

/// The production path does not work.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SentinelError {
    /// The prompt could not be made.
    #[error("sentinel prompt: {0}")]
    Prompt(String),
    /// The generation failed.
    #[error("sentinel generation: expected up to {TOKENS} tokens, found {0}")]
    Generation(String),
    /// A chunk of the index does not find itself.
    #[error("sentinel search in `{collection}`: expected chunk {snippet_id} among the first hits")]
    Search {
        /// The collection.
        collection: String,
        /// The chunk that was searched by its own text.
        snippet_id: String,
    },
    /// The search failed.
    #[error("sentinel search in `{collection}`: {reason}")]
    SearchFailed {
        /// The collection.
        collection: String,
        /// Why.
        reason: String,
    },
    /// A question without evidence was not refused.
    #[error("sentinel refusal: expected `{REFUSAL_TOKEN}` for a question without evidence")]
    Refusal,
}

/// Runs the sentinel; returns a line for people.
///
/// # Errors
/// The first check that failed.
pub fn run(services: &Services) -> Result<String, SentinelError> {
    let generated = generate(&services.engine)?;
    refuse()?;
    for (name, asker) in &services.collections {
        search(name, asker.index())?;
    }
    let n_collections = services.collections.len();
    Ok(format!("{generated} tokens, refusal exact, {n_collections} collections searched"))
}

/// Template, tokenizer, engine, detokenizer.
fn generate(engine: &EngineHandle) -> Result<usize, SentinelError> {
    let prompt = match engine.template() {
        Some(_) => {
            let hello = ChatMessage::new("user", "Say hello.");
            translate::chat_prompt(engine, &[hello])
                .map_err(|error| SentinelError::Prompt(error.to_string()))?
        }
        None => engine
            .tokenizer()
            .encode("Hello", exrail_text::Specials::AsText)
            .map_err(|error| SentinelError::Prompt(error.to_string()))?,
    };
    let request = GenerateRequest {
        sampling: Sampling::greedy(),
        stop_at_eos: false,
        ..GenerateRequest::new(prompt, TOKENS)
    };
    let failed = |what: &dyn std::fmt::Display| SentinelError::Generation(what.to_string());
    let generation = engine.submit(request).map_err(|error| failed(&error))?;
    for event in &generation.events {
        match event {
            Event::Started { .. } | Event::Token(_) | Event::Rotated(_) | Event::Tail(_) => {}
            Event::Finished(finished) => {
                let found = finished.usage.completion_tokens;
                let whole = finished.finish == Finish::Length && found == TOKENS;
                return if whole { Ok(found) } else { Err(failed(&found)) };
            }
            Event::Failed(fault) => return Err(failed(&fault)),
        }
    }
    Err(failed(&"no end"))
}

/// A question without evidence gets the exact refusal token and no generation.
fn refuse() -> Result<(), SentinelError> {
    let nonce = Nonce::derive(&[b"sentinel"]);
    match begin("What is the evidence?", &[], &DeltaSGate::NotCalibrated, &nonce) {
        Begun::Refused(outcome) if outcome.text == REFUSAL_TOKEN => Ok(()),
        Begun::Refused(_) | Begun::Prompt { .. } => Err(SentinelError::Refusal),
    }
}

/// The first chunk must be found by its own text (hit@k on a known pair, G-06).
fn search(name: &str, index: &CollectionIndex) -> Result<(), SentinelError> {
    let Some(chunk) = index.collection().chunks().first() else { return Ok(()) };
    let hits = index.search(&chunk.text, &exrail_retrieval::SearchOptions::default()).map_err(
        |error| SentinelError::SearchFailed { collection: name.into(), reason: error.to_string() },
    )?;
    if hits.iter().any(|hit| hit.chunk.text_sha256 == chunk.text_sha256) {
        return Ok(());
    }
    Err(SentinelError::Search { collection: name.into(), snippet_id: chunk.snippet_id.clone() })
}
