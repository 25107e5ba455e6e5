//! The desk: the one owner of the [`Engine`]. Streams of sessions, the applied state and the clock speak to it under a short lock; what is to be
//! said goes to one bounded queue for each stream, and what needs the other masters is left for the tasks in `clerk`.
//!
//! A desk is opened for one *office*, a number that was agreed on ([`crate::state::Command::TakeOffice`]) and that is the engine's term. Raft's
//! term would not do: a leader that is killed and comes back quickly goes on leading in its term, without its memory. A proof that this desk
//! may answer is a linearizable read that finds no later office; the end of a silent session is agreed on only for the office that noticed it.
//!
//! The table of advisory locks is the office's too: it is opened and its sessions end with the engine's. A session's next life may go on with them, so
//! they are kept for it for the lease time.
//!
//! Sessions begin and end by the log: their lives come from apply, in its order. A desk that loses track of them resigns.
//!
//! The desk's clock does not count time in which this process stood still, so that nobody is fenced for silence that it could not hear.

use super::{Bounds, Effect, Engine, Event};
use crate::lock::LockTable;
use crate::raft::Node;
use crate::state::Life;
use efc_common::hint::Hint;
use efc_common::id::{Incarnation, SessionId};
use efc_common::lease::{Ask, Moment, Tell, Times};
use efc_common::lock::{LockState, LockTell};
use efc_common::metrics::{counter, gauge};
use efc_common::{Error, Kind, Result};
use efc_proto::control::LeaseTell;
use efc_proto::lease::{Down, Up, Welcome, down_to_wire};
use efc_proto::status::to_status;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use tokio::sync::{Notify, broadcast, mpsc};
use tokio::time::Instant;
use tonic::Status;

/// Words that wait for one session to read them. One that has more is cut off.
const OUT_QUEUE: usize = 4096;
/// The longest the desk goes without looking at the clock.
const PULSE: Duration = Duration::from_millis(250);

/// One word down a stream, or its end.
pub(crate) type Answer = std::result::Result<LeaseTell, Status>;

/// Counts time in which the process ran.
struct Clock {
    now: Moment,
    last: Instant,
    /// More than this at once was a standstill.
    step: Duration,
}

impl Clock {
    fn read(&mut self) -> Moment {
        let now = Instant::now();
        self.now += (now - std::mem::replace(&mut self.last, now)).min(self.step);
        self.now
    }
}

struct Stream {
    id: u64,
    incarnation: Incarnation,
    out: mpsc::Sender<Answer>,
}

/// A stream's place at the desk.
pub(crate) struct Line {
    pub(crate) session: SessionId,
    pub(crate) incarnation: Incarnation,
    id: u64,
    /// Weak: the desk ends the stream.
    pub(crate) out: mpsc::WeakSender<Answer>,
}

/// A renewal that waits for a proof.
struct Renewal {
    stream: u64,
    number: u64,
}

/// What a proof is to be found for.
pub(super) struct Batch {
    pub(super) office: u64,
    renewals: HashMap<SessionId, Renewal>,
    engine: bool,
}

struct Office {
    number: u64,
    times: Times,
    engine: Engine,
    locks: LockTable,
    clock: Clock,
    lives: broadcast::Receiver<Life>,
    streams: HashMap<SessionId, Stream>,
    renewals: HashMap<SessionId, Renewal>,
    /// The engine asked for a proof.
    prove: bool,
    fences: BTreeMap<SessionId, Incarnation>,
    /// When the clerk looks next.
    armed: Moment,
}

#[derive(Default)]
struct Inner {
    office: Option<Office>,
    streams: u64,
    closed: bool,
}

/// See the module's page.
pub(crate) struct Desk {
    times: Times,
    inner: Mutex<Inner>,
    /// Something is due earlier than the clerk thinks.
    pub(super) sooner: Notify,
    /// There is something to prove.
    pub(super) proofs: Notify,
    /// There is somebody to fence.
    pub(super) fences: Notify,
}

fn closed() -> Error {
    Error::new(Kind::Unavailable, "this master does not grant leases now; try again")
}

impl Desk {
    /// A desk without office, for leases of this time.
    pub(crate) fn new(lease: Duration) -> Self {
        Desk {
            times: times(lease),
            inner: Mutex::default(),
            sooner: Notify::new(),
            proofs: Notify::new(),
            fences: Notify::new(),
        }
    }

    /// Is it open for this office?
    pub(crate) fn in_office(&self, number: u64) -> bool {
        self.inner.lock().office.as_ref().is_some_and(|o| o.number == number)
    }

    /// Opens it for an office that was just taken: nothing is held, and what the sessions of the applied state believe is yet to be claimed.
    pub(crate) fn open(&self, node: &Node, number: u64) {
        let mut inner = self.inner.lock();
        if inner.closed {
            return;
        }
        let ((sessions, longest), lives) = node.read_and_follow(|s| {
            let leasing = || s.sessions().values().filter(|s| s.lease_ms > 0);
            let sessions: Vec<_> = leasing().map(|s| (s.id, s.incarnation)).collect();
            (sessions, Duration::from_millis(leasing().map(|s| s.lease_ms).max().unwrap_or(0)))
        });
        // A session that was promised more time by an earlier leader believes for longer.
        let times = times(self.times.lease.max(longest));
        let clock = Clock { now: Moment::ZERO, last: Instant::now(), step: times.lease / 4 };
        tracing::info!(office = number, sessions = sessions.len(), "grants leases");
        let mut office = Office {
            number,
            times,
            engine: Engine::new(times, Bounds::default()),
            locks: LockTable::default(),
            clock,
            lives,
            streams: HashMap::new(),
            renewals: HashMap::new(),
            prove: false,
            fences: BTreeMap::new(),
            armed: Moment::MAX,
        };
        self.feed(&mut office, Event::Office { term: number, sessions }, 0);
        if let Some(old) = inner.office.replace(office) {
            end_streams(&old, &closed());
        }
    }

    /// Ends its office, if it has one: it grants nothing any more.
    pub(crate) fn leave(&self, why: &Error) {
        if let Some(old) = self.inner.lock().office.take() {
            end_streams(&old, why);
        }
    }

    /// Leaves for good.
    pub(super) fn close(&self) {
        self.inner.lock().closed = true;
        self.leave(&Error::new(Kind::Unavailable, "this master is stopping"));
    }

    /// What a session that is opened now is told.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] without office.
    pub(crate) fn welcome(&self) -> Result<Welcome> {
        self.inner.lock().office.as_ref().map(Office::welcome).ok_or_else(closed)
    }

    /// Takes up what has happened to sessions and what is due. Gives the time until it should do so again.
    pub(crate) fn look(&self) -> Duration {
        let mut inner = self.inner.lock();
        if self.catch_up(&mut inner).is_none() {
            return PULSE;
        }
        let Some(office) = inner.office.as_mut() else { return PULSE };
        self.feed(office, Event::Tick, 0);
        let now = office.clock.now;
        office.change_locks(|locks, out| locks.end_unclaimed(now, out));
        let counts = office.engine.counts();
        gauge!("efc_master_leases").set(counts.leases as f64);
        gauge!("efc_master_lease_waits").set(counts.waiting as f64);
        let (locks, waiting) = office.locks.counts();
        gauge!("efc_master_locks").set(locks as f64);
        gauge!("efc_master_lock_waits").set(waiting as f64);
        let pulse = PULSE.min(office.times.lease / 8);
        let due = office.engine.next_due().map_or(pulse, |at| at.saturating_sub(office.clock.now).min(pulse));
        office.armed = office.clock.now + due;
        due
    }

    /// Gives the stream of a session its place, instead of an older one of that session.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] without office.
    pub(crate) fn connect(
        &self,
        session: SessionId,
        incarnation: Incarnation,
    ) -> Result<(Line, mpsc::Receiver<Answer>)> {
        let mut inner = self.inner.lock();
        self.catch_up(&mut inner).ok_or_else(closed)?;
        inner.streams += 1;
        let id = inner.streams;
        let office = inner.office.as_mut().ok_or_else(closed)?;
        let (out, answers) = mpsc::channel(OUT_QUEUE);
        let line = Line { session, incarnation, id, out: out.downgrade() };
        if let Some(old) = office.streams.insert(session, Stream { id, incarnation, out }) {
            let _ = old.out.try_send(Err(to_status(&Error::new(Kind::Cancelled, "another stream took over"))));
        }
        let welcome = Down::Welcome(office.welcome());
        office.say(session, &welcome);
        Ok((line, answers))
    }

    /// Takes the place of a stream that has ended back.
    pub(crate) fn disconnect(&self, line: &Line) {
        if let Some(office) = self.inner.lock().office.as_mut()
            && office.streams.get(&line.session).is_some_and(|s| s.id == line.id)
        {
            office.streams.remove(&line.session);
        }
    }

    /// A session says something.
    ///
    /// # Errors
    /// [`Kind::Cancelled`] if it has no place any more, [`Kind::Invalid`] for a word out of place.
    pub(crate) fn hear(&self, line: &Line, up: Up) -> Result<()> {
        let mut inner = self.inner.lock();
        self.catch_up(&mut inner).ok_or_else(closed)?;
        let office = inner.office.as_mut().ok_or_else(closed)?;
        if office.streams.get(&line.session).is_none_or(|s| s.id != line.id) {
            return Err(Error::new(Kind::Cancelled, "this stream has no place at the desk any more"));
        }
        let (session, incarnation) = (line.session, line.incarnation);
        match up {
            Up::Hello { .. } => return Err(Error::new(Kind::Invalid, "a stream says once who it is")),
            Up::Renew { renewal } => self.feed(office, Event::Renewed { session, incarnation }, renewal),
            Up::Ask(mut ask) => {
                if let Ask::Reclaim { term, locks, .. } = &mut ask
                    && *term == office.number
                {
                    let locks = std::mem::take(locks);
                    office.hear_locks(session, incarnation, locks);
                }
                self.feed(office, Event::Said { session, incarnation, ask }, 0);
            }
            Up::Locks(state) => office.hear_locks(session, incarnation, vec![state]),
        }
        Ok(())
    }

    /// Tells all sessions what was changed in buckets, but for those that have much to read already. How many.
    pub(crate) fn hint(&self, hints: &[Hint]) -> u64 {
        let mut inner = self.inner.lock();
        let Some(office) = inner.office.as_mut() else { return 0 };
        let reads = |s: &Stream| s.out.capacity() > OUT_QUEUE / 2;
        let told: Vec<SessionId> = office.streams.iter().filter(|(_, s)| reads(s)).map(|(id, _)| *id).collect();
        for session in &told {
            hints.iter().for_each(|hint| office.say(*session, &Down::Hint(hint.clone())));
        }
        told.len() as u64
    }

    /// What waits for a proof, if anything does.
    pub(super) fn to_prove(&self) -> Option<Batch> {
        let mut inner = self.inner.lock();
        let office = inner.office.as_mut()?;
        let (renewals, engine) = (std::mem::take(&mut office.renewals), std::mem::take(&mut office.prove));
        (engine || !renewals.is_empty()).then_some(Batch { office: office.number, renewals, engine })
    }

    /// A proof begun after [`Desk::to_prove`] found that no later office was taken.
    pub(super) fn proved(&self, batch: Batch) {
        let mut inner = self.inner.lock();
        let Some(office) = inner.office.as_mut().filter(|o| o.number == batch.office) else { return };
        for (session, renewal) in batch.renewals {
            if office.streams.get(&session).is_some_and(|s| s.id == renewal.stream) {
                office.say(session, &Down::Renewed { renewal: renewal.number });
            }
        }
        if batch.engine {
            self.feed(office, Event::Proved { term: batch.office }, 0);
        }
    }

    /// Whose end is to be agreed on, for this office.
    pub(super) fn to_fence(&self) -> Option<(u64, BTreeMap<SessionId, Incarnation>)> {
        let mut inner = self.inner.lock();
        let office = inner.office.as_mut()?;
        Some((office.number, std::mem::take(&mut office.fences)))
    }

    /// Tells the engine of the lives that began and ended since. None: there is no office (any more).
    fn catch_up(&self, inner: &mut Inner) -> Option<()> {
        let office = inner.office.as_mut()?;
        loop {
            match office.lives.try_recv() {
                Ok(Life::Begun(session, incarnation)) => {
                    let until = office.clock.read() + office.times.lease;
                    office.change_locks(|locks, out| locks.begin_life(session, until, out));
                    self.feed(office, Event::SessionUp { session, incarnation }, 0);
                }
                Ok(Life::Ended(session, incarnation)) => {
                    self.feed(office, Event::SessionEnded { session, incarnation }, 0);
                    office.change_locks(|locks, out| locks.end(session, out));
                }
                Err(broadcast::error::TryRecvError::Empty) => return Some(()),
                Err(_) => {
                    tracing::warn!(office = office.number, "lost track of the sessions; takes office again");
                    if let Some(old) = inner.office.take() {
                        end_streams(&old, &closed());
                    }
                    return None;
                }
            }
        }
    }

    /// One event to the engine, and its effects to where they go. `renewal`: the number of the renewal this is, if it is one.
    fn feed(&self, office: &mut Office, event: Event, renewal: u64) {
        let mut effects = Vec::new();
        let now = office.clock.read();
        office.engine.on(now, event, &mut effects);
        for effect in effects {
            self.carry_out(office, effect, renewal);
        }
        if office.engine.serves() {
            office.change_locks(LockTable::open);
        }
        if office.engine.next_due().is_some_and(|at| at < office.armed) {
            // Once is enough until the clerk has looked.
            office.armed = Moment::ZERO;
            self.sooner.notify_one();
        }
    }

    fn carry_out(&self, office: &mut Office, effect: Effect, renewal: u64) {
        match effect {
            Effect::Tell { session, incarnation, tell } => {
                match tell {
                    Tell::Grant { .. } => counter!("efc_master_lease_grants_total").increment(1),
                    Tell::Recall { .. } => counter!("efc_master_lease_recalls_total").increment(1),
                    Tell::Refuse { .. } => {}
                }
                // Without a stream, or with one of another life, it is lost; what matters is said again.
                if office.streams.get(&session).is_some_and(|s| s.incarnation == incarnation) {
                    office.say(session, &Down::Tell(tell));
                }
            }
            Effect::Renew { session, .. } => {
                if let Some(stream) = office.streams.get(&session).map(|s| s.id) {
                    office.renewals.insert(session, Renewal { stream, number: renewal });
                    self.proofs.notify_one();
                }
            }
            Effect::RefuseRenewal { session, reason, .. } => {
                office.say(session, &Down::NotRenewed { renewal, reason });
            }
            Effect::Fence { session, incarnation } => {
                office.fences.insert(session, incarnation);
                self.fences.notify_one();
            }
            Effect::Prove { .. } => {
                office.prove = true;
                self.proofs.notify_one();
            }
        }
    }
}

impl Office {
    fn welcome(&self) -> Welcome {
        Welcome { term: self.number, lease: self.times.lease, margin: self.times.margin }
    }

    fn hear_locks(&mut self, session: SessionId, incarnation: Incarnation, states: Vec<LockState>) {
        // A life that is over holds nothing.
        if self.engine.is_up(session, incarnation) {
            self.change_locks(|locks, out| states.into_iter().for_each(|state| locks.say(session, state, out)));
        }
    }

    fn change_locks(&mut self, change: impl FnOnce(&mut LockTable, &mut Vec<(SessionId, LockTell)>)) {
        let mut out = Vec::new();
        change(&mut self.locks, &mut out);
        for (session, tell) in out {
            self.say(session, &Down::Lock(tell));
        }
    }

    /// To the stream of a session; one that does not read is cut off.
    fn say(&mut self, session: SessionId, down: &Down) {
        let Some(stream) = self.streams.get(&session) else { return };
        if stream.out.try_send(Ok(down_to_wire(down))).is_err() {
            tracing::debug!(%session, "does not read what it is told about leases, or has gone; its stream is ended");
            self.streams.remove(&session);
        }
    }
}

fn end_streams(office: &Office, why: &Error) {
    let status = to_status(why);
    for stream in office.streams.values() {
        // A full queue ends without a word.
        let _ = stream.out.try_send(Err(status.clone()));
    }
    gauge!("efc_master_leases").set(0.0);
    gauge!("efc_master_lease_waits").set(0.0);
    gauge!("efc_master_locks").set(0.0);
    gauge!("efc_master_lock_waits").set(0.0);
}

/// The times that follow from the lease time. A client's belief ends a fifth of it earlier.
fn times(lease: Duration) -> Times {
    Welcome { term: 0, lease, margin: lease / 5 }.times()
}
