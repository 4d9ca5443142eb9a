//! [`ModelFingerprint`]: the hash of a checkpoint, taken beside everything else. An engine answers
//! before it is known; what records the model waits for it.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use exrail_checkpoint::CheckpointFiles;
use thiserror::Error;

/// Time between two calls of a progress function.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Niceness of the thread: a tenth of a core that others want. At 19 it would be a seventieth, and a
/// busy server withholds its answers until the hash is known.
#[cfg(target_os = "linux")]
const NICENESS: i32 = 10;

/// Told the bytes hashed so far; its error ends the hash.
pub type HashProgress<'a> = &'a mut dyn FnMut(u64) -> io::Result<()>;

/// The hex sha256 of a checkpoint, known now or later; cheap to clone. The hash ends soon when the last
/// clone is gone.
#[derive(Clone)]
pub struct ModelFingerprint {
    shared: Arc<Shared>,
}

struct Shared {
    /// Set before `ended` disconnects.
    outcome: OnceLock<Result<String, FingerprintError>>,
    /// Disconnects when the hash has ended.
    ended: flume::Receiver<Infallible>,
    hashed: AtomicU64,
    total_bytes: u64,
}

/// The model's fingerprint cannot be known.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "sha256 of {model}: expected every byte of its files, found: {problem}; what records the model is \
     withheld, restart when the files can be read"
)]
pub struct FingerprintError {
    model: String,
    problem: String,
}

/// What is known of a fingerprint now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FingerprintState<'a> {
    /// The hash runs.
    Pending {
        /// Bytes hashed so far.
        hashed: u64,
        /// Bytes of all files.
        total_bytes: u64,
    },
    /// The hex sha256.
    Known(&'a str),
    /// It will not be known.
    Failed(&'a FingerprintError),
}

impl ModelFingerprint {
    /// One that is known already.
    #[must_use]
    pub fn known(sha256: impl Into<String>) -> ModelFingerprint {
        let (_, ended) = flume::bounded(0);
        let shared = Shared {
            outcome: OnceLock::from(Ok(sha256.into())),
            ended,
            hashed: AtomicU64::new(0),
            total_bytes: 0,
        };
        ModelFingerprint { shared: Arc::new(shared) }
    }

    /// Starts to hash the checkpoint called `model` that is made of `files`, see
    /// [`CheckpointFiles::sha256`].
    ///
    /// # Errors
    /// A file is not there, or the system gives no thread.
    pub fn of(model: &str, files: CheckpointFiles) -> io::Result<ModelFingerprint> {
        Unhashed::new(model, files)?.begin()
    }

    /// Runs `hash` over the `total_bytes` of the checkpoint called `model`, on a thread of its own. It
    /// should call its argument about once per MiB.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn taken_by(
        model: &str,
        total_bytes: u64,
        hash: impl FnOnce(HashProgress<'_>) -> io::Result<String> + Send + 'static,
    ) -> io::Result<ModelFingerprint> {
        let (running, ended) = flume::bounded(0);
        let shared = Arc::new(Shared {
            outcome: OnceLock::new(),
            ended,
            hashed: AtomicU64::new(0),
            total_bytes,
        });
        let (weak, model) = (Arc::downgrade(&shared), model.to_owned());
        thread::Builder::new().name("exrail-hash".to_owned()).spawn(move || {
            give_way();
            take(&weak, model, hash);
            drop(running);
        })?;
        Ok(ModelFingerprint { shared })
    }

    /// What is known now.
    #[must_use]
    pub fn state(&self) -> FingerprintState<'_> {
        match self.shared.outcome.get() {
            Some(Ok(sha256)) => FingerprintState::Known(sha256),
            Some(Err(error)) => FingerprintState::Failed(error),
            None => FingerprintState::Pending {
                hashed: self.shared.hashed.load(Ordering::Relaxed),
                total_bytes: self.shared.total_bytes,
            },
        }
    }

    /// The hex sha256 if it is known by now.
    #[must_use]
    pub fn get(&self) -> Option<&str> {
        match self.state() {
            FingerprintState::Known(sha256) => Some(sha256),
            FingerprintState::Pending { .. } | FingerprintState::Failed(_) => None,
        }
    }

    /// Disconnects when the hash has ended, for callers that may not block; then
    /// [`ModelFingerprint::wait`] returns at once.
    #[must_use]
    pub fn ended(&self) -> &flume::Receiver<Infallible> {
        &self.shared.ended
    }

    /// Waits for the hex sha256.
    ///
    /// # Errors
    /// A file could not be read, or changed its length meanwhile.
    pub fn wait(&self) -> Result<&str, FingerprintError> {
        self.wait_told(&mut |_, _| {})
    }

    /// [`ModelFingerprint::wait`] that tells the bytes hashed so far, and how many there are, ten times
    /// a second and at the end.
    ///
    /// # Errors
    /// As [`ModelFingerprint::wait`].
    pub fn wait_told(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<&str, FingerprintError> {
        let Shared { outcome, ended, hashed, total_bytes } = &*self.shared;
        loop {
            let ended = match ended.recv_timeout(TELL_EVERY) {
                Ok(never) => match never {},
                Err(flume::RecvTimeoutError::Timeout) => false,
                Err(flume::RecvTimeoutError::Disconnected) => true,
            };
            progress(hashed.load(Ordering::Relaxed), *total_bytes);
            if ended {
                break;
            }
        }
        match outcome.get() {
            Some(Ok(sha256)) => Ok(sha256),
            Some(Err(error)) => Err(error.clone()),
            // `take` sets it on every way out.
            None => Err(FingerprintError {
                model: "the model".to_owned(),
                problem: "the hash ended without a result".to_owned(),
            }),
        }
    }
}

/// A checkpoint whose hash has not begun.
pub(crate) struct Unhashed {
    model: String,
    files: CheckpointFiles,
    total_bytes: u64,
}

impl Unhashed {
    /// Of files that have the length that they have now; later ones would be another model's.
    ///
    /// # Errors
    /// A file is not there.
    pub(crate) fn new(model: &str, files: CheckpointFiles) -> io::Result<Unhashed> {
        let total_bytes = files.len_bytes()?;
        Ok(Unhashed { model: model.to_owned(), files, total_bytes })
    }

    /// Starts to hash.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(crate) fn begin(self) -> io::Result<ModelFingerprint> {
        let Unhashed { model, files, total_bytes } = self;
        ModelFingerprint::taken_by(&model, total_bytes, move |told| {
            whole(&files, total_bytes, told)
        })
    }
}

impl fmt::Debug for ModelFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(f)
    }
}

/// Lets the threads that load and compute go first, where a thread has a priority of its own. A refusal
/// leaves it as it was, which is only slower for the others.
fn give_way() {
    #[cfg(target_os = "linux")]
    rustix::process::setpriority_process(None, NICENESS).ok();
}

/// Runs a hash and leaves what it found. Only a weak reference is held while it runs, so that it ends
/// when nobody waits any more.
fn take(
    shared: &Weak<Shared>,
    model: String,
    hash: impl FnOnce(HashProgress<'_>) -> io::Result<String>,
) {
    let mut told = |bytes| match shared.upgrade() {
        Some(shared) => {
            shared.hashed.store(bytes, Ordering::Relaxed);
            Ok(())
        }
        None => Err(io::Error::other("nobody waits for the hash")),
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| hash(&mut told)));
    let problem = match outcome {
        Ok(Ok(sha256)) => Ok(sha256),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_panic) => Err("the hash panicked".to_owned()),
    };
    // Nobody is left to tell: no fault.
    let Some(shared) = shared.upgrade() else { return };
    let outcome = problem.map_err(|problem| FingerprintError { model, problem });
    if let Err(error) = &outcome {
        tracing::error!(%error, "the model's fingerprint is not available");
    }
    // This is the only place that sets it.
    drop(shared.outcome.set(outcome));
}

/// The hash of files that have `total_bytes` still: of a file that was cut or is being written, it would
/// name another model than the one that was loaded.
fn whole(files: &CheckpointFiles, total_bytes: u64, told: HashProgress<'_>) -> io::Result<String> {
    let mut hashed = 0;
    let sha256 = files.sha256(&mut |bytes| {
        hashed = bytes;
        told(bytes)
    })?;
    if hashed != total_bytes {
        let problem = format!("{hashed} bytes of the {total_bytes} that there were at the start");
        return Err(io::Error::other(problem));
    }
    Ok(sha256)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    fn files(paths: &[&Path]) -> CheckpointFiles {
        CheckpointFiles::Parts(paths.iter().map(|path| path.to_path_buf()).collect())
    }

    #[test]
    fn the_hash_is_that_of_all_files_and_all_of_it_is_told() {
        let (file, second) =
            (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
        std::fs::write(file.path(), vec![7; (2 << 20) + 11]).unwrap();
        std::fs::write(second.path(), vec![8; 5]).unwrap();
        let files = files(&[file.path(), second.path()]);
        let mut told = Vec::new();
        let fingerprint = ModelFingerprint::of("m", files.clone()).unwrap();
        let sha256 = fingerprint.wait_told(&mut |bytes, total| told.push((bytes, total))).unwrap();
        assert_eq!(sha256, files.sha256(&mut |_| Ok(())).unwrap());
        assert_eq!(fingerprint.get(), Some(sha256));
        assert_eq!(told.last(), Some(&((2 << 20) + 16, (2 << 20) + 16)));
    }

    #[test]
    fn it_is_pending_until_the_hash_ends_and_then_every_clone_knows_it() {
        let (go, gate) = mpsc::channel::<()>();
        let fingerprint = ModelFingerprint::taken_by("m", 9, move |told| {
            told(4)?;
            gate.recv().map_err(io::Error::other)?;
            Ok("abc".to_owned())
        });
        let fingerprint = fingerprint.unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while fingerprint.state() != (FingerprintState::Pending { hashed: 4, total_bytes: 9 }) {
            assert!(Instant::now() < deadline, "{fingerprint:?}");
            thread::yield_now();
        }
        assert_eq!(fingerprint.get(), None);
        let clone = fingerprint.clone();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| clone.wait().map(str::to_owned));
            go.send(()).unwrap();
            assert_eq!(waiting.join().unwrap().unwrap(), "abc");
        });
        assert_eq!(fingerprint.state(), FingerprintState::Known("abc"));
        assert_eq!(ModelFingerprint::known("abc").wait(), Ok("abc"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_hash_lets_other_threads_go_first_and_no_other_thread_does() {
        let niceness = || rustix::process::getpriority_process(None);
        let own = niceness().unwrap();
        let (told, found) = mpsc::channel();
        let fingerprint = ModelFingerprint::taken_by("m", 0, move |_| {
            told.send(niceness()).map_err(io::Error::other)?;
            Ok(String::new())
        });
        fingerprint.unwrap().wait().unwrap();
        assert_eq!(found.recv().unwrap(), Ok(NICENESS));
        assert_eq!(niceness(), Ok(own), "a niceness is a thread's");
        // The mutation: a thread that does not give way is as urgent as those that compute.
        let other = thread::scope(|scope| scope.spawn(niceness).join().unwrap());
        assert_eq!(other, Ok(own));
        assert!(own < NICENESS, "expected a test that is more urgent than the hash, found {own}");
    }

    #[test]
    fn a_hash_that_begins_late_is_of_the_files_that_there_were() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        let unhashed = Unhashed::new("m", files(&[file.path()])).unwrap();
        std::fs::write(file.path(), b"ab").unwrap();
        let error = unhashed.begin().unwrap().wait().unwrap_err();
        assert!(error.to_string().contains("2 bytes of the 3"), "{error}");
    }

    #[test]
    fn a_dropped_hash_ends_before_the_file_does() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Sparse: 64 GiB take no room, and a minute to hash.
        file.as_file().set_len(64 << 30).unwrap();
        let files = files(&[file.path()]);
        let (ended, end) = mpsc::channel();
        let fingerprint = ModelFingerprint::taken_by("m", 64 << 30, move |told| {
            let outcome = files.sha256(told);
            let told = outcome.as_ref().map_err(ToString::to_string).cloned();
            ended.send(told).map_err(io::Error::other)?;
            outcome
        });
        drop(fingerprint.unwrap());
        let outcome = end.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(outcome, Err("nobody waits for the hash".to_owned()));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error_that_is_told_and_never_an_empty_hash() {
        assert!(ModelFingerprint::of("m", files(&["/no/such/model.gguf".as_ref()])).is_err());
        // A folder has a length, and no bytes to read.
        let dir = tempfile::tempdir().unwrap();
        let fingerprint = ModelFingerprint::of("model x", files(&[dir.path()])).unwrap();
        let error = fingerprint.wait().unwrap_err();
        assert!(error.to_string().starts_with("sha256 of model x: expected every byte"), "{error}");
        assert_eq!(fingerprint.state(), FingerprintState::Failed(&error));
        assert_eq!(fingerprint.get(), None);
    }

    #[test]
    fn a_hash_that_panics_is_an_error_and_nobody_waits_for_ever() {
        let fingerprint = ModelFingerprint::taken_by("m", 1, |_| panic!("by this test")).unwrap();
        let error = fingerprint.wait().unwrap_err();
        assert!(error.to_string().contains("the hash panicked"), "{error}");
    }

    #[test]
    fn a_file_that_changes_its_length_meanwhile_has_no_fingerprint() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        let files = files(&[file.path()]);
        let error = whole(&files, 4, &mut |_| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "3 bytes of the 4 that there were at the start");
        // The mutation: without the comparison a cut file gets a hash like any other.
        assert_eq!(
            files.sha256(&mut |_| Ok(())).unwrap(),
            whole(&files, 3, &mut |_| Ok(())).unwrap()
        );
    }
}
