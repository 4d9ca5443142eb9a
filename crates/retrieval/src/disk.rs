//! The few file operations of a collection, behind a trait so that a test can make each of them
//! fail.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// File operations that must be durable when they return.
pub(crate) trait Disk {
    /// Makes a folder; its parent exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Writes a whole file and waits until it is on the medium.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Puts `from` in the place of `to` at once.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Waits until the entries of a folder are on the medium.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
}

/// The operating system's file system.
pub(crate) struct SystemDisk;

impl Disk for SystemDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        // Folders cannot be opened for syncing on Windows; there the rename is durable by itself.
        if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
    }
}
