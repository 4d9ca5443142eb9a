//! Byte-pair merges by score, as sentencepiece does them (`bpe_model.cc`).
//!
//! Of all neighbours whose concatenation is a piece, the pair with the best score is joined
//! first, and of equals the leftmost. A heap finds it, a linked list joins it: n characters cost
//! n · log n, whatever they are.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;

use crate::TokenizerError;
use crate::normaliser::Normaliser;
use crate::pieces::{Piece, Pieces};
use crate::specials::{Literals, Occurrence};

/// A sentencepiece BPE vocabulary (`tokenizer.ggml.model` = `llama`).
#[derive(Debug)]
pub(crate) struct SentencePiece {
    pub(crate) pieces: Pieces,
    /// Pieces that are found before any merge, spelled as in normalised text.
    pub(crate) added: Literals,
    pub(crate) normaliser: Normaliser,
}

/// No neighbour.
const NONE: usize = usize::MAX;

/// A stretch of the text; empty after it was joined to its left neighbour.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    prev: usize,
    next: usize,
}

/// Two neighbours that can be joined; stale if either has changed since.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Candidate) -> Ordering {
        // Scores are finite; -0 and 0 are equal here, which `total_cmp` would deny.
        let by_score = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        by_score.then(other.left.cmp(&self.left)).then(self.len.cmp(&other.len))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Candidate) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Candidate) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

impl SentencePiece {
    /// Ids of `text` with their byte ranges in it.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, TokenizerError> {
        let text = self.normaliser.apply(text);
        let mut segments = Vec::new();
        let mut at = 0;
        for Occurrence { id, span, .. } in self.added.find(&text.text, &|_| true) {
            self.merge(&text.text, at..span.start, &mut segments);
            at = span.end;
            segments.push(Piece { id: Some(id), span });
        }
        self.merge(&text.text, at..text.text.len(), &mut segments);
        self.pieces.tokens(&text, segments.into_iter())
    }

    /// Appends the pieces of a stretch without added ones.
    fn merge(&self, text: &str, stretch: Range<usize>, segments: &mut Vec<Piece>) {
        let mut merges = Merges {
            text,
            pieces: &self.pieces,
            symbols: symbols(text, stretch),
            heap: BinaryHeap::new(),
            taken_apart: HashMap::new(),
        };
        for right in 1..merges.symbols.len() {
            merges.offer(right - 1, right);
        }
        while let Some(candidate) = merges.heap.pop() {
            merges.join(&candidate);
        }
        merges.finish(segments);
    }
}

fn symbols(text: &str, stretch: Range<usize>) -> Vec<Symbol> {
    let first = stretch.start;
    let mut symbols: Vec<Symbol> = text[stretch]
        .char_indices()
        .enumerate()
        .map(|(index, (start, char))| Symbol {
            start: first + start,
            end: first + start + char.len_utf8(),
            prev: index.checked_sub(1).unwrap_or(NONE),
            next: index + 1,
        })
        .collect();
    if let Some(last) = symbols.last_mut() {
        last.next = NONE;
    }
    symbols
}

struct Merges<'a> {
    text: &'a str,
    pieces: &'a Pieces,
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Candidate>,
    /// Unused pieces that came up: how many bytes their left half has.
    taken_apart: HashMap<&'a str, usize>,
}

impl<'a> Merges<'a> {
    /// Makes a candidate of two neighbours if the vocabulary has their concatenation.
    fn offer(&mut self, left: usize, right: usize) {
        if left == NONE || right == NONE {
            return;
        }
        let (start, middle, end) =
            (self.symbols[left].start, self.symbols[right].start, self.symbols[right].end);
        let joined: &'a str = &self.text[start..end];
        let Some(id) = self.pieces.id(joined) else { return };
        if self.pieces.is_unused(id) {
            self.taken_apart.insert(joined, middle - start);
        }
        let score = self.pieces.score(id);
        self.heap.push(Candidate { score, left, right, len: end - start });
    }

    fn join(&mut self, candidate: &Candidate) {
        let (left, right) = (self.symbols[candidate.left], self.symbols[candidate.right]);
        let gone = |it: Symbol| it.start == it.end;
        if gone(left) || gone(right) || right.end - left.start != candidate.len {
            return;
        }
        self.symbols[candidate.left] = Symbol { end: right.end, next: right.next, ..left };
        self.symbols[candidate.right].end = right.start;
        if right.next != NONE {
            self.symbols[right.next].prev = candidate.left;
        }
        self.offer(left.prev, candidate.left);
        self.offer(candidate.left, right.next);
    }

    /// Appends the pieces that are left, unused ones taken apart.
    fn finish(self, segments: &mut Vec<Piece>) {
        let mut open = Vec::new();
        for symbol in self.symbols.iter().filter(|it| it.start < it.end) {
            open.push(symbol.start..symbol.end);
            while let Some(span) = open.pop() {
                let text = &self.text[span.clone()];
                let id = self.pieces.id(text);
                let halves = id.filter(|&id| self.pieces.is_unused(id));
                match halves.and_then(|_| self.taken_apart.get(text)) {
                    Some(left_len) => {
                        let middle = span.start + left_len;
                        open.push(middle..span.end);
                        open.push(span.start..middle);
                    }
                    None => segments.push(Piece { id, span }),
                }
            }
        }
    }
}
