//! Subtrees: one session moves everything below a prefix, so nobody else may hold anything there.
//!
//! There are few of them at a time (a bound), so they are a list in order of arrival. Of those that overlap only the first is *active*: it has
//! everything of others below it recalled and bars those who came later. It remembers which directories it waits for, so that each release
//! below it is cheap.

use super::engine::{Engine, Turn};
use super::table::{Hold, Waiter};
use efc_common::id::SessionId;
use efc_common::lease::{DirKey, Scope};
use std::collections::BTreeSet;

#[derive(Debug)]
pub(super) enum State {
    /// Behind an earlier one.
    Waiting,
    /// Next, when these directories are given up.
    Active(BTreeSet<DirKey>),
    Held(Hold),
}

#[derive(Debug)]
pub(super) struct Subtree {
    pub(super) session: SessionId,
    pub(super) prefix: DirKey,
    pub(super) state: State,
    /// None once it is held.
    pub(super) waiter: Option<Waiter>,
}

impl Subtree {
    pub(super) fn held(&self) -> Option<&Hold> {
        match &self.state {
            State::Held(hold) => Some(hold),
            State::Waiting | State::Active(_) => None,
        }
    }

    fn overlaps(&self, other: &DirKey) -> bool {
        self.prefix.is_in(other) || other.is_in(&self.prefix)
    }

    fn arrival(&self) -> u64 {
        self.waiter.as_ref().map_or(0, |w| w.arrival)
    }
}

impl Engine {
    pub(super) fn queue_subtree(&mut self, t: &mut Turn<'_>, prefix: DirKey, waiter: Waiter) {
        let session = waiter.session;
        self.subtrees.push(Subtree { session, prefix, state: State::Waiting, waiter: Some(waiter) });
        self.settle_subtrees(t);
    }

    /// Is a want of a session below a subtree that another has, or waited for earlier?
    pub(super) fn is_barred(&self, key: &DirKey, session: SessionId, arrival: u64) -> bool {
        self.subtrees.iter().filter(|s| s.session != session && key.is_in(&s.prefix)).any(|s| match s.state {
            State::Held(_) => true,
            State::Active(_) => s.arrival() < arrival,
            State::Waiting => false,
        })
    }

    pub(super) fn recall_bars(&mut self, t: &mut Turn<'_>, key: &DirKey, session: SessionId) {
        let bars = self.subtrees.iter().filter(|s| s.held().is_some() && s.session != session && key.is_in(&s.prefix));
        let bars: Vec<_> = bars.map(|s| (s.session, Scope::Subtree(s.prefix.clone()))).collect();
        bars.iter().for_each(|(holder, scope)| self.recall(t, *holder, scope, false));
    }

    pub(super) fn is_wanted_by_subtree(&self, session: SessionId, scope: &Scope) -> bool {
        let wants = |s: &Subtree| matches!(s.state, State::Active(_)) && s.session != session;
        !matches!(scope, Scope::Subtree(_)) && self.subtrees.iter().any(|s| wants(s) && scope.dir().is_in(&s.prefix))
    }

    /// Makes active who is next, and grants what nobody is in the way of.
    pub(super) fn settle_subtrees(&mut self, t: &mut Turn<'_>) {
        if !self.serving() {
            return;
        }
        self.press_on(t);
        while let Some(ready) = self.subtrees.iter().position(|s| matches!(&s.state, State::Active(b) if b.is_empty()))
        {
            self.grant_subtree(t, ready);
            // Those behind it want it back.
            self.press_on(t);
        }
    }

    /// Makes active who is next, or recalls the subtrees in its way.
    fn press_on(&mut self, t: &mut Turn<'_>) {
        for i in 0..self.subtrees.len() {
            let (session, prefix) = (self.subtrees[i].session, self.subtrees[i].prefix.clone());
            if !matches!(self.subtrees[i].state, State::Waiting) {
                continue;
            }
            let in_the_way = |(j, s): (usize, &Subtree)| {
                s.session != session && s.overlaps(&prefix) && (s.held().is_some() || j < i)
            };
            let before: Vec<_> = self.subtrees.iter().enumerate().filter(|&x| in_the_way(x)).map(|(j, _)| j).collect();
            if before.is_empty() {
                self.activate(t, i);
                continue;
            }
            for j in before {
                let (holder, scope) = (self.subtrees[j].session, Scope::Subtree(self.subtrees[j].prefix.clone()));
                self.recall(t, holder, &scope, false);
            }
        }
    }

    fn activate(&mut self, t: &mut Turn<'_>, i: usize) {
        let (session, arrival) = (self.subtrees[i].session, self.subtrees[i].arrival());
        let prefix = self.subtrees[i].prefix.clone();
        let below = self.dirs.range(prefix.clone()..).take_while(|(k, _)| k.is_in(&prefix));
        let blockers: BTreeSet<DirKey> =
            below.filter(|(_, d)| d.is_used_by_others(session, arrival)).map(|(k, _)| k.clone()).collect();
        let mut holds = Vec::new();
        for key in &blockers {
            let Some(dir) = self.dirs.get(key) else { continue };
            holds.extend(dir.all_holds().filter(|(s, _)| *s != session).map(|(s, file)| match file {
                Some(f) => (s, Scope::File(key.clone(), f.clone())),
                None => (s, Scope::Dir(key.clone())),
            }));
        }
        self.subtrees[i].state = State::Active(blockers);
        holds.iter().for_each(|(holder, scope)| self.recall(t, *holder, scope, false));
    }

    fn grant_subtree(&mut self, t: &mut Turn<'_>, i: usize) {
        let Some(waiter) = self.subtrees[i].waiter.clone() else { return };
        if let Some(s) = self.sessions.get_mut(&waiter.session) {
            s.waits.remove(&waiter.want);
        }
        let scope = waiter.want.scope.clone();
        self.give(t, waiter.session, waiter.request, scope.clone(), scope, waiter.want.mode);
        // Those who came meanwhile want it back.
        if let Some(first) = self.subtrees.iter().find(|s| s.held().is_some_and(|h| h.number == self.number)) {
            let prefix = first.prefix.clone();
            self.settle_queued(t, &prefix);
        }
    }

    /// Puts a hold in the place of its waiter, and of a hold that it replaces.
    pub(super) fn hold_subtree(&mut self, session: SessionId, prefix: &DirKey, hold: Hold) {
        let own = |s: &Subtree| s.session == session && s.prefix == *prefix;
        self.subtrees.retain(|s| !own(s) || s.held().is_none());
        let waiting = self.subtrees.iter().position(|s| own(s) && matches!(s.state, State::Active(_)));
        let held = Subtree { session, prefix: prefix.clone(), state: State::Held(hold), waiter: None };
        match waiting {
            Some(i) => self.subtrees[i] = held,
            None => self.subtrees.push(held),
        }
    }

    /// After something in a directory has changed.
    pub(super) fn note_subtrees(&mut self, t: &mut Turn<'_>, key: &DirKey) {
        let mut ready = false;
        for s in &mut self.subtrees {
            let (session, arrival) = (s.session, s.arrival());
            if let State::Active(blockers) = &mut s.state
                && blockers.contains(key)
                && !self.dirs.get(key).is_some_and(|d| d.is_used_by_others(session, arrival))
            {
                blockers.remove(key);
                ready |= blockers.is_empty();
            }
        }
        if ready {
            self.settle_subtrees(t);
        }
    }

    /// After a subtree has gone: others may be next, and those it barred go on.
    pub(super) fn settle_below(&mut self, t: &mut Turn<'_>, prefix: &DirKey) {
        self.settle_subtrees(t);
        self.settle_queued(t, prefix);
    }

    fn settle_queued(&mut self, t: &mut Turn<'_>, prefix: &DirKey) {
        let below = self.queued.range(prefix.clone()..).take_while(|k| k.is_in(prefix));
        for key in below.cloned().collect::<Vec<_>>() {
            self.settle_all(t, &key);
        }
    }
}
