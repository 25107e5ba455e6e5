//! The engine's door: events in, effects out; sessions and their ends; everything that time does.
//!
//! Time works through one ordered index of what is due. Entries are not taken out when they lose their meaning: each is checked against
//! the tables when it comes up, so a renewal costs nothing there. A crash loses all of it, which a new leader makes good by claims.

use super::subtree::{State, Subtree};
use super::table::{Dir, Hold, Split};
use efc_common::id::{Incarnation, SessionId};
use efc_common::lease::{Ask, DirKey, FileKey, GrantNumber, Moment, Reason, RequestId, Scope, Tell, Times, Want};
use std::collections::{BTreeMap, BTreeSet};

/// How much may be held and waited for.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Wants in the queue of one directory or split file.
    pub queue: usize,
    /// Split files of one directory; with more, a file is wanted as its whole directory.
    pub splits: usize,
    /// Subtrees, held or waited for.
    pub subtrees: usize,
    /// Wants of one session that wait.
    pub session_waits: usize,
    /// Leases of one session. Over it the oldest is recalled; nothing is granted at twice as many.
    pub session_leases: usize,
    /// The same for all sessions together.
    pub leases: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds {
            queue: 1024,
            splits: 1024,
            subtrees: 256,
            session_waits: 4096,
            session_leases: 100_000,
            leases: 2_000_000,
        }
    }
}

/// What the engine is told.
#[derive(Debug, Clone)]
pub enum Event {
    /// This master leads, in a term of its own. Begins with nothing held; what must be claimed is what these sessions believe.
    Office {
        /// The term, higher than all before.
        term: u64,
        /// The sessions that were agreed on so far.
        sessions: Vec<(SessionId, Incarnation)>,
    },
    /// A proof, begun after [`Effect::Prove`], that this master led.
    Proved {
        /// Of this term.
        term: u64,
    },
    /// A life of a session was agreed on. Who begins a new life believes nothing of the old one; but it may go on with its advisory locks, so a
    /// session that has not made all its claims still has to.
    SessionUp {
        /// Which.
        session: SessionId,
        /// Its new life.
        incarnation: Incarnation,
    },
    /// A renewal was heard.
    Renewed {
        /// Whose.
        session: SessionId,
        /// Of which life.
        incarnation: Incarnation,
    },
    /// The end of a life was agreed on: by its own wish, or after [`Effect::Fence`].
    SessionEnded {
        /// Which.
        session: SessionId,
        /// The life that is over.
        incarnation: Incarnation,
    },
    /// A session speaks of leases.
    Said {
        /// Who.
        session: SessionId,
        /// In which life.
        incarnation: Incarnation,
        /// What.
        ask: Ask,
    },
    /// Time has passed.
    Tick,
}

/// What is to be done for the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Say this to a session.
    Tell {
        /// To whom.
        session: SessionId,
        /// In which life.
        incarnation: Incarnation,
        /// What.
        tell: Tell,
    },
    /// Answer the renewal, if a proof begun after it was heard shows that this master leads.
    Renew {
        /// To whom.
        session: SessionId,
        /// In which life.
        incarnation: Incarnation,
    },
    /// Answer the renewal with a refusal.
    RefuseRenewal {
        /// To whom.
        session: SessionId,
        /// In which life.
        incarnation: Incarnation,
        /// Why.
        reason: Reason,
    },
    /// Have the end of this life agreed on, then tell [`Event::SessionEnded`]. Said again until that.
    Fence {
        /// Who was silent, or did not answer a recall.
        session: SessionId,
        /// The life that ends.
        incarnation: Incarnation,
    },
    /// Prove that this master leads, then tell [`Event::Proved`]. Said again until that.
    Prove {
        /// In this term.
        term: u64,
    },
}

/// How much there is, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Sessions that may hold leases.
    pub sessions: usize,
    /// Leases held.
    pub leases: usize,
    /// Wants that wait.
    pub waiting: usize,
}

/// Between taking office and granting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Claims are accepted, wants wait.
    Claims,
    /// All have claimed or could have: waits for the proof.
    Proof,
    Serving,
}

/// What comes up at a time. Checked then: it may have lost its meaning.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    Phase,
    Session(SessionId),
    Recall(SessionId, Scope),
}

pub(super) struct Session {
    pub(super) incarnation: Incarnation,
    /// Silent until then, it is fenced.
    deadline: Moment,
    /// Its end is under way and cannot be taken back.
    ending: bool,
    pub(super) holds: BTreeMap<GrantNumber, Scope>,
    pub(super) waits: BTreeSet<Want>,
    /// Up to here its leases were recalled because they are too many.
    pub(super) shed: GrantNumber,
}

/// One call's time, and the list its effects go to.
pub(super) struct Turn<'a> {
    pub(super) now: Moment,
    pub(super) out: &'a mut Vec<Effect>,
}

/// Who holds and who waits for which leases.
pub struct Engine {
    pub(super) times: Times,
    pub(super) bounds: Bounds,
    pub(super) term: u64,
    pub(super) phase: Phase,
    /// The last number given.
    pub(super) number: GrantNumber,
    pub(super) arrivals: u64,
    pub(super) sessions: BTreeMap<SessionId, Session>,
    /// Sessions that have not made all their claims, and the parts of the latest request that came.
    pub(super) owed: BTreeMap<SessionId, (RequestId, BTreeSet<usize>)>,
    pub(super) dirs: BTreeMap<DirKey, Dir>,
    /// Directories with a queue, on themselves or on a file.
    pub(super) queued: BTreeSet<DirKey>,
    pub(super) subtrees: Vec<Subtree>,
    /// All leases by age.
    pub(super) grants: BTreeMap<GrantNumber, SessionId>,
    pub(super) shed: GrantNumber,
    due: BTreeSet<(Moment, Due)>,
}

impl Engine {
    /// An engine without office: it knows nobody and refuses everybody.
    pub fn new(times: Times, bounds: Bounds) -> Self {
        Engine {
            times,
            bounds,
            term: 0,
            phase: Phase::Claims,
            number: GrantNumber::default(),
            arrivals: 0,
            sessions: BTreeMap::new(),
            owed: BTreeMap::new(),
            dirs: BTreeMap::new(),
            queued: BTreeSet::new(),
            subtrees: Vec::new(),
            grants: BTreeMap::new(),
            shed: GrantNumber::default(),
            due: BTreeSet::new(),
        }
    }

    /// Takes an event at a time that never goes back, and appends what is to be done.
    pub fn on(&mut self, now: Moment, event: Event, out: &mut Vec<Effect>) {
        let t = &mut Turn { now, out };
        match event {
            Event::Office { term, sessions } => self.take_office(t, term, sessions),
            Event::Proved { term } if term == self.term && self.phase == Phase::Proof => self.serve(t),
            Event::Proved { .. } => {}
            Event::SessionUp { session, incarnation } => self.session_up(t, session, incarnation),
            Event::Renewed { session, incarnation } => self.renewed(t, session, incarnation),
            Event::SessionEnded { session, incarnation } => {
                if self.sessions.get(&session).is_some_and(|s| s.incarnation <= incarnation) {
                    self.end(t, session);
                }
            }
            Event::Said { session, incarnation, ask } => self.said(t, session, incarnation, ask),
            Event::Tick => {}
        }
        self.run_due(t);
    }

    /// When [`Event::Tick`] has something to do; none: never.
    pub fn next_due(&self) -> Option<Moment> {
        self.due.first().map(|(at, _)| *at)
    }

    /// How much there is.
    pub fn counts(&self) -> Counts {
        let waiting = self.sessions.values().map(|s| s.waits.len()).sum();
        Counts { sessions: self.sessions.len(), leases: self.grants.len(), waiting }
    }

    pub(super) fn later(&mut self, at: Moment, due: Due) {
        self.due.insert((at, due));
    }

    fn take_office(&mut self, t: &mut Turn<'_>, term: u64, sessions: Vec<(SessionId, Incarnation)>) {
        *self = Engine::new(self.times, self.bounds);
        self.term = term;
        self.number = GrantNumber::before(term);
        for (session, incarnation) in sessions {
            self.insert_session(t.now, session, incarnation);
            self.owed.insert(session, Default::default());
        }
        self.later(t.now + self.times.lease, Due::Phase);
        self.close_claims_if_complete(t);
    }

    /// Once every session has said all, time has nothing to add.
    pub(super) fn close_claims_if_complete(&mut self, t: &mut Turn<'_>) {
        if self.phase == Phase::Claims && self.owed.is_empty() {
            self.close_claims(t);
        }
    }

    fn close_claims(&mut self, t: &mut Turn<'_>) {
        self.phase = Phase::Proof;
        t.out.push(Effect::Prove { term: self.term });
        self.later(t.now + self.times.again, Due::Phase);
    }

    fn serve(&mut self, t: &mut Turn<'_>) {
        self.phase = Phase::Serving;
        self.owed.clear();
        self.settle_subtrees(t);
        for key in self.dirs.keys().cloned().collect::<Vec<_>>() {
            self.settle_all(t, &key);
        }
    }

    fn insert_session(&mut self, now: Moment, session: SessionId, incarnation: Incarnation) {
        let deadline = now + self.times.lease;
        let shed = GrantNumber::before(self.term);
        let (holds, waits) = (BTreeMap::new(), BTreeSet::new());
        self.sessions.insert(session, Session { incarnation, deadline, ending: false, holds, waits, shed });
        self.later(deadline, Due::Session(session));
    }

    fn session_up(&mut self, t: &mut Turn<'_>, session: SessionId, incarnation: Incarnation) {
        if let Some(known) = self.sessions.get(&session) {
            if known.incarnation >= incarnation {
                return;
            }
            self.take_all(t, session);
            // The requests of this life are counted anew.
            self.owed.entry(session).and_modify(|claims| *claims = Default::default());
        }
        self.insert_session(t.now, session, incarnation);
    }

    /// May this life of a session hold anything?
    pub fn is_up(&self, session: SessionId, incarnation: Incarnation) -> bool {
        self.objection(session, incarnation).is_none()
    }

    /// Have all who could believe anything claimed it?
    pub fn serves(&self) -> bool {
        self.phase == Phase::Serving
    }

    /// None: this life may speak.
    fn objection(&self, session: SessionId, incarnation: Incarnation) -> Option<Reason> {
        match self.sessions.get(&session) {
            Some(s) if s.incarnation > incarnation || s.incarnation == incarnation && s.ending => Some(Reason::Fenced),
            Some(s) if s.incarnation == incarnation => None,
            _ => Some(Reason::Unknown),
        }
    }

    fn renewed(&mut self, t: &mut Turn<'_>, session: SessionId, incarnation: Incarnation) {
        if let Some(reason) = self.objection(session, incarnation) {
            t.out.push(Effect::RefuseRenewal { session, incarnation, reason });
            return;
        }
        if let Some(s) = self.sessions.get_mut(&session) {
            s.deadline = t.now + self.times.lease;
            t.out.push(Effect::Renew { session, incarnation });
        }
    }

    fn said(&mut self, t: &mut Turn<'_>, session: SessionId, incarnation: Incarnation, ask: Ask) {
        let objection = self.objection(session, incarnation);
        match (ask, objection) {
            (Ask::Acquire { request, wants }, Some(reason)) => {
                let refuse = |w: Want| Tell::Refuse { request, asked: w.scope, reason };
                t.out.extend(wants.into_iter().map(|w| Effect::Tell { session, incarnation, tell: refuse(w) }));
            }
            (Ask::Acquire { request, wants }, None) => {
                wants.into_iter().for_each(|w| self.acquire(t, session, request, w));
            }
            (Ask::Cancel { wants }, None) => self.cancel(t, session, &wants),
            // What is given up counts also from a session that is about to be fenced.
            (Ask::Release { scope, number, keep_shared }, None | Some(Reason::Fenced))
                if self.sessions.get(&session).is_some_and(|s| s.incarnation == incarnation) =>
            {
                self.release(t, session, &scope, number, keep_shared);
            }
            (Ask::Reclaim { request, term, claims, part, parts, .. }, None) if term == self.term => {
                self.reclaim(t, session, request, claims);
                self.note_part(t, session, request, part, parts);
            }
            _ => {}
        }
    }

    fn end(&mut self, t: &mut Turn<'_>, session: SessionId) {
        self.take_all(t, session);
        self.owed.remove(&session);
        self.close_claims_if_complete(t);
    }

    /// Takes from a session all it holds and waits for, and passes it on.
    fn take_all(&mut self, t: &mut Turn<'_>, session: SessionId) {
        self.drop_waits(t, session);
        let Some(ended) = self.sessions.remove(&session) else { return };
        let mut touched = BTreeSet::new();
        for (number, scope) in ended.holds {
            self.grants.remove(&number);
            self.remove_hold(session, &scope);
            match scope {
                Scope::Dir(key) | Scope::File(key, _) => drop(touched.insert(key)),
                Scope::Subtree(prefix) => self.settle_below(t, &prefix),
            }
        }
        touched.iter().for_each(|key| self.settle_all(t, key));
    }

    fn drop_waits(&mut self, t: &mut Turn<'_>, session: SessionId) -> Vec<(RequestId, Want)> {
        let waits: Vec<Want> =
            self.sessions.get(&session).map(|s| s.waits.iter().cloned().collect()).unwrap_or_default();
        let request = |w: &Want| Some((self.waiter_mut(session, w)?.request, w.clone()));
        let requests = waits.iter().filter_map(request).collect();
        self.cancel(t, session, &waits);
        requests
    }

    fn run_due(&mut self, t: &mut Turn<'_>) {
        while let Some((at, _)) = self.due.first()
            && *at <= t.now
        {
            let Some((at, due)) = self.due.pop_first() else { return };
            match due {
                Due::Phase => match self.phase {
                    Phase::Claims | Phase::Proof => self.close_claims(t),
                    Phase::Serving => {}
                },
                Due::Session(session) => self.session_due(t, session),
                Due::Recall(session, scope) => self.recall_due(t, at, session, &scope),
            }
        }
    }

    fn session_due(&mut self, t: &mut Turn<'_>, session: SessionId) {
        let Some(s) = self.sessions.get(&session) else { return };
        let (deadline, incarnation) = (s.deadline, s.incarnation);
        if deadline > t.now {
            return self.later(deadline, Due::Session(session));
        }
        self.condemn(t, session);
        t.out.push(Effect::Fence { session, incarnation });
        self.later(t.now + self.times.again, Due::Session(session));
    }

    /// From now on the session hears only refusals, beginning with what it waits for. Its end is agreed on when its last renewal has run out: until then it believes.
    fn condemn(&mut self, t: &mut Turn<'_>, session: SessionId) {
        for want in self.drop_waits(t, session) {
            self.refuse(t, session, want.0, want.1.scope, Reason::Fenced);
        }
        if let Some(s) = self.sessions.get_mut(&session) {
            s.ending = true;
        }
    }

    /// Says a recall for the first time or again, or gives the session up.
    fn recall_due(&mut self, t: &mut Turn<'_>, at: Moment, session: SessionId, scope: &Scope) {
        let (patience, again) = (self.times.patience, self.times.again);
        let Some(incarnation) = self.sessions.get(&session).filter(|s| !s.ending).map(|s| s.incarnation) else {
            return;
        };
        let Some(hold) = self.hold_mut(session, scope) else { return };
        let number = hold.number;
        let Some(recall) = hold.recall.as_mut().filter(|r| r.next == at) else { return };
        if t.now >= recall.first + patience {
            return self.condemn(t, session);
        }
        recall.next = t.now + again;
        let tell = Tell::Recall { scope: scope.clone(), number, keep_shared: recall.keep_shared };
        t.out.push(Effect::Tell { session, incarnation, tell });
        self.later(t.now + again, Due::Recall(session, scope.clone()));
    }

    pub(super) fn split(&self, dir: &DirKey, file: &FileKey) -> Option<&Split> {
        self.dirs.get(dir)?.files.get(file)
    }

    pub(super) fn hold(&self, session: SessionId, scope: &Scope) -> Option<&Hold> {
        match scope {
            Scope::Dir(d) => self.dirs.get(d)?.holders.get(&session),
            Scope::File(d, f) => self.split(d, f)?.holders.get(&session),
            Scope::Subtree(p) => {
                self.subtrees.iter().filter(|s| s.session == session && s.prefix == *p).find_map(Subtree::held)
            }
        }
    }

    pub(super) fn hold_mut(&mut self, session: SessionId, scope: &Scope) -> Option<&mut Hold> {
        match scope {
            Scope::Dir(d) => self.dirs.get_mut(d)?.holders.get_mut(&session),
            Scope::File(d, f) => self.dirs.get_mut(d)?.files.get_mut(f)?.holders.get_mut(&session),
            Scope::Subtree(p) => {
                let mut own = self.subtrees.iter_mut().filter(|s| s.session == session && s.prefix == *p);
                own.find_map(|s| if let State::Held(hold) = &mut s.state { Some(hold) } else { None })
            }
        }
    }

    pub(super) fn tell(&self, t: &mut Turn<'_>, session: SessionId, tell: Tell) {
        if let Some(s) = self.sessions.get(&session) {
            t.out.push(Effect::Tell { session, incarnation: s.incarnation, tell });
        }
    }

    pub(super) fn refuse(
        &self,
        t: &mut Turn<'_>,
        session: SessionId,
        request: RequestId,
        asked: Scope,
        reason: Reason,
    ) {
        self.tell(t, session, Tell::Refuse { request, asked, reason });
    }
}
