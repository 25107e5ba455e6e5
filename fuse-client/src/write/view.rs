//! The store as a read-write mount looks at it: with metadata, symbolic links and what is not committed yet.

use super::{OWN_PREFIX, ObjectTree, directory, is_draft, meta};
use async_trait::async_trait;
use bytes::Bytes;
use efc_backend::tree::{OpenFile, Tree};
use efc_backend::{Backend, ByteStream, Capabilities, FsStats, ListPage};
use efc_common::id::SourceId;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, TryStreamExt, stream};
use std::ops::Range;
use std::time::Instant;

#[async_trait]
impl Backend for ObjectTree {
    fn source_id(&self) -> SourceId {
        self.core.backend.source_id()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { symlinks: true, posix_attr: true, ..self.core.backend.capabilities() }
    }

    async fn root(&self) -> Result<Node> {
        self.core.backend.root().await
    }

    async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node> {
        let absent = || Error::new(Kind::NotFound, "no such name in this directory");
        if *dir == self.core.root && name.starts_with(OWN_PREFIX) {
            return Err(absent());
        }
        match self.find_overlay(dir, name, Instant::now()) {
            Some(node) => node.ok_or_else(absent),
            None => self.complete(self.core.backend.lookup(dir, name).await?).await,
        }
    }

    async fn getattr(&self, locator: &Bytes) -> Result<Node> {
        if let Some(file) = self.core.file(locator).filter(|f| f.is_dirty()) {
            return Ok(file.node());
        }
        if !locator.is_empty() && !locator.ends_with(b"/") {
            let (node, metadata) = self.core.head(locator).await?;
            return Ok(meta::apply(node, &metadata));
        }
        if let Some(metadata) = self.core.marker(locator).await? {
            return Ok(meta::apply(directory(locator), &metadata));
        }
        self.core.backend.getattr(locator).await
    }

    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.core.backend.list(dir, from).await
    }

    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream> {
        if !is_draft(version) {
            return self.core.backend.read(locator, version, range).await;
        }
        // A file whose commit failed, and that nobody has open.
        let changed = || Error::new(Kind::Stale, "the file was changed");
        let open = self.core.file(locator).map(|_| self.core.enter(locator)).ok_or_else(changed)?;
        let wanted = range.end - range.start;
        let data = open.read(range).await?;
        if open.state.node().version != *version || data.len() as u64 != wanted {
            return Err(changed());
        }
        Ok(stream::once(async { Ok(data) }).boxed())
    }

    async fn readlink(&self, locator: &Bytes) -> Result<Bytes> {
        let (node, _) = self.core.head(locator).await?;
        let range = 0..node.attr.size.min(libc::PATH_MAX as u64);
        let target = self.core.backend.read(locator, &node.version, range).await?;
        Ok(target.try_collect::<Vec<_>>().await?.concat().into())
    }

    async fn xattrs(&self, locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        self.core.backend.xattrs(locator).await
    }

    async fn statfs(&self) -> Result<FsStats> {
        self.core.backend.statfs().await
    }
}
