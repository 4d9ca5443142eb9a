//! [`Fingerprint`]: the hash of a checkpoint, taken while its weights are loaded.

use std::io;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use exrail_checkpoint::CheckpointFiles;

/// A hash on a thread of its own, which ends soon when this is dropped.
pub(crate) struct Fingerprint {
    thread: JoinHandle<io::Result<String>>,
    hashed: Receiver<u64>,
    total_bytes: u64,
}

impl Fingerprint {
    /// Starts to hash the checkpoint that is made of `files`.
    ///
    /// # Errors
    /// A file is not there, or the system gives no thread.
    pub(crate) fn start(files: CheckpointFiles) -> io::Result<Fingerprint> {
        let total_bytes = files.len_bytes()?;
        let (sender, hashed) = mpsc::channel();
        let thread = thread::Builder::new().name("exrail-hash".to_owned()).spawn(move || {
            let nobody = |_| io::Error::other("nobody waits for the hash");
            files.sha256(&mut |bytes| sender.send(bytes).map_err(nobody))
        })?;
        Ok(Fingerprint { thread, hashed, total_bytes })
    }

    /// Waits for the hash, see [`CheckpointFiles::sha256`]; `progress` is told the bytes so far, and how
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

    fn files(paths: &[&std::path::Path]) -> CheckpointFiles {
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
        let fingerprint = Fingerprint::start(files.clone()).unwrap();
        let sha256 = fingerprint.wait(&mut |bytes, total| told.push((bytes, total))).unwrap();
        assert_eq!(sha256, files.sha256(&mut |_| Ok(())).unwrap());
        assert_eq!(told.last(), Some(&((2 << 20) + 16, (2 << 20) + 16)));
    }

    #[test]
    fn a_dropped_hash_ends_before_the_file_does() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Sparse: 64 GiB take no room, and a minute to hash.
        file.as_file().set_len(64 << 30).unwrap();
        let Fingerprint { thread, hashed, .. } = Fingerprint::start(files(&[file.path()])).unwrap();
        drop(hashed);
        let error = thread.join().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "nobody waits for the hash");
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error() {
        assert!(Fingerprint::start(files(&["/no/such/model.gguf".as_ref()])).is_err());
    }
}
