//! Bytes of weights that a step reads, from the tensors of a file.
//!
//! Counted as the file stores them. The repacked form in memory can be a few percent larger where
//! it widens scales, so that rates here never flatter.

use std::path::Path;

use anyhow::{Context, Result};
use exrail_checkpoint::Checkpoint;

/// What a model's steps read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weights {
    /// All tensors.
    pub(super) total_bytes: u64,
    /// Tensors that every step reads whole.
    dense_bytes: u64,
    /// Tensors of all experts.
    expert_bytes: u64,
    /// Experts of a layer and those that a token goes through; absent in a dense model.
    experts: Option<(usize, usize)>,
}

impl Weights {
    /// # Errors
    /// The checkpoint is refused, or has experts without their numbers.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let tensors = checkpoint.tensors();
        let infos = tensors.names().filter_map(|name| tensors.info(name));
        let sizes = infos.map(|info| (info.name, info.n_bytes() as u64));
        let experts = checkpoint.config()?.experts;
        Self::count(sizes, experts.map(|experts| (experts.n_experts, experts.n_used)))
    }

    fn count<'a>(
        tensors: impl Iterator<Item = (&'a str, u64)>,
        experts: Option<(usize, usize)>,
    ) -> Result<Self> {
        let (mut total_bytes, mut expert_bytes, mut embedding, mut head) = (0, 0, 0, 0);
        for (name, bytes) in tensors {
            total_bytes += bytes;
            if name.contains("_exps.") {
                expert_bytes += bytes;
            }
            match name {
                "token_embd.weight" => embedding = bytes,
                "output.weight" => head = bytes,
                _ => {}
            }
        }
        if expert_bytes > 0 {
            experts
                .context("tensors of experts: expected their number in the header, found none")?;
        }
        // A table that is not the head too is read a row a token, which is nothing.
        let rows_only = if head > 0 { embedding } else { 0 };
        let dense_bytes = total_bytes - expert_bytes - rows_only;
        Ok(Self { total_bytes, dense_bytes, expert_bytes, experts })
    }

    /// Bytes that a decode step of `batch` sequences reads. Each token chooses its experts by
    /// itself, so that 1 − (1 − used / all)^batch of them are read, on average over the choices
    /// if all are equally likely.
    pub(super) fn step_bytes(&self, batch: usize) -> f64 {
        let share = self.experts.map_or(0.0, |(all, used)| {
            let missed = (1.0 - used as f64 / all as f64).max(0.0);
            1.0 - missed.powf(batch as f64)
        });
        self.dense_bytes as f64 + self.expert_bytes as f64 * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_counts_when_it_is_the_head_too() {
        let layers = [("token_embd.weight", 100), ("blk.0.attn_q.weight", 7)];
        let tied = Weights::count(layers.into_iter(), None).unwrap();
        assert_eq!((tied.total_bytes, tied.step_bytes(8)), (107, 107.0));
        let own = layers.into_iter().chain([("output.weight", 50)]);
        let own = Weights::count(own, None).unwrap();
        assert_eq!((own.total_bytes, own.step_bytes(1)), (157, 57.0));
    }

    #[test]
    fn experts_count_as_often_as_they_are_chosen() {
        let tensors = [("blk.0.attn_q.weight", 10), ("blk.0.ffn_up_exps.weight", 80)];
        let count = |experts| Weights::count(tensors.into_iter(), experts);
        let mixture = count(Some((8, 2))).unwrap();
        assert_eq!(mixture.step_bytes(1), 10.0 + 20.0);
        assert_eq!(mixture.step_bytes(2), 10.0 + 80.0 * 0.4375);
        assert_eq!(count(Some((8, 8))).unwrap().step_bytes(1), 90.0);
        assert!(count(None).unwrap_err().to_string().contains("experts"));
    }
}
