//! Straight code for the rows of a tile.

/// Runs the body for `n` = 0, 1, … below the constant `N`, at most 8, without a loop. The compiler
/// leaves a loop with a large body a loop, and then keeps the vectors of all rows in memory, because
/// registers have no index.
macro_rules! unroll {
    ($n:ident in $N:ident, $body:block) => {
        const { assert!($N <= 8) };
        unroll!($n in $N, $body, 0, 1, 2, 3, 4, 5, 6, 7);
    };
    ($n:ident in $N:ident, $body:block, $($index:literal),*) => {$(
        if $index < $N {
            let $n = $index;
            $body
        }
    )*};
}
