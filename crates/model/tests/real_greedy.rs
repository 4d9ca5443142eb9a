//! SmolLM2-135M-Instruct and gemma-3-270m on the CPU in the mode that ships: int8 activations, f16
//! cache.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use std::path::Path;

use exrail_checkpoint::{DecoderConfig, Gguf};
use exrail_kernels::{AttentionSpan, Backend, KvDtype, PageId, TokenId};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_model::{Batch, Decoder};

/// "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n".
const PROMPT: [u32; 16] =
    [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198];

/// "The capital of France is Paris.<|im_end|>", which numpy chooses with margins of at least 1.5
/// over the second choice (golden/logits/make.py's forward pass).
const ANSWER: [u32; 8] = [504, 3575, 282, 4649, 314, 7042, 30, 2];

/// "<bos>Monday, Tuesday,", as llama.cpp and golden/logits/make_gemma.py tokenise it.
const GEMMA_PROMPT: [u32; 5] = [2, 49381, 236764, 9863, 236764];

/// " Wednesday, Thursday, Friday, Saturday,", which numpy chooses with margins of at least 1.0 over
/// the second choice (golden/logits/make_gemma.py prints them).
const GEMMA_ANSWER: [u32; 8] = [10119, 236764, 9853, 236764, 7672, 236764, 8224, 236764];

/// The `n` tokens that the model in the file named by `variable` chooses after `prompt`.
fn greedy(variable: &str, prompt: &[u32], n: usize) -> Vec<u32> {
    let path = std::env::var(variable).unwrap_or_else(|e| panic!("{variable}: {e}: make test"));
    let gguf = Gguf::open(Path::new(&path)).unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    let backend = CpuBackend::new(CpuOptions::default()).unwrap();
    let decoder = Decoder::load(&backend, &config, &gguf, &mut |_| {}).unwrap();
    let mut scratch = decoder.scratch(&backend, prompt.len(), 1).unwrap();
    let mut pool = backend.kv_pool(decoder.kv_shape(2, KvDtype::F16)).unwrap();
    let mut logits = vec![0.0; config.vocab_size];

    let mut ids: Vec<TokenId> = prompt.iter().map(|&id| TokenId(id)).collect();
    let (mut first_position, mut answer) = (0, Vec::new());
    while answer.len() < n {
        let n_rows = ids.len();
        let span = AttentionSpan { first_row: 0, n_rows, first_position, pages: &[PageId(1)] };
        let batch = Batch { ids: &ids, spans: &[span], logit_rows: &[n_rows as u32 - 1] };
        decoder.forward(&backend, &mut scratch, &mut pool, &batch);
        scratch.logits(&backend, 0, &mut logits);
        let choice = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        answer.push(choice as u32);
        first_position += n_rows;
        ids = vec![TokenId(choice as u32)];
    }
    answer
}

#[test]
fn greedy_decoding_names_the_capital_of_france() {
    assert_eq!(greedy("EXRAIL_TEST_GENERATOR", &PROMPT, ANSWER.len()), ANSWER);
}

#[test]
fn gemma_goes_on_with_the_days_of_the_week() {
    assert_eq!(greedy("EXRAIL_TEST_GEMMA", &GEMMA_PROMPT, GEMMA_ANSWER.len()), GEMMA_ANSWER);
}
