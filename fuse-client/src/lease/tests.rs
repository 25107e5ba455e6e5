//! One situation each. What both engines do together is in `e2e/tests/lease_sim`.

use super::{Config, Effect, Event, How, Keeper, OpId, What};
use efc_common::id::{Incarnation, SourceId};
use efc_common::lease::{Ask, DirKey, FileKey, GrantNumber, Mode, Moment, Reason, RequestId, Scope, Tell, Want};
use std::time::Duration;

fn dir(path: &str) -> DirKey {
    DirKey::new(SourceId([0; 16]), path.as_bytes()).unwrap()
}

fn file(name: &str) -> FileKey {
    FileKey::new(name.as_bytes().to_vec().into()).unwrap()
}

fn number(n: u64) -> GrantNumber {
    GrantNumber(GrantNumber::before(1).0 + n)
}

struct Scene {
    keeper: Keeper,
    now: Moment,
    ops: u64,
}

impl Scene {
    /// A keeper with a session since second 100, of a leader of term 1.
    fn new() -> Self {
        let mut s = Scene { keeper: Keeper::new(Config::default()), now: Duration::from_secs(100), ops: 0 };
        let sent = s.now;
        assert_eq!(s.on(Event::SessionUp { incarnation: Incarnation(1), term: 1, sent }), []);
        s
    }

    fn on(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        self.keeper.on(self.now, event, &mut out);
        out
    }

    fn told(&mut self, tell: Tell) -> Vec<Effect> {
        self.on(Event::Told { incarnation: Incarnation(1), tell })
    }

    fn want(&mut self, needs: Vec<Want>) -> (OpId, Vec<Effect>) {
        self.ops += 1;
        let op = OpId(self.ops);
        (op, self.on(Event::Want { op, needs }))
    }

    fn grant(&mut self, request: u64, scope: Scope, mode: Mode, n: u64, exceptions: &[&str]) -> Vec<Effect> {
        let exceptions = exceptions.iter().map(|f| file(f)).collect();
        let asked = scope.clone();
        self.told(Tell::Grant { request: RequestId(request), asked, scope, mode, number: number(n), exceptions })
    }

    fn recall(&mut self, scope: Scope, n: u64, keep_shared: bool) -> Vec<Effect> {
        self.told(Tell::Recall { scope, number: number(n), keep_shared })
    }

    fn pass(&mut self, ms: u64) -> Vec<Effect> {
        self.now += Duration::from_millis(ms);
        self.on(Event::Tick)
    }

    /// Holds a directory.
    fn holding(path: &str, mode: Mode) -> Self {
        let mut s = Scene::new();
        let (op, _) = s.want(vec![Want { scope: Scope::Dir(dir(path)), mode }]);
        s.grant(1, Scope::Dir(dir(path)), mode, 1, &[]);
        assert_eq!(s.on(Event::Done { op }), []);
        s
    }
}

fn admitted(effects: &[Effect]) -> Vec<(u64, bool)> {
    let how = |e: &Effect| match e {
        Effect::Admit { op, how } => Some((op.0, matches!(how, How::Believed { .. }))),
        _ => None,
    };
    effects.iter().filter_map(how).collect()
}

#[test]
fn many_who_need_the_same_ask_once() {
    let mut s = Scene::new();
    let a = dir("a/");
    let (_, first) = s.want(vec![Want::read(a.clone())]);
    assert!(matches!(&first[..], [Effect::Send(Ask::Acquire { wants, .. })] if *wants == [Want::read(a.clone())]));
    assert_eq!(s.want(vec![Want::read(a.clone())]).1, []);
    assert_eq!(admitted(&s.grant(1, Scope::Dir(a.clone()), Mode::Shared, 1, &[])), [(1, true), (2, true)]);
    assert!(s.keeper.try_admit(s.now, &Want::change(a.clone())).is_none());
    assert!(s.keeper.try_admit(s.now, &Want::read_file(a, file("x"))).is_some());
}

#[test]
fn a_recall_waits_for_guards_then_flushes_drops_and_releases() {
    let mut s = Scene::holding("a/", Mode::Exclusive);
    let (a, scope) = (dir("a/"), Scope::Dir(dir("a/")));
    let guard = s.keeper.try_admit(s.now, &Want::change_file(a.clone(), file("x"))).unwrap();
    assert_eq!(s.recall(scope.clone(), 1, false), []);
    assert!(s.keeper.try_admit(s.now, &Want::read(a.clone())).is_none());
    assert_eq!(admitted(&s.want(vec![Want::read(a.clone())]).1), [(2, false)], "a reader goes past it");
    let (_, waits) = s.want(vec![Want::change(a.clone())]);
    assert_eq!(waits, [], "a change waits, and does not ask yet");
    let mut out = Vec::new();
    assert!(s.keeper.done(s.now, guard, &mut out));
    let [Effect::Flush { recall, .. }] = out[..] else { panic!("{out:?}") };
    let dropping = s.on(Event::Flushed { recall, scope: scope.clone() });
    assert_eq!(dropping, [Effect::Drop { recall, what: What::Scope(scope.clone()) }]);
    let dropped = s.on(Event::Dropped { recall, what: What::Scope(scope.clone()) });
    assert_eq!(dropped, [], "the reader is still going past it");
    assert_eq!(s.want(vec![Want::read(a)]).1, [], "who comes now waits");
    let released = s.on(Event::Done { op: OpId(2) });
    assert_eq!(released[0], Effect::Send(Ask::Release { scope, number: number(1), keep_shared: false }));
    let asks = |e: &Effect| matches!(e, Effect::Send(Ask::Acquire { .. }));
    assert!(released.len() == 3 && released[1..].iter().all(asks), "now they ask: {released:?}");
}

#[test]
fn shared_is_kept_where_that_is_enough() {
    let mut s = Scene::holding("a/", Mode::Exclusive);
    let (a, scope) = (dir("a/"), Scope::Dir(dir("a/")));
    let reader = s.keeper.try_admit(s.now, &Want::read(a.clone())).unwrap();
    let out = s.recall(scope.clone(), 1, true);
    let [Effect::Flush { recall, .. }] = out[..] else { panic!("{out:?}") };
    assert!(s.keeper.try_admit(s.now, &Want::change(a.clone())).is_none());
    assert!(s.keeper.try_admit(s.now, &Want::read(a.clone())).is_some(), "readers stay");
    let out = s.on(Event::Flushed { recall, scope: scope.clone() });
    assert_eq!(out, [Effect::Send(Ask::Release { scope, number: number(1), keep_shared: true })]);
    assert!(s.keeper.try_admit(s.now, &Want::change(a)).is_none());
    assert!(s.keeper.done(s.now, reader, &mut Vec::new()));
}

#[test]
fn one_file_can_leave_a_directory() {
    let mut s = Scene::holding("a/", Mode::Exclusive);
    let (a, x) = (dir("a/"), Scope::File(dir("a/"), file("x")));
    let out = s.recall(x.clone(), 1, false);
    let [Effect::Flush { recall, .. }] = out[..] else { panic!("{out:?}") };
    assert!(s.keeper.try_admit(s.now, &Want::read_file(a.clone(), file("x"))).is_none());
    assert!(s.keeper.try_admit(s.now, &Want::change_file(a.clone(), file("y"))).is_some());
    s.on(Event::Flushed { recall, scope: x.clone() });
    let out = s.on(Event::Dropped { recall, what: What::Scope(x.clone()) });
    assert_eq!(out, [Effect::Send(Ask::Release { scope: x, number: number(1), keep_shared: false })]);
    assert!(s.keeper.try_admit(s.now, &Want::read_file(a.clone(), file("x"))).is_none());
    s.grant(9, Scope::Dir(a.clone()), Mode::Exclusive, 2, &[]);
    assert!(s.keeper.try_admit(s.now, &Want::read_file(a, file("x"))).is_some(), "it has joined again");
}

#[test]
fn a_grant_that_its_recall_has_overtaken_is_not_believed() {
    let mut s = Scene::new();
    let (a, scope) = (dir("a/"), Scope::Dir(dir("a/")));
    s.want(vec![Want::read(a.clone())]);
    let out = s.recall(scope.clone(), 5, false);
    assert_eq!(out, [Effect::Send(Ask::Release { scope: scope.clone(), number: number(5), keep_shared: false })]);
    let again = s.grant(1, scope.clone(), Mode::Shared, 5, &[]);
    assert!(matches!(&again[..], [Effect::Send(Ask::Acquire { .. })]), "it asks again: {again:?}");
    assert_eq!(admitted(&s.grant(2, scope.clone(), Mode::Shared, 6, &[])), [(1, true)]);
    assert_eq!(s.recall(scope, 5, false), [], "that one is over");
}

#[test]
fn belief_ends_by_the_time_the_renewal_was_sent() {
    let mut s = Scene::holding("a/", Mode::Shared);
    let want = Want::read(dir("a/"));
    let (begun, guard) = (s.now, s.keeper.try_admit(s.now, &want).unwrap());
    s.now += Duration::from_secs(4);
    s.on(Event::Renewed { incarnation: Incarnation(1), term: 1, sent: begun + Duration::from_secs(3) });
    assert_eq!(s.keeper.believed_until(), begun + Duration::from_secs(11));
    s.now = begun + Duration::from_secs(11);
    assert!(s.keeper.try_admit(s.now, &want).is_none());
    let out = s.on(Event::Tick);
    let [Effect::Drop { recall: first, what: What::All }] = out[..] else { panic!("{out:?}") };
    assert_eq!(s.on(Event::Dropped { recall: first, what: What::All }), [], "an operation still runs");
    let mut out = Vec::new();
    assert!(!s.keeper.done(s.now, guard, &mut out), "not to be remembered");
    let [Effect::Drop { recall, what: What::All }] = out[..] else { panic!("{out:?}") };
    let (passing, out) = s.want(vec![want.clone()]);
    assert_eq!(admitted(&out), [(passing.0, false)], "the drop may wait for a reader's pages");
    assert_eq!(s.on(Event::Dropped { recall, what: What::All }), []);
    assert_eq!(s.want(vec![want]).1, [], "nothing is dropped any more: who comes now waits");
    let lost = s.on(Event::Done { op: passing });
    assert_eq!(lost, [Effect::SessionLost { incarnation: Incarnation(1) }]);
    let sent = s.now;
    let asks = s.on(Event::SessionUp { incarnation: Incarnation(2), term: 1, sent });
    assert!(matches!(&asks[..], [Effect::Send(Ask::Acquire { .. })]), "who waits is asked for again");
}

#[test]
fn what_a_new_leader_has_not_confirmed_ends_when_the_old_one_would_have_ended_it() {
    let mut s = Scene::holding("a/", Mode::Exclusive);
    let old = s.keeper.believed_until();
    s.now += Duration::from_secs(5);
    let sent = s.now;
    let out = s.on(Event::Renewed { incarnation: Incarnation(1), term: 2, sent });
    let [Effect::Send(Ask::Reclaim { request, term: 2, claims, part: 0, parts: 1, .. })] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!((claims[0].scope.clone(), claims[0].mode), (Scope::Dir(dir("a/")), Mode::Exclusive));
    assert_eq!(s.keeper.believed_until(), old);
    assert_eq!(s.recall(Scope::Dir(dir("a/")), 1, false), [], "the deposed leader is not listened to");
    let (request, scope) = (*request, Scope::Dir(dir("a/")));
    let number = GrantNumber::before(2).next();
    let asked = scope.clone();
    s.told(Tell::Grant { request, asked, scope, mode: Mode::Exclusive, number, exceptions: vec![] });
    assert_eq!(s.keeper.believed_until(), sent + Duration::from_secs(8));
}

#[test]
fn a_refused_claim_is_given_up() {
    let mut s = Scene::holding("a/", Mode::Shared);
    let (sent, scope) = (s.now, Scope::Dir(dir("a/")));
    s.on(Event::Renewed { incarnation: Incarnation(1), term: 2, sent });
    let out = s.told(Tell::Refuse { request: RequestId(2), asked: scope.clone(), reason: Reason::Conflict });
    assert!(matches!(&out[..], [Effect::Drop { what: What::Scope(s), .. }] if *s == scope), "{out:?}");
}

#[test]
fn idle_leases_go_back_and_the_longest_unused_make_room() {
    let mut s = Scene::holding("a/", Mode::Shared);
    for i in 0..12 {
        s.now += Duration::from_secs(5);
        let sent = s.now;
        s.on(Event::Renewed { incarnation: Incarnation(1), term: 1, sent });
        assert_eq!(s.on(Event::Tick).len(), usize::from(i == 11), "after a minute");
    }
    let config = Config { leases_max: 1, ..Config::default() };
    let mut s = Scene { keeper: Keeper::new(config), ..Scene::new() };
    let sent = s.now;
    s.on(Event::SessionUp { incarnation: Incarnation(1), term: 1, sent });
    for (i, path) in ["a/", "b/"].iter().enumerate() {
        let (op, _) = s.want(vec![Want::read(dir(path))]);
        let out = s.grant(i as u64 + 1, Scope::Dir(dir(path)), Mode::Shared, i as u64 + 1, &[]);
        let drops = out.iter().filter(|e| matches!(e, Effect::Drop { .. })).count();
        assert_eq!(drops, i, "{out:?}");
        s.on(Event::Done { op });
        s.pass(1);
    }
}

#[test]
fn two_directories_are_taken_in_order_and_the_first_is_kept_for_a_while() {
    let mut s = Scene::holding("a/", Mode::Exclusive);
    let (_, out) = s.want(vec![Want::change(dir("b/")), Want::change(dir("a/"))]);
    assert!(matches!(&out[..], [Effect::Send(Ask::Acquire { wants, .. })] if *wants == [Want::change(dir("b/"))]));
    assert_eq!(s.recall(Scope::Dir(dir("a/")), 1, false), [], "pinned");
    assert!(s.pass(999).iter().all(|e| !matches!(e, Effect::Flush { .. })));
    assert!(s.pass(1).iter().any(|e| matches!(e, Effect::Flush { .. })), "not for ever");
}
