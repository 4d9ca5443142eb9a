//! HTML to canonical plain text with an outline.
//!
//! What a reader of the page does not see as content is dropped: scripts, styles, navigation,
//! page footers, form fields, hidden elements. How deep a page may be is checked in `nesting`.

use scraper::node::Element;
use scraper::{Html, Node};

use crate::outline::{Heading, Outline};
use crate::read::canonical;
use crate::{Block, BlockKind};

/// What a page gives.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// Canonical text: blocks separated by a blank line.
    pub(crate) text: String,
    /// Ranges into `text`.
    pub(crate) outline: Outline,
    /// `lang` of the `html` element.
    pub(crate) lang: Option<String>,
}

/// Extracts a page. Never fails: HTML parsing is defined for every input.
pub(crate) fn extract(source: &str) -> Page {
    let html = Html::parse_document(source);
    let mut extractor = Extractor::default();
    let mut node = html.tree.root();
    loop {
        let entered = extractor.enter(node.value());
        if let Some(child) = node.first_child().filter(|_| entered) {
            node = child;
            continue;
        }
        if entered {
            extractor.leave(node.value());
        }
        // Up until there is a next sibling; every parent on the way was entered.
        loop {
            if let Some(next) = node.next_sibling() {
                node = next;
                break;
            }
            let Some(parent) = node.parent() else { return extractor.finish() };
            node = parent;
            extractor.leave(node.value());
        }
    }
}

fn is_dropped(element: &Element) -> bool {
    let style = element.attr("style").unwrap_or_default().replace(' ', "").to_ascii_lowercase();
    matches!(
        element.name(),
        "script"
            | "style"
            | "nav"
            | "template"
            | "noscript"
            | "svg"
            | "footer"
            | "button"
            | "select"
            | "textarea"
            | "iframe"
            | "object"
            | "canvas"
            | "audio"
            | "video"
    ) || element.attr("hidden").is_some()
        || element.attr("aria-hidden") == Some("true")
        || style.contains("display:none")
        || style.contains("visibility:hidden")
}

/// Elements whose start and end separate blocks.
fn is_block(name: &str) -> bool {
    matches!(
        name,
        "p" | "div"
            | "section"
            | "article"
            | "main"
            | "header"
            | "aside"
            | "ul"
            | "ol"
            | "dl"
            | "dt"
            | "dd"
            | "li"
            | "blockquote"
            | "figure"
            | "figcaption"
            | "body"
            | "hr"
            | "address"
            | "details"
            | "summary"
            | "fieldset"
            | "title"
            | "head"
            | "html"
    )
}

fn heading_level(name: &str) -> Option<usize> {
    match name {
        "h1" => Some(1),
        "h2" => Some(2),
        "h3" => Some(3),
        "h4" => Some(4),
        "h5" => Some(5),
        "h6" => Some(6),
        _ => None,
    }
}

/// Collects text into `buffer` until a block ends.
#[derive(Debug, Default)]
struct Extractor {
    page: Page,
    buffer: String,
    /// Level and `id` of the heading being read.
    heading: Option<(usize, Option<String>)>,
    title: bool,
    items_open: usize,
    tables_open: usize,
    preformatted_open: usize,
}

impl Extractor {
    /// Starts a node; `false` drops it with everything in it.
    fn enter(&mut self, node: &Node) -> bool {
        match node {
            Node::Element(element) if is_dropped(element) => return false,
            Node::Element(element) => self.open(element),
            Node::Text(text) => self.text(text),
            Node::Document
            | Node::Fragment
            | Node::Doctype(_)
            | Node::Comment(_)
            | Node::ProcessingInstruction(_) => {}
        }
        true
    }

    fn leave(&mut self, node: &Node) {
        if let Node::Element(element) = node {
            self.close(element.name());
        }
    }

    fn open(&mut self, element: &Element) {
        let name = element.name();
        if name == "html" {
            self.page.lang = element.attr("lang").map(str::to_owned).filter(|l| !l.is_empty());
        }
        match name {
            "br" => self.buffer.push('\n'),
            "tr" => self.new_line(),
            "td" | "th" => {
                if !self.buffer.is_empty() && !self.buffer.ends_with('\n') {
                    self.buffer.push_str(" | ");
                }
            }
            "table" => {
                self.flush();
                self.tables_open += 1;
            }
            "pre" => {
                self.flush();
                self.preformatted_open += 1;
            }
            "li" => {
                self.flush();
                self.items_open += 1;
            }
            "title" => self.title = true,
            _ => {
                if let Some(level) = heading_level(name) {
                    self.flush();
                    self.heading = Some((level, element.attr("id").map(str::to_owned)));
                } else if is_block(name) {
                    self.separate();
                }
            }
        }
    }

    fn close(&mut self, name: &str) {
        match name {
            "table" => {
                self.flush();
                self.tables_open = self.tables_open.saturating_sub(1);
            }
            "pre" => {
                self.flush();
                self.preformatted_open = self.preformatted_open.saturating_sub(1);
            }
            "li" => {
                self.flush();
                self.items_open = self.items_open.saturating_sub(1);
            }
            "title" => {
                self.page.outline.top_title = canonical(self.buffer.trim());
                self.buffer.clear();
                self.title = false;
            }
            _ => {
                if heading_level(name).is_some() {
                    self.flush();
                    self.heading = None;
                } else if is_block(name) {
                    self.separate();
                }
            }
        }
    }

    /// A block boundary, unless a heading or a table cell goes on across it.
    fn separate(&mut self) {
        if self.heading.is_some() || self.tables_open > 0 {
            self.space();
        } else {
            self.flush();
        }
    }

    fn space(&mut self) {
        if !self.buffer.is_empty() && !self.buffer.ends_with(char::is_whitespace) {
            self.buffer.push(' ');
        }
    }

    fn new_line(&mut self) {
        if !self.buffer.is_empty() && !self.buffer.ends_with('\n') {
            self.buffer.push('\n');
        }
    }

    fn text(&mut self, text: &str) {
        if self.preformatted_open > 0 && self.tables_open == 0 {
            self.buffer.push_str(text);
            return;
        }
        for character in text.chars() {
            if character.is_whitespace() {
                self.space();
            } else {
                self.buffer.push(character);
            }
        }
    }

    /// Ends the block in the buffer.
    fn flush(&mut self) {
        let block = std::mem::take(&mut self.buffer);
        let block = canonical(&block);
        let block = block.trim_end().trim_start_matches('\n');
        if self.title || block.trim().is_empty() {
            return;
        }
        let text = &mut self.page.text;
        if !text.is_empty() {
            text.push_str("\n\n");
        }
        let start = text.len() + (block.len() - block.trim_start().len());
        text.push_str(block);
        let span = start..text.len();
        let kind = if let Some((level, anchor)) = self.heading.clone() {
            let title = block.split_whitespace().collect::<Vec<_>>().join(" ");
            let anchor = Some(anchor.unwrap_or_default());
            let heading = Heading { level, title, anchor, span: span.clone() };
            self.page.outline.headings.push(heading);
            BlockKind::Heading
        } else if self.preformatted_open > 0 {
            BlockKind::Code
        } else if self.tables_open > 0 {
            BlockKind::Table
        } else if self.items_open > 0 {
            BlockKind::ListItem
        } else {
            BlockKind::Paragraph
        };
        self.page.outline.blocks.push(Block { kind, span });
    }

    fn finish(mut self) -> Page {
        self.flush();
        self.page
    }
}

#[cfg(test)]
mod tests {
    use super::extract;
    use crate::BlockKind;

    #[test]
    fn content_stays_and_chrome_goes() {
        let page = extract(
            "<html lang=de><head><title>T\u{00AD}itle</title><style>p{}</style></head><body>\
             <nav>menu</nav><script>evil()</script><h1 id=top>Big <b>one</b></h1>\
             <p>First&nbsp;cafe&#x301;\n para.</p><div>loose<p hidden>secret</p></div>\
             <ul><li><p>item</p></li></ul><pre>let x;\n  y</pre>\
             <p style='display: none'>no</p>\
             <table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td><p>2</p></td></tr></table>\
             <footer>imprint</footer></body></html>",
        );
        assert_eq!(
            page.text,
            "Big one\n\nFirst café para.\n\nloose\n\nitem\n\nlet x;\n  y\n\na | b\n1 | 2"
        );
        assert_eq!(page.lang.as_deref(), Some("de"));
        assert_eq!(page.outline.top_title, "Title");
        assert_eq!(page.outline.headings[0].anchor.as_deref(), Some("top"));
        let kinds: Vec<BlockKind> = page.outline.blocks.iter().map(|block| block.kind).collect();
        use BlockKind::{Code, Heading, ListItem, Paragraph, Table};
        assert_eq!(kinds, [Heading, Paragraph, Paragraph, ListItem, Code, Table]);
    }
}
