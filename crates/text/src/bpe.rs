//! Byte-level BPE: merges by rank (Sennrich et al. 2016, arXiv:1508.07909; `bpe/word.rs` of the
//! `tokenizers` crate, whose results these are).
//!
//! Of all neighbours that a merge joins, the pair of the best merge is joined first, and of equals
//! the leftmost. A heap finds it, a linked list joins it: n characters cost n · log n, whatever
//! they are. The crate's own model keeps every spelling three times; this one shares them with the
//! other tables of the tokenizer (what that is worth: `bench/record/kernels-cpu-2026-11-25.md`).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use hashbrown::HashMap;
use tokenizers::tokenizer::normalizer::Range as OffsetRange;
use tokenizers::{
    NormalizedString, Normalizer as _, NormalizerWrapper, OffsetType, PreTokenizedString, Token,
};

use crate::TokenizerError;
use crate::spellings::{Index, Spellings};
use crate::vocabulary::ByteAlphabet;
use crate::words::{Place, Spanned, Step, spanned};

/// A byte-level vocabulary with its way of cutting text into words.
#[derive(Debug)]
pub(crate) struct BytePairs {
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) steps: Vec<Step>,
    pub(crate) bpe: Bpe,
    /// Which bytes have a token of their own.
    pub(crate) encodable: Box<[bool; 256]>,
}

impl BytePairs {
    /// Ids of `text` with their byte ranges in it.
    pub(crate) fn encode(&self, text: &str, place: Place) -> Result<Vec<Spanned>, TokenizerError> {
        let fault = |source| TokenizerError::Library { doing: "encoding text", source };
        let mut text = NormalizedString::from(text);
        if let Some(normalizer) = &self.normalizer {
            normalizer.normalize(&mut text).map_err(fault)?;
        }
        // Composing characters makes other bytes than those of the text.
        let missing = |byte: u8| !self.encodable[usize::from(byte)];
        if let Some(at) = text.get().bytes().position(missing) {
            let origin = text.convert_offsets(OffsetRange::Normalized(at..at + 1));
            let offset = origin.map_or(0, |origin| origin.start);
            return Err(TokenizerError::Unencodable { offset, byte: text.get().as_bytes()[at] });
        }
        self.tokens(PreTokenizedString::from(text), place).map_err(fault)
    }

    fn tokens(
        &self,
        mut text: PreTokenizedString,
        place: Place,
    ) -> tokenizers::Result<Vec<Spanned>> {
        for step in &self.steps {
            step.run(&mut text, place)?;
        }
        text.tokenize(|word| self.bpe.tokens(word.get()))?;
        Ok(spanned(&text.into_encoding(None, 0, OffsetType::Byte)?))
    }
}

/// Tokens and merges.
#[derive(Debug)]
pub(crate) struct Bpe {
    spellings: Arc<Spellings>,
    /// Ordinary tokens. Control tokens are not among them, so no text can give one.
    index: Index,
    merges: HashMap<[u32; 2], Merge>,
    /// A word that is a token is not merged (`ignore_merges` of `tokenizer.json`).
    whole_words: bool,
}

/// What becomes of two neighbours; a smaller rank comes first.
#[derive(Clone, Copy, Debug)]
struct Merge {
    rank: u32,
    id: u32,
}

impl Bpe {
    /// Collects `merges` over the tokens `ids`, best first, each `left right`.
    ///
    /// # Errors
    /// [`TokenizerError::BadMerge`] for one whose parts or whose result is not a token.
    pub(crate) fn new(
        spellings: Arc<Spellings>,
        ids: impl Iterator<Item = u32>,
        merges: &[String],
        whole_words: bool,
    ) -> Result<Bpe, TokenizerError> {
        let index = Index::new(&spellings, ids);
        let mut bpe = Bpe { spellings, index, merges: HashMap::default(), whole_words };
        bpe.merges.reserve(merges.len());
        let mut joined = String::new();
        for (rank, merge) in merges.iter().enumerate() {
            let bad = || TokenizerError::BadMerge { rank, merge: merge.clone() };
            let (left, right) = merge.split_once(' ').ok_or_else(bad)?;
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let id = |spelling| bpe.id(spelling).ok_or_else(bad);
            let (pair, id) = ([id(left)?, id(right)?], id(&joined)?);
            let rank = u32::try_from(rank).map_err(|_| bad())?;
            bpe.merges.insert(pair, Merge { rank, id });
        }
        Ok(bpe)
    }

    fn id(&self, spelling: &str) -> Option<u32> {
        self.index.id(&self.spellings, spelling)
    }

    /// Which bytes have a token of their own.
    pub(crate) fn encodable(&self, alphabet: &ByteAlphabet) -> Box<[bool; 256]> {
        Box::new(std::array::from_fn(|byte| {
            let char = alphabet.char(u8::try_from(byte).expect("an index below 256"));
            self.id(char.encode_utf8(&mut [0; 4])).is_some()
        }))
    }

    /// Tokens of a word in the byte alphabet, with their byte ranges in it.
    fn tokens(&self, word: &str) -> tokenizers::Result<Vec<Token>> {
        let token = |id, start, end| Token::new(id, String::new(), (start, end));
        if self.whole_words
            && let Some(id) = self.id(word)
        {
            return Ok(vec![token(id, 0, word.len())]);
        }
        let mut merging = Merging { merges: &self.merges, symbols: self.symbols(word)? };
        merging.run();
        let left = merging.symbols.iter().filter(|symbol| symbol.start < symbol.end);
        Ok(left.map(|symbol| token(symbol.id, symbol.start, symbol.end)).collect())
    }

    /// One symbol a character.
    fn symbols(&self, word: &str) -> tokenizers::Result<Vec<Symbol>> {
        let n_chars = word.chars().count();
        let symbols = word.char_indices().enumerate().map(|(index, (start, char))| {
            let spelling = &word[start..start + char.len_utf8()];
            let id = self.id(spelling);
            let id = id.ok_or_else(|| format!("the vocabulary has no token for {char:?}"))?;
            let prev = index.checked_sub(1).unwrap_or(NONE);
            let next = if index + 1 < n_chars { index + 1 } else { NONE };
            Ok(Symbol { id, start, end: start + char.len_utf8(), prev, next })
        });
        symbols.collect()
    }
}

/// No neighbour.
const NONE: usize = usize::MAX;

/// A stretch of the word; empty after it was joined to its left neighbour.
#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    start: usize,
    end: usize,
    prev: usize,
    next: usize,
}

struct Merging<'a> {
    merges: &'a HashMap<[u32; 2], Merge>,
    symbols: Vec<Symbol>,
}

/// A pair that can be joined, by rank, then place; stale if its symbols no longer join to this id.
type Candidate = Reverse<(u32, usize, u32)>;

impl Merging<'_> {
    fn run(&mut self) {
        let pairs = 0..self.symbols.len().saturating_sub(1);
        let mut heap: BinaryHeap<Candidate> =
            pairs.filter_map(|left| self.candidate(left)).collect();
        while let Some(Reverse((rank, left, id))) = heap.pop() {
            if self.candidate(left) != Some(Reverse((rank, left, id))) {
                continue;
            }
            self.join(left, id);
            let prev = self.symbols[left].prev;
            let changed = [prev, left].into_iter().filter(|&it| it != NONE);
            heap.extend(changed.filter_map(|left| self.candidate(left)));
        }
    }

    /// The merge of a symbol with its right neighbour.
    fn candidate(&self, left: usize) -> Option<Candidate> {
        let symbol = self.symbols[left];
        if symbol.start == symbol.end || symbol.next == NONE {
            return None;
        }
        let merge = self.merges.get(&[symbol.id, self.symbols[symbol.next].id])?;
        Some(Reverse((merge.rank, left, merge.id)))
    }

    fn join(&mut self, left: usize, id: u32) {
        let right = self.symbols[left].next;
        let Symbol { start, end, next, .. } = self.symbols[right];
        self.symbols[right].end = start;
        self.symbols[left].id = id;
        self.symbols[left].end = end;
        self.symbols[left].next = next;
        if next != NONE {
            self.symbols[next].prev = left;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bpe(tokens: &[&str], merges: &[&str], whole_words: bool) -> Result<Bpe, TokenizerError> {
        let spellings = Spellings::of(tokens.iter().copied())?;
        let ids = 0..u32::try_from(tokens.len()).unwrap();
        let merges: Vec<String> = merges.iter().map(ToString::to_string).collect();
        Bpe::new(Arc::new(spellings), ids, &merges, whole_words)
    }

    fn spans(bpe: &Bpe, word: &str) -> Vec<(u32, (usize, usize))> {
        bpe.tokens(word).unwrap().into_iter().map(|token| (token.id, token.offsets)).collect()
    }

    #[test]
    fn the_best_merge_comes_first_and_of_equals_the_leftmost() {
        let tokens = ["a", "b", "é", "ab", "bé", "aa", "aab"];
        let bpe = bpe(&tokens, &["b é", "a b", "a a", "aa b"], false).unwrap();
        assert_eq!(spans(&bpe, "abé"), [(0, (0, 1)), (4, (1, 4))]);
        assert_eq!(spans(&bpe, "aaa"), [(5, (0, 2)), (0, (2, 3))]);
        assert_eq!(spans(&bpe, "aab"), [(0, (0, 1)), (3, (1, 3))]);
        assert_eq!(spans(&bpe, ""), []);
    }

    #[test]
    fn a_whole_word_is_taken_where_the_family_does_so() {
        let tokens = ["a", "b", "ab", "aab"];
        let merges = ["a b"];
        let merged = [(0, (0, 1)), (2, (1, 3))];
        assert_eq!(spans(&bpe(&tokens, &merges, false).unwrap(), "aab"), merged);
        assert_eq!(spans(&bpe(&tokens, &merges, true).unwrap(), "aab"), [(3, (0, 3))]);
    }

    #[test]
    fn a_character_without_a_token_is_named() {
        let error = bpe(&["a"], &[], false).unwrap().tokens("aß").unwrap_err();
        assert_eq!(error.to_string(), "the vocabulary has no token for 'ß'");
    }

    #[test]
    fn a_merge_of_what_is_no_token_is_refused() {
        for merge in ["a c", "a b", "ab", " a", "a "] {
            let error = bpe(&["a", "b"], &[merge], false).unwrap_err();
            assert!(matches!(error, TokenizerError::BadMerge { rank: 0, .. }), "{error}");
        }
    }
}
