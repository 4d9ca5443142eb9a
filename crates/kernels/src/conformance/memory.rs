//! Buffers, refusals, and the operations that move, add or scale rows. All but the mean and the cap
//! are exact or round once.

use exrail_tensor::DType;

use super::{ConformanceError, ROW_COUNTS, Suite, U, accepted, defined};
use crate::reference::Reference;
use crate::{Backend, InputRounding, KernelError, Span, WeightView};

impl<B: Backend> Suite<'_, B> {
    /// Buffers start zeroed and keep what is written; malformed weights are refused.
    pub(super) fn memory(&mut self) -> Result<(), ConformanceError> {
        let case = "buffer of 1000";
        let mut zeroed = vec![f32::NAN; 1000];
        let mut buffer = accepted(case, self.backend.buffer(1000))?;
        self.backend.read(&buffer, &mut zeroed);
        self.n_cases = 0; // This buffer has no tail.
        self.check(case, &buffer, &[0.0; 1000], |_| 0.0)?;
        let written = self.random.normals(700, 0.0, 1.0);
        self.backend.write(&mut buffer, &written);
        let mut expected = written;
        expected.resize(1000, 0.0);
        self.check("write of 700", &buffer, &expected, |_| 0.0)?;

        self.refuses("weight with a byte short", DType::Q4_1, 3, 64, 119, |error| {
            matches!(error, KernelError::WeightBytes { .. })
        })?;
        self.refuses("weight with a byte over", DType::F32, 2, 3, 25, |error| {
            matches!(error, KernelError::WeightBytes { .. })
        })?;
        self.refuses("weight with half a block", DType::Q8_0, 1, 48, 51, |error| {
            matches!(error, KernelError::WeightColumns { .. })
        })?;
        for n_rows in ROW_COUNTS {
            for width in [1, 33, 64] {
                self.gather_and_add(n_rows, width)?;
                self.mean_rows(n_rows, width)?;
            }
        }
        for len in [1, 15, 16, 17, 100, 50_003] {
            self.scale_and_cap(len)?;
        }
        Ok(())
    }

    fn refuses(
        &self,
        case: &str,
        dtype: DType,
        rows: usize,
        columns: usize,
        len_bytes: usize,
        right: impl Fn(&KernelError) -> bool,
    ) -> Result<(), ConformanceError> {
        let bytes = vec![0; len_bytes];
        let rounding = InputRounding::Once;
        let view =
            WeightView { name: case, dtype, rows, columns, bytes: &bytes, rounding, head: true };
        match self.backend.weight(&view) {
            Ok(_) => Err(ConformanceError::Accepted {
                case: case.to_owned(),
                device: self.backend.name(),
            }),
            Err(error) if right(&error) => Ok(()),
            Err(source) => Err(ConformanceError::Refused { case: case.to_owned(), source }),
        }
    }

    fn gather_and_add(&mut self, n_rows: usize, width: usize) -> Result<(), ConformanceError> {
        self.next_case();
        let case = format!("gather_rows width={width} T={n_rows}");
        let x = self.random.normals(n_rows * width, 0.0, 1.0);
        let x_tested = self.upload(&case, &x)?;
        let rows: Vec<u32> = (0..5).map(|_| self.random.below(n_rows) as u32).collect();
        let mut out = self.output(&case, rows.len() * width)?;
        self.backend.gather_rows(&x_tested, width, &rows, &mut out);
        let expected = defined(rows.len() * width, |r, out| r.gather_rows(&x, width, &rows, out));
        self.check(&case, &out, &expected, |_| 0.0)?;

        let case = format!("add len={}", x.len());
        let y = self.random.normals(x.len(), 0.0, 1.0);
        let y_tested = self.upload(&case, &y)?;
        let mut sum = self.upload(&case, &x)?;
        self.backend.add(&mut sum, &y_tested, x.len());
        let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        self.check(&case, &sum, &expected, |_| 0.0)
    }

    /// A sum of n values errs by n · u · Σ|x|, and the division by one rounding more.
    fn mean_rows(&mut self, n_rows: usize, width: usize) -> Result<(), ConformanceError> {
        self.next_case();
        let case = format!("mean_rows width={width} T={n_rows}");
        let x = self.random.normals(n_rows * width, 0.0, 1.0);
        let magnitudes: Vec<f32> = x.iter().map(|x| x.abs()).collect();
        let cut = n_rows / 3;
        let mut spans = vec![Span { first_row: cut, n_rows: n_rows - cut }];
        if cut > 0 {
            spans.push(Span { first_row: 0, n_rows: cut });
        }
        let x_tested = self.upload(&case, &x)?;
        let mut out = self.output(&case, spans.len() * width)?;
        self.backend.mean_rows(&x_tested, width, &spans, &mut out);
        let len = spans.len() * width;
        let expected = defined(len, |r, out| r.mean_rows(&x, width, &spans, out));
        let reach = defined(len, |r, out| r.mean_rows(&magnitudes, width, &spans, out));
        self.check(&case, &out, &expected, |i| (n_rows + 2) as f64 * U * f64::from(reach[i]))
    }
    /// The scaling rounds once. A kernel's own tanh errs by 4 u relative, the division and the
    /// product around it by u each, and tanh does not magnify the relative error of its argument.
    fn scale_and_cap(&mut self, len: usize) -> Result<(), ConformanceError> {
        for (scale, cap) in [(1.0, None), (0.0625, None), (0.3, Some(30.0)), (1.0, Some(0.5))] {
            self.next_case();
            let case = format!("scale_and_cap len={len} scale={scale} cap={cap:?}");
            // From where tanh is its argument to where it is one.
            let mut x = self.random.normals(len, 0.0, 100.0);
            for (i, x) in x.iter_mut().enumerate() {
                *x *= [1.0, 0.1, 1e-3, 1e-6][i % 4];
            }
            if len > 1 {
                x[len / 2] = f32::NAN;
            }
            let mut tested = self.upload(&case, &x)?;
            self.backend.scale_and_cap(&mut tested, len, scale, cap);
            let mut expected = x;
            Reference.scale_and_cap(&mut expected, len, scale, cap);
            let relative = if cap.is_some() { 8.0 * U } else { U };
            self.check(&case, &tested, &expected, |i| relative * f64::from(expected[i].abs()))?;
        }
        Ok(())
    }
}
