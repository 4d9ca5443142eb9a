//! The environment variables of this program, and the refusal of one that is nearly one of them (G-11).
//!
//! `EXRAIL_THREAD=4` that nobody reads is worse than an error: the program starts, and not as it was told.
//! What is nowhere near a known name belongs to somebody else, such as a test or a script.

use std::ffi::OsStr;

use anyhow::{Result, bail};

/// How many letters a name may be off to be called a typo (G-11).
const TYPO: usize = 2;

pub(crate) const API_KEYS: &str = "EXRAIL_API_KEYS";
pub(crate) const API_KEY_FILE: &str = "EXRAIL_API_KEY_FILE";
pub(crate) const BOOT_PATIENCE: &str = "EXRAIL_BOOT_PATIENCE";
pub(crate) const DEVICE: &str = "EXRAIL_DEVICE";
pub(crate) const ENCODER: &str = "EXRAIL_ENCODER";
pub(crate) const HOST: &str = "EXRAIL_HOST";
pub(crate) const LOG: &str = "EXRAIL_LOG";
pub(crate) const MANIFEST: &str = "EXRAIL_MANIFEST";
pub(crate) const MEMORY: &str = "EXRAIL_MEMORY";
pub(crate) const MODEL: &str = "EXRAIL_MODEL";
pub(crate) const OFFLINE: &str = "EXRAIL_OFFLINE";
pub(crate) const PORT: &str = "EXRAIL_PORT";
pub(crate) const REGISTRY: &str = "EXRAIL_REGISTRY";
pub(crate) const THREADS: &str = "EXRAIL_THREADS";
pub(crate) const TRACE_LOG: &str = "EXRAIL_TRACE_LOG";

// Those of OpenTelemetry that this program reads, or lets its libraries read.
pub(crate) const OTEL_DISABLED: &str = "OTEL_SDK_DISABLED";
pub(crate) const OTEL_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
pub(crate) const OTEL_HEADERS: &str = "OTEL_EXPORTER_OTLP_HEADERS";
pub(crate) const OTEL_PROTOCOL: &str = "OTEL_EXPORTER_OTLP_PROTOCOL";
pub(crate) const OTEL_SERVICE_NAME: &str = "OTEL_SERVICE_NAME";
pub(crate) const OTEL_TIMEOUT: &str = "OTEL_EXPORTER_OTLP_TIMEOUT";
pub(crate) const OTEL_TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
pub(crate) const OTEL_TRACES_EXPORTER: &str = "OTEL_TRACES_EXPORTER";
pub(crate) const OTEL_TRACES_HEADERS: &str = "OTEL_EXPORTER_OTLP_TRACES_HEADERS";
pub(crate) const OTEL_TRACES_PROTOCOL: &str = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL";
pub(crate) const OTEL_TRACES_TIMEOUT: &str = "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT";

/// All of them: whatever reads a variable takes its name from here.
const KNOWN: [&str; 27] = [
    API_KEYS,
    API_KEY_FILE,
    BOOT_PATIENCE,
    DEVICE,
    ENCODER,
    HOST,
    exrail_hub::HOME_VARIABLE,
    LOG,
    MANIFEST,
    MEMORY,
    MODEL,
    OFFLINE,
    PORT,
    REGISTRY,
    THREADS,
    TRACE_LOG,
    OTEL_DISABLED,
    OTEL_ENDPOINT,
    OTEL_HEADERS,
    OTEL_PROTOCOL,
    OTEL_SERVICE_NAME,
    OTEL_TIMEOUT,
    OTEL_TRACES_ENDPOINT,
    OTEL_TRACES_EXPORTER,
    OTEL_TRACES_HEADERS,
    OTEL_TRACES_PROTOCOL,
    OTEL_TRACES_TIMEOUT,
];

/// Refuses names that are nearly those of this program. Values are never read, let alone printed.
pub(crate) fn refuse_typos<'a>(names: impl Iterator<Item = &'a OsStr>) -> Result<()> {
    let names = names.filter_map(OsStr::to_str);
    let mut typos: Vec<_> = names.filter_map(|name| Some((name, meant(name)?))).collect();
    if typos.is_empty() {
        return Ok(());
    }
    typos.sort_unstable();
    let told = typos.iter().map(|(found, meant)| format!("expected `{meant}`, found `{found}`"));
    let told = told.collect::<Vec<_>>().join("; ");
    bail!("environment: {told}; correct it or unset it")
}

/// The name that was probably meant, if it is another one.
fn meant(name: &str) -> Option<&'static str> {
    // Other names that begin alike are looked at; `exrail_port` is a typo too.
    let upper = name.to_ascii_uppercase();
    if KNOWN.contains(&name) {
        return None;
    }
    let near = KNOWN.iter().map(|known| (distance(&upper, known), *known));
    near.filter(|&(distance, _)| distance <= TYPO).min().map(|(_, known)| known)
}

/// Letters that have to be put in, taken out, replaced or swapped with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > TYPO {
        return TYPO + 1;
    }
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = least;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn refused(names: &[&str]) -> Option<String> {
        refuse_typos(names.iter().map(OsStr::new)).err().map(|error| error.to_string())
    }

    #[test]
    fn a_name_two_letters_off_is_refused_with_the_one_that_was_meant() {
        for (found, meant) in [
            ("EXRAIL_THREAD", "EXRAIL_THREADS"),
            ("EXRAIL_MDOEL", "EXRAIL_MODEL"),
            ("EXRAIL_OFLINE", "EXRAIL_OFFLINE"),
            ("EXRAIL_API_KEYFILE", "EXRAIL_API_KEY_FILE"),
            ("EXARIL_HOME", "EXRAIL_HOME"),
            ("exrail_port", "EXRAIL_PORT"),
        ] {
            let told = refused(&["PATH", found]).unwrap();
            assert!(told.contains(&format!("expected `{meant}`, found `{found}`")), "{told}");
        }
        let both = refused(&["EXRAIL_HOSTS", "EXRAIL_LOGG"]).unwrap();
        assert!(both.contains("EXRAIL_HOST`") && both.contains("EXRAIL_LOG`"), "{both}");
    }

    #[test]
    fn names_of_this_program_and_of_others_pass() {
        assert_eq!(refused(&KNOWN), None);
        // Those of the tests and of the benchmark, and names of nobody.
        let others = [
            "EXRAIL_TEST_GENERATOR",
            "EXRAIL_TEST_ENCODER",
            "EXRAIL_FIDELITY_TEXT",
            "EXRAIL_WRITE_DOCS",
            "EXRAIL_BENCH_MODELS",
            "EXRAIL_LLAMA_BENCH",
            "EXRAIL_SOMETHING_ELSE",
            "PORT",
            "HOME",
        ];
        assert_eq!(refused(&others), None);
    }

    #[test]
    fn every_option_takes_its_name_from_the_list() {
        fn all(command: &clap::Command, visit: &mut dyn FnMut(&clap::Arg)) {
            command.get_arguments().for_each(&mut *visit);
            command.get_subcommands().for_each(|inner| all(inner, visit));
        }
        let mut read = Vec::new();
        all(&crate::Cli::command(), &mut |argument| {
            read.extend(argument.get_env().map(|name| name.to_str().unwrap().to_owned()));
        });
        assert!(read.len() > 10, "{read:?}");
        for name in read {
            assert!(KNOWN.contains(&name.as_str()), "`{name}` is read and not in the list");
        }
    }

    #[test]
    fn nothing_else_in_the_program_names_a_variable() {
        let crates = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        for entry in std::fs::read_dir(crates).unwrap() {
            look_through(&entry.unwrap().path().join("src"));
        }
    }

    /// Panics at a source file that spells the name of a variable itself.
    fn look_through(folder: &std::path::Path) {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                look_through(&path);
            } else if !path.ends_with("cli/src/environment.rs") {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                for (at, _) in text.match_indices("\"EXRAIL_") {
                    let name = text[at + 1..].split('"').next().unwrap();
                    // Where tests find their models; no command reads it.
                    if !name.starts_with("EXRAIL_TEST_") {
                        assert_eq!(name, exrail_hub::HOME_VARIABLE, "{}", path.display());
                    }
                }
            }
        }
    }
}
