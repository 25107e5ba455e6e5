//! Between `fuser` and [`FileSystem`]: decoded requests in, plain types out. No decision about files is made here.
//!
//! Each callback first forgets `fuser`'s reply object: answers are written by [`super::reply`], and `fuser` would send EIO for an object that
//! is dropped. What that leaks is one count of the reference to its fd, and nothing else: these objects own no heap memory before they are
//! used. [`super::readers`] therefore takes the connection away from under that fd when the session ends.

use std::ffi::OsStr;
use std::fmt::Write;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use efc_common::node::Time;
use fuser::{FileHandle, INodeNo, LockOwner, OpenFlags, TimeOrNow};
use parking_lot::Mutex;

use super::FileSystem;
use super::conn::Conn;
use super::init::{InitRecord, InitRequest};
use super::metrics::Op;
use super::reply::{DirReply, RESENT, ReadReply, Reply, Slot, XattrReply};
use super::types::{Caller, LockRange, ReadAt, SetAttr, SetTime, WriteAt};

/// The smallest directory page any kernel asks for, bytes.
const DIR_PAGE_BYTES_MIN: usize = 4096;

/// What `fuser` calls.
pub(super) struct Adapter {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) conn: Arc<Conn>,
    pub(super) want: InitRequest,
    /// What the handshake agreed on; read by the session right after it.
    pub(super) agreed: Arc<Mutex<Option<InitRecord>>>,
}

impl Adapter {
    /// Takes a request over from `fuser`, unless the session drains: then nobody answers it here.
    fn take<R>(&self, req: &fuser::Request, op: Op, reply: R) -> Option<(Caller, Slot)> {
        std::mem::forget(reply);
        if !self.conn.serving() {
            return None;
        }
        let raw = req.unique().0;
        let caller =
            Caller { uid: req.uid(), gid: req.gid(), pid: req.pid(), unique: raw & !RESENT, resent: raw & RESENT != 0 };
        let slot = Slot::new(self.conn.clone(), raw, op);
        let slot = if caller.resent { slot.answered_before()? } else { slot };
        Some((caller, slot))
    }

    /// Runs one operation. A panic of the file system costs the one request (its reply answers EIO when it unwinds), not the thread: threads
    /// are what the mount lives on.
    fn run<R>(&self, req: &fuser::Request, op: Op, reply: R, call: impl FnOnce(&dyn FileSystem, &Caller, Slot)) {
        let Some((caller, slot)) = self.take(req, op, reply) else { return };
        if catch_unwind(AssertUnwindSafe(|| call(&*self.fs, &caller, slot))).is_err() {
            tracing::error!(op = op.name(), "the file system panicked on a request");
        }
    }
}

fn time(t: SystemTime) -> Time {
    match t.duration_since(UNIX_EPOCH) {
        Ok(d) => Time { secs: d.as_secs() as i64, nanos: d.subsec_nanos() },
        Err(e) => {
            let d = e.duration();
            let borrow = i64::from(d.subsec_nanos() != 0);
            Time { secs: -(d.as_secs() as i64) - borrow, nanos: (1_000_000_000 - d.subsec_nanos()) % 1_000_000_000 }
        }
    }
}

fn set_time(t: TimeOrNow) -> SetTime {
    match t {
        TimeOrNow::SpecificTime(t) => SetTime::At(time(t)),
        TimeOrNow::Now => SetTime::Now,
    }
}

/// How many bytes of entries a directory reply may carry. `fuser` 0.18 knows and does not tell, except in the debug text of the reply
/// object; should that text change, the smallest page is right as well, only slower (a test watches over it).
fn page_bytes(reply: &impl std::fmt::Debug) -> usize {
    /// Keeps the digits that follow the name of the field.
    #[derive(Default)]
    struct Find {
        text: String,
    }
    impl Write for Find {
        fn write_str(&mut self, s: &str) -> std::fmt::Result {
            self.text.push_str(s);
            Ok(())
        }
    }
    let mut find = Find::default();
    let found = write!(find, "{reply:?}").ok().and_then(|()| {
        let (_, rest) = find.text.split_once("max_size: ")?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    });
    found.unwrap_or(DIR_PAGE_BYTES_MIN).max(DIR_PAGE_BYTES_MIN)
}

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _req: &fuser::Request, config: &mut fuser::KernelConfig) -> io::Result<()> {
        *self.agreed.lock() = Some(self.want.negotiate(config));
        Ok(())
    }

    fn lookup(&self, req: &fuser::Request, parent: INodeNo, name: &OsStr, reply: fuser::ReplyEntry) {
        self.run(req, Op::Lookup, reply, |fs, c, s| fs.lookup(c, parent.0, name.as_bytes(), Reply::new(s)));
    }

    fn forget(&self, _req: &fuser::Request, ino: INodeNo, nlookup: u64) {
        // Taken in every phase: a FORGET that was read is never sent again.
        self.conn.metrics.forgotten(1);
        if catch_unwind(AssertUnwindSafe(|| self.fs.forget(ino.0, nlookup))).is_err() {
            tracing::error!(op = Op::Forget.name(), "the file system panicked on a request");
        }
    }

    fn getattr(&self, req: &fuser::Request, ino: INodeNo, _fh: Option<FileHandle>, reply: fuser::ReplyAttr) {
        self.run(req, Op::Getattr, reply, |fs, c, s| fs.getattr(c, ino.0, Reply::new(s)));
    }

    fn setattr(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: fuser::ReplyAttr,
    ) {
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            ctime: ctime.map(time),
            fh: fh.map(|f| f.0),
        };
        self.run(req, Op::Setattr, reply, |fs, c, s| fs.setattr(c, ino.0, &set, Reply::new(s)));
    }

    fn readlink(&self, req: &fuser::Request, ino: INodeNo, reply: fuser::ReplyData) {
        self.run(req, Op::Readlink, reply, |fs, c, s| fs.readlink(c, ino.0, Reply::new(s)));
    }

    fn mknod(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: fuser::ReplyEntry,
    ) {
        self.run(req, Op::Mknod, reply, |fs, c, s| {
            fs.mknod(c, parent.0, name.as_bytes(), mode, umask, rdev, Reply::new(s))
        });
    }

    fn mkdir(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: fuser::ReplyEntry,
    ) {
        self.run(req, Op::Mkdir, reply, |fs, c, s| fs.mkdir(c, parent.0, name.as_bytes(), mode, umask, Reply::new(s)));
    }

    fn unlink(&self, req: &fuser::Request, parent: INodeNo, name: &OsStr, reply: fuser::ReplyEmpty) {
        self.run(req, Op::Unlink, reply, |fs, c, s| fs.unlink(c, parent.0, name.as_bytes(), Reply::new(s)));
    }

    fn rmdir(&self, req: &fuser::Request, parent: INodeNo, name: &OsStr, reply: fuser::ReplyEmpty) {
        self.run(req, Op::Rmdir, reply, |fs, c, s| fs.rmdir(c, parent.0, name.as_bytes(), Reply::new(s)));
    }

    fn symlink(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: fuser::ReplyEntry,
    ) {
        self.run(req, Op::Symlink, reply, |fs, c, s| {
            fs.symlink(c, parent.0, link_name.as_bytes(), target.as_os_str().as_bytes(), Reply::new(s))
        });
    }

    fn rename(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: fuser::RenameFlags,
        reply: fuser::ReplyEmpty,
    ) {
        self.run(req, Op::Rename, reply, |fs, c, s| {
            fs.rename(c, parent.0, name.as_bytes(), newparent.0, newname.as_bytes(), flags.bits(), Reply::new(s))
        });
    }

    fn link(&self, req: &fuser::Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: fuser::ReplyEntry) {
        self.run(req, Op::Link, reply, |fs, c, s| fs.link(c, ino.0, newparent.0, newname.as_bytes(), Reply::new(s)));
    }

    fn open(&self, req: &fuser::Request, ino: INodeNo, flags: OpenFlags, reply: fuser::ReplyOpen) {
        self.run(req, Op::Open, reply, |fs, c, s| fs.open(c, ino.0, flags.0, Reply::new(s)));
    }

    fn read(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: fuser::ReplyData,
    ) {
        let at = ReadAt { offset, size, for_cache: lock_owner.is_none() };
        self.run(req, Op::Read, reply, |fs, c, s| fs.read(c, ino.0, fh.0, at, ReadReply::new(s, size)));
    }

    fn write(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: fuser::WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: fuser::ReplyWrite,
    ) {
        let at = WriteAt { offset, from_cache: write_flags.contains(fuser::WriteFlags::FUSE_WRITE_CACHE) };
        self.run(req, Op::Write, reply, |fs, c, s| fs.write(c, ino.0, fh.0, at, data, Reply::new(s)));
    }

    fn flush(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        reply: fuser::ReplyEmpty,
    ) {
        self.run(req, Op::Flush, reply, |fs, c, s| fs.flush(c, ino.0, fh.0, lock_owner.0, Reply::new(s)));
    }

    fn release(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: fuser::ReplyEmpty,
    ) {
        self.run(req, Op::Release, reply, |fs, c, s| fs.release(c, ino.0, fh.0, flags.0, Reply::new(s)));
    }

    fn getlk(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: fuser::ReplyLock,
    ) {
        let range = LockRange { start, end, kind: typ, pid };
        self.run(req, Op::Getlk, reply, |fs, c, s| fs.getlk(c, ino.0, fh.0, lock_owner.0, range, Reply::new(s)));
    }

    fn setlk(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: fuser::ReplyEmpty,
    ) {
        let range = LockRange { start, end, kind: typ, pid };
        self.run(req, Op::Setlk, reply, |fs, c, s| fs.setlk(c, ino.0, fh.0, lock_owner.0, range, sleep, Reply::new(s)));
    }

    fn fsync(&self, req: &fuser::Request, ino: INodeNo, fh: FileHandle, datasync: bool, reply: fuser::ReplyEmpty) {
        self.run(req, Op::Fsync, reply, |fs, c, s| fs.fsync(c, ino.0, fh.0, datasync, Reply::new(s)));
    }

    fn opendir(&self, req: &fuser::Request, ino: INodeNo, flags: OpenFlags, reply: fuser::ReplyOpen) {
        self.run(req, Op::Opendir, reply, |fs, c, s| fs.opendir(c, ino.0, flags.0, Reply::new(s)));
    }

    fn readdir(&self, req: &fuser::Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: fuser::ReplyDirectory) {
        let size = page_bytes(&reply);
        self.run(req, Op::Readdir, reply, |fs, c, s| fs.readdir(c, ino.0, fh.0, offset, DirReply::new(s, size, false)));
    }

    fn readdirplus(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: fuser::ReplyDirectoryPlus,
    ) {
        let size = page_bytes(&reply);
        self.run(req, Op::Readdirplus, reply, |fs, c, s| {
            fs.readdir(c, ino.0, fh.0, offset, DirReply::new(s, size, true))
        });
    }

    fn releasedir(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: fuser::ReplyEmpty,
    ) {
        self.run(req, Op::Releasedir, reply, |fs, c, s| fs.releasedir(c, ino.0, fh.0, Reply::new(s)));
    }

    fn fsyncdir(&self, req: &fuser::Request, ino: INodeNo, fh: FileHandle, datasync: bool, reply: fuser::ReplyEmpty) {
        self.run(req, Op::Fsyncdir, reply, |fs, c, s| fs.fsyncdir(c, ino.0, fh.0, datasync, Reply::new(s)));
    }

    fn statfs(&self, req: &fuser::Request, ino: INodeNo, reply: fuser::ReplyStatfs) {
        self.run(req, Op::Statfs, reply, |fs, c, s| fs.statfs(c, ino.0, Reply::new(s)));
    }

    fn setxattr(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: fuser::ReplyEmpty,
    ) {
        self.run(req, Op::Setxattr, reply, |fs, c, s| {
            fs.setxattr(c, ino.0, name.as_bytes(), value, flags, Reply::new(s))
        });
    }

    fn getxattr(&self, req: &fuser::Request, ino: INodeNo, name: &OsStr, size: u32, reply: fuser::ReplyXattr) {
        self.run(req, Op::Getxattr, reply, |fs, c, s| fs.getxattr(c, ino.0, name.as_bytes(), XattrReply::new(s, size)));
    }

    fn listxattr(&self, req: &fuser::Request, ino: INodeNo, size: u32, reply: fuser::ReplyXattr) {
        self.run(req, Op::Listxattr, reply, |fs, c, s| fs.listxattr(c, ino.0, XattrReply::new(s, size)));
    }

    fn removexattr(&self, req: &fuser::Request, ino: INodeNo, name: &OsStr, reply: fuser::ReplyEmpty) {
        self.run(req, Op::Removexattr, reply, |fs, c, s| fs.removexattr(c, ino.0, name.as_bytes(), Reply::new(s)));
    }

    fn access(&self, req: &fuser::Request, ino: INodeNo, mask: fuser::AccessFlags, reply: fuser::ReplyEmpty) {
        self.run(req, Op::Access, reply, |fs, c, s| fs.access(c, ino.0, mask.bits(), Reply::new(s)));
    }

    fn create(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: fuser::ReplyCreate,
    ) {
        self.run(req, Op::Create, reply, |fs, c, s| {
            fs.create(c, parent.0, name.as_bytes(), mode, umask, flags, Reply::new(s))
        });
    }

    fn ioctl(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: fuser::IoctlFlags,
        cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: fuser::ReplyIoctl,
    ) {
        self.run(req, Op::Ioctl, reply, |fs, c, s| fs.ioctl(c, ino.0, fh.0, cmd, Reply::new(s)));
    }

    fn poll(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        _ph: fuser::PollNotifier,
        events: fuser::PollEvents,
        _flags: fuser::PollFlags,
        reply: fuser::ReplyPoll,
    ) {
        self.run(req, Op::Poll, reply, |fs, c, s| fs.poll(c, ino.0, fh.0, events.bits(), Reply::new(s)));
    }

    fn fallocate(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: fuser::ReplyEmpty,
    ) {
        self.run(req, Op::Fallocate, reply, |fs, c, s| {
            fs.fallocate(c, ino.0, fh.0, offset, length, mode, Reply::new(s))
        });
    }

    fn lseek(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: fuser::ReplyLseek,
    ) {
        self.run(req, Op::Lseek, reply, |fs, c, s| fs.lseek(c, ino.0, fh.0, offset, whence, Reply::new(s)));
    }

    fn copy_file_range(
        &self,
        req: &fuser::Request,
        ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: fuser::CopyFileRangeFlags,
        reply: fuser::ReplyWrite,
    ) {
        let (from, to) = ((ino_in.0, fh_in.0, offset_in), (ino_out.0, fh_out.0, offset_out));
        self.run(req, Op::CopyFileRange, reply, |fs, c, s| fs.copy_file_range(c, from, to, len, Reply::new(s)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_before_the_epoch_keep_their_nanoseconds_forward() {
        assert_eq!(time(UNIX_EPOCH - Duration::new(1, 200_000_000)), Time { secs: -2, nanos: 800_000_000 });
        assert_eq!(time(UNIX_EPOCH - Duration::new(3, 0)), Time { secs: -3, nanos: 0 });
        assert_eq!(time(UNIX_EPOCH + Duration::new(3, 5)), Time { secs: 3, nanos: 5 });
    }

    #[test]
    fn page_size_is_found_or_falls_back() {
        #[derive(Debug)]
        struct Reply {
            #[expect(dead_code, reason = "read by its Debug text")]
            max_size: usize,
        }
        assert_eq!(page_bytes(&Reply { max_size: 32768 }), 32768);
        assert_eq!(page_bytes(&"something else"), DIR_PAGE_BYTES_MIN);
    }
}
