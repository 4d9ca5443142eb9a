//! A model's results for people.

use super::{
    guards,
    plan::Plan,
    record::{DecodeRecord, GuardsCost, Measured, Memory, PrefillRecord, Spread},
    speed::StepOutput,
};
use crate::output::Output;

pub(super) fn print(output: Output, plan: &Plan, measured: &Measured) {
    let Measured { model, architecture, quant, kernels, .. } = measured;
    let weights = measured.weight_bytes as f64 / 1e6;
    output.line(model);
    output.line(format!("  {architecture}, {quant}, {weights:.1} MB of weights; {kernels}"));
    output.line(format!(
        "  {:20} {:>9}   {:^19} {:>9} {:>7} {:>8}",
        "", "tok/s", "range", "ms/step", "GB/s", "of read"
    ));
    for test in &measured.prefill {
        let ms = test.tokens as f64 / test.tokens_per_s.median * 1e3;
        output.line(format!("{} {ms:9.2}", row(&prefill_name(test), &test.tokens_per_s)));
    }
    for test in &measured.decode {
        let ms = test.batch as f64 / test.tokens_per_s.median * 1e3;
        let (rate, share) = (test.bytes_per_s / 1e9, test.share_of_read * 100.0);
        let row = row(&decode_name(test), &test.tokens_per_s);
        output.line(format!("{row} {ms:9.2} {rate:7.1} {share:6.0} %"));
    }
    if plan.batch_invariant {
        output.line(format!("  batch-invariant: {}", cost(measured)));
    }
    let read = &measured.read_bytes_per_s;
    output.line(format!(
        "  memory reads: {:.1} GB/s at best, {:.1} in the median, same threads, same run",
        read.max / 1e9,
        read.median / 1e9
    ));
    let first = &measured.first_token;
    output.line(format!(
        "  first token: {} ms after the start of the process; loaded after {:.0} ms, ended after {} ms",
        milliseconds(&first.first_token_s),
        first.load_s.median * 1e3,
        milliseconds(&first.process_s)
    ));
    output.line(format!("  memory, one sequence of one page: {}", memory(&measured.memory)));
    let n = plan.most_sequences();
    let sequences = if n == 1 { "1 sequence".to_owned() } else { format!("{n} sequences") };
    output.line(format!("  memory, {sequences}: {}", memory(&measured.memory_at_speed)));
    output.line("");
}

/// What guards cost, with the limits.
pub(super) fn print_guards(output: Output, cost: &GuardsCost) {
    output.line(&cost.model);
    output.line(format!("  {}; with all inline guards and without any, in turns", cost.kernels));
    for test in &cost.first_token {
        let Spread { median, min, max, .. } = &test.added_ms;
        output.line(format!(
            "  {:26} {:9.1} ms     {median:+8.2} ms ({min:+.2} to {max:+.2}), limit {} ms{}",
            format!("first token of {}", test.prompt),
            test.unguarded_ms,
            guards::FIRST_TOKEN_LIMIT_MS,
            exceeded(test.within_limit)
        ));
    }
    for test in &cost.decode {
        let percent = |share: f64| -100.0 * share;
        let Spread { median, min, max, .. } = &test.share_taken;
        let kind = if test.sampled { "sampled" } else { "greedy" };
        output.line(format!(
            "  {:26} {:9.1} tok/s  {:+8.2} %  ({:+.2} to {:+.2}), limit {} %{}",
            format!("decode x{} {kind}", test.batch),
            test.unguarded_tokens_per_s,
            percent(*median),
            percent(*max),
            percent(*min),
            percent(guards::DECODE_LIMIT),
            exceeded(test.within_limit)
        ));
    }
    output.line("");
}

fn exceeded(within_limit: bool) -> &'static str {
    if within_limit { "" } else { ": exceeded" }
}

/// What the mode leaves of the speed without it, test by test.
fn cost(measured: &Measured) -> String {
    let prefill = measured
        .prefill
        .iter()
        .filter_map(|test| Some((prefill_name(test), test.cost.as_ref()?.batch_invariant_ratio)));
    let decode = measured
        .decode
        .iter()
        .filter_map(|test| Some((decode_name(test), test.cost.as_ref()?.batch_invariant_ratio)));
    let parts: Vec<String> =
        prefill.chain(decode).map(|(name, ratio)| format!("{name} {ratio:.2}")).collect();
    if parts.is_empty() {
        return "rows of this device always are, it costs nothing".to_owned();
    }
    format!("of the speed without it, in turns: {}", parts.join(", "))
}

fn prefill_name(test: &PrefillRecord) -> String {
    format!("prefill {}", test.tokens)
}

fn decode_name(test: &DecodeRecord) -> String {
    let kind = match test.output {
        StepOutput::Logits => "",
        StepOutput::Token => " greedy",
        StepOutput::Drawn => " sampled",
    };
    format!("decode @{} x{}{kind}", test.depth, test.batch)
}

fn row(name: &str, rate: &Spread) -> String {
    let range = format!("{:.1} to {:.1}", rate.min, rate.max);
    format!("  {name:20} {:9.1}   {range:^19}", rate.median)
}

fn milliseconds(spread: &Spread) -> String {
    let ms = |seconds: f64| seconds * 1e3;
    format!("{:.0} ({:.0} to {:.0})", ms(spread.median), ms(spread.min), ms(spread.max))
}

fn memory(memory: &Memory) -> String {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let needed =
        format!("weights {:.1} MB, KV {:.1} MB", mb(memory.weight_bytes), mb(memory.kv_bytes));
    match memory.resident.zip(memory.resident_ratio) {
        Some((resident, ratio)) => format!(
            "{needed}, resident {:.1} MB ({ratio:.2} of both), peak {:.1} MB",
            mb(resident.now),
            mb(resident.peak)
        ),
        None => format!("{needed}, resident memory not available"),
    }
}
