//! The workers of a cluster as one cache: who owns what, failover between owners, and the proof that bytes are the origin's.
//!
//! One [`Peers`] serves one source. The mount process and the admin command call it; below it are [`crate::wire`] connections,
//! pooled per worker. What must stay true:
//! - Bytes handed out were verified against the checksums made when they left the origin. A mismatch is counted and the next owner
//!   asked.
//! - A dead worker costs one timeout, not one per read: its circuit opens, a background probe closes it again.
//! - A slow origin is not a dead worker: silence is answered by a probe on the same connection, and only a worker that does not
//!   answer that is left. So one slow fetch is never made twice.
//! - When no worker can answer, the error is [`Kind::Unavailable`] and the caller asks the origin itself. What the origin said
//!   (stale, not found, no permission ...) passes through as it is.

mod many;
mod places;
mod pool;
mod read;

pub use many::{ManyStream, ReadItem};
pub use read::ReadStream;

use crate::ring::RingWatch;
use crate::wire::{Answers, Connection, Identity, unexpected};
use bytes::{Bytes, BytesMut};
use efc_common::block::block_of;
use efc_common::checksum::crc32c;
use efc_common::error::Context as _;
use efc_common::id::{ContentId, SourceId, WorkerId};
use efc_common::metrics::counter;
use efc_common::node::Entry;
use efc_common::policy::CachePolicy;
use efc_common::ring::RingKey;
use efc_common::source::{SourceSpec, StaticKeys};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use efc_proto::convert::entry_from_wire;
use efc_proto::data;
use efc_proto::frame::{Frame, Message};
use efc_proto::status::from_fail;
use futures::future::join_all;
use places::Places;
use pool::{Pool, Remote};
use prost::Message as _;
use std::ops::Range;
use std::sync::{Arc, Once};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Owners of one key that are asked before the origin is.
const OWNERS: usize = 2;
/// Bytes of a directory listing a worker may send.
const LISTING_BYTES_MAX: usize = 1 << 30;

/// One version of one file: enough to ask a worker or the origin for its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRef {
    /// How the backend finds it.
    pub locator: Bytes,
    /// Which content.
    pub version: Bytes,
    /// Its size, bytes.
    pub size: u64,
}

/// Timing and pool size.
#[derive(Debug, Clone)]
pub struct PeersOptions {
    /// A call with all its failovers ends after this.
    pub deadline: Duration,
    /// A worker silent for so long is asked whether it is alive, and given as long again before the next owner is asked.
    pub hedge_after: Duration,
    /// Connecting and greeting takes at most this.
    pub connect: Duration,
    /// Connections kept to one worker.
    pub connections_per_worker: usize,
    /// Name of this host: workers on it are reached by their unix socket.
    pub host: String,
    /// Segments in the memory of workers on this host whose place is remembered; about 350 bytes each.
    pub places: u64,
    /// How workers shall keep what is read through here.
    pub cache: CachePolicy,
}

impl Default for PeersOptions {
    fn default() -> Self {
        PeersOptions {
            deadline: Duration::from_secs(60),
            hedge_after: Duration::from_secs(2),
            connect: Duration::from_secs(1),
            connections_per_worker: 2,
            host: host_name(),
            places: 16_384,
            cache: CachePolicy::default(),
        }
    }
}

/// Name of this host, as workers and clients compare it to find that they are neighbours. Empty if the system does not say.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|s| s.trim().to_string()).unwrap_or_default()
}

/// How to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReadFlags {
    /// [`Kind::NotFound`] rather than a fetch from the origin.
    pub cached_only: bool,
}

/// Which tier of the worker answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Its memory.
    Memory,
    /// Its disk.
    Disk,
    /// The origin, asked by the worker.
    Origin,
}

/// A run of verified bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// File offset of the first byte.
    pub offset: u64,
    /// The bytes.
    pub bytes: Bytes,
    /// Where they came from.
    pub tier: Tier,
    /// The worker is on this host.
    pub local: bool,
}

/// A directory as a worker has it.
#[derive(Debug, Clone, Default)]
pub struct SharedListing {
    /// Changes when an entry changes.
    pub version: u64,
    /// Since the origin was asked.
    pub age: Duration,
    /// It is the version the caller has already; no entries are sent.
    pub unchanged: bool,
    /// The origin was asked for this answer.
    pub from_origin: bool,
    /// All entries, in the origin's order.
    pub entries: Vec<Entry>,
    /// Names at the origin that cannot be shown, with the reason.
    pub hidden: Vec<(Bytes, String)>,
}

/// The workers, as a cache of one source.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    ring: Arc<RingWatch>,
    source: SourceId,
    options: PeersOptions,
    pool: Pool,
    places: Arc<Places>,
    /// Starts the task that tells workers what was read in their memory.
    tell: Once,
    tasks: TaskGroup,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

impl Peers {
    /// The cache of `source`, over the workers of `ring`. `keys` are sent to workers with secrets `keys` and `env`. Connects when
    /// it is first used.
    pub fn new(
        ring: Arc<RingWatch>,
        source: SourceSpec,
        keys: Option<StaticKeys>,
        me: Identity,
        options: PeersOptions,
    ) -> Self {
        let tasks = TaskGroup::new();
        let id = source.id();
        let pool = Pool::new(source, keys, me, options.clone(), tasks.clone());
        let places = Arc::new(Places::new(options.places));
        Peers { inner: Arc::new(Inner { ring, source: id, options, pool, places, tell: Once::new(), tasks }) }
    }

    /// From now on the workers ask the origin with these credentials and at these rates: `source` is the same but for its secret and
    /// [`efc_common::source::RATES`]. Requests under way end with those of before.
    pub fn replace_source(&self, source: SourceSpec, keys: Option<StaticKeys>) {
        self.inner.pool.replace_source(source, keys);
    }

    /// The bytes of `range` of `content` if they are in the memory of a worker on this host and were read before: no message, no
    /// waiting but for the copy. Verified like all others.
    pub fn read_here(&self, content: ContentId, range: &Range<u64>) -> Option<Vec<Bytes>> {
        self.inner.places.read(content, range)
    }

    /// Is there a worker in the ring at all?
    pub fn any(&self) -> bool {
        !self.inner.ring.current().is_empty()
    }

    /// Reads `range`, which lies within one 4 MiB block and within the file. The stream gives bytes as they arrive, in order;
    /// nothing is asked before it is polled.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a range over a block boundary or the end of the file.
    pub fn read(&self, file: &FileRef, range: Range<u64>, flags: ReadFlags) -> Result<ReadStream> {
        check_range(file, &range)?;
        Ok(ReadStream::new(self.inner.clone(), file.clone(), range, flags))
    }

    /// Reads many small ranges, each within one block, in one round trip per owner. Results come in any order.
    pub fn read_many(&self, items: Vec<ReadItem>, flags: ReadFlags) -> ManyStream {
        ManyStream::new(self.inner.clone(), items, flags)
    }

    /// Fills the cache with `range`, which lies within one block; no bytes come here. Returns how many came from the origin.
    ///
    /// # Errors
    /// As a read.
    pub async fn fill(&self, file: &FileRef, range: Range<u64>) -> Result<u64> {
        check_range(file, &range)?;
        let message = data::Read { fill_only: true, ..wire_read(file, &range, ReadFlags::default()) };
        let key = self.inner.block_key(file, range.start);
        let frames = self.inner.ask_owners(key, &message.into(), 0).await?;
        match frames.into_iter().next().map(|f| f.message) {
            Some(Message::Data(d)) => Ok(d.filled as u64),
            m => Err(unexpected(&m)),
        }
    }

    /// The listing of directory `dir`, no older than `max_age`. `known`: version the caller has (0: none).
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when no worker can answer; else what the origin says.
    pub async fn list(&self, dir: &Bytes, max_age: Duration, known: u64) -> Result<SharedListing> {
        let key = RingKey::directory(self.inner.source, dir);
        let max_age_ms = u64::try_from(max_age.as_millis()).unwrap_or(u64::MAX);
        let message = data::List { slot: pool::SLOT, dir: dir.clone(), max_age_ms, known };
        let frames = self.inner.ask_owners(key, &message.into(), LISTING_BYTES_MAX).await?;
        let mut listing = SharedListing::default();
        for frame in frames {
            add_listing(&mut listing, frame).map_err(|e| no_worker(Some(e)))?;
        }
        Ok(listing)
    }

    /// Looks at, evicts, pins or unpins the cached segments of one file version, at every worker.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when a worker of the ring does not answer: then the answer would not be whole.
    pub async fn manage(&self, file: &FileRef, action: data::manage::Action) -> Result<data::Managed> {
        let message = data::Manage {
            action: action.into(),
            slot: pool::SLOT,
            locator: file.locator.clone(),
            version: file.version.clone(),
            size: file.size,
        };
        let mut sum = data::Managed::default();
        for (_, answer) in self.ask_all(&message.into()).await {
            match answer? {
                Message::Managed(m) => {
                    sum.segments += m.segments;
                    sum.bytes += m.bytes;
                    sum.pinned_bytes += m.pinned_bytes;
                }
                m => return Err(unexpected(&Some(m))),
            }
        }
        Ok(sum)
    }

    /// The counters of every worker.
    pub async fn cache_stat(&self) -> Vec<(WorkerId, Result<data::CacheStats>)> {
        self.stats_of(data::CacheStat {}.into()).await
    }

    /// Drops at every worker all that is not pinned, and returns the counters after it.
    pub async fn evict_all(&self) -> Vec<(WorkerId, Result<data::CacheStats>)> {
        self.stats_of(data::EvictAll {}.into()).await
    }

    /// Gives the tiers of all workers other sizes, bytes (0: as they are). Taken by workers of this host and user only.
    ///
    /// # Errors
    /// What a worker said against it, or that it does not answer.
    pub async fn resize(&self, memory_bytes: u64, disk_bytes: u64) -> Result<()> {
        let answers = self.stats_of(data::Resize { memory_bytes, disk_bytes }.into()).await;
        answers.into_iter().try_for_each(|(id, said)| said.map(|_| ()).context(format!("worker {}", id.0)))
    }

    async fn stats_of(&self, message: Message) -> Vec<(WorkerId, Result<data::CacheStats>)> {
        let answers = self.ask_all(&message).await;
        let stats = |m: Message| if let Message::CacheStats(s) = m { Ok(s) } else { Err(unexpected(&Some(m))) };
        answers.into_iter().map(|(id, r)| (id, r.and_then(stats))).collect()
    }

    async fn ask_all(&self, message: &Message) -> Vec<(WorkerId, Result<Message>)> {
        let ring = self.inner.ring.current();
        let asks = ring.members().iter().map(|member| {
            let (inner, id) = (self.inner.clone(), member.id.clone());
            let (remote, message) = (inner.pool.remote(&ring, member), message.clone());
            async move {
                let answer = match remote.closed_circuit() {
                    Err(e) => Err(e),
                    Ok(()) => inner.ask_one(&remote, &message, 0).await,
                };
                let first = answer.map(|frames| frames.into_iter().next().map(|f| f.message));
                (id, first.and_then(|m| m.ok_or_else(|| unexpected(&None))))
            }
        });
        join_all(asks).await
    }
}

impl Inner {
    /// Remembers where a worker on this host has segments of a file.
    fn remember(&self, file: &FileRef, offset: u64, places: &[data::Place], conn: &Arc<Connection>) {
        self.tell.call_once(|| self.tasks.spawn(self.places.clone().tell()));
        let content = ContentId::new(self.source, &file.locator, &file.version);
        self.places.remember(content, offset, places, conn);
    }

    fn block_key(&self, file: &FileRef, offset: u64) -> RingKey {
        RingKey::block(ContentId::new(self.source, &file.locator, &file.version), offset)
    }

    /// The owners of `key` whose circuit is closed, best first.
    fn owners(&self, key: RingKey) -> Vec<Arc<Remote>> {
        let ring = self.ring.current();
        let owners = ring.owners(key, OWNERS).into_iter();
        owners.map(|m| self.pool.remote(&ring, m)).filter(|r| r.closed_circuit().is_ok()).collect()
    }

    /// Asks the owners of `key` in turn until one answers; all frames of the answer.
    async fn ask_owners(&self, key: RingKey, message: &Message, bulk_max: usize) -> Result<Vec<Frame>> {
        let mut last = None;
        for remote in self.owners(key) {
            match self.ask_one(&remote, message, bulk_max).await {
                Err(e) if next_owner_may_help(&e) => {
                    count_error(&e);
                    last = Some(e);
                }
                other => return other,
            }
        }
        Err(no_worker(last))
    }

    /// Asks one worker, once more on a new connection if the pooled one was stale; all frames of the answer.
    async fn ask_one(&self, remote: &Arc<Remote>, message: &Message, bulk_max: usize) -> Result<Vec<Frame>> {
        let deadline = Instant::now() + self.options.deadline;
        let mut fresh = false;
        loop {
            let (conn, mut answers) = self.send(remote, message, deadline, bulk_max, &mut fresh).await?;
            match self.all_frames(&conn, &mut answers).await {
                Err(e) if conn.broken().is_some() && !fresh => {
                    tracing::debug!(error = %e, "pooled connection was stale; asking again on a new one");
                    fresh = true;
                }
                Err(e) if conn.broken().is_some() => {
                    remote.trip(&e);
                    return Err(e);
                }
                other => return other,
            }
        }
    }

    async fn all_frames(&self, conn: &Arc<Connection>, answers: &mut Answers) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        loop {
            let frame = self.next_frame(conn, answers).await?;
            let last = match &frame.message {
                Message::Fail(f) => return Err(from_fail(f)),
                Message::Listing(l) => l.last,
                Message::Data(d) => d.last,
                _ => true,
            };
            frames.push(frame);
            if last {
                return Ok(frames);
            }
        }
    }

    /// Sends on a pooled connection, or with `fresh` on a new one. `fresh` tells afterwards which it was. A worker that cannot be
    /// reached trips its circuit.
    async fn send(
        &self,
        remote: &Arc<Remote>,
        message: &Message,
        deadline: Instant,
        bulk_max: usize,
        fresh: &mut bool,
    ) -> Result<(Arc<Connection>, Answers)> {
        loop {
            let (conn, new) = remote.connection(*fresh).await?;
            let left = deadline.saturating_duration_since(Instant::now());
            let was_fresh = std::mem::replace(fresh, new);
            match conn.ask(message.clone(), left, bulk_max).await {
                Ok(answers) => return Ok((conn, answers)),
                // Found broken before anything was sent: a new one, once.
                Err(_) if conn.broken().is_some() && !was_fresh && !new => *fresh = true,
                Err(e) => {
                    if conn.broken().is_some() {
                        remote.trip(&e);
                    }
                    return Err(e);
                }
            }
        }
    }

    /// The next answer. Silence beyond `hedge_after` is answered by a probe; a worker that does not answer that either loses the
    /// connection, and with it the request.
    async fn next_frame(&self, conn: &Arc<Connection>, answers: &mut Answers) -> Result<Frame> {
        let patience = self.options.hedge_after;
        loop {
            match timeout(patience, answers.next()).await {
                Ok(frame) => return frame,
                Err(_) if conn.silent_for() < patience => {}
                Err(_) => {
                    if let Err(e) = conn.ping(self.pool.identity(), patience).await {
                        let e = Error::new(Kind::Unavailable, "worker is silent")
                            .with("worker", conn.worker())
                            .caused_by(e);
                        conn.close(e.share());
                        return Err(e);
                    }
                }
            }
        }
    }
}

/// Is the failure the worker's, so that another one may do better? What the origin says would be the same there.
fn next_owner_may_help(e: &Error) -> bool {
    matches!(e.kind(), Kind::Unavailable | Kind::Exhausted | Kind::Cancelled | Kind::Corrupt | Kind::Unsupported)
}

fn no_worker(last: Option<Error>) -> Error {
    let e = Error::new(Kind::Unavailable, "no cache worker can answer");
    match last {
        Some(below) => e.caused_by(below),
        None => e,
    }
}

fn count_error(e: &Error) {
    counter!("efc_peer_errors_total", "kind" => e.kind().name()).increment(1);
}

fn check_range(file: &FileRef, range: &Range<u64>) -> Result<()> {
    let inside = range.start < range.end && range.end <= file.size && block_of(range.start) == block_of(range.end - 1);
    if inside {
        return Ok(());
    }
    Err(Error::new(Kind::Invalid, "a read lies within one 4 MiB block and within the file")
        .with("range", format!("{}..{}", range.start, range.end))
        .with("size", file.size))
}

fn wire_read(file: &FileRef, range: &Range<u64>, flags: ReadFlags) -> data::Read {
    data::Read {
        slot: pool::SLOT,
        locator: file.locator.clone(),
        version: file.version.clone(),
        size: file.size,
        offset: range.start,
        length: (range.end - range.start) as u32,
        fill_only: false,
        cached_only: flags.cached_only,
        by_place: false,
    }
}

/// Bytes that the answers to a read of `range` may carry.
fn answer_bytes(file: &FileRef, range: &Range<u64>) -> usize {
    let wide = efc_common::block::widen(range.clone(), file.size);
    (wide.end - wide.start) as usize
}

/// Adds a frame to a listing.
fn add_listing(listing: &mut SharedListing, frame: Frame) -> Result<()> {
    let head = match frame.message {
        Message::Listing(l) => l,
        m => return Err(unexpected(&Some(m))),
    };
    if crc32c(&frame.bulk) != head.bulk_sum {
        return Err(Error::new(Kind::Corrupt, "listing does not match its checksum"));
    }
    listing.version = head.version;
    listing.age = Duration::from_millis(head.age_ms);
    listing.unchanged = head.unchanged;
    listing.from_origin = head.origin;
    let part =
        data::Entries::decode(frame.bulk).map_err(|e| Error::new(Kind::Corrupt, "malformed listing").caused_by(e))?;
    listing.entries.reserve(part.entries.len());
    for e in part.entries {
        listing.entries.push(entry_from_wire(e)?);
    }
    listing.hidden.extend(part.hidden.into_iter().map(|h| (h.name, h.reason)));
    Ok(())
}

/// Joins chunks that follow each other; one chunk is not copied.
pub fn concat(chunks: &[Chunk]) -> Bytes {
    if let [one] = chunks {
        return one.bytes.clone();
    }
    let mut out = BytesMut::with_capacity(chunks.iter().map(|c| c.bytes.len()).sum());
    chunks.iter().for_each(|c| out.extend_from_slice(&c.bytes));
    out.freeze()
}
