//! The vectors file: a checked header, then f32 little endian, row after row.
//!
//! ```text
//! 0   8  magic "EXRVEC1\n"
//! 8   4  dim, u32 little endian
//! 12  4  zero
//! 16  8  count, u64 little endian
//! 24  …  count · dim values (count, dim)
//! ```

use std::path::Path;

use crate::RetrievalError;

const MAGIC: &[u8; 8] = b"EXRVEC1\n";
const HEADER_BYTES: usize = 24;

/// The bytes of the file for `values` (count, dim).
pub(crate) fn to_bytes(dim: usize, values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + values.len() * 4);
    bytes.extend_from_slice(MAGIC);
    let header_dim = u32::try_from(dim).expect("a contract's dim is at most 65536");
    bytes.extend_from_slice(&header_dim.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&((values.len() / dim) as u64).to_le_bytes());
    for value in values {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// The values (count, dim) of a file that must hold `count` vectors of length `dim`.
pub(crate) fn from_bytes(
    path: &Path,
    bytes: &[u8],
    dim: usize,
    count: usize,
) -> Result<Vec<f32>, RetrievalError> {
    let corrupt = |what: &str, expected: u64, found: u64| RetrievalError::Corrupt {
        path: path.to_owned(),
        expected: format!("{what} {expected}"),
        found: found.to_string(),
    };
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(corrupt("header bytes", HEADER_BYTES as u64, bytes.len() as u64));
    };
    let [magic, dims, counts] = [&header[..8], &header[8..16], &header[16..]];
    if magic != MAGIC {
        return Err(corrupt("magic", little_endian(MAGIC), little_endian(magic)));
    }
    // Eight bytes at once, so that the four zero bytes are checked too.
    if little_endian(dims) != dim as u64 {
        return Err(corrupt("dim", dim as u64, little_endian(dims)));
    }
    if little_endian(counts) != count as u64 {
        return Err(corrupt("count", count as u64, little_endian(counts)));
    }
    let expected = (dim as u64).saturating_mul(count as u64).saturating_mul(4);
    if body.len() as u64 != expected {
        return Err(corrupt("value bytes", expected, body.len() as u64));
    }
    let (values, _) = body.as_chunks::<4>();
    Ok(values.iter().map(|value| f32::from_le_bytes(*value)).collect())
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

/// Σᵢ aᵢ·bᵢ in f32 over eight interleaved sums, the same on every machine.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_lanes, a_tail) = a.as_chunks::<8>();
    let (b_lanes, b_tail) = b.as_chunks::<8>();
    let mut sums = [0f32; 8];
    for (x, y) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(x, y)| x * y).sum();
    sums.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_reads_back_and_every_damage_is_refused() {
        let values: Vec<f32> = (0..33u8).map(f32::from).collect();
        let bytes = to_bytes(11, &values);
        let read = |bytes: &[u8], dim, count| from_bytes(Path::new("v"), bytes, dim, count);
        assert_eq!(read(&bytes, 11, 3).unwrap(), values);
        assert!(read(&bytes, 3, 11).is_err());
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len], 11, 3).is_err(), "{len}");
        }
        for at in 0..HEADER_BYTES {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert!(read(&damaged, 11, 3).is_err(), "{at}");
        }
    }

    #[test]
    fn dot_has_its_tail() {
        let values: Vec<f32> = (0..11u8).map(f32::from).collect();
        assert_eq!(dot(&values, &values).to_bits(), 385f32.to_bits());
    }
}
