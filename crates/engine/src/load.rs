//! From a model file to everything an engine needs.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};

use exrail_checkpoint::{
    Checkpoint, DecoderConfig, Gguf, HfFolder, LoadError, Rounded, SplitName, Tensors,
    VocabularyTable,
};
use exrail_kernels::Backend;
use exrail_model::{Decoder, LoadProgress};
use exrail_tensor::IntGrid;
use exrail_text::{ChatTemplate, Specials, TokenRoles, Tokenizer, Vocabulary};

use crate::error::EngineError;
use crate::fingerprint::{ModelFingerprint, Unhashed};
use crate::plan::Admission;

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
    /// `general.name`, or the file name without the number of a part.
    pub model_name: String,
    /// Hex sha256 of its files, see [`exrail_checkpoint::CheckpointFiles::sha256`]; the hash may still
    /// run.
    pub model_sha256: ModelFingerprint,
    /// Format of the largest part of the weights, such as `Q4_1`.
    pub quant: String,
    /// Architecture as data.
    pub config: DecoderConfig,
}

/// Stack of the thread that reads vocabulary and template.
const TEXT_STACK: usize = 8 << 20;

/// What is chosen when a model is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Positions to serve; `None`: as many as the model was trained on. Rotary scalings that depend
    /// on the length follow it.
    pub max_context: Option<usize>,
    /// Rounds the matrices of a 16-bit model to this grid on the way to the device, see
    /// [`Rounded`]; `None`: as they are stored.
    pub quant: Option<IntGrid>,
    /// Whether [`LoadOptions::quant`] may round what is stored in blocks, from the values that they stand for: for
    /// comparing a model with itself, not for serving it.
    pub rounds_blocks: bool,
}

/// Opens a GGUF file, all parts of a split one or a Hugging Face folder and prepares it for `backend`.
/// The hash of the files goes on beside what follows, until everything that came of this is dropped; on a
/// device that runs ahead it begins before the weights are loaded.
///
/// # Errors
/// The model is refused (see [`exrail_checkpoint::LoadError`]), its vocabulary or template does not
/// compile, or the device has no kernel or memory for it. Nothing stays loaded then.
pub fn load_generator<B: Backend>(
    backend: B,
    path: &Path,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<B>, EngineError> {
    load_opened(backend, Checkpoint::open(path)?, path, options, progress)
}

/// [`load_generator`] of what fits: before anything is put on the device.
///
/// # Errors
/// [`EngineError::DoesNotFit`] with the arithmetic, and as [`load_generator`].
pub fn load_admitted<B: Backend>(
    backend: B,
    path: &Path,
    options: LoadOptions,
    admission: &Admission<'_>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<B>, EngineError> {
    let checkpoint = Checkpoint::open(path)?;
    admission.admit(&checkpoint, options)?;
    load_opened(backend, checkpoint, path, options, progress)
}

fn load_opened<B: Backend>(
    backend: B,
    checkpoint: Checkpoint,
    path: &Path,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<B>, EngineError> {
    let shown = path.display().to_string();
    let failed = |source| EngineError::Io { path: shown.clone(), source };
    let unhashed = checkpoint.files().and_then(|files| Unhashed::new(&shown, files));
    let unhashed = unhashed.map_err(failed)?;
    // Where this machine's cores compute, loading needs all of them. Where they only feed the device, the
    // hash of a large file is known that much earlier.
    let hash =
        if backend.runs_ahead() { Ok(unhashed.begin().map_err(failed)?) } else { Err(unhashed) };
    let file_name = || path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let split_name = SplitName::of(path).map(|name| name.model().to_owned());
    let name = split_name.or_else(file_name).unwrap_or_else(|| path.display().to_string());
    let prepared = Prepared::of(backend, &checkpoint, options, progress)?;
    drop(checkpoint);
    let sha256 = hash.or_else(Unhashed::begin).map_err(failed)?;
    Ok(prepared.identify(name, sha256))
}

/// Who a checkpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its name, if it does not name itself.
    pub name: String,
    /// Its fingerprint, see [`exrail_checkpoint::CheckpointFiles::sha256`].
    pub sha256: String,
}

/// [`load_generator`] for a checkpoint that is open already.
///
/// # Errors
/// As [`load_generator`].
pub fn prepare_generator<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    identity: Identity,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<B>, EngineError> {
    let sha256 = ModelFingerprint::known(identity.sha256);
    Ok(Prepared::of(backend, checkpoint, options, progress)?.identify(identity.name, sha256))
}

/// [`Loaded`] without the identity of the checkpoint.
struct Prepared<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    text: TextParts,
    quant: String,
    config: DecoderConfig,
}

impl<B: Backend> Prepared<B> {
    fn of(
        backend: B,
        checkpoint: &Checkpoint,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, EngineError> {
        let rounded = options.quant.map(|grid| round(checkpoint, grid, options.rounds_blocks));
        let rounded = rounded.transpose()?;
        let tensors = rounded.as_ref().map_or(checkpoint.tensors(), |rounded| rounded);
        let config = served_config(checkpoint, options)?;
        let text = || TextParts::checked(checkpoint, &config);
        // A vocabulary takes about as long as the weights of a small model.
        let (text, decoder) = thread::scope(|scope| {
            // As much stack as the main thread usually has: files nest their patterns and templates.
            let beside =
                thread::Builder::new().name("exrail-text".to_owned()).stack_size(TEXT_STACK);
            let beside = beside.spawn_scoped(scope, text);
            let decoder = Decoder::load(&backend, &config, tensors, progress);
            let text = match beside.map(ScopedJoinHandle::join) {
                Ok(Ok(text)) => text,
                Ok(Err(panic)) => resume_unwind(panic),
                Err(_no_thread) => text(),
            };
            (text, decoder)
        });
        let (text, decoder) = (text?, decoder?);
        let quant = match rounded {
            None => storage_format(checkpoint),
            Some(_) => main_format(tensors),
        };
        Ok(Self { backend, decoder, text, quant, config })
    }

    fn identify(self, file_name: String, model_sha256: ModelFingerprint) -> Loaded<B> {
        let TextParts { tokenizer, template, name } = self.text;
        Loaded {
            backend: self.backend,
            decoder: self.decoder,
            tokenizer: Arc::new(tokenizer),
            template: template.map(Arc::new),
            model_name: name.unwrap_or(file_name),
            model_sha256,
            quant: self.quant,
            config: self.config,
        }
    }
}

/// The weights of a checkpoint, rounded on the way.
pub(crate) fn round(
    checkpoint: &Checkpoint,
    grid: IntGrid,
    blocks: bool,
) -> Result<Rounded<'_>, LoadError> {
    if let Checkpoint::Folder(folder) = checkpoint
        && let Some(method) = folder.quant_method()
    {
        return Err(LoadError::AlreadyPacked { found: method.to_string() });
    }
    if blocks {
        return Ok(Rounded::of_any(checkpoint.tensors(), grid));
    }
    Rounded::new(checkpoint.tensors(), grid)
}

/// A checkpoint of which everything but the weights was read, and found to agree.
pub struct CheckedGenerator {
    /// Architecture as data; every tensor that it needs is there in its shape.
    pub config: DecoderConfig,
    /// Its tokens have a row each in the embedding.
    pub tokenizer: Tokenizer,
    /// Chat template, if there is one; it compiles.
    pub template: Option<ChatTemplate>,
    /// What the checkpoint calls itself.
    pub name: Option<String>,
}

/// Checks a checkpoint as [`prepare_generator`] does, without preparing its weights.
///
/// # Errors
/// As [`load_generator`], but for what only a device can say.
pub fn check_generator(
    checkpoint: &Checkpoint,
    options: LoadOptions,
) -> Result<CheckedGenerator, EngineError> {
    let config = served_config(checkpoint, options)?;
    let TextParts { tokenizer, template, name } = TextParts::checked(checkpoint, &config)?;
    Ok(CheckedGenerator { config, tokenizer, template, name })
}

/// The architecture, for as many positions as are asked for.
pub(crate) fn served_config(
    checkpoint: &Checkpoint,
    options: LoadOptions,
) -> Result<DecoderConfig, LoadError> {
    let config = checkpoint.config()?;
    match options.max_context {
        Some(max_context) => config.with_context_len(max_context),
        None => Ok(config),
    }
}

/// What stands beside the weights.
struct TextParts {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    name: Option<String>,
}

impl TextParts {
    /// The parts, whose tokens all have a row in the embedding.
    fn checked(checkpoint: &Checkpoint, config: &DecoderConfig) -> Result<TextParts, EngineError> {
        let parts = TextParts::of(checkpoint)?;
        let (tokens, rows) = (parts.tokenizer.vocab_len(), config.vocab_size);
        if tokens > rows {
            return Err(EngineError::VocabularyTooLarge { rows, tokens });
        }
        // What splits a text into words is compiled when it is first needed, which takes code and memory
        // that nothing needs after: better here than in the first request.
        drop(parts.tokenizer.encode("A word\n", Specials::AsText));
        Ok(parts)
    }

    fn of(checkpoint: &Checkpoint) -> Result<TextParts, EngineError> {
        match checkpoint {
            Checkpoint::Gguf(gguf) => TextParts::of_gguf(gguf),
            Checkpoint::Folder(folder) => TextParts::of_folder(folder),
        }
    }

    fn of_gguf(gguf: &Gguf) -> Result<TextParts, EngineError> {
        let table = VocabularyTable::from_gguf(gguf)?;
        let tokenizer = Tokenizer::from_vocabulary(vocabulary(table))?;
        let literal = |key: &str| -> Result<String, EngineError> {
            let id = gguf.metadata().u32(key)?;
            Ok(id.map(|id| tokenizer.decode(&[id])).unwrap_or_default())
        };
        let bos = literal("tokenizer.ggml.bos_token_id")?;
        let eos = literal("tokenizer.ggml.eos_token_id")?;
        let template = gguf.chat_template();
        let template = template.map(|source| ChatTemplate::compile(source, &bos, &eos));
        let name = gguf.metadata().str("general.name")?.map(str::to_owned);
        Ok(TextParts { template: template.transpose()?, tokenizer, name })
    }

    fn of_folder(folder: &HfFolder) -> Result<TextParts, EngineError> {
        let Some(json) = folder.tokenizer_json()? else {
            let has_sentencepiece = folder.tokenizer_model()?.is_some();
            return Err(EngineError::NoTokenizer { has_sentencepiece });
        };
        let (text, generation) = (folder.text(), folder.generation());
        let tokenizer = Tokenizer::from_json(&json)?;
        let named = |role, literal: &Option<String>| {
            literal.as_deref().map(|literal| tokenizer.named_token(role, literal)).transpose()
        };
        let named_bos = named("bos", &text.bos)?;
        // Whatever either file calls an end of an answer is one.
        let mut eos = generation.eos.clone();
        eos.extend(named("eos", &text.eos)?);
        let roles = TokenRoles { bos: generation.bos.or(named_bos), eos, add_bos: text.adds_bos };
        let literal = |literal: &Option<String>, id: Option<u32>| {
            let decoded = || id.map(|id| tokenizer.decode(&[id])).unwrap_or_default();
            literal.clone().unwrap_or_else(decoded)
        };
        let bos = literal(&text.bos, roles.bos);
        let eos = literal(&text.eos, roles.eos.first().copied());
        let template = text.chat_template();
        let template = template.map(|source| ChatTemplate::compile(source, &bos, &eos));
        Ok(TextParts {
            template: template.transpose()?,
            tokenizer: tokenizer.with_roles(&roles)?,
            name: None,
        })
    }
}

pub(crate) fn vocabulary(table: VocabularyTable) -> Vocabulary {
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

/// How layers are packed, or the format that holds the most bytes.
fn storage_format(checkpoint: &Checkpoint) -> String {
    if let Checkpoint::Folder(folder) = checkpoint
        && let Some(method) = folder.quant_method()
    {
        return method.to_string();
    }
    main_format(checkpoint.tensors())
}

/// The format that holds the most bytes.
fn main_format(tensors: &dyn Tensors) -> String {
    let mut bytes: BTreeMap<String, usize> = BTreeMap::new();
    for info in tensors.names().filter_map(|name| tensors.info(name)) {
        *bytes.entry(info.dtype.to_string()).or_default() += info.n_bytes();
    }
    bytes.into_iter().max_by_key(|entry| entry.1).map(|entry| entry.0).unwrap_or_default()
}
