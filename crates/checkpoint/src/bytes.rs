//! [`FileBytes`]: the bytes of a file, mapped or owned; and small files, read whole. The only `unsafe` of this crate.
#![expect(unsafe_code, reason = "mapping a file into memory cannot be expressed safely")]

use std::fs::File;
use std::io::Read;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

use crate::LoadError;

/// The bytes of a model file. Dereferences to `[u8]`; cloning shares them.
#[derive(Clone)]
pub(crate) enum FileBytes {
    /// A read-only private mapping: pages are read when first touched.
    Mapped(Arc<Mmap>),
    /// Bytes that the caller had already.
    Owned(Arc<[u8]>),
}

impl FileBytes {
    /// Maps the file at `path`.
    ///
    /// The file must stay as it is while mapped, which is why models belong in a cache directory
    /// that only the downloader writes to, by rename. Truncating it in place makes the system kill
    /// the process at the next read; rewriting it in place changes weights under way.
    pub(crate) fn map(path: &Path) -> Result<FileBytes, LoadError> {
        let io_error = |source| LoadError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io_error)?;
        if !file.metadata().map_err(io_error)?.is_file() {
            let source = std::io::Error::other("expected a regular file");
            return Err(io_error(source));
        }
        // SAFETY: `Mmap::map` requires that nobody changes the file while it is mapped. Other
        // processes are outside our control; the doc comment above states the requirement, our own
        // code opens models read-only, and every type is parsed by copying out of the mapping, so
        // that a changed byte is at worst a wrong number and never a broken reference.
        let mapping = unsafe { Mmap::map(&file) }.map_err(io_error)?;
        Ok(FileBytes::Mapped(Arc::new(mapping)))
    }

    /// Gives the memory of mapped pages back to the system, which reads them again when they are
    /// touched again. A hint: other bytes of the outermost pages are given back as well.
    pub(crate) fn forget(&self, range: Range<usize>) {
        match self {
            #[cfg(unix)]
            FileBytes::Mapped(mapping) => {
                // SAFETY: the mapping is private and nobody can write to it, so that a page that is
                // read again has the bytes of the file, as it had before.
                let advised = unsafe {
                    mapping.unchecked_advise_range(
                        UncheckedAdvice::DontNeed,
                        range.start,
                        range.len(),
                    )
                };
                // A refusal costs memory, which is what was there before.
                drop(advised);
            }
            #[cfg(not(unix))]
            FileBytes::Mapped(_) => drop(range),
            FileBytes::Owned(_) => {}
        }
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            FileBytes::Mapped(mapping) => mapping,
            FileBytes::Owned(bytes) => bytes,
        }
    }
}

/// The whole file at `path`, which may have at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, LoadError> {
    let io_error = |source| LoadError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io_error)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io_error)?;
    if bytes.len() as u64 > limit {
        let (what, found) = ("length of the file".to_owned(), bytes.len() as u64);
        return Err(LoadError::LimitExceeded { what, limit, found }.in_file(path));
    }
    Ok(bytes)
}
