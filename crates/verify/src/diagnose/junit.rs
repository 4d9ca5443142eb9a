//! The diagnosis as JUnit XML: a gate is a test case, and only a gate that fails is a failure.
//!
//! CI systems show what is skipped as neither good nor bad. A report that is undecided must not look green, so the
//! verdict is a case of its own, which fails unless it is `pass`.

use std::fmt::Write as _;

use crate::diagnose::Diagnosis;
use crate::report::{Gate, Status, Verdict};

/// What becomes of a case.
enum Case<'a> {
    Passed,
    Skipped(&'a str),
    Failed(&'a str),
}

impl Diagnosis {
    /// The report as JUnit XML: one suite, one case a gate, and one for the verdict.
    #[must_use]
    pub fn render_junit(&self) -> String {
        let cases: Vec<(&str, String, Case<'_>)> = self.gates.iter().map(case_of_gate).collect();
        let n_skipped = cases.iter().filter(|(.., case)| matches!(case, Case::Skipped(_))).count();
        let n_failed = cases.iter().filter(|(.., case)| matches!(case, Case::Failed(_))).count()
            + usize::from(self.verdict != Verdict::Pass);
        let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        let mut put = |line: std::fmt::Arguments<'_>| {
            // Writing to a String cannot fail.
            let _infallible = xml.write_fmt(line);
        };
        let totals = format!(
            "tests=\"{}\" failures=\"{n_failed}\" errors=\"0\" skipped=\"{n_skipped}\" time=\"{:.3}\"",
            cases.len() + 1,
            self.cost.seconds
        );
        put(format_args!("<testsuites name=\"exrail diagnose\" {totals}>\n"));
        put(format_args!("  <testsuite name=\"exrail diagnose\" {totals}>\n    <properties>\n"));
        for (name, value) in self.properties() {
            let value = escaped(&value);
            put(format_args!("      <property name=\"{name}\" value=\"{value}\"/>\n"));
        }
        put(format_args!("    </properties>\n"));
        for (name, text, case) in &cases {
            put(format_args!("    {}\n", case_xml(name, text, case)));
        }
        let told = self.verdict.to_string();
        let case = if self.verdict == Verdict::Pass { Case::Passed } else { Case::Failed(&told) };
        put(format_args!("    {}\n", case_xml("verdict", &self.summary(), &case)));
        put(format_args!("  </testsuite>\n</testsuites>\n"));
        xml
    }

    fn properties(&self) -> Vec<(&'static str, String)> {
        let about =
            [("trace_id", self.trace_id.clone()), ("model", self.config.config.model.clone())];
        let pins = self.pins.named().map(|(name, value)| (name, value.to_owned()));
        about.into_iter().chain(pins).collect()
    }

    /// Verdict and fix in a few lines.
    fn summary(&self) -> String {
        let mut text = format!("verdict: {}", self.verdict);
        if let Some(fix) = &self.fix {
            let _infallible = write!(
                text,
                "\nstart here: exrail fix {} ({})\nbecause: {}\nevidence: {}",
                fix.page, fix.guardrail, fix.reason, fix.evidence
            );
        }
        text
    }
}

fn case_of_gate(gate: &Gate) -> (&str, String, Case<'_>) {
    let measured = &gate.measured;
    let value = measured.value.map_or("no value".to_owned(), |value| format!("{value:.4}"));
    let mut text = format!("{}: {value}", gate.label);
    if !measured.needed.is_empty() {
        let _infallible = write!(text, ", needed {}", measured.needed);
    }
    let _infallible = write!(text, ", n = {}: {}", measured.n, measured.status);
    if let Some(reason) = &measured.reason {
        let _infallible = write!(text, "\n{reason}");
    }
    let case = match measured.status {
        Status::Pass | Status::Reported => Case::Passed,
        Status::Fail => Case::Failed("fail"),
        Status::Review => Case::Skipped("review"),
        Status::Inconclusive => Case::Skipped("inconclusive"),
        Status::NotCalibrated => Case::Skipped("not calibrated"),
        Status::NotAvailable => Case::Skipped("not available"),
    };
    (gate.name, text, case)
}

fn case_xml(name: &str, text: &str, case: &Case<'_>) -> String {
    let (name, text) = (escaped(name), escaped(text));
    let head = format!("<testcase classname=\"exrail.diagnose\" name=\"{name}\"");
    match case {
        Case::Passed => format!("{head}><system-out>{text}</system-out></testcase>"),
        // The format has no text in a skipped element: the message says it all.
        Case::Skipped(status) => {
            format!("{head}><skipped message=\"{status}: {text}\"/></testcase>")
        }
        Case::Failed(status) => {
            format!(
                "{head}><failure message=\"{status}\" type=\"gate\">{text}</failure></testcase>"
            )
        }
    }
}

/// XML 1.0 text, good in attributes, too. Characters that XML cannot hold at all become U+FFFD.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' => escaped.push_str("&#10;"),
            '\t' => escaped.push_str("&#9;"),
            '\u{0}'..='\u{1f}' | '\u{7f}' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            char => escaped.push(char),
        }
    }
    escaped
}
