//! G-04: `/livez` follows the steps of the engine and not the port.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use exrail_engine::EngineOptions;
use exrail_server::{Limits, router};
use serde_json::json;
use tower::ServiceExt;

use crate::{
    faulty::Faulty,
    support::{MODEL, Server, cpu, request, start, warm_on},
};

const HANG: u32 = 7;

/// A server whose engine hangs in the first step with that token, until the sender is dropped.
fn hanging(watchdog: Duration) -> (Server, flume::Sender<Infallible>) {
    let (release, released) = flume::bounded(0);
    let backend = Faulty { hang: Some((HANG, released)), ..Faulty::new(cpu()) };
    let engine = start(backend, EngineOptions::default(), |_| {});
    (warm_on(engine, &[], Limits { watchdog, ..Limits::default() }), release)
}

/// Asks for one token behind the one that hangs; the answer comes when it is released.
fn ask(server: &Server) -> tokio::task::JoinHandle<StatusCode> {
    let body = json!({"model": MODEL, "prompt": [HANG, 9], "max_tokens": 1});
    let request = request(Method::POST, "/v1/completions", None, Body::from(body.to_string()));
    let router = router(std::sync::Arc::clone(&server.state));
    tokio::spawn(async move { router.oneshot(request).await.unwrap().status() })
}

async fn statuses(server: &Server) -> (StatusCode, StatusCode) {
    (server.get("/livez").await.status, server.get("/readyz").await.status)
}

/// H1: two hundred streams may be dropped and the port may answer; an engine that makes no step is dead.
#[tokio::test]
async fn a_hanging_engine_is_not_alive_and_one_that_goes_on_is() {
    let (server, release) = hanging(Duration::from_millis(100));
    assert_eq!(statuses(&server).await, (StatusCode::OK, StatusCode::OK));
    let asked = ask(&server);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let dead = (StatusCode::SERVICE_UNAVAILABLE, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(statuses(&server).await, dead);
    assert_eq!(server.get("/livez").await.json()["status"], "stalled");
    drop(release);
    assert_eq!(asked.await.unwrap(), StatusCode::OK);
    assert_eq!(statuses(&server).await, (StatusCode::OK, StatusCode::OK));
}

/// The mutation: with a watchdog that waits for ever the hang is not seen.
#[tokio::test]
async fn without_the_watchdog_a_hanging_engine_looks_alive() {
    let (server, release) = hanging(Duration::MAX);
    let asked = ask(&server);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(statuses(&server).await, (StatusCode::OK, StatusCode::OK));
    drop(release);
    asked.await.unwrap();
}

/// An engine that has given up has nothing queued, and does not come back.
#[tokio::test]
async fn an_engine_that_has_stopped_is_not_alive() {
    let (server, _release) = hanging(Duration::from_secs(30));
    server.state.services().unwrap().engine.shutdown();
    let livez = server.get("/livez").await;
    assert_eq!(
        (livez.status, livez.json()["status"].as_str()),
        (StatusCode::SERVICE_UNAVAILABLE, Some("stopped"))
    );
}
