//! Keys and hosts: every route but livez and readyz is denied by default.

use axum::{
    body::Body,
    http::{Method, Request, StatusCode, header},
};

use crate::support::{KEY, cold, request, warm};

#[tokio::test]
async fn every_route_needs_a_key_even_one_that_does_not_exist() {
    let server = cold(&[KEY], None);
    let paths = [
        "/v1/models",
        "/v1/models/x",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/tokenize",
        "/v1/detokenize",
        "/v1/ask",
        "/v1/exrail/config",
        "/v1/exrail/sessions",
        "/v1/exrail/sessions/x",
        "/v1/exrail/sessions/x/restore",
        "/metrics",
        "/",
        "/no/such/route",
    ];
    for path in paths {
        for method in [Method::GET, Method::POST, Method::DELETE] {
            for key in [None, Some("0123456789abcdeX")] {
                let answer = server.send(request(method.clone(), path, key, Body::empty())).await;
                assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
                assert_eq!(answer.headers[header::WWW_AUTHENTICATE], "Bearer");
            }
        }
    }
    for path in ["/livez", "/readyz"] {
        let answer = server.get(path).await;
        assert_ne!(answer.status, StatusCode::UNAUTHORIZED, "{path}");
    }
}

#[tokio::test]
async fn the_right_key_is_let_in_and_an_unknown_route_is_404() {
    let server = warm(&[KEY], None);
    let models = request(Method::GET, "/v1/models", Some(KEY), Body::empty());
    assert_eq!(server.send(models).await.status, StatusCode::OK);
    let nothing = request(Method::GET, "/nothing", Some(KEY), Body::empty());
    let answer = server.send(nothing).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert_eq!(answer.code(), "no_such_route");
}

#[tokio::test]
async fn without_keys_a_foreign_host_name_is_refused() {
    let server = warm(&[], None);
    let foreign = Request::builder()
        .uri("/v1/models")
        .header(header::HOST, "evil.example")
        .body(Body::empty())
        .unwrap();
    let answer = server.send(foreign).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert_eq!(answer.code(), "foreign_host");
    assert_eq!(server.get("/v1/models").await.status, StatusCode::OK);
}
