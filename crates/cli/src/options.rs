//! Options that several commands share.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use exrail_engine::{EngineOptions, LoadOptions, RotatePolicy, RotationOptions, SessionStore};
use exrail_hub::{Cache, Fetch, Kind, Registry, Resolved};
use exrail_kernels::{Activation, KvDtype};
use exrail_kernels_cpu::CpuOptions;
use exrail_server::{Keys, Phase, SessionKeeper, SwapLimits};
use exrail_tensor::IntGrid;
use serde::Serialize;

#[cfg(feature = "faults")]
use crate::boot_fault::BootFault;
use crate::{device::DeviceOption, environment, memory, progress::Bars};

/// The generator that is used when none is named.
pub(crate) const DEFAULT_MODEL: &str = "smollm2-135m-instruct";
/// The encoder that is used when none is named.
pub(crate) const DEFAULT_ENCODER: &str = "all-minilm-l6-v2";

/// Where models come from.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Models")]
pub(crate) struct Sources {
    /// Registry file instead of the built-in one.
    #[arg(long, value_name = "FILE", env = environment::REGISTRY)]
    pub(crate) registry: Option<PathBuf>,
    /// Use cached models only; never download.
    #[arg(long, env = environment::OFFLINE)]
    pub(crate) offline: bool,
}

impl Sources {
    pub(crate) fn registry(&self) -> Result<Registry> {
        Ok(match &self.registry {
            Some(file) => Registry::read(file)?,
            None => Registry::embedded(),
        })
    }

    pub(crate) fn fetch(&self) -> Fetch {
        if self.offline { Fetch::Never } else { Fetch::IfMissing }
    }

    /// The generator that a name or path stands for, which need not be here yet.
    pub(crate) fn expected(&self, name: &str) -> Result<Resolved> {
        Ok(Cache::locate()?.expected(&self.registry()?, name, Kind::Generator)?)
    }

    /// A name or path to something that can be loaded.
    pub(crate) fn resolve(&self, name: &str, kind: Kind, bars: &mut Bars) -> Result<Resolved> {
        let cache = Cache::locate()?;
        Ok(cache.resolve(&self.registry()?, name, kind, self.fetch(), bars)?)
    }
}

/// How activations meet quantised weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ActivationOption {
    /// Rounded to int8 per 32 values: fast.
    Int8,
    /// 32-bit floats: exact, slower.
    F32,
}

/// The element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum KvOption {
    /// Half precision.
    F16,
    /// 32-bit floats.
    F32,
    /// Eight bits, with a scale for each key and each value.
    Int8,
}

/// What happens to an answer that outgrows its place in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum RotateOption {
    /// Nothing: prompt plus max_tokens must fit the context.
    Off,
    /// It goes on from what is pinned and the last tokens.
    Reprefill,
    /// It goes on from what is pinned, the first and the last tokens, which stay in the cache as they are.
    SinkWindow,
    /// It ends with the reason context_rotation_required.
    Stop,
}

impl RotateOption {
    fn policy(self) -> RotatePolicy {
        match self {
            RotateOption::Off => RotatePolicy::Off,
            RotateOption::Reprefill => RotatePolicy::Reprefill,
            RotateOption::SinkWindow => RotatePolicy::SinkWindow,
            RotateOption::Stop => RotatePolicy::Stop,
        }
    }
}

/// A width that 16-bit weights are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum QuantOption {
    /// 4 bits a weight.
    Int4,
    /// 8 bits a weight.
    Int8,
}

impl QuantOption {
    /// The grid of the weights.
    pub(crate) fn grid(self) -> IntGrid {
        match self {
            QuantOption::Int4 => IntGrid::Int4,
            QuantOption::Int8 => IntGrid::Int8,
        }
    }
}

/// The generator and the device.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// Generator: a name of the registry, a GGUF file or a Hugging Face folder.
    #[arg(long, value_name = "NAME|PATH", default_value = DEFAULT_MODEL, env = environment::MODEL)]
    pub(crate) model: String,
    /// Device of the generator: auto (the first GPU, or else the CPU), cpu or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "auto", env = environment::DEVICE)]
    pub(crate) device: DeviceOption,
    /// Threads of the CPU; one per physical core when absent.
    #[arg(long, value_name = "N", env = environment::THREADS)]
    pub(crate) threads: Option<usize>,
    /// Round the matrices of a 16-bit model to this width while it is loaded; the embedding and the
    /// head get 8 bits.
    #[arg(long, value_enum)]
    pub(crate) quant: Option<QuantOption>,
    /// Whether --quant may round blocks, for a comparison.
    #[arg(skip)]
    pub(crate) rounds_blocks: bool,
    /// How activations meet quantised weights.
    #[arg(long, value_enum, default_value = "int8")]
    pub(crate) activation: ActivationOption,
    /// Give every answer the same bits whatever runs beside it: on a GPU, batches then do without tensor
    /// cores. The CPU always does.
    #[arg(long)]
    pub(crate) batch_invariant: bool,
    /// Element type of the KV cache.
    #[arg(long, value_enum, default_value = "f16")]
    pub(crate) kv: KvOption,
    /// Sequences that run at once.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) max_sequences: usize,
    /// Pages of 256 tokens in the KV pool; up to 1 GiB when absent.
    #[arg(long, value_name = "N")]
    pub(crate) kv_pages: Option<usize>,
    /// Longest prompt plus answer in tokens; the trained context when absent.
    #[arg(long, value_name = "N")]
    pub(crate) max_context: Option<usize>,
    /// Memory of the device that may be used, such as 24GiB; what it says is free when absent. A model
    /// that takes more is refused before it is loaded, see `exrail plan`.
    #[arg(long, value_name = "SIZE", value_parser = memory::parse, env = environment::MEMORY)]
    pub(crate) memory: Option<usize>,
    /// Compute every prompt in full, instead of sharing the pages of prompts that begin alike.
    #[arg(long)]
    pub(crate) no_prefix_cache: bool,
    /// MiB of the host's memory for KV pages that must make room on the device, taken at the start; they come
    /// back instead of being computed again. For GPUs: on the CPU --kv-pages does the same without copies.
    #[arg(long, value_name = "MIB", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(0..=1 << 30))]
    pub(crate) kv_host_mib: u64,
    /// Steps between two audits of the whole KV pool.
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().kv_audit_every)]
    pub(crate) kv_audit_every: u64,
    /// Of the server's answers.
    #[arg(skip = EngineOptions::default().rotation)]
    pub(crate) rotation: RotationOptions,
    /// What every deadline of the boot is multiplied by, for slow machines; see `exrail boot --plan`.
    #[arg(long, value_name = "N", default_value_t = 1, env = environment::BOOT_PATIENCE,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) boot_patience: u32,
    /// Requests that may wait for a place; more are answered 503.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) queue_limit: usize,
    /// Requests of one API key that may wait for a place; more are answered 429. Half of --queue-limit
    /// when absent and the server has several keys, else all of it.
    #[arg(long, value_name = "N")]
    pub(crate) tenant_queue_limit: Option<usize>,
    /// Do wrong in one phase of the boot, for tests of what comes of it.
    #[cfg(feature = "faults")]
    #[arg(long, value_name = "PHASE=KIND", hide = true)]
    pub(crate) inject_boot: Option<BootFault>,
}

impl EngineArgs {
    /// Does to a phase that has begun what was asked for.
    #[cfg(feature = "faults")]
    pub(crate) fn disturb(&self, phase: Phase) -> Result<()> {
        self.inject_boot.as_ref().map_or(Ok(()), |fault| fault.strike(phase))
    }

    /// Nothing is injected by this program.
    #[cfg(not(feature = "faults"))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "as with faults")]
    pub(crate) fn disturb(&self, _: Phase) -> Result<()> {
        Ok(())
    }

    /// For a server with so many API keys.
    pub(crate) fn for_keys(&self, n_keys: usize) -> EngineArgs {
        let half = (n_keys > 1).then_some(self.queue_limit.div_ceil(2));
        EngineArgs { tenant_queue_limit: self.tenant_queue_limit.or(half), ..self.clone() }
    }

    pub(crate) fn load(&self) -> LoadOptions {
        let quant = self.quant.map(QuantOption::grid);
        LoadOptions { max_context: self.max_context, quant, rounds_blocks: self.rounds_blocks }
    }

    pub(crate) fn cpu(&self) -> CpuOptions {
        let activation = match self.activation {
            ActivationOption::Int8 => Activation::Int8,
            ActivationOption::F32 => Activation::F32,
        };
        CpuOptions { threads: self.threads, activation, ..CpuOptions::default() }
    }

    pub(crate) fn engine(&self) -> EngineOptions {
        EngineOptions {
            max_sequences: self.max_sequences,
            kv_pages: self.kv_pages,
            max_context: self.max_context,
            kv_dtype: match self.kv {
                KvOption::F16 => KvDtype::F16,
                KvOption::F32 => KvDtype::F32,
                KvOption::Int8 => KvDtype::Int8,
            },
            queue_limit: self.queue_limit,
            tenant_queue_limit: self.tenant_queue_limit,
            prefix_cache: !self.no_prefix_cache,
            kv_host_bytes: usize::try_from(self.kv_host_mib << 20).unwrap_or(usize::MAX),
            kv_audit_every: self.kv_audit_every,
            rotation: self.rotation,
            ..EngineOptions::default()
        }
    }
}

/// What happens to answers that outgrow their place in the cache, unless their request says otherwise.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Rotation")]
pub(crate) struct RotateArgs {
    /// What happens to an answer that outgrows its place in the cache.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "reprefill")]
    rotate: RotateOption,
    /// Tokens of prompt and answer at which that happens; 8,192 when absent, less where the context is
    /// small.
    #[arg(long, value_name = "N")]
    rotate_at: Option<usize>,
    /// Last tokens that a rotation keeps; 4,096 when absent, at most half of --rotate-at.
    #[arg(long, value_name = "N")]
    rotate_window: Option<usize>,
    /// First tokens that the policy `sink_window` keeps beside them; 4 when absent.
    #[arg(long, visible_alias = "sink", value_name = "N")]
    rotate_sink: Option<usize>,
}

impl RotateArgs {
    pub(crate) fn options(self) -> RotationOptions {
        let policy = self.rotate.policy();
        let RotateArgs { rotate_at, rotate_window: window, rotate_sink: sink, .. } = self;
        RotationOptions { policy, rotate_at, window, sink }
    }
}

/// Conversations whose keys and values outlive the server.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sessions")]
pub(crate) struct SessionArgs {
    /// Folder of saved sessions; none are kept when absent, since they hold what was said.
    #[arg(long, value_name = "DIR")]
    session_dir: Option<PathBuf>,
    /// MiB of all saved sessions; the longest unused go first.
    #[arg(long, value_name = "MIB", default_value_t = 4096, requires = "session_dir",
          value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    session_mib: u64,
}

impl SessionArgs {
    /// The owner of the folder, if there is one.
    pub(crate) fn keeper(&self) -> Result<Option<SessionKeeper>> {
        let Some(folder) = &self.session_dir else { return Ok(None) };
        let store = SessionStore::open(folder, self.session_mib << 20)?;
        Ok(Some(SessionKeeper::start(store).context("thread of the sessions")?))
    }
}

/// Further generators, of which one at a time is loaded.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Models")]
pub(crate) struct SwapArgs {
    /// Further generator, loaded in place of the loaded one when a request's `model` names it; may be
    /// repeated. The options under Engine hold for all of them.
    #[arg(long, value_name = "NAME|PATH")]
    pub(crate) also: Vec<String>,
    /// Unload the generator after so many seconds without a request; the next request loads it again. Never
    /// when absent.
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    idle_unload: Option<u64>,
    /// Seconds that a generator with work keeps its turn while another one is asked for.
    #[arg(long, value_name = "S", default_value_t = 10)]
    swap_turn_s: u64,
    /// Seconds that running requests get when their generator has to go; then they fail.
    #[arg(long, value_name = "S", default_value_t = 60)]
    swap_drain_s: u64,
}

impl SwapArgs {
    /// With the places of the engine's queue.
    pub(crate) fn limits(&self, engine: &EngineArgs) -> SwapLimits {
        SwapLimits {
            waiting: engine.queue_limit,
            tenant_waiting: engine.tenant_queue_limit.unwrap_or(engine.queue_limit),
            turn: Duration::from_secs(self.swap_turn_s),
            drain: Duration::from_secs(self.swap_drain_s),
            idle_unload: self.idle_unload.map(Duration::from_secs),
            ..SwapLimits::default()
        }
    }
}

/// The encoder.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Retrieval")]
pub(crate) struct EncoderArgs {
    /// Sentence encoder: a name of the registry or a sentence-transformers folder.
    #[arg(
        long,
        value_name = "NAME|DIR",
        default_value = DEFAULT_ENCODER,
        env = environment::ENCODER
    )]
    pub(crate) encoder: String,
}

/// Who may ask.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Access")]
pub(crate) struct Access {
    /// File with API keys, one a line, each alone or followed by its role, user or admin; `#` begins a comment.
    /// Read again when it changes or on SIGHUP. Further keys may be in EXRAIL_API_KEYS, between commas. Needed
    /// for a non-loopback address.
    #[arg(long, value_name = "FILE", env = environment::API_KEY_FILE)]
    pub(crate) api_key_file: Option<PathBuf>,
}

impl Access {
    pub(crate) fn keys(&self) -> Result<Keys> {
        let keys = self.read()?;
        Keys::new(keys.iter().map(String::as_str)).context("API keys")
    }

    /// A key to ask one's own server with.
    pub(crate) fn first_key(&self) -> Result<Option<String>> {
        let first = self.read()?.into_iter().next();
        Ok(first.and_then(|line| line.split_ascii_whitespace().next().map(str::to_owned)))
    }

    /// The keys of the file and of the environment, each with its role if it has one.
    fn read(&self) -> Result<Vec<String>> {
        let mut keys = match &self.api_key_file {
            Some(file) => keys_of_file(file)?,
            None => Vec::new(),
        };
        if let Some(listed) = std::env::var_os(environment::API_KEYS) {
            let Some(listed) = listed.to_str() else {
                bail!("{}: expected visible ASCII characters only", environment::API_KEYS);
            };
            let listed = listed.split(',').map(str::trim).filter(|key| !key.is_empty());
            let before = keys.len();
            keys.extend(listed.map(str::to_owned));
            if keys.len() == before {
                // Whoever sets it wants a server with keys, and would get one without.
                bail!("{}: expected at least one key, found none", environment::API_KEYS);
            }
        }
        Ok(keys)
    }
}

fn keys_of_file(file: &Path) -> Result<Vec<String>> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("API keys {}", file.display()))?;
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<_> = lines.map(str::to_owned).collect();
    if keys.is_empty() {
        bail!("API keys {}: expected at least one key, found none", file.display());
    }
    Ok(keys)
}
