//! A server of several generators as a whole: real files, real phases, one process.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader, Lines},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use exrail_testkit::{TinyLlama, tiny_llama};
use serde_json::{Value, json};

/// A server that ends with the test.
struct Server {
    process: Child,
    url: String,
    agent: ureq::Agent,
    /// Held, so that it can go on saying things.
    _output: Lines<BufReader<ChildStdout>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

impl Server {
    /// Ready with the generators of these files; the first one is loaded.
    fn start(home: &Path, files: &[&str], more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exrail"));
        command.args(["serve", "--no-encoder", "--port", "0", "--json", "--kv-pages", "8"]);
        command.args(["--model", files[0]]).args(more).env("EXRAIL_HOME", home);
        for file in &files[1..] {
            command.args(["--also", file]);
        }
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap()).lines();
        let url = loop {
            let event: Value = serde_json::from_str(&output.next().unwrap().unwrap()).unwrap();
            if event["event"] == "ready" {
                break event["url"].as_str().unwrap().to_owned();
            }
        };
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        Self { process, url, agent: config.new_agent(), _output: output }
    }

    fn get(&self, path: &str) -> Value {
        let mut response = self.agent.get(format!("{}{path}", self.url)).call().unwrap();
        response.body_mut().read_json().unwrap()
    }

    fn ask(&self, model: &str) -> (u16, Value) {
        let body = json!({"model": model, "prompt": "ab", "max_tokens": 4, "temperature": 0});
        let url = format!("{}/v1/completions", self.url);
        let mut response = self.agent.post(url).send_json(&body).unwrap();
        (response.status().as_u16(), response.body_mut().read_json().unwrap())
    }

    /// Each generator's state.
    fn states(&self) -> Vec<String> {
        let ready = self.get("/readyz");
        let models = ready["models"].as_array().unwrap();
        models.iter().map(|model| model["state"].as_str().unwrap().to_owned()).collect()
    }
}

/// Writes a file into the folder and returns its path.
fn write(home: &Path, name: &str, bytes: &[u8]) -> String {
    let path = home.join(name);
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn tiny(home: &Path, name: &str, seed: u64) -> String {
    write(home, name, &tiny_llama(seed, TinyLlama::default()))
}

#[test]
fn a_server_swaps_through_the_whole_boot_and_unloads_when_nobody_asks() {
    let home = tempfile::tempdir().unwrap();
    let files = [tiny(home.path(), "one.gguf", 1), tiny(home.path(), "two.gguf", 2)];
    let more = ["--idle-unload", "2", "--swap-turn-s", "0"];
    let server = Server::start(home.path(), &[&files[0], &files[1]], &more);
    let (status, first) = server.ask("one");
    assert_eq!((status, &first["model"]), (200, &json!("one")), "{first}");
    let (status, second) = server.ask("two");
    assert_eq!((status, &second["model"]), (200, &json!("two")), "{second}");
    assert_ne!(first["system_fingerprint"], second["system_fingerprint"]);
    assert_eq!(server.states(), ["unloaded", "loaded"]);
    let since = Instant::now();
    while server.states() != ["unloaded", "unloaded"] {
        assert!(since.elapsed() < Duration::from_secs(60), "{:?}", server.states());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(server.ask("one").1["choices"], first["choices"]);
    let log = std::fs::read_to_string(home.path().join("data/traces/trace.jsonl"));
    let log = log.or_else(|_| std::fs::read_to_string(home.path().join("traces/trace.jsonl")));
    let log = log.unwrap();
    for told in ["\"phase\":\"sentinel\"", "\"event\":\"model.unload\"", "\"reason\":\"idle\""] {
        assert!(log.contains(told), "{told} in {log}");
    }
}

/// What cannot be loaded is told before the loaded model is touched.
#[test]
fn a_model_that_cannot_be_loaded_leaves_the_loaded_one_where_it_is() {
    let home = tempfile::tempdir().unwrap();
    let one = tiny(home.path(), "one.gguf", 1);
    let wide = TinyLlama { width: 512, ffn_width: 4096, ..TinyLlama::default() };
    let large = write(home.path(), "large.gguf", &tiny_llama(2, wide));
    let whole = tiny_llama(3, TinyLlama::default());
    let cut = write(home.path(), "cut.gguf", &whole[..whole.len() / 2]);
    let server = Server::start(home.path(), &[&one, &large, &cut], &["--memory", "128MiB"]);
    for (model, told) in [("large", "exrail plan"), ("cut", "truncated")] {
        let (status, refused) = server.ask(model);
        assert_eq!(
            (status, &refused["error"]["code"]),
            (503, &json!("model_load_failed")),
            "{refused}"
        );
        assert!(refused["error"]["message"].as_str().unwrap().contains(told), "{refused}");
    }
    assert_eq!(server.states(), ["loaded", "failed", "failed"]);
    assert_eq!(server.ask("one").0, 200);
    let url = format!("{}/metrics", server.url);
    let metrics = server.agent.get(url).call().unwrap().body_mut().read_to_string().unwrap();
    for line in ["exrail_model_loads_total{model=\"one\"} 1\n", "exrail_model_swaps_total 0\n"] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

#[test]
fn generators_that_do_not_exist_or_share_a_name_are_refused_at_the_start() {
    let home = tempfile::tempdir().unwrap();
    let one = tiny(home.path(), "one.gguf", 1);
    let folder = home.path().join("more");
    std::fs::create_dir(&folder).unwrap();
    let twin = tiny(&folder, "one.gguf", 2);
    for (also, told) in
        [(twin.as_str(), "expected another name than `one`"), ("nowhere.gguf", "nowhere.gguf")]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exrail"));
        command.args(["serve", "--no-encoder", "--port", "0", "--model", &one, "--also", also]);
        let output = command.env("EXRAIL_HOME", home.path()).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains(told), "{message}");
    }
}
