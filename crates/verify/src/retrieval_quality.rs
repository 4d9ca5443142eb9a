//! The retrieval playbook (G-24): how early the evidence of each gold question is found, by which weight of the two
//! rankings, and how many snippets a prompt needs so that it is covered. No generator takes part.
//!
//! The two rankings of a hybrid search are joined by reciprocal rank fusion with equal weights. What other weights would
//! give is computed from the same places, and compared question by question: a weight is better only where the interval
//! of the differences says so.

use exrail_metrics::{Interval, coverage_of, fused, mean, ndcg, reciprocal_rank, wilson};
use exrail_retrieval::{Chunk, Encode, Hit, SearchMode, SearchOptions};
use serde::Serialize;

use crate::error::VerifyError;
use crate::evaluate::{Progress, Stage};
use crate::gold::{AnchorMode, GoldSet, ResolvedItem};
use crate::positions::Positions;
use crate::report::{Status, Verdict};
use crate::system::Retrieve;

/// Places at which recall and coverage are told.
pub const DEPTHS: [usize; 5] = [1, 5, 10, 20, 50];
/// Share of the lexical ranking; the middle one is served.
const WEIGHTS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];
const SERVED: f64 = 0.5;
/// The place of [`SERVED`].
const SERVED_AT: usize = 2;
/// Snippets that are looked at, at most.
const DEEPEST: usize = 400;
/// Recall at 50 that the first stage needs before a reranker is worth anything (G-24).
const FIRST_STAGE: f64 = 0.85;
/// Coverage of one question, and the share of the questions that have to reach it (§1.2.8).
const COVERED: f64 = 0.70;
const COVERED_SHARE: f64 = 0.95;
/// Fewest questions of which a rate may pass.
const FEWEST: usize = 50;

/// How well an index finds what gold questions need.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RetrievalQuality {
    /// Chunks of the index.
    pub chunks: usize,
    /// Each question as the gold set asks it first.
    pub questions: Asked,
    /// Its other wordings.
    pub wordings: Asked,
    /// Coverage of the evidence by the first snippets, as served.
    pub coverage: Vec<CoverageAt>,
    /// Fewest snippets at which 95 % of the questions are covered to 0.70; none of those looked at is enough.
    pub k_needed: Option<usize>,
    /// The gate on the first stage: share of the questions all of whose evidence is among the first 50.
    pub first_stage: FirstStage,
    /// Questions whose evidence is not among the first 10 as served, with the place of the first of it.
    pub missed: Vec<Missed>,
    /// The result.
    pub verdict: Verdict,
}

/// Questions of one kind, by each weight.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Asked {
    /// How many.
    pub n: usize,
    /// By weight, from the vectors alone to the words alone.
    pub weights: Vec<WeightRow>,
}

/// What one weight gives.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WeightRow {
    /// Share of the lexical ranking, in [0, 1].
    pub lexical: f64,
    /// Share of the evidence among the first 1, 5, 10, 20 and 50.
    pub recall: [Option<f64>; DEPTHS.len()],
    /// nDCG at 10.
    pub ndcg_10: Option<f64>,
    /// Mean reciprocal rank.
    pub mrr: Option<f64>,
    /// nDCG at 10 minus that as served, question by question; none for what is served.
    pub against_served: Option<Difference>,
}

/// A mean of paired differences.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The mean.
    pub mean: f64,
    /// Its 95 % interval, normal.
    pub interval: Interval,
}

impl Difference {
    /// Whether all of the interval is on one side, and on which.
    #[must_use]
    pub fn side(&self) -> Option<std::cmp::Ordering> {
        if self.interval.low > 0.0 {
            Some(std::cmp::Ordering::Greater)
        } else if self.interval.high < 0.0 {
            Some(std::cmp::Ordering::Less)
        } else {
            None
        }
    }
}

/// Coverage by so many snippets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CoverageAt {
    /// Snippets.
    pub k: usize,
    /// Mean coverage.
    pub mean: Option<f64>,
    /// Share of the questions covered to 0.70.
    pub covered: Option<f64>,
}

/// The gate on the first stage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FirstStage {
    /// Share of the questions.
    pub value: Option<f64>,
    /// Its 95 % interval (Wilson).
    pub interval: Option<Interval>,
    /// Needed.
    pub needed: f64,
    /// Its status.
    pub status: Status,
}

/// A question whose evidence comes late.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missed {
    /// The item.
    pub id: String,
    /// Place of the first snippet that holds some of it; none among those looked at.
    pub first_at: Option<usize>,
}

/// What one question found, each snippet with its places in both rankings.
struct Found {
    places: Vec<(Option<usize>, Option<usize>)>,
    /// The quotes that each snippet holds something of.
    quotes: Vec<Vec<usize>>,
    n_quotes: usize,
    /// Chunks of the index that hold something of the evidence.
    n_relevant: usize,
    mode: AnchorMode,
}

/// Asks the index every answerable question in every wording.
///
/// # Errors
/// The gold set does not fit the index, or the index failed.
pub fn retrieval_quality(
    gold: &GoldSet,
    index: &dyn Retrieve,
    encoder: &dyn Encode,
    progress: &mut dyn FnMut(Progress),
) -> Result<RetrievalQuality, VerifyError> {
    let items = gold.resolve(index)?;
    let k = index.n_chunks().min(DEEPEST);
    let search = SearchOptions { k, mode: SearchMode::Hybrid, ..SearchOptions::default() };
    let mut positions = Positions::new(encoder, index);
    let (mut questions, mut wordings) = (Vec::new(), Vec::new());
    let mut covered: Vec<[Option<f64>; DEPTHS.len()]> = Vec::new();
    for (n_done, item) in items.iter().enumerate() {
        let n_relevant =
            index.chunks().filter(|chunk| quotes_in(item, chunk).next().is_some()).count();
        let question = &item.item.question;
        let hits = index.search(question, &search)?;
        covered.push(coverage(&mut positions, item, &hits)?);
        questions.push(Found::of(item, &hits, n_relevant));
        for asked in item.item.asked().iter().filter(|asked| *asked != question) {
            wordings.push(Found::of(item, &index.search(asked, &search)?, n_relevant));
        }
        progress(Progress { stage: Stage::Retrieve, n_done: n_done + 1, n_total: items.len() });
    }
    let coverage = coverage_at(&covered);
    let enough = |at: &&CoverageAt| at.covered.is_some_and(|share| share >= COVERED_SHARE);
    let first_stage = first_stage(&questions)?;
    let verdict = match first_stage.status {
        Status::Pass => Verdict::Pass,
        Status::Fail => Verdict::Fail,
        Status::Review
        | Status::Inconclusive
        | Status::NotCalibrated
        | Status::NotAvailable
        | Status::Reported => Verdict::Inconclusive,
    };
    Ok(RetrievalQuality {
        chunks: index.n_chunks(),
        k_needed: coverage.iter().find(enough).map(|at| at.k),
        coverage,
        first_stage,
        missed: missed(&items, &questions),
        questions: asked(&questions)?,
        wordings: asked(&wordings)?,
        verdict,
    })
}

/// The quotes of an item that a chunk holds something of.
fn quotes_in<'a>(item: &'a ResolvedItem, chunk: &'a Chunk) -> impl Iterator<Item = usize> + 'a {
    let range = chunk.span.start..chunk.span.end;
    let spans = item.spans.iter().enumerate();
    spans.filter(move |(_, span)| span.overlaps(&chunk.doc_id, &range)).map(|(at, _)| at)
}

impl Found {
    fn of(item: &ResolvedItem, hits: &[Hit], n_relevant: usize) -> Found {
        Found {
            places: hits.iter().map(|hit| (hit.rank_lexical, hit.rank_vector)).collect(),
            quotes: hits.iter().map(|hit| quotes_in(item, &hit.chunk).collect()).collect(),
            n_quotes: item.spans.len(),
            n_relevant,
            mode: item.item.anchor_mode,
        }
    }

    /// The quotes of each snippet in the order of a weight. What is served keeps the order of the index itself.
    fn ranked(&self, weight: f64) -> Vec<&[usize]> {
        if (weight - SERVED).abs() < f64::EPSILON {
            return self.quotes.iter().map(Vec::as_slice).collect();
        }
        fused(&self.places, weight).into_iter().map(|at| self.quotes[at].as_slice()).collect()
    }

    fn relevant(&self, weight: f64) -> Vec<bool> {
        self.ranked(weight).iter().map(|quotes| !quotes.is_empty()).collect()
    }

    /// Share of the evidence among the first `k`: of its quotes if all are needed, else all or nothing.
    fn recall(&self, weight: f64, k: usize) -> f64 {
        let ranked = self.ranked(weight);
        let held = |quote: usize| ranked.iter().take(k).any(|quotes| quotes.contains(&quote));
        let n_held = (0..self.n_quotes).filter(|&quote| held(quote)).count();
        match self.mode {
            AnchorMode::Any => f64::from(u8::from(n_held > 0)),
            AnchorMode::All => share(n_held, self.n_quotes),
        }
    }
}

fn asked(found: &[Found]) -> Result<Asked, VerifyError> {
    let gains = |weight: f64| -> Vec<f64> {
        let of = |of: &Found| ndcg(&of.relevant(weight), of.n_relevant, 10);
        found.iter().filter_map(of).collect()
    };
    let served = gains(SERVED);
    let mut weights = Vec::with_capacity(WEIGHTS.len());
    for (at, lexical) in WEIGHTS.into_iter().enumerate() {
        let of = |values: Vec<f64>| mean(&values).ok();
        let recall = DEPTHS.map(|k| of(found.iter().map(|of| of.recall(lexical, k)).collect()));
        let gained = gains(lexical);
        let differences: Vec<f64> = gained.iter().zip(&served).map(|(a, b)| a - b).collect();
        weights.push(WeightRow {
            lexical,
            recall,
            ndcg_10: of(gained),
            mrr: of(found.iter().map(|of| reciprocal_rank(&of.relevant(lexical))).collect()),
            against_served: if at == SERVED_AT { None } else { paired(&differences) },
        });
    }
    Ok(Asked { n: found.len(), weights })
}

/// Mean and normal 95 % interval of differences; none of fewer than two.
fn paired(differences: &[f64]) -> Option<Difference> {
    let mean = mean(differences).ok()?;
    let n = differences.len();
    if n < 2 {
        return None;
    }
    let squares: f64 = differences.iter().map(|value| (value - mean).powi(2)).sum();
    let error = (squares / as_f64(n - 1) / as_f64(n)).sqrt();
    let interval = Interval { low: mean - 1.96 * error, high: mean + 1.96 * error };
    Some(Difference { mean, interval })
}

/// Coverage by the first snippets of each depth.
fn coverage(
    positions: &mut Positions<'_>,
    item: &ResolvedItem,
    hits: &[Hit],
) -> Result<[Option<f64>; DEPTHS.len()], VerifyError> {
    let (anchor, sections) = (positions.anchor(item), positions.sections(item));
    let mut found = [None; DEPTHS.len()];
    for (found, k) in found.iter_mut().zip(DEPTHS) {
        let tokens = positions.chunks(hits.iter().take(k).map(|hit| &*hit.chunk))?;
        *found = coverage_of(&anchor, &tokens, &tokens, &sections).value;
    }
    Ok(found)
}

fn coverage_at(covered: &[[Option<f64>; DEPTHS.len()]]) -> Vec<CoverageAt> {
    let at = |(at, k): (usize, usize)| {
        let values: Vec<f64> = covered.iter().filter_map(|of| of[at]).collect();
        let n_covered = values.iter().filter(|&&value| value >= COVERED).count();
        CoverageAt {
            k,
            mean: mean(&values).ok(),
            covered: (!values.is_empty()).then(|| share(n_covered, values.len())),
        }
    };
    DEPTHS.into_iter().enumerate().map(at).collect()
}

fn first_stage(found: &[Found]) -> Result<FirstStage, VerifyError> {
    let n = found.len();
    let n_found = found.iter().filter(|of| of.recall(SERVED, 50) >= 1.0).count();
    let value = (n > 0).then(|| share(n_found, n));
    let interval = if n > 0 { Some(wilson(n_found, n)?) } else { None };
    let status = match (value, interval) {
        (None, _) | (_, None) => Status::NotAvailable,
        (Some(_), Some(interval)) if interval.high < FIRST_STAGE => Status::Fail,
        (Some(value), Some(_)) if value >= FIRST_STAGE && n >= FEWEST => Status::Pass,
        (Some(_), Some(_)) => Status::Inconclusive,
    };
    Ok(FirstStage { value, interval, needed: FIRST_STAGE, status })
}

fn missed(items: &[ResolvedItem], found: &[Found]) -> Vec<Missed> {
    let late = items.iter().zip(found).filter(|(_, of)| of.recall(SERVED, 10) < 1.0);
    let missed = late.map(|(item, of)| Missed {
        id: item.item.id.clone(),
        first_at: of.relevant(SERVED).iter().position(|is| *is).map(|at| at + 1),
    });
    missed.collect()
}

fn share(part: usize, whole: usize) -> f64 {
    as_f64(part) / as_f64(whole.max(1))
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn as_f64(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::{Altered, FakeIndex, corpus, gold_text};

    fn quality(index: &dyn Retrieve) -> RetrievalQuality {
        let (gold, own) = (GoldSet::parse(&gold_text()).unwrap(), corpus());
        retrieval_quality(&gold, index, &*own.encoder, &mut |_| {}).unwrap()
    }

    #[test]
    fn an_index_that_finds_each_fact_first_has_nothing_to_gain() {
        let found = quality(&corpus());
        let served = &found.questions.weights[SERVED_AT];
        assert_eq!((found.questions.n, found.wordings.n), (60, 180));
        assert_eq!(served.recall, [Some(1.0); 5]);
        assert_eq!((served.ndcg_10, served.mrr), (Some(1.0), Some(1.0)));
        assert_eq!((found.k_needed, found.missed.len()), (Some(1), 0));
        assert_eq!((found.first_stage.status, found.verdict), (Status::Pass, Verdict::Pass));
    }

    /// The fact comes behind as many others as its number says, up to 20.
    fn late(index: &FakeIndex, question: &str, options: &SearchOptions) -> Vec<Hit> {
        let mut hits = index.search(question, options).unwrap();
        let number: String = question.chars().filter(char::is_ascii_digit).take(2).collect();
        let place = number.parse::<usize>().unwrap_or(0).min(20).min(hits.len() - 1);
        let first = hits.remove(0);
        hits.insert(place, first);
        hits
    }

    #[test]
    fn evidence_that_comes_late_is_told_by_its_place_and_by_the_snippets_it_takes() {
        let index = corpus();
        let found = quality(&Altered::new(&index, late));
        let served = &found.questions.weights[SERVED_AT];
        assert!(served.recall[0].unwrap() < 0.1 && served.recall[4] == Some(1.0), "{served:?}");
        assert_eq!(found.k_needed, Some(50), "{:?}", found.coverage);
        assert!(found.missed.iter().all(|missed| missed.first_at.is_some_and(|at| at > 10)));
        assert_eq!(found.verdict, Verdict::Pass, "the first stage has it within 50");
    }

    #[test]
    fn evidence_that_is_never_found_fails_the_first_stage() {
        let index = corpus();
        let blind = |index: &FakeIndex, question: &str, options: &SearchOptions| {
            let mut hits = index.search(question, options).unwrap();
            hits.remove(0);
            hits
        };
        let found = quality(&Altered::new(&index, blind));
        assert_eq!((found.first_stage.status, found.verdict), (Status::Fail, Verdict::Fail));
        assert_eq!((found.k_needed, found.missed.len()), (None, 60));
        assert!(found.missed.iter().all(|missed| missed.first_at.is_none()));
    }

    #[test]
    fn a_weight_is_better_only_where_the_differences_say_so() {
        let sure = paired(&[0.2, 0.3, 0.25, 0.2]).unwrap();
        assert_eq!(sure.side(), Some(std::cmp::Ordering::Greater));
        let mixed = paired(&[0.9, -0.9, 0.8, -0.7]).unwrap();
        assert_eq!(mixed.side(), None);
        assert_eq!(paired(&[0.1]), None);
    }
}
