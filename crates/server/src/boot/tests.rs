use std::sync::mpsc;

use super::*;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Milliseconds where a server has seconds.
fn quick() -> Pace {
    Pace {
        heartbeat: Duration::from_millis(2),
        stall: Duration::from_millis(20),
        deadlock: Duration::from_secs(600),
        back_off: Duration::from_millis(3),
        patience: 1,
    }
}

/// Weights, warm-up, sentinel, ready; the warm-up may take `limit`.
fn plan(limit: Deadline) -> BootPlan {
    let nodes = vec![
        Node::new(Phase::Weights, &[], "loaded"),
        Node::new(Phase::WarmUp, &[Phase::Weights], "tokens").within(limit),
        Node::new(Phase::Sentinel, &[Phase::WarmUp], "answered"),
        Node::new(Phase::Ready, &[Phase::Sentinel], "all of it"),
    ];
    BootPlan::new(nodes).unwrap()
}

fn calm() -> BootPlan {
    plan(Deadline::Fixed(Duration::from_secs(600)))
}

fn owned(plan: BootPlan) -> (Arc<BootBoard>, BootOwner) {
    let board = Arc::new(BootBoard::new());
    let owner = board.own(plan, quick(), |_| {}).unwrap();
    (board, owner)
}

fn pass(owner: &BootOwner, phase: Phase) -> Result<()> {
    owner.run(phase, || Ok(()), |()| Ok(String::new()))
}

#[test]
fn ready_is_refused_until_every_phase_has_succeeded() {
    let (board, owner) = owned(calm());
    for (phase, missing) in
        [(Phase::Weights, "weights"), (Phase::WarmUp, "warmup"), (Phase::Sentinel, "sentinel")]
    {
        assert_eq!(board.ready(), Err(NotProved { missing }));
        pass(&owner, phase).unwrap();
        assert!(!board.status().is_ready());
    }
    board.ready().unwrap();
    assert_eq!(board.status().phase(), Phase::Ready);
    assert_eq!(BootBoard::new().ready(), Err(NotProved { missing: "warmup" }), "without a plan");
}

#[test]
fn a_failed_phase_or_probe_ends_in_a_named_state() {
    for fails_in_probe in [false, true] {
        let (board, owner) = owned(calm());
        let work = || if fails_in_probe { Ok(()) } else { Err("truncated".into()) };
        let ended: Result<()> = owner.run(Phase::Weights, work, |()| Err("truncated".into()));
        ended.unwrap_err();
        let status = board.status();
        let reason = "truncated".into();
        assert_eq!(status.state, BootState::Failed { phase: Phase::Weights, reason });
        assert_eq!(status.retry_after_s(), None);
        assert!(board.ready().is_err());
        assert!(pass(&owner, Phase::WarmUp).is_err(), "nothing runs after a failure");
    }
}

#[test]
fn a_phase_out_of_turn_is_refused() {
    let (board, owner) = owned(calm());
    let error = pass(&owner, Phase::WarmUp).unwrap_err();
    assert_eq!(error.to_string(), "boot: expected phase `weights` next, found `warmup`");
    assert!(matches!(board.status().state, BootState::Failed { phase: Phase::WarmUp, .. }));
}

#[test]
fn there_is_one_owner() {
    let (board, owner) = owned(calm());
    assert_eq!(board.own(calm(), quick(), |_| {}).unwrap_err(), AlreadyOwned);
    drop(owner);
    board.own(calm(), quick(), |_| {}).unwrap();
}

/// Field fault A4: the warm-up hangs for ever.
fn hang(
    limit: Deadline,
    pace: Pace,
) -> (Arc<BootBoard>, mpsc::Sender<()>, mpsc::Receiver<BootStatus>) {
    let board = Arc::new(BootBoard::new());
    let (tell, told) = mpsc::channel();
    let told_of = move |status: &BootStatus| drop(tell.send(status.clone()));
    let owner = board.own(plan(limit), pace, told_of).unwrap();
    let (release, hangs) = mpsc::channel::<()>();
    std::thread::Builder::new()
        .spawn(move || {
            pass(&owner, Phase::Weights).unwrap();
            owner.progress().doing("bucket 1 of 2");
            let wait = || {
                let _released = hangs.recv();
                Ok(())
            };
            let ended: Result<()> = owner.run(Phase::WarmUp, wait, |()| Ok("late".into()));
            // What hung and came back later is told that it no longer counts.
            if let Err(error) = ended {
                assert!(error.to_string().contains("boot phase `warmup`"), "{error}");
            }
        })
        .unwrap();
    (board, release, told)
}

#[test]
fn a4_a_hanging_warm_up_fails_at_its_deadline_and_its_late_end_does_not_count() {
    let limit = Deadline::Fixed(Duration::from_millis(30));
    let (board, release, told) = hang(limit, quick());
    let status = told.recv_timeout(Duration::from_secs(60)).unwrap();
    let BootState::Failed { phase: Phase::WarmUp, reason } = &status.state else {
        panic!("{status:?}")
    };
    assert!(reason.contains("expected its end within 0.03 s"), "{reason}");
    let dump = status.dump().join("\n");
    for part in
        ["`warmup`: last progress", "`sentinel` waits for warmup", "`ready` waits for sentinel"]
    {
        assert!(dump.contains(part), "{part} in {dump}");
    }
    release.send(()).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(matches!(board.status().state, BootState::Failed { phase: Phase::WarmUp, .. }));
    assert!(board.ready().is_err(), "never half open");
}

#[test]
fn a4_silence_ends_a_phase_and_progress_keeps_it_alive() {
    let silence = Deadline::Silence(Duration::from_millis(60));
    let (board, owner) = owned(plan(silence));
    pass(&owner, Phase::Weights).unwrap();
    let progress = owner.progress();
    let ended: Result<()> = owner.run(
        Phase::WarmUp,
        || {
            for _ in 0..40 {
                progress.doing("goes on");
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        },
        |()| Ok(String::new()),
    );
    ended.expect("200 ms of progress each 5 ms are no silence of 60 ms");
    assert!(board.status().heartbeats > 0);
    let (_board, _release, told) = hang(silence, quick());
    let status = told.recv_timeout(Duration::from_secs(60)).unwrap();
    let BootState::Failed { reason, .. } = &status.state else { panic!("{status:?}") };
    assert!(reason.contains("expected progress within 0.06 s"), "{reason}");
}

#[test]
fn g04_the_deadlock_breaker_ends_a_phase_that_is_within_its_deadline() {
    let pace = Pace { deadlock: Duration::from_millis(40), ..quick() };
    let (_board, _release, told) = hang(Deadline::Fixed(Duration::from_secs(600)), pace);
    let status = told.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(matches!(status.state, BootState::Failed { phase: Phase::WarmUp, .. }));
}

/// The mutation: without the pulse a warm-up that hangs is waited for, for ever and without a word.
#[test]
fn mutation_without_a_deadline_a_hanging_warm_up_is_never_given_up() {
    let pace = Pace { heartbeat: Duration::from_secs(600), ..quick() };
    let (board, release, told) = hang(Deadline::Fixed(Duration::from_millis(1)), pace);
    assert!(told.recv_timeout(Duration::from_millis(100)).is_err());
    assert!(matches!(board.status().state, BootState::Starting { phase: Phase::WarmUp, .. }));
    assert_eq!(board.status().heartbeats, 0);
    drop(release);
}

#[test]
fn a_silent_phase_is_called_stalled_before_it_is_given_up() {
    let (board, release, _told) = hang(Deadline::Fixed(Duration::from_secs(600)), quick());
    let mut is_stalled = false;
    for _ in 0..500 {
        std::thread::sleep(Duration::from_millis(5));
        let status = board.status();
        is_stalled = status.is_stalled() && status.phase() == Phase::WarmUp;
        if is_stalled {
            break;
        }
    }
    assert!(is_stalled);
    drop(release);
}

#[test]
fn a_failure_that_may_pass_is_retried_from_the_first_phase_three_times_at_most() {
    let (board, owner) = owned(calm());
    assert!(!owner.again(3), "it has not failed");
    let fail = || -> Result<()> {
        owner.run(Phase::Weights, || Err("offline".into()), |()| Ok(String::new()))
    };
    fail().unwrap_err();
    for attempt in 2..=4 {
        assert!(owner.again(3));
        assert_eq!(board.status().attempt, attempt);
        assert!(board.status().phases.is_empty());
        fail().unwrap_err();
    }
    assert!(!owner.again(3));
    assert!(matches!(board.status().state, BootState::Failed { phase: Phase::Weights, .. }));
    let waits = [1, 2, 3].map(|n| Pace::default().back_off(n).as_secs());
    assert!(
        (3..=4).contains(&waits[0]) && (6..=7).contains(&waits[1]) && (12..=13).contains(&waits[2])
    );
}

#[test]
fn g01_only_one_of_many_claims_the_boot() {
    let board = Arc::new(BootBoard::new());
    let owners: Vec<_> = std::thread::scope(|scope| {
        let claims: Vec<_> =
            (0..8).map(|_| scope.spawn(|| board.own(calm(), quick(), |_| {}))).collect();
        claims.into_iter().filter_map(|claim| claim.join().unwrap().ok()).collect()
    });
    assert_eq!(owners.len(), 1);
}
