//! The tiers of the cache: an optional memory tier above any number of disk tiers, keyed by [`SegmentKey`].
//!
//! Content is immutable under its key and may vanish at any time, so the store never has to be right about freshness, only about
//! bytes: everything has one CRC-32C per 16 KiB granule, made when the bytes left the origin. The server and the fetcher call
//! this room; it calls nobody. Look-ups are synchronous table work; [`Store::insert`] and [`Segment::read`] do file I/O.
//!
//! Tiering: a fetched segment goes to memory and, if the disk's policy wants it, a background writer copies it to a disk at once
//! (so that a killed worker comes back warm); memory evicts nothing that has still to be copied, so when it is full of that, new
//! segments go straight to disk. A disk hit that comes again is copied up to memory if memory's policy prefers it to what it
//! holds. A disk that fails or fills up is a miss, never an error to the caller.

mod counters;
mod index;
mod policy;
mod recover;
#[cfg(test)]
mod restart;
mod segment;
mod slab;
#[cfg(test)]
mod suite;
mod table;
#[cfg(test)]
mod tiering;
mod whole;
mod writer;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use efc_common::block::{SEGMENT_BYTES, segments};
use efc_common::id::{ContentId, SegmentKey};
use efc_common::metrics::gauge;
use efc_common::units::show_bytes;
use efc_common::{Error, Kind, Result};

pub use policy::Policy;
pub use segment::{Segment, Tier};

use counters::{Counters, Removal};
use segment::Entry;
use slab::{PutRequest, Slab, well_formed};
use writer::Writer;

/// Smallest quota of a tier, bytes: a few segments, the index and the room for entries in limbo.
pub const QUOTA_BYTES_MIN: u64 = 4 << 20;

/// The memory tier.
#[derive(Debug, Clone)]
pub struct MemoryTier {
    /// Hard limit of the bytes it takes.
    pub quota_bytes: u64,
    /// A directory on tmpfs, which survives a restart of the worker; `None` = memfd, which does not.
    pub path: Option<PathBuf>,
}

/// One disk tier.
#[derive(Debug, Clone)]
pub struct DiskTier {
    /// A directory of its own; made if it is missing.
    pub path: PathBuf,
    /// Hard limit of the bytes it takes, record index included.
    pub quota_bytes: u64,
}

/// What to open.
#[derive(Debug, Clone, Default)]
pub struct StoreConfig {
    /// The memory tier, if any.
    pub memory: Option<MemoryTier>,
    /// Disk tiers; each has its own policy, quota and fate.
    pub disks: Vec<DiskTier>,
    /// Eviction policy of every tier.
    pub policy: Policy,
    /// Entries vanish this long after they were stored (our clock, never the file's mtime). `None` = never.
    pub ttl: Option<Duration>,
}

/// How to store one segment.
#[derive(Debug, Clone, Copy, Default)]
pub struct InsertOptions {
    /// Exempt from eviction and from its time to live.
    pub pinned: bool,
    /// Overrides [`StoreConfig::ttl`].
    pub ttl: Option<Duration>,
}

/// What became of an insert.
#[derive(Debug, Clone)]
pub enum Inserted {
    /// It is in a tier (this call stored it, or it was there).
    Stored(Segment),
    /// It is not; the caller serves the bytes it has. Counted.
    Bypassed(BypassReason),
}

/// Why a segment was not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BypassReason {
    /// Everything that could make room is pinned or being read.
    Busy,
    /// The policy prefers what is there.
    NotAdmitted,
    /// The file system failed.
    IoError,
    /// The tier is out of use.
    Ejected,
    /// The disks are behind.
    DiskQueue,
    /// No bytes, too many bytes, or checksums that do not fit the length.
    Malformed,
}

impl BypassReason {
    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            BypassReason::Busy => "busy",
            BypassReason::NotAdmitted => "not_admitted",
            BypassReason::IoError => "io_error",
            BypassReason::Ejected => "ejected",
            BypassReason::DiskQueue => "disk_queue",
            BypassReason::Malformed => "malformed",
        }
    }
}

/// One cached segment, as an administrator sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Position in its file.
    pub index: u32,
    /// Bytes.
    pub len: u32,
    /// The fastest tier that has it.
    pub tier: Tier,
    /// Pinned in some tier.
    pub pinned: bool,
}

/// One tier now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TierStats {
    /// Which.
    pub tier: Tier,
    /// `memory` or `disk:PATH`.
    pub name: String,
    /// Quota, bytes.
    pub capacity_bytes: u64,
    /// Bytes taken, record index included.
    pub used_bytes: u64,
    /// Segments that can be found.
    pub segments: u64,
    /// Bytes of pinned segments.
    pub pinned_bytes: u64,
    /// Taken out of use after repeated I/O errors.
    pub ejected: bool,
}

/// The store now, and what it counted since it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreStats {
    /// Memory first.
    pub tiers: Vec<TierStats>,
    /// Look-ups that found a segment.
    pub hits: u64,
    /// Look-ups that did not.
    pub misses: u64,
    /// Segments and index records dropped because a checksum did not match.
    pub corrupt: u64,
    /// Segments removed from a tier for any reason.
    pub evictions: u64,
    /// Segments that were not stored.
    pub bypassed: u64,
}

/// The store's clock: Unix time in milliseconds, but it never jumps while the process lives.
pub(crate) struct Clock {
    start: Instant,
    start_unix_ms: u64,
    /// Added by tests.
    ahead_ms: AtomicU64,
}

impl Clock {
    fn new() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Clock { start: Instant::now(), start_unix_ms: unix.as_millis() as u64, ahead_ms: AtomicU64::new(0) }
    }

    fn now_ms(&self) -> u64 {
        self.start_unix_ms + self.start.elapsed().as_millis() as u64 + self.ahead_ms.load(Relaxed)
    }
}

/// The tiers, without the thread that writes to disks.
struct Tiers {
    memory: Option<Arc<Slab>>,
    disks: Vec<Arc<Slab>>,
    /// Quotas of `disks`, to share keys out.
    weights: Vec<u64>,
    clock: Arc<Clock>,
    counters: Arc<Counters>,
}

/// The cache of one worker.
pub struct Store {
    tiers: Arc<Tiers>,
    writer: Writer,
    ttl: Option<Duration>,
}

impl Store {
    /// Opens the tiers and reads back what disk tiers (and a memory tier on tmpfs) held.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a configuration that cannot work, [`Kind::Busy`] when another process uses a directory, else why a
    /// directory cannot be made or opened. A disk that fails, is full or is read-only is not an error: it is out of use.
    pub fn open(config: StoreConfig) -> Result<Arc<Store>> {
        if config.memory.is_none() && config.disks.is_empty() {
            return Err(Error::new(Kind::Invalid, "the cache has no tier; give it a memory quota or a disk directory"));
        }
        let clock = Arc::new(Clock::new());
        let counters = Arc::new(Counters::new());
        let queue_bytes = config.memory.as_ref().map_or(0, |m| reserve(m, !config.disks.is_empty()));
        let opener = recover::Opener { policy: config.policy, clock: clock.clone(), counters: counters.clone() };
        let memory = match &config.memory {
            Some(m) => Some(opener.memory(m, queue_bytes)?),
            None => None,
        };
        let mut disks = Vec::new();
        for (i, d) in config.disks.iter().enumerate() {
            disks.push(opener.disk(d, i as u16)?);
        }
        let weights = config.disks.iter().map(|d| d.quota_bytes).collect();
        let tiers = Arc::new(Tiers { memory, disks, weights, clock, counters });
        let writer = Writer::start(tiers.clone(), queue_bytes)?;
        Ok(Arc::new(Store { tiers, writer, ttl: config.ttl }))
    }

    /// Gives the memory tier and the disk other quotas, in bytes (`None`: as it is). May block for the time that it takes to free what is too much.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a tier that is not there, is not the only disk, or cannot be of that size; then nothing has changed.
    pub fn resize(&self, memory: Option<u64>, disk: Option<u64>) -> Result<()> {
        let none = |what: &str| Error::new(Kind::Invalid, format!("the worker has no {what} whose size could change"));
        let mut all = Vec::new();
        if let Some(quota) = memory {
            check_quota("memory", quota)?;
            all.push((self.tiers.memory.as_ref().ok_or_else(|| none("memory tier"))?, quota));
        }
        if let Some(quota) = disk {
            check_quota("disk", quota)?;
            let [tier] = &self.tiers.disks[..] else { return Err(none("single disk")) };
            all.push((tier, quota));
        }
        all.into_iter().for_each(|(tier, quota)| tier.resize(quota));
        Ok(())
    }

    /// Finds a segment: table work only. Counts a hit or a miss (`efc_cache_requests_total`); a disk hit that comes again is
    /// copied up to memory in the background.
    pub fn get(&self, key: &SegmentKey) -> Option<Segment> {
        let t = &*self.tiers;
        if let Some(memory) = &t.memory {
            let found = memory.get(key);
            t.counters.looked_up(Tier::Memory, found.is_some());
            if let Some((entry, _)) = found {
                return Some(Segment { entry });
            }
        }
        if !t.disks.is_empty() {
            let found = t.disks.iter().find_map(|d| d.get(key));
            t.counters.looked_up(Tier::Disk(0), found.is_some());
            if let Some((entry, counted)) = found {
                if counted && let Some(memory) = &t.memory {
                    memory.seen(key);
                }
                if entry.hit_before.swap(true, Relaxed) {
                    self.writer.promote(&entry);
                }
                return Some(Segment { entry });
            }
        }
        t.counters.missed();
        None
    }

    /// The files through which clients of this host read the memory tier by themselves, if it can be shared.
    pub fn shared_files(&self) -> Option<Vec<BorrowedFd<'_>>> {
        let share = self.tiers.memory.as_ref()?.share()?;
        Some(share.files.iter().map(|f| f.as_fd()).collect())
    }

    /// A client has read a segment in shared memory: it counts as a hit. Where there is another segment by now, nothing happens.
    pub fn touch(&self, at: u64, seal: u64) {
        if let Some(memory) = &self.tiers.memory {
            memory.touch(at, seal);
            self.tiers.counters.looked_up(Tier::Memory, true);
        }
    }

    /// Is the key in some tier? Not counted as a request.
    pub fn contains(&self, key: &SegmentKey) -> bool {
        self.tiers.all().any(|s| s.peek(key).is_some())
    }

    /// Stores a segment whose bytes are `pieces` in order, with one CRC-32C per granule in `sums` (not checked here). May block for a
    /// write to disk. Never fails: what cannot be stored is bypassed and counted.
    pub fn insert(&self, key: SegmentKey, pieces: &[Bytes], sums: &[u32], options: InsertOptions) -> Inserted {
        match self.insert_memory(key, pieces, sums, options) {
            Some(inserted) => inserted,
            None => self.insert_disk(key, pieces, sums, options),
        }
    }

    /// The part of [`Store::insert`] that waits for no disk. `None`: memory does not take it, so [`Store::insert_disk`] is due.
    pub fn insert_memory(
        &self,
        key: SegmentKey,
        pieces: &[Bytes],
        sums: &[u32],
        options: InsertOptions,
    ) -> Option<Inserted> {
        let t = &*self.tiers;
        let disk = t.home(&key).is_some();
        let slices: Vec<&[u8]> = pieces.iter().map(|p| &p[..]).collect();
        let put = match (&t.memory, self.request(key, &slices, sums, options)) {
            (_, Err(reason)) => Err(reason),
            // Pinned sets may be larger than memory: they live on disk if there is one.
            (Some(memory), Ok(request)) if !(disk && options.pinned) => self.put_memory(memory, &request),
            (None, Ok(_)) if !disk => Err(BypassReason::Ejected),
            _ => return None,
        };
        match put {
            Err(reason) if disk && reason != BypassReason::Malformed => None,
            put => Some(self.inserted(put)),
        }
    }

    /// Stores a segment on disk, past memory; a pinned one that no disk takes in memory after all. Blocks.
    pub fn insert_disk(&self, key: SegmentKey, pieces: &[Bytes], sums: &[u32], options: InsertOptions) -> Inserted {
        let t = &*self.tiers;
        let slices: Vec<&[u8]> = pieces.iter().map(|p| &p[..]).collect();
        let put = self.request(key, &slices, sums, options).and_then(|request| {
            let disk = t.home(&key).ok_or(BypassReason::Ejected);
            let put = disk.and_then(|d| d.put(&PutRequest { trial: false, ..request }, &|_| true));
            match (put, &t.memory) {
                (Err(_), Some(memory)) if options.pinned => self.put_memory(memory, &request),
                (put, _) => put,
            }
        });
        self.inserted(put)
    }

    /// Counts a segment that was not stored because the disks are behind.
    pub fn disk_is_behind(&self) {
        self.tiers.counters.bypassed(BypassReason::DiskQueue);
    }

    fn request<'a>(
        &self,
        key: SegmentKey,
        pieces: &'a [&'a [u8]],
        sums: &'a [u32],
        options: InsertOptions,
    ) -> std::result::Result<PutRequest<'a>, BypassReason> {
        let len = well_formed(pieces, sums).ok_or(BypassReason::Malformed)?;
        let ttl = options.ttl.or(self.ttl);
        let now_ms = self.tiers.clock.now_ms();
        let expires_ms = ttl.map_or(0, |ttl| now_ms.saturating_add(ttl.as_millis() as u64).max(1));
        Ok(PutRequest { key, pieces, len, sums, pinned: options.pinned, expires_ms, trial: true, admitted: false })
    }

    /// Memory never evicts what has still to be copied to a disk, unless the disks hang: nothing that was fetched is lost
    /// because disks are slow, and what finds no room in memory goes to disk at the disk's pace.
    fn put_memory(&self, memory: &Slab, request: &PutRequest<'_>) -> std::result::Result<Arc<Entry>, BypassReason> {
        let copies = self.writer.copies();
        let may_go = |e: &Entry| !copies || e.settled.load(Relaxed);
        let entry = memory.put(request, &may_go)?;
        self.writer.offer(entry.clone());
        Ok(entry)
    }

    fn inserted(&self, put: std::result::Result<Arc<Entry>, BypassReason>) -> Inserted {
        match put {
            Ok(entry) => Inserted::Stored(Segment { entry }),
            Err(reason) => {
                self.tiers.counters.bypassed(reason);
                Inserted::Bypassed(reason)
            }
        }
    }

    /// Removes a segment from every tier; true if it was in one. Blocks for a hole punch.
    pub fn remove(&self, key: &SegmentKey) -> bool {
        self.writer.cancel(key);
        let mut found = false;
        for slab in self.tiers.all() {
            found |= slab.remove(key, Removal::Asked);
        }
        found
    }

    /// Pins or unpins a segment where it is; false if it is in no tier. Blocks for a small write on disk.
    pub fn pin(&self, key: &SegmentKey, pinned: bool) -> bool {
        if !pinned {
            // Every copy, and not only the first.
            return self.tiers.all().filter(|s| s.pin(key, false)).count() > 0;
        }
        let t = &*self.tiers;
        t.disks.iter().any(|d| d.pin(key, true)) || t.memory.as_ref().is_some_and(|m| m.pin(key, true))
    }

    /// Removes every segment that is not pinned; how many copies went. Blocks for a hole punch per copy: seconds for millions.
    pub fn evict_all(&self) -> u64 {
        self.writer.cancel_all();
        self.tiers.all().map(|s| s.evict_all()).sum()
    }

    /// The cached segments of a content of `size` bytes, by index, each once. Not counted as requests.
    pub fn content_segments(&self, content: ContentId, size: u64) -> Vec<SegmentInfo> {
        let mut out: std::collections::BTreeMap<u32, SegmentInfo> = Default::default();
        for slab in self.tiers.all() {
            slab.of_content(content, segments(0..size).end, &mut |e| {
                let pinned = e.pinned.load(Relaxed);
                let info = SegmentInfo { index: e.key.index, len: e.len, tier: slab.tier(), pinned };
                out.entry(info.index).or_insert(info).pinned |= pinned;
            });
        }
        out.into_values().collect()
    }

    /// Waits (blocking) until the disk writer has nothing to do: before a planned exit, so that the next start is warm.
    pub fn flush(&self) {
        self.writer.flush();
    }

    /// Tiers and counters; gives back room whose last reader has gone since the last insert (a hole punch each), and sets the gauges `efc_cache_used_bytes` and `efc_cache_capacity_bytes`.
    pub fn stats(&self) -> StoreStats {
        let tiers: Vec<TierStats> = self.tiers.all().map(|s| s.stats()).collect();
        for label in ["memory", "disk"] {
            let of =
                |f: fn(&TierStats) -> u64| tiers.iter().filter(|t| t.tier.label() == label).map(f).sum::<u64>() as f64;
            gauge!("efc_cache_used_bytes", "tier" => label).set(of(|t| t.used_bytes));
            gauge!("efc_cache_capacity_bytes", "tier" => label).set(of(|t| t.capacity_bytes));
        }
        let c = &self.tiers.counters;
        StoreStats {
            tiers,
            hits: c.hits.load(Relaxed),
            misses: c.misses.load(Relaxed),
            corrupt: c.corrupt.load(Relaxed),
            evictions: c.evictions.load(Relaxed),
            bypassed: c.bypassed.load(Relaxed),
        }
    }
}

impl Tiers {
    /// Memory first.
    fn all(&self) -> impl Iterator<Item = &Arc<Slab>> {
        self.memory.iter().chain(&self.disks)
    }

    /// The disk a new key goes to: by weighted rendezvous among the disks in use, so that one disk's failure moves only its own keys.
    fn home(&self, key: &SegmentKey) -> Option<&Arc<Slab>> {
        let hash = table::key_hash(key) as u64;
        let score = |i: usize| {
            let mixed = (hash ^ (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let unit = ((mixed >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
            -(self.weights[i] as f64) / unit.ln()
        };
        let usable = self.disks.iter().enumerate().filter(|(_, d)| !d.ejected());
        usable.max_by(|(a, _), (b, _)| score(*a).total_cmp(&score(*b))).map(|(_, d)| d)
    }
}

/// Part of the memory quota for entries that memory has forgotten but the disk writer or a reader still holds.
fn reserve(memory: &MemoryTier, disks: bool) -> u64 {
    if disks { (memory.quota_bytes / 8).min(64 << 20) } else { 0 }
}

/// Refuses a quota that cannot hold a few segments.
fn check_quota(name: &str, quota: u64) -> Result<()> {
    if quota < QUOTA_BYTES_MIN {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "cache quota of {} for {name} is too small; give it at least {}",
                show_bytes(quota),
                show_bytes(QUOTA_BYTES_MIN)
            ),
        ));
    }
    const { assert!(QUOTA_BYTES_MIN >= 8 * SEGMENT_BYTES as u64) };
    Ok(())
}
