//! Text to token ids and back.
//!
//! Words and merges are the work of the `tokenizers` crate. Around it stand the things where a
//! fault is silent: which literals become control ids, which bytes a token stands for, and what
//! the tokenizer refuses instead of dropping.

use std::collections::HashMap;
use std::ops::Range;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{DecoderWrapper, ModelWrapper};

use crate::pre_tokenizer::{Family, family};
use crate::sha256::Fingerprint;
use crate::specials::{Literal, Literals, Occurrence, Specials};
use crate::vocabulary::{ByteAlphabet, Kind, Vocabulary, ends_turn};

/// More tokens than any published vocabulary; keeps a hostile file from asking for memory.
const MAX_VOCAB_LEN: usize = 1 << 22;

/// What can be wrong with a vocabulary or with a text for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The vocabulary is of a kind this crate does not build.
    #[error("tokenizer model `{found}` is not supported, expected `gpt2` (byte-level BPE)")]
    UnknownModel {
        /// `tokenizer.ggml.model` of the file.
        found: String,
    },
    /// The name of the word splitter is not known.
    #[error(
        "pre-tokenizer `{found}` is not supported, expected one of smollm, gpt-2, llama-bpe, qwen2, default"
    )]
    UnknownPreTokenizer {
        /// `tokenizer.ggml.pre` of the file.
        found: String,
    },
    /// No tokens, or more than any vocabulary has.
    #[error("vocabulary size: expected 1 to {limit} tokens, found {found}")]
    VocabularySize {
        /// Tokens in the file.
        found: usize,
        /// Most tokens accepted.
        limit: usize,
    },
    /// The list of kinds does not match the list of tokens.
    #[error("token kinds: expected {expected}, one for each token, found {found}")]
    KindCount {
        /// Tokens in the file.
        expected: usize,
        /// Kinds in the file.
        found: usize,
    },
    /// A token kind outside 1 to 6.
    #[error("token {id}: expected a kind from 1 to 6, found {found}")]
    UnknownKind {
        /// Token id.
        id: usize,
        /// Kind in the file.
        found: i32,
    },
    /// A named token is not in the vocabulary.
    #[error("{role} token: expected an id below {vocab_len}, found {found}")]
    IdOutOfRange {
        /// `bos`, `eos` or `eot`.
        role: &'static str,
        /// Id in the file.
        found: u32,
        /// Tokens in the file.
        vocab_len: usize,
    },
    /// `add_bos` without a beginning-of-sequence token.
    #[error("add_bos_token is set, but the file names no bos token")]
    MissingBos,
    /// A merge whose parts or result are not ordinary tokens.
    #[error(
        "merge {rank} `{merge}`: expected `left right`, both and their concatenation ordinary tokens"
    )]
    BadMerge {
        /// Position in the list of merges.
        rank: usize,
        /// The merge as stored.
        merge: String,
    },
    /// `tokenizer.json` describes something this crate cannot map to bytes.
    #[error("tokenizer.json: {field} `{found}` is not supported")]
    UnsupportedJson {
        /// Field of the file.
        field: &'static str,
        /// What the field holds.
        found: String,
    },
    /// The text has a byte that the vocabulary has no token for; the reference implementations
    /// drop it in silence.
    #[error("text byte {offset}: the vocabulary has no token for byte 0x{byte:02x}")]
    Unencodable {
        /// Byte offset in the text.
        offset: usize,
        /// The byte.
        byte: u8,
    },
    /// Ordinary text gave a control id; this would be a hole in the separation of the two.
    #[error("text bytes {span:?} gave control token {id}")]
    ControlFromText {
        /// The id.
        id: u32,
        /// Byte range in the text.
        span: Range<usize>,
    },
    /// The `tokenizers` crate refused.
    #[error("{doing}: {source}")]
    Library {
        /// What was being done.
        doing: &'static str,
        /// Its own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A vocabulary ready for use. Immutable; share it behind an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    words: tokenizers::Tokenizer,
    literals: Literals,
    tokens: TokenTable,
    /// Bytes that have a token of their own; `None` if unknown text has a token.
    encodable: Option<Box<[bool; 256]>>,
    bos: Option<u32>,
    eos_ids: Vec<u32>,
    unknown: Option<u32>,
    add_bos: bool,
    fingerprint: String,
}

/// Per token: its bytes, its literal and whether it is a control token.
#[derive(Debug, Default)]
struct TokenTable {
    /// Bytes of all tokens, one after another.
    bytes: Vec<u8>,
    /// (V + 1) where each token starts in `bytes`.
    starts: Vec<usize>,
    /// (V)
    control: Vec<bool>,
    ids: HashMap<String, u32>,
}

impl TokenTable {
    fn push(&mut self, literal: &str, bytes: &[u8], control: bool) {
        let id = u32::try_from(self.control.len()).expect("the vocabulary size has been checked");
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.bytes.extend_from_slice(bytes);
        self.starts.push(self.bytes.len());
        self.control.push(control);
        self.ids.entry(literal.to_owned()).or_insert(id);
    }

    fn bytes(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        (id < self.control.len()).then(|| &self.bytes[self.starts[id]..self.starts[id + 1]])
    }
}

impl Tokenizer {
    /// Builds a byte-level BPE tokenizer from the vocabulary of a GGUF file.
    ///
    /// # Errors
    /// Anything in the vocabulary that is inconsistent or not supported, by name.
    pub fn from_vocabulary(vocabulary: Vocabulary) -> Result<Tokenizer, TokenizerError> {
        if vocabulary.model != "gpt2" {
            return Err(TokenizerError::UnknownModel { found: vocabulary.model });
        }
        check_vocab_len(vocabulary.tokens.len())?;
        if vocabulary.add_bos && vocabulary.bos.is_none() {
            return Err(TokenizerError::MissingBos);
        }
        let family = family(&vocabulary.pre)?;
        let kinds = vocabulary.checked_kinds()?;
        let alphabet = ByteAlphabet::new();
        let fingerprint = fingerprint_of(&vocabulary);

        let mut tokens = TokenTable::default();
        let mut literals = Vec::new();
        for ((id, token), &kind) in (0_u32..).zip(&vocabulary.tokens).zip(&kinds) {
            let bytes = match kind {
                Kind::Text => alphabet.decode(token),
                Kind::Added | Kind::Control | Kind::Unused => None,
            };
            let control = kind == Kind::Control;
            tokens.push(token, bytes.as_deref().unwrap_or(token.as_bytes()), control);
            if matches!(kind, Kind::Added | Kind::Control) {
                literals.push(plain_literal(id, token, control));
            }
        }
        let words = byte_level_words(&vocabulary, &kinds, family)?;
        let encodable = Box::new(std::array::from_fn(|byte| {
            let char = alphabet.char(u8::try_from(byte).expect("an index below 256"));
            words.token_to_id(char.encode_utf8(&mut [0; 4])).is_some()
        }));
        let eos_ids = end_ids(&[vocabulary.eos, vocabulary.eot], &tokens);
        Ok(Tokenizer {
            words,
            literals: Literals::new(literals),
            tokens,
            encodable: Some(encodable),
            bos: vocabulary.bos,
            eos_ids,
            unknown: vocabulary.unknown,
            add_bos: vocabulary.add_bos,
            fingerprint,
        })
    }

    /// Builds a tokenizer from the bytes of a `tokenizer.json`, WordPiece or byte-level BPE.
    ///
    /// Truncation and padding that the file asks for are switched off: how many tokens fit is a
    /// property of the model, and a text cut in silence is a fault.
    ///
    /// # Errors
    /// [`TokenizerError::Library`] if the file is not a tokenizer, and
    /// [`TokenizerError::UnsupportedJson`] for a decoder whose tokens have no fixed bytes.
    pub fn from_json(json: &[u8]) -> Result<Tokenizer, TokenizerError> {
        let mut words = tokenizers::Tokenizer::from_bytes(json).map_err(|source| {
            TokenizerError::Library { doing: "reading tokenizer.json", source }
        })?;
        let truncation_off = words.with_truncation(None).map(|_| ());
        truncation_off.map_err(|source| TokenizerError::Library {
            doing: "reading tokenizer.json",
            source,
        })?;
        words.with_padding(None);
        words.set_encode_special_tokens(true);

        let unknown = match words.get_model() {
            ModelWrapper::WordPiece(model) => words.token_to_id(&model.unk_token),
            ModelWrapper::BPE(model) => {
                model.unk_token.as_ref().and_then(|token| words.token_to_id(token))
            }
            ModelWrapper::WordLevel(_) | ModelWrapper::Unigram(_) => {
                return Err(TokenizerError::UnsupportedJson {
                    field: "model.type",
                    found: "WordLevel or Unigram".to_owned(),
                });
            }
        };
        let (tokens, literals) = json_tokens(&words)?;
        let encodable =
            matches!(words.get_decoder(), Some(DecoderWrapper::ByteLevel(_))).then(|| {
                let alphabet = ByteAlphabet::new();
                Box::new(std::array::from_fn(|byte| {
                    let char = alphabet.char(u8::try_from(byte).expect("an index below 256"));
                    unknown.is_some()
                        || tokens.ids.contains_key(char.encode_utf8(&mut [0; 4]) as &str)
                }))
            });
        let mut fingerprint = Fingerprint::new();
        fingerprint.field(b"tokenizer.json");
        fingerprint.field(json);
        Ok(Tokenizer {
            literals: Literals::new(literals),
            encodable,
            bos: None,
            eos_ids: end_ids(&[], &tokens),
            unknown,
            add_bos: false,
            fingerprint: fingerprint.finish(),
            tokens,
            words,
        })
    }

    /// Token ids of `text`, and nothing around them: no BOS, no `[CLS]`.
    ///
    /// # Errors
    /// [`TokenizerError::Unencodable`] if the vocabulary has no token for a byte of the text.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, TokenizerError> {
        let permitted = specials == Specials::Parse;
        Ok(self.encode_where(text, &|_| permitted)?.into_iter().map(|(id, _)| id).collect())
    }

    /// Token ids of `text` with [`Specials::AsText`], each with its byte range in `text`.
    ///
    /// Ranges are in order and start and end between characters; a character cut into several
    /// tokens gives each of them its whole range.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(
        &self,
        text: &str,
    ) -> Result<Vec<(u32, Range<usize>)>, TokenizerError> {
        self.encode_where(text, &|_| false)
    }

    /// Number of tokens of `text` with [`Specials::AsText`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn count(&self, text: &str) -> Result<usize, TokenizerError> {
        Ok(self.encode_with_offsets(text)?.len())
    }

    /// `ids` inside what an encoder model expects around them (`[CLS] … [SEP]` for BERT), as the
    /// post-processor of `tokenizer.json` says. Without one the ids come back unchanged.
    ///
    /// # Errors
    /// [`TokenizerError::Library`] if the post-processor fails.
    pub fn wrap_sentence(&self, ids: &[u32]) -> Result<Vec<u32>, TokenizerError> {
        let tokens = ids.iter().map(|&id| tokenizers::Token::new(id, String::new(), (0, 0)));
        let encoding = tokenizers::Encoding::from_tokens(tokens.collect(), 0);
        let wrapped = self.words.post_process(encoding, None, true).map_err(|source| {
            TokenizerError::Library { doing: "adding the tokens around a sentence", source }
        })?;
        Ok(wrapped.get_ids().to_vec())
    }

    /// Text of `ids`: the concatenation of [`Tokenizer::token_bytes`], invalid UTF-8 replaced.
    /// Control tokens show their literal; skip them with [`Tokenizer::is_control`] if that is
    /// not wanted. Ids outside the vocabulary give nothing.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> =
            ids.iter().filter_map(|&id| self.token_bytes(id)).flatten().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Raw bytes that token `id` stands for, possibly half a character; `None` outside the
    /// vocabulary. WordPiece tokens give their text without `##`.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokens.bytes(id)
    }

    /// Id of the token whose literal, in the alphabet of the vocabulary, is `literal`.
    #[must_use]
    pub fn token_id(&self, literal: &str) -> Option<u32> {
        self.tokens.ids.get(literal).copied()
    }

    /// Whether `id` steers the model and is no text for a reader.
    #[must_use]
    pub fn is_control(&self, id: u32) -> bool {
        self.tokens.control.get(id as usize).copied().unwrap_or(false)
    }

    /// Number of token ids, V. A model may have more rows (padding); they must be masked.
    #[must_use]
    pub fn vocab_len(&self) -> usize {
        self.tokens.control.len()
    }

    /// First token of a sequence, if the vocabulary names one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens after which generation ends: the `eos` and `eot` of the file and every end-of-turn
    /// literal in the vocabulary, ascending.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Whether [`Tokenizer::bos`] belongs before every sequence.
    #[must_use]
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// SHA-256 over everything that decides about ids (`tok_fp`), 64 hexadecimal digits.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The first control-token literal in `text`, if there is one.
    #[must_use]
    pub fn control_literal_in(&self, text: &str) -> Option<&str> {
        self.literals.first_control(text)
    }

    /// Control ids of `text`, where `permitted` accepts the byte range of their literal.
    pub(crate) fn controls_where(
        &self,
        text: &str,
        permitted: &dyn Fn(Range<usize>) -> bool,
    ) -> Vec<u32> {
        let found = self.literals.find(text, permitted);
        found.into_iter().filter(|it| it.control).map(|it| it.id).collect()
    }

    /// Ids with byte ranges; a control literal becomes its id where `permitted` accepts its range.
    pub(crate) fn encode_where(
        &self,
        text: &str,
        permitted: &dyn Fn(Range<usize>) -> bool,
    ) -> Result<Vec<(u32, Range<usize>)>, TokenizerError> {
        let mut ids = Vec::new();
        let mut at = 0;
        for Occurrence { id, span, .. } in self.literals.find(text, permitted) {
            self.encode_words(text, at..span.start, &mut ids)?;
            at = span.end;
            ids.push((id, span));
        }
        self.encode_words(text, at..text.len(), &mut ids)?;
        Ok(ids)
    }

    /// Appends the ids of a stretch without literals.
    fn encode_words(
        &self,
        text: &str,
        stretch: Range<usize>,
        ids: &mut Vec<(u32, Range<usize>)>,
    ) -> Result<(), TokenizerError> {
        if stretch.is_empty() {
            return Ok(());
        }
        let base = stretch.start;
        let part = &text[stretch];
        if let Some(encodable) = &self.encodable
            && let Some(at) = part.bytes().position(|byte| !encodable[usize::from(byte)])
        {
            let byte = part.as_bytes()[at];
            return Err(TokenizerError::Unencodable { offset: base + at, byte });
        }
        let encoding = self
            .words
            .encode(part, false)
            .map_err(|source| TokenizerError::Library { doing: "encoding text", source })?;
        for (&id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            let span = base + start..base + end;
            if self.is_control(id) && self.unknown != Some(id) {
                return Err(TokenizerError::ControlFromText { id, span });
            }
            ids.push((id, span));
        }
        Ok(())
    }
}

fn check_vocab_len(found: usize) -> Result<(), TokenizerError> {
    if found == 0 || found > MAX_VOCAB_LEN {
        return Err(TokenizerError::VocabularySize { found, limit: MAX_VOCAB_LEN });
    }
    Ok(())
}

fn plain_literal(id: u32, text: &str, control: bool) -> Literal {
    Literal { id, text: text.to_owned(), control, takes_left: false, takes_right: false }
}

/// The part that cuts and merges. Control tokens are not in it, so merges cannot produce one.
fn byte_level_words(
    vocabulary: &Vocabulary,
    kinds: &[Kind],
    family: Family,
) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let mut ids: HashMap<&str, u32> = HashMap::with_capacity(vocabulary.tokens.len());
    for ((id, token), &kind) in (0_u32..).zip(&vocabulary.tokens).zip(kinds) {
        if kind == Kind::Text && !token.is_empty() {
            ids.entry(token).or_insert(id);
        }
    }
    let merges = vocabulary.checked_merges(&ids)?;
    let mut table = Vocab::default();
    table.extend(ids.into_iter().map(|(token, id)| (token.to_owned(), id)));
    let model = BPE::builder()
        .vocab_and_merges(table, merges)
        .ignore_merges(family.ignore_merges)
        .build()
        .map_err(|source| TokenizerError::Library { doing: "building the merges", source })?;
    let mut words = tokenizers::Tokenizer::new(model);
    words.with_pre_tokenizer(Some(family.pre_tokenizer));
    if let Some(normalizer) = family.normalizer {
        let normalized = words.with_normalizer(Some(normalizer)).map(|_| ());
        normalized.map_err(|source| TokenizerError::Library {
            doing: "setting the normalizer",
            source,
        })?;
    }
    Ok(words)
}

/// Token table and control literals of a `tokenizer.json`.
fn json_tokens(
    words: &tokenizers::Tokenizer,
) -> Result<(TokenTable, Vec<Literal>), TokenizerError> {
    let vocabulary = words.get_vocab(true);
    let vocab_len = vocabulary.values().max().map_or(0, |&last| last as usize + 1);
    check_vocab_len(vocab_len)?;
    let mut by_id = vec![None; vocab_len];
    for (token, id) in &vocabulary {
        by_id[*id as usize] = Some(token.as_str());
    }
    let added = words.get_added_tokens_decoder();
    let alphabet = ByteAlphabet::new();
    let mut tokens = TokenTable::default();
    let mut literals = Vec::new();
    for (id, token) in (0_u32..).zip(by_id) {
        let token = token.unwrap_or_default();
        let special = added.get(&id).filter(|token| token.special);
        let bytes = match words.get_decoder() {
            _ if added.contains_key(&id) => token.as_bytes().to_vec(),
            Some(DecoderWrapper::ByteLevel(_)) => {
                alphabet.decode(token).unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Some(DecoderWrapper::WordPiece(decoder)) => {
                token.strip_prefix(&decoder.prefix).unwrap_or(token).as_bytes().to_vec()
            }
            other => {
                let found = other.map_or_else(|| "none".to_owned(), |it| format!("{it:?}"));
                return Err(TokenizerError::UnsupportedJson { field: "decoder", found });
            }
        };
        tokens.push(token, &bytes, special.is_some());
        if let Some(special) = special {
            let mut literal = plain_literal(id, token, true);
            literal.takes_left = special.lstrip;
            literal.takes_right = special.rstrip;
            literals.push(literal);
        }
    }
    Ok((tokens, literals))
}

/// `named` ids and every end-of-turn literal that is a control token, ascending.
fn end_ids(named: &[Option<u32>], tokens: &TokenTable) -> Vec<u32> {
    let known = tokens.ids.iter().filter(|(literal, _)| ends_turn(literal)).map(|(_, &id)| id);
    let mut ids: Vec<u32> = named.iter().flatten().copied().chain(known).collect();
    ids.retain(|&id| tokens.control[id as usize]);
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn fingerprint_of(vocabulary: &Vocabulary) -> String {
    let mut fingerprint = Fingerprint::new();
    fingerprint.field(b"gguf byte-level bpe 1");
    fingerprint.field(vocabulary.model.as_bytes());
    fingerprint.field(vocabulary.pre.as_bytes());
    for list in [&vocabulary.tokens, &vocabulary.merges] {
        fingerprint.field(&(list.len() as u64).to_le_bytes());
        for item in list {
            fingerprint.field(item.as_bytes());
        }
    }
    fingerprint.field(&(vocabulary.kinds.len() as u64).to_le_bytes());
    for kind in &vocabulary.kinds {
        fingerprint.field(&kind.to_le_bytes());
    }
    let named = [vocabulary.bos, vocabulary.eos, vocabulary.eot, vocabulary.unknown];
    for id in named {
        fingerprint.field(id.map(u32::to_le_bytes).as_ref().map_or(&[], |bytes| bytes.as_slice()));
    }
    fingerprint.field(&[u8::from(vocabulary.add_bos)]);
    fingerprint.finish()
}
