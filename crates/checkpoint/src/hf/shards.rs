//! [`Shards`]: the tensors of all safetensors files of a folder as one set.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, de};

use super::files::{Files, is_plain};
use crate::{LoadError, SafetensorsFile};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// A hundred bytes a tensor, and some hundred thousand tensors in a quantised mixture of experts.
const MAX_INDEX_BYTES: u64 = 32 << 20;
/// Ten times the shards of the largest published checkpoint.
const MAX_SHARDS: usize = 4096;

/// All safetensors files of a folder. No tensor is in two of them.
#[derive(Clone)]
pub(super) struct Shards {
    names: Vec<String>,
    files: Vec<SafetensorsFile>,
    /// Which file a tensor is in.
    places: BTreeMap<String, usize>,
}

impl Shards {
    /// Opens what the index names, or the only file, or else every file there is. Some quantisers
    /// leave the index of the model that they started from: where it names files that are not there
    /// and `may_be_stale`, it is not used.
    pub(super) fn open(files: &Files, may_be_stale: bool) -> Result<Shards, LoadError> {
        if files.contains(SINGLE) {
            return Shards::of(files, vec![SINGLE.to_owned()]);
        }
        if let Some(bytes) = files.read(INDEX, MAX_INDEX_BYTES)? {
            let map = weight_map(&bytes).map_err(|error| error.in_file(&files.path(INDEX)))?;
            let is_stale = may_be_stale && map.values().any(|shard| !files.contains(shard));
            if !is_stale {
                return Shards::indexed(files, &map)
                    .map_err(|error| error.in_file(&files.path(INDEX)));
            }
        }
        let names = files.ending_in("", ".safetensors")?;
        if names.is_empty() {
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(LoadError::Io { path: files.path(SINGLE), source });
        }
        Shards::of(files, names)
    }

    fn of(files: &Files, names: Vec<String>) -> Result<Shards, LoadError> {
        if names.len() > MAX_SHARDS {
            return Err(LoadError::LimitExceeded {
                what: "number of safetensors files".to_owned(),
                limit: MAX_SHARDS as u64,
                found: names.len() as u64,
            });
        }
        let mut shards = Shards { names, files: Vec::new(), places: BTreeMap::new() };
        for (i, name) in shards.names.iter().enumerate() {
            let file = files.safetensors(name)?;
            for tensor in file.stored_names() {
                if shards.places.insert(tensor.to_owned(), i).is_some() {
                    let error = LoadError::DuplicateTensor { tensor: tensor.to_owned() };
                    return Err(error.in_file(&files.path(name)));
                }
            }
            shards.files.push(file);
        }
        Ok(shards)
    }

    fn indexed(files: &Files, map: &BTreeMap<String, String>) -> Result<Shards, LoadError> {
        let mut names: Vec<String> = map.values().cloned().collect();
        names.sort_unstable();
        names.dedup();
        let shards = Shards::of(files, names)?;
        for (tensor, shard) in map {
            let found = shards.places.get(tensor).map(|&i| &shards.names[i]);
            if found != Some(shard) {
                let found = found.map_or("nowhere", String::as_str);
                let key = format!("weight_map: {tensor}");
                return Err(LoadError::bad_value(&key, format!("a tensor of {shard}"), found));
            }
        }
        match shards.places.iter().find(|(tensor, _)| !map.contains_key(*tensor)) {
            None => Ok(shards),
            Some((tensor, &i)) => {
                let key = format!("weight_map: {tensor}");
                Err(LoadError::bad_value(&key, &shards.names[i], "no entry"))
            }
        }
    }

    /// The file with the tensor `name`.
    pub(super) fn file_of(&self, name: &str) -> Option<&SafetensorsFile> {
        self.places.get(name).map(|&i| &self.files[i])
    }

    /// Names of all tensors, sorted.
    pub(super) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Names of the files.
    pub(super) fn file_names(&self) -> &[String] {
        &self.names
    }

    /// Bytes of all files.
    pub(super) fn len_bytes(&self) -> u64 {
        self.files.iter().map(SafetensorsFile::file_len).sum()
    }
}

#[derive(Deserialize)]
struct IndexJson {
    weight_map: WeightMap,
}

/// The map of an index; a tensor that is named twice is an error, not the last of the two.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<WeightMap, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor names and file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<WeightMap, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((tensor, shard)) = entries.next_entry::<String, String>()? {
                    if map.contains_key(&tensor) {
                        let message = format!("tensor `{tensor}` occurs twice in weight_map");
                        return Err(de::Error::custom(message));
                    }
                    map.insert(tensor, shard);
                }
                Ok(WeightMap(map))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

fn weight_map(bytes: &[u8]) -> Result<BTreeMap<String, String>, LoadError> {
    let index: IndexJson =
        serde_json::from_slice(bytes).map_err(|source| LoadError::Json { source })?;
    for (tensor, shard) in &index.weight_map.0 {
        if !is_plain(shard) || !shard.ends_with(".safetensors") {
            let key = format!("weight_map: {tensor}");
            return Err(LoadError::bad_value(&key, "a safetensors file beside it", shard));
        }
    }
    Ok(index.weight_map.0)
}
