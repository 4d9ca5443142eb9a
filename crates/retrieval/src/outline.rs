//! Headings to sections: the one place where section ids are made.

use std::collections::HashMap;
use std::ops::Range;

use crate::{Block, Section};

/// What a scanner finds in a canonical text.
#[derive(Debug, Default)]
pub(crate) struct Outline {
    /// In order.
    pub(crate) headings: Vec<Heading>,
    /// In order, headings among them.
    pub(crate) blocks: Vec<Block>,
    /// Title of the part before the first heading, for HTML.
    pub(crate) top_title: String,
}

/// One heading.
#[derive(Debug)]
pub(crate) struct Heading {
    /// From 1, the outermost.
    pub(crate) level: usize,
    /// Words without markup.
    pub(crate) title: String,
    /// The fragment the source itself declares; `None` makes one from the title.
    pub(crate) anchor: Option<String>,
    /// Byte range of the heading.
    pub(crate) span: Range<usize>,
}

/// Sections for the headings of a text of `len` bytes. The result is never empty and covers the
/// text. Blank space before the first heading makes no section of its own.
pub(crate) fn sections(doc_id: &str, text: &str, outline: &Outline) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::with_capacity(outline.headings.len() + 1);
    let mut ids = UniqueNames::default();
    let first = outline.headings.first().map_or(text.len(), |heading| heading.span.start);
    let has_top = !text[..first].trim().is_empty() || outline.headings.is_empty();
    if has_top {
        let id = ids.claim("top");
        sections.push(Section {
            section_id: format!("{doc_id}#{id}"),
            title: outline.top_title.clone(),
            path: Vec::new(),
            anchor: String::new(),
            span: 0..first,
        });
    }
    let mut anchors = UniqueNames::default();
    let mut open: Vec<&Heading> = Vec::new();
    for (position, heading) in outline.headings.iter().enumerate() {
        open.retain(|outer| outer.level < heading.level);
        open.push(heading);
        let slugs: Vec<String> = open.iter().map(|outer| slug(&outer.title)).collect();
        let anchor = match &heading.anchor {
            Some(declared) => declared.clone(),
            None => anchors.claim(&slug(&heading.title)),
        };
        let start = if position == 0 && !has_top { 0 } else { heading.span.start };
        let end = outline.headings.get(position + 1).map_or(text.len(), |next| next.span.start);
        sections.push(Section {
            section_id: format!("{doc_id}#{}", ids.claim(&slugs.join("/"))),
            title: heading.title.clone(),
            path: open.iter().map(|outer| outer.title.clone()).collect(),
            anchor: if anchor.is_empty() { anchor } else { format!("#{anchor}") },
            span: start..end,
        });
    }
    sections
}

/// Lower-case words joined by hyphens, as code hosts make fragments.
fn slug(title: &str) -> String {
    let mut slug = String::with_capacity(title.len());
    for character in title.chars() {
        if character.is_alphanumeric() || character == '_' {
            slug.extend(character.to_lowercase());
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    let trimmed = slug.trim_end_matches('-');
    if trimmed.is_empty() { "section".to_owned() } else { trimmed.to_owned() }
}

/// Hands out names, the second of a kind as `name-2`.
#[derive(Debug, Default)]
struct UniqueNames {
    taken: HashMap<String, usize>,
}

impl UniqueNames {
    fn claim(&mut self, name: &str) -> String {
        let mut candidate = name.to_owned();
        loop {
            if !self.taken.contains_key(&candidate) {
                self.taken.insert(candidate.clone(), 1);
                return candidate;
            }
            let count = self.taken.entry(name.to_owned()).or_insert(1);
            *count += 1;
            candidate = format!("{name}-{count}");
        }
    }
}
