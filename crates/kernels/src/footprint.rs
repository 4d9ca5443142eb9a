//! [`Footprint`]: what a device would allocate, known without the device.

use exrail_tensor::DType;

use crate::{InputRounding, KvShape, WeightView};

/// A matrix as far as its size on a device depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightShape {
    /// Block format in the checkpoint.
    pub dtype: DType,
    /// Output features N.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// What its activations tolerate.
    pub rounding: InputRounding,
    /// Whether it is the head of a decoder.
    pub head: bool,
}

impl WeightShape {
    /// That of a view, whose bytes do not matter.
    #[must_use]
    pub fn of(view: &WeightView<'_>) -> WeightShape {
        let WeightView { dtype, rows, columns, rounding, head, .. } = *view;
        WeightShape { dtype, rows, columns, rounding, head }
    }

    /// Bytes in the checkpoint; `None`: columns that are no whole blocks, or more than a number holds.
    #[must_use]
    pub fn stored_bytes(&self) -> Option<usize> {
        self.dtype.row_bytes(self.columns)?.checked_mul(self.rows)
    }
}

/// Bytes that are known up to what only the data says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// No less.
    pub least: usize,
    /// No more.
    pub most: usize,
}

impl Extent {
    /// A number of bytes that is known.
    #[must_use]
    pub fn exactly(bytes: usize) -> Extent {
        Extent { least: bytes, most: bytes }
    }

    /// Both together; stays at the largest number.
    #[must_use]
    pub fn and(self, other: Extent) -> Extent {
        Extent {
            least: self.least.saturating_add(other.least),
            most: self.most.saturating_add(other.most),
        }
    }
}

/// What a device allocates for what a model puts there. An implementation is built of the arithmetic
/// that the device allocates by, so that the two cannot differ.
pub trait Footprint: Send + Sync + 'static {
    /// Name of the kind of device, such as `cpu`.
    fn name(&self) -> String;

    /// Whether what it allocates is taken from the host's memory.
    fn is_host(&self) -> bool;

    /// Bytes of a matrix that [`crate::Backend::weight`] prepared; `None`: more than a number holds, or
    /// columns that are no whole blocks.
    fn weight_bytes(&self, shape: &WeightShape) -> Option<Extent>;

    /// Bytes of a [`crate::Backend::buffer`] of `len` values; `None`: more than a number holds.
    fn buffer_bytes(&self, len: usize) -> Option<usize>;

    /// Bytes of a [`crate::Backend::kv_pool`]; `None`: more than a number holds.
    fn kv_pool_bytes(&self, shape: &KvShape) -> Option<usize>;

    /// Bytes that are taken besides, and what for and how that is known.
    fn reserve(&self) -> Reserve;
}

/// What a device takes besides weights, activations and pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserve {
    /// Bytes.
    pub bytes: usize,
    /// What they are for, and how they are known.
    pub basis: &'static str,
}
