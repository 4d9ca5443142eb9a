//! Writes the body of a reply while the upstream's comes in.
//!
//! Each body has a task, which ends at once when its client leaves, and the upstream's body with it.

use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use futures_util::stream;
use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::shape::{Edit, half};
use super::sse::{Event, Events, Role};
use super::state::{Open, Ticket};

const PING_EVERY: Duration = Duration::from_millis(50);
/// How long written bytes have before the connection is broken. What the server still holds in its
/// buffer then is lost, and a test could not say how much arrives.
const FLUSH: Duration = Duration::from_millis(10);

/// What to write.
pub(super) enum Plan {
    /// All of it, as it comes.
    Pass(Source),
    /// All of it, a byte at a time.
    Drip(Source, Duration),
    /// This, and then break the connection.
    Sever(Bytes),
    /// So many data events, and then break the connection.
    Cut(Source, usize),
    /// So many data events.
    EndEarly(Source, usize),
    /// So many data events, and then pings.
    Ping(Source, usize),
    /// All events up to the last with data, and half of that.
    Halve(Source),
    /// All events, their data edited.
    Edit(Source, Edit),
}

/// The body of a reply of the upstream's, which works until this is dropped.
pub(super) struct Source {
    body: Body,
    open: Open,
}

impl Source {
    pub(super) fn new(body: Body, open: Open) -> Source {
        Source { body, open }
    }

    fn into_events(self) -> (Events, Open) {
        (Events::new(self.body), self.open)
    }
}

/// Why a body ended before its plan did.
enum Stop {
    ClientLeft,
    Upstream,
}

impl From<io::Error> for Stop {
    fn from(_: io::Error) -> Stop {
        Stop::Upstream
    }
}

/// The body that `plan` writes.
pub(super) fn write(ticket: Ticket, plan: Plan) -> Body {
    let (sender, mut receiver) = mpsc::channel(1);
    let client = sender.clone();
    tokio::spawn(async move {
        tokio::select! {
            // A client may leave in the moment in which it has got everything; then it has not left.
            biased;
            () = run(Out { sender, ticket }, plan) => {}
            () = client.closed() => {}
        }
    });
    Body::from_stream(stream::poll_fn(move |context| receiver.poll_recv(context)))
}

async fn run(mut out: Out, plan: Plan) {
    let written = match plan {
        Plan::Pass(source) => out.pass(source).await,
        Plan::Drip(source, every) => out.drip(source, every).await,
        Plan::Sever(text) => out.sever(text).await,
        Plan::Cut(source, events) => out.cut(source, events).await,
        Plan::EndEarly(source, events) => {
            out.events(source, events, |role| matches!(role, Role::Finish | Role::End)).await
        }
        Plan::Ping(source, events) => out.ping(source, events).await,
        Plan::Halve(source) => out.halve(source).await,
        Plan::Edit(source, edit) => out.edit(source, &edit).await,
    };
    match written {
        Ok(()) => out.ticket.end(),
        Err(Stop::ClientLeft) => {}
        Err(Stop::Upstream) => out.abort().await,
    }
}

/// The client's side.
struct Out {
    sender: mpsc::Sender<io::Result<Bytes>>,
    ticket: Ticket,
}

impl Out {
    async fn send(&self, bytes: impl Into<Bytes>) -> Result<(), Stop> {
        self.sender.send(Ok(bytes.into())).await.map_err(|_| Stop::ClientLeft)
    }

    /// Breaks the connection.
    async fn abort(&mut self) {
        self.ticket.end();
        sleep(FLUSH).await;
        // Who has left needs no broken connection.
        drop(self.sender.send(Err(io::Error::other("cut by the fault proxy"))).await);
    }

    async fn pass(&mut self, mut source: Source) -> Result<(), Stop> {
        let mut tail = Tail::default();
        while let Some(bytes) = next_bytes(&mut source).await? {
            let ends = tail.ends_with(&bytes);
            self.send(bytes).await?;
            if ends {
                self.ticket.end();
            }
            // After the last byte of a known length nobody asks for more.
            if source.body.is_end_stream() {
                break;
            }
        }
        Ok(())
    }

    async fn drip(&mut self, mut source: Source, every: Duration) -> Result<(), Stop> {
        let mut tail = Tail::default();
        while let Some(bytes) = next_bytes(&mut source).await? {
            let ends = tail.ends_with(&bytes);
            for index in 0..bytes.len() {
                sleep(every).await;
                self.send(bytes.slice(index..=index)).await?;
            }
            if ends {
                self.ticket.end();
            }
            if source.body.is_end_stream() {
                break;
            }
        }
        Ok(())
    }

    async fn sever(&mut self, text: Bytes) -> Result<(), Stop> {
        self.send(text).await?;
        self.abort().await;
        Ok(())
    }

    async fn cut(&mut self, source: Source, events: usize) -> Result<(), Stop> {
        self.events(source, events, |role| role == Role::End).await?;
        self.abort().await;
        Ok(())
    }

    async fn ping(&mut self, source: Source, events: usize) -> Result<(), Stop> {
        self.events(source, events, |role| role == Role::End).await?;
        loop {
            sleep(PING_EVERY).await;
            self.send(": ping\n\n").await?;
        }
    }

    /// Sends events until so many with data are out, or the next one has such a role. The upstream
    /// is left then.
    async fn events(
        &mut self,
        source: Source,
        mut left: usize,
        stops: fn(Role) -> bool,
    ) -> Result<(), Stop> {
        let (mut events, _open) = source.into_events();
        while left > 0 {
            let Some(event) = events.next().await? else {
                break;
            };
            let role = event.role();
            if stops(role) {
                break;
            }
            left -= usize::from(role != Role::Other);
            self.send(event.text).await?;
        }
        Ok(())
    }

    async fn halve(&mut self, source: Source) -> Result<(), Stop> {
        let (mut events, _open) = source.into_events();
        // Which event was the last is known with the next one only.
        let mut last = None::<Event>;
        while let Some(event) = events.next().await? {
            match event.role() {
                Role::Other => self.send(event.text).await?,
                Role::Part | Role::Finish => {
                    if let Some(whole) = last.replace(event) {
                        self.send(whole.text).await?;
                    }
                }
                Role::End => break,
            }
        }
        if let Some(event) = last {
            let data = half(event.data().unwrap_or_default());
            self.send(event.with_data(&data).text).await?;
        }
        Ok(())
    }

    async fn edit(&mut self, source: Source, edit: &Edit) -> Result<(), Stop> {
        let (mut events, _open) = source.into_events();
        while let Some(event) = events.next().await? {
            let edited = event.data().map(|data| edit.apply(Bytes::copy_from_slice(data)));
            let role = event.role();
            let event =
                edited.map_or_else(|| event.text.clone(), |data| event.with_data(&data).text);
            self.send(event).await?;
            if role == Role::End {
                self.ticket.end();
            }
        }
        Ok(())
    }
}

async fn next_bytes(source: &mut Source) -> io::Result<Option<Bytes>> {
    while let Some(frame) = source.body.frame().await {
        // Trailers go no further: HTTP/1.1 allows their loss.
        if let Ok(bytes) = frame.map_err(io::Error::other)?.into_data() {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// The end of what has passed, to know the end event of a stream without taking it apart.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    const BYTES: usize = 64;
    const STOP: &[u8] = b"event: message_stop";

    fn ends_with(&mut self, bytes: &[u8]) -> bool {
        self.0.extend_from_slice(&bytes[bytes.len().saturating_sub(Tail::BYTES)..]);
        let surplus = self.0.len().saturating_sub(Tail::BYTES);
        self.0.drain(..surplus);
        let done = self.0.trim_ascii_end().ends_with(b"[DONE]");
        done || self.0.windows(Tail::STOP.len()).any(|window| window == Tail::STOP)
    }
}
