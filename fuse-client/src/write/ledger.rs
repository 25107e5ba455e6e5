//! The uploads that a mount has open, written down at the store itself, so that those of a mount that died are found and thrown away: their parts cost
//! money and no listing shows them.
//!
//! The ledger is an object `.efc/uploads-ID` at the root of the mount. A key is entered before its upload is begun, the upload's id with the next writing. As long as there are
//! any it is rewritten every few seconds, on condition of its version; one that was not for a while is taken over in the same way by who finds it, and its uploads are aborted.
//! A mount that was only asleep then loses uploads, never bytes: what they were made of is staged until the file is committed, and is sent again.

use super::journal::{Found, dead_before};
use super::{Core, ObjectTree};
use bytes::Bytes;
use efc_backend::objects::{Condition, Metadata, UploadId};
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Names of ledgers begin so.
const KIND: &str = "uploads-";
/// How often it is rewritten, and how long an empty one stays.
const BEAT: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    key: Vec<u8>,
    upload: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    uploads: Vec<Entry>,
    /// Differs from each time to the next, so that the version does.
    beat: u64,
}

#[derive(Default)]
struct Open {
    /// By ticket.
    entries: BTreeMap<u64, Entry>,
    tickets: u64,
}

/// The object as it was written last.
#[derive(Default)]
struct Written {
    at: Option<(Bytes, Bytes)>,
    /// Tickets up to this one were given out when it was written.
    tickets: u64,
}

/// The ledger of this mount.
#[derive(Default)]
pub(super) struct Ledger {
    open: Mutex<Open>,
    written: tokio::sync::Mutex<Written>,
}

/// An upload that was begun and is in the ledger.
#[derive(Debug, Clone)]
pub(super) struct Upload {
    pub(super) id: UploadId,
    ticket: u64,
}

impl Core {
    /// Begins an upload, which the ledger knows of.
    pub(super) async fn begin(&self, locator: &Bytes, metadata: &Metadata) -> Result<Upload> {
        let ticket = {
            let mut open = self.ledger.open.lock();
            open.tickets += 1;
            let ticket = open.tickets;
            open.entries.insert(ticket, Entry { key: locator.to_vec(), upload: None });
            ticket
        };
        let begun = async {
            let mut written = self.ledger.written.lock().await;
            // Who waited behind another writer finds itself written.
            if written.tickets < ticket {
                self.write_ledger(&mut written).await?;
            }
            drop(written);
            self.objects.begin(locator, metadata).await
        };
        match begun.await {
            Ok(id) => {
                if let Some(entry) = self.ledger.open.lock().entries.get_mut(&ticket) {
                    entry.upload = Some(id.0.clone());
                }
                Ok(Upload { id, ticket })
            }
            Err(e) => {
                // Where it may have been begun all the same it stays, and who comes after this mount looks.
                let unclear = matches!(e.kind(), Kind::Timeout | Kind::Unavailable | Kind::Io | Kind::Cancelled);
                if !unclear {
                    self.ledger.open.lock().entries.remove(&ticket);
                }
                Err(e)
            }
        }
    }

    /// An upload was completed or aborted.
    pub(super) fn ended(&self, upload: &Upload) {
        self.ledger.open.lock().entries.remove(&upload.ticket);
    }

    async fn write_ledger(&self, written: &mut Written) -> Result<()> {
        let (uploads, tickets) = {
            let open = self.ledger.open.lock();
            (open.entries.values().cloned().collect(), open.tickets)
        };
        let record = Record { uploads, beat: rand::random() };
        let fresh = || (self.new_journal(KIND), Condition::Absent);
        let ours = written.at.clone().map(|(locator, version)| (locator, Condition::Version(version)));
        let (mut locator, condition) = ours.unwrap_or_else(fresh);
        let version = match self.put_journal(&locator, &record, &condition).await {
            Err(e) if e.is(Kind::Conflict) => {
                tracing::warn!(error = %e, "another mount took this one for dead; uploads under way are sent again");
                let condition;
                (locator, condition) = fresh();
                self.put_journal(&locator, &record, &condition).await?
            }
            other => other?,
        };
        *written = Written { at: Some((locator, version)), tickets };
        Ok(())
    }

    /// Says that the mount lives, or takes an empty ledger away.
    pub(super) async fn beat_ledger(&self) -> Result<()> {
        let mut written = self.ledger.written.lock().await;
        if !self.ledger.open.lock().entries.is_empty() {
            return self.write_ledger(&mut written).await;
        }
        match written.at.take() {
            Some((locator, _)) => Core::deleted(self.objects.delete(&[locator]).await?),
            None => Ok(()),
        }
    }

    /// Deletes what mounts left that died while they found out what the store can do; `own` is all there is below `.efc/`.
    async fn sweep_probes(&self, own: &[Node], dead_after: Duration) -> Result<()> {
        let (prefix, before) = (self.journals("probe-"), dead_before(dead_after));
        let probes = own.iter().filter(|n| n.locator.starts_with(&prefix) && n.attr.mtime.secs <= before);
        let probes: Vec<Bytes> = probes.map(|n| n.locator.clone()).collect();
        if !probes.is_empty() {
            Core::deleted(self.objects.delete(&probes).await?)?;
        }
        let open = match self.objects.open_uploads().await {
            Err(e) if e.is(Kind::PermissionDenied) || e.is(Kind::Unsupported) => {
                tracing::debug!(error = %e, "open uploads cannot be listed");
                return Ok(());
            }
            open => open?,
        };
        for upload in open.iter().filter(|u| u.locator.starts_with(&prefix) && u.begun.secs <= before) {
            self.objects.abort(&upload.locator, &upload.id).await?;
        }
        Ok(())
    }

    /// Aborts what is in the ledger of a mount that died. True if it is done with, false if its owner seems to live.
    async fn sweep(&self, locator: &Bytes, dead_after: Duration) -> Result<bool> {
        let (version, written, text) = match self.find_journal(locator, dead_after).await? {
            Found::Gone => return Ok(true),
            Found::Alive => return Ok(false),
            Found::Dead { version, written, text } => (version, written, text),
        };
        let mut record: Record = serde_json::from_slice(&text)
            .map_err(|e| Error::new(Kind::Corrupt, "a ledger of uploads is not understood").caused_by(e))?;
        if !record.uploads.iter().all(|u| u.key.starts_with(&self.root)) {
            return Err(Error::new(Kind::Corrupt, "a ledger names places outside the mount"));
        }
        record.beat = rand::random();
        match self.put_journal(locator, &record, &Condition::Version(version)).await {
            // Another mount was faster, or its owner lives.
            Err(e) if e.is(Kind::Conflict) => return Ok(false),
            taken => drop(taken?),
        }
        let mut aborted = 0;
        let (known, unknown): (Vec<Entry>, Vec<Entry>) = record.uploads.into_iter().partition(|u| u.upload.is_some());
        for entry in known {
            let id = UploadId(entry.upload.unwrap_or_default());
            self.objects.abort(&entry.key.into(), &id).await?;
            aborted += 1;
        }
        if !unknown.is_empty() {
            // Begun, if at all, after the ledger was written last, or while it was.
            let from = written - BEAT.as_secs() as i64;
            let keys: BTreeSet<Vec<u8>> = unknown.into_iter().map(|u| u.key).collect();
            for open in self.objects.open_uploads().await? {
                if keys.contains(&open.locator[..]) && open.begun.secs >= from {
                    self.objects.abort(&open.locator, &open.id).await?;
                    aborted += 1;
                }
            }
        }
        if aborted > 0 {
            tracing::info!(aborted, "uploads of a mount that died are thrown away");
        }
        Core::deleted(self.objects.delete(std::slice::from_ref(locator)).await?)?;
        Ok(true)
    }
}

impl ObjectTree {
    /// Aborts the uploads that mounts left open which have not been heard of for `dead_after`. How many ledgers are left because their mounts may live.
    ///
    /// # Errors
    /// What the store said.
    pub async fn sweep_uploads(&self, dead_after: Duration) -> Result<usize> {
        let core = &self.core;
        let ours = core.ledger.written.lock().await.at.as_ref().map(|(locator, _)| locator.clone());
        let own = core.nodes_below(&core.journals("")).await?;
        core.sweep_probes(&own, dead_after).await?;
        let (ledgers, mut left) = (core.journals(KIND), 0);
        for locator in own.iter().map(|n| &n.locator).filter(|k| k.starts_with(&ledgers) && Some(*k) != ours.as_ref()) {
            left += usize::from(!core.sweep(locator, dead_after).await?);
        }
        Ok(left)
    }

    pub(super) async fn keep_ledger(self) {
        loop {
            tokio::time::sleep(BEAT).await;
            if let Err(e) = self.core.beat_ledger().await {
                tracing::warn!(error = %e, "the ledger of open uploads cannot be written");
            }
        }
    }
}

/// What a mount leaves that dies with an upload open.
#[cfg(test)]
pub(super) async fn leave_open(core: &Core, key: &Bytes, begun: bool) {
    core.begin(key, &Metadata::default()).await.expect("begin");
    // Before the next beat the ledger has the key only.
    if begun {
        core.beat_ledger().await.expect("beat");
    }
}
