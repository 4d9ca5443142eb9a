//! The machine under measurement: what it is, whether it is idle, how fast it reads memory.

use std::{
    fs,
    hint::black_box,
    io::{self, Write},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

/// Share of idle time below which a run is not started.
const IDLE_SHARE: f64 = 0.97;

/// Bytes that the bandwidth measurement reads: far more than a last-level cache holds.
const BANDWIDTH_BYTES: usize = 512 << 20;

/// Ticks since boot, summed over the cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ticks {
    idle: u64,
    total: u64,
}

/// What to do with a machine that does not become idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Busy {
    /// Give up: the numbers would mean nothing.
    Refuse,
    /// Go on; the record says how busy it was.
    Accept,
}

/// Waits until one second was at least 97 % idle, and returns that second's idle share.
///
/// # Errors
/// Still busy after `patience`, when `busy` refuses that; or no readable `/proc/stat`.
pub(crate) fn wait_until_idle(patience: Duration, busy: Busy) -> Result<f64> {
    let since = Instant::now();
    loop {
        let share = idle_share(Duration::from_secs(1))?;
        if share >= IDLE_SHARE || busy == Busy::Accept {
            return Ok(share);
        }
        ensure!(
            since.elapsed() < patience,
            "machine: expected at least {:.0} % idle, found {:.1} % after {} s; stop other work or \
             pass --allow-busy",
            IDLE_SHARE * 100.0,
            share * 100.0,
            since.elapsed().as_secs()
        );
        writeln!(io::stderr(), "waiting for an idle machine: {:.1} % idle", share * 100.0)?;
    }
}

/// Share of idle time of all cores over `window`, in [0, 1].
fn idle_share(window: Duration) -> Result<f64> {
    let before = ticks()?;
    thread::sleep(window);
    let after = ticks()?;
    let total = after.total.saturating_sub(before.total).max(1);
    Ok(after.idle.saturating_sub(before.idle) as f64 / total as f64)
}

fn ticks() -> Result<Ticks> {
    let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    parse_ticks(&text).context("/proc/stat: expected a line `cpu …` of at least 8 numbers")
}

/// Fields of the `cpu` line (proc(5)): user nice system idle iowait irq softirq steal guest
/// guest_nice. Guest time is already part of user and nice.
fn parse_ticks(text: &str) -> Option<Ticks> {
    let line = text.lines().find(|line| line.starts_with("cpu "))?;
    let fields: Vec<u64> = line.split_whitespace().skip(1).map_while(|f| f.parse().ok()).collect();
    let ticks = fields.get(..8)?;
    Some(Ticks { idle: ticks[3] + ticks[4], total: ticks.iter().sum() })
}

/// Name of the processor.
pub(crate) fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or("unknown").to_owned()
}

/// Cores that this process may use.
pub(crate) fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// The commit, with `-dirty` when tracked files differ from it; `unknown` outside a checkout.
pub(crate) fn commit() -> String {
    let output =
        Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        Ok(_) | Err(_) => "unknown".to_owned(),
    }
}

/// Bytes per second that `n_threads` threads read from memory, best of five passes.
pub(crate) fn read_bandwidth(n_threads: usize) -> f64 {
    let words = vec![1u64; BANDWIDTH_BYTES / size_of::<u64>()];
    let part = words.len().div_ceil(n_threads.max(1));
    let pass = || {
        let since = Instant::now();
        thread::scope(|scope| {
            for part in words.chunks(part) {
                scope.spawn(|| black_box(sum(part)));
            }
        });
        BANDWIDTH_BYTES as f64 / since.elapsed().as_secs_f64()
    };
    (0..5).map(|_| pass()).fold(0.0, f64::max)
}

/// Eight independent sums, so that the loads are the limit and not the additions.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 8];
    for eight in words.as_chunks::<8>().0 {
        for (sum, word) in sums.iter_mut().zip(eight) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// Resident memory of a process, in KiB.
///
/// # Errors
/// The process is gone.
pub(crate) fn resident_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    parse_resident(&text).with_context(|| format!("{path}: expected a line `VmRSS: … kB`"))
}

fn parse_resident(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_time_is_not_counted_twice() {
        let text = "cpu  10 1 5 100 20 2 3 4 7 1\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(parse_ticks(text), Some(Ticks { idle: 120, total: 145 }));
        assert_eq!(parse_ticks("cpu 1 2 3\n"), None);
    }

    #[test]
    fn resident_memory_is_read_in_kib() {
        assert_eq!(parse_resident("Name:\tx\nVmRSS:\t  130720 kB\n"), Some(130_720));
        assert_eq!(parse_resident("Name:\tx\n"), None);
    }

    #[test]
    fn this_process_has_resident_memory() {
        assert!(resident_kib(std::process::id()).unwrap() > 0);
    }
}
