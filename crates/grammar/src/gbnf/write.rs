//! Rules as Lark.

use super::{Node, Rules, is_recursive};

/// The grammar, within so many bytes.
pub(super) fn write(rules: &Rules, root: usize, most_bytes: usize) -> Option<String> {
    if !is_recursive(rules) {
        let mut regex = String::new();
        if inlined(rules, &rules.bodies[root], most_bytes, &mut regex).is_some() {
            return Some(format!("start: ROOT\nROOT: /{regex}/\n"));
        }
    }
    let mut out = format!("start: r{root}\n");
    for (id, body) in rules.bodies.iter().enumerate() {
        out.push_str(&format!("r{id}: "));
        rule(body.as_ref()?, &mut out);
        out.push('\n');
        if out.len() > most_bytes {
            return None;
        }
    }
    Some(out)
}

/// One regular expression with all rules in their places; `None` where that is too long.
fn inlined(rules: &Rules, body: &Option<Node>, most: usize, out: &mut String) -> Option<()> {
    regex(rules, body.as_ref()?, most, out)
}

fn regex(rules: &Rules, node: &Node, most: usize, out: &mut String) -> Option<()> {
    if out.len() > most {
        return None;
    }
    match node {
        Node::Text(text) => text.chars().for_each(|it| push_char(it, out)),
        Node::Class { ranges, negated } => push_class(ranges, *negated, out),
        Node::Rule(id) => {
            out.push_str("(?:");
            inlined(rules, &rules.bodies[*id], most, out)?;
            out.push(')');
        }
        Node::Sequence(parts) => {
            for part in parts {
                group(rules, part, most, out)?;
            }
        }
        Node::Choice(parts) => {
            out.push_str("(?:");
            for (at, part) in parts.iter().enumerate() {
                if at > 0 {
                    out.push('|');
                }
                regex(rules, part, most, out)?;
            }
            out.push(')');
        }
        Node::Repeat { node, min, max } => {
            group(rules, node, most, out)?;
            push_bounds(*min, *max, out);
        }
    }
    Some(())
}

fn group(rules: &Rules, node: &Node, most: usize, out: &mut String) -> Option<()> {
    out.push_str("(?:");
    regex(rules, node, most, out)?;
    out.push(')');
    Some(())
}

/// A part of a rule over single characters.
fn rule(node: &Node, out: &mut String) {
    match node {
        Node::Text(text) if text.is_empty() => out.push_str("\"\""),
        Node::Text(text) => {
            for (at, found) in text.chars().enumerate() {
                if at > 0 {
                    out.push(' ');
                }
                push_class_lexeme(&[(found, found)], false, out);
            }
        }
        Node::Class { ranges, negated } => push_class_lexeme(ranges, *negated, out),
        Node::Rule(id) => {
            out.push_str(&format!("r{id}"));
        }
        Node::Sequence(parts) if parts.is_empty() => out.push_str("\"\""),
        Node::Sequence(parts) => {
            for (at, part) in parts.iter().enumerate() {
                if at > 0 {
                    out.push(' ');
                }
                grouped(part, out);
            }
        }
        Node::Choice(parts) => {
            out.push('(');
            for (at, part) in parts.iter().enumerate() {
                if at > 0 {
                    out.push_str(" | ");
                }
                rule(part, out);
            }
            out.push(')');
        }
        Node::Repeat { node, min, max } => {
            grouped(node, out);
            push_bounds(*min, *max, out);
        }
    }
}

fn grouped(node: &Node, out: &mut String) {
    out.push('(');
    rule(node, out);
    out.push(')');
}

fn push_bounds(min: u32, max: Option<u32>, out: &mut String) {
    match (min, max) {
        (0, None) => out.push('*'),
        (1, None) => out.push('+'),
        (0, Some(1)) => out.push('?'),
        (min, Some(max)) => {
            out.push_str(&format!("{{{min},{max}}}"));
        }
        (min, None) => {
            out.push_str(&format!("{{{min},}}"));
        }
    }
}

fn push_class_lexeme(ranges: &[(char, char)], negated: bool, out: &mut String) {
    out.push('/');
    push_class(ranges, negated, out);
    out.push('/');
}

fn push_class(ranges: &[(char, char)], negated: bool, out: &mut String) {
    if ranges.is_empty() {
        out.push_str(r"[\x00-\x{10FFFF}]");
        return;
    }
    out.push_str(if negated { "[^" } else { "[" });
    for &(low, high) in ranges {
        push_char(low, out);
        if low < high {
            out.push('-');
            push_char(high, out);
        }
    }
    out.push(']');
}

/// By number, so that nothing means anything.
fn push_char(found: char, out: &mut String) {
    out.push_str(&format!("\\x{{{:X}}}", u32::from(found)));
}
