//! Short soaks of a tiny model: the whole way, with too few requests to tell of memory and pace.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::Path,
    process::{Command, Output},
};

use exrail_testkit::{TinyLlama, tiny_llama};
use serde_json::Value;

fn soak(home: &Path, arguments: &[&str]) -> Output {
    let file = home.join("tiny.gguf");
    let tiny = TinyLlama { context_len: 2048, ..TinyLlama::default() };
    std::fs::write(&file, tiny_llama(1, tiny)).unwrap();
    Command::new(env!("CARGO_BIN_EXE_exrail"))
        .args(["--json", "soak"])
        .arg(&file)
        .args(["--minutes", "0.1", "--clients", "6", "--kv-pages", "12", "--threads", "2"])
        .args(["--device", "cpu"])
        .args(arguments)
        .env("EXRAIL_HOME", home)
        .env("EXRAIL_OFFLINE", "true")
        .output()
        .unwrap()
}

#[test]
fn a_short_soak_passes_every_demand_but_those_of_long_ones() {
    let home = tempfile::tempdir().unwrap();
    let records = home.path().join("records");
    let output = soak(home.path(), &["--record", records.to_str().unwrap()]);
    let told = String::from_utf8(output.stderr).unwrap();
    let record: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = record["checks"].as_array().unwrap();
    assert_eq!(checks.len(), 13);
    for check in checks {
        let demand = check["demand"].as_str().unwrap();
        // Of memory and pace a few seconds tell nothing, whatever they do.
        let is_of_long_ones = ["memory", "slower"].iter().any(|word| demand.contains(word));
        assert!(is_of_long_ones || check["verdict"] == "pass", "{check:#}\n{told}");
    }
    assert!(record["oracle"]["n_answers"].as_u64().unwrap() > 0, "{}", record["oracle"]);
    let files: Vec<_> = std::fs::read_dir(&records).unwrap().collect();
    assert_eq!(files.len(), 1);
    let written = std::fs::read(files[0].as_ref().unwrap().path()).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), record);
}

#[test]
#[cfg(not(feature = "faults"))]
fn faults_need_a_program_that_can_inject_them() {
    let home = tempfile::tempdir().unwrap();
    let output = soak(home.path(), &["--faults"]);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("expected a program with feature `faults`"), "{told}");
}

#[test]
fn a_soak_that_cannot_start_says_why() {
    let home = tempfile::tempdir().unwrap();
    let missing = Command::new(env!("CARGO_BIN_EXE_exrail"))
        .args(["soak", "nowhere.gguf"])
        .env("EXRAIL_HOME", home.path())
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(1));
    let told = String::from_utf8(missing.stderr).unwrap();
    assert!(told.contains("nowhere.gguf") && !told.contains("panicked"), "{told}");
}
