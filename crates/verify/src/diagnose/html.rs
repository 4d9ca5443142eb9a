//! The diagnosis as one HTML file: no script, nothing from elsewhere, light and dark. Reads in the order of the terminal
//! report, except that the verdict and the fix come first.

use std::fmt::Write as _;

use super::junit::escaped;
use super::plot::{Level, Lines, Series, Stripe, number, two_distributions};
use crate::diagnose::{Diagnosis, ModeFidelity};
use crate::fix::Fix;
use crate::report::{Gate, Status, Unit};
use crate::runs::ModeLambda;

const STYLE: &str = include_str!("page.css");
/// The bands of §1.1.8.
const BANDS: [Stripe; 5] = [
    Stripe { name: "stable", from: 0.0, to: 0.40 },
    Stripe { name: "pass edge", from: 0.40, to: 0.45 },
    Stripe { name: "review", from: 0.45, to: 0.60 },
    Stripe { name: "fail", from: 0.60, to: 0.85 },
    Stripe { name: "danger", from: 0.85, to: 1.0 },
];

impl Diagnosis {
    /// The report as a self-contained HTML page.
    #[must_use]
    pub fn render_html(&self) -> String {
        let mut page = Html(String::new());
        page.put(format_args!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>exrail diagnosis: {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n",
            escaped(&self.config.config.model)
        ));
        page.put(format_args!(
            "<h1>exrail diagnosis</h1>\n<p class=\"dim\">{} on {} · {}</p>\n\
             <p class=\"verdict {}\">verdict: {}</p>\n",
            escaped(&self.config.config.model),
            escaped(&self.config.config.device),
            escaped(&self.trace_id),
            self.verdict,
            self.verdict
        ));
        if let Some(fix) = &self.fix {
            page.fix(fix);
        }
        page.found(self);
        page.gates("Gates", &self.gates);
        page.plots(self);
        page.lambda(self);
        page.gates("Reported, not gated", &self.reported);
        page.left_out(self);
        page.pins(self);
        page.put(format_args!("</main>\n</body>\n</html>\n"));
        page.0
    }
}

struct Html(String);

impl Html {
    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _infallible = self.0.write_fmt(text);
    }

    fn fix(&mut self, fix: &Fix) {
        let steps: String =
            fix.steps.iter().map(|step| format!("<li>{}</li>", escaped(step))).collect();
        let then = if fix.then.is_empty() {
            String::new()
        } else {
            format!(" <span class=\"dim\">then {}</span>", escaped(&fix.then.join(", ")))
        };
        self.put(format_args!(
            "<section class=\"fix\" aria-label=\"Start here\">\n<h3>Start here: <code>exrail fix {}</code> \
             ({}, {})</h3>\n<p>{}</p>\n<p class=\"dim\">Evidence: {}.{then}</p>\n<ol>{steps}</ol>\n</section>\n",
            escaped(fix.page), fix.guardrail, fix.stage.name(), escaped(fix.reason), escaped(&fix.evidence)
        ));
    }

    fn found(&mut self, diagnosis: &Diagnosis) {
        self.put(format_args!("<h2>Found</h2>\n<dl>\n"));
        for (name, found) in diagnosis.found() {
            self.put(format_args!("<dt>{name}</dt><dd>{}</dd>\n", escaped(&found)));
        }
        let cost = &diagnosis.cost;
        self.put(format_args!(
            "<dt>cost</dt><dd>{} generations, {} tokens, {:.0} s</dd>\n</dl>\n",
            cost.generations, cost.tokens, cost.seconds
        ));
    }

    fn gates(&mut self, title: &str, gates: &[Gate]) {
        self.put(format_args!(
            "<h2>{title}</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th scope=\"col\">measure</th>\
             <th scope=\"col\" class=\"n\">value</th><th scope=\"col\" class=\"n\">needed</th>\
             <th scope=\"col\" class=\"n\">95% interval</th><th scope=\"col\" class=\"n\">n</th>\
             <th scope=\"col\">status</th></tr></thead>\n<tbody>\n"
        ));
        for gate in gates {
            let measured = &gate.measured;
            let value =
                measured.value.map_or("–".to_owned(), |value| in_unit(value, measured.unit));
            let interval = measured.interval.map_or(String::new(), |interval| {
                format!("{:.2} to {:.2}", interval.low, interval.high)
            });
            let why = measured.reason.as_ref().map_or(String::new(), |reason| {
                format!("<span class=\"why\">{}</span>", escaped(reason))
            });
            let status = measured.status.to_string();
            self.put(format_args!(
                "<tr><td>{}{why}</td><td class=\"n\">{value}</td><td class=\"n\">{}</td>\
                 <td class=\"n\">{interval}</td><td class=\"n\">{}</td><td class=\"status {}\">{status}</td></tr>\n",
                escaped(gate.label), escaped(measured.needed), measured.n, class_of(measured.status)
            ));
        }
        self.put(format_args!("</tbody></table></div>\n"));
    }

    fn plots(&mut self, diagnosis: &Diagnosis) {
        self.put(format_args!("<h2>Plots</h2>\n<div class=\"plots\">\n"));
        let plots = [
            (
                "ΔS of questions",
                delta_s(diagnosis),
                "Nearest snippet of each question, on the calibrated scale: \
              up to 0.45 passes, at most 5 % of the unanswerable get there; from 0.60 at most 5 % of the answerable are lost.",
            ),
            (
                "Divergence by position",
                kld(diagnosis),
                "Mean KL divergence of the rounded weights from the stored ones, \
              by the position in a sequence of the first text.",
            ),
            (
                "Loss by position",
                nll(diagnosis),
                "Mean loss of each 512 tokens behind everything before, and behind the \
              bin before them alone. A sound model gains by the longer context.",
            ),
            (
                "Cache against fresh prefill",
                cache(diagnosis),
                "KL divergence of the live cache from a fresh prefill of \
              the same tokens, every 256 tokens.",
            ),
        ];
        for (title, plot, caption) in plots {
            let shown =
                plot.unwrap_or_else(|| "<p class=\"dim\">Not measured in this run.</p>".to_owned());
            self.put(format_args!(
                "<figure><h3>{title}</h3>{shown}<figcaption>{caption}</figcaption></figure>\n"
            ));
        }
        self.put(format_args!("</div>\n"));
    }

    fn lambda(&mut self, diagnosis: &Diagnosis) {
        let section = &diagnosis.lambda.section;
        if section.items.is_empty() {
            return;
        }
        self.put(format_args!(
            "<h2>λ: classes of answers</h2>\n<p class=\"dim\">{} wordings × {} seeds of each item. Equal letters are equal \
             answers; a struck-through one is no valid answer.</p>\n<div class=\"scroll\"><table>\n<thead><tr>\
             <th scope=\"col\">item</th><th scope=\"col\">mode</th><th scope=\"col\">classes</th>\
             <th scope=\"col\">state</th><th scope=\"col\" class=\"n\">c</th><th scope=\"col\" class=\"n\">entropy</th>\
             <th scope=\"col\" class=\"n\">citations</th></tr></thead>\n<tbody>\n",
            section.n_paraphrases, section.n_seeds
        ));
        for item in &section.items {
            for (mode, lambda) in [("live", &item.live), ("frozen", &item.frozen)] {
                self.lambda_row(&item.id, mode, lambda);
            }
        }
        for item in diagnosis.lambda.modes.value().iter().flat_map(|modes| &modes.items) {
            for (mode, lambda) in &item.modes {
                let mode = format!("{}, frozen", mode.name().replace('_', " "));
                self.lambda_row(&item.id, &mode, &lambda.frozen);
            }
        }
        self.put(format_args!("</tbody></table></div>\n"));
    }

    fn lambda_row(&mut self, id: &str, mode: &str, lambda: &ModeLambda) {
        let runs = lambda.runs.iter().map(|run| {
            let letter =
                u32::try_from(run.class).ok().and_then(|class| char::from_digit(class + 10, 36));
            let letter = letter.map_or('?', |letter| letter.to_ascii_uppercase());
            let invalid = if run.valid { "" } else { " invalid" };
            format!(
                "<b class=\"k{}{invalid}\" title=\"wording {}, seed {}\">{letter}</b>",
                run.class, run.p, run.s
            )
        });
        let state = lambda.state.map_or("undecided".to_owned(), |state| state.to_string());
        let class = if state == "convergent" { "pass" } else { "inconclusive" };
        self.put(format_args!(
            "<tr><td><code>{}</code></td><td>{mode}</td><td class=\"runs\">{}</td><td class=\"status {class}\">{state}</td>\
             <td class=\"n\">{:.2}</td><td class=\"n\">{:.2}</td><td class=\"n\">{:.2}</td></tr>\n",
            escaped(id), runs.collect::<String>(), lambda.strict.c, lambda.strict.se, lambda.strict.cit
        ));
    }

    fn left_out(&mut self, diagnosis: &Diagnosis) {
        let mut left = diagnosis.left_out().peekable();
        if left.peek().is_none() {
            return;
        }
        self.put(format_args!("<h2>Not measured here</h2>\n<dl>\n"));
        for (name, reason) in left {
            self.put(format_args!("<dt>{name}</dt><dd>{}</dd>\n", escaped(reason)));
        }
        self.put(format_args!("</dl>\n"));
    }

    fn pins(&mut self, diagnosis: &Diagnosis) {
        let (pins, config, sample) = (&diagnosis.pins, &diagnosis.config, &diagnosis.sample);
        self.put(format_args!("<h2>Of what</h2>\n<dl>\n"));
        let rows = [
            (
                "model",
                format!(
                    "{}, {} weights, {} cache",
                    config.config.model, config.config.quant, config.config.kv_dtype
                ),
            ),
            ("encoder", config.config.encoder.clone()),
            (
                "corpus",
                format!(
                    "{} documents, {} chunks, {} per question",
                    config.config.n_documents, config.config.n_chunks, config.config.k
                ),
            ),
            (
                "asked",
                format!(
                    "{} retrieved, {} answered, {} unanswerable, {} probed for λ, seed {}",
                    sample.retrieved,
                    sample.answered,
                    sample.unanswerable_asked,
                    sample.lambda_items,
                    sample.seed
                ),
            ),
        ];
        let pins = pins.named().map(|(name, value)| (name, value.to_owned()));
        for (name, value) in rows.into_iter().chain(pins) {
            self.put(format_args!("<dt>{name}</dt><dd><code>{}</code></dd>\n", escaped(&value)));
        }
        self.put(format_args!("</dl>\n"));
    }
}

fn in_unit(value: f64, unit: Unit) -> String {
    match unit {
        Unit::CalibratedDs | Unit::Share | Unit::Ratio => format!("{value:.2}"),
        Unit::RawDs => format!("{value:.3}"),
        Unit::Nats => number(value),
        Unit::Count => format!("{value:.0}"),
    }
}

fn class_of(status: Status) -> &'static str {
    match status {
        Status::Pass => "pass",
        Status::Review => "review",
        Status::Fail => "fail",
        Status::Inconclusive => "inconclusive",
        Status::NotCalibrated => "not-calibrated",
        Status::NotAvailable => "not-available",
        Status::Reported => "reported",
    }
}

fn delta_s(diagnosis: &Diagnosis) -> Option<String> {
    let section = &diagnosis.delta_s;
    let answerable: Vec<f64> =
        section.section.items.iter().filter_map(|item| item.cal_min).collect();
    let unanswerable: Vec<f64> = section.unanswerable.iter().filter_map(|at| at.cal_min).collect();
    two_distributions(
        "ΔS of answerable and unanswerable questions on the calibrated scale, with its bands",
        "calibrated ΔS of question and nearest snippet",
        (("answerable", &answerable), ("unanswerable", &unanswerable)),
        &BANDS,
    )
}

fn kld(diagnosis: &Diagnosis) -> Option<String> {
    let quant = diagnosis.quantisation.value()?;
    let widths = [("int8", &quant.int8), ("int4", &quant.int4), ("as served", &quant.as_served)];
    let of = |(name, width): (&str, Option<&ModeFidelity>)| {
        let summary = width?.texts.values().next()?;
        let points = summary.by_position.iter().map(|bin| (as_f64(bin.from), bin.kld_mean));
        Some(Series { name: name.to_owned(), points: points.collect() })
    };
    let lines = Lines {
        title: "Mean KL divergence by position, for each width",
        x: "position in the sequence, tokens",
        y: "KLD, nats",
        series: widths.into_iter().filter_map(|(name, width)| of((name, width.value()))).collect(),
        level: None,
        from_zero: true,
    };
    lines.svg()
}

fn nll(diagnosis: &Diagnosis) -> Option<String> {
    let bins = &diagnosis.cache.value()?.report.bins;
    let long = bins.iter().map(|bin| (as_f64(bin.tokens), bin.nll));
    let short = bins.iter().filter_map(|bin| Some((as_f64(bin.tokens), bin.nll_short?)));
    let series =
        [("behind everything before", long.collect()), ("behind one bin", short.collect())];
    let lines = Lines {
        title: "Mean loss of each 512 tokens by their position",
        x: "tokens",
        y: "loss, nats",
        series: series.map(|(name, points)| Series { name: name.to_owned(), points }).into(),
        level: None,
        from_zero: false,
    };
    lines.svg()
}

fn cache(diagnosis: &Diagnosis) -> Option<String> {
    let report = &diagnosis.cache.value()?.report;
    let points = report.checkpoints.iter().map(|point| (as_f64(point.tokens), point.kl));
    let lines = Lines {
        title: "KL divergence of the live cache from a fresh prefill, by tokens in the cache",
        x: "tokens in the cache",
        y: "KL, nats",
        series: vec![Series { name: "checkpoints".to_owned(), points: points.collect() }],
        level: Some(Level { name: format!("limit {}", number(report.limit)), at: report.limit }),
        from_zero: true,
    };
    lines.svg()
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn as_f64(n: usize) -> f64 {
    n as f64
}
