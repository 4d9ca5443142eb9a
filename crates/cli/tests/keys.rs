//! API keys of a running server: from a file that changes, from the environment, and nowhere in what it says.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use exrail_testkit::{TinyLlama, tiny_llama};
use serde_json::Value;

const FIRST: &str = "first-key-0123456789";
const SECOND: &str = "second-key-0123456789";
const ADMIN: &str = "admin-key-0123456789";
const LISTED: &str = "listed-key-0123456789";

/// A server that ends with the test.
struct Server {
    process: Child,
    url: String,
    agent: ureq::Agent,
    output: BufReader<ChildStdout>,
}

impl Server {
    fn start(home: &Path, keys: &Path) -> Self {
        let model = home.join("tiny.gguf");
        std::fs::write(&model, tiny_llama(1, TinyLlama::default())).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_exrail"));
        command.args([
            "serve",
            "--no-encoder",
            "--port",
            "0",
            "--json",
            "--kv-pages",
            "8",
            "--model",
        ]);
        command.arg(&model).arg("--api-key-file").arg(keys);
        command.env("EXRAIL_HOME", home).env("EXRAIL_API_KEYS", LISTED).env("EXRAIL_LOG", "trace");
        command.stdout(Stdio::piped()).stderr(std::fs::File::create(home.join("log")).unwrap());
        let mut process = command.spawn().unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let url = loop {
            let mut line = String::new();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "the server has ended");
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["event"] == "ready" {
                break event["url"].as_str().unwrap().to_owned();
            }
        };
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        Self { process, url, agent: config.new_agent(), output }
    }

    fn status(&self, path: &str, key: &str) -> u16 {
        let request = self.agent.get(format!("{}{path}", self.url));
        request.header("authorization", format!("Bearer {key}")).call().unwrap().status().as_u16()
    }

    /// Waits until a key gets this status.
    fn until(&self, key: &str, status: u16) {
        let since = Instant::now();
        while self.status("/v1/models", key) != status {
            assert!(since.elapsed() < Duration::from_secs(60), "{key} is not answered {status}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Field fault L5: only the last of several keys worked, and a changed file needed a restart.
#[test]
fn l5_keys_are_read_again_while_the_server_runs_and_never_logged() {
    let home = tempfile::tempdir().unwrap();
    let keys = home.path().join("keys");
    std::fs::write(&keys, format!("# people\n{FIRST}\n{ADMIN} admin\n")).unwrap();
    let mut server = Server::start(home.path(), &keys);
    for key in [FIRST, ADMIN, LISTED] {
        assert_eq!(server.status("/v1/models", key), 200, "{key}");
    }
    let config = |key| server.status("/v1/exrail/config", key);
    assert_eq!([config(FIRST), config(LISTED), config(ADMIN)], [403, 403, 200]);
    assert_eq!(server.status("/v1/models", SECOND), 401);

    std::fs::write(&keys, format!("{SECOND}\n")).unwrap();
    server.until(SECOND, 200);
    assert_eq!(server.status("/v1/models", FIRST), 401);
    assert_eq!(server.status("/v1/models", LISTED), 200, "that of the environment stays");

    // A file that is none leaves the keys as they were.
    for broken in ["", "# nobody\n", "short\n", "second-key-0123456789 root\n"] {
        std::fs::write(&keys, broken).unwrap();
        std::thread::sleep(Duration::from_millis(2_500));
        assert_eq!(server.status("/v1/models", SECOND), 200, "{broken:?}");
    }

    // At once, when it is told to.
    std::fs::write(&keys, format!("{FIRST} user\n")).unwrap();
    let pid = server.process.id().to_string();
    assert!(Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
    server.until(FIRST, 200);

    server.process.kill().unwrap();
    let mut said = std::fs::read_to_string(home.path().join("log")).unwrap();
    assert!(said.contains("API keys were read again"), "{said}");
    assert!(said.contains("API keys stay as they were"), "{said}");
    server.output.read_to_string(&mut said).unwrap();
    for key in [FIRST, SECOND, ADMIN, LISTED] {
        assert!(!said.contains(key), "a key is in what the server says");
    }
}
