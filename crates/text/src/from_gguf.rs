//! Tokenizers out of the vocabulary of a GGUF file.

use std::sync::Arc;

use tokenizers::models::bpe::Vocab;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;

use crate::TokenizerError;
use crate::bpe::{Bpe, BytePairs};
use crate::charsmap::CharsMap;
use crate::normaliser::{Normaliser, SPACE};
use crate::pieces::Pieces;
use crate::pre_tokenizer::{Family, family};
use crate::sentencepiece::SentencePiece;
use crate::sha256::Fingerprint;
use crate::specials::{Literal, Literals};
use crate::spellings::Spellings;
use crate::token_table::{TokenTable, check_vocab_len};
use crate::tokenizer::{Around, Tokenizer, end_ids};
use crate::unigram::Unigram;
use crate::vocabulary::{ByteAlphabet, Kind, Vocabulary, byte_of};
use crate::words::{Library, Step, Words};

/// Longest literal that is looked for in text; the search costs this per byte of text.
pub(crate) const MAX_LITERAL_BYTES: usize = 4096;
/// Longest piece of a Unigram vocabulary, for the same reason; published ones stay below 200.
const MAX_PIECE_BYTES: usize = 512;
/// A word with more characters is unknown (`max_input_chars_per_word` of BERT).
const MAX_WORD_CHARS: usize = 100;
/// Tokens of Phi-3 that leave the white space after them (`added_tokens` of its `tokenizer.json`).
const KEEPS_RIGHT: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

impl Tokenizer {
    /// Builds a tokenizer from the vocabulary of a GGUF file.
    ///
    /// # Errors
    /// Anything in the vocabulary that is inconsistent or not supported, by name.
    pub fn from_vocabulary(vocabulary: Vocabulary) -> Result<Tokenizer, TokenizerError> {
        let mut vocabulary = vocabulary;
        check_vocab_len(vocabulary.tokens.len())?;
        let is_bert = vocabulary.model == "bert";
        if is_bert {
            vocabulary.bos = vocabulary.bos.or(find(&vocabulary, "[CLS]"));
            vocabulary.separator = vocabulary.separator.or(find(&vocabulary, "[SEP]"));
            vocabulary.unknown = vocabulary.unknown.or(find(&vocabulary, "[UNK]"));
        }
        if vocabulary.add_bos && vocabulary.bos.is_none() {
            return Err(TokenizerError::MissingBos);
        }
        let kinds = vocabulary.checked_kinds()?;
        let fingerprint = fingerprint_of(&vocabulary);
        let spelling = match vocabulary.model.as_str() {
            "gpt2" => Spelling::Bytes(Box::new(ByteAlphabet::new())),
            "llama" | "t5" => Spelling::Spaces,
            "bert" => Spelling::Words,
            _ => return Err(TokenizerError::UnknownModel { found: vocabulary.model }),
        };
        let (tokens, literals) = tokens(&vocabulary, &kinds, &spelling)?;
        let words = words(&vocabulary, &kinds, &spelling, tokens.spellings())?;
        let encodable = match &words {
            Words::BytePairs(words) => Some(words.encodable.clone()),
            Words::Library(_) | Words::SentencePiece(_) | Words::Unigram(_) => None,
        };
        let has_space_prefix = match &spelling {
            Spelling::Bytes(_) => false,
            Spelling::Spaces => vocabulary.add_space_prefix,
            Spelling::Words => true,
        };
        let around = if is_bert {
            Around::Tokens { before: vocabulary.bos, after: vocabulary.separator }
        } else {
            Around::Tokens {
                before: vocabulary.bos.filter(|_| vocabulary.add_bos),
                after: vocabulary.eos.filter(|_| vocabulary.add_eos),
            }
        };
        Ok(Tokenizer {
            words,
            literals: Literals::new(literals),
            encodable,
            bos: vocabulary.bos,
            eos_ids: end_ids(&[vocabulary.eos, vocabulary.eot], &tokens),
            unknown: vocabulary.unknown,
            add_bos: vocabulary.add_bos,
            around,
            has_space_prefix,
            fingerprint,
            tokens,
        })
    }
}

/// How a vocabulary writes its tokens.
enum Spelling {
    /// In the byte alphabet.
    Bytes(Box<ByteAlphabet>),
    /// With U+2581 for a space.
    Spaces,
    /// With U+2581 before what starts a word.
    Words,
}

impl Spelling {
    /// The bytes that an ordinary token stands for.
    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Spelling::Bytes(alphabet) => {
                alphabet.decode(token).unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Spelling::Spaces => token.replace(SPACE, " ").into_bytes(),
            Spelling::Words => word_piece_text(
                token.strip_prefix(SPACE).is_some(),
                token.trim_start_matches(SPACE),
            )
            .into_bytes(),
        }
    }
}

/// Text of a `WordPiece` token within a sentence, as the decoder of BERT's `tokenizer.json`
/// writes it: a space before a word, but none before these marks and endings.
pub(crate) fn word_piece_text(starts_word: bool, token: &str) -> String {
    if !starts_word {
        return token.to_owned();
    }
    let adjoins = token.starts_with(['.', '?', '!', ','])
        || ["n't", "'m", "'s", "'ve", "'re"].iter().any(|ending| token.starts_with(ending));
    if adjoins { token.to_owned() } else { format!(" {token}") }
}

fn find(vocabulary: &Vocabulary, literal: &str) -> Option<u32> {
    let at = vocabulary.tokens.iter().position(|token| token == literal)?;
    u32::try_from(at).ok()
}

fn tokens(
    vocabulary: &Vocabulary,
    kinds: &[Kind],
    spelling: &Spelling,
) -> Result<(TokenTable, Vec<Literal>), TokenizerError> {
    let spellings = Spellings::of(vocabulary.tokens.iter().map(String::as_str))?;
    let mut tokens = TokenTable::new(Arc::new(spellings));
    let mut literals = Vec::new();
    for ((id, token), &kind) in (0_u32..).zip(&vocabulary.tokens).zip(kinds) {
        let control = kind == Kind::Control;
        let bytes = match (kind, spelling) {
            (Kind::Byte, Spelling::Spaces) => {
                byte_of(token).map_or_else(|| token.as_bytes().to_vec(), |byte| vec![byte])
            }
            (Kind::Text | Kind::Byte, _) | (Kind::Added | Kind::Unused, Spelling::Spaces) => {
                spelling.bytes(token)
            }
            (Kind::Added | Kind::Control | Kind::Unused, _) => token.as_bytes().to_vec(),
        };
        // Sentencepiece looks for its own added pieces in normalised text. A model that puts a
        // space before each text has none: there they are additions of a fine-tuning, and the
        // text after one begins anew.
        let in_words = kind == Kind::Added && takes_added_pieces(vocabulary);
        if matches!(kind, Kind::Added | Kind::Control) && !in_words {
            let text =
                if control { token.clone() } else { String::from_utf8_lossy(&bytes).into_owned() };
            let takes_right =
                control && vocabulary.strips_right && !KEEPS_RIGHT.contains(&token.as_str());
            let text = checked_literal(id, text)?;
            literals.push(Literal { id, text, control, takes_right, ..Literal::default() });
        }
        tokens.push(&bytes, control);
    }
    Ok((tokens, literals))
}

fn words(
    vocabulary: &Vocabulary,
    kinds: &[Kind],
    spelling: &Spelling,
    spellings: &Arc<Spellings>,
) -> Result<Words, TokenizerError> {
    match spelling {
        Spelling::Bytes(alphabet) => {
            let Family { normalizer, steps, whole_words } = family(&vocabulary.pre)?;
            let ids = text_ids(vocabulary, kinds);
            let bpe = Bpe::new(Arc::clone(spellings), ids, &vocabulary.merges, whole_words)?;
            let encodable = bpe.encodable(alphabet);
            Ok(Words::BytePairs(Box::new(BytePairs { normalizer, steps, bpe, encodable })))
        }
        Spelling::Words => word_pieces(vocabulary, kinds),
        Spelling::Spaces => {
            let pieces = Pieces::new(vocabulary, kinds, spellings)?;
            let is_unigram = vocabulary.model == "t5";
            let has_map = is_unigram && !vocabulary.precompiled_charsmap.is_empty();
            let normaliser = Normaliser {
                space_prefix: vocabulary.add_space_prefix,
                collapse_spaces: vocabulary.remove_extra_whitespaces,
                charsmap: has_map
                    .then(|| CharsMap::parse(&vocabulary.precompiled_charsmap))
                    .transpose()?,
            };
            if !is_unigram {
                let added = if takes_added_pieces(vocabulary) {
                    added_pieces(vocabulary, kinds)?
                } else {
                    Vec::new()
                };
                let added = Literals::new(added);
                return Ok(Words::SentencePiece(SentencePiece { pieces, added, normaliser }));
            }
            let long = pieces.iter().find(|(piece, _)| piece.len() > MAX_PIECE_BYTES);
            if let Some((piece, id)) = long {
                let found = piece.len();
                return Err(TokenizerError::TokenTooLong { id, limit: MAX_PIECE_BYTES, found });
            }
            Ok(Words::Unigram(Unigram::new(pieces, normaliser, kinds)))
        }
    }
}

fn takes_added_pieces(vocabulary: &Vocabulary) -> bool {
    vocabulary.model == "llama" && !vocabulary.add_space_prefix
}

/// Added tokens as they stand in normalised text.
fn added_pieces(vocabulary: &Vocabulary, kinds: &[Kind]) -> Result<Vec<Literal>, TokenizerError> {
    let mut added = Vec::new();
    for ((id, token), kind) in (0_u32..).zip(&vocabulary.tokens).zip(kinds) {
        if *kind == Kind::Added {
            let text = checked_literal(id, token.replace(' ', &SPACE.to_string()))?;
            added.push(Literal { id, text, ..Literal::default() });
        }
    }
    Ok(added)
}

fn checked_literal(id: u32, text: String) -> Result<String, TokenizerError> {
    if text.len() > MAX_LITERAL_BYTES {
        let found = text.len();
        return Err(TokenizerError::TokenTooLong { id, limit: MAX_LITERAL_BYTES, found });
    }
    Ok(text)
}

/// Ordinary tokens. Control tokens are not among them, so merges cannot give one.
fn text_ids<'a>(vocabulary: &'a Vocabulary, kinds: &'a [Kind]) -> impl Iterator<Item = u32> + 'a {
    let tokens = (0_u32..).zip(&vocabulary.tokens).zip(kinds);
    let ordinary = tokens
        .filter(|((_, token), kind)| matches!(kind, Kind::Text | Kind::Byte) && !token.is_empty());
    ordinary.map(|((id, _), _)| id)
}

/// BERT's tokenizer. GGUF writes U+2581 before what starts a word and drops the `##` of the rest.
fn word_pieces(vocabulary: &Vocabulary, kinds: &[Kind]) -> Result<Words, TokenizerError> {
    let missing = |role, literal| TokenizerError::MissingToken { role, literal };
    let unknown = vocabulary.unknown.ok_or(missing("unknown", "[UNK]"))?;
    vocabulary.bos.ok_or(missing("first", "[CLS]"))?;
    vocabulary.separator.ok_or(missing("last", "[SEP]"))?;
    let mut table = Vocab::default();
    for id in text_ids(vocabulary, kinds) {
        let token = vocabulary.tokens[id as usize].as_str();
        if vocabulary.lowercase.is_none() && token.to_lowercase() != token {
            return Err(TokenizerError::UnknownCase { id, token: token.to_owned() });
        }
        let spelled = token.strip_prefix(SPACE).map_or_else(|| format!("##{token}"), str::to_owned);
        table.entry(spelled).or_insert(id);
    }
    let unknown_literal = vocabulary.tokens[unknown as usize].clone();
    table.insert(unknown_literal.clone(), unknown);
    let model = WordPiece::builder()
        .vocab(table)
        .unk_token(unknown_literal)
        .continuing_subword_prefix("##".to_owned())
        .max_input_chars_per_word(MAX_WORD_CHARS)
        .build()
        .map_err(|source| TokenizerError::Library { doing: "building the word pieces", source })?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let lowercase = vocabulary.lowercase.unwrap_or(true);
    let normalizer = BertNormalizer::new(true, true, vocabulary.strip_accents, lowercase);
    let normalized = tokenizer.with_normalizer(Some(normalizer)).map(|_| ());
    normalized
        .map_err(|source| TokenizerError::Library { doing: "setting the normalizer", source })?;
    let steps = vec![Step::Other(BertPreTokenizer.into())];
    Ok(Words::Library(Box::new(Library { tokenizer, steps })))
}

fn fingerprint_of(vocabulary: &Vocabulary) -> String {
    let mut fingerprint = Fingerprint::new();
    fingerprint.field(b"gguf vocabulary 2");
    fingerprint.field(vocabulary.model.as_bytes());
    fingerprint.field(vocabulary.pre.as_bytes());
    for list in [&vocabulary.tokens, &vocabulary.merges] {
        fingerprint.field(&(list.len() as u64).to_le_bytes());
        for item in list {
            fingerprint.field(item.as_bytes());
        }
    }
    for list in [
        vocabulary.kinds.iter().flat_map(|kind| kind.to_le_bytes()).collect::<Vec<u8>>(),
        vocabulary.scores.iter().flat_map(|score| score.to_le_bytes()).collect(),
        vocabulary.precompiled_charsmap.clone(),
    ] {
        fingerprint.field(&list);
    }
    let Vocabulary { bos, eos, eot, unknown, separator, .. } = vocabulary;
    for id in [bos, eos, eot, unknown, separator] {
        fingerprint.field(id.map(u32::to_le_bytes).as_ref().map_or(&[], |bytes| bytes.as_slice()));
    }
    fingerprint.field(&[
        u8::from(vocabulary.add_bos),
        u8::from(vocabulary.add_eos),
        u8::from(vocabulary.add_space_prefix),
        u8::from(vocabulary.remove_extra_whitespaces),
        vocabulary.lowercase.map_or(2, u8::from),
        vocabulary.strip_accents.map_or(2, u8::from),
        u8::from(vocabulary.strips_right),
    ]);
    fingerprint.finish()
}
