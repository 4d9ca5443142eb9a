//! [`MemoryPlan`]: what a model and its engine take on a device, before anything is allocated, and
//! [`Admission`], which refuses what cannot fit.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use exrail_checkpoint::{Checkpoint, DecoderConfig, LoadError};
use exrail_kernels::{Extent, Footprint, KvDtype, KvShape, PAGE_TOKENS, Reserve};
use exrail_model::{Needed, RunSizes, kv_shape};
use exrail_tensor::{DType, IntGrid};

use crate::error::EngineError;
use crate::handle::{EngineOptions, sizes};
use crate::load::{LoadOptions, round, served_config};

/// Rows of logits beside one a sequence; a test compares with what the engine allocates.
const SCORE_ROWS: usize = 32;

/// Matrices of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatBytes {
    /// Format in the checkpoint, or the one that it is rounded to.
    pub dtype: DType,
    /// Matrices.
    pub n_matrices: usize,
    /// Bytes on the device.
    pub bytes: Extent,
}

/// Memory of a model and its engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Kind of device.
    pub device: String,
    /// Matrices of the layers, by format.
    pub layers: Vec<FormatBytes>,
    /// The embedding.
    pub embedding: FormatBytes,
    /// The head; none where it is the embedding.
    pub head: Option<FormatBytes>,
    /// Bytes of norms and biases.
    pub vector_bytes: usize,
    /// The page pool.
    pub kv: KvShape,
    /// Bytes of the page pool.
    pub kv_bytes: usize,
    /// Rows of a step at most.
    pub max_rows: usize,
    /// Bytes of the activations of one step.
    pub scratch_bytes: usize,
    /// What the device takes besides.
    pub reserve: Reserve,
    /// Bytes of the second tier of the KV cache at most, in the host's memory.
    pub host_tier_bytes: usize,
    /// Whether that is the device's memory too, and then a part of the plan.
    pub is_host: bool,
}

/// Memory that may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Free {
    /// Bytes.
    pub bytes: usize,
    /// Who says so.
    pub basis: String,
}

/// Whether a plan fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// With so many bytes left.
    Fits {
        /// Bytes.
        left: usize,
    },
    /// If matrices turn out smaller than they may be, which only their blocks say.
    MayFit {
        /// Bytes that lack at worst.
        short: usize,
    },
    /// So many bytes lack at least.
    DoesNotFit {
        /// Bytes.
        short: usize,
    },
    /// Nobody says what is free.
    NotAvailable,
}

impl MemoryPlan {
    /// Each part with what it is, in the order of the table.
    #[must_use]
    pub fn parts(&self) -> Vec<(String, Extent)> {
        let named = |what: &str, format: &FormatBytes| {
            let n = format.n_matrices;
            let matrices = if n == 1 { String::new() } else { format!(", {n} matrices") };
            (format!("{what} {}{matrices}", format.dtype), format.bytes)
        };
        let exactly = |what: String, bytes| (what, Extent::exactly(bytes));
        let mut parts: Vec<_> = self.layers.iter().map(|format| named("weights", format)).collect();
        let tied = if self.head.is_none() { "embedding and head" } else { "embedding" };
        parts.push(named(tied, &self.embedding));
        parts.extend(self.head.iter().map(|head| named("head", head)));
        parts.push(exactly("norms and biases".to_owned(), self.vector_bytes));
        let (pages, dtype) = (self.kv.n_pages, kv_name(self.kv.dtype));
        let kv = format!("KV cache {dtype}, {pages} pages, {} positions", pages * PAGE_TOKENS);
        parts.push(exactly(kv, self.kv_bytes));
        let scratch = format!("activations of {} rows", self.max_rows);
        parts.push(exactly(scratch, self.scratch_bytes));
        parts.push(exactly("reserve".to_owned(), self.reserve.bytes));
        if self.is_host && self.host_tier_bytes > 0 {
            parts.push(exactly("second tier of the KV cache".to_owned(), self.host_tier_bytes));
        }
        parts
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> Extent {
        self.parts().into_iter().fold(Extent::default(), |sum, (_, bytes)| sum.and(bytes))
    }

    /// Whether it fits into what is free.
    #[must_use]
    pub fn fit(&self, free: Option<&Free>) -> Fit {
        let Some(Free { bytes, .. }) = free else { return Fit::NotAvailable };
        let Extent { least, most } = self.total();
        match (bytes.checked_sub(most), least.checked_sub(*bytes)) {
            (Some(left), _) => Fit::Fits { left },
            (None, None | Some(0)) => Fit::MayFit { short: most - bytes },
            (None, Some(short)) => Fit::DoesNotFit { short },
        }
    }
}

fn kv_name(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::F32 => "f32",
        KvDtype::F16 => "f16",
        KvDtype::Int8 => "int8",
    }
}

/// What runs on the model.
#[derive(Clone, Copy)]
pub enum Need<'a> {
    /// An engine with these options.
    Engine(EngineOptions),
    /// Something with sizes of its own, which depend on the architecture.
    Run(&'a dyn Fn(&DecoderConfig) -> RunSizes),
}

/// Who may load: compares a plan with what is free.
pub struct Admission<'a> {
    /// What the device would allocate.
    pub device: Arc<dyn Footprint>,
    /// What it has; `None`: nobody says, and nothing is refused.
    pub free: Option<Free>,
    /// What runs on the model.
    pub need: Need<'a>,
}

impl Admission<'_> {
    /// The plan of a checkpoint, of whose tensors only the headers are read.
    ///
    /// # Errors
    /// The model is refused, or an option cannot be honoured.
    pub fn plan(
        &self,
        checkpoint: &Checkpoint,
        load: LoadOptions,
    ) -> Result<MemoryPlan, EngineError> {
        plan(&self.device, checkpoint, load, self.need)
    }

    /// [`Admission::plan`], if it may fit.
    ///
    /// # Errors
    /// [`EngineError::DoesNotFit`], and as [`Admission::plan`].
    pub fn admit(
        &self,
        checkpoint: &Checkpoint,
        load: LoadOptions,
    ) -> Result<MemoryPlan, EngineError> {
        let plan = self.plan(checkpoint, load)?;
        let (Fit::DoesNotFit { short }, Some(free)) = (plan.fit(self.free.as_ref()), &self.free)
        else {
            return Ok(plan);
        };
        let change = self.smallest_change(checkpoint, load)?;
        let free = free.clone();
        Err(EngineError::DoesNotFit(Box::new(DoesNotFit { plan, free, short, change })))
    }

    /// The first of these that makes it fit: fewer pages, an int8 KV cache, a shorter context, the two of
    /// them, and all that with weights rounded to int8 and to int4. `None`: none does, what runs is no
    /// engine, or nobody says what is free.
    ///
    /// # Errors
    /// As [`Admission::plan`].
    pub fn smallest_change(
        &self,
        checkpoint: &Checkpoint,
        load: LoadOptions,
    ) -> Result<Option<Change>, EngineError> {
        let (Need::Engine(engine), Some(free)) = (self.need, &self.free) else { return Ok(None) };
        let search = Search { device: &self.device, checkpoint, load, engine, free: free.bytes };
        search.run()
    }
}

fn plan(
    device: &Arc<dyn Footprint>,
    checkpoint: &Checkpoint,
    load: LoadOptions,
    need: Need<'_>,
) -> Result<MemoryPlan, EngineError> {
    let rounded = load.quant.map(|grid| round(checkpoint, grid, load.rounds_blocks)).transpose()?;
    let tensors = rounded.as_ref().map_or(checkpoint.tensors(), |rounded| rounded);
    let config = served_config(checkpoint, load)?;
    let (run, host_tier_bytes) = match need {
        Need::Engine(options) => (run_sizes(&config, options)?, options.kv_host_bytes),
        Need::Run(sizes) => (sizes(&config), 0),
    };
    let needed = Needed::count(Arc::clone(device), &config, tensors, run)?;
    let mut layers: BTreeMap<DType, FormatBytes> = BTreeMap::new();
    let (mut embedding, mut head) = (None, None);
    for weight in &needed.weights {
        let (dtype, bytes) = (weight.shape.dtype, weight.bytes);
        let alone = FormatBytes { dtype, n_matrices: 1, bytes };
        match weight.name.as_str() {
            "token_embd.weight" => embedding = Some(alone),
            "output.weight" => head = Some(alone),
            _ => {
                let none = FormatBytes { dtype, n_matrices: 0, bytes: Extent::default() };
                let sum = layers.entry(dtype).or_insert(none);
                sum.n_matrices += 1;
                sum.bytes = sum.bytes.and(bytes);
            }
        }
    }
    let missing = || {
        let tensor = "token_embd.weight".to_owned();
        LoadError::MissingTensor { tensor, expected: vec![config.vocab_size, config.width] }
    };
    Ok(MemoryPlan {
        device: device.name(),
        layers: layers.into_values().collect(),
        embedding: embedding.ok_or_else(missing)?,
        head,
        vector_bytes: needed.vector_bytes,
        kv: run.kv,
        kv_bytes: needed.kv_bytes,
        max_rows: run.max_rows,
        scratch_bytes: needed.scratch_bytes,
        reserve: device.reserve(),
        host_tier_bytes,
        is_host: device.is_host(),
    })
}

/// What an engine with these options allocates beside the weights.
fn run_sizes(config: &DecoderConfig, options: EngineOptions) -> Result<RunSizes, EngineError> {
    let sizes = sizes(config, options)?;
    Ok(RunSizes {
        kv: kv_shape(config, sizes.kv_pages, options.kv_dtype),
        max_rows: options.prefill_chunk + options.max_sequences,
        max_logit_rows: SCORE_ROWS + options.max_sequences,
    })
}

/// What to change so that a plan fits; `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Weights rounded to this.
    pub quant: Option<IntGrid>,
    /// Element type of the KV cache.
    pub kv_dtype: Option<KvDtype>,
    /// Longest prompt plus answer in tokens.
    pub max_context: Option<usize>,
    /// Pages of the KV pool.
    pub kv_pages: Option<usize>,
    /// Bytes of all of it then, at most.
    pub total: usize,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quant = self.quant.map(|grid| format!("weights rounded to {}", grid.dtype()));
        let kv = self.kv_dtype.map(|dtype| format!("a KV cache in {}", kv_name(dtype)));
        let context = self.max_context.map(|n| format!("a context of {n} positions"));
        let pages = self.kv_pages.map(|n| format!("{n} KV pages"));
        let parts: Vec<String> = [quant, kv, context, pages].into_iter().flatten().collect();
        f.write_str(&parts.join(", "))
    }
}

/// The search for a [`Change`].
struct Search<'a> {
    device: &'a Arc<dyn Footprint>,
    checkpoint: &'a Checkpoint,
    load: LoadOptions,
    engine: EngineOptions,
    free: usize,
}

impl Search<'_> {
    fn run(&self) -> Result<Option<Change>, EngineError> {
        let mut quants = vec![self.load.quant];
        let rounds =
            |grid| self.load.quant.is_none() && round(self.checkpoint, grid, false).is_ok();
        quants.extend(
            [IntGrid::Int8, IntGrid::Int4]
                .map(Some)
                .into_iter()
                .filter(|grid| grid.is_some_and(rounds)),
        );
        let mut dtypes = vec![self.engine.kv_dtype];
        if self.engine.kv_dtype != KvDtype::Int8 {
            dtypes.push(KvDtype::Int8);
        }
        for quant in quants {
            for shorter in [false, true] {
                for &kv_dtype in &dtypes {
                    if let Some(change) = self.most_pages(quant, kv_dtype, shorter)? {
                        return Ok(Some(change));
                    }
                }
            }
        }
        Ok(None)
    }

    /// As many pages as fit, of those that were wanted; fewer than a context only where it may be
    /// `shorter`.
    fn most_pages(
        &self,
        quant: Option<IntGrid>,
        kv_dtype: KvDtype,
        shorter: bool,
    ) -> Result<Option<Change>, EngineError> {
        let load = LoadOptions { quant, ..self.load };
        let config = served_config(self.checkpoint, load)?;
        let wanted = sizes(&config, EngineOptions { kv_dtype, ..self.engine })?;
        let of = |kv_pages: usize, context: usize| {
            let max_context = Some(context);
            let load = LoadOptions { max_context, ..load };
            let kv_pages = Some(kv_pages);
            let engine = EngineOptions { kv_dtype, kv_pages, max_context, ..self.engine };
            plan(self.device, self.checkpoint, load, Need::Engine(engine))
        };
        let one = of(1, wanted.context.min(PAGE_TOKENS))?;
        let Some(room) = self.free.checked_sub(one.total().most - one.kv_bytes) else {
            return Ok(None);
        };
        let n_pages = (room / one.kv_bytes.max(1)).min(wanted.kv_pages);
        let whole = wanted.context.div_ceil(PAGE_TOKENS);
        let context = match n_pages {
            0 => return Ok(None),
            n if n >= whole => wanted.context,
            _ if !shorter => return Ok(None),
            n => n * PAGE_TOKENS,
        };
        let total = of(n_pages, context)?.total().most;
        let max_context = Some(context).filter(|&n| n != wanted.context);
        // What the options as they are would make of the new context is named only where it differs.
        let max_context_then = max_context.or(self.engine.max_context);
        let then = EngineOptions { kv_dtype, max_context: max_context_then, ..self.engine };
        let follows = sizes(&config, then).is_ok_and(|sizes| sizes.kv_pages == n_pages);
        Ok((total <= self.free).then_some(Change {
            quant: quant.filter(|_| quant != self.load.quant),
            kv_dtype: Some(kv_dtype).filter(|&dtype| dtype != self.engine.kv_dtype),
            max_context,
            kv_pages: Some(n_pages).filter(|_| !follows),
            total,
        }))
    }
}

/// Why a model was not loaded: the arithmetic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoesNotFit {
    /// What it needs.
    pub plan: MemoryPlan,
    /// What there is.
    pub free: Free,
    /// Bytes that lack at least.
    pub short: usize,
    /// The smallest change that makes it fit.
    pub change: Option<Change>,
}

impl fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DoesNotFit { plan, free, short, change } = self;
        let parts = plan
            .parts()
            .into_iter()
            .map(|(what, bytes)| format!("{what}: {}", Mebibytes(bytes.least)));
        let parts: Vec<String> = parts.collect();
        write!(
            f,
            "memory of {}: expected at most {} ({}), found {} needed, {} too many: {}; ",
            plan.device,
            Mebibytes(free.bytes),
            free.basis,
            Mebibytes(plan.total().least),
            Mebibytes(*short),
            parts.join(", "),
        )?;
        match change {
            Some(change) => write!(f, "fits with {change} ({})", Mebibytes(change.total)),
            None => write!(f, "no context, KV cache or rounding makes it fit"),
        }
    }
}

impl std::error::Error for DoesNotFit {}

/// Bytes for people, upwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mebibytes(
    /// Bytes.
    pub usize,
);

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Tenths, so that small parts do not read as nothing.
        let tenths = (10 * self.0 as u128).div_ceil(1 << 20);
        f.pad(&format!("{}.{} MiB", tenths / 10, tenths % 10))
    }
}

#[cfg(test)]
mod tests {
    use exrail_checkpoint::Gguf;
    use exrail_kernels::Ledger;
    use exrail_kernels_cpu::{CpuFootprint, CpuOptions};
    use exrail_testkit::{TinyLlama, tiny_llama};

    use super::*;
    use crate::counters::Gauges;
    use crate::handle::resolve;
    use crate::load::{Identity, prepare_generator};
    use crate::worker::Worker;

    #[test]
    fn a_plan_is_what_loading_and_starting_ask_of_a_device() {
        let device: Arc<dyn Footprint> = Arc::new(CpuFootprint::new(CpuOptions::default()));
        let checkpoint =
            Checkpoint::Gguf(Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap());
        let more =
            EngineOptions { max_sequences: 3, kv_pages: Some(5), ..EngineOptions::default() };
        let int8 = EngineOptions { kv_dtype: KvDtype::Int8, prefill_chunk: 64, ..more };
        for options in [EngineOptions::default(), more, int8] {
            let load = LoadOptions::default();
            let need = Need::Engine(options);
            let admission = Admission { device: Arc::clone(&device), free: None, need };
            let plan = admission.plan(&checkpoint, load).unwrap();

            let ledger = Ledger::new(Arc::clone(&device));
            let who = Identity { name: "tiny".to_owned(), sha256: String::new() };
            let loaded =
                prepare_generator(ledger.clone(), &checkpoint, who, load, &mut |_| {}).unwrap();
            let entries = ledger.take();
            let weights = entries.weights.iter().map(|weight| weight.bytes);
            let weights = weights.fold(Extent::exactly(entries.buffer_bytes), Extent::and);
            let facts = resolve(&loaded, options).unwrap();
            let gauges = Arc::new(Gauges::new(facts.kv_pages));
            let (_commands, receiver) = flume::unbounded();
            let _worker = Worker::new(loaded, &facts, receiver, gauges).unwrap();
            let started = ledger.take();
            assert_eq!(plan.scratch_bytes, started.buffer_bytes, "{options:?}");
            assert_eq!((plan.kv_bytes, plan.kv.n_pages), (started.kv_bytes, facts.kv_pages));
            let all = weights
                .and(Extent::exactly(started.buffer_bytes + started.kv_bytes + plan.reserve.bytes));
            assert_eq!(plan.total(), all, "{options:?}");
        }
    }

    #[test]
    fn a_plan_fits_up_to_the_last_byte() {
        let device: Arc<dyn Footprint> = Arc::new(CpuFootprint::new(CpuOptions::default()));
        let checkpoint =
            Checkpoint::Gguf(Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap());
        let need = Need::Engine(EngineOptions::default());
        let mut plan = plan(&device, &checkpoint, LoadOptions::default(), need).unwrap();
        let total = plan.total().most;
        let of = |bytes| Some(Free { bytes, basis: String::new() });
        assert_eq!(plan.fit(of(total + 3).as_ref()), Fit::Fits { left: 3 });
        assert_eq!(plan.fit(of(total).as_ref()), Fit::Fits { left: 0 });
        assert_eq!(plan.fit(of(total - 1).as_ref()), Fit::DoesNotFit { short: 1 });
        assert_eq!(plan.fit(None), Fit::NotAvailable);
        // Matrices that may be smaller: nothing is certain until the least is too much.
        plan.embedding.bytes.least -= 10;
        assert_eq!(plan.fit(of(total - 4).as_ref()), Fit::MayFit { short: 4 });
        assert_eq!(plan.fit(of(total - 10).as_ref()), Fit::MayFit { short: 10 });
        assert_eq!(plan.fit(of(total - 11).as_ref()), Fit::DoesNotFit { short: 1 });
        assert_eq!(Mebibytes(1).to_string(), "0.1 MiB");
        assert_eq!(Mebibytes(3 << 20).to_string(), "3.0 MiB");
    }
}
