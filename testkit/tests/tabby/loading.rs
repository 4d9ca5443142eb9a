//! Loads, unloads, health.

use exrail_testkit::{Tabby, TabbyFaults, TabbyOptions};
use serde_json::{Value, json};

use crate::support::*;

fn loaded(tabby: &Tabby) -> Option<String> {
    let (status, card) = get(tabby, "/v1/model", API);
    (status == 200).then(|| card["id"].as_str().unwrap().to_owned())
}

#[test]
fn a_load_tells_its_progress_and_sets_the_card() {
    let tabby = start(TabbyFaults::default());
    let body = json!({"model_name": "other", "max_seq_len": 512, "cache_mode": "Q6"});
    let events = load(&tabby, &body);
    let (last, progress) = events.split_last().unwrap();
    for (index, event) in progress.iter().enumerate() {
        let expected = json!({"model_type": "model", "module": index + 1,
            "modules": progress.len(), "status": "processing"});
        assert_eq!(*event, expected);
    }
    assert_eq!((&last["status"], &last["module"]), (&json!("finished"), &last["modules"]));
    let card = get(&tabby, "/v1/model", API).1;
    assert_eq!((&card["id"], &card["parameters"]["cache_mode"]), (&json!("other"), &json!("Q6")));
    assert_eq!(card["parameters"]["max_seq_len"], 512);
    assert_eq!(chat(&tabby, json!({})).1["model"], "other");
    let draft = json!({"model_name": "tiny", "draft_model": {"draft_model_name": "other"}});
    assert_eq!(load(&tabby, &draft)[0]["model_type"], "draft");
}

#[test]
fn the_loaded_model_is_finished_at_once() {
    let tabby = start(TabbyFaults::default());
    let events = load(&tabby, &json!({"model_name": "tiny", "max_seq_len": 512}));
    let event =
        |status: &str| json!({"model_type": "model", "module": 1, "modules": 1, "status": status});
    assert_eq!(events, [event("processing"), event("finished")]);
    assert_eq!(get(&tabby, "/v1/model", API).1["parameters"]["max_seq_len"], 4096);
}

#[test]
fn a_load_without_a_known_folder_is_400_and_keeps_the_model() {
    let tabby = start(TabbyFaults::default());
    for body in [json!({}), json!({"model_name": ""}), json!({"model_name": "nobody"})] {
        let (status, answer) = post(&tabby, "/v1/model/load", ADMIN, &body);
        assert_eq!(status, 400);
        assert!(answer["detail"].is_string());
    }
    assert_eq!(loaded(&tabby).unwrap(), "tiny");
}

#[test]
fn a_load_that_fails_says_so_in_a_200_and_the_old_model_is_gone() {
    let tabby = start(TabbyFaults::default());
    let events = load(&tabby, &json!({"model_name": "other", "cache_mode": "Q5,banana"}));
    assert_eq!(events.len(), 1);
    assert!(events[0]["error"]["message"].is_string());
    assert_eq!(loaded(&tabby), None);
    assert_eq!(get(&tabby, "/health", API).0, 200);
}

#[test]
fn without_a_model_health_is_200_and_the_rest_503() {
    let tabby = Tabby::start(TabbyOptions { loaded: None, ..TabbyOptions::default() }).unwrap();
    let (status, health) = get(&tabby, "/health", ("x-no", "key"));
    assert_eq!((status, health), (200, json!({"status": "healthy", "issues": []})));
    let none = (503, json!({"detail": "No models are currently loaded."}));
    assert_eq!(get(&tabby, "/v1/model", API), none);
    assert_eq!(get(&tabby, "/props", API), none);
    assert_eq!(chat(&tabby, json!({})), none);
    assert_eq!(post(&tabby, "/v1/model/unload", ADMIN, &json!({})), none);
    assert_eq!(post(&tabby, "/v1/token/encode", API, &json!({"text": "a"})), none);
    assert_eq!(get(&tabby, "/v1/models", API).1["data"], json!([]));
}

#[test]
fn an_unload_ends_streams_with_an_error_event_and_health_remembers() {
    let tabby = slow(TabbyFaults::default());
    let mut open = Open::begin(&tabby, &chat_body(json!({"stream": true, "min_tokens": 1000})));
    open.until("data: ");
    let plain = std::thread::scope(|scope| {
        let plain = scope.spawn(|| chat(&tabby, json!({"min_tokens": 1000})));
        eventually(|| tabby.generations() == 2);
        assert_eq!(post(&tabby, "/v1/model/unload", ADMIN, &json!({})), (200, Value::Null));
        plain.join().unwrap()
    });
    assert_eq!(plain.0, 503);
    assert!(plain.1["detail"].as_str().unwrap().contains("Maybe the model was unloaded?"));
    assert!(open.until("data: {\"error\"").contains("\"trace\":null"));
    assert!(!open.rest().contains("[DONE]"));
    assert_eq!(tabby.cancelled(), 0);
    load(&tabby, &json!({"model_name": "tiny"}));
    let (status, health) = get(&tabby, "/health", API);
    assert_eq!((status, &health["status"]), (503, &json!("unhealthy")));
    assert!(health["issues"][0]["time"].is_string());
    assert_eq!(chat(&tabby, json!({"max_tokens": 1})).0, 200);
}

#[test]
fn a_load_waits_for_jobs_and_refuses_new_ones_meanwhile() {
    let tabby = slow(TabbyFaults::default());
    let mut open = Open::begin(&tabby, &chat_body(json!({"stream": true})));
    open.until("data: ");
    std::thread::scope(|scope| {
        let load = scope.spawn(|| load(&tabby, &json!({"model_name": "other"})));
        eventually(|| loaded(&tabby).is_none());
        assert_eq!(chat(&tabby, json!({})).0, 503);
        // The stream is not cut.
        open.until("data: [DONE]");
        assert_eq!(load.join().unwrap().last().unwrap()["status"], "finished");
    });
    assert_eq!(loaded(&tabby).unwrap(), "other");
}

#[test]
fn skip_queue_ends_jobs() {
    let tabby = slow(TabbyFaults::default());
    let mut open = Open::begin(&tabby, &chat_body(json!({"stream": true, "min_tokens": 1000})));
    open.until("data: ");
    load(&tabby, &json!({"model_name": "other", "skip_queue": true}));
    open.until("data: {\"error\"");
    assert_eq!(loaded(&tabby).unwrap(), "other");
}

#[test]
fn a_client_that_leaves_does_not_stop_a_load() {
    let tabby = slow(TabbyFaults::default());
    let mut open = Open::begin(&tabby, &chat_body(json!({"stream": true})));
    open.until("data: ");
    let mut load = Open::post(&tabby, "/v1/model/load", &json!({"model_name": "other"}));
    load.until("HTTP/1.1 200");
    drop(load);
    open.until("data: [DONE]");
    eventually(|| loaded(&tabby).as_deref() == Some("other"));
}
