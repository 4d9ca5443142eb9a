//! Token positions of quotes, sections and chunks, by the index tokenizer (§1.2.3).

use std::collections::HashMap;
use std::ops::Range;

use exrail_metrics::{Anchor, TokenSet};
use exrail_retrieval::{Chunk, Document, Encode};

use crate::error::VerifyError;
use crate::gold::{AnchorMode, ResolvedItem};
use crate::system::Retrieve;

/// Tokenises each canonical document once.
pub(crate) struct Positions<'a> {
    encoder: &'a dyn Encode,
    index: &'a dyn Retrieve,
    known: HashMap<String, (usize, Vec<Range<usize>>)>,
}

impl<'a> Positions<'a> {
    pub(crate) fn new(encoder: &'a dyn Encode, index: &'a dyn Retrieve) -> Positions<'a> {
        Positions { encoder, index, known: HashMap::new() }
    }

    pub(crate) fn anchor(&mut self, item: &ResolvedItem) -> Anchor {
        let sets: Vec<TokenSet> = item
            .spans
            .iter()
            .map(|span| self.covered(&span.document, std::slice::from_ref(&span.range)))
            .collect();
        match item.item.anchor_mode {
            AnchorMode::Any => Anchor::Any(sets),
            AnchorMode::All => Anchor::All(union(sets)),
        }
    }

    /// The positions of the sections that hold the evidence.
    pub(crate) fn sections(&mut self, item: &ResolvedItem) -> TokenSet {
        let sets = item.spans.iter().map(|span| {
            let document = &span.document;
            let sections = document.sections.iter().map(|section| section.span.clone());
            let touched: Vec<Range<usize>> =
                sections.filter(|range| span.overlaps(&document.doc_id, range)).collect();
            self.covered(document, &touched)
        });
        union(sets.collect::<Vec<_>>())
    }

    pub(crate) fn chunks<'c>(
        &mut self,
        chunks: impl Iterator<Item = &'c Chunk>,
    ) -> Result<TokenSet, VerifyError> {
        let mut set = TokenSet::default();
        for chunk in chunks {
            if let Some(document) = self.index.document(&chunk.doc_id)? {
                let range = chunk.span.start..chunk.span.end;
                set.extend(self.covered(&document, std::slice::from_ref(&range)));
            }
        }
        Ok(set)
    }

    fn covered(&mut self, document: &Document, ranges: &[Range<usize>]) -> TokenSet {
        let next = self.known.len();
        let encoder = self.encoder;
        let (number, tokens) = self.known.entry(document.doc_id.clone()).or_insert_with(|| {
            let tokens = encoder.tokenize(&document.text);
            (next, tokens.into_iter().map(|(_, range)| range).collect())
        });
        TokenSet::covered(*number, tokens, ranges)
    }
}

fn union(sets: Vec<TokenSet>) -> TokenSet {
    let mut all = TokenSet::default();
    for set in sets {
        all.extend(set);
    }
    all
}

/// Largest anchor in tokens that has to be retrieved: the union, or the largest alternative.
pub(crate) fn anchor_tokens(anchor: &Anchor) -> usize {
    match anchor {
        Anchor::All(set) => set.len(),
        Anchor::Any(sets) => sets.iter().map(TokenSet::len).max().unwrap_or(0),
    }
}
