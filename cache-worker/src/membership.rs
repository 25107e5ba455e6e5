//! The worker's place in the cluster: registers with the masters, sends heartbeats with its load, registers again when told that its
//! life is over, and takes its leave. Without masters the worker serves on: only the ring forgets it until they are back.

use crate::server::Server;
use efc_client::master::MasterClient;
use efc_common::id::Incarnation;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result, Retry};
use efc_proto::control::{RegisterWorkerRequest, WorkerInfo, WorkerLoad, WorkerState};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// Pause between attempts to register.
const REGISTER_PAUSE: Duration = Duration::from_secs(1);
/// A goodbye that does not arrive is replaced by silence.
const LEAVE_DEADLINE: Duration = Duration::from_secs(3);
/// Shortest heartbeat interval we let a master ask of us.
const HEARTBEAT_MIN: Duration = Duration::from_millis(50);

/// Our standing with the masters.
pub(crate) struct Membership {
    master: MasterClient,
    server: Arc<Server>,
    info: WorkerInfo,
    /// Of the current life; 0 before the first.
    life: Mutex<(Incarnation, Duration)>,
}

impl Membership {
    pub(crate) fn new(master: MasterClient, server: Arc<Server>, info: WorkerInfo) -> Arc<Self> {
        Arc::new(Membership { master, server, info, life: Mutex::default() })
    }

    /// Enters the ring.
    pub(crate) async fn register(&self) -> Result<()> {
        let request = RegisterWorkerRequest { worker: Some(self.info.clone()), cluster: self.server.cluster() };
        let reply = self.master.register_worker(request).await?;
        let ours = self.server.cluster();
        if !ours.is_empty() && ours != reply.cluster {
            return Err(Error::new(Kind::Invalid, "the masters belong to another cluster than this worker")
                .with("ours", ours)
                .with("theirs", reply.cluster));
        }
        let every = Duration::from_millis(reply.heartbeat_ms).max(HEARTBEAT_MIN);
        *self.life.lock() = (Incarnation(reply.incarnation), every);
        self.server.set_cluster(&reply.cluster, reply.ring.map_or(0, |r| r.epoch));
        tracing::info!(worker = self.info.id, incarnation = reply.incarnation, cluster = reply.cluster, "registered");
        Ok(())
    }

    /// Keeps the membership alive in a task of `tasks`.
    pub(crate) fn keep(self: &Arc<Self>, tasks: &TaskGroup) {
        let me = self.clone();
        tasks.spawn(async move {
            let mut out = false;
            loop {
                let (life, every) = me.life();
                tokio::time::sleep(every).await;
                match me.beat(life).await {
                    Ok(()) => {
                        if std::mem::take(&mut out) {
                            tracing::info!("the masters answer again");
                        }
                    }
                    Err(e) => {
                        if !std::mem::replace(&mut out, true) {
                            tracing::warn!(error = %e, "heartbeat failed; serving on");
                        }
                    }
                }
            }
        });
    }

    async fn beat(&self, life: Incarnation) -> Result<()> {
        let stats = self.load().await;
        match self.master.heartbeat(&self.info.id, life, stats).await {
            Ok(reply) => {
                self.server.set_epoch(reply.epoch);
                if reply.state() == WorkerState::WorkerGone {
                    return self.register_until_done().await;
                }
                Ok(())
            }
            Err(e) if e.is(Kind::Stale) || e.is(Kind::NotFound) => {
                tracing::warn!(error = %e, "the masters took this worker out; registering again");
                self.register_until_done().await
            }
            Err(e) => Err(e),
        }
    }

    /// Registers, however long the masters take to answer.
    ///
    /// # Errors
    /// Why they refuse us: another try would be refused, too.
    pub(crate) async fn register_until_done(&self) -> Result<()> {
        let mut told = false;
        while let Err(e) = self.register().await {
            if e.retry() == Retry::Never {
                return Err(e);
            }
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(error = %e, "cannot register with the masters; serving, and trying on");
            }
            tokio::time::sleep(REGISTER_PAUSE).await;
        }
        Ok(())
    }

    async fn load(&self) -> WorkerLoad {
        let service = self.server.service();
        let s = service.cache_stats().await;
        WorkerLoad {
            used_bytes: s.tiers.iter().map(|t| t.used).sum(),
            segments: s.tiers.iter().map(|t| t.segments).sum(),
            served_bytes: s.served_memory_bytes + s.served_disk_bytes + s.served_origin_bytes,
            hits: s.hits,
            misses: s.misses,
            origin_bytes: service.fetcher.bytes.load(Relaxed),
            connections: self.server.connections() as u64,
        }
    }

    fn life(&self) -> (Incarnation, Duration) {
        *self.life.lock()
    }

    /// Leaves the ring but goes on serving.
    pub(crate) async fn drain(&self) -> Result<()> {
        let life = self.life().0;
        let reply = self.master.with_deadline(LEAVE_DEADLINE).drain_worker(&self.info.id, life).await?;
        self.server.set_epoch(reply.epoch);
        Ok(())
    }

    /// Says goodbye.
    pub(crate) async fn leave(&self) -> Result<()> {
        let life = self.life().0;
        self.master.with_deadline(LEAVE_DEADLINE).leave_worker(&self.info.id, life).await.map(|_| ())
    }
}
