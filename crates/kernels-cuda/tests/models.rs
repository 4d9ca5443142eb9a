//! Whole models on the GPU against the CPU: every family of `golden/families`, which the CPU's own
//! tests hold against transformers, and the two real ones that `EXRAIL_TEST_GENERATOR` and
//! `EXRAIL_TEST_GEMMA` name. A missing device or file is a failure.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use std::path::{Path, PathBuf};

use exrail_checkpoint::{DecoderConfig, Gguf, HfFolder, Tensors};
use exrail_kernels::{
    Activation, AttentionSpan, Backend, Draw, Draws, KvDtype, Largest, PAGE_TOKENS, PageId, TokenId,
};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_kernels_cuda::{CudaBackend, CudaOptions};
use exrail_model::{Batch, Decoder, Scratch};

/// Largest distance of a logit between two devices that both sum in f32, in another order; the
/// standard deviation of the families' logits is 0.8 to 1.8.
const EXACT_DISTANCE: f32 = 2e-4;
/// The same of a real model, whose logits reach 30.
const REAL_DISTANCE: f32 = 2e-3;
/// Largest mean KLD of the fast mode against the exact one, in nats: activations have 16 bits row by row
/// and 11 in batches, keys and values are halves.
const FAST_KLD: f64 = 2e-4;

type Model<'a> = (&'a DecoderConfig, &'a dyn Tensors);

fn cuda(activation: Activation) -> CudaBackend {
    CudaBackend::open(CudaOptions { activation, ..CudaOptions::new(0) }).expect("a device")
}

fn cpu(activation: Activation) -> CpuBackend {
    CpuBackend::new(CpuOptions { activation, ..CpuOptions::default() }).unwrap()
}

/// Logits of all positions, fed in steps of at most `step` tokens.
fn logits<B: Backend>(
    backend: &B,
    (config, tensors): Model<'_>,
    ids: &[TokenId],
    step: usize,
    kv: KvDtype,
) -> Vec<f32> {
    let config = config.clone().with_context_len(ids.len().min(config.max_context_len)).unwrap();
    let decoder = Decoder::load(backend, &config, tensors, &mut |_| {}).unwrap();
    let n_pages = ids.len().div_ceil(PAGE_TOKENS);
    let pages: Vec<PageId> = (1..=n_pages as u32).rev().map(PageId).collect();
    let mut pool = backend.kv_pool(decoder.kv_shape(n_pages + 1, kv)).unwrap();
    let mut scratch = decoder.scratch(backend, step, step).unwrap();
    let mut all = Vec::new();
    for (i, ids) in ids.chunks(step).enumerate() {
        let (n_rows, first_position) = (ids.len(), i * step);
        let span = AttentionSpan { first_row: 0, n_rows, first_position, pages: &pages };
        let rows: Vec<u32> = (0..n_rows as u32).collect();
        let batch = Batch { ids, spans: &[span], logit_rows: &rows };
        decoder.forward(backend, &mut scratch, &mut pool, &batch);
        let mut logits = Vec::new();
        scratch.read_logits(backend, &mut logits);
        all.extend(logits);
    }
    all
}

/// Greedy continuation of `prompt`, where each step is told its token or gets it from the last one.
fn greedy<B: Backend>(
    backend: &B,
    (config, tensors): Model<'_>,
    prompt: &[TokenId],
    n_tokens: usize,
    follows: bool,
) -> Vec<Largest> {
    let len = prompt.len() + n_tokens;
    let config = config.clone().with_context_len(len).unwrap();
    let decoder = Decoder::load(backend, &config, tensors, &mut |_| {}).unwrap();
    let n_pages = len.div_ceil(PAGE_TOKENS) as u32;
    let pages: Vec<PageId> = (0..n_pages).map(PageId).collect();
    let mut pool = backend.kv_pool(decoder.kv_shape(pages.len(), KvDtype::F16)).unwrap();
    let mut scratch = decoder.scratch(backend, prompt.len(), 1).unwrap();
    let (mut ids, mut first_position) = (prompt.to_vec(), 0);
    let mut out = Vec::new();
    let mut last: Option<B::Found> = None;
    while first_position < prompt.len() + n_tokens - 1 {
        let n_rows = ids.len();
        let span = AttentionSpan { first_row: 0, n_rows, first_position, pages: &pages };
        let draws = Draws { limit: config.vocab_size, rows: &[Draw::LARGEST] };
        let (scratch, pool) = (&mut scratch, &mut pool);
        let found = match last.as_ref().filter(|_| follows) {
            Some(last) => decoder.follow_drawn(backend, scratch, pool, last, &[span], draws),
            None => {
                let batch = Batch { ids: &ids, spans: &[span], logit_rows: &[n_rows as u32 - 1] };
                decoder.forward_drawn(backend, scratch, pool, &batch, draws)
            }
        };
        first_position += n_rows;
        if follows {
            // One step late: this one is in flight.
            ids.truncate(1);
            out.extend(last.iter().flat_map(|last| backend.found(last)));
        } else {
            let tokens = backend.found(&found);
            ids = vec![TokenId(tokens[0].index)];
            out.extend(tokens);
        }
        last = Some(found);
    }
    if follows {
        out.extend(last.iter().flat_map(|last| backend.found(last)));
    }
    out
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // f32::max would drop a NaN.
    let further = |max: f32, d: f32| if d.is_nan() { f32::INFINITY } else { max.max(d) };
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, further)
}

/// Mean over the rows of `vocab_size` logits of KLD(p ‖ q), in nats.
fn mean_kld(p: &[f32], q: &[f32], vocab_size: usize) -> f64 {
    let log_total = |row: &[f32]| {
        let highest = row.iter().fold(f64::NEG_INFINITY, |max, &x| max.max(f64::from(x)));
        highest + row.iter().map(|&x| (f64::from(x) - highest).exp()).sum::<f64>().ln()
    };
    let rows = p.chunks_exact(vocab_size).zip(q.chunks_exact(vocab_size));
    let each = rows.map(|(p, q)| {
        let (total_p, total_q) = (log_total(p), log_total(q));
        let terms = p.iter().zip(q).map(|(&p, &q)| {
            let (p, q) = (f64::from(p) - total_p, f64::from(q) - total_q);
            p.exp() * (p - q)
        });
        terms.sum::<f64>()
    });
    let klds: Vec<f64> = each.collect();
    klds.iter().sum::<f64>() / klds.len() as f64
}

fn families() -> Vec<PathBuf> {
    // The variable, not the constant: the tests may run elsewhere than they were compiled.
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap();
    let dir = Path::new(&here).join("../../golden/families");
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = entries.filter(|path| path.join("golden.bin").exists()).collect();
    found.sort();
    found
}

/// A family's folder, and its GGUF file where there is one.
fn sources(folder: &Path) -> Vec<(&'static str, DecoderConfig, Box<dyn Tensors>)> {
    let hf = HfFolder::open(folder).unwrap();
    let mut sources: Vec<(_, _, Box<dyn Tensors>)> =
        vec![("folder", hf.config().clone(), Box::new(hf))];
    let path = folder.join("model.gguf");
    if path.exists() {
        let gguf = Gguf::open(&path).unwrap();
        sources.push(("GGUF", DecoderConfig::from_gguf(&gguf).unwrap(), Box::new(gguf)));
    }
    sources
}

fn some_ids(vocab_size: usize, n: usize) -> Vec<TokenId> {
    (0..n).map(|i| TokenId((i * 7919 % vocab_size) as u32)).collect()
}

/// Logits of the last token of a prompt alone: the last layer then attends with one row to positions that
/// the same step has just written.
fn last_logits<B: Backend>(
    backend: &B,
    (config, tensors): Model<'_>,
    ids: &[TokenId],
    n_times: usize,
) -> Vec<Vec<f32>> {
    let config = config.clone().with_context_len(ids.len()).unwrap();
    let decoder = Decoder::load(backend, &config, tensors, &mut |_| {}).unwrap();
    let n_pages = ids.len().div_ceil(PAGE_TOKENS);
    let pages: Vec<PageId> = (0..n_pages as u32).map(PageId).collect();
    let mut scratch = decoder.scratch(backend, ids.len(), 1).unwrap();
    let one = |_| {
        // Fresh pages are zero: a key that is read before it is written counts as such.
        let mut pool = backend.kv_pool(decoder.kv_shape(n_pages, KvDtype::F16)).unwrap();
        let span =
            AttentionSpan { first_row: 0, n_rows: ids.len(), first_position: 0, pages: &pages };
        let batch = Batch { ids, spans: &[span], logit_rows: &[ids.len() as u32 - 1] };
        decoder.forward(backend, &mut scratch, &mut pool, &batch);
        let mut logits = Vec::new();
        scratch.read_logits(backend, &mut logits);
        logits
    };
    (0..n_times).map(one).collect()
}

#[test]
fn the_last_row_of_a_prompt_sees_what_its_own_step_wrote() {
    let path = std::env::var_os("EXRAIL_TEST_GENERATOR").expect("EXRAIL_TEST_GENERATOR is set");
    let gguf = Gguf::open(Path::new(&path)).unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    let model: Model<'_> = (&config, &gguf);
    for n in [2, 8, 40, 300] {
        let ids = some_ids(config.vocab_size, n);
        let expected = last_logits(&cpu(Activation::F32), model, &ids, 1).remove(0);
        let found = last_logits(&cuda(Activation::Int8), model, &ids, 10);
        for (i, found) in found.iter().enumerate() {
            let kld = mean_kld(&expected, found, config.vocab_size);
            // One position may lie ten times as far as the mean does; a key that is missing costs far more.
            assert!(kld < 10.0 * FAST_KLD, "{n} tokens, time {i}: {kld:e}");
        }
    }
}

#[test]
fn logits_of_every_family_are_those_of_the_cpu() {
    let (cuda, cpu) = (cuda(Activation::F32), cpu(Activation::F32));
    let families = families();
    assert!(families.len() > 20, "{} families", families.len());
    let mut faults = Vec::new();
    for folder in families {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        for (source, config, tensors) in sources(&folder) {
            let model = (&config, &*tensors);
            let ids = some_ids(config.vocab_size, 40);
            let expected = logits(&cpu, model, &ids, 40, KvDtype::F32);
            for step in [40, 7, 1] {
                let found = logits(&cuda, model, &ids, step, KvDtype::F32);
                let distance = distance(&found, &expected);
                eprintln!("{name:16} {source:6} in steps of {step:2}: {distance:.1e}");
                if distance > EXACT_DISTANCE {
                    faults.push(format!("{name} {source} {step}: {distance:e}"));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn real_models_agree_with_the_cpu_and_with_themselves() {
    for variable in ["EXRAIL_TEST_GENERATOR", "EXRAIL_TEST_GEMMA"] {
        let path = std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is set"));
        let gguf = Gguf::open(Path::new(&path)).unwrap();
        let config = DecoderConfig::from_gguf(&gguf).unwrap();
        let model: Model<'_> = (&config, &gguf);
        let ids = some_ids(config.vocab_size, 300);
        // Both modes against the exact one of the CPU; the fast one row by row and in batches, whose
        // kernels round differently.
        let expected = logits(&cpu(Activation::F32), model, &ids, 64, KvDtype::F32);
        for (activation, kv, step) in [
            (Activation::F32, KvDtype::F32, 64),
            (Activation::Int8, KvDtype::F16, 1),
            (Activation::Int8, KvDtype::F16, 64),
            (Activation::Int8, KvDtype::F16, 300),
        ] {
            let cuda = cuda(activation);
            let found = logits(&cuda, model, &ids, step, kv);
            let distance = distance(&found, &expected);
            let kld = mean_kld(&expected, &found, config.vocab_size);
            eprintln!(
                "{variable} {activation:?} in steps of {step}: distance {distance:.1e}, mean KLD {kld:.1e}"
            );
            match activation {
                Activation::F32 => assert!(distance < REAL_DISTANCE, "{variable}: {distance:e}"),
                Activation::Int8 => {
                    assert!(kld < FAST_KLD, "{variable}: {kld:e}");
                }
            }
            let runs = [false, false, true].map(|follows| {
                let run = greedy(&cuda, model, &ids[..20], 64, follows);
                assert_eq!(run.len(), 64);
                run
            });
            // Whether the host or the device feeds them.
            assert!(runs.iter().all(|run| *run == runs[0]), "{variable}: greedy tokens differ");
        }
    }
}

/// The places of found tokens take turns, so that steps that follow each other are graphs that were made
/// before: those of a first run are all that later ones need. Drawn tokens are found by other numbers each
/// time, which are no part of a graph.
#[test]
fn steps_that_follow_each_other_reuse_their_graphs() {
    graphs_are_reused(|_| Draw::LARGEST);
    graphs_are_reused(drawn);
}

/// A draw of step `n`.
fn drawn(n: u64) -> Draw {
    let numerator = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11;
    Draw { temperature: 0.9, top_k: 200, top_p: 0.95, min_p: 0.01, numerator }
}

fn graphs_are_reused(draw: impl Fn(u64) -> Draw) {
    let cuda = cuda(Activation::Int8);
    let mut steps = Steps::new(&cuda);
    steps.run(&draw);
    steps.run(&draw);
    let n_graphs = cuda.n_graphs();
    assert!(n_graphs > 0);
    steps.run(&draw);
    assert_eq!(cuda.n_graphs(), n_graphs);
}

/// Behind the fence launches stay launches, with the same tokens; where it is open, they become graphs.
#[test]
fn behind_the_fence_no_graph_is_made() {
    let draw = |_| Draw::LARGEST;
    let [closed, open] = [true, false].map(|is_closed| {
        let cuda = cuda(Activation::Int8);
        let mut steps = Steps::new(&cuda);
        cuda.close_fence(is_closed);
        let tokens = [(); 3].map(|()| steps.run(draw));
        assert_eq!(cuda.n_graphs() == 0, is_closed);
        assert_eq!(cuda.built().graph_captures, cuda.n_graphs());
        tokens
    });
    assert_eq!(closed, open);
}

/// Runs of decode of the real model from one token, each step asked for before the last was read.
struct Steps<'a> {
    cuda: &'a CudaBackend,
    decoder: Decoder<CudaBackend>,
    scratch: Scratch<CudaBackend>,
    pool: <CudaBackend as Backend>::KvPool,
    vocab_size: usize,
    n_steps: u64,
}

impl Steps<'_> {
    fn new(cuda: &CudaBackend) -> Steps<'_> {
        let path = std::env::var_os("EXRAIL_TEST_GENERATOR").expect("EXRAIL_TEST_GENERATOR is set");
        let gguf = Gguf::open(Path::new(&path)).unwrap();
        let config = DecoderConfig::from_gguf(&gguf).unwrap();
        let config = config.with_context_len(256).unwrap();
        let decoder = Decoder::load(cuda, &config, &gguf, &mut |_| {}).unwrap();
        let pool = cuda.kv_pool(decoder.kv_shape(1, KvDtype::F16)).unwrap();
        let scratch = decoder.scratch(cuda, 1, 1).unwrap();
        Steps { cuda, decoder, scratch, pool, vocab_size: config.vocab_size, n_steps: 0 }
    }

    /// The tokens of one run.
    fn run(&mut self, draw: impl Fn(u64) -> Draw) -> Vec<u32> {
        let (cuda, mut asked, mut tokens) = (self.cuda, Vec::new(), Vec::new());
        let mut read = |found| tokens.push(cuda.found(&found)[0].index);
        for first_position in 0..40 {
            self.n_steps += 1;
            let draws = Draws { limit: self.vocab_size, rows: &[draw(self.n_steps)] };
            let pages = [PageId(0)];
            let span = AttentionSpan { first_row: 0, n_rows: 1, first_position, pages: &pages };
            let (scratch, pool) = (&mut self.scratch, &mut self.pool);
            let found = match asked.last() {
                Some(last) => self.decoder.follow_drawn(cuda, scratch, pool, last, &[span], draws),
                None => {
                    let batch = Batch { ids: &[TokenId(1)], spans: &[span], logit_rows: &[0] };
                    self.decoder.forward_drawn(cuda, scratch, pool, &batch, draws)
                }
            };
            asked.push(found);
            if asked.len() == 2 {
                read(asked.remove(0));
            }
        }
        asked.into_iter().for_each(read);
        tokens
    }
}

/// Answers are read in any order, late, or not at all.
#[test]
fn answers_in_flight_do_not_mix() {
    let cuda = cuda(Activation::Int8);
    let (n_rows, width) = (3, 1000);
    let ask = |n: usize| {
        let mut values = vec![0.0; n_rows * width];
        (0..n_rows).for_each(|t| values[t * width + 7 * n + t] = 1.0 + n as f32);
        let mut x = cuda.buffer(values.len()).unwrap();
        cuda.write(&mut x, &values);
        cuda.largest(&x, n_rows, width, width)
    };
    let expected = |n: usize| -> Vec<Largest> {
        let row = |t: usize| Largest { index: (7 * n + t) as u32, value: 1.0 + n as f32 };
        (0..n_rows).map(row).collect()
    };
    let mut asked: Vec<_> = (0..6).map(|n| (n, ask(n))).collect();
    drop(asked.remove(1));
    asked.extend((6..9).map(|n| (n, ask(n))));
    for (n, found) in asked.iter().rev().chain(&asked) {
        assert_eq!(cuda.found(found), expected(*n));
    }
    let mut nothing = cuda.buffer(width).unwrap();
    assert_eq!(cuda.found(&cuda.largest(&nothing, 0, width, 5)), []);
    assert_eq!(cuda.found(&cuda.draw(&mut nothing, width, Draws { limit: 5, rows: &[] })), []);
}

/// More rows than conformance has, of a whole vocabulary, several questions in flight: each is counted in
/// bins of its own, which are empty again for the next.
#[test]
fn draws_in_flight_do_not_mix() {
    let cuda = cuda(Activation::Int8);
    let (n_rows, width) = (70, 32_003);
    let rows: Vec<Draw> = (0..n_rows as u64).map(drawn).collect();
    let ask = |n: usize| {
        let value = |i: usize| ((i * 7919 + n * 104_729) % 9973) as f32 / 700.0;
        let values: Vec<f32> = (0..n_rows * width).map(value).collect();
        let mut x = cuda.buffer(values.len()).unwrap();
        cuda.write(&mut x, &values);
        let draws = Draws { limit: width - 3, rows: &rows[n..] };
        (cuda.draw(&mut x, width, draws), draws.of_rows(&values[..(n_rows - n) * width], width))
    };
    let asked: Vec<_> = (0..4).map(ask).collect();
    for (found, expected) in asked.iter().rev() {
        assert_eq!(cuda.found(found), *expected);
    }
}
