//! A real model: int8 is nearer to the 16-bit weights than int4, and calibrated int4 nearer than
//! int4 rounded to nearest. Prints the rows of the table in docs/quantize.md.
//!
//! `EXRAIL_TEST_GENERATOR` names the GGUF file of `SmolLM2`-135M. Text to calibrate with and to
//! measure on are documents of this repository; `EXRAIL_FIDELITY_CALIBRATION`,
//! `EXRAIL_FIDELITY_TEXT` and `EXRAIL_FIDELITY_TOKENS` name other files and more tokens of them.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]
#![expect(clippy::print_stdout, reason = "the table is for people")]

mod convert;
mod fidelity;

use std::path::{Path, PathBuf};

use exrail_checkpoint::{HfFolder, sha256_hex};
use exrail_kernels::Activation;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_quantize::{Calibration, QuantizeOptions, quantize};
use exrail_tensor::IntGrid;
use exrail_text::{Specials, Tokenizer};

/// Tokens to calibrate with, and half as many to measure on, unless the environment says otherwise.
const N_TOKENS: usize = 2048;

/// Documents of the sample pack, sorted, the even ones or the odd ones.
fn documents(remainder: usize) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packs/stability/docs");
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let chosen = paths.into_iter().enumerate().filter(|(i, _)| i % 2 == remainder);
    chosen.map(|(_, path)| std::fs::read_to_string(path).unwrap()).collect()
}

fn text(variable: &str, remainder: usize) -> String {
    match std::env::var_os(variable) {
        Some(path) => String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned(),
        None => documents(remainder),
    }
}

#[test]
fn int8_is_nearer_than_calibrated_int4_and_that_nearer_than_rounded_int4() {
    let gguf = std::env::var_os("EXRAIL_TEST_GENERATOR").expect("EXRAIL_TEST_GENERATOR is set");
    let n_tokens = std::env::var("EXRAIL_FIDELITY_TOKENS").ok().map(|n| n.parse().unwrap());
    let (n_tokens, n_measured): (usize, usize) = match n_tokens {
        Some(n_tokens) => (n_tokens, n_tokens),
        None => (N_TOKENS, N_TOKENS / 2),
    };
    let dir = tempfile::tempdir().unwrap();
    let reference = dir.path().join("f16");
    convert::convert(Path::new(&gguf), &reference);
    let json = HfFolder::open(&reference).unwrap().tokenizer_json().unwrap().unwrap();
    let tokenizer = Tokenizer::from_json(&json).unwrap();
    let encode = |text: &str, n_tokens| {
        let mut ids = tokenizer.encode(text, Specials::AsText).unwrap();
        ids.truncate(n_tokens);
        ids
    };
    let calibration_text = text("EXRAIL_FIDELITY_CALIBRATION", 0);
    let calibration = || {
        let text_sha256 = sha256_hex(calibration_text.as_bytes());
        Some(Calibration { text_sha256, ids: encode(&calibration_text, n_tokens) })
    };
    let options =
        CpuOptions { threads: None, activation: Activation::F32, ..CpuOptions::default() };
    let backend = CpuBackend::new(options).unwrap();
    let mut variants = vec![
        ("int8, groups of 32", IntGrid::Int8, 32, None),
        ("int4, groups of 32, calibrated", IntGrid::Int4, 32, calibration()),
        ("int4, groups of 32, to nearest", IntGrid::Int4, 32, None),
    ];
    if n_tokens > N_TOKENS {
        variants.push(("int4, groups of 64, calibrated", IntGrid::Int4, 64, calibration()));
        variants.push(("int4, groups of 64, to nearest", IntGrid::Int4, 64, None));
    }
    let mut folders = Vec::new();
    for (name, grid, group, calibration) in &variants {
        let options = QuantizeOptions::new(*grid, *group, calibration.clone()).unwrap();
        let folder = dir.path().join(name.replace(", ", "-"));
        let start = std::time::Instant::now();
        quantize(&backend, &reference, &folder, &options, &mut |_| {}).unwrap();
        println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
        folders.push(folder);
    }
    let paths: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
    let ids = encode(&text("EXRAIL_FIDELITY_TEXT", 1), n_measured);
    println!("measured on {} tokens", ids.len() / 512 * 512);
    let found = fidelity::compare(&backend, &reference, &paths, &ids);
    println!("| | mean | median | p99 | p99.9 | max | top-1 | ln PPL | RMS Δp |");
    for ((name, ..), fidelity) in variants.iter().zip(&found) {
        println!("| {name} | {} |", fidelity.row());
    }
    let [int8, calibrated, nearest] = [0, 1, 2].map(|i| found[i].mean());
    assert!(int8 < 0.005, "int8: {int8}");
    assert!(found[0].top() > 0.95, "int8: {}", found[0].top());
    assert!(int8 < calibrated, "{int8} {calibrated}");
    assert!(calibrated < 0.6 * nearest, "{calibrated} {nearest}");
}
