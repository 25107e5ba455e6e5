//! openraft's messages to other masters, over gRPC. One channel per address, shared by all streams to it; it reconnects by itself.
//!
//! Every message names the node and the store it is meant for. An outage of a peer is logged once, and once when it is over.

use super::types::{Peer, TypeConfig};
use crate::state::{decode, encode};
use bytes::Bytes;
use efc_common::{Error, Kind, Result};
use efc_proto::control::raft_client::RaftClient;
use efc_proto::control::{HelloReply, HelloRequest, RaftMessage};
use efc_proto::status::from_status;
use openraft::error::{InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};
use openraft::{RaftNetwork, RaftNetworkFactory};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

/// Largest message either side takes, bytes: an append is cut at 1 MiB plus one entry, a snapshot chunk is smaller.
pub(super) const MESSAGE_BYTES_MAX: usize = 16 << 20;
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Channels kept: of all addresses that peers had in the life of this process.
const CHANNELS_MAX: usize = 64;

/// Makes links to peers; clones share the channels.
#[derive(Clone)]
pub(crate) struct Network {
    shared: Arc<Shared>,
}

struct Shared {
    channels: Mutex<HashMap<String, Channel>>,
    /// Peers that did not answer the last message.
    down: Mutex<HashSet<u64>>,
    /// Pause before a peer that is down is asked again.
    backoff: Duration,
}

/// One peer, as openraft sees it.
pub(crate) struct Link {
    target: u64,
    peer: Peer,
    network: Network,
}

impl Network {
    /// `backoff`: how long a peer that cannot be reached is left alone.
    pub(crate) fn new(backoff: Duration) -> Self {
        Network { shared: Arc::new(Shared { channels: Mutex::default(), down: Mutex::default(), backoff }) }
    }

    fn client(&self, addr: &str) -> Result<RaftClient<Channel>> {
        let mut channels = self.shared.channels.lock();
        if channels.len() >= CHANNELS_MAX && !channels.contains_key(addr) {
            channels.clear();
        }
        let channel = match channels.get(addr) {
            Some(c) => c.clone(),
            None => {
                let endpoint = Endpoint::from_shared(format!("http://{addr}")).map_err(|e| {
                    Error::new(Kind::Invalid, format!("master address `{addr}` is not host:port")).caused_by(e)
                })?;
                let channel = endpoint
                    .connect_timeout(CONNECT_DEADLINE)
                    .http2_keep_alive_interval(KEEPALIVE)
                    .keep_alive_timeout(KEEPALIVE)
                    .keep_alive_while_idle(true)
                    .tcp_nodelay(true)
                    .connect_lazy();
                channels.insert(addr.to_string(), channel.clone());
                channel
            }
        };
        Ok(RaftClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// Asks who listens at `addr`.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] or [`Kind::Timeout`] when nobody answers.
    pub(crate) async fn hello(&self, addr: &str, deadline: Duration) -> Result<HelloReply> {
        let mut request = Request::new(HelloRequest {});
        request.set_timeout(deadline);
        let reply = self.client(addr)?.hello(request).await;
        Ok(reply.map_err(|s| from_status(&s).with("master", addr))?.into_inner())
    }

    fn note(&self, link: &Link, failure: Option<&Error>) {
        let changed = match failure {
            Some(_) => self.shared.down.lock().insert(link.target),
            None => self.shared.down.lock().remove(&link.target),
        };
        match failure {
            Some(e) if changed => {
                tracing::warn!(node = link.target, addr = %link.peer.addr, error = %e, "a master does not answer");
            }
            None if changed => tracing::info!(node = link.target, addr = %link.peer.addr, "the master answers again"),
            _ => {}
        }
    }
}

/// Which of the three calls.
enum Call {
    Append,
    Vote,
    Snapshot,
}

impl Link {
    async fn send(&self, call: Call, message: RaftMessage, deadline: Duration) -> Result<Bytes> {
        let mut client = self.network.client(&self.peer.addr)?;
        let mut request = Request::new(message);
        request.set_timeout(deadline);
        let reply: std::result::Result<Response<RaftMessage>, Status> = match call {
            Call::Append => client.append(request).await,
            Call::Vote => client.vote(request).await,
            Call::Snapshot => client.snapshot(request).await,
        };
        let answer = reply.map(|r| r.into_inner().payload).map_err(|s| from_status(&s));
        self.network.note(self, answer.as_ref().err());
        answer
    }

    async fn exchange<Q, A, E>(
        &self,
        call: Call,
        body: &Q,
        data: Bytes,
        option: &RPCOption,
    ) -> std::result::Result<A, RPCError<u64, Peer, RaftError<u64, E>>>
    where
        Q: Serialize,
        A: DeserializeOwned,
        E: DeserializeOwned + std::error::Error + 'static,
    {
        let network = |e: Error| RPCError::Network(NetworkError::new(&e));
        let payload = encode(body).map_err(network)?.into();
        let message = RaftMessage { payload, to_node: self.target, to_store: self.peer.store, data };
        let answer = self.send(call, message, option.hard_ttl()).await.map_err(|e| match e.kind() {
            // openraft leaves an unreachable peer alone for the backoff; others it asks again at once.
            Kind::Unavailable | Kind::Stale | Kind::Invalid => RPCError::Unreachable(Unreachable::new(&e)),
            _ => RPCError::Network(NetworkError::new(&e)),
        })?;
        let result: std::result::Result<A, RaftError<u64, E>> = decode(&answer).map_err(network)?;
        result.map_err(|e| RPCError::RemoteError(RemoteError::new(self.target, e)))
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Link;

    async fn new_client(&mut self, target: u64, node: &Peer) -> Link {
        Link { target, peer: node.clone(), network: self.clone() }
    }
}

impl RaftNetwork<TypeConfig> for Link {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> std::result::Result<AppendEntriesResponse<u64>, RPCError<u64, Peer, RaftError<u64>>> {
        self.exchange(Call::Append, &rpc, Bytes::new(), &option).await
    }

    async fn install_snapshot(
        &mut self,
        mut rpc: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> std::result::Result<InstallSnapshotResponse<u64>, RPCError<u64, Peer, RaftError<u64, InstallSnapshotError>>>
    {
        // The bytes travel raw, beside the JSON.
        let data = Bytes::from(std::mem::take(&mut rpc.data));
        self.exchange(Call::Snapshot, &rpc, data, &option).await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        option: RPCOption,
    ) -> std::result::Result<VoteResponse<u64>, RPCError<u64, Peer, RaftError<u64>>> {
        self.exchange(Call::Vote, &rpc, Bytes::new(), &option).await
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(self.network.shared.backoff))
    }
}
