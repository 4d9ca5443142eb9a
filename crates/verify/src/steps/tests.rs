//! What each check of a step catches, and what reaches the user without it.

use std::sync::Arc;

use exrail_retrieval::Hit;

use super::*;
use crate::answer::CitationSource;
use crate::ask::answer_over;
use crate::evidence_gate::EvidenceGate;
use crate::fakes::{Scripted, hit};
use crate::prompt::{Nonce, REFUSAL_TOKEN};
use crate::rules::{HardRule, RuleSet};

const QUESTION: &str = "How big is a page, and what does the warranty cover?";
const PAGE: &str = "[S1] A page has 256 tokens.";
const ROTATE: &str = "[S2] Rotate the cache every 8192 tokens.";
const COUNT: &str = "[S3] The guard counts each rollback.";
const BOTH: &str = "A page has 256 tokens. Rotate the cache every 8192 tokens.";
const LIE: &str = "[S2] Paris lies in France.";

fn hits() -> Vec<Hit> {
    vec![
        hit("a.md", 0, "A page has 256 tokens.", 0.9),
        hit("b.md", 0, "Rotate the cache every 8192 tokens.", 0.8),
        hit("c.md", 0, "The guard counts each rollback.", 0.7),
    ]
}

fn stepwise() -> AskPolicy {
    AskPolicy { steps: Some(StepPolicy::new(MAX_STEPS)), ..AskPolicy::default() }
}

/// The same with the guard off, and all others on.
fn unguarded() -> AskPolicy {
    let steps = StepPolicy { check: StepCheck::Off, ..StepPolicy::new(MAX_STEPS) };
    AskPolicy { steps: Some(steps), ..AskPolicy::default() }
}

fn forbidding(policy: AskPolicy, pattern: &str) -> AskPolicy {
    let rules = [("Be kind.", vec![]), ("Name no number.", vec![pattern.to_owned()])];
    let rules = rules.map(|(text, forbid)| HardRule { text: text.to_owned(), forbid });
    let rules = Some(Arc::new(RuleSet::new(rules.to_vec()).unwrap()));
    AskPolicy { rules, ..policy }
}

fn answer(generator: &Scripted, policy: &AskPolicy) -> AskOutcome {
    let (nonce, gate) = (Nonce::derive(&[b"test"]), EvidenceGate::not_calibrated());
    answer_over(generator, QUESTION, &hits(), &gate, (policy, &nonce, 1)).unwrap()
}

/// States of the steps with their places and reasons.
fn states(outcome: &AskOutcome) -> Vec<(usize, &'static str, Option<&'static str>)> {
    outcome.step_records().iter().map(|it| (it.step, it.state, it.reason)).collect()
}

fn collapse(outcome: &AskOutcome) -> (usize, StepFault) {
    match outcome.refusal {
        Some(RefusalReason::LogicCollapse { step, fault, rollbacks: MAX_ROLLBACKS, .. }) => {
            (step, fault)
        }
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn steps_that_stand_are_the_answer_and_each_begins_behind_them() {
    let generator = Scripted::new(&[&format!("{PAGE} ["), &format!(" {ROTATE}"), ""]);
    let outcome = answer(&generator, &stepwise());
    assert_eq!((outcome.text.as_str(), outcome.refusal.as_ref()), (BOTH, None));
    let spans: Vec<&str> =
        outcome.segments.iter().map(|it| &outcome.text[it.text_span.clone()]).collect();
    assert_eq!(spans, ["A page has 256 tokens.", "Rotate the cache every 8192 tokens."]);
    assert_eq!(outcome.cited_share(), Some(1.0));
    let places: Vec<String> = generator.calls().into_iter().map(|(so_far, _)| so_far).collect();
    assert_eq!(places, [String::new(), PAGE.to_owned(), format!("{PAGE} {ROTATE}")]);
    assert_eq!(states(&outcome), [(1, "good", None), (2, "good", None)]);
    assert_eq!(outcome.rollbacks(), None);
    let records = outcome.step_records();
    assert_eq!(records[0].claim.as_deref(), Some("A page has 256 tokens."));
    assert_eq!(records[1].citations, outcome.segments[1].snippet_ids);
    let reply = outcome.reply.unwrap();
    assert_eq!((reply.text, reply.end), (format!("{PAGE} {ROTATE}"), GeneratedEnd::Stop));
    assert!(reply.n_prompt_tokens > records.iter().map(|it| it.tokens.r#in).sum());
}

#[test]
fn g20_an_uncited_step_is_taken_back_and_drawn_anew_with_another_seed() {
    let generator = Scripted::new(&[PAGE, LIE, ROTATE, ""]);
    let outcome = answer(&generator, &stepwise());
    assert_eq!((outcome.text.as_str(), outcome.refusal.as_ref()), (BOTH, None));
    let expected = [(1, "good", None), (2, "rolled_back", Some("uncited")), (2, "good", None)];
    assert_eq!(states(&outcome), expected);
    assert!(outcome.rollbacks().unwrap().contains("step 2: no source supports it"));
    // Nothing of it is left, and the seed is another one.
    let calls = generator.calls();
    assert_eq!(calls[1].0, calls[2].0);
    assert_ne!(calls[1].1, calls[2].1);
    assert_eq!(outcome.step_records()[1].claim, None);
}

#[test]
fn g20_after_two_rollbacks_the_answer_is_refused_and_says_what_is_missing() {
    let generator = Scripted::new(&[PAGE, LIE, LIE, LIE, ROTATE]);
    let outcome = answer(&generator, &stepwise());
    assert_eq!(outcome.text, REFUSAL_TOKEN);
    assert_eq!(collapse(&outcome), (2, StepFault::Uncited));
    let reason = outcome.refusal.as_ref().unwrap();
    assert_eq!(reason.guard(), LOGIC_COLLAPSE);
    let words = reason.in_words();
    assert!(words.starts_with("step 2: no source supports it, after 2 rollbacks;"), "{words}");
    assert!(words.contains("`big`, `warranty`, `cover`"), "{words}");
    assert!(!words.contains("Paris"), "{words}");
    let seeds: BTreeSet<u64> = generator.calls().iter().map(|(_, seed)| *seed).collect();
    assert_eq!(seeds.len(), 4, "no seed twice, and no fifth draw");
    // What is withheld is told by its hash only.
    for record in outcome.step_records() {
        assert_eq!((record.claim, record.claim_sha256.len()), (None, 64));
    }
    assert_eq!(outcome.reply.unwrap().text, format!("{PAGE} {LIE_SAID}"));
}

/// As it stands in what is withheld: without the label that does not hold.
const LIE_SAID: &str = "Paris lies in France.";

/// The mutation: every other guard is on, and half of the sentences have a source.
#[test]
fn mutation_without_g20_an_uncited_step_reaches_the_user() {
    let outcome = answer(&Scripted::new(&[PAGE, LIE, ""]), &unguarded());
    assert_eq!(outcome.refusal, None);
    assert_eq!(outcome.text, format!("A page has 256 tokens. {LIE_SAID}"));
}

#[test]
fn g20_a_step_against_a_rule_is_taken_back() {
    let policy = forbidding(stepwise(), "8192|256.*guard");
    let generator = Scripted::new(&[PAGE, ROTATE, COUNT, "[S2] Rotate the cache.", ""]);
    let outcome = answer(&generator, &policy);
    assert_eq!(outcome.text, "A page has 256 tokens. Rotate the cache.");
    // The second one contradicts with the first one only.
    let fault = StepFault::Contradiction { rule: 1, pattern: 0 };
    let faults: Vec<Option<StepFault>> = outcome.steps.iter().map(|step| step.fault).collect();
    assert_eq!(faults, [None, Some(fault), Some(fault), None]);

    let outcome = answer(&Scripted::new(&[PAGE, ROTATE, ROTATE, ROTATE]), &policy);
    assert_eq!((outcome.text.as_str(), collapse(&outcome)), (REFUSAL_TOKEN, (2, fault)));
    let words = outcome.refusal.unwrap().in_words();
    assert!(words.contains("constraints[1]") && words.contains("keeps the rule"), "{words}");
}

/// The mutation, with the lock of G-31 off, too: it would look at the whole answer.
#[test]
fn mutation_without_g20_a_step_against_a_rule_reaches_the_user() {
    let policy = forbidding(unguarded(), "8192");
    let policy = AskPolicy { constraints: ConstraintCheck::Off, ..policy };
    let outcome = answer(&Scripted::new(&[PAGE, ROTATE, ""]), &policy);
    assert_eq!((outcome.text.as_str(), outcome.refusal), (BOTH, None));
}

#[test]
fn g20_an_invented_source_is_no_step() {
    let outcome =
        answer(&Scripted::new(&[PAGE, "[S9] Rotate the cache.", ROTATE, ""]), &stepwise());
    assert_eq!(outcome.text, BOTH);
    assert_eq!(states(&outcome)[1], (2, "rolled_back", Some("unknown_citation")));
}

#[test]
fn g20_a_repetition_is_taken_back_and_without_the_guard_is_told() {
    let again = "[S1] The pages: 256 tokens!";
    let outcome = answer(&Scripted::new(&[PAGE, ROTATE, again, ""]), &stepwise());
    assert_eq!(outcome.text, BOTH);
    assert_eq!(outcome.steps[2].fault, Some(StepFault::Repetition { of: 1 }));
    // A denial is another claim, as far as words tell.
    let denied = "[S1] A page has not 256 tokens.";
    let outcome = answer(&Scripted::new(&[PAGE, denied, ""]), &stepwise());
    assert_eq!(states(&outcome)[1], (2, "good", None));

    let outcome = answer(&Scripted::new(&[PAGE, ROTATE, again, ""]), &unguarded());
    assert_eq!(outcome.text, format!("{BOTH} The pages: 256 tokens!"));
}

/// Three steps that have no snippet and no word of their own, none of them a repetition.
const IDLE: [&str; 3] =
    ["[S2] Rotate the cache.", "[S1] A page has tokens.", "[S2] The tokens: cache."];

#[test]
fn g20_three_steps_with_nothing_new_are_a_stall_and_go_back_to_the_last_one_that_moved() {
    let [first, second, third] = IDLE;
    let generator = Scripted::new(&[PAGE, ROTATE, first, second, LIE, third, COUNT, ""]);
    let outcome = answer(&generator, &stepwise());
    assert_eq!(outcome.text, format!("{BOTH} The guard counts each rollback."));
    let stalled = |place| (place, "stalled", Some("nothing_new"));
    let expected = [
        (1, "good", None),
        (2, "good", None),
        stalled(3),
        stalled(4),
        (5, "rolled_back", Some("uncited")),
        stalled(5),
        (3, "good", None),
    ];
    assert_eq!(states(&outcome), expected);
    assert_eq!(generator.calls()[6].0, format!("{PAGE} {ROTATE}"));

    // Two of them are none.
    let outcome = answer(&Scripted::new(&[PAGE, ROTATE, first, second, COUNT, ""]), &stepwise());
    assert!(outcome.steps.iter().all(|step| step.fault.is_none()), "{:?}", states(&outcome));

    // The mutation: the answer that does not move reaches the user.
    let outcome = answer(&Scripted::new(&[PAGE, ROTATE, first, second, third, ""]), &unguarded());
    assert!(outcome.text.ends_with("The tokens: cache."), "{}", outcome.text);
}

#[test]
fn g20_where_nothing_new_comes_again_and_again_the_answer_is_what_stands() {
    let replies: Vec<&str> =
        [PAGE, ROTATE].into_iter().chain(IDLE.into_iter().cycle().take(9)).collect();
    let outcome = answer(&Scripted::new(&replies), &stepwise());
    assert_eq!((outcome.text.as_str(), outcome.refusal.as_ref()), (BOTH, None));
    assert_eq!(outcome.steps.last().unwrap().fault, Some(StepFault::NothingNew));
    let generator = Scripted::new(&[PAGE, PAGE, PAGE, PAGE, ROTATE]);
    let outcome = answer(&generator, &stepwise());
    assert_eq!(outcome.text, "A page has 256 tokens.");
    assert_eq!(generator.calls().len(), 4, "it goes back no third time");
    assert!(outcome.rollbacks().unwrap().contains("step 2: it says again what step 1 says"));
    // One that has no source is more than that, whatever stood before.
    let outcome = answer(&Scripted::new(&[PAGE, PAGE, PAGE, LIE]), &stepwise());
    assert_eq!(collapse(&outcome), (2, StepFault::Uncited));
}

#[test]
fn g20_a_step_that_loops_is_a_stall() {
    let looped = |text| (text, GeneratedEnd::Looped);
    let stop = |text| (text, GeneratedEnd::Stop);
    let generator = Scripted::ending(&[
        stop(PAGE),
        looped("[S2] Rotate the cache the cache"),
        stop(""),
        stop(""),
    ]);
    let outcome = answer(&generator, &stepwise());
    assert_eq!(outcome.text, "A page has 256 tokens.");
    assert_eq!(states(&outcome)[1], (2, "stalled", Some("looped")));
    let all = [looped("[S2] Rotate the cache the cache"); 3];
    let outcome = answer(&Scripted::ending(&all), &stepwise());
    assert_eq!(collapse(&outcome), (1, StepFault::Looped));
    assert_eq!(outcome.reply.unwrap().end, GeneratedEnd::Looped);
}

#[test]
fn a_step_that_the_budget_cut_is_left_out_unless_it_is_all_there_is() {
    for (cut, end) in [
        ("[S2] Rotate the cache.", GeneratedEnd::Closed),
        ("[S2] Rotate the", GeneratedEnd::Length),
    ] {
        let generator = Scripted::ending(&[(PAGE, GeneratedEnd::Stop), (cut, end)]);
        let outcome = answer(&generator, &stepwise());
        assert_eq!(
            (outcome.text.as_str(), outcome.refusal.as_ref()),
            ("A page has 256 tokens.", None)
        );
        assert_eq!(states(&outcome)[1], (2, "cut", Some("cut")));
        assert_eq!(outcome.rollbacks(), None, "nothing went wrong with what it says");
        assert_eq!(outcome.reply.unwrap().end, end);
    }
    let alone = [("[S2] Rotate the cache.", GeneratedEnd::Closed), ("", GeneratedEnd::Length)];
    assert_eq!(answer(&Scripted::ending(&alone), &stepwise()).text, "Rotate the cache.");
}

#[test]
fn an_answer_ends_at_its_last_step_without_another_draw() {
    let generator = Scripted::new(&[PAGE, ROTATE, COUNT]);
    let policy = AskPolicy { steps: Some(StepPolicy::new(2)), ..AskPolicy::default() };
    let outcome = answer(&generator, &policy);
    assert_eq!((outcome.text.as_str(), generator.calls().len()), (BOTH, 2));
    assert_eq!(outcome.reply.unwrap().end, GeneratedEnd::Length);
}

#[test]
fn a_first_step_that_is_the_refusal_or_nothing_refuses() {
    let refused = |reply| answer(&Scripted::new(&[reply]), &stepwise()).refusal;
    assert_eq!(refused(REFUSAL_TOKEN), Some(RefusalReason::Model));
    assert_eq!(refused(""), Some(RefusalReason::EmptyReply));
    // A later one is a step that nothing supports.
    let outcome = answer(&Scripted::new(&[PAGE, REFUSAL_TOKEN, ""]), &stepwise());
    assert_eq!(states(&outcome)[1], (2, "rolled_back", Some("uncited")));
}

#[test]
fn of_several_sentences_the_first_one_is_the_step() {
    let generator =
        Scripted::new(&["[S1] A page has 256 tokens. Paris. [S2] Rotate the cache.", ""]);
    let outcome = answer(&generator, &stepwise());
    assert_eq!(outcome.text, "A page has 256 tokens.");
    assert_eq!(generator.calls()[1].0, PAGE);
}

/// What the next step is drawn behind has the labels that hold, whoever named them.
#[test]
fn a_label_that_does_not_hold_is_not_in_the_checkpoint() {
    let generator = Scripted::new(&["[S1] Rotate the cache every 8192 tokens.", ""]);
    let outcome = answer(&generator, &stepwise());
    assert_eq!(generator.calls()[1].0, ROTATE);
    assert_eq!(outcome.segments[0].citation_source, Some(CitationSource::Attributed));
}

#[test]
fn g21_steps_that_repeat_the_system_message_are_refused() {
    let leaking = "[S1] A page has 256 tokens, answer questions from the given sources only, \
                   read the sources, then answer the question in one to three short sentences.";
    let policy = AskPolicy { min_label_containment: 0.1, ..stepwise() };
    let outcome = answer(&Scripted::new(&[leaking, ""]), &policy);
    assert_eq!(outcome.refusal, Some(RefusalReason::Leak));
    assert_eq!(outcome.step_records()[0].claim, None);
}

#[test]
fn every_fault_has_a_name_and_a_state_by_it() {
    for code in [
        "unknown_citation",
        "uncited",
        "contradiction",
        "repetition",
        "looped",
        "nothing_new",
        "cut",
    ] {
        assert_eq!(StepFault::of_code(code).map(StepFault::code), Some(code));
    }
    assert_eq!(StepFault::of_code("good"), None);
}

proptest::proptest! {
    /// G-20 R: no blind retry of the same seed.
    #[test]
    fn g20_no_two_draws_of_an_answer_have_one_seed(seed: u64, a in 0usize..1000, b in 0usize..1000) {
        proptest::prop_assume!(a != b);
        proptest::prop_assert_ne!(step_seed(seed, a), step_seed(seed, b));
    }
}
