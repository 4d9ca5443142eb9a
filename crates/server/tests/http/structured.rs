//! Answers that have to be something: schemas, regular expressions, grammars (G-13).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use exrail_checkpoint::{Gguf, VocabularyTable};
use exrail_server::{Limits, router};
use exrail_testkit::{TinyLlama, tiny_llama};
use exrail_text::{ChatTemplate, Tokenizer, Vocabulary};
use futures_util::{StreamExt, future::join_all};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::{
    Answer, MODEL, Server, cpu, endless, events, four, request, start, warm, warm_on, warm_speaking,
};

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

/// A plain answer whose log-probabilities show the last bit of every logit, over and over until `is_done`. Each time
/// it is what it was alone. How often it was heard.
async fn undisturbed(server: &Server, alone: &[Value], is_done: &AtomicBool) -> usize {
    let mut n_heard = 0;
    while n_heard == 0 || !is_done.load(Ordering::Acquire) {
        assert_eq!(heard(server).await, alone);
        n_heard += 1;
    }
    n_heard
}

/// What a client hears of one plain stream, token by token.
async fn heard(server: &Server) -> Vec<Value> {
    let plain = json!({"stream": true, "max_tokens": 60, "logprobs": true, "top_logprobs": 3,
        "logit_bias": endless(server)});
    let answer = server.post(CHAT, &chat(&plain)).await;
    let chunks = chunks(&answer);
    let of_chunk = |chunk: &Value| chunk["choices"][0]["logprobs"]["content"].as_array().cloned();
    let tokens: Vec<Value> = chunks.iter().filter_map(of_chunk).flatten().collect();
    assert_eq!(tokens.len(), 60, "{}", answer.text);
    tokens
}

/// B2: two hundred constraints that are none are each a 400 that says where, and who streams beside them hears the
/// same as without them, to the last bit. That none of it panics is the corpus's own test, in crate `grammar`.
#[tokio::test]
async fn b2_two_hundred_broken_constraints_are_400_and_disturb_no_stream() {
    let server = warm(&[], None);
    let alone = heard(&server).await;
    let rows: Vec<(String, Value)> =
        serde_json::from_str(include_str!("../../../grammar/tests/corpus/broken.json")).unwrap();
    assert!(rows.len() >= 200, "{}", rows.len());
    let is_done = AtomicBool::new(false);
    let (n_heard, ()) = tokio::join!(undisturbed(&server, &alone, &is_done), async {
        for (kind, source) in &rows {
            let (constraint, field) = match kind.as_str() {
                "schema" => (json!({"json_schema": source}), "json_schema"),
                "regex" => (json!({"regex": source}), "regex"),
                text => (json!({"grammar": {"type": text, "text": source}}), "grammar.text"),
            };
            let answer = server.post(CHAT, &chat(&constraint)).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{constraint}: {}", answer.text);
            let error = &answer.json()["error"];
            assert_eq!(error["param"], field, "{constraint}: {error}");
            let code = if kind == "schema" { "unsupported_schema" } else { "invalid_grammar" };
            assert_eq!(error["code"], code, "{constraint}: {error}");
        }
        is_done.store(true, Ordering::Release);
    });
    assert!(n_heard > 1, "nothing ran beside them");
    let engine = server.state.services().unwrap().engine.clone();
    assert_eq!((engine.counters().panics, engine.counters().failed), (0, 0));
}

/// B14: sixty-four schemas of their own at once, and hostile ones among them. A plain stream goes on beside them and
/// hears what it hears alone; nobody hears a 5xx; what is kept is within its bytes.
#[tokio::test]
async fn b14_sixty_four_schemas_at_once_stall_no_plain_stream() {
    let server = warm(&[], None);
    let engine = server.state.services().unwrap().engine.clone();
    let alone = heard(&server).await;
    let own = |at: usize| {
        let mut schema = schema();
        schema["properties"]["color_of_the_box"] = json!({"enum": [format!("red{at}"), "blue"]});
        chat(&json!({"json_schema": schema, "seed": at}))
    };
    let is_done = AtomicBool::new(false);
    let asked = async {
        let asked: Vec<Value> = (0..64).map(own).chain(hostile()).collect();
        let answers = join_all(asked.iter().map(|body| server.post(CHAT, body))).await;
        is_done.store(true, Ordering::Release);
        answers
    };
    let longest = longest_gap(&server, &is_done);
    let beside = undisturbed(&server, &alone, &is_done);
    let (longest, _, answers) = tokio::join!(longest, beside, asked);
    for (at, answer) in answers.iter().enumerate() {
        if at < 64 {
            let value: Value = serde_json::from_str(&content(answer)).unwrap();
            let color = value["color_of_the_box"].as_str().unwrap();
            assert!(color == "blue" || color == format!("red{at}"), "{value}");
        } else {
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text);
            assert_eq!(answer.code(), "grammar_too_large", "{}", answer.text);
        }
    }
    // A step of this model takes a thousandth of it. In the field one compilation took two minutes.
    assert!(longest < Duration::from_secs(5), "{longest:?}");
    let (n_kept, bytes) = engine.grammars().unwrap().kept();
    assert!(n_kept >= 64 && bytes <= exrail_grammar::Limits::default().cache_bytes);
}

/// What takes longer to compile, or more memory, than a limit allows.
fn hostile() -> Vec<Value> {
    let many: Vec<usize> = (0..10_001).collect();
    let mut deep = json!({"type": "null"});
    for _ in 0..70 {
        deep = json!({"type": "array", "items": deep});
    }
    let long = json!({"type": "string", "description": "x".repeat(1 << 20)});
    [json!({"enum": many}), deep, long].map(|schema| chat(&json!({"json_schema": schema}))).to_vec()
}

/// The longest time between two tokens of a plain stream that was begun, until `is_done`.
async fn longest_gap(server: &Server, is_done: &AtomicBool) -> Duration {
    let plain = json!({"stream": true, "max_tokens": 400, "seed": 5, "loop_guard": false,
        "logit_bias": endless(server)});
    let mut longest = Duration::ZERO;
    while !is_done.load(Ordering::Acquire) {
        let sent = request(Method::POST, CHAT, None, Body::from(chat(&plain).to_string()));
        let response = router(Arc::clone(&server.state)).oneshot(sent).await.unwrap();
        let mut events = response.into_body().into_data_stream();
        // The first may wait its turn in the queue.
        events.next().await;
        events.next().await;
        let mut last = Instant::now();
        while events.next().await.is_some() {
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
    }
    longest
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

/// B15: the template opens a thought. What the model writes before it ends is no content, in streams, too. The tiny
/// model never ends it; it is closed while a value still fits, and where none does, there is no content.
#[tokio::test]
async fn b15_inside_an_open_thought_nothing_is_content() {
    let server = warm_speaking(THINKS);
    for (max_tokens, fits) in [(100, true), (12, false)] {
        let constraint = json!({"response_format": named(&schema()), "max_tokens": max_tokens});
        for seed in 0..6 {
            let mut body = chat(&constraint);
            body["seed"] = json!(seed);
            let whole = server.post(CHAT, &body).await;
            let choice = whole.json()["choices"][0].clone();
            let thought = choice["message"]["reasoning_content"].as_str().unwrap();
            assert!(!thought.is_empty() && !thought.contains("</think>"), "{choice}");
            if fits {
                assert!(is_a_box(&content(&whole)) && !is_a_box(thought), "{choice}");
                assert_eq!(choice["finish_reason"], "stop", "{choice}");
            } else {
                assert_eq!(content(&whole), "", "{choice}");
                assert_eq!(choice["exrail_finish_reason"], "schema_incomplete", "{choice}");
            }
            body["stream"] = json!(true);
            let stream = server.post(CHAT, &body).await;
            assert_eq!(joined(&stream, "content"), content(&whole));
            assert_eq!(joined(&stream, "reasoning_content"), thought);
        }
    }
    let refused = server.post(CHAT, &chat(&json!({"regex": "a"}))).await;
    assert_eq!(refused.code(), "unsupported_field", "{}", refused.text);
}

/// The token `</think>` of [`thinking`].
const CLOSES: &str = "303";

/// A model whose template opens a thought, and whose vocabulary has a token that closes one: `CONTROL` as a control
/// token, `ADDED` as one of text.
fn thinking(kind: i32) -> Server {
    let gguf = Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap();
    let mut table = VocabularyTable::from_gguf(&gguf).unwrap();
    // In place of the last merge, so that every other token keeps its id.
    table.merges.pop();
    *table.tokens.last_mut().unwrap() = "</think>".into();
    *table.kinds.last_mut().unwrap() = kind;
    assert_eq!((table.tokens.len() - 1).to_string(), CLOSES);
    let vocabulary = Vocabulary {
        model: table.model,
        pre: table.pre,
        tokens: table.tokens,
        kinds: table.kinds,
        merges: table.merges,
        bos: table.bos,
        eos: table.eos,
        unknown: table.unknown,
        padding: table.padding,
        ..Vocabulary::default()
    };
    let tokenizer = Tokenizer::from_vocabulary(vocabulary).unwrap();
    let template = ChatTemplate::compile(THINKS, "<|im_start|>", "<|im_end|>").unwrap();
    let engine = start(cpu(), four(), |loaded| {
        loaded.tokenizer = Arc::new(tokenizer);
        loaded.template = Some(Arc::new(template));
    });
    warm_on(engine, &[], Limits::default())
}

const CONTROL: i32 = 3;
const ADDED: i32 = 4;

/// The whole answer, and the parts of the same one as a stream tells them.
async fn both(server: &Server, mut body: Value) -> (Value, [String; 2], Value) {
    let whole = server.post(CHAT, &body).await;
    assert_eq!(whole.status, StatusCode::OK, "{}", whole.text);
    let choice = whole.json()["choices"][0].clone();
    body["stream"] = json!(true);
    let stream = server.post(CHAT, &body).await;
    let last = chunks(&stream).pop().unwrap()["choices"][0].clone();
    (choice, ["reasoning_content", "content"].map(|field| joined(&stream, field)), last)
}

/// B15: the thought is free, and what is behind it is a value of the schema; whole and in streams.
#[tokio::test]
async fn b15_behind_a_thought_that_ends_the_content_is_a_value() {
    for kind in [CONTROL, ADDED] {
        let server = thinking(kind);
        let mut n_thoughts = 0;
        for seed in 0..8 {
            let body = chat(&json!({"response_format": named(&schema()), "seed": seed,
                "max_tokens": 400, "logit_bias": {CLOSES: 4}}));
            let (choice, told, last) = both(&server, body).await;
            let message = &choice["message"];
            assert!(is_a_box(message["content"].as_str().unwrap()), "{choice}");
            let thought = message["reasoning_content"].as_str().unwrap_or_default();
            assert!(!thought.contains("</think>") && !is_a_box(thought), "{choice}");
            assert_eq!(choice["finish_reason"], "stop");
            assert_eq!(told[0], thought);
            assert_eq!(told[1], message["content"].as_str().unwrap());
            assert_eq!(last["finish_reason"], "stop");
            n_thoughts += usize::from(!thought.is_empty());
        }
        assert!(n_thoughts > 4, "{n_thoughts} of 8 thought");
    }
}

/// B15: a thought that the model never ends. Where no value fits behind it nothing is content, and nobody is told that the
/// answer is whole; where one does, the thought is closed in time.
#[tokio::test]
async fn b15_a_thought_that_max_tokens_cuts_leaves_no_content_and_is_no_stop() {
    for kind in [CONTROL, ADDED] {
        let server = thinking(kind);
        let body = |max_tokens: usize| {
            chat(&json!({"response_format": named(&schema()), "max_tokens": max_tokens,
                "logit_bias": {CLOSES: -100}}))
        };
        for max_tokens in [1, 4, 8] {
            let (choice, told, last) = both(&server, body(max_tokens)).await;
            assert_eq!(choice["message"]["content"].as_str().unwrap_or_default(), "", "{choice}");
            let thought = choice["message"]["reasoning_content"].as_str().unwrap_or_default();
            assert_eq!(told, [thought, ""]);
            for choice in [&choice, &last] {
                assert_eq!(choice["finish_reason"], "length", "{choice}");
                assert_eq!(choice["exrail_finish_reason"], "schema_incomplete", "{choice}");
            }
        }
        let (choice, told, last) = both(&server, body(300)).await;
        let message = &choice["message"];
        let content = message["content"].as_str().unwrap();
        assert!(is_a_box(content), "{choice}");
        assert_eq!(told, [message["reasoning_content"].as_str().unwrap(), content]);
        for choice in [&choice, &last] {
            assert_eq!(choice["finish_reason"], "stop", "{choice}");
        }
    }
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
