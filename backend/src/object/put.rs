//! Writing whole objects, appending, HEAD with metadata, and what makes a change conditional.
//!
//! Conditions. The store itself decides where it can (`If-None-Match: *`, `If-Match`, `x-oss-forbid-overwrite`); which of these a store honours is
//! found out once (`probe`). For the rest a HEAD right before the change says no to whoever is late: OSS has no `If-Match` for PUT at all.
//!
//! The node of what was written costs no request: its version needs size and ETag only (see `version`), and the answer to a PUT tells the ETag.

use super::body::total;
use super::client::{Call, Dialect};
use super::directory::{directory_node, file_node};
use super::list::Object;
use super::metadata::{self, DIRECTORY_TYPE};
use super::version::{ETAG_BYTES_MAX, Place, Version, bare_etag, key_of, place};
use super::{ObjectBackend, head_version, last_modified};
use crate::objects::{Body, Condition, Metadata};
use bytes::Bytes;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method};
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest answer to a PUT that is read; there should be none.
const ANSWER_BYTES_MAX: usize = 64 << 10;

pub(super) type Headers = Vec<(HeaderName, HeaderValue)>;

impl ObjectBackend {
    /// See [`crate::objects::Objects::put`].
    pub(super) async fn put_object(
        &self,
        locator: &Bytes,
        body: Body,
        m: &Metadata,
        condition: &Condition,
    ) -> Result<Node> {
        let key = key_of(locator)?;
        let mut headers = self.metadata_headers(locator, m)?;
        headers.extend(self.condition(locator, condition).await?);
        let answer = self.put_raw(key, headers, &body).await.map_err(|e| refused(e, condition))?;
        self.written(locator, &answer, None, total(&body)).await
    }

    /// One PUT. Gives the headers of its answer.
    pub(super) async fn put_raw(&self, key: &[u8], headers: Headers, body: &[Bytes]) -> Result<HeaderMap> {
        let (head, rest) = self.client.send(&Call { headers, body, ..Call::new(Method::PUT, key) }).await?.into_parts();
        // Read to its end, so that the connection can be used again.
        self.client.collect(rest, ANSWER_BYTES_MAX).await?;
        Ok(head.headers)
    }

    /// Metadata as headers; a marker is called one.
    pub(super) fn metadata_headers(&self, locator: &[u8], m: &Metadata) -> Result<Headers> {
        let mut headers = metadata::headers(self.client.dialect, m)?;
        if m.content_type.is_none() && matches!(place(locator), Place::Directory(_)) {
            headers.push((header::CONTENT_TYPE, HeaderValue::from_static(DIRECTORY_TYPE)));
        }
        Ok(headers)
    }

    /// The headers that make a change of `locator` conditional. Where the store does not decide, this is the moment when it is looked at.
    pub(super) async fn condition(&self, locator: &Bytes, condition: &Condition) -> Result<Headers> {
        match condition {
            Condition::Any => Ok(Vec::new()),
            Condition::Absent if self.conditions().await?.absent => Ok(vec![self.absent_header()]),
            Condition::Version(version) => {
                let etag = Version::decode(version)?.etag;
                if !etag.is_empty() && self.client.dialect == Dialect::S3 && self.conditions().await?.version {
                    return Ok(vec![if_match(header::IF_MATCH, &etag)?]);
                }
                self.check(locator, condition).await.map(|()| Vec::new())
            }
            Condition::Absent => self.check(locator, condition).await.map(|()| Vec::new()),
        }
    }

    /// The header for [`Condition::Absent`].
    pub(super) fn absent_header(&self) -> (HeaderName, HeaderValue) {
        self.client.dialect.pick(
            (header::IF_NONE_MATCH, HeaderValue::from_static("*")),
            (HeaderName::from_static("x-oss-forbid-overwrite"), HeaderValue::from_static("true")),
        )
    }

    /// Does the condition hold now?
    pub(super) async fn check(&self, locator: &Bytes, condition: &Condition) -> Result<()> {
        if *condition == Condition::Any {
            return Ok(());
        }
        let found = match self.head_object(locator).await {
            Ok((node, _)) => Some(node.version),
            Err(e) if e.is(Kind::NotFound) => None,
            Err(e) => return Err(e),
        };
        match (condition, found) {
            (Condition::Any, _) | (Condition::Absent, None) => Ok(()),
            (Condition::Version(wanted), Some(found)) if *wanted == found => Ok(()),
            (Condition::Absent, Some(_)) => Err(Error::new(Kind::Conflict, "the object exists already")),
            (Condition::Version(_), _) => Err(Error::new(Kind::Conflict, "the object is no longer the version known")),
        }
    }

    /// The node of what was just written to `locator`, from the headers of the answer and, where its document tells it, an ETag.
    pub(super) async fn written(
        &self,
        locator: &Bytes,
        headers: &HeaderMap,
        etag: Option<&str>,
        size: u64,
    ) -> Result<Node> {
        let etag = etag.map(str::as_bytes).or(headers.get(header::ETAG).map(HeaderValue::as_bytes));
        let etag = etag.map(bare_etag).unwrap_or_default().to_vec();
        if etag.is_empty() || etag.len() > ETAG_BYTES_MAX {
            return Ok(self.head_object(locator).await?.0);
        }
        let mtime_secs = last_modified(headers).or_else(|| answered_at(headers)).unwrap_or_else(now);
        Ok(node_of(locator, Version { size, mtime_secs, etag }))
    }

    /// See [`crate::objects::Objects::append`].
    pub(super) async fn append_object(&self, locator: &Bytes, position: u64, body: Body, m: &Metadata) -> Result<Node> {
        if self.client.dialect == Dialect::S3 {
            return Err(Error::new(Kind::Unsupported, "S3 cannot append to objects"));
        }
        let key = key_of(locator)?;
        let headers = if position == 0 { self.metadata_headers(locator, m)? } else { Vec::new() };
        let at = position.to_string();
        let query: &[(&'static str, &[u8])] = &[("append", b""), ("position", at.as_bytes())];
        let call = Call { query, headers, body: &body, ..Call::new(Method::POST, key) };
        let (head, rest) = self.client.send(&call).await?.into_parts();
        self.client.collect(rest, ANSWER_BYTES_MAX).await?;
        self.written(locator, &head.headers, None, position + total(&body)).await
    }

    /// See [`crate::objects::Objects::head`].
    pub(super) async fn head_object(&self, locator: &Bytes) -> Result<(Node, Metadata)> {
        let answer = self.client.send(&Call::new(Method::HEAD, key_of(locator)?)).await?;
        let node = node_of(locator, head_version(answer.headers())?);
        Ok((node, metadata::read(self.client.dialect, answer.headers())))
    }
}

/// The node of the object, or marker, that a locator names.
pub(super) fn node_of(locator: &[u8], version: Version) -> Node {
    match place(locator) {
        Place::Directory(prefix) => directory_node(prefix.to_vec(), version.mtime_secs),
        Place::File(key) => file_node(Object { key: key.to_vec(), version }),
    }
}

/// `NAME: "etag"`.
pub(super) fn if_match(name: HeaderName, etag: &[u8]) -> Result<(HeaderName, HeaderValue)> {
    let value = HeaderValue::from_bytes(&[b"\"", etag, b"\""].concat());
    Ok((name, value.map_err(|_| Error::new(Kind::Invalid, "the version's ETag cannot be sent"))?))
}

/// What the refusal of a conditional change means: [`Kind::Conflict`] when it is the condition that did not hold.
pub(super) fn refused(e: Error, condition: &Condition) -> Error {
    let failed = match condition {
        Condition::Any => false,
        Condition::Absent => e.is(Kind::Stale),
        Condition::Version(_) => {
            e.is(Kind::Stale) || (e.is(Kind::NotFound) && matches!(e.context("code"), None | Some("NoSuchKey")))
        }
    };
    if failed { Error::new(Kind::Conflict, "somebody else changed the object meanwhile").caused_by(e) } else { e }
}

fn answered_at(headers: &HeaderMap) -> Option<i64> {
    let time = httpdate::parse_http_date(headers.get(header::DATE)?.to_str().ok()?).ok()?;
    Some(seconds(time))
}

fn now() -> i64 {
    seconds(SystemTime::now())
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).ok().and_then(|d| i64::try_from(d.as_secs()).ok()).unwrap_or(0)
}
