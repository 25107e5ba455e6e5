//! Multipart uploads: begin, parts sent and parts copied inside the store, completion, abortion, and the list of those that were never ended.

use super::ObjectBackend;
use super::client::Call;
use super::document::{self, element};
use super::put::{Headers, if_match, refused};
use super::version::{Version, bare_etag, key_of};
use crate::objects::{Condition, Metadata, OpenUpload, Part, UploadId};
use bytes::Bytes;
use efc_common::node::{Node, Time};
use efc_common::{Error, Kind, Result, Retry};
use http::Method;
use http::header::{self, HeaderName, HeaderValue};
use reqsign_core::time::Timestamp;
use std::ops::Range;
use std::time::Duration;

/// Stores put large objects together before they answer: as much longer than `timeout` is waited for it.
pub(crate) const COMPLETE_PATIENCE: Duration = Duration::from_secs(60);
/// Slowest copy inside a store, bytes a second, before it is taken for dead.
const COPY_RATE: u64 = 64 << 20;

const GONE: &str = "the source of the copy changed or was removed";

impl ObjectBackend {
    /// See [`crate::objects::Objects::begin`].
    pub(super) async fn begin_upload(&self, locator: &Bytes, m: &Metadata) -> Result<UploadId> {
        let headers = self.metadata_headers(locator, m)?;
        let call = Call { query: &[("uploads", b"")], headers, ..Call::new(Method::POST, key_of(locator)?) };
        let answer = self.client.send(&call).await?;
        let (_, mut fields) = document::fields(&self.client, answer, "InitiateMultipartUploadResult").await?;
        match fields.remove("UploadId") {
            Some(id) if !id.is_empty() => Ok(UploadId(id)),
            _ => Err(Error::new(Kind::Corrupt, "an upload was begun without an id").with_retry(Retry::Later)),
        }
    }

    /// See [`crate::objects::Objects::part`].
    pub(super) async fn upload_part(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        number: u32,
        body: &[Bytes],
    ) -> Result<Part> {
        let text = number.to_string();
        let query = part_query(&text, upload);
        let call = Call { query: &query, body, ..Call::new(Method::PUT, key_of(locator)?) };
        let (head, rest) = self.client.send(&call).await?.into_parts();
        self.client.collect(rest, 64 << 10).await?;
        let etag = head.headers.get(header::ETAG).map(HeaderValue::as_bytes);
        part_of(number, etag)
    }

    /// See [`crate::objects::Objects::part_copy`].
    pub(super) async fn copy_part(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        number: u32,
        (source, version): (&Bytes, &Bytes),
        range: Range<u64>,
    ) -> Result<Part> {
        self.check_source(source, version).await?;
        self.copy_part_raw(locator, upload, number, (source, &Version::decode(version)?), range).await.map_err(changed)
    }

    /// The request alone.
    pub(super) async fn copy_part_raw(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        number: u32,
        (source, version): (&Bytes, &Version),
        range: Range<u64>,
    ) -> Result<Part> {
        if range.is_empty() || range.end > version.size {
            let Range { start, end } = range;
            let message = format!("range {start}..{end} is no part of the source's {} bytes", version.size);
            return Err(Error::new(Kind::Invalid, message));
        }
        let text = number.to_string();
        let query = part_query(&text, upload);
        let mut headers = self.source_headers(source, version)?;
        let bytes = format!("bytes={}-{}", range.start, range.end - 1);
        let name = self.client.dialect.pick("x-amz-copy-source-range", "x-oss-copy-source-range");
        let bytes = HeaderValue::from_str(&bytes).map_err(|_| Error::new(Kind::Invalid, "no such range"))?;
        headers.push((HeaderName::from_static(name), bytes));
        let patience = copy_patience(range.end - range.start);
        let call = Call { query: &query, headers, patience, ..Call::new(Method::PUT, key_of(locator)?) };
        let answer = self.client.send(&call).await?;
        let (head, fields) = document::fields(&self.client, answer, "CopyPartResult").await?;
        let etag = fields.get("ETag").map(String::as_bytes).or(head.get(header::ETAG).map(HeaderValue::as_bytes));
        part_of(number, etag)
    }

    /// Is the source of a copy still this version? Only where the store does not look itself.
    pub(super) async fn check_source(&self, source: &Bytes, version: &Bytes) -> Result<()> {
        if self.conditions().await?.source && !Version::decode(version)?.etag.is_empty() {
            return Ok(());
        }
        let known = self.check(source, &Condition::Version(version.clone())).await;
        known.map_err(|e| if e.is(Kind::Conflict) { Error::new(Kind::Stale, GONE).caused_by(e) } else { e })
    }

    /// What names the source of a copy, and holds it to its version.
    pub(super) fn source_headers(&self, source: &Bytes, version: &Version) -> Result<Headers> {
        let dialect = self.client.dialect;
        let from = format!("/{}/{}", self.client.about.bucket, super::sign::encode_path(key_of(source)?));
        let from = HeaderValue::from_str(&from).map_err(|_| Error::new(Kind::Invalid, "the source cannot be named"))?;
        let name = dialect.pick("x-amz-copy-source", "x-oss-copy-source");
        let mut headers = vec![(HeaderName::from_static(name), from)];
        if !version.etag.is_empty() {
            let name = dialect.pick("x-amz-copy-source-if-match", "x-oss-copy-source-if-match");
            headers.push(if_match(HeaderName::from_static(name), &version.etag)?);
        }
        Ok(headers)
    }

    /// See [`crate::objects::Objects::complete`]. The size of what came out is not in the answer, so this ends with a HEAD.
    pub(super) async fn complete_upload(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Node> {
        let headers = self.condition(locator, condition).await?;
        let done = self.complete_raw(locator, upload, parts, headers).await;
        let etag = done.map_err(|e| match e.context("code") {
            // Somebody wrote the key while S3 put the parts together; it wants to have them all again.
            Some("ConditionalRequestConflict") => {
                Error::new(Kind::Conflict, "somebody else changed the object meanwhile").caused_by(e)
            }
            _ => refused(e, condition),
        })?;
        let node = self.head_object(locator).await?.0;
        let replaced = match Version::decode(&node.version) {
            Ok(v) => !etag.is_empty() && v.etag != etag,
            // A directory's node has no version.
            Err(_) => false,
        };
        if replaced {
            return Err(Error::new(Kind::Stale, "the object was replaced right after its upload was completed"));
        }
        Ok(node)
    }

    /// The completion alone. Gives the ETag it was answered with.
    pub(super) async fn complete_raw(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        parts: &[Part],
        mut headers: Headers,
    ) -> Result<Vec<u8>> {
        let mut xml = String::from("<CompleteMultipartUpload>");
        for part in parts {
            xml.push_str("<Part>");
            element(&mut xml, "PartNumber", &part.number.to_string());
            element(&mut xml, "ETag", &format!("\"{}\"", String::from_utf8_lossy(&part.etag)));
            xml.push_str("</Part>");
        }
        xml.push_str("</CompleteMultipartUpload>");
        headers.push((header::CONTENT_TYPE, HeaderValue::from_static("application/xml")));
        let call = Call {
            query: &[("uploadId", upload.0.as_bytes())],
            headers,
            body: &[xml.into()],
            patience: COMPLETE_PATIENCE,
            ..Call::new(Method::POST, key_of(locator)?)
        };
        let answer = self.client.send(&call).await?;
        let (_, fields) = document::fields(&self.client, answer, "CompleteMultipartUploadResult").await?;
        Ok(fields.get("ETag").map(|e| bare_etag(e.as_bytes()).to_vec()).unwrap_or_default())
    }

    /// See [`crate::objects::Objects::abort`].
    pub(super) async fn abort_upload(&self, locator: &Bytes, upload: &UploadId) -> Result<()> {
        let query: &[(&'static str, &[u8])] = &[("uploadId", upload.0.as_bytes())];
        match self.client.send(&Call { query, ..Call::new(Method::DELETE, key_of(locator)?) }).await {
            Ok(answer) => self.client.collect(answer.into_body(), 64 << 10).await.map(drop),
            Err(e) if e.is(Kind::NotFound) && e.context("code") != Some("NoSuchBucket") => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// See [`crate::objects::Objects::open_uploads`].
    pub(super) async fn list_uploads(&self) -> Result<Vec<OpenUpload>> {
        let mut all = Vec::new();
        let mut marker: Option<(Vec<u8>, String)> = None;
        loop {
            let page = self.uploads_page(marker.as_ref()).await?;
            // Some servers do not look at the prefix.
            all.extend(page.uploads.into_iter().filter(|u| u.locator.starts_with(&self.path)));
            match page.next {
                None => return Ok(all),
                next if next == marker => {
                    return Err(Error::new(Kind::Corrupt, "the server's list of uploads does not advance"));
                }
                next => marker = next,
            }
        }
    }

    async fn uploads_page(&self, marker: Option<&(Vec<u8>, String)>) -> Result<UploadsPage> {
        let mut query: Vec<(&'static str, &[u8])> =
            vec![("uploads", b""), ("encoding-type", b"url"), ("max-uploads", b"1000")];
        if !self.path.is_empty() {
            query.push(("prefix", &self.path));
        }
        if let Some((key, id)) = marker {
            query.extend([("key-marker", &key[..]), ("upload-id-marker", id.as_bytes())]);
        }
        let answer = self.client.send(&Call { query: &query, ..Call::new(Method::GET, b"") }).await?;
        let mut page = UploadsPage::default();
        document::elements(&self.client, answer, "ListMultipartUploadsResult", |path, value| page.end(path, value))
            .await?;
        page.finish()
    }
}

/// A list of uploads as it is read.
#[derive(Default)]
struct UploadsPage {
    encoded: bool,
    truncated: bool,
    key_marker: String,
    id_marker: String,
    fields: [String; 3],
    raw: Vec<[String; 3]>,
    uploads: Vec<OpenUpload>,
    next: Option<(Vec<u8>, String)>,
}

impl UploadsPage {
    fn end(&mut self, path: &[String], value: String) {
        let names: Vec<&str> = path.iter().skip(1).map(String::as_str).collect();
        match names.as_slice() {
            ["EncodingType"] => self.encoded = value == "url",
            ["IsTruncated"] => self.truncated = value.trim() == "true",
            ["NextKeyMarker"] => self.key_marker = value,
            ["NextUploadIdMarker"] => self.id_marker = value,
            ["Upload", "Key"] => self.fields[0] = value,
            ["Upload", "UploadId"] => self.fields[1] = value,
            ["Upload", "Initiated"] => self.fields[2] = value,
            ["Upload"] => self.raw.push(std::mem::take(&mut self.fields)),
            _ => {}
        }
    }

    fn finish(mut self) -> Result<UploadsPage> {
        for [key, id, begun] in std::mem::take(&mut self.raw) {
            let key = document::key(&key, self.encoded);
            // An upload whose begin nobody knows counts as old, hence is swept.
            let secs = begun.trim().parse::<Timestamp>().map_or(0, |t| t.as_second());
            let locator = if key.ends_with(b"/") { key.into() } else { super::version::file_locator(key) };
            self.uploads.push(OpenUpload { locator, id: UploadId(id), begun: Time { secs, nanos: 0 } });
        }
        if self.truncated {
            if self.key_marker.is_empty() {
                let message = "a truncated list of uploads has no NextKeyMarker";
                return Err(Error::new(Kind::Corrupt, message).with_retry(Retry::Later));
            }
            self.next = Some((document::key(&self.key_marker, self.encoded), self.id_marker.clone()));
        }
        Ok(self)
    }
}

fn part_query<'a>(number: &'a str, upload: &'a UploadId) -> [(&'static str, &'a [u8]); 2] {
    [("partNumber", number.as_bytes()), ("uploadId", upload.0.as_bytes())]
}

fn part_of(number: u32, etag: Option<&[u8]>) -> Result<Part> {
    match etag.map(bare_etag) {
        Some(etag) if !etag.is_empty() => Ok(Part { number, etag: etag.to_vec() }),
        _ => Err(Error::new(Kind::Corrupt, "the store took a part and gave no ETag for it").with_retry(Retry::Later)),
    }
}

/// How much longer than `timeout` a copy of so many bytes may take before the store answers.
pub(crate) fn copy_patience(bytes: u64) -> Duration {
    Duration::from_secs(bytes / COPY_RATE)
}

/// What a copy's refusal says of its source.
pub(super) fn changed(e: Error) -> Error {
    let gone = e.is(Kind::Stale) || (e.is(Kind::NotFound) && e.context("code") == Some("NoSuchKey"));
    if gone { Error::new(Kind::Stale, GONE).caused_by(e) } else { e }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_uploads() {
        let mut page = UploadsPage::default();
        let p = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        for (path, value) in [
            (&["R", "EncodingType"][..], "url"),
            (&["R", "Upload", "Key"], "a%2Fb+c"),
            (&["R", "Upload", "UploadId"], "u1"),
            (&["R", "Upload", "Initiated"], "2026-01-01T00:00:01.000Z"),
            (&["R", "Upload"], ""),
            (&["R", "Upload", "Key"], "d/"),
            (&["R", "Upload", "UploadId"], "u2"),
            (&["R", "Upload"], ""),
            (&["R", "IsTruncated"], "true"),
            (&["R", "NextKeyMarker"], "d/"),
            (&["R", "NextUploadIdMarker"], "u2"),
        ] {
            page.end(&p(path), value.to_string());
        }
        let page = page.finish().expect("page");
        let seen: Vec<_> = page.uploads.iter().map(|u| (&u.locator[..], u.id.0.as_str(), u.begun.secs)).collect();
        assert_eq!(seen, [(&b"a/b c"[..], "u1", 1_767_225_601), (b"d/", "u2", 0)]);
        assert_eq!(page.next, Some((b"d/".to_vec(), "u2".to_string())));
        assert!(UploadsPage { truncated: true, ..UploadsPage::default() }.finish().is_err());
    }
}
