//! The thread that owns the desk, and the threads that load and unload for it.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use exrail_wire::{Pins, TraceBody};
use tokio::sync::watch;

use super::{
    Lineup, LoadCall, Loader, NotVacated,
    desk::{Action, Desk, LoadEnd, Message, Vacated},
};
use crate::{
    boot::{BootBoard, PhaseRecord},
    state::{Services, Shelf, pins},
    trace::{TraceIdentity, TraceLog},
};

/// Between two words of a load that waits for its place.
const TICK: Duration = Duration::from_secs(1);

/// Starts the thread; it ends with [`Message::Stop`].
pub(super) fn start(
    desk: Desk,
    inbox: flume::Receiver<Message>,
    hands: Hands,
    shown: watch::Sender<Arc<Lineup>>,
) {
    let thread = std::thread::Builder::new().name("exrail-models".into());
    let started = thread.spawn(move || run(desk, &inbox, &hands, &shown));
    if let Err(error) = started {
        // Whoever asks finds nobody at the desk, and is told that the engine stopped.
        tracing::error!(%error, "nobody keeps the models: expected a thread, found none");
    }
}

fn run(
    mut desk: Desk,
    inbox: &flume::Receiver<Message>,
    hands: &Hands,
    shown: &watch::Sender<Arc<Lineup>>,
) {
    loop {
        let message = match desk.next_look() {
            Some(at) => inbox.recv_deadline(at).map_err(|error| match error {
                flume::RecvTimeoutError::Timeout => Idle::Due,
                flume::RecvTimeoutError::Disconnected => Idle::Over,
            }),
            None => inbox.recv().map_err(|flume::RecvError::Disconnected| Idle::Over),
        };
        let actions = match message {
            Ok(Message::Stop(done)) => return stop(&desk, done),
            Ok(message) => desk.take(message, Instant::now()),
            Err(Idle::Due) => desk.look(Instant::now()),
            Err(Idle::Over) => return,
        };
        // Shown first: who was let in must find what let it in.
        shown.send_replace(Arc::new(desk.lineup()));
        actions.into_iter().for_each(|action| hands.perform(action));
    }
}

/// Why there was no message.
enum Idle {
    Due,
    Over,
}

fn stop(desk: &Desk, done: Option<flume::Sender<()>>) {
    let Some(done) = done else { return };
    if let Some(services) = desk.loaded() {
        services.engine.shutdown();
    }
    // Whoever waited may have gone.
    done.send(()).ok();
}

/// What the keeper does its work with.
#[derive(Clone)]
pub(super) struct Hands {
    desk: flume::Sender<Message>,
    loader: Option<Arc<dyn Loader>>,
    shelf: Arc<Shelf>,
    traces: TraceLog,
    stop: Duration,
}

impl Hands {
    pub(super) fn new(
        desk: flume::Sender<Message>,
        loader: Option<Arc<dyn Loader>>,
        shelf: Arc<Shelf>,
        traces: TraceLog,
        stop: Duration,
    ) -> Self {
        Self { desk, loader, shelf, traces, stop }
    }

    fn perform(&self, action: Action) {
        match action {
            // Whoever asked may have gone; a pass comes back then.
            Action::Answer(reply, result) => drop(reply.send(*result)),
            Action::Vacate(waits, vacated) => drop(waits.send(vacated)),
            Action::Load { model, current, board } => {
                let failed = Message::LoadEnded(LoadEnd::Failed("no thread to load it".into()));
                self.beside(failed, move |hands| hands.load(&model, current.as_deref(), &board));
            }
            Action::Unload(services) => {
                self.beside(Message::Unloaded(false), move |hands| {
                    let stopped = hands.end(&services, "idle");
                    drop(services);
                    drop(hands.desk.send(Message::Unloaded(stopped)));
                });
            }
        }
    }

    /// Runs something that takes long on a thread of its own.
    fn beside(&self, failed: Message, work: impl FnOnce(&Self) + Send + 'static) {
        let hands = self.clone();
        let thread = std::thread::Builder::new().name("exrail-load".into());
        if let Err(error) = thread.spawn(move || work(&hands)) {
            tracing::error!(%error, "models: expected a thread, found none");
            drop(self.desk.send(failed));
        }
    }

    /// Ends an engine; false when a step of it hangs.
    fn end(&self, services: &Services, reason: &'static str) -> bool {
        let began = Instant::now();
        let stopped = services.engine.shutdown_within(self.stop);
        let ms = began.elapsed().as_secs_f64() * 1e3;
        let model = services.model_name.clone();
        tracing::info!(model, reason, stopped, ms, "model unloaded");
        // A hash that still runs is not waited for.
        let is_known = services.engine.facts().model_sha256.get().is_some();
        let pins = is_known.then(|| pins(&services.engine).ok()).flatten().unwrap_or_default();
        self.record("unload", &pins, [TraceBody::Unload { model, ok: stopped, ms, reason }]);
        stopped
    }

    fn load(&self, model: &str, current: Option<&str>, board: &Arc<BootBoard>) {
        let began = Instant::now();
        let end = self.run_loader(model, current, board);
        let ms = began.elapsed().as_secs_f64() * 1e3;
        let (engine, problem) = match &end {
            LoadEnd::Loaded(services) => (Some(services.engine.clone()), None),
            LoadEnd::Failed(reason) => (None, Some(reason.clone())),
            LoadEnd::NotVacated(why) => (None, Some(why.to_string())),
        };
        drop(self.desk.send(Message::LoadEnded(end)));
        match &problem {
            None => tracing::info!(model, ms, "model loaded"),
            Some(problem) => tracing::warn!(model, ms, problem, "model not loaded"),
        }
        let phase = |PhaseRecord { phase, ok, detail, took }: PhaseRecord| {
            let (phase, ms) = (phase.name().to_owned(), took.as_secs_f64() * 1e3);
            TraceBody::Boot { phase, ok, ms, detail }
        };
        let loaded = TraceBody::Load { model: model.into(), ok: problem.is_none(), ms, problem };
        let records = board.status().phases.into_iter().map(phase).chain([loaded]);
        // Waits for the model's hash; a model whose files went away is named by the record alone.
        let pins = engine.and_then(|engine| pins(&engine).ok()).unwrap_or_default();
        self.record("load", &pins, records);
    }

    fn run_loader(&self, model: &str, current: Option<&str>, board: &Arc<BootBoard>) -> LoadEnd {
        let Some(loader) = &self.loader else {
            return LoadEnd::Failed("this server loads no other model".into());
        };
        let vacated = Cell::new(None);
        let vacate = |told: &mut dyn FnMut()| {
            let result = self.vacate(told);
            vacated.set(Some(result));
            result
        };
        let call = LoadCall { model, current, board, shelf: &self.shelf, vacate: &vacate };
        let loaded = catch_unwind(AssertUnwindSafe(|| loader.load(&call)));
        let refused = match (loaded, vacated.get()) {
            (_, Some(Err(why))) => return LoadEnd::NotVacated(why),
            (Err(_), _) => return LoadEnd::Failed("the load panicked".into()),
            (Ok(Err(error)), _) => return LoadEnd::Failed(error.to_string()),
            (Ok(Ok(services)), None) => (services, "expected it to wait for its place".to_owned()),
            (Ok(Ok(services)), Some(Ok(()))) if services.model_name != model => {
                let found = format!("expected model `{model}`, found `{}`", services.model_name);
                (services, found)
            }
            (Ok(Ok(services)), Some(Ok(()))) => match board.ready() {
                Ok(()) => return LoadEnd::Loaded(Box::new(services)),
                Err(error) => (services, error.to_string()),
            },
        };
        let (services, reason) = refused;
        services.engine.shutdown();
        LoadEnd::Failed(reason)
    }

    /// Waits for the place, and ends who had it.
    fn vacate(&self, told: &mut dyn FnMut()) -> Result<(), NotVacated> {
        let (waits, place) = flume::bounded(1);
        self.desk.send(Message::Vacate(waits)).map_err(|_| NotVacated::Ending)?;
        let former = wait(&place, told)?;
        let Some(former) = former else { return Ok(()) };
        if self.end(&former, "swap") {
            return Ok(());
        }
        Err(NotVacated::Stuck { limit_s: self.stop.as_secs() })
    }

    /// Nobody waits for these records; one that cannot be written stops nothing.
    fn record(&self, what: &str, pins: &Pins, bodies: impl IntoIterator<Item = TraceBody>) {
        let millis = jiff::Timestamp::now().as_millisecond();
        let trace_id = format!("{what}-{millis}");
        let identity = TraceIdentity { trace_id, ..TraceIdentity::default() };
        for body in bodies {
            if let Err(error) = self.traces.append_blocking(&identity, pins, body) {
                tracing::error!(%error, "a {what} could not be traced");
            }
        }
    }
}

/// What the desk says, in time.
fn wait(place: &flume::Receiver<Vacated>, told: &mut dyn FnMut()) -> Vacated {
    loop {
        match place.recv_timeout(TICK) {
            Ok(vacated) => return vacated,
            Err(flume::RecvTimeoutError::Timeout) => told(),
            Err(flume::RecvTimeoutError::Disconnected) => return Err(NotVacated::Ending),
        }
    }
}
