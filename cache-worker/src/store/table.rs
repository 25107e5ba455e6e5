//! The table of one slab, as it is under the slab's state lock: which key is in which slot, what the bytes add up to, and the policy
//! that is told of every change. No I/O here.
//!
//! Every entry is in `map` and `slots` or in neither; an entry in them is in the policy unless it is pinned.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use efc_common::id::SegmentKey;

use super::policy::{Candidate, EvictionPolicy};
use super::segment::Entry;
use super::whole::WholeFile;

/// Room a file system gives at least.
const PAGE_BYTES: u64 = 4096;

/// Room an entry of `len` bytes takes.
pub(super) fn cost(len: u32) -> u64 {
    (len as u64).next_multiple_of(PAGE_BYTES)
}

/// Keys are hashes already: folding them is enough.
#[derive(Default)]
pub(super) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for c in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..c.len()].copy_from_slice(c);
            self.0 = (self.0.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

/// The hash a policy knows a key by.
pub(super) fn key_hash(key: &SegmentKey) -> u32 {
    use std::hash::Hash;
    let mut h = KeyHasher::default();
    key.hash(&mut h);
    (h.finish() >> 16) as u32
}

pub(super) type KeyMap = HashMap<SegmentKey, u32, BuildHasherDefault<KeyHasher>>;

/// Slots without an entry: punched ones, and those that never had one. With a file of whole segments beside the data file
/// ([`super::whole`]) the odd slots are for those, the even ones for the rest.
pub(super) struct Free {
    punched: [Vec<u32>; 2],
    /// The first slot of each kind that was never used.
    next: [u32; 2],
    split: bool,
}

impl Free {
    /// No slot was ever used.
    pub(super) fn new(split: bool) -> Free {
        Free { punched: Default::default(), next: [0, 1], split }
    }

    /// Slots `0..slots` of a data file, of which `free` have no entry; the last of them is taken first.
    pub(super) fn adopt(&mut self, slots: u32, free: Vec<u32>) {
        debug_assert!(!self.split, "what a restart finds lies in one file");
        self.punched[0] = free;
        self.next[0] = slots;
    }

    fn kind(&self, whole: bool) -> usize {
        (self.split && whole) as usize
    }

    /// A slot for a segment, which is `whole` or not.
    pub(super) fn take(&mut self, whole: bool) -> u32 {
        let kind = self.kind(whole);
        self.punched[kind].pop().unwrap_or_else(|| {
            let slot = self.next[kind];
            self.next[kind] += 1 + self.split as u32;
            slot
        })
    }

    /// Takes back a slot that was punched.
    pub(super) fn give(&mut self, slot: u32) {
        self.punched[self.kind(WholeFile::has(slot))].push(slot);
    }

    /// Slots that take room beside their bytes (a record in the index, or a marker), one more counted if [`Free::take`] would
    /// need a new one.
    pub(super) fn charged(&self, taking: Option<bool>) -> u64 {
        let used = if self.split { self.next[1] / 2 } else { self.next[0] };
        used as u64 + taking.is_some_and(|whole| self.punched[self.kind(whole)].is_empty()) as u64
    }

    #[cfg(test)]
    fn memory_bytes(&self) -> usize {
        self.punched.iter().map(|l| l.capacity() * size_of::<u32>()).sum()
    }
}

/// See the module's text.
pub(super) struct Table {
    pub(super) map: KeyMap,
    pub(super) slots: Vec<Option<Arc<Entry>>>,
    /// Slots without an entry.
    pub(super) free: Free,
    pub(super) policy: Box<dyn EvictionPolicy>,
    /// Quota, or less after the file system said that it is full.
    pub(super) limit: u64,
    /// Bytes the data file may occupy: entries, limbo, being written, freed but not punched.
    pub(super) used: u64,
    /// Bytes of entries in the table and of claims on the way into it.
    pub(super) resident: u64,
    pub(super) limbo: u64,
    pub(super) pinned: u64,
    pub(super) generation: u64,
}

/// The key as its policy sees it.
pub(super) fn candidate(key: &SegmentKey, len: u32, trial: bool) -> Candidate {
    Candidate { hash: key_hash(key), cost: cost(len) as u32, full: false, trial }
}

impl Table {
    /// No entries, `limit` bytes.
    pub(super) fn new(policy: Box<dyn EvictionPolicy>, limit: u64, free: Free) -> Self {
        Table {
            map: KeyMap::default(),
            slots: Vec::new(),
            free,
            policy,
            limit,
            used: 0,
            resident: 0,
            limbo: 0,
            pinned: 0,
            generation: 0,
        }
    }

    /// Takes an entry out of the table and the policy.
    pub(super) fn unlink(&mut self, key: &SegmentKey) -> Option<Arc<Entry>> {
        let slot = self.map.remove(key)?;
        let entry = self.slots[slot as usize].take()?;
        self.policy.remove(slot);
        self.forget(&entry);
        Some(entry)
    }

    /// Book-keeping for an entry that has just left the table and the policy.
    pub(super) fn forget(&mut self, entry: &Arc<Entry>) {
        let bytes = cost(entry.len);
        self.resident -= bytes;
        if entry.pinned.load(Relaxed) {
            self.pinned -= bytes;
        }
        // One reference is the caller's; guards are made under the state lock only, so the count cannot grow.
        if Arc::strong_count(entry) > 1 {
            entry.in_limbo.store(true, Relaxed);
            self.limbo += bytes;
        }
    }

    /// Puts an entry into the table, and into the policy unless it is pinned.
    pub(super) fn link(&mut self, entry: Arc<Entry>, trial: bool) {
        let at = entry.slot as usize;
        if at >= self.slots.len() {
            self.slots.resize(at + 1, None);
        }
        self.map.insert(entry.key, entry.slot);
        if entry.pinned.load(Relaxed) {
            self.pinned += cost(entry.len);
        } else {
            self.policy.insert(entry.slot, candidate(&entry.key, entry.len, trial));
        }
        self.slots[at] = Some(entry);
    }

    /// The entry of a key.
    pub(super) fn find(&self, key: &SegmentKey) -> Option<&Arc<Entry>> {
        self.slots[*self.map.get(key)? as usize].as_ref()
    }

    /// Memory taken by the table, the entries and the policy, allocator rounding included.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        // std's table: 8/7 of its capacity in buckets, rounded up to a power of two, one control byte each.
        let buckets = (self.map.capacity() * 8 / 7).next_power_of_two();
        let map = buckets * (size_of::<(SegmentKey, u32)>() + 1);
        let entry = (size_of::<Entry>() + 2 * size_of::<usize>() + size_of::<usize>()).next_multiple_of(16);
        let lists = self.slots.capacity() * size_of::<Option<Arc<Entry>>>() + self.free.memory_bytes();
        map + self.map.len() * entry + lists + self.policy.memory_bytes()
    }
}
