//! The world: what happens when, who leads, and the check.
//!
//! Agreement among the masters is one value here (`term` and `lives`): a proposal or a proof counts if its master's term is the newest at the
//! moment of the decision. So a deposed master goes on for as long as it is not told, but can have nothing agreed on.

use crate::client::{Client, Doing, Op, choose};
use crate::net::{Chance, Clock, Down, Up};
use crate::origin::Origin;
use efc_common::id::{Incarnation, SessionId};
use efc_common::lease::{Tell, Times};
use efc_fuse::lease::{Effect as Do, Event as Hear, How, OpId, RecallId, What};
use efc_master::lease::{Bounds, Effect, Engine, Event};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

const CLIENTS: u64 = 4;
const FAULTS_END: Duration = Duration::from_secs(90);
const END: Duration = Duration::from_secs(170);

/// Ways to break what must hold. Each must be noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Clients believe longer than masters wait.
    NegativeMargin,
    /// A new leader waits for no claims.
    NoClaims,
    /// A deposed leader needs no agreement to end a silent session.
    FenceAlone,
    /// Readers are served what is remembered although its lease has gone.
    NothingDropped,
}

impl Broken {
    pub(crate) const ALL: [Broken; 4] =
        [Broken::NegativeMargin, Broken::NoClaims, Broken::FenceAlone, Broken::NothingDropped];
}

/// How a run ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    pub(crate) violation: Option<String>,
    pub(crate) trace: u64,
    pub(crate) events: u64,
    pub(crate) hits: u64,
    pub(crate) changes: u64,
    pub(crate) uncached: u64,
    pub(crate) recalls: u64,
    pub(crate) lost: u64,
    pub(crate) leaders: u64,
}

impl Outcome {
    pub(crate) fn add(&mut self, o: &Outcome) {
        self.events += o.events;
        self.hits += o.hits;
        self.changes += o.changes;
        self.uncached += o.uncached;
        self.recalls += o.recalls;
        self.lost += o.lost;
        self.leaders += o.leaders;
    }
}

struct Master {
    term: u64,
    engine: Engine,
    clock: Clock,
    alive: bool,
}

#[derive(Debug, Clone)]
enum Decision {
    Proved,
    Ended(SessionId, Incarnation),
    Opened { client: usize, after: Incarnation, sent: Duration },
    Renewed { client: usize, incarnation: Incarnation, sent: Duration },
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Fetch,
    /// Read past a lease on its way back; nothing is remembered.
    Pass,
    Remember,
    Apply,
    Answer,
    /// The answer was lost, and no late copy of the request can be under way any more.
    Unknown,
}

#[derive(Debug, Clone)]
enum Happening {
    Up(usize, usize, Up),
    Down(usize, usize, Down),
    Decide(usize, Decision),
    MasterTick(usize),
    MasterDies(usize),
    Elect,
    ClientTick(usize, u64),
    NewOp(usize, u64),
    GiveUp(usize, u64, OpId),
    Step(usize, u64, OpId, Step, Doing),
    Flushed(usize, u64, RecallId, efc_common::lease::Scope),
    Dropped(usize, u64, RecallId, What),
    Crash(usize),
    Restart(usize),
    Pause(usize),
    Cut(usize, usize),
}

pub(crate) struct World {
    chance: Chance,
    broken: Option<Broken>,
    now: Duration,
    agenda: BTreeMap<(Duration, u64), Happening>,
    entries: u64,
    term: u64,
    lives: BTreeMap<SessionId, (Incarnation, bool)>,
    masters: Vec<Master>,
    clients: Vec<Client>,
    cut: BTreeMap<(usize, usize), Duration>,
    origin: Origin,
    out: Outcome,
    log: bool,
}

fn session(client: usize) -> SessionId {
    SessionId(client as u64 + 1)
}

impl World {
    pub(crate) fn new(seed: u64, broken: Option<Broken>) -> Self {
        let mut chance = Chance::new(seed);
        let times = World::client_times(broken);
        let clients = (0..CLIENTS).map(|_| Client::new(times, &mut chance)).collect();
        let mut world = World {
            chance,
            broken,
            now: Duration::ZERO,
            agenda: BTreeMap::new(),
            entries: 0,
            term: 0,
            lives: BTreeMap::new(),
            masters: Vec::new(),
            clients,
            cut: BTreeMap::new(),
            origin: Origin::default(),
            out: Outcome::default(),
            log: std::env::var_os("EFC_SIM_LOG").is_some(),
        };
        world.after(Duration::ZERO, Happening::Elect);
        for c in 0..world.clients.len() {
            let at = world.chance.ms(1, 200);
            world.after(at, Happening::ClientTick(c, 0));
            world.after(at, Happening::NewOp(c, 0));
        }
        world
    }

    fn client_times(broken: Option<Broken>) -> Times {
        let mut times = Times::default();
        if broken == Some(Broken::NegativeMargin) {
            times.lease += Duration::from_secs(6);
        }
        times
    }

    fn after(&mut self, delay: Duration, what: Happening) {
        self.entries += 1;
        self.agenda.insert((self.now + delay, self.entries), what);
    }

    fn faulty(&self) -> bool {
        self.now < FAULTS_END
    }

    fn fail(&mut self, what: String) {
        let at = self.now;
        self.out.violation.get_or_insert_with(|| format!("at {at:?}: {what}"));
    }

    pub(crate) fn run(mut self) -> Outcome {
        while let Some(((at, _), what)) = self.agenda.pop_first() {
            if at > END || self.out.violation.is_some() {
                break;
            }
            self.now = at;
            self.out.events += 1;
            self.note(&what);
            self.happen(what);
        }
        let waiting: Vec<String> = (self.clients.iter().enumerate())
            .flat_map(|(c, x)| x.ops.iter().map(move |(id, op)| format!("client {c} {id:?} {op:?}")))
            .collect();
        if !waiting.is_empty() {
            self.fail(format!("operations that never end: {waiting:?}"));
        }
        self.out
    }

    /// Folds what happens into the trace.
    fn note(&mut self, what: &Happening) {
        if self.log && !matches!(what, Happening::MasterTick(_) | Happening::ClientTick(..)) {
            println!("{:?} {what:?}", self.now);
        }
        let mut hasher = DefaultHasher::new();
        (self.out.trace, self.now, std::mem::discriminant(what)).hash(&mut hasher);
        self.out.trace = hasher.finish();
    }

    fn happen(&mut self, what: Happening) {
        if let Some(c) = sleeper(&what)
            && self.clients[c].paused_until > self.now
        {
            let delay = self.clients[c].paused_until - self.now;
            return self.after(delay, what);
        }
        match what {
            Happening::Up(c, m, up) => self.master_hears(m, c, up),
            Happening::Down(c, m, down) => self.client_hears(c, m, down),
            Happening::Decide(m, decision) => self.decide(m, decision),
            Happening::MasterTick(m) if self.masters[m].alive => {
                self.master(m, Event::Tick);
                self.after(Duration::from_millis(50), Happening::MasterTick(m));
            }
            Happening::MasterDies(m) => self.masters[m].alive = false,
            Happening::Elect => self.elect(),
            Happening::ClientTick(c, boot) if self.clients[c].boot == boot => self.client_tick(c),
            Happening::NewOp(c, boot) if self.clients[c].boot == boot => self.new_op(c),
            Happening::GiveUp(c, boot, op) if self.clients[c].boot == boot => self.give_up(c, op),
            Happening::Step(c, boot, op, step, doing) => self.step(c, boot, op, step, doing),
            Happening::Flushed(c, boot, recall, scope) if self.clients[c].boot == boot => {
                self.client(c, Hear::Flushed { recall, scope });
            }
            Happening::Dropped(c, boot, recall, what) if self.clients[c].boot == boot => self.dropped(c, recall, what),
            Happening::Crash(c) => self.crash(c),
            Happening::Restart(c) => self.restart(c),
            Happening::Pause(c) => self.clients[c].paused_until = self.now + self.chance.ms(100, 30_000),
            Happening::Cut(c, m) => drop(self.cut.insert((c, m), self.now + self.chance.ms(500, 15_000))),
            _ => {}
        }
    }

    // Masters.

    fn elect(&mut self) {
        self.term += 1;
        self.out.leaders += 1;
        // The deposed one may go on for a while, cut off from the other masters but not from clients.
        if let Some(m) = self.masters.len().checked_sub(1) {
            let lingers = if self.chance.percent(60) { self.chance.ms(0, 25_000) } else { Duration::ZERO };
            self.after(lingers, Happening::MasterDies(m));
        }
        let clock = Clock::new(&mut self.chance);
        let engine = Engine::new(Times::default(), Bounds::default());
        self.masters.push(Master { term: self.term, engine, clock, alive: true });
        let m = self.masters.len() - 1;
        let living = self.lives.iter().filter(|(_, l)| l.1).map(|(&s, l)| (s, l.0)).collect::<Vec<_>>();
        let term = self.term;
        match self.broken {
            Some(Broken::NoClaims) => {
                self.master(m, Event::Office { term, sessions: Vec::new() });
                living
                    .into_iter()
                    .for_each(|(session, incarnation)| self.master(m, Event::SessionUp { session, incarnation }));
            }
            _ => self.master(m, Event::Office { term, sessions: living }),
        }
        self.after(Duration::from_millis(50), Happening::MasterTick(m));
        let next = if self.chance.percent(40) { self.chance.ms(500, 9_000) } else { self.chance.ms(9_000, 60_000) };
        if self.now + next < FAULTS_END {
            self.after(next, Happening::Elect);
        }
        self.trouble();
    }

    /// Some of what goes wrong until the next election.
    fn trouble(&mut self) {
        for c in 0..self.clients.len() {
            let at = self.chance.ms(0, 20_000);
            if self.now + at >= FAULTS_END {
                continue;
            }
            match self.chance.below(6) {
                0 => self.after(at, Happening::Crash(c)),
                1 | 2 => self.after(at, Happening::Pause(c)),
                _ => {}
            }
            for m in self.masters.len().saturating_sub(2)..self.masters.len() {
                if self.chance.percent(40) {
                    let at = self.chance.ms(0, 15_000);
                    self.after(at, Happening::Cut(c, m));
                }
            }
        }
    }

    fn master(&mut self, m: usize, event: Event) {
        if !self.masters[m].alive {
            return;
        }
        let mut effects = Vec::new();
        let now = self.masters[m].clock.at(self.now);
        self.masters[m].engine.on(now, event, &mut effects);
        for effect in effects {
            self.master_does(m, effect);
        }
    }

    fn master_does(&mut self, m: usize, effect: Effect) {
        let (alone, delay) = (self.broken == Some(Broken::FenceAlone), self.chance.ms(1, 60));
        match effect {
            Effect::Tell { session, incarnation, tell } => {
                self.out.recalls += u64::from(matches!(tell, Tell::Recall { .. }));
                self.send_down(session.0 as usize - 1, m, Down::Tell { incarnation, tell });
            }
            Effect::Fence { session, incarnation } if alone => {
                self.master(m, Event::SessionEnded { session, incarnation })
            }
            Effect::Fence { session, incarnation } => {
                self.after(delay, Happening::Decide(m, Decision::Ended(session, incarnation)));
            }
            Effect::Prove { .. } => self.after(delay, Happening::Decide(m, Decision::Proved)),
            Effect::RefuseRenewal { session, incarnation, .. } => {
                self.send_down(session.0 as usize - 1, m, Down::Refused { incarnation });
            }
            Effect::Renew { .. } => {}
        }
    }

    fn master_hears(&mut self, m: usize, c: usize, up: Up) {
        let delay = self.chance.ms(1, 60);
        match up {
            Up::Open { after, sent } => {
                self.after(delay, Happening::Decide(m, Decision::Opened { client: c, after, sent }));
            }
            Up::Renew { incarnation, sent } => {
                self.master(m, Event::Renewed { session: session(c), incarnation });
                let decision = Decision::Renewed { client: c, incarnation, sent };
                self.after(delay, Happening::Decide(m, decision));
            }
            Up::Ask { incarnation, ask } => self.master(m, Event::Said { session: session(c), incarnation, ask }),
        }
    }

    fn decide(&mut self, m: usize, decision: Decision) {
        let term = self.masters[m].term;
        if term != self.term || !self.masters[m].alive {
            return;
        }
        match decision {
            Decision::Proved => self.master(m, Event::Proved { term }),
            Decision::Ended(session, incarnation) => {
                if let Some(life) = self.lives.get_mut(&session).filter(|l| l.0 == incarnation) {
                    life.1 = false;
                    self.master(m, Event::SessionEnded { session, incarnation });
                }
            }
            Decision::Opened { client, after, sent } => {
                let life = self.lives.entry(session(client)).or_insert((Incarnation(0), false));
                let last = life.0;
                if last != after {
                    return self.send_down(client, m, Down::NotOpened { last });
                }
                *life = (Incarnation(last.0 + 1), true);
                let incarnation = life.0;
                self.master(m, Event::SessionUp { session: session(client), incarnation });
                self.send_down(client, m, Down::Opened { incarnation, term, sent });
            }
            Decision::Renewed { client, incarnation, sent } => {
                // A refusal was sent already.
                if self.lives.get(&session(client)) == Some(&(incarnation, true)) {
                    self.send_down(client, m, Down::Renewed { incarnation, term, sent });
                }
            }
        }
    }

    // The network.

    fn deliveries(&mut self, c: usize, m: usize) -> Vec<Duration> {
        let cut = self.cut.get(&(c, m)).is_some_and(|until| *until > self.now);
        if self.faulty() && (cut || self.chance.percent(4)) {
            return Vec::new();
        }
        let copies = if self.faulty() && self.chance.percent(4) { 2 } else { 1 };
        let delay = |chance: &mut Chance, faulty| match chance.below(100) {
            0..5 if faulty => chance.ms(50, 4_000),
            _ => chance.ms(0, 20),
        };
        let faulty = self.faulty();
        (0..copies).map(|_| delay(&mut self.chance, faulty)).collect()
    }

    fn send_up(&mut self, c: usize, up: Up) {
        let m = self.clients[c].leader;
        for delay in self.deliveries(c, m) {
            self.after(delay, Happening::Up(c, m, up.clone()));
        }
    }

    fn send_down(&mut self, c: usize, m: usize, down: Down) {
        for delay in self.deliveries(c, m) {
            self.after(delay, Happening::Down(c, m, down.clone()));
        }
    }

    // Clients.

    fn client(&mut self, c: usize, event: Hear) {
        let now = self.clients[c].clock.at(self.now);
        let mut effects = Vec::new();
        let Some(keeper) = &mut self.clients[c].keeper else { return };
        keeper.on(now, event, &mut effects);
        for effect in effects {
            if self.log {
                println!("   c{c}: {effect:?}");
            }
            self.client_does(c, effect);
        }
    }

    fn client_does(&mut self, c: usize, effect: Do) {
        let boot = self.clients[c].boot;
        match effect {
            Do::Send(ask) => {
                if let Some(incarnation) = self.clients[c].up {
                    self.send_up(c, Up::Ask { incarnation, ask });
                }
            }
            Do::Admit { op, how } => self.admitted(c, op, how),
            Do::Fail { op, .. } => drop(self.clients[c].ops.remove(&op)),
            Do::Flush { recall, scope } => {
                let delay = if self.chance.percent(5) { self.chance.ms(300, 5_000) } else { self.chance.ms(0, 100) };
                self.after(delay, Happening::Flushed(c, boot, recall, scope));
            }
            Do::Drop { recall, what } => {
                let delay = self.chance.ms(0, 50);
                self.after(delay, Happening::Dropped(c, boot, recall, what));
            }
            Do::SessionLost { .. } => {
                self.out.lost += 1;
                self.clients[c].up = None;
            }
        }
    }

    fn dropped(&mut self, c: usize, recall: RecallId, what: What) {
        let scope = match &what {
            What::Scope(scope) => Some(scope),
            What::All => None,
        };
        if self.broken != Some(Broken::NothingDropped) {
            self.clients[c].forget(scope);
        }
        self.client(c, Hear::Dropped { recall, what });
    }

    fn client_hears(&mut self, c: usize, m: usize, down: Down) {
        if self.clients[c].keeper.is_none() {
            return;
        }
        let now = self.clients[c].clock.at(self.now);
        match down {
            Down::Opened { incarnation, term, sent } => {
                let x = &mut self.clients[c];
                if x.up.is_none() && incarnation > x.last_life {
                    (x.up, x.last_life, x.leader) = (Some(incarnation), incarnation, m);
                    (x.answered_at, x.asked_at) = (now, now);
                    self.client(c, Hear::SessionUp { incarnation, term, sent });
                }
            }
            Down::NotOpened { last } => {
                let x = &mut self.clients[c];
                if x.up.is_none() {
                    x.last_life = x.last_life.max(last);
                }
            }
            Down::Renewed { incarnation, term, sent } => {
                self.clients[c].answered_at = now;
                self.client(c, Hear::Renewed { incarnation, term, sent });
            }
            Down::Refused { incarnation } => self.client(c, Hear::SessionRefused { incarnation }),
            Down::Tell { incarnation, tell } => self.client(c, Hear::Told { incarnation, tell }),
        }
    }

    fn client_tick(&mut self, c: usize) {
        self.client(c, Hear::Tick);
        let (boot, now) = (self.clients[c].boot, self.clients[c].clock.at(self.now));
        let delay = self.chance.ms(50, 150);
        self.after(delay, Happening::ClientTick(c, boot));
        let x = &self.clients[c];
        let answered = x.answered_at >= x.asked_at;
        let due = if answered { Times::default().renew() } else { Duration::from_millis(700) };
        if x.keeper.is_none() || now < x.asked_at + due {
            return;
        }
        if !answered || x.up.is_none() {
            self.look_for_leader(c);
        }
        let x = &mut self.clients[c];
        x.asked_at = now;
        let up = match x.up {
            Some(incarnation) => Up::Renew { incarnation, sent: now },
            None => Up::Open { after: x.last_life, sent: now },
        };
        self.send_up(c, up);
    }

    /// Usually finds the newest, sometimes one who only thinks so.
    fn look_for_leader(&mut self, c: usize) {
        let newest = self.masters.len() - 1;
        let back = if self.chance.percent(25) { self.chance.below(2) as usize } else { 0 };
        self.clients[c].leader = newest.saturating_sub(back);
    }

    fn crash(&mut self, c: usize) {
        if self.clients[c].keeper.take().is_some() {
            self.clients[c].ops.clear();
            // What the dead process sent to the origin may arrive for a while; its successor waits that long.
            let delay = self.chance.ms(2_200, 20_000);
            self.after(delay, Happening::Restart(c));
        }
    }

    fn restart(&mut self, c: usize) {
        let times = World::client_times(self.broken);
        let World { clients, chance, .. } = self;
        clients[c].restart(times, chance);
        let boot = clients[c].boot;
        self.after(Duration::from_millis(1), Happening::ClientTick(c, boot));
        self.after(Duration::from_millis(2), Happening::NewOp(c, boot));
    }

    // Operations.

    fn new_op(&mut self, c: usize) {
        let boot = self.clients[c].boot;
        if !self.faulty() || self.clients[c].keeper.is_none() {
            return;
        }
        let delay = self.chance.ms(1, 300);
        self.after(delay, Happening::NewOp(c, boot));
        let (doing, needs) = choose(&mut self.chance);
        let x = &mut self.clients[c];
        x.next_op += 1;
        let op = OpId(x.next_op);
        x.ops.insert(op, Op { doing, admitted: false, fetched: None, until: Duration::ZERO });
        if self.chance.percent(5) {
            let delay = self.chance.ms(1, 3_000);
            self.after(delay, Happening::GiveUp(c, boot, op));
        }
        self.client(c, Hear::Want { op, needs });
    }

    fn give_up(&mut self, c: usize, op: OpId) {
        if self.clients[c].ops.get(&op).is_some_and(|o| !o.admitted) {
            self.clients[c].ops.remove(&op);
            self.client(c, Hear::GiveUp { op });
        }
    }

    fn admitted(&mut self, c: usize, id: OpId, how: How) {
        let boot = self.clients[c].boot;
        let Some(op) = self.clients[c].ops.get_mut(&id) else {
            return self.fail(format!("client {c}: {id:?} was admitted and is not waiting"));
        };
        if std::mem::replace(&mut op.admitted, true) {
            return self.fail(format!("client {c}: {id:?} was admitted twice"));
        }
        let doing = op.doing.clone();
        let How::Believed { until } = how else {
            self.out.uncached += 1;
            if matches!(doing, Doing::Change(_)) {
                self.fail(format!("client {c}: a change without a lease"));
            }
            let delay = self.chance.ms(0, 60);
            self.after(delay, Happening::Step(c, boot, id, Step::Pass, doing));
            return;
        };
        op.until = until;
        match &doing {
            Doing::Read(unit) => {
                let (memory, newest) = (self.clients[c].memory(unit), self.origin.version(unit));
                match memory.version {
                    Some(version) if memory.writing == 0 => {
                        self.out.hits += 1;
                        if version != newest {
                            self.fail(format!("client {c} served {unit:?} at {version}, the origin is at {newest}"));
                        }
                        self.done(c, id);
                    }
                    _ => {
                        let delay = self.chance.ms(0, 30);
                        self.after(delay, Happening::Step(c, boot, id, Step::Fetch, doing));
                    }
                }
            }
            Doing::Change(units) => {
                for unit in units {
                    let memory = self.clients[c].memory(unit);
                    memory.version = None;
                    (memory.writing, memory.writes) = (memory.writing + 1, memory.writes + 1);
                }
                // A process may be stopped between being admitted and sending; it looks at the clock when it sends.
                let delay = if self.chance.percent(5) { self.chance.ms(0, 1_000) } else { self.chance.ms(0, 30) };
                self.after(delay, Happening::Step(c, boot, id, Step::Apply, doing));
            }
        }
    }

    fn done(&mut self, c: usize, id: OpId) {
        self.clients[c].ops.remove(&id);
        self.client(c, Hear::Done { op: id });
    }

    fn step(&mut self, c: usize, boot: u64, id: OpId, step: Step, doing: Doing) {
        let lives = self.clients[c].boot == boot && self.clients[c].ops.contains_key(&id);
        let delay = self.chance.ms(0, 30);
        match (step, &doing) {
            (Step::Fetch, Doing::Read(unit)) if lives => {
                let (version, memory) = (self.origin.version(unit), self.clients[c].memory(unit));
                // What is found while our own change is under way may be from before it.
                let fetched = (memory.writing == 0).then_some((version, memory.writes));
                if let Some(op) = self.clients[c].ops.get_mut(&id) {
                    op.fetched = fetched;
                }
                self.after(delay, Happening::Step(c, boot, id, Step::Remember, doing));
            }
            (Step::Pass, _) if lives => self.done(c, id),
            (Step::Remember, Doing::Read(unit)) if lives => {
                let fetched = self.clients[c].ops.get(&id).and_then(|o| o.fetched);
                let memory = self.clients[c].memory(unit);
                if let Some((version, writes)) = fetched
                    && memory.writing == 0
                    && memory.writes == writes
                {
                    memory.version = Some(version);
                }
                self.done(c, id);
            }
            // What was sent is applied also when the sender has died since.
            (Step::Apply, Doing::Change(units)) => {
                self.apply(c, units);
                if !lives {
                    return;
                }
                if self.chance.percent(4) {
                    self.after(Duration::from_millis(2_100), Happening::Step(c, boot, id, Step::Unknown, doing));
                } else {
                    self.after(delay, Happening::Step(c, boot, id, Step::Answer, doing));
                }
            }
            (Step::Answer | Step::Unknown, Doing::Change(units)) if lives => {
                for unit in units {
                    let newest = self.origin.version(unit);
                    let memory = self.clients[c].memory(unit);
                    memory.writing -= 1;
                    if matches!(step, Step::Answer) && memory.writing == 0 {
                        memory.version = Some(newest);
                    }
                }
                self.done(c, id);
            }
            _ => {}
        }
    }

    fn apply(&mut self, c: usize, units: &[crate::origin::Unit]) {
        self.out.changes += 1;
        for unit in units {
            self.origin.change(unit);
            for other in (0..self.clients.len()).filter(|o| *o != c) {
                let now = self.now;
                if self.clients[other].believes(now, unit) {
                    self.fail(format!("client {c} changes {unit:?} while client {other} believes it"));
                }
            }
        }
    }
}

/// The client that must be awake for this.
fn sleeper(what: &Happening) -> Option<usize> {
    match what {
        Happening::Step(_, _, _, Step::Fetch | Step::Apply, _) => None,
        Happening::Down(c, ..)
        | Happening::ClientTick(c, _)
        | Happening::NewOp(c, _)
        | Happening::GiveUp(c, ..)
        | Happening::Step(c, ..)
        | Happening::Flushed(c, ..)
        | Happening::Dropped(c, ..)
        | Happening::Crash(c) => Some(*c),
        _ => None,
    }
}
