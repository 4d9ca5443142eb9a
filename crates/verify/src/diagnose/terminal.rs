//! The diagnosis for a terminal: what was found part by part, the gates, where to start. The last line is the verdict.

use crate::cache::CacheFault;
use crate::diagnose::{Diagnosis, ModeFidelity, SchemaSection, Section};
use crate::render::{Color, Page};

impl Diagnosis {
    /// The report as text of about `width` columns (72 to 110 are used).
    #[must_use]
    pub fn render_text(&self, width: usize, color: Color) -> String {
        let mut page = Page::new(width, color);
        let title = page.paint("1", "exrail diagnosis");
        page.line(&format!("{title}  {}  {}", self.report_version, self.trace_id));
        page.line("");
        let head = (&self.config.config, &self.pins, &self.sample);
        page.asked(head, &self.lambda.section, &self.cost);
        page.calibration(self.calibration.as_ref());
        page.title("FOUND");
        for (name, found) in self.found() {
            page.field(name, &found);
        }
        page.table("GATES", &self.gates);
        page.table("REPORTED, NOT GATED", &self.reported);
        let left: Vec<(&str, &str)> = self.left_out().collect();
        if !left.is_empty() {
            page.not_measured(left.into_iter());
        }
        page.fix(self.fix.as_ref());
        page.verdict(self.verdict, &self.gates);
        page.text
    }

    /// A line for each part that was measured.
    pub(crate) fn found(&self) -> Vec<(&'static str, String)> {
        let mut found = vec![("ΔS", self.delta_s_line())];
        if let Some(question) = self.question.value() {
            let value = question
                .delta_s
                .cal_min()
                .map_or("not on a scale".to_owned(), |cal_min| format!("calibrated {cal_min:.2}"));
            let raw =
                question.delta_s.raw_min().map_or("–".to_owned(), |raw| format!("{raw:.3}"));
            found.push(("question", format!("ΔS raw {raw}, {value}")));
        }
        found.push(("index", self.index_line()));
        found.push(("prompts", self.prompts_line()));
        found.push(("λ", self.lambda_line()));
        if let Some(quant) = self.quantisation.value() {
            let widths = [("int8", &quant.int8), ("int4", &quant.int4)];
            let widths: Vec<String> = widths
                .into_iter()
                .filter_map(|(name, width)| width.value().map(|of| width_line(name, of)))
                .collect();
            found.push(("widths", format!("{}; {}", widths.join("; "), self.bits_line())));
            if let Some(attribution) = &quant.attribution {
                let cause = format!("{:?}", attribution.cause).to_lowercase();
                found.push(("cause", format!("{cause}: {}", attribution.evidence)));
            }
        }
        if let Some(cache) = self.cache.value() {
            let report = &cache.report;
            found.push((
                "cache",
                format!(
                    "{} tokens until drift, KL at most {:.1e} nats (limit {:.1e}); loss {:+.3} per 1,000 tokens{}",
                    report.tokens_until_drift,
                    report.oracle_kl_max,
                    report.limit,
                    report.nll_slope_per_1k,
                    cache.first_fault.map_or("", fault_in_words)
                ),
            ));
        }
        if let Some(line) = self.resonance_line() {
            found.push(("at length", line));
        }
        if let Some(boot) = self.boot.value() {
            found.push((
                "boot",
                format!(
                    "ready in {:.1} s; first token {:.2}x a warm one, {} things built behind the fence",
                    boot.ready_s, boot.cold_ratio_max, boot.post_ready_captures
                ),
            ));
        }
        if let Some(schema) = self.schema.value() {
            let mass = schema.min_allowed_mass;
            let mass = mass.map_or("no lock".to_owned(), |mass| format!("least mass {mass:.1e}"));
            let SchemaSection { replies, invalid, repairs, .. } = schema;
            found.push((
                "schema",
                format!("{invalid} of {replies} replies are not of it, {repairs} repairs, {mass}"),
            ));
        }
        if let Some(weights) = self.weights.value() {
            let worst = weights.wrong.first().map_or(String::new(), |of| format!(": {}", of.told));
            let (n_wrong, matrices) = (weights.wrong.len(), weights.matrices);
            found.push(("weights", format!("{n_wrong} of {matrices} matrices stand out{worst}")));
        }
        if let Some(injection) = self.injection.value() {
            found.push((
                "injection",
                format!(
                    "{} control tokens, {} hijacks, {} leaks of {} texts",
                    injection.control_tokens, injection.hijacks, injection.leaks, injection.trials
                ),
            ));
        }
        found
    }

    fn delta_s_line(&self) -> String {
        let section = &self.delta_s.section;
        let number =
            |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.2}"));
        let band = section.band.map_or("no band".to_owned(), |band| band.to_string());
        format!(
            "{}: median {} ({band}), to the anchor {}, decoy margin {}",
            section.status.replace('_', " "),
            number(section.cal_min),
            number(section.ra),
            number(section.decoy_margin)
        )
    }

    /// What replies at length do, and whether those of other widths do the same.
    fn resonance_line(&self) -> Option<String> {
        let of = self.e_resonance.value()?;
        let [low, high] = of.interval;
        let trend = format!(
            "E_resonance {}: {:+.3} per 1,000 tokens ({low:+.3} to {high:+.3}), {} replies",
            of.trend, of.slope_per_1k, of.replies
        );
        let widths = self.quantisation.value().map(|quant| {
            let widths = [("int8", &quant.int8), ("int4", &quant.int4)];
            let told = widths.into_iter().filter_map(|(name, width)| {
                Some(format!("; {name} {}", width.value()?.e_res_tost?))
            });
            told.collect::<String>()
        });
        Some(trend + &widths.unwrap_or_default())
    }

    fn index_line(&self) -> String {
        let check = &self.delta_s.vectors;
        format!(
            "{} of {} vectors are another encoder's, {} of {} chunks another tokenizer's, {} of {} not their document's",
            check.pairs_differ,
            check.pairs,
            check.chunks_differ,
            check.chunks,
            check.texts_differ,
            check.texts
        )
    }

    fn prompts_line(&self) -> String {
        let (prompts, repeats) = (&self.assembly, &self.repeats);
        format!(
            "of {} built {} out of order, {} without evidence that was found; of {} answers asked twice {} differ",
            prompts.prompts, prompts.reordered, prompts.cut, repeats.pairs, repeats.differ
        )
    }

    fn lambda_line(&self) -> String {
        let items = &self.lambda.section.items;
        if items.is_empty() {
            return "no item was probed".to_owned();
        }
        let mut states = std::collections::BTreeMap::new();
        for item in items {
            let name = item.live.state.map_or("undecided".to_owned(), |state| state.to_string());
            *states.entry(name).or_insert(0) += 1;
        }
        let states: Vec<String> = states.iter().map(|(name, n)| format!("{n} {name}")).collect();
        format!("live: {} of {} items", states.join(", "), items.len())
    }

    fn bits_line(&self) -> &'static str {
        match self.quantisation.value().and_then(|quant| quant.retrieval_bit_equal) {
            Some(true) => "retrieval equal to the bit",
            Some(false) => "retrieval NOT equal",
            None => "retrieval not compared",
        }
    }

    /// What this run did not measure, with what would.
    pub(crate) fn left_out(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let sections = [
            ("manifest", self.manifest.reason()),
            ("weights", self.weights.reason()),
            ("question", self.question.reason()),
            ("coverage", self.coverage.reason()),
            ("λ of widths", self.lambda.modes.reason()),
            ("quantisation", self.quantisation.reason()),
            ("cache", self.cache.reason()),
            ("boot", self.boot.reason()),
            ("schema", self.schema.reason()),
            ("injection", self.injection.reason()),
            ("shards", self.shards.reason()),
            ("e_resonance", self.e_resonance.reason()),
        ];
        sections.into_iter().filter_map(|(name, reason)| Some((name, reason?)))
    }
}

fn width_line(name: &str, of: &ModeFidelity) -> String {
    format!("{name} KLD {:.4}, top-1 {:.1} %", of.kld_mean, 100.0 * of.top1)
}

fn fault_in_words(fault: CacheFault) -> &'static str {
    match fault {
        CacheFault::KvIntegrity => "; the page books broke",
        CacheFault::Noise => "; decode and prefill differ too much to tell",
        CacheFault::CacheDrift => "; the cache drifts",
        CacheFault::LastCheckpoint => "; the last checkpoint alone is over the limit",
        CacheFault::ContextRange => "; the context is beyond the model's range",
    }
}

impl<T> Section<T> {
    /// Whether it was measured.
    pub fn is_ok(&self) -> bool {
        self.value().is_some()
    }
}
