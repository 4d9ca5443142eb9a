//! Refuses HTML that would take the tree builder quadratic time or memory.
//!
//! Building the tree looks through the open elements at many tags, so 20,000 nested `<div>` in
//! 100 kB take ten seconds, and it repeats open formatting elements in each paragraph, so little
//! text can make many nodes. This runs the tokenizer alone, which is linear, and follows the open
//! elements roughly: elements that HTML closes by itself (`p`, `li`, …) are left out, an end tag
//! closes nothing outside its table. It bounds careless and simply hostile pages; the size limit
//! bounds the rest.

use std::cell::RefCell;

use html5ever::TokenizerResult;
use html5ever::tendril::StrTendril;
use html5ever::tokenizer::states::RawKind;
use html5ever::tokenizer::{
    BufferQueue, Tag, TagKind, Token, TokenSink, TokenSinkResult, Tokenizer, TokenizerOpts,
};

use crate::RetrievalError;

/// Deepest nesting; browsers stop at 512.
const MAX_DEPTH: usize = 256;

/// Σ over start tags of the formatting elements open there: the nodes that repetition can make.
const MAX_REPEATED: usize = 4_000_000;

/// Checks a page.
pub(crate) fn check(doc_id: &str, source: &str) -> Result<(), RetrievalError> {
    let tokenizer = Tokenizer::new(Follower::default(), TokenizerOpts::default());
    let input = BufferQueue::default();
    input.push_back(StrTendril::from(source));
    // The tokenizer pauses at scripts and encoding marks; what it pauses for does not matter here.
    while !matches!(tokenizer.feed(&input), TokenizerResult::Done) {}
    tokenizer.end();
    let open = tokenizer.sink.open.into_inner();
    let too_deep = |what, limit, found| {
        Err(RetrievalError::TooDeep { doc_id: doc_id.to_owned(), what, limit, found })
    };
    if open.deepest > MAX_DEPTH {
        return too_deep("nested elements", MAX_DEPTH, open.deepest);
    }
    if open.repeated > MAX_REPEATED {
        return too_deep("repeated formatting elements", MAX_REPEATED, open.repeated);
    }
    Ok(())
}

#[derive(Default)]
struct Follower {
    open: RefCell<Open>,
}

#[derive(Default)]
struct Open {
    names: Vec<String>,
    formatting: usize,
    deepest: usize,
    repeated: usize,
}

impl TokenSink for Follower {
    type Handle = ();

    fn process_token(&self, token: Token, _line: u64) -> TokenSinkResult<()> {
        let Token::TagToken(tag) = token else { return TokenSinkResult::Continue };
        let mut open = self.open.borrow_mut();
        match tag.kind {
            TagKind::StartTag => open.start(&tag),
            TagKind::EndTag => {
                open.end(&tag.name);
                TokenSinkResult::Continue
            }
        }
    }
}

impl Open {
    fn start(&mut self, tag: &Tag) -> TokenSinkResult<()> {
        let name: &str = &tag.name;
        self.repeated = self.repeated.saturating_add(self.formatting);
        let foreign = self.names.iter().any(|open| matches!(open.as_str(), "svg" | "math"));
        // Past the limit the verdict is known; not growing keeps the scan linear.
        if !closes_itself(name) && self.deepest <= MAX_DEPTH {
            self.names.push(name.to_owned());
            self.formatting += usize::from(is_formatting(name));
            self.deepest = self.deepest.max(self.names.len());
        }
        match name {
            "script" if !foreign => TokenSinkResult::RawData(RawKind::ScriptData),
            "style" | "xmp" | "iframe" | "noembed" | "noframes" | "noscript" if !foreign => {
                TokenSinkResult::RawData(RawKind::Rawtext)
            }
            "title" | "textarea" if !foreign => TokenSinkResult::RawData(RawKind::Rcdata),
            "plaintext" if !foreign => TokenSinkResult::Plaintext,
            _ => TokenSinkResult::Continue,
        }
    }

    fn end(&mut self, name: &str) {
        let from = self.names.iter().rposition(|open| open == name);
        let Some(from) = from else { return };
        let walled = self.names[from + 1..].iter().any(|open| is_wall(open));
        if walled && !is_wall(name) {
            return;
        }
        for closed in self.names.drain(from..) {
            self.formatting -= usize::from(is_formatting(&closed));
        }
    }
}

/// Elements without content, and those whose end HTML finds by itself.
fn closes_itself(name: &str) -> bool {
    matches!(
        name,
        "area"
            | "base"
            | "br"
            | "col"
            | "embed"
            | "hr"
            | "img"
            | "input"
            | "link"
            | "meta"
            | "param"
            | "source"
            | "track"
            | "wbr"
            | "html"
            | "head"
            | "body"
            | "p"
            | "li"
            | "dt"
            | "dd"
            | "tr"
            | "td"
            | "th"
            | "thead"
            | "tbody"
            | "tfoot"
            | "colgroup"
            | "caption"
            | "option"
            | "optgroup"
            | "rp"
            | "rt"
            | "rb"
            | "rtc"
    )
}

/// Elements that the tree builder opens again in the next paragraph.
fn is_formatting(name: &str) -> bool {
    matches!(
        name,
        "a" | "b"
            | "big"
            | "code"
            | "em"
            | "font"
            | "i"
            | "nobr"
            | "s"
            | "small"
            | "strike"
            | "strong"
            | "tt"
            | "u"
    )
}

/// Elements whose inside an outer element's end tag does not reach.
fn is_wall(name: &str) -> bool {
    matches!(name, "table" | "template" | "object" | "applet" | "marquee" | "svg" | "math")
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn pages_that_cost_too_much_are_refused_and_long_ones_are_not() {
        for bad in [
            "<div>".repeat(300),
            format!("{}{}", "<b x>".repeat(200), "<p>x".repeat(30_000)),
            "<div><table><td></div>".repeat(300),
            format!("<!--{}-->{}", "</div>".repeat(300), "<div>".repeat(300)),
        ] {
            assert!(check("d", &bad).is_err(), "{}", &bad[..40]);
        }
        for good in [
            "<p>x<li>y<td>z".repeat(10_000),
            "<div><b>x</b></div>".repeat(10_000),
            format!("<script>{}</script>", "'<div>'+".repeat(1000)),
            format!("<style>{}</style><title>{}</title>", "<i>".repeat(999), "<i>".repeat(999)),
            "<table><tr><td><div>x</div></td></tr></table>".repeat(1000),
            "<svg><path d=a /><g></g></svg><br><img src=x>".repeat(200),
        ] {
            check("d", &good).unwrap();
        }
    }
}
