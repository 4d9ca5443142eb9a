//! `exrail demo`: the whole way once, on the sample corpus that rides inside the binary.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Args;
use exrail_retrieval::{ChunkOptions, Encode, read_folder};
use exrail_server::{AppState, Retrieval, Services, TraceLog};
use exrail_verify::{CollectionIndex, GoldKind, GoldSet};
use include_dir::Dir;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::{
    ingest,
    serve::{self, Listen},
    verify::{self, SampleArgs},
};
use crate::{
    Ended, keys,
    load::{Boot, CollectionSpec, Prepare, phases_json, print_phases},
    options::{Access, EncoderArgs, EngineArgs, Sources},
    output::Output,
    pack, paths,
    progress::Bars,
};

/// Run everything once: start the server, ingest the sample corpus, ask, verify, print the report.
///
/// Exits 0 when the whole run completed, whatever the verdict, which is the last line of the
/// report. On a terminal it then keeps serving.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Exit after the report even on a terminal.
    #[arg(long)]
    exit: bool,
    #[command(flatten)]
    listen: Listen,
    #[command(flatten)]
    sample: SampleArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    access: Access,
    #[command(flatten)]
    sources: Sources,
}

/// The name of the sample collection.
pub(super) const COLLECTION: &str = "stability";

impl Demo {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let started = Instant::now();
        let pack = unpack()?;
        let gold = GoldSet::read(&pack.join("gold.jsonl"))?;
        let spec = CollectionSpec::parse(COLLECTION)?;
        let runtime = serve::runtime()?;
        let limits = self.listen.limits();
        let state = AppState::new(self.access.keys()?, self.listen.traces()?, limits);
        let listener = self.listen.bind(&runtime, &state)?;
        let url = format!("http://{}", listener.local_addr()?);
        output.line(format!("exrail {} — demo on {url}", env!("CARGO_PKG_VERSION")));
        let server =
            runtime.spawn(exrail_server::serve(Arc::clone(&state), listener, serve::stopped()));
        let ring = Arc::clone(&state);
        runtime.spawn(keys::follow(self.access.clone(), move |keys| ring.replace_keys(keys)));
        let services = self.boot(&state, &pack, &gold, &spec, *output)?;
        show_boot(&state, started.elapsed(), *output);
        ask_all(&Client::new(&url, self.access.first_key()?), &gold, started, *output)?;
        output.line("");
        let report = verify::measure(&services, &spec, &gold, self.sample, *output)?;
        verify::print(*output, &report)?;
        record(&runtime, state.traces(), &services, &report)?;
        if output.is_terminal() && !self.exit {
            invite(&url, *output);
            runtime.block_on(server)?;
        }
        services.engine.shutdown();
        Ok(Ended::Done)
    }

    fn boot(
        &self,
        state: &AppState,
        pack: &Path,
        gold: &GoldSet,
        spec: &CollectionSpec,
        output: Output,
    ) -> Result<Arc<Services>> {
        let services = Boot {
            board: state.board(),
            output,
            keys: Some("loopback"),
            retries: 0,
            declared: None,
            traces: None,
            sources: &self.sources,
            engine: &self.engine,
            encoder: Some(&self.encoder),
            collections: vec![spec.clone()],
            prepare: &Corpus { documents: pack.join("docs"), gold, spec },
            in_place_of: None,
        }
        .run()?;
        Ok(state.open(services)?)
    }
}

/// The sample corpus and its scale of ΔS.
pub(super) struct Corpus<'a> {
    pub(super) documents: PathBuf,
    pub(super) gold: &'a GoldSet,
    pub(super) spec: &'a CollectionSpec,
}

impl Prepare for Corpus<'_> {
    fn retrieval(&self) -> Retrieval {
        Retrieval::Prepared
    }

    fn corpus(&self, encoder: &dyn Encode, bars: &mut Bars) -> Result<String> {
        let documents = read_folder(&self.documents)?;
        let chunking = ChunkOptions::for_encoder(encoder);
        let report = ingest::ingest(self.spec, documents, encoder, chunking, bars)?;
        bars.clear();
        Ok(format!("{} chunks embedded now;", report.n_embedded))
    }

    fn calibration(&self, index: &CollectionIndex, dir: &Path, bars: &mut Bars) -> Result<()> {
        verify::ensure_calibration(index, dir, self.gold, false, bars)
    }
}

/// Writes the pack that the binary carries into the data folder, file by file where it differs.
pub(super) fn unpack() -> Result<PathBuf> {
    let root = paths::data()?.join("packs").join(COLLECTION);
    write_dir(pack::stability(), &root)?;
    Ok(root)
}

fn write_dir(dir: &Dir<'_>, root: &Path) -> Result<()> {
    for entry in dir.files() {
        let path = root.join(entry.path());
        if fs::read(&path).is_ok_and(|found| found == entry.contents()) {
            continue;
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("folder {}", folder.display()))?;
        }
        // A full disk must not leave half a page that a later run would ingest.
        let partial = path.with_extension("partial");
        let written =
            fs::write(&partial, entry.contents()).and_then(|()| fs::rename(&partial, &path));
        if written.is_err() {
            drop(fs::remove_file(&partial));
        }
        written.with_context(|| format!("file {}", path.display()))?;
    }
    dir.dirs().try_for_each(|inner| write_dir(inner, root))
}

fn show_boot(state: &AppState, took: Duration, output: Output) {
    let status = state.board().status();
    print_phases(&status, output);
    output.line(format!("  {:10} {:8.0} ms  in all", "ready", took.as_secs_f64() * 1e3));
    output.value(&json!({
        "event": "ready",
        "seconds": took.as_secs_f64(),
        "phases": phases_json(&status),
    }));
}

/// Asks the server as any client would.
struct Client {
    url: String,
    key: Option<String>,
    agent: ureq::Agent,
}

impl Client {
    fn new(url: &str, key: Option<String>) -> Self {
        Self { url: url.into(), key, agent: ureq::Agent::new_with_defaults() }
    }

    fn ask(&self, question: &str) -> Result<Value> {
        let mut request = self.agent.post(format!("{}/v1/ask", self.url));
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let body = json!({ "question": question, "collection": COLLECTION });
        let mut response = request.send_json(&body).context("POST /v1/ask")?;
        response.body_mut().read_json().context("answer of /v1/ask")
    }
}

/// Two questions that the corpus answers, one that it does not, one from elsewhere.
fn ask_all(client: &Client, gold: &GoldSet, started: Instant, output: Output) -> Result<()> {
    let of = |kind, n| gold.of_kind(kind).take(n).map(|item| item.question.as_str());
    let questions = of(GoldKind::Answerable, 2)
        .chain(of(GoldKind::Unanswerable, 1))
        .chain(of(GoldKind::OffTopic, 1));
    for (index, question) in questions.enumerate() {
        let before = started.elapsed();
        let answer = client.ask(question)?;
        if index == 0 {
            let first = answer["metrics"]["first_token_ms"].as_f64();
            let search = answer["metrics"]["retrieve_ms"].as_f64().unwrap_or(0.0);
            if let Some(first) = first {
                let ms = before.as_secs_f64() * 1e3 + search + first;
                output.line(format!("  {:10} {ms:8.0} ms  from process start", "1st token"));
                output.value(&json!({ "event": "first_token", "ms": ms }));
            }
        }
        output.value(&json!({ "event": "answer", "question": question, "answer": answer }));
        output.line(format!("\n? {question}"));
        output.line(format!("  {}", answer["answer"].as_str().unwrap_or_default().trim()));
        if let Some(reason) = answer["reason"].as_str() {
            output.line(format!("  — {reason}"));
        }
        for citation in answer["citations"].as_array().into_iter().flatten() {
            output.line(format!(
                "  — {} lines {}–{} ({})",
                citation["section_id"].as_str().unwrap_or_default(),
                citation["lines"][0],
                citation["lines"][1],
                citation["source"].as_str().unwrap_or_default(),
            ));
        }
    }
    Ok(())
}

/// The report is a trace record too.
fn record(
    runtime: &Runtime,
    traces: &TraceLog,
    services: &Services,
    report: &exrail_verify::Report,
) -> Result<()> {
    let report = report.to_json()?;
    let trace_id = verify::probe_id();
    runtime.block_on(traces.append_probe(services, COLLECTION, (&trace_id, report)))?;
    Ok(())
}

fn invite(url: &str, output: Output) {
    output.line(format!("\nserving on {url} until Ctrl-C; try:"));
    output.line(format!(
        "  curl -s {url}/v1/ask -H 'Content-Type: application/json' \
         -d '{{\"question\": \"What is a warm-up fence?\"}}'"
    ));
}
