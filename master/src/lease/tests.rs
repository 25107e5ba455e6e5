//! One situation each, told in a few words.

use super::{Bounds, Effect, Engine, Event};
use efc_common::id::{Incarnation, SessionId, SourceId};
use efc_common::lease::{Ask, Claim, DirKey, FileKey, GrantNumber, Mode, Moment, RequestId, Scope, Tell, Times, Want};
use std::time::Duration;

fn dir(path: &str) -> DirKey {
    DirKey::new(SourceId([0; 16]), path.as_bytes()).unwrap()
}

fn file(name: &str) -> FileKey {
    FileKey::new(name.as_bytes().to_vec().into()).unwrap()
}

/// An engine that serves, sessions 1 to 3, and what happened in short words.
struct Scene {
    engine: Engine,
    now: Moment,
    request: u64,
    numbers: std::collections::BTreeMap<(u64, Scope), GrantNumber>,
}

impl Scene {
    fn with(bounds: Bounds) -> Self {
        let mut s = Scene {
            engine: Engine::new(Times::default(), bounds),
            now: Duration::from_secs(1),
            request: 0,
            numbers: Default::default(),
        };
        assert_eq!(s.on(Event::Office { term: 1, sessions: vec![] }), "prove");
        s.on(Event::Proved { term: 1 });
        for session in 1..=3 {
            s.on(Event::SessionUp { session: SessionId(session), incarnation: Incarnation(1) });
        }
        s
    }

    fn new() -> Self {
        Scene::with(Bounds::default())
    }

    fn on(&mut self, event: Event) -> String {
        let mut out = Vec::new();
        self.engine.on(self.now, event, &mut out);
        let words: Vec<String> = out.into_iter().map(|e| self.word(e)).collect();
        words.join(" ")
    }

    fn word(&mut self, effect: Effect) -> String {
        let name = |s: &Scope| match s {
            Scope::Dir(d) => format!("{d:?}"),
            Scope::File(d, f) => format!("{d:?}{f:?}"),
            Scope::Subtree(d) => format!("{d:?}*"),
        };
        let letter = |m: Mode| if m == Mode::Shared { "r" } else { "w" };
        match effect {
            Effect::Tell { session, tell: Tell::Grant { scope, mode, number, exceptions, .. }, .. } => {
                self.numbers.insert((session.0, scope.clone()), number);
                let except: String = exceptions.iter().map(|f| format!("-{f:?}")).collect();
                format!("{session}:{}{}{except}", letter(mode), name(&scope))
            }
            Effect::Tell { session, tell: Tell::Recall { scope, keep_shared, .. }, .. } => {
                format!("{session}?{}{}", if keep_shared { "r" } else { "" }, name(&scope))
            }
            Effect::Tell { session, tell: Tell::Refuse { reason, .. }, .. } => format!("{session}!{reason:?}"),
            Effect::Renew { session, .. } => format!("{session}~"),
            Effect::RefuseRenewal { session, reason, .. } => format!("{session}~{reason:?}"),
            Effect::Fence { session, .. } => format!("{session}#"),
            Effect::Prove { .. } => "prove".into(),
        }
    }

    fn say(&mut self, session: u64, ask: Ask) -> String {
        self.on(Event::Said { session: SessionId(session), incarnation: Incarnation(1), ask })
    }

    fn acquire(&mut self, session: u64, want: Want) -> String {
        self.request += 1;
        self.say(session, Ask::Acquire { request: RequestId(self.request), wants: vec![want] })
    }

    fn release(&mut self, session: u64, scope: Scope, keep_shared: bool) -> String {
        self.say(session, Ask::Release { scope, number: GrantNumber(u64::MAX), keep_shared })
    }

    fn pass(&mut self, ms: u64) -> String {
        self.now += Duration::from_millis(ms);
        self.on(Event::Tick)
    }
}

#[test]
fn a_writer_gets_the_whole_directory_if_nobody_else_is_there() {
    let mut s = Scene::new();
    assert_eq!(s.acquire(1, Want::change_file(dir("a/"), file("x"))), "1:wa/");
    assert_eq!(s.acquire(1, Want::change_file(dir("a/"), file("y"))), "1:wa/");
}

#[test]
fn a_contended_file_is_split_off_and_joins_again() {
    let mut s = Scene::new();
    let (a, x) = (dir("a/"), file("x"));
    assert_eq!(s.acquire(1, Want::read(a.clone())), "1:ra/");
    assert_eq!(s.acquire(2, Want::read(a.clone())), "2:ra/");
    assert_eq!(s.acquire(2, Want::change_file(a.clone(), x.clone())), "1?a/x");
    assert_eq!(s.release(1, Scope::File(a.clone(), x.clone()), false), "2:wa/x");
    assert_eq!(s.acquire(3, Want::read(a.clone())), "3:ra/-x");
    s.release(2, Scope::File(a.clone(), x.clone()), false);
    assert_eq!(s.acquire(3, Want::read_file(a, x)), "3:ra/");
}

#[test]
fn a_shared_want_does_not_pass_an_exclusive_one_that_waits() {
    let mut s = Scene::new();
    let a = dir("a/");
    s.acquire(1, Want::read(a.clone()));
    assert_eq!(s.acquire(2, Want::change(a.clone())), "1?a/");
    assert_eq!(s.acquire(3, Want::read(a.clone())), "");
    assert_eq!(s.release(1, Scope::Dir(a.clone()), false), "2:wa/");
    assert_eq!(s.pass(5), "2?ra/");
    assert_eq!(s.release(2, Scope::Dir(a), true), "3:ra/");
}

#[test]
fn an_exclusive_lease_is_held_for_a_minimum_time() {
    let mut s = Scene::new();
    s.acquire(1, Want::change(dir("a/")));
    assert_eq!(s.acquire(2, Want::change(dir("a/"))), "");
    assert_eq!((s.pass(4), s.pass(1)), (String::new(), "1?a/".into()));
    assert_eq!(s.pass(1000), "1?a/", "said again until it is answered");
}

#[test]
fn two_who_upgrade_take_turns() {
    let mut s = Scene::new();
    let a = dir("a/");
    s.acquire(1, Want::read(a.clone()));
    s.acquire(2, Want::read(a.clone()));
    assert_eq!(s.acquire(1, Want::change(a.clone())), "2?a/");
    assert_eq!(s.acquire(2, Want::change(a.clone())), "");
    assert_eq!(s.release(2, Scope::Dir(a.clone()), false), "1:wa/");
    assert_eq!(s.pass(5), "1?a/");
    assert_eq!(s.release(1, Scope::Dir(a), false), "2:wa/");
}

#[test]
fn a_subtree_waits_for_all_below_and_bars_who_comes_later() {
    let mut s = Scene::new();
    s.acquire(1, Want::read(dir("a/b/")));
    s.acquire(1, Want::read(dir("ab/")));
    assert_eq!(s.acquire(2, Want::subtree(dir("a/"))), "1?a/b/");
    assert_eq!(s.acquire(3, Want::read(dir("a/c/"))), "");
    assert_eq!(s.acquire(2, Want::change(dir("a/c/"))), "2:wa/c/", "its own session goes on below it");
    assert_eq!(s.release(1, Scope::Dir(dir("a/b/")), false), "2:wa/*");
    assert_eq!(s.pass(5), "2?a/*");
    s.release(2, Scope::Dir(dir("a/c/")), false);
    assert_eq!(s.release(2, Scope::Subtree(dir("a/")), false), "3:ra/c/");
}

#[test]
fn a_silent_session_passes_nothing_on_before_its_end_is_agreed() {
    let mut s = Scene::new();
    s.acquire(1, Want::change(dir("a/")));
    s.pass(5000);
    s.on(Event::Renewed { session: SessionId(2), incarnation: Incarnation(1) });
    s.on(Event::Renewed { session: SessionId(3), incarnation: Incarnation(1) });
    assert_eq!(s.acquire(2, Want::read(dir("a/"))), "1?ra/");
    assert!(s.pass(5000).contains("1#"));
    let (one, life) = (SessionId(1), Incarnation(1));
    assert_eq!(s.on(Event::Renewed { session: one, incarnation: life }), "1~Fenced");
    assert_eq!(s.acquire(1, Want::read(dir("b/"))), "1!Fenced");
    assert_eq!(s.on(Event::SessionEnded { session: one, incarnation: life }), "2:ra/");
    assert_eq!(s.acquire(1, Want::read(dir("b/"))), "1!Unknown");
}

#[test]
fn who_never_answers_a_recall_is_not_renewed_but_believes_to_its_end() {
    let mut s = Scene::new();
    s.acquire(1, Want::read(dir("a/")));
    s.acquire(2, Want::change(dir("a/")));
    let mut refused = None;
    for second in 0..60 {
        for session in 1..=3 {
            let answer = s.on(Event::Renewed { session: SessionId(session), incarnation: Incarnation(1) });
            if answer == "1~Fenced" {
                refused.get_or_insert(second);
            }
        }
        if s.pass(1000).contains("1#") {
            let refused = refused.expect("refused first");
            assert!((30..=32).contains(&refused) && second - refused >= 8, "{refused} {second}");
            return;
        }
    }
    panic!("never fenced");
}

#[test]
fn a_new_leader_hears_claims_before_it_grants() {
    let mut s = Scene::new();
    let sessions = (1..=2).map(|i| (SessionId(i), Incarnation(1))).collect();
    assert_eq!(s.on(Event::Office { term: 2, sessions }), "");
    let claim =
        |scope: Scope, mode: Mode| Claim { scope, mode, number: GrantNumber::before(1).next(), exceptions: vec![] };
    let reclaim = |claims: Vec<Claim>, part: usize| Ask::Reclaim {
        request: RequestId(9),
        term: 2,
        claims,
        part,
        parts: 2,
        locks: vec![],
    };
    assert_eq!(s.acquire(2, Want::read(dir("a/"))), "");
    assert_eq!(s.say(1, reclaim(vec![claim(Scope::Dir(dir("a/")), Mode::Exclusive)], 0)), "1:wa/");
    assert_eq!(s.say(2, reclaim(vec![claim(Scope::Dir(dir("a/")), Mode::Shared)], 0)), "2!Conflict");
    assert_eq!(s.say(2, reclaim(vec![claim(Scope::File(dir("a/"), file("x")), Mode::Shared)], 1)), "2!Conflict");
    assert_eq!(s.say(1, reclaim(vec![], 1)), "prove", "all have claimed: no need to wait for the time");
    assert_eq!(s.on(Event::Proved { term: 1 }), "");
    assert_eq!(s.on(Event::Proved { term: 2 }), "");
    assert_eq!(s.pass(5), "1?ra/");
    assert_eq!(s.say(2, reclaim(vec![claim(Scope::Dir(dir("b/")), Mode::Shared)], 0)), "2!Conflict", "too late");
}

#[test]
fn a_late_copy_of_a_claim_gives_nothing_that_was_given_back() {
    let mut s = Scene::new();
    s.on(Event::Office { term: 2, sessions: vec![(SessionId(1), Incarnation(1)), (SessionId(2), Incarnation(1))] });
    let scope = Scope::Dir(dir("a/"));
    let number = GrantNumber::before(1).next();
    let claims = vec![Claim { scope: scope.clone(), mode: Mode::Exclusive, number, exceptions: vec![] }];
    let claim = Ask::Reclaim { request: RequestId(9), term: 2, claims, part: 0, parts: 1, locks: vec![] };
    assert_eq!(s.say(1, claim.clone()), "1:wa/");
    assert_eq!(
        s.say(2, Ask::Reclaim { request: RequestId(9), term: 2, claims: vec![], part: 0, parts: 1, locks: vec![] }),
        "prove"
    );
    s.on(Event::Proved { term: 2 });
    s.release(1, scope.clone(), true);
    assert_eq!(s.acquire(2, Want::read(dir("a/"))), "2:ra/");
    assert_eq!(s.say(1, claim.clone()), "1:ra/", "it has it shared now");
    s.release(1, scope, false);
    assert_eq!(s.say(1, claim), "1!Conflict");
}

#[test]
fn without_all_claims_a_new_leader_waits_and_proves_itself() {
    let mut s = Scene::new();
    s.on(Event::Office { term: 2, sessions: vec![(SessionId(1), Incarnation(1))] });
    s.on(Event::SessionUp { session: SessionId(2), incarnation: Incarnation(1) });
    assert_eq!(s.acquire(2, Want::read(dir("a/"))), "");
    assert_eq!(s.pass(9999), "");
    s.on(Event::Renewed { session: SessionId(2), incarnation: Incarnation(1) });
    assert!(s.pass(1).contains("prove"));
    assert_eq!(s.on(Event::Proved { term: 2 }), "2:ra/");
}

#[test]
fn a_life_that_begins_before_its_session_has_claimed_has_to_claim() {
    let mut s = Scene::new();
    s.on(Event::Office { term: 2, sessions: vec![(SessionId(1), Incarnation(1)), (SessionId(2), Incarnation(1))] });
    let claim = |n| Ask::Reclaim { request: RequestId(n), term: 2, claims: vec![], part: 0, parts: 1, locks: vec![] };
    assert_eq!(s.say(2, claim(9)), "");
    assert_eq!(s.on(Event::SessionUp { session: SessionId(1), incarnation: Incarnation(2) }), "");
    assert_eq!(s.say(1, claim(9)), "", "the old life is not heard");
    let said = |ask| Event::Said { session: SessionId(1), incarnation: Incarnation(2), ask };
    assert_eq!(s.on(said(claim(1))), "prove");
}

#[test]
fn a_release_of_an_older_grant_says_nothing_about_a_newer_one() {
    let mut s = Scene::new();
    let a = dir("a/");
    s.acquire(1, Want::change(a.clone()));
    let old = s.numbers[&(1, Scope::Dir(a.clone()))];
    s.acquire(1, Want::change(a.clone()));
    s.say(1, Ask::Release { scope: Scope::Dir(a.clone()), number: old, keep_shared: false });
    s.pass(10);
    assert_eq!(s.acquire(2, Want::read(a)), "1?ra/");
}

#[test]
fn bounds_are_kept() {
    let bounds = Bounds { queue: 1, session_leases: 2, subtrees: 1, ..Bounds::default() };
    let mut s = Scene::with(bounds);
    s.acquire(1, Want::change(dir("a/")));
    s.acquire(2, Want::change(dir("a/")));
    assert_eq!(s.acquire(3, Want::change(dir("a/"))), "3!QueueFull");
    assert_eq!(s.acquire(3, Want::read(dir("b/"))), "3:rb/");
    assert_eq!(s.acquire(3, Want::read(dir("c/"))), "3:rc/");
    assert_eq!(s.acquire(3, Want::read(dir("d/"))), "3:rd/ 3?b/", "the oldest goes");
    assert_eq!(s.acquire(3, Want::read(dir("e/"))), "3:re/ 3?c/");
    assert_eq!(s.acquire(3, Want::read(dir("f/"))), "3!TooMany");
    assert_eq!(s.acquire(2, Want::subtree(dir("z/"))), "2:wz/*");
    assert_eq!(s.acquire(1, Want::subtree(dir("y/"))), "1!QueueFull");
}
