//! [`Plan`]: what happens to which tensor.
//!
//! Quantised are the matrices of the layers. Kept as they are: the embedding and the head, whose
//! errors reach every logit; norms and biases; the router of a mixture of experts, whose errors
//! change who computes; matrices below 1,024 weights. A matrix whose rows are not whole groups is
//! stored in 8 bits with groups of 32; one whose rows are not whole groups of 32 either, or that
//! does not fill whole words, is kept.

use std::collections::HashMap;

use exrail_checkpoint::{DecoderConfig, HfFolder, LoadError};
use exrail_tensor::IntGrid;

use crate::options::QuantizeOptions;
use crate::{GptqTensors, QuantizeError};

/// Smaller matrices are not worth an error.
const MIN_WEIGHTS: usize = 1024;
/// The smallest group that has a kernel.
const SMALLEST_GROUP: usize = 32;

/// All tensors of a checkpoint: those outside the layers, then those of each layer.
pub(crate) struct Plan {
    pub(crate) units: Vec<Vec<Item>>,
}

/// A tensor and what happens to it.
pub(crate) struct Item {
    /// Name in the files.
    pub(crate) stored: String,
    /// Name in the engine; none when the model does not use it.
    pub(crate) name: Option<String>,
    pub(crate) treatment: Treatment,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    Quantise {
        grid: IntGrid,
        group: usize,
        /// Why these are not those asked for.
        fallback: Option<String>,
    },
    Keep {
        reason: String,
    },
}

impl Plan {
    pub(crate) fn new(folder: &HfFolder, options: &QuantizeOptions) -> Result<Plan, QuantizeError> {
        let names: HashMap<&str, &str> = folder.name_pairs().collect();
        let n_layers = folder.config().n_layers();
        let mut units: Vec<Vec<Item>> = (0..=n_layers).map(|_| Vec::new()).collect();
        for stored in folder.stored_names() {
            let name = names.get(stored).copied();
            let shape = folder.stored_tensor(stored)?.shape.to_vec();
            let layer = name.and_then(|name| layer_of(name, folder.config()));
            let treatment = match (name, layer) {
                (Some(name), Some(_)) => treat(name, &shape, options),
                (Some(_), None) => keep("outside the layers"),
                (None, _) => keep("not used by the model"),
            };
            let item = Item { stored: stored.to_owned(), name: name.map(str::to_owned), treatment };
            units[layer.map_or(0, |layer| layer + 1)].push(item);
        }
        let is_quantised = |item: &Item| matches!(item.treatment, Treatment::Quantise { .. });
        if !units.iter().flatten().any(is_quantised) {
            return Err(QuantizeError::NothingToQuantise);
        }
        Ok(Plan { units })
    }
}

/// The layer that the tensor `name` belongs to.
fn layer_of(name: &str, config: &DecoderConfig) -> Option<usize> {
    let (layer, _) = name.strip_prefix("blk.")?.split_once('.')?;
    layer.parse().ok().filter(|&layer| layer < config.n_layers())
}

fn keep(reason: impl Into<String>) -> Treatment {
    Treatment::Keep { reason: reason.into() }
}

fn treat(name: &str, shape: &[usize], options: &QuantizeOptions) -> Treatment {
    let &[rows, columns] = shape else { return keep("not a matrix") };
    if name.ends_with(".ffn_gate_inp.weight") {
        return keep("router");
    }
    if rows.saturating_mul(columns) < MIN_WEIGHTS {
        return keep(format!("below {MIN_WEIGHTS} weights"));
    }
    let fits = |grid: IntGrid, group: usize| {
        columns.is_multiple_of(group) && GptqTensors::fits(grid.bits(), rows, columns)
    };
    let (grid, group) = (options.grid, options.group);
    if fits(grid, group) {
        return Treatment::Quantise { grid, group, fallback: None };
    }
    let bits = grid.bits();
    let problem = format!("{rows} x {columns} does not fit {bits} bits in groups of {group}");
    if fits(IntGrid::Int8, SMALLEST_GROUP) {
        let (grid, group) = (IntGrid::Int8, SMALLEST_GROUP);
        return Treatment::Quantise { grid, group, fallback: Some(problem) };
    }
    keep(problem)
}

/// Refuses a checkpoint with a tensor that is not finite, by name.
pub(crate) fn check_finite(
    tensor: &str,
    values: &[f32],
    first: usize,
) -> Result<(), QuantizeError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(QuantizeError::NotFinite {
            tensor: tensor.to_owned(),
            index: first + index,
            found: values[index],
        }),
    }
}

/// The elements of a view that are checked at once, to bound the memory.
const CHECKED_ELEMENTS: usize = 1 << 20;

/// [`check_finite`] of a tensor in place.
pub(crate) fn check_view(view: &exrail_checkpoint::TensorView<'_>) -> Result<(), QuantizeError> {
    let n_bytes = view.dtype.block_bytes();
    let mut values = vec![0.0; CHECKED_ELEMENTS.min(view.len())];
    for (i, bytes) in view.bytes.chunks(CHECKED_ELEMENTS * n_bytes).enumerate() {
        let values = &mut values[..bytes.len() / n_bytes];
        exrail_tensor::dequantize(view.dtype, bytes, values)
            .map_err(|source| LoadError::BadTensor { tensor: view.name.to_owned(), source })?;
        check_finite(view.name, values, i * CHECKED_ELEMENTS)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn treated(name: &str, shape: &[usize], grid: IntGrid, group: usize) -> Treatment {
        treat(name, shape, &QuantizeOptions::new(grid, group, None).unwrap())
    }

    #[test]
    fn what_does_not_fit_falls_back_and_says_why() {
        let name = "blk.0.ffn_down.weight";
        let asked = Treatment::Quantise { grid: IntGrid::Int4, group: 128, fallback: None };
        assert_eq!(treated(name, &[576, 1536], IntGrid::Int4, 128), asked);
        let Treatment::Quantise { grid, group, fallback } =
            treated(name, &[1536, 576], IntGrid::Int4, 128)
        else {
            panic!("576 columns are whole groups of 32");
        };
        assert_eq!((grid, group), (IntGrid::Int8, 32));
        assert_eq!(fallback.unwrap(), "1536 x 576 does not fit 4 bits in groups of 128");
        let kept = |shape: &[usize]| treated(name, shape, IntGrid::Int4, 32);
        assert_eq!(kept(&[500, 40]), keep("500 x 40 does not fit 4 bits in groups of 32"));
        assert_eq!(kept(&[8, 32]), keep("below 1024 weights"));
        assert_eq!(kept(&[4096]), keep("not a matrix"));
        // 36 rows are not whole words of eight zero points, but of four.
        let Treatment::Quantise { grid, .. } = kept(&[36, 64]) else { panic!("8 bits fit") };
        assert_eq!(grid, IntGrid::Int8);
        let router = treated("blk.3.ffn_gate_inp.weight", &[64, 64], IntGrid::Int4, 32);
        assert_eq!(router, keep("router"));
    }

    #[test]
    fn the_first_weight_that_is_not_finite_is_named() {
        let error = check_finite("w", &[0.0, f32::NAN, f32::INFINITY], 7).unwrap_err();
        let expected = "tensor `w`: expected finite weights, found NaN at index 8";
        assert_eq!(error.to_string(), expected);
    }
}
