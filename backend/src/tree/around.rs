//! One decorator of trees and their open files for every policy: what a policy does, it does around single calls.

use super::{Allocate, Change, DynTree, NewNode, OpenFile, RenameMode, Tree};
use crate::count::Request;
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use std::any::Any;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

/// A policy: counts, limits, disturbs or repeats calls.
pub(crate) trait Around: Send + Sync + 'static {
    /// Makes a call of kind `request`, as often as the policy says.
    fn around<T, F, C>(&self, request: Request, call: F) -> impl Future<Output = Result<T>> + Send
    where
        T: Send,
        F: FnMut() -> C + Send,
        C: Future<Output = Result<T>> + Send;

    /// Content has been read or written.
    fn moved(&self, _request: Request, _bytes: u64) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// A tree under a policy.
pub(crate) struct Decorated<P> {
    inner: DynTree,
    policy: Arc<P>,
}

impl<P: Around> Decorated<P> {
    pub(crate) fn new(inner: DynTree, policy: Arc<P>) -> Decorated<P> {
        Decorated { inner, policy }
    }

    fn decorate(&self, inner: Arc<dyn OpenFile>) -> Arc<dyn OpenFile> {
        Arc::new(DecoratedFile { inner, policy: self.policy.clone() })
    }
}

#[async_trait]
impl<P: Around> Tree for Decorated<P> {
    fn keeps_removed(&self) -> bool {
        self.inner.keeps_removed()
    }

    fn child(&self, dir: &Bytes, name: &[u8]) -> Option<Bytes> {
        self.inner.child(dir, name)
    }

    fn drafts(&self) -> bool {
        self.inner.drafts()
    }

    fn overlay(&self, dir: &Bytes, asked: Instant) -> Vec<(Bytes, Option<Node>)> {
        self.inner.overlay(dir, asked)
    }

    fn find_overlay(&self, dir: &Bytes, name: &[u8], asked: Instant) -> Option<Option<Node>> {
        self.inner.find_overlay(dir, name, asked)
    }

    fn replaced(&self, dir: &Bytes) -> Option<Instant> {
        self.inner.replaced(dir)
    }

    fn complete_now(&self, node: &Node) -> Option<Node> {
        self.inner.complete_now(node)
    }

    async fn complete(&self, node: Node) -> Result<Node> {
        self.policy.around(Request::Getattr, || self.inner.complete(node.clone())).await
    }

    async fn create(&self, dir: &Bytes, name: &[u8], new: &NewNode) -> Result<Node> {
        self.policy.around(Request::Create, || self.inner.create(dir, name, new)).await
    }

    async fn link(&self, file: &Bytes, dir: &Bytes, name: &[u8]) -> Result<Node> {
        self.policy.around(Request::Link, || self.inner.link(file, dir, name)).await
    }

    async fn remove(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<()> {
        self.policy.around(Request::Remove, || self.inner.remove(dir, name, directory)).await
    }

    async fn rename(&self, from: (&Bytes, &[u8]), to: (&Bytes, &[u8]), mode: RenameMode) -> Result<Node> {
        self.policy.around(Request::Rename, || self.inner.rename(from, to, mode)).await
    }

    async fn set_attr(&self, locator: &Bytes, change: &Change) -> Result<Node> {
        self.policy.around(Request::Setattr, || self.inner.set_attr(locator, change)).await
    }

    async fn set_xattr(&self, locator: &Bytes, name: &[u8], value: &[u8], flags: i32) -> Result<()> {
        self.policy.around(Request::Setattr, || self.inner.set_xattr(locator, name, value, flags)).await
    }

    async fn remove_xattr(&self, locator: &Bytes, name: &[u8]) -> Result<()> {
        self.policy.around(Request::Setattr, || self.inner.remove_xattr(locator, name)).await
    }

    async fn open(&self, locator: &Bytes, write: bool) -> Result<Arc<dyn OpenFile>> {
        let inner = self.policy.around(Request::Other, || self.inner.open(locator, write)).await?;
        Ok(self.decorate(inner))
    }

    fn reopen(&self, fd: OwnedFd, locator: &Bytes) -> Option<Arc<dyn OpenFile>> {
        self.inner.reopen(fd, locator).map(|inner| self.decorate(inner))
    }
}

/// An open file under a policy.
struct DecoratedFile<P> {
    inner: Arc<dyn OpenFile>,
    policy: Arc<P>,
}

#[async_trait]
impl<P: Around> OpenFile for DecoratedFile<P> {
    async fn read(&self, range: Range<u64>) -> Result<Bytes> {
        let data = self.policy.around(Request::Read, || self.inner.read(range.clone())).await?;
        self.policy.moved(Request::Read, data.len() as u64).await;
        Ok(data)
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<Node> {
        let node = self.policy.around(Request::Write, || self.inner.write(offset, data.clone())).await?;
        self.policy.moved(Request::Write, data.len() as u64).await;
        Ok(node)
    }

    async fn sync(&self, data_only: bool) -> Result<Node> {
        self.policy.around(Request::Sync, || self.inner.sync(data_only)).await
    }

    async fn close(&self) -> Result<Option<Node>> {
        self.policy.around(Request::Sync, || self.inner.close()).await
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }

    fn resumed(&self) {
        self.inner.resumed();
    }

    async fn attr(&self) -> Result<Node> {
        self.policy.around(Request::Getattr, || self.inner.attr()).await
    }

    async fn set_attr(&self, change: &Change) -> Result<Node> {
        self.policy.around(Request::Setattr, || self.inner.set_attr(change)).await
    }

    async fn allocate(&self, range: Range<u64>, how: Allocate) -> Result<Node> {
        self.policy.around(Request::Write, || self.inner.allocate(range.clone(), how)).await
    }

    async fn copy(&self, source: &dyn OpenFile, from: Range<u64>, offset: u64) -> Result<(u64, Node)> {
        let Some(source) = source.as_any().downcast_ref::<DecoratedFile<P>>() else {
            return Err(Error::new(Kind::Unsupported, "the files are of different origins"));
        };
        self.policy.around(Request::Write, || self.inner.copy(&*source.inner, from.clone(), offset)).await
    }

    async fn seek(&self, offset: u64, hole: bool) -> Result<u64> {
        self.policy.around(Request::Other, || self.inner.seek(offset, hole)).await
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
