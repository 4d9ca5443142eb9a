//! Keys, validation, refusals, and what the open routes tell.

use exrail_testkit::{Tabby, TabbyFaults, TabbyOptions};
use serde_json::{Value, json};

use crate::support::*;

const JSON: (&str, &str) = ("content-type", "application/json");

#[test]
fn api_routes_take_two_headers_and_the_admin_key_too() {
    let tabby = start(TabbyFaults::default());
    let told = |key: (&str, &str)| get(&tabby, "/v1/auth/permission", key);
    let admin = "admin-key-of-tabby";
    assert_eq!(told(API), (200, json!({"permission": "api"})));
    assert_eq!(told(("x-api-key", "api-key-of-tabby")).0, 200);
    assert_eq!(told(("authorization", "bEARER api-key-of-tabby")).0, 200);
    assert_eq!(told(("x-api-key", admin)), (200, json!({"permission": "admin"})));
    assert_eq!(told(ADMIN), (401, json!({"detail": "Please provide an API key"})));
    assert_eq!(told(("x-api-key", "no")), (401, json!({"detail": "Invalid API key"})));
    // A bare key is no bearer.
    assert_eq!(told(("authorization", admin)), (401, json!({"detail": "Invalid API key"})));
    let both = [("x-api-key", "no"), API];
    assert_eq!(send(&tabby, ("GET", "/v1/auth/permission"), &both, "").0, 401);
}

#[test]
fn admin_routes_refuse_the_api_key() {
    let tabby = start(TabbyFaults::default());
    let told = |key: (&str, &str)| post(&tabby, "/v1/model/unload", key, &Value::Null);
    let invalid = json!({"detail": "Invalid admin key"});
    assert_eq!(told(API), (401, invalid.clone()));
    assert_eq!(told(("x-admin-key", "api-key-of-tabby")), (401, invalid));
    let missing = json!({"detail": "Please provide an admin key"});
    assert_eq!(told(("x-api-key", "admin-key-of-tabby")), (401, missing));
    assert_eq!(told(("authorization", "Bearer admin-key-of-tabby")), (200, Value::Null));
}

#[test]
fn unparsable_json_comes_before_the_key_and_the_key_before_the_fields() {
    let tabby = start(TabbyFaults::default());
    let path = ("POST", "/v1/chat/completions");
    let (status, body) = send(&tabby, path, &[JSON], "{\"messages\":");
    assert_eq!(status, 422);
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["detail"][0]["type"], "json_invalid");
    assert_eq!(send(&tabby, path, &[JSON], "{}").0, 401);
    assert_eq!(send(&tabby, path, &[API, JSON], "{}").0, 422);
    // JSON that is not declared is no object, and is no unparsable JSON.
    assert_eq!(send(&tabby, path, &[("content-type", "text/plain")], "{").0, 401);
    let whole = chat_body(json!({})).to_string();
    assert_eq!(send(&tabby, path, &[API, ("content-type", "text/plain")], &whole).0, 422);
    assert_eq!(tabby.generations(), 0);
}

#[test]
fn validation_lists_what_is_wrong() {
    let tabby = start(TabbyFaults::default());
    let (status, answer) = post(&tabby, "/v1/chat/completions", API, &json!({"temperature": 0}));
    assert_eq!(status, 422);
    let missing = json!({"type": "missing", "loc": ["body", "messages"], "msg": "Field required",
        "input": {"temperature": 0}});
    assert_eq!(answer, json!({"detail": [missing]}));
    let (_, answer) = chat(&tabby, json!({"max_tokens": -1}));
    let negative = json!({"type": "greater_than_equal", "loc": ["body", "max_tokens"],
        "msg": "Input should be greater than or equal to 0", "input": -1, "ctx": {"ge": 0}});
    assert_eq!(answer, json!({"detail": [negative]}));
    let no_text = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    for wrong in [
        json!({"frequency_penalty": -0.5}),
        json!({"presence_penalty": -1}),
        json!({"temperature": 11}),
        json!({"top_p": 1.5}),
        json!({"top_k": -2}),
        json!({"repetition_penalty": 0}),
        json!({"n": 0}),
        json!({"max_completion_tokens": "many"}),
        json!({"stream": "perhaps"}),
        json!({"messages": "text"}),
        json!({"tools": no_text}),
    ] {
        let (status, answer) = chat(&tabby, wrong.clone());
        assert_eq!(status, 422, "{wrong}");
        let detail = &answer["detail"][0];
        assert!(detail["msg"].is_string() && detail["loc"][0] == "body", "{answer}");
    }
    let (status, _) = post(&tabby, "/v1/completions", API, &json!({"prompt": [1, 2]}));
    assert_eq!(status, 422);
    let (status, answer) = chat(&tabby, json!({"continue_final_message": true}));
    assert_eq!(status, 422);
    assert!(answer["detail"].is_string());
    assert_eq!(tabby.generations(), 0);
}

#[test]
fn odd_bodies_are_accepted_as_documented() {
    let tabby = start(TabbyFaults::default());
    for odd in [
        json!({"messages": []}),
        json!({"max_tokens": 1_000_000}),
        json!({"max_tokens": 0}),
        json!({"temperature": null, "stop": null, "response_format": null}),
        json!({"logit_bias": {"1": 5}, "mirostat_mode": 2, "user": "u", "best_of": 3}),
    ] {
        assert_eq!(chat(&tabby, odd.clone()).0, 200, "{odd}");
    }
    let (status, answer) = chat(&tabby, json!({"messages": [{"role": "user", "content": null}]}));
    assert_eq!(status, 400);
    assert!(answer["detail"].as_str().unwrap().starts_with("TemplateError: "));
}

#[test]
fn limits_that_cross_are_a_plain_500() {
    let tabby = start(TabbyFaults::default());
    for crossed in
        [json!({"min_tokens": 9, "max_tokens": 8}), json!({"min_temp": 2, "max_temp": 1})]
    {
        let body = chat_body(crossed);
        let told = post_text(&tabby, "/v1/chat/completions", API, &body);
        assert_eq!(told, (500, "Internal Server Error".into()));
    }
    assert_eq!(get(&tabby, "/health", API).0, 200);
}

#[test]
fn a_prompt_over_the_context_is_400_streamed_or_not() {
    let options = TabbyOptions { context: 16, ..TabbyOptions::default() };
    let tabby = Tabby::start(options).unwrap();
    let long = "word ".repeat(20);
    for stream in [false, true] {
        let (status, answer) = chat(&tabby, json!({"messages": messages(&long), "stream": stream}));
        assert_eq!(status, 400);
        assert_eq!(answer["error"]["code"], "context_length_exceeded");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
        assert_eq!(answer["error"].as_object().unwrap()["param"], Value::Null);
    }
    assert_eq!((tabby.generations(), tabby.bodies().len()), (0, 2));
    // What fits is cut where the context ends.
    let (_, answer) = chat(&tabby, json!({"messages": messages("a"), "max_tokens": 500}));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn unknown_paths_and_wrong_methods() {
    let tabby = start(TabbyFaults::default());
    assert_eq!(get(&tabby, "/api/v1/model", API), (404, json!({"detail": "Not Found"})));
    let not_allowed = (405, json!({"detail": "Method Not Allowed"}));
    assert_eq!(get(&tabby, "/v1/chat/completions", API), not_allowed);
    assert_eq!(send(&tabby, ("HEAD", "/health"), &[], "").0, 405);
    assert_eq!(post(&tabby, "/v1/embeddings", API, &json!({"input": "a"})).0, 503);
    assert_eq!(post(&tabby, "/v1/download", ADMIN, &json!({"repo_id": "a/b"})).0, 400);
}

#[test]
fn lists_show_all_to_an_admin_and_the_loaded_one_to_others() {
    let tabby = start(TabbyFaults::default());
    let ids = |path: &str, key| -> Vec<String> {
        let (_, list) = get(&tabby, path, key);
        let cards = list["data"].as_array().unwrap();
        cards.iter().map(|card| card["id"].as_str().unwrap().to_owned()).collect()
    };
    let admin = ("x-api-key", "admin-key-of-tabby");
    for path in ["/v1/models", "/v1/model/list"] {
        assert_eq!(ids(path, API), ["tiny"]);
        assert_eq!(ids(path, admin), ["tiny", "other"]);
    }
    let (_, card) = get(&tabby, "/v1/model", API);
    assert_eq!((&card["id"], &card["object"]), (&json!("tiny"), &json!("model")));
    assert_eq!(card["owned_by"], "tabbyAPI");
    assert_eq!(card["parameters"]["max_seq_len"], 4096);
    assert_eq!(get(&tabby, "/props", API).1["default_generation_settings"]["n_ctx"], 4096);
    assert_eq!(get(&tabby, "/v1/templates", API).1["data"], json!(["chatml"]));
}

#[test]
fn overrides_force_and_templates_can_go() {
    let tabby = start(TabbyFaults::default());
    let rules = json!({"overrides": {"max_tokens": {"override": 2, "force": true}}});
    assert_eq!(post(&tabby, "/v1/sampling/override/switch", ADMIN, &rules), (200, Value::Null));
    let n_words = |answer: &Value| content(answer).split(' ').count();
    assert_eq!(n_words(&chat(&tabby, json!({"max_tokens": 9})).1), 2);
    assert_eq!(post(&tabby, "/v1/sampling/override/unload", ADMIN, &json!({})).0, 200);
    assert_eq!(n_words(&chat(&tabby, json!({"max_tokens": 9})).1), 9);
    assert_eq!(post(&tabby, "/v1/sampling/override/switch", ADMIN, &json!({})).0, 400);
    assert_eq!(post(&tabby, "/v1/template/unload", ADMIN, &json!({})).0, 200);
    let (status, answer) = chat(&tabby, json!({}));
    assert_eq!(status, 422);
    assert!(answer["detail"].is_string());
    let named = json!({"prompt_template_name": "chatml"});
    assert_eq!(post(&tabby, "/v1/template/switch", ADMIN, &named).0, 200);
    assert_eq!(chat(&tabby, json!({})).0, 200);
}
