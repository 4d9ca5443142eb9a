//! `exrail schema print` and `exrail trace verify` as whole runs: what is printed, and the exit code.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, process::Command};

use exrail_verify::trace::seal;
use exrail_wire::{Pins, TRACE_SCHEMA_VERSION, TraceBody, TraceEnvelope, schemas};
use serde_json::Value;

/// Exit code and standard output.
fn exrail(home: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_exrail"))
        .args(arguments)
        .env("EXRAIL_HOME", home)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!message.contains("panicked"), "{message}");
    (output.status.code(), said)
}

fn line(trace_id: &str) -> String {
    let body = TraceBody::Guard { guard: "prompt_lint".into(), detail: "two BOS".into() };
    let record = TraceEnvelope {
        schema_version: TRACE_SCHEMA_VERSION,
        ts: "2026-11-29T12:00:00Z".into(),
        trace_id: trace_id.into(),
        request_id: "ask-1".into(),
        session_id: None,
        agent_id: None,
        mem_rev: 0,
        mem_hash: None,
        forced: None,
        pins: Pins::default(),
        body,
    };
    seal(&serde_json::to_string(&record).unwrap())
}

#[test]
fn every_schema_can_be_printed_and_an_unknown_one_is_refused_with_the_names() {
    let home = tempfile::tempdir().unwrap();
    let (code, names) = exrail(home.path(), &["schema", "print", "--list"]);
    assert_eq!(code, Some(0));
    assert_eq!(names.lines().count(), schemas::TRACE.len() + schemas::STORED.len());
    for name in names.lines() {
        let (code, text) = exrail(home.path(), &["schema", "print", name]);
        assert_eq!(code, Some(0));
        let schema: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(schema["title"], name);
    }
    let (code, text) = exrail(home.path(), &["schema", "print"]);
    assert_eq!(code, Some(0));
    let any: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(any["oneOf"].as_array().unwrap().len(), schemas::TRACE.len());
    assert_eq!(exrail(home.path(), &["schema", "print", "answer"]).0, Some(1));
}

#[test]
fn a_log_is_verified_and_the_exit_code_says_what_was_found() {
    let home = tempfile::tempdir().unwrap();
    let log = home.path().join("trace.jsonl");
    let verify = |text: &str, more: &[&str]| {
        std::fs::write(&log, text).unwrap();
        exrail(home.path(), &[&["trace", "verify", log.to_str().unwrap()], more].concat())
    };
    let good = format!("{}\n{}\n", line("a"), line("b"));
    let (code, said) = verify(&good, &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("guard.fire                2"), "{said}");
    assert!(said.contains("nothing is broken"), "{said}");

    let torn = format!("{good}{}", &line("c")[..40]);
    let (code, said) = verify(&torn, &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("40 bytes behind the last line break"), "{said}");

    let changed = good.replacen("two BOS", "two bos", 1);
    let (code, said) = verify(&changed, &[]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("line 1, a: /record_sha256: expected"), "{said}");
    let (code, said) = verify(&changed, &["--json"]);
    assert_eq!(code, Some(1));
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["n_breaches"], 1);
    assert_eq!(report["breaches"][0]["rule"], "seal");
}

#[test]
fn what_cannot_be_read_is_exit_code_2() {
    let home = tempfile::tempdir().unwrap();
    let absent = home.path().join("absent.jsonl");
    let (code, said) =
        exrail(home.path(), &["trace", "verify", absent.to_str().unwrap(), "--json"]);
    assert_eq!(code, Some(2));
    assert!(said.contains("absent.jsonl"), "{said}");
    let log = home.path().join("trace.jsonl");
    std::fs::write(&log, "").unwrap();
    let (log, none) = (log.to_str().unwrap(), home.path().join("nowhere"));
    let of = ["trace", "verify", log, "--collection", none.to_str().unwrap()];
    assert_eq!(exrail(home.path(), &of).0, Some(2));
}
