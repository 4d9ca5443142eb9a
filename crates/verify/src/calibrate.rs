//! Fits ΔS to one encoder on one corpus and keeps the result beside the index (§1.1.7).

use std::fs;
use std::io::Write as _;
use std::path::Path;

use exrail_metrics::{Calibration, Family, SetDs, auroc, quantile};
use exrail_retrieval::{Encode, SearchOptions};
use serde::{Deserialize, Serialize};

use crate::ask::evidence_ds;
use crate::encode::{Side, TextVectors};
use crate::error::{CalibrationError, VerifyError};
use crate::evaluate::{Progress, Stage};
use crate::gold::{GoldKind, GoldSet, ResolvedItem};
use crate::system::Retrieve;

/// Format of the stored file; a file of another format is void.
const FORMAT: u32 = 1;

/// The calibration of both probe families, bound to what it was measured on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusCalibration {
    /// Format of the file.
    pub format: u32,
    /// The encoder of the gate.
    pub encoder_fp: String,
    /// The index that was searched.
    pub index_hash: String,
    /// The gold set that was asked.
    pub gold_sha256: String,
    /// How many snippets were retrieved: `ds_min` falls with k.
    pub k: usize,
    /// Question against evidence, on `ds_min` through the live retriever.
    pub qe: FamilyFit,
    /// Text against text, on pairs of questions: paraphrases, other questions on the same page,
    /// off-topic questions.
    pub tt: FamilyFit,
    /// The harder null: answerable questions with their own page taken away.
    pub masked: Option<MaskedNull>,
    /// Questions for which nothing was retrieved, so that they have no ΔS and are in no set.
    pub n_without_evidence: usize,
}

/// A map, or why there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum FamilyFit {
    /// The map, fit or unfit.
    Fitted(Calibration),
    /// There is none.
    NotCalibrated {
        /// Why.
        reason: String,
    },
}

impl FamilyFit {
    /// The map, fit or unfit.
    #[must_use]
    pub fn calibration(&self) -> Option<&Calibration> {
        match self {
            FamilyFit::Fitted(calibration) => Some(calibration),
            FamilyFit::NotCalibrated { .. } => None,
        }
    }

    /// The map, if it may gate.
    #[must_use]
    pub fn fit_calibration(&self) -> Option<&Calibration> {
        self.calibration().filter(|calibration| calibration.is_fit())
    }
}

/// How well ΔS tells a question with its page from the same question without it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MaskedNull {
    /// Probability that the question with its page is nearer.
    pub auroc: f64,
    /// 5th percentile of raw ΔS without the page: what `t_pass` would be on this null.
    pub t_pass: f64,
    /// Number of questions.
    pub n: usize,
}

impl CorpusCalibration {
    /// Reads a stored calibration.
    ///
    /// # Errors
    /// The file cannot be read or is none.
    pub fn load(path: &Path) -> Result<CorpusCalibration, CalibrationError> {
        let text = fs::read(path)
            .map_err(|source| CalibrationError::Io { path: path.to_owned(), source })?;
        serde_json::from_slice(&text)
            .map_err(|source| CalibrationError::Json { path: path.to_owned(), source })
    }

    /// Stores the calibration: written beside the target, synced, then renamed, so that a full
    /// disk leaves the old file whole.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), CalibrationError> {
        let json = serde_json::to_vec_pretty(self)
            .map_err(|source| CalibrationError::Json { path: path.to_owned(), source })?;
        let partial = path.with_extension("partial");
        let written = fs::File::create(&partial)
            .and_then(|mut file| file.write_all(&json).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&partial, path));
        written.map_err(|source| {
            // Best effort: the write error is what the caller needs to see.
            let _ignored = fs::remove_file(&partial);
            CalibrationError::Io { path: path.to_owned(), source }
        })
    }

    /// Whether this calibration holds for an encoder, an index, and a number of snippets.
    ///
    /// # Errors
    /// [`CalibrationError::Void`] with the first thing that changed.
    pub fn check(
        &self,
        encoder_fp: &str,
        index_hash: &str,
        k: usize,
    ) -> Result<(), CalibrationError> {
        let pairs = [
            ("format", self.format.to_string(), FORMAT.to_string()),
            ("encoder_fp", self.encoder_fp.clone(), encoder_fp.to_owned()),
            ("index_hash", self.index_hash.clone(), index_hash.to_owned()),
            ("k", self.k.to_string(), k.to_string()),
        ];
        for (field, expected, found) in pairs {
            if expected != found {
                return Err(CalibrationError::Void { field, expected, found });
            }
        }
        Ok(())
    }
}

/// Measures both maps. `search` is the search of production, without masked documents.
///
/// # Errors
/// The gold set does not fit the index, or the index or the encoder failed. Sets that are too
/// small are no error: the family is not calibrated, and says why.
pub fn calibrate(
    gold: &GoldSet,
    index: &dyn Retrieve,
    encoder: &dyn Encode,
    search: &SearchOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<CorpusCalibration, VerifyError> {
    let answerable = gold.resolve(index)?;
    let mut sets = LiveSets { index, search, progress, n_without_evidence: 0 };
    let a =
        sets.ds_min(answerable.iter().map(|resolved| (&*resolved.item.question, Vec::new())))?;
    let masked =
        sets.ds_min(answerable.iter().map(|item| (&*item.item.question, item.doc_ids())))?;
    let of_kind = |kind| gold.of_kind(kind).map(|item| (&*item.question, Vec::new()));
    let u = sets.ds_min(of_kind(GoldKind::Unanswerable))?;
    let o = sets.ds_min(of_kind(GoldKind::OffTopic))?;
    let n_without_evidence = sets.n_without_evidence;
    let masked = if a.is_empty() || masked.is_empty() {
        None
    } else {
        let (auroc, t_pass) = (auroc(&a, &masked)?, quantile(&masked, 0.05)?);
        Some(MaskedNull { auroc, t_pass, n: masked.len() })
    };
    Ok(CorpusCalibration {
        format: FORMAT,
        encoder_fp: encoder.fingerprint().to_owned(),
        index_hash: index.index_hash().to_owned(),
        gold_sha256: gold.sha256().to_owned(),
        k: search.k,
        qe: fit(Family::QuestionEvidence, &a, &u, &o),
        tt: text_pairs(gold, &answerable, encoder)?,
        masked,
        n_without_evidence,
    })
}

fn fit(family: Family, a: &[f64], u: &[f64], o: &[f64]) -> FamilyFit {
    match Calibration::fit(family, a, u, o) {
        Ok(calibration) => FamilyFit::Fitted(calibration),
        Err(error) => FamilyFit::NotCalibrated { reason: error.to_string() },
    }
}

pub(crate) struct LiveSets<'a> {
    pub(crate) index: &'a dyn Retrieve,
    pub(crate) search: &'a SearchOptions,
    pub(crate) progress: &'a mut dyn FnMut(Progress),
    pub(crate) n_without_evidence: usize,
}

impl LiveSets<'_> {
    /// Raw `ds_min` of each question with its masked documents; questions without evidence are
    /// counted and left out.
    pub(crate) fn ds_min<'q>(
        &mut self,
        questions: impl Iterator<Item = (&'q str, Vec<String>)>,
    ) -> Result<Vec<f64>, VerifyError> {
        let questions: Vec<_> = questions.collect();
        let n_total = questions.len();
        let mut values = Vec::with_capacity(n_total);
        for (n_done, (question, mask_docs)) in questions.into_iter().enumerate() {
            let options = SearchOptions { mask_docs, ..self.search.clone() };
            match evidence_ds(&self.index.search(question, &options)?) {
                SetDs::Values { min, .. } => values.push(min),
                SetDs::NoEvidence | SetDs::Undefined(_) => self.n_without_evidence += 1,
            }
            (self.progress)(Progress { stage: Stage::Calibrate, n_done: n_done + 1, n_total });
        }
        Ok(values)
    }
}

/// The text↔text map from the questions themselves: a question and its paraphrases say the same,
/// two questions on one page share the topic only, an off-topic question shares nothing.
fn text_pairs(
    gold: &GoldSet,
    answerable: &[ResolvedItem],
    encoder: &dyn Encode,
) -> Result<FamilyFit, VerifyError> {
    let [a, u, o] = text_pair_sets(gold, answerable, encoder)?;
    Ok(fit(Family::TextText, &a, &u, &o))
}

/// Raw ΔS of those pairs: the same in other words, the same page, off topic.
pub(crate) fn text_pair_sets(
    gold: &GoldSet,
    answerable: &[ResolvedItem],
    encoder: &dyn Encode,
) -> Result<[Vec<f64>; 3], VerifyError> {
    let mut vectors = TextVectors::new(encoder);
    let (mut a, mut u, mut o) = (Vec::new(), Vec::new(), Vec::new());
    let mut add = |set: &mut Vec<f64>, x: &str, y: &str| -> Result<(), VerifyError> {
        set.extend(vectors.ds((Side::Query, x), (Side::Query, y))?.value());
        Ok(())
    };
    for (index, resolved) in answerable.iter().enumerate() {
        let question = &resolved.item.question;
        for paraphrase in &resolved.item.paraphrases {
            add(&mut a, question, paraphrase)?;
        }
        let docs = resolved.doc_ids();
        for other in answerable[index + 1..].iter().filter(|other| other.doc_ids() == docs) {
            add(&mut u, question, &other.item.question)?;
        }
    }
    for (item, off_topic) in answerable.iter().cycle().zip(gold.of_kind(GoldKind::OffTopic)) {
        add(&mut o, &item.item.question, &off_topic.question)?;
    }
    Ok([a, u, o])
}
