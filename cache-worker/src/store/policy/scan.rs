//! The default policy: W-TinyLFU (Einziger, Friedman and Manes, 2017) with byte costs. New entries come into a small window by
//! recency; who leaves the window must have been asked for more often than the entry of the main part that would go instead. The
//! main part is a segmented LRU: probation for the once-hit, protected for the rest.
//!
//! Two things are our own. A candidate must lead by [`LEAD_MIN`]: within a pass over the data the keys already visited are one
//! count ahead of the others, and a lead of one is therefore no evidence; with ties (and near-ties) for the resident, a scan of any
//! length leaves the main part alone. And requests that follow another one for the same entry closely count once: a client that
//! reads a segment in 16 pieces has asked for it once.

use super::list::{Lists, NONE};
use super::sketch::Sketch;
use super::{Candidate, EvictionPolicy, VICTIM_SCAN_MAX};

const WINDOW: u8 = 0;
const PROBATION: u8 = 1;
const PROTECTED: u8 = 2;
/// A candidate's count must exceed the resident's by this.
const LEAD_MIN: u64 = 2;
/// A request for an entry counts if more than this many requests for others were counted since its last one (less in a cache of
/// few entries).
const CORRELATED_MAX: u32 = 64;
/// Part of the capacity that is the window: 1 %, but room for a few reads that run ahead, at most a sixteenth.
const WINDOW_BYTES_MIN: u64 = 16 << 20;

/// The policy.
pub(super) struct ScanResistant {
    lists: Lists<3>,
    sketch: Sketch,
    window_bytes: u64,
    protected_bytes: u64,
    /// Counts requests.
    now: u32,
}

/// Bytes of the window, and of the protected part of the rest.
fn parts(capacity: u64) -> (u64, u64) {
    let window = (capacity / 100).max(WINDOW_BYTES_MIN.min(capacity / 16));
    (window, (capacity - window) / 5 * 4)
}

impl ScanResistant {
    /// For a tier of `capacity` bytes.
    pub(super) fn new(capacity: u64) -> Self {
        let (window_bytes, protected_bytes) = parts(capacity);
        ScanResistant { lists: Lists::default(), sketch: Sketch::default(), window_bytes, protected_bytes, now: 0 }
    }

    /// Who of the main part would go: of the two least recent ones the less asked for. The protected half takes part, else a set
    /// that nobody asks for any more would sit there while new entries fight for probation.
    fn main_tail(&self, usable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        let mut tail = |list| self.lists.oldest(list, VICTIM_SCAN_MAX, usable);
        let (probation, protected) = (tail(PROBATION), tail(PROTECTED));
        let count = |id: &u32| self.lists.get(*id).map_or(0, |n| self.sketch.estimate(n.hash));
        [probation, protected].into_iter().flatten().min_by_key(count)
    }

    fn beats(&self, candidate: u32, resident: u32) -> bool {
        self.sketch.estimate(candidate) >= self.sketch.estimate(resident) + LEAD_MIN
    }

    fn count(&mut self, hash: u32) {
        self.now = self.now.wrapping_add(1);
        self.sketch.increment(hash, self.lists.len());
    }

    /// Moves what is too much for a list to the head of the next one.
    fn spill(&mut self, from: u8, limit: u64) {
        while self.lists.bytes(from) > limit {
            let id = self.lists.tail(from);
            if id == NONE {
                return;
            }
            self.lists.move_to(id, PROBATION);
        }
    }

    fn take(&mut self, id: u32) -> Option<u32> {
        self.lists.unlink(id).then_some(id)
    }
}

impl EvictionPolicy for ScanResistant {
    fn resize(&mut self, capacity: u64) {
        (self.window_bytes, self.protected_bytes) = parts(capacity);
        self.spill(PROTECTED, self.protected_bytes);
        self.spill(WINDOW, self.window_bytes);
    }

    fn admit(&mut self, c: Candidate) -> bool {
        if !c.full || c.trial {
            return true;
        }
        let resident = self.main_tail(&mut |_| true).and_then(|id| self.lists.get(id));
        resident.is_none_or(|r| self.beats(c.hash, r.hash))
    }

    fn insert(&mut self, id: u32, c: Candidate) {
        let list = if c.trial { WINDOW } else { PROBATION };
        self.lists.add(id, list, c.hash, c.cost, self.now);
        self.spill(WINDOW, self.window_bytes);
    }

    fn hit(&mut self, id: u32) -> bool {
        let period = (self.lists.len() as u32 / 8).min(CORRELATED_MAX);
        let now = self.now;
        let Some(node) = self.lists.get_mut(id) else { return false };
        let (list, hash) = (node.list, node.hash);
        let counted = now.wrapping_sub(node.stamp) >= period;
        if counted {
            node.stamp = now.wrapping_add(1);
            self.count(hash);
        }
        let to = if list == PROBATION && counted { PROTECTED } else { list };
        self.lists.move_to(id, to);
        self.spill(PROTECTED, self.protected_bytes);
        counted
    }

    fn remove(&mut self, id: u32) {
        self.lists.unlink(id);
    }

    fn victim(&mut self, c: Candidate, usable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        // Half the window, because inserts that are being written are not in it yet.
        if c.trial
            && self.lists.bytes(WINDOW) + c.cost as u64 > self.window_bytes / 2
            && let Some(leaving) = self.lists.oldest(WINDOW, VICTIM_SCAN_MAX, usable)
        {
            let Some(resident) = self.main_tail(usable) else { return self.take(leaving) };
            let hash = |id| self.lists.get(id).map_or(0, |n| n.hash);
            if !self.beats(hash(leaving), hash(resident)) {
                return self.take(leaving);
            }
            self.lists.move_to(leaving, PROBATION);
            return self.take(resident);
        }
        let main = self.main_tail(usable);
        let id = main.or_else(|| self.lists.oldest(WINDOW, VICTIM_SCAN_MAX, usable))?;
        self.take(id)
    }

    fn seen(&mut self, hash: u32) {
        self.count(hash);
    }

    #[cfg(test)]
    fn memory_bytes(&self) -> usize {
        self.lists.memory_bytes() + self.sketch.memory_bytes()
    }
}
