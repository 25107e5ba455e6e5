//! Least recently used first. A scan larger than the cache leaves nothing useful behind; here for comparison and for
//! workloads known to be recency-bound.

use super::list::Lists;
use super::{Candidate, EvictionPolicy, VICTIM_SCAN_MAX};

/// One list by recency.
#[derive(Default)]
pub(super) struct Lru {
    list: Lists<1>,
}

impl EvictionPolicy for Lru {
    fn resize(&mut self, _: u64) {}

    fn admit(&mut self, _: Candidate) -> bool {
        true
    }

    fn insert(&mut self, id: u32, c: Candidate) {
        self.list.add(id, 0, c.hash, c.cost, 0);
    }

    fn hit(&mut self, id: u32) -> bool {
        self.list.move_to(id, 0);
        true
    }

    fn remove(&mut self, id: u32) {
        self.list.unlink(id);
    }

    fn victim(&mut self, _: Candidate, usable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        let id = self.list.oldest(0, VICTIM_SCAN_MAX, usable)?;
        self.list.unlink(id);
        Some(id)
    }

    fn seen(&mut self, _: u32) {}

    #[cfg(test)]
    fn memory_bytes(&self) -> usize {
        self.list.memory_bytes()
    }
}
