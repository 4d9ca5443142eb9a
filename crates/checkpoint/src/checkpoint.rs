//! [`Checkpoint`]: a decoder as people have it, a GGUF file or a Hugging Face folder; and the files
//! that make it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::digest::{sha256_file, sha256_files, sha256_hex};
use crate::{DecoderConfig, Gguf, HfFolder, LoadError, Tensors};

/// Ends of the names of files in a folder that change what a model answers.
const MODEL_FILES: [&str; 4] = ["json", "jinja", "model", "safetensors"];

/// A decoder on disk, checked.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a process holds one or two of them")]
pub enum Checkpoint {
    /// One GGUF file, or all parts of a split one.
    Gguf(Gguf),
    /// A folder with `config.json` and safetensors.
    Folder(HfFolder),
}

impl Checkpoint {
    /// Opens the folder or the GGUF file at `path`, and the other parts when it is the first of several.
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

    /// The files that it was opened from.
    ///
    /// # Errors
    /// When a folder cannot be read, and for a checkpoint that was in memory already.
    pub fn files(&self) -> io::Result<CheckpointFiles> {
        let in_memory = || io::Error::other("a checkpoint in memory has no files");
        match self {
            Checkpoint::Gguf(gguf) => {
                let paths = gguf.parts().iter().map(|part| part.path().map(Path::to_owned));
                let paths = paths.collect::<Option<Vec<_>>>().ok_or_else(in_memory)?;
                Ok(CheckpointFiles::Parts(paths))
            }
            Checkpoint::Folder(folder) => {
                CheckpointFiles::of_folder(folder.dir().ok_or_else(in_memory)?)
            }
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

/// The files that make a checkpoint, in the order in which they are hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckpointFiles {
    /// A GGUF file, or all parts of a split one.
    Parts(Vec<PathBuf>),
    /// Every file of a folder that changes what the model answers, by name.
    Folder(Vec<PathBuf>),
}

impl CheckpointFiles {
    /// Those of the folder `dir`.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn of_folder(dir: &Path) -> io::Result<CheckpointFiles> {
        let mut files = Vec::new();
        for entry in fs::read_dir(dir)? {
            let file = entry?.path();
            let extension = file.extension().and_then(|extension| extension.to_str());
            let is_part = extension.is_some_and(|extension| MODEL_FILES.contains(&extension));
            if is_part && file.is_file() {
                files.push(file);
            }
        }
        files.sort();
        Ok(CheckpointFiles::Folder(files))
    }

    /// Their paths.
    #[must_use]
    pub fn paths(&self) -> &[PathBuf] {
        match self {
            CheckpointFiles::Parts(files) | CheckpointFiles::Folder(files) => files,
        }
    }

    /// Bytes of all files.
    ///
    /// # Errors
    /// When a file is not there.
    pub fn len_bytes(&self) -> io::Result<u64> {
        self.paths().iter().map(|file| Ok(fs::metadata(file)?.len())).sum()
    }

    /// The fingerprint of the checkpoint: the SHA-256 of a GGUF file, or of the parts of a split one
    /// one after the other, what `cat MODEL-*.gguf | sha256sum` prints; or of the lines "SHA-256, two
    /// spaces, name" of a folder's files, what `sha256sum * | sha256sum` prints. `progress` is told
    /// the bytes hashed so far; its error ends the hash.
    ///
    /// # Errors
    /// When a file cannot be read, and what `progress` says.
    pub fn sha256(&self, progress: &mut dyn FnMut(u64) -> io::Result<()>) -> io::Result<String> {
        let files = match self {
            CheckpointFiles::Parts(files) => return sha256_files(files, progress),
            CheckpointFiles::Folder(files) => files,
        };
        let (mut lines, mut done) = (String::new(), 0);
        for file in files {
            let sha256 = sha256_file(file, &mut |bytes| progress(done + bytes))?;
            done += fs::metadata(file)?.len();
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            lines.push_str(&sha256);
            lines.push_str("  ");
            lines.push_str(&name);
            lines.push('\n');
        }
        Ok(sha256_hex(lines.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_of_a_folder_follows_its_model_files_only() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let fingerprint = || {
            let files = CheckpointFiles::of_folder(dir.path()).unwrap();
            files.sha256(&mut |_| Ok(())).unwrap()
        };
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

    #[test]
    fn the_fingerprint_of_parts_follows_every_one_and_their_order_but_not_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let fingerprint = |names: &[&str]| {
            let files = names.iter().map(|name| dir.path().join(name)).collect();
            CheckpointFiles::Parts(files).sha256(&mut |_| Ok(())).unwrap()
        };
        for (name, text) in [("a", "ab"), ("b", "c"), ("c", "d"), ("whole", "abc")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        // cat a b | sha256sum
        assert_eq!(fingerprint(&["a", "b"]), sha256_hex(b"abc"));
        assert_eq!(fingerprint(&["whole"]), sha256_hex(b"abc"));
        assert_ne!(fingerprint(&["a", "c"]), fingerprint(&["a", "b"]));
        assert_ne!(fingerprint(&["b", "a"]), fingerprint(&["a", "b"]));
        // The mutation: the hash of the first part alone says the same of both.
        assert_eq!(fingerprint(&["a"]), sha256_hex(b"ab"));
    }
}
