//! The page.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
};

use anyhow::Result;
use exrail_metrics::quantile;
use serde_json::Value;

use super::{
    GatewayArguments, Leg, Side,
    idle::Idle,
    load::{Form, Reply},
};
use crate::machine::IDLE_SHARE;

/// What stands above the tables.
pub(super) struct Head {
    /// When, what code, what machine, what command.
    pub(super) record: Value,
    /// What the gateway's program says it is.
    pub(super) version: String,
    /// Before the first leg.
    pub(super) idle_share: f64,
}

/// A time of a reply, and what it is called.
struct Measure {
    name: &'static str,
    form: Form,
    of: fn(&Reply) -> f64,
}

const MEASURES: [Measure; 3] = [
    Measure { name: "whole answer", form: Form::Plain, of: |reply| reply.whole },
    Measure { name: "first event", form: Form::Streamed, of: |reply| reply.first },
    Measure { name: "end of stream", form: Form::Streamed, of: |reply| reply.whole },
];

/// The page of all that was measured.
pub(super) fn page(
    head: &Head,
    arguments: &GatewayArguments,
    legs: &[Leg],
    idle: Option<&Idle>,
) -> Result<String> {
    let mut page = String::new();
    page_head(&mut page, head, legs)?;
    if !legs.is_empty() {
        latencies(&mut page, arguments, legs)?;
        differences(&mut page, legs)?;
        gateway(&mut page, legs)?;
        let errors = legs.iter().flat_map(|leg| &leg.load.errors);
        reasons(&mut page, errors)?;
    }
    if let Some(idle) = idle {
        idle_streams(&mut page, arguments, idle)?;
    }
    Ok(page)
}

fn page_head(page: &mut String, head: &Head, legs: &[Leg]) -> Result<()> {
    let text = |name: &str| head.record[name].as_str().unwrap_or("unknown").to_owned();
    let words = head.record["command"].as_array().into_iter().flatten();
    let command: Vec<_> = words.filter_map(Value::as_str).collect();
    writeln!(page, "# What the gateway adds, {}\n", text("date"))?;
    writeln!(
        page,
        "{}, {} cores; commit {}; gateway: {}.\n",
        text("processor"),
        head.record["cores"],
        text("commit"),
        head.version,
    )?;
    writeln!(page, "`{}`\n", command.join(" "))?;
    let stolen = legs.iter().map(|leg| leg.stolen).fold(0.0, f64::max);
    let (idle, stolen) = (head.idle_share * 100.0, stolen * 100.0);
    write!(page, "Idle before the first leg {idle:.1} %, most stolen in a leg {stolen:.1} %")?;
    let is_busy = head.idle_share < IDLE_SHARE;
    let said = "; **the machine was not idle, and the numbers prove nothing**";
    writeln!(page, "{}.\n", if is_busy { said } else { "" })?;
    Ok(())
}

fn latencies(page: &mut String, arguments: &GatewayArguments, legs: &[Leg]) -> Result<()> {
    let streamed = arguments.stream_rate.unwrap_or(arguments.rate);
    writeln!(page, "## Latency, ms\n")?;
    writeln!(
        page,
        "From the time that was planned for a request: {} a second, streamed ones {streamed}, {} s a leg behind one second \
         that warms up; kept HTTP/1.1 connections; answers of {} tokens, written at once. Late is how far behind its plan \
         this program began requests; it is part of every latency.\n",
        arguments.rate,
        arguments.seconds,
        super::TOKENS,
    )?;
    writeln!(page, "| leg | | of | good a second | errors | p50 | p90 | p99 | max | late p99 |")?;
    writeln!(page, "|---|---|---|---|---|---|---|---|---|---|")?;
    for (at, leg) in legs.iter().enumerate() {
        for measure in MEASURES.iter().filter(|it| it.form == leg.form) {
            writeln!(
                page,
                "| {} | {} | {} | {:.1} | {} | {} | {:.3} |",
                at + 1,
                leg.side.name(),
                measure.name,
                leg.load.rate(),
                leg.load.n_errors(),
                spread(&values(leg, measure.of)),
                at_share(&values(leg, |reply| reply.late), 0.99),
            )?;
        }
    }
    writeln!(page)?;
    Ok(())
}

/// Of all legs together, and of each pair of neighbours, which share what the machine did meanwhile.
fn differences(page: &mut String, legs: &[Leg]) -> Result<()> {
    writeln!(page, "## Gateway minus direct, ms\n")?;
    writeln!(page, "All legs of a side together; in brackets each pair of neighbours.\n")?;
    writeln!(page, "| of | share | direct | gateway | difference |\n|---|---|---|---|---|")?;
    for measure in &MEASURES {
        let of_form: Vec<&Leg> = legs.iter().filter(|leg| leg.form == measure.form).collect();
        let all = |side: Side| -> Vec<f64> {
            let legs = of_form.iter().filter(|leg| leg.side == side);
            legs.flat_map(|leg| values(leg, measure.of)).collect()
        };
        let (direct, gateway) = (all(Side::Direct), all(Side::Gateway));
        if direct.is_empty() || gateway.is_empty() {
            continue;
        }
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let pairs = of_form.chunks_exact(2).map(|pair| {
                let [before, after] = [pair[0], pair[1]].map(|leg| values(leg, measure.of));
                format!("{:+.3}", at_share(&after, share) - at_share(&before, share))
            });
            let pairs: Vec<String> = pairs.collect();
            let (direct, gateway) = (at_share(&direct, share), at_share(&gateway, share));
            writeln!(
                page,
                "| {} | {name} | {direct:.3} | {gateway:.3} | {:+.3} ({}) |",
                measure.name,
                gateway - direct,
                pairs.join(", "),
            )?;
        }
    }
    writeln!(page)?;
    Ok(())
}

fn gateway(page: &mut String, legs: &[Leg]) -> Result<()> {
    writeln!(page, "## The gateway\n")?;
    writeln!(
        page,
        "What it says was its own share (`x-exrail-overhead-ms`; of a stream, until its head), processor time of all its \
         threads for one request, resident memory, and lines more in its trace log.\n"
    )?;
    writeln!(
        page,
        "| leg | answers | told p50, ms | p90 | p99 | max | processor, µs | MiB before | after | most so far | lines | of \
         requests |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )?;
    for (at, leg) in legs.iter().enumerate() {
        let Some(seen) = &leg.seen else { continue };
        let told: Vec<f64> = leg.load.replies.iter().filter_map(|reply| reply.told).collect();
        let form = if leg.form == Form::Plain { "whole" } else { "streamed" };
        writeln!(
            page,
            "| {} | {form} | {} | {:.0} | {} | {} | {} | {} | {} |",
            at + 1,
            spread(&told),
            seen.processor_us,
            Mebibytes(seen.before.now_kib),
            Mebibytes(seen.after.now_kib),
            Mebibytes(seen.after.peak_kib),
            seen.traced,
            seen.n_sent,
        )?;
    }
    writeln!(page)?;
    Ok(())
}

fn idle_streams(page: &mut String, arguments: &GatewayArguments, idle: &Idle) -> Result<()> {
    writeln!(page, "## Open streams\n")?;
    writeln!(
        page,
        "Another gateway, at an upstream that pauses {} s between tokens. Of {} streams {} were open after {:.1} s and {} \
         still {} s later.\n",
        arguments.pause_s,
        idle.n_asked,
        idle.n_opened,
        idle.opening_s,
        idle.n_held,
        arguments.seconds,
    )?;
    let a_stream =
        |kib: u64| kib.saturating_sub(idle.before.now_kib) as f64 / idle.n_opened.max(1) as f64;
    writeln!(page, "| gateway | MiB | KiB a stream |\n|---|---|---|")?;
    writeln!(page, "| before | {} | |", Mebibytes(idle.before.now_kib))?;
    for (name, memory) in [("all open", idle.opened), ("at the end", idle.held)] {
        let (now, more) = (Mebibytes(memory.now_kib), a_stream(memory.now_kib));
        writeln!(page, "| {name} | {now} | {more:.1} |")?;
    }
    let share = idle.processor_share * 100.0;
    writeln!(page, "\nMeanwhile it took {share:.1} % of one processor.\n")?;
    reasons(page, idle.errors.iter())
}

fn reasons<'a>(
    page: &mut String,
    errors: impl Iterator<Item = (&'a String, &'a usize)>,
) -> Result<()> {
    let mut all: BTreeMap<&str, usize> = BTreeMap::new();
    for (reason, n) in errors {
        *all.entry(reason).or_default() += n;
    }
    if all.is_empty() {
        return Ok(());
    }
    writeln!(page, "Errors:\n")?;
    for (reason, n) in all {
        writeln!(page, "- {n}: {reason}")?;
    }
    writeln!(page)?;
    Ok(())
}

fn values(leg: &Leg, of: fn(&Reply) -> f64) -> Vec<f64> {
    leg.load.replies.iter().map(of).collect()
}

/// Not a number where there are none.
fn at_share(values: &[f64], share: f64) -> f64 {
    quantile(values, share).unwrap_or(f64::NAN)
}

/// Four cells.
fn spread(values: &[f64]) -> String {
    let cells = [0.5, 0.9, 0.99, 1.0].map(|share| format!("{:.3}", at_share(values, share)));
    cells.join(" | ")
}

struct Mebibytes(u64);

impl fmt::Display for Mebibytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:.1}", self.0 as f64 / 1024.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::load::Load;

    fn leg(side: Side, whole: f64) -> Leg {
        let reply = Reply { late: 0.0, first: whole, whole, told: None };
        let load = Load { replies: vec![reply; 3], seconds: 1.0, ..Load::default() };
        Leg { side, form: Form::Plain, load, stolen: 0.0, seen: None }
    }

    #[test]
    fn differences_are_of_all_legs_and_of_pairs() {
        let legs = [
            leg(Side::Direct, 1.0),
            leg(Side::Gateway, 1.5),
            leg(Side::Direct, 1.0),
            leg(Side::Gateway, 1.75),
        ];
        let mut page = String::new();
        differences(&mut page, &legs).unwrap();
        let row = "| whole answer | p99 | 1.000 | 1.750 | +0.750 (+0.500, +0.750) |";
        assert!(page.contains(row), "{page}");
        assert!(!page.contains("stream"), "{page}");
    }

    #[test]
    fn a_leg_without_a_good_answer_has_no_latency() {
        let mut leg = leg(Side::Direct, 1.0);
        leg.load.replies.clear();
        assert!(spread(&values(&leg, |reply| reply.whole)).starts_with("NaN"));
    }
}
