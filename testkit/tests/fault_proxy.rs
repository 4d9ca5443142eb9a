//! Every fault of the proxy, seen on the wire over a scripted upstream.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "fault_proxy/scripted.rs"]
mod scripted;
#[path = "fault_proxy/wire.rs"]
mod wire;

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use exrail_testkit::{FaultProxy, ProxyFault, ScriptedOptions, ScriptedUpstream};
use serde_json::{Value, json};

use wire::{End, ask, chat, chat_body, read, read_until, send, send_on, soon};

const TOKENS: usize = 8;

fn upstream(token: Duration) -> ScriptedUpstream {
    ScriptedUpstream::start(ScriptedOptions {
        model: "scripted".into(),
        tokens: TOKENS,
        first_token: token,
        token,
    })
    .unwrap()
}

/// A proxy with this fault, and the upstream behind it, which writes a token in each `token`.
fn proxy_over(token: Duration, fault: ProxyFault) -> (FaultProxy, ScriptedUpstream) {
    let upstream = upstream(token);
    let proxy = FaultProxy::start(&upstream.url()).unwrap();
    proxy.set(fault);
    (proxy, upstream)
}

fn proxy(fault: ProxyFault) -> (FaultProxy, ScriptedUpstream) {
    proxy_over(Duration::ZERO, fault)
}

fn plain() -> Value {
    json!({ "temperature": 0 })
}

fn stream() -> Value {
    json!({ "temperature": 0, "stream": true })
}

fn begin(url: &str, fields: &Value) -> TcpStream {
    send(url, "POST", "/v1/chat/completions", &chat_body(fields))
}

/// What the upstream says by itself.
fn said(fields: &Value) -> wire::Reply {
    chat(&upstream(Duration::ZERO).url(), fields)
}

#[test]
fn without_a_fault_nothing_changes() {
    let (proxy, upstream) = proxy(ProxyFault::None);
    let twin = self::upstream(Duration::ZERO);
    let completion = r#"{"prompt": "once", "seed": 3}"#;
    for (method, path, body) in [
        ("POST", "/v1/chat/completions", chat_body(&plain())),
        ("POST", "/v1/chat/completions", chat_body(&stream())),
        ("POST", "/v1/chat/completions", "{}".to_owned()),
        ("POST", "/v1/completions", completion.to_owned()),
        ("POST", "/v1/messages", "{}".to_owned()),
        ("GET", "/v1/models?all=1", String::new()),
        ("DELETE", "/nowhere", String::new()),
    ] {
        let passed = ask(&proxy.url(), method, path, &body);
        let direct = ask(&twin.url(), method, path, &body);
        assert_eq!(passed.status(), direct.status(), "{path}");
        assert_eq!(passed.body, direct.body, "{path}");
        assert_eq!(passed.end, direct.end, "{path}");
        for header in ["content-type", "content-length", "transfer-encoding", "allow"] {
            assert_eq!(passed.header(header), direct.header(header), "{path}: {header}");
        }
    }
    assert_eq!(upstream.generations(), 3);
    assert_eq!((proxy.generations(), proxy.cancelled(), proxy.open()), (5, 0, 0));
}

#[test]
fn a_stream_passes_as_it_comes() {
    let (proxy, _upstream) = proxy_over(Duration::from_millis(100), ProxyFault::None);
    let begun = Instant::now();
    let mut connection = begin(&proxy.url(), &stream());
    read_until(&mut connection, "data: ");
    assert!(begun.elapsed() < Duration::from_millis(400));
    assert_eq!(proxy.open(), 1);
    read_until(&mut connection, "[DONE]");
    assert!(begun.elapsed() > Duration::from_millis(700));
    soon(|| proxy.open() == 0);
}

#[test]
fn who_leaves_is_counted_and_the_upstream_is_left() {
    let (proxy, _upstream) = proxy_over(Duration::from_secs(2), ProxyFault::None);
    for (count, fields) in [stream(), plain()].iter().enumerate() {
        let connection = begin(&proxy.url(), fields);
        soon(|| proxy.open() == 1);
        drop(connection);
        let left = Instant::now();
        soon(|| proxy.cancelled() == count + 1);
        soon(|| proxy.open() == 0);
        assert!(left.elapsed() < Duration::from_millis(500));
    }
}

#[test]
fn who_leaves_after_the_end_event_has_not_left() {
    for fault in [ProxyFault::None, ProxyFault::Garbage] {
        let (proxy, _upstream) = proxy(fault);
        read_until(&mut begin(&proxy.url(), &stream()), "[DONE]");
        soon(|| proxy.open() == 0);
        assert_eq!(proxy.cancelled(), 0);
    }
}

#[test]
fn only_the_first_is_slow() {
    let wait = Duration::from_millis(300);
    let (proxy, upstream) = proxy(ProxyFault::SlowFirst(wait));
    assert_eq!(ask(&proxy.url(), "GET", "/v1/models", "").status(), 200);
    let took = || {
        let begun = Instant::now();
        assert_eq!(chat(&proxy.url(), &plain()).text(), said(&plain()).text());
        begun.elapsed()
    };
    assert!(took() >= wait);
    assert!(took() < wait);
    proxy.set(ProxyFault::SlowFirst(wait));
    assert!(took() >= wait);
    // Who leaves meanwhile is seen at once, though nothing is asked of the upstream yet.
    proxy.set(ProxyFault::SlowFirst(Duration::from_secs(60)));
    let connection = begin(&proxy.url(), &stream());
    // Before it has arrived nobody knows of it.
    soon(|| proxy.generations() == 4);
    drop(connection);
    soon(|| proxy.cancelled() == 1);
    assert_eq!((upstream.generations(), proxy.generations()), (3, 4));
}

#[test]
fn an_empty_body_is_a_200() {
    let (proxy, upstream) = proxy(ProxyFault::EmptyBody);
    for (fields, name) in [(plain(), "application/json"), (stream(), "text/event-stream")] {
        let reply = chat(&proxy.url(), &fields);
        assert_eq!((reply.status(), reply.body.as_str(), reply.end), (200, "", End::Proper));
        assert_eq!(reply.header("content-type"), Some(name));
    }
    assert_eq!(ask(&proxy.url(), "GET", "/v1/models", "").json()["data"][0]["id"], "scripted");
    assert_eq!((upstream.generations(), proxy.generations()), (0, 2));
}

#[test]
fn a_cut_stream_is_broken_after_its_events() {
    let whole = said(&stream());
    for events in [0, 1, 3, 1000] {
        let (proxy, _upstream) = proxy(ProxyFault::CutStream { events });
        let reply = chat(&proxy.url(), &stream());
        assert_eq!((reply.status(), reply.end), (200, End::Broken));
        let expected = events.min(whole.data().len() - 1);
        assert_eq!(reply.data(), whole.data()[..expected]);
        assert_eq!((proxy.cancelled(), proxy.open()), (0, 0));
    }
}

#[test]
fn a_cut_plain_reply_is_broken_in_its_middle() {
    let (proxy, _upstream) = proxy(ProxyFault::CutStream { events: 2 });
    let reply = chat(&proxy.url(), &plain());
    assert_eq!((reply.status(), reply.end), (200, End::Broken));
    assert_eq!(reply.header("transfer-encoding"), Some("chunked"));
    let whole = said(&plain()).body;
    assert_eq!(reply.body, whole[..whole.len() / 2]);
    assert_eq!(proxy.cancelled(), 0);
}

#[test]
fn an_early_end_is_a_proper_one() {
    let whole = said(&stream());
    for events in [0, 3, 1000] {
        let (proxy, _upstream) = proxy(ProxyFault::EndedEarly { events });
        let reply = chat(&proxy.url(), &stream());
        assert_eq!((reply.status(), reply.end), (200, End::Proper));
        // Neither the finish reason nor the end event.
        assert_eq!(reply.data(), whole.data()[..events.min(whole.data().len() - 2)]);
        assert!(!reply.body.contains("\"stop\""));
        assert_eq!(chat(&proxy.url(), &plain()).text(), said(&plain()).text());
        assert_eq!(proxy.cancelled(), 0);
    }
}

#[test]
fn half_a_json_text_arrives_as_if_it_were_whole() {
    let (proxy, _upstream) = proxy(ProxyFault::HalfJson);
    let whole = said(&plain()).body;
    let reply = chat(&proxy.url(), &plain());
    assert_eq!(reply.end, End::Proper);
    assert_eq!(reply.header("content-length").unwrap(), (whole.len() / 2).to_string());
    assert_eq!(reply.body, whole[..whole.len() / 2]);
    // Half of a character is none, wherever the middle lies in it: the client here reads UTF-8.
    for pad in 0..6 {
        let text = format!("ECHO {}{}", "a".repeat(pad), "€".repeat(300));
        let wide = json!({ "messages": [{ "role": "user", "content": text }] });
        assert_eq!(chat(&proxy.url(), &wide).end, End::Proper);
    }

    // With an upstream of its own: an answer's number is in every event.
    let (proxy, _upstream) = self::proxy(ProxyFault::HalfJson);
    let whole = said(&stream());
    let reply = chat(&proxy.url(), &stream());
    assert_eq!(reply.end, End::Proper);
    assert!(reply.body.ends_with("\n\n"));
    let (data, whole) = (reply.data(), whole.data());
    let last = whole.len() - 2;
    assert_eq!(whole[last + 1], "[DONE]");
    assert_eq!(data[..last], whole[..last]);
    assert_eq!(data[last..], [&whole[last][..whole[last].len() / 2]]);
}

#[test]
fn another_model_is_named_everywhere() {
    let (proxy, _upstream) = proxy(ProxyFault::WrongModel("other".into()));
    let reply = chat(&proxy.url(), &plain());
    assert_eq!(reply.json()["model"], "other");
    assert_eq!(reply.text(), said(&plain()).text());
    let reply = chat(&proxy.url(), &stream());
    assert_eq!(reply.text(), said(&stream()).text());
    let data = reply.data();
    let (done, events) = data.split_last().unwrap();
    assert_eq!(*done, "[DONE]");
    assert_eq!(events.len(), TOKENS + 2);
    for event in events {
        assert_eq!(serde_json::from_str::<Value>(event).unwrap()["model"], "other");
    }
    let models = ask(&proxy.url(), "GET", "/v1/models", "");
    assert_eq!(models.json()["data"][0]["id"], "other");
    assert_eq!(models.json()["data"][0]["owned_by"], "scripted");
}

#[test]
fn garbage_is_as_long_as_the_text() {
    let (proxy, _upstream) = proxy(ProxyFault::Garbage);
    for fields in [plain(), stream()] {
        let reply = chat(&proxy.url(), &fields);
        assert_eq!(reply.end, End::Proper);
        let text = reply.text();
        assert_eq!(text.chars().count(), said(&fields).text().chars().count());
        assert!(text.chars().all(|character| character == '\u{fffd}' || character.is_control()));
        assert!(text.contains('\u{fffd}') && text.contains('\u{1}'));
    }
    let reply = ask(&proxy.url(), "POST", "/v1/completions", r#"{"prompt": "once"}"#);
    assert!(reply.json()["choices"][0]["text"].as_str().unwrap().starts_with('\u{fffd}'));
}

#[test]
fn a_seed_is_lost_and_the_temperature_is_not() {
    let (proxy, _upstream) = proxy(ProxyFault::NoSeed);
    let seeded = json!({ "seed": 5 });
    let text = |fields: &Value| chat(&proxy.url(), fields).text();
    assert_ne!(text(&seeded), text(&seeded));
    assert_eq!(text(&plain()), text(&plain()));
    proxy.set(ProxyFault::None);
    assert_eq!(text(&seeded), text(&seeded));
}

#[test]
fn a_schema_is_lost() {
    let (proxy, _upstream) = proxy(ProxyFault::IgnoresSchema);
    let fields = json!({ "temperature": 0, "response_format": { "type": "json_object" } });
    assert_eq!(chat(&proxy.url(), &fields).text(), said(&plain()).text());
    proxy.set(ProxyFault::None);
    assert_eq!(chat(&proxy.url(), &fields).text(), "{}");
}

#[test]
fn after_a_client_left_all_hang_until_the_next_fault() {
    let (proxy, upstream) = proxy_over(Duration::from_millis(50), ProxyFault::HangAfterCancel);
    assert_eq!(chat(&proxy.url(), &stream()).end, End::Proper);
    let mut connection = begin(&proxy.url(), &stream());
    read_until(&mut connection, "data: ");
    drop(connection);
    soon(|| proxy.cancelled() == 1);
    let mut hanging = begin(&proxy.url(), &plain());
    hanging.set_read_timeout(Some(Duration::from_millis(800))).unwrap();
    assert!(hanging.read(&mut [0]).is_err(), "it waits");
    assert_eq!(ask(&proxy.url(), "GET", "/v1/models", "").status(), 200);
    assert_eq!((upstream.generations(), proxy.generations()), (2, 3));
    hanging.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    proxy.set(ProxyFault::None);
    assert_eq!(read(&mut hanging).unwrap().text(), said(&plain()).text());
}

#[test]
fn nobody_is_authorized() {
    let (proxy, upstream) = proxy(ProxyFault::Unauthorized);
    for reply in [
        chat(&proxy.url(), &plain()),
        chat(&proxy.url(), &stream()),
        ask(&proxy.url(), "GET", "/v1/models", ""),
    ] {
        assert_eq!(reply.status(), 401);
        assert_eq!(reply.body, r#"{"detail":"Invalid API key"}"#);
    }
    assert_eq!(upstream.generations(), 0);
}

#[test]
fn too_many_requests_with_and_without_a_time() {
    let (proxy, upstream) = proxy(ProxyFault::TooMany { retry_after_s: Some(7) });
    let reply = chat(&proxy.url(), &plain());
    assert_eq!((reply.status(), reply.header("retry-after")), (429, Some("7")));
    proxy.set(ProxyFault::TooMany { retry_after_s: None });
    let reply = chat(&proxy.url(), &stream());
    assert_eq!((reply.status(), reply.header("retry-after")), (429, None));
    assert_eq!(ask(&proxy.url(), "GET", "/v1/models", "").status(), 200);
    assert_eq!((upstream.generations(), proxy.cancelled()), (0, 0));
}

#[test]
fn a_slow_loris_sends_byte_after_byte() {
    let every = Duration::from_millis(2);
    let (proxy, _upstream) = proxy(ProxyFault::SlowLoris { byte_every: every });
    for mut fields in [plain(), stream()] {
        fields["max_tokens"] = json!(1);
        let whole = said(&fields);
        let begun = Instant::now();
        let reply = chat(&proxy.url(), &fields);
        assert_eq!((reply.text(), reply.end), (whole.text(), End::Proper));
        assert!(begun.elapsed() >= every * u32::try_from(whole.body.len()).unwrap());
    }
    let mut connection = begin(&proxy.url(), &stream());
    read_until(&mut connection, "\r\n1\r\nd\r\n1\r\na\r\n");
    drop(connection);
    soon(|| (proxy.cancelled(), proxy.open()) == (1, 0));
}

#[test]
fn pings_have_no_end() {
    for (events, expected) in [(2, 2), (1000, TOKENS + 2)] {
        let (proxy, _upstream) = proxy(ProxyFault::PingsForEver { events });
        let mut connection = begin(&proxy.url(), &stream());
        let pings = ": ping\n\n\r\n8\r\n".repeat(3);
        let seen = read_until(&mut connection, &pings);
        assert_eq!(seen.matches("data: ").count(), expected);
        assert!(!seen.contains("[DONE]"));
        assert_eq!((proxy.cancelled(), proxy.open()), (0, 0));
        drop(connection);
        soon(|| proxy.cancelled() == 1);
        assert_eq!(chat(&proxy.url(), &plain()).text(), said(&plain()).text());
    }
}

#[test]
fn down_means_no_answer() {
    let (proxy, upstream) = proxy_over(Duration::from_millis(100), ProxyFault::None);
    let mut kept = send(&proxy.url(), "GET", "/v1/models", "");
    assert_eq!(read(&mut kept).unwrap().status(), 200);
    let mut running = begin(&proxy.url(), &stream());
    read_until(&mut running, "data: ");
    proxy.set(ProxyFault::Down);
    let mut rest = Vec::new();
    if let Err(error) = running.read_to_end(&mut rest) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    assert!(!String::from_utf8(rest).unwrap().contains("[DONE]"));
    soon(|| proxy.open() == 0);
    assert_eq!(proxy.cancelled(), 0);
    // The kept connection is closed, whether writing or reading finds it out.
    let sent = send_on(&mut kept, "GET", "/v1/models", "");
    assert!(sent.is_err() || read(&mut kept).is_none());
    for _ in 0..3 {
        let host = proxy.url();
        let mut connection = TcpStream::connect(host.strip_prefix("http://").unwrap()).unwrap();
        let sent = send_on(&mut connection, "POST", "/v1/completions", r#"{"prompt": "a"}"#);
        assert!(sent.is_err() || read(&mut connection).is_none());
    }
    assert_eq!(upstream.generations(), 1);
    proxy.set(ProxyFault::None);
    assert_eq!(chat(&proxy.url(), &plain()).text(), said(&plain()).text());
}

#[test]
fn an_absent_upstream_is_a_502() {
    let (proxy, upstream) = proxy(ProxyFault::None);
    drop(upstream);
    assert_eq!(chat(&proxy.url(), &plain()).status(), 502);
    assert_eq!(ask(&proxy.url(), "GET", "/v1/models", "").status(), 502);
    assert_eq!((proxy.cancelled(), proxy.open()), (0, 0));
    assert!(FaultProxy::start("localhost:1").is_err());
    assert!(FaultProxy::start("https://localhost").is_err());
}

#[test]
fn an_upstream_that_dies_breaks_the_stream() {
    let (proxy, upstream) = proxy_over(Duration::from_millis(50), ProxyFault::None);
    let mut connection = begin(&proxy.url(), &stream());
    soon(|| upstream.generations() == 1);
    drop(upstream);
    assert_eq!(read(&mut connection).unwrap().end, End::Broken);
    soon(|| (proxy.cancelled(), proxy.open()) == (0, 0));
}

#[test]
fn a_proxy_stops_when_it_is_dropped() {
    let (proxy, _upstream) = proxy(ProxyFault::PingsForEver { events: 0 });
    let mut connection = begin(&proxy.url(), &stream());
    read_until(&mut connection, ": ping");
    let begun = Instant::now();
    drop(proxy);
    assert!(begun.elapsed() < Duration::from_millis(500));
    while connection.read(&mut [0; 4096]).is_ok_and(|len| len > 0) {}
    assert!(begun.elapsed() < Duration::from_millis(500));
}
