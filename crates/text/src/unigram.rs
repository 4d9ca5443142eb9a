//! The most likely cut of a text into pieces (`unigram_model.cc` of google/sentencepiece).

use std::ops::Range;

use crate::TokenizerError;
use crate::normaliser::Normaliser;
use crate::pieces::{Piece, Pieces};
use crate::vocabulary::Kind;

/// How much worse an unknown character is than the worst piece (`kUnkPenalty`).
const UNKNOWN_PENALTY: f32 = 10.0;

/// A Unigram vocabulary (`tokenizer.ggml.model` = `t5`).
#[derive(Debug)]
pub(crate) struct Unigram {
    pieces: Pieces,
    normaliser: Normaliser,
    trie: Trie,
    /// Score of a character that no piece covers.
    unknown_score: f32,
}

/// Pieces by their bytes. Edges are sorted by (node, byte).
#[derive(Debug)]
struct Trie {
    /// (nodes) where the edges of a node start; one more at the end.
    starts: Vec<usize>,
    /// (edges) byte and the node that it leads to.
    edges: Vec<(u8, usize)>,
    /// (nodes) id of the piece that ends here.
    ids: Vec<Option<u32>>,
}

impl Trie {
    /// Builds the trie breadth first out of the sorted pieces.
    fn new(mut pieces: Vec<(&str, u32)>) -> Trie {
        pieces.sort_unstable();
        let mut trie = Trie { starts: Vec::new(), edges: Vec::new(), ids: Vec::new() };
        let mut level = Vec::from([(0, pieces.len())]);
        let (mut depth, mut n_nodes) = (0, 1);
        while !level.is_empty() {
            let mut below = Vec::new();
            for (start, end) in level {
                let ends_here = |piece: &str| piece.len() == depth;
                let id = pieces[start..end].first().filter(|it| ends_here(it.0)).map(|it| it.1);
                trie.ids.push(id);
                trie.starts.push(trie.edges.len());
                let mut at = start + usize::from(id.is_some());
                while at < end {
                    let byte = pieces[at].0.as_bytes()[depth];
                    let len =
                        pieces[at..end].partition_point(|piece| piece.0.as_bytes()[depth] == byte);
                    trie.edges.push((byte, n_nodes));
                    n_nodes += 1;
                    below.push((at, at + len));
                    at += len;
                }
            }
            level = below;
            depth += 1;
        }
        trie.starts.push(trie.edges.len());
        trie
    }

    /// Ids of the pieces that `bytes` starts with, shortest first, with their lengths.
    fn prefixes<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = (u32, usize)> + 'a {
        let mut node = 0;
        bytes
            .iter()
            .zip(1..)
            .map_while(move |(byte, len)| {
                let edges = &self.edges[self.starts[node]..self.starts[node + 1]];
                node = edges[edges.binary_search_by_key(byte, |edge| edge.0).ok()?].1;
                Some((self.ids[node], len))
            })
            .filter_map(|(id, len)| Some((id?, len)))
    }
}

/// The best way to get to a place in the text.
#[derive(Clone, Copy)]
struct Way {
    /// Where the last piece starts.
    from: usize,
    id: Option<u32>,
    score: f32,
}

impl Unigram {
    pub(crate) fn new(pieces: Pieces, normaliser: Normaliser, kinds: &[Kind]) -> Unigram {
        let normal = (0_u32..).zip(kinds).filter(|it| *it.1 == Kind::Text);
        let worst = normal.map(|(id, _)| pieces.score(id)).fold(f32::INFINITY, f32::min);
        let unknown_score = if worst.is_finite() { worst } else { 0.0 } - UNKNOWN_PENALTY;
        let usable = pieces.iter().filter(|&(_, id)| !pieces.is_unused(id)).collect();
        Unigram { trie: Trie::new(usable), pieces, normaliser, unknown_score }
    }

    /// Ids of `text` with their byte ranges in it.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, TokenizerError> {
        let text = self.normaliser.apply(text);
        let segments = self.segments(&text.text);
        self.pieces.tokens(&text, segments.into_iter().rev())
    }

    /// Viterbi over all places between characters; the pieces come back last first.
    fn segments(&self, text: &str) -> Vec<Piece> {
        let mut ways: Vec<Option<Way>> = vec![None; text.len() + 1];
        let mut best_here = 0.0;
        for (at, char) in text.char_indices() {
            if at > 0 {
                best_here = ways[at].map_or(0.0, |way| way.score);
            }
            let mut offer = |len: usize, id, score: f32| {
                let score = score + best_here;
                let way = &mut ways[at + len];
                // Strictly better: of equals the one with the longer last piece stays.
                if way.is_none_or(|way| score > way.score) {
                    *way = Some(Way { from: at, id, score });
                }
            };
            let mut covered = false;
            for (id, len) in self.trie.prefixes(&text.as_bytes()[at..]) {
                offer(len, Some(id), self.pieces.score(id));
                covered |= len == char.len_utf8();
            }
            if !covered {
                offer(char.len_utf8(), None, self.unknown_score);
            }
        }
        let mut found = Vec::new();
        let mut end = text.len();
        while end > 0 {
            let way = ways[end].expect("every place between characters can be reached");
            found.push(Piece { id: way.id, span: way.from..end });
            end = way.from;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_found_shortest_first() {
        let trie = Trie::new(vec![("ab", 1), ("a", 0), ("abcd", 3), ("b", 4)]);
        assert_eq!(trie.prefixes(b"abc").collect::<Vec<_>>(), [(0, 1), (1, 2)]);
        assert_eq!(trie.prefixes(b"abcdx").collect::<Vec<_>>(), [(0, 1), (1, 2), (3, 4)]);
        assert_eq!(trie.prefixes(b"c").count(), 0);
        assert_eq!(Trie::new(Vec::new()).prefixes(b"c").count(), 0);
    }
}
