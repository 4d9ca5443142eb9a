//! G-31: hard rules of a request are in the tokens that the engine gets, stay there, and no answer that they forbid
//! leaves. A bias makes the model say one token for ever, and that is what a rule forbids.

use axum::http::StatusCode;
use exrail_testkit::CHAT_TEMPLATE;
use exrail_text::Specials;
use serde_json::{Value, json};

use crate::support::{Answer, MODEL, Server, endless, events, warm, warm_speaking};

const CHAT: &str = "/v1/chat/completions";
const WORD: &str = " the";

/// A bias that lets the model say nothing else.
fn obeying(server: &Server) -> Value {
    let engine = server.state.services().unwrap().engine.clone();
    let ids = engine.tokenizer().encode(WORD, Specials::AsText).unwrap();
    json!({ ids[0].to_string(): 100 })
}

fn chat(server: &Server, more: &Value) -> Value {
    let mut body = json!({"model": MODEL, "max_tokens": 24, "temperature": 0,
        "logit_bias": obeying(server),
        "messages": [{"role": "user", "content": "What does it cost?"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Rules of which the second one forbids what the model says.
fn forbidding() -> Value {
    json!({"constraints": ["Be kind.", {"text": "Never say it twice.", "forbid": ["xyz", "the the"]}]})
}

fn streamed(body: &Value) -> Value {
    let mut body = body.clone();
    body["stream"] = json!(true);
    body
}

/// The text and the calls that a stream told, and its last event.
fn told(answer: &Answer) -> (String, usize, String) {
    let events = events(&answer.text);
    let (mut text, mut n_calls) = (String::new(), 0);
    for event in events.iter().filter(|event| **event != "[DONE]") {
        let event: Value = serde_json::from_str(event).unwrap();
        let delta = &event["choices"][0]["delta"];
        text.push_str(delta["content"].as_str().unwrap_or_default());
        n_calls += delta["tool_calls"].as_array().map_or(0, Vec::len);
    }
    (text, n_calls, (*events.last().unwrap()).to_owned())
}

async fn content(server: &Server, body: &Value) -> Value {
    let answer = server.post(CHAT, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    answer.json()["choices"][0]["message"]["content"].clone()
}

fn refused(answer: &Answer, rule: &str) {
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", answer.text);
    assert_eq!(answer.code(), "constraint_contradiction", "{}", answer.text);
    assert_eq!(answer.json()["error"]["param"], rule, "{}", answer.text);
}

#[tokio::test]
async fn g31_an_answer_against_a_rule_is_refused_and_traced_with_its_rule() {
    let server = warm(&[], None);
    let answer = server.post(CHAT, &chat(&server, &forbidding())).await;
    refused(&answer, "constraints[1]");
    assert!(answer.text.contains("forbid[1]"), "{}", answer.text);
    assert!(!answer.text.contains("the the"), "{}", answer.text);
    let traced = server.trace_lines();
    let fired = traced.iter().find(|line| line["guard"] == "constraint_contradiction").unwrap();
    assert_eq!(fired["event"], "guard.fire");
    let detail = fired["detail"].as_str().unwrap();
    assert!(detail.contains("constraints[1]") && detail.contains("nli not_available"), "{detail}");
    let metrics = server.get("/metrics").await.text;
    assert!(metrics.contains("exrail_guard_fired_total{guard=\"constraint_contradiction\"} 1\n"));
}

#[tokio::test]
async fn g31_a_stream_tells_nothing_of_what_a_rule_forbids() {
    let server = warm(&[], None);
    let mut body = streamed(&chat(&server, &forbidding()));
    body["max_tokens"] = json!(1000);
    let answer = server.post(CHAT, &body).await;
    assert_eq!(answer.status, StatusCode::OK);
    let (text, _, last) = told(&answer);
    assert!(!text.contains("the the"), "{text}");
    let last: Value = serde_json::from_str(&last).unwrap();
    assert_eq!(last["error"]["code"], "constraint_contradiction", "{last}");
    assert_eq!(last["error"]["param"], "constraints[1]");
    let traced = server.trace_lines();
    let fired = traced.iter().filter(|line| line["guard"] == "constraint_contradiction");
    assert_eq!(fired.count(), 1);
    let end = traced.last().unwrap();
    assert_eq!(end["finish_reason"], "constraint_contradiction");
    assert!(end["tokens"]["out"].as_u64().unwrap() < 1000, "nobody gets what follows: {end}");
}

/// The mutation: without its patterns the same rule is told to the model, and the answer against it reaches the user.
#[tokio::test]
async fn mutation_g31_without_patterns_the_answer_against_the_rule_reaches_the_user() {
    let server = warm(&[], None);
    for more in [json!({"constraints": ["Be kind.", "Never say it twice."]}), json!({})] {
        let body = chat(&server, &more);
        assert_eq!(content(&server, &body).await, WORD.repeat(24).as_str());
        let (text, _, last) = told(&server.post(CHAT, &streamed(&body)).await);
        assert_eq!((text.as_str(), last.as_str()), (&*WORD.repeat(24), "[DONE]"));
    }
}

#[tokio::test]
async fn g31_an_answer_that_keeps_the_rules_is_whole_and_its_record_names_them() {
    let server = warm(&[], None);
    for pattern in ["price", "p.*rice", r"(?i)\bTHE price\b"] {
        let rules = json!({"constraints": [{"text": "Name no price.", "forbid": [pattern]}]});
        let body = chat(&server, &rules);
        assert_eq!(content(&server, &body).await, WORD.repeat(24).as_str());
        let (text, _, last) = told(&server.post(CHAT, &streamed(&body)).await);
        assert_eq!((text.as_str(), last.as_str()), (&*WORD.repeat(24), "[DONE]"), "{pattern}");
        let record = server.trace_lines().last().unwrap()["constraints"].clone();
        assert_eq!((&record["n_rules"], &record["n_patterns"]), (&json!(1), &json!(1)));
        assert_eq!((&record["echo"], &record["nli"]), (&json!("equal"), &json!("not_available")));
        assert_eq!(record["sha256"].as_str().unwrap().len(), 64);
    }
    // The hash says nothing of the order.
    let hash = async |list: Value| {
        content(&server, &chat(&server, &json!({"constraints": list}))).await;
        server.trace_lines().last().unwrap()["constraints"]["sha256"].clone()
    };
    assert_eq!(
        hash(json!(["Be kind.", "Be brief."])).await,
        hash(json!(["Be brief.", "Be kind."])).await
    );
    assert_ne!(hash(json!(["Be kind."])).await, hash(json!(["Be brief."])).await);
}

#[tokio::test]
async fn g31_the_exact_refusal_is_a_success_whatever_a_rule_forbids() {
    let server = warm(&[], None);
    let body = |regex: &str| {
        let rules = json!([{"text": "Say nothing of it.", "forbid": ["context"]}]);
        json!({"model": MODEL, "max_tokens": 60, "temperature": 0, "regex": regex, "constraints": rules,
            "messages": [{"role": "user", "content": "x"}]})
    };
    assert_eq!(content(&server, &body("not in context")).await, "not in context");
    let (text, _, last) = told(&server.post(CHAT, &streamed(&body("not in context"))).await);
    assert_eq!((text.as_str(), last.as_str()), ("not in context", "[DONE]"));
    refused(&server.post(CHAT, &body("not in contexts")).await, "constraints[0]");
    let (text, _, last) = told(&server.post(CHAT, &streamed(&body("not in contexts"))).await);
    assert!(
        !text.contains("context") && last.contains("constraint_contradiction"),
        "{text} {last}"
    );
}

/// Arguments of calls are read as they mean, and a call that a rule forbids is not told, in a stream neither.
#[tokio::test]
async fn g31_no_call_and_no_value_that_a_rule_forbids_leaves() {
    let server = warm(&[], None);
    let parameters = json!({"type": "object", "properties": {"color": {"enum": ["red", "blue"]}},
        "required": ["color"]});
    let function = json!({"name": "paint", "parameters": parameters});
    let call = |forbid: &str| {
        json!({"model": MODEL, "max_tokens": 200, "seed": 4,
            "messages": [{"role": "user", "content": "x"}], "tool_choice": "required",
            "tools": [{"type": "function", "function": function}],
            "constraints": [{"text": "Use no color.", "forbid": [forbid]}]})
    };
    let value = |forbid: &str| {
        json!({"model": MODEL, "max_tokens": 200, "json_schema": {"enum": ["a price", "a prize"]},
            "messages": [{"role": "user", "content": "x"}],
            "constraints": [{"text": "Name no price.", "forbid": [forbid]}]})
    };
    for body in [call("^(red|blue)$"), value("^a pri[cz]e$")] {
        refused(&server.post(CHAT, &body).await, "constraints[0]");
        let (text, n_calls, last) = told(&server.post(CHAT, &streamed(&body)).await);
        assert_eq!((text.as_str(), n_calls), ("", 0), "{last}");
        assert!(last.contains("constraint_contradiction"), "{last}");
    }
    // The mutation: with patterns of something else both leave.
    for body in [call("green"), value("green")] {
        assert_eq!(server.post(CHAT, &body).await.status, StatusCode::OK);
        let (text, n_calls, last) = told(&server.post(CHAT, &streamed(&body)).await);
        assert!(text.contains("a pri") || n_calls > 0, "{last}");
        assert_eq!(last, "[DONE]");
    }
}

#[tokio::test]
async fn g31_rules_that_cannot_be_kept_are_refused_by_place() {
    let server = warm(&[], None);
    let cases = [
        (json!("Be kind."), "constraints"),
        (json!([]), "constraints"),
        (json!(vec!["x"; 17]), "constraints"),
        (json!(["x", 3]), "constraints[1]"),
        (json!(["one\n- two"]), "constraints[0].text"),
        (json!(["x".repeat(513)]), "constraints[0].text"),
        (json!([{"text": "x", "forbid": ["a", "(b"]}]), "constraints[0].forbid[1]"),
        (json!([{"text": "x", "forbid": ["a*"]}]), "constraints[0].forbid[0]"),
        (json!([{"text": "x", "forbid": [r"(.)\1"]}]), "constraints[0].forbid[0]"),
        (json!([{"text": "x", "forbid": [r"((\w{90}){90}){90}"]}]), "constraints"),
        (json!([{"text": "x", "allow": []}]), "constraints[0].allow"),
    ];
    for (constraints, place) in cases {
        let ask = json!({"question": "Where is the key?", "constraints": constraints});
        let chat = chat(&server, &json!({"constraints": constraints}));
        for (path, body) in [(CHAT, chat), ("/v1/ask", ask)] {
            let answer = server.post(path, &body).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body}: {}", answer.text);
            assert_eq!(answer.json()["error"]["param"], place, "{body}: {}", answer.text);
        }
    }
    let text = json!({"model": MODEL, "prompt": "x", "constraints": ["Be kind."]});
    let answer = server.post("/v1/completions", &text).await;
    assert_eq!(answer.json()["error"]["param"], "constraints", "{}", answer.text);
    let mut logprobs = forbidding();
    logprobs["logprobs"] = json!(true);
    let answer = server.post(CHAT, &chat(&server, &logprobs)).await;
    assert_eq!(answer.json()["error"]["param"], "logprobs", "{}", answer.text);
}

async fn prompt_tokens(server: &Server, body: &Value) -> u64 {
    let answer = server.post(CHAT, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    answer.json()["usage"]["prompt_tokens"].as_u64().unwrap()
}

/// A rule is somebody else's text: literals of control tokens in it are letters.
#[tokio::test]
async fn g31_a_rule_never_becomes_a_control_token() {
    let server = warm(&[], None);
    let tokens = async |rule: &str| {
        let body = chat(&server, &json!({"constraints": [rule], "max_tokens": 1}));
        prompt_tokens(&server, &body).await
    };
    assert!(tokens("<|im_end|>").await > tokens("x").await + 5, "letters, and not one token");
}

/// A template that leaves out long messages of the system.
fn dropping() -> String {
    CHAT_TEMPLATE
        .replace("{{ '<|im_start|>' +", "{% if message['role'] != 'system' or message['content']|length < 20 %}{{ '<|im_start|>' +")
        .replace("'\\n' }}{% endfor", "'\\n' }}{% endif %}{% endfor")
}

#[tokio::test]
async fn g31_a_prompt_that_does_not_say_the_rules_is_refused_before_any_token() {
    let server = warm_speaking(&dropping());
    let rule = "Never name the price of the key, whoever asks.";
    let steps = server.state.services().unwrap().engine.counters().steps;
    for stream in [false, true] {
        let more = json!({"constraints": [rule], "stream": stream});
        let answer = server.post(CHAT, &chat(&server, &more)).await;
        assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", answer.text);
        assert_eq!(answer.code(), "constraint_echo");
    }
    assert_eq!(server.state.services().unwrap().engine.counters().steps, steps, "no step");
    assert_eq!(server.trace_lines().last().unwrap()["guard"], "constraint_echo");
    let ask = json!({"question": "Where is the key?", "constraints": [rule]});
    assert_eq!(server.post("/v1/ask", &ask).await.code(), "constraint_echo");
    // The mutation: the same rule without the lock. The user gets an answer that never saw it.
    let user = json!({"role": "user", "content": "What does it cost?"});
    let unlocked = json!({"messages": [{"role": "system", "content": rule}, user]});
    let unlocked = prompt_tokens(&server, &chat(&server, &unlocked)).await;
    assert_eq!(unlocked, prompt_tokens(&server, &chat(&server, &json!({}))).await);
}

fn rotating(server: &Server, more: &Value) -> Value {
    let mut body = json!({"model": MODEL, "max_tokens": 300, "temperature": 0, "logit_bias": endless(server),
        "messages": [{"role": "user", "content": "hello"}],
        "rotation": {"rotate_at": 160, "window": 40}});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// G-16 with G-31: the rules are in the context behind every rotation, as a message of the system and in front of the
/// user's where the template has none.
#[tokio::test]
async fn g31_the_rules_stay_behind_every_rotation() {
    let no_system = CHAT_TEMPLATE.replace(
        "{% for message in messages %}",
        "{% for message in messages if message['role'] != 'system' %}",
    );
    for (server, place) in [
        (warm(&[], None), "<|im_start|>system\nRules:\n- the key\n- of it<|im_end|>\n"),
        (
            warm_speaking(&no_system),
            "<|im_start|>user\nRules:\n- the key\n- of it\n\nhello<|im_end|>\n",
        ),
    ] {
        let rules = json!({"constraints": ["the key", {"text": "of it", "forbid": ["zzzz"]}]});
        let answer = server.post(CHAT, &rotating(&server, &rules)).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        let choice = answer.json()["choices"][0].clone();
        let rotations = choice["rotations"].as_array().unwrap();
        assert!(rotations.len() >= 2, "{choice}");
        let engine = server.state.services().unwrap().engine.clone();
        let n_pinned = engine.tokenizer().encode(place, Specials::Parse).unwrap().len();
        for rotation in rotations {
            assert_eq!(rotation["kept"][0], json!([0, n_pinned]), "{rotation}");
        }
        // The mutation: the same words unlocked, in the user's own message, are dropped by the first rotation.
        let words = json!({"messages": [{"role": "user", "content": "Rules:\n- the key\n- of it\n\nhello"}]});
        let lost = server.post(CHAT, &rotating(&server, &words)).await.json();
        assert_eq!(lost["choices"][0]["rotations"][0]["kept"][0], json!([0, 1]), "{lost}");
    }
}

/// `pin_messages` counts the request's own messages, whatever was written in front of them.
#[tokio::test]
async fn g31_pinned_messages_are_those_of_the_request() {
    let server = warm(&[], None);
    let more = json!({"constraints": ["the key"],
        "rotation": {"rotate_at": 160, "window": 40, "pin_messages": [0]}});
    let answer = server.post(CHAT, &rotating(&server, &more)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let both =
        "<|im_start|>system\nRules:\n- the key<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n";
    let engine = server.state.services().unwrap().engine.clone();
    let n_both = engine.tokenizer().encode(both, Specials::Parse).unwrap().len();
    assert_eq!(answer.json()["choices"][0]["rotations"][0]["kept"][0], json!([0, n_both]));
}

#[tokio::test]
async fn g31_a_grounded_answer_has_its_rules_in_prompt_and_record() {
    let server = warm(&[], None);
    let rules = json!(["Name no price.", {"text": "Be kind.", "forbid": ["[0-9]+ coins"]}]);
    let ask = json!({"question": "Where is the spare key of cabinet B?", "constraints": rules});
    let answer = server.post("/v1/ask", &ask).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let plain = json!({"question": "Where is the spare key of cabinet B?"});
    let without = server.post("/v1/ask", &plain).await.json();
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(tokens(&answer.json()) > tokens(&without) + 10);
    let lines: Vec<Value> =
        server.trace_lines().into_iter().filter(|it| it["event"] == "answer.decide").collect();
    let [locked, free] = &lines[..] else { panic!("{lines:#?}") };
    let told = locked["prompt"]["constraints"].as_array().unwrap();
    assert_eq!(told[told.len() - 2..], [json!("Name no price."), json!("Be kind.")]);
    assert_ne!(locked["prompt"]["constraints_sha256"], free["prompt"]["constraints_sha256"]);
    assert_eq!(locked["constraints"]["echo"], "equal");
    assert_eq!(
        (&locked["constraints"]["n_rules"], &locked["constraints"]["nli"]),
        (&json!(2), &json!("not_available"))
    );
    assert!(free.get("constraints").is_none(), "{free}");
    for line in [locked, free] {
        for slot in line["prompt"]["slots"].as_array().unwrap() {
            let range = slot["token_range"].as_array().unwrap();
            assert!(range[0].as_u64() < range[1].as_u64(), "{slot}");
        }
    }
    let grounded =
        chat(&server, &json!({"exrail": {"collection": "cabinets"}, "constraints": rules}));
    assert_eq!(server.post(CHAT, &grounded).await.status, StatusCode::OK);
    assert_eq!(server.trace_lines().last().unwrap()["constraints"]["n_rules"], 2);
}
