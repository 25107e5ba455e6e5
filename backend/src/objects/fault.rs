//! Injected faults in front of an [`Objects`]: a change may fail before it is made, or be made without an answer.

use crate::ListPage;
use crate::fault::Faults;
use crate::objects::{Body, Condition, DynObjects, Metadata, ObjectLimits, Objects, OpenUpload, Part, UploadId};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::Node;
use efc_common::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// The decorator.
pub(crate) struct Fault {
    inner: DynObjects,
    faults: Arc<Faults>,
}

impl Fault {
    /// Faults from `faults`.
    pub(crate) fn new(inner: DynObjects, faults: Arc<Faults>) -> Fault {
        Fault { inner, faults }
    }
}

#[async_trait]
impl Objects for Fault {
    async fn limits(&self) -> Result<ObjectLimits> {
        self.faults.disturb(self.inner.limits()).await
    }

    fn child(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<Bytes> {
        self.inner.child(dir, name, directory)
    }

    async fn put(&self, locator: &Bytes, body: Body, metadata: &Metadata, condition: &Condition) -> Result<Node> {
        self.faults.disturb_change(self.inner.put(locator, body, metadata, condition)).await
    }

    async fn begin(&self, locator: &Bytes, metadata: &Metadata) -> Result<UploadId> {
        self.faults.disturb(self.inner.begin(locator, metadata)).await
    }

    async fn part(&self, locator: &Bytes, upload: &UploadId, number: u32, body: Body) -> Result<Part> {
        self.faults.disturb_change(self.inner.part(locator, upload, number, body)).await
    }

    async fn part_copy(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        number: u32,
        source: (&Bytes, &Bytes),
        range: Range<u64>,
    ) -> Result<Part> {
        self.faults.disturb_change(self.inner.part_copy(locator, upload, number, source, range)).await
    }

    async fn complete(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Node> {
        self.faults.disturb_change(self.inner.complete(locator, upload, parts, condition)).await
    }

    async fn abort(&self, locator: &Bytes, upload: &UploadId) -> Result<()> {
        self.faults.disturb(self.inner.abort(locator, upload)).await
    }

    async fn open_uploads(&self) -> Result<Vec<OpenUpload>> {
        self.faults.disturb(self.inner.open_uploads()).await
    }

    async fn append(&self, locator: &Bytes, position: u64, body: Body, metadata: &Metadata) -> Result<Node> {
        self.faults.disturb_change(self.inner.append(locator, position, body, metadata)).await
    }

    async fn copy(
        &self,
        source: (&Bytes, &Bytes),
        target: &Bytes,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> Result<Node> {
        self.faults.disturb_change(self.inner.copy(source, target, metadata, condition)).await
    }

    async fn delete(&self, locators: &[Bytes]) -> Result<Vec<(usize, Error)>> {
        self.faults.disturb_change(self.inner.delete(locators)).await
    }

    async fn head(&self, locator: &Bytes) -> Result<(Node, Metadata)> {
        self.faults.disturb(self.inner.head(locator)).await
    }

    async fn keys_below(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.faults.disturb(self.inner.keys_below(dir, from)).await
    }
}
