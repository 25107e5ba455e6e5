//! Operations on open files of a read-write mount: open, read, write, sync and what else works on a handle.

use super::belief::Permit;
use super::callers::are_strangers;
use super::change::remove_parked;
use super::failover::Once;
use super::{Shared, errno_of, log};
use crate::fs::open::{Handle, Opening};
use crate::kernel::{Errno, Notification, OpenOut, open_flags};
use crate::namespace::change::Update;
use crate::namespace::{Belief, Inode};
use crate::read::stream::Plan;
use crate::write::is_draft;
use bytes::Bytes;
use efc_backend::tree::{Allocate, DynTree, OpenFile};
use efc_common::lease::Mode;
use efc_common::node::{FileKind, Node};
use efc_common::{Error, Kind, Result};
use efc_proto::state::attempt;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::RwLockWriteGuard;
use tracing::{debug, warn};

/// Longer than the tick of any file system's clock that we know (NFS servers on Linux: 1 to 10 ms), with room for scheduling.
const CLOCK_TICK: Duration = Duration::from_secs(1);

/// So many versions of a file are tried to be read before it is read as it is at the moment.
const VERSIONS_MAX: usize = 8;
/// How long pages that were changed through a mapping wait for a lease.
const WRITE_BACK_PATIENCE: Duration = Duration::from_secs(1);
/// For the kernel to drop pages that were read past a lease; what holds it up longer are readers that wait for the lease's return.
const PASSING_DEADLINE: Duration = Duration::from_millis(300);

/// For the kernel to forget a length, which takes no lock.
const LENGTH_DEADLINE: Duration = Duration::from_secs(2);

/// What an application is told.
type Answered<T> = std::result::Result<T, Errno>;

/// Largest piece of a copy inside the origin that one request asks for, bytes: others are to get their turn.
const COPY_BYTES_MAX: u64 = 64 << 20;

impl Shared {
    /// The tree to change; none on a read-only mount.
    pub(super) fn tree(&self) -> Result<&DynTree> {
        self.parts.tree.as_ref().ok_or_else(|| Error::new(Kind::Unsupported, "the mount is read-only"))
    }

    /// Fresh attributes of a following node from the origin. Pages of an older version are dropped.
    pub(super) async fn refresh(&self, inode: &Arc<Inode>, belief: Belief) -> Result<()> {
        for _ in 0..VERSIONS_MAX {
            match self.refresh_once(inode, belief).await? {
                // Asked before a change of our own ended.
                Update::Refused if inode.now().fresh_until <= Instant::now() => {}
                Update::Refused | Update::Kept => return Ok(()),
                Update::Moved => {
                    self.pages_are_old(inode);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn refresh_once(&self, inode: &Arc<Inode>, belief: Belief) -> Result<Update> {
        let seen = belief.seen();
        let placed = if self.is_unplaced(inode) { self.place(inode, belief).await? } else { None };
        let node = match (placed, self.files.direct(inode)) {
            (_, Some(file)) => file.attr().await?,
            (Some(node), None) => node,
            (None, None) => match self.parts.source.getattr(&inode.locator()).await {
                Ok(node) if !inode.is_file(&node) => match self.files.any(inode.id) {
                    Some(file) => file.attr().await?,
                    None => return Err(Error::new(Kind::Stale, "another file has taken its place")),
                },
                Err(e) if e.is(Kind::NotFound) || e.is(Kind::Stale) => match self.files.any(inode.id) {
                    // Removed elsewhere, but open here.
                    Some(file) => file.attr().await?,
                    None => return Err(e),
                },
                other => other?,
            },
        };
        Ok(self.parts.namespace.refresh(inode, &node, seen))
    }

    /// Looks a file up by its name, because its lease is that of the name: others may have moved it since it was seen last. `None`: it is not there any more.
    async fn place(&self, inode: &Arc<Inode>, belief: Belief) -> Result<Option<Node>> {
        let Some(d) = inode.dentry() else { return Ok(None) };
        let found = match self.parts.source.lookup(&d.parent.locator(), &d.name).await {
            Ok(node) if inode.is_file(&node) => Some(node),
            Ok(node) if self.parts.source.path_locators() && inode.has_number(&node) => {
                // Known by the path of another of its names, which is gone.
                self.parts.namespace.relocate(inode, node.locator.clone());
                Some(node)
            }
            Ok(_) => None,
            Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Stale | Kind::NotADirectory) => None,
            Err(e) => return Err(e),
        };
        match &found {
            Some(_) => inode.placed.store(!belief.ttl.is_zero(), Ordering::Release),
            // Made here, and not at the origin yet.
            None if self.files.direct(inode).is_some_and(|f| !f.is_clean()) && self.has_drafts() => {}
            None => self.parts.namespace.lose(inode),
        }
        Ok(found)
    }

    pub(super) fn has_drafts(&self) -> bool {
        self.tree().is_ok_and(|t| t.drafts())
    }

    /// To change a node, which is known to be where it was.
    pub(super) async fn to_change(&self, inode: &Arc<Inode>) -> Result<Permit> {
        self.node(inode, Mode::Exclusive).await
    }

    /// To write back what was changed through a mapping. A drop of the pages may wait for it, page by page, so then it does not wait, and never long: if the lease is on its
    /// way to somebody else, it is written all the same.
    pub(super) async fn written_back(&self, inode: &Arc<Inode>) -> Result<Permit> {
        tokio::select! {
            biased;
            permit = self.to_change(inode) => permit,
            () = self.until(|| inode.dropping.load(Ordering::SeqCst) > 0) => Ok(Permit::none()),
            () = tokio::time::sleep(WRITE_BACK_PATIENCE) => Ok(Permit::none()),
        }
    }

    /// The kernel drops pages that it read past a lease on its way back. Where a reader waits for the lease's return they are gone already, and the drop would wait for
    /// that reader.
    pub(super) async fn drop_pages(&self, inode: &Inode, range: Range<u64>) {
        if inode.waiting_reads.lock().iter().any(|r| r.start < range.end && range.start < r.end) {
            return;
        }
        let Some(session) = self.session.get().and_then(Weak::upgrade) else { return };
        let length = (range.end - range.start) as i64;
        let pages = Notification::InvalidateInode { node: inode.id, offset: range.start as i64, length };
        match session.notifier().tell(pages, PASSING_DEADLINE).await {
            // Somebody reads them anew: what was there is gone.
            Err(e) if e.is(Kind::Timeout) => debug!(path = inode.path(), "pages are held by another reader"),
            Err(e) => warn!(path = inode.path(), error = %e, "the kernel keeps pages that may be old"),
            Ok(_) => {}
        }
    }

    /// The kernel's pages of a node are of an older version: it drops them now, and at the latest at the next open.
    pub(super) fn pages_are_old(&self, inode: &Inode) {
        inode.pages_old.store(true, Ordering::Release);
        self.tell(Notification::InvalidateInode { node: inode.id, offset: 0, length: 0 });
    }

    /// OPEN of an existing file.
    pub(super) async fn open(&self, inode: &Arc<Inode>, how: Opening) -> Result<(OpenOut, Permit)> {
        let write = how.writes();
        let permit = self.node(inode, Mode::Shared).await?;
        if self.beliefs.is_none() && inode.now().fresh_until <= Instant::now() {
            self.refresh(inode, permit.belief).await?;
        }
        let file = match self.files.share(inode.id, write) {
            Some(file) => file,
            None => self.tree()?.open(&inode.locator(), write).await?,
        };
        let how = Opening { direct: permit.passing || self.is_direct(inode, how), ..how };
        // Of a contended file the kernel believes no length anyway.
        if how.reads_directly()
            && !permit.passing
            && !self.is_contended(inode)
            && !self.files.is_read_directly(inode.id)
        {
            self.drop_length(inode).await;
        }
        Ok((self.opened(inode, how, file), permit))
    }

    /// Is the kernel to keep no pages of what goes through this descriptor? Of what is written, because a write that waits for its lease would hold pages that a recall
    /// waits for. Of what is read while several mounts want the file, because the kernel does not take over the length that an answer tells if an invalidation has come between, and
    /// then gives its reader the old length.
    pub(super) fn is_direct(&self, inode: &Inode, how: Opening) -> bool {
        self.beliefs.is_some() && (how.writes() || self.is_contended(inode))
    }

    /// The kernel asks for the length of a file anew.
    async fn drop_length(&self, inode: &Inode) {
        let Some(session) = self.session.get().and_then(Weak::upgrade) else { return };
        let attributes = Notification::InvalidateInode { node: inode.id, offset: -1, length: 0 };
        if let Err(e) = session.notifier().tell(attributes, LENGTH_DEADLINE).await {
            warn!(path = inode.path(), error = %e, "the kernel keeps a length that may be old");
        }
    }

    /// Enters an open file and says how the kernel is to treat it.
    pub(super) fn opened(&self, inode: &Arc<Inode>, how: Opening, file: Arc<dyn OpenFile>) -> OpenOut {
        let (fh, how) = match self.files.opened_by(how.unique) {
            Some(handle) if handle.inode.id == inode.id => (handle.fh, handle.opening),
            _ => {
                let fh = self.next_handle.fetch_add(1, Ordering::Relaxed);
                self.files.enter(fh, inode.clone(), how, file);
                (fh, how)
            }
        };
        let mut out = 0;
        let pages_old = inode.pages_old.swap(false, Ordering::AcqRel);
        if how.direct {
            out |= open_flags::DIRECT_IO;
        } else if !pages_old {
            out |= open_flags::KEEP_CACHE;
        }
        if !how.writes() {
            out |= open_flags::NOFLUSH;
        }
        OpenOut { fh, flags: out }
    }

    /// READ of a following node: from its open file while it is being written, else through the caches, in the version it has now.
    pub(super) async fn read_following(
        &self,
        inode: &Arc<Inode>,
        fh: u64,
        range: Range<u64>,
        for_cache: bool,
    ) -> Result<(Vec<Bytes>, Permit)> {
        if for_cache {
            inode.waiting_reads.lock().push(range.clone());
        }
        let permit = self.node(inode, Mode::Shared).await;
        if for_cache {
            let mut waiting = inode.waiting_reads.lock();
            if let Some(at) = waiting.iter().position(|r| *r == range) {
                waiting.swap_remove(at);
            }
        }
        let permit = permit?;
        let direct = self.files.get(fh).is_ok_and(|h| h.opening.direct);
        let _whole = if direct { Some(inode.content.read().await) } else { None };
        let pieces = self.read_now(inode, fh, range, permit.belief).await?;
        Ok((pieces, permit))
    }

    async fn read_now(&self, inode: &Arc<Inode>, fh: u64, range: Range<u64>, belief: Belief) -> Result<Vec<Bytes>> {
        if let Some(file) = self.uncached(inode) {
            return Ok(vec![file.read(range).await?]);
        }
        for _ in 0..VERSIONS_MAX {
            if self.has_drafts() && is_draft(&inode.now().version) {
                // It was committed since, behind its writer or by a predecessor: that version only this mount knew.
                self.refresh(inode, belief).await?;
            }
            let end = range.end.min(inode.size());
            if range.start >= end {
                return Ok(Vec::new());
            }
            let (ready, plan) = self.parts.reader.try_read(inode, range.start..end);
            let outcome = match ready {
                Some(pieces) => Ok(pieces),
                None => self.parts.reader.read(inode, range.start..end, plan).await,
            };
            match outcome {
                Err(e) if e.is(Kind::Stale) => self.refresh(inode, belief).await?,
                other => return other,
            }
        }
        // It changes faster than it can be read by version: as it is now.
        let handle = self.files.get(fh)?;
        Ok(vec![handle.file.read(range).await?])
    }

    /// The open file to read from when nothing cached may be used: the node is being written, or was a moment ago.
    fn uncached(&self, inode: &Inode) -> Option<Arc<dyn OpenFile>> {
        if self.has_drafts() {
            // Versions of objects are exact.
            let any = || self.files.any(inode.id);
            return self.files.direct(inode).or_else(any).filter(|f| !f.is_clean());
        }
        let racy = || inode.is_racy(CLOCK_TICK).then(|| self.files.any(inode.id)).flatten();
        self.files.direct(inode).or_else(racy)
    }

    /// Can the read be answered at once? Only from memory, and never while the node is being written.
    pub(super) fn read_ready(&self, inode: &Inode, range: Range<u64>) -> Option<Vec<Bytes>> {
        if self.uncached(inode).is_some() {
            return None;
        }
        let end = range.end.min(inode.size());
        if range.start >= end {
            return None;
        }
        match self.parts.reader.try_read(inode, range.start..end) {
            (Some(pieces), Plan::Random | Plan::Sequential { .. }) => Some(pieces),
            (None, _) => None,
        }
    }

    /// Taken by who changes content, for as long as the origin may have the change and the node not yet its new attributes: who reads past the kernel's pages, also by a
    /// descriptor opened in the middle, sees both or none.
    pub(super) async fn alone<'a>(&self, inode: &'a Inode) -> Option<RwLockWriteGuard<'a, ()>> {
        if self.beliefs.is_some() { Some(inode.content.write().await) } else { None }
    }

    /// WRITE. Bytes written: all of them.
    pub(super) async fn write(
        &self,
        handle: &Handle,
        offset: u64,
        data: Bytes,
        belief: Belief,
        once: &Once,
    ) -> Result<u32> {
        if !handle.writes() {
            return Err(Error::new(Kind::Invalid, "the file is not open for writing"));
        }
        let len = data.len() as u32;
        let inode = &handle.inode;
        if handle.appends() {
            self.appends_in_turn(once, inode.id).await;
        }
        let _only_one = if handle.appends() { Some(handle.append.lock().await) } else { None };
        let _alone = self.alone(inode).await;
        if !handle.appends() {
            let change = inode.begin();
            change.finish(handle.file.write(offset, data).await?, belief.ttl);
            return Ok(len);
        }
        let change = inode.begin();
        let mut end = handle.file.attr().await?.attr.size;
        if let Some(at) = once.appended_at()
            && is_ours(&*handle.file, at, &data, end).await?
        {
            end = at;
        }
        once.begin(
            self,
            Some(attempt::What::Append(attempt::Append { node: inode.id, offset: end, length: len.into() })),
        )?;
        change.finish(handle.file.write(end, data).await?, belief.ttl);
        self.appended(once);
        if end != offset {
            // The kernel took the bytes for those of another place.
            self.tell(Notification::InvalidateInode { node: inode.id, offset: offset.min(end) as i64, length: 0 });
        }
        Ok(len)
    }

    /// FSYNC.
    pub(super) async fn sync(&self, handle: &Handle, data_only: bool) -> Result<((), Permit)> {
        if !handle.writes() {
            return Ok(((), Permit::none()));
        }
        let permit = self.to_commit(handle).await?;
        let change = handle.inode.begin();
        change.finish(handle.file.sync(data_only).await?, permit.belief.ttl);
        Ok(((), permit))
    }

    /// To bring what was written to the origin: of drafts that is a change like any other. It needs no end with its lease ([`Permit::within`]): it is conditional on the
    /// version it was made of. Else it needs no lease; but only under one what it shows may be believed.
    async fn to_commit(&self, handle: &Handle) -> Result<Permit> {
        let inode = &handle.inode;
        if self.has_drafts() && !handle.file.is_clean() {
            return self.to_change(inode).await;
        }
        Ok(self.held(inode).unwrap_or_else(Permit::none))
    }

    /// FLUSH: thread `by` closed a descriptor. Of a file that becomes an object when it is closed, a copy of the descriptor in another process than the opener's does not count as long as
    /// the opener lives: each program that a process starts closes such copies, in the middle of the writing. The last close of all is told by RELEASE.
    pub(super) async fn closed_by(&self, handle: &Handle, by: u32) -> Result<((), Permit)> {
        if self.has_drafts() && !handle.file.is_clean() && are_strangers(handle.opening.by, by) {
            return Ok(((), Permit::none()));
        }
        self.close(handle).await
    }

    async fn close(&self, handle: &Handle) -> Result<((), Permit)> {
        if !handle.writes() {
            return Ok(((), Permit::none()));
        }
        let permit = self.to_commit(handle).await?;
        let change = handle.inode.begin();
        match handle.file.close().await? {
            Some(node) => change.finish(node, permit.belief.ttl),
            None => change.nothing(),
        }
        Ok(((), permit))
    }

    /// RELEASE: what was removed while it was open goes now.
    pub(super) async fn release(&self, fh: u64) {
        if self.has_drafts()
            && let Ok(handle) = self.files.get(fh)
            && let Err(e) = self.close(&handle).await
        {
            // Written through a mapping after the last close: there is nobody left to tell.
            log("release", &handle.inode, &e);
        }
        let (handle, left) = self.files.leave(fh);
        let (Some(handle), Ok(tree)) = (handle, self.tree()) else { return };
        for parked in &left.parked {
            if let Err(e) = remove_parked(tree, parked).await {
                log("release", &handle.inode, &e);
            }
        }
        if !left.parked.is_empty() {
            self.files.cleared(handle.inode.id);
        }
        if let Some(node) = left.kept {
            self.drop_file(node);
        }
        self.write_down();
    }

    /// FALLOCATE.
    pub(super) async fn allocate(&self, handle: &Handle, range: Range<u64>, mode: i32, belief: Belief) -> Result<()> {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        const ZERO_KEEP: i32 = ZERO | KEEP;
        let how = match mode {
            0 => Allocate::Reserve { keep_size: false },
            KEEP => Allocate::Reserve { keep_size: true },
            PUNCH => Allocate::PunchHole,
            ZERO => Allocate::Zero { keep_size: false },
            ZERO_KEEP => Allocate::Zero { keep_size: true },
            _ => return Err(Error::new(Kind::Unsupported, "this way of changing a range is not offered")),
        };
        let _alone = self.alone(&handle.inode).await;
        let change = handle.inode.begin();
        change.finish(handle.file.allocate(range, how).await?, belief.ttl);
        Ok(())
    }

    /// COPY_FILE_RANGE inside the origin.
    pub(super) async fn copy(
        &self,
        from: (&Handle, u64),
        to: (&Handle, u64),
        length: u64,
        belief: Belief,
    ) -> Result<u32> {
        let length = length.min(COPY_BYTES_MAX);
        let _alone = self.alone(&to.0.inode).await;
        let change = to.0.inode.begin();
        let range = from.1..from.1 + length;
        let (copied, node) = to.0.file.copy(&*from.0.file, range, to.1).await?;
        change.finish(node, belief.ttl);
        Ok(copied as u32)
    }

    /// LSEEK for data or a hole.
    pub(super) async fn seek(&self, handle: &Handle, offset: u64, hole: bool) -> Answered<u64> {
        match handle.file.seek(offset, hole).await {
            Ok(at) => Ok(at),
            Err(e) if e.is(Kind::NotFound) => Err(Errno::ENXIO),
            Err(e) if e.is(Kind::Unsupported) => seek_by_size(handle.inode.size(), offset, hole),
            Err(e) => Err(errno_of(&e)),
        }
    }
}

/// Is what a file of `end` bytes has from `at` on nothing, or the beginning of `data`? Then who was appending there, and died, did so or did not; nobody else did.
async fn is_ours(file: &dyn OpenFile, at: u64, data: &Bytes, end: u64) -> Result<bool> {
    if end <= at {
        return Ok(end == at);
    }
    let there = file.read(at..end.min(at + data.len() as u64)).await?;
    Ok(data.starts_with(&there))
}

/// SEEK_DATA and SEEK_HOLE of a file that is one run of data.
pub(super) fn seek_by_size(size: u64, offset: u64, hole: bool) -> Answered<u64> {
    match (offset < size, hole) {
        (true, false) => Ok(offset),
        (true, true) => Ok(size),
        (false, _) => Err(Errno::ENXIO),
    }
}

/// A file whose bytes can be read.
pub(super) fn regular(inode: Arc<Inode>) -> Answered<Arc<Inode>> {
    match inode.kind {
        FileKind::File => Ok(inode),
        FileKind::Directory => Err(Errno::EISDIR),
        _ => Err(Errno::ENXIO),
    }
}
