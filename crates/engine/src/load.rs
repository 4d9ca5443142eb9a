//! From a model file to everything an engine needs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use exrail_checkpoint::{DecoderConfig, Gguf, Rounded, Tensors, VocabularyTable, sha256_file};
use exrail_kernels::Backend;
use exrail_model::{Decoder, LoadProgress};
use exrail_tensor::{DType, IntGrid};
use exrail_text::{ChatTemplate, Tokenizer, Vocabulary};

use crate::error::EngineError;

/// A generator on a device, not running yet.
pub struct Loaded<B: Backend> {
    /// The device.
    pub backend: B,
    /// Weights on the device.
    pub decoder: Decoder<B>,
    /// Vocabulary and merges of the file.
    pub tokenizer: Arc<Tokenizer>,
    /// Chat template of the file, if it has one.
    pub template: Option<Arc<ChatTemplate>>,
    /// `general.name`, or the file name.
    pub model_name: String,
    /// Hex sha256 of the file: the model's fingerprint.
    pub model_sha256: String,
    /// Format of the largest part of the weights, such as `Q4_1`.
    pub quant: String,
    /// Architecture as data.
    pub config: DecoderConfig,
}

/// How far loading has come.
#[derive(Clone, Debug, PartialEq)]
pub enum GeneratorProgress {
    /// Bytes of the file hashed and its length.
    Hashed {
        /// So far.
        bytes: u64,
        /// Of the file.
        total_bytes: u64,
    },
    /// A tensor reached the device.
    Weights(LoadProgress),
}

/// Opens a GGUF file and prepares it for `backend`.
///
/// # Errors
/// The file is refused (see [`exrail_checkpoint::LoadError`]), its vocabulary or template does not
/// compile, or the device has no kernel or memory for it. Nothing stays loaded then.
pub fn load_generator<B: Backend>(
    backend: B,
    path: &Path,
    progress: &mut dyn FnMut(GeneratorProgress),
) -> Result<Loaded<B>, EngineError> {
    load(backend, path, None, progress)
}

/// [`load_generator`] of a 16-bit file, its matrices rounded to nearest on the way: see
/// [`Rounded`].
///
/// # Errors
/// As [`load_generator`], and when the file is quantised already or a weight is not finite.
pub fn load_generator_rounded<B: Backend>(
    backend: B,
    path: &Path,
    grid: IntGrid,
    progress: &mut dyn FnMut(GeneratorProgress),
) -> Result<Loaded<B>, EngineError> {
    load(backend, path, Some(grid), progress)
}

fn load<B: Backend>(
    backend: B,
    path: &Path,
    grid: Option<IntGrid>,
    progress: &mut dyn FnMut(GeneratorProgress),
) -> Result<Loaded<B>, EngineError> {
    let gguf = Gguf::open(path)?;
    let total_bytes = gguf.file_len();
    let model_sha256 = sha256_file(path, &mut |bytes| {
        progress(GeneratorProgress::Hashed { bytes, total_bytes });
    })
    .map_err(|source| EngineError::Io { path: path.display().to_string(), source })?;
    let file_name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let file_name = file_name.unwrap_or_else(|| path.display().to_string());
    prepare(backend, &gguf, &file_name, model_sha256, grid, &mut |step| {
        progress(GeneratorProgress::Weights(step));
    })
}

/// [`load_generator`] for a file that is open already; `file_name` names it if it does not name
/// itself.
///
/// # Errors
/// As [`load_generator`].
pub fn prepare_generator<B: Backend>(
    backend: B,
    gguf: &Gguf,
    file_name: &str,
    model_sha256: String,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<B>, EngineError> {
    prepare(backend, gguf, file_name, model_sha256, None, progress)
}

fn prepare<B: Backend>(
    backend: B,
    gguf: &Gguf,
    file_name: &str,
    model_sha256: String,
    grid: Option<IntGrid>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<B>, EngineError> {
    let config = DecoderConfig::from_gguf(gguf)?;
    let tokenizer = Tokenizer::from_vocabulary(vocabulary(VocabularyTable::from_gguf(gguf)?))?;
    let template = compile_template(gguf, &tokenizer)?;
    let rounded = grid.map(|grid| Rounded::new(gguf, grid)).transpose()?;
    let tensors = rounded.as_ref().map_or(gguf as &dyn Tensors, |rounded| rounded);
    let decoder = Decoder::load(&backend, &config, tensors, progress)?;
    let name = gguf.metadata().str("general.name")?;
    Ok(Loaded {
        decoder,
        tokenizer: Arc::new(tokenizer),
        template: template.map(Arc::new),
        model_name: name.unwrap_or(file_name).to_owned(),
        model_sha256,
        quant: main_dtype(tensors),
        config,
        backend,
    })
}

fn compile_template(
    gguf: &Gguf,
    tokenizer: &Tokenizer,
) -> Result<Option<ChatTemplate>, EngineError> {
    let Some(source) = gguf.chat_template() else { return Ok(None) };
    let literal = |key: &str| -> Result<String, EngineError> {
        let id = gguf.metadata().u32(key)?;
        Ok(id.map(|id| tokenizer.decode(&[id])).unwrap_or_default())
    };
    let bos = literal("tokenizer.ggml.bos_token_id")?;
    let eos = literal("tokenizer.ggml.eos_token_id")?;
    Ok(Some(ChatTemplate::compile(source, &bos, &eos)?))
}

fn vocabulary(table: VocabularyTable) -> Vocabulary {
    Vocabulary {
        model: table.model,
        pre: table.pre,
        tokens: table.tokens,
        kinds: table.kinds,
        merges: table.merges,
        scores: table.scores,
        bos: table.bos,
        eos: table.eos,
        eot: table.eot,
        unknown: table.unknown,
        padding: table.padding,
        separator: table.separator,
        add_bos: table.add_bos,
        add_eos: table.add_eos,
        add_space_prefix: table.add_space_prefix,
        remove_extra_whitespaces: table.remove_extra_whitespaces,
        precompiled_charsmap: table.precompiled_charsmap,
        lowercase: table.lowercase,
        strip_accents: table.strip_accents,
        strips_right: table.strips_right,
    }
}

/// The format that holds the most bytes.
fn main_dtype(tensors: &dyn Tensors) -> String {
    let mut bytes: BTreeMap<DType, usize> = BTreeMap::new();
    for info in tensors.names().filter_map(|name| tensors.info(name)) {
        let len: usize = info.shape.iter().product();
        *bytes.entry(info.dtype).or_default() +=
            len / info.dtype.block_len() * info.dtype.block_bytes();
    }
    bytes
        .into_iter()
        .max_by_key(|entry| entry.1)
        .map(|entry| entry.0.to_string())
        .unwrap_or_default()
}
