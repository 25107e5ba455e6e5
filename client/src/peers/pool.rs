//! Connections to workers, and the memory of which worker is dead.
//!
//! One [`Remote`] per member of the ring. Its circuit opens when the worker cannot be reached or its connection breaks twice
//! running; while it is open nobody waits for that worker, and one background task probes it until it answers or leaves the ring.

use super::PeersOptions;
use crate::wire::{Connection, Endpoint, Identity};
use efc_common::error::Context;
use efc_common::id::{RingEpoch, WorkerId};
use efc_common::ring::{Member, Ring};
use efc_common::source::{SourceSpec, StaticKeys};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The slot under which every connection knows our one source.
pub(super) const SLOT: u32 = 1;
/// First pause of the probe of an open circuit; it doubles up to [`COOL_MAX`].
const COOL_MIN: Duration = Duration::from_millis(250);
const COOL_MAX: Duration = Duration::from_secs(10);

/// What is needed to connect.
struct Settings {
    source: RwLock<(SourceSpec, Option<StaticKeys>)>,
    me: Identity,
    options: PeersOptions,
    tasks: TaskGroup,
}

/// All workers of the ring that were ever asked.
pub(super) struct Pool {
    settings: Arc<Settings>,
    remotes: Mutex<(RingEpoch, HashMap<WorkerId, Arc<Remote>>)>,
}

impl Pool {
    pub(super) fn new(
        source: SourceSpec,
        keys: Option<StaticKeys>,
        me: Identity,
        options: PeersOptions,
        tasks: TaskGroup,
    ) -> Self {
        let settings = Arc::new(Settings { source: RwLock::new((source, keys)), me, options, tasks });
        Pool { settings, remotes: Mutex::default() }
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.settings.me
    }

    /// From now on workers are told of the source like this.
    pub(super) fn replace_source(&self, source: SourceSpec, keys: Option<StaticKeys>) {
        *self.settings.source.write() = (source, keys);
        // Who is asked next gets a new connection, and with it the new ones.
        self.remotes.lock().1.clear();
    }

    /// The worker `member` of `ring`. A member that moved to another address starts anew; those that left are forgotten.
    pub(super) fn remote(&self, ring: &Ring, member: &Member) -> Arc<Remote> {
        let mut remotes = self.remotes.lock();
        if remotes.0 != ring.epoch() {
            remotes.0 = ring.epoch();
            let members: HashMap<&WorkerId, &Member> = ring.members().iter().map(|m| (&m.id, m)).collect();
            remotes.1.retain(|id, r| members.get(id).is_some_and(|m| r.same_place(m)));
        }
        if let Some(r) = remotes.1.get(&member.id).filter(|r| r.same_place(member)) {
            return r.clone();
        }
        let r = Arc::new(Remote::new(self.settings.clone(), member.clone()));
        remotes.1.insert(member.id.clone(), r.clone());
        r
    }
}

type Connecting = Shared<BoxFuture<'static, std::result::Result<Arc<Connection>, Arc<Error>>>>;

enum Slot {
    Empty,
    Connecting(Connecting),
    Ready(Arc<Connection>),
}

/// One worker.
pub(super) struct Remote {
    settings: Arc<Settings>,
    member: Member,
    unix: Option<PathBuf>,
    slots: Vec<Mutex<Slot>>,
    turn: AtomicUsize,
    open: AtomicBool,
}

impl Remote {
    fn new(settings: Arc<Settings>, member: Member) -> Self {
        let here = !member.unix.is_empty() && !member.host.is_empty() && member.host == settings.options.host;
        let unix = here.then(|| PathBuf::from(&member.unix));
        let slots = (0..settings.options.connections_per_worker.max(1)).map(|_| Mutex::new(Slot::Empty)).collect();
        Remote { settings, member, unix, slots, turn: AtomicUsize::new(0), open: AtomicBool::new(false) }
    }

    fn same_place(&self, m: &Member) -> bool {
        (&self.member.addr, &self.member.unix, &self.member.host) == (&m.addr, &m.unix, &m.host)
    }

    /// Is the worker on this host?
    pub(super) fn local(&self) -> bool {
        !self.member.host.is_empty() && self.member.host == self.settings.options.host
    }

    /// May it be asked now?
    ///
    /// # Errors
    /// [`Kind::Unavailable`] while its circuit is open.
    pub(super) fn closed_circuit(&self) -> Result<()> {
        if self.open.load(Relaxed) {
            return Err(Error::new(Kind::Unavailable, "worker did not answer lately").with("worker", &self.member.id));
        }
        Ok(())
    }

    /// Opens the circuit and starts the probe, unless it is open already.
    pub(super) fn trip(self: &Arc<Self>, why: &Error) {
        if self.open.swap(true, Relaxed) {
            return;
        }
        tracing::warn!(worker = %self.member.id, addr = self.member.addr, error = %why,
            "cache worker does not answer; its keys go to the next owner until it does");
        for slot in &self.slots {
            *slot.lock() = Slot::Empty;
        }
        let weak = Arc::downgrade(self);
        self.settings.tasks.spawn(probe(weak));
    }

    /// A connection and whether it was made for this call; with `fresh` none that was used before. A worker that cannot be
    /// reached trips its circuit.
    pub(super) async fn connection(self: &Arc<Self>, fresh: bool) -> Result<(Arc<Connection>, bool)> {
        let slot = &self.slots[self.turn.fetch_add(1, Relaxed) % self.slots.len()];
        let connecting = {
            let mut s = slot.lock();
            match &*s {
                Slot::Ready(c) if !fresh && c.broken().is_none() => return Ok((c.clone(), false)),
                Slot::Connecting(f) => f.clone(),
                _ => {
                    let f = connect(self.settings.clone(), self.member.clone(), self.unix.clone()).boxed().shared();
                    *s = Slot::Connecting(f.clone());
                    f
                }
            }
        };
        let outcome = connecting.clone().await;
        let mut s = slot.lock();
        if matches!(&*s, Slot::Connecting(f) if f.ptr_eq(&connecting)) {
            *s = outcome.as_ref().map_or(Slot::Empty, |c| Slot::Ready(c.clone()));
        }
        drop(s);
        match outcome {
            Ok(c) => Ok((c, true)),
            Err(e) => {
                self.trip(&e);
                // Whatever the reason, this worker is of no use now: the next owner or the origin is asked.
                Err(Error::new(Kind::Unavailable, "worker cannot be used")
                    .with("worker", &self.member.id)
                    .caused_by(e.share()))
            }
        }
    }
}

async fn connect(
    settings: Arc<Settings>,
    member: Member,
    unix: Option<PathBuf>,
) -> std::result::Result<Arc<Connection>, Arc<Error>> {
    let limit = settings.options.connect;
    let tcp = Endpoint::Tcp(member.addr.clone());
    let attempt = async {
        let conn = match unix.filter(|p| p.exists()).map(Endpoint::Unix) {
            Some(path) => match Connection::open(&path, &settings.me, limit).await {
                Ok(c) => c,
                Err(e) => {
                    tracing::debug!(error = %e, "unix socket of the worker does not answer; trying TCP");
                    Connection::open(&tcp, &settings.me, limit).await?
                }
            },
            None => Connection::open(&tcp, &settings.me, limit).await?,
        };
        let (source, keys) = settings.source.read().clone();
        let id =
            conn.attach(SLOT, &source, keys.as_ref(), settings.options.cache, limit).await.context("attach source")?;
        if id != source.id() {
            return Err(Error::new(Kind::Corrupt, "worker knows the source by another identity").with("worker", id));
        }
        Ok(conn)
    };
    attempt.await.map_err(Arc::new)
}

/// Probes until the worker answers or nobody knows it any more.
async fn probe(remote: Weak<Remote>) {
    let mut pause = COOL_MIN;
    loop {
        tokio::time::sleep(pause).await;
        let Some(r) = remote.upgrade() else { return };
        match connect(r.settings.clone(), r.member.clone(), r.unix.clone()).await {
            Ok(c) => {
                *r.slots[0].lock() = Slot::Ready(c);
                r.open.store(false, Relaxed);
                tracing::info!(worker = %r.member.id, "cache worker answers again");
                return;
            }
            Err(e) => tracing::debug!(worker = %r.member.id, error = %e, "cache worker still does not answer"),
        }
        pause = (pause * 2).min(COOL_MAX);
    }
}
