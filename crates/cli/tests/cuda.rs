//! The server on a GPU: behind its warm-up fence the device builds nothing more, whatever users ask for. A
//! missing device or file is a failure.

#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;

use serde_json::{Value, json};

/// A server that ends with the test.
struct Server {
    process: Child,
    url: String,
    model: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

impl Server {
    /// On the first GPU, ready.
    fn start(home: &std::path::Path, options: &[&str]) -> Server {
        let model = std::env::var("EXRAIL_TEST_GENERATOR").expect("EXRAIL_TEST_GENERATOR is set");
        let mut process = Command::new(env!("CARGO_BIN_EXE_exrail"))
            .args(["serve", "--model", &model, "--device", "cuda:0", "--port", "0", "--no-encoder"])
            .arg("--json")
            .args(options)
            .env("EXRAIL_HOME", home)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let events = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let ready = events.into_iter().find(|event| event["event"] == "ready");
        let url = ready.expect("it gets ready")["url"].as_str().unwrap().to_owned();
        let mut models = ureq::get(&format!("{url}/v1/models")).call().unwrap();
        let models: Value = models.body_mut().read_json().unwrap();
        let model = models["data"][0]["id"].as_str().unwrap().to_owned();
        Server { process, url, model }
    }

    /// Prompt and answer in tokens.
    fn complete(&self, n_words: usize, beside: &Value) -> (u64, u64) {
        let prompt = "one ".repeat(n_words);
        let mut body = json!({ "model": self.model, "prompt": prompt, "max_tokens": 24 });
        body.as_object_mut().unwrap().extend(beside.as_object().unwrap().clone());
        let url = format!("{}/v1/completions", self.url);
        let mut response = ureq::post(&url).send_json(&body).unwrap();
        let answer: Value = response.body_mut().read_json().unwrap();
        let count = |of: &str| answer["usage"][of].as_u64().unwrap();
        (count("prompt_tokens"), count("completion_tokens"))
    }

    /// What grew behind the fence, a line each.
    fn grown(&self) -> Vec<String> {
        let url = format!("{}/metrics", self.url);
        let text = ureq::get(&url).call().unwrap().body_mut().read_to_string().unwrap();
        let lines: Vec<&str> =
            text.lines().filter(|line| line.starts_with("exrail_built_after_fence{")).collect();
        assert_eq!(lines.len(), 5, "{lines:?}");
        lines.into_iter().filter(|line| !line.ends_with(" 0")).map(str::to_owned).collect()
    }
}

/// G-05, row A2: prompts, contexts, numbers of sequences and ways to sample that nobody warmed.
#[test]
fn whatever_users_ask_for_the_device_builds_nothing_behind_the_fence() {
    // Rows of a prompt attend in other kernels with each of these.
    for options in [&[][..], &["--batch-invariant"], &["--kv", "int8"], &["--kv", "f32"]] {
        let home = tempfile::tempdir().unwrap();
        let server = Server::start(home.path(), options);
        ask_for_much(&server);
        assert_eq!(server.grown(), Vec::<String>::new(), "{options:?}");
    }
}

fn ask_for_much(server: &Server) {
    let greedy = json!({ "temperature": 0 });
    let ways = [
        greedy.clone(),
        json!({ "temperature": 0.8, "top_p": 0.9 }),
        json!({ "logprobs": 2 }),
        json!({ "frequency_penalty": 0.5 }),
    ];
    for n_words in [3, 37, 300, 1500, 5000] {
        for beside in &ways {
            let (prompt, answer) = server.complete(n_words, beside);
            assert!(prompt >= n_words as u64 && answer > 0, "{n_words}: {prompt}, {answer}");
        }
    }
    for n_together in [2, 5, 11, 24] {
        thread::scope(|scope| {
            for i in 0..n_together {
                let (server, greedy) = (&server, &greedy);
                scope.spawn(move || server.complete(20 + 40 * i, greedy));
            }
        });
    }
}
