//! Changing a NAS tree: what `nfs` and `file` sources can do beyond reading. Object stores have no tree; see [`crate::objects`].
//!
//! Callers hold a lease on what they change (decision 0007), so a directory changes under nobody's feet but that of writers outside EFC.
//! Every call ends within the source's `deadline` option. Errors are final unless their verdict says [`efc_common::Retry::Later`].
//! `around` puts the policies of [`crate::connect`] around a tree, `settle` retries what must not happen twice.

pub(crate) mod around;
pub(crate) mod settle;

use async_trait::async_trait;
use bytes::Bytes;
use efc_common::Result;
use efc_common::node::{Node, Time};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

/// Something to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewNode {
    /// Type, with what the type needs.
    pub what: New,
    /// Permission and set-id bits (0o7777), the umask already applied. Not used for symbolic links.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group; a directory with the set-group-id bit gives its own instead, and the bit to directories made in it.
    pub gid: u32,
}

/// Type of something to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum New {
    /// An empty regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to these bytes.
    Symlink(Bytes),
    /// A FIFO.
    Fifo,
    /// A socket's name.
    Socket,
    /// A character device of this number (Linux `dev_t` encoding).
    CharDevice(u32),
    /// A block device of this number.
    BlockDevice(u32),
}

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// This time.
    At(Time),
    /// The origin's "now".
    Now,
}

/// Attributes to change; `None` leaves one alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    /// Permission and set-id bits (0o7777).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// New length, bytes: cut, or extended by a hole.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
}

/// How `rename` treats an existing target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RenameMode {
    /// Replaces it atomically, as POSIX says.
    #[default]
    Replace,
    /// Fails with [`efc_common::Kind::AlreadyExists`]. Where the origin cannot do it atomically (NFSv3), the caller's lease makes it so among EFC clients.
    NoReplace,
    /// Swaps the two; [`efc_common::Kind::Unsupported`] where the origin cannot.
    Exchange,
}

/// How `fallocate` changes a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocate {
    /// Reserves space; the size grows to the end of the range unless `keep_size`.
    Reserve {
        /// Leaves the size alone.
        keep_size: bool,
    },
    /// Frees the range, which then reads as zeros. The size stays.
    PunchHole,
    /// The range reads as zeros; the size grows to its end unless `keep_size`.
    Zero {
        /// Leaves the size alone.
        keep_size: bool,
    },
}

/// A file with changes that the origin has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Path below the mounted directory.
    pub path: Bytes,
    /// Length, bytes.
    pub bytes: u64,
    /// Why the last attempt to bring it to the origin failed.
    pub error: Option<String>,
}

/// An origin that is a POSIX tree. Locators are those of [`crate::Backend`].
#[async_trait]
pub trait Tree: Send + Sync + 'static {
    /// Does an [`OpenFile`] go on working when the last name of its file is removed? If not, the caller renames a file that is open instead of removing it.
    fn keeps_removed(&self) -> bool {
        false
    }

    /// The locator of `name` in `dir` where locators are paths, `None` where they are not: a file with several names is then still found when the one it was found by is removed.
    fn child(&self, dir: &Bytes, name: &[u8]) -> Option<Bytes> {
        let _ = (dir, name);
        None
    }

    /// Does it keep changes in this process before the origin has them (object stores)? Then listings are corrected by [`Tree::overlay`], and files have to be
    /// committed by [`OpenFile::close`] or [`OpenFile::sync`].
    fn drafts(&self) -> bool {
        false
    }

    /// What an origin that was asked at `asked` does not tell of the names in `dir`: nodes that it may not show yet, and `None` for names it may show although
    /// they are removed.
    fn overlay(&self, dir: &Bytes, asked: Instant) -> Vec<(Bytes, Option<Node>)> {
        let _ = (dir, asked);
        Vec::new()
    }

    /// The same of one name; `None`: the origin's word holds.
    fn find_overlay(&self, dir: &Bytes, name: &[u8], asked: Instant) -> Option<Option<Node>> {
        let _ = (dir, name, asked);
        None
    }

    /// Listings of `dir` made before this are wrong as a whole.
    fn replaced(&self, dir: &Bytes) -> Option<Instant> {
        let _ = dir;
        None
    }

    /// `node` with what a listing does not tell (mode, owner, times, being a symbolic link), if that is known without asking.
    fn complete_now(&self, node: &Node) -> Option<Node> {
        Some(node.clone())
    }

    /// The same, asking the origin if need be. [`efc_common::Kind::NotFound`] when the node is gone.
    async fn complete(&self, node: Node) -> Result<Node> {
        Ok(node)
    }

    /// Others are going to look: what is kept in this process of the files in `dir` (of the one called `name`) is brought to the origin.
    async fn settle(&self, dir: &Bytes, name: Option<&[u8]>) -> Result<()> {
        let _ = (dir, name);
        Ok(())
    }

    /// Files with changes that the origin has not.
    fn pending(&self) -> Vec<Pending> {
        Vec::new()
    }

    /// Gives the changes of one of them up: it is again what the origin has, or nothing. [`efc_common::Kind::NotFound`]: there are none.
    async fn discard(&self, path: &[u8]) -> Result<()> {
        let _ = path;
        Err(efc_common::Error::new(efc_common::Kind::NotFound, "this source is written through: nothing is kept here"))
    }

    /// The end comes: everything that is kept in this process is brought to the origin.
    async fn settle_all(&self) -> Result<()> {
        Ok(())
    }

    /// Others may change what is in `dir` (the file called `name`) from now on: what is remembered of it is not used any more.
    async fn forget(&self, dir: &Bytes, name: Option<&[u8]>) {
        let _ = (dir, name);
    }

    /// The same tree for calls that another process, which died, may have made already: a final refusal that this explains (the name is there already, or gone) is
    /// looked into from the first attempt, as after a lost answer, and what was made without its owner and mode gets them. Not for [`RenameMode::Exchange`], which is
    /// done again. `None` where nothing is looked into.
    fn in_doubt(&self) -> Option<DynTree> {
        None
    }

    /// Makes `name` in `dir`; [`efc_common::Kind::AlreadyExists`] if it is there.
    async fn create(&self, dir: &Bytes, name: &[u8], new: &NewNode) -> Result<Node>;

    /// Makes `name` in `dir` another name of `file`, whose fresh attributes are returned (the locator is that of the new name).
    async fn link(&self, file: &Bytes, dir: &Bytes, name: &[u8]) -> Result<Node>;

    /// Removes a name; `directory` says which kind it must be (else `IsADirectory` / `NotADirectory`).
    async fn remove(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<()>;

    /// Renames. The moved object's fresh node, with its locator under the new name.
    async fn rename(&self, from: (&Bytes, &[u8]), to: (&Bytes, &[u8]), mode: RenameMode) -> Result<Node>;

    /// Changes attributes and returns the fresh ones. All or, where the origin needs several steps, in the order size, owner, mode, times.
    async fn set_attr(&self, locator: &Bytes, change: &Change) -> Result<Node>;

    /// Sets an extended attribute; `flags` are those of `setxattr(2)`. [`efc_common::Kind::Unsupported`] where there are none.
    async fn set_xattr(&self, locator: &Bytes, name: &[u8], value: &[u8], flags: i32) -> Result<()>;

    /// Removes an extended attribute.
    async fn remove_xattr(&self, locator: &Bytes, name: &[u8]) -> Result<()>;

    /// Opens a regular file for reading and, if `write`, for writing. It stays usable when its name is removed or renamed.
    async fn open(&self, locator: &Bytes, write: bool) -> Result<Arc<dyn OpenFile>>;

    /// The open file of a descriptor that another process had from [`OpenFile::descriptor`], opened by `locator` there. `None` where files have none.
    fn reopen(&self, fd: OwnedFd, locator: &Bytes) -> Option<Arc<dyn OpenFile>> {
        let _ = (fd, locator);
        None
    }
}

/// A tree shared by many callers.
pub type DynTree = Arc<dyn Tree>;

/// An open file of a [`Tree`]. Calls may run at once. Nodes returned carry the locator it was opened by.
#[async_trait]
pub trait OpenFile: Send + Sync + 'static {
    /// The bytes `range` as they are now, cut at the end of the file.
    async fn read(&self, range: Range<u64>) -> Result<Bytes>;

    /// Writes all of `data` at `offset`; others see it when this returns, a crash of the origin may lose it until [`OpenFile::sync`]. Fresh attributes.
    async fn write(&self, offset: u64, data: Bytes) -> Result<Node>;

    /// Makes everything written durable; an error of any earlier write that the origin lost is told here. Fresh attributes.
    async fn sync(&self, data_only: bool) -> Result<Node>;

    /// A descriptor of the file is being closed: makes durable what the origin would else forget when it restarts (close-to-open, as kernel clients of NFS do), and tells what
    /// was lost. Fresh attributes if anything was done.
    async fn close(&self) -> Result<Option<Node>> {
        Ok(None)
    }

    /// Is the version that its node names all there is of it, so that its bytes may as well come from a cache?
    fn is_clean(&self) -> bool {
        false
    }

    /// A descriptor by which another process can go on with the file after its last name is gone ([`Tree::reopen`]), where the origin knows no other way.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Number by which the tree knows it in other processes of the same mount; 0: by nothing but its locator.
    fn number(&self) -> u64 {
        0
    }

    /// Another process wrote to the file before: what the origin took and has not made durable is made so by the next [`OpenFile::sync`] or [`OpenFile::close`].
    fn resumed(&self) {}

    /// Fresh attributes, also of a file without a name (then `nlink` is 0).
    async fn attr(&self) -> Result<Node>;

    /// As [`Tree::set_attr`], on the open file.
    async fn set_attr(&self, change: &Change) -> Result<Node>;

    /// `fallocate(2)`; [`efc_common::Kind::Unsupported`] where the origin cannot.
    async fn allocate(&self, range: Range<u64>, how: Allocate) -> Result<Node>;

    /// Copies `from` (bytes of `source`, which must be of the same tree) to `offset` inside the origin. Bytes copied and fresh attributes;
    /// [`efc_common::Kind::Unsupported`] where the origin cannot: the caller then reads and writes.
    async fn copy(&self, source: &dyn OpenFile, from: Range<u64>, offset: u64) -> Result<(u64, Node)>;

    /// The next data (`hole` false) or hole at or after `offset`; [`efc_common::Kind::Unsupported`] where the origin does not tell, [`efc_common::Kind::NotFound`] beyond the last.
    async fn seek(&self, offset: u64, hole: bool) -> Result<u64>;

    /// For [`OpenFile::copy`]: lets an implementation know its own.
    fn as_any(&self) -> &dyn std::any::Any;
}
