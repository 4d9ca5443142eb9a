//! The gateway as people start it: two processes of this program, one in front of the other.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader, Read as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use exrail_testkit::{TinyLlama, tiny_llama};
use serde_json::{Value, json};

/// Ends with the test.
struct Server {
    process: Child,
    url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

fn exrail(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exrail"));
    command.env("EXRAIL_HOME", home).env("EXRAIL_OFFLINE", "true");
    command
}

/// Starts a server and waits for its event.
fn start(command: &mut Command, event: &str) -> Server {
    let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(process.stdout.take().unwrap());
    let mut server = Server { process, url: String::new() };
    loop {
        let mut line = String::new();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "expected a server, it ended");
        let told: Value = serde_json::from_str(&line).unwrap();
        if told["event"] == event {
            server.url = told["url"].as_str().unwrap().to_owned();
            return server;
        }
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build().new_agent()
}

fn post(url: &str, body: &Value) -> (u16, String) {
    let mut answer = agent().post(format!("{url}/v1/chat/completions")).send_json(body).unwrap();
    let mut text = String::new();
    answer.body_mut().as_reader().read_to_string(&mut text).unwrap();
    (answer.status().as_u16(), text)
}

fn serve(home: &Path, port: &str) -> Server {
    let model = home.join("tiny.gguf");
    let mut serve = exrail(home);
    serve.args(["serve", "--no-encoder", "--json", "--port", port, "--model"]).arg(&model);
    start(&mut serve, "ready")
}

fn gateway(home: &Path, upstream: &str, more: &[&str], event: &str) -> Server {
    let mut gateway = exrail(home);
    gateway.args(["gateway", "--json", "--port", "0", "--look-s", "1", "--hold-s", "1"]);
    start(gateway.args(["--upstream", upstream]).args(more), event)
}

fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("tiny.gguf"), tiny_llama(1, TinyLlama::default())).unwrap();
    home
}

fn chat(max_tokens: usize) -> Value {
    let messages = json!([{ "role": "user", "content": "hello" }]);
    json!({ "model": "tiny", "messages": messages, "max_tokens": max_tokens, "temperature": 0 })
}

#[test]
fn an_answer_through_the_gateway_is_the_servers_and_on_record() {
    let home = home();
    let server = serve(home.path(), "0");
    let gateway = gateway(home.path(), &format!("own={}", server.url), &[], "ready");
    let content = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap();
        value["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let (status, direct) = post(&server.url, &chat(6));
    assert_eq!(status, 200, "{direct}");
    let (status, through) = post(&gateway.url, &chat(6));
    assert_eq!(status, 200, "{through}");
    assert_eq!(content(&through), content(&direct));
    let mut streamed = chat(6);
    streamed["stream"] = json!(true);
    let (status, events) = post(&gateway.url, &streamed);
    assert!(status == 200 && events.ends_with("data: [DONE]\n\n"), "{events}");

    let log = home.path().join("traces/gateway.jsonl");
    let text = std::fs::read_to_string(&log).unwrap();
    let records: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records.len(), 2, "{text}");
    assert!(records.iter().all(|it| it["event"] == "relay.run" && it["upstream"] == "own"));
    assert_eq!(records[0]["answer_sha256"], records[1]["answer_sha256"]);
    let checked = exrail(home.path()).args(["trace", "verify"]).arg(&log).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

#[test]
fn a_server_that_went_is_told_and_one_that_came_back_proves_itself() {
    let home = home();
    let server = serve(home.path(), "0");
    let port = server.url.rsplit(':').next().unwrap().to_owned();
    let gateway = gateway(home.path(), &server.url, &[], "ready");
    assert_eq!(post(&gateway.url, &chat(4)).0, 200);
    drop(server);
    let (status, told) = post(&gateway.url, &chat(4));
    assert!([502, 503].contains(&status), "{status} {told}");
    let (status, told) = post(&gateway.url, &chat(4));
    assert_eq!(status, 503, "{told}");
    assert!(
        told.contains("\"code\":\"not_ready\"") && told.contains("upstream_unreachable"),
        "{told}"
    );
    let _server = serve(home.path(), &port);
    let began = Instant::now();
    while post(&gateway.url, &chat(4)).0 != 200 {
        assert!(began.elapsed() < Duration::from_secs(30), "expected the fence to open again");
    }
}

#[test]
fn a_table_of_what_a_server_can_do_is_printed() {
    let home = home();
    let server = serve(home.path(), "0");
    let mut probe = exrail(home.path());
    probe.args(["gateway", "--probe", "--json", "--upstream", &server.url]);
    let printed = probe.output().unwrap();
    assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    let told: Value = serde_json::from_slice(&printed.stdout).unwrap();
    let found = &told["upstreams"][0]["found"];
    assert_eq!((&found["kind"], &found["model"]), (&json!("exrail"), &json!("tiny")), "{found}");
    assert_eq!(found["tok_fp"].as_str().map(str::len), Some(64), "{found}");
    let of = |name: &str| {
        let all = found["abilities"].as_array().unwrap();
        all.iter().find(|it| it["ability"] == name).unwrap()["answer"].clone()
    };
    for name in ["generates", "usage", "streams", "stream_usage", "seed", "json_schema", "tokenize"]
    {
        assert_eq!(of(name), "yes", "{name}: {found}");
    }
    let nobody = exrail(home.path())
        .args(["gateway", "--probe", "--upstream", "http://127.0.0.1:1"])
        .output()
        .unwrap();
    assert!(!nobody.status.success());
    assert!(String::from_utf8_lossy(&nobody.stdout).contains("upstream_unreachable"));
}
