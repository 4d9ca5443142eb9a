//! Spans of an answer that the loop monitor does not judge: code blocks and tables of Markdown.
//!
//! They are told by how their lines begin: three backticks or tildes open a block of code, and the same close
//! it; a line of a table begins with `|`. A token belongs to the line that it begins in, and one that ends a
//! line to that line.

/// What of an answer may repeat itself (G-19).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Exempt {
    /// Blocks of code between fences.
    pub code: bool,
    /// Lines of tables.
    pub tables: bool,
}

/// Which span the text is in.
#[derive(Debug)]
pub(crate) struct Spans {
    exempt: Exempt,
    /// The fence that is open: its byte.
    fence: Option<u8>,
    /// How the line begins, without its first spaces; at most three bytes.
    line: Vec<u8>,
}

impl Spans {
    pub(crate) fn new(exempt: Exempt) -> Spans {
        Spans { exempt, fence: None, line: Vec::new() }
    }

    /// Reads the next token's bytes; says whether it is in a span that is exempt.
    pub(crate) fn exempts(&mut self, bytes: &[u8]) -> bool {
        if self.exempt == Exempt::default() {
            return false;
        }
        let was_exempt = self.is_exempt();
        bytes.iter().for_each(|&byte| self.push(byte));
        was_exempt || self.is_exempt()
    }

    fn is_exempt(&self) -> bool {
        self.exempt.code && self.fence.is_some()
            || self.exempt.tables && self.line.first() == Some(&b'|')
    }

    fn push(&mut self, byte: u8) {
        match byte {
            b'\n' => self.line.clear(),
            b' ' | b'\t' if self.line.is_empty() => {}
            _ if self.line.len() < 3 => {
                self.line.push(byte);
                self.look_for_a_fence();
            }
            _ => {}
        }
    }

    fn look_for_a_fence(&mut self) {
        let byte = match self.line[..] {
            [b'`', b'`', b'`'] => b'`',
            [b'~', b'~', b'~'] => b'~',
            _ => return,
        };
        self.fence = match self.fence {
            None => Some(byte),
            Some(open) if open == byte => None,
            Some(open) => Some(open),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Exempt = Exempt { code: true, tables: true };

    /// The tokens that are exempt, of a text in tokens of `n` bytes.
    fn exempt(exempt: Exempt, text: &str, n: usize) -> String {
        let mut spans = Spans::new(exempt);
        let tokens = text.as_bytes().chunks(n);
        let inside: Vec<u8> =
            tokens.filter(|token| spans.exempts(token)).flatten().copied().collect();
        String::from_utf8(inside).unwrap()
    }

    #[test]
    fn code_and_tables_are_told_by_how_lines_begin() {
        let text = "so | it\n  | a | b |\n|-|-|\nthen\n```c\n| x\n~~~\n```\nend `` |";
        assert_eq!(
            exempt(BOTH, text, 1),
            "| a | b |\n|-|-|\n`c\n| x\n~~~\n```",
            "up to the fence that closes"
        );
        let code = Exempt { tables: false, ..BOTH };
        assert_eq!(exempt(code, text, 1), "`c\n| x\n~~~\n```");
        let tables = Exempt { code: false, ..BOTH };
        assert_eq!(exempt(tables, text, 1), "| a | b |\n|-|-|\n| x\n");
        assert_eq!(exempt(Exempt::default(), text, 1), "");
        // Tokens that reach over a line's end belong to both.
        assert!(exempt(BOTH, text, 4).contains("| a | b"));
    }
}
