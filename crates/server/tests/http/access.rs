//! Keys, roles, hosts and origins: every route but livez and readyz is denied by default.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use axum::{
    body::Body,
    http::{Method, Request, StatusCode, header},
};
use exrail_server::{Access, Keys, ROUTES, Role};
use serde_json::json;
use tracing_subscriber::{filter::LevelFilter, fmt::MakeWriter};

use crate::support::{KEY, MODEL, Server, cold, request, warm};

const ADMIN: &str = "admin-key-of-this-server";
const WRONG: &str = "0123456789abcdeX";

/// The path of a route with a name for each place.
fn path(template: &str) -> String {
    template.replace("{model}", "x").replace("{name}", "x")
}

async fn status(server: &Server, method: &str, path: &str, key: Option<&str>) -> StatusCode {
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    server.send(request(method, path, key, Body::empty())).await.status
}

/// Field fault L4: a prefix test guarded some routes and some spellings of them.
#[tokio::test]
async fn l4_every_route_in_every_spelling_needs_a_key() {
    let server = cold(&[KEY], None);
    let mut spellings = 0;
    for route in ROUTES {
        let plain = path(route.path);
        let rest = plain.strip_prefix("/v1").unwrap_or(&plain);
        let spelled = [
            format!("/{plain}"),
            format!("{plain}/"),
            format!("{plain}//"),
            format!("/V1{rest}"),
            plain.to_ascii_uppercase(),
            format!("/v1/../{}", plain.trim_start_matches('/')),
            format!("/livez/..{plain}"),
            format!("/livez{plain}"),
            format!("/v1/.{rest}"),
            format!("/%76%31{rest}"),
            format!("{plain}%2f"),
            format!("{plain};x=/livez"),
        ];
        let guarded = (route.access != Access::Anyone).then(|| plain.clone());
        for path in spelled.into_iter().chain(guarded) {
            for key in [None, Some(WRONG)] {
                for method in [route.method, "GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
                    let answer = status(&server, method, &path, key).await;
                    assert_eq!(answer, StatusCode::UNAUTHORIZED, "{method} {path} {key:?}");
                    spellings += 1;
                }
            }
        }
    }
    assert!(spellings > 2_500, "{spellings}");
    for path in ["/", "/no/such/route", "*", "/docs", "/openapi.json", "/invocations"] {
        assert_eq!(status(&server, "GET", path, None).await, StatusCode::UNAUTHORIZED, "{path}");
    }
}

#[tokio::test]
async fn l4_only_the_two_health_routes_are_for_anyone() {
    let anyone: Vec<_> = ROUTES.iter().filter(|it| it.access == Access::Anyone).collect();
    let paths: Vec<_> = anyone.iter().map(|route| (route.method, route.path)).collect();
    assert_eq!(paths, [("GET", "/livez"), ("GET", "/readyz")]);
    let server = cold(&[KEY], None);
    for (method, path) in paths {
        let answer = status(&server, method, path, None).await;
        assert_ne!(answer, StatusCode::UNAUTHORIZED, "{path}");
    }
}

#[tokio::test]
async fn a_refusal_says_what_kind_of_key_is_expected() {
    let server = cold(&[KEY], None);
    let answer = server.get("/v1/models").await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    assert_eq!(answer.headers[header::WWW_AUTHENTICATE], "Bearer");
    assert_eq!(answer.code(), "invalid_api_key");
}

/// A user's key opens what is a user's, an administrator's everything; read off the table.
#[tokio::test]
async fn l5_every_route_asks_for_the_role_of_the_table() {
    let server = cold(&[KEY, &format!("{ADMIN} admin")], None);
    let mut for_admins = 0;
    for route in ROUTES {
        let path = path(route.path);
        let user = status(&server, route.method, &path, Some(KEY)).await;
        let admin = status(&server, route.method, &path, Some(ADMIN)).await;
        let denied = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN];
        assert!(!denied.contains(&admin), "{path}: {admin}");
        match route.access {
            Access::Holder(Role::Admin) => {
                assert_eq!(user, StatusCode::FORBIDDEN, "{path}");
                for_admins += 1;
            }
            Access::Anyone | Access::Holder(Role::User) => {
                assert!(!denied.contains(&user), "{path}: {user}");
            }
        }
    }
    assert!(for_admins > 0, "no route is for administrators");
}

#[tokio::test]
async fn l5_keys_are_replaced_while_the_server_runs() {
    let server = warm(&[KEY], None);
    let next = "the-next-key-0123";
    server.state.replace_keys(Keys::new([next]).unwrap()).unwrap();
    assert_eq!(status(&server, "GET", "/v1/models", Some(next)).await, StatusCode::OK);
    assert_eq!(status(&server, "GET", "/v1/models", Some(KEY)).await, StatusCode::UNAUTHORIZED);
    server.state.replace_keys(Keys::default()).unwrap_err();
    assert_eq!(status(&server, "GET", "/v1/models", None).await, StatusCode::UNAUTHORIZED);
}

/// G-22: what one key has asked is not found under another one, nor under one that takes its place.
#[tokio::test]
async fn g22_no_cached_prompt_passes_from_key_to_key() {
    let (second, third) = ("second-key-01234", "third-key-012345");
    let server = warm(&[KEY, second], None);
    let prompt: Vec<u32> = (0..600).map(|i| 3 + i * 7 % 200).collect();
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0});
    let cached = async |key| {
        let sent = Body::from(body.to_string());
        let answer = server.send(request(Method::POST, "/v1/completions", Some(key), sent)).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(KEY).await, 0);
    assert!(cached(KEY).await >= 512, "its own is found");
    assert_eq!(cached(second).await, 0);
    server.state.replace_keys(Keys::new([third, second]).unwrap()).unwrap();
    assert_eq!(cached(third).await, 0, "nor by the key that is now in its place");
    assert!(cached(second).await >= 512, "a key that stays keeps what is its own");
}

#[tokio::test]
async fn the_right_key_is_let_in_and_an_unknown_route_is_404() {
    let server = warm(&[KEY], None);
    assert_eq!(status(&server, "GET", "/v1/models", Some(KEY)).await, StatusCode::OK);
    let nothing = request(Method::GET, "/nothing", Some(KEY), Body::empty());
    let answer = server.send(nothing).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert_eq!(answer.code(), "no_such_route");
}

/// A request of a page at `origin` to a server that it calls `host`.
fn from_page(method: Method, path: &str, host: &str, origin: &str) -> Request<Body> {
    let mut request = request(method, path, None, Body::from("{}"));
    request.headers_mut().insert(header::HOST, host.parse().unwrap());
    request.headers_mut().insert(header::ORIGIN, origin.parse().unwrap());
    request
}

/// Field fault L3: any web page could drive a server on the user's machine.
#[tokio::test]
async fn l3_a_page_of_another_origin_changes_nothing_and_gets_no_grant() {
    let server = warm(&[], None);
    let origins = [
        "https://evil.example",
        "null",
        "http://localhost.evil.example",
        "http://localhost:8321",
        "file://",
        "http://127.0.0.1@evil.example",
    ];
    for origin in origins {
        for route in ROUTES.iter().filter(|route| route.method != "GET") {
            let method = Method::from_bytes(route.method.as_bytes()).unwrap();
            let posted = from_page(method, &path(route.path), "localhost", origin);
            let answer = server.send(posted).await;
            assert_eq!(answer.status, StatusCode::FORBIDDEN, "{origin} {}", route.path);
            assert_eq!(answer.code(), "foreign_origin");
        }
        for (method, path) in
            [(Method::OPTIONS, "/v1/chat/completions"), (Method::GET, "/v1/models")]
        {
            let answer = server.send(from_page(method, path, "localhost", origin)).await;
            let granted =
                answer.headers.keys().find(|it| it.as_str().starts_with("access-control"));
            assert_eq!(granted, None, "{origin} {path}");
        }
    }
    // A page of the server itself, as a proxy in front of it may show one.
    let own = from_page(Method::POST, "/v1/tokenize", "localhost:8321", "http://localhost:8321");
    assert_ne!(server.send(own).await.status, StatusCode::FORBIDDEN);
}

/// Field fault L3: a name that a page points at the loopback address.
#[tokio::test]
async fn l3_without_keys_a_foreign_host_name_is_refused_on_every_route() {
    let server = warm(&[], None);
    for host in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "0x7f.1", ""] {
        for route in ROUTES {
            let method = Method::from_bytes(route.method.as_bytes()).unwrap();
            let mut foreign = request(method, &path(route.path), None, Body::empty());
            foreign.headers_mut().insert(header::HOST, host.parse().unwrap());
            let answer = server.send(foreign).await;
            assert_eq!(answer.status, StatusCode::FORBIDDEN, "{host} {}", route.path);
            assert_eq!(answer.code(), "foreign_host");
        }
    }
    assert_eq!(server.get("/v1/models").await.status, StatusCode::OK);
    assert_eq!(server.get("/livez").await.status, StatusCode::OK);
}

/// Everything that was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}

/// Field fault L5: no key in a log, an error, a record or what the server says of itself.
#[tokio::test]
async fn l5_no_key_is_told_anywhere() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(log.clone())
        .finish();
    let _captures = tracing::subscriber::set_default(subscriber);
    tracing::info!("the log is captured");
    let (user, wrong) = ("user-key-0123456789", "wrong-key-0123456789");
    let server = warm(&[user, &format!("{ADMIN} admin")], None);
    let mut told = Vec::new();
    for route in ROUTES {
        for key in [user, ADMIN, wrong] {
            let method = Method::from_bytes(route.method.as_bytes()).unwrap();
            let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}],
                "prompt": "hi", "max_tokens": 1, "surprise": 1});
            let sent = request(method, &path(route.path), Some(key), Body::from(body.to_string()));
            let answer = server.send(sent).await;
            told.push(format!("{:?} {}", answer.headers, answer.text));
        }
    }
    let keys = Keys::new([user]).unwrap();
    told.push(format!("{keys:?} {:?}", server.state.replace_keys(Keys::default())));
    told.push(std::fs::read_to_string(server.folder.path().join("trace.jsonl")).unwrap());
    let logged = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(logged.contains("the log is captured"));
    told.push(logged);
    for told in told {
        for key in [user, ADMIN, wrong] {
            assert!(!told.contains(key), "{told}");
        }
    }
}
