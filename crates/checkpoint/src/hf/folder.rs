//! [`HfFolder`]: a Hugging Face model folder, checked.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config::HfConfig;
use super::files::Files;
use super::quantisation::quant_method;
use super::shards::Shards;
use super::tensors::HfTensors;
use super::text::{GenerationSettings, TextSettings};
use crate::{DecoderConfig, LoadError, QuantMethod, TensorInfo, TensorView, Tensors};

/// `tokenizer.json` of 262 thousand tokens has 33 megabytes.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// A folder with `config.json` and safetensors files, as published for transformers. Its tensors
/// have the names of GGUF files: `blk.3.attn_q.weight`.
///
/// Every tensor that the configuration implies is there in its shape, and there is none besides but
/// those in [`HfFolder::ignored`]. Elements are those of the files, in place; packed layers are
/// repacked to native blocks where [`native_type`](crate::native_type) has some and decoded to F16
/// otherwise, when asked for, one at a time.
#[derive(Clone)]
pub struct HfFolder {
    files: Files,
    config: DecoderConfig,
    tensors: HfTensors,
    generation: GenerationSettings,
    text: TextSettings,
}

impl HfFolder {
    /// Opens the folder `dir`. Tensor data is not read but where two tensors must be compared.
    ///
    /// Files must not be changed in place while the value lives; replace them by rename.
    ///
    /// # Errors
    /// When a file is missing or wrong, the configuration is unknown or impossible, a feature is
    /// used that this engine does not have, or a tensor is missing, misshapen or unknown. The error
    /// names the file, and the field or tensor.
    pub fn open(dir: &Path) -> Result<HfFolder, LoadError> {
        HfFolder::new(Files::Disk(dir.to_owned())).map_err(|error| error.in_file(dir))
    }

    /// As [`HfFolder::open`], from files that are in memory, by name.
    ///
    /// # Errors
    /// As [`HfFolder::open`].
    pub fn parse(files: BTreeMap<String, Arc<[u8]>>) -> Result<HfFolder, LoadError> {
        HfFolder::new(Files::Memory(Arc::new(files)))
    }

    fn new(files: Files) -> Result<HfFolder, LoadError> {
        let name = "config.json";
        let Some(json) = files.json(name)? else {
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(LoadError::Io { path: files.path(name), source });
        };
        let in_config = |error: LoadError| error.in_file(&files.path(name));
        let mut config = HfConfig::new(&json).map_err(in_config)?;
        let method = quant_method(&files, &json)?;
        let may_be_stale = matches!(method, Some(QuantMethod::Exl2 | QuantMethod::Exl3));
        let shards = Shards::open(&files, may_be_stale)?;
        let tensors = HfTensors::new(shards, &mut config, method)?;
        let generation = GenerationSettings::read(&files, &json)?;
        let text = TextSettings::read(&files)?;
        Ok(HfFolder { files, config: config.decoder, tensors, generation, text })
    }

    /// The folder; `None` when its files were in memory already.
    pub(crate) fn dir(&self) -> Option<&Path> {
        match &self.files {
            Files::Disk(dir) => Some(dir),
            Files::Memory(_) => None,
        }
    }

    /// The architecture as data.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// How layers are packed, if they are.
    #[must_use]
    pub fn quant_method(&self) -> Option<QuantMethod> {
        self.tensors.method()
    }

    /// Tensors of the files that the model does not use, by their names there: frequencies that
    /// follow from the configuration, a copy of the tied head, zero biases, a vision tower.
    #[must_use]
    pub fn ignored(&self) -> &[String] {
        self.tensors.ignored()
    }

    /// The names in the files of all tensors, sorted.
    pub fn stored_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.shards().tensor_names()
    }

    /// The floating-point tensor that the files call `stored`, as it is there.
    ///
    /// # Errors
    /// When there is none, or it holds no floating-point numbers.
    pub fn stored_tensor(&self, stored: &str) -> Result<TensorView<'_>, LoadError> {
        self.tensors.view(stored)
    }

    /// Names in the files and the engine's names of all tensors that the model uses and that are
    /// not packed.
    pub fn name_pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.tensors.name_pairs()
    }

    /// The safetensors files, in order.
    #[must_use]
    pub fn weight_files(&self) -> Vec<PathBuf> {
        self.tensors.shards().file_names().iter().map(|name| self.files.path(name)).collect()
    }

    /// Bytes of all safetensors files.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.tensors.shards().len_bytes()
    }

    /// Special tokens and sampling defaults.
    #[must_use]
    pub fn generation(&self) -> &GenerationSettings {
        &self.generation
    }

    /// Chat template and the literals of special tokens.
    #[must_use]
    pub fn text(&self) -> &TextSettings {
        &self.text
    }

    /// The contents of `tokenizer.json`, if there is one.
    ///
    /// # Errors
    /// When the file cannot be read or is too large.
    pub fn tokenizer_json(&self) -> Result<Option<Vec<u8>>, LoadError> {
        self.files.read("tokenizer.json", MAX_TOKENIZER_BYTES)
    }

    /// The contents of `tokenizer.model`, a SentencePiece vocabulary, if there is one.
    ///
    /// # Errors
    /// When the file cannot be read or is too large.
    pub fn tokenizer_model(&self) -> Result<Option<Vec<u8>>, LoadError> {
        self.files.read("tokenizer.model", MAX_TOKENIZER_BYTES)
    }
}

impl Tensors for HfFolder {
    fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.tensors.info(name)
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        self.tensors.tensor(name)
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        self.tensors.names()
    }

    fn release(&self, name: &str) {
        self.tensors.release(name);
    }
}

impl fmt::Debug for HfFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HfFolder")
            .field("architecture", &self.config.architecture)
            .field("len_bytes", &self.len_bytes())
            .field("n_tensors", &self.tensors.names().count())
            .field("quant_method", &self.quant_method())
            .finish_non_exhaustive()
    }
}
