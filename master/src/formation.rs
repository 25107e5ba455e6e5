//! How a node comes into a group when it starts: founding one, joining one, or telling it a new address. Runs once, after the
//! gRPC doors are open (others must be able to say hello), and ends when nothing is left to do.
//!
//! What must stay true: a group is founded only when every node of the list has answered that it has no data. So a founder that lost its
//! data directory joins the others instead of founding a second cluster, and with a peer missing nothing is founded at all.

use crate::raft::Node;
use efc_client::master::MasterClient;
use efc_common::{Error, Kind, Result};
use futures::future::join_all;
use std::collections::BTreeMap;
use std::time::Duration;

const HELLO_DEADLINE: Duration = Duration::from_secs(1);
const JOIN_DEADLINE: Duration = Duration::from_secs(5);
/// Pause between two rounds of asking the others; doubles up to the maximum, with jitter.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What the flags say about the group.
#[derive(Debug, Clone)]
pub(crate) enum Formation {
    /// Alone.
    Single,
    /// The same list on every node: id → address.
    Peers(BTreeMap<u64, String>),
    /// An existing group, any of its addresses.
    Join(Vec<String>),
}

/// Brings `node` into its group.
///
/// # Errors
/// What no waiting mends: [`Kind::Invalid`] when the others refuse this node, [`Kind::Io`] when Raft has stopped.
pub(crate) async fn form(node: &Node, formation: &Formation) -> Result<()> {
    if !node.is_initialised().await? {
        match formation {
            Formation::Single => node.initialise(BTreeMap::from([me(node)])).await?,
            Formation::Peers(peers) => found_or_join(node, peers).await?,
            Formation::Join(addrs) => join(node, addrs.clone()).await?,
        }
    }
    announce_address(node).await
}

fn me(node: &Node) -> (u64, (String, u64)) {
    let identity = node.identity();
    (identity.node, (node.advertise().to_string(), identity.store))
}

/// Pauses that grow, with jitter.
struct Pauses(Duration);

impl Pauses {
    fn new() -> Self {
        Pauses(PAUSE_MIN)
    }

    async fn next(&mut self) {
        tokio::time::sleep(self.0.mul_f64(rand::random_range(0.5..1.0))).await;
        self.0 = (self.0 * 2).min(PAUSE_MAX);
    }
}

async fn found_or_join(node: &Node, peers: &BTreeMap<u64, String>) -> Result<()> {
    let mine = node.identity().node;
    let others: Vec<(u64, String)> =
        peers.iter().filter(|(id, _)| **id != mine).map(|(i, a)| (*i, a.clone())).collect();
    let mut pauses = Pauses::new();
    let mut told = false;
    // A leader elsewhere may bring this node in while it asks around.
    while !node.is_initialised().await? {
        let answers = join_all(others.iter().map(|(_, addr)| node.hello(addr, HELLO_DEADLINE))).await;
        let mut members = BTreeMap::from([me(node)]);
        let mut formed = false;
        for ((id, addr), answer) in others.iter().zip(answers) {
            let Ok(hello) = answer else { continue };
            if hello.node != *id {
                return Err(Error::new(
                    Kind::Invalid,
                    format!("--peers says that node {id} is at `{addr}`, but node {} answers there", hello.node),
                ));
            }
            formed |= hello.initialised;
            members.insert(*id, (addr.clone(), hello.store));
        }
        if formed {
            return join(node, others.into_iter().map(|(_, addr)| addr).collect()).await;
        }
        if members.len() == peers.len() && peers.keys().next() == Some(&mine) {
            tracing::info!(nodes = members.len(), "all masters answer and none has data; forming the group");
            return node.initialise(members).await;
        }
        if !told {
            told = true;
            tracing::info!(answering = members.len(), of = peers.len(), "waiting for the other masters");
        }
        pauses.next().await;
    }
    Ok(())
}

async fn join(node: &Node, addrs: Vec<String>) -> Result<()> {
    let masters = MasterClient::new(addrs)?.with_deadline(JOIN_DEADLINE);
    tracing::info!(masters = masters.addrs().join(","), "asking to join");
    ask_to_be_added(node, &masters).await
}

/// Asks the leader until this node is a voter.
async fn ask_to_be_added(node: &Node, masters: &MasterClient) -> Result<()> {
    let mut pauses = Pauses::new();
    let mut told = false;
    loop {
        match masters.add_master(node.identity().node, node.advertise()).await {
            Ok(_) => return Ok(()),
            Err(e) if matches!(e.kind(), Kind::Invalid | Kind::Unsupported | Kind::PermissionDenied) => {
                return Err(Error::new(e.kind(), "the masters refuse this node").caused_by(e));
            }
            Err(e) if !told => {
                told = true;
                tracing::warn!(error = %e, "not added to the masters yet; asking on");
            }
            Err(e) => tracing::debug!(error = %e, "not added to the masters yet"),
        }
        pauses.next().await;
    }
}

/// If the group knows this node under another address (a new port, a new host), tells it the present one.
async fn announce_address(node: &Node) -> Result<()> {
    let view = node.wait(|v| v.leader.is_some()).await?;
    if node.recorded_addr().as_deref() == Some(node.advertise()) || node.recorded_addr().is_none() {
        return Ok(());
    }
    let mut addrs: Vec<String> = view.masters.iter().map(|m| m.addr.clone()).collect();
    // The node itself may be the leader; it then answers at its own door.
    addrs.push(node.advertise().to_string());
    ask_to_be_added(node, &MasterClient::new(addrs)?.with_deadline(JOIN_DEADLINE)).await
}
