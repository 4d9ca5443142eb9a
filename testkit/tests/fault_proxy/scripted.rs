//! The scripted upstream by itself.

use std::time::{Duration, Instant};

use exrail_testkit::{ScriptedOptions, ScriptedUpstream};
use serde_json::{Value, json};

use crate::wire::{End, ask, chat};

fn upstream() -> ScriptedUpstream {
    ScriptedUpstream::start(ScriptedOptions {
        model: "scripted".into(),
        tokens: 12,
        first_token: Duration::ZERO,
        token: Duration::ZERO,
    })
    .unwrap()
}

#[test]
fn it_lists_its_model() {
    let reply = ask(&upstream().url(), "GET", "/v1/models", "");
    assert_eq!(reply.json()["data"][0]["id"], "scripted");
    assert_eq!(reply.json()["data"][0]["owned_by"], "scripted");
}

#[test]
fn a_stream_says_what_a_plain_reply_says() {
    let upstream = upstream();
    let plain = chat(&upstream.url(), &json!({ "temperature": 0 }));
    assert_eq!(plain.json()["usage"]["completion_tokens"], 12);
    assert_eq!(plain.json()["choices"][0]["finish_reason"], "stop");
    let usage = json!({ "include_usage": true });
    let fields = json!({ "temperature": 0, "stream": true, "stream_options": usage });
    let stream = chat(&upstream.url(), &fields);
    assert_eq!(stream.end, End::Proper);
    assert_eq!(stream.text(), plain.text());
    let data = stream.data();
    // The role, the tokens, the finish reason, the usage, the end.
    assert_eq!(data.len(), 1 + 12 + 1 + 1 + 1);
    let chunk = |index: usize| serde_json::from_str::<Value>(data[index]).unwrap();
    assert_eq!(chunk(0)["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunk(13)["choices"][0]["finish_reason"], "stop");
    assert_eq!(chunk(14)["usage"], plain.json()["usage"]);
    assert_eq!(data[15], "[DONE]");
    assert_eq!(upstream.generations(), 2);
}

#[test]
fn text_follows_from_prompt_and_seed() {
    let upstream = upstream();
    let text = |fields: Value| chat(&upstream.url(), &fields).text();
    let other = json!([{ "role": "user", "content": "tell me more" }]);
    assert_eq!(text(json!({ "seed": 1 })), text(json!({ "seed": 1 })));
    assert_ne!(text(json!({ "seed": 1 })), text(json!({ "seed": 2 })));
    assert_ne!(text(json!({ "seed": 1 })), text(json!({ "seed": 1, "messages": other })));
    assert_ne!(text(json!({})), text(json!({})));
    let greedy = json!({ "temperature": 0, "seed": 1 });
    assert_eq!(text(greedy.clone()), text(json!({ "temperature": 0, "seed": 2 })));
    assert_ne!(text(greedy), text(json!({ "temperature": 0, "messages": other })));
}

#[test]
fn an_answer_ends_at_max_tokens() {
    let reply = chat(&upstream().url(), &json!({ "max_tokens": 5 })).json();
    assert_eq!(reply["usage"]["completion_tokens"], 5);
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_schema_gets_an_instance() {
    let schema = json!({
        "type": "object",
        "properties": {
            "kind": { "enum": ["b", "a"] },
            "version": { "const": 3 },
            "name": { "type": "string" },
            "count": { "type": "integer", "minimum": 2 },
            "sure": { "type": "boolean" },
        },
        "required": ["kind", "version", "name", "count", "sure"],
        "additionalProperties": false,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
    let upstream = upstream();
    let text = chat(&upstream.url(), &json!({ "response_format": format })).text();
    let instance = json!({ "kind": "b", "version": 3, "name": "a", "count": 2, "sure": false });
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), instance);
    let object = json!({ "response_format": { "type": "json_object" }, "stream": true });
    assert_eq!(chat(&upstream.url(), &object).text(), "{}");
}

#[test]
fn an_echo_is_exact() {
    let messages = json!([
        { "role": "user", "content": "ECHO no" },
        { "role": "user", "content": [{ "type": "text", "text": "ECHO {\"a\":  \"ü\n\"} " }] },
    ]);
    for stream in [false, true] {
        let reply = chat(&upstream().url(), &json!({ "messages": messages, "stream": stream }));
        assert_eq!(reply.text(), "{\"a\":  \"ü\n\"} ");
    }
}

#[test]
fn completions_take_a_prompt() {
    let upstream = upstream();
    let ask = |body: &str| ask(&upstream.url(), "POST", "/v1/completions", body);
    let plain = ask(r#"{"prompt": "once", "temperature": 0}"#).json();
    let text = plain["choices"][0]["text"].as_str().unwrap();
    assert_eq!(text.split(' ').count(), 12);
    let stream = ask(r#"{"prompt": "once", "temperature": 0, "stream": true}"#);
    let chunks = stream.data().into_iter().filter(|data| *data != "[DONE]");
    let pieces: String = chunks
        .map(|data| serde_json::from_str::<Value>(data).unwrap()["choices"][0]["text"].clone())
        .map(|text| text.as_str().unwrap().to_owned())
        .collect();
    assert_eq!(pieces, text);
}

#[test]
fn a_request_without_messages_is_refused() {
    let upstream = upstream();
    let reply = ask(&upstream.url(), "POST", "/v1/chat/completions", "{}");
    assert_eq!(reply.status(), 400);
    assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
    assert_eq!(reply.json()["error"]["param"], "messages");
    assert_eq!(ask(&upstream.url(), "POST", "/v1/chat/completions", "{").status(), 400);
    assert_eq!(ask(&upstream.url(), "POST", "/v1/completions", "{}").status(), 400);
    assert_eq!(upstream.generations(), 0);
}

#[test]
fn tokens_come_at_their_pace() {
    let upstream = ScriptedUpstream::start(ScriptedOptions {
        model: "scripted".into(),
        tokens: 5,
        first_token: Duration::from_millis(60),
        token: Duration::from_millis(20),
    })
    .unwrap();
    for stream in [false, true] {
        let begun = Instant::now();
        chat(&upstream.url(), &json!({ "stream": stream }));
        assert!(begun.elapsed() >= Duration::from_millis(60 + 4 * 20));
    }
}
