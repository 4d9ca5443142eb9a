//! The rules of the desk, in a time of their own.

use exrail_checkpoint::{Checkpoint, Gguf};
use exrail_engine::{
    Engine, EngineHandle, EngineOptions, Identity, LoadOptions, prepare_generator,
};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_testkit::{TinyLlama, tiny_llama};

use super::{
    desk::{Action, LoadEnd, Vacated},
    *,
};

type Answer = Result<Pass, ApiError>;

/// A desk of models `a`, `b` and `c`, and what it wants done.
struct Fixture {
    desk: Desk,
    messages: flume::Receiver<Message>,
    engine: EngineHandle,
    start: Instant,
    loads: Vec<String>,
    unloads: usize,
    /// What the loading thread was told.
    told: Vec<Vacated>,
}

const NAMES: [&str; 3] = ["a", "b", "c"];

fn engine() -> EngineHandle {
    let options = CpuOptions { threads: Some(1), ..CpuOptions::default() };
    let backend = CpuBackend::new(options).unwrap();
    let gguf = Gguf::parse(tiny_llama(7, TinyLlama::default())).unwrap();
    let who = Identity { name: "tiny".into(), sha256: "0".repeat(64) };
    let (checkpoint, load) = (Checkpoint::Gguf(gguf), LoadOptions::default());
    let loaded = prepare_generator(backend, &checkpoint, who, load, &mut |_| {}).unwrap();
    Engine::start(loaded, EngineOptions { kv_pages: Some(4), ..EngineOptions::default() }).unwrap()
}

fn services(name: &str, engine: &EngineHandle) -> Services {
    Shelf::default().services(name.into(), engine.clone(), None)
}

impl Fixture {
    /// `a` is loaded, in two seconds; a turn is 10 s, the linger 1 s, the drain 5 s.
    fn new(change: impl FnOnce(&mut SwapLimits)) -> Self {
        let mut limits = SwapLimits {
            waiting: 3,
            tenant_waiting: 2,
            turn: Duration::from_secs(10),
            linger: Duration::from_secs(1),
            drain: Duration::from_secs(5),
            stop: Duration::from_secs(30),
            cool_down: Duration::from_secs(15),
            idle_unload: None,
        };
        change(&mut limits);
        let (sender, messages) = flume::unbounded();
        let engine = engine();
        let loaded = Arc::new(services("a", &engine));
        let names = NAMES.map(str::to_owned).to_vec();
        let desk = Desk::new(loaded, Duration::from_secs(2), names, limits, sender);
        let (loads, told) = (Vec::new(), Vec::new());
        Self { desk, messages, engine, start: Instant::now(), loads, unloads: 0, told }
    }

    fn at(&self, s: f64) -> Instant {
        self.start + Duration::from_secs_f64(s)
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Answer(reply, result) => drop(reply.send(*result)),
                Action::Vacate(_, vacated) => self.told.push(vacated),
                Action::Load { model, .. } => self.loads.push(model.to_string()),
                Action::Unload(_) => self.unloads += 1,
            }
        }
    }

    fn take(&mut self, s: f64, message: Message) {
        let actions = self.desk.take(message, self.at(s));
        self.perform(actions);
    }

    /// What is due by then, each at its time, as the keeper does it.
    fn until(&mut self, s: f64) {
        while let Some(due) = self.desk.next_look().filter(|&due| due <= self.at(s)) {
            let actions = self.desk.look(due);
            self.perform(actions);
        }
    }

    /// Somebody asks at a time.
    fn ask(&mut self, s: f64, model: usize, tenant: &str) -> oneshot::Receiver<Answer> {
        self.ask_until(s, model, tenant, None)
    }

    fn ask_until(
        &mut self,
        s: f64,
        model: usize,
        tenant: &str,
        deadline_s: Option<f64>,
    ) -> oneshot::Receiver<Answer> {
        let (reply, answer) = oneshot::channel();
        let deadline = deadline_s.map(|s| self.at(s));
        let (tenant, since) = (Some(tenant.to_owned()), self.at(s));
        self.take(s, Message::Ask(Ticket { model, tenant, deadline, since, reply }));
        answer
    }

    /// The loading thread waits for its place.
    fn wait_for_place(&mut self, s: f64) {
        self.take(s, Message::Vacate(flume::bounded(1).0));
    }

    fn loaded(&mut self, s: f64, model: usize) {
        let services = Box::new(services(NAMES[model], &self.engine));
        self.take(s, Message::LoadEnded(LoadEnd::Loaded(services)));
    }

    fn failed(&mut self, s: f64) {
        self.take(s, Message::LoadEnded(LoadEnd::Failed("truncated".into())));
    }

    /// Passes that were dropped.
    fn passes_back(&mut self, s: f64) {
        while let Ok(message) = self.messages.try_recv() {
            self.take(s, message);
        }
    }

    fn is_vacated(&self) -> bool {
        self.told.iter().any(Result::is_ok)
    }
}

fn pass(answer: &mut oneshot::Receiver<Answer>) -> Pass {
    answer.try_recv().unwrap().unwrap()
}

fn refused(answer: &mut oneshot::Receiver<Answer>) -> ApiError {
    answer.try_recv().unwrap().err().unwrap()
}

fn is_waiting(answer: &mut oneshot::Receiver<Answer>) -> bool {
    matches!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty))
}

#[test]
fn a_model_with_work_keeps_its_turn_and_then_drains() {
    let mut desk = Fixture::new(|_| {});
    let first = pass(&mut desk.ask(0.0, 0, "x"));
    let mut other = desk.ask(1.0, 1, "x");
    desk.wait_for_place(2.0);
    assert_eq!(desk.loads, ["b"], "it is prepared at once");
    desk.until(9.9);
    let second = pass(&mut desk.ask(9.9, 0, "x"));
    desk.until(10.1);
    let mut late = desk.ask(10.1, 0, "x");
    assert!(is_waiting(&mut late), "its turn is over");
    drop(first);
    desk.passes_back(11.0);
    assert!(!desk.is_vacated() && is_waiting(&mut other));
    drop(second);
    desk.passes_back(12.0);
    assert!(desk.is_vacated());
    desk.loaded(13.0, 1);
    // 1 s before it waited for its place, 1 s behind that.
    assert_eq!(desk.desk.lineup().models[1].load_time, Some(Duration::from_secs(2)));
    assert_eq!(pass(&mut other).model_name, "b");
    assert_eq!(desk.loads, ["b", "a"], "whoever waits next is prepared");
    assert!(is_waiting(&mut late));
}

#[test]
fn a_model_without_work_goes_after_its_linger_and_not_before() {
    let mut desk = Fixture::new(|_| {});
    drop(pass(&mut desk.ask(0.5, 0, "x")));
    desk.passes_back(1.0);
    let _other = desk.ask(1.1, 1, "x");
    desk.wait_for_place(1.2);
    desk.until(1.9);
    assert!(!desk.is_vacated(), "its client may come again");
    desk.until(2.1);
    assert!(desk.is_vacated());
    // One that was idle for longer goes at once.
    let mut idle = Fixture::new(|_| {});
    let _other = idle.ask(60.0, 1, "x");
    idle.wait_for_place(60.0);
    assert!(idle.is_vacated());
}

#[test]
fn whoever_does_not_finish_in_time_is_cut_and_told() {
    let mut desk = Fixture::new(|_| {});
    let slow = pass(&mut desk.ask(0.0, 0, "x"));
    let _other = desk.ask(11.0, 1, "x");
    desk.wait_for_place(11.0);
    desk.until(15.9);
    assert!(!desk.is_vacated());
    assert_eq!(slow.explain(ApiError::Lost).code(), "generation_failed");
    desk.until(16.1);
    assert!(desk.is_vacated());
    assert_eq!(slow.explain(ApiError::Lost).code(), "model_swapped_out");
    assert_eq!(
        slow.explain(ApiError::HungUp).code(),
        "client_gone",
        "not everything is the swap's"
    );
    assert_eq!(desk.desk.lineup().totals.cut, 1);
    // Its pass comes back in somebody else's turn, and counts for nobody.
    desk.loaded(17.0, 1);
    drop(slow);
    desk.passes_back(18.0);
    assert_eq!(desk.desk.lineup().models[1].running, 1);
}

#[test]
fn the_model_comes_next_whose_oldest_request_waits_longest() {
    let mut desk = Fixture::new(|limits| limits.tenant_waiting = 3);
    let mut first = desk.ask(20.0, 2, "x");
    let mut second = desk.ask(21.0, 1, "x");
    let mut third = desk.ask(22.0, 2, "x");
    desk.wait_for_place(23.0);
    desk.loaded(24.0, 2);
    let passes = (pass(&mut first), pass(&mut third));
    assert!(is_waiting(&mut second));
    assert_eq!(desk.loads, ["c", "b"]);
    drop(passes);
}

#[test]
fn places_are_counted_and_a_refusal_says_when_to_come_again() {
    let mut desk = Fixture::new(|_| {});
    let _one = desk.ask(5.0, 1, "x");
    let _two = desk.ask(5.0, 1, "x");
    let share = refused(&mut desk.ask(5.0, 1, "x"));
    assert_eq!((share.code(), share.status().as_u16()), ("queue_full", 429));
    let _three = desk.ask(5.0, 1, "y");
    // Of the turn 5 s are left, and the only load that was measured took 2 s.
    let full = refused(&mut desk.ask(5.0, 1, "z"));
    assert!(matches!(full, ApiError::ModelBusy { retry_after_s: 7, .. }), "{full}");
    // Behind another model: its turn, and a load more.
    let behind = refused(&mut desk.ask(6.0, 2, "z"));
    assert!(matches!(behind, ApiError::ModelBusy { retry_after_s: 17, .. }), "{behind}");
    assert_eq!(desk.desk.lineup().totals.refused, 3);
}

#[test]
fn whoever_is_late_is_told_at_the_deadline_and_nothing_is_loaded_for_nobody() {
    let mut desk = Fixture::new(|_| {});
    let working = pass(&mut desk.ask(0.0, 0, "x"));
    let mut late = desk.ask_until(1.0, 1, "x", Some(4.0));
    desk.wait_for_place(2.0);
    desk.until(3.9);
    assert!(is_waiting(&mut late));
    desk.until(4.1);
    assert_eq!(refused(&mut late).code(), "deadline_exceeded");
    assert!(matches!(desk.told[..], [Err(NotVacated::NotNeeded)]));
    desk.take(4.2, Message::LoadEnded(LoadEnd::NotVacated(NotVacated::NotNeeded)));
    assert_eq!(desk.desk.lineup().models[1].state, ModelState::Unloaded);
    drop(working);
}

#[test]
fn a_model_that_failed_is_left_alone_for_longer_each_time() {
    let mut desk = Fixture::new(|_| {});
    let mut first = desk.ask(0.0, 1, "x");
    desk.failed(1.0);
    assert!(matches!(refused(&mut first), ApiError::LoadFailed { retry_after_s: 15, .. }));
    let mut soon = desk.ask(11.0, 1, "x");
    assert!(matches!(refused(&mut soon), ApiError::LoadFailed { retry_after_s: 5, .. }));
    let mut again = desk.ask(17.0, 1, "x");
    desk.failed(18.0);
    assert!(matches!(refused(&mut again), ApiError::LoadFailed { retry_after_s: 30, .. }));
    assert_eq!(desk.loads, ["b", "b"]);
    assert_eq!(desk.desk.lineup().models[0].state, ModelState::Loaded);
    // Once it was loaded all that is forgotten.
    let _last = desk.ask(60.0, 1, "x");
    desk.wait_for_place(60.0);
    desk.loaded(61.0, 1);
    assert!(desk.desk.lineup().models[1].reason.is_none());
}

/// The mutation: without its cool-down a broken model is read again for each request.
#[test]
fn the_cool_down_keeps_requests_from_loading_a_broken_model_again() {
    let loads = |cool_down| {
        let mut desk = Fixture::new(|limits| limits.cool_down = cool_down);
        for request in 0..4 {
            let mut asked = desk.ask(f64::from(request), 1, "x");
            let at_once = asked.try_recv().ok();
            let answer = at_once.unwrap_or_else(|| {
                desk.failed(f64::from(request) + 0.5);
                asked.try_recv().unwrap()
            });
            assert_eq!(answer.err().unwrap().code(), "model_load_failed");
        }
        desk.loads.len()
    };
    assert_eq!(loads(Duration::from_secs(15)), 1);
    assert_eq!(loads(Duration::ZERO), 4);
}

#[test]
fn the_former_model_comes_back_unless_somebody_waits_for_another() {
    let mut desk = Fixture::new(|_| {});
    let _gone = desk.ask(20.0, 1, "x");
    desk.wait_for_place(20.0);
    desk.failed(21.0);
    assert_eq!(desk.loads, ["b", "a"], "for nobody");
    desk.wait_for_place(21.5);
    desk.loaded(22.0, 0);
    drop(pass(&mut desk.ask(22.0, 0, "x")));
    let mut desk = Fixture::new(|_| {});
    let _gone = desk.ask(20.0, 1, "x");
    desk.wait_for_place(20.0);
    let _waits = desk.ask(20.5, 2, "x");
    desk.failed(21.0);
    assert_eq!(desk.loads, ["b", "c"]);
}

#[test]
fn an_engine_that_hangs_ends_all_of_it_by_name() {
    let mut desk = Fixture::new(|_| {});
    let mut waits = desk.ask(20.0, 1, "x");
    desk.wait_for_place(20.0);
    desk.take(50.0, Message::LoadEnded(LoadEnd::NotVacated(NotVacated::Stuck { limit_s: 30 })));
    assert_eq!(refused(&mut waits).code(), "model_stuck");
    let told = refused(&mut desk.ask(51.0, 0, "x"));
    assert!(told.to_string().contains("restart the server"), "{told}");
    assert!(desk.desk.lineup().trouble().is_some());
    assert_eq!(desk.loads, ["b"], "nothing is loaded into memory that is taken");
}

#[test]
fn an_idle_model_goes_at_its_time_and_what_races_with_it_waits() {
    let idle = Some(Duration::from_secs(30));
    let mut desk = Fixture::new(|limits| limits.idle_unload = idle);
    let working = pass(&mut desk.ask(1.0, 0, "x"));
    desk.until(100.0);
    assert_eq!(desk.unloads, 0, "it has work");
    drop(working);
    desk.passes_back(101.0);
    desk.until(130.9);
    assert_eq!(desk.unloads, 0);
    desk.until(131.1);
    assert_eq!(desk.unloads, 1);
    let mut races = desk.ask(131.2, 0, "x");
    assert!(is_waiting(&mut races) && desk.loads.is_empty(), "its memory is not free yet");
    desk.take(131.3, Message::Unloaded(true));
    assert_eq!(desk.loads, ["a"]);
    desk.wait_for_place(131.4);
    desk.loaded(132.0, 0);
    assert_eq!(pass(&mut races).model_name, "a");
    assert_eq!(desk.desk.lineup().totals.swaps, 0);
}
