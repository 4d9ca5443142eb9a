//! The gateway under measurement: a process of its own, and what can be seen of it from outside.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader as Reader, Lines},
    process::{Child, ChildStdout, Command},
    runtime::Runtime,
    time::timeout,
};

use crate::machine::{self, Resident};

/// Until the fence of its upstream is open.
const READY: Duration = Duration::from_secs(60);
/// Until it has ended what it was doing.
const END: Duration = Duration::from_secs(40);

/// A running gateway.
pub(super) struct Process {
    child: Child,
    pid: u32,
    pub(super) url: String,
    traces: PathBuf,
    /// Read no further, and kept: a gateway whose reader has gone could not tell what it has to.
    _told: Lines<Reader<ChildStdout>>,
}

impl Process {
    /// Starts a gateway with traces in front of the server at `upstream`, and waits until it may be asked.
    ///
    /// # Errors
    /// It does not start, or its upstream does not prove itself in time.
    pub(super) fn start(
        runtime: &Runtime,
        program: &Path,
        upstream: &str,
        traces: PathBuf,
    ) -> Result<Self> {
        let started = async {
            let mut command = Command::new(program);
            command.args(["--json", "gateway", "--host", "127.0.0.1", "--port", "0"]);
            command.args(["--upstream", upstream, "--trace-mode", "enforce", "--trace-log"]);
            command.arg(&traces).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
            // Settings of this shell are none of the measurement.
            for (name, _) in std::env::vars_os() {
                if name.to_string_lossy().starts_with("EXRAIL_") {
                    command.env_remove(name);
                }
            }
            let mut child = command.spawn().with_context(|| program.display().to_string())?;
            let pid = child.id().context("gateway: expected a process, found none")?;
            let out = child.stdout.take().context("gateway: expected its output, found none")?;
            let mut told = Reader::new(out).lines();
            let ready = timeout(READY, ready(&mut told)).await;
            let url = ready.with_context(|| {
                format!("gateway: expected an open fence within {} s, found none", READY.as_secs())
            })??;
            Ok(Self { child, pid, url, traces, _told: told })
        };
        runtime.block_on(started)
    }

    /// Its memory.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn memory(&self) -> Result<Resident> {
        machine::resident(self.pid).context("gateway: expected a running process, found none")
    }

    /// Processor time that it has taken.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.pid);
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        let ticks = ticks(&text).with_context(|| format!("{path}: expected times, found none"))?;
        let a_second = rustix::param::clock_ticks_per_second();
        Ok(Duration::from_secs_f64(ticks as f64 / a_second as f64))
    }

    /// Lines of its trace log.
    ///
    /// # Errors
    /// The log cannot be read.
    pub(super) fn traced(&self) -> Result<usize> {
        let shown = || self.traces.display().to_string();
        let mut reader = BufReader::new(File::open(&self.traces).with_context(shown)?);
        let mut lines = 0;
        loop {
            let part = reader.fill_buf().with_context(shown)?;
            if part.is_empty() {
                return Ok(lines);
            }
            lines += part.iter().filter(|&&byte| byte == b'\n').count();
            let n = part.len();
            reader.consume(n);
        }
    }

    /// Ends it.
    ///
    /// # Errors
    /// It had ended before, or does not end properly.
    pub(super) fn stop(mut self, runtime: &Runtime) -> Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        kill_process(pid.context("gateway: expected a process, found none")?, Signal::TERM)?;
        let ended = runtime.block_on(async { timeout(END, self.child.wait()).await });
        let status = ended.context("gateway: expected its end, found it running")??;
        ensure!(status.success(), "gateway: expected a good end, found {status}");
        Ok(())
    }
}

/// Where it listens, once it may be asked.
async fn ready(told: &mut Lines<Reader<ChildStdout>>) -> Result<String> {
    while let Some(line) = told.next_line().await? {
        let event: Value =
            serde_json::from_str(&line).with_context(|| format!("gateway: `{line}`"))?;
        if event["event"] == "ready" {
            let url = event["url"].as_str();
            return Ok(url.context("gateway: expected `url`, found none")?.to_owned());
        }
    }
    bail!("gateway: expected the event `ready`, found its end")
}

/// User and system time (proc(5)), behind the name, which may have spaces and brackets in it.
fn ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Raises the limit of open files to what the system grants; a gateway started later inherits it.
///
/// # Errors
/// The system grants less than `needed`.
pub(super) fn allow_open_files(needed: usize) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let granted =
        limit.maximum.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
    ensure!(
        granted >= needed,
        "open files: expected a hard limit of at least {needed} (ulimit -Hn), found {granted}"
    );
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
        .context("open files: the soft limit could not be raised (ulimit -n)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "7 (a) b c) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 99";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("7 (a) S 1"), None);
    }

    #[test]
    fn more_files_than_the_system_grants_are_refused() {
        assert!(allow_open_files(1).is_ok());
    }
}
