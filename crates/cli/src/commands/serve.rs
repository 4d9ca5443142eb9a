//! `exrail serve`.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;
use exrail_server::{AppState, Limits, Phase, TraceLog};
use serde_json::json;
use tokio::{net::TcpListener, runtime::Runtime};

use crate::{
    Ended,
    load::{AsItIs, Boot, CollectionSpec},
    options::{Access, EncoderArgs, EngineArgs, RotateArgs, Sources},
    output::Output,
    paths,
};

/// Serve the OpenAI-compatible API. `/livez` answers at once; everything else answers 503 with the
/// boot phase until real tokens were generated and checked.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    listen: Listen,
    /// Collections to answer from: NAME, DIR or NAME=DIR; may be repeated.
    #[arg(long, value_name = "NAME=DIR")]
    collection: Vec<String>,
    /// Serve without an encoder: no embeddings, no collections.
    #[arg(long, conflicts_with = "collection")]
    no_encoder: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    rotate: RotateArgs,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    access: Access,
    #[command(flatten)]
    sources: Sources,
}

/// Where to listen and what to write.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct Listen {
    /// Address to listen on; a non-loopback one needs --api-key-file.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", env = "EXRAIL_HOST")]
    pub(crate) host: IpAddr,
    /// Port; 0 takes a free one.
    #[arg(long, default_value_t = 8321, env = "EXRAIL_PORT")]
    pub(crate) port: u16,
    /// Trace log; traces/trace.jsonl in the data folder when absent.
    #[arg(long, value_name = "FILE", env = "EXRAIL_TRACE_LOG")]
    pub(crate) trace_log: Option<PathBuf>,
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
}

impl Listen {
    /// The trace log, opened.
    pub(crate) fn traces(&self) -> Result<TraceLog> {
        let path = match &self.trace_log {
            Some(path) => path.clone(),
            None => paths::data()?.join("traces/trace.jsonl"),
        };
        Ok(TraceLog::open(&path)?)
    }

    /// What one request may ask for.
    pub(crate) fn limits(&self) -> Limits {
        let default_deadline = self.default_deadline_ms.map(Duration::from_millis);
        let watchdog = Duration::from_secs(self.watchdog_s);
        let loop_guard = !self.no_loop_guard;
        Limits { default_deadline, watchdog, loop_guard, ..Limits::default() }
    }

    /// A listener on the address.
    pub(crate) fn bind(&self, runtime: &Runtime, state: &AppState) -> Result<TcpListener> {
        let address = SocketAddr::new(self.host, self.port);
        Ok(runtime.block_on(exrail_server::bind(state, address))?)
    }
}

impl Serve {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let specs = self.collection.iter().map(|text| CollectionSpec::parse(text));
        let specs = specs.collect::<Result<Vec<_>>>()?;
        let runtime = runtime()?;
        let limits = self.listen.limits();
        let state = AppState::new(self.access.keys()?, self.listen.traces()?, limits);
        let listener = self.listen.bind(&runtime, &state)?;
        let address = listener.local_addr()?;
        output.note(format!("listening on http://{address}, starting"));
        output.value(&json!({ "event": "listening", "url": format!("http://{address}") }));
        let server = runtime.spawn(exrail_server::serve(Arc::clone(&state), listener, stopped()));
        self.boot(&state, specs, *output)?;
        output.line(format!("ready: http://{address}"));
        output.value(&json!({ "event": "ready", "url": format!("http://{address}") }));
        runtime.block_on(server)??;
        if let Some(services) = state.services() {
            services.engine.shutdown();
        }
        Ok(Ended::Done)
    }

    fn boot(&self, state: &AppState, specs: Vec<CollectionSpec>, output: Output) -> Result<()> {
        let board = state.board();
        board.run(Phase::Config, || anyhow::Ok(((), "frozen".into())))?;
        let keys = if state.has_keys() { "API keys" } else { "no API keys, loopback only" };
        board.run(Phase::Secrets, || anyhow::Ok(((), keys.into())))?;
        let engine = EngineArgs { rotation: self.rotate.options(), ..self.engine.clone() };
        let services = Boot {
            board,
            output,
            sources: &self.sources,
            engine: &engine.for_keys(state.n_keys()),
            encoder: (!self.no_encoder).then_some(&self.encoder),
            collections: specs,
            prepare: &AsItIs,
        }
        .run()?;
        state.open(services)?;
        Ok(())
    }
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
