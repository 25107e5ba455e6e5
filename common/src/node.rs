//! What an origin says of one name: kind, attributes, locator and version. These travel from `backend/` through workers
//! and the wire to the FUSE client unchanged.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Type of a file-system object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file or an object.
    File,
    /// A directory or a key prefix.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO (this and the following in NAS and `file` sources only; the kernel opens them without us).
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

/// Seconds and nanoseconds since the Unix epoch; negative before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Time {
    /// Whole seconds.
    pub secs: i64,
    /// Nanoseconds, 0..1e9, always forward in time.
    pub nanos: u32,
}

/// POSIX attributes as the origin has them. Object stores have no owner or mode: those are `None`, and the mount fills them
/// from its options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attr {
    /// Type.
    pub kind: FileKind,
    /// Length in bytes (files), length of the target (symbolic links), 0 or the origin's value (directories).
    pub size: u64,
    /// Last access, if the origin keeps it.
    pub atime: Option<Time>,
    /// Last modification of the content.
    pub mtime: Time,
    /// Last change of the attributes; the origin's mtime where it has no ctime.
    pub ctime: Time,
    /// Permission bits and set-id bits (0o7777), if the origin has them.
    pub mode: Option<u32>,
    /// Owner, if the origin has one.
    pub uid: Option<u32>,
    /// Group, if the origin has one.
    pub gid: Option<u32>,
    /// Number of hard links, 1 where the origin does not say.
    pub nlink: u32,
    /// The origin's own number for it (NFS fileid), 0 where it has none.
    pub fileid: u64,
    /// Bytes of storage used, if the origin says so; else `size` is shown.
    pub used: Option<u64>,
    /// Number of a device (Linux `dev_t` encoding), 0 of everything else.
    pub rdev: u32,
}

impl Attr {
    /// Attributes of an object-store file.
    pub fn object(size: u64, mtime: Time) -> Self {
        Attr {
            kind: FileKind::File,
            size,
            atime: None,
            mtime,
            ctime: mtime,
            mode: None,
            uid: None,
            gid: None,
            nlink: 1,
            fileid: 0,
            used: None,
            rdev: 0,
        }
    }

    /// Attributes of an object-store directory (a key prefix).
    pub fn prefix(mtime: Time) -> Self {
        Attr { kind: FileKind::Directory, nlink: 2, ..Attr::object(0, mtime) }
    }
}

/// One object of an origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// How the backend finds it again: full key (object stores), file handle (NFS), absolute path (`file`). At most
    /// [`LOCATOR_BYTES_MAX`] bytes; opaque to everybody but the backend.
    pub locator: Bytes,
    /// Names the content: ETag + size + mtime (object stores), fileid + ctime + mtime + size (NAS, `file`). Empty for
    /// directories. At most [`VERSION_BYTES_MAX`] bytes; opaque to everybody but the backend.
    pub version: Bytes,
    /// Attributes at the time of the answer.
    pub attr: Attr,
}

/// Longest locator, bytes: an S3 key (1,024), or the longest path of Linux (4,096) below a source's directory whose path may be as long.
pub const LOCATOR_BYTES_MAX: usize = 8192;
/// Longest version token, bytes.
pub const VERSION_BYTES_MAX: usize = 256;

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The last component as it is shown to applications: never empty, no `/` or NUL, neither `.` nor `..`.
    pub name: Bytes,
    /// What it names. A backend that lists names only (no readdirplus) resolves them before it answers.
    pub node: Node,
}
