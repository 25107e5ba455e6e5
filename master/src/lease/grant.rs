//! Who gets what, and who must give it back: wants come in, queues move on, recalls begin, what is released passes on.
//!
//! A directory's queue is strictly first come, first served; only who is barred by a subtree lets others pass, or two sessions could wait for each
//! other. A file is split off when its turn comes and somebody is in the way; from then on it has a queue of its own, so it blocks nobody.

use super::engine::{Due, Engine, Phase, Turn};
use super::table::{Hold, Queue, Recall, Waiter, forbids, in_the_way};
use efc_common::id::SessionId;
use efc_common::lease::{DirKey, FileKey, GrantNumber, Mode, Reason, RequestId, Scope, Tell, Want};

impl Engine {
    pub(super) fn serving(&self) -> bool {
        self.phase == Phase::Serving
    }

    pub(super) fn acquire(&mut self, t: &mut Turn<'_>, session: SessionId, request: RequestId, want: Want) {
        if let Some((scope, mode)) = self.covered_by(session, &want) {
            // Asked again, or the answer was lost. A new number, so that no release that is under way means this grant.
            return self.give(t, session, request, want.scope, scope, mode);
        }
        if self.sessions.get(&session).is_some_and(|s| s.waits.contains(&want)) {
            if let Some(waiter) = self.waiter_mut(session, &want) {
                waiter.request = request;
            }
            return;
        }
        if let Some(reason) = self.no_room(session, &want) {
            return self.refuse(t, session, request, want.scope, reason);
        }
        self.arrivals += 1;
        let waiter = Waiter { arrival: self.arrivals, session, request, want: want.clone() };
        if let Some(s) = self.sessions.get_mut(&session) {
            s.waits.insert(want.clone());
        }
        match &want.scope {
            Scope::Subtree(prefix) => return self.queue_subtree(t, prefix.clone(), waiter),
            Scope::Dir(key) | Scope::File(key, _) => {
                self.queued.insert(key.clone());
                self.queue_mut(&want.scope).waiters.push_back(waiter);
            }
        }
        self.settle(t, &want.scope);
    }

    /// The lease by which a session already has what it wants, and need not give back.
    fn covered_by(&self, session: SessionId, want: &Want) -> Option<(Scope, Mode)> {
        let scope = match &want.scope {
            Scope::File(dir, file) if self.split(dir, file).is_none() => Scope::Dir(dir.clone()),
            other => other.clone(),
        };
        let hold = self.hold(session, &scope)?;
        (hold.mode.covers(want.mode) && !hold.implied && hold.recall.is_none()).then_some((scope, hold.mode))
    }

    fn no_room(&self, session: SessionId, want: &Want) -> Option<Reason> {
        let s = self.sessions.get(&session)?;
        if s.waits.len() >= self.bounds.session_waits
            || s.holds.len() >= 2 * self.bounds.session_leases
            || self.grants.len() >= 2 * self.bounds.leases
        {
            return Some(Reason::TooMany);
        }
        let full = match &want.scope {
            Scope::Subtree(_) => self.subtrees.len() >= self.bounds.subtrees,
            scope => self.queue(scope).is_some_and(|q| q.waiters.len() >= self.bounds.queue),
        };
        full.then_some(Reason::QueueFull)
    }

    fn queue(&self, scope: &Scope) -> Option<&Queue> {
        let dir = self.dirs.get(scope.dir())?;
        match scope {
            Scope::File(_, f) => Some(dir.files.get(f).map_or(&dir.queue, |s| &s.queue)),
            _ => Some(&dir.queue),
        }
    }

    /// The queue for a directory, or for a file: its own if it is split.
    fn queue_mut(&mut self, scope: &Scope) -> &mut Queue {
        let dir = self.dirs.entry(scope.dir().clone()).or_default();
        match scope {
            Scope::File(_, f) => dir.files.get_mut(f).map_or(&mut dir.queue, |s| &mut s.queue),
            _ => &mut dir.queue,
        }
    }

    pub(super) fn waiter_mut(&mut self, session: SessionId, want: &Want) -> Option<&mut Waiter> {
        let same = |w: &&mut Waiter| w.session == session && w.want == *want;
        match &want.scope {
            Scope::Subtree(_) => self.subtrees.iter_mut().filter_map(|s| s.waiter.as_mut()).find(same),
            scope => {
                let dir = self.dirs.get_mut(scope.dir())?;
                let own = match scope {
                    Scope::File(_, f) => dir.files.get_mut(f).map(|s| &mut s.queue.waiters),
                    _ => None,
                };
                // It may have come before the file was split.
                own.into_iter().flatten().chain(&mut dir.queue.waiters).find(same)
            }
        }
    }

    /// Forgets wants that are no longer waited for; all of them, before any of them could be granted.
    pub(super) fn cancel(&mut self, t: &mut Turn<'_>, session: SessionId, wants: &[Want]) {
        let waited: Vec<&Want> = wants.iter().filter(|want| self.remove_waiter(session, want)).collect();
        for want in waited {
            match &want.scope {
                Scope::Subtree(prefix) => self.settle_below(t, prefix),
                Scope::Dir(key) | Scope::File(key, _) => self.settle_all(t, key),
            }
        }
    }

    fn remove_waiter(&mut self, session: SessionId, want: &Want) -> bool {
        let waits = self.sessions.get_mut(&session).is_some_and(|s| s.waits.remove(want));
        let others = |w: &Waiter| w.session != session || w.want != *want;
        if let Scope::Subtree(_) = &want.scope {
            self.subtrees.retain(|s| s.waiter.as_ref().is_none_or(others));
        } else if let Some(dir) = self.dirs.get_mut(want.scope.dir()).filter(|_| waits) {
            dir.queue.waiters.retain(others);
            if let Scope::File(_, f) = &want.scope
                && let Some(split) = dir.files.get_mut(f)
            {
                split.queue.waiters.retain(others);
            }
        }
        waits
    }

    pub(super) fn release(
        &mut self,
        t: &mut Turn<'_>,
        session: SessionId,
        scope: &Scope,
        number: GrantNumber,
        keep_shared: bool,
    ) {
        let Some(hold) = self.hold_mut(session, scope).filter(|h| h.number <= number) else { return };
        if keep_shared {
            if hold.implied || matches!(scope, Scope::Subtree(_)) {
                return;
            }
            hold.mode = Mode::Shared;
            hold.recall.take_if(|r| r.keep_shared);
            self.weaken_implied(session, scope);
        } else {
            let (given, implied) = (hold.number, hold.implied);
            if !implied {
                self.forget(session, given);
            }
            self.remove_hold(session, scope);
        }
        match scope {
            Scope::Subtree(prefix) => self.settle_below(t, prefix),
            Scope::Dir(key) => self.settle_all(t, key),
            Scope::File(..) => self.settle(t, scope),
        }
    }

    /// What is believed as a part of a directory is believed no more strongly than that.
    fn weaken_implied(&mut self, session: SessionId, scope: &Scope) {
        let Some(dir) = self.dirs.get_mut(scope.dir()).filter(|_| matches!(scope, Scope::Dir(_))) else { return };
        let holds = dir.files.values_mut().filter_map(|s| s.holders.get_mut(&session));
        holds.filter(|h| h.implied).for_each(|h| h.mode = Mode::Shared);
    }

    fn forget(&mut self, session: SessionId, number: GrantNumber) {
        self.grants.remove(&number);
        if let Some(s) = self.sessions.get_mut(&session) {
            s.holds.remove(&number);
        }
    }

    /// Takes a hold out of its table, and with a directory's what is believed as part of it.
    pub(super) fn remove_hold(&mut self, session: SessionId, scope: &Scope) {
        if let Scope::Subtree(prefix) = scope {
            self.subtrees.retain(|s| s.session != session || s.prefix != *prefix || s.held().is_none());
            return;
        }
        let Some(dir) = self.dirs.get_mut(scope.dir()) else { return };
        if let Scope::File(_, f) = scope {
            dir.files.get_mut(f).and_then(|s| s.holders.remove(&session));
            return;
        }
        dir.holders.remove(&session);
        for split in dir.files.values_mut() {
            if split.holders.get(&session).is_some_and(|h| h.implied) {
                split.holders.remove(&session);
            }
        }
    }

    /// Moves on the queue of a directory or split file, after something about it has changed.
    pub(super) fn settle(&mut self, t: &mut Turn<'_>, scope: &Scope) {
        if !self.serving() {
            return;
        }
        match scope {
            Scope::File(dir, file) if self.split(dir, file).is_some() => self.settle_file(t, dir, file),
            other => self.settle_dir(t, other.dir()),
        }
        self.tidy(t, scope.dir());
    }

    /// Moves on all queues of a directory.
    pub(super) fn settle_all(&mut self, t: &mut Turn<'_>, key: &DirKey) {
        if !self.serving() {
            return;
        }
        self.settle_dir(t, key);
        let waited = |d: &super::table::Dir| -> Vec<FileKey> {
            d.files.iter().filter(|(_, s)| !s.queue.is_empty()).map(|(f, _)| f.clone()).collect()
        };
        for file in self.dirs.get(key).map(waited).unwrap_or_default() {
            self.settle_file(t, key, &file);
        }
        self.tidy(t, key);
    }

    fn settle_dir(&mut self, t: &mut Turn<'_>, key: &DirKey) {
        while let Some((at, waiter)) = self.candidate(t, &Scope::Dir(key.clone())) {
            let Some(dir) = self.dirs.get_mut(key) else { return };
            let blocked = forbids(&dir.holders, waiter.session, waiter.want.mode);
            if let Scope::File(_, file) = &waiter.want.scope {
                if blocked && !dir.files.contains_key(file) && dir.files.len() < self.bounds.splits {
                    dir.split(file);
                }
                if let Some(split) = dir.files.get_mut(file) {
                    dir.queue.waiters.remove(at).into_iter().for_each(|w| split.queue.insert(w));
                    self.settle_file(t, key, file);
                    continue;
                }
            }
            if blocked {
                return self.recall_for(t, &Scope::Dir(key.clone()), at);
            }
            self.serve_waiter(t, Scope::Dir(key.clone()), at);
        }
    }

    fn settle_file(&mut self, t: &mut Turn<'_>, key: &DirKey, file: &FileKey) {
        let scope = Scope::File(key.clone(), file.clone());
        while let Some((at, waiter)) = self.candidate(t, &scope) {
            let Some(split) = self.split(key, file) else { return };
            if forbids(&split.holders, waiter.session, waiter.want.mode) {
                return self.recall_for(t, &scope, at);
            }
            self.serve_waiter(t, scope.clone(), at);
        }
    }

    /// The first in a queue who is not barred by a subtree. Subtrees that bar somebody are recalled.
    fn candidate(&mut self, t: &mut Turn<'_>, scope: &Scope) -> Option<(usize, Waiter)> {
        let barred = |w: &Waiter| self.is_barred(scope.dir(), w.session, w.arrival);
        let queue = &self.queue(scope)?.waiters;
        let at = queue.iter().position(|w| !barred(w));
        let found = at.map(|i| (i, queue[i].clone()));
        let passed: Vec<SessionId> = queue.iter().take(at.unwrap_or(queue.len())).map(|w| w.session).collect();
        passed.into_iter().for_each(|session| self.recall_bars(t, scope.dir(), session));
        found
    }

    /// Recalls, once, whatever is in the way of a waiter.
    fn recall_for(&mut self, t: &mut Turn<'_>, scope: &Scope, at: usize) {
        let queue = self.queue_mut(scope);
        let Some(waiter) = queue.waiters.get(at) else { return };
        let (session, mode) = (waiter.session, waiter.want.mode);
        if queue.recalled_for.replace(waiter.arrival) == Some(waiter.arrival) {
            return;
        }
        let Some(dir) = self.dirs.get(scope.dir()) else { return };
        let holders = match scope {
            Scope::File(_, f) => dir.files.get(f).map_or(&dir.holders, |s| &s.holders),
            _ => &dir.holders,
        };
        for holder in in_the_way(holders, session, mode) {
            self.recall(t, holder, scope, mode == Mode::Shared);
        }
    }

    fn serve_waiter(&mut self, t: &mut Turn<'_>, scope: Scope, at: usize) {
        let queue = self.queue_mut(&scope);
        let Some(waiter) = queue.waiters.remove(at) else { return };
        queue.recalled_for = None;
        if let Some(s) = self.sessions.get_mut(&waiter.session) {
            s.waits.remove(&waiter.want);
        }
        self.give(t, waiter.session, waiter.request, waiter.want.scope, scope, waiter.want.mode);
    }

    /// Grants, with a new number also what is held already.
    pub(super) fn give(
        &mut self,
        t: &mut Turn<'_>,
        session: SessionId,
        request: RequestId,
        asked: Scope,
        scope: Scope,
        mode: Mode,
    ) {
        let old = self.hold(session, &scope).cloned();
        let (mut mode, mut since) = (mode, t.now);
        if let Some(old) = old {
            if !old.implied {
                self.forget(session, old.number);
            }
            // Nobody loses by asking: changes may be under way by what it has.
            mode = mode.max(old.mode);
            if old.mode == Mode::Exclusive {
                since = old.since;
            }
        }
        self.number = self.number.next();
        let number = self.number;
        let hold = Hold { mode, number, since, implied: false, recall: None };
        let mut exceptions = Vec::new();
        match &scope {
            Scope::Dir(key) => {
                let dir = self.dirs.entry(key.clone()).or_default();
                dir.holders.insert(session, hold);
                exceptions = dir.exceptions();
            }
            Scope::File(key, file) => {
                let files = &mut self.dirs.entry(key.clone()).or_default().files;
                files.entry(file.clone()).or_default().holders.insert(session, hold);
            }
            Scope::Subtree(prefix) => self.hold_subtree(session, prefix, hold),
        }
        self.grants.insert(number, session);
        if let Some(s) = self.sessions.get_mut(&session) {
            s.holds.insert(number, scope.clone());
        }
        self.tell(t, session, Tell::Grant { request, asked, scope: scope.clone(), mode, number, exceptions });
        self.shed_oldest(t, session);
        if self.is_wanted_by_subtree(session, &scope) {
            self.recall(t, session, &scope, false);
        }
    }

    /// Recalls the oldest lease of a session that holds too many, or of all.
    fn shed_oldest(&mut self, t: &mut Turn<'_>, session: SessionId) {
        if let Some(s) = self.sessions.get_mut(&session)
            && s.holds.len() > self.bounds.session_leases
            && let Some((&number, scope)) = s.holds.range(s.shed.next()..).next()
        {
            s.shed = number;
            let scope = scope.clone();
            self.recall(t, session, &scope, false);
        }
        if self.grants.len() > self.bounds.leases
            && let Some((&number, &holder)) =
                self.grants.range(self.shed.max(GrantNumber::before(self.term)).next()..).next()
        {
            self.shed = number;
            if let Some(scope) = self.sessions.get(&holder).and_then(|s| s.holds.get(&number)).cloned() {
                self.recall(t, holder, &scope, false);
            }
        }
    }

    /// Begins a recall, or makes one that is under way ask for all.
    pub(super) fn recall(&mut self, t: &mut Turn<'_>, session: SessionId, scope: &Scope, keep_shared: bool) {
        let min_hold = self.times.min_hold;
        let Some(hold) = self.hold_mut(session, scope) else { return };
        let keep_shared = keep_shared && !hold.implied;
        let at = match hold.mode {
            Mode::Exclusive => t.now.max(hold.since + min_hold),
            Mode::Shared => t.now,
        };
        match &mut hold.recall {
            Some(r) if r.keep_shared && !keep_shared => {
                r.keep_shared = false;
                r.next = at;
            }
            Some(_) => return,
            none => *none = Some(Recall { keep_shared, first: at, next: at }),
        }
        self.later(at, Due::Recall(session, scope.clone()));
    }

    /// Drops what nobody holds or waits for, and tells subtrees that wait for this directory.
    fn tidy(&mut self, t: &mut Turn<'_>, key: &DirKey) {
        if let Some(dir) = self.dirs.get_mut(key) {
            // Split for a want that has gone: as long as nobody was asked to give it up, it can join again.
            dir.files
                .retain(|_, s| !s.queue.is_empty() || s.holders.values().any(|h| !h.implied || h.recall.is_some()));
            if dir.queue.is_empty() && dir.files.values().all(|s| s.queue.is_empty()) {
                self.queued.remove(key);
            }
            if dir.is_idle() {
                self.dirs.remove(key);
            }
        }
        self.note_subtrees(t, key);
    }
}
