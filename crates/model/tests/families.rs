//! Every family, with all its features on, against the logits of transformers: from its folder and,
//! where GGUF can say it, from its GGUF file. See golden/families/README.md.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

mod golden;

use std::path::{Path, PathBuf};

use exrail_checkpoint::{DecoderConfig, Gguf, HfFolder, Tensors};
use exrail_kernels::reference::Reference;
use exrail_kernels::{
    Activation, AttentionSpan, Backend, Draw, DrawScratch, Draws, KvDtype, Largest, PageId, TokenId,
};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_model::{Batch, Decoder};
use golden::Reader;

/// Families in golden/families, and whether they have a GGUF file.
const FAMILIES: [(&str, bool); 21] = [
    ("cohere2", true),
    ("gemma2", true),
    ("gemma2-scalar", false),
    ("gemma3", true),
    ("granite", true),
    ("llama", true),
    ("llama-dynamic", false),
    ("llama-linear", true),
    ("llama-llama3", true),
    ("llama-yarn", true),
    ("mistral", false),
    ("mixtral", true),
    ("olmo2", true),
    ("phi3", true),
    ("phi3-window", false),
    ("qwen2", true),
    ("qwen2-tied", false),
    ("qwen3", true),
    ("qwen3_moe", true),
    ("qwen3_moe-mixed", false),
    ("smollm3", true),
];

/// Largest distance of a logit; their standard deviation is 0.8 to 1.8. Both sides sum in f32, in
/// another order.
const MAX_DISTANCE: f32 = 2e-4;

/// Sequences of the goldens.
const N_SEQUENCES: usize = 2;

struct Sequence {
    ids: Vec<TokenId>,
    logits: Vec<f32>, // (positions, V)
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/families").join(name)
}

fn goldens(name: &str) -> (usize, Vec<Sequence>) {
    let mut file = Reader::open(&format!("families/{name}/golden.bin"), b"EXRFAMIL");
    assert_eq!(file.u32() as usize, N_SEQUENCES);
    let vocab_size = file.u32() as usize;
    let lens = [(); N_SEQUENCES].map(|()| file.u32() as usize);
    let ids = lens.map(|len| file.u32s(len).into_iter().map(TokenId).collect());
    let logits = lens.map(|len| file.f32s(len * vocab_size));
    file.end();
    let sequences = ids.into_iter().zip(logits).map(|(ids, logits)| Sequence { ids, logits });
    (vocab_size, sequences.collect())
}

/// Logits of all positions, fed in steps of at most `step` tokens.
fn logits<B: Backend>(
    backend: &B,
    (config, tensors): (&DecoderConfig, &dyn Tensors),
    ids: &[TokenId],
    step: usize,
) -> Vec<f32> {
    let config = config.clone().with_context_len(ids.len().min(config.max_context_len)).unwrap();
    let decoder = Decoder::load(backend, &config, tensors, &mut |_| {}).unwrap();
    let pages = [PageId(1)];
    let mut pool = backend.kv_pool(decoder.kv_shape(2, KvDtype::F32)).unwrap();
    let mut scratch = decoder.scratch(backend, ids.len(), ids.len()).unwrap();
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

/// A draw for each position and row, of every second row the most likely token.
fn drawn(position: usize, row: u32) -> Draw {
    let counted = u64::from(row) << 32 | position as u64;
    let numerator = (counted + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11;
    let temperature = if row.is_multiple_of(2) { 1.5 } else { 0.0 };
    Draw { temperature, top_k: 90, top_p: 0.98, min_p: 0.001, numerator }
}

/// What is drawn of the first `limit` tokens at all positions, fed one by one.
fn found<B: Backend>(
    backend: &B,
    (config, tensors): (&DecoderConfig, &dyn Tensors),
    ids: &[TokenId],
    limit: usize,
    draw: impl Fn(usize) -> Draw,
) -> Vec<Largest> {
    let config = config.clone().with_context_len(ids.len().min(config.max_context_len)).unwrap();
    let decoder = Decoder::load(backend, &config, tensors, &mut |_| {}).unwrap();
    let pages = [PageId(1)];
    let mut pool = backend.kv_pool(decoder.kv_shape(2, KvDtype::F32)).unwrap();
    let mut scratch = decoder.scratch(backend, 1, 1).unwrap();
    let steps = ids.iter().enumerate().flat_map(|(first_position, &id)| {
        let span = AttentionSpan { first_row: 0, n_rows: 1, first_position, pages: &pages };
        let batch = Batch { ids: &[id], spans: &[span], logit_rows: &[0] };
        let draws = Draws { limit, rows: &[draw(first_position)] };
        let found = decoder.forward_drawn(backend, &mut scratch, &mut pool, &batch, draws);
        assert_eq!(scratch.n_logit_rows(), 0);
        backend.found(&found)
    });
    steps.collect()
}

fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    // f32::max would drop a NaN.
    let further = |max: f32, d: f32| if d.is_nan() { f32::INFINITY } else { max.max(d) };
    found.iter().zip(expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, further)
}

fn exact_cpu() -> CpuBackend {
    let activation = Activation::F32;
    CpuBackend::new(CpuOptions { activation, threads: Some(2), ..CpuOptions::default() }).unwrap()
}

/// Every source of a family: its folder, and its GGUF file where there is one.
fn sources(name: &str, has_gguf: bool) -> Vec<(&'static str, DecoderConfig, Box<dyn Tensors>)> {
    let hf = HfFolder::open(&folder(name)).unwrap();
    let mut sources: Vec<(_, _, Box<dyn Tensors>)> =
        vec![("folder", hf.config().clone(), Box::new(hf))];
    let path = folder(name).join("model.gguf");
    assert_eq!(path.exists(), has_gguf, "{}", path.display());
    if has_gguf {
        let gguf = Gguf::open(&path).unwrap();
        sources.push(("GGUF", DecoderConfig::from_gguf(&gguf).unwrap(), Box::new(gguf)));
    }
    sources
}

#[test]
fn no_family_is_forgotten() {
    let mut found: Vec<String> = std::fs::read_dir(folder(""))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("golden.bin").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, FAMILIES.map(|family| family.0));
}

#[test]
fn logits_of_every_family_agree_with_transformers() {
    let cpu = exact_cpu();
    let mut faults = Vec::new();
    for (name, has_gguf) in FAMILIES {
        let (vocab_size, sequences) = goldens(name);
        for (source, config, tensors) in sources(name, has_gguf) {
            assert_eq!(config.vocab_size, vocab_size, "{name}");
            for Sequence { ids, logits: expected } in &sequences {
                let model = (&config, &*tensors);
                let all = ids.len();
                let by_reference = logits(&Reference, model, ids, all);
                let in_steps = logits(&Reference, model, ids, 7);
                assert_eq!(by_reference, in_steps, "{name} {source}: steps change the logits");
                let reference = distance(&by_reference, expected);
                let cpu = distance(&logits(&cpu, model, ids, all), expected);
                eprintln!("{name:16} {source:6} {all:3} tokens: {reference:.1e} {cpu:.1e}");
                if reference.max(cpu) > MAX_DISTANCE {
                    faults.push(format!("{name} {source} {all}: {reference:e} {cpu:e}"));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// With integer activations, where a head may be stored in two halves: the most likely token, and a drawn
/// one.
#[test]
fn the_token_that_is_found_is_that_of_the_logits() {
    let options = CpuOptions { threads: Some(2), split_heads_from: 0, ..CpuOptions::default() };
    let cpu = CpuBackend::new(options).unwrap();
    for (name, has_gguf) in FAMILIES {
        let (vocab_size, sequences) = goldens(name);
        let limit = vocab_size - 3;
        for (source, config, tensors) in sources(name, has_gguf) {
            let model = (&config, &*tensors);
            let ids = &sequences[0].ids;
            let logits = logits(&cpu, model, ids, 1);
            for row in [0, 1] {
                let draw = |position| drawn(position, row);
                let each = logits.chunks_exact(vocab_size).map(|row| &row[..limit]).enumerate();
                let mut scratch = DrawScratch::default();
                let expected: Vec<_> = each.map(|(t, x)| draw(t).of(x, &mut scratch)).collect();
                let found = found(&cpu, model, ids, limit, draw);
                assert_eq!(found, expected, "{name} {source} row {row}");
            }
        }
    }
}

/// Steps that get their tokens from the step before, and that read none of them before the next was
/// asked for, give the tokens of steps that are told them: with one sequence and with two.
#[test]
fn a_step_that_follows_is_the_step_that_is_told_its_tokens() {
    let cpu = exact_cpu();
    for (name, has_gguf) in FAMILIES {
        for (source, config, tensors) in sources(name, has_gguf) {
            let model = (&config, &*tensors);
            for n_sequences in [1, 2] {
                let told = continuations(&cpu, model, n_sequences, false);
                let followed = continuations(&cpu, model, n_sequences, true);
                assert_eq!(told.len(), 8);
                assert_eq!(followed, told, "{name} {source} {n_sequences} sequences");
            }
        }
    }
}

/// What is found in eight steps, whose tokens are told or found.
fn continuations<B: Backend>(
    backend: &B,
    (config, tensors): (&DecoderConfig, &dyn Tensors),
    n_sequences: u32,
    follows: bool,
) -> Vec<Vec<Largest>> {
    let config = config.clone().with_context_len(config.max_context_len.min(64)).unwrap();
    let decoder = Decoder::load(backend, &config, tensors, &mut |_| {}).unwrap();
    let mut pool = backend.kv_pool(decoder.kv_shape(2, KvDtype::F32)).unwrap();
    let mut scratch = decoder.scratch(backend, 2, 2).unwrap();
    let pages = [[PageId(1)], [PageId(0)]];
    let rows: Vec<u32> = (0..n_sequences).collect();
    let mut ids: Vec<TokenId> = rows.iter().map(|&row| TokenId(5 + 4 * row)).collect();
    let mut asked: Vec<B::Found> = Vec::new();
    for first_position in 0..8 {
        let span = |first_row: usize| {
            let pages = &pages[first_row];
            AttentionSpan { first_row, n_rows: 1, first_position, pages }
        };
        let spans: Vec<_> = (0..rows.len()).map(span).collect();
        let draws: Vec<Draw> = rows.iter().map(|&row| drawn(first_position, row)).collect();
        let draws = Draws { limit: config.vocab_size, rows: &draws };
        let (scratch, pool) = (&mut scratch, &mut pool);
        let found = match asked.last().filter(|_| follows) {
            Some(last) => decoder.follow_drawn(backend, scratch, pool, last, &spans, draws),
            None => {
                let batch = Batch { ids: &ids, spans: &spans, logit_rows: &rows };
                decoder.forward_drawn(backend, scratch, pool, &batch, draws)
            }
        };
        if !follows {
            ids = backend.found(&found).iter().map(|row| TokenId(row.index)).collect();
        }
        asked.push(found);
    }
    asked.iter().map(|found| backend.found(found)).collect()
}

/// The files are llama.cpp's, see golden/split.
#[test]
fn a_split_model_has_the_logits_of_the_file_that_it_was_split_from() {
    let root = folder("..");
    let open = |path: &str| {
        let gguf = Gguf::open(&root.join(path)).unwrap();
        (DecoderConfig::from_gguf(&gguf).unwrap(), gguf)
    };
    let (config, whole) = open("families/llama-llama3/model.gguf");
    let cpu = exact_cpu();
    for Sequence { ids, .. } in &goldens("llama-llama3").1 {
        let by_reference = logits(&Reference, (&config, &whole), ids, ids.len());
        let by_cpu = logits(&cpu, (&config, &whole), ids, ids.len());
        for first in ["split/tiny-00001-of-00003.gguf", "split/bare-00001-of-00004.gguf"] {
            let (config, split) = open(first);
            let model: (_, &dyn Tensors) = (&config, &split);
            assert_eq!(logits(&Reference, model, ids, ids.len()), by_reference, "{first}");
            assert_eq!(logits(&cpu, model, ids, ids.len()), by_cpu, "{first}");
        }
    }
}
