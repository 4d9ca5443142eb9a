//! The server under test: a child process on a free loopback port.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::http;

/// Longest boot.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// A running `exrail serve`; killed when dropped.
pub(crate) struct Server {
    child: Child,
    /// Held open: a server that prints into a closed pipe would die of it.
    _stdout: BufReader<ChildStdout>,
    pub(crate) address: SocketAddr,
}

/// What the soak reads off `/metrics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gauges {
    pub(crate) pages_total: u64,
    pub(crate) pages_free: u64,
    pub(crate) running: u64,
    pub(crate) waiting: u64,
    pub(crate) generated: u64,
    pub(crate) panics: u64,
    pub(crate) kv_faults: u64,
}

impl Server {
    /// Starts `program serve` with `options` and waits until it is ready.
    ///
    /// # Errors
    /// It does not start, names no address, or is not ready in time.
    pub(crate) fn start(program: &Path, options: &[&str]) -> Result<Self> {
        let mut child = Command::new(program)
            .arg("serve")
            .args(options)
            .args(["--no-encoder", "--host", "127.0.0.1", "--port", "0", "--json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| program.display().to_string())?;
        let mut stdout = BufReader::new(child.stdout.take().context("stdout is piped")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let address = address_in(&line);
        let server = match address {
            Ok(address) => Self { child, _stdout: stdout, address },
            Err(error) => {
                child.kill()?;
                child.wait()?;
                return Err(error);
            }
        };
        server.wait_until_ready()?;
        Ok(server)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// # Errors
    /// No answer, or one without the expected metrics.
    pub(crate) fn gauges(&self) -> Result<Gauges> {
        let (status, text) = http::get(self.address, "/metrics").context("/metrics")?;
        ensure!(status == 200, "/metrics: expected status 200, found {status}");
        gauges_in(&text)
    }

    fn wait_until_ready(&self) -> Result<()> {
        let since = Instant::now();
        while since.elapsed() < BOOT_LIMIT {
            if let Ok((200, _)) = http::get(self.address, "/readyz") {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
        bail!("server: not ready after {} s", BOOT_LIMIT.as_secs())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have died already; both calls then fail and nothing is left to stop.
        let _ignored = self.child.kill();
        let _ignored = self.child.wait();
    }
}

/// The address in the line that `exrail serve --json` prints.
fn address_in(line: &str) -> Result<SocketAddr> {
    let expected = || format!("server: expected a JSON line with `url`, found `{}`", line.trim());
    let value: Value = serde_json::from_str(line).with_context(expected)?;
    let url = value["url"].as_str().with_context(expected)?;
    let address = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
    let address: SocketAddr = address.parse().with_context(expected)?;
    ensure!(address.ip().is_loopback(), "server: expected a loopback address, found {address}");
    Ok(address)
}

fn gauges_in(text: &str) -> Result<Gauges> {
    let value = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let number = line.with_context(|| format!("/metrics: expected `{name}`, found none"))?;
        number.parse().with_context(|| format!("/metrics: `{name}` is no number: `{number}`"))
    };
    Ok(Gauges {
        pages_total: value("exrail_kv_pages_total")?,
        pages_free: value("exrail_kv_pages_free")?,
        running: value("exrail_sequences_running")?,
        waiting: value("exrail_sequences_waiting")?,
        generated: value("exrail_generated_tokens_total")?,
        panics: value("exrail_engine_panics_total")?,
        kv_faults: value("exrail_kv_faults_total")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_are_driven() {
        let address = address_in("{\"url\":\"http://127.0.0.1:4711/\"}\n").unwrap();
        assert_eq!(address.port(), 4711);
        assert!(address_in("{\"url\":\"http://192.0.2.1:80\"}").is_err());
        assert!(address_in("listening\n").unwrap_err().to_string().contains("listening"));
    }

    #[test]
    fn a_missing_metric_is_named() {
        let error = gauges_in("exrail_kv_pages_total 9\n").unwrap_err().to_string();
        assert!(error.contains("exrail_kv_pages_free"), "{error}");
    }
}
