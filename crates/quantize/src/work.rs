//! [`WorkFolder`]: the unfinished result beside the destination, from which a later run goes on.
//!
//! `DST.partial` holds one safetensors file and one report a finished unit. It becomes `DST` by a
//! rename when everything is there.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::QuantizeError;
use crate::manifest::{Identity, UnitReport};
use crate::shard::{Stored, write_safetensors, write_whole};

const IDENTITY: &str = "identity.json";

/// The unfinished folder, locked.
pub(crate) struct WorkFolder {
    dir: PathBuf,
    destination: PathBuf,
    n_units: usize,
    _lock: File,
}

impl WorkFolder {
    /// Begins a run or goes on with one of the same identity.
    pub(crate) fn open(
        destination: &Path,
        identity: &Identity,
        n_units: usize,
    ) -> Result<WorkFolder, QuantizeError> {
        if destination.symlink_metadata().is_ok() {
            return Err(QuantizeError::DestinationExists { path: destination.to_owned() });
        }
        let dir = with_suffix(destination, ".partial");
        fs::create_dir_all(&dir).map_err(QuantizeError::io(&dir))?;
        let lock_path = dir.join("lock");
        let lock = OpenOptions::new().create(true).write(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(QuantizeError::io(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(QuantizeError::Busy { path: dir }),
            Err(TryLockError::Error(source)) => {
                return Err(QuantizeError::Io { path: lock_path, source });
            }
        }
        let path = dir.join(IDENTITY);
        if path.exists() {
            let found: Identity = read_json(&path)?;
            same(&dir, identity, &found)?;
        } else {
            write_json(&path, identity)?;
        }
        Ok(WorkFolder { dir, destination: destination.to_owned(), n_units, _lock: lock })
    }

    /// The file with the tensors of unit `unit`.
    pub(crate) fn shard(&self, unit: usize) -> PathBuf {
        self.dir.join(self.shard_name(unit))
    }

    /// Its name, as sharded checkpoints are named.
    pub(crate) fn shard_name(&self, unit: usize) -> String {
        format!("model-{:05}-of-{:05}.safetensors", unit + 1, self.n_units)
    }

    /// A file of the result.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What an earlier run, or this one, reported of a unit that is finished.
    pub(crate) fn finished(&self, unit: usize) -> Result<Option<UnitReport>, QuantizeError> {
        let path = self.report(unit);
        // The report is written after the file, so both are there or the unit is not finished.
        if !path.exists() { Ok(None) } else { read_json(&path).map(Some) }
    }

    /// Writes a unit and its report.
    pub(crate) fn finish_unit(
        &self,
        unit: usize,
        tensors: &[Stored<'_>],
        report: &UnitReport,
    ) -> Result<(), QuantizeError> {
        write_safetensors(&self.shard(unit), tensors)?;
        write_json(&self.report(unit), report)
    }

    /// Takes what only an unfinished folder has away and gives the folder its name.
    pub(crate) fn finish(self) -> Result<(), QuantizeError> {
        for unit in 0..self.n_units {
            let report = self.report(unit);
            fs::remove_file(&report).map_err(QuantizeError::io(&report))?;
        }
        for name in [IDENTITY, "lock"] {
            let path = self.dir.join(name);
            fs::remove_file(&path).map_err(QuantizeError::io(&path))?;
        }
        fs::rename(&self.dir, &self.destination).map_err(QuantizeError::io(&self.destination))?;
        let parent = self.destination.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        // The rename itself has to reach the disk.
        let synced = File::open(parent).and_then(|parent| parent.sync_all());
        synced.map_err(QuantizeError::io(parent))
    }

    fn report(&self, unit: usize) -> PathBuf {
        with_suffix(&self.shard(unit), ".json")
    }
}

/// `path` with `suffix` behind its last name.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Refuses to go on with a run that would end differently.
fn same(dir: &Path, expected: &Identity, found: &Identity) -> Result<(), QuantizeError> {
    let text = |value: serde_json::Result<String>| value.unwrap_or_default();
    let differ = |field, expected: String, found: String| {
        let path = dir.to_owned();
        Err(QuantizeError::OtherRun { path, field, expected, found })
    };
    if expected.bits != found.bits {
        return differ("width", expected.bits.to_string(), found.bits.to_string());
    }
    if expected.group != found.group {
        return differ("group", expected.group.to_string(), found.group.to_string());
    }
    if expected.calibration != found.calibration {
        let (expected, found) = (&expected.calibration, &found.calibration);
        let [expected, found] = [expected, found].map(|c| text(serde_json::to_string(c)));
        return differ("calibration", expected, found);
    }
    if expected.source != found.source {
        let [expected, found] =
            [expected, found].map(|identity| text(serde_json::to_string(&identity.source)));
        return differ("source", expected, found);
    }
    Ok(())
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, QuantizeError> {
    let bytes = fs::read(path).map_err(QuantizeError::io(path))?;
    serde_json::from_slice(&bytes)
        .map_err(|source| QuantizeError::Damaged { path: path.to_owned(), source })
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), QuantizeError> {
    write_whole(path, |file| {
        serde_json::to_writer_pretty(&mut *file, value)?;
        file.write_all(b"\n")
    })
}
