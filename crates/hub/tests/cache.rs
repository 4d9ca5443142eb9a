//! The cache against real files, real wheels and a real (unreachable) hub.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use exrail_hub::{Cache, Fetch, HubError, Kind, Progress, Registry, Silent};
use sha2::{Digest, Sha256};

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A registry with one model of one file; both sources lead nowhere.
fn registry(folder: &Path, content: &[u8]) -> Registry {
    let text = format!(
        r#"
[[model]]
name = "tiny"
kind = "generator"
title = "a test model"
licence = "MIT"
load = "tiny.gguf"
[[model.file]]
path = "tiny.gguf"
bytes = {}
sha256 = "{}"
[[model.source]]
python_package = "exrail-no-such-package==0.0.0"
folder = "nowhere"
"#,
        content.len(),
        hex(content)
    );
    let file = folder.join("models.toml");
    fs::write(&file, text).unwrap();
    Registry::read(&file).unwrap()
}

fn resolve(cache: &Cache, registry: &Registry, fetch: Fetch) -> Result<String, HubError> {
    cache
        .resolve(registry, "tiny", Kind::Generator, fetch, &mut Silent)
        .map(|found| found.path.display().to_string())
}

#[test]
fn a_cached_file_that_is_right_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let registry = registry(folder.path(), b"weights");
    let cache = Cache::at(folder.path());
    fs::create_dir_all(folder.path().join("models/tiny")).unwrap();
    fs::write(folder.path().join("models/tiny/tiny.gguf"), b"weights").unwrap();
    assert!(resolve(&cache, &registry, Fetch::Never).unwrap().ends_with("models/tiny/tiny.gguf"));
}

#[test]
fn a_partial_file_is_named_removed_and_never_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let registry = registry(folder.path(), b"weights");
    let cache = Cache::at(folder.path());
    let file = folder.path().join("models/tiny/tiny.gguf");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, b"weig").unwrap();
    let error = resolve(&cache, &registry, Fetch::Never).unwrap_err().to_string();
    assert!(error.contains("expected 7 bytes, found 4"), "{error}");
    assert!(!file.exists());
}

#[test]
fn a_file_with_another_content_is_named_removed_and_never_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let registry = registry(folder.path(), b"weights");
    let cache = Cache::at(folder.path());
    let file = folder.path().join("models/tiny/tiny.gguf");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, b"weightz").unwrap();
    let error = resolve(&cache, &registry, Fetch::Never).unwrap_err().to_string();
    assert!(error.contains(&hex(b"weights")) && error.contains(&hex(b"weightz")), "{error}");
    assert!(!file.exists());
}

/// The mutation: with the hash of the damaged bytes in the registry, nothing else holds them back.
#[test]
fn mutation_a_forged_hash_lets_a_damaged_file_be_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let file = folder.path().join("models/tiny/tiny.gguf");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, b"weightz").unwrap();
    let forged = registry(folder.path(), b"weightz");
    let path = resolve(&cache, &forged, Fetch::Never).unwrap();
    assert_eq!(fs::read(path).unwrap(), b"weightz");
    let honest = registry(folder.path(), b"weights");
    assert!(matches!(resolve(&cache, &honest, Fetch::Never), Err(HubError::WrongHash { .. })));
}

#[test]
fn a_source_that_fails_is_reported_and_leaves_nothing_behind() {
    struct Notes(Vec<String>);
    impl Progress for Notes {
        fn note(&mut self, text: &str) {
            self.0.push(text.into());
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let registry = registry(folder.path(), b"weights");
    let cache = Cache::at(folder.path());
    let mut notes = Notes(Vec::new());
    let error = cache
        .resolve(&registry, "tiny", Kind::Generator, Fetch::IfMissing, &mut notes)
        .unwrap_err()
        .to_string();
    assert!(error.contains("exrail-no-such-package"), "{error}");
    assert!(notes.0.iter().any(|note| note.contains("trying the next source")), "{:?}", notes.0);
    assert_eq!(fs::read_dir(folder.path().join("partial")).unwrap().count(), 0);
    assert!(!folder.path().join("models/tiny").exists());
}

#[test]
fn an_unknown_name_lists_the_known_ones() {
    let folder = tempfile::tempdir().unwrap();
    let registry = registry(folder.path(), b"weights");
    let cache = Cache::at(folder.path());
    let error = cache
        .resolve(&registry, "huge", Kind::Generator, Fetch::Never, &mut Silent)
        .unwrap_err()
        .to_string();
    assert!(error.contains("huge") && error.contains("tiny"), "{error}");
}

#[test]
fn an_encoder_is_not_taken_for_a_generator() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let error = cache
        .resolve(
            &Registry::embedded(),
            "all-minilm-l6-v2",
            Kind::Generator,
            Fetch::Never,
            &mut Silent,
        )
        .unwrap_err()
        .to_string();
    assert!(error.contains("expected a generator"), "{error}");
}

#[test]
fn the_parts_of_a_split_file_have_the_name_of_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let registry = registry(folder.path(), b"weights");
    let cache = Cache::at(folder.path());
    for (file, name) in [("qwen-00001-of-00003.gguf", "qwen"), ("qwen-00001.gguf", "qwen-00001")] {
        let path = folder.path().join(file);
        fs::write(&path, b"weights").unwrap();
        let path = path.to_str().unwrap();
        let found = cache.resolve(&registry, path, Kind::Generator, Fetch::Never, &mut Silent);
        assert_eq!(found.unwrap().name, name);
    }
}
