//! Answers on the calibrated text↔text scale: whether two of them say the same, and how far one is from what it cites.

use exrail_metrics::{Calibration, Fitness};
use exrail_retrieval::{Encode, EncodeError};

use crate::calibrate::{CorpusCalibration, FamilyFit};
use crate::encode::{Side, TextVectors};
use crate::gates::unfit_in_words;
use crate::report::Status;

/// The text↔text scale of an encoder on a corpus, or why there is none.
pub struct AnswerScale<'a> {
    vectors: TextVectors<'a>,
    map: Result<&'a Calibration, String>,
    failed: Option<EncodeError>,
}

impl<'a> AnswerScale<'a> {
    /// The scale that a calibration gives, which must hold for an index of this hash and `k` snippets. None, or one that
    /// is void: there is no scale, and every value says why.
    #[must_use]
    pub fn new(
        encoder: &'a dyn Encode,
        calibration: Option<&'a CorpusCalibration>,
        (index_hash, k): (&str, usize),
    ) -> AnswerScale<'a> {
        let map = match calibration {
            None => Err("ΔS has not been calibrated for this encoder and index".to_owned()),
            Some(of) => match (of.check(encoder.fingerprint(), index_hash, k), &of.tt) {
                (Err(void), _) => Err(void.to_string()),
                (Ok(()), FamilyFit::NotCalibrated { reason }) => Err(reason.clone()),
                (Ok(()), FamilyFit::Fitted(map)) => Ok(map),
            },
        };
        AnswerScale { vectors: TextVectors::new(encoder), map, failed: None }
    }

    /// ΔS of two answers where the encoder is fit to say whether they mean the same.
    pub(crate) fn equivalence_ds(&mut self, a: &str, b: &str) -> Option<f64> {
        let map = self.map.as_ref().ok().copied().filter(|map| map.is_fit())?;
        Some(map.map(self.raw(a, b)?))
    }

    /// `ds_ac`: calibrated ΔS of an answer and the nearest snippet that it cites (§1.1.4, §1.1.5), for report even where
    /// the encoder is unfit to gate. None without a snippet, without a scale, and of two texts that both are longer than
    /// the encoder's window.
    pub(crate) fn ds_ac<'t>(
        &mut self,
        answer: &str,
        cited: impl Iterator<Item = &'t str>,
    ) -> Option<f64> {
        let map = self.map.as_ref().ok().copied()?;
        let distances: Vec<f64> = cited.filter_map(|text| self.raw(answer, text)).collect();
        distances.into_iter().min_by(f64::total_cmp).map(|raw| map.map(raw))
    }

    fn raw(&mut self, a: &str, b: &str) -> Option<f64> {
        match self.vectors.ds((Side::Query, a), (Side::Query, b)) {
            Ok(ds) => ds.value(),
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }

    /// Why no value of this scale may gate.
    pub(crate) fn fault(&self) -> Option<(Status, String)> {
        match &self.map {
            Err(reason) => Some((Status::NotCalibrated, reason.clone())),
            Ok(map) => match map.fitness {
                Fitness::Fit => None,
                Fitness::Unfit(_) => Some((
                    Status::Inconclusive,
                    format!(
                        "the encoder is unfit to gate here, so ΔS only reports: {}",
                        unfit_in_words(map).unwrap_or_default()
                    ),
                )),
            },
        }
    }

    /// How answers are compared, for people.
    pub(crate) fn in_words(&self) -> &'static str {
        equivalence_in_words(self.map.as_ref().ok().copied().filter(|map| map.is_fit()))
    }

    /// Hands over what the encoder failed with since the last call: a failure is no missing value.
    pub(crate) fn check(&mut self) -> Result<(), EncodeError> {
        self.failed.take().map_or(Ok(()), Err)
    }
}

/// How answers are compared with this map for long ones, for people.
pub(crate) fn equivalence_in_words(fit: Option<&Calibration>) -> &'static str {
    match fit {
        Some(_) => "short answers by words and numbers, longer ones by calibrated ΔS",
        None => "short answers by words and numbers, longer ones undecided without a fit encoder",
    }
}
