//! The comparison for people: lines while it runs, and the page beside the record.

use std::{
    fmt::Write as _,
    io::{self, Write},
};

use anyhow::Result;
use serde_json::Value;

use super::{
    ModelReport, Side,
    gates::{Demand, Gate, Status},
    reading::{Comparison, Samples, Test},
};

/// A line on standard error before each run.
pub(super) fn progress(model: &str, round: usize, side: Side) -> Result<()> {
    writeln!(io::stderr(), "{model}: round {round}, {}", side.name())?;
    Ok(())
}

/// The numbers of one file.
pub(super) fn tell(out: &mut impl Write, report: &ModelReport) -> Result<()> {
    writeln!(out, "{}", report.model)?;
    if let Some(reason) = &report.refused {
        writeln!(out, "  not measured: {reason}")?;
    }
    for comparison in &report.comparisons {
        let [name, ours, theirs, ratio] = cells(comparison);
        writeln!(out, "  {name:26} {ours:>28} {theirs:>28} {ratio:>20}")?;
    }
    writeln!(out)?;
    Ok(())
}

/// Every gate with its verdict.
pub(super) fn gates(out: &mut impl Write, models: &[ModelReport], idle: &Gate) -> Result<()> {
    for model in models {
        for gate in &model.gates {
            writeln!(out, "{:13} {}: {}", verdict(gate), model.model, sentence(gate))?;
        }
    }
    writeln!(out, "{:13} {}", verdict(idle), sentence(idle))?;
    Ok(())
}

/// The page beside the record.
pub(super) fn page(record: &Value, models: &[ModelReport], idle: &Gate) -> Result<String> {
    let mut page = String::new();
    let machine = &record["machine"];
    writeln!(page, "# CPU: exrail and llama.cpp, {}\n", text(&record["date"]))?;
    writeln!(
        page,
        "{}, {} cores, {} threads, {}; commit {}. {}; {}.\n",
        text(&record["processor"]),
        record["cores"],
        record["sizes"]["threads"],
        text(&machine["kernel"]),
        text(&record["commit"]),
        text(&record["programs"]["exrail"]["version"]),
        text(&record["programs"]["llama_cpp"]["package"]),
    )?;
    let flags = machine["flags"].as_array().into_iter().flatten();
    let flags: Vec<_> = flags.filter_map(Value::as_str).collect();
    let percent = |share: &Value| share.as_f64().unwrap_or(f64::NAN) * 100.0;
    writeln!(
        page,
        "Processor flags: {}. Idle at the start {:.1} %, least before a run {:.1} %{}.\n",
        flags.join(" "),
        percent(&record["idle"]["at_start"]),
        percent(&record["idle"]["least_before_a_run"]),
        if record["idle"]["not_idle_accepted"] == true {
            "; **the machine was not required to be idle**"
        } else {
            ""
        },
    )?;
    writeln!(
        page,
        "Medians of {} turns of each side, smallest and largest in brackets; ratios of medians, and \
         those of single rounds.\n",
        record["sizes"]["rounds"],
    )?;
    for model in models {
        model_section(&mut page, model)?;
    }
    writeln!(
        page,
        "## Gates\n\n| gate | file | found | demanded | goal | |\n|---|---|---|---|---|---|"
    )?;
    for model in models {
        for gate in &model.gates {
            gate_row(&mut page, &model.model, gate)?;
        }
    }
    gate_row(&mut page, "", idle)?;
    Ok(page)
}

fn model_section(page: &mut String, report: &ModelReport) -> Result<()> {
    writeln!(page, "## {}\n", report.model)?;
    writeln!(page, "{} bytes, sha256 `{}`.\n", report.file_bytes, report.sha256)?;
    if let Some(reason) = &report.refused {
        writeln!(page, "Not measured: {reason}\n")?;
        return Ok(());
    }
    writeln!(page, "| | exrail | llama.cpp | ratio |\n|---|---|---|---|")?;
    for comparison in &report.comparisons {
        let [name, ours, theirs, ratio] = cells(comparison);
        writeln!(page, "| {name} | {ours} | {theirs} | {ratio} |")?;
    }
    writeln!(page)?;
    let model = &report.exrail["model"];
    writeln!(
        page,
        "{}; weights and KV that decode streams in one round:\n",
        text(&model["kernels"])
    )?;
    writeln!(page, "| decode | MB a step | GB/s | of the fastest read |\n|---|---|---|---|")?;
    for test in model["decode"].as_array().into_iter().flatten() {
        let number = |key: &str| test[key].as_f64().unwrap_or(f64::NAN);
        writeln!(
            page,
            "| @{} x{} | {:.1} | {:.1} | {:.0} % |",
            test["depth"],
            test["batch"],
            (number("weight_step_bytes") + number("kv_step_bytes")) / 1e6,
            number("bytes_per_s") / 1e9,
            number("share_of_read") * 100.0,
        )?;
    }
    writeln!(page)?;
    Ok(())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("unknown").to_owned()
}

fn gate_row(page: &mut String, model: &str, gate: &Gate) -> Result<()> {
    let found = gate.found.map_or_else(|| "-".to_owned(), |found| format!("{found:.3}"));
    let goal = goal(gate).unwrap_or_default();
    let (name, demanded, verdict) = (&gate.name, demanded(gate), verdict(gate));
    writeln!(page, "| {name} | {model} | {found} | {demanded} | {goal} | {verdict} |")?;
    Ok(())
}

/// Name, ours, theirs, ratio.
fn cells(comparison: &Comparison) -> [String; 4] {
    let test = comparison.test;
    let ratio = match (comparison.ratio, comparison.ratio_range) {
        (Some(ratio), Some([low, high])) => format!("{ratio:.2} ({low:.2} to {high:.2})"),
        (Some(ratio), None) => format!("{ratio:.2}"),
        (None, _) => "-".to_owned(),
    };
    let side = |samples: &Option<Samples>| shown(test, samples.as_ref());
    [test.name(), side(&comparison.exrail), side(&comparison.llama_cpp), ratio]
}

fn shown(test: Test, samples: Option<&Samples>) -> String {
    let Some(Samples { median, min, max, n }) = samples else { return "-".to_owned() };
    if *n == 1 {
        return test.show(*median);
    }
    format!("{} ({} to {})", test.show(*median), test.show(*min), test.show(*max))
}

fn sentence(gate: &Gate) -> String {
    let found = gate.found.map_or_else(|| "not measured".to_owned(), |n| format!("{n:.3}"));
    let goal = goal(gate).map(|goal| format!(", goal {goal}")).unwrap_or_default();
    format!("{}: {found}, demanded {}{goal}", gate.name, demanded(gate))
}

fn demanded(gate: &Gate) -> String {
    match gate.demand {
        Demand::AtLeast(limit) => format!("at least {limit}"),
        Demand::AtMost(limit) => format!("at most {limit}"),
    }
}

fn goal(gate: &Gate) -> Option<String> {
    let goal = gate.goal?;
    Some(match gate.found {
        Some(found) if found >= goal => format!("{goal} reached"),
        Some(_) => format!("{goal} not reached"),
        None => goal.to_string(),
    })
}

fn verdict(gate: &Gate) -> &'static str {
    match gate.status {
        Status::Pass => "pass",
        Status::Fail => "FAIL",
        Status::NotAvailable => "NOT AVAILABLE",
    }
}
