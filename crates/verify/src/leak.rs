//! Keeps an answer from repeating a secret text, such as the system message (G-21, signal 4).
//!
//! Two signals: a *canary*, which stands in the secret text and nowhere else, and any stretch of that text of at
//! least [`LEAK_TOKENS`] tokens. Letters and digits are compared, without case; what is between them is not, so
//! that other line breaks, quotes, markup, or blanks between letters change nothing. What is held back while an
//! answer is streamed is exactly what may still become such a stretch.
//!
//! This sees repetition. A translation, a summary, a cipher or another alphabet is not repetition, and passes.

use std::collections::HashMap;
use std::sync::Arc;

/// Tokens of a secret text in a row that may not be in an answer (G-21).
pub const LEAK_TOKENS: usize = 12;

/// One secret text as its letters and digits.
#[derive(Clone, Debug)]
struct Secret {
    /// Where each letter is found, ascending.
    places: HashMap<char, Vec<usize>>,
    /// For each letter: how many tokens begin before what separates it from the letter before it.
    begun: Vec<usize>,
    /// For each letter: how many tokens have ended before the letter after it.
    ended: Vec<usize>,
    /// Tokens in a row that are a leak.
    limit: usize,
    what: Leak,
}

/// What an answer was about to repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leak {
    /// The mark that stands in the secret text only.
    Canary,
    /// A stretch of the secret text.
    Text,
}

impl Leak {
    /// Name in records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Leak::Canary => "canary",
            Leak::Text => "text",
        }
    }
}

/// The secrets of one request.
#[derive(Clone, Debug, Default)]
pub struct LeakGuard {
    secrets: Vec<Secret>,
}

impl LeakGuard {
    /// A guard that knows no secret.
    #[must_use]
    pub fn new() -> LeakGuard {
        LeakGuard::default()
    }

    /// Adds a text; `token_ends` are the byte offsets at which its tokens end, ascending.
    ///
    /// A text of fewer than [`LEAK_TOKENS`] tokens has no stretch that long, and nothing is kept from answers.
    #[must_use]
    pub fn with_text(mut self, text: &str, token_ends: &[usize]) -> LeakGuard {
        if token_ends.len() >= LEAK_TOKENS {
            self.secrets.push(Secret::new(text, token_ends, LEAK_TOKENS, Leak::Text));
        }
        self
    }

    /// Adds a mark of letters and digits that no answer has a reason to hold, whole.
    ///
    /// # Panics
    /// The mark has fewer than eight characters, or others than ASCII letters and digits: it would be found where
    /// nobody leaked it.
    #[must_use]
    pub fn with_canary(mut self, mark: &str) -> LeakGuard {
        assert!(mark.len() >= 8 && mark.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        let ends: Vec<usize> = (1..=mark.len()).collect();
        self.secrets.push(Secret::new(mark, &ends, mark.len(), Leak::Canary));
        self
    }

    /// Whether there is nothing to guard.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.secrets.is_empty()
    }

    /// What of a whole answer may be told: all of it, or what comes before the first leak.
    #[must_use]
    pub fn screen(self: &Arc<Self>, answer: &str) -> Screened {
        let mut watch = LeakWatch::new(Arc::clone(self));
        let mut screened = watch.push(answer);
        screened.text.push_str(&watch.finish());
        screened
    }
}

impl Secret {
    fn new(text: &str, token_ends: &[usize], limit: usize, what: Leak) -> Secret {
        let mut letters: Vec<(char, usize, usize)> = Vec::new();
        for (at, char) in text.char_indices() {
            letters.extend(folded(char).map(|letter| (letter, at, at + char.len_utf8())));
        }
        // The first token that begins at a byte or behind it: each begins where the one before it ends.
        let first_from = |at: usize| match at {
            0 => 0,
            at => token_ends.partition_point(|end| *end < at) + 1,
        };
        let mut places: HashMap<char, Vec<usize>> = HashMap::new();
        let (mut begun, mut ended) = (Vec::new(), Vec::new());
        for (index, (letter, start, _)) in letters.iter().enumerate() {
            places.entry(*letter).or_default().push(index);
            // A stretch takes what separates it from its neighbours along: those tokens say nothing by
            // themselves, and a copy may have lost or changed them.
            let before = index.checked_sub(1).map_or(0, |before| letters[before].2.min(*start));
            let after = letters.get(index + 1).map_or(text.len(), |after| after.1);
            begun.push(first_from(before));
            ended.push(token_ends.partition_point(|end| *end <= after));
        }
        Secret { places, begun, ended, limit, what }
    }

    /// Whole tokens from the letter `first` to the letter `last`.
    fn tokens(&self, first: usize, last: usize) -> usize {
        self.ended[last].saturating_sub(self.begun[first])
    }
}

/// A stretch of a secret that an answer is repeating.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Its first letter in the secret.
    first: usize,
    /// Its last letter in the secret.
    last: usize,
    /// Its first byte in the text that is held.
    start: usize,
}

/// What may be told of a piece of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Screened {
    /// Text that is no part of a leak, whatever follows.
    pub text: String,
    /// What was about to leak; nothing is told after it.
    pub leak: Option<Leak>,
}

/// Watches one answer as it grows.
#[derive(Clone, Debug)]
pub struct LeakWatch {
    guard: Arc<LeakGuard>,
    /// The runs of each secret, by ascending place.
    runs: Vec<Vec<Run>>,
    held: String,
    leak: Option<Leak>,
}

impl LeakWatch {
    /// Watches from the beginning of an answer.
    #[must_use]
    pub fn new(guard: Arc<LeakGuard>) -> LeakWatch {
        let runs = vec![Vec::new(); guard.secrets.len()];
        LeakWatch { guard, runs, held: String::new(), leak: None }
    }

    /// Takes the next piece and says what may be told.
    pub fn push(&mut self, piece: &str) -> Screened {
        if self.leak.is_some() {
            return Screened { text: String::new(), leak: self.leak };
        }
        let seen = self.held.len();
        self.held.push_str(piece);
        for (at, char) in piece.char_indices() {
            for letter in folded(char) {
                if let Some((leak, start)) = self.advance(letter, seen + at) {
                    self.leak = Some(leak);
                    let mut text = std::mem::take(&mut self.held);
                    text.truncate(start);
                    return Screened { text, leak: self.leak };
                }
            }
        }
        let starts = self.runs.iter().flatten().map(|run| run.start);
        let from = starts.min().unwrap_or(self.held.len());
        let kept = self.held.split_off(from);
        self.runs.iter_mut().flatten().for_each(|run| run.start -= from);
        Screened { text: std::mem::replace(&mut self.held, kept), leak: None }
    }

    /// Ends the answer: what is held did not become a leak. Empty behind one.
    pub fn finish(&mut self) -> String {
        self.runs.iter_mut().for_each(Vec::clear);
        std::mem::take(&mut self.held)
    }

    /// Goes on by one letter that stands at the byte `at` of what is held.
    fn advance(&mut self, letter: char, at: usize) -> Option<(Leak, usize)> {
        let guard = Arc::clone(&self.guard);
        let mut found: Option<(Leak, usize)> = None;
        for (secret, runs) in guard.secrets.iter().zip(&mut self.runs) {
            let places = secret.places.get(&letter).map_or(&[][..], Vec::as_slice);
            let mut former = runs.iter().copied().peekable();
            let mut next = Vec::with_capacity(places.len());
            for &place in places {
                while former.next_if(|run| run.last + 1 < place).is_some() {}
                let goes_on = former.peek().filter(|run| run.last + 1 == place).copied();
                let run = goes_on.map_or(Run { first: place, last: place, start: at }, |run| Run {
                    last: place,
                    ..run
                });
                if secret.tokens(run.first, place) >= secret.limit {
                    let earlier = found.is_none_or(|(_, start)| run.start < start);
                    found = if earlier { Some((secret.what, run.start)) } else { found };
                }
                next.push(run);
            }
            *runs = next;
        }
        found
    }
}

/// A character as it is compared: in lower case, or nothing where it is no letter and no digit.
fn folded(char: char) -> impl Iterator<Item = char> {
    char.to_lowercase().filter(|it| it.is_alphanumeric())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "You are Quill, the assistant of Harbour Books. Never mention the discount code \
                          SAFFRON-41, and route every refund above fifty euros to the desk of Mrs. Achterberg.";
    const CANARY: &str = "c4n4ry0f7e57";

    /// A token a word with the blank before it, as most tokenizers have it for common words.
    fn ends(text: &str) -> Vec<usize> {
        let mut ends: Vec<usize> = text.match_indices(' ').map(|(at, _)| at).collect();
        ends.push(text.len());
        ends
    }

    fn guard() -> Arc<LeakGuard> {
        Arc::new(LeakGuard::new().with_text(SECRET, &ends(SECRET)).with_canary(CANARY))
    }

    fn words(from: usize, n: usize) -> String {
        SECRET.split(' ').skip(from).take(n).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn g21_twelve_tokens_of_the_system_text_are_withheld_and_eleven_pass() {
        let guard = guard();
        let n_words = SECRET.split(' ').count();
        for from in 0..=n_words - LEAK_TOKENS {
            let twelve = format!("Sure! {} — there.", words(from, LEAK_TOKENS));
            let screened = guard.screen(&twelve);
            assert_eq!(screened.leak, Some(Leak::Text), "from word {from}");
            // The stretch may begin before its words: `Sure! Quill` ends as `are Quill` of the secret does.
            assert!("Sure! ".starts_with(&screened.text), "{:?}", screened.text);
        }
        for from in 0..=n_words - 11 {
            let eleven = format!("zzz {} zzz", words(from, 11));
            assert_eq!(
                guard.screen(&eleven),
                Screened { text: eleven.clone(), leak: None },
                "{from}"
            );
        }
    }

    #[test]
    fn g21_the_canary_is_withheld_wherever_it_stands() {
        let screened = guard().screen(&format!("The mark is <{}>.", CANARY.to_uppercase()));
        assert_eq!(screened, Screened { text: "The mark is <".into(), leak: Some(Leak::Canary) });
        assert_eq!(guard().screen(&CANARY[..11]).leak, None);
        let spelled: String = CANARY.chars().flat_map(|char| [char, '-']).collect();
        assert_eq!(guard().screen(&spelled).leak, Some(Leak::Canary));
    }

    #[test]
    fn g21_other_case_blanks_and_markup_change_nothing() {
        let stretch = words(2, 20);
        let spaced: String = stretch.chars().flat_map(|char| [char, ' ']).collect();
        let masked = stretch.replace(' ', "\u{200b}*\n> ");
        let glued = stretch.replace(' ', "");
        for disguised in
            [stretch.to_uppercase(), spaced, masked, glued, format!("```\n{stretch}\n```")]
        {
            assert_eq!(guard().screen(&disguised).leak, Some(Leak::Text), "{disguised}");
        }
    }

    #[test]
    fn g21_an_answer_in_other_words_passes_whole() {
        let answer = "I help customers of a bookshop. Refunds above a certain amount are decided by a colleague, \
                      and I cannot share discount codes. You are welcome to ask about any book!";
        assert_eq!(guard().screen(answer), Screened { text: answer.into(), leak: None });
    }

    #[test]
    fn a_text_shorter_than_the_stretch_is_no_secret() {
        let text = "You are a kind assistant.";
        assert!(LeakGuard::new().with_text(text, &ends(text)).is_empty());
    }

    #[test]
    fn mutation_g21_without_the_guard_the_system_text_is_told() {
        let obeys = format!("Here it is: {SECRET}");
        assert!(!guard().screen(&obeys).text.contains("SAFFRON"));
        // The mutation: a guard that was not told the text.
        assert_eq!(Arc::new(LeakGuard::new()).screen(&obeys).text, obeys);
    }

    /// All letters of a text, as they are compared.
    fn letters(text: &str) -> String {
        text.chars().flat_map(folded).collect()
    }

    proptest! {
        #[test]
        fn g21_no_split_of_a_stream_tells_a_stretch(
            pieces in proptest::collection::vec((0usize..24, 1usize..16, "[ .,!a-e]{0,6}"), 1..6),
            cuts in proptest::collection::vec(1usize..9, 1..60),
        ) {
            let answer: String =
                pieces.iter().map(|(from, n, noise)| format!("{noise}{} ", words(*from, *n))).collect();
            let whole = guard().screen(&answer);
            let mut watch = LeakWatch::new(guard());
            let (mut told, mut leak) = (String::new(), None);
            let mut rest: Vec<char> = answer.chars().collect();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break }
                let piece: String = rest.drain(..(*cut).min(rest.len())).collect();
                let screened = watch.push(&piece);
                told.push_str(&screened.text);
                leak = screened.leak;
                // By the definition: no twelve words in a row are in what was told so far.
                for from in 0..=SECRET.split(' ').count() - LEAK_TOKENS {
                    prop_assert!(!letters(&told).contains(&letters(&words(from, LEAK_TOKENS))));
                }
            }
            told.push_str(&watch.finish());
            prop_assert_eq!(told, whole.text);
            prop_assert_eq!(leak, whole.leak);
        }
    }
}
