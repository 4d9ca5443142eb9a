//! Sessions of clients, behind their fence (G-22): the thread that owns the folder, one call after the other, so
//! that one page is in memory and two requests never write one file.
//!
//! - `belief`: what a request takes a session for.
//! - `fence`: what is compared with it, and who may write.
//! - `state`: what shapes the answers that go on from a session.
//! - `turn`: a request that begins from one.

mod belief;
mod fence;
mod state;
#[cfg(test)]
mod tests;
mod turn;

use exrail_engine::{SessionError, SessionName, SessionStore};
use tokio::sync::oneshot;

pub(crate) use self::{
    belief::{Belief, Claim},
    fence::{Fenced, Place},
    state::{LeakWatch, of_chat, of_text},
    turn::{Origin, Turn, begin},
};
use crate::{AppState, echo::brief, error::ApiError};

type Call = Box<dyn FnOnce(&mut Fenced) + Send>;

/// A handle to the owner of the sessions. The folder is given back when the last one is gone.
#[derive(Clone, Debug)]
pub struct SessionKeeper {
    calls: flume::Sender<Call>,
}

impl SessionKeeper {
    /// Starts the owner.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(store: SessionStore) -> std::io::Result<SessionKeeper> {
        SessionKeeper::of(Fenced::new(store))
    }

    /// The guard switched off, to show what it is for.
    #[cfg(test)]
    fn unfenced(store: SessionStore) -> std::io::Result<SessionKeeper> {
        SessionKeeper::of(Fenced::new(store).lowered())
    }

    fn of(mut fenced: Fenced) -> std::io::Result<SessionKeeper> {
        let (calls, queue) = flume::unbounded::<Call>();
        std::thread::Builder::new()
            .name("exrail-sessions".into())
            .spawn(move || queue.iter().for_each(|call| call(&mut fenced)))?;
        Ok(SessionKeeper { calls })
    }

    /// Runs `call` on the owner's thread. One that nobody waits for any more is run all the same: a file is
    /// replaced as a whole.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Fenced) -> Result<T, SessionError> + Send + 'static,
    ) -> Result<T, SessionError> {
        let (sender, result) = oneshot::channel();
        self.tell(move |fenced| drop(sender.send(call(fenced))));
        result.await.map_err(|_| SessionError::Stopped)?
    }

    /// The same for callers who want no answer. The owner ends after the last handle, so that there is one.
    fn tell(&self, call: impl FnOnce(&mut Fenced) + Send + 'static) {
        self.calls.send(Box::new(call)).ok();
    }
}

/// The keeper of this server.
pub(crate) fn keeper(state: &AppState) -> Result<&SessionKeeper, ApiError> {
    state.sessions.get().ok_or(ApiError::NotAvailable {
        what: "sessions",
        why: "they are kept in a folder; start the server with --session-dir DIR",
    })
}

/// A name that cannot leave its folder.
pub(crate) fn session_name(name: &str) -> Result<SessionName, SessionError> {
    let named = SessionName::new(name);
    if let Err(SessionError::Name { found, longest }) = &named {
        return Err(SessionError::Name { found: brief(found), longest: *longest });
    }
    named
}
