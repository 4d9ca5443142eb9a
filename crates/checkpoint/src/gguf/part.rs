//! [`Part`]: one GGUF file, which is a model or a part of one.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use exrail_tensor::{DType, ggml_type_name};

use crate::bytes::FileBytes;
use crate::reader::Reader;
use crate::{LoadError, Metadata};

const MAGIC: [u8; 4] = *b"GGUF";
/// Thirty thousand tensors are a very large mixture of experts.
const MAX_TENSORS: u64 = 1 << 16;
/// `GGML_MAX_NAME`.
const MAX_TENSOR_NAME_BYTES: u64 = 64;
/// `GGML_MAX_DIMS`.
const MAX_DIMENSIONS: u32 = 4;
/// `GGUF_DEFAULT_ALIGNMENT`.
const DEFAULT_ALIGNMENT: u32 = 32;
/// Two megabytes are the largest page that a file would reasonably be aligned to.
const MAX_ALIGNMENT: u32 = 1 << 21;
const SUPPORTED: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, \
     Q6_K, IQ4_NL, IQ4_XS, MXFP4";

/// A parsed file. Every tensor's bytes lie inside it, on its alignment, and share no byte with
/// another tensor.
pub(super) struct Part {
    pub(super) bytes: FileBytes,
    pub(super) version: u32,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorEntry>,
}

#[derive(Clone)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    pub(super) dtype: DType,
    /// Outermost first.
    pub(super) shape: Vec<usize>,
    /// Place in the file.
    pub(super) place: Range<usize>,
}

impl Part {
    /// Maps and parses the file at `path`. Tensor data is not read.
    pub(super) fn open(path: &Path) -> Result<Part, LoadError> {
        Part::parse(FileBytes::map(path)?).map_err(|error| error.in_file(path))
    }

    pub(super) fn parse(bytes: FileBytes) -> Result<Part, LoadError> {
        let mut reader = Reader::new(&bytes);
        let found: [u8; 4] = reader.array("magic")?;
        if found != MAGIC {
            return Err(LoadError::BadMagic { format: "GGUF", expected: MAGIC, found });
        }
        let version = reader.u32("version")?;
        if version != 2 && version != 3 {
            return Err(LoadError::UnsupportedVersion { found: version });
        }
        let n_tensors = reader.u64("number of tensors")?;
        if n_tensors > MAX_TENSORS {
            let (what, limit) = ("number of tensors".to_owned(), MAX_TENSORS);
            return Err(LoadError::LimitExceeded { what, limit, found: n_tensors });
        }
        let metadata = Metadata::read(&mut reader)?;
        let alignment = alignment(&metadata)?;

        let mut stored = Vec::new();
        let mut names = HashSet::new();
        for i in 0..n_tensors {
            let tensor = StoredTensor::read(&mut reader, i, alignment)?;
            if !names.insert(tensor.name.clone()) {
                return Err(LoadError::DuplicateTensor { tensor: tensor.name });
            }
            stored.push(tensor);
        }
        let data_start = reader.at().next_multiple_of(alignment as usize);
        let tensors = stored
            .into_iter()
            .map(|tensor| tensor.place(data_start, bytes.len()))
            .collect::<Result<Vec<_>, _>>()?;
        refuse_overlap(&tensors)?;
        Ok(Part { bytes, version, metadata, tensors })
    }
}

fn alignment(metadata: &Metadata) -> Result<u32, LoadError> {
    let key = "general.alignment";
    let alignment = metadata.u32(key)?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        let expected = format!("a power of two up to {MAX_ALIGNMENT}");
        return Err(LoadError::bad_value(key, expected, alignment));
    }
    Ok(alignment)
}

/// A tensor info whose offset is not yet checked against the file.
struct StoredTensor {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    n_bytes: usize,
    offset: u64,
}

impl StoredTensor {
    fn read(
        reader: &mut Reader<'_>,
        number: u64,
        alignment: u32,
    ) -> Result<StoredTensor, LoadError> {
        let what = format!("name of tensor {number}");
        let name = reader.string(&what, MAX_TENSOR_NAME_BYTES)?;
        if name.is_empty() {
            return Err(LoadError::EmptyName { what });
        }
        let what = format!("info of tensor `{name}`");
        let n_dimensions = reader.u32(&what)?;
        if !(1..=MAX_DIMENSIONS).contains(&n_dimensions) {
            let key = format!("number of dimensions of tensor `{name}`");
            return Err(LoadError::bad_value(&key, "1 to 4", n_dimensions));
        }
        let mut dimensions = Vec::new();
        for _ in 0..n_dimensions {
            dimensions.push(reader.u64(&what)?);
        }
        dimensions.reverse();
        let type_id = reader.u32(&what)?;
        let Some(dtype) = DType::from_ggml(type_id) else {
            let found = ggml_type_name(type_id).map_or_else(|| type_id.to_string(), str::to_owned);
            return Err(LoadError::UnsupportedDtype { tensor: name, found, supported: SUPPORTED });
        };
        let offset = reader.u64(&what)?;
        let alignment = u64::from(alignment);
        if !offset.is_multiple_of(alignment) {
            return Err(LoadError::Misaligned { tensor: name, offset, alignment });
        }
        match checked_shape(dtype, &dimensions) {
            Ok((shape, n_bytes)) => Ok(StoredTensor { name, dtype, shape, n_bytes, offset }),
            Err(problem) => Err(LoadError::BadShape { tensor: name, shape: dimensions, problem }),
        }
    }

    /// Turns the offset into a place in the file.
    fn place(self, data_start: usize, file_len: usize) -> Result<TensorEntry, LoadError> {
        let start = usize::try_from(self.offset).ok().and_then(|at| data_start.checked_add(at));
        let end = start.and_then(|start| start.checked_add(self.n_bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => Ok(TensorEntry {
                name: self.name,
                dtype: self.dtype,
                shape: self.shape,
                place: start..end,
            }),
            _ => Err(LoadError::Truncated {
                what: format!("tensor `{}` at data offset {}", self.name, self.offset),
                expected: self.n_bytes as u64,
                found: (file_len as u64)
                    .saturating_sub(data_start as u64)
                    .saturating_sub(self.offset),
            }),
        }
    }
}

/// The shape as `usize` and the bytes that it takes, or what is wrong with it. The element count
/// fits in `isize`, so that no later product of dimensions overflows.
fn checked_shape(dtype: DType, shape: &[u64]) -> Result<(Vec<usize>, usize), &'static str> {
    if shape.contains(&0) {
        return Err("a zero dimension");
    }
    let too_large = "more elements than memory can hold";
    let shape: Vec<usize> = shape
        .iter()
        .map(|&n| usize::try_from(n).map_err(|_| too_large))
        .collect::<Result<_, _>>()?;
    let elements = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    // Values are expanded to f32, so four bytes per element must be addressable.
    let Some(_) = elements.filter(|&n| n <= isize::MAX as usize / 4) else {
        return Err(too_large);
    };
    let columns = shape[shape.len() - 1];
    let row_bytes = dtype.row_bytes(columns).ok_or("a row that is not a whole number of blocks")?;
    let rows: usize = shape[..shape.len() - 1].iter().product();
    let n_bytes = rows.checked_mul(row_bytes).ok_or(too_large)?;
    Ok((shape, n_bytes))
}

fn refuse_overlap(tensors: &[TensorEntry]) -> Result<(), LoadError> {
    let mut by_start: Vec<&TensorEntry> = tensors.iter().collect();
    by_start.sort_by_key(|entry| entry.place.start);
    for pair in by_start.windows(2) {
        if pair[1].place.start < pair[0].place.end {
            let (first, second) = (pair[0].name.clone(), pair[1].name.clone());
            return Err(LoadError::Overlap { first, second });
        }
    }
    Ok(())
}
