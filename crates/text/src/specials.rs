//! Literals of added tokens in text, and who may write them.
//!
//! Splitting text at `<|im_end|>` is done here and not in the `tokenizers` crate, because only
//! here it can depend on *where* the literal stands: template text may produce a control id, the
//! content of a message may not (field-faults E2).

use std::collections::BTreeMap;
use std::ops::Range;

/// Whether control-token literals in a text become control ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// `<|im_end|>` becomes its control id. For text written by the operator or the template.
    Parse,
    /// `<|im_end|>` is ten ordinary characters. For text written by anyone else.
    AsText,
}

/// An added token as it is looked for in text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Literal {
    pub(crate) id: u32,
    pub(crate) text: String,
    /// Needs permission: steers the model rather than standing for text.
    pub(crate) control: bool,
    /// Takes the whitespace before it along (`lstrip` of `tokenizer.json`).
    pub(crate) takes_left: bool,
    /// Takes the whitespace after it along (`rstrip` of `tokenizer.json`).
    pub(crate) takes_right: bool,
    /// Counts only where no letter or digit adjoins it (`single_word` of `tokenizer.json`).
    pub(crate) single_word: bool,
}

/// A literal found in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Occurrence {
    pub(crate) id: u32,
    pub(crate) control: bool,
    /// Byte range in the text, with the whitespace that the token takes along.
    pub(crate) span: Range<usize>,
}

#[derive(Clone, Debug, Default)]
struct Node {
    children: BTreeMap<u8, usize>,
    literal: Option<usize>,
}

/// All literals of a tokenizer as a byte trie; a search costs text length × longest literal.
#[derive(Clone, Debug)]
pub(crate) struct Literals {
    literals: Vec<Literal>,
    nodes: Vec<Node>,
}

impl Literals {
    pub(crate) fn new(literals: Vec<Literal>) -> Literals {
        let mut all = Literals { literals: Vec::new(), nodes: vec![Node::default()] };
        literals.into_iter().for_each(|literal| all.add(literal));
        all
    }

    /// Adds a literal; one that is there already stays.
    pub(crate) fn add(&mut self, literal: Literal) {
        if literal.text.is_empty() {
            return;
        }
        let mut node = 0;
        for byte in literal.text.bytes() {
            let fresh = self.nodes.len();
            node = *self.nodes[node].children.entry(byte).or_insert(fresh);
            if node == fresh {
                self.nodes.push(Node::default());
            }
        }
        self.nodes[node].literal.get_or_insert(self.literals.len());
        self.literals.push(literal);
    }

    /// Leftmost-longest literals of `text`, in order and disjoint. A control literal counts only
    /// if `permitted` accepts the byte range of its characters.
    pub(crate) fn find(
        &self,
        text: &str,
        permitted: &dyn Fn(Range<usize>) -> bool,
    ) -> Vec<Occurrence> {
        let mut found = Vec::new();
        let (mut at, mut free_from) = (0, 0);
        while at < text.len() {
            let Some((which, end)) = self.longest_at(text, at, permitted) else {
                at += 1;
                continue;
            };
            let literal = &self.literals[which];
            let mut span = at..end;
            if literal.takes_left {
                span.start = free_from + text[free_from..at].trim_end().len();
            }
            if literal.takes_right {
                span.end = text.len() - text[end..].trim_start().len();
            }
            at = span.end;
            free_from = span.end;
            found.push(Occurrence { id: literal.id, control: literal.control, span });
        }
        found
    }

    /// The first control literal that `text` contains, permitted or not.
    pub(crate) fn first_control(&self, text: &str) -> Option<&str> {
        (0..text.len())
            .find_map(|at| self.longest_control_at(text, at))
            .map(|which| self.literals[which].text.as_str())
    }

    fn longest_control_at(&self, text: &str, at: usize) -> Option<usize> {
        self.walk(text, at).filter(|&(which, _)| self.literals[which].control).last().map(|it| it.0)
    }

    fn longest_at(
        &self,
        text: &str,
        at: usize,
        permitted: &dyn Fn(Range<usize>) -> bool,
    ) -> Option<(usize, usize)> {
        self.walk(text, at)
            .filter(|&(which, end)| {
                let literal = &self.literals[which];
                (!literal.control || permitted(at..end))
                    && (!literal.single_word || stands_alone(text, at..end))
            })
            .last()
    }

    /// Literals that start at `at`, shortest first, with their end.
    fn walk<'a>(&'a self, text: &'a str, at: usize) -> impl Iterator<Item = (usize, usize)> + 'a {
        let mut node = 0;
        text.as_bytes()[at..]
            .iter()
            .enumerate()
            .map_while(move |(offset, byte)| {
                node = *self.nodes[node].children.get(byte)?;
                Some((self.nodes[node].literal, at + offset + 1))
            })
            .filter_map(|(literal, end)| Some((literal?, end)))
    }
}

/// Whether no word character adjoins `span`.
fn stands_alone(text: &str, span: Range<usize>) -> bool {
    let is_word = |char: char| char.is_alphanumeric() || char == '_';
    !text[..span.start].chars().next_back().is_some_and(is_word)
        && !text[span.end..].chars().next().is_some_and(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn literals() -> Literals {
        let control = |id, text: &str| Literal {
            id,
            text: text.into(),
            control: true,
            takes_left: false,
            takes_right: false,
            single_word: false,
        };
        Literals::new(vec![
            control(1, "<|a|>"),
            control(2, "<|a|><|b|>"),
            Literal { takes_left: true, takes_right: true, ..control(3, "<mask>") },
            Literal { control: false, ..control(4, "<think>") },
        ])
    }

    fn ids(text: &str, permitted: &dyn Fn(Range<usize>) -> bool) -> Vec<(u32, Range<usize>)> {
        literals().find(text, permitted).into_iter().map(|it| (it.id, it.span)).collect()
    }

    #[test]
    fn the_longest_permitted_literal_wins() {
        assert_eq!(ids("x<|a|><|b|>", &|_| true), [(2, 1..11)]);
        assert_eq!(ids("x<|a|><|b|>", &|span| span.end < 8), [(1, 1..6)]);
        assert_eq!(ids("x<|a|><|b|>", &|_| false), []);
    }

    #[test]
    fn literals_take_whitespace_along_where_the_tokenizer_says_so() {
        assert_eq!(ids("a  <mask> \n b", &|_| true), [(3, 1..12)]);
    }

    #[test]
    fn a_single_word_is_not_found_inside_another() {
        let literals =
            Literals::new(vec![Literal { single_word: true, ..literals().literals[0].clone() }]);
        let found = |text: &str| literals.find(text, &|_| true).len();
        assert_eq!(
            [found("<|a|>"), found("a<|a|>"), found("<|a|>é"), found("-<|a|> ")],
            [1, 0, 0, 1]
        );
    }

    #[test]
    fn literals_that_are_not_control_need_no_permission() {
        assert_eq!(ids("é<think>", &|_| false), [(4, 2..9)]);
        assert_eq!(literals().first_control("é<think>"), None);
        assert_eq!(literals().first_control("é<think><|a|>"), Some("<|a|>"));
    }
}
