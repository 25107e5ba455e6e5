//! Properties of apply over random histories.

use super::command::Why;
use super::*;
use proptest::prelude::*;

fn registration(n: u8, capacity: u64) -> Registration {
    Registration {
        id: WorkerId(format!("w{n}")),
        addr: format!("h{n}:1"),
        unix: String::new(),
        host: format!("h{n}"),
        zone: String::new(),
        capacity_bytes: capacity,
        metrics_addr: String::new(),
    }
}

fn dataset(n: u8, ttl: u64) -> Dataset {
    Dataset {
        name: format!("d{n}"),
        id: 0,
        mounts: vec![],
        consistency: "immutable".into(),
        cache_ttl_seconds: ttl,
        cache_pin: false,
        created_ms: 1,
    }
}

fn command() -> impl Strategy<Value = Command> {
    let id = (0u8..4).prop_map(|n| WorkerId(format!("w{n}")));
    let inc = (0u64..12).prop_map(Incarnation);
    prop_oneof![
        any::<bool>().prop_map(|b| Command::Found { cluster: if b { "c1" } else { "c2" }.into() }),
        (0u8..4, 1u64..3).prop_map(|(n, c)| Command::RegisterWorker(registration(n, c))),
        (id.clone(), inc.clone(), any::<bool>()).prop_map(|(id, incarnation, draining)| Command::DrainWorker {
            id,
            incarnation,
            draining
        }),
        (id.clone(), inc.clone()).prop_map(|(id, incarnation)| Command::LeaveWorker { id, incarnation }),
        (id.clone(), inc.clone()).prop_map(|(id, incarnation)| Command::ExpireWorker { id, incarnation }),
        id.prop_map(|id| Command::ForgetWorker { id }),
        (0u8..3, 0u64..2).prop_map(|(n, ttl)| Command::CreateDataset(dataset(n, ttl))),
        (0u8..3).prop_map(|n| Command::DeleteDataset { name: format!("d{n}") }),
        (0u8..3, 0u64..5, inc.clone(), 0u64..2).prop_map(|(n, s, incarnation, lease_ms)| Command::OpenSession {
            client: "c".into(),
            dataset: format!("d{n}"),
            resume: SessionId(s),
            incarnation,
            lease_ms
        }),
        Just(Command::TakeOffice),
        (0u64..5, inc.clone())
            .prop_map(|(s, incarnation)| Command::CloseSession { session: SessionId(s), incarnation }),
        (0u64..5, inc, 0u64..3).prop_map(|(s, incarnation, office)| Command::ExpireSession {
            session: SessionId(s),
            incarnation,
            office
        }),
    ]
}

fn ring(s: &State) -> Vec<Worker> {
    s.workers().filter(|w| w.in_ring()).cloned().collect()
}

proptest! {
    #[test]
    fn histories_keep_the_promises(commands in proptest::collection::vec(command(), 1..120)) {
        let (mut a, mut b) = (State::default(), State::default());
        let mut given = std::collections::HashSet::new();
        for c in &commands {
            let before = a.clone();
            let out = a.apply(c);
            // Deterministic, also through a snapshot.
            prop_assert_eq!(&b.apply(c), &out);
            b = State::decode(&b.encode().expect("encode")).expect("decode");
            prop_assert_eq!(&a, &b);
            // The epoch grows by one exactly when the ring changes.
            let moved = u64::from(ring(&before) != ring(&a));
            prop_assert_eq!(a.epoch().0, before.epoch().0 + moved);
            // A refusal changes nothing.
            if let Outcome::Refused { .. } = out {
                prop_assert_eq!(&before, &a);
            }
            // No incarnation is handed out twice.
            match (c, &out) {
                (Command::RegisterWorker(_), Outcome::Worker { incarnation, .. })
                | (Command::OpenSession { .. }, Outcome::Session { incarnation, .. }) => {
                    prop_assert!(given.insert(incarnation.0));
                }
                _ => {}
            }
            // The name of the cluster never changes.
            prop_assert!(before.cluster().is_empty() || before.cluster() == a.cluster());
        }
    }

    #[test]
    fn commands_survive_the_log(c in command()) {
        prop_assert_eq!(decode::<Command>(&encode(&c).expect("encode")).expect("decode"), c);
    }

    #[test]
    fn garbage_is_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        prop_assert!(State::decode(&bytes).is_err());
        prop_assert!(decode::<Command>(&bytes).is_err());
    }
}

#[test]
fn an_older_life_is_fenced() {
    let mut s = State::default();
    s.apply(&Command::RegisterWorker(registration(1, 1)));
    s.apply(&Command::RegisterWorker(registration(1, 1)));
    let id = WorkerId("w1".into());
    for c in [
        Command::DrainWorker { id: id.clone(), incarnation: Incarnation(1), draining: true },
        Command::LeaveWorker { id: id.clone(), incarnation: Incarnation(1) },
        Command::ExpireWorker { id: id.clone(), incarnation: Incarnation(1) },
    ] {
        assert!(matches!(s.apply(&c), Outcome::Refused { why: Why::Stale, .. }), "{c:?}");
    }
    assert_eq!((s.epoch(), ring(&s).len()), (RingEpoch(2), 1));
    // Forgotten and registered anew: still a number never used before.
    s.apply(&Command::LeaveWorker { id: id.clone(), incarnation: Incarnation(2) });
    s.apply(&Command::ForgetWorker { id: id.clone() });
    let out = s.apply(&Command::RegisterWorker(registration(1, 1)));
    assert_eq!(out, Outcome::Worker { incarnation: Incarnation(3), epoch: RingEpoch(4) });
}

#[test]
fn a_drain_outlasts_a_crash_and_ends_with_leaving() {
    let mut s = State::default();
    let id = WorkerId("w1".into());
    s.apply(&Command::RegisterWorker(registration(1, 1)));
    s.apply(&Command::DrainWorker { id: id.clone(), incarnation: Incarnation(0), draining: true });
    s.apply(&Command::ExpireWorker { id: id.clone(), incarnation: Incarnation(1) });
    s.apply(&Command::RegisterWorker(registration(1, 1)));
    assert!(ring(&s).is_empty());
    s.apply(&Command::LeaveWorker { id: id.clone(), incarnation: Incarnation(2) });
    s.apply(&Command::RegisterWorker(registration(1, 1)));
    assert_eq!(ring(&s).len(), 1);
}

#[test]
fn a_mounted_dataset_stays_and_creating_twice_is_one() {
    let mut s = State::default();
    let Outcome::Dataset(first) = s.apply(&Command::CreateDataset(dataset(1, 0))) else { panic!("not made") };
    let retry = Dataset { created_ms: 77, ..dataset(1, 0) };
    assert_eq!(s.apply(&Command::CreateDataset(retry)), Outcome::Dataset(first.clone()));
    assert!(matches!(
        s.apply(&Command::CreateDataset(dataset(1, 1))),
        Outcome::Refused { why: Why::AlreadyExists, .. }
    ));
    s.apply(&open(0, 0));
    let delete = Command::DeleteDataset { name: "d1".into() };
    assert!(matches!(s.apply(&delete), Outcome::Refused { why: Why::Busy, .. }));
    s.apply(&Command::ExpireSession { session: SessionId(1), incarnation: Incarnation(1), office: 0 });
    assert_eq!(s.apply(&delete), Outcome::Dataset(first));
}

fn open(resume: u64, incarnation: u64) -> Command {
    Command::OpenSession {
        client: "c".into(),
        dataset: "d1".into(),
        resume: SessionId(resume),
        incarnation: Incarnation(incarnation),
        lease_ms: 0,
    }
}

#[test]
fn a_late_copy_begins_no_other_life() {
    let mut s = State::default();
    let life = |n: u64| Outcome::Session { session: SessionId(1), incarnation: Incarnation(n) };
    assert_eq!(s.apply(&open(0, 0)), life(1));
    assert_eq!(s.apply(&open(1, 1)), life(2));
    assert!(matches!(s.apply(&open(1, 1)), Outcome::Refused { why: Why::Stale, .. }));
    s.apply(&Command::ExpireSession { session: SessionId(1), incarnation: Incarnation(2), office: 0 });
    assert!(matches!(s.apply(&open(1, 2)), Outcome::Refused { why: Why::NotFound, .. }));
    // As the log has it from before there were incarnations in it.
    let old = r#"{"OpenSession":{"client":"c","dataset":"d1","resume":0}}"#;
    assert_eq!(decode::<Command>(&[&[FORMAT], old.as_bytes()].concat()).expect("decode"), open(0, 0));
}

#[test]
fn every_office_has_its_own_number() {
    let mut s = State::default();
    assert_eq!(s.apply(&Command::TakeOffice), Outcome::Office { office: 1 });
    assert_eq!(s.apply(&Command::TakeOffice), Outcome::Office { office: 2 });
    assert_eq!(s.office(), 2);
    // What an earlier one concluded from silence is refused.
    s.apply(&open(0, 0));
    let expire = |office| Command::ExpireSession { session: SessionId(1), incarnation: Incarnation(1), office };
    assert!(matches!(s.apply(&expire(1)), Outcome::Refused { why: Why::Stale, .. }));
    assert_eq!(s.apply(&expire(2)), Outcome::Done);
}

#[test]
fn gone_workers_are_pruned() {
    let mut s = State::default();
    for n in 0..300 {
        let r = Registration { id: WorkerId(format!("x{n}")), ..registration(0, 1) };
        s.apply(&Command::RegisterWorker(r.clone()));
        s.apply(&Command::LeaveWorker { id: r.id, incarnation: Incarnation(0) });
    }
    assert_eq!(s.workers().count(), 256);
    assert!(s.worker(&WorkerId("x0".into())).is_none() && s.worker(&WorkerId("x299".into())).is_some());
}
