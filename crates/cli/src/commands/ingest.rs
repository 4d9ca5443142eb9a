//! `exrail ingest`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use exrail_hub::Kind;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_retrieval::{
    ChunkOptions, Collection, Contract, Document, Encode, IngestReport, read_document, read_folder,
};
use serde_json::json;

use crate::{
    Ended, environment,
    load::{self, CollectionSpec},
    options::{EncoderArgs, Sources},
    output::Output,
    progress::Bars,
};

/// Read .md, .txt and .html documents into a collection. Unchanged documents are passed over,
/// changed ones replaced; the old state stays readable until the new one is complete.
#[derive(Debug, Args)]
pub(crate) struct Ingest {
    /// Files and folders.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// The collection: a name, a folder, or NAME=DIR.
    #[arg(long, value_name = "NAME|DIR", default_value = "default")]
    collection: String,
    /// Smallest chunk in tokens, 40 when absent; smaller ones are joined inside their section.
    #[arg(long, value_name = "TOKENS")]
    chunk_min: Option<usize>,
    /// Largest chunk in tokens, 130 when absent.
    #[arg(long, value_name = "TOKENS")]
    chunk_max: Option<usize>,
    /// Threads; one per physical core when absent.
    #[arg(long, value_name = "N", env = environment::THREADS)]
    threads: Option<usize>,
    #[command(flatten)]
    encoder: EncoderArgs,
    #[command(flatten)]
    sources: Sources,
}

impl Ingest {
    pub(crate) fn run(&self, output: &Output) -> Result<Ended> {
        let spec = CollectionSpec::parse(&self.collection)?;
        let documents = read(&self.paths)?;
        let mut bars = Bars::new(*output);
        let found = self.sources.resolve(&self.encoder.encoder, Kind::Encoder, &mut bars)?;
        let backend =
            CpuBackend::new(CpuOptions { threads: self.threads, ..CpuOptions::default() })?;
        let encoder = load::load_encoder(backend, &found)?;
        let defaults = ChunkOptions::for_encoder(&*encoder);
        let chunking = ChunkOptions {
            min: self.chunk_min.unwrap_or(defaults.min),
            max: self.chunk_max.unwrap_or(defaults.max),
            ..defaults
        };
        let report = ingest(&spec, documents, &*encoder, chunking, &mut bars)?;
        bars.clear();
        print(*output, &spec, &report);
        Ok(Ended::Done)
    }
}

/// All documents of files and folders.
fn read(paths: &[PathBuf]) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in paths {
        if path.is_dir() {
            let found = read_folder(path).with_context(|| format!("folder {}", path.display()))?;
            if found.is_empty() {
                bail!("folder {}: expected .md, .txt or .html files, found none", path.display());
            }
            documents.extend(found);
        } else {
            documents.push(read_document(path)?);
        }
    }
    Ok(documents)
}

/// Brings documents into a collection, which is made when it is not there.
pub(crate) fn ingest(
    spec: &CollectionSpec,
    documents: Vec<Document>,
    encoder: &dyn Encode,
    chunking: ChunkOptions,
    bars: &mut Bars,
) -> Result<IngestReport> {
    let mut collection = if spec.dir.join("CURRENT").exists() {
        let collection = Collection::open(&spec.dir, encoder)?;
        let found = &collection.contract().chunking;
        if *found != chunking {
            bail!(
                "collection `{}`: made with chunks of {} to {} tokens, asked for {} to {}; \
                 ingest into a new collection",
                spec.name,
                found.min,
                found.max,
                chunking.min,
                chunking.max
            );
        }
        collection
    } else {
        Collection::create(&spec.dir, Contract::new(encoder, chunking)?)?
    };
    Ok(collection.ingest(documents, encoder, &mut |step| bars.ingest(step))?)
}

fn print(output: Output, spec: &CollectionSpec, report: &IngestReport) {
    output.value(&json!({
        "collection": spec.name,
        "dir": spec.dir,
        "added": report.added,
        "replaced": report.replaced,
        "unchanged": report.unchanged.len(),
        "documents": report.n_documents,
        "chunks": report.n_chunks,
        "embedded": report.n_embedded,
        "size_variation": report.size_variation,
        "below_min": report.below_min,
        "duplicates": report.duplicates,
        "forced_cuts": report.forced_cuts,
        "index_hash": report.index_hash,
    }));
    output.line(format!("collection {} in {}", spec.name, spec.dir.display()));
    output.line(format!(
        "  documents  {} ({} new, {} changed, {} as before)",
        report.n_documents,
        report.added.len(),
        report.replaced.len(),
        report.unchanged.len()
    ));
    output.line(format!("  chunks     {} ({} embedded now)", report.n_chunks, report.n_embedded));
    if let Some(variation) = report.size_variation {
        output.line(format!(
            "  sizes      σ/μ {variation:.2}, {} below the minimum",
            report.below_min
        ));
    }
    for group in &report.duplicates {
        output.line(format!("  same text  {}", group.join(" ")));
    }
    output.line(format!("  index      {}", report.index_hash));
}
