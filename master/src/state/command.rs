//! What can happen to the replicated state, and what comes of it. Commands are stored in the Raft log: variants and fields are only
//! ever added, and added fields have a default (`docs/FORMATS.md`). Time and random numbers enter here, chosen by the leader.

use super::{Dataset, Registration};
use efc_common::id::{Incarnation, RingEpoch, SessionId, WorkerId};
use efc_common::{Error, Kind};
use serde::{Deserialize, Serialize};

/// A change of the replicated state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Command {
    /// Names the cluster, once: later ones change nothing.
    Found { cluster: String },
    /// A worker begins a new life.
    RegisterWorker(Registration),
    /// Takes a worker out of the ring, or puts it back. Incarnation 0: whichever life it is in.
    DrainWorker { id: WorkerId, incarnation: Incarnation, draining: bool },
    /// A worker says goodbye.
    LeaveWorker { id: WorkerId, incarnation: Incarnation },
    /// An administrator forgets a worker that is gone.
    ForgetWorker { id: WorkerId },
    /// The coordinator found it silent for too long.
    ExpireWorker { id: WorkerId, incarnation: Incarnation },
    /// Makes a dataset; `id` of the value is ignored.
    CreateDataset(Dataset),
    /// Removes a dataset that no session uses.
    DeleteDataset { name: String },
    /// A client mounts, or begins a new life of its session `resume` (0: new). A compare-and-set on the life it knows, so that a late copy
    /// begins nothing (entries from before there was `incarnation` have 0 and compare nothing).
    OpenSession {
        client: String,
        dataset: String,
        resume: SessionId,
        #[serde(default)]
        incarnation: Incarnation,
        /// The lease time of the leader that took the request; 0: a session without leases.
        #[serde(default)]
        lease_ms: u64,
    },
    /// A client unmounts.
    CloseSession { session: SessionId, incarnation: Incarnation },
    /// It was silent for too long. Of a session that leases: as this office heard it, and only while that is the last one taken (0: any).
    ExpireSession {
        session: SessionId,
        incarnation: Incarnation,
        #[serde(default)]
        office: u64,
    },
    /// A leader takes office.
    TakeOffice,
}

/// What applying a command gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// Nothing to tell (also of log entries that carry no command).
    Done,
    /// The worker's life and the ring epoch after the command.
    Worker { incarnation: Incarnation, epoch: RingEpoch },
    /// The dataset that was made, found or removed.
    Dataset(Dataset),
    /// The session that was opened.
    Session { session: SessionId, incarnation: Incarnation },
    /// The office that was taken.
    Office { office: u64 },
    /// Nothing was changed, and why.
    Refused { why: Why, message: String },
}

/// What a command did to the life of a session, for those who keep its leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// It began (and ended the one before).
    Begun(SessionId, Incarnation),
    /// It ended, and every one before.
    Ended(SessionId, Incarnation),
}

/// Why a command was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Why {
    NotFound,
    AlreadyExists,
    Stale,
    Busy,
    Exhausted,
}

impl Outcome {
    pub(super) fn refused(why: Why, message: impl Into<String>) -> Self {
        Outcome::Refused { why, message: message.into() }
    }

    /// A refusal as the house's error.
    pub(crate) fn into_result(self) -> efc_common::Result<Outcome> {
        match self {
            Outcome::Refused { why, message } => {
                let kind = match why {
                    Why::NotFound => Kind::NotFound,
                    Why::AlreadyExists => Kind::AlreadyExists,
                    Why::Stale => Kind::Stale,
                    Why::Busy => Kind::Busy,
                    Why::Exhausted => Kind::Exhausted,
                };
                Err(Error::new(kind, message).with_retry(efc_common::Retry::Never))
            }
            o => Ok(o),
        }
    }
}
