//! `exrail bench` on tiny models: what it prints, and what it refuses.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use exrail_testkit::{TinyLlama, tiny_llama};
use serde_json::Value;

fn bench(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_exrail"))
        .arg("bench")
        .args(arguments)
        .env("EXRAIL_HOME", home)
        .env("EXRAIL_OFFLINE", "true")
        .output()
        .unwrap()
}

fn tiny(home: &Path, name: &str, context_len: usize) -> PathBuf {
    let file = home.join(name);
    std::fs::write(&file, tiny_llama(1, TinyLlama { context_len, ..TinyLlama::default() }))
        .unwrap();
    file
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Median, range and samples that fit each other.
fn check_spread(spread: &Value, n: usize) {
    let number = |key: &str| spread[key].as_f64().unwrap();
    assert_eq!(spread["samples"].as_array().unwrap().len(), n, "{spread}");
    assert!(0.0 < number("min") && number("min") <= number("median"), "{spread}");
    assert!(number("median") <= number("max"), "{spread}");
}

const SMALL: [&str; 10] =
    ["--prompt", "5,40", "--gen", "3", "--depth", "0,300", "--batch", "1,3", "--chunk", "16"];

#[test]
fn the_json_has_every_test_of_the_plan_with_its_samples() {
    let home = tempfile::tempdir().unwrap();
    let file = tiny(home.path(), "tiny.gguf", 2048);
    let path = file.to_str().unwrap();
    let more = ["--repeat", "2", "--threads", "2", "--json", path];
    let output = bench(home.path(), &[&SMALL[..], &more].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["kind"], &json["version"]), (&"bench".into(), &1.into()));
    assert_eq!(json["plan"]["depth"], serde_json::json!([0, 300]));
    assert!(json["machine"]["cores"].as_u64().unwrap() > 0);
    let model = &json["models"][0];
    assert_eq!(model["model"], "tiny.gguf", "no folder of this machine: {model}");
    assert_eq!(model["architecture"], "llama");
    assert_eq!(model["sha256"].as_str().unwrap().len(), 64);
    assert!(model["kernels"].as_str().unwrap().contains("2 threads"), "{model}");
    let kld = model["kld_prefill_decode"].as_f64().unwrap();
    assert!((0.0..=2e-3).contains(&kld), "{kld}");
    check_spread(&model["read_bytes_per_s"], 6);

    let prefill = model["prefill"].as_array().unwrap();
    let lengths: Vec<_> = prefill.iter().map(|test| test["tokens"].as_u64().unwrap()).collect();
    assert_eq!(lengths, [5, 40]);
    prefill.iter().for_each(|test| check_spread(&test["tokens_per_s"], 2));
    let decode = model["decode"].as_array().unwrap();
    let number = |test: &Value, key: &str| test[key].as_f64().unwrap();
    let tests = decode.iter().map(|test| {
        let output = test["output"].as_str().unwrap();
        (number(test, "depth"), number(test, "batch"), output)
    });
    let outputs = |depth, batch| ["logits", "token", "drawn"].map(|output| (depth, batch, output));
    let expected = [(0.0, 1.0), (0.0, 3.0), (300.0, 1.0), (300.0, 3.0)];
    let expected = expected.map(|(depth, batch)| outputs(depth, batch));
    assert_eq!(tests.collect::<Vec<_>>(), expected.concat());
    for test in decode {
        check_spread(&test["tokens_per_s"], 2);
        // 2 layers of 2 heads of 16 keys and values in f16: 256 bytes a position and sequence.
        let seen = number(test, "depth") + 2.0;
        assert_eq!(number(test, "kv_step_bytes"), number(test, "batch") * seen * 256.0);
        let weights = number(model, "weight_bytes");
        assert_eq!(number(test, "weight_step_bytes"), weights, "the table is the head too");
        let bytes = number(test, "weight_step_bytes") + number(test, "kv_step_bytes");
        let steps = number(&test["tokens_per_s"], "median") / number(test, "batch");
        let rate = number(test, "bytes_per_s");
        assert!((rate / (bytes * steps) - 1.0).abs() < 1e-9, "{test}");
        let share = rate / number(&model["read_bytes_per_s"], "max");
        assert!((number(test, "share_of_read") / share - 1.0).abs() < 1e-9, "{test}");
    }
    for key in ["process_s", "load_s", "first_token_s"] {
        check_spread(&model["first_token"][key], 2);
    }
    // One page of 256 positions; and two pages of each of three sequences.
    assert_eq!(model["memory"]["kv_bytes"], 256 * 256);
    assert_eq!(model["memory_at_speed"]["kv_bytes"], 6 * 256 * 256);
}

#[test]
fn a_refused_model_is_told_and_the_others_are_measured() {
    let home = tempfile::tempdir().unwrap();
    let whole = tiny(home.path(), "whole.gguf", 2048);
    let cut = home.path().join("cut.gguf");
    let bytes = std::fs::read(&whole).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let files = [cut.to_str().unwrap(), "nowhere.gguf", whole.to_str().unwrap()];
    let small = ["--prompt", "4", "--gen", "2", "--repeat", "1", "--json"];
    let output = bench(home.path(), &[&small[..], &files].concat());
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let models = json["models"].as_array().unwrap();
    let refused = |i: usize| models[i]["refused"].as_str().unwrap_or_default();
    assert!(refused(0).contains("truncated"), "{}", models[0]);
    assert!(refused(1).contains("nowhere.gguf"), "{}", models[1]);
    assert_eq!(models[2]["model"], "whole.gguf");
    check_spread(&models[2]["prefill"][0]["tokens_per_s"], 1);
    // For people the reason stands where the table would.
    let output = bench(home.path(), &[&small[..6], &files[..1]].concat());
    let told = text(&output.stdout);
    assert!(told.contains("cut.gguf") && told.contains("refused: "), "{told}");
}

#[test]
fn a_plan_beyond_the_context_is_refused_with_both_numbers() {
    let home = tempfile::tempdir().unwrap();
    let file = tiny(home.path(), "short.gguf", 64);
    let plan = ["--prompt", "8", "--gen", "8", "--depth", "60", "--repeat", "1"];
    let output = bench(home.path(), &[&plan[..], &[file.to_str().unwrap()]].concat());
    let told = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("at least 68 tokens") && told.contains("has 64"), "{told}");
}

#[test]
fn wrong_options_end_before_anything_is_measured() {
    let home = tempfile::tempdir().unwrap();
    for (arguments, code, part) in [
        (["--repeat", "0"], 2, "--repeat"),
        (["--batch", "1,0"], 2, "--batch"),
        (["--kv", "q4"], 2, "--kv"),
        (["--gpu", "1"], 2, "--gpu"),
        (["--prompt", "9,9"], 1, "found 9 twice"),
        (["--guards", "--depth=9"], 2, "--depth"),
    ] {
        let output = bench(home.path(), &arguments);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(message.contains(part), "expected `{part}` in: {message}");
        assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
    }
}

#[test]
fn what_the_batch_invariant_mode_costs_is_printed() {
    let home = tempfile::tempdir().unwrap();
    let file = tiny(home.path(), "tiny.gguf", 2048);
    let file = file.to_str().unwrap();
    let small = ["--prompt", "4", "--gen", "2", "--repeat", "1", "--device", "cpu", file];
    let told = text(&bench(home.path(), &small).stdout);
    assert!(told.contains("prefill 4 ") && !told.contains("batch-invariant"), "{told}");
    let output = bench(home.path(), &[&["--batch-invariant"], &small[..]].concat());
    let told = text(&output.stdout);
    // The rows of the CPU never depend on their batch: there is no other mode to compare with.
    let cost = "batch-invariant: rows of this device always are, it costs nothing";
    assert!(told.contains(cost), "expected `{cost}` in: {told}");
}

#[test]
fn the_table_names_every_test() {
    let home = tempfile::tempdir().unwrap();
    let file = tiny(home.path(), "tiny.gguf", 2048);
    let arguments = [&SMALL[..], &["--repeat", "1", file.to_str().unwrap()]].concat();
    let output = bench(home.path(), &arguments);
    let told = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for part in [
        "prefill 5 ",
        "prefill 40 ",
        "decode @0 x1 ",
        "decode @300 x3 ",
        "memory reads: ",
        "first token: ",
        "3 sequences: ",
    ] {
        assert!(told.contains(part), "expected `{part}` in: {told}");
    }
}

#[test]
fn what_guards_cost_is_measured_in_pairs() {
    let home = tempfile::tempdir().unwrap();
    let file = tiny(home.path(), "tiny.gguf", 2048);
    let file = file.to_str().unwrap();
    let small = ["--guards", "--prompt", "8,300", "--gen", "5", "--batch", "1,3", "--repeat", "2"];
    let output = bench(home.path(), &[&small[..], &["--json", file]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let model = &json["models"][0];
    let (first, decode) = (&model["first_token"], model["decode"].as_array().unwrap());
    assert_eq!((&first[0]["prompt"], &first[1]["prompt"]), (&8.into(), &300.into()));
    for test in first.as_array().unwrap() {
        assert_eq!(test["added_ms"]["samples"].as_array().unwrap().len(), 2, "{test}");
        assert!(test["unguarded_ms"].as_f64().unwrap() > 0.0, "{test}");
    }
    let named =
        |test: &Value| (test["batch"].as_u64().unwrap(), test["sampled"].as_bool().unwrap());
    let tests: Vec<_> = decode.iter().map(named).collect();
    assert_eq!(tests, [(1, false), (1, true), (3, false), (3, true)]);
    for test in decode {
        assert!(test["unguarded_tokens_per_s"].as_f64().unwrap() > 0.0, "{test}");
        assert!(test["share_taken"]["median"].as_f64().unwrap() < 1.0, "{test}");
    }
    let told = text(&bench(home.path(), &[&small[..], &[file]].concat()).stdout);
    for part in ["first token of 300 ", "limit 5 ms", "decode x3 sampled ", "limit -2 %"] {
        assert!(told.contains(part), "expected `{part}` in: {told}");
    }
}
