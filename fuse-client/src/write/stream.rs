//! Uploading behind a writer who writes a file from its start in order: each part that is full goes to the store while the next is being written.
//!
//! What was sent stays staged until the file is committed, so a later write into a part that is gone already only makes it to be sent again. Parts have fixed places:
//! the first thousand are 8 MiB long, the others 64 MiB.

use super::file::Open;
use super::file::{FILE_BYTES_MAX, Inner};
use super::ledger::Upload;
use super::{Core, UPLOAD_UNIT};
use efc_backend::objects::{Metadata, Part};
use efc_common::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;

/// Files up to this length are one PUT, bytes.
pub(super) const PUT_BYTES_MAX: u64 = 16 << 20;
const SMALL_PARTS: u64 = 1000;
const SMALL: u64 = 8 << 20;
const LARGE: u64 = 64 << 20;

/// Where the part of a number (from 1) lies.
pub(super) fn part_range(number: u32) -> Range<u64> {
    let n = u64::from(number) - 1;
    if n < SMALL_PARTS {
        return n * SMALL..(n + 1) * SMALL;
    }
    let start = SMALL_PARTS * SMALL + (n - SMALL_PARTS) * LARGE;
    start..start + LARGE
}

/// The parts of a file.
pub(super) fn parts(size: u64) -> impl Iterator<Item = (u32, Range<u64>)> {
    let ranges = (1u32..).map(|n| (n, part_range(n)));
    ranges.take_while(move |(_, r)| r.start < size).map(move |(n, r)| (n, r.start..r.end.min(size)))
}

struct Sent {
    task: JoinHandle<Result<Part>>,
    /// Its bytes are still those of the file.
    valid: bool,
}

/// An upload under way.
pub(super) struct Stream {
    pub(super) upload: Upload,
    /// What the object gets.
    pub(super) metadata: Metadata,
    sent: BTreeMap<u32, Sent>,
    next: u32,
}

impl Stream {
    pub(super) fn new(upload: Upload, metadata: Metadata) -> Stream {
        Stream { upload, metadata, sent: BTreeMap::new(), next: 1 }
    }

    /// Bytes of the file are others now.
    pub(super) fn changed(&mut self, range: &Range<u64>) {
        for (number, sent) in &mut self.sent {
            let part = part_range(*number);
            sent.valid &= range.end <= part.start || part.end <= range.start;
        }
    }

    /// The part if it was sent and is still right; waits for its request. One whose bytes changed is waited for as well, so that it cannot
    /// arrive after what replaces it.
    pub(super) async fn part(&mut self, number: u32) -> Result<Option<Part>> {
        let Some(sent) = self.sent.remove(&number) else { return Ok(None) };
        let outcome = sent.task.await;
        match (sent.valid, outcome) {
            (false, _) => Ok(None),
            (true, Ok(part)) => part.map(Some),
            (true, Err(e)) => Err(Error::new(Kind::Cancelled, "an upload was interrupted").caused_by(e)),
        }
    }

    /// Waits for what is under way, whatever comes of it.
    pub(super) async fn quiet(&mut self) {
        for (_, sent) in std::mem::take(&mut self.sent) {
            sent.task.abort();
            // What it came to does not matter: the upload is thrown away.
            let _ = sent.task.await;
        }
    }
}

impl Core {
    /// Room on the way to the store for `bytes`.
    pub(super) async fn room(&self, bytes: u64) -> Result<OwnedSemaphorePermit> {
        let units = bytes.div_ceil(UPLOAD_UNIT).clamp(1, super::UPLOAD_UNITS as u64) as u32;
        let permit = self.uploads.clone().acquire_many_owned(units).await;
        permit.map_err(|e| Error::new(Kind::Cancelled, "the mount ends").caused_by(e))
    }

    /// Throws the upload of a file away, if there is one.
    pub(super) async fn drop_stream(&self, inner: &mut Inner) {
        let Some(mut stream) = inner.stream.take() else { return };
        stream.quiet().await;
        match self.objects.abort(&inner.locator, &stream.upload.id).await {
            Ok(()) => self.ended(&stream.upload),
            // It stays in the ledger.
            Err(e) => tracing::debug!(error = %e, "an upload stays open"),
        }
    }
}

impl Open {
    /// Sends the parts that are full, if the file is written in order. What fails here is told at the commit.
    pub(super) async fn advance(&self, inner: &mut Inner) {
        let staged = inner.draft.staged_to();
        if inner.removed || inner.draft.needs_base() || staged <= PUT_BYTES_MAX || staged > FILE_BYTES_MAX {
            return;
        }
        if let Err(e) = self.send_full(inner, staged).await {
            tracing::info!(error = %e, "an upload behind the writer is given up, the commit sends everything");
            self.core.drop_stream(inner).await;
        }
    }

    async fn send_full(&self, inner: &mut Inner, staged: u64) -> Result<()> {
        let core = &self.core;
        if inner.stream.is_none() {
            if part_range(1).end < core.limits().await?.part_bytes_min {
                return Ok(());
            }
            // The time of the last write is not known yet: the store's own has to do.
            let marked = Metadata { mtime: None, ..inner.marked() };
            let upload = core.begin(&inner.locator, &marked).await?;
            let metadata = Metadata { mtime: None, ..inner.metadata.clone() };
            inner.stream = Some(Stream::new(upload, metadata));
        }
        while let Some(next) = inner.stream.as_ref().map(|s| s.next) {
            let range = part_range(next);
            if range.end > staged {
                break;
            }
            let room = core.room(range.end - range.start).await?;
            let data = inner.staging.pieces(range).await?;
            let Some(stream) = &mut inner.stream else { break };
            let (objects, locator, upload) = (core.objects.clone(), inner.locator.clone(), stream.upload.id.clone());
            let send = async move {
                let _room = room;
                objects.part(&locator, &upload, next, data).await
            };
            stream.sent.insert(next, Sent { task: tokio::spawn(send), valid: true });
            stream.next = next + 1;
        }
        Ok(())
    }
}
