//! How much memory there is, and what is said when it is not enough.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::anyhow;
use exrail_engine::{Change, EngineError, Free};
use exrail_kernels::KvDtype;
use exrail_tensor::IntGrid;

/// Why the system's free memory is not known.
pub(crate) const UNKNOWN: &str =
    "free memory: expected MemAvailable in /proc/meminfo, found none; give it with --memory";

/// Memory that was given by `--memory`.
pub(crate) fn given(bytes: usize) -> Free {
    Free { bytes, basis: "--memory".into() }
}

/// What the system can give without swapping, within the limits of this process's control groups.
pub(crate) fn of_system() -> Option<Free> {
    free_in(Path::new("/"))
}

/// The same of a system whose files are below `root`.
fn free_in(root: &Path) -> Option<Free> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let available = Free { bytes: kib.checked_mul(1024)?, basis: "MemAvailable".into() };
    let limited = cgroups(root).into_iter().filter_map(|group| room(&group));
    Some(limited.fold(available, |least, room| if room.bytes < least.bytes { room } else { least }))
}

/// Folders of the control group of this process and of those around it (version 2).
fn cgroups(root: &Path) -> Vec<PathBuf> {
    let own = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Vec::new();
    };
    let mount = root.join("sys/fs/cgroup");
    let own = mount.join(path);
    own.ancestors().take_while(|folder| folder.starts_with(&mount)).map(Path::to_owned).collect()
}

/// What a control group leaves; nothing if it has no limit. Pages of files are given back when memory is
/// needed, and do not count.
fn room(group: &Path) -> Option<Free> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<usize>().ok();
    let (limit, used) = (number("memory.max")?, number("memory.current")?);
    let stat = read("memory.stat").unwrap_or_default();
    let files = stat.lines().filter_map(|line| {
        let (name, bytes) = line.split_once(' ')?;
        matches!(name, "active_file" | "inactive_file").then(|| bytes.parse::<usize>().ok())?
    });
    let used = used.saturating_sub(files.sum());
    let bytes = limit.saturating_sub(used);
    Some(Free { bytes, basis: "memory.max of the control group".into() })
}

/// Reads `24GiB`, `512MiB`, `1.5G` or a number of bytes; K, M, G and T are powers of 1024.
pub(crate) fn parse(text: &str) -> Result<usize, String> {
    let wrong = || format!("expected a size such as 24GiB or 512MiB, found `{text}`");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let value: f64 = number.parse().map_err(|_| wrong())?;
    let bytes = value * (1_u64 << shift) as f64;
    // A number of bytes below 2^53 is exact.
    if (0.0..9e15).contains(&bytes) { Ok(bytes as usize) } else { Err(wrong()) }
}

/// The options that make a change.
pub(crate) fn options_of(change: &Change) -> String {
    let Change { quant, kv_dtype, max_context, kv_pages, .. } = *change;
    let quant = quant.map(|grid| match grid {
        IntGrid::Int4 => "--quant int4".to_owned(),
        IntGrid::Int8 => "--quant int8".to_owned(),
    });
    let kv = kv_dtype.map(|dtype| match dtype {
        KvDtype::F32 => "--kv f32".to_owned(),
        KvDtype::F16 => "--kv f16".to_owned(),
        KvDtype::Int8 => "--kv int8".to_owned(),
    });
    let context = max_context.map(|n| format!("--max-context {n}"));
    let pages = kv_pages.map(|n| format!("--kv-pages {n}"));
    [quant, kv, context, pages].into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// What a refusal for want of memory says besides: the options that make it fit, and where to look.
pub(crate) fn refused(error: EngineError) -> anyhow::Error {
    let EngineError::DoesNotFit(reason) = &error else { return error.into() };
    let options = reason.change.as_ref().map(options_of);
    let options = options.map_or_else(String::new, |options| format!(": {options}"));
    anyhow!("{reason}{options}; {TABLE}")
}

/// The same of a command without these options.
pub(crate) fn refused_without_options(error: EngineError) -> anyhow::Error {
    let EngineError::DoesNotFit(reason) = &error else { return error.into() };
    anyhow!("{reason}; {TABLE}")
}

const TABLE: &str = "`exrail plan MODEL` shows the table";

#[cfg(test)]
mod tests {
    use super::*;

    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal:  16 kB\nMemFree:  1 kB\nMemAvailable:    8 kB\n");

    #[test]
    fn free_is_what_is_available_within_the_tightest_group() {
        assert_eq!(free_in(system(&[]).path()), None);
        let alone = system(&[MEMINFO]);
        let available = Free { bytes: 8192, basis: "MemAvailable".into() };
        assert_eq!(free_in(alone.path()), Some(available.clone()));
        let own = ("proc/self/cgroup", "0::/a/b\n");
        let stat = ("sys/fs/cgroup/a/b/memory.stat", "anon 9\ninactive_file 100\nactive_file 50\n");
        let current = ("sys/fs/cgroup/a/b/memory.current", "1150\n");
        let group = |limit| {
            let limit = ("sys/fs/cgroup/a/b/memory.max", limit);
            free_in(system(&[MEMINFO, own, stat, current, limit]).path()).unwrap()
        };
        // 4000 less 1150, of which 150 are pages of files.
        assert_eq!(group("4000\n").bytes, 3000);
        assert_eq!(group("900\n").bytes, 0);
        assert_eq!(group("max\n"), available);
        let around = [
            MEMINFO,
            own,
            ("sys/fs/cgroup/a/memory.max", "500"),
            ("sys/fs/cgroup/a/memory.current", "100"),
        ];
        assert_eq!(free_in(system(&around).path()).unwrap().bytes, 400);
    }

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, bytes) in [
            ("24GiB", 24 << 30),
            ("512MiB", 512 << 20),
            ("1.5g", 3 << 29),
            ("77", 77),
            ("2K", 2048),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "-1", "1.5.2G", "24GB", "1e9", "9999999T"] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(&format!("found `{text}`")), "{error}");
        }
    }

    #[test]
    fn a_change_is_told_as_options() {
        let change = Change {
            quant: Some(IntGrid::Int4),
            kv_dtype: Some(KvDtype::Int8),
            max_context: Some(512),
            ..Change::default()
        };
        assert_eq!(options_of(&change), "--quant int4 --kv int8 --max-context 512");
        assert_eq!(options_of(&Change { kv_pages: Some(7), ..Change::default() }), "--kv-pages 7");
    }
}
