//! Who may use which generator when. Everything is decided here, from messages and the time that comes with
//! them; what is to be done about it is returned as [`Action`]s.
//!
//! # Rules
//! - The loaded model answers at once, unless its turn is over.
//! - A model that is asked for and not loaded is prepared beside the loaded one, and then waits for its place:
//!   until the loaded one has had nothing to do for `linger`, or has had its `turn`. Then the loaded one takes
//!   no more requests, has `drain` for those that it has, and goes.
//! - Of several models that wait, the one comes whose oldest request has waited longest. All requests that
//!   wait for it are let in together.
//! - A load that fails before the place was given up leaves the loaded model where it is. One that fails
//!   later brings the former model back, unless somebody waits for another one. Either way the model that
//!   failed is not tried again for `cool_down`, doubled each time in a row, and requests for it are refused.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::{Duration, Instant},
};

use exrail_engine::SubmitError;
use tokio::sync::oneshot;

use super::{Lineup, ModelState, ModelStatus, NotVacated, Pass, SeatMark, SwapLimits, Totals};
use crate::{boot::BootBoard, error::ApiError, state::Services};

/// Doublings of the cool-down.
const MOST_DOUBLINGS: u32 = 6;

/// A request that waits for a pass.
pub(super) struct Ticket {
    /// Place in the lineup.
    pub(super) model: usize,
    pub(super) tenant: Option<String>,
    pub(super) deadline: Option<Instant>,
    pub(super) since: Instant,
    pub(super) reply: oneshot::Sender<Result<Pass, ApiError>>,
}

/// What the loading thread is told: the engine to end, if there is one.
pub(super) type Vacated = Result<Option<Arc<Services>>, NotVacated>;

/// How a load ended.
pub(super) enum LoadEnd {
    Loaded(Box<Services>),
    Failed(String),
    NotVacated(NotVacated),
}

/// A message to the desk.
pub(super) enum Message {
    Ask(Ticket),
    /// Somebody who waited has gone.
    LookAgain,
    /// A pass of that turn was given back.
    Done {
        turn: u64,
    },
    /// The model that is being loaded needs the place.
    Vacate(flume::Sender<Vacated>),
    /// The loading thread is done.
    LoadEnded(LoadEnd),
    /// The idle engine has ended; false: a step of it hangs.
    Unloaded(bool),
    /// The server ends; whoever sent it may wait for that.
    Stop(Option<flume::Sender<()>>),
}

/// What is to be done, in this order, once the new state is shown.
pub(super) enum Action {
    Answer(oneshot::Sender<Result<Pass, ApiError>>, Box<Result<Pass, ApiError>>),
    Vacate(flume::Sender<Vacated>, Vacated),
    Load { model: Arc<str>, current: Option<Arc<str>>, board: Arc<BootBoard> },
    Unload(Arc<Services>),
}

struct Entry {
    name: Arc<str>,
    failure: Option<Failure>,
    loads: u64,
    failures: u64,
    load_time: Option<Duration>,
}

struct Failure {
    reason: Arc<str>,
    in_a_row: u32,
    until: Instant,
}

/// The place on the device, taken.
struct Seat {
    model: usize,
    services: Arc<Services>,
    mark: Arc<SeatMark>,
    since: Instant,
    /// When the last pass was given back.
    quiet_since: Instant,
    n_passes: usize,
    /// Takes no more requests; when those that it has are cut.
    closes: Option<Instant>,
}

enum Work {
    None,
    Loading(Loading),
    Unloading { model: usize },
}

struct Loading {
    model: usize,
    since: Instant,
    board: Arc<BootBoard>,
    /// Where the loading thread waits for the place, and since when.
    waits: Option<(flume::Sender<Vacated>, Instant)>,
    /// How long it waited.
    waited: Duration,
    /// Who gave its place up for it.
    former: Option<usize>,
    /// Loaded although nobody waits for it, since another load failed.
    is_recovery: bool,
}

impl Loading {
    /// How long it has worked, without its wait for the place.
    fn worked(&self, now: Instant) -> Duration {
        let until = self.waits.as_ref().map_or(now, |(_, since)| *since);
        (until - self.since).saturating_sub(self.waited)
    }
}

/// The desk. Its keeper owns it.
pub(super) struct Desk {
    limits: SwapLimits,
    entries: Vec<Entry>,
    seat: Option<Seat>,
    work: Work,
    /// By arrival.
    tickets: VecDeque<Ticket>,
    n_turns: u64,
    stuck: Option<Arc<str>>,
    totals: Totals,
    passes_to: flume::Sender<Message>,
    actions: Vec<Action>,
}

impl Desk {
    /// A desk of which one model is loaded, in so much time; it comes first unless it is among the names.
    pub(super) fn new(
        loaded: Arc<Services>,
        took: Duration,
        mut names: Vec<String>,
        limits: SwapLimits,
        passes_to: flume::Sender<Message>,
    ) -> Self {
        if !names.contains(&loaded.model_name) {
            names.insert(0, loaded.model_name.clone());
        }
        let model = names.iter().position(|name| *name == loaded.model_name).unwrap_or(0);
        let entry = |name: String| {
            let name = name.into();
            Entry { name, failure: None, loads: 0, failures: 0, load_time: None }
        };
        let mut desk = Self {
            limits,
            entries: names.into_iter().map(entry).collect(),
            seat: None,
            work: Work::None,
            tickets: VecDeque::new(),
            n_turns: 0,
            stuck: None,
            totals: Totals::default(),
            passes_to,
            actions: Vec::new(),
        };
        desk.sit(model, loaded, took, Instant::now());
        desk
    }

    /// Takes a message and says what is to be done.
    pub(super) fn take(&mut self, message: Message, now: Instant) -> Vec<Action> {
        match message {
            Message::Ask(ticket) => self.ask(ticket, now),
            Message::LookAgain | Message::Stop(_) => {}
            Message::Done { turn } => self.done(turn, now),
            Message::Vacate(waits) => self.wait_for_place(waits, now),
            Message::LoadEnded(end) => self.load_ended(end, now),
            Message::Unloaded(true) => self.work = Work::None,
            Message::Unloaded(false) => self.get_stuck(),
        }
        self.look(now)
    }

    /// Does what is due.
    pub(super) fn look(&mut self, now: Instant) -> Vec<Action> {
        self.drop_tickets(now);
        self.give_place(now);
        self.begin_next(now);
        self.unload_idle(now);
        std::mem::take(&mut self.actions)
    }

    /// When something is due, if nobody says anything before.
    pub(super) fn next_look(&self) -> Option<Instant> {
        let late = self.tickets.iter().filter_map(|ticket| ticket.deadline).min();
        late.into_iter().chain(self.place_due()).chain(self.idle_due()).min()
    }

    /// The loaded engine, for the end of the server.
    pub(super) fn loaded(&self) -> Option<Arc<Services>> {
        self.seat.as_ref().map(|seat| Arc::clone(&seat.services))
    }

    fn ask(&mut self, ticket: Ticket, now: Instant) {
        if let Some(reason) = &self.stuck {
            let error = ApiError::ModelStuck { reason: reason.to_string() };
            return self.answer(ticket.reply, Err(error));
        }
        if self.seat.as_ref().is_some_and(|it| it.model == ticket.model && it.closes.is_none()) {
            return self.admit(ticket.reply);
        }
        match self.refusal(&ticket, now) {
            Some(error) => {
                self.totals.refused += 1;
                self.answer(ticket.reply, Err(error));
            }
            None => self.tickets.push_back(ticket),
        }
    }

    /// Why a request is not let wait, if it is not.
    fn refusal(&self, ticket: &Ticket, now: Instant) -> Option<ApiError> {
        let entry = &self.entries[ticket.model];
        if let Some(failure) = entry.failure.as_ref().filter(|failure| failure.until > now)
            && !self.is_loading(ticket.model)
        {
            return Some(ApiError::LoadFailed {
                model: entry.name.to_string(),
                reason: failure.reason.to_string(),
                retry_after_s: seconds(failure.until - now),
            });
        }
        let retry_after_s = seconds(self.wait_for(ticket.model, now));
        let of_tenant = self.tickets.iter().filter(|other| other.tenant == ticket.tenant).count();
        let SwapLimits { waiting, tenant_waiting, .. } = self.limits;
        if self.tickets.len() >= waiting {
            let model = entry.name.to_string();
            return Some(ApiError::ModelBusy { model, limit: waiting, retry_after_s });
        }
        let has_its_share = of_tenant >= tenant_waiting;
        let refused = SubmitError::QueueFull { limit: tenant_waiting, retry_after_s };
        has_its_share.then_some(refused.into())
    }

    /// How long it will take until a model answers, from what loads have taken.
    fn wait_for(&self, model: usize, now: Instant) -> Duration {
        let load_time = |model: usize| {
            let slowest = || self.entries.iter().filter_map(|entry| entry.load_time).max();
            self.entries[model].load_time.or_else(slowest).unwrap_or_default()
        };
        let turn_left = self.seat.as_ref().map_or(Duration::ZERO, |seat| match seat.closes {
            Some(drained_by) => drained_by.saturating_duration_since(now),
            None => (seat.since + self.limits.turn).saturating_duration_since(now),
        });
        let Work::Loading(loading) = &self.work else { return turn_left + load_time(model) };
        let left = load_time(loading.model).saturating_sub(loading.worked(now));
        let first = turn_left + left;
        if loading.model == model { first } else { first + self.limits.turn + load_time(model) }
    }

    fn is_loading(&self, model: usize) -> bool {
        matches!(&self.work, Work::Loading(loading) if loading.model == model)
    }

    fn answer(
        &mut self,
        reply: oneshot::Sender<Result<Pass, ApiError>>,
        result: Result<Pass, ApiError>,
    ) {
        self.actions.push(Action::Answer(reply, Box::new(result)));
    }

    /// Lets a request in to the loaded model.
    fn admit(&mut self, reply: oneshot::Sender<Result<Pass, ApiError>>) {
        let Some(seat) = &mut self.seat else { return };
        seat.n_passes += 1;
        let pass = Pass {
            services: Arc::clone(&seat.services),
            seat: Arc::clone(&seat.mark),
            desk: self.passes_to.clone(),
        };
        self.answer(reply, Ok(pass));
    }

    fn done(&mut self, turn: u64, now: Instant) {
        // One of an earlier turn was cut.
        let Some(seat) = self.seat.as_mut().filter(|seat| seat.mark.turn == turn) else { return };
        seat.n_passes -= 1;
        seat.quiet_since = now;
    }

    /// Puts a model on the place, and lets in who waits for it.
    fn sit(&mut self, model: usize, services: Arc<Services>, took: Duration, now: Instant) {
        self.n_turns += 1;
        let entry = &mut self.entries[model];
        entry.loads += 1;
        entry.load_time = Some(took);
        entry.failure = None;
        self.totals.load_time += took;
        let (turn, drain) = (self.n_turns, self.limits.drain);
        let mark = Arc::new(SeatMark { turn, is_cut: AtomicBool::new(false), drain });
        self.seat = Some(Seat {
            model,
            services,
            mark,
            since: now,
            quiet_since: now,
            n_passes: 0,
            closes: None,
        });
        self.open_seat();
    }

    /// The loaded model takes requests, those that wait for it first.
    fn open_seat(&mut self) {
        let Some(seat) = &mut self.seat else { return };
        seat.closes = None;
        let model = seat.model;
        for ticket in self.take_tickets(|ticket| ticket.model == model) {
            self.admit(ticket.reply);
        }
    }

    fn take_tickets(&mut self, takes: impl Fn(&Ticket) -> bool) -> Vec<Ticket> {
        let (taken, left) = self.tickets.drain(..).partition(|ticket| takes(ticket));
        self.tickets = left;
        Vec::from(taken)
    }

    /// Drops who has gone, and tells who is late.
    fn drop_tickets(&mut self, now: Instant) {
        self.tickets.retain(|ticket| !ticket.reply.is_closed());
        let is_late = |ticket: &Ticket| ticket.deadline.is_some_and(|deadline| deadline <= now);
        for ticket in self.take_tickets(is_late) {
            let model = self.entries[ticket.model].name.to_string();
            let waited_s = (now - ticket.since).as_secs_f64();
            self.answer(ticket.reply, Err(ApiError::ModelLate { model, waited_s }));
        }
    }

    fn wait_for_place(&mut self, waits: flume::Sender<Vacated>, now: Instant) {
        if let Work::Loading(loading) = &mut self.work {
            loading.waits = Some((waits, now));
        }
    }

    /// When the loaded model's turn is over, as far as is known now.
    fn turn_ends(&self, seat: &Seat) -> Instant {
        let whole = seat.since + self.limits.turn;
        if seat.n_passes > 0 { whole } else { whole.min(seat.quiet_since + self.limits.linger) }
    }

    /// When the place is given up next, where somebody waits for it.
    fn place_due(&self) -> Option<Instant> {
        let Work::Loading(Loading { waits: Some(_), .. }) = &self.work else { return None };
        let seat = self.seat.as_ref()?;
        Some(seat.closes.unwrap_or_else(|| self.turn_ends(seat)))
    }

    /// Gives the place to the model that waits for it, when it is due.
    fn give_place(&mut self, now: Instant) {
        let Work::Loading(loading) = &self.work else { return };
        let (model, is_wanted) = (loading.model, loading.is_recovery);
        if loading.waits.is_none() {
            return;
        }
        if !is_wanted && !self.tickets.iter().any(|ticket| ticket.model == model) {
            self.tell_loader(Err(NotVacated::NotNeeded), now);
            return self.open_seat();
        }
        let Some(seat) = &self.seat else { return self.tell_loader(Ok(None), now) };
        let is_over = self.turn_ends(seat) <= now;
        let drained_by = now + self.limits.drain;
        let Some(seat) = &mut self.seat else { return };
        if seat.closes.is_none() && is_over {
            seat.closes = Some(drained_by);
        }
        let Some(drained_by) = seat.closes else { return };
        if seat.n_passes == 0 || drained_by <= now {
            let left = self.leave_seat();
            self.totals.swaps += 1;
            if let Work::Loading(loading) = &mut self.work {
                loading.former = left.as_ref().map(|(model, _)| *model);
            }
            self.tell_loader(Ok(left.map(|(_, services)| services)), now);
        }
    }

    fn tell_loader(&mut self, vacated: Vacated, now: Instant) {
        let Work::Loading(loading) = &mut self.work else { return };
        if let Some((waits, since)) = loading.waits.take() {
            loading.waited = now - since;
            self.actions.push(Action::Vacate(waits, vacated));
        }
    }

    /// Takes the loaded model off its place; requests that it still has will fail and hear why.
    fn leave_seat(&mut self) -> Option<(usize, Arc<Services>)> {
        let seat = self.seat.take()?;
        self.totals.cut += seat.n_passes as u64;
        seat.mark.is_cut.store(seat.n_passes > 0, Ordering::Release);
        Some((seat.model, seat.services))
    }

    /// Begins to load the model whose oldest request waits longest.
    fn begin_next(&mut self, now: Instant) {
        if !matches!(self.work, Work::None) || self.stuck.is_some() {
            return;
        }
        if let Some(ticket) = self.tickets.front() {
            self.begin(ticket.model, false, now);
        }
    }

    fn begin(&mut self, model: usize, is_recovery: bool, now: Instant) {
        let board = Arc::new(BootBoard::new());
        let name = |model: usize| Arc::clone(&self.entries[model].name);
        let current = self.seat.as_ref().map(|seat| name(seat.model));
        self.actions.push(Action::Load { model: name(model), current, board: Arc::clone(&board) });
        self.work = Work::Loading(Loading {
            model,
            since: now,
            board,
            waits: None,
            waited: Duration::ZERO,
            former: None,
            is_recovery,
        });
    }

    fn load_ended(&mut self, end: LoadEnd, now: Instant) {
        let Work::Loading(loading) = std::mem::replace(&mut self.work, Work::None) else { return };
        match end {
            LoadEnd::Loaded(services) => {
                let took = loading.worked(now);
                self.sit(loading.model, Arc::from(services), took, now);
            }
            LoadEnd::Failed(reason) => self.load_failed(&loading, reason, now),
            LoadEnd::NotVacated(NotVacated::NotNeeded | NotVacated::Ending) => {}
            LoadEnd::NotVacated(NotVacated::Stuck { .. }) => self.get_stuck(),
        }
    }

    fn load_failed(&mut self, loading: &Loading, reason: String, now: Instant) {
        let entry = &mut self.entries[loading.model];
        let in_a_row = entry.failure.as_ref().map_or(0, |failure| failure.in_a_row) + 1;
        let doublings = (in_a_row - 1).min(MOST_DOUBLINGS);
        let cool_down = self.limits.cool_down.saturating_mul(1 << doublings);
        let (model, reason) = (entry.name.to_string(), Arc::<str>::from(reason));
        entry.failures += 1;
        entry.failure =
            Some(Failure { reason: Arc::clone(&reason), in_a_row, until: now + cool_down });
        let retry_after_s = seconds(cool_down);
        for ticket in self.take_tickets(|ticket| ticket.model == loading.model) {
            let (model, reason) = (model.clone(), reason.to_string());
            self.answer(ticket.reply, Err(ApiError::LoadFailed { model, reason, retry_after_s }));
        }
        if self.seat.is_some() {
            return self.open_seat();
        }
        let is_well = |model: usize| self.entries[model].failure.is_none();
        let back = loading.former.filter(|&former| is_well(former));
        if let Some(former) = back.filter(|_| self.tickets.is_empty()) {
            self.begin(former, true, now);
        }
    }

    /// Nothing can be loaded any more: what hangs holds the memory.
    fn get_stuck(&mut self) {
        let limit_s = self.limits.stop.as_secs();
        let reason = NotVacated::Stuck { limit_s }.to_string();
        self.work = Work::None;
        for ticket in self.take_tickets(|_| true) {
            let reason = reason.clone();
            self.answer(ticket.reply, Err(ApiError::ModelStuck { reason }));
        }
        self.stuck = Some(reason.into());
    }

    fn idle_due(&self) -> Option<Instant> {
        let seat = self.seat.as_ref().filter(|seat| seat.n_passes == 0)?;
        let is_calm = matches!(self.work, Work::None) && self.tickets.is_empty();
        self.limits.idle_unload.filter(|_| is_calm).map(|idle| seat.quiet_since + idle)
    }

    fn unload_idle(&mut self, now: Instant) {
        if self.idle_due().is_none_or(|due| due > now) {
            return;
        }
        if let Some((model, services)) = self.leave_seat() {
            self.totals.idle_unloads += 1;
            self.work = Work::Unloading { model };
            self.actions.push(Action::Unload(services));
        }
    }

    /// What is shown of all this.
    pub(super) fn lineup(&self) -> Lineup {
        Lineup {
            models: (0..self.entries.len()).map(|model| self.status(model)).collect(),
            loaded: self.loaded(),
            stuck: self.stuck.clone(),
            totals: self.totals,
        }
    }

    fn status(&self, model: usize) -> ModelStatus {
        let entry = &self.entries[model];
        let seat = self.seat.as_ref().filter(|seat| seat.model == model);
        let loading = match &self.work {
            Work::Loading(loading) if loading.model == model => Some(loading),
            Work::Loading(_) | Work::None | Work::Unloading { .. } => None,
        };
        let unloads = matches!(self.work, Work::Unloading { model: it } if it == model);
        let state = match (seat, loading) {
            (Some(seat), _) if seat.closes.is_some() => ModelState::Draining,
            (Some(_), _) => ModelState::Loaded,
            (None, Some(_)) => ModelState::Loading,
            (None, None) if unloads => ModelState::Unloading,
            (None, None) if entry.failure.is_some() => ModelState::Failed,
            (None, None) => ModelState::Unloaded,
        };
        ModelStatus {
            name: Arc::clone(&entry.name),
            state,
            reason: entry.failure.as_ref().map(|failure| Arc::clone(&failure.reason)),
            running: seat.map_or(0, |seat| seat.n_passes),
            waiting: self.tickets.iter().filter(|ticket| ticket.model == model).count(),
            loads: entry.loads,
            failures: entry.failures,
            load_time: entry.load_time,
            board: loading.map(|loading| Arc::clone(&loading.board)),
        }
    }
}

/// Whole seconds for `Retry-After`, at least 1.
fn seconds(wait: Duration) -> u64 {
    (wait.as_secs_f64().ceil() as u64).clamp(1, 3600)
}
