//! Changes of the group: adding, replacing and removing a master. On the leader, one at a time.
//!
//! A voter that lost its data directory must not vote again as the one it was: it may have voted in a term it no longer knows of, and
//! it may have acknowledged entries it no longer has. So a data directory has a random identity (`store`), the membership records it, and
//! every message names the store it is meant for. The wiped node has a new store: nothing meant for the old one reaches it, it
//! belongs to no membership, hence neither votes nor stands for election. `add_master` then removes the old voter by the votes of
//! the others alone, and adds the new store as a learner that becomes a voter when it has caught up. In Raft's terms (Ongaro's
//! thesis, chapter 4) that is an ordinary removal and an ordinary addition of two different servers.

use super::node::Node;
use super::types::Peer;
use efc_common::{Error, Kind, Result};
use futures::future::join_all;
use openraft::ChangeMembers;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Of one whole change: a large snapshot may have to travel.
const CHANGE_DEADLINE: Duration = Duration::from_secs(30);
const HELLO_DEADLINE: Duration = Duration::from_secs(2);

impl Node {
    /// Makes the node that answers at `addr` a voter; nothing to do if it is one.
    ///
    /// # Errors
    /// [`Kind::NotLeader`]; [`Kind::Invalid`] if somebody else or a member of another cluster answers there; [`Kind::Unavailable`] if
    /// nobody does or another change is under way; [`Kind::Timeout`] when it has not caught up in time (ask again).
    pub(crate) async fn add_master(&self, id: u64, addr: &str) -> Result<()> {
        let _turn = self.begin_change()?;
        within(self.add(id, addr)).await
    }

    /// Takes a master out of the group.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Invalid`] for the last voter; [`Kind::Busy`] when those that remain could not go on; else as
    /// [`Node::add_master`].
    pub(crate) async fn remove_master(&self, id: u64) -> Result<()> {
        let _turn = self.begin_change()?;
        within(self.remove(id)).await
    }

    /// Ends a change of the voters that an earlier leader began.
    ///
    /// # Errors
    /// As [`Node::add_master`].
    pub(crate) async fn finish_change(&self) -> Result<()> {
        let _turn = self.begin_change()?;
        within(self.finish()).await
    }

    async fn finish(&self) -> Result<()> {
        let goal = {
            let m = self.raft.metrics();
            let m = m.borrow();
            let configs = m.membership_config.membership().get_joint_config();
            if configs.len() < 2 {
                return Ok(());
            }
            configs.last().cloned().unwrap_or_default()
        };
        self.change(ChangeMembers::ReplaceAllVoters(goal)).await
    }

    fn begin_change(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        self.lead()?;
        self.changing
            .try_acquire()
            .map_err(|_| Error::new(Kind::Unavailable, "another change of the masters is under way; try again"))
    }

    fn member(&self, id: u64) -> Option<(Peer, bool)> {
        let m = self.raft.metrics();
        let m = m.borrow();
        let membership = m.membership_config.membership();
        let peer = membership.get_node(&id)?.clone();
        let voter = membership.voter_ids().any(|v| v == id);
        Some((peer, voter))
    }

    async fn change(&self, change: ChangeMembers<u64, Peer>) -> Result<()> {
        self.raft.change_membership(change, false).await.map_err(|e| self.write_error(e))?;
        Ok(())
    }

    async fn add(&self, id: u64, addr: &str) -> Result<()> {
        let who = self.identify(id, addr).await?;
        // An earlier attempt may have ended half way.
        self.finish().await?;
        let peer = Peer { addr: addr.to_string(), store: who };
        match self.member(id) {
            Some((old, true)) if old == peer => return Ok(()),
            Some((old, _)) if old.store == peer.store => {
                if old.addr != peer.addr {
                    tracing::info!(node = id, from = %old.addr, to = %addr, "a master has a new address");
                    self.change(ChangeMembers::SetNodes(BTreeMap::from([(id, peer)]))).await?;
                }
            }
            Some(_) if id == self.identity.node => {
                return Err(Error::new(Kind::Invalid, format!("node {id} leads here and cannot be at `{addr}` too")));
            }
            Some((old, voter)) => {
                self.replaceable(id, &old).await?;
                tracing::warn!(node = id, addr, "a master came back without its data; it is added anew");
                self.expel(id, voter).await?;
                self.change(ChangeMembers::AddNodes(BTreeMap::from([(id, peer)]))).await?;
            }
            None => {
                tracing::info!(node = id, addr, "a master is added");
                self.change(ChangeMembers::AddNodes(BTreeMap::from([(id, peer)]))).await?;
            }
        }
        if self.member(id).is_some_and(|(_, voter)| voter) {
            return Ok(());
        }
        self.caught_up(id).await?;
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id]))).await?;
        tracing::info!(node = id, addr, "the master votes");
        Ok(())
    }

    /// The store of the node at `addr`, if it may become node `id` of this cluster.
    async fn identify(&self, id: u64, addr: &str) -> Result<u64> {
        if id == 0 {
            return Err(Error::new(Kind::Invalid, "node ids begin at 1"));
        }
        if id == self.identity.node && addr == self.advertise {
            return Ok(self.identity.store);
        }
        let who = self.hello(addr, HELLO_DEADLINE).await?;
        if who.node != id {
            return Err(Error::new(Kind::Invalid, format!("at `{addr}` answers node {}, not {id}", who.node)));
        }
        let cluster = self.read(|s| s.cluster().to_string());
        if !who.cluster.is_empty() && who.cluster != cluster {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "node {id} has data of cluster {}; empty its data directory to add it to {cluster}",
                    who.cluster
                ),
            ));
        }
        Ok(who.store)
    }

    /// A second node with an id that a living master has must not push that one out.
    async fn replaceable(&self, id: u64, old: &Peer) -> Result<()> {
        match self.hello(&old.addr, HELLO_DEADLINE).await {
            Ok(h) if h.node == id && h.store == old.store => Err(Error::new(
                Kind::Invalid,
                format!("node id {id} is in use by the master at `{}`; give the new one another --node-id", old.addr),
            )),
            _ => Ok(()),
        }
    }

    /// Waits until the learner has the log up to where it ends now.
    async fn caught_up(&self, id: u64) -> Result<()> {
        let goal = self.view().last_log;
        let view = self.wait(|v| !v.leads || v.masters.iter().any(|m| m.node == id && m.matched >= goal)).await?;
        if view.leads { Ok(()) } else { Err(self.not_leader()) }
    }

    async fn expel(&self, id: u64, voter: bool) -> Result<()> {
        if !voter {
            return self.change(ChangeMembers::RemoveNodes(BTreeSet::from([id]))).await;
        }
        self.rest_can_go_on(id).await?;
        self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id]))).await
    }

    async fn remove(&self, id: u64) -> Result<()> {
        let (peer, _) = self
            .member(id)
            .ok_or_else(|| Error::new(Kind::NotFound, format!("node {id} is not a master of this cluster")))?;
        // What an earlier attempt left half done may be this very removal.
        self.finish().await?;
        if let Some((_, voter)) = self.member(id) {
            self.expel(id, voter).await?;
        }
        tracing::info!(node = id, addr = %peer.addr, "a master was removed");
        Ok(())
    }

    /// A removal that leaves a group without a living majority could never be completed, nor undone.
    async fn rest_can_go_on(&self, without: u64) -> Result<()> {
        let rest: Vec<(u64, Peer)> = {
            let m = self.raft.metrics();
            let m = m.borrow();
            let membership = m.membership_config.membership();
            let voters: BTreeSet<u64> = membership.voter_ids().filter(|v| *v != without).collect();
            membership.nodes().filter(|(n, _)| voters.contains(n)).map(|(n, p)| (*n, p.clone())).collect()
        };
        if rest.is_empty() {
            return Err(Error::new(Kind::Invalid, format!("node {without} is the only voter; add another first")));
        }
        let alive = join_all(rest.iter().map(|(id, peer)| async move {
            *id == self.identity.node
                || self.hello(&peer.addr, HELLO_DEADLINE).await.is_ok_and(|h| h.node == *id && h.store == peer.store)
        }))
        .await;
        let alive = alive.into_iter().filter(|a| *a).count();
        if alive * 2 > rest.len() {
            return Ok(());
        }
        Err(Error::new(
            Kind::Busy,
            format!(
                "without node {without} only {alive} of {} masters would answer, which is no majority; start the others first",
                rest.len()
            ),
        ))
    }
}

async fn within(change: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::time::timeout(CHANGE_DEADLINE, change)
        .await
        .unwrap_or_else(|_| Err(Error::new(Kind::Timeout, "the change of the masters goes on; ask again")))
}
