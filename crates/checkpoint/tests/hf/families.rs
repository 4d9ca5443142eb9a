//! The tiny folders of golden/families: configuration, tensors, and their equality with the GGUF
//! files of the same weights.

use std::path::PathBuf;

use exrail_checkpoint::{
    DecoderConfig, Gguf, HfFolder, RopeConfig, RopePairs, RopeScaling, Storage, Tensors,
    tensor_name,
};
use exrail_tensor::DType;

use crate::folder::golden;

const FAMILIES: [&str; 21] = [
    "cohere2",
    "gemma2",
    "gemma2-scalar",
    "gemma3",
    "granite",
    "llama",
    "llama-dynamic",
    "llama-linear",
    "llama-llama3",
    "llama-yarn",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "phi3-window",
    "qwen2",
    "qwen2-tied",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe-mixed",
    "smollm3",
];
/// Those whose format cannot say what the folder says (golden/families/README.md).
const WITHOUT_GGUF: [&str; 6] =
    ["gemma2-scalar", "llama-dynamic", "mistral", "phi3-window", "qwen2-tied", "qwen3_moe-mixed"];

fn folder(name: &str) -> PathBuf {
    golden(&format!("families/{name}"))
}

fn gguf(name: &str) -> Gguf {
    Gguf::open(&folder(name).join("model.gguf")).unwrap()
}

fn config_of(name: &str, file: &str) -> DecoderConfig {
    let json = std::fs::read(folder(name).join(file)).unwrap();
    DecoderConfig::from_config_json(&json).unwrap_or_else(|error| panic!("{name}/{file}: {error}"))
}

#[test]
fn every_folder_loads_with_the_configuration_of_its_config_json() {
    for name in FAMILIES {
        let folder = HfFolder::open(&folder(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(folder.config(), &config_of(name, "config.json"), "{name}");
        assert!(folder.ignored().is_empty(), "{name}: {:?}", folder.ignored());
        for (tensor, shape) in folder.config().outer_tensors() {
            assert_eq!(folder.require(tensor, &shape).unwrap().shape, shape, "{name}");
        }
        for tensor in folder.names() {
            let view = folder.tensor(tensor).unwrap();
            let values = view.to_f32().unwrap();
            assert_eq!(values.len(), view.len(), "{name}: {tensor}");
            assert!(values.iter().all(|x| x.is_finite()), "{name}: {tensor}");
        }
    }
}

#[test]
fn both_spellings_of_transformers_are_one_configuration() {
    for name in FAMILIES {
        assert_eq!(config_of(name, "config.json"), config_of(name, "config-v5.json"), "{name}");
    }
}

/// What the two formats say differently by their nature: GGUF permutes the rows of queries and keys
/// where it has adjacent pairs, stacks experts, and stores Llama 3's scaling as divisors.
fn as_gguf_says_it(mut config: DecoderConfig, gguf: &DecoderConfig) -> DecoderConfig {
    config.storage = Storage { stacked_experts: gguf.storage.stacked_experts, ..config.storage };
    for (ours, theirs) in config.ropes.iter_mut().zip(&gguf.ropes) {
        if theirs.pairs == RopePairs::Adjacent {
            ours.pairs = RopePairs::Adjacent;
        }
        if let (RopeScaling::Llama3 { .. }, RopeScaling::Factors(factors)) =
            (&ours.scaling, &theirs.scaling)
        {
            for (ours, theirs) in llama3_divisors(ours).iter().zip(factors) {
                assert!((ours - theirs).abs() <= 1e-6 * theirs, "{ours} {theirs}");
            }
            ours.scaling = theirs.scaling.clone();
        }
    }
    config
}

/// The divisors that llama.cpp's converter writes for Llama 3's scaling.
fn llama3_divisors(rope: &RopeConfig) -> Vec<f32> {
    let RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_len } =
        rope.scaling
    else {
        panic!("{rope:?}")
    };
    let divisor = |i: usize| {
        let wave = std::f32::consts::TAU * rope.theta.powf(2.0 * i as f32 / rope.dim as f32);
        let len = original_len as f32;
        if wave < len / high_frequency_factor {
            1.0
        } else if wave > len / low_frequency_factor {
            factor
        } else {
            let smooth = (len / wave - low_frequency_factor)
                / (high_frequency_factor - low_frequency_factor);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..rope.dim / 2).map(divisor).collect()
}

#[test]
fn folders_and_gguf_files_agree_in_everything_that_both_can_say() {
    for name in FAMILIES.into_iter().filter(|name| !WITHOUT_GGUF.contains(name)) {
        let gguf = DecoderConfig::from_gguf(&gguf(name)).unwrap();
        let folder = as_gguf_says_it(config_of(name, "config.json"), &gguf);
        assert_eq!(folder, gguf, "{name}");
    }
}

/// Rows of a GGUF matrix with adjacent pairs in the order of the folder: within a head, row
/// 2i + j was row i + j · D/2.
fn in_halves(values: &[f32], head_dim: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for (row, from) in values.chunks(columns).enumerate() {
        let (head, inner) = (row / head_dim, row % head_dim);
        let to = head * head_dim + inner / 2 + (inner % 2) * (head_dim / 2);
        out[to * columns..(to + 1) * columns].copy_from_slice(from);
    }
    out
}

/// The values of the tensor that the folder calls `name`, out of the GGUF file.
fn from_gguf(gguf: &Gguf, config: &DecoderConfig, name: &str, is_permuted: bool) -> Vec<f32> {
    if let Some(view) = Gguf::tensor(gguf, name) {
        let values = view.to_f32().unwrap();
        let is_rotated = name.contains(".attn_q.") || name.contains(".attn_k.");
        if is_permuted && is_rotated {
            let columns = if view.shape.len() == 2 { view.shape[1] } else { 1 };
            return in_halves(&values, config.head_dim, columns);
        }
        return values;
    }
    // blk.3.ffn_gate.7.weight is part 7 of blk.3.ffn_gate_exps.weight.
    let mut parts: Vec<&str> = name.split('.').collect();
    let expert: usize = parts.remove(3).parse().unwrap();
    let stacked = format!("{}.{}.{}_exps.{}", parts[0], parts[1], parts[2], parts[3]);
    let view = Gguf::tensor(gguf, &stacked).unwrap();
    let len = view.len() / view.shape[0];
    view.to_f32().unwrap()[expert * len..(expert + 1) * len].to_vec()
}

#[test]
fn folders_and_gguf_files_hold_the_same_numbers() {
    for name in FAMILIES.into_iter().filter(|name| !WITHOUT_GGUF.contains(name)) {
        let (folder, gguf) = (HfFolder::open(&folder(name)).unwrap(), gguf(name));
        let theirs = DecoderConfig::from_gguf(&gguf).unwrap();
        let is_permuted = theirs.ropes[0].pairs != folder.config().ropes[0].pairs;
        let mut n_values = 0;
        for tensor in folder.names() {
            let ours = folder.tensor(tensor).unwrap().to_f32().unwrap();
            let theirs = from_gguf(&gguf, folder.config(), tensor, is_permuted);
            assert_eq!(ours, theirs, "{name}: {tensor}");
            n_values += ours.len();
        }
        let besides =
            ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];
        let all = gguf.tensors().filter(|view| !besides.contains(&view.name));
        assert_eq!(n_values, all.map(|view| view.len()).sum::<usize>(), "{name}");
    }
}

#[test]
fn stored_types_are_kept_and_only_shifted_norms_are_copies() {
    for (name, dtype) in [("llama", DType::F16), ("gemma2", DType::BF16), ("qwen3", DType::BF16)] {
        let folder = HfFolder::open(&folder(name)).unwrap();
        let embedding = folder.tensor("token_embd.weight").unwrap();
        assert_eq!(embedding.dtype, dtype, "{name}");
        let norm = folder.tensor(&tensor_name(0, "attn_norm.weight")).unwrap();
        let is_shifted = name == "gemma2";
        assert_eq!(norm.dtype, if is_shifted { DType::F32 } else { dtype }, "{name}");
        for tensor in folder.names() {
            let is_copy =
                matches!(folder.tensor(tensor).unwrap().bytes, std::borrow::Cow::Owned(_));
            assert_eq!(is_copy, is_shifted && tensor.contains("norm"), "{name}: {tensor}");
        }
    }
}

#[test]
fn the_configured_length_picks_the_frequencies() {
    let config = config_of("llama-dynamic", "config.json");
    assert_eq!((config.context_len, config.max_context_len), (32, 128));
    let rope = &config.ropes[0];
    assert_eq!(rope.theta_for(32).to_bits(), 10_000_f64.to_bits());
    // (4 · 48 / 32 − 3)^(16 / 14) · 10,000
    assert!((rope.theta_for(48) - 10_000.0 * 3_f64.powf(8.0 / 7.0)).abs() < 1e-6);
    assert_eq!(config.clone().with_context_len(48).unwrap().context_len, 48);
    let error = config.with_context_len(129).unwrap_err().to_string();
    assert_eq!(error, "`context length`: expected 1 to 128, found 129");

    let config = config_of("phi3", "config.json");
    assert_eq!((config.context_len, config.max_context_len), (32, 256));
    let RopeScaling::Long { original_len, magnitude, .. } = &config.ropes[0].scaling else {
        panic!("{:?}", config.ropes)
    };
    assert_eq!(*original_len, 32);
    assert!((magnitude - 1.6_f32.sqrt()).abs() < 1e-6);

    let config = config_of("llama-yarn", "config.json");
    assert_eq!((config.context_len, config.max_context_len), (256, 256));
}

#[test]
fn layers_differ_as_the_folder_says() {
    let windows = |name: &str| -> Vec<Option<usize>> {
        config_of(name, "config.json").layers.iter().map(|layer| layer.window).collect()
    };
    assert_eq!(windows("mistral"), [Some(16); 2]);
    assert_eq!(windows("qwen2"), [None; 2]);
    assert_eq!(windows("qwen2-tied"), [None, Some(16)]);
    assert_eq!(windows("gemma2"), [Some(16), None]);
    assert_eq!(windows("gemma3")[4..], [Some(16), None]);
    assert_eq!(windows("cohere2")[2..], [Some(16), None]);
    assert_eq!(windows("phi3-window"), [Some(16); 2]);
    let config = config_of("qwen3_moe-mixed", "config.json");
    let has_experts: Vec<bool> = config.layers.iter().map(|layer| layer.has_experts).collect();
    assert_eq!(has_experts, [false, false, false, true]);
    assert!(!config.experts.unwrap().normalise);
    assert!(config_of("qwen3_moe", "config.json").experts.unwrap().normalise);
    let scale = config_of("gemma2-scalar", "config.json").attention_scale;
    assert!((scale - 0.25).abs() < f32::EPSILON);
    let config = config_of("gemma3", "config.json");
    assert_eq!(config.layers.iter().map(|l| l.rope).collect::<Vec<_>>()[4..], [Some(1), Some(0)]);
    assert_eq!(config.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
}

#[test]
fn what_the_folder_says_about_text_is_read() {
    let folder = HfFolder::open(&folder("llama")).unwrap();
    let generation = folder.generation();
    assert_eq!(
        (generation.bos, &generation.eos[..], generation.padding),
        (Some(1), &[0, 2][..], Some(0))
    );
    assert_eq!((generation.samples, generation.temperature), (Some(true), Some(0.7)));
    assert_eq!((generation.top_k, generation.top_p), (None, None));
    let text = folder.text();
    assert_eq!(
        (text.bos.as_deref(), text.eos.as_deref()),
        (Some("<|im_start|>"), Some("<|endoftext|>"))
    );
    assert_eq!(text.adds_bos, Some(false));
    let template = text.chat_template().unwrap();
    assert_eq!(
        template,
        std::fs::read_to_string(self::folder("llama").join("chat_template.jinja")).unwrap()
    );
    assert!(folder.tokenizer_json().unwrap().unwrap().starts_with(b"{"));
    assert_eq!(folder.tokenizer_model().unwrap(), None);
}
