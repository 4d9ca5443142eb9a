//! Faults in the boot and in a short soak of a tiny model. Only in a program that can inject them.

#![cfg(feature = "faults")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use exrail_testkit::{TinyLlama, tiny_llama};
use serde_json::Value;

fn model(home: &Path) -> PathBuf {
    let file = home.join("tiny.gguf");
    let tiny = TinyLlama { context_len: 2048, ..TinyLlama::default() };
    std::fs::write(&file, tiny_llama(1, tiny)).unwrap();
    file
}

/// Exit code, and what a boot with this fault says.
fn boot(fault: &str) -> (Option<i32>, String) {
    let home = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_exrail"))
        .args(["boot", "--no-encoder", "--device", "cpu", "--inject-boot", fault, "--model"])
        .arg(model(home.path()))
        .env("EXRAIL_HOME", home.path())
        .env("EXRAIL_OFFLINE", "true")
        .output()
        .unwrap();
    let told = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(told).unwrap())
}

/// Exit code, and the verdict of each demand.
fn soak(arguments: &[&str]) -> (Option<i32>, Value) {
    let home = tempfile::tempdir().unwrap();
    let file = model(home.path());
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

/// The demand that a longer soak always meets.
const EVERY_KIND: &str = "every kind of fault was injected";

/// The demands that did not pass.
fn failed(record: &Value) -> Vec<&str> {
    let checks = record["checks"].as_array().unwrap().iter();
    let failed = checks.filter(|check| check["verdict"] != "pass");
    failed.map(|check| check["demand"].as_str().unwrap()).collect()
}

#[test]
fn a_late_phase_is_waited_for() {
    let begun = Instant::now();
    let (code, told) = boot("tokenizer=late");
    assert_eq!(code, Some(0), "{told}");
    assert!(begun.elapsed().as_secs() >= 2 && told.contains("sentinel"), "{told}");
}

#[test]
fn a_fault_of_a_phase_that_no_boot_has_is_refused() {
    let (code, told) = boot("weigths=fail");
    assert_eq!(code, Some(2), "{told}");
    assert!(told.contains("found `weigths`"), "{told}");
}

/// A4 of the field faults: whatever a phase does, the boot ends by its name and never half open.
#[test]
fn a_phase_that_fails_hangs_or_panics_ends_the_boot_by_name() {
    for (fault, expected) in [
        ("weights=fail", "boot phase `weights`: an allocation was refused"),
        ("kv_pool=fail", "boot phase `kv_pool`: an allocation was refused"),
        ("warmup=panic", "injected panic"),
        // Its deadline is 10 s.
        ("device=hang", "boot phase `device`: expected its end within"),
    ] {
        let (code, told) = boot(fault);
        assert!(code.is_some_and(|code| code != 0), "{fault}: {told}");
        assert!(told.contains(expected), "{fault}: {told}");
    }
}

#[test]
fn every_fault_is_caught_and_nobody_else_notices() {
    let (code, record) = soak(&[]);
    let mut failed = failed(&record);
    // So short a soak may meet no occasion for one of the eleven kinds, and says so: that is no fault of a guard.
    let checks = record["checks"].as_array().unwrap();
    let is_short =
        |check: &&Value| check["verdict"] == "inconclusive" && check["demand"] == EVERY_KIND;
    let n_short = checks.iter().filter(is_short).count();
    failed.retain(|demand| n_short == 0 || *demand != EVERY_KIND);
    assert_eq!(failed, [""; 0], "{:#}\n{:#}", record["checks"], record["faults"]);
    assert_eq!(code, Some(if n_short == 0 { 0 } else { 3 }));
    assert!(record["program"].as_str().unwrap().ends_with("+faults"));
}

/// The mutation: without the checks of the page books the same plan reaches users, and the soak says so.
#[test]
fn without_its_guards_the_same_soak_fails() {
    let (code, record) = soak(&["--guards-off"]);
    assert!(failed(&record).contains(&"every fault was caught by its guard"), "{record:#}");
    assert_eq!(code, Some(3));
}
