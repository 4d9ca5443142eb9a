//! llama.cpp's real server behind the gateway: `make test-upstreams` installs it and runs this.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use exrail_gateway::{Ability, Answer, Client, FenceOptions, GatewayOptions};
use exrail_testkit::{FaultProxy, ProxyFault};
use serde_json::{Value, json};

use support::{Reply, Running, ask, leave_early, options, until, upstream};

const NAME: &str = "smollm2";

/// Ends with the test.
struct LlamaServer {
    process: Child,
    port: u16,
}

impl Drop for LlamaServer {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).expect("run through make test-upstreams")
}

impl LlamaServer {
    /// Begins to load; nobody waits for it.
    fn start(port: u16, alias: &str, model: &str) -> Self {
        let mut command = Command::new(variable("EXRAIL_TEST_LLAMA_SERVER"));
        command.args(["--model", &variable(model), "--alias", alias, "--port", &port.to_string()]);
        command.args(["--ctx-size", "8192", "--parallel", "4", "--slots", "--threads", "2"]);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { process, port }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Slots that compute.
    fn busy(&self) -> usize {
        let agent = ureq::Agent::config_builder().proxy(None).build().new_agent();
        let mut slots = agent.get(format!("{}/slots", self.url())).call().unwrap();
        let slots: Value = slots.body_mut().read_json().unwrap();
        slots.as_array().unwrap().iter().filter(|slot| slot["is_processing"] == true).count()
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Times for a real model on a machine with something else to do.
fn patient() -> GatewayOptions {
    let (first_event, stall) = (Duration::from_secs(60), Duration::from_secs(20));
    let fence = FenceOptions { first_event, stall, ..options().fence };
    let hold = Duration::from_secs(60);
    GatewayOptions { fence, first_byte: first_event, stall, hold, ..options() }
}

fn start() -> (LlamaServer, Running) {
    let server = LlamaServer::start(free_port(), NAME, "EXRAIL_TEST_GENERATOR");
    let running = Running::over(vec![upstream("llama", &server.url(), None)], patient());
    running.prove();
    (server, running)
}

fn chat(prompt: &str, streams: bool, max_tokens: usize) -> Value {
    json!({
        "model": NAME,
        "messages": [{ "role": "user", "content": prompt }],
        "stream": streams,
        "max_tokens": max_tokens,
        "temperature": 0.0,
    })
}

/// Asked while it loads: the first request is held until the server has generated, and is answered.
fn first(running: &Running) -> Reply {
    let reply = ask(&running.url, &chat("Name a colour.", false, 8));
    assert!(reply.is_answer(), "{reply:?}");
    reply
}

#[test]
fn it_is_proved_while_it_loads_and_answers_as_without_the_gateway() {
    let (server, running) = start();
    first(&running);
    let proved = running.gateway.upstreams()[0].proved().unwrap();
    assert_eq!(proved.detected.kind.api().name, "llama-server", "{:?}", proved.detected);
    assert_eq!(proved.detected.models, [NAME]);
    assert_eq!(proved.json_schema.answer, Answer::Yes, "{:?}", proved.json_schema);
    assert!(proved.detected.version.is_some(), "{:?}", proved.detected);
    for streams in [false, true] {
        let body = chat("Name three animals.", streams, 24);
        let (direct, through) = (ask(&server.url(), &body), ask(&running.url, &body));
        assert!(through.is_answer(), "{through:?}");
        assert_eq!(through.content(), direct.content());
    }
    // Looked at again and again, it stays the same.
    std::thread::sleep(Duration::from_secs(2));
    assert!(running.records("guard.fire").is_empty(), "{:?}", running.records("guard.fire"));
}

#[test]
fn its_table_is_what_it_does() {
    let (server, running) = start();
    first(&running);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = Client::new(&server.url(), None).unwrap();
    let found = runtime.block_on(exrail_gateway::probe(&client, None)).unwrap();
    for ability in [
        Ability::Generates,
        Ability::Usage,
        Ability::Streams,
        Ability::StreamUsage,
        Ability::Seed,
        Ability::JsonSchema,
        Ability::JsonObject,
        Ability::Logprobs,
        Ability::Tokenize,
    ] {
        assert_eq!(found.answer(ability), Answer::Yes, "{ability:?}: {}", found.render());
    }
    assert_eq!(found.tok_fp.map(|it| it.len()), Some(64));
}

#[test]
fn a_schema_holds_and_a_cut_object_is_none() {
    let (_server, running) = start();
    first(&running);
    let schema = json!({ "type": "object", "properties": { "colour": { "enum": ["red", "blue"] } },
                         "required": ["colour"], "additionalProperties": false });
    for streams in [false, true] {
        let mut body = chat("Tell me about the sea.", streams, 64);
        body["response_format"] =
            json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema } });
        let reply = ask(&running.url, &body);
        let value: Value = serde_json::from_str(&reply.content()).unwrap();
        assert!(value["colour"].is_string(), "{reply:?}");
        body["max_tokens"] = json!(3);
        let reply = ask(&running.url, &body);
        assert_eq!(reply.code().as_deref(), Some("schema_violation"), "{reply:?}");
        assert_eq!((reply.content().as_str(), reply.is_done()), ("", false));
    }
}

#[test]
fn a_client_that_leaves_frees_its_slot() {
    let (server, running) = start();
    first(&running);
    leave_early(&running.url, &chat("Write a very long story about a fox.", true, 4000));
    until("a free slot", || server.busy() == 0);
}

#[test]
fn killed_in_a_stream_it_is_told_and_proves_itself_anew_or_as_another_model() {
    let (mut server, running) = start();
    first(&running);
    let port = server.port;
    let reply = std::thread::scope(|scope| {
        let body = chat("Write a very long story about a fox.", true, 4000);
        let url = running.url.clone();
        let asked = scope.spawn(move || ask(&url, &body));
        until("the generation", || server.busy() > 0);
        server.process.kill().unwrap();
        server.process.wait().unwrap();
        asked.join().unwrap()
    });
    assert_eq!((reply.code().as_deref(), reply.is_done()), (Some("upstream_cut"), false));
    until("a closed fence", || running.gateway.upstreams()[0].proved().is_none());
    let _again = LlamaServer::start(port, NAME, "EXRAIL_TEST_GENERATOR");
    first(&running);
    drop(_again);
    until("a closed fence", || running.gateway.upstreams()[0].proved().is_none());
    // The same name over other weights.
    let _other = LlamaServer::start(port, NAME, "EXRAIL_TEST_GEMMA");
    first(&running);
    let changed = |it: &Value| it["guard"] == "upstream_changed";
    assert!(
        running.records("guard.fire").iter().any(changed),
        "{:?}",
        running.records("guard.fire")
    );
    let pins: Vec<Value> =
        running.records("relay.run").iter().map(|it| it["pins"]["model_fp"].clone()).collect();
    assert_ne!(pins.first(), pins.last());
}

#[test]
fn faults_in_front_of_it_are_named() {
    let server = LlamaServer::start(free_port(), NAME, "EXRAIL_TEST_GENERATOR");
    let proxy = FaultProxy::start(&server.url()).unwrap();
    let running = Running::over(vec![upstream("llama", &proxy.url(), None)], patient());
    running.prove();
    first(&running);
    for (fault, streams, code) in [
        (ProxyFault::EmptyBody, false, "upstream_empty"),
        (ProxyFault::HalfJson, false, "upstream_not_json"),
        (ProxyFault::CutStream { events: 3 }, true, "upstream_cut"),
        (ProxyFault::EndedEarly { events: 3 }, true, "upstream_cut"),
        (ProxyFault::Garbage, false, "upstream_garbled"),
        (ProxyFault::WrongModel("other".into()), false, "upstream_wrong_model"),
        (ProxyFault::IgnoresSchema, false, "schema_violation"),
    ] {
        let named = format!("{fault:?}");
        proxy.set(fault);
        let mut body = chat("Tell me about the sea.", streams, 48);
        if code == "schema_violation" {
            body["response_format"] = json!({ "type": "json_schema", "json_schema": { "name": "a",
                "schema": { "type": "object", "required": ["zq"], "additionalProperties": false,
                            "properties": { "zq": { "enum": [1, 2] } } } } });
        }
        let reply = ask(&running.url, &body);
        assert_eq!(reply.code().as_deref(), Some(code), "{named}: {reply:?}");
        assert!(!reply.is_done(), "{named}");
        proxy.set(ProxyFault::None);
        until(&named, || {
            let proved = running.gateway.upstreams()[0].proved();
            proved.is_some_and(|proved| proved.detected.models == [NAME])
        });
        assert!(ask(&running.url, &chat("Name a colour.", streams, 8)).is_answer(), "{named}");
    }
}
