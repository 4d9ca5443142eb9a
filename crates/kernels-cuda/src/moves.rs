//! Moves of keys and values inside the pool: which of them one launch may do, and how their keys turn.
//!
//! A launch does its moves all at once, and [`exrail_kernels::Backend::kv_move`] means them one after the
//! other; so a launch ends in front of a move that reads or writes what an earlier one of it has written, or
//! writes what an earlier one reads.

use std::collections::HashSet;

use exrail_kernels::{KvMove, KvSlot, Rope};

use crate::memory::bytes_of;

/// Of a key that keeps its bits; the constant of `cu/kv.cu`.
const NO_TURN: u32 = u32::MAX;
/// Moves of a launch at most. Its upload is 5 KiB then: what waits to be handed over, 64 launches, fits the
/// memory that uploads have, and nothing is allocated behind the fence.
const MOST: usize = 256;

/// The launches of these moves, in order.
pub(crate) fn launches(moves: &[KvMove]) -> impl Iterator<Item = &[KvMove]> {
    let mut rest = moves;
    std::iter::from_fn(move || {
        let (launch, behind) = rest.split_at(independent(rest));
        rest = behind;
        (!launch.is_empty()).then_some(launch)
    })
}

/// How many at the front can be done at once.
fn independent(moves: &[KvMove]) -> usize {
    let (mut read, mut written) = (HashSet::new(), HashSet::new());
    let place = |slot: KvSlot| (slot.page.0, slot.offset);
    let is_free = |one: &&KvMove| {
        let (from, to) = (place(one.from), place(one.to));
        let is_free = !written.contains(&from) && !written.contains(&to) && !read.contains(&to);
        read.insert(from);
        written.insert(to);
        is_free
    };
    moves.iter().take(MOST).take_while(is_free).count()
}

/// What one launch uploads.
pub(crate) struct Uploads {
    /// Page and offset from, page and offset to, and the row of `turns`, of each move.
    pub(crate) moves: Vec<u8>,
    /// Cosine and sine `(distances, pairs)`, without the magnitude.
    pub(crate) turns: Vec<u8>,
}

impl Uploads {
    pub(crate) fn new(moves: &[KvMove], rope: Option<&Rope>) -> Uploads {
        let mut distances: Vec<i32> = Vec::new();
        let mut words: Vec<u32> = Vec::with_capacity(5 * moves.len());
        for &KvMove { from, to, distance } in moves {
            words.extend([from.page.0, from.offset, to.page.0, to.offset]);
            words.push(match rope {
                Some(_) if distance != 0 => row(&mut distances, distance),
                Some(_) | None => NO_TURN,
            });
        }
        let frequencies = rope.map_or(&[][..], |rope| &rope.inverse_frequencies);
        // Angles in f64, as the reference has them.
        let pair = |distance: i32, frequency: f32| {
            let (sine, cosine) = (f64::from(distance) * f64::from(frequency)).sin_cos();
            [cosine as f32, sine as f32]
        };
        let turns = distances.iter().flat_map(|&distance| {
            frequencies.iter().flat_map(move |&frequency| pair(distance, frequency))
        });
        let turns: Vec<f32> = turns.collect();
        Uploads {
            moves: bytes_of(&words, u32::to_le_bytes),
            turns: bytes_of(&turns, f32::to_le_bytes),
        }
    }
}

/// Its place among the distances, which are few: one for each range that moves.
fn row(distances: &mut Vec<i32>, distance: i32) -> u32 {
    let known = distances.iter().position(|&known| known == distance);
    let at = known.unwrap_or_else(|| {
        distances.push(distance);
        distances.len() - 1
    });
    u32::try_from(at).expect("no more than the moves of a launch")
}

#[cfg(test)]
mod tests {
    use exrail_kernels::{PageId, RopeStyle};

    use super::*;

    fn slot(at: usize) -> KvSlot {
        KvSlot { page: PageId(at as u32 / 4), offset: at as u32 % 4 }
    }

    fn moves(pairs: impl IntoIterator<Item = (usize, usize)>) -> Vec<KvMove> {
        let one = |(from, to)| KvMove { from: slot(from), to: slot(to), distance: 1 };
        pairs.into_iter().map(one).collect()
    }

    /// What a place holds after launches that read everything before they write.
    fn done(places: usize, launches: &[&[KvMove]]) -> Vec<usize> {
        let index = |slot: KvSlot| (4 * slot.page.0 + slot.offset) as usize;
        let mut held: Vec<usize> = (0..places).collect();
        for launch in launches {
            let read: Vec<usize> = launch.iter().map(|one| held[index(one.from)]).collect();
            // The last one first: the order within a launch is nobody's.
            for (one, value) in launch.iter().zip(read).rev() {
                held[index(one.to)] = value;
            }
        }
        held
    }

    fn one_by_one(places: usize, moves: &[KvMove]) -> Vec<usize> {
        done(places, &moves.chunks(1).collect::<Vec<_>>())
    }

    #[test]
    fn launches_do_what_one_move_after_the_other_does() {
        let gap = moves((5..900).map(|to| (to + 70, to)));
        let chain = moves((1..40).map(|to| (to - 1, to)));
        let again = moves([(3, 9), (4, 9), (9, 1), (1, 1), (1, 2)]);
        for moves in [gap, chain, again, moves([])] {
            let launches: Vec<&[KvMove]> = launches(&moves).collect();
            assert_eq!(launches.concat(), moves);
            assert!(launches.iter().all(|launch| launch.len() <= MOST));
            assert_eq!(done(1000, &launches), one_by_one(1000, &moves));
        }
        let wide = moves((0..1000).map(|at| (2000 + at, at)));
        assert_eq!(launches(&wide).count(), 4, "as wide as may be");
    }

    /// The mutation: all at once, and a place is written before it was read.
    #[test]
    fn without_the_split_a_chain_of_moves_gives_other_keys() {
        let chain = moves((1..40).map(|to| (to - 1, to)));
        assert_ne!(done(40, &[&chain]), one_by_one(40, &chain));
    }

    #[test]
    fn distances_share_their_rows_and_nothing_turns_by_nothing() {
        let inverse_frequencies = vec![1.0, 0.01];
        let rope = Rope { inverse_frequencies, style: RopeStyle::Halves, magnitude: 3.0 };
        let mut moves = moves([(0, 1), (2, 3), (4, 5), (6, 7)]);
        moves[1].distance = 0;
        moves[2].distance = -5;
        let uploads = Uploads::new(&moves, Some(&rope));
        let rows = |uploads: &Uploads| -> Vec<u32> {
            let words =
                uploads.moves.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
            words.skip(4).step_by(5).collect()
        };
        assert_eq!(rows(&uploads), [0, NO_TURN, 1, 0]);
        let turns: Vec<f32> =
            uploads.turns.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
        assert_eq!(turns.len(), 2 * 2 * 2);
        assert_eq!(turns[..2], [1.0_f64.cos() as f32, 1.0_f64.sin() as f32], "no magnitude");
        assert!(turns[5] > 0.0 && turns[7] < 0.0, "five back: sin(-5) and sin(-0.05)");
        assert_eq!(rows(&Uploads::new(&moves, None)), [NO_TURN; 4]);
    }
}
