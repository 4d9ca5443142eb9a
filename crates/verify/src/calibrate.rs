//! Fits ΔS to one encoder on one corpus and keeps the result beside the index (§1.1.7).

use std::fmt;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use exrail_metrics::{Calibration, Family, SetDs, auroc, median, quantile};
use exrail_retrieval::{Encode, SearchOptions};
use serde::{Deserialize, Serialize};

use crate::ask::evidence_ds;
use crate::encode::{Side, TextVectors};
use crate::error::{CalibrationError, VerifyError};
use crate::evaluate::{Progress, Stage};
use crate::gold::{GoldItem, GoldKind, GoldSet, ResolvedItem};
use crate::held_out::{HeldOut, Sets, held_out};
use crate::lexical::LexicalEvidence;
use crate::system::Retrieve;

/// Format of the stored file; a file of another format is void.
const FORMAT: u32 = 2;

/// Weight of ΔS in the joint signal. Chosen on the sample corpus, see `docs/calibration.md`; words
/// weigh less because another wording of a question has other words and the same meaning [N].
const DS_WEIGHT: f64 = 0.75;

/// The calibration of both probe families and of the second signals, bound to what it was measured on.
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
    /// ΔS of question against evidence on questions that its thresholds have not seen.
    pub held_out: Option<HeldOut>,
    /// The words of the question in the evidence ([`LexicalEvidence`]), by the same rule.
    pub lexical: SignalFit,
    /// ΔS and words together, by the same rule.
    pub joint: SignalFit,
    /// What makes ΔS and words comparable; none where an off-topic median is 0.
    pub joint_scale: Option<JointScale>,
    /// Questions for which nothing was retrieved or that have no content word, so that they have
    /// no value and are in no set.
    pub n_without_evidence: usize,
}

/// A signal that may decide whether the evidence answers a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Signal {
    /// ΔS by the encoder.
    Encoder,
    /// Words, without the encoder.
    Lexical,
    /// Both together.
    Joint,
}

impl fmt::Display for Signal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Signal::Encoder => "encoder",
            Signal::Lexical => "lexical",
            Signal::Joint => "joint",
        })
    }
}

/// What is known of a signal beside the encoder's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalFit {
    /// Its map.
    pub map: FamilyFit,
    /// The harder null.
    pub masked: Option<MaskedNull>,
    /// Its errors on questions that its thresholds have not seen.
    pub held_out: Option<HeldOut>,
}

/// Medians of the off-topic questions: a value as large as this says nothing of the question.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JointScale {
    /// Of raw `ds_min`.
    pub ds: f64,
    /// Of the lexical signal.
    pub lexical: f64,
}

impl JointScale {
    /// The scale of off-topic questions, each with its `ds_min` and its lexical value.
    fn of(off_topic: &[Reading]) -> Option<JointScale> {
        let of = |value: fn(&Reading) -> f64| {
            median(&off_topic.iter().map(value).collect::<Vec<_>>()).ok().filter(|it| *it > 0.0)
        };
        Some(JointScale { ds: of(|it| it.ds)?, lexical: of(|it| it.lexical)? })
    }

    /// `¾ ds / median off topic + ¼ ls / median off topic`, in [0, 2]: about 1 is off topic.
    #[must_use]
    pub fn joint(&self, ds: f64, lexical: f64) -> f64 {
        let (ds, lexical) = (ds / self.ds, lexical / self.lexical);
        (DS_WEIGHT * ds + (1.0 - DS_WEIGHT) * lexical).clamp(0.0, 2.0)
    }
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
    /// The file cannot be read or is none, or it is void because another version wrote it.
    pub fn load(path: &Path) -> Result<CorpusCalibration, CalibrationError> {
        let text = fs::read(path)
            .map_err(|source| CalibrationError::Io { path: path.to_owned(), source })?;
        let broken = |source| CalibrationError::Json { path: path.to_owned(), source };
        let written: Written = serde_json::from_slice(&text).map_err(broken)?;
        differs("format", &written.format, &FORMAT)?;
        serde_json::from_slice(&text).map_err(broken)
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
        differs("format", &self.format, &FORMAT)?;
        differs("encoder_fp", &self.encoder_fp.as_str(), &encoder_fp)?;
        differs("index_hash", &self.index_hash.as_str(), &index_hash)?;
        differs("k", &self.k, &k)
    }

    /// Whether this calibration was fitted on a gold set.
    ///
    /// # Errors
    /// [`CalibrationError::Void`] if it was fitted on another.
    pub fn check_gold(&self, gold: &GoldSet) -> Result<(), CalibrationError> {
        differs("gold_sha256", &self.gold_sha256.as_str(), &gold.sha256())
    }

    /// The signal that decides. Of the encoder, the words and both together, in this order: the
    /// first that is fit and holds on held-out questions; else the first that is fit; else none.
    #[must_use]
    pub fn deciding(&self) -> Option<Signal> {
        let signals = [Signal::Encoder, Signal::Lexical, Signal::Joint];
        let fit = |signal: &Signal| self.map(*signal).fit_calibration().is_some();
        let holds = |signal: &Signal| self.held_out(*signal).is_some_and(HeldOut::holds);
        let proven = signals.into_iter().find(|signal| fit(signal) && holds(signal));
        proven.or_else(|| signals.into_iter().find(fit))
    }

    /// The map of a signal.
    #[must_use]
    pub fn map(&self, signal: Signal) -> &FamilyFit {
        match signal {
            Signal::Encoder => &self.qe,
            Signal::Lexical => &self.lexical.map,
            Signal::Joint => &self.joint.map,
        }
    }

    /// The errors of a signal on questions that its thresholds have not seen.
    #[must_use]
    pub fn held_out(&self, signal: Signal) -> Option<&HeldOut> {
        match signal {
            Signal::Encoder => self.held_out.as_ref(),
            Signal::Lexical => self.lexical.held_out.as_ref(),
            Signal::Joint => self.joint.held_out.as_ref(),
        }
    }

    /// How a signal tells a question with its page from the same without it.
    #[must_use]
    pub fn masked(&self, signal: Signal) -> Option<&MaskedNull> {
        match signal {
            Signal::Encoder => self.masked.as_ref(),
            Signal::Lexical => self.lexical.masked.as_ref(),
            Signal::Joint => self.joint.masked.as_ref(),
        }
    }
}

/// What every version of the file says.
#[derive(Deserialize)]
struct Written {
    format: u32,
}

fn differs<T: PartialEq + fmt::Display>(
    field: &'static str,
    expected: &T,
    found: &T,
) -> Result<(), CalibrationError> {
    if expected == found {
        return Ok(());
    }
    let (expected, found) = (expected.to_string(), found.to_string());
    Err(CalibrationError::Void { field, expected, found })
}

/// Measures the maps. `search` is the search of production, without masked documents.
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
    let lexical = LexicalEvidence::of(index)?;
    let mut live = LiveSets { index, lexical, search, progress, n_without_evidence: 0 };
    let a = live.read(answerable.iter().map(|it| Question::of(&it.item)))?;
    let masked = live.read(answerable.iter().map(Question::without_page))?;
    let worded = live.read(answerable.iter().flat_map(|it| Question::worded(&it.item)))?;
    let of_kind = |kind| gold.of_kind(kind).map(Question::of);
    let u = live.read(of_kind(GoldKind::Unanswerable))?;
    let o = live.read(of_kind(GoldKind::OffTopic))?;
    let n_without_evidence = live.n_without_evidence;
    let sets =
        Sets { answerable: &a, masked: &masked, worded: &worded, unanswerable: &u, off_topic: &o };
    let qe = fit_signal(Family::QuestionEvidence, &sets, &|_, it| Some(it.ds))?;
    let joint = |off_topic: &[Reading], it: Reading| {
        Some(JointScale::of(off_topic)?.joint(it.ds, it.lexical))
    };
    Ok(CorpusCalibration {
        format: FORMAT,
        encoder_fp: encoder.fingerprint().to_owned(),
        index_hash: index.index_hash().to_owned(),
        gold_sha256: gold.sha256().to_owned(),
        k: search.k,
        qe: qe.map,
        tt: text_pairs(gold, &answerable, encoder)?,
        masked: qe.masked,
        held_out: qe.held_out,
        lexical: fit_signal(Family::Lexical, &sets, &|_, it| Some(it.lexical))?,
        joint: fit_signal(Family::Joint, &sets, &joint)?,
        joint_scale: JointScale::of(&readings(&o)),
        n_without_evidence,
    })
}

/// One question to the index.
pub(crate) struct Question<'a> {
    /// Of the item.
    id: &'a str,
    text: &'a str,
    mask_docs: Vec<String>,
}

impl<'a> Question<'a> {
    pub(crate) fn of(item: &'a GoldItem) -> Question<'a> {
        Question { id: &item.id, text: &item.question, mask_docs: Vec::new() }
    }

    pub(crate) fn without_page(resolved: &'a ResolvedItem) -> Question<'a> {
        Question { mask_docs: resolved.doc_ids(), ..Question::of(&resolved.item) }
    }

    pub(crate) fn worded(item: &'a GoldItem) -> impl Iterator<Item = Question<'a>> {
        item.paraphrases.iter().map(|text| Question { text, ..Question::of(item) })
    }
}

/// What is read of one question and its evidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Reading {
    /// Raw `ds_min`.
    pub(crate) ds: f64,
    /// [`LexicalEvidence::stress`].
    pub(crate) lexical: f64,
}

fn readings(set: &[(&str, Reading)]) -> Vec<Reading> {
    set.iter().map(|(_, reading)| *reading).collect()
}

/// Fits one signal. `value` makes its number of a reading, given the off-topic readings that it may
/// learn from: all of them for the map, those of the fitted half for the held-out errors.
fn fit_signal(
    family: Family,
    sets: &Sets<'_, Reading>,
    value: &dyn Fn(&[Reading], Reading) -> Option<f64>,
) -> Result<SignalFit, VerifyError> {
    let off_topic = readings(sets.off_topic);
    let all = |set: &[(&str, Reading)]| -> Option<Vec<f64>> {
        set.iter().map(|(_, reading)| value(&off_topic, *reading)).collect()
    };
    let sides = [sets.answerable, sets.unanswerable, sets.off_topic, sets.masked].map(all);
    let [Some(a), Some(u), Some(o), Some(masked)] = sides else {
        let reason = "off-topic questions have no distance, so ΔS and words have no common scale";
        let map = FamilyFit::NotCalibrated { reason: reason.to_owned() };
        return Ok(SignalFit { map, masked: None, held_out: None });
    };
    let masked = if a.is_empty() || masked.is_empty() {
        None
    } else {
        let (auroc, t_pass) = (auroc(&a, &masked)?, quantile(&masked, 0.05)?);
        Some(MaskedNull { auroc, t_pass, n: masked.len() })
    };
    Ok(SignalFit { map: fit(family, &a, &u, &o), masked, held_out: held_out(sets, value)? })
}

fn fit(family: Family, a: &[f64], u: &[f64], o: &[f64]) -> FamilyFit {
    match Calibration::fit(family, a, u, o) {
        Ok(calibration) => FamilyFit::Fitted(calibration),
        Err(error) => FamilyFit::NotCalibrated { reason: error.to_string() },
    }
}

pub(crate) struct LiveSets<'a> {
    pub(crate) index: &'a dyn Retrieve,
    pub(crate) lexical: LexicalEvidence,
    pub(crate) search: &'a SearchOptions,
    pub(crate) progress: &'a mut dyn FnMut(Progress),
    pub(crate) n_without_evidence: usize,
}

impl LiveSets<'_> {
    /// Reads each question; questions without a value are counted and left out.
    pub(crate) fn read<'q>(
        &mut self,
        questions: impl Iterator<Item = Question<'q>>,
    ) -> Result<Vec<(&'q str, Reading)>, VerifyError> {
        let questions: Vec<_> = questions.collect();
        let n_total = questions.len();
        let mut values = Vec::with_capacity(n_total);
        for (n_done, Question { id, text, mask_docs }) in questions.into_iter().enumerate() {
            let options = SearchOptions { mask_docs, ..self.search.clone() };
            let hits = self.index.search(text, &options)?;
            let ds = match evidence_ds(&hits) {
                SetDs::Values { min, .. } => Some(min),
                SetDs::NoEvidence | SetDs::Undefined(_) => None,
            };
            match (ds, self.lexical.stress(text, &hits)) {
                (Some(ds), Some(lexical)) => values.push((id, Reading { ds, lexical })),
                (_, None) | (None, _) => self.n_without_evidence += 1,
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
