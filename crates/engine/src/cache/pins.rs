//! Under which conditions keys and values may be read again (G-25).

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use exrail_checkpoint::sha256_hex;
use exrail_kernels::{Backend, KvDtype};

use crate::faults::{Fault, Switchboard};
use crate::load::Loaded;

/// Everything that the engine knows to decide about the bits of a key or a value, beside the tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Pins {
    /// Hex sha256 of the model's files. `None` until it is known: the weights that this engine holds,
    /// which have no name yet.
    pub(crate) model_sha256: Option<String>,
    /// Format of the weights as they are on the device, and that of the KV cache.
    formats: (String, KvDtype),
    /// Device and kernels with activation mode and batch invariance.
    backend: String,
    /// `tok_fp`.
    tokenizer: String,
    /// Architecture with rope, context and windows, in full.
    config: String,
    /// Version of this program.
    build: &'static str,
}

impl Pins {
    /// The pins of a loaded model whose cache has this element type.
    pub(crate) fn of<B: Backend>(loaded: &Loaded<B>, kv_dtype: KvDtype) -> Pins {
        Pins {
            model_sha256: loaded.model_sha256.get().map(str::to_owned),
            formats: (loaded.quant.clone(), kv_dtype),
            backend: loaded.backend.name(),
            tokenizer: loaded.tokenizer.fingerprint().to_owned(),
            config: format!("{:?}", loaded.config),
            build: env!("CARGO_PKG_VERSION"),
        }
    }

    /// Each with its name, for files that outlive this process; `None` while the model has no name.
    pub(crate) fn named(&self) -> Option<Vec<(String, String)>> {
        let Pins { model_sha256, formats: (weights, kv), backend, tokenizer, config, build } = self;
        let pins = [
            ("model_sha256", model_sha256.clone()?),
            ("weights", weights.clone()),
            ("kv_dtype", format!("{kv:?}")),
            ("device", backend.clone()),
            ("tokenizer", tokenizer.clone()),
            // In full it is a page of text that nobody compares by eye.
            ("architecture", sha256_hex(config.as_bytes())),
            ("build", (*build).to_owned()),
        ];
        Some(pins.map(|(name, value)| (name.to_owned(), value)).to_vec())
    }
}

#[cfg(test)]
impl Pins {
    /// Pins of no engine.
    pub(crate) fn for_tests(model_sha256: &str, kv_dtype: KvDtype) -> Pins {
        Pins {
            model_sha256: Some(model_sha256.to_owned()),
            formats: ("F32".to_owned(), kv_dtype),
            backend: String::new(),
            tokenizer: String::new(),
            config: String::new(),
            build: "",
        }
    }
}

/// Whose prefixes: one set of pins and one tenant. Nothing is read across two of them.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    pub(crate) pins: Arc<Pins>,
    /// `None` is the default tenant, which no name is.
    pub(crate) tenant: Option<Arc<str>>,
}

impl Namespace {
    /// Whether contents of one may be read in the other.
    pub(super) fn is(&self, other: &Namespace, ignores_tenant: bool) -> bool {
        let same_tenant = ignores_tenant || self.tenant == other.tenant;
        same_tenant && (Arc::ptr_eq(&self.pins, &other.pins) || self.pins == other.pins)
    }

    /// [`Namespace::is`] by the rules of now.
    pub(super) fn is_as(&self, other: &Namespace, switchboard: &Switchboard) -> bool {
        self.is(other, switchboard.injects(Fault::OneTenant))
    }

    /// Feeds what [`Namespace::is`] compares.
    pub(super) fn hash_into(&self, hasher: &mut impl Hasher, ignores_tenant: bool) {
        self.pins.hash(hasher);
        if !ignores_tenant {
            self.tenant.hash(hasher);
        }
    }
}
