//! The model's hash comes some time after its first answers: tokens do not wait for it, records do.

use std::{
    io,
    sync::{Arc, mpsc},
    time::Duration,
};

use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use exrail_engine::ModelFingerprint;
use exrail_server::router;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::{MODEL, Server, events, request, warm_with};

const SHA256: &str = "abcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcdefabcd";

/// A server whose model's hash ends with what is sent.
fn gated() -> (Server, mpsc::Sender<io::Result<String>>) {
    let (end, gate) = mpsc::channel::<io::Result<String>>();
    let hash = ModelFingerprint::taken_by(MODEL, 9, move |told| {
        told(4)?;
        gate.recv().map_err(io::Error::other)?
    });
    (warm_with(hash.unwrap()), end)
}

fn chat(stream: bool) -> Value {
    json!({"model": MODEL, "max_tokens": 4, "temperature": 0, "stream": stream,
        "messages": [{"role": "user", "content": "hello"}]})
}

fn post(path: &str, body: &Value) -> axum::http::Request<Body> {
    request(Method::POST, path, None, Body::from(body.to_string()))
}

/// The JSON events of a stream.
fn chunks(text: &str) -> Vec<Value> {
    let events = events(text).into_iter().filter(|event| *event != "[DONE]");
    events.map(|event| serde_json::from_str(event).unwrap()).collect()
}

#[tokio::test]
async fn a_stream_gives_its_tokens_before_the_hash_and_its_end_after_it() {
    let (server, end) = gated();
    let response = router(Arc::clone(&server.state));
    let response = response.oneshot(post("/v1/chat/completions", &chat(true))).await.unwrap();
    let mut blocks = response.into_body().into_data_stream();
    let mut text = String::new();
    // The role and four tokens, or fewer events where a token is no whole character.
    while chunks(&text).last().is_none_or(|last| last["choices"][0]["delta"]["content"] == "") {
        let block = blocks.next().await.expect("the stream is open").unwrap();
        text.push_str(std::str::from_utf8(&block).unwrap());
    }
    assert!(chunks(&text).iter().all(|chunk| chunk["system_fingerprint"].is_null()), "{text}");
    let card = server.get(&format!("/v1/models/{MODEL}")).await.json();
    assert_eq!(card["exrail"]["sha256"], Value::Null);
    let pending = json!({"status": "pending", "hashed_bytes": 4, "total_bytes": 9});
    assert_eq!(card["exrail"]["sha256_status"], pending);
    assert_eq!(server.get("/readyz").await.status, StatusCode::OK);
    // The mutation: a record that does not wait has nothing to name the model by.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(server.trace_lines().is_empty() && !text.contains("[DONE]"), "{text}");
    end.send(Ok(SHA256.into())).unwrap();
    while let Some(block) = blocks.next().await {
        text.push_str(std::str::from_utf8(&block.unwrap()).unwrap());
    }
    let last = chunks(&text).pop().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(last["system_fingerprint"], "exrail-0.1.0-abcdefabcdef");
    assert!(text.contains("[DONE]"));
    assert_eq!(server.trace_lines()[0]["pins"]["model_fp"], SHA256);
    let card = server.get(&format!("/v1/models/{MODEL}")).await.json();
    assert_eq!(card["exrail"]["sha256"], SHA256);
    assert_eq!(card["exrail"]["sha256_status"], json!({"status": "known"}));
}

#[tokio::test]
async fn a_whole_answer_waits_for_the_hash_that_its_record_carries() {
    let (server, end) = gated();
    for (path, body) in [
        ("/v1/chat/completions", chat(false)),
        ("/v1/ask", json!({"question": "Where is the key?"})),
    ] {
        let answer = server.post(path, &body);
        assert!(tokio::time::timeout(Duration::from_millis(300), answer).await.is_err(), "{path}");
    }
    assert!(server.trace_lines().is_empty());
    end.send(Ok(SHA256.into())).unwrap();
    let answer = server.post("/v1/chat/completions", &chat(false)).await;
    assert_eq!(answer.json()["system_fingerprint"], "exrail-0.1.0-abcdefabcdef");
    let lines = server.trace_lines();
    assert!(!lines.is_empty() && lines.iter().all(|line| line["pins"]["model_fp"] == SHA256));
}

#[tokio::test]
async fn a_hash_that_fails_withholds_every_answer_and_the_server_is_not_ready() {
    let (server, end) = gated();
    end.send(Err(io::Error::other("input/output error"))).unwrap();
    let answer = server.post("/v1/chat/completions", &chat(false)).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{}", answer.text);
    assert_eq!(answer.code(), "trace_unavailable");
    assert!(answer.text.contains("sha256 of tiny") && !answer.text.contains("choices"));
    let ask = server.post("/v1/ask", &json!({"question": "Where is the key?"})).await;
    assert_eq!(ask.code(), "trace_unavailable");
    let stream = server.post("/v1/chat/completions", &chat(true)).await;
    let last = chunks(&stream.text).pop().unwrap();
    assert_eq!(last["error"]["code"], "trace_unavailable");
    assert!(!stream.text.contains("[DONE]") && server.trace_lines().is_empty());
    let ready = server.get("/readyz").await;
    assert_eq!(ready.status, StatusCode::SERVICE_UNAVAILABLE);
    let reason = ready.json()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("input/output error"), "{reason}");
    let card = server.get(&format!("/v1/models/{MODEL}")).await.json();
    assert_eq!(card["exrail"]["sha256"], Value::Null);
    assert_eq!(card["exrail"]["sha256_status"]["status"], "not_available");
}

#[tokio::test]
async fn a_request_that_is_turned_away_is_told_at_once_and_its_record_follows_the_hash() {
    let (server, end) = gated();
    let unknown = json!({"model": "other", "prompt": "ab"});
    let answer = server.post("/v1/completions", &unknown);
    let answer = tokio::time::timeout(Duration::from_secs(20), answer).await.unwrap();
    assert_eq!(answer.code(), "model_not_found");
    assert!(server.trace_lines().is_empty());
    end.send(Ok(SHA256.into())).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while server.trace_lines().is_empty() {
        assert!(std::time::Instant::now() < deadline, "no record");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let line = &server.trace_lines()[0];
    assert_eq!(
        (&line["guard"], &line["pins"]["model_fp"]),
        (&"model_not_found".into(), &SHA256.into())
    );
}
