//! Untrusted model files turned into checked views: GGUF, Hugging Face folders, safetensors, and
//! the configurations of decoders and encoders.
//!
//! Everything that comes out of a constructor here agrees with itself: tensors lie inside their
//! file and have the shapes that the configuration says. Nothing here knows kernels or tokenizing.
//! No input makes this crate panic, or allocate more than a small multiple of the file's size.

mod awq;
mod bert;
mod bytes;
mod checkpoint;
mod decoder;
mod digest;
mod error;
mod exl2;
mod exl3;
mod gguf;
mod gptq;
mod hf;
mod metadata;
mod quantised;
mod reader;
mod rounded;
mod safetensors_file;
mod tensors;
mod vocabulary;

pub use bert::{BertConfig, BertFiles, Pooling};
pub use checkpoint::{Checkpoint, CheckpointFiles};
pub use decoder::{
    BlockNorms, DecoderConfig, Experts, GateKind, LayerConfig, LayerTensor, NormConfig, NormKind,
    QkNorm, RopeConfig, RopePairs, RopeScaling, Storage, tensor_name,
};
pub use digest::{sha256_file, sha256_hex};
pub use error::LoadError;
pub use gguf::{Gguf, GgufPart, SplitName};
pub use hf::{GenerationSettings, HfFolder, NamedTemplate, TextSettings};
pub use metadata::{Array, Metadata, Value};
pub use quantised::{
    AwqConfig, AwqPacking, Blocks, Dense, GptqConfig, GptqZeros, Lookup, QuantMethod, RawTensor,
    RawType, dequantise_layer, layer_shape, native_blocks, native_type,
};
pub use rounded::Rounded;
pub use safetensors_file::SafetensorsFile;
pub use tensors::{TensorInfo, TensorView, Tensors};
pub use vocabulary::VocabularyTable;
