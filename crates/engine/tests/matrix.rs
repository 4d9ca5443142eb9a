//! The tables of docs/models.md are what the other tests run: made here from the goldens that those
//! read, and compared with the page. `EXRAIL_WRITE_DOCS=1 cargo test --test matrix` writes them.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic as tests may")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use exrail_checkpoint::{Checkpoint, DecoderConfig, Gguf, HfFolder, NormKind};
use exrail_tensor::DType;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden(path: &str) -> Value {
    let path = root().join("golden").join(path);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What a family is, in the words of its configuration.
fn traits(config: &DecoderConfig) -> String {
    let mut traits = vec![format!("{:?} blocks", config.blocks).to_lowercase()];
    if config.norm.kind == NormKind::Layer {
        traits.push("layer norm".to_owned());
    }
    if let Some(norm) = config.qk_norm {
        traits.push(format!("q and k normed by {norm:?}").to_lowercase());
    }
    let scalings = config.ropes.iter().map(|rope| format!("{:?}", rope.scaling));
    for scaling in scalings.filter(|scaling| scaling != "None") {
        let name: String = scaling.chars().take_while(char::is_ascii_alphanumeric).collect();
        traits.push(format!("rope {name}"));
    }
    let windows = config.layers.iter().filter(|layer| layer.window.is_some()).count();
    if windows > 0 {
        traits.push(format!("window in {windows} of {} layers", config.n_layers()));
    }
    let plain = config.layers.iter().filter(|layer| layer.rope.is_none()).count();
    if plain > 0 {
        traits.push(format!("no rope in {plain} of {} layers", config.n_layers()));
    }
    if let Some(experts) = config.experts {
        traits.push(format!("{} of {} experts", experts.n_used, experts.n_experts));
    }
    if config.attention_soft_cap.is_some() {
        traits.push("soft caps".to_owned());
    }
    if [config.residual_scale, config.logit_scale].iter().any(|scale| (scale - 1.0).abs() > 0.0) {
        traits.push("multipliers".to_owned());
    }
    if config.requires_qkv_bias {
        traits.push("biases".to_owned());
    }
    if config.storage.fused_qkv {
        traits.push("fused matrices".to_owned());
    }
    traits.join(", ")
}

/// A row for each model of golden/families.
fn families() -> String {
    let dir = root().join("golden/families");
    let mut rows = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() {
            continue;
        }
        let Checkpoint::Folder(folder) = Checkpoint::open(&path).unwrap() else {
            panic!("{} is a folder", path.display())
        };
        let has_gguf = path.join("model.gguf").exists();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let architecture = &folder.config().architecture;
        let gguf = if has_gguf { "yes" } else { "not sayable" };
        let traits = traits(folder.config());
        rows.insert(
            name.clone(),
            format!("| {name} | {architecture} | {traits} | yes | {gguf} |\n"),
        );
    }
    let head = "| model | architecture | features | folder | GGUF |\n|---|---|---|---|---|\n";
    head.to_owned() + &rows.into_values().collect::<String>()
}

/// A row for each GGUF format.
fn formats() -> String {
    let cases = golden("tensor/dequantise.json");
    let cases = cases["cases"].as_array().unwrap();
    let mut table =
        "| format | bits a weight | values a block | golden cases |\n|---|---|---|---|\n"
            .to_owned();
    for dtype in DType::ALL {
        let bits = dtype.block_bytes() as f64 * 8.0 / dtype.block_len() as f64;
        let name = dtype.to_string();
        let has_golden = cases.iter().any(|case| case["dtype"].as_str() == Some(&name));
        assert!(has_golden, "{name} has no golden");
        writeln!(table, "| {name} | {bits} | {} |", dtype.block_len()).unwrap();
    }
    table
}

/// A row for each way of packing layers in safetensors.
fn packings() -> String {
    let layers = golden("quantised/layers.json");
    let mut variants: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for layer in layers.as_array().unwrap() {
        let (method, variant) = layer["name"].as_str().unwrap().split_once(' ').unwrap();
        variants.entry(method.to_uppercase()).or_default().push(variant.to_owned());
    }
    let mut table = "| method | golden layers | whole folder |\n|---|---|---|\n".to_owned();
    for (method, variants) in variants {
        let folder = root().join("golden/quantised").join(method.to_lowercase());
        let quantised = HfFolder::open(&folder).unwrap().quant_method().unwrap().to_string();
        writeln!(table, "| {method} | {} | {quantised} |", variants.len()).unwrap();
    }
    table
}

/// A row for each original chat template.
fn templates() -> String {
    let golden = golden("templates/families.json");
    let n_histories = golden["histories"].as_object().unwrap().len();
    let mut table = "| template | out of | histories |\n|---|---|---|\n".to_owned();
    for (name, template) in golden["templates"].as_object().unwrap() {
        let source = template["source"].as_str().unwrap();
        let package = source.split(':').next().unwrap();
        writeln!(table, "| {name} | {package} | {n_histories} |").unwrap();
    }
    table
}

/// A row for each vocabulary that is compared on all lines.
fn vocabularies() -> String {
    let golden = golden("tokenizer/parity/parity.json");
    let mut table = "| vocabulary | as |\n|---|---|\n".to_owned();
    for name in golden["families"].as_object().unwrap().keys() {
        let (name, form) = match name.split_once('.') {
            Some((name, _)) => (name, "tokenizer.json"),
            None => (name.as_str(), "vocabulary table"),
        };
        writeln!(table, "| {name} | {form} |").unwrap();
    }
    table
}

#[test]
fn the_page_of_models_shows_what_is_tested() {
    let path = root().join("docs/models.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let tables = [
        ("families", families()),
        ("formats", formats()),
        ("packings", packings()),
        ("templates", templates()),
        ("vocabularies", vocabularies()),
    ];
    let mut expected = page.clone();
    for (name, table) in tables {
        let (start, end) = (format!("<!-- {name} -->\n"), format!("<!-- end {name} -->"));
        let (before, rest) = expected.split_once(&start).expect("the start of a table");
        let (_, after) = rest.split_once(&end).expect("the end of a table");
        expected = format!("{before}{start}{table}{end}{after}");
    }
    if std::env::var_os("EXRAIL_WRITE_DOCS").is_some() {
        std::fs::write(&path, &expected).unwrap();
    } else {
        assert_eq!(page, expected, "EXRAIL_WRITE_DOCS=1 writes {}", path.display());
    }
}

#[test]
fn models_with_a_gguf_file_say_the_same_there() {
    let gguf = root().join("golden/families/gemma3/model.gguf");
    let config = DecoderConfig::from_gguf(&Gguf::open(&gguf).unwrap()).unwrap();
    assert!(traits(&config).contains("window in 5 of 6 layers"), "{}", traits(&config));
}
