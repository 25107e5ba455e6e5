//! Where metadata and bytes come from: the pool of workers first, the origin itself when no worker can answer.
//!
//! The ladder of a read: ring owner, second owner (both inside [`Peers`]), origin. An error ends it only when it is an answer about the
//! content (the version is gone); everything else is a reason to take the next step.

use super::capacity::Capacity;
use crate::namespace::listing::Listing;
use crate::namespace::{Belief, Inode, Seen};
use bytes::Bytes;
use efc_backend::{DynBackend, FsStats, ListPage};
use efc_client::peers::{FileRef, Peers, ReadFlags, ReadStream, Tier};
use efc_common::id::{ContentId, SourceId};
use efc_common::metrics::{Counter, counter};
use efc_common::node::{Entry, Node};
use efc_common::{Error, Kind, Result};
use futures::stream::{self, BoxStream, StreamExt};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tracing::{info, warn};

/// Largest directory this process lists by itself, entries.
const ENTRIES_MAX: usize = 2_000_000;
/// Hidden names of one listing that are logged; the rest is only counted.
const HIDDEN_LOGGED_MAX: usize = 10;

/// A version of a file, ready to be asked for.
#[derive(Debug, Clone)]
pub struct File {
    /// Its identity in the cache.
    pub content: ContentId,
    /// How backend and workers find it.
    pub reference: FileRef,
    /// Length of this version, bytes.
    pub size: u64,
}

/// The metrics of one tier.
struct TierCounters {
    hits: Counter,
    bytes: Counter,
}

impl TierCounters {
    fn new(tier: &'static str) -> Self {
        TierCounters {
            hits: counter!("efc_read_hits_total", "tier" => tier),
            bytes: counter!("efc_read_bytes_total", "tier" => tier),
        }
    }

    fn count(&self, bytes: usize) {
        self.hits.increment(1);
        self.bytes.increment(bytes as u64);
    }
}

/// Names and bytes of one mounted source.
pub struct DataSource {
    backend: DynBackend,
    peers: Option<Peers>,
    workers_only: bool,
    client: TierCounters,
    local: TierCounters,
    remote: TierCounters,
    origin: TierCounters,
    /// Reads go past the workers at the moment: said once, not once a read.
    degraded: AtomicBool,
    capacity: Capacity,
}

impl DataSource {
    /// A source read through `peers` if there are any; with `workers_only` never past them.
    pub fn new(backend: DynBackend, peers: Option<Peers>, workers_only: bool) -> Self {
        DataSource {
            capacity: Capacity::of(backend.clone()),
            backend,
            peers,
            workers_only,
            client: TierCounters::new("client"),
            local: TierCounters::new("local_worker"),
            remote: TierCounters::new("remote_worker"),
            origin: TierCounters::new("origin"),
            degraded: AtomicBool::new(false),
        }
    }

    /// The workers, if the mount has any.
    pub fn peers(&self) -> Option<&Peers> {
        self.peers.as_ref()
    }

    /// Do listings carry all attributes, so that workers share them?
    pub fn shared_listing(&self) -> bool {
        self.backend.capabilities().shared_listing
    }

    /// Has the origin extended attributes?
    pub fn has_xattrs(&self) -> bool {
        self.backend.capabilities().xattr
    }

    /// The version that a file's node names at the moment.
    pub fn file(&self, inode: &Inode) -> File {
        let now = inode.now();
        let size = now.attr.size;
        File {
            content: now.id(self.backend.source_id()),
            reference: FileRef { locator: now.locator.clone(), version: now.version.clone(), size },
            size,
        }
    }

    /// Bytes that were read ahead were used.
    pub fn count_client_hit(&self, pieces: &[Bytes]) {
        self.client.count(pieces.iter().map(Bytes::len).sum());
    }

    /// The bytes of `range` if a worker on this host has them in its memory and they were read before, without waiting.
    pub fn read_here(&self, file: &File, range: &Range<u64>) -> Option<Vec<Bytes>> {
        let pieces = self.peers.as_ref()?.read_here(file.content, range)?;
        self.local.count(pieces.iter().map(Bytes::len).sum());
        Some(pieces)
    }

    /// The bytes of `range`, which lies within one block and inside the file, in order and exactly.
    pub fn fetch(self: &Arc<Self>, file: &File, range: Range<u64>) -> BoxStream<'static, Result<Bytes>> {
        let first = match &self.peers {
            Some(peers) => Step::Workers(peers.clone()),
            None => Step::Origin,
        };
        let fetch = Fetch { source: self.clone(), file: file.clone(), at: range.start, end: range.end, step: first };
        stream::try_unfold(fetch, Fetch::next).boxed()
    }

    fn workers_answer(&self) {
        if self.degraded.load(Relaxed) && self.degraded.swap(false, Relaxed) {
            info!("workers answer again");
        }
    }

    /// Are locators paths?
    pub fn path_locators(&self) -> bool {
        self.backend.capabilities().path_locators
    }

    /// The store's identity.
    pub fn id(&self) -> SourceId {
        self.backend.source_id()
    }

    /// A directory, believed for as long from the moment the origin was asked as `belief` says, but which must not be longer ago than `max_age`.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] for a directory too large to hold; else what workers and origin said.
    pub async fn list(
        &self,
        dir: &Bytes,
        belief: Belief,
        max_age: Duration,
        known: Option<&Listing>,
    ) -> Result<Listing> {
        let seen = belief.seen();
        if let Some(peers) = self.peers.as_ref().filter(|_| self.shared_listing()) {
            match peers.list(dir, max_age, known.map_or(0, |k| k.version)).await {
                Ok(answer) => {
                    let asked = seen.asked.checked_sub(answer.age).unwrap_or(seen.asked);
                    let seen = Seen { asked, fresh_until: asked + belief.ttl, ..seen };
                    report_hidden(&answer.hidden);
                    return Ok(match known {
                        Some(known) if answer.unchanged => known.renewed(seen),
                        _ => Listing::new(answer.entries, answer.version, seen),
                    });
                }
                Err(e)
                    if self.workers_only
                        || matches!(e.kind(), Kind::NotFound | Kind::NotADirectory | Kind::Exhausted) =>
                {
                    return Err(e);
                }
                Err(e) => info!(error = %e, "listing goes past the workers to the origin"),
            }
        }
        let seen = belief.seen();
        Ok(Listing::new(self.list_origin(dir).await?, 0, seen))
    }

    async fn list_origin(&self, dir: &Bytes) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut from = None;
        loop {
            let ListPage { entries: page, next, hidden } = self.backend.list(dir, from).await?;
            entries.extend(page);
            report_hidden(&hidden);
            if entries.len() > ENTRIES_MAX {
                return Err(
                    Error::new(Kind::Exhausted, "directory has too many entries to list").with("max", ENTRIES_MAX)
                );
            }
            match next {
                Some(n) => from = Some(n),
                None => return Ok(entries),
            }
        }
    }

    /// One name, asked of the origin.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none; else what the origin said.
    pub async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node> {
        self.backend.lookup(dir, name).await
    }

    /// Fresh attributes from the origin.
    ///
    /// # Errors
    /// What the origin said.
    pub async fn getattr(&self, locator: &Bytes) -> Result<Node> {
        self.backend.getattr(locator).await
    }

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// What the origin said.
    pub async fn readlink(&self, locator: &Bytes) -> Result<Bytes> {
        self.backend.readlink(locator).await
    }

    /// Extended attributes.
    ///
    /// # Errors
    /// What the origin said.
    pub async fn xattrs(&self, locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        self.backend.xattrs(locator).await
    }

    /// Space of the origin, of a moment ago; an object store, which has no capacity, is shown as 1 PiB free.
    ///
    /// # Errors
    /// What the origin said.
    pub async fn statfs(&self) -> Result<FsStats> {
        self.capacity.get().await
    }
}

fn report_hidden(hidden: &[(Bytes, impl AsRef<str>)]) {
    for (i, (name, reason)) in hidden.iter().enumerate() {
        counter!("efc_fuse_hidden_names_total", "reason" => reason.as_ref().to_string()).increment(1);
        if i < HIDDEN_LOGGED_MAX {
            warn!(name = %name.escape_ascii(), reason = reason.as_ref(), "a name of the origin cannot be shown");
        }
    }
}

/// Which step of the ladder a fetch is on.
enum Step {
    Workers(Peers),
    WorkersStream(Box<ReadStream>),
    Origin,
    OriginStream(efc_backend::ByteStream),
}

struct Fetch {
    source: Arc<DataSource>,
    file: File,
    at: u64,
    end: u64,
    step: Step,
}

impl Fetch {
    /// The next piece, or `None` after the last.
    async fn next(mut self) -> Result<Option<(Bytes, Fetch)>> {
        while self.at < self.end {
            match &mut self.step {
                Step::Workers(peers) => {
                    let chunks = peers.read(&self.file.reference, self.at..self.end, ReadFlags::default())?;
                    self.step = Step::WorkersStream(Box::new(chunks));
                }
                Step::WorkersStream(chunks) => match chunks.next().await {
                    Ok(Some(chunk)) => {
                        let counters = match (chunk.tier, chunk.local) {
                            (Tier::Origin, _) => &self.source.origin,
                            (_, true) => &self.source.local,
                            (_, false) => &self.source.remote,
                        };
                        counters.count(chunk.bytes.len());
                        self.source.workers_answer();
                        self.at += chunk.bytes.len() as u64;
                        return Ok(Some((chunk.bytes, self)));
                    }
                    Err(e) => self.descend(e)?,
                    Ok(None) => self.descend(Error::new(Kind::Unavailable, "workers ended early"))?,
                },
                Step::Origin => {
                    let r = &self.file.reference;
                    let bytes = self.source.backend.read(&r.locator, &r.version, self.at..self.end).await;
                    self.step = Step::OriginStream(bytes.map_err(gone_is_stale)?);
                }
                Step::OriginStream(bytes) => match bytes.next().await {
                    Some(piece) => {
                        let piece = piece.map_err(gone_is_stale)?;
                        self.source.origin.count(piece.len());
                        self.at += piece.len() as u64;
                        return Ok(Some((piece, self)));
                    }
                    None => return Err(Error::new(Kind::Io, "origin gave fewer bytes than asked for")),
                },
            }
        }
        Ok(None)
    }

    /// From the workers down to the origin, unless the workers' answer is about the content itself.
    fn descend(&mut self, e: Error) -> Result<()> {
        let e = gone_is_stale(e);
        if e.is(Kind::Stale) || self.source.workers_only {
            return Err(e);
        }
        if !self.source.degraded.swap(true, Relaxed) {
            warn!(error = %e, "reads go past the workers to the origin");
        }
        self.step = Step::Origin;
        Ok(())
    }
}

/// A version that was listed and is not there any more is a stale version.
fn gone_is_stale(e: Error) -> Error {
    if e.is(Kind::NotFound) { Error::new(Kind::Stale, "file is gone from the origin").caused_by(e) } else { e }
}
