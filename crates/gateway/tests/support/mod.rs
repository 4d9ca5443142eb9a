//! A gateway in front of a fault proxy in front of a scripted upstream, and a client of it.

#![allow(dead_code, reason = "each test program uses another part")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use exrail_gateway::{FenceOptions, Gateway, GatewayOptions, Proved, Upstream, UpstreamOptions};
use exrail_server::{Keys, TraceLog};
use exrail_testkit::{FaultProxy, ScriptedOptions, ScriptedUpstream};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

pub(crate) const MODEL: &str = "scripted";

pub(crate) fn scripted() -> ScriptedOptions {
    ScriptedOptions {
        model: MODEL.to_owned(),
        tokens: 40,
        first_token: Duration::from_millis(2),
        token: Duration::from_micros(200),
    }
}

/// Short times, so that a test of a limit does not wait for it.
pub(crate) fn options() -> GatewayOptions {
    let (first, stall) = (Duration::from_secs(3), Duration::from_secs(1));
    GatewayOptions {
        fence: FenceOptions {
            first_event: first,
            stall,
            look_every: Duration::from_millis(100),
            retry: Duration::from_millis(50),
            ..FenceOptions::default()
        },
        hold: Duration::from_secs(3),
        first_byte: first,
        stall,
        ..GatewayOptions::default()
    }
}

/// A gateway that runs; it ends with this.
pub(crate) struct Running {
    pub(crate) url: String,
    pub(crate) gateway: Arc<Gateway>,
    runtime: Runtime,
    folder: tempfile::TempDir,
}

impl Running {
    pub(crate) fn over(upstreams: Vec<UpstreamOptions>, options: GatewayOptions) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let traces = TraceLog::open(&folder.path().join("trace.jsonl")).unwrap();
        let upstreams = upstreams.into_iter().map(|it| Upstream::new(it).unwrap()).collect();
        let gateway = Gateway::new(Keys::default(), traces, upstreams, options);
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let served = exrail_gateway::serve(Arc::clone(&gateway), listener, std::future::pending());
        runtime.spawn(served);
        Self { url, gateway, runtime, folder }
    }

    pub(crate) fn prove(&self) {
        let _context = self.runtime.enter();
        self.gateway.prove();
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("trace.jsonl")
    }

    /// The records of one event, oldest first.
    pub(crate) fn records(&self, event: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.log()).unwrap();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let records = whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        records.filter(|record| record["event"] == event).collect()
    }

    pub(crate) fn ready(&self) {
        until("an open fence", || self.gateway.upstreams()[0].proved().is_some());
    }
}

pub(crate) fn upstream(name: &str, address: &str, key: Option<&str>) -> UpstreamOptions {
    UpstreamOptions {
        name: name.to_owned(),
        address: address.to_owned(),
        key: key.map(str::to_owned),
        expected_model: None,
        priority: 0,
        weight: 1,
    }
}

/// [`Running`] over a fault proxy over a scripted upstream.
pub(crate) struct Fixture {
    pub(crate) url: String,
    running: Running,
    pub(crate) proxy: FaultProxy,
    pub(crate) upstream: ScriptedUpstream,
}

impl Fixture {
    pub(crate) fn start() -> Self {
        Self::over(scripted(), true)
    }

    /// Nobody has begun to prove the upstream.
    pub(crate) fn closed() -> Self {
        Self::over(scripted(), false)
    }

    pub(crate) fn over(scripted: ScriptedOptions, proves: bool) -> Self {
        let scripted = ScriptedUpstream::start(scripted).unwrap();
        let proxy = FaultProxy::start(&scripted.url()).unwrap();
        let running = Running::over(vec![upstream("up", &proxy.url(), None)], options());
        if proves {
            running.prove();
        }
        Self { url: running.url.clone(), running, proxy, upstream: scripted }
    }

    pub(crate) fn open(&self) {
        self.running.prove();
    }

    pub(crate) fn ready(&self) {
        self.running.ready();
    }

    /// By what its fence is open now.
    pub(crate) fn proof(&self) -> Option<Arc<Proved>> {
        self.running.gateway.upstreams()[0].proved()
    }

    /// Whether its upstream is proved, with this model.
    pub(crate) fn serves(&self, model: &str) -> bool {
        let proved = self.running.gateway.upstreams()[0].proved();
        proved.is_some_and(|proved| proved.detected.models == [model])
    }

    /// Waits until an upstream that said that it is busy may be asked again.
    pub(crate) fn wait_rest(&self) {
        let rests = || self.running.gateway.upstreams()[0].rests();
        if let Some(time) = rests() {
            std::thread::sleep(time);
        }
    }

    pub(crate) fn records(&self, event: &str) -> Vec<Value> {
        self.running.records(event)
    }

    pub(crate) fn metrics(&self) -> String {
        agent()
            .get(format!("{}/metrics", self.url))
            .call()
            .unwrap()
            .body_mut()
            .read_to_string()
            .unwrap()
    }

    pub(crate) fn upstreams(&self) -> Value {
        let url = format!("{}/v1/exrail/upstreams", self.url);
        agent().get(url).call().unwrap().body_mut().read_json().unwrap()
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build().new_agent()
}

pub(crate) fn chat(prompt: &str, streams: bool) -> Value {
    json!({
        "model": MODEL,
        "messages": [{ "role": "user", "content": prompt }],
        "stream": streams,
    })
}

/// What came back, as far as it came.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) text: String,
    pub(crate) retry_after: Option<String>,
}

pub(crate) fn ask(url: &str, body: &Value) -> Reply {
    ask_at(url, "/v1/chat/completions", body)
}

pub(crate) fn ask_at(url: &str, path: &str, body: &Value) -> Reply {
    let mut answer = agent().post(format!("{url}{path}")).send_json(body).unwrap();
    let retry_after = answer.headers().get("retry-after").map(|it| it.to_str().unwrap().to_owned());
    let mut text = String::new();
    // A cut body is told by what there is of it.
    answer.body_mut().as_reader().read_to_string(&mut text).ok();
    Reply { status: answer.status().as_u16(), text, retry_after }
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    fn events(&self) -> Vec<Value> {
        let data = self.text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter_map(|data| serde_json::from_str(data).ok()).collect()
    }

    /// The code of its error, or of an error event.
    pub(crate) fn code(&self) -> Option<String> {
        let all = std::iter::once(self.json()).chain(self.events());
        let mut codes = all.filter_map(|it| it["error"]["code"].as_str().map(str::to_owned));
        codes.next()
    }

    /// Whether a stream ended as a whole one.
    pub(crate) fn is_done(&self) -> bool {
        self.text.contains("data: [DONE]")
    }

    /// Whether it is an answer, whole as far as it tells.
    pub(crate) fn is_answer(&self) -> bool {
        let finished = |it: &Value| it["choices"][0]["finish_reason"].is_string();
        let is_whole =
            finished(&self.json()) || (self.events().iter().any(finished) && self.is_done());
        self.status == 200 && self.code().is_none() && is_whole
    }

    /// The text of its first choice.
    pub(crate) fn content(&self) -> String {
        let whole = self.json()["choices"][0]["message"]["content"].as_str().map(str::to_owned);
        let part = |it: Value| it["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
        whole.unwrap_or_else(|| self.events().into_iter().filter_map(part).collect())
    }
}

/// Sends a request and reads nothing.
pub(crate) fn begin(url: &str, body: &Value) -> TcpStream {
    let host = url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    let body = body.to_string();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    // It has been read before anybody leaves.
    std::thread::sleep(Duration::from_millis(100));
    stream
}

/// Reads the beginning of a stream and goes.
pub(crate) fn leave_early(url: &str, body: &Value) {
    let mut lines = BufReader::new(begin(url, body)).lines();
    let content = |line: std::io::Result<String>| line.unwrap().contains("\"content\":\"");
    assert!(lines.any(content), "a first token");
}

/// Waits for what has to happen soon.
pub(crate) fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(20), "expected {what} within 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}
