//! The thread that owns the folder of sessions: one call after the other, so that one page is in memory and
//! two requests never write one file.

use exrail_engine::{SessionError, SessionStore};
use tokio::sync::oneshot;

type Call = Box<dyn FnOnce(&mut SessionStore) + Send>;

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
    pub fn start(mut store: SessionStore) -> std::io::Result<SessionKeeper> {
        let (calls, queue) = flume::unbounded::<Call>();
        std::thread::Builder::new()
            .name("exrail-sessions".into())
            .spawn(move || queue.iter().for_each(|call| call(&mut store)))?;
        Ok(SessionKeeper { calls })
    }

    /// Runs `call` on the owner's thread. One that nobody waits for any more is run all the same: a file is
    /// replaced as a whole.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut SessionStore) -> Result<T, SessionError> + Send + 'static,
    ) -> Result<T, SessionError> {
        let (sender, result) = oneshot::channel();
        let call: Call = Box::new(move |store| drop(sender.send(call(store))));
        self.calls.send(call).map_err(|_| SessionError::Stopped)?;
        result.await.map_err(|_| SessionError::Stopped)?
    }
}
