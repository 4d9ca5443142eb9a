//! Sentence ends, by rule. English first; CJK full stops are known. Errs towards not cutting.

use std::ops::Range;

/// Words whose full stop ends no sentence. Lower case, without the stop.
const ABBREVIATIONS: [&str; 40] = [
    "al", "approx", "art", "ca", "cf", "ch", "chap", "co", "corp", "dept", "dr", "ed", "eds", "eq",
    "eqs", "est", "etc", "fig", "figs", "hr", "inc", "jr", "ltd", "min", "mr", "mrs", "ms", "no",
    "nos", "nr", "p", "pp", "prof", "ref", "sec", "sr", "st", "tab", "vol", "vs",
];

/// The sentences of `text[span]` as byte ranges of `text`, trimmed, in order. Together they hold
/// every byte of the span that is not white space.
pub(crate) fn sentences(text: &str, span: Range<usize>) -> Vec<Range<usize>> {
    let slice = &text[span.clone()];
    let mut found = Vec::new();
    let mut start = 0;
    let mut characters = slice.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        if !is_terminator(character) {
            continue;
        }
        let mut end = at + character.len_utf8();
        while let Some((next, follower)) =
            characters.next_if(|(_, follower)| is_terminator(*follower) || is_closer(*follower))
        {
            end = next + follower.len_utf8();
        }
        if is_boundary(&slice[start..at], character, &slice[end..]) {
            push_trimmed(&mut found, text, span.start + start..span.start + end);
            start = end;
        }
    }
    push_trimmed(&mut found, text, span.start + start..span.end);
    found
}

/// Adds `span` without the white space at its ends, if anything is left.
pub(crate) fn push_trimmed(spans: &mut Vec<Range<usize>>, text: &str, span: Range<usize>) {
    let trimmed = trim(text, span);
    if !trimmed.is_empty() {
        spans.push(trimmed);
    }
}

/// `span` without the white space at its ends.
pub(crate) fn trim(text: &str, span: Range<usize>) -> Range<usize> {
    let slice = &text[span.clone()];
    let start = span.start + (slice.len() - slice.trim_start().len());
    start..(start + slice.trim().len())
}

fn is_terminator(character: char) -> bool {
    matches!(character, '.' | '!' | '?' | '…' | '。' | '！' | '？')
}

fn is_closer(character: char) -> bool {
    matches!(character, '"' | '\'' | ')' | ']' | '”' | '’' | '»' | '*' | '_' | '`' | '」')
}

/// Whether the terminator after `before` ends a sentence when `after` follows.
fn is_boundary(before: &str, terminator: char, after: &str) -> bool {
    if matches!(terminator, '。' | '！' | '？') {
        return true;
    }
    if !after.starts_with(char::is_whitespace) {
        return false;
    }
    if after.trim_start().starts_with(char::is_lowercase) {
        return false;
    }
    terminator != '.' || !is_abbreviation(before)
}

/// Whether `before` ends in a word whose full stop belongs to the word: listed, an initial, one
/// with inner stops (`e.g`, `U.S`), or the number of a numbered line.
fn is_abbreviation(before: &str) -> bool {
    let word = before.rsplit(char::is_whitespace).next().unwrap_or_default();
    let word = word.trim_start_matches(|character: char| !character.is_alphanumeric());
    let opens_line = before.trim_start().len() == word.len();
    if opens_line && !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit()) {
        return true;
    }
    let mut letters = word.chars();
    let initial = letters.next().is_some_and(char::is_uppercase) && letters.next().is_none();
    let inner_stop = word.contains('.') && word.chars().all(|c| c == '.' || c.is_alphabetic());
    initial
        || (inner_stop && word.split('.').all(|part| part.chars().count() <= 2))
        || ABBREVIATIONS.contains(&word.to_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::sentences;

    fn cut(text: &str) -> Vec<&str> {
        sentences(text, 0..text.len()).into_iter().map(|span| &text[span]).collect()
    }

    #[test]
    fn ends_are_found_and_abbreviations_are_not_ends() {
        assert_eq!(cut("One. Two! Three? Four"), ["One.", "Two!", "Three?", "Four"]);
        assert_eq!(
            cut("See Fig. 3 of Dr. A. Smith. Then stop."),
            ["See Fig. 3 of Dr. A. Smith.", "Then stop."]
        );
        assert_eq!(
            cut("Use e.g. Rust. It costs 3.14 in the U.S. Army shop."),
            ["Use e.g. Rust.", "It costs 3.14 in the U.S. Army shop."]
        );
        assert_eq!(cut("He said \"stop.\" She did."), ["He said \"stop.\"", "She did."]);
        assert_eq!(cut("1. Install it. Run it."), ["1. Install it.", "Run it."]);
        assert_eq!(cut("これは。それは！"), ["これは。", "それは！"]);
        assert_eq!(cut("config.toml is read. ok"), ["config.toml is read. ok"]);
        assert!(cut(" \n ").is_empty());
    }
}
