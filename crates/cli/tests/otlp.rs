//! Spans of a server that runs: by options, by the variables of OpenTelemetry, and without a collector.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
};

use exrail_testkit::{TinyLlama, tiny_llama};
use serde_json::{Value, json};

const SECRET: &str = "hunter2-of-the-collector";

/// A server that ends with the test.
struct Server {
    process: Child,
    url: String,
    /// So that it has somewhere to write to until its end.
    _output: BufReader<std::process::ChildStdout>,
}

fn serve(home: &Path) -> Command {
    let model = home.join("tiny.gguf");
    std::fs::write(&model, tiny_llama(1, TinyLlama::default())).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_exrail"));
    command.args(["serve", "--no-encoder", "--port", "0", "--json", "--kv-pages", "8", "--model"]);
    command.arg(&model).env("EXRAIL_HOME", home);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("OTEL_")) {
        command.env_remove(name);
    }
    command
}

impl Server {
    fn start(home: &Path, command: &mut Command) -> Self {
        command.stdout(Stdio::piped()).stderr(std::fs::File::create(home.join("log")).unwrap());
        let mut process = command.spawn().unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let url = loop {
            let mut line = String::new();
            if output.read_line(&mut line).unwrap() == 0 {
                panic!("expected a server, it ended with {:?}", process.wait());
            }
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["event"] == "ready" {
                break event["url"].as_str().unwrap().to_owned();
            }
        };
        Self { process, url, _output: output }
    }

    fn complete(&self) -> u16 {
        let body = json!({"model": "tiny", "prompt": "Prompt of Wendeline", "max_tokens": 2});
        let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build();
        let answer = config.new_agent().post(format!("{}/v1/completions", self.url));
        answer.send_json(body).unwrap().status().as_u16()
    }

    fn names_of_threads(&self) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process.id())).unwrap();
        let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
        names.filter_map(Result::ok).map(|name| name.trim().to_owned()).collect()
    }

    /// Asks it to end, and waits for that.
    fn stop(mut self) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").arg(id).status().unwrap().success());
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// A collector that tells head and body of each request.
fn collector() -> (String, mpsc::Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (told, requests) = mpsc::channel();
    let take = move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                assert_ne!(reader.read_line(&mut head).unwrap(), 0);
            }
            let head = head.to_ascii_lowercase();
            let length = head.split("content-length:").nth(1).unwrap().lines().next().unwrap();
            let mut body = vec![0; length.trim().parse().unwrap()];
            reader.read_exact(&mut body).unwrap();
            let answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
            reader.get_mut().write_all(answer).unwrap();
            if told.send((head, body)).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().spawn(take).unwrap();
    (url, requests)
}

fn holds(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|window| window == word.as_bytes())
}

#[test]
fn a_server_that_ends_sends_its_last_spans_as_the_environment_says() {
    let home = tempfile::tempdir().unwrap();
    let (url, requests) = collector();
    let mut command = serve(home.path());
    command
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &url)
        .env("OTEL_EXPORTER_OTLP_HEADERS", format!("x-api-key={SECRET}"))
        .env("OTEL_SERVICE_NAME", "shop")
        .env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        .env("EXRAIL_LOG", "trace");
    let server = Server::start(home.path(), &mut command);
    assert_eq!(server.complete(), 200);
    server.stop();
    let (head, body) = requests.try_recv().unwrap();
    assert!(head.starts_with("post /v1/traces "), "{head}");
    assert!(head.contains(&format!("x-api-key: {SECRET}")), "{head}");
    for word in ["shop", "deployment.environment.name", "text_completion tiny", "gen_ai.usage"] {
        assert!(holds(&body, word), "{word}");
    }
    assert!(!holds(&body, "Wendeline"), "the prompt has left");
    let log = std::fs::read_to_string(home.path().join("log")).unwrap();
    assert!(!log.contains(SECRET), "{log}");
}

#[test]
fn with_the_option_the_prompt_leaves() {
    let home = tempfile::tempdir().unwrap();
    let (url, requests) = collector();
    let mut command = serve(home.path());
    // What is named on the command line wins.
    command.args(["--otlp-endpoint", &url, "--otlp-content"]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1");
    let server = Server::start(home.path(), &mut command);
    assert_eq!(server.complete(), 200);
    server.stop();
    assert!(holds(&requests.try_recv().unwrap().1, "Prompt of Wendeline"));
}

#[test]
fn without_a_collector_requests_are_answered_and_the_loss_is_told_once() {
    for protocol in ["http", "grpc"] {
        let home = tempfile::tempdir().unwrap();
        let mut command = serve(home.path());
        command.args(["--otlp-endpoint", "http://127.0.0.1:1", "--otlp-protocol", protocol]);
        let server = Server::start(home.path(), &mut command);
        assert!(server.names_of_threads().contains(&"exrail-spans".to_owned()));
        let metrics = || {
            let text = ureq::get(format!("{}/metrics", server.url)).call().unwrap();
            text.into_body().read_to_string().unwrap()
        };
        // Until two batches are lost, each of which could be told.
        let (mut n_asked, mut n_answered) = (0, 0);
        for at_least in [1, 2] {
            let lost = || {
                let text = metrics();
                let line = text.lines().find(|line| line.contains("reason=\"not_taken\""));
                line.unwrap().split(' ').nth(1).unwrap().parse::<u64>().unwrap()
            };
            let before = lost();
            n_asked += 1;
            n_answered += usize::from(server.complete() == 200);
            while lost() == before {
                thread::sleep(std::time::Duration::from_millis(50));
            }
            assert!(lost() >= 2 * at_least);
        }
        assert_eq!((n_asked, n_answered), (2, 2));
        server.stop();
        let log = std::fs::read_to_string(home.path().join("log")).unwrap();
        assert_eq!(log.matches("spans were not taken").count(), 1, "{log}");
    }
}

#[test]
fn without_an_endpoint_nothing_is_started_and_what_is_not_honoured_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(home.path(), &mut serve(home.path()));
    assert!(!server.names_of_threads().contains(&"exrail-spans".to_owned()));
    server.stop();
    let refused = |arguments: &[&str], variable: Option<(&str, &str)>| {
        let mut command = serve(home.path());
        command.args(arguments);
        command.envs(variable);
        let ended = command.output().unwrap();
        assert!(!ended.status.success(), "{arguments:?}");
        String::from_utf8(ended.stderr).unwrap()
    };
    assert!(refused(&["--otlp-content"], None).contains("--otlp-endpoint"));
    assert!(refused(&["--otlp-endpoint", "localhost:4318"], None).contains("http://HOST:PORT"));
    let compressed = Some(("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"));
    let told = refused(&["--otlp-endpoint", "http://localhost:4318"], compressed);
    assert!(told.contains("OTEL_EXPORTER_OTLP_COMPRESSION"), "{told}");
}
