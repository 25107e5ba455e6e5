//! Open files of an NFSv3 export, and the data their server may still lose.
//!
//! A WRITE is UNSTABLE: the server answers when it has the data, and may lose it in a crash until a COMMIT. Every reply carries a verifier that
//! changes with the server's restart. So we keep what was written, each piece with its verifier, until a COMMIT answers with the same one; with another one
//! everything kept of the file is sent again, in its old order, and committed again. What is kept belongs to the *file*, not to the open file:
//! two writers of one mount share it, a change of the size commits it first, and it is dropped with the last open file (who closes without a sync
//! has no promise). All files of a mount together keep at most [`KEPT_BYTES_MAX`]; over it a file is committed first, and if others hold the
//! room, written stably, which needs no keeping.
//!
//! What another process wrote before us ([`OpenFile::resumed`]) is committed, too, but not kept: if the server restarted in between, it is lost, and we
//! cannot tell.
//!
//! We notice a restart only as well as the server tells: Ganesha's verifier is the second of its start, so two starts within one look alike.
//!
//! What must stay true: a piece is never sent again while younger WRITEs of the file are under way, and pieces that are sent again include all
//! younger ones that were answered.

use super::changes::{self, Verifier};
use super::rpc::Client;
use super::tree::unsupported;
use super::{READ_AHEAD, Shared, ops};
use crate::tree::{Allocate, Change, OpenFile};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use efc_common::metrics::counter;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, TryStreamExt, stream};
use nfs3_types::nfs3::fattr3;
use parking_lot::Mutex;
use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use tokio::sync::{Mutex as Turn, OwnedSemaphorePermit, RwLock, Semaphore};

/// Bytes kept for all files of a mount.
const KEPT_BYTES_MAX: usize = 64 * 1024 * 1024;
/// WRITEs in flight for one call.
const WRITES: usize = 4;
/// Rounds of sending everything again before the server counts as unavailable.
const ROUNDS: usize = 5;

/// What the server may lose, of all files.
pub(super) struct KeptFiles {
    room: Arc<Semaphore>,
    files: Mutex<HashMap<Bytes, Weak<Kept>>>,
}

impl Default for KeptFiles {
    fn default() -> Self {
        KeptFiles { room: Arc::new(Semaphore::new(KEPT_BYTES_MAX)), files: Mutex::default() }
    }
}

impl KeptFiles {
    /// What is kept of a file, if anybody has it open.
    pub(super) fn of(&self, file: &Bytes) -> Option<Arc<Kept>> {
        self.files.lock().get(file).and_then(Weak::upgrade)
    }

    /// The same for one more open file.
    fn open(&self, file: &Bytes) -> Arc<Kept> {
        let mut files = self.files.lock();
        if let Some(kept) = files.get(file).and_then(Weak::upgrade) {
            return kept;
        }
        // The dead are buried whenever the table would grow.
        if files.len() == files.capacity() {
            files.retain(|_, kept| kept.strong_count() > 0);
        }
        let kept = Arc::new(Kept::default());
        files.insert(file.clone(), Arc::downgrade(&kept));
        kept
    }
}

/// What the server may lose of one file.
#[derive(Default)]
pub(super) struct Kept {
    /// In the order of their answers.
    pieces: Mutex<Vec<Piece>>,
    /// Has the server perhaps more to commit, which another process wrote?
    resumed: AtomicBool,
    /// Shared by WRITEs under way; alone who sends pieces again.
    gate: RwLock<()>,
    /// Held by who commits: only there pieces go away.
    committing: Turn<()>,
}

/// Data that was written and is not committed.
struct Piece {
    offset: u64,
    data: Bytes,
    verifier: Verifier,
    _room: OwnedSemaphorePermit,
}

impl Kept {
    /// Is there nothing to commit?
    fn is_empty(&self) -> bool {
        self.pieces.lock().is_empty() && !self.resumed.load(Relaxed)
    }

    /// Makes all that is kept durable; attributes, if the server gave some.
    pub(super) async fn commit(&self, client: &Client, file: &[u8]) -> Result<Option<fattr3>> {
        let _turn = self.committing.lock().await;
        for _ in 0..ROUNDS {
            if self.is_empty() {
                return Ok(None);
            }
            let n = self.pieces.lock().len();
            let (attributes, verifier) = changes::commit(client, file).await?;
            self.resumed.store(false, Relaxed);
            {
                let mut pieces = self.pieces.lock();
                if pieces[..n].iter().all(|p| p.verifier == verifier) {
                    pieces.drain(..n);
                    return Ok(attributes);
                }
            }
            self.send_again(client, file).await?;
        }
        Err(Error::new(Kind::Unavailable, format!("{} restarts again and again", client.address())))
    }

    /// Writes all that is kept once more, for a COMMIT after it.
    async fn send_again(&self, client: &Client, file: &[u8]) -> Result<()> {
        let _alone = self.gate.write().await;
        let n = self.pieces.lock().len();
        tracing::warn!(server = client.address(), pieces = n, "the server restarted, sending uncommitted data again");
        counter!("efc_nfs_resent_total").increment(n as u64);
        for i in 0..n {
            let (mut offset, mut data) = {
                let pieces = self.pieces.lock();
                (pieces[i].offset, pieces[i].data.clone())
            };
            let mut first = None;
            while !data.is_empty() {
                let written = changes::write(client, file, offset, data.clone(), false).await?;
                offset += written.count as u64;
                let _ = data.split_to(written.count);
                // Of the oldest part: a restart in between shows at the COMMIT.
                first.get_or_insert(written.verifier);
            }
            if let Some(verifier) = first {
                self.pieces.lock()[i].verifier = verifier;
            }
        }
        Ok(())
    }
}

/// An open file: a handle, and what is kept of the file.
pub(super) struct Opened {
    shared: Arc<Shared>,
    file: Bytes,
    kept: Arc<Kept>,
}

impl Opened {
    pub(super) fn new(shared: Arc<Shared>, file: Bytes) -> Opened {
        let kept = shared.kept.open(&file);
        Opened { shared, file, kept }
    }

    /// Room to keep `len` bytes; `None` if other files have taken it.
    async fn room(&self, len: usize) -> Result<Option<OwnedSemaphorePermit>> {
        let room = &self.shared.kept.room;
        if let Ok(room) = room.clone().try_acquire_many_owned(len as u32) {
            return Ok(Some(room));
        }
        self.kept.commit(&self.shared.client, &self.file).await?;
        Ok(room.clone().try_acquire_many_owned(len as u32).ok())
    }

    /// Writes at most one WRITE's worth; attributes, if the server gave some.
    async fn write_piece(&self, mut offset: u64, mut data: Bytes) -> Result<Option<fattr3>> {
        let mut room = self.room(data.len()).await?;
        let _under_way = self.kept.gate.read().await;
        let mut attributes = None;
        while !data.is_empty() {
            let stable = room.is_none();
            let written = changes::write(&self.shared.client, &self.file, offset, data.clone(), stable).await?;
            let part = data.split_to(written.count);
            if let Some(room) = room.as_mut().and_then(|r| r.split(part.len())) {
                let mut pieces = self.kept.pieces.lock();
                // A stable piece is kept, too, when older ones are: they must not be sent again without it.
                if !written.stable || !pieces.is_empty() {
                    pieces.push(Piece { offset, data: part, verifier: written.verifier, _room: room });
                }
            }
            offset += written.count as u64;
            attributes = written.attributes;
        }
        Ok(attributes)
    }

    async fn read_piece(&self, range: Range<u64>) -> Result<(Vec<Bytes>, bool)> {
        let mut parts = Vec::with_capacity(1);
        let mut at = range.start;
        while at < range.end {
            let piece = match ops::read(&self.shared.client, &self.file, at, (range.end - at) as u32).await {
                // Beyond the largest file the server can have: nothing is there.
                Err(e) if e.is(Kind::TooLarge) => return Ok((parts, true)),
                other => other?,
            };
            at += piece.data.len() as u64;
            let end = piece.eof || piece.data.is_empty();
            parts.push(piece.data);
            if end {
                return Ok((parts, true));
            }
        }
        Ok((parts, false))
    }
}

/// Cuts a range at multiples of `unit`.
fn cuts(range: Range<u64>, unit: u64) -> impl Iterator<Item = Range<u64>> {
    let border = move |at: u64| (at / unit + 1).saturating_mul(unit).min(range.end);
    let next = move |at: &u64| Some(border(*at));
    std::iter::successors(Some(range.start), next).take_while(move |at| *at < range.end).map(move |at| at..border(at))
}

#[async_trait]
impl OpenFile for Opened {
    async fn read(&self, range: Range<u64>) -> Result<Bytes> {
        let unit = self.shared.units(&self.file).await?.read as u64;
        let mut pieces = stream::iter(cuts(range, unit)).map(|piece| self.read_piece(piece)).buffered(READ_AHEAD);
        let mut all = Vec::new();
        while let Some((parts, end)) = pieces.try_next().await? {
            all.extend(parts.into_iter().filter(|p| !p.is_empty()));
            if end {
                break;
            }
        }
        drop(pieces);
        if all.len() < 2 {
            return Ok(all.pop().unwrap_or_default());
        }
        let mut whole = BytesMut::with_capacity(all.iter().map(Bytes::len).sum());
        all.iter().for_each(|part| whole.extend_from_slice(part));
        Ok(whole.freeze())
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<Node> {
        let Some(end) = offset.checked_add(data.len() as u64) else {
            return Err(Error::new(Kind::TooLarge, "beyond the end of any file"));
        };
        let unit = self.shared.units(&self.file).await?.write as u64;
        let pieces = cuts(offset..end, unit).map(|piece| {
            let part = data.slice((piece.start - offset) as usize..(piece.end - offset) as usize);
            (piece.start, part)
        });
        let mut answers = stream::iter(pieces)
            .map(|(at, part)| self.write_piece(at, part))
            .buffer_unordered(WRITES)
            .try_collect::<Vec<_>>()
            .await?;
        // Which of several answers is the last is unknown.
        let attributes = if answers.len() == 1 { answers.pop().flatten() } else { None };
        self.shared.fresh(&self.file, attributes).await
    }

    async fn sync(&self, _data_only: bool) -> Result<Node> {
        let attributes = self.kept.commit(&self.shared.client, &self.file).await?;
        self.shared.fresh(&self.file, attributes).await
    }

    async fn close(&self) -> Result<Option<Node>> {
        if self.kept.is_empty() {
            return Ok(None);
        }
        self.sync(true).await.map(Some)
    }

    fn resumed(&self) {
        self.kept.resumed.store(true, Relaxed);
    }

    async fn attr(&self) -> Result<Node> {
        self.shared.fresh(&self.file, None).await
    }

    async fn set_attr(&self, change: &Change) -> Result<Node> {
        self.shared.change(&self.file, change).await
    }

    async fn allocate(&self, _range: Range<u64>, _how: Allocate) -> Result<Node> {
        Err(unsupported("allocation"))
    }

    async fn copy(&self, _source: &dyn OpenFile, _from: Range<u64>, _offset: u64) -> Result<(u64, Node)> {
        Err(unsupported("copy inside the server"))
    }

    async fn seek(&self, _offset: u64, _hole: bool) -> Result<u64> {
        Err(unsupported("search for holes"))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
