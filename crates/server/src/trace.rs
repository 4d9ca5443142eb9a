//! The trace log: append-only JSON lines, written before an answer is released (G-14).
//!
//! A record that breaks the trace contract ([`exrail_verify::trace`]) is not written, and its answer is withheld,
//! unless the mode says otherwise.
//!
//! One thread owns the file. A record that could not be written whole is cut off again, so that a
//! full disk leaves a valid log, and its answer is withheld. Lines are flushed to the system, not
//! fsynced: a killed process loses nothing that it acknowledged, a power cut may lose the last second. What
//! a kill leaves of a line is cut off when the log is opened next.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use exrail_engine::{Fault, FaultBoard, FingerprintError, Guard, Memory};
use exrail_retrieval::Collection;
use exrail_verify::trace::{Breach, Contract, seal};
use exrail_wire::{Pins, TRACE_SCHEMA_VERSION, TraceBody, TraceEnvelope};
use thiserror::Error;
use tokio::sync::oneshot;

use crate::{Services, otlp::RequestSpans};

/// Why a record was not written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file could not be opened.
    #[error("trace log {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The record could not be appended.
    #[error("trace log: the record could not be written: {0}")]
    Write(io::Error),
    /// The writer is gone.
    #[error("trace log: the writer has stopped")]
    Stopped,
    /// The record would not say which model answered.
    #[error("trace log: {0}")]
    NoFingerprint(#[from] FingerprintError),
    /// The record breaks the trace contract.
    #[error("trace record: {0}")]
    Contract(#[from] Breach),
}

/// What happens with a record that breaks the trace contract (G-14, `trace.mode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TraceMode {
    /// It is refused, and its answer withheld.
    #[default]
    Enforce,
    /// It is written, and the program's log names the breach.
    Warn,
    /// Records are not checked.
    Off,
}

struct Append {
    line: String,
    done: oneshot::Sender<io::Result<()>>,
}

/// A handle to the writer.
#[derive(Clone, Debug)]
pub struct TraceLog {
    appends: flume::Sender<Append>,
    /// Why a mismatch of the preflight is overlooked, if one is.
    forced: Arc<OnceLock<String>>,
    /// Says which write is to break, where faults are injected.
    faults: Arc<OnceLock<Arc<FaultBoard>>>,
    contract: Arc<Contract>,
    mode: TraceMode,
}

/// Who and what a record belongs to.
#[derive(Clone, Debug, Default)]
pub struct TraceIdentity {
    /// Unique per answer.
    pub trace_id: String,
    /// Unique per request.
    pub request_id: String,
    /// The session that the request goes on from; without one, the `user` of the request.
    pub session_id: Option<String>,
    /// Which key asked.
    pub agent_id: Option<String>,
    /// Which state of the session (G-22); none without one.
    pub memory: Option<Memory>,
    /// Where the record goes as well, once it is written.
    pub spans: RequestSpans,
}

impl TraceIdentity {
    /// The same of a request that goes on from a session, or failed to.
    #[must_use]
    pub(crate) fn of_session(self, name: &str, memory: Option<&Memory>) -> Self {
        Self { session_id: Some(name.to_owned()), memory: memory.cloned(), ..self }
    }
}

impl TraceLog {
    /// Opens the log for appending and starts its writer. Records are checked.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let open_error = |source| TraceError::Open { path: path.into(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(open_error)?;
        }
        let file = OpenOptions::new().create(true).read(true).append(true).open(path);
        let mut file = file.map_err(open_error)?;
        take_over(&mut file).map_err(open_error)?;
        let (appends, queue) = flume::unbounded::<Append>();
        let faults = Arc::new(OnceLock::new());
        let board = Arc::clone(&faults);
        std::thread::Builder::new()
            .name("exrail-trace".into())
            .spawn(move || write_all(file, &queue, &board))
            .map_err(open_error)?;
        let (forced, contract) = (Arc::default(), Arc::new(Contract::new()));
        Ok(Self { appends, forced, faults, contract, mode: TraceMode::default() })
    }

    /// The same log for callers who check records in another mode.
    #[must_use]
    pub fn checked(self, mode: TraceMode) -> Self {
        Self { mode, ..self }
    }

    /// Writes into every record from here on why a mismatch of the preflight is overlooked (G-09). The
    /// first reason stays.
    pub fn stamp(&self, reason: &str) {
        self.forced.get_or_init(|| reason.to_owned());
    }

    /// Lets a board of faults break writes. The first one stays.
    pub fn disturb(&self, board: &Arc<FaultBoard>) {
        self.faults.get_or_init(|| Arc::clone(board));
    }

    /// Appends a record and waits until the system has it.
    ///
    /// # Errors
    /// The record is not in the log.
    pub async fn append(
        &self,
        identity: &TraceIdentity,
        pins: &Pins,
        body: TraceBody,
    ) -> Result<(), TraceError> {
        let (done, envelope) = self.send(identity, pins, body, None)?;
        done.await.map_err(|_| TraceError::Stopped)?.map_err(TraceError::Write)?;
        identity.spans.record(envelope);
        Ok(())
    }

    /// The same for callers outside the async runtime.
    ///
    /// # Errors
    /// The record is not in the log.
    pub fn append_blocking(
        &self,
        identity: &TraceIdentity,
        pins: &Pins,
        body: TraceBody,
    ) -> Result<(), TraceError> {
        self.send_blocking(identity, pins, body, None)
    }

    /// [`TraceLog::append_blocking`] of a record that was drawn from a collection: it must agree with what is stored
    /// there.
    ///
    /// # Errors
    /// The record is not in the log.
    pub fn append_grounded(
        &self,
        identity: &TraceIdentity,
        pins: &Pins,
        body: TraceBody,
        collection: &Collection,
    ) -> Result<(), TraceError> {
        self.send_blocking(identity, pins, body, Some(collection))
    }

    /// Appends the report of a probe over one collection.
    ///
    /// # Errors
    /// The record is not in the log.
    pub async fn append_probe(
        &self,
        services: &Services,
        collection: &str,
        (trace_id, report): (&str, serde_json::Value),
    ) -> Result<(), TraceError> {
        let mut pins = services.pins().await?;
        if let Some(asker) = services.collections.get(collection) {
            pins = asker.pins()?;
        }
        let identity = TraceIdentity { trace_id: trace_id.to_owned(), ..TraceIdentity::default() };
        self.append(&identity, &pins, TraceBody::Probe { report }).await
    }

    fn send_blocking(
        &self,
        identity: &TraceIdentity,
        pins: &Pins,
        body: TraceBody,
        collection: Option<&Collection>,
    ) -> Result<(), TraceError> {
        let (done, envelope) = self.send(identity, pins, body, collection)?;
        done.blocking_recv().map_err(|_| TraceError::Stopped)?.map_err(TraceError::Write)?;
        identity.spans.record(envelope);
        Ok(())
    }

    fn send(
        &self,
        identity: &TraceIdentity,
        pins: &Pins,
        body: TraceBody,
        collection: Option<&Collection>,
    ) -> Result<(oneshot::Receiver<io::Result<()>>, TraceEnvelope), TraceError> {
        let envelope = TraceEnvelope {
            schema_version: TRACE_SCHEMA_VERSION,
            ts: jiff::Timestamp::now().to_string(),
            trace_id: identity.trace_id.clone(),
            request_id: identity.request_id.clone(),
            session_id: identity.session_id.clone(),
            agent_id: identity.agent_id.clone(),
            mem_rev: identity.memory.as_ref().map_or(0, |memory| memory.rev),
            mem_hash: identity.memory.as_ref().map(|memory| memory.hash.clone()),
            forced: self.forced.get().cloned(),
            pins: pins.clone(),
            body,
        };
        let unwritten = |error| TraceError::Write(io::Error::other(error));
        let record = serde_json::to_value(&envelope).map_err(unwritten)?;
        let mut line = seal(&record.to_string());
        self.check(&line, collection)?;
        line.push('\n');
        let (done, receiver) = oneshot::channel();
        self.appends.send(Append { line, done }).map_err(|_| TraceError::Stopped)?;
        Ok((receiver, envelope))
    }
}

impl TraceLog {
    /// Checks a line as it will be read.
    fn check(&self, line: &str, collection: Option<&Collection>) -> Result<(), TraceError> {
        if self.mode == TraceMode::Off {
            return Ok(());
        }
        let record = serde_json::from_str(line)
            .map_err(|error| TraceError::Write(io::Error::other(error)))?;
        match (self.contract.check(&record, collection).first(), self.mode) {
            (Ok(()), _) | (Err(_), TraceMode::Off) => Ok(()),
            (Err(breach), TraceMode::Enforce) => Err(breach.into()),
            (Err(breach), TraceMode::Warn) => {
                tracing::warn!(%breach, "a trace record breaks the contract");
                Ok(())
            }
        }
    }
}

/// Cuts off what a killed writer left of its last line, unless another writer is alive: what looks torn may be
/// what it is writing. The lock that says so goes with the file.
fn take_over(file: &mut File) -> io::Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {}
        // Where the system has no locks, one writer is what there is.
        Ok(()) | Err(TryLockError::Error(_)) => mend(file)?,
    }
    file.unlock().ok();
    file.lock_shared().ok();
    Ok(())
}

/// Cuts the file behind its last line break. What follows was acknowledged to nobody, and the next record
/// would become a part of it.
fn mend(file: &mut File) -> io::Result<()> {
    const CHUNK_BYTES: u64 = 4096;
    let mut end = file.seek(SeekFrom::End(0))?;
    let len_bytes = end;
    while end > 0 {
        let start = end.saturating_sub(CHUNK_BYTES);
        let mut chunk = Vec::new();
        file.seek(SeekFrom::Start(start))?;
        file.take(end - start).read_to_end(&mut chunk)?;
        if let Some(at) = chunk.iter().rposition(|&byte| byte == b'\n') {
            end = start + at as u64 + 1;
            break;
        }
        end = start;
    }
    if end < len_bytes {
        tracing::warn!(
            bytes = len_bytes - end,
            "trace log: a line that was never finished is cut off"
        );
        file.set_len(end)?;
    }
    Ok(())
}

fn write_all(mut file: File, queue: &flume::Receiver<Append>, faults: &OnceLock<Arc<FaultBoard>>) {
    for append in queue {
        let line = append.line.as_bytes();
        let board = faults.get();
        let result = match board.is_some_and(|board| board.takes(Fault::BreakTrace)) {
            true => append_line(&mut Breaking::within(&mut file, line), line),
            false => append_line(&mut file, line),
        };
        if let (Err(_), Some(board)) = (&result, board) {
            board.caught(Guard::Traces);
        }
        // A caller that no longer waits has dropped its answer as well.
        drop(append.done.send(result));
    }
}

/// Appends one line whole or not at all.
fn append_line(file: &mut (impl Write + Seek + Truncate), line: &[u8]) -> io::Result<()> {
    let end = file.seek(SeekFrom::End(0))?;
    let written = file.write_all(line).and_then(|()| file.flush());
    if written.is_err() {
        file.truncate(end)?;
    }
    written
}

/// A file with room for so many bytes more.
struct Breaking<'a> {
    file: &'a mut File,
    room: usize,
}

impl Breaking<'_> {
    /// Room for a part of the line: another one at each length of the file.
    fn within<'a>(file: &'a mut File, line: &[u8]) -> Breaking<'a> {
        let len = file.metadata().map_or(0, |metadata| metadata.len());
        let room = len % line.len().max(1) as u64;
        Breaking { file, room: usize::try_from(room).unwrap_or(0) }
    }
}

impl Write for Breaking<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.room == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let n_written = self.file.write(&data[..data.len().min(self.room)])?;
        self.room -= n_written;
        Ok(n_written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Breaking<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Truncate for Breaking<'_> {
    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.file.truncate(len)
    }
}

trait Truncate {
    fn truncate(&mut self, len: u64) -> io::Result<()>;
}

impl Truncate for File {
    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with room for `room` bytes.
    struct SmallDisk {
        bytes: io::Cursor<Vec<u8>>,
        room: usize,
    }

    impl Write for SmallDisk {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let left = self.room - self.bytes.get_ref().len();
            if left == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.bytes.write(&data[..data.len().min(left)])
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for SmallDisk {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.bytes.seek(to)
        }
    }

    impl Truncate for SmallDisk {
        fn truncate(&mut self, len: u64) -> io::Result<()> {
            self.bytes.get_mut().truncate(usize::try_from(len).unwrap());
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_leaves_whole_lines_only() {
        let mut disk = SmallDisk { bytes: io::Cursor::new(Vec::new()), room: 10 };
        append_line(&mut disk, b"{\"a\":1}\n").unwrap();
        let error = append_line(&mut disk, b"{\"b\":2}\n").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.bytes.get_ref(), b"{\"a\":1}\n");
    }

    #[test]
    fn records_are_appended_in_order_and_survive_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("traces/log.jsonl");
        for guard in ["one", "two"] {
            let log = TraceLog::open(&path).unwrap();
            let body = TraceBody::Guard { guard: guard.into(), detail: "line\nbreak".into() };
            log.append_blocking(&named(), &Pins::default(), body).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let guards: Vec<_> = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["guard"].clone())
            .collect();
        assert_eq!(guards, ["one", "two"]);
    }

    fn record(log: &TraceLog, guard: &str) {
        let body = TraceBody::Guard { guard: guard.into(), detail: String::new() };
        log.append_blocking(&named(), &Pins::default(), body).unwrap();
    }

    fn named() -> TraceIdentity {
        TraceIdentity { trace_id: "trace-1".into(), ..TraceIdentity::default() }
    }

    fn guards(text: &str) -> Vec<Option<serde_json::Value>> {
        let guard =
            |line| Some(serde_json::from_str::<serde_json::Value>(line).ok()?["guard"].clone());
        text.lines().map(guard).collect()
    }

    /// As a kill leaves it, with lines that end anywhere. Each has a file of its own, since the thread of a log
    /// that was dropped may hold its file a moment longer.
    #[test]
    fn a_torn_line_is_cut_off_and_what_was_acknowledged_stays() {
        let folder = tempfile::tempdir().unwrap();
        let begun = "{\"guard\":\"never finished";
        for (n, torn) in ["", "{", begun, &"x".repeat(10_000)].into_iter().enumerate() {
            for whole in ["", "{\"guard\":\"one\"}\n"] {
                let path = folder.path().join(format!("{n}-{}.jsonl", whole.len()));
                std::fs::write(&path, format!("{whole}{torn}")).unwrap();
                record(&TraceLog::open(&path).unwrap(), "two");
                let found = guards(&std::fs::read_to_string(&path).unwrap());
                let mut expected = guards(whole);
                expected.push(Some("two".into()));
                assert_eq!(found, expected);
            }
        }
    }

    /// The mutation: a log that is opened as it is. The acknowledged record is a part of the torn line, and
    /// nobody reads it any more.
    #[test]
    fn mutation_without_the_cut_an_acknowledged_record_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        std::fs::write(&path, "{\"guard\":\"one\"}\n{\"gua").unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        append_line(&mut file, b"{\"guard\":\"two\"}\n").unwrap();
        assert_eq!(guards(&std::fs::read_to_string(&path).unwrap()), [Some("one".into()), None]);
    }

    #[test]
    fn the_line_of_a_writer_that_is_alive_is_not_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let alive = TraceLog::open(&path).unwrap();
        std::fs::write(&path, "half a line").unwrap();
        let second = TraceLog::open(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "half a line");
        drop((alive, second));
    }

    /// One record without a trace, written in a mode.
    fn nameless(mode: TraceMode) -> (Result<(), TraceError>, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let log = TraceLog::open(&path).unwrap().checked(mode);
        let body = TraceBody::Guard { guard: "one".into(), detail: String::new() };
        let result = log.append_blocking(&TraceIdentity::default(), &Pins::default(), body);
        (result, std::fs::read_to_string(&path).unwrap())
    }

    #[test]
    fn a_record_that_breaks_the_contract_is_not_written_and_named() {
        let (refused, text) = nameless(TraceMode::Enforce);
        assert!(refused.unwrap_err().to_string().starts_with("trace record: /trace_id: expected"));
        assert_eq!(text, "");
    }

    /// The mutation: records that are not checked, or not refused.
    #[test]
    fn mutation_without_the_contract_the_broken_record_is_in_the_log() {
        for mode in [TraceMode::Warn, TraceMode::Off] {
            let (written, text) = nameless(mode);
            assert!(written.is_ok());
            assert!(text.contains("\"trace_id\":\"\""), "{text}");
        }
    }
}
