//! The fence switched off, over HTTP, to show what it is for. What it refuses when it is on is in
//! `tests/http/session_fence.rs`.

use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use exrail_engine::SessionStore;
use serde_json::{Value, json};

use self::support::{Answer, MODEL, Server, request, warm};
use super::SessionKeeper;

#[expect(dead_code, reason = "of the HTTP tests, which use all of it")]
#[path = "../../tests/http/support.rs"]
mod support;

const TALK: &str = "/v1/exrail/sessions/talk";

/// One of two conversations that part in the middle.
fn prompt(of: u32) -> Vec<u32> {
    (0..600).map(|i| if i < 256 { 3 + i * 7 % 200 } else { 3 + (i + of) * 7 % 200 }).collect()
}

async fn put(server: &Server, of: u32, context_id: &Value) -> Answer {
    let body = json!({"prompt": prompt(of), "context_id": context_id});
    server.send(request(Method::PUT, TALK, None, Body::from(body.to_string()))).await
}

async fn text(server: &Server, of: u32, session: &Value) -> Answer {
    let body = json!({"model": MODEL, "prompt": prompt(of), "max_tokens": 4, "temperature": 0,
        "session": session});
    server.post("/v1/completions", &body).await
}

/// Two clients go on from the same revision, each with its own conversation, and both save it. What the second save
/// is answered, what the session then is taken for by the first client, and what its next turn is answered.
async fn race(keeper: SessionKeeper) -> (Answer, Value, Answer) {
    let server = warm(&[], None);
    server.state.keep_sessions(keeper);
    for of in [0, 1, 2] {
        assert_eq!(text(&server, of, &Value::Null).await.status, StatusCode::OK);
    }
    let both = put(&server, 0, &Value::Null).await.json()["context_id"].clone();
    let ours = put(&server, 1, &both).await.json()["context_id"].clone();
    let stale = put(&server, 2, &both).await;
    let turn = text(&server, 1, &json!({"name": "talk", "context_id": ours})).await;
    (stale, ours, turn)
}

#[tokio::test]
async fn g22_behind_the_fence_the_first_write_stays_and_the_second_is_told() {
    let place = tempfile::tempdir().unwrap();
    let store = SessionStore::open(place.path(), 1 << 30).unwrap();
    let (stale, ours, turn) = race(SessionKeeper::start(store).unwrap()).await;
    assert_eq!((stale.status, stale.code()), (StatusCode::CONFLICT, "session_conflict".into()));
    assert_eq!(turn.status, StatusCode::OK, "{}", turn.text);
    assert_eq!(turn.json()["context_id"], ours);
}

/// The mutation: the stale write wins in silence, and the first client's turn is answered as one of a session that
/// is no longer its own.
#[tokio::test]
async fn mutation_g22_without_the_fence_a_stale_write_wins_and_the_turn_goes_on_from_it() {
    let place = tempfile::tempdir().unwrap();
    let store = SessionStore::open(place.path(), 1 << 30).unwrap();
    let (stale, ours, turn) = race(SessionKeeper::unfenced(store).unwrap()).await;
    assert_eq!(stale.status, StatusCode::OK, "{}", stale.text);
    assert_eq!(stale.json()["mem_rev"], 3);
    assert_eq!(turn.status, StatusCode::OK, "{}", turn.text);
    assert_ne!(turn.json()["context_id"], ours);
    assert_eq!(turn.json()["context_id"], stale.json()["context_id"]);
}
