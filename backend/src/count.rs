//! Counts what we ask of an origin: metrics `efc_origin_*`, and the same numbers without Prometheus ([`OriginStats`]).
//!
//! A request is one call of the trait, named in the origin's words: an object store gets `get`, `head`, `list`, a NAS gets `read`,
//! `lookup`, `getattr`, `readdir`, `write` and so on; changes of objects are `put`, `part`, `complete`, `append`, `copy`, `delete`; the rest is `other`. A streamed NAS read is one request, however many READ calls it is cut into.

use crate::tree::around::Around;
use crate::{Backend, ByteStream, Capabilities, DynBackend, FsStats, ListPage};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::id::SourceId;
use efc_common::metrics::{counter, histogram};
use efc_common::node::Node;
use efc_common::{Error, Result};
use futures::StreamExt;
use metrics::{Counter, Histogram};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    Lookup,
    Getattr,
    List,
    Read,
    Create,
    Link,
    Remove,
    Rename,
    Setattr,
    Write,
    Sync,
    Put,
    Part,
    Complete,
    Append,
    Copy,
    Delete,
    Other,
}

/// In the order of [`Request`].
const REQUESTS: [Request; 18] = [
    Request::Lookup,
    Request::Getattr,
    Request::List,
    Request::Read,
    Request::Create,
    Request::Link,
    Request::Remove,
    Request::Rename,
    Request::Setattr,
    Request::Write,
    Request::Sync,
    Request::Put,
    Request::Part,
    Request::Complete,
    Request::Append,
    Request::Copy,
    Request::Delete,
    Request::Other,
];

impl Request {
    fn label(self, objects: bool) -> &'static str {
        match (self, objects) {
            (Request::Lookup, false) => "lookup",
            (Request::Getattr, false) => "getattr",
            (Request::Getattr, true) => "head",
            (Request::List, false) => "readdir",
            // Object stores find a name by a list of a few keys.
            (Request::Lookup | Request::List, true) => "list",
            (Request::Read, false) => "read",
            (Request::Read, true) => "get",
            (Request::Create, _) => "create",
            (Request::Link, _) => "link",
            (Request::Remove, _) => "remove",
            (Request::Rename, _) => "rename",
            (Request::Setattr, _) => "setattr",
            (Request::Write, _) => "write",
            (Request::Sync, _) => "sync",
            (Request::Put, _) => "put",
            (Request::Part, _) => "part",
            (Request::Complete, _) => "complete",
            (Request::Append, _) => "append",
            (Request::Copy, _) => "copy",
            (Request::Delete, _) => "delete",
            (Request::Other, _) => "other",
        }
    }

    /// Does it change the origin?
    pub(crate) fn changes(self) -> bool {
        !matches!(self, Request::Lookup | Request::Getattr | Request::List | Request::Read | Request::Other)
    }
}

/// What was asked of an origin since its backend was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OriginStats {
    /// Requests sent, by kind; kinds never sent are absent.
    pub requests: BTreeMap<&'static str, u64>,
    /// Requests that failed.
    pub errors: u64,
    /// Requests sent again after a passing fault.
    pub retries: u64,
    /// Content bytes received.
    pub bytes: u64,
    /// Content bytes sent, in requests that succeeded.
    pub bytes_sent: u64,
}

/// Counters of one request kind.
struct Series {
    label: &'static str,
    sent: AtomicU64,
    requests: Counter,
    retries: Counter,
    seconds: Histogram,
}

/// The counters of one origin; shared by the decorators that count.
pub struct Counters {
    series: [Series; REQUESTS.len()],
    errors: AtomicU64,
    retries: AtomicU64,
    received: AtomicU64,
    bytes: Counter,
    written: AtomicU64,
    sent_bytes: Counter,
}

impl Counters {
    /// Counters for an origin of these capabilities, which decide how its requests are called.
    pub(crate) fn new(capabilities: Capabilities) -> Counters {
        let series = REQUESTS.map(|request| {
            let label = request.label(capabilities.shared_listing);
            Series {
                label,
                sent: AtomicU64::new(0),
                requests: counter!("efc_origin_requests_total", "kind" => label),
                retries: counter!("efc_origin_retries_total", "kind" => label),
                seconds: histogram!("efc_origin_request_seconds", "kind" => label),
            }
        });
        let zero = || AtomicU64::new(0);
        Counters {
            series,
            errors: zero(),
            retries: zero(),
            received: zero(),
            bytes: counter!("efc_origin_bytes_total"),
            written: zero(),
            sent_bytes: counter!("efc_origin_sent_bytes_total"),
        }
    }

    /// The numbers now.
    pub fn stats(&self) -> OriginStats {
        let mut requests = BTreeMap::new();
        for s in &self.series {
            let sent = s.sent.load(Relaxed);
            if sent > 0 {
                *requests.entry(s.label).or_default() += sent;
            }
        }
        OriginStats {
            requests,
            errors: self.errors.load(Relaxed),
            retries: self.retries.load(Relaxed),
            bytes: self.received.load(Relaxed),
            bytes_sent: self.written.load(Relaxed),
        }
    }

    /// A request is sent again.
    pub(crate) fn retried(&self, request: Request) {
        self.retries.fetch_add(1, Relaxed);
        self.series[request as usize].retries.increment(1);
    }

    fn sent(&self, request: Request) {
        let s = &self.series[request as usize];
        s.sent.fetch_add(1, Relaxed);
        s.requests.increment(1);
    }

    fn answered(&self, request: Request, began: Instant) {
        self.series[request as usize].seconds.record(began.elapsed().as_secs_f64());
    }

    fn failed(&self, request: Request, e: &Error) {
        self.errors.fetch_add(1, Relaxed);
        let label = self.series[request as usize].label;
        counter!("efc_origin_errors_total", "kind" => label, "error" => e.kind().name()).increment(1);
    }

    fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
        self.bytes.increment(bytes);
    }

    /// Content was taken by the origin.
    pub(crate) fn wrote(&self, bytes: u64) {
        self.written.fetch_add(bytes, Relaxed);
        self.sent_bytes.increment(bytes);
    }

    /// Counts one request.
    pub(crate) async fn count<T>(&self, request: Request, call: impl Future<Output = Result<T>>) -> Result<T> {
        let began = Instant::now();
        self.sent(request);
        let answer = call.await;
        self.answered(request, began);
        answer.inspect_err(|e| self.failed(request, e))
    }
}

impl Around for Counters {
    async fn around<T, F, C>(&self, request: Request, mut call: F) -> Result<T>
    where
        T: Send,
        F: FnMut() -> C + Send,
        C: Future<Output = Result<T>> + Send,
    {
        self.count(request, call()).await
    }

    async fn moved(&self, request: Request, bytes: u64) {
        if request == Request::Read {
            self.received(bytes);
        } else {
            self.wrote(bytes);
        }
    }
}

/// The decorator.
pub(crate) struct Count {
    inner: DynBackend,
    counters: Arc<Counters>,
}

impl Count {
    pub(crate) fn new(inner: DynBackend, counters: Arc<Counters>) -> Count {
        Count { inner, counters }
    }
}

#[async_trait]
impl Backend for Count {
    fn source_id(&self) -> SourceId {
        self.inner.source_id()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn root(&self) -> Result<Node> {
        self.counters.count(Request::Other, self.inner.root()).await
    }

    async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node> {
        self.counters.count(Request::Lookup, self.inner.lookup(dir, name)).await
    }

    async fn getattr(&self, locator: &Bytes) -> Result<Node> {
        self.counters.count(Request::Getattr, self.inner.getattr(locator)).await
    }

    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.counters.count(Request::List, self.inner.list(dir, from)).await
    }

    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream> {
        let began = Instant::now();
        self.counters.sent(Request::Read);
        let counters = self.counters.clone();
        let stream = match self.inner.read(locator, version, range).await {
            Ok(stream) => stream,
            Err(e) => {
                counters.answered(Request::Read, began);
                counters.failed(Request::Read, &e);
                return Err(e);
            }
        };
        let mut first = true;
        let counted = stream.inspect(move |piece| {
            if std::mem::take(&mut first) {
                counters.answered(Request::Read, began);
            }
            match piece {
                Ok(bytes) => counters.received(bytes.len() as u64),
                Err(e) => counters.failed(Request::Read, e),
            }
        });
        Ok(counted.boxed())
    }

    async fn readlink(&self, locator: &Bytes) -> Result<Bytes> {
        self.counters.count(Request::Other, self.inner.readlink(locator)).await
    }

    async fn xattrs(&self, locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        self.counters.count(Request::Other, self.inner.xattrs(locator)).await
    }

    async fn statfs(&self) -> Result<FsStats> {
        self.counters.count(Request::Other, self.inner.statfs()).await
    }
}
