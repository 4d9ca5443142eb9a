//! [`Gguf`]: a model in GGUF files (versions 2 and 3) behind checked views.
//!
//! Layout (`ggml/docs/gguf.md`): magic, version, tensor count, key count, keys with typed values,
//! tensor infos (dimensions fastest first, offsets relative to the data section), padding to the
//! alignment, tensor data. A model is one such file, or several that llama.cpp's `gguf-split` wrote,
//! see [`SplitName`].

mod name;
mod part;
mod split;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use name::SplitName;

use crate::bytes::FileBytes;
use crate::tensors::found;
use crate::{LoadError, Metadata, TensorInfo, TensorView, Tensors};
use part::{Part, TensorEntry};
use split::Split;

/// A parsed model: metadata in memory, tensors as views into the mappings of its files.
///
/// Once constructed, every tensor's bytes lie inside one file, on that file's alignment, and share
/// no byte with another tensor; and the files are all parts of one model.
#[derive(Clone)]
pub struct Gguf {
    version: u32,
    /// Of the first part; the others repeat some of it at most.
    metadata: Metadata,
    parts: Vec<GgufPart>,
    /// Each with the index of its part.
    tensors: Vec<(usize, TensorEntry)>,
    index: HashMap<String, usize>,
}

/// One file of a model.
#[derive(Clone)]
pub struct GgufPart {
    path: Option<PathBuf>,
    bytes: FileBytes,
    n_tensors: usize,
}

impl GgufPart {
    /// Where the file is; `None` when it was in memory already.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Tensors in this file; a first part may have none.
    #[must_use]
    pub fn n_tensors(&self) -> usize {
        self.n_tensors
    }

    /// Bytes of the file.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

impl Gguf {
    /// Maps and parses the file at `path` and, when it is the first of several, the others beside
    /// it. Tensor data is not read.
    ///
    /// The files must not be changed in place while the value lives; replace them by rename.
    ///
    /// # Errors
    /// When a file cannot be mapped or is not a valid GGUF of supported formats; when `path` is a
    /// later part, or not named as its part is; when a part is missing or is not one of this model;
    /// when a tensor is in two parts, or there are not as many as the first part says.
    pub fn open(path: &Path) -> Result<Gguf, LoadError> {
        let first = Part::open(path)?;
        let in_first = |error: LoadError| error.in_file(path);
        let split = Split::read(&first.metadata).map_err(in_first)?;
        let (mut paths, mut parts) = (vec![path.to_owned()], vec![first]);
        if split.count > 1 {
            let name = split.name_of_first(path).map_err(in_first)?;
            for number in 2..=split.count {
                let path = path.with_file_name(name.part(number).to_string());
                parts.push(split.open_part(number, &path)?);
                paths.push(path);
            }
        }
        split.check(&parts).map_err(|(part, error)| error.in_file(&paths[part]))?;
        Ok(Gguf::assemble(parts, paths.into_iter().map(Some)))
    }

    /// Parses a file that is in memory already.
    ///
    /// # Errors
    /// When the bytes are not a valid GGUF of supported formats, or one part of several.
    pub fn parse(bytes: impl Into<Arc<[u8]>>) -> Result<Gguf, LoadError> {
        Gguf::parse_parts([bytes.into()])
    }

    /// Parses all parts of a model that are in memory already, in their order.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    ///
    /// # Panics
    /// When there is no part.
    pub fn parse_parts(parts: impl IntoIterator<Item = Arc<[u8]>>) -> Result<Gguf, LoadError> {
        let parse = |bytes| Part::parse(FileBytes::Owned(bytes));
        let parts = parts.into_iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        assert!(!parts.is_empty(), "a model without a file");
        let split = Split::read(&parts[0].metadata)?;
        split.require_first()?;
        split.require_given(parts.len())?;
        split.check(&parts).map_err(|(_, error)| error)?;
        Ok(Gguf::assemble(parts, std::iter::repeat(None)))
    }

    /// The parts as one model; [`Split::check`] says whether they are.
    fn assemble(parts: Vec<Part>, paths: impl Iterator<Item = Option<PathBuf>>) -> Gguf {
        let (version, metadata) = (parts[0].version, parts[0].metadata.clone());
        let mut gguf = Gguf {
            version,
            metadata,
            parts: Vec::with_capacity(parts.len()),
            tensors: Vec::new(),
            index: HashMap::new(),
        };
        for (i, (part, path)) in parts.into_iter().zip(paths).enumerate() {
            let (bytes, n_tensors) = (part.bytes, part.tensors.len());
            gguf.parts.push(GgufPart { path, bytes, n_tensors });
            for entry in part.tensors {
                gguf.index.insert(entry.name.clone(), gguf.tensors.len());
                gguf.tensors.push((i, entry));
            }
        }
        gguf
    }

    /// Version of the container, 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The key-value section, of the first part where there are several.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The files, in their order: one, or all parts.
    #[must_use]
    pub fn parts(&self) -> &[GgufPart] {
        &self.parts
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|entry| self.view(entry))
    }

    /// The tensor called `name`.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.index.get(name).map(|&i| self.view(&self.tensors[i]))
    }

    /// Bytes of all files.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.parts.iter().map(GgufPart::len_bytes).sum()
    }

    /// The source of the model's chat template, when it has one.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        match self.metadata.get("tokenizer.chat_template") {
            Some(crate::Value::String(source)) => Some(source),
            Some(_) | None => None,
        }
    }

    fn view<'a>(&'a self, (part, entry): &'a (usize, TensorEntry)) -> TensorView<'a> {
        TensorView {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: Cow::Borrowed(&self.parts[*part].bytes[entry.place.clone()]),
        }
    }
}

impl Tensors for Gguf {
    fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        Gguf::tensor(self, name).as_ref().map(TensorInfo::from)
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        found(name, Gguf::tensor(self, name))
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.iter().map(|(_, entry)| entry.name.as_str()))
    }

    fn release(&self, name: &str) {
        if let Some(&i) = self.index.get(name) {
            let (part, entry) = &self.tensors[i];
            self.parts[*part].bytes.forget(entry.place.clone());
        }
    }
}

impl fmt::Debug for GgufPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GgufPart")
            .field("path", &self.path)
            .field("len_bytes", &self.len_bytes())
            .field("n_tensors", &self.n_tensors)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gguf")
            .field("version", &self.version)
            .field("file_len", &self.file_len())
            .field("n_parts", &self.parts.len())
            .field("n_keys", &self.metadata.iter().count())
            .field("n_tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}
