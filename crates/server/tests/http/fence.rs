//! G-01, G-05: nothing is answered before real tokens were generated.

use axum::http::{Method, StatusCode, header};
use exrail_server::{Phase, sentinel};
use serde_json::json;

use crate::support::{MODEL, cold, fenced, pass, services, warm};

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
    let owner = server.own();
    pass(&owner, Phase::Weights);
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
    let told = ready.json();
    assert_eq!((&told["phase"], &told["attempt"]), (&json!("weights"), &json!(1)));
    assert_eq!(told["running"]["stalled"], false);
    assert!(told["running"]["heartbeats"].is_u64());
    assert_eq!(told["waits"][0], json!({ "waiter": "sentinel", "holders": ["warmup"] }));
    assert!(ready.headers.contains_key(header::RETRY_AFTER));
}

/// Field fault A6: requests at once while a model loads break nothing that comes after.
#[tokio::test]
async fn a6_requests_during_the_load_are_503_and_the_same_ones_are_answered_after_it() {
    let server = cold(&[], None);
    let owner = server.own();
    pass(&owner, Phase::Weights);
    let body = chat();
    let early = (0..20).map(|_| server.post("/v1/chat/completions", &body));
    for answer in futures_util::future::join_all(early).await {
        assert_eq!(answer.code(), "not_ready", "{}", answer.text);
        assert!(answer.headers.contains_key(header::RETRY_AFTER));
    }
    pass(&owner, Phase::WarmUp);
    pass(&owner, Phase::Sentinel);
    server.state.open(services(server.folder.path())).unwrap();
    let late = (0..20).map(|_| server.post("/v1/chat/completions", &body));
    for answer in futures_util::future::join_all(late).await {
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    }
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
    let owner = server.own();
    for phase in [Phase::Weights, Phase::WarmUp, Phase::Sentinel] {
        pass(&owner, phase);
    }
    server.state.open(services).unwrap();
    assert_eq!(engine.counters().steps, 0, "nothing has run yet");
    assert_eq!(server.post("/v1/chat/completions", &chat()).await.status, StatusCode::OK);
}

/// G-14: a record of each phase, also of the one that failed.
#[tokio::test]
async fn the_phases_of_a_boot_are_in_the_trace() {
    let server = warm(&[], None);
    server.state.record_boot().await.unwrap();
    let lines = server.trace_lines();
    let phases: Vec<_> = lines.iter().map(|line| line["phase"].clone()).collect();
    assert_eq!(phases, ["weights", "warmup", "sentinel"]);
    assert!(lines.iter().all(|line| line["event"] == "boot.phase" && line["ok"] == true));
    assert_eq!(lines[0]["pins"]["model_fp"].as_str().unwrap().len(), 64);

    let server = cold(&[], None);
    let failed: Result<(), Box<dyn std::error::Error>> =
        server.own().run(Phase::Weights, || Err("truncated".into()), |()| Ok(String::new()));
    failed.unwrap_err();
    server.state.record_boot().await.unwrap();
    let lines = server.trace_lines();
    assert_eq!((&lines[0]["ok"], &lines[0]["detail"]), (&json!(false), &json!("truncated")));
}

#[tokio::test]
async fn a_failed_boot_is_told_and_stays_alive() {
    let server = cold(&[], None);
    let owner = server.own();
    let failed: Result<(), Box<dyn std::error::Error>> = owner.run(
        Phase::Weights,
        || Err("file `x.gguf`: truncated".into()),
        |()| Ok(String::new()),
    );
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
    assert_eq!(ready.json()["phases"][2]["phase"], "sentinel");
    assert_eq!((&ready.json()["running"], &ready.json()["waits"]), (&json!(null), &json!([])));
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
    // What is still cold behind the fence, for each shape (field fault A1).
    for shape in ["1\",prompt_tokens=\"1", "4\",prompt_tokens=\"1", "1\",prompt_tokens=\"64"] {
        let line = format!("exrail_ready_ratio{{sequences=\"{shape}\"}} ");
        let found = metrics.lines().find_map(|found| found.strip_prefix(&line));
        let ratio: f64 = found.unwrap_or_else(|| panic!("{line} in {metrics}")).parse().unwrap();
        assert!(ratio > 0.0, "{ratio}");
    }
    // Where no fence was closed, no number says that it holds.
    let metrics = warm(&[], None).get("/metrics").await.text;
    assert!(metrics.contains("exrail_device_allocs_total 0\n"), "{metrics}");
    assert!(!metrics.contains("exrail_built_after_fence"), "{metrics}");
    assert!(!metrics.contains("exrail_ready_ratio"), "{metrics}");
}

/// A4 of the field faults, its other side: a slow model is not taken for one that hangs.
#[tokio::test]
async fn the_sentinel_tells_of_every_token() {
    let server = warm(&[], None);
    let services = server.state.services().unwrap();
    let mut n_told = 0;
    sentinel::run(&services, sentinel::ONCE, &mut || n_told += 1).unwrap();
    assert_eq!(n_told, 3 * sentinel::ONCE);
}
