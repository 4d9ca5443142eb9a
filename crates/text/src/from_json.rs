//! Tokenizers out of a `tokenizer.json` of Hugging Face.
//!
//! The parts of the file are checked one by one before the `tokenizers` crate builds them: it
//! indexes buffers with lengths from the file, and its patterns backtrack. What the file asks for
//! and this crate cannot keep within bounds is refused by name.

use std::collections::HashMap;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{
    ModelWrapper, NormalizedString, Normalizer as _, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, SplitDelimiterBehavior,
};

use crate::TokenizerError;
use crate::charsmap::CharsMap;
use crate::from_gguf::MAX_LITERAL_BYTES;
use crate::json_file::{Added, File, Model, Vocabulary};
use crate::json_spelling::Spelling;
use crate::pre_tokenizer::GPT2;
use crate::sha256::Fingerprint;
use crate::specials::{Literal, Literals};
use crate::spellings::Spellings;
use crate::splitter::Splitter;
use crate::token_table::{TokenTable, check_vocab_len};
use crate::tokenizer::{Around, Tokenizer, end_ids};
use crate::vocabulary::is_merge;
use crate::words::{Library, Step, Words};

/// Steps of a pre-tokenizer that are taken as the `tokenizers` crate has them, or replaced.
const STEPS: [&str; 9] = [
    "BertPreTokenizer",
    "ByteLevel",
    "CharDelimiterSplit",
    "Digits",
    "Metaspace",
    "Punctuation",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
];
/// Normalisers that leave the length of a text within a few times of what it was.
const NORMALIZERS: [&str; 10] = [
    "BertNormalizer",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Sequence",
    "Strip",
    "StripAccents",
];
/// How many times longer all steps together may make a text, counted as if each replaced every
/// byte; those of T5 come to 272.
const MAX_GROWTH: usize = 1024;
/// Most steps of a pre-tokenizer; published ones have at most five.
const MAX_STEPS: usize = 32;
/// Ids may leave holes; this many at most beside one for each token.
const MAX_HOLES: usize = 1024;

/// Which tokens begin and end sequences, as the files beside a `tokenizer.json` say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRoles {
    /// First token of a sequence.
    pub bos: Option<u32>,
    /// Tokens after which generation ends.
    pub eos: Vec<u32>,
    /// Whether `bos` belongs before every sequence; `None` for what the post-processor of the
    /// `tokenizer.json` does.
    pub add_bos: Option<bool>,
}

impl Tokenizer {
    /// Builds a tokenizer from the bytes of a `tokenizer.json`: byte-level BPE, sentencepiece BPE
    /// as Hugging Face converts it, Unigram or `WordPiece`.
    ///
    /// Truncation and padding that the file asks for are left out: how many tokens fit is a
    /// property of the model, and a text cut in silence is a fault. The file does not say which
    /// tokens begin and end sequences; see [`Tokenizer::with_roles`].
    ///
    /// # Errors
    /// [`TokenizerError::BadJson`] if the file is not a tokenizer,
    /// [`TokenizerError::UnsupportedJson`] for what this crate does not do, and others by name.
    pub fn from_json(json: &[u8]) -> Result<Tokenizer, TokenizerError> {
        let file: File = parse("tokenizer.json", json)?;
        let vocab_len = file.vocab_len();
        check_vocab_len(vocab_len)?;
        let n_tokens = file.model.vocab.len() + file.added_tokens.len();
        if vocab_len > n_tokens.saturating_mul(2) + MAX_HOLES {
            return Err(TokenizerError::VocabularySize {
                found: vocab_len,
                limit: 2 * n_tokens + MAX_HOLES,
            });
        }
        let spelling = Spelling::of(&file.decoder)?;
        let (tokens, literals) = tokens(&file, vocab_len, &spelling)?;
        let unknown = file.unknown(&tokens);
        let encodable = spelling.alphabet().map(|alphabet| {
            Box::new(std::array::from_fn(|byte| {
                let char = alphabet.char(u8::try_from(byte).expect("an index below 256"));
                unknown.is_some() || tokens.id(char.encode_utf8(&mut [0; 4])).is_some()
            }))
        });
        let has_space_prefix = spelling.has_space_prefix();
        let library = library(file)?;
        let mut fingerprint = Fingerprint::new();
        fingerprint.field(b"tokenizer.json");
        fingerprint.field(json);
        Ok(Tokenizer {
            words: Words::Library(Box::new(library)),
            literals: Literals::new(literals),
            encodable,
            bos: None,
            eos_ids: end_ids(&[], &tokens),
            unknown,
            add_bos: false,
            around: Around::PostProcessor,
            has_space_prefix,
            fingerprint: fingerprint.finish(),
            tokens,
        })
    }

    /// The same tokenizer with the tokens that begin and end sequences. These are control tokens
    /// from now on, if they were not.
    ///
    /// # Errors
    /// [`TokenizerError::IdOutOfRange`] for an id that is not in the vocabulary,
    /// [`TokenizerError::MissingBos`] for `add_bos` without one.
    pub fn with_roles(self, roles: &TokenRoles) -> Result<Tokenizer, TokenizerError> {
        let mut tokenizer = self;
        let vocab_len = tokenizer.vocab_len();
        let named = roles.bos.iter().map(|&id| ("bos", id));
        for (role, found) in named.chain(roles.eos.iter().map(|&id| ("eos", id))) {
            if found as usize >= vocab_len {
                return Err(TokenizerError::IdOutOfRange { role, found, vocab_len });
            }
            if !tokenizer.tokens.is_control(found) {
                tokenizer.tokens.set_control(found);
                let bytes = tokenizer.tokens.bytes(found).unwrap_or_default();
                let text = String::from_utf8_lossy(bytes).into_owned();
                let literal = Literal { id: found, text, control: true, ..Literal::default() };
                tokenizer.literals.add(literal);
            }
        }
        let from_file = || -> Result<bool, TokenizerError> {
            let Some(bos) = roles.bos else { return Ok(false) };
            Ok(tokenizer.wrap_sentence(&[])?.first() == Some(&bos))
        };
        tokenizer.add_bos = roles.add_bos.map_or_else(from_file, Ok)?;
        if tokenizer.add_bos && roles.bos.is_none() {
            return Err(TokenizerError::MissingBos);
        }
        tokenizer.bos = roles.bos;
        let eos: Vec<Option<u32>> = roles.eos.iter().copied().map(Some).collect();
        tokenizer.eos_ids = end_ids(&eos, &tokenizer.tokens);
        let mut fingerprint = Fingerprint::new();
        fingerprint.field(tokenizer.fingerprint.as_bytes());
        fingerprint.field(format!("{:?} {}", roles.bos, tokenizer.add_bos).as_bytes());
        fingerprint.field(format!("{:?}", tokenizer.eos_ids).as_bytes());
        tokenizer.fingerprint = fingerprint.finish();
        Ok(tokenizer)
    }
}

fn parse<T: DeserializeOwned>(file: &'static str, json: &[u8]) -> Result<T, TokenizerError> {
    serde_json::from_slice(json).map_err(|source| TokenizerError::BadJson { file, source })
}

fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, TokenizerError> {
    serde_json::from_value(value)
        .map_err(|source| TokenizerError::BadJson { file: "tokenizer.json", source })
}

/// Token table and control literals.
fn tokens(
    file: &File,
    vocab_len: usize,
    spelling: &Spelling,
) -> Result<(TokenTable, Vec<Literal>), TokenizerError> {
    let mut by_id = vec![None; vocab_len];
    for (token, id) in file.model.vocab.iter() {
        by_id[id as usize] = Some(token);
    }
    let mut added: HashMap<u32, &Added> = HashMap::new();
    for token in &file.added_tokens {
        by_id[token.id as usize] = Some(&token.content);
        added.insert(token.id, token);
    }
    let spellings = Spellings::of(by_id.iter().map(|token| token.unwrap_or_default()))?;
    let spellings = Arc::new(spellings);
    let mut tokens = TokenTable::new(Arc::clone(&spellings));
    let mut literals = Vec::new();
    for id in 0..u32::try_from(vocab_len).expect("the vocabulary size has been checked") {
        let token = spellings.get(id);
        let Some(added) = added.get(&id) else {
            tokens.push(&spelling.bytes(token), false);
            continue;
        };
        if token.len() > MAX_LITERAL_BYTES {
            let found = token.len();
            return Err(TokenizerError::TokenTooLong { id, limit: MAX_LITERAL_BYTES, found });
        }
        // Gemma has tokens that are both: a run of U+2581 is written by merges and listed as added.
        let bytes = if added.special { token.as_bytes().to_vec() } else { spelling.bytes(token) };
        tokens.push(&bytes, added.special);
        if added.special {
            literals.push(Literal {
                id,
                text: token.to_owned(),
                control: true,
                takes_left: added.lstrip,
                takes_right: added.rstrip,
                single_word: added.single_word,
            });
        }
    }
    Ok((tokens, literals))
}

fn library(file: File) -> Result<Library, TokenizerError> {
    let library = |doing| move |source| TokenizerError::Library { doing, source };
    let mut tokenizer = tokenizers::Tokenizer::new(model(file.model)?);
    let mut growth = 1;
    check_normalizer(&file.normalizer, &mut growth)?;
    let normalizer: Option<NormalizerWrapper> = from_value(file.normalizer)?;
    let set = tokenizer.with_normalizer(normalizer).map(|_| ());
    set.map_err(library("setting the normalizer"))?;
    let post_processor: Option<PostProcessorWrapper> = from_value(file.post_processor)?;
    tokenizer.with_post_processor(post_processor);
    if let Some(normalizer) = tokenizer.get_normalizer() {
        for token in file.added_tokens.iter().filter(|token| token.is_normalized()) {
            let mut text = NormalizedString::from(token.content.as_str());
            normalizer.normalize(&mut text).map_err(library("normalising an added token"))?;
            // Nothing would be found between any two bytes, inside characters too.
            if text.get().is_empty() {
                return Err(unsupported("added_tokens.content", format!("{:?}", token.content)));
            }
        }
    }
    let expected: Vec<(u32, String)> =
        file.added_tokens.iter().map(|it| (it.id, it.content.clone())).collect();
    let added = file.added_tokens.into_iter().map(Added::into_library);
    tokenizer.add_tokens(added).map_err(library("adding tokens"))?;
    for (id, content) in expected {
        let given = tokenizer.token_to_id(&content);
        if given != Some(id) {
            return Err(TokenizerError::AddedTokenId { content, expected: id, given });
        }
    }
    tokenizer.set_encode_special_tokens(true);
    let mut steps = Vec::new();
    add_steps(file.pre_tokenizer, &mut steps, &mut growth)?;
    Ok(Library { tokenizer, steps })
}

fn unsupported(field: &'static str, found: impl ToString) -> TokenizerError {
    TokenizerError::UnsupportedJson { field, found: found.to_string() }
}

fn model(model: Model) -> Result<ModelWrapper, TokenizerError> {
    let library = |source| TokenizerError::Library { doing: "building the model", source };
    // Files of before 2020 name no type; only BPE has merges.
    let kind = model.kind.clone().unwrap_or_else(|| {
        if model.merges.is_empty() { "none".to_owned() } else { "BPE".to_owned() }
    });
    match (kind.as_str(), model.vocab) {
        ("BPE", Vocabulary::Ids(vocab)) => {
            if let Some(dropout) = model.dropout.filter(|&it| it != 0.0) {
                return Err(unsupported("model.dropout", dropout));
            }
            for (field, affix) in [
                ("model.continuing_subword_prefix", &model.continuing_subword_prefix),
                ("model.end_of_word_suffix", &model.end_of_word_suffix),
            ] {
                if let Some(affix) = affix.as_ref().filter(|affix| !affix.is_empty()) {
                    return Err(unsupported(field, affix));
                }
            }
            let mut merges = Vec::with_capacity(model.merges.len());
            for (rank, merge) in model.merges.into_iter().enumerate() {
                let (left, right) = merge
                    .parts()
                    .filter(|(left, right)| is_merge(left, right, |it| vocab.contains_key(it)))
                    .ok_or_else(|| TokenizerError::BadMerge { rank, merge: merge.to_string() })?;
                merges.push((left.to_owned(), right.to_owned()));
            }
            let mut builder = BPE::builder()
                .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
                .fuse_unk(model.fuse_unk)
                .byte_fallback(model.byte_fallback)
                .ignore_merges(model.ignore_merges);
            if let Some(unknown) = model.unk_token {
                builder = builder.unk_token(unknown);
            }
            Ok(builder.build().map_err(library)?.into())
        }
        ("WordPiece", Vocabulary::Ids(vocab)) => {
            let mut builder = WordPiece::builder().vocab(vocab.into_iter().collect::<Vocab>());
            if let Some(unknown) = model.unk_token {
                builder = builder.unk_token(unknown);
            }
            if let Some(prefix) = model.continuing_subword_prefix {
                builder = builder.continuing_subword_prefix(prefix);
            }
            if let Some(limit) = model.max_input_chars_per_word {
                if limit > 1000 {
                    return Err(unsupported("model.max_input_chars_per_word", limit));
                }
                builder = builder.max_input_chars_per_word(limit);
            }
            Ok(builder.build().map_err(library)?.into())
        }
        ("Unigram", Vocabulary::Scores(vocab)) => {
            if let Some(id) = vocab.iter().position(|(_, score)| !score.is_finite()) {
                #[expect(clippy::cast_possible_truncation, reason = "it is infinite anyway")]
                let found = vocab[id].1 as f32;
                return Err(TokenizerError::BadScore { id, found });
            }
            let vocab: Vec<_> = vocab
                .into_iter()
                .map(|(piece, score)| (piece, as_reference_reads(score)))
                .collect();
            let model = Unigram::from(vocab, model.unk_id, model.byte_fallback).map_err(library)?;
            Ok(model.into())
        }
        (kind, Vocabulary::Ids(_)) => Err(unsupported("model.type", format!("{kind} with ids"))),
        (kind, Vocabulary::Scores(_)) => {
            Err(unsupported("model.type", format!("{kind} with scores")))
        }
    }
}

/// The score that the reference implementation makes of the same digits: it takes them as an integer and divides by a
/// power of ten, which rounds twice. Ours are exact, since a dependency switches that on for the whole program; two
/// ways to cut a word whose scores are that near would be decided otherwise.
fn as_reference_reads(score: f64) -> f64 {
    let written = format!("{score:e}");
    let Some((digits, exponent)) = written.split_once('e') else { return score };
    let (sign, digits) = digits.strip_prefix('-').map_or((1.0, digits), |rest| (-1.0, rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let (Ok(digits), Ok(exponent)) =
        (format!("{whole}{fraction}").parse::<u64>(), exponent.parse::<i32>())
    else {
        return score;
    };
    #[expect(clippy::cast_precision_loss, reason = "this is the first rounding of the two")]
    let digits = digits as f64;
    let power = i32::try_from(fraction.len()).map_or(0, |n_behind| exponent - n_behind);
    let scale = 10_f64.powi(power.abs().min(308));
    sign * if power < 0 { digits / scale } else { digits * scale }
}

/// Proves that the normaliser neither panics nor lets a text grow without bound.
fn check_normalizer(value: &Value, growth: &mut usize) -> Result<(), TokenizerError> {
    let text = |field: &str| value.get(field).and_then(Value::as_str);
    if let Some(steps) = value.get("normalizers").and_then(Value::as_array) {
        for step in steps {
            check_normalizer(step, growth)?;
        }
    }
    match text("type") {
        Some("Precompiled") => {
            // The crate walks the map without looking where it leads.
            let map = text("precompiled_charsmap").and_then(base64);
            let map = CharsMap::parse(&map.ok_or_else(|| unsupported("normalizer", value))?)?;
            grow(growth, map.longest_replacement() + 1)
        }
        // The crate then takes the first character for an addition, and panics at the next step.
        Some("Prepend") if text("prepend") == Some("") => Err(unsupported("normalizer", value)),
        Some("Replace" | "Prepend") => {
            if let Some(pattern) = value.pointer("/pattern/Regex").and_then(Value::as_str) {
                Splitter::new(pattern)?;
            }
            // A pattern may match nothing, before every character.
            grow(growth, text("content").or(text("prepend")).map_or(0, str::len) + 1)
        }
        Some("ByteLevel") => grow(growth, 2),
        Some(name) if NORMALIZERS.contains(&name) => Ok(()),
        None if value.is_null() => Ok(()),
        Some(_) | None => Err(unsupported("normalizer", value)),
    }
}

fn grow(growth: &mut usize, times: usize) -> Result<(), TokenizerError> {
    *growth = growth.saturating_mul(times);
    if *growth > MAX_GROWTH {
        return Err(unsupported(
            "normalizer or pre_tokenizer",
            format!("growth of {growth} times"),
        ));
    }
    Ok(())
}

/// The bytes of standard Base64 (RFC 4648 §4); `None` for anything else.
fn base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 3);
    let (mut bits, mut n_bits) = (0_u32, 0);
    for digit in digits {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            bytes.push(u8::try_from(bits >> n_bits & 0xFF).ok()?);
        }
    }
    Some(bytes)
}

/// Appends the steps of a pre-tokenizer, sequences taken apart.
fn add_steps(
    value: Value,
    steps: &mut Vec<Step>,
    growth: &mut usize,
) -> Result<(), TokenizerError> {
    if steps.len() > MAX_STEPS {
        return Err(unsupported("pre_tokenizer", format!("more than {MAX_STEPS} steps")));
    }
    let kind = value.get("type").and_then(Value::as_str).map(str::to_owned);
    match (kind.as_deref(), value) {
        (_, Value::Null) => Ok(()),
        (Some("Sequence"), mut value) => match value.get_mut("pretokenizers").map(Value::take) {
            Some(Value::Array(parts)) => {
                parts.into_iter().try_for_each(|part| add_steps(part, steps, growth))
            }
            other => Err(unsupported("pre_tokenizer.pretokenizers", other.unwrap_or_default())),
        },
        (Some("Split"), value) => {
            let pattern = match (value.pointer("/pattern/Regex"), value.pointer("/pattern/String"))
            {
                (Some(Value::String(regex)), _) => regex.clone(),
                (_, Some(Value::String(text))) => escaped(text),
                (_, _) => return Err(unsupported("pre_tokenizer.pattern", &value)),
            };
            let invert = value.get("invert").and_then(Value::as_bool).unwrap_or(false);
            let behavior: SplitDelimiterBehavior =
                from_value(value.get("behavior").cloned().unwrap_or_default())?;
            steps.push(Step::Split { splitter: Splitter::new(&pattern)?, behavior, invert });
            Ok(())
        }
        (Some(name), value) if STEPS.contains(&name) => {
            let step: PreTokenizerWrapper = from_value(value)?;
            if let PreTokenizerWrapper::Metaspace(step) = &step {
                grow(growth, step.get_replacement().len_utf8() + 1)?;
            }
            if let PreTokenizerWrapper::ByteLevel(ByteLevel {
                add_prefix_space, use_regex, ..
            }) = step
            {
                if add_prefix_space {
                    steps.push(Step::Prefix);
                }
                if use_regex {
                    steps.push(Step::isolate(Splitter::new(GPT2)?));
                }
                grow(growth, 2)?;
                steps.push(Step::bytes());
            } else if let PreTokenizerWrapper::Metaspace(step) = &step
                && step.prepend_scheme == PrependScheme::First
            {
                steps.push(Step::FirstSpace(step.clone()));
            } else {
                steps.push(Step::Other(step));
            }
            Ok(())
        }
        (_, value) => Err(unsupported("pre_tokenizer", value)),
    }
}

/// `text` as a pattern that matches it and nothing else.
fn escaped(text: &str) -> String {
    text.chars().map(|char| format!(r"\x{{{:X}}}", u32::from(char))).collect()
}
