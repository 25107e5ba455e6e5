//! The Raft log and vote over RocksDB, as openraft wants them (its `RaftLogStorage` documents the duties).
//!
//! Vote, append and truncate are synced before they are reported; `committed` and purge are not: losing them costs a replay, never data.

use super::db::Db;
use super::types::{Entry, LogId, StorageError, StorageIOError, TypeConfig, Vote};
use crate::state::{decode, encode};
use efc_common::{Error, Kind};
use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{AnyError, OptionalSend, RaftLogId, RaftLogReader};
use rocksdb::{Direction, IteratorMode, WriteBatch};
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};

/// Entries of one replication message together, bytes.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Log and vote of this node. Clones share the database; openraft serialises the writes.
#[derive(Clone)]
pub(crate) struct LogStore {
    db: Db,
}

fn read_failed(e: Error) -> StorageError {
    StorageIOError::read_logs(AnyError::new(&e)).into()
}

fn write_failed(e: Error) -> StorageError {
    StorageIOError::write_logs(AnyError::new(&e)).into()
}

fn index_of(key: &[u8]) -> efc_common::Result<u64> {
    let bytes = key.try_into().map_err(|_| Error::new(Kind::Corrupt, "a log key that is not 8 bytes long"))?;
    Ok(u64::from_be_bytes(bytes))
}

impl LogStore {
    /// The log in `db`.
    pub(crate) fn new(db: Db) -> Self {
        LogStore { db }
    }

    /// Entries `from..until`, stopping early after `bytes_max`, but not before the first.
    fn entries(&self, from: u64, until: u64, bytes_max: usize) -> efc_common::Result<Vec<Entry>> {
        let start = from.to_be_bytes();
        let mut out = Vec::new();
        let mut bytes = 0;
        let mode = IteratorMode::From(&start, Direction::Forward);
        for item in self.db.raw().iterator_cf(self.db.family("log")?, mode) {
            let (key, value) = item.map_err(|e| Error::new(Kind::Io, "read the log").caused_by(e))?;
            if index_of(&key)? >= until || (bytes > 0 && bytes + value.len() > bytes_max) {
                break;
            }
            bytes += value.len();
            out.push(decode(&value)?);
        }
        Ok(out)
    }

    fn state(&self) -> efc_common::Result<LogState<TypeConfig>> {
        let last_purged_log_id = self.db.get::<LogId>("meta", b"purged")?;
        let last = match self.db.raw().iterator_cf(self.db.family("log")?, IteratorMode::End).next() {
            None => None,
            Some(Err(e)) => return Err(Error::new(Kind::Io, "read the log").caused_by(e)),
            Some(Ok((_, value))) => Some(*decode::<Entry>(&value)?.get_log_id()),
        };
        Ok(LogState { last_purged_log_id, last_log_id: last.or(last_purged_log_id) })
    }

    fn append_batch(&self, entries: impl IntoIterator<Item = Entry>) -> efc_common::Result<WriteBatch> {
        let family = self.db.family("log")?;
        let mut batch = WriteBatch::default();
        for e in entries {
            batch.put_cf(family, e.log_id.index.to_be_bytes(), encode(&e)?);
        }
        Ok(batch)
    }

    fn truncate_batch(&self, from: u64) -> efc_common::Result<WriteBatch> {
        let mut batch = WriteBatch::default();
        // The end is exclusive; no log reaches the last number.
        batch.delete_range_cf(self.db.family("log")?, from.to_be_bytes(), u64::MAX.to_be_bytes());
        Ok(batch)
    }

    fn purge_batch(&self, upto: LogId) -> efc_common::Result<WriteBatch> {
        let mut batch = WriteBatch::default();
        batch.delete_range_cf(self.db.family("log")?, 0u64.to_be_bytes(), (upto.index + 1).to_be_bytes());
        batch.put_cf(self.db.family("meta")?, b"purged", encode(&upto)?);
        Ok(batch)
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        let from = match range.start_bound() {
            Bound::Included(i) => *i,
            Bound::Excluded(i) => i + 1,
            Bound::Unbounded => 0,
        };
        let until = match range.end_bound() {
            Bound::Included(i) => i + 1,
            Bound::Excluded(i) => *i,
            Bound::Unbounded => u64::MAX,
        };
        self.entries(from, until, usize::MAX).map_err(read_failed)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, StorageError> {
        self.entries(start, end, MESSAGE_BYTES_MAX).map_err(read_failed)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        self.state().map_err(read_failed)
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        let write = async {
            let mut batch = WriteBatch::default();
            batch.put_cf(self.db.family("meta")?, b"vote", encode(vote)?);
            self.db.write_durably(batch).await
        };
        write.await.map_err(|e| StorageIOError::write_vote(AnyError::new(&e)).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        self.db.get("meta", b"vote").map_err(|e| StorageIOError::read_vote(AnyError::new(&e)).into())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        self.db.put("meta", b"committed", &committed, false).map_err(write_failed)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        Ok(self.db.get::<Option<LogId>>("meta", b"committed").map_err(read_failed)?.flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let batch = self.append_batch(entries).map_err(write_failed)?;
        self.db.write_durably(batch).await.map_err(write_failed)?;
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let batch = self.truncate_batch(log_id.index).map_err(write_failed)?;
        self.db.write_durably(batch).await.map_err(write_failed)
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let batch = self.purge_batch(log_id).map_err(write_failed)?;
        self.db.write(batch, false).map_err(write_failed)
    }
}
