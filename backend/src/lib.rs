//! Origins: NAS and object stores behind one trait.
//!
//! [`Backend`] is what a worker (on a miss) and a FUSE client (metadata of NAS, and everything while no worker answers) call.
//! Implementations are plain protocol clients; retries, limits, counters and injected faults are decorators of the same
//! trait ([`connect`] stacks them, visibly, in one place). What changes an origin has traits of its own: [`tree`] and [`objects`]. One suite ([`suite`]) is run over every implementation against a
//! real server, its tests chosen by the declared [`Capabilities`].

pub mod connect;
pub mod count;
pub mod fault;
mod file;
pub mod limit;
pub mod names;
mod nfs;
pub mod object;
pub mod objects;
mod retry;
#[cfg(any(test, feature = "suite"))]
pub mod suite;
pub mod tree;

pub use connect::connect;

use async_trait::async_trait;
use bytes::Bytes;
use efc_common::Result;
use efc_common::id::SourceId;
use efc_common::node::{Entry, Node};
use futures::stream::BoxStream;
use std::ops::Range;
use std::sync::Arc;

/// What an origin can do; callers and the suite branch on it, never on the kind of source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// A listing carries sizes, times and versions of its entries at no extra request, so workers cache it for the whole cluster
    /// (object stores). NAS directories are cheap to ask and are listed by each client itself.
    pub shared_listing: bool,
    /// Locators are paths: that of what lies in a directory begins with the directory's. Else they stay with what they name wherever it moves (NFS).
    pub path_locators: bool,
    /// `read` itself refuses a changed version (If-Match, or attributes in the READ reply).
    pub conditional_read: bool,
    /// Has symbolic links.
    pub symlinks: bool,
    /// Has extended attributes.
    pub xattr: bool,
    /// Has owners and modes of its own.
    pub posix_attr: bool,
    /// `statfs` gives real numbers.
    pub statfs: bool,
}

/// One page of a directory.
#[derive(Debug, Clone, Default)]
pub struct ListPage {
    /// Entries in the origin's order. Names are unique within a directory over all pages.
    pub entries: Vec<Entry>,
    /// Where the next page starts; `None` after the last. Opaque to the caller.
    pub next: Option<Bytes>,
    /// Names that exist at the origin but cannot be shown, with the reason: the caller counts and logs them.
    pub hidden: Vec<(Bytes, &'static str)>,
}

/// Space and inode numbers of an origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FsStats {
    /// Capacity, bytes.
    pub total_bytes: u64,
    /// Free, bytes.
    pub free_bytes: u64,
    /// Free to unprivileged users, bytes.
    pub available_bytes: u64,
    /// Inodes in all; 0 if unknown.
    pub total_files: u64,
    /// Inodes free; 0 if unknown.
    pub free_files: u64,
}

/// A stream of content in file order. Pieces have any size; their sum is exactly the range asked for (cut at the end of the
/// file), else the stream ends with an error.
pub type ByteStream = BoxStream<'static, Result<Bytes>>;

/// An origin. All calls may run at once; each ends within the source's `deadline` option. Locators and versions are opaque
/// to callers. Errors carry a retry verdict, and decorators in [`connect`] have used it up already.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// The store's identity, see [`efc_common::source::SourceSpec::id`].
    fn source_id(&self) -> SourceId;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The directory the source's path names. Fails when it is not there or access is refused: this is the mount's check, so
    /// its errors name the bucket, host or path and the cure.
    async fn root(&self) -> Result<Node>;

    /// The entry `name` of directory `dir`. [`efc_common::Kind::NotFound`] when there is none.
    async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node>;

    /// Fresh attributes of `locator`.
    async fn getattr(&self, locator: &Bytes) -> Result<Node>;

    /// One page of directory `dir`, from the start or from a page's `next`.
    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage>;

    /// The bytes `range` of `version` of the file at `locator`; `range.end` is at most the size that `version` had.
    /// [`efc_common::Kind::Stale`] when the file is no longer (or, while streaming, ceases to be) that version: bytes of two
    /// versions are never mixed.
    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream>;

    /// The target of a symbolic link.
    async fn readlink(&self, locator: &Bytes) -> Result<Bytes>;

    /// All extended attributes; empty where there are none.
    async fn xattrs(&self, locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>>;

    /// Space of the origin; [`efc_common::Kind::Unsupported`] where it has no notion of it.
    async fn statfs(&self) -> Result<FsStats>;
}

/// A backend shared by many readers.
pub type DynBackend = Arc<dyn Backend>;
