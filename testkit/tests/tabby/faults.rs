//! Every fault that was measured, switched on.

use std::time::{Duration, Instant};

use exrail_testkit::TabbyFaults;
use serde_json::{Value, json};

use crate::support::*;

fn strict() -> Value {
    let schema = json!({"type": "object", "required": ["a", "b"],
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}});
    let wrapped = json!({"name": "n", "strict": true, "schema": schema});
    json!({"response_format": {"type": "json_schema", "json_schema": wrapped}})
}

#[test]
fn slow_first_delays_the_first_after_each_load_behind_a_healthy_face() {
    let slow_first = Duration::from_millis(700);
    let tabby = start(TabbyFaults { slow_first: Some(slow_first), ..TabbyFaults::default() });
    let time = || {
        let begin = Instant::now();
        assert_eq!(chat(&tabby, json!({"max_tokens": 1})).0, 200);
        begin.elapsed()
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(time);
        eventually(|| tabby.generations() == 1);
        assert_eq!(get(&tabby, "/health", API).0, 200);
        assert!(first.join().unwrap() >= slow_first);
    });
    assert!(time() < slow_first);
    // The loaded one is not loaded again.
    load(&tabby, &json!({"model_name": "tiny"}));
    assert!(time() < slow_first);
    load(&tabby, &json!({"model_name": "other"}));
    assert!(time() >= slow_first);
    assert!(time() < slow_first);
}

#[test]
fn ignores_schema_writes_free_text() {
    let tabby = start(TabbyFaults { ignores_schema: true, ..TabbyFaults::default() });
    let (status, answer) = chat(&tabby, strict());
    assert_eq!((status, &answer["choices"][0]["finish_reason"]), (200, &json!("stop")));
    assert_eq!(content(&answer), content(&chat(&tabby, json!({})).1));
}

#[test]
fn invalid_as_stop_opens_an_object_and_calls_it_done() {
    let tabby = start(TabbyFaults { invalid_as_stop: true, ..TabbyFaults::default() });
    let (_, answer) = chat(&tabby, strict());
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let text = content(&answer);
    assert!(text.starts_with("{\"a\": ") && text.trim_end() == "{\"a\":", "{text}");
    // Without a schema nothing is wrong.
    assert_eq!(content(&chat(&tabby, json!({})).1).split(' ').count(), 24);
}

#[test]
fn drops_bad_schema_hides_what_does_not_compile() {
    let bad = json!({"json_schema": {"type": "object", "required": ["a"],
        "properties": {"a": {"type": "string", "pattern": "(["}}}});
    let tabby = start(TabbyFaults::default());
    let (status, answer) = chat(&tabby, bad.clone());
    assert_eq!(status, 400);
    assert!(answer["detail"].as_str().unwrap().contains("compile"), "{answer}");
    tabby.set_faults(TabbyFaults { drops_bad_schema: true, ..TabbyFaults::default() });
    let (status, answer) = chat(&tabby, bad);
    assert_eq!(status, 200);
    assert!(!content(&answer).contains('{'));
    // A schema that compiles is obeyed.
    assert!(content(&chat(&tabby, strict()).1).starts_with("{\"a\":"));
}

#[test]
fn hangs_after_unload_sends_pings_for_ever() {
    let tabby = slow(TabbyFaults { hangs_after_unload: true, ..TabbyFaults::default() });
    let mut open = Open::begin(&tabby, &chat_body(json!({"stream": true, "min_tokens": 1000})));
    open.until("data: ");
    assert_eq!(post(&tabby, "/v1/model/unload", ADMIN, &json!({})), (200, Value::Null));
    // Loads do not wait for it, and its end is that of its client.
    load(&tabby, &json!({"model_name": "tiny"}));
    assert_eq!(chat(&tabby, json!({"max_tokens": 1})).0, 200);
    open.until(": ping");
    let mut n_pings = 0;
    let end = Instant::now() + Duration::from_millis(400);
    while Instant::now() < end {
        let line = open.until("");
        assert!(!line.starts_with("data"), "{line}");
        n_pings += usize::from(line.starts_with(": ping"));
    }
    assert!(n_pings >= 3, "{n_pings}");
    assert_eq!(get(&tabby, "/health", API).0, 200);
    assert_eq!(tabby.cancelled(), 0);
    drop(open);
    eventually(|| tabby.cancelled() == 1);
}

#[test]
fn aborts_as_clean_answers_nothing_with_a_stop() {
    let tabby = slow(TabbyFaults { aborts_as_clean: true, ..TabbyFaults::default() });
    let (status, answer) = std::thread::scope(|scope| {
        let plain = scope.spawn(|| chat(&tabby, json!({"min_tokens": 1000})));
        eventually(|| tabby.generations() == 1);
        post(&tabby, "/v1/model/unload", ADMIN, &json!({}));
        plain.join().unwrap()
    });
    assert_eq!(status, 200);
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["message"].as_object().unwrap()["content"], Value::Null);
    assert_eq!(get(&tabby, "/health", API).0, 200);
}

#[test]
fn loads_without_checking_finishes_whatever_the_cache() {
    let tabby = start(TabbyFaults { loads_without_checking: true, ..TabbyFaults::default() });
    for name in ["tiny", "other"] {
        let events = load(&tabby, &json!({"model_name": name, "cache_mode": "Q5,banana"}));
        assert_eq!(events.last().unwrap()["status"], "finished");
    }
    assert_eq!(get(&tabby, "/v1/model", API).1["id"], "other");
}
