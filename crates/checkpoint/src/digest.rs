//! SHA-256 of files and bytes, the identity of every model in reports and caches.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Read size: large enough that the hash and not the system call is the cost, and little beside the weights of a
/// small model, which is served while its files are hashed.
const CHUNK_BYTES: usize = 1 << 17;

/// The SHA-256 of the file at `path` as 64 lower-case hexadecimal digits. `progress` is told the
/// number of bytes hashed so far, about every 128 KiB; its error ends the hash.
///
/// # Errors
/// When the file cannot be opened or read, and what `progress` says.
pub fn sha256_file(
    path: &Path,
    progress: &mut dyn FnMut(u64) -> io::Result<()>,
) -> io::Result<String> {
    sha256_files(std::slice::from_ref(&path), progress)
}

/// The SHA-256 of the bytes of all `files`, one after the other; as [`sha256_file`].
pub(crate) fn sha256_files(
    files: &[impl AsRef<Path>],
    progress: &mut dyn FnMut(u64) -> io::Result<()>,
) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut n_bytes = 0;
    for path in files {
        let mut file = File::open(path)?;
        loop {
            let n_read = match file.read(&mut chunk) {
                Ok(0) => break,
                Ok(n_read) => n_read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            hasher.update(&chunk[..n_read]);
            n_bytes += n_read as u64;
            progress(n_bytes)?;
        }
    }
    Ok(hex(&hasher.finalize()))
}

/// The SHA-256 of `bytes` as 64 lower-case hexadecimal digits.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(digest: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let nibbles = digest.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    nibbles.map(|nibble| char::from(DIGITS[usize::from(nibble)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_abc_is_that_of_fips_180() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_hex(b"abc"), expected);
    }

    #[test]
    fn file_digest_equals_digest_of_its_bytes_and_reports_progress() {
        let bytes = vec![7; 3 * CHUNK_BYTES + 11];
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        let mut last = 0;
        let mut progress = |n| {
            last = n;
            Ok(())
        };
        let digest = sha256_file(file.path(), &mut progress).unwrap();
        assert_eq!(digest, sha256_hex(&bytes));
        assert_eq!(last, bytes.len() as u64);
    }

    #[test]
    fn an_error_of_the_listener_ends_the_hash() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 3 * CHUNK_BYTES]).unwrap();
        let mut calls = 0;
        let mut progress = |_| {
            calls += 1;
            Err(io::Error::other("enough"))
        };
        let error = sha256_file(file.path(), &mut progress).unwrap_err();
        assert_eq!((error.to_string().as_str(), calls), ("enough", 1));
    }
}
