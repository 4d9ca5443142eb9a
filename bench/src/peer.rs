//! The other side: llama.cpp's `llama-bench`.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::once::{OnceArguments, Run};

/// Runs `llama-bench` with the same model, lengths, threads and repetitions.
///
/// # Errors
/// The program cannot be run, fails, or prints another form.
pub(crate) fn run(program: &Path, arguments: &OnceArguments) -> Result<Run> {
    let output = Command::new(program)
        .arg("--model")
        .arg(&arguments.model)
        .args(["--threads", &arguments.threads.to_string()])
        .args(["--n-prompt", &arguments.prompt_tokens.to_string()])
        .args(["--n-gen", &arguments.generated_tokens.to_string()])
        .args(["--repetitions", &arguments.repetitions.to_string()])
        .args(["--output", "json"])
        .output()
        .with_context(|| program.display().to_string())?;
    ensure!(
        output.status.success(),
        "llama-bench: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    parse(&serde_json::from_slice(&output.stdout).context("llama-bench: expected JSON")?)
}

fn parse(tests: &Value) -> Result<Run> {
    let tests = tests.as_array().context("llama-bench: expected a list of tests")?;
    let mut run = Run::default();
    for test in tests {
        let rates: Vec<f64> = serde_json::from_value(test["samples_ts"].clone())
            .context("llama-bench: expected numbers in `samples_ts`")?;
        match (test["n_prompt"].as_u64(), test["n_gen"].as_u64()) {
            (Some(1..), Some(0)) => run.prefill = rates,
            (Some(0), Some(1..)) => run.decode = rates,
            (prompt, generated) => {
                bail!("llama-bench: unexpected test with n_prompt {prompt:?}, n_gen {generated:?}")
            }
        }
        let text = |key: &str| test[key].as_str().unwrap_or("?").to_owned();
        run.program = format!("llama.cpp {} ({})", test["build_number"], text("build_commit"));
        run.kernels = text("backends");
    }
    ensure!(!run.prefill.is_empty(), "llama-bench: expected a prefill test, found none");
    ensure!(!run.decode.is_empty(), "llama-bench: expected a decode test, found none");
    Ok(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tests_are_read() {
        let tests = serde_json::json!([
            {"n_prompt": 512, "n_gen": 0, "samples_ts": [500.0, 510.0],
             "build_number": 7, "build_commit": "abc", "backends": "CPU"},
            {"n_prompt": 0, "n_gen": 128, "samples_ts": [90.0],
             "build_number": 7, "build_commit": "abc", "backends": "CPU"},
        ]);
        let run = parse(&tests).unwrap();
        assert_eq!(run.prefill, [500.0, 510.0]);
        assert_eq!(run.decode, [90.0]);
        assert_eq!(run.program, "llama.cpp 7 (abc)");
    }

    #[test]
    fn a_missing_test_is_named() {
        let tests = serde_json::json!([{"n_prompt": 512, "n_gen": 0, "samples_ts": [1.0]}]);
        let error = parse(&tests).unwrap_err().to_string();
        assert!(error.contains("decode"), "{error}");
    }
}
