//! A light Markdown block scanner: headings, paragraphs, list items, tables, fences, formulas.
//!
//! It finds where text may be cut, no more. Inline markup stays in the text, because spans count
//! bytes of the source. Front matter, comments and thematic breaks belong to no block.

use std::ops::Range;

use crate::outline::{Heading, Outline};
use crate::sentence::trim;
use crate::{Block, BlockKind};

/// The longest comment that is skipped; bounds the search on hostile input.
const COMMENT_LINES: usize = 100;

/// Scans a canonical Markdown text.
pub(crate) fn scan(text: &str) -> Outline {
    let mut scanner = Scanner { text, lines: lines(text), outline: Outline::default() };
    let mut at = scanner.front_matter_end();
    while at < scanner.lines.len() {
        at = scanner.block(at);
    }
    scanner.outline
}

/// Scans plain text: paragraphs between blank lines, no headings.
pub(crate) fn scan_plain(text: &str) -> Outline {
    let lines = lines(text);
    let mut blocks = Vec::new();
    for paragraph in lines.split(|line| text[line.clone()].trim().is_empty()) {
        if let (Some(first), Some(last)) = (paragraph.first(), paragraph.last()) {
            let span = trim(text, first.start..last.end);
            blocks.push(Block { kind: BlockKind::Paragraph, span });
        }
    }
    Outline { blocks, ..Outline::default() }
}

/// Byte ranges of the lines, without `\n`. A form feed, the page break of plain text, ends a line
/// as well and leaves an empty one, so that it separates paragraphs.
fn lines(text: &str) -> Vec<Range<usize>> {
    let mut lines = Vec::new();
    let mut start = 0;
    for (at, byte) in text.bytes().enumerate() {
        if byte == b'\n' || byte == b'\x0c' {
            lines.push(start..at);
            start = at + 1;
            if byte == b'\x0c' {
                lines.push(start..start);
            }
        }
    }
    lines.push(start..text.len());
    lines
}

struct Scanner<'t> {
    text: &'t str,
    lines: Vec<Range<usize>>,
    outline: Outline,
}

impl<'t> Scanner<'t> {
    /// The line, or an empty one past the end.
    fn line(&self, at: usize) -> &'t str {
        self.lines.get(at).map_or("", |line| &self.text[line.clone()])
    }

    fn is_blank(&self, at: usize) -> bool {
        self.line(at).trim().is_empty()
    }

    fn push(&mut self, kind: BlockKind, first: usize, end: usize) {
        let span = trim(self.text, self.lines[first].start..self.lines[end - 1].end);
        if !span.is_empty() {
            self.outline.blocks.push(Block { kind, span });
        }
    }

    /// YAML or TOML between fences on the first line; 0 if there is none.
    fn front_matter_end(&self) -> usize {
        let fence = self.line(0).trim_end();
        if (fence != "---" && fence != "+++") || self.is_blank(1) {
            return 0;
        }
        let closing = (1..self.lines.len()).find(|at| self.line(*at).trim_end() == fence);
        closing.map_or(0, |at| at + 1)
    }

    /// Reads the block that starts at line `at` and returns the line after it.
    fn block(&mut self, at: usize) -> usize {
        let line = self.line(at);
        if line.trim().is_empty() || is_thematic_break(line) {
            return at + 1;
        }
        if let Some(fence) = Fence::open(line) {
            let end = self.until(at + 1, |line| fence.closes(line));
            self.push(BlockKind::Code, at, end);
            return end;
        }
        if let Some(end) = self.comment_end(at) {
            return end;
        }
        if let Some((level, title)) = atx_heading(line) {
            self.heading(level, title, at, at + 1);
            return at + 1;
        }
        if self.opens_table(at) {
            let end = self.run(at + 2, |line| !line.trim().is_empty() && line.contains('|'));
            self.push(BlockKind::Table, at, end);
            return end;
        }
        if is_list_marker(line) {
            return self.list_item(at);
        }
        if is_indented_code(line) {
            let end = self.run(at, |line| is_indented_code(line) || line.trim().is_empty());
            self.push(BlockKind::Code, at, end);
            return end;
        }
        self.paragraph(at)
    }

    /// The line after a comment that has its lines to itself. One without an end, or longer than
    /// [`COMMENT_LINES`], is text: content must not vanish behind a forgotten mark.
    fn comment_end(&self, at: usize) -> Option<usize> {
        if !self.line(at).trim_start().starts_with("<!--") {
            return None;
        }
        let last = (at..at + COMMENT_LINES).find(|line| self.line(*line).contains("-->"))?;
        self.line(last).trim_end().ends_with("-->").then_some(last + 1)
    }

    /// The line after the first one from `at` on that satisfies `ends`; the end if none does.
    fn until(&self, at: usize, ends: impl Fn(&str) -> bool) -> usize {
        let last = (at..self.lines.len()).find(|line| ends(self.line(*line)));
        last.map_or(self.lines.len(), |line| line + 1)
    }

    /// The first line from `at` on that does not satisfy `goes_on`.
    fn run(&self, at: usize, goes_on: impl Fn(&str) -> bool) -> usize {
        let end = (at..self.lines.len()).find(|line| !goes_on(self.line(*line)));
        end.unwrap_or(self.lines.len())
    }

    fn heading(&mut self, level: usize, title: &str, first: usize, end: usize) {
        self.push(BlockKind::Heading, first, end);
        let span = trim(self.text, self.lines[first].start..self.lines[end - 1].end);
        let title = plain_title(title);
        self.outline.headings.push(Heading { level, title, anchor: None, span });
    }

    fn opens_table(&self, at: usize) -> bool {
        self.line(at).contains('|') && is_table_rule(self.line(at + 1))
    }

    /// Whether line `at` starts a block that ends a paragraph or list item without a blank line.
    fn interrupts(&self, at: usize) -> bool {
        let line = self.line(at);
        line.trim().is_empty()
            || Fence::open(line).is_some()
            || self.comment_end(at).is_some()
            || atx_heading(line).is_some()
            || is_list_marker(line)
            || is_thematic_break(line)
            || self.opens_table(at)
    }

    fn list_item(&mut self, first: usize) -> usize {
        let mut end = first + 1;
        while end < self.lines.len() {
            let continues = if self.is_blank(end) {
                // An indented line after a blank one still belongs to the item.
                self.line(end + 1).starts_with("  ") && !self.interrupts(end + 1)
            } else {
                !self.interrupts(end)
            };
            if !continues {
                break;
            }
            end += 1;
        }
        self.push(BlockKind::ListItem, first, end);
        end
    }

    fn paragraph(&mut self, first: usize) -> usize {
        let mut end = first + 1;
        while end < self.lines.len() {
            if let Some(level) = setext_level(self.line(end)) {
                let title = &self.text[self.lines[first].start..self.lines[end - 1].end];
                self.heading(level, title, first, end + 1);
                return end + 1;
            }
            if self.interrupts(end) {
                break;
            }
            end += 1;
        }
        self.push(BlockKind::Paragraph, first, end);
        end
    }
}

/// An open code fence or formula.
struct Fence<'t> {
    marker: &'t str,
}

impl<'t> Fence<'t> {
    fn open(line: &'t str) -> Option<Fence<'t>> {
        let line = line.trim_start();
        for character in ['`', '~'] {
            let rest = line.trim_start_matches(character);
            let marker = &line[..line.len() - rest.len()];
            if marker.len() >= 3 && !(character == '`' && rest.contains('`')) {
                return Some(Fence { marker });
            }
        }
        (line.trim_end() == "$$").then_some(Fence { marker: "$$" })
    }

    fn closes(&self, line: &str) -> bool {
        let line = line.trim();
        line.starts_with(self.marker)
            && self.marker.chars().next().is_some_and(|c| line.trim_matches(c).is_empty())
    }
}

/// Level and words of `# like this #`.
fn atx_heading(line: &str) -> Option<(usize, &str)> {
    let trimmed = line.trim_start_matches(' ');
    let words = trimmed.trim_start_matches('#');
    let level = trimmed.len() - words.len();
    let opens = (1..=6).contains(&level) && line.len() - trimmed.len() <= 3;
    (opens && (words.trim().is_empty() || words.starts_with([' ', '\t'])))
        .then(|| (level, words.trim().trim_end_matches('#').trim_end()))
}

/// Level of the line under a heading: `===` or `---`.
fn setext_level(line: &str) -> Option<usize> {
    let line = line.trim_end();
    if line.is_empty() {
        None
    } else if line.bytes().all(|byte| byte == b'=') {
        Some(1)
    } else if line.len() >= 2 && line.bytes().all(|byte| byte == b'-') {
        Some(2)
    } else {
        None
    }
}

fn is_thematic_break(line: &str) -> bool {
    let marks: Vec<char> = line.chars().filter(|c| !c.is_whitespace()).collect();
    marks.len() >= 3 && ['-', '*', '_'].contains(&marks[0]) && marks.iter().all(|c| *c == marks[0])
}

fn is_table_rule(line: &str) -> bool {
    line.contains('-')
        && line.contains('|')
        && line.chars().all(|c| matches!(c, '|' | '-' | ':') || c.is_whitespace())
}

fn is_list_marker(line: &str) -> bool {
    let line = line.trim_start();
    if let Some(rest) = line.strip_prefix(['-', '*', '+']) {
        return rest.starts_with([' ', '\t']);
    }
    let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
    let digits = line.len() - rest.len();
    (1..=9).contains(&digits)
        && rest.strip_prefix(['.', ')']).is_some_and(|rest| rest.starts_with([' ', '\t']))
}

fn is_indented_code(line: &str) -> bool {
    (line.starts_with("    ") || line.starts_with('\t')) && !line.trim().is_empty()
}

/// A heading's words without emphasis, code marks and link targets.
fn plain_title(title: &str) -> String {
    let mut plain = String::with_capacity(title.len());
    let mut rest = title.trim();
    while let Some(open) = rest.find('[') {
        let link = rest[open..].find("](").map(|middle| open + middle);
        let Some(middle) = link else { break };
        let Some(close) = rest[middle..].find(')').map(|close| middle + close) else { break };
        plain.push_str(&rest[..open]);
        plain.push_str(&rest[open + 1..middle]);
        rest = &rest[close + 1..];
    }
    plain.push_str(rest);
    let words: Vec<&str> = plain.split_whitespace().collect();
    words.join(" ").replace(['*', '`'], "")
}
