//! G-20 from outside: answers that are made step by step, on a real engine.

use std::collections::BTreeSet;

use axum::http::StatusCode;
use exrail_engine::Sampling;
use exrail_grammar::Source;
use exrail_retrieval::Hit;
use exrail_server::{
    Services,
    pipeline::{AnswerLock, EngineGenerate},
};
use exrail_text::Specials;
use exrail_verify::{
    AskPolicy, Generate, Live, Nonce, PromptFrame, parse_answer, retrieve, step_lark,
};
use serde_json::{Value, json};

use crate::support::{MODEL, Server, services, warm};

const QUESTION: &str = "Where is the spare key of cabinet B?";
const FIRST: &str = "[S1] The spare key lies in the red box.";

fn frame(services: &Services) -> PromptFrame {
    let index = services.collections["cabinets"].index();
    let hits: Vec<Hit> = retrieve(index, QUESTION, &AskPolicy::default()).unwrap();
    PromptFrame::new(QUESTION, Live::new(&hits), &Nonce::derive(&[b"x"])).unwrap()
}

/// Makes the model cite the first source for sentences of these words, as often as it is biased to, and end when it
/// likes.
fn babbling(server: &Server, words: &[(&str, f64)]) -> Value {
    let engine = server.state.services().unwrap().engine.clone();
    let tokenizer = engine.tokenizer();
    let id = |text: &str| *tokenizer.encode(text, Specials::AsText).unwrap().last().unwrap();
    let words = words.iter().chain(&[(".", 100.0), ("[", 100.0)]);
    let words = words.map(|(text, bias)| (id(text).to_string(), json!(bias)));
    let label = [(id("1").to_string(), json!(50))];
    let ends = tokenizer.eos_ids().iter().take(1).map(|id| (id.to_string(), json!(99)));
    words.chain(label).chain(ends).collect::<serde_json::Map<_, _>>().into()
}

fn states(steps: &Value) -> Vec<&str> {
    steps.as_array().unwrap().iter().map(|step| step["state"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn g20_steps_are_told_and_recorded_and_what_does_not_stand_is_drawn_anew() {
    let server = warm(&[], None);
    // The first source names a cabinet `B`, and nothing of the others; a blank begins the next step.
    let bias = babbling(&server, &[(" b", 100.0), (" w", 98.0), (" c", 98.0), (" ", 99.0)]);
    let (mut n_grown, mut n_healed, mut n_refused) = (0, 0, 0);
    for seed in 1..=24 {
        let body = json!({"question": QUESTION, "steps": 4, "seed": seed, "temperature": 1,
            "top_p": 1, "logit_bias": bias});
        let answer = server.post("/v1/ask", &body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        let json = answer.json();
        let steps = json["steps"].as_array().unwrap();
        let seeds: BTreeSet<u64> = steps.iter().map(|it| it["seed"].as_u64().unwrap()).collect();
        assert_eq!(seeds.len(), steps.len(), "{json}");
        // The prompt is a page at least, and from the first draw on it is in the cache.
        let cached = |step: &Value| step["tokens"]["cached"].as_u64().unwrap();
        assert!(steps.iter().skip(1).all(|step| cached(step) >= 256), "{json}");
        let states = states(&json["steps"]);
        let has_collapsed = states.iter().any(|state| ["rolled_back", "stalled"].contains(state));
        if json["refusal"] == true {
            n_refused += usize::from(has_collapsed);
            assert!(steps.iter().all(|step| step["claim"].is_null()), "{json}");
        } else {
            let claims: Vec<&str> = steps.iter().filter_map(|it| it["claim"].as_str()).collect();
            assert_eq!(json["answer"], claims.join(" "), "{json}");
            n_healed += usize::from(has_collapsed);
            n_grown += usize::from(claims.len() > 1);
        }
        // The log's own check compares the steps with the answer.
        let lines = server.trace_lines();
        let record = lines.last().unwrap();
        assert_eq!((&record["event"], &record["steps"]), (&json!("answer.decide"), &json["steps"]));
        let fired = lines
            .iter()
            .any(|line| line["trace_id"] == json["trace_id"] && line["guard"] == "logic_collapse");
        assert_eq!(fired, has_collapsed, "{json}");
    }
    assert!(n_grown > 0 && n_healed > 0 && n_refused > 0, "{n_grown} {n_healed} {n_refused}");
    let metrics = server.get("/metrics").await.text;
    let n_fired = n_healed + n_refused;
    assert!(
        metrics
            .contains(&format!("exrail_guard_fired_total{{guard=\"logic_collapse\"}} {n_fired}\n"))
    );
}

#[tokio::test]
async fn a_grounded_chat_tells_its_steps_and_an_answer_that_is_made_whole_has_none() {
    let server = warm(&[], None);
    let bias = babbling(&server, &[(" w", 100.0)]);
    let chat = |grounding: Value| {
        json!({"model": MODEL, "exrail": grounding, "logit_bias": bias,
            "messages": [{"role": "user", "content": QUESTION}]})
    };
    let path = "/v1/chat/completions";
    let stepped =
        server.post(path, &chat(json!({"collection": "cabinets", "steps": 2}))).await.json();
    // No source has its word: three draws of the first step.
    let grounded = &stepped["exrail"];
    assert_eq!(states(&grounded["steps"]), ["rolled_back"; 3], "{stepped}");
    let reason = grounded["reason"].as_str().unwrap();
    assert!(reason.starts_with("step 1: ") && reason.contains("after 2 rollbacks"), "{reason}");
    let whole = server.post(path, &chat(json!({"collection": "cabinets"}))).await.json();
    assert!(whole["exrail"].get("steps").is_none(), "{whole}");
    let whole = server.post("/v1/ask", &json!({"question": QUESTION})).await.json();
    assert!(whole.get("steps").is_none(), "{whole}");
    assert!(server.trace_lines().last().unwrap().get("steps").is_none());
    for steps in [json!(0), json!(9), json!("two"), json!(-1)] {
        let ask = server.post("/v1/ask", &json!({"question": QUESTION, "steps": steps})).await;
        let chat =
            server.post(path, &chat(json!({"collection": "cabinets", "steps": steps}))).await;
        for answer in [ask, chat] {
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{steps}: {}", answer.text);
            assert!(answer.text.contains("steps"), "{}", answer.text);
        }
    }
}

/// Pages that a step shares with those before it are found, more of them as the answer grows.
#[test]
fn g20_the_checkpoint_of_a_step_is_in_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let services = services(folder.path());
    let frame = frame(&services);
    let generator = EngineGenerate::new(&services.engine, Sampling::greedy(), 1000);
    let n_cached =
        |so_far: &str| generator.generate_step(&frame, so_far, 1).unwrap().n_cached_tokens;
    let first = [FIRST; 12].join(" ");
    let found = [n_cached(""), n_cached(&first), n_cached(&format!("{first} {FIRST}"))];
    assert_eq!(found[0], 0);
    assert!(found[1] >= 256, "the prompt: {found:?}");
    assert!(found[2] >= found[1] + 256, "and what stands behind it: {found:?}");
}

/// What was said before counts for the budget of an answer.
#[test]
fn a_step_has_what_the_steps_before_it_left_of_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let services = services(folder.path());
    let frame = frame(&services);
    let n_said = services.engine.tokenizer().encode(FIRST, Specials::AsText).unwrap().len();
    let step = |max_tokens: usize| {
        let generator = EngineGenerate::new(&services.engine, Sampling::greedy(), max_tokens);
        let step = generator.locked(AnswerLock::Off).generate_step(&frame, FIRST, 1).unwrap();
        step.n_output_tokens
    };
    assert_eq!((step(n_said), step(n_said - 1)), (0, 0));
    assert!((1..=2).contains(&step(n_said + 2)));
}

/// Whether a text is a step, whole and token by token.
fn is_step(services: &Services, lark: &str, text: &str) -> bool {
    let grammars = services.engine.grammars().unwrap();
    let mut matcher = grammars.compile(&Source::Lark(lark.to_owned())).unwrap().matcher();
    let ids = services.engine.tokenizer().encode(text, Specials::AsText).unwrap();
    ids.into_iter().all(|id| matcher.advance(id).is_ok()) && matcher.is_complete()
}

#[test]
fn g20_a_step_is_one_sentence_or_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let services = services(folder.path());
    let frame = frame(&services);
    let live = frame.live();
    let first = step_lark(live, "");
    let next = step_lark(live, FIRST);
    for sentence in [
        "[S1] It lies there.",
        "[S2] It costs 0.45 coins, e.g. for B, or vs. A?",
        "[S1] e.g. this one!",
        "[S1] 1. Warm it up.",
        "[S1] He said \"Stop.\" and went.",
        "[S1] So?! [",
        "[S1] So it is.\n[",
        "[S1] So it is. ",
    ] {
        assert!(is_step(&services, &first, sentence), "{sentence}");
        assert!(is_step(&services, &next, &format!(" {sentence}")), "{sentence}");
        let parsed = parse_answer(sentence.trim_end_matches([' ', '[', '\n']), live);
        assert_eq!((parsed.segments.len(), parsed.unknown_citations.len()), (1, 0), "{sentence}");
    }
    for other in [
        "It lies there.",
        "[S1] It lies there. It is red.",
        "[S1] It lies there. [S2] It is red.",
        "[S1] So?! Yes.",
        "[S3] It lies there.",
        "[S1][S2] It lies there.",
        "[S1] It lies (S2) there.",
        "[S1] ...",
        "[S1] It lies",
    ] {
        assert!(!is_step(&services, &first, other), "{other}");
        assert!(!is_step(&services, &next, &format!(" {other}")), "{other}");
    }
    assert!(is_step(&services, &first, "not in context") && !is_step(&services, &first, ""));
    assert!(is_step(&services, &next, "") && !is_step(&services, &next, " not in context"));
}
