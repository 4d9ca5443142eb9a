//! The decoder on tiny seeded models and the scalar reference: against a textbook forward pass,
//! prefill against decode, batch against alone, and what a load refuses.
//!
//! The reference computes every row by itself and sums in f64 in the order of positions, so how rows
//! are split into steps, or where pages lie, must not change a single bit there.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use exrail_checkpoint::{DecoderConfig, Gguf, LoadError, TensorInfo, TensorView, Tensors};
use exrail_kernels::reference::{Reference, ReferenceKvPool};
use exrail_kernels::{AttentionSpan, Backend, KvDtype, PAGE_TOKENS, PageId, TokenId};
use exrail_model::{Batch, Decoder, LoadProgress, ModelError, Scratch};
use exrail_tensor::DType;
use exrail_testkit::{Random, TinyLlama, tiny_llama};
use proptest::prelude::*;

const MAX_ROWS: usize = 1024;
const N_PAGES: usize = 24;

struct Loaded {
    decoder: Decoder<Reference>,
    scratch: Scratch<Reference>,
    pool: ReferenceKvPool,
}

impl Loaded {
    fn new(spec: TinyLlama, kv: KvDtype) -> Self {
        let gguf = Gguf::parse(tiny_llama(11, spec)).unwrap();
        let config = DecoderConfig::from_gguf(&gguf).unwrap();
        let decoder = Decoder::load(&Reference, &config, &gguf, &mut |_| {}).unwrap();
        let scratch = decoder.scratch(&Reference, MAX_ROWS, MAX_ROWS).unwrap();
        let pool = Reference.kv_pool(decoder.kv_shape(N_PAGES, kv)).unwrap();
        Self { decoder, scratch, pool }
    }

    /// Logits of `rows` of a batch, one vector each.
    fn step(
        &mut self,
        ids: &[TokenId],
        spans: &[AttentionSpan<'_>],
        logit_rows: &[u32],
    ) -> Vec<Vec<f32>> {
        let batch = Batch { ids, spans, logit_rows };
        self.decoder.forward(&Reference, &mut self.scratch, &mut self.pool, &batch);
        let mut logits = Vec::new();
        self.scratch.read_logits(&Reference, &mut logits);
        let vocab_size = self.decoder.config().vocab_size;
        let rows: Vec<Vec<f32>> = logits.chunks_exact(vocab_size).map(<[f32]>::to_vec).collect();
        assert_eq!(rows.len(), logit_rows.len());
        rows
    }

    /// Logits of every position of a sequence that has the pool to itself, in one step.
    fn alone(&mut self, ids: &[TokenId]) -> Vec<Vec<f32>> {
        let pages: Vec<PageId> = (0..ids.len().div_ceil(PAGE_TOKENS) as u32).map(PageId).collect();
        let span =
            AttentionSpan { first_row: 0, n_rows: ids.len(), first_position: 0, pages: &pages };
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        self.step(ids, &[span], &rows)
    }
}

fn random_ids(random: &mut Random, len: usize, vocab_size: usize) -> Vec<TokenId> {
    (0..len).map(|_| TokenId(random.below(vocab_size) as u32)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// Each inner vector is one sequence as its chunks; step i feeds chunk i of every sequence that
    /// has one. Every row's logits equal those of its sequence alone in one step.
    #[test]
    fn any_split_batch_and_page_table_gives_the_logits_of_a_prefill_alone(
        chunks in prop::collection::vec(
            prop::collection::vec(prop_oneof![Just(1usize), 1usize..120], 1..6), 1..4),
        pages in Just((0..N_PAGES as u32).map(PageId).collect::<Vec<_>>()).prop_shuffle(),
        half in any::<bool>(),
        stride in 1usize..4,
    ) {
        let kv = if half { KvDtype::F16 } else { KvDtype::F32 };
        let mut model = Loaded::new(TinyLlama::default(), kv);
        let vocab_size = model.decoder.config().vocab_size;
        let mut random = Random::new(5);
        let sequences: Vec<Vec<TokenId>> = chunks
            .iter()
            .map(|chunks| random_ids(&mut random, chunks.iter().sum(), vocab_size))
            .collect();
        let expected: Vec<_> = sequences.iter().map(|ids| model.alone(ids)).collect();
        let tables: Vec<&[PageId]> = pages.chunks_exact(N_PAGES / 3).collect();

        let mut n_done = vec![0; sequences.len()];
        for step in 0..chunks.iter().map(Vec::len).max().unwrap_or(0) {
            let (mut ids, mut spans, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
            for (s, chunks) in chunks.iter().enumerate() {
                let Some(&n_rows) = chunks.get(step) else { continue };
                let (first_row, first_position) = (ids.len(), n_done[s]);
                spans.push(AttentionSpan { first_row, n_rows, first_position, pages: tables[s] });
                ids.extend_from_slice(&sequences[s][first_position..first_position + n_rows]);
                wanted.extend((0..n_rows).map(|i| (first_row + i, s, first_position + i)));
                n_done[s] += n_rows;
            }
            wanted.retain(|(row, ..)| row % stride == 0);
            let rows: Vec<u32> = wanted.iter().map(|&(row, ..)| row as u32).collect();
            let found = model.step(&ids, &spans, &rows);
            for (found, &(_, s, position)) in found.iter().zip(&wanted) {
                prop_assert!(found == &expected[s][position], "sequence {s}, position {position}");
            }
        }
    }
}

#[test]
fn logits_agree_with_a_textbook_forward_pass() {
    let mut random = Random::new(3);
    for (dtype, tied) in [(DType::F32, true), (DType::Q4_1, false), (DType::Q6_K, true)] {
        let spec = TinyLlama { tied, n_layers: 3, ..TinyLlama::with_dtype(dtype) };
        let mut model = Loaded::new(spec, KvDtype::F32);
        let ids = random_ids(&mut random, 23, model.decoder.config().vocab_size);
        let gguf = Gguf::parse(tiny_llama(11, spec)).unwrap();
        let config = DecoderConfig::from_gguf(&gguf).unwrap();
        let expected = textbook::logits(&gguf, &config, &ids);
        for (position, (found, expected)) in model.alone(&ids).iter().zip(&expected).enumerate() {
            for (found, expected) in found.iter().zip(expected) {
                // Activations are rounded to f32 some ten times a layer: 3 layers, 2^-24 of values
                // around 10 each time.
                let distance = (f64::from(*found) - expected).abs();
                assert!(distance < 2e-5, "{dtype} position {position}: {found} {expected}");
            }
        }
    }
}

#[test]
fn one_logit_row_reads_the_same_as_all() {
    let mut model = Loaded::new(TinyLlama::default(), KvDtype::F16);
    let ids = random_ids(&mut Random::new(1), 9, model.decoder.config().vocab_size);
    let all = model.alone(&ids);
    for (i, expected) in all.iter().enumerate() {
        let mut row = vec![0.0; expected.len()];
        model.scratch.logits(&Reference, i, &mut row);
        assert_eq!(&row, expected);
    }
}

#[test]
#[should_panic(expected = "1025 rows of 1024")]
fn more_rows_than_the_scratch_holds_are_the_callers_error() {
    let mut model = Loaded::new(TinyLlama::default(), KvDtype::F16);
    model.alone(&[TokenId(0); MAX_ROWS + 1]);
}

#[test]
fn progress_ends_at_the_total() {
    for tied in [true, false] {
        let gguf = Gguf::parse(tiny_llama(1, TinyLlama { tied, ..TinyLlama::default() })).unwrap();
        let config = DecoderConfig::from_gguf(&gguf).unwrap();
        let mut reports: Vec<LoadProgress> = Vec::new();
        Decoder::load(&Reference, &config, &gguf, &mut |p| reports.push(p)).unwrap();
        let last = reports.last().unwrap();
        assert_eq!((last.n_done, reports.len()), (last.n_total, last.n_total));
        assert_eq!(last.n_total, gguf.tensors().count());
        assert_eq!(last.bytes_done, gguf.tensors().map(|t| t.bytes.len() as u64).sum::<u64>());
    }
}

/// A checkpoint with one tensor hidden or of another shape.
struct Damaged<'a> {
    gguf: &'a Gguf,
    name: &'a str,
    shape: Option<&'a [usize]>,
}

impl Tensors for Damaged<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let info = self.gguf.info(name)?;
        if name != self.name {
            return Some(info);
        }
        self.shape.map(|shape| TensorInfo { shape, ..info })
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        Tensors::tensor(self.gguf, name)
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        self.gguf.names()
    }
}

#[test]
fn missing_and_misshapen_tensors_are_refused_by_name() {
    let gguf = Gguf::parse(tiny_llama(1, TinyLlama::default())).unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    for view in gguf.tensors() {
        for shape in [None, Some(&[3usize, 5][..])] {
            let damaged = Damaged { gguf: &gguf, name: view.name, shape };
            let Err(error) = Decoder::load(&Reference, &config, &damaged, &mut |_| {}) else {
                panic!("`{}` as {shape:?} was accepted", view.name);
            };
            let missing = matches!(error, ModelError::Checkpoint(LoadError::MissingTensor { .. }));
            let misshapen = matches!(error, ModelError::Checkpoint(LoadError::WrongShape { .. }));
            let right = if shape.is_none() { missing } else { misshapen };
            assert!(right && error.to_string().contains(view.name), "{error}");
        }
    }
}

/// A forward pass without pages, batches or fused operations, in f64, written from the papers.
mod textbook {
    use super::*;

    type Matrix = Vec<Vec<f64>>;

    fn matrix(gguf: &Gguf, name: &str) -> Matrix {
        let view = gguf.tensor(name).unwrap();
        let columns = *view.shape.last().unwrap();
        let values = view.to_f32().unwrap();
        values.chunks(columns).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
    }

    fn times(matrix: &Matrix, x: &[f64]) -> Vec<f64> {
        matrix.iter().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    fn norm(x: &[f64], weight: &Matrix, eps: f64) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(&weight[0]).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
    }

    fn rotate(heads: &mut [f64], config: &DecoderConfig, position: usize) {
        for head in heads.chunks_mut(config.head_dim) {
            for i in 0..config.ropes[0].dim / 2 {
                let exponent = -2.0 * i as f64 / config.ropes[0].dim as f64;
                let angle = position as f64 * f64::from(config.ropes[0].theta).powf(exponent);
                let (a, b) = (head[2 * i], head[2 * i + 1]);
                head[2 * i] = a * angle.cos() - b * angle.sin();
                head[2 * i + 1] = a * angle.sin() + b * angle.cos();
            }
        }
    }

    fn attend(q: &[f64], keys: &Matrix, values: &Matrix, config: &DecoderConfig) -> Vec<f64> {
        let d = config.head_dim;
        let group = config.n_heads / config.n_kv_heads;
        let mut out = Vec::new();
        for (h, q) in q.chunks(d).enumerate() {
            let at = h / group * d..(h / group + 1) * d;
            let weights: Vec<f64> = keys
                .iter()
                .map(|k| q.iter().zip(&k[at.clone()]).map(|(q, k)| q * k).sum::<f64>())
                .map(|score| (score / (d as f64).sqrt()).exp())
                .collect();
            let total: f64 = weights.iter().sum();
            out.extend(
                at.map(|c| weights.iter().zip(values).map(|(p, v)| p * v[c]).sum::<f64>() / total),
            );
        }
        out
    }

    pub(super) fn logits(gguf: &Gguf, config: &DecoderConfig, ids: &[TokenId]) -> Matrix {
        let embedding = matrix(gguf, "token_embd.weight");
        let mut x: Matrix = ids.iter().map(|id| embedding[id.0 as usize].clone()).collect();
        let eps = f64::from(config.norm.eps);
        for layer in 0..config.n_layers() {
            let weight = |name: &str| matrix(gguf, &format!("blk.{layer}.{name}.weight"));
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (position, x) in x.iter_mut().enumerate() {
                let normed = norm(x, &weight("attn_norm"), eps);
                let mut q = times(&weight("attn_q"), &normed);
                let mut k = times(&weight("attn_k"), &normed);
                rotate(&mut q, config, position);
                rotate(&mut k, config, position);
                keys.push(k);
                values.push(times(&weight("attn_v"), &normed));
                let mixed = times(&weight("attn_output"), &attend(&q, &keys, &values, config));
                x.iter_mut().zip(mixed).for_each(|(x, y)| *x += y);
                let normed = norm(x, &weight("ffn_norm"), eps);
                let gate = times(&weight("ffn_gate"), &normed);
                let up = times(&weight("ffn_up"), &normed);
                let inner: Vec<f64> =
                    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                let mixed = times(&weight("ffn_down"), &inner);
                x.iter_mut().zip(mixed).for_each(|(x, y)| *x += y);
            }
        }
        let norm_weight = matrix(gguf, "output_norm.weight");
        let head = if config.tied_head { embedding } else { matrix(gguf, "output.weight") };
        x.iter().map(|x| times(&head, &norm(x, &norm_weight, eps))).collect()
    }
}
