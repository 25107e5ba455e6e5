//! Copies inside the store: one request up to the store's limit for it, beyond that an upload whose parts the store copies itself.
//!
//! [`by_parts`] works on any [`Objects`], so that the decorator that asks again runs it over itself: a failed part of a terabyte costs a part.

use super::ObjectBackend;
use super::client::{Call, Dialect};
use super::document;
use super::multipart::{changed, copy_patience};
use super::version::{Version, key_of};
use crate::objects::{Condition, Metadata, Objects, Part, UploadId};
use bytes::Bytes;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, TryStreamExt, stream};
use http::Method;
use http::header::{HeaderName, HeaderValue};
use reqsign_core::time::Timestamp;

/// Largest object that one request copies, bytes: OSS's limit. S3's is five times that, but as one answer that comes after minutes.
pub(crate) const SINGLE_BYTES_MAX: u64 = 1 << 30;
/// Usual size of a copied part, bytes.
const PART_BYTES: u64 = 512 << 20;
/// Most parts of an upload.
const PARTS_MAX: u64 = 10_000;
/// Parts under way at once.
const PARTS_AT_ONCE: usize = 4;

/// Length of the object that a version token names.
pub(crate) fn size_of(version: &Bytes) -> Result<u64> {
    Ok(Version::decode(version)?.size)
}

impl ObjectBackend {
    /// One request of [`crate::objects::Objects::copy`].
    pub(super) async fn copy_object(
        &self,
        (source, version): (&Bytes, &Bytes),
        target: &Bytes,
        m: Option<&Metadata>,
        condition: &Condition,
    ) -> Result<Node> {
        let wanted = Version::decode(version)?;
        let dialect = self.client.dialect;
        self.check_source(source, version).await?;
        self.check(target, condition).await?;
        let mut headers = self.source_headers(source, &wanted)?;
        let directive = HeaderName::from_static(dialect.pick("x-amz-metadata-directive", "x-oss-metadata-directive"));
        match m {
            Some(m) => {
                headers.push((directive, HeaderValue::from_static("REPLACE")));
                headers.extend(self.metadata_headers(target, m)?);
            }
            None => headers.push((directive, HeaderValue::from_static("COPY"))),
        }
        if dialect == Dialect::Oss && *condition == Condition::Absent {
            headers.push(self.absent_header());
        }
        let patience = copy_patience(wanted.size);
        let answer = self.client.send(&Call { headers, patience, ..Call::new(Method::PUT, key_of(target)?) }).await;
        let answer = answer.map_err(changed)?;
        let (mut head, fields) = document::fields(&self.client, answer, "CopyObjectResult").await.map_err(changed)?;
        let time = fields.get("LastModified").and_then(|t| t.trim().parse::<Timestamp>().ok());
        if let Some(value) = time.and_then(|t| http_date(t.as_second())) {
            head.insert(http::header::LAST_MODIFIED, value);
        }
        self.written(target, &head, fields.get("ETag").map(String::as_str), wanted.size).await
    }
}

fn http_date(secs: i64) -> Option<HeaderValue> {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(u64::try_from(secs).ok()?);
    HeaderValue::from_str(&httpdate::fmt_http_date(time)).ok()
}

/// Copies by parts of `part_bytes`, at least as large as ten thousand of them allow.
///
/// # Errors
/// As [`Objects::copy`]; the upload it began is thrown away then.
pub(crate) async fn by_parts(
    objects: &dyn Objects,
    source: (&Bytes, &Bytes),
    target: &Bytes,
    m: Option<&Metadata>,
    condition: &Condition,
    part_bytes: u64,
) -> Result<Node> {
    let size = size_of(source.1)?;
    let found;
    let m = match m {
        Some(m) => m,
        None => {
            let (node, kept) = objects.head(source.0).await?;
            if node.version != *source.1 {
                return Err(Error::new(Kind::Stale, "the source of the copy changed"));
            }
            found = kept;
            &found
        }
    };
    let upload = objects.begin(target, m).await?;
    let made = copy_parts(objects, source, target, &upload, size, part_bytes.max(size.div_ceil(PARTS_MAX))).await;
    let done = match made {
        Ok(parts) => objects.complete(target, &upload, &parts, condition).await,
        Err(e) => Err(e),
    };
    if let Err(e) = &done {
        // What is not thrown away now is found by the sweep of open uploads.
        if let Err(left) = objects.abort(target, &upload).await {
            tracing::debug!(error = %left, after = %e, "an upload stays open");
        }
    }
    done
}

async fn copy_parts(
    objects: &dyn Objects,
    source: (&Bytes, &Bytes),
    target: &Bytes,
    upload: &UploadId,
    size: u64,
    part_bytes: u64,
) -> Result<Vec<Part>> {
    let numbered = (1u32..).zip((0..size).step_by(usize::try_from(part_bytes).unwrap_or(usize::MAX)));
    let copies = numbered.map(|(number, start)| {
        let range = start..size.min(start.saturating_add(part_bytes));
        objects.part_copy(target, upload, number, source, range)
    });
    stream::iter(copies).buffered(PARTS_AT_ONCE).try_collect().await
}

/// The usual size of parts.
pub(crate) fn part_bytes() -> u64 {
    PART_BYTES
}
