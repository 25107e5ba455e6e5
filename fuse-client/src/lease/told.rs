//! What masters say: grants, refusals, recalls, and the way of a lease back. Each may come twice, late, or in another order; see `room` for how
//! numbers put that right.
//!
//! The way back: new guards are refused; when those that change have gone, changes are flushed; then either shared is kept, or when the readers
//! have gone too, everything is dropped and the lease released. Nothing here waits: each step ends in an event that leads to the next.

use super::event::{Effect, RecallId, What};
use super::keeper::Keeper;
use super::room::{Held, Recall, Room, RoomKey};
use efc_common::lease::{Ask, FileKey, GrantNumber, Mode, Moment, Reason, RequestId, Scope, Tell, Want};
use std::collections::HashSet;

/// A grant as it came.
struct Grant {
    scope: Scope,
    mode: Mode,
    number: GrantNumber,
    exceptions: Vec<FileKey>,
    /// It was asked for, and the question stood until now.
    answers: bool,
}

impl Keeper {
    pub(super) fn told(&mut self, now: Moment, tell: Tell, out: &mut Vec<Effect>) {
        match tell {
            Tell::Grant { request, asked, scope, mode, number, exceptions } if number.term() == self.term => {
                let key = RoomKey::of(&scope);
                let answers = self.answered(request, &asked);
                self.granted(now, Grant { scope, mode, number, exceptions, answers }, out);
                self.confirm();
                self.wake(now, &key, out);
                self.keep_to_bound(now, out);
            }
            // Of a leader that is deposed, or that has not answered a renewal yet: then the question is said again.
            Tell::Grant { .. } => {}
            Tell::Recall { scope, number, keep_shared } if number.term() >= self.term => {
                self.recalled(now, scope, number, keep_shared, out);
            }
            Tell::Recall { .. } => {}
            Tell::Refuse { request, asked, reason } => self.refused(now, request, asked, reason, out),
        }
    }

    /// Takes out the questions that a grant answers.
    fn answered(&mut self, request: RequestId, asked: &Scope) -> bool {
        let Some(room) = self.rooms.get_mut(&RoomKey::of(asked)) else { return false };
        let before = room.questions.len();
        room.questions.retain(|want, q| want.scope != *asked || q.request != request);
        room.questions.len() < before
    }

    fn granted(&mut self, now: Moment, grant: Grant, out: &mut Vec<Effect>) {
        let Grant { scope, mode, number, exceptions, answers } = grant;
        let key = RoomKey::of(&scope);
        let room = self.rooms.entry(key.clone()).or_default();
        let over = room.over(&scope);
        let had = room.lease_mut(&scope).held;
        if number <= over || had.is_some_and(|h| h.number >= number) {
            return self.tidy(&key);
        }
        if room.believed(&scope).is_none() && !answers {
            // The answer to a question that nobody asks any more. One that came before it may still be under way.
            let number = room.given_back(&scope, number);
            out.push(Effect::Send(Ask::Release { scope, number, keep_shared: false }));
            return self.tidy(&key);
        }
        let losing = room.take(&scope, Held { mode, number, since: number }, exceptions);
        room.used = now;
        self.newest = self.newest.max(number);
        if had.is_none() {
            self.leases += 1;
        }
        self.list(now, &key);
        self.unconfirmed.remove(&scope);
        for file in losing {
            let scope = Scope::File(scope.dir().clone(), file);
            self.give_up_lease(now, &scope, number, false, out);
        }
    }

    fn recalled(&mut self, now: Moment, scope: Scope, number: GrantNumber, keep_shared: bool, out: &mut Vec<Effect>) {
        let key = RoomKey::of(&scope);
        let believed = self.rooms.get(&key).and_then(|r| r.believed(&scope));
        match believed {
            // What it means has been replaced by a newer grant.
            Some(held) if held.number > number => {}
            Some(_) => self.give_up_lease(now, &scope, number, keep_shared, out),
            None => {
                let mut number = number;
                if let Some(room) = self.rooms.get_mut(&key) {
                    number = room.given_back(&scope, number);
                }
                out.push(Effect::Send(Ask::Release { scope, number, keep_shared: false }));
                self.tidy(&key);
            }
        }
    }

    fn refused(&mut self, now: Moment, request: RequestId, asked: Scope, reason: Reason, out: &mut Vec<Effect>) {
        match reason {
            Reason::Fenced => self.lose(out),
            Reason::Conflict => {
                if self.unconfirmed.contains(&asked)
                    && let Some(held) = self.rooms.get(&RoomKey::of(&asked)).and_then(|r| r.believed(&asked))
                {
                    self.give_up_lease(now, &asked, held.number, false, out);
                }
            }
            // The question stands and is said again; who only reads need not wait for that.
            Reason::Unknown | Reason::QueueFull | Reason::TooMany => self.pass_readers(now, request, &asked, out),
        }
    }

    /// Begins the way back, or makes one that has begun give back all.
    pub(super) fn give_up_lease(
        &mut self,
        now: Moment,
        scope: &Scope,
        number: GrantNumber,
        keep_shared: bool,
        out: &mut Vec<Effect>,
    ) {
        self.recalls += 1;
        let id = RecallId(self.recalls);
        let Some(room) = self.rooms.get_mut(&RoomKey::of(scope)) else { return };
        // A file cannot be half covered by its directory.
        let own = room.lease(scope).is_some_and(|l| l.held.is_some());
        let keep_shared = keep_shared && own;
        let lease = room.lease_mut(scope);
        match &mut lease.recall {
            Some(recall) => {
                recall.number = recall.number.max(number);
                recall.keep_shared &= keep_shared;
            }
            none => {
                *none = Some(Recall {
                    id,
                    number,
                    keep_shared,
                    flushing: false,
                    flushed: false,
                    dropping: false,
                    dropped: false,
                    passing: 0,
                });
            }
        }
        self.advance(now, scope, out);
        self.pass_all_readers(now, &RoomKey::of(scope), out);
    }

    pub(super) fn flushed(&mut self, now: Moment, id: RecallId, scope: &Scope, out: &mut Vec<Effect>) {
        if let Some(recall) = self.recall_mut(id, scope) {
            recall.flushed = true;
            self.advance(now, scope, out);
        }
    }

    pub(super) fn recall_mut(&mut self, id: RecallId, scope: &Scope) -> Option<&mut Recall> {
        let room = self.rooms.get_mut(&RoomKey::of(scope))?;
        room.lease(scope)?;
        room.lease_mut(scope).recall.as_mut().filter(|r| r.id == id)
    }

    /// Takes a lease on its way back as far as it gets.
    pub(super) fn advance(&mut self, now: Moment, scope: &Scope, out: &mut Vec<Effect>) {
        let Some(room) = self.rooms.get_mut(&RoomKey::of(scope)) else { return };
        if room.lease(scope).is_none() {
            return;
        }
        // None: a file whose directory went back meanwhile, and took its changes along.
        let changes = room.believed(scope).is_some_and(|h| h.mode == Mode::Exclusive);
        let lease = room.lease_mut(scope);
        let running = lease.running;
        let Some(recall) = lease.recall.as_mut() else { return };
        let id = recall.id;
        if running.exclusive > 0 {
            return;
        }
        if !recall.flushed && changes {
            if !std::mem::replace(&mut recall.flushing, true) {
                out.push(Effect::Flush { recall: id, scope: scope.clone() });
            }
            return;
        }
        if recall.keep_shared {
            let number = recall.number;
            lease.recall = None;
            return self.downgraded(now, scope, number, out);
        }
        if running.shared == 0 && !std::mem::replace(&mut recall.dropping, true) {
            out.push(Effect::Drop { recall: id, what: What::Scope(scope.clone()) });
        }
    }

    fn downgraded(&mut self, now: Moment, scope: &Scope, number: GrantNumber, out: &mut Vec<Effect>) {
        let key = RoomKey::of(scope);
        let Some(room) = self.rooms.get_mut(&key) else { return };
        if let Some(held) = &mut room.lease_mut(scope).held {
            // The recall may mean a newer grant that is still under way, which must not make it exclusive again.
            let number = held.number.max(number);
            *held = Held { mode: Mode::Shared, number, ..*held };
            out.push(Effect::Send(Ask::Release { scope: scope.clone(), number, keep_shared: true }));
        }
        self.wake(now, &key, out);
    }

    pub(super) fn dropped(&mut self, now: Moment, id: RecallId, scope: &Scope, out: &mut Vec<Effect>) {
        if let Some(recall) = self.recall_mut(id, scope).filter(|r| r.dropping) {
            recall.dropped = true;
            self.release(now, scope, out);
        }
    }

    /// Gives a lease back whose copies are dropped, unless a reader still goes past it.
    pub(super) fn release(&mut self, now: Moment, scope: &Scope, out: &mut Vec<Effect>) {
        let lease = self.rooms.get(&RoomKey::of(scope)).and_then(|r| r.lease(scope));
        let Some(recall) = lease.and_then(|l| l.recall.as_ref()).filter(|r| r.dropped && r.passing == 0) else {
            return;
        };
        let number = recall.number;
        let key = RoomKey::of(scope);
        let Some(room) = self.rooms.get_mut(&key) else { return };
        let held = room.believed(scope);
        let lease = room.lease_mut(scope);
        lease.recall = None;
        if lease.held.take().is_some() {
            self.leases -= 1;
        }
        let number = room.given_back(scope, held.map_or(number, |h| h.number.max(number)));
        out.push(Effect::Send(Ask::Release { scope: scope.clone(), number, keep_shared: false }));
        self.unconfirmed.remove(scope);
        self.confirm();
        self.wake(now, &key, out);
    }

    /// The way back of all leases of a room, for no master's sake.
    pub(super) fn give_up_room(&mut self, now: Moment, key: &RoomKey, out: &mut Vec<Effect>) {
        let held: Vec<(Scope, Held)> = self.rooms.get(key).map(|r| r.held(key).collect()).unwrap_or_default();
        for (scope, held) in held {
            self.give_up_lease(now, &scope, held.number, false, out);
        }
    }

    /// The wants of a room whose questions are due again.
    pub(super) fn question_due(&mut self, now: Moment, at: Moment, want: Want, out: &mut Vec<Effect>) {
        let next = now + self.config.times.again;
        let Some(room) = self.rooms.get_mut(&RoomKey::of(&want.scope)) else { return };
        let Some(question) = room.questions.get_mut(&want).filter(|q| q.next == at) else { return };
        question.next = next;
        let request = question.request;
        self.questions_due.insert((next, want.clone()));
        out.push(Effect::Send(Ask::Acquire { request, wants: vec![want] }));
    }
}

impl Room {
    /// Grants of this scope up to this number are not believed. For a file that is also whatever came for its directory since: such a grant may
    /// have been given back meanwhile, and if it was not, asking again gives a newer one.
    fn over(&self, scope: &Scope) -> GrantNumber {
        let Scope::File(_, file) = scope else { return self.lease.floor };
        let dir = self.lease.held.map_or(self.lease.floor, |h| h.number.max(self.lease.floor));
        self.without.get(file).map_or(dir, |n| dir.max(*n))
    }

    /// Believes a grant; gives the files that it no longer covers and that were believed as part of the directory.
    fn take(&mut self, scope: &Scope, mut held: Held, exceptions: Vec<FileKey>) -> Vec<FileKey> {
        let number = held.number;
        let known = self.lease(scope).and_then(|l| l.held);
        let had = self.lease.held.is_some();
        match scope {
            Scope::File(_, file) => {
                held.since = known.map_or(number, |h| h.since);
                self.without.insert(file.clone(), number);
                self.lease_mut(scope).held = Some(held);
                return Vec::new();
            }
            _ => {
                let excepted: HashSet<&FileKey> = exceptions.iter().collect();
                let joins = self.without.iter().any(|(file, n)| *n < number && !excepted.contains(file));
                held.since = known.filter(|_| !joins).map_or(number, |h| h.since);
                self.lease.held = Some(held);
            }
        }
        let own = |room: &Room, f: &FileKey| room.files.get(f).is_some_and(|l| l.held.is_some());
        let was_believed: Vec<FileKey> =
            exceptions.iter().filter(|f| had && !self.without.contains_key(*f) && !own(self, f)).cloned().collect();
        let losing = |f: &FileKey| was_believed.contains(f);
        self.without.retain(|_, n| *n >= number);
        for file in exceptions.into_iter().filter(|f| !losing(f)) {
            let known = self.without.entry(file).or_default();
            *known = number.max(*known);
        }
        was_believed
    }

    /// Remembers that no grant of this scope up to a number counts; gives the highest such number.
    fn given_back(&mut self, scope: &Scope, number: GrantNumber) -> GrantNumber {
        match scope {
            Scope::File(_, file) => {
                let dir = self.lease.held.map_or(number, |h| h.number.max(number));
                let known = self.without.entry(file.clone()).or_default();
                *known = (*known).max(dir);
                *known
            }
            _ => {
                self.lease.floor = self.lease.floor.max(number);
                let floor = self.lease.floor;
                self.without.retain(|_, n| *n > floor);
                floor
            }
        }
    }
}
