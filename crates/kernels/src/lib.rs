//! The device contract: trait [`Backend`] names about thirty fused operations, [`mod@reference`] defines
//! each of them in plain scalar f32, and the conformance suite holds every other implementation to
//! that definition. [`Footprint`] says what a device would allocate, and [`Ledger`] counts it. Nothing
//! here knows a model or a device.

mod backend;
pub mod conformance;
mod draw;
mod footprint;
mod ledger;
pub mod reference;

pub use backend::{
    Activation, AttentionShape, AttentionSpan, Backend, DeviceCounters, GateActivation, HeadNorms,
    HeadRows, InputRounding, KernelError, KvDtype, KvMove, KvShape, KvSlot, Largest, NormKind,
    Normed, PAGE_TOKENS, PageId, Places, Rope, RopeStyle, Span, TokenId, WeightView, int8_scale,
};
pub use draw::{Draw, DrawScratch, Draws, all_finite, argmax, exp_nonpositive, maximum};
pub use footprint::{Extent, Footprint, Reserve, WeightShape};
pub use ledger::{Entries, Ledger, LedgerWeight};
