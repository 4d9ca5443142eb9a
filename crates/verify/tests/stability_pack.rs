//! The sample pack: every evidence span of its gold set, its counts, and the pages that reports name.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use exrail_retrieval::{
    ChunkOptions, Collection, Contract, Encode, read_folder, testing::FakeEncoder,
};
use exrail_verify::{CollectionIndex, GoldKind, GoldSet, Retrieve};

fn pack() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packs/stability")
}

fn index(folder: &Path) -> CollectionIndex {
    let encoder: Arc<dyn Encode> = Arc::new(FakeEncoder::new(1));
    let contract = Contract::new(&*encoder, ChunkOptions::for_encoder(&*encoder)).unwrap();
    let mut collection = Collection::create(folder, contract).unwrap();
    let documents = read_folder(&pack().join("docs")).unwrap();
    collection.ingest(documents, &*encoder, &mut |_| {}).unwrap();
    CollectionIndex::new(collection, encoder)
}

#[test]
fn every_evidence_span_is_the_quoted_text_of_its_document() {
    let folder = tempfile::tempdir().unwrap();
    let index = index(folder.path());
    let gold = GoldSet::read(&pack().join("gold.jsonl")).unwrap();
    let resolved = gold.resolve(&index).unwrap();
    assert_eq!(resolved.len(), gold.of_kind(GoldKind::Answerable).count());
    for item in gold.of_kind(GoldKind::Answerable) {
        for evidence in &item.evidence {
            let document = index.document(&evidence.doc).unwrap().unwrap();
            let occurrences = document.text.matches(&evidence.quote).count();
            assert_eq!(occurrences, 1, "{}: `{}` in {}", item.id, evidence.quote, evidence.doc);
        }
    }
}

#[test]
fn the_gold_set_is_as_large_as_the_gates_need() {
    let gold = GoldSet::read(&pack().join("gold.jsonl")).unwrap();
    assert!(gold.of_kind(GoldKind::Answerable).count() >= 60);
    assert!(gold.of_kind(GoldKind::Unanswerable).count() >= 100);
    assert!(gold.of_kind(GoldKind::OffTopic).count() >= 50);
    for item in gold.of_kind(GoldKind::Answerable) {
        assert!(item.paraphrases.len() >= 3, "{}", item.id);
    }
}

/// A report must not send its reader to a page that is not there.
#[test]
fn the_pages_that_reports_name_exist() {
    let source = include_str!("../src/fix.rs").split("#[cfg(test)]").next().unwrap();
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let mut pages = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let names = line.starts_with("page: \"") || line.starts_with("then: &[");
        if names || at > 0 && lines[at - 1].ends_with("differ(") {
            pages.extend(line.split('"').skip(1).step_by(2));
        }
    }
    assert!(pages.len() >= 20 && pages.contains(&"tokenizer-drift"), "{pages:?}");
    for page in pages {
        // What to do, or the method behind it.
        let folders = ["fix", "docs"];
        let exists = |folder: &&str| pack().join(format!("{folder}/{page}.md")).is_file();
        assert!(folders.iter().any(exists), "{page}");
    }
}
