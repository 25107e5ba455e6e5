//! The gRPC service `Raft`: messages from other masters, handed to openraft if they are meant for this node and this data directory.

use super::node::Node;
use crate::state::{decode, encode};
use bytes::Bytes;
use efc_common::{Error, Kind};
use efc_proto::control::raft_server::{Raft as RaftService, RaftServer};
use efc_proto::control::{HelloReply, HelloRequest, RaftMessage};
use efc_proto::status::to_status;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, VoteRequest};
use serde::Serialize;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Server side of the messages between masters.
pub(crate) struct RaftDoor {
    node: Arc<Node>,
}

impl RaftDoor {
    /// The service, to mount on a gRPC server.
    pub(crate) fn service(node: Arc<Node>) -> RaftServer<Self> {
        RaftServer::new(RaftDoor { node })
            .max_decoding_message_size(super::network::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(super::network::MESSAGE_BYTES_MAX)
    }

    /// Refuses what is meant for somebody else: another node at a reused address, or the store this node had before it was wiped.
    fn meant(&self, m: &RaftMessage) -> Result<(), Status> {
        let me = self.node.identity();
        if m.to_node == me.node && m.to_store == me.store {
            return Ok(());
        }
        let text = match m.to_node == me.node {
            true => format!("node {} came back without the data it had; it must be added anew", me.node),
            false => format!("this is node {}, not {}", me.node, m.to_node),
        };
        Err(to_status(&Error::new(Kind::Stale, text)))
    }
}

fn bad(e: Error) -> Status {
    to_status(&Error::new(Kind::Invalid, "a Raft message that does not parse").caused_by(e))
}

fn reply<T: Serialize>(result: T) -> Result<Response<RaftMessage>, Status> {
    let payload = encode(&result).map_err(|e| to_status(&e))?.into();
    Ok(Response::new(RaftMessage { payload, to_node: 0, to_store: 0, data: Bytes::new() }))
}

#[tonic::async_trait]
impl RaftService for RaftDoor {
    async fn hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let me = self.node.identity();
        Ok(Response::new(HelloReply {
            node: me.node,
            store: me.store,
            initialised: self.node.is_initialised().await.map_err(|e| to_status(&e))?,
            cluster: self.node.read(|s| s.cluster().to_string()),
        }))
    }

    async fn append(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let m = request.into_inner();
        self.meant(&m)?;
        let rpc: AppendEntriesRequest<_> = decode(&m.payload).map_err(bad)?;
        let answer = self.node.raft().append_entries(rpc).await;
        if matches!(answer, Ok(ref a) if !matches!(a, AppendEntriesResponse::HigherVote(_))) {
            self.node.note_contact();
        }
        reply(answer)
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let m = request.into_inner();
        self.meant(&m)?;
        let rpc: VoteRequest<u64> = decode(&m.payload).map_err(bad)?;
        reply(self.node.raft().vote(rpc).await)
    }

    async fn snapshot(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let m = request.into_inner();
        self.meant(&m)?;
        let mut rpc: InstallSnapshotRequest<_> = decode(&m.payload).map_err(bad)?;
        rpc.data = m.data.into();
        reply(self.node.raft().install_snapshot(rpc).await)
    }
}
