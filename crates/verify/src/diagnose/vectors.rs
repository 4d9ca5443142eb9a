//! Whether ΔS can have been moved by anything but question and corpus (§1.1.11).
//!
//! ΔS of a question and a snippet does not contain the generator's weights. Three ways are left by which a change of
//! the system can move it: vectors that are not those of this encoder, questions that the generator rewrites, and
//! chunks that were cut by another tokenizer. The first and the last are measured here on every snippet that the gold
//! set retrieves; exrail asks the index with the user's own words, so there is no rewriting. A vector may also be right and
//! its text wrong: every chunk is compared with the document that it names.

use std::collections::BTreeSet;

use exrail_metrics::Ds;
use exrail_retrieval::{Encode, SearchOptions, prepare};
use serde::Serialize;

use crate::encode::{Side, TextVectors};
use crate::error::VerifyError;
use crate::evaluate::{Progress, Stage};
use crate::gold::{GoldKind, GoldSet};
use crate::system::Retrieve;

/// Difference of raw ΔS from which a stored vector is another encoder's. Two computations of one vector differ by
/// 1e-6; two encoders by about 1.
const TOLERANCE: f64 = 0.01;

/// What one question found, to the bit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RetrievedBits {
    /// The item.
    pub id: String,
    /// Snippets by rank, each with the bits of its cosine.
    pub snippets: Vec<(String, u32)>,
}

/// The stored vectors and chunks against the encoder that asks.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VectorCheck {
    /// Pairs of question and snippet whose ΔS was computed anew from the texts.
    pub pairs: usize,
    /// Pairs whose ΔS is not that of the stored vector.
    pub pairs_differ: usize,
    /// Largest difference of raw ΔS.
    pub max_difference: f64,
    /// Snippets whose tokens were counted anew.
    pub chunks: usize,
    /// Snippets with another count, or another tokenizer's hash.
    pub chunks_differ: usize,
    /// Chunks of the index whose text was compared with the document that they name.
    pub texts: usize,
    /// Chunks that say something else than their document does there, or whose document is not there.
    pub texts_differ: usize,
    /// What was compared.
    #[serde(skip)]
    pub observed: VectorObservations,
}

/// What a [`VectorCheck`] counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VectorObservations {
    /// Raw ΔS of each pair: of the stored vector, and computed anew.
    pub pairs: Vec<(f64, f64)>,
    /// Tokens of each snippet: stored, counted anew, and whether the tokenizer's hash is another one.
    pub counts: Vec<(usize, usize, bool)>,
    /// Whether each chunk's text is that of its document.
    pub texts: Vec<bool>,
}

impl VectorCheck {
    fn add_pair(&mut self, stored: f64, anew: f64) {
        let difference = (stored - anew).abs();
        self.pairs += 1;
        self.pairs_differ += usize::from(difference > TOLERANCE);
        self.max_difference = self.max_difference.max(difference);
        self.observed.pairs.push((stored, anew));
    }

    /// Compares every chunk with what its document says at its place.
    fn add_texts(&mut self, index: &dyn Retrieve) -> Result<(), VerifyError> {
        for chunk in index.chunks() {
            let document = index.document(&chunk.doc_id)?;
            let said =
                document.as_ref().and_then(|of| of.text.get(chunk.span.start..chunk.span.end));
            let is_same = said == Some(&*chunk.text);
            self.texts += 1;
            self.texts_differ += usize::from(!is_same);
            self.observed.texts.push(is_same);
        }
        Ok(())
    }

    fn add_count(&mut self, stored: usize, counted: usize, is_other: bool) {
        self.chunks += 1;
        self.chunks_differ += usize::from(stored != counted || is_other);
        self.observed.counts.push((stored, counted, is_other));
    }
}

/// Each answerable question's snippets, to compare with those of another time.
///
/// # Errors
/// The index failed.
pub fn retrieved_bits(
    gold: &GoldSet,
    index: &dyn Retrieve,
    search: &SearchOptions,
) -> Result<Vec<RetrievedBits>, VerifyError> {
    let items = gold.of_kind(GoldKind::Answerable);
    let bits = items.map(|item| {
        let hits = index.search(&item.question, search)?;
        let bits = hits.iter().map(|hit| (hit.chunk.snippet_id.clone(), hit.cosine.to_bits()));
        Ok(RetrievedBits { id: item.id.clone(), snippets: bits.collect() })
    });
    bits.collect()
}

/// Encodes what the answerable questions retrieve once more, and compares.
///
/// # Errors
/// The index or the encoder failed.
pub fn check_vectors(
    gold: &GoldSet,
    index: &dyn Retrieve,
    encoder: &dyn Encode,
    search: &SearchOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<VectorCheck, VerifyError> {
    let tokenizer = encoder.facts().tokenizer_fp;
    let mut vectors = TextVectors::new(encoder);
    let mut check = VectorCheck::default();
    check.add_texts(index)?;
    let mut seen = BTreeSet::new();
    let n_total = gold.of_kind(GoldKind::Answerable).count();
    for (n_done, item) in gold.of_kind(GoldKind::Answerable).enumerate() {
        for hit in index.search(&item.question, search)? {
            let pair = ((Side::Query, &*item.question), (Side::Passage, &*hit.chunk.text));
            if let Ds::Value(anew) = vectors.ds(pair.0, pair.1)? {
                check.add_pair(1.0 - f64::from(hit.cosine), anew);
            }
            if seen.insert(hit.chunk.snippet_id.clone()) {
                let hash = &hit.chunk.tokenizer.hash;
                let is_other = !hash.is_empty() && *hash != tokenizer;
                let counted = encoder.tokenize(&prepare(&hit.chunk.text)).len();
                check.add_count(hit.chunk.tokens, counted, is_other);
            }
        }
        progress(Progress { stage: Stage::Encode, n_done: n_done + 1, n_total });
    }
    Ok(check)
}

/// What moved ΔS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SpikeCause {
    /// The index holds vectors of another encoder.
    Encoder,
    /// The generator rewrites questions.
    Rewrite,
    /// Chunks were cut by another tokenizer.
    Tokenizer,
    /// ΔS of questions is as it was: what changed are answers.
    Answers,
    /// None of these: question and corpus are that far apart for this encoder, whatever the weights are.
    Corpus,
}

/// §1.1.11: to what a high ΔS, or the failure of answers, is attributed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SpikeAttribution {
    /// The cause.
    pub cause: SpikeCause,
    /// What was measured.
    pub evidence: String,
}

/// Attributes a spike of ΔS, or failed answers; nothing where neither is there. Whether ΔS spikes is for the caller to
/// say; none where there is no scale to say it on.
#[must_use]
pub fn attribute_spike(
    check: &VectorCheck,
    has_spike: Option<bool>,
    answers_fail: bool,
) -> Option<SpikeAttribution> {
    let VectorCheck { pairs, pairs_differ, max_difference, chunks, chunks_differ, .. } = check;
    let (cause, evidence) = if *pairs_differ > 0 {
        let evidence = format!(
            "{pairs_differ} of {pairs} retrieved vectors are not this encoder's: ΔS off by up to {max_difference:.3}"
        );
        (SpikeCause::Encoder, evidence)
    } else if *chunks_differ > 0 {
        let evidence = format!(
            "{chunks_differ} of {chunks} retrieved chunks have other token counts or another tokenizer"
        );
        (SpikeCause::Tokenizer, evidence)
    } else if has_spike == Some(true) {
        let evidence = format!(
            "{pairs} vectors and {chunks} token counts are this encoder's, and questions are not rewritten"
        );
        (SpikeCause::Corpus, evidence)
    } else if answers_fail {
        let evidence = match has_spike {
            Some(_) => "ΔS of the questions is as the scale expects it",
            None => "nothing that ΔS depends on is wrong; it is on no scale",
        };
        (SpikeCause::Answers, evidence.to_owned())
    } else {
        return None;
    };
    Some(SpikeAttribution { cause, evidence })
}
