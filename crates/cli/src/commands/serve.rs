//! `exrail serve`, and `exrail boot`, which starts the same and serves nobody.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;
use exrail_server::{
    AppState, BootBoard, BootPlan, Fleet, Keys, Limits, SpanExport, TraceLog, TraceMode,
};
use serde_json::json;
use tokio::{net::TcpListener, runtime::Runtime};

use super::diagnose::Served;
use crate::{
    Ended, environment, keys,
    load::{AsItIs, Boot, CollectionSpec, phases_json, print_phases},
    options::{Access, EncoderArgs, EngineArgs, RotateArgs, SessionArgs, Sources, SwapArgs},
    otlp::OtlpArgs,
    output::Output,
    paths,
    preflight::Declared,
    swap::{self, Reloader},
};

/// Serve the OpenAI-compatible API. `/livez` answers at once; everything else answers 503 with the
/// boot phase until real tokens were generated and checked.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    listen: Listen,
    #[command(flatten)]
    started: Started,
    #[cfg(feature = "faults")]
    #[command(flatten)]
    injected: Injected,
}

/// Faults on demand, for `exrail soak --faults`.
#[cfg(feature = "faults")]
#[derive(Debug, Args)]
struct Injected {
    /// Inject faults by a plan of this seed, once ready.
    #[arg(long, value_name = "SEED", hide = true)]
    inject_faults: Option<u64>,
    /// Let the checks of the page books find nothing.
    #[arg(long, hide = true, requires = "inject_faults")]
    guards_off: bool,
}

#[cfg(feature = "faults")]
impl Serve {
    /// Begins to inject, when that is asked for.
    fn inject(&self, state: &AppState) {
        use exrail_engine::{FaultPlan, Guards};
        let (Some(seed), Some(services)) = (self.injected.inject_faults, state.services()) else {
            return;
        };
        state.traces().disturb(services.engine.faults());
        // Long enough that every look at the watchdog has seen it.
        let hang = Duration::from_secs(self.listen.watchdog_s + 2);
        let guards = if self.injected.guards_off { Guards::Off } else { Guards::On };
        services.engine.inject(FaultPlan { seed, hang, guards });
    }
}

/// What a server starts.
#[derive(Debug, Args)]
pub(crate) struct Started {
    /// Collections to answer from: NAME, DIR or NAME=DIR; may be repeated.
    #[arg(long, value_name = "NAME=DIR")]
    collection: Vec<String>,
    /// Serve without an encoder: no embeddings, no collections.
    #[arg(long, conflicts_with = "collection")]
    no_encoder: bool,
    /// Further attempts to start when no source delivers the model.
    #[arg(long, value_name = "N", default_value_t = 3)]
    boot_retries: u32,
    #[command(flatten)]
    declared: Declared,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    rotate: RotateArgs,
    #[command(flatten)]
    sessions: SessionArgs,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    access: Access,
    #[command(flatten)]
    sources: Sources,
    #[command(flatten)]
    swap: SwapArgs,
    #[command(flatten)]
    otlp: OtlpArgs,
}

impl Started {
    /// The generators of a server with these engine options, by name and as they were given.
    fn generators(&self, engine: &EngineArgs) -> Result<Vec<(String, String)>> {
        let given = std::iter::once(&engine.model).chain(&self.swap.also);
        swap::named(&self.sources, given.cloned().collect())
    }

    /// The same, with what loads them.
    fn fleet(&self, engine: &EngineArgs, traces: &TraceLog, output: Output) -> Result<Fleet> {
        let generators = self.generators(engine)?;
        let names = generators.iter().map(|(name, _)| name.clone()).collect();
        let loader = Reloader {
            generators,
            engine: engine.clone(),
            sources: self.sources.clone(),
            declared: self.declared.clone(),
            retries: self.boot_retries,
            traces: traces.clone(),
            output,
        };
        let limits = self.swap.limits(engine);
        Ok(Fleet { names, loader: Some(Arc::new(loader)), limits })
    }

    /// The keys of a server, and what to say of them.
    fn keys(&self) -> Result<(Keys, &'static str)> {
        let keys = self.access.keys()?;
        let told = if keys.is_empty() { "no API keys, loopback only" } else { "API keys" };
        Ok((keys, told))
    }

    /// The engine of a server with so many keys.
    fn engine(&self, n_keys: usize) -> EngineArgs {
        let engine = EngineArgs { rotation: self.rotate.options(), ..self.engine.clone() };
        engine.for_keys(n_keys)
    }

    /// The way of spans out of a server, when one is asked for.
    fn spans(&self, state: &AppState) -> Result<Option<SpanExport>> {
        let Some(options) = self.otlp.options()? else { return Ok(None) };
        let export = SpanExport::start(options)?;
        state.export_spans(export.clone());
        Ok(Some(export))
    }

    fn boot<'a>(
        &'a self,
        engine: &'a EngineArgs,
        board: &'a Arc<BootBoard>,
        keys: &'static str,
        traces: Option<&'a TraceLog>,
        output: Output,
    ) -> Result<Boot<'a>> {
        let specs = self.collection.iter().map(|text| CollectionSpec::parse(text));
        Ok(Boot {
            board,
            output,
            keys: Some(keys),
            retries: self.boot_retries,
            declared: Some(&self.declared),
            traces,
            sources: &self.sources,
            engine,
            encoder: (!self.no_encoder).then_some(&self.encoder),
            collections: specs.collect::<Result<Vec<_>>>()?,
            prepare: &AsItIs,
            in_place_of: None,
        })
    }
}

/// Start everything that `serve` starts, print each phase, and end. Exit code 1 when a phase fails.
#[derive(Debug, Args)]
pub(crate) struct BootCommand {
    /// Print the phases in their order, what each needs, its deadline and its probe; start nothing.
    #[arg(long)]
    plan: bool,
    /// So that the command line of a server can be tried as it is; nothing listens.
    #[command(flatten)]
    listen: Listen,
    #[command(flatten)]
    started: Started,
}

impl BootCommand {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let board = Arc::new(BootBoard::new());
        let (keys, told) = self.started.keys()?;
        keys.allow_bind(self.listen.host)?;
        // Nothing is sent, and what could not be is refused all the same.
        self.started.otlp.options()?;
        let engine = self.started.engine(keys.len());
        let boot = self.started.boot(&engine, &board, told, None, *output)?;
        if self.plan {
            let plan = boot.plan()?;
            output.value(&plan.to_json());
            output.line(plan.to_string().trim_end());
            return Ok(Ended::Done);
        }
        swap::named(&self.started.sources, self.started.swap.also.clone())?;
        let services = boot.run().with_context(|| failed_phase(&board))?;
        services.engine.shutdown();
        let status = board.status();
        output.value(&json!({ "phases": phases_json(&status) }));
        print_phases(&status, *output);
        Ok(Ended::Done)
    }
}

/// Where to listen and what to write.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct Listen {
    /// Address to listen on; a non-loopback one needs --api-key-file.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", env = environment::HOST)]
    pub(crate) host: IpAddr,
    /// Port; 0 takes a free one.
    #[arg(long, default_value_t = 8321, env = environment::PORT)]
    pub(crate) port: u16,
    /// Trace log; traces/trace.jsonl in the data folder when absent.
    #[arg(long, value_name = "FILE", env = environment::TRACE_LOG)]
    pub(crate) trace_log: Option<PathBuf>,
    /// What happens with a record that breaks the trace contract: its answer is withheld, it is written with a
    /// warning, or records are not checked.
    #[arg(long, value_name = "MODE", default_value = "enforce")]
    pub(crate) trace_mode: TraceModeArg,
    /// Milliseconds for the answer to a request that has no `deadline_ms` of its own; no limit when absent.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) default_deadline_ms: Option<u64>,
    /// Seconds without a finished step after which an engine with work counts as dead: /livez and
    /// /readyz then answer 503.
    #[arg(long, value_name = "S", default_value_t = 30)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) watchdog_s: u64,
    /// Let answers that go round in a circle go on to their limit, unless a request says `loop_guard`.
    #[arg(long)]
    pub(crate) no_loop_guard: bool,
    /// Keep chats from repeating their system messages, unless a request says `leak_guard`.
    #[arg(long)]
    pub(crate) leak_guard: bool,
}

/// `--trace-mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TraceModeArg {
    Enforce,
    Warn,
    Off,
}

impl From<TraceModeArg> for TraceMode {
    fn from(mode: TraceModeArg) -> TraceMode {
        match mode {
            TraceModeArg::Enforce => TraceMode::Enforce,
            TraceModeArg::Warn => TraceMode::Warn,
            TraceModeArg::Off => TraceMode::Off,
        }
    }
}

impl Listen {
    /// The trace log, opened.
    pub(crate) fn traces(&self) -> Result<TraceLog> {
        Ok(TraceLog::open(&self.trace_path()?)?.checked(self.trace_mode.into()))
    }

    fn trace_path(&self) -> Result<PathBuf> {
        match &self.trace_log {
            Some(path) => Ok(path.clone()),
            None => Ok(paths::data()?.join("traces/trace.jsonl")),
        }
    }

    /// What one request may ask for.
    pub(crate) fn limits(&self) -> Limits {
        let default_deadline = self.default_deadline_ms.map(Duration::from_millis);
        let watchdog = Duration::from_secs(self.watchdog_s);
        let loop_guard = !self.no_loop_guard;
        let leak_guard = self.leak_guard;
        Limits { default_deadline, watchdog, loop_guard, leak_guard, ..Limits::default() }
    }

    /// A listener on the address.
    pub(crate) fn bind(&self, runtime: &Runtime, state: &AppState) -> Result<TcpListener> {
        let address = SocketAddr::new(self.host, self.port);
        Ok(runtime.block_on(exrail_server::bind(state, address))?)
    }
}

impl Serve {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let (keys, told) = self.started.keys()?;
        let runtime = runtime()?;
        let engine = self.started.engine(keys.len());
        let state = AppState::new(keys, self.listen.traces()?, self.listen.limits());
        if let Some(keeper) = self.started.sessions.keeper()? {
            state.keep_sessions(keeper);
        }
        let spans = self.started.spans(&state)?;
        let boot =
            self.started.boot(&engine, state.board(), told, Some(state.traces()), *output)?;
        let fleet = self.started.fleet(&engine, state.traces(), *output)?;
        state.diagnose_with(Arc::new(Served {
            board: Arc::clone(state.board()),
            generators: self.started.generators(&engine)?,
            declared: self.started.declared.clone(),
            engine: engine.clone(),
            encoder: self.started.encoder.clone(),
            sources: self.started.sources.clone(),
            collections: boot.collections.clone(),
        }));
        persist(&boot.plan()?, &self.listen.trace_path()?.with_file_name("bootstrap.dag.json"))?;
        let listener = self.listen.bind(&runtime, &state)?;
        let address = listener.local_addr()?;
        output.note(format!("listening on http://{address}, starting"));
        output.value(&json!({ "event": "listening", "url": format!("http://{address}") }));
        let server = runtime.spawn(exrail_server::serve(Arc::clone(&state), listener, stopped()));
        let ring = Arc::clone(&state);
        let replace = move |keys| ring.replace_keys(keys);
        runtime.spawn(keys::follow(self.started.access.clone(), replace));
        let booted = boot.run().with_context(|| failed_phase(state.board()));
        let booted = booted.and_then(|services| Ok(state.open_fleet(services, fleet)?));
        let record = record_boot(Arc::clone(&state));
        if booted.is_ok() {
            // It waits for the model's hash; users do not.
            runtime.spawn(record);
        } else {
            runtime.block_on(record);
        }
        booted?;
        #[cfg(feature = "faults")]
        self.inject(&state);
        output.line(format!("ready: http://{address}"));
        output.value(&json!({ "event": "ready", "url": format!("http://{address}") }));
        runtime.block_on(server)?;
        if let Some(models) = state.models() {
            models.stop();
        }
        flush(spans.as_ref());
        Ok(Ended::Done)
    }
}

/// How long a server that ends waits for the collector.
const FLUSH: Duration = Duration::from_secs(5);

/// Sends what still waits; a collector that does not take it in time is not waited for.
fn flush(spans: Option<&SpanExport>) {
    if let Some(spans) = spans
        && !spans.flush(FLUSH)
    {
        tracing::warn!("the last spans were not taken within {} s and are lost", FLUSH.as_secs());
    }
}

/// Where a boot ended.
fn failed_phase(board: &BootBoard) -> String {
    format!("boot phase `{}`", board.status().phase().name())
}

/// Leaves a record of the boot; one that cannot be written is no reason not to serve.
async fn record_boot(state: Arc<AppState>) {
    if let Err(error) = state.record_boot().await {
        tracing::error!(%error, "the boot could not be traced");
    }
}

/// Writes the graph that a boot follows beside the trace log (G-02), whole or not at all.
fn persist(plan: &BootPlan, path: &Path) -> Result<()> {
    let partial = path.with_extension("partial");
    let text = format!("{:#}\n", plan.to_json());
    let written = std::fs::write(&partial, text).and_then(|()| std::fs::rename(&partial, path));
    written.with_context(|| format!("file {}", path.display()))
}

/// The async runtime of a server: sockets only, so two threads are plenty.
pub(crate) fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("exrail-http")
        .enable_all()
        .build()
        .context("async runtime")
}

/// Resolves on Ctrl-C or SIGTERM.
pub(crate) async fn stopped() {
    let mut terminate =
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(terminate) => terminate,
            // Without a handler for SIGTERM the system's default still ends the process.
            Err(_) => return drop(tokio::signal::ctrl_c().await),
        };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    #[test]
    fn what_serve_accepts_boot_accepts_too() {
        let mut program = crate::Cli::command();
        program.build();
        let options = |name: &str| -> BTreeSet<String> {
            let command = program.find_subcommand(name).unwrap();
            command.get_arguments().map(|argument| argument.get_id().to_string()).collect()
        };
        let (serve, boot) = (options("serve"), options("boot"));
        assert!(serve.contains("rotate_at") && serve.contains("watchdog_s"), "{serve:?}");
        assert_eq!(serve.difference(&boot).collect::<Vec<_>>(), Vec::<&String>::new());
    }
}
