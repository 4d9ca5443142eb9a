//! What an untrusted template costs to compile, counted before anything compiles it.
//!
//! minijinja 3.1.0 folds constants at every level of an expression, and looks through all levels below it each time:
//! that takes as long as the square of the expression's parts, 57 s for 64 kB of `1~1~1…`, and cannot be stopped.
//! Tags are told apart here as its lexer does; one that ended earlier here would hide the rest of its parts.

/// Most squares of the parts of a tag, added up over all tags. Published templates have up to 8,100; what folds for
/// the longest at this limit, a tag of 1,000 parts, takes some milliseconds.
const MAX_SQUARES: usize = 1_000_000;

/// The tag with which a source has more than that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLong {
    /// Its line, from 1.
    pub(crate) line: usize,
    /// Its parts: names, numbers, texts and signs.
    pub(crate) n_parts: usize,
}

/// Refuses a source whose expressions would take too long to compile.
pub(crate) fn check(source: &str) -> Result<(), TooLong> {
    let mut rest = source;
    let mut squares = 0_usize;
    while let Some(at) = rest.find('{') {
        let tag = &rest[at..];
        if let Some(raw) = let_through(tag, "raw") {
            rest = behind_raw(raw);
            continue;
        }
        rest = match tag.as_bytes().get(1) {
            Some(b'#') => behind(&tag[2..], "#}"),
            Some(open @ (b'{' | b'%')) => {
                let end = if *open == b'{' { "}}" } else { "%}" };
                let (n_parts, behind) = parts(&tag[2..], end);
                squares = squares.saturating_add(n_parts.saturating_mul(n_parts));
                if squares > MAX_SQUARES {
                    let before = &source[..source.len() - tag.len()];
                    return Err(TooLong { line: before.matches('\n').count() + 1, n_parts });
                }
                behind
            }
            Some(_) | None => &tag[1..],
        };
    }
    Ok(())
}

/// Parts up to the end of a tag, and what stands behind it.
fn parts<'a>(tag: &'a str, end: &str) -> (usize, &'a str) {
    let bytes = tag.as_bytes();
    let (mut at, mut n_parts, mut n_open) = (0, 0, 0_isize);
    while let Some(&byte) = bytes.get(at) {
        if n_open == 0 && bytes[at..].starts_with(end.as_bytes()) {
            at += end.len();
            break;
        }
        n_parts += usize::from(!byte.is_ascii_whitespace());
        at += match byte {
            b'\'' | b'"' => text_len(&bytes[at..], byte),
            _ if is_of_name(byte) => bytes[at..].iter().take_while(|&&it| is_of_name(it)).count(),
            _ => 1,
        };
        n_open += match byte {
            b'(' | b'[' | b'{' => 1,
            b')' | b']' | b'}' => -1,
            _ => 0,
        };
    }
    (n_parts, tag.get(at..).unwrap_or_default())
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// Bytes of a text from its first quote to its last.
fn text_len(bytes: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while let Some(&byte) = bytes.get(at) {
        at += if byte == b'\\' { 2 } else { 1 };
        if byte == quote {
            break;
        }
    }
    at
}

fn behind<'a>(text: &'a str, end: &str) -> &'a str {
    text.split_once(end).map_or("", |(_, rest)| rest)
}

/// What stands behind the tag of this name, if that is where a text begins.
fn let_through<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let is_sign = ['-', '+'];
    let inside = text.strip_prefix("{%")?;
    let inside = inside.strip_prefix(is_sign).unwrap_or(inside).trim_ascii_start();
    let inside = inside.strip_prefix(name)?.trim_ascii_start();
    inside.strip_prefix(is_sign).unwrap_or(inside).strip_prefix("%}")
}

/// What stands behind the end of a raw stretch, in which nothing is a tag.
fn behind_raw(mut text: &str) -> &str {
    while let Some(at) = text.find("{%") {
        text = &text[at..];
        if let Some(rest) = let_through(text, "endraw") {
            return rest;
        }
        text = &text[2..];
    }
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n_parts(tag: &str) -> usize {
        let (n_parts, rest) = parts(tag, "}}");
        assert_eq!(rest, " rest", "{tag}");
        n_parts
    }

    #[test]
    fn a_tag_ends_where_no_bracket_and_no_text_is_open() {
        for (tag, expected) in [
            (" a }} rest", 1),
            ("a.b[1] ~ 'x y' }} rest", 8),
            ("{'a': {'b': 1}} }} rest", 9),
            (r#""}}" ~ '\'}}' }} rest"#, 3),
            ("é_1 -}} rest", 2),
        ] {
            assert_eq!(n_parts(tag), expected, "{tag}");
        }
    }

    /// Whatever stands before it, a chain that is too long is seen.
    #[test]
    fn l7_nothing_hides_a_long_expression() {
        let chain = format!("{{{{ 1{} }}}}", "~1".repeat(1_000));
        for before in [
            "",
            "text { % } '\"\n",
            "{# {{ ' #}",
            "{% raw %}{{ \" {% endraw %}",
            "{%- raw +%}{% endra %}{{ '{% endraw %}{%- endraw -%}",
            "{{ '}}' }}{{ \"\\\"\" }}",
            "{{ {'a': {}} }}",
            "{{#}",
        ] {
            let source = format!("{before}{chain}");
            assert!(check(&source).is_err(), "{before}");
            assert_eq!(check(&format!("{before}{{{{ 1~1 }}}}")), Ok(()), "{before}");
        }
        // Nor do many that are short by themselves.
        let many = format!("{{{{ 1{} }}}}\n", "~1".repeat(100)).repeat(30);
        assert_eq!(check(&many), Err(TooLong { line: 25, n_parts: 201 }));
        assert_eq!(check("{"), Ok(()));
    }
}
