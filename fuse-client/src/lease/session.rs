//! The session's life: when belief ends, what a new leader is told, how a lost session is cleared away, and all that is done because time has
//! passed (asking again, idle leases, pins).
//!
//! Renewals count from when they were *sent*. A leader of a new term knows nothing of us: what we hold is claimed from it, and until it has
//! confirmed all of that, all belief ends when it would have ended under the old leader.

use super::event::{Effect, RecallId, What};
use super::keeper::{Keeper, Life};
use super::room::RoomKey;
use efc_common::id::Incarnation;
use efc_common::lease::{Ask, Claim, Moment, RequestId, Scope};

/// Of so many of the longest unused directories one is looked for that can go back.
const LOOKS_MAX: usize = 8;

impl Keeper {
    pub(super) fn session_up(
        &mut self,
        now: Moment,
        incarnation: Incarnation,
        term: u64,
        sent: Moment,
        out: &mut Vec<Effect>,
    ) {
        if self.life != Life::None {
            return;
        }
        self.life = Life::Up(incarnation);
        self.term = self.term.max(term);
        self.until = sent + self.config.times.believe();
        for op in std::mem::take(&mut self.homeless) {
            self.attempt(now, op, out);
        }
    }

    pub(super) fn renewed(
        &mut self,
        now: Moment,
        incarnation: Incarnation,
        term: u64,
        sent: Moment,
        out: &mut Vec<Effect>,
    ) {
        if self.life != Life::Up(incarnation) || term < self.term {
            return;
        }
        let until = sent + self.config.times.believe();
        if term == self.term {
            self.until = self.until.max(until);
            return;
        }
        if now >= self.believed_until() {
            return;
        }
        self.bound = Some(self.believed_until());
        (self.term, self.until) = (term, until);
        self.unconfirmed = self.rooms.iter().flat_map(|(key, room)| room.held(key)).map(|(scope, _)| scope).collect();
        self.claim(now, out);
        self.confirm();
        self.ask_all_again(now);
    }

    /// Tells the leader what is believed and not confirmed.
    fn claim(&mut self, now: Moment, out: &mut Vec<Effect>) {
        self.requests += 1;
        self.claim_next = now + self.config.times.again;
        let (request, term) = (RequestId(self.requests), self.term);
        let claims: Vec<Claim> = self.unconfirmed.iter().filter_map(|scope| self.claim_of(scope)).collect();
        let mut chunks: Vec<&[Claim]> = claims.chunks(self.config.claims_max.max(1)).collect();
        if chunks.is_empty() {
            // It also matters to know that nothing is believed.
            chunks.push(&[]);
        }
        let parts = chunks.len();
        for (part, chunk) in chunks.into_iter().enumerate() {
            out.push(Effect::Send(Ask::Reclaim {
                request,
                term,
                claims: chunk.to_vec(),
                part,
                parts,
                locks: Vec::new(),
            }));
        }
    }

    /// What is on its way back is still believed, so it is claimed too.
    fn claim_of(&self, scope: &Scope) -> Option<Claim> {
        let room = self.rooms.get(&RoomKey::of(scope))?;
        let held = room.lease(scope)?.held?;
        let exceptions = match scope {
            Scope::Dir(_) => room.without.keys().cloned().collect(),
            Scope::File(..) | Scope::Subtree(_) => Vec::new(),
        };
        Some(Claim { scope: scope.clone(), mode: held.mode, number: held.number, exceptions })
    }

    /// Once all is confirmed or given back, renewals count again.
    pub(super) fn confirm(&mut self) {
        if self.unconfirmed.is_empty() {
            self.bound = None;
        }
    }

    fn ask_all_again(&mut self, now: Moment) {
        for (_, want) in std::mem::take(&mut self.questions_due) {
            if let Some(q) = self.rooms.get_mut(&RoomKey::of(&want.scope)).and_then(|r| r.questions.get_mut(&want)) {
                q.next = now;
                self.questions_due.insert((now, want));
            }
        }
    }

    pub(super) fn expire(&mut self, now: Moment, out: &mut Vec<Effect>) {
        if matches!(self.life, Life::Up(_)) && now >= self.believed_until() {
            self.lose(out);
        }
    }

    /// The session is over: nothing is believed from now on. What is remembered is dropped at once, for the kernel's sake, and again if
    /// operations that still run may have remembered more.
    pub(super) fn lose(&mut self, out: &mut Vec<Effect>) {
        let Life::Up(incarnation) = self.life else { return };
        self.lives += 1;
        self.running_old += std::mem::take(&mut self.running);
        self.rooms.clear();
        self.questions_due.clear();
        self.pins_due.clear();
        self.by_use.clear();
        self.unconfirmed.clear();
        self.leases = 0;
        self.bound = None;
        self.strand();
        let old = self.running_old > 0;
        for passed in self.passing.values_mut() {
            self.running_old += usize::from(passed.take().is_some());
        }
        let drop = self.drop_all(out);
        self.life = Life::Ending { incarnation, drop: Some(drop), again: old };
        self.pass_homeless(out);
    }

    /// The session of a process that is gone: what the kernel was told in it is dropped first.
    pub(super) fn inherited(&mut self, incarnation: Incarnation, out: &mut Vec<Effect>) {
        if self.life == Life::None {
            let drop = self.drop_all(out);
            self.life = Life::Ending { incarnation, drop: Some(drop), again: false };
            self.pass_homeless(out);
        }
    }

    fn drop_all(&mut self, out: &mut Vec<Effect>) -> RecallId {
        self.recalls += 1;
        out.push(Effect::Drop { recall: RecallId(self.recalls), what: What::All });
        RecallId(self.recalls)
    }

    pub(super) fn dropped_all(&mut self, id: RecallId, out: &mut Vec<Effect>) {
        if let Life::Ending { drop, .. } = &mut self.life
            && *drop == Some(id)
        {
            *drop = None;
            self.old_guard_gone(out);
        }
    }

    pub(super) fn old_guard_gone(&mut self, out: &mut Vec<Effect>) {
        let Life::Ending { incarnation, drop: None, again } = self.life else { return };
        if self.running_old > 0 {
            return;
        }
        if again {
            let drop = Some(self.drop_all(out));
            self.life = Life::Ending { incarnation, drop, again: false };
            self.pass_homeless(out);
            return;
        }
        self.life = Life::None;
        out.push(Effect::SessionLost { incarnation });
    }

    pub(super) fn tick(&mut self, now: Moment, out: &mut Vec<Effect>) {
        while let Some((at, want)) = self.questions_due.first().cloned().filter(|(at, _)| *at <= now) {
            self.questions_due.pop_first();
            self.question_due(now, at, want, out);
        }
        while let Some((_, op)) = self.pins_due.first().copied().filter(|(at, _)| *at <= now) {
            self.pins_due.pop_first();
            if self.waits(op) {
                self.unpin(now, op, out);
                self.attempt(now, op, out);
            }
        }
        if !self.unconfirmed.is_empty() && now >= self.claim_next {
            self.claim(now, out);
        }
        self.give_idle_back(now, out);
    }

    /// Gives a room its place in the order of use.
    pub(super) fn list(&mut self, at: Moment, key: &RoomKey) {
        if let Some(room) = self.rooms.get_mut(key)
            && room.listed.is_none()
        {
            room.listed = Some(at);
            self.by_use.insert((at, key.clone()));
        }
    }

    fn give_idle_back(&mut self, now: Moment, out: &mut Vec<Effect>) {
        let idle = self.config.idle;
        while self.by_use.first().is_some_and(|(at, _)| *at + idle <= now) {
            self.look_at_oldest(now, out);
        }
    }

    /// One lease more than there should be is one back.
    pub(super) fn keep_to_bound(&mut self, now: Moment, out: &mut Vec<Effect>) {
        if self.leases > self.config.leases_max {
            let mut looks = 0..LOOKS_MAX;
            while looks.next().is_some() && !self.look_at_oldest(now, out) {}
        }
    }

    /// Gives the room first in the order of use back, or, if it was used since it was listed, its right place. True: given back.
    fn look_at_oldest(&mut self, now: Moment, out: &mut Vec<Effect>) -> bool {
        let Some((at, key)) = self.by_use.pop_first() else { return true };
        let Some(room) = self.rooms.get_mut(&key) else { return false };
        room.listed = None;
        if room.used > at {
            let used = room.used;
            self.list(used, &key);
            return false;
        }
        if room.is_busy() {
            self.list(now, &key);
            return false;
        }
        self.give_up_room(now, &key, out);
        true
    }
}
