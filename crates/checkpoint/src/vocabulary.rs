//! [`VocabularyTable`]: the tokenizer section of a GGUF file, checked but not yet a tokenizer.

use crate::{Gguf, LoadError, Metadata};

/// ggml's token kind of ordinary text, assumed when a file lists no kinds.
const NORMAL: i32 = 1;
/// Pre-tokenizers whose models start every text with BOS although the file may not say so
/// (llama.cpp `llama-vocab.cpp`, `LLAMA_VOCAB_PRE_TYPE_LLAMA3` and `_TEKKEN`).
const PRE_WITH_BOS: [&str; 5] = ["llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"];

/// A vocabulary as the file states it. Ids are indices into `tokens`.
#[derive(Clone, Debug, PartialEq)]
pub struct VocabularyTable {
    /// Kind of tokenizer: `gpt2` is byte-level BPE, `llama` sentencepiece BPE, `t5` Unigram, `bert`
    /// `WordPiece`.
    pub model: String,
    /// Name of the pre-tokenizer, `default` when the file names none.
    pub pre: String,
    /// Token texts in the tokenizer's own spelling; byte-level for `gpt2`.
    pub tokens: Vec<String>,
    /// ggml token kinds, one per token: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused,
    /// 6 byte.
    pub kinds: Vec<i32>,
    /// BPE merges in rank order, each two spellings with a space between.
    pub merges: Vec<String>,
    /// Scores of a sentencepiece vocabulary, one per token, or empty.
    pub scores: Vec<f32>,
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// End of turn.
    pub eot: Option<u32>,
    /// Stands for what the vocabulary cannot spell.
    pub unknown: Option<u32>,
    /// Fills batches.
    pub padding: Option<u32>,
    /// Ends each sentence of an encoder.
    pub separator: Option<u32>,
    /// Whether encoding a text puts `bos` first. Without the key: as llama.cpp, by model and `pre`.
    pub add_bos: bool,
    /// Whether encoding a text puts `eos` last. Without the key: as llama.cpp, only for `t5`.
    pub add_eos: bool,
    /// Whether encoding puts a space before the text. Without the key: as llama.cpp, for `llama`
    /// and `t5`.
    pub add_space_prefix: bool,
    /// Whether encoding cuts spaces at the ends and joins runs of them.
    pub remove_extra_whitespaces: bool,
    /// Map of characters in sentencepiece's format, or empty.
    pub precompiled_charsmap: Vec<u8>,
    /// Whether encoding lower-cases the text.
    pub lowercase: Option<bool>,
    /// Whether encoding takes accents off letters.
    pub strip_accents: Option<bool>,
    /// Whether control tokens take the white space after them along: the files of Phi-3 do not
    /// say so, but its `tokenizer.json` does, and llama.cpp knows it by name.
    pub strips_right: bool,
}

impl VocabularyTable {
    /// Reads and checks the vocabulary of `gguf`.
    ///
    /// # Errors
    /// When a key is missing or of another type, lists disagree in length, an id is out of range,
    /// or there are more tokens than the embedding has rows.
    pub fn from_gguf(gguf: &Gguf) -> Result<VocabularyTable, LoadError> {
        let metadata = gguf.metadata();
        let model = metadata.require_str("tokenizer.ggml.model")?.to_owned();
        let pre = metadata.str("tokenizer.ggml.pre")?.unwrap_or("default").to_owned();
        let key = "tokenizer.ggml.tokens";
        let tokens = match metadata.strings(key)? {
            None => return Err(LoadError::MissingKey { key: key.to_owned() }),
            Some([]) => return Err(LoadError::bad_value(key, "at least one token", "none")),
            Some(tokens) => tokens.to_vec(),
        };
        // A token beyond the embedding would read past it; spare rows are only never produced.
        if let Some(embedding) = gguf.tensor("token_embd.weight")
            && tokens.len() > embedding.shape[0]
        {
            let expected = format!("at most {} tokens (embedding rows)", embedding.shape[0]);
            return Err(LoadError::bad_value(key, expected, tokens.len()));
        }
        let kinds = kinds(metadata, tokens.len())?;
        let scores = metadata.f32s("tokenizer.ggml.scores")?.unwrap_or_default().to_vec();
        if !scores.is_empty() {
            same_len("tokenizer.ggml.scores", tokens.len(), scores.len())?;
        }
        let id = |name: &str| token_id(metadata, name, tokens.len());
        let is_sentencepiece = model == "llama";
        let is_unigram = model == "t5";
        let is_phi3 = metadata.str("general.architecture")? == Some("phi3");
        let default_bos = is_sentencepiece || PRE_WITH_BOS.contains(&pre.as_str());
        Ok(VocabularyTable {
            merges: metadata.strings("tokenizer.ggml.merges")?.unwrap_or_default().to_vec(),
            // Files of before 2025 name the first token of BERT differently.
            bos: id("bos")?.or(id("cls")?),
            eos: id("eos")?,
            eot: id("eot")?,
            unknown: id("unknown")?,
            padding: id("padding")?,
            add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(default_bos),
            separator: id("seperator")?,
            add_eos: metadata.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(is_unigram),
            add_space_prefix: metadata
                .bool("tokenizer.ggml.add_space_prefix")?
                .unwrap_or(is_sentencepiece || is_unigram),
            remove_extra_whitespaces: metadata
                .bool("tokenizer.ggml.remove_extra_whitespaces")?
                .unwrap_or(false),
            precompiled_charsmap: metadata
                .bytes("tokenizer.ggml.precompiled_charsmap")?
                .unwrap_or_default(),
            lowercase: metadata.bool("tokenizer.ggml.normalizer.lowercase")?,
            strip_accents: metadata.bool("tokenizer.ggml.normalizer.strip_accents")?,
            strips_right: is_phi3 && is_sentencepiece,
            model,
            pre,
            tokens,
            kinds,
            scores,
        })
    }
}

fn kinds(metadata: &Metadata, n_tokens: usize) -> Result<Vec<i32>, LoadError> {
    let key = "tokenizer.ggml.token_type";
    let Some(kinds) = metadata.i32s(key)? else { return Ok(vec![NORMAL; n_tokens]) };
    same_len(key, n_tokens, kinds.len())?;
    match kinds.iter().find(|kind| !(0..=6).contains(*kind)) {
        Some(kind) => Err(LoadError::bad_value(key, "token kinds 0 to 6", kind)),
        None => Ok(kinds.to_vec()),
    }
}

fn same_len(key: &str, expected: usize, found: usize) -> Result<(), LoadError> {
    if expected == found {
        return Ok(());
    }
    Err(LoadError::bad_value(key, format!("one entry per token ({expected})"), found))
}

fn token_id(metadata: &Metadata, name: &str, n_tokens: usize) -> Result<Option<u32>, LoadError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let id = metadata.u32(&key)?;
    match id {
        Some(id) if id as usize >= n_tokens => {
            Err(LoadError::bad_value(&key, format!("an id below {n_tokens}"), id))
        }
        Some(_) | None => Ok(id),
    }
}
