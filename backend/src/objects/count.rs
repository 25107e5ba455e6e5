//! Counts what we ask of an object store beyond reading; see [`crate::count`]. A call of the trait is one request, whatever it takes.

use crate::ListPage;
use crate::count::{Counters, Request};
use crate::objects::{
    Body, Condition, DynObjects, Metadata, ObjectLimits, Objects, OpenUpload, Part, UploadId, body_bytes,
};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::Node;
use efc_common::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// The decorator.
pub(crate) struct Count {
    inner: DynObjects,
    counters: Arc<Counters>,
}

impl Count {
    /// Counts in `counters`.
    pub(crate) fn new(inner: DynObjects, counters: Arc<Counters>) -> Count {
        Count { inner, counters }
    }
}

#[async_trait]
impl Objects for Count {
    async fn limits(&self) -> Result<ObjectLimits> {
        self.counters.count(Request::Other, self.inner.limits()).await
    }

    fn child(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<Bytes> {
        self.inner.child(dir, name, directory)
    }

    async fn put(&self, locator: &Bytes, body: Body, metadata: &Metadata, condition: &Condition) -> Result<Node> {
        let bytes = body_bytes(&body);
        let answer = self.counters.count(Request::Put, self.inner.put(locator, body, metadata, condition)).await;
        answer.inspect(|_| self.counters.wrote(bytes))
    }

    async fn begin(&self, locator: &Bytes, metadata: &Metadata) -> Result<UploadId> {
        self.counters.count(Request::Other, self.inner.begin(locator, metadata)).await
    }

    async fn part(&self, locator: &Bytes, upload: &UploadId, number: u32, body: Body) -> Result<Part> {
        let bytes = body_bytes(&body);
        let answer = self.counters.count(Request::Part, self.inner.part(locator, upload, number, body)).await;
        answer.inspect(|_| self.counters.wrote(bytes))
    }

    async fn part_copy(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        number: u32,
        source: (&Bytes, &Bytes),
        range: Range<u64>,
    ) -> Result<Part> {
        self.counters.count(Request::Copy, self.inner.part_copy(locator, upload, number, source, range)).await
    }

    async fn complete(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Node> {
        self.counters.count(Request::Complete, self.inner.complete(locator, upload, parts, condition)).await
    }

    async fn abort(&self, locator: &Bytes, upload: &UploadId) -> Result<()> {
        self.counters.count(Request::Other, self.inner.abort(locator, upload)).await
    }

    async fn open_uploads(&self) -> Result<Vec<OpenUpload>> {
        self.counters.count(Request::List, self.inner.open_uploads()).await
    }

    async fn append(&self, locator: &Bytes, position: u64, body: Body, metadata: &Metadata) -> Result<Node> {
        let bytes = body_bytes(&body);
        let answer = self.counters.count(Request::Append, self.inner.append(locator, position, body, metadata)).await;
        answer.inspect(|_| self.counters.wrote(bytes))
    }

    async fn copy(
        &self,
        source: (&Bytes, &Bytes),
        target: &Bytes,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> Result<Node> {
        self.counters.count(Request::Copy, self.inner.copy(source, target, metadata, condition)).await
    }

    async fn delete(&self, locators: &[Bytes]) -> Result<Vec<(usize, Error)>> {
        self.counters.count(Request::Delete, self.inner.delete(locators)).await
    }

    async fn head(&self, locator: &Bytes) -> Result<(Node, Metadata)> {
        self.counters.count(Request::Getattr, self.inner.head(locator)).await
    }

    async fn keys_below(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.counters.count(Request::List, self.inner.keys_below(dir, from)).await
    }
}
