//! The only room that knows the FUSE protocol and the `fuser` crate: mounting, the session and its threads, adopting a running mount,
//! kernel notifications. Everything above sees [`FileSystem`] and the plain types of [`types`].
//!
//! Who reads and who writes. `fuser` does the INIT handshake, reads requests and decodes them. Answers are written by
//! [`reply`] straight to the fd, because that gives what `fuser` 0.18 has no call for: a READ answered from several slices without a copy,
//! separate name and attribute lifetimes in READDIRPLUS, times before 1970, and above all *not answering*: when another process goes on, a request that
//! was taken and not answered is what the kernel resends to the successor.

mod adapter;
mod adopt;
pub mod buffers;
mod conn;
mod encode;
mod features;
mod init;
mod metrics;
mod mount;
mod notify;
mod outcomes;
mod readers;
mod reply;
mod session;
pub mod types;

pub use adopt::adopt;
pub use features::KernelFeatures;
pub use init::{INIT_RECORD_FORMAT, InitRecord};
pub use mount::{Mount, MountConfig, Unmounted, abort_connection, check, own_no_files, serve};
pub use notify::{Notification, Notifier, Told};
pub use outcomes::{Outcomes, Resent};
pub use reply::{Answer, DirReply, ReadReply, Reply, XattrReply};
pub use session::{Drained, Ended, Session, SessionConfig};
pub use types::*;

use bytes::Bytes;
use std::sync::Arc;

/// A file system as the kernel sees it. Methods are called on the session's request threads and must not block for long: keep `reply`
/// and answer it from any thread, exactly once. A reply that is dropped unanswered is answered EIO and logged as an error, except
/// while the session drains for a hand-over: then it is left to the successor.
///
/// Default methods are those of a read-only mount: what changes something is refused with EROFS, and what a file system need not implement is
/// answered so that the kernel stops asking.
#[allow(clippy::too_many_arguments)] // The protocol's argument lists; a struct per operation would only rename them.
pub trait FileSystem: Send + Sync + 'static {
    /// Called once, before any other method, also in a process that adopts a running mount.
    fn init(&self, negotiated: &Negotiated) {
        let _ = negotiated;
    }

    /// Where it writes down requests that must not be done twice ([`Outcomes::begin`]). Their answers are written there too, and those of a predecessor given.
    fn outcomes(&self) -> Option<Arc<Outcomes>> {
        None
    }

    /// Finds `name` in directory `parent`. A negative answer is either ENOENT (asked again each time) or an entry with node 0.
    fn lookup(&self, ctx: &Caller, parent: u64, name: &[u8], reply: Reply<EntryOut>);

    /// The kernel drops `count` look-ups of `node`. Never answered, never sent twice.
    fn forget(&self, node: u64, count: u64);

    /// Attributes of a node.
    fn getattr(&self, ctx: &Caller, node: u64, reply: Reply<AttrOut>);

    /// Target of a symbolic link.
    fn readlink(&self, ctx: &Caller, node: u64, reply: Reply<Bytes>);

    /// Opens a file. ENOSYS: the kernel never asks again, on this mount, and sends no RELEASE either; files are then read with handle 0 and
    /// their pages are kept.
    fn open(&self, ctx: &Caller, node: u64, flags: i32, reply: Reply<OpenOut>);

    /// Reads `size` bytes at `offset`; a shorter answer is the end of the file.
    fn read(&self, ctx: &Caller, node: u64, fh: u64, at: ReadAt, reply: ReadReply);

    /// Last close of a handle. Its error reaches nobody.
    fn release(&self, ctx: &Caller, node: u64, fh: u64, flags: i32, reply: Reply<()>) {
        let _ = (ctx, node, fh, flags);
        reply.ok(());
    }

    /// Some process closed a descriptor of the handle. ENOSYS: never asked again.
    fn flush(&self, ctx: &Caller, node: u64, fh: u64, lock_owner: u64, reply: Reply<()>) {
        let _ = (ctx, node, fh, lock_owner);
        reply.error(Errno::ENOSYS);
    }

    /// Which lock of another owner stands against this one.
    fn getlk(&self, ctx: &Caller, node: u64, fh: u64, owner: u64, range: LockRange, reply: Reply<LockOut>) {
        let _ = (ctx, node, fh, owner, range);
        reply.error(Errno::ENOSYS);
    }

    /// Locks or unlocks a range for `owner`, and with `wait` waits for others.
    #[allow(clippy::too_many_arguments, reason = "what the kernel says")]
    fn setlk(&self, ctx: &Caller, node: u64, fh: u64, owner: u64, range: LockRange, wait: bool, reply: Reply<()>) {
        let _ = (ctx, node, fh, owner, range, wait);
        reply.error(Errno::ENOSYS);
    }

    /// Opens a directory. ENOSYS: never asked again, and the kernel keeps its names until they are invalidated.
    fn opendir(&self, ctx: &Caller, node: u64, flags: i32, reply: Reply<OpenOut>);

    /// Fills a page with the names of a directory from position `offset` on (0 is the start, else the `next_offset` of an entry sent
    /// before). An empty page is the end. With [`DirReply::plus`] each entry but `.` and `..` counts as a look-up.
    fn readdir(&self, ctx: &Caller, node: u64, fh: u64, offset: u64, reply: DirReply);

    /// Last close of a directory handle.
    fn releasedir(&self, ctx: &Caller, node: u64, fh: u64, reply: Reply<()>) {
        let _ = (ctx, node, fh);
        reply.ok(());
    }

    /// Flushes a directory to stable storage. ENOSYS counts as success, and the kernel stops asking.
    fn fsyncdir(&self, ctx: &Caller, node: u64, fh: u64, datasync: bool, reply: Reply<()>) {
        let _ = (ctx, node, fh, datasync);
        reply.error(Errno::ENOSYS);
    }

    /// Size and usage of the file system.
    fn statfs(&self, ctx: &Caller, node: u64, reply: Reply<StatfsOut>);

    /// Value of an extended attribute. ENOSYS: never asked again (applications see EOPNOTSUPP).
    fn getxattr(&self, ctx: &Caller, node: u64, name: &[u8], reply: XattrReply) {
        let _ = (ctx, node, name);
        reply.error(Errno::ENOSYS);
    }

    /// Names of the extended attributes, each ended by NUL. ENOSYS: never asked again.
    fn listxattr(&self, ctx: &Caller, node: u64, reply: XattrReply) {
        let _ = (ctx, node);
        reply.error(Errno::ENOSYS);
    }

    /// `access(2)`, on mounts without `default_permissions`. ENOSYS: never asked again, everything is permitted.
    fn access(&self, ctx: &Caller, node: u64, mask: i32, reply: Reply<()>) {
        let _ = (ctx, node, mask);
        reply.error(Errno::ENOSYS);
    }

    /// SEEK_DATA and SEEK_HOLE. ENOSYS: never asked again, files count as all data.
    fn lseek(&self, ctx: &Caller, node: u64, fh: u64, offset: i64, whence: i32, reply: Reply<LseekOut>) {
        let _ = (ctx, node, fh, offset, whence);
        reply.error(Errno::ENOSYS);
    }

    /// `poll(2)`. ENOSYS: never asked again, always ready.
    fn poll(&self, ctx: &Caller, node: u64, fh: u64, events: u32, reply: Reply<PollOut>) {
        let _ = (ctx, node, fh, events);
        reply.error(Errno::ENOSYS);
    }

    /// `ioctl(2)`: none is known, so there is nothing but an error to answer with.
    fn ioctl(&self, ctx: &Caller, node: u64, fh: u64, command: u32, reply: Reply<()>) {
        let _ = (ctx, node, fh, command);
        reply.error(Errno::ENOTTY);
    }

    /// Flushes a file to stable storage. ENOSYS counts as success, and the kernel stops asking.
    fn fsync(&self, ctx: &Caller, node: u64, fh: u64, datasync: bool, reply: Reply<()>) {
        let _ = (ctx, node, fh, datasync);
        reply.error(Errno::ENOSYS);
    }

    /// Changes attributes.
    fn setattr(&self, ctx: &Caller, node: u64, set: &SetAttr, reply: Reply<AttrOut>) {
        let _ = (ctx, node, set);
        reply.error(Errno::EROFS);
    }

    /// Makes a special or plain file.
    fn mknod(&self, ctx: &Caller, parent: u64, name: &[u8], mode: u32, umask: u32, rdev: u32, reply: Reply<EntryOut>) {
        let _ = (ctx, parent, name, mode, umask, rdev);
        reply.error(Errno::EROFS);
    }

    /// Makes a directory.
    fn mkdir(&self, ctx: &Caller, parent: u64, name: &[u8], mode: u32, umask: u32, reply: Reply<EntryOut>) {
        let _ = (ctx, parent, name, mode, umask);
        reply.error(Errno::EROFS);
    }

    /// Removes a file.
    fn unlink(&self, ctx: &Caller, parent: u64, name: &[u8], reply: Reply<()>) {
        let _ = (ctx, parent, name);
        reply.error(Errno::EROFS);
    }

    /// Removes a directory.
    fn rmdir(&self, ctx: &Caller, parent: u64, name: &[u8], reply: Reply<()>) {
        let _ = (ctx, parent, name);
        reply.error(Errno::EROFS);
    }

    /// Makes a symbolic link `name` to `target`.
    fn symlink(&self, ctx: &Caller, parent: u64, name: &[u8], target: &[u8], reply: Reply<EntryOut>) {
        let _ = (ctx, parent, name, target);
        reply.error(Errno::EROFS);
    }

    /// Renames; `flags` are those of `renameat2(2)`.
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
        let _ = (ctx, parent, name, new_parent, new_name, flags);
        reply.error(Errno::EROFS);
    }

    /// Makes a hard link to `node`.
    fn link(&self, ctx: &Caller, node: u64, new_parent: u64, new_name: &[u8], reply: Reply<EntryOut>) {
        let _ = (ctx, node, new_parent, new_name);
        reply.error(Errno::EROFS);
    }

    /// Makes and opens a file.
    fn create(
        &self,
        ctx: &Caller,
        parent: u64,
        name: &[u8],
        mode: u32,
        umask: u32,
        flags: i32,
        reply: Reply<CreateOut>,
    ) {
        let _ = (ctx, parent, name, mode, umask, flags);
        reply.error(Errno::EROFS);
    }

    /// Writes `data` at `offset`. `data` lives in the thread's request buffer: copy it to answer later.
    fn write(&self, ctx: &Caller, node: u64, fh: u64, at: WriteAt, data: &[u8], reply: Reply<WriteOut>) {
        let _ = (ctx, node, fh, at, data);
        reply.error(Errno::EROFS);
    }

    /// Sets an extended attribute; `flags` are those of `setxattr(2)`.
    fn setxattr(&self, ctx: &Caller, node: u64, name: &[u8], value: &[u8], flags: i32, reply: Reply<()>) {
        let _ = (ctx, node, name, value, flags);
        reply.error(Errno::EROFS);
    }

    /// Removes an extended attribute.
    fn removexattr(&self, ctx: &Caller, node: u64, name: &[u8], reply: Reply<()>) {
        let _ = (ctx, node, name);
        reply.error(Errno::EROFS);
    }

    /// Reserves or frees space; `mode` is that of `fallocate(2)`.
    fn fallocate(&self, ctx: &Caller, node: u64, fh: u64, offset: u64, length: u64, mode: i32, reply: Reply<()>) {
        let _ = (ctx, node, fh, offset, length, mode);
        reply.error(Errno::EROFS);
    }

    /// Copies between two open files, (node, handle, offset) each.
    fn copy_file_range(
        &self,
        ctx: &Caller,
        from: (u64, u64, u64),
        to: (u64, u64, u64),
        length: u64,
        reply: Reply<WriteOut>,
    ) {
        let _ = (ctx, from, to, length);
        reply.error(Errno::EROFS);
    }
}
