//! `exrail-bench soak`: many clients at a server that it starts itself, on loopback only.

mod client;
mod http;
mod server;
mod verdict;

use std::{
    env, fs,
    io::{self, Write},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use serde_json::json;

use self::{
    client::Plan,
    server::{Gauges, Server},
    verdict::{Check, Counts, Sample},
};
use crate::{machine, random::Random, record};

/// How long the last sequences may take to end after the last client.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(crate) struct SoakArguments {
    /// The exrail program
    #[arg(long)]
    exrail: PathBuf,
    /// Name or path of the generator
    #[arg(long, default_value = "smollm2-135m-instruct")]
    model: String,
    /// Clients at a time
    #[arg(long, default_value_t = 32)]
    clients: usize,
    /// How long they ask
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Requests in 100 that are given up midway
    #[arg(long, default_value_t = 30)]
    cancel_percent: u64,
    /// Pages of the server's KV pool: few enough that all are in use before memory is judged
    #[arg(long, default_value_t = 64)]
    kv_pages: usize,
    /// Seed of the requests
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the record goes
    #[arg(long, default_value = "bench/record")]
    record: PathBuf,
}

pub(crate) fn run(arguments: &SoakArguments) -> Result<()> {
    ensure!(arguments.clients > 0, "--clients: expected at least 1, found 0");
    ensure!(arguments.seconds >= 10, "--seconds: expected at least 10 for a slope of memory");
    let traces = own_trace_log()?;
    let kv_pages = arguments.kv_pages.to_string();
    let options =
        [["--model", &arguments.model], ["--kv-pages", &kv_pages], ["--trace-log", &traces]];
    let server = Server::start(&arguments.exrail, options.as_flattened())?;
    let model = served_model(&server)?;
    let (counts, samples) = drive(arguments, &server, &model)?;
    let end = drain(&server)?;
    drop(server);
    fs::remove_file(&traces).context("trace log of the soak")?;
    let checks = verdict::judge(&counts, &samples, end)?;
    print_table(arguments, &counts, &checks)?;
    let mut record = record::head("soak");
    record["model"] = model.into();
    record["clients"] = arguments.clients.into();
    record["seconds"] = arguments.seconds.into();
    record["kv_pages"] = arguments.kv_pages.into();
    record["cancel_percent"] = arguments.cancel_percent.into();
    record["checks"] = json!(checks);
    record["by_client"] = json!(counts);
    record["samples"] = json!(samples);
    let path = record::write(&arguments.record, "soak", &record)?;
    writeln!(io::stdout(), "record: {}", path.display())?;
    let n_failed = checks.iter().filter(|check| !check.pass).count();
    ensure!(n_failed == 0, "soak: {n_failed} of {} demands failed", checks.len());
    Ok(())
}

/// A trace log of the soak's own: thousands of requests do not belong into the user's.
fn own_trace_log() -> Result<String> {
    let path = env::temp_dir().join(format!("exrail-soak-{}.jsonl", std::process::id()));
    path.into_os_string()
        .into_string()
        .map_err(|path| anyhow!("{}: expected UTF-8", path.display()))
}

/// The name that the server gives its generator.
fn served_model(server: &Server) -> Result<String> {
    let (status, body) = http::get(server.address, "/v1/models").context("/v1/models")?;
    ensure!(status == 200, "/v1/models: expected status 200, found {status}: {body}");
    let list: serde_json::Value = serde_json::from_str(&body).context("/v1/models")?;
    let id = list["data"][0]["id"].as_str();
    Ok(id.with_context(|| format!("/v1/models: expected a model, found {body}"))?.to_owned())
}

/// Runs the clients, one thread each, and watches the server meanwhile.
fn drive(
    arguments: &SoakArguments,
    server: &Server,
    model: &str,
) -> Result<(Vec<Counts>, Vec<Sample>)> {
    let stop = AtomicBool::new(false);
    let client = |index: usize| {
        let mut random = Random::new(arguments.seed ^ ((index as u64 + 1) << 32));
        let mut counts = Counts::default();
        while !stop.load(Ordering::Relaxed) {
            let outcome =
                Plan::draw(&mut random, model, arguments.cancel_percent).run(server.address);
            let pause = matches!(outcome, client::Outcome::Full | client::Outcome::Fault(_));
            counts.add(outcome);
            if pause {
                thread::sleep(Duration::from_millis(200));
            }
        }
        counts
    };
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..arguments.clients).map(|index| scope.spawn(move || client(index))).collect();
        let samples = watch(server, Duration::from_secs(arguments.seconds));
        // Also when watching failed: a scope waits for its threads.
        stop.store(true, Ordering::Relaxed);
        let counts = threads.into_iter().map(|thread| thread.join().expect("a client panicked"));
        let counts = counts.collect();
        Ok((counts, samples?))
    })
}

/// One sample a second.
fn watch(server: &Server, time: Duration) -> Result<Vec<Sample>> {
    let since = Instant::now();
    let mut samples = Vec::new();
    while since.elapsed() < time {
        thread::sleep(Duration::from_secs(1));
        let gauges = server.gauges()?;
        let sample = Sample {
            seconds: since.elapsed().as_secs_f64(),
            resident_kib: machine::resident_kib(server.pid())?,
            generated: gauges.generated,
            pages_free: gauges.pages_free,
        };
        samples.push(sample);
        if samples.len().is_multiple_of(15) {
            writeln!(
                io::stderr(),
                "{:>4.0} s  {} tokens, {} running, {} waiting, {}/{} pages free, {} MiB",
                sample.seconds,
                gauges.generated,
                gauges.running,
                gauges.waiting,
                gauges.pages_free,
                gauges.pages_total,
                sample.resident_kib / 1024
            )?;
        }
    }
    Ok(samples)
}

/// Waits until nothing runs any more, and returns what the server then says.
fn drain(server: &Server) -> Result<Gauges> {
    let since = Instant::now();
    loop {
        let gauges = server.gauges()?;
        let is_done =
            gauges.running == 0 && gauges.waiting == 0 && gauges.pages_free == gauges.pages_total;
        if is_done || since.elapsed() > DRAIN_LIMIT {
            return Ok(gauges);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn print_table(arguments: &SoakArguments, counts: &[Counts], checks: &[Check]) -> Result<()> {
    let sum = |field: fn(&Counts) -> u64| counts.iter().map(field).sum::<u64>();
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{} clients, {} s: {} complete, {} cancelled, {} turned away (429), {} faults",
        arguments.clients,
        arguments.seconds,
        sum(|c| c.complete),
        sum(|c| c.cancelled),
        sum(|c| c.full),
        sum(|c| c.n_faults)
    )?;
    for check in checks {
        writeln!(out, "{check}")?;
    }
    for fault in counts.iter().flat_map(|c| &c.faults).take(5) {
        writeln!(out, "fault: {fault}")?;
    }
    Ok(())
}
