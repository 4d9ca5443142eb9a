//! The gateway: the guards of exrail in front of a server that somebody runs already.
//!
//! A request flows one way: route → what it demands → an upstream whose fence is open → its answer, judged → trace →
//! response. Kinds of upstreams are data ([`kind`]); what one of them can do is tested ([`probe`]), not believed; none is
//! asked before it has generated ([`FenceOptions`]); and what one did instead of answering has a name
//! ([`UpstreamFault`]).

mod capability;
mod client;
mod demand;
mod detect;
mod error;
mod events;
mod fault;
mod fleet;
pub mod kind;
mod metrics;
mod probe;
mod relay;
mod reply;
mod serve;
mod settle;
mod state;
mod streaming;
mod upstream;
mod warm_up;

pub use capability::{Ability, Answer, Capabilities, Capability, Source};
pub use client::{AddressError, Client};
pub use detect::{Detected, detect};
pub use fault::UpstreamFault;
pub use probe::probe;
pub use serve::{router, serve};
pub use state::{Gateway, GatewayOptions};
pub use upstream::{Fence, FencePhase, Proved, Upstream, UpstreamOptions, WarmUp};
pub use warm_up::FenceOptions;
