//! Several generators of which one at a time is loaded (G-01, G-05, G-25; field faults G5, F11): real engines
//! of tiny models with different weights, loaded by a loader that can be told to fail.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    error::Error,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{Method, StatusCode, header},
};
use exrail_engine::{
    EngineHandle, Event, GenerateRequest, Sampling, WarmUpPlan, WarmUpReport, warm_up,
};
use exrail_server::{
    AppState, BootOwner, Fleet, LoadCall, Loader, Pace, Phase, Services, SwapLimits, router,
};
use futures_util::{StreamExt, future::join_all};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::{
    faulty::Faulty,
    support::{
        Answer, MODEL, Server, cold, cpu, events, four, pass, plan, request, services_of,
        start_seeded,
    },
};

const OTHER: &str = "other";
const THIRD: &str = "third";
const NAMES: [&str; 3] = [MODEL, OTHER, THIRD];

/// What goes wrong with a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// It is seen before the place is asked for.
    Refused,
    /// It is seen when the place is free.
    Broken,
    /// The loader panics there.
    Panics,
    /// The place is not asked for.
    Beside,
    /// No token is generated before it is handed over.
    Cold,
    /// What was loaded is another model.
    Wrong,
}

/// Engines that are there, now and at most.
#[derive(Debug, Default)]
struct Count {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// An engine that is there until this is dropped, which is when its backend is.
#[derive(Debug)]
struct Alive(Arc<Count>);

impl Alive {
    fn of(count: &Arc<Count>) -> Self {
        let now = count.now.fetch_add(1, Ordering::AcqRel) + 1;
        count.most.fetch_max(now, Ordering::AcqRel);
        Self(Arc::clone(count))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Loads tiny models.
#[derive(Default)]
struct Yard {
    alive: Arc<Count>,
    faults: Mutex<BTreeMap<&'static str, Fault>>,
    n_calls: AtomicUsize,
    /// What each step takes longer.
    delay: Duration,
    /// A token whose step hangs until the channel is closed.
    hang: Option<(u32, flume::Receiver<Infallible>)>,
    /// Whether a load runs a real warm-up.
    warms: bool,
}

impl Yard {
    fn engine(&self, name: &str) -> EngineHandle {
        let end = Arc::new(Alive::of(&self.alive));
        let (delay, hang) = (self.delay, self.hang.clone());
        let backend = Faulty { end: Some(end), delay, hang, ..Faulty::new(cpu()) };
        start_seeded(seed(name), backend, four(), |_| {})
    }

    fn fail(&self, name: &'static str, fault: Option<Fault>) {
        let mut faults = self.faults.lock().unwrap();
        match fault {
            Some(fault) => faults.insert(name, fault),
            None => faults.remove(name),
        };
    }

    fn calls(&self) -> usize {
        self.n_calls.load(Ordering::Acquire)
    }

    fn phases(
        &self,
        owner: &BootOwner,
        name: &str,
        fault: Option<Fault>,
    ) -> Result<(EngineHandle, Option<WarmUpReport>), Box<dyn Error + Send + Sync>> {
        let weights = || -> Result<EngineHandle, Box<dyn Error + Send + Sync>> {
            assert_ne!(fault, Some(Fault::Panics), "injected panic");
            let name = if fault == Some(Fault::Wrong) { MODEL } else { name };
            if fault == Some(Fault::Broken) {
                Err("truncated".into())
            } else {
                Ok(self.engine(name))
            }
        };
        let engine = owner.run(Phase::Weights, weights, |_| Ok("loaded".into()))?;
        let warm = || Ok(self.warms.then(|| warm_up(&engine, &WarmUpPlan::of(&engine)).unwrap()));
        let report = if fault == Some(Fault::Cold) {
            None
        } else {
            let warmed = |_: &Option<WarmUpReport>| Ok("tokens".into());
            let report =
                owner.run::<_, Box<dyn Error + Send + Sync>>(Phase::WarmUp, warm, warmed)?;
            pass(owner, Phase::Sentinel);
            report
        };
        Ok((engine, report))
    }
}

impl Loader for Yard {
    fn load(&self, call: &LoadCall<'_>) -> Result<Services, Box<dyn Error + Send + Sync>> {
        self.n_calls.fetch_add(1, Ordering::AcqRel);
        let fault = self.faults.lock().unwrap().get(call.model).copied();
        let owner = call.board.own(plan(), Pace::default(), |_| {})?;
        if fault == Some(Fault::Refused) {
            return Err("does not fit".into());
        }
        if fault != Some(Fault::Beside) {
            call.vacate(&mut || {})?;
        }
        let (engine, report) = self.phases(&owner, call.model, fault)?;
        let name = if fault == Some(Fault::Wrong) { MODEL } else { call.model };
        Ok(call.shelf.services(name.to_owned(), engine, report))
    }
}

fn seed(name: &str) -> u64 {
    7 + NAMES.iter().position(|known| *known == name).unwrap() as u64
}

/// Rules without waits, so that tests are quick.
fn quick() -> SwapLimits {
    SwapLimits {
        turn: Duration::ZERO,
        linger: Duration::ZERO,
        cool_down: Duration::from_secs(600),
        ..SwapLimits::default()
    }
}

/// A server with three models of which [`MODEL`] is loaded.
fn serve(yard: &Arc<Yard>, limits: SwapLimits) -> Arc<Server> {
    let server = cold(&[], None);
    let services = services_of(yard.engine(MODEL), server.folder.path());
    let owner = server.own();
    for phase in [Phase::Weights, Phase::WarmUp, Phase::Sentinel] {
        pass(&owner, phase);
    }
    let names = NAMES.map(str::to_owned).to_vec();
    let loader: Arc<dyn Loader> = Arc::clone(yard) as _;
    server.state.open_fleet(services, Fleet { names, loader: Some(loader), limits }).unwrap();
    Arc::new(server)
}

fn served(limits: SwapLimits) -> (Arc<Yard>, Arc<Server>) {
    let yard = Arc::new(Yard::default());
    let server = serve(&yard, limits);
    (yard, server)
}

/// Greedy, and nothing ends it but its limit.
fn ask(model: &str, n_tokens: usize) -> Value {
    json!({"model": model, "prompt": [5, 9, 17], "max_tokens": n_tokens, "temperature": 0,
        "logit_bias": {"2": -100}})
}

async fn complete(server: &Server, model: &str) -> Answer {
    server.post("/v1/completions", &ask(model, 6)).await
}

fn text(answer: &Answer) -> String {
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    answer.json()["choices"][0]["text"].as_str().unwrap().to_owned()
}

/// What each model answers when nobody else is there, and its fingerprint.
async fn alone() -> BTreeMap<&'static str, (String, Value)> {
    let (_yard, server) = served(quick());
    let mut answers = BTreeMap::new();
    for name in NAMES {
        let answer = complete(&server, name).await;
        answers.insert(name, (text(&answer), answer.json()["system_fingerprint"].clone()));
    }
    let distinct: BTreeSet<_> = answers.values().map(|(text, _)| text.clone()).collect();
    assert_eq!(distinct.len(), NAMES.len(), "the models answer differently: {answers:?}");
    answers
}

fn state_of(state: &AppState, name: &str) -> &'static str {
    let lineup = state.models().unwrap().lineup();
    lineup.models[lineup.index(name).unwrap()].state.name()
}

/// Waits until it holds.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < limit, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn spawn(server: &Arc<Server>, body: Value) -> tokio::task::JoinHandle<Answer> {
    let server = Arc::clone(server);
    tokio::spawn(async move { server.post("/v1/completions", &body).await })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_loads_the_model_that_it_names() {
    let yard = Arc::new(Yard { warms: true, ..Yard::default() });
    let server = serve(&yard, quick());
    let unknown = complete(&server, "nobody").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    assert!(unknown.text.contains("`tiny`, `other`, `third`"), "{}", unknown.text);
    assert_eq!(yard.calls(), 0, "a wrong name loads nothing");
    let answer = complete(&server, OTHER).await;
    assert_eq!(answer.json()["model"], OTHER);
    assert_eq!(
        (state_of(&server.state, OTHER), state_of(&server.state, MODEL)),
        ("loaded", "unloaded")
    );
    let cards = server.get("/v1/models").await.json();
    let states: Vec<_> = (0..3).map(|at| cards["data"][at]["exrail"]["state"].clone()).collect();
    assert_eq!(states, ["unloaded", "loaded", "unloaded"]);
    assert_eq!(server.get("/v1/models/third").await.json()["exrail"]["kind"], "generator");
    // The fence of the new engine is closed, and it has built nothing behind it.
    let metrics = server.get("/metrics").await.text;
    for line in [
        "exrail_built_after_fence{counter=\"device_allocs\"} 0\n",
        "exrail_model_loads_total{model=\"other\"} 1\n",
        "exrail_model_state{model=\"other\",state=\"loaded\"} 1\n",
        "exrail_model_swaps_total 1\n",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    assert_eq!(server.get("/v1/exrail/config").await.json()["model"], OTHER);
    assert_eq!(server.get("/readyz").await.json()["models"][1]["state"], "loaded");
}

/// G-14: what was loaded and unloaded is in the log, with its phases.
#[tokio::test(flavor = "multi_thread")]
async fn loads_and_unloads_are_traced() {
    let (_yard, server) = served(quick());
    text(&complete(&server, OTHER).await);
    let has = |event: &str, model: &str| {
        let lines = server.trace_lines();
        lines.iter().any(|it| it["event"] == event && it["model"] == model && it["ok"] == true)
    };
    until("records", || has("model.unload", MODEL) && has("model.load", OTHER)).await;
    let lines = server.trace_lines();
    let phases = lines.iter().filter(|line| line["event"] == "boot.phase");
    let phases: Vec<_> = phases.map(|line| line["phase"].clone()).collect();
    assert_eq!(phases, ["weights", "warmup", "sentinel"]);
}

/// Deterministic numbers for clients.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// A client that alternates between models and now and then goes before its answer came.
async fn client(server: Arc<Server>, seed: u64) -> Vec<(&'static str, Answer)> {
    let mut random = seed;
    let mut answers = Vec::new();
    for _ in 0..12 {
        let model = NAMES[usize::try_from(next(&mut random) % 2).unwrap()];
        match next(&mut random) % 4 {
            0 => {
                let patience = Duration::from_millis(next(&mut random) % 40);
                drop(tokio::time::timeout(patience, complete(&server, model)).await);
            }
            1 => cut_stream(&server, model).await,
            _ => answers.push((model, complete(&server, model).await)),
        }
    }
    answers
}

/// Reads the first event of a stream and hangs up.
async fn cut_stream(server: &Server, model: &str) {
    let mut body = ask(model, 200);
    body["stream"] = json!(true);
    let request = request(Method::POST, "/v1/completions", None, Body::from(body.to_string()));
    let response = router(Arc::clone(&server.state)).oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let first = response.into_body().into_data_stream().next().await;
    assert!(String::from_utf8_lossy(&first.unwrap().unwrap()).contains(model));
}

/// Whether an answer is that of the model that was asked: its name, its fingerprint and its text.
fn is_of(answer: &Answer, model: &'static str, alone: &BTreeMap<&str, (String, Value)>) -> bool {
    let told = answer.json();
    let (text, fingerprint) = &alone[model];
    told["model"] == model
        && told["choices"][0]["text"] == json!(text)
        && told["system_fingerprint"] == *fingerprint
}

/// Field fault G5: four clients alternate between two models, streams are cut and requests given up while
/// models load; every answer is of the model that was asked, and two are never in memory.
#[tokio::test(flavor = "multi_thread")]
async fn g5_four_clients_alternate_and_no_two_models_mix() {
    let alone = alone().await;
    let (yard, server) = served(SwapLimits { turn: Duration::from_millis(20), ..quick() });
    let clients = (0..4).map(|seed| tokio::spawn(client(Arc::clone(&server), seed)));
    let answers = join_all(clients).await.into_iter().flat_map(Result::unwrap).collect::<Vec<_>>();
    assert!(answers.len() > 10);
    for (model, answer) in &answers {
        assert!(is_of(answer, model, &alone), "{model}: {}", answer.text);
    }
    assert_eq!(yard.alive.most.load(Ordering::Acquire), 1, "engines at once");
    let settled =
        || NAMES.iter().all(|name| ["loaded", "unloaded"].contains(&state_of(&server.state, name)));
    until("loaded or unloaded", settled).await;
    let lineup = server.state.models().unwrap().lineup();
    assert!(lineup.totals.swaps > 1, "{:?}", lineup.totals);
    assert_eq!(lineup.totals.cut, 0);
    // The pins in the records are those of the engine that answered.
    let pins: BTreeSet<_> = server
        .trace_lines()
        .iter()
        .filter(|line| line["event"] == "infer.run")
        .map(|line| line["pins"]["model_fp"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(pins.len(), 2);
}

/// The same request past the gate: to whoever is loaded.
async fn complete_ungated(server: &Server) -> String {
    let engine = server.state.services().unwrap().engine.clone();
    let request = GenerateRequest {
        sampling: Sampling { logit_bias: vec![(2, -100.0)], ..Sampling::greedy() },
        ..GenerateRequest::new(vec![5, 9, 17], 6)
    };
    let generation = engine.submit(request).unwrap();
    let mut text = String::new();
    while let Ok(event) = generation.events.recv_async().await {
        match event {
            Event::Token(token) => text.push_str(&token.text),
            Event::Tail(tail) => text.push_str(&tail),
            Event::Started { .. }
            | Event::Rotated(_)
            | Event::RolledBack { .. }
            | Event::Finished(_)
            | Event::Failed(_) => {}
        }
    }
    text
}

/// The mutation: without the gate a request for one model is answered by the other one, and the text tells.
#[tokio::test(flavor = "multi_thread")]
async fn mutation_g5_without_the_gate_the_wrong_model_answers() {
    let alone = alone().await;
    let (_yard, server) = served(quick());
    assert_eq!(complete_ungated(&server).await, alone[MODEL].0, "as long as nobody swaps");
    text(&complete(&server, OTHER).await);
    let mixed = complete_ungated(&server).await;
    assert_ne!(mixed, alone[MODEL].0);
    assert_eq!(mixed, alone[OTHER].0);
    assert!(is_of(&complete(&server, MODEL).await, MODEL, &alone), "with the gate");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_the_old_model_finish_before_it_goes() {
    let yard = Arc::new(Yard { delay: Duration::from_millis(2), ..Yard::default() });
    let server = serve(&yard, quick());
    let mut body = ask(MODEL, 150);
    body["stream"] = json!(true);
    let old = spawn(&server, body);
    let running = || server.state.models().unwrap().lineup().models[0].running == 1;
    until("it runs", running).await;
    let new = spawn(&server, ask(OTHER, 6));
    until("it is draining", || state_of(&server.state, MODEL) == "draining").await;
    // Nobody is let in to a model that has to go.
    let late = spawn(&server, ask(MODEL, 6));
    let old = old.await.unwrap();
    assert_eq!(events(&old.text).last(), Some(&"[DONE]"), "{}", old.text);
    assert_eq!(new.await.unwrap().json()["model"], OTHER);
    assert_eq!(late.await.unwrap().json()["model"], MODEL);
    let totals = server.state.models().unwrap().lineup().totals;
    assert_eq!((totals.swaps, totals.cut), (2, 0));
}

/// The mutation: without time to finish the same stream is cut; it ends with a named error, and never as if it
/// were whole.
#[tokio::test(flavor = "multi_thread")]
async fn mutation_without_a_drain_the_same_stream_is_cut_by_name() {
    let yard = Arc::new(Yard { delay: Duration::from_millis(2), ..Yard::default() });
    let server = serve(&yard, SwapLimits { drain: Duration::ZERO, ..quick() });
    let mut body = ask(MODEL, 1500);
    body["stream"] = json!(true);
    let streamed = spawn(&server, body);
    let whole = spawn(&server, ask(MODEL, 1500));
    until("they run", || server.state.models().unwrap().lineup().models[0].running == 2).await;
    assert!(!text(&complete(&server, OTHER).await).is_empty());
    let (streamed, whole) = (streamed.await.unwrap(), whole.await.unwrap());
    assert!(!streamed.text.contains("[DONE]"), "{}", streamed.text);
    assert!(streamed.text.contains("model_swapped_out"), "{}", streamed.text);
    assert_eq!(
        (whole.status, whole.code().as_str()),
        (StatusCode::SERVICE_UNAVAILABLE, "model_swapped_out")
    );
    assert_eq!(server.state.models().unwrap().lineup().totals.cut, 2);
}

/// A model that cannot give its place up yet, and whoever waits for another one.
async fn crowded(limits: SwapLimits) -> (Arc<Server>, tokio::task::JoinHandle<Answer>) {
    let yard = Arc::new(Yard { delay: Duration::from_millis(2), ..Yard::default() });
    let server = serve(&yard, limits);
    let long = spawn(&server, ask(MODEL, 1500));
    until("it runs", || server.state.models().unwrap().lineup().models[0].running == 1).await;
    (server, long)
}

fn waiting(server: &Server) -> usize {
    server.state.models().unwrap().lineup().models.iter().map(|model| model.waiting).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_is_bounded_by_places_and_by_deadlines() {
    let (server, long) = crowded(SwapLimits { waiting: 2, tenant_waiting: 2, ..quick() }).await;
    let waits = spawn(&server, ask(OTHER, 2));
    let mut body = ask(OTHER, 2);
    body["deadline_ms"] = json!(300);
    let late = spawn(&server, body);
    until("two wait", || waiting(&server) == 2).await;
    let refused = complete(&server, THIRD).await;
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (StatusCode::SERVICE_UNAVAILABLE, "model_busy")
    );
    let retry_after = refused.headers[header::RETRY_AFTER].to_str().unwrap();
    assert!(retry_after.parse::<u64>().unwrap() >= 1);
    let late = late.await.unwrap();
    assert_eq!(
        (late.status, late.code().as_str()),
        (StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded")
    );
    // Who hangs up waits no longer, and nothing is loaded for nobody.
    waits.abort();
    until("nobody waits", || waiting(&server) == 0).await;
    until("nothing is loaded", || state_of(&server.state, OTHER) == "unloaded").await;
    assert_eq!(state_of(&server.state, MODEL), "loaded");
    assert_eq!(long.await.unwrap().status, StatusCode::OK);
    assert_eq!(server.state.models().unwrap().lineup().totals.swaps, 0);
}

/// The mutation: with places without end nobody is refused, however many wait.
#[tokio::test(flavor = "multi_thread")]
async fn mutation_without_the_bound_everybody_waits() {
    let (server, long) =
        crowded(SwapLimits { waiting: usize::MAX, tenant_waiting: usize::MAX, ..quick() }).await;
    let many: Vec<_> = (0..300).map(|_| spawn(&server, ask(OTHER, 2))).collect();
    until("all wait", || waiting(&server) == 300).await;
    many.iter().for_each(tokio::task::JoinHandle::abort);
    assert_eq!(long.await.unwrap().status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_fit_is_refused_and_the_loaded_one_stays() {
    let yard = Arc::new(Yard { delay: Duration::from_millis(2), ..Yard::default() });
    let server = serve(&yard, quick());
    yard.fail(OTHER, Some(Fault::Refused));
    let old = spawn(&server, ask(MODEL, 100));
    for n in 0..3 {
        let refused = complete(&server, OTHER).await;
        assert_eq!(
            (refused.status, refused.code().as_str()),
            (StatusCode::SERVICE_UNAVAILABLE, "model_load_failed"),
            "{n}"
        );
        assert!(refused.text.contains("does not fit"), "{}", refused.text);
        assert!(refused.headers.contains_key(header::RETRY_AFTER));
    }
    assert_eq!(yard.calls(), 1, "it is not tried again at once");
    assert_eq!(old.await.unwrap().status, StatusCode::OK);
    assert_eq!(
        (state_of(&server.state, MODEL), state_of(&server.state, OTHER)),
        ("loaded", "failed")
    );
    let ready = server.get("/readyz").await;
    assert_eq!(ready.status, StatusCode::OK);
    assert_eq!(ready.json()["models"][1]["reason"], "does not fit");
}

/// A load that fails when the place is free: the former model is loaded again, whatever the failure.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_failed_load_the_former_model_is_back() {
    for (fault, told) in [
        (Fault::Broken, "truncated"),
        (Fault::Panics, "the load panicked"),
        (Fault::Cold, "expected phase `warmup`"),
        (Fault::Wrong, "expected model `other`, found `tiny`"),
    ] {
        let (yard, server) = served(quick());
        yard.fail(OTHER, Some(fault));
        let refused = complete(&server, OTHER).await;
        assert_eq!(refused.code(), "model_load_failed", "{fault:?}: {}", refused.text);
        assert!(refused.text.contains(told), "{fault:?}: {}", refused.text);
        until("the former model is back", || state_of(&server.state, MODEL) == "loaded").await;
        text(&complete(&server, MODEL).await);
        assert_eq!(server.get("/readyz").await.status, StatusCode::OK);
        assert_eq!(yard.alive.most.load(Ordering::Acquire), 1, "{fault:?}");
    }
}

/// What does not ask for its place is not served, and goes again.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_was_loaded_beside_the_other_one_is_not_served() {
    let (yard, server) = served(quick());
    yard.fail(OTHER, Some(Fault::Beside));
    let refused = complete(&server, OTHER).await;
    assert_eq!(refused.code(), "model_load_failed");
    assert!(refused.text.contains("wait for its place"), "{}", refused.text);
    assert_eq!(yard.alive.most.load(Ordering::Acquire), 2, "the fault is there");
    assert_eq!(yard.alive.now.load(Ordering::Acquire), 1);
    assert_eq!(state_of(&server.state, MODEL), "loaded");
}

/// The mutation: without a cool-down every request for a broken model takes the good one's place away.
#[tokio::test(flavor = "multi_thread")]
async fn mutation_without_a_cool_down_a_broken_model_unloads_a_good_one_again_and_again() {
    for (cool_down, swaps) in [(Duration::from_secs(600), 1), (Duration::ZERO, 3)] {
        let (yard, server) = served(SwapLimits { cool_down, ..quick() });
        yard.fail(OTHER, Some(Fault::Broken));
        for _ in 0..3 {
            assert_eq!(complete(&server, OTHER).await.code(), "model_load_failed");
            until("the former model is back", || state_of(&server.state, MODEL) == "loaded").await;
        }
        assert_eq!(server.state.models().unwrap().lineup().totals.swaps, swaps, "{cool_down:?}");
    }
}

/// Nothing can be loaded: the server says so, and goes on when it can.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_any_model_is_not_ready_and_says_why() {
    let (yard, server) = served(SwapLimits { cool_down: Duration::from_millis(1), ..quick() });
    NAMES.iter().for_each(|name| yard.fail(name, Some(Fault::Broken)));
    for name in [OTHER, THIRD, MODEL] {
        assert_eq!(complete(&server, name).await.code(), "model_load_failed");
        until("it has failed", || state_of(&server.state, name) == "failed").await;
    }
    until("all have failed", || NAMES.iter().all(|name| state_of(&server.state, name) == "failed"))
        .await;
    let ready = server.get("/readyz").await;
    assert_eq!(ready.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(ready.json()["reason"].as_str().unwrap().contains("truncated"), "{}", ready.text);
    assert_eq!(server.get("/livez").await.status, StatusCode::OK);
    NAMES.iter().for_each(|name| yard.fail(name, None));
    tokio::time::sleep(Duration::from_millis(300)).await;
    text(&complete(&server, MODEL).await);
    assert_eq!(server.get("/readyz").await.status, StatusCode::OK);
}

/// A model in a step that hangs, and who waits for another one.
async fn hanging(
    stop: Duration,
) -> (Arc<Server>, flume::Sender<Infallible>, tokio::task::JoinHandle<Answer>) {
    let (release, released) = flume::bounded(0);
    let yard = Arc::new(Yard { hang: Some((77, released)), ..Yard::default() });
    let server = serve(&yard, SwapLimits { drain: Duration::ZERO, stop, ..quick() });
    let hangs = spawn(&server, json!({"model": MODEL, "prompt": [77, 9], "max_tokens": 1}));
    let engine = server.state.services().unwrap().engine.clone();
    until("it hangs", || engine.counters().sequences_running == 1).await;
    let waits = spawn(&server, ask(OTHER, 2));
    drop(hangs);
    (server, release, waits)
}

/// An engine that cannot be ended holds its memory: nothing is loaded beside it, and the server says that only a
/// restart helps.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_hangs_when_it_has_to_go_is_told_and_nothing_is_loaded_beside_it() {
    let (server, _release, waits) = hanging(Duration::from_millis(200)).await;
    let refused = waits.await.unwrap();
    assert_eq!((refused.status.as_u16(), refused.code().as_str()), (503, "model_stuck"));
    let livez = server.get("/livez").await;
    assert_eq!((livez.status.as_u16(), &livez.json()["status"]), (503, &json!("stuck")));
    let ready = server.get("/readyz").await;
    assert_eq!(ready.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(
        ready.json()["reason"].as_str().unwrap().contains("restart the server"),
        "{}",
        ready.text
    );
    assert_eq!(complete(&server, MODEL).await.code(), "model_stuck");
}

/// The mutation: without the limit whoever asks waits as long as it hangs, and the server looks alive.
#[tokio::test(flavor = "multi_thread")]
async fn mutation_without_the_limit_whoever_asks_waits_for_what_hangs() {
    let (server, release, waits) = hanging(Duration::from_secs(3600)).await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(!waits.is_finished());
    assert_eq!(server.get("/livez").await.status, StatusCode::OK);
    drop(release);
    assert_eq!(waits.await.unwrap().json()["model"], OTHER);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_model_is_unloaded_and_comes_back_when_it_is_asked_for() {
    let idle_unload = Some(Duration::from_millis(100));
    let (yard, server) = served(SwapLimits { idle_unload, ..quick() });
    for _ in 0..3 {
        text(&complete(&server, MODEL).await);
        until("it is unloaded", || state_of(&server.state, MODEL) == "unloaded").await;
        assert_eq!(yard.alive.now.load(Ordering::Acquire), 0, "its memory is given back");
        let ready = server.get("/readyz").await;
        assert_eq!(
            (ready.status, &ready.json()["models"][0]["state"]),
            (StatusCode::OK, &json!("unloaded"))
        );
        assert_eq!(server.get("/livez").await.status, StatusCode::OK);
        assert_eq!(server.get("/v1/exrail/config").await.json()["context"], Value::Null);
    }
    // What does not need a generator does not load one.
    let embedded = json!({"model": "fake", "input": "a key"});
    assert_eq!(server.post("/v1/embeddings", &embedded).await.status, StatusCode::OK);
    assert_eq!(yard.alive.now.load(Ordering::Acquire), 0);
    // Collections have stayed.
    let question = json!({"question": "Where is the spare key of cabinet B?", "max_tokens": 4});
    assert_eq!(server.post("/v1/ask", &question).await.status, StatusCode::OK);
    assert!(server.state.models().unwrap().lineup().totals.idle_unloads >= 3);
}

/// Requests that come in the moment of the unload are answered.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_race_with_the_unload_are_not_lost() {
    let idle_unload = Some(Duration::from_millis(3));
    let (yard, server) = served(SwapLimits { idle_unload, ..quick() });
    let alone = text(&complete(&server, MODEL).await);
    for n in 0..40 {
        tokio::time::sleep(Duration::from_millis(2 + n % 4)).await;
        let both = join_all([complete(&server, MODEL), complete(&server, MODEL)]).await;
        both.iter().for_each(|answer| assert_eq!(text(answer), alone));
    }
    assert!(server.state.models().unwrap().lineup().totals.idle_unloads > 3);
    assert_eq!(yard.alive.most.load(Ordering::Acquire), 1);
}

/// Without the option nothing is unloaded.
#[tokio::test(flavor = "multi_thread")]
async fn mutation_without_the_option_an_idle_model_stays() {
    let (yard, server) = served(quick());
    text(&complete(&server, MODEL).await);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(state_of(&server.state, MODEL), "loaded");
    assert_eq!(yard.alive.now.load(Ordering::Acquire), 1);
}

/// Two clients for each of two models ask without a pause for a while; how often models changed, and answers.
async fn contended(limits: SwapLimits) -> (u64, [usize; 2]) {
    let (_yard, server) = served(limits);
    let end = Instant::now() + Duration::from_secs(2);
    let client = |model: &'static str| {
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            let mut n = 0;
            while Instant::now() < end {
                text(&complete(&server, model).await);
                n += 1;
                // Between two requests a client thinks.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            n
        })
    };
    let clients = [MODEL, MODEL, OTHER, OTHER].map(client);
    let n: Vec<usize> = join_all(clients).await.into_iter().map(Result::unwrap).collect();
    (server.state.models().unwrap().lineup().totals.swaps, [n[0] + n[1], n[2] + n[3]])
}

/// Alternating clients do not make the server thrash, nobody starves, and without turns it does thrash.
#[tokio::test(flavor = "multi_thread")]
async fn turns_keep_alternating_clients_from_thrashing() {
    let turns = SwapLimits {
        turn: Duration::from_millis(500),
        linger: Duration::from_millis(200),
        ..quick()
    };
    let (swaps, answers) = contended(turns).await;
    // A turn is 500 ms or more, and the last one may begin behind the end.
    assert!((1..=5).contains(&swaps), "{swaps}");
    assert!(answers.iter().all(|&n| n > 4), "{answers:?}");
    let (thrashes, _) = contended(quick()).await;
    assert!(thrashes > 2 * swaps, "{thrashes} without turns, {swaps} with them");
}

/// Resident memory of this process, in KiB.
fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

/// Swaps until the allocator has seen every thread and size.
const SETTLED: usize = 20;

/// Times that fifty swaps are looked at. What a swap leaves behind shows each time; a heap that threads came
/// upon in another order grows in one of them.
const WINDOWS: usize = 3;

/// The least KiB that this process grew by over fifty swaps, of [`WINDOWS`] times; with `leaks` every swap
/// leaves an engine behind.
async fn growth_kib(leaks: bool) -> usize {
    let (yard, server) = served(quick());
    let mut sizes = Vec::new();
    let mut left_behind = Vec::new();
    let n_swaps = SETTLED + 50 * WINDOWS;
    for n in 1..=n_swaps {
        text(&complete(&server, NAMES[n % 2]).await);
        if leaks {
            left_behind.push(yard.engine(THIRD));
        }
        assert_eq!(yard.alive.now.load(Ordering::Acquire), 1 + left_behind.len());
        if n >= SETTLED && (n - SETTLED).is_multiple_of(50) {
            sizes.push(resident_kib());
        }
    }
    assert_eq!(server.state.models().unwrap().lineup().totals.swaps as usize, n_swaps);
    let growths = sizes.windows(2).map(|pair| pair[1].saturating_sub(pair[0]));
    growths.min().expect("windows")
}

/// Growth of a process in which nothing else runs.
fn growth_alone_kib(test: &str, leaks: bool) -> Option<usize> {
    const ALONE: &str = "SWAP_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return Some(runtime.block_on(growth_kib(leaks)));
    }
    let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
    let output = alone.args(["--exact", test]).env(ALONE, "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "it ran");
    None
}

/// Most that fifty swaps may add, in KiB: less than one of the tiny models takes.
const FLAT_KIB: usize = 2 << 10;

/// Field fault F11: fifty swaps leave nothing behind.
#[test]
fn f11_memory_is_flat_over_fifty_swaps() {
    let grown = growth_alone_kib("swap::f11_memory_is_flat_over_fifty_swaps", false);
    assert!(grown.is_none_or(|kib| kib < FLAT_KIB), "{grown:?} KiB");
}

/// The mutation: engines that are not given back show in the same number.
#[test]
fn mutation_f11_engines_that_stay_show_in_the_memory() {
    let grown = growth_alone_kib("swap::mutation_f11_engines_that_stay_show_in_the_memory", true);
    assert!(grown.is_none_or(|kib| kib > 4 * FLAT_KIB), "{grown:?} KiB");
}
