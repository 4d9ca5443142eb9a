//! The one place for a model: loads, unloads, and the jobs that both end or wait for.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::response::Response;
use serde_json::{Map, Value, json};
use tokio::{sync::watch, time::Instant};

use super::{
    Shared, TabbyOptions,
    body::{Bound, Checks, flag},
    lock,
    refusal::Refusal,
    sse::{self, Reader, Sink},
};

/// Steps of a load, and what one takes.
const MODULES: usize = 4;
const MODULE_TIME: Duration = Duration::from_millis(5);

/// Holds at most one model.
#[derive(Debug)]
pub(super) struct Place {
    slot: Mutex<Slot>,
    /// Held by a load from beginning to end, so that loads come one after the other.
    loads: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
enum Slot {
    Empty,
    Loading,
    Loaded(Arc<Loaded>),
}

/// A model that is there.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) name: String,
    pub(super) context: usize,
    /// Its card's parameters that a load may set: key and value.
    pub(super) set: BTreeMap<&'static str, Value>,
    /// Whether it has a prompt template; without one there is no chat.
    pub(super) has_template: AtomicBool,
    /// When the first generation is over its slow start. None before the first one.
    warm_at: Mutex<Option<Instant>>,
    ended: watch::Sender<bool>,
    n_jobs: watch::Sender<usize>,
}

/// A generation that runs; the model's waiting load sees it go.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) model: Arc<Loaded>,
    ended: watch::Receiver<bool>,
}

/// The model has gone.
#[derive(Debug)]
pub(super) struct Ended;

impl Place {
    /// A place with a model, or without.
    pub(super) fn new(loaded: Option<&str>, context: usize) -> Place {
        let slot = match loaded {
            Some(name) => Slot::Loaded(Loaded::new(name, context, BTreeMap::new())),
            None => Slot::Empty,
        };
        Place { slot: Mutex::new(slot), loads: tokio::sync::Mutex::default() }
    }

    /// The model, unless there is none or one is loading.
    pub(super) fn model(&self) -> Result<Arc<Loaded>, Refusal> {
        match &*lock(&self.slot) {
            Slot::Loaded(model) => Ok(Arc::clone(model)),
            Slot::Empty | Slot::Loading => Err(Refusal::no_model()),
        }
    }

    /// Begins a job under the slot's lock: a load that comes later waits for it.
    pub(super) fn begin(&self) -> Result<Job, Refusal> {
        match &*lock(&self.slot) {
            Slot::Loaded(model) => {
                model.n_jobs.send_modify(|n_jobs| *n_jobs += 1);
                Ok(Job { model: Arc::clone(model), ended: model.ended.subscribe() })
            }
            Slot::Empty | Slot::Loading => Err(Refusal::no_model()),
        }
    }

    fn replace(&self, slot: Slot) -> Option<Arc<Loaded>> {
        match std::mem::replace(&mut *lock(&self.slot), slot) {
            Slot::Loaded(model) => Some(model),
            Slot::Empty | Slot::Loading => None,
        }
    }
}

impl Loaded {
    fn new(name: &str, context: usize, set: BTreeMap<&'static str, Value>) -> Arc<Loaded> {
        Arc::new(Loaded {
            name: name.into(),
            context,
            set,
            has_template: AtomicBool::new(true),
            warm_at: Mutex::default(),
            ended: watch::Sender::new(false),
            n_jobs: watch::Sender::new(0),
        })
    }

    fn end(&self) {
        self.ended.send_replace(true);
    }

    async fn idle(&self) {
        // An error would mean that the sender, which `self` holds, has gone.
        drop(self.n_jobs.subscribe().wait_for(|n_jobs| *n_jobs == 0).await);
    }
}

impl Job {
    /// Waits for the first token.
    pub(super) async fn warm_up(&mut self, slow_first: Option<Duration>) -> Result<(), Ended> {
        let slow = slow_first.unwrap_or_default();
        let warm_at = *lock(&self.model.warm_at).get_or_insert_with(|| Instant::now() + slow);
        self.pause(warm_at.saturating_duration_since(Instant::now())).await
    }

    /// Lets time go by.
    pub(super) async fn pause(&mut self, time: Duration) -> Result<(), Ended> {
        tokio::select! {
            biased;
            _ = self.ended.wait_for(|ended| *ended) => Err(Ended),
            () = tokio::time::sleep(time) => Ok(()),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.model.n_jobs.send_modify(|n_jobs| *n_jobs -= 1);
    }
}

/// `POST /v1/model/unload`: ends all jobs at once.
pub(super) fn unload(shared: &Shared) -> Result<Value, Refusal> {
    shared.place.model()?;
    if let Some(model) = shared.place.replace(Slot::Empty) {
        model.end();
    }
    Ok(Value::Null)
}

/// What a load asks for.
#[derive(Debug)]
struct Wish {
    name: String,
    context: usize,
    set: BTreeMap<&'static str, Value>,
    draft: Option<String>,
    skip_queue: bool,
}

/// `POST /v1/model/load`.
pub(super) fn load(shared: Arc<Shared>, body: &Map<String, Value>) -> Result<Response, Refusal> {
    let wish = Wish::read(body, &shared.options)?;
    let ping = shared.options.ping;
    Ok(sse::respond(ping, Reader::Optional, |sink| async move {
        bring(&shared, wish, &sink).await;
    }))
}

async fn bring(shared: &Shared, wish: Wish, sink: &Sink) {
    let place = &shared.place;
    let _turn = place.loads.lock().await;
    let checked =
        if shared.faults().loads_without_checking { Ok(()) } else { check_cache(&wish.set) };
    let is_there = place.model().is_ok_and(|model| model.name == wish.name);
    if is_there && checked.is_ok() {
        // Nothing is loaded again, and nothing that the request sets is taken over.
        progress(sink, "model", (1, 1), "processing").await;
        progress(sink, "model", (1, 1), "finished").await;
        return;
    }
    if let Some(old) = place.replace(Slot::Loading) {
        if wish.skip_queue {
            old.end();
        }
        old.idle().await;
    }
    if let Err(wrong) = checked {
        place.replace(Slot::Empty);
        sink.error(&wrong).await;
        return;
    }
    if wish.draft.is_some() {
        progress(sink, "draft", (1, 1), "processing").await;
        progress(sink, "draft", (1, 1), "finished").await;
    }
    for module in 1..=MODULES {
        tokio::time::sleep(MODULE_TIME).await;
        progress(sink, "model", (module, MODULES), "processing").await;
    }
    place.replace(Slot::Loaded(Loaded::new(&wish.name, wish.context, wish.set)));
    progress(sink, "model", (MODULES, MODULES), "finished").await;
}

async fn progress(sink: &Sink, kind: &str, (module, modules): (usize, usize), status: &str) {
    let event = json!({"model_type": kind, "module": module, "modules": modules, "status": status});
    sink.send(&event).await;
}

impl Wish {
    fn read(body: &Map<String, Value>, options: &TabbyOptions) -> Result<Wish, Refusal> {
        let mut checks = Checks::default();
        let text = |key: &str, checks: &mut Checks| match body.get(key) {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => {
                checks.wrong("string_type", &[key], "Input should be a valid string", other);
                None
            }
        };
        let name = text("model_name", &mut checks).filter(|name| !name.is_empty());
        text("cache_mode", &mut checks);
        let context = checks.integer(body, &["max_seq_len"], &[Bound::AtLeast(1.0)]);
        let cache_size = checks.integer(body, &["cache_size"], &[]);
        let skip_queue = flag(checks.boolean(body, "skip_queue"), false);
        let draft = match body.get("draft_model").or_else(|| body.get("draft")) {
            None | Some(Value::Null) => None,
            Some(draft) => Some(draft["draft_model_name"].as_str().unwrap_or_default().to_owned()),
        };
        checks.end()?;
        let name = name.ok_or_else(|| Refusal::bad("A model name was not provided for load."))?;
        if draft.as_ref().is_some_and(String::is_empty) {
            return Err(Refusal::bad("Could not find the draft model name for model load."));
        }
        let is_folder = |name: &String| options.models.contains(name);
        if !is_folder(&name) || draft.as_ref().is_some_and(|draft| !is_folder(draft)) {
            let text = "Could not find the model path for load. Check model name or config.yml?";
            return Err(Refusal::bad(text));
        }
        let kept = ["cache_size", "cache_mode", "rope_scale", "rope_alpha", "chunk_size"];
        let set = kept.into_iter().filter_map(|key| Some((key, body.get(key)?.clone())));
        let context = context.and_then(|context| usize::try_from(context).ok());
        let mut set: BTreeMap<&str, Value> = set.filter(|(_, value)| !value.is_null()).collect();
        if let Some(cache_size) = cache_size {
            set.insert("cache_size", cache_size.into());
        }
        Ok(Wish { name, context: context.unwrap_or(options.context), set, draft, skip_queue })
    }
}

/// What is wrong with the cache that a load asks for.
fn check_cache(set: &BTreeMap<&'static str, Value>) -> Result<(), String> {
    if let Some(size) = set.get("cache_size").and_then(Value::as_i64)
        && (size <= 0 || size % 256 != 0)
    {
        return Err(format!("cache_size must be a multiple of 256, not {size}"));
    }
    let Some(mode) = set.get("cache_mode").and_then(Value::as_str) else { return Ok(()) };
    let is_bits = |text: &str| matches!(text.trim().parse(), Ok(2..=8_u8));
    let is_pair = mode.split_once(',').is_some_and(|(k, v)| is_bits(k) && is_bits(v));
    if is_pair || ["FP16", "Q8", "Q6", "Q4"].contains(&mode) {
        Ok(())
    } else {
        Err(format!("unknown cache_mode {mode}"))
    }
}

/// `POST /v1/template/switch` and `/unload` of the loaded model.
pub(super) fn set_template(model: &Loaded, has_template: bool) -> Value {
    model.has_template.store(has_template, Ordering::SeqCst);
    Value::Null
}
