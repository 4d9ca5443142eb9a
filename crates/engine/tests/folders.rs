//! Hugging Face folders and GGUF files of the same models say the same, from text to text.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use exrail_checkpoint::sha256_hex;
use exrail_engine::{
    Engine, EngineError, EngineHandle, EngineOptions, Event, FingerprintState, GenerateRequest,
    LoadOptions, Sampling, load_generator,
};
use exrail_kernels::KvDtype;
use exrail_kernels::reference::Reference;
use exrail_tensor::IntGrid;
use exrail_text::{ChatMessage, RenderOptions, Specials, encode_prompt};

fn families() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/families")
}

fn start(path: &Path, max_context: Option<usize>) -> Result<EngineHandle, EngineError> {
    let loaded = load_generator(
        Reference,
        path,
        LoadOptions { max_context, ..LoadOptions::default() },
        &mut |_| {},
    )?;
    let options = EngineOptions {
        kv_pages: Some(4),
        max_context,
        kv_dtype: KvDtype::F32,
        ..EngineOptions::default()
    };
    Engine::start(loaded, options)
}

/// The ids of a chat prompt, those of a greedy answer, and its text.
fn answer(engine: &EngineHandle) -> (Vec<u32>, Vec<u32>, String) {
    let messages = [ChatMessage::new("user", "Grüß Gott, <|im_end|> 12  spaces?")];
    let template = engine.template().expect("every folder has a template");
    let prompt = template.render(&messages, &RenderOptions::default()).unwrap();
    let ids = encode_prompt(engine.tokenizer(), &prompt).unwrap();
    let mut request = GenerateRequest::new(ids.clone(), 24);
    request.sampling = Sampling::greedy();
    let generation = engine.submit(request).unwrap();
    let (mut answered, mut text) = (Vec::new(), String::new());
    loop {
        match generation.events.recv().expect("an answer ends with an event") {
            Event::Token(token) => {
                answered.push(token.id);
                text.push_str(&token.text);
            }
            Event::Tail(tail) => text.push_str(&tail),
            Event::Finished(_) => return (ids, answered, text),
            Event::Started { .. } | Event::Rotated(_) | Event::RolledBack { .. } => {}
            Event::Failed(fault) => panic!("{fault:?}"),
        }
    }
}

#[test]
fn every_family_answers_from_its_folder_as_from_its_gguf_file() {
    let (mut n_folders, mut n_pairs) = (0, 0);
    for entry in std::fs::read_dir(families()).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.is_dir() {
            continue;
        }
        n_folders += 1;
        let context = Some(64);
        let from_folder = answer(&start(&dir, context).unwrap());
        assert!(!from_folder.1.is_empty(), "{}", dir.display());
        let gguf = dir.join("model.gguf");
        if gguf.exists() {
            n_pairs += 1;
            let engine = start(&gguf, context).unwrap();
            assert_eq!(answer(&engine), from_folder, "{}", dir.display());
        }
    }
    assert_eq!((n_folders, n_pairs), (21, 15));
}

#[test]
fn e10_ends_of_an_answer_come_from_both_files() {
    let engine = start(&families().join("llama"), None).unwrap();
    // generation_config.json names two, tokenizer_config.json one of them.
    let mut eos = engine.tokenizer().eos_ids().to_vec();
    eos.sort_unstable();
    assert_eq!(eos, [0, 2]);
    let end = engine.tokenizer().encode("<|im_end|>", Specials::Parse).unwrap();
    assert_eq!(end, [2]);
}

#[test]
fn a_named_token_that_the_vocabulary_lacks_is_refused() {
    let (dir, llama) = (tempfile::tempdir().unwrap(), families().join("llama"));
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(llama.join(name), dir.path().join(name)).unwrap();
    }
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "<end>"}"#).unwrap();
    let Err(error) = start(dir.path(), None) else { panic!("an unknown end was accepted") };
    assert_eq!(error.to_string(), "eos token `<end>` is not in the vocabulary");
}

#[test]
fn a_length_beyond_the_model_is_refused_by_name() {
    let Err(error) = start(&families().join("llama"), Some(1 << 20)) else {
        panic!("a context of a million tokens was accepted");
    };
    assert!(error.to_string().contains("`context length`: expected 1 to"), "{error}");
}

#[test]
fn a_folder_without_a_tokenizer_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(families().join("llama").join(name), dir.path().join(name)).unwrap();
    }
    for (file, found) in [(None, "no tokenizer"), (Some("tokenizer.model"), "tokenizer.model only")]
    {
        if let Some(file) = file {
            std::fs::write(dir.path().join(file), "not read").unwrap();
        }
        let Err(error) = start(dir.path(), None) else { panic!("accepted without a tokenizer") };
        let text = error.to_string();
        assert!(text.contains(found) && text.contains("save_pretrained"), "{text}");
    }
}

#[test]
fn weights_are_rounded_on_the_way_when_asked_and_never_twice() {
    let options = |grid| LoadOptions { quant: Some(grid), ..LoadOptions::default() };
    let quant = |path: &Path, grid| {
        load_generator(Reference, path, options(grid), &mut |_| {}).map(|loaded| loaded.quant)
    };
    let (folder, gguf) = (families().join("llama"), families().join("llama/model.gguf"));
    for path in [&folder, &gguf] {
        assert_eq!(quant(path, IntGrid::Int8).unwrap(), "Q8_0");
    }
    // Both sources hold the same weights, so they are rounded alike.
    let rounded = |path: &Path| {
        let loaded = load_generator(Reference, path, options(IntGrid::Int4), &mut |_| {}).unwrap();
        let options =
            EngineOptions { kv_pages: Some(4), max_context: Some(64), ..EngineOptions::default() };
        answer(&Engine::start(loaded, options).unwrap())
    };
    assert_eq!(rounded(&folder), rounded(&gguf));
    let packed = families().join("../quantised/gptq");
    let error = quant(&packed, IntGrid::Int8).unwrap_err().to_string();
    assert!(error.contains("expected 16-bit or 32-bit weights to quantise"), "{error}");
}

#[test]
fn a_split_model_answers_as_its_whole_file_and_its_identity_covers_every_part() {
    let split = |dir: &Path| dir.join("tiny-00001-of-00003.gguf");
    let whole = families().join("llama-llama3/model.gguf");
    let golden = families().join("../split");
    let context = Some(64);
    let expected = answer(&start(&whole, context).unwrap());
    assert_eq!(answer(&start(&split(&golden), context).unwrap()), expected);
    let sha256 = |path: &Path| {
        let (mut hashed, options) = (0, LoadOptions::default());
        let mut progress = |bytes, total_bytes| {
            assert!(bytes <= total_bytes);
            hashed = bytes;
        };
        let loaded = load_generator(Reference, path, options, &mut |_| {}).unwrap();
        let sha256 = loaded.model_sha256.wait_told(&mut progress).unwrap().to_owned();
        (sha256, hashed)
    };
    let names = [1, 2, 3].map(|number| format!("tiny-0000{number}-of-00003.gguf"));
    let parts = names.each_ref().map(|name| std::fs::read(golden.join(name)).unwrap());
    let all = parts.concat();
    assert_eq!(sha256(&split(&golden)), (sha256_hex(&all), all.len() as u64));
    // A weight of the last part is another one: another model.
    let changed = tempfile::tempdir().unwrap();
    for (name, part) in names.iter().zip(&parts) {
        std::fs::write(changed.path().join(name), part).unwrap();
    }
    let mut last = parts[2].clone();
    *last.last_mut().unwrap() ^= 1;
    std::fs::write(changed.path().join(&names[2]), &last).unwrap();
    assert_ne!(sha256(&split(changed.path())).0, sha256_hex(&all));
    // The mutation: an identity of the file that was opened says the same of both.
    let opened = |dir: &Path| sha256_hex(&std::fs::read(split(dir)).unwrap());
    assert_eq!(opened(changed.path()), opened(&golden));
}

/// A folder whose hash takes a minute: a file that nothing reads but the hash, sparse so that it takes no
/// room.
fn slow_to_hash() -> tempfile::TempDir {
    let (dir, llama) = (tempfile::tempdir().unwrap(), families().join("llama"));
    for entry in std::fs::read_dir(llama).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    std::fs::File::create(dir.path().join("a.json")).unwrap().set_len(64 << 30).unwrap();
    dir
}

#[test]
fn an_engine_answers_before_the_hash_of_its_model_is_done() {
    let dir = slow_to_hash();
    let engine = start(dir.path(), Some(64)).unwrap();
    let expected = answer(&start(&families().join("llama"), Some(64)).unwrap());
    assert_eq!(answer(&engine), expected);
    let pending = engine.facts().model_sha256.state();
    assert!(
        matches!(pending, FingerprintState::Pending { total_bytes, .. } if total_bytes > 64 << 30)
    );
    assert_eq!(engine.facts().model_sha256.get(), None);
    // The mutation: one that waits for the hash, as loading once did, still waits.
    let waits = engine.facts().model_sha256.ended().recv_timeout(Duration::from_millis(100));
    assert_eq!(waits, Err(flume::RecvTimeoutError::Timeout));
}

#[test]
fn the_hash_of_an_engine_that_is_gone_ends() {
    let dir = slow_to_hash();
    let engine = start(dir.path(), Some(64)).unwrap();
    let ended = engine.facts().model_sha256.ended().clone();
    engine.shutdown();
    drop(engine);
    let disconnected = ended.recv_timeout(Duration::from_secs(20));
    assert_eq!(disconnected, Err(flume::RecvTimeoutError::Disconnected));
}
