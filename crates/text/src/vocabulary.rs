//! A vocabulary as GGUF files store it, and the byte alphabet of byte-level BPE.

use std::collections::HashMap;

use crate::TokenizerError;

/// Plain data of a vocabulary; the field names follow `tokenizer.ggml.*`.
///
/// Nothing here is checked until [`crate::Tokenizer::from_vocabulary`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocabulary {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE), `llama` (sentencepiece BPE), `t5`
    /// (Unigram) or `bert` (`WordPiece`).
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the rule that cuts text into words; only for `gpt2`.
    pub pre: String,
    /// (V) token texts; the index is the token id. In the byte alphabet for `gpt2`, with U+2581
    /// for a space in the others.
    pub tokens: Vec<String>,
    /// (V) token kinds: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    /// Empty means all normal.
    pub kinds: Vec<i32>,
    /// Merges `left right`, best first.
    pub merges: Vec<String>,
    /// (V) scores of `llama` and `t5`.
    pub scores: Vec<f32>,
    /// First token of every sequence, if the model has one.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// End of turn, where it differs from the end of sequence.
    pub eot: Option<u32>,
    /// Unknown token.
    pub unknown: Option<u32>,
    /// Padding token.
    pub padding: Option<u32>,
    /// Ends each sentence for an encoder (`seperator_token_id`, as GGUF spells it).
    pub separator: Option<u32>,
    /// Whether the model was trained with `bos` before every sequence.
    pub add_bos: bool,
    /// Whether an encoder was trained with `eos` after every sequence.
    pub add_eos: bool,
    /// Whether a space is put before the text; only for `llama` and `t5`.
    pub add_space_prefix: bool,
    /// Whether spaces at the ends are cut and runs of them joined; only for `llama` and `t5`.
    pub remove_extra_whitespaces: bool,
    /// Map of characters in sentencepiece's format; empty if there is none. Only for `t5`.
    pub precompiled_charsmap: Vec<u8>,
    /// Whether text is lower-cased; only for `bert`.
    pub lowercase: Option<bool>,
    /// Whether accents are taken off letters; only for `bert`. `None` does so where text is
    /// lower-cased.
    pub strip_accents: Option<bool>,
    /// Whether control tokens take the white space after them along (Phi-3).
    pub strips_right: bool,
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Part of the text; produced by merges.
    Text,
    /// Stands for its literal text, found before merges (`<think>`).
    Added,
    /// Steers the model; never produced from untrusted text.
    Control,
    /// In the file, never produced.
    Unused,
    /// Stands for one byte, where no token has its character; spelled `<0x0A>`.
    Byte,
}

/// Literals that end or begin turns and are not spelled as [`is_marker`] says. Some converters store
/// them as user-defined tokens; they are control tokens whatever the file says (llama.cpp repairs
/// such a list too).
const TURN_LITERALS: [&str; 6] =
    ["<start_of_turn>", "<end_of_turn>", "<EOT>", "<s>", "</s>", "[INST]"];

/// The turn literals after which a model must stop, joined with the `eos` of the file
/// (field-faults E10: a list that *replaces* lets generation run on).
const END_LITERALS: [&str; 8] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|END_OF_TURN_TOKEN|>",
];

/// The byte that a token `<0x0A>` stands for.
pub(crate) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|it| it.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Whether a token is spelled as the markers of chat templates are: `<|user|>`, `<|USER_TOKEN|>`.
/// Command-R's converter stores its roles as user-defined tokens, which text would then give as
/// well.
fn is_marker(token: &str) -> bool {
    token.len() > 4 && token.starts_with("<|") && token.ends_with("|>")
}

/// Whether `literal` ends a turn in the known families.
pub(crate) fn ends_turn(literal: &str) -> bool {
    END_LITERALS.contains(&literal)
}

impl Vocabulary {
    /// Kind of every token; (V).
    pub(crate) fn checked_kinds(&self) -> Result<Vec<Kind>, TokenizerError> {
        if !self.kinds.is_empty() && self.kinds.len() != self.tokens.len() {
            return Err(TokenizerError::KindCount {
                expected: self.tokens.len(),
                found: self.kinds.len(),
            });
        }
        let roles = [
            ("bos", self.bos),
            ("eos", self.eos),
            ("eot", self.eot),
            ("separator", self.separator),
            ("unknown", self.unknown),
        ];
        for (role, id) in roles {
            self.check_id(role, id)?;
        }
        let spelled = |id: Option<u32>| id.and_then(|id| self.tokens.get(id as usize));
        // In the vocabulary of Gemma these two are HTML: struck-out text.
        let is_html = |token: &str| {
            ["<s>", "</s>"].contains(&token)
                && spelled(self.bos).is_some_and(|bos| bos != "<s>")
                && spelled(self.eos).is_some_and(|eos| eos != "</s>")
        };
        let named = [self.bos, self.eos, self.eot, self.separator];
        let mut kinds = Vec::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            let stored = self.kinds.get(id).copied().unwrap_or(1);
            let is_named = named.iter().flatten().any(|&named| named as usize == id);
            kinds.push(match stored {
                _ if is_named => Kind::Control,
                1 => Kind::Text,
                6 => Kind::Byte,
                2 | 3 => Kind::Control,
                4 if is_marker(token) => Kind::Control,
                4 if TURN_LITERALS.contains(&token.as_str()) && !is_html(token) => Kind::Control,
                4 => Kind::Added,
                5 => Kind::Unused,
                found => return Err(TokenizerError::UnknownKind { id, found }),
            });
        }
        Ok(kinds)
    }

    fn check_id(&self, role: &'static str, id: Option<u32>) -> Result<(), TokenizerError> {
        match id {
            Some(found) if found as usize >= self.tokens.len() => {
                Err(TokenizerError::IdOutOfRange { role, found, vocab_len: self.tokens.len() })
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// Whether both parts and their concatenation are tokens.
pub(crate) fn is_merge(left: &str, right: &str, is_token: impl Fn(&str) -> bool) -> bool {
    !left.is_empty()
        && !right.is_empty()
        && is_token(left)
        && is_token(right)
        && is_token(&format!("{left}{right}"))
}

/// The GPT-2 alphabet: every byte as one printable character (`bytes_to_unicode` in openai/gpt-2).
pub(crate) struct ByteAlphabet {
    chars: [char; 256],
    bytes: HashMap<char, u8>,
}

impl ByteAlphabet {
    pub(crate) fn new() -> ByteAlphabet {
        let mut next = 256_u32;
        let chars = std::array::from_fn(|byte| {
            let byte = u32::try_from(byte).expect("an index below 256");
            let code = if matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("codes below 0x200 are characters")
        });
        let bytes = chars
            .iter()
            .enumerate()
            .map(|(byte, &char)| (char, u8::try_from(byte).expect("an index below 256")));
        ByteAlphabet { bytes: bytes.collect(), chars }
    }

    /// The character that stands for `byte`.
    pub(crate) fn char(&self, byte: u8) -> char {
        self.chars[usize::from(byte)]
    }

    /// The bytes that `token` stands for, or `None` if a character is not of the alphabet.
    pub(crate) fn decode(&self, token: &str) -> Option<Vec<u8>> {
        token.chars().map(|char| self.bytes.get(&char).copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_that_of_gpt2() {
        let alphabet = ByteAlphabet::new();
        assert_eq!(alphabet.char(b' '), 'Ġ');
        assert_eq!(alphabet.char(b'\n'), 'Ċ');
        assert_eq!(alphabet.char(b'A'), 'A');
        assert_eq!(alphabet.char(0xAD), 'Ń');
        assert_eq!(alphabet.decode("Ġcafé"), Some(b" caf\xE9".to_vec()));
        assert_eq!(alphabet.decode("日"), None);
        assert_eq!(alphabet.bytes.len(), 256);
    }
}
