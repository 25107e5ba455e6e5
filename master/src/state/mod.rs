//! The replicated state: datasets, workers with their ring epoch, client sessions. Everything here is a pure value: only
//! [`State::apply`] changes it, with no I/O, no clock and no randomness, so that every node that applies the same commands holds the
//! same bytes. Who is silent and who leads is not here: the coordinator knows that and turns it into commands.
//!
//! What must stay true: the ring epoch grows by one exactly when the set of ring members (with their addresses, capacity or
//! incarnation) changes; an incarnation is never handed out twice; encode and decode are inverse.

mod apply;
mod command;
pub(crate) mod dataset;
#[cfg(test)]
mod tests;

pub(crate) use command::{Command, Life, Outcome};

use efc_common::id::{Incarnation, RingEpoch, SessionId, WorkerId};
use efc_common::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Format byte in front of an encoded state or log entry.
pub(crate) const FORMAT: u8 = 1;

/// A registered cache worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    /// This life of the worker; messages of an older one are refused.
    pub(crate) incarnation: Incarnation,
    /// Data plane `host:port`.
    pub(crate) addr: String,
    /// Data-plane unix socket, empty if none.
    pub(crate) unix: String,
    /// Host name, to decide whether `unix` can be used.
    pub(crate) host: String,
    pub(crate) zone: String,
    pub(crate) capacity_bytes: u64,
    /// HTTP `host:port` of its metrics.
    pub(crate) metrics_addr: String,
    /// Silent for too long, or left.
    pub(crate) gone: bool,
    /// Kept out of the ring by an order that outlasts restarts, until undrain or leave.
    pub(crate) draining: bool,
}

impl Worker {
    /// Does it own keys?
    pub(crate) fn in_ring(&self) -> bool {
        !self.gone && !self.draining
    }
}

/// What a worker says of itself when it registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registration {
    pub(crate) id: WorkerId,
    pub(crate) addr: String,
    pub(crate) unix: String,
    pub(crate) host: String,
    pub(crate) zone: String,
    pub(crate) capacity_bytes: u64,
    pub(crate) metrics_addr: String,
}

/// One source in a dataset's tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mount {
    pub(crate) path: String,
    /// `efc_common::source::SourceSpec` as JSON, checked when the dataset was made; kept as text, so that a master does not
    /// need to know the options of newer clients.
    pub(crate) source_json: String,
    pub(crate) read_only: bool,
}

/// A named tree of sources.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Dataset {
    pub(crate) name: String,
    /// Set by apply.
    pub(crate) id: u64,
    pub(crate) mounts: Vec<Mount>,
    /// `ttl=SECONDS` or `immutable`.
    pub(crate) consistency: String,
    /// Cached data expires after this, seconds; 0: never.
    pub(crate) cache_ttl_seconds: u64,
    pub(crate) cache_pin: bool,
    /// Unix time, ms, of the leader that took the request.
    pub(crate) created_ms: u64,
}

/// One mounted client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) incarnation: Incarnation,
    pub(crate) client: String,
    pub(crate) dataset: String,
    /// What it believes ends after so much silence; 0: it holds no leases.
    #[serde(default)]
    pub(crate) lease_ms: u64,
}

/// All that the master group agrees on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    cluster: String,
    epoch: RingEpoch,
    /// The last number handed out; shared by workers and sessions.
    last_incarnation: u64,
    last_dataset: u64,
    last_session: u64,
    workers: BTreeMap<WorkerId, Worker>,
    datasets: BTreeMap<String, Dataset>,
    sessions: BTreeMap<SessionId, Session>,
    /// Counts the leaders' times. Raft's term cannot stand for it: a leader that was killed and comes back quickly goes on in its old term, but
    /// has forgotten every lease.
    #[serde(default)]
    office: u64,
}

impl State {
    /// Cluster id; empty before the first leader has named the cluster.
    pub(crate) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Epoch of the worker ring.
    pub(crate) fn epoch(&self) -> RingEpoch {
        self.epoch
    }

    /// All workers known, by id; those gone too.
    pub(crate) fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.workers.values()
    }

    /// One worker.
    pub(crate) fn worker(&self, id: &WorkerId) -> Option<&Worker> {
        self.workers.get(id)
    }

    /// Datasets by name.
    pub(crate) fn datasets(&self) -> &BTreeMap<String, Dataset> {
        &self.datasets
    }

    /// Sessions by number.
    pub(crate) fn sessions(&self) -> &BTreeMap<SessionId, Session> {
        &self.sessions
    }

    /// The office that was taken last.
    pub(crate) fn office(&self) -> u64 {
        self.office
    }

    /// The state as bytes of a snapshot.
    ///
    /// # Errors
    /// Only if serialisation fails, which it does not for these types.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        encode(self)
    }

    /// The state from bytes of a snapshot.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for bytes of another format.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        decode(bytes)
    }
}

/// Format byte, then JSON: it is small, and tolerates fields added later.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let mut out = vec![FORMAT];
    serde_json::to_writer(&mut out, value).map_err(|e| Error::new(Kind::Io, "encode a record").caused_by(e))?;
    Ok(out)
}

/// Inverse of [`encode`].
pub(crate) fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    match bytes.split_first() {
        Some((&FORMAT, json)) => serde_json::from_slice(json).map_err(|e| {
            Error::new(Kind::Corrupt, "a record does not parse: it was written by a newer efc-master, or is damaged")
                .caused_by(e)
        }),
        Some((other, _)) => {
            Err(Error::new(Kind::Corrupt, format!("record format {other} is unknown to this efc-master; upgrade it")))
        }
        None => Err(Error::new(Kind::Corrupt, "an empty record")),
    }
}
