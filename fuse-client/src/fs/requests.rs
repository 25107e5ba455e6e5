//! The kernel's requests: which function answers each, on which thread. What needs no waiting is answered at once.

use super::belief::Permit;
use super::change::{self, At};
use super::io::{regular, seek_by_size};
use super::open::Opening;
use super::{EfcFs, errno_of, log};
use crate::kernel::{
    AttrOut, Caller, CreateOut, DirReply, EntryOut, Errno, FileSystem, LockOut, LockRange, LseekOut, Negotiated,
    OpenOut, Outcomes, ReadAt, ReadReply, Reply, SetAttr, StatfsOut, WriteAt, WriteOut, XattrReply,
};
use crate::namespace::Inode;
use crate::namespace::listing::Listing;
use bytes::Bytes;
use efc_backend::FsStats;
use efc_backend::tree::{New, NewNode};
use efc_common::lease::Mode;
use efc_common::node::FileKind;
use efc_common::{Error, Kind, Result};
use std::ops::Range;
use std::sync::Arc;
use tracing::{info, trace};

impl FileSystem for EfcFs {
    fn outcomes(&self) -> Option<Arc<Outcomes>> {
        self.shared.parts.failover.as_ref().map(|f| f.outcomes.clone())
    }

    fn init(&self, negotiated: &Negotiated) {
        info!(abi = ?negotiated.abi, adopted = negotiated.adopted, max_readahead = negotiated.max_readahead, "kernel session is up");
    }

    fn lookup(&self, _ctx: &Caller, parent: u64, name: &[u8], reply: Reply<EntryOut>) {
        let dir = match self.inode(parent) {
            Ok(d) if d.dir.is_some() => d,
            Ok(_) => return reply.error(Errno::ENOTDIR),
            Err(e) => return reply.error(errno_of(&e)),
        };
        let name = Bytes::copy_from_slice(name);
        if let Some(permit) = self.shared.quick_names(&dir)
            && let Some(found) = self.shared.parts.directories.find_cached(&dir, &name)
        {
            let entry = self.shared.found(&permit, &dir, &name, found);
            self.shared.write_down();
            return reply.ok(entry);
        }
        self.answer("lookup", parent, reply, |s, dir| async move {
            let permit = s.names(&dir).await?;
            let found = s.parts.directories.find(&dir, &name, permit.belief).await?;
            Ok((s.found(&permit, &dir, &name, found), permit))
        });
    }

    fn forget(&self, node: u64, count: u64) {
        self.shared.parts.namespace.forget(node, count);
    }

    fn getattr(&self, _ctx: &Caller, node: u64, reply: Reply<AttrOut>) {
        let inode = match self.inode(node) {
            Ok(inode) => inode,
            Err(e) => return reply.error(errno_of(&e)),
        };
        if self.shared.attr_is_known(&inode)
            && let Some(permit) = self.shared.quick_node(&inode)
        {
            return reply.ok(self.shared.attr_out(&inode, &permit));
        }
        self.answer("getattr", node, reply, |s, inode| async move { s.getattr(&inode).await });
    }

    fn setattr(&self, ctx: &Caller, node: u64, set: &SetAttr, reply: Reply<AttrOut>) {
        let set = *set;
        self.change_once(ctx, "setattr", node, reply, move |s, inode, once| async move {
            s.set_attr(&inode, set, once).await
        });
    }

    fn readlink(&self, _ctx: &Caller, node: u64, reply: Reply<Bytes>) {
        match self.inode(node) {
            Ok(i) if i.kind != FileKind::Symlink => reply.error(Errno::EINVAL),
            _ => self.answer("readlink", node, reply, |s, inode| async move {
                let permit = s.node(&inode, Mode::Shared).await?;
                Ok((s.parts.source.readlink(&inode.locator()).await?, permit))
            }),
        }
    }

    fn mknod(&self, ctx: &Caller, parent: u64, name: &[u8], mode: u32, _umask: u32, rdev: u32, reply: Reply<EntryOut>) {
        let (name, uid, gid) = (Bytes::copy_from_slice(name), ctx.uid, ctx.gid);
        self.change_once(ctx, "mknod", parent, reply, move |s, dir, once| async move {
            s.make(At { dir, name }, change::new_special(mode, rdev, uid, gid)?, once).await
        });
    }

    fn mkdir(&self, ctx: &Caller, parent: u64, name: &[u8], mode: u32, _umask: u32, reply: Reply<EntryOut>) {
        let name = Bytes::copy_from_slice(name);
        let new = NewNode { what: New::Directory, mode: mode & 0o7777, uid: ctx.uid, gid: ctx.gid };
        self.change_once(ctx, "mkdir", parent, reply, |s, dir, once| async move {
            s.make(At { dir, name }, new, once).await
        });
    }

    fn symlink(&self, ctx: &Caller, parent: u64, name: &[u8], target: &[u8], reply: Reply<EntryOut>) {
        let name = Bytes::copy_from_slice(name);
        let what = New::Symlink(Bytes::copy_from_slice(target));
        let new = NewNode { what, mode: 0o777, uid: ctx.uid, gid: ctx.gid };
        self.change_once(ctx, "symlink", parent, reply, |s, dir, once| async move {
            s.make(At { dir, name }, new, once).await
        });
    }

    fn unlink(&self, ctx: &Caller, parent: u64, name: &[u8], reply: Reply<()>) {
        let name = Bytes::copy_from_slice(name);
        self.change_once(ctx, "unlink", parent, reply, |s, dir, once| async move {
            s.remove(At { dir, name }, false, once).await
        });
    }

    fn rmdir(&self, ctx: &Caller, parent: u64, name: &[u8], reply: Reply<()>) {
        let name = Bytes::copy_from_slice(name);
        self.change_once(ctx, "rmdir", parent, reply, |s, dir, once| async move {
            s.remove(At { dir, name }, true, once).await
        });
    }

    fn rename(
        &self,
        ctx: &Caller,
        parent: u64,
        name: &[u8],
        new_parent: u64,
        new_name: &[u8],
        flags: u32,
        reply: Reply<()>,
    ) {
        let (name, new_name) = (Bytes::copy_from_slice(name), Bytes::copy_from_slice(new_name));
        self.change_once(ctx, "rename", parent, reply, move |s, dir, once| async move {
            let to = At { dir: s.inode(new_parent)?, name: new_name };
            s.rename(At { dir, name }, to, flags, once).await
        });
    }

    fn link(&self, ctx: &Caller, node: u64, new_parent: u64, new_name: &[u8], reply: Reply<EntryOut>) {
        let name = Bytes::copy_from_slice(new_name);
        self.change_once(ctx, "link", node, reply, move |s, inode, once| async move {
            let at = At { dir: s.inode(new_parent)?, name };
            s.link(&inode, at, once).await
        });
    }

    fn create(
        &self,
        ctx: &Caller,
        parent: u64,
        name: &[u8],
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: Reply<CreateOut>,
    ) {
        let name = Bytes::copy_from_slice(name);
        let new = NewNode { what: New::File, mode: mode & 0o7777, uid: ctx.uid, gid: ctx.gid };
        let how = Opening { flags, by: ctx.pid, direct: false, unique: ctx.unique };
        self.change_once(ctx, "create", parent, reply, move |s, dir, once| async move {
            s.create(At { dir, name }, new, how, once).await
        });
    }

    fn open(&self, ctx: &Caller, node: u64, flags: i32, reply: Reply<OpenOut>) {
        if self.read_only() {
            // The kernel never asks again, and keeps the pages of a file between opens.
            return reply.error(Errno::ENOSYS);
        }
        let how = Opening { flags, by: ctx.pid, direct: false, unique: ctx.unique };
        self.answer("open", node, reply, move |s, inode| async move { s.open(&inode, how).await });
    }

    fn read(&self, _ctx: &Caller, node: u64, fh: u64, at: ReadAt, reply: ReadReply) {
        let inode = match self.inode(node).map_err(|e| errno_of(&e)).and_then(regular) {
            Ok(i) => i,
            Err(errno) => return reply.error(errno),
        };
        let range = at.offset..at.offset + at.size as u64;
        if !self.shared.parts.namespace.follows() {
            return self.read_version(inode, range, reply);
        }
        if let Some(permit) = self.shared.quick_node(&inode)
            && let Some(pieces) = self.shared.read_ready(&inode, range.clone())
        {
            reply.slices(&pieces);
            return drop(permit);
        }
        self.spawn(|s| async move {
            match s.read_following(&inode, fh, range.clone(), at.for_cache).await {
                Ok((pieces, permit)) => {
                    trace!(
                        path = inode.path(),
                        ?range,
                        got = pieces.iter().map(Bytes::len).sum::<usize>(),
                        size = inode.size(),
                        "read"
                    );
                    reply.slices(&pieces);
                    if permit.passing {
                        // The kernel may have it as a page now (also of a mapping of a direct descriptor); it is told before what was passed by is given back.
                        s.drop_pages(&inode, range).await;
                    }
                }
                Err(e) => {
                    log("read", &inode, &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }

    fn write(&self, ctx: &Caller, node: u64, fh: u64, at: WriteAt, data: &[u8], reply: Reply<WriteOut>) {
        let data = Bytes::copy_from_slice(data);
        self.change_once(ctx, "write", node, reply, move |s, inode, once| async move {
            let permit = if at.from_cache { s.written_back(&inode).await? } else { s.to_change(&inode).await? };
            let handle = s.files.get(fh)?;
            let written = permit.within(s.write(&handle, at.offset, data, permit.belief, &once)).await?;
            Ok((WriteOut(written), permit))
        });
    }

    fn flush(&self, ctx: &Caller, node: u64, fh: u64, lock_owner: u64, reply: Reply<()>) {
        if self.read_only() {
            return reply.error(Errno::ENOSYS);
        }
        let by = ctx.pid;
        self.answer("close", node, reply, move |s, inode| async move {
            let closed = s.closed_by(&*s.files.get(fh)?, by).await;
            s.unlock_owner(&inode, lock_owner).await;
            closed
        });
    }

    fn getlk(&self, _ctx: &Caller, node: u64, fh: u64, owner: u64, range: LockRange, reply: Reply<LockOut>) {
        self.lock("getlk", node, reply, move |s, inode| async move { s.test_lock(&inode, fh, owner, range).await });
    }

    fn setlk(&self, ctx: &Caller, node: u64, fh: u64, owner: u64, range: LockRange, wait: bool, reply: Reply<()>) {
        let ctx = *ctx;
        self.lock("setlk", node, reply, move |s, inode| async move {
            s.set_lock(ctx, &inode, fh, owner, range, wait).await
        });
    }

    fn fsync(&self, _ctx: &Caller, node: u64, fh: u64, datasync: bool, reply: Reply<()>) {
        if self.read_only() {
            return reply.error(Errno::ENOSYS);
        }
        self.answer("fsync", node, reply, move |s, _| async move { s.sync(&*s.files.get(fh)?, datasync).await });
    }

    fn release(&self, _ctx: &Caller, _node: u64, fh: u64, _flags: i32, reply: Reply<()>) {
        self.spawn(|s| async move {
            s.unlock_handle(fh).await;
            s.release(fh).await;
            reply.ok(());
        });
    }

    fn fallocate(&self, _ctx: &Caller, node: u64, fh: u64, offset: u64, length: u64, mode: i32, reply: Reply<()>) {
        self.change("fallocate", node, reply, move |s, _| async move {
            let handle = s.files.get(fh)?;
            let permit = s.to_change(&handle.inode).await?;
            permit.within(s.allocate(&handle, offset..offset + length, mode, permit.belief)).await?;
            Ok(((), permit))
        });
    }

    fn copy_file_range(
        &self,
        _ctx: &Caller,
        from: (u64, u64, u64),
        to: (u64, u64, u64),
        length: u64,
        reply: Reply<WriteOut>,
    ) {
        self.change("copy_file_range", to.0, reply, move |s, _| async move {
            let (source, target) = (s.files.get(from.1)?, s.files.get(to.1)?);
            // What others have of the source that is not at the origin yet comes there now.
            drop(s.node(&source.inode, Mode::Shared).await?);
            let permit = s.to_change(&target.inode).await?;
            let copying = s.copy((&*source, from.2), (&*target, to.2), length, permit.belief);
            let copied = permit.within(copying).await?;
            Ok((WriteOut(copied), permit))
        });
    }

    fn opendir(&self, _ctx: &Caller, node: u64, _flags: i32, reply: Reply<OpenOut>) {
        let dir = match self.inode(node) {
            Ok(i) => i,
            Err(e) => return reply.error(errno_of(&e)),
        };
        if let Some(_permit) = self.shared.quick_names(&dir)
            && let Some(listing) = self.shared.parts.directories.snapshot(&dir)
        {
            return reply.ok(self.shared.open_dir(listing));
        }
        self.answer("opendir", node, reply, |s, dir| async move {
            let permit = s.names(&dir).await?;
            let listing = s.parts.directories.list(&dir, permit.belief).await?;
            Ok((s.open_dir(listing), permit))
        });
    }

    fn readdir(&self, _ctx: &Caller, node: u64, fh: u64, offset: u64, reply: DirReply) {
        let dir = match self.inode(node) {
            Ok(i) => i,
            Err(e) => return reply.error(errno_of(&e)),
        };
        let listing = self.shared.open_dirs.lock().get(&fh).cloned();
        // From the start again (rewinddir) shows what has changed since.
        let current = |l: &Arc<Listing>| {
            let seen = l.seen();
            offset > 0
                || self.shared.parts.directories.is_current(&dir, seen.asked)
                    && self.shared.is_continuous(&dir, seen.since).is_some()
        };
        if let Some(listing) = listing.filter(current) {
            return self.shared.fill(&dir, &listing, offset, reply);
        }
        // Or a directory that a predecessor process opened: its snapshot is gone, today's takes its place.
        self.spawn(|s| async move {
            let listed = async {
                let permit = s.names(&dir).await?;
                Ok((s.parts.directories.list(&dir, permit.belief).await?, permit))
            };
            match listed.await {
                Ok((listing, _permit)) => {
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

    fn statfs(&self, _ctx: &Caller, node: u64, reply: Reply<StatfsOut>) {
        self.answer("statfs", node, reply, |s, _| async move {
            // The longest name an object key can give, or a file system of Linux.
            let name_max = if s.parts.source.shared_listing() { 1024 } else { 255 };
            Ok((statfs_out(&s.parts.source.statfs().await?, name_max), Permit::none()))
        });
    }

    fn setxattr(&self, ctx: &Caller, node: u64, name: &[u8], value: &[u8], flags: i32, reply: Reply<()>) {
        let (name, value) = (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value));
        self.change_once(ctx, "setxattr", node, reply, move |s, inode, once| async move {
            let permit = s.to_change(&inode).await?;
            let set = permit.within(once.begin(&s, None)?.set_xattr(&inode.locator(), &name, &value, flags)).await;
            inode.expire();
            set.map(|()| ((), permit))
        });
    }

    fn removexattr(&self, ctx: &Caller, node: u64, name: &[u8], reply: Reply<()>) {
        let name = Bytes::copy_from_slice(name);
        self.change_once(ctx, "removexattr", node, reply, move |s, inode, once| async move {
            let permit = s.to_change(&inode).await?;
            let removed = permit.within(once.begin(&s, None)?.remove_xattr(&inode.locator(), &name)).await;
            inode.expire();
            removed.map(|()| ((), permit))
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

    fn lseek(&self, _ctx: &Caller, node: u64, fh: u64, offset: i64, whence: i32, reply: Reply<LseekOut>) {
        let hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return reply.error(Errno::EINVAL),
        };
        let inode = match self.inode(node) {
            Ok(i) => i,
            Err(e) => return reply.error(errno_of(&e)),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        match self.shared.files.get(fh) {
            Ok(handle) => self.spawn(|s| async move {
                reply.end(s.seek(&handle, offset, hole).await.map(LseekOut));
            }),
            Err(_) => reply.end(seek_by_size(inode.size(), offset, hole).map(LseekOut)),
        }
    }
}

impl EfcFs {
    /// READ of a node that names one version.
    fn read_version(&self, inode: Arc<Inode>, range: Range<u64>, reply: ReadReply) {
        let range = range.start..range.end.min(inode.size());
        if range.is_empty() {
            return reply.bytes(&[]);
        }
        let (ready, plan) = self.shared.parts.reader.try_read(&inode, range.clone());
        if let Some(pieces) = ready {
            return reply.slices(&pieces);
        }
        self.spawn(|s| async move {
            match s.parts.reader.read(&inode, range, plan).await {
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
            match s.parts.source.xattrs(&inode.locator()).await.and_then(pick) {
                Ok(value) => reply.value(&value),
                Err(e) => {
                    log("xattr", &inode, &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }
}

fn statfs_out(f: &FsStats, name_max: u32) -> StatfsOut {
    const UNIT: u64 = 4096;
    StatfsOut {
        blocks: f.total_bytes / UNIT,
        blocks_free: f.free_bytes / UNIT,
        blocks_available: f.available_bytes / UNIT,
        files: f.total_files,
        files_free: f.free_files,
        block_size: super::IO_BYTES,
        fragment_size: UNIT as u32,
        name_max,
    }
}
