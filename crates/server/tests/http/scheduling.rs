//! Priorities, deadlines and full queues, as clients see them.

use std::time::{Duration, Instant};

use axum::{
    body::Body,
    http::{Method, StatusCode, header},
};
use exrail_engine::{EngineHandle, EngineOptions, GenerateRequest, Generation};
use exrail_server::Limits;
use serde_json::{Value, json};

use crate::{
    faulty::Faulty,
    support::{Answer, KEY, MODEL, Server, cpu, endless, events, request, start, warm, warm_on},
};

const OTHER_KEY: &str = "fedcba9876543210";

fn chat(extra: &Value) -> Value {
    let mut body = json!({"model": MODEL, "max_tokens": 1500, "temperature": 0,
        "messages": [{"role": "user", "content": "hello"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn priorities_and_deadlines_are_honoured_or_named() {
    let server = warm(&[], None);
    let cases = [
        (json!({"priority": "urgent"}), "priority"),
        (json!({"priority": 1}), "priority"),
        (json!({"deadline_ms": 0}), "deadline_ms"),
        (json!({"deadline_ms": 86_400_001}), "deadline_ms"),
        (json!({"deadline_ms": "soon"}), "deadline_ms"),
    ];
    let ask = json!({"question": "Where is the key?"});
    for (extra, field) in cases {
        for (path, body) in [("/v1/chat/completions", &chat(&json!({}))), ("/v1/ask", &ask)] {
            let mut body = body.clone();
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            let answer = server.post(path, &body).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{extra}: {}", answer.text);
            assert_eq!(answer.json()["error"]["param"], field, "{extra}: {}", answer.text);
        }
    }
    for priority in ["high", "normal", "low"] {
        let body = chat(&json!({"priority": priority, "deadline_ms": 60_000, "max_tokens": 2}));
        let answer = server.post("/v1/chat/completions", &body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    }
}

fn assert_is_late(answer: &Answer) {
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT, "{}", answer.text);
    assert_eq!(answer.code(), "deadline_exceeded");
    // Otherwise OpenAI's clients send it twice more.
    assert_eq!(answer.headers["x-should-retry"], "false");
}

#[tokio::test]
async fn an_answer_that_would_be_late_is_a_504_on_every_route() {
    let server = warm(&[], None);
    let bias = endless(&server);
    let late = json!({"deadline_ms": 1, "logit_bias": bias});
    assert_is_late(&server.post("/v1/chat/completions", &chat(&late)).await);
    let complete = json!({"model": MODEL, "prompt": "ab", "max_tokens": 1500, "deadline_ms": 1,
        "logit_bias": bias});
    assert_is_late(&server.post("/v1/completions", &complete).await);
    let ask = json!({"question": "Where is the key?", "deadline_ms": 1, "logit_bias": bias});
    assert_is_late(&server.post("/v1/ask", &ask).await);
    let metrics = server.get("/metrics").await.text;
    assert!(metrics.contains("exrail_sequences_late_total 3\n"), "{metrics}");
    assert!(metrics.contains("exrail_sequences_running 0\n"), "{metrics}");
}

#[tokio::test]
async fn a_stream_that_becomes_late_ends_with_an_error_and_without_done() {
    let server = warm(&[], None);
    let bias = endless(&server);
    let body = chat(&json!({"deadline_ms": 30, "stream": true, "logit_bias": bias}));
    let answer = server.post("/v1/chat/completions", &body).await;
    let last: Value = serde_json::from_str(events(&answer.text).last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "deadline_exceeded", "{last}");
    assert!(!answer.text.contains("[DONE]"));
}

#[tokio::test]
async fn a_request_without_a_deadline_has_the_servers() {
    let limits = Limits { default_deadline: Some(Duration::from_millis(1)), ..Limits::default() };
    let engine = start(cpu(), EngineOptions::default(), |_| {});
    let server = warm_on(engine, &[], limits);
    assert_is_late(&server.post("/v1/chat/completions", &chat(&json!({}))).await);
    let patient = chat(&json!({"deadline_ms": 60_000, "max_tokens": 2}));
    assert_eq!(server.post("/v1/chat/completions", &patient).await.status, StatusCode::OK);
}

/// A place in the batch and one in the queue of two, both of the first key.
async fn full() -> (Server, [Generation; 2]) {
    let options = EngineOptions {
        max_sequences: 1,
        queue_limit: 2,
        tenant_queue_limit: Some(1),
        ..EngineOptions::default()
    };
    // No answer ends by itself meanwhile.
    let backend = Faulty { delay: Duration::from_millis(2), ..Faulty::new(cpu()) };
    let engine = start(backend, options, |_| {});
    let server = warm_on(engine.clone(), &[KEY, OTHER_KEY], Limits::default());
    let running = submit(&engine, "key-1");
    wait(|| engine.counters().sequences_running == 1).await;
    let waiting = submit(&engine, "key-1");
    (server, [running, waiting])
}

async fn wait(holds: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < limit);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn submit(engine: &EngineHandle, tenant: &str) -> Generation {
    let tenant = Some(tenant.to_owned());
    let request =
        GenerateRequest { stop_at_eos: false, tenant, ..GenerateRequest::new(vec![5], 1900) };
    engine.submit(request).unwrap()
}

async fn asked_by(server: &Server, key: &str) -> Answer {
    let body = chat(&json!({"max_tokens": 2})).to_string();
    let path = "/v1/chat/completions";
    server.send(request(Method::POST, path, Some(key), Body::from(body))).await
}

#[tokio::test]
async fn a_client_with_too_many_requests_is_told_429_and_the_others_503_when_all_places_are_taken()
{
    let (server, [running, waiting]) = full().await;
    let flooding = asked_by(&server, KEY).await;
    assert_eq!(flooding.status, StatusCode::TOO_MANY_REQUESTS, "{}", flooding.text);
    assert_eq!(flooding.code(), "queue_full");
    assert!(flooding.headers.contains_key(header::RETRY_AFTER));
    let engine = server.state.services().unwrap().engine.clone();
    let third = submit(&engine, "key-3");
    let other = asked_by(&server, OTHER_KEY).await;
    assert_eq!(other.status, StatusCode::SERVICE_UNAVAILABLE, "{}", other.text);
    assert_eq!(other.code(), "overloaded");
    let seconds: u64 = other.headers[header::RETRY_AFTER].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds), "{seconds}");
    drop((running, waiting, third));
    wait(|| engine.counters().sequences_waiting == 0).await;
    assert_eq!(asked_by(&server, KEY).await.status, StatusCode::OK);
    assert_eq!(asked_by(&server, OTHER_KEY).await.status, StatusCode::OK);
}
