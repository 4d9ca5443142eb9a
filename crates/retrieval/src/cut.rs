//! Cutting a document into chunks by rule G-23.
//!
//! Structure decides: a section is never left, then paragraphs, then sentences. Tables, code and
//! formulas stay whole up to the encoder window. The algorithm, per section:
//!
//! 1. Blocks become atoms: the stretches that are never cut. A paragraph gives its sentences; a
//!    table or code block gives one atom, or its rows if it is larger than the window; a single
//!    sentence or row larger than the window is halved at white space (a *forced cut*, counted).
//! 2. Atoms are packed greedily up to `max` tokens; a pack that would end inside a paragraph goes
//!    back to the paragraph's start if `min` tokens remain.
//! 3. A tail under `min` is joined to the pack before it, or the two are cut anew in the middle.

use std::ops::Range;

use crate::chunk::ChunkWriter;
use crate::sentence::{push_trimmed, sentences, trim};
use crate::{
    Block, BlockKind, BlockType, Chunk, ChunkOptions, Document, Encode, RetrievalError, Section,
    prepare,
};

/// The chunks of a document, in order, and what G-23 wants counted about the cutting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunked {
    /// In order, disjoint, each inside one section.
    pub chunks: Vec<Chunk>,
    /// Cuts inside a sentence, row or line, made because it alone exceeds the window.
    pub forced_cuts: usize,
    /// Headings with nothing below them; they make no chunk unless the document has nothing else.
    pub bare_headings: usize,
    /// Stretches without a single token; they cannot be embedded.
    pub without_tokens: usize,
}

/// Cuts `document` into chunks.
///
/// Every chunk's text is the canonical text of its span. `tokens` is counted on the prepared text
/// by the encoder's tokenizer. Everything but headings without content, comments and front matter
/// is in exactly one chunk.
///
/// # Errors
/// [`RetrievalError::BadChunkOption`]; [`RetrievalError::OverWindow`] if a single character has
/// more tokens than the window.
pub fn chunk(
    document: &Document,
    options: &ChunkOptions,
    encoder: &dyn Encode,
) -> Result<Chunked, RetrievalError> {
    options.check()?;
    let cutter = Cutter { text: &document.text, options, encoder };
    let writer = ChunkWriter::new(document, encoder);
    let mut chunked = Chunked::default();
    let mut bare = Vec::new();
    let mut blocks = document.blocks.as_slice();
    for section in &document.sections {
        let inside = blocks.partition_point(|block| block.span.start < section.span.end);
        let (own, rest) = blocks.split_at(inside);
        blocks = rest;
        if own.iter().all(|block| block.kind == BlockKind::Heading) {
            bare.push((section, own));
            continue;
        }
        for group in cutter.groups(own) {
            cutter.cut(section, group, &writer, &mut chunked)?;
        }
    }
    if chunked.chunks.is_empty() {
        for (section, own) in bare {
            cutter.cut(section, own, &writer, &mut chunked)?;
        }
    } else {
        chunked.bare_headings = bare.iter().filter(|(_, own)| !own.is_empty()).count();
    }
    Ok(chunked)
}

/// A stretch that is never cut.
#[derive(Clone, Debug)]
struct Atom {
    span: Range<usize>,
    kind: BlockKind,
    /// First of its block: a better place to cut than the others.
    opens_block: bool,
    /// Tokens of this atom alone.
    tokens: usize,
}

struct Cutter<'a> {
    text: &'a str,
    options: &'a ChunkOptions,
    encoder: &'a dyn Encode,
}

impl Cutter<'_> {
    fn tokens(&self, span: Range<usize>) -> usize {
        self.encoder.tokenize(&prepare(&self.text[span])).len()
    }

    /// Runs of blocks that may share a chunk: what lies between two of them has no letter or
    /// digit. A comment or front matter therefore ends a run instead of entering a chunk.
    fn groups<'b>(&self, blocks: &'b [Block]) -> impl Iterator<Item = &'b [Block]> {
        blocks.chunk_by(|before, after| {
            !self.text[before.span.end..after.span.start].contains(char::is_alphanumeric)
        })
    }

    /// Cuts one group of one section and writes its chunks.
    fn cut(
        &self,
        section: &Section,
        group: &[Block],
        writer: &ChunkWriter<'_>,
        chunked: &mut Chunked,
    ) -> Result<(), RetrievalError> {
        let mut atoms = Vec::new();
        for block in group {
            self.atoms(block, &mut atoms, &mut chunked.forced_cuts);
        }
        for pack in self.pack(&atoms) {
            let span = span_of(&atoms[pack.clone()]);
            let tokens = self.tokens(span.clone());
            if tokens == 0 {
                chunked.without_tokens += 1;
                continue;
            }
            if tokens > self.options.window {
                return Err(RetrievalError::OverWindow {
                    doc_id: writer.doc_id().to_owned(),
                    start: span.start,
                    tokens,
                    window: self.options.window,
                });
            }
            chunked.chunks.push(writer.write(section, span, tokens, block_type(&atoms[pack])));
        }
        Ok(())
    }

    /// The atoms of one block.
    fn atoms(&self, block: &Block, atoms: &mut Vec<Atom>, forced_cuts: &mut usize) {
        let spans = match block.kind {
            BlockKind::Heading => vec![block.span.clone()],
            BlockKind::Paragraph | BlockKind::ListItem => sentences(self.text, block.span.clone()),
            BlockKind::Table | BlockKind::Code => {
                if self.tokens(block.span.clone()) <= self.options.window {
                    vec![block.span.clone()]
                } else {
                    self.lines(block.span.clone())
                }
            }
        };
        let mut opens_block = true;
        for span in spans {
            let mut pieces = Vec::new();
            self.halve(span, &mut pieces);
            *forced_cuts += pieces.len().saturating_sub(1);
            for (span, tokens) in pieces {
                atoms.push(Atom { span, kind: block.kind, opens_block, tokens });
                opens_block = false;
            }
        }
    }

    fn lines(&self, span: Range<usize>) -> Vec<Range<usize>> {
        let mut lines = Vec::new();
        let mut start = span.start;
        for line in self.text[span].split_inclusive('\n') {
            push_trimmed(&mut lines, self.text, start..start + line.len());
            start += line.len();
        }
        lines
    }

    /// The span if it fits the window, else its halves, cut at the white space nearest to the
    /// middle or, if the middle half of the span has none, at a character.
    fn halve(&self, span: Range<usize>, pieces: &mut Vec<(Range<usize>, usize)>) {
        let span = trim(self.text, span);
        let tokens = self.tokens(span.clone());
        let characters = self.text[span.clone()].chars().nth(1).is_some();
        if tokens <= self.options.window || !characters {
            if !span.is_empty() {
                pieces.push((span, tokens));
            }
            return;
        }
        let middle = self.middle(span.clone());
        self.halve(span.start..middle, pieces);
        self.halve(middle..span.end, pieces);
    }

    /// A character boundary strictly inside a span of at least two characters.
    fn middle(&self, span: Range<usize>) -> usize {
        let slice = &self.text[span.clone()];
        let half = slice.len() / 2;
        let quarter = slice.len() / 4;
        let space = slice
            .char_indices()
            .filter(|(at, c)| c.is_whitespace() && at.abs_diff(half) <= quarter && *at > 0)
            .min_by_key(|(at, _)| at.abs_diff(half))
            .map(|(at, _)| at);
        let first = slice.chars().next().map_or(1, char::len_utf8);
        span.start + space.unwrap_or_else(|| slice.floor_char_boundary(half).max(first))
    }

    /// Packs atoms into chunks; returns ranges of atoms that tile `0..atoms.len()`.
    fn pack(&self, atoms: &[Atom]) -> Vec<Range<usize>> {
        let mut packs: Vec<Range<usize>> = Vec::new();
        let mut first = 0;
        while first < atoms.len() {
            let end = self.grow(atoms, first);
            packs.push(first..end);
            first = end;
        }
        self.mend_tail(atoms, &mut packs);
        packs
    }

    /// The end of the pack that starts at atom `first`.
    fn grow(&self, atoms: &[Atom], first: usize) -> usize {
        let mut end = first + 1;
        let mut sum = atoms[first].tokens;
        // A heading goes with what it announces even if that alone reaches `max`.
        let lead = atoms[first].kind == BlockKind::Heading;
        while let Some(next) = atoms.get(end) {
            let announced = lead && end == first + 1;
            let limit = if announced { self.options.window } else { self.options.max };
            if sum + next.tokens > limit {
                break;
            }
            sum += next.tokens;
            end += 1;
        }
        // The sum over atoms can differ from the count of the joined text; the count decides.
        let at_least = first + 1;
        while end > at_least && self.pack_tokens(atoms, first..end) > self.limit(atoms, first..end)
        {
            end -= 1;
        }
        self.back_to_block(atoms, first..end)
    }

    fn pack_tokens(&self, atoms: &[Atom], pack: Range<usize>) -> usize {
        self.tokens(span_of(&atoms[pack]))
    }

    /// What a pack may hold: `max`, or the window for one atom with or without its heading.
    fn limit(&self, atoms: &[Atom], pack: Range<usize>) -> usize {
        let headed = usize::from(atoms[pack.start].kind == BlockKind::Heading);
        if pack.len() <= 1 + headed { self.options.window } else { self.options.max }
    }

    /// The end moved back to the start of the block that it would cut, if enough remains.
    fn back_to_block(&self, atoms: &[Atom], pack: Range<usize>) -> usize {
        if atoms.get(pack.end).is_none_or(|next| next.opens_block) {
            return pack.end;
        }
        let opens = |at: &usize| atoms[*at].opens_block;
        let start = (pack.start + 1..pack.end).rev().find(opens);
        match start {
            Some(start) if self.pack_tokens(atoms, pack.start..start) >= self.options.min => start,
            Some(_) | None => pack.end,
        }
    }

    /// Joins a last pack under `min` to the one before it, or shares the two out evenly.
    fn mend_tail(&self, atoms: &[Atom], packs: &mut Vec<Range<usize>>) {
        let [.., before, tail] = packs.as_mut_slice() else { return };
        if self.pack_tokens(atoms, tail.clone()) >= self.options.min {
            return;
        }
        let both = before.start..tail.end;
        if self.pack_tokens(atoms, both.clone()) <= self.options.max {
            *before = both;
            packs.pop();
            return;
        }
        let sizes = |cut: usize| {
            let left = self.pack_tokens(atoms, both.start..cut);
            let right = self.pack_tokens(atoms, cut..both.end);
            (left, right, left.abs_diff(right))
        };
        let first_cut = both.start + 1 + usize::from(atoms[both.start].kind == BlockKind::Heading);
        let allowed = self.options.min..=self.options.max;
        let best = (first_cut..before.end)
            .map(|cut| (cut, sizes(cut)))
            .filter(|(_, (left, right, _))| allowed.contains(left) && allowed.contains(right))
            .min_by_key(|(cut, (_, _, difference))| (*difference, *cut));
        if let Some((cut, _)) = best {
            before.end = cut;
            tail.start = cut;
        }
    }
}

fn span_of(atoms: &[Atom]) -> Range<usize> {
    match (atoms.first(), atoms.last()) {
        (Some(first), Some(last)) => first.span.start..last.span.end,
        (None, _) | (_, None) => 0..0,
    }
}

fn block_type(atoms: &[Atom]) -> BlockType {
    let mut found = None;
    for atom in atoms {
        let own = match atom.kind {
            BlockKind::Heading => continue,
            BlockKind::Paragraph => BlockType::Prose,
            BlockKind::ListItem => BlockType::List,
            BlockKind::Table => BlockType::Table,
            BlockKind::Code => BlockType::Code,
        };
        if found.is_some_and(|before| before != own) {
            return BlockType::Mixed;
        }
        found = Some(own);
    }
    found.unwrap_or(BlockType::Heading)
}

#[cfg(test)]
#[path = "cut_tests.rs"]
mod tests;
