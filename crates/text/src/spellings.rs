//! [`Spellings`]: how the tokens of a vocabulary are written, in one piece of memory, and [`Index`],
//! which finds the id of a spelling.
//!
//! A vocabulary has up to 262,144 tokens, and several tables need their text: a string of its own
//! for every token and table costs an allocation and a header each.

use std::hash::BuildHasher as _;

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::TokenizerError;

/// The spellings of all tokens, one after another.
#[derive(Debug, Default)]
pub(crate) struct Spellings {
    text: String,
    /// (V) where each token ends in `text`.
    ends: Vec<u32>,
}

/// Text of all tokens together: far more than any vocabulary has.
const MAX_TEXT_BYTES: usize = 1 << 30;

impl Spellings {
    /// The spellings of `tokens`, in the order of their ids.
    ///
    /// # Errors
    /// [`TokenizerError::VocabularyText`] for more text than a vocabulary can have.
    pub(crate) fn of<'a>(
        tokens: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Spellings, TokenizerError> {
        let (limit, found) = (MAX_TEXT_BYTES, tokens.clone().map(str::len).sum());
        if found > limit {
            return Err(TokenizerError::VocabularyText { found, limit });
        }
        let mut text = String::with_capacity(found);
        let mut ends = Vec::with_capacity(tokens.clone().count());
        for token in tokens {
            text.push_str(token);
            ends.push(u32::try_from(text.len()).expect("the sum was checked"));
        }
        Ok(Spellings { text, ends })
    }

    /// How token `id` is written.
    ///
    /// # Panics
    /// When the vocabulary has no such token.
    pub(crate) fn get(&self, id: u32) -> &str {
        let id = id as usize;
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start as usize..self.ends[id] as usize]
    }

    /// Number of tokens, V.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }
}

/// Ids by spelling, for some tokens of a vocabulary.
#[derive(Debug, Default)]
pub(crate) struct Index {
    ids: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Index {
    /// Finds `ids`; of several that are written the same, the first.
    pub(crate) fn new(spellings: &Spellings, ids: impl Iterator<Item = u32>) -> Index {
        let mut index = Index::default();
        index.ids.reserve(spellings.len(), |_| 0);
        for id in ids {
            let spelling = spellings.get(id);
            let hash = index.hasher.hash_one(spelling);
            let is_same = |&other: &u32| spellings.get(other) == spelling;
            let rehash = |&other: &u32| index.hasher.hash_one(spellings.get(other));
            index.ids.entry(hash, is_same, rehash).or_insert(id);
        }
        index
    }

    /// Id of the token that is written like this.
    pub(crate) fn id(&self, spellings: &Spellings, spelling: &str) -> Option<u32> {
        let hash = self.hasher.hash_one(spelling);
        self.ids.find(hash, |&id| spellings.get(id) == spelling).copied()
    }

    /// All ids that can be found, in no order.
    pub(crate) fn ids(&self) -> impl Iterator<Item = u32> {
        self.ids.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_spellings_is_found_and_only_what_was_asked_for() {
        let spellings = Spellings::of(["a", "", "bc", "a", "d"].into_iter()).unwrap();
        assert_eq!((spellings.len(), spellings.get(0), spellings.get(1)), (5, "a", ""));
        assert_eq!((spellings.get(2), spellings.get(4)), ("bc", "d"));
        let index = Index::new(&spellings, [0, 2, 3].into_iter());
        let found = ["a", "bc", "d", ""].map(|it| index.id(&spellings, it));
        assert_eq!(found, [Some(0), Some(2), None, None]);
        let mut ids: Vec<u32> = index.ids().collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 2]);
    }

    #[test]
    fn more_text_than_a_vocabulary_has_is_refused() {
        let token = "x".repeat(1 << 20);
        let tokens = std::iter::repeat_n(token.as_str(), 1025);
        let error = Spellings::of(tokens).unwrap_err();
        let (limit, found) = (1 << 30, 1025 << 20);
        assert!(
            matches!(error, TokenizerError::VocabularyText { found: f, limit: l } if (f, l) == (found, limit)),
            "{error}"
        );
    }
}
