//! What a worker does for a request: reads, directories and cache administration. Called by [`crate::conn`] with a checked frame;
//! decides between tier and origin, and makes the answer's frames.
//!
//! Copies of a byte on its way through: memory hit none in user space (`sendfile`), and not even that for a client on this host
//! that shares our memory: it is told the place; disk hit one, to verify it; miss none but the backend's own and the store's write.

use crate::conn::Replier;
use crate::fetch::Fetcher;
use crate::flight::{FileVersion, Filled, Piece};
use crate::listing::Listings;
use crate::socket::Part;
use crate::source::{Source, Sources};
use crate::store::{InsertOptions, Segment, Store, Tier};
use bytes::Bytes;
use efc_common::block::{FILE_BYTES_MAX, GRANULE_BYTES, SEGMENT_BYTES, block_of, segment_range, segments, widen};
use efc_common::limit::{ByteBudget, Hold};
use efc_common::metrics::{Counter, counter};
use efc_common::node::{LOCATOR_BYTES_MAX, VERSION_BYTES_MAX};
use efc_common::{Error, Kind, Result};
use efc_proto::data;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

/// Bytes of one answer frame: a reader gets the first megabyte of a block before the last one is there.
const FRAME_BYTES: usize = 1 << 20;
/// Blocking reads of tiers at once.
const TIER_READS_MAX: usize = 32;

/// Bytes sent, by where they came from.
pub(crate) struct Served {
    exported: [Counter; 3],
    bytes: [AtomicU64; 3],
    frames: AtomicU64,
}

impl Served {
    fn new() -> Self {
        let of = |tier: &'static str| counter!("efc_cache_served_bytes_total", "tier" => tier);
        Served {
            exported: [of("memory"), of("disk"), of("origin")],
            bytes: Default::default(),
            frames: AtomicU64::new(0),
        }
    }

    fn add(&self, tier: data::Tier, bytes: usize) {
        let i = match tier {
            data::Tier::Disk => 1,
            data::Tier::Origin => 2,
            data::Tier::Memory | data::Tier::Unknown => 0,
        };
        self.exported[i].increment(bytes as u64);
        self.bytes[i].fetch_add(bytes as u64, Relaxed);
        self.frames.fetch_add(1, Relaxed);
    }

    /// Frames sent.
    pub(crate) fn frames(&self) -> u64 {
        self.frames.load(Relaxed)
    }

    /// Memory, disk, origin.
    pub(crate) fn bytes(&self) -> [u64; 3] {
        [0, 1, 2].map(|i| self.bytes[i].load(Relaxed))
    }
}

/// What all connections share.
pub(crate) struct Service {
    pub(crate) store: Arc<Store>,
    pub(crate) fetcher: Arc<Fetcher>,
    pub(crate) sources: Sources,
    pub(crate) listings: Arc<Listings>,
    pub(crate) budget: ByteBudget,
    pub(crate) served: Served,
    tier_reads: Arc<Semaphore>,
}

/// A read that was checked and looked up.
pub(crate) struct Wanted {
    file: Arc<FileVersion>,
    item: u32,
    /// Asked for, widened to granules.
    wide: Range<u64>,
    first: u32,
    pieces: Vec<Option<Piece>>,
    cached_only: bool,
    by_place: bool,
}

impl Wanted {
    /// Can it be answered at once, without a disk, the origin or memory of ours?
    pub(crate) fn at_hand(&self) -> bool {
        self.pieces.iter().all(|p| matches!(p, Some(Piece::Stored(s)) if s.sendable()))
    }

    /// Answer with places where there are any?
    pub(crate) fn by_place(self, by_place: bool) -> Self {
        Wanted { by_place, ..self }
    }

    /// What of segment `index` is wanted, relative to it.
    fn part_of(&self, index: u32) -> Range<u32> {
        let all = segment_range(self.file.size, index);
        let from = self.wide.start.max(all.start) - all.start;
        let to = self.wide.end.min(all.end) - all.start;
        from as u32..to as u32
    }

    fn end(&self) -> u32 {
        self.first + self.pieces.len() as u32
    }
}

/// An answer frame in the making: neighbouring parts of one tier, all of them sent or all told by place.
#[derive(Default)]
struct Run {
    parts: Vec<Part>,
    places: Vec<data::Place>,
    sums: Vec<u32>,
    holds: Vec<Arc<Hold>>,
    bytes: usize,
    tier: data::Tier,
}

impl Run {
    /// May a part of `tier` be added?
    fn takes(&self, tier: data::Tier, bytes: usize, placed: bool) -> bool {
        let like = self.tier == tier && placed != self.places.is_empty();
        self.bytes == 0 || (like && self.bytes + bytes <= FRAME_BYTES)
    }

    fn add_place(&mut self, tier: data::Tier, part: &Range<u32>, place: data::Place) {
        self.tier = tier;
        self.bytes += part.len();
        self.places.push(place);
    }

    fn add(&mut self, tier: data::Tier, part: &Range<u32>, sums: &[u32]) {
        self.tier = tier;
        self.bytes += part.len();
        let first = part.start / GRANULE_BYTES;
        self.sums.extend_from_slice(&sums[first as usize..part.end.div_ceil(GRANULE_BYTES) as usize]);
    }
}

impl Service {
    pub(crate) fn new(
        store: Arc<Store>,
        fetcher: Arc<Fetcher>,
        sources: Sources,
        listings: Arc<Listings>,
        budget: ByteBudget,
    ) -> Self {
        let tier_reads = Arc::new(Semaphore::new(TIER_READS_MAX));
        Service { store, fetcher, sources, listings, budget, served: Served::new(), tier_reads }
    }

    /// Checks a read and looks its segments up.
    pub(crate) fn wanted(
        &self,
        source: Arc<Source>,
        keep: InsertOptions,
        read: &data::Read,
        item: u32,
    ) -> Result<Wanted> {
        let file = FileVersion { keep, ..file_version(source, &read.locator, &read.version, read.size)? };
        let end = read.offset.checked_add(read.length as u64).filter(|e| *e <= read.size && *e > read.offset);
        let range = match end {
            Some(end) if block_of(read.offset) == block_of(end - 1) => read.offset..end,
            _ => {
                return Err(Error::new(Kind::Invalid, "a read lies within one 4 MiB block and within the file")
                    .with("offset", read.offset)
                    .with("length", read.length)
                    .with("size", read.size));
            }
        };
        let wide = widen(range, read.size);
        let indexes = segments(wide.clone());
        let flights = self.fetcher.flights();
        let pieces = indexes.clone().map(|i| flights.stored(&file, i).map(Piece::Stored)).collect();
        Ok(Wanted {
            file: Arc::new(file),
            item,
            wide,
            first: indexes.start,
            pieces,
            cached_only: read.cached_only,
            by_place: false,
        })
    }

    /// Sets the fetches of a read off, without waiting for them.
    pub(crate) fn start(&self, w: &mut Wanted) {
        if !w.cached_only {
            self.fetcher.complete(&w.file, w.first, &mut w.pieces);
        }
    }

    /// Sends the bytes of a read, in order, in frames of up to 1 MiB, each as soon as its first segment is there.
    pub(crate) async fn answer(&self, to: &Replier, mut w: Wanted) -> Result<()> {
        self.start(&mut w);
        if w.pieces.iter().any(Option::is_none) {
            return Err(Error::new(Kind::NotFound, "not in the cache"));
        }
        let mut at = w.first;
        while at < w.end() {
            let offset = segment_range(w.file.size, at).start + w.part_of(at).start as u64;
            let mut run = Run::default();
            while at < w.end() && self.extend(&mut run, &mut w, at, to).await? {
                at += 1;
            }
            let last = at == w.end();
            let (sums, places) = (std::mem::take(&mut run.sums), std::mem::take(&mut run.places));
            let (placed, bulk) = if places.is_empty() { (0, run.bytes) } else { (run.bytes as u32, 0) };
            let tier = run.tier.into();
            let head = data::Data { item: w.item, offset, sums, last, tier, filled: 0, places, placed };
            self.served.add(run.tier, run.bytes);
            to.send(&head.into(), run.parts, bulk, run.holds).await?;
        }
        Ok(())
    }

    /// Adds segment `index` to the frame; false if it belongs into the next one. Waits only for the first segment of a frame.
    async fn extend(&self, run: &mut Run, w: &mut Wanted, index: u32, to: &Replier) -> Result<bool> {
        let part = w.part_of(index);
        let empty = run.bytes == 0;
        let mut again = 0;
        loop {
            match w.pieces[(index - w.first) as usize].clone() {
                Some(Piece::Stored(segment)) => {
                    let tier = wire_tier(segment.tier());
                    match self.add_stored(run, w, segment, tier, &part, to).await {
                        Ok(added) => return Ok(added),
                        // The store has dropped and counted it: a miss like any other.
                        Err(e) if e.is(Kind::Corrupt) || e.is(Kind::Io) => again += 1,
                        Err(e) => return Err(e),
                    }
                }
                Some(Piece::Flying { flight, started }) => {
                    if !empty && !flight.is_ready(index) {
                        return Ok(false);
                    }
                    match flight.ready(index).await {
                        Ok(()) => {}
                        // Somebody else's credentials were refused: ours may be better.
                        Err(e) if e.is(Kind::PermissionDenied) && !started && again == 0 => {
                            again += 1;
                            self.again(w, index);
                            continue;
                        }
                        Err(e) => return Err(e),
                    }
                    match flight.get(index)? {
                        Filled::Stored(segment) => {
                            match self.add_stored(run, w, segment, data::Tier::Origin, &part, to).await {
                                Ok(added) => return Ok(added),
                                Err(e) if e.is(Kind::Corrupt) || e.is(Kind::Io) => again += 1,
                                Err(e) => return Err(e),
                            }
                        }
                        Filled::Fresh { pieces, sums, hold } => {
                            if !run.takes(data::Tier::Origin, part.len(), false) {
                                return Ok(false);
                            }
                            let Some(window) = hold_for_frame(to.window(), part.len(), empty).await else {
                                return Ok(false);
                            };
                            cut(&pieces, &part, &mut run.parts);
                            run.holds.extend([window, hold]);
                            run.add(data::Tier::Origin, &part, &sums);
                            return Ok(true);
                        }
                    }
                }
                None => return Err(Error::new(Kind::NotFound, "not in the cache")),
            }
            if again > 2 {
                return Err(Error::new(Kind::Unavailable, "the cache cannot keep this segment readable"));
            }
            self.again(w, index);
        }
    }

    /// Looks segment `index` up anew, and fetches it if it is gone.
    fn again(&self, w: &mut Wanted, index: u32) {
        let piece = &mut w.pieces[(index - w.first) as usize];
        *piece = None;
        if !w.cached_only {
            self.fetcher.complete(&w.file, index, std::slice::from_mut(piece));
        }
    }

    /// Adds a stored segment: by its place, from its file as it is, or read and verified. False if it belongs into the next frame.
    async fn add_stored(
        &self,
        run: &mut Run,
        w: &Wanted,
        segment: Segment,
        tier: data::Tier,
        part: &Range<u32>,
        to: &Replier,
    ) -> Result<bool> {
        let place = if w.by_place { segment.place() } else { None };
        if !run.takes(tier, part.len(), place.is_some()) {
            return Ok(false);
        }
        if let Some(place) = place {
            run.add_place(tier, part, place);
            return Ok(true);
        }
        if segment.sendable() {
            run.add(tier, part, segment.sums());
            run.parts.push(Part::Stored { segment, from: part.start, len: part.len() as u32 });
            return Ok(true);
        }
        let first = run.bytes == 0;
        let Some(window) = hold_for_frame(to.window(), part.len(), first).await else { return Ok(false) };
        let Some(hold) = hold_for_frame(&self.budget, part.len(), first).await else { return Ok(false) };
        let bytes = self.read_tier(segment.clone(), part.clone()).await?;
        run.add(tier, part, segment.sums());
        run.parts.push(Part::Bytes(bytes));
        run.holds.extend([window, hold]);
        Ok(true)
    }

    async fn read_tier(&self, segment: Segment, part: Range<u32>) -> Result<Bytes> {
        let gone = |_| Error::new(Kind::Cancelled, "the worker is stopping");
        let turn = self.tier_reads.clone().acquire_owned().await.map_err(gone)?;
        let read = spawn_blocking(move || {
            let _turn = turn;
            segment.read(part)
        });
        read.await.map_err(|e| Error::new(Kind::Io, "cache read task failed").caused_by(e))?
    }

    /// Brings a range into the cache; only its counts go back.
    pub(crate) async fn fill(&self, to: &Replier, mut w: Wanted) -> Result<()> {
        self.start(&mut w);
        let (mut filled, mut tier) = (0u64, data::Tier::Memory);
        let mut before: Option<Arc<crate::flight::Flight>> = None;
        for piece in w.pieces.iter().flatten() {
            let Piece::Flying { flight, started } = piece else { continue };
            if before.as_ref().is_some_and(|b| Arc::ptr_eq(b, flight)) {
                continue;
            }
            before = Some(flight.clone());
            flight.ended().await?;
            tier = data::Tier::Origin;
            if *started {
                let range = flight.range();
                filled += range.end - range.start;
            }
        }
        let (item, offset) = (w.item, w.wide.start);
        let tier = tier.into();
        let filled = filled as u32;
        to.message(data::Data { item, offset, last: true, tier, filled, ..Default::default() }).await
    }

    /// Counts what a client read in shared memory by itself.
    pub(crate) fn touched(&self, touches: &[data::Touch]) {
        for t in touches {
            self.store.touch(t.at, t.seal);
            self.served.add(data::Tier::Memory, t.bytes as usize);
        }
    }

    pub(crate) async fn list(&self, to: &Replier, source: Arc<Source>, ask: data::List) -> Result<()> {
        if ask.dir.len() > LOCATOR_BYTES_MAX {
            return Err(Error::new(Kind::Invalid, "directory locator is too long").with("bytes", ask.dir.len()));
        }
        let max_age = std::time::Duration::from_millis(ask.max_age_ms);
        let (listing, origin) = self.listings.get(source, ask.dir, max_age).await?;
        let mut head = listing.head();
        head.origin = origin;
        if ask.known == listing.version && ask.known != 0 {
            head.unchanged = true;
            head.last = true;
            return to.message(head).await;
        }
        for (i, (bulk, sum)) in listing.bulks.iter().enumerate() {
            let last = i + 1 == listing.bulks.len();
            to.bulk(data::Listing { last, bulk_sum: *sum, ..head }, bulk.clone()).await?;
        }
        Ok(())
    }

    pub(crate) async fn manage(&self, source: Arc<Source>, m: data::Manage) -> Result<data::Managed> {
        let file = file_version(source, &m.locator, &m.version, m.size)?;
        let store = self.store.clone();
        blocking(move || {
            use data::manage::Action;
            let action = m.action();
            let mut sum = data::Managed::default();
            for info in store.content_segments(file.content, file.size) {
                let key = file.key(info.index);
                let there = match action {
                    Action::Stat => true,
                    Action::Evict => store.remove(&key),
                    Action::Pin => store.pin(&key, true),
                    Action::Unpin => store.pin(&key, false),
                };
                if there {
                    sum.segments += 1;
                    sum.bytes += info.len as u64;
                    let pinned = action == Action::Pin || (action == Action::Stat && info.pinned);
                    sum.pinned_bytes += if pinned { info.len as u64 } else { 0 };
                }
            }
            sum
        })
        .await
    }

    pub(crate) async fn evict_all(&self) {
        let store = self.store.clone();
        self.listings.clear();
        if let Err(e) = blocking(move || store.evict_all()).await {
            tracing::error!(error = %e, "evicting the cache failed");
        }
    }

    pub(crate) async fn resize(&self, r: data::Resize) -> Result<()> {
        let store = self.store.clone();
        let given = |bytes| (bytes > 0).then_some(bytes);
        blocking(move || store.resize(given(r.memory_bytes), given(r.disk_bytes))).await?
    }

    pub(crate) async fn cache_stats(&self) -> data::CacheStats {
        let store = self.store.clone();
        let stats = blocking(move || store.stats()).await.unwrap_or_default();
        let tiers = stats.tiers.into_iter().map(|t| data::TierStats {
            name: t.name,
            capacity: t.capacity_bytes,
            used: t.used_bytes,
            segments: t.segments,
            pinned: t.pinned_bytes,
            ejected: t.ejected,
        });
        let [served_memory_bytes, served_disk_bytes, served_origin_bytes] = self.served.bytes();
        data::CacheStats {
            tiers: tiers.collect(),
            served_memory_bytes,
            served_disk_bytes,
            served_origin_bytes,
            hits: stats.hits,
            misses: stats.misses,
            origin_requests: self.fetcher.requests.load(Relaxed) + self.listings.requests.load(Relaxed),
            corrupt: stats.corrupt,
            evictions: stats.evictions,
        }
    }
}

/// Runs table work that may touch files off the reactor.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    spawn_blocking(work).await.map_err(|e| Error::new(Kind::Io, "cache task failed").caused_by(e))
}

/// Holds memory for a part of a frame: the first part of a frame waits for it, a further one goes into the next frame instead.
async fn hold_for_frame(budget: &ByteBudget, bytes: usize, first: bool) -> Option<Arc<Hold>> {
    let hold = if first { Some(budget.hold(bytes as u64).await) } else { budget.try_hold(bytes as u64) };
    hold.map(Arc::new)
}

/// The part of a segment that is `pieces`, without copying.
fn cut(pieces: &[Bytes], part: &Range<u32>, out: &mut Vec<Part>) {
    let (from, to) = (part.start as usize, part.end as usize);
    let mut at = 0;
    for p in pieces {
        let (start, end) = (from.max(at), to.min(at + p.len()));
        if start < end {
            out.push(Part::Bytes(p.slice(start - at..end - at)));
        }
        at += p.len();
    }
}

fn wire_tier(tier: Tier) -> data::Tier {
    match tier {
        Tier::Memory => data::Tier::Memory,
        Tier::Disk(_) => data::Tier::Disk,
    }
}

fn file_version(source: Arc<Source>, locator: &Bytes, version: &Bytes, size: u64) -> Result<FileVersion> {
    if locator.is_empty() || locator.len() > LOCATOR_BYTES_MAX || version.len() > VERSION_BYTES_MAX {
        return Err(Error::new(Kind::Invalid, "locator or version of an impossible length")
            .with("locator", locator.len())
            .with("version", version.len()));
    }
    if size > FILE_BYTES_MAX {
        return Err(Error::new(Kind::Invalid, "file is too large").with("size", size));
    }
    // Fetched bytes are stored by reference to the caller's frame for as long as they fly: their own memory.
    Ok(FileVersion::new(source, Bytes::copy_from_slice(locator), Bytes::copy_from_slice(version), size))
}

const _: () = assert!(FRAME_BYTES >= SEGMENT_BYTES as usize);
