//! [`CudaFootprint`]: what a GPU allocates, by the arithmetic that it allocates by. Needs neither a GPU
//! nor feature `cuda`.

use exrail_kernels::{Extent, Footprint, KvDtype, KvShape, PAGE_TOKENS, Reserve, WeightShape};

use crate::planes::{GROUP_LOG2, PlaneLayout, may_share_scales};

/// The driver rounds every allocation up to this, or more.
const ALLOCATED: usize = 512;
/// What operations allocate when they first run, at most: runs of attention (64 MiB), weights as halves
/// (128 MiB, on compute capability 9.0), rounded activations and uploads (64 MiB), graphs and what the
/// driver's pool rounds up to (64 MiB).
const WORK_BYTES: usize = 320 << 20;
/// What a process takes before it asks for anything: the driver's context and the kernels.
const CONTEXT_BYTES: usize = 512 << 20;

/// A [`Footprint`] of the GPU backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaFootprint {
    /// Whether the device is open: then its free memory is what the context left.
    pub is_open: bool,
}

impl Footprint for CudaFootprint {
    fn name(&self) -> String {
        "cuda".to_owned()
    }

    fn is_host(&self) -> bool {
        false
    }

    /// Up to blocks whose neighbours share their scales, which are then kept once.
    fn weight_bytes(&self, shape: &WeightShape) -> Option<Extent> {
        shape.stored_bytes()?;
        let WeightShape { dtype, rows, columns, .. } = *shape;
        let len = |shared| allocated(PlaneLayout::of(dtype, (rows, columns), shared)?.len);
        let most = len(0)?;
        let least = if may_share_scales(dtype, columns) { len(GROUP_LOG2)? } else { most };
        Some(Extent { least, most })
    }

    fn buffer_bytes(&self, len: usize) -> Option<usize> {
        allocated(len.checked_mul(4)?)
    }

    fn kv_pool_bytes(&self, shape: &KvShape) -> Option<usize> {
        let n_entries = shape.n_pages.checked_mul(entries_of_page(shape)?)?;
        let (element_bytes, scale_bytes) = entry_bytes(shape);
        let elements = allocated(n_entries.checked_mul(element_bytes)?)?;
        elements.checked_add(allocated(n_entries.checked_mul(scale_bytes)?)?)
    }

    fn reserve(&self) -> Reserve {
        if self.is_open {
            return Reserve {
                bytes: WORK_BYTES,
                basis: "work of operations by their limits, graphs and rounding by assumption; the \
                        driver's context is not in what is free",
            };
        }
        Reserve {
            bytes: WORK_BYTES + CONTEXT_BYTES,
            basis: "work of operations by their limits (320 MiB with graphs and rounding by \
                    assumption), and 512 MiB for the driver's context and the kernels, assumed because \
                    no device was asked",
        }
    }
}

/// Bytes that the driver takes for an allocation.
fn allocated(bytes: usize) -> Option<usize> {
    bytes.max(1).checked_next_multiple_of(ALLOCATED)
}

/// Keys and values of one page, all layers and heads; `None`: more than a number holds.
pub(crate) fn entries_of_page(shape: &KvShape) -> Option<usize> {
    let factors = [shape.n_layers, shape.n_kv_heads, PAGE_TOKENS];
    factors.into_iter().try_fold(2, usize::checked_mul)
}

/// Bytes of the elements of a key or a value, and of its scale.
pub(crate) fn entry_bytes(shape: &KvShape) -> (usize, usize) {
    match shape.dtype {
        KvDtype::F32 => (4 * shape.head_dim, 0),
        KvDtype::F16 => (2 * shape.head_dim, 0),
        KvDtype::Int8 => (shape.head_dim, 4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exrail_kernels::InputRounding;
    use exrail_tensor::DType;

    const FOOTPRINT: CudaFootprint = CudaFootprint { is_open: true };

    fn shape(dtype: DType, rows: usize, columns: usize) -> WeightShape {
        WeightShape { dtype, rows, columns, rounding: InputRounding::Once, head: false }
    }

    /// Bits a weight of a large matrix, least and most.
    fn bits(dtype: DType) -> (f64, f64) {
        let (rows, columns) = (4096, 11_008);
        let Extent { least, most } = FOOTPRINT.weight_bytes(&shape(dtype, rows, columns)).unwrap();
        let bits = |bytes: usize| 8.0 * bytes as f64 / (rows * columns) as f64;
        (bits(least), bits(most))
    }

    #[test]
    fn bits_of_a_weight_are_those_of_the_planes() {
        let expected = [
            (DType::F32, 32.0, 32.0),
            (DType::F16, 16.0, 16.0),
            (DType::BF16, 16.0, 16.0),
            // 4 bits and a half's scale for 128 or for 32 weights.
            (DType::Q4_0, 4.125, 4.5),
            (DType::IQ4_NL, 4.125, 4.5),
            (DType::MXFP4, 4.5, 4.5),
            (DType::Q4_1, 4.25, 5.0),
            (DType::Q5_0, 5.5, 5.5),
            (DType::Q5_1, 6.0, 6.0),
            (DType::Q8_0, 8.125, 8.5),
            (DType::Q2_K, 5.125, 5.125),
            (DType::Q3_K, 4.625, 4.625),
            (DType::Q4_K, 4.625, 4.625),
            (DType::Q5_K, 5.625, 5.625),
            (DType::Q6_K, 6.625, 6.625),
            (DType::IQ4_XS, 4.375, 4.375),
        ];
        assert_eq!(expected.len(), DType::ALL.len());
        for (dtype, least, most) in expected {
            let found = bits(dtype);
            let close = |a: f64, b: f64| (a - b).abs() < 1e-3;
            assert!(close(found.0, least) && close(found.1, most), "{dtype}: {found:?}");
        }
    }

    #[test]
    fn planes_follow_each_other_on_256_bytes_and_hold_their_blocks() {
        for dtype in DType::ALL {
            for (rows, columns) in [(0, 256), (1, 256), (17, 512), (129, 768)] {
                let n_blocks = rows * columns / 32;
                for shared in [0, GROUP_LOG2] {
                    let planes = PlaneLayout::of(dtype, (rows, columns), shared).unwrap();
                    let unit = crate::planes::PlaneBytes::of(dtype);
                    let starts = [0, planes.high, planes.scales, planes.supers, planes.len];
                    let needed = [
                        n_blocks * unit.low,
                        n_blocks * unit.high,
                        rows * planes.scale_bytes,
                        n_blocks.div_ceil(8) * unit.supers,
                    ];
                    for (pair, needed) in starts.windows(2).zip(needed) {
                        assert!(pair[0].is_multiple_of(256) && pair[1] - pair[0] >= needed);
                        assert!(pair[1] - pair[0] < needed + 256, "{dtype} {rows}x{columns}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_no_number_holds_and_no_whole_block_is_nothing() {
        assert_eq!(FOOTPRINT.weight_bytes(&shape(DType::Q4_0, usize::MAX, 32)), None);
        assert_eq!(FOOTPRINT.weight_bytes(&shape(DType::Q4_0, 1, 33)), None);
        assert_eq!(FOOTPRINT.buffer_bytes(usize::MAX), None);
    }

    #[test]
    fn a_pool_takes_its_pages_and_the_scales_of_int8() {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Int8] {
            let shape = KvShape { n_layers: 2, n_kv_heads: 3, head_dim: 64, n_pages: 5, dtype };
            let planned = FOOTPRINT.kv_pool_bytes(&shape).unwrap();
            let pages = shape.page_bytes() * shape.n_pages;
            assert!((pages..pages + 2 * ALLOCATED).contains(&planned), "{dtype:?}: {planned}");
        }
    }

    #[test]
    fn a_device_that_was_not_asked_needs_room_for_its_context() {
        let closed = CudaFootprint { is_open: false }.reserve();
        assert_eq!(closed.bytes, FOOTPRINT.reserve().bytes + CONTEXT_BYTES);
    }
}
