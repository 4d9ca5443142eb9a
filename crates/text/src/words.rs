//! From a stretch of text without literals to ids: one of four ways, by kind of vocabulary.

use std::ops::Range;

use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::tokenizer::pattern::Invert;
use tokenizers::{
    Encoding, Model as _, OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper,
    SplitDelimiterBehavior,
};

use crate::TokenizerError;
use crate::bpe::BytePairs;
use crate::sentencepiece::SentencePiece;
use crate::splitter::Splitter;
use crate::unigram::Unigram;

/// What turns text into ids.
#[derive(Debug)]
pub(crate) enum Words {
    /// Normaliser and model of the `tokenizers` crate, with our own cutting.
    Library(Box<Library>),
    /// Merges by rank, with our own cutting.
    BytePairs(Box<BytePairs>),
    /// Merges by score.
    SentencePiece(SentencePiece),
    /// The most likely pieces.
    Unigram(Unigram),
}

/// An id with its byte range in the text.
pub(crate) type Spanned = (u32, Range<usize>);

/// Ids of an encoding.
pub(crate) fn spanned(encoding: &Encoding) -> Vec<Spanned> {
    let ids = encoding.get_ids().iter().copied();
    ids.zip(encoding.get_offsets().iter().map(|&(start, end)| start..end)).collect()
}

/// Where a stretch stands in its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At the start.
    First,
    /// After a literal.
    Later,
}

/// Parts of the `tokenizers` crate. The pre-tokenizer is not in `tokenizer` but in `steps`.
#[derive(Debug)]
pub(crate) struct Library {
    pub(crate) tokenizer: tokenizers::Tokenizer,
    pub(crate) steps: Vec<Step>,
}

/// One step of cutting text into words.
#[derive(Debug)]
pub(crate) enum Step {
    /// A space goes before each word that has none.
    Prefix,
    /// Cuts by a pattern.
    Split {
        /// What is looked for.
        splitter: Splitter,
        /// What happens to it.
        behavior: SplitDelimiterBehavior,
        /// What is looked for is what lies between.
        invert: bool,
    },
    /// Spaces become U+2581, with one before the text, if at all, at its very start.
    FirstSpace(Metaspace),
    /// Any other step of the crate.
    Other(PreTokenizerWrapper),
}

impl Step {
    /// Every match is a word.
    pub(crate) fn isolate(splitter: Splitter) -> Step {
        Step::Split { splitter, behavior: SplitDelimiterBehavior::Isolated, invert: false }
    }

    /// Bytes become the characters of the byte alphabet.
    pub(crate) fn bytes() -> Step {
        Step::Other(ByteLevel::new(false, false, false).into())
    }

    pub(crate) fn run(
        &self,
        text: &mut PreTokenizedString,
        place: Place,
    ) -> tokenizers::Result<()> {
        match self {
            Step::Prefix => text.split(|_, mut word| {
                if !word.get().starts_with(' ') {
                    word.prepend(" ");
                }
                Ok(vec![word])
            }),
            Step::Split { splitter, behavior, invert: false } => {
                text.split(|_, word| word.split(splitter, *behavior))
            }
            Step::Split { splitter, behavior, invert: true } => {
                text.split(|_, word| word.split(Invert(splitter), *behavior))
            }
            Step::FirstSpace(step) => match place {
                Place::First => step.pre_tokenize(text),
                Place::Later => {
                    let mut later = step.clone();
                    later.set_prepend_scheme(PrependScheme::Never);
                    later.pre_tokenize(text)
                }
            },
            Step::Other(step) => step.pre_tokenize(text),
        }
    }
}

impl Library {
    fn encode(&self, text: &str, place: Place) -> tokenizers::Result<Vec<Spanned>> {
        let added = self.tokenizer.get_added_vocabulary();
        let mut text = added.extract_and_normalize(self.tokenizer.get_normalizer(), text);
        for step in &self.steps {
            step.run(&mut text, place)?;
        }
        self.tokenizer.get_model().tokenize_in_pretokenized(&mut text, None)?;
        Ok(spanned(&text.into_encoding(None, 0, OffsetType::Byte)?))
    }
}

impl Words {
    /// Ids of `text` with their byte ranges in it.
    pub(crate) fn encode(&self, text: &str, place: Place) -> Result<Vec<Spanned>, TokenizerError> {
        let fault = |source| TokenizerError::Library { doing: "encoding text", source };
        match self {
            Words::Library(library) => library.encode(text, place).map_err(fault),
            Words::BytePairs(words) => words.encode(text, place),
            Words::SentencePiece(words) => words.encode(text),
            Words::Unigram(words) => words.encode(text),
        }
    }
}
