//! [`Files`]: the files of a folder, on disk or in memory, and reading small ones of them.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::bytes::read_bounded;
use crate::{LoadError, SafetensorsFile};

/// `config.json` and its like have some kilobytes; templates some tens.
pub(super) const MAX_SMALL_BYTES: u64 = 4 << 20;
/// More entries than the folder of any model.
const MAX_FILES: usize = 1 << 16;

/// A folder.
#[derive(Clone)]
pub(super) enum Files {
    /// On disk.
    Disk(PathBuf),
    /// In memory, by name.
    Memory(Arc<BTreeMap<String, Arc<[u8]>>>),
}

impl Files {
    /// Path of the file `name`, for messages too.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        match self {
            Files::Disk(dir) => dir.join(name),
            Files::Memory(_) => PathBuf::from(name),
        }
    }

    /// The file `name`, or `None` when there is none.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, LoadError> {
        match self {
            Files::Disk(dir) => match read_bounded(&dir.join(name), limit) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(LoadError::Io { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound =>
                {
                    Ok(None)
                }
                Err(error) => Err(error),
            },
            Files::Memory(files) => {
                let Some(bytes) = files.get(name) else { return Ok(None) };
                let found = bytes.len() as u64;
                if found > limit {
                    let what = "length of the file".to_owned();
                    let error = LoadError::LimitExceeded { what, limit, found };
                    return Err(error.in_file(Path::new(name)));
                }
                Ok(Some(bytes.to_vec()))
            }
        }
    }

    /// The JSON file `name`, or `None` when there is none.
    pub(super) fn json(&self, name: &str) -> Result<Option<Value>, LoadError> {
        let Some(bytes) = self.read(name, MAX_SMALL_BYTES)? else { return Ok(None) };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| LoadError::Json { source }.in_file(&self.path(name)))
    }

    /// Whether there is a file `name`.
    pub(super) fn contains(&self, name: &str) -> bool {
        match self {
            Files::Disk(dir) => dir.join(name).is_file(),
            Files::Memory(files) => files.contains_key(name),
        }
    }

    /// Parses the safetensors file `name`.
    pub(super) fn safetensors(&self, name: &str) -> Result<SafetensorsFile, LoadError> {
        let path = self.path(name);
        match self {
            Files::Disk(_) => SafetensorsFile::open(&path),
            Files::Memory(files) => match files.get(name) {
                Some(bytes) => {
                    SafetensorsFile::parse(bytes.clone()).map_err(|error| error.in_file(&path))
                }
                None => {
                    let source = std::io::Error::from(std::io::ErrorKind::NotFound);
                    Err(LoadError::Io { path, source })
                }
            },
        }
    }

    /// Names of all files of the subfolder `inner` (empty: of the folder itself) that end in
    /// `suffix`, sorted; none when there is no such subfolder.
    pub(super) fn ending_in(&self, inner: &str, suffix: &str) -> Result<Vec<String>, LoadError> {
        let mut names = Vec::new();
        match self {
            Files::Memory(files) => {
                let within = |name: &&String| Path::new(name).parent() == Some(Path::new(inner));
                names.extend(files.keys().filter(within).cloned());
            }
            Files::Disk(dir) => {
                let path = dir.join(inner);
                let io_error = |source| LoadError::Io { path: path.clone(), source };
                if !path.is_dir() {
                    return Ok(names);
                }
                for entry in std::fs::read_dir(&path).map_err(io_error)?.take(MAX_FILES) {
                    let name = entry.map_err(io_error)?.file_name();
                    let name = Path::new(inner).join(name).into_os_string();
                    names.extend(name.into_string().ok());
                }
            }
        }
        names.retain(|name| name.ends_with(suffix));
        names.sort_unstable();
        Ok(names)
    }
}

/// Whether `name` is a file of the folder itself: it comes from an untrusted file and must not lead
/// out of it.
pub(super) fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let is_one =
        matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    is_one && !name.contains(['/', '\\', '\0'])
}
