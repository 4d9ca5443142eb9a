//! What requests get: bodies, streams, refusals by name.

use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use serde_json::{Value, json};

use crate::support::{MODEL, Server, events, request, warm};

fn chat(extra: &Value) -> Value {
    let mut body = json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 6,
        "temperature": 0,
    });
    let fields = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    body
}

/// Random names and the clock, out of a snapshot's way.
fn steady(mut value: Value) -> Value {
    for (field, with) in [("id", json!("ID")), ("created", json!(0)), ("trace_id", json!("TRACE"))]
    {
        if let Some(found) = value.get_mut(field) {
            *found = with;
        }
    }
    value
}

async fn content(server: &Server, body: &Value) -> String {
    let answer = server.post("/v1/chat/completions", body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_chat_answer_has_the_shape_of_openai() {
    let server = warm(&[], None);
    let answer = server.post("/v1/chat/completions", &chat(&json!({}))).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let shape = serde_json::to_string_pretty(&steady(answer.json())).unwrap();
    insta::assert_snapshot!(shape);
}

#[tokio::test]
async fn a_stream_joins_to_the_whole_answer() {
    let server = warm(&[], None);
    let whole = content(&server, &chat(&json!({}))).await;
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let answer = server.post("/v1/chat/completions", &chat(&options)).await;
    let events = events(&answer.text);
    assert_eq!(events.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, whole);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let last = &chunks[chunks.len() - 1];
    assert_eq!(last["usage"]["completion_tokens"], 6);
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "length");
}

/// Whatever the engine's reason is, clients of OpenAI's API see one of theirs; the reason itself stands beside.
#[tokio::test]
async fn a_loop_is_cut_and_its_reason_is_told_twice() {
    let server = warm(&[], None);
    let stuck = json!({"logit_bias": {"40": 100}, "max_tokens": 1500});
    let answer = server.post("/v1/chat/completions", &chat(&stuck)).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["exrail_finish_reason"], "degenerate");
    assert_eq!(answer["usage"]["completion_tokens"], 1008);
    assert_eq!(server.trace_lines().last().unwrap()["finish_reason"], "degenerate");

    let mut stream = stuck.clone();
    stream["stream"] = json!(true);
    let answer = server.post("/v1/chat/completions", &chat(&stream)).await;
    let events = events(&answer.text);
    let last: Value = serde_json::from_str(events[events.len() - 2]).unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(last["choices"][0]["exrail_finish_reason"], "degenerate");

    let mut complete = stuck.clone();
    complete["model"] = json!(MODEL);
    complete["prompt"] = json!("ab");
    let answer = server.post("/v1/completions", &complete).await.json();
    assert_eq!(answer["choices"][0]["exrail_finish_reason"], "degenerate");

    // Asked for, the repetition is given: the mutation at the same time.
    let mut wanted = stuck;
    wanted["loop_guard"] = json!(false);
    let answer = server.post("/v1/chat/completions", &chat(&wanted)).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 1500);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert!(answer["choices"][0].get("exrail_finish_reason").is_none());
    let metrics = server.get("/metrics").await.text;
    assert!(metrics.contains("exrail_sequences_degenerate_total 3\n"), "{metrics}");
}

/// G-19: it goes back once, the answer has no token of the first loop, and the second one ends it.
#[tokio::test]
async fn a_loop_is_taken_back_where_that_is_asked_for() {
    let server = warm(&[], None);
    let stuck = json!({"logit_bias": {"40": 100}, "max_tokens": 1500, "loop_guard": {"on_loop": "roll_back"}});
    let answer = server.post("/v1/chat/completions", &chat(&stuck)).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["rolled_back_tokens"], 1008, "{answer}");
    assert_eq!(choice["exrail_finish_reason"], "degenerate");
    assert_eq!(answer["usage"]["completion_tokens"], 1008);
    let text = choice["message"]["content"].as_str().unwrap();
    let once = json!({"logit_bias": {"40": 100}, "max_tokens": 1500});
    let ended = server.post("/v1/chat/completions", &chat(&once)).await.json();
    assert!(ended["choices"][0].get("rolled_back_tokens").is_none());
    assert_eq!(ended["choices"][0]["message"]["content"], text, "what stands, and no more");
    let metrics = server.get("/metrics").await.text;
    assert!(metrics.contains("exrail_roll_backs_total 1\n"), "{metrics}");

    let mut complete = stuck.clone();
    complete["model"] = json!(MODEL);
    complete["prompt"] = json!("ab");
    let answer = server.post("/v1/completions", &complete).await.json();
    assert_eq!(answer["choices"][0]["rolled_back_tokens"], 1008);
    assert_eq!(answer["choices"][0]["text"].as_str().unwrap().len(), text.len());
}

#[tokio::test]
async fn options_of_the_loop_guard_are_honoured_or_refused() {
    let server = warm(&[], None);
    for (guard, expected) in [
        (json!({"on_loop": "shrug"}), "`stop` or `roll_back`"),
        (json!({"exempt": ["poems"]}), "`code` or `tables`"),
        (json!({"entropy_baseline": -1.0}), "entropy_baseline"),
        (json!({"window": 5}), "window"),
        (json!("on"), "true, false or an object"),
    ] {
        let body = chat(&json!({"loop_guard": guard}));
        let answer = server.post("/v1/chat/completions", &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text);
        assert!(answer.text.contains(expected), "{}", answer.text);
    }
    let body = chat(&json!({"loop_guard": {"on_loop": "roll_back"}, "stream": true}));
    let answer = server.post("/v1/chat/completions", &body).await;
    assert!(answer.text.contains("a stream takes nothing back"), "{}", answer.text);
    // A baseline far above what the answer has: a collapse, told by its reason.
    let guard = json!({"entropy_baseline": 1000.0, "exempt": ["code", "tables"]});
    let stuck = json!({"logit_bias": {"40": 100}, "max_tokens": 600, "loop_guard": guard});
    let answer = server.post("/v1/chat/completions", &chat(&stuck)).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 256, "{answer}");
    assert_eq!(answer["choices"][0]["exrail_finish_reason"], "degenerate");
}

#[tokio::test]
async fn the_same_seed_gives_the_same_answer_and_choices_differ() {
    let server = warm(&[], None);
    let body = chat(&json!({"temperature": 1.5, "seed": 5, "n": 3, "max_tokens": 12}));
    let texts = || async {
        let answer = server.post("/v1/chat/completions", &body).await.json();
        let choices = answer["choices"].as_array().unwrap().clone();
        choices.iter().map(|choice| choice["message"]["content"].clone()).collect::<Vec<_>>()
    };
    let (first, second) = (texts().await, texts().await);
    assert_eq!(first, second);
    assert_ne!(first[0], first[1]);
}

/// E11, its third case: no model drafts for another here, so that two vocabularies never meet; who asks for it is told.
#[tokio::test]
async fn e11_a_draft_is_refused_by_name() {
    let server = warm(&[], None);
    let cases = [
        ("draft_model", json!("smaller")),
        ("prediction", json!({"type": "content", "content": "x"})),
        ("speculative_ngram", json!(true)),
    ];
    for (field, value) in cases {
        let answer = server.post("/v1/chat/completions", &chat(&json!({field: value}))).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{field}: {}", answer.text);
        assert_eq!(answer.json()["error"]["param"], field, "{}", answer.text);
    }
}

#[tokio::test]
async fn unsupported_and_unknown_fields_are_named() {
    let server = warm(&[], None);
    let cases = [
        (json!({"tools": []}), "tools"),
        (json!({"response_format": {"type": "yaml"}}), "response_format"),
        (json!({"guided_json": {}}), "guided_json"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1000}), "n"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"stream_options": {}}), "stream_options"),
        (json!({"max_tokens": 3, "max_completion_tokens": 4}), "max_tokens"),
        (json!({"stop": [""]}), "stop"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": "x", "name": "y"}]}), "messages[0].name"),
    ];
    for (extra, field) in cases {
        let answer = server.post("/v1/chat/completions", &chat(&extra)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{extra}: {}", answer.text);
        assert_eq!(answer.json()["error"]["param"], field, "{extra}: {}", answer.text);
    }
    let ok = chat(&json!({"tools": null, "user": "me"}));
    assert_eq!(server.post("/v1/chat/completions", &ok).await.status, StatusCode::OK);
}

/// J5: edge values get the answer of the protocol or a 400, and the server goes on.
#[tokio::test]
async fn edge_values_are_answered_or_refused_by_name() {
    let server = warm(&[], None);
    for n in [0, 1, 2] {
        for max_tokens in [None, Some(0), Some(1)] {
            for echo in [false, true] {
                let body = json!({"model": MODEL, "prompt": "ab", "n": n, "max_tokens": max_tokens,
                    "echo": echo});
                let answer = server.post("/v1/completions", &body).await;
                let refused = match (n, max_tokens) {
                    (0, _) => Some("n"),
                    (_, Some(0)) => Some("max_tokens"),
                    (_, _) => None,
                };
                let json = answer.json();
                match refused {
                    Some(field) => assert_eq!(json["error"]["param"], field, "{body}: {json}"),
                    None => {
                        assert_eq!(json["choices"].as_array().unwrap().len(), n, "{body}: {json}")
                    }
                }
                let chat = chat(&json!({"n": n, "max_tokens": max_tokens}));
                let status = server.post("/v1/chat/completions", &chat).await.status;
                assert_eq!(status.is_success(), refused.is_none(), "{chat}");
            }
        }
    }
}

#[tokio::test]
async fn bad_bodies_get_one_clear_answer_and_the_server_goes_on() {
    let server = warm(&[], None);
    let bodies: [Vec<u8>; 5] = [
        b"{\"model\": ".to_vec(),
        b"\xff\xfe".to_vec(),
        b"[]".to_vec(),
        br#"{"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}"#.to_vec(),
        Vec::new(),
    ];
    for body in bodies {
        let request = request(Method::POST, "/v1/chat/completions", None, Body::from(body.clone()));
        let answer = server.send(request).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body:?}: {}", answer.text);
    }
    let large = "x".repeat(5 << 20);
    let answer = server.post("/v1/chat/completions", &json!(large)).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    let long = chat(&json!({"messages": [{"role": "user", "content": "word ".repeat(5000)}]}));
    let answer = server.post("/v1/chat/completions", &long).await;
    assert_eq!(answer.code(), "context_length_exceeded", "{}", answer.text);
    assert_eq!(server.post("/v1/chat/completions", &chat(&json!({}))).await.status, StatusCode::OK);
}

#[tokio::test]
async fn text_completions_echo_count_and_stream() {
    let server = warm(&[], None);
    let body = json!({"model": MODEL, "prompt": ["ab", "cd"], "max_tokens": 3, "n": 2, "echo": true,
        "temperature": 0});
    let answer = server.post("/v1/completions", &body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let json = answer.json();
    let texts: Vec<_> =
        json["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert!(texts[0].starts_with("ab") && texts[3].starts_with("cd"), "{texts:?}");
    assert_eq!(json["usage"]["completion_tokens"], 12);
    let many = json!({"model": MODEL, "prompt": vec!["ab"; 17]});
    let answer = server.post("/v1/completions", &many).await;
    assert!(answer.text.contains("expected at most 16, found 17"), "{}", answer.text);
    let stream = json!({"model": MODEL, "prompt": "ab", "max_tokens": 3, "stream": true,
        "temperature": 0});
    let answer = server.post("/v1/completions", &stream).await;
    assert_eq!(events(&answer.text).last(), Some(&"[DONE]"));
}

/// I6 of the field faults: they are there when they are asked for.
#[tokio::test]
async fn i6_logprobs_of_a_token_are_those_of_the_model() {
    let server = warm(&[], None);
    let body = chat(&json!({"logprobs": true, "top_logprobs": 4, "max_tokens": 2}));
    let answer = server.post("/v1/chat/completions", &body).await.json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 2);
    for token in content {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 4);
        // Greedy: the chosen token is the first alternative.
        assert_eq!(token["logprob"], top[0]["logprob"]);
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
    }
}

/// I5 of the field faults: one record a token, of the token that was drawn and not of the likeliest.
#[tokio::test]
async fn i5_logprobs_are_of_the_tokens_that_were_drawn() {
    let server = warm(&[], None);
    let drawn = json!({"temperature": 2.0, "seed": 5, "max_tokens": 8});
    let mut body = chat(&json!({"logprobs": true, "top_logprobs": 1}));
    body.as_object_mut().unwrap().extend(drawn.as_object().unwrap().clone());
    let answer = server.post("/v1/chat/completions", &body).await.json();
    let choice = &answer["choices"][0];
    let records = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(records.len() as u64, answer["usage"]["completion_tokens"].as_u64().unwrap());
    let bytes = records.iter().flat_map(|record| record["bytes"].as_array().unwrap());
    let bytes: Vec<u8> = bytes.map(|byte| u8::try_from(byte.as_u64().unwrap()).unwrap()).collect();
    let said = choice["message"]["content"].as_str().unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), said);
    let of = |record: &serde_json::Value| record["logprob"].as_f64().unwrap();
    let unlikely = |record: &&serde_json::Value| of(record) < of(&record["top_logprobs"][0]);
    assert!(records.iter().filter(unlikely).count() > 3, "{records:?}");
}

#[tokio::test]
async fn embeddings_come_as_floats_and_as_base64() {
    let server = warm(&[], None);
    let body = json!({"model": "fake", "input": ["red box", "blue box"]});
    let answer = server.post("/v1/embeddings", &body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let dim = answer.json()["data"][1]["embedding"].as_array().unwrap().len();
    let body = json!({"model": "fake", "input": "red box", "encoding_format": "base64"});
    let text = server.post("/v1/embeddings", &body).await.json();
    let text = text["data"][0]["embedding"].as_str().unwrap().to_owned();
    assert_eq!(text.trim_end_matches('=').len(), (dim * 4 * 4).div_ceil(3));
    let wrong = json!({"model": MODEL, "input": "x"});
    assert_eq!(server.post("/v1/embeddings", &wrong).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse_and_specials_stay_text() {
    let server = warm(&[], None);
    let text = "a <|im_end|> b";
    let plain = server.post("/v1/tokenize", &json!({"text": text})).await.json();
    let back = server.post("/v1/detokenize", &json!({"tokens": plain["tokens"]})).await.json();
    assert_eq!(back["text"], text);
    let special = json!({"text": text, "parse_special": true});
    let special = server.post("/v1/tokenize", &special).await.json();
    assert!(special["count"].as_u64() < plain["count"].as_u64());
    let wild = server.post("/v1/detokenize", &json!({"tokens": [4_000_000_000u32]})).await;
    assert_eq!(wild.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn an_ask_without_support_is_the_exact_refusal_and_is_traced() {
    let server = warm(&[], None);
    let body = json!({"question": "Where is the spare key of cabinet B?"});
    let answer = server.post("/v1/ask", &body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let json = answer.json();
    // A model of random weights supports nothing that it says.
    assert_eq!(json["answer"], "not in context", "{json}");
    assert_eq!(json["refusal"], true);
    assert_eq!(json["metrics"]["ds_status"], "not_calibrated");
    assert_eq!(json["checks"]["citation_recall"], Value::Null);
    assert_eq!(json["checks"]["ds_ac_status"], "undefined");
    let lines = server.trace_lines();
    let record = lines.last().unwrap();
    assert_eq!(record["event"], "answer.decide");
    assert_eq!(record["checks"], json["checks"], "the client is told what the record says");
    assert_eq!(record["trace_id"], json["trace_id"]);
    assert!(record["withheld_sha256"].is_string());
    for item in record["retrieved"].as_array().unwrap() {
        for field in ["snippet_id", "section_id", "tokens"] {
            assert!(!item[field].is_null(), "{field} in {item}");
        }
    }
}

#[tokio::test]
async fn a_grounded_chat_refuses_what_it_cannot_honour() {
    let server = warm(&[], None);
    let grounded = json!({"exrail": {"collection": "cabinets"}});
    let answer = server.post("/v1/chat/completions", &chat(&grounded)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    assert_eq!(answer.json()["exrail"]["refusal"], true);
    let cases = [
        (json!({"exrail": {"collection": "nowhere"}}), 404),
        (json!({"exrail": {"collection": "cabinets", "depth": 3}}), 400),
        (json!({"exrail": {"collection": "cabinets", "k": 0}}), 400),
        (json!({"exrail": {"collection": "cabinets"}, "n": 2}), 400),
        (json!({"exrail": {"collection": "cabinets"}, "logprobs": true}), 400),
        (
            json!({"exrail": {"collection": "cabinets"}, "messages": [
            {"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}),
            400,
        ),
    ];
    for (extra, status) in cases {
        let answer = server.post("/v1/chat/completions", &chat(&extra)).await;
        assert_eq!(answer.status.as_u16(), status, "{extra}: {}", answer.text);
    }
    let stream = json!({"exrail": {"collection": "cabinets"}, "stream": true});
    let answer = server.post("/v1/chat/completions", &chat(&stream)).await;
    assert_eq!(events(&answer.text).last(), Some(&"[DONE]"), "{}", answer.text);
    assert!(answer.text.contains("not in context"));
}
