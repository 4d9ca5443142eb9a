//! Our side: one `exrail bench --json`, which measures every part in a process of its own.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail, ensure};
use exrail_checkpoint::sha256_file;
use serde_json::{Value, json};

use super::{
    Sizes,
    reading::{Reading, Test},
};

pub(super) struct Ours<'a> {
    pub(super) program: &'a Path,
    pub(super) sizes: &'a Sizes,
}

impl Ours<'_> {
    /// Version and hash of the program.
    pub(super) fn describe(&self) -> Result<Value> {
        let shown = || self.program.display().to_string();
        let output = Command::new(self.program).arg("--version").output().with_context(shown)?;
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let sha256 = sha256_file(self.program, &mut |_| Ok(())).with_context(shown)?;
        Ok(json!({ "version": version, "sha256": sha256 }))
    }

    /// Measures and returns the readings, and all that the program said: its `machine`, and what it
    /// said of the `model`.
    ///
    /// # Errors
    /// The model is refused, or the program fails or prints another form.
    pub(super) fn run(&self, model: &Path) -> Result<(Vec<Reading>, Value)> {
        let Sizes { threads, prompt, generated, depth, batch, repeat, .. } = self.sizes;
        let output = Command::new(self.program)
            .args(["--json", "bench"])
            .args(["--device", "cpu"])
            .args(["--threads", &threads.to_string()])
            .args(["--prompt", &prompt.to_string()])
            .args(["--gen", &generated.to_string()])
            .args(["--depth", &format!("0,{depth}")])
            .args(["--batch", &format!("1,{batch}")])
            .args(["--repeat", &repeat.to_string()])
            .arg(model)
            .output()
            .with_context(|| self.program.display().to_string())?;
        let told: Value = serde_json::from_slice(&output.stdout).with_context(|| {
            let error = String::from_utf8_lossy(&output.stderr);
            let error = error.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
            format!("expected JSON, found {}: {error}", output.status)
        })?;
        let readings = parse(&told)?;
        ensure!(output.status.success(), "{}", output.status);
        let (machine, model) = (&told["machine"], &told["models"][0]);
        Ok((readings, json!({ "machine": machine, "model": model })))
    }
}

fn parse(told: &Value) -> Result<Vec<Reading>> {
    if let Some(error) = told["error"].as_str() {
        bail!("{error}");
    }
    let model = &told["models"][0];
    if let Some(reason) = model["refused"].as_str() {
        bail!("{reason}");
    }
    let mut readings = Vec::new();
    let mut add = |test: Test, spread: &Value| -> Result<()> {
        let values: Vec<f64> = serde_json::from_value(spread["samples"].clone())
            .with_context(|| format!("{}: expected numbers in `samples`", test.name()))?;
        readings.extend(values.into_iter().map(|value| Reading { test, value }));
        Ok(())
    };
    for test in list(model, "prefill")? {
        add(Test::Prefill { tokens: number(test, "tokens")? }, &test["tokens_per_s"])?;
    }
    for test in list(model, "decode")? {
        let (depth, batch) = (number(test, "depth")?, number(test, "batch")?);
        let decode = match test["output"].as_str() {
            Some("logits") => Test::Decode { depth, batch },
            Some("token") if batch == 1 => Test::Greedy { depth },
            // No gate asks for the greedy decode of several sequences, or for drawn tokens.
            Some("token" | "drawn") => continue,
            output => bail!("`output`: expected logits, token or drawn, found {output:?}"),
        };
        add(decode, &test["tokens_per_s"])?;
    }
    add(Test::FirstToken, &model["first_token"]["process_s"])?;
    let memory = &model["memory"];
    for (test, value) in [
        (Test::Resident, &memory["resident"]["now"]),
        (Test::Peak, &memory["resident"]["peak"]),
        (Test::ResidentRatio, &memory["resident_ratio"]),
    ] {
        // Absent where the system does not tell; the gate then does not pass.
        readings.extend(value.as_f64().map(|value| Reading { test, value }));
    }
    Ok(readings)
}

fn list<'a>(model: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    let list = model[key].as_array();
    list.filter(|list| !list.is_empty()).with_context(|| format!("`{key}`: expected tests"))
}

fn number(test: &Value, key: &str) -> Result<usize> {
    let number = test[key].as_u64().with_context(|| format!("`{key}`: expected a number"))?;
    Ok(usize::try_from(number)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_and_the_memory_are_read() {
        let spread = |values: &[f64]| json!({ "median": 0.0, "samples": values });
        let told = json!({ "models": [{
            "prefill": [{ "tokens": 512, "tokens_per_s": spread(&[700.0, 710.0]) }],
            "decode": [
                { "depth": 0, "batch": 8, "output": "logits", "tokens_per_s": spread(&[300.0]) },
                { "depth": 9, "batch": 1, "output": "token", "tokens_per_s": spread(&[90.0]) },
                { "depth": 9, "batch": 1, "output": "drawn", "tokens_per_s": spread(&[80.0]) },
            ],
            "first_token": { "process_s": spread(&[0.25]) },
            "memory": { "resident": { "now": 100, "peak": 200 }, "resident_ratio": 1.1 },
        }]});
        let readings = parse(&told).unwrap();
        let of = |test| readings.iter().filter(|r| r.test == test).map(|r| r.value).collect();
        let values: [Vec<f64>; 5] = [
            of(Test::Greedy { depth: 9 }),
            of(Test::Prefill { tokens: 512 }),
            of(Test::Decode { depth: 0, batch: 8 }),
            of(Test::FirstToken),
            of(Test::ResidentRatio),
        ];
        assert_eq!(values, [vec![90.0], vec![700.0, 710.0], vec![300.0], vec![0.25], vec![1.1]]);
    }

    #[test]
    fn a_refused_model_is_its_reason() {
        let told = json!({ "models": [{ "model": "x.gguf", "refused": "architecture gemma3" }]});
        assert_eq!(parse(&told).unwrap_err().to_string(), "architecture gemma3");
        let told = json!({ "models": [{ "prefill": [], "decode": [] }]});
        assert!(parse(&told).unwrap_err().to_string().contains("prefill"));
    }
}
