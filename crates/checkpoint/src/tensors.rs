//! [`TensorView`] and trait [`Tensors`]: named matrices, wherever they are stored.

use std::fmt;

use exrail_tensor::{DType, dequantize};

use crate::LoadError;

/// A tensor of a model file, not copied.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Storage format of the elements.
    pub dtype: DType,
    /// Dimensions, outermost first: a matrix is `[rows, columns]`, and a row is contiguous.
    pub shape: &'a [usize],
    /// The elements; their count is what `dtype` and `shape` imply.
    pub bytes: &'a [u8],
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
        match dequantize(self.dtype, self.bytes, &mut values) {
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

/// Something that holds tensors by name: a GGUF file, a safetensors file, or a test's map.
pub trait Tensors {
    /// The tensor called `name`.
    fn tensor(&self, name: &str) -> Option<TensorView<'_>>;

    /// The tensor called `name`, which must have exactly `shape` (outermost first).
    ///
    /// # Errors
    /// [`LoadError::MissingTensor`] or [`LoadError::WrongShape`].
    fn require(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, LoadError> {
        let Some(view) = self.tensor(name) else {
            let (tensor, expected) = (name.to_owned(), shape.to_vec());
            return Err(LoadError::MissingTensor { tensor, expected });
        };
        if view.shape != shape {
            return Err(LoadError::WrongShape {
                tensor: name.to_owned(),
                expected: shape.to_vec(),
                found: view.shape.to_vec(),
            });
        }
        Ok(view)
    }
}
