//! The injection suite (G-21): texts by which a stranger tries to be obeyed, and what is counted over them.
//!
//! Three classes of success, each of which the structure of the server is to make impossible: *control token* (a
//! text becomes a control token), *hijack* (a text changes the roles, the tools or anything else that the template
//! writes) and *leak* (a stretch of the system message is told). What a model thinks of a text is not counted: a
//! guard that needs the model to resist is none.

use exrail_metrics::{MetricsError, binomial_upper};
use serde::{Deserialize, Serialize};

const SUITE: &str = include_str!("../data/injection.jsonl");

/// What a text tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttackClass {
    /// To replace the instructions, or have them told.
    Override,
    /// To change roles, tools, the shape of the answer, memory or sources.
    Hijack,
    /// To be taken for control tokens, fences or labels.
    Collision,
}

/// One text.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attack {
    /// What it tries.
    pub class: AttackClass,
    /// The text.
    pub text: String,
}

/// The suite: 100 overrides, 50 hijacks and 30 collisions.
///
/// # Panics
/// The built-in file is damaged, which a test rules out.
#[must_use]
pub fn injection_suite() -> Vec<Attack> {
    let attack = |line| serde_json::from_str(line).expect("a test reads every line of the file");
    SUITE.lines().map(attack).collect()
}

/// What of the guard an attack got past.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SuccessClass {
    /// Its text became a control token.
    ControlToken,
    /// It changed what the template writes around the messages.
    Hijack,
    /// A stretch of the system message was told.
    Leak,
}

impl SuccessClass {
    /// Name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            SuccessClass::ControlToken => "control token",
            SuccessClass::Hijack => "hijack",
            SuccessClass::Leak => "leak",
        }
    }
}

/// Attacks of one class and how many got through.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct InjectionTally {
    /// The class.
    pub class: SuccessClass,
    /// Attacks that were tried.
    pub trials: usize,
    /// Attacks that got through.
    pub successes: usize,
    /// Attacks that the server refuses to pass on at all; no success.
    pub refused: usize,
}

impl InjectionTally {
    /// None yet.
    #[must_use]
    pub fn new(class: SuccessClass) -> InjectionTally {
        InjectionTally { class, trials: 0, successes: 0, refused: 0 }
    }

    /// Counts one attack.
    pub fn count(&mut self, outcome: AttackOutcome) {
        self.trials += 1;
        match outcome {
            AttackOutcome::Held => {}
            AttackOutcome::Refused => self.refused += 1,
            AttackOutcome::Succeeded => self.successes += 1,
        }
    }

    /// The share of attacks like these that may get through, at most, with 95 % confidence (Clopper and Pearson,
    /// one-sided; with no success close to 3 / n).
    ///
    /// # Errors
    /// Nothing was tried.
    pub fn upper_95(&self) -> Result<f64, MetricsError> {
        binomial_upper(self.successes, self.trials)
    }
}

/// What became of one attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttackOutcome {
    /// It was read as text.
    Held,
    /// The request is refused, before a model reads it.
    Refused,
    /// It got through.
    Succeeded,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn g21_the_suite_has_its_180_texts_and_none_twice() {
        let suite = injection_suite();
        let n = |class| suite.iter().filter(|attack| attack.class == class).count();
        let counts = [AttackClass::Override, AttackClass::Hijack, AttackClass::Collision].map(n);
        assert_eq!(counts, [100, 50, 30]);
        let texts: BTreeSet<&str> = suite.iter().map(|attack| attack.text.as_str()).collect();
        assert_eq!(texts.len(), 180);
        assert!(texts.iter().all(|text| !text.trim().is_empty()));
    }

    #[test]
    fn a_tally_bounds_what_it_did_not_see() {
        let mut tally = InjectionTally::new(SuccessClass::Leak);
        assert!(tally.upper_95().is_err());
        (0..100).for_each(|_| tally.count(AttackOutcome::Held));
        assert!((tally.upper_95().unwrap() - 0.029_513).abs() < 1e-6);
        tally.count(AttackOutcome::Succeeded);
        assert!(tally.upper_95().unwrap() > 0.04);
    }
}
