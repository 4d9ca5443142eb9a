//! How long a connection may take and how much it may say before it is answered: real sockets.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use exrail_server::{Limits, bind, router, serve};
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::net::TcpListener;

use crate::support::{Server, cpu, four, start, warm_on};

/// Short, so that the test is.
const TIME: Duration = Duration::from_millis(400);

async fn listen() -> (Server, SocketAddr) {
    let limits = Limits { head_timeout: TIME, body_timeout: TIME, ..Limits::default() };
    let server = warm_on(start(cpu(), four(), |_| {}), &[], limits);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = bind(&server.state, any).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(Arc::clone(&server.state), listener, std::future::pending()));
    (server, address)
}

/// What comes back for these bytes until the server closes, and after how long.
async fn told(address: SocketAddr, bytes: Vec<u8>) -> (String, Duration) {
    let talk = move || {
        let started = Instant::now();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // The server may close while it is still told things.
        stream.write_all(&bytes).ok();
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
        }
        (String::from_utf8_lossy(&answer).into_owned(), started.elapsed())
    };
    tokio::task::spawn_blocking(talk).await.unwrap()
}

#[tokio::test]
async fn a_head_that_does_not_come_ends_the_connection() {
    let (_server, address) = listen().await;
    for begun in ["", "GET /livez HTTP/1.1\r\nhost: local"] {
        let (_, took) = told(address, begun.into()).await;
        assert!((TIME..TIME * 20).contains(&took), "{begun:?}: {took:?}");
    }
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_its_answer() {
    let (_server, address) = listen().await;
    let asked = "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let (answer, took) = told(address, asked.into()).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!((TIME..TIME * 20).contains(&took), "{took:?}");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_408() {
    let (_server, address) = listen().await;
    let begun =
        "POST /v1/tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{\"text\":";
    let (answer, _) = told(address, begun.into()).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

/// A request with so many header fields of such a length.
fn fields(n: usize, len: usize) -> Vec<u8> {
    let field = |i| format!("x-{i}: {}\r\n", "a".repeat(len));
    let fields: String = (0..n).map(field).collect();
    format!("GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{fields}\r\n")
        .into_bytes()
}

#[tokio::test]
async fn too_many_header_fields_and_too_long_ones_are_431() {
    let (_server, address) = listen().await;
    let (answer, _) = told(address, fields(20, 100)).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for (n, len) in [(100, 10), (1, 100_000)] {
        let (answer, _) = told(address, fields(n, len)).await;
        let closed = answer.is_empty();
        assert!(closed || answer.starts_with("HTTP/1.1 431"), "{n} of {len}: {answer}");
    }
}

/// The mutation: the same routes behind a connection without our limits. What is 431 or closed above is answered, and
/// a head that does not come keeps its connection for as long as its sender likes.
#[tokio::test]
async fn mutation_without_the_limits_of_a_connection_any_head_is_read_and_waited_for() {
    let (server, _) = listen().await;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = router(Arc::clone(&server.state));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = TowerToHyperService::new(router.clone());
            let mut connection = http1::Builder::new();
            connection.max_headers(10_000).max_buf_size(64 << 20);
            tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
        }
    });
    for (n, len) in [(100, 10), (1, 100_000)] {
        let (answer, _) = told(address, fields(n, len)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{n} of {len}: {answer}");
    }
    let waits = move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(TIME * 5)).unwrap();
        stream.write_all(b"GET /livez HTTP/1.1\r\nhost: local").unwrap();
        stream.read(&mut [0; 64]).map_err(|error| error.kind())
    };
    let heard = tokio::task::spawn_blocking(waits).await.unwrap();
    assert!(matches!(heard, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)), "{heard:?}");
}
