//! What an answer must agree with itself about.

use std::fmt::Display;

use super::findings::{Findings, Rule};
use super::record::{
    Answer, Checks, Constraints, Prompt, Retrieved, Segment, TOLERANCE, check_retrieved,
};
use crate::prompt::{REFUSAL_TOKEN, constraints_sha256, sha256_hex};

/// The one admissible order (G-31: system, task, constraints, citations, question).
const SLOTS: [(&str, &str); 6] = [
    ("system", "system"),
    ("task", "system"),
    ("constraints", "system"),
    ("citations", "user"),
    ("question", "user"),
    ("answer", "user"),
];

impl Answer {
    pub(super) fn check(&self, index_hash: Option<&str>, findings: &mut Findings) {
        self.query.check(findings);
        let expected = sha256_hex(self.answer_text.as_bytes());
        findings.equal(Rule::AnswerHash, "/answer_sha256", &expected, &self.answer_sha256);
        check_retrieved(&self.retrieved, findings);
        let is_pinned = ("the hash of the index", &"none" as &dyn Display);
        findings.holds(Rule::IndexHash, "/pins/index_hash", index_hash.is_some(), is_pinned);
        self.check_selection(findings);
        self.check_refusal(findings);
        self.check_spans(findings);
        for (at, segment) in self.segments.iter().enumerate() {
            self.check_segment(at, segment, findings);
        }
        if let Some(prompt) = &self.prompt {
            prompt.check(&self.selected(), findings);
        }
        if let Some(constraints) = &self.constraints {
            constraints.check(self.prompt.as_ref(), findings);
        }
        self.check_metrics(findings);
        self.check_steps(findings);
    }

    pub(super) fn selected(&self) -> Vec<&Retrieved> {
        self.retrieved.iter().filter(|item| item.selected).collect()
    }

    /// What entered the prompt are the best ones.
    fn check_selection(&self, findings: &mut Findings) {
        let n_selected = self.selected().len();
        let first = self.retrieved.iter().take(n_selected).all(|item| item.selected);
        let found = format!("{n_selected} selected with a gap");
        findings.holds(Rule::Ranks, "/retrieved", first, ("the best ones selected", &found));
    }

    fn check_refusal(&self, findings: &mut Findings) {
        let mut rule = |pointer: &str, is_so: bool, expected: &str| {
            let found = format!("refusal {}", self.refusal);
            findings.holds(Rule::Refusal, pointer, is_so, (expected, &found));
        };
        let is_token = self.answer_text == REFUSAL_TOKEN;
        rule(
            "/answer_text",
            self.refusal == is_token,
            "the refusal token for refusals, and only then",
        );
        let has_reason = self.refusal_reason.is_some();
        rule("/refusal_reason", self.refusal == has_reason, "a reason for refusals, and only then");
        let has_segments = !self.segments.is_empty();
        rule("/segments", self.refusal != has_segments, "segments for answers, and only then");
        let fired = !self.guards_fired.is_empty();
        rule("/guards_fired", !self.refusal || fired, "the guard that refused");
        let ran = self.finish_reason.is_some();
        rule("/finish_reason", self.refusal || ran, "how the answer ended");
        let withheld = self.withheld_sha256.is_some();
        let expected = "the hash of what was withheld, and only then";
        rule("/withheld_sha256", withheld == (self.refusal && ran), expected);
        let prompted = self.prompt.is_some();
        rule("/prompt", prompted == ran, "a prompt where something was generated, and only then");
    }

    /// The segments are the answer: one behind the other, with nothing but blanks between.
    fn check_spans(&self, findings: &mut Findings) {
        let mut end = 0;
        for (at, segment) in self.segments.iter().enumerate() {
            let span = &segment.text_span;
            let pointer = format!("/segments/{at}/text_span");
            let found = format!("{} to {}", span.start, span.end);
            let between = self.answer_text.get(end..span.start.max(end));
            let follows = span.start >= end && between.is_some_and(|text| text.trim().is_empty());
            let is_text = span.start < span.end
                && self.answer_text.get(span.start..span.end).is_some_and(|it| it == it.trim());
            let expected = "the text that follows the segment before";
            findings.holds(Rule::Spans, &pointer, follows && is_text, (expected, &found));
            end = span.end;
        }
        if !self.refusal {
            let is_all = self.answer_text.len() == end;
            let expected = "segments up to the end of the answer";
            findings.holds(Rule::Spans, "/segments", is_all, (expected, &end));
        }
    }

    fn check_segment(&self, at: usize, segment: &Segment, findings: &mut Findings) {
        let mut tokens = 0;
        for (nth, id) in segment.snippet_ids.iter().enumerate() {
            let pointer = format!("/segments/{at}/snippet_ids/{nth}");
            let cited = self.retrieved.iter().find(|item| item.selected && item.snippet_id == *id);
            let known = ("a snippet that was retrieved and in the prompt", id as &dyn Display);
            findings.holds(Rule::Citations, &pointer, cited.is_some(), known);
            let Some(cited) = cited else { continue };
            tokens += cited.tokens;
            let section = segment.section_id.as_deref().unwrap_or("none");
            let pointer = format!("/segments/{at}/section_id");
            findings.equal(Rule::Sections, &pointer, cited.section_id.as_str(), section);
        }
        let is_cited = !segment.snippet_ids.is_empty();
        let pointer = format!("/segments/{at}/section_id");
        let expected = "a section with snippets, and only then";
        let has_section = segment.section_id.is_some();
        findings.holds(Rule::Sections, &pointer, is_cited == has_section, (expected, &has_section));
        let is_named = segment.citation_source != "none";
        let pointer = format!("/segments/{at}/citation_source");
        let expected = "who named the snippets, and `none` without";
        let found = &segment.citation_source;
        findings.holds(Rule::Citations, &pointer, is_cited == is_named, (expected, found));
        findings.equal(Rule::Tokens, &format!("/segments/{at}/tokens"), &tokens, &segment.tokens);
    }

    fn check_metrics(&self, findings: &mut Findings) {
        let metrics = &self.metrics;
        let n_cited = self.segments.iter().filter(|it| !it.snippet_ids.is_empty()).count();
        let share = (!self.refusal).then(|| share(n_cited, self.segments.len())).flatten();
        let found = metrics.cited_share;
        let is_share = match (share, found) {
            (Some(share), Some(found)) => (share - found).abs() <= TOLERANCE && n_cited > 0,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        let said = format!("{found:?}");
        let expected = "the share of the segments with a snippet, more than none";
        findings.holds(Rule::Citations, "/metrics/cited_share", is_share, (expected, &said));
        let tokens = &metrics.tokens;
        let expected = "no more tokens than the prompt has";
        let within = tokens.cached <= tokens.r#in;
        findings.holds(Rule::Tokens, "/metrics/tokens/cached", within, (expected, &tokens.cached));
        let ran = self.finish_reason.is_some();
        let counted = (tokens.r#in > 0) == ran && (ran || tokens.out == 0);
        let expected = "tokens where something was generated, and only then";
        findings.holds(Rule::Tokens, "/metrics/tokens/in", counted, (expected, &tokens.r#in));
        self.check_distances(findings);
        self.check_checks(findings);
    }

    /// Of a refusal nothing is compared, and without a citation nothing is precise.
    fn check_checks(&self, findings: &mut Findings) {
        let Checks { citation_recall, citation_precision, ds_ac, ds_ac_status } = &self.checks;
        let n_cited = self.segments.iter().filter(|it| !it.snippet_ids.is_empty()).count();
        for (name, value, expected, is_there) in [
            (
                "citation_recall",
                citation_recall,
                "a value for an answer",
                !self.segments.is_empty(),
            ),
            ("citation_precision", citation_precision, "a value for citations", n_cited > 0),
        ] {
            let (pointer, said) = (format!("/checks/{name}"), format!("{value:?}"));
            let holds = value.is_some() == is_there;
            findings.holds(Rule::Metrics, &pointer, holds, (expected, &said));
        }
        let is_scaled = ["ok", "encoder_unfit"].contains(&ds_ac_status.as_str());
        let expected = "a value on a calibrated scale, and only then";
        let holds = ds_ac.is_some() == is_scaled;
        findings.holds(Rule::Metrics, "/checks/ds_ac", holds, (expected, ds_ac_status));
    }

    fn check_distances(&self, findings: &mut Findings) {
        let metrics = &self.metrics;
        let is_scaled = ["ok", "encoder_unfit"].contains(&metrics.ds_status.as_str());
        let status = &metrics.ds_status;
        for (pointer, value) in
            [("/metrics/ds_min", metrics.ds_min), ("/metrics/ds_mean", metrics.ds_mean)]
        {
            let expected = "a value on a calibrated scale, and only then";
            findings.holds(
                Rule::Metrics,
                pointer,
                value.is_some() == is_scaled,
                (expected, status),
            );
        }
        let selected = self.selected();
        if let (Some(min), true) = (metrics.ds_min, is_scaled) {
            let is_of_one = |item: &&Retrieved| {
                item.ds_cal.is_some_and(|value| (value - min).abs() <= TOLERANCE)
            };
            let expected = "the distance of a selected snippet";
            let found = selected.iter().any(is_of_one);
            findings.holds(Rule::Metrics, "/metrics/ds_min", found, (expected, &min));
        }
        let is_empty = metrics.ds_status == "no_evidence";
        let expected = "`no_evidence` where nothing was selected, and only then";
        let none = selected.is_empty();
        findings.holds(Rule::Metrics, "/metrics/ds_status", is_empty == none, (expected, status));
    }
}

impl Constraints {
    /// The rules of the request are the last ones of its prompt (G-31).
    fn check(&self, prompt: Option<&Prompt>, findings: &mut Findings) {
        let echo = if prompt.is_some() { "equal" } else { "not_built" };
        findings.equal(Rule::ConstraintsHash, "/constraints/echo", echo, self.echo.as_str());
        let Some(prompt) = prompt else { return };
        let first = prompt.constraints.len().saturating_sub(self.n_rules);
        let expected = constraints_sha256(&prompt.constraints[first..]);
        findings.equal(Rule::ConstraintsHash, "/constraints/sha256", &expected, &self.sha256);
    }
}

impl Prompt {
    fn check(&self, selected: &[&Retrieved], findings: &mut Findings) {
        let expected = constraints_sha256(&self.constraints);
        let pointer = "/prompt/constraints_sha256";
        findings.equal(Rule::ConstraintsHash, pointer, &expected, &self.constraints_sha256);
        let ids: Vec<&str> = selected.iter().map(|item| item.snippet_id.as_str()).collect();
        let found = self.citations.join(", ");
        let expected = "the selected snippets in their order";
        let same = self.citations == ids;
        findings.holds(Rule::Prompt, "/prompt/citations", same, (expected, &found));
        let places = || self.slots.iter().map(|place| (place.slot.as_str(), place.role.as_str()));
        let found = places().map(|(slot, _)| slot).collect::<Vec<_>>().join(", ");
        let expected = "system, task, constraints, citations, question, answer";
        findings.holds(Rule::Prompt, "/prompt/slots", places().eq(SLOTS), (expected, &found));
        if let Some(first) = self.slots.first() {
            findings.equal(Rule::Spans, "/prompt/slots/0/span/start", &0, &first.span.start);
        }
        for (at, pair) in self.slots.windows(2).enumerate() {
            let [before, after] = pair else { continue };
            // Within a message a blank line parts them.
            let begin = if before.role == after.role { before.span.end + 2 } else { 0 };
            let forth = after.span.start < after.span.end && before.span.start < before.span.end;
            let is_there = forth && after.span.start == begin;
            let pointer = format!("/prompt/slots/{}/span", at + 1);
            let found = format!("{} to {}", after.span.start, after.span.end);
            let expected = "a place behind the slot before, or the begin of a message";
            findings.holds(Rule::Spans, &pointer, is_there, (expected, &found));
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "segment counts are far below 2^52")]
fn share(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}
