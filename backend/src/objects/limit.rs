//! Limits on what one object store is asked beyond reading; see [`crate::limit`], whose limits this shares. Sent bytes count as received ones do.
//!
//! The safety net is wider here: a call with a body may take as long as its bytes allow, and calls of several requests (a trial of conditions, keys
//! deleted one by one, pages of uploads) a multiple of one. The protocol client watches each request by itself.

use crate::ListPage;
use crate::limit::{Limits, within};
use crate::object::copy::size_of;
use crate::object::multipart::{COMPLETE_PATIENCE, copy_patience as copying};
use crate::objects::{
    Body, Condition, DynObjects, Metadata, ObjectLimits, Objects, OpenUpload, Part, UploadId, allowance, body_bytes,
};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::Node;
use efc_common::{Error, Result};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

const NONE: Duration = Duration::ZERO;

/// The decorator.
pub(crate) struct Limit {
    inner: DynObjects,
    limits: Arc<Limits>,
}

impl Limit {
    /// Limits by `limits`.
    pub(crate) fn new(inner: DynObjects, limits: Arc<Limits>) -> Limit {
        Limit { inner, limits }
    }

    /// One call that sends `bytes` and may take `times` as long as a single request, and `more`.
    async fn limit<T>(
        &self,
        bytes: u64,
        times: u32,
        more: Duration,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        self.limits.requests.take(1).await;
        self.limits.bytes.take(bytes).await;
        within(self.limits.patience * times + allowance(bytes) + more, call).await
    }
}

/// Requests that a change may take: itself, and the first time the trial of conditions (which copies need as well).
fn times(condition: &Condition) -> u32 {
    if *condition == Condition::Any { 2 } else { 18 }
}

#[async_trait]
impl Objects for Limit {
    async fn limits(&self) -> Result<ObjectLimits> {
        self.limit(0, 18, NONE, self.inner.limits()).await
    }

    fn child(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<Bytes> {
        self.inner.child(dir, name, directory)
    }

    async fn put(&self, locator: &Bytes, body: Body, metadata: &Metadata, condition: &Condition) -> Result<Node> {
        let bytes = body_bytes(&body);
        self.limit(bytes, times(condition), NONE, self.inner.put(locator, body, metadata, condition)).await
    }

    async fn begin(&self, locator: &Bytes, metadata: &Metadata) -> Result<UploadId> {
        self.limit(0, 1, NONE, self.inner.begin(locator, metadata)).await
    }

    async fn part(&self, locator: &Bytes, upload: &UploadId, number: u32, body: Body) -> Result<Part> {
        let bytes = body_bytes(&body);
        self.limit(bytes, 1, NONE, self.inner.part(locator, upload, number, body)).await
    }

    async fn part_copy(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        number: u32,
        source: (&Bytes, &Bytes),
        range: Range<u64>,
    ) -> Result<Part> {
        let more = copying(range.end.saturating_sub(range.start));
        self.limit(0, 18, more, self.inner.part_copy(locator, upload, number, source, range)).await
    }

    async fn complete(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Node> {
        self.limit(0, times(condition), COMPLETE_PATIENCE, self.inner.complete(locator, upload, parts, condition)).await
    }

    async fn abort(&self, locator: &Bytes, upload: &UploadId) -> Result<()> {
        self.limit(0, 1, NONE, self.inner.abort(locator, upload)).await
    }

    async fn open_uploads(&self) -> Result<Vec<OpenUpload>> {
        self.limit(0, 20, NONE, self.inner.open_uploads()).await
    }

    async fn append(&self, locator: &Bytes, position: u64, body: Body, metadata: &Metadata) -> Result<Node> {
        let bytes = body_bytes(&body);
        self.limit(bytes, 1, NONE, self.inner.append(locator, position, body, metadata)).await
    }

    async fn copy(
        &self,
        source: (&Bytes, &Bytes),
        target: &Bytes,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> Result<Node> {
        self.limit(0, 18, copying(size_of(source.1)?), self.inner.copy(source, target, metadata, condition)).await
    }

    async fn delete(&self, locators: &[Bytes]) -> Result<Vec<(usize, Error)>> {
        self.limit(0, 20, NONE, self.inner.delete(locators)).await
    }

    async fn head(&self, locator: &Bytes) -> Result<(Node, Metadata)> {
        self.limit(0, 1, NONE, self.inner.head(locator)).await
    }

    async fn keys_below(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.limit(0, 1, NONE, self.inner.keys_below(dir, from)).await
    }
}
