//! The gate in front of the generator: one signal decides, and a refusal names it (§1.1.7, G-06).
//!
//! ΔS decides where it is fit. Where it is not, or does not hold on questions that its thresholds
//! have not seen, the words of the question decide, or both together, if they do better; see
//! [`CorpusCalibration::deciding`].

use std::sync::Arc;

use exrail_metrics::{Band, Calibration};
use exrail_retrieval::Hit;

use crate::ask::{DeltaSGate, GateReading, RefusalReason, evidence_ds};
use crate::calibrate::{CorpusCalibration, JointScale, Signal};
use crate::error::VerifyError;
use crate::held_out::{HeldOut, MAX_ERROR, Rate};
use crate::lexical::LexicalEvidence;
use crate::report::{Gate, Measured, Status, Unit};
use crate::system::Retrieve;

/// What decides whether the generator may answer.
#[derive(Clone, Debug, PartialEq)]
pub struct EvidenceGate {
    delta_s: DeltaSGate,
    second: Option<SecondSignal>,
    /// How many snippets its thresholds were fitted on. Among more there is a nearer one for any
    /// question, so that the same thresholds would let more in.
    k: usize,
}

/// A signal that decides in place of ΔS.
#[derive(Clone, Debug, PartialEq)]
struct SecondSignal {
    map: Calibration,
    /// None: words alone.
    joint: Option<JointScale>,
    /// The words of the whole index; shared, because it is as large as its vocabulary.
    lexical: Arc<LexicalEvidence>,
}

impl EvidenceGate {
    /// The gate that a calibration allows on the index that it was made for.
    ///
    /// # Errors
    /// The index failed.
    pub fn new(
        calibration: Option<&CorpusCalibration>,
        index: &dyn Retrieve,
    ) -> Result<EvidenceGate, VerifyError> {
        let Some(calibration) = calibration else { return Ok(EvidenceGate::not_calibrated()) };
        let delta_s = DeltaSGate::from_calibration(calibration.qe.calibration());
        let k = calibration.k;
        let (signal, joint) = match (calibration.deciding(), calibration.joint_scale) {
            (Some(Signal::Lexical), _) => (Signal::Lexical, None),
            (Some(Signal::Joint), Some(scale)) => (Signal::Joint, Some(scale)),
            (None | Some(Signal::Encoder), _) | (Some(Signal::Joint), None) => {
                return Ok(EvidenceGate { delta_s, second: None, k });
            }
        };
        let Some(map) = calibration.map(signal).fit_calibration().cloned() else {
            return Ok(EvidenceGate { delta_s, second: None, k });
        };
        let lexical = Arc::new(LexicalEvidence::of(index)?);
        Ok(EvidenceGate { delta_s, second: Some(SecondSignal { map, joint, lexical }), k })
    }

    /// The gate without a scale: it refuses only where nothing was retrieved.
    #[must_use]
    pub fn not_calibrated() -> EvidenceGate {
        EvidenceGate::from(DeltaSGate::NotCalibrated)
    }

    /// The scale of ΔS, whether or not it decides.
    #[must_use]
    pub fn delta_s(&self) -> &DeltaSGate {
        &self.delta_s
    }

    /// The signal that decides; none: nothing does.
    #[must_use]
    pub fn deciding(&self) -> Option<Signal> {
        match (&self.second, &self.delta_s) {
            (Some(second), _) if second.joint.is_some() => Some(Signal::Joint),
            (Some(_), _) => Some(Signal::Lexical),
            (None, DeltaSGate::Calibrated(_)) => Some(Signal::Encoder),
            (None, DeltaSGate::ReportOnly(_) | DeltaSGate::NotCalibrated) => None,
        }
    }

    /// What ΔS reads of the evidence of a question, and why the gate refuses the question, if it
    /// does. It judges by no more snippets than it was fitted on, the first ones. Without evidence,
    /// or where ΔS has no value, every signal fails closed.
    #[must_use]
    pub fn read(&self, question: &str, hits: &[Hit]) -> (GateReading, Option<RefusalReason>) {
        let reading = self.delta_s.read(evidence_ds(hits));
        let judged = &hits[..hits.len().min(self.k)];
        let judging = self.delta_s.read(evidence_ds(judged));
        let refusal = match (&self.second, judging.raw_min()) {
            (Some(second), Some(ds)) => second.refusal(question, judged, ds),
            (None, _) | (_, None) => judging.refusal(),
        };
        (reading, refusal)
    }
}

impl From<DeltaSGate> for EvidenceGate {
    /// ΔS alone, over all snippets.
    fn from(delta_s: DeltaSGate) -> EvidenceGate {
        EvidenceGate { delta_s, second: None, k: usize::MAX }
    }
}

impl SecondSignal {
    fn refusal(&self, question: &str, hits: &[Hit], ds: f64) -> Option<RefusalReason> {
        let Some(lexical) = self.lexical.stress(question, hits) else {
            return Some(RefusalReason::NoContentWords);
        };
        let (signal, raw) = match &self.joint {
            Some(scale) => (Signal::Joint, scale.joint(ds, lexical)),
            None => (Signal::Lexical, lexical),
        };
        let cal = self.map.map(raw);
        match Band::of(cal) {
            Band::Stable | Band::PassEdge | Band::Review => None,
            Band::Fail | Band::Danger => Some(RefusalReason::WeakEvidence { signal, cal }),
        }
    }
}

/// The line of the report about the gate: its worse error on held-out questions.
pub(crate) fn gate_line(calibration: Option<&CorpusCalibration>) -> Gate {
    let mut measured = Measured {
        value: None,
        unit: Unit::Share,
        needed: "≤ 0.05",
        n: 0,
        interval: None,
        status: Status::NotCalibrated,
        reason: Some("nothing keeps unanswerable questions out: no calibration".to_owned()),
    };
    let Some(calibration) = calibration else { return line(measured) };
    let Some(signal) = calibration.deciding() else {
        measured.status = Status::Inconclusive;
        let reason = "nothing keeps unanswerable questions out: no signal is fit here";
        measured.reason = Some(reason.to_owned());
        return line(measured);
    };
    let Some(held_out) = calibration.held_out(signal) else {
        measured.status = Status::Inconclusive;
        let reason = format!("decided by {signal}; too few questions to hold a half out");
        measured.reason = Some(reason);
        return line(measured);
    };
    let worse = worse(held_out);
    measured.value = Some(worse.share);
    measured.n = worse.of;
    measured.interval = Some(worse.interval);
    measured.status = if held_out.holds() {
        Status::Pass
    } else if worse.interval.low > MAX_ERROR {
        Status::Fail
    } else {
        Status::Review
    };
    let pooled = &held_out.pooled;
    measured.reason = Some(format!(
        "decided by {signal}; held out it lets in {} of {} unanswerable questions and loses {} of \
         {} answerable ones",
        pooled.let_in.n, pooled.let_in.of, pooled.lost.n, pooled.lost.of
    ));
    line(measured)
}

fn worse(held_out: &HeldOut) -> Rate {
    let (let_in, lost) = (held_out.pooled.let_in, held_out.pooled.lost);
    if let_in.share >= lost.share { let_in } else { lost }
}

fn line(measured: Measured) -> Gate {
    Gate { name: "evidence_gate", label: "gate's larger error, held out", measured }
}
