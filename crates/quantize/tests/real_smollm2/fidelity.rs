//! How far a quantised model's predictions are from its 16-bit original: teacher-forced, the same
//! tokens at the same positions.

use std::path::Path;

use exrail_checkpoint::{HfFolder, Tensors};
use exrail_kernels::{AttentionSpan, Backend, KvDtype, PAGE_TOKENS, PageId, TokenId};
use exrail_kernels_cpu::CpuBackend;
use exrail_metrics::{kld_from_logits, mean, median, quantile};
use exrail_model::{Batch, Decoder, Scratch};

/// Tokens of one sequence.
const CONTEXT: usize = 512;
/// Rows whose logits are read at once.
const ROWS: usize = 128;

struct Model {
    backend: CpuBackend,
    decoder: Decoder<CpuBackend>,
    scratch: Scratch<CpuBackend>,
    pool: <CpuBackend as Backend>::KvPool,
}

impl Model {
    fn load(backend: &CpuBackend, dir: &Path) -> Model {
        let folder = HfFolder::open(dir).unwrap();
        let tensors: &dyn Tensors = &folder;
        let decoder = Decoder::load(backend, folder.config(), tensors, &mut |_| {}).unwrap();
        let scratch = decoder.scratch(backend, ROWS, ROWS).unwrap();
        let n_pages = CONTEXT.div_ceil(PAGE_TOKENS);
        let pool = backend.kv_pool(decoder.kv_shape(n_pages, KvDtype::F32)).unwrap();
        Model { backend: backend.clone(), decoder, scratch, pool }
    }

    /// Logits of `ids` at `first_position`; what came before is in the pool.
    fn step(&mut self, ids: &[u32], first_position: usize) -> Vec<f32> {
        let ids: Vec<TokenId> = ids.iter().map(|&id| TokenId(id)).collect();
        let pages = [PageId(0), PageId(1)];
        let n_rows = ids.len();
        let spans = [AttentionSpan { first_row: 0, n_rows, first_position, pages: &pages }];
        let rows: Vec<u32> = (0..u32::try_from(n_rows).unwrap()).collect();
        let batch = Batch { ids: &ids, spans: &spans, logit_rows: &rows };
        self.decoder.forward(&self.backend, &mut self.scratch, &mut self.pool, &batch);
        let mut logits = Vec::new();
        self.scratch.read_logits(&self.backend, &mut logits);
        logits
    }
}

/// What is compared at every position.
#[derive(Default)]
pub(crate) struct Fidelity {
    klds: Vec<f64>,
    n_same_top: usize,
    /// ln p of the reference less ln p of the other, of the token that follows.
    losses: Vec<f64>,
    /// Difference of the probability of the token that follows.
    shifts: Vec<f64>,
}

impl Fidelity {
    pub(crate) fn mean(&self) -> f64 {
        mean(&self.klds).unwrap()
    }

    pub(crate) fn top(&self) -> f64 {
        self.n_same_top as f64 / self.klds.len() as f64
    }

    /// The columns of the table in docs/quantize.md.
    pub(crate) fn row(&self) -> String {
        let at = |p| quantile(&self.klds, p).unwrap();
        let max = self.klds.iter().copied().fold(0.0, f64::max);
        let loss = mean(&self.losses).unwrap();
        let n = self.losses.len() as f64;
        let variance = self.losses.iter().map(|x| (x - loss).powi(2)).sum::<f64>() / (n - 1.0);
        let rms = (self.shifts.iter().map(|x| x * x).sum::<f64>() / n).sqrt();
        format!(
            "{:.4} | {:.4} | {:.3} | {:.3} | {:.2} | {:.1} % | {:+.4} ± {:.4} | {:.1} %",
            self.mean(),
            median(&self.klds).unwrap(),
            at(0.99),
            at(0.999),
            max,
            100.0 * self.top(),
            loss,
            (variance / n).sqrt(),
            100.0 * rms
        )
    }
}

/// Compares the models of `others` with that of `reference` on all whole sequences of `ids`.
pub(crate) fn compare(
    backend: &CpuBackend,
    reference: &Path,
    others: &[&Path],
    ids: &[u32],
) -> Vec<Fidelity> {
    let mut reference = Model::load(backend, reference);
    let mut models: Vec<Model> = others.iter().map(|dir| Model::load(backend, dir)).collect();
    let mut found: Vec<Fidelity> = others.iter().map(|_| Fidelity::default()).collect();
    let vocab_size = reference.decoder.config().vocab_size;
    for sequence in ids.chunks_exact(CONTEXT) {
        for (i, ids) in sequence.chunks(ROWS).enumerate() {
            let exact = reference.step(ids, i * ROWS);
            for (model, found) in models.iter_mut().zip(&mut found) {
                let other = model.step(ids, i * ROWS);
                let rows = exact.chunks_exact(vocab_size).zip(other.chunks_exact(vocab_size));
                for (row, (p, q)) in rows.enumerate() {
                    found.add(p, q, sequence.get(i * ROWS + row + 1).copied());
                }
            }
        }
    }
    found
}

impl Fidelity {
    fn add(&mut self, p: &[f32], q: &[f32], next: Option<u32>) {
        self.klds.push(kld_from_logits(p, q).unwrap());
        self.n_same_top += usize::from(top(p) == top(q));
        if let Some(next) = next {
            let [p, q] = [p, q].map(|logits| log_probability(logits, next as usize));
            self.losses.push(p - q);
            self.shifts.push(q.exp() - p.exp());
        }
    }
}

fn top(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()
}

fn log_probability(logits: &[f32], id: usize) -> f64 {
    let greatest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits.iter().map(|&x| (f64::from(x) - greatest).exp()).sum();
    f64::from(logits[id]) - greatest - total.ln()
}
