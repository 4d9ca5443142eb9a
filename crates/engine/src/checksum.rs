//! A checksum that keeps pace with copying: for bits that flip, not for somebody who forges.

/// The prime of FNV-1a.
const PRIME: u64 = 0x0100_0000_01b3;
/// Words that are hashed side by side, so that multiplications overlap.
const LANES: usize = 4;

/// FNV-1a over 64-bit words in four lanes, folded. Each step is a bijection of the lane and of the word,
/// so that bytes that differ within one word always have another sum.
#[must_use]
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    let mut lanes = [0xcbf2_9ce4_8422_2325_u64, 1, 2, 3];
    let (blocks, rest) = bytes.as_chunks::<{ 8 * LANES }>();
    let mut tail = [0; 8 * LANES];
    tail[..rest.len()].copy_from_slice(rest);
    for block in blocks.iter().chain([&tail]) {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            *lane = step(*lane, u64::from_le_bytes(*word));
        }
    }
    lanes.into_iter().fold(bytes.len() as u64, step)
}

fn step(hash: u64, word: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(PRIME);
    hash ^ hash >> 29
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_bit_and_any_other_length_changes_it() {
        for len in [0, 1, 31, 32, 33, 100] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 37 % 251) as u8).collect();
            let sum = checksum(&bytes);
            for bit in 0..8 * len {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(checksum(&flipped), sum, "bit {bit} of {len} bytes");
            }
            let longer = [&bytes[..], &[0]].concat();
            assert_ne!(checksum(&longer), sum, "a zero behind {len} bytes");
        }
    }
}
