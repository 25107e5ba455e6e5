//! Operations on open files of a read-write mount: open, read, write, sync and what else works on a handle.

use super::{Shared, errno_of, log};
use crate::fs::open::Handle;
use crate::kernel::{Errno, Notification, OpenOut, open_flags};
use crate::namespace::{Inode, Seen};
use crate::read::stream::Plan;
use bytes::Bytes;
use efc_backend::tree::{Allocate, DynTree, OpenFile};
use efc_common::node::FileKind;
use efc_common::{Error, Kind, Result};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Longer than the tick of any file system's clock that we know (NFS servers on Linux: 1 to 10 ms), with room for scheduling.
const CLOCK_TICK: Duration = Duration::from_secs(1);

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
    pub(super) async fn refresh(&self, inode: &Arc<Inode>) -> Result<()> {
        let seen = Seen::at(Instant::now(), self.parts.ttl);
        let mut node = match self.files.direct(inode) {
            Some(file) => file.attr().await?,
            None => match self.parts.source.getattr(&inode.locator()).await {
                Err(e) if e.is(Kind::NotFound) || e.is(Kind::Stale) => match self.files.any(inode.id) {
                    // Removed elsewhere, but open here.
                    Some(file) => file.attr().await?,
                    None => return Err(e),
                },
                other => other?,
            },
        };
        if node.attr.kind != inode.kind {
            return Err(Error::new(Kind::Stale, "another kind of file has taken its place"));
        }
        if self.files.is_parked(inode.id) {
            node.attr.nlink = 0;
        }
        if self.parts.namespace.refresh(inode, &node, seen) {
            self.pages_are_old(inode);
        }
        Ok(())
    }

    /// The kernel's pages of a node are of an older version: it drops them now, and at the latest at the next open.
    pub(super) fn pages_are_old(&self, inode: &Inode) {
        inode.pages_old.store(true, Ordering::Release);
        self.tell(Notification::InvalidateInode { node: inode.id, offset: 0, length: 0 });
    }

    /// OPEN of an existing file.
    pub(super) async fn open(&self, inode: &Arc<Inode>, flags: i32) -> Result<OpenOut> {
        let write = flags & libc::O_ACCMODE != libc::O_RDONLY;
        if inode.now().fresh_until <= Instant::now() {
            self.refresh(inode).await?;
        }
        let file = match self.files.share(inode.id, write) {
            Some(file) => file,
            None => self.tree()?.open(&inode.locator(), write).await?,
        };
        Ok(self.opened(inode, flags, file))
    }

    /// Enters an open file and says how the kernel is to treat it.
    pub(super) fn opened(&self, inode: &Arc<Inode>, flags: i32, file: Arc<dyn OpenFile>) -> OpenOut {
        let fh = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.files.enter(fh, inode.clone(), flags, file);
        let mut out = 0;
        if !inode.pages_old.swap(false, Ordering::AcqRel) {
            out |= open_flags::KEEP_CACHE;
        }
        if flags & libc::O_ACCMODE == libc::O_RDONLY {
            out |= open_flags::NOFLUSH;
        }
        OpenOut { fh, flags: out }
    }

    /// READ of a following node: from its open file while it is being written, else through the caches, in the version it has now.
    pub(super) async fn read_following(&self, inode: &Arc<Inode>, fh: u64, range: Range<u64>) -> Result<Vec<Bytes>> {
        if let Some(file) = self.uncached(inode) {
            return Ok(vec![file.read(range).await?]);
        }
        for _ in 0..2 {
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
                Err(e) if e.is(Kind::Stale) => self.refresh(inode).await?,
                other => return other,
            }
        }
        // It changes faster than it can be read by version: as it is now.
        let handle = self.files.get(fh)?;
        Ok(vec![handle.file.read(range).await?])
    }

    /// The open file to read from when nothing cached may be used: the node is being written, or was a moment ago.
    fn uncached(&self, inode: &Inode) -> Option<Arc<dyn OpenFile>> {
        if self.tree().is_ok_and(|t| t.drafts()) {
            // Versions of objects are exact.
            return self.files.direct(inode).filter(|f| !f.is_clean());
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

    /// WRITE. Bytes written: all of them.
    pub(super) async fn write(&self, handle: &Handle, offset: u64, data: Bytes) -> Result<u32> {
        if !handle.writes() {
            return Err(Error::new(Kind::Invalid, "the file is not open for writing"));
        }
        let len = data.len() as u32;
        let inode = &handle.inode;
        if !handle.appends() {
            let change = inode.begin();
            change.finish(handle.file.write(offset, data).await?, self.parts.ttl);
            return Ok(len);
        }
        let _only_one = handle.append.lock().await;
        let change = inode.begin();
        let end = handle.file.attr().await?.attr.size;
        change.finish(handle.file.write(end, data).await?, self.parts.ttl);
        if end != offset {
            // The kernel took the bytes for those of another place.
            self.tell(Notification::InvalidateInode { node: inode.id, offset: offset.min(end) as i64, length: 0 });
        }
        Ok(len)
    }

    /// FSYNC.
    pub(super) async fn sync(&self, handle: &Handle, data_only: bool) -> Result<()> {
        if !handle.writes() {
            return Ok(());
        }
        let change = handle.inode.begin();
        change.finish(handle.file.sync(data_only).await?, self.parts.ttl);
        Ok(())
    }

    /// FLUSH: a descriptor was closed.
    pub(super) async fn close(&self, handle: &Handle) -> Result<()> {
        if !handle.writes() {
            return Ok(());
        }
        let change = handle.inode.begin();
        match handle.file.close().await? {
            Some(node) => change.finish(node, self.parts.ttl),
            None => change.nothing(),
        }
        Ok(())
    }

    /// RELEASE: what was removed while it was open goes now.
    pub(super) async fn release(&self, fh: u64) {
        if self.tree().is_ok_and(|t| t.drafts())
            && let Ok(handle) = self.files.get(fh)
            && let Err(e) = self.close(&handle).await
        {
            // Written through a mapping after the last close: there is nobody left to tell.
            log("release", &handle.inode, &e);
        }
        let (handle, parked) = self.files.leave(fh);
        let (Some(handle), Some(parked), Ok(tree)) = (handle, parked, self.tree()) else { return };
        match tree.remove(&parked.dir, &parked.name, false).await {
            Ok(()) => {}
            Err(e) if e.is(Kind::NotFound) => {}
            Err(e) => log("release", &handle.inode, &e),
        }
    }

    /// FALLOCATE.
    pub(super) async fn allocate(&self, handle: &Handle, range: Range<u64>, mode: i32) -> Result<()> {
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
        let change = handle.inode.begin();
        change.finish(handle.file.allocate(range, how).await?, self.parts.ttl);
        Ok(())
    }

    /// COPY_FILE_RANGE inside the origin.
    pub(super) async fn copy(&self, from: (&Handle, u64), to: (&Handle, u64), length: u64) -> Result<u32> {
        let length = length.min(COPY_BYTES_MAX);
        let change = to.0.inode.begin();
        let range = from.1..from.1 + length;
        let (copied, node) = to.0.file.copy(&*from.0.file, range, to.1).await?;
        change.finish(node, self.parts.ttl);
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
