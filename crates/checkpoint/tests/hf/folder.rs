//! Golden folders in memory, to be changed before they are loaded.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use exrail_checkpoint::{HfFolder, LoadError};
use serde_json::{Map, Value};

/// A folder under `golden/`.
pub(crate) fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(path)
}

/// The files of a folder by name.
#[derive(Clone)]
pub(crate) struct Folder(pub(crate) BTreeMap<String, Arc<[u8]>>);

/// A tensor of a safetensors file.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Folder {
    /// The folder `golden/families/{name}`.
    pub(crate) fn family(name: &str) -> Folder {
        Folder::read(&format!("families/{name}"))
    }

    pub(crate) fn read(path: &str) -> Folder {
        let entries = std::fs::read_dir(golden(path)).unwrap().map(Result::unwrap);
        let file = |entry: std::fs::DirEntry| {
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).unwrap().into())
        };
        Folder(entries.filter(|entry| entry.path().is_file()).map(file).collect())
    }

    pub(crate) fn load(&self) -> Result<HfFolder, LoadError> {
        HfFolder::parse(self.0.clone())
    }

    /// The error's message, which must not be a success.
    pub(crate) fn refusal(&self) -> String {
        self.load().expect_err("a folder that must be refused").to_string()
    }

    pub(crate) fn with(mut self, name: &str, bytes: impl AsRef<[u8]>) -> Folder {
        self.0.insert(name.to_owned(), bytes.as_ref().into());
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Folder {
        assert!(self.0.remove(name).is_some(), "{name}");
        self
    }

    /// With the JSON file `name` changed.
    pub(crate) fn json(self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) -> Folder {
        let mut json: Value = serde_json::from_slice(&self.0[name]).unwrap();
        change(json.as_object_mut().unwrap());
        self.with(name, json.to_string())
    }

    /// With one field of `config.json` changed, or left out when it is `None`.
    pub(crate) fn config(self, key: &str, value: impl Into<Option<Value>>) -> Folder {
        let value = value.into();
        self.json("config.json", |config| match value {
            Some(value) => drop(config.insert(key.to_owned(), value)),
            None => drop(config.remove(key)),
        })
    }

    /// With the tensors of the file `name` changed.
    pub(crate) fn tensors(
        self,
        name: &str,
        change: impl FnOnce(&mut BTreeMap<String, Stored>),
    ) -> Folder {
        let mut tensors = read_safetensors(&self.0[name]);
        change(&mut tensors);
        self.with(name, write_safetensors(&tensors))
    }

    /// With the tensors of `model.safetensors` changed.
    pub(crate) fn weights(self, change: impl FnOnce(&mut BTreeMap<String, Stored>)) -> Folder {
        self.tensors("model.safetensors", change)
    }
}

fn read_safetensors(bytes: &[u8]) -> BTreeMap<String, Stored> {
    let len = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let size = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
    tensors
        .map(|(name, info)| {
            let place =
                8 + len + size(&info["data_offsets"][0])..8 + len + size(&info["data_offsets"][1]);
            let stored = Stored {
                dtype: info["dtype"].as_str().unwrap().to_owned(),
                shape: info["shape"].as_array().unwrap().iter().map(size).collect(),
                bytes: bytes[place].to_vec(),
            };
            (name, stored)
        })
        .collect()
}

fn write_safetensors(tensors: &BTreeMap<String, Stored>) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, stored) in tensors {
        let start = data.len();
        data.extend(&stored.bytes);
        let info = serde_json::json!({
            "dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, data.len()],
        });
        header.insert(name.clone(), info);
    }
    file(&Value::Object(header).to_string(), &data)
}

/// A safetensors file of any header.
pub(crate) fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}
