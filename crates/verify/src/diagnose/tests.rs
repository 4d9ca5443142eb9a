//! Diagnoses of fakes, and what the renderers make of them.

use exrail_retrieval::{Hit, SearchOptions};

use super::*;
use crate::fakes::{Altered, FakeIndex, corpus};
use crate::render::Color;
use crate::sound::{LARGE, cache, of_index, quant, sound};
use crate::system::Retrieve;

/// What an index finds some of whose vectors are another encoder's.
fn mixed(index: &FakeIndex, question: &str, options: &SearchOptions) -> Vec<Hit> {
    let mut hits = index.search(question, options).unwrap();
    for hit in hits.iter_mut().filter(|hit| hit.chunk.span.start == 0) {
        hit.cosine *= 0.8;
    }
    hits
}

#[test]
fn a_sound_system_passes_in_every_part_and_needs_no_fix() {
    let found = diagnose(sound());
    assert_eq!(found.verdict, Verdict::Pass, "{}", found.render_text(100, Color::Never));
    assert_eq!((found.failed_gates.len(), &found.fix), (0, &None));
    let quant = found.quantisation.value().unwrap();
    assert_eq!((quant.retrieval_bit_equal, &quant.attribution), (Some(true), &None));
    let json = found.to_json().unwrap();
    assert_eq!(json["quantisation"]["int4"]["kld_mean"], 0.02);
    assert_eq!(json["quantisation"]["int8"]["lambda_flip"], 0.0);
    assert_eq!(json["quantisation"]["int8"]["e_res_tost"], Value::Null);
    let reasons = &json["quantisation"]["int8"]["reasons"];
    assert!(reasons["e_res_tost"].is_string(), "a null has a reason");
    assert_eq!(reasons["lambda_flip"], Value::Null, "a value has none");
    assert_eq!(json["quantisation"]["as_served"]["status"], "not_available");
    assert_eq!(json["cache"]["first_fault"], Value::Null);
    assert_eq!(json["cache"]["tokens_until_drift"], ">= 2048");
    assert_eq!(json["question"]["status"], "not_available");
    assert_eq!(json["e_resonance"]["status"], "inconclusive");
}

#[test]
fn limits_that_hold_for_no_model_of_this_size_let_nothing_pass() {
    let parts = Parts { quant: quant(Status::NotCalibrated, 135_000_000), ..sound() };
    let found = diagnose(parts);
    assert_eq!(found.verdict, Verdict::Inconclusive);
    let gate = found.gates.iter().find(|gate| gate.name == "quant_int4_kld_mean").unwrap();
    assert!(gate.measured.reason.as_ref().unwrap().contains("this one has 0.14"), "{gate:?}");
}

#[test]
fn what_was_not_measured_lets_nothing_pass() {
    let unmeasured = Parts { cache: Section::missing("no text"), ..sound() };
    assert_eq!(diagnose(unmeasured).verdict, Verdict::Inconclusive);
    let unmeasured = Parts { quant: Section::missing("no text"), ..sound() };
    assert_eq!(diagnose(unmeasured).verdict, Verdict::Inconclusive);
}

#[test]
fn a_drifting_cache_fails_and_is_named_although_answers_are_good() {
    let found = diagnose(Parts { cache: cache(Some(CacheFault::CacheDrift)), ..sound() });
    assert_eq!(
        (found.verdict, found.failed_gates.as_slice()),
        (Verdict::Fail, &["cache_oracle"][..])
    );
    let fix = found.fix.unwrap();
    assert_eq!((fix.page, fix.then[0]), ("context-drift", "entropy-collapse"));
}

#[test]
fn rounding_that_costs_too_much_is_attributed_to_answers() {
    let found = diagnose(Parts { quant: quant(Status::Fail, LARGE), ..sound() });
    assert_eq!(found.fix.unwrap().page, "quantisation-drift");
    let attribution = found.quantisation.value().unwrap().attribution.clone().unwrap();
    assert_eq!(attribution.cause, SpikeCause::Answers);
}

#[test]
fn vectors_of_another_encoder_are_found_and_without_the_check_they_are_not() {
    let index = corpus();
    let index = Altered::new(&index, mixed);
    let parts = of_index(&index);
    assert!(parts.vectors.pairs_differ > 0, "{:?}", parts.vectors);
    let blind = Parts { vectors: VectorCheck::default(), ..of_index(&index) };
    let found = diagnose(parts);
    let attribution = found.quantisation.value().unwrap().attribution.clone().unwrap();
    assert_eq!(attribution.cause, SpikeCause::Encoder);
    assert_eq!(found.fix.unwrap().reason, "vectors of the index are not those of this encoder");
    // The fault reaches the user: with the check off the report blames something else, or nothing.
    let found = diagnose(blind);
    assert!(found.fix.is_none_or(|fix| !fix.reason.contains("vectors of the index")));
}

#[test]
fn chunks_that_count_otherwise_are_a_matter_of_the_tokenizer() {
    let mut parts = sound();
    parts.vectors.chunks_differ = 2;
    let found = diagnose(parts);
    assert_eq!(found.fix.unwrap().page, "tokenizer-drift");
}

#[test]
fn a_far_question_has_a_fix_even_when_every_gate_passes() {
    let mut parts = sound();
    let delta_s =
        GateReading::Calibrated { raw_min: 0.9, cal_min: 0.7, cal_mean: 0.8, band: Band::Fail };
    parts.question = Some(("sha".to_owned(), QuestionSection { delta_s, snippets: Vec::new() }));
    let found = diagnose(parts);
    assert_eq!((found.verdict, found.fix.unwrap().page), (Verdict::Pass, "retrieval-playbook"));
    assert_eq!(
        found.quantisation.value().unwrap().attribution.as_ref().unwrap().cause,
        SpikeCause::Corpus
    );
}

#[test]
fn a_stranger_who_gets_through_is_named_before_retrieval() {
    let mut parts = sound();
    parts.injection = Section::Ok(InjectionSection {
        trials: 180,
        control_tokens: 1,
        hijacks: 0,
        leaks: 0,
        upper_95: 0.03,
    });
    let found = diagnose(parts);
    assert_eq!((found.verdict, found.fix.unwrap().page), (Verdict::Fail, "prompt-injection"));
}

#[test]
fn the_terminal_report_ends_with_the_verdict() {
    let text = diagnose(sound()).render_text(100, Color::Never);
    assert!(text.trim_end().lines().last().unwrap().starts_with("verdict: pass"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 112), "{text}");
    for part in ["ΔS", "λ", "widths", "cache", "boot", "injection", "NOT MEASURED HERE"] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn junit_fails_what_fails_skips_what_is_undecided_and_is_green_for_a_pass_alone() {
    let xml = diagnose(sound()).render_junit();
    assert!(xml.contains("failures=\"0\"") && !xml.contains("<failure"), "{xml}");
    let undecided = diagnose(Parts { quant: quant(Status::NotCalibrated, 1), ..sound() });
    let xml = undecided.render_junit();
    assert!(xml.contains("<skipped message=\"not calibrated: int8"), "{xml}");
    assert!(xml.contains("name=\"verdict\"><failure message=\"inconclusive\""), "{xml}");
    assert!(xml.contains("failures=\"1\""), "only the verdict: {xml}");
    let failed = diagnose(Parts { cache: cache(Some(CacheFault::CacheDrift)), ..sound() });
    let xml = failed.render_junit();
    assert!(
        xml.contains("name=\"cache_oracle\"><failure") && xml.contains("failures=\"2\""),
        "{xml}"
    );
}

#[test]
fn a_hostile_name_stays_text() {
    let mut parts = sound();
    parts.report.config.model = "<script>\"&'\u{1}]]>".to_owned();
    let found = diagnose(parts);
    for text in [found.render_junit(), found.render_html()] {
        assert!(text.contains("&lt;script&gt;&quot;&amp;&#39;\u{fffd}]]&gt;"), "{text}");
        assert!(!text.contains("<script") && !text.contains('\u{1}'));
    }
}

#[test]
fn the_page_needs_nothing_from_elsewhere_and_shows_every_plot() {
    let html = diagnose(sound()).render_html();
    for forbidden in ["<script", "http:", "https:", "src=", "@import", "url("] {
        assert!(!html.contains(forbidden), "{forbidden}");
    }
    assert_eq!(html.matches("<svg").count(), 4, "ΔS, KLD, NLL, cache");
    assert_eq!(html.matches("role=\"img\" aria-label=").count(), 4);
    assert_eq!(html.matches("</svg>").count(), 4);
    assert!(html.contains("prefers-color-scheme:dark"));
    // No number was lost on its way into a picture.
    assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
}

#[test]
fn a_page_without_measurements_says_so() {
    let parts =
        Parts { cache: Section::missing("no text"), quant: Section::missing("no text"), ..sound() };
    let html = diagnose(parts).render_html();
    assert_eq!(html.matches("Not measured in this run.").count(), 3, "KLD, NLL, cache");
}
