//! Sessions as a client sees them: saved, found by a later process, and one's own only.

use std::path::Path;

use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use exrail_engine::{EngineHandle, EngineOptions, SessionStore};
use exrail_server::{Limits, SessionKeeper};
use serde_json::{Value, json};

use crate::support::{Answer, KEY, MODEL, Server, cpu, request, start, warm, warm_on};

const OTHER_KEY: &str = "another-key-of-16";

fn engine() -> EngineHandle {
    start(cpu(), EngineOptions { max_sequences: 4, ..EngineOptions::default() }, |_| {})
}

/// A server that keeps sessions in this folder.
fn keeping(place: &Path, keys: &[&str]) -> Server {
    let server = warm_on(engine(), keys, Limits::default());
    let store = SessionStore::open(place, 1 << 30).unwrap();
    server.state.keep_sessions(SessionKeeper::start(store).unwrap());
    server
}

fn conversation() -> Vec<u32> {
    (0..600).map(|i| 3 + i * 7 % 200).collect()
}

async fn send(server: &Server, method: Method, path: &str, key: &str, body: &Value) -> Answer {
    let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
    server.send(request(method, path, Some(key), body)).await
}

/// Cached tokens and text of an answer to the conversation.
async fn ask(server: &Server, key: &str) -> (u64, String) {
    let body = json!({"model": MODEL, "prompt": conversation(), "max_tokens": 4, "temperature": 0});
    let answer = send(server, Method::POST, "/v1/completions", key, &body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let json = answer.json();
    let cached = json["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    (cached, json["choices"][0]["text"].as_str().unwrap().to_owned())
}

async fn save(server: &Server, key: &str, name: &str) -> Answer {
    let path = format!("/v1/exrail/sessions/{name}");
    send(server, Method::PUT, &path, key, &json!({ "prompt": conversation() })).await
}

async fn restore(server: &Server, key: &str, name: &str) -> Answer {
    let path = format!("/v1/exrail/sessions/{name}/restore");
    send(server, Method::POST, &path, key, &Value::Null).await
}

/// C15 of the field faults, from outside; and the keys of the second server stand in another order.
#[tokio::test]
async fn a_session_survives_a_restart_and_is_its_keys_only() {
    let place = tempfile::tempdir().unwrap();
    let first = keeping(place.path(), &[KEY, OTHER_KEY]);
    let (cached, text) = ask(&first, KEY).await;
    assert_eq!(cached, 0);
    let saved = save(&first, KEY, "talk").await;
    assert_eq!(saved.status, StatusCode::OK, "{}", saved.text);
    assert_eq!(saved.json()["tokens"], 512);
    drop(first);

    let second = wait_for_the_folder(place.path(), &[OTHER_KEY, KEY]);
    let stranger = restore(&second, OTHER_KEY, "talk").await;
    assert_eq!(
        (stranger.status, stranger.code()),
        (StatusCode::NOT_FOUND, "session_not_found".into())
    );
    let restored = restore(&second, KEY, "talk").await;
    assert_eq!(restored.status, StatusCode::OK, "{}", restored.text);
    assert_eq!(restored.json()["tokens"], 512);
    assert_eq!(ask(&second, OTHER_KEY).await.0, 0);
    assert_eq!(ask(&second, KEY).await, (512, text));

    let list = |key| send(&second, Method::GET, "/v1/exrail/sessions", key, &Value::Null);
    let card = list(KEY).await.json()["data"][0].clone();
    assert_eq!((&card["name"], &card["mem_rev"]), (&json!("talk"), &json!(1)));
    for told in ["mem_rev", "mem_hash", "context_id"] {
        assert_eq!(card[told], saved.json()[told], "{told}");
        assert_eq!(card[told], restored.json()[told], "{told}");
    }
    assert_eq!(list(OTHER_KEY).await.json()["data"], json!([]));
    let remove = || send(&second, Method::DELETE, "/v1/exrail/sessions/talk", KEY, &Value::Null);
    assert_eq!(remove().await.json()["deleted"], true);
    assert_eq!(remove().await.status, StatusCode::NOT_FOUND);
    assert_eq!(list(KEY).await.json()["data"], json!([]));
}

/// The thread of the first server gives the folder back a moment after its last handle is gone.
fn wait_for_the_folder(place: &Path, keys: &[&str]) -> Server {
    let taken = || SessionStore::open(place, 1 << 30);
    while taken().is_err() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    keeping(place, keys)
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let server = keeping(place.path(), &[KEY]);
    let nothing = save(&server, KEY, "talk").await;
    assert_eq!(
        (nothing.status, nothing.code()),
        (StatusCode::CONFLICT, "session_not_cached".into())
    );
    for name in ["%2e%2e", "..%2fx", ".x", "a%20b"] {
        let answer = save(&server, KEY, name).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{name}: {}", answer.text);
        assert_eq!(restore(&server, KEY, name).await.status, StatusCode::BAD_REQUEST, "{name}");
    }
    let path = "/v1/exrail/sessions/a/restore";
    for (body, status) in [
        (json!({"model": "nobody"}), StatusCode::NOT_FOUND),
        (json!({"modle": MODEL}), StatusCode::BAD_REQUEST),
        (json!({"model": MODEL}), StatusCode::NOT_FOUND), // There is no such session.
    ] {
        let answer = send(&server, Method::POST, path, KEY, &body).await;
        assert_eq!(answer.status, status, "{body}: {}", answer.text);
    }
    for body in [
        json!({}),
        json!({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}),
        json!({"prompt": ["a", "b"]}),
        json!({"prompt": "a", "nonsense": 1}),
    ] {
        let answer = send(&server, Method::PUT, "/v1/exrail/sessions/a", KEY, &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body}: {}", answer.text);
    }
}

#[tokio::test]
async fn a_session_of_another_model_is_a_409_that_names_the_pin() {
    let place = tempfile::tempdir().unwrap();
    let first = keeping(place.path(), &[KEY]);
    ask(&first, KEY).await;
    save(&first, KEY, "talk").await;
    drop(first);
    let second = wait_for_the_folder(place.path(), &[KEY]);
    drop(second);
    let other =
        start(cpu(), EngineOptions { max_sequences: 4, ..EngineOptions::default() }, |loaded| {
            loaded.model_sha256 = exrail_engine::ModelFingerprint::known("another");
        });
    let third = warm_on(other, &[KEY], Limits::default());
    let store = loop {
        match SessionStore::open(place.path(), 1 << 30) {
            Ok(store) => break store,
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
    };
    third.state.keep_sessions(SessionKeeper::start(store).unwrap());
    let refused = restore(&third, KEY, "talk").await;
    assert_eq!(
        (refused.status, refused.code()),
        (StatusCode::CONFLICT, "session_pin_mismatch".into())
    );
    assert!(refused.text.contains("model_sha256"), "{}", refused.text);
    assert_eq!(ask(&third, KEY).await.0, 0);
}

#[tokio::test]
async fn a_server_without_a_folder_says_how_to_get_one() {
    let server = warm(&[KEY], None);
    for answer in [save(&server, KEY, "a").await, restore(&server, KEY, "a").await] {
        assert_eq!(answer.status, StatusCode::NOT_IMPLEMENTED, "{}", answer.text);
        assert!(answer.text.contains("--session-dir"), "{}", answer.text);
    }
}
