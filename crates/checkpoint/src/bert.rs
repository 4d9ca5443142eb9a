//! [`BertConfig`]: the configuration of a sentence-transformers folder with a BERT encoder.

use std::path::{Component, Path};

use serde::Deserialize;

use crate::LoadError;
use crate::bytes::read_bounded;

/// Configuration files have a kilobyte or two.
const MAX_JSON_BYTES: u64 = 1 << 20;
const MAX_LAYERS: usize = 1024;
const MAX_WIDTH: usize = 1 << 20;

/// How token vectors become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over all tokens, `[CLS]` and `[SEP]` included.
    Mean,
}

/// Hyperparameters of a BERT sentence encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// Encoder layers (L).
    pub n_layers: usize,
    /// Width of a token's vector and of the embedding (C).
    pub width: usize,
    /// Attention heads (H), a divisor of `width`.
    pub n_heads: usize,
    /// Width of the feed-forward network (F).
    pub ffn_width: usize,
    /// Rows of the word embedding (V).
    pub vocab_size: usize,
    /// Rows of the position embedding.
    pub max_positions: usize,
    /// Rows of the token type embedding; row 0 is used.
    pub n_token_types: usize,
    /// Added to the variance in layer norm; positive.
    pub layer_norm_eps: f32,
    /// Tokens, special ones included, after which a text is cut; at most `max_positions`.
    pub max_seq_length: usize,
    /// How token vectors become one vector.
    pub pooling: Pooling,
    /// Whether the pooled vector is scaled to unit length.
    pub normalize: bool,
}

/// The contents of the JSON files of a sentence-transformers folder.
#[derive(Clone, Copy, Debug)]
pub struct BertFiles<'a> {
    /// `config.json`.
    pub config: &'a [u8],
    /// `modules.json`.
    pub modules: &'a [u8],
    /// `config.json` of the pooling module's folder.
    pub pooling: &'a [u8],
    /// `sentence_bert_config.json`, which older folders lack.
    pub sentence: Option<&'a [u8]>,
}

impl BertConfig {
    /// Reads and checks the configuration in the folder `dir`.
    ///
    /// # Errors
    /// When a file is missing or not the JSON that it should be, or a field has a value that the
    /// encoder does not implement; the error names file and field.
    pub fn from_dir(dir: &Path) -> Result<BertConfig, LoadError> {
        let modules_path = dir.join("modules.json");
        let modules = read_small(&modules_path)?;
        let pooling_dir =
            Modules::parse(&modules).map_err(|error| error.in_file(&modules_path))?.pooling_dir;
        let sentence_path = dir.join("sentence_bert_config.json");
        let sentence =
            if sentence_path.exists() { Some(read_small(&sentence_path)?) } else { None };
        BertConfig::from_files(BertFiles {
            config: &read_small(&dir.join("config.json"))?,
            modules: &modules,
            pooling: &read_small(&dir.join(pooling_dir).join("config.json"))?,
            sentence: sentence.as_deref(),
        })
        .map_err(|error| {
            // A parse error names the file already, but not the folder.
            if let LoadError::InFile { path, source } = error {
                return LoadError::InFile { path: dir.join(path), source };
            }
            error.in_file(dir)
        })
    }

    /// As [`BertConfig::from_dir`], from files that are in memory already.
    ///
    /// # Errors
    /// As [`BertConfig::from_dir`].
    pub fn from_files(files: BertFiles<'_>) -> Result<BertConfig, LoadError> {
        let modules = Modules::parse(files.modules)?;
        let config: ConfigJson = parse("config.json", files.config)?;
        config.refuse_unsupported()?;
        let width = in_range("hidden_size", config.hidden_size, MAX_WIDTH)?;
        let n_heads = in_range("num_attention_heads", config.num_attention_heads, width)?;
        if !width.is_multiple_of(n_heads) {
            let expected = format!("a divisor of hidden_size ({width})");
            return Err(LoadError::bad_value("num_attention_heads", expected, n_heads));
        }
        let eps = config.layer_norm_eps;
        if !eps.is_finite() || eps <= 0.0 {
            return Err(LoadError::bad_value("layer_norm_eps", "a positive number", eps));
        }
        let max_positions =
            in_range("max_position_embeddings", config.max_position_embeddings, MAX_WIDTH)?;
        Ok(BertConfig {
            n_layers: in_range("num_hidden_layers", config.num_hidden_layers, MAX_LAYERS)?,
            width,
            n_heads,
            ffn_width: in_range("intermediate_size", config.intermediate_size, MAX_WIDTH)?,
            vocab_size: in_range("vocab_size", config.vocab_size, u32::MAX as usize)?,
            max_positions,
            n_token_types: in_range("type_vocab_size", config.type_vocab_size, MAX_WIDTH)?,
            layer_norm_eps: eps,
            max_seq_length: max_seq_length(files.sentence, max_positions)?,
            pooling: pooling(files.pooling, width)?,
            normalize: modules.normalize,
        })
    }
}

/// The fields of `config.json` that matter; others describe training.
#[derive(Deserialize)]
struct ConfigJson {
    model_type: String,
    hidden_act: String,
    #[serde(default)]
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "two_token_types")]
    type_vocab_size: usize,
    #[serde(default = "bert_eps")]
    layer_norm_eps: f32,
}

/// BERT's default: sentence A and sentence B.
fn two_token_types() -> usize {
    2
}

/// BERT's default.
fn bert_eps() -> f32 {
    1e-12
}

impl ConfigJson {
    fn refuse_unsupported(&self) -> Result<(), LoadError> {
        let positions = self.position_embedding_type.as_deref().unwrap_or("absolute");
        for (field, expected, found) in [
            ("model_type", "bert", self.model_type.as_str()),
            ("hidden_act", "gelu", self.hidden_act.as_str()),
            ("position_embedding_type", "absolute", positions),
        ] {
            if found != expected {
                return Err(LoadError::bad_value(field, expected, found));
            }
        }
        if self.is_decoder {
            return Err(LoadError::bad_value("is_decoder", "false", "true"));
        }
        Ok(())
    }
}

/// What `modules.json` says: an encoder, a pooling folder, perhaps a normalisation.
struct Modules {
    pooling_dir: String,
    normalize: bool,
}

#[derive(Deserialize)]
struct ModuleJson {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Modules {
    fn parse(bytes: &[u8]) -> Result<Modules, LoadError> {
        let list: Vec<ModuleJson> = parse("modules.json", bytes)?;
        let kinds: Vec<&str> =
            list.iter().map(|m| m.kind.rsplit('.').next().unwrap_or_default()).collect();
        let normalize = match kinds.as_slice() {
            ["Transformer", "Pooling"] => false,
            ["Transformer", "Pooling", "Normalize"] => true,
            _ => {
                let expected = "Transformer, Pooling and perhaps Normalize";
                return Err(LoadError::bad_value("modules.json: type", expected, kinds.join(", ")));
            }
        };
        if !list[0].path.is_empty() {
            let expected = "the encoder in the folder itself (an empty path)";
            return Err(LoadError::bad_value("modules.json: path", expected, &list[0].path));
        }
        let pooling_dir = list[1].path.clone();
        // The path comes from an untrusted file and must not lead out of the folder.
        let mut components = Path::new(&pooling_dir).components();
        if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
            let expected = "the name of a folder beside it";
            return Err(LoadError::bad_value("modules.json: path", expected, pooling_dir));
        }
        Ok(Modules { pooling_dir, normalize })
    }
}

#[derive(Deserialize)]
struct SentenceJson {
    max_seq_length: Option<usize>,
}

fn max_seq_length(sentence: Option<&[u8]>, max_positions: usize) -> Result<usize, LoadError> {
    let Some(bytes) = sentence else { return Ok(max_positions) };
    let sentence: SentenceJson = parse("sentence_bert_config.json", bytes)?;
    match sentence.max_seq_length {
        None => Ok(max_positions),
        // `[CLS]`, one token and `[SEP]` are the shortest useful sequence.
        Some(found) if (3..=max_positions).contains(&found) => Ok(found),
        Some(found) => {
            let expected = format!("3 to max_position_embeddings ({max_positions})");
            Err(LoadError::bad_value("max_seq_length", expected, found))
        }
    }
}

fn pooling(bytes: &[u8], width: usize) -> Result<Pooling, LoadError> {
    let file = "config.json of the pooling module";
    let fields: serde_json::Map<String, serde_json::Value> = parse(file, bytes)?;
    let dimension = fields.get("word_embedding_dimension").and_then(serde_json::Value::as_u64);
    if dimension != Some(width as u64) {
        let found = dimension.map_or_else(|| "nothing".to_owned(), |n| n.to_string());
        let expected = format!("hidden_size ({width})");
        return Err(LoadError::bad_value("word_embedding_dimension", expected, found));
    }
    for (field, value) in fields.iter().filter(|(field, _)| field.starts_with("pooling_mode_")) {
        let expected = field == "pooling_mode_mean_tokens";
        if value.as_bool() != Some(expected) {
            let expected = format!("{expected} (only mean pooling is supported)");
            return Err(LoadError::bad_value(field, expected, value));
        }
    }
    if !fields.contains_key("pooling_mode_mean_tokens") {
        return Err(LoadError::bad_value("pooling_mode_mean_tokens", "true", "nothing"));
    }
    Ok(Pooling::Mean)
}

fn in_range(field: &str, value: usize, limit: usize) -> Result<usize, LoadError> {
    if (1..=limit).contains(&value) {
        return Ok(value);
    }
    Err(LoadError::bad_value(field, format!("an integer from 1 to {limit}"), value))
}

fn parse<'a, T: Deserialize<'a>>(file: &str, bytes: &'a [u8]) -> Result<T, LoadError> {
    serde_json::from_slice(bytes)
        .map_err(|source| LoadError::Json { source }.in_file(Path::new(file)))
}

fn read_small(path: &Path) -> Result<Vec<u8>, LoadError> {
    read_bounded(path, MAX_JSON_BYTES)
}
