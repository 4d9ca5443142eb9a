//! Text to token ids and back.
//!
//! How text becomes pieces depends on the vocabulary ([`crate::words`]). Here stand the things
//! where a fault is silent: which literals become control ids, which bytes a token stands for,
//! and what the tokenizer refuses instead of dropping.

use std::ops::Range;

use crate::specials::{Literals, Occurrence, Specials};
use crate::token_table::TokenTable;
use crate::vocabulary::ends_turn;
use crate::words::{Place, Words};
use crate::{Detokenizer, TokenizerError};

/// A vocabulary ready for use. Immutable; share it behind an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    pub(crate) words: Words,
    pub(crate) literals: Literals,
    pub(crate) tokens: TokenTable,
    /// Bytes that have a token of their own; `None` if unknown text has a token.
    pub(crate) encodable: Option<Box<[bool; 256]>>,
    pub(crate) bos: Option<u32>,
    pub(crate) eos_ids: Vec<u32>,
    pub(crate) unknown: Option<u32>,
    pub(crate) add_bos: bool,
    pub(crate) around: Around,
    /// Encoding puts a space before the text, so decoding takes it away.
    pub(crate) has_space_prefix: bool,
    pub(crate) fingerprint: String,
}

/// What an encoder model expects around a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Around {
    /// As the post-processor of `tokenizer.json` says.
    PostProcessor,
    /// These tokens.
    Tokens {
        /// Before it.
        before: Option<u32>,
        /// After it.
        after: Option<u32>,
    },
}

impl Tokenizer {
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
    /// GGUF file or the post-processor of `tokenizer.json` says. Without one the ids come back
    /// unchanged.
    ///
    /// # Errors
    /// [`TokenizerError::Library`] if the post-processor fails.
    pub fn wrap_sentence(&self, ids: &[u32]) -> Result<Vec<u32>, TokenizerError> {
        let library = match (self.around, &self.words) {
            (Around::PostProcessor, Words::Library(library)) => library,
            (
                Around::PostProcessor,
                Words::BytePairs(_) | Words::SentencePiece(_) | Words::Unigram(_),
            ) => return Ok(ids.to_vec()),
            (Around::Tokens { before, after }, _) => {
                return Ok(before.into_iter().chain(ids.iter().copied()).chain(after).collect());
            }
        };
        let tokens = ids.iter().map(|&id| tokenizers::Token::new(id, String::new(), (0, 0)));
        let encoding = tokenizers::Encoding::from_tokens(tokens.collect(), 0);
        let wrapped = library.tokenizer.post_process(encoding, None, true).map_err(|source| {
            TokenizerError::Library { doing: "adding the tokens around a sentence", source }
        })?;
        Ok(wrapped.get_ids().to_vec())
    }

    /// Text of `ids`: the concatenation of [`Tokenizer::token_bytes`], invalid UTF-8 replaced,
    /// and without the space that encoding puts before a text.
    /// Control tokens show their literal; skip them with [`Tokenizer::is_control`] if that is
    /// not wanted. Ids outside the vocabulary give nothing.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut detokenizer = self.detokenizer();
        let bytes = ids.iter().filter_map(|&id| self.token_bytes(id));
        let mut text: String = bytes.map(|bytes| detokenizer.push(bytes)).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    /// A detokenizer for the start of a text: it leaves out the space that encoding puts there.
    /// For the continuation of a text take [`Detokenizer::new`].
    #[must_use]
    pub fn detokenizer(&self) -> Detokenizer {
        if self.has_space_prefix { Detokenizer::without_first_space() } else { Detokenizer::new() }
    }

    /// Raw bytes that token `id` stands for, possibly half a character; `None` outside the
    /// vocabulary. A `WordPiece` token that starts a word begins with a space.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokens.bytes(id)
    }

    /// Id of the token whose literal, in the alphabet of the vocabulary, is `literal`.
    #[must_use]
    pub fn token_id(&self, literal: &str) -> Option<u32> {
        self.tokens.id(literal)
    }

    /// Id of the token that a file beside the vocabulary names as `role`, such as `bos`.
    ///
    /// # Errors
    /// [`TokenizerError::NoSuchToken`] when the vocabulary does not have it.
    pub fn named_token(&self, role: &'static str, literal: &str) -> Result<u32, TokenizerError> {
        let missing = || TokenizerError::NoSuchToken { role, found: literal.to_owned() };
        self.token_id(literal).ok_or_else(missing)
    }

    /// Whether `id` steers the model and is no text for a reader.
    #[must_use]
    pub fn is_control(&self, id: u32) -> bool {
        self.tokens.is_control(id)
    }

    /// Number of token ids, V. A model may have more rows (padding); they must be masked.
    #[must_use]
    pub fn vocab_len(&self) -> usize {
        self.tokens.len()
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
        let place = if base == 0 { Place::First } else { Place::Later };
        let mut found = self.words.encode(part, place);
        if let Err(TokenizerError::Unencodable { offset, .. }) = &mut found {
            *offset += base;
        }
        for (id, Range { start, end }) in found? {
            let span = base + start..base + end;
            if self.is_control(id) && self.unknown != Some(id) {
                return Err(TokenizerError::ControlFromText { id, span });
            }
            ids.push((id, span));
        }
        Ok(())
    }
}

/// `named` ids and every end-of-turn literal that is a control token, ascending.
pub(crate) fn end_ids(named: &[Option<u32>], tokens: &TokenTable) -> Vec<u32> {
    let known = tokens.literals().filter(|(literal, _)| ends_turn(literal)).map(|(_, id)| id);
    let mut ids: Vec<u32> = named.iter().flatten().copied().chain(known).collect();
    ids.retain(|&id| tokens.is_control(id));
    ids.sort_unstable();
    ids.dedup();
    ids
}
