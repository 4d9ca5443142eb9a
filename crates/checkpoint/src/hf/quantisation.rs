//! Which method packed the layers of a folder: `quantization_config` of `config.json`, or
//! `quantize_config.json` beside it.

use serde_json::Value;

use super::fields::{Fields, short};
use super::files::Files;
use crate::{LoadError, QuantMethod};

const BESIDE: &str = "quantize_config.json";
const FIELD: &str = "quantization_config";

/// The method, or `None` for 16-bit and 32-bit weights.
pub(super) fn quant_method(
    files: &Files,
    config: &Value,
) -> Result<Option<QuantMethod>, LoadError> {
    let config_path = files.path("config.json");
    let stated = match config.get(FIELD).filter(|value| !value.is_null()) {
        None => None,
        Some(value) => Some(read(value).map_err(|error| error.in_file(&config_path))?),
    };
    let Some(mut beside) = files.json(BESIDE)? else { return Ok(stated) };
    if let Value::Object(map) = &mut beside {
        // The file is AutoGPTQ's, which at first did not name itself.
        map.entry("quant_method").or_insert_with(|| Value::from("gptq"));
    }
    let found = read(&beside).map_err(|error| error.in_file(&files.path(BESIDE)))?;
    match stated {
        Some(stated) if stated != found => {
            let expected = format!("{stated:?} as in config.json");
            let error = LoadError::bad_value(FIELD, expected, format!("{found:?}"));
            Err(error.in_file(&files.path(BESIDE)))
        }
        Some(_) | None => Ok(Some(found)),
    }
}

fn read(value: &Value) -> Result<QuantMethod, LoadError> {
    let fields = Fields::new(value, "quantization_config.")?;
    let method = QuantMethod::from_json(value)?;
    // Settings of single modules. GPTQ layers whose width or group differs say so by their tensors:
    // by `g_idx`, or else their shapes do not fit the configuration.
    let dynamic = fields.get("dynamic").filter(|&found| !is_empty(found));
    if let (Some(found), QuantMethod::Awq(_) | QuantMethod::Exl2 | QuantMethod::Exl3) =
        (dynamic, method)
    {
        return Err(fields.bad("dynamic", "nothing (settings per module)", short(found)));
    }
    for (key, only) in [("zero_point", true), ("is_marlin_format", false)] {
        if fields.bool(key)?.is_some_and(|found| found != only) {
            return Err(fields.bad(key, only.to_string(), !only));
        }
    }
    match fields.str("pack_dtype")?.filter(|&found| found != "int32") {
        Some(found) => Err(fields.bad("pack_dtype", "int32", found)),
        None => Ok(method),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Bool(found) => !found,
        Value::Null => true,
        Value::Number(_) | Value::String(_) => false,
    }
}
