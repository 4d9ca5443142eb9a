//! The sentence encoder behind [`exrail_retrieval::Encode`].

use std::ops::Range;
use std::path::{Path, PathBuf};

use exrail_checkpoint::{BertConfig, Pooling, SafetensorsFile, sha256_file, sha256_hex};
use exrail_kernels::Backend;
use exrail_model::Encoder;
use exrail_retrieval::{Encode, EncodeError, EncoderFacts};
use exrail_text::Tokenizer;

use crate::error::EngineError;

/// Texts of one forward pass. More would not be faster on two cores and would hold more memory.
const BATCH_TEXTS: usize = 16;

/// A BERT-type sentence encoder on a device. Calls may come from any thread; the device orders
/// them.
pub struct SentenceEncoder<B: Backend> {
    backend: B,
    encoder: Encoder<B>,
    tokenizer: Tokenizer,
    facts: EncoderFacts,
    fingerprint: String,
}

impl<B: Backend> SentenceEncoder<B> {
    /// Loads a sentence-transformers folder: configuration, `model.safetensors`, `tokenizer.json`.
    /// The model has no prefixes for questions and passages.
    ///
    /// # Errors
    /// A file is missing or refused, or the device has no memory for the weights.
    pub fn load(backend: B, dir: &Path) -> Result<SentenceEncoder<B>, EngineError> {
        let config = BertConfig::from_dir(dir)?;
        let weights_path = dir.join("model.safetensors");
        let weights = SafetensorsFile::open(&weights_path)?;
        let tokenizer_path = dir.join("tokenizer.json");
        let json = std::fs::read(&tokenizer_path).map_err(|source| io(&tokenizer_path, source))?;
        let tokenizer = Tokenizer::from_json(&json)?;
        if tokenizer.vocab_len() > config.vocab_size {
            let (rows, tokens) = (config.vocab_size, tokenizer.vocab_len());
            return Err(EngineError::VocabularyTooLarge { rows, tokens });
        }
        let encoder = Encoder::load(&backend, &config, &weights)?;
        let weights_sha256 = sha256_file(&weights_path, &mut |_| Ok(()))
            .map_err(|source| io(&weights_path, source))?;
        let n_special = tokenizer.wrap_sentence(&[])?.len();
        let pooling = match config.pooling {
            Pooling::Mean => "mean",
        };
        let facts = EncoderFacts {
            name: model_name(dir),
            dim: config.width,
            max_tokens: config.max_seq_length.saturating_sub(n_special),
            pooling: pooling.to_owned(),
            normalized: true,
            metric: "cosine".to_owned(),
            query_prefix: String::new(),
            passage_prefix: String::new(),
            tokenizer_fp: tokenizer.fingerprint().to_owned(),
        };
        let fingerprint = fingerprint(&weights_sha256, "f32", &facts);
        Ok(SentenceEncoder { backend, encoder, tokenizer, facts, fingerprint })
    }

    /// The encoder's tokenizer: the index tokenizer of §1.2.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn ids(&self, index: usize, text: &str) -> Result<Vec<u32>, EncodeError> {
        let content = self.tokenizer.encode_with_offsets(text).map_err(model_error)?;
        if content.is_empty() {
            return Err(EncodeError::Empty { index });
        }
        if content.len() > self.facts.max_tokens {
            let (tokens, limit) = (content.len(), self.facts.max_tokens);
            return Err(EncodeError::TooLong { index, tokens, limit });
        }
        let ids: Vec<u32> = content.into_iter().map(|(id, _)| id).collect();
        self.tokenizer.wrap_sentence(&ids).map_err(model_error)
    }
}

impl<B: Backend> Encode for SentenceEncoder<B> {
    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn facts(&self) -> EncoderFacts {
        self.facts.clone()
    }

    fn tokenize(&self, text: &str) -> Vec<(u32, Range<usize>)> {
        // A vocabulary with an unknown token encodes every text; one without is refused at load.
        self.tokenizer.encode_with_offsets(text).unwrap_or_default()
    }

    /// Texts are grouped by length, so that a batch holds like sizes, and returned in order.
    fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, EncodeError> {
        let ids = texts
            .iter()
            .enumerate()
            .map(|(index, text)| self.ids(index, text))
            .collect::<Result<Vec<_>, _>>()?;
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&index| ids[index].len());
        let mut vectors = vec![Vec::new(); texts.len()];
        for group in order.chunks(BATCH_TEXTS) {
            let batch: Vec<&[u32]> = group.iter().map(|&index| ids[index].as_slice()).collect();
            let encoded = self.encoder.forward(&self.backend, &batch).map_err(model_error)?;
            for (&index, vector) in group.iter().zip(encoded) {
                if !vector.iter().all(|x| x.is_finite()) {
                    return Err(EncodeError::NotFinite { index });
                }
                vectors[index] = vector;
            }
        }
        Ok(vectors)
    }
}

/// `encoder_fp` of §1.1.1. Every field is preceded by its name and length, so that no two contracts
/// give the same bytes. The device and its activation mode are left out: they may move a cosine by
/// about 1e-3, and an index must survive a change of machine.
fn fingerprint(weights_sha256: &str, dtype: &str, facts: &EncoderFacts) -> String {
    let max_tokens = facts.max_tokens.to_string();
    let normalized = facts.normalized.to_string();
    let fields = [
        ("weights", weights_sha256),
        ("tokenizer", &facts.tokenizer_fp),
        ("pooling", &facts.pooling),
        ("query_prefix", &facts.query_prefix),
        ("passage_prefix", &facts.passage_prefix),
        ("normalized", &normalized),
        ("dtype", dtype),
        ("max_tokens", &max_tokens),
    ];
    let mut bytes = b"exrail encoder 1\n".to_vec();
    for (name, value) in fields {
        bytes.extend(format!("{name} {}\n{value}\n", value.len()).into_bytes());
    }
    sha256_hex(&bytes)
}

fn model_name(dir: &Path) -> String {
    let resolved = dir.canonicalize().unwrap_or_else(|_| PathBuf::from(dir));
    resolved.file_name().map_or_else(|| "encoder".to_owned(), |n| n.to_string_lossy().into_owned())
}

fn model_error(source: impl std::error::Error + Send + Sync + 'static) -> EncodeError {
    EncodeError::Model { source: Box::new(source) }
}

fn io(path: &Path, source: std::io::Error) -> EngineError {
    EngineError::Io { path: path.display().to_string(), source }
}
