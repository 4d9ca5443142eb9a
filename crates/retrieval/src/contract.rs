//! The contract of a collection: what every vector and chunk in it was made with (G-07, G-24).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::hash::sha256_hex;
use crate::lexical::ANALYZER;
use crate::{ChunkOptions, Encode, EncoderFacts, FieldDiff, PREPARATION, RetrievalError};

/// Layout version of a collection on disk; any other is refused.
pub const SCHEMA_VERSION: u32 = 1;

/// Tokenised at creation and at every open: two tokenizers that claim the same fingerprint but
/// give other ids are told apart (G-24: tokenizer ids equal on client and index).
const TOKENIZER_PROBE: &str =
    "The QUICK brown-fox's naïve café: 3.14159 µm, x_y->z[0]; Übergrößenträger 中文 🙂 unhappily";

/// Largest deviation of a norm from 1 (G-24).
const NORM_TOLERANCE: f64 = 1e-3;

/// What every vector and chunk of a collection was made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contract {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// [`Encode::fingerprint`].
    pub encoder_fp: String,
    /// What the fingerprint stands for.
    pub encoder: EncoderFacts,
    /// Hex sha256 over the ids of a fixed text.
    pub tokenizer_probe: String,
    /// [`PREPARATION`].
    pub preparation: String,
    /// Name of the rules of the lexical index.
    pub analyzer: String,
    /// Chunk sizes.
    pub chunking: ChunkOptions,
}

impl Contract {
    /// The contract of `encoder` with these chunk sizes.
    ///
    /// # Errors
    /// [`RetrievalError::BadChunkOption`]; [`RetrievalError::UnsupportedEncoder`] if the vectors
    /// are not of unit norm, not for cosine, or empty.
    pub fn new(encoder: &dyn Encode, chunking: ChunkOptions) -> Result<Contract, RetrievalError> {
        chunking.check()?;
        let facts = encoder.facts();
        let unsupported =
            |field, expected, found| RetrievalError::UnsupportedEncoder { field, expected, found };
        if facts.metric != "cosine" {
            return Err(unsupported("metric", "cosine", facts.metric));
        }
        if !facts.normalized {
            return Err(unsupported("normalized", "true", "false".to_owned()));
        }
        if facts.dim == 0 || facts.dim > 1 << 16 {
            return Err(unsupported("dim", "1 to 65536", facts.dim.to_string()));
        }
        let prefix = encoder.tokenize(&facts.passage_prefix).len();
        if chunking.window.saturating_add(prefix) > facts.max_tokens {
            let found = facts.max_tokens.to_string();
            return Err(unsupported("max_tokens", "at least window and passage prefix", found));
        }
        Ok(Contract {
            schema_version: SCHEMA_VERSION,
            encoder_fp: encoder.fingerprint().to_owned(),
            tokenizer_probe: probe(encoder),
            encoder: facts,
            preparation: PREPARATION.to_owned(),
            analyzer: ANALYZER.to_owned(),
            chunking,
        })
    }

    /// Refuses an encoder that is not the contract's (G-24), naming every field that differs.
    ///
    /// # Errors
    /// [`RetrievalError::ContractMismatch`].
    pub fn check_encoder(&self, encoder: &dyn Encode) -> Result<(), RetrievalError> {
        let live = Contract {
            schema_version: SCHEMA_VERSION,
            encoder_fp: encoder.fingerprint().to_owned(),
            tokenizer_probe: probe(encoder),
            encoder: encoder.facts(),
            preparation: PREPARATION.to_owned(),
            analyzer: ANALYZER.to_owned(),
            chunking: self.chunking,
        };
        if live == *self {
            return Ok(());
        }
        let mut diff = Vec::new();
        compare("", &self.to_json(), &live.to_json(), &mut diff);
        Err(RetrievalError::ContractMismatch { diff })
    }

    /// Refuses a vector of another length or norm; `name` is what the error calls it.
    pub(crate) fn check_vector(&self, name: &str, vector: &[f32]) -> Result<(), RetrievalError> {
        let expected = self.encoder.dim;
        if vector.len() != expected {
            let found = vector.len();
            return Err(RetrievalError::VectorDim { name: name.to_owned(), expected, found });
        }
        let square: f64 = vector.iter().map(|value| f64::from(*value).powi(2)).sum();
        let norm = square.sqrt();
        // Written so that a NaN is refused as well.
        if (norm - 1.0).abs() < NORM_TOLERANCE {
            return Ok(());
        }
        Err(RetrievalError::VectorNorm { name: name.to_owned(), norm })
    }

    pub(crate) fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("strings and numbers always serialise")
    }
}

fn probe(encoder: &dyn Encode) -> String {
    let ids = encoder.tokenize(TOKENIZER_PROBE);
    let bytes: Vec<u8> = ids.iter().flat_map(|(id, _)| id.to_le_bytes()).collect();
    sha256_hex(&bytes)
}

/// Adds the leaves in which `stored` and `live` differ.
fn compare(field: &str, stored: &Value, live: &Value, diff: &mut Vec<FieldDiff>) {
    if let (Value::Object(before), Value::Object(after)) = (stored, live) {
        for (key, value) in before {
            let name = if field.is_empty() { key.clone() } else { format!("{field}.{key}") };
            compare(&name, value, after.get(key).unwrap_or(&Value::Null), diff);
        }
    } else if stored != live {
        let (stored, live) = (stored.to_string(), live.to_string());
        diff.push(FieldDiff { field: field.to_owned(), stored, live });
    }
}
