//! [`HfTensors`]: the tensors of a folder under the engine's names, decoded one at a time.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use exrail_tensor::DType;

use super::config::HfConfig;
use super::names::Names;
use super::shards::Shards;
use crate::safetensors_file::SUPPORTED;
use crate::{
    DecoderConfig, LoadError, QuantMethod, RawTensor, TensorInfo, TensorView, Tensors,
    dequantise_layer, layer_shape, native_blocks, native_type,
};

/// exllamav2 pads layers to multiples of 32, exllamav3 to multiples of this.
const MAX_PADDING: usize = 128;
const HEAD: &str = "output.weight";
const EMBEDDING: &str = "token_embd.weight";

/// The tensors of a folder.
#[derive(Clone)]
pub(super) struct HfTensors {
    shards: Shards,
    method: Option<QuantMethod>,
    entries: BTreeMap<String, Entry>,
    /// Tensors of the files that the model does not use, by their names there.
    ignored: Vec<String>,
}

#[derive(Clone)]
struct Entry {
    source: Source,
    dtype: DType,
    shape: Vec<usize>,
}

/// Where the elements come from.
#[derive(Clone)]
enum Source {
    /// The tensor of this name, as it is.
    Stored(String),
    /// The tensor of this name plus one: Gemma's norms multiply by 1 + weight, ours by the weight.
    PlusOne(String),
    /// The packed layer of this name, dequantised or, where the entry's type is one of blocks,
    /// repacked.
    Packed(String),
}

impl HfTensors {
    /// Finds every tensor of `config` in `shards` and refuses those that are none of it. In `config`
    /// the head is no longer tied when the folder has a packed one of its own, and matrices that
    /// the family fuses are separate where a quantiser has split them.
    pub(super) fn new(
        shards: Shards,
        config: &mut HfConfig,
        method: Option<QuantMethod>,
    ) -> Result<HfTensors, LoadError> {
        let storage = &mut config.decoder.storage;
        let has = |module: &str| shards.tensor_names().any(|name| name.contains(module));
        storage.fused_qkv &= has(".qkv_proj.") || !has(".q_proj.");
        storage.fused_gate_up &= has(".gate_up_proj.") || !has(".gate_proj.");
        let names = config.names();
        let (entries, ignored) = (BTreeMap::new(), Vec::new());
        let mut tensors = HfTensors { shards, method, entries, ignored };
        tensors.collect(config, &names)?;
        match tensors.settle(config) {
            Ok(()) => Ok(tensors),
            Err(error) => Err(tensors.in_stored_names(error, &names)),
        }
    }

    pub(super) fn shards(&self) -> &Shards {
        &self.shards
    }

    pub(super) fn method(&self) -> Option<QuantMethod> {
        self.method
    }

    pub(super) fn ignored(&self) -> &[String] {
        &self.ignored
    }

    fn collect(&mut self, config: &HfConfig, names: &Names) -> Result<(), LoadError> {
        let stored: Vec<String> = self.shards.tensor_names().map(str::to_owned).collect();
        let mut packed = BTreeSet::new();
        for name in stored {
            if is_unused(&name, config.is_multimodal) {
                self.ignored.push(name);
                continue;
            }
            let unexpected = || LoadError::UnexpectedTensor {
                tensor: name.clone(),
                architecture: config.model_type.to_owned(),
            };
            let (module, suffix) = name.rsplit_once('.').ok_or_else(unexpected)?;
            let ours = names.canonical(module).ok_or_else(unexpected)?;
            match suffix {
                "bias" if !config.has_bias(&ours) => {
                    // Some quantisers write a bias of zeros for every layer.
                    if self.method.is_none() || !self.is_zero(&name)? {
                        return Err(unexpected());
                    }
                    self.ignored.push(name);
                }
                "weight" | "bias" => {
                    let adds_one = config.adds_one_to_norms && ours.ends_with("norm");
                    let source = if adds_one { Source::PlusOne } else { Source::Stored };
                    self.insert(format!("{ours}.{suffix}"), source(name.clone()))?;
                }
                _ if self.method.is_some_and(|m| m.layer_tensors().contains(&suffix)) => {
                    packed.insert((format!("{ours}.weight"), module.to_owned()));
                }
                _ => return Err(unexpected()),
            }
        }
        for (name, module) in packed {
            self.insert(name, Source::Packed(module))?;
        }
        Ok(())
    }

    fn insert(&mut self, name: String, source: Source) -> Result<(), LoadError> {
        let (dtype, shape) = match &source {
            Source::Stored(stored) => {
                let view = self.view(stored)?;
                (view.dtype, view.shape.to_vec())
            }
            Source::PlusOne(stored) => (DType::F32, self.view(stored)?.shape.to_vec()),
            Source::Packed(module) => {
                let method = self.method.expect("packed layers are only collected with a method");
                self.require_parts(method, module)?;
                let look = |name: &str| self.raw(name);
                let (rows, columns) = layer_shape(&method, module, &look)?;
                let native = native_type(&method, module, &look)?;
                (native.unwrap_or(DType::F16), vec![rows, columns])
            }
        };
        let tensor = match &source {
            Source::Stored(stored) | Source::PlusOne(stored) | Source::Packed(stored) => {
                stored.clone()
            }
        };
        match self.entries.insert(name, Entry { source, dtype, shape }) {
            None => Ok(()),
            Some(_) => Err(LoadError::DuplicateTensor { tensor }),
        }
    }

    /// Refuses a packed layer without one of its tensors now rather than when it is decoded.
    fn require_parts(&self, method: QuantMethod, module: &str) -> Result<(), LoadError> {
        let has = |suffix: &str| self.shards.file_of(&format!("{module}.{suffix}")).is_some();
        for &suffix in method.layer_tensors() {
            let is_there = match suffix {
                "g_idx" | "mcg" | "mul1" => true,
                // The older spellings of EXL3's signs.
                "suh" | "su" => has("suh") || has("su"),
                "svh" | "sv" => has("svh") || has("sv"),
                suffix => has(suffix),
            };
            if !is_there {
                return Err(LoadError::bad_value(
                    &format!("{module}.{suffix}"),
                    "a tensor beside the other parts of the layer",
                    "none",
                ));
            }
        }
        Ok(())
    }

    fn settle(&mut self, config: &mut HfConfig) -> Result<(), LoadError> {
        self.settle_head(&mut config.decoder)?;
        self.settle_padding(&config.decoder);
        self.check(config)
    }

    /// A head beside a tied embedding: a packed one is used, as by the quantisers' own engines; a
    /// copy of the embedding is ignored; anything else is a contradiction.
    fn settle_head(&mut self, config: &mut DecoderConfig) -> Result<(), LoadError> {
        let (Some(head), true) = (self.entries.get(HEAD), self.entries.contains_key(EMBEDDING))
        else {
            return Ok(());
        };
        match head.source.clone() {
            Source::Packed(_) => config.tied_head = false,
            Source::Stored(name) | Source::PlusOne(name) if config.tied_head => {
                let (head, embedding) = (self.tensor(HEAD)?, self.tensor(EMBEDDING)?);
                let is_copy = head.dtype == embedding.dtype && head.bytes == embedding.bytes;
                if !is_copy {
                    let expected = format!("false, as `{name}` is not the embedding");
                    return Err(LoadError::bad_value("tie_word_embeddings", expected, true));
                }
                self.entries.remove(HEAD);
                self.ignored.push(name);
            }
            Source::Stored(_) | Source::PlusOne(_) => {}
        }
        Ok(())
    }

    /// Takes rows and columns of padding from the shapes of packed layers.
    fn settle_padding(&mut self, config: &DecoderConfig) {
        if !matches!(self.method, Some(QuantMethod::Exl2 | QuantMethod::Exl3)) {
            return;
        }
        // A configuration of more tensors than there are fails the check; its names are not made.
        let n_experts = config.experts.map_or(0, |experts| experts.n_experts);
        let n_mixed = config.layers.iter().filter(|layer| layer.has_experts).count();
        if config.n_layers() + n_mixed * n_experts > self.entries.len() {
            return;
        }
        let mut unpad = |name: &str, expected: &[usize]| {
            let Some(entry) = self.entries.get_mut(name) else { return };
            let is_padded = |(&found, &expected): (&usize, &usize)| {
                found >= expected && found - expected < MAX_PADDING
            };
            let is_packed = matches!(entry.source, Source::Packed(_));
            let same_rank = entry.shape.len() == expected.len();
            if is_packed && same_rank && entry.shape.iter().zip(expected).all(is_padded) {
                if entry.shape.last() != expected.last() {
                    // Rows that are cut are no longer whole blocks.
                    entry.dtype = DType::F16;
                }
                entry.shape = expected.to_vec();
            }
        };
        for (name, shape) in config.outer_tensors() {
            unpad(name, &shape);
        }
        for layer_idx in 0..config.n_layers() {
            for tensor in config.layer_tensors(layer_idx) {
                unpad(&crate::tensor_name(layer_idx, &tensor.part), &tensor.shape);
            }
        }
    }

    fn check(&self, config: &HfConfig) -> Result<(), LoadError> {
        config.decoder.check_tensors(self, &[])?;
        if config.has_output_bias {
            for layer_idx in 0..config.decoder.n_layers() {
                let name = crate::tensor_name(layer_idx, "attn_output.bias");
                self.require_info(&name, &[config.decoder.width])?;
            }
        }
        Ok(())
    }

    /// `error` with the name that the user finds in the folder.
    fn in_stored_names(&self, mut error: LoadError, names: &Names) -> LoadError {
        let (LoadError::MissingTensor { tensor, .. }
        | LoadError::WrongShape { tensor, .. }
        | LoadError::UnexpectedTensor { tensor, .. }) = &mut error
        else {
            return error;
        };
        let stored = match self.entries.get(tensor).map(|entry| &entry.source) {
            Some(Source::Stored(name) | Source::PlusOne(name)) => Some(name.clone()),
            Some(Source::Packed(module)) => Some(format!("{module}.weight")),
            None => names.stored(tensor),
        };
        *tensor = stored.unwrap_or_else(|| tensor.clone());
        error
    }

    /// The names of all tensors that are stored as they are: in the files, and here.
    pub(super) fn name_pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.entries.iter().filter_map(|(name, entry)| match &entry.source {
            Source::Stored(stored) | Source::PlusOne(stored) => Some((&**stored, &**name)),
            Source::Packed(_) => None,
        })
    }

    fn is_zero(&self, name: &str) -> Result<bool, LoadError> {
        Ok(self.view(name)?.to_f32()?.iter().all(|&x| x == 0.0))
    }

    /// The floating-point tensor that the files call `name`.
    pub(super) fn view(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        let file = self.shards.file_of(name);
        if let Some(view) = file.and_then(|file| file.tensor(name)) {
            return Ok(view);
        }
        let found = file.and_then(|file| file.stored_type(name));
        Err(LoadError::UnsupportedDtype {
            tensor: name.to_owned(),
            found: found.unwrap_or_default(),
            supported: SUPPORTED,
        })
    }

    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        self.shards.file_of(name)?.raw(name)
    }

    fn bytes(&self, entry: &Entry) -> Result<Cow<'_, [u8]>, LoadError> {
        match &entry.source {
            Source::Stored(name) => Ok(self.view(name)?.bytes),
            Source::PlusOne(name) => {
                let values = self.view(name)?.to_f32()?;
                Ok(values.iter().flat_map(|x| (x + 1.0).to_le_bytes()).collect())
            }
            Source::Packed(module) => {
                let method = self.method.expect("packed layers are only collected with a method");
                let look = |name: &str| self.raw(name);
                if entry.dtype.is_quantised() {
                    let blocks = native_blocks(&method, module, &look)?;
                    let mut blocks = blocks.expect("the entry's type is that of its blocks");
                    let row_bytes = blocks.bytes.len() / blocks.rows;
                    blocks.bytes.truncate(entry.shape[0] * row_bytes);
                    return Ok(blocks.bytes.into());
                }
                let dense = dequantise_layer(&method, module, &look)?;
                let mut bytes = Vec::with_capacity(2 * entry.shape[0] * entry.shape[1]);
                for row in dense.halves.chunks_exact(dense.columns).take(entry.shape[0]) {
                    bytes.extend(row[..entry.shape[1]].iter().flat_map(|half| half.to_le_bytes()));
                }
                Ok(Cow::Owned(bytes))
            }
        }
    }
}

impl Tensors for HfTensors {
    fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let (name, entry) = self.entries.get_key_value(name)?;
        Some(TensorInfo { name, dtype: entry.dtype, shape: &entry.shape })
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        let Some((name, entry)) = self.entries.get_key_value(name) else {
            let (tensor, expected) = (name.to_owned(), Vec::new());
            return Err(LoadError::MissingTensor { tensor, expected });
        };
        let bytes = self.bytes(entry)?;
        Ok(TensorView { name, dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.entries.keys().map(String::as_str))
    }

    fn release(&self, name: &str) {
        match self.entries.get(name).map(|entry| &entry.source) {
            Some(Source::Stored(name) | Source::PlusOne(name)) => {
                if let Some(file) = self.shards.file_of(name) {
                    file.release(name);
                }
            }
            // What packed layers share is read again by the next of them.
            Some(Source::Packed(_)) | None => {}
        }
    }
}

/// Tensors that follow from the configuration, or belong to another modality.
fn is_unused(name: &str, is_multimodal: bool) -> bool {
    let other_modalities = ["vision_tower.", "multi_modal_projector."];
    let inner = name.strip_prefix("model.").unwrap_or(name);
    name.ends_with(".rotary_emb.inv_freq")
        || (is_multimodal && other_modalities.iter().any(|prefix| inner.starts_with(prefix)))
}
