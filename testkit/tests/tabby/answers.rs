//! Answers, streams, constraints, tool calls, tokens.

use exrail_testkit::{Tabby, TabbyFaults, TabbyOptions};
use serde_json::{Value, json};

use crate::support::*;

#[test]
fn a_plain_chat_sends_its_nulls() {
    let tabby = start(TabbyFaults::default());
    let (status, answer) = chat(&tabby, json!({"model": "nobody", "unknown": 1}));
    assert_eq!(status, 200);
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["model"], "tiny");
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer.as_object().unwrap()["usage"], Value::Null);
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["eos_reason"]),
        (&json!("stop"), &json!("stop_token"))
    );
    assert_eq!(choice["stop_str"], "<|im_end|>");
    assert_eq!(content(&answer).split(' ').count(), 24);
    for null in ["reasoning_content", "tool_calls", "tool_call_id"] {
        assert_eq!(choice["message"].as_object().unwrap()[null], Value::Null);
    }
    assert_eq!(choice.as_object().unwrap()["logprobs"], Value::Null);
    assert_eq!(tabby.generations(), 1);
    assert_eq!(tabby.bodies()[0]["model"], "nobody");
}

#[test]
fn a_stream_has_no_role_and_ends_with_its_reason() {
    let tabby = start(TabbyFaults::default());
    let whole = chat(&tabby, json!({})).1;
    let chunks = stream_of(&tabby, "/v1/chat/completions", &chat_body(json!({"stream": true})));
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, content(&whole));
    assert_eq!(chunks.len(), 25);
    assert!(chunks.iter().all(|chunk| chunk["choices"][0]["delta"].get("role").is_none()));
    assert!(chunks[0]["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert_eq!(chunks[0]["model"], "tiny");
    let end = &chunks[24]["choices"][0];
    assert_eq!(
        *end,
        json!({"index": 0, "delta": {}, "finish_reason": "stop", "eos_reason": "stop_token"})
    );
}

#[test]
fn usage_comes_only_when_asked_for_and_replaces_the_last_chunk() {
    let tabby = start(TabbyFaults::default());
    let ask = json!({"stream_options": {"include_usage": true}, "max_tokens": 5});
    let (_, answer) = chat(&tabby, ask.clone());
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["choices"][0]["eos_reason"], "max_new_tokens");
    assert_eq!(answer["choices"][0].as_object().unwrap()["stop_str"], Value::Null);
    let mut ask = chat_body(ask);
    ask["stream"] = json!(true);
    let chunks = stream_of(&tabby, "/v1/chat/completions", &ask);
    assert_eq!(chunks.len(), 6);
    assert!(chunks[..5].iter().all(|chunk| chunk.get("usage").is_none()));
    let last = &chunks[5];
    assert_eq!(last["choices"], json!([{"index": 0, "delta": {}, "finish_reason": "length"}]));
    let usage = last["usage"].as_object().unwrap();
    assert_eq!(usage["prompt_tokens"], answer["usage"]["prompt_tokens"]);
    for key in ["prompt_time", "completion_time", "total_time"] {
        assert!(usage[key].is_f64(), "{key}");
    }
    for key in ["prompt_tokens_per_sec", "completion_tokens_per_sec"] {
        assert!(usage[key].is_f64() || usage[key] == "Indeterminate", "{key}");
    }
}

#[test]
fn usage_counts_what_the_token_routes_count() {
    let tabby = start(TabbyFaults::default());
    let (_, answer) = chat(&tabby, json!({"stream_options": {"include_usage": true}}));
    let encode = |text: Value, add_bos: bool| {
        let body = json!({"text": text, "add_bos_token": add_bos});
        post(&tabby, "/v1/token/encode", API, &body).1
    };
    let text = encode(json!(content(&answer)), false);
    assert_eq!(text["length"], answer["usage"]["completion_tokens"]);
    let decoded = post(&tabby, "/v1/token/decode", API, &json!({"tokens": text["tokens"]})).1;
    assert_eq!(decoded["text"], content(&answer));
    // Messages come without what opens an answer, which is three tokens, and with a BOS.
    let prompt = encode(messages("How do pumps leak?"), true);
    let n_prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(prompt["length"].as_u64().unwrap(), n_prompt - 3 + 1);
    let plain = json!({"tokens": prompt["tokens"], "decode_special_tokens": false});
    let decoded = post(&tabby, "/v1/token/decode", API, &plain).1;
    assert_eq!(decoded["text"], "user\nHow do pumps leak?\n");
}

#[test]
fn greedy_texts_are_equal_and_sampled_ones_are_not_whatever_the_seed() {
    let tabby = start(TabbyFaults::default());
    let text = |more: Value| content(&chat(&tabby, more).1).to_owned();
    assert_eq!(text(json!({})), text(json!({})));
    assert_ne!(text(json!({})), text(json!({"messages": messages("Another one")})));
    let sampled = json!({"temperature": 1, "seed": 7});
    assert_ne!(text(sampled.clone()), text(sampled));
}

#[test]
fn stops_end_a_text_and_say_which() {
    let tabby = start(TabbyFaults::default());
    let whole = content(&chat(&tabby, json!({})).1).to_owned();
    let third = whole.split(' ').nth(2).unwrap();
    let (_, answer) = chat(&tabby, json!({"stop": ["nowhere", third]}));
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["eos_reason"], &choice["stop_str"]),
        (&json!("stop_string"), &json!(third))
    );
    assert_eq!(content(&answer), whole.split_once(third).unwrap().0);
    let first = whole.split(' ').next().unwrap();
    let (_, answer) = chat(&tabby, json!({"stop": first}));
    assert_eq!(answer["choices"][0]["message"].as_object().unwrap()["content"], Value::Null);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
}

#[test]
fn choices_come_by_their_index() {
    let tabby = start(TabbyFaults::default());
    let (_, answer) = chat(&tabby, json!({"n": 3, "temperature": 1}));
    let texts: Vec<&Value> =
        (0..3).map(|index| &answer["choices"][index]["message"]["content"]).collect();
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
    let body = chat_body(json!({"n": 2, "stream": true, "max_tokens": 3}));
    let chunks = stream_of(&tabby, "/v1/chat/completions", &body);
    for index in 0..2 {
        let of = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == index);
        assert_eq!(of.count(), 4);
    }
}

#[test]
fn logprobs_name_tokens_and_no_bytes() {
    let tabby = start(TabbyFaults::default());
    let (_, answer) = chat(&tabby, json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 2}));
    let entries = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), 2);
    assert!(entries[0]["token_id"].is_u64() && entries[0].get("bytes").is_none());
    assert_eq!(entries[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(entries[0]["top_logprobs"][0]["token"], entries[0]["token"]);
}

#[test]
fn completions_have_their_own_fields() {
    let tabby = start(TabbyFaults::default());
    let body = json!({"prompt": ["one", "two"], "n": 2, "max_tokens": 4, "logprobs": 1});
    let (_, answer) = post(&tabby, "/v1/completions", API, &body);
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 4);
    let choice = &answer["choices"][3];
    assert_eq!(choice["index"], 3);
    assert_eq!(choice["finish_reason"], "length");
    assert!(choice["text"].is_string() && choice.get("stop_str").is_none());
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(choice["logprobs"][field].as_array().unwrap().len(), 4, "{field}");
    }
    let body = json!({"prompt": "one", "max_tokens": 4, "stream": true, "n": 2});
    let chunks = stream_of(&tabby, "/v1/completions", &body);
    assert!(chunks[0]["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&chunks[0]["model_name"], chunks[0].get("model")), (&json!("tiny"), None));
    assert!(chunks[0]["choices"][0]["text"].is_string());
    // The second choice may be five tokens longer; each ends with a chunk of its own.
    assert_eq!(chunks.len(), 4 + 1 + 9 + 1);
}

#[test]
fn a_streamed_completion_without_max_tokens_fails_without_done() {
    let tabby = start(TabbyFaults::default());
    let body = json!({"prompt": "one", "stream": true});
    let (status, text) = post_text(&tabby, "/v1/completions", API, &body);
    assert_eq!(status, 200);
    let events = events(&text);
    assert_eq!(events.len(), 1, "{text}");
    let event: Value = serde_json::from_str(&events[0]).unwrap();
    assert!(event["error"]["message"].is_string());
    assert_eq!(event["error"].as_object().unwrap()["trace"], Value::Null);
}

#[test]
fn schemas_constrain_and_json_object_does_not() {
    let tabby = start(TabbyFaults::default());
    let schema = json!({"type": "object", "required": ["a", "b"],
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}});
    let wrapped = json!({"name": "n", "strict": true, "schema": schema});
    let asks = [
        json!({"json_schema": schema}),
        json!({"response_format": {"type": "json_schema", "json_schema": schema}}),
        json!({"response_format": {"type": "json_schema", "json_schema": wrapped}}),
    ];
    for ask in asks {
        let (_, answer) = chat(&tabby, ask);
        let value: Value = serde_json::from_str(content(&answer)).unwrap();
        assert!(value["a"].is_i64() && value["b"].is_string(), "{value}");
        assert_eq!(answer["choices"][0]["eos_reason"], "end_filter");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    let (_, cut) = chat(&tabby, json!({"json_schema": schema, "max_tokens": 3}));
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    assert!(serde_json::from_str::<Value>(content(&cut)).is_err());
    let (_, json) = chat(&tabby, json!({"response_format": {"type": "json"}}));
    assert_eq!(content(&json), "{}");
    let (_, free) = chat(&tabby, json!({"response_format": {"type": "json_object"}}));
    assert!(!content(&free).starts_with('{'));
    let (_, matching) = chat(&tabby, json!({"regex_pattern": "(yes|no), [0-9]{2}"}));
    assert_eq!(content(&matching), "yes, 00");
}

fn with_tools(choice: Value) -> Value {
    let function = json!({"name": "look", "description": "d", "parameters": {"type": "object"}});
    json!({"messages": messages("Please CALL look {\"at\": [1, 2]} now"), "tool_choice": choice,
        "tools": [{"type": "function", "function": function}]})
}

#[test]
fn a_marked_call_comes_whole_and_at_the_end() {
    let tabby = start(TabbyFaults::default());
    let (_, answer) = chat(&tabby, with_tools(json!("auto")));
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"].as_object().unwrap()["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("look")));
    let arguments = call["function"]["arguments"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(arguments).unwrap(), json!({"at": [1, 2]}));
    let mut streamed = chat_body(with_tools(json!("auto")));
    streamed["stream"] = json!(true);
    let chunks = stream_of(&tabby, "/v1/chat/completions", &streamed);
    assert_eq!(chunks.len(), 2);
    let calls = &chunks[0]["choices"][0]["delta"]["tool_calls"];
    assert_eq!(calls[0]["function"]["arguments"], arguments);
    assert_eq!(chunks[1]["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn a_call_that_is_cut_is_text_and_a_choice_of_tools_is_not_enforced() {
    let tabby = start(TabbyFaults::default());
    let mut cut = with_tools(json!("auto"));
    cut["max_tokens"] = json!(5);
    let (_, answer) = chat(&tabby, cut);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert!(content(&answer).starts_with("<tool"), "{answer}");
    let off = chat(&tabby, with_tools(json!("none"))).1;
    assert_eq!(off["choices"][0]["finish_reason"], "stop");
    let named = json!({"type": "function", "function": {"name": "look"}});
    for choice in [json!("required"), named] {
        let mut ask = with_tools(choice);
        ask["messages"] = messages("Please look");
        let answer = chat(&tabby, ask).1;
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert!(answer["choices"][0]["message"]["tool_calls"].is_null());
    }
}

#[test]
fn pings_are_comments_and_zero_turns_them_off() {
    let body = chat_body(json!({"stream": true}));
    let (_, text) = post_text(&slow(TabbyFaults::default()), "/v1/chat/completions", API, &body);
    assert!(text.contains(": ping - 20"), "{text}");
    let off = TabbyOptions { ping: std::time::Duration::ZERO, ..TabbyOptions::default() };
    let (_, text) = post_text(&Tabby::start(off).unwrap(), "/v1/chat/completions", API, &body);
    assert!(!text.contains("ping"), "{text}");
}

#[test]
fn a_client_that_leaves_ends_its_stream() {
    let tabby = slow(TabbyFaults::default());
    let mut open = Open::begin(&tabby, &chat_body(json!({"stream": true, "min_tokens": 1000})));
    open.until("data: ");
    assert_eq!(tabby.cancelled(), 0);
    drop(open);
    eventually(|| tabby.cancelled() == 1);
    // One that is read to its end is not cancelled.
    stream_of(&tabby, "/v1/chat/completions", &chat_body(json!({"stream": true, "max_tokens": 1})));
    assert_eq!((tabby.cancelled(), tabby.generations()), (1, 2));
}

#[test]
fn a_client_that_leaves_ends_its_plain_request_too() {
    let tabby = slow(TabbyFaults::default());
    // A load waits for jobs; this one alone would take a minute.
    let open = Open::begin(&tabby, &chat_body(json!({"min_tokens": 4000})));
    eventually(|| tabby.generations() == 1);
    drop(open);
    let events = load(&tabby, &json!({"model_name": "other"}));
    assert_eq!(events.last().unwrap()["status"], "finished");
    assert_eq!(tabby.cancelled(), 0);
}

#[test]
fn dropped_with_an_open_stream_it_ends_at_once() {
    let tabby = slow(TabbyFaults::default());
    let mut open = Open::begin(&tabby, &chat_body(json!({"stream": true, "min_tokens": 1000})));
    open.until("data: ");
    let begin = std::time::Instant::now();
    drop(tabby);
    assert!(begin.elapsed().as_secs() < 2);
}
