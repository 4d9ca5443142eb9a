//! How much of a question's words its evidence holds, rare words first: the second signal of the
//! gate. It needs no model, and it does not know the encoder.
//!
//! `ls(q, R) = 1 − max over c in R of Σ idf(w), w in W(q) ∩ W(c), over Σ idf(w), w in W(q)`, in
//! [0, 1], where W is the set of content words without English endings, hyphens and dots parting
//! words, numbers in one form each; W(c) takes the headings above a chunk in, as the lexical index
//! does. `idf(w) = ln(1 + (N − n + ½) / (n + ½))` for a word that n of the N chunks hold, the
//! weight of Robertson and Spärck Jones as BM25 uses it, so that a word that no chunk holds (often
//! the very name that was asked for) weighs most. A question without a content word has no value.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use exrail_metrics::{content_words, number_set};
use exrail_retrieval::{Chunk, Hit};

use crate::attribution::stem;
use crate::error::VerifyError;
use crate::system::Retrieve;

/// The words of an index: in how many chunks each stands, and what the headings say.
#[derive(Clone, Debug, PartialEq)]
pub struct LexicalEvidence {
    n_chunks: usize,
    n_with: HashMap<String, usize>,
    /// Words of the headings above a section, by its id.
    headings: BTreeMap<String, BTreeSet<String>>,
}

impl LexicalEvidence {
    /// Counts the words of an index. Takes one pass over its text.
    ///
    /// # Errors
    /// The index failed.
    pub fn of(index: &dyn Retrieve) -> Result<LexicalEvidence, VerifyError> {
        let mut n_with: HashMap<String, usize> = HashMap::new();
        let mut n_chunks = 0;
        for chunk in index.chunks() {
            n_chunks += 1;
            for word in words(&chunk.text) {
                *n_with.entry(word).or_default() += 1;
            }
        }
        let mut headings = BTreeMap::new();
        for doc_id in index.doc_ids() {
            let Some(document) = index.document(&doc_id)? else { continue };
            for section in &document.sections {
                let above = section.path.iter().flat_map(|title| words(title)).collect();
                headings.insert(section.section_id.clone(), above);
            }
        }
        Ok(LexicalEvidence { n_chunks, n_with, headings })
    }

    /// `ls` of a question and its evidence; none without evidence or without a content word.
    #[must_use]
    pub fn stress(&self, question: &str, hits: &[Hit]) -> Option<f64> {
        let asked = words(question);
        let weight = |words: &mut dyn Iterator<Item = &String>| -> f64 {
            words.map(|word| self.idf(word)).sum()
        };
        let whole = weight(&mut asked.iter());
        if asked.is_empty() {
            return None;
        }
        let held = |hit: &Hit| {
            let chunk = self.chunk_words(&hit.chunk);
            weight(&mut asked.iter().filter(|word| chunk.contains(*word)))
        };
        let best = hits.iter().map(held).max_by(f64::total_cmp)?;
        Some((1.0 - best / whole).clamp(0.0, 1.0))
    }

    fn chunk_words(&self, chunk: &Chunk) -> BTreeSet<String> {
        let mut held = words(&chunk.text);
        held.extend(self.headings.get(&chunk.section_id).into_iter().flatten().cloned());
        held
    }

    /// Above 0 for every word, also for one that all chunks hold.
    fn idf(&self, word: &str) -> f64 {
        let n_with = count(self.n_with.get(word).copied().unwrap_or(0));
        (1.0 + (count(self.n_chunks) - n_with + 0.5) / (n_with + 0.5)).ln()
    }
}

/// The content words of a text without endings; what hyphens and dots join are words of their own,
/// numbers stay whole.
fn words(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for word in content_words(text) {
        if number_set(&word).contains(&word) {
            found.insert(word);
        } else {
            let parted = word.replace(|c: char| !c.is_alphanumeric(), " ");
            found.extend(content_words(&parted).into_iter().map(stem));
        }
    }
    found
}

#[expect(clippy::cast_precision_loss, reason = "chunk counts are far below 2^52")]
fn count(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::{FakeIndex, hit};

    fn index() -> FakeIndex {
        FakeIndex::of_texts(&[
            ("a.md", "The cache holds pages of 256 tokens.\nThe cache rotates on a full window.\n"),
            ("b.md", "The warm-up fence holds traffic back.\n"),
        ])
    }

    fn stress(question: &str, texts: &[&str]) -> Option<f64> {
        let hits: Vec<Hit> = texts.iter().map(|text| hit("a.md", 0, text, 0.5)).collect();
        LexicalEvidence::of(&index()).unwrap().stress(question, &hits)
    }

    #[test]
    fn the_value_is_the_weight_of_the_missing_words() {
        // Of 3 chunks 2 hold `cache`, 1 holds `page`, none holds `lora`.
        let [cache, page, lora] =
            [2.0_f64, 1.0, 0.0].map(|n| (1.0 + (3.0 - n + 0.5) / (n + 0.5)).ln());
        let value = stress("Which pages of the cache does LoRA use?", &["Pages of the cache."]);
        let expected = lora / (cache + page + lora);
        assert!((value.unwrap() - expected).abs() < 1e-12, "{value:?}, expected {expected}");
        assert!(lora > page && page > cache, "a rare word weighs more");
    }

    #[test]
    fn one_snippet_must_hold_the_words() {
        let question = "Which pages does the fence hold?";
        let apart = stress(question, &["Pages of it.", "A fence holds."]).unwrap();
        let together = stress(question, &["The fence holds pages."]).unwrap();
        assert!(together.abs() < 1e-12 && apart > 0.2, "{together} {apart}");
    }

    #[test]
    fn endings_hyphens_and_numbers_are_read_alike_on_both_sides() {
        assert_eq!(stress("Is there a warm up?", &["The warm-up fence."]), Some(0.0));
        assert_eq!(stress("Rotating caches?", &["It rotates the cache."]), Some(0.0));
        assert_eq!(stress("1,024 tokens?", &["1024 tokens"]), Some(0.0));
        assert!(stress("0.45 tokens?", &["0.60 tokens"]).unwrap() > 0.2);
    }

    #[test]
    fn a_heading_counts_for_the_chunks_below_it() {
        let mut index = index();
        let chunk = std::sync::Arc::clone(index.chunks().next().unwrap());
        index.title("a.md", &chunk.section_id, "Paged attention");
        let lexical = LexicalEvidence::of(&index).unwrap();
        let hits = [Hit { chunk, ..hit("", 0, "", 0.5) }];
        assert_eq!(lexical.stress("Attention of a cache?", &hits), Some(0.0));
    }

    #[test]
    fn without_words_or_evidence_there_is_no_value() {
        assert_eq!(stress("What is it?", &["The cache."]), None);
        assert_eq!(stress("The cache?", &[]), None);
        assert_eq!(stress("The quokka?", &["The cache."]), Some(1.0));
    }
}
