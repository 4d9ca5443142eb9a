//! [`TensorView`] and trait [`Tensors`]: named matrices, wherever they are stored.

use std::borrow::Cow;
use std::fmt;

use exrail_tensor::{DType, dequantize};

use crate::LoadError;

/// A tensor of a model file: in place, or decoded from what is stored.
#[derive(Clone)]
pub struct TensorView<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Storage format of the elements.
    pub dtype: DType,
    /// Dimensions, outermost first: a matrix is `[rows, columns]`, and a row is contiguous.
    pub shape: &'a [usize],
    /// The elements; their count is what `dtype` and `shape` imply.
    pub bytes: Cow<'a, [u8]>,
}

impl TensorView<'_> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether a dimension is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// All elements as `f32`, in order.
    ///
    /// # Errors
    /// When the bytes do not fit the shape, which no view made by this crate allows.
    pub fn to_f32(&self) -> Result<Vec<f32>, LoadError> {
        let mut values = vec![0.0; self.len()];
        match dequantize(self.dtype, &self.bytes, &mut values) {
            Ok(()) => Ok(values),
            Err(source) => Err(LoadError::BadTensor { tensor: self.name.to_owned(), source }),
        }
    }
}

impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {} {:?} ({} bytes)", self.name, self.dtype, self.shape, self.bytes.len())
    }
}

/// What a tensor is, without its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Name that [`Tensors`] knows it by.
    pub name: &'a str,
    /// Format in which [`Tensors::tensor`] gives the elements.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
}

impl TensorInfo<'_> {
    /// Bytes of the elements in their format.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        let (columns, outer) = self.shape.split_last().unwrap_or((&1, &[]));
        self.dtype.row_bytes(*columns).unwrap_or(0) * outer.iter().product::<usize>()
    }
}

/// Something that holds tensors by name: a GGUF file, a folder of safetensors, or a test's map.
pub trait Tensors {
    /// What the tensor called `name` is. Costs nothing.
    fn info(&self, name: &str) -> Option<TensorInfo<'_>>;

    /// The tensor called `name`; elements that are stored otherwise are decoded now.
    ///
    /// # Errors
    /// [`LoadError::MissingTensor`], or stored elements that cannot be decoded.
    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError>;

    /// The names of all tensors.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_>;

    /// The caller has what it needs of the tensor called `name`, so that memory may be given back
    /// that only holds its stored elements. It can still be read.
    fn release(&self, _name: &str) {}

    /// What the tensor called `name` is, which must have exactly `shape` (outermost first).
    ///
    /// # Errors
    /// [`LoadError::MissingTensor`] or [`LoadError::WrongShape`].
    fn require_info(&self, name: &str, shape: &[usize]) -> Result<TensorInfo<'_>, LoadError> {
        let Some(info) = self.info(name) else {
            let (tensor, expected) = (name.to_owned(), shape.to_vec());
            return Err(LoadError::MissingTensor { tensor, expected });
        };
        if info.shape != shape {
            return Err(LoadError::WrongShape {
                tensor: name.to_owned(),
                expected: shape.to_vec(),
                found: info.shape.to_vec(),
            });
        }
        Ok(info)
    }

    /// The tensor called `name`, which must have exactly `shape` (outermost first).
    ///
    /// # Errors
    /// As [`Tensors::require_info`] and [`Tensors::tensor`].
    fn require(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, LoadError> {
        self.require_info(name, shape)?;
        self.tensor(name)
    }
}

/// [`Tensors::info`] of a tensor that is stored as it is given.
impl<'a> From<&TensorView<'a>> for TensorInfo<'a> {
    fn from(view: &TensorView<'a>) -> TensorInfo<'a> {
        TensorInfo { name: view.name, dtype: view.dtype, shape: view.shape }
    }
}

/// [`Tensors::tensor`] of a map that either has it or not.
pub(crate) fn found<'a>(
    name: &str,
    view: Option<TensorView<'a>>,
) -> Result<TensorView<'a>, LoadError> {
    view.ok_or_else(|| LoadError::MissingTensor { tensor: name.to_owned(), expected: Vec::new() })
}
