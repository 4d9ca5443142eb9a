//! [`Experts`]: a mixture of experts, each row through the few that its router picks.

use exrail_checkpoint::{DecoderConfig, Experts as ExpertsConfig, tensor_name};
use exrail_kernels::{Backend, InputRounding};

use crate::ModelError;
use crate::layer::activation;
use crate::load::Loader;

/// The router and the experts of one layer.
pub(crate) struct Experts<B: Backend> {
    config: ExpertsConfig,
    router: B::Weight,       // (E, C)
    experts: Vec<Expert<B>>, // E
}

struct Expert<B: Backend> {
    gate: B::Weight, // (W, C)
    up: B::Weight,   // (W, C)
    down: B::Weight, // (C, W)
}

/// Activations of a mixture, and who goes where.
pub(crate) struct ExpertScratch<B: Backend> {
    logits: B::Buffer,   // (T, E)
    gathered: B::Buffer, // (T, C)
    read: Vec<f32>,      // (T, E)
    rows: Vec<Vec<u32>>, // E lists of rows
    scales: Vec<Vec<f32>>,
}

impl<B: Backend> ExpertScratch<B> {
    /// Empty when the model has no experts.
    pub(crate) fn new(
        backend: &B,
        config: &DecoderConfig,
        max_rows: usize,
    ) -> Result<Self, ModelError> {
        let n_experts = config.experts.map_or(0, |experts| experts.n_experts);
        let gathered = if n_experts == 0 { 0 } else { max_rows * config.width };
        Ok(Self {
            logits: backend.buffer(max_rows * n_experts)?,
            gathered: backend.buffer(gathered)?,
            read: Vec::new(),
            rows: vec![Vec::new(); n_experts],
            scales: vec![Vec::new(); n_experts],
        })
    }
}

impl<B: Backend> Experts<B> {
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        config: &DecoderConfig,
        experts: ExpertsConfig,
        layer_idx: usize,
    ) -> Result<Self, ModelError> {
        let (n, width, inner) = (experts.n_experts, config.width, experts.width);
        let name = |part: &str| tensor_name(layer_idx, part);
        let router =
            loader.matrix(&name("ffn_gate_inp.weight"), (n, width), InputRounding::Twice)?;
        let mut role = |part: &str, rows: usize, columns: usize, rounding: InputRounding| {
            if config.storage.stacked_experts {
                return loader.parts(
                    &name(&format!("{part}_exps.weight")),
                    &vec![rows; n],
                    columns,
                    rounding,
                );
            }
            let one = |expert| {
                let name = name(&format!("{part}.{expert}.weight"));
                loader.matrix(&name, (rows, columns), rounding)
            };
            (0..n).map(one).collect()
        };
        let gates = role("ffn_gate", inner, width, InputRounding::Once)?;
        let ups = role("ffn_up", inner, width, InputRounding::Once)?;
        let downs = role("ffn_down", width, inner, InputRounding::Twice)?;
        let experts_of = gates.into_iter().zip(ups).zip(downs);
        let all = experts_of.map(|((gate, up), down)| Expert { gate, up, down }).collect();
        Ok(Self { config: experts, router, experts: all })
    }

    /// Adds the weighted outputs, times `scale`, to `out`. Experts run in order, so that a row's
    /// sum does not depend on its batch.
    pub(crate) fn run_add(
        &self,
        backend: &B,
        (input, n_rows): (&B::Buffer, usize),
        config: &DecoderConfig,
        (gated, scratch): (&mut B::Buffer, &mut ExpertScratch<B>),
        scale: f32,
        out: &mut B::Buffer,
    ) {
        backend.linear(input, n_rows, &self.router, None, &mut scratch.logits);
        scratch.read.resize(n_rows * self.config.n_experts, 0.0);
        backend.read(&scratch.logits, &mut scratch.read);
        self.route(scratch, scale);
        for (i, expert) in self.experts.iter().enumerate() {
            let (rows, scales) = (&scratch.rows[i], &scratch.scales[i]);
            if rows.is_empty() {
                continue;
            }
            let gathered = &mut scratch.gathered;
            backend.gather_rows(input, config.width, rows, gathered);
            let (gate, up) = (&expert.gate, &expert.up);
            backend.linear_gate(gathered, rows.len(), gate, up, activation(config), gated);
            backend.linear_add_rows(gated, &expert.down, rows, scales, out);
        }
    }

    fn route(&self, scratch: &mut ExpertScratch<B>, scale: f32) {
        scratch.rows.iter_mut().for_each(Vec::clear);
        scratch.scales.iter_mut().for_each(Vec::clear);
        for (row, logits) in scratch.read.chunks_exact(self.config.n_experts).enumerate() {
            for (expert, weight) in choose(logits, self.config) {
                scratch.rows[expert].push(u32::try_from(row).expect("rows are far below 2^32"));
                scratch.scales[expert].push(weight * scale);
            }
        }
    }
}

/// The experts of one row with their weights: the largest of softmax(logits), ties to the first.
fn choose(logits: &[f32], config: ExpertsConfig) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let highest = order.first().map_or(0.0, |&i| f64::from(logits[i]));
    let power = |i: usize| (f64::from(logits[i]) - highest).exp();
    let chosen = &order[..config.n_used];
    let among = if config.normalise { chosen } else { &order[..] };
    let total: f64 = among.iter().map(|&i| power(i)).sum();
    chosen.iter().map(|&i| (i, (power(i) / total) as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_chosen_and_weighed() {
        let config = ExpertsConfig { n_experts: 4, n_used: 2, width: 1, normalise: true };
        let logits = [0.0, 2.0_f32.ln(), -1.0, 2.0_f32.ln()];
        assert_eq!(choose(&logits, config), [(1, 0.5), (3, 0.5)]);
        let plain = choose(
            &[0.0, 3.0_f32.ln(), f32::NEG_INFINITY, 0.0],
            ExpertsConfig { normalise: false, ..config },
        );
        assert_eq!(plain.iter().map(|x| x.0).collect::<Vec<_>>(), [1, 0]);
        assert!((plain[0].1 - 0.6).abs() < 1e-6 && (plain[1].1 - 0.2).abs() < 1e-6, "{plain:?}");
    }
}
