//! Finds the snippet that holds a sentence's words, for models too small to cite by themselves.
//!
//! Deterministic and lexical: it points at text that is there, or at nothing. It does not prove
//! that the snippet entails the sentence, so what it finds is labelled `attributed`.

use std::collections::BTreeSet;

use exrail_metrics::{content_words, number_set};

use crate::prompt::Live;

/// A snippet found for a sentence.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribution {
    /// The snippet.
    pub snippet_id: String,
    /// Its section.
    pub section_id: String,
    /// Share of the sentence's content words that the snippet holds, in [0, 1].
    pub containment: f64,
}

/// The live snippet with the greatest containment of the sentence's content words, if that is at
/// least `min_containment`; of equals the one ranked higher. A sentence that states a number which
/// the snippet does not hold is not attributed to it, whatever the other words are.
#[must_use]
pub fn attribute(sentence: &str, live: &Live, min_containment: f64) -> Option<Attribution> {
    let words = stems(sentence);
    let numbers = number_set(sentence);
    if words.is_empty() {
        return None;
    }
    let mut best: Option<Attribution> = None;
    for chunk in live.iter() {
        if !numbers.is_subset(&number_set(&chunk.text)) {
            continue;
        }
        let containment = share(words.intersection(&stems(&chunk.text)).count(), words.len());
        let least = best.as_ref().map_or(min_containment, |best| best.containment);
        if containment > least || (best.is_none() && containment >= least) {
            best = Some(Attribution {
                snippet_id: chunk.snippet_id.clone(),
                section_id: chunk.section_id.clone(),
                containment,
            });
        }
    }
    best
}

/// Share of the content words of `reference` that `text` holds, 0 if a number of it is missing.
pub(crate) fn containment(reference: &str, text: &str) -> f64 {
    let words = stems(reference);
    if words.is_empty() || !number_set(reference).is_subset(&number_set(text)) {
        return 0.0;
    }
    share(words.intersection(&stems(text)).count(), words.len())
}

/// Content words without the commonest English endings: "pages" and "page" are one word here.
pub(crate) fn stems(text: &str) -> BTreeSet<String> {
    content_words(text).into_iter().map(stem).collect()
}

/// A word without the commonest English endings.
pub(crate) fn stem(word: String) -> String {
    for (ending, least) in [("ing", 6), ("ed", 5), ("es", 5), ("s", 4)] {
        if let Some(root) = word.strip_suffix(ending)
            && word.len() >= least
            && !root.ends_with('s')
        {
            return root.trim_end_matches('e').to_owned();
        }
    }
    if word.len() >= 4 { word.trim_end_matches('e').to_owned() } else { word }
}

#[expect(clippy::cast_precision_loss, reason = "word counts are far below 2^52")]
fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::hit;

    fn live() -> Live {
        Live::new(&[
            hit("a.md", 0, "The cache holds pages of 256 tokens and evicts them.", 0.9),
            hit("b.md", 0, "Rotate the cache every 8192 tokens to keep the prompt in range.", 0.8),
        ])
    }

    #[test]
    fn the_snippet_with_the_words_is_found() {
        let live = live();
        let found = attribute("Rotating the cache keeps the prompt in range.", &live, 0.6).unwrap();
        assert_eq!(found.snippet_id, live.by_label(2).unwrap().snippet_id);
        assert!((found.containment - 1.0).abs() < 1e-12);
    }

    #[test]
    fn nothing_is_invented() {
        assert_eq!(attribute("Paris is the capital of France.", &live(), 0.6), None);
        assert_eq!(attribute("It is so.", &live(), 0.6), None);
        assert_eq!(attribute("The cache holds pages.", &Live::default(), 0.6), None);
    }

    #[test]
    fn a_number_that_is_not_there_forbids_attribution() {
        assert!(attribute("The cache holds pages of 256 tokens.", &live(), 0.6).is_some());
        assert_eq!(attribute("The cache holds pages of 512 tokens.", &live(), 0.6), None);
    }

    #[test]
    fn equals_go_to_the_better_rank() {
        let live = live();
        let found = attribute("The cache has tokens.", &live, 0.5).unwrap();
        assert_eq!(found.snippet_id, live.by_label(1).unwrap().snippet_id);
    }
}
