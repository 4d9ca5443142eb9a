//! The preflight diff (G-09): what a manifest declares of a model, compared with what its files say,
//! before a weight is loaded.
//!
//! Both sides are one tree of JSON: files and their hashes, shapes, special ids, rotary settings, quantised
//! formats, the chat template, and the ids of golden texts. A manifest is the tree written down
//! ([`Manifest::of`]); a check makes the tree anew, with the texts of the manifest, and compares leaf by
//! leaf ([`Manifest::check`]). A value on one side only is a mismatch too. All of it is hard but what stands
//! under `soft`: that is about this program, not about the model.

mod golden;

use std::collections::BTreeMap;
use std::path::Path;

use exrail_checkpoint::{
    Checkpoint, CheckpointFiles, DecoderConfig, RopeConfig, sha256_file, sha256_hex,
};
use serde_json::{Map, Value, json};
use thiserror::Error;

use self::golden::Golden;
pub use self::golden::ROUND_TRIP;
use crate::error::EngineError;
use crate::fingerprint::HashProgress;
use crate::load::{CheckedGenerator, LoadOptions, check_generator};

/// Layout of a manifest.
const VERSION: u64 = 1;
/// Fewest golden texts of a manifest (G-09).
pub const FEWEST_GOLDEN: usize = 64;
/// Golden next-token distributions, which only a loaded model has; no part of what is compared before.
const DISTRIBUTIONS: &str = "distributions";
/// Longest manifest: a vocabulary of control tokens is some hundred kB.
const MAX_BYTES: u64 = 64 << 20;

/// What is declared of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    declared: Value,
}

/// How hard a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The model is another one; never overridden.
    Hard,
    /// The surroundings are others; may be overridden with a reason.
    Soft,
}

/// One value of both sides.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Where it stands, such as `model.kv_heads`.
    pub path: String,
    /// In the manifest, if it is there.
    pub declared: Option<Value>,
    /// In the files, if it is there.
    pub effective: Option<Value>,
    /// How hard it is.
    pub class: Class,
}

impl Row {
    /// Whether both sides agree.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.declared == self.effective
    }
}

/// A manifest cannot be read, or does not describe a model.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PreflightError {
    /// The file cannot be read.
    #[error("manifest {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no manifest.
    #[error(
        "manifest {path}: expected {expected}, found {found}; write one with `exrail preflight MODEL --write FILE`"
    )]
    NotAManifest {
        /// The file.
        path: String,
        /// What stands in one.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// The model itself is refused.
    #[error(transparent)]
    Model(#[from] EngineError),
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// [`PreflightError::Io`] and [`PreflightError::NotAManifest`].
    pub fn read(path: &Path) -> Result<Manifest, PreflightError> {
        let shown = path.display().to_string();
        let failed = |source| PreflightError::Io { path: shown.clone(), source };
        let not_one = |expected: String, found: String| PreflightError::NotAManifest {
            path: shown.clone(),
            expected,
            found,
        };
        let len = std::fs::metadata(path).map_err(failed)?.len();
        if len > MAX_BYTES {
            return Err(not_one(format!("at most {MAX_BYTES} bytes"), len.to_string()));
        }
        let bytes = std::fs::read(path).map_err(failed)?;
        let declared: Value = serde_json::from_slice(&bytes)
            .map_err(|error| not_one("JSON".into(), error.to_string()))?;
        let version = &declared["manifest_version"];
        if *version != json!(VERSION) {
            return Err(not_one(format!("manifest_version {VERSION}"), version.to_string()));
        }
        let n_golden = Golden::declared(&declared).as_text.len();
        if n_golden < FEWEST_GOLDEN {
            let found = n_golden.to_string();
            return Err(not_one(format!("at least {FEWEST_GOLDEN} golden texts"), found));
        }
        Ok(Manifest { declared })
    }

    /// Writes down what the files of a model say. `progress` is told the bytes hashed so far.
    ///
    /// # Errors
    /// As [`check_generator`], and a file that cannot be read.
    pub fn of(path: &Path, progress: HashProgress<'_>) -> Result<Manifest, EngineError> {
        let model = Model::open(path)?;
        let golden = Golden::of(&model.checked.tokenizer);
        Ok(Manifest { declared: model.describe(&golden, progress)? })
    }

    /// Compares it with the files of a model. `progress` is told the bytes hashed so far.
    ///
    /// # Errors
    /// As [`Manifest::of`]: a model that would not load is refused without a comparison.
    pub fn check(&self, path: &Path, progress: HashProgress<'_>) -> Result<Vec<Row>, EngineError> {
        let model = Model::open(path)?;
        let effective = model.describe(&Golden::declared(&self.declared), progress)?;
        let mut declared = self.declared.clone();
        if let Some(declared) = declared.as_object_mut() {
            declared.shift_remove(DISTRIBUTIONS);
        }
        Ok(compare(&declared, &effective))
    }

    /// The golden next-token distributions, if it has any. They are compared when the model is loaded.
    #[must_use]
    pub fn distributions(&self) -> Option<&Value> {
        self.declared.get(DISTRIBUTIONS)
    }

    /// The same with these golden next-token distributions.
    #[must_use]
    pub fn with_distributions(mut self, distributions: Value) -> Manifest {
        self.declared[DISTRIBUTIONS] = distributions;
        self
    }

    /// The golden texts in their order, one a line: a text that every manifest has.
    #[must_use]
    pub fn golden_text(&self) -> String {
        Golden::declared(&self.declared).as_text.join("\n")
    }

    /// The text of the file.
    #[must_use]
    pub fn to_json(&self) -> String {
        format!("{:#}\n", self.declared)
    }
}

/// A model whose files agree with each other.
struct Model<'a> {
    path: &'a Path,
    checkpoint: Checkpoint,
    checked: CheckedGenerator,
}

impl<'a> Model<'a> {
    fn open(path: &'a Path) -> Result<Model<'a>, EngineError> {
        let checkpoint = Checkpoint::open(path)?;
        let checked = check_generator(&checkpoint, LoadOptions::default())?;
        Ok(Model { path, checkpoint, checked })
    }

    fn describe(&self, golden: &Golden, progress: HashProgress<'_>) -> Result<Value, EngineError> {
        let CheckedGenerator { config, tokenizer, template, .. } = &self.checked;
        Ok(json!({
            "manifest_version": VERSION,
            "files": self.files(progress)?,
            "model": architecture(config),
            "tokens": {
                "tokens": tokenizer.vocab_len(),
                "padding_rows": config.vocab_size - tokenizer.vocab_len(),
                "bos": tokenizer.bos(),
                "adds_bos": tokenizer.add_bos(),
                "eos": tokenizer.eos_ids(),
                "as_stored": self.stored_ids()?,
                "fingerprint": tokenizer.fingerprint(),
            },
            "quantisation": self.quantisation(),
            "template": { "sha256": template.as_ref().map(|template| template.sha256()) },
            "golden": golden.measure(tokenizer, template.as_ref()),
            "soft": self.soft(),
        }))
    }

    /// Length and sha256 of each file, by its name.
    fn files(&self, progress: HashProgress<'_>) -> Result<Value, EngineError> {
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |source| EngineError::Io { path, source }
        };
        let files = self.checkpoint.files().map_err(failed(self.path))?;
        let mut described = Map::new();
        let mut before = 0;
        for file in files.paths() {
            let bytes = file.metadata().map_err(failed(file))?.len();
            let sha256 = sha256_file(file, &mut |n| progress(before + n)).map_err(failed(file))?;
            before += bytes;
            let name = match &files {
                // The file of a model may lie in the cache under a name of its own.
                CheckpointFiles::Parts(parts) if parts.len() == 1 => "gguf".to_owned(),
                CheckpointFiles::Parts(_) | CheckpointFiles::Folder(_) => {
                    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
                }
            };
            described.insert(name, json!({ "bytes": bytes, "sha256": sha256 }));
        }
        Ok(Value::Object(described))
    }

    /// Special ids as the files name them, before they are joined.
    fn stored_ids(&self) -> Result<Value, EngineError> {
        Ok(match &self.checkpoint {
            Checkpoint::Gguf(gguf) => {
                let id =
                    |role: &str| gguf.metadata().u32(&format!("tokenizer.ggml.{role}_token_id"));
                json!({
                    "bos": id("bos")?,
                    "eos": id("eos")?,
                    "eot": id("eot")?,
                    "unknown": id("unknown")?,
                    "padding": id("padding")?,
                })
            }
            Checkpoint::Folder(folder) => {
                let (generation, text) = (folder.generation(), folder.text());
                json!({
                    "bos": generation.bos,
                    "eos": generation.eos,
                    "padding": generation.padding,
                    "bos_literal": text.bos,
                    "eos_literal": text.eos,
                })
            }
        })
    }

    /// How weights are packed: method, widths and groups, formats, and the shape of every tensor.
    fn quantisation(&self) -> Value {
        let method = match &self.checkpoint {
            Checkpoint::Gguf(_) => None,
            // Bits, group size, symmetry and order of a method are the fields of its type.
            Checkpoint::Folder(folder) => folder.quant_method().map(|it| format!("{it:?}")),
        };
        let tensors = self.checkpoint.tensors();
        let mut formats: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        let mut lines = String::new();
        for info in tensors.names().filter_map(|name| tensors.info(name)) {
            let of_format = formats.entry(info.dtype.to_string()).or_default();
            *of_format = (of_format.0 + 1, of_format.1 + info.n_bytes());
            lines.push_str(&format!("{} {} {:?}\n", info.name, info.dtype, info.shape));
        }
        let formats: Map<_, _> = formats
            .into_iter()
            .map(|(dtype, (n, bytes))| (dtype, json!({ "tensors": n, "bytes": bytes })))
            .collect();
        json!({
            "method": method,
            "formats": formats,
            "tensors_sha256": sha256_hex(lines.as_bytes()),
        })
    }

    fn soft(&self) -> Value {
        let generation = match &self.checkpoint {
            Checkpoint::Gguf(_) => None,
            Checkpoint::Folder(folder) => Some(format!("{:?}", folder.generation())),
        };
        let build = concat!("exrail-", env!("CARGO_PKG_VERSION"));
        json!({ "engine_build": build, "generation_defaults": generation })
    }
}

fn architecture(config: &DecoderConfig) -> Value {
    let rope = |rope: &RopeConfig| {
        json!({
            // Shown, because reading a number back may change its last bit.
            "theta": rope.theta.to_string(),
            "dim": rope.dim,
            "pairs": format!("{:?}", rope.pairs),
            "scaling": format!("{:?}", rope.scaling),
        })
    };
    json!({
        "architecture": config.architecture,
        "layers": config.n_layers(),
        "width": config.width,
        "query_heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "ffn_width": config.ffn_width,
        "experts": config.experts.as_ref().map(|experts| format!("{experts:?}")),
        "embedding_rows": config.vocab_size,
        "head": if config.tied_head { "embedding" } else { "its own" },
        "context": config.context_len,
        "max_context": config.max_context_len,
        "ropes": config.ropes.iter().map(rope).collect::<Vec<_>>(),
        "norm": format!("{:?}", config.norm),
        "attention_scale": config.attention_scale.to_string(),
        "embedding_scale": config.embedding_scale.to_string(),
        "residual_scale": config.residual_scale.to_string(),
        "logit_scale": config.logit_scale.to_string(),
    })
}

/// Compares two trees leaf by leaf, in the order of the first one.
fn compare(declared: &Value, effective: &Value) -> Vec<Row> {
    let (mut leaves, mut found) = (Vec::new(), Vec::new());
    flatten("", declared, &mut leaves);
    flatten("", effective, &mut found);
    let class = |path: &str| if path.starts_with("soft.") { Class::Soft } else { Class::Hard };
    let by_path = |leaves: &[(String, Value)]| leaves.iter().cloned().collect::<BTreeMap<_, _>>();
    let (left, right) = (by_path(&leaves), by_path(&found));
    let undeclared = found.iter().filter(|(path, _)| !left.contains_key(path));
    let rows = leaves.iter().chain(undeclared);
    rows.map(|(path, _)| Row {
        path: path.clone(),
        declared: left.get(path).cloned(),
        effective: right.get(path).cloned(),
        class: class(path),
    })
    .collect()
}

/// Leaves are whatever is no object; lists are compared as a whole.
fn flatten(path: &str, tree: &Value, leaves: &mut Vec<(String, Value)>) {
    match tree {
        Value::Object(map) if !map.is_empty() => {
            for (key, inner) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                flatten(&path, inner, leaves);
            }
        }
        // An object without keys says nothing that its absence does not say.
        Value::Object(_) => {}
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            leaves.push((path.to_owned(), tree.clone()));
        }
    }
}

#[cfg(test)]
mod tests;
