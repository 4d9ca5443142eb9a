//! The character map of a sentencepiece model: which characters are replaced by which text.
//!
//! The format is `precompiled_charsmap` of google/sentencepiece (`normalizer.cc`,
//! `Normalizer::DecodePrecompiledCharsMap`): the length of a trie in bytes as a little-endian
//! `u32`, the trie as a double array of darts-clone, and the replacements, each ended by NUL.

use crate::TokenizerError;

/// The longest replacement in use (U+FDFA in NFKC) has 33 bytes; a longer one than this could
/// make a text grow beyond memory.
const MAX_REPLACEMENT_BYTES: usize = 255;
/// Set in units that hold a value, and so never equal to a byte.
const VALUE_BIT: u32 = 1 << 31;

/// A checked character map.
#[derive(Debug)]
pub(crate) struct CharsMap {
    units: Vec<u32>,
    replacements: String,
}

impl CharsMap {
    /// Reads a map and proves that no text can lead out of it.
    pub(crate) fn parse(blob: &[u8]) -> Result<CharsMap, TokenizerError> {
        let bad = |what| TokenizerError::BadCharsMap { what };
        let (len, rest) = blob.split_first_chunk().ok_or(bad("no length of the trie"))?;
        let trie_bytes = u32::from_le_bytes(*len) as usize;
        if trie_bytes == 0 || !trie_bytes.is_multiple_of(4) || trie_bytes > rest.len() {
            return Err(bad("the trie does not fit"));
        }
        let (trie, replacements) = rest.split_at(trie_bytes);
        let units: Vec<u32> =
            trie.as_chunks().0.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        let replacements = String::from_utf8(replacements.to_vec())
            .map_err(|_| bad("the replacements are not UTF-8"))?;
        if !replacements.ends_with('\0') {
            return Err(bad("the last replacement is not ended"));
        }
        if replacements.split('\0').any(|it| it.len() > MAX_REPLACEMENT_BYTES) {
            return Err(bad("a replacement of more than 255 bytes"));
        }
        for (at, &unit) in units.iter().enumerate().filter(|(_, unit)| *unit & VALUE_BIT == 0) {
            let base = at ^ offset(unit);
            if base | 0xFF >= units.len() {
                return Err(bad("a node outside the trie"));
            }
            let value = (units[base] & !VALUE_BIT) as usize;
            if has_leaf(unit)
                && !(value < replacements.len() && replacements.is_char_boundary(value))
            {
                return Err(bad("a value outside the replacements"));
            }
        }
        if units[0] & VALUE_BIT != 0 {
            return Err(bad("no root"));
        }
        Ok(CharsMap { units, replacements })
    }

    /// Bytes of the longest replacement.
    pub(crate) fn longest_replacement(&self) -> usize {
        self.replacements.split('\0').map(str::len).max().unwrap_or(0)
    }

    /// The replacement for the longest start of `text` that has one, and the bytes that it takes.
    pub(crate) fn longest(&self, text: &str) -> Option<(&str, usize)> {
        let mut at = offset(self.units[0]);
        let mut found = None;
        for (index, byte) in text.bytes().enumerate() {
            at ^= usize::from(byte);
            let unit = self.units[at];
            if unit & (VALUE_BIT | 0xFF) != u32::from(byte) {
                break;
            }
            at ^= offset(unit);
            if has_leaf(unit) {
                found = Some(((self.units[at] & !VALUE_BIT) as usize, index + 1));
            }
        }
        // A hostile map may end inside a character; it is then not a match.
        let (value, consumed) = found.filter(|it| text.is_char_boundary(it.1))?;
        Some((self.replacements[value..].split('\0').next().unwrap_or_default(), consumed))
    }
}

/// Where the children of a unit are, relative to it.
fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize
}

fn has_leaf(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One key, "a", with the value 0.
    fn blob(replacements: &str) -> Vec<u8> {
        let mut units = vec![0_u32; 512];
        let a = usize::from(b'a');
        units[0] = 256 << 10;
        units[256 ^ a] = u32::from(b'a') | 1 << 8 | (u32::from(b'a') ^ 1) << 10;
        units[256 ^ a ^ (a ^ 1)] = VALUE_BIT;
        let mut blob = 2048_u32.to_le_bytes().to_vec();
        blob.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
        blob.extend(replacements.as_bytes());
        blob
    }

    #[test]
    fn a_key_is_replaced_and_the_rest_left() {
        let map = CharsMap::parse(&blob("xy\0")).unwrap();
        assert_eq!(map.longest("ab"), Some(("xy", 1)));
        assert_eq!(map.longest("ba"), None);
        assert_eq!(map.longest(""), None);
    }

    #[test]
    fn damaged_maps_are_refused() {
        let whole = blob("xy\0");
        for end in [0, 3, 4, 100, 2052, 2054] {
            assert!(CharsMap::parse(&whole[..end]).is_err(), "{end}");
        }
        assert!(CharsMap::parse(&blob(&format!("{}\0", "x".repeat(256)))).is_err());
        let mut outside = whole;
        outside[4..8].copy_from_slice(&(600_u32 << 10).to_le_bytes());
        assert!(CharsMap::parse(&outside).is_err());
    }
}
