//! [`Rounded`]: a 16-bit checkpoint whose matrices come as int4 or int8 blocks.

use std::borrow::Cow;

use exrail_tensor::{DType, IntGrid};

use crate::{LoadError, TensorInfo, TensorView, Tensors};

/// Weights that share a scale: a block of the native formats.
const GROUP: usize = 32;
/// Matrices below this many weights stay as they are.
const MIN_WEIGHTS: usize = 1024;

/// Rounds the matrices of `tensors` to nearest when they are asked for, one at a time.
///
/// Matrices of the layers get the grid that was asked for; the embedding and the head, whose errors
/// reach every logit, get int8. Vectors, the router of a mixture of experts, matrices below 1,024
/// weights and those whose rows are not whole groups of 32 stay as they are.
pub struct Rounded<'a> {
    tensors: &'a dyn Tensors,
    grid: IntGrid,
}

impl<'a> Rounded<'a> {
    /// Rounds `tensors` to `grid`.
    ///
    /// # Errors
    /// [`LoadError::AlreadyQuantised`] when one of them is in blocks.
    pub fn new(tensors: &'a dyn Tensors, grid: IntGrid) -> Result<Rounded<'a>, LoadError> {
        let mut infos = tensors.names().filter_map(|name| tensors.info(name));
        match infos.find(|info| info.dtype.is_quantised()) {
            None => Ok(Rounded { tensors, grid }),
            Some(TensorInfo { name, dtype, .. }) => {
                Err(LoadError::AlreadyQuantised { tensor: name.to_owned(), found: dtype })
            }
        }
    }

    /// Rounds `tensors` to `grid`, blocks from the values that they stand for: a model that is kept in blocks alone,
    /// compared with itself on a coarser grid. What was rounded before loses more than its original would.
    #[must_use]
    pub fn of_any(tensors: &'a dyn Tensors, grid: IntGrid) -> Rounded<'a> {
        Rounded { tensors, grid }
    }

    /// The grid of a tensor; `None`: it stays as it is.
    fn grid_of(&self, info: &TensorInfo<'_>) -> Option<IntGrid> {
        let &[.., rows, columns] = info.shape else { return None };
        if rows.saturating_mul(columns) < MIN_WEIGHTS
            || !columns.is_multiple_of(GROUP)
            || info.name.ends_with(".ffn_gate_inp.weight")
        {
            return None;
        }
        Some(if info.name.starts_with("blk.") { self.grid } else { IntGrid::Int8 })
    }
}

impl Tensors for Rounded<'_> {
    fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let info = self.tensors.info(name)?;
        let dtype = self.grid_of(&info).map_or(info.dtype, IntGrid::dtype);
        Some(TensorInfo { dtype, ..info })
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        let view = self.tensors.tensor(name)?;
        let Some(grid) = self.grid_of(&TensorInfo::from(&view)) else { return Ok(view) };
        let columns = view.shape.last().copied().unwrap_or_default();
        let values = view.to_f32()?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let (tensor, found) = (name.to_owned(), values[index]);
            return Err(LoadError::NotFinite { tensor, index, found });
        }
        let bytes = Cow::Owned(grid.round_rows(&values, columns, GROUP));
        let dtype: DType = grid.dtype();
        Ok(TensorView { dtype, bytes, ..view })
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        self.tensors.names()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use exrail_tensor::quantize;

    use super::*;

    struct Map(BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>);

    impl Map {
        fn new(tensors: &[(&str, DType, &[usize])]) -> Map {
            let tensor = |&(name, dtype, shape): &(&str, DType, &[usize])| {
                let n: usize = shape.iter().product();
                let values: Vec<f32> =
                    (0..n).map(|i| ((i * 37) % 101) as f32 / 50.5 - 1.0).collect();
                (name.to_owned(), (dtype, shape.to_vec(), quantize(dtype, &values).unwrap()))
            };
            Map(tensors.iter().map(tensor).collect())
        }
    }

    impl Tensors for Map {
        fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
            let (name, (dtype, shape, _)) = self.0.get_key_value(name)?;
            Some(TensorInfo { name, dtype: *dtype, shape })
        }

        fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
            let (name, (dtype, shape, bytes)) = self.0.get_key_value(name).unwrap();
            Ok(TensorView { name, dtype: *dtype, shape, bytes: bytes.into() })
        }

        fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
            Box::new(self.0.keys().map(String::as_str))
        }
    }

    #[test]
    fn what_is_rounded_is_what_the_docs_say() {
        let map = Map::new(&[
            ("token_embd.weight", DType::F16, &[40, 64]),
            ("blk.0.attn_q.weight", DType::BF16, &[64, 64]),
            ("blk.0.ffn_gate_exps.weight", DType::F16, &[2, 32, 64]),
            ("blk.0.ffn_gate_inp.weight", DType::F32, &[64, 64]),
            ("blk.0.attn_norm.weight", DType::F32, &[64]),
            ("blk.0.attn_k.weight", DType::F16, &[64, 40]),
            ("blk.0.attn_v.weight", DType::F16, &[8, 64]),
        ]);
        let rounded = Rounded::new(&map, IntGrid::Int4).unwrap();
        for (name, dtype) in [
            ("token_embd.weight", DType::Q8_0),
            ("blk.0.attn_q.weight", DType::Q4_0),
            ("blk.0.ffn_gate_exps.weight", DType::Q4_0),
            ("blk.0.ffn_gate_inp.weight", DType::F32),
            ("blk.0.attn_norm.weight", DType::F32),
            ("blk.0.attn_k.weight", DType::F16),
            ("blk.0.attn_v.weight", DType::F16),
        ] {
            let (info, view) = (rounded.info(name).unwrap(), rounded.tensor(name).unwrap());
            assert_eq!((info.dtype, view.dtype), (dtype, dtype), "{name}");
            let exact = map.tensor(name).unwrap().to_f32().unwrap();
            // Half a step of a group whose largest magnitude is at most 1; int4 may clamp one.
            let step = if dtype == DType::Q4_0 { 1.0 / 7.0 } else { 1.0 / 127.0 };
            let tolerance = if dtype.is_quantised() { 1.5 * step } else { 0.0 };
            for (value, exact) in view.to_f32().unwrap().iter().zip(exact) {
                assert!((value - exact).abs() <= tolerance, "{name}: {value} {exact}");
            }
        }
    }

    #[test]
    fn blocks_are_rounded_from_their_values_where_that_is_asked_for() {
        let map = Map::new(&[("blk.0.attn_q.weight", DType::Q4_1, &[64, 64])]);
        let rounded = Rounded::of_any(&map, IntGrid::Int8);
        let view = rounded.tensor("blk.0.attn_q.weight").unwrap();
        assert_eq!(view.dtype, DType::Q8_0);
        let exact = map.tensor("blk.0.attn_q.weight").unwrap().to_f32().unwrap();
        for (value, exact) in view.to_f32().unwrap().iter().zip(exact) {
            assert!((value - exact).abs() <= 0.6 / 127.0, "{value} {exact}");
        }
    }

    #[test]
    fn blocks_are_not_rounded_again_and_what_is_not_finite_is_named() {
        let map = Map::new(&[("blk.0.attn_q.weight", DType::Q8_0, &[64, 64])]);
        let error = Rounded::new(&map, IntGrid::Int4).err().unwrap().to_string();
        assert!(error.contains("`blk.0.attn_q.weight`") && error.contains("Q8_0"), "{error}");
        let mut map = Map::new(&[("blk.0.attn_q.weight", DType::F16, &[64, 64])]);
        map.0.get_mut("blk.0.attn_q.weight").unwrap().2[7] = 0x7c;
        map.0.get_mut("blk.0.attn_q.weight").unwrap().2[6] = 0;
        let rounded = Rounded::new(&map, IntGrid::Int8).unwrap();
        let error = rounded.tensor("blk.0.attn_q.weight").unwrap_err().to_string();
        assert!(error.contains("found inf at index 3"), "{error}");
    }
}
