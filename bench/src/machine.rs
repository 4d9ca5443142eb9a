//! The machine under measurement: what it is, whether it is idle, what memory a process has.

use std::{
    fs,
    io::{self, Write},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

/// Share of idle time below which a run is not started.
pub(crate) const IDLE_SHARE: f64 = 0.97;

/// Ticks since boot, summed over the cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticks {
    idle: u64,
    /// Given to other guests by the hypervisor while this machine had work.
    stolen: u64,
    total: u64,
}

impl Ticks {
    /// Share of stolen time until `later`, in [0, 1].
    pub(crate) fn stolen_until(self, later: Ticks) -> f64 {
        share(self.stolen, later.stolen, self, later)
    }
}

fn share(before: u64, after: u64, from: Ticks, to: Ticks) -> f64 {
    let total = to.total.saturating_sub(from.total).max(1);
    after.saturating_sub(before) as f64 / total as f64
}

/// What to do with a machine that does not become idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Busy {
    /// Give up: the numbers would mean nothing.
    Refuse,
    /// Go on; the record says how busy it was.
    Accept,
}

/// Waits until a `window` was at least 97 % idle, and returns that window's idle share.
///
/// # Errors
/// Still busy after `patience`, when `busy` refuses that; or no readable `/proc/stat`.
pub(crate) fn wait_until_idle(window: Duration, patience: Duration, busy: Busy) -> Result<f64> {
    let since = Instant::now();
    loop {
        let share = idle_share(window)?;
        if share >= IDLE_SHARE || busy == Busy::Accept {
            return Ok(share);
        }
        ensure!(
            since.elapsed() < patience,
            "machine: expected at least {:.0} % idle, found {:.1} % after {} s; stop other work or \
             pass --force",
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
    Ok(share(before.idle, after.idle, before, after))
}

/// Ticks until now.
///
/// # Errors
/// No readable `/proc/stat`.
pub(crate) fn ticks() -> Result<Ticks> {
    let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    parse_ticks(&text).context("/proc/stat: expected a line `cpu …` of at least 8 numbers")
}

/// Fields of the `cpu` line (proc(5)): user nice system idle iowait irq softirq steal guest
/// guest_nice. Guest time is already part of user and nice.
fn parse_ticks(text: &str) -> Option<Ticks> {
    let line = text.lines().find(|line| line.starts_with("cpu "))?;
    let fields: Vec<u64> = line.split_whitespace().skip(1).map_while(|f| f.parse().ok()).collect();
    let ticks = fields.get(..8)?;
    Some(Ticks { idle: ticks[3] + ticks[4], stolen: ticks[7], total: ticks.iter().sum() })
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

/// Memory of a process in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resident {
    /// Now.
    pub(crate) now_kib: u64,
    /// At its most.
    pub(crate) peak_kib: u64,
}

/// Memory of a process; none when it is gone.
pub(crate) fn resident(pid: u32) -> Option<Resident> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let (now_kib, peak_kib) = (parse_kib(&text, "VmRSS:")?, parse_kib(&text, "VmHWM:")?);
    Some(Resident { now_kib, peak_kib })
}

fn parse_kib(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_time_is_not_counted_twice() {
        let text = "cpu  10 1 5 100 20 2 3 4 7 1\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(parse_ticks(text), Some(Ticks { idle: 120, stolen: 4, total: 145 }));
        assert_eq!(parse_ticks("cpu 1 2 3\n"), None);
    }

    #[test]
    fn shares_are_of_all_time_between_two_looks() {
        let from = Ticks { idle: 10, stolen: 5, total: 100 };
        let to = Ticks { idle: 90, stolen: 15, total: 200 };
        assert_eq!(from.stolen_until(to), 0.1);
        assert_eq!(share(from.idle, to.idle, from, to), 0.8);
        assert_eq!(from.stolen_until(from), 0.0);
    }

    #[test]
    fn resident_memory_is_read_in_kib() {
        assert_eq!(parse_kib("Name:\tx\nVmRSS:\t  130720 kB\n", "VmRSS:"), Some(130_720));
        assert_eq!(parse_kib("Name:\tx\n", "VmRSS:"), None);
    }

    #[test]
    fn this_process_has_resident_memory() {
        let resident = resident(std::process::id()).unwrap();
        assert!(resident.now_kib > 0 && resident.peak_kib >= resident.now_kib);
    }
}
