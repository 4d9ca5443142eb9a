//! A server that measures itself.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use exrail_testkit::{TinyLlama, tiny_bert, tiny_llama};
use serde_json::{Value, json};

/// Ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn start(command: &mut Command) -> (Server, String) {
    let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(process.stdout.take().unwrap());
    let server = Server(process);
    loop {
        let mut line = String::new();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "expected a server, it ended");
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == "ready" {
            return (server, event["url"].as_str().unwrap().to_owned());
        }
    }
}

fn exrail(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exrail"));
    command.env("EXRAIL_HOME", home).env("EXRAIL_OFFLINE", "true");
    command
}

#[test]
fn what_is_served_is_diagnosed_beside_its_users() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    tiny_bert(1, Path::new(&at("encoder"))).unwrap();
    std::fs::write(at("tiny.gguf"), tiny_llama(1, TinyLlama::default())).unwrap();
    std::fs::write(at("a.md"), "# Pages\n\nA page holds 256 tokens of the cache.\n").unwrap();
    let with = ["--encoder", &at("encoder"), "--json"];
    let mut ingest = exrail(home.path());
    ingest.args(["ingest", &at("a.md"), "--collection", "pages"]).args(with);
    assert!(ingest.output().unwrap().status.success());
    let mut serve = exrail(home.path());
    serve.args(["serve", "--model", &at("tiny.gguf"), "--collection", "pages", "--port", "0"]);
    let (_server, url) = start(serve.args(with));

    let gold = r#"{"id":"a","kind":"answerable","question":"How many tokens does a page hold?","paraphrases":["a page?","tokens of a page?","size of a page?"],"answers":["256"],"evidence":[{"doc":"a.md","quote":"256 tokens"}]}"#;
    let agent = ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build();
    let agent = agent.new_agent();
    let ask = |body: &Value| {
        let mut answer = agent.post(format!("{url}/v1/diagnostics")).send_json(body).unwrap();
        let told: Value = answer.body_mut().read_json().unwrap();
        (answer.status().as_u16(), told)
    };
    let (status, report) = ask(&json!({ "gold": gold, "question": "What is a page?" }));
    assert_eq!(status, 200, "{report}");
    assert_eq!(report["sample"]["n_answerable"], 1, "{}", report["sample"]);
    assert_eq!(report["question"]["status"], "ok");
    assert_eq!(report["boot"]["status"], "ok");
    assert!(report["boot"]["ready_s"].as_f64().unwrap() > 0.0, "{}", report["boot"]);
    assert_eq!(report["quantisation"]["status"], "not_available");
    assert_eq!(report["verdict"], "fail", "a model of random weights");
    assert!(report["fix"]["page"].is_string(), "{}", report["fix"]);

    let wrong = gold.replace("256 tokens\"}", "nowhere\"}");
    for (body, field) in [
        (json!({ "gold": "no JSON" }), "gold"),
        (json!({ "gold": wrong }), "gold"),
        (json!({ "gold": gold, "cache_tokens": 12 }), "cache_tokens"),
        (json!({ "gold": gold, "question": " " }), "question"),
    ] {
        let (status, told) = ask(&body);
        assert_eq!((status, &told["error"]["param"]), (400, &json!(field)), "{told}");
    }
}
