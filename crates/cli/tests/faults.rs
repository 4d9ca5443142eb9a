//! A short soak with faults of a tiny model. Only in a program that can inject them.

#![cfg(feature = "faults")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use exrail_testkit::{TinyLlama, tiny_llama};
use serde_json::Value;

/// Exit code, and the verdict of each demand.
fn soak(arguments: &[&str]) -> (Option<i32>, Value) {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tiny.gguf");
    let tiny = TinyLlama { context_len: 2048, ..TinyLlama::default() };
    std::fs::write(&file, tiny_llama(1, tiny)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_exrail"))
        .args(["--json", "soak"])
        .arg(&file)
        .args(["--minutes", "0.4", "--clients", "6", "--kv-pages", "32", "--threads", "2"])
        .args(["--device", "cpu", "--faults"])
        .args(arguments)
        .env("EXRAIL_HOME", home.path())
        .env("EXRAIL_OFFLINE", "true")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let record = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{told}"));
    (output.status.code(), record)
}

/// The demands that did not pass.
fn failed(record: &Value) -> Vec<&str> {
    let checks = record["checks"].as_array().unwrap().iter();
    let failed = checks.filter(|check| check["verdict"] != "pass");
    failed.map(|check| check["demand"].as_str().unwrap()).collect()
}

#[test]
fn every_fault_is_caught_and_nobody_else_notices() {
    let (code, record) = soak(&[]);
    assert_eq!(failed(&record), [""; 0], "{:#}\n{:#}", record["checks"], record["faults"]);
    assert_eq!(code, Some(0));
    assert!(record["program"].as_str().unwrap().ends_with("+faults"));
}

/// The mutation: without the checks of the page books the same plan reaches users, and the soak says so.
#[test]
fn without_its_guards_the_same_soak_fails() {
    let (code, record) = soak(&["--guards-off"]);
    assert!(failed(&record).contains(&"every fault was caught by its guard"), "{record:#}");
    assert_eq!(code, Some(3));
}
