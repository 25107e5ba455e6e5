//! One function per FUSE operation: policy only. Answers that need no waiting are given on the kernel's thread; the others by a task that
//! keeps the reply.
//!
//! Read-only: what would write keeps the kernel room's default answer, EROFS.

pub mod attr;
pub mod directory;
pub mod errno;

use crate::kernel::{
    AttrOut, Caller, DirReply, EntryOut, Errno, FileSystem, LseekOut, Negotiated, NodeAttr, Notification, OpenOut,
    ReadReply, Reply, Session, StatfsOut, XattrReply,
};
use crate::namespace::listing::Listing;
use crate::namespace::{Inode, Namespace};
use crate::read::Reader;
use crate::read::source::DataSource;
use attr::Ownership;
use bytes::Bytes;
use directory::{Directories, Found};
use efc_backend::FsStats;
use efc_common::node::{Attr, FileKind, Node};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;
use tracing::{info, warn};

/// A file's attributes never change under its node, so the kernel may keep them as long as it likes.
const FILE_ATTR_TTL: Duration = Duration::from_secs(30 * 86400);
/// Preferred I/O size told to applications, bytes.
const IO_BYTES: u32 = 1 << 20;
/// Positions of a directory: `.`, `..`, then the entries by index.
const DOTS: u64 = 2;

/// What a mount is made of.
pub struct Parts {
    /// Nodes, new or restored from a predecessor.
    pub namespace: Arc<Namespace>,
    /// Names and bytes.
    pub source: Arc<DataSource>,
    /// Listings.
    pub directories: Directories,
    /// Reads.
    pub reader: Reader,
    /// Owner and mode options.
    pub ownership: Ownership,
    /// How long names may be believed.
    pub ttl: Duration,
    /// Owner of the tasks that answer requests.
    pub tasks: TaskGroup,
}

/// The file system of one mount.
pub struct EfcFs {
    shared: Arc<Shared>,
}

struct Shared {
    parts: Parts,
    runtime: tokio::runtime::Handle,
    /// Weak: the session owns the file system.
    session: OnceLock<Weak<Session>>,
    open_dirs: Mutex<HashMap<u64, Arc<Listing>>>,
    next_handle: AtomicU64,
}

impl EfcFs {
    /// The file system; its waiting answers run on `runtime`.
    pub fn new(parts: Parts, runtime: tokio::runtime::Handle) -> Self {
        let shared = Shared {
            parts,
            runtime,
            session: OnceLock::new(),
            open_dirs: Mutex::default(),
            // Handles of a predecessor's open directories are not ours; starting elsewhere keeps them apart.
            next_handle: AtomicU64::new((std::process::id() as u64) << 32 | 1),
        };
        EfcFs { shared: Arc::new(shared) }
    }

    /// Gives the file system the way to tell the kernel that something changed. To be called once, when the session runs.
    pub fn set_session(&self, session: &Arc<Session>) {
        if self.shared.session.set(Arc::downgrade(session)).is_err() {
            warn!("a second session was offered and not taken");
        }
    }

    fn inode(&self, id: u64) -> Result<Arc<Inode>> {
        self.shared.inode(id)
    }

    /// Answers in a task of the mount.
    fn spawn<F>(&self, make: impl FnOnce(Arc<Shared>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let _entered = self.shared.runtime.enter();
        self.shared.parts.tasks.spawn(make(self.shared.clone()));
    }
}

fn errno_of(e: &Error) -> Errno {
    Errno(errno::errno(e.kind()))
}

/// One line for an error that an application is about to see.
fn log(operation: &'static str, inode: &Inode, e: &Error) {
    match e.kind() {
        Kind::NotFound | Kind::NoData | Kind::Unsupported => {}
        Kind::Stale => info!(operation, path = inode.path(), error = %e, "file changed at the origin"),
        _ => warn!(operation, path = inode.path(), error = %e, "operation failed"),
    }
}

impl Shared {
    fn inode(&self, id: u64) -> Result<Arc<Inode>> {
        self.parts.namespace.get(id).ok_or_else(|| Error::new(Kind::Stale, "node is not known").with("node", id))
    }

    fn node_attr(&self, id: u64, attr: &Attr) -> NodeAttr {
        let own = &self.parts.ownership;
        NodeAttr {
            ino: id,
            size: attr.size,
            blocks: attr::blocks(attr),
            atime: attr.atime.unwrap_or(attr.mtime),
            mtime: attr.mtime,
            ctime: attr.ctime,
            mode: attr::type_bits(attr.kind) | own.permissions(attr),
            nlink: attr.nlink,
            uid: own.uid(attr),
            gid: own.gid(attr),
            rdev: attr.rdev,
            blksize: IO_BYTES,
        }
    }

    fn attr_ttl(&self, kind: FileKind, left: Duration) -> Duration {
        if kind == FileKind::Directory { left } else { FILE_ATTR_TTL }
    }

    /// Interns an entry that is being sent to the kernel.
    fn entry(&self, dir: &Arc<Inode>, name: &Bytes, node: &Node, ttl: Duration) -> EntryOut {
        let inode = self.parts.namespace.intern(dir, name, node);
        EntryOut {
            node: inode.id,
            generation: 0,
            attr: self.node_attr(inode.id, &node.attr),
            entry_ttl: ttl,
            attr_ttl: self.attr_ttl(node.attr.kind, ttl),
        }
    }

    fn found(&self, dir: &Arc<Inode>, name: &Bytes, found: Found) -> EntryOut {
        match found.node {
            Some(node) => self.entry(dir, name, &node, found.ttl),
            None => EntryOut { entry_ttl: found.ttl, ..EntryOut::default() },
        }
    }

    async fn getattr(&self, inode: &Arc<Inode>) -> Result<AttrOut> {
        // Prefixes of an object store have no attributes of their own; a NAS directory has.
        if inode.kind == FileKind::Directory && !self.parts.source.shared_listing() {
            let fresh = self.parts.source.getattr(&inode.locator).await?;
            if fresh.attr.kind == FileKind::Directory {
                inode.set_attr(fresh.attr);
            }
        }
        Ok(self.attr_out(inode))
    }

    fn attr_out(&self, inode: &Inode) -> AttrOut {
        AttrOut { attr: self.node_attr(inode.id, &inode.attr()), ttl: self.attr_ttl(inode.kind, self.parts.ttl) }
    }

    fn open_dir(&self, listing: Arc<Listing>) -> OpenOut {
        let fh = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.open_dirs.lock().insert(fh, listing);
        OpenOut { fh, flags: 0 }
    }

    fn fill(&self, dir: &Arc<Inode>, listing: &Listing, offset: u64, mut reply: DirReply) {
        let parent = dir.parent.as_ref().map_or(dir.id, |p| p.id);
        let ttl = listing.freshness();
        // `.` and `..` give a number and a type only: node 0 tells the kernel that they are no look-ups.
        let dot = |ino| EntryOut {
            attr: NodeAttr { ino, mode: libc::S_IFDIR, ..NodeAttr::default() },
            ..EntryOut::default()
        };
        let dots = [(b".".as_slice(), dir.id), (b"..".as_slice(), parent)];
        for (i, (name, id)) in dots.into_iter().enumerate().skip(offset.min(DOTS) as usize) {
            if !reply.add(name, i as u64 + 1, &dot(id)) {
                return reply.finish();
            }
        }
        let first = offset.saturating_sub(DOTS) as usize;
        for (i, e) in listing.entries().iter().enumerate().skip(first) {
            // A look-up is counted only for what really goes out.
            if !reply.fits(&e.name) {
                break;
            }
            let entry = if reply.plus() {
                self.entry(dir, &e.name, &e.node, ttl)
            } else {
                // Without attributes the number is a hint; the look-up that follows gives the node.
                EntryOut {
                    attr: NodeAttr { ino: u64::MAX, mode: attr::type_bits(e.node.attr.kind), ..NodeAttr::default() },
                    ..EntryOut::default()
                }
            };
            reply.add(&e.name, i as u64 + DOTS + 1, &entry);
        }
        reply.finish();
    }

    /// The file is no longer what its node says: the kernel drops the name, so that the next open finds the new version.
    fn gone_stale(&self, inode: &Arc<Inode>) {
        if !inode.mark_stale() {
            return;
        }
        if let Some(parent) = &inode.parent {
            self.parts.directories.distrust(parent);
            if let Some(session) = self.session.get().and_then(Weak::upgrade) {
                let gone = Notification::InvalidateEntry { parent: parent.id, name: inode.name.clone() };
                if let Err(e) = session.notifier().try_tell(gone) {
                    warn!(path = inode.path(), error = %e, "the kernel keeps an old name until its time is over");
                }
            }
        }
    }
}

impl FileSystem for EfcFs {
    fn init(&self, negotiated: &Negotiated) {
        info!(abi = ?negotiated.abi, adopted = negotiated.adopted, max_readahead = negotiated.max_readahead, "kernel session is up");
    }

    fn lookup(&self, _ctx: &Caller, parent: u64, name: &[u8], reply: Reply<EntryOut>) {
        let dir = match self.inode(parent) {
            Ok(d) if d.dir.is_some() => d,
            Ok(_) => return reply.error(Errno::ENOTDIR),
            Err(e) => return reply.error(errno_of(&e)),
        };
        if let Some(found) = self.shared.parts.directories.find_cached(&dir, name) {
            let name = Bytes::copy_from_slice(name);
            return reply.ok(self.shared.found(&dir, &name, found));
        }
        let name = Bytes::copy_from_slice(name);
        self.spawn(|s| async move {
            match s.parts.directories.find(&dir, &name).await {
                Ok(found) => reply.ok(s.found(&dir, &name, found)),
                Err(e) => {
                    log("lookup", &dir, &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }

    fn forget(&self, node: u64, count: u64) {
        self.shared.parts.namespace.forget(node, count);
    }

    fn getattr(&self, _ctx: &Caller, node: u64, reply: Reply<AttrOut>) {
        let inode = match self.inode(node) {
            Ok(i) => i,
            Err(e) => return reply.error(errno_of(&e)),
        };
        if inode.kind != FileKind::Directory || self.shared.parts.source.shared_listing() {
            return reply.ok(self.shared.attr_out(&inode));
        }
        self.spawn(|s| async move {
            match s.getattr(&inode).await {
                Ok(out) => reply.ok(out),
                Err(e) => {
                    log("getattr", &inode, &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }

    fn readlink(&self, _ctx: &Caller, node: u64, reply: Reply<Bytes>) {
        let inode = match self.inode(node) {
            Ok(i) if i.kind == FileKind::Symlink => i,
            Ok(_) => return reply.error(Errno::EINVAL),
            Err(e) => return reply.error(errno_of(&e)),
        };
        self.spawn(|s| async move {
            match s.parts.source.readlink(&inode.locator).await {
                Ok(target) => reply.ok(target),
                Err(e) => {
                    log("readlink", &inode, &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }

    fn open(&self, _ctx: &Caller, _node: u64, _flags: i32, reply: Reply<OpenOut>) {
        // Read-only: the kernel never asks again, and keeps the pages of a file between opens.
        reply.error(Errno::ENOSYS);
    }

    fn read(&self, _ctx: &Caller, node: u64, _fh: u64, offset: u64, size: u32, _flags: i32, reply: ReadReply) {
        let inode = match self.inode(node) {
            Ok(i) if i.kind == FileKind::File => i,
            Ok(i) if i.kind == FileKind::Directory => return reply.error(Errno::EISDIR),
            Ok(_) => return reply.error(Errno::ENXIO),
            Err(e) => return reply.error(errno_of(&e)),
        };
        let end = (offset + size as u64).min(inode.size());
        if offset >= end {
            return reply.bytes(&[]);
        }
        let (ready, plan) = self.shared.parts.reader.try_read(&inode, offset..end);
        if let Some(pieces) = ready {
            return reply.slices(&pieces);
        }
        self.spawn(|s| async move {
            match s.parts.reader.read(&inode, offset..end, plan).await {
                Ok(pieces) => reply.slices(&pieces),
                Err(e) => {
                    log("read", &inode, &e);
                    if e.is(Kind::Stale) {
                        s.gone_stale(&inode);
                    }
                    reply.error(errno_of(&e));
                }
            }
        });
    }

    fn opendir(&self, _ctx: &Caller, node: u64, _flags: i32, reply: Reply<OpenOut>) {
        let dir = match self.inode(node) {
            Ok(i) => i,
            Err(e) => return reply.error(errno_of(&e)),
        };
        if let Some(listing) = self.shared.parts.directories.cached(&dir) {
            return reply.ok(self.shared.open_dir(listing));
        }
        self.spawn(|s| async move {
            match s.parts.directories.list(&dir).await {
                Ok(listing) => reply.ok(s.open_dir(listing)),
                Err(e) => {
                    log("opendir", &dir, &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }

    fn readdir(&self, _ctx: &Caller, node: u64, fh: u64, offset: u64, reply: DirReply) {
        let dir = match self.inode(node) {
            Ok(i) => i,
            Err(e) => return reply.error(errno_of(&e)),
        };
        let listing = self.shared.open_dirs.lock().get(&fh).cloned();
        if let Some(listing) = listing {
            return self.shared.fill(&dir, &listing, offset, reply);
        }
        // A directory that a predecessor process opened: its snapshot is gone, today's takes its place.
        self.spawn(|s| async move {
            match s.parts.directories.list(&dir).await {
                Ok(listing) => {
                    s.open_dirs.lock().insert(fh, listing.clone());
                    s.fill(&dir, &listing, offset, reply);
                }
                Err(e) => {
                    log("readdir", &dir, &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }

    fn releasedir(&self, _ctx: &Caller, _node: u64, fh: u64, reply: Reply<()>) {
        self.shared.open_dirs.lock().remove(&fh);
        reply.ok(());
    }

    fn statfs(&self, _ctx: &Caller, _node: u64, reply: Reply<StatfsOut>) {
        self.spawn(|s| async move {
            match s.parts.source.statfs().await {
                Ok(f) => reply.ok(statfs_out(&f)),
                Err(e) => {
                    log("statfs", &s.parts.namespace.root(), &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }

    fn getxattr(&self, _ctx: &Caller, node: u64, name: &[u8], reply: XattrReply) {
        let name = Bytes::copy_from_slice(name);
        self.with_xattrs(node, reply, move |all| {
            let value = all.into_iter().find(|(n, _)| *n == name).map(|(_, v)| v);
            value.ok_or_else(|| Error::new(Kind::NoData, "no such attribute"))
        });
    }

    fn listxattr(&self, _ctx: &Caller, node: u64, reply: XattrReply) {
        self.with_xattrs(node, reply, |all| {
            let names: Vec<u8> = all.iter().flat_map(|(n, _)| n.iter().copied().chain([0])).collect();
            Ok(names.into())
        });
    }

    fn lseek(&self, _ctx: &Caller, node: u64, _fh: u64, offset: i64, whence: i32, reply: Reply<LseekOut>) {
        let size = match self.inode(node) {
            Ok(i) => i.size(),
            Err(e) => return reply.error(errno_of(&e)),
        };
        match (u64::try_from(offset), whence) {
            (Ok(at), libc::SEEK_DATA) if at < size => reply.ok(LseekOut(at)),
            (Ok(at), libc::SEEK_HOLE) if at < size => reply.ok(LseekOut(size)),
            (_, libc::SEEK_DATA | libc::SEEK_HOLE) => reply.error(Errno::ENXIO),
            _ => reply.error(Errno::EINVAL),
        }
    }
}

impl EfcFs {
    fn with_xattrs(
        &self,
        node: u64,
        reply: XattrReply,
        pick: impl FnOnce(Vec<(Bytes, Bytes)>) -> Result<Bytes> + Send + 'static,
    ) {
        if !self.shared.parts.source.has_xattrs() {
            // The kernel never asks again.
            return reply.error(Errno::ENOSYS);
        }
        let inode = match self.inode(node) {
            Ok(i) => i,
            Err(e) => return reply.error(errno_of(&e)),
        };
        self.spawn(|s| async move {
            match s.parts.source.xattrs(&inode.locator).await.and_then(pick) {
                Ok(value) => reply.value(&value),
                Err(e) => {
                    log("xattr", &inode, &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }
}

fn statfs_out(f: &FsStats) -> StatfsOut {
    const UNIT: u64 = 4096;
    StatfsOut {
        blocks: f.total_bytes / UNIT,
        blocks_free: f.free_bytes / UNIT,
        blocks_available: f.available_bytes / UNIT,
        files: f.total_files,
        files_free: f.free_files,
        block_size: IO_BYTES,
        fragment_size: UNIT as u32,
        // The longest name an object key can give.
        name_max: 1024,
    }
}
