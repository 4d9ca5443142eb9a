//! SmolLM2-135M-Instruct and gemma-3-270m on the CPU against numpy: see golden/logits/README.md for
//! the chain.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

mod golden;

use std::path::Path;

use exrail_checkpoint::{DecoderConfig, Gguf};
use exrail_kernels::{Activation, AttentionSpan, Backend, KvDtype, PAGE_TOKENS, PageId, TokenId};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_model::{Batch, Decoder};
use golden::Reader;

/// Largest distance of a stored logit or logsumexp in exact mode. Logits reach about 30 (SmolLM2) and
/// 51 (Gemma); the f32 sums of all layers move them by some 1e-4.
const MAX_DISTANCE: f64 = 0.02;

/// Largest mean divergence of the fast mode from the exact mode, in nats.
const MAX_MEAN_KLD: f64 = 2e-3;

struct Golden {
    n_positions: usize,
    vocab_size: usize,
    n_top: usize,
    n_fixed: usize,
    ids: Vec<u32>,          // (prompts, positions)
    fixed: Vec<u32>,        // (n_fixed)
    full: Vec<u32>,         // (n_full)
    logsumexp: Vec<f32>,    // (prompts, positions)
    top: Vec<u32>,          // (prompts, positions, n_top)
    top_logits: Vec<f32>,   // (prompts, positions, n_top)
    fixed_logits: Vec<f32>, // (prompts, positions, n_fixed)
    full_logits: Vec<f32>,  // (n_full, vocab)
}

impl Golden {
    fn read() -> Golden {
        let mut file = Reader::open("logits/smollm2-135m-instruct-q4_1.bin", b"EXRLOGIT");
        let [n_prompts, n_positions, vocab_size, n_top, n_fixed, n_full] =
            [(); 6].map(|()| file.u32() as usize);
        let n = n_prompts * n_positions;
        let golden = Golden {
            n_positions,
            vocab_size,
            n_top,
            n_fixed,
            ids: file.u32s(n),
            fixed: file.u32s(n_fixed),
            full: file.u32s(n_full),
            logsumexp: file.f32s(n),
            top: file.u32s(n * n_top),
            top_logits: file.f32s(n * n_top),
            fixed_logits: file.f32s(n * n_fixed),
            full_logits: file.f32s(n_full * vocab_size),
        };
        file.end();
        assert_eq!(n, 1024);
        golden
    }

    /// The largest distance of the logits `row` at `index` (prompt · positions + position) from
    /// anything stored about them.
    fn distance(&self, index: usize, row: &[f32]) -> f64 {
        let mut furthest = (logsumexp(row) - f64::from(self.logsumexp[index])).abs();
        let mut compare = |id: u32, expected: f32| {
            let distance = (f64::from(row[id as usize]) - f64::from(expected)).abs();
            // f64::max would drop a NaN.
            furthest = if distance.is_nan() { f64::INFINITY } else { furthest.max(distance) };
        };
        for i in index * self.n_top..(index + 1) * self.n_top {
            compare(self.top[i], self.top_logits[i]);
        }
        for (i, &id) in self.fixed.iter().enumerate() {
            compare(id, self.fixed_logits[index * self.n_fixed + i]);
        }
        if let Some(i) = self.full.iter().position(|&full| full as usize == index) {
            let stored = &self.full_logits[i * self.vocab_size..(i + 1) * self.vocab_size];
            for (id, &expected) in stored.iter().enumerate() {
                compare(id as u32, expected);
            }
        }
        furthest
    }
}

/// What is stored of gemma-3-270m: parts of the logits of some positions.
struct GemmaGolden {
    vocab_size: usize,
    n_top: usize,
    n_fixed: usize,
    prompts: Vec<Vec<TokenId>>,
    positions: Vec<Vec<u32>>, // of the stored rows, one list per prompt
    fixed: Vec<u32>,          // (n_fixed)
    logsumexp: Vec<f32>,      // (rows of all prompts)
    top: Vec<u32>,            // (rows, n_top)
    top_logits: Vec<f32>,     // (rows, n_top)
    fixed_logits: Vec<f32>,   // (rows, n_fixed)
}

impl GemmaGolden {
    fn read() -> GemmaGolden {
        let mut file = Reader::open("logits/gemma-3-270m-q4_k_m.bin", b"EXRLOGSP");
        let [n_prompts, vocab_size, n_top, n_fixed] = [(); 4].map(|()| file.u32() as usize);
        let lens = file.u32s(n_prompts);
        let n_rows = file.u32s(n_prompts);
        let n = n_rows.iter().sum::<u32>() as usize;
        let golden = GemmaGolden {
            vocab_size,
            n_top,
            n_fixed,
            prompts: lens
                .iter()
                .map(|&len| file.u32s(len as usize).into_iter().map(TokenId).collect())
                .collect(),
            positions: n_rows.iter().map(|&n| file.u32s(n as usize)).collect(),
            fixed: file.u32s(n_fixed),
            logsumexp: file.f32s(n),
            top: file.u32s(n * n_top),
            top_logits: file.f32s(n * n_top),
            fixed_logits: file.f32s(n * n_fixed),
        };
        file.end();
        assert_eq!((lens, n), (vec![64, 64, 600], 192));
        golden
    }

    /// The largest distance of the logits `row` from what is stored about the row `index`, counted
    /// over all prompts.
    fn distance(&self, index: usize, row: &[f32]) -> f64 {
        let mut furthest = (logsumexp(row) - f64::from(self.logsumexp[index])).abs();
        let top = index * self.n_top..(index + 1) * self.n_top;
        let fixed = index * self.n_fixed..(index + 1) * self.n_fixed;
        let ids = self.top[top.clone()].iter().chain(&self.fixed);
        let expected = self.top_logits[top].iter().chain(&self.fixed_logits[fixed]);
        for (&id, &expected) in ids.zip(expected) {
            let distance = (f64::from(row[id as usize]) - f64::from(expected)).abs();
            // f64::max would drop a NaN.
            furthest = if distance.is_nan() { f64::INFINITY } else { furthest.max(distance) };
        }
        furthest
    }
}

/// Logits after the positions `rows` of a prompt, in one step on an empty pool, `(rows, V)`.
fn logits(
    backend: &CpuBackend,
    decoder: &Decoder<CpuBackend>,
    (ids, rows): (&[TokenId], &[u32]),
    kv: KvDtype,
) -> Vec<f32> {
    let pages: Vec<PageId> =
        (0..ids.len().div_ceil(PAGE_TOKENS) as u32).rev().map(PageId).collect();
    let mut pool = backend.kv_pool(decoder.kv_shape(pages.len(), kv)).unwrap();
    let mut scratch = decoder.scratch(backend, ids.len(), rows.len()).unwrap();
    let span = AttentionSpan { first_row: 0, n_rows: ids.len(), first_position: 0, pages: &pages };
    let batch = Batch { ids, spans: &[span], logit_rows: rows };
    decoder.forward(backend, &mut scratch, &mut pool, &batch);
    let mut logits = Vec::new();
    scratch.read_logits(backend, &mut logits);
    logits
}

fn logsumexp(row: &[f32]) -> f64 {
    let highest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    highest + row.iter().map(|&x| (f64::from(x) - highest).exp()).sum::<f64>().ln()
}

/// Σ p · ln(p / q) in nats, p from `exact` and q from `fast`.
fn divergence(exact: &[f32], fast: &[f32]) -> f64 {
    let (p_sum, q_sum) = (logsumexp(exact), logsumexp(fast));
    exact
        .iter()
        .zip(fast)
        .map(|(&p, &q)| {
            let (ln_p, ln_q) = (f64::from(p) - p_sum, f64::from(q) - q_sum);
            ln_p.exp() * (ln_p - ln_q)
        })
        .sum()
}

#[test]
fn exact_mode_agrees_with_numpy_and_fast_modes_with_exact_mode() {
    let golden = Golden::read();
    let gguf = Gguf::open(Path::new(
        &std::env::var("EXRAIL_TEST_GENERATOR").expect("run through make test"),
    ))
    .unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    assert_eq!(config.vocab_size, golden.vocab_size);
    let options = CpuOptions { activation: Activation::F32, ..CpuOptions::default() };
    let exact = CpuBackend::new(options).unwrap();
    let fast = exact.with_activation(Activation::Int8);
    let decoder = Decoder::load(&exact, &config, &gguf, &mut |_| {}).unwrap();

    let (mut furthest, mut divergences, mut same_choice) = (0.0f64, Vec::new(), 0);
    let mut cache_divergences = Vec::new();
    for (prompt, ids) in golden.ids.chunks_exact(golden.n_positions).enumerate() {
        let ids: Vec<TokenId> = ids.iter().map(|&id| TokenId(id)).collect();
        let all: Vec<u32> = (0..ids.len() as u32).collect();
        let prompt_rows = (ids.as_slice(), all.as_slice());
        let exact_logits = logits(&exact, &decoder, prompt_rows, KvDtype::F32);
        let fast_logits = logits(&fast, &decoder, prompt_rows, KvDtype::F16);
        let cached_logits = logits(&exact, &decoder, prompt_rows, KvDtype::Int8);
        let rows = exact_logits.chunks_exact(golden.vocab_size);
        let cached_rows = cached_logits.chunks_exact(golden.vocab_size);
        cache_divergences.extend(rows.zip(cached_rows).map(|(e, c)| divergence(e, c)));
        let (exact_rows, fast_rows) = (
            exact_logits.chunks_exact(golden.vocab_size),
            fast_logits.chunks_exact(golden.vocab_size),
        );
        for (position, (exact, fast)) in exact_rows.zip(fast_rows).enumerate() {
            let index = prompt * golden.n_positions + position;
            furthest = furthest.max(golden.distance(index, exact));
            divergences.push(divergence(exact, fast));
            let choice = golden.top[index * golden.n_top] as usize;
            same_choice += usize::from(fast.iter().all(|&x| x <= fast[choice]));
        }
    }
    let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
    let cache_mean = cache_divergences.iter().sum::<f64>() / divergences.len() as f64;
    let worst = divergences.iter().copied().fold(0.0, f64::max);
    eprintln!(
        "{}: furthest logit {furthest:.2e}; {}: mean KLD {mean:.2e}, worst {worst:.2e}, {same_choice} of {} \
         greedy choices as numpy; int8 cache alone: mean KLD {cache_mean:.2e}",
        exact.name(),
        fast.name(),
        divergences.len(),
    );
    assert!(furthest <= MAX_DISTANCE, "furthest logit {furthest}");
    assert!(mean <= MAX_MEAN_KLD, "mean KLD {mean}");
    assert!(cache_mean <= MAX_MEAN_KLD, "mean KLD of the int8 cache {cache_mean}");
}

#[test]
fn gemma_agrees_with_numpy_within_and_beyond_its_window() {
    let golden = GemmaGolden::read();
    let gguf =
        Gguf::open(Path::new(&std::env::var("EXRAIL_TEST_GEMMA").expect("run through make test")))
            .unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    assert_eq!(config.vocab_size, golden.vocab_size);
    let options = CpuOptions { activation: Activation::F32, ..CpuOptions::default() };
    let exact = CpuBackend::new(options).unwrap();
    let fast = exact.with_activation(Activation::Int8);
    let decoder = Decoder::load(&exact, &config, &gguf, &mut |_| {}).unwrap();

    let (mut furthest, mut divergences, mut same_choice) = (0.0f64, Vec::new(), 0);
    for (ids, positions) in golden.prompts.iter().zip(&golden.positions) {
        let prompt_rows = (ids.as_slice(), positions.as_slice());
        let exact_logits = logits(&exact, &decoder, prompt_rows, KvDtype::F32);
        let fast_logits = logits(&fast, &decoder, prompt_rows, KvDtype::F16);
        let exact_rows = exact_logits.chunks_exact(golden.vocab_size);
        let fast_rows = fast_logits.chunks_exact(golden.vocab_size);
        let mut furthest_here = 0.0f64;
        for (exact, fast) in exact_rows.zip(fast_rows) {
            let index = divergences.len();
            furthest_here = furthest_here.max(golden.distance(index, exact));
            divergences.push(divergence(exact, fast));
            let choice = golden.top[index * golden.n_top] as usize;
            same_choice += usize::from(fast.iter().all(|&x| x <= fast[choice]));
        }
        eprintln!("{} tokens: furthest logit {furthest_here:.2e}", ids.len());
        furthest = furthest.max(furthest_here);
    }
    assert_eq!(divergences.len(), golden.logsumexp.len());
    let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
    let worst = divergences.iter().copied().fold(0.0, f64::max);
    eprintln!(
        "{}: furthest logit {furthest:.2e}; {}: mean KLD {mean:.2e}, worst {worst:.2e}, {same_choice} of {} \
         greedy choices as numpy",
        exact.name(),
        fast.name(),
        divergences.len(),
    );
    assert!(furthest <= MAX_DISTANCE, "furthest logit {furthest}");
    assert!(mean <= MAX_MEAN_KLD, "mean KLD {mean}");
}
