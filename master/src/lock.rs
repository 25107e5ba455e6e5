//! Advisory locks as the leading master sees them: a pure table. [`LockTable::say`] takes what an owner has and wants of a file
//! ([`efc_common::lock`]) and gives what is to be told; it does no I/O and reads no clock. It lives and dies with the lease engine of one office: a new
//! leader's is empty, is told by the sessions what they hold together with their claims of leases, and grants nothing before all have spoken
//! ([`LockTable::open`]). For the same reasons as there no two sessions ever hold what conflicts, also while an old leader has not noticed.
//!
//! Locks outlive the life of their session in which they were taken, for its next one ([`LockTable::begin_life`]): until its owners have spoken in that,
//! or its time for it is over, nobody else gets what they have.
//!
//! A want that waits is granted as soon as nothing stands against it, in the order of arrival; one that does not wait is not held up by those that do.
//! Deadlocks are found when a want begins to wait: by following, from owner to owner, who waits for whom.

use efc_common::id::SessionId;
use efc_common::lease::Moment;
use efc_common::lock::{
    LOCKS_MAX, Lock, LockFile, LockOwner, LockSet, LockState, LockTell, LockWant, Patience, Verdict,
};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// Owners of one session, over all files, and locks and wants of all of them.
const ENTRIES_MAX: usize = 100_000;

type Who = (SessionId, LockOwner);
type Out<'a> = &'a mut Vec<(SessionId, LockTell)>;

/// One owner on one file.
#[derive(Default)]
struct Owned {
    pid: u32,
    /// As its session says.
    held: LockSet,
    /// Granted, and its session does not know it yet.
    granted: Vec<(u64, Lock)>,
    waits: Vec<LockWant>,
    /// All it has: what others must respect.
    has: LockSet,
    /// It has not spoken in this life of its session.
    unclaimed: bool,
}

impl Owned {
    fn add_up(&mut self) {
        self.has = self.held.clone();
        self.granted.iter().for_each(|(_, lock)| self.has.set(*lock));
    }

    fn is_over(&self) -> bool {
        self.has.is_empty() && self.waits.is_empty()
    }

    fn entries(&self) -> usize {
        self.held.locks().len() + self.granted.len() + self.waits.len()
    }
}

#[derive(Default)]
struct File {
    owners: BTreeMap<Who, Owned>,
    /// Wants that wait, in the order of arrival.
    queue: VecDeque<(Who, u64)>,
}

impl File {
    /// Whose lock stands first against this one.
    fn against(&self, who: Who, lock: &Lock) -> Option<(Who, Lock)> {
        let others = self.owners.iter().filter(|(other, _)| **other != who);
        others.into_iter().find_map(|(other, owned)| Some((*other, owned.has.against(lock)?)))
    }

    fn blockers(&self, who: Who, lock: &Lock) -> impl Iterator<Item = Who> {
        self.owners.iter().filter(move |(o, owned)| **o != who && owned.has.against(lock).is_some()).map(|(o, _)| *o)
    }
}

impl File {
    /// Goes once through what waits; true if something was granted.
    fn grant_some(&mut self, name: &LockFile, out: Out<'_>) -> bool {
        let (mut left, mut some) = (VecDeque::new(), false);
        for (who, id) in std::mem::take(&mut self.queue) {
            let waits = self.owners.get(&who).and_then(|o| o.waits.iter().find(|w| w.id == id)).copied();
            // Taken back meanwhile.
            let Some(want) = waits else { continue };
            if self.against(who, &want.lock).is_some() {
                left.push_back((who, id));
                continue;
            }
            if let Some(owned) = self.owners.get_mut(&who) {
                owned.waits.retain(|w| w.id != id);
                owned.granted.push((id, want.lock));
                owned.has.set(want.lock);
                out.push(settled(name, who, id, Verdict::Granted));
                some = true;
            }
        }
        self.queue = left;
        some
    }
}

fn settled(file: &LockFile, (session, owner): Who, id: u64, verdict: Verdict) -> (SessionId, LockTell) {
    (session, LockTell::Settled { file: file.clone(), owner, id, verdict })
}

/// See the module.
#[derive(Default)]
pub(crate) struct LockTable {
    files: HashMap<LockFile, File>,
    /// The files on which an owner has or wants something.
    by_owner: BTreeMap<Who, BTreeSet<LockFile>>,
    /// Has and wants of each session.
    entries: HashMap<SessionId, usize>,
    /// Until when owners who have not spoken in the life that their session began are waited for.
    claims: BTreeMap<SessionId, Moment>,
    /// All sessions have claimed.
    open: bool,
}

impl LockTable {
    /// Takes up what an owner has and wants. What it says to hold is believed while claims are made, later only as far as it is so.
    pub(crate) fn say(&mut self, session: SessionId, state: LockState, out: Out<'_>) {
        let LockState { file: name, owner, pid, version, held, wants } = state;
        let who = (session, owner);
        let file = self.files.entry(name.clone()).or_default();
        let owned = file.owners.entry(who).or_default();
        let before = owned.entries();
        let known = match self.open {
            true => held.into_iter().flat_map(|l| owned.has.parts_of(l)).collect(),
            false => held,
        };
        owned.pid = pid;
        owned.unclaimed = false;
        owned.held = LockSet::default();
        known.into_iter().for_each(|l| owned.held.set(l));
        let named = |id: u64| wants.iter().any(|w| w.id == id);
        owned.granted.retain(|(id, _)| named(*id));
        owned.waits.retain(|w| named(w.id));
        owned.add_up();
        let waits: BTreeSet<u64> = owned.waits.iter().map(|w| w.id).collect();
        let granted: BTreeSet<u64> = owned.granted.iter().map(|(id, _)| *id).collect();
        let after = owned.entries();
        let sum = self.entries.entry(session).or_default();
        *sum = *sum + after - before;
        self.by_owner.entry(who).or_default().insert(name.clone());
        for want in wants {
            if granted.contains(&want.id) {
                // Its answer was lost.
                out.push(settled(&name, who, want.id, Verdict::Granted));
            } else if !waits.contains(&want.id) {
                self.want(&name, who, want, out);
            }
        }
        out.push((session, LockTell::Heard { file: name.clone(), owner, version }));
        self.progress(&name, out);
    }

    /// All sessions have claimed what they hold: wants are granted from now on.
    pub(crate) fn open(&mut self, out: Out<'_>) {
        if self.open {
            return;
        }
        self.open = true;
        let waiting: Vec<LockFile> =
            self.files.iter().filter(|(_, f)| !f.queue.is_empty()).map(|(name, _)| name.clone()).collect();
        for name in waiting {
            let Some(file) = self.files.get_mut(&name) else { continue };
            for (who, id) in std::mem::take(&mut file.queue) {
                if let Some(want) = self.take_wait(&name, who, id) {
                    self.want(&name, who, want, out);
                }
            }
            self.progress(&name, out);
        }
    }

    /// A session begins another life: nobody hears any more what its owners waited for, and what they have is kept for them until this time, at which
    /// [`LockTable::end_unclaimed`] is due.
    pub(crate) fn begin_life(&mut self, session: SessionId, until: Moment, out: Out<'_>) {
        self.claims.insert(session, until);
        self.replace(session, out, |owned| {
            // Its session may have heard of what was granted.
            let (pid, held, has) = (owned.pid, owned.has.clone(), std::mem::take(&mut owned.has));
            *owned = Owned { pid, held, has, unclaimed: true, ..Owned::default() };
        });
    }

    /// Ends owners who did not speak in the new lives of their sessions in time.
    pub(crate) fn end_unclaimed(&mut self, now: Moment, out: Out<'_>) {
        let due: Vec<SessionId> = self.claims.iter().filter(|(_, until)| **until <= now).map(|(s, _)| *s).collect();
        for session in due {
            self.claims.remove(&session);
            self.replace(session, out, |owned| {
                if owned.unclaimed {
                    *owned = Owned::default();
                }
            });
        }
    }

    /// A session is over.
    pub(crate) fn end(&mut self, session: SessionId, out: Out<'_>) {
        self.replace(session, out, |owned| *owned = Owned::default());
        self.claims.remove(&session);
        self.entries.remove(&session);
    }

    /// Locks held, and wants that wait.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let owned = || self.files.values().flat_map(|f| f.owners.values());
        (owned().map(|o| o.has.locks().len()).sum(), owned().map(|o| o.waits.len()).sum())
    }

    /// Changes what the owners of a session have, on each file.
    fn replace(&mut self, session: SessionId, out: Out<'_>, mut change: impl FnMut(&mut Owned)) {
        let owners = self.by_owner.range((session, LockOwner(0))..=(session, LockOwner(u64::MAX)));
        let all: Vec<(Who, LockFile)> = owners.flat_map(|(w, files)| files.iter().map(|f| (*w, f.clone()))).collect();
        for (who, name) in all {
            let Some(file) = self.files.get_mut(&name) else { continue };
            if let Some(owned) = file.owners.get_mut(&who) {
                let before = owned.entries();
                change(owned);
                let sum = self.entries.entry(session).or_default();
                *sum = *sum + owned.entries() - before;
                let waits = |id: u64| owned.waits.iter().any(|w| w.id == id);
                file.queue.retain(|(other, id)| *other != who || waits(*id));
            }
            self.progress(&name, out);
        }
    }

    fn take_wait(&mut self, name: &LockFile, who: Who, id: u64) -> Option<LockWant> {
        let owned = self.files.get_mut(name)?.owners.get_mut(&who)?;
        let at = owned.waits.iter().position(|w| w.id == id)?;
        *self.entries.entry(who.0).or_default() -= 1;
        Some(owned.waits.swap_remove(at))
    }

    /// A new want.
    fn want(&mut self, name: &LockFile, who: Who, want: LockWant, out: Out<'_>) {
        let mut settle = |verdict| out.push(settled(name, who, want.id, verdict));
        let Some(file) = self.files.get_mut(name) else { return };
        let against = if self.open { file.against(who, &want.lock) } else { None };
        if self.open && against.is_none() && want.patience == Patience::Test {
            return settle(Verdict::Granted);
        }
        if let Some((holder, by)) = against {
            if want.patience != Patience::Wait {
                let pid = if holder.0 == who.0 { file.owners.get(&holder).map_or(0, |o| o.pid) } else { 0 };
                return settle(Verdict::Denied { by, pid });
            }
            if self.waits_for_itself(name, who, &want.lock) {
                return settle(Verdict::Deadlock);
            }
        }
        let entries = self.entries.entry(who.0).or_default();
        let (Some(file), true) = (self.files.get_mut(name), *entries < ENTRIES_MAX) else {
            return settle(Verdict::TooMany);
        };
        let owned = file.owners.entry(who).or_default();
        if owned.entries() >= LOCKS_MAX {
            return settle(Verdict::TooMany);
        }
        *entries += 1;
        if self.open && against.is_none() {
            owned.granted.push((want.id, want.lock));
            owned.has.set(want.lock);
            return settle(Verdict::Granted);
        }
        owned.waits.push(want);
        file.queue.push_back((who, want.id));
    }

    /// Grants what waits and can be granted, and forgets what is over.
    fn progress(&mut self, name: &LockFile, out: Out<'_>) {
        let Some(file) = self.files.get_mut(name) else { return };
        // A grant can weaken what its owner had, which lets in who was passed over.
        while self.open && file.grant_some(name, out) {}
        let (by_owner, mut idle) = (&mut self.by_owner, Vec::new());
        file.owners.retain(|who, owned| {
            if owned.is_over() {
                idle.push(*who);
            }
            !owned.is_over()
        });
        for who in idle {
            if let Some(files) = by_owner.get_mut(&who) {
                files.remove(name);
                if files.is_empty() {
                    by_owner.remove(&who);
                }
            }
        }
        if file.owners.is_empty() {
            self.files.remove(name);
        }
    }

    /// Would `who`, waiting for this lock, wait for itself?
    fn waits_for_itself(&self, name: &LockFile, who: Who, lock: &Lock) -> bool {
        let Some(file) = self.files.get(name) else { return false };
        let mut next: Vec<Who> = file.blockers(who, lock).collect();
        let mut seen = BTreeSet::new();
        while let Some(owner) = next.pop() {
            if owner == who {
                return true;
            }
            if !seen.insert(owner) {
                continue;
            }
            for file in self.by_owner.get(&owner).into_iter().flatten().filter_map(|name| self.files.get(name)) {
                let waits = file.owners.get(&owner).map_or(&[][..], |o| &o.waits);
                waits.iter().for_each(|w| next.extend(file.blockers(owner, &w.lock)));
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_common::id::SourceId;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn file(n: u8) -> LockFile {
        LockFile::new(SourceId([0; 16]), &[n]).expect("short")
    }

    fn lock(start: u64, end: u64, exclusive: bool) -> Lock {
        Lock { start, end, exclusive }
    }

    const LEASE: Moment = Moment::from_secs(10);

    /// Sessions with one owner each, as a client keeps them.
    struct Sim {
        table: LockTable,
        now: Moment,
        ids: u64,
        /// What session `s` knows to hold of file `f`, and wants.
        known: BTreeMap<(u64, u8), (LockSet, Vec<LockWant>)>,
        /// Has said nothing in its new life.
        silent: BTreeSet<(u64, u8)>,
        settled: BTreeMap<u64, Verdict>,
    }

    impl Sim {
        fn new() -> Sim {
            let mut table = LockTable::default();
            table.open(&mut Vec::new());
            Sim {
                table,
                now: Moment::ZERO,
                ids: 0,
                known: BTreeMap::new(),
                silent: BTreeSet::new(),
                settled: BTreeMap::new(),
            }
        }

        fn state(&self, s: u64, f: u8) -> LockState {
            let (held, wants) = self.known.get(&(s, f)).cloned().unwrap_or_default();
            let held = held.locks().to_vec();
            LockState { file: file(f), owner: LockOwner(s), pid: s as u32, version: 1, held, wants }
        }

        fn say(&mut self, s: u64, f: u8) {
            let mut out = Vec::new();
            self.table.say(SessionId(s), self.state(s, f), &mut out);
            self.silent.remove(&(s, f));
            self.hear(out);
        }

        /// A process goes on with what its predecessor knew to hold.
        fn begin_life(&mut self, s: u64) {
            for (key, (_, wants)) in self.known.iter_mut().filter(|(key, _)| key.0 == s) {
                wants.clear();
                self.silent.insert(*key);
            }
            let mut out = Vec::new();
            self.table.begin_life(SessionId(s), self.now + LEASE, &mut out);
            self.hear(out);
        }

        fn pass(&mut self, time: Moment) {
            self.now += time;
            let mut out = Vec::new();
            self.table.end_unclaimed(self.now, &mut out);
            let over: Vec<u64> = self.silent.iter().map(|(s, _)| *s).collect();
            for s in over.into_iter().filter(|s| !self.table.claims.contains_key(&SessionId(*s))) {
                self.known.retain(|key, _| key.0 != s || !self.silent.contains(key));
                self.silent.retain(|key| key.0 != s);
            }
            self.hear(out);
        }

        fn hear(&mut self, out: Vec<(SessionId, LockTell)>) {
            for (_, tell) in out {
                let LockTell::Settled { id, verdict, .. } = tell else { continue };
                self.settled.insert(id, verdict);
                for (held, wants) in self.known.values_mut() {
                    let Some(at) = wants.iter().position(|w| w.id == id) else { continue };
                    let want = wants.remove(at);
                    if verdict == Verdict::Granted && want.patience != Patience::Test {
                        held.set(want.lock);
                    }
                }
            }
        }

        fn want(&mut self, s: u64, f: u8, lock: Lock, patience: Patience) -> u64 {
            self.ids += 1;
            let want = LockWant { id: self.ids, lock, patience };
            self.known.entry((s, f)).or_default().1.push(want);
            self.say(s, f);
            self.ids
        }

        fn unlock(&mut self, s: u64, f: u8, start: u64, end: u64) {
            self.known.entry((s, f)).or_default().0.clear(start, end);
            self.say(s, f);
        }

        fn verdict(&self, id: u64) -> Option<Verdict> {
            self.settled.get(&id).copied()
        }
    }

    #[test]
    fn ranges_of_others_are_respected_and_waiting_ends_with_them() {
        let mut sim = Sim::new();
        let a = sim.want(1, 0, lock(0, 9, true), Patience::Try);
        let b = sim.want(2, 0, lock(10, 19, true), Patience::Try);
        assert_eq!((sim.verdict(a), sim.verdict(b)), (Some(Verdict::Granted), Some(Verdict::Granted)));
        let denied = Verdict::Denied { by: lock(0, 9, true), pid: 0 };
        let c = sim.want(2, 0, lock(5, 6, false), Patience::Try);
        let d = sim.want(2, 0, lock(5, 6, false), Patience::Test);
        assert_eq!((sim.verdict(c), sim.verdict(d)), (Some(denied), Some(denied)));
        let e = sim.want(2, 0, lock(5, 6, false), Patience::Wait);
        let f = sim.want(3, 0, lock(4, 8, false), Patience::Wait);
        sim.unlock(1, 0, 0, 5);
        assert_eq!((sim.verdict(e), sim.verdict(f)), (None, None));
        sim.unlock(1, 0, 6, 7);
        assert_eq!((sim.verdict(e), sim.verdict(f)), (Some(Verdict::Granted), None));
        let mut out = Vec::new();
        sim.table.end(SessionId(1), &mut out);
        sim.hear(out);
        assert_eq!(sim.verdict(f), Some(Verdict::Granted));
        sim.unlock(2, 0, 0, u64::MAX);
        sim.unlock(3, 0, 0, u64::MAX);
        assert_eq!((sim.table.counts(), sim.table.files.len(), sim.table.by_owner.len()), ((0, 0), 0, 0));
    }

    #[test]
    fn who_would_wait_for_itself_is_told() {
        let mut sim = Sim::new();
        for s in 1..=3 {
            sim.want(s, s as u8, lock(0, 0, true), Patience::Try);
        }
        assert_eq!(sim.want(1, 2, lock(0, 0, true), Patience::Wait), 4);
        assert_eq!(sim.want(2, 3, lock(0, 0, false), Patience::Wait), 5);
        let closing = sim.want(3, 1, lock(0, 5, false), Patience::Wait);
        assert_eq!((sim.verdict(4), sim.verdict(5), sim.verdict(closing)), (None, None, Some(Verdict::Deadlock)));
        sim.unlock(3, 3, 0, 0);
        assert_eq!((sim.verdict(5), sim.verdict(4)), (Some(Verdict::Granted), None));
    }

    #[test]
    fn an_answer_that_was_lost_is_given_again_and_a_want_taken_back_is_given_up() {
        let mut sim = Sim::new();
        let want = LockWant { id: 1, lock: lock(0, 9, true), patience: Patience::Wait };
        sim.known.insert((1, 0), (LockSet::default(), vec![want]));
        let mut out = Vec::new();
        for _ in 0..2 {
            out.clear();
            sim.table.say(SessionId(1), sim.state(1, 0), &mut out);
            assert_eq!(out[0], settled(&file(0), (SessionId(1), LockOwner(1)), 1, Verdict::Granted));
        }
        let waits = sim.want(2, 0, lock(0, 0, false), Patience::Wait);
        sim.known.insert((1, 0), Default::default());
        sim.say(1, 0);
        assert_eq!(sim.verdict(waits), Some(Verdict::Granted));
    }

    #[test]
    fn a_new_leader_grants_nothing_before_all_have_claimed() {
        let mut sim = Sim::new();
        sim.want(1, 0, lock(0, 9, true), Patience::Try);
        sim.table = LockTable::default();
        let (test, wait) =
            (sim.want(2, 0, lock(0, 0, false), Patience::Test), sim.want(2, 0, lock(0, 0, false), Patience::Wait));
        assert_eq!((sim.verdict(test), sim.verdict(wait)), (None, None));
        sim.say(1, 0);
        let mut out = Vec::new();
        sim.table.open(&mut out);
        sim.hear(out);
        assert_eq!(sim.verdict(test), Some(Verdict::Denied { by: lock(0, 9, true), pid: 0 }));
        assert_eq!(sim.verdict(wait), None);
        sim.unlock(1, 0, 0, 9);
        assert_eq!(sim.verdict(wait), Some(Verdict::Granted));
        // What a session says to have and never had is not believed.
        sim.known.entry((3, 0)).or_default().0.set(lock(0, 100, true));
        sim.say(3, 0);
        let other = sim.want(1, 0, lock(50, 60, true), Patience::Try);
        assert_eq!(sim.verdict(other), Some(Verdict::Granted));
    }

    #[test]
    fn locks_outlive_the_life_they_were_taken_in_and_are_claimed() {
        let mut sim = Sim::new();
        sim.want(1, 0, lock(0, 9, true), Patience::Try);
        let first = sim.want(2, 0, lock(0, 0, false), Patience::Wait);
        sim.begin_life(1);
        let denied = Verdict::Denied { by: lock(0, 9, true), pid: 0 };
        let tried = sim.want(3, 0, lock(9, 9, false), Patience::Try);
        assert_eq!((sim.verdict(first), sim.verdict(tried)), (None, Some(denied)));
        // Not all of it is claimed, and more than there was.
        sim.pass(LEASE / 2);
        sim.known.insert((1, 0), Default::default());
        sim.known.entry((1, 0)).or_default().0.set(lock(5, 20, true));
        sim.say(1, 0);
        assert_eq!(sim.verdict(first), Some(Verdict::Granted));
        sim.pass(LEASE);
        let more = sim.want(3, 0, lock(10, 20, true), Patience::Try);
        let tried = sim.want(3, 0, lock(9, 9, false), Patience::Try);
        let denied = Verdict::Denied { by: lock(5, 9, true), pid: 0 };
        assert_eq!((sim.verdict(more), sim.verdict(tried)), (Some(Verdict::Granted), Some(denied)));
    }

    #[test]
    fn locks_that_nobody_claims_end_with_the_time_for_it() {
        let mut sim = Sim::new();
        sim.want(1, 0, lock(0, 9, true), Patience::Try);
        sim.want(1, 1, lock(0, 9, true), Patience::Try);
        sim.begin_life(1);
        sim.say(1, 1);
        sim.pass(LEASE / 2);
        // The process that was to claim them died too.
        sim.begin_life(1);
        sim.say(1, 1);
        let waits = sim.want(2, 0, lock(5, 5, true), Patience::Wait);
        sim.pass(LEASE - Moment::from_millis(1));
        assert_eq!(sim.verdict(waits), None);
        sim.pass(Moment::from_millis(1));
        let claimed = sim.want(2, 1, lock(5, 5, true), Patience::Wait);
        assert_eq!((sim.verdict(waits), sim.verdict(claimed)), (Some(Verdict::Granted), None));
        // What was not claimed is over.
        sim.known.entry((1, 0)).or_default().0.set(lock(0, 9, true));
        sim.say(1, 0);
        let rest = sim.want(2, 0, lock(0, 9, true), Patience::Try);
        assert_eq!(sim.verdict(rest), Some(Verdict::Granted));
    }

    #[test]
    fn what_was_granted_and_not_heard_ends_with_the_first_word_of_a_new_life() {
        let mut sim = Sim::new();
        sim.want(1, 0, lock(0, 9, true), Patience::Try);
        let mut state = sim.state(1, 0);
        state.wants.push(LockWant { id: 90, lock: lock(20, 29, true), patience: Patience::Try });
        sim.table.say(SessionId(1), state, &mut Vec::new());
        sim.begin_life(1);
        let waits = sim.want(2, 0, lock(20, 20, true), Patience::Wait);
        assert_eq!(sim.verdict(waits), None, "its session may have heard");
        sim.say(1, 0);
        let tried = sim.want(2, 0, lock(0, 0, true), Patience::Try);
        let denied = Verdict::Denied { by: lock(0, 9, true), pid: 0 };
        assert_eq!((sim.verdict(waits), sim.verdict(tried)), (Some(Verdict::Granted), Some(denied)));
    }

    #[test]
    fn nobody_waits_for_what_was_wanted_in_an_old_life() {
        let mut sim = Sim::new();
        sim.want(2, 0, lock(0, 9, true), Patience::Try);
        let old = sim.want(1, 0, lock(0, 0, true), Patience::Wait);
        let waits = sim.want(3, 0, lock(0, 0, true), Patience::Wait);
        sim.begin_life(1);
        assert_eq!(sim.table.counts(), (1, 1));
        // Numbers begin anew too.
        let again = LockWant { id: old, lock: lock(5, 5, true), patience: Patience::Wait };
        sim.known.entry((1, 0)).or_default().1.push(again);
        sim.say(1, 0);
        sim.unlock(2, 0, 0, 4);
        assert_eq!((sim.verdict(old), sim.verdict(waits)), (None, Some(Verdict::Granted)));
        sim.unlock(2, 0, 5, 9);
        assert_eq!((sim.verdict(old), sim.table.counts()), (Some(Verdict::Granted), (2, 0)));
    }

    #[test]
    fn a_state_that_was_said_before_a_weaker_lock_was_heard_of_gives_up_nothing_else() {
        let mut sim = Sim::new();
        sim.want(1, 0, lock(0, 9, true), Patience::Try);
        let mut state = sim.state(1, 0);
        state.wants.push(LockWant { id: 90, lock: lock(4, 5, false), patience: Patience::Wait });
        for _ in 0..2 {
            sim.table.say(SessionId(1), state.clone(), &mut Vec::new());
        }
        let (weaker, around) =
            (sim.want(2, 0, lock(4, 5, false), Patience::Try), sim.want(2, 0, lock(6, 6, false), Patience::Try));
        let denied = Verdict::Denied { by: lock(6, 9, true), pid: 0 };
        assert_eq!((sim.verdict(weaker), sim.verdict(around)), (Some(Verdict::Granted), Some(denied)));
    }

    proptest! {
        #[test]
        fn no_two_owners_ever_have_what_conflicts_and_nobody_waits_for_nothing(
            steps in vec((1u64..5, 0u8..2, 0u64..8, 0u64..8, any::<bool>(), 0u8..10), 1..60)
        ) {
            let mut sim = Sim::new();
            for (s, f, a, b, exclusive, what) in steps {
                let l = lock(a.min(b), a.max(b), exclusive);
                match what {
                    0..=2 => drop(sim.want(s, f, l, Patience::Wait)),
                    3 => drop(sim.want(s, f, l, Patience::Try)),
                    4..=5 => sim.unlock(s, f, l.start, l.end),
                    6 => {
                        sim.known.entry((s, f)).or_default().1.clear();
                        sim.say(s, f);
                    }
                    7 => {
                        let mut out = Vec::new();
                        sim.table.end(SessionId(s), &mut out);
                        sim.known.retain(|(session, _), _| *session != s);
                        sim.silent.retain(|(session, _)| *session != s);
                        sim.hear(out);
                    }
                    8 => sim.begin_life(s),
                    _ => sim.pass(LEASE / 2),
                }
                for ((s, f), (held, wants)) in &sim.known {
                    for ((t, g), (others, _)) in &sim.known {
                        let clash = f == g && s != t && held.locks().iter().any(|l| others.against(l).is_some());
                        prop_assert!(!clash, "{s} and {t} on {f}");
                    }
                    for want in wants {
                        let blocked = sim.known.iter().any(|((t, g), (o, _))| g == f && t != s && o.against(&want.lock).is_some());
                        prop_assert!(blocked, "{s} waits on {f} for nothing: {want:?}");
                    }
                }
                let sums: usize = sim.table.files.values().flat_map(|f| f.owners.values()).map(Owned::entries).sum();
                prop_assert_eq!(sim.table.entries.values().sum::<usize>(), sums);
            }
        }
    }
}
