//! all-MiniLM-L6-v2 on the CPU against numpy: see golden/encoder/README.md.

mod golden;

use std::path::PathBuf;

use exrail_checkpoint::{BertConfig, SafetensorsFile};
use exrail_kernels::{Activation, Backend};
use exrail_kernels_cpu::{CpuBackend, CpuOptions};
use exrail_model::Encoder;
use golden::Reader;

/// Largest distance of a cosine between two sentences. The weights are f32, so both modes of the
/// device compute with f32 activations.
const MAX_DISTANCE: f64 = 1e-3;

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[test]
fn vectors_and_cosines_agree_with_numpy() {
    let mut file = Reader::open("encoder/all-minilm-l6-v2.bin", b"EXRENCOD");
    let (n_texts, width) = (file.u32() as usize, file.u32() as usize);
    let texts: Vec<Vec<u32>> = (0..n_texts)
        .map(|_| {
            let len = file.u32() as usize;
            file.u32s(len)
        })
        .collect();
    let expected: Vec<Vec<f32>> = (0..n_texts).map(|_| file.f32s(width)).collect();
    file.end();
    assert_eq!(n_texts, 50);

    let folder =
        PathBuf::from(std::env::var("EXRAIL_TEST_ENCODER").expect("run through make test"));
    let config = BertConfig::from_dir(&folder).unwrap();
    let tensors = SafetensorsFile::open(&folder.join("model.safetensors")).unwrap();
    for activation in [Activation::F32, Activation::Int8] {
        let options = CpuOptions { activation, ..CpuOptions::default() };
        let backend = CpuBackend::new(options).unwrap();
        let encoder = Encoder::load(&backend, &config, &tensors).unwrap();
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let found = encoder.forward(&backend, &texts).unwrap();

        let mut furthest = (0.0f64, 0.0f64);
        for (i, (a, expected_a)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(a.len(), width);
            for (a, expected) in a.iter().zip(expected_a) {
                let distance = (f64::from(*a) - f64::from(*expected)).abs();
                furthest.0 = furthest.0.max(distance);
            }
            for (b, expected_b) in found.iter().zip(&expected).skip(i) {
                let distance = (cosine(a, b) - cosine(expected_a, expected_b)).abs();
                assert!(!distance.is_nan());
                furthest.1 = furthest.1.max(distance);
            }
        }
        let (component, pair) = furthest;
        eprintln!(
            "{}: furthest component {component:.2e}, furthest cosine {pair:.2e}",
            backend.name()
        );
        assert!(component <= MAX_DISTANCE && pair <= MAX_DISTANCE, "{component} {pair}");
    }
}
