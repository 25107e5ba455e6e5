//! One tier: a sparse file cut into virtual slots of 256 KiB, a table of what is in them, and a hard byte budget. An entry of n
//! bytes takes n rounded up to 4 KiB of the file system, because the rest of its slot is a hole: small files cost what they are.
//! Memory (memfd, or a file on tmpfs) and disks are the same code; a tier with a directory also has a record index
//! ([`super::index`]) and finds its entries again after a restart ([`super::recover`]).
//!
//! What must stay true:
//! - Live pages are never overwritten. `sendfile` makes a socket refer to page-cache pages, so a slot is punched (the socket
//!   keeps the old pages) and only then written again. Slots are aligned to 256 KiB and no page-cache folio is larger than that
//!   (tmpfs with `huge=never`, read-ahead off; [`super::whole`] sees to it by itself), else a punch would zero a part of a folio in place.
//! - `used` (what the files may occupy, index included) never exceeds the quota. Room is claimed after it is free, not before.
//! - The state lock is held for table work only, never during I/O.
//! - A guarded entry is not punched. It may be forgotten into *limbo*: still counted, freed by its last guard.
//! - A shared slot's seal is broken before the slot is punched ([`efc_proto::shared`]).

use std::fs::File;
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use efc_common::block::{GRANULES_PER_SEGMENT, SEGMENT_BYTES};
use efc_common::id::{ContentId, SegmentKey};
use parking_lot::Mutex;

use super::counters::{Counters, Removal};
use super::index::{Index, Record, index_bytes};
use super::policy::{self, Candidate, Policy};
use super::segment::{Entry, Freed, NewEntry, Share, Shared, Tier, slot_offset, sum_count};
use super::table::{Free, Table, candidate, cost, key_hash};
use super::whole::{MARKER_BYTES, WholeFile};
use super::{BypassReason, Clock, TierStats};

mod room;

/// Slots in one data file: ext4 ends a file at 16 TiB.
pub(super) const SLOTS_MAX: u32 = (1 << 26) - 1;
/// Failed reads and writes in a row after which a tier is taken out of use.
const ERRORS_MAX: u32 = 8;
/// Slots that are kept in reserve for growth of the index (or of the markers), so that a claim need not count its own record.
pub(super) const INDEX_SLACK_SLOTS: u64 = 64;

/// What makes a slab.
pub(super) struct SlabSpec {
    pub(super) tier: Tier,
    pub(super) name: String,
    pub(super) quota: u64,
    /// Part of the quota that entries in limbo may take.
    pub(super) reserve: u64,
    pub(super) policy: Policy,
    pub(super) data: File,
    pub(super) whole: Option<WholeFile>,
    pub(super) index: Option<Index>,
    /// What clients of this host need to read the tier by themselves.
    pub(super) share: Option<Share>,
    pub(super) clock: Arc<Clock>,
    pub(super) counters: Arc<Counters>,
}

/// A tier.
pub(super) struct Slab {
    shared: Arc<Shared>,
    name: String,
    /// Changed under the lock of the state.
    quota: AtomicU64,
    reserve: u64,
    index: Option<Index>,
    clock: Arc<Clock>,
    counters: Arc<Counters>,
    ejected: AtomicBool,
    state: Mutex<Table>,
    /// Held while freed slots are punched, so that who needs their room waits the few microseconds instead of bypassing.
    reclaim: Mutex<()>,
}

/// What to store.
#[derive(Clone, Copy)]
pub(super) struct PutRequest<'a> {
    pub(super) key: SegmentKey,
    pub(super) pieces: &'a [&'a [u8]],
    pub(super) len: u32,
    pub(super) sums: &'a [u32],
    pub(super) pinned: bool,
    pub(super) expires_ms: u64,
    /// See [`Candidate::trial`].
    pub(super) trial: bool,
    /// [`Slab::admits`] has been asked already.
    pub(super) admitted: bool,
}

impl Slab {
    /// A slab with no entries. `slots` is how many slots the data file has already; all of them count as free but those that
    /// `adopt` takes.
    pub(super) fn new(spec: SlabSpec) -> Arc<Self> {
        let free = Free::new(spec.whole.is_some());
        Arc::new_cyclic(|weak| Slab {
            shared: Arc::new(Shared {
                tier: spec.tier,
                data: spec.data,
                whole: spec.whole,
                share: spec.share,
                freed: Mutex::new(Vec::new()),
                errors: AtomicU32::new(0),
                slab: weak.clone(),
            }),
            name: spec.name,
            quota: AtomicU64::new(spec.quota),
            reserve: spec.reserve,
            index: spec.index,
            clock: spec.clock,
            counters: spec.counters,
            ejected: AtomicBool::new(false),
            state: Mutex::new(Table::new(
                policy::build(spec.policy, spec.quota.saturating_sub(spec.reserve)),
                spec.quota,
                free,
            )),
            reclaim: Mutex::new(()),
        })
    }

    /// Takes in what a restart found, oldest first, in files of `slots` slots whose other slots are holes.
    pub(super) fn adopt(&self, found: &[(u32, Record)], slots: u32) {
        let mut s = self.state.lock();
        s.slots.resize(slots as usize, None);
        for (slot, r) in found {
            let entry = NewEntry {
                key: r.key,
                slot: *slot,
                len: r.len,
                expires_ms: r.expires_ms,
                sums: &r.sums[..sum_count(r.len)],
                pinned: r.pinned,
                verified: false,
            };
            s.used += cost(r.len);
            s.resident += cost(r.len);
            s.generation = s.generation.max(r.generation);
            s.link(Arc::new(Entry::new(&self.shared, entry)), false);
        }
        // From the end, so that low slots are used first and the files stay short.
        let free = (0..slots).rev().filter(|i| s.slots[*i as usize].is_none()).collect();
        s.free.adopt(slots, free);
    }

    /// Finds an entry and counts the hit; also says whether it counted as a request of its own and not as a continuation of the
    /// last one. An entry past its time is removed and not found.
    pub(super) fn get(&self, key: &SegmentKey) -> Option<(Arc<Entry>, bool)> {
        let mut s = self.state.lock();
        let entry = s.find(key)?.clone();
        if !entry.pinned.load(Relaxed) {
            if entry.expires_ms != 0 && entry.expires_ms <= self.clock.now_ms() {
                drop(entry);
                let gone = s.unlink(key);
                drop(s);
                self.counters.removed(self.shared.tier, Removal::Ttl, gone.is_some() as u64);
                return None;
            }
            return Some((entry.clone(), s.policy.hit(entry.slot)));
        }
        Some((entry, false))
    }

    /// Finds an entry without counting a hit.
    pub(super) fn peek(&self, key: &SegmentKey) -> Option<Arc<Entry>> {
        self.state.lock().find(key).cloned()
    }

    /// A client read the segment in shared memory: a hit, if it is still there.
    pub(super) fn touch(&self, at: u64, seal: u64) {
        let Some(share) = &self.shared.share else { return };
        let slot = at / SEGMENT_BYTES as u64;
        let mut guard = self.state.lock();
        let s = &mut *guard;
        // The seal is broken only after the entry has left the table, so under the lock an entry and its seal belong together.
        if let Some(Some(entry)) = s.slots.get(slot as usize)
            && share.seals.get(slot) == Some(seal)
            && !entry.pinned.load(Relaxed)
        {
            s.policy.hit(slot as u32);
        }
    }

    /// What is handed to clients of this host, if the tier can be shared.
    pub(super) fn share(&self) -> Option<&Share> {
        self.shared.share.as_ref()
    }

    /// Tells the policy that another tier answered a request for the key.
    pub(super) fn seen(&self, key: &SegmentKey) {
        self.state.lock().policy.seen(key_hash(key));
    }

    /// Stores a segment: makes room among what `may_go`, writes, and only then lets it be found. What had to go
    /// and is still guarded is in limbo.
    pub(super) fn put(&self, r: &PutRequest<'_>, may_go: &dyn Fn(&Entry) -> bool) -> Result<Arc<Entry>, BypassReason> {
        if self.ejected() {
            return Err(BypassReason::Ejected);
        }
        let mut out = Vec::new();
        let claimed = self.claim(r, may_go, &mut out);
        self.counters.removed(self.shared.tier, Removal::Capacity, out.len() as u64);
        drop(out);
        if let Some(existing) = claimed? {
            if r.pinned {
                self.pin(&r.key, true);
            }
            return Ok(existing);
        }
        self.reclaim();
        let (slot, generation) = self.take_slot(r.len)?;
        if let Err(e) = self.write(slot, generation, r) {
            self.give_back(slot, r.len);
            self.io_error(&e);
            return Err(BypassReason::IoError);
        }
        self.shared.errors.store(0, Relaxed);
        self.publish(slot, r)
    }

    /// Would the policy take the key in, without a trial? Counts a request for it if `fetched` (an answer of another tier is
    /// counted by `seen`).
    pub(super) fn admits(&self, key: &SegmentKey, len: u32, fetched: bool) -> bool {
        let mut s = self.state.lock();
        if self.ejected() || s.map.contains_key(key) {
            return false;
        }
        let full = s.resident + cost(len) > self.resident_limit(&s);
        let c = Candidate { full, ..candidate(key, len, false) };
        if fetched {
            s.policy.seen(c.hash);
        }
        s.policy.admit(c)
    }

    /// Takes a punched slot and counts the claimed room as used; on failure the claim is undone.
    fn take_slot(&self, len: u32) -> Result<(u32, u64), BypassReason> {
        let bytes = cost(len);
        let mut s = self.state.lock();
        let whole = len == SEGMENT_BYTES;
        let slots = s.free.charged(Some(whole));
        if s.used + bytes + self.slot_bytes(slots) > s.limit || slots > SLOTS_MAX as u64 {
            s.resident -= bytes;
            return Err(BypassReason::Busy);
        }
        s.used += bytes;
        s.generation += 1;
        Ok((s.free.take(whole), s.generation))
    }

    fn write(&self, slot: u32, generation: u64, r: &PutRequest<'_>) -> std::io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = r.pieces.iter().map(|p| IoSlice::new(p)).collect();
        let mut rest = &mut slices[..];
        let mut at = slot_offset(slot);
        if let Some(whole) = self.shared.whole.as_ref().filter(|_| WholeFile::has(slot)) {
            whole.prepare(slot)?;
        }
        let file = self.shared.file(slot);
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(libc::UIO_MAXIOV as usize)];
            match rustix::io::pwritev(file, batch, at) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    at += n as u64;
                    IoSlice::advance_slices(&mut rest, n);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let Some(index) = &self.index else { return Ok(()) };
        let mut sums = [0; GRANULES_PER_SEGMENT];
        sums[..r.sums.len()].copy_from_slice(r.sums);
        let (key, len, pinned, expires_ms) = (r.key, r.len, r.pinned, r.expires_ms);
        index.write(slot, &Record { key, len, pinned, generation, expires_ms, sums })
    }

    /// Lets a written slot be found.
    fn publish(&self, slot: u32, r: &PutRequest<'_>) -> Result<Arc<Entry>, BypassReason> {
        let fresh = NewEntry {
            key: r.key,
            slot,
            len: r.len,
            expires_ms: r.expires_ms,
            sums: r.sums,
            pinned: r.pinned,
            verified: true,
        };
        let entry = Arc::new(Entry::new(&self.shared, fresh));
        let mut s = self.state.lock();
        // Another writer of the same key was faster, or the tier was ejected: ours is freed by its drop, outside the lock.
        let existing = s.find(&r.key).cloned();
        if existing.is_some() || self.ejected() {
            s.resident -= cost(r.len);
            return existing.ok_or(BypassReason::Ejected);
        }
        s.link(entry.clone(), r.trial);
        // The room of a full file system comes back slowly, so that one failed write does not shrink the tier for good.
        s.limit = (s.limit + cost(r.len) / 64).min(self.quota.load(Relaxed));
        Ok(entry)
    }

    /// Undoes `take_slot` after a failed write.
    fn give_back(&self, slot: u32, len: u32) {
        self.shared.freed.lock().push(Freed { slot, len, in_limbo: false });
        self.state.lock().resident -= cost(len);
        self.reclaim();
    }

    /// Clears, punches and frees the slots whose last guard is gone.
    pub(super) fn reclaim(&self) {
        let _one_at_a_time = self.reclaim.lock();
        let freed = std::mem::take(&mut *self.shared.freed.lock());
        if freed.is_empty() || self.ejected() {
            return;
        }
        let mut done = Vec::with_capacity(freed.len());
        for f in freed {
            if let Some(share) = &self.shared.share {
                share.seals.break_seal(f.slot as u64);
            }
            let cleared = self.index.as_ref().map_or(Ok(()), |i| i.clear(f.slot));
            match cleared.and_then(|()| punch(self.shared.file(f.slot), f.slot..f.slot + 1)) {
                Ok(()) => done.push(f),
                // Its room stays counted: what the file system did not take back is not ours to give.
                Err(e) => self.io_error(&e),
            }
        }
        let mut s = self.state.lock();
        for f in done {
            s.used -= cost(f.len);
            if f.in_limbo {
                s.limbo -= cost(f.len);
            }
            s.free.give(f.slot);
        }
    }

    /// What `slots` slots take beside their bytes.
    fn slot_bytes(&self, slots: u64) -> u64 {
        match (&self.index, &self.shared.whole) {
            (Some(_), _) => index_bytes(slots),
            (None, Some(_)) => slots * MARKER_BYTES,
            (None, None) => 0,
        }
    }

    /// Removes one entry; true if it was there.
    pub(super) fn remove(&self, key: &SegmentKey, why: Removal) -> bool {
        let gone = self.state.lock().unlink(key);
        let found = gone.is_some();
        drop(gone);
        self.counters.removed(self.shared.tier, why, found as u64);
        self.reclaim();
        found
    }

    /// Removes everything that is not pinned; how many entries went.
    pub(super) fn evict_all(&self) -> u64 {
        let mut s = self.state.lock();
        let keys: Vec<SegmentKey> =
            s.slots.iter().flatten().filter(|e| !e.pinned.load(Relaxed)).map(|e| e.key).collect();
        let gone: Vec<_> = keys.iter().filter_map(|k| s.unlink(k)).collect();
        drop(s);
        let count = gone.len() as u64;
        drop(gone);
        self.counters.removed(self.shared.tier, Removal::Asked, count);
        self.reclaim();
        count
    }

    /// Pins or unpins; true if the key is here.
    pub(super) fn pin(&self, key: &SegmentKey, pinned: bool) -> bool {
        let mut guard = self.state.lock();
        let s = &mut *guard;
        let Some(entry) = s.find(key).cloned() else { return false };
        if entry.pinned.swap(pinned, Relaxed) == pinned {
            return true;
        }
        if pinned {
            s.pinned += cost(entry.len);
            s.policy.remove(entry.slot);
        } else {
            s.pinned -= cost(entry.len);
            s.policy.insert(entry.slot, candidate(key, entry.len, false));
        }
        drop(guard);
        // Our reference keeps the slot from being reused while its record is rewritten.
        if let Some(Err(e)) = self.index.as_ref().map(|i| i.set_pinned(entry.slot, pinned)) {
            self.io_error(&e);
        }
        true
    }

    /// Entries in `slots` slots from `from` on that no other tier was asked to take, up to `bytes`; and where to go on.
    pub(super) fn not_offered(&self, from: u32, slots: u32, bytes: u64) -> (Vec<Arc<Entry>>, Option<u32>) {
        let s = self.state.lock();
        let end = (s.slots.len() as u32).min(from.saturating_add(slots));
        let (mut found, mut sum) = (Vec::new(), 0);
        for at in from..end {
            let Some(e) = s.slots[at as usize].as_ref().filter(|e| !e.offered.load(Relaxed)) else { continue };
            sum += cost(e.len);
            if sum > bytes && !found.is_empty() {
                return (found, Some(at));
            }
            found.push(e.clone());
        }
        (found, (end < s.slots.len() as u32).then_some(end))
    }

    /// Calls `each` for every entry of `content`, whose segments are `0..segments`.
    pub(super) fn of_content(&self, content: ContentId, segments: u32, each: &mut dyn FnMut(&Entry)) {
        let s = self.state.lock();
        if segments as usize > s.map.len() {
            s.slots.iter().flatten().filter(|e| e.key.content == content).for_each(|e| each(e));
        } else {
            (0..segments).filter_map(|index| s.find(&SegmentKey { content, index })).for_each(|e| each(e));
        }
    }

    /// A guard found bytes that do not match their checksum.
    pub(super) fn drop_corrupt(&self, entry: &Arc<Entry>) {
        if self.remove_exactly(entry) {
            self.counters.corrupt(self.shared.tier, 1);
            self.counters.removed(self.shared.tier, Removal::Corrupt, 1);
            tracing::warn!(tier = self.name, content = %entry.key.content, segment = entry.key.index,
                "cached segment does not match its checksum; dropped, it will be fetched again");
        }
    }

    /// A guard could not be read.
    pub(super) fn read_failed(&self, entry: &Arc<Entry>, e: &std::io::Error) {
        if self.remove_exactly(entry) {
            self.counters.removed(self.shared.tier, Removal::IoError, 1);
        }
        self.io_error(e);
    }

    /// Removes this entry, not a newer one of the same key.
    fn remove_exactly(&self, entry: &Arc<Entry>) -> bool {
        let mut s = self.state.lock();
        if !s.find(&entry.key).is_some_and(|e| Arc::ptr_eq(e, entry)) {
            return false;
        }
        let gone = s.unlink(&entry.key);
        drop(s);
        gone.is_some()
    }

    /// Counts a failure of the file system below; too many in a row take the tier out of use.
    fn io_error(&self, e: &std::io::Error) {
        if matches!(e.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded) {
            // The file system has less room than the quota: evict from now on. Never below room for one segment, so that the
            // tier is tried again.
            let mut s = self.state.lock();
            let slots = s.free.charged(None);
            let least = self.reserve + self.slot_bytes(slots + INDEX_SLACK_SLOTS) + SEGMENT_BYTES as u64;
            s.limit = s.limit.min((s.used + self.slot_bytes(slots)).max(least));
        }
        let n = self.shared.errors.fetch_add(1, Relaxed) + 1;
        if n == 1 {
            tracing::warn!(tier = self.name, error = %e, "cache tier failed; the segment is bypassed");
        }
        if n >= ERRORS_MAX && !self.ejected.swap(true, Relaxed) {
            tracing::error!(tier = self.name, errors = n, error = %e,
                "cache tier taken out of use after repeated errors; replace the disk or make room, then restart the worker");
            self.eject();
        }
    }

    /// Takes the tier out of use: nothing is found in it or stored in it until it is opened again.
    pub(super) fn eject(&self) {
        self.ejected.store(true, Relaxed);
        let mut s = self.state.lock();
        let keys: Vec<SegmentKey> = s.map.keys().copied().collect();
        let gone: Vec<_> = keys.iter().filter_map(|k| s.unlink(k)).collect();
        drop(s);
        self.counters.removed(self.shared.tier, Removal::IoError, gone.len() as u64);
    }

    /// Has the tier been taken out of use?
    pub(super) fn ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }

    pub(super) fn tier(&self) -> Tier {
        self.shared.tier
    }

    /// Memory taken by the table, the entries and the policy, allocator rounding included.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        let s = self.state.lock();
        s.memory_bytes()
    }

    pub(super) fn stats(&self) -> TierStats {
        self.reclaim();
        let s = self.state.lock();
        TierStats {
            tier: self.shared.tier,
            name: self.name.clone(),
            capacity_bytes: self.quota.load(Relaxed),
            used_bytes: s.used + self.slot_bytes(s.free.charged(None)),
            segments: s.map.len() as u64,
            pinned_bytes: s.pinned,
            ejected: self.ejected(),
        }
    }
}

/// Makes a range of slots a hole.
pub(super) fn punch(data: &File, slots: std::ops::Range<u32>) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    let bytes = slots.len() as u64 * SEGMENT_BYTES as u64;
    fallocate(data, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, slot_offset(slots.start), bytes)?;
    Ok(())
}

/// Do the lengths of a request fit together?
pub(super) fn well_formed(pieces: &[&[u8]], sums: &[u32]) -> Option<u32> {
    let len: usize = pieces.iter().map(|p| p.len()).sum();
    let len = u32::try_from(len).ok().filter(|n| (1..=SEGMENT_BYTES).contains(n))?;
    (sum_count(len) == sums.len()).then_some(len)
}
