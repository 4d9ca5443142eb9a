//! Whole runs of the binary on the default models.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use exrail_testkit::{TinyLlama, tiny_llama};
use serde_json::{Value, json};

fn model(variable: &str) -> String {
    std::env::var(variable).expect("run through make test")
}

fn exrail(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_exrail"))
        .args(arguments)
        .env("EXRAIL_HOME", home)
        .env("EXRAIL_ENCODER", model("EXRAIL_TEST_ENCODER"))
        .env("EXRAIL_MODEL", model("EXRAIL_TEST_GENERATOR"))
        .env("EXRAIL_OFFLINE", "true")
        .output()
        .unwrap()
}

fn lines(output: &Output) -> Vec<String> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn last_json(output: &Output) -> Value {
    serde_json::from_str(lines(output).last().unwrap()).unwrap()
}

fn pack() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packs/stability")
}

#[test]
fn ingest_ask_and_verify_work_on_the_sample_pack() {
    let home = tempfile::tempdir().unwrap();
    let docs = pack().join("docs");
    let ingest = ["ingest", docs.to_str().unwrap(), "--collection", "pages", "--json"];
    let output = exrail(home.path(), &ingest);
    assert!(output.status.success(), "{output:?}");
    let first = last_json(&output);
    assert!(first["documents"].as_u64().unwrap() >= 25, "{first}");
    let again = last_json(&exrail(home.path(), &ingest));
    assert_eq!(again["embedded"], 0, "unchanged documents are passed over");
    assert_eq!(again["index_hash"], first["index_hash"]);

    let question = "How many tokens does one page of the KV cache hold?";
    let ask = ["ask", question, "--collection", "pages", "--json"];
    let answer = last_json(&exrail(home.path(), &ask));
    assert_eq!(answer["gate"]["status"], "not_calibrated");
    let texts = answer["retrieved"].to_string();
    assert!(texts.contains("256 tokens"), "{texts}");
    assert!(answer["steps"].is_null(), "{answer}");
    // Whatever a small model makes of it: a sentence without a source is not a part of it (G-20).
    let stepwise = last_json(&exrail(home.path(), &[&ask[..], &["--steps", "3"][..]].concat()));
    let steps = stepwise["steps"].as_array().unwrap();
    let good: Vec<&Value> = steps.iter().filter(|step| step["state"] == "good").collect();
    assert!(good.len() <= 3, "{stepwise}");
    assert!(good.iter().all(|step| step["citations"][0].is_string()), "{stepwise}");
    if stepwise["refusal"] == false {
        let claims: Vec<&str> = good.iter().map(|step| step["claim"].as_str().unwrap()).collect();
        assert_eq!(stepwise["answer"], claims.join(" "));
    }

    let gold = pack().join("gold.jsonl");
    let verify = [
        "verify",
        "--gold",
        gold.to_str().unwrap(),
        "--collection",
        "pages",
        "--answered",
        "2",
        "--unanswerable",
        "1",
        "--lambda",
        "0",
        "--json",
    ];
    let output = exrail(home.path(), &verify);
    let report = last_json(&output);
    // The default models cannot pass: two answers are too few to.
    assert_eq!(output.status.code(), Some(3), "{report}");
    assert_eq!(report["pins"]["index_hash"], first["index_hash"]);
    assert_ne!(report["verdict"], "pass");
    for section in ["quantisation", "cache"] {
        assert_eq!(report[section]["status"], "not_available", "{section}");
    }
    // Now there is a scale, and the gate uses it.
    let answer = last_json(&exrail(home.path(), &ask));
    assert_ne!(answer["gate"]["status"], "not_calibrated");
    let off_topic = ["ask", "How long should I boil an egg?", "--collection", "pages", "--json"];
    assert_eq!(last_json(&exrail(home.path(), &off_topic))["answer"], "not in context");
    let signals = ["qe", "lexical", "joint"].map(|name| report["calibration"][name].is_object());
    assert_eq!(signals, [true; 3], "{report}");
    let gold = gold.to_str().unwrap();
    let check = ["calibrate", "--check", "--gold", gold, "--collection", "pages", "--json"];
    let output = exrail(home.path(), &check);
    assert_eq!((output.status.code(), &last_json(&output)["status"]), (Some(0), &"valid".into()));
    let more = home.path().join("more.md");
    std::fs::write(&more, "# More\n\nA page that was not there.\n").unwrap();
    let ingest = ["ingest", more.to_str().unwrap(), "--collection", "pages"];
    assert!(exrail(home.path(), &ingest).status.success());
    let output = exrail(home.path(), &check);
    let said = last_json(&output);
    assert_eq!((output.status.code(), &said["status"]), (Some(3), &"void".into()), "{said}");
    assert!(said["reason"].as_str().unwrap().contains("`index_hash`"), "{said}");
}

/// The real encoder, and a generator of random weights: what it says means nothing, but how it is compared does.
#[test]
fn modes_are_asked_over_the_same_evidence_and_compared() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("model.gguf");
    let size = TinyLlama { context_len: 8192, ..TinyLlama::default() };
    std::fs::write(&model, tiny_llama(1, size)).unwrap();
    let page = home.path().join("page.md");
    let facts = ["A page of the cache holds 256 tokens.", "The queue holds 128 requests."];
    std::fs::write(&page, format!("# Sizes\n\n{}\n\n# Limits\n\n{}\n", facts[0], facts[1]))
        .unwrap();
    let ingest = ["ingest", page.to_str().unwrap(), "--collection", "sizes"];
    assert!(exrail(home.path(), &ingest).status.success());
    let gold = home.path().join("gold.jsonl");
    let item = |(at, fact): (usize, &&str)| {
        let what = ["a page of the cache hold", "the queue hold"][at];
        let wordings =
            ["size", "amount", "number"].map(|word| format!("Which {word} does {what}?"));
        let item = json!({
            "id": format!("q{at}"),
            "kind": "answerable",
            "question": format!("How much does {what}?"),
            "paraphrases": wordings,
            "answers": [fact],
            "evidence": [{ "doc": "page.md", "quote": fact }],
        });
        format!("{item}\n")
    };
    let lines: String = facts.iter().enumerate().map(item).collect();
    std::fs::write(&gold, lines).unwrap();
    let probe = |more: &[&str]| {
        let (model, gold) = (model.to_str().unwrap(), gold.to_str().unwrap());
        let arguments =
            ["probe", "lambda", "--model", model, "--gold", gold, "--collection", "sizes"];
        exrail(home.path(), &[&arguments[..], &["--device", "cpu"], more].concat())
    };

    let output = probe(&["--json"]);
    // Two items are too few for a pass.
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let found = last_json(&output);
    let report = &found["lambda"];
    assert_eq!((&report["n_items"], &report["n_seeds"]), (&json!(2), &json!(2)));
    assert_eq!(report["retrieval"]["bit_equal"], true, "{report}");
    assert_eq!(report["retrieval"]["n_queries"], 8);
    let pairs: Vec<Value> = report["comparisons"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| json!([pair["mode"], pair["reference"]]))
        .collect();
    let expected = [["int8", "as_served"], ["int4", "as_served"], ["int4", "int8"]];
    assert_eq!(json!(pairs), json!(expected));
    for item in report["items"].as_array().unwrap() {
        for mode in ["as_served", "int8", "int4"] {
            let runs = item["modes"][mode]["frozen"]["runs"].as_array().unwrap();
            assert_eq!(runs.len(), 6, "{item}");
        }
        assert!(item["modes"]["as_served"]["live"]["runs"].is_array(), "{item}");
        assert!(item["modes"]["int8"]["live"].is_null(), "{item}");
    }
    assert_ne!(report["verdict"], "pass");
    // Three modes, 6 frozen runs of 2 items and 2 single answers each, and 12 live runs.
    assert_eq!(found["planned"]["generations"], 3 * 14 + 12);
    assert_eq!(report["cost"]["generations"], 3 * 14 + 12);

    let shown = lines_of(&probe(&["--modes", "as-served,int8", "--items", "1"]));
    assert!(shown.contains("equal to the bit") && shown.contains("int8_vs_as_served"), "{shown}");
    assert!(!shown.contains("int4"), "{shown}");
    let none = probe(&["--items", "0"]);
    let said = String::from_utf8(none.stderr.clone()).unwrap();
    assert!(none.status.code() == Some(1) && said.contains("`items`"), "{said}");
}

fn lines_of(output: &Output) -> String {
    lines(output).join("\n")
}

#[test]
fn the_demo_completes_and_its_last_line_is_the_verdict() {
    let home = tempfile::tempdir().unwrap();
    let output = exrail(
        home.path(),
        &["demo", "--port", "0", "--answered", "1", "--unanswerable", "1", "--lambda", "0"],
    );
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let lines = lines(&output);
    assert!(lines.last().unwrap().starts_with("verdict: "), "{lines:?}");
    let traces = std::fs::read_to_string(home.path().join("traces/trace.jsonl")).unwrap();
    let events: Vec<Value> =
        traces.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let count = |event| events.iter().filter(|line| line["event"] == event).count();
    assert_eq!(count("answer.decide"), 4);
    assert_eq!(count("probe.run"), 1);
}

#[test]
fn embeddings_of_near_texts_are_near() {
    let home = tempfile::tempdir().unwrap();
    let output = exrail(home.path(), &["embed", "a cat", "a kitten", "a stock exchange", "--json"]);
    let cosines: Vec<f64> = lines(&output)
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["cosine"].as_f64().unwrap())
        .collect();
    assert!(cosines[1] > cosines[2] + 0.3, "{cosines:?}");
}

#[test]
fn a_bench_of_the_default_model_is_within_what_a_machine_can_do() {
    let home = tempfile::tempdir().unwrap();
    let output = exrail(
        home.path(),
        &[
            "bench",
            &model("EXRAIL_TEST_GENERATOR"),
            "--prompt",
            "64",
            "--gen",
            "8",
            "--depth",
            "0,300",
            "--batch",
            "1,2",
            "--repeat",
            "1",
            "--json",
        ],
    );
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let json = last_json(&output);
    let measured = &json["models"][0];
    assert_eq!(measured["quant"], "Q4_1");
    assert_eq!(measured["weight_bytes"], 96_576_768);
    let number = |value: &Value| value.as_f64().unwrap();
    for test in measured["decode"].as_array().unwrap() {
        // No machine streams a terabyte a second into two threads.
        assert!((1e6..1e12).contains(&number(&test["bytes_per_s"])), "{test}");
    }
    // Keys and values of 30 layers, 3 heads of 64 channels, in f16.
    let mut decode = measured["decode"].as_array().unwrap().iter();
    let deep = decode.find(|test| test["depth"] == 300 && test["batch"] == 1).unwrap();
    assert_eq!(number(&deep["kv_step_bytes"]), (300.0 + 4.5) * 30.0 * 2.0 * 3.0 * 64.0 * 2.0);
    let memory = &measured["memory"];
    let resident = number(&memory["resident"]["now"]);
    assert!(resident > number(&memory["weight_bytes"]), "the weights are in memory: {memory}");
    assert!(number(&memory["resident"]["peak"]) >= resident, "{memory}");
    // What a load leaves free is given back to the system.
    let needed = number(&memory["weight_bytes"]) + number(&memory["kv_bytes"]);
    let share = number(&memory["resident"]["anonymous"]) / needed;
    assert!((0.9..1.1).contains(&share), "{share}: {memory}");
}
