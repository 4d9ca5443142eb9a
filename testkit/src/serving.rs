//! [`Serving`]: a server of a test, on a free port of the loopback and in a thread of its own, so
//! that tests without a runtime can use it and none can block it.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{io, thread};

use tokio::net::TcpListener;
use tokio::runtime;
use tokio::sync::oneshot;

/// A server that runs until this is dropped.
#[derive(Debug)]
pub(crate) struct Serving {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    /// Binds a free port and runs `serve` with it. All tasks that `serve` spawns end with it.
    pub(crate) fn start<F>(
        name: &str,
        serve: impl FnOnce(TcpListener) -> F + Send + 'static,
    ) -> io::Result<Serving>
    where
        F: Future<Output = ()>,
    {
        // Bound here, not in the thread: who gets a `Serving` may connect at once.
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).expect("within a runtime with I/O");
                tokio::select! {
                    () = serve(listener) => {}
                    _ = stopped => {}
                }
            });
            // A look-up of a name may still block a thread of the pool; nobody waits for it.
            runtime.shutdown_timeout(Duration::ZERO);
        })?;
        Ok(Serving { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where the server listens.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed by its own thread, and a second one here would abort.
            drop(thread.join());
        }
    }
}
