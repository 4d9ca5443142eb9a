//! Regular expressions as JSON Schema writes them (ECMA-262 with the flag `u`), read strictly and rewritten for an
//! engine that reads some of it differently: `\d` is ten digits, `.` leaves out four line ends, `[[` is no set.

use std::iter::Peekable;
use std::str::CharIndices;

use llguidance::derivre::{RegexAst, RegexBuilder};

/// Deepest nesting of groups.
const MAX_DEPTH: usize = 64;
/// Largest bound of a repetition.
const MAX_REPEAT: u32 = 100_000;

const DIGIT: &str = "0-9";
const WORD: &str = "0-9A-Za-z_";
/// `WhiteSpace` and `LineTerminator` of ECMA-262.
const SPACE: &str =
    r"\x09-\x0D\x20\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}";
const DOT: &str = r"[^\n\r\x{2028}\x{2029}]";

/// What is wrong with a pattern.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PatternError {
    /// Column, in characters from 1.
    pub(crate) column: usize,
    /// What it is and what to write instead.
    pub(crate) reason: String,
}

/// Whether a pattern is looked for anywhere in a text or is all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// JSON Schema's `pattern`.
    Anywhere,
    /// A text as a whole.
    Whole,
}

/// The set that `\d`, `\w`, `\s` or the opposite of one is in ECMA-262, in the syntax of the automaton; `None` for
/// another escape. The automaton's own are those of Unicode: its `\d` takes full-width digits (field fault B17).
pub(crate) fn set_of(escape: char) -> Option<String> {
    let (is_negated, members) = match escape {
        'd' | 'D' => (escape == 'D', DIGIT),
        'w' | 'W' => (escape == 'W', WORD),
        's' | 'S' => (escape == 'S', SPACE),
        _ => return None,
    };
    Some(format!("[{}{members}]", if is_negated { "^" } else { "" }))
}

/// Whether the automaton can read a pattern that is in its syntax.
///
/// # Errors
/// Why not, in its own words.
pub(crate) fn readable(ast: &RegexAst) -> Result<(), String> {
    RegexBuilder::new().mk(ast).map(drop).map_err(|error| error.to_string())
}

/// The pattern in the syntax of the automaton, which can enforce it.
///
/// # Errors
/// [`PatternError`] for what ECMA-262 does not have, and for what it has and the automaton cannot: look-arounds,
/// word boundaries, back-references, anchors in the middle.
pub(crate) fn rewrite(pattern: &str, reach: Reach) -> Result<String, PatternError> {
    let mut reader = Reader {
        text: pattern,
        rest: pattern.char_indices().peekable(),
        mark: 0,
        out: String::new(),
    };
    reader.disjunction(0)?;
    if let Some(&(at, found)) = reader.rest.peek() {
        reader.mark = at;
        return Err(reader.fault(format!("`{found}` closes nothing; write `\\{found}`")));
    }
    let ast = match reach {
        Reach::Anywhere => RegexAst::SearchRegex(reader.out.clone()),
        Reach::Whole => RegexAst::Regex(reader.out.clone()),
    };
    if let Err(error) = readable(&ast) {
        let reason = if error.contains("lookarounds") {
            "`^` and `$` can be enforced only at the ends of the pattern or of its alternatives"
                .into()
        } else {
            format!("it cannot be compiled: {}", error.lines().last().unwrap_or_default())
        };
        return Err(PatternError { column: 1, reason });
    }
    Ok(reader.out)
}

struct Reader<'a> {
    text: &'a str,
    rest: Peekable<CharIndices<'a>>,
    /// Where what is being read begins, in bytes.
    mark: usize,
    out: String,
}

/// One member of a class.
enum Member {
    Char(char),
    Set(String),
}

impl Reader<'_> {
    fn fault(&self, reason: impl Into<String>) -> PatternError {
        let column = self.text[..self.mark].chars().count() + 1;
        PatternError { column, reason: reason.into() }
    }

    fn set_mark(&mut self) {
        self.mark = self.rest.peek().map_or(self.text.len(), |&(at, _)| at);
    }

    fn peek(&mut self) -> Option<char> {
        self.rest.peek().map(|&(_, found)| found)
    }

    fn next(&mut self) -> Option<char> {
        self.rest.next().map(|(_, found)| found)
    }

    fn eat(&mut self, wanted: &str) -> bool {
        let at = self.rest.peek().map_or(self.text.len(), |&(at, _)| at);
        let is_there = self.text[at..].starts_with(wanted);
        if is_there {
            for _ in wanted.chars() {
                self.next();
            }
        }
        is_there
    }

    fn disjunction(&mut self, depth: usize) -> Result<(), PatternError> {
        if depth > MAX_DEPTH {
            return Err(self.fault(format!("groups in groups: expected at most {MAX_DEPTH}")));
        }
        loop {
            match self.peek() {
                None | Some(')') => return Ok(()),
                Some('|') => {
                    self.next();
                    self.out.push('|');
                }
                Some(_) => self.term(depth)?,
            }
        }
    }

    fn term(&mut self, depth: usize) -> Result<(), PatternError> {
        self.set_mark();
        let Some(first) = self.peek() else { return Ok(()) };
        let mut can_repeat = true;
        match first {
            '^' | '$' => {
                self.next();
                self.out.push(first);
                can_repeat = false;
            }
            '.' => {
                self.next();
                self.out.push_str(DOT);
            }
            '(' => self.group(depth)?,
            '[' => self.class()?,
            '\\' => match self.escape(false)? {
                Member::Char(found) => push_literal(&mut self.out, found),
                Member::Set(set) => self.out.push_str(&set),
            },
            '*' | '+' | '?' => return Err(self.fault(format!("`{first}` repeats nothing"))),
            ']' | '{' | '}' => {
                return Err(self.fault(format!("`{first}` stands alone; write `\\{first}`")));
            }
            _ => {
                self.next();
                push_literal(&mut self.out, first);
            }
        }
        self.quantifier(can_repeat)
    }

    fn quantifier(&mut self, can_repeat: bool) -> Result<(), PatternError> {
        let Some(first @ ('*' | '+' | '?' | '{')) = self.peek() else { return Ok(()) };
        if !can_repeat {
            return Err(self.fault("an anchor cannot be repeated"));
        }
        self.next();
        if first == '{' {
            let low = self.number()?;
            let high = match self.next() {
                Some('}') => Some(low),
                Some(',') if self.peek() == Some('}') => {
                    self.next();
                    None
                }
                Some(',') => {
                    let high = self.number()?;
                    if self.next() != Some('}') {
                        return Err(self.fault("expected `}` behind the bounds of a repetition"));
                    }
                    Some(high)
                }
                _ => return Err(self.fault("expected `}` or `,` in a repetition")),
            };
            if high.is_some_and(|high| high < low) {
                return Err(self.fault(format!("a repetition from {low} down to {high:?}")));
            }
            let high = high.map(|it| it.to_string()).unwrap_or_default();
            self.out.push_str(&format!("{{{low},{high}}}"));
        } else {
            self.out.push(first);
        }
        // Lazy or greedy, the texts are the same.
        self.eat("?");
        if let Some(found @ ('*' | '+' | '?' | '{')) = self.peek() {
            return Err(self.fault(format!("`{found}` repeats a repetition")));
        }
        Ok(())
    }

    fn number(&mut self) -> Result<u32, PatternError> {
        let mut digits = String::new();
        while let Some(digit) = self.peek().filter(char::is_ascii_digit) {
            digits.push(digit);
            self.next();
        }
        match digits.parse() {
            Ok(number) if number <= MAX_REPEAT => Ok(number),
            _ => Err(self.fault(format!(
                "a repetition: expected a number up to {MAX_REPEAT}, found `{digits}`"
            ))),
        }
    }

    fn group(&mut self, depth: usize) -> Result<(), PatternError> {
        for (opening, name) in [
            ("(?=", "a look-ahead"),
            ("(?!", "a look-ahead"),
            ("(?<=", "a look-behind"),
            ("(?<!", "a look-behind"),
        ] {
            if self.eat(opening) {
                return Err(self.fault(format!("{name} (`{opening}…)`) cannot be enforced")));
            }
        }
        let is_named = self.eat("(?<");
        if is_named {
            self.group_name()?;
        } else if !self.eat("(?:") {
            self.next();
            if self.peek() == Some('?') {
                return Err(
                    self.fault("`(?` opens no group of ECMA-262; flags are not part of a pattern")
                );
            }
        }
        self.out.push_str("(?:");
        self.disjunction(depth + 1)?;
        if self.next() != Some(')') {
            return Err(self.fault("a group is not closed"));
        }
        self.out.push(')');
        Ok(())
    }

    fn group_name(&mut self) -> Result<(), PatternError> {
        let mut n_chars = 0;
        while let Some(found) = self.next() {
            match found {
                '>' if n_chars > 0 => return Ok(()),
                _ if found.is_alphanumeric() || found == '_' || found == '$' => n_chars += 1,
                _ => break,
            }
        }
        Err(self.fault("the name of a group: expected letters and digits up to `>`"))
    }

    fn class(&mut self) -> Result<(), PatternError> {
        self.next();
        let is_negated = self.eat("^");
        let mut members = String::new();
        loop {
            match self.peek() {
                None => return Err(self.fault("a class is not closed: expected `]`")),
                Some(']') => break,
                Some(_) => {}
            }
            let low = self.member()?;
            let is_range = self.peek() == Some('-') && {
                let mut ahead = self.rest.clone();
                ahead.next();
                ahead.next().is_some_and(|(_, found)| found != ']')
            };
            if !is_range {
                push_member(&mut members, &low);
                continue;
            }
            self.next();
            let high = self.member()?;
            let (Member::Char(low), Member::Char(high)) = (low, high) else {
                return Err(self.fault("a range between sets of characters; write `\\-`"));
            };
            if low > high {
                return Err(self.fault(format!("the range `{low}-{high}` is empty")));
            }
            members.push_str(&format!("\\x{{{:X}}}-\\x{{{:X}}}", u32::from(low), u32::from(high)));
        }
        self.next();
        match (members.is_empty(), is_negated) {
            (true, false) => return Err(self.fault("`[]` matches nothing")),
            (true, true) => self.out.push_str(r"[\x00-\x{10FFFF}]"),
            (false, true) => self.out.push_str(&format!("[^{members}]")),
            (false, false) => self.out.push_str(&format!("[{members}]")),
        }
        Ok(())
    }

    fn member(&mut self) -> Result<Member, PatternError> {
        match self.peek() {
            Some('\\') => self.escape(true),
            Some(found) => {
                self.next();
                Ok(Member::Char(found))
            }
            None => Err(self.fault("a class is not closed: expected `]`")),
        }
    }

    fn escape(&mut self, in_class: bool) -> Result<Member, PatternError> {
        self.set_mark();
        self.next();
        let Some(kind) = self.next() else {
            return Err(self.fault("`\\` escapes nothing"));
        };
        if let Some(set) = set_of(kind) {
            return Ok(Member::Set(set));
        }
        match kind {
            't' => Ok(Member::Char('\t')),
            'n' => Ok(Member::Char('\n')),
            'r' => Ok(Member::Char('\r')),
            'v' => Ok(Member::Char('\u{B}')),
            'f' => Ok(Member::Char('\u{C}')),
            'b' if in_class => Ok(Member::Char('\u{8}')),
            'b' | 'B' => Err(self.fault("a word boundary (`\\b`, `\\B`) cannot be enforced")),
            '0' if !self.peek().is_some_and(|it| it.is_ascii_digit()) => Ok(Member::Char('\0')),
            '0'..='9' | 'k' => Err(self.fault("a back-reference cannot be enforced")),
            'c' => match self.next() {
                Some(letter) if letter.is_ascii_alphabetic() => {
                    Ok(Member::Char(char::from(letter as u8 % 32)))
                }
                _ => Err(self.fault("`\\c`: expected a letter")),
            },
            'x' => self.hex(2).and_then(|code| self.character(code)),
            'u' => self.unicode(),
            'p' | 'P' => self.property(kind),
            '^' | '$' | '\\' | '.' | '*' | '+' | '?' | '(' | ')' | '[' | ']' | '{' | '}' | '|'
            | '/' | '-' => Ok(Member::Char(kind)),
            _ => Err(self.fault(format!(
                "`\\{kind}` is no escape of ECMA-262 with the flag `u`; write `{kind}`"
            ))),
        }
    }

    fn hex(&mut self, n_digits: usize) -> Result<u32, PatternError> {
        let mut code = 0;
        for _ in 0..n_digits {
            match self.next().and_then(|it| it.to_digit(16)) {
                Some(digit) => code = code * 16 + digit,
                None => {
                    return Err(self.fault(format!("expected {n_digits} hexadecimal digits")));
                }
            }
        }
        Ok(code)
    }

    fn unicode(&mut self) -> Result<Member, PatternError> {
        if self.eat("{") {
            let mut code: u32 = 0;
            let mut n_digits = 0;
            while let Some(digit) = self.peek().and_then(|it| it.to_digit(16)) {
                code = code.saturating_mul(16).saturating_add(digit);
                n_digits += 1;
                self.next();
            }
            if n_digits == 0 || !self.eat("}") {
                return Err(self.fault("`\\u{`: expected hexadecimal digits and `}`"));
            }
            return self.character(code);
        }
        let high = self.hex(4)?;
        if (0xD800..0xDC00).contains(&high) && self.eat("\\u") {
            let low = self.hex(4)?;
            if (0xDC00..0xE000).contains(&low) {
                return self.character(0x1_0000 + ((high - 0xD800) << 10) + (low - 0xDC00));
            }
        }
        self.character(high)
    }

    fn character(&mut self, code: u32) -> Result<Member, PatternError> {
        match char::from_u32(code) {
            Some(found) => Ok(Member::Char(found)),
            None => Err(self.fault(format!("U+{code:04X} is no character"))),
        }
    }

    fn property(&mut self, kind: char) -> Result<Member, PatternError> {
        let mut name = String::new();
        let is_open = self.eat("{");
        while let Some(found) = self.next() {
            if found == '}' && is_open && !name.is_empty() {
                return Ok(Member::Set(format!("\\{kind}{{{name}}}")));
            }
            if !is_open || !(found.is_ascii_alphanumeric() || found == '_' || found == '=') {
                break;
            }
            name.push(found);
        }
        Err(self.fault(format!("`\\{kind}`: expected `{{`, a property and `}}`")))
    }
}

fn push_member(members: &mut String, member: &Member) {
    match member {
        Member::Char(found) => members.push_str(&format!("\\x{{{:X}}}", u32::from(*found))),
        Member::Set(set) => members.push_str(set),
    }
}

fn push_literal(out: &mut String, found: char) {
    if found.is_alphanumeric()
        || [' ', '_', '/', '"', '\'', ':', ',', '@', '<', '>', '=', '!', '%', ';'].contains(&found)
    {
        out.push(found);
    } else {
        out.push_str(&format!("\\x{{{:X}}}", u32::from(found)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(pattern: &str) -> PatternError {
        rewrite(pattern, Reach::Anywhere).expect_err(pattern)
    }

    #[test]
    fn b1_an_escape_that_is_none_is_refused_with_its_column() {
        let error = refused("^hello there indeed\\!$");
        assert_eq!(error.column, 20);
        assert!(error.reason.contains("`\\!`"), "{}", error.reason);
    }

    #[test]
    fn b17_d_is_ten_digits_and_looking_around_is_refused() {
        assert_eq!(rewrite(r"^\d$", Reach::Anywhere).unwrap(), "^[0-9]$");
        for pattern in ["(?=a)b", "a(?!b)", "(?<=a)b", "(?<!a)b", r"\bword\b", r"(a)\1", "a^b"] {
            refused(pattern);
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for pattern in [
            "[a-z",
            "a{2",
            "a{3,1}",
            "a{",
            "*a",
            "(a",
            "a)",
            "\\",
            "\\d{",
            "[z-a]",
            "a**",
            "(?i)a",
            "[]",
            "\\u{}",
            "\\x4",
            "\\p{",
            "\\p",
            "\\c1",
            "(?<>a)",
            "{",
            "}",
            "]",
            "^*",
            "\\u{110000}",
            "\\uD800",
            "a{999999999}",
            "(?P<n>a)",
            "[\\d-z]",
            "\\p{Nonsense}",
            "\\q",
        ] {
            refused(pattern);
        }
    }

    #[test]
    fn sets_of_the_other_dialect_are_literals_here() {
        let automaton = |pattern: &str| {
            let pattern = rewrite(pattern, Reach::Whole).unwrap();
            let mut builder = RegexBuilder::new();
            let expression = builder.mk(&RegexAst::Regex(pattern)).unwrap();
            builder.to_regex(expression)
        };
        for (pattern, yes, no) in [
            ("[[a]", "[", "b"),
            ("[a&&b]", "&", "c"),
            ("[b~~a]", "~", "c"),
            (r"\u{1F600}|\uD83D\uDE00", "😀", "a"),
            (r"[\w.-]+", "a.b-c_1", "é"),
            (".", "a", "\u{2028}"),
            (r"\s", "\u{FEFF}", "\u{200B}"),
            ("(?<year>[0-9]{4})", "2026", "20"),
            (r"\cJ", "\n", "J"),
            ("[^]", "\n", ""),
            (r"a{2}?", "aa", "a"),
            (r"\/\-", "/-", "\\"),
            (r"[\]\-\\]", "-", "a"),
        ] {
            assert!(automaton(pattern).is_match(yes), "{pattern} on {yes:?}");
            assert!(!automaton(pattern).is_match(no), "{pattern} on {no:?}");
        }
    }
}
