//! The server under test: a child process of the same program on a free loopback port.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use exrail_kernels::DeviceCounters;
use serde_json::{Value, json};

use super::{
    http::{self, Target},
    random::Random,
};

/// Longest boot.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// Clients of one key form a tenant.
pub(super) const N_TENANTS: usize = 3;

/// A folder of the soak's own: thousands of requests do not belong into the user's trace log.
#[derive(Debug)]
pub(super) struct Workplace {
    path: PathBuf,
    keys: Vec<String>,
}

impl Workplace {
    /// # Errors
    /// The folder cannot be made.
    pub(super) fn new() -> Result<Self> {
        let path = env::temp_dir().join(format!("exrail-soak-{}", std::process::id()));
        let at = || path.display().to_string();
        fs::create_dir_all(&path).with_context(at)?;
        // Others on this machine are not to be counted among the clients; nothing here is a secret.
        let mut random = Random::new(u64::from(std::process::id()));
        let keys = (0..N_TENANTS).map(|_| format!("{:016x}{:016x}", random.next(), random.next()));
        let keys: Vec<String> = keys.collect();
        fs::write(path.join("keys"), keys.join("\n")).with_context(at)?;
        Ok(Self { path, keys })
    }

    pub(super) fn trace_log(&self) -> PathBuf {
        self.path.join("trace.jsonl")
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it, when nothing in it is of interest.
    ///
    /// # Errors
    /// It cannot be removed.
    pub(super) fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.path).with_context(|| self.path.display().to_string())
    }
}

/// A running `exrail serve`; killed when dropped.
pub(super) struct Server {
    child: Child,
    /// Held open: a server that prints into a closed pipe would die of it.
    stdout: BufReader<ChildStdout>,
    address: SocketAddr,
    keys: Vec<String>,
}

/// What the soak reads off `/metrics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gauges {
    pub(super) pages_total: u64,
    pub(super) pages_free: u64,
    pub(super) pages_cached: u64,
    pub(super) pages_quarantined: u64,
    pub(super) running: u64,
    pub(super) waiting: u64,
    pub(super) generated: u64,
    pub(super) cancelled: u64,
    pub(super) panics: u64,
    pub(super) kv_faults: u64,
    pub(super) audits: u64,
    pub(super) prefix_hits: u64,
    pub(super) evictions: u64,
    pub(super) rotations: u64,
    /// What the device built behind the warm-up fence.
    pub(super) built: u64,
}

impl Server {
    /// Starts `serve` with `options` and waits until it is ready.
    ///
    /// # Errors
    /// It does not start, and why, or it is not ready in time.
    pub(super) fn start(workplace: &Workplace, options: &[String]) -> Result<Self> {
        let log = fs::File::create(workplace.path.join("server.log"))
            .with_context(|| workplace.path.display().to_string())?;
        let mut child = Command::new(env::current_exe().context("own program")?)
            .arg("serve")
            .args(options)
            .args(["--no-encoder", "--host", "127.0.0.1", "--port", "0", "--json"])
            .arg("--api-key-file")
            .arg(workplace.path.join("keys"))
            .arg("--trace-log")
            .arg(workplace.trace_log())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("own program")?;
        let mut stdout = BufReader::new(child.stdout.take().context("stdout is piped")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let mut server = match address_in(&line) {
            Ok(address) => Self { child, stdout, address, keys: workplace.keys.clone() },
            Err(error) => {
                child.kill()?;
                child.wait()?;
                return Err(error);
            }
        };
        server.wait_until_ready()?;
        Ok(server)
    }

    pub(super) fn resident_kib(&self) -> Option<u64> {
        let resident = super::super::bench::process::resident_of(&self.child.id().to_string())?;
        Some(resident.now / 1024)
    }

    /// The server as one of its tenants sees it.
    pub(super) fn target(&self, tenant: usize) -> Target<'_> {
        Target { address: self.address, key: &self.keys[tenant % self.keys.len()] }
    }

    /// # Errors
    /// No answer, or one without the expected metrics.
    pub(super) fn gauges(&self) -> Result<Gauges> {
        gauges_in(&self.metrics()?)
    }

    /// The text of `/metrics`.
    ///
    /// # Errors
    /// No answer.
    pub(super) fn metrics(&self) -> Result<String> {
        let (status, text) = http::get(self.target(0), "/metrics").context("/metrics")?;
        ensure!(status == 200, "/metrics: expected status 200, found {status}");
        Ok(text)
    }

    /// Whether `/livez` says so.
    pub(super) fn is_alive(&self) -> bool {
        matches!(http::get(self.target(0), "/livez"), Ok((200, _)))
    }

    /// What a route answers to this body.
    ///
    /// # Errors
    /// No answer, or not 200.
    pub(super) fn json(&self, path: &str, body: Option<&Value>) -> Result<Value> {
        let text = body.map(Value::to_string).unwrap_or_default();
        let method = if body.is_some() { "POST" } else { "GET" };
        let wait = Duration::from_secs(60);
        let (status, text) = http::ask(self.target(0), method, path, text.as_bytes(), wait)
            .with_context(|| path.to_owned())?;
        ensure!(status == 200, "{path}: expected status 200, found {status}: {text}");
        serde_json::from_str(&text).with_context(|| path.to_owned())
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let since = Instant::now();
        while since.elapsed() < BOOT_LIMIT {
            if let Ok((200, _)) = http::get(self.target(0), "/readyz") {
                return Ok(());
            }
            if self.child.try_wait()?.is_some() {
                let mut told = String::new();
                self.stdout.read_to_string(&mut told)?;
                bail!("server: {}", error_in(&told));
            }
            thread::sleep(Duration::from_millis(50));
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
    let value: Value = serde_json::from_str(line).unwrap_or(json!({}));
    let Some(url) = value["url"].as_str() else { bail!("server: {}", error_in(line)) };
    let address = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
    let address: SocketAddr =
        address.parse().with_context(|| format!("server: expected an address, found {url}"))?;
    ensure!(address.ip().is_loopback(), "server: expected a loopback address, found {address}");
    Ok(address)
}

/// What a program that ended with `--json` said of it.
fn error_in(told: &str) -> String {
    let values = told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut errors = values.filter_map(|value| Some(value["error"].as_str()?.to_owned()));
    errors.next_back().unwrap_or_else(|| format!("ended without an error, after `{}`", told.trim()))
}

/// The number behind a name in the text of `/metrics`.
///
/// # Errors
/// None, or not a number.
pub(super) fn metric(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let number = line.with_context(|| format!("/metrics: expected `{name}`, found none"))?;
    number.parse().with_context(|| format!("/metrics: `{name}` is no number: `{number}`"))
}

fn gauges_in(text: &str) -> Result<Gauges> {
    let value = |name: &str| metric(text, name);
    Ok(Gauges {
        pages_total: value("exrail_kv_pages_total")?,
        pages_free: value("exrail_kv_pages_free")?,
        pages_cached: value("exrail_kv_pages_cached")?,
        pages_quarantined: value("exrail_kv_pages_quarantined")?,
        running: value("exrail_sequences_running")?,
        waiting: value("exrail_sequences_waiting")?,
        generated: value("exrail_generated_tokens_total")?,
        cancelled: value("exrail_sequences_cancelled_total")?,
        panics: value("exrail_engine_panics_total")?,
        kv_faults: value("exrail_kv_faults_total")?,
        audits: value("exrail_kv_audits_total")?,
        prefix_hits: value("exrail_prefix_cache_hits_total")?,
        evictions: value("exrail_prefix_cache_evictions_total")?,
        rotations: value("exrail_rotations_total")?,
        built: built_in(text)?,
    })
}

/// All five counters together.
fn built_in(text: &str) -> Result<u64> {
    let counters = DeviceCounters::default().named();
    let of = |(name, _)| metric(text, &format!("exrail_built_after_fence{{counter=\"{name}\"}}"));
    counters.into_iter().map(of).sum()
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
        let refused = address_in("{\"error\":\"model x: no such file\"}\n").unwrap_err();
        assert_eq!(refused.to_string(), "server: model x: no such file");
    }

    #[test]
    fn a_missing_metric_is_named() {
        let error = gauges_in("exrail_kv_pages_total 9\n").unwrap_err().to_string();
        assert!(error.contains("exrail_kv_pages_free"), "{error}");
        let built = DeviceCounters::default()
            .named()
            .map(|(name, _)| format!("exrail_built_after_fence{{counter=\"{name}\"}} 2\n"));
        assert_eq!(built_in(&built.concat()).unwrap(), 10);
        assert!(built_in(&built[1..].concat()).is_err());
        let labelled = "exrail_x{kind=\"a\"} 3\n";
        assert_eq!(metric(labelled, "exrail_x{kind=\"a\"}").unwrap(), 3);
    }
}
