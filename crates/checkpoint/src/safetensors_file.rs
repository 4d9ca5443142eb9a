//! [`SafetensorsFile`]: a safetensors file behind the same views as a GGUF file.
//!
//! The header is parsed by the crate `safetensors`, which checks offsets, overlaps and holes; this
//! module bounds what that parser may allocate and maps its types.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use exrail_tensor::DType;
use safetensors::{Dtype, SafeTensors};

use crate::bytes::FileBytes;
use crate::tensors::found;
use crate::{LoadError, RawTensor, RawType, TensorInfo, TensorView, Tensors};

/// The header of a single file with some thousand tensors has a few hundred kilobytes. Parsed, a
/// hostile header grows about eightfold.
const MAX_HEADER_BYTES: u64 = 4 << 20;
pub(crate) const SUPPORTED: &str = "F32, F16, BF16";

/// A parsed safetensors file. Tensors of integer types (position ids, packed weights) have no
/// [`TensorView`]; [`SafetensorsFile::raw`] gives what is stored.
#[derive(Clone)]
pub struct SafetensorsFile {
    bytes: FileBytes,
    tensors: HashMap<String, TensorEntry>,
}

#[derive(Clone)]
struct TensorEntry {
    stored: Dtype,
    /// `None` for integers.
    dtype: Option<DType>,
    shape: Vec<usize>,
    place: Range<usize>,
}

impl SafetensorsFile {
    /// Maps and parses the file at `path`. Tensor data is not read.
    ///
    /// The file must not be changed in place while the value lives; replace it by rename.
    ///
    /// # Errors
    /// When the file cannot be mapped, is not valid or holds a tensor of an unsupported float type.
    pub fn open(path: &Path) -> Result<SafetensorsFile, LoadError> {
        SafetensorsFile::from_bytes(FileBytes::map(path)?).map_err(|error| error.in_file(path))
    }

    /// Parses a file that is in memory already.
    ///
    /// # Errors
    /// When the bytes are not valid or hold a tensor of an unsupported float type.
    pub fn parse(bytes: impl Into<Arc<[u8]>>) -> Result<SafetensorsFile, LoadError> {
        SafetensorsFile::from_bytes(FileBytes::Owned(bytes.into()))
    }

    fn from_bytes(bytes: FileBytes) -> Result<SafetensorsFile, LoadError> {
        if let Some(length) = bytes.first_chunk::<8>() {
            let found = u64::from_le_bytes(*length);
            if found > MAX_HEADER_BYTES {
                let what = "length of the safetensors header".to_owned();
                return Err(LoadError::LimitExceeded { what, limit: MAX_HEADER_BYTES, found });
            }
        }
        let (header_len, metadata) = SafeTensors::read_metadata(&bytes)
            .map_err(|source| LoadError::Safetensors { source })?;
        // The data follows the eight bytes of the length and the header; `read_metadata` checked
        // that both and every tensor lie inside the file.
        let data_start = header_len + 8;
        let mut tensors = HashMap::new();
        for name in metadata.offset_keys() {
            let info = metadata.info(&name).expect("`offset_keys` lists the names of infos");
            let (stored, dtype) = (info.dtype, float_type(&name, info.dtype)?);
            let (start, end) = info.data_offsets;
            let place = data_start + start..data_start + end;
            tensors.insert(name, TensorEntry { stored, dtype, shape: info.shape.clone(), place });
        }
        Ok(SafetensorsFile { bytes, tensors })
    }

    /// The names of all floating-point tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.stored_names().filter(|&name| self.tensors[name].dtype.is_some())
    }

    /// The names of all tensors, those of integers too, sorted.
    pub fn stored_names(&self) -> impl Iterator<Item = &str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names.into_iter()
    }

    /// All floating-point tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.names().filter_map(|name| self.tensor(name))
    }

    /// The tensor called `name` as it is stored, if it is of a type that packed layers use.
    #[must_use]
    pub fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        let entry = self.tensors.get(name)?;
        #[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum that grows")]
        let dtype = match entry.stored {
            Dtype::F16 => RawType::F16,
            Dtype::I16 => RawType::I16,
            Dtype::I32 => RawType::I32,
            _ => return None,
        };
        Some(RawTensor { dtype, shape: &entry.shape, bytes: &self.bytes[entry.place.clone()] })
    }

    /// Name of the stored type of the tensor called `name`, such as `I32`.
    #[must_use]
    pub fn stored_type(&self, name: &str) -> Option<String> {
        self.tensors.get(name).map(|entry| format!("{:?}", entry.stored))
    }

    /// The floating-point tensor called `name`.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        Some(TensorView {
            name,
            dtype: entry.dtype?,
            shape: &entry.shape,
            bytes: Cow::Borrowed(&self.bytes[entry.place.clone()]),
        })
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.bytes.len() as u64
    }
}

impl Tensors for SafetensorsFile {
    fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        SafetensorsFile::tensor(self, name).as_ref().map(TensorInfo::from)
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        found(name, SafetensorsFile::tensor(self, name))
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(SafetensorsFile::names(self))
    }

    fn release(&self, name: &str) {
        if let Some(entry) = self.tensors.get(name) {
            self.bytes.forget(entry.place.clone());
        }
    }
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SafetensorsFile")
            .field("file_len", &self.bytes.len())
            .field("n_tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

/// Our name of a stored type; `None` for integers, which hold no weights.
fn float_type(tensor: &str, dtype: Dtype) -> Result<Option<DType>, LoadError> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum that grows: whatever it adds is not supported either"
    )]
    match dtype {
        Dtype::F32 => Ok(Some(DType::F32)),
        Dtype::F16 => Ok(Some(DType::F16)),
        Dtype::BF16 => Ok(Some(DType::BF16)),
        Dtype::BOOL
        | Dtype::U8
        | Dtype::I8
        | Dtype::U16
        | Dtype::I16
        | Dtype::U32
        | Dtype::I32
        | Dtype::U64
        | Dtype::I64 => Ok(None),
        other => Err(LoadError::UnsupportedDtype {
            tensor: tensor.to_owned(),
            found: format!("{other:?}"),
            supported: SUPPORTED,
        }),
    }
}
