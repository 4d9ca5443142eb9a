//! Several upstreams: who is asked, who is asked instead, and what one that is down does to the others.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::{Duration, Instant};

use exrail_gateway::UpstreamOptions;
use exrail_testkit::{FaultProxy, ProxyFault, ScriptedOptions, ScriptedUpstream};
use serde_json::json;

use support::{MODEL, Running, ask, chat, options, scripted, until, upstream};

struct Two {
    servers: [ScriptedUpstream; 2],
    proxies: [FaultProxy; 2],
    running: Running,
}

/// Two upstreams behind proxies, proved.
fn two(models: [&str; 2], change: impl Fn(&mut [UpstreamOptions; 2])) -> Two {
    let servers = models.map(|model| {
        ScriptedUpstream::start(ScriptedOptions { model: model.to_owned(), ..scripted() }).unwrap()
    });
    let proxies = [0, 1].map(|at: usize| FaultProxy::start(&servers[at].url()).unwrap());
    let mut given = [0, 1].map(|at: usize| upstream(["a", "b"][at], &proxies[at].url(), None));
    change(&mut given);
    let running = Running::over(given.into(), options());
    running.prove();
    until("both fences", || running.gateway.upstreams().iter().all(|it| it.proved().is_some()));
    Two { servers, proxies, running }
}

#[test]
fn one_that_is_down_is_replaced_before_the_client_sees_it() {
    for fault in
        [ProxyFault::Down, ProxyFault::EmptyBody, ProxyFault::TooMany { retry_after_s: None }]
    {
        let two = two([MODEL, MODEL], |given| given[1].priority = 1);
        let named = format!("{fault:?}");
        assert!(ask(&two.running.url, &chat("Hello", false)).is_answer());
        assert_eq!(two.running.records("relay.run")[0]["upstream"], "a", "the lower number");
        two.proxies[0].set(fault);
        let reply = ask(&two.running.url, &chat("Hello", false));
        assert!(reply.is_answer(), "{named}: {reply:?}");
        let record = two.running.records("relay.run").pop().unwrap();
        assert_eq!((&record["upstream"], &record["attempts"]), (&json!("b"), &json!(2)), "{named}");
    }
}

#[test]
fn an_answer_that_began_is_not_asked_for_again() {
    let two = two([MODEL, MODEL], |given| given[1].priority = 1);
    let before = two.servers[1].generations();
    two.proxies[0].set(ProxyFault::CutStream { events: 3 });
    let reply = ask(&two.running.url, &chat("Hello", true));
    assert_eq!(
        (reply.code().as_deref(), reply.is_done()),
        (Some("upstream_cut"), false),
        "{reply:?}"
    );
    assert_eq!(two.servers[1].generations(), before);
}

#[test]
fn a_model_is_asked_where_it_is_and_the_others_wait_for_nobody() {
    let two = two(["one", "two"], |_| ());
    let ask_for = |model: &str| {
        let mut body = chat("Hello", false);
        body["model"] = json!(model);
        ask(&two.running.url, &body)
    };
    for (model, name) in [("one", "a"), ("two", "b")] {
        assert!(ask_for(model).is_answer());
        assert_eq!(two.running.records("relay.run").pop().unwrap()["upstream"], name);
    }
    assert_eq!(ask_for("three").code().as_deref(), Some("model_not_found"));
    two.proxies[0].set(ProxyFault::Down);
    until("a closed fence", || two.running.gateway.upstreams()[0].proved().is_none());
    assert!(ask_for("two").is_answer());
    // The one that is down may be the one that serves it: held, and then told so. Waiting costs no processor.
    let (began, busy) = (Instant::now(), cpu_time());
    let reply = ask_for("one");
    assert_eq!((reply.status, reply.code().as_deref()), (503, Some("not_ready")), "{reply:?}");
    assert!(began.elapsed() >= options().hold, "{:?}", began.elapsed());
    assert!(cpu_time() - busy < Duration::from_secs(1), "{:?}", cpu_time() - busy);
}

/// What this process has computed so far.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[test]
fn a_session_stays_and_weights_share() {
    let two = two([MODEL, MODEL], |given| given[0].weight = 3);
    let mut body = chat("Hello", false);
    body["user"] = json!("somebody");
    for _ in 0..8 {
        assert!(ask(&two.running.url, &body).is_answer());
    }
    let by = |records: &[serde_json::Value], name: &str| {
        records.iter().filter(|it| it["upstream"] == name).count()
    };
    let records = two.running.records("relay.run");
    assert!([0, 8].contains(&by(&records, "a")), "{}", by(&records, "a"));
    assert!(records.iter().all(|it| it["session_id"] == "somebody"));
    // Four at a time: three of them have room at the one of weight 3.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope
                .spawn(|| (0..4).all(|_| ask(&two.running.url, &chat("Hello", false)).is_answer()));
        }
    });
    let records = two.running.records("relay.run");
    let (a, b) = (by(&records[8..], "a"), by(&records[8..], "b"));
    assert!(a + b == 16 && a > b, "{a} and {b}");
}
