//! The report for a terminal. The last line is the verdict.

use std::fmt::Write as _;

use exrail_metrics::Fitness;

use crate::calibrate::{CorpusCalibration, FamilyFit};
use crate::fix::Fix;
use crate::report::{
    Config, Cost, Gate, LambdaSection, Pins, Report, Sample, Status, Unit, Verdict,
};

/// Narrowest table that still holds its columns.
const MIN_WIDTH: usize = 72;
/// Widest table: longer lines are hard to read across.
const MAX_WIDTH: usize = 110;
/// Columns right of the label: value, needed, interval, n, status.
const COLUMNS: usize = 8 + 9 + 15 + 6 + 16;

/// Whether the text carries colour codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Color {
    /// ANSI colours.
    Always,
    /// Plain text.
    Never,
}

impl Report {
    /// The report as text of about `width` columns (72 to 110 are used).
    #[must_use]
    pub fn render_text(&self, width: usize, color: Color) -> String {
        let mut page = Page::new(width, color);
        page.head(self);
        page.calibration(self.calibration.as_ref());
        page.table("GATES", &self.gates);
        page.table("REPORTED, NOT GATED", &self.reported);
        page.not_measured(self.not_measured.iter().map(|(&name, section)| (name, section.reason)));
        page.fix(self.fix.as_ref());
        page.verdict(self.verdict, &self.gates);
        page.text
    }
}

/// A text of several parts.
pub(crate) struct Page {
    pub(crate) text: String,
    width: usize,
    color: Color,
}

impl Page {
    pub(crate) fn new(width: usize, color: Color) -> Page {
        Page { text: String::new(), width: width.clamp(MIN_WIDTH, MAX_WIDTH), color }
    }

    pub(crate) fn line(&mut self, line: &str) {
        self.text.push_str(line.trim_end());
        self.text.push('\n');
    }

    pub(crate) fn title(&mut self, title: &str) {
        self.line("");
        let title = self.paint("1", title);
        self.line(&title);
    }

    pub(crate) fn paint(&self, code: &str, text: &str) -> String {
        match self.color {
            Color::Always => format!("\x1b[{code}m{text}\x1b[0m"),
            Color::Never => text.to_owned(),
        }
    }

    pub(crate) fn field(&mut self, name: &str, value: &str) {
        let lines = wrap(value, self.width - 12);
        for (index, line) in lines.iter().enumerate() {
            let name = if index == 0 { name } else { "" };
            let name = self.paint("2", &format!("  {name:<10}"));
            self.line(&format!("{name}{line}"));
        }
    }

    fn head(&mut self, report: &Report) {
        let title = self.paint("1", "exrail acceptance report");
        self.line(&format!("{title}  {}", report.report_version));
        self.line("");
        self.asked((&report.config, &report.pins, &report.sample), &report.lambda, &report.cost);
    }

    /// What was asked of what, and what it cost.
    pub(crate) fn asked(
        &mut self,
        (config, pins, sample): (&Config, &Pins, &Sample),
        lambda: &LambdaSection,
        cost: &Cost,
    ) {
        let id = |fingerprint: &str| fingerprint.chars().take(12).collect::<String>();
        self.field(
            "model",
            &format!(
                "{}, {}, on {} [{}]",
                config.model,
                config.quant,
                config.device,
                id(&pins.model_fp)
            ),
        );
        self.field("encoder", &format!("{} [{}]", config.encoder, id(&pins.encoder_fp)));
        self.field(
            "corpus",
            &format!(
                "{} documents, {} chunks, {} per question [{}]",
                config.n_documents,
                config.n_chunks,
                config.k,
                id(&pins.index_hash)
            ),
        );
        self.field(
            "gold set",
            &format!(
                "{} answerable, {} unanswerable, {} off topic [{}]",
                sample.n_answerable,
                sample.n_unanswerable,
                sample.n_off_topic,
                id(&pins.gold_sha256)
            ),
        );
        self.field(
            "asked",
            &format!(
                "{} retrieved, {} answered, {} unanswerable, {} probed for λ ({} wordings × {} {}), seed {}",
                sample.retrieved,
                sample.answered,
                sample.unanswerable_asked,
                sample.lambda_items,
                lambda.n_paraphrases,
                lambda.n_seeds,
                if lambda.n_seeds == 1 { "seed" } else { "seeds" },
                sample.seed
            ),
        );
        self.field(
            "cost",
            &format!(
                "{} generations, {} tokens, {:.0} s",
                cost.generations, cost.tokens, cost.seconds
            ),
        );
    }

    pub(crate) fn calibration(&mut self, calibration: Option<&CorpusCalibration>) {
        let Some(calibration) = calibration else { return };
        self.title("SCALE OF ΔS");
        let families = [
            ("question", &calibration.qe),
            ("words", &calibration.lexical.map),
            ("joint", &calibration.joint.map),
            ("wording", &calibration.tt),
        ];
        for (name, fit) in families {
            let words = match fit {
                FamilyFit::NotCalibrated { reason } => format!("not calibrated: {reason}"),
                FamilyFit::Fitted(map) => format!(
                    "{}: pass at raw {:.3}, fail at {:.3}, off topic at {:.3}; AUROC {:.2}, \
                     {:.0}% undecided (n = {}, {}, {})",
                    if map.fitness == Fitness::Fit { "fit" } else { "unfit" },
                    map.t_pass,
                    map.t_fail,
                    map.t_rand,
                    map.auroc,
                    100.0 * map.share_between,
                    map.n[0],
                    map.n[1],
                    map.n[2]
                ),
            };
            self.field(name, &words);
        }
        let decides = match calibration.deciding() {
            Some(signal) => format!("{signal} decides whether the generator may answer"),
            None => "no signal is fit to decide whether the generator may answer".to_owned(),
        };
        self.field("gate", &decides);
        if let Some(masked) = &calibration.masked {
            let words = format!(
                "the same questions without their page: AUROC {:.2}, pass would be at raw {:.3} (n = {})",
                masked.auroc, masked.t_pass, masked.n
            );
            self.field("masked", &words);
        }
    }

    pub(crate) fn table(&mut self, title: &str, gates: &[Gate]) {
        self.title(title);
        let label_width = self.width - COLUMNS - 2;
        let head = format!(
            "  {:<label_width$}{:>8}{:>9}{:>15}{:>6}  status",
            "", "value", "needed", "95% interval", "n"
        );
        let head = self.paint("2", &head);
        self.line(&head);
        let mut told: Option<&str> = None;
        for gate in gates {
            self.row(gate, label_width);
            // Gates that share a reason say it once.
            let reason = gate.measured.reason.as_deref();
            if let Some(reason) = reason.filter(|_| reason != told) {
                for line in wrap(reason, self.width - 6) {
                    let line = self.paint("2", &format!("      {line}"));
                    self.line(&line);
                }
            }
            told = reason;
        }
    }

    fn row(&mut self, gate: &Gate, label_width: usize) {
        let measured = &gate.measured;
        let value = match (measured.value, measured.unit) {
            (None, _) => "–".to_owned(),
            (Some(value), Unit::RawDs) => format!("{value:.3}"),
            (Some(value), Unit::CalibratedDs | Unit::Share | Unit::Ratio) => format!("{value:.2}"),
            (Some(value), Unit::Nats) => format!("{value:.4}"),
            (Some(value), Unit::Count) => format!("{value:.0}"),
        };
        let interval = measured.interval.map_or(String::new(), |interval| {
            format!("{:.2} to {:.2}", interval.low, interval.high)
        });
        let status = self.paint(color_of(measured.status), &measured.status.to_string());
        let labels = wrap(gate.label, label_width - 1);
        let first = labels.first().map_or("", String::as_str);
        self.line(&format!(
            "  {first:<label_width$}{value:>8}{:>9}{interval:>15}{:>6}  {status}",
            measured.needed, measured.n
        ));
        for rest in labels.iter().skip(1) {
            self.line(&format!("  {rest}"));
        }
    }

    pub(crate) fn not_measured<'r>(&mut self, sections: impl Iterator<Item = (&'r str, &'r str)>) {
        self.title("NOT MEASURED HERE");
        for (name, reason) in sections {
            let reason = reason.split_once(": ").map_or(reason, |(_, why)| why);
            let lines = wrap(reason, self.width - 16);
            for (index, line) in lines.iter().enumerate() {
                let name = if index == 0 { name } else { "" };
                self.line(&format!("  {name:<14}{line}"));
            }
        }
    }

    pub(crate) fn fix(&mut self, fix: Option<&Fix>) {
        let Some(fix) = fix else { return };
        self.title("START HERE");
        self.field("page", &format!("{} ({}): exrail fix {}", fix.page, fix.guardrail, fix.page));
        self.field("stage", fix.stage.name());
        if !fix.then.is_empty() {
            self.field("then", &fix.then.join(", "));
        }
        self.field("because", fix.reason);
        self.field("evidence", &fix.evidence);
        for (index, step) in fix.steps.iter().enumerate() {
            self.field(&format!("step {}", index + 1), step);
        }
    }

    pub(crate) fn verdict(&mut self, verdict: Verdict, gates: &[Gate]) {
        self.line("");
        let color = match verdict {
            Verdict::Pass => "1;32",
            Verdict::Review | Verdict::Inconclusive => "1;33",
            Verdict::Fail => "1;31",
        };
        let mut words = String::new();
        for (status, name) in [
            (Status::Fail, "failed"),
            (Status::Inconclusive, "inconclusive"),
            (Status::NotCalibrated, "not calibrated"),
            (Status::NotAvailable, "not available"),
            (Status::Review, "to review"),
            (Status::Pass, "passed"),
        ] {
            let n = gates.iter().filter(|gate| gate.measured.status == status).count();
            if n > 0 {
                let comma = if words.is_empty() { "" } else { ", " };
                // Writing to a String cannot fail.
                let _infallible = write!(words, "{comma}{n} {name}");
            }
        }
        let verdict = self.paint(color, &format!("verdict: {verdict}"));
        self.line(&format!("{verdict} ({words} of {} gates)", gates.len()));
    }
}

fn color_of(status: Status) -> &'static str {
    match status {
        Status::Pass => "32",
        Status::Review | Status::Inconclusive | Status::NotCalibrated => "33",
        Status::Fail => "1;31",
        Status::NotAvailable | Status::Reported => "2",
    }
}

/// Breaks at spaces; a word longer than a line stands alone.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
