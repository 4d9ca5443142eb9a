//! Tokens: a run of letters with the space before it, or up to four other characters. A text's
//! tokens are its parts in order, so that joined they are the text.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{
    Shared,
    body::{Checks, flag},
    lock, messages,
    refusal::Refusal,
};

/// Opens a turn, and a text that is encoded with `add_bos_token`.
pub(super) const BOS: &str = "<|im_start|>";
/// Ends a turn.
pub(super) const EOS: &str = "<|im_end|>";

const SPECIAL: [&str; 3] = ["<|endoftext|>", BOS, EOS];

/// The longest run of letters in one token.
const LETTERS: usize = 16;
/// The longest run of anything else.
const OTHERS: usize = 4;

/// Gives tokens their numbers: the special ones first, the others in the order of their first use.
#[derive(Debug)]
pub(super) struct Tokens {
    ids: HashMap<String, usize>,
    texts: Vec<String>,
}

impl Default for Tokens {
    fn default() -> Tokens {
        let mut tokens = Tokens { ids: HashMap::new(), texts: Vec::new() };
        for special in SPECIAL {
            tokens.id(special);
        }
        tokens
    }
}

impl Tokens {
    /// The number of a token.
    pub(super) fn id(&mut self, token: &str) -> usize {
        if let Some(id) = self.ids.get(token) {
            return *id;
        }
        let id = self.texts.len();
        self.texts.push(token.to_owned());
        self.ids.insert(token.to_owned(), id);
        id
    }

    /// The text of a number, if it has been given out.
    pub(super) fn text(&self, id: usize) -> Option<&str> {
        self.texts.get(id).map(String::as_str)
    }
}

/// The tokens of a text that may hold special ones.
pub(super) fn split(text: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let first =
            SPECIAL.iter().filter_map(|special| Some((rest.find(special)?, *special))).min();
        let (plain_len, special_len) = first.map_or((rest.len(), 0), |(at, it)| (at, it.len()));
        tokens.extend(split_plain(&rest[..plain_len]));
        if special_len > 0 {
            tokens.push(&rest[plain_len..plain_len + special_len]);
        }
        rest = &rest[plain_len + special_len..];
    }
    tokens
}

/// The tokens of a text without special ones.
pub(super) fn split_plain(text: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (token, after) = rest.split_at(first_len(rest));
        tokens.push(token);
        rest = after;
    }
    tokens
}

/// The length in bytes of the first token of a text that is not empty.
fn first_len(text: &str) -> usize {
    let space_len = usize::from(text.starts_with(' '));
    let letters = text[space_len..].chars().take_while(|c| c.is_alphabetic()).take(LETTERS);
    let letters_len: usize = letters.map(char::len_utf8).sum();
    if letters_len > 0 {
        return space_len + letters_len;
    }
    let mut len = 0;
    for c in text.chars().take(OTHERS) {
        let rest = &text[len..];
        let word_begins = rest.strip_prefix(' ').unwrap_or(rest).starts_with(char::is_alphabetic);
        if word_begins {
            break;
        }
        len += c.len_utf8();
    }
    len
}

/// `POST /v1/token/encode`.
pub(super) fn encode(shared: &Shared, body: &Map<String, Value>) -> Result<Value, Refusal> {
    let mut checks = Checks::default();
    let text = match body.get("text") {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(_)) => {
            let turns = messages::read(body, "text", &mut checks);
            checks.end()?;
            checks = Checks::default();
            Some(messages::render(&turns)?)
        }
        Some(other) => {
            checks.wrong("string_type", &["text"], "Input should be a valid string", other);
            None
        }
        None => {
            checks.missing(&["text"], body);
            None
        }
    };
    let add_bos = checks.boolean(body, "add_bos_token");
    let special = checks.boolean(body, "encode_special_tokens");
    checks.end()?;
    let text = text.unwrap_or_default();
    let parts = if flag(special, true) { split(&text) } else { split_plain(&text) };
    let mut tokens = lock(&shared.tokens);
    let bos = flag(add_bos, true).then_some(BOS);
    let ids: Vec<usize> = bos.into_iter().chain(parts).map(|part| tokens.id(part)).collect();
    Ok(json!({"tokens": ids, "length": ids.len()}))
}

/// `POST /v1/token/decode`. Numbers that were never given out are no text.
pub(super) fn decode(shared: &Shared, body: &Map<String, Value>) -> Result<Value, Refusal> {
    let mut checks = Checks::default();
    let special = checks.boolean(body, "decode_special_tokens");
    let mut ids = Vec::new();
    match body.get("tokens") {
        Some(Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                match item.as_u64().and_then(|id| usize::try_from(id).ok()) {
                    Some(id) => ids.push(id),
                    None => checks.wrong_at(
                        "int_type",
                        json!(["body", "tokens", index]),
                        "Input should be a valid integer",
                        item,
                    ),
                }
            }
        }
        Some(other) => {
            checks.wrong("list_type", &["tokens"], "Input should be a valid list", other);
        }
        None => checks.missing(&["tokens"], body),
    }
    checks.end()?;
    let tokens = lock(&shared.tokens);
    let shown = |id: &usize| flag(special, true) || *id >= SPECIAL.len();
    let text: String =
        ids.iter().filter(|id| shown(id)).filter_map(|id| tokens.text(*id)).collect();
    Ok(json!({"text": text}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_joined_are_the_text_and_a_prefix_of_tokens_has_the_same_tokens() {
        for text in ["kalo  mira,  x", r#"{"a": [1, 23456], "b": "zu  "}"#, " é漢 ", "<|im_end|>a"]
        {
            let tokens = split(text);
            assert_eq!(tokens.concat(), text);
            for n_tokens in 0..tokens.len() {
                let prefix = tokens[..n_tokens].concat();
                assert_eq!(split(&prefix), tokens[..n_tokens], "{text}");
            }
        }
    }

    #[test]
    fn words_are_one_token_and_json_is_cut_at_four() {
        assert_eq!(split("kalo mira"), ["kalo", " mira"]);
        assert_eq!(split(r#"{"a":123456}"#), ["{\"", "a", "\":12", "3456", "}"]);
    }
}
