//! Whoever hangs up gives everything back, also where the answer is not streamed: real sockets.

use std::{
    convert::Infallible,
    io::Write,
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{body::Body, http::Method};
use exrail_engine::{Counters, EngineOptions, GenerateRequest};
use exrail_server::{Limits, bind, pipeline::AskCall, router, serve};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::{
    faulty::Faulty,
    support::{MODEL, Server, cpu, endless, request, start, warm_on},
};

/// A step takes 2 ms and more, so that no answer ends before somebody hangs up.
fn slow() -> Server {
    let backend = Faulty { delay: Duration::from_millis(2), ..Faulty::new(cpu()) };
    warm_on(start(backend, EngineOptions::default(), |_| {}), &[], Limits::default())
}

async fn listen(server: &Server) -> SocketAddr {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = bind(&server.state, any).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(Arc::clone(&server.state), listener, std::future::pending()));
    address
}

/// Sends a request and says nothing more.
fn send(address: SocketAddr, path: &str, body: &Value) -> TcpStream {
    let body = body.to_string();
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    stream
}

fn counters(server: &Server) -> Counters {
    server.state.services().unwrap().engine.counters()
}

/// Waits until it holds of the counters.
async fn until(server: &Server, holds: impl Fn(&Counters) -> bool) -> Counters {
    let limit = Instant::now() + Duration::from_secs(20);
    loop {
        let counters = counters(server);
        if holds(&counters) {
            return counters;
        }
        assert!(Instant::now() < limit, "{counters:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn is_idle(counters: &Counters) -> bool {
    counters.sequences_running + counters.sequences_waiting == 0
        && counters.pages_free == counters.pages_total
}

fn requests(server: &Server) -> [(&'static str, Value); 4] {
    let chat = |stream: bool| {
        json!({"model": MODEL, "max_tokens": 1500, "logit_bias": endless(server), "stream": stream,
            "messages": [{"role": "user", "content": "hello"}]})
    };
    let bias = endless(server);
    let complete = json!({"model": MODEL, "prompt": "ab", "max_tokens": 1500, "logit_bias": bias});
    let question = "Where is the spare key of cabinet B?";
    let ask = json!({"question": question, "max_tokens": 1000, "logit_bias": bias});
    [
        ("/v1/chat/completions", chat(false)),
        ("/v1/chat/completions", chat(true)),
        ("/v1/completions", complete),
        ("/v1/ask", ask),
    ]
}

/// H1, H3, H5: on every route, streamed or not, the sequence ends and its pages are free.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_connection_ends_the_sequence_on_every_route() {
    let server = slow();
    let address = listen(&server).await;
    for (n, (path, body)) in requests(&server).into_iter().enumerate() {
        let before = counters(&server).tokens_generated;
        let stream = send(address, path, &body);
        until(&server, |now| now.tokens_generated > before + 2).await;
        let hung_up = Instant::now();
        drop(stream);
        let after = until(&server, is_idle).await;
        // Two steps of 2 ms, and what a busy machine adds to them.
        assert!(hung_up.elapsed() < Duration::from_secs(1), "{path}: {:?}", hung_up.elapsed());
        assert_eq!(after.cancelled, n as u64 + 1, "{path}");
        assert!(after.tokens_generated < before + 900, "{path}: it ended before its limit");
    }
    assert_eq!((counters(&server).panics, counters(&server).failed), (0, 0));
    // G-14: what nobody reads leaves its record, too.
    let limit = Instant::now() + Duration::from_secs(20);
    while server.trace_lines().len() < 5 {
        assert!(Instant::now() < limit, "{:?}", server.trace_lines());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let lines = server.trace_lines();
    let cancelled = lines.iter().filter(|line| line["finish_reason"] == "cancelled").count();
    let asked = lines.iter().filter(|line| line["guard"] == "client_gone").count();
    assert_eq!((cancelled, asked), (3, 1), "{lines:?}");
    // The question had searched.
    let [.., search, gone] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!((&search["event"], &gone["guard"]), (&json!("retrieve.run"), &json!("client_gone")));
    assert_eq!(search["trace_id"], gone["trace_id"]);
    assert_eq!(search["retrieved"].as_array().unwrap().len(), 2);
    // The one that waited is answered as if nothing had been.
    let body = json!({"model": MODEL, "prompt": "ab", "max_tokens": 2});
    assert_eq!(server.post("/v1/completions", &body).await.status, 200);
}

/// In the queue, where nothing is sent and nothing is computed.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_connection_leaves_the_queue() {
    let backend = Faulty { delay: Duration::from_millis(2), ..Faulty::new(cpu()) };
    let options = EngineOptions { max_sequences: 1, ..EngineOptions::default() };
    let server = warm_on(start(backend, options, |_| {}), &[], Limits::default());
    let address = listen(&server).await;
    let engine = server.state.services().unwrap().engine.clone();
    let request = GenerateRequest { stop_at_eos: false, ..GenerateRequest::new(vec![5], 1900) };
    let running = engine.submit(request).unwrap();
    until(&server, |now| now.sequences_running == 1).await;
    for (path, body) in requests(&server) {
        let stream = send(address, path, &body);
        until(&server, |now| now.sequences_waiting == 1).await;
        drop(stream);
        until(&server, |now| now.sequences_waiting == 0).await;
    }
    drop(running);
    until(&server, is_idle).await;
}

/// The mutation: a handler that outlives its connection generates to the end, for nobody.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_link_to_the_connection_an_answer_is_generated_for_nobody() {
    let server = slow();
    let body =
        json!({"model": MODEL, "prompt": "ab", "max_tokens": 200, "logit_bias": endless(&server)});
    let request = request(Method::POST, "/v1/completions", None, Body::from(body.to_string()));
    let before = counters(&server);
    // Dropping the handle does not drop the task.
    drop(tokio::spawn(router(Arc::clone(&server.state)).oneshot(request)));
    let after = until(&server, |now| now.finished == before.finished + 1).await;
    assert_eq!(after.tokens_generated, before.tokens_generated + 200);
    assert_eq!(after.cancelled, before.cancelled);
}

/// The same for a question, which a thread of its own waits for.
#[tokio::test(flavor = "multi_thread")]
async fn a_question_ends_with_its_asker_and_without_the_link_it_goes_on() {
    let server = slow();
    let asker = Arc::clone(&server.state.services().unwrap().collections["cabinets"]);
    let ask = move |hung_up: Option<flume::Receiver<Infallible>>| {
        let call = AskCall { max_tokens: 100, hung_up, ..AskCall::default() };
        asker.ask("Where is the spare key of cabinet B?", &call).map(|asked| asked.outcome.reply)
    };
    let (waits, hung_up) = flume::bounded(0);
    drop(waits);
    let told = tokio::task::block_in_place(|| ask(Some(hung_up))).unwrap_err();
    assert_eq!(told.code(), "client_gone");
    let cancelled = until(&server, is_idle).await;
    assert_eq!(cancelled.cancelled, 1);
    let reply = tokio::task::block_in_place(|| ask(None)).unwrap().unwrap();
    assert!(reply.n_output_tokens > 0);
    assert_eq!(counters(&server).cancelled, 1);
}
