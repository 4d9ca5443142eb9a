//! Which bytes the tokens of a `tokenizer.json` stand for, by its decoder.
//!
//! Decoders of the `tokenizers` crate turn a list of tokens into text. A stream needs the bytes
//! of each token by itself; here are the decoders for which these exist.

use serde_json::Value;

use crate::TokenizerError;
use crate::from_gguf::word_piece_text;
use crate::vocabulary::{ByteAlphabet, byte_of};

/// How the tokens are written.
pub(crate) enum Spelling {
    /// In the byte alphabet.
    Bytes(Box<ByteAlphabet>),
    /// With a prefix on what continues a word.
    Words {
        /// `##` in BERT.
        prefix: String,
        /// No space before marks and endings.
        cleanup: bool,
    },
    /// With another character for a space.
    Spaces {
        /// Mostly U+2581.
        space: String,
        /// `<0x0A>` stands for a byte.
        byte_fallback: bool,
        /// The space before a text is not part of it.
        space_prefix: bool,
    },
}

impl Spelling {
    /// Reads the decoder.
    ///
    /// # Errors
    /// [`TokenizerError::UnsupportedJson`] for one whose tokens have no fixed bytes.
    pub(crate) fn of(decoder: &Value) -> Result<Spelling, TokenizerError> {
        let unsupported =
            || TokenizerError::UnsupportedJson { field: "decoder", found: decoder.to_string() };
        let text = |field: &str| decoder.get(field).and_then(Value::as_str);
        match text("type") {
            Some("ByteLevel") => Ok(Spelling::Bytes(Box::new(ByteAlphabet::new()))),
            Some("WordPiece") => Ok(Spelling::Words {
                prefix: text("prefix").ok_or_else(unsupported)?.to_owned(),
                cleanup: decoder.get("cleanup").and_then(Value::as_bool).unwrap_or(true),
            }),
            Some("Metaspace") => {
                let scheme = text("prepend_scheme").unwrap_or("always");
                let prefix = decoder.get("add_prefix_space").and_then(Value::as_bool);
                Ok(Spelling::Spaces {
                    space: text("replacement").ok_or_else(unsupported)?.to_owned(),
                    byte_fallback: false,
                    space_prefix: prefix.unwrap_or(true) && scheme != "never",
                })
            }
            Some("Sequence") => {
                let steps = decoder.get("decoders").and_then(Value::as_array);
                Spelling::of_sequence(steps.ok_or_else(unsupported)?).ok_or_else(unsupported)
            }
            Some(_) | None => Err(unsupported()),
        }
    }

    /// The sequence that Hugging Face writes for sentencepiece models: `Replace`, `ByteFallback`,
    /// `Fuse` and, where a space goes before a text, `Strip`. Also one around another decoder.
    fn of_sequence(steps: &[Value]) -> Option<Spelling> {
        let (mut space, mut byte_fallback, mut space_prefix) = (None, false, false);
        for step in steps {
            let text = |field: &str| step.get(field).and_then(Value::as_str);
            match text("type")? {
                "Replace" if space.is_none() && text("content") == Some(" ") => {
                    space = Some(step.pointer("/pattern/String")?.as_str()?.to_owned());
                }
                "ByteFallback" => byte_fallback = true,
                "Fuse" => {}
                "Strip" => {
                    let count = |field: &str| step.get(field).and_then(Value::as_u64);
                    let one_space = text("content") == Some(" ") && count("start") == Some(1);
                    if !one_space || count("stop") != Some(0) {
                        return None;
                    }
                    space_prefix = true;
                }
                _ => return None,
            }
        }
        Some(Spelling::Spaces { space: space?, byte_fallback, space_prefix })
    }

    /// The bytes that `token`, which is not an added one, stands for.
    pub(crate) fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Spelling::Bytes(alphabet) => {
                alphabet.decode(token).unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Spelling::Words { prefix, cleanup } => match token.strip_prefix(prefix.as_str()) {
                Some(rest) => rest.as_bytes().to_vec(),
                None if *cleanup => word_piece_text(true, token).into_bytes(),
                None => format!(" {token}").into_bytes(),
            },
            Spelling::Spaces { space, byte_fallback, .. } => {
                match byte_of(token).filter(|_| *byte_fallback) {
                    Some(byte) => vec![byte],
                    None if space.is_empty() => token.as_bytes().to_vec(),
                    None => token.replace(space.as_str(), " ").into_bytes(),
                }
            }
        }
    }

    /// The byte alphabet, if the tokens are written in it.
    pub(crate) fn alphabet(&self) -> Option<&ByteAlphabet> {
        match self {
            Spelling::Bytes(alphabet) => Some(alphabet),
            Spelling::Words { .. } | Spelling::Spaces { .. } => None,
        }
    }

    /// Whether the first token of a text begins with a space that is not part of it.
    pub(crate) fn has_space_prefix(&self) -> bool {
        match self {
            Spelling::Bytes(_) => false,
            Spelling::Words { .. } => true,
            Spelling::Spaces { space_prefix, .. } => *space_prefix,
        }
    }
}
