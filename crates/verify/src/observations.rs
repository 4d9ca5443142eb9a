//! What the numbers of a report were computed from: every distance, token position, citation and flag, so that a
//! program that knows nothing of this one can compute the report again.

use exrail_metrics::TokenSet;
use exrail_retrieval::{Hit, SearchOptions};
use serde::Serialize;

use crate::calibrate::{LiveSets, Question, Reading, text_pair_sets};
use crate::error::VerifyError;
use crate::evaluate::{Progress, holds_evidence};
use crate::gold::{AnchorMode, GoldKind, GoldSet, ResolvedItem};
use crate::lexical::LexicalEvidence;
use crate::runs::FrozenRuns;
use crate::system::Retrieve;

/// Token positions as stretches: number of the document, first token, token behind the last.
pub type Stretches = Vec<(usize, usize, usize)>;

/// What [`crate::verify`] observed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Observations {
    /// Answerable questions through retrieval.
    pub retrieval: Vec<RetrievalObservation>,
    /// All answerable questions at each k of the sweep.
    pub sweep: Vec<SweepObservation>,
    /// Answered questions.
    pub answers: Vec<AnswerObservation>,
    /// Unanswerable questions that were asked.
    pub refusals: Vec<RefusalObservation>,
    /// The runs of λ over frozen evidence; [`crate::ItemLambda`] says what came of them.
    #[serde(skip)]
    pub frozen: FrozenRuns,
}

/// A retrieved snippet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChunkObservation {
    /// The snippet.
    pub snippet_id: String,
    /// 1 − cosine, in [0, 2].
    pub ds_raw: f64,
    /// Its tokens.
    pub tokens: usize,
    /// Whether it overlaps the evidence of the item.
    pub evidence: bool,
}

/// One answerable question through retrieval.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RetrievalObservation {
    /// The item.
    pub id: String,
    /// What entered the prompt, by rank.
    pub chunks: Vec<ChunkObservation>,
    /// The first 20, by rank; empty without a scale, since no margin is taken then.
    pub first_20: Vec<ChunkObservation>,
    /// For each quote raw ΔS of the nearest retrieved snippet; empty without a scale.
    pub ra_raw: Vec<f64>,
    /// Whether all quotes are needed.
    pub anchor_mode: AnchorMode,
    /// Positions of the evidence: all quotes together, or one after the other where any is enough.
    pub anchor: Vec<Stretches>,
    /// Positions of what was retrieved.
    pub retrieved: Stretches,
    /// Positions of the sections that hold the evidence.
    pub sections: Stretches,
}

/// One answerable question at one k.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SweepObservation {
    /// The item.
    pub id: String,
    /// Snippets that were asked for.
    pub k: usize,
    /// What was found, by rank.
    pub chunks: Vec<ChunkObservation>,
}

/// One answered question.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AnswerObservation {
    /// The item.
    pub id: String,
    /// Whether the user got a refusal, or nothing.
    pub refused: bool,
    /// Snippets that the answer cites, and whether each overlaps the evidence.
    pub cited: Vec<CitedObservation>,
    /// Whether the answer names a source that was not in the prompt.
    pub unknown_citation: bool,
    /// Share of the sentences that the model cites itself; none for a refusal.
    pub model_cited_share: Option<f64>,
    /// Positions of the evidence, as in [`RetrievalObservation::anchor`].
    pub anchor: Vec<Stretches>,
    /// Positions of the cited snippets.
    pub cited_positions: Stretches,
    /// Whether the answer holds a reference answer.
    pub matches_gold: bool,
}

/// A citation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CitedObservation {
    /// The snippet.
    pub snippet_id: String,
    /// Whether it overlaps the evidence.
    pub evidence: bool,
}

/// One unanswerable question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RefusalObservation {
    /// The item.
    pub id: String,
    /// Whether the user got a refusal.
    pub refused: bool,
    /// Whether the text names a source that was not in the prompt.
    pub unknown_citation: bool,
}

/// What is read of one question and its evidence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReadingObservation {
    /// The item.
    pub id: String,
    /// Raw `ds_min`.
    pub ds: f64,
    /// What the evidence lacks of the question's words ([`LexicalEvidence::stress`]).
    pub lexical: f64,
}

/// What the signals of the gate are fitted to and judged by.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ScaleObservation {
    /// Answerable questions.
    pub answerable: Vec<ReadingObservation>,
    /// Questions that the corpus cannot answer.
    pub unanswerable: Vec<ReadingObservation>,
    /// Questions about something else.
    pub off_topic: Vec<ReadingObservation>,
    /// Answerable questions without their own page.
    pub masked: Vec<ReadingObservation>,
    /// Answerable questions in other words.
    pub worded: Vec<ReadingObservation>,
    /// Raw ΔS of pairs of questions: the same in other words, another on the same page, off topic.
    pub pairs: [Vec<f64>; 3],
}

/// Observes anew what [`crate::calibrate`] fits, for a report that shows the sets and not their quantiles alone.
///
/// # Errors
/// The gold set does not fit the index, or the index or the encoder failed.
pub fn observe_scale(
    gold: &GoldSet,
    index: &dyn Retrieve,
    encoder: &dyn exrail_retrieval::Encode,
    search: &SearchOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<ScaleObservation, VerifyError> {
    let resolved = gold.resolve(index)?;
    let lexical = LexicalEvidence::of(index)?;
    let mut sets = LiveSets { index, lexical, search, progress, n_without_evidence: 0 };
    let mut read = |questions: Vec<Question<'_>>| -> Result<Vec<ReadingObservation>, VerifyError> {
        let read = sets.read(questions.into_iter())?.into_iter();
        let observed = |(id, Reading { ds, lexical }): (&str, Reading)| ReadingObservation {
            id: id.to_owned(),
            ds,
            lexical,
        };
        Ok(read.map(observed).collect())
    };
    let of_kind = |kind| gold.of_kind(kind).map(Question::of).collect();
    Ok(ScaleObservation {
        answerable: read(of_kind(GoldKind::Answerable))?,
        unanswerable: read(of_kind(GoldKind::Unanswerable))?,
        off_topic: read(of_kind(GoldKind::OffTopic))?,
        masked: read(resolved.iter().map(Question::without_page).collect())?,
        worded: read(resolved.iter().flat_map(|it| Question::worded(&it.item)).collect())?,
        pairs: text_pair_sets(gold, &resolved, encoder)?,
    })
}

pub(crate) fn chunks_of(item: &ResolvedItem, hits: &[Hit]) -> Vec<ChunkObservation> {
    let chunk = |hit: &Hit| ChunkObservation {
        snippet_id: hit.chunk.snippet_id.clone(),
        ds_raw: (1.0 - f64::from(hit.cosine)).clamp(0.0, 2.0),
        tokens: hit.chunk.tokens,
        evidence: holds_evidence(item, hit),
    };
    hits.iter().map(chunk).collect()
}

pub(crate) fn anchor_of(anchor: &exrail_metrics::Anchor) -> Vec<Stretches> {
    match anchor {
        exrail_metrics::Anchor::All(set) => vec![set.runs()],
        exrail_metrics::Anchor::Any(sets) => sets.iter().map(TokenSet::runs).collect(),
    }
}
