//! The engine behind the oracle of the KV cache.

use exrail_engine::EngineHandle;
use exrail_kernels::KvDtype;
use exrail_verify::{CacheOracle, GenerateError, KvWidth};
use std::num::NonZeroUsize;

/// An engine whose cache is to be compared. Its scores take pages and steps beside other traffic, read no
/// prefixes of the cache and leave none.
#[derive(Debug)]
pub struct EngineOracle<'a> {
    engine: &'a EngineHandle,
}

impl<'a> EngineOracle<'a> {
    /// Of this engine.
    #[must_use]
    pub fn new(engine: &'a EngineHandle) -> Self {
        Self { engine }
    }

    /// Width of its cache's elements.
    #[must_use]
    pub fn width(&self) -> KvWidth {
        match self.engine.facts().kv_dtype {
            KvDtype::F32 | KvDtype::F16 => KvWidth::Sixteen,
            KvDtype::Int8 => KvWidth::Eight,
        }
    }
}

impl CacheOracle for EngineOracle<'_> {
    fn live(
        &self,
        ids: &[u32],
        every: NonZeroUsize,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), GenerateError> {
        self.engine.score_steps(ids.to_vec(), every, visit).map_err(failed)
    }

    fn rows(&self, ids: &[u32], visit: &mut dyn FnMut(usize, &[f32])) -> Result<(), GenerateError> {
        self.engine.score(ids.to_vec(), visit).map_err(failed)
    }

    fn violations(&self) -> u64 {
        self.engine.counters().kv_faults
    }
}

/// A failure of the engine as one of the generator.
pub(crate) fn failed(error: impl std::error::Error + Send + Sync + 'static) -> GenerateError {
    GenerateError::Engine(Box::new(error))
}
