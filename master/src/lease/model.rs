//! The engine against a model that is too simple to be wrong: lists of who believes what and who waits, looked through from end to end after
//! every event.

use super::{Bounds, Effect, Engine, Event};
use efc_common::id::{Incarnation, SessionId, SourceId};
use efc_common::lease::{Ask, DirKey, FileKey, GrantNumber, Mode, Moment, RequestId, Scope, Tell, Times, Want};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

const DIRS: [&str; 4] = ["a/", "a/b/", "a/c/", "d/"];
const FILES: [&str; 2] = ["x", "y"];

fn dir(i: usize) -> DirKey {
    DirKey::new(SourceId([0; 16]), DIRS[i].as_bytes()).unwrap()
}

fn file(i: usize) -> FileKey {
    FileKey::new(FILES[i].as_bytes().to_vec().into()).unwrap()
}

#[derive(Debug, Clone)]
enum Step {
    Acquire(u64, Want),
    Cancel(u64, usize),
    /// Gives something back unasked.
    Release(u64, usize),
    /// Answers a recall, keeping shared if that is enough.
    Answer(u64),
    Renew(u64),
    NewLife(u64),
    Pass(u64),
}

fn wants() -> impl Strategy<Value = Want> {
    let mode = prop_oneof![Just(Mode::Shared), Just(Mode::Exclusive)];
    let d = 0..DIRS.len();
    prop_oneof![
        4 => (d.clone(), mode.clone()).prop_map(|(d, mode)| Want { scope: Scope::Dir(dir(d)), mode }),
        4 => (d.clone(), 0..FILES.len(), mode).prop_map(|(d, f, mode)| Want { scope: Scope::File(dir(d), file(f)), mode }),
        1 => d.prop_map(|d| Want::subtree(dir(d))),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let s = 1..4u64;
    let step = prop_oneof![
        6 => (s.clone(), wants()).prop_map(|(s, w)| Step::Acquire(s, w)),
        1 => (s.clone(), any::<usize>()).prop_map(|(s, i)| Step::Cancel(s, i)),
        2 => (s.clone(), any::<usize>()).prop_map(|(s, i)| Step::Release(s, i)),
        6 => s.clone().prop_map(Step::Answer),
        3 => s.clone().prop_map(Step::Renew),
        1 => s.prop_map(Step::NewLife),
        2 => prop_oneof![0..20u64, 1000..4000u64].prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 1..80)
}

#[derive(Debug, Clone)]
struct Belief {
    mode: Mode,
    number: GrantNumber,
    without: BTreeSet<FileKey>,
}

#[derive(Default)]
struct Client {
    incarnation: Incarnation,
    believes: BTreeMap<Scope, Belief>,
    recalls: BTreeMap<Scope, (GrantNumber, bool)>,
    gone: bool,
}

struct Model {
    engine: Engine,
    now: Moment,
    clients: BTreeMap<u64, Client>,
    /// Session, request and want, in order of arrival.
    waiting: Vec<(u64, u64, Want)>,
    requests: u64,
    last: GrantNumber,
    lost: Vec<(u64, Scope, GrantNumber)>,
    /// In the order in which the engine gave them.
    effects: VecDeque<Effect>,
    busy: bool,
}

fn related(a: &Scope, b: &Scope) -> bool {
    let tree = |s: &Scope| matches!(s, Scope::Subtree(_));
    match (tree(a), tree(b)) {
        (false, false) => a.dir() == b.dir(),
        (true, false) => b.dir().is_in(a.dir()),
        (false, true) => a.dir().is_in(b.dir()),
        (true, true) => a.dir().is_in(b.dir()) || b.dir().is_in(a.dir()),
    }
}

/// Do beliefs and wants of two sessions exclude each other?
fn contradicts(scope: &Scope, belief: &Belief, want: &Want) -> bool {
    let apart = match (scope, &want.scope) {
        (Scope::Dir(_), Scope::File(_, f)) => belief.without.contains(f),
        (Scope::File(..), Scope::Dir(_)) => true,
        (Scope::File(_, f), Scope::File(_, g)) => f != g,
        _ => false,
    };
    related(scope, &want.scope) && !apart && !belief.mode.compatible(want.mode)
}

impl Model {
    fn new() -> Self {
        let times = Times { patience: Duration::from_secs(15), ..Times::default() };
        let mut m = Model {
            engine: Engine::new(times, Bounds::default()),
            now: Duration::from_secs(1),
            clients: BTreeMap::new(),
            waiting: Vec::new(),
            requests: 0,
            last: GrantNumber::default(),
            lost: Vec::new(),
            effects: VecDeque::new(),
            busy: false,
        };
        m.on(Event::Office { term: 3, sessions: Vec::new() });
        for s in 1..4 {
            m.up(s);
        }
        m
    }

    fn up(&mut self, s: u64) {
        let client = self.clients.entry(s).or_default();
        *client = Client { incarnation: Incarnation(client.incarnation.0 + 1), ..Client::default() };
        let incarnation = client.incarnation;
        self.waiting.retain(|w| w.0 != s);
        self.on(Event::SessionUp { session: SessionId(s), incarnation });
    }

    fn say(&mut self, s: u64, ask: Ask) {
        let incarnation = self.clients[&s].incarnation;
        self.on(Event::Said { session: SessionId(s), incarnation, ask });
    }

    fn on(&mut self, event: Event) {
        let mut out = Vec::new();
        self.engine.on(self.now, event, &mut out);
        self.effects.extend(out);
        if !std::mem::replace(&mut self.busy, true) {
            while let Some(effect) = self.effects.pop_front() {
                self.effect(effect);
            }
            self.busy = false;
            self.check();
        }
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Tell { session, incarnation, tell } => {
                let client = &self.clients[&session.0];
                assert!(client.incarnation == incarnation && !client.gone, "a life that is over was told {tell:?}");
                self.told(session.0, tell);
            }
            Effect::Prove { term } => self.on(Event::Proved { term }),
            Effect::Fence { session, incarnation } => {
                self.clients.get_mut(&session.0).unwrap().gone = true;
                self.clients.get_mut(&session.0).unwrap().believes.clear();
                self.waiting.retain(|w| w.0 != session.0);
                self.on(Event::SessionEnded { session, incarnation });
            }
            Effect::RefuseRenewal { session, .. } => {
                // Hears that it is over, and drops everything; the engine goes by the time, or by its next life.
                let client = self.clients.get_mut(&session.0).unwrap();
                client.believes.clear();
                client.gone = true;
                self.waiting.retain(|w| w.0 != session.0);
            }
            Effect::Renew { .. } => {}
        }
    }

    fn told(&mut self, s: u64, tell: Tell) {
        match tell {
            Tell::Grant { request, asked, scope, mode, number, exceptions } => {
                assert!(number > self.last, "numbers increase");
                self.last = number;
                let at = self.waiting.iter().position(|w| w.0 == s && w.1 == request.0 && w.2.scope == asked);
                let (_, _, want) = self.waiting.remove(at.expect("a grant that nobody waits for"));
                assert!(mode.covers(want.mode));
                let without: BTreeSet<FileKey> = exceptions.into_iter().collect();
                let client = self.clients.get_mut(&s).unwrap();
                // What the new grant excepts and the old one did not is given back.
                if let Some(had) = client.believes.get(&scope) {
                    let lost = without.difference(&had.without).map(|f| Scope::File(scope.dir().clone(), f.clone()));
                    self.lost.extend(lost.filter(|f| !client.believes.contains_key(f)).map(|f| (s, f, number)));
                }
                client.recalls.remove(&scope);
                if let Scope::File(d, f) = &scope
                    && let Some(whole) = client.believes.get_mut(&Scope::Dir(d.clone()))
                {
                    whole.without.insert(f.clone());
                }
                client.believes.insert(scope, Belief { mode, number, without });
            }
            Tell::Recall { scope, number, keep_shared } => {
                self.clients.get_mut(&s).unwrap().recalls.insert(scope, (number, keep_shared));
            }
            Tell::Refuse { request, asked, .. } => {
                self.waiting.retain(|w| !(w.0 == s && w.1 == request.0 && w.2.scope == asked));
            }
        }
    }

    /// What must be so after every event.
    fn check(&self) {
        let all = || self.clients.iter().flat_map(|(s, c)| c.believes.iter().map(move |b| (s, b)));
        for (s, (scope, belief)) in all() {
            for (t, (other, its)) in all().filter(|(t, _)| *t != s) {
                let as_want = Want { scope: other.clone(), mode: its.mode };
                let files_apart = match (scope, other) {
                    (Scope::File(_, f), Scope::Dir(_)) => its.without.contains(f),
                    (Scope::File(..), Scope::Subtree(_)) | (Scope::Subtree(_), _) => false,
                    _ => !contradicts(scope, belief, &as_want),
                };
                let clash = related(scope, other) && !belief.mode.compatible(its.mode) && !files_apart;
                assert!(!clash, "{s} believes {scope:?} {belief:?}, {t} believes {other:?} {its:?}");
            }
        }
    }

    /// Who is first and in nobody's way must not wait.
    fn check_nobody_is_forgotten(&self) {
        for (i, (s, _, want)) in self.waiting.iter().enumerate() {
            let earlier = self.waiting[..i].iter().any(|w| related(&w.2.scope, &want.scope));
            let blocked = (self.clients.iter().filter(|(t, _)| *t != s))
                .any(|(_, c)| c.believes.iter().any(|(scope, b)| contradicts(scope, b, want)));
            // When nobody holds a file by itself any more, it counts as part of its directory, also for who has heard otherwise.
            let split = self.clients.values().any(|c| c.believes.contains_key(&want.scope));
            let joined = matches!(want.scope, Scope::File(..)) && !split && {
                let whole = Want { scope: Scope::Dir(want.scope.dir().clone()), mode: want.mode };
                let dirs =
                    self.clients.iter().filter(|(t, _)| *t != s).filter_map(|(_, c)| c.believes.get(&whole.scope));
                dirs.into_iter().any(|b| contradicts(&whole.scope, b, &whole))
            };
            let ending = self.clients.values().any(|c| c.gone);
            assert!(earlier || blocked || joined || ending, "session {s} waits for {want:?} for no reason");
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Acquire(s, want) if !self.clients[&s].gone => {
                if self.waiting.iter().all(|w| w.0 != s || w.2 != want) {
                    self.requests += 1;
                    self.waiting.push((s, self.requests, want.clone()));
                    self.say(s, Ask::Acquire { request: RequestId(self.requests), wants: vec![want] });
                }
            }
            Step::Cancel(s, i) => {
                let own: Vec<Want> = self.waiting.iter().filter(|w| w.0 == s).map(|w| w.2.clone()).collect();
                if let Some(want) = own.get(i % own.len().max(1)) {
                    self.waiting.retain(|w| w.0 != s || w.2 != *want);
                    self.say(s, Ask::Cancel { wants: vec![want.clone()] });
                }
            }
            Step::Release(s, i) => {
                let own: Vec<Scope> = self.clients[&s].believes.keys().cloned().collect();
                if let Some(scope) = own.get(i % own.len().max(1)) {
                    self.give_back(s, scope.clone(), GrantNumber::default(), false);
                }
            }
            Step::Answer(s) => {
                if let Some((scope, (number, keep))) = self.clients.get_mut(&s).and_then(|c| c.recalls.pop_first()) {
                    self.give_back(s, scope, number, keep);
                }
            }
            Step::Renew(s) => {
                let incarnation = self.clients[&s].incarnation;
                if !self.clients[&s].gone {
                    self.on(Event::Renewed { session: SessionId(s), incarnation });
                }
            }
            Step::NewLife(s) => self.up(s),
            Step::Pass(ms) => {
                self.now += Duration::from_millis(ms);
                self.on(Event::Tick);
            }
            Step::Acquire(..) => {}
        }
    }

    fn give_back(&mut self, s: u64, scope: Scope, number: GrantNumber, keep: bool) {
        let client = self.clients.get_mut(&s).unwrap();
        let mut number = number;
        if let Some(belief) = client.believes.get_mut(&scope) {
            number = number.max(belief.number);
            if keep {
                belief.mode = Mode::Shared;
            } else {
                client.believes.remove(&scope);
            }
        } else if let Scope::File(d, f) = &scope
            && let Some(belief) = client.believes.get_mut(&Scope::Dir(d.clone()))
        {
            number = number.max(belief.number);
            belief.without.insert(f.clone());
        }
        self.say(s, Ask::Release { scope, number, keep_shared: keep });
    }

    /// Everybody lives, answers, and gives back: then nobody may wait for ever.
    fn calm_down(&mut self) {
        for _ in 0..400 {
            for s in 1..4 {
                if self.clients[&s].gone {
                    self.up(s);
                }
                self.step(Step::Renew(s));
                while !self.clients[&s].recalls.is_empty() {
                    self.step(Step::Answer(s));
                }
            }
            self.step(Step::Pass(30));
            if self.waiting.is_empty() {
                return;
            }
        }
        panic!("still waiting: {:?}", self.waiting);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_does_as_the_model_says(steps in steps()) {
        let mut model = Model::new();
        for step in steps {
            model.step(step);
            while let Some((s, scope, number)) = model.lost.pop() {
                model.say(s, Ask::Release { scope, number, keep_shared: false });
            }
            model.check_nobody_is_forgotten();
        }
        model.calm_down();
    }
}
