//! Changing an object store: whole objects, multipart uploads, copies inside the store, metadata. What a POSIX write becomes of these is
//! decided in the FUSE client (`fuse-client/src/write/`); here each call is one request (or one page of a batch).
//!
//! Nodes that a change returns are those that a later listing shows: same locator, same version. Their time of modification is the store's where it
//! tells one, else that of its answer, which may be a second off (no version holds it; see `object/version.rs`).
//!
//! Errors are final unless their verdict says [`efc_common::Retry::Later`]. [`efc_common::Kind::Conflict`]: a condition did not hold, nothing was changed.

pub(crate) mod count;
pub(crate) mod fault;
pub(crate) mod limit;
pub(crate) mod retry;

use async_trait::async_trait;
use bytes::Bytes;
use efc_common::Result;
use efc_common::node::{Node, Time};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// The metadata name under which [`crate::connect`]'s stack marks changes whose outcome may have to be told apart later; never shown in [`Metadata`]. Who has to tell them apart
/// even after the death of its process gives a mark of its own under this name ([`new_mark`]), and asks by [`Objects::made_by`].
pub const MARK: &str = "efc-write";

/// A mark that no other change has.
pub fn new_mark() -> String {
    format!("{:016x}", rand::random::<u64>())
}

/// What a store can do and how large things may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectLimits {
    /// Smallest part of a multipart upload but the last, bytes.
    pub part_bytes_min: u64,
    /// Largest part, and largest object of a single PUT, bytes.
    pub part_bytes_max: u64,
    /// Most parts of an upload.
    pub parts_max: u32,
    /// AppendObject (OSS).
    pub append: bool,
    /// A part may be a range of another object (UploadPartCopy), and the store makes sure that this is the version meant. Where it does not, copies are
    /// checked by a HEAD right before, which is too little for putting pieces of changing files together.
    pub compose: bool,
    /// [`Condition::Absent`] is decided by the store itself, in PUT and in the completion of an upload (`If-None-Match: *`; OSS: forbid-overwrite,
    /// which buckets with versioning ignore). S3-compatible servers differ, so it is probed once. Where it is false, and for [`Objects::copy`] everywhere,
    /// the condition is looked at right before the change (one HEAD more): that stops who is late, not who comes in the same instant.
    pub conditional: bool,
    /// The same for [`Condition::Version`] (`If-Match`). OSS never has it.
    pub conditional_version: bool,
}

/// What is kept beside the bytes of an object, in the layout of s3fs and ossfs (`mode`, `uid`, `gid` and times as user metadata, decimal) which rclone reads as well.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// `st_mode` with the type bits, so that a symbolic link (its target is the content) and a directory marker are known as such.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Modification time; where there is none the store's own.
    pub mtime: Option<Time>,
    /// Access time, as somebody has set it; reading does not change it.
    pub atime: Option<Time>,
    /// Time of the last change of what stands here, if that was after the last change of the content.
    pub ctime: Option<Time>,
    /// `Content-Type`.
    pub content_type: Option<String>,
    /// All other user metadata, kept as it was found (names in lower case, without the `x-amz-meta-` prefix).
    pub other: BTreeMap<String, String>,
    /// The other headers that objects keep and a copy with new metadata would lose, by lower-case name: `cache-control`, `content-disposition`,
    /// `content-encoding`, `content-language`, `expires`.
    pub headers: BTreeMap<String, String>,
}

/// Condition of a change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Condition {
    /// None.
    #[default]
    Any,
    /// The key must not exist.
    Absent,
    /// The key must hold this version.
    Version(Bytes),
}

/// A multipart upload that was begun.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UploadId(pub String);

/// What the store answered for a part: needed to complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// 1 to [`ObjectLimits::parts_max`].
    pub number: u32,
    /// The part's ETag.
    pub etag: Vec<u8>,
}

/// An upload nobody has completed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenUpload {
    /// Locator of its object.
    pub locator: Bytes,
    /// Its id.
    pub id: UploadId,
    /// When it was begun.
    pub begun: Time,
}

/// A body in pieces, sent in order without joining them.
pub type Body = Vec<Bytes>;

/// An object store that can be changed. Locators are those of [`crate::Backend`].
#[async_trait]
pub trait Objects: Send + Sync + 'static {
    /// What the store can do. Probes `conditional` at the first call where it is not known from the kind of store.
    async fn limits(&self) -> Result<ObjectLimits>;

    /// The locator of `name` in `dir`: of an object, or with `directory` of a prefix. [`efc_common::Kind::Invalid`] for a name that [`crate::names`] cannot
    /// lead back to a key, [`efc_common::Kind::NameTooLong`] for a key over 1,024 bytes. `a%efc-file` leads to object `a`: it keeps that name only as long as a
    /// prefix `a/` exists, so whoever makes something new under such a name looks first.
    fn child(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<Bytes>;

    /// Writes a whole object (for the locator of a directory: its marker). The new node.
    async fn put(&self, locator: &Bytes, body: Body, metadata: &Metadata, condition: &Condition) -> Result<Node>;

    /// Begins a multipart upload.
    async fn begin(&self, locator: &Bytes, metadata: &Metadata) -> Result<UploadId>;

    /// Sends a part. The same number sent again replaces it.
    async fn part(&self, locator: &Bytes, upload: &UploadId, number: u32, body: Body) -> Result<Part>;

    /// Makes a part of the bytes `range` of `version` of the object at `source`.
    async fn part_copy(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        number: u32,
        source: (&Bytes, &Bytes),
        range: Range<u64>,
    ) -> Result<Part>;

    /// Makes the object of its parts. The new node.
    async fn complete(&self, locator: &Bytes, upload: &UploadId, parts: &[Part], condition: &Condition)
    -> Result<Node>;

    /// Throws an upload away; one that is gone already is no error.
    async fn abort(&self, locator: &Bytes, upload: &UploadId) -> Result<()>;

    /// Uploads begun below the mounted prefix and never ended, for the sweep.
    async fn open_uploads(&self) -> Result<Vec<OpenUpload>>;

    /// Appends at `position`, which must be the object's size ([`efc_common::Kind::Conflict`] else); 0 makes an appendable object and gives it `metadata`, which
    /// is not looked at later. [`efc_common::Kind::Unsupported`] for an object that was made in another way, and where `limits` says so.
    async fn append(&self, locator: &Bytes, position: u64, body: Body, metadata: &Metadata) -> Result<Node>;

    /// Copies an object inside the store, by parts where it is too large for one request; metadata is kept unless given. [`efc_common::Kind::Stale`] when the
    /// source is another version. Tags, ACL and storage class become what the store gives to a new object.
    async fn copy(
        &self,
        source: (&Bytes, &Bytes),
        target: &Bytes,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> Result<Node>;

    /// Deletes objects, a thousand at a request; missing ones are no error. The failures by index.
    async fn delete(&self, locators: &[Bytes]) -> Result<Vec<(usize, efc_common::Error)>>;

    /// An object's node and metadata (HEAD); of a directory its marker's.
    async fn head(&self, locator: &Bytes) -> Result<(Node, Metadata)>;

    /// The object, if it was made by the change that had one of these marks.
    async fn made_by(&self, locator: &Bytes, marks: &[String]) -> Result<Option<(Node, Metadata)>> {
        match self.head(locator).await {
            Ok((node, mut metadata)) => {
                let mark = metadata.other.remove(MARK);
                Ok(mark.is_some_and(|m| marks.contains(&m)).then_some((node, metadata)))
            }
            Err(e) if e.is(efc_common::Kind::NotFound) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// One page of all keys below a directory, at any depth, in the store's order: for directory rename and removal. Every key comes as an object, the
    /// markers of the directory and of those below it too; names are those of last segments, so only locators are unique.
    async fn keys_below(&self, dir: &Bytes, from: Option<Bytes>) -> Result<crate::ListPage>;
}

/// An object store shared by many callers.
pub type DynObjects = Arc<dyn Objects>;

/// How much longer than a request without a body one with so many bytes may take in all: a line that carries less than 1 MiB a second is given up, after
/// the protocol client has seen it get on all the time.
pub(crate) fn allowance(bytes: u64) -> Duration {
    Duration::from_secs(bytes >> 20)
}

/// Bytes of a body.
pub(crate) fn body_bytes(body: &Body) -> u64 {
    body.iter().map(|piece| piece.len() as u64).sum()
}
