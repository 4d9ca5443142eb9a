//! [`Fingerprint`]: the hash of a checkpoint, taken while its weights are loaded.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use exrail_checkpoint::{checkpoint_files, checkpoint_sha256};

/// A hash on a thread of its own, which ends soon when this is dropped.
pub(crate) struct Fingerprint {
    thread: JoinHandle<io::Result<String>>,
    hashed: Receiver<u64>,
    total_bytes: u64,
}

impl Fingerprint {
    /// Starts to hash the checkpoint at `path`.
    ///
    /// # Errors
    /// Its files cannot be listed, or the system gives no thread.
    pub(crate) fn start(path: &Path) -> io::Result<Fingerprint> {
        let files = checkpoint_files(path)?;
        let total_bytes =
            files.iter().map(|file| Ok(file.metadata()?.len())).sum::<io::Result<u64>>()?;
        let (sender, hashed) = mpsc::channel();
        let path = path.to_owned();
        let thread = thread::Builder::new().name("exrail-hash".to_owned()).spawn(move || {
            let nobody = |_| io::Error::other("nobody waits for the hash");
            checkpoint_sha256(&path, &mut |bytes| sender.send(bytes).map_err(nobody))
        })?;
        Ok(Fingerprint { thread, hashed, total_bytes })
    }

    /// Waits for the hash, see [`checkpoint_sha256`]; `progress` is told the bytes so far, and how
    /// many there are.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(crate) fn wait(self, progress: &mut dyn FnMut(u64, u64)) -> io::Result<String> {
        for bytes in self.hashed {
            progress(bytes, self.total_bytes);
        }
        match self.thread.join() {
            Ok(sha256) => sha256,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_that_of_the_file_and_all_of_it_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; (2 << 20) + 11]).unwrap();
        let mut told = Vec::new();
        let fingerprint = Fingerprint::start(file.path()).unwrap();
        let sha256 = fingerprint.wait(&mut |bytes, total| told.push((bytes, total))).unwrap();
        assert_eq!(sha256, checkpoint_sha256(file.path(), &mut |_| Ok(())).unwrap());
        assert_eq!(told.last(), Some(&((2 << 20) + 11, (2 << 20) + 11)));
    }

    #[test]
    fn a_dropped_hash_ends_before_the_file_does() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Sparse: 64 GiB take no room, and a minute to hash.
        file.as_file().set_len(64 << 30).unwrap();
        let Fingerprint { thread, hashed, .. } = Fingerprint::start(file.path()).unwrap();
        drop(hashed);
        let error = thread.join().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "nobody waits for the hash");
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error() {
        assert!(Fingerprint::start(Path::new("/no/such/model.gguf")).is_err());
    }
}
