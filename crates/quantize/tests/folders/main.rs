//! Whole folders: the tiny models of golden/families quantised, loaded and run.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

mod refusals;
mod resume;
mod run;

use std::path::{Path, PathBuf};

use exrail_checkpoint::{HfFolder, Tensors};
use exrail_kernels::{Activation, AttentionSpan, Backend, KvDtype, PageId, TokenId};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_model::{Batch, Decoder};
use exrail_quantize::{
    Calibration, Manifest, QuantizeError, QuantizeOptions, QuantizeProgress, quantize,
};
use exrail_tensor::IntGrid;

fn family(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/families").join(name)
}

fn cpu() -> CpuBackend {
    let options =
        CpuOptions { threads: Some(1), activation: Activation::F32, ..CpuOptions::default() };
    CpuBackend::new(options).unwrap()
}

/// Ids of the vocabulary of 320, the same every time.
fn ids(n: usize, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((state >> 33) % 320).unwrap()
    };
    (0..n).map(|_| next()).collect()
}

fn calibration() -> Calibration {
    Calibration { text_sha256: "00".repeat(32), ids: ids(2100, 1) }
}

fn options(grid: IntGrid, calibration: Option<Calibration>) -> QuantizeOptions {
    QuantizeOptions::new(grid, 32, calibration).unwrap()
}

fn quantised(source: &Path, destination: &Path, options: &QuantizeOptions) -> Manifest {
    quantize(&cpu(), source, destination, options, &mut |_| {}).unwrap()
}

/// Logits `(T, V)` of `ids` under the model of a folder.
fn logits(dir: &Path, ids: &[u32]) -> Vec<f32> {
    let (backend, folder) = (cpu(), HfFolder::open(dir).unwrap());
    let tensors: &dyn Tensors = &folder;
    let decoder = Decoder::load(&backend, folder.config(), tensors, &mut |_| {}).unwrap();
    let mut scratch = decoder.scratch(&backend, ids.len(), ids.len()).unwrap();
    let mut pool = backend.kv_pool(decoder.kv_shape(1, KvDtype::F32)).unwrap();
    let ids: Vec<TokenId> = ids.iter().map(|&id| TokenId(id)).collect();
    let pages = [PageId(0)];
    let spans =
        [AttentionSpan { first_row: 0, n_rows: ids.len(), first_position: 0, pages: &pages }];
    let rows: Vec<u32> = (0..u32::try_from(ids.len()).unwrap()).collect();
    let batch = Batch { ids: &ids, spans: &spans, logit_rows: &rows };
    decoder.forward(&backend, &mut scratch, &mut pool, &batch);
    let mut out = Vec::new();
    scratch.read_logits(&backend, &mut out);
    out
}

/// Mean divergence of the rows of `other` from those of `reference`.
fn mean_kld(reference: &[f32], other: &[f32]) -> f64 {
    let rows = reference.chunks_exact(320).zip(other.chunks_exact(320));
    let klds: Vec<f64> =
        rows.map(|(p, q)| exrail_metrics::kld_from_logits(p, q).unwrap()).collect();
    klds.iter().sum::<f64>() / klds.len() as f64
}
