//! The encoder on a tiny seeded model and the scalar reference.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use exrail_checkpoint::{BertConfig, LoadError, SafetensorsFile, TensorInfo, TensorView, Tensors};
use exrail_kernels::reference::Reference;
use exrail_model::{Encoder, ModelError};
use exrail_testkit::{Random, tiny_bert};

fn tiny() -> (BertConfig, SafetensorsFile) {
    let dir = tempfile::tempdir().unwrap();
    tiny_bert(7, dir.path()).unwrap();
    let config = BertConfig::from_dir(dir.path()).unwrap();
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    (config, SafetensorsFile::parse(bytes).unwrap())
}

fn random_ids(random: &mut Random, len: usize, limit: usize) -> Vec<u32> {
    (0..len).map(|_| random.below(limit) as u32).collect()
}

#[test]
fn a_text_gets_the_same_vector_alone_and_beside_others() {
    let (config, tensors) = tiny();
    let encoder = Encoder::load(&Reference, &config, &tensors).unwrap();
    let mut random = Random::new(1);
    // Together more than one pass holds, so that the cut between passes is covered.
    let texts: Vec<Vec<u32>> = [1, 2, 33, 256, 7, 500, 400, 300, 3]
        .map(|len| random_ids(&mut random, len, config.vocab_size))
        .to_vec();
    let slices: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let together = encoder.forward(&Reference, &slices).unwrap();
    assert_eq!(together.len(), texts.len());
    for (ids, together) in slices.iter().zip(&together) {
        let alone = encoder.forward(&Reference, &[ids]).unwrap();
        assert_eq!(&alone[0], together, "{} tokens", ids.len());
        let length: f64 = together.iter().map(|&x| f64::from(x).powi(2)).sum();
        assert!((length - 1.0).abs() < 1e-6, "{length}");
    }
    assert!(encoder.forward(&Reference, &[]).unwrap().is_empty());
}

#[test]
fn word_order_changes_the_vector() {
    let (config, tensors) = tiny();
    let encoder = Encoder::load(&Reference, &config, &tensors).unwrap();
    let vectors = encoder.forward(&Reference, &[&[9, 10, 11], &[11, 10, 9]]).unwrap();
    assert_ne!(vectors[0], vectors[1], "positions are part of the input");
}

#[test]
fn texts_that_cannot_be_encoded_are_named() {
    let (config, tensors) = tiny();
    let encoder = Encoder::load(&Reference, &config, &tensors).unwrap();
    let limit = config.max_positions;
    let long = vec![1; limit + 1];
    let error = encoder.forward(&Reference, &[&[1], &[]]).unwrap_err();
    assert!(matches!(error, ModelError::EmptyText { text: 1 }), "{error}");
    let error = encoder.forward(&Reference, &[&long]).unwrap_err();
    assert!(matches!(error, ModelError::TextTooLong { text: 0, found, .. } if found == limit + 1));
    let unknown = config.vocab_size as u32;
    let error = encoder.forward(&Reference, &[&[1], &[2, unknown]]).unwrap_err();
    assert!(matches!(error, ModelError::UnknownToken { text: 1, found, .. } if found == unknown));
}

/// The checkpoint under other names: with a prefix, or without one tensor.
struct Renamed<'a> {
    file: &'a SafetensorsFile,
    prefix: &'a str,
    hidden: &'a str,
}

impl Tensors for Renamed<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let name = name.strip_prefix(self.prefix)?;
        self.file.info(name).filter(|_| name != self.hidden)
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        if self.info(name).is_none() {
            return Err(LoadError::MissingTensor { tensor: name.to_owned(), expected: Vec::new() });
        }
        Tensors::tensor(self.file, name.strip_prefix(self.prefix).unwrap())
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Tensors::names(self.file)
    }
}

#[test]
fn names_may_have_the_prefix_of_a_task_model() {
    let (config, file) = tiny();
    let plain = Encoder::load(&Reference, &config, &file).unwrap();
    let renamed = Renamed { file: &file, prefix: "bert.", hidden: "" };
    let prefixed = Encoder::load(&Reference, &config, &renamed).unwrap();
    let texts: [&[u32]; 1] = [&[5, 6, 7]];
    assert_eq!(
        plain.forward(&Reference, &texts).unwrap(),
        prefixed.forward(&Reference, &texts).unwrap()
    );
}

#[test]
fn a_missing_tensor_is_named() {
    let (config, file) = tiny();
    let hidden = "encoder.layer.1.attention.self.value.bias";
    let damaged = Renamed { file: &file, prefix: "", hidden };
    let Err(error) = Encoder::load(&Reference, &config, &damaged) else {
        panic!("a model without a bias was accepted");
    };
    assert!(matches!(error, ModelError::Checkpoint(LoadError::MissingTensor { .. })));
    assert!(error.to_string().contains(hidden), "{error}");
}

#[test]
fn progress_ends_at_the_total() {
    let (config, file) = tiny();
    let mut reports = Vec::new();
    Encoder::load_with_progress(&Reference, &config, &file, &mut |p| reports.push(p)).unwrap();
    let last = reports.last().unwrap();
    assert_eq!((last.n_done, reports.len()), (last.n_total, last.n_total));
}
