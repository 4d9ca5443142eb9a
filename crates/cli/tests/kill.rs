//! The program killed with SIGKILL at random moments, fifty of ingest and fifty of session save and trace
//! writing: what was acknowledged is there, every store opens, and nothing half-written confuses the next
//! start.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use exrail_testkit::{Random, TinyLlama, tiny_bert, tiny_llama};
use serde_json::{Value, json};
use tempfile::TempDir;

const INGEST_KILLS: usize = 50;
/// Each of a server that writes traces and sessions at once.
const SERVER_KILLS: usize = 50;

fn exrail(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exrail"));
    command.env("EXRAIL_HOME", home).env("EXRAIL_OFFLINE", "true");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A moment of a run that takes `whole`, or a little later.
fn moment(random: &mut Random, whole: Duration) -> Duration {
    whole.mul_f64(1.1) * u32::try_from(random.below(1000)).unwrap() / 1000
}

/// Documents, and collections made of them.
struct Library {
    place: TempDir,
    n_documents: usize,
}

impl Library {
    fn new() -> Library {
        let place = tempfile::tempdir().unwrap();
        tiny_bert(1, &place.path().join("encoder")).unwrap();
        std::fs::create_dir(place.path().join("docs")).unwrap();
        Library { place, n_documents: 0 }
    }

    fn add_document(&mut self) {
        let n = self.n_documents;
        let text = format!(
            "# Valve {n}\n\nThe pressure of pump {n} is at most {n} after the valve was made, and the \
             customer may return it by day {n} of the warranty.\n"
        );
        std::fs::write(self.place.path().join(format!("docs/valve{n}.md")), text).unwrap();
        self.n_documents += 1;
    }

    fn collection(&self, n: usize) -> PathBuf {
        self.place.path().join(format!("collection{n}"))
    }

    fn ingest(&self, collection: &Path) -> Child {
        let path = |name: &str| self.place.path().join(name);
        let mut command = exrail(self.place.path());
        command.arg("ingest").arg(path("docs")).arg("--collection").arg(collection);
        command.arg("--encoder").arg(path("encoder")).args(["--threads", "1", "--json"]);
        command.spawn().unwrap()
    }

    /// The report of a run that nobody kills, and the time that it took.
    fn whole(&self, collection: &Path) -> (Value, Duration) {
        let begun = Instant::now();
        let output = self.ingest(collection).wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "the store opens: {said}");
        (serde_json::from_slice(&output.stdout).unwrap(), begun.elapsed())
    }
}

/// Kills a run, and says whether it had ended well before.
fn kill_at(mut child: Child, after: Duration) -> bool {
    std::thread::sleep(after);
    child.kill().unwrap();
    child.wait_with_output().unwrap().status.success()
}

#[test]
fn an_ingest_that_is_killed_loses_nothing_that_it_acknowledged() {
    let mut random = Random::new(17);
    let mut library = Library::new();
    library.add_document();
    let (_, mut takes) = library.whole(&library.collection(0));
    let mut n_killed = 0;
    for round in 0..INGEST_KILLS {
        // Five rounds on each collection, so that some are killed while one is made.
        let collection = library.collection(1 + round / 5);
        let acknowledged = if round % 5 == 0 { 0 } else { library.n_documents };
        library.add_document();
        let ended = kill_at(library.ingest(&collection), moment(&mut random, takes));
        n_killed += usize::from(!ended);
        let report;
        (report, takes) = library.whole(&collection);
        let known = if ended { library.n_documents } else { acknowledged };
        let unchanged = usize::try_from(report["unchanged"].as_u64().unwrap()).unwrap();
        assert!(unchanged >= known, "round {round}: expected {known} documents, found {report}");
        assert_eq!(report["documents"], library.n_documents, "{report}");
    }
    assert!(
        n_killed >= INGEST_KILLS / 4,
        "{n_killed} of {INGEST_KILLS} were killed before they ended"
    );
}

/// A server, killed when this is dropped.
struct Server {
    child: Child,
    url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Server {
    fn start(place: &Path) -> Server {
        let mut command = exrail(place);
        command.arg("serve").arg("--model").arg(place.join("tiny.gguf"));
        command.arg("--trace-log").arg(place.join("trace.jsonl"));
        command.arg("--session-dir").arg(place.join("sessions"));
        command.args(["--no-encoder", "--port", "0", "--threads", "1", "--max-sequences", "2"]);
        command.args(["--kv-pages", "12", "--max-context", "1024", "--json"]);
        command.stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut events = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let ready = events.find(|event| event["event"] == "ready");
        let ready =
            ready.unwrap_or_else(|| panic!("expected a server, it ended with {:?}", child.wait()));
        Server { child, url: ready["url"].as_str().unwrap().to_owned() }
    }

    fn ask(&self) -> Client {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(30)))
            .http_status_as_error(false);
        Client { agent: config.build().into(), url: self.url.clone() }
    }
}

/// Whoever asks; `None`: no answer came whole.
#[derive(Clone)]
struct Client {
    agent: ureq::Agent,
    url: String,
}

impl Client {
    fn post(&self, path: &str, body: &Value) -> Option<Value> {
        let mut response = self.agent.post(format!("{}{path}", self.url)).send_json(body).ok()?;
        assert_eq!(response.status(), 200, "{path}: {:?}", response.body_mut().read_to_string());
        response.body_mut().read_json().ok()
    }

    fn save(&self, name: &str) -> Option<Value> {
        let url = format!("{}/v1/exrail/sessions", self.url);
        let listed: Value = self.agent.get(&url).call().ok()?.body_mut().read_json().ok()?;
        let mut cards = listed["data"].as_array()?.iter();
        let now = cards.find(|card| card["name"] == name).map(|card| card["context_id"].clone());
        // What a kill left has a revision, or it would not be here.
        assert_ne!(now, Some(Value::Null), "{name}: {listed}");
        let body = json!({ "prompt": conversation(), "context_id": now });
        let mut response = self.agent.put(format!("{url}/{name}")).send_json(body).ok()?;
        assert_eq!(response.status(), 200, "{name}: {:?}", response.body_mut().read_to_string());
        response.body_mut().read_json().ok()
    }

    fn complete(&self, prompt: &Value) -> Option<Value> {
        let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 2, "temperature": 0});
        self.post("/v1/completions", &body)
    }
}

fn conversation() -> Vec<u32> {
    (0..600).map(|i| 3 + i * 7 % 200).collect()
}

/// What clients were told before the kill.
#[derive(Default)]
struct Acknowledged {
    answers: BTreeSet<String>,
    sessions: BTreeSet<String>,
}

/// Two clients ask and save until the server is killed.
fn until_killed(
    mut server: Server,
    round: usize,
    after: Duration,
    acknowledged: &mut Acknowledged,
) {
    let client = server.ask();
    let answer = client.complete(&json!(conversation())).unwrap();
    acknowledged.answers.insert(answer["id"].as_str().unwrap().to_owned());
    let killed = AtomicBool::new(false);
    let goes_on = || !killed.load(Ordering::Acquire);
    std::thread::scope(|scope| {
        let answers = scope.spawn(|| {
            let mut ids = Vec::new();
            while goes_on() {
                let Some(answer) = client.complete(&json!("a b c")) else { break };
                ids.push(answer["id"].as_str().unwrap().to_owned());
            }
            ids
        });
        let sessions = scope.spawn(|| {
            let names = (0..).map(|n| {
                if n % 2 == 0 { "talk".to_owned() } else { format!("s{round}-{}", n % 6) }
            });
            names.take_while(|name| goes_on() && client.save(name).is_some()).collect::<Vec<_>>()
        });
        std::thread::sleep(after);
        server.child.kill().unwrap();
        killed.store(true, Ordering::Release);
        acknowledged.answers.extend(answers.join().unwrap());
        acknowledged.sessions.extend(sessions.join().unwrap());
    });
}

/// Finished lines of the log. The server runs and may be writing another, which is seen in part; one that
/// a kill had left and the start had not cut would stand in the middle, glued to the next.
fn traced(place: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(place.join("trace.jsonl")).unwrap();
    let text = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let record = |line: &str| {
        serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"))
    };
    let records = text.lines().map(record);
    records.filter_map(|record| Some(record["request_id"].as_str()?.to_owned())).collect()
}

fn check(server: &Server, place: &Path, acknowledged: &Acknowledged) {
    let traced = traced(place);
    let lost: Vec<_> = acknowledged.answers.difference(&traced).collect();
    assert!(lost.is_empty(), "acknowledged and not traced: {lost:?}");
    let client = server.ask();
    for name in &acknowledged.sessions {
        let restored = client.post(&format!("/v1/exrail/sessions/{name}/restore"), &json!(null));
        assert_eq!(restored.unwrap()["tokens"], 512, "{name}");
    }
    if !acknowledged.sessions.is_empty() {
        let answer = client.complete(&json!(conversation())).unwrap();
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 512, "{answer}");
    }
    for owner in std::fs::read_dir(place.join("sessions")).unwrap() {
        let owner = owner.unwrap().path();
        if owner.is_dir() {
            for file in std::fs::read_dir(owner).unwrap() {
                let file = file.unwrap().path();
                assert_eq!(file.extension().unwrap(), "session", "{}", file.display());
            }
        }
    }
}

/// K4 of the field faults is the part of it that removes what a kill leaves.
#[test]
fn a_server_that_is_killed_loses_no_acknowledged_record_and_no_session() {
    let mut random = Random::new(23);
    let place = tempfile::tempdir().unwrap();
    let model = tiny_llama(1, TinyLlama::default());
    std::fs::write(place.path().join("tiny.gguf"), model).unwrap();
    let mut acknowledged = Acknowledged::default();
    for round in 0..SERVER_KILLS {
        let server = Server::start(place.path());
        if round > 0 {
            check(&server, place.path(), &acknowledged);
        }
        until_killed(
            server,
            round,
            moment(&mut random, Duration::from_millis(60)),
            &mut acknowledged,
        );
        // What was checked once stays in the folder; restoring all of them each time is no news.
        while acknowledged.sessions.len() > 8 {
            acknowledged.sessions.pop_first();
        }
    }
    check(&Server::start(place.path()), place.path(), &acknowledged);
    assert!(acknowledged.answers.len() > SERVER_KILLS, "{}", acknowledged.answers.len());
    assert!(!acknowledged.sessions.is_empty());
}
