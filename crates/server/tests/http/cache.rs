//! Shared prefixes as a client and an operator see them.

use axum::{body::Body, http::Method, http::StatusCode};
use serde_json::{Value, json};

use crate::support::{KEY, MODEL, Server, request, warm};

const OTHER_KEY: &str = "another-key-of-16";

/// Prompt tokens of 300 that were cached.
async fn cached(server: &Server, key: &str) -> u64 {
    let prompt: Vec<u32> = (0..300).map(|i| 3 + i * 7 % 200).collect();
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0});
    let body = Body::from(body.to_string());
    let answer = server.send(request(Method::POST, "/v1/completions", Some(key), body)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let usage = &answer.json()["usage"];
    assert_eq!(usage["prompt_tokens"], 300);
    usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[tokio::test]
async fn a_key_finds_its_own_prefixes_and_nobody_elses() {
    let server = warm(&[KEY, OTHER_KEY], None);
    assert_eq!(cached(&server, KEY).await, 0);
    assert_eq!(cached(&server, KEY).await, 256);
    assert_eq!(cached(&server, OTHER_KEY).await, 0);
    let get = |path| server.send(request(Method::GET, path, Some(KEY), Body::empty()));
    let metrics = get("/metrics").await.text;
    for line in [
        "exrail_prefix_cache_hits_total 1\n",
        "exrail_prefix_cache_misses_total 2\n",
        "exrail_prefix_cache_evictions_total 0\n",
        "exrail_kv_pages_cached 2\n",
        "exrail_kv_pages_quarantined 0\n",
        "exrail_kv_restarts_total 0\n",
    ] {
        assert!(metrics.contains(line), "{line}{metrics}");
    }
    assert!(!metrics.contains("exrail_kv_audits_total 0\n"), "{metrics}");
    let config: Value = get("/v1/exrail/config").await.json();
    assert_eq!(config["prefix_cache"], true);
    assert!(config["kv_audit_every"].as_u64().unwrap() >= 1);
}
