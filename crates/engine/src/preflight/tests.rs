use std::fs;
use std::path::PathBuf;

use exrail_text::Specials;
use tempfile::TempDir;

use super::*;

/// A folder of a tiny model, to be spoilt.
fn folder() -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/families/qwen3");
    let dir = home.path().join("model");
    fs::create_dir(&dir).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    (home, dir)
}

fn manifest(dir: &Path) -> Manifest {
    Manifest::of(dir, &mut |_| Ok(())).unwrap()
}

/// Paths of what does not agree, and their classes.
fn differing(manifest: &Manifest, dir: &Path) -> Vec<(String, Class)> {
    let rows = manifest.check(dir, &mut |_| Ok(())).unwrap();
    let rows = rows.into_iter().filter(|row| !row.agrees());
    rows.map(|row| (row.path, row.class)).collect()
}

fn edit(file: &Path, change: impl FnOnce(String) -> String) {
    let before = fs::read_to_string(file).unwrap();
    let after = change(before.clone());
    assert_ne!(before, after, "the fault is in place");
    fs::write(file, after).unwrap();
}

/// Field fault E1 and §3.2: two added tokens change places, and everything still loads.
fn swap_added_tokens(dir: &Path) {
    edit(&dir.join("tokenizer.json"), |text| {
        let mut json: Value = serde_json::from_str(&text).unwrap();
        let added = json["added_tokens"].as_array_mut().unwrap();
        let (first, second) = (added[0]["content"].clone(), added[1]["content"].clone());
        (added[0]["content"], added[1]["content"]) = (second.clone(), first.clone());
        let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
        let (first, second) = (first.as_str().unwrap(), second.as_str().unwrap());
        if let (Some(a), Some(b)) =
            (vocabulary.get(first).cloned(), vocabulary.get(second).cloned())
        {
            vocabulary.insert(first.into(), b);
            vocabulary.insert(second.into(), a);
        }
        json.to_string()
    });
}

#[test]
fn a_manifest_agrees_with_the_model_that_it_was_written_of() {
    let (home, dir) = folder();
    let written = manifest(&dir);
    let file = home.path().join("model.manifest.json");
    fs::write(&file, written.to_json()).unwrap();
    let read = Manifest::read(&file).unwrap();
    assert_eq!(read, written, "what is written is read");
    let rows = read.check(&dir, &mut |_| Ok(())).unwrap();
    let wrong: Vec<_> = rows.iter().filter(|row| !row.agrees()).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    let golden = rows.iter().filter(|row| row.path.starts_with("golden.as_text.")).count();
    assert!(golden >= FEWEST_GOLDEN, "{golden}");
    for part in ["golden.controls.", "golden.chats.", "files.", "model.ropes", "tokens.eos"] {
        assert!(rows.iter().any(|row| row.path.starts_with(part)), "{part}");
    }
}

#[test]
fn e1_two_added_tokens_that_change_places_are_refused() {
    let (_home, dir) = folder();
    let manifest = manifest(&dir);
    swap_added_tokens(&dir);
    let found = differing(&manifest, &dir);
    let has =
        |path: &str| found.iter().any(|(at, class)| at.starts_with(path) && *class == Class::Hard);
    assert!(has("golden.controls.") && has("tokens.fingerprint"), "{found:?}");
    assert!(has("files.tokenizer.json.sha256"), "{found:?}");
}

/// The mutation: without a manifest the same folder passes every check of a load, and control tokens have
/// each other's ids.
#[test]
fn mutation_without_a_manifest_swapped_tokens_reach_the_user() {
    let (_home, dir) = folder();
    let ids = |dir: &Path| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let checked = check_generator(&checkpoint, LoadOptions::default()).unwrap();
        let json: Value =
            serde_json::from_slice(&fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
        let literals = json["added_tokens"].as_array().unwrap().iter();
        let literals = literals.map(|token| token["content"].as_str().unwrap().to_owned());
        let mut ids: Vec<_> = literals
            .map(|text| (checked.tokenizer.encode(&text, Specials::Parse).unwrap(), text))
            .collect();
        ids.sort();
        ids
    };
    let before = ids(&dir);
    swap_added_tokens(&dir);
    assert_ne!(ids(&dir), before);
}

#[test]
fn every_kind_of_change_is_a_hard_row_of_its_own() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 3] = [
        ("model.ropes", |dir| {
            edit(&dir.join("config.json"), |text| {
                let mut json: Value = serde_json::from_str(&text).unwrap();
                if json.get("rope_parameters").is_some() {
                    json["rope_parameters"]["rope_theta"] = json!(12345.0);
                }
                json["rope_theta"] = json!(12345.0);
                json.to_string()
            });
        }),
        ("template.sha256", |dir| {
            let template = dir.join("chat_template.jinja");
            let before = fs::read_to_string(&template).unwrap_or_default();
            fs::write(template, format!("{before} ")).unwrap();
        }),
        ("files.", |dir| {
            let file = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
            let mut file =
                file.filter(|path| path.extension().is_some_and(|it| it == "safetensors"));
            let file = file.next().unwrap();
            let mut bytes = fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(file, bytes).unwrap();
        }),
    ];
    for (path, change) in changes {
        let (_home, dir) = folder();
        let manifest = manifest(&dir);
        change(&dir);
        let found = differing(&manifest, &dir);
        let is_there =
            found.iter().any(|(at, class)| at.starts_with(path) && *class == Class::Hard);
        assert!(is_there, "{path}: {found:?}");
    }
}

#[test]
fn the_surroundings_are_soft_and_what_one_side_lacks_is_a_mismatch() {
    let (_home, dir) = folder();
    let mut manifest = manifest(&dir);
    manifest.declared["soft"]["engine_build"] = json!("exrail-0.0.0");
    let soft = vec![("soft.engine_build".to_owned(), Class::Soft)];
    assert_eq!(differing(&manifest, &dir), soft);
    manifest.declared["model"]["more"] = json!(1);
    manifest.declared["tokens"].as_object_mut().unwrap().remove("padding_rows");
    let found: Vec<_> = differing(&manifest, &dir).into_iter().map(|(path, _)| path).collect();
    assert_eq!(found, ["model.more", "soft.engine_build", "tokens.padding_rows"]);
}

#[test]
fn what_is_no_manifest_is_refused_with_the_way_to_one() {
    let (home, dir) = folder();
    let file = home.path().join("m.json");
    let mut few = manifest(&dir).declared;
    few["golden"]["as_text"] = json!({ "Hello": [1] });
    for (text, part) in [
        ("{".to_owned(), "expected JSON"),
        ("{}".to_owned(), "expected manifest_version 1, found null"),
        (few.to_string(), "expected at least 64 golden texts, found 1"),
    ] {
        fs::write(&file, text).unwrap();
        let error = Manifest::read(&file).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("exrail preflight"), "{error}");
    }
    let error = Manifest::read(&home.path().join("none.json")).unwrap_err();
    assert!(matches!(error, PreflightError::Io { .. }), "{error}");
}
