//! How an attention call is cut into tasks.

use super::SEGMENT;
use exrail_kernels::{AttentionShape, AttentionSpan};
use std::ops::Range;

/// Multiplications below which one thread does it all (about 1 µs).
const ALONE: usize = 1 << 14;
/// Queries of a task when there are plenty.
const TASK_QUERIES: usize = 16;
/// Segments of queries that tasks of their own may compute: what they leave stays in the caches.
const MOST_PARTIALS: usize = 4096;

/// Some queries of one span and head, all their segments or one.
pub(super) struct Task {
    pub(super) span: usize,
    pub(super) kv_head: usize,
    pub(super) range: Range<usize>,
    pub(super) segment: Option<usize>,
}

/// The tasks of a call.
pub(super) struct Tasks {
    pub(super) all: Vec<Task>,
    /// Not worth a second thread.
    pub(super) alone: bool,
    /// The first partial result and the segments of each span, where tasks have one segment.
    spans: Vec<(usize, Range<usize>)>,
    /// Partial results: one a query and segment.
    pub(super) n_partials: usize,
}

impl Tasks {
    pub(super) fn plan(
        shape: AttentionShape,
        spans: &[AttentionSpan<'_>],
        n_threads: usize,
    ) -> Tasks {
        let group = shape.n_heads / shape.n_kv_heads;
        let n_queries: usize = spans.iter().map(|s| s.n_rows).sum::<usize>() * shape.n_heads;
        let seen = |s: &AttentionSpan<'_>| {
            let first = shape.window.map_or(0, |w| (s.first_position + 1).saturating_sub(w));
            first..s.first_position + s.n_rows
        };
        let work: usize =
            spans.iter().map(|s| s.n_rows * seen(s).len() * shape.n_heads * shape.head_dim).sum();
        let alone = work < ALONE;
        // Queries that share a task read the keys once; enough tasks to keep all threads busy.
        let task_queries = if alone {
            group.max(4)
        } else {
            (n_queries / (4 * n_threads)).clamp(group.min(TASK_QUERIES), TASK_QUERIES)
        };
        let n_tasks: usize = spans.iter().map(|s| (s.n_rows * group).div_ceil(task_queries)).sum();
        let mut tasks = Tasks { all: Vec::new(), alone, spans: Vec::new(), n_partials: 0 };
        for span in spans {
            let seen = seen(span);
            let segments = seen.start / SEGMENT..seen.end.div_ceil(SEGMENT);
            let n_partials = span.n_rows * shape.n_heads * segments.len();
            tasks.spans.push((tasks.n_partials, segments));
            tasks.n_partials += n_partials;
        }
        let few = n_threads > 1 && n_tasks * shape.n_kv_heads < 4 * n_threads;
        let splits = few && !alone && tasks.n_partials <= MOST_PARTIALS;
        if !splits {
            tasks.n_partials = 0;
        }
        for (i, span) in spans.iter().enumerate() {
            for kv_head in 0..shape.n_kv_heads {
                let n = span.n_rows * group;
                for start in (0..n).step_by(task_queries) {
                    let range = start..n.min(start + task_queries);
                    let task = |segment| Task { span: i, kv_head, range: range.clone(), segment };
                    if splits {
                        tasks.all.extend(tasks.spans[i].1.clone().map(|s| task(Some(s))));
                    } else {
                        tasks.all.push(task(None));
                    }
                }
            }
        }
        tasks
    }

    pub(super) fn places(&self, span: usize, kv_head: usize, shape: AttentionShape) -> Places {
        let (first, segments) = self.spans[span].clone();
        // Of queries (row, head) the first span's come first, and all rows of a KV head together.
        let next = self.spans.get(span + 1).map_or(self.n_partials, |(next, _)| *next);
        let first = first + (next - first) / shape.n_kv_heads * kv_head;
        Places { first, segments }
    }
}

/// Where the partial results of the queries of one span and KV head are.
#[derive(Clone)]
pub(super) struct Places {
    first: usize,
    segments: Range<usize>,
}

impl Places {
    pub(super) fn of(&self, query: usize, segment: usize) -> usize {
        self.first + query * self.segments.len() + segment - self.segments.start
    }
}
