//! What it costs each matrix of a model to be stored otherwise.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use exrail_checkpoint::{Checkpoint, DecoderConfig, LoadError, RopePairs, Tensors};
use exrail_tensor::{DType, IntGrid, dequantize, quantize};
use serde::Serialize;

use crate::error::EngineError;
use crate::load::round;

/// Matrices of one kind and format from which on one can stand out among them.
const LEAST_PEERS: usize = 4;
/// How far below its peers a matrix stands out, in decibels: its error is twice theirs. Layers of one checkpoint that
/// were rounded alike lie within 3 dB of each other.
const STANDS_OUT_DB: f64 = 6.0;

/// What a matrix loses.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WeightLoss {
    /// Its name in a GGUF file, such as `blk.0.attn_q.weight`.
    pub tensor: String,
    /// The format that it is compared in, such as `Q4_0`.
    pub format: String,
    /// Signal to quantisation noise, `10 log10(Σ w² / Σ (w − ŵ)²)`, in decibels; none where nothing changed.
    pub sqnr_db: Option<f64>,
    /// The same of the reference rounded to `format` anew, which is what blocks of this format cost; none of a format
    /// without blocks, and where that changes nothing.
    pub format_db: Option<f64>,
}

/// A matrix that lost more than its peers, the same matrix of other layers in the same format, or more than its format
/// costs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StandsOut {
    /// Its name.
    pub tensor: String,
    /// Its signal to noise in decibels.
    pub sqnr_db: f64,
    /// What it should be about: of its peers the median, or of its format; none where nothing should have changed.
    pub expected_db: Option<f64>,
    /// What that is.
    pub against: Yardstick,
}

impl StandsOut {
    /// The matrix with both numbers.
    #[must_use]
    pub fn in_words(&self) -> String {
        let Self { tensor, sqnr_db, expected_db, against } = self;
        let against = match against {
            Yardstick::Peers => "the same matrix of other layers",
            Yardstick::Format => "its format itself",
        };
        let expected = expected_db.map_or("unchanged".to_owned(), |db| format!("{db:.1} dB"));
        format!("{tensor} {sqnr_db:.1} dB, {against} {expected}")
    }
}

/// What a matrix is measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Yardstick {
    /// The same matrix of other layers.
    Peers,
    /// The reference rounded to the same format anew. It tells, too, where all layers are wrong alike.
    Format,
}

/// What [`crate::LoadOptions::quant`] costs each matrix of the model at `path`, blocks included, in the order of the
/// checkpoint. Reads the weights one matrix at a time.
///
/// # Errors
/// The model is refused as by [`crate::load_generator`], or a weight is not finite.
pub fn rounding_losses(path: &Path, grid: IntGrid) -> Result<Vec<WeightLoss>, EngineError> {
    let checkpoint = Checkpoint::open(path)?;
    let (tensors, rounded) = (checkpoint.tensors(), round(&checkpoint, grid, true)?);
    let mut losses = Vec::new();
    for name in tensors.names() {
        let dtypes = [tensors.info(name), rounded.info(name)].map(|info| info.map(|i| i.dtype));
        if dtypes[0] != dtypes[1] {
            let values = tensors.tensor(name)?.to_f32()?;
            losses.push(loss(name, &values, &rounded, None)?);
        }
    }
    Ok(losses)
}

/// What the matrices of the model at `other` lack of those at `reference`, in the order of the reference: of every
/// matrix that both have. Reads the weights one matrix at a time.
///
/// # Errors
/// A model is refused as by [`crate::load_generator`], a matrix has another shape, or they have none in common.
pub fn checkpoint_losses(reference: &Path, other: &Path) -> Result<Vec<WeightLoss>, EngineError> {
    let [from, to] = [Checkpoint::open(reference)?, Checkpoint::open(other)?];
    let [from_config, to_config] = [from.config()?, to.config()?];
    let differ = |found: String| EngineError::OtherTensors {
        reference: reference.display().to_string(),
        other: other.display().to_string(),
        found,
    };
    let (tensors, others) = (from.tensors(), to.tensors());
    let mut losses = Vec::new();
    for name in tensors.names() {
        let (Some(info), Some(found)) = (tensors.info(name), others.info(name)) else { continue };
        if info.shape.len() < 2 {
            continue;
        }
        if info.shape != found.shape {
            return Err(differ(format!("{name} {:?} instead of {:?}", found.shape, info.shape)));
        }
        let order = RowOrder::between(name, &to_config, &from_config);
        let values = tensors.tensor(name)?.to_f32()?;
        losses.push(loss(name, &values, others, order)?);
    }
    if losses.is_empty() {
        Err(differ("no matrix of the same name".to_owned()))
    } else {
        Ok(losses)
    }
}

/// The matrices of which more is lost than of their peers, or than their format costs; the worst first.
#[must_use]
pub fn standing_out(losses: &[WeightLoss]) -> Vec<StandsOut> {
    let mut kinds: BTreeMap<(&str, &str), Vec<&WeightLoss>> = BTreeMap::new();
    for loss in losses {
        kinds.entry((part_of(&loss.tensor), &loss.format)).or_default().push(loss);
    }
    let mut found = Vec::new();
    for peers in kinds.values() {
        let among_peers = (peers.len() >= LEAST_PEERS).then(|| median_db(peers));
        found.extend(peers.iter().filter_map(|loss| stands_out(loss, among_peers)));
    }
    found.sort_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
    found
}

/// Decibels, where what lost nothing is infinitely near.
fn or_all(db: Option<f64>) -> f64 {
    db.unwrap_or(f64::INFINITY)
}

fn median_db(peers: &[&WeightLoss]) -> f64 {
    let mut all: Vec<f64> = peers.iter().map(|loss| or_all(loss.sqnr_db)).collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn stands_out(loss: &WeightLoss, among_peers: Option<f64>) -> Option<StandsOut> {
    let sqnr_db = loss.sqnr_db?;
    let yardsticks = [(among_peers, Yardstick::Peers), (loss.format_db, Yardstick::Format)];
    let is_below = |expected: f64| sqnr_db < expected - STANDS_OUT_DB;
    let (expected, against) = yardsticks
        .into_iter()
        .find_map(|(expected, against)| Some((expected.filter(|&db| is_below(db))?, against)))?;
    let expected_db = expected.is_finite().then_some(expected);
    Some(StandsOut { tensor: loss.tensor.clone(), sqnr_db, expected_db, against })
}

/// The name without the number of its layer.
fn part_of(tensor: &str) -> &str {
    tensor
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
        .map_or(tensor, |(_, part)| part)
}

fn loss(
    name: &str,
    values: &[f32],
    others: &dyn Tensors,
    order: Option<RowOrder>,
) -> Result<WeightLoss, LoadError> {
    let other = others.tensor(name)?;
    let columns = other.shape.last().copied().unwrap_or(1).max(1);
    let found = other.to_f32()?;
    let found =
        order.map_or(Cow::Borrowed(&found), |order| Cow::Owned(order.apply(&found, columns)));
    Ok(WeightLoss {
        tensor: name.to_owned(),
        format: other.dtype.to_string(),
        sqnr_db: sqnr_db(values, &found),
        format_db: other.dtype.is_quantised().then(|| format_db(values, other.dtype)).flatten(),
    })
}

fn sqnr_db(values: &[f32], found: &[f32]) -> Option<f64> {
    let (mut signal, mut noise) = (0.0, 0.0);
    for (&value, &found) in values.iter().zip(found) {
        signal += f64::from(value).powi(2);
        noise += (f64::from(value) - f64::from(found)).powi(2);
    }
    (noise > 0.0).then(|| 10.0 * (signal / noise).log10())
}

/// What it costs to store these values in a format at all. A row that is no whole number of blocks has no such cost.
fn format_db(values: &[f32], dtype: DType) -> Option<f64> {
    let mut found = vec![0.0; values.len()];
    let rounded = quantize(dtype, values).and_then(|bytes| dequantize(dtype, &bytes, &mut found));
    rounded.ok().and_then(|()| sqnr_db(values, &found))
}

/// Files of one family may keep the two halves of a rotated head apart or pair by pair: the same rows in another order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RowOrder {
    to: RopePairs,
    head_dim: usize,
}

impl RowOrder {
    /// How the rows of a matrix of `from` become those of `to`; none where they have one order.
    fn between(name: &str, from: &DecoderConfig, to: &DecoderConfig) -> Option<RowOrder> {
        let pairs = |config: &DecoderConfig| config.ropes.first().map(|rope| rope.pairs);
        let is_rotated = ["attn_q.weight", "attn_k.weight"].contains(&part_of(name));
        let to_pairs = pairs(to).filter(|_| is_rotated && pairs(from) != pairs(to))?;
        Some(RowOrder { to: to_pairs, head_dim: to.head_dim })
    }

    fn apply(self, values: &[f32], columns: usize) -> Vec<f32> {
        let (head_dim, half) = (self.head_dim, self.head_dim / 2);
        let source = |row: usize| {
            let (head, at) = (row / head_dim * head_dim, row % head_dim);
            head + match self.to {
                RopePairs::Adjacent => at / 2 + at % 2 * half,
                RopePairs::Halves => at % half * 2 + at / half,
            }
        };
        let rows = values.len() / columns;
        (0..rows).flat_map(|row| &values[source(row) * columns..][..columns]).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use exrail_tensor::DType;
    use exrail_testkit::{TinyLlama, tiny_llama};

    use super::*;

    const SPEC: TinyLlama = TinyLlama {
        n_layers: 5,
        width: 64,
        n_heads: 4,
        n_kv_heads: 2,
        ffn_width: 128,
        context_len: 512,
        dtype: DType::F32,
        tied: true,
    };

    fn losses_of(reference: &[u8], other: &[u8]) -> Result<Vec<WeightLoss>, EngineError> {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["reference.gguf", "other.gguf"].map(|name| dir.path().join(name));
        std::fs::write(&paths[0], reference).unwrap();
        std::fs::write(&paths[1], other).unwrap();
        checkpoint_losses(&paths[0], &paths[1])
    }

    /// A file whose scales of one matrix, f16 in front of 32 codes, are twice what they were.
    fn with_wrong_scales(mut file: Vec<u8>, matrix: &[u8]) -> Vec<u8> {
        let at = file.windows(matrix.len()).position(|bytes| bytes == matrix).unwrap();
        for block in file[at..at + matrix.len()].chunks_exact_mut(34) {
            let scale = half::f16::from_le_bytes([block[0], block[1]]);
            block[..2].copy_from_slice(&(scale * half::f16::from_f32(2.0)).to_le_bytes());
        }
        file
    }

    #[test]
    fn the_layer_with_wrong_scales_is_named_and_in_a_right_file_nothing_is() {
        let exact = tiny_llama(7, SPEC);
        let rounded = tiny_llama(7, TinyLlama { dtype: DType::Q8_0, ..SPEC });
        let losses = losses_of(&exact, &rounded).unwrap();
        assert!(losses.iter().all(|loss| loss.sqnr_db.unwrap() > 35.0), "{losses:?}");
        assert_eq!(standing_out(&losses), []);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rounded.gguf");
        std::fs::write(&path, &rounded).unwrap();
        let name = "blk.3.ffn_down.weight";
        let checkpoint = Checkpoint::open(&path).unwrap();
        let matrix = checkpoint.tensors().tensor(name).unwrap().bytes.to_vec();
        let losses = losses_of(&exact, &with_wrong_scales(rounded, &matrix)).unwrap();
        let found = standing_out(&losses);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].tensor, name);
        // Twice the weights: the error is as large as they are.
        assert!(found[0].sqnr_db.abs() < 0.5, "{found:?}");
        assert!(found[0].expected_db.unwrap() > 35.0, "{found:?}");
        assert_eq!(found[0].against, Yardstick::Peers);
    }

    /// A file each of whose groups of 64 values has the scale of its first 32: groups of 32 read as twice as many.
    fn with_merged_groups(mut file: Vec<u8>, matrices: &[Vec<u8>]) -> Vec<u8> {
        for matrix in matrices {
            let at = file.windows(matrix.len()).position(|bytes| bytes == matrix).unwrap();
            for blocks in file[at..at + matrix.len()].chunks_exact_mut(36) {
                blocks.copy_within(0..2, 18);
            }
        }
        file
    }

    #[test]
    fn groups_that_are_read_as_larger_ones_stand_out_in_every_layer_although_all_are_wrong_alike() {
        let exact = tiny_llama(7, SPEC);
        let rounded = tiny_llama(7, TinyLlama { dtype: DType::Q4_0, ..SPEC });
        let losses = losses_of(&exact, &rounded).unwrap();
        assert_eq!(standing_out(&losses), []);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rounded.gguf");
        std::fs::write(&path, &rounded).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let bytes = |name: &str| checkpoint.tensors().tensor(name).unwrap().bytes.to_vec();
        let matrices: Vec<Vec<u8>> = losses.iter().map(|loss| bytes(&loss.tensor)).collect();
        let losses = losses_of(&exact, &with_merged_groups(rounded, &matrices)).unwrap();
        let found = standing_out(&losses);
        assert_eq!(found.len(), losses.len(), "{losses:?}");
        assert!(found.iter().all(|it| it.against == Yardstick::Format), "{found:?}");
        // Mutation: peers alone do not tell, because all of them are wrong.
        let blind: Vec<WeightLoss> =
            losses.into_iter().map(|loss| WeightLoss { format_db: None, ..loss }).collect();
        assert_eq!(standing_out(&blind), []);
    }

    #[test]
    fn a_file_against_itself_loses_nothing_and_one_changed_layer_stands_out() {
        let exact = tiny_llama(7, SPEC);
        let mut losses = losses_of(&exact, &exact).unwrap();
        assert!(losses.iter().all(|loss| loss.sqnr_db.is_none()), "{losses:?}");
        losses.iter_mut().find(|it| it.tensor == "blk.2.attn_v.weight").unwrap().sqnr_db =
            Some(60.0);
        let expected = StandsOut {
            tensor: "blk.2.attn_v.weight".to_owned(),
            sqnr_db: 60.0,
            expected_db: None,
            against: Yardstick::Peers,
        };
        assert_eq!(standing_out(&losses), [expected]);
    }

    #[test]
    fn other_shapes_are_refused_by_name() {
        let other = tiny_llama(7, TinyLlama { ffn_width: 64, ..SPEC });
        let error = losses_of(&tiny_llama(7, SPEC), &other).unwrap_err().to_string();
        assert!(error.contains("blk.0.ffn_gate.weight [64, 64] instead of [128, 64]"), "{error}");
    }

    #[test]
    fn rows_of_a_rotated_head_go_to_the_other_order_and_back() {
        let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let order = |to| RowOrder { to, head_dim: 6 };
        // Two heads of six rows, two columns: the first half beside the second.
        let adjacent = order(RopePairs::Adjacent).apply(&values, 2);
        let rows: Vec<f32> = adjacent.chunks(2).map(|row| row[0] / 2.0).collect();
        assert_eq!(rows, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 6.0, 9.0, 7.0, 10.0, 8.0, 11.0]);
        assert_eq!(order(RopePairs::Halves).apply(&adjacent, 2), values);
    }
}
