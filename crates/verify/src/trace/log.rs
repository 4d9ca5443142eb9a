//! A whole log, read by somebody who has nothing but the file.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    io::{self, BufRead, Read},
};

use exrail_retrieval::Collection;
use serde::Serialize;
use serde_json::Value;

use super::findings::{Breach, Findings, Rule};
use super::seal::{Seal, unseal};
use super::{Contract, parsed_event};

/// Longest line that is read; no record comes near it.
const MAX_LINE_BYTES: usize = 64 << 20;

/// Breaches that are kept in full; the rest is counted.
const MAX_BREACHES: usize = 1000;

/// What a log shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LogReport {
    /// Whole lines.
    pub n_lines: usize,
    /// Records by event, those of a published event only.
    pub n_by_event: BTreeMap<String, usize>,
    /// Bytes behind the last line break: what a killed writer leaves. Nobody got an answer for them.
    pub torn_bytes: usize,
    /// Each rule with how often it was checked and broken.
    pub rules: Vec<RuleCount>,
    /// How many breaches there are.
    pub n_breaches: usize,
    /// The first thousand of them.
    pub breaches: Vec<LogBreach>,
}

/// One rule over a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RuleCount {
    /// The rule.
    pub rule: Rule,
    /// How often it was looked at; 0: nothing in the log is subject to it.
    pub n_checked: usize,
    /// How often it was broken.
    pub n_broken: usize,
}

/// A breach with its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LogBreach {
    /// Line, from 1.
    pub line: usize,
    /// Its trace, where it could be read.
    pub trace_id: Option<String>,
    /// What is broken.
    #[serde(flatten)]
    pub breach: Breach,
}

/// Reads a log and checks every record, the order of each trace's records, and with a collection the snippets.
///
/// # Errors
/// The log cannot be read. What stands in it is never an error, but a breach.
pub fn verify_log(log: impl BufRead, stored: Option<&Collection>) -> io::Result<LogReport> {
    read_log(&Contract::new(), log, stored)
}

/// [`verify_log`] by a contract that is compiled already.
pub(super) fn read_log(
    contract: &Contract,
    log: impl BufRead,
    stored: Option<&Collection>,
) -> io::Result<LogReport> {
    let mut reading = Reading::default();
    let mut log = log;
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        let n_read = log.by_ref().take(limit).read_until(b'\n', &mut line)?;
        if n_read == 0 {
            return Ok(reading.end());
        }
        if line.last() == Some(&b'\n') {
            line.pop();
            reading.line(&line, contract, stored);
        } else if n_read > MAX_LINE_BYTES {
            let n_skipped = skip_line(&mut log)?;
            reading.too_long(n_read + n_skipped);
        } else {
            reading.report.torn_bytes = n_read;
        }
    }
}

/// Passes over the rest of a line without keeping it.
fn skip_line(log: &mut impl BufRead) -> io::Result<usize> {
    let mut n_skipped = 0;
    loop {
        let buffer = log.fill_buf()?;
        if buffer.is_empty() {
            return Ok(n_skipped);
        }
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let n_bytes = end.map_or(buffer.len(), |end| end + 1);
        log.consume(n_bytes);
        n_skipped += n_bytes;
        if end.is_some() {
            return Ok(n_skipped);
        }
    }
}

/// A trace as far as it was read.
struct Begun {
    request_id: String,
    /// The event behind which nothing comes.
    ended_by: Option<String>,
    /// Its `retrieve.run`, until the answer that was drawn from it.
    search: Option<Value>,
}

#[derive(Default)]
struct Reading {
    report: LogReport,
    n_checked: BTreeMap<Rule, usize>,
    n_broken: BTreeMap<Rule, usize>,
    traces: HashMap<String, Begun>,
}

impl Reading {
    fn line(&mut self, line: &[u8], contract: &Contract, stored: Option<&Collection>) {
        self.report.n_lines += 1;
        let mut findings = Findings::default();
        let record = match object(line) {
            Ok(record) => record,
            Err(found) => {
                findings.note(Rule::Json, "", "one JSON object", found);
                return self.take(&findings, None);
            }
        };
        findings.passed(Rule::Json);
        match unseal(&String::from_utf8_lossy(line)) {
            Seal::Whole => findings.passed(Rule::Seal),
            Seal::Broken { expected, found } => {
                findings.note(Rule::Seal, "/record_sha256", expected, found);
            }
            Seal::Missing => {
                findings.note(Rule::Seal, "/record_sha256", "a hash as the last field", "none");
            }
        }
        let trace_id = record["trace_id"].as_str().map(str::to_owned);
        self.take(&findings, trace_id.as_deref());
        let findings = contract.check(&record, stored);
        let has_shape = !findings.breaches().iter().any(|breach| breach.rule == Rule::Schema);
        self.take(&findings, trace_id.as_deref());
        if has_shape {
            self.follow(&record);
        }
    }

    /// The order of the records of one trace.
    fn follow(&mut self, record: &Value) {
        let (event, trace_id) = parsed_event(record);
        *self.report.n_by_event.entry(event.to_owned()).or_default() += 1;
        let request_id = record["request_id"].as_str().unwrap_or_default();
        let mut findings = Findings::default();
        let new = || Begun { request_id: request_id.to_owned(), ended_by: None, search: None };
        let begun = self.traces.entry(trace_id.to_owned()).or_insert_with(new);
        findings.equal(Rule::Order, "/request_id", begun.request_id.as_str(), request_id);
        match &begun.ended_by {
            Some(end) => {
                let expected = format!("no record behind the `{end}` of its trace");
                findings.note(Rule::Order, "/event", expected, format!("`{event}`"));
            }
            None => findings.passed(Rule::Order),
        }
        match event {
            "retrieve.run" => begun.search = Some(record.clone()),
            "answer.decide" => {
                if let Some(search) = begun.search.take() {
                    compare_search(&search, record, &mut findings);
                }
            }
            _ => {}
        }
        if ["infer.run", "answer.decide", "relay.run", "model.load", "model.unload"]
            .contains(&event)
        {
            begun.ended_by = Some(event.to_owned());
        }
        self.take(&findings, Some(trace_id));
    }

    fn too_long(&mut self, n_bytes: usize) {
        self.report.n_lines += 1;
        let mut findings = Findings::default();
        let expected = format!("a line of at most {MAX_LINE_BYTES} bytes");
        findings.note(Rule::Json, "", expected, format!("{n_bytes}"));
        self.take(&findings, None);
    }

    fn take(&mut self, findings: &Findings, trace_id: Option<&str>) {
        for rule in Rule::ALL {
            *self.n_checked.entry(rule).or_default() += findings.n_checked(rule);
        }
        for breach in findings.breaches() {
            *self.n_broken.entry(breach.rule).or_default() += 1;
            self.report.n_breaches += 1;
            if self.report.breaches.len() < MAX_BREACHES {
                let (line, trace_id) = (self.report.n_lines, trace_id.map(str::to_owned));
                self.report.breaches.push(LogBreach { line, trace_id, breach: breach.clone() });
            }
        }
    }

    fn end(mut self) -> LogReport {
        let count = |counts: &BTreeMap<Rule, usize>, rule| counts.get(&rule).copied().unwrap_or(0);
        let row = |rule| RuleCount {
            rule,
            n_checked: count(&self.n_checked, rule),
            n_broken: count(&self.n_broken, rule),
        };
        self.report.rules = Rule::ALL.map(row).to_vec();
        self.report
    }
}

/// The answer is to the question that was searched for, with the same pins, and from what was found.
fn compare_search(search: &Value, answer: &Value, findings: &mut Findings) {
    // Without the values: they may be what users wrote.
    let found = "another one";
    for field in ["pins", "query", "collection"] {
        let is_same = search[field] == answer[field];
        let expected = ("what the `retrieve.run` of its trace has", &found as &dyn Display);
        findings.holds(Rule::Search, &format!("/{field}"), is_same, expected);
    }
    let items = |record: &Value| record["retrieved"].as_array().cloned().unwrap_or_default();
    let (before, after) = (items(search), items(answer));
    let expected = "as many as the `retrieve.run` of its trace found";
    let is_same = before.len() == after.len();
    findings.holds(Rule::Search, "/retrieved", is_same, (expected, &after.len()));
    for (at, (before, after)) in before.iter().zip(&after).enumerate() {
        let expected = ("what the `retrieve.run` of its trace found", &found as &dyn Display);
        findings.holds(Rule::Search, &format!("/retrieved/{at}"), before == after, expected);
    }
}

fn object(line: &[u8]) -> Result<Value, String> {
    let text = std::str::from_utf8(line).map_err(|error| error.to_string())?;
    match serde_json::from_str::<Value>(text) {
        Ok(record) if record.is_object() => Ok(record),
        Ok(_) => Err("another value".to_owned()),
        // Without the text itself: it may be anything.
        Err(error) => Err(format!("{:?} at byte {}", error.classify(), error.column())),
    }
}
