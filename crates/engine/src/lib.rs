//! The engine: one thread that owns a decoder, its KV pages and every running sequence.
//!
//! Way in: [`load_generator`] → [`Engine::start`] → [`EngineHandle::submit`] → events of a
//! [`Generation`]. Requests go in as messages, events come out of a channel; nothing here is behind
//! a lock, and nothing knows HTTP or async.
//!
//! - `request`, `event`, `error`: what goes in and comes out.
//! - `handle`, `worker`: the two ends of the command channel. `worker` documents faults, and its `step`
//!   what is in flight on a device that runs ahead.
//! - `scheduler`, `sequence`: which rows run, and what a sequence is. `scheduler` says why nothing can
//!   wedge.
//! - `cache`: who owns which KV page, which prefixes are shared, and what is kept in the host's memory.
//! - `session`: pages that are saved to disk and restored.
//! - `rotation`: what becomes of an answer that outgrows its place in the cache; `open_json` says when it waits.
//! - `sampler`, `distribution`, `philox`, `output`: from logits to text.
//! - `constraint`: the grammar of a sequence; `masks`: the threads that compute its masks beside a step.
//! - `plan`: what all of it takes on a device, before anything does.
//! - `preflight`: what a manifest declares of a model, and what its files say.
//! - `fingerprint`: the model's hash, known some time after the engine answers.
//! - `faults`: what goes wrong on demand, in tests and with feature `faults`.
//! - `warm_up`: the fence before the first user token; `fence`: what the device builds behind it.
//! - `encoder`: the sentence encoder.

mod cache;
mod checksum;
mod constraint;
mod counters;
mod distribution;
mod encoder;
mod error;
mod event;
mod faults;
mod fence;
mod fingerprint;
mod handle;
mod load;
mod loops;
mod losses;
mod masks;
mod open_json;
mod output;
mod pace;
mod philox;
mod places;
mod plan;
mod preflight;
mod queue;
mod request;
mod roll_back;
mod rotation;
mod sampler;
mod scheduler;
mod sequence;
mod session;
mod spans;
mod warm_up;
mod worker;

pub use cache::PageFault;
pub use counters::{Counters, EngineState, GrammarCounters, HostCounters};
pub use encoder::SentenceEncoder;
pub use error::{EngineError, ScoreError, SubmitError};
pub use event::{
    Alternative, Constrained, Event, Finish, Finished, Generation, LOW_MASS_STEPS, LatePhase,
    MIN_ALLOWED_MASS, SequenceFault, SequenceId, Timings, TokenEvent, TokenLogprob, Usage,
};
pub use faults::{Fault, FaultBoard, FaultPlan, Guard, Guards, InjectedFaults};
pub use fingerprint::{FingerprintError, FingerprintState, HashProgress, ModelFingerprint};
pub use handle::{Engine, EngineFacts, EngineHandle, EngineOptions};
pub use load::{
    CheckedGenerator, Identity, LoadOptions, Loaded, check_generator, load_admitted,
    load_generator, prepare_generator,
};
pub use loops::{LoopGuard, OnLoop};
pub use losses::{
    StandsOut, WeightLoss, Yardstick, checkpoint_losses, rounding_losses, standing_out,
};
pub use plan::{
    Admission, Change, DoesNotFit, Fit, FormatBytes, Free, Mebibytes, MemoryPlan, Need,
};
pub use preflight::{Class, FEWEST_GOLDEN, Manifest, PreflightError, ROUND_TRIP, Row};
pub use request::{
    GenerateRequest, MAX_LOGIT_BIAS, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, Priority,
    Sampling,
};
pub use rotation::{
    DEFAULT_ROTATE_AT, DEFAULT_SINK, DEFAULT_WINDOW, MAX_HELD_TOKENS, MAX_ROTATED_TOKENS,
    RotatePolicy, Rotated, Rotation, RotationOptions,
};
pub use session::{
    Difference, Listed, Memory, Remembered, SavedSession, Saving, SessionError, SessionName,
    SessionOwner, SessionState, SessionStore,
};
pub use spans::Exempt;
pub use warm_up::{
    BucketReport, Prompt, WarmUpError, WarmUpPlan, WarmUpReport, warm_up, warm_up_told,
};
