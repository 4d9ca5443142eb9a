//! Texts to vectors as the gate sees them: prepared, prefixed, cut into windows at sentence ends.

use std::collections::HashMap;

use exrail_metrics::{Ds, UndefinedDs, ds, ds_windows};
use exrail_retrieval::{Encode, EncodeError, prepare};

use crate::answer::sentences;

/// Which prefix a text gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    /// A question, and every text of a text↔text pair.
    Query,
    /// Text of a document.
    Passage,
}

/// Encodes each text once.
pub(crate) struct TextVectors<'a> {
    encoder: &'a dyn Encode,
    prefixes: [String; 2],
    max_tokens: usize,
    known: HashMap<(Side, String), Vec<Vec<f32>>>,
}

impl<'a> TextVectors<'a> {
    pub(crate) fn new(encoder: &'a dyn Encode) -> TextVectors<'a> {
        let facts = encoder.facts();
        TextVectors {
            encoder,
            prefixes: [facts.query_prefix, facts.passage_prefix],
            max_tokens: facts.max_tokens,
            known: HashMap::new(),
        }
    }

    /// The vectors of the windows of a text; none for a text without tokens.
    pub(crate) fn windows(&mut self, side: Side, text: &str) -> Result<&[Vec<f32>], EncodeError> {
        let key = (side, text.to_owned());
        if !self.known.contains_key(&key) {
            let prefix = match side {
                Side::Query => &self.prefixes[0],
                Side::Passage => &self.prefixes[1],
            };
            let windows = self.cut(prefix, text);
            let windows: Vec<&str> = windows.iter().map(String::as_str).collect();
            let vectors =
                if windows.is_empty() { Vec::new() } else { self.encoder.encode(&windows)? };
            self.known.insert(key.clone(), vectors);
        }
        Ok(self.known.get(&key).map_or(&[], Vec::as_slice))
    }

    /// Raw ΔS of two texts, see [`ds_between`].
    pub(crate) fn ds(&mut self, a: (Side, &str), b: (Side, &str)) -> Result<Ds, EncodeError> {
        let first = self.windows(a.0, a.1)?.to_vec();
        Ok(ds_between(&first, self.windows(b.0, b.1)?))
    }

    /// Windows of at most `max_tokens`, cut at sentence ends, and inside a sentence only where
    /// one alone is longer.
    fn cut(&self, prefix: &str, text: &str) -> Vec<String> {
        let fits = |text: &str| self.encoder.tokenize(text).len() <= self.max_tokens;
        let whole = prepare(text);
        if whole.is_empty() {
            return Vec::new();
        }
        let prefixed = |text: &str| format!("{prefix}{text}");
        if fits(&prefixed(&whole)) {
            return vec![prefixed(&whole)];
        }
        let mut windows: Vec<String> = Vec::new();
        let mut open = String::new();
        for sentence in sentences(&whole) {
            let joined = format!("{open}{sentence}");
            if fits(&prefixed(joined.trim())) {
                open = joined;
                continue;
            }
            if !open.trim().is_empty() {
                windows.push(prefixed(open.trim()));
            }
            open = sentence.to_owned();
            while !fits(&prefixed(open.trim())) {
                let Some(half) = open.char_indices().nth(open.chars().count() / 2) else { break };
                if half.0 == 0 {
                    break;
                }
                let rest = open.split_off(half.0);
                if fits(&prefixed(open.trim())) {
                    windows.push(prefixed(open.trim()));
                    open = rest;
                } else {
                    // Still too long: halve again before the rest is looked at.
                    windows.extend(self.cut(prefix, &open));
                    open = rest;
                }
            }
        }
        if !open.trim().is_empty() {
            windows.push(prefixed(open.trim()));
        }
        windows
    }
}

/// Raw ΔS of two texts by their windows: one of them must be a single window, the other one is a minimum (§1.1.3). Two
/// long texts have no ΔS here: a minimum over pairs of windows would call any two texts with one common remark equal.
pub(crate) fn ds_between(a: &[Vec<f32>], b: &[Vec<f32>]) -> Ds {
    match (a, b) {
        ([a], [b]) => ds(a, b),
        ([only], windows) | (windows, [only]) => ds_windows(only, windows),
        (_, _) => Ds::Undefined(UndefinedDs::EmptyText),
    }
}
