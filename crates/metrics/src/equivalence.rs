//! When two answers say the same, and the classes of equal answers of a probe (§1.3.4).
//!
//! Surface forms only, with one opening for meaning: the caller passes the calibrated ΔS of two
//! texts, if its encoder is fit to give one.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longest answer, in words, that is compared as a short answer.
const SHORT_WORDS: usize = 32;
const MIN_TOKEN_F1: f64 = 0.8;
const MAX_EQUIVALENT_DS: f64 = 0.20;
const NUMERIC_TOLERANCE: f64 = 1e-6;

/// What one run of a probe produced.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// An answer.
    Answer(AnswerText),
    /// The refusal token; all refusals are one class.
    Refusal,
    /// Output that violates its schema or cites what was not retrieved.
    Invalid,
    /// No text.
    Empty,
    /// No complete answer in time.
    TimedOut,
    /// NaN or infinite logits.
    Numeric,
}

impl Outcome {
    /// Whether this run counts towards the invalid share. Such a run agrees with no other.
    #[must_use]
    pub fn is_invalid(&self) -> bool {
        match self {
            Outcome::Answer(_) | Outcome::Refusal => false,
            Outcome::Invalid | Outcome::Empty | Outcome::TimedOut | Outcome::Numeric => true,
        }
    }
}

/// An answer, in the form in which it is compared.
#[derive(Clone, Debug, PartialEq)]
pub enum AnswerText {
    /// Structured output.
    Json(Value),
    /// Anything else.
    Text(String),
}

/// Whether two answers agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// They say the same.
    Same,
    /// They differ.
    Different,
    /// Only the meaning could decide, and no measure of it was available.
    Undecided,
}

/// How an undecided pair is counted. Computing λ both ways shows whether it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Equivalence {
    /// Undecided pairs count as different: λ is a lower bound of agreement.
    Strict,
    /// Undecided pairs count as the same: λ is an upper bound of agreement.
    Lenient,
}

/// The classes of a probe's runs, in run order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classes {
    /// Class of each run, numbered from 0 in order of appearance.
    pub ids: Vec<usize>,
    /// Comparisons with a representative that only meaning could decide.
    pub n_undecided: usize,
}

/// Assigns each run, in order, to the first class whose representative (its first member) says
/// the same. `calibrated_ds` gives ΔS of two texts on the calibrated scale of the text↔text
/// family, or nothing when no fit encoder is at hand.
pub fn assign_classes(
    outcomes: &[Outcome],
    equivalence: Equivalence,
    calibrated_ds: &mut dyn FnMut(&str, &str) -> Option<f64>,
) -> Classes {
    let mut representatives: Vec<&Outcome> = Vec::new();
    let mut ids = Vec::with_capacity(outcomes.len());
    let mut n_undecided = 0;
    for outcome in outcomes {
        let found = representatives.iter().position(|representative| {
            match agree(representative, outcome, calibrated_ds) {
                Verdict::Same => true,
                Verdict::Different => false,
                Verdict::Undecided => {
                    n_undecided += 1;
                    equivalence == Equivalence::Lenient
                }
            }
        });
        ids.push(found.unwrap_or(representatives.len()));
        if found.is_none() {
            representatives.push(outcome);
        }
    }
    Classes { ids, n_undecided }
}

fn agree(a: &Outcome, b: &Outcome, ds: &mut dyn FnMut(&str, &str) -> Option<f64>) -> Verdict {
    match (a, b) {
        (Outcome::Refusal, Outcome::Refusal) => Verdict::Same,
        (Outcome::Answer(AnswerText::Json(a)), Outcome::Answer(AnswerText::Json(b))) => {
            decided(json_equivalent(a, b))
        }
        (Outcome::Answer(AnswerText::Text(a)), Outcome::Answer(AnswerText::Text(b))) => {
            texts_agree(a, b, ds)
        }
        _ => Verdict::Different,
    }
}

fn texts_agree(a: &str, b: &str, ds: &mut dyn FnMut(&str, &str) -> Option<f64>) -> Verdict {
    let (words_a, words_b) = (normalised(a), normalised(b));
    if words_a == words_b {
        return Verdict::Same;
    }
    // Closeness of words or of vectors says nothing about "5" against "6" or "may" against "may not".
    let facts_agree = number_set(a) == number_set(b) && negated(&words_a) == negated(&words_b);
    if words_a.len() <= SHORT_WORDS && words_b.len() <= SHORT_WORDS {
        let close = token_f1(a, b) >= MIN_TOKEN_F1 || same_numbers(&words_a, &words_b);
        return decided(facts_agree && close);
    }
    if !facts_agree {
        return Verdict::Different;
    }
    match ds(a, b) {
        Some(value) => decided(value <= MAX_EQUIVALENT_DS),
        None => Verdict::Undecided,
    }
}

fn decided(same: bool) -> Verdict {
    if same { Verdict::Same } else { Verdict::Different }
}

/// "It is 0.45" and "0.45" are the same number; "5 GB" and "5 retries" are not: beside equal
/// numbers the other words of one answer must all be in the other.
fn same_numbers(a: &[String], b: &[String]) -> bool {
    let split = |words: &[String]| -> (BTreeSet<String>, BTreeSet<String>) {
        let content = words.iter().filter(|word| !is_stop_word(word)).cloned();
        content.partition(|word| parse_number(word).is_some())
    };
    let ((numbers_a, words_a), (numbers_b, words_b)) = (split(a), split(b));
    !numbers_a.is_empty()
        && numbers_a == numbers_b
        && (words_a.is_subset(&words_b) || words_b.is_subset(&words_a))
}

/// Whether two JSON values are equal: objects without order, arrays with order, numbers within
/// 1e-6 of the greater of 1 and their magnitude.
#[must_use]
pub fn json_equivalent(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => match (a.as_f64(), b.as_f64()) {
            (Some(x), Some(y)) => {
                (x - y).abs() <= NUMERIC_TOLERANCE * x.abs().max(y.abs()).max(1.0)
            }
            _ => a == b,
        },
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(x, y)| json_equivalent(x, y))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter().all(|(key, x)| b.get(key).is_some_and(|y| json_equivalent(x, y)))
        }
        _ => a == b,
    }
}

/// The words of a text for comparison: lower case, punctuation apart from that inside numbers and
/// names removed, English articles dropped, numbers in one form ("1,000" and "1000.0" are "1000").
#[must_use]
pub fn normalised(text: &str) -> Vec<String> {
    let lower = text.to_lowercase().replace('\u{2019}', "'");
    lower.split(|c: char| !is_word_char(c)).filter_map(normal_word).collect()
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '\'' | '.' | ',' | '-' | '+' | '%')
}

fn normal_word(raw: &str) -> Option<String> {
    let word = raw.trim_matches(|c: char| !c.is_alphanumeric() && c != '%' && c != '-' && c != '+');
    if let Some(number) = parse_number(word) {
        return Some(format!("{number}{}", if word.ends_with('%') { "%" } else { "" }));
    }
    let word = word.trim_matches(|c: char| !c.is_alphanumeric());
    (!word.is_empty() && !matches!(word, "a" | "an" | "the")).then(|| word.to_owned())
}

/// Reads a number that may have thousands separators, a sign or a percent sign.
fn parse_number(word: &str) -> Option<f64> {
    let digits = word.trim_end_matches('%').replace(',', "");
    if !digits.bytes().any(|byte| byte.is_ascii_digit())
        || !digits.bytes().all(|byte| byte.is_ascii_digit() || b"+-.e".contains(&byte))
    {
        return None;
    }
    digits.parse().ok().filter(|number: &f64| number.is_finite())
}

/// The numbers that a text states, in one form each. Numbers inside names ("int8", "G-15") are
/// part of the name and do not count.
#[must_use]
pub fn number_set(text: &str) -> BTreeSet<String> {
    normalised(text).into_iter().filter(|word| parse_number(word).is_some()).collect()
}

/// The words that carry content: [`normalised`] without English function words.
#[must_use]
pub fn content_words(text: &str) -> Vec<String> {
    normalised(text).into_iter().filter(|word| !is_stop_word(word)).collect()
}

/// Harmonic mean of precision and recall of the normalised words, with multiplicity (Rajpurkar et
/// al. 2016). Two texts without words score 1, one without words scores 0.
#[must_use]
pub fn token_f1(a: &str, b: &str) -> f64 {
    let (a, b) = (normalised(a), normalised(b));
    if a.is_empty() || b.is_empty() {
        return if a.len() == b.len() { 1.0 } else { 0.0 };
    }
    let mut left: BTreeMap<&str, usize> = BTreeMap::new();
    for word in &a {
        *left.entry(word).or_default() += 1;
    }
    let mut n_shared = 0usize;
    for word in &b {
        if let Some(n) = left.get_mut(word.as_str()).filter(|n| **n > 0) {
            *n -= 1;
            n_shared += 1;
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "word counts are far below 2^52")]
    let f1 = 2.0 * n_shared as f64 / (a.len() + b.len()) as f64;
    f1
}

/// Whether a text denies something. Presence, not parity: a long answer may negate side remarks,
/// and an odd count of them is no sign of a reversed claim.
fn negated(words: &[String]) -> bool {
    words.iter().any(|word| {
        matches!(
            word.as_str(),
            "no" | "not" | "never" | "none" | "nor" | "neither" | "without" | "cannot" | "nothing"
        ) || word.ends_with("n't")
    })
}

fn is_stop_word(word: &str) -> bool {
    const STOP_WORDS: &[&str] = &[
        "about", "after", "all", "also", "am", "and", "any", "are", "as", "at", "be", "been",
        "before", "being", "but", "by", "can", "could", "did", "do", "does", "each", "for", "from",
        "had", "has", "have", "he", "her", "his", "how", "i", "if", "in", "into", "is", "it",
        "its", "may", "might", "more", "most", "must", "my", "of", "on", "one", "or", "our", "out",
        "over", "s", "shall", "she", "should", "so", "some", "such", "than", "that", "their",
        "them", "then", "there", "these", "they", "this", "those", "to", "too", "under", "up",
        "use", "used", "using", "very", "was", "we", "were", "what", "when", "where", "which",
        "while", "who", "why", "will", "with", "would", "you", "your",
    ];
    STOP_WORDS.binary_search(&word).is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn text(answer: &str) -> Outcome {
        Outcome::Answer(AnswerText::Text(answer.to_owned()))
    }

    fn verdict(a: &str, b: &str) -> Verdict {
        agree(&text(a), &text(b), &mut |_, _| None)
    }

    #[test]
    fn json_ignores_key_order_and_small_numeric_noise() {
        let a = json!({"limit": 0.45, "pages": [1, 2], "name": "x"});
        assert!(json_equivalent(
            &a,
            &json!({"name": "x", "pages": [1.0, 2], "limit": 0.450_000_1})
        ));
        assert!(!json_equivalent(&a, &json!({"name": "x", "pages": [2, 1], "limit": 0.45})));
        assert!(!json_equivalent(&a, &json!({"name": "x", "pages": [1, 2]})));
        assert!(!json_equivalent(&json!(0.45), &json!("0.45")));
    }

    #[test]
    fn short_answers() {
        let cases = [
            ("The page size is 256 tokens.", "the page size is 256 tokens", Verdict::Same),
            ("It is 0.450", "0.45", Verdict::Same),
            ("1,000", "1000", Verdict::Same),
            ("5 GB", "5 retries", Verdict::Different),
            (
                "the limit is 8 MB for each request",
                "the limit is 9 MB for each request",
                Verdict::Different,
            ),
            (
                "you may share the cache page",
                "you may not share the cache page",
                Verdict::Different,
            ),
            ("It can't be shared", "It can\u{2019}t be shared.", Verdict::Same),
            ("rebuild the index", "restart the server", Verdict::Different),
            ("10%", "10", Verdict::Different),
        ];
        for (a, b, expected) in cases {
            assert_eq!(verdict(a, b), expected, "{a:?} and {b:?}");
            assert_eq!(verdict(b, a), expected, "{b:?} and {a:?}");
        }
    }

    #[test]
    fn free_text_needs_ds_and_equal_facts() {
        let long = |end: &str| format!("{} {end}", "the cache page holds many tokens ".repeat(7));
        let (a, b) = (long("and is freed after 256 steps"), long("then returned in 256 steps"));
        let mut near = |_: &str, _: &str| Some(0.20);
        let mut far = |_: &str, _: &str| Some(0.21);
        assert_eq!(agree(&text(&a), &text(&b), &mut near), Verdict::Same);
        assert_eq!(agree(&text(&a), &text(&b), &mut far), Verdict::Different);
        assert_eq!(verdict(&a, &b), Verdict::Undecided);
        let c = long("then returned in 257 steps");
        assert_eq!(agree(&text(&a), &text(&c), &mut near), Verdict::Different);
        let d = long("and is never freed after 256 steps");
        assert_eq!(agree(&text(&a), &text(&d), &mut near), Verdict::Different);
    }

    #[test]
    fn refusals_are_one_class_and_each_broken_output_its_own() {
        let outcomes = [
            Outcome::Refusal,
            text("256"),
            Outcome::Empty,
            Outcome::Refusal,
            Outcome::Empty,
            text("It is 256."),
        ];
        let classes = assign_classes(&outcomes, Equivalence::Strict, &mut |_, _| None);
        assert_eq!(classes.ids, [0, 1, 2, 0, 3, 1]);
    }

    #[test]
    fn undecided_pairs_are_counted_and_bound_the_result() {
        let long = |word: &str| text(&format!("{} {word}", "many words about caches ".repeat(9)));
        let outcomes = [long("here"), long("there"), long("everywhere")];
        let strict = assign_classes(&outcomes, Equivalence::Strict, &mut |_, _| None);
        let lenient = assign_classes(&outcomes, Equivalence::Lenient, &mut |_, _| None);
        assert_eq!((strict.ids.as_slice(), strict.n_undecided), ([0, 1, 2].as_slice(), 3));
        assert_eq!(lenient.ids, [0, 0, 0]);
    }

    #[test]
    fn numbers_inside_names_do_not_count() {
        let found: Vec<String> =
            number_set("int8 of G-15 needs 1,024 pages, -3 and 0.5%").into_iter().collect();
        assert_eq!(found, ["-3", "0.5%", "1024"]);
    }

    #[test]
    fn stop_words_are_sorted_for_the_search() {
        assert!(is_stop_word("about") && is_stop_word("your") && is_stop_word("must"));
        assert!(!is_stop_word("cache"));
    }

    proptest! {
        #[test]
        fn agreement_is_reflexive_and_symmetric(a in ".{0,60}", b in ".{0,60}") {
            prop_assert_eq!(verdict(&a, &a), Verdict::Same);
            prop_assert_eq!(verdict(&a, &b), verdict(&b, &a));
            let f1 = token_f1(&a, &b);
            prop_assert!((0.0..=1.0).contains(&f1));
            prop_assert!((f1 - token_f1(&b, &a)).abs() < 1e-12);
        }
    }
}
