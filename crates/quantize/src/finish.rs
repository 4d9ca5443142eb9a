//! The files beside the weights: index, configuration, tokenizer, manifest.

use std::fs;
use std::path::Path;

use exrail_checkpoint::SafetensorsFile;
use serde_json::{Map, Value, json};

use crate::QuantizeError;
use crate::manifest::{Identity, Manifest, Method, QuantisedTensor, UnitReport};
use crate::plan::Plan;
use crate::run::module;
use crate::work::{WorkFolder, read_json, write_json};

/// Name of the manifest in the folder.
pub const MANIFEST: &str = "exrail-quantize.json";
/// Layout of the manifest.
const MANIFEST_VERSION: u32 = 1;
/// Files that belong to a model besides its weights, by the beginning of their names.
const COPIED: [&str; 12] = [
    "added_tokens.json",
    "chat_template",
    "generation_config.json",
    "license",
    "merges.txt",
    "notice",
    "special_tokens_map.json",
    "tokenizer",
    "tekken.json",
    "use_policy",
    "vocab.json",
    "vocab.txt",
];

/// Writes what is missing and gives the folder its name.
pub(crate) fn finish(
    work: WorkFolder,
    source: &Path,
    plan: &Plan,
    identity: Identity,
) -> Result<Manifest, QuantizeError> {
    let mut all = UnitReport::default();
    let (mut map, mut total_size) = (Map::new(), 0);
    for unit in 0..plan.units.len() {
        // Also of the units of this run: a number is what its text says.
        let report = work.finished(unit)?.unwrap_or_default();
        all.quantised.extend(report.quantised);
        all.kept.extend(report.kept);
        let file = SafetensorsFile::open(&work.shard(unit))?;
        for name in file.stored_names() {
            map.insert(name.to_owned(), work.shard_name(unit).into());
            total_size += file.raw(name).map_or_else(
                || file.tensor(name).map_or(0, |view| view.bytes.len()),
                |raw| raw.bytes.len(),
            );
        }
    }
    let quantizer = format!("exrail {}", env!("CARGO_PKG_VERSION"));
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        quantizer,
        identity,
        quantised: all.quantised,
        kept: all.kept,
    };
    let index = json!({ "metadata": { "total_size": total_size }, "weight_map": map });
    write_json(&work.path("model.safetensors.index.json"), &index)?;
    let mut config: Value = read_json(&source.join("config.json"))?;
    if let Value::Object(config) = &mut config {
        config.insert("quantization_config".to_owned(), quantization_config(&manifest));
    }
    write_json(&work.path("config.json"), &config)?;
    copy_others(source, &work)?;
    write_json(&work.path(MANIFEST), &manifest)?;
    work.finish()?;
    Ok(manifest)
}

/// What transformers, vLLM and GPTQModel read.
fn quantization_config(manifest: &Manifest) -> Value {
    let Identity { bits, group, calibration, .. } = &manifest.identity;
    let mut dynamic = Map::new();
    for tensor in &manifest.quantised {
        let QuantisedTensor { name, bits: own_bits, group: own_group, .. } = tensor;
        if (own_bits, own_group) != (bits, group) {
            let settings = json!({ "bits": own_bits, "group_size": own_group });
            dynamic.insert(format!("+:^{}$", escaped(module(name))), settings);
        }
    }
    for tensor in &manifest.kept {
        // Matrices that such a loader would otherwise look for in packed form.
        let is_matrix = tensor.name.contains(".layers.") && tensor.name.ends_with("_proj.weight");
        if is_matrix || tensor.name.ends_with(".gate.weight") {
            dynamic.insert(format!("-:^{}$", escaped(module(&tensor.name))), json!({}));
        }
    }
    let calibrated = manifest.quantised.iter().any(|tensor| tensor.method == Method::Calibrated);
    json!({
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": true,
        "desc_act": false,
        "lm_head": false,
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {
            "quantizer": [manifest.quantizer],
            "method": if calibrated { "calibrated" } else { "nearest" },
            "static_groups": calibration.is_some(),
        },
    })
}

/// `text` as a regular expression that matches it alone.
fn escaped(text: &str) -> String {
    text.replace('.', "\\.")
}

fn copy_others(source: &Path, work: &WorkFolder) -> Result<(), QuantizeError> {
    let entries = fs::read_dir(source).map_err(QuantizeError::io(source))?;
    for entry in entries {
        let entry = entry.map_err(QuantizeError::io(source))?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let lower = name.to_lowercase();
        let is_ours = COPIED.iter().any(|start| lower.starts_with(start));
        if is_ours && path.is_file() {
            fs::copy(&path, work.path(&name)).map_err(QuantizeError::io(work.path(&name)))?;
        }
    }
    Ok(())
}
