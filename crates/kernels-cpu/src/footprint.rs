//! [`CpuFootprint`]: what the CPU allocates, by the arithmetic that it allocates by.

use crate::CpuOptions;
use crate::kv;
use crate::tile::TileKind;
use crate::weight::Packed;
use exrail_kernels::{Activation, Extent, Footprint, InputRounding, KvShape, Reserve, WeightShape};

/// Bytes that a process takes besides: the tokenizer, the stacks of threads, what operations keep, and
/// the rest of a region of weights (32 MiB).
const RESERVE_BYTES: usize = 96 << 20;

/// A [`crate::CpuBackend`] as far as sizes depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFootprint {
    pub(crate) activation: Activation,
    pub(crate) split_heads_from: usize,
}

impl CpuFootprint {
    /// That of a backend with these options.
    #[must_use]
    pub fn new(options: CpuOptions) -> CpuFootprint {
        let CpuOptions { activation, split_heads_from, .. } = options;
        CpuFootprint { activation, split_heads_from }
    }

    /// The tiles of a matrix.
    pub(crate) fn kind(self, shape: &WeightShape) -> TileKind {
        let large = shape.stored_bytes().is_some_and(|bytes| bytes >= self.split_heads_from);
        let splits = shape.head
            && self.activation == Activation::Int8
            && shape.rounding == InputRounding::Twice
            && large;
        if splits { TileKind::of_head(shape.dtype) } else { TileKind::of(shape.dtype) }
    }
}

impl Footprint for CpuFootprint {
    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn is_host(&self) -> bool {
        true
    }

    fn weight_bytes(&self, shape: &WeightShape) -> Option<Extent> {
        shape.stored_bytes()?;
        let packed = Packed::of(self.kind(shape), shape.rows, shape.columns)?;
        Some(Extent::exactly(packed.len_bytes()))
    }

    fn buffer_bytes(&self, len: usize) -> Option<usize> {
        len.checked_mul(size_of::<f32>())
    }

    fn kv_pool_bytes(&self, shape: &KvShape) -> Option<usize> {
        kv::pool_bytes(shape)
    }

    fn reserve(&self) -> Reserve {
        Reserve {
            bytes: RESERVE_BYTES,
            basis: "tokenizer, thread stacks, work of operations and the rest of a region of weights; \
                    an assumption, several times what bench records show beyond weights and KV pool of \
                    small models",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CpuBackend;
    use exrail_kernels::{Backend, KvDtype, WeightView};
    use exrail_tensor::DType;

    fn view(shape: WeightShape, bytes: &[u8]) -> WeightView<'_> {
        let WeightShape { dtype, rows, columns, rounding, head } = shape;
        WeightView { name: "w", dtype, rows, columns, bytes, rounding, head }
    }

    #[test]
    fn every_format_takes_what_its_footprint_says() {
        let options = CpuOptions { threads: Some(1), split_heads_from: 1, ..CpuOptions::default() };
        let backend = CpuBackend::new(options).unwrap();
        let mut n_split = 0;
        for dtype in DType::ALL {
            for (rows, columns) in [(1, 256), (17, 512), (48, 768), (0, 256)] {
                for head in [false, true] {
                    let rounding = InputRounding::Twice;
                    let shape = WeightShape { dtype, rows, columns, rounding, head };
                    let bytes = vec![0; shape.stored_bytes().unwrap()];
                    let weight = backend.weight(&view(shape, &bytes)).unwrap();
                    let planned = CpuFootprint::new(options).weight_bytes(&shape).unwrap();
                    assert_eq!(planned, Extent::exactly(weight.len_bytes()), "{shape:?}");
                    n_split += usize::from(weight.is_split());
                }
            }
        }
        assert_eq!(n_split, 3, "heads of Q8_0 with rows");
    }

    #[test]
    fn tiles_take_more_than_the_file_where_rows_are_padded() {
        // The mutation: a plan of the bytes in the file is too small.
        let (rounding, head) = (InputRounding::Once, false);
        let shape = WeightShape { dtype: DType::Q4_0, rows: 17, columns: 64, rounding, head };
        let planned = CpuFootprint::new(CpuOptions::default()).weight_bytes(&shape).unwrap();
        assert!(planned.least > shape.stored_bytes().unwrap());
        // Columns that are no whole blocks, and more than a number holds.
        for (rows, columns) in [(1, 33), (usize::MAX, 32)] {
            let shape = WeightShape { rows, columns, ..shape };
            assert_eq!(CpuFootprint::new(CpuOptions::default()).weight_bytes(&shape), None);
        }
    }

    #[test]
    fn a_pool_takes_what_its_footprint_says() {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Int8] {
            let shape = KvShape { n_layers: 2, n_kv_heads: 3, head_dim: 24, n_pages: 2, dtype };
            let pool = crate::kv::CpuKvPool::new(shape, || "cpu".to_owned()).unwrap();
            let planned = CpuFootprint::new(CpuOptions::default()).kv_pool_bytes(&shape);
            assert_eq!(planned, Some(pool.len_bytes()), "{dtype:?}");
        }
        let n_layers = usize::MAX;
        let dtype = KvDtype::F16;
        let shape = KvShape { n_layers, n_kv_heads: 3, head_dim: 24, n_pages: 2, dtype };
        assert_eq!(CpuFootprint::new(CpuOptions::default()).kv_pool_bytes(&shape), None);
    }
}
