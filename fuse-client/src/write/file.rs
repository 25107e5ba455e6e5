//! A file that is open or has changes: one state for all its descriptors, whatever becomes of its name.

use super::draft::{Draft, Piece};
use super::meta::{self, now};
use super::staging::{Place, Staging};
use super::stream::Stream;
use super::{Core, split};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use efc_backend::objects::{Condition, MARK, Metadata, new_mark};
use efc_backend::tree::{Allocate, Change, OpenFile};
use efc_common::node::{Attr, Node, Time};
use efc_common::{Error, Kind, Result};
use efc_proto::state;
use futures::TryStreamExt;
use parking_lot::Mutex;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

/// Longest file, bytes: what 1,000 parts of 8 MiB and 9,000 of 64 MiB hold.
pub(super) const FILE_BYTES_MAX: u64 = (1000 * 8 + 9000 * 64) << 20;
/// An open file that is removed keeps its bytes up to this length; reading a longer one then ends with ESTALE.
const HOLD_BYTES_MAX: u64 = 64 << 20;

/// So many attempts to bring a file to the store are remembered whose ends are not known.
const ATTEMPTS_MAX: usize = 8;

/// The object a draft changes.
#[derive(Debug, Clone)]
pub(super) struct Base {
    pub(super) locator: Bytes,
    pub(super) version: Bytes,
    pub(super) mtime: Time,
}

/// What is locked together.
pub(super) struct Inner {
    /// Of the file, in all processes of the mount.
    pub(super) number: u64,
    pub(super) locator: Bytes,
    pub(super) dir: Bytes,
    pub(super) name: Bytes,
    /// What the rest says was asked of the store, or is known because the file was made here.
    pub(super) loaded: bool,
    pub(super) base: Option<Base>,
    /// For the first object of a new file.
    pub(super) condition: Condition,
    pub(super) metadata: Metadata,
    pub(super) changed: Option<Time>,
    pub(super) draft: Draft,
    pub(super) staging: Staging,
    pub(super) data_dirty: bool,
    pub(super) meta_dirty: bool,
    pub(super) stream: Option<Stream>,
    /// Marks of what was begun to bring it to the store, as long as the end is not known.
    pub(super) attempts: Vec<String>,
    pub(super) removed: bool,
    /// Counts changes of the content, over all files.
    pub(super) edition: u64,
}

/// What others may see without waiting.
struct Shown {
    node: Node,
    dirty: bool,
}

/// The state of one file.
pub(super) struct FileState {
    number: u64,
    pub(super) inner: tokio::sync::Mutex<Inner>,
    shown: Mutex<Shown>,
    /// Changed under the lock of the table of files.
    opens: AtomicUsize,
    /// It waits to be committed behind its writer.
    pub(super) queued: AtomicBool,
    /// How often it was taken down for that.
    pub(super) closes: AtomicUsize,
    /// Why it could not be committed the last time.
    pub(super) failed: Mutex<Option<String>>,
}

impl FileState {
    /// Of a key of which nothing is known yet.
    pub(super) fn existing(core: &Core, locator: &Bytes) -> Arc<FileState> {
        let (dir, name) = split(locator);
        FileState::new(core, locator, (&dir, &name), None)
    }

    /// Of a file that is being made: it has no object.
    pub(super) fn made(core: &Core, locator: &Bytes, at: (&Bytes, &Bytes), metadata: Metadata) -> Arc<FileState> {
        FileState::new(core, locator, at, Some(metadata))
    }

    fn new(core: &Core, locator: &Bytes, (dir, name): (&Bytes, &Bytes), new: Option<Metadata>) -> Arc<FileState> {
        let made = new.is_some();
        let number = core.next_number.fetch_add(1, Relaxed);
        let inner = Inner {
            number,
            locator: locator.clone(),
            dir: dir.clone(),
            name: name.clone(),
            loaded: made,
            base: None,
            condition: Condition::Absent,
            metadata: new.unwrap_or_default(),
            changed: made.then(now),
            draft: Draft::new(0),
            staging: Staging::new(core.space.clone(), number),
            data_dirty: made,
            meta_dirty: made,
            stream: None,
            attempts: Vec::new(),
            removed: false,
            edition: meta::edition(),
        };
        if made {
            core.note(&inner);
        }
        FileState::of(core, inner)
    }

    /// As a predecessor wrote it down; `place`: where it has staged it.
    ///
    /// # Errors
    /// As [`Inner::inherited`].
    pub(super) fn inherited(core: &Core, draft: &state::Draft, place: Option<Place>) -> Result<Arc<FileState>> {
        Ok(FileState::of(core, Inner::inherited(core, draft, place)?))
    }

    fn of(core: &Core, inner: Inner) -> Arc<FileState> {
        let shown = Shown { node: inner.node(core), dirty: inner.is_dirty() };
        Arc::new(FileState {
            number: inner.number,
            inner: tokio::sync::Mutex::new(inner),
            shown: Mutex::new(shown),
            opens: AtomicUsize::new(0),
            queued: AtomicBool::new(false),
            closes: AtomicUsize::new(0),
            failed: Mutex::default(),
        })
    }

    /// Others may change its object: it is asked for at the next use, unless there are changes of it here, which are committed on what they were made of.
    pub(super) async fn doubt(&self) {
        let mut inner = self.inner.lock().await;
        if !inner.is_dirty() && !inner.removed {
            inner.loaded = false;
        }
    }

    /// Its node as of the last change.
    pub(super) fn node(&self) -> Node {
        self.shown.lock().node.clone()
    }

    /// Has it changes that the store has not?
    pub(super) fn is_dirty(&self) -> bool {
        self.shown.lock().dirty
    }

    /// Is it open?
    pub(super) fn is_open(&self) -> bool {
        self.opens.load(Relaxed) > 0
    }

    /// Is it open by more than one descriptor (or caller)?
    pub(super) fn is_shared(&self) -> bool {
        self.opens.load(Relaxed) > 1
    }

    /// Tells others what it is now, a successor too.
    pub(super) fn show(self: &Arc<Self>, core: &Core, inner: &Inner) -> Node {
        core.note(inner);
        self.shown_now(core, inner)
    }

    /// The same after nothing but this was written.
    fn show_written(self: &Arc<Self>, core: &Core, inner: &Inner, range: &Range<u64>) -> Node {
        if !core.space.kept().is_some_and(|kept| kept.wrote(inner, range)) {
            core.note(inner);
        }
        self.shown_now(core, inner)
    }

    fn shown_now(self: &Arc<Self>, core: &Core, inner: &Inner) -> Node {
        let node = inner.node(core);
        let was = {
            let mut shown = self.shown.lock();
            shown.node = node.clone();
            std::mem::replace(&mut shown.dirty, inner.is_dirty())
        };
        if inner.removed {
            return node;
        }
        match (inner.is_dirty(), was) {
            (true, _) => core.names.draft(&inner.dir, &inner.name, self.clone()),
            (false, true) => core.names.there(&inner.dir, &inner.name, node.clone()),
            (false, false) => {}
        }
        node
    }
}

impl Inner {
    pub(super) fn is_dirty(&self) -> bool {
        !self.removed && (self.data_dirty || self.meta_dirty)
    }

    /// Its node; a file with changes has a version of its own at each.
    pub(super) fn node(&self, core: &Core) -> Node {
        let version = match &self.base {
            Some(base) if !self.data_dirty => base.version.clone(),
            _ => core.draft_version(self.edition),
        };
        let mtime = self.base.as_ref().map(|b| b.mtime).unwrap_or_default();
        let mut attr = Attr::object(self.draft.size(), mtime);
        attr.ctime = self.changed.unwrap_or(mtime);
        attr.nlink = u32::from(!self.removed);
        meta::apply(Node { locator: self.locator.clone(), version, attr }, &self.metadata)
    }

    /// The store has this version of it, and nothing is changed.
    pub(super) fn settle(&mut self, node: &Node, metadata: Metadata) {
        self.base = Some(Base { locator: node.locator.clone(), version: node.version.clone(), mtime: node.attr.mtime });
        self.draft = Draft::new(node.attr.size);
        self.staging.clear();
        self.attempts.clear();
        (self.metadata, self.loaded, self.data_dirty, self.meta_dirty) = (metadata, true, false, false);
    }

    /// Its metadata with the mark of another attempt to bring it to the store.
    pub(super) fn marked(&mut self) -> Metadata {
        let mark = new_mark();
        let mut metadata = self.metadata.clone();
        metadata.other.insert(MARK.into(), mark.clone());
        if self.attempts.len() >= ATTEMPTS_MAX {
            self.attempts.remove(0);
        }
        self.attempts.push(mark);
        metadata
    }

    /// Content was changed.
    pub(super) fn touch(&mut self) {
        let time = now();
        (self.metadata.mtime, self.metadata.ctime, self.changed) = (Some(time), None, Some(time));
        self.data_dirty = true;
        self.edition = meta::edition();
    }

    /// The bytes `range`, which lies inside the file.
    pub(super) async fn content(&self, core: &Core, range: Range<u64>) -> Result<Vec<Bytes>> {
        let mut out = Vec::new();
        for piece in self.draft.pieces(range) {
            match piece {
                Piece::Staged(r) => out.extend(self.staging.pieces(r).await?),
                Piece::Zero(r) => out.push(BytesMut::zeroed((r.end - r.start) as usize).freeze()),
                Piece::Base(r) => {
                    let Some(base) = &self.base else { return Err(Error::new(Kind::Stale, "its object is gone")) };
                    let stream = core.backend.read(&base.locator, &base.version, r).await;
                    out.extend(stream.map_err(gone)?.try_collect::<Vec<_>>().await.map_err(gone)?);
                }
            }
        }
        Ok(out)
    }

    /// Takes the bytes that still come from the base along, because it is going to be removed.
    pub(super) async fn hold(&mut self, core: &Core) -> Result<()> {
        let range = 0..self.draft.base_len();
        if range.end > HOLD_BYTES_MAX {
            tracing::info!(key = %self.locator.escape_ascii(), "an open file is removed that is too long to be kept");
            return Ok(());
        }
        for piece in self.draft.pieces(range) {
            if let Piece::Base(r) = piece {
                let data = join(self.content(core, r.clone()).await?);
                self.stage(r.start, data).await?;
            }
        }
        Ok(())
    }

    /// Stages bytes and enters them.
    pub(super) async fn stage(&mut self, offset: u64, data: Bytes) -> Result<()> {
        let range = offset..offset + data.len() as u64;
        let grown = self.draft.growth(&range);
        self.staging.write(offset, data, grown).await?;
        if let Some(stream) = &mut self.stream {
            stream.changed(&range);
        }
        self.draft.write(range);
        Ok(())
    }

    fn resize(&mut self, size: u64) {
        let old = self.draft.size();
        let freed = self.draft.truncate(size);
        self.staging.free(freed);
        if let Some(stream) = &mut self.stream {
            stream.changed(&(old.min(size)..u64::MAX));
        }
        self.touch();
    }
}

fn gone(e: Error) -> Error {
    if e.is(Kind::NotFound) { Error::new(Kind::Stale, "the object is gone").caused_by(e) } else { e }
}

pub(super) fn join(pieces: Vec<Bytes>) -> Bytes {
    match pieces.len() {
        1 => pieces.into_iter().next().unwrap_or_default(),
        _ => pieces.concat().into(),
    }
}

/// A file in use: by descriptors, or for the time of an operation.
pub(super) struct Open {
    pub(super) core: Arc<Core>,
    pub(super) state: Arc<FileState>,
}

impl Open {
    /// To be made under the lock of the table of files.
    pub(super) fn new(core: Arc<Core>, state: Arc<FileState>) -> Open {
        state.opens.fetch_add(1, Relaxed);
        Open { core, state }
    }

    /// Knows its object.
    pub(super) async fn loaded(&self) -> Result<()> {
        let mut inner = self.state.inner.lock().await;
        if inner.loaded { Ok(()) } else { self.load(&mut inner).await }
    }

    /// Knows its object as it is now, unless it has changes.
    pub(super) async fn fresh(&self) -> Result<Node> {
        let mut inner = self.state.inner.lock().await;
        if !inner.removed && !inner.is_dirty() {
            self.load(&mut inner).await?;
        }
        Ok(inner.node(&self.core))
    }

    /// Gives all changes up: it is again what the store has. True: that is nothing.
    pub(super) async fn discard(&self) -> Result<bool> {
        let mut inner = self.state.inner.lock().await;
        self.core.drop_stream(&mut inner).await;
        tracing::warn!(key = %inner.locator.escape_ascii(), "changes of a file are discarded");
        if inner.base.is_some() {
            self.load(&mut inner).await?;
            return Ok(false);
        }
        inner.staging.clear();
        inner.removed = true;
        self.state.show(&self.core, &inner);
        Ok(true)
    }

    /// Asks the store.
    pub(super) async fn load(&self, inner: &mut Inner) -> Result<()> {
        let (node, metadata) = self.core.head(&inner.locator).await?;
        let same = inner.base.as_ref().is_some_and(|b| b.version == node.version);
        if !same || inner.metadata != metadata {
            inner.changed = None;
        }
        inner.settle(&node, metadata);
        self.state.show(&self.core, inner);
        Ok(())
    }

    async fn known(&self) -> Result<tokio::sync::MutexGuard<'_, Inner>> {
        let mut inner = self.state.inner.lock().await;
        if !inner.loaded {
            if inner.removed {
                return Err(Error::new(Kind::Stale, "the file is removed"));
            }
            self.load(&mut inner).await.map_err(gone)?;
        }
        Ok(inner)
    }

    /// Changes attributes. `alone`: nobody is going to close the file, so what is changed is committed at once.
    pub(super) async fn change(&self, change: &Change, alone: bool) -> Result<Node> {
        let mut inner = self.known().await?;
        let waits = inner.is_dirty() || (!alone && change.size.is_some());
        if let Some(size) = change.size {
            if size > FILE_BYTES_MAX {
                return Err(too_large());
            }
            if size != inner.draft.size() || size == 0 && inner.base.is_none() {
                inner.resize(size);
            }
        }
        if meta::change(&mut inner.metadata, libc::S_IFREG, change) {
            (inner.meta_dirty, inner.changed) = (true, Some(now()));
        }
        self.state.show(&self.core, &inner);
        if inner.is_dirty()
            && (!waits || alone && !self.state.is_shared())
            && !(alone && self.core.commit_later(&self.state))
        {
            self.commit(&mut inner).await?;
        }
        let node = self.state.show(&self.core, &inner);
        if !inner.is_dirty() {
            self.core.known.learn(&node, &inner.metadata, true);
        }
        Ok(node)
    }

    /// After a failed attempt to stage: where the staging directory is full, what is staged of this file goes to the store now. Else the error.
    async fn make_room(&self, inner: &mut Inner, e: Error) -> Result<()> {
        if !e.is(Kind::NoSpace) || !inner.data_dirty || inner.removed {
            return Err(e);
        }
        tracing::info!(key = %inner.locator.escape_ascii(), error = %e, "a file being written goes to the store before it is closed");
        self.commit(inner).await
    }

    async fn zero(&self, inner: &mut Inner, range: Range<u64>) -> Result<()> {
        let grown = inner.draft.growth(&range);
        inner.staging.zero(range.clone(), grown).await?;
        if let Some(stream) = &mut inner.stream {
            stream.changed(&range);
        }
        inner.draft.write(range);
        Ok(())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut files = self.core.files.lock();
        if self.state.opens.fetch_sub(1, Relaxed) > 1 || self.state.is_dirty() {
            return;
        }
        let locator = self.state.node().locator;
        if files.get(&locator).is_some_and(|s| Arc::ptr_eq(s, &self.state)) {
            files.remove(&locator);
        }
    }
}

pub(super) fn too_large() -> Error {
    Error::new(Kind::TooLarge, format!("an object written by EFC has at most {FILE_BYTES_MAX} bytes"))
}

#[async_trait]
impl OpenFile for Open {
    async fn read(&self, range: Range<u64>) -> Result<Bytes> {
        let inner = self.known().await?;
        let range = range.start..range.end.min(inner.draft.size());
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        Ok(join(inner.content(&self.core, range).await?))
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<Node> {
        let mut inner = self.known().await?;
        match offset.checked_add(data.len() as u64) {
            Some(end) if end <= FILE_BYTES_MAX => {}
            _ => return Err(too_large()),
        }
        let range = offset..offset + data.len() as u64;
        if let Err(e) = inner.stage(offset, data.clone()).await {
            self.make_room(&mut inner, e).await?;
            inner.stage(offset, data).await?;
        }
        inner.touch();
        self.advance(&mut inner).await;
        Ok(self.state.show_written(&self.core, &inner, &range))
    }

    async fn sync(&self, _data_only: bool) -> Result<Node> {
        let mut inner = self.known().await?;
        self.commit(&mut inner).await?;
        Ok(self.state.show(&self.core, &inner))
    }

    async fn close(&self) -> Result<Option<Node>> {
        if !self.state.is_dirty() || self.core.commit_later(&self.state) {
            return Ok(None);
        }
        self.sync(false).await.map(Some)
    }

    fn is_clean(&self) -> bool {
        let shown = self.state.shown.lock();
        !shown.dirty && shown.node.attr.nlink > 0
    }

    async fn attr(&self) -> Result<Node> {
        match self.fresh().await {
            // Removed by others: it is what it was.
            Err(e) if e.is(Kind::NotFound) => {
                let mut inner = self.state.inner.lock().await;
                if !inner.loaded {
                    return Err(e);
                }
                inner.removed = true;
                Ok(self.state.show(&self.core, &inner))
            }
            other => other,
        }
    }

    async fn set_attr(&self, change: &Change) -> Result<Node> {
        self.change(change, false).await
    }

    async fn allocate(&self, range: Range<u64>, how: Allocate) -> Result<Node> {
        if range.end > FILE_BYTES_MAX {
            return Err(too_large());
        }
        let mut inner = self.known().await?;
        let size = inner.draft.size();
        let (zeros, new_size) = match how {
            Allocate::Reserve { keep_size: true } => return Ok(self.state.show(&self.core, &inner)),
            Allocate::Reserve { keep_size: false } => (0..0, size.max(range.end)),
            Allocate::PunchHole | Allocate::Zero { keep_size: true } => (range.start..range.end.min(size), size),
            Allocate::Zero { keep_size: false } => (range.start..range.end.min(size), size.max(range.end)),
        };
        if zeros.start < zeros.end
            && let Err(e) = self.zero(&mut inner, zeros.clone()).await
        {
            self.make_room(&mut inner, e).await?;
            self.zero(&mut inner, zeros).await?;
        }
        if new_size != size {
            inner.resize(new_size);
        }
        inner.touch();
        Ok(self.state.show(&self.core, &inner))
    }

    async fn copy(&self, source: &dyn OpenFile, from: Range<u64>, offset: u64) -> Result<(u64, Node)> {
        let unsupported = || Error::new(Kind::Unsupported, "the store copies whole files into new ones only");
        let Some(source) = source.as_any().downcast_ref::<Open>() else { return Err(unsupported()) };
        if Arc::ptr_eq(&source.state, &self.state) || from.start > 0 || offset > 0 {
            return Err(unsupported());
        }
        let (base, size) = {
            let inner = source.known().await?;
            let base = inner.base.clone().filter(|_| !inner.data_dirty && !inner.removed);
            (base.ok_or_else(unsupported)?, inner.draft.size())
        };
        let mut inner = self.known().await?;
        if from.end < size || inner.draft.size() > 0 || inner.removed {
            return Err(unsupported());
        }
        let condition = inner.base.as_ref().map_or(inner.condition.clone(), |b| Condition::Version(b.version.clone()));
        let earlier = inner.attempts.clone();
        inner.touch();
        let metadata = inner.marked();
        self.core.note_now(&inner);
        let from = (&base.locator, &base.version);
        let node = match self.core.objects.copy(from, &inner.locator, Some(&metadata), &condition).await {
            Err(e) if e.is(Kind::Conflict) => {
                self.core.objects.made_by(&inner.locator, &earlier).await?.map(|(node, _)| node).ok_or(e)?
            }
            other => other?,
        };
        self.committed(&mut inner, &node);
        Ok((size, self.state.show(&self.core, &inner)))
    }

    async fn seek(&self, _offset: u64, _hole: bool) -> Result<u64> {
        Err(Error::new(Kind::Unsupported, "the store knows no holes"))
    }

    fn number(&self) -> u64 {
        self.state.number
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
