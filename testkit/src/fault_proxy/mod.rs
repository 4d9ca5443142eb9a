//! [`FaultProxy`]: stands between a client and an OpenAI-compatible upstream and injects one fault
//! at a time, on the wire, where neither of them can tell it from a real one.
//!
//! A *generation* is a `POST` to `/v1/chat/completions`, `/v1/completions` or `/v1/messages`. All
//! other requests pass untouched unless a fault says otherwise. A request meets the fault that is
//! set when it arrives; only [`ProxyFault::Down`] touches replies that have begun.

mod forward;
mod generate;
mod rewrite;
mod shape;
mod sse;
mod state;
mod writer;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request, Response};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use crate::serving::Serving;
use forward::Upstream;
use state::State;

/// What goes wrong. Replies that are refusals already (a status other than 2xx) keep their bodies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProxyFault {
    /// Nothing.
    None,
    /// The first generation after this was set waits so long before it reaches the upstream; the
    /// next ones do not.
    SlowFirst(Duration),
    /// Generations are answered with 200 and no body at all; the upstream is not asked.
    EmptyBody,
    /// A streamed generation loses its connection after so many data events, before its end event
    /// at the latest; a plain one in the middle of its body. Both bodies are chunked and aborted.
    CutStream {
        /// How many data events arrive.
        events: usize,
    },
    /// A streamed generation ends as if all were well after so many data events, or before the
    /// first one that has a finish reason. Plain ones pass.
    EndedEarly {
        /// How many data events arrive.
        events: usize,
    },
    /// A plain generation is the first half of its JSON text, with a content-length that fits. In a
    /// streamed one this happens to the text of the last data event before the end event, which is
    /// left out; the body ends properly.
    HalfJson,
    /// Every JSON body, every data event and every list of models names this model.
    WrongModel(String),
    /// Every `content` and `text` of a generation consists of U+FFFD and control characters, as
    /// many as it had characters.
    Garbage,
    /// The field `seed` of a generation is lost on its way.
    NoSeed,
    /// All fields of a generation that say what form an answer has are lost on their way, and
    /// `tools` with them.
    IgnoresSchema,
    /// Once a client has left a generation before its end, every later one waits until another
    /// fault is set, and meets that one.
    HangAfterCancel,
    /// Everything is answered with 401; the upstream is not asked.
    Unauthorized,
    /// Generations are answered with 429; the upstream is not asked.
    TooMany {
        /// The value of the header `Retry-After`.
        retry_after_s: Option<u64>,
    },
    /// The body of a generation comes one byte at a time.
    SlowLoris {
        /// The time before each byte.
        byte_every: Duration,
    },
    /// A streamed generation is only `: ping` comments after so many data events, one every 50 ms,
    /// before its end event at the latest and without an end. Plain ones pass.
    PingsForEver {
        /// How many data events arrive before.
        events: usize,
    },
    /// Every connection is accepted and closed without an answer. Connections that are open when
    /// this is set are closed too, replies and all, as when a process dies.
    Down,
}

/// A running proxy; it stops when this is dropped.
#[derive(Debug)]
pub struct FaultProxy {
    serving: Serving,
    state: Arc<State>,
}

impl FaultProxy {
    /// Starts on a free port of the loopback, before the upstream at `http://host:port`, which need
    /// not be there: requests are answered with 502 until it is.
    ///
    /// # Errors
    /// When `upstream` is no such address, or no port, thread or runtime is to be had.
    pub fn start(upstream: &str) -> io::Result<FaultProxy> {
        let upstream = Arc::new(Upstream::new(upstream)?);
        let state = Arc::new(State::new());
        let served = Arc::clone(&state);
        let serving = Serving::start("exrail-fault-proxy", move |listener| {
            accept(listener, served, upstream)
        })?;
        Ok(FaultProxy { serving, state })
    }

    /// The base of its routes, `http://host:port`.
    #[must_use]
    pub fn url(&self) -> String {
        self.serving.url()
    }

    /// Ends the fault that is set and begins this one.
    pub fn set(&self, fault: ProxyFault) {
        self.state.set(fault);
    }

    /// How many generations have arrived, those that the proxy itself answers among them.
    #[must_use]
    pub fn generations(&self) -> usize {
        self.state.generations()
    }

    /// How many generations' clients left before the end of their replies. Who leaves after the end
    /// event of a stream has read it whole.
    #[must_use]
    pub fn cancelled(&self) -> usize {
        self.state.cancelled()
    }

    /// How many generations the upstream is still working at.
    #[must_use]
    pub fn open(&self) -> usize {
        self.state.open()
    }
}

async fn accept(listener: TcpListener, state: Arc<State>, upstream: Arc<Upstream>) {
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                tokio::spawn(converse(connection, Arc::clone(&state), Arc::clone(&upstream)));
            }
            // Most often too many open files, which goes by as connections close.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn converse(connection: TcpStream, state: Arc<State>, upstream: Arc<Upstream>) {
    let downs = state.downs();
    if state.is_down() {
        return;
    }
    // A socket that refuses the option is slower, not wrong.
    drop(connection.set_nodelay(true));
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        answer(Arc::clone(&state), Arc::clone(&upstream), request.map(Body::new))
    });
    tokio::select! {
        // An error here is a client that left, or a connection that a fault closed.
        _ = http1::Builder::new().serve_connection(TokioIo::new(connection), service) => {}
        () = state.gone_down_since(downs) => {}
    }
}

async fn answer(
    state: Arc<State>,
    upstream: Arc<Upstream>,
    request: Request<Body>,
) -> io::Result<Response<Body>> {
    if is_generation(&request) {
        return generate::generate(&state, &upstream, request).await;
    }
    match &*state.fault() {
        ProxyFault::Down => Err(generate::closed()),
        ProxyFault::Unauthorized => {
            // A connection with unread bytes is reset, and the reply with it.
            forward::collect(request.into_body()).await?;
            Ok(generate::unauthorized())
        }
        ProxyFault::WrongModel(model) => upstream.pass_renamed(request, model).await,
        ProxyFault::None
        | ProxyFault::SlowFirst(_)
        | ProxyFault::EmptyBody
        | ProxyFault::CutStream { .. }
        | ProxyFault::EndedEarly { .. }
        | ProxyFault::HalfJson
        | ProxyFault::Garbage
        | ProxyFault::NoSeed
        | ProxyFault::IgnoresSchema
        | ProxyFault::HangAfterCancel
        | ProxyFault::TooMany { .. }
        | ProxyFault::SlowLoris { .. }
        | ProxyFault::PingsForEver { .. } => Ok(upstream.pass(request).await),
    }
}

fn is_generation(request: &Request<Body>) -> bool {
    request.method() == Method::POST
        && matches!(
            request.uri().path(),
            "/v1/chat/completions" | "/v1/completions" | "/v1/messages"
        )
}
