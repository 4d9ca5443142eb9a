//! TabbyAPI, as a strict double of it: each misbehaviour that was measured on the real server, and what becomes of it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    io::Read as _,
    time::{Duration, Instant},
};

use exrail_gateway::{Ability, Answer, Capabilities, Client, GatewayOptions};
use exrail_testkit::{Tabby, TabbyFaults, TabbyOptions};
use serde_json::{Value, json};

use support::{Running, ask, options, until, upstream};

fn running(tabby: &Tabby, options: GatewayOptions) -> Running {
    let key = TabbyOptions::default().api_key;
    Running::over(vec![upstream("tabby", &tabby.url(), Some(&key))], options)
}

fn start(faults: TabbyFaults) -> (Tabby, Running) {
    let tabby = Tabby::start(TabbyOptions::default()).unwrap();
    let running = running(&tabby, options());
    running.prove();
    running.ready();
    tabby.set_faults(faults);
    (tabby, running)
}

fn chat(prompt: &str, streams: bool) -> Value {
    json!({ "model": "tiny", "messages": [{ "role": "user", "content": prompt }], "stream": streams })
}

/// The same without the gateway.
fn direct(tabby: &Tabby, body: &Value) -> Value {
    let agent = ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build();
    let key = format!("Bearer {}", TabbyOptions::default().api_key);
    let post = agent.new_agent().post(format!("{}/v1/chat/completions", tabby.url()));
    post.header("authorization", key).send_json(body).unwrap().body_mut().read_json().unwrap()
}

fn probe(tabby: &Tabby) -> Capabilities {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = Client::new(&tabby.url(), Some(&TabbyOptions::default().api_key)).unwrap();
    runtime.block_on(exrail_gateway::probe(&client, None)).unwrap()
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": { "a": { "type": "integer" }, "b": { "type": "string" } },
        "required": ["a", "b"],
        "additionalProperties": false,
    })
}

fn with_schema(streams: bool) -> Value {
    let mut body = chat("Tell me about the sea.", streams);
    body["response_format"] = json!({ "type": "json_schema", "json_schema": { "name": "a", "strict": true, "schema": schema() } });
    body
}

#[test]
fn its_table_is_what_it_does() {
    let (tabby, _running) = start(TabbyFaults::default());
    let found = probe(&tabby);
    assert_eq!((found.kind, found.model.as_str()), ("tabbyapi", "tiny"), "{}", found.render());
    for (ability, expected) in [
        (Ability::Generates, Answer::Yes),
        (Ability::Streams, Answer::Yes),
        (Ability::StreamUsage, Answer::Yes),
        (Ability::Seed, Answer::No),
        (Ability::JsonSchema, Answer::Yes),
        // It reads no `json_object`.
        (Ability::JsonObject, Answer::No),
        (Ability::RefusesBadSchema, Answer::Yes),
        (Ability::Tokenize, Answer::Yes),
        (Ability::LoadModel, Answer::Yes),
        (Ability::HealthProvesTokens, Answer::No),
    ] {
        assert_eq!(found.answer(ability), expected, "{ability:?}: {}", found.render());
    }
    tabby.set_faults(TabbyFaults {
        ignores_schema: true,
        drops_bad_schema: true,
        ..TabbyFaults::default()
    });
    let found = probe(&tabby);
    assert_eq!(found.answer(Ability::JsonSchema), Answer::No, "{}", found.render());
    assert_eq!(found.answer(Ability::RefusesBadSchema), Answer::No, "{}", found.render());
}

/// 4.1 s to the first token, and 0.01 s to the next, while `/health` was healthy.
#[test]
fn nobody_waits_for_its_cold_start() {
    let cold = Duration::from_millis(500);
    let faults = TabbyFaults { slow_first: Some(cold), ..TabbyFaults::default() };
    let tabby = Tabby::start(TabbyOptions { faults, ..TabbyOptions::default() }).unwrap();
    let running = running(&tabby, options());
    running.prove();
    running.ready();
    let warm_up = running.gateway.upstreams()[0].proved().unwrap().warm_up.clone();
    assert!(warm_up.first_ms >= 500.0 && warm_up.cold_ratio > 5.0, "{warm_up:?}");
    let began = Instant::now();
    assert!(ask(&running.url, &chat("Hello", false)).is_answer());
    assert!(began.elapsed() < cold, "{:?}", began.elapsed());
}

/// `seed: 7` gave three texts in three calls.
#[test]
fn a_seed_that_it_would_ignore_is_refused_or_passed_on_as_asked() {
    let (tabby, running) = start(TabbyFaults::default());
    let mut seeded = chat("Hello", false);
    seeded["seed"] = json!(7);
    let text = |told: Value| told["choices"][0]["message"]["content"].clone();
    assert_ne!(text(direct(&tabby, &seeded)), text(direct(&tabby, &seeded)), "without the gateway");
    let before = tabby.generations();
    let reply = ask(&running.url, &seeded);
    assert_eq!(
        (reply.status, reply.code().as_deref()),
        (400, Some("unsupported_field")),
        "{reply:?}"
    );
    assert_eq!(tabby.generations(), before);
    let lenient = self::running(&tabby, GatewayOptions { passes_unhonoured: true, ..options() });
    lenient.prove();
    lenient.ready();
    assert!(ask(&lenient.url, &seeded).is_answer());
    let record = lenient.records("relay.run").pop().unwrap();
    assert!(record["seed"].is_null(), "nothing was drawn by it: {record}");
}

/// `json_object` gave 200 and free text; through the gateway it is a schema, which the server does keep to.
#[test]
fn json_object_is_an_object() {
    let (tabby, running) = start(TabbyFaults::default());
    let mut body = chat("Tell me about the sea.", false);
    body["response_format"] = json!({ "type": "json_object" });
    let free =
        direct(&tabby, &body)["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert!(serde_json::from_str::<Value>(&free).is_err(), "without the gateway: {free}");
    let reply = ask(&running.url, &body);
    assert!(reply.is_answer(), "{reply:?}");
    assert!(serde_json::from_str::<Value>(&reply.content()).unwrap().is_object(), "{reply:?}");
    let sent = tabby.bodies().pop().unwrap();
    assert_eq!(sent["json_schema"], json!({ "type": "object" }), "{sent}");
}

/// A strict schema gave `{"a":` and spaces, ended as `stop`.
#[test]
fn what_ends_as_stop_and_is_no_json_is_withheld() {
    for streams in [false, true] {
        let (tabby, running) = start(TabbyFaults::default());
        let reply = ask(&running.url, &with_schema(streams));
        assert!(reply.is_answer(), "{reply:?}");
        tabby.set_faults(TabbyFaults { invalid_as_stop: true, ..TabbyFaults::default() });
        let mut body = with_schema(false);
        body["json_schema"] = schema();
        let told = direct(&tabby, &body);
        assert_eq!(told["choices"][0]["finish_reason"], "stop", "without the gateway: {told}");
        let reply = ask(&running.url, &with_schema(streams));
        assert_eq!(reply.code().as_deref(), Some("schema_violation"), "{reply:?}");
        assert_eq!((reply.content().as_str(), reply.is_done()), ("", false), "{reply:?}");
    }
}

/// A schema with an invalid regex gave 200 and free text.
#[test]
fn a_schema_that_it_would_drop_is_refused() {
    let (tabby, running) = start(TabbyFaults { drops_bad_schema: true, ..TabbyFaults::default() });
    let mut body = with_schema(false);
    body["response_format"]["json_schema"]["schema"]["properties"]["b"]["pattern"] = json!("(a");
    let mut bare = chat("Hello", false);
    bare["json_schema"] = body["response_format"]["json_schema"]["schema"].clone();
    let free =
        direct(&tabby, &bare)["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert!(serde_json::from_str::<Value>(&free).is_err(), "without the gateway: {free}");
    let before = tabby.generations();
    let reply = ask(&running.url, &body);
    assert_eq!(
        (reply.status, reply.code().as_deref()),
        (400, Some("unsupported_schema")),
        "{reply:?}"
    );
    assert_eq!(tabby.generations(), before, "it was not asked");
}

/// A schema with `max_tokens` 5 gave a cut object; `tool_choice: required` gave free text.
#[test]
fn half_an_object_and_half_a_call_are_none() {
    let tabby = Tabby::start(TabbyOptions::default()).unwrap();
    // A repair would get another answer, and it is the first one that is looked at here.
    let running = running(&tabby, GatewayOptions { repairs: 0, ..options() });
    running.prove();
    running.ready();
    let mut cut = with_schema(false);
    cut["max_tokens"] = json!(2);
    let reply = ask(&running.url, &cut);
    assert_eq!(
        (reply.status, reply.code().as_deref()),
        (422, Some("schema_violation")),
        "{reply:?}"
    );
    assert!(reply.text.contains("cut by its limit"), "{reply:?}");
    let tools = json!([{ "type": "function", "function": { "name": "move", "description": "moves",
        "parameters": { "type": "object", "properties": { "x": { "type": "integer" } }, "required": ["x"],
                        "additionalProperties": false } } }]);
    for (says, choice, is_called) in [
        ("CALL move {\"x\": 1}", "auto", true),
        ("CALL move {\"x\": \"1\"}", "auto", false),
        ("CALL other {\"x\": 1}", "auto", false),
        ("Hello", "required", false),
    ] {
        for streams in [false, true] {
            let mut body = chat(says, streams);
            body["tools"] = tools.clone();
            body["tool_choice"] = json!(choice);
            let reply = ask(&running.url, &body);
            let found = (reply.text.contains("\"arguments\""), reply.code());
            let expected = if is_called { None } else { Some("schema_violation".to_owned()) };
            assert_eq!(found, (is_called, expected), "{says} {choice} {streams}: {reply:?}");
        }
    }
}

/// An unload during a stream left it with pings for as long as one waited; a plain request got 200 with nothing in it.
#[test]
fn a_model_that_goes_ends_what_it_was_doing() {
    let admin = TabbyOptions::default().admin_key;
    let unload = |tabby: &Tabby| {
        let agent = ureq::Agent::config_builder().proxy(None).build().new_agent();
        let post = agent.post(format!("{}/v1/model/unload", tabby.url()));
        post.header("x-admin-key", &admin).send_empty().unwrap();
    };
    for streams in [true, false] {
        let slow = TabbyOptions {
            token_time: Duration::from_millis(30),
            ping: Duration::from_millis(50),
            ..TabbyOptions::default()
        };
        let tabby = Tabby::start(slow).unwrap();
        let running = running(&tabby, options());
        running.prove();
        running.ready();
        let aborts = TabbyFaults {
            hangs_after_unload: true,
            aborts_as_clean: true,
            ..TabbyFaults::default()
        };
        tabby.set_faults(aborts);
        let before = tabby.generations();
        let mut body = chat("Tell me a story.", streams);
        body["min_tokens"] = json!(200);
        body["max_tokens"] = json!(400);
        let reply = std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask(&running.url, &body));
            until("the generation", || tabby.generations() > before);
            std::thread::sleep(Duration::from_millis(200));
            unload(&tabby);
            asked.join().unwrap()
        });
        let code = reply.code();
        if streams {
            // The fence closes by a look as well; the stream ends by its own limit.
            assert_eq!(
                (code.as_deref(), reply.is_done()),
                (Some("upstream_stalled"), false),
                "{reply:?}"
            );
        } else {
            assert_eq!(
                (reply.status, code.as_deref()),
                (502, Some("upstream_no_answer")),
                "{reply:?}"
            );
        }
        until("a closed fence", || running.gateway.upstreams()[0].proved().is_none());
        let reply = ask(&running.url, &chat("Hello", false));
        assert_eq!((reply.status, reply.code().as_deref()), (503, Some("not_ready")), "{reply:?}");
    }
}

/// Another model under the same address has to prove itself, and is not asked by the old name.
#[test]
fn another_model_is_another_model() {
    let (tabby, running) = start(TabbyFaults::default());
    let admin = TabbyOptions::default().admin_key;
    let agent = ureq::Agent::config_builder().proxy(None).build().new_agent();
    let post = agent.post(format!("{}/v1/model/load", tabby.url())).header("x-admin-key", &admin);
    let mut told = String::new();
    let mut progress = post.send_json(json!({ "model_name": "other" })).unwrap();
    progress.body_mut().as_reader().read_to_string(&mut told).unwrap();
    assert!(told.contains("finished"), "{told}");
    until("the change", || {
        running.records("guard.fire").iter().any(|it| it["guard"] == "upstream_changed")
    });
    let was = running.records("guard.fire").pop().unwrap();
    assert!(was["detail"].as_str().unwrap().contains("other"), "{was}");
    let reply = ask(&running.url, &chat("Hello", false));
    assert_eq!(
        (reply.status, reply.code().as_deref()),
        (404, Some("model_not_found")),
        "{reply:?}"
    );
    // Without the gateway the name means nothing.
    assert_eq!(direct(&tabby, &chat("Hello", false))["model"], "other");
}

#[test]
fn a_wrong_key_is_ours_to_mend() {
    let tabby = Tabby::start(TabbyOptions::default()).unwrap();
    let running = Running::over(vec![upstream("tabby", &tabby.url(), Some("wrong"))], options());
    running.prove();
    let reply = ask(&running.url, &chat("Hello", false));
    assert_eq!(reply.status, 503, "{reply:?}");
    assert!(reply.text.contains("upstream_unauthorized"), "{reply:?}");
}
