//! [`Checkpoint`]: a decoder as people have it, a GGUF file or a Hugging Face folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{DecoderConfig, Gguf, HfFolder, LoadError, Tensors, sha256_file, sha256_hex};

/// Ends of the names of files in a folder that change what a model answers.
const PARTS: [&str; 4] = ["json", "jinja", "model", "safetensors"];

/// A decoder on disk, checked.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a process holds one or two of them")]
pub enum Checkpoint {
    /// One GGUF file.
    Gguf(Gguf),
    /// A folder with `config.json` and safetensors.
    Folder(HfFolder),
}

impl Checkpoint {
    /// Opens the folder or the GGUF file at `path`.
    ///
    /// # Errors
    /// As [`Gguf::open`] and [`HfFolder::open`].
    pub fn open(path: &Path) -> Result<Checkpoint, LoadError> {
        if path.is_dir() {
            return Ok(Checkpoint::Folder(HfFolder::open(path)?));
        }
        Ok(Checkpoint::Gguf(Gguf::open(path)?))
    }

    /// The architecture as data.
    ///
    /// # Errors
    /// As [`DecoderConfig::from_gguf`]; a folder was checked when it was opened.
    pub fn config(&self) -> Result<DecoderConfig, LoadError> {
        match self {
            Checkpoint::Gguf(gguf) => DecoderConfig::from_gguf(gguf),
            Checkpoint::Folder(folder) => Ok(folder.config().clone()),
        }
    }

    /// Its tensors, by the names of GGUF files.
    #[must_use]
    pub fn tensors(&self) -> &dyn Tensors {
        match self {
            Checkpoint::Gguf(gguf) => gguf,
            Checkpoint::Folder(folder) => folder,
        }
    }
}

/// The files that make the checkpoint at `path`: the file itself, or every file of a folder that
/// changes what the model answers, by name.
///
/// # Errors
/// When a folder cannot be read.
pub fn checkpoint_files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let file = entry?.path();
        let extension = file.extension().and_then(|extension| extension.to_str());
        if extension.is_some_and(|extension| PARTS.contains(&extension)) && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// The fingerprint of the checkpoint at `path`: the SHA-256 of a file, or of the lines
/// "SHA-256, two spaces, name" of a folder's [`checkpoint_files`]; what `sha256sum * | sha256sum`
/// prints. `progress` is told the bytes hashed so far; its error ends the hash.
///
/// # Errors
/// When a file cannot be read, and what `progress` says.
pub fn checkpoint_sha256(
    path: &Path,
    progress: &mut dyn FnMut(u64) -> io::Result<()>,
) -> io::Result<String> {
    if !path.is_dir() {
        return sha256_file(path, progress);
    }
    let (mut lines, mut done) = (String::new(), 0);
    for file in checkpoint_files(path)? {
        let sha256 = sha256_file(&file, &mut |bytes| progress(done + bytes))?;
        done += fs::metadata(&file)?.len();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        lines.push_str(&sha256);
        lines.push_str("  ");
        lines.push_str(&name);
        lines.push('\n');
    }
    Ok(sha256_hex(lines.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_of_a_folder_follows_its_model_files_only() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let fingerprint = || checkpoint_sha256(dir.path(), &mut |_| Ok(())).unwrap();
        write("model.safetensors", "abc");
        write("config.json", "{}");
        let first = fingerprint();
        // sha256sum config.json model.safetensors | sha256sum
        assert_eq!(first, "bb26275d74d8b85c193d98418b10723876d6a1ef2da1f60287213e8b8a65bf38");
        write("README.md", "changed");
        assert_eq!(fingerprint(), first);
        write("config.json", "{ }");
        assert_ne!(fingerprint(), first);
    }
}
