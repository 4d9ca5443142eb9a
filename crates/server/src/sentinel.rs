//! The sentinel (G-01): before `ready`, a real request runs through the production path, and its
//! answer and its refusal are checked.

use exrail_engine::{EngineHandle, Event, Finish, GenerateRequest, Sampling};
use exrail_text::ChatMessage;
use exrail_verify::{
    Begun, CollectionIndex, EvidenceGate, GoldenDistributions, GoldenDivergence, GoldenError,
    Nonce, REFUSAL_TOKEN, Retrieve, begin,
};
use thiserror::Error;

use crate::{oracle::EngineOracle, state::Services, translate};

/// Tokens of a generation before a server is ready (§3.1).
pub const SERVED: usize = 64;
/// The same before a command answers once (G-05 P).
pub const ONCE: usize = 10;

/// Generations: the first and the last one must be the same.
const RUNS: usize = 3;

/// The production path does not work.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SentinelError {
    /// The prompt could not be made.
    #[error("sentinel prompt: {0}")]
    Prompt(String),
    /// The generation failed.
    #[error("sentinel generation: expected {expected} tokens, found {found}")]
    Generation {
        /// Tokens asked for.
        expected: usize,
        /// What came instead.
        found: String,
    },
    /// The same request was answered in two ways.
    #[error(
        "sentinel: expected the greedy tokens of run 1 in run {RUNS}, found others from token {at} on; \
         the first run computed something else than the later ones"
    )]
    Unstable {
        /// Index of the first token that differs.
        at: usize,
    },
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
    /// The golden distributions could not be compared.
    #[error(transparent)]
    Golden(#[from] GoldenError),
    /// The model computes something else than when its manifest was written (G-09).
    #[error(
        "golden distributions: expected a KL divergence of at most {limit} nats at all {places} places, found {max:.3} \
         behind {behind} tokens; the files are those of the manifest, so kernels or options compute something else \
         than `{made_on}` did: compare them with `exrail probe distributions`, or write the manifest anew"
    )]
    Drifted {
        /// Most that is allowed.
        limit: f64,
        /// Places compared.
        places: usize,
        /// Largest found.
        max: f64,
        /// Tokens in front of it.
        behind: usize,
        /// Device and kernels of the golden ones.
        made_on: String,
    },
    /// A question without evidence was not refused.
    #[error("sentinel refusal: expected `{REFUSAL_TOKEN}` for a question without evidence")]
    Refusal,
}

/// Runs the sentinel with generations of so many tokens, fewer where the context is shorter; returns a line
/// for people. `told` hears of every token, so that a slow model is not taken for one that hangs.
///
/// # Errors
/// The first check that failed.
pub fn run(
    services: &Services,
    n_tokens: usize,
    told: &mut dyn FnMut(),
) -> Result<String, SentinelError> {
    let runs = (0..RUNS).map(|_| generate(&services.engine, n_tokens, told));
    let runs: Result<Vec<_>, _> = runs.collect();
    let generated = unchanged(&runs?)?;
    refuse()?;
    for (name, asker) in &services.collections {
        search(name, asker.index())?;
    }
    let n_collections = services.collections.len();
    Ok(format!(
        "{generated} tokens, the same in run 1 and {RUNS}, refusal exact, {n_collections} collections searched"
    ))
}

/// Compares the model with its golden distributions (G-09); returns a line for people.
///
/// # Errors
/// [`SentinelError::Golden`], [`SentinelError::Drifted`].
pub fn golden(
    engine: &EngineHandle,
    golden: &GoldenDistributions,
    told: &mut dyn FnMut(),
) -> Result<String, SentinelError> {
    let found = golden.compare(&EngineOracle::new(engine), told)?;
    let (places, passes) = (found.kl.len(), found.passes());
    let GoldenDivergence { max, behind, limit, made_on, .. } = found;
    if !passes {
        return Err(SentinelError::Drifted { limit, places, max, behind, made_on });
    }
    Ok(format!("{places} golden distributions within {max:.1e} nats"))
}

/// The number of tokens of the runs, of which the first and the last are the same.
fn unchanged(runs: &[Vec<u32>]) -> Result<usize, SentinelError> {
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(0) };
    if first == last {
        return Ok(first.len());
    }
    let at = first.iter().zip(last).take_while(|(one, other)| one == other).count();
    Err(SentinelError::Unstable { at })
}

/// Template, tokenizer, engine, detokenizer.
fn generate(
    engine: &EngineHandle,
    n_tokens: usize,
    told: &mut dyn FnMut(),
) -> Result<Vec<u32>, SentinelError> {
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
    // A prompt without room for an answer is the engine's to refuse.
    let expected = n_tokens.min(engine.max_new_tokens(prompt.len())).max(1);
    let request = GenerateRequest {
        sampling: Sampling::greedy(),
        stop_at_eos: false,
        ..GenerateRequest::new(prompt, expected)
    };
    let failed = |what: &dyn std::fmt::Display| SentinelError::Generation {
        expected,
        found: what.to_string(),
    };
    let mut ids = Vec::with_capacity(expected);
    let generation = engine.submit(request).map_err(|error| failed(&error))?;
    for event in &generation.events {
        match event {
            Event::Started { .. }
            | Event::Rotated(_)
            | Event::RolledBack { .. }
            | Event::Tail(_) => {}
            Event::Token(token) => {
                ids.push(token.id);
                told();
            }
            Event::Finished(finished) => {
                let whole = finished.finish == Finish::Length && ids.len() == expected;
                return if whole { Ok(ids) } else { Err(failed(&ids.len())) };
            }
            Event::Failed(fault) => return Err(failed(&fault)),
        }
    }
    Err(failed(&"no end"))
}

/// A question without evidence gets the exact refusal token and no generation.
fn refuse() -> Result<(), SentinelError> {
    let nonce = Nonce::derive(&[b"sentinel"]);
    match begin("What is the evidence?", &[], &EvidenceGate::not_calibrated(), (None, &nonce)) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_run_that_is_unlike_the_third_is_refused_with_its_token() {
        let same = vec![5, 6, 7];
        assert_eq!(unchanged(&[same.clone(), same.clone(), same.clone()]).unwrap(), 3);
        let cold = vec![5, 9, 7];
        let error = unchanged(&[cold, same.clone(), same]).unwrap_err();
        assert!(matches!(error, SentinelError::Unstable { at: 1 }), "{error}");
    }
}
