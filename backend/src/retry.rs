//! Asks again after passing faults, and resumes streams that broke.
//!
//! Only errors whose verdict is [`Retry::Later`](Verdict::Later) are retried, with exponential backoff and full jitter (as described in
//! the AWS Architecture Blog, "Exponential Backoff And Jitter", 2015), until the source's `deadline` has passed. A stream continues at the
//! byte it reached, in the same version, so a broken connection costs nothing already received; its deadline counts from the last
//! byte that came, not from its beginning. What leaves here has been retried: its verdict is never `Later`.
//! The mount's check ([`Backend::root`]) gets one `timeout` instead of the deadline, because a person waits for its message.

use crate::count::{Counters, Request};
use crate::tree::around::Around;
use crate::{Backend, ByteStream, Capabilities, DynBackend, FsStats, ListPage};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::id::SourceId;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result, Retry as Verdict};
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// Longest pause before the first retry; doubles from there.
const PAUSE_START: Duration = Duration::from_millis(50);
/// Longest pause of all.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// At most one warning per source in this time.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The decorator.
pub(crate) struct Retry {
    inner: DynBackend,
    policy: Arc<Policy>,
    check: Duration,
}

/// How one source is retried; its traits and their streams share it.
pub(crate) struct Policy {
    source: String,
    deadline: Duration,
    counters: Arc<Counters>,
    warned: Mutex<Option<Instant>>,
}

/// A run of failures without success in between.
pub(crate) struct Outage {
    began: Instant,
    end: Instant,
    attempts: u32,
    last: Option<Error>,
}

impl Outage {
    /// One that begins now and is over after `deadline`.
    pub(crate) fn new(deadline: Duration) -> Outage {
        let now = Instant::now();
        Outage { began: now, end: now + deadline, attempts: 0, last: None }
    }

    /// Runs one attempt, cut off when the outage has lasted too long.
    pub(crate) async fn attempt<T>(&mut self, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.attempts += 1;
        match timeout_at(self.end, call).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::new(Kind::Timeout, "no answer before the deadline")),
        }
    }

    /// Takes a failure: waits until it is time for the next attempt, or says that there is none.
    pub(crate) async fn failed(&mut self, policy: &Policy, request: Request, e: Error) -> Result<()> {
        if e.retry() == Verdict::Never {
            return Err(if self.attempts > 1 { self.name(e) } else { e });
        }
        let now = Instant::now();
        if now >= self.end {
            let cause = match self.last.take() {
                // The deadline cut an attempt off: what made us retry says more.
                Some(last) if e.is(Kind::Timeout) => last,
                _ => e,
            };
            let text = format!("{} gave no answer within the deadline", policy.source);
            return Err(self.name(Error::new(Kind::Timeout, text)).caused_by(cause).with_retry(Verdict::Never));
        }
        policy.warn(&e);
        policy.counters.retried(request);
        let most = PAUSE_MAX.min(PAUSE_START * 2u32.pow(self.attempts.saturating_sub(1).min(10)));
        let pause = most.mul_f64(rand::random::<f64>()).min(self.end - now);
        self.last = Some(e);
        sleep(pause).await;
        Ok(())
    }

    fn name(&self, e: Error) -> Error {
        e.with("attempts", self.attempts).with("elapsed", format!("{:.1?}", self.began.elapsed()))
    }
}

impl Policy {
    /// Retries for up to `deadline`; `source` names the origin in messages.
    pub(crate) fn new(source: String, deadline: Duration, counters: Arc<Counters>) -> Policy {
        Policy { source, deadline, counters, warned: Mutex::new(None) }
    }

    /// How long a call may take in all.
    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    async fn again<T, C>(&self, request: Request, mut call: impl FnMut() -> C) -> Result<T>
    where
        C: Future<Output = Result<T>>,
    {
        let mut outage = Outage::new(self.deadline);
        loop {
            match outage.attempt(call()).await {
                Ok(answer) => return Ok(answer),
                Err(e) => outage.failed(self, request, e).await?,
            }
        }
    }

    fn warn(&self, e: &Error) {
        let now = Instant::now();
        {
            let mut warned = self.warned.lock();
            if warned.is_some_and(|at| now - at < WARN_EVERY) {
                return;
            }
            *warned = Some(now);
        }
        tracing::warn!(source = %self.source, error = %e, deadline = ?self.deadline, "origin in trouble, asking again");
    }
}

impl Around for Policy {
    async fn around<T, F, C>(&self, request: Request, call: F) -> Result<T>
    where
        T: Send,
        F: FnMut() -> C + Send,
        C: Future<Output = Result<T>> + Send,
    {
        self.again(request, call).await
    }
}

impl Retry {
    /// Retries calls of `inner`; `check` bounds [`Backend::root`].
    pub(crate) fn new(inner: DynBackend, policy: Arc<Policy>, check: Duration) -> Retry {
        Retry { inner, policy, check }
    }
}

/// A stream that can be opened again where it broke.
struct Resumable {
    inner: DynBackend,
    policy: Arc<Policy>,
    locator: Bytes,
    version: Bytes,
    rest: Range<u64>,
    pieces: Option<ByteStream>,
    outage: Option<Outage>,
}

impl Resumable {
    /// The next piece; `None` when the range is complete.
    async fn next(&mut self) -> Result<Option<Bytes>> {
        while !self.rest.is_empty() {
            let e = match self.pull().await {
                Ok(piece) => {
                    self.rest.start += piece.len() as u64;
                    self.outage = None;
                    return Ok(Some(piece));
                }
                Err(e) => e,
            };
            self.pieces = None;
            let outage = self.outage.get_or_insert_with(|| {
                // The failed piece was the first attempt of this outage.
                let mut outage = Outage::new(self.policy.deadline);
                outage.attempts = 1;
                outage
            });
            outage.failed(&self.policy, Request::Read, e).await?;
        }
        Ok(None)
    }

    /// One piece, from the open stream or from a new one.
    async fn pull(&mut self) -> Result<Bytes> {
        match &mut self.outage {
            None => piece(&self.inner, &mut self.pieces, &self.locator, &self.version, &self.rest).await,
            Some(outage) => {
                let call = piece(&self.inner, &mut self.pieces, &self.locator, &self.version, &self.rest);
                outage.attempt(call).await
            }
        }
    }
}

async fn piece(
    inner: &DynBackend,
    pieces: &mut Option<ByteStream>,
    locator: &Bytes,
    version: &Bytes,
    rest: &Range<u64>,
) -> Result<Bytes> {
    let open = match pieces {
        Some(open) => open,
        None => pieces.insert(inner.read(locator, version, rest.clone()).await?),
    };
    match open.next().await {
        Some(Ok(piece)) if piece.len() as u64 > rest.end - rest.start => {
            Err(Error::new(Kind::Corrupt, "the origin sent more than was asked for"))
        }
        Some(piece) => piece,
        None => Err(Error::new(Kind::Unavailable, format!("the stream ended {} bytes early", rest.end - rest.start))),
    }
}

#[async_trait]
impl Backend for Retry {
    fn source_id(&self) -> SourceId {
        self.inner.source_id()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn root(&self) -> Result<Node> {
        let mut outage = Outage::new(self.check);
        loop {
            match outage.attempt(self.inner.root()).await {
                Ok(node) => return Ok(node),
                Err(e) => outage.failed(&self.policy, Request::Other, e).await?,
            }
        }
    }

    async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node> {
        self.policy.again(Request::Lookup, || self.inner.lookup(dir, name)).await
    }

    async fn getattr(&self, locator: &Bytes) -> Result<Node> {
        self.policy.again(Request::Getattr, || self.inner.getattr(locator)).await
    }

    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.policy.again(Request::List, || self.inner.list(dir, from.clone())).await
    }

    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream> {
        let pieces = self.policy.again(Request::Read, || self.inner.read(locator, version, range.clone())).await?;
        let stream = Resumable {
            inner: self.inner.clone(),
            policy: self.policy.clone(),
            locator: locator.clone(),
            version: version.clone(),
            rest: range,
            pieces: Some(pieces),
            outage: None,
        };
        let resumed = stream::unfold(Some(stream), |stream| async move {
            let mut stream = stream?;
            match stream.next().await {
                Ok(piece) => Some((Ok(piece?), Some(stream))),
                Err(e) => Some((Err(e), None)),
            }
        });
        Ok(resumed.boxed())
    }

    async fn readlink(&self, locator: &Bytes) -> Result<Bytes> {
        self.policy.again(Request::Other, || self.inner.readlink(locator)).await
    }

    async fn xattrs(&self, locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        self.policy.again(Request::Other, || self.inner.xattrs(locator)).await
    }

    async fn statfs(&self) -> Result<FsStats> {
        self.policy.again(Request::Other, || self.inner.statfs()).await
    }
}
