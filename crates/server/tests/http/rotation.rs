//! Rotation as a client and an operator see it (G-16).

use axum::http::StatusCode;
use exrail_text::Specials;
use serde_json::{Value, json};

use crate::support::{MODEL, Server, events, warm};

const SYSTEM: &str = "the key of the cabinet is in the red box";

/// A chat that does not end by itself, greedy.
fn chat(server: &Server, first_role: &str, extra: &Value) -> Value {
    let tokenizer = server.state.services().unwrap().engine.tokenizer().clone();
    let bans = tokenizer.eos_ids().iter().map(|id| (id.to_string(), json!(-100.0)));
    let mut body = json!({
        "model": MODEL,
        "messages": [
            {"role": first_role, "content": SYSTEM},
            {"role": "user", "content": "hello"},
        ],
        "max_tokens": 300,
        "temperature": 0,
        "logit_bias": Value::Object(bans.collect()),
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn rotation() -> Value {
    json!({"rotation": {"rotate_at": 160, "window": 40}})
}

/// Tokens of the first message with what the template writes around it.
fn n_first(server: &Server, role: &str) -> u64 {
    let text = format!("<|im_start|>{role}\n{SYSTEM}<|im_end|>\n");
    let services = server.state.services().unwrap();
    services.engine.tokenizer().encode(&text, Specials::Parse).unwrap().len() as u64
}

async fn first_choice(server: &Server, body: &Value) -> Value {
    let answer = server.post("/v1/chat/completions", body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    answer.json()["choices"][0].clone()
}

#[tokio::test]
async fn the_answer_says_what_was_dropped_and_the_system_message_is_not() {
    let server = warm(&[], None);
    let choice = first_choice(&server, &chat(&server, "system", &rotation())).await;
    assert_eq!(choice["finish_reason"], "length");
    let rotations = choice["rotations"].as_array().unwrap();
    assert!(rotations.len() >= 2, "{choice}");
    let n_system = n_first(&server, "system");
    let first = &rotations[0];
    assert_eq!(first["kept"], json!([[0, n_system], [120, 160]]));
    assert_eq!(first["dropped"], json!([[n_system, 120]]));
    assert_eq!(
        (&first["tokens_before"], &first["tokens_after"]),
        (&json!(160), &json!(n_system + 40))
    );
    assert_eq!(first["policy"], "reprefill");
    for later in &rotations[1..] {
        assert_eq!(later["kept"][0], json!([0, n_system]), "every time");
    }
    let lines = server.trace_lines();
    assert_eq!(lines.len(), rotations.len() + 1);
    let traced = &lines[0];
    assert_eq!((&traced["event"], &traced["choice"]), (&json!("cache.rotate"), &json!(0)));
    assert_eq!((&traced["tokens_used"], &traced["limit"]), (&json!(160), &json!(160)));
    assert_eq!(traced["kept_ranges"], first["kept"]);
    assert_eq!(traced["dropped_ranges"], first["dropped"]);
    assert!(traced["oracle_kl"].is_null());
    assert_eq!(traced["oracle"], "not_available");
    assert_eq!(lines.last().unwrap()["event"], "infer.run");
    assert_eq!(lines.last().unwrap()["trace_id"], traced["trace_id"]);
    let metrics = server.get("/metrics").await.text;
    let line = format!("exrail_rotations_total {}\n", rotations.len());
    assert!(metrics.contains(&line), "{metrics}");
    let config = server.get("/v1/exrail/config").await.json();
    assert_eq!(config["rotation"]["policy"], "reprefill");
}

/// The system message, the sinks and the last tokens stay in the cache, and the client hears what did not.
#[tokio::test]
async fn an_answer_that_is_rotated_in_place_says_what_was_dropped() {
    let server = warm(&[], None);
    let in_place = json!({"rotation":
        {"policy": "sink_window", "rotate_at": 160, "window": 40, "sink": 3}});
    let choice = first_choice(&server, &chat(&server, "system", &in_place)).await;
    assert_eq!(choice["finish_reason"], "length");
    let rotations = choice["rotations"].as_array().unwrap();
    assert!(rotations.len() >= 2, "{choice}");
    let n_system = n_first(&server, "system");
    assert_eq!(rotations[0]["kept"], json!([[0, n_system], [120, 160]]));
    assert_eq!(rotations[0]["dropped"], json!([[n_system, 120]]));
    assert_eq!(rotations[0]["policy"], "sink_window");
    let traced = &server.trace_lines()[0];
    assert_eq!(
        (&traced["event"], &traced["policy"]),
        (&json!("cache.rotate"), &json!("sink_window"))
    );
    assert_eq!(traced["oracle"], "not_applicable", "no prefill gives the same");
    // Without a pinned message the sinks are what stays in front.
    let unpinned = first_choice(&server, &chat(&server, "user", &in_place)).await;
    assert_eq!(unpinned["rotations"][0]["kept"], json!([[0, 3], [120, 160]]));
}

/// Mutation: the same message in a role that is not pinned is lost, and the client reads another answer.
#[tokio::test]
async fn a_first_message_that_is_not_pinned_is_dropped_and_changes_the_answer() {
    let server = warm(&[], None);
    let lost = first_choice(&server, &chat(&server, "user", &rotation())).await;
    // Its first token is the BOS of this vocabulary, which stays in any case.
    assert_eq!(lost["rotations"][0]["kept"], json!([[0, 1], [120, 160]]));
    let mut pinned = rotation();
    pinned["rotation"]["pin_messages"] = json!([0]);
    let kept = first_choice(&server, &chat(&server, "user", &pinned)).await;
    assert_eq!(kept["rotations"][0]["kept"][0], json!([0, n_first(&server, "user")]));
    let texts =
        [lost, kept].map(|choice| choice["message"]["content"].as_str().unwrap().to_owned());
    assert_ne!(texts[0], texts[1]);
}

#[tokio::test]
async fn a_stream_tells_of_a_rotation_before_what_follows() {
    let server = warm(&[], None);
    let whole = first_choice(&server, &chat(&server, "system", &rotation())).await;
    let mut body = chat(&server, "system", &rotation());
    body["stream"] = json!(true);
    let answer = server.post("/v1/chat/completions", &body).await;
    let events = events(&answer.text);
    assert_eq!(events.last(), Some(&"[DONE]"));
    let (mut text, mut rotations) = (String::new(), Vec::new());
    for event in &events[..events.len() - 1] {
        let event: Value = serde_json::from_str(event).unwrap();
        let choice = &event["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        rotations.extend(choice["rotations"].as_array().cloned().unwrap_or_default());
    }
    assert_eq!(text, whole["message"]["content"].as_str().unwrap());
    assert_eq!(&json!(rotations), &whole["rotations"]);
}

/// C9 of the field faults: all text so far, and a reason.
#[tokio::test]
async fn c9_stop_ends_the_answer_with_all_of_it() {
    let server = warm(&[], None);
    let stop = json!({"rotation": {"policy": "stop", "rotate_at": 160}});
    let stopped = first_choice(&server, &chat(&server, "system", &stop)).await;
    assert_eq!(stopped["finish_reason"], "length", "typed clients know no other");
    assert_eq!(stopped["exrail_finish_reason"], "context_rotation_required");
    assert!(stopped.get("rotations").is_none());
    let rotated = first_choice(&server, &chat(&server, "system", &rotation())).await;
    let text = |choice: &Value| choice["message"]["content"].as_str().unwrap().to_owned();
    assert!(text(&stopped).len() > 20 && text(&rotated).starts_with(&text(&stopped)));
    assert_eq!(server.trace_lines()[0]["finish_reason"], "context_rotation_required");
}

/// Without a word of the request: at 1,536 of 2,048 tokens, which is the context less the reserve.
#[tokio::test]
async fn by_default_an_answer_longer_than_the_context_rotates_and_off_refuses_it() {
    let server = warm(&[], None);
    let long = json!({"max_tokens": 2200});
    let choice = first_choice(&server, &chat(&server, "system", &long)).await;
    assert_eq!(choice["rotations"][0]["tokens_before"], 1536);
    assert_eq!(choice["finish_reason"], "length");
    let off = json!({"max_tokens": 2200, "rotation": {"policy": "off"}});
    let answer = server.post("/v1/chat/completions", &chat(&server, "system", &off)).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.code(), "context_length_exceeded", "{}", answer.text);
}

#[tokio::test]
async fn text_completions_pin_tokens() {
    let server = warm(&[], None);
    let prompt: Vec<u32> = (0..100).map(|i| 3 + i * 7 % 200).collect();
    let tokenizer = server.state.services().unwrap().engine.tokenizer().clone();
    let bans = tokenizer.eos_ids().iter().map(|id| (id.to_string(), json!(-100.0)));
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 200, "temperature": 0,
        "logit_bias": Value::Object(bans.collect()),
        "rotation": {"rotate_at": 160, "window": 40, "pin_tokens": [[5, 9], [50, 60]]}});
    let answer = server.post("/v1/completions", &body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let first = &answer.json()["choices"][0]["rotations"][0];
    assert_eq!(first["kept"], json!([[5, 9], [50, 60], [120, 160]]));
}

/// C5 of the field faults: whatever number a client sends, it is refused by name or honoured.
#[tokio::test]
async fn c5_every_integer_is_refused_or_honoured() {
    let server = warm(&[], None);
    let numbers = [
        json!(-1),
        json!(-32),
        json!(0),
        json!(2_147_483_647_i64),
        json!(i64::MAX),
        json!(1.5),
        json!("5"),
        json!([1]),
    ];
    for number in &numbers {
        for (field, value) in [
            ("rotate_at", number.clone()),
            ("window", number.clone()),
            ("sink", number.clone()),
            ("pin_messages", json!([number])),
            ("pin_tokens", json!([[number, number]])),
            ("policy", number.clone()),
        ] {
            let extra = json!({"rotation": {field: value}, "max_tokens": 4});
            let answer =
                server.post("/v1/chat/completions", &chat(&server, "system", &extra)).await;
            let is_first_message = field == "pin_messages" && *number == json!(0);
            if is_first_message {
                assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
            } else {
                assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{field} {number}");
                assert!(answer.text.contains("rotation"), "{}", answer.text);
            }
        }
    }
    for (field, value) in [("n_discard", json!(5)), ("policy", json!("shift"))] {
        let extra = json!({"rotation": {field: value}});
        let answer = server.post("/v1/chat/completions", &chat(&server, "system", &extra)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{field}");
        assert!(answer.text.contains(&format!("rotation.{field}")), "{}", answer.text);
    }
    for null in ["rotate_at", "window", "sink", "pin_messages", "pin_tokens", "policy"] {
        let extra = json!({"rotation": {null: null}, "max_tokens": 4});
        first_choice(&server, &chat(&server, "system", &extra)).await;
    }
    let grounded = json!({"model": MODEL, "exrail": {"collection": "cabinets"}, "rotation": {},
        "messages": [{"role": "user", "content": "Where is the key?"}]});
    let answer = server.post("/v1/chat/completions", &grounded).await;
    assert!(answer.text.contains("evidence of a grounded answer"), "{}", answer.text);
}

#[tokio::test]
async fn a_field_that_the_policy_does_not_read_is_refused() {
    let server = warm(&[], None);
    for (policy, field, expected) in [
        ("off", "rotate_at", "expected policy reprefill, sink_window or stop beside it, found off"),
        ("off", "window", "expected policy reprefill or sink_window beside it, found off"),
        ("stop", "window", "expected policy reprefill or sink_window beside it, found stop"),
        ("stop", "sink", "expected policy sink_window beside it, found stop"),
        ("reprefill", "sink", "expected policy sink_window beside it, found reprefill"),
    ] {
        let body = chat(&server, "system", &json!({"rotation": {"policy": policy, field: 160}}));
        let answer = server.post("/v1/chat/completions", &body).await;
        assert_eq!(answer.status, 400, "{policy} {field}: {}", answer.text);
        assert!(answer.text.contains(expected), "{policy} {field}: {}", answer.text);
    }
}
