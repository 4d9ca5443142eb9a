//! GBNF from text.

use super::{Node, Rules};
use crate::GrammarError;
use crate::lark::refused;

/// Deepest nesting of groups.
const MAX_DEPTH: usize = 64;
/// Largest bound of a repetition; llama.cpp has the same.
const MAX_REPEAT: u32 = 2000;

pub(super) fn read(text: &str) -> Result<Rules, GrammarError> {
    let mut reader = Reader { text, at: 0, rules: Rules::default() };
    reader.blanks(Lines::Over);
    while reader.at < text.len() {
        reader.rule()?;
        reader.blanks(Lines::Over);
    }
    Ok(reader.rules)
}

/// Whether blanks may go on behind the end of a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    One,
    Over,
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    rules: Rules,
}

impl Reader<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let found = self.peek()?;
        self.at += found.len_utf8();
        Some(found)
    }

    fn eat(&mut self, wanted: &str) -> bool {
        let is_there = self.text[self.at..].starts_with(wanted);
        if is_there {
            self.at += wanted.len();
        }
        is_there
    }

    fn fault<T>(&self, reason: impl Into<String>) -> Result<T, GrammarError> {
        Err(refused(self.text, self.at, reason))
    }

    fn blanks(&mut self, lines: Lines) {
        while let Some(found) = self.peek() {
            match found {
                ' ' | '\t' => {}
                '\n' | '\r' if lines == Lines::Over => {}
                '#' => {
                    while self.peek().is_some_and(|it| it != '\n' && it != '\r') {
                        self.next();
                    }
                    continue;
                }
                _ => return,
            }
            self.next();
        }
    }

    fn name(&mut self) -> Result<(usize, usize), GrammarError> {
        let at = self.at;
        while self.peek().is_some_and(|it| it.is_ascii_alphanumeric() || it == '-' || it == '_') {
            self.next();
        }
        if at == self.at {
            let found = self.peek().map_or("the end".to_owned(), |it| format!("`{it}`"));
            return self.fault(format!("expected the name of a rule, found {found}"));
        }
        let name = self.text[at..self.at].to_owned();
        Ok((self.rules.id(&name, at), at))
    }

    fn rule(&mut self) -> Result<(), GrammarError> {
        let (id, at) = self.name()?;
        self.blanks(Lines::One);
        if !self.eat("::=") {
            return self.fault("expected `::=` behind the name of a rule");
        }
        self.blanks(Lines::Over);
        let body = self.choice(Lines::One, 0)?;
        if !matches!(self.peek(), None | Some('\n' | '\r')) {
            let found = self.peek().unwrap_or_default();
            return self.fault(format!("expected the end of the line, found `{found}`"));
        }
        if self.rules.bodies[id].replace(body).is_some() {
            let name = &self.rules.names[id].0;
            return Err(refused(self.text, at, format!("the rule `{name}` is there twice")));
        }
        self.rules.names[id].1 = at;
        Ok(())
    }

    fn choice(&mut self, lines: Lines, depth: usize) -> Result<Node, GrammarError> {
        if depth > MAX_DEPTH {
            return self.fault(format!("groups in groups: expected at most {MAX_DEPTH}"));
        }
        let mut options = vec![self.sequence(lines, depth)?];
        while self.eat("|") {
            self.blanks(Lines::Over);
            options.push(self.sequence(lines, depth)?);
        }
        Ok(if options.len() == 1 { options.swap_remove(0) } else { Node::Choice(options) })
    }

    fn sequence(&mut self, lines: Lines, depth: usize) -> Result<Node, GrammarError> {
        let mut parts = Vec::new();
        while let Some(found) = self.peek() {
            let part = match found {
                '"' => self.quoted()?,
                '[' => self.class()?,
                '.' => {
                    self.next();
                    Node::Class { ranges: Vec::new(), negated: true }
                }
                '(' => {
                    self.next();
                    self.blanks(Lines::Over);
                    let inner = self.choice(Lines::Over, depth + 1)?;
                    if !self.eat(")") {
                        return self.fault("a group is not closed: expected `)`");
                    }
                    inner
                }
                '<' | '!' => {
                    return self.fault("tokens (`<…>`) cannot be part of a client's grammar");
                }
                '*' | '+' | '?' | '{' => {
                    return self.fault(format!("`{found}` repeats nothing"));
                }
                _ if found.is_ascii_alphanumeric() || found == '-' || found == '_' => {
                    Node::Rule(self.name()?.0)
                }
                _ => break,
            };
            self.blanks(lines);
            parts.push(self.repeated(part, lines)?);
        }
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { Node::Sequence(parts) })
    }

    fn repeated(&mut self, mut node: Node, lines: Lines) -> Result<Node, GrammarError> {
        loop {
            let (min, max) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    self.next();
                    self.bounds()?
                }
                _ => return Ok(node),
            };
            self.next();
            self.blanks(lines);
            node = Node::Repeat { node: Box::new(node), min, max };
        }
    }

    /// `m}`, `m,}`, `,n}` or `m,n}`, up to the brace.
    fn bounds(&mut self) -> Result<(u32, Option<u32>), GrammarError> {
        self.blanks(Lines::One);
        let low = self.number()?;
        self.blanks(Lines::One);
        let (min, max) = if self.eat(",") {
            self.blanks(Lines::One);
            let high = self.number()?;
            self.blanks(Lines::One);
            (low.unwrap_or(0), high)
        } else {
            let Some(low) = low else { return self.fault("a repetition: expected a number") };
            (low, Some(low))
        };
        if self.peek() != Some('}') {
            return self.fault("a repetition is not closed: expected `}`");
        }
        if max.is_some_and(|max| max < min) {
            return self.fault("a repetition has a lower bound above its upper one");
        }
        Ok((min, max))
    }

    fn number(&mut self) -> Result<Option<u32>, GrammarError> {
        let at = self.at;
        while self.peek().is_some_and(|it| it.is_ascii_digit()) {
            self.next();
        }
        let digits = &self.text[at..self.at];
        match digits.parse() {
            _ if digits.is_empty() => Ok(None),
            Ok(number) if number <= MAX_REPEAT => Ok(Some(number)),
            _ => self.fault(format!("a repetition: expected at most {MAX_REPEAT}, found {digits}")),
        }
    }

    fn quoted(&mut self) -> Result<Node, GrammarError> {
        self.next();
        let mut text = String::new();
        loop {
            match self.peek() {
                Some('"') => {
                    self.next();
                    return Ok(Node::Text(text));
                }
                None | Some('\n' | '\r') => {
                    return self.fault("a text is not closed: expected `\"`");
                }
                Some(_) => text.push(self.character()?),
            }
        }
    }

    fn class(&mut self) -> Result<Node, GrammarError> {
        self.next();
        let negated = self.eat("^");
        let mut ranges = Vec::new();
        loop {
            match self.peek() {
                Some(']') => break,
                None | Some('\n' | '\r') => {
                    return self.fault("a class is not closed: expected `]`");
                }
                Some(_) => {}
            }
            let low = self.character()?;
            let mut high = low;
            if self.peek() == Some('-') && !self.text[self.at..].starts_with("-]") {
                self.next();
                if matches!(self.peek(), None | Some('\n' | '\r')) {
                    return self.fault("a class is not closed: expected `]`");
                }
                high = self.character()?;
            }
            if high < low {
                return self.fault(format!("the range `{low}-{high}` is empty"));
            }
            ranges.push((low, high));
        }
        self.next();
        if ranges.is_empty() && !negated {
            return self.fault("`[]` matches nothing");
        }
        Ok(Node::Class { ranges, negated })
    }

    fn character(&mut self) -> Result<char, GrammarError> {
        let Some(found) = self.next() else { return self.fault("expected a character") };
        if found != '\\' {
            return Ok(found);
        }
        match self.next() {
            Some('n') => Ok('\n'),
            Some('r') => Ok('\r'),
            Some('t') => Ok('\t'),
            Some(plain @ ('\\' | '"' | '[' | ']' | '-' | '^' | '/')) => Ok(plain),
            Some('x') => self.hex(2),
            Some('u') => self.hex(4),
            Some('U') => self.hex(8),
            Some(other) => self.fault(format!("`\\{other}` is no escape")),
            None => self.fault("`\\` escapes nothing"),
        }
    }

    fn hex(&mut self, n_digits: usize) -> Result<char, GrammarError> {
        let mut code: u32 = 0;
        for _ in 0..n_digits {
            match self.next().and_then(|it| it.to_digit(16)) {
                Some(digit) => code = code.saturating_mul(16).saturating_add(digit),
                None => return self.fault(format!("expected {n_digits} hexadecimal digits")),
            }
        }
        match char::from_u32(code) {
            Some(found) => Ok(found),
            None => self.fault(format!("U+{code:04X} is no character")),
        }
    }
}
