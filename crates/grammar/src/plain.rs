//! Masks inside strings.
//!
//! Most tokens of a vocabulary are *plain*: whole characters that a string of JSON holds as they are. Where a string may
//! go on with any of them, nobody has to look at each. [`SlicedBiasComputer`] sees that of strings without a pattern, by
//! the form of the regular expression. This sees it of the others, by what the automaton does: all its states behind
//! plain characters are visited, and where none is an end, every plain token may come. A string in which a word was
//! asked for is in one of a few states behind any character, whatever the token.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use llguidance::derivre::StateID;
use llguidance::earley::{BiasComputer, ParserRecognizer, SlicedBiasComputer};
use toktrie::{SimpleVob, TokTrie};

/// Plain characters, by which [`SlicedBiasComputer`] knows a string by its form: those of
/// [`SlicedBiasComputer::json_slices`] without the one of blanks, of which JSON under a schema has single ones. Each is
/// an expression more in every grammar that is compiled.
const SLICES: [&str; 3] =
    [r#"[^"\\\x00-\x1F\x7F]{1,10}"#, r#"[^"\\\x00-\x1F\x7F]{1,30}"#, r#"[^"\\\x00-\x1F\x7F]+"#];
/// Place of the shortest of them.
const SHORT_SLICE: usize = 0;
/// Most characters of a short token.
const SHORT: usize = 10;
/// Steps of the regex engine by which a string may be known by its form.
const FUEL: u64 = 1_000;
/// Most places that are visited for one mask.
const MOST_PLACES: usize = 100;
/// Longest time to visit them. A place may be new to the automaton, whose work for one mask is limited; this is a
/// small part of it. The mask is the same whether they were all visited or not.
const MOST_TIME: Duration = Duration::from_millis(4);

/// Computes the masks of one vocabulary.
pub(crate) struct PlainTokens {
    sliced: Arc<SlicedBiasComputer>,
    short_ascii: Slice,
    ascii: Slice,
    all: Slice,
}

struct Slice {
    tokens: SimpleVob,
    /// All other tokens.
    rest: TokTrie,
}

/// Where a walk through characters stands inside the bytes of one (RFC 3629, section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Inside {
    /// Between two characters.
    Nothing,
    One,
    Two,
    Three,
    AfterE0,
    AfterEd,
    AfterF0,
    AfterF4,
}

/// Which plain characters are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alphabet {
    Ascii,
    Unicode,
}

/// How far a string may go on with any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// For [`SHORT`] characters.
    Short,
    ForEver,
}

impl PlainTokens {
    /// What [`SlicedBiasComputer`] is to be made of.
    pub(crate) fn slices() -> Vec<String> {
        SLICES.map(str::to_owned).to_vec()
    }

    pub(crate) fn new(sliced: Arc<SlicedBiasComputer>) -> PlainTokens {
        let slice = |is_in: fn(&str) -> bool| Slice::of(sliced.trie(), is_in);
        let short_ascii = slice(|text| text.is_ascii() && text.len() <= SHORT);
        let (ascii, all) = (slice(str::is_ascii), slice(|_| true));
        PlainTokens { sliced, short_ascii, ascii, all }
    }

    /// The largest slice that is found to be allowed, where its form does not say so.
    fn slice(&self, parser: &mut ParserRecognizer<'_>) -> Option<&Slice> {
        let state = parser.lexer_state();
        step(parser, state, b'a').and_then(|_| step(parser, state, b' '))?;
        let lexer = parser.lexer_mut();
        let by_its_form = lexer.subsume_possible(state)
            && lexer.check_subsume(state, SHORT_SLICE, FUEL, None).unwrap_or(false);
        if by_its_form {
            return None;
        }
        match reach(parser, state, Alphabet::Ascii)? {
            Reach::Short => Some(&self.short_ascii),
            Reach::ForEver => match reach(parser, state, Alphabet::Unicode) {
                Some(Reach::ForEver) => Some(&self.all),
                Some(Reach::Short) | None => Some(&self.ascii),
            },
        }
    }
}

impl Slice {
    fn of(trie: &TokTrie, is_in: impl Fn(&str) -> bool) -> Slice {
        let (mut tokens, mut others) = (trie.alloc_token_set(), trie.alloc_token_set());
        for id in 0..u32::try_from(trie.vocab_size()).unwrap_or(u32::MAX) {
            let token = trie.token(id);
            let text = std::str::from_utf8(token).ok().filter(|text| !text.is_empty());
            let is_plain = text.is_some_and(|text| text.chars().all(is_plain) && is_in(text));
            let set = if is_plain { &mut tokens } else { &mut others };
            set.allow_token(id);
        }
        Slice { tokens, rest: trie.filter(&others) }
    }
}

fn is_plain(it: char) -> bool {
    !matches!(it, '"' | '\\' | '\0'..='\x1F' | '\x7F')
}

impl BiasComputer for PlainTokens {
    fn compute_bias(&self, parser: &mut ParserRecognizer<'_>, start: &[u8]) -> SimpleVob {
        let slice = if start.is_empty() { self.slice(parser) } else { None };
        let Some(slice) = slice else { return self.sliced.compute_bias(parser, start) };
        let mut allowed = self.trie().alloc_token_set();
        allowed.or(&slice.tokens);
        slice.rest.add_bias(parser, &mut allowed, &[]);
        allowed
    }

    fn trie(&self) -> &TokTrie {
        self.sliced.trie()
    }
}

/// Where the lexer is behind a byte that leaves it in its lexeme; `None` behind any other.
fn step(parser: &mut ParserRecognizer<'_>, state: StateID, byte: u8) -> Option<StateID> {
    let next = parser.lexer_mut().transition_start_state(state, Some(byte), &None);
    (!next.is_dead() && !next.has_lowest_match()).then_some(next)
}

/// Visits every place behind plain characters. `None`: one of them leaves its lexeme, or there are too many.
fn reach(parser: &mut ParserRecognizer<'_>, state: StateID, alphabet: Alphabet) -> Option<Reach> {
    let until = Instant::now() + MOST_TIME;
    let mut seen = HashSet::from([(state, Inside::Nothing)]);
    let mut fresh = vec![(state, Inside::Nothing)];
    for _ in 0..SHORT {
        let mut open = std::mem::take(&mut fresh);
        while let Some((state, inside)) = open.pop() {
            for byte in inside.bytes(alphabet) {
                let Some(then) = inside.then(byte) else { continue };
                let place = (step(parser, state, byte)?, then);
                if seen.insert(place) {
                    let next = if then == Inside::Nothing { &mut fresh } else { &mut open };
                    next.push(place);
                }
            }
            if seen.len() > MOST_PLACES || Instant::now() > until {
                return None;
            }
        }
        if fresh.is_empty() {
            return Some(Reach::ForEver);
        }
    }
    Some(Reach::Short)
}

impl Inside {
    /// Bytes among which are all that may follow.
    fn bytes(self, alphabet: Alphabet) -> std::ops::RangeInclusive<u8> {
        match (self, alphabet) {
            (Inside::Nothing, Alphabet::Ascii) => b' '..=b'~',
            (Inside::Nothing, Alphabet::Unicode) => b' '..=0xF4,
            _ => 0x80..=0xBF,
        }
    }

    /// Where a byte leads; `None`: no plain character goes on with it.
    fn then(self, byte: u8) -> Option<Inside> {
        let then = match (self, byte) {
            (Inside::Nothing, b'"' | b'\\' | 0x7F) => return None,
            (Inside::Nothing, b' '..=b'~') | (Inside::One, 0x80..=0xBF) => Inside::Nothing,
            (Inside::Nothing, 0xC2..=0xDF)
            | (Inside::Two, 0x80..=0xBF)
            | (Inside::AfterE0, 0xA0..=0xBF)
            | (Inside::AfterEd, 0x80..=0x9F) => Inside::One,
            (Inside::Nothing, 0xE1..=0xEC | 0xEE..=0xEF)
            | (Inside::Three, 0x80..=0xBF)
            | (Inside::AfterF0, 0x90..=0xBF)
            | (Inside::AfterF4, 0x80..=0x8F) => Inside::Two,
            (Inside::Nothing, 0xE0) => Inside::AfterE0,
            (Inside::Nothing, 0xED) => Inside::AfterEd,
            (Inside::Nothing, 0xF0) => Inside::AfterF0,
            (Inside::Nothing, 0xF1..=0xF3) => Inside::Three,
            (Inside::Nothing, 0xF4) => Inside::AfterF4,
            _ => return None,
        };
        Some(then)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use llguidance::api::TopLevelGrammar;
    use llguidance::{Matcher, ParserFactory};
    use serde_json::json;
    use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo};

    use super::*;

    /// Bytes, words of several alphabets, and tokens that leave a string.
    fn environment() -> TokEnv {
        let mut words: Vec<Vec<u8>> = (0..=254).map(|byte| vec![byte]).collect();
        words.push(b"\xFF<end>".to_vec());
        for text in [
            "foo",
            " foo",
            "oo",
            "the quick",
            "quick brown fox",
            "  ",
            " a b c d e f",
            "\t",
            "é",
            " né",
            "日本",
            "😀😀",
            "\u{a0}",
            "\u{85}x",
            "\u{2028}",
            "\"",
            "\",",
            "o\"",
            "\\n",
            "a\\",
            "12",
            "x1 y2 z3",
            "----------",
            "a long token of many letters",
            "\u{7f}",
        ] {
            words.push(text.as_bytes().to_vec());
        }
        // Parts of characters.
        words.extend([b"\xE6\x97".to_vec(), b"a\xF0\x9F".to_vec(), b"\x98\x80 b".to_vec()]);
        let count = u32::try_from(words.len()).expect("few");
        Arc::new(ApproximateTokEnv::new(TokTrie::from(&TokRxInfo::new(count, 255), &words)))
    }

    /// Every mask along `text` with and without what this module adds; returns how often it added something.
    fn compare(environment: &TokEnv, schema: &serde_json::Value, text: &str) -> usize {
        let slices = PlainTokens::slices();
        let capabilities = InferenceCapabilities::default();
        let factory = ParserFactory::new(environment, capabilities, &slices);
        let mut factory = factory.expect("it is fit");
        factory.limits_mut().step_lexer_fuel = crate::compiler::STEP_FUEL;
        let masks = Arc::new(Counted(PlainTokens::new(factory.slicer()), AtomicUsize::new(0)));
        let matcher = |masks: Option<Arc<dyn BiasComputer>>| {
            let grammar = TopLevelGrammar::from_json_schema(schema.clone());
            let mut parser = factory.create_parser(grammar).expect("it compiles");
            if let Some(masks) = masks {
                parser.bias_computer = masks;
            }
            Matcher::new(Ok(parser))
        };
        let mut with = matcher(Some(Arc::clone(&masks) as Arc<dyn BiasComputer>));
        let mut without = matcher(None);
        for id in environment.tokenize(text) {
            let (found, expected) = (with.compute_mask(), without.compute_mask());
            let (found, expected) = (found.expect("a mask"), expected.expect("a mask"));
            assert_eq!(found.to_list(), expected.to_list(), "{schema} before {id} of {text}");
            for matcher in [&mut with, &mut without] {
                matcher.consume_token(id).expect("the text conforms");
            }
        }
        masks.1.load(Ordering::Relaxed)
    }

    /// Counts where a slice is found.
    struct Counted(PlainTokens, AtomicUsize);

    impl BiasComputer for Counted {
        fn compute_bias(&self, parser: &mut ParserRecognizer<'_>, start: &[u8]) -> SimpleVob {
            let n = usize::from(self.0.slice(parser).is_some());
            self.1.fetch_add(n, Ordering::Relaxed);
            self.0.compute_bias(parser, start)
        }

        fn trie(&self) -> &TokTrie {
            self.0.trie()
        }
    }

    #[test]
    fn masks_inside_strings_are_those_of_every_token_looked_at() {
        let environment = environment();
        for (pattern, text, is_added) in [
            ("foo", "\"a fofoo the quick brown foxé 日本\"", true),
            ("^(?:\\S+\\s+){0,29}\\S+$", "\"the quick  a b c d e f\"", true),
            ("^(\\S+\\s+){0,3}\\S+$", "\"a b\"", false),
            ("^[^a]*$", "\"quick brown fox\"", false),
            ("^[a-z]{1,40}$", "\"quick\"", false),
            ("x1 y2|日本", "\"the x1 日本 x1 y2 z3\"", true),
            ("^.{0,12}$", "\"the quick\"", false),
            ("[0-9]{2}$", "\"the quick 12\"", true),
        ] {
            let schema = json!({"type": "string", "pattern": pattern});
            let n_added = compare(&environment, &schema, text);
            assert_eq!(n_added > 0, is_added, "{pattern}: {n_added}");
            let both = json!({"type": "array", "items": {"type": "string", "pattern": pattern, "maxLength": 300}});
            compare(&environment, &both, &format!("[{text},{text}]"));
        }
        compare(&environment, &json!({}), "{\"the quick\": [12, \"foo 日本\", null]}");
    }
}
