//! Answers that have to be something: schemas, regular expressions, grammars (G-13).

use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::support::{Answer, MODEL, events, warm, warm_speaking};

const CHAT: &str = "/v1/chat/completions";

fn chat(extra: &Value) -> Value {
    let mut body = json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 200,
        "temperature": 1.2,
        "seed": 11,
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "color_of_the_box": {"enum": ["red", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "is_open": {"type": "boolean"},
        },
        "required": ["color_of_the_box", "count", "is_open"],
    })
}

fn named(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "box", "schema": schema, "strict": true}})
}

/// The content of the only choice.
fn content(answer: &Answer) -> String {
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let choice = answer.json()["choices"][0].clone();
    choice["message"]["content"].as_str().unwrap_or_else(|| panic!("{choice}")).to_owned()
}

fn is_a_box(text: &str) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(text) else { return false };
    let Some(map) = value.as_object() else { return false };
    map.len() == 3
        && ["red", "blue"].iter().any(|color| map["color_of_the_box"] == *color)
        && map["count"].as_i64().is_some_and(|count| (0..=99).contains(&count))
        && map["is_open"].is_boolean()
}

fn joined(answer: &Answer, field: &str) -> String {
    let chunks = chunks(answer);
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][field].as_str()).collect()
}

/// The events of a stream that came to its end.
fn chunks(answer: &Answer) -> Vec<Value> {
    let events = events(&answer.text);
    assert_eq!(events.last(), Some(&"[DONE]"), "{}", answer.text);
    let events = &events[..events.len() - 1];
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// B9: whichever field a schema comes in, it is the same lock, and the answer is the same value of it.
#[tokio::test]
async fn b9_a_schema_is_the_same_lock_in_every_field() {
    let server = warm(&[], None);
    let openai = server.post(CHAT, &chat(&json!({"response_format": named(&schema())}))).await;
    let native = server.post(CHAT, &chat(&json!({"json_schema": schema()}))).await;
    assert!(is_a_box(&content(&openai)), "{}", openai.text);
    assert_eq!(content(&openai), content(&native));
    let lines = server.trace_lines();
    let hashes: Vec<_> = lines.iter().map(|line| &line["structured"]["schema_hash"]).collect();
    assert_eq!(hashes[0].as_str().unwrap().len(), 64);
    assert_eq!(hashes[0], hashes[1]);
    assert_eq!(lines[0]["structured"]["is_complete"], true);

    let mut text = json!({"model": MODEL, "prompt": "ab", "max_tokens": 200, "seed": 3});
    text["json_schema"] = schema();
    let answer = server.post("/v1/completions", &text).await;
    assert!(is_a_box(answer.json()["choices"][0]["text"].as_str().unwrap()), "{}", answer.text);
    assert_eq!(&server.trace_lines()[2]["structured"]["schema_hash"], hashes[0]);
}

/// B8: two jobs that run at the same time obey each its own constraint, and a third one none.
#[tokio::test]
async fn b8_jobs_of_one_batch_obey_each_its_own_constraint() {
    let server = warm(&[], None);
    let boxes = chat(&json!({"response_format": named(&schema()), "n": 2}));
    let digits = chat(&json!({"regex": "[0-9]{4}-[0-9]{2}", "n": 2}));
    let free = chat(&json!({"max_tokens": 20}));
    let (boxes, digits, free) = tokio::join!(
        server.post(CHAT, &boxes),
        server.post(CHAT, &digits),
        server.post(CHAT, &free)
    );
    for choice in boxes.json()["choices"].as_array().unwrap() {
        assert!(is_a_box(choice["message"]["content"].as_str().unwrap()), "{choice}");
        assert_eq!(choice["finish_reason"], "stop");
    }
    for choice in digits.json()["choices"].as_array().unwrap() {
        let text = choice["message"]["content"].as_str().unwrap();
        let shape: String =
            text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(shape, "0000-00", "{choice}");
    }
    assert_eq!(free.status, StatusCode::OK);
}

/// B8: what other servers call ours is refused with our name for it, at every level.
#[tokio::test]
async fn b8_constraints_of_other_names_are_refused_with_ours() {
    let server = warm(&[], None);
    let cases = [
        (json!({"guided_json": {}}), "guided_json", "`json_schema`"),
        (json!({"guided_regex": "a"}), "guided_regex", "`regex`"),
        (json!({"guided_grammar": "a"}), "guided_grammar", "`grammar`"),
        (json!({"guided_choice": ["a"]}), "guided_choice", "`json_schema`"),
        (json!({"functions": []}), "functions", "`tools`"),
        (
            json!({"response_format": {"type": "json_object", "schema": {}}}),
            "response_format",
            "schema",
        ),
        (json!({"regex": "a", "json_schema": {}}), "regex", "`json_schema`"),
        (
            json!({"messages": [{"role": "user", "content": "x", "json_schema": {}}]}),
            "messages[0].json_schema",
            "unknown field",
        ),
    ];
    for (extra, field, named) in cases {
        let answer = server.post(CHAT, &chat(&extra)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{extra}: {}", answer.text);
        let error = &answer.json()["error"];
        assert_eq!(error["param"], field, "{extra}: {error}");
        assert!(error["message"].as_str().unwrap().contains(named), "{extra}: {error}");
    }
    let ask = json!({"question": "Where?", "json_schema": {}});
    let answer = server.post("/v1/ask", &ask).await;
    assert_eq!(answer.json()["error"]["param"], "json_schema", "{}", answer.text);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let text = json!({"model": MODEL, "prompt": "ab", "tools": tools});
    let answer = server.post("/v1/completions", &text).await;
    assert_eq!(answer.json()["error"]["param"], "tools", "{}", answer.text);
}

/// B1, B2, B3: a constraint that cannot be honoured is a 400 that names it. No step is made for it, and who
/// streams beside it notices nothing.
#[tokio::test]
async fn b3_a_broken_constraint_is_refused_before_any_step() {
    let server = warm(&[], None);
    let alive = chat(&json!({"stream": true, "max_tokens": 60}));
    let (healthy, ()) = tokio::join!(server.post(CHAT, &alive), async {
        for (extra, field) in broken() {
            let answer = server.post(CHAT, &chat(&extra)).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{extra}: {}", answer.text);
            assert_eq!(answer.json()["error"]["param"], field, "{extra}: {}", answer.text);
            let codes = ["invalid_grammar", "unsupported_schema", "grammar_too_large"];
            assert!(codes.contains(&answer.code().as_str()), "{extra}: {}", answer.text);
        }
    });
    chunks(&healthy);
    let engine = server.state.services().unwrap().engine.clone();
    let steps = engine.counters();
    for (extra, _) in broken() {
        server.post(CHAT, &chat(&extra)).await;
    }
    assert_eq!(engine.counters().steps, steps.steps, "no step was made");
}

fn broken() -> Vec<(Value, &'static str)> {
    let format = |schema: Value| json!({"response_format": named(&schema)});
    let field = "response_format.json_schema.schema";
    vec![
        (json!({"regex": "[a-z"}), "regex"),
        (json!({"regex": "\\d{"}), "regex"),
        (json!({"grammar": {"type": "lark", "text": "begin: \"a\""}}), "grammar.text"),
        (json!({"grammar": {"type": "gbnf", "text": "Root ::= \"a\""}}), "grammar.text"),
        (json!({"json_schema": 5}), "json_schema"),
        (json!({"json_schema": {"type": "strnig"}}), "json_schema"),
        (
            format(
                json!({"type": "object", "properties": {"a": {"pattern": "[a-z", "type": "string"}}}),
            ),
            field,
        ),
        (format(json!({"$ref": "https://example.com/schema.json"})), field),
        (format(json!({"enum": []})), field),
    ]
}

/// B11: an object that does not fit is told as one that is cut, under every limit.
#[tokio::test]
async fn b11_an_answer_is_whole_or_told_as_cut_under_every_limit() {
    let server = warm(&[], None);
    let mut n_whole = 0;
    for max_tokens in 1..=64 {
        let extra = json!({"response_format": named(&schema()), "max_tokens": max_tokens});
        let answer = server.post(CHAT, &chat(&extra)).await;
        let is_whole = is_a_box(&content(&answer));
        let choice = answer.json()["choices"][0].clone();
        match choice["finish_reason"].as_str() {
            Some("stop") => assert!(is_whole, "{max_tokens}: {choice}"),
            Some("length") => {
                assert_eq!(choice["exrail_finish_reason"], "schema_incomplete", "{choice}");
                assert!(!is_whole, "{max_tokens}: {choice}");
            }
            found => panic!("{max_tokens}: {found:?}"),
        }
        n_whole += usize::from(is_whole);
        let line = server.trace_lines().pop().unwrap();
        assert_eq!(line["structured"]["is_complete"], is_whole, "{line}");
    }
    assert!((1..64).contains(&n_whole), "both ends were seen: {n_whole} whole");
}

#[tokio::test]
async fn a_stream_of_a_structured_answer_joins_to_the_whole_one() {
    let server = warm(&[], None);
    for constraint in [
        json!({"response_format": named(&schema())}),
        json!({"response_format": {"type": "json_object"}, "max_tokens": 40}),
        json!({"regex": "(ab|cd){3,9}"}),
        json!({"grammar": {"type": "lark", "text": "start: \"x\" /[0-9]{2,5}/ \"y\""}}),
    ] {
        let whole = server.post(CHAT, &chat(&constraint)).await;
        let mut body = chat(&constraint);
        body["stream"] = json!(true);
        let stream = server.post(CHAT, &body).await;
        assert_eq!(joined(&stream, "content"), content(&whole), "{constraint}");
        let last = chunks(&stream).pop().unwrap();
        let choice = &whole.json()["choices"][0];
        assert_eq!(last["choices"][0]["finish_reason"], choice["finish_reason"]);
        assert_eq!(last["choices"][0]["exrail_finish_reason"], choice["exrail_finish_reason"]);
    }
}

const THINKS: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>\n\
    {# </think> #}{% if enable_thinking is defined %}</think>{% endif %}";

/// B15: the template opens a thought. What the model writes before it ends is no content, in streams, too; the
/// tiny model never ends it. What follows an end is tested with the lock itself.
#[tokio::test]
async fn b15_inside_an_open_thought_nothing_is_content() {
    let server = warm_speaking(THINKS);
    let constraint = json!({"response_format": named(&schema()), "max_tokens": 60});
    for seed in 0..6 {
        let mut body = chat(&constraint);
        body["seed"] = json!(seed);
        let whole = server.post(CHAT, &body).await;
        assert_eq!(content(&whole), "", "{}", whole.text);
        let choice = whole.json()["choices"][0].clone();
        assert_eq!(choice["exrail_finish_reason"], "schema_incomplete", "{choice}");
        let thought = choice["message"]["reasoning_content"].as_str().unwrap();
        assert!(!thought.is_empty());
        body["stream"] = json!(true);
        let stream = server.post(CHAT, &body).await;
        assert_eq!(joined(&stream, "content"), "");
        assert_eq!(joined(&stream, "reasoning_content"), thought);
    }
    let refused = server.post(CHAT, &chat(&json!({"regex": "a"}))).await;
    assert_eq!(refused.code(), "unsupported_field", "{}", refused.text);
}

/// I3: a stop string inside a value ends the answer, and not the value.
#[tokio::test]
async fn i3_a_stop_string_inside_a_value_leaves_it_incomplete() {
    let server = warm(&[], None);
    let extra = json!({"response_format": named(&schema()), "stop": ["\"count\""]});
    let answer = server.post(CHAT, &chat(&extra)).await;
    let choice = answer.json()["choices"][0].clone();
    assert_eq!(choice["exrail_finish_reason"], "schema_incomplete", "{choice}");
    assert_eq!(choice["finish_reason"], "length");
    assert!(!content(&answer).contains("\"count"), "{choice}");
}

/// I6: log-probabilities of a structured answer are there, and spell it.
#[tokio::test]
async fn i6_logprobs_spell_a_structured_answer() {
    let server = warm(&[], None);
    let extra = json!({"response_format": named(&schema()), "logprobs": true, "top_logprobs": 2});
    let mut body = chat(&extra);
    for stream in [false, true] {
        body["stream"] = json!(stream);
        let answer = server.post(CHAT, &body).await;
        let (text, entries) = match stream {
            false => {
                let choice = answer.json()["choices"][0].clone();
                let entries = choice["logprobs"]["content"].as_array().unwrap().clone();
                (content(&answer), entries)
            }
            true => {
                let lists = chunks(&answer);
                let lists = lists.iter();
                let lists = lists.filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array());
                (joined(&answer, "content"), lists.flatten().cloned().collect())
            }
        };
        let bytes = entries.iter().flat_map(|entry| entry["bytes"].as_array().unwrap().clone());
        let bytes: Vec<u8> = bytes.map(|b| u8::try_from(b.as_u64().unwrap()).unwrap()).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), text, "stream: {stream}");
        assert!(is_a_box(&text));
    }
}

#[tokio::test]
async fn the_configuration_shows_the_limits_of_structured_answers() {
    let server = warm(&[], None);
    let config = server.get("/v1/exrail/config").await.json();
    assert_eq!(config["structured"]["tool_calls"], 3);
    assert_eq!(config["structured"]["repairs"], 1);
    assert_eq!(config["structured"]["tool_family"], "generic");
}

/// G-13: what the mask does not hold is validated, asked for once more, and then withheld.
#[tokio::test]
async fn g13_an_answer_that_does_not_conform_is_repaired_or_withheld() {
    let server = warm(&[], None);
    let pair = json!({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2,
        "uniqueItems": true});
    let (mut n_right, mut n_withheld) = (0, 0);
    for seed in 0..24 {
        let extra = json!({"json_schema": pair, "seed": seed, "stream": seed % 2 == 1});
        let answer = server.post(CHAT, &chat(&extra)).await;
        match answer.status {
            StatusCode::UNPROCESSABLE_ENTITY => {
                n_withheld += 1;
                assert_eq!(answer.code(), "schema_violation", "{}", answer.text);
                assert!(answer.text.contains("after 2 attempts"), "{}", answer.text);
            }
            StatusCode::OK if seed % 2 == 1 && !answer.text.contains("[DONE]") => {
                n_withheld += 1;
                assert!(answer.text.contains("schema_violation"), "{}", answer.text);
            }
            _ => {
                let text =
                    if seed % 2 == 1 { joined(&answer, "content") } else { content(&answer) };
                let value: Value = serde_json::from_str(&text).unwrap();
                assert_ne!(value[0], value[1], "{}", answer.text);
                n_right += 1;
            }
        }
    }
    assert!(n_right > 0 && n_withheld > 0, "{n_right} right, {n_withheld} withheld");
    let repaired = server.trace_lines();
    let repaired = repaired.iter().filter(|line| line["structured"]["n_repairs"] == 1).count();
    assert!(repaired > 0, "a further attempt succeeded");
    assert!(server.get("/metrics").await.text.contains("guard=\"schema_lock\""));
}
