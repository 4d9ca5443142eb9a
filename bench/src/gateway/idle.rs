//! Many open streams in which hardly anything happens: what they cost the gateway.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use exrail_testkit::ScriptedUpstream;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, StatusCode,
    body::{Bytes, Incoming},
};
use tokio::{runtime::Runtime, sync::Semaphore, task::JoinSet, time::timeout};

use super::{
    GatewayArguments,
    load::{self, Client, Form},
    process::Process,
    scripted,
};
use crate::machine::Resident;

/// Streams that are being opened at once: a crowd of them would only fill the queue of connections.
const OPENING: usize = 64;
/// Until the first event of a stream.
const LIMIT: Duration = Duration::from_secs(30);

/// What so many streams did to the gateway.
#[derive(Debug)]
pub(super) struct Idle {
    pub(super) n_asked: usize,
    /// Of which the first event came.
    pub(super) n_opened: usize,
    /// Of those, open still at the end.
    pub(super) n_held: usize,
    pub(super) errors: BTreeMap<String, usize>,
    /// Until the last one was open.
    pub(super) opening_s: f64,
    pub(super) before: Resident,
    pub(super) opened: Resident,
    pub(super) held: Resident,
    /// Processor time of the gateway while they were held, over the time that passed.
    pub(super) processor_share: f64,
}

/// Opens `n` streams, holds them for the seconds of a leg, and counts.
pub(super) fn run(runtime: &Runtime, arguments: &GatewayArguments, n: usize) -> Result<Idle> {
    let upstream = ScriptedUpstream::start(scripted()).context("the scripted upstream")?;
    let folder = tempfile::tempdir()?;
    let traces = folder.path().join("gateway.jsonl");
    let gateway = Process::start(runtime, &arguments.exrail, &upstream.url(), traces)?;
    // Only now, as the fence has it generate some dozen times before it opens.
    upstream.set_token(Duration::from_secs(arguments.pause_s));
    writeln!(io::stderr(), "{n} idle streams")?;
    let before = gateway.memory()?;
    let begun = Instant::now();
    let (mut streams, errors) = runtime.block_on(open_all(&gateway.url, n))?;
    let opening_s = begun.elapsed().as_secs_f64();
    let (opened, time) = (gateway.memory()?, gateway.processor_time()?);
    let since = Instant::now();
    thread::sleep(Duration::from_secs(u64::from(arguments.seconds)));
    let spent = gateway.processor_time()?.saturating_sub(time);
    let processor_share = spent.as_secs_f64() / since.elapsed().as_secs_f64();
    let held = gateway.memory()?;
    let n_opened = streams.len();
    let n_held = runtime.block_on(async {
        let mut n_held = 0;
        for stream in &mut streams {
            n_held += usize::from(is_open(stream).await);
        }
        n_held
    });
    drop(streams);
    gateway.stop(runtime)?;
    Ok(Idle {
        n_asked: n,
        n_opened,
        n_held,
        errors,
        opening_s,
        before,
        opened,
        held,
        processor_share,
    })
}

async fn open_all(url: &str, n: usize) -> Result<(Vec<Incoming>, BTreeMap<String, usize>)> {
    let (client, request) = (load::client(), load::request(url, Form::Streamed)?);
    let places = Arc::new(Semaphore::new(OPENING));
    let mut opening = JoinSet::new();
    for _ in 0..n {
        let place = Arc::clone(&places).acquire_owned().await?;
        let (client, request) = (client.clone(), request.clone());
        opening.spawn(async move {
            let opened = timeout(LIMIT, open(&client, request)).await;
            drop(place);
            opened.unwrap_or_else(|_| Err(format!("no event within {} s", LIMIT.as_secs())))
        });
    }
    let (mut streams, mut errors) = (Vec::new(), BTreeMap::new());
    while let Some(opened) = opening.join_next().await {
        match opened? {
            Ok(stream) => streams.push(stream),
            Err(reason) => *errors.entry(reason).or_default() += 1,
        }
    }
    Ok((streams, errors))
}

/// A stream whose first event is there.
async fn open(client: &Client, request: Request<Full<Bytes>>) -> Result<Incoming, String> {
    let response = client.request(request).await.map_err(|error| load::causes(&error))?;
    if response.status() != StatusCode::OK {
        return Err(format!("status {}", response.status().as_u16()));
    }
    let mut body = response.into_body();
    match body.frame().await {
        Some(Ok(_)) => Ok(body),
        Some(Err(error)) => Err(load::causes(&error)),
        None => Err("an end before the first event".to_owned()),
    }
}

/// Whether neither an end nor an error has come.
async fn is_open(stream: &mut Incoming) -> bool {
    loop {
        // What waits to be read is read; a stream from which nothing waits is one that goes on.
        let Ok(next) = timeout(Duration::ZERO, stream.frame()).await else { return true };
        let Some(Ok(frame)) = next else { return false };
        let text = frame.data_ref().map(|data| String::from_utf8_lossy(data));
        if text.is_some_and(|text| text.contains("[DONE]") || text.contains(r#""error""#)) {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_in_a_pause_is_open_and_one_at_its_end_is_not() {
        let runtime = crate::gateway::runtime().unwrap();
        let upstream = ScriptedUpstream::start(scripted()).unwrap();
        upstream.set_token(Duration::from_secs(600));
        let (mut streams, errors) = runtime.block_on(open_all(&upstream.url(), 3)).unwrap();
        assert_eq!((streams.len(), errors.len()), (3, 0), "{errors:?}");
        for stream in &mut streams {
            assert!(runtime.block_on(is_open(stream)));
        }
        drop(upstream);
        // Its connections end with it; until they do, nothing waits to be read.
        for mut stream in streams {
            runtime.block_on(async { while is_open(&mut stream).await {} });
        }
    }
}
