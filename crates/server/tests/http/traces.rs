//! G-14: what is not in the trace is not released. `/dev/full` is a disk without room.

use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use serde_json::json;

use crate::support::{KEY, MODEL, events, request, warm};

#[tokio::test]
async fn an_answer_whose_trace_cannot_be_written_is_withheld() {
    let server = warm(&[], Some("/dev/full"));
    let chat = json!({"model": MODEL, "max_tokens": 3, "temperature": 0,
        "messages": [{"role": "user", "content": "hello"}]});
    let answer = server.post("/v1/chat/completions", &chat).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{}", answer.text);
    assert_eq!(answer.code(), "trace_unavailable");
    assert!(!answer.text.contains("choices"), "{}", answer.text);
    let ask = server.post("/v1/ask", &json!({"question": "Where is the key?"})).await;
    assert_eq!(ask.code(), "trace_unavailable");
    let complete = json!({"model": MODEL, "prompt": "ab", "max_tokens": 3});
    assert_eq!(server.post("/v1/completions", &complete).await.code(), "trace_unavailable");
}

#[tokio::test]
async fn a_stream_whose_trace_cannot_be_written_ends_with_an_error_and_without_done() {
    let server = warm(&[], Some("/dev/full"));
    let chat = json!({"model": MODEL, "max_tokens": 3, "temperature": 0, "stream": true,
        "messages": [{"role": "user", "content": "hello"}]});
    let answer = server.post("/v1/chat/completions", &chat).await;
    let events = events(&answer.text);
    let last: serde_json::Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "trace_unavailable");
    assert!(!answer.text.contains("[DONE]") && !answer.text.contains("finish_reason\":\"length"));
}

#[tokio::test]
async fn every_kind_of_request_leaves_a_record_with_its_pins() {
    let server = warm(&[], None);
    let chat = json!({"model": MODEL, "max_tokens": 2, "user": "me",
        "messages": [{"role": "user", "content": "hello"}]});
    server.post("/v1/chat/completions", &chat).await;
    server.post("/v1/completions", &json!({"model": MODEL, "prompt": "ab"})).await;
    server.post("/v1/ask", &json!({"question": "Where is the key?"})).await;
    let lines = server.trace_lines();
    let names: Vec<_> = lines.iter().map(|line| line["event"].clone()).collect();
    assert_eq!(names, ["infer.run", "infer.run", "retrieve.run", "answer.decide"]);
    assert_eq!(lines[0]["session_id"], "me");
    for field in ["trace_id", "request_id", "pins", "query", "collection", "retrieved"] {
        assert_eq!(lines[2][field], lines[3][field], "{field}");
    }
    assert_eq!(lines[2]["retrieved"][0]["selected"], true);
    for line in &lines {
        assert_eq!(line["schema_version"], "2.0");
        assert_eq!(line["pins"]["model_fp"].as_str().unwrap().len(), 64);
    }
    assert!(lines[3]["pins"]["index_hash"].is_string());
}

#[tokio::test]
async fn a_request_that_is_turned_away_leaves_a_record_and_a_stranger_does_not() {
    let server = warm(&[KEY], None);
    let body = json!({"model": MODEL, "prompt": "ab", "tools": []}).to_string();
    for key in [None, Some(KEY)] {
        server.send(request(Method::POST, "/v1/completions", key, Body::from(body.clone()))).await;
    }
    let lines = server.trace_lines();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["event"], "guard.fire");
    assert_eq!(lines[0]["guard"], "unsupported_field");
    assert_eq!(lines[0]["agent_id"], "key-1");
    assert!(lines[0]["detail"].as_str().unwrap().contains("tools"));
}

#[tokio::test]
async fn a_mismatch_that_is_overlooked_is_stamped_into_every_record() {
    let server = warm(&[], None);
    let body = json!({"model": MODEL, "prompt": "ab", "max_tokens": 2});
    server.post("/v1/completions", &body).await;
    server.state.traces().stamp("tested by hand");
    server.post("/v1/completions", &body).await;
    server.post("/v1/completions", &json!({"model": MODEL, "prompt": "ab", "tools": []})).await;
    let stamps: Vec<_> = server.trace_lines().iter().map(|line| line["forced"].clone()).collect();
    let reason = json!("tested by hand");
    assert_eq!(stamps, [json!(null), reason.clone(), reason]);
}
