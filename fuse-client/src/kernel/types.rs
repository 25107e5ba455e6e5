//! Plain types of the file-system trait: what the kernel asks and what it may be told. No type of the FUSE crate appears here, so
//! that the wire layer below can be replaced without touching a file system.

use std::time::Duration;

use efc_common::node::Time;

/// The node id of the root of every mount.
pub const ROOT_NODE: u64 = 1;

/// An error number as applications see it; always positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Permission denied by the owner of the object.
    pub const EPERM: Errno = Errno(libc::EPERM);
    /// No such name.
    pub const ENOENT: Errno = Errno(libc::ENOENT);
    /// Input/output error.
    pub const EIO: Errno = Errno(libc::EIO);
    /// Access refused.
    pub const EACCES: Errno = Errno(libc::EACCES);
    /// Not a directory.
    pub const ENOTDIR: Errno = Errno(libc::ENOTDIR);
    /// Is a directory.
    pub const EISDIR: Errno = Errno(libc::EISDIR);
    /// Invalid argument.
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    /// Not a terminal: an ioctl nobody implements.
    pub const ENOTTY: Errno = Errno(libc::ENOTTY);
    /// Read-only file system.
    pub const EROFS: Errno = Errno(libc::EROFS);
    /// The buffer is too small.
    pub const ERANGE: Errno = Errno(libc::ERANGE);
    /// Not implemented. For many operations the kernel remembers it and stops asking.
    pub const ENOSYS: Errno = Errno(libc::ENOSYS);
    /// No such attribute.
    pub const ENODATA: Errno = Errno(libc::ENODATA);
    /// Not supported by this object.
    pub const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);
    /// The handle names something that is gone.
    pub const ESTALE: Errno = Errno(libc::ESTALE);
    /// No such device or address: nothing beyond this offset.
    pub const ENXIO: Errno = Errno(libc::ENXIO);

    /// Symbolic name (`ENOENT`), for logs and metric labels.
    pub fn name(self) -> String {
        match nix::errno::Errno::from_raw(self.0) {
            nix::errno::Errno::UnknownErrno => format!("E{}", self.0),
            known => format!("{known:?}"),
        }
    }
}

/// Who asks, and which request it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// User of the calling process (of the kernel for read-ahead).
    pub uid: u32,
    /// Group of the calling process.
    pub gid: u32,
    /// Process, 0 when the kernel itself asks or the caller lives in another pid namespace.
    pub pid: u32,
    /// Number of the request on this connection, without the resend mark: the same before and after a take-over.
    pub unique: u64,
    /// The kernel sends it a second time, because a former process took it and did not answer. It may have been executed.
    pub resent: bool,
}

/// What kernel and session agreed on at INIT. Survives take-overs: a successor inherits it and cannot change it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// Protocol version of the kernel, (7, minor).
    pub abi: (u32, u32),
    /// Everything the kernel offers (INIT flag bits, `flags2` in the upper half).
    pub offered: u64,
    /// What was switched on, same bits.
    pub granted: u64,
    /// Largest READ or WRITE that arrives, bytes.
    pub max_request_bytes: u32,
    /// Kernel read-ahead agreed at INIT, bytes (the bdi setting may be raised beyond it later).
    pub max_readahead: u32,
    /// Background requests (read-ahead) the kernel keeps in flight.
    pub max_background: u16,
    /// True in a process that adopted a running mount.
    pub adopted: bool,
}

/// Attributes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeAttr {
    /// `st_ino`.
    pub ino: u64,
    /// Length, bytes.
    pub size: u64,
    /// `st_blocks`: 512-byte units.
    pub blocks: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of the attributes.
    pub ctime: Time,
    /// Type and permission bits (`st_mode`).
    pub mode: u32,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of device nodes.
    pub rdev: u32,
    /// `st_blksize`: preferred I/O size, bytes.
    pub blksize: u32,
}

/// An advisory lock, as the kernel names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LockRange {
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub kind: i32,
    /// Process that has it; 0 if unknown.
    pub pid: u32,
}

/// The lock that stands against another; `F_UNLCK`: none does.
pub type LockOut = LockRange;

/// Answer to a look-up. Each one sent counts as one look-up of `node`, to be returned by FORGET.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EntryOut {
    /// Node id, at least 1. 0 is a *negative* entry: "no such name", believed for `entry_ttl`.
    pub node: u64,
    /// Tells two lives of one node id apart; 0 if ids are never used again.
    pub generation: u64,
    /// Attributes; not looked at for a negative entry.
    pub attr: NodeAttr,
    /// How long the kernel may believe the name.
    pub entry_ttl: Duration,
    /// How long the kernel may believe the attributes.
    pub attr_ttl: Duration,
}

/// Answer to GETATTR and SETATTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AttrOut {
    /// Attributes.
    pub attr: NodeAttr,
    /// How long the kernel may believe them.
    pub ttl: Duration,
}

/// Answer to OPEN and OPENDIR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOut {
    /// Handle, given back in every later request on this open file.
    pub fh: u64,
    /// How the kernel treats the open file: `open_flags` bits.
    pub flags: u32,
}

/// Bits of [`OpenOut::flags`].
pub mod open_flags {
    /// Bypass the page cache.
    pub const DIRECT_IO: u32 = 1 << 0;
    /// Keep the pages of earlier opens.
    pub const KEEP_CACHE: u32 = 1 << 1;
    /// Not seekable.
    pub const NONSEEKABLE: u32 = 1 << 2;
    /// The kernel may keep the names of this directory.
    pub const CACHE_DIR: u32 = 1 << 3;
    /// No FLUSH at close.
    pub const NOFLUSH: u32 = 1 << 5;
    /// Direct writes to one file may run side by side.
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// What a READ asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadAt {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: u32,
    /// For pages of the kernel, which are locked until it is answered. Told by the caller's lock owner, which the kernel adds (`FUSE_READ_LOCKOWNER`) to what goes past
    /// its pages only: `fuse_send_read` in fs/fuse/file.c.
    pub for_cache: bool,
}

/// Where a WRITE goes, and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteAt {
    /// First byte.
    pub offset: u64,
    /// Pages that were changed through a mapping; the kernel holds them until they are written.
    pub from_cache: bool,
}

/// Answer to CREATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CreateOut {
    /// The new name.
    pub entry: EntryOut,
    /// The open file.
    pub open: OpenOut,
}

/// Answer to STATFS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StatfsOut {
    /// Size, in units of `fragment_size`.
    pub blocks: u64,
    /// Free.
    pub blocks_free: u64,
    /// Free for ordinary users.
    pub blocks_available: u64,
    /// Inodes.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// Preferred I/O size, bytes.
    pub block_size: u32,
    /// Unit of the block counts, bytes.
    pub fragment_size: u32,
    /// Longest name, bytes.
    pub name_max: u32,
}

/// Answer to LSEEK: the offset found, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LseekOut(pub u64);

/// Answer to POLL: ready events (`poll(2)` bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PollOut(pub u32);

/// Answer to WRITE and COPY_FILE_RANGE: bytes taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteOut(pub u32);

/// What SETATTR wants changed; `None` leaves a field alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// New length, bytes (truncate or extend).
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Change time, sent only by kernels with a write-back cache.
    pub ctime: Option<Time>,
    /// Open file on which it was asked (ftruncate, fchmod).
    pub fh: Option<u64>,
}

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// This time.
    At(Time),
    /// The file server's "now".
    Now,
}
