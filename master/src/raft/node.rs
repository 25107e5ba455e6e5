//! This node of the group: openraft running over the store and the network, and what the rest of the master may ask of it.

use super::db::{Db, Identity};
use super::log_store::LogStore;
use super::machine::Machine;
use super::network::Network;
use super::types::{Peer, Raft};
use crate::state::{Command, Life, Outcome, State};
use efc_common::{Error, Kind, Result};
use efc_proto::control::{HelloReply, MasterNode};
use openraft::error::{ClientWriteError, RaftError};
use openraft::{Config, RaftMetrics, ServerState, SnapshotPolicy};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, broadcast, watch};

/// How long a proposal may take to be agreed on.
const PROPOSE_DEADLINE: Duration = Duration::from_secs(5);
/// A snapshot chunk's deadline includes the receiver's fsync.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(10);
const SNAPSHOT_CHUNK_BYTES: u64 = 1 << 20;

/// Time-outs and log compaction of the group.
#[derive(Debug, Clone)]
pub(crate) struct Tuning {
    /// Between heartbeats of the leader.
    pub(crate) heartbeat: Duration,
    /// Silence after which a follower stands for election: this to twice this, at random.
    pub(crate) election: Duration,
    /// Log entries between two snapshots.
    pub(crate) snapshot_logs: u64,
}

/// The group as this node sees it now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) node: u64,
    /// It leads, and a majority has confirmed so lately.
    pub(crate) leads: bool,
    pub(crate) leader: Option<u64>,
    /// Address of the leader.
    pub(crate) leader_addr: Option<String>,
    pub(crate) term: u64,
    pub(crate) last_log: u64,
    pub(crate) applied: u64,
    pub(crate) masters: Vec<MasterNode>,
    /// A change of the voters was begun and not ended.
    pub(crate) joint: bool,
}

/// A member of the master group.
pub(crate) struct Node {
    pub(super) identity: Identity,
    pub(super) advertise: String,
    pub(super) raft: Raft,
    pub(super) network: Network,
    machine: Machine,
    election_max: Duration,
    /// A leader was heard in this life of the process. The leader that the stored vote names may be long gone.
    contact: watch::Sender<bool>,
    /// One change of the membership at a time.
    pub(super) changing: Semaphore,
}

impl Node {
    /// Opens the data directory and starts openraft. `advertise` is where others reach this node.
    ///
    /// # Errors
    /// Those of the database, and [`Kind::Invalid`] for impossible time-outs.
    pub(crate) async fn start(id: u64, dir: &Path, advertise: String, tuning: &Tuning) -> Result<Arc<Self>> {
        let (db, identity) = Db::open(dir, id)?;
        let machine = Machine::open(db.clone())?;
        let network = Network::new(tuning.heartbeat);
        let config = raft_config(tuning)?;
        let election_max = Duration::from_millis(config.election_timeout_max);
        let raft = Raft::new(id, Arc::new(config), network.clone(), LogStore::new(db), machine.clone())
            .await
            .map_err(|e| Error::new(Kind::Io, "start Raft").caused_by(e))?;
        let changing = Semaphore::new(1);
        let (contact, _) = watch::channel(false);
        Ok(Arc::new(Node { identity, advertise, raft, network, machine, election_max, contact, changing }))
    }

    /// Node id and store of this node.
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// Where others reach this node.
    pub(crate) fn advertise(&self) -> &str {
        &self.advertise
    }

    /// A leader was heard.
    pub(super) fn note_contact(&self) {
        self.contact.send_if_modified(|c| !std::mem::replace(c, true));
    }

    pub(super) fn raft(&self) -> &Raft {
        &self.raft
    }

    /// Looks at the applied state; `look` must be short.
    pub(crate) fn read<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        self.machine.read(look)
    }

    /// Looks at the applied state; what changes in the lives of sessions after that look comes from the receiver.
    pub(crate) fn read_and_follow<R>(&self, look: impl FnOnce(&State) -> R) -> (R, broadcast::Receiver<Life>) {
        self.machine.read_and_follow(look)
    }

    /// The ring epoch, and its changes.
    pub(crate) fn epochs(&self) -> watch::Receiver<u64> {
        self.machine.epochs()
    }

    /// Has it data: a membership, from its own initialisation or from a leader? Asked of Raft itself and not of its metrics, which
    /// say nothing yet just after a start. (A vote alone is no data: its founder may have lost all before telling anybody.)
    ///
    /// # Errors
    /// [`Kind::Io`] when Raft has stopped.
    pub(crate) async fn is_initialised(&self) -> Result<bool> {
        let asked = self.raft.with_raft_state(|s| s.membership_state.effective().log_id().is_some()).await;
        asked.map_err(|e| Error::new(Kind::Io, "Raft has stopped").caused_by(e))
    }

    /// The address under which the membership records this node; `None` if it is no member.
    pub(crate) fn recorded_addr(&self) -> Option<String> {
        let m = self.raft.metrics();
        let m = m.borrow();
        m.membership_config.membership().get_node(&self.identity.node).map(|p| p.addr.clone())
    }

    /// The group as it is seen now.
    pub(crate) fn view(&self) -> View {
        self.view_of(&self.raft.metrics().borrow())
    }

    fn view_of(&self, m: &RaftMetrics<u64, Peer>) -> View {
        let membership = m.membership_config.membership();
        let configs = membership.get_joint_config();
        let voters: Vec<u64> = membership.voter_ids().collect();
        let confirmed = voters == [self.identity.node]
            || m.millis_since_quorum_ack.is_some_and(|ms| Duration::from_millis(ms) < self.election_max);
        let leads = m.state == ServerState::Leader && confirmed;
        // A leader that nobody confirms any more does not point at itself.
        let heard = *self.contact.borrow();
        let leader = m.current_leader.filter(|l| if *l == self.identity.node { leads } else { heard });
        let addr = |id: u64, peer: &Peer| match id == self.identity.node {
            true => self.advertise.clone(),
            false => peer.addr.clone(),
        };
        let matched = |id: u64| match &m.replication {
            _ if id == self.identity.node && leads => m.last_log_index.unwrap_or(0),
            Some(r) => r.get(&id).copied().flatten().map_or(0, |l| l.index),
            None => 0,
        };
        let masters = membership.nodes().map(|(id, peer)| MasterNode {
            node: *id,
            addr: addr(*id, peer),
            // While a change is under way, only who votes before and after it.
            voter: configs.iter().all(|c| c.contains(id)),
            matched: matched(*id),
        });
        View {
            node: self.identity.node,
            leads,
            leader,
            leader_addr: leader.and_then(|l| membership.get_node(&l).map(|p| addr(l, p))),
            term: m.current_term,
            last_log: m.last_log_index.unwrap_or(0),
            applied: m.last_applied.map_or(0, |l| l.index),
            masters: masters.collect(),
            joint: configs.len() > 1,
        }
    }

    /// The error of a call that only the leader answers.
    pub(crate) fn not_leader(&self) -> Error {
        let view = self.view();
        let leader = view.leader_addr.filter(|_| !view.leads);
        Error::new(Kind::NotLeader, "this master does not lead").with("leader", leader.unwrap_or_default())
    }

    /// Ok if this node leads, else the error that names the leader.
    pub(crate) fn lead(&self) -> Result<()> {
        match self.view().leads {
            true => Ok(()),
            false => Err(self.not_leader()),
        }
    }

    /// Waits until the view satisfies `good`.
    ///
    /// # Errors
    /// [`Kind::Io`] when Raft has stopped.
    pub(crate) async fn wait(&self, mut good: impl FnMut(&View) -> bool) -> Result<View> {
        let mut metrics = self.raft.metrics();
        let mut contact = self.contact.subscribe();
        loop {
            let view = {
                let m = metrics.borrow_and_update();
                m.running_state.clone().map_err(|e| Error::new(Kind::Io, "Raft has stopped").caused_by(e))?;
                self.view_of(&m)
            };
            if good(&view) {
                return Ok(view);
            }
            tokio::select! {
                r = metrics.changed() => r.map_err(|_| Error::new(Kind::Cancelled, "Raft has stopped"))?,
                // The sender lives as long as `self`.
                _ = contact.changed() => {}
            }
        }
    }

    /// Proposes a command and waits until it is applied here.
    ///
    /// # Errors
    /// [`Kind::NotLeader`]; [`Kind::Timeout`] (it may still happen); the refusal of apply.
    pub(crate) async fn propose(&self, command: Command) -> Result<Outcome> {
        match tokio::time::timeout(PROPOSE_DEADLINE, self.raft.client_write(command)).await {
            Err(_) => Err(Error::new(Kind::Timeout, "no majority of the masters agreed in time")),
            Ok(Ok(written)) => written.data.into_result(),
            Ok(Err(e)) => Err(self.write_error(e)),
        }
    }

    /// The house's error of a refused write.
    pub(super) fn write_error(&self, e: RaftError<u64, ClientWriteError<u64, Peer>>) -> Error {
        match e {
            RaftError::APIError(ClientWriteError::ForwardToLeader(f)) => {
                let leader = f.leader_node.map(|p| p.addr).unwrap_or_default();
                Error::new(Kind::NotLeader, "this master does not lead").with("leader", leader)
            }
            RaftError::APIError(ClientWriteError::ChangeMembershipError(e)) => {
                Error::new(Kind::Unavailable, "the masters cannot be changed now").caused_by(e)
            }
            RaftError::Fatal(e) => Error::new(Kind::Io, "Raft has stopped").caused_by(e),
        }
    }

    /// Returns when this node has confirmed that it leads and has applied all that was acknowledged before the call.
    ///
    /// # Errors
    /// [`Kind::NotLeader`] or [`Kind::Timeout`].
    pub(crate) async fn linearizable(&self) -> Result<()> {
        match tokio::time::timeout(PROPOSE_DEADLINE, self.raft.ensure_linearizable()).await {
            Err(_) => Err(Error::new(Kind::Timeout, "no majority of the masters answered in time")),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::Fatal(e))) => Err(Error::new(Kind::Io, "Raft has stopped").caused_by(e)),
            Ok(Err(RaftError::APIError(_))) => Err(self.not_leader()),
        }
    }

    /// Forms a new group of these nodes. Only for a node without data.
    ///
    /// # Errors
    /// [`Kind::AlreadyExists`] if it has data.
    pub(crate) async fn initialise(&self, members: BTreeMap<u64, (String, u64)>) -> Result<()> {
        let nodes: BTreeMap<u64, Peer> =
            members.into_iter().map(|(id, (addr, store))| (id, Peer { addr, store })).collect();
        match self.raft.initialize(nodes).await {
            Ok(()) => Ok(()),
            Err(RaftError::APIError(e)) => {
                Err(Error::new(Kind::AlreadyExists, "the group is formed already").caused_by(e))
            }
            Err(RaftError::Fatal(e)) => Err(Error::new(Kind::Io, "Raft has stopped").caused_by(e)),
        }
    }

    /// Asks who listens at `addr`.
    ///
    /// # Errors
    /// Those of [`Network::hello`].
    pub(crate) async fn hello(&self, addr: &str, deadline: Duration) -> Result<HelloReply> {
        self.network.hello(addr, deadline).await
    }

    /// Stops openraft.
    pub(crate) async fn shutdown(&self) {
        if let Err(e) = self.raft.shutdown().await {
            tracing::warn!(error = %e, "Raft did not stop in good order");
        }
    }
}

fn raft_config(tuning: &Tuning) -> Result<Config> {
    let ms = |d: Duration| d.as_millis() as u64;
    let config = Config {
        cluster_name: "efc".into(),
        heartbeat_interval: ms(tuning.heartbeat),
        election_timeout_min: ms(tuning.election),
        election_timeout_max: ms(tuning.election) * 2,
        install_snapshot_timeout: ms(SNAPSHOT_DEADLINE),
        snapshot_max_chunk_size: SNAPSHOT_CHUNK_BYTES,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(tuning.snapshot_logs),
        // What a follower that was away briefly may still get from the log.
        max_in_snapshot_log_to_keep: tuning.snapshot_logs / 2,
        replication_lag_threshold: tuning.snapshot_logs * 2,
        max_payload_entries: 256,
        ..Config::default()
    };
    config.validate().map_err(|e| {
        Error::new(Kind::Invalid, "--election-ms must be above --heartbeat-ms, by a factor of 3 or more").caused_by(e)
    })
}
