//! [`Metadata`]: the typed key-value section of a GGUF file.

use std::collections::HashMap;

use crate::LoadError;
use crate::reader::Reader;

/// Deepest nesting of arrays; real files have one level.
const MAX_ARRAY_DEPTH: usize = 4;
/// GGUF says that keys have at most 2¹⁶ - 1 bytes.
const MAX_KEY_BYTES: u64 = u16::MAX as u64;
/// Long enough for any chat template or licence text.
const MAX_STRING_BYTES: u64 = 1 << 24;
/// More than twice the largest vocabulary times the merges per token.
const MAX_ARRAY_LEN: u64 = 1 << 24;
/// Real files have some dozens.
const MAX_KEYS: u64 = 1 << 14;

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Unsigned 8-bit integer.
    U8(u8),
    /// Signed 8-bit integer.
    I8(i8),
    /// Unsigned 16-bit integer.
    U16(u16),
    /// Signed 16-bit integer.
    I16(i16),
    /// Unsigned 32-bit integer.
    U32(u32),
    /// Signed 32-bit integer.
    I32(i32),
    /// Unsigned 64-bit integer.
    U64(u64),
    /// Signed 64-bit integer.
    I64(i64),
    /// Single precision float.
    F32(f32),
    /// Double precision float.
    F64(f64),
    /// Boolean, stored as one byte 0 or 1.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Values of one type.
    Array(Array),
}

/// An array of metadata values, kept in the type of its elements.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    /// Unsigned 8-bit integers.
    U8(Vec<u8>),
    /// Signed 8-bit integers.
    I8(Vec<i8>),
    /// Unsigned 16-bit integers.
    U16(Vec<u16>),
    /// Signed 16-bit integers.
    I16(Vec<i16>),
    /// Unsigned 32-bit integers.
    U32(Vec<u32>),
    /// Signed 32-bit integers.
    I32(Vec<i32>),
    /// Unsigned 64-bit integers.
    U64(Vec<u64>),
    /// Signed 64-bit integers.
    I64(Vec<i64>),
    /// Single precision floats.
    F32(Vec<f32>),
    /// Double precision floats.
    F64(Vec<f64>),
    /// Booleans.
    Bool(Vec<bool>),
    /// UTF-8 texts.
    String(Vec<String>),
    /// Arrays, which may differ in type and length.
    Array(Vec<Array>),
}

impl Value {
    /// The type's name for error messages.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::U8(_) => "u8",
            Value::I8(_) => "i8",
            Value::U16(_) => "u16",
            Value::I16(_) => "i16",
            Value::U32(_) => "u32",
            Value::I32(_) => "i32",
            Value::U64(_) => "u64",
            Value::I64(_) => "i64",
            Value::F32(_) => "f32",
            Value::F64(_) => "f64",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::Array(array) => array.type_name(),
        }
    }

    /// The value as an integer, whatever its stored width; `None` for other types.
    fn integer(&self) -> Option<i128> {
        match *self {
            Value::U8(x) => Some(x.into()),
            Value::I8(x) => Some(x.into()),
            Value::U16(x) => Some(x.into()),
            Value::I16(x) => Some(x.into()),
            Value::U32(x) => Some(x.into()),
            Value::I32(x) => Some(x.into()),
            Value::U64(x) => Some(x.into()),
            Value::I64(x) => Some(x.into()),
            Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::String(_) | Value::Array(_) => {
                None
            }
        }
    }
}

impl Array {
    /// The type's name for error messages.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "array of u8",
            Array::I8(_) => "array of i8",
            Array::U16(_) => "array of u16",
            Array::I16(_) => "array of i16",
            Array::U32(_) => "array of u32",
            Array::I32(_) => "array of i32",
            Array::U64(_) => "array of u64",
            Array::I64(_) => "array of i64",
            Array::F32(_) => "array of f32",
            Array::F64(_) => "array of f64",
            Array::Bool(_) => "array of bool",
            Array::String(_) => "array of string",
            Array::Array(_) => "array of arrays",
        }
    }
}

/// The metadata of a model, in file order.
///
/// Typed getters return `Ok(None)` for an absent key and an error for a key of another type, so
/// that a damaged key is never taken for an absent one. The `require_` variants refuse absence too.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl Metadata {
    /// Reads the number of keys, then the keys and their values.
    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Metadata, LoadError> {
        // A key takes at least its length, one byte, a type and a value of one byte.
        let n_keys = reader.count("number of metadata keys", MAX_KEYS, 14)?;
        let mut metadata = Metadata::default();
        for i in 0..n_keys {
            let key = reader.string(&format!("name of metadata key {i}"), MAX_KEY_BYTES)?;
            if key.is_empty() {
                return Err(LoadError::EmptyName { what: format!("name of metadata key {i}") });
            }
            let value = read_value(reader, &key)?;
            if metadata.index.insert(key.clone(), i).is_some() {
                return Err(LoadError::DuplicateKey { key });
            }
            metadata.entries.push((key, value));
        }
        Ok(metadata)
    }

    /// All keys and values in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// An integer of any stored width that fits in `u32`.
    ///
    /// # Errors
    /// When the value is no integer or does not fit.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Some(integer) = value.integer() else { return Err(wrong_type(key, "u32", value)) };
        match u32::try_from(integer) {
            Ok(integer) => Ok(Some(integer)),
            Err(_) => Err(LoadError::bad_value(key, "an integer from 0 to 4294967295", integer)),
        }
    }

    /// A float of either width, rounded to `f32`.
    ///
    /// # Errors
    /// When the value is no float.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(value)) => Ok(Some(*value)),
            #[expect(
                clippy::cast_possible_truncation,
                reason = "f32 is what the engine computes in"
            )]
            Some(Value::F64(value)) => Ok(Some(*value as f32)),
            Some(value) => Err(wrong_type(key, "f32", value)),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// When the value is no string.
    pub fn str(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(value) => Err(wrong_type(key, "string", value)),
        }
    }

    /// A boolean.
    ///
    /// # Errors
    /// When the value is no boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(value) => Err(wrong_type(key, "bool", value)),
        }
    }

    /// An array of texts.
    ///
    /// # Errors
    /// When the value is anything else.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::String(values))) => Ok(Some(values)),
            Some(value) => Err(wrong_type(key, "array of string", value)),
        }
    }

    /// An array of single precision floats.
    ///
    /// # Errors
    /// When the value is anything else.
    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::F32(values))) => Ok(Some(values)),
            Some(value) => Err(wrong_type(key, "array of f32", value)),
        }
    }

    /// An array of signed 32-bit integers.
    ///
    /// # Errors
    /// When the value is anything else.
    pub fn i32s(&self, key: &str) -> Result<Option<&[i32]>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::I32(values))) => Ok(Some(values)),
            Some(value) => Err(wrong_type(key, "array of i32", value)),
        }
    }

    /// An array of bytes; writers store them signed or unsigned.
    ///
    /// # Errors
    /// When the value is anything else.
    pub fn bytes(&self, key: &str) -> Result<Option<Vec<u8>>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::U8(values))) => Ok(Some(values.clone())),
            Some(Value::Array(Array::I8(values))) => {
                Ok(Some(values.iter().map(|byte| byte.cast_unsigned()).collect()))
            }
            Some(value) => Err(wrong_type(key, "array of u8", value)),
        }
    }

    /// As [`Metadata::u32`], for a key that must be there.
    ///
    /// # Errors
    /// When the key is absent or of another type.
    pub fn require_u32(&self, key: &str) -> Result<u32, LoadError> {
        self.u32(key)?.ok_or_else(|| LoadError::MissingKey { key: key.to_owned() })
    }

    /// As [`Metadata::f32`], for a key that must be there.
    ///
    /// # Errors
    /// When the key is absent or of another type.
    pub fn require_f32(&self, key: &str) -> Result<f32, LoadError> {
        self.f32(key)?.ok_or_else(|| LoadError::MissingKey { key: key.to_owned() })
    }

    /// As [`Metadata::str`], for a key that must be there.
    ///
    /// # Errors
    /// When the key is absent or of another type.
    pub fn require_str(&self, key: &str) -> Result<&str, LoadError> {
        self.str(key)?.ok_or_else(|| LoadError::MissingKey { key: key.to_owned() })
    }
}

fn wrong_type(key: &str, expected: &'static str, value: &Value) -> LoadError {
    LoadError::WrongKeyType { key: key.to_owned(), expected, found: value.type_name() }
}

fn read_value(reader: &mut Reader<'_>, key: &str) -> Result<Value, LoadError> {
    let type_id = reader.u32(key)?;
    Ok(match type_id {
        0 => Value::U8(u8::from_le_bytes(reader.array(key)?)),
        1 => Value::I8(i8::from_le_bytes(reader.array(key)?)),
        2 => Value::U16(u16::from_le_bytes(reader.array(key)?)),
        3 => Value::I16(i16::from_le_bytes(reader.array(key)?)),
        4 => Value::U32(u32::from_le_bytes(reader.array(key)?)),
        5 => Value::I32(i32::from_le_bytes(reader.array(key)?)),
        6 => Value::F32(f32::from_le_bytes(reader.array(key)?)),
        7 => Value::Bool(read_bool(key, reader.array(key)?)?),
        8 => Value::String(reader.string(key, MAX_STRING_BYTES)?),
        9 => Value::Array(read_array(reader, key, 1)?),
        10 => Value::U64(u64::from_le_bytes(reader.array(key)?)),
        11 => Value::I64(i64::from_le_bytes(reader.array(key)?)),
        12 => Value::F64(f64::from_le_bytes(reader.array(key)?)),
        _ => return Err(LoadError::UnknownValueType { key: key.to_owned(), type_id }),
    })
}

fn read_array(reader: &mut Reader<'_>, key: &str, depth: usize) -> Result<Array, LoadError> {
    if depth > MAX_ARRAY_DEPTH {
        return Err(LoadError::LimitExceeded {
            what: format!("nesting of arrays in metadata key `{key}`"),
            limit: MAX_ARRAY_DEPTH as u64,
            found: depth as u64,
        });
    }
    let type_id = reader.u32(key)?;
    Ok(match type_id {
        0 => Array::U8(read_numbers(reader, key, u8::from_le_bytes)?),
        1 => Array::I8(read_numbers(reader, key, i8::from_le_bytes)?),
        2 => Array::U16(read_numbers(reader, key, u16::from_le_bytes)?),
        3 => Array::I16(read_numbers(reader, key, i16::from_le_bytes)?),
        4 => Array::U32(read_numbers(reader, key, u32::from_le_bytes)?),
        5 => Array::I32(read_numbers(reader, key, i32::from_le_bytes)?),
        6 => Array::F32(read_numbers(reader, key, f32::from_le_bytes)?),
        7 => {
            let bytes = read_numbers(reader, key, |byte: [u8; 1]| byte)?;
            Array::Bool(bytes.into_iter().map(|b| read_bool(key, b)).collect::<Result<_, _>>()?)
        }
        8 => {
            let len = reader.count(key, MAX_ARRAY_LEN, 8)?;
            let strings = (0..len).map(|_| reader.string(key, MAX_STRING_BYTES));
            Array::String(strings.collect::<Result<_, _>>()?)
        }
        9 => {
            // An inner array takes at least its type and its length.
            let len = reader.count(key, MAX_ARRAY_LEN, 12)?;
            let arrays = (0..len).map(|_| read_array(reader, key, depth + 1));
            Array::Array(arrays.collect::<Result<_, _>>()?)
        }
        10 => Array::U64(read_numbers(reader, key, u64::from_le_bytes)?),
        11 => Array::I64(read_numbers(reader, key, i64::from_le_bytes)?),
        12 => Array::F64(read_numbers(reader, key, f64::from_le_bytes)?),
        _ => return Err(LoadError::UnknownValueType { key: key.to_owned(), type_id }),
    })
}

fn read_numbers<T, const N: usize>(
    reader: &mut Reader<'_>,
    key: &str,
    read: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>, LoadError> {
    let len = reader.count(key, MAX_ARRAY_LEN, N as u64)?;
    let bytes = reader.take((len * N) as u64, key)?;
    Ok(bytes.as_chunks().0.iter().map(|chunk| read(*chunk)).collect())
}

fn read_bool(key: &str, byte: [u8; 1]) -> Result<bool, LoadError> {
    match byte[0] {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(LoadError::bad_value(key, "a boolean byte 0 or 1", other)),
    }
}
