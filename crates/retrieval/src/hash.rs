//! Hex sha256, the only hash this crate writes.

use std::ops::Range;

use sha2::{Digest, Sha256};

/// The id of the snippet at `span`, a byte range of the canonical text of a document's revision (G-14): whoever has a
/// record can compute it again.
#[must_use]
pub fn snippet_id(doc_id: &str, rev: &str, span: Range<usize>) -> String {
    short_id(&[doc_id, rev, &span.start.to_string(), &span.end.to_string()])
}

/// Lower-case hex sha256 of `bytes`.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        write!(hex, "{byte:02x}").expect("writing to a string cannot fail");
    }
    hex
}

/// First 16 hex digits of the sha256 over `parts`, each followed by a zero byte, so that moving a
/// character from one part to the next changes the value.
pub(crate) fn short_id(parts: &[&str]) -> String {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(part.as_bytes());
        bytes.push(0);
    }
    let mut id = sha256_hex(&bytes);
    id.truncate(16);
    id
}
