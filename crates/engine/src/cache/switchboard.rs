//! Faults on demand for tests. In any other build every question is answered `false` by a constant, and
//! nothing of it is left.

/// A rule of the cache that can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A reader of a shared page is not counted.
    SkipReference,
    /// The next allocation gets a page that somebody holds.
    ReuseEarly,
    /// A page that becomes free keeps its generation.
    KeepGeneration,
    /// All contents have one hash.
    OneHash,
    /// A content is taken by its hash alone.
    TrustHash,
    /// The tenant is no part of the namespace.
    OneTenant,
}

/// Which rules are broken now, and whether anybody looks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Switchboard {
    #[cfg(test)]
    pub(crate) faults: Vec<Fault>,
    #[cfg(test)]
    pub(crate) guards_off: bool,
}

#[cfg(test)]
impl Switchboard {
    /// Whether the rule is broken.
    pub(crate) fn injects(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }

    /// Whether checks and audits find nothing, whatever there is.
    pub(crate) fn guards_are_off(&self) -> bool {
        self.guards_off
    }
}

#[cfg(not(test))]
#[expect(clippy::unused_self, reason = "the same calls as in tests, without a state")]
impl Switchboard {
    /// Never.
    pub(crate) const fn injects(&self, _: Fault) -> bool {
        false
    }

    /// Never.
    pub(crate) const fn guards_are_off(&self) -> bool {
        false
    }
}
