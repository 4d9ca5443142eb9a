//! Faults of an upstream, injected one at a time between it and the gateway: what the client of the gateway is told, and
//! what one without a gateway would have got.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{sync::Arc, time::Duration};

use exrail_gateway::{Ability, Answer, Client};
use exrail_testkit::{ProxyFault, ScriptedOptions};
use serde_json::{Value, json};

use support::{Fixture, MODEL, ask, chat, until};

/// A fault, the request that meets it, and what the gateway says of it.
struct Case {
    fault: ProxyFault,
    streams: bool,
    /// Status of the gateway, or of its error event.
    told: (u16, &'static str),
    /// Whether the fence closes by it.
    closes: bool,
}

fn cases() -> Vec<Case> {
    let case = |fault, streams, told, closes| Case { fault, streams, told, closes };
    vec![
        case(ProxyFault::EmptyBody, false, (502, "upstream_empty"), true),
        case(ProxyFault::HalfJson, false, (502, "upstream_not_json"), true),
        case(ProxyFault::CutStream { events: 2 }, false, (502, "upstream_cut"), false),
        case(ProxyFault::WrongModel("other".into()), false, (502, "upstream_wrong_model"), true),
        case(ProxyFault::Garbage, false, (502, "upstream_garbled"), true),
        case(ProxyFault::Unauthorized, false, (502, "upstream_unauthorized"), true),
        case(ProxyFault::TooMany { retry_after_s: Some(7) }, false, (429, "upstream_busy"), false),
        case(
            ProxyFault::SlowLoris { byte_every: Duration::from_millis(50) },
            false,
            (504, "upstream_late"),
            true,
        ),
        case(ProxyFault::Down, false, (502, "upstream_unreachable"), true),
        case(ProxyFault::CutStream { events: 2 }, true, (200, "upstream_cut"), false),
        case(ProxyFault::EndedEarly { events: 2 }, true, (200, "upstream_cut"), false),
        case(ProxyFault::HalfJson, true, (200, "upstream_cut"), false),
        case(ProxyFault::PingsForEver { events: 2 }, true, (200, "upstream_stalled"), true),
        case(ProxyFault::Garbage, true, (200, "upstream_garbled"), true),
        case(ProxyFault::WrongModel("other".into()), true, (200, "upstream_wrong_model"), true),
    ]
}

#[test]
fn every_fault_is_named_and_contained() {
    for Case { fault, streams, told: (status, code), closes } in cases() {
        let fixture = Fixture::start();
        fixture.ready();
        let named = format!("{fault:?}, stream {streams}");
        let proof = fixture.proof().unwrap();
        fixture.proxy.set(fault);
        let reply = ask(&fixture.url, &chat("Say something at length.", streams));
        let stays = fixture.proof().is_some_and(|now| Arc::ptr_eq(&now, &proof));
        assert_eq!(
            (reply.status, reply.code()),
            (status, Some(code.to_owned())),
            "{named}: {reply:?}"
        );
        assert!(!reply.is_done(), "{named}: a clean end: {reply:?}");
        let recorded = fixture.records("relay.run");
        assert_eq!(recorded.last().unwrap()["fault"], code, "{named}");
        assert!(recorded.last().unwrap()["answer_sha256"].is_null(), "{named}");
        if closes {
            until(&named, || {
                fixture.records("guard.fire").iter().any(|it| it["guard"] == "upstream_fence")
            });
        } else {
            assert!(stays, "{named}: one such fault may be a request's own");
        }
        assert!(fixture.metrics().contains(&format!("fault=\"{code}\"}} 1\n")), "{named}");
        fixture.proxy.set(ProxyFault::None);
        fixture.wait_rest();
        until(&named, || fixture.serves(MODEL));
        let reply = ask(&fixture.url, &chat("And now?", streams));
        assert!(reply.is_answer(), "{named}, and gone again: {reply:?}");
    }
}

/// The mutation: without the gateway each of the faults that look like an answer reaches the client as one.
#[test]
fn mutation_without_the_gateway_the_faults_reach_the_client() {
    let fixture = Fixture::start();
    let direct = |fault: ProxyFault, streams: bool| {
        fixture.proxy.set(fault);
        ask(&fixture.proxy.url(), &chat("Say something at length.", streams))
    };
    let reply = direct(ProxyFault::EmptyBody, false);
    assert_eq!((reply.status, reply.text.as_str()), (200, ""));
    let reply = direct(ProxyFault::HalfJson, false);
    assert!(reply.status == 200 && serde_json::from_str::<Value>(&reply.text).is_err());
    let reply = direct(ProxyFault::WrongModel("other".into()), false);
    assert!(reply.is_answer() && reply.json()["model"] == "other");
    let reply = direct(ProxyFault::Garbage, false);
    assert!(reply.is_answer() && reply.text.contains('\u{FFFD}'));
    let reply = direct(ProxyFault::EndedEarly { events: 2 }, true);
    assert!(reply.status == 200 && reply.code().is_none(), "nothing tells that it was cut");
    fixture.proxy.set(ProxyFault::IgnoresSchema);
    let reply = ask(&fixture.proxy.url(), &with_schema(false));
    assert!(reply.is_answer() && reply.content().parse::<Value>().is_err(), "{reply:?}");
}

#[test]
fn twenty_clean_runs_raise_no_alarm() {
    let fixture = Fixture::start();
    fixture.ready();
    for at in 0..20 {
        for streams in [false, true] {
            let reply = ask(&fixture.url, &chat(&format!("Question {at}"), streams));
            assert!(reply.is_answer(), "{reply:?}");
        }
    }
    assert!(fixture.records("guard.fire").is_empty(), "{:?}", fixture.records("guard.fire"));
    let recorded = fixture.records("relay.run");
    assert_eq!(recorded.len(), 40);
    assert!(recorded.iter().all(|it| it["fault"].is_null() && it["attempts"] == 1));
    assert!(!fixture.metrics().contains("exrail_gateway_faults_total{"));
}

/// G-05: `/health` and `/v1/models` answer throughout, and nobody's request waits for the first token but ours.
#[test]
fn no_request_pays_for_a_cold_start() {
    let cold = Duration::from_millis(600);
    let fixture = Fixture::closed();
    fixture.proxy.set(ProxyFault::SlowFirst(cold));
    fixture.open();
    let began = std::time::Instant::now();
    let early = ask(&fixture.url, &chat("Hello", false));
    assert!(early.is_answer(), "held, then answered: {early:?}");
    assert!(began.elapsed() >= cold, "{:?}", began.elapsed());
    let record = fixture.records("relay.run").pop().unwrap();
    assert!(record["latency_ms"]["upstream"].as_f64().unwrap() < 300.0, "{record}");
    let warm_up = &fixture.upstreams()["upstreams"][0]["warm_up"];
    assert!(warm_up["cold_ratio"].as_f64().unwrap() > 5.0, "{warm_up}");
    // Without the gateway the first one waits.
    let fixture = Fixture::closed();
    fixture.proxy.set(ProxyFault::SlowFirst(cold));
    let began = std::time::Instant::now();
    assert!(ask(&fixture.proxy.url(), &chat("Hello", false)).is_answer());
    assert!(began.elapsed() >= cold);
}

#[test]
fn while_no_upstream_is_proved_requests_are_held_and_then_refused_with_the_phase() {
    let fixture = Fixture::closed();
    fixture.proxy.set(ProxyFault::Down);
    fixture.open();
    let reply = ask(&fixture.url, &chat("Hello", false));
    assert_eq!((reply.status, reply.code().as_deref()), (503, Some("not_ready")), "{reply:?}");
    assert!(reply.text.contains("upstream_unreachable"), "{reply:?}");
    assert_eq!(fixture.upstream.generations(), 0);
}

/// An answer that does not conform is asked for once more, and then it is none.
#[test]
fn what_ignores_its_schema_is_withheld() {
    for streams in [false, true] {
        let fixture = Fixture::start();
        fixture.ready();
        let reply = ask(&fixture.url, &with_schema(streams));
        let value: Value = serde_json::from_str(&reply.content()).unwrap();
        assert!(value["colour"].is_string(), "{reply:?}");
        fixture.proxy.set(ProxyFault::IgnoresSchema);
        let before = fixture.upstream.generations();
        let reply = ask(&fixture.url, &with_schema(streams));
        let expected = if streams { 200 } else { 422 };
        assert_eq!((reply.status, reply.code().as_deref()), (expected, Some("schema_violation")));
        assert!(reply.text.contains("content: "), "names the place: {reply:?}");
        assert_eq!(reply.content(), "", "nothing of it is told: {reply:?}");
        assert_eq!(fixture.upstream.generations() - before, 2, "one repair");
        let record = fixture.records("relay.run").pop().unwrap();
        assert_eq!((&record["held_to"], &record["repairs"]), (&json!("json_schema"), &json!(1)));
    }
}

fn with_schema(streams: bool) -> Value {
    let mut body = chat("Tell me about the sea.", streams);
    body["response_format"] = json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": {
        "type": "object", "properties": { "colour": { "enum": ["red", "blue"] } },
        "required": ["colour"], "additionalProperties": false,
    } } });
    body
}

#[test]
fn a_schema_that_cannot_be_checked_is_refused_before_anybody_is_asked() {
    let fixture = Fixture::start();
    fixture.ready();
    let before = fixture.upstream.generations();
    let mut body = with_schema(false);
    body["response_format"]["json_schema"]["schema"] = json!({ "type": "string", "pattern": "(a" });
    let reply = ask(&fixture.url, &body);
    assert_eq!(
        (reply.status, reply.code().as_deref()),
        (400, Some("unsupported_schema")),
        "{reply:?}"
    );
    assert_eq!(fixture.upstream.generations(), before);
}

/// A storm of 429: the upstream is left alone for as long as it said.
#[test]
fn what_is_busy_is_left_alone() {
    let fixture = Fixture::start();
    fixture.ready();
    fixture.proxy.set(ProxyFault::TooMany { retry_after_s: Some(60) });
    let first = ask(&fixture.url, &chat("Hello", false));
    assert_eq!((first.status, first.retry_after.as_deref()), (429, Some("60")));
    let before = fixture.proxy.generations();
    for _ in 0..20 {
        let reply = ask(&fixture.url, &chat("Hello", false));
        assert_eq!(reply.status, 429, "{reply:?}");
    }
    assert_eq!(fixture.proxy.generations(), before, "none of them went on");
}

/// Another model under the old address: the old name is not found, and the change is on record.
#[test]
fn another_model_after_a_restart_is_told() {
    let fixture = Fixture::start();
    fixture.ready();
    fixture.proxy.set(ProxyFault::WrongModel("other".into()));
    until("the change", || {
        fixture.records("guard.fire").iter().any(|it| it["guard"] == "upstream_changed")
    });
    let reply = ask(&fixture.url, &chat("Hello", false));
    assert_eq!(
        (reply.status, reply.code().as_deref()),
        (404, Some("model_not_found")),
        "{reply:?}"
    );
    assert!(reply.text.contains("other"), "{reply:?}");
    let mut body = chat("Hello", false);
    body["model"] = json!("other");
    assert!(ask(&fixture.url, &body).is_answer());
}

#[test]
fn a_client_that_leaves_ends_the_upstreams_work_and_a_hang_after_that_is_seen() {
    let options =
        ScriptedOptions { token: Duration::from_millis(20), tokens: 500, ..support::scripted() };
    let fixture = Fixture::over(options, false);
    fixture.open();
    fixture.ready();
    fixture.proxy.set(ProxyFault::HangAfterCancel);
    support::leave_early(&fixture.url, &chat("Tell me a long story.", true));
    until("the cancel", || fixture.proxy.cancelled() == 1);
    until("the end of the work", || fixture.proxy.open() == 0);
    until("the record", || {
        fixture.records("relay.run").iter().any(|it| it["fault"] == "client_gone")
    });
    let reply = ask(&fixture.url, &chat("Hello", false));
    assert_eq!((reply.status, reply.code().as_deref()), (504, Some("upstream_late")), "{reply:?}");
}

/// A request that is late by its own length shuts nobody out; the upstream generates once more, and that decides.
#[test]
fn one_long_request_shuts_nobody_out() {
    let options =
        ScriptedOptions { token: Duration::from_millis(20), tokens: 400, ..support::scripted() };
    let fixture = Fixture::over(options, true);
    fixture.ready();
    let proof = fixture.proof().unwrap();
    let reply = ask(&fixture.url, &chat("Tell me a long story.", false));
    assert_eq!((reply.status, reply.code().as_deref()), (504, Some("upstream_late")), "{reply:?}");
    let mut short = chat("Hello", false);
    short["max_tokens"] = json!(4);
    for _ in 0..10 {
        assert!(ask(&fixture.url, &short).is_answer());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(Arc::ptr_eq(&fixture.proof().unwrap(), &proof), "the fence stayed open");
}

/// Prompts take their time: the first event has another limit than the later ones, also behind comments.
#[test]
fn a_long_prompt_is_no_stall() {
    let options =
        ScriptedOptions { first_token: Duration::from_millis(1500), ..support::scripted() };
    let fixture = Fixture::over(options, true);
    fixture.ready();
    assert!(support::options().stall < Duration::from_millis(1500));
    assert!(ask(&fixture.url, &chat("Hello", true)).is_answer());
    assert!(fixture.records("guard.fire").is_empty());
}

/// Who reads slowly is waited for within a limit, and the upstream is not blamed for it.
#[test]
fn a_slow_reader_is_not_the_upstreams_fault() {
    let options = ScriptedOptions { tokens: 200_000, token: Duration::ZERO, ..support::scripted() };
    let fixture = Fixture::over(options, true);
    fixture.ready();
    let proof = fixture.proof().unwrap();
    let stream = support::begin(&fixture.url, &chat("Tell me a very long story.", true));
    until("the record", || {
        fixture.records("relay.run").iter().any(|it| it["fault"] == "client_gone")
    });
    drop(stream);
    assert!(Arc::ptr_eq(&fixture.proof().unwrap(), &proof), "the fence stayed open");
}

#[test]
fn what_was_refused_and_whoever_left_is_on_record() {
    let options =
        ScriptedOptions { token: Duration::from_millis(20), tokens: 100, ..support::scripted() };
    let fixture = Fixture::over(options, true);
    fixture.ready();
    drop(support::begin(&fixture.url, &chat("Tell me a long story.", false)));
    until("the record of who left", || {
        fixture.records("relay.run").iter().any(|it| it["fault"] == "client_gone")
    });
    until("the end of the work", || fixture.proxy.open() == 0);
    let mut unknown = chat("Hello", false);
    unknown["model"] = json!("nobody");
    let old = json!({ "model": MODEL, "messages": [], "functions": [] });
    for (body, code) in [(unknown, "model_not_found"), (old, "unsupported_field")] {
        assert_eq!(ask(&fixture.url, &body).code().as_deref(), Some(code));
        assert_eq!(fixture.records("guard.fire").last().unwrap()["guard"], code);
    }
}

#[test]
fn a_seed_that_is_lost_on_the_way_is_found_by_the_probe() {
    let fixture = Fixture::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let probe = |url: &str| {
        let client = Client::new(url, None).unwrap();
        runtime.block_on(exrail_gateway::probe(&client, None)).unwrap()
    };
    let found = probe(&fixture.proxy.url());
    assert_eq!(found.answer(Ability::Seed), Answer::Yes, "{}", found.render());
    assert_eq!(found.answer(Ability::JsonSchema), Answer::Yes, "{}", found.render());
    fixture.proxy.set(ProxyFault::NoSeed);
    assert_ne!(probe(&fixture.proxy.url()).answer(Ability::Seed), Answer::Yes);
    fixture.proxy.set(ProxyFault::IgnoresSchema);
    assert_eq!(probe(&fixture.proxy.url()).answer(Ability::JsonSchema), Answer::No);
    assert_eq!(found.model, MODEL);
}
