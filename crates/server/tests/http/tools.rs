//! Calls of functions: which, how they are told, and that a cut one never is (G-13).

use axum::http::{StatusCode, header};
use exrail_server::{Limits, StructuredLimits};
use exrail_verify::dedupe_key;
use serde_json::{Value, json};

use crate::support::{Answer, MODEL, Server, cpu, events, four, start, warm, warm_on};

const CHAT: &str = "/v1/chat/completions";

fn parameters() -> Value {
    json!({
        "type": "object",
        "properties": {
            "shelf": {"type": "integer", "minimum": 1, "maximum": 40},
            "color": {"enum": ["red", "blue"]},
        },
        "required": ["shelf", "color"],
    })
}

fn chat(extra: &Value) -> Value {
    let tools = json!([
        {"type": "function", "function": {"name": "open_box", "description": "Opens a box.",
            "parameters": parameters()}},
        {"type": "function", "function": {"name": "wait"}},
    ]);
    let mut body = json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 300,
        "temperature": 1.0,
        "seed": 4,
        "tools": tools,
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn choice(answer: &Answer) -> Value {
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    answer.json()["choices"][0].clone()
}

/// Whether a call is one of the tools above, with the arguments that it wants.
fn is_right(call: &Value) -> bool {
    let text = call["function"]["arguments"].as_str().unwrap();
    let arguments: Value = serde_json::from_str(text).unwrap();
    let arguments = arguments.as_object().unwrap();
    match call["function"]["name"].as_str() {
        Some("open_box") => {
            arguments.len() == 2
                && arguments["shelf"].as_i64().is_some_and(|shelf| (1..=40).contains(&shelf))
                && ["red", "blue"].iter().any(|color| arguments["color"] == *color)
        }
        Some("wait") => arguments.is_empty(),
        _ => false,
    }
}

fn open_box() -> Value {
    json!({"tool_choice": {"type": "function", "function": {"name": "open_box"}}})
}

#[tokio::test]
async fn b20_a_demanded_call_comes_with_its_id_and_reason() {
    let server = warm(&[], None);
    for extra in [json!({"tool_choice": "required"}), open_box()] {
        let choice = choice(&server.post(CHAT, &chat(&extra)).await);
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        assert!(choice["message"]["content"].is_null(), "{choice}");
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert!((1..=3).contains(&calls.len()), "{choice}");
        let mut ids: Vec<_> = calls.iter().map(|call| call["id"].as_str().unwrap()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), calls.len());
        for call in calls {
            assert_eq!(call["type"], "function");
            assert!(is_right(call), "{call}");
        }
        if extra == open_box() {
            assert_eq!(calls[0]["function"]["name"], "open_box");
        }
    }
}

#[tokio::test]
async fn one_call_at_most_where_calls_are_not_parallel() {
    let server = warm(&[], None);
    for seed in 0..8 {
        let extra = json!({"tool_choice": "required", "parallel_tool_calls": false, "seed": seed});
        let choice = choice(&server.post(CHAT, &chat(&extra)).await);
        assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1, "{choice}");
    }
}

/// The calls of a stream, put together as a client does it.
fn put_together(answer: &Answer) -> (Vec<Value>, String, Value) {
    let events = events(&answer.text);
    assert_eq!(events.last(), Some(&"[DONE]"), "{}", answer.text);
    let mut calls: Vec<Value> = Vec::new();
    let (mut content, mut reason) = (String::new(), Value::Null);
    for event in &events[..events.len() - 1] {
        let chunk: Value = serde_json::from_str(event).unwrap();
        let choice = &chunk["choices"][0];
        content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        for delta in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = usize::try_from(delta["index"].as_u64().unwrap()).unwrap();
            if index == calls.len() {
                assert!(delta["id"].is_string() && delta["type"] == "function", "{delta}");
                assert!(delta["function"]["name"].is_string(), "{delta}");
                calls.push(delta.clone());
                continue;
            }
            assert!(delta.get("id").is_none(), "only in the first: {delta}");
            let more = delta["function"]["arguments"].as_str().unwrap();
            let arguments = &mut calls[index]["function"]["arguments"];
            *arguments = json!(format!("{}{more}", arguments.as_str().unwrap()));
        }
        if choice["finish_reason"].is_string() {
            reason = choice["finish_reason"].clone();
        }
    }
    (calls, content, reason)
}

#[tokio::test]
async fn b20_streamed_calls_join_to_those_of_the_whole_answer() {
    let server = warm(&[], None);
    for seed in 0..4 {
        let mut body = chat(&json!({"tool_choice": "required", "seed": seed}));
        let whole = choice(&server.post(CHAT, &body).await);
        body["stream"] = json!(true);
        let (calls, content, reason) = put_together(&server.post(CHAT, &body).await);
        assert_eq!((content.as_str(), &reason), ("", &whole["finish_reason"]));
        let function = |call: &Value| call["function"].clone();
        let whole = whole["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(
            calls.iter().map(function).collect::<Vec<_>>(),
            whole.iter().map(function).collect::<Vec<_>>()
        );
    }
}

/// G-13: under every limit a call is whole and valid, or it is not there; of a stream, too.
#[tokio::test]
async fn b11_no_call_ever_comes_from_a_cut_object() {
    let server = warm(&[], None);
    let (mut n_called, mut n_cut) = (0, 0);
    for max_tokens in (1..=64).chain([90, 120, 200, 300]) {
        let mut body = chat(&open_box());
        body["max_tokens"] = json!(max_tokens);
        let whole = choice(&server.post(CHAT, &body).await);
        let calls = whole["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
        assert!(calls.iter().all(is_right), "{max_tokens}: {whole}");
        match whole["finish_reason"].as_str() {
            Some("tool_calls") => {
                assert!(!calls.is_empty(), "{whole}");
                n_called += 1;
            }
            // Whole calls, where a further one might have come.
            Some("length") if !calls.is_empty() => n_called += 1,
            Some("length") => {
                assert_eq!(whole["exrail_finish_reason"], "schema_incomplete", "{whole}");
                assert_eq!(whole["message"]["content"].as_str().unwrap_or_default(), "");
                n_cut += 1;
            }
            found => panic!("{max_tokens}: {found:?}"),
        }
        body["stream"] = json!(true);
        let (streamed, content, reason) = put_together(&server.post(CHAT, &body).await);
        assert_eq!((streamed.len(), content.as_str()), (calls.len(), ""));
        assert_eq!(reason, whole["finish_reason"]);
        assert!(streamed.iter().all(is_right), "{max_tokens}: {streamed:?}");
    }
    assert!(n_called > 0 && n_cut > 0, "{n_called} called, {n_cut} cut");
}

#[tokio::test]
async fn without_a_demand_text_is_text_and_none_calls_nothing() {
    let server = warm(&[], None);
    for choice_field in [json!("auto"), json!("none"), json!(null)] {
        let extra = json!({"tool_choice": choice_field, "max_tokens": 12});
        let choice = choice(&server.post(CHAT, &chat(&extra)).await);
        assert!(choice["message"]["content"].is_string(), "{choice}");
        assert!(choice["message"].get("tool_calls").is_none(), "{choice}");
    }
    // The model is told of what it may call, and of nothing else.
    let prompt = |choice: &str| chat(&json!({"tool_choice": choice, "max_tokens": 1}));
    let tokens = async |choice: &str| {
        let answer = server.post(CHAT, &prompt(choice)).await.json();
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert!(tokens("auto").await > tokens("none").await);
}

#[tokio::test]
async fn a_conversation_goes_on_with_the_results_of_its_calls() {
    let server = warm(&[], None);
    let first = choice(&server.post(CHAT, &chat(&open_box())).await);
    let message = first["message"].clone();
    let id = message["tool_calls"][0]["id"].clone();
    let mut messages = vec![json!({"role": "user", "content": "hello"}), message.clone()];
    for call in message["tool_calls"].as_array().unwrap() {
        messages.push(json!({"role": "tool", "tool_call_id": call["id"], "content": "it is open"}));
    }
    let second = server.post(CHAT, &chat(&json!({"messages": messages}))).await;
    assert_eq!(second.status, StatusCode::OK, "{}", second.text);
    // The template has no tools: they are written into the messages, which then are told to the model.
    let short = json!({"messages": &messages[..1]});
    let short = server.post(CHAT, &chat(&short)).await.json();
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(tokens(&second.json()) > tokens(&short), "calls and results are read");
    messages.truncate(2);
    messages.push(json!({"role": "tool", "tool_call_id": format!("{}x", id.as_str().unwrap()),
        "content": "it is open"}));
    let wrong = server.post(CHAT, &chat(&json!({"messages": messages}))).await;
    assert_eq!(wrong.json()["error"]["param"], "messages[2].tool_call_id", "{}", wrong.text);
}

/// The trace names the contract of each tool; a client that expects another one is refused.
#[tokio::test]
async fn g13_contracts_are_traced_and_compared() {
    let server = warm(&[], None);
    choice(&server.post(CHAT, &chat(&open_box())).await);
    let line = server.trace_lines().pop().unwrap();
    let contracts = line["structured"]["contracts"].as_array().unwrap().clone();
    assert_eq!(contracts.len(), 2);
    assert_eq!(contracts[0]["name"], "open_box");
    assert!(line["structured"]["n_tool_calls"].as_u64().unwrap() >= 1, "{line}");
    let tools = |hash: &Value, parameters: Value| {
        let function = json!({"name": "open_box", "parameters": parameters, "contract_hash": hash});
        chat(&json!({"tools": [{"type": "function", "function": function}], "max_tokens": 2}))
    };
    let hash = &contracts[0]["contract_hash"];
    let same = server.post(CHAT, &tools(hash, parameters())).await;
    assert_eq!(same.status, StatusCode::OK, "{}", same.text);
    let mut other = parameters();
    other["properties"]["lock"] = json!({"type": "boolean"});
    let other = server.post(CHAT, &tools(hash, other)).await;
    assert_eq!(other.status, StatusCode::CONFLICT, "{}", other.text);
    assert_eq!(other.code(), "contract_mismatch");
}

#[tokio::test]
async fn tools_that_cannot_be_called_are_refused_by_name() {
    let server = warm(&[], None);
    let tool = |function: Value| json!([{"type": "function", "function": function}]);
    let cases = [
        (json!({"tools": []}), "tools"),
        (json!({"tools": tool(json!({"name": "a b"}))}), "tools[0].function.name"),
        (
            json!({"tools": tool(json!({"name": "f", "parameters": {"type": "array"}}))}),
            "tools[0].function.parameters",
        ),
        (
            json!({"tools": tool(json!({"name": "f", "parameters": {"type": "object",
                "properties": {"a": {"type": "string", "pattern": "[a-z"}}}}))}),
            "tools[0].function.parameters",
        ),
        (json!({"tool_choice": {"type": "function", "function": {"name": "fly"}}}), "tool_choice"),
        (json!({"tool_choice": "any"}), "tool_choice"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"regex": "a"}), "regex"),
        (json!({"tools": null, "tool_choice": "required"}), "tool_choice"),
        (json!({"tools": null, "parallel_tool_calls": true}), "parallel_tool_calls"),
        (
            json!({"tools": vec![json!({"type": "function", "function": {"name": "f"}}); 2]}),
            "tools",
        ),
    ];
    for (extra, field) in cases {
        let answer = server.post(CHAT, &chat(&extra)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{extra}: {}", answer.text);
        assert_eq!(answer.json()["error"]["param"], field, "{extra}: {}", answer.text);
    }
}

/// G-29: a call has the same key wherever it is told, and the key is that of its words.
#[tokio::test]
async fn g29_a_call_is_named_by_its_dedupe_key_in_answer_stream_and_record() {
    let server = warm(&[], None);
    let mut body = chat(&open_box());
    let choice = choice(&server.post(CHAT, &body).await);
    let calls = choice["message"]["tool_calls"].as_array().unwrap().clone();
    let expected: Vec<Value> = calls
        .iter()
        .map(|call| {
            let function = &call["function"];
            let arguments = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
            json!(dedupe_key(function["name"].as_str().unwrap(), &arguments, 0))
        })
        .collect();
    let keys = |calls: &[Value]| -> Vec<Value> {
        calls.iter().map(|call| call["exrail_dedupe_key"].clone()).collect()
    };
    assert_eq!(keys(&calls), expected);
    let traced = |server: &Server| {
        let line = server.trace_lines().pop().unwrap();
        line["structured"]["tool_calls"].as_array().unwrap().clone()
    };
    let recorded: Vec<Value> = traced(&server).iter().map(|it| it["dedupe_key"].clone()).collect();
    assert_eq!(recorded, expected);
    assert_eq!(traced(&server)[0]["name"], "open_box");
    body["stream"] = json!(true);
    let (streamed, _, _) = put_together(&server.post(CHAT, &body).await);
    assert_eq!(keys(&streamed), expected);
    assert_eq!(traced(&server).len(), expected.len());
    // A call may go back as it came, whatever the server said of it.
    let mut message = choice["message"].clone();
    for call in message["tool_calls"].as_array_mut().unwrap() {
        call["exrail_tainted"] = json!(["/shelf"]);
    }
    let results = calls
        .iter()
        .map(|call| json!({"role": "tool", "tool_call_id": call["id"], "content": "open"}));
    let messages =
        [json!({"role": "user", "content": "hello"}), message].into_iter().chain(results);
    let next = chat(&json!({"messages": messages.collect::<Vec<_>>(), "max_tokens": 2}));
    assert_eq!(server.post(CHAT, &next).await.status, StatusCode::OK);
}

/// A tool whose arguments the mask lets through and the check never does.
fn unreadable(choice: &str) -> Value {
    let list = json!({"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2, "uniqueItems": true});
    let parameters = json!({"type": "object", "properties": {"list": list}, "required": ["list"]});
    let function = json!({"name": "count", "parameters": parameters});
    chat(&json!({"tools": [{"type": "function", "function": function}], "tool_choice": choice}))
}

/// Fifty calls that cannot be read: two attempts a request.
async fn fail_often(server: &Server) {
    for _ in 0..25 {
        let answer = server.post(CHAT, &unreadable("required")).await;
        assert_eq!(answer.code(), "schema_violation", "{}", answer.text);
    }
}

fn auto() -> Value {
    chat(&json!({"tool_choice": "auto", "max_tokens": 12}))
}

#[tokio::test]
async fn g29_the_circuit_opens_for_free_calls_when_they_cannot_be_read() {
    let server = warm(&[], None);
    assert_eq!(server.post(CHAT, &auto()).await.status, StatusCode::OK);
    let state = async || {
        let metrics = server.get("/metrics").await.text;
        let line = metrics.lines().find(|line| line.starts_with("exrail_tool_circuit_open"));
        (line.unwrap().to_owned(), server.get("/readyz").await)
    };
    let (line, ready) = state().await;
    assert_eq!(line, "exrail_tool_circuit_open{model=\"tiny\"} 0");
    assert_eq!(ready.json()["open_tool_circuits"], json!([]));
    fail_often(&server).await;
    for stream in [false, true] {
        let mut body = auto();
        body["stream"] = json!(stream);
        let answer = server.post(CHAT, &body).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{}", answer.text);
        assert_eq!(answer.code(), "tool_circuit_open");
        let wait: u64 = answer.headers[header::RETRY_AFTER].to_str().unwrap().parse().unwrap();
        assert!((200..=301).contains(&wait), "{wait}");
    }
    let (line, ready) = state().await;
    assert_eq!(line, "exrail_tool_circuit_open{model=\"tiny\"} 1");
    // Everything but free calls is served, and a call that the grammar demands is one of those.
    assert_eq!(ready.status, StatusCode::OK);
    assert_eq!(ready.json()["open_tool_circuits"], json!([MODEL]));
    let demanded = choice(&server.post(CHAT, &chat(&open_box())).await);
    assert_eq!(demanded["finish_reason"], "tool_calls");
    let plain = chat(&json!({"tools": null, "max_tokens": 2}));
    assert_eq!(server.post(CHAT, &plain).await.status, StatusCode::OK);
    assert_eq!(
        server.trace_lines().iter().filter(|it| it["guard"] == "tool_circuit_open").count(),
        2
    );
}

/// The mutation: without the circuit the same model is asked again, and what it calls reaches nobody who could know.
#[tokio::test]
async fn mutation_g29_without_the_circuit_free_calls_go_on() {
    let structured = StructuredLimits { tool_circuit: false, ..StructuredLimits::default() };
    let limits = Limits { structured, ..Limits::default() };
    let server = warm_on(start(cpu(), four(), |_| {}), &[], limits);
    fail_often(&server).await;
    assert_eq!(server.post(CHAT, &auto()).await.status, StatusCode::OK);
}

/// A stream that ends in a call that cannot be read counts it once, as a whole answer does.
#[tokio::test]
async fn g29_a_streamed_call_counts_once() {
    let server = warm(&[], None);
    let mut body = unreadable("required");
    body["stream"] = json!(true);
    // Fifty calls open it, and no fewer: an attempt makes one, whether or not a stream can try again.
    let mut n_calls = 0;
    while n_calls < 50 {
        assert_eq!(server.post(CHAT, &auto()).await.status, StatusCode::OK, "after {n_calls}");
        let answer = server.post(CHAT, &body).await;
        assert!(answer.text.contains("schema_violation"), "{}", answer.text);
        let attempts = answer.text.split("withheld after ").nth(1).unwrap();
        n_calls += attempts.split(' ').next().unwrap().parse::<usize>().unwrap();
    }
    assert_eq!(server.post(CHAT, &auto()).await.code(), "tool_circuit_open");
}
