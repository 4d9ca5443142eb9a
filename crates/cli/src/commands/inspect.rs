//! `exrail inspect`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::Args;
use exrail_checkpoint::{
    Array, Checkpoint, CheckpointFiles, Gguf, GgufPart, HfFolder, SafetensorsFile, TensorInfo,
    TensorView, Tensors, Value as MetadataValue,
};
use exrail_engine::{CheckedGenerator, LoadOptions, check_generator};
use serde_json::{Map, Value, json};

use crate::{Ended, output::Output};

/// Print what a model file or folder holds: header, tensors, sizes, chat template.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// A .gguf or .safetensors file, the first part of a split .gguf file, or a Hugging Face folder.
    #[arg(value_name = "FILE")]
    path: PathBuf,
    /// Print every tensor.
    #[arg(long, conflicts_with = "check")]
    tensors: bool,
    /// Say whether this generator would load, and if not why, without loading its weights.
    #[arg(long)]
    check: bool,
}

struct Contents {
    format: &'static str,
    metadata: Vec<(String, Value)>,
    template: Option<String>,
    tensors: Vec<Tensor>,
    /// Of all files.
    file_bytes: u64,
    /// None but for a split GGUF file.
    parts: Vec<Part>,
}

/// A file of a split GGUF file.
struct Part {
    file: String,
    tensors: usize,
    bytes: u64,
}

impl Part {
    /// The parts of `gguf`, if it is split.
    fn all(gguf: &Gguf) -> Vec<Self> {
        let parts = gguf.parts();
        if parts.len() == 1 { Vec::new() } else { parts.iter().map(Self::from).collect() }
    }

    fn to_json(&self) -> Value {
        json!({ "file": self.file, "tensors": self.tensors, "bytes": self.bytes })
    }

    fn print_all(parts: &[Self], output: Output) {
        if parts.is_empty() {
            return;
        }
        let bytes = parts.iter().map(|part| part.bytes).sum();
        output.line(format!("parts     {}, {:.1} MB together", parts.len(), mb(bytes)));
        for Self { file, tensors, bytes } in parts {
            output.line(format!("  {file}  {tensors:4} tensors  {:8.1} MB", mb(*bytes)));
        }
    }
}

impl From<&GgufPart> for Part {
    fn from(part: &GgufPart) -> Self {
        let file = part.path().and_then(Path::file_name).unwrap_or_default();
        let file = file.to_string_lossy().into_owned();
        Self { file, tensors: part.n_tensors(), bytes: part.len_bytes() }
    }
}

struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: usize,
}

impl From<TensorView<'_>> for Tensor {
    fn from(view: TensorView<'_>) -> Self {
        Self {
            name: view.name.into(),
            dtype: view.dtype.to_string(),
            shape: view.shape.to_vec(),
            bytes: view.bytes.len(),
        }
    }
}

impl From<TensorInfo<'_>> for Tensor {
    fn from(info: TensorInfo<'_>) -> Self {
        Self {
            name: info.name.into(),
            dtype: info.dtype.to_string(),
            shape: info.shape.to_vec(),
            bytes: info.n_bytes(),
        }
    }
}

impl Inspect {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        if self.check {
            return self.check(*output);
        }
        let contents = self.read()?;
        output.value(&contents.to_json());
        contents.print(*output, self.tensors);
        Ok(Ended::Done)
    }

    /// Everything that a load checks, but for what only a device can say.
    fn check(&self, output: Output) -> Result<Ended> {
        let checkpoint = Checkpoint::open(&self.path)?;
        let checked = check_generator(&checkpoint, LoadOptions::default())?;
        let CheckedGenerator { config, tokenizer, template, .. } = checked;
        let n_tensors = checkpoint.tensors().names().count();
        let parts = match &checkpoint {
            Checkpoint::Gguf(gguf) => Part::all(gguf),
            Checkpoint::Folder(_) => Vec::new(),
        };
        output.value(&json!({
            "loads": true,
            "architecture": config.architecture,
            "layers": config.n_layers(),
            "width": config.width,
            "context": config.context_len,
            "max_context": config.max_context_len,
            "vocabulary": tokenizer.vocab_len(),
            "embedding_rows": config.vocab_size,
            "tensors": n_tensors,
            "parts": parts.iter().map(Part::to_json).collect::<Vec<_>>(),
            "chat_template": template.is_some(),
        }));
        let (layers, width, context) = (config.n_layers(), config.width, config.context_len);
        output.line(format!("loads     {}", self.path.display()));
        output.line(format!("model     {}, {layers} layers of {width}", config.architecture));
        output.line(format!("context   {context} tokens, at most {}", config.max_context_len));
        output.line(format!("tensors   {n_tensors}, all there in their shape"));
        Part::print_all(&parts, output);
        let (tokens, rows) = (tokenizer.vocab_len(), config.vocab_size);
        output.line(format!("tokens    {tokens} of {rows} rows of the embedding"));
        let template = if template.is_some() { "compiles" } else { "none" };
        output.line(format!("template  {template}"));
        Ok(Ended::Done)
    }

    fn read(&self) -> Result<Contents> {
        if self.path.is_dir() {
            return read_folder(&HfFolder::open(&self.path)?, &self.path);
        }
        if self.path.extension().is_some_and(|extension| extension == "safetensors") {
            let file = SafetensorsFile::open(&self.path)?;
            let file_bytes = file.file_len();
            return Ok(Contents {
                format: "safetensors",
                metadata: Vec::new(),
                template: None,
                tensors: file.tensors().map(Tensor::from).collect(),
                file_bytes,
                parts: Vec::new(),
            });
        }
        let gguf = Gguf::open(&self.path)?;
        let metadata = gguf.metadata().iter();
        Ok(Contents {
            format: "GGUF",
            metadata: metadata.map(|(key, value)| (key.to_owned(), short(value))).collect(),
            template: gguf.chat_template().map(str::to_owned),
            tensors: gguf.tensors().map(Tensor::from).collect(),
            file_bytes: gguf.file_len(),
            parts: Part::all(&gguf),
        })
    }
}

fn read_folder(folder: &HfFolder, path: &Path) -> Result<Contents> {
    let config = std::fs::read(path.join("config.json"))?;
    let config: Map<String, Value> = serde_json::from_slice(&config)?;
    Ok(Contents {
        format: "Hugging Face folder",
        metadata: config.into_iter().collect(),
        template: folder.text().chat_template().map(str::to_owned),
        tensors: folder.names().filter_map(|name| folder.info(name)).map(Tensor::from).collect(),
        file_bytes: CheckpointFiles::of_folder(path)?.len_bytes()?,
        parts: Vec::new(),
    })
}

/// A value for people: long arrays and texts are cut, with their length.
fn short(value: &MetadataValue) -> Value {
    const HEAD: usize = 8;
    const TEXT: usize = 120;
    match value {
        MetadataValue::U8(x) => json!(x),
        MetadataValue::I8(x) => json!(x),
        MetadataValue::U16(x) => json!(x),
        MetadataValue::I16(x) => json!(x),
        MetadataValue::U32(x) => json!(x),
        MetadataValue::I32(x) => json!(x),
        MetadataValue::U64(x) => json!(x),
        MetadataValue::I64(x) => json!(x),
        MetadataValue::F32(x) => json!(x),
        MetadataValue::F64(x) => json!(x),
        MetadataValue::Bool(x) => json!(x),
        MetadataValue::String(text) if text.chars().count() > TEXT => {
            let head: String = text.chars().take(TEXT).collect();
            json!(format!("{head}… ({} bytes)", text.len()))
        }
        MetadataValue::String(text) => json!(text),
        MetadataValue::Array(array) => {
            let (head, len) = array_head(array, HEAD);
            json!({ "length": len, "first": head })
        }
    }
}

/// The first values of an array, and its length.
fn array_head(array: &Array, n: usize) -> (Value, usize) {
    fn head<T: Clone + Into<Value>>(values: &[T], n: usize) -> (Value, usize) {
        let first = values.iter().take(n).cloned().map(Into::into).collect();
        (Value::Array(first), values.len())
    }
    match array {
        Array::U8(values) => head(values, n),
        Array::I8(values) => head(values, n),
        Array::U16(values) => head(values, n),
        Array::I16(values) => head(values, n),
        Array::U32(values) => head(values, n),
        Array::I32(values) => head(values, n),
        Array::U64(values) => head(values, n),
        Array::I64(values) => head(values, n),
        Array::F32(values) => head(values, n),
        Array::F64(values) => head(values, n),
        Array::Bool(values) => head(values, n),
        Array::String(values) => head(values, n),
        Array::Array(values) => {
            let first = values.iter().take(n).map(|inner| array_head(inner, n).0).collect();
            (first, values.len())
        }
    }
}

/// Tensors and bytes of one format.
#[derive(Clone, Copy, Default)]
struct Share {
    tensors: usize,
    parameters: usize,
    bytes: usize,
}

impl Contents {
    fn shares(&self) -> BTreeMap<&str, Share> {
        let mut shares: BTreeMap<&str, Share> = BTreeMap::new();
        for tensor in &self.tensors {
            let share = shares.entry(&tensor.dtype).or_default();
            share.tensors += 1;
            share.parameters += tensor.shape.iter().product::<usize>();
            share.bytes += tensor.bytes;
        }
        shares
    }

    fn to_json(&self) -> Value {
        let shares: Map<String, Value> = self
            .shares()
            .into_iter()
            .map(|(dtype, Share { tensors, parameters, bytes })| {
                let share = json!({ "tensors": tensors, "parameters": parameters, "bytes": bytes });
                (dtype.to_owned(), share)
            })
            .collect();
        json!({
            "format": self.format,
            "file_bytes": self.file_bytes,
            "parts": self.parts.iter().map(Part::to_json).collect::<Vec<_>>(),
            "metadata": self.metadata.iter().cloned().collect::<Map<String, Value>>(),
            "chat_template": self.template,
            "dtypes": shares,
            "tensors": self.tensors.iter().map(|tensor| json!({
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "bytes": tensor.bytes,
            })).collect::<Vec<_>>(),
        })
    }

    fn print(&self, output: Output, all_tensors: bool) {
        output.line(format!("format    {}, {:.1} MB", self.format, mb(self.file_bytes)));
        Part::print_all(&self.parts, output);
        output.line(format!("tensors   {}", self.tensors.len()));
        for (dtype, share) in self.shares() {
            output.line(format!(
                "  {dtype:6}  {:4} tensors  {:8.2} M parameters  {:8.1} MB",
                share.tensors,
                mb(share.parameters as u64),
                mb(share.bytes as u64)
            ));
        }
        if !self.metadata.is_empty() {
            output.line("metadata");
        }
        for (key, value) in &self.metadata {
            if key != "tokenizer.chat_template" {
                output.line(format!("  {key:44} {value}"));
            }
        }
        if let Some(template) = &self.template {
            output.line("chat template");
            for line in template.lines() {
                output.line(format!("  {line}"));
            }
        }
        if all_tensors {
            output.line("tensor list");
            for tensor in &self.tensors {
                let shape = format!("{:?}", tensor.shape);
                output.line(format!("  {:40} {:6} {shape:>16}", tensor.name, tensor.dtype));
            }
        } else {
            output.line("(--tensors lists every tensor)");
        }
    }
}

/// Bytes as megabytes, for display.
#[expect(clippy::cast_precision_loss, reason = "a display with one decimal")]
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
