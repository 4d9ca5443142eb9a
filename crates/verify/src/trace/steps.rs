//! What the steps of an answer must agree with: with each other, and with the answer that they are (G-20).

use std::fmt::Display;

use super::findings::{Findings, Rule};
use super::record::{Answer, Step};
use crate::prompt::sha256_hex;
use crate::steps::{LOGIC_COLLAPSE, MAX_ROLLBACKS, STALL_STEPS, StepFault, step_seed};

impl Answer {
    /// Nothing of an answer that was made whole.
    pub(super) fn check_steps(&self, findings: &mut Findings) {
        let Some(steps) = &self.steps else { return };
        for (at, step) in steps.iter().enumerate() {
            let expected = step_seed(self.seed, at);
            findings.equal(Rule::Steps, &format!("/steps/{at}/seed"), &expected, &step.seed);
            self.check_step(at, step, findings);
        }
        self.check_places(steps, findings);
        self.check_claims(steps, findings);
        self.check_guard(steps, findings);
        self.check_step_tokens(steps, findings);
    }

    fn check_step(&self, at: usize, step: &Step, findings: &mut Findings) {
        let field = |name: &str| format!("/steps/{at}/{name}");
        for (nth, id) in step.citations.iter().enumerate() {
            let is_live = self.selected().iter().any(|item| item.snippet_id == *id);
            let expected = ("a snippet that was retrieved and in the prompt", id as &dyn Display);
            findings.holds(Rule::Citations, &field(&format!("citations/{nth}")), is_live, expected);
        }
        let is_good = step.state == "good";
        let reason = step.reason.as_deref();
        let of_reason =
            reason.map_or(Some("good"), |reason| StepFault::of_code(reason).map(StepFault::state));
        let expected = of_reason.unwrap_or("another reason");
        findings.equal(Rule::Steps, &field("state"), expected, step.state.as_str());
        // A loop, an invented label and a cut are seen before anybody looks for a snippet.
        let has_snippets = match reason {
            None | Some("contradiction" | "repetition" | "nothing_new") => Some(true),
            Some("uncited") => Some(false),
            Some(_) => None,
        };
        let is_cited = !step.citations.is_empty();
        let is_so = has_snippets.is_none_or(|has| has == is_cited);
        let expected = ("snippets for a step that was judged with them", &is_cited as &dyn Display);
        findings.holds(Rule::Citations, &field("citations"), is_so, expected);
        let is_told = is_good && !self.refusal;
        let expected = "what a good step of an answer says, and only then";
        let found = if step.claim.is_some() { "a claim" } else { "none" };
        let is_so = step.claim.is_some() == is_told;
        findings.holds(Rule::Steps, &field("claim"), is_so, (expected, &found));
        if let Some(claim) = &step.claim {
            let expected = sha256_hex(claim.as_bytes());
            findings.equal(Rule::AnswerHash, &field("claim_sha256"), &expected, &step.claim_sha256);
        }
    }

    /// The segments of an answer are its good steps.
    fn check_claims(&self, steps: &[Step], findings: &mut Findings) {
        if self.refusal {
            return;
        }
        let good: Vec<&Step> = steps.iter().filter(|step| step.state == "good").collect();
        let n_segments = self.segments.len();
        findings.equal(Rule::Steps, "/segments", &good.len(), &n_segments);
        for (at, (segment, step)) in self.segments.iter().zip(good).enumerate() {
            let text = self.answer_text.get(segment.text_span.start..segment.text_span.end);
            let is_it = text.is_some() && text == step.claim.as_deref();
            let expected = ("what a good step says", &"another text" as &dyn Display);
            findings.holds(Rule::Steps, &format!("/segments/{at}/text_span"), is_it, expected);
            let is_it = segment.snippet_ids == step.citations;
            let expected = ("the snippets of a good step", &"others" as &dyn Display);
            findings.holds(Rule::Steps, &format!("/segments/{at}/snippet_ids"), is_it, expected);
        }
    }

    /// A step that was taken back fired its guard.
    fn check_guard(&self, steps: &[Step], findings: &mut Findings) {
        let has_collapsed = steps.iter().any(is_taken_back);
        let has_fired = self.guards_fired.iter().any(|guard| guard == LOGIC_COLLAPSE);
        let expected = "`logic_collapse` where a step was taken back, and only then";
        let is_so = has_collapsed == has_fired;
        findings.holds(Rule::Steps, "/guards_fired", is_so, (expected, &has_fired));
    }

    /// The draws of the steps are among those of the answer; the one that ends it is no step.
    fn check_step_tokens(&self, steps: &[Step], findings: &mut Findings) {
        let all = &self.metrics.tokens;
        let sum = |of: fn(&Step) -> usize| steps.iter().map(of).sum::<usize>();
        for (name, most, found) in [
            ("in", all.r#in, sum(|step| step.tokens.r#in)),
            ("out", all.out, sum(|step| step.tokens.out)),
            ("cached", all.cached, sum(|step| step.tokens.cached)),
        ] {
            let pointer = format!("/metrics/tokens/{name}");
            let expected = "at least the tokens of the steps";
            findings.holds(Rule::Tokens, &pointer, found <= most, (expected, &most));
        }
        for (at, step) in steps.iter().enumerate() {
            let pointer = format!("/steps/{at}/tokens/cached");
            let expected = "no more tokens than the prompt has";
            let is_within = step.tokens.cached <= step.tokens.r#in;
            findings.holds(Rule::Tokens, &pointer, is_within, (expected, &step.tokens.cached));
        }
    }
}

fn is_taken_back(step: &Step) -> bool {
    step.state == "rolled_back" || step.state == "stalled"
}

impl Answer {
    /// A good step takes its place, and every other one leaves it to the next; only so often, and nothing stands
    /// behind a step that was cut. Those of a stall had their places until its last one.
    fn check_places(&self, steps: &[Step], findings: &mut Findings) {
        let (mut n_good, mut n_idle, mut n_rollbacks) = (0, 0, 0);
        for (at, step) in steps.iter().enumerate() {
            let place = n_good + n_idle + 1;
            findings.equal(Rule::Steps, &format!("/steps/{at}/step"), &place, &step.step);
            let mut rule = |is_so: bool, expected: &str| {
                let pointer = format!("/steps/{at}/state");
                findings.holds(Rule::Steps, &pointer, is_so, (expected, &step.state));
            };
            match (step.state.as_str(), step.reason.as_deref()) {
                ("good", _) => {
                    rule(n_idle == 0, "the whole of a stall in a row");
                    n_good += 1;
                }
                ("stalled", Some("nothing_new")) if n_idle + 1 < STALL_STEPS => n_idle += 1,
                ("cut", _) => rule(at + 1 == steps.len(), "nothing behind a step that was cut"),
                // Only the last one of a stall goes back.
                (_, reason) => {
                    n_rollbacks += 1;
                    n_idle = if reason == Some("nothing_new") { 0 } else { n_idle };
                }
            }
        }
        let expected = "as many steps of a stall as make one";
        findings.holds(Rule::Steps, "/steps", n_idle == 0, (expected, &n_idle));
        // The one behind the last rollback ends the answer: with the refusal, or with what stands.
        let last = steps.last().and_then(|step| StepFault::of_code(step.reason.as_deref()?));
        let ends_idle = n_good > 0 && last.is_some_and(StepFault::is_idle);
        let most = MAX_ROLLBACKS + usize::from(self.refusal || ends_idle);
        let is_why = self.refusal && self.guards_fired == [LOGIC_COLLAPSE];
        let is_so = n_rollbacks <= most && (!is_why || n_rollbacks == most);
        let expected =
            "no more rollbacks than an answer may have, and all of them where that refused it";
        findings.holds(Rule::Steps, "/steps", is_so, (expected, &n_rollbacks));
    }
}
