//! What `docs/ops` and the fix pages say of metrics, error codes and routes, compared with what there is.

use std::{collections::BTreeSet, fs, path::PathBuf, sync::Arc, time::Duration};

use exrail_engine::{
    BucketReport, Counters, EngineState, GrammarCounters, HostCounters, WarmUpReport,
};
use exrail_kernels::DeviceCounters;
use serde_json::Value;

use super::*;
use crate::{boot::BootBoard, swap::Totals, table::ROUTES};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Name and text of each fix page.
fn fix_pages() -> Vec<(String, String)> {
    let folder = fs::read_dir(root().join("packs/stability/fix")).unwrap();
    let paths = folder.map(|entry| entry.unwrap().path());
    let page = |path: PathBuf| {
        (path.file_stem().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(path).unwrap())
    };
    paths.map(page).collect()
}

fn counters() -> Counters {
    Counters {
        state: EngineState::Running,
        sequences_running: 0,
        sequences_waiting: 0,
        pages_total: 0,
        pages_free: 0,
        pages_cached: 0,
        pages_quarantined: 0,
        tokens_prompt: 0,
        tokens_generated: 0,
        steps: 0,
        submitted: 0,
        finished: 0,
        degenerate: 0,
        cancelled: 0,
        failed: 0,
        late: 0,
        panics: 0,
        kv_faults: 0,
        built: DeviceCounters::default(),
        built_after_fence: Some(DeviceCounters::default()),
        kv_audits: 0,
        kv_restarts: 0,
        prefix_hits: 0,
        prefix_misses: 0,
        prefix_evictions: 0,
        host: HostCounters::default(),
        rotations: 0,
        roll_backs: 0,
        grammar: GrammarCounters::default(),
        since_progress: Duration::ZERO,
    }
}

fn warm_up() -> WarmUpReport {
    let bucket = BucketReport {
        n_sequences: 1,
        n_prompt: 64,
        first_token_ms: vec![2.0, 1.0, 1.0],
        inter_token_ms: vec![1.0, 1.0, 1.0],
        cold_ratio: 2.0,
        ready_ratio: 1.0,
    };
    WarmUpReport {
        buckets: vec![bucket],
        cold_ratio: 2.0,
        ready_ratio: 1.0,
        is_warm: true,
        is_stable: true,
        n_tokens: 30,
        built: DeviceCounters::default(),
        took: Duration::from_secs(1),
    }
}

/// All that `/metrics` can tell of a program that injects no faults.
fn exposed() -> String {
    let metrics = Metrics::default();
    metrics.first_token.observe(Duration::from_millis(7));
    let model = ModelStatus {
        name: Arc::from("tiny"),
        state: ModelState::Loaded,
        reason: None,
        running: 0,
        waiting: 0,
        loads: 1,
        failures: 0,
        load_time: Some(Duration::from_secs(1)),
        board: None,
    };
    let lineup =
        Lineup { models: vec![model], loaded: None, stuck: None, totals: Totals::default() };
    let mut text = Text(metrics.render(&BootBoard::new().status(), Some(&lineup)));
    engine_lines(&mut text, &counters());
    warm_up_lines(&mut text, &warm_up());
    text.0 + &tool_circuits(&[("tiny".to_owned(), false)]) + &spans(Some(SpanCounts::default()))
}

/// Names of the families, as their heads say.
fn families() -> BTreeSet<String> {
    let text = exposed();
    let heads = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    heads.map(|head| head.split(' ').next().unwrap().to_owned()).collect()
}

/// The words of a text that are names of metrics, each as its family: a histogram's series are parts of it.
fn named_in(text: &str, families: &BTreeSet<String>) -> BTreeSet<String> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let names = words.filter(|word| word.starts_with("exrail_"));
    let family = |name: &str| {
        let parts = ["_bucket", "_sum", "_count"].iter().filter_map(|it| name.strip_suffix(it));
        let whole = parts.into_iter().find(|whole| families.contains(*whole));
        whole.unwrap_or(name).to_owned()
    };
    names.map(family).collect()
}

/// Expressions of all panels.
fn expressions(dashboard: &Value) -> String {
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
    targets.map(|target| target["expr"].as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_family_has_a_panel_and_every_panel_a_family() {
    let families = families();
    assert!(families.len() > 60, "{families:?}");
    let dashboard: Value = serde_json::from_str(&read("docs/ops/dashboard.json")).unwrap();
    let shown = named_in(&expressions(&dashboard), &families);
    assert_eq!(shown, families, "left is the dashboard, right what the server exposes");
    let rows = dashboard["panels"].as_array().unwrap().iter().filter(|it| it["type"] == "row");
    let titles: Vec<&str> = rows.map(|row| row["title"].as_str().unwrap()).collect();
    let expected = ["Traffic", "Latency", "Cache", "Guards", "Grounded answers", "Boot and models"];
    assert_eq!(titles, expected);
}

#[test]
fn every_alert_is_of_metrics_that_are_exposed_and_names_a_page() {
    let (alerts, families) = (read("docs/ops/alerts.yml"), families());
    let named = named_in(&alerts, &families);
    assert!(named.len() > 15, "{named:?}");
    assert!(named.is_subset(&families), "unknown: {:?}", &named - &families);
    let values = |key: &str| -> Vec<String> {
        let lines = alerts.lines().filter_map(|line| line.trim_start().strip_prefix(key));
        lines.map(|value| value.trim().trim_matches('"').to_owned()).collect()
    };
    let (names, runbooks) = (values("- alert:"), values("runbook:"));
    assert_eq!(names.len(), runbooks.len(), "one runbook an alert");
    let pages: BTreeSet<String> = fix_pages().into_iter().map(|(name, _)| name).collect();
    for (name, runbook) in names.iter().zip(&runbooks) {
        let page = runbook.strip_prefix("exrail fix ").unwrap_or_default();
        assert!(pages.contains(page), "{name}: {runbook}");
    }
    let tests = read("docs/ops/alerts.test.yml");
    let tested = tests.split("alertname: ").skip(1);
    let tested = tested.map(|it| it.split([',', '\n']).next().unwrap().trim());
    tested.for_each(|name| assert!(names.iter().any(|it| it == name), "{name}"));
}

#[test]
fn every_guard_in_an_alert_is_one_that_is_counted() {
    let sources = [
        "server/src/error.rs",
        "server/src/structured/settle.rs",
        "verify/src/ask.rs",
        "verify/src/steps.rs",
    ];
    let sources: String = sources.iter().map(|it| read(&format!("crates/{it}"))).collect();
    let dashboard = read("docs/ops/dashboard.json").replace('\\', "");
    let pages: String = fix_pages().into_iter().map(|(_, text)| text).collect();
    let texts = [read("docs/ops/alerts.yml"), dashboard, pages].concat();
    let mut n_guards = 0;
    for part in texts.split("guard=").skip(1) {
        let quoted = part.split('"').nth(1).unwrap();
        for guard in quoted.split('|') {
            assert!(sources.contains(&format!("\"{guard}\"")), "{guard}");
            n_guards += 1;
        }
    }
    assert!(n_guards > 15, "{n_guards}");
}

/// Parts between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2))
}

#[test]
fn fix_pages_name_metrics_codes_and_routes_that_there_are() {
    let families = families();
    // Fields of answers and the files of a boot begin alike.
    let fields = ["exrail_finish_reason", "exrail_tainted", "exrail_dedupe_key"];
    let errors = read("crates/server/src/error.rs");
    let mut n_checked = 0;
    for (page, text) in fix_pages() {
        for name in named_in(&text, &families) {
            let is_there = families.contains(&name) || fields.contains(&&*name);
            assert!(is_there, "{page}: {name}");
            n_checked += 1;
        }
        let codes = text.split(" `").zip(text.split(" `").skip(1)).filter_map(|(before, after)| {
            let status = before.rsplit(|it: char| !it.is_ascii_digit()).next()?;
            (status.len() == 3).then(|| after.split('`').next()).flatten()
        });
        for code in codes {
            // `/livez` tells a state beside its 503.
            let is_state = ["stuck", "stalled", "faulted"].contains(&code);
            assert!(is_state || errors.contains(&format!("\"{code}\"")), "{page}: {code}");
            n_checked += 1;
        }
        let paths = quoted(&text).filter(|it| it.starts_with("/v1/") || it.ends_with("ez"));
        for path in paths.filter(|it| it.starts_with('/')) {
            assert!(ROUTES.iter().any(|route| route.path == path), "{page}: {path}");
            n_checked += 1;
        }
    }
    assert!(n_checked > 100, "{n_checked}");
}
