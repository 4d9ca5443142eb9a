//! A generation as a stream.

use std::{
    future,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use axum::response::Response;

use super::{
    Shared, answers,
    generation::{Run, Times},
    loading::Ended,
    lock,
    sse::{self, Reader, Sink},
};

/// Counts a stream that is dropped before its end.
struct Leaving {
    shared: Arc<Shared>,
    has_ended: bool,
}

impl Leaving {
    /// Takes it whole, where a closure would take its parts.
    fn ended(mut self) {
        self.has_ended = true;
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if !self.has_ended {
            self.shared.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// The response of a run that streams.
pub(super) fn answer(shared: Arc<Shared>, run: Run) -> Response {
    let ping = shared.options.ping;
    let leaving = Leaving { shared, has_ended: false };
    sse::respond(ping, Reader::Needed, |sink| async move {
        write(&leaving.shared, run, &sink).await;
        leaving.ended();
    })
}

async fn write(shared: &Shared, mut run: Run, sink: &Sink) {
    if run.lacks_limit {
        sink.error("unsupported operand type(s) for +=: 'NoneType' and 'int'").await;
        return;
    }
    match emit(shared, &mut run, sink).await {
        Ok(()) => sink.done().await,
        Err(Ended) if shared.faults().hangs_after_unload => {
            // The job has gone, or a load would wait for it; only pings follow.
            drop(run);
            future::pending().await
        }
        Err(Ended) => {
            let text = run.abort_text();
            shared.fell_ill(&text);
            sink.error(&text).await;
        }
    }
}

async fn emit(shared: &Shared, run: &mut Run, sink: &Sink) -> Result<(), Ended> {
    let begin = Instant::now();
    run.job.warm_up(shared.faults().slow_first).await?;
    let first = Instant::now();
    let n_steps = run.n_steps();
    // With usage, the end of the choice that ends last is the end of all.
    let last = run.choices.iter().rposition(|choice| choice.tokens.len() == n_steps);
    for step in 0..=n_steps {
        if step < n_steps {
            run.job.pause(shared.options.token_time).await?;
        }
        for index in 0..run.choices.len() {
            let choice = &run.choices[index];
            let n_tokens = choice.tokens.len();
            if step < n_tokens && !choice.held {
                let token = &choice.tokens[step..=step];
                let chunk = answers::chunk(run, index, token, &mut lock(&shared.tokens));
                sink.send(&chunk).await;
            }
            if step != n_tokens {
                continue;
            }
            if let Some(call) = &choice.call {
                sink.send(&answers::call_chunk(run, index, call)).await;
            } else if choice.held && n_tokens > 0 {
                let chunk = answers::chunk(run, index, &choice.tokens, &mut lock(&shared.tokens));
                sink.send(&chunk).await;
            }
            if run.include_usage && last == Some(index) {
                let times = Times { prompt: first - begin, completion: first.elapsed() };
                sink.send(&answers::usage_chunk(run, index, times)).await;
            } else {
                sink.send(&answers::last_chunk(run, index)).await;
            }
        }
    }
    Ok(())
}
