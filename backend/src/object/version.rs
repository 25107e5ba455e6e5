//! The bytes of an object's version and locator. They are written here only, and opaque everywhere else; workers hash them into cache
//! keys, so that a change of layout empties every cache (hence the leading layout byte).
//!
//! Version: layout byte 2, size (u64 LE), mtime in whole seconds (i64 LE) where there is no ETag and else 0, then the ETag without quotes.
//! An ETag names the content alone, and reads are held to it by `If-Match`; the time is only for stores without. So the answer to a PUT, which
//! has an ETag but no Last-Modified, gives the very version that a later listing or HEAD shows, at no further request; and what changes
//! only metadata (a copy onto itself) empties no cache. Where the time counts it has whole seconds, because LIST has fractions at some stores
//! and HEAD has none.
//!
//! Locator: a directory's is its key prefix (empty, or ending in `/`), a file's is its key. Only a key that ends in `/` (a directory marker
//! with content) or in NUL could be taken for something else: such a file's locator has one NUL more.

use bytes::Bytes;
use efc_common::{Error, Kind, Result};

const LAYOUT: u8 = 2;
const HEAD_BYTES: usize = 17;

/// Longest ETag that fits a version, bytes.
pub(crate) const ETAG_BYTES_MAX: usize = 200;

/// Longest key of S3 and OSS, bytes.
pub(crate) const KEY_BYTES_MAX: usize = 1024;

/// What an object was when it was listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Version {
    /// Length, bytes.
    pub(crate) size: u64,
    /// Last-Modified, seconds since the epoch.
    pub(crate) mtime_secs: i64,
    /// ETag without quotes and without the weak mark; empty if the server gives none.
    pub(crate) etag: Vec<u8>,
}

impl Version {
    /// The token. It holds the time only where there is no ETag.
    pub(crate) fn encode(&self) -> Bytes {
        let mtime_secs = if self.etag.is_empty() { self.mtime_secs } else { 0 };
        let mut out = Vec::with_capacity(HEAD_BYTES + self.etag.len());
        out.push(LAYOUT);
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&mtime_secs.to_le_bytes());
        out.extend_from_slice(&self.etag);
        out.into()
    }

    /// Reads a token, which may have come over the wire.
    pub(crate) fn decode(token: &[u8]) -> Result<Version> {
        let read = || {
            let (head, etag) = token.split_at_checked(HEAD_BYTES)?;
            let size = u64::from_le_bytes(head.get(1..9)?.try_into().ok()?);
            let mtime_secs = i64::from_le_bytes(head.get(9..17)?.try_into().ok()?);
            let canonical = etag.is_empty() || mtime_secs == 0;
            (head[0] == LAYOUT && canonical && etag.len() <= ETAG_BYTES_MAX && !etag.iter().any(u8::is_ascii_control))
                .then(|| Version { size, mtime_secs, etag: etag.to_vec() })
        };
        read().ok_or_else(|| Error::new(Kind::Invalid, "not the version token of an object: look the file up again"))
    }
}

/// The ETag in the form versions hold: without quotes and weak mark.
pub(crate) fn bare_etag(text: &[u8]) -> &[u8] {
    let text = text.trim_ascii();
    let text = text.strip_prefix(b"W/").unwrap_or(text);
    text.strip_prefix(b"\"").and_then(|t| t.strip_suffix(b"\"")).unwrap_or(text)
}

/// The locator of the object `key`.
pub(crate) fn file_locator(mut key: Vec<u8>) -> Bytes {
    if matches!(key.last(), Some(b'/' | 0)) {
        key.push(0);
    }
    key.into()
}

/// The key that a locator names: of an object, or of a directory's marker.
///
/// # Errors
/// [`Kind::Invalid`] for the bucket itself, [`Kind::NameTooLong`] for a key that no store takes.
pub(crate) fn key_of(locator: &[u8]) -> Result<&[u8]> {
    let (Place::Directory(key) | Place::File(key)) = place(locator);
    match key.len() {
        0 => Err(Error::new(Kind::Invalid, "the bucket itself is no object")),
        1..=KEY_BYTES_MAX => Ok(key),
        n => Err(Error::new(Kind::NameTooLong, format!("a key of {n} bytes: object stores take {KEY_BYTES_MAX}"))),
    }
}

/// What a locator names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place<'a> {
    /// A key prefix, empty or ending in `/`.
    Directory(&'a [u8]),
    /// An object's key.
    File(&'a [u8]),
}

/// Reads a locator.
pub(crate) fn place(locator: &[u8]) -> Place<'_> {
    match locator.split_last() {
        None | Some((b'/', _)) => Place::Directory(locator),
        Some((0, key)) => Place::File(key),
        Some(_) => Place::File(locator),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn version_round_trip(size: u64, mtime_secs: i64, etag in vec(32u8..127, 0..ETAG_BYTES_MAX)) {
            let v = Version { size, mtime_secs, etag };
            prop_assert!(v.encode().len() <= efc_common::node::VERSION_BYTES_MAX);
            let mtime_secs = if v.etag.is_empty() { v.mtime_secs } else { 0 };
            prop_assert_eq!(Version::decode(&v.encode()).expect("own token"), Version { mtime_secs, ..v });
        }

        #[test]
        fn garbage_is_refused_or_is_a_version(token in vec(any::<u8>(), 0..40)) {
            if let Ok(v) = Version::decode(&token) {
                prop_assert_eq!(v.encode(), token);
            }
        }

        #[test]
        fn locators_are_told_apart(key in vec(prop_oneof![Just(b'/'), Just(0u8), Just(b'a')], 1..6)) {
            let file = file_locator(key.clone());
            prop_assert_eq!(place(&file), Place::File(&key));
        }
    }

    #[test]
    fn etags_and_plain_locators() {
        for (text, bare) in [("\"ab\"", "ab"), ("W/\"ab-1\"", "ab-1"), ("ab", "ab"), (" \"AB\" ", "AB"), ("", "")] {
            assert_eq!(bare_etag(text.as_bytes()), bare.as_bytes());
        }
        assert_eq!(file_locator(b"a/b".to_vec()), "a/b");
        assert_eq!(place(b""), Place::Directory(b""));
        assert_eq!(place(b"a/"), Place::Directory(b"a/"));
        assert_eq!(key_of(b"a/").expect("marker"), b"a/");
        assert_eq!(key_of(b"a/\0").expect("marker with content"), b"a/");
        assert!(key_of(b"").is_err_and(|e| e.is(Kind::Invalid)));
        assert!(key_of(&[b'k'; 1025]).is_err_and(|e| e.is(Kind::NameTooLong)));
    }
}
