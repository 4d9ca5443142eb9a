//! What is checked of every answer before it leaves: whether what it cites holds it, how much of it is in the evidence,
//! and how far it is from what it cites.
//!
//! All but the last are comparisons of words, so they cost less than a millisecond. They are no proof: a sentence with
//! the words of a snippet may still deny it, and no model judges that here. ΔS needs the vectors of the answer and of
//! the snippets; those of snippets are remembered.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use exrail_metrics::{Calibration, Fitness, normalised, number_set};
use exrail_retrieval::{Encode, EncodeError, RememberingEncoder};

use crate::ask::AskOutcome;
use crate::attribution::stems;
use crate::calibrate::{CorpusCalibration, FamilyFit};
use crate::encode::{Side, TextVectors, ds_between};

/// Words in a row that count as taken from a snippet.
const SPAN_WORDS: usize = 3;

/// What was checked of one answer. Of a refusal nothing is.
#[derive(Clone, Debug, PartialEq)]
pub struct LiveChecks {
    /// Share of the sentences whose cited snippets together hold them, in [0, 1] (ALCE, Gao et al. 2023, §4.2, with words
    /// in place of entailment).
    pub citation_recall: Option<f64>,
    /// Share of the citations that hold their sentence alone or without which the others do not, in [0, 1]; none without
    /// a citation.
    pub citation_precision: Option<f64>,
    /// Share of the answer's words that stand in a cited snippet in the same order, three or more in a row, in [0, 1].
    pub span_containment: Option<f64>,
    /// Share of the answer's content words that the snippets of the prompt hold, in [0, 1] (§1.2.9).
    pub answer_containment: Option<f64>,
    /// ΔS of the answer and the nearest snippet that it cites, on the calibrated text↔text scale (§1.1.4), or why there is
    /// none.
    pub ds_ac: Distance,
    /// Wall time of the comparisons.
    pub took: Duration,
    /// Wall time of the vectors; none where none was needed.
    pub embedding_took: Option<Duration>,
}

/// Calibrated ΔS of an answer and what it cites.
#[derive(Clone, Debug, PartialEq)]
pub enum Distance {
    /// By an encoder that is fit to gate.
    Value(f64),
    /// By one that is not: it reports, and must not gate.
    Unfit(f64),
    /// There is no scale for two texts.
    NotCalibrated,
    /// There is no answer, it cites nothing, or both texts are longer than the encoder's window.
    Undefined,
    /// The encoder failed.
    Failed(String),
}

impl Distance {
    /// The value, whether or not it may gate.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        match self {
            Distance::Value(value) | Distance::Unfit(value) => Some(*value),
            Distance::NotCalibrated | Distance::Undefined | Distance::Failed(_) => None,
        }
    }

    /// `ok`, `encoder_unfit`, `not_calibrated`, `undefined` or `failed`.
    #[must_use]
    pub fn status(&self) -> &'static str {
        match self {
            Distance::Value(_) => "ok",
            Distance::Unfit(_) => "encoder_unfit",
            Distance::NotCalibrated => "not_calibrated",
            Distance::Undefined => "undefined",
            Distance::Failed(_) => "failed",
        }
    }
}

/// Checks answers from one collection.
pub struct LiveChecker {
    encoder: Arc<dyn Encode>,
    /// Of the snippets, which come back; answers do not.
    snippets: RememberingEncoder,
    scale: Option<Calibration>,
}

impl LiveChecker {
    /// A checker with the encoder of the collection and its calibration, which must hold for both. Without one there is
    /// no scale.
    #[must_use]
    pub fn new(encoder: &Arc<dyn Encode>, calibration: Option<&CorpusCalibration>) -> LiveChecker {
        let scale = match calibration.map(|of| &of.tt) {
            Some(FamilyFit::Fitted(map)) => Some(map.clone()),
            Some(FamilyFit::NotCalibrated { .. }) | None => None,
        };
        let snippets = RememberingEncoder::new(Arc::clone(encoder));
        LiveChecker { encoder: Arc::clone(encoder), snippets, scale }
    }

    /// Checks an answer; `min_containment` is the share of a sentence's words that holds it, as for attribution.
    #[must_use]
    pub fn check(&self, outcome: &AskOutcome, min_containment: f64) -> LiveChecks {
        let begun = Instant::now();
        let compared = Compared::of(outcome, min_containment);
        let (took, begun) = (begun.elapsed(), Instant::now());
        let (ds_ac, has_embedded) = self.ds_ac(outcome);
        LiveChecks {
            citation_recall: share(compared.n_held, outcome.segments.len()),
            citation_precision: share(compared.n_relevant, compared.n_citations),
            span_containment: share(compared.n_spanned, compared.n_words),
            answer_containment: share(compared.n_found, compared.n_content),
            ds_ac,
            took,
            embedding_took: has_embedded.then(|| begun.elapsed()),
        }
    }

    /// The distance, and whether the encoder ran.
    fn ds_ac(&self, outcome: &AskOutcome) -> (Distance, bool) {
        let cited = outcome.cited_ids();
        if cited.is_empty() {
            return (Distance::Undefined, false);
        }
        let Some(scale) = &self.scale else { return (Distance::NotCalibrated, false) };
        let distance = match self.nearest(outcome, &cited) {
            Ok(None) => Distance::Undefined,
            Ok(Some(raw)) => match scale.fitness {
                Fitness::Fit => Distance::Value(scale.map(raw)),
                Fitness::Unfit(_) => Distance::Unfit(scale.map(raw)),
            },
            Err(error) => Distance::Failed(error.to_string()),
        };
        (distance, true)
    }

    /// Raw ΔS of the answer and the nearest cited snippet.
    fn nearest(&self, outcome: &AskOutcome, cited: &[&str]) -> Result<Option<f64>, EncodeError> {
        let mut of_answer = TextVectors::new(&*self.encoder);
        let answer = of_answer.windows(Side::Query, &outcome.text)?;
        let mut of_snippets = TextVectors::new(&self.snippets);
        let mut least: Option<f64> = None;
        for hit in &outcome.evidence {
            if cited.contains(&hit.chunk.snippet_id.as_str()) {
                let snippet = of_snippets.windows(Side::Query, &hit.chunk.text)?;
                let raw = ds_between(answer, snippet).value();
                least = [least, raw].into_iter().flatten().min_by(f64::total_cmp);
            }
        }
        Ok(least)
    }
}

/// Counts over the sentences of an answer.
#[derive(Default)]
struct Compared {
    n_held: usize,
    n_citations: usize,
    n_relevant: usize,
    n_words: usize,
    n_spanned: usize,
    n_content: usize,
    n_found: usize,
}

impl Compared {
    fn of(outcome: &AskOutcome, min_containment: f64) -> Compared {
        let texts = outcome.evidence.iter().map(|hit| Words::of(&hit.chunk.text));
        let texts: Vec<Words> = texts.collect();
        let of_id = |id: &String| {
            outcome.evidence.iter().position(|hit| hit.chunk.snippet_id == *id).map(|at| &texts[at])
        };
        let mut compared = Compared::default();
        for segment in &outcome.segments {
            // With the citation guard off, the text is the reply, and its sentences may stand elsewhere.
            let said = outcome.text.get(segment.text_span.clone()).unwrap_or_default();
            let sentence = Words::of(said);
            let cited: Vec<&Words> = segment.snippet_ids.iter().filter_map(of_id).collect();
            compared.add_citations(&sentence, &cited, min_containment);
            compared.n_words += sentence.all.len();
            compared.n_spanned += sentence.spanned(&cited);
            compared.n_content += sentence.stems.len();
            let is_there = |stem: &&String| texts.iter().any(|text| text.stems.contains(*stem));
            compared.n_found += sentence.stems.iter().filter(is_there).count();
        }
        compared
    }

    fn add_citations(&mut self, sentence: &Words, cited: &[&Words], min_containment: f64) {
        let is_held = |by: &[&Words]| sentence.containment(by) >= min_containment;
        let is_sentence_held = is_held(cited);
        self.n_held += usize::from(is_sentence_held);
        self.n_citations += cited.len();
        if !is_sentence_held {
            return;
        }
        for at in 0..cited.len() {
            let others = [&cited[..at], &cited[at + 1..]].concat();
            self.n_relevant += usize::from(is_held(&cited[at..=at]) || !is_held(&others));
        }
    }
}

/// The words of a text.
struct Words {
    all: Vec<String>,
    stems: BTreeSet<String>,
    numbers: BTreeSet<String>,
}

impl Words {
    fn of(text: &str) -> Words {
        Words { all: normalised(text), stems: stems(text), numbers: number_set(text) }
    }

    /// Share of the content words that these texts hold together; 0 without one, and where a number is missing.
    fn containment(&self, texts: &[&Words]) -> f64 {
        let has_number = |number: &String| texts.iter().any(|text| text.numbers.contains(number));
        if !self.numbers.iter().all(has_number) {
            return 0.0;
        }
        let has_stem = |stem: &&String| texts.iter().any(|text| text.stems.contains(*stem));
        share(self.stems.iter().filter(has_stem).count(), self.stems.len()).unwrap_or(0.0)
    }

    /// Words in a run of [`SPAN_WORDS`] or more that one of these texts has, too.
    fn spanned(&self, texts: &[&Words]) -> usize {
        let mut is_spanned = vec![false; self.all.len()];
        for text in texts {
            let runs: HashSet<&[String]> = text.all.windows(SPAN_WORDS).collect();
            for (at, run) in self.all.windows(SPAN_WORDS).enumerate() {
                if runs.contains(run) {
                    is_spanned[at..at + SPAN_WORDS].fill(true);
                }
            }
        }
        is_spanned.into_iter().filter(|&it| it).count()
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn share(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

#[cfg(test)]
mod tests {
    use exrail_metrics::{Family, Unfit};
    use exrail_retrieval::testing::FakeEncoder;

    use super::*;
    use crate::answer::{CitationSource, Segment};
    use crate::ask::GateReading;
    use crate::fakes::hit;

    const PAGES: &str = "The cache holds pages of 256 tokens and evicts them by use.";
    const ROTATION: &str = "Rotate the cache every 8192 tokens to keep the prompt in range.";

    fn checker(scale: Option<Fitness>) -> LiveChecker {
        let encoder: Arc<dyn Encode> = Arc::new(FakeEncoder::new(1));
        let scale = scale.map(|fitness| Calibration {
            family: Family::TextText,
            t_pass: 0.2,
            t_fail: 0.4,
            t_rand: 0.8,
            midpoint: false,
            auroc: 0.9,
            share_between: 0.1,
            n: [60, 60, 60],
            fitness,
        });
        let snippets = RememberingEncoder::new(Arc::clone(&encoder));
        LiveChecker { encoder, snippets, scale }
    }

    /// An answer of these sentences, each with the snippets that it cites, from 0.
    fn answer(sentences: &[(&str, &[usize])]) -> AskOutcome {
        let evidence = vec![hit("a.md", 0, PAGES, 0.9), hit("b.md", 0, ROTATION, 0.8)];
        let mut text = String::new();
        let mut segments = Vec::new();
        for &(sentence, cited) in sentences {
            let start = text.len();
            text.push_str(sentence);
            let ids = cited.iter().map(|&at| evidence[at].chunk.snippet_id.clone());
            segments.push(Segment {
                text_span: start..text.len(),
                section_id: None,
                snippet_ids: ids.collect(),
                citation_source: (!cited.is_empty()).then_some(CitationSource::Model),
            });
            text.push(' ');
        }
        AskOutcome {
            text,
            refusal: None,
            segments,
            evidence,
            gate: GateReading::NoEvidence,
            reply: None,
            prompt: None,
            steps: Vec::new(),
        }
    }

    fn check(sentences: &[(&str, &[usize])]) -> LiveChecks {
        checker(Some(Fitness::Fit)).check(&answer(sentences), 0.6)
    }

    fn near(found: Option<f64>, expected: f64) {
        assert!(found.is_some_and(|it| (it - expected).abs() < 1e-12), "{found:?}, not {expected}");
    }

    #[test]
    fn a_copied_sentence_with_its_own_citation_is_perfect() {
        let checks = check(&[(PAGES, &[0])]);
        for value in [
            checks.citation_recall,
            checks.citation_precision,
            checks.span_containment,
            checks.answer_containment,
        ] {
            near(value, 1.0);
        }
        assert!(checks.ds_ac.value().unwrap() < 1e-6, "{:?}", checks.ds_ac);
        assert!(checks.embedding_took.is_some());
    }

    #[test]
    fn recall_counts_sentences_and_precision_citations() {
        let checks = check(&[
            // Held by the first; the second citation is for nothing.
            ("The cache holds pages of 256 tokens.", &[0, 1]),
            // Held by both together and by neither alone: both numbers are needed.
            ("Pages of 256 tokens, every 8192 tokens.", &[0, 1]),
            // Its citation does not hold it.
            ("Rotate the cache every 8192 tokens.", &[0]),
            ("Paris lies in France.", &[]),
        ]);
        near(checks.citation_recall, 2.0 / 4.0);
        near(checks.citation_precision, 3.0 / 5.0);
    }

    #[test]
    fn a_number_that_is_not_there_is_not_held() {
        let wrong = check(&[("The cache holds pages of 512 tokens.", &[0])]);
        near(wrong.citation_recall, 0.0);
        near(wrong.citation_precision, 0.0);
    }

    #[test]
    fn spans_are_words_in_a_row_and_containment_is_of_words_anywhere() {
        // Of seven words "cache holds pages" are in a row, "evicts" and "tokens" are there.
        let checks = check(&[("Cache holds pages, evicts tokens like Paris.", &[0])]);
        near(checks.span_containment, 3.0 / 7.0);
        let found = checks.answer_containment.unwrap();
        assert!(found > 0.7 && found < 1.0, "{found}");
        // Nothing that it cites: no run can be of it.
        near(check(&[("The cache holds pages.", &[])]).span_containment, 0.0);
    }

    #[test]
    fn what_cannot_be_said_has_no_value() {
        let refused = AskOutcome { segments: Vec::new(), ..answer(&[]) };
        let checks = checker(Some(Fitness::Fit)).check(&refused, 0.6);
        assert_eq!(checks.citation_recall, None);
        assert_eq!(checks.citation_precision, None);
        assert_eq!((checks.span_containment, checks.answer_containment), (None, None));
        assert_eq!((checks.ds_ac, checks.embedding_took), (Distance::Undefined, None));
        let uncited = check(&[("The cache holds pages.", &[])]);
        assert_eq!(uncited.citation_precision, None);
        assert_eq!(uncited.ds_ac, Distance::Undefined);
    }

    #[test]
    fn an_unfit_scale_reports_and_none_says_so() {
        let answer = answer(&[(PAGES, &[0])]);
        let unfit = checker(Some(Fitness::Unfit(vec![Unfit::Auroc])));
        let status = |checker: LiveChecker| checker.check(&answer, 0.6).ds_ac.status();
        assert_eq!(status(unfit), "encoder_unfit");
        assert_eq!(status(checker(None)), "not_calibrated");
        assert_eq!(status(checker(Some(Fitness::Fit))), "ok");
    }
}
