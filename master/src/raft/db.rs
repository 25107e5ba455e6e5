//! One RocksDB per master: column families `log` (entries by index, big-endian), `meta` (identity, vote, committed, purged) and
//! `snapshot` (the current one). `docs/FORMATS.md` has the bytes.
//!
//! The directory is locked while open; two processes cannot share it.

use crate::state::{decode, encode};
use efc_common::{Error, Kind, Result};
use rocksdb::{
    ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, LogLevel, Options, WriteBatch, WriteOptions,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

const FAMILIES: [&str; 3] = ["log", "meta", "snapshot"];
const WRITE_BUFFER_BYTES: usize = 4 << 20;
const WAL_BYTES_MAX: u64 = 32 << 20;
const OPEN_FILES_MAX: i32 = 64;

/// Whose data directory this is. Written once, when the directory is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Node id.
    pub(crate) node: u64,
    /// Random, never 0.
    pub(crate) store: u64,
}

/// The open database; clones share it.
#[derive(Clone)]
pub(crate) struct Db {
    db: Arc<DB>,
}

fn failed(what: &str, e: rocksdb::Error) -> Error {
    Error::new(Kind::Io, format!("{what} the master's database")).caused_by(e)
}

impl Db {
    /// Opens or makes the database in `dir` for `node`.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the directory belongs to another node, [`Kind::Busy`] if a process has it open, else the I/O error.
    pub(crate) fn open(dir: &Path, node: u64) -> Result<(Self, Identity)> {
        std::fs::create_dir_all(dir).map_err(|e| Error::from(e).with("data-dir", dir.display()))?;
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_write_buffer_size(WRITE_BUFFER_BYTES);
        options.set_max_total_wal_size(WAL_BYTES_MAX);
        options.set_max_open_files(OPEN_FILES_MAX);
        options.set_keep_log_file_num(2);
        options.set_log_level(LogLevel::Warn);
        options.set_compression_type(DBCompressionType::None);
        let family = |name: &&str| {
            let mut o = Options::default();
            o.set_write_buffer_size(WRITE_BUFFER_BYTES);
            o.set_compression_type(DBCompressionType::None);
            ColumnFamilyDescriptor::new(*name, o)
        };
        let db = DB::open_cf_descriptors(&options, dir.join("raft"), FAMILIES.iter().map(family)).map_err(|e| {
            let e = match e.to_string().contains("lock") {
                true => Error::new(Kind::Busy, "another efc-master has this data directory open").caused_by(e),
                false => failed("open", e),
            };
            e.with("data-dir", dir.display())
        })?;
        let db = Db { db: Arc::new(db) };
        let identity = match db.get::<Identity>("meta", b"identity")? {
            Some(i) => i,
            None => {
                let made = Identity { node, store: rand::random_range(1..u64::MAX) };
                db.put("meta", b"identity", &made, true)?;
                made
            }
        };
        if identity.node != node {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "the data directory belongs to node {}; give --node-id {0} or another --data-dir",
                    identity.node
                ),
            )
            .with("data-dir", dir.display()));
        }
        Ok((db, identity))
    }

    /// A column family that `open` made.
    pub(crate) fn family(&self, name: &'static str) -> Result<&ColumnFamily> {
        self.db.cf_handle(name).ok_or_else(|| Error::new(Kind::Corrupt, format!("the database has no family `{name}`")))
    }

    /// The raw database, for iterators.
    pub(crate) fn raw(&self) -> &DB {
        &self.db
    }

    /// A decoded record.
    pub(crate) fn get<T: DeserializeOwned>(&self, family: &'static str, key: &[u8]) -> Result<Option<T>> {
        match self.get_bytes(family, key)? {
            Some(bytes) => Ok(Some(decode(&bytes)?)),
            None => Ok(None),
        }
    }

    /// A record's bytes.
    pub(crate) fn get_bytes(&self, family: &'static str, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.db.get_cf(self.family(family)?, key).map_err(|e| failed("read", e))
    }

    /// Stores a record; with `sync` it is on disk at return.
    pub(crate) fn put<T: Serialize>(&self, family: &'static str, key: &[u8], value: &T, sync: bool) -> Result<()> {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(family)?, key, encode(value)?);
        self.write(batch, sync)
    }

    /// Writes a batch atomically; with `sync` it is on disk at return.
    pub(crate) fn write(&self, batch: WriteBatch, sync: bool) -> Result<()> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.db.write_opt(batch, &options).map_err(|e| failed("write", e))
    }

    /// The same on a thread that may block: an fsync can take long.
    pub(crate) async fn write_durably(&self, batch: WriteBatch) -> Result<()> {
        let db = self.clone();
        tokio::task::spawn_blocking(move || db.write(batch, true))
            .await
            .map_err(|e| Error::new(Kind::Io, "a database write ended early").caused_by(e))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_owner() {
        let dir = tempfile::tempdir().expect("dir");
        let (db, first) = Db::open(dir.path(), 1).expect("open");
        assert!(Db::open(dir.path(), 1).is_err_and(|e| e.is(Kind::Busy)));
        drop(db);
        assert!(Db::open(dir.path(), 2).is_err_and(|e| e.is(Kind::Invalid)));
        let (_db, again) = Db::open(dir.path(), 1).expect("again");
        assert_eq!(first, again);
    }
}
