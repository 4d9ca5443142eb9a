//! `exrail soak`: many clients at a server that it starts itself, for as long as asked, and a verdict.
//!
//! The server is another process of the same program, on loopback. [`request`] draws what is asked, [`client`]
//! asks it, [`oracle`] compares what was served with fresh prefills, and [`verdict`] judges.

mod client;
mod faults;
mod held;
mod http;
mod oracle;
mod random;
mod request;
mod server;
mod verdict;

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use exrail_hub::Kind;
use exrail_verify::{KvWidth, Verdict};
use serde_json::{Value, json};

use self::{
    client::Outcome,
    oracle::{Compared, OracleReport},
    random::Random,
    request::{Mix, Plan},
    server::{Gauges, Server, Workplace},
    verdict::{Check, Counts, Findings, Sample, Took},
};
use super::bench::process;
use crate::{
    Ended,
    device::DeviceOption,
    environment,
    options::{DEFAULT_MODEL, KvOption, Sources},
    output::Output,
    progress::Bars,
};

/// How long the last sequences may take to end after the last client.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// Looks at the server in one soak, for its slopes; never more often than this.
const N_SAMPLES: f64 = 600.0;
const SHORTEST_LOOK: Duration = Duration::from_millis(100);
/// Time between two lines for who watches.
const TOLD_EVERY: Duration = Duration::from_secs(15);
/// Steps between two audits of the whole pool: often enough that a soak has many.
const AUDIT_EVERY: u64 = 64;

/// Drive a server of its own with many clients for a long time, and judge what it did.
///
/// Starts `exrail serve` as another process on loopback with a pool that is always full, and asks it a mix drawn from
/// one seed: random lengths, shared beginnings, streams, greedy and seeded answers, rotations, three tenants,
/// three priorities, clients that hang up in the queue, in the prompt and in the answer. Demands: no error, no
/// violation of the page books, every page back, answers whose distributions are those of fresh prefills, flat
/// memory, tokens all the time. Exits 0 when all hold and 3 when one does not, or cannot be told.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exrail soak                                      the default model for 30 minutes
  exrail soak model.gguf --minutes 5 --clients 64
  exrail soak --device cuda:0 --record records     also writes records/soak-DATE.json
  exrail soak --minutes 10 --faults                with faults, in a program built for it")]
pub(crate) struct Soak {
    /// Generator: a name of the registry, a GGUF file or a Hugging Face folder.
    #[arg(value_name = "MODEL", default_value = DEFAULT_MODEL, env = environment::MODEL)]
    model: String,
    /// Minutes for which the clients ask; a fraction is fine.
    #[arg(long, value_name = "M", default_value_t = 30.0)]
    minutes: f64,
    /// Clients at a time; as many sequences run at once.
    #[arg(long, value_name = "N", default_value = "32")]
    clients: NonZeroUsize,
    /// Pages of 256 tokens in the server's KV pool; one a client when absent, which keeps it full.
    #[arg(long, value_name = "N")]
    kv_pages: Option<NonZeroUsize>,
    /// Requests in 100 that are given up midway.
    #[arg(long, value_name = "PERCENT", default_value_t = 30)]
    #[arg(value_parser = clap::value_parser!(u64).range(0..=90))]
    cancel_percent: u64,
    /// Seed of everything that is asked.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Folder that gets a record with every sample.
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// Device: auto (the first GPU, or else the CPU), cpu or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "auto", env = environment::DEVICE)]
    device: DeviceOption,
    /// Threads of the CPU; one per physical core when absent.
    #[arg(long, value_name = "N", env = environment::THREADS)]
    threads: Option<NonZeroUsize>,
    /// Element type of the KV cache.
    #[arg(long, value_enum, default_value = "f16")]
    kv: KvOption,
    /// Give every answer the same bits whatever runs beside it.
    #[arg(long)]
    batch_invariant: bool,
    /// Ask half the time undisturbed, and the same again while faults are injected. Needs a program with
    /// feature `faults`, which no release has.
    #[arg(long)]
    faults: bool,
    /// With faults: the checks of the page books find nothing, so that the soak is to fail.
    #[arg(long, hide = true, requires = "faults")]
    guards_off: bool,
    #[command(flatten)]
    sources: Sources,
}

/// What the clients found.
#[derive(Debug, Default)]
struct Driven {
    by_client: Vec<Counts>,
    compared: Vec<Compared>,
    samples: Vec<Sample>,
}

impl Soak {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        ensure!(
            self.minutes.is_finite() && self.minutes > 0.0,
            "--minutes: expected more than 0, found {}",
            self.minutes
        );
        ensure!(
            !self.faults || cfg!(feature = "faults"),
            "--faults: expected a program with feature `faults`, found one without; build it with \
             `cargo build -p exrail-cli --features faults`"
        );
        let mut bars = Bars::new(*output);
        let path = self.sources.resolve(&self.model, Kind::Generator, &mut bars)?.path;
        bars.clear();
        let workplace = Workplace::new()?;
        let soaked = if self.faults {
            self.run_with_faults(&path, &workplace, *output)
        } else {
            self.soak(&path, &workplace, *output)
        };
        let kept = workplace.path().to_owned();
        if let Ok(Ended::Done) = soaked {
            workplace.remove()?;
        } else {
            output.note(format!("the server's log and traces are in {}", kept.display()));
        }
        soaked
    }

    fn soak(&self, model: &Path, workplace: &Workplace, output: Output) -> Result<Ended> {
        let server = Server::start(workplace, &self.options(model, AUDIT_EVERY)?)?;
        let mix = Mix::of(&server, self.cancel_percent)?;
        let noise = oracle::noise(server.target(0), &mix.model, mix.noise_prompt())?;
        let driven = self.drive(&server, &mix, output)?;
        let end = drain(&server)?;
        drop(server);
        let oracle = OracleReport::of(&driven.compared, noise, self.width());
        let findings =
            Findings { counts: &driven.by_client, samples: &driven.samples, oracle: &oracle, end };
        let checks = verdict::judge(&findings);
        self.print(output, &driven, &end, &checks);
        let found = json!({
            "checks": checks,
            "oracle": oracle,
            "by_client": driven.by_client,
            "samples": driven.samples,
        });
        self.tell(model, &found, output)?;
        let passed = checks.iter().all(|check| check.verdict == Verdict::Pass);
        Ok(if passed { Ended::Done } else { Ended::NotPassed })
    }

    /// How the server is started.
    fn options(&self, model: &Path, audit_every: u64) -> Result<Vec<String>> {
        let kv = self.kv.to_possible_value().context("every element type has a name")?;
        let model = model.to_str().context("model: expected a path in UTF-8")?;
        let mut pairs = vec![
            ("--model", model.to_owned()),
            ("--device", self.device.to_string()),
            ("--kv", kv.get_name().to_owned()),
            ("--max-sequences", self.clients.to_string()),
            ("--kv-pages", self.kv_pages.unwrap_or(self.clients).to_string()),
            ("--kv-audit-every", audit_every.to_string()),
            // No client of a soak waits in vain for a place.
            ("--queue-limit", (8 * self.clients.get()).to_string()),
        ];
        if let Some(threads) = self.threads {
            pairs.push(("--threads", threads.to_string()));
        }
        let pairs = pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
        let flag = self.batch_invariant.then(|| "--batch-invariant".to_owned());
        Ok(pairs.chain(flag).collect())
    }

    fn width(&self) -> KvWidth {
        match self.kv {
            KvOption::F16 | KvOption::F32 => KvWidth::Sixteen,
            KvOption::Int8 => KvWidth::Eight,
        }
    }

    /// Runs the clients, one thread each, and watches the server meanwhile.
    fn drive(&self, server: &Server, mix: &Mix, output: Output) -> Result<Driven> {
        let (stop, ended) = (AtomicBool::new(false), AtomicU64::new(0));
        let compared = Mutex::new(Vec::new());
        let start = Instant::now();
        let client = |index: usize| {
            let mut random = Random::new(self.seed ^ ((index as u64 + 1) << 32));
            let mut counts = Counts::default();
            while !stop.load(Ordering::Relaxed) {
                let plan = mix.draw(&mut random);
                let asked = Instant::now();
                let outcome = plan.run(server.target(plan.tenant));
                let (at, seconds) = (start.elapsed().as_secs_f64(), asked.elapsed().as_secs_f64());
                counts.add(&outcome, Took { at, seconds });
                ended.fetch_add(1, Ordering::Relaxed);
                match compare(server, mix, &plan, &outcome) {
                    Ok(found) => {
                        compared.lock().unwrap_or_else(PoisonError::into_inner).extend(found);
                    }
                    Err(error) => counts.add_fault(&format!("{error:#}")),
                }
                if !matches!(outcome, Outcome::Complete { .. } | Outcome::Cancelled) {
                    thread::sleep(Duration::from_millis(200));
                }
            }
            counts
        };
        let time = Duration::from_secs_f64(self.minutes * 60.0);
        let (by_client, samples) = thread::scope(|scope| {
            let threads: Vec<_> =
                (0..self.clients.get()).map(|index| scope.spawn(move || client(index))).collect();
            let samples = watch(server, time, &ended, output);
            // Also when watching failed: a scope waits for its threads.
            stop.store(true, Ordering::Relaxed);
            let counts =
                threads.into_iter().map(|thread| thread.join().expect("a client panicked"));
            (counts.collect(), samples)
        });
        let compared = compared.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Driven { by_client, compared, samples: samples? })
    }

    fn print(&self, output: Output, driven: &Driven, end: &Gauges, checks: &[Check]) {
        let sum = |field: fn(&Counts) -> u64| driven.by_client.iter().map(field).sum::<u64>();
        output.line(format!(
            "{} clients, {} min, seed {}: {} complete, {} cancelled, {} turned away (429), {} faults",
            self.clients,
            self.minutes,
            self.seed,
            sum(|c| c.complete),
            sum(|c| c.cancelled),
            sum(|c| c.full),
            sum(|c| c.n_faults)
        ));
        output.line(format!(
            "{} tokens, {} cached pages given up for others",
            end.generated, end.evictions
        ));
        checks.iter().for_each(|check| output.line(check));
        for fault in driven.by_client.iter().flat_map(|counts| &counts.faults).take(5) {
            output.line(format!("fault: {fault}"));
        }
    }

    /// Tells programs what was found, and writes the record.
    fn tell(&self, model: &Path, found: &Value, output: Output) -> Result<()> {
        let mut record = json!({
            "kind": "soak",
            "version": 1,
            "program": format!("exrail {}", crate::VERSION),
            "date": jiff::Timestamp::now().to_string(),
            "machine": process::machine(),
            "model": process::last_part(&model.to_string_lossy()),
            "device": self.device,
            "kv": self.kv,
            "minutes": self.minutes,
            "clients": self.clients,
            "kv_pages": self.kv_pages.unwrap_or(self.clients),
            "cancel_percent": self.cancel_percent,
            "seed": self.seed,
        });
        for (name, value) in found.as_object().into_iter().flatten() {
            record[name] = value.clone();
        }
        output.value(&record);
        if let Some(folder) = &self.record {
            let path = write_record(folder, &record)?;
            output.line(format!("record: {}", path.display()));
        }
        Ok(())
    }
}

/// The comparison of an answer that is to be compared, if it has one.
fn compare(server: &Server, mix: &Mix, plan: &Plan, outcome: &Outcome) -> Result<Option<Compared>> {
    match outcome {
        Outcome::Complete { body: Some(body), .. } if plan.is_compared => {
            oracle::compare(server.target(plan.tenant), &mix.model, body).map(Some)
        }
        Outcome::Complete { .. }
        | Outcome::Cancelled
        | Outcome::Full
        | Outcome::Refused { .. }
        | Outcome::Odd(_) => Ok(None),
    }
}

/// Looks at the server again and again.
fn watch(
    server: &Server,
    time: Duration,
    ended: &AtomicU64,
    output: Output,
) -> Result<Vec<Sample>> {
    let pause = time.div_f64(N_SAMPLES).clamp(SHORTEST_LOOK, Duration::from_secs(2));
    let (since, mut told) = (Instant::now(), Instant::now());
    let mut samples = Vec::new();
    while since.elapsed() < time {
        thread::sleep(pause);
        let gauges = server.gauges()?;
        let resident_kib = server.resident_kib().context("memory of the server: not told")?;
        let pages_held = gauges.pages_total - gauges.pages_free - gauges.pages_quarantined;
        samples.push(Sample {
            seconds: since.elapsed().as_secs_f64(),
            requests: ended.load(Ordering::Relaxed),
            resident_kib,
            generated: gauges.generated,
            pages_held,
            pages_cached: gauges.pages_cached,
            is_alive: server.is_alive(),
        });
        if told.elapsed() >= TOLD_EVERY {
            told = Instant::now();
            output.note(format!(
                "{:>5.0} s  {} tokens, {} running, {} waiting, {} of {} pages held, {} MiB",
                since.elapsed().as_secs_f64(),
                gauges.generated,
                gauges.running,
                gauges.waiting,
                pages_held,
                gauges.pages_total,
                resident_kib / 1024
            ));
        }
    }
    Ok(samples)
}

/// Waits until nothing runs any more, and returns what the server then says.
fn drain(server: &Server) -> Result<Gauges> {
    let since = Instant::now();
    loop {
        let gauges = server.gauges()?;
        let is_idle = gauges.running == 0 && gauges.waiting == 0;
        let is_back = gauges.pages_free + gauges.pages_quarantined == gauges.pages_total;
        if is_idle && is_back || since.elapsed() > DRAIN_LIMIT {
            return Ok(gauges);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Writes a record beside others and returns where it is.
fn write_record(folder: &Path, record: &Value) -> Result<PathBuf> {
    let stamp = jiff::Timestamp::now().strftime("%Y-%m-%dT%H%M%S");
    let path = folder.join(format!("soak-{stamp}.json"));
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    fs::write(&path, format!("{record:#}\n")).with_context(|| path.display().to_string())?;
    Ok(path)
}
