//! `POST /v1/diagnostics`: who may, one at a time, and what becomes of a measurement that fails.

use std::sync::{Arc, Barrier};

use axum::http::StatusCode;
use exrail_server::{Diagnostics, DiagnosticsError, Services};
use exrail_wire::DiagnosticsRequest;
use serde_json::{Value, json};

use crate::support::warm;

const ROUTE: &str = "/v1/diagnostics";

/// Says what it was asked; a gold set may make it wait or fail.
struct Fake(Arc<Barrier>);

impl Diagnostics for Fake {
    fn report(
        &self,
        services: &Services,
        collection: &str,
        asked: &DiagnosticsRequest,
        is_over: &dyn Fn() -> bool,
    ) -> Result<(String, Value), DiagnosticsError> {
        match &*asked.gold {
            "wrong" => {
                let problem = "expected JSON".to_owned();
                return Err(DiagnosticsError::Refused { field: "gold", problem });
            }
            "broken" => return Err(DiagnosticsError::Failed("the index is gone".into())),
            "slow" => {
                self.0.wait();
                self.0.wait();
            }
            "endless" => {
                self.0.wait();
                while !is_over() {
                    std::thread::yield_now();
                }
                self.0.wait();
                return Err(DiagnosticsError::Over);
            }
            _ => {}
        }
        let (model, deep) = (&services.model_name, asked.deep);
        let report = json!({ "model": model, "collection": collection, "deep": deep });
        Ok(("probe-1".into(), report))
    }
}

#[tokio::test]
async fn a_report_is_answered_and_traced() {
    let server = warm(&[], None);
    let body = json!({ "gold": "{}", "deep": true });
    let without = server.post(ROUTE, &body).await;
    assert_eq!(
        (without.status, without.code()),
        (StatusCode::NOT_IMPLEMENTED, "not_available".into())
    );
    server.state.diagnose_with(Arc::new(Fake(Arc::new(Barrier::new(2)))));
    let answer = server.post(ROUTE, &body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let expected = json!({ "model": "tiny", "collection": "cabinets", "deep": true });
    assert_eq!(answer.json(), expected);
    let lines = server.trace_lines();
    let record = lines.last().unwrap();
    assert_eq!((&record["event"], &record["trace_id"]), (&json!("probe.run"), &json!("probe-1")));
    assert_eq!(record["report"], expected);
    for (wrong, status, code) in [
        (json!({ "gold": "wrong" }), 400, "invalid_value"),
        (json!({ "gold": "broken" }), 500, "diagnosis_failed"),
        (json!({ "gold": "{}", "depth": 3 }), 400, "unsupported_field"),
        (json!({ "gold": "{}", "collection": "nowhere" }), 404, "collection_not_found"),
        (json!({ "gold": "{}", "model": "nobody" }), 404, "model_not_found"),
        (json!({}), 400, "invalid_json"),
    ] {
        let answer = server.post(ROUTE, &wrong).await;
        assert_eq!((answer.status.as_u16(), &*answer.code()), (status, code), "{}", answer.text);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_diagnoses_do_not_measure_each_other() {
    let server = Arc::new(warm(&[], None));
    let barrier = Arc::new(Barrier::new(2));
    server.state.diagnose_with(Arc::new(Fake(Arc::clone(&barrier))));
    let first = Arc::clone(&server);
    let first = tokio::spawn(async move { first.post(ROUTE, &json!({ "gold": "slow" })).await });
    let wait = |barrier: &Arc<Barrier>| {
        let barrier = Arc::clone(barrier);
        tokio::task::spawn_blocking(move || barrier.wait())
    };
    wait(&barrier).await.unwrap();
    let second = server.post(ROUTE, &json!({ "gold": "{}" })).await;
    assert_eq!((second.status.as_u16(), &*second.code()), (503, "diagnosis_running"));
    wait(&barrier).await.unwrap();
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
    assert_eq!(server.post(ROUTE, &json!({ "gold": "{}" })).await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_ends_when_nobody_waits_for_it() {
    let server = Arc::new(warm(&[], None));
    let barrier = Arc::new(Barrier::new(2));
    server.state.diagnose_with(Arc::new(Fake(Arc::clone(&barrier))));
    let asking = Arc::clone(&server);
    let asked =
        tokio::spawn(async move { asking.post(ROUTE, &json!({ "gold": "endless" })).await });
    let wait = |barrier: &Arc<Barrier>| {
        let barrier = Arc::clone(barrier);
        tokio::task::spawn_blocking(move || barrier.wait())
    };
    wait(&barrier).await.unwrap();
    asked.abort();
    // It has seen that nobody waits: without that this would wait for ever.
    wait(&barrier).await.unwrap();
}
