//! Writes a model file of a real shape with random weights, for measuring speed and memory.
//!
//! `cargo run --release -p exrail-testkit --example synthetic -- llama-2-7b OUT.gguf`

use std::{env, path::Path, process::ExitCode};

use exrail_testkit::{SYNTHETIC_LLAMAS, synthetic_llama};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let shape = |name: &String| SYNTHETIC_LLAMAS.iter().find(|shape| shape.name == name);
    let outcome = match &arguments[..] {
        [name, out] if shape(name).is_some() => {
            let shape = shape(name).expect("looked for above");
            synthetic_llama(Path::new(out), shape, 1).map_err(|error| format!("{out}: {error}"))
        }
        _ => {
            let names: Vec<&str> = SYNTHETIC_LLAMAS.iter().map(|shape| shape.name).collect();
            Err(format!("expected a shape ({}) and a file to write", names.join(", ")))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("synthetic: {error}");
            ExitCode::FAILURE
        }
    }
}
