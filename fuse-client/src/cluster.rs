//! The mount's link to its cluster: masters, ring, workers, and the session that tells the masters that this mount lives.

use crate::embedded::{Embedded, EmbeddedConfig, Orphaned, Sizes, default_data_dir};
use crate::holder::Held;
use crate::options::MountOptions;
use efc_client::lease::Who;
use efc_client::master::MasterClient;
use efc_client::peers::{Peers, PeersOptions, host_name};
use efc_client::ring::RingWatch;
use efc_client::wire::Identity;
use efc_common::error::Context as _;
use efc_common::id::{Incarnation, SessionId};
use efc_common::policy::CachePolicy;
use efc_common::source::{SourceSpec, StaticKeys};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};

/// How long the masters may take to answer at mount.
const CLUSTER_DEADLINE: Duration = Duration::from_secs(15);
/// How long a takeover waits for the embedded worker to take other sizes.
const FIT_PATIENCE: Duration = Duration::from_secs(1);
/// Pause after a session call that failed.
const SESSION_PAUSE: Duration = Duration::from_secs(2);

/// A link that is up.
pub struct ClusterLink {
    /// The ring as it changes.
    pub ring: Arc<RingWatch>,
    /// The workers, as the cache of the mounted source.
    pub peers: Peers,
    /// The masters.
    pub master: MasterClient,
    /// Whose session with the masters this mount has.
    pub who: Who,
    embedded: Option<Embedded>,
}

/// What is mounted, as far as the cluster has to know.
pub struct Mounted {
    /// The source.
    pub spec: SourceSpec,
    /// Keys that travel with it.
    pub keys: Option<StaticKeys>,
    /// How workers keep what is read of it.
    pub cache: CachePolicy,
    /// What the masters are told is mounted: the name of a dataset, which then cannot be deleted, or the URL of a source.
    pub session: String,
}

impl ClusterLink {
    /// Reaches the cluster of `options.masters`, or starts an embedded one, which `held` keeps, or goes on with the one that is `left`.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] or [`Kind::Timeout`] naming the masters, or what kept the embedded processes from starting.
    pub async fn start(
        options: &MountOptions,
        what: &Mounted,
        mountpoint: &Path,
        log_level: &str,
        tasks: &TaskGroup,
        (held, left): (Option<Arc<Held>>, Option<Orphaned>),
    ) -> Result<ClusterLink> {
        let (embedded, masters) = if options.masters.is_empty() {
            let config = EmbeddedConfig {
                data_dir: options.data_dir.clone().unwrap_or_else(|| default_data_dir(mountpoint)),
                cache_memory_bytes: options.cache_memory_bytes,
                disk: options.cache_dir.clone().map(|d| (d, options.cache_size_bytes)),
                log_level: log_level.to_string(),
            };
            let embedded = Embedded::start(&config, held, left).await?;
            let masters = vec![embedded.master.clone()];
            (Some(embedded), masters)
        } else {
            (None, options.masters.clone())
        };
        let master = MasterClient::new(masters.clone())?.with_deadline(CLUSTER_DEADLINE);
        let status = master.status().await.context(format!("no master of {} answers", masters.join(", ")))?;
        let host = host_name();
        let me = Identity {
            cluster: status.cluster.clone(),
            peer: format!("{host}:{}", std::process::id()),
            epoch: status.ring_epoch,
        };
        let ring = RingWatch::start(master.clone(), tasks, None);
        if tokio::time::timeout(CLUSTER_DEADLINE, ring.changed_since(Default::default())).await.is_err() {
            return Err(Error::new(Kind::Timeout, format!("masters {} gave no ring", masters.join(", "))));
        }
        if ring.current().is_empty() {
            warn!("the cluster has no worker: reads go to the origin until one registers");
        }
        // About two percent of the budget.
        let places = options.memory_bytes / 16_384;
        let peers = Peers::new(
            ring.clone(),
            what.spec.clone(),
            what.keys.clone(),
            me,
            PeersOptions { places, cache: what.cache, ..Default::default() },
        );
        if let Some(embedded) = embedded.as_ref().filter(|e| e.found_worker)
            && tokio::time::timeout(FIT_PATIENCE, fit(&peers, embedded.sizes.get())).await.is_err()
        {
            warn!("the embedded worker does not say how large its tiers are; they stay as they are");
        }
        let client = format!("{host}:{}:{}", std::process::id(), mountpoint.display());
        let who = Who { client, dataset: what.session.clone() };
        Ok(ClusterLink { ring, peers, master, who, embedded })
    }

    /// Sizes of the embedded worker, if there is one.
    pub fn sizes(&self) -> Option<Arc<Sizes>> {
        self.embedded.as_ref().map(|e| e.sizes.clone())
    }

    /// Tells the masters that this mount lives, where leases do not do that.
    pub fn keep_session(&self, tasks: &TaskGroup) {
        tasks.spawn_graceful(keep_session(self.master.clone(), self.who.clone(), tasks.clone()));
    }

    /// Ends the link; an embedded cluster is stopped in good order.
    pub async fn stop(self) {
        if let Some(embedded) = self.embedded {
            embedded.stop().await;
        }
    }
}

/// Has a worker of a predecessor take the sizes of its tiers that this mount has by now, bytes. A worker of another version is asked only if they differ.
async fn fit(peers: &Peers, (memory, disk): (u64, u64)) {
    for (id, stats) in peers.cache_stat().await {
        let capacity = |is_memory: bool| {
            let all = stats.iter().flat_map(|s| &s.tiers).filter(|t| (t.name == "memory") == is_memory);
            all.map(|t| t.capacity).sum::<u64>()
        };
        if stats.is_err() || (capacity(true), capacity(false)) == (memory, disk) {
            continue;
        }
        if let Err(e) = peers.resize(memory, disk).await {
            warn!(worker = id.0, error = %e, "the embedded worker keeps its sizes");
        }
    }
}

/// Opens a session and keeps it until the mount ends. Without masters nothing depends on it, so failures are told once per outage.
async fn keep_session(master: MasterClient, who: Who, tasks: TaskGroup) {
    let mut session: Option<(SessionId, Incarnation, Duration)> = None;
    let mut failing = false;
    loop {
        let outcome = match session {
            None => open(&master, &who).await.map(Some),
            Some((id, life, every)) => match master.keep_session(id, life).await {
                Ok(_) => Ok(Some((id, life, every))),
                // Expired while nobody could be reached: open a new one.
                Err(e) if matches!(e.kind(), Kind::Stale | Kind::NotFound) => Ok(None),
                Err(e) => Err(e),
            },
        };
        let pause = match outcome {
            Ok(s) => {
                if std::mem::take(&mut failing) {
                    info!("masters answer again");
                }
                session = s;
                session.map_or(Duration::ZERO, |(_, _, every)| every)
            }
            Err(e) => {
                if !std::mem::replace(&mut failing, true) {
                    warn!(error = %e, "masters do not answer; reads go on");
                }
                SESSION_PAUSE
            }
        };
        tokio::select! {
            _ = tasks.stopped() => break,
            _ = tokio::time::sleep(pause) => {}
        }
    }
    if let Some((id, life, _)) = session {
        // A goodbye that is not heard only costs the masters the wait for its expiry.
        let _ = tokio::time::timeout(SESSION_PAUSE, master.close_session(id, life)).await;
    }
}

async fn open(master: &MasterClient, who: &Who) -> Result<(SessionId, Incarnation, Duration)> {
    let s = master.open_session(&who.client, &who.dataset, None, false).await?;
    // Three tries before the masters give the session up.
    let every = Duration::from_millis(s.expire_ms.max(300)) / 3;
    Ok((SessionId(s.session), Incarnation(s.incarnation), every))
}
