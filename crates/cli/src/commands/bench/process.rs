//! What the system tells of this process and this machine.

use std::{fs, path::Path, thread};

use serde::{Deserialize, Serialize};

/// Memory of a process in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::commands) struct Resident {
    /// Now (`VmRSS`).
    pub(in crate::commands) now: u64,
    /// At its most (`VmHWM`).
    pub(super) peak: u64,
    /// What is no page of a file (`RssAnon`): all but the program's own code.
    pub(super) anonymous: u64,
}

/// Memory of this process; none where the system has no `/proc/self/status`.
pub(super) fn resident() -> Option<Resident> {
    resident_of("self")
}

/// Memory of a process by its number; none when it is gone.
pub(in crate::commands) fn resident_of(process: &str) -> Option<Resident> {
    parse_resident(&fs::read_to_string(format!("/proc/{process}/status")).ok()?)
}

fn parse_resident(status: &str) -> Option<Resident> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(Resident { now: field("VmRSS:")?, peak: field("VmHWM:")?, anonymous: field("RssAnon:")? })
}

/// The machine. What the system does not tell is absent, never guessed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(in crate::commands) struct Machine {
    /// Name of the processor.
    processor: Option<String>,
    /// Vector extensions that matter to kernels, of those that the processor has.
    flags: Vec<String>,
    /// Logical cores that this process may use.
    cores: usize,
    /// Name and release of the kernel.
    kernel: Option<String>,
    /// Memory of the machine in bytes.
    memory_bytes: Option<u64>,
}

/// Extensions that some kernel of this or another engine uses.
const FLAGS: [&str; 16] = [
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "asimddp",
    "i8mm",
];

pub(in crate::commands) fn machine() -> Machine {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |path| fs::read_to_string(path).ok().map(|text: String| text.trim().to_owned());
    let kernel = line("/proc/sys/kernel/ostype").zip(line("/proc/sys/kernel/osrelease"));
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Machine {
        processor: value(&cpu, "model name").map(str::to_owned),
        flags: flags(value(&cpu, "flags").or_else(|| value(&cpu, "Features")).unwrap_or_default()),
        cores: thread::available_parallelism().map_or(1, usize::from),
        kernel: kernel.map(|(name, release)| format!("{name} {release}")),
        memory_bytes: value(&memory, "MemTotal").and_then(|text| {
            text.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
        }),
    }
}

/// The value of the first line `key : value`.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(name, value)| (name.trim(), value.trim())).find(|pair| pair.0 == key).map(|p| p.1)
}

fn flags(all: &str) -> Vec<String> {
    let has = |flag: &&str| all.split_whitespace().any(|found| found == *flag);
    FLAGS.iter().filter(|flag| has(flag)).map(|&flag| flag.to_owned()).collect()
}

/// A path cut to its last part: a record names no folder of a machine.
pub(in crate::commands) fn last_part(path: &str) -> String {
    let name = Path::new(path).file_name();
    name.map_or_else(|| path.to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_system_are_read_and_missing_ones_are_absent() {
        let status = "Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\nRssAnon:\t 512 kB\n";
        let expected = Resident { now: 1 << 20, peak: 2 << 20, anonymous: 1 << 19 };
        assert_eq!(parse_resident(status), Some(expected));
        assert_eq!(parse_resident("VmRSS:\t 1 kB\n"), None);
        let cpu = "processor\t: 0\nmodel name\t: A: B\nflags\t\t: fpu avx2 avx512_vnni avx2x\n";
        assert_eq!(value(cpu, "model name"), Some("A: B"));
        assert_eq!(value(cpu, "MemTotal"), None);
        assert_eq!(flags(value(cpu, "flags").unwrap()), ["avx2", "avx512_vnni"]);
        assert_eq!(last_part("/a/b/c.gguf"), "c.gguf");
    }
}
