//! Grammars of llama.cpp (GBNF), translated to Lark.
//!
//! GBNF knows characters and no tokens between them. A grammar without recursion becomes one regular expression, and
//! one with recursion rules over single characters: a lexeme of more could swallow what the next rule needs.

mod read;
mod write;

use std::collections::HashMap;

use crate::GrammarError;
use crate::lark::refused;

/// A part of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    /// These characters.
    Text(String),
    /// One character of these ranges, or, negated, of no one of them.
    Class {
        /// Each from first to last.
        ranges: Vec<(char, char)>,
        /// Whether all others are meant.
        negated: bool,
    },
    /// A rule, by its place in [`Rules`].
    Rule(usize),
    /// One after the other.
    Sequence(Vec<Node>),
    /// One of them.
    Choice(Vec<Node>),
    /// So many times.
    Repeat {
        /// What.
        node: Box<Node>,
        /// At least.
        min: u32,
        /// At most.
        max: Option<u32>,
    },
}

/// The rules of a grammar.
#[derive(Debug, Default)]
struct Rules {
    /// Names, with the byte where each is first used or defined.
    names: Vec<(String, usize)>,
    ids: HashMap<String, usize>,
    bodies: Vec<Option<Node>>,
}

impl Rules {
    fn id(&mut self, name: &str, at: usize) -> usize {
        if let Some(&id) = self.ids.get(name) {
            return id;
        }
        let id = self.names.len();
        self.names.push((name.to_owned(), at));
        self.ids.insert(name.to_owned(), id);
        self.bodies.push(None);
        id
    }
}

/// A grammar of llama.cpp as one of Lark with the rule `start`.
///
/// # Errors
/// [`GrammarError::Unsupported`] with line and column: what is not GBNF, a rule that is missing, twice there or calls
/// itself before it has read anything, and tokens (`<[7]>`), as a client names no control token.
pub(crate) fn to_lark(text: &str, most_bytes: usize) -> Result<String, GrammarError> {
    let rules = read::read(text)?;
    let Some(&root) = rules.ids.get("root") else {
        return Err(refused(text, text.len(), "expected a rule `root`, found none"));
    };
    for (body, (name, at)) in rules.bodies.iter().zip(&rules.names) {
        if body.is_none() {
            return Err(refused(text, *at, format!("the rule `{name}` is not defined")));
        }
    }
    if let Some(id) = left_recursive(&rules) {
        let (name, at) = &rules.names[id];
        let reason = format!("the rule `{name}` calls itself before it has read anything");
        return Err(refused(text, *at, reason));
    }
    write::write(&rules, root, most_bytes).ok_or(GrammarError::TooLarge {
        what: "bytes of a translated grammar",
        limit: most_bytes as u64,
        found: most_bytes as u64,
    })
}

/// Which rules can be empty.
fn nullable(rules: &Rules) -> Vec<bool> {
    let mut is_nullable = vec![false; rules.bodies.len()];
    loop {
        let mut has_changed = false;
        for (id, body) in rules.bodies.iter().enumerate() {
            if !is_nullable[id] && body.as_ref().is_some_and(|it| can_be_empty(it, &is_nullable)) {
                is_nullable[id] = true;
                has_changed = true;
            }
        }
        if !has_changed {
            return is_nullable;
        }
    }
}

fn can_be_empty(node: &Node, rules: &[bool]) -> bool {
    match node {
        Node::Text(text) => text.is_empty(),
        Node::Class { .. } => false,
        Node::Rule(id) => rules[*id],
        Node::Sequence(parts) => parts.iter().all(|it| can_be_empty(it, rules)),
        Node::Choice(parts) => parts.iter().any(|it| can_be_empty(it, rules)),
        Node::Repeat { node, min, .. } => *min == 0 || can_be_empty(node, rules),
    }
}

/// A rule that reaches itself before anything is read.
fn left_recursive(rules: &Rules) -> Option<usize> {
    let is_nullable = nullable(rules);
    let first: Vec<Vec<usize>> = rules
        .bodies
        .iter()
        .map(|body| {
            let mut found = Vec::new();
            body.iter().for_each(|it| {
                first_rules(it, &is_nullable, &mut found);
            });
            found
        })
        .collect();
    cycle(&first)
}

/// Rules that a part may begin with. Whether it can be empty comes back.
fn first_rules(node: &Node, is_nullable: &[bool], found: &mut Vec<usize>) -> bool {
    match node {
        Node::Text(text) => text.is_empty(),
        Node::Class { .. } => false,
        Node::Rule(id) => {
            found.push(*id);
            is_nullable[*id]
        }
        Node::Sequence(parts) => parts.iter().all(|it| first_rules(it, is_nullable, found)),
        Node::Choice(parts) => {
            let mut can_be_empty = false;
            for part in parts {
                can_be_empty |= first_rules(part, is_nullable, found);
            }
            can_be_empty
        }
        Node::Repeat { node, min, .. } => first_rules(node, is_nullable, found) || *min == 0,
    }
}

/// A vertex on a cycle.
fn cycle(edges: &[Vec<usize>]) -> Option<usize> {
    #[derive(Clone, Copy, PartialEq)]
    enum Seen {
        No,
        Open,
        Done,
    }
    let mut seen = vec![Seen::No; edges.len()];
    for start in 0..edges.len() {
        let mut path = vec![(start, 0)];
        while let Some((vertex, next)) = path.pop() {
            if next == 0 {
                if seen[vertex] == Seen::Done {
                    continue;
                }
                seen[vertex] = Seen::Open;
            }
            match edges[vertex].get(next) {
                None => seen[vertex] = Seen::Done,
                Some(&to) => {
                    path.push((vertex, next + 1));
                    match seen[to] {
                        Seen::Open => return Some(to),
                        Seen::No => path.push((to, 0)),
                        Seen::Done => {}
                    }
                }
            }
        }
    }
    None
}

/// Rules that a part calls.
fn called(node: &Node, found: &mut Vec<usize>) {
    match node {
        Node::Text(_) | Node::Class { .. } => {}
        Node::Rule(id) => found.push(*id),
        Node::Sequence(parts) | Node::Choice(parts) => {
            parts.iter().for_each(|it| called(it, found));
        }
        Node::Repeat { node, .. } => called(node, found),
    }
}

fn is_recursive(rules: &Rules) -> bool {
    let calls: Vec<Vec<usize>> = rules
        .bodies
        .iter()
        .map(|body| {
            let mut found = Vec::new();
            body.iter().for_each(|it| called(it, &mut found));
            found
        })
        .collect();
    cycle(&calls).is_some()
}
