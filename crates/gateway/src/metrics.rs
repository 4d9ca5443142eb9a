//! `/metrics` of a gateway, in the Prometheus text format.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{fleet::Fleet, upstream::Fence};

/// Upper bounds of the buckets of the overhead, in seconds.
const BUCKETS_S: [f64; 9] = [0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.1];

/// What a gateway counts.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    faults: Mutex<BTreeMap<(String, &'static str), u64>>,
    repairs: AtomicU64,
    overhead: [AtomicU64; BUCKETS_S.len()],
    overhead_count: AtomicU64,
    overhead_us: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    pub(crate) fn count_request(&self, route: &'static str, status: u16) {
        *lock(&self.requests).entry((route, status)).or_default() += 1;
    }

    pub(crate) fn count_fault(&self, upstream: &str, fault: &'static str) {
        *lock(&self.faults).entry((upstream.to_owned(), fault)).or_default() += 1;
    }

    pub(crate) fn count_repair(&self) {
        self.repairs.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn observe_overhead(&self, time: Duration) {
        for (bucket, bound) in self.overhead.iter().zip(BUCKETS_S) {
            if time.as_secs_f64() <= bound {
                bucket.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.overhead_count.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.overhead_us.fetch_add(micros, Ordering::Relaxed);
    }

    pub(crate) fn render(&self, fleet: &Fleet) -> String {
        let mut text = String::new();
        head(
            &mut text,
            "exrail_gateway_requests_total",
            "counter",
            "Requests by route and status.",
        );
        for ((route, status), n) in &*lock(&self.requests) {
            line(
                &mut text,
                "exrail_gateway_requests_total",
                &[("route", route), ("status", &status.to_string())],
                n,
            );
        }
        let name = "exrail_gateway_faults_total";
        head(
            &mut text,
            name,
            "counter",
            "What upstreams did instead of answering, and closed fences.",
        );
        for ((upstream, fault), n) in &*lock(&self.faults) {
            line(&mut text, name, &[("upstream", upstream), ("fault", fault)], n);
        }
        let name = "exrail_gateway_repairs_total";
        head(&mut text, name, "counter", "Answers that did not conform and were asked for again.");
        line(&mut text, name, &[], self.repairs.load(Ordering::Relaxed));
        let name = "exrail_gateway_held_requests";
        head(&mut text, name, "gauge", "Requests that wait at closed fences.");
        line(&mut text, name, &[], fleet.held());
        self.render_overhead(&mut text);
        render_upstreams(&mut text, fleet);
        text
    }

    fn render_overhead(&self, text: &mut String) {
        let name = "exrail_gateway_overhead_seconds";
        head(text, name, "histogram", "Time of a request that was not the upstream's.");
        for (bucket, bound) in self.overhead.iter().zip(BUCKETS_S) {
            let le = bound.to_string();
            line(text, &format!("{name}_bucket"), &[("le", &le)], bucket.load(Ordering::Relaxed));
        }
        let count = self.overhead_count.load(Ordering::Relaxed);
        line(text, &format!("{name}_bucket"), &[("le", "+Inf")], count);
        let sum = Duration::from_micros(self.overhead_us.load(Ordering::Relaxed));
        line(text, &format!("{name}_sum"), &[], sum.as_secs_f64());
        line(text, &format!("{name}_count"), &[], count);
    }
}

fn render_upstreams(text: &mut String, fleet: &Fleet) {
    let gauges = [
        ("exrail_gateway_upstream_open", "1 while requests may pass the upstream's fence."),
        ("exrail_gateway_upstream_in_flight", "Requests at the upstream."),
        (
            "exrail_gateway_upstream_cold_ratio",
            "Time of the first generation over that of a warm one.",
        ),
    ];
    for (name, help) in gauges {
        head(text, name, "gauge", help);
        for upstream in &fleet.upstreams {
            let label = [("upstream", upstream.name())];
            match (name, upstream.fence()) {
                ("exrail_gateway_upstream_in_flight", _) => {
                    line(text, name, &label, upstream.in_flight());
                }
                ("exrail_gateway_upstream_open", fence) => {
                    line(text, name, &label, u8::from(matches!(fence, Fence::Open(_))));
                }
                (_, Fence::Open(proved)) => line(text, name, &label, proved.warm_up.cold_ratio),
                // What was not measured has no value.
                (_, Fence::Closed { .. }) => {}
            }
        }
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
}

fn line(text: &mut String, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
    let escaped =
        |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let labels: Vec<String> =
        labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    let labels =
        if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
    text.push_str(&format!("{name}{labels} {value}\n"));
}
