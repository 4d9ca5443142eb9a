//! The JSON-Schema-Test-Suite and a sample of MaskBench, from schema to answer: screened, compiled, walked, validated.
//! No invalid instance may pass. What else comes out may only get better; see `ratchet/`.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{accepts, schema};
use llguidance::ParserFactory;
use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

fn folder(variable: &str) -> PathBuf {
    let value = std::env::var_os(variable);
    value.unwrap_or_else(|| panic!("{variable} is not set: run through make test")).into()
}

fn read(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries =
        std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|it| it == "json") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// What became of the instances of some schemas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    valid_accepted: u64,
    valid_lost: u64,
    valid_refused: u64,
    invalid_rejected: u64,
    invalid_refused: u64,
}

impl Counts {
    fn to_json(self) -> Value {
        json!({
            "valid_accepted": self.valid_accepted,
            "valid_lost": self.valid_lost,
            "valid_refused": self.valid_refused,
            "invalid_rejected": self.invalid_rejected,
            "invalid_refused": self.invalid_refused,
        })
    }
}

/// Runs the instances of one schema and counts. Texts of invalid ones that passed are returned.
fn run(written: &Value, tests: &[(String, bool)], counts: &mut Counts) -> Vec<String> {
    let mut passed = Vec::new();
    let grammar = schema(written);
    for (text, valid) in tests {
        match (&grammar, valid) {
            (Err(_), true) => counts.valid_refused += 1,
            (Err(_), false) => counts.invalid_refused += 1,
            (Ok(grammar), true) if accepts(grammar, text) => counts.valid_accepted += 1,
            (Ok(_), true) => counts.valid_lost += 1,
            (Ok(grammar), false) if accepts(grammar, text) => passed.push(text.clone()),
            (Ok(_), false) => counts.invalid_rejected += 1,
        }
    }
    passed
}

fn instances(tests: &Value) -> Vec<(String, bool)> {
    let tests = tests.as_array().unwrap().iter();
    tests
        .map(|test| (exrail_grammar::written(&test["data"]), test["valid"].as_bool().unwrap()))
        .collect()
}

/// Runs a draft and compares it with its ratchet; `EXRAIL_WRITE_RATCHET=1` writes that instead.
fn draft(name: &str, uri: &str) {
    let folder = folder("EXRAIL_TEST_JSON_SCHEMA_SUITE").join("tests").join(name);
    let mut found = BTreeMap::new();
    let mut wrong = Vec::new();
    for path in files(&folder) {
        let mut counts = Counts::default();
        for group in read(&path).as_array().unwrap() {
            let mut written = group["schema"].clone();
            if let Value::Object(written) = &mut written
                && !written.contains_key("$schema")
            {
                written.insert("$schema".into(), uri.into());
            }
            let passed = run(&written, &instances(&group["tests"]), &mut counts);
            wrong.extend(
                passed
                    .into_iter()
                    .map(|it| format!("{}: {}: {it}", path.display(), group["schema"])),
            );
        }
        let file = path.strip_prefix(&folder).unwrap().to_string_lossy().into_owned();
        found.insert(file, counts.to_json());
    }
    assert!(wrong.is_empty(), "{} invalid instances passed:\n{}", wrong.len(), wrong.join("\n"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/ratchet/{name}.json"));
    let found = json!(found);
    if std::env::var_os("EXRAIL_WRITE_RATCHET").is_some() {
        std::fs::write(path, format!("{found:#}\n")).unwrap();
        return;
    }
    let expected = read(&path);
    for (file, expected) in expected.as_object().unwrap() {
        assert_eq!(
            &found[file], expected,
            "{name}/{file}: found on the left, ratchet on the right"
        );
    }
    assert_eq!(found.as_object().unwrap().len(), expected.as_object().unwrap().len());
}

#[test]
fn draft_3_is_refused_by_name_and_passes_nothing_invalid() {
    draft("draft3", "http://json-schema.org/draft-03/schema#");
}

#[test]
fn draft_4_passes_nothing_invalid() {
    draft("draft4", "http://json-schema.org/draft-04/schema#");
}

#[test]
fn draft_6_passes_nothing_invalid() {
    draft("draft6", "http://json-schema.org/draft-06/schema#");
}

#[test]
fn draft_7_passes_nothing_invalid() {
    draft("draft7", "http://json-schema.org/draft-07/schema#");
}

#[test]
fn draft_2019_09_passes_nothing_invalid() {
    draft("draft2019-09", "https://json-schema.org/draft/2019-09/schema");
}

#[test]
fn draft_2020_12_passes_nothing_invalid() {
    draft("draft2020-12", "https://json-schema.org/draft/2020-12/schema");
}

/// Whether llguidance alone, with its defaults, takes a text.
fn alone(factory: &ParserFactory, written: &Value, tests: &[(String, bool)]) -> u64 {
    let grammar = TopLevelGrammar::from_json_schema(written.clone());
    let Ok(parser) = factory.create_parser(grammar) else { return 0 };
    let start = llguidance::Matcher::new(Ok(parser));
    let valid = tests.iter().filter(|it| it.1);
    let accepted = valid.filter(|(text, _)| {
        let mut matcher = start.deep_clone();
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        matcher.try_consume_tokens(&ids).is_ok_and(|n_taken| n_taken == ids.len())
            && matcher.is_accepting().unwrap_or(false)
    });
    accepted.count() as u64
}

#[test]
fn maskbench_passes_nothing_invalid_and_no_less_valid_than_llguidance_alone() {
    let mut factory =
        ParserFactory::new_simple(&toktrie::ApproximateTokEnv::single_byte_env()).unwrap();
    factory.quiet();
    let mut counts = Counts::default();
    let (mut n_alone, mut n_clean, mut n_schemas) = (0, 0, 0);
    let mut wrong = Vec::new();
    let mut refused = BTreeMap::new();
    for path in files(&folder("EXRAIL_TEST_MASKBENCH")) {
        let case = read(&path);
        let tests = instances(&case["tests"]);
        let before = counts;
        let passed = run(&case["schema"], &tests, &mut counts);
        wrong.extend(passed.into_iter().map(|it| format!("{}: {it}", path.display())));
        n_alone += alone(&factory, &case["schema"], &tests);
        n_schemas += 1;
        let is_clean = counts.valid_lost == before.valid_lost
            && counts.valid_refused == before.valid_refused
            && counts.invalid_refused == before.invalid_refused;
        n_clean += u64::from(is_clean);
        if let Err(error) = schema(&case["schema"]) {
            refused.insert(
                path.file_name().unwrap().to_string_lossy().into_owned(),
                error.to_string(),
            );
        }
    }
    assert!(wrong.is_empty(), "{} invalid instances passed:\n{}", wrong.len(), wrong.join("\n"));
    let found = format!(
        "{n_clean} of {n_schemas} clean, alone {n_alone}, {counts:?}, refused: {refused:#?}"
    );
    if std::env::var_os("EXRAIL_SHOW").is_some() {
        panic!("{found}");
    }
    assert!(n_schemas > 300, "{found}");
    assert!(counts.valid_accepted >= n_alone, "{found}");
    assert!(n_clean * 100 >= n_schemas * 87, "{found}");
}
