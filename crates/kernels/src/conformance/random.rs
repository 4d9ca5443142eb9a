//! Seeded inputs.

/// SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators", fig. 17).
pub(super) struct Random {
    state: u64,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    pub(super) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller 1958).
    pub(super) fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }

    /// `len` normal values around `mean`.
    pub(super) fn normals(&mut self, len: usize, mean: f32, deviation: f32) -> Vec<f32> {
        (0..len).map(|_| mean + deviation * self.normal()).collect()
    }

    /// An integer below `limit`.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Activations `(n_rows, width)` as a model makes them and as it should not: some rows with a
    /// large outlier, one row of zeros and one whose values are denormal, where a scale's
    /// reciprocal overflows.
    pub(super) fn activations(&mut self, n_rows: usize, width: usize) -> Vec<f32> {
        let mut x = self.normals(n_rows * width, 0.0, 1.0);
        for (t, row) in x.chunks_exact_mut(width).enumerate() {
            match t % 7 {
                1 => row[self.below(width)] *= 300.0,
                4 => row.fill(0.0),
                5 => row.iter_mut().for_each(|x| *x *= 1e-39),
                0 | 2.. => {}
            }
        }
        x
    }
}
