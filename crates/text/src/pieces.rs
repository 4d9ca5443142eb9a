//! The pieces of a sentencepiece vocabulary, and what becomes of text that has none.

use std::ops::Range;
use std::sync::Arc;

use crate::TokenizerError;
use crate::normaliser::Normalised;
use crate::spellings::{Index, Spellings};
use crate::vocabulary::{Kind, Vocabulary, byte_of};

/// Pieces with ids and scores. Control tokens are not among them, so no text can give one.
#[derive(Debug)]
pub(crate) struct Pieces {
    spellings: Arc<Spellings>,
    index: Index,
    /// (V) higher is better.
    scores: Vec<f32>,
    /// (V) pieces that may arise on the way but are taken apart again.
    unused: Vec<bool>,
    /// Tokens of the bytes that have one.
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    longest_bytes: usize,
}

/// A stretch of a normalised text, with its id if the vocabulary has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) id: Option<u32>,
    pub(crate) span: Range<usize>,
}

impl Pieces {
    /// Collects the pieces; scores must be finite and one per token.
    pub(crate) fn new(
        vocabulary: &Vocabulary,
        kinds: &[Kind],
        spellings: &Arc<Spellings>,
    ) -> Result<Pieces, TokenizerError> {
        let expected = vocabulary.tokens.len();
        if vocabulary.scores.len() != expected {
            let found = vocabulary.scores.len();
            return Err(TokenizerError::ScoreCount { expected, found });
        }
        if let Some(id) = vocabulary.scores.iter().position(|score| !score.is_finite()) {
            return Err(TokenizerError::BadScore { id, found: vocabulary.scores[id] });
        }
        let is_piece = |&(id, kind): &(u32, &Kind)| match kind {
            Kind::Text | Kind::Added | Kind::Unused => !spellings.get(id).is_empty(),
            Kind::Byte | Kind::Control => false,
        };
        let ids = (0_u32..).zip(kinds).filter(is_piece).map(|(id, _)| id);
        let mut pieces = Pieces {
            index: Index::new(spellings, ids),
            spellings: Arc::clone(spellings),
            scores: vocabulary.scores.clone(),
            unused: kinds.iter().map(|&kind| kind == Kind::Unused).collect(),
            bytes: [None; 256],
            unknown: vocabulary.unknown,
            longest_bytes: 0,
        };
        let longest = pieces.index.ids().map(|id| spellings.get(id).len()).max();
        pieces.longest_bytes = longest.unwrap_or(0);
        for (id, _) in (0_u32..).zip(kinds).filter(|it| *it.1 == Kind::Byte) {
            let token = spellings.get(id);
            let byte = byte_of(token)
                .ok_or_else(|| TokenizerError::BadByteToken { id, found: token.to_owned() })?;
            pieces.bytes[usize::from(byte)].get_or_insert(id);
        }
        Ok(pieces)
    }

    pub(crate) fn id(&self, piece: &str) -> Option<u32> {
        // Hashing a long text costs more than to see that it cannot be there.
        (piece.len() <= self.longest_bytes).then(|| self.index.id(&self.spellings, piece)).flatten()
    }

    pub(crate) fn score(&self, id: u32) -> f32 {
        self.scores[id as usize]
    }

    pub(crate) fn is_unused(&self, id: u32) -> bool {
        self.unused[id as usize]
    }

    /// All pieces with their ids, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.index.ids().map(|id| (self.spellings.get(id), id))
    }

    /// Ids of `pieces` with their ranges in the original text. What has no id becomes the tokens
    /// of its bytes, or one unknown token for a whole run
    /// (`SentencePieceProcessor::PopulateSentencePieceText`).
    pub(crate) fn tokens(
        &self,
        text: &Normalised,
        pieces: impl Iterator<Item = Piece>,
    ) -> Result<Vec<(u32, Range<usize>)>, TokenizerError> {
        let mut tokens: Vec<(u32, Range<usize>)> = Vec::new();
        let mut in_unknown = false;
        for Piece { id, span } in pieces {
            let origin = text.origin(span.clone());
            if let Some(id) = id {
                tokens.push((id, origin));
                in_unknown = false;
                continue;
            }
            for byte in text.text[span].bytes() {
                let known = self.bytes[usize::from(byte)];
                let Some(id) = known.or(self.unknown) else {
                    return Err(TokenizerError::Unencodable { offset: origin.start, byte });
                };
                match tokens.last_mut().filter(|_| in_unknown && known.is_none()) {
                    Some(run) => run.1.end = origin.end,
                    None => tokens.push((id, origin.clone())),
                }
                in_unknown = known.is_none();
            }
        }
        Ok(tokens)
    }
}
