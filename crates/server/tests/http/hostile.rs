//! What strangers send: addresses to fetch, names that point elsewhere, bodies that are none. Each gets a short 4xx.

use std::{
    io::ErrorKind,
    net::TcpListener,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    body::{Body, Bytes},
    http::{Method, Request, StatusCode, header},
};
use exrail_engine::SessionStore;
use exrail_server::{Limits, ROUTES, SessionKeeper};
use futures_util::stream;
use serde_json::{Value, json};

use crate::support::{Answer, MODEL, cpu, four, request, start, warm, warm_on};

/// Most characters of its own text that a client is told.
const MOST_ECHO: usize = 200;

fn refused(answer: &Answer, what: &str) {
    assert!(answer.status.is_client_error(), "{what}: {} {}", answer.status, answer.text);
    assert!(answer.text.chars().count() < 1_000, "{what}: {}", answer.text);
    let message = answer.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
    assert!(!message.is_empty(), "{what}: {}", answer.text);
    let bad = message.chars().find(|it| it.is_control() || *it == '\u{202e}');
    assert_eq!(bad, None, "{what}: {message:?}");
}

/// Bodies of the routes that take messages, with this content.
fn with_content(content: &Value) -> [(&'static str, Value); 3] {
    let messages = json!([{"role": "user", "content": content}]);
    [
        ("/v1/chat/completions", json!({"model": MODEL, "max_tokens": 1, "messages": messages})),
        (
            "/v1/chat/completions",
            json!({"model": MODEL, "messages": messages,
            "exrail": {"collection": "cabinets"}}),
        ),
        ("/v1/exrail/sessions/a", json!({"messages": messages})),
    ]
}

/// Field fault L1: pictures were fetched from wherever a request said, local files included. Field fault L2: an
/// allow-list that is empty allowed everything; here there is none, and no media.
#[tokio::test]
async fn l1_l2_no_address_is_ever_fetched() {
    let server = warm(&[], None);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let addresses = [
        format!("http://127.0.0.1:{port}/x.png"),
        format!("http://localhost:{port}/x.png"),
        format!("http://0x7f.1:{port}/"),
        format!("http://2130706433:{port}/"),
        format!("http://[::ffff:127.0.0.1]:{port}/"),
        "http://169.254.169.254/latest/meta-data/".into(),
        "http://[::1]/".into(),
        "https://example.com/redirect".into(),
        "file:///etc/passwd".into(),
        "/etc/hostname".into(),
        "../../etc/passwd".into(),
        "ftp://127.0.0.1/".into(),
        "data:image/png;base64,iVBORw0KGgo=".into(),
        "gopher://127.0.0.1/".into(),
    ];
    for address in &addresses {
        let parts = [
            json!([{"type": "image_url", "image_url": {"url": address}}]),
            json!([{"type": "image_url", "image_url": address}]),
            json!([{"type": "input_image", "image_url": address}]),
            json!([{"type": "image", "text": "x", "url": address}]),
            json!([{"type": "text", "text": "x", "image_url": {"url": address}}]),
            json!([{"type": "input_audio", "input_audio": {"data": address, "format": "wav"}}]),
            json!([{"type": "video_url", "video_url": {"url": address}}]),
            json!([{"type": "file", "file": {"file_data": address}}]),
        ];
        for content in parts {
            for (path, body) in with_content(&content) {
                let method = if path.contains("sessions") { Method::PUT } else { Method::POST };
                let sent = request(method, path, None, Body::from(body.to_string()));
                let answer = server.send(sent).await;
                let is_session = answer.status == StatusCode::NOT_IMPLEMENTED;
                assert!(is_session || answer.status == StatusCode::BAD_REQUEST, "{}", answer.text);
                assert!(!answer.text.contains("root:"), "{}", answer.text);
            }
        }
    }
    let connection = listener.accept().map(drop).map_err(|error| error.kind());
    assert_eq!(connection, Err(ErrorKind::WouldBlock), "somebody was connected to");
}

/// Names that point out of a folder, are none, or only look like one.
fn hostile_names() -> Vec<String> {
    let names = [
        "..",
        ".",
        "../x",
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "a\\..\\b",
        "x\0y",
        "\u{1b}[2J",
        "a b",
        "con:",
        "~root",
        "-rf",
        ".hidden",
        "\u{202e}gnp.exe",
        "аdmin",
        "a\u{200b}b",
        "ａ",
        "x\ny",
        "..\u{2215}..\u{2215}x",
        "\u{fe52}\u{fe52}/x",
        "%2e%2e",
        "$(id)",
        "a;b",
        "a|b",
        "*",
        "",
    ];
    names.into_iter().map(str::to_owned).chain(["n".repeat(10_000)]).collect()
}

fn percent(name: &str) -> String {
    name.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Every route with a name in its path: no file is made or read elsewhere, and the answer is a short 4xx.
#[tokio::test]
async fn names_in_paths_cannot_leave_their_folder() {
    let server = warm(&[], None);
    let place = tempfile::tempdir().unwrap();
    let store = SessionStore::open(&place.path().join("sessions"), 1 << 20).unwrap();
    server.state.keep_sessions(SessionKeeper::start(store).unwrap());
    let (around, inside) = (files(place.path()), files(&place.path().join("sessions")));
    let body = json!({"model": MODEL, "prompt": "some words to keep"}).to_string();
    let mut tried = 0;
    for route in ROUTES.iter().filter(|route| route.path.contains('{')) {
        let (before, after) = route.path.split_once('{').unwrap();
        let after = after.split_once('}').unwrap().1;
        for name in hostile_names() {
            let path = format!("{before}{}{after}", percent(&name));
            let method = Method::from_bytes(route.method.as_bytes()).unwrap();
            let sent = body.clone();
            let answer = server.send(request(method, &path, None, Body::from(sent))).await;
            refused(&answer, &format!("{} {path}", route.method));
            tried += 1;
        }
        let path = format!("{before}%FF%FE{after}");
        let method = Method::from_bytes(route.method.as_bytes()).unwrap();
        refused(&server.send(request(method, &path, None, Body::empty())).await, &path);
    }
    assert!(tried >= 4 * hostile_names().len());
    assert_eq!((files(place.path()), files(&place.path().join("sessions"))), (around, inside));
}

/// Every field that names something.
#[tokio::test]
async fn names_in_bodies_are_looked_up_and_never_opened() {
    let server = warm(&[], None);
    let messages = json!([{"role": "user", "content": "hi"}]);
    for name in hostile_names().into_iter().filter(|name| !name.is_empty()) {
        let bodies = [
            ("/v1/chat/completions", json!({"model": name, "messages": messages})),
            ("/v1/completions", json!({"model": name, "prompt": "x"})),
            ("/v1/embeddings", json!({"model": name, "input": "x"})),
            ("/v1/tokenize", json!({"model": name, "text": "x"})),
            ("/v1/ask", json!({"question": "x", "collection": name})),
            ("/v1/ask", json!({"question": "x", "model": name})),
            (
                "/v1/chat/completions",
                json!({"model": MODEL, "messages": messages,
                "exrail": {"collection": name}}),
            ),
        ];
        for (path, body) in bodies {
            refused(&server.post(path, &body).await, &format!("{path} {name:.40}"));
        }
    }
}

/// Field fault L9: the error path itself broke on what it echoed.
#[tokio::test]
async fn l9_what_is_no_json_gets_a_short_400() {
    let server = warm(&[], None);
    let deep = "[".repeat(100_000);
    let nested = format!("{}1{}", "{\"a\":".repeat(20_000), "}".repeat(20_000));
    let bodies: [(&str, Vec<u8>); 8] = [
        ("not UTF-8", b"{\"model\": \"\xff\xfe\xc0\x80\xed\xa0\x80\"}".to_vec()),
        ("only bytes", vec![0xff; 1_000]),
        ("deep arrays", deep.into_bytes()),
        ("deep objects", nested.into_bytes()),
        ("cut", b"{\"model\": \"x".to_vec()),
        ("empty", Vec::new()),
        ("half a surrogate", br#"{"model": "\ud800"}"#.to_vec()),
        ("zeros", vec![0; 10_000]),
    ];
    for route in ROUTES.iter().filter(|route| route.method == "POST") {
        let path = route.path.replace("{name}", "x");
        for (what, body) in &bodies {
            let sent = request(Method::POST, &path, None, Body::from(body.clone()));
            let answer = server.send(sent).await;
            if answer.status == StatusCode::NOT_IMPLEMENTED {
                continue; // This server keeps no sessions.
            }
            refused(&answer, &format!("{path}: {what}"));
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{path}: {what}");
        }
    }
    assert_eq!(server.get("/livez").await.status, StatusCode::OK);
}

/// Field fault L9: a value of a megabyte is not told back.
#[tokio::test]
async fn l9_no_more_than_200_characters_are_echoed() {
    let server = warm(&[], None);
    let long = "Q".repeat(1 << 20);
    let mut tried = 0;
    let control = json!({"model": MODEL, "prompt": "x", "question": "x", "text": "x", "input": "x",
        "ids": [1], "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]});
    let values = [json!(long), json!({ long.as_str(): long }), json!([[long]])];
    let fields = [
        "model",
        "messages",
        "prompt",
        "question",
        "input",
        "text",
        "ids",
        "collection",
        "exrail",
        "priority",
        "loop_guard",
        "logit_bias",
        "stop",
        "n",
        "seed",
        "temperature",
        "stream_options",
        "rotation",
        "response_format",
        "tools",
        "leak_guard",
        "session",
        "context_id",
        "mem_hash",
    ];
    for route in ROUTES.iter().filter(|route| route.method == "POST") {
        let path = route.path.replace("{name}", "x");
        for (field, value) in fields.iter().flat_map(|it| values.iter().map(move |v| (it, v))) {
            let mut body = control.clone();
            body[*field] = value.clone();
            let answer = server.post(&path, &body).await;
            let echoed = answer.text.matches('Q').count();
            if answer.status.is_client_error() {
                // The field and the problem may each tell of it.
                assert!(echoed <= 2 * MOST_ECHO, "{path} {field}: {echoed}");
                assert!(answer.text.len() < 2_000, "{path} {field}: {}", answer.text);
                tried += 1;
            }
            let unknown = json!({ long.as_str(): 1, "model": MODEL });
            let answer = server.post(&path, &unknown).await;
            assert!(answer.text.matches('Q').count() <= 2 * MOST_ECHO, "{path}");
        }
    }
    assert!(tried > 100, "{tried}");
    let path = format!("/{long}");
    assert!(server.get(&path[..60_000]).await.text.matches('Q').count() <= MOST_ECHO);
}

/// Field fault L9: nor is a name deep inside a schema, a tool or a grammar, which its fault's place is told with.
#[tokio::test]
async fn l9_no_more_than_200_characters_of_a_constraint_are_echoed() {
    let server = warm(&[], None);
    let long = "Q".repeat(100_000);
    let tool = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    let constraints = [
        json!({"json_schema": {"type": "object", "properties": { long.as_str(): {"type": "strin"}}}}),
        json!({"json_schema": { long.as_str(): 1, "type": long }}),
        json!({"json_schema": {"type": "string", "format": long}}),
        json!({"json_schema": {"$ref": format!("#/{long}")}}),
        json!({"json_schema": {"$schema": long}}),
        json!({"json_schema": {"type": "string", "pattern": format!("{long}(")}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": long, "schema": {}}}}),
        json!({"response_format": {"type": long}}),
        json!({"regex": format!("{long}\\{long}[")}),
        json!({"grammar": {"type": "gbnf", "text": format!("root ::= {long}")}}),
        json!({"grammar": {"type": "lark", "text": format!("start: {}", long.to_lowercase())}}),
        json!({"grammar": {"type": "lark", "text": format!("start: /{long}[/")}}),
        json!({"grammar": {"type": long, "text": "x"}}),
        tool(json!({"name": long})),
        tool(
            json!({"name": "f", "parameters": {"properties": { long.as_str(): {"type": "strin"}}}}),
        ),
        tool(json!({"name": "f", "contract_hash": long})),
    ];
    for constraint in constraints {
        let mut body = json!({"model": MODEL, "max_tokens": 1,
            "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(constraint.as_object().unwrap().clone());
        let answer = server.post("/v1/chat/completions", &body).await;
        let shown: String = constraint.to_string().chars().take(80).collect();
        refused(&answer, &shown);
        let echoed = answer.text.matches(['Q', 'q']).count();
        assert!(echoed <= 2 * MOST_ECHO, "{shown}: {}", answer.text);
    }
}

/// Field fault L9: a hundred megabytes are refused by their length, and otherwise at the limit.
#[tokio::test]
async fn l9_a_body_of_100_mb_is_refused_before_it_is_read() {
    let server = warm(&[], None);
    let body = Body::from(vec![b' '; 100 << 20]);
    let answer = server.send(request(Method::POST, "/v1/chat/completions", None, body)).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    refused(&answer, "100 MB");
    let mut told = 0;
    let chunks = stream::iter((0..100).map(move |_| {
        told += 1;
        assert!(told < 10, "the body was read on behind the limit");
        Ok::<_, std::convert::Infallible>(Bytes::from(vec![b' '; 1 << 20]))
    }));
    let endless = request(Method::POST, "/v1/chat/completions", None, Body::from_stream(chunks));
    assert_eq!(server.send(endless).await.status, StatusCode::PAYLOAD_TOO_LARGE);
}

/// The mutation: without the limit whoever sends is read to the end, and the whole of it is kept meanwhile.
#[tokio::test]
async fn mutation_l9_without_the_limit_a_body_of_any_length_is_read() {
    let read_of = async |body_bytes| {
        let limits = Limits { body_bytes, ..Limits::default() };
        let server = warm_on(start(cpu(), four(), |_| {}), &[], limits);
        let n_read = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&n_read);
        let chunks = stream::iter((0..64).map(move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok::<_, std::convert::Infallible>(Bytes::from(vec![b' '; 1 << 20]))
        }));
        let sent = request(Method::POST, "/v1/chat/completions", None, Body::from_stream(chunks));
        (server.send(sent).await.status, n_read.load(Ordering::Relaxed))
    };
    let (status, n_read) = read_of(Limits::default().body_bytes).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(n_read < 10, "{n_read} MiB were read");
    let blanks_are_no_json = (StatusCode::BAD_REQUEST, 64);
    assert_eq!(read_of(usize::MAX).await, blanks_are_no_json);
}

/// Makes this very test a process of its own, which does what a reader without a limit of depth would.
const CHILD: &str = "EXRAIL_TEST_DEEP_CHILD";

/// The mutation of the limit of depth: a reader without one is gone with the process that it runs in. What is read
/// with the limit is a 400, see above.
#[test]
fn mutation_l9_without_a_limit_of_depth_a_body_ends_the_process() {
    let deep = "[".repeat(1_000_000);
    assert!(serde_json::from_str::<Value>(&deep).is_err());
    if std::env::var_os(CHILD).is_some() {
        // What such a reader builds, and gives back when the request has ended.
        let value = deep.bytes().fold(Value::Null, |inner, _| Value::Array(vec![inner]));
        drop(value);
        return;
    }
    let name = "hostile::mutation_l9_without_a_limit_of_depth_a_body_ends_the_process";
    let child = |is_deep: bool| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", if is_deep { name } else { "none" }]).env(CHILD, "1");
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command.status().unwrap()
    };
    assert!(child(false).success());
    assert_eq!(child(true).code(), None, "a signal ended it, and no failed test");
}

/// Field fault L1: a compressed body is a thousand times as long as it says.
#[tokio::test]
async fn l1_a_compressed_body_is_refused() {
    let server = warm(&[], None);
    for encoding in ["gzip", "br", "deflate", "zstd", "gzip, identity", "GZIP"] {
        let sent = Request::post("/v1/chat/completions")
            .header(header::HOST, "localhost")
            .header(header::CONTENT_ENCODING, encoding)
            .body(Body::from(b"\x1f\x8b\x08\0".to_vec()))
            .unwrap();
        let answer = server.send(sent).await;
        assert_eq!(answer.status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{encoding}");
        refused(&answer, encoding);
    }
}
