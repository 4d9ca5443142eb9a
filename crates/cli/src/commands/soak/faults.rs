//! `exrail soak --faults`: the same requests twice, the second time with faults, and nobody but their
//! victims may notice.
//!
//! Both servers are started alike; what is asked first is asked again by number. The server's own board says
//! what was injected, what its guards caught, and what hit nobody ([`exrail_engine::Fault`]); answers, pages,
//! traces and `/livez` are looked at from outside.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use exrail_verify::Verdict;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Soak,
    client::Outcome,
    drain,
    random::Random,
    request::Mix,
    server::{Gauges, Server, Workplace, metric},
    verdict::{Check, check},
};
use crate::{Ended, output::Output};

/// Steps between two audits of the pool.
const AUDIT_EVERY: u64 = 8;
/// Seconds after which a step without an end is told.
const WATCHDOG_S: u64 = 4;
/// Time between two looks at `/livez`.
const LOOK: Duration = Duration::from_millis(100);
/// Kinds that a guard of the page books catches.
const OF_PAGES: [&str; 6] = [
    "skip_reference",
    "reuse_early",
    "keep_generation",
    "flip_token",
    "flip_record",
    "fail_allocation",
];
/// Kinds that no guard inside catches: a step that is only late, and one that is too late for `/livez`.
const LATE: [&str; 2] = ["delay", "hang"];
/// What a victim is told, and by which kinds.
const TOLD: [(&str, &[&str]); 4] = [
    ("kv_integrity", &OF_PAGES),
    ("numeric_fault", &["nan"]),
    ("generation_failed", &["panic"]),
    ("trace_unavailable", &["break_trace"]),
];

/// One kind of fault, as the server counts it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Kind {
    name: String,
    injected: u64,
    caught: u64,
    unmet: u64,
    slowest_steps: u64,
}

/// One run of the requests.
#[derive(Debug, Default)]
struct Run {
    /// By the number of the request.
    outcomes: BTreeMap<usize, Outcome>,
    end: Gauges,
    kinds: Vec<Kind>,
    /// How often `/livez` stopped saying so.
    n_dead: u64,
    /// Whether the server answers a request when all is over.
    lives_on: bool,
}

impl Soak {
    pub(super) fn run_with_faults(
        &self,
        model: &Path,
        workplace: &Workplace,
        output: Output,
    ) -> Result<Ended> {
        let options = self.options(model, AUDIT_EVERY)?;
        let time = Duration::from_secs_f64(self.minutes * 30.0);
        let undisturbed = self.answered(workplace, &options, Until::Over(time))?;
        output.note(format!("{} requests undisturbed", undisturbed.outcomes.len()));
        let mut injecting = options;
        let more = ["--inject-faults", &self.seed.to_string(), "--watchdog-s"].map(str::to_owned);
        injecting.extend(more.into_iter().chain([WATCHDOG_S.to_string()]));
        injecting.extend(self.guards_off.then(|| "--guards-off".to_owned()));
        let n_requests = undisturbed.outcomes.len();
        let disturbed = self.answered(workplace, &injecting, Until::Asked(n_requests))?;
        let mut checks = judge(&undisturbed, &disturbed);
        checks.push(traces(&workplace.trace_log())?);
        for kind in &disturbed.kinds {
            output.line(format!(
                "{:<16} {:>3} injected, {:>3} caught within {} steps, {:>3} hit nobody",
                kind.name, kind.injected, kind.caught, kind.slowest_steps, kind.unmet
            ));
        }
        checks.iter().for_each(|check| output.line(check));
        self.tell(model, &json!({"faults": disturbed.kinds, "checks": checks}), output)?;
        let passed = checks.iter().all(|check| check.verdict == Verdict::Pass);
        Ok(if passed { Ended::Done } else { Ended::NotPassed })
    }

    /// Starts a server and asks it the requests by their numbers.
    fn answered(&self, workplace: &Workplace, options: &[String], until: Until) -> Result<Run> {
        let server = Server::start(workplace, options)?;
        let mut mix = Mix::of(&server, self.cancel_percent)?;
        mix.compare_percent = 0;
        let (next, since, done) = (AtomicUsize::new(0), Instant::now(), AtomicBool::new(false));
        let outcomes = Mutex::new(BTreeMap::new());
        let client = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if until.is_over(number, since) {
                    return;
                }
                let mut random = Random::new(self.seed ^ ((number as u64 + 1) << 32));
                let plan = mix.draw(&mut random);
                let outcome = plan.run(server.target(plan.tenant));
                let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
                outcomes.insert(number, outcome);
            }
        };
        let n_dead = thread::scope(|scope| {
            let looks = scope.spawn(|| deaths(&server, &done));
            let clients: Vec<_> = (0..self.clients.get()).map(|_| scope.spawn(client)).collect();
            clients.into_iter().for_each(|client| client.join().expect("a client panicked"));
            done.store(true, Ordering::Relaxed);
            looks.join().expect("who looks at /livez panicked")
        });
        let end = drain(&server)?;
        let hello = json!({"model": mix.model, "prompt": mix.noise_prompt(), "max_tokens": 1});
        Ok(Run {
            outcomes: outcomes.into_inner().unwrap_or_else(PoisonError::into_inner),
            end,
            kinds: kinds_in(&server.metrics()?)?,
            n_dead,
            lives_on: server.is_alive() && server.json("/v1/completions", Some(&hello)).is_ok(),
        })
    }
}

/// When clients stop asking.
#[derive(Clone, Copy, Debug)]
enum Until {
    Over(Duration),
    Asked(usize),
}

impl Until {
    fn is_over(self, number: usize, since: Instant) -> bool {
        match self {
            Until::Over(time) => since.elapsed() >= time,
            Until::Asked(n) => number >= n,
        }
    }
}

/// How often the server stopped being alive.
fn deaths(server: &Server, done: &AtomicBool) -> u64 {
    let (mut n, mut was_alive) = (0, true);
    while !done.load(Ordering::Relaxed) {
        let is_alive = server.is_alive();
        n += u64::from(was_alive && !is_alive);
        was_alive = is_alive;
        thread::sleep(LOOK);
    }
    n
}

/// What the server counts; nothing of one that injects nothing.
fn kinds_in(text: &str) -> Result<Vec<Kind>> {
    let injected = "exrail_faults_injected_total{kind=\"";
    let names =
        text.lines().filter_map(|line| Some(line.strip_prefix(injected)?.split_once('"')?.0));
    let kind = |name: &str| {
        let count = |what: &str| metric(text, &format!("exrail_faults_{what}{{kind=\"{name}\"}}"));
        Ok(Kind {
            name: name.to_owned(),
            injected: count("injected_total")?,
            caught: count("caught_total")?,
            unmet: count("unmet_total")?,
            slowest_steps: count("slowest_steps")?,
        })
    };
    names.map(kind).collect()
}

fn judge(undisturbed: &Run, disturbed: &Run) -> Vec<Check> {
    let faulty = undisturbed.outcomes.values().filter(|outcome| named(outcome).is_some()).count();
    let kinds = &disturbed.kinds;
    vec![
        check(
            "the undisturbed run had no error",
            faulty == 0 && !undisturbed.outcomes.is_empty(),
            format!("{faulty} of {} requests", undisturbed.outcomes.len()),
        ),
        met(kinds),
        caught(kinds),
        late(kinds, disturbed.n_dead),
        victims(&disturbed.outcomes, kinds),
        others(&undisturbed.outcomes, &disturbed.outcomes),
        pages(&disturbed.end, kinds),
        check("the server lives on", disturbed.lives_on, format!("{}", disturbed.lives_on)),
    ]
}

/// A kind that hit nobody has shown nothing, and counts neither as caught nor as missed.
fn met(kinds: &[Kind]) -> Check {
    let absent = kinds.iter().filter(|kind| kind.injected == 0);
    let absent: Vec<&str> = absent.map(|kind| kind.name.as_str()).collect();
    let n: u64 = kinds.iter().map(|kind| kind.injected).sum();
    let verdict = if absent.is_empty() { Verdict::Pass } else { Verdict::Inconclusive };
    let found = match absent.as_slice() {
        [] => format!("{n} faults of {} kinds", kinds.len()),
        absent => format!("{n} faults, but none of {}; soak longer", absent.join(", ")),
    };
    Check { demand: "every kind of fault was injected", verdict, found }
}

fn caught(kinds: &[Kind]) -> Check {
    // An audit runs behind a step, and the count of steps may be one on by then.
    let bound = AUDIT_EVERY + 2;
    let guarded = || kinds.iter().filter(|kind| !LATE.contains(&kind.name.as_str()));
    // The trace log has a thread of its own: its guard looks at the same write, and steps go on beside it.
    let in_steps = |kind: &&Kind| kind.name != "break_trace";
    let is_late = |kind: &&Kind| in_steps(kind) && kind.slowest_steps > bound;
    let missed = guarded().filter(|kind| kind.caught < kind.injected || is_late(kind));
    let missed: Vec<&str> = missed.map(|kind| kind.name.as_str()).collect();
    let slowest = guarded().filter(in_steps).map(|kind| kind.slowest_steps).max().unwrap_or(0);
    let found = match missed.as_slice() {
        [] => format!("within {slowest} steps, limit {bound}"),
        missed => format!("not all, or not within {bound} steps: {}", missed.join(", ")),
    };
    check("every fault was caught by its guard", missed.is_empty(), found)
}

/// `/livez` is to tell of each step that hangs, and of nothing else.
fn late(kinds: &[Kind], n_dead: u64) -> Check {
    let hangs = of(kinds, &["hang"]);
    check(
        "the watchdog told of every hanging step alone",
        n_dead == hangs,
        format!("{hangs} hung, {n_dead} told"),
    )
}

/// Whoever got an error has one that a fault explains, and no fault has two victims.
fn victims(outcomes: &BTreeMap<usize, Outcome>, kinds: &[Kind]) -> Check {
    let mut told: BTreeMap<&str, u64> = BTreeMap::new();
    for name in outcomes.values().filter_map(named) {
        *told.entry(name).or_default() += 1;
    }
    let allowed = |name: &str| {
        let by = TOLD.iter().find(|(code, _)| *code == name);
        by.map_or(0, |(_, by)| of(kinds, by))
    };
    let is_explained = told.iter().all(|(name, n)| *n <= allowed(name));
    let list = told.iter().map(|(name, n)| format!("{n} {name} of {}", allowed(name)));
    let list = list.collect::<Vec<_>>().join(", ");
    let found = if list.is_empty() { "none".to_owned() } else { list };
    check("each error is a fault's, one for each at most", is_explained, found)
}

fn others(before: &BTreeMap<usize, Outcome>, after: &BTreeMap<usize, Outcome>) -> Check {
    let (mut n, mut different) = (0, Vec::new());
    for (number, outcome) in after {
        if let (Outcome::Complete { answer, .. }, Some(Outcome::Complete { answer: was, .. })) =
            (outcome, before.get(number))
        {
            n += 1;
            if answer.choices != was.choices {
                different.push(number.to_string());
            }
        }
    }
    let found = match different.as_slice() {
        [] => format!("{n} answers"),
        different => {
            format!("{} of {n} differ: requests {}", different.len(), different.join(", "))
        }
    };
    check("all others got the same bits as undisturbed", n > 0 && different.is_empty(), found)
}

fn pages(end: &Gauges, kinds: &[Kind]) -> Check {
    let Gauges { pages_free, pages_quarantined, pages_total, .. } = *end;
    let is_back = pages_free + pages_quarantined == pages_total && end.running == 0;
    check(
        "every page is back, or in quarantine for a fault",
        is_back && pages_quarantined <= of(kinds, &OF_PAGES),
        format!("{pages_free} free, {pages_quarantined} in quarantine, of {pages_total}"),
    )
}

/// Injected faults of these kinds.
fn of(kinds: &[Kind], names: &[&str]) -> u64 {
    let named = kinds.iter().filter(|kind| names.contains(&kind.name.as_str()));
    named.map(|kind| kind.injected).sum()
}

/// The name of an error; an answer of another form has one that nothing explains.
fn named(outcome: &Outcome) -> Option<&str> {
    match outcome {
        Outcome::Refused { code, .. } => Some(code),
        Outcome::Odd(_) => Some("odd"),
        Outcome::Complete { .. } | Outcome::Cancelled | Outcome::Full => None,
    }
}

/// A record that broke is not in the log, not even in part.
fn traces(path: &Path) -> Result<Check> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    ensure!(!text.is_empty(), "trace log {}: expected records, found none", path.display());
    let broken = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_err()).count();
    let found = format!("{broken} of {} lines broken", text.lines().count());
    Ok(check("the trace log is whole", broken == 0 && text.ends_with('\n'), found))
}

#[cfg(test)]
mod tests {
    use super::super::client::Answer;
    use super::*;

    fn complete(text: &str) -> Outcome {
        let choices = vec![(text.to_owned(), "stop".to_owned())];
        Outcome::Complete { answer: Answer { choices, generated: 1, is_held: false }, body: None }
    }

    fn refused(code: &str) -> Outcome {
        Outcome::Refused { code: code.to_owned(), told: String::new() }
    }

    /// Each kind once, caught; one victim of each name, and four others.
    fn sound() -> [Run; 2] {
        let kind = |name: &&str| Kind {
            name: (*name).to_owned(),
            injected: 1,
            caught: u64::from(!LATE.contains(name)),
            unmet: 0,
            slowest_steps: 3,
        };
        let names = [&OF_PAGES[..], &LATE, &["nan", "panic", "break_trace"]].concat();
        let outcomes: BTreeMap<_, _> = (0..8).map(|n| (n, complete(&n.to_string()))).collect();
        let mut disturbed = outcomes.clone();
        for (number, (code, _)) in TOLD.into_iter().enumerate() {
            disturbed.insert(number, refused(code));
        }
        let end =
            Gauges { pages_total: 32, pages_free: 28, pages_quarantined: 4, ..Gauges::default() };
        let run = |outcomes| Run { outcomes, end, lives_on: true, ..Run::default() };
        let disturbed =
            Run { kinds: names.iter().map(kind).collect(), n_dead: 1, ..run(disturbed) };
        [run(outcomes), disturbed]
    }

    fn failed(change: impl FnOnce(&mut Run, &mut Run)) -> Vec<(&'static str, Verdict)> {
        let [mut before, mut after] = sound();
        change(&mut before, &mut after);
        let checks = judge(&before, &after).into_iter();
        let failed = checks.filter(|check| check.verdict != Verdict::Pass);
        failed.map(|check| (check.demand, check.verdict)).collect()
    }

    #[test]
    fn victims_alone_notice() {
        assert_eq!(failed(|_, _| {}), []);
    }

    /// Each failure turns its own demand red.
    #[test]
    fn what_reaches_a_user_is_seen() {
        let fail = |demand| [(demand, Verdict::Fail)];
        let corrupted = failed(|_, after| drop(after.outcomes.insert(7, complete("other"))));
        assert_eq!(corrupted, fail("all others got the same bits as undisturbed"));
        let uncaught = failed(|_, after| after.kinds[0].caught = 0);
        assert_eq!(uncaught, fail("every fault was caught by its guard"));
        let slow = failed(|_, after| after.kinds[3].slowest_steps = AUDIT_EVERY + 3);
        assert_eq!(slow, fail("every fault was caught by its guard"));
        let second_victim = failed(|_, after| {
            after.outcomes.insert(6, refused("numeric_fault"));
        });
        assert_eq!(second_victim, fail("each error is a fault's, one for each at most"));
        let cut = failed(|_, after| drop(after.outcomes.insert(6, Outcome::Odd("cut".into()))));
        assert_eq!(cut, fail("each error is a fault's, one for each at most"));
        let asleep = failed(|_, after| after.n_dead = 0);
        assert_eq!(asleep, fail("the watchdog told of every hanging step alone"));
        let lost = failed(|_, after| after.end.pages_free = 27);
        assert_eq!(lost, fail("every page is back, or in quarantine for a fault"));
        let dead = failed(|_, after| after.lives_on = false);
        assert_eq!(dead, fail("the server lives on"));
        let before = failed(|before, _| drop(before.outcomes.insert(3, refused("internal"))));
        assert_eq!(before, fail("the undisturbed run had no error"));
    }

    #[test]
    fn a_kind_that_hit_nobody_is_not_called_caught() {
        let absent = failed(|_, after| {
            after.kinds[0] = Kind { unmet: 2, injected: 0, caught: 0, ..after.kinds[0].clone() };
        });
        assert_eq!(absent, [("every kind of fault was injected", Verdict::Inconclusive)]);
    }

    #[test]
    fn kinds_are_read_from_metrics() {
        let line = |what: &str, n: u64| format!("exrail_faults_{what}{{kind=\"nan\"}} {n}\n");
        let text = [("injected_total", 3), ("caught_total", 2), ("unmet_total", 1)];
        let text = text.map(|(what, n)| line(what, n)).concat() + &line("slowest_steps", 9);
        let expected =
            Kind { name: "nan".into(), injected: 3, caught: 2, unmet: 1, slowest_steps: 9 };
        assert_eq!(kinds_in(&text).unwrap(), [expected]);
        assert_eq!(kinds_in("exrail_ready 1\n").unwrap(), []);
    }
}
