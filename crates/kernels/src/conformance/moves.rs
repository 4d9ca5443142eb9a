//! Keys and values that move inside the pool, and keys that turn on their way.
//!
//! **What is right.** A key that was rotated and written at p, and moved by d, is what is rotated and
//! written at p + d. Nothing reads a key but attention: with a window of two positions a pair of keys
//! shows in how its row divides itself between two values, and with a window of one the value shows itself.
//!
//! **Bound.** Three rotations take part, and each errs by (angle + 5) · u of a pair; an angle is at most a
//! position. The turned key is rounded once more than the one that it is compared with: three roundings in
//! all, of 2⁻¹¹ relative in half precision, and of largest / 254 an element in int8. Together they move a key
//! by `key_error` at most, which `attention.rs` allows beside its own bound.
//!
//! What keeps its bits is compared bit for bit, by the attention of the same device to the same positions.

use super::attention::{Pools, norm};
use super::{ConformanceError, Suite, U, accepted};
use crate::reference::{Reference, ReferenceKvPool};
use crate::{
    AttentionShape, AttentionSpan, Backend, KvDtype, KvMove, KvShape, KvSlot, PAGE_TOKENS, PageId,
    Rope, RopeStyle,
};

const N_LAYERS: usize = 2;
const N_PAGES: usize = 5;
/// The layer whose keys move.
const LAYER: usize = 1;
/// Pages of the sequence that moves, and how long it is.
const PAGES: [PageId; 2] = [PageId(3), PageId(1)];
const N_POSITIONS: usize = 300;
/// Positions at the front that stay, and those behind them that are dropped: fewer than what is behind them,
/// so that places are written over that an earlier move of the same call has read.
const KEPT: usize = 5;
const DROPPED: usize = 70;
/// Where nothing was.
const ELSEWHERE: PageId = PageId(2);

/// K, D, pairs: whole heads and partial ones, with and without SIMD tails.
const HEADS: [(usize, usize, usize); 5] =
    [(1, 8, 4), (2, 20, 7), (3, 33, 16), (2, 64, 32), (1, 128, 16)];

/// Heads, pool, rotation, and the rows `(N_POSITIONS, K * D)` that the sequence's places hold: keys before
/// their rotation, and values.
struct Case {
    name: String,
    shape: KvShape,
    rope: Rope,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Where a position's key and value come from.
struct Source {
    /// Whose rows they are.
    row: usize,
    /// Where its key is rotated to.
    position: usize,
}

impl<B: Backend> Suite<'_, B> {
    /// Both styles, whole and partial heads, all element types.
    pub(super) fn moves(&mut self) -> Result<(), ConformanceError> {
        for style in [RopeStyle::Interleaved, RopeStyle::Halves] {
            for (n_kv_heads, head_dim, n_pairs) in HEADS {
                for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Int8] {
                    self.next_case();
                    let heads = format!("{style:?} K={n_kv_heads} D={head_dim} pairs={n_pairs}");
                    let n = N_POSITIONS * n_kv_heads * head_dim;
                    // Outliers would make int8 coarse, and its bound with it.
                    let mut rows = || self.random.normals(n, 0.0, 1.0);
                    let keys = rows().iter().map(|x| x.clamp(-1.5, 1.5)).collect();
                    let values = rows();
                    let n_layers = N_LAYERS;
                    let case = Case {
                        name: format!("kv_move {dtype:?} cache, {heads}"),
                        shape: KvShape { n_layers, n_kv_heads, head_dim, n_pages: N_PAGES, dtype },
                        rope: super::rope::rope(style, n_pairs, 1e4, 1.190_238),
                        keys,
                        values,
                    };
                    self.gap_closes(&case)?;
                    self.turns_where_it_is(&case)?;
                    self.keeps_its_bits(&case)?;
                }
            }
        }
        Ok(())
    }

    /// What stands behind a gap moves in front and turns back.
    fn gap_closes(&mut self, case: &Case) -> Result<(), ConformanceError> {
        let places = KEPT..N_POSITIONS - DROPPED;
        let distance = -(DROPPED as i32);
        let moves =
            places.clone().map(|to| KvMove { from: slot(to + DROPPED), to: slot(to), distance });
        let sources = (0..places.end).map(|position| {
            let moved = if position < KEPT { 0 } else { DROPPED };
            Source { row: position + moved, position }
        });
        self.moved(case, "a gap closes", &moves.collect::<Vec<_>>(), &sources.collect::<Vec<_>>())
    }

    /// Some keys turn one way where they are, and some the other.
    fn turns_where_it_is(&mut self, case: &Case) -> Result<(), ConformanceError> {
        let distance = |row: usize| match row % 6 {
            0 => 411,
            3 => -(row as i32),
            _ => 0,
        };
        let all = 0..N_POSITIONS;
        let stays = |row| KvMove { from: slot(row), to: slot(row), distance: distance(row) };
        let source = |row: usize| Source { row, position: (row as i32 + distance(row)) as usize };
        let moves: Vec<KvMove> = all.clone().step_by(3).map(stays).collect();
        self.moved(case, "turns", &moves, &all.map(source).collect::<Vec<_>>())
    }

    /// Moves in one layer, and compares what is there with `sources`, and everything else with itself.
    fn moved(
        &mut self,
        case: &Case,
        what: &str,
        moves: &[KvMove],
        sources: &[Source],
    ) -> Result<(), ConformanceError> {
        let Case { shape, rope, .. } = case;
        let name = format!("{}, {what}", case.name);
        let mut tested = self.filled(&name, case)?;
        let others = [(0, &PAGES[..], N_POSITIONS), (LAYER, &[ELSEWHERE], PAGE_TOKENS)];
        let before = others.map(|other| self.seen(&name, case, &tested, other));
        self.backend.kv_move(&mut tested, LAYER, moves, Some(rope));

        let row_len = shape.n_kv_heads * shape.head_dim;
        let n_rows = sources.len();
        let of = |rows: &[f32]| -> Vec<f32> {
            let row = |source: &Source| &rows[source.row * row_len..][..row_len];
            sources.iter().flat_map(row).copied().collect()
        };
        let (mut k, v) = (of(&case.keys), of(&case.values));
        let positions: Vec<u32> = sources.iter().map(|source| source.position as u32).collect();
        Reference.rope(&mut k, shape.n_kv_heads, shape.head_dim, &positions, rope);
        let magnitudes: Vec<f32> = v.iter().map(|v| v.abs()).collect();
        let highest = magnitudes.iter().fold(0.0_f32, |most, v| most.max(*v));
        let key_norm = norm(&k, shape.head_dim);
        let key_error = key_error(case, &k, key_norm);
        let pools = Pools {
            tested,
            reference: written(case, &k, &v)?,
            magnitudes: written(case, &k, &magnitudes)?,
            key_norm: key_norm + key_error,
            key_error,
            highest_value: f64::from(highest),
            dtype: shape.dtype,
        };
        for window in [1, 2] {
            let spans: Vec<_> =
                (window - 1..n_rows).enumerate().map(|at| one_row(at, &PAGES)).collect();
            let q = self.random.normals(spans.len() * row_len, 0.0, 0.7);
            let name = format!("{name}, window {window}");
            self.attend(&name, &pools, LAYER, attention_shape(shape, window), &spans, &q)?;
        }
        for (other, before) in others.into_iter().zip(before) {
            let name = format!("{name}, layer {} of other places", other.0);
            self.same(&name, &before?, &self.seen(&name, case, &pools.tested, other)?)?;
        }
        Ok(())
    }

    /// A turn by nothing, and a move where nothing is rotated, change no bit; not of int8 either.
    fn keeps_its_bits(&mut self, case: &Case) -> Result<(), ConformanceError> {
        let n = PAGE_TOKENS.min(N_POSITIONS);
        let to_elsewhere = |offset: usize| KvSlot { page: ELSEWHERE, offset: offset as u32 };
        for (rope, distance) in [(Some(&case.rope), 0), (None, 77)] {
            let name = format!("{}, by {distance} with {}", case.name, rope.is_some());
            let mut tested = self.filled(&name, case)?;
            let before = self.seen(&name, case, &tested, (LAYER, &PAGES[..1], n))?;
            let there: Vec<KvMove> = (0..n)
                .map(|row| KvMove { from: slot(row), to: to_elsewhere(row), distance })
                .collect();
            self.backend.kv_move(&mut tested, LAYER, &there, rope);
            let after = self.seen(&name, case, &tested, (LAYER, &[ELSEWHERE], n))?;
            self.same(&name, &before, &after)?;
            let left = self.seen(&name, case, &tested, (LAYER, &PAGES[..1], n))?;
            self.same(&name, &before, &left)?;
        }
        Ok(())
    }

    /// A pool of the device with the sequence in both layers; elsewhere is nothing.
    fn filled(&self, name: &str, case: &Case) -> Result<B::KvPool, ConformanceError> {
        let Case { shape, rope, keys, values, .. } = case;
        let mut pool = accepted(name, self.backend.kv_pool(*shape))?;
        let positions: Vec<u32> = (0..N_POSITIONS as u32).collect();
        let slots: Vec<KvSlot> = (0..N_POSITIONS).map(slot).collect();
        let mut k = self.upload(name, keys)?;
        let v = self.upload(name, values)?;
        self.backend.rope(&mut k, shape.n_kv_heads, shape.head_dim, &positions, rope);
        for layer in 0..N_LAYERS {
            self.backend.kv_write(&mut pool, layer, &k, &v, &slots);
        }
        Ok(pool)
    }

    /// What pairs of neighbours among the first `n` positions of `pages` give for one query.
    fn seen(
        &self,
        name: &str,
        case: &Case,
        pool: &B::KvPool,
        (layer, pages, n): (usize, &[PageId], usize),
    ) -> Result<Vec<f32>, ConformanceError> {
        let row_len = case.shape.n_kv_heads * case.shape.head_dim;
        let spans: Vec<_> = (1..n).enumerate().map(|at| one_row(at, pages)).collect();
        // Any row of keys is a query.
        let q = self.upload(name, &case.keys[..row_len].repeat(spans.len()))?;
        let mut out = self.output(name, spans.len() * row_len)?;
        let shape = attention_shape(&case.shape, 2);
        self.backend.attention(&q, pool, layer, shape, &spans, &mut out);
        let mut seen = vec![0.0; spans.len() * row_len];
        self.backend.read(&out, &mut seen);
        Ok(seen)
    }

    /// The same bits.
    fn same(&self, case: &str, expected: &[f32], found: &[f32]) -> Result<(), ConformanceError> {
        let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
        let Some(index) = expected.iter().zip(found).position(differs) else { return Ok(()) };
        Err(ConformanceError::Value {
            case: format!("{case}, the same bits"),
            index,
            expected: expected[index],
            bound: 0.0,
            found: found[index],
            device: self.backend.name(),
        })
    }
}

fn slot(position: usize) -> KvSlot {
    let offset = (position % PAGE_TOKENS) as u32;
    KvSlot { page: PAGES[position / PAGE_TOKENS], offset }
}

/// Row and position of a span of one row.
fn one_row((first_row, first_position): (usize, usize), pages: &[PageId]) -> AttentionSpan<'_> {
    AttentionSpan { first_row, n_rows: 1, first_position, pages }
}

fn attention_shape(shape: &KvShape, window: usize) -> AttentionShape {
    let KvShape { n_kv_heads, head_dim, .. } = *shape;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let window = Some(window);
    AttentionShape { n_heads: n_kv_heads, n_kv_heads, head_dim, scale, soft_cap: None, window }
}

/// The reference with these rows at the positions from 0.
fn written(case: &Case, k: &[f32], v: &[f32]) -> Result<ReferenceKvPool, ConformanceError> {
    let mut pool = accepted(&case.name, Reference.kv_pool(case.shape))?;
    let n = k.len() / (case.shape.n_kv_heads * case.shape.head_dim);
    let slots: Vec<KvSlot> = (0..n).map(slot).collect();
    Reference.kv_write(&mut pool, LAYER, &k.to_vec(), &v.to_vec(), &slots);
    Ok(pool)
}

/// `key_error` of the file header, of keys whose longest head is `key_norm`.
fn key_error(case: &Case, k: &[f32], key_norm: f64) -> f64 {
    let angle = (N_POSITIONS + 411) as f64;
    let rotations = 3.0 * (angle + 5.0) * U * std::f64::consts::SQRT_2 * key_norm;
    let largest = k.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let side = (case.shape.head_dim as f64).sqrt();
    rotations
        + match case.shape.dtype {
            KvDtype::F32 => 0.0,
            KvDtype::F16 => 3.0 / 2048.0 * key_norm,
            // The elements of a pair may be larger by that where they were rounded first.
            KvDtype::Int8 => 3.0 * side * f64::from(largest) * std::f64::consts::SQRT_2 / 254.0,
        }
}
