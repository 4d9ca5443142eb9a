//! What everybody may know of the models: their states, and what was counted.

use std::{sync::Arc, time::Duration};

use crate::{boot::BootBoard, state::Services};

/// What a model is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelState {
    /// Not loaded; a request loads it.
    Unloaded,
    /// In the phases of its boot, or waiting for its place.
    Loading,
    /// Answering.
    Loaded,
    /// Finishing what it has, because another model was asked for.
    Draining,
    /// Giving its memory back.
    Unloading,
    /// Could not be loaded, and is not tried again for a while.
    Failed,
}

impl ModelState {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Unloaded,
        Self::Loading,
        Self::Loaded,
        Self::Draining,
        Self::Unloading,
        Self::Failed,
    ];

    /// The name in answers and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unloaded => "unloaded",
            Self::Loading => "loading",
            Self::Loaded => "loaded",
            Self::Draining => "draining",
            Self::Unloading => "unloading",
            Self::Failed => "failed",
        }
    }
}

/// One model.
#[derive(Clone, Debug)]
pub struct ModelStatus {
    /// Its name in requests.
    pub name: Arc<str>,
    /// What it is doing.
    pub state: ModelState,
    /// Why it could not be loaded last; none once it could.
    pub reason: Option<Arc<str>>,
    /// Requests that use it.
    pub running: usize,
    /// Requests that wait for it.
    pub waiting: usize,
    /// Loads that succeeded, the first one included.
    pub loads: u64,
    /// Loads that did not.
    pub failures: u64,
    /// Time of the last load that succeeded, without the wait for its place.
    pub load_time: Option<Duration>,
    /// The phases of its load, while there is one.
    pub board: Option<Arc<BootBoard>>,
}

/// What was counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Models that gave their place to another.
    pub swaps: u64,
    /// Models that were unloaded because nobody asked for them.
    pub idle_unloads: u64,
    /// Requests whose model went before they had ended.
    pub cut: u64,
    /// Requests that were not let wait.
    pub refused: u64,
    /// Time of all loads that succeeded.
    pub load_time: Duration,
}

/// Every model.
#[derive(Clone)]
pub struct Lineup {
    /// In the order in which they were given; the first one is what a request without a name gets.
    pub models: Vec<ModelStatus>,
    /// The one that answers now.
    pub loaded: Option<Arc<Services>>,
    /// Why nothing is answered until the server is started again, if that is so.
    pub stuck: Option<Arc<str>>,
    /// What was counted.
    pub totals: Totals,
}

impl Lineup {
    /// The place of a name.
    #[must_use]
    pub fn index(&self, name: &str) -> Option<usize> {
        self.models.iter().position(|model| &*model.name == name)
    }

    /// The names, for a refusal.
    #[must_use]
    pub fn known(&self) -> String {
        let names = self.models.iter().map(|model| format!("`{}`", model.name));
        names.collect::<Vec<_>>().join(", ")
    }

    /// Why no request would be answered now, if that is so.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        if let Some(stuck) = &self.stuck {
            return Some(stuck.to_string());
        }
        let all_failed = self.models.iter().all(|model| model.state == ModelState::Failed);
        let reason = |model: &ModelStatus| {
            let reason = model.reason.as_deref().unwrap_or("unknown");
            format!("model `{}` could not be loaded: {reason}", model.name)
        };
        all_failed.then(|| self.models.iter().map(reason).collect::<Vec<_>>().join("; "))
    }
}
