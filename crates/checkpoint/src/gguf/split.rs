//! [`Split`]: what a GGUF file says about the files that belong to it, and whether they do.
//!
//! `gguf-split` of llama.cpp writes three keys to every part: `split.no` (from 0), `split.count` and
//! `split.tensors.count`, the tensors of all parts. Everything else is in the first part, which may
//! have no tensor. A merged model says `split.count` 0.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use super::name::SplitName;
use super::part::Part;
use crate::{LoadError, Metadata, Value};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const N_TENSORS: &str = "split.tensors.count";
/// Keys that a part says about itself and not about the model.
const OWN_KEYS: [&str; 4] = [NUMBER, COUNT, N_TENSORS, "general.alignment"];

/// What the file that is opened says.
#[derive(Clone, Copy)]
pub(super) struct Split {
    /// Its number, from 1.
    number: u16,
    /// Number of parts; 1 for a model in one file.
    pub(super) count: u16,
    /// Tensors of all parts; said by every split model.
    n_tensors: Option<u32>,
}

impl Split {
    pub(super) fn read(metadata: &Metadata) -> Result<Split, LoadError> {
        let n_tensors = metadata.u32(N_TENSORS)?;
        let Some(count) = u16_of(metadata, COUNT)? else {
            if metadata.get(NUMBER).is_some() || n_tensors.is_some() {
                return Err(LoadError::MissingKey { key: COUNT.to_owned() });
            }
            return Ok(Split { number: 1, count: 1, n_tensors: None });
        };
        let count = count.max(1);
        let missing = |key: &str| LoadError::MissingKey { key: key.to_owned() };
        let number = match u16_of(metadata, NUMBER)? {
            None if count == 1 => 0,
            None => return Err(missing(NUMBER)),
            Some(number) if number >= count => {
                let expected = format!("0 to {} (`{COUNT}` is {count})", count - 1);
                return Err(LoadError::bad_value(NUMBER, expected, number));
            }
            Some(number) => number,
        };
        if count > 1 && n_tensors.is_none() {
            return Err(missing(N_TENSORS));
        }
        Ok(Split { number: number + 1, count, n_tensors })
    }

    /// The name of the file at `path`, which must be that of the first part.
    pub(super) fn name_of_first(self, path: &Path) -> Result<SplitName, LoadError> {
        let Split { number, count, .. } = self;
        let name =
            SplitName::of(path).filter(|name| (name.number(), name.count()) == (number, count));
        let Some(name) = name else {
            let expected = SplitName::ending(number, count);
            let found = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(LoadError::PartName { number, count, expected, found });
        };
        if number != 1 {
            let first = path.with_file_name(name.part(1).to_string()).display().to_string();
            return Err(LoadError::NotFirstPart { number, count, first });
        }
        Ok(name)
    }

    /// Refuses a later part; for files without a name.
    pub(super) fn require_first(self) -> Result<(), LoadError> {
        let Split { number, count, .. } = self;
        if number == 1 {
            return Ok(());
        }
        Err(LoadError::NotFirstPart { number, count, first: "part 1".to_owned() })
    }

    /// Refuses a number of files that is not that of the parts.
    pub(super) fn require_given(self, n_files: usize) -> Result<(), LoadError> {
        let Split { count, .. } = self;
        if n_files == usize::from(count) {
            return Ok(());
        }
        let (expected, found) = (format!("{n_files}, the number of files"), count.to_string());
        Err(LoadError::WrongPart { number: 1, count, key: COUNT.to_owned(), expected, found })
    }

    /// Opens part `number`, which must be at `path`.
    pub(super) fn open_part(self, number: u16, path: &Path) -> Result<Part, LoadError> {
        match Part::open(path) {
            Err(LoadError::Io { path, source }) if source.kind() == io::ErrorKind::NotFound => {
                Err(LoadError::MissingPart { number, count: self.count, path })
            }
            opened @ (Ok(_) | Err(_)) => opened,
        }
    }

    /// Refuses parts that are not those of one model, in their order; the index says which is wrong.
    pub(super) fn check(self, parts: &[Part]) -> Result<(), (usize, LoadError)> {
        for (i, part) in parts.iter().enumerate().skip(1) {
            let number = u16::try_from(i + 1).expect("no more parts than `split.count` says");
            self.check_part(number, part, &parts[0]).map_err(|error| (i, error))?;
        }
        self.check_tensors(parts)
    }

    fn check_part(self, number: u16, part: &Part, first: &Part) -> Result<(), LoadError> {
        let count = self.count;
        let wrong = |key: &str, expected: String, found: String| {
            Err(LoadError::WrongPart { number, count, key: key.to_owned(), expected, found })
        };
        let shown = |found: Option<u32>| found.map_or("no such key".to_owned(), |n| n.to_string());
        for (key, expected) in [(COUNT, count), (NUMBER, number - 1)] {
            let found = part.metadata.u32(key)?;
            if found != Some(u32::from(expected)) {
                return wrong(key, expected.to_string(), shown(found));
            }
        }
        let found = part.metadata.u32(N_TENSORS)?;
        if found.is_some() && found != self.n_tensors {
            return wrong(N_TENSORS, shown(self.n_tensors), shown(found));
        }
        for (key, value) in part.metadata.iter().filter(|(key, _)| !OWN_KEYS.contains(key)) {
            let in_first = first.metadata.get(key);
            if in_first != Some(value) {
                let expected = in_first.map_or("no such key, as in part 1".to_owned(), short);
                return wrong(key, expected, short(value));
            }
        }
        Ok(())
    }

    fn check_tensors(self, parts: &[Part]) -> Result<(), (usize, LoadError)> {
        let mut places: HashMap<&str, usize> = HashMap::new();
        for (i, part) in parts.iter().enumerate() {
            for entry in &part.tensors {
                if let Some(first) = places.insert(&entry.name, i) {
                    let tensor = entry.name.clone();
                    let (first, second) = (first + 1, i + 1);
                    return Err((i, LoadError::TensorInTwoParts { tensor, first, second }));
                }
            }
        }
        match self.n_tensors {
            Some(expected) if expected as usize != places.len() => {
                let (count, found) = (self.count, places.len());
                Err((0, LoadError::WrongTensorTotal { count, expected, found }))
            }
            Some(_) | None => Ok(()),
        }
    }
}

fn u16_of(metadata: &Metadata, key: &str) -> Result<Option<u16>, LoadError> {
    let Some(found) = metadata.u32(key)? else { return Ok(None) };
    match u16::try_from(found) {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(LoadError::bad_value(key, "an integer from 0 to 65535", found)),
    }
}

/// A value in a message: a text as it is, anything else as its type where it may be long.
fn short(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{}`", text.chars().take(80).collect::<String>()),
        Value::Array(_) => format!("another {}", value.type_name()),
        Value::U8(x) => x.to_string(),
        Value::I8(x) => x.to_string(),
        Value::U16(x) => x.to_string(),
        Value::I16(x) => x.to_string(),
        Value::U32(x) => x.to_string(),
        Value::I32(x) => x.to_string(),
        Value::U64(x) => x.to_string(),
        Value::I64(x) => x.to_string(),
        Value::F32(x) => x.to_string(),
        Value::F64(x) => x.to_string(),
        Value::Bool(x) => x.to_string(),
    }
}

#[cfg(test)]
mod tests {
    //! The guards, and what reaches the user without them. Each refusal has its test in
    //! tests/split.rs.

    use std::path::PathBuf;

    use exrail_testkit::{GgufValue, GgufWriter};

    use super::*;
    use crate::bytes::FileBytes;
    use crate::{DecoderConfig, Gguf};

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name)
    }

    fn parts() -> Vec<Part> {
        let open = |number| Part::open(&golden(&format!("split/tiny-0000{number}-of-00003.gguf")));
        (1..=3).map(|number| open(number).unwrap()).collect()
    }

    fn checked(parts: &[Part]) -> Result<(), (usize, LoadError)> {
        Split::read(&parts[0].metadata).unwrap().check(parts)
    }

    /// The mutation: what opening makes of the parts when nothing was checked.
    fn unchecked(parts: Vec<Part>) -> Gguf {
        Gguf::assemble(parts, std::iter::repeat(None))
    }

    fn whole() -> Gguf {
        Gguf::open(&golden("families/llama-llama3/model.gguf")).unwrap()
    }

    #[test]
    fn without_the_total_a_model_runs_without_a_tensor_that_it_needs() {
        let mut parts = parts();
        let name = "rope_freqs.weight";
        let before: usize = parts.iter().map(|part| part.tensors.len()).sum();
        parts.iter_mut().for_each(|part| part.tensors.retain(|entry| entry.name != name));
        let (_, error) = checked(&parts).unwrap_err();
        assert!(matches!(error, LoadError::WrongTensorTotal { expected: 22, .. }), "{error}");
        assert_eq!(before, 22);
        // Long texts would be answered with the frequencies of another model.
        let config = DecoderConfig::from_gguf(&unchecked(parts)).unwrap();
        assert_ne!(config, DecoderConfig::from_gguf(&whole()).unwrap());
    }

    #[test]
    fn without_the_comparison_the_weights_of_another_model_are_used() {
        // The last part of another model, whose numbers and tensors fit.
        let mut parts = parts();
        let split_key = |type_id, bytes: &[u8]| GgufValue::Raw { type_id, bytes: bytes.to_vec() };
        let keys = GgufWriter::new()
            .key(NUMBER, split_key(2, &[2, 0]))
            .key(COUNT, split_key(2, &[3, 0]))
            .key(N_TENSORS, split_key(5, &[22, 0, 0, 0]))
            .key("general.architecture", "qwen2");
        let foreign = parts[2].tensors.iter().fold(keys, |keys, entry| {
            keys.tensor(&entry.name, entry.dtype, &entry.shape, &vec![0; entry.place.len()])
        });
        parts[2] = Part::parse(FileBytes::Owned(foreign.finish().into())).unwrap();
        let (at, error) = checked(&parts).unwrap_err();
        assert!(matches!(error, LoadError::WrongPart { number: 3, .. }) && at == 2, "{error}");
        let gguf = unchecked(parts);
        assert!(DecoderConfig::from_gguf(&gguf).is_ok());
        let name = "output_norm.weight";
        assert_ne!(gguf.tensor(name).unwrap().bytes, whole().tensor(name).unwrap().bytes);
    }

    #[test]
    fn without_the_search_for_doubles_the_last_of_two_tensors_wins() {
        let mut parts = parts();
        let name = "blk.0.attn_norm.weight";
        let other = parts[2].tensors.iter().find(|entry| entry.name == "output_norm.weight");
        let mut double = other.unwrap().clone();
        double.name = name.to_owned();
        parts[2].tensors.push(double);
        let (at, error) = checked(&parts).unwrap_err();
        assert!(matches!(error, LoadError::TensorInTwoParts { .. }) && at == 2, "{error}");
        let gguf = unchecked(parts);
        assert_ne!(gguf.tensor(name).unwrap().bytes, whole().tensor(name).unwrap().bytes);
    }
}
