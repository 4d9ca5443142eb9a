//! Arguments that exclude each other. A variable of the environment is a default of this machine and excludes nothing, so
//! what counts is the command line alone; clap counts both.

use clap::{ArgMatches, Command, error::ErrorKind, parser::ValueSource};

/// Positional models; each is the same as `--model`.
const MODELS: [&str; 3] = ["diagnosed", "probed", "planned"];
/// What may stand beside `diagnose --compare`, which measures nothing.
const BESIDE_COMPARE: [&str; 3] = ["compare", "under_test", "json"];
/// What may stand beside `gateway --probe`, which serves nobody.
const BESIDE_PROBE: [&str; 4] = ["probe", "upstreams", "upstream_key_file", "json"];

/// Refuses arguments that exclude each other.
///
/// # Errors
/// Which two were given.
pub(crate) fn check(root: &mut Command, matches: &ArgMatches) -> Result<(), clap::Error> {
    root.build();
    let (mut command, mut matches) = (&*root, matches);
    while let Some((name, inner)) = matches.subcommand() {
        let Some(next) = command.find_subcommand(name) else { break };
        (command, matches) = (next, inner);
    }
    let given: Vec<&str> = command
        .get_arguments()
        .map(|argument| argument.get_id().as_str())
        .filter(|id| is_given(command, matches, id))
        .collect();
    let found = excluded(&given);
    let Some((kept, other)) = found else { return Ok(()) };
    let message = format!(
        "the argument '{}' cannot be used with '{}'",
        shown(command, other),
        shown(command, kept)
    );
    Err(command.clone().error(ErrorKind::ArgumentConflict, message))
}

/// The first two of the given arguments that exclude each other.
fn excluded<'a>(given: &[&'a str]) -> Option<(&'a str, &'a str)> {
    let has = |id: &str| given.iter().copied().find(|given| *given == id);
    let alone = [("compare", &BESIDE_COMPARE[..]), ("probe", &BESIDE_PROBE)];
    for (id, beside) in alone {
        if let Some(kept) = has(id) {
            return given.iter().find(|id| !beside.contains(id)).map(|other| (kept, *other));
        }
    }
    Some((MODELS.into_iter().find_map(has)?, has("model")?))
}

fn is_given(command: &Command, matches: &ArgMatches, id: &str) -> bool {
    let is_known = command.get_arguments().any(|argument| argument.get_id() == id);
    is_known && matches.value_source(id) == Some(ValueSource::CommandLine)
}

/// An argument as it is written.
fn shown(command: &Command, id: &str) -> String {
    let argument = command.get_arguments().find(|argument| argument.get_id() == id);
    argument.map_or_else(|| id.to_owned(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::excluded;

    #[test]
    fn nothing_but_its_own_options_stands_beside_a_comparison() {
        assert_eq!(excluded(&["compare", "under_test", "json"]), None);
        assert_eq!(excluded(&["compare", "threads"]), Some(("compare", "threads")));
        assert_eq!(excluded(&["model", "compare"]), Some(("compare", "model")));
    }

    #[test]
    fn a_probe_stands_with_its_upstreams_alone() {
        assert_eq!(excluded(&["upstreams", "probe", "upstream_key_file", "json"]), None);
        assert_eq!(excluded(&["upstreams", "probe", "port"]), Some(("probe", "port")));
        assert_eq!(excluded(&["upstreams", "port"]), None);
    }

    #[test]
    fn a_model_is_named_once() {
        assert_eq!(excluded(&["probed", "threads"]), None);
        assert_eq!(excluded(&["model", "probed"]), Some(("probed", "model")));
    }
}
