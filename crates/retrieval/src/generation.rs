//! One generation of a collection: the folder `gen-000001` and what is in it.
//!
//! A generation is written once, whole, and never changed. `CURRENT` names the one in use and the
//! hash of its manifest; the manifest names the hash of every other file. So each byte that is
//! read is the byte that was written, or the file is refused by name.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::contract::{Contract, SCHEMA_VERSION};
use crate::disk::Disk;
use crate::hash::sha256_hex;
use crate::lexical::{self, Files, Lexical};
use crate::{Chunk, Document, RetrievalError, vectors};

const MANIFEST: &str = "manifest.json";
const DOCUMENTS: &str = "documents.jsonl";
const CHUNKS: &str = "chunks.jsonl";
const VECTORS: &str = "vectors.f32";
const LEXICAL: &str = "lexical";
pub(crate) const CURRENT: &str = "CURRENT";

/// What a generation holds, in memory.
pub(crate) struct Content {
    /// By `doc_id`.
    pub(crate) documents: BTreeMap<String, Document>,
    /// In order of document and place in it.
    pub(crate) chunks: Vec<Arc<Chunk>>,
    /// (chunks, dim).
    pub(crate) vectors: Vec<f32>,
}

/// A generation that is written and can be searched.
pub(crate) struct Generation {
    pub(crate) pointer: Pointer,
    pub(crate) index_hash: String,
    pub(crate) content: Content,
    pub(crate) lexical: Lexical,
}

/// The line of `CURRENT`: number of the generation and hex sha256 of its manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    pub(crate) number: u64,
    manifest_sha256: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    schema_version: u32,
    contract: Contract,
    counts: Counts,
    index_hash: String,
    files: BTreeMap<String, FileRecord>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counts {
    documents: usize,
    chunks: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRecord {
    bytes: u64,
    sha256: String,
}

/// Name of a generation's folder.
pub(crate) fn folder_name(number: u64) -> String {
    format!("gen-{number:06}")
}

/// Number of a generation's folder.
pub(crate) fn folder_number(name: &str) -> Option<u64> {
    name.strip_prefix("gen-")?.parse().ok()
}

impl Pointer {
    /// Reads `CURRENT` of the collection in `dir`.
    pub(crate) fn read(dir: &Path) -> Result<Pointer, RetrievalError> {
        let path = dir.join(CURRENT);
        let bytes = read_file(&path)?;
        let line = String::from_utf8_lossy(&bytes);
        let parsed = line.strip_suffix('\n').and_then(|line| line.split_once(' '));
        let parsed = parsed.and_then(|(name, hash)| Some((folder_number(name)?, hash)));
        match parsed {
            Some((number, hash)) if hash.len() == 64 => {
                Ok(Pointer { number, manifest_sha256: hash.to_owned() })
            }
            Some(_) | None => {
                Err(RetrievalError::BadCurrent { path, found: line.chars().take(40).collect() })
            }
        }
    }

    /// Makes this the generation in use, at once.
    pub(crate) fn switch(&self, disk: &dyn Disk, dir: &Path) -> Result<(), RetrievalError> {
        let line = format!("{} {}\n", folder_name(self.number), self.manifest_sha256);
        let path = dir.join(CURRENT);
        let failed = |source| RetrievalError::Io { path: path.clone(), source };
        let fresh = dir.join("CURRENT.new");
        disk.write(&fresh, line.as_bytes()).map_err(failed)?;
        disk.rename(&fresh, &path).map_err(failed)?;
        disk.sync_dir(dir).map_err(failed)
    }
}

/// Writes generation `number` of the collection in `dir`. Nothing points to it yet.
pub(crate) fn write(
    disk: &dyn Disk,
    dir: &Path,
    number: u64,
    contract: &Contract,
    content: Content,
) -> Result<Generation, RetrievalError> {
    let lexical_files = lexical::build(&content.chunks, &titles(&content.documents))?;
    let lexical = Lexical::open(&lexical_files)?;
    let mut files = Files::from([
        (DOCUMENTS.to_owned(), json_lines(content.documents.values())),
        (CHUNKS.to_owned(), json_lines(content.chunks.iter().map(AsRef::as_ref))),
        (VECTORS.to_owned(), vectors::to_bytes(contract.encoder.dim, &content.vectors)),
    ]);
    let index_hash = index_hash(contract, &files);
    files.extend(
        lexical_files.into_iter().map(|(name, bytes)| (format!("{LEXICAL}/{name}"), bytes)),
    );
    let record =
        |bytes: &Vec<u8>| FileRecord { bytes: bytes.len() as u64, sha256: sha256_hex(bytes) };
    let manifest = Manifest {
        schema_version: SCHEMA_VERSION,
        contract: contract.clone(),
        counts: Counts { documents: content.documents.len(), chunks: content.chunks.len() },
        index_hash: index_hash.clone(),
        files: files.iter().map(|(name, bytes)| (name.clone(), record(bytes))).collect(),
    };
    let manifest =
        serde_json::to_vec_pretty(&manifest).expect("strings and numbers always serialise");
    let pointer = Pointer { number, manifest_sha256: sha256_hex(&manifest) };
    files.insert(MANIFEST.to_owned(), manifest);
    write_files(disk, dir, &dir.join(folder_name(number)), &files)?;
    Ok(Generation { pointer, index_hash, content, lexical })
}

fn write_files(
    disk: &dyn Disk,
    dir: &Path,
    folder: &Path,
    files: &Files,
) -> Result<(), RetrievalError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| RetrievalError::Io { path, source }
    };
    let lexical = folder.join(LEXICAL);
    disk.create_dir(folder).map_err(failed(folder))?;
    disk.create_dir(&lexical).map_err(failed(&lexical))?;
    for (name, bytes) in files {
        let path = folder.join(name);
        disk.write(&path, bytes).map_err(failed(&path))?;
    }
    for path in [&lexical, folder, dir] {
        disk.sync_dir(path).map_err(failed(path))?;
    }
    Ok(())
}

/// The heading path of every section, as the words of its titles.
fn titles(documents: &BTreeMap<String, Document>) -> HashMap<&str, String> {
    let sections = documents.values().flat_map(|document| &document.sections);
    sections
        .map(|section| {
            let path = section.path.join(" ");
            let title = if path.is_empty() { section.title.clone() } else { path };
            (section.section_id.as_str(), title)
        })
        .collect()
}

fn json_lines<'a, T: Serialize + 'a>(records: impl Iterator<Item = &'a T>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        serde_json::to_writer(&mut bytes, record).expect("strings and numbers always serialise");
        bytes.push(b'\n');
    }
    bytes
}

/// Identity of what can be found: contract, documents, chunks and vectors. The lexical files are
/// left out; they follow from these and carry random names.
fn index_hash(contract: &Contract, files: &Files) -> String {
    let mut text = contract.to_json().to_string();
    for (name, bytes) in files {
        text.push_str(&format!("\n{name} {}", sha256_hex(bytes)));
    }
    sha256_hex(text.as_bytes())
}

/// Reads the contract and the content of the generation that `pointer` names, checking all of it.
pub(crate) fn read(dir: &Path, pointer: Pointer) -> Result<(Contract, Generation), RetrievalError> {
    let folder = dir.join(folder_name(pointer.number));
    let manifest = read_manifest(&folder, &pointer)?;
    let mut files = Files::new();
    for (name, record) in &manifest.files {
        let path = folder.join(name);
        let bytes = read_file(&path)?;
        check(&path, "bytes", &record.bytes, &(bytes.len() as u64))?;
        check(&path, "sha256", &record.sha256, &sha256_hex(&bytes))?;
        files.insert(name.clone(), bytes);
    }
    let mut take = |name: &str| {
        files.remove(name).ok_or_else(|| RetrievalError::Corrupt {
            path: folder.join(MANIFEST),
            expected: format!("an entry `{name}`"),
            found: "none".to_owned(),
        })
    };
    let core = Files::from([
        (DOCUMENTS.to_owned(), take(DOCUMENTS)?),
        (CHUNKS.to_owned(), take(CHUNKS)?),
        (VECTORS.to_owned(), take(VECTORS)?),
    ]);
    let contract = manifest.contract;
    let index_hash = index_hash(&contract, &core);
    check(&folder.join(MANIFEST), "index_hash", &manifest.index_hash, &index_hash)?;
    let content = parse(&folder, &core, &contract, &manifest.counts)?;
    let prefix = format!("{LEXICAL}/");
    let lexical_files: Files = files
        .into_iter()
        .filter_map(|(name, bytes)| Some((name.strip_prefix(&prefix)?.to_owned(), bytes)))
        .collect();
    let lexical = Lexical::open(&lexical_files)?;
    let counted = "indexed chunks";
    check(&folder.join(LEXICAL), counted, &content.chunks.len(), &lexical.len())?;
    Ok((contract, Generation { pointer, index_hash, content, lexical }))
}

fn read_manifest(folder: &Path, pointer: &Pointer) -> Result<Manifest, RetrievalError> {
    let path = folder.join(MANIFEST);
    let bytes = read_file(&path)?;
    check(&path, "sha256", &pointer.manifest_sha256, &sha256_hex(&bytes))?;
    let bad = |source| RetrievalError::BadRecord { path: path.clone(), line: 1, source };
    let value: Value = serde_json::from_slice(&bytes).map_err(bad)?;
    let version = value.get("schema_version").and_then(Value::as_u64).unwrap_or(0);
    if version != u64::from(SCHEMA_VERSION) {
        let expected = SCHEMA_VERSION;
        return Err(RetrievalError::UnsupportedSchema { path, expected, found: version });
    }
    let manifest: Manifest = serde_json::from_value(value).map_err(bad)?;
    for name in manifest.files.keys() {
        let local = name.strip_prefix("lexical/").unwrap_or(name);
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if local.is_empty() || local.starts_with('.') || !local.chars().all(plain) {
            return Err(RetrievalError::Corrupt {
                path,
                expected: "plain file names".to_owned(),
                found: name.clone(),
            });
        }
    }
    Ok(manifest)
}

/// Parses the three core files and checks each record against the others.
fn parse(
    folder: &Path,
    files: &Files,
    contract: &Contract,
    counts: &Counts,
) -> Result<Content, RetrievalError> {
    let path = folder.join(DOCUMENTS);
    let documents: Vec<Document> = parse_lines(&path, &files[DOCUMENTS])?;
    check(&path, "documents", &counts.documents, &documents.len())?;
    let documents: BTreeMap<String, Document> =
        documents.into_iter().map(|document| (document.doc_id.clone(), document)).collect();
    check(&path, "distinct documents", &counts.documents, &documents.len())?;

    let path = folder.join(CHUNKS);
    let chunks: Vec<Chunk> = parse_lines(&path, &files[CHUNKS])?;
    check(&path, "chunks", &counts.chunks, &chunks.len())?;
    for chunk in &chunks {
        check(&path, "contract_sha256", &chunk.contract_sha256, &chunk.contract_hash())?;
        check(&path, "encoder_fp", &contract.encoder_fp, &chunk.embedding.encoder_fp)?;
        let document = documents.get(&chunk.doc_id);
        check(&path, "rev", &Some(&chunk.rev), &document.map(|document| &document.rev))?;
        let text = document.and_then(|document| document.text.get(chunk.range()));
        check(&path, "text at its span", &Some(chunk.text.as_str()), &text)?;
    }

    let path = folder.join(VECTORS);
    let dim = contract.encoder.dim;
    let vectors = vectors::from_bytes(&path, &files[VECTORS], dim, counts.chunks)?;
    for (chunk, vector) in chunks.iter().zip(vectors.chunks_exact(dim)) {
        contract.check_vector(&chunk.snippet_id, vector)?;
    }
    Ok(Content { documents, chunks: chunks.into_iter().map(Arc::new).collect(), vectors })
}

fn parse_lines<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<Vec<T>, RetrievalError> {
    let lines = bytes.split(|byte| *byte == b'\n').enumerate();
    lines
        .filter(|(_, line)| !line.is_empty())
        .map(|(at, line)| {
            serde_json::from_slice(line).map_err(|source| RetrievalError::BadRecord {
                path: path.to_owned(),
                line: at + 1,
                source,
            })
        })
        .collect()
}

/// Refuses a file in which `what` is not as expected.
fn check<T: PartialEq + std::fmt::Debug>(
    path: &Path,
    what: &str,
    expected: &T,
    found: &T,
) -> Result<(), RetrievalError> {
    if expected == found {
        return Ok(());
    }
    Err(RetrievalError::Corrupt {
        path: path.to_owned(),
        expected: format!("{what} {expected:?}"),
        found: format!("{found:?}"),
    })
}

fn read_file(path: &Path) -> Result<Vec<u8>, RetrievalError> {
    fs::read(path).map_err(|source| RetrievalError::Io { path: path.to_owned(), source })
}
