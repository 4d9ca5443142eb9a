//! The report for a terminal, to be read in half a minute. The last line is the verdict.

use super::{FaultStage, ItemComparison, ItemMode, LambdaModesReport, ModeComparison, ModeSection};
use crate::quant::QuantMode;
use crate::report::{Measured, Status};
use crate::runs::ModeLambda;

/// Flips that are listed; `--json` has all of them.
const SHOWN: usize = 5;

impl LambdaModesReport {
    /// The report as lines, each with a heading of 19 columns.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let runs = format!("{} wordings × {} seeds", self.n_paraphrases, self.n_seeds);
        let mut lines = vec![
            headed(
                "asked",
                format!("{} of {} answerable items, {runs}", self.n_items, self.n_answerable),
            ),
            headed("equivalence", self.equivalence),
            headed("retrieval", self.retrieval_in_words()),
            headed(
                "",
                format!(
                    "{:<11}{:>11}{:>7}{:>7}{:>7}{:>8}{:>12}{:>10}{:>7}  first fault",
                    "", "convergent", "c", "SE", "cit", "right", "one answer", "an item", "ratio"
                ),
            ),
        ];
        for (&mode, section) in &self.modes {
            lines.extend(self.mode_lines(mode, section));
        }
        for comparison in &self.comparisons {
            lines.extend(comparison_lines(comparison));
            lines.extend(self.flip_lines(comparison));
        }
        lines.push(headed(
            "e_resonance",
            format!("{}: {}", self.e_resonance.status, self.e_resonance.reason),
        ));
        let cost = self.cost;
        lines.push(headed(
            "cost",
            format!(
                "{} replies, {} tokens, {:.0} s without loading",
                cost.generations, cost.tokens, cost.seconds
            ),
        ));
        lines.push(headed("verdict", self.verdict));
        lines
    }

    fn retrieval_in_words(&self) -> String {
        let n = self.retrieval.n_queries;
        match (self.retrieval.bit_equal, &self.retrieval.reason) {
            (Some(true), _) => {
                format!(
                    "{n} queries with each mode loaded: equal to the bit, so what differs is in the answers"
                )
            }
            (Some(false), Some(reason)) => {
                format!(
                    "{} of {n} queries differ: {reason}: fail",
                    self.retrieval.differences.len()
                )
            }
            (None | Some(false), reason) => {
                format!("{}: {}", self.retrieval.status, reason.as_deref().unwrap_or_default())
            }
        }
    }

    fn mode_lines(&self, mode: QuantMode, section: &ModeSection) -> Vec<String> {
        let (Some(cost), None) = (section.cost, &section.reason) else {
            let reason = section.reason.as_deref().unwrap_or_default();
            return vec![headed(mode.name(), format!("{}: {reason}", section.status))];
        };
        let seconds = |of: Option<f64>| of.map_or("-".to_owned(), |s| format!("{s:.2} s"));
        let ratio = cost.ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.1}"));
        let (single, item) = (seconds(cost.single_answer_s), seconds(cost.item_s));
        let of_mode = || self.items.iter().filter_map(move |item| item.modes.get(&mode));
        let count = |n: usize| format!("{n} of {}", self.n_items);
        let frozen = means(of_mode().map(|item| &item.frozen));
        let convergent = count(section.n_convergent);
        let right = count(section.n_matching);
        let faults = faults(of_mode());
        let live = section.n_convergent_live.map(|n_live| {
            let live = means(of_mode().filter_map(|item| item.live.as_ref()));
            format!("{:<11}{:>11}{live}{:>37}  {faults}", "live", count(n_live), "")
        });
        // The stages of a mode with live runs are those of the live runs.
        let of_frozen = if live.is_some() { "" } else { faults.as_str() };
        let line = format!(
            "{:<11}{convergent:>11}{frozen}{right:>8}{single:>12}{item:>10}{ratio:>7}  {of_frozen}",
            "frozen"
        );
        [headed(mode.name(), line)].into_iter().chain(live.map(|live| headed("", live))).collect()
    }

    fn flip_lines(&self, comparison: &ModeComparison) -> Vec<String> {
        let flips: Vec<&ItemComparison> =
            comparison.items.iter().filter(|item| item.flip == Some(true)).collect();
        let line = |flip: &&ItemComparison| {
            let item = self.items.iter().find(|item| item.id == flip.id);
            let state = |mode| {
                let of = item.and_then(|item| item.modes.get(&mode)).map(|of| &of.frozen.strict);
                let Some(of) = of else { return String::new() };
                let label = of.sub_label.map_or(String::new(), |label| format!(" ({label})"));
                format!("{}{label}", of.state)
            };
            let (before, after) = (state(comparison.reference), state(comparison.mode));
            let stage = flip.stage.map_or("", FaultStage::name);
            let what = if flip.majority_differs {
                "another majority answer"
            } else {
                "the same majority answer"
            };
            headed("", format!("flip: {}, {before} to {after}, {what}, at {stage}", flip.id))
        };
        let mut lines: Vec<String> = flips.iter().take(SHOWN).map(line).collect();
        if flips.len() > SHOWN {
            lines.push(headed("", format!("and {} more flips", flips.len() - SHOWN)));
        }
        lines
    }
}

/// How many items are not convergent from which stage on.
fn faults<'a>(items: impl Iterator<Item = &'a ItemMode>) -> String {
    let items: Vec<&ItemMode> = items.collect();
    let count = |stage: FaultStage| items.iter().filter(|of| of.fault == Some(stage)).count();
    let is_undecided = |of: &&&ItemMode| of.fault.is_none() && of.stages.reason.is_none();
    let stages = [FaultStage::Retrieve, FaultStage::Assemble, FaultStage::Reason];
    let stages = stages.map(|stage| (stage.name(), count(stage)));
    let undecided = ("undecided", items.iter().filter(is_undecided).count());
    let told = stages.into_iter().chain([undecided]).filter(|&(_, n)| n > 0);
    told.map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
}

/// Means of c, semantic entropy and citation agreement.
fn means<'a>(of: impl Iterator<Item = &'a ModeLambda>) -> String {
    let all: Vec<&ModeLambda> = of.collect();
    #[expect(clippy::cast_precision_loss, reason = "a probe has few items")]
    let mean = |value: fn(&ModeLambda) -> f64| {
        all.iter().map(|lambda| value(lambda)).sum::<f64>() / all.len().max(1) as f64
    };
    format!(
        "{:>7.2}{:>7.2}{:>7.2}",
        mean(|of| of.strict.c),
        mean(|of| of.strict.se),
        mean(|of| of.strict.cit)
    )
}

fn comparison_lines(comparison: &ModeComparison) -> Vec<String> {
    if let Some(reason) = unavailable(comparison) {
        return vec![headed(&comparison.name(), format!("{}: {reason}", Status::NotAvailable))];
    }
    let labels = ["λ flips", "right, net", "right, either way", "same citations", "ΔS drift"];
    let mut lines = Vec::with_capacity(labels.len());
    for (label, (_, measured)) in labels.into_iter().zip(comparison.measured()) {
        let name = if lines.is_empty() { comparison.name() } else { String::new() };
        lines.push(headed(&name, format!("{label:<18}{}", in_words(measured))));
    }
    lines
}

/// Why there is nothing to compare.
fn unavailable(comparison: &ModeComparison) -> Option<&str> {
    let flip = &comparison.lambda_flip;
    (flip.status == Status::NotAvailable).then(|| flip.reason.as_deref().unwrap_or_default())
}

fn in_words(measured: &Measured) -> String {
    let value = measured.value.map_or("-".to_owned(), |value| format!("{value:.2}"));
    let interval =
        measured.interval.map_or(String::new(), |of| format!("{:.2} to {:.2}", of.low, of.high));
    let reason = measured.reason.as_ref().map_or(String::new(), |reason| format!(" ({reason})"));
    format!("{value:>6}  {interval:<14}  {:<14}{}{reason}", measured.needed, measured.status)
}

fn headed(name: &str, text: impl std::fmt::Display) -> String {
    format!("{name:<19}{text}").trim_end().to_owned()
}
