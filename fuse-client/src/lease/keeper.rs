//! The keeper's door: operations ask, are admitted with guards, and are done. What is not covered is asked for, once per want however many wait.
//!
//! An operation that needs several directories takes its guards directory by directory in the order of their keys, and keeps what it has while
//! it waits for the next (for a bounded time), so that two renames in opposite directions cannot take turns for ever. Within one directory it
//! takes all or nothing.

use super::event::{Effect, Event, How, OpId, RecallId, What, Why};
use super::room::{Cover, Question, Room, RoomKey};
use efc_common::id::Incarnation;
use efc_common::lease::{Ask, GrantNumber, Mode, Moment, RequestId, Scope, Times, Want};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

/// What a keeper is made with.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Agreed on with the masters.
    pub times: Times,
    /// After which an unused lease is given back.
    pub idle: Duration,
    /// Leases that are held; over it the longest unused go back.
    pub leases_max: usize,
    /// Operations that wait; over it they fail.
    pub waiting_max: usize,
    /// Claims in one message to a new leader.
    pub claims_max: usize,
    /// How long an operation keeps one directory while it waits for another.
    pub pin: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            times: Times::default(),
            idle: Duration::from_secs(60),
            leases_max: 50_000,
            waiting_max: 65_536,
            claims_max: 1000,
            pin: Duration::from_secs(1),
        }
    }
}

/// Permission for one need of a running operation. Goes back to [`Keeper::done`].
#[derive(Debug)]
#[must_use = "a guard that is not given back blocks recalls"]
pub struct Guard {
    want: Want,
    cover: Cover,
    since: GrantNumber,
    life: u64,
}

impl Guard {
    /// The grant since which nobody else can have changed what it covers.
    pub fn since(&self) -> GrantNumber {
        self.since
    }
}

/// How much there is, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Leases that are held.
    pub leases: usize,
    /// Operations that wait.
    pub waiting: usize,
    /// Guards of running operations.
    pub running: usize,
}

#[derive(Debug)]
pub(super) struct Op {
    /// By room, in the order of rooms.
    needs: Vec<(RoomKey, Vec<Want>)>,
    /// So many of them are guarded.
    pinned: usize,
    pub(super) guards: Vec<Guard>,
    /// Waits there; none: runs, or waits for a session.
    parked: Option<RoomKey>,
    running: bool,
}

impl Op {
    /// What it has no guards for yet.
    pub(super) fn missing(&self) -> &[(RoomKey, Vec<Want>)] {
        &self.needs[self.pinned..]
    }

    fn only_reads(&self) -> bool {
        self.needs.iter().flat_map(|(_, w)| w).all(|w| w.mode == Mode::Shared)
    }
}

/// The session's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Life {
    /// No session, or nothing of the last one is left.
    None,
    Up(Incarnation),
    /// Being dropped: the drop that is under way, and whether an operation of that life ran since it began.
    Ending {
        incarnation: Incarnation,
        drop: Option<RecallId>,
        again: bool,
    },
}

/// What a mount may believe and change. See the module's page for how it is driven.
pub struct Keeper {
    pub(super) config: Config,
    pub(super) life: Life,
    /// Counts the lives, so that guards of an old one are known.
    pub(super) lives: u64,
    pub(super) term: u64,
    pub(super) until: Moment,
    /// While leases of an older term are not confirmed: when those end.
    pub(super) bound: Option<Moment>,
    pub(super) unconfirmed: BTreeSet<Scope>,
    pub(super) claim_next: Moment,
    pub(super) rooms: HashMap<RoomKey, Room>,
    pub(super) ops: BTreeMap<OpId, Op>,
    /// Readers that went past leases on their way back: which; none of a life that is over.
    pub(super) passing: HashMap<OpId, Option<Vec<(Scope, RecallId)>>>,
    /// The highest grant that was believed.
    pub(super) newest: GrantNumber,
    pub(super) waiting: usize,
    /// Operations that wait for a session.
    pub(super) homeless: VecDeque<OpId>,
    pub(super) running: usize,
    /// Guards of lives that are over.
    pub(super) running_old: usize,
    pub(super) leases: usize,
    pub(super) questions_due: BTreeSet<(Moment, Want)>,
    pub(super) pins_due: BTreeSet<(Moment, OpId)>,
    pub(super) by_use: BTreeSet<(Moment, RoomKey)>,
    pub(super) requests: u64,
    pub(super) recalls: u64,
}

impl Keeper {
    /// A keeper without a session.
    pub fn new(config: Config) -> Self {
        Keeper {
            config,
            life: Life::None,
            lives: 0,
            term: 0,
            until: Moment::ZERO,
            bound: None,
            unconfirmed: BTreeSet::new(),
            claim_next: Moment::ZERO,
            rooms: HashMap::new(),
            ops: BTreeMap::new(),
            passing: HashMap::new(),
            newest: GrantNumber::default(),
            waiting: 0,
            homeless: VecDeque::new(),
            running: 0,
            running_old: 0,
            leases: 0,
            questions_due: BTreeSet::new(),
            pins_due: BTreeSet::new(),
            by_use: BTreeSet::new(),
            requests: 0,
            recalls: 0,
        }
    }

    /// Takes an event at a time that never goes back, and appends what is to be done.
    pub fn on(&mut self, now: Moment, event: Event, out: &mut Vec<Effect>) {
        // An answered renewal prolongs also a belief that has just ended but that nobody has acted on.
        if let Event::Renewed { incarnation, term, sent } = event {
            self.renewed(now, incarnation, term, sent, out);
        }
        // Who has given up is not admitted on the way.
        if let Event::GiveUp { op } = event {
            self.give_up(now, op, out);
        }
        self.expire(now, out);
        match event {
            Event::SessionUp { incarnation, term, sent } => self.session_up(now, incarnation, term, sent, out),
            Event::Inherited { incarnation } => self.inherited(incarnation, out),
            Event::Renewed { .. } | Event::GiveUp { .. } => {}
            Event::SessionRefused { incarnation } if self.life == Life::Up(incarnation) => self.lose(out),
            Event::SessionRefused { .. } => {}
            Event::Told { incarnation, tell } if self.life == Life::Up(incarnation) => self.told(now, tell, out),
            Event::Told { .. } => {}
            Event::Want { op, needs } => self.want(now, op, needs, out),
            Event::Done { op } => {
                for guard in self.ops.remove(&op).map(|op| op.guards).unwrap_or_default() {
                    self.done(now, guard, out);
                }
                self.passed(now, op, out);
            }
            Event::Flushed { recall, scope } => self.flushed(now, recall, &scope, out),
            Event::Dropped { recall, what: What::Scope(scope) } => self.dropped(now, recall, &scope, out),
            Event::Dropped { recall, what: What::All } => self.dropped_all(recall, out),
            Event::Close => self.close(now, out),
            Event::Tick => self.tick(now, out),
        }
    }

    /// Takes over the times that a new session was opened by. To be told before [`Event::SessionUp`]; not while a session lives.
    pub fn agree(&mut self, times: Times) {
        if self.life == Life::None {
            self.config.times = times;
        }
    }

    /// Counts the lives: what an operation read under an earlier one may not be remembered.
    pub fn lives(&self) -> u64 {
        self.lives
    }

    /// The highest grant so far. What is covered by a later one may have been changed by others since.
    pub fn newest(&self) -> GrantNumber {
        self.newest
    }

    /// Until when what is held may be believed.
    pub fn believed_until(&self) -> Moment {
        match self.life {
            Life::Up(_) => self.bound.map_or(self.until, |b| b.min(self.until)),
            _ => Moment::ZERO,
        }
    }

    /// Is just this scope leased (a file: apart from its directory)?
    pub fn has(&self, scope: &Scope) -> bool {
        self.rooms.get(&RoomKey::of(scope)).and_then(|r| r.lease(scope)).is_some_and(|l| l.held.is_some())
    }

    /// How much there is.
    pub fn counts(&self) -> Counts {
        let running = self.running + self.running_old + self.passing.values().flatten().count();
        Counts { leases: self.leases, waiting: self.waiting, running }
    }

    /// Admits an operation with one need at once, if that is covered.
    pub fn try_admit(&mut self, now: Moment, need: &Want) -> Option<Guard> {
        if now >= self.believed_until() {
            return None;
        }
        let room = self.rooms.get_mut(&RoomKey::of(&need.scope))?;
        let (cover, since) = room.cover(need)?;
        room.count(need, cover, true);
        room.used = now;
        self.running += 1;
        Some(Guard { want: need.clone(), cover, since, life: self.lives })
    }

    /// Takes a guard back. False: what was read under it may not be remembered, because belief ended meanwhile.
    pub fn done(&mut self, now: Moment, guard: Guard, out: &mut Vec<Effect>) -> bool {
        let room = RoomKey::of(&guard.want.scope);
        let believed = self.free(now, guard, out);
        if !room.is_dir && self.rooms.get(&room).is_some_and(|r| !r.is_busy()) {
            // Nothing is remembered by it, the next directory that is renamed is another, and masters keep few of them.
            self.give_up_room(now, &room, out);
        }
        believed
    }

    fn free(&mut self, now: Moment, guard: Guard, out: &mut Vec<Effect>) -> bool {
        if guard.life != self.lives {
            self.running_old = self.running_old.saturating_sub(1);
            self.old_guard_gone(out);
            return false;
        }
        self.running = self.running.saturating_sub(1);
        let key = RoomKey::of(&guard.want.scope);
        let Some(room) = self.rooms.get_mut(&key) else { return false };
        room.count(&guard.want, guard.cover, false);
        if room.lease.recall.is_some() {
            self.advance(now, &key.scope(), out);
        }
        if let Scope::File(..) = guard.want.scope {
            self.advance(now, &guard.want.scope, out);
        }
        now < self.believed_until()
    }

    pub(super) fn give_back(&mut self, now: Moment, guards: Vec<Guard>, out: &mut Vec<Effect>) {
        for guard in guards {
            self.free(now, guard, out);
        }
    }

    fn want(&mut self, now: Moment, op: OpId, needs: Vec<Want>, out: &mut Vec<Effect>) {
        if self.waiting >= self.config.waiting_max {
            return out.push(Effect::Fail { op, why: Why::TooMany });
        }
        let mut rooms: BTreeMap<RoomKey, Vec<Want>> = BTreeMap::new();
        for need in needs {
            rooms.entry(RoomKey::of(&need.scope)).or_default().push(need);
        }
        let needs = rooms.into_iter().collect();
        let waits = Op { needs, pinned: 0, guards: Vec::new(), parked: None, running: false };
        if self.ops.insert(op, waits).is_none() {
            self.waiting += 1;
        }
        self.attempt(now, op, out);
    }

    /// Takes an operation as far as it gets.
    pub(super) fn attempt(&mut self, now: Moment, id: OpId, out: &mut Vec<Effect>) {
        let Some(mut op) = self.ops.remove(&id) else { return };
        op.parked = None;
        if !matches!(self.life, Life::Up(_)) {
            self.homeless.push_back(id);
            self.ops.insert(id, op);
            if matches!(self.life, Life::Ending { drop: Some(_), .. }) {
                self.pass_homeless(out);
            }
            return;
        }
        while let Some((key, needs)) = op.needs.get(op.pinned) {
            match self.guard_all(now, key, needs) {
                Some(guards) => op.guards.extend(guards),
                None => break,
            }
            op.pinned += 1;
        }
        if op.pinned == op.needs.len() {
            op.running = true;
            self.waiting -= 1;
            self.ops.insert(id, op);
            return out.push(Effect::Admit { op: id, how: How::Believed { until: self.believed_until() } });
        }
        if op.only_reads() && op.missing().iter().any(|n| self.may_pass(n)) {
            return self.pass_by(now, id, op, out);
        }
        self.park(now, id, op, out);
    }

    fn guard_all(&mut self, now: Moment, key: &RoomKey, needs: &[Want]) -> Option<Vec<Guard>> {
        if now >= self.believed_until() {
            return None;
        }
        let room = self.rooms.get_mut(key)?;
        let covers: Option<Vec<(Cover, GrantNumber)>> = needs.iter().map(|n| room.cover(n)).collect();
        room.used = now;
        let guards = needs.iter().zip(covers?).map(|(need, (cover, since))| {
            room.count(need, cover, true);
            Guard { want: need.clone(), cover, since, life: self.lives }
        });
        let guards: Vec<Guard> = guards.collect();
        self.running += guards.len();
        Some(guards)
    }

    /// Lets an operation wait where it got stuck, and asks for all it still needs.
    fn park(&mut self, now: Moment, id: OpId, mut op: Op, out: &mut Vec<Effect>) {
        let mut wants = Vec::new();
        for (i, (key, needs)) in op.needs.iter().enumerate().skip(op.pinned) {
            let room = self.rooms.entry(key.clone()).or_default();
            if i == op.pinned {
                room.parked.push_back(id);
                op.parked = Some(key.clone());
            }
            // While a lease is on its way back, asking waits until it has gone.
            let open = |n: &&Want| room.cover(n).is_none() && !room.is_leaving(n) && !room.questions.contains_key(n);
            wants.extend(needs.iter().filter(open).cloned());
        }
        if op.pinned > 0 {
            self.pins_due.insert((now + self.config.pin, id));
        }
        self.ops.insert(id, op);
        self.ask(now, wants, out);
    }

    fn ask(&mut self, now: Moment, wants: Vec<Want>, out: &mut Vec<Effect>) {
        if wants.is_empty() {
            return;
        }
        self.requests += 1;
        let (request, next) = (RequestId(self.requests), now + self.config.times.again);
        for want in &wants {
            let room = self.rooms.entry(RoomKey::of(&want.scope)).or_default();
            room.questions.insert(want.clone(), Question { request, next });
            self.questions_due.insert((next, want.clone()));
        }
        out.push(Effect::Send(Ask::Acquire { request, wants }));
    }

    /// Tries again all who wait in a room, in order.
    pub(super) fn wake(&mut self, now: Moment, key: &RoomKey, out: &mut Vec<Effect>) {
        let Some(room) = self.rooms.get_mut(key) else { return };
        for op in std::mem::take(&mut room.parked) {
            self.attempt(now, op, out);
        }
        self.tidy(key);
    }

    pub(super) fn tidy(&mut self, key: &RoomKey) {
        if let Some(room) = self.rooms.get_mut(key)
            && room.tidy()
        {
            let listed = room.listed;
            self.rooms.remove(key);
            if let Some(at) = listed {
                self.by_use.remove(&(at, key.clone()));
            }
        }
    }

    /// Takes from a waiting operation what it has so far.
    pub(super) fn unpin(&mut self, now: Moment, id: OpId, out: &mut Vec<Effect>) {
        let Some(op) = self.ops.get_mut(&id).filter(|o| !o.running) else { return };
        op.pinned = 0;
        let (guards, parked) = (std::mem::take(&mut op.guards), op.parked.take());
        if let Some(room) = parked.and_then(|key| self.rooms.get_mut(&key)) {
            room.parked.retain(|p| *p != id);
        }
        self.give_back(now, guards, out);
    }

    fn give_up(&mut self, now: Moment, id: OpId, out: &mut Vec<Effect>) {
        let Some(op) = self.ops.get(&id).filter(|o| !o.running) else { return };
        let rooms: Vec<RoomKey> = op.needs.iter().map(|(key, _)| key.clone()).collect();
        self.unpin(now, id, out);
        self.homeless.retain(|h| *h != id);
        self.ops.remove(&id);
        self.waiting -= 1;
        for key in rooms {
            let Some(room) = self.rooms.get_mut(&key) else { continue };
            if room.parked.is_empty() && !room.questions.is_empty() {
                // Somebody who is parked elsewhere may need it too; then it asks again.
                let wants = std::mem::take(&mut room.questions).into_keys().collect();
                out.push(Effect::Send(Ask::Cancel { wants }));
            }
            self.tidy(&key);
        }
    }

    fn close(&mut self, now: Moment, out: &mut Vec<Effect>) {
        let waiting: Vec<OpId> = self.ops.iter().filter(|(_, o)| !o.running).map(|(&id, _)| id).collect();
        for op in waiting {
            self.give_up(now, op, out);
            out.push(Effect::Fail { op, why: Why::Closed });
        }
    }

    pub(super) fn waits(&self, id: OpId) -> bool {
        self.ops.get(&id).is_some_and(|o| !o.running)
    }

    pub(super) fn only_reads(&self, id: OpId) -> bool {
        self.ops.get(&id).is_some_and(Op::only_reads)
    }

    /// After everything was lost: nobody who waits has anything.
    pub(super) fn strand(&mut self) {
        self.homeless.clear();
        for (&id, op) in self.ops.iter_mut().filter(|(_, o)| !o.running) {
            (op.pinned, op.parked) = (0, None);
            self.running_old -= op.guards.len().min(self.running_old);
            op.guards.clear();
            self.homeless.push_back(id);
        }
    }
}
