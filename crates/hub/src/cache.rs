//! The cache: `ROOT/models/NAME/…`, where every file has been checked, and is checked again each time
//! it is resolved (hashing 100 MB takes about 0.1 s; loading a damaged model costs a day).

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::split::SplitFile;
use crate::{HubError, Kind, Model, ModelFile, Progress, Registry, source};

/// Whether a missing model may be downloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// Download what is missing.
    IfMissing,
    /// Use the cache only.
    Never,
}

/// A model that can be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The file or folder to load.
    pub path: PathBuf,
    /// A name for people and for `/v1/models`.
    pub name: String,
}

/// The environment variable that names the folder of models and data.
pub const HOME_VARIABLE: &str = "EXRAIL_HOME";

/// The folder that holds downloaded models.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// What a name stands for.
enum Found<'a> {
    Path(Resolved),
    Listed(&'a Model),
}

/// A path wins when it exists.
fn found<'a>(registry: &'a Registry, name: &str, kind: Kind) -> Result<Found<'a>, HubError> {
    let path = Path::new(name);
    if path.exists() {
        let stem = path.file_stem().map_or_else(|| name.into(), |stem| stem.to_string_lossy());
        // The parts of a split file are one model.
        let split = path.file_name().and_then(|file| file.to_str()).and_then(SplitFile::of);
        let name = split.map_or_else(|| stem.into_owned(), |file| file.model.to_owned());
        return Ok(Found::Path(Resolved { path: path.into(), name }));
    }
    let Some(model) = registry.model(name) else {
        let known = registry.models().iter().map(|model| model.name.as_str());
        let known = known.collect::<Vec<_>>().join(", ");
        return Err(HubError::UnknownModel { name: name.into(), known });
    };
    if model.kind != kind {
        let (expected, found) = (kind, model.kind);
        return Err(HubError::WrongKind { name: name.into(), expected, found });
    }
    Ok(Found::Listed(model))
}

impl Cache {
    /// `$EXRAIL_HOME`, else `$XDG_CACHE_HOME/exrail`, else `$HOME/.cache/exrail`.
    ///
    /// # Errors
    /// None of the three is set.
    pub fn locate() -> Result<Self, HubError> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let root = set(HOME_VARIABLE)
            .map(PathBuf::from)
            .or_else(|| set("XDG_CACHE_HOME").map(|base| PathBuf::from(base).join("exrail")))
            .or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".cache/exrail")))
            .ok_or(HubError::NoCacheFolder)?;
        Ok(Self { root })
    }

    /// A cache below `root`.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Turns a path or a registry name into something to load.
    ///
    /// A path wins when it exists, so a file in the working directory may shadow a name.
    ///
    /// # Errors
    /// An unknown name, the wrong kind, a damaged file, or no source that delivers.
    pub fn resolve(
        &self,
        registry: &Registry,
        name: &str,
        kind: Kind,
        fetch: Fetch,
        progress: &mut dyn Progress,
    ) -> Result<Resolved, HubError> {
        let model = match found(registry, name, kind)? {
            Found::Path(resolved) => return Ok(resolved),
            Found::Listed(model) => model,
        };
        self.pull(model, fetch, progress)?;
        Ok(self.placed(model))
    }

    /// What [`Cache::resolve`] will give. Whether the files are there and right is not looked at.
    ///
    /// # Errors
    /// An unknown name, or the wrong kind.
    pub fn expected(
        &self,
        registry: &Registry,
        name: &str,
        kind: Kind,
    ) -> Result<Resolved, HubError> {
        Ok(match found(registry, name, kind)? {
            Found::Path(resolved) => resolved,
            Found::Listed(model) => self.placed(model),
        })
    }

    fn placed(&self, model: &Model) -> Resolved {
        let folder = self.folder(model);
        let path = model.load.as_ref().map_or_else(|| folder.clone(), |load| folder.join(load));
        Resolved { path, name: model.name.clone() }
    }

    fn folder(&self, model: &Model) -> PathBuf {
        self.root.join("models").join(&model.name)
    }

    /// Makes sure that every file of `model` is in the cache and right; returns its folder.
    ///
    /// # Errors
    /// A damaged file (which is removed) when fetching is forbidden, or no source that delivers.
    pub fn pull(
        &self,
        model: &Model,
        fetch: Fetch,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, HubError> {
        let folder = self.folder(model);
        match self.verify(model, &folder, progress) {
            Ok(()) => return Ok(folder),
            Err(HubError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if fetch == Fetch::Never => return Err(error),
            Err(error) => progress.note(&error.to_string()),
        }
        if fetch == Fetch::Never {
            let cache = self.root.clone();
            return Err(HubError::NotCached { name: model.name.clone(), cache });
        }
        self.download(model, &folder, progress)?;
        Ok(folder)
    }

    fn verify(
        &self,
        model: &Model,
        folder: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), HubError> {
        // A cheap look first: a model that is not there at all should not show a progress bar.
        for file in &model.files {
            let path = folder.join(&file.path);
            fs::metadata(&path).map_err(HubError::io(&path))?;
        }
        progress.start(&format!("verify {}", model.name), Some(model.total_bytes()));
        let result = model.files.iter().try_for_each(|file| check(folder, file, progress));
        progress.finish();
        result
    }

    fn download(
        &self,
        model: &Model,
        folder: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), HubError> {
        let mut reasons = Vec::new();
        for source in &model.sources {
            let staging = Staging::create(&self.root, &model.name)?;
            let result = source::fetch(model, source, &staging.0, progress).and_then(|()| {
                model.files.iter().try_for_each(|file| check(&staging.0, file, progress))
            });
            match result {
                Ok(()) => return publish(model, &staging.0, folder),
                Err(error) => {
                    progress.note(&format!("{}: {error}; trying the next source", model.name));
                    reasons.push(format!("  {source}: {error}"));
                }
            }
        }
        Err(HubError::AllSourcesFailed { name: model.name.clone(), reasons })
    }
}

/// A folder for one download, removed when the attempt ends however it ends.
struct Staging(PathBuf);

impl Staging {
    fn create(root: &Path, name: &str) -> Result<Self, HubError> {
        let path = root.join("partial").join(format!("{name}-{}", std::process::id()));
        match fs::remove_dir_all(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(HubError::io(&path)(error)),
        }
        fs::create_dir_all(&path).map_err(HubError::io(&path))?;
        Ok(Self(path))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next attempt.
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Moves checked files into place, one rename each.
fn publish(model: &Model, staging: &Path, folder: &Path) -> Result<(), HubError> {
    for file in &model.files {
        let target = folder.join(&file.path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(HubError::io(parent))?;
        }
        fs::rename(staging.join(&file.path), &target).map_err(HubError::io(&target))?;
    }
    Ok(())
}

/// Compares one file with the registry; a wrong file is removed.
fn check(folder: &Path, file: &ModelFile, progress: &mut dyn Progress) -> Result<(), HubError> {
    let path = folder.join(&file.path);
    let found = fs::metadata(&path).map_err(HubError::io(&path))?.len();
    if found != file.bytes {
        fs::remove_file(&path).map_err(HubError::io(&path))?;
        return Err(HubError::WrongSize { file: path, expected: file.bytes, found });
    }
    let found = sha256(&path, progress)?;
    if found != file.sha256 {
        fs::remove_file(&path).map_err(HubError::io(&path))?;
        return Err(HubError::WrongHash { file: path, expected: file.sha256.clone(), found });
    }
    Ok(())
}

fn sha256(path: &Path, progress: &mut dyn Progress) -> Result<String, HubError> {
    let mut file = File::open(path).map_err(HubError::io(path))?;
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 20];
    loop {
        let n_read = file.read(&mut block).map_err(HubError::io(path))?;
        if n_read == 0 {
            break;
        }
        hash.update(&block[..n_read]);
        progress.advance(n_read as u64);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
