//! Text preparation before embedding (guardrails §1.1.1).

use unicode_normalization::UnicodeNormalization;

/// Name of the rules of [`prepare`]; part of the collection's contract. Change it with them.
pub const PREPARATION: &str = "nfc-nocontrol-collapse-1";

/// Text as the encoder gets it: NFC, no zero-width or bidi controls, every run of white space one
/// space, none at the ends. Case is kept. Idempotent.
#[must_use]
pub fn prepare(text: &str) -> String {
    let mut prepared = String::with_capacity(text.len());
    let mut gap = false;
    // Controls go first: one between a letter and its accent would keep NFC from joining them.
    for character in text.chars().filter(|character| !is_invisible(*character)).nfc() {
        if character.is_whitespace() {
            gap = !prepared.is_empty();
            continue;
        }
        if gap {
            prepared.push(' ');
            gap = false;
        }
        prepared.push(character);
    }
    prepared
}

/// Zero-width characters and bidi controls: they change how text looks or splits, not what it
/// says, and are the usual carrier of hidden text. U+200D joins emoji and some scripts; it goes
/// too, because the encoder's vocabulary has no use for it.
fn is_invisible(character: char) -> bool {
    matches!(
        character,
        '\u{00AD}'
            | '\u{034F}'
            | '\u{061C}'
            | '\u{180E}'
            | '\u{200B}'..='\u{200F}'
            | '\u{202A}'..='\u{202E}'
            | '\u{2060}'..='\u{2069}'
            | '\u{FEFF}'
    )
}

#[cfg(test)]
mod tests {
    use super::prepare;

    #[test]
    fn controls_go_white_space_collapses_case_stays() {
        assert_eq!(prepare("\u{FEFF} A\u{200B}b\r\n\t c\u{202E}D \u{2003}"), "Ab cD");
        assert_eq!(prepare("e\u{0301}"), "é");
        assert_eq!(prepare("e\u{200B}\u{0301}"), "é");
        assert_eq!(prepare(" \u{200B} "), "");
    }
}
