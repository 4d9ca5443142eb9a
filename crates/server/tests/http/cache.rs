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

/// What a client needs to ask for the same distribution again, and from nothing that is cached.
#[tokio::test]
async fn a_request_without_the_cache_reads_nothing_and_leaves_nothing() {
    let server = warm(&[KEY], None);
    let prompt: Vec<u32> = (0..300).map(|i| 3 + i * 7 % 200).collect();
    let fields = json!({"prefix_cache": false, "return_token_ids": true});
    let ask = async |fields: &Value| {
        let mut body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 3, "temperature": 0});
        let fields = fields.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(fields);
        let body = Body::from(body.to_string());
        server.send(request(Method::POST, "/v1/completions", Some(KEY), body)).await
    };
    let first = ask(&fields).await.json();
    assert_eq!(cached(&server, KEY).await, 0, "the first one left nothing");
    let second = ask(&fields).await.json();
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(second["choices"][0], first["choices"][0]);
    let choice = &second["choices"][0];
    assert_eq!(choice["prompt_token_ids"], json!(prompt));
    let n_tokens = choice["token_ids"].as_array().unwrap().len();
    assert_eq!(second["usage"]["completion_tokens"], n_tokens);
    assert!(ask(&json!({})).await.json()["choices"][0].get("token_ids").is_none());
    let streamed = ask(&json!({"return_token_ids": true, "stream": true})).await;
    assert_eq!(streamed.status, StatusCode::BAD_REQUEST);
    assert!(streamed.text.contains("return_token_ids"), "{}", streamed.text);
}

#[tokio::test]
async fn a_key_finds_its_own_prefixes_and_nobody_elses() {
    let server = warm(&[KEY, &format!("{OTHER_KEY} admin")], None);
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
    let config = request(Method::GET, "/v1/exrail/config", Some(OTHER_KEY), Body::empty());
    let config: Value = server.send(config).await.json();
    assert_eq!(config["prefix_cache"], true);
    assert!(config["kv_audit_every"].as_u64().unwrap() >= 1);
}
