//! Weights of less than eight bits, from planes to one byte each.
//!
//! A block of 32 k is cut into planes of b bits a weight, each of b lines of 64 bytes. Byte `4 r + c`
//! of a line belongs to row r; entry j stands for k = 4j..4j+4, c being k within it. Entry j of a
//! plane lies in line `j % b`, `b (j / b)` bits up: unpacking is a shift and a mask.
//!
//! | format | planes | a code q means |
//! |---|---|---|
//! | Q8_0 | 8; of a head 4, and 4 apart | `q - 128` |
//! | Q5_0; Q5_1, Q5_K; Q6_K | 4 + 1; 4 + 1; 4 + 2 | `q - 16`; `q`; `q - 32` |
//! | Q2_K; Q3_K | 2; 2 + 1 | `q`; `q - 4` |
//! | IQ4_NL, IQ4_XS; MXFP4 | 4 | `table[q]` |

use crate::lanes::Lanes;
use crate::product::prefetch;
use crate::tile::Group;
use exrail_tensor::{E2M1_TABLE, IQ4_TABLE};

/// Bytes of a line: one byte each for sixteen rows and four k.
pub(crate) const LINE: usize = 64;

/// How the codes of one block become weights.
pub(crate) trait Codes: Copy + Send + Sync {
    /// Lines of a block.
    const LINES: usize;
    /// Eight entries of four k of a block, each byte the signed weight plus 128.
    fn bytes<L: Lanes>(lanes: L, group: Group<'_>, block: usize) -> [L::I; 8];

    /// Asks for what a product with `N` rows of activations will need of a group.
    #[inline(always)]
    fn prefetch<L: Lanes, const N: usize>(lanes: L, group: Group<'_>, block: usize) {
        for line in 0..=Self::LINES {
            prefetch::<L, N>(lanes, group.block(block), line);
        }
    }
}

/// Entry j of a plane of `BITS` bits at the start of `lines`, moved up by `up` bits.
#[inline(always)]
fn entry<L: Lanes, const BITS: usize>(lanes: L, lines: &[u8], j: usize, up: usize) -> L::I {
    let line = &lines.as_chunks::<LINE>().0[j % BITS];
    let left = up as i32 - (BITS * (j / BITS)) as i32;
    lanes.shift_mask(lanes.load_codes(line), left, ((1 << BITS) - 1) << up)
}

/// Bytes as they are.
#[derive(Clone, Copy)]
pub(crate) struct Whole;

impl Codes for Whole {
    const LINES: usize = 8;

    #[inline(always)]
    fn bytes<L: Lanes>(lanes: L, group: Group<'_>, block: usize) -> [L::I; 8] {
        lanes.bytes(group.weights::<512>(block))
    }
}

/// Bytes whose low half lies apart.
#[derive(Clone, Copy)]
pub(crate) struct Split;

impl Codes for Split {
    const LINES: usize = 4;

    #[inline(always)]
    fn bytes<L: Lanes>(lanes: L, group: Group<'_>, block: usize) -> [L::I; 8] {
        let high = group.weights::<256>(block).as_chunks::<LINE>().0;
        let low = group.low(block).as_chunks::<LINE>().0;
        let mut out = [lanes.load_codes(&[0; LINE]); 8];
        for line in 0..4 {
            let (high, low) = (lanes.load_codes(&high[line]), lanes.load_codes(&low[line]));
            let first = lanes.shift_mask(high, 4, 0xf0);
            out[line] = lanes.or(first, lanes.shift_mask(low, 0, 0x0f));
            let second = lanes.shift_mask(high, 0, 0xf0);
            out[line + 4] = lanes.or(second, lanes.shift_mask(low, -4, 0x0f));
        }
        out
    }

    #[inline(always)]
    fn prefetch<L: Lanes, const N: usize>(lanes: L, group: Group<'_>, block: usize) {
        for line in 0..=Self::LINES {
            prefetch::<L, N>(lanes, group.block(block), line);
        }
        for line in 0..Self::LINES {
            prefetch::<L, N>(lanes, group.low(block), line);
        }
    }
}

/// A plane of `LOW` bits and one of `HIGH` bits (possibly none); the code minus `BIAS`.
#[derive(Clone, Copy)]
pub(crate) struct Planes<const LOW: usize, const HIGH: usize, const BIAS: u8>;

impl<const LOW: usize, const HIGH: usize, const BIAS: u8> Codes for Planes<LOW, HIGH, BIAS> {
    const LINES: usize = LOW + HIGH;

    #[inline(always)]
    fn bytes<L: Lanes>(lanes: L, group: Group<'_>, block: usize) -> [L::I; 8] {
        let (low, high) = group.block(block).split_at(LOW * LINE);
        // A loop, not `from_fn`: a closure would not be compiled for the instruction set.
        let mut out = [lanes.load_codes(&[0; LINE]); 8];
        for (j, out) in out.iter_mut().enumerate() {
            let mut code = entry::<L, LOW>(lanes, low, j, 0);
            if HIGH > 0 {
                code = lanes.or(code, entry::<L, HIGH>(lanes, high, j, LOW));
            }
            *out = lanes.add_bytes(code, 128 - BIAS);
        }
        out
    }
}

/// A table of sixteen weights.
pub(crate) trait Table: Copy + Send + Sync {
    /// Weight plus 128.
    const BYTES: [u8; 16];
}

/// The table of IQ4_NL and IQ4_XS.
#[derive(Clone, Copy)]
pub(crate) struct Iq4;
/// The table of MXFP4.
#[derive(Clone, Copy)]
pub(crate) struct E2m1;

impl Table for Iq4 {
    const BYTES: [u8; 16] = biased(IQ4_TABLE);
}

impl Table for E2m1 {
    const BYTES: [u8; 16] = biased(E2M1_TABLE);
}

const fn biased(table: [i8; 16]) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = table[i].cast_unsigned() ^ 0x80;
        i += 1;
    }
    out
}

/// Nibbles that index a table.
#[derive(Clone, Copy)]
pub(crate) struct Indices<T>(std::marker::PhantomData<T>);

impl<T: Table> Codes for Indices<T> {
    const LINES: usize = 4;

    #[inline(always)]
    fn bytes<L: Lanes>(lanes: L, group: Group<'_>, block: usize) -> [L::I; 8] {
        let mut codes = lanes.nibbles(group.weights::<256>(block));
        for code in &mut codes {
            *code = lanes.lookup(*code, &T::BYTES);
        }
        codes
    }
}
