//! A fake encoder for tests of this crate and of those above it. Not for answers.

use std::ops::Range;

use crate::hash::sha256_hex;
use crate::{Encode, EncodeError, EncoderFacts, prepare};

/// Hashes words into a unit vector: texts that share words are near, others nearly orthogonal.
///
/// Deterministic, no model. Words are runs of letters and digits, lower-cased; every other
/// character that is not white space is a token of its own. A word of more than
/// [`FakeEncoder::PIECE`] bytes is several tokens, as with a real subword tokenizer.
#[derive(Clone, Debug)]
pub struct FakeEncoder {
    facts: EncoderFacts,
    fingerprint: String,
    seed: u64,
}

impl FakeEncoder {
    /// Bytes of the longest piece of a word.
    pub const PIECE: usize = 12;

    /// An encoder of 64 dimensions and 254 tokens. Another seed is another encoder: other
    /// fingerprint, other vector space.
    #[must_use]
    pub fn new(seed: u64) -> FakeEncoder {
        FakeEncoder::with_facts(
            seed,
            EncoderFacts {
                name: "fake".to_owned(),
                dim: 64,
                max_tokens: 254,
                pooling: "mean".to_owned(),
                normalized: true,
                metric: "cosine".to_owned(),
                query_prefix: String::new(),
                passage_prefix: String::new(),
                tokenizer_fp: sha256_hex(b"fake words"),
            },
        )
    }

    /// An encoder with other facts, for tests of contracts.
    ///
    /// # Panics
    /// If `facts.dim` is 0.
    #[must_use]
    pub fn with_facts(seed: u64, facts: EncoderFacts) -> FakeEncoder {
        assert!(facts.dim > 0, "a vector has at least one value");
        let fingerprint = sha256_hex(format!("{seed} {facts:?}").as_bytes());
        FakeEncoder { facts, fingerprint, seed }
    }
}

impl Encode for FakeEncoder {
    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn facts(&self) -> EncoderFacts {
        self.facts.clone()
    }

    fn tokenize(&self, text: &str) -> Vec<(u32, Range<usize>)> {
        let mut tokens = Vec::new();
        let mut word = 0..0;
        for (at, character) in text.char_indices() {
            let end = at + character.len_utf8();
            if character.is_alphanumeric() && end - word.start <= FakeEncoder::PIECE {
                word.end = end;
                continue;
            }
            push_token(&mut tokens, text, word);
            word = if character.is_alphanumeric() { at..end } else { end..end };
            if !character.is_alphanumeric() && !character.is_whitespace() {
                push_token(&mut tokens, text, at..end);
            }
        }
        push_token(&mut tokens, text, word);
        tokens
    }

    fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, EncodeError> {
        texts.iter().enumerate().map(|(index, text)| self.encode_one(index, text)).collect()
    }
}

impl FakeEncoder {
    fn encode_one(&self, index: usize, text: &str) -> Result<Vec<f32>, EncodeError> {
        let tokens = self.tokenize(&prepare(text));
        let limit = self.facts.max_tokens;
        if tokens.is_empty() {
            return Err(EncodeError::Empty { index });
        }
        if tokens.len() > limit {
            return Err(EncodeError::TooLong { index, tokens: tokens.len(), limit });
        }
        let mut sum = vec![0f64; self.facts.dim];
        for (id, _) in tokens {
            let mut state = mix(self.seed ^ mix(u64::from(id)));
            for value in &mut sum {
                state = mix(state);
                // Two signed bytes of noise are enough to keep different words apart.
                let [low, ..] = state.to_le_bytes();
                *value += f64::from(low) - 127.5;
            }
        }
        let norm = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
        #[expect(clippy::cast_possible_truncation, reason = "vectors are f32 by contract")]
        Ok(sum.iter().map(|value| (value / norm) as f32).collect())
    }
}

fn push_token(tokens: &mut Vec<(u32, Range<usize>)>, text: &str, span: Range<usize>) {
    if !span.is_empty() {
        let word = text[span.clone()].to_lowercase();
        let mut state = 0;
        for byte in word.bytes() {
            state = mix(state ^ u64::from(byte));
        }
        let [a, b, c, d, ..] = state.to_le_bytes();
        tokens.push((u32::from_le_bytes([a, b, c, d]), span));
    }
}

/// `splitmix64`: one step of Steele, Lea and Flood (2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
