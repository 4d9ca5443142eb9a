//! Attention over pages and inside spans; see `cu/attention.cu`.

#![expect(unsafe_code, reason = "plain data that kernels take by value")]

use cudarc::driver::DeviceRepr;
use exrail_kernels::{AttentionShape, AttentionSpan, KvDtype, PAGE_TOKENS, Span};

use crate::memory::{bytes_of_u32, narrow};
use crate::stream::{Grid, Slot, Stream};
use crate::{CudaBuffer, CudaKvPool};

/// Threads of a block, which has one head of one row.
const THREADS: usize = 256;
/// Widest head: what the lanes of a warp hold.
const MAX_HEAD_DIM: usize = 512;

/// The C++ struct of the same name.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Shape {
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    window: u32,
    scale: f32,
    soft_cap: f32,
}

// SAFETY: plain data, with the fields of the C++ struct in its order.
unsafe impl DeviceRepr for Shape {}

impl Shape {
    fn of(shape: AttentionShape) -> Shape {
        assert!(shape.n_heads.is_multiple_of(shape.n_kv_heads), "heads divide into groups");
        assert!(shape.head_dim <= MAX_HEAD_DIM, "heads up to {MAX_HEAD_DIM} wide");
        assert!(shape.window != Some(0), "a window holds at least one key");
        Shape {
            n_heads: narrow(shape.n_heads),
            n_kv_heads: narrow(shape.n_kv_heads),
            head_dim: narrow(shape.head_dim),
            window: narrow(shape.window.unwrap_or(0)),
            scale: shape.scale,
            soft_cap: shape.soft_cap.unwrap_or(0.0),
        }
    }

    fn grid(self, n_rows: usize) -> Grid {
        let shared_bytes = THREADS / 32 * self.head_dim as usize * 4;
        Grid { blocks: (n_rows, self.n_heads as usize), threads: THREADS, shared_bytes }
    }
}

/// See [`exrail_kernels::Backend::attention`]; the pool comes with its layer.
pub(crate) fn attention(
    stream: &Stream,
    q: &CudaBuffer,
    (pool, layer): (&CudaKvPool, usize),
    shape: AttentionShape,
    spans: &[AttentionSpan<'_>],
    out: &CudaBuffer,
) {
    assert!(layer < pool.shape.n_layers, "layer {layer} of {}", pool.shape.n_layers);
    let (mut rows, mut table) = (Vec::new(), Vec::new());
    let mut n_needed = 0;
    for span in spans {
        let pages_at = table.len();
        let end = span.first_position + span.n_rows;
        let n_pages = end.div_ceil(PAGE_TOKENS);
        table.extend(span.pages[..n_pages].iter().map(|page| page.0 as usize));
        for i in 0..span.n_rows {
            let end = span.first_position + i + 1;
            let first = shape.window.map_or(0, |window| end.saturating_sub(window));
            for page in &span.pages[first / PAGE_TOKENS..end.div_ceil(PAGE_TOKENS)] {
                pool.check_page(*page);
            }
            rows.extend([span.first_row + i, first, end, pages_at]);
        }
        n_needed = n_needed.max(span.first_row + span.n_rows);
    }
    let n_rows = rows.len() / 4;
    let n_values = n_needed * shape.n_heads * shape.head_dim;
    let (q, out) = (q.at(stream, n_values), out.at(stream, n_values));
    let (pages, layer, shape) = (pool.pages(stream), narrow(layer), Shape::of(shape));
    let rows = stream.upload(Slot::AttentionRows, bytes_of_u32(rows));
    let table = stream.upload(Slot::PageTable, bytes_of_u32(table));
    let kernel = match pool.shape.dtype {
        KvDtype::F32 => "attention_f32",
        KvDtype::F16 => "attention_f16",
        KvDtype::Int8 => "attention_int8",
    };
    let arguments: [&dyn crate::stream::AnyArgument; 7] =
        [&q, &pages, &layer, &table, &shape, &rows, &out];
    stream.launch(kernel, shape.grid(n_rows), &arguments);
}

/// See [`exrail_kernels::Backend::attention_full`]; keys come with values.
pub(crate) fn attention_full(
    stream: &Stream,
    q: &CudaBuffer,
    (k, v): (&CudaBuffer, &CudaBuffer),
    shape: AttentionShape,
    spans: &[Span],
    out: &CudaBuffer,
) {
    assert!(shape.window.is_none(), "only causal attention has a window");
    let each = |span: &Span| {
        let (first, n) = (span.first_row, span.n_rows);
        (first..first + n).flat_map(move |row| [row, 0, n, first])
    };
    let rows: Vec<usize> = spans.iter().flat_map(each).collect();
    let n_needed = spans.iter().map(|span| span.first_row + span.n_rows).max().unwrap_or(0);
    let n_rows = rows.len() / 4;
    let n_values = n_needed * shape.n_heads * shape.head_dim;
    let n_cached = n_needed * shape.n_kv_heads * shape.head_dim;
    let (q, out) = (q.at(stream, n_values), out.at(stream, n_values));
    let (k, v) = (k.at(stream, n_cached), v.at(stream, n_cached));
    let (shape, rows) = (Shape::of(shape), stream.upload(Slot::AttentionRows, bytes_of_u32(rows)));
    stream.launch("attention_full", shape.grid(n_rows), &[&q, &k, &v, &shape, &rows, &out]);
}
