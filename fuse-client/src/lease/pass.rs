//! Readers that go past a lease on its way back. They must not wait for it: the kernel may hold pages for them, and the drop waits for those pages. What they pass is
//! released when they have gone by; once its copies are dropped nobody else may pass, so that it is released some time.

use super::event::{Effect, How, OpId};
use super::keeper::{Keeper, Op};
use super::room::RoomKey;
use efc_common::lease::{Moment, RequestId, Scope, Want};

impl Keeper {
    /// Lets a reader go past what is on its way back: it must not wait, because the kernel may hold pages for it that the drop waits for.
    pub(super) fn pass_by(&mut self, now: Moment, id: OpId, op: Op, out: &mut Vec<Effect>) {
        let mut passed = Vec::new();
        for (key, needs) in op.missing() {
            let Some(room) = self.rooms.get_mut(key) else { continue };
            let leaving: Vec<Scope> = needs.iter().flat_map(|n| room.leaving(n)).collect();
            for scope in leaving {
                if let Some(recall) = &mut room.lease_mut(&scope).recall {
                    recall.passing += 1;
                    passed.push((scope, recall.id));
                }
            }
        }
        self.passing.insert(id, Some(passed));
        self.waiting -= 1;
        out.push(Effect::Admit { op: id, how: How::Uncached });
        self.give_back(now, op.guards, out);
    }

    /// A reader has gone past.
    pub(super) fn passed(&mut self, now: Moment, id: OpId, out: &mut Vec<Effect>) {
        match self.passing.remove(&id) {
            Some(Some(passed)) => {
                for (scope, recall) in passed {
                    if let Some(recall) = self.recall_mut(recall, &scope) {
                        recall.passing -= 1;
                        self.release(now, &scope, out);
                    }
                }
            }
            Some(None) => {
                self.running_old = self.running_old.saturating_sub(1);
                self.old_guard_gone(out);
            }
            None => {}
        }
    }

    /// While everything is being dropped, readers that have no session go past what was believed.
    pub(super) fn pass_homeless(&mut self, out: &mut Vec<Effect>) {
        for id in std::mem::take(&mut self.homeless) {
            if !self.only_reads(id) {
                self.homeless.push_back(id);
                continue;
            }
            self.ops.remove(&id);
            self.waiting -= 1;
            self.running_old += 1;
            self.passing.insert(id, None);
            out.push(Effect::Admit { op: id, how: How::Uncached });
        }
    }

    /// Readers who wait for what was refused.
    pub(super) fn pass_readers(&mut self, now: Moment, request: RequestId, asked: &Scope, out: &mut Vec<Effect>) {
        let key = RoomKey::of(asked);
        let Some(room) = self.rooms.get_mut(&key) else { return };
        if !room.questions.iter().any(|(want, q)| want.scope == *asked && q.request == request) {
            return;
        }
        for op in room.parked.clone() {
            self.pass_if_reader(now, op, out);
        }
    }

    /// Readers who wait in a room where something is leaving may go past it now.
    pub(super) fn pass_all_readers(&mut self, now: Moment, key: &RoomKey, out: &mut Vec<Effect>) {
        let parked = self.rooms.get(key).map(|r| r.parked.clone()).unwrap_or_default();
        for op in parked {
            if self.meets_recall(op) {
                self.pass_if_reader(now, op, out);
            }
        }
    }

    fn pass_if_reader(&mut self, now: Moment, op: OpId, out: &mut Vec<Effect>) {
        if self.waits(op) && self.only_reads(op) {
            self.unpin(now, op, out);
            if let Some(waits) = self.ops.remove(&op) {
                self.pass_by(now, op, waits, out);
            }
        }
    }

    /// Does a waiting operation need something that is on its way back and can still be passed by?
    fn meets_recall(&self, id: OpId) -> bool {
        self.ops.get(&id).is_some_and(|op| op.missing().iter().any(|n| self.may_pass(n)))
    }

    pub(super) fn may_pass(&self, (key, needs): &(RoomKey, Vec<Want>)) -> bool {
        let Some(room) = self.rooms.get(key) else { return false };
        let dropped = |s: &Scope| room.lease(s).and_then(|l| l.recall.as_ref()).is_some_and(|r| r.dropped);
        let mut leaving = needs.iter().flat_map(|n| room.leaving(n)).peekable();
        leaving.peek().is_some() && !leaving.any(|s| dropped(&s))
    }
}
