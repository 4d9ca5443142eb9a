//! The fault that is set, the counters, and the values whose drops keep them right.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::watch;

use super::ProxyFault;

/// What all connections of a proxy share.
#[derive(Debug)]
pub(super) struct State {
    setting: watch::Sender<Setting>,
    generations: AtomicUsize,
    cancelled: AtomicUsize,
    open: AtomicUsize,
}

#[derive(Debug)]
struct Setting {
    fault: Arc<ProxyFault>,
    /// Whether what a fault waits for has happened: the first generation, or a client that left.
    struck: bool,
    /// How often the proxy went down. A connection compares it with what it was at its beginning:
    /// it might sleep through a fault that is set for a short time only.
    downs: usize,
}

impl State {
    pub(super) fn new() -> State {
        let setting = Setting { fault: Arc::new(ProxyFault::None), struck: false, downs: 0 };
        State {
            setting: watch::Sender::new(setting),
            generations: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
        }
    }

    pub(super) fn set(&self, fault: ProxyFault) {
        self.setting.send_modify(|setting| {
            setting.downs += usize::from(fault == ProxyFault::Down);
            setting.fault = Arc::new(fault);
            setting.struck = false;
        });
    }

    pub(super) fn generations(&self) -> usize {
        self.generations.load(Ordering::SeqCst)
    }

    pub(super) fn cancelled(&self) -> usize {
        self.cancelled.load(Ordering::SeqCst)
    }

    pub(super) fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    pub(super) fn fault(&self) -> Arc<ProxyFault> {
        Arc::clone(&self.setting.borrow().fault)
    }

    pub(super) fn is_down(&self) -> bool {
        *self.setting.borrow().fault == ProxyFault::Down
    }

    pub(super) fn downs(&self) -> usize {
        self.setting.borrow().downs
    }

    /// Returns when the proxy has gone down since it had done so `downs` times.
    pub(super) async fn gone_down_since(&self, downs: usize) {
        self.wait_for(|setting| setting.downs != downs).await;
    }

    /// The fault that a generation meets, as soon as it is not [`ProxyFault::HangAfterCancel`]
    /// after a client left.
    pub(super) async fn fault_once_free(&self) -> Arc<ProxyFault> {
        self.wait_for(|setting| !setting.struck || *setting.fault != ProxyFault::HangAfterCancel)
            .await
    }

    /// Whether this is the first generation under the fault that is set.
    pub(super) fn is_first(&self) -> bool {
        let mut first = false;
        self.setting.send_if_modified(|setting| {
            first = !setting.struck;
            setting.struck = true;
            // Nobody waits for this.
            false
        });
        first
    }

    async fn wait_for(&self, holds: impl FnMut(&Setting) -> bool) -> Arc<ProxyFault> {
        let mut settings = self.setting.subscribe();
        let setting = settings.wait_for(holds).await.expect("`self` holds the sender");
        Arc::clone(&setting.fault)
    }
}

/// A generation from its arrival to the end of its reply. Dropped before, its client has left.
pub(super) struct Ticket {
    state: Arc<State>,
    downs: usize,
    ended: bool,
}

impl Ticket {
    pub(super) fn new(state: &Arc<State>) -> Ticket {
        state.generations.fetch_add(1, Ordering::SeqCst);
        Ticket { state: Arc::clone(state), downs: state.downs(), ended: false }
    }

    /// The client has got all that it will get, or it was not the client that ended it.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Who was thrown out did not leave.
        if self.ended || self.state.downs() != self.downs {
            return;
        }
        self.state.cancelled.fetch_add(1, Ordering::SeqCst);
        self.state.setting.send_if_modified(|setting| {
            setting.struck |= *setting.fault == ProxyFault::HangAfterCancel;
            false
        });
    }
}

/// A generation that the upstream works at.
pub(super) struct Open(Arc<State>);

impl Open {
    pub(super) fn new(state: &Arc<State>) -> Open {
        state.open.fetch_add(1, Ordering::SeqCst);
        Open(Arc::clone(state))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}
