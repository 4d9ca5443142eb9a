//! How a matrix lies on the device: [`PlaneLayout`], the sizes of its planes. Plain arithmetic, so that a
//! plan knows them where there is no GPU.

use exrail_tensor::DType;

/// Neighbours that may share a scale: a group of 128 weights in blocks of 32.
pub(crate) const GROUP: usize = 4;
/// [`GROUP`] as a power of two.
pub(crate) const GROUP_LOG2: u32 = 2;

/// Bytes that a block of 32 weights has in each plane; `supers` is of eight blocks.
pub(crate) struct PlaneBytes {
    pub(crate) low: usize,
    pub(crate) high: usize,
    pub(crate) scales: usize,
    pub(crate) supers: usize,
}

impl PlaneBytes {
    pub(crate) fn of(dtype: DType) -> PlaneBytes {
        let (low, high, scales, supers) = match dtype {
            DType::F32 => (4 * 32, 0, 0, 0),
            DType::F16 | DType::BF16 => (2 * 32, 0, 0, 0),
            DType::Q4_0 | DType::IQ4_NL | DType::MXFP4 => (16, 0, 2, 0),
            DType::Q4_1 => (16, 0, 4, 0),
            DType::Q5_0 => (16, 4, 2, 0),
            DType::Q5_1 => (16, 4, 4, 0),
            DType::Q8_0 => (32, 0, 2, 0),
            DType::Q2_K => (16, 0, 4, 4),
            DType::Q3_K | DType::Q4_K => (16, 0, 2, 4),
            DType::Q5_K => (16, 4, 2, 4),
            DType::Q6_K => (16, 8, 2, 4),
            DType::IQ4_XS => (16, 0, 1, 4),
        };
        PlaneBytes { low, high, scales, supers }
    }
}

/// Where the planes of a matrix are, in bytes from the first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlaneLayout {
    pub(crate) high: usize,
    pub(crate) scales: usize,
    pub(crate) supers: usize,
    /// Bytes of the scales of a row.
    pub(crate) scale_bytes: usize,
    /// Bytes of all planes.
    pub(crate) len: usize,
}

impl PlaneLayout {
    /// Of a matrix 2^`shared` neighbours of whose rows share a scale; `None`: more than a number holds.
    pub(crate) fn of(
        dtype: DType,
        (rows, columns): (usize, usize),
        shared: u32,
    ) -> Option<PlaneLayout> {
        let bytes = PlaneBytes::of(dtype);
        // Planes start on 256 bytes; only floats have rows of no whole blocks.
        let n_blocks = rows.checked_mul(columns)?.div_ceil(32);
        let plane = |n: usize, bytes: usize| n.checked_mul(bytes)?.checked_next_multiple_of(256);
        let n_scales = columns.div_ceil(32).div_ceil(1 << shared);
        let scale_bytes = n_scales.checked_mul(bytes.scales)?.checked_next_multiple_of(4)?;
        let high = plane(n_blocks, bytes.low)?;
        let scales = high.checked_add(plane(n_blocks, bytes.high)?)?;
        let supers = scales.checked_add(plane(rows, scale_bytes)?)?;
        let len = supers.checked_add(plane(n_blocks.div_ceil(8), bytes.supers)?)?;
        Some(PlaneLayout { high, scales, supers, scale_bytes, len })
    }
}

/// Whether neighbours of a matrix may share a scale; whether they do, only its blocks say.
pub(crate) fn may_share_scales(dtype: DType, columns: usize) -> bool {
    let begins_with_scales =
        matches!(dtype, DType::Q4_0 | DType::Q4_1 | DType::Q8_0 | DType::IQ4_NL);
    begins_with_scales && columns.is_multiple_of(32 * GROUP)
}
