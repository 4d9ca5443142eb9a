//! Both ends of a child process: one part of a measurement, told as one line of JSON.

use std::{
    env,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    Part, first_token, first_token::FirstToken, guards, guards::Guards, plan::Plan, speed,
    speed::Speed,
};
use crate::{output::Output, progress::Bars};

/// What a child says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer<T> {
    /// What it measured.
    Measured(T),
    /// Why it could not.
    Refused(String),
}

/// The child's end.
///
/// # Errors
/// The answer is not JSON, which no measurement allows.
pub(super) fn answer(part: Part, plan: &Plan, path: &Path) -> Result<Value> {
    let since = Instant::now();
    // The parent reads standard output; bars go to standard error.
    let mut bars = Bars::new(Output::new(true));
    match part {
        Part::FirstToken => to_value(first_token::run(plan, path, since)),
        Part::Speed => to_value(speed::run(plan, path, &mut bars)),
        Part::Guards => to_value(guards::run(plan, path, &mut bars)),
    }
}

fn to_value<T: Serialize>(result: Result<T>) -> Result<Value> {
    let answer = match result {
        Ok(measured) => Answer::Measured(measured),
        Err(error) => Answer::Refused(crate::output::explain(&error)),
    };
    Ok(serde_json::to_value(answer)?)
}

/// A first token, and how long the whole process took.
pub(super) struct TimedFirstToken {
    /// Seconds from the start of the process to its end.
    pub(super) process_s: f64,
    /// What it measured of itself.
    pub(super) inside: FirstToken,
}

/// The parent's end of [`Part::FirstToken`].
///
/// # Errors
/// What the child could not do, or how it died.
pub(super) fn first_token(plan: &Plan, path: &Path) -> Result<TimedFirstToken> {
    let since = Instant::now();
    let inside = run(Part::FirstToken, plan, path)?;
    Ok(TimedFirstToken { process_s: since.elapsed().as_secs_f64(), inside })
}

/// The parent's end of [`Part::Speed`].
///
/// # Errors
/// What the child could not do, or how it died.
pub(super) fn speed(plan: &Plan, path: &Path) -> Result<Speed> {
    run(Part::Speed, plan, path)
}

/// The parent's end of [`Part::Guards`].
///
/// # Errors
/// What the child could not do, or how it died.
pub(super) fn guards(plan: &Plan, path: &Path) -> Result<Guards> {
    run(Part::Guards, plan, path)
}

fn run<T: DeserializeOwned>(part: Part, plan: &Plan, path: &Path) -> Result<T> {
    let value = part.to_possible_value().context("every part has a name")?;
    let output = Command::new(env::current_exe().context("own program")?)
        .args(["--json", "bench", "--part", value.get_name()])
        .args(plan.arguments())
        .arg("--")
        .arg(path)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("own program")?;
    ensure!(output.status.success(), "the measuring process died: {}", output.status);
    match serde_json::from_slice(&output.stdout).context("answer of the measuring process")? {
        Answer::Measured(measured) => Ok(measured),
        Answer::Refused(reason) => Err(anyhow!(reason)),
    }
}
