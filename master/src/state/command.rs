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
    /// A client mounts, or takes its session `resume` over after a restart (0: new).
    OpenSession { client: String, dataset: String, resume: SessionId },
    /// A client unmounts.
    CloseSession { session: SessionId, incarnation: Incarnation },
    /// The coordinator found it silent for too long.
    ExpireSession { session: SessionId, incarnation: Incarnation },
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
    /// Nothing was changed, and why.
    Refused { why: Why, message: String },
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
