//! The types openraft is instantiated with, and short names for its own.

use crate::state::{Command, Outcome};
use serde::{Deserialize, Serialize};
use std::io::Cursor;

/// A member of the group, as the membership log entries record it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Peer {
    /// `host:port` of its gRPC service.
    pub(crate) addr: String,
    /// Identity of its data directory: a node that lost its data comes back with another one and is, to Raft, somebody else.
    pub(crate) store: u64,
}

openraft::declare_raft_types!(
    /// openraft's parameters.
    pub(crate) TypeConfig:
        D = Command,
        R = Outcome,
        NodeId = u64,
        Node = Peer,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = openraft::TokioRuntime,
);

pub(crate) type Raft = openraft::Raft<TypeConfig>;
pub(crate) type Entry = openraft::Entry<TypeConfig>;
pub(crate) type LogId = openraft::LogId<u64>;
pub(crate) type Vote = openraft::Vote<u64>;
pub(crate) type Stored = openraft::StoredMembership<u64, Peer>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<u64, Peer>;
pub(crate) type Snapshot = openraft::Snapshot<TypeConfig>;
pub(crate) type StorageError = openraft::StorageError<u64>;
pub(crate) type StorageIOError = openraft::StorageIOError<u64>;
