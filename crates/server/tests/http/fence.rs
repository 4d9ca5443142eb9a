//! G-01, G-05: nothing is answered before real tokens were generated.

use axum::http::{Method, StatusCode, header};
use exrail_server::Phase;
use serde_json::json;

use crate::support::{MODEL, cold, fenced, services, warm};

const GUARDED: [(Method, &str); 9] = [
    (Method::GET, "/v1/models"),
    (Method::GET, "/v1/models/tiny"),
    (Method::GET, "/v1/exrail/config"),
    (Method::POST, "/v1/chat/completions"),
    (Method::POST, "/v1/completions"),
    (Method::POST, "/v1/embeddings"),
    (Method::POST, "/v1/tokenize"),
    (Method::POST, "/v1/detokenize"),
    (Method::POST, "/v1/ask"),
];

fn chat() -> serde_json::Value {
    json!({"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]})
}

#[tokio::test]
async fn every_route_is_503_with_its_phase_before_ready() {
    let server = cold(&[], None);
    let failed =
        server.state.board().run(Phase::Weights, || Ok::<_, std::io::Error>(((), String::new())));
    failed.unwrap();
    for (method, path) in GUARDED {
        let answer = if method == Method::GET {
            server.get(path).await
        } else {
            server.post(path, &chat()).await
        };
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{path}: {}", answer.text);
        assert_eq!(answer.code(), "not_ready", "{path}");
        assert!(answer.headers.contains_key(header::RETRY_AFTER), "{path}");
        assert!(answer.text.contains("weights"), "{path}: {}", answer.text);
    }
    assert_eq!(server.get("/livez").await.status, StatusCode::OK);
    let ready = server.get("/readyz").await;
    assert_eq!(ready.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(ready.json()["phase"], "weights");
    assert!(ready.headers.contains_key(header::RETRY_AFTER));
}

#[tokio::test]
async fn services_without_a_warm_up_are_not_served() {
    let server = cold(&[], None);
    let services = services(server.folder.path());
    assert!(server.state.open(services).is_err());
    let answer = server.post("/v1/chat/completions", &chat()).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
}

/// The mutation: with the proof forged, an engine that never generated a token answers users.
#[tokio::test]
async fn mutation_a_forged_proof_lets_users_reach_a_cold_engine() {
    let server = cold(&[], None);
    let services = services(server.folder.path());
    let engine = services.engine.clone();
    for phase in [Phase::WarmUp, Phase::Sentinel] {
        let forged =
            server.state.board().run(phase, || Ok::<_, std::io::Error>(((), "forged".into())));
        forged.unwrap();
    }
    server.state.open(services).unwrap();
    assert_eq!(engine.counters().steps, 0, "nothing has run yet");
    assert_eq!(server.post("/v1/chat/completions", &chat()).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_failed_boot_is_told_and_stays_alive() {
    let server = cold(&[], None);
    let failed = server
        .state
        .board()
        .run(Phase::Weights, || Err::<((), String), _>("file `x.gguf`: truncated"));
    failed.unwrap_err();
    let answer = server.post("/v1/chat/completions", &chat()).await;
    assert_eq!(answer.code(), "boot_failed");
    assert!(answer.text.contains("x.gguf"), "{}", answer.text);
    assert!(!answer.headers.contains_key(header::RETRY_AFTER), "waiting does not cure it");
    assert_eq!(server.get("/livez").await.status, StatusCode::OK);
}

#[tokio::test]
async fn ready_reports_its_phases() {
    let server = warm(&[], None);
    let ready = server.get("/readyz").await;
    assert_eq!(ready.status, StatusCode::OK, "{}", ready.text);
    assert_eq!(ready.json()["phases"][1]["phase"], "sentinel");
    let metrics = server.get("/metrics").await;
    assert!(metrics.text.contains("exrail_ready 1\n"), "{}", metrics.text);
}

#[tokio::test]
async fn metrics_tell_what_was_built_and_what_of_it_behind_the_fence() {
    let server = fenced();
    assert_eq!(server.post("/v1/chat/completions", &chat()).await.status, StatusCode::OK);
    let metrics = server.get("/metrics").await.text;
    for name in ["module_loads", "graph_captures", "gemm_autotunes", "device_allocs", "nccl_inits"]
    {
        // The CPU builds nothing.
        for line in [
            format!("exrail_{name}_total 0"),
            format!("exrail_built_after_fence{{counter=\"{name}\"}} 0"),
        ] {
            assert!(metrics.lines().any(|found| found == line), "{line} in {metrics}");
        }
    }
    // Where no fence was closed, no number says that it holds.
    let metrics = warm(&[], None).get("/metrics").await.text;
    assert!(metrics.contains("exrail_device_allocs_total 0\n"), "{metrics}");
    assert!(!metrics.contains("exrail_built_after_fence"), "{metrics}");
}
