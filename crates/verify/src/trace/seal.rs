//! The hash at the end of every line. It shows that a record was changed by accident or by hand; whoever can write
//! the log can write the hash as well, so it is no signature.

use crate::prompt::sha256_hex;

const FIELD: &str = ",\"record_sha256\":\"";
const DIGITS: usize = 64;

/// What a line says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seal {
    /// The hash is that of the line.
    Whole,
    /// It is that of another one.
    Broken {
        /// What the line hashes to.
        expected: String,
        /// What it says.
        found: String,
    },
    /// It does not end with one.
    Missing,
}

/// Adds `record_sha256`, the SHA-256 of `object` as it is, as its last field.
///
/// # Panics
/// `object` is not the text of a JSON object with a field.
#[must_use]
pub fn seal(object: &str) -> String {
    let open = object.strip_suffix('}').filter(|open| open.len() > 1);
    let open = open.expect("the text of an object with a field");
    format!("{open}{FIELD}{}\"}}", sha256_hex(object.as_bytes()))
}

/// Compares a line with the hash at its end.
#[must_use]
pub fn unseal(line: &str) -> Seal {
    let Some((open, digits)) = line
        .strip_suffix("\"}")
        .and_then(|rest| rest.split_at_checked(rest.len().checked_sub(DIGITS)?))
    else {
        return Seal::Missing;
    };
    let Some(open) = open.strip_suffix(FIELD) else { return Seal::Missing };
    let expected = sha256_hex(format!("{open}}}").as_bytes());
    if expected == digits {
        Seal::Whole
    } else {
        Seal::Broken { expected, found: digits.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_changed_anywhere_is_not_whole() {
        let line = seal("{\"a\":1,\"b\":\"é\"}");
        assert_eq!(unseal(&line), Seal::Whole);
        for at in 0..line.len() {
            let mut bytes = line.clone().into_bytes();
            bytes[at] ^= 1;
            if let Ok(changed) = String::from_utf8(bytes) {
                assert_ne!(unseal(&changed), Seal::Whole, "{changed}");
            }
        }
        for end in (0..line.len()).filter(|end| line.is_char_boundary(*end)) {
            assert_ne!(unseal(&line[..end]), Seal::Whole);
        }
    }

    #[test]
    fn a_line_without_a_seal_says_so() {
        for line in
            ["", "{}", "{\"a\":1}", "\"}", "é\"}", &format!("{{\"a\":\"{}\"}}", "0".repeat(64))]
        {
            assert_eq!(unseal(line), Seal::Missing, "{line}");
        }
    }
}
