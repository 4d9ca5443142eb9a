//! The HTTP server: routes, boot phases, keys, traces.
//!
//! A request flows one way: route → wire type → [`translate`](self) → engine → validators → trace →
//! response. Nothing here samples, searches or judges; it calls those who do.

// The support of the HTTP tests, which a test of ours reads as well, calls this crate by its name.
#[cfg(test)]
extern crate self as exrail_server;

mod answer_record;
pub mod auth;
mod baseline;
pub mod boot;
mod diagnostics;
mod echo;
mod error;
mod extract;
mod generation;
mod ids;
mod leak;
mod messages;
mod observe;
mod odd;
pub mod oracle;
pub mod otlp;
pub mod pipeline;
mod relay;
mod rotation;
mod routes;
mod rules;
pub mod sentinel;
mod serve;
mod sessions;
pub mod sse;
mod state;
mod structured;
pub mod swap;
mod table;
mod tool_circuit;
mod trace;
mod translate;
pub mod writing;

pub use answer_record::Recorded;
pub use auth::{Caller, KeyError, KeyRing, Keys, Role, identify};
pub use boot::{
    BootBoard, BootFault, BootOwner, BootPlan, BootProgress, BootState, BootStatus, Deadline, Node,
    NotProved, Pace, Phase, PhaseRecord, Retrieval,
};
pub use diagnostics::{Diagnostics, DiagnosticsError};
pub use error::ApiError;
pub use extract::read_body;
pub use ids::name as random_name;
pub use otlp::{
    OtlpError, OtlpOptions, OtlpProtocol, RequestSpans, SpanContent, SpanCounts, SpanExport,
};
pub use serve::{ServeError, bind, bind_with, router, serve, serve_router};
pub use sessions::SessionKeeper;
pub use state::{AppState, ENGINE_BUILD, Limits, ServedEncoder, Services, Shelf, StructuredLimits};
pub use swap::{Fleet, LoadCall, Loader, NotVacated, SwapLimits};
pub use table::{Access, ROUTES, Route};
pub use trace::{TraceError, TraceIdentity, TraceLog, TraceMode};
pub use translate::chat_prompt;
