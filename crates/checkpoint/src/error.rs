//! [`LoadError`]: everything that can be wrong with a model file.

use std::path::{Path, PathBuf};

use exrail_tensor::{DType, FormatError};
use thiserror::Error;

/// Why a model file or folder was refused. Messages name the thing, what was expected, what was
/// found and, where the user can do something, what to do next.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The operating system refused to open, read or map a file.
    #[error("{}: cannot be read: {source}", path.display())]
    Io {
        /// File concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something is wrong inside a file; `source` says what.
    #[error("{}: {source}", path.display())]
    InFile {
        /// File concerned.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<LoadError>,
    },
    /// The file ends too early.
    #[error(
        "truncated: {what} needs {expected} bytes but the file has {found} left; download it again"
    )]
    Truncated {
        /// Part of the file that was being read.
        what: String,
        /// Bytes that it needs.
        expected: u64,
        /// Bytes left in the file.
        found: u64,
    },
    /// The first bytes are not those of the format.
    #[error("not a {format} file: expected it to start with {expected:?}, found {found:?}")]
    BadMagic {
        /// Format that was asked for.
        format: &'static str,
        /// Bytes of the format.
        expected: [u8; 4],
        /// First bytes of the file.
        found: [u8; 4],
    },
    /// The format's version is not known.
    #[error(
        "GGUF version {found} is not supported, expected 2 or 3 (little endian); \
         convert the model again with a current llama.cpp"
    )]
    UnsupportedVersion {
        /// Version in the file.
        found: u32,
    },
    /// A count or length is larger than any real model needs.
    #[error("{what}: {found} exceeds the limit of {limit}; the file is damaged or hostile")]
    LimitExceeded {
        /// Name of the count.
        what: String,
        /// Largest accepted value.
        limit: u64,
        /// Value in the file.
        found: u64,
    },
    /// A metadata key occurs twice.
    #[error("metadata key `{key}` occurs twice")]
    DuplicateKey {
        /// Key concerned.
        key: String,
    },
    /// A tensor name occurs twice.
    #[error("tensor `{tensor}` occurs twice")]
    DuplicateTensor {
        /// Tensor concerned.
        tensor: String,
    },
    /// A later part of a split model was opened.
    #[error(
        "this is part {number} of {count}: expected the first part, from which all of them are \
         opened; open {first}"
    )]
    NotFirstPart {
        /// Number of the part, from 1.
        number: u16,
        /// Number of parts.
        count: u16,
        /// The file to open.
        first: String,
    },
    /// A part of a split model is not called what its number says, so that the others cannot be
    /// found.
    #[error(
        "this is part {number} of {count}: expected a name that ends in `{expected}`, found \
         `{found}`; give all parts, or links to them, the names under which they were published"
    )]
    PartName {
        /// Number of the part, from 1, by its metadata.
        number: u16,
        /// Number of parts, by its metadata.
        count: u16,
        /// How the name should end.
        expected: String,
        /// Name of the file.
        found: String,
    },
    /// A part of a split model is absent.
    #[error(
        "part {number} of {count} is missing: expected it at {}, found no such file; download it \
         too, to the folder of the first part",
        path.display()
    )]
    MissingPart {
        /// Number of the part, from 1.
        number: u16,
        /// Number of parts.
        count: u16,
        /// Where it should be.
        path: PathBuf,
    },
    /// A file under the name of a part is not that part of this model.
    #[error(
        "part {number} of {count}: `{key}`: expected {expected}, found {found}; the parts are not \
         those of one model, download all of them again from one place"
    )]
    WrongPart {
        /// Number of the part, from 1.
        number: u16,
        /// Number of parts.
        count: u16,
        /// Metadata key concerned.
        key: String,
        /// Value that fits the first part.
        expected: String,
        /// Value in the file.
        found: String,
    },
    /// Two parts of a split model have a tensor of one name.
    #[error(
        "tensor `{tensor}`: expected it in one part, found it in part {first} and in part \
         {second}; download all parts again from one place"
    )]
    TensorInTwoParts {
        /// Tensor concerned.
        tensor: String,
        /// Number of the part that has it first, from 1.
        first: usize,
        /// Number of the other part.
        second: usize,
    },
    /// All parts together have more or fewer tensors than the first part says.
    #[error(
        "parts 1 to {count} together: expected {expected} tensors (`split.tensors.count`), found \
         {found}; download all parts again from one place"
    )]
    WrongTensorTotal {
        /// Number of parts.
        count: u16,
        /// Tensors that there should be.
        expected: u32,
        /// Tensors that there are.
        found: usize,
    },
    /// A metadata value has a type number that GGUF does not define.
    #[error("metadata key `{key}`: expected a value type of 0 to 12, found {type_id}")]
    UnknownValueType {
        /// Key concerned.
        key: String,
        /// Type number in the file.
        type_id: u32,
    },
    /// Text that is not UTF-8.
    #[error("{what}: expected UTF-8 text, first bad byte at {at}")]
    BadText {
        /// Text concerned.
        what: String,
        /// Offset of the first bad byte in the text.
        at: usize,
    },
    /// A name is empty.
    #[error("{what} is empty")]
    EmptyName {
        /// Kind and number of the thing without a name.
        what: String,
    },
    /// A tensor's dimensions make no sense.
    #[error("tensor `{tensor}`: {problem} in shape {shape:?} (outermost first)")]
    BadShape {
        /// Tensor concerned.
        tensor: String,
        /// Dimensions as stored, outermost first.
        shape: Vec<u64>,
        /// What is wrong with them.
        problem: &'static str,
    },
    /// A tensor does not start on the file's alignment.
    #[error("tensor `{tensor}`: offset {offset} is not a multiple of the alignment {alignment}")]
    Misaligned {
        /// Tensor concerned.
        tensor: String,
        /// Offset in the data section.
        offset: u64,
        /// Alignment of the file.
        alignment: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors `{first}` and `{second}` overlap in the file")]
    Overlap {
        /// The one that starts first.
        first: String,
        /// The one that starts inside it.
        second: String,
    },
    /// A tensor is stored in a format that cannot be read.
    #[error("tensor `{tensor}`: format {found} is not supported; use a file in one of {supported}")]
    UnsupportedDtype {
        /// Tensor concerned.
        tensor: String,
        /// Name of the format, or its number when it has no name.
        found: String,
        /// Formats that can be read.
        supported: &'static str,
    },
    /// A tensor that the model needs is absent.
    #[error("tensor `{tensor}` is missing, expected shape {expected:?}")]
    MissingTensor {
        /// Tensor concerned.
        tensor: String,
        /// Shape that it should have, outermost first.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration implies.
    #[error(
        "tensor `{tensor}`: expected shape {expected:?} from the configuration, found {found:?}"
    )]
    WrongShape {
        /// Tensor concerned.
        tensor: String,
        /// Shape that the configuration implies, outermost first.
        expected: Vec<usize>,
        /// Shape in the file, outermost first.
        found: Vec<usize>,
    },
    /// A tensor that this architecture does not use; ignoring it would give wrong results.
    #[error("tensor `{tensor}` is not part of a `{architecture}` model as supported here")]
    UnexpectedTensor {
        /// Tensor concerned.
        tensor: String,
        /// Architecture of the file.
        architecture: String,
    },
    /// A tensor's bytes do not fit its format.
    #[error("tensor `{tensor}`: {source}")]
    BadTensor {
        /// Tensor concerned.
        tensor: String,
        /// What does not fit.
        source: FormatError,
    },
    /// A tensor that is to be rounded is in blocks already.
    #[error(
        "tensor `{tensor}`: expected 16-bit or 32-bit weights to quantise, found {found}; load the \
         file as it is"
    )]
    AlreadyQuantised {
        /// Tensor concerned.
        tensor: String,
        /// Its format.
        found: DType,
    },
    /// Weights that are to be rounded come in packed layers.
    #[error(
        "layers: expected 16-bit or 32-bit weights to quantise, found {found}; load the folder as it \
         is"
    )]
    AlreadyPacked {
        /// How they are packed.
        found: String,
    },
    /// A weight that is to be rounded is NaN or infinite.
    #[error("tensor `{tensor}`: expected finite weights, found {found} at index {index}")]
    NotFinite {
        /// Tensor concerned.
        tensor: String,
        /// First such element.
        index: usize,
        /// Its value.
        found: f32,
    },
    /// A metadata key that the model needs is absent.
    #[error("metadata key `{key}` is missing; convert the model again with a current llama.cpp")]
    MissingKey {
        /// Key concerned.
        key: String,
    },
    /// A metadata value has another type than its key implies.
    #[error("metadata key `{key}`: expected {expected}, found {found}")]
    WrongKeyType {
        /// Key concerned.
        key: String,
        /// Type that the key implies.
        expected: &'static str,
        /// Type in the file.
        found: &'static str,
    },
    /// A metadata value or configuration field has an impossible or unsupported value.
    #[error("`{key}`: expected {expected}, found {found}")]
    BadValue {
        /// Key or field concerned.
        key: String,
        /// Values that would do.
        expected: String,
        /// Value in the file.
        found: String,
    },
    /// A configuration file is not the JSON that it should be.
    #[error("not valid: {source}")]
    Json {
        /// What the parser said, with line and column.
        source: serde_json::Error,
    },
    /// The safetensors header is wrong.
    #[error("not a valid safetensors file: {source}; download it again")]
    Safetensors {
        /// What the parser said.
        source: safetensors::SafeTensorError,
    },
}

impl LoadError {
    /// The error itself without the [`LoadError::InFile`] wrapping around it.
    #[must_use]
    pub fn root(&self) -> &LoadError {
        let mut error = self;
        while let LoadError::InFile { source, .. } = error {
            error = source;
        }
        error
    }

    /// Names the file in which the error occurred; errors that name one stay as they are.
    pub(crate) fn in_file(self, path: &Path) -> LoadError {
        if matches!(self, LoadError::Io { .. } | LoadError::InFile { .. }) {
            return self;
        }
        LoadError::InFile { path: path.to_owned(), source: Box::new(self) }
    }

    pub(crate) fn bad_value(
        key: &str,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> LoadError {
        LoadError::BadValue {
            key: key.to_owned(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }
}
