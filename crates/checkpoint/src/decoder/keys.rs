//! [`Keys`]: typed access to the keys of one architecture in GGUF metadata.

use crate::{LoadError, Metadata};

/// The keys `<architecture>.*` of a file.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) metadata: &'a Metadata,
    pub(super) architecture: &'a str,
}

impl<'a> Keys<'a> {
    /// The whole name of a key.
    pub(super) fn name(self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub(super) fn positive(self, key: &str, limit: u32) -> Result<usize, LoadError> {
        let key = self.name(key);
        in_range(&key, self.metadata.require_u32(&key)?, limit)
    }

    pub(super) fn optional_positive(self, key: &str) -> Result<Option<usize>, LoadError> {
        let key = self.name(key);
        self.metadata.u32(&key)?.map(|value| in_range(&key, value, u32::MAX)).transpose()
    }

    /// As [`Keys::optional_positive`], but zero means absent, as converters write it.
    pub(super) fn positive_or_zero(self, key: &str) -> Result<Option<usize>, LoadError> {
        match self.metadata.u32(&self.name(key))? {
            None | Some(0) => Ok(None),
            Some(_) => self.optional_positive(key),
        }
    }

    pub(super) fn positive_f32(self, key: &str) -> Result<f32, LoadError> {
        match self.optional_f32(key)? {
            Some(value) => Ok(value),
            None if self.metadata.get(&self.name(key)).is_some() => {
                Err(self.bad(key, "a positive number", 0))
            }
            None => Err(LoadError::MissingKey { key: self.name(key) }),
        }
    }

    /// A positive number; zero means absent, as llama.cpp reads it.
    pub(super) fn optional_f32(self, key: &str) -> Result<Option<f32>, LoadError> {
        let key = self.name(key);
        match self.metadata.f32(&key)? {
            Some(value) if !value.is_finite() || value < 0.0 => {
                Err(LoadError::bad_value(&key, "a positive number", value))
            }
            Some(value) if value > 0.0 => Ok(Some(value)),
            Some(_) | None => Ok(None),
        }
    }

    pub(super) fn str(self, key: &str) -> Result<Option<&'a str>, LoadError> {
        self.metadata.str(&self.name(key))
    }

    pub(super) fn bad(
        self,
        key: &str,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> LoadError {
        LoadError::bad_value(&self.name(key), expected, found)
    }
}

fn in_range(key: &str, value: u32, limit: u32) -> Result<usize, LoadError> {
    let expected = || format!("an integer from 1 to {limit}");
    if !(1..=limit).contains(&value) {
        return Err(LoadError::bad_value(key, expected(), value));
    }
    usize::try_from(value).map_err(|_| LoadError::bad_value(key, expected(), value))
}
