//! Limits on what one backend may ask of its origin: requests a second, bytes a second, and how long one answer may take.
//!
//! The first two are the source's options `request_rate` and `bandwidth`: who is over them waits. The third is a safety net for every
//! kind of origin: a call, or the next piece of a stream, that does not come within a little more than the source's `timeout` has
//! failed. Protocol clients watch `timeout` themselves and say more; the net catches what they miss (a hung file system, a stalled proxy).

use crate::count::Request;
use crate::tree::around::Around;
use crate::{Backend, ByteStream, Capabilities, DynBackend, FsStats, ListPage};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::error::Context;
use efc_common::id::SourceId;
use efc_common::limit::RateLimit;
use efc_common::node::Node;
use efc_common::source::SourceSpec;
use efc_common::units::parse_bytes;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, stream};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// The decorator.
pub(crate) struct Limit {
    inner: DynBackend,
    limits: Arc<Limits>,
}

impl Limit {
    pub(crate) fn new(inner: DynBackend, limits: Arc<Limits>) -> Limit {
        Limit { inner, limits }
    }
}

/// What may be asked in a second, at most. 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Requests.
    pub requests: u64,
    /// Bytes, both ways together.
    pub bytes: u64,
}

impl Rates {
    /// Those that the options of `spec` give.
    ///
    /// # Errors
    /// [`Kind::Invalid`] naming the option that is no number.
    pub fn of(spec: &SourceSpec) -> Result<Rates> {
        let number = |name| spec.option(name).map_or(Ok(0), |text| parse_bytes(text).context(format!("option {name}")));
        Ok(Rates { requests: number("request_rate")?, bytes: number("bandwidth")? })
    }
}

/// The limits of one origin, whichever of its traits is called.
pub struct Limits {
    pub(crate) requests: RateLimit,
    pub(crate) bytes: RateLimit,
    pub(crate) patience: Duration,
}

impl Limits {
    /// `timeout` is the source's option.
    pub(crate) fn new(rates: Rates, timeout: Duration) -> Limits {
        let (requests, bytes) = (RateLimit::new(rates.requests), RateLimit::new(rates.bytes));
        Limits { requests, bytes, patience: timeout + timeout / 4 }
    }

    /// From now on these, also for those who wait at this moment.
    pub fn set(&self, rates: Rates) {
        self.requests.set(rates.requests);
        self.bytes.set(rates.bytes);
    }

    async fn limit<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.requests.take(1).await;
        within(self.patience, call).await
    }
}

impl Around for Limits {
    async fn around<T, F, C>(&self, request: Request, mut call: F) -> Result<T>
    where
        T: Send,
        F: FnMut() -> C + Send,
        C: Future<Output = Result<T>> + Send,
    {
        if request == Request::Sync {
            // It ends when the origin's disks have taken what was written: only the caller's deadline bounds it.
            self.requests.take(1).await;
            return call().await;
        }
        self.limit(call()).await
    }

    async fn moved(&self, _request: Request, bytes: u64) {
        self.bytes.take(bytes).await;
    }
}

/// A call that is given up after `patience`.
pub(crate) async fn within<T>(patience: Duration, call: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(patience, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::new(Kind::Timeout, format!("the origin sent nothing for {patience:?}"))),
    }
}

#[async_trait]
impl Backend for Limit {
    fn source_id(&self) -> SourceId {
        self.inner.source_id()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn root(&self) -> Result<Node> {
        self.limits.limit(self.inner.root()).await
    }

    async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node> {
        self.limits.limit(self.inner.lookup(dir, name)).await
    }

    async fn getattr(&self, locator: &Bytes) -> Result<Node> {
        self.limits.limit(self.inner.getattr(locator)).await
    }

    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.limits.limit(self.inner.list(dir, from)).await
    }

    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream> {
        let pieces = self.limits.limit(self.inner.read(locator, version, range)).await?;
        let limits = self.limits.clone();
        let limited = stream::unfold(Some(pieces), move |pieces| {
            let limits = limits.clone();
            async move {
                let mut pieces = pieces?;
                let next = within(limits.patience, async { pieces.next().await.transpose() }).await;
                match next.transpose()? {
                    Ok(piece) => {
                        limits.bytes.take(piece.len() as u64).await;
                        Some((Ok(piece), Some(pieces)))
                    }
                    Err(e) => Some((Err(e), None)),
                }
            }
        });
        Ok(limited.boxed())
    }

    async fn readlink(&self, locator: &Bytes) -> Result<Bytes> {
        self.limits.limit(self.inner.readlink(locator)).await
    }

    async fn xattrs(&self, locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        self.limits.limit(self.inner.xattrs(locator)).await
    }

    async fn statfs(&self) -> Result<FsStats> {
        self.limits.limit(self.inner.statfs()).await
    }
}
