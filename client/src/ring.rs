//! The worker ring as this process knows it, kept fresh by long polls. The ring is an immutable snapshot swapped whole; readers
//! never wait. When no master answers, the last ring stays in use: reads go on.

use crate::master::MasterClient;
use arc_swap::ArcSwap;
use efc_common::id::{RingEpoch, WorkerId};
use efc_common::metrics::gauge;
use efc_common::ring::{Member, Ring};
use efc_common::task::TaskGroup;
use efc_proto::control::{RingReply, WorkerInfo, WorkerState};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long a master keeps a poll open.
const POLL: Duration = Duration::from_secs(20);
/// Of finding a master that answers, before the outage is logged.
const OUTAGE_DEADLINE: Duration = Duration::from_secs(3);
/// Pause after a failed poll.
const PAUSE: Duration = Duration::from_millis(500);

/// The current ring and its changes.
#[derive(Debug)]
pub struct RingWatch {
    ring: ArcSwap<Ring>,
    epoch: watch::Sender<RingEpoch>,
}

impl RingWatch {
    /// Follows the ring of `master`'s cluster in a task of `tasks`, beginning with `initial` or an empty ring of epoch 0.
    pub fn start(master: MasterClient, tasks: &TaskGroup, initial: Option<Ring>) -> Arc<RingWatch> {
        let watch = Self::fixed(initial.unwrap_or_default());
        tasks.spawn(follow(watch.clone(), master.with_deadline(OUTAGE_DEADLINE)));
        watch
    }

    /// A ring that nobody changes: for tests, and for a process without a master.
    pub fn fixed(ring: Ring) -> Arc<RingWatch> {
        let (epoch, _) = watch::channel(ring.epoch());
        Arc::new(RingWatch { ring: ArcSwap::from_pointee(ring), epoch })
    }

    /// The ring in use now.
    pub fn current(&self) -> Arc<Ring> {
        self.ring.load_full()
    }

    /// Waits for the next change after this call and answers the new ring.
    pub async fn changed(&self) -> Arc<Ring> {
        let mut epochs = self.epoch.subscribe();
        // The sender lives as long as `self`.
        let _ = epochs.changed().await;
        self.current()
    }

    /// Waits until the ring has another epoch than `known`, which may be the case already, and answers it.
    pub async fn changed_since(&self, known: RingEpoch) -> Arc<Ring> {
        let mut epochs = self.epoch.subscribe();
        // The sender lives as long as `self`.
        let _ = epochs.wait_for(|e| *e != known).await;
        self.current()
    }

    fn swap(&self, ring: Ring) {
        let epoch = ring.epoch();
        gauge!("efc_ring_epoch").set(epoch.0 as f64);
        self.ring.store(Arc::new(ring));
        self.epoch.send_replace(epoch);
    }
}

/// The ring a master described: workers in state live, weighted by their capacity in MiB.
pub fn ring_of(reply: &RingReply) -> Ring {
    let live = reply.members.iter().filter(|w| w.state() == WorkerState::WorkerLive);
    Ring::new(RingEpoch(reply.epoch), live.map(member_of).collect())
}

fn member_of(w: &WorkerInfo) -> Member {
    Member {
        id: WorkerId(w.id.clone()),
        addr: w.addr.clone(),
        unix: w.unix.clone(),
        host: w.host.clone(),
        zone: w.zone.clone(),
        weight: (w.capacity_bytes >> 20).max(1),
    }
}

async fn follow(watch: Arc<RingWatch>, master: MasterClient) {
    let mut cluster = String::new();
    let mut out = false;
    loop {
        let known = watch.current().epoch();
        // Only what this process itself got from a master says which cluster the known ring is of; the first poll takes all.
        let asked = if cluster.is_empty() { RingEpoch(0) } else { known };
        match master.get_ring(asked, &cluster, POLL).await {
            Ok(reply) => {
                if out {
                    tracing::info!(epoch = reply.epoch, "the masters answer again");
                    out = false;
                }
                if !cluster.is_empty() && cluster != reply.cluster {
                    tracing::warn!(was = %cluster, now = %reply.cluster, "the masters belong to another cluster now");
                }
                let other = cluster != reply.cluster;
                cluster.clone_from(&reply.cluster);
                if RingEpoch(reply.epoch) > known || (other && RingEpoch(reply.epoch) != known) {
                    tracing::info!(epoch = reply.epoch, members = reply.members.len(), "new ring");
                    watch.swap(ring_of(&reply));
                }
            }
            Err(e) => {
                if !out {
                    tracing::warn!(epoch = %known, error = %e, "no master answers; the last ring stays in use");
                    out = true;
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(id: &str, state: WorkerState, mib: u64) -> WorkerInfo {
        WorkerInfo { id: id.into(), state: state.into(), capacity_bytes: mib << 20, ..Default::default() }
    }

    #[test]
    fn only_live_workers_own_keys() {
        let reply = RingReply {
            epoch: 7,
            members: vec![
                worker("a", WorkerState::WorkerLive, 5),
                worker("b", WorkerState::WorkerDraining, 5),
                worker("c", WorkerState::WorkerLive, 0),
                worker("d", WorkerState::WorkerGone, 5),
            ],
            cluster: "x".into(),
        };
        let ring = ring_of(&reply);
        let got: Vec<_> = ring.members().iter().map(|m| (m.id.0.as_str(), m.weight)).collect();
        assert_eq!((ring.epoch().0, got), (7, vec![("a", 5), ("c", 1)]));
    }

    #[tokio::test]
    async fn changes_are_seen_and_not_missed() {
        let w = RingWatch::fixed(Ring::default());
        let before = w.current().epoch();
        w.swap(Ring::new(RingEpoch(3), vec![]));
        assert_eq!(w.changed_since(before).await.epoch(), RingEpoch(3));
        let (next, ()) = tokio::join!(w.changed(), async { w.swap(Ring::new(RingEpoch(4), vec![])) });
        assert_eq!(next.epoch(), RingEpoch(4));
    }
}
