//! `/metrics` in the Prometheus text format.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use exrail_engine::{BucketReport, InjectedFaults, WarmUpReport};
use exrail_verify::LiveChecks;

use crate::{
    boot::{BootState, BootStatus},
    otlp::SpanCounts,
    swap::{Lineup, ModelState, ModelStatus},
};

/// Upper bounds of the latency buckets, in seconds.
const BUCKETS_S: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// The same for what is done beside an answer.
const SHORT_BUCKETS_S: [f64; 10] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1];

/// A histogram of seconds.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: [f64; BUCKETS_S.len()],
    buckets: [AtomicU64; BUCKETS_S.len()],
    count: AtomicU64,
    sum_us: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new(BUCKETS_S)
    }
}

impl Histogram {
    fn new(bounds: [f64; BUCKETS_S.len()]) -> Self {
        let (buckets, count, sum_us) = <_>::default();
        Self { bounds, buckets, count, sum_us }
    }

    pub(crate) fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        for (bucket, bound) in self.buckets.iter().zip(self.bounds) {
            if seconds <= bound {
                bucket.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.sum_us.fetch_add(micros, Ordering::Relaxed);
    }

    fn render(&self, text: &mut Text, name: &str, help: &str) {
        text.head(name, "histogram", help);
        for (bucket, bound) in self.buckets.iter().zip(self.bounds) {
            let count = bucket.load(Ordering::Relaxed);
            text.line(&format!("{name}_bucket{{le=\"{bound}\"}}"), count);
        }
        let count = self.count.load(Ordering::Relaxed);
        text.line(&format!("{name}_bucket{{le=\"+Inf\"}}"), count);
        let sum = Duration::from_micros(self.sum_us.load(Ordering::Relaxed)).as_secs_f64();
        text.line(&format!("{name}_sum"), sum);
        text.line(&format!("{name}_count"), count);
    }
}

/// What the server counts itself; the engine counts the rest.
#[derive(Debug)]
pub(crate) struct Metrics {
    requests: Mutex<BTreeMap<(String, u16), u64>>,
    guards: Mutex<BTreeMap<String, u64>>,
    /// Request received to first token.
    pub(crate) first_token: Histogram,
    /// Sum and number of the values of each check of answers.
    checks: Mutex<BTreeMap<&'static str, (f64, u64)>>,
    check_time: Histogram,
    embedding_time: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let short = || Histogram::new(SHORT_BUCKETS_S);
        Self {
            requests: Mutex::default(),
            guards: Mutex::default(),
            first_token: Histogram::default(),
            checks: Mutex::default(),
            check_time: short(),
            embedding_time: short(),
        }
    }
}

impl Metrics {
    /// Counts a response; `route` is the route's pattern, never a path that a client invents.
    pub(crate) fn count_request(&self, route: &str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((route.into(), status)).or_default() += 1;
    }

    /// Counts a guard that fired.
    pub(crate) fn count_guard(&self, guard: &str) {
        let mut guards = self.guards.lock().unwrap_or_else(PoisonError::into_inner);
        *guards.entry(guard.into()).or_default() += 1;
    }

    /// Counts what was checked of an answer; a check without a value is not counted.
    pub(crate) fn count_checks(&self, checked: &LiveChecks) {
        let mut checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, value) in [
            ("citation_recall", checked.citation_recall),
            ("citation_precision", checked.citation_precision),
            ("span_containment", checked.span_containment),
            ("answer_containment", checked.answer_containment),
            ("ds_ac", checked.ds_ac.value()),
        ] {
            let Some(value) = value else { continue };
            let (sum, count) = checks.entry(name).or_default();
            *sum += value;
            *count += 1;
        }
        self.check_time.observe(checked.took);
        if let Some(took) = checked.embedding_took {
            self.embedding_time.observe(took);
        }
    }

    fn check_lines(&self, text: &mut Text) {
        let name = "exrail_answer_check";
        text.head(name, "summary", "What was checked of answers, by check; ds_ac is a distance.");
        for (check, (sum, count)) in &*self.checks.lock().unwrap_or_else(PoisonError::into_inner) {
            text.line(&format!("{name}_sum{{check=\"{check}\"}}"), sum);
            text.line(&format!("{name}_count{{check=\"{check}\"}}"), count);
        }
        let help = "Comparisons of one answer with what it cites.";
        self.check_time.render(text, "exrail_answer_check_seconds", help);
        let help = "Vectors of one answer and of the snippets that it is the first to cite.";
        self.embedding_time.render(text, "exrail_answer_embedding_seconds", help);
    }

    pub(crate) fn render(&self, boot: &BootStatus, lineup: Option<&Lineup>) -> String {
        let mut text = Text::default();
        let ready = matches!(boot.state, BootState::Ready { .. });
        text.head("exrail_ready", "gauge", "1 when requests are served.");
        text.line("exrail_ready", u8::from(ready));
        text.head("exrail_boot_phase_seconds", "gauge", "Time of each boot phase that ended.");
        for record in &boot.phases {
            let labels = format!("phase=\"{}\",ok=\"{}\"", record.phase.name(), record.ok);
            let name = format!("exrail_boot_phase_seconds{{{labels}}}");
            text.line(&name, record.took.as_secs_f64());
        }
        text.head("exrail_http_requests_total", "counter", "Responses by route and status.");
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        for ((route, status), count) in &*requests {
            let labels = format!("route=\"{route}\",status=\"{status}\"");
            text.line(&format!("exrail_http_requests_total{{{labels}}}"), count);
        }
        text.head("exrail_guard_fired_total", "counter", "Guards that fired.");
        let guards = self.guards.lock().unwrap_or_else(PoisonError::into_inner);
        for (guard, count) in &*guards {
            text.line(&format!("exrail_guard_fired_total{{guard=\"{guard}\"}}"), count);
        }
        self.first_token.render(
            &mut text,
            "exrail_time_to_first_token_seconds",
            "Request received to first token.",
        );
        self.check_lines(&mut text);
        let Some(lineup) = lineup else { return text.0 };
        model_lines(&mut text, lineup);
        let Some(services) = &lineup.loaded else { return text.0 };
        engine_lines(&mut text, &services.engine.counters());
        if let Some(report) = &services.warm_up {
            warm_up_lines(&mut text, report);
        }
        text.0
    }
}

/// The generators; what follows is of the one that is loaded, and begins anew with each.
fn model_lines(text: &mut Text, lineup: &Lineup) {
    let mut of_each = |name: &str, kind, help, value: &dyn Fn(&ModelStatus) -> Option<f64>| {
        let name = format!("exrail_model_{name}");
        text.head(&name, kind, help);
        for status in &lineup.models {
            if let Some(value) = value(status) {
                text.line(&format!("{name}{{model=\"{}\"}}", label(&status.name)), value);
            }
        }
    };
    let loads = "Loads of the model, the first one included.";
    of_each("loads_total", "counter", loads, &|it| Some(it.loads as f64));
    let failures = "Loads of the model that failed.";
    of_each("load_failures_total", "counter", failures, &|it| Some(it.failures as f64));
    let last = "Time of the model's last load, without the wait for its place.";
    of_each("load_seconds", "gauge", last, &|it| it.load_time.map(|time| time.as_secs_f64()));
    let running = "Requests that use the model.";
    of_each("requests_running", "gauge", running, &|it| Some(it.running as f64));
    let waiting = "Requests that wait until the model is loaded.";
    of_each("requests_waiting", "gauge", waiting, &|it| Some(it.waiting as f64));
    text.head("exrail_model_state", "gauge", "1 for the state that the model is in.");
    for status in &lineup.models {
        for state in ModelState::ALL {
            let labels = format!("model=\"{}\",state=\"{}\"", label(&status.name), state.name());
            let name = format!("exrail_model_state{{{labels}}}");
            text.line(&name, u8::from(status.state == state));
        }
    }
    let totals = lineup.totals;
    let mut total = |name: &str, help: &str, value: f64| {
        let name = format!("exrail_model_{name}_total");
        text.head(&name, "counter", help);
        text.line(&name, value);
    };
    total("swaps", "Models that gave their place to another.", totals.swaps as f64);
    total("idle_unloads", "Models unloaded because nobody asked.", totals.idle_unloads as f64);
    total("cut_requests", "Requests that outlasted their model.", totals.cut as f64);
    total("refused_requests", "Requests that were not let wait.", totals.refused as f64);
    total("load_seconds", "Time of all loads.", totals.load_time.as_secs_f64());
}

/// A name as the value of a label.
fn label(name: &str) -> String {
    name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn engine_lines(text: &mut Text, counters: &exrail_engine::Counters) {
    let mut metric = |name: &str, kind, help, value: u64| {
        let name = format!("exrail_{name}");
        text.head(&name, kind, help);
        text.line(&name, value);
    };
    metric(
        "sequences_running",
        "gauge",
        "Sequences in the batch.",
        counters.sequences_running as u64,
    );
    metric(
        "sequences_waiting",
        "gauge",
        "Sequences in the queue.",
        counters.sequences_waiting as u64,
    );
    metric("kv_pages_total", "gauge", "Pages of the KV pool.", counters.pages_total as u64);
    metric(
        "kv_pages_free",
        "gauge",
        "Pages of the KV pool that nobody holds, with those kept for their content.",
        counters.pages_free as u64,
    );
    metric(
        "kv_pages_cached",
        "gauge",
        "Free pages that are kept for their content.",
        counters.pages_cached as u64,
    );
    metric(
        "kv_pages_quarantined",
        "gauge",
        "Pages out of use since they broke an invariant.",
        counters.pages_quarantined as u64,
    );
    metric("prompt_tokens_total", "counter", "Prompt tokens read.", counters.tokens_prompt);
    metric("generated_tokens_total", "counter", "Tokens generated.", counters.tokens_generated);
    metric("engine_steps_total", "counter", "Forward passes.", counters.steps);
    metric("sequences_cancelled_total", "counter", "Sequences cancelled.", counters.cancelled);
    metric("sequences_failed_total", "counter", "Sequences given up.", counters.failed);
    metric(
        "sequences_degenerate_total",
        "counter",
        "Answers that ended because they went round in a circle (G-19).",
        counters.degenerate,
    );
    metric("sequences_late_total", "counter", "Sequences whose deadline passed.", counters.late);
    metric("engine_panics_total", "counter", "Steps that panicked.", counters.panics);
    metric("kv_faults_total", "counter", "Violations of the page books.", counters.kv_faults);
    for (name, n) in counters.built.named() {
        let help = "What the device has built of this kind, warm-up included (G-05).";
        metric(&format!("{name}_total"), "counter", help, n);
    }
    cache_lines(&mut metric, counters);
    grammar_lines(&mut metric, &counters.grammar);
    if let Some(after_fence) = counters.built_after_fence {
        built_after_fence(text, &after_fence);
    }
}

/// What grammars did to answers (G-13).
fn grammar_lines(
    metric: &mut impl FnMut(&str, &'static str, &'static str, u64),
    counters: &exrail_engine::GrammarCounters,
) {
    for (name, help, n) in [
        ("answers", "Answers under a grammar, however they ended.", counters.answers),
        ("incomplete", "Those that ended before they were whole.", counters.incomplete),
        ("faults", "Those whose automaton failed.", counters.faults),
        ("masked_tokens", "Tokens drawn under a mask.", counters.masked_tokens),
        ("forced_tokens", "Tokens that were bound to follow.", counters.forced_tokens),
        ("closing_tokens", "Tokens of ends that alone fitted.", counters.closing_tokens),
        ("argmax_masked", "Draws whose likeliest token was not allowed.", counters.argmax_masked),
        ("low_mass", "Answers that the model was forced to.", counters.low_mass),
        ("mask_microseconds", "Time that masks took.", counters.mask_us),
    ] {
        metric(&format!("grammar_{name}_total"), "counter", help, n);
    }
}

/// How cold each warmed shape was, and what of it users would still have met (§3.1).
fn warm_up_lines(text: &mut Text, report: &WarmUpReport) {
    let mut ratios = |name: &str, help: &str, ratio: &dyn Fn(&BucketReport) -> f64| {
        text.head(name, "gauge", help);
        for bucket in &report.buckets {
            let (sequences, prompt) = (bucket.n_sequences, bucket.n_prompt);
            let labels = format!("sequences=\"{sequences}\",prompt_tokens=\"{prompt}\"");
            text.line(&format!("{name}{{{labels}}}"), ratio(bucket));
        }
    };
    let cold = "First token of the first run over a warm one, paid by the warm-up.";
    ratios("exrail_cold_ratio", cold, &|bucket| bucket.cold_ratio);
    let ready = "The same of the first run behind the warm-up fence: expected at most 1.5 (G-05).";
    ratios("exrail_ready_ratio", ready, &|bucket| bucket.ready_ratio);
}

/// No line before the fence is closed: a zero would say that it holds.
fn built_after_fence(text: &mut Text, built: &exrail_kernels::DeviceCounters) {
    let name = "exrail_built_after_fence";
    text.head(name, "gauge", "What the device has built since the warm-up: expected 0 (G-05).");
    for (counter, n) in built.named() {
        text.line(&format!("{name}{{counter=\"{counter}\"}}"), n);
    }
}

fn cache_lines(
    metric: &mut impl FnMut(&str, &'static str, &'static str, u64),
    counters: &exrail_engine::Counters,
) {
    metric("kv_audits_total", "counter", "Audits of the whole page pool.", counters.kv_audits);
    metric(
        "kv_restarts_total",
        "counter",
        "Sequences computed anew because a page that they shared was withdrawn.",
        counters.kv_restarts,
    );
    metric("rotations_total", "counter", "Contexts that were rotated.", counters.rotations);
    let help = "Answers that went back to before a loop.";
    metric("roll_backs_total", "counter", help, counters.roll_backs);
    host_lines(metric, &counters.host);
    metric(
        "prefix_cache_hits_total",
        "counter",
        "Whole pages of prompts that were in the cache.",
        counters.prefix_hits,
    );
    metric(
        "prefix_cache_misses_total",
        "counter",
        "Whole pages of prompts that were looked for and not found.",
        counters.prefix_misses,
    );
    metric(
        "prefix_cache_evictions_total",
        "counter",
        "Cached pages that were given up for others.",
        counters.prefix_evictions,
    );
}

/// Of the second tier; zeros where there is none.
fn host_lines(
    metric: &mut impl FnMut(&str, &'static str, &'static str, u64),
    host: &exrail_engine::HostCounters,
) {
    let total = "Pages that the host's memory has room for.";
    metric("kv_host_pages_total", "gauge", total, host.pages_total as u64);
    metric("kv_host_pages", "gauge", "Pages in the host's memory.", host.pages as u64);
    let stored = "Pages that went to the host's memory when they had to make room.";
    metric("kv_host_stored_total", "counter", stored, host.stored);
    metric("kv_host_returned_total", "counter", "Pages that came back from there.", host.returned);
    let evicted = "Pages that were given up there for others.";
    metric("kv_host_evictions_total", "counter", evicted, host.evicted);
    let corrupt = "Pages that had changed there, and were computed anew.";
    metric("kv_host_corrupt_total", "counter", corrupt, host.corrupt);
}

/// Of models that were asked with tools (G-29).
pub(crate) fn tool_circuits(states: &[(String, bool)]) -> String {
    let mut text = Text::default();
    let name = "exrail_tool_circuit_open";
    if !states.is_empty() {
        text.head(name, "gauge", "1 while too few of the model's tool calls can be read (G-29).");
    }
    for (model, is_open) in states {
        text.line(&format!("{name}{{model=\"{}\"}}", label(model)), u8::from(*is_open));
    }
    text.0
}

/// What became of spans; no line in a program that sends none.
pub(crate) fn spans(counts: Option<SpanCounts>) -> String {
    let mut text = Text::default();
    let Some(SpanCounts { sent, queue_full, not_taken }) = counts else { return text.0 };
    text.head("exrail_otlp_spans_sent_total", "counter", "Spans that the collector has taken.");
    text.line("exrail_otlp_spans_sent_total", sent);
    let name = "exrail_otlp_spans_dropped_total";
    text.head(name, "counter", "Spans that were dropped, by reason.");
    text.line(&format!("{name}{{reason=\"queue_full\"}}"), queue_full);
    text.line(&format!("{name}{{reason=\"not_taken\"}}"), not_taken);
    text.0
}

/// What was injected on demand; no line in a program that injects nothing.
pub(crate) fn injected(counts: &[InjectedFaults]) -> String {
    let mut text = Text::default();
    let mut metric = |name: &str, kind: &str, help: &str, n: &dyn Fn(&InjectedFaults) -> u64| {
        if !counts.is_empty() {
            text.head(name, kind, help);
        }
        for counts in counts {
            text.line(&format!("{name}{{kind=\"{}\"}}", counts.fault.name()), n(counts));
        }
    };
    let counter = "counter";
    metric("exrail_faults_injected_total", counter, "Faults injected.", &|n| n.injected);
    metric("exrail_faults_caught_total", counter, "Those that a guard caught.", &|n| n.caught);
    metric("exrail_faults_unmet_total", counter, "Planned ones that hit nobody.", &|n| n.unmet);
    let help = "Most steps from an injection to its guard.";
    metric("exrail_faults_slowest_steps", "gauge", help, &|n| n.slowest_steps);
    text.0
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ignored = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        let _ignored = writeln!(self.0, "{name} {value}");
    }
}

#[cfg(test)]
mod ops_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::BootBoard;

    #[test]
    fn buckets_are_cumulative() {
        let metrics = Metrics::default();
        metrics.first_token.observe(Duration::from_millis(7));
        metrics.first_token.observe(Duration::from_secs(60));
        metrics.count_request("/v1/ask", 200);
        let text = metrics.render(&BootBoard::new().status(), None);
        assert!(text.contains("seconds_bucket{le=\"0.005\"} 0\n"), "{text}");
        assert!(text.contains("seconds_bucket{le=\"0.01\"} 1\n"), "{text}");
        assert!(text.contains("seconds_bucket{le=\"+Inf\"} 2\n"), "{text}");
        assert!(text.contains("{route=\"/v1/ask\",status=\"200\"} 1\n"), "{text}");
    }
}
