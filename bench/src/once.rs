//! Our side: one process that loads the model, checks a result, and times prefill and decode the way
//! `llama-bench` does (llama.cpp `tools/llama-bench`): a warm-up, then each repetition from an empty
//! cache, random tokens, logits of the last row only.

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use exrail_checkpoint::{DecoderConfig, Gguf};
use exrail_kernels::{Activation, AttentionSpan, Backend, KvDtype, PAGE_TOKENS, PageId, TokenId};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_model::{Batch, Decoder, Scratch};
use serde::{Deserialize, Serialize};

use crate::random::Random;

/// Largest mean KLD, in nats, that int8 activations may cost (issue 2): prefill and decode round
/// the same activations, so they may not differ by more either.
const KLD_LIMIT: f64 = 2e-3;

/// Positions of the check.
const CHECKED_TOKENS: usize = 48;

#[derive(Clone, Debug, Args)]
pub(crate) struct OnceArguments {
    /// The model, a GGUF file
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Threads of either side
    #[arg(long, default_value_t = 2)]
    pub(crate) threads: usize,
    /// Tokens of the prefill test
    #[arg(long, default_value_t = 512)]
    pub(crate) prompt_tokens: usize,
    /// Tokens of the decode test
    #[arg(long, default_value_t = 128)]
    pub(crate) generated_tokens: usize,
    /// Timed repetitions of each test
    #[arg(long, default_value_t = 5)]
    pub(crate) repetitions: usize,
}

/// What one process of either side measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Run {
    /// Program and version.
    pub(crate) program: String,
    /// Instruction set or backend.
    pub(crate) kernels: String,
    /// Tokens per second of each repetition.
    pub(crate) prefill: Vec<f64>,
    /// Tokens per second of each repetition.
    pub(crate) decode: Vec<f64>,
    /// Bytes of weights that one decoded token reads; ours only.
    pub(crate) weight_bytes: Option<u64>,
    /// KLD between prefill and decode of the same tokens, nats; ours only.
    pub(crate) kld: Option<f64>,
}

/// Measures and prints the run as one line of JSON.
pub(crate) fn run(arguments: &OnceArguments) -> Result<()> {
    let longest = arguments.prompt_tokens.max(arguments.generated_tokens).max(CHECKED_TOKENS);
    ensure!(arguments.prompt_tokens > 0 && arguments.generated_tokens > 0, "nothing to measure");
    let file = Gguf::open(&arguments.model)?;
    let config = DecoderConfig::from_gguf(&file)?;
    ensure!(
        longest <= config.context_len,
        "model: expected a context of {longest} tokens, found {}",
        config.context_len
    );
    let options =
        CpuOptions { threads: Some(arguments.threads), activation: Activation::Int8, isa: None };
    let backend = CpuBackend::new(options)?;
    let decoder = Decoder::load(&backend, &config, &file, &mut |_| {})?;
    let n_pages = longest.div_ceil(PAGE_TOKENS);
    let pool = backend.kv_pool(decoder.kv_shape(n_pages, KvDtype::F16))?;
    let scratch = decoder.scratch(&backend, longest, 1)?;
    let pages = (0..u32::try_from(n_pages)?).map(PageId).collect();
    let mut bench = Bench { backend, decoder, scratch, pool, pages, random: Random::new(1) };

    let kld = bench.check()?;
    bench.prefill(arguments.prompt_tokens);
    let prefill = rates(arguments.repetitions, || bench.prefill(arguments.prompt_tokens));
    bench.decode(arguments.generated_tokens.min(16));
    let decode = rates(arguments.repetitions, || bench.decode(arguments.generated_tokens));
    let run = Run {
        program: format!("exrail {}", env!("CARGO_PKG_VERSION")),
        kernels: bench.backend.name(),
        prefill,
        decode,
        weight_bytes: Some(weight_bytes(&file, &config)),
        kld: Some(kld),
    };
    writeln!(io::stdout(), "{}", serde_json::to_string(&run)?).context("standard output")
}

/// All tensors are read once a token; the embedding table only as the head of a tied model.
fn weight_bytes(file: &Gguf, config: &DecoderConfig) -> u64 {
    file.tensors()
        .filter(|tensor| config.tied_head || tensor.name != "token_embd.weight")
        .map(|tensor| tensor.bytes.len() as u64)
        .sum()
}

/// Tokens per second of `n` calls; `work` returns how many tokens it did.
fn rates(n: usize, mut work: impl FnMut() -> usize) -> Vec<f64> {
    (0..n)
        .map(|_| {
            let since = Instant::now();
            let n_tokens = work();
            n_tokens as f64 / since.elapsed().as_secs_f64()
        })
        .collect()
}

/// The model with one sequence.
struct Bench {
    backend: CpuBackend,
    decoder: Decoder<CpuBackend>,
    scratch: Scratch<CpuBackend>,
    pool: <CpuBackend as Backend>::KvPool,
    pages: Vec<PageId>,
    random: Random,
}

impl Bench {
    /// Compares the last logits of a prefill with those of token-by-token decode.
    ///
    /// # Errors
    /// They differ by more than [`KLD_LIMIT`], or are not finite: then no timing means anything.
    fn check(&mut self) -> Result<f64> {
        let ids = self.random_ids(CHECKED_TOKENS);
        self.step(&ids, 0);
        let mut prefill = Vec::new();
        self.scratch.read_logits(&self.backend, &mut prefill);
        for (position, id) in ids.iter().enumerate() {
            self.step(std::slice::from_ref(id), position);
        }
        let mut decode = Vec::new();
        self.scratch.read_logits(&self.backend, &mut decode);
        let kld = exrail_metrics::kld_from_logits(&prefill, &decode)?;
        ensure!(
            kld <= KLD_LIMIT,
            "prefill and decode differ: expected a KLD of at most {KLD_LIMIT}, found {kld}"
        );
        Ok(kld)
    }

    /// Reads `n_tokens` random tokens in one step, into an empty cache.
    fn prefill(&mut self, n_tokens: usize) -> usize {
        let ids = self.random_ids(n_tokens);
        self.step(&ids, 0);
        n_tokens
    }

    /// Decodes `n_tokens` random tokens one by one, into an empty cache.
    fn decode(&mut self, n_tokens: usize) -> usize {
        let mut logits = Vec::new();
        for position in 0..n_tokens {
            let ids = self.random_ids(1);
            self.step(&ids, position);
            self.scratch.read_logits(&self.backend, &mut logits);
        }
        n_tokens
    }

    fn step(&mut self, ids: &[TokenId], first_position: usize) {
        let spans =
            [AttentionSpan { first_row: 0, n_rows: ids.len(), first_position, pages: &self.pages }];
        let last = u32::try_from(ids.len() - 1).expect("a prompt is far below 2^32 tokens");
        let batch = Batch { ids, spans: &spans, logit_rows: &[last] };
        self.decoder.forward(&self.backend, &mut self.scratch, &mut self.pool, &batch);
    }

    fn random_ids(&mut self, n: usize) -> Vec<TokenId> {
        let vocab_size = self.decoder.config().vocab_size as u64;
        let id = |n: u64| TokenId(u32::try_from(n).expect("a vocabulary is below 2^32 tokens"));
        (0..n).map(|_| id(self.random.below(vocab_size))).collect()
    }
}
