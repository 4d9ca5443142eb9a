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
    let mut declare = exrail(home.path());
    declare.args(["preflight", &at("tiny.gguf"), "--write", &at("manifest.json")]);
    assert!(declare.output().unwrap().status.success());
    let mut serve = exrail(home.path());
    serve.args(["serve", "--model", &at("tiny.gguf"), "--collection", "pages", "--port", "0"]);
    serve.args(["--manifest", &at("manifest.json")]);
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
    assert_eq!(report["manifest"]["status"], "ok", "{}", report["manifest"]);
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

/// So many questions about so many facts, and their document.
fn facts(n: usize) -> (String, String) {
    let fact = |at: usize| format!("The gamma{at} of alpha{at} is {} units.", 100 + at);
    let document = (0..n).map(|at| format!("# Part {at}\n\n{}\n\n", fact(at))).collect();
    let item = |at: usize| {
        json!({
            "id": format!("a{at}"),
            "kind": "answerable",
            "question": format!("What is the gamma{at} of alpha{at}?"),
            "paraphrases": [
                format!("Which gamma{at} has alpha{at}?"),
                format!("How large is the gamma{at} of alpha{at}?"),
                format!("Tell me the gamma{at} of alpha{at}."),
            ],
            "answers": [format!("{} units", 100 + at)],
            "evidence": [{ "doc": "facts.md", "quote": fact(at) }],
        })
    };
    let gold = (0..n).map(|at| item(at).to_string() + "\n").collect();
    (document, gold)
}

#[test]
fn a_deep_diagnosis_writes_at_length_in_every_width() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    tiny_bert(1, Path::new(&at("encoder"))).unwrap();
    let long = TinyLlama { context_len: 4096, ..TinyLlama::default() };
    std::fs::write(at("tiny.gguf"), tiny_llama(1, long)).unwrap();
    let (document, gold) = facts(50);
    std::fs::write(at("facts.md"), document).unwrap();
    std::fs::write(at("gold.jsonl"), gold).unwrap();
    let with = ["--encoder", &at("encoder"), "--collection", "facts", "--json"];
    let ingested = exrail(home.path()).args(["ingest", &at("facts.md")]).args(with).output();
    assert!(ingested.unwrap().status.success());
    let mut deep = exrail(home.path());
    deep.args(["diagnose", &at("tiny.gguf"), "--deep", "--gold", &at("gold.jsonl")]).args(with);
    deep.args(["--answered", "1", "--unanswerable", "1", "--lambda", "1"]);
    deep.args(["--cache-tokens", "2048", "--quant-tokens", "512"]);
    let diagnosed = deep.args(["--observations", &at("seen.jsonl")]).output().unwrap();
    let told = String::from_utf8_lossy(&diagnosed.stderr);
    let report: Value =
        serde_json::from_slice(&diagnosed.stdout).unwrap_or_else(|_| panic!("{told}"));
    let trend = &report["e_resonance"];
    assert_eq!((&trend["status"], &trend["replies"]), (&json!("ok"), &json!(20)), "{trend}");
    assert!(trend["windows"].as_u64().unwrap() >= 1000, "{trend}");
    assert!(trend["trend"].is_string() && trend["slope_per_1k"].is_number(), "{trend}");
    for (section, status) in [("int8", "ok"), ("int4", "ok"), ("as_served", "ok")] {
        assert_eq!(report["quantisation"][section]["status"], status, "{told}");
    }
    let of = |section: &str| report["quantisation"][section]["e_res"]["prompts"].clone();
    assert_eq!([of("int8"), of("int4"), of("int4_vs_int8")], [50, 50, 50].map(Value::from));
    assert_eq!(of("as_served"), Value::Null, "it is what the others are compared with");
    let seen = std::fs::read_to_string(at("seen.jsonl")).unwrap();
    let count = |kind: &str| seen.matches(&format!(r#""kind":"{kind}""#)).count();
    assert_eq!((count("trend"), count("reply")), (20, 150));
}
