//! Reading a range of one version of an object: one GET, whose answer is held against the version before a byte is passed on.
//!
//! A store serves one answer from one version, so checking the head (status, ETag or time, Content-Range) is enough to never mix two;
//! the length is checked again as the bytes come. hyper's buffers are passed on as they are.

use super::client::{Call, Client, Dialect};
use super::last_modified;
use super::version::{Version, bare_etag};
use crate::ByteStream;
use bytes::Bytes;
use efc_common::{Error, Kind, Result, Retry};
use futures::{StreamExt, stream};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, StatusCode};
use hyper::body::Incoming;
use std::ops::Range;
use std::sync::Arc;

/// See [`crate::Backend::read`].
pub(super) async fn read(client: &Arc<Client>, key: &[u8], version: &Version, range: Range<u64>) -> Result<ByteStream> {
    if range.start > range.end || range.end > version.size {
        let Range { start, end } = range;
        return Err(Error::new(
            Kind::Invalid,
            format!("range {start}..{end} is outside of the file's {} bytes", version.size),
        ));
    }
    if range.is_empty() {
        return Ok(stream::empty().boxed());
    }
    let mut headers =
        vec![(header::RANGE, header_value(format!("bytes={}-{}", range.start, range.end - 1).as_bytes())?)];
    if !version.etag.is_empty() {
        headers.push((header::IF_MATCH, header_value(&[b"\"", &version.etag[..], b"\""].concat())?));
    }
    if client.dialect == Dialect::Oss {
        // Without it OSS answers a range behind the end with the whole object.
        headers.push((HeaderName::from_static("x-oss-range-behavior"), HeaderValue::from_static("standard")));
    }
    let call = Call { headers, ..Call::new(Method::GET, key) };
    let answer = client.send(&call).await.map_err(|e| match e.kind() {
        Kind::NotFound if e.context("code") != Some("NoSuchBucket") => stale("it was removed").caused_by(e),
        _ => e,
    })?;
    check(answer.status(), answer.headers(), version, &range)?;
    let state = Body { client: Arc::clone(client), body: answer.into_body(), left: range.end - range.start };
    Ok(stream::try_unfold(state, Body::step).boxed())
}

fn header_value(bytes: &[u8]) -> Result<HeaderValue> {
    HeaderValue::from_bytes(bytes).map_err(|_| Error::new(Kind::Invalid, "the version's ETag cannot be sent"))
}

fn stale(what: &str) -> Error {
    Error::new(Kind::Stale, format!("the object changed while it was read: {what}"))
}

/// Is this the answer for `range` of `version`?
fn check(status: StatusCode, headers: &HeaderMap, version: &Version, range: &Range<u64>) -> Result<()> {
    let etag = headers.get(header::ETAG).map_or(&b""[..], |v| bare_etag(v.as_bytes()));
    if !version.etag.is_empty() && etag != version.etag {
        return Err(stale("its ETag is another"));
    }
    // Without ETags the time of the last change is all there is.
    if version.etag.is_empty() && last_modified(headers) != Some(version.mtime_secs) {
        return Err(stale("its time of modification is another"));
    }
    let text = |name: HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
    if status == StatusCode::PARTIAL_CONTENT {
        let (first, last, total) = text(header::CONTENT_RANGE).and_then(content_range).ok_or_else(|| {
            Error::new(Kind::Corrupt, "a partial answer came without a Content-Range").with_retry(Retry::Later)
        })?;
        if total.is_some_and(|t| t != version.size) {
            return Err(stale("its length is another"));
        }
        if (first, last) != (range.start, range.end - 1) {
            let message = format!("asked for bytes {}-{}, got {first}-{last}", range.start, range.end - 1);
            return Err(Error::new(Kind::Corrupt, message).with_retry(Retry::Later));
        }
    } else if *range != (0..version.size) {
        return Err(Error::new(Kind::Unsupported, "the server does not answer range requests"));
    }
    match text(header::CONTENT_LENGTH).and_then(|v| v.parse::<u64>().ok()) {
        Some(length) if length != range.end - range.start && status != StatusCode::PARTIAL_CONTENT => {
            Err(stale("its length is another"))
        }
        Some(length) if length != range.end - range.start => Err(wrong_length()),
        _ => Ok(()),
    }
}

fn wrong_length() -> Error {
    Error::new(Kind::Corrupt, "the server's answer has another length than asked for").with_retry(Retry::Later)
}

/// `bytes FIRST-LAST/TOTAL`, TOTAL may be `*`.
fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some((first.parse().ok()?, last.parse().ok()?, total))
}

/// A body on its way; keeps its client alive.
struct Body {
    client: Arc<Client>,
    body: Incoming,
    left: u64,
}

impl Body {
    async fn step(mut self) -> Result<Option<(Bytes, Body)>> {
        match self.client.piece(&mut self.body).await? {
            Some(piece) => {
                self.left = self.left.checked_sub(piece.len() as u64).ok_or_else(wrong_length)?;
                Ok(Some((piece, self)))
            }
            None if self.left > 0 => {
                let message = format!("the answer ended {} bytes early", self.left);
                Err(Error::new(Kind::Unavailable, message))
            }
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(content_range("bytes 0-9/10"), Some((0, 9, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, 9, None)));
        for bad in ["", "bytes */10", "bytes 0-9", "items 0-9/10", "bytes a-9/10", "bytes 0-99999999999999999999/1"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
