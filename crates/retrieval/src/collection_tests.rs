//! Collections on disk: round trips, faults at every write, the guards and their mutations.

use std::cell::Cell;
use std::io;

use tempfile::TempDir;

use super::*;
use crate::testing::FakeEncoder;
use crate::{EncodeError, EncoderFacts, SearchMode};

const CATS: &str = "# Cats\n\nCats purr when they are content. A cat sleeps most of the day.\n\n\
                    ## Food\n\nCats eat mice, fish and dry food. They need fresh water.\n";
const BOATS: &str = "# Boats\n\nA sailing boat needs wind. The keel keeps the boat upright.\n\n\
                     ## Anchors\n\nThe anchor holds the boat against wind and current.\n";
const BREAD: &str = "# Bread\n\nBread needs flour, water, salt and yeast. Knead the dough well.\n";

fn markdown(doc_id: &str, text: &str) -> Document {
    Document::parse(doc_id, doc_id, DocumentFormat::Markdown, text.as_bytes()).unwrap()
}

fn documents() -> Vec<Document> {
    vec![markdown("boats.md", BOATS), markdown("cats.md", CATS), markdown("bread.md", BREAD)]
}

fn empty(encoder: &dyn Encode) -> (TempDir, Collection) {
    let folder = tempfile::tempdir().unwrap();
    let contract = Contract::new(encoder, ChunkOptions::for_encoder(encoder)).unwrap();
    let collection = Collection::create(&folder.path().join("c"), contract).unwrap();
    (folder, collection)
}

fn filled(encoder: &dyn Encode) -> (TempDir, Collection) {
    let (folder, mut collection) = empty(encoder);
    collection.ingest(documents(), encoder, &mut |_| {}).unwrap();
    (folder, collection)
}

fn ids(hits: &[Hit]) -> Vec<String> {
    hits.iter().map(|hit| hit.chunk.snippet_id.clone()).collect()
}

fn find(collection: &Collection, query: &str, options: &SearchOptions) -> Vec<Hit> {
    collection.search(query, &FakeEncoder::new(1), options).unwrap()
}

#[test]
fn every_mode_finds_the_right_section_and_says_how() {
    let (_folder, collection) = filled(&FakeEncoder::new(1));
    for mode in [SearchMode::Hybrid, SearchMode::Lexical, SearchMode::Vector] {
        let options = SearchOptions { mode, k: 3, ..SearchOptions::default() };
        let hits = find(&collection, "What holds the boat against the current?", &options);
        assert_eq!(hits[0].chunk.section_id, "boats.md#boats/anchors", "{mode:?}");
        assert_eq!(hits[0].k_pos, 1);
        assert_eq!((hits[0].rank_lexical, hits[0].rank_vector), (Some(1), Some(1)));
        for pair in hits.windows(2) {
            assert!(pair[0].score_raw >= pair[1].score_raw);
        }
        for hit in &hits {
            assert!((0.0..=1.0).contains(&hit.score_norm));
            assert!((-1.0..=1.0).contains(&hit.cosine));
            let document = collection.document(&hit.chunk.doc_id).unwrap();
            assert_eq!(document.text[hit.chunk.range()], hit.chunk.text);
        }
    }
}

#[test]
fn words_are_found_by_their_stem_and_by_the_titles_above_them() {
    let (_folder, collection) = filled(&FakeEncoder::new(1));
    let options = SearchOptions { mode: SearchMode::Lexical, ..SearchOptions::default() };
    let hits = find(&collection, "kneading", &options);
    assert_eq!(hits[0].chunk.doc_id, "bread.md");
    // "Food" stands only in a heading of the cats' second section.
    assert_eq!(find(&collection, "foods", &options)[0].chunk.section_id, "cats.md#cats/food");
    assert!(find(&collection, "zebra", &options).is_empty());
}

#[test]
fn masked_documents_are_never_found() {
    let (_folder, collection) = filled(&FakeEncoder::new(1));
    for mode in [SearchMode::Hybrid, SearchMode::Lexical, SearchMode::Vector] {
        let mask_docs = vec!["boats.md".to_owned()];
        let hits = find(&collection, "boat wind", &SearchOptions { k: 50, mode, mask_docs });
        assert!(hits.iter().all(|hit| hit.chunk.doc_id != "boats.md"), "{mode:?}");
        assert_eq!(hits.is_empty(), mode == SearchMode::Lexical);
        if mode == SearchMode::Vector {
            assert_eq!(hits.len(), 3);
        }
    }
}

#[test]
fn no_character_of_a_question_is_an_operator() {
    let (_folder, collection) = filled(&FakeEncoder::new(1));
    for query in [
        "AND OR NOT",
        "(boat",
        "\"unclosed",
        "text:boat^",
        "a:b:c",
        "+-!{}[]~*?\\/",
        "boat*",
        "/re(gex/",
        "field:",
        "IN [a b]",
        "\u{0}\u{1}x",
        "🙂",
        "the of and",
    ] {
        find(&collection, query, &SearchOptions::default());
    }
    let none = collection.search(" \u{200B}\n", &FakeEncoder::new(1), &SearchOptions::default());
    assert!(matches!(none, Err(RetrievalError::EmptyQuery)));
    let long = "boat wind keel ".repeat(500);
    let hits = find(&collection, &long, &SearchOptions::default());
    assert_eq!(hits[0].chunk.doc_id, "boats.md");
}

#[test]
fn equal_scores_are_ordered_by_section_and_snippet() {
    let encoder = FakeEncoder::new(1);
    let (_folder, mut collection) = empty(&encoder);
    let same = ["d.md", "b.md", "a.md", "c.md"].map(|name| markdown(name, "equal words here"));
    collection.ingest(same.to_vec(), &encoder, &mut |_| {}).unwrap();
    for mode in [SearchMode::Hybrid, SearchMode::Lexical, SearchMode::Vector] {
        let options = SearchOptions { k: 4, mode, ..SearchOptions::default() };
        let hits = find(&collection, "equal words", &options);
        let found: Vec<&str> = hits.iter().map(|hit| hit.chunk.doc_id.as_str()).collect();
        assert_eq!(found, ["a.md", "b.md", "c.md", "d.md"], "{mode:?}");
    }
}

#[test]
fn a_reopened_collection_is_the_same() {
    let encoder = FakeEncoder::new(1);
    let (folder, collection) = filled(&encoder);
    let again = Collection::open(&folder.path().join("c"), &encoder).unwrap();
    assert_eq!(again.index_hash(), collection.index_hash());
    assert_eq!(again.chunks(), collection.chunks());
    assert_eq!(again.vectors(), collection.vectors());
    assert!(again.documents().eq(collection.documents()));
    let options = SearchOptions::default();
    assert_eq!(
        ids(&find(&again, "fresh water", &options)),
        ids(&find(&collection, "fresh water", &options))
    );
    let snippet = &collection.chunks()[0];
    assert_eq!(again.chunk(&snippet.snippet_id), Some(snippet));
    // Built in another order and in two steps, it has the same identity.
    let (_other, mut other) = empty(&encoder);
    for document in documents().into_iter().rev() {
        other.ingest(vec![document], &encoder, &mut |_| {}).unwrap();
    }
    assert_eq!(other.index_hash(), collection.index_hash());
}

#[test]
fn only_what_changed_is_embedded_again() {
    let encoder = FakeEncoder::new(1);
    let (folder, mut collection) = filled(&encoder);
    let before = collection.index_hash().to_owned();
    let report = collection.ingest(documents(), &encoder, &mut |_| {}).unwrap();
    assert_eq!((report.unchanged.len(), report.n_embedded), (3, 0));
    assert_eq!((report.generation.as_str(), report.index_hash.as_str()), ("gen-000002", &*before));

    let changed = markdown("cats.md", "# Cats\n\nA cat has nine lives.\n");
    let mut seen = Vec::new();
    let report = collection
        .ingest(vec![changed, markdown("boats.md", BOATS)], &encoder, &mut |p| seen.push(p))
        .unwrap();
    assert_eq!(report.replaced, ["cats.md"]);
    assert_eq!(report.unchanged, ["boats.md"]);
    assert_eq!(seen, [IngestProgress { embedded: 1, total: 1 }]);
    assert_eq!((report.n_documents, report.n_chunks), (3, 4));
    assert_ne!(report.index_hash, before);
    let hits = find(&collection, "purr content sleeps", &SearchOptions::default());
    assert!(hits.iter().all(|hit| !hit.chunk.text.contains("purr")));

    let report = collection.remove(&["cats.md".to_owned(), "none".to_owned()], &encoder).unwrap();
    assert_eq!((report.removed, report.n_documents), (vec!["cats.md".to_owned()], 2));
    let again = Collection::open(&folder.path().join("c"), &encoder).unwrap();
    assert!(again.document("cats.md").is_none());
    // Disk use is bounded: the current generation and the one before.
    let generations = fs::read_dir(folder.path().join("c"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("gen-"));
    assert_eq!(generations.count(), 2);
}

/// Fails at operation `left` (write: after half of the bytes).
struct FailingDisk {
    left: Cell<usize>,
}

impl FailingDisk {
    fn step(&self) -> io::Result<()> {
        let left = self.left.get();
        self.left.set(left.wrapping_sub(1));
        if left == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Disk for FailingDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        SystemDisk.create_dir(path)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.step() {
            SystemDisk.write(path, &bytes[..bytes.len() / 2])?;
            return Err(error);
        }
        SystemDisk.write(path, bytes)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        SystemDisk.rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        SystemDisk.sync_dir(path)
    }
}

#[test]
fn a_full_disk_at_any_write_leaves_a_whole_collection() {
    let encoder = FakeEncoder::new(1);
    let (folder, collection) = filled(&encoder);
    let dir = folder.path().join("c");
    let old = collection.index_hash().to_owned();
    drop(collection);
    let mut failures = 0;
    loop {
        let mut collection = Collection::open(&dir, &encoder).unwrap();
        let disk = FailingDisk { left: Cell::new(failures) };
        let new = vec![markdown("new.md", "Something new to read.")];
        let result = collection.write(&disk, new, &[], &encoder, &mut |_| {});
        let Err(error) = result else { break };
        assert!(error.to_string().contains("storage"), "{error}");
        assert!(matches!(error, RetrievalError::Io { .. }));
        // In memory and on disk it is the old one, until the very last step, the sync after the
        // rename, after which the new one is there and whole.
        assert_eq!(collection.index_hash(), old);
        find(&collection, "boat", &SearchOptions::default());
        let again = Collection::open(&dir, &encoder).unwrap();
        if again.index_hash() != old {
            assert!(again.document("new.md").is_some());
            assert!(matches!(collection.remove(&[], &encoder), Err(RetrievalError::Stale { .. })));
            break;
        }
        assert!(!dir.join("gen-000003").exists(), "half a generation stays behind");
        failures += 1;
    }
    assert!(failures > 10, "every file must have been a failure once, found {failures}");
}

#[test]
fn what_a_crash_leaves_behind_is_cleared_away() {
    let encoder = FakeEncoder::new(1);
    let (folder, mut collection) = filled(&encoder);
    let dir = folder.path().join("c");
    fs::create_dir(dir.join("gen-000003")).unwrap();
    fs::write(dir.join("gen-000003").join("chunks.jsonl"), "{\"half").unwrap();
    fs::write(dir.join("CURRENT.new"), "gen-00").unwrap();
    Collection::open(&dir, &encoder).unwrap();
    collection.ingest(vec![markdown("new.md", "New words.")], &encoder, &mut |_| {}).unwrap();
    assert!(Collection::open(&dir, &encoder).unwrap().document("new.md").is_some());
}

#[test]
fn there_is_one_writer_and_it_knows_what_it_writes_over() {
    let encoder = FakeEncoder::new(1);
    let (folder, mut collection) = filled(&encoder);
    let dir = folder.path().join("c");
    let held = lock(&dir).unwrap();
    let new = || vec![markdown("new.md", "New words.")];
    let locked = collection.ingest(new(), &encoder, &mut |_| {});
    assert!(matches!(locked, Err(RetrievalError::Locked { .. })));
    drop(held);
    let mut other = Collection::open(&dir, &encoder).unwrap();
    other.ingest(new(), &encoder, &mut |_| {}).unwrap();
    let stale = collection.ingest(new(), &encoder, &mut |_| {}).unwrap_err();
    assert_eq!(
        stale.to_string(),
        "collection changed on disk: opened generation gen-000002, current is gen-000003"
    );
    let twice = [new(), new()].concat();
    let mut fresh = Collection::open(&dir, &encoder).unwrap();
    let refused = fresh.ingest(twice, &encoder, &mut |_| {});
    assert!(matches!(refused, Err(RetrievalError::DuplicateDocument { .. })));
    let contract = collection.contract().clone();
    assert!(matches!(
        Collection::create(&dir, contract),
        Err(RetrievalError::AlreadyExists { .. })
    ));
}

#[test]
fn every_damaged_file_is_refused_by_name() {
    let encoder = FakeEncoder::new(1);
    let (folder, collection) = filled(&encoder);
    drop(collection);
    let dir = folder.path().join("c");
    let generation = dir.join("gen-000002");
    let mut files = vec![dir.join("CURRENT")];
    for folder in [&generation, &generation.join("lexical")] {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files.extend(entries.filter(|path| path.is_file()));
    }
    assert!(files.len() > 8, "{files:?}");
    for path in files {
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for bad in [&good[..good.len() - 1], &[], &flipped[..]] {
            fs::write(&path, bad).unwrap();
            let Err(error) = Collection::open(&dir, &encoder) else { panic!("{path:?} opened") };
            // A damaged pointer is noticed at the manifest that it no longer fits.
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let message = error.to_string();
            assert!(
                message.contains(&name) || name == "CURRENT" && message.contains("manifest"),
                "{name}: {message}"
            );
        }
        fs::remove_file(&path).unwrap();
        assert!(matches!(Collection::open(&dir, &encoder), Err(RetrievalError::Io { .. })));
        fs::write(&path, good).unwrap();
    }
    Collection::open(&dir, &encoder).unwrap();
}

#[test]
fn a_newer_schema_is_refused_by_version() {
    let encoder = FakeEncoder::new(1);
    let (folder, _collection) = filled(&encoder);
    let dir = folder.path().join("c");
    let path = dir.join("gen-000002").join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replacen("\"schema_version\": 1", "\"schema_version\": 2", 1);
    fs::write(&path, &text).unwrap();
    let pointer = format!("gen-000002 {}\n", crate::hash::sha256_hex(text.as_bytes()));
    fs::write(dir.join("CURRENT"), pointer).unwrap();
    let refused = Collection::open(&dir, &encoder);
    assert!(matches!(refused, Err(RetrievalError::UnsupportedSchema { found: 2, .. })));
}

/// The right facts and fingerprint, but another tokenizer: only the probe can tell.
struct Impostor(FakeEncoder);

impl Encode for Impostor {
    fn fingerprint(&self) -> &str {
        self.0.fingerprint()
    }
    fn facts(&self) -> EncoderFacts {
        self.0.facts()
    }
    fn tokenize(&self, text: &str) -> Vec<(u32, std::ops::Range<usize>)> {
        let tokens = self.0.tokenize(text).into_iter();
        tokens.map(|(id, span)| (id ^ 1, span)).collect()
    }
    fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, EncodeError> {
        self.0.encode(texts)
    }
}

#[test]
fn another_encoder_is_refused_with_the_fields_that_differ() {
    let (folder, mut collection) = filled(&FakeEncoder::new(1));
    let dir = folder.path().join("c");
    let facts = EncoderFacts { query_prefix: "query: ".to_owned(), ..FakeEncoder::new(1).facts() };
    let other = FakeEncoder::with_facts(1, facts);
    let Err(RetrievalError::ContractMismatch { diff }) = Collection::open(&dir, &other) else {
        panic!("opened")
    };
    let fields: Vec<&str> = diff.iter().map(|diff| diff.field.as_str()).collect();
    assert_eq!(fields, ["encoder_fp", "encoder.query_prefix"]);
    assert_eq!((diff[1].stored.as_str(), diff[1].live.as_str()), ("\"\"", "\"query: \""));
    let options = SearchOptions::default();
    assert!(collection.search("boat", &other, &options).is_err());
    assert!(collection.ingest(documents(), &other, &mut |_| {}).is_err());
    assert!(collection.search("boat", &Impostor(FakeEncoder::new(1)), &options).is_err());
}

/// Mutation of G-24: with the check left out, vectors of another encoder do reach the search, and
/// nothing but the check would have stopped them.
#[test]
fn without_the_contract_check_foreign_vectors_reach_the_search() {
    let right = FakeEncoder::new(1);
    let wrong = FakeEncoder::new(2);
    let (_folder, mut collection) = filled(&right);
    let vector = SearchOptions { mode: SearchMode::Vector, k: 1, ..SearchOptions::default() };
    let question = "The anchor holds the boat against wind and current.";
    let good = collection.search(question, &right, &vector).unwrap();
    assert!(good[0].cosine > 0.75, "{}", good[0].cosine);
    // A foreign question: an answer comes back, with cosines that mean nothing.
    let bad = collection.search_unchecked(question, &wrong, &vector).unwrap();
    assert!(bad[0].cosine < 0.6, "{}", bad[0].cosine);
    // Foreign vectors in the store: the document is there, and its own words do not find it.
    let new = "The lighthouse keeper lights the lamp at dusk.";
    let foreign = vec![markdown("new.md", new)];
    collection.write_unchecked(&SystemDisk, foreign, &[], &wrong, &mut |_| {}).unwrap();
    let hits = collection.search(new, &right, &vector).unwrap();
    assert!(hits[0].cosine < 0.6, "{}", hits[0].cosine);
    // On disk the chunk says whose it is, so the next open refuses the mixture.
    let reopened = Collection::open(&collection.dir, &right);
    assert!(matches!(reopened, Err(RetrievalError::Corrupt { .. })));
}

/// Spoils the vectors it returns.
struct Broken(FakeEncoder, fn(&mut Vec<Vec<f32>>));

impl Encode for Broken {
    fn fingerprint(&self) -> &str {
        self.0.fingerprint()
    }
    fn facts(&self) -> EncoderFacts {
        self.0.facts()
    }
    fn tokenize(&self, text: &str) -> Vec<(u32, std::ops::Range<usize>)> {
        self.0.tokenize(text)
    }
    fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, EncodeError> {
        let mut vectors = self.0.encode(texts)?;
        self.1(&mut vectors);
        Ok(vectors)
    }
}

#[test]
fn vectors_that_break_the_contract_are_refused_and_never_mended() {
    let (_folder, mut collection) = filled(&FakeEncoder::new(1));
    let breakages: [fn(&mut Vec<Vec<f32>>); 4] = [
        |vectors| vectors[0].iter_mut().for_each(|value| *value *= 1.002),
        |vectors| vectors[0][0] = f32::NAN,
        |vectors| vectors[0].truncate(63),
        |vectors| vectors.truncate(0),
    ];
    for breakage in breakages {
        let encoder = Broken(FakeEncoder::new(1), breakage);
        let new = vec![markdown("new.md", "New words.")];
        let refused = collection.ingest(new, &encoder, &mut |_| {}).unwrap_err();
        assert!(matches!(
            refused,
            RetrievalError::VectorNorm { .. }
                | RetrievalError::VectorDim { .. }
                | RetrievalError::VectorCount { .. }
        ));
        assert!(collection.search("boat", &encoder, &SearchOptions::default()).is_err());
    }
    assert_eq!(collection.documents().count(), 3);
}

#[test]
fn prefixes_reach_the_encoder() {
    let facts = EncoderFacts {
        query_prefix: "query: ".to_owned(),
        passage_prefix: "passage: ".to_owned(),
        ..FakeEncoder::new(1).facts()
    };
    let encoder = FakeEncoder::with_facts(1, facts);
    let (_folder, mut collection) = empty(&encoder);
    assert_eq!(collection.contract().chunking.window, 252);
    collection.ingest(documents(), &encoder, &mut |_| {}).unwrap();
    let chunk = collection.chunks()[0].clone();
    let expected = encoder.encode(&[&format!("passage: {}", prepare(&chunk.text))]).unwrap();
    assert_eq!(collection.vectors()[..64], expected[0]);
    let hits = collection.search(&chunk.text, &encoder, &SearchOptions::default()).unwrap();
    let question = encoder.encode(&[&format!("query: {}", prepare(&chunk.text))]).unwrap();
    let cosine = crate::vectors::dot(&question[0], &expected[0]);
    let hit = hits.iter().find(|hit| hit.chunk.snippet_id == chunk.snippet_id).unwrap();
    assert_eq!(hit.cosine.to_bits(), cosine.to_bits());
}

#[test]
fn the_report_measures_what_g23_asks_for() {
    let encoder = FakeEncoder::new(1);
    let (_folder, mut collection) = empty(&encoder);
    let copy = "The same sentence stands in two documents.";
    let report = collection
        .ingest(
            vec![
                markdown("a.md", &format!("# Bare\n\n# One\n\n{copy}\n\nPage 3 of 9\n")),
                markdown("b.md", copy),
                markdown("c.md", copy),
                markdown("empty.md", ""),
            ],
            &encoder,
            &mut |_| {},
        )
        .unwrap();
    assert_eq!(report.without_chunks, ["empty.md"]);
    assert_eq!((report.bare_headings, report.page_lines, report.forced_cuts), (1, 1, 0));
    assert_eq!(report.duplicates.len(), 1);
    assert_eq!(report.duplicates[0].len(), 2);
    assert_eq!((report.n_chunks, report.below_min), (3, 3));
    assert_eq!(report.size_histogram.iter().sum::<usize>(), 3);
    assert_eq!(report.sizes.unwrap().n, 3);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["generation"], "gen-000002");
}

#[test]
fn an_empty_collection_finds_nothing_without_an_error() {
    let encoder = FakeEncoder::new(1);
    let (folder, collection) = empty(&encoder);
    assert!(collection.is_empty());
    assert!(find(&collection, "boat", &SearchOptions::default()).is_empty());
    Collection::open(&folder.path().join("c"), &encoder).unwrap();
}
