//! What shapes the answers that go on from a session beside its tokens: the state of G-22, by which a turn with
//! other tools or another system message is told from one that goes on.
//!
//! Sampling is no part of it: it changes no answer that was given, and every request has its own.

use exrail_engine::SessionState;
use exrail_text::ChatMessage;
use sha2::{Digest, Sha256};

use crate::{generation::hex, state::Services, structured::Demand};

/// Whether answers are kept from repeating the system messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeakWatch {
    On,
    Off,
}

impl LeakWatch {
    /// Of a switch.
    pub(crate) fn of(is_on: bool) -> LeakWatch {
        if is_on { LeakWatch::On } else { LeakWatch::Off }
    }
}

/// Of a chat with these messages, as they were sent.
pub(crate) fn of_chat(
    services: &Services,
    said: &[ChatMessage],
    demand: &Demand,
    watch: LeakWatch,
) -> SessionState {
    let mut state = of_text(demand);
    let contents = said.iter().filter(|message| message.role == "system");
    state.system_rev = system_rev(contents.map(|message| message.content.as_deref().unwrap_or("")));
    if let Some(template) = services.engine.template() {
        state.policy.push(("template_hash".into(), template.sha256().into()));
    }
    if watch == LeakWatch::On {
        state.policy.push(("leak_guard".into(), "on".into()));
    }
    state
}

/// Of a text, which has no messages and no template.
pub(crate) fn of_text(demand: &Demand) -> SessionState {
    let policy = demand.policy().map(|(name, hash)| (name.to_owned(), hash));
    SessionState { system_rev: system_rev([]), policy: policy.into_iter().collect() }
}

/// SHA-256 over the texts, each with its length before it.
fn system_rev<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hex(&hash.finalize())
}
