//! `exrail-bench gateway`: what `exrail gateway` adds to a request, beside the same request without it, in turns
//! (A B A B …); and what open streams cost it.
//!
//! The upstream writes made-up text at once, so that nothing but the way there and back is left. It runs in this
//! process, on a thread of its own; the gateway is the real program, with its traces.

mod idle;
mod load;
mod process;
mod report;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use clap::{Args, value_parser};
use exrail_testkit::{ScriptedOptions, ScriptedUpstream};
use tokio::runtime::{Builder, Runtime};

use self::{
    load::{Form, Load, Plan},
    process::Process,
};
use crate::{
    machine::{self, Busy, Resident},
    record,
};

const MODEL: &str = "scripted";
/// Tokens of an answer.
const TOKENS: usize = 16;
/// Idle before the first leg.
const WINDOW: Duration = Duration::from_secs(3);
/// Open files of this process beyond those of streams: requests that wait have two each.
const FILES: usize = 10_000;

#[derive(Debug, Args)]
pub(crate) struct GatewayArguments {
    /// The exrail program
    #[arg(long)]
    exrail: PathBuf,
    /// Requests a second; their times are fixed in advance
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = value_parser!(u32).range(1..))]
    rate: u32,
    /// Seconds of a leg, after one more that warms up
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = value_parser!(u32).range(1..))]
    seconds: u32,
    /// Legs, without the gateway and through it in turns
    #[arg(long, value_name = "N", default_value_t = 4)]
    legs: usize,
    /// As many legs of streamed answers behind those of whole ones
    #[arg(long)]
    streams: bool,
    /// Streamed requests a second, when they are not as many
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    stream_rate: Option<u32>,
    /// Then hold so many streams open at once, at an upstream that pauses between tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    idle_streams: usize,
    /// Seconds of such a pause; a gateway takes 30 for a stall
    #[arg(long, value_name = "S", default_value_t = 20, value_parser = value_parser!(u64).range(1..=25))]
    pause_s: u64,
    /// Where the page goes; standard output without it
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Seconds to wait for an idle machine before the first leg
    #[arg(long, value_name = "S", default_value_t = 60)]
    patience_s: u64,
    /// Measure on a busy machine; the page says so
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Direct,
    Gateway,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Direct => "direct",
            Side::Gateway => "gateway",
        }
    }
}

/// Some seconds of requests to one side.
#[derive(Debug)]
struct Leg {
    side: Side,
    form: Form,
    load: Load,
    /// Share of time that the hypervisor gave to others meanwhile, in [0, 1].
    stolen: f64,
    /// Of the gateway, where it was asked.
    seen: Option<Seen>,
}

/// What a leg did to the gateway.
#[derive(Clone, Copy, Debug)]
struct Seen {
    before: Resident,
    after: Resident,
    /// Of all its threads, for one request.
    processor_us: f64,
    /// Lines more in its trace log.
    traced: usize,
    /// Requests that it was sent, those that warm up among them.
    n_sent: usize,
}

/// Measures and tells.
///
/// # Errors
/// The machine is busy, the gateway does not start or ends, or the page cannot be written.
pub(crate) fn run(arguments: &GatewayArguments) -> Result<()> {
    process::allow_open_files(FILES + 2 * arguments.idle_streams)?;
    let busy = if arguments.force { Busy::Accept } else { Busy::Refuse };
    let patience = Duration::from_secs(arguments.patience_s);
    let version = version(&arguments.exrail)?;
    let idle_share = machine::wait_until_idle(WINDOW, patience, busy)?;
    let runtime = runtime()?;
    let legs = match arguments.legs {
        0 => Vec::new(),
        _ => legs(&runtime, arguments)?,
    };
    let idle = match arguments.idle_streams {
        0 => None,
        n => Some(idle::run(&runtime, arguments, n)?),
    };
    let head = report::Head { record: record::head("gateway"), version, idle_share };
    let page = report::page(&head, arguments, &legs, idle.as_ref())?;
    match &arguments.out {
        Some(path) => std::fs::write(path, page).with_context(|| path.display().to_string())?,
        None => io::stdout().lock().write_all(page.as_bytes())?,
    }
    Ok(())
}

fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| program.display().to_string())?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Answers as fast as it can.
fn scripted() -> ScriptedOptions {
    let (first_token, token) = (Duration::ZERO, Duration::ZERO);
    ScriptedOptions { model: MODEL.to_owned(), tokens: TOKENS, first_token, token }
}

/// Of the clients: few threads, as the gateway needs processors too.
fn runtime() -> Result<Runtime> {
    let threads = machine::cores().clamp(1, 4);
    Ok(Builder::new_multi_thread().worker_threads(threads).enable_all().build()?)
}

fn legs(runtime: &Runtime, arguments: &GatewayArguments) -> Result<Vec<Leg>> {
    let upstream = ScriptedUpstream::start(scripted()).context("the scripted upstream")?;
    let folder = tempfile::tempdir()?;
    let traces = folder.path().join("gateway.jsonl");
    let gateway = Process::start(runtime, &arguments.exrail, &upstream.url(), traces)?;
    let mut forms = vec![(Form::Plain, arguments.rate)];
    if arguments.streams {
        forms.push((Form::Streamed, arguments.stream_rate.unwrap_or(arguments.rate)));
    }
    let mut legs = Vec::new();
    for (form, rate) in forms {
        let n_warm = usize::try_from(rate)?;
        let n = n_warm * usize::try_from(arguments.seconds)?;
        for turn in 0..arguments.legs {
            let side = if turn % 2 == 0 { Side::Direct } else { Side::Gateway };
            writeln!(io::stderr(), "leg {}: {form:?}, {}", legs.len() + 1, side.name())?;
            let url = match side {
                Side::Direct => upstream.url(),
                Side::Gateway => gateway.url.clone(),
            };
            let plan = Plan { url: &url, form, rate, n_warm, n };
            legs.push(leg(runtime, &gateway, side, plan)?);
        }
    }
    gateway.stop(runtime)?;
    Ok(legs)
}

fn leg(runtime: &Runtime, gateway: &Process, side: Side, plan: Plan<'_>) -> Result<Leg> {
    let look =
        || -> Result<_> { Ok((gateway.memory()?, gateway.processor_time()?, gateway.traced()?)) };
    let ((before, time_before, traced_before), ticks) = (look()?, machine::ticks()?);
    let load = load::run(runtime, plan)?;
    let stolen = ticks.stolen_until(machine::ticks()?);
    let (after, time_after, traced_after) = look()?;
    let n_sent = plan.n_warm + plan.n;
    let seen = (side == Side::Gateway).then(|| Seen {
        before,
        after,
        processor_us: time_after.saturating_sub(time_before).as_secs_f64() * 1e6 / n_sent as f64,
        traced: traced_after.saturating_sub(traced_before),
        n_sent,
    });
    Ok(Leg { side, form: plan.form, load, stolen, seen })
}
