//! The state machine openraft drives: it applies committed entries to the replicated [`State`] in memory and keeps snapshots on disk.
//!
//! Apply touches no disk: after a crash the state is rebuilt from the last snapshot and the committed log behind it, which purging never
//! removes before the snapshot is synced. Readers take a short read lock.

use super::db::Db;
use super::types::{Entry, LogId, Snapshot, SnapshotMeta, StorageError, StorageIOError, Stored, TypeConfig};
use crate::state::{Life, Outcome, State, decode, encode};
use efc_common::{Error, Kind, Result};
use openraft::storage::RaftStateMachine;
use openraft::{AnyError, EntryPayload, OptionalSend, RaftSnapshotBuilder};
use parking_lot::{Mutex, RwLock};
use rocksdb::WriteBatch;
use std::io::Cursor;
use std::sync::Arc;
use tokio::sync::{broadcast, watch};

/// Lives that wait to be taken up by the leases. A desk that falls behind further resigns.
const LIVES_QUEUE: usize = 4096;

#[derive(Default)]
struct Applied {
    state: State,
    last: Option<LogId>,
    membership: Stored,
}

struct Shared {
    db: Db,
    applied: RwLock<Applied>,
    /// What the stored snapshot covers. Held over the write (on a blocking thread): a snapshot that was being built must not
    /// replace a newer one that was installed meanwhile, as the log behind that one may be purged.
    stored: Mutex<Option<LogId>>,
    /// Ring epoch: wakes long polls.
    epoch: watch::Sender<u64>,
    /// Begun and ended lives of sessions that lease, in the order of the log. Sent under the lock of `applied`.
    lives: broadcast::Sender<Life>,
}

/// Handle of the state machine; clones share it.
#[derive(Clone)]
pub(crate) struct Machine {
    shared: Arc<Shared>,
}

/// A snapshot as stored: what it covers, then the state's bytes.
fn pack(meta: &SnapshotMeta, state: &[u8]) -> Result<Vec<u8>> {
    let head = encode(meta)?;
    let mut out = Vec::with_capacity(4 + head.len() + state.len());
    out.extend_from_slice(&(head.len() as u32).to_le_bytes());
    out.extend_from_slice(&head);
    out.extend_from_slice(state);
    Ok(out)
}

fn unpack(bytes: &[u8]) -> Result<(SnapshotMeta, &[u8])> {
    let cut = || Error::new(Kind::Corrupt, "the stored snapshot is cut short");
    let (len, rest) = bytes.split_first_chunk::<4>().ok_or_else(cut)?;
    let (head, state) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(cut)?;
    Ok((decode(head)?, state))
}

fn read_failed(e: Error) -> StorageError {
    StorageIOError::read_snapshot(None, AnyError::new(&e)).into()
}

fn write_failed(e: Error) -> StorageError {
    StorageIOError::write_snapshot(None, AnyError::new(&e)).into()
}

impl Machine {
    /// The state of the last snapshot in `db`, or the empty one.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if the snapshot does not parse.
    pub(crate) fn open(db: Db) -> Result<Self> {
        let applied = match db.get_bytes("snapshot", b"current")? {
            None => Applied::default(),
            Some(bytes) => {
                let (meta, state) = unpack(&bytes)?;
                Applied { state: State::decode(state)?, last: meta.last_log_id, membership: meta.last_membership }
            }
        };
        let (epoch, _) = watch::channel(applied.state.epoch().0);
        let stored = Mutex::new(applied.last);
        let (lives, _) = broadcast::channel(LIVES_QUEUE);
        Ok(Machine { shared: Arc::new(Shared { db, applied: RwLock::new(applied), stored, epoch, lives }) })
    }

    /// Looks at the applied state. `look` must be short: it holds up apply.
    pub(crate) fn read<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        look(&self.shared.applied.read().state)
    }

    /// The ring epoch, and its changes.
    pub(crate) fn epochs(&self) -> watch::Receiver<u64> {
        self.shared.epoch.subscribe()
    }

    /// Looks at the applied state; what changes in the lives of sessions after that look comes from the receiver.
    pub(crate) fn read_and_follow<R>(&self, look: impl FnOnce(&State) -> R) -> (R, broadcast::Receiver<Life>) {
        let applied = self.shared.applied.read();
        (look(&applied.state), self.shared.lives.subscribe())
    }

    fn publish(&self, epoch: u64) {
        self.shared.epoch.send_if_modified(|e| std::mem::replace(e, epoch) != epoch);
    }

    async fn store_snapshot(&self, meta: &SnapshotMeta, state: &[u8]) -> Result<()> {
        let bytes = pack(meta, state)?;
        let (shared, covers) = (self.shared.clone(), meta.last_log_id);
        let write = move || {
            let mut stored = shared.stored.lock();
            if *stored > covers {
                return Ok(());
            }
            let mut batch = WriteBatch::default();
            batch.put_cf(shared.db.family("snapshot")?, b"current", bytes);
            shared.db.write(batch, true)?;
            *stored = covers;
            Ok(())
        };
        let ended = |e| Error::new(Kind::Io, "writing a snapshot ended early").caused_by(e);
        tokio::task::spawn_blocking(write).await.map_err(ended)?
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Machine {
    async fn build_snapshot(&mut self) -> std::result::Result<Snapshot, StorageError> {
        let (meta, bytes) = {
            let a = self.shared.applied.read();
            let snapshot_id = a.last.map_or_else(|| "empty".into(), |l| l.to_string());
            let meta = SnapshotMeta { last_log_id: a.last, last_membership: a.membership.clone(), snapshot_id };
            (meta, a.state.encode().map_err(write_failed)?)
        };
        self.store_snapshot(&meta, &bytes).await.map_err(write_failed)?;
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(bytes)) })
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> std::result::Result<(Option<LogId>, Stored), StorageError> {
        let a = self.shared.applied.read();
        Ok((a.last, a.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> std::result::Result<Vec<Outcome>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let (outcomes, epoch) = {
            let mut a = self.shared.applied.write();
            let mut outcomes = Vec::new();
            for e in entries {
                a.last = Some(e.log_id);
                outcomes.push(match e.payload {
                    EntryPayload::Blank => Outcome::Done,
                    EntryPayload::Normal(command) => {
                        let outcome = a.state.apply(&command);
                        if let Some(life) = a.state.life_after(&command, &outcome) {
                            // Nobody listens on a master that does not lead.
                            let _ = self.shared.lives.send(life);
                        }
                        outcome
                    }
                    EntryPayload::Membership(m) => {
                        a.membership = Stored::new(Some(e.log_id), m);
                        Outcome::Done
                    }
                });
            }
            (outcomes, a.state.epoch().0)
        };
        self.publish(epoch);
        Ok(outcomes)
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> std::result::Result<Box<Cursor<Vec<u8>>>, StorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> std::result::Result<(), StorageError> {
        let bytes = snapshot.into_inner();
        let state = State::decode(&bytes).map_err(read_failed)?;
        self.store_snapshot(meta, &bytes).await.map_err(write_failed)?;
        tracing::info!(upto = meta.last_log_id.map_or(0, |l| l.index), "took over a snapshot from the leader");
        let epoch = state.epoch().0;
        *self.shared.applied.write() =
            Applied { state, last: meta.last_log_id, membership: meta.last_membership.clone() };
        self.publish(epoch);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> std::result::Result<Option<Snapshot>, StorageError> {
        let Some(bytes) = self.shared.db.get_bytes("snapshot", b"current").map_err(read_failed)? else {
            return Ok(None);
        };
        let (meta, state) = unpack(&bytes).map_err(read_failed)?;
        Ok(Some(Snapshot { meta, snapshot: Box::new(Cursor::new(state.to_vec())) }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::log_store::LogStore;
    use super::*;
    use openraft::testing::{StoreBuilder, Suite};

    struct Stores;

    impl StoreBuilder<TypeConfig, LogStore, Machine, tempfile::TempDir> for Stores {
        async fn build(&self) -> std::result::Result<(tempfile::TempDir, LogStore, Machine), StorageError> {
            let dir = tempfile::tempdir().expect("dir");
            let (db, _) = Db::open(dir.path(), 1).expect("open");
            Ok((dir, LogStore::new(db.clone()), Machine::open(db).expect("machine")))
        }
    }

    #[test]
    fn openraft_suite() {
        Suite::test_all(Stores).expect("openraft's storage suite");
    }

    #[test]
    fn a_damaged_snapshot_is_an_error() {
        let meta = SnapshotMeta::default();
        let bytes = pack(&meta, b"x").expect("pack");
        assert_eq!(unpack(&bytes).expect("unpack"), (meta, &b"x"[..]));
        for n in 0..4 {
            assert!(unpack(&bytes[..n]).is_err());
        }
        assert!(unpack(&bytes[..10]).is_err());
    }
}
