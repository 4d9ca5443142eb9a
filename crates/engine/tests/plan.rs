//! What does not fit is refused before anything is on the device, with the arithmetic and the smallest
//! change.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use exrail_checkpoint::Checkpoint;
use exrail_engine::{
    Admission, Change, EngineError, EngineOptions, Fit, Free, LoadOptions, Need, load_admitted,
    load_generator,
};
use exrail_kernels::{Entries, Footprint, KvDtype, Ledger};
use exrail_kernels_cpu::{CpuFootprint, CpuOptions};
use exrail_kernels_cuda::CudaFootprint;
use exrail_tensor::IntGrid;

/// A folder of a tiny model with room for two pages.
fn model() -> &'static Path {
    static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/families/llama");
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("plan");
        std::fs::create_dir_all(&dir).unwrap();
        for name in ["model.safetensors", "tokenizer.json"] {
            std::fs::copy(from.join(name), dir.join(name)).unwrap();
        }
        let config = std::fs::read_to_string(from.join("config.json")).unwrap();
        let trained = "\"max_position_embeddings\": ";
        let longer = config.replace(&format!("{trained}256"), &format!("{trained}512"));
        assert_ne!(longer, config);
        std::fs::write(dir.join("config.json"), longer).unwrap();
        dir
    });
    &DIR
}

fn footprint() -> Arc<dyn Footprint> {
    Arc::new(CpuFootprint::new(CpuOptions::default()))
}

/// Two pages make the model's context.
fn options() -> EngineOptions {
    EngineOptions { max_context: Some(512), kv_pages: Some(6), ..EngineOptions::default() }
}

fn load() -> LoadOptions {
    LoadOptions { max_context: Some(512), ..LoadOptions::default() }
}

fn admission(engine: EngineOptions, free: Option<usize>) -> Admission<'static> {
    let free = free.map(|bytes| Free { bytes, basis: "this test".to_owned() });
    Admission { device: footprint(), free, need: Need::Engine(engine) }
}

fn total(engine: EngineOptions, load: LoadOptions) -> usize {
    let checkpoint = Checkpoint::open(model()).unwrap();
    admission(engine, None).plan(&checkpoint, load).unwrap().total().most
}

#[test]
fn a_refused_load_has_asked_nothing_of_the_device() {
    let ledger = Ledger::new(footprint());
    let needed = total(options(), load());
    let refused = load_admitted(
        ledger.clone(),
        model(),
        load(),
        &admission(options(), Some(needed - 1)),
        &mut |_| {},
    );
    let Err(EngineError::DoesNotFit(reason)) = refused else { panic!("it was loaded") };
    assert_eq!(ledger.take(), Entries::default());
    assert_eq!((reason.short, reason.plan.total().most), (1, needed));
    let text = reason.to_string();
    for part in [
        "memory of cpu",
        "this test",
        "weights F16, 14 matrices",
        "KV cache f16, 6 pages",
        "fits with",
    ] {
        assert!(text.contains(part), "expected `{part}` in {text}");
    }
    // The mutation: without the check the load goes on to the device.
    load_generator(ledger.clone(), model(), load(), &mut |_| {}).unwrap();
    assert!(!ledger.take().weights.is_empty());
    // What fits to the byte is loaded, and so is what nobody can judge.
    for free in [Some(needed), None] {
        let admission = admission(options(), free);
        load_admitted(ledger.clone(), model(), load(), &admission, &mut |_| {}).unwrap();
        assert!(!ledger.take().weights.is_empty());
    }
}

/// The change for one byte less than `wanted` takes.
fn change(wanted: EngineOptions, short_by: usize) -> Option<Change> {
    let checkpoint = Checkpoint::open(model()).unwrap();
    let free = total(wanted, load()) - short_by;
    let admission = admission(wanted, Some(free));
    let change = admission.smallest_change(&checkpoint, load()).unwrap()?;
    // It is true: with the change it fits, and takes what was said.
    let max_context = change.max_context.or(wanted.max_context);
    let engine = EngineOptions {
        kv_dtype: change.kv_dtype.unwrap_or(wanted.kv_dtype),
        kv_pages: change.kv_pages.or(wanted.kv_pages),
        max_context,
        ..wanted
    };
    let load = LoadOptions { max_context, quant: change.quant, ..LoadOptions::default() };
    assert_eq!(total(engine, load), change.total);
    assert!(change.total <= free, "{change:?}");
    Some(change)
}

/// Bytes of a page.
fn page_of(engine: EngineOptions) -> usize {
    let of = |pages| total(EngineOptions { kv_pages: Some(pages), ..engine }, load());
    of(6) - of(5)
}

#[test]
fn the_smallest_change_comes_first_and_is_true() {
    let page =
        total(options(), load()) - total(EngineOptions { kv_pages: Some(5), ..options() }, load());
    // Pages that no context needs go first, one for each that lacks.
    assert_eq!(change(options(), 1).unwrap().kv_pages, Some(5));
    assert_eq!(change(options(), page).unwrap().kv_pages, Some(5));
    assert_eq!(change(options(), page + 1).unwrap().kv_pages, Some(4));
    // With none to spare, the cache is rounded before the context is cut.
    let tight = EngineOptions { kv_pages: Some(2), ..options() };
    let int8 = change(tight, 1).unwrap();
    assert_eq!((int8.kv_dtype, int8.max_context), (Some(KvDtype::Int8), None));
    assert_eq!(int8.quant, None);
    let tight_int8 = EngineOptions { kv_dtype: KvDtype::Int8, ..tight };
    let shorter = change(tight_int8, 1).unwrap();
    assert_eq!((shorter.kv_dtype, shorter.max_context), (None, Some(256)));
    assert_eq!(shorter.kv_pages, Some(1), "the two that were asked for would stay");
    // A pool of the default size follows the context, and would be too large for one page, too.
    let open = EngineOptions { kv_pages: None, ..tight_int8 };
    let fixed = total(tight_int8, load()) - page_of(tight_int8);
    let shorter = change(open, total(open, load()) - fixed).unwrap();
    assert_eq!((shorter.max_context, shorter.kv_pages), (Some(256), Some(1)));
    // When a page is too much already, the weights are rounded: to int8 if that is enough.
    let one = EngineOptions { kv_pages: Some(1), max_context: Some(256), ..tight_int8 };
    let rounded = change(one, 1).unwrap();
    assert_eq!(rounded.quant, Some(IntGrid::Int8));
    // What nothing helps has no change.
    assert_eq!(change(one, total(one, load()) - 1000), None);
}

#[test]
fn a_plan_without_a_judge_refuses_nothing_and_says_so() {
    let checkpoint = Checkpoint::open(model()).unwrap();
    let admission = admission(options(), None);
    let plan = admission.admit(&checkpoint, load()).unwrap();
    assert_eq!(plan.fit(admission.free.as_ref()), Fit::NotAvailable);
    assert_eq!(admission.smallest_change(&checkpoint, load()).unwrap(), None);
}

/// The second tier is memory of the host, and so a part of what a CPU takes and not of what a GPU takes.
#[test]
fn the_second_tier_is_counted_where_its_memory_is() {
    let tiered = EngineOptions { kv_host_bytes: 1 << 20, ..options() };
    assert_eq!(total(tiered, load()), total(options(), load()) + (1 << 20));
    let checkpoint = Checkpoint::open(model()).unwrap();
    let on_a_gpu = |need: EngineOptions| {
        let device = Arc::new(CudaFootprint { is_open: false });
        let admission = Admission { device, free: None, need: Need::Engine(need) };
        admission.plan(&checkpoint, load()).unwrap()
    };
    let (plan, without) = (on_a_gpu(tiered), on_a_gpu(options()));
    assert_eq!(plan.host_tier_bytes, 1 << 20);
    assert_eq!(plan.total(), without.total());
}
