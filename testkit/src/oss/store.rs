//! What the server holds: buckets, objects and unfinished uploads, in memory, behind one lock. Objects are immutable and shared: a
//! reader keeps the one it began with, whatever happens to its key.

use super::Dialect;
use crate::sign::hex;
use bytes::Bytes;
use crc_fast::{CrcAlgorithm, checksum, checksum_combine};
use md5::{Digest, Md5};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

/// What an object is, as `x-oss-object-type` and `<Type>` name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ObjectKind {
    /// Written in one piece.
    Normal,
    /// Made by appending.
    Appendable,
    /// Made of parts.
    Multipart,
    /// A link to another key.
    Symlink,
}

impl ObjectKind {
    /// Its name on the wire.
    pub(super) fn name(self) -> &'static str {
        match self {
            ObjectKind::Normal => "Normal",
            ObjectKind::Appendable => "Appendable",
            ObjectKind::Multipart => "Multipart",
            ObjectKind::Symlink => "Symlink",
        }
    }
}

/// One version of an object.
#[derive(Debug, Clone)]
pub(super) struct Object {
    /// Its bytes, in pieces.
    pub(super) chunks: Vec<Bytes>,
    /// Length of all pieces.
    pub(super) size: u64,
    /// Without quotes.
    pub(super) etag: String,
    /// CRC-64/XZ, which OSS calls crc64ecma.
    pub(super) crc64: u64,
    /// Last change.
    pub(super) modified: SystemTime,
    /// How it was made.
    pub(super) kind: ObjectKind,
    /// Target key of a symlink.
    pub(super) target: Option<Vec<u8>>,
    /// Content-Type, user metadata ... as given, names in lower case.
    pub(super) headers: BTreeMap<String, String>,
    /// Tags.
    pub(super) tags: Vec<(String, String)>,
}

impl Object {
    /// An object written in one piece.
    pub(super) fn normal(dialect: Dialect, body: Bytes, headers: BTreeMap<String, String>) -> Object {
        Object {
            size: body.len() as u64,
            etag: etag_text(dialect, &Md5::digest(&body)),
            crc64: checksum(CrcAlgorithm::Crc64Xz, &body),
            modified: SystemTime::now(),
            kind: ObjectKind::Normal,
            target: None,
            headers,
            tags: Vec::new(),
            chunks: if body.is_empty() { Vec::new() } else { vec![body] },
        }
    }

    /// This object with `more` at its end. The ETag of an appendable object is no digest of its bytes; it only changes.
    pub(super) fn appended(&self, dialect: Dialect, more: Bytes) -> Object {
        let mut next = self.clone();
        let crc = checksum(CrcAlgorithm::Crc64Xz, &more);
        next.crc64 = checksum_combine(CrcAlgorithm::Crc64Xz, self.crc64, crc, more.len() as u64);
        next.size += more.len() as u64;
        next.etag = etag_text(dialect, &Md5::digest(format!("{}{}{}", self.etag, next.crc64, next.size)));
        next.modified = SystemTime::now();
        if !more.is_empty() {
            next.chunks.push(more);
        }
        next
    }

    /// An object made of parts: the ETag is the MD5 of the parts' MD5s with their number.
    pub(super) fn assembled(dialect: Dialect, parts: &[&Part], headers: BTreeMap<String, String>) -> Object {
        let mut object = Object::normal(dialect, Bytes::new(), headers);
        object.kind = ObjectKind::Multipart;
        let mut md5 = Md5::new();
        for part in parts {
            object.crc64 = checksum_combine(CrcAlgorithm::Crc64Xz, object.crc64, part.crc64, part.size);
            object.size += part.size;
            object.chunks.extend(part.chunks.iter().cloned());
            md5.update(part.md5);
        }
        object.etag = format!("{}-{}", etag_text(dialect, &md5.finalize()), parts.len());
        object
    }

    /// The pieces of `start..end`, without copying.
    pub(super) fn slice(&self, start: u64, end: u64) -> Vec<Bytes> {
        let mut at = 0;
        let mut out = Vec::new();
        for chunk in &self.chunks {
            let next = at + chunk.len() as u64;
            if next > start && at < end {
                let (from, to) = (start.max(at) - at, end.min(next) - at);
                out.push(chunk.slice(from as usize..to as usize));
            }
            at = next;
        }
        out
    }

    /// The whole content in one piece.
    pub(super) fn content(&self) -> Bytes {
        match self.chunks.as_slice() {
            [one] => one.clone(),
            many => many.concat().into(),
        }
    }
}

/// OSS writes ETags in upper case, S3 in lower case.
fn etag_text(dialect: Dialect, digest: &[u8]) -> String {
    match dialect {
        Dialect::Oss => hex(digest).to_ascii_uppercase(),
        Dialect::S3 => hex(digest),
    }
}

/// One part of an upload.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// Its bytes.
    pub(super) chunks: Vec<Bytes>,
    /// Their number.
    pub(super) size: u64,
    /// Their MD5.
    pub(super) md5: [u8; 16],
    /// The MD5 as an ETag.
    pub(super) etag: String,
    /// CRC-64/XZ.
    pub(super) crc64: u64,
    /// When it came.
    pub(super) modified: SystemTime,
}

impl Part {
    /// A part with these bytes.
    pub(super) fn new(dialect: Dialect, body: Bytes) -> Part {
        let digest = Md5::digest(&body);
        Part {
            size: body.len() as u64,
            md5: digest.into(),
            etag: etag_text(dialect, &digest),
            crc64: checksum(CrcAlgorithm::Crc64Xz, &body),
            modified: SystemTime::now(),
            chunks: vec![body],
        }
    }
}

/// An unfinished upload.
#[derive(Debug)]
pub(super) struct Upload {
    /// The key it will have.
    pub(super) key: Vec<u8>,
    /// Headers of the object to be.
    pub(super) headers: BTreeMap<String, String>,
    /// Parts by number.
    pub(super) parts: BTreeMap<u32, Part>,
    /// When it began.
    pub(super) started: SystemTime,
}

/// A bucket.
#[derive(Debug)]
pub(super) struct Bucket {
    /// When it was made.
    pub(super) created: SystemTime,
    /// `private`, `public-read` or `public-read-write`.
    pub(super) acl: String,
    /// Objects by key.
    pub(super) objects: BTreeMap<Vec<u8>, Arc<Object>>,
    /// Uploads by id.
    pub(super) uploads: BTreeMap<String, Upload>,
    /// Keys under retention: they are neither replaced nor deleted.
    pub(super) locked: BTreeSet<Vec<u8>>,
    /// Versioning is on. Older versions are not kept, but what OSS forbids differs.
    pub(super) versioned: bool,
}

impl Default for Bucket {
    /// An empty private bucket.
    fn default() -> Self {
        Bucket {
            created: SystemTime::now(),
            acl: "private".into(),
            objects: BTreeMap::new(),
            uploads: BTreeMap::new(),
            locked: BTreeSet::new(),
            versioned: false,
        }
    }
}

/// Everything, by bucket name.
pub(super) type State = BTreeMap<String, Bucket>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_and_sums_over_pieces() {
        let whole = Object::normal(Dialect::Oss, Bytes::from_static(b"hello world"), BTreeMap::new());
        let empty = Object::normal(Dialect::Oss, Bytes::new(), BTreeMap::new());
        let pieces = empty.appended(Dialect::Oss, "hello ".into()).appended(Dialect::Oss, "world".into());
        assert_eq!((pieces.crc64, pieces.size), (whole.crc64, 11));
        for (start, end) in [(0, 11), (0, 0), (3, 8), (6, 11), (5, 6), (10, 11)] {
            let got = pieces.slice(start, end).concat();
            assert_eq!(got, b"hello world"[start as usize..end as usize], "{start}..{end}");
        }
        assert_eq!(pieces.content(), whole.content());
        // CRC catalogue: check value of CRC-64/XZ.
        assert_eq!(checksum(CrcAlgorithm::Crc64Xz, b"123456789"), 0x995d_c9bb_df19_39fa);
    }
}
