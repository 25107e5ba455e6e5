//! [`Leases`]: the one owner of the [`Keeper`]. A short mutex around it, taken by operations, by the task that hears the masters and the clock,
//! and by the tasks that flush and drop. All effects of a call are carried out under that mutex, in order; none of them waits.
//!
//! Flushes and drops run as tasks of their own, a bounded number at a time; there is at most one for each lease that is on its way back.

use super::event::{Effect, Event, How, OpId, RecallId, What, Why};
use super::keeper::{Config, Counts, Guard, Keeper};
use crate::journal::Journal;
use crate::lock::{LockBook, LocksLeft};
use async_trait::async_trait;
use efc_client::lease::{LeaseLink, News, Who};
use efc_client::master::MasterClient;
use efc_common::hint::Hint;
use efc_common::id::{Incarnation, SessionId};
use efc_common::lease::{Ask, GrantNumber, Moment, RequestId, Scope, Want};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};

const TICK: Duration = Duration::from_millis(100);
/// Hints that wait to be taken; more are lost.
const HINTS: usize = 1024;
/// Hints are taken so much later, together.
const HINTS_PAUSE: Duration = Duration::from_millis(100);
/// Flushes and drops at a time.
const WORKERS: usize = 64;

/// Who holds what is believed and changed: caches, the kernel's too, and changes that are not at the origin yet.
#[async_trait]
pub trait Holder: Send + Sync + 'static {
    /// Brings all changes in this scope to the origin, or gives them up: no change of it may reach the origin after this has returned.
    async fn flush(&self, scope: &Scope);
    /// Drops names, attributes and pages of this scope.
    async fn drop_cached(&self, scope: &Scope);
    /// Others changed this, says the store: what is remembered of it is looked at again.
    async fn hinted(&self, hints: Vec<Hint>) {
        drop(hints);
    }
    /// Drops everything: the session is over. Called again if operations of the old life were still running the first time.
    async fn drop_all(&self);
}

/// How an operation may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Under {
    /// Under leases, until the guard is dropped. Changes are sent to the origin only with a deadline before this.
    Believed {
        /// When belief ends, if no renewal prolongs it; [`Leases::believed_until`] says what it is now.
        until: Instant,
    },
    /// Past everything that is remembered, to the origin; nothing of it may be remembered.
    Uncached,
}

struct Inner {
    keeper: Keeper,
    /// They hear how they may run.
    waiters: HashMap<OpId, oneshot::Sender<Result<Admitted>>>,
    ops: u64,
    /// The life that the link speaks in.
    life: Option<Incarnation>,
    closed: bool,
}

/// What goes on when the process of a mount is replaced.
pub struct Succession {
    /// The last life of the predecessor's session, if there was a predecessor.
    pub last: Option<(SessionId, Incarnation)>,
    /// Keeps the life that a successor is to go on with.
    pub keep: Box<dyn Fn(SessionId, Incarnation) + Send + Sync>,
    /// Where advisory locks are written down.
    pub journal: Arc<Journal>,
    /// Those that the predecessor had.
    pub locks: Vec<LocksLeft>,
}

struct Shared {
    /// Moments count from here.
    base: Instant,
    inner: Mutex<Inner>,
    link: Arc<LeaseLink>,
    locks: LockBook,
    last: Option<(SessionId, Incarnation)>,
    keep: Option<Box<dyn Fn(SessionId, Incarnation) + Send + Sync>>,
    holder: Arc<dyn Holder>,
    hints: mpsc::Sender<Hint>,
    tasks: TaskGroup,
    /// Guards are given back on threads of the kernel session too.
    runtime: tokio::runtime::Handle,
    workers: Semaphore,
    /// A guard was given back while the mount ends.
    idle: Notify,
}

/// The leases of a mount; clones share them.
#[derive(Clone)]
pub struct Leases {
    shared: Arc<Shared>,
}

enum Permit {
    Quick(Option<Guard>),
    Op(OpId),
}

/// What an operation hears that may run.
struct Admitted {
    how: How,
    life: u64,
    newest: GrantNumber,
}

/// Permission of an operation to run. Recalls wait until it is dropped.
#[must_use = "the operation runs under it"]
pub struct LeaseGuard {
    shared: Arc<Shared>,
    permit: Permit,
    how: How,
    /// In which it was given.
    life: u64,
    newest: GrantNumber,
}

impl Leases {
    /// Will keep a session with the masters, in tasks of `tasks` on the runtime it is called in. Operations wait until there is one.
    pub fn start(
        master: MasterClient,
        who: Who,
        config: Config,
        holder: Arc<dyn Holder>,
        tasks: &TaskGroup,
        succession: Option<Succession>,
    ) -> Leases {
        let (last, keep, journal, locks) = match succession {
            Some(s) => (s.last, Some(s.keep), Some(s.journal), s.locks),
            None => (None, None, None, Vec::new()),
        };
        let (link, news) = LeaseLink::start(master, who, last, tasks);
        let link = Arc::new(link);
        let keeper = Keeper::new(config);
        let inner = Inner { keeper, waiters: HashMap::new(), ops: 0, life: None, closed: false };
        let (hints, hinted) = mpsc::channel(HINTS);
        let shared = Arc::new(Shared {
            base: Instant::now(),
            inner: Mutex::new(inner),
            locks: LockBook::new(link.clone(), journal, locks),
            link,
            last,
            keep,
            holder,
            hints,
            tasks: tasks.clone(),
            runtime: tokio::runtime::Handle::current(),
            workers: Semaphore::new(WORKERS),
            idle: Notify::new(),
        });
        tasks.spawn(listen(shared.clone(), news));
        tasks.spawn(take_hints(shared.holder.clone(), hinted));
        Leases { shared }
    }

    /// Opens the session, now that the kernel can be told what to drop. After a predecessor everything is dropped first: what the kernel was told in its life may be
    /// changed by others once that is over.
    pub fn begin(&self) {
        match self.shared.last {
            None => self.shared.link.open(),
            Some((_, incarnation)) => {
                let mut inner = self.shared.inner.lock();
                self.shared.feed(&mut inner, Event::Inherited { incarnation });
            }
        }
    }

    /// Permission to run with all these needs. May wait for other sessions to give something back, or for a session with the masters: callers
    /// that cannot wait for ever put a time-out around it; dropping the future gives everything back.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] when too many wait; [`Kind::Cancelled`] when the mount ends.
    pub async fn guard(&self, needs: Vec<Want>) -> Result<LeaseGuard> {
        if let [need] = &needs[..]
            && let Some(guard) = self.try_guard(need)
        {
            return Ok(guard);
        }
        let mut wait = {
            let mut inner = self.shared.inner.lock();
            if inner.closed {
                return Err(closed());
            }
            inner.ops += 1;
            let op = OpId(inner.ops);
            let (tx, rx) = oneshot::channel();
            inner.waiters.insert(op, tx);
            let wait = Wait { shared: self.shared.clone(), op, answer: rx, over: false };
            self.shared.feed(&mut inner, Event::Want { op, needs });
            wait
        };
        let answer = (&mut wait.answer).await;
        wait.over = true;
        let Admitted { how, life, newest } = answer.map_err(|_| closed())??;
        Ok(LeaseGuard { shared: self.shared.clone(), permit: Permit::Op(wait.op), how, life, newest })
    }

    /// Permission for one need, if it is held already: no waiting, no message.
    pub fn try_guard(&self, need: &Want) -> Option<LeaseGuard> {
        self.try_guard_since(need, None)
    }

    /// Permission for one need, if it is held without a gap since `since` was the newest grant: what was known then is still true.
    pub fn try_guard_since(&self, need: &Want, since: Option<GrantNumber>) -> Option<LeaseGuard> {
        let mut inner = self.shared.inner.lock();
        if inner.closed {
            return None;
        }
        let guard = inner.keeper.try_admit(self.shared.now(), need)?;
        let (how, known) =
            (How::Believed { until: inner.keeper.believed_until() }, since.is_none_or(|n| guard.since() <= n));
        let (life, newest) = (inner.keeper.lives(), inner.keeper.newest());
        drop(inner);
        let guard = LeaseGuard { shared: self.shared.clone(), permit: Permit::Quick(Some(guard)), how, life, newest };
        known.then_some(guard)
    }

    /// Until when what is held may be believed; in the past: not at all.
    pub fn believed_until(&self) -> Instant {
        self.shared.base + self.shared.inner.lock().keeper.believed_until()
    }

    /// Is just this scope leased (a file: apart from its directory)?
    pub fn has(&self, scope: &Scope) -> bool {
        self.shared.inner.lock().keeper.has(scope)
    }

    /// The advisory locks.
    pub(crate) fn locks(&self) -> &LockBook {
        &self.shared.locks
    }

    /// How much there is.
    pub fn counts(&self) -> Counts {
        self.shared.inner.lock().keeper.counts()
    }

    /// The mount ends. Its changes are at the origin already. Nobody is admitted any more; when those that run have ended, everything is dropped
    /// and the masters are told, so that the leases pass on at once. If some still run after `patience`, the masters are left to notice.
    pub async fn close(&self, patience: Duration) {
        {
            let mut inner = self.shared.inner.lock();
            inner.closed = true;
            self.shared.feed(&mut inner, Event::Close);
        }
        let ended = async {
            while self.counts().running > 0 {
                self.shared.idle.notified().await;
            }
        };
        if tokio::time::timeout(patience, ended).await.is_ok() {
            self.shared.holder.drop_all().await;
            self.shared.link.close().await;
        }
    }
}

fn closed() -> Error {
    Error::new(Kind::Cancelled, "the mount ends")
}

/// An operation that waits; dropped before its answer came, it gives up.
struct Wait {
    shared: Arc<Shared>,
    op: OpId,
    answer: oneshot::Receiver<Result<Admitted>>,
    over: bool,
}

impl Drop for Wait {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let mut inner = self.shared.inner.lock();
        let event = match inner.waiters.remove(&self.op) {
            Some(_) => Event::GiveUp { op: self.op },
            // It was answered just now; to give back what needs no giving back does no harm.
            None => Event::Done { op: self.op },
        };
        self.shared.feed(&mut inner, event);
    }
}

impl Shared {
    fn now(&self) -> Moment {
        self.base.elapsed()
    }

    fn moment(&self, at: Instant) -> Moment {
        at.saturating_duration_since(self.base)
    }

    fn feed(self: &Arc<Self>, inner: &mut Inner, event: Event) {
        let mut effects = Vec::new();
        inner.keeper.on(self.now(), event, &mut effects);
        self.carry_out(inner, effects);
    }

    fn carry_out(self: &Arc<Self>, inner: &mut Inner, effects: Vec<Effect>) {
        let _entered = self.runtime.enter();
        for effect in effects {
            match effect {
                Effect::Send(ask) => {
                    if let Some(life) = inner.life {
                        // What is lost is said again.
                        match ask {
                            Ask::Reclaim { .. } => self.locks.say_with_locks(life, ask),
                            _ => drop(self.link.say(life, ask)),
                        }
                    }
                }
                // An answer that nobody takes is given back by the one who waited, see `Wait`.
                Effect::Admit { op, how } => {
                    let (life, newest) = (inner.keeper.lives(), inner.keeper.newest());
                    drop(inner.waiters.remove(&op).map(|w| w.send(Ok(Admitted { how, life, newest }))));
                }
                Effect::Fail { op, why } => {
                    let error = match why {
                        Why::TooMany => Error::new(Kind::Exhausted, "too many operations wait for leases"),
                        Why::Closed => closed(),
                    };
                    drop(inner.waiters.remove(&op).map(|w| w.send(Err(error))));
                }
                Effect::Flush { recall, scope } => self.tasks.spawn(self.clone().flush(recall, scope)),
                Effect::Drop { recall, what } => self.tasks.spawn(self.clone().drop_what(recall, what)),
                Effect::SessionLost { incarnation } => {
                    if inner.life.take().is_some() {
                        tracing::warn!(%incarnation, "the session with the masters was lost; what was remembered is dropped");
                        self.locks.lost();
                    }
                    if !inner.closed {
                        self.link.open();
                    }
                }
            }
        }
    }

    async fn flush(self: Arc<Self>, recall: RecallId, scope: Scope) {
        // Never closed.
        let _turn = self.workers.acquire().await;
        self.holder.flush(&scope).await;
        let mut inner = self.inner.lock();
        self.feed(&mut inner, Event::Flushed { recall, scope });
    }

    async fn drop_what(self: Arc<Self>, recall: RecallId, what: What) {
        match &what {
            What::Scope(scope) => {
                let _turn = self.workers.acquire().await;
                self.holder.drop_cached(scope).await;
            }
            // Does not wait behind others: belief has ended already.
            What::All => self.holder.drop_all().await,
        }
        let mut inner = self.inner.lock();
        self.feed(&mut inner, Event::Dropped { recall, what });
    }

    fn hear(self: &Arc<Self>, news: News) {
        let mut inner = self.inner.lock();
        let event = match news {
            News::Opened { session, incarnation, welcome, sent, resumed } => {
                inner.life = Some(incarnation);
                if let Some(keep) = &self.keep {
                    keep(session, incarnation);
                }
                if !resumed {
                    self.locks.lost();
                }
                self.locks.opened(incarnation);
                if resumed {
                    // A leader that is new waits until it has heard all that goes on.
                    let (request, term) = (RequestId(0), welcome.term);
                    let ask = Ask::Reclaim { request, term, claims: vec![], part: 0, parts: 1, locks: vec![] };
                    self.locks.say_with_locks(incarnation, ask);
                }
                inner.keeper.agree(welcome.times());
                Event::SessionUp { incarnation, term: welcome.term, sent: self.moment(sent) }
            }
            News::Renewed { incarnation, term, sent } => Event::Renewed { incarnation, term, sent: self.moment(sent) },
            News::Refused { incarnation } => Event::SessionRefused { incarnation },
            News::Told { incarnation, tell } => Event::Told { incarnation, tell },
            News::Lock { incarnation, tell } => return self.locks.hear(incarnation, tell),
            // One too many is lost: what it was about is found out later.
            News::Hint(hint) => return drop(self.hints.try_send(hint)),
        };
        self.feed(&mut inner, event);
    }
}

/// Takes hints together: each batch costs the kernel all names it knows.
async fn take_hints(holder: Arc<dyn Holder>, mut hinted: mpsc::Receiver<Hint>) {
    while let Some(first) = hinted.recv().await {
        tokio::time::sleep(HINTS_PAUSE).await;
        let mut all = vec![first];
        while let Ok(more) = hinted.try_recv() {
            all.push(more);
        }
        holder.hinted(all).await;
    }
}

/// Hears the masters and the clock until the link ends.
async fn listen(shared: Arc<Shared>, mut news: mpsc::Receiver<News>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // News first: an answer to a renewal that has come prolongs what the clock would end.
            biased;
            heard = news.recv() => match heard {
                Some(heard) => shared.hear(heard),
                None => return,
            },
            _ = ticks.tick() => {
                shared.locks.tick();
                let mut inner = shared.inner.lock();
                shared.feed(&mut inner, Event::Tick);
            }
        }
    }
}

impl LeaseGuard {
    /// How the operation may run.
    pub fn how(&self) -> Under {
        match self.how {
            How::Uncached => Under::Uncached,
            How::Believed { until } => Under::Believed { until: self.shared.base + until },
        }
    }

    /// Returns when what it permits may no longer be done: belief has ended and was not prolonged in time. Never for what runs uncached.
    pub async fn ended(&self) {
        if self.how == How::Uncached {
            return std::future::pending().await;
        }
        loop {
            let until = {
                let inner = self.shared.inner.lock();
                if inner.keeper.lives() == self.life { inner.keeper.believed_until() } else { Moment::ZERO }
            };
            if until <= self.shared.now() {
                return;
            }
            tokio::time::sleep_until(self.shared.base + until).await;
        }
    }

    /// The newest grant of the mount when it was given.
    pub fn newest(&self) -> GrantNumber {
        self.newest
    }

    /// May what was read under it be remembered? False when belief has ended meanwhile. To be asked before it is dropped, and remembered
    /// before that too.
    pub fn holds(&self) -> bool {
        if self.how == How::Uncached {
            return false;
        }
        let inner = self.shared.inner.lock();
        inner.keeper.lives() == self.life && self.shared.now() < inner.keeper.believed_until()
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        let mut inner = self.shared.inner.lock();
        match &mut self.permit {
            Permit::Quick(guard) => {
                let mut effects = Vec::new();
                if let Some(guard) = guard.take() {
                    inner.keeper.done(self.shared.now(), guard, &mut effects);
                }
                self.shared.carry_out(&mut inner, effects);
            }
            Permit::Op(op) => self.shared.feed(&mut inner, Event::Done { op: *op }),
        }
        if inner.closed {
            self.shared.idle.notify_one();
        }
    }
}
