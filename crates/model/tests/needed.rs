//! What a plan counts is what loading asks of a device, for every family and every way of packing.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use exrail_checkpoint::Checkpoint;
use exrail_kernels::{Backend, Footprint, KvDtype, Ledger};
use exrail_kernels_cpu::{CpuFootprint, CpuOptions};
use exrail_model::{Decoder, Needed, RunSizes, kv_shape};

/// Every folder and every GGUF file of tiny models.
fn checkpoints() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden");
    let mut paths = Vec::new();
    for group in ["families", "quantised"] {
        for entry in std::fs::read_dir(golden.join(group)).unwrap() {
            let dir = entry.unwrap().path();
            if !dir.join("config.json").exists() {
                continue;
            }
            let gguf = dir.join("model.gguf");
            paths.extend([Some(dir), gguf.exists().then_some(gguf)].into_iter().flatten());
        }
    }
    paths
}

fn footprint() -> Arc<dyn Footprint> {
    Arc::new(CpuFootprint::new(CpuOptions::default()))
}

#[test]
fn headers_take_what_the_whole_model_takes() {
    let paths = checkpoints();
    assert!(paths.len() >= 36 + 4, "{}", paths.len());
    for path in paths {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let config = checkpoint.config().unwrap();
        let kv = kv_shape(&config, 3, KvDtype::F16);
        let sizes = RunSizes { kv, max_rows: 40, max_logit_rows: 7 };
        let counted = Needed::count(footprint(), &config, checkpoint.tensors(), sizes).unwrap();

        let ledger = Ledger::new(footprint());
        let decoder = Decoder::load(&ledger, &config, checkpoint.tensors(), &mut |_| {}).unwrap();
        let loaded = ledger.take();
        decoder.scratch(&ledger, 40, 7).unwrap();
        let scratch_bytes = ledger.take().buffer_bytes;
        ledger.kv_pool(decoder.kv_shape(3, KvDtype::F16)).unwrap();
        let expected = Needed {
            weights: loaded.weights,
            vector_bytes: loaded.buffer_bytes,
            scratch_bytes,
            kv_bytes: ledger.take().kv_bytes,
        };
        assert_eq!(counted, expected, "{}", path.display());
        let parts = [counted.vector_bytes, counted.scratch_bytes, counted.kv_bytes];
        assert!(!counted.weights.is_empty() && !parts.contains(&0), "{}", path.display());
    }
}

#[test]
fn a_tensor_that_is_missing_is_named_by_a_plan_as_by_a_load() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/families/llama");
    let checkpoint = Checkpoint::open(&golden).unwrap();
    let mut config = checkpoint.config().unwrap();
    config.ffn_width *= 2;
    let kv = kv_shape(&config, 1, KvDtype::F16);
    let sizes = RunSizes { kv, max_rows: 1, max_logit_rows: 1 };
    let planned = Needed::count(footprint(), &config, checkpoint.tensors(), sizes).unwrap_err();
    let tensors = checkpoint.tensors();
    let loaded = Decoder::load(&Ledger::new(footprint()), &config, tensors, &mut |_| {});
    assert_eq!(planned.to_string(), loaded.err().unwrap().to_string());
}
