//! Directory listings of sources that share them (object stores): asked of the origin once per directory and freshness window,
//! whoever asks, and kept as the frames they are answered with.
//!
//! What must stay true:
//! - One walk over a directory's pages at a time. Who finds one under way takes its result only if it is fresh enough for them.
//! - A listing's version is a hash of its entries, so it changes when an entry does and stays over a fetch that found the same;
//!   the client's `known` then costs one small frame.
//! - The budget is hard: old listings go first, and a directory that would not fit alone is refused, its clients list it themselves.

use crate::source::Source;
use bytes::{Bytes, BytesMut};
use efc_backend::ListPage;
use efc_common::checksum::crc32c;
use efc_common::id::ContentId;
use efc_common::metrics::counter;
use efc_common::node::Entry;
use efc_common::task::TaskGroup;
use efc_common::units::show_bytes;
use efc_common::{Error, Kind, Result};
use efc_proto::convert::entry_to_wire;
use efc_proto::data;
use parking_lot::Mutex;
use prost::Message as _;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// Bytes of one frame's entries, at most one entry more.
const BULK_BYTES: usize = 1 << 20;

/// A whole directory, ready to be sent.
pub(crate) struct Listing {
    pub(crate) version: u64,
    asked: Instant,
    /// Entries messages with their checksums; at least one.
    pub(crate) bulks: Vec<(Bytes, u32)>,
    bytes: usize,
}

impl Listing {
    /// The frame head without what depends on the frame.
    pub(crate) fn head(&self) -> data::Listing {
        data::Listing {
            version: self.version,
            age_ms: self.asked.elapsed().as_millis() as u64,
            unchanged: false,
            last: false,
            origin: false,
            bulk_sum: 0,
        }
    }
}

type Outcome = Option<std::result::Result<Arc<Listing>, Arc<Error>>>;

#[derive(Default)]
struct Slot {
    listing: Option<Arc<Listing>>,
    walk: Option<watch::Receiver<Outcome>>,
    /// For eviction: the last use.
    used: u64,
}

#[derive(Default)]
struct Table {
    slots: HashMap<ContentId, Slot>,
    bytes: usize,
    uses: u64,
}

/// The listings of one worker.
pub(crate) struct Listings {
    table: Mutex<Table>,
    budget: usize,
    deadline: Duration,
    tasks: TaskGroup,
    /// Bytes of walks under way; these may be as many again as `budget`.
    walking: AtomicU64,
    /// Pages asked of origins.
    pub(crate) requests: AtomicU64,
}

enum Step {
    Fresh(Arc<Listing>),
    Wait(watch::Receiver<Outcome>),
    Walk(watch::Sender<Outcome>, watch::Receiver<Outcome>),
}

impl Listings {
    /// Takes at most `budget` bytes, half of them to keep and half for walks; a walk ends within `deadline`.
    pub(crate) fn new(budget: u64, deadline: Duration, tasks: TaskGroup) -> Arc<Self> {
        let (table, walking, requests) = Default::default();
        Arc::new(Listings { table, budget: budget as usize / 2, deadline, tasks, walking, requests })
    }

    /// The listing of `dir`, asked of the origin no longer than `max_age` ago or after this call; and whether it was for it.
    pub(crate) async fn get(
        self: &Arc<Self>,
        source: Arc<Source>,
        dir: Bytes,
        max_age: Duration,
    ) -> Result<(Arc<Listing>, bool)> {
        if !source.backend.capabilities().shared_listing {
            return Err(Error::new(Kind::Unsupported, "listings of this source are not shared; ask the origin"));
        }
        let key = ContentId::of(&[b"listing", &source.id.0, &dir]);
        let called = Instant::now();
        let fresh = |l: &Listing| l.asked >= called || l.asked.elapsed() <= max_age;
        let mut walked = false;
        loop {
            let mut outcome = match self.step(key, fresh) {
                Step::Fresh(l) => {
                    if !walked {
                        counter!("efc_listing_requests_total", "outcome" => "hit").increment(1);
                    }
                    return Ok((l, walked));
                }
                Step::Wait(rx) => rx,
                Step::Walk(tx, rx) => {
                    counter!("efc_listing_requests_total", "outcome" => "miss").increment(1);
                    walked = true;
                    let (me, source, dir) = (self.clone(), source.clone(), dir.clone());
                    self.tasks.spawn(async move { me.walk(key, source, dir, tx).await });
                    rx
                }
            };
            // The sender may be dropped when the worker stops.
            let done = outcome.wait_for(Option::is_some).await.map(|o| o.clone());
            match done {
                Ok(Some(Ok(listing))) if fresh(&listing) => return Ok((listing, walked)),
                // It began before we asked and that is too old for us: again.
                Ok(Some(Ok(_))) => {}
                Ok(Some(Err(e))) => return Err(e.share()),
                _ => return Err(Error::new(Kind::Cancelled, "the worker is stopping")),
            }
        }
    }

    fn step(&self, key: ContentId, fresh: impl Fn(&Listing) -> bool) -> Step {
        let mut t = self.table.lock();
        t.uses += 1;
        let now = t.uses;
        let slot = t.slots.entry(key).or_default();
        slot.used = now;
        if let Some(l) = slot.listing.as_ref().filter(|l| fresh(l)) {
            return Step::Fresh(l.clone());
        }
        if let Some(rx) = slot.walk.as_ref().filter(|rx| rx.has_changed().is_ok()) {
            return Step::Wait(rx.clone());
        }
        let (tx, rx) = watch::channel(None);
        slot.walk = Some(rx.clone());
        Step::Walk(tx, rx)
    }

    async fn walk(&self, key: ContentId, source: Arc<Source>, dir: Bytes, tx: watch::Sender<Outcome>) {
        let asked = Instant::now();
        let outcome = match timeout(self.deadline, self.pages(&source, &dir)).await {
            Ok(r) => r.map(|pages| Arc::new(Listing { asked, ..pages })).map_err(Arc::new),
            Err(_) => Err(Arc::new(Error::new(Kind::Timeout, "the origin did not list the directory in time"))),
        };
        self.keep(key, outcome.as_ref().ok());
        tx.send_replace(Some(outcome));
    }

    /// All pages of a directory, encoded.
    async fn pages(&self, source: &Source, dir: &Bytes) -> Result<Listing> {
        let mut encoder = Encoder::default();
        let mut from = None;
        let mut counted = Walking { total: &self.walking, bytes: 0 };
        loop {
            self.requests.fetch_add(1, Relaxed);
            let page = source.backend.list(dir, from.take()).await?;
            let next = page.next.clone();
            encoder.add(page)?;
            if counted.grow_to(encoder.bytes as u64) > self.budget as u64 {
                return Err(Error::new(
                    Kind::Exhausted,
                    "the worker has no room for the listing of so large a directory",
                )
                .with("room", show_bytes(self.budget as u64)));
            }
            match next {
                None => return Ok(encoder.finish()),
                next => from = next,
            }
        }
    }

    /// Puts a finished walk in place, and drops the listings that were not used for longest.
    fn keep(&self, key: ContentId, listing: Option<&Arc<Listing>>) {
        let mut guard = self.table.lock();
        let t = &mut *guard;
        let Some(slot) = t.slots.get_mut(&key) else { return };
        slot.walk = None;
        if let Some(new) = listing {
            t.bytes += new.bytes;
            t.bytes -= slot.listing.replace(new.clone()).map_or(0, |old| old.bytes);
        }
        if t.bytes > self.budget || t.slots.len() > SLOTS_MAX {
            let mut by_age: Vec<(u64, ContentId)> =
                t.slots.iter().filter(|(_, s)| s.walk.is_none()).map(|(k, s)| (s.used, *k)).collect();
            by_age.sort_unstable();
            for (_, old) in by_age {
                // To nine tenths, so that the next one does not sort again.
                if t.bytes <= self.budget / 10 * 9 && t.slots.len() <= SLOTS_MAX / 10 * 9 {
                    break;
                }
                t.bytes -= t.slots.remove(&old).and_then(|s| s.listing).map_or(0, |l| l.bytes);
            }
        }
    }

    /// Forgets every listing that is not being walked.
    pub(crate) fn clear(&self) {
        let mut t = self.table.lock();
        for s in t.slots.values_mut() {
            s.listing = None;
        }
        t.slots.retain(|_, s| s.walk.is_some());
        t.bytes = 0;
    }

    /// Bytes that may be kept.
    pub(crate) fn budget_bytes(&self) -> u64 {
        self.budget as u64
    }

    /// Bytes kept.
    pub(crate) fn bytes(&self) -> u64 {
        self.table.lock().bytes as u64
    }
}

/// The bytes of one walk, counted as long as it lasts.
struct Walking<'a> {
    total: &'a AtomicU64,
    bytes: u64,
}

impl Walking<'_> {
    /// The bytes of all walks after this one has grown.
    fn grow_to(&mut self, bytes: u64) -> u64 {
        let more = bytes - self.bytes;
        self.bytes = bytes;
        self.total.fetch_add(more, Relaxed) + more
    }
}

impl Drop for Walking<'_> {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Relaxed);
    }
}

/// Directories remembered, whatever their size.
const SLOTS_MAX: usize = 100_000;

/// Turns pages into frames' bulks.
#[derive(Default)]
struct Encoder {
    bulks: Vec<(Bytes, u32)>,
    part: data::Entries,
    part_bytes: usize,
    bytes: usize,
    hash: xxhash_rust::xxh3::Xxh3Default,
}

impl Encoder {
    fn add(&mut self, page: ListPage) -> Result<()> {
        for e in &page.entries {
            self.entry(e);
        }
        for (name, reason) in page.hidden {
            self.part_bytes += name.len() + reason.len() + 16;
            self.part.hidden.push(data::Hidden { name, reason: reason.into() });
            self.end_part_if(BULK_BYTES);
        }
        Ok(())
    }

    fn entry(&mut self, e: &Entry) {
        let wire = entry_to_wire(e);
        let bytes = wire.encoded_len() + 8;
        self.part_bytes += bytes;
        self.part.entries.push(wire);
        self.end_part_if(BULK_BYTES);
    }

    fn end_part_if(&mut self, bytes: usize) {
        if self.part_bytes < bytes {
            return;
        }
        let part = std::mem::take(&mut self.part);
        let mut bulk = BytesMut::with_capacity(part.encoded_len());
        // A BytesMut grows: this cannot fail.
        let _ = part.encode(&mut bulk);
        let bulk = bulk.freeze();
        self.hash.update(&bulk);
        self.bytes += bulk.len();
        self.part_bytes = 0;
        self.bulks.push((bulk.clone(), crc32c(&bulk)));
    }

    fn finish(mut self) -> Listing {
        if self.bulks.is_empty() || self.part_bytes > 0 {
            self.end_part_if(0);
        }
        // 0 means "none known" on the wire.
        let version = self.hash.digest().max(1);
        Listing { version, asked: Instant::now(), bulks: self.bulks, bytes: self.bytes + 256 }
    }
}
