//! Sessions that are saved and restored: warm as if they had never left, or refused by name.

use std::path::Path;

use exrail_checkpoint::{Checkpoint, Gguf};
use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Identity, LoadOptions, SavedSession, Saving, SessionError,
    SessionName, SessionOwner, SessionState, SessionStore, prepare_generator,
};
use exrail_kernels::KvDtype;
use exrail_kernels::reference::Reference;
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_testkit::{TinyLlama, tiny_llama};
use sha2::{Digest, Sha256};

use crate::faulty::Faulty;
use crate::support::{assert_all_pages_return, generate, load, options, plain, prompt, start};

const CAP: u64 = 1 << 30;

fn owner(tenant: Option<&str>) -> SessionOwner {
    let folder = tenant.unwrap_or("default").to_owned();
    SessionOwner { tenant: tenant.map(str::to_owned), folder }
}

fn name() -> SessionName {
    SessionName::new("talk").unwrap()
}

/// A conversation to save, in a life of this name.
fn saving(tokens: Vec<u32>, lineage: &str) -> Saving {
    let state = SessionState { system_rev: "none".to_owned(), policy: Vec::new() };
    Saving { tokens, state, lineage: lineage.to_owned() }
}

/// Saves the beginning of the conversation of `saved`.
fn save(
    store: &mut SessionStore,
    engine: &EngineHandle,
    tenant: Option<&str>,
    n_tokens: u32,
) -> Result<SavedSession, SessionError> {
    store.save(engine, &owner(tenant), &name(), saving(prompt(1, n_tokens), "first"))
}

/// An engine whose fresh pages hold no numbers, so that whoever reads one that was not filled says so (C14).
fn poisoned(options: EngineOptions) -> EngineHandle {
    let backend = Faulty { poisons_pages: true, ..Faulty::new(Reference) };
    Engine::start(load(backend), options).unwrap()
}

/// A conversation of 600 tokens and its answer, saved; the answer's tokens.
fn saved(place: &Path, tenant: Option<&str>) -> Vec<u32> {
    let engine = poisoned(options());
    let mut store = SessionStore::open(place, CAP).unwrap();
    let mut request = plain(prompt(1, 600), 20);
    request.tenant = tenant.map(str::to_owned);
    let answer = generate(&engine, request).ids();
    let size = save(&mut store, &engine, tenant, 600).unwrap();
    assert_eq!(size.tokens, 512);
    let file = place.join(owner(tenant).folder).join("talk.session");
    assert_eq!(size.bytes, std::fs::metadata(file).unwrap().len());
    answer
}

fn restore(
    engine: &EngineHandle,
    place: &Path,
    tenant: Option<&str>,
) -> Result<usize, SessionError> {
    let store = SessionStore::open(place, CAP).unwrap();
    Ok(store.restore(engine, &owner(tenant), &name())?.tokens)
}

/// Tokens that came from the cache, and the answer.
fn ask(engine: &EngineHandle, tenant: Option<&str>) -> (usize, Vec<u32>) {
    let mut request = plain(prompt(1, 600), 20);
    request.tenant = tenant.map(str::to_owned);
    let answer = generate(engine, request);
    (answer.finished().usage.cached_tokens, answer.ids())
}

/// C15 of the field faults: what is restored is what the next request finds.
#[test]
fn a_restored_session_is_not_computed_again() {
    let place = tempfile::tempdir().unwrap();
    let answer = saved(place.path(), None);
    let engine = poisoned(options());
    assert_eq!(restore(&engine, place.path(), None).unwrap(), 512);
    assert_eq!(engine.counters().pages_cached, 2);
    assert_eq!(ask(&engine, None), (512, answer));
    assert_eq!(engine.counters().tokens_prompt, 88);
    assert_eq!(restore(&engine, place.path(), None).unwrap(), 512, "what is known stays");
    assert_all_pages_return(&engine);
}

/// C15 on the CPU's kernels, whose pages have another order, for each type of the cache.
#[test]
fn the_cpu_reads_its_own_pages_back() {
    for kv_dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Int8] {
        let place = tempfile::tempdir().unwrap();
        let engine = || {
            let options = CpuOptions { threads: Some(2), ..CpuOptions::default() };
            let with = EngineOptions { kv_dtype, ..crate::support::options() };
            Engine::start(load(CpuBackend::new(options).unwrap()), with).unwrap()
        };
        let first = engine();
        let (_, answer) = ask(&first, None);
        let mut store = SessionStore::open(place.path(), CAP).unwrap();
        save(&mut store, &first, None, 600).unwrap();
        let second = engine();
        store.restore(&second, &owner(None), &name()).unwrap();
        assert_eq!(ask(&second, None), (512, answer), "{kv_dtype:?}");
        let other = match kv_dtype {
            KvDtype::F32 | KvDtype::Int8 => KvDtype::F16,
            KvDtype::F16 => KvDtype::Int8,
        };
        let options = CpuOptions { threads: Some(2), ..CpuOptions::default() };
        let with = EngineOptions { kv_dtype: other, ..crate::support::options() };
        let third = Engine::start(load(CpuBackend::new(options).unwrap()), with).unwrap();
        let error = store.restore(&third, &owner(None), &name()).unwrap_err();
        assert!(matches!(&error, SessionError::Pin { pin, .. } if pin == "kv_dtype"), "{error}");
        assert_eq!(ask(&third, None).0, 0);
    }
}

#[test]
fn a_tenant_finds_its_own_sessions_only() {
    let place = tempfile::tempdir().unwrap();
    let answer = saved(place.path(), Some("a"));
    let engine = poisoned(options());
    let error = restore(&engine, place.path(), Some("b")).unwrap_err();
    assert!(matches!(error, SessionError::NotFound { .. }), "{error}");
    // A file that was moved into somebody else's folder is refused, too.
    std::fs::create_dir(place.path().join("b")).unwrap();
    let file = |owner: &str| place.path().join(owner).join("talk.session");
    std::fs::copy(file("a"), file("b")).unwrap();
    let error = restore(&engine, place.path(), Some("b")).unwrap_err();
    assert!(matches!(error, SessionError::Owner { .. }), "{error}");
    assert_eq!(ask(&engine, Some("b")).0, 0);
    restore(&engine, place.path(), Some("a")).unwrap();
    assert_eq!(ask(&engine, None).0, 0, "and nobody finds its pages");
    assert_eq!(ask(&engine, Some("a")), (512, answer));
}

/// A model whose weights differ and nothing else.
fn other_model() -> EngineHandle {
    let gguf = Gguf::parse(tiny_llama(8, TinyLlama::default())).unwrap();
    let who = Identity { name: "tiny".to_owned(), sha256: "1".repeat(64) };
    let checkpoint = Checkpoint::Gguf(gguf);
    let load = LoadOptions::default();
    let loaded =
        prepare_generator(Faulty::new(Reference), &checkpoint, who, load, &mut |_| {}).unwrap();
    Engine::start(loaded, options()).unwrap()
}

#[test]
fn another_model_is_refused_and_computes_itself() {
    let place = tempfile::tempdir().unwrap();
    saved(place.path(), None);
    let engine = other_model();
    let cold = ask(&other_model(), None);
    let error = restore(&engine, place.path(), None).unwrap_err();
    assert!(matches!(&error, SessionError::Pin { pin, .. } if pin == "model_sha256"), "{error}");
    assert!(error.to_string().contains(&"1".repeat(64)), "{error}");
    assert_eq!(engine.counters().pages_cached, 0);
    assert_eq!(ask(&engine, None), cold);
}

/// The mutation: with a file that lies about its pin, as every file would without the comparison, the
/// answer is made of another model's keys and values.
#[test]
fn mutation_without_the_pin_another_models_pages_are_answered_from() {
    let place = tempfile::tempdir().unwrap();
    saved(place.path(), None);
    let path = place.path().join("default/talk.session");
    let mut bytes = std::fs::read(&path).unwrap();
    let pin = bytes.windows(64).position(|window| window == "0".repeat(64).as_bytes()).unwrap();
    bytes[pin..pin + 64].fill(b'1');
    let end = bytes.len() - 32;
    let digest = Sha256::digest(&bytes[..end]);
    bytes[end..].copy_from_slice(&digest);
    std::fs::write(&path, bytes).unwrap();
    let (cold, engine) = (ask(&other_model(), None), other_model());
    assert_eq!(restore(&engine, place.path(), None).unwrap(), 512);
    let (cached, answer) = ask(&engine, None);
    assert_eq!(cached, 512);
    assert_ne!(answer, cold.1, "the fault reaches the user");
}

#[test]
fn a_damaged_file_is_refused_and_the_prompt_is_computed() {
    let place = tempfile::tempdir().unwrap();
    let answer = saved(place.path(), None);
    let path = place.path().join("default/talk.session");
    let whole = std::fs::read(&path).unwrap();
    let engine = poisoned(options());
    for (at, bit) in [(0, 1), (20, 1), (whole.len() / 2, 8), (whole.len() - 1, 128)] {
        let mut bytes = whole.clone();
        bytes[at] ^= bit;
        std::fs::write(&path, bytes).unwrap();
        restore(&engine, place.path(), None).unwrap_err();
        assert_eq!(engine.counters().pages_cached, 0, "byte {at}");
    }
    std::fs::write(&path, &whole[..whole.len() - 7]).unwrap();
    let error = restore(&engine, place.path(), None).unwrap_err();
    assert!(matches!(error, SessionError::Length { .. }), "{error}");
    assert_eq!(ask(&engine, None), (0, answer));
}

#[test]
fn what_cannot_be_saved_or_restored_says_why() {
    let place = tempfile::tempdir().unwrap();
    let mut store = SessionStore::open(place.path(), CAP).unwrap();
    let engine = start(options());
    let error = save(&mut store, &engine, None, 600).unwrap_err();
    assert!(matches!(error, SessionError::NothingCached { tokens: 600, .. }), "{error}");
    assert_eq!(store.list(&owner(None)).unwrap(), []);
    drop(store);
    saved(place.path(), None);

    let without = start(EngineOptions { prefix_cache: false, ..options() });
    let error = restore(&without, place.path(), None).unwrap_err();
    assert!(matches!(error, SessionError::NoPrefixCache), "{error}");

    // One page, and a session of two.
    let small = start(EngineOptions { kv_pages: Some(1), ..options() });
    let error = restore(&small, place.path(), None).unwrap_err();
    assert!(matches!(error, SessionError::NoRoom { needed: 2, found: 1 }), "{error}");
    assert_all_pages_return(&small);

    engine.shutdown();
    let error = restore(&engine, place.path(), None).unwrap_err();
    assert!(matches!(error, SessionError::Stopped), "{error}");
}

/// G-22: a save is the next revision of its name, through restarts, and a name that was deleted begins anew as
/// another one.
#[test]
fn every_save_is_a_state_of_its_own() {
    let place = tempfile::tempdir().unwrap();
    saved(place.path(), None);
    let engine = poisoned(options());
    ask(&engine, None);
    let mut store = SessionStore::open(place.path(), CAP).unwrap();
    let first = store.remembered(&owner(None), &name()).unwrap();
    assert_eq!((first.memory.rev, first.tokens), (1, prompt(1, 600)[..512].to_vec()));
    let second = save(&mut store, &engine, None, 600).unwrap();
    assert_eq!(second.memory.rev, 2);
    assert_ne!(second.memory.hash, first.memory.hash, "of the same tokens");
    assert_eq!(store.list(&owner(None)).unwrap()[0].memory.as_ref(), Some(&second.memory));
    drop(store);
    let mut store = SessionStore::open(place.path(), CAP).unwrap();
    assert_eq!(store.restore(&engine, &owner(None), &name()).unwrap(), second);
    store.remove(&owner(None), &name()).unwrap();
    let error = store.remembered(&owner(None), &name()).unwrap_err();
    assert!(matches!(error, SessionError::NotFound { .. }), "{error}");
    let again = saving(prompt(1, 600), "second");
    let again = store.save(&engine, &owner(None), &name(), again).unwrap().memory;
    assert_eq!(again.rev, 1);
    assert_ne!(again.hash, first.memory.hash, "of the same tokens and revision");
}

/// What is not known cannot be the revision before: it is not replaced unseen.
#[test]
fn a_session_whose_revision_is_not_known_is_not_replaced() {
    let place = tempfile::tempdir().unwrap();
    saved(place.path(), None);
    let path = place.path().join("default/talk.session");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let engine = poisoned(options());
    ask(&engine, None);
    let mut store = SessionStore::open(place.path(), CAP).unwrap();
    let error = save(&mut store, &engine, None, 600).unwrap_err();
    assert!(matches!(error, SessionError::Version { found: 1, .. }), "{error}");
    assert_eq!(store.list(&owner(None)).unwrap()[0].memory, None);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    store.remove(&owner(None), &name()).unwrap();
    assert_eq!(save(&mut store, &engine, None, 600).unwrap().memory.rev, 1);
}

/// What is cached is not read from the disk again, and what is not comes from there.
#[test]
fn a_session_that_is_cached_is_not_read_again() {
    let place = tempfile::tempdir().unwrap();
    let answer = saved(place.path(), None);
    let engine = poisoned(options());
    let path = place.path().join("default/talk.session");
    let mut bytes = std::fs::read(&path).unwrap();
    let last_page = bytes.len() - 100;
    let store = SessionStore::open(place.path(), CAP).unwrap();
    assert_eq!(store.warm(&engine, &owner(None), &name()).unwrap().tokens, 512);
    bytes[last_page] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(store.warm(&engine, &owner(None), &name()).unwrap().tokens, 512);
    assert_eq!(ask(&engine, None), (512, answer));
    let cold = poisoned(options());
    let error = store.warm(&cold, &owner(None), &name()).unwrap_err();
    assert!(matches!(error, SessionError::Page { page: 1 }), "{error}");
    let error = store.warm(&other_model(), &owner(None), &name()).unwrap_err();
    assert!(matches!(&error, SessionError::Pin { pin, .. } if pin == "model_sha256"), "{error}");
}

/// Answers go on while pages leave and come, and a session that needs the room of kept pages gets it.
#[test]
fn a_session_moves_beside_running_answers_and_takes_the_room_of_kept_pages() {
    let place = tempfile::tempdir().unwrap();
    let answer = saved(place.path(), None);
    let engine = poisoned(EngineOptions { kv_pages: Some(6), ..options() });
    for n in 2..5 {
        generate(&engine, plain(prompt(n, 300), 4));
    }
    let beside = engine.submit(plain(prompt(9, 300), 150)).unwrap();
    assert_eq!(restore(&engine, place.path(), None).unwrap(), 512);
    let expected = generate(&poisoned(options()), plain(prompt(9, 300), 150)).ids();
    assert_eq!(crate::support::collect(&beside).ids(), expected);
    assert_eq!(ask(&engine, None), (512, answer));
    assert_all_pages_return(&engine);
}

/// A conversation that had to make room is saved out of the host's memory.
#[test]
fn a_session_of_pages_that_left_the_device_is_whole() {
    let place = tempfile::tempdir().unwrap();
    let engine = poisoned(EngineOptions { kv_pages: Some(3), kv_host_bytes: 8 << 20, ..options() });
    let (_, answer) = ask(&engine, None);
    generate(&engine, plain(prompt(2, 600), 4));
    assert_eq!(engine.counters().host.pages, 2);
    let mut store = SessionStore::open(place.path(), CAP).unwrap();
    let size = save(&mut store, &engine, None, 600).unwrap();
    assert_eq!(size.tokens, 512);
    let whole = save(&mut store, &engine, None, 512).unwrap();
    assert_eq!(whole.tokens, 512, "the end of a page is the end of the conversation");
    let later = poisoned(options());
    store.restore(&later, &owner(None), &name()).unwrap();
    assert_eq!(ask(&later, None), (512, answer));
    assert_all_pages_return(&engine);
}
