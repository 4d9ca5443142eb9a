//! The constraint lock (G-31): the hard rules of a request, what contradicts them, and whether the tokens of a
//! prompt still say them.
//!
//! A rule is text of the client: one line, told to the model in the constraints slot, and as untrusted as any
//! message. What it *forbids* are regular expressions over the answer, which are decided in linear time. An answer
//! that breaks a rule in other words passes: no model here judges entailment, and records say so ([`NLI`]).

use std::borrow::Cow;

use regex_automata::{
    Input,
    meta::{Config, Regex},
    nfa::thompson::WhichCaptures,
    util::syntax,
};
use serde_json::Value;

use crate::prompt::{REFUSAL_TOKEN, constraints_sha256};

/// Most rules of a request.
pub const MAX_RULES: usize = 16;
/// Most bytes of a rule.
pub const MAX_RULE_BYTES: usize = 512;
/// Most patterns of a request, over all of its rules.
pub const MAX_PATTERNS: usize = 32;
/// Most bytes of a pattern.
pub const MAX_PATTERN_BYTES: usize = 256;
/// The status of what no pattern sees: a contradiction in other words.
pub const NLI: &str = "not_available";

/// Most bytes of the automaton of all patterns; beyond it they are refused.
const MAX_AUTOMATON_BYTES: usize = 2 << 20;
/// Most bytes of what a search keeps of it.
const MAX_CACHE_BYTES: usize = 1 << 20;
/// Deepest nesting of a pattern.
const MAX_NESTING: u32 = 50;
/// Longest match in bytes that a stream is held back for; with a longer one nothing goes on before the end.
const MAX_REACH: usize = 1024;
/// What a pattern may look at behind its match: one character.
const LOOK_AHEAD: usize = 4;

/// What stands above the rules in a prompt.
const HEAD: &str = "Rules:";
/// What stands before each of them.
const BULLET: &str = "\n- ";

/// The rules as a prompt tells them: a head, and a line each.
#[must_use]
pub fn write_rules(rules: &[impl AsRef<str>]) -> String {
    let mut text = HEAD.to_owned();
    for rule in rules {
        text.push_str(BULLET);
        text.push_str(rule.as_ref());
    }
    text
}

/// The rules of a text that [`write_rules`] wrote, without blanks around them; none in any other text.
#[must_use]
pub fn read_rules(text: &str) -> Vec<String> {
    let lines = text.trim().strip_prefix(HEAD).map(|rules| rules.split(BULLET));
    lines.into_iter().flatten().skip(1).map(|rule| rule.trim().to_owned()).collect()
}

/// A rule, and what contradicts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HardRule {
    /// One line of text, at most [`MAX_RULE_BYTES`].
    pub text: String,
    /// Regular expressions, each at most [`MAX_PATTERN_BYTES`].
    pub forbid: Vec<String>,
}

/// A rule or a pattern that cannot be kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct BadRule {
    /// `constraints[1].forbid[0]`, from 0.
    pub place: String,
    /// Expected and found.
    pub problem: String,
}

impl BadRule {
    fn new(place: impl Into<String>, problem: impl Into<String>) -> BadRule {
        BadRule { place: place.into(), problem: problem.into() }
    }
}

/// An answer matches a pattern that a rule forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contradiction {
    /// The rule, from 0.
    pub rule: usize,
    /// The pattern among those of the rule, from 0.
    pub pattern: usize,
}

/// The hard rules of one request.
#[derive(Clone, Debug)]
pub struct RuleSet {
    rules: Vec<HardRule>,
    sha256: String,
    patterns: Option<Patterns>,
}

impl PartialEq for RuleSet {
    /// The patterns follow from the rules.
    fn eq(&self, other: &RuleSet) -> bool {
        self.rules == other.rules
    }
}

/// All patterns as one automaton.
#[derive(Clone, Debug)]
struct Patterns {
    regex: Regex,
    /// Whose each is.
    of: Vec<Contradiction>,
    /// Bytes of the longest match; none where there is no bound.
    reach: Option<usize>,
}

impl RuleSet {
    /// Takes rules whose order says nothing. Compiling takes as long as the limits of patterns allow: some
    /// milliseconds.
    ///
    /// # Errors
    /// The first rule or pattern that is too long, empty, of several lines, or no regular expression; and too many.
    pub fn new(rules: Vec<HardRule>) -> Result<RuleSet, BadRule> {
        if !(1..=MAX_RULES).contains(&rules.len()) {
            let problem = format!("expected 1 to {MAX_RULES}, found {}", rules.len());
            return Err(BadRule::new("constraints", problem));
        }
        for (at, rule) in rules.iter().enumerate() {
            check_text(at, &rule.text)?;
        }
        let n_patterns: usize = rules.iter().map(|rule| rule.forbid.len()).sum();
        if n_patterns > MAX_PATTERNS {
            let problem =
                format!("expected at most {MAX_PATTERNS} patterns in all, found {n_patterns}");
            return Err(BadRule::new("constraints", problem));
        }
        let patterns = if n_patterns == 0 { None } else { Some(Patterns::new(&rules)?) };
        let sha256 = constraints_sha256(&texts(&rules));
        Ok(RuleSet { rules, sha256, patterns })
    }

    /// The rules as the model is told.
    #[must_use]
    pub fn texts(&self) -> Vec<&str> {
        texts(&self.rules)
    }

    /// Hex sha256 of the rules, the same in any order.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Number of patterns.
    #[must_use]
    pub fn n_patterns(&self) -> usize {
        self.patterns.as_ref().map_or(0, |patterns| patterns.of.len())
    }

    /// The first place at which a whole answer contradicts a rule. The exact refusal contradicts none: it is what an
    /// answer should be that cannot keep them.
    #[must_use]
    pub fn contradiction(&self, answer: &str) -> Option<Contradiction> {
        if is_refusal(answer) {
            return None;
        }
        self.patterns.as_ref()?.first(answer, 0).map(|found| found.what)
    }

    /// The same of the texts in a value, keys among them. Recursion is as deep as the value, which a parser has
    /// bounded.
    #[must_use]
    pub fn contradiction_in(&self, value: &Value) -> Option<Contradiction> {
        match value {
            Value::Null | Value::Bool(_) => None,
            Value::Number(number) => self.contradiction(&number.to_string()),
            Value::String(text) => self.contradiction(text),
            Value::Array(items) => items.iter().find_map(|item| self.contradiction_in(item)),
            Value::Object(fields) => fields.iter().find_map(|(key, field)| {
                self.contradiction(key).or_else(|| self.contradiction_in(field))
            }),
        }
    }

    /// Whether a text that goes on may be told no sooner than at its end.
    fn waits(&self) -> bool {
        self.patterns.as_ref().is_some_and(|patterns| patterns.reach.is_none())
    }
}

fn texts(rules: &[HardRule]) -> Vec<&str> {
    rules.iter().map(|rule| rule.text.as_str()).collect()
}

/// A rule is one line: what stands on a line of its own would look like another rule.
fn check_text(at: usize, text: &str) -> Result<(), BadRule> {
    let place = format!("constraints[{at}].text");
    let is_break = |char: char| char.is_control() || matches!(char, '\u{2028}' | '\u{2029}');
    let problem = match text.len() {
        _ if text.trim().is_empty() => "expected a rule, found none".to_owned(),
        _ if text.trim() != text => "expected no blanks around it, found some".to_owned(),
        len if len > MAX_RULE_BYTES => {
            format!("expected at most {MAX_RULE_BYTES} bytes, found {len}")
        }
        _ => match text.chars().find(|char| is_break(*char)) {
            Some(found) => format!("expected one line of text, found U+{:04X}", u32::from(found)),
            None => return Ok(()),
        },
    };
    Err(BadRule::new(place, problem))
}

struct Match {
    what: Contradiction,
    end: usize,
}

impl Patterns {
    fn new(rules: &[HardRule]) -> Result<Patterns, BadRule> {
        let syntax = syntax::Config::new().nest_limit(MAX_NESTING);
        let (mut parsed, mut of, mut reach) = (Vec::new(), Vec::new(), Some(0));
        for (rule, pattern, text) in all(rules) {
            let place = || format!("constraints[{rule}].forbid[{pattern}]");
            if text.len() > MAX_PATTERN_BYTES {
                let problem =
                    format!("expected at most {MAX_PATTERN_BYTES} bytes, found {}", text.len());
                return Err(BadRule::new(place(), problem));
            }
            let hir = syntax::parse_with(text, &syntax)
                .map_err(|error| BadRule::new(place(), last_line(&error.to_string())))?;
            if hir.properties().minimum_len() == Some(0) {
                let problem = "expected a pattern that takes at least one character, found one that \
                               matches every answer";
                return Err(BadRule::new(place(), problem));
            }
            let longest = hir.properties().maximum_len().filter(|len| *len <= MAX_REACH);
            reach = reach.zip(longest).map(|(before, this)| before.max(this));
            of.push(Contradiction { rule, pattern });
            parsed.push(hir);
        }
        let config = Config::new()
            .nfa_size_limit(Some(MAX_AUTOMATON_BYTES))
            .hybrid_cache_capacity(MAX_CACHE_BYTES)
            .which_captures(WhichCaptures::Implicit);
        let built = Regex::builder().configure(config).build_many_from_hir(&parsed);
        let regex = built.map_err(|_| {
            let problem = format!(
                "expected patterns that compile to at most {MAX_AUTOMATON_BYTES} bytes together, found more; make \
                 counted repetitions shorter"
            );
            BadRule::new("constraints", problem)
        })?;
        Ok(Patterns { regex, of, reach })
    }

    /// The first match that begins at `from` or behind it.
    fn first(&self, text: &str, from: usize) -> Option<Match> {
        let found = self.regex.search(&Input::new(text).range(from..))?;
        Some(Match { what: self.of[found.pattern().as_usize()], end: found.end() })
    }
}

/// Each pattern with its rule and its place there.
fn all(rules: &[HardRule]) -> impl Iterator<Item = (usize, usize, &str)> {
    rules.iter().enumerate().flat_map(|(at, rule)| {
        rule.forbid.iter().enumerate().map(move |(nth, text)| (at, nth, text.as_str()))
    })
}

/// Of a message that draws the pattern in its first lines.
fn last_line(message: &str) -> String {
    let line = message.trim().lines().next_back().unwrap_or_default();
    let problem = line.strip_prefix("error: ").unwrap_or(line);
    format!("expected a regular expression, found: {problem}")
}

/// The exact refusal, and nothing else.
fn is_refusal(answer: &str) -> bool {
    answer.trim() == REFUSAL_TOKEN
}

/// Watches one answer as it grows: what may still become part of a contradiction is held back.
#[derive(Clone, Debug)]
pub struct RuleWatch {
    rules: std::sync::Arc<RuleSet>,
    answer: String,
    /// Bytes of it that were told.
    told: usize,
    waits: bool,
}

impl RuleWatch {
    /// Watches from the beginning of an answer; with `waits` nothing is told before its end.
    #[must_use]
    pub fn new(rules: std::sync::Arc<RuleSet>, waits: bool) -> RuleWatch {
        let waits = waits || rules.waits();
        RuleWatch { rules, answer: String::new(), told: 0, waits }
    }

    /// Takes the next piece and says what may be told.
    ///
    /// # Errors
    /// The answer contradicts a rule; nothing more of it may be told.
    pub fn push(&mut self, piece: &str) -> Result<String, Contradiction> {
        self.answer.push_str(piece);
        let Some(patterns) = &self.rules.patterns else { return Ok(self.tell(self.answer.len())) };
        // It may still become the refusal, which contradicts nothing.
        if self.waits || REFUSAL_TOKEN.starts_with(self.answer.trim()) {
            return Ok(String::new());
        }
        let len = self.answer.len();
        // A match that ends where the answer does so far may be none when it goes on.
        if let Some(found) = patterns.first(&self.answer, self.told)
            && found.end + LOOK_AHEAD <= len
        {
            return Err(found.what);
        }
        // A match that begins further in front has ended, and been looked at, with what stands behind it.
        let held = patterns.reach.unwrap_or(len) + LOOK_AHEAD;
        let until = self.answer.floor_char_boundary(len.saturating_sub(held));
        Ok(self.tell(until.max(self.told)))
    }

    /// Ends the answer: the rest of it.
    ///
    /// # Errors
    /// As [`RuleWatch::push`].
    pub fn finish(&mut self) -> Result<String, Contradiction> {
        let contradiction = match &self.rules.patterns {
            Some(patterns) if !is_refusal(&self.answer) => patterns.first(&self.answer, self.told),
            Some(_) | None => None,
        };
        match contradiction {
            Some(found) => Err(found.what),
            None => Ok(self.tell(self.answer.len())),
        }
    }

    /// What was watched so far.
    #[must_use]
    pub fn answer(&self) -> &str {
        &self.answer
    }

    fn tell(&mut self, until: usize) -> String {
        let told = self.answer[self.told..until].to_owned();
        self.told = until;
        told
    }
}

/// The tokens of a prompt say other rules than the request does.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected the {n_expected} rules with sha256 {expected}, found {n_found} with {found}")]
pub struct EchoDiffers {
    n_expected: usize,
    n_found: usize,
    expected: String,
    found: String,
}

/// Compares the rules of a request with those that were read out of the tokens of its prompt, in any order.
///
/// # Errors
/// They differ.
pub fn compare_echo(expected: &[String], found: &[String]) -> Result<(), EchoDiffers> {
    let trimmed = |rules: &[String]| {
        let rules: Vec<Cow<'_, str>> = rules.iter().map(|rule| rule.trim().into()).collect();
        constraints_sha256(&rules)
    };
    let (n_expected, n_found) = (expected.len(), found.len());
    let (expected, found) = (trimmed(expected), trimmed(found));
    if n_expected == n_found && expected == found {
        return Ok(());
    }
    Err(EchoDiffers { n_expected, n_found, expected, found })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn rule(text: &str, forbid: &[&str]) -> HardRule {
        let forbid = forbid.iter().map(|pattern| (*pattern).to_owned()).collect();
        HardRule { text: text.to_owned(), forbid }
    }

    fn set(forbid: &[&str]) -> Arc<RuleSet> {
        Arc::new(RuleSet::new(vec![rule("Be kind.", &[]), rule("Name no price.", forbid)]).unwrap())
    }

    fn price() -> Contradiction {
        Contradiction { rule: 1, pattern: 0 }
    }

    #[test]
    fn g31_a_claim_against_a_rule_is_found_with_its_rule() {
        let rules = set(&["[0-9]+ coins?", r"(?i)\bfor free\b"]);
        assert_eq!(rules.contradiction("It costs 40 coins, they say."), Some(price()));
        let second = Contradiction { rule: 1, pattern: 1 };
        assert_eq!(rules.contradiction("You get it FOR FREE."), Some(second));
        assert_eq!(rules.contradiction("It has a price."), None);
    }

    /// The mutation: the same rule without its patterns says nothing.
    #[test]
    fn mutation_g31_without_patterns_the_claim_passes() {
        assert_eq!(set(&[]).contradiction("It costs 40 coins, they say."), None);
        assert_eq!(pushed(&set(&[]), "It costs 40 coins.", 3), Ok("It costs 40 coins.".into()));
    }

    #[test]
    fn g31_the_exact_refusal_contradicts_nothing() {
        let rules = set(&["context", "not"]);
        assert_eq!(rules.contradiction(REFUSAL_TOKEN), None);
        assert_eq!(pushed(&rules, "not in context\n", 1), Ok("not in context\n".into()));
        for more in ["not in context, but 5 coins", "Not in context", "a context"] {
            assert!(rules.contradiction(more).is_some(), "{more}");
            assert!(pushed(&rules, more, 1).is_err(), "{more}");
        }
    }

    #[test]
    fn g31_texts_of_a_value_are_read_as_they_mean() {
        let rules = set(&["40 coins"]);
        let escaped: Value =
            serde_json::from_str(r#"{"a": [{"b": "\u0034\u0030 coins"}]}"#).unwrap();
        assert_eq!(rules.contradiction_in(&escaped), Some(price()));
        assert_eq!(rules.contradiction_in(&json!({"40 coins": 1})), Some(price()));
        assert_eq!(rules.contradiction_in(&json!({"a": [40, "coins", null, true]})), None);
    }

    /// What a client has of a stream in pieces of so many characters.
    fn pushed(rules: &Arc<RuleSet>, answer: &str, n_chars: usize) -> Result<String, String> {
        let mut watch = RuleWatch::new(Arc::clone(rules), false);
        let (mut told, chars) = (String::new(), answer.chars().collect::<Vec<_>>());
        for piece in chars.chunks(n_chars.max(1)) {
            match watch.push(&piece.iter().collect::<String>()) {
                Ok(text) => told.push_str(&text),
                Err(_) => return Err(told),
            }
        }
        match watch.finish() {
            Ok(text) => Ok(told + &text),
            Err(_) => Err(told),
        }
    }

    #[test]
    fn g31_a_stream_tells_nothing_of_a_contradiction() {
        let rules = set(&["[0-9]{1,4} coins"]);
        for n_chars in 1..8 {
            let told = pushed(&rules, "Ah, well: it is 40 coins, or so they say.", n_chars);
            let told = told.unwrap_err();
            assert!("Ah, well: it is ".starts_with(&told), "{told:?}");
        }
        // A bounded pattern holds back little.
        let mut watch = RuleWatch::new(Arc::clone(&rules), false);
        let long = "So it is, and so it was, and so it will be.";
        assert!(watch.push(long).unwrap().len() > 20);
    }

    #[test]
    fn g31_a_pattern_without_bound_or_an_answer_that_waits_tells_nothing_before_the_end() {
        let unbounded = set(&["first.*last"]);
        let mut watch = RuleWatch::new(Arc::clone(&unbounded), false);
        assert_eq!(watch.push("The first of all things, which").unwrap(), "");
        assert_eq!(watch.push(" will be the last.").unwrap(), "");
        assert_eq!(watch.finish(), Err(price()));
        let mut waiting = RuleWatch::new(set(&["x"]), true);
        assert_eq!((waiting.push("abc"), waiting.finish()), (Ok(String::new()), Ok("abc".into())));
    }

    /// A look at what follows decides only when it is there.
    #[test]
    fn g31_a_word_that_goes_on_is_another_word() {
        let rules = set(&[r"\bcoin\b"]);
        for n_chars in 1..6 {
            let answer = "A coinage, said coined.";
            assert_eq!(pushed(&rules, answer, n_chars), Ok(answer.into()), "{n_chars}");
            assert!(pushed(&rules, "One coin", n_chars).is_err(), "{n_chars}");
            assert!(pushed(&rules, "One coin, please, and no more", n_chars).is_err());
        }
    }

    #[test]
    fn rules_that_cannot_be_kept_are_named_by_place() {
        let long = "x".repeat(MAX_RULE_BYTES + 1);
        let long_pattern = "x".repeat(MAX_PATTERN_BYTES + 1);
        let cases = [
            (vec![], "constraints"),
            (vec![rule("x", &[]); MAX_RULES + 1], "constraints"),
            (vec![rule("x", &["y"; MAX_PATTERNS + 1])], "constraints"),
            (vec![rule("x", &[]), rule("  ", &[])], "constraints[1].text"),
            (vec![rule(" x", &[])], "constraints[0].text"),
            (vec![rule("x\n- y", &[])], "constraints[0].text"),
            (vec![rule("x\u{2028}y", &[])], "constraints[0].text"),
            (vec![rule(&long, &[])], "constraints[0].text"),
            (vec![rule("x", &["a", "(b"])], "constraints[0].forbid[1]"),
            (vec![rule("x", &[r"(a)\1"])], "constraints[0].forbid[0]"),
            (vec![rule("x", &["a*"])], "constraints[0].forbid[0]"),
            (vec![rule("x", &[""])], "constraints[0].forbid[0]"),
            (vec![rule("x", &[r"\b"])], "constraints[0].forbid[0]"),
            (vec![rule("x", &[&long_pattern])], "constraints[0].forbid[0]"),
            (vec![rule("x", &["((((a{99}){99}){99}){99})"])], "constraints"),
            (vec![rule("x", &[&"(".repeat(120)])], "constraints[0].forbid[0]"),
        ];
        for (rules, place) in cases {
            let error = RuleSet::new(rules).unwrap_err();
            assert_eq!(error.place, place, "{error}");
            assert!(error.problem.contains("expected"), "{error}");
        }
    }

    #[test]
    fn g31_rules_are_read_as_they_were_written_in_any_order() {
        let rules = ["Be kind.".to_owned(), "Name - no - price.".to_owned()];
        let read = read_rules(&format!("\n{}\n", write_rules(&rules)));
        assert_eq!(read, rules);
        let turned = [rules[1].clone(), rules[0].clone()];
        compare_echo(&rules, &turned).unwrap();
        for other in [&rules[..1], &[], &[rules[0].clone(), "Name a price.".into()]] {
            let error = compare_echo(&rules, other).unwrap_err().to_string();
            assert!(error.contains("expected the 2 rules"), "{error}");
        }
        assert!(read_rules("Be kind.").is_empty());
    }

    proptest! {
        /// However an answer is cut, a stream says of it what its whole says, and tells no match.
        #[test]
        fn a_stream_and_a_whole_answer_agree(
            answer in "[ab1 ,é]{0,40}",
            pattern in prop_oneof![
                Just("ab"), Just(r"\bab\b"), Just("a.?b"), Just("é1{1,3}"), Just("(?m)a$"), Just("b.*1"),
                Just("^a"), Just(r"a\B")
            ],
            n_chars in 1usize..7
        ) {
            let rules = set(&[pattern]);
            let streamed = pushed(&rules, &answer, n_chars);
            match rules.contradiction(&answer) {
                None => prop_assert_eq!(streamed, Ok(answer)),
                Some(_) => {
                    let told = streamed.unwrap_err();
                    prop_assert!(answer.starts_with(&told));
                    let first = rules.patterns.as_ref().unwrap().regex.find(&answer).unwrap();
                    prop_assert!(told.len() <= first.start());
                }
            }
        }
    }
}
