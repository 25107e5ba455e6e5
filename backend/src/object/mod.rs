//! Object stores: native OSS and S3 clients behind [`Backend`]. The two differ in signature, a few headers and error codes; listing,
//! names and reading are the same. One request per call where the protocol permits it, never a HEAD for what a listing tells.
//!
//! - `client` sends one signed request; `sign`, `body` and `credentials` serve it; `error` words its failures.
//! - `list` reads XML pages, `directory` turns them into directory pages with POSIX names ([`crate::names`]).
//! - `version` is the layout of version tokens and locators.
//! - `change` is the way in for everything that writes: `put`, `multipart`, `copy`, `delete`; `metadata` is the layout of POSIX attributes,
//!   `probe` finds out which conditions the store honours, `document` is the XML that is no listing.
//!
//! What must stay true: one attempt per request (retries are a decorator's); [`Backend::read`] yields bytes of exactly the version
//! asked for, or an error.

mod body;
mod change;
mod client;
pub(crate) mod copy;
mod credentials;
pub(crate) mod delete;
mod directory;
mod document;
mod error;
mod list;
mod metadata;
pub(crate) mod multipart;
mod probe;
mod put;
mod read;
mod sign;
mod version;

pub use credentials::{keys_from_env, keys_to_send};

use crate::{Backend, ByteStream, Capabilities, FsStats, ListPage, names};
use async_trait::async_trait;
use bytes::Bytes;
use client::{Call, Client};
use credentials::Credentials;
use directory::Cursor;
use efc_common::id::SourceId;
use efc_common::node::Node;
use efc_common::source::{SourceSpec, StaticKeys};
use efc_common::{Error, Kind, Result};
use http::{Method, header};
use list::Listing;
use std::ops::Range;
use std::sync::Arc;
use version::{ETAG_BYTES_MAX, Place, Version, bare_etag, place};

/// Keys in a page: the most that stores give.
const PAGE_KEYS: usize = 1000;
/// Keys asked for to find one name: enough for the object, its directory and the usual neighbours between them.
const LOOKUP_KEYS: usize = 16;
/// Longest list answer that is read: 1,000 keys of 1,024 bytes, three characters each, with generous attributes.
const LIST_BYTES_MAX: usize = 16 << 20;

/// The client of one bucket. Cheap to construct; connections are made by the first requests.
pub struct ObjectBackend {
    client: Arc<Client>,
    source: SourceId,
    path: Bytes,
    conditions: tokio::sync::OnceCell<probe::Conditions>,
}

/// What the requests to one store are signed with; may be replaced while it serves.
#[derive(Clone)]
pub struct Signer(Arc<Client>);

impl Signer {
    /// From now on requests are signed with the credentials that `spec` refers to; `keys` as for [`connect`]. Requests under way end with those of before. Sends nothing.
    ///
    /// # Errors
    /// As [`connect`].
    pub fn replace(&self, spec: &SourceSpec, keys: Option<&StaticKeys>) -> Result<()> {
        self.0.replace_credentials(Credentials::new(spec, keys)?);
        Ok(())
    }
}

impl ObjectBackend {
    /// What its requests are signed with.
    pub fn signer(&self) -> Signer {
        Signer(self.client.clone())
    }
}

/// Makes the backend of an `oss://` or `s3://` source. No network I/O; must run inside a tokio runtime only once requests are sent.
/// `keys`: literal keys that came beside the source ([`efc_common::source::SecretRef::Keys`], or `Env` read by the mounting process).
///
/// # Errors
/// [`Kind::Invalid`] that names the option or the missing credential and the cure.
pub fn connect(spec: &SourceSpec, keys: Option<&StaticKeys>) -> Result<ObjectBackend> {
    let credentials = Credentials::new(spec, keys)?;
    let client = Arc::new(Client::new(spec, credentials)?);
    let path = Bytes::copy_from_slice(spec.path.as_bytes());
    Ok(ObjectBackend { client, source: spec.id(), path, conditions: tokio::sync::OnceCell::new() })
}

#[async_trait]
impl Backend for ObjectBackend {
    fn source_id(&self) -> SourceId {
        self.source
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { shared_listing: true, path_locators: true, conditional_read: true, ..Capabilities::default() }
    }

    /// Checks bucket, key and endpoint by asking for the bucket's location: neither a LIST nor a HEAD. Keys that may not ask that (and
    /// servers that cannot answer) are checked by a list of one key. A prefix without any key is an empty directory, not an error.
    async fn root(&self) -> Result<Node> {
        let call = Call { query: &[("location", b"")], ..Call::new(Method::GET, b"") };
        match self.client.send(&call).await {
            Ok(answer) => {
                self.client.collect(answer.into_body(), LIST_BYTES_MAX).await?;
                Ok(directory::directory_node(self.path.to_vec(), 0))
            }
            Err(e) if may_not_ask_location(&e) => {
                let listing = self.list_keys(&self.path, false, 1, "").await?;
                Ok(directory::directory_node(self.path.to_vec(), marker_mtime(&self.path, &listing)))
            }
            Err(e) => Err(e),
        }
    }

    /// One LIST, or two when the name has many neighbours that begin with it.
    async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node> {
        let Place::Directory(prefix) = place(dir) else { return Err(not_a_directory()) };
        let absent = || Error::new(Kind::NotFound, "no such name in this directory");
        let segment = names::decode(name).ok_or_else(absent)?;
        let key = [prefix, &segment.bytes].concat();
        let below = [&key[..], b"/"].concat();
        let listing = self.list_keys(&key, true, LOOKUP_KEYS, "").await?;
        let mut is_directory = listing.prefixes.contains(&below);
        if !is_directory && listing.next.is_some() {
            // `key-x` comes before `key/`, so the directory may be out of sight.
            let first = self.list_keys(&below, false, 1, "").await?;
            is_directory = !first.objects.is_empty() || !first.unusable.is_empty();
        }
        let object = listing.objects.into_iter().find(|o| o.key == key && (key != prefix || o.version.size > 0));
        match (segment.beside_directory, object, is_directory) {
            (false, _, true) => Ok(directory::directory_node(below, 0)),
            (false, Some(object), false) | (true, Some(object), true) => Ok(directory::file_node(object)),
            _ => Err(absent()),
        }
    }

    /// HEAD for a file; for a directory a LIST of one key, which finds its marker.
    async fn getattr(&self, locator: &Bytes) -> Result<Node> {
        match place(locator) {
            Place::Directory(prefix) => {
                let listing = self.list_keys(prefix, false, 1, "").await?;
                let empty = listing.objects.is_empty() && listing.unusable.is_empty();
                if empty && !prefix.is_empty() && *prefix != self.path {
                    return Err(Error::new(Kind::NotFound, "no key has this prefix any more"));
                }
                Ok(directory::directory_node(prefix.to_vec(), marker_mtime(prefix, &listing)))
            }
            Place::File(key) => {
                let call = Call::new(Method::HEAD, key);
                let answer = self.client.send(&call).await?;
                let version = head_version(answer.headers())?;
                Ok(directory::file_node(list::Object { key: key.to_vec(), version }))
            }
        }
    }

    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        let Place::Directory(prefix) = place(dir) else { return Err(not_a_directory()) };
        let cursor = from.as_deref().map_or(Ok(Cursor::default()), Cursor::decode)?;
        let listing = self.list_keys(prefix, true, PAGE_KEYS, &cursor.token).await?;
        let nothing = listing.objects.is_empty() && listing.prefixes.is_empty() && listing.unusable.is_empty();
        if from.is_none() && nothing && listing.next.is_none() && !prefix.is_empty() && *prefix != self.path {
            return Err(Error::new(Kind::NotFound, "no key has this prefix any more"));
        }
        if listing.next.as_ref().is_some_and(|next| *next == cursor.token) {
            return Err(Error::new(Kind::Corrupt, "the server's listing does not advance"));
        }
        Ok(directory::page(prefix, listing, cursor.open))
    }

    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream> {
        let Place::File(key) = place(locator) else {
            return Err(Error::new(Kind::IsADirectory, "a directory cannot be read"));
        };
        read::read(&self.client, key, &Version::decode(version)?, range).await
    }

    async fn readlink(&self, _locator: &Bytes) -> Result<Bytes> {
        Err(Error::new(Kind::Invalid, "an object is no symbolic link"))
    }

    async fn xattrs(&self, _locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        Ok(Vec::new())
    }

    async fn statfs(&self) -> Result<FsStats> {
        Err(Error::new(Kind::Unsupported, "an object store has no capacity"))
    }
}

impl ObjectBackend {
    /// One list request: up to `max` keys that begin with `prefix`, folded at the next `/` if `fold`.
    async fn list_keys(&self, prefix: &[u8], fold: bool, max: usize, token: &str) -> Result<Listing> {
        let max = max.to_string();
        let mut query: Vec<(&'static str, &[u8])> =
            vec![("list-type", b"2"), ("encoding-type", b"url"), ("max-keys", max.as_bytes())];
        if !prefix.is_empty() {
            query.push(("prefix", prefix));
        }
        if fold {
            query.push(("delimiter", b"/"));
        }
        if !token.is_empty() {
            query.push(("continuation-token", token.as_bytes()));
        }
        let answer = self.client.send(&Call { query: &query, ..Call::new(Method::GET, b"") }).await?;
        let body = self.client.collect(answer.into_body(), LIST_BYTES_MAX).await?;
        list::parse(&body)
    }
}

/// A copy by parts of a size to choose, for the suite.
///
/// # Errors
/// As [`crate::objects::Objects::copy`].
#[cfg(any(test, feature = "suite"))]
pub async fn copy_by_parts(
    objects: &dyn crate::objects::Objects,
    source: (&Bytes, &Bytes),
    target: &Bytes,
    metadata: Option<&crate::objects::Metadata>,
    condition: &crate::objects::Condition,
    part_bytes: u64,
) -> Result<Node> {
    copy::by_parts(objects, source, target, metadata, condition, part_bytes).await
}

fn not_a_directory() -> Error {
    Error::new(Kind::NotADirectory, "an object is no directory")
}

/// The bucket may well be there and readable. Not so when the key itself was refused.
fn may_not_ask_location(e: &Error) -> bool {
    let denied = e.is(Kind::PermissionDenied) && matches!(e.context("code"), None | Some("AccessDenied"));
    let other =
        e.is(Kind::Invalid) && e.context("status") == Some("400") && e.context("code") != Some("InvalidBucketName");
    denied || other || e.is(Kind::Unsupported)
}

fn marker_mtime(prefix: &[u8], listing: &Listing) -> i64 {
    listing.objects.first().filter(|o| o.key == prefix && !prefix.is_empty()).map_or(0, |o| o.version.mtime_secs)
}

/// The version that a HEAD or GET answer describes.
fn head_version(headers: &http::HeaderMap) -> Result<Version> {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
    let bad = |what| Error::new(Kind::Corrupt, format!("the server's answer has no usable {what}"));
    let size = text(header::CONTENT_LENGTH).and_then(|v| v.parse().ok()).ok_or_else(|| bad("Content-Length"))?;
    let mtime_secs = last_modified(headers).ok_or_else(|| bad("Last-Modified"))?;
    let etag = headers.get(header::ETAG).map_or(&b""[..], |v| bare_etag(v.as_bytes())).to_vec();
    if etag.len() > ETAG_BYTES_MAX {
        return Err(bad("ETag"));
    }
    Ok(Version { size, mtime_secs, etag })
}

fn last_modified(headers: &http::HeaderMap) -> Option<i64> {
    let text = headers.get(header::LAST_MODIFIED)?.to_str().ok()?;
    let time = httpdate::parse_http_date(text).ok()?;
    time.duration_since(std::time::UNIX_EPOCH).ok().and_then(|d| i64::try_from(d.as_secs()).ok())
}
