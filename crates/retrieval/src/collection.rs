//! A collection on disk: open, ingest, search.
//!
//! ```text
//! collection/
//!   LOCK                 held by the one writer
//!   CURRENT              generation in use and hash of its manifest
//!   gen-000007/          manifest.json documents.jsonl chunks.jsonl vectors.f32 lexical/
//!   gen-000006/          the one before, for readers that are opening it right now
//! ```
//!
//! An ingest writes a new generation beside the old one and then switches `CURRENT` by a rename.
//! Until the rename the old generation is the collection; a crash or a full disk changes nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::contract::Contract;
use crate::disk::{Disk, SystemDisk};
use crate::generation::{self, CURRENT, Content, Generation, Pointer};
use crate::report::{self, CutCounts, Spread};
use crate::search::{Hit, SearchOptions};
use crate::{
    Chunk, ChunkOptions, Document, DocumentFormat, Encode, IngestReport, RetrievalError, chunk,
    prepare,
};

/// Chunks per call of the encoder.
const ENCODE_BATCH: usize = 32;

/// An open collection. Reading needs no lock; the content stays as it was opened.
pub struct Collection {
    dir: PathBuf,
    contract: Contract,
    generation: Generation,
    by_snippet: HashMap<String, usize>,
}

/// How far an ingest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IngestProgress {
    /// Chunks embedded so far.
    pub embedded: usize,
    /// Chunks to embed.
    pub total: usize,
}

/// The new content and what changed on the way to it.
struct Plan {
    content: Content,
    /// Places in `content.chunks` whose vector is still missing.
    to_embed: Vec<usize>,
    added: Vec<String>,
    replaced: Vec<String>,
    unchanged: Vec<String>,
    removed: Vec<String>,
    counts: CutCounts,
}

impl Collection {
    /// Makes an empty collection in `dir`, which may exist but must not hold one.
    ///
    /// # Errors
    /// [`RetrievalError::AlreadyExists`], [`RetrievalError::Locked`], [`RetrievalError::Io`].
    pub fn create(dir: &Path, contract: Contract) -> Result<Collection, RetrievalError> {
        let failed = |source| RetrievalError::Io { path: dir.to_owned(), source };
        fs::create_dir_all(dir).map_err(failed)?;
        let _lock = lock(dir)?;
        if dir.join(CURRENT).exists() {
            return Err(RetrievalError::AlreadyExists { dir: dir.to_owned() });
        }
        let content =
            Content { documents: BTreeMap::new(), chunks: Vec::new(), vectors: Vec::new() };
        remove_generations(dir, &[]).map_err(failed)?;
        let generation = generation::write(&SystemDisk, dir, 1, &contract, content)?;
        generation.pointer.switch(&SystemDisk, dir)?;
        Ok(Collection::assemble(dir, contract, generation))
    }

    /// Opens the collection in `dir` for this encoder, reading and checking every file (G-07,
    /// G-24).
    ///
    /// # Errors
    /// [`RetrievalError::ContractMismatch`] if the encoder is not the collection's, with every
    /// field that differs; the errors of damaged files, each naming its file.
    pub fn open(dir: &Path, encoder: &dyn Encode) -> Result<Collection, RetrievalError> {
        let collection = Collection::load(dir)?;
        collection.contract.check_encoder(encoder)?;
        Ok(collection)
    }

    /// Opens for reading texts, as a check of records does; [`Collection::search`] asks for the encoder then.
    ///
    /// # Errors
    /// As [`Collection::open`], but for its encoder.
    pub fn read(dir: &Path) -> Result<Collection, RetrievalError> {
        Collection::load(dir)
    }

    /// Opens without asking whose vectors these are; [`Collection::open`] is the guarded way.
    fn load(dir: &Path) -> Result<Collection, RetrievalError> {
        let (contract, generation) = generation::read(dir, Pointer::read(dir)?)?;
        Ok(Collection::assemble(dir, contract, generation))
    }

    fn assemble(dir: &Path, contract: Contract, generation: Generation) -> Collection {
        let by_snippet = snippets(&generation.content);
        Collection { dir: dir.to_owned(), contract, generation, by_snippet }
    }

    /// Adds documents, replacing those with the same `doc_id` and passing over those that are
    /// there as they are. All or nothing: on an error the collection is what it was, in memory
    /// and on disk.
    ///
    /// # Errors
    /// [`RetrievalError::Locked`] beside another writer, [`RetrievalError::Stale`] after one;
    /// the errors of contract, chunking, encoder and disk.
    pub fn ingest(
        &mut self,
        documents: Vec<Document>,
        encoder: &dyn Encode,
        progress: &mut dyn FnMut(IngestProgress),
    ) -> Result<IngestReport, RetrievalError> {
        self.write(&SystemDisk, documents, &[], encoder, progress)
    }

    /// Takes documents out; names that are not there are passed over. All or nothing, as
    /// [`Collection::ingest`].
    ///
    /// # Errors
    /// As [`Collection::ingest`].
    pub fn remove(
        &mut self,
        doc_ids: &[String],
        encoder: &dyn Encode,
    ) -> Result<IngestReport, RetrievalError> {
        self.write(&SystemDisk, Vec::new(), doc_ids, encoder, &mut |_| {})
    }

    fn write(
        &mut self,
        disk: &dyn Disk,
        documents: Vec<Document>,
        remove: &[String],
        encoder: &dyn Encode,
        progress: &mut dyn FnMut(IngestProgress),
    ) -> Result<IngestReport, RetrievalError> {
        self.contract.check_encoder(encoder)?;
        self.write_unchecked(disk, documents, remove, encoder, progress)
    }

    /// [`Collection::write`] behind the contract check.
    fn write_unchecked(
        &mut self,
        disk: &dyn Disk,
        documents: Vec<Document>,
        remove: &[String],
        encoder: &dyn Encode,
        progress: &mut dyn FnMut(IngestProgress),
    ) -> Result<IngestReport, RetrievalError> {
        let _lock = lock(&self.dir)?;
        let current = Pointer::read(&self.dir)?;
        if current != self.generation.pointer {
            return Err(RetrievalError::Stale {
                opened: generation::folder_name(self.generation.pointer.number),
                current: generation::folder_name(current.number),
            });
        }
        let mut plan = self.plan(documents, remove, encoder)?;
        self.embed(&mut plan, encoder, progress)?;
        let Plan { content, to_embed, added, replaced, unchanged, removed, counts } = plan;
        if !(added.is_empty() && replaced.is_empty() && removed.is_empty()) {
            self.switch_to(disk, content)?;
        }
        let content = &self.generation.content;
        let chunks = || content.chunks.iter().map(AsRef::as_ref);
        let joins = report::joins(chunks(), &content.vectors, self.contract.encoder.dim);
        let sizes = Spread::of(report::sizes(chunks()));
        Ok(IngestReport {
            added,
            replaced,
            unchanged,
            removed,
            without_chunks: counts.without_chunks,
            n_documents: content.documents.len(),
            n_chunks: content.chunks.len(),
            n_embedded: to_embed.len(),
            sizes,
            size_variation: sizes.map(|sizes| sizes.sd / sizes.mean),
            size_histogram: report::histogram(chunks()),
            below_min: chunks().filter(|chunk| chunk.tokens < self.contract.chunking.min).count(),
            duplicates: report::duplicates(chunks()),
            forced_cuts: counts.forced_cuts,
            bare_headings: counts.bare_headings,
            without_tokens: counts.without_tokens,
            page_lines: counts.page_lines,
            ds_join: Spread::of(joins),
            index_hash: self.generation.index_hash.clone(),
            generation: generation::folder_name(self.generation.pointer.number),
        })
    }

    /// Works out the new content; vectors of chunks that stay are taken over.
    fn plan(
        &self,
        documents: Vec<Document>,
        remove: &[String],
        encoder: &dyn Encode,
    ) -> Result<Plan, RetrievalError> {
        let stored = &self.generation.content;
        let mut plan = Plan {
            content: Content {
                documents: stored.documents.clone(),
                chunks: Vec::new(),
                vectors: Vec::new(),
            },
            to_embed: Vec::new(),
            added: Vec::new(),
            replaced: Vec::new(),
            unchanged: Vec::new(),
            removed: Vec::new(),
            counts: CutCounts::default(),
        };
        for doc_id in remove {
            if plan.content.documents.remove(doc_id).is_some() {
                plan.removed.push(doc_id.clone());
            }
        }
        let mut fresh: BTreeMap<String, Vec<Chunk>> = BTreeMap::new();
        let mut given = BTreeSet::new();
        for document in documents {
            let doc_id = document.doc_id.clone();
            if !given.insert(doc_id.clone()) {
                return Err(RetrievalError::DuplicateDocument { doc_id });
            }
            match stored.documents.get(&doc_id) {
                Some(same) if *same == document => {
                    plan.unchanged.push(doc_id);
                    continue;
                }
                Some(_) => plan.replaced.push(doc_id.clone()),
                None => plan.added.push(doc_id.clone()),
            }
            let chunked = chunk(&document, &self.contract.chunking, encoder)?;
            plan.counts.add(&document, &chunked);
            fresh.insert(doc_id.clone(), chunked.chunks);
            plan.content.documents.insert(doc_id, document);
        }
        self.lay_out(&mut plan, fresh);
        Ok(plan)
    }

    /// Puts the chunks in order of document, with the vectors that are known.
    fn lay_out(&self, plan: &mut Plan, mut fresh: BTreeMap<String, Vec<Chunk>>) {
        let stored = &self.generation.content;
        let dim = self.contract.encoder.dim;
        let mut kept: BTreeMap<&str, Vec<&Arc<Chunk>>> = BTreeMap::new();
        for chunk in &stored.chunks {
            kept.entry(&chunk.doc_id).or_default().push(chunk);
        }
        for doc_id in plan.content.documents.keys() {
            let chunks = match fresh.remove(doc_id) {
                Some(chunks) => chunks.into_iter().map(Arc::new).collect(),
                None => kept
                    .remove(doc_id.as_str())
                    .unwrap_or_default()
                    .into_iter()
                    .cloned()
                    .collect::<Vec<_>>(),
            };
            for chunk in chunks {
                // Same snippet id: same document, revision and span, hence the same text.
                let row = self.by_snippet.get(&chunk.snippet_id);
                match row {
                    Some(row) => {
                        let vector = &stored.vectors[row * dim..(row + 1) * dim];
                        plan.content.vectors.extend_from_slice(vector);
                    }
                    None => {
                        plan.to_embed.push(plan.content.chunks.len());
                        plan.content.vectors.resize(plan.content.vectors.len() + dim, 0.0);
                    }
                }
                plan.content.chunks.push(chunk);
            }
        }
    }

    /// Fills in the missing vectors.
    fn embed(
        &self,
        plan: &mut Plan,
        encoder: &dyn Encode,
        progress: &mut dyn FnMut(IngestProgress),
    ) -> Result<(), RetrievalError> {
        let dim = self.contract.encoder.dim;
        let total = plan.to_embed.len();
        let mut embedded = 0;
        for batch in plan.to_embed.chunks(ENCODE_BATCH) {
            let texts: Vec<String> = batch
                .iter()
                .map(|place| prepare(&plan.content.chunks[*place].text))
                .map(|text| format!("{}{text}", self.contract.encoder.passage_prefix))
                .collect();
            let vectors = encode(encoder, &texts)?;
            for (place, vector) in batch.iter().zip(&vectors) {
                let chunk = &plan.content.chunks[*place];
                self.contract.check_vector(&chunk.snippet_id, vector)?;
                plan.content.vectors[place * dim..(place + 1) * dim].copy_from_slice(vector);
            }
            embedded += batch.len();
            progress(IngestProgress { embedded, total });
        }
        Ok(())
    }

    /// Writes the content as the next generation and makes it the current one.
    fn switch_to(&mut self, disk: &dyn Disk, content: Content) -> Result<(), RetrievalError> {
        let before = self.generation.pointer.number;
        let number = before + 1;
        let failed = |source| RetrievalError::Io { path: self.dir.clone(), source };
        // What a crashed ingest left, and generations that no reader can still be opening.
        remove_generations(&self.dir, &[before]).map_err(failed)?;
        let written = generation::write(disk, &self.dir, number, &self.contract, content);
        let switched = written.and_then(|next| {
            next.pointer.switch(disk, &self.dir)?;
            Ok(next)
        });
        let next = match switched {
            Ok(next) => next,
            Err(error) => {
                // Gives back what a full disk needs most, unless the switch came so far that the
                // new generation is the current one. If the removal fails too, the next ingest
                // repeats it; the first error is the one to report.
                if Pointer::read(&self.dir).is_ok_and(|now| now == self.generation.pointer) {
                    drop(remove_generations(&self.dir, &[before]));
                }
                return Err(error);
            }
        };
        self.by_snippet = snippets(&next.content);
        self.generation = next;
        Ok(())
    }

    /// Finds chunks for a question in plain language; no character in it is an operator.
    ///
    /// A question longer than the encoder's window is cut into windows and the nearest counts.
    ///
    /// # Errors
    /// [`RetrievalError::EmptyQuery`], [`RetrievalError::ContractMismatch`] for another encoder,
    /// [`RetrievalError::VectorNorm`], [`RetrievalError::Encode`].
    pub fn search(
        &self,
        query: &str,
        encoder: &dyn Encode,
        options: &SearchOptions,
    ) -> Result<Vec<Hit>, RetrievalError> {
        self.contract.check_encoder(encoder)?;
        self.search_unchecked(query, encoder, options)
    }

    /// [`Collection::search`] behind the contract check.
    fn search_unchecked(
        &self,
        query: &str,
        encoder: &dyn Encode,
        options: &SearchOptions,
    ) -> Result<Vec<Hit>, RetrievalError> {
        let texts = self.query_windows(query, encoder)?;
        let vectors = encode(encoder, &texts)?;
        for vector in &vectors {
            self.contract.check_vector("query", vector)?;
        }
        crate::search::search(&self.generation, &prepare(query), &vectors, options)
    }

    /// The question as the encoder gets it, prefix included; more than one text if it is long.
    fn query_windows(
        &self,
        query: &str,
        encoder: &dyn Encode,
    ) -> Result<Vec<String>, RetrievalError> {
        let prefix = &self.contract.encoder.query_prefix;
        let prepared = prepare(query);
        let n_tokens = encoder.tokenize(&prepared).len();
        if n_tokens == 0 {
            return Err(RetrievalError::EmptyQuery);
        }
        let n_prefix = encoder.tokenize(prefix).len();
        let window = self.contract.encoder.max_tokens.saturating_sub(n_prefix);
        if n_tokens <= window {
            return Ok(vec![format!("{prefix}{prepared}")]);
        }
        let format = DocumentFormat::PlainText;
        let document = Document::parse("query", "query", format, prepared.as_bytes())?;
        let options = ChunkOptions { min: 0, max: window, window };
        let windows = chunk(&document, &options, encoder)?.chunks;
        Ok(windows.iter().map(|window| format!("{prefix}{}", prepare(&window.text))).collect())
    }

    /// The contract it was made with.
    #[must_use]
    pub fn contract(&self) -> &Contract {
        &self.contract
    }

    /// Identity of what can be found: equal contract and documents give an equal value.
    #[must_use]
    pub fn index_hash(&self) -> &str {
        &self.generation.index_hash
    }

    /// Number of chunks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.generation.content.chunks.len()
    }

    /// Whether there is no chunk.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All chunks, in order of document and place in it.
    #[must_use]
    pub fn chunks(&self) -> &[Arc<Chunk>] {
        &self.generation.content.chunks
    }

    /// All documents, by `doc_id`.
    pub fn documents(&self) -> impl Iterator<Item = &Document> {
        self.generation.content.documents.values()
    }

    /// The chunk with this id.
    #[must_use]
    pub fn chunk(&self, snippet_id: &str) -> Option<&Arc<Chunk>> {
        self.by_snippet.get(snippet_id).map(|row| &self.generation.content.chunks[*row])
    }

    /// The document with this id; its `text` is the canonical text that spans count in.
    #[must_use]
    pub fn document(&self, doc_id: &str) -> Option<&Document> {
        self.generation.content.documents.get(doc_id)
    }

    /// All vectors, (chunks, dim), in the order of [`Collection::chunks`].
    #[must_use]
    pub fn vectors(&self) -> &[f32] {
        &self.generation.content.vectors
    }
}

fn snippets(content: &Content) -> HashMap<String, usize> {
    let rows = content.chunks.iter().enumerate();
    rows.map(|(row, chunk)| (chunk.snippet_id.clone(), row)).collect()
}

/// Encodes, and checks the number of vectors.
fn encode(encoder: &dyn Encode, texts: &[String]) -> Result<Vec<Vec<f32>>, RetrievalError> {
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let vectors = encoder.encode(&texts)?;
    if vectors.len() != texts.len() {
        let (expected, found) = (texts.len(), vectors.len());
        return Err(RetrievalError::VectorCount { expected, found });
    }
    Ok(vectors)
}

/// Takes the writer's lock; it is free again when the file is dropped, also by a crash.
fn lock(dir: &Path) -> Result<File, RetrievalError> {
    let path = dir.join("LOCK");
    let failed = |source| RetrievalError::Io { path: path.clone(), source };
    let options = File::options().create(true).truncate(false).write(true).open(&path);
    let file = options.map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RetrievalError::Locked { path }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Removes every generation but those in `keep`.
fn remove_generations(dir: &Path, keep: &[u64]) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(generation::folder_number);
        if number.is_some_and(|number| !keep.contains(&number)) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "collection_tests.rs"]
mod tests;
