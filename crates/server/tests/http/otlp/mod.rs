//! Spans as a collector gets them: names, kinds, parents and numbers, over both transports; that no content leaves
//! unless it is asked for; and that nobody waits for a collector.

mod collector;

use std::{collections::BTreeSet, time::Duration};

use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use exrail_server::{OtlpProtocol, SpanContent};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use self::collector::{Came, Collector, export};
use crate::support::{KEY, MODEL, Server, request, warm};

const QUESTION: &str = "Where is the spare key of cabinet B?";
const CHAT: &str = "/v1/chat/completions";

/// A request inside of somebody's trace.
async fn post_within(server: &Server, path: &str, body: &Value, headers: &[(&'static str, &str)]) {
    let mut request = request(Method::POST, path, None, Body::from(body.to_string()));
    for (name, value) in headers {
        request.headers_mut().append(*name, value.parse().unwrap());
    }
    let answer = server.send(request).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
}

async fn post(server: &Server, path: &str, body: &Value) {
    post_within(server, path, body, &[]).await;
}

/// The only span of this kind.
fn only<'a>(spans: &'a [Came], sort: &str) -> &'a Came {
    let mut found = spans.iter().filter(|span| span.sort() == sort);
    let (Some(one), None) = (found.next(), found.next()) else { panic!("{sort} of {spans:#?}") };
    one
}

/// The root, which all others are directly below, and inside of in time.
fn root(spans: &[Came]) -> &Came {
    let root = only(spans, "CHAIN");
    assert_eq!(root.kind, 2, "a server's span");
    for child in spans.iter().filter(|span| span.id != root.id) {
        assert_eq!((&child.parent, &child.trace), (&root.id, &root.trace), "{child:#?}");
        assert_eq!(child.kind, 1, "inside of this process");
        assert!(root.from_ns <= child.from_ns && child.from_ns <= child.to_ns, "{child:#?}");
    }
    root
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_is_a_trace_of_its_search_its_generation_and_its_verdict() {
    for protocol in [OtlpProtocol::Http, OtlpProtocol::Grpc] {
        let (server, collector) = (warm(&[], None), Collector::start(protocol).await);
        let export = collector.serves(&server, SpanContent::Keep);
        post(&server, "/v1/ask", &json!({"question": QUESTION, "k": 2, "seed": 5})).await;
        let spans = collector.spans(&export).await;
        let (lines, root) = (server.trace_lines(), root(&spans));
        let record = lines.last().unwrap();
        assert_eq!(record["event"], "answer.decide");

        assert_eq!(root.name, "POST /v1/ask");
        assert_eq!(root.parent, "");
        assert_eq!(root.resource["service.name"], "exrail");
        assert_eq!(root.says("http.response.status_code"), 200);
        assert_eq!(root.says("exrail.trace_id"), record["trace_id"]);
        assert_eq!(root.says("exrail.model_fp"), record["pins"]["model_fp"]);
        assert!(!root.is_error);

        let search = only(&spans, "RETRIEVER");
        assert_eq!(search.name, "retrieval");
        assert_eq!(search.says("gen_ai.operation.name"), "retrieval");
        assert_eq!(search.says("gen_ai.data_source.id"), "cabinets");
        assert_eq!(search.says("gen_ai.retrieval.top_k"), 2);
        let retrieved = record["retrieved"].as_array().unwrap();
        assert!(!retrieved.is_empty());
        for (at, item) in retrieved.iter().enumerate() {
            let of =
                |field: &str| search.says(&format!("retrieval.documents.{at}.document.{field}"));
            assert_eq!(of("id"), item["snippet_id"]);
            assert_eq!(of("score"), item["score_norm"]);
        }

        let model = only(&spans, "LLM");
        assert_eq!(model.name, "chat tiny");
        for (key, expected) in [
            ("gen_ai.operation.name", json!("chat")),
            ("gen_ai.provider.name", json!("exrail")),
            ("gen_ai.request.model", json!("tiny")),
            ("gen_ai.response.model", json!("tiny")),
            ("llm.model_name", json!("tiny")),
            ("gen_ai.request.temperature", json!(0.2)),
            ("gen_ai.request.top_p", json!(0.9)),
            ("gen_ai.request.max_tokens", json!(128)),
            ("gen_ai.request.seed", json!(5)),
            ("gen_ai.response.id", record["request_id"].clone()),
            ("gen_ai.usage.input_tokens", record["metrics"]["tokens"]["in"].clone()),
            ("gen_ai.usage.output_tokens", record["metrics"]["tokens"]["out"].clone()),
            ("llm.token_count.prompt", record["metrics"]["tokens"]["in"].clone()),
            ("llm.token_count.completion", record["metrics"]["tokens"]["out"].clone()),
            ("exrail.decode_ms", record["metrics"]["latency_ms"]["decode"].clone()),
        ] {
            assert_eq!(model.says(key), expected, "{key}");
        }
        assert!(model.says("llm.token_count.prompt").as_i64().unwrap() > 10);
        assert!(search.to_ns <= model.from_ns);

        let verdict = only(&spans, "GUARDRAIL");
        assert_eq!(verdict.name, "guard answer");
        let expected = if record["refusal"] == true { "refused" } else { "answered" };
        assert_eq!(verdict.says("exrail.guard.verdict"), expected);
        assert_eq!(verdict.says("exrail.guards_fired"), record["guards_fired"]);
        for of_record in ["ds_status", "ds_min", "cited_share"] {
            let told = verdict.says(&format!("exrail.{of_record}"));
            assert_eq!(told, record["metrics"][of_record], "{of_record}");
        }
        assert!(model.to_ns <= verdict.from_ns);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chats_completions_and_embeddings_have_a_root_and_a_child_each() {
    let (server, collector) = (warm(&[], None), Collector::start(OtlpProtocol::Grpc).await);
    let export = collector.serves(&server, SpanContent::Keep);
    let chat = json!({"model": MODEL, "max_tokens": 3, "temperature": 0.5, "top_p": 0.8, "seed": 9, "n": 2,
        "user": "me", "stream": true, "messages": [{"role": "user", "content": "hello"}]});
    post(&server, CHAT, &chat).await;
    post(&server, "/v1/completions", &json!({"model": MODEL, "prompt": "ab", "max_tokens": 2}))
        .await;
    post(&server, "/v1/embeddings", &json!({"model": "fake", "input": ["one two", "three"]})).await;
    let all = collector.spans(&export).await;
    let roots: Vec<&Came> = all.iter().filter(|span| span.sort() == "CHAIN").collect();
    let names: Vec<_> = roots.iter().map(|root| root.name.as_str()).collect();
    assert_eq!(names, ["POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings"]);
    let child = |at: usize| -> Came {
        let of_trace: Vec<Came> =
            all.iter().filter(|span| span.trace == roots[at].trace).cloned().collect();
        assert_eq!(root(&of_trace).id, roots[at].id);
        assert_eq!(of_trace.len(), 2, "{of_trace:#?}");
        of_trace[1].clone()
    };
    let lines = server.trace_lines();

    let chat = child(0);
    assert_eq!((chat.sort().as_str(), chat.name.as_str()), ("LLM", "chat tiny"));
    for (key, expected) in [
        ("gen_ai.request.temperature", json!(0.5)),
        ("gen_ai.request.top_p", json!(0.8)),
        ("gen_ai.request.max_tokens", json!(3)),
        ("gen_ai.request.seed", json!(9)),
        ("gen_ai.request.choice.count", json!(2)),
        ("gen_ai.request.stream", json!(true)),
        ("gen_ai.response.finish_reasons", json!(["length", "length"])),
        ("session.id", json!("me")),
        ("gen_ai.conversation.id", json!(null)),
        ("gen_ai.usage.input_tokens", lines[0]["tokens"]["in"].clone()),
        ("gen_ai.usage.output_tokens", json!(6)),
        ("llm.token_count.completion", json!(6)),
        ("exrail.trace_id", lines[0]["trace_id"].clone()),
    ] {
        assert_eq!(chat.says(key), expected, "{key}");
    }
    let completion = child(1);
    assert_eq!(completion.name, "text_completion tiny");
    assert_eq!(completion.says("gen_ai.usage.output_tokens"), 2);
    assert_eq!(completion.says("gen_ai.request.stream"), json!(null));
    let embedding = child(2);
    assert_eq!(
        (embedding.sort().as_str(), embedding.name.as_str()),
        ("EMBEDDING", "embeddings fake")
    );
    assert!(embedding.says("gen_ai.usage.input_tokens").as_i64().unwrap() > 2);
    assert!(embedding.says("gen_ai.embeddings.dimension.count").as_i64().unwrap() > 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_that_came_with_the_request_goes_on() {
    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    let (server, collector) = (warm(&[], None), Collector::start(OtlpProtocol::Http).await);
    let export = collector.serves(&server, SpanContent::Keep);
    let body = json!({"model": MODEL, "prompt": "ab", "max_tokens": 1});
    let parent = |flags: &str| format!("00-{TRACE}-b7ad6b7169203331-{flags}");
    let sampled = parent("01");
    let headers = [("traceparent", sampled.as_str()), ("tracestate", "shop=1")];
    post_within(&server, "/v1/completions", &body, &headers).await;
    // Whoever began this one does not want it.
    post_within(&server, "/v1/completions", &body, &[("traceparent", &parent("00"))]).await;
    // And this is nobody's trace.
    post_within(&server, "/v1/completions", &body, &[("traceparent", "00-1-2-01")]).await;
    let spans = collector.spans(&export).await;
    let roots: Vec<&Came> = spans.iter().filter(|span| span.sort() == "CHAIN").collect();
    assert_eq!(roots.len(), 2, "{spans:#?}");
    assert_eq!((roots[0].trace.as_str(), roots[0].parent.as_str()), (TRACE, "b7ad6b7169203331"));
    assert_eq!(roots[0].state, "shop=1");
    assert_eq!(spans.iter().filter(|span| span.trace == TRACE).count(), 2);
    assert_eq!(roots[1].parent, "");
    assert_ne!(roots[1].trace, TRACE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_turned_away_says_so_and_a_stranger_leaves_no_span() {
    let (server, collector) = (warm(&[KEY], None), Collector::start(OtlpProtocol::Http).await);
    let export = collector.serves(&server, SpanContent::Keep);
    let body = json!({"model": MODEL, "prompt": "ab", "suffix": "zebra"}).to_string();
    for key in [None, Some(KEY)] {
        server.send(request(Method::POST, "/v1/completions", key, Body::from(body.clone()))).await;
    }
    let spans = collector.spans(&export).await;
    let root = root(&spans);
    assert_eq!(root.says("error.type"), "unsupported_field");
    assert_eq!(root.says("http.response.status_code"), 400);
    assert_eq!(root.says("exrail.agent_id"), "key-1");
    assert!(!root.is_error, "a mistake of the client's");
    assert_eq!(only(&spans, "GUARDRAIL").says("exrail.guard.name"), "unsupported_field");
    assert!(spans.iter().all(|span| span.sort() != "LLM"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_was_withheld_is_an_error_of_the_server() {
    let collector = Collector::start(OtlpProtocol::Http).await;
    let server = warm(&[], Some("/dev/full"));
    let export = collector.serves(&server, SpanContent::Send);
    let body = chat("Say it.", &json!({}));
    assert_eq!(server.post(CHAT, &body).await.status, StatusCode::SERVICE_UNAVAILABLE);
    let spans = collector.spans(&export).await;
    let (root, model) = (root(&spans), only(&spans, "LLM"));
    assert_eq!(root.says("error.type"), "trace_unavailable");
    assert!(root.is_error && model.is_error);
    assert_eq!(model.says("gen_ai.response.finish_reasons"), json!(["error"]));
    let told = |key: &String| key.contains("output");
    let keys = spans.iter().flat_map(|span| span.attributes.keys());
    assert_eq!(keys.filter(|key| told(key)).count(), 0, "nothing was released: {spans:#?}");
}

fn chat(user: &str, more: &Value) -> Value {
    let mut body = json!({"model": MODEL, "max_tokens": 8, "temperature": 0, "messages": [
        {"role": "system", "content": "Instruction-of-the-house: be brief."}, {"role": "user", "content": user}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Sends every kind of request, and returns words of which none is to leave.
async fn tell_secrets(server: &Server) -> Vec<String> {
    let told = server.post(CHAT, &chat("My cat is called Mortimer.", &json!({}))).await.json();
    let answer = told["choices"][0]["message"]["content"].as_str().unwrap().trim().to_owned();
    assert!(answer.len() > 3, "{answer}");
    post(server, CHAT, &chat("Streamed to Ottilie.", &json!({"stream": true, "top_k": 5}))).await;
    post(server, "/v1/completions", &json!({"model": MODEL, "prompt": "Prompt of Wendeline"}))
        .await;
    post(server, "/v1/embeddings", &json!({"model": "fake", "input": "Vector of Hieronymus"}))
        .await;
    let ask = json!({"question": format!("{QUESTION} Asked by Kunigunde."), "k": 2});
    post(server, "/v1/ask", &ask).await;
    let grounded = json!({"model": MODEL, "exrail": {"collection": "cabinets"},
        "messages": [{"role": "user", "content": "Where does Balthasar find the key?"}]});
    post(server, CHAT, &grounded).await;
    // What a request is turned away for may quote it.
    server.post("/v1/completions", &json!({"model": MODEL, "prompt": "ab", "Melusine": 1})).await;
    let odd = "Read this \u{200b} of Walburga.";
    post(server, CHAT, &chat(odd, &json!({}))).await;
    let words = [
        "Mortimer",
        "Ottilie",
        "Wendeline",
        "Hieronymus",
        "Kunigunde",
        "Balthasar",
        "Melusine",
        "Walburga",
        "Instruction-of-the-house",
        "red box",
        "cabinets.md",
    ];
    words.into_iter().map(str::to_owned).chain([answer]).collect()
}

fn holds(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|window| window == word.as_bytes())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_content_leaves_unless_it_is_asked_for() {
    let (server, collector) = (warm(&[], None), Collector::start(OtlpProtocol::Http).await);
    let export = collector.serves(&server, SpanContent::Keep);
    let words = tell_secrets(&server).await;
    assert!(collector.spans(&export).await.len() > 15);
    let bytes = collector.bytes();
    for word in &words {
        assert!(!holds(&bytes, word), "`{word}` has left");
    }
    assert!(holds(&bytes, "text_completion tiny"), "what is looked through is readable");
}

/// The mutation: with the option all of it leaves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutation_with_the_option_the_same_content_leaves() {
    let (server, collector) = (warm(&[], None), Collector::start(OtlpProtocol::Http).await);
    let export = collector.serves(&server, SpanContent::Send);
    let words = tell_secrets(&server).await;
    let spans = collector.spans(&export).await;
    let bytes = collector.bytes();
    for word in &words {
        assert!(holds(&bytes, word), "`{word}` has not left");
    }
    let asked: Vec<_> = spans.iter().filter(|span| span.sort() == "RETRIEVER").collect();
    let content = asked[0].says("retrieval.documents.0.document.content");
    assert!(content.as_str().unwrap().contains("red box"), "{content}");
    let model = spans.iter().find(|span| span.sort() == "LLM").unwrap();
    assert_eq!(model.says("llm.input_messages.1.message.role"), "user");
    assert_eq!(model.says("llm.input_messages.1.message.content"), "My cat is called Mortimer.");
    let messages = model.says("gen_ai.input.messages");
    let messages: Value = serde_json::from_str(messages.as_str().unwrap()).unwrap();
    assert_eq!(messages[1]["parts"][0]["content"], "My cat is called Mortimer.");
    documented(&spans);
}

/// Every attribute that came, with N for numbers in its name, is in the table of the documentation, and nothing
/// else is.
fn documented(spans: &[Came]) {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/traces.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let table = docs.lines().filter_map(|line| line.strip_prefix("| `")?.split('|').next());
    let names = table.flat_map(|cell| cell.split('`').filter(|name| name.contains('.')));
    let told: BTreeSet<String> =
        names.filter(|name| !name.contains(' ')).map(str::to_owned).collect();
    let general = |key: &String| {
        let part = |part: &str| match part.parse::<usize>() {
            Ok(_) => "N".to_owned(),
            Err(_) => part.to_owned(),
        };
        key.split('.').map(part).collect::<Vec<_>>().join(".")
    };
    let came: BTreeSet<String> =
        spans.iter().flat_map(|span| span.attributes.keys()).map(general).collect();
    // These need other requests, an answer of a model that cites, or a calibration.
    let elsewhere: BTreeSet<String> = [
        "exrail.agent_id",
        "exrail.cited_share",
        "exrail.ds_min",
        "gen_ai.conversation.id",
        "gen_ai.request.choice.count",
        "session.id",
    ]
    .map(str::to_owned)
    .into();
    assert_eq!(&came - &told, BTreeSet::new(), "came and are not documented");
    assert_eq!(&(&told - &came) - &elsewhere, BTreeSet::new(), "are documented and did not come");
}

/// The guard over system messages holds on this way as well, where content is sent: what it held back does not leave
/// in an answer, and its mark does not leave at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g21_what_the_leak_guard_holds_back_is_in_no_span() {
    let (server, collector) = (warm(&[], None), Collector::start(OtlpProtocol::Http).await);
    let export = collector.serves(&server, SpanContent::Send);
    let ids = server.state.services().unwrap().engine.clone();
    let ids = ids.tokenizer().encode(" the", exrail_text::Specials::AsText).unwrap();
    let secret = format!("Keep to yourself:{}", " the".repeat(30));
    for (guard, stream) in [(true, false), (true, true), (false, false)] {
        let body = json!({"model": MODEL, "max_tokens": 24, "temperature": 0, "leak_guard": guard, "stream": stream,
            "logit_bias": {ids[0].to_string(): 100}, "messages": [
                {"role": "system", "content": secret}, {"role": "user", "content": "Repeat it."}]});
        post(&server, CHAT, &body).await;
    }
    let spans = collector.spans(&export).await;
    let models: Vec<_> = spans.iter().filter(|span| span.sort() == "LLM").collect();
    assert_eq!(models.len(), 3);
    let told = |at: usize| models[at].says("llm.output_messages.0.message.content");
    for guarded in [0, 1] {
        assert_eq!(told(guarded).as_str().unwrap().trim(), "");
        assert_eq!(
            models[guarded].says("gen_ai.response.finish_reasons"),
            json!(["content_filter"])
        );
        assert_eq!(models[guarded].says("exrail.finish_reason"), "leak");
    }
    // The mutation: without the guard the client has it, and then so has the collector.
    assert_eq!(told(2), " the".repeat(24));
    assert!(!holds(&collector.bytes(), "Mark of these instructions"), "the canary has left");
    let guards = spans.iter().filter(|span| span.says("exrail.guard.name") == "leak");
    assert_eq!(guards.count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_never_answers_costs_spans_and_no_request() {
    // More than the queue and the batch on its way have room for.
    const REQUESTS: usize = 1100;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = warm(&[], None);
    let endpoint = format!("http://{}/v1/traces", silent.local_addr().unwrap());
    let export = export(&server, &endpoint, OtlpProtocol::Http, SpanContent::Keep);
    let body = json!({"model": "fake", "input": "one"});
    let mut n_answered = 0;
    for _ in 0..REQUESTS {
        let answer = server.post("/v1/embeddings", &body).await;
        n_answered += usize::from(answer.status == StatusCode::OK);
    }
    assert_eq!(n_answered, REQUESTS);
    let counts = export.counts();
    assert_eq!(counts.sent, 0);
    assert!(counts.queue_full > 0, "{counts:?}");
    let flushed = tokio::task::spawn_blocking(move || export.flush(Duration::from_millis(200)));
    assert!(!flushed.await.unwrap(), "a server that ends does not wait for it");
    let metrics = server.get("/metrics").await.text;
    let line =
        format!("exrail_otlp_spans_dropped_total{{reason=\"queue_full\"}} {}", counts.queue_full);
    assert!(metrics.contains(&line), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_down_is_counted_over_both_transports() {
    for protocol in [OtlpProtocol::Http, OtlpProtocol::Grpc] {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", closed.local_addr().unwrap());
        drop(closed);
        let server = warm(&[], None);
        let export = export(&server, &endpoint, protocol, SpanContent::Keep);
        post(&server, "/v1/embeddings", &json!({"model": "fake", "input": "one"})).await;
        let flush = export.clone();
        let flushed = tokio::task::spawn_blocking(move || flush.flush(Duration::from_secs(10)));
        assert!(flushed.await.unwrap(), "they are given up, and not kept for ever");
        let counts = export.counts();
        assert_eq!((counts.sent, counts.queue_full, counts.not_taken), (0, 0, 2), "{protocol:?}");
    }
}

#[tokio::test]
async fn without_an_export_there_is_nothing_to_count_and_nothing_to_read_back() {
    let server = warm(&[], None);
    post(&server, "/v1/embeddings", &json!({"model": "fake", "input": "one"})).await;
    assert!(!server.get("/metrics").await.text.contains("otlp"));
    assert_eq!(server.get("/v1/exrail/config").await.json()["otlp"], json!(null));
}

#[tokio::test]
async fn where_spans_go_can_be_read_back() {
    let server = warm(&[], None);
    export(&server, "http://localhost:4317", OtlpProtocol::Grpc, SpanContent::Send);
    let told = server.get("/v1/exrail/config").await.json()["otlp"].clone();
    assert_eq!(told["endpoint"], "http://localhost:4317");
    assert_eq!((&told["protocol"], &told["content"]), (&json!("grpc"), &json!(true)));
}
