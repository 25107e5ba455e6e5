//! Injected faults, to see that the rooms above survive them: by chance (the source option `fault`), or to order (a [`Script`], in tests).

use crate::count::Request;
use crate::objects::{self, DynObjects};
use crate::tree::DynTree;
use crate::tree::around::{Around, Decorated};
use crate::tree::settle::unsent;
use crate::{Backend, ByteStream, Capabilities, DynBackend, FsStats, ListPage};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::error::Context;
use efc_common::id::SourceId;
use efc_common::node::Node;
use efc_common::units::parse_duration;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Faults by chance. Probabilities are between 0 and 1.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Knobs {
    /// Every call takes this much longer.
    pub latency: Duration,
    /// And up to this much more.
    pub jitter: Duration,
    /// A call fails before it reaches the origin.
    pub error: f64,
    /// A stream ends too early, without an error.
    pub short: f64,
    /// A stream breaks in the middle, or the answer of a call is lost.
    pub reset: f64,
    /// A call that changes something is executed and its answer is lost.
    pub lost: f64,
    /// The first stream finds, half-way, that the file has changed.
    pub stale_once: bool,
    /// Makes the run repeatable.
    pub seed: Option<u64>,
}

impl Knobs {
    /// Parses `latency=5ms,jitter=2ms,error=0.01,short=0.01,reset=0.01,lost=0.01,stale_once,seed=7`; `;` separates as well as `,`.
    ///
    /// # Errors
    /// [`Kind::Invalid`] naming the part.
    pub fn parse(text: &str) -> Result<Knobs> {
        let mut knobs = Knobs::default();
        for part in text.split([',', ';']).map(str::trim).filter(|p| !p.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let chance = || match value.parse::<f64>() {
                Ok(p) if (0.0..=1.0).contains(&p) => Ok(p),
                _ => Err(Error::new(Kind::Invalid, format!("option fault: `{part}` needs a probability from 0 to 1"))),
            };
            match name {
                "latency" => knobs.latency = parse_duration(value).context("option fault")?,
                "jitter" => knobs.jitter = parse_duration(value).context("option fault")?,
                "error" => knobs.error = chance()?,
                "short" => knobs.short = chance()?,
                "reset" => knobs.reset = chance()?,
                "lost" => knobs.lost = chance()?,
                "stale_once" if value.is_empty() => knobs.stale_once = true,
                "seed" => {
                    let seed =
                        value.parse().map_err(|_| Error::new(Kind::Invalid, "option fault: seed is a number"))?;
                    knobs.seed = Some(seed);
                }
                _ => {
                    let known = "latency, jitter, error, short, reset, lost, stale_once, seed";
                    return Err(Error::new(
                        Kind::Invalid,
                        format!("option fault: `{part}` is unknown; there are {known}"),
                    ));
                }
            }
        }
        Ok(knobs)
    }
}

/// How a stream goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The connection breaks: an error that may be retried.
    Break,
    /// It ends without an error, too early.
    End,
    /// Nothing more comes, for ever.
    Stall,
    /// The file turns out to have changed.
    Stale,
}

/// Faults to order: each is used up by one call, in the order given. Clones are the same script.
#[derive(Debug, Clone, Default)]
pub struct Script(Arc<Mutex<Plan>>);

/// What becomes of a call.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// It fails before it reaches the origin.
    Fail(Kind),
    /// It never answers.
    Stall,
    /// It is executed, and its answer is lost.
    Lose,
}

#[derive(Debug, Default)]
struct Plan {
    calls: VecDeque<Option<Order>>,
    reads: VecDeque<(u64, Cut)>,
    lost: usize,
    seen: u64,
    ranges: Vec<Range<u64>>,
}

impl Script {
    /// The next `n` calls, of whatever sort, fail with `kind`.
    pub fn fail_next(&self, n: usize, kind: Kind) {
        self.0.lock().calls.extend(std::iter::repeat_n(Some(Order::Fail(kind)), n));
    }

    /// The next call never answers.
    pub fn stall_next(&self) {
        self.0.lock().calls.push_back(Some(Order::Stall));
    }

    /// The next `n` calls, of whatever sort, are executed and their answers lost.
    pub fn lose_call_next(&self, n: usize) {
        self.0.lock().calls.extend(std::iter::repeat_n(Some(Order::Lose), n));
    }

    /// The next `n` calls come to no harm.
    pub fn pass_next(&self, n: usize) {
        self.0.lock().calls.extend(std::iter::repeat_n(None, n));
    }

    /// The next `n` calls that change something and succeed are told as failed.
    pub fn lose_next(&self, n: usize) {
        self.0.lock().lost += n;
    }

    /// A stream that was opened goes wrong after `bytes`.
    pub fn cut_read(&self, bytes: u64, how: Cut) {
        self.0.lock().reads.push_back((bytes, how));
    }

    /// Calls seen so far, the failed ones included.
    pub fn calls(&self) -> u64 {
        self.0.lock().seen
    }

    /// The ranges of all reads that were let through.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.0.lock().ranges.clone()
    }
}

/// The decorator.
pub struct Fault {
    inner: DynBackend,
    faults: Arc<Faults>,
}

impl Fault {
    /// Faults by chance.
    pub fn new(inner: DynBackend, knobs: Knobs) -> Fault {
        let chance = knobs.seed.map_or_else(StdRng::from_os_rng, StdRng::seed_from_u64);
        let stale = Mutex::new(knobs.stale_once);
        let faults = Faults { knobs, script: Script::default(), chance: Mutex::new(chance), stale };
        Fault { inner, faults: Arc::new(faults) }
    }

    /// Faults to order.
    pub fn scripted(inner: DynBackend) -> (Fault, Script) {
        let fault = Fault::new(inner, Knobs::default());
        let script = fault.faults.script.clone();
        (fault, script)
    }

    /// The tree of the same origin, under the same faults.
    pub fn tree(&self, inner: DynTree) -> DynTree {
        Arc::new(Decorated::new(inner, self.faults.clone()))
    }

    /// The objects of the same origin, under the same faults.
    pub fn objects(&self, inner: DynObjects) -> DynObjects {
        Arc::new(objects::fault::Fault::new(inner, self.faults.clone()))
    }
}

/// The faults of one origin, whichever of its traits is called.
pub(crate) struct Faults {
    knobs: Knobs,
    script: Script,
    chance: Mutex<StdRng>,
    stale: Mutex<bool>,
}

impl Faults {
    fn happens(&self, probability: f64) -> bool {
        probability > 0.0 && self.chance.lock().random_bool(probability)
    }

    /// What happens before the origin is asked. True if the answer is to be lost.
    async fn before(&self) -> Result<bool> {
        let ordered = {
            let mut plan = self.script.0.lock();
            plan.seen += 1;
            plan.calls.pop_front().flatten()
        };
        match ordered {
            None => {}
            Some(Order::Lose) => return Ok(true),
            Some(Order::Stall) => std::future::pending().await,
            Some(Order::Fail(kind)) => return Err(unsent(Error::new(kind, "injected failure"))),
        }
        let wait = self.knobs.latency + self.knobs.jitter.mul_f64(self.chance.lock().random());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        if self.happens(self.knobs.error) {
            return Err(unsent(Error::new(Kind::Unavailable, "injected failure")));
        }
        Ok(false)
    }

    /// Runs a call that may fail before it is made, or succeed without anybody hearing of it.
    pub(crate) async fn disturb<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let lose = self.before().await?;
        let answer = call.await?;
        if lose || self.happens(self.knobs.reset) {
            return Err(Error::new(Kind::Unavailable, "injected loss of an answer"));
        }
        Ok(answer)
    }

    /// Is the good answer of this change to be lost?
    fn loses_change(&self) -> bool {
        {
            let mut plan = self.script.0.lock();
            if plan.lost > 0 {
                plan.lost -= 1;
                return true;
            }
        }
        self.happens(self.knobs.lost)
    }

    /// Where and how the next stream goes wrong, if it does.
    fn cut(&self, len: u64) -> Option<(u64, Cut)> {
        if let Some(ordered) = self.script.0.lock().reads.pop_front() {
            return Some(ordered);
        }
        if std::mem::take(&mut *self.stale.lock()) {
            return Some((len / 2, Cut::Stale));
        }
        let how = if self.happens(self.knobs.reset) {
            Cut::Break
        } else if self.happens(self.knobs.short) {
            Cut::End
        } else {
            return None;
        };
        Some((self.chance.lock().random_range(0..len.max(1)), how))
    }
}

impl Faults {
    /// As [`Faults::disturb`], for a call that changes the origin.
    pub(crate) async fn disturb_change<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let answer = self.disturb(call).await?;
        if self.loses_change() {
            return Err(Error::new(Kind::Unavailable, "injected loss of an answer"));
        }
        Ok(answer)
    }
}

impl Around for Faults {
    async fn around<T, F, C>(&self, request: Request, mut call: F) -> Result<T>
    where
        T: Send,
        F: FnMut() -> C + Send,
        C: Future<Output = Result<T>> + Send,
    {
        if request.changes() { self.disturb_change(call()).await } else { self.disturb(call()).await }
    }
}

/// `pieces` up to `left` bytes, and then what `how` says. A stream that is complete before stays as it is.
fn cut_stream(pieces: ByteStream, left: u64, how: Cut) -> ByteStream {
    let cut = stream::unfold(Some((pieces, left)), move |state| async move {
        let (mut pieces, left) = state?;
        if left == 0 {
            return match how {
                Cut::End => None,
                Cut::Stall => std::future::pending().await,
                Cut::Break => Some((Err(Error::new(Kind::Unavailable, "injected break of the stream")), None)),
                Cut::Stale => Some((Err(Error::new(Kind::Stale, "injected change of the file")), None)),
            };
        }
        match pieces.next().await? {
            Ok(mut piece) => {
                piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                let left = left - piece.len() as u64;
                Some((Ok(piece), Some((pieces, left))))
            }
            Err(e) => Some((Err(e), None)),
        }
    });
    cut.boxed()
}

#[async_trait]
impl Backend for Fault {
    fn source_id(&self) -> SourceId {
        self.inner.source_id()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn root(&self) -> Result<Node> {
        self.faults.disturb(self.inner.root()).await
    }

    async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node> {
        self.faults.disturb(self.inner.lookup(dir, name)).await
    }

    async fn getattr(&self, locator: &Bytes) -> Result<Node> {
        self.faults.disturb(self.inner.getattr(locator)).await
    }

    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.faults.disturb(self.inner.list(dir, from)).await
    }

    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream> {
        if self.faults.before().await? {
            return Err(Error::new(Kind::Unavailable, "injected loss of an answer"));
        }
        self.faults.script.0.lock().ranges.push(range.clone());
        let pieces = self.inner.read(locator, version, range.clone()).await?;
        Ok(match self.faults.cut(range.end.saturating_sub(range.start)) {
            Some((after, how)) => cut_stream(pieces, after, how),
            None => pieces,
        })
    }

    async fn readlink(&self, locator: &Bytes) -> Result<Bytes> {
        self.faults.disturb(self.inner.readlink(locator)).await
    }

    async fn xattrs(&self, locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        self.faults.disturb(self.inner.xattrs(locator)).await
    }

    async fn statfs(&self) -> Result<FsStats> {
        self.faults.disturb(self.inner.statfs()).await
    }
}
