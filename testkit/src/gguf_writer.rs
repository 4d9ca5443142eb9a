//! [`GgufWriter`]: writes GGUF files, also such as no converter would write.

use exrail_tensor::DType;

/// A metadata value to be written.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// Unsigned 32-bit integer.
    U32(u32),
    /// Signed 32-bit integer.
    I32(i32),
    /// Unsigned 64-bit integer.
    U64(u64),
    /// Single precision float.
    F32(f32),
    /// Boolean.
    Bool(bool),
    /// Text.
    Text(String),
    /// Array of texts.
    Texts(Vec<String>),
    /// Array of signed 32-bit integers.
    I32s(Vec<i32>),
    /// Array of single precision floats.
    F32s(Vec<f32>),
    /// Any type number followed by any bytes, for hostile files.
    Raw {
        /// GGUF value type.
        type_id: u32,
        /// What follows the type.
        bytes: Vec<u8>,
    },
}

impl From<u32> for GgufValue {
    fn from(value: u32) -> GgufValue {
        GgufValue::U32(value)
    }
}

impl From<f32> for GgufValue {
    fn from(value: f32) -> GgufValue {
        GgufValue::F32(value)
    }
}

impl From<bool> for GgufValue {
    fn from(value: bool) -> GgufValue {
        GgufValue::Bool(value)
    }
}

impl From<&str> for GgufValue {
    fn from(value: &str) -> GgufValue {
        GgufValue::Text(value.to_owned())
    }
}

/// Collects keys and tensors and writes them as one file.
#[derive(Clone, Debug)]
pub struct GgufWriter {
    version: u32,
    alignment: usize,
    keys: Vec<(Vec<u8>, GgufValue)>,
    tensors: Vec<WrittenTensor>,
    data: Vec<u8>,
    claimed_keys: Option<u64>,
    claimed_tensors: Option<u64>,
}

#[derive(Clone, Debug)]
struct WrittenTensor {
    name: Vec<u8>,
    /// Fastest first, as the file has them.
    dimensions: Vec<u64>,
    type_id: u32,
    offset: u64,
}

impl Default for GgufWriter {
    fn default() -> GgufWriter {
        GgufWriter::new()
    }
}

impl GgufWriter {
    /// An empty file of version 3 with the default alignment of 32 bytes.
    #[must_use]
    pub fn new() -> GgufWriter {
        GgufWriter {
            version: 3,
            alignment: 32,
            keys: Vec::new(),
            tensors: Vec::new(),
            data: Vec::new(),
            claimed_keys: None,
            claimed_tensors: None,
        }
    }

    /// Sets the version number.
    #[must_use]
    pub fn version(mut self, version: u32) -> GgufWriter {
        self.version = version;
        self
    }

    /// Sets the alignment and its key. Call before adding tensors.
    ///
    /// # Panics
    /// When `alignment` is 0; use [`GgufWriter::key`] to claim nonsense.
    #[must_use]
    pub fn alignment(self, alignment: u32) -> GgufWriter {
        assert_ne!(alignment, 0, "padding to a multiple of 0");
        let mut writer = self.key("general.alignment", alignment);
        writer.alignment = alignment as usize;
        writer
    }

    /// Adds a metadata key. Keys may repeat and may be empty.
    #[must_use]
    pub fn key(self, key: &str, value: impl Into<GgufValue>) -> GgufWriter {
        self.raw_key(key.as_bytes(), value)
    }

    /// Adds a metadata key that need not be UTF-8.
    #[must_use]
    pub fn raw_key(mut self, key: &[u8], value: impl Into<GgufValue>) -> GgufWriter {
        self.keys.push((key.to_vec(), value.into()));
        self
    }

    /// Adds a tensor with `shape` outermost first; its data is padded to the alignment.
    #[must_use]
    pub fn tensor(mut self, name: &str, dtype: DType, shape: &[usize], data: &[u8]) -> GgufWriter {
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        let offset = self.data.len() as u64;
        self.data.extend_from_slice(data);
        let dimensions: Vec<u64> = shape.iter().rev().map(|&n| n as u64).collect();
        self.raw_tensor(name.as_bytes(), &dimensions, dtype.to_ggml(), offset)
    }

    /// Adds a tensor info as it will stand in the file (dimensions fastest first), without data.
    #[must_use]
    pub fn raw_tensor(
        mut self,
        name: &[u8],
        dimensions: &[u64],
        type_id: u32,
        offset: u64,
    ) -> GgufWriter {
        let (name, dimensions) = (name.to_vec(), dimensions.to_vec());
        self.tensors.push(WrittenTensor { name, dimensions, type_id, offset });
        self
    }

    /// Adds bytes to the data section.
    #[must_use]
    pub fn raw_data(mut self, bytes: &[u8]) -> GgufWriter {
        self.data.extend_from_slice(bytes);
        self
    }

    /// Writes this number of keys in the header instead of the true one.
    #[must_use]
    pub fn claim_keys(mut self, n_keys: u64) -> GgufWriter {
        self.claimed_keys = Some(n_keys);
        self
    }

    /// Writes this number of tensors in the header instead of the true one.
    #[must_use]
    pub fn claim_tensors(mut self, n_tensors: u64) -> GgufWriter {
        self.claimed_tensors = Some(n_tensors);
        self
    }

    /// Bytes before the padding and the data section.
    #[must_use]
    pub fn header(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        let n_tensors = self.claimed_tensors.unwrap_or(self.tensors.len() as u64);
        bytes.extend(n_tensors.to_le_bytes());
        bytes.extend(self.claimed_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            put_text(&mut bytes, key);
            put_value(&mut bytes, value);
        }
        for tensor in &self.tensors {
            put_text(&mut bytes, &tensor.name);
            let n_dimensions = u32::try_from(tensor.dimensions.len()).expect("a short list");
            bytes.extend(n_dimensions.to_le_bytes());
            for dimension in &tensor.dimensions {
                bytes.extend(dimension.to_le_bytes());
            }
            bytes.extend(tensor.type_id.to_le_bytes());
            bytes.extend(tensor.offset.to_le_bytes());
        }
        bytes
    }

    /// The whole file.
    #[must_use]
    pub fn finish(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        bytes.extend_from_slice(&self.data);
        bytes
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text);
}

fn put_value(bytes: &mut Vec<u8>, value: &GgufValue) {
    let mut put = |type_id: u32, value: &[u8]| {
        bytes.extend(type_id.to_le_bytes());
        bytes.extend_from_slice(value);
    };
    match value {
        GgufValue::U32(x) => put(4, &x.to_le_bytes()),
        GgufValue::I32(x) => put(5, &x.to_le_bytes()),
        GgufValue::F32(x) => put(6, &x.to_le_bytes()),
        GgufValue::Bool(x) => put(7, &[u8::from(*x)]),
        GgufValue::Text(text) => {
            put(8, &[]);
            put_text(bytes, text.as_bytes());
        }
        GgufValue::U64(x) => put(10, &x.to_le_bytes()),
        GgufValue::Texts(texts) => {
            put_array_start(bytes, 8, texts.len());
            for text in texts {
                put_text(bytes, text.as_bytes());
            }
        }
        GgufValue::I32s(numbers) => {
            put_array_start(bytes, 5, numbers.len());
            bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufValue::F32s(numbers) => {
            put_array_start(bytes, 6, numbers.len());
            bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufValue::Raw { type_id, bytes: raw } => put(*type_id, raw),
    }
}

fn put_array_start(bytes: &mut Vec<u8>, element_type: u32, len: usize) {
    bytes.extend(9_u32.to_le_bytes());
    bytes.extend(element_type.to_le_bytes());
    bytes.extend((len as u64).to_le_bytes());
}
