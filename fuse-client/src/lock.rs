//! The advisory locks of a mount: what its owners have of files and want, told to the masters, who decide ([`efc_common::lock`]).
//!
//! [`LockBook`] belongs to the mount's [`Leases`](crate::lease::Leases): its session carries the locks, a new leader is told of them with the claims of
//! leases, and with the session all of them are lost. A state that was not heard is said again; an operation that is given up while it waits takes its
//! want back. Each answer is entered before anybody hears of it, so what is said next has it.

use crate::journal::Journal;
use efc_client::lease::LeaseLink;
use efc_common::id::Incarnation;
use efc_common::lease::Ask;
use efc_common::lock::{Lock, LockFile, LockOwner, LockSet, LockState, LockTell, LockWant, Patience, Verdict};
use efc_common::{Error, Kind, Result};
use efc_proto::lock::{state_in, state_out};
use efc_proto::state;
use parking_lot::{Mutex, RwLockReadGuard};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

/// After which a state that was not heard, or whose want is not settled, is said again.
const AGAIN: Duration = Duration::from_secs(1);
/// An unlock waits so long for the masters to hear of it; then they hear of it later.
const UNLOCK_PATIENCE: Duration = Duration::from_secs(5);

/// One owner on one file.
type Key = (LockFile, LockOwner);

struct Pending {
    want: LockWant,
    answer: oneshot::Sender<Verdict>,
}

#[derive(Default)]
struct Owner {
    pid: u32,
    version: u64,
    heard: u64,
    said: Option<Instant>,
    held: LockSet,
    wants: BTreeMap<u64, Pending>,
    /// Handles through which it has locked: its locks end with the last of them, if not before.
    handles: BTreeSet<u64>,
    /// They wait until a version is heard.
    listeners: Vec<(u64, oneshot::Sender<()>)>,
}

impl Owner {
    fn state(&self, key: &Key) -> LockState {
        LockState {
            file: key.0.clone(),
            owner: key.1,
            pid: self.pid,
            version: self.version,
            held: self.held.locks().to_vec(),
            wants: self.wants.values().map(|p| p.want).collect(),
        }
    }

    fn wire(&self, key: &Key) -> state::Locks {
        let state = LockState { wants: Vec::new(), ..self.state(key) };
        state::Locks { state: Some(state_out(&state)), handles: self.handles.iter().copied().collect() }
    }

    fn is_over(&self) -> bool {
        self.held.is_empty() && self.wants.is_empty() && self.heard >= self.version
    }
}

/// What a predecessor had locked of one file for one owner.
pub struct LocksLeft {
    key: Key,
    owner: Owner,
}

impl LocksLeft {
    /// As it was written down.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for what is none.
    pub fn new(locks: &state::Locks) -> Result<LocksLeft> {
        let bad = || Error::new(Kind::Corrupt, "locks of the predecessor are not understood");
        let state = state_in(locks.state.clone().ok_or_else(bad)?).map_err(|e| bad().caused_by(e))?;
        let mut held = LockSet::default();
        state.held.into_iter().for_each(|lock| held.set(lock));
        let handles = locks.handles.iter().copied().collect();
        let owner = Owner { pid: state.pid, held, handles, ..Owner::default() };
        Ok(LocksLeft { key: (state.file, state.owner), owner })
    }
}

#[derive(Default)]
struct Inner {
    life: Option<Incarnation>,
    owners: HashMap<Key, Owner>,
    /// Whose each want is.
    wants: HashMap<u64, Key>,
    /// Numbers of wants and versions: none is used twice.
    last: u64,
}

/// See the module.
pub(crate) struct LockBook {
    link: Arc<LeaseLink>,
    journal: Option<Arc<Journal>>,
    inner: Mutex<Inner>,
}

/// Who asks for a lock, and through which open file.
#[derive(Debug, Clone)]
pub(crate) struct Asker {
    pub(crate) file: LockFile,
    pub(crate) owner: LockOwner,
    pub(crate) handle: u64,
    pub(crate) pid: u32,
}

impl LockBook {
    /// The book of a predecessor, or an empty one. What is held is written down in `journal`.
    pub(crate) fn new(link: Arc<LeaseLink>, journal: Option<Arc<Journal>>, left: Vec<LocksLeft>) -> LockBook {
        // Numbers of a predecessor are not given again.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut inner = Inner { last: (since.as_millis() as u64) << 20, ..Inner::default() };
        inner.owners = left.into_iter().map(|l| (l.key, l.owner)).collect();
        LockBook { link, journal, inner: Mutex::new(inner) }
    }

    /// Everything that is held.
    pub(crate) fn checkpoint(&self) -> Vec<state::Locks> {
        let inner = self.inner.lock();
        let held = inner.owners.iter().filter(|(_, o)| !o.held.is_empty());
        held.map(|(key, owner)| owner.wire(key)).collect()
    }

    /// To be held while something is changed and written down.
    fn changing(&self) -> Option<RwLockReadGuard<'_, ()>> {
        self.journal.as_ref().map(|j| j.changing())
    }

    /// Writes down what an owner has.
    fn note(&self, inner: &Inner, key: &Key) {
        if let (Some(journal), Some(owner)) = (&self.journal, inner.owners.get(key)) {
            journal.locks(&owner.wire(key));
        }
    }

    /// Asks for a lock, or whether it could be had. Waits as long as its patience says, and for the masters; dropped, it takes the want back.
    ///
    /// # Errors
    /// [`Kind::Cancelled`] when the mount ends.
    pub(crate) async fn lock(&self, by: &Asker, lock: Lock, patience: Patience) -> Result<Verdict> {
        let key = (by.file.clone(), by.owner);
        let (tx, rx) = oneshot::channel();
        let id = {
            let mut inner = self.inner.lock();
            let id = inner.next();
            let owner = inner.owners.entry(key.clone()).or_default();
            owner.pid = by.pid;
            if patience != Patience::Test {
                owner.handles.insert(by.handle);
            }
            owner.wants.insert(id, Pending { want: LockWant { id, lock, patience }, answer: tx });
            inner.wants.insert(id, key.clone());
            self.say(&mut inner, &key);
            id
        };
        let mut wait = Wait { book: self, key, id, lock, answer: rx, over: false };
        let verdict = (&mut wait.answer).await;
        wait.over = true;
        verdict.map_err(|_| Error::new(Kind::Cancelled, "the mount ends"))
    }

    /// Gives bytes of a file up.
    pub(crate) async fn unlock(&self, file: &LockFile, owner: LockOwner, start: u64, end: u64) {
        let key = (file.clone(), owner);
        let heard = {
            let _changing = self.changing();
            let mut inner = self.inner.lock();
            let Some(entry) = inner.owners.get_mut(&key) else { return };
            entry.held.clear(start, end);
            self.note(&inner, &key);
            self.say(&mut inner, &key);
            inner.listen(&key)
        };
        // Who does not hear it now hears it later: it is said until it is heard.
        let _ = timeout(UNLOCK_PATIENCE, heard).await;
    }

    /// Gives up what was locked through a handle that is closed for good.
    pub(crate) async fn close(&self, file: &LockFile, handle: u64) {
        let owners: Vec<LockOwner> = {
            let _changing = self.changing();
            let mut inner = self.inner.lock();
            let of_file = inner.owners.iter_mut().filter(|((f, _), _)| f == file);
            let by: Vec<Key> = of_file.filter_map(|(key, o)| o.handles.remove(&handle).then(|| key.clone())).collect();
            by.iter().for_each(|key| self.note(&inner, key));
            let by_none = |key: &&Key| inner.owners.get(*key).is_some_and(|o| o.handles.is_empty());
            by.iter().filter(by_none).map(|(_, owner)| *owner).collect()
        };
        for owner in owners {
            self.unlock(file, owner, 0, u64::MAX).await;
        }
    }

    /// Does anybody have or want anything?
    pub(crate) fn is_empty(&self) -> bool {
        self.inner.lock().owners.is_empty()
    }

    /// Says something in a life; with the claims that a new leader is told go all states, and no other state comes in between.
    pub(crate) fn say_with_locks(&self, life: Incarnation, mut ask: Ask) {
        let inner = self.inner.lock();
        if let Ask::Reclaim { part: 0, locks, .. } = &mut ask {
            *locks = inner.owners.iter().map(|(key, owner)| owner.state(key)).collect();
        }
        self.link.say(life, ask);
    }

    /// A life of the session began: what is wanted is wanted in it.
    pub(crate) fn opened(&self, life: Incarnation) {
        let mut inner = self.inner.lock();
        inner.life = Some(life);
        let keys: Vec<Key> = inner.owners.keys().cloned().collect();
        keys.iter().for_each(|key| self.say(&mut inner, key));
    }

    /// The session is over, and what was held with it.
    pub(crate) fn lost(&self) {
        let _changing = self.changing();
        let mut inner = self.inner.lock();
        inner.life = None;
        let mut lost = 0;
        let keys: Vec<Key> = inner.owners.keys().cloned().collect();
        for key in &keys {
            if let Some(owner) = inner.owners.get_mut(key) {
                lost += std::mem::take(&mut owner.held).locks().len();
            }
            self.note(&inner, key);
        }
        if lost > 0 {
            tracing::error!(
                locks = lost,
                "advisory locks were lost with the session: their owners are not told, others may have them now"
            );
        }
    }

    /// A master speaks to a life.
    pub(crate) fn hear(&self, life: Incarnation, tell: LockTell) {
        let _changing = self.changing();
        let mut inner = self.inner.lock();
        if inner.life != Some(life) {
            return;
        }
        match tell {
            LockTell::Heard { file, owner, version } => {
                let key = (file, owner);
                let Some(owner) = inner.owners.get_mut(&key) else { return };
                owner.heard = owner.heard.max(version);
                let heard = owner.heard;
                owner.listeners.retain(|(at, tx)| *at > heard && !tx.is_closed());
                inner.tidy(&key);
            }
            LockTell::Settled { file, owner, id, verdict } => match inner.wants.remove(&id) {
                Some(key) => self.settled(&mut inner, &key, id, verdict),
                // It was settled before, by an answer to a state that was said twice. The masters are told what there is.
                None if verdict == Verdict::Granted => {
                    let key = (file, owner);
                    inner.owners.entry(key.clone()).or_default();
                    self.say(&mut inner, &key);
                }
                None => {}
            },
        }
    }

    fn settled(&self, inner: &mut Inner, key: &Key, id: u64, verdict: Verdict) {
        let Some(owner) = inner.owners.get_mut(key) else { return };
        let Some(Pending { want, answer }) = owner.wants.remove(&id) else { return };
        let before = owner.held.clone();
        if verdict == Verdict::Granted && want.patience != Patience::Test {
            owner.held.set(want.lock);
        }
        if answer.send(verdict).is_err() {
            // Given up just now.
            owner.held = before;
            self.say(inner, key);
        }
        self.note(inner, key);
        inner.tidy(key);
    }

    /// Says again what was not heard or not settled.
    pub(crate) fn tick(&self) {
        let mut inner = self.inner.lock();
        let late =
            |o: &Owner| (o.heard < o.version || !o.wants.is_empty()) && o.said.is_none_or(|at| at.elapsed() >= AGAIN);
        let keys: Vec<Key> = inner.owners.iter().filter(|(_, o)| late(o)).map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| self.repeat(&mut inner, key));
    }

    /// Says a state that is new.
    fn say(&self, inner: &mut Inner, key: &Key) {
        let version = inner.next();
        if let Some(owner) = inner.owners.get_mut(key) {
            owner.version = version;
        }
        self.repeat(inner, key);
    }

    fn repeat(&self, inner: &mut Inner, key: &Key) {
        let Some(life) = inner.life else { return };
        if let Some(owner) = inner.owners.get_mut(key) {
            owner.said = Some(Instant::now());
            self.link.say_locks(life, owner.state(key));
        }
    }
}

impl Inner {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Resolves when the masters have heard what was said last.
    fn listen(&mut self, key: &Key) -> oneshot::Receiver<()> {
        let (tx, rx) = oneshot::channel();
        if let Some(owner) = self.owners.get_mut(key) {
            owner.listeners.push((owner.version, tx));
        }
        rx
    }

    fn tidy(&mut self, key: &Key) {
        if self.owners.get(key).is_some_and(Owner::is_over) {
            self.owners.remove(key);
        }
    }
}

/// An operation that waits; dropped before it has its answer, it takes its want back.
struct Wait<'a> {
    book: &'a LockBook,
    key: Key,
    id: u64,
    lock: Lock,
    answer: oneshot::Receiver<Verdict>,
    over: bool,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let _changing = self.book.changing();
        let mut inner = self.book.inner.lock();
        let waited = inner.wants.remove(&self.id).is_some();
        // Answered at this moment: what it was given is given back.
        let granted = !waited && self.answer.try_recv() == Ok(Verdict::Granted);
        let Some(owner) = inner.owners.get_mut(&self.key) else { return };
        owner.wants.remove(&self.id);
        if granted {
            owner.held.clear(self.lock.start, self.lock.end);
            self.book.note(&inner, &self.key);
        }
        if waited || granted {
            self.book.say(&mut inner, &self.key);
        }
    }
}
