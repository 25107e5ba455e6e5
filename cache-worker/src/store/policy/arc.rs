//! ARC, the adaptive replacement cache (Megiddo and Modha, FAST 2003), with byte costs. T1 holds what was asked for once, T2 what
//! was asked for again; the ghost lists B1 and B2 remember keys that left T1 and T2, and a request for a ghost shifts the target
//! size of T1. One step differs from the paper: the target moves when the key is stored, after its victims were chosen and not
//! before, because storing may still fail.

use std::collections::HashMap;

use super::list::Lists;
use super::{Candidate, EvictionPolicy, VICTIM_SCAN_MAX};

const RECENT: u8 = 0;
const FREQUENT: u8 = 1;

/// The policy. In `live` the lists are T1 and T2 of entries, in `ghosts` B1 and B2 of places of its own.
pub(super) struct Arc {
    capacity: u64,
    /// Target bytes of T1.
    target: u64,
    live: Lists<2>,
    ghosts: Lists<2>,
    ghost_of: HashMap<u32, u32>,
    ghosts_free: Vec<u32>,
    ghosts_made: u32,
}

impl Arc {
    /// For a tier of `capacity` bytes.
    pub(super) fn new(capacity: u64) -> Self {
        Arc {
            capacity,
            target: 0,
            live: Lists::default(),
            ghosts: Lists::default(),
            ghost_of: HashMap::new(),
            ghosts_free: Vec::new(),
            ghosts_made: 0,
        }
    }

    fn ghost_list(&self, hash: u32) -> Option<u8> {
        self.ghosts.get(*self.ghost_of.get(&hash)?).map(|n| n.list)
    }

    fn add_ghost(&mut self, hash: u32, cost: u32, list: u8) {
        self.drop_ghost(hash);
        let place = self.ghosts_free.pop().unwrap_or_else(|| {
            self.ghosts_made += 1;
            self.ghosts_made - 1
        });
        self.ghosts.add(place, list, hash, cost, 0);
        self.ghost_of.insert(hash, place);
    }

    fn drop_ghost(&mut self, hash: u32) {
        if let Some(place) = self.ghost_of.remove(&hash) {
            self.ghosts.unlink(place);
            self.ghosts_free.push(place);
        }
    }

    /// T1 and B1 together stay within the capacity, everything within twice the capacity.
    fn trim(&mut self) {
        while self.live.bytes(RECENT) + self.ghosts.bytes(RECENT) > self.capacity {
            let Some(g) = self.ghosts.get(self.ghosts.tail(RECENT)) else { break };
            self.drop_ghost(g.hash);
        }
        let all = |a: &Arc| (0..2).map(|l| a.live.bytes(l) + a.ghosts.bytes(l)).sum::<u64>();
        while all(self) > 2 * self.capacity {
            let Some(g) = self.ghosts.get(self.ghosts.tail(FREQUENT)) else { break };
            self.drop_ghost(g.hash);
        }
    }
}

impl EvictionPolicy for Arc {
    fn resize(&mut self, capacity: u64) {
        self.capacity = capacity;
        self.target = self.target.min(capacity);
        self.trim();
    }

    fn admit(&mut self, _: Candidate) -> bool {
        true
    }

    fn insert(&mut self, id: u32, c: Candidate) {
        let (b1, b2) = (self.ghosts.bytes(RECENT), self.ghosts.bytes(FREQUENT));
        let step = |more: u64, less: u64| c.cost as u64 * (more / less.max(1)).max(1);
        let list = match self.ghost_list(c.hash) {
            Some(RECENT) => {
                self.target = (self.target + step(b2, b1)).min(self.capacity);
                FREQUENT
            }
            Some(_) => {
                self.target = self.target.saturating_sub(step(b1, b2));
                FREQUENT
            }
            None => RECENT,
        };
        self.drop_ghost(c.hash);
        self.live.add(id, list, c.hash, c.cost, 0);
        self.trim();
    }

    fn hit(&mut self, id: u32) -> bool {
        self.live.move_to(id, FREQUENT);
        true
    }

    fn remove(&mut self, id: u32) {
        self.live.unlink(id);
    }

    fn victim(&mut self, c: Candidate, usable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        let recent = self.live.bytes(RECENT);
        let from_recent = recent > self.target || recent == self.target && self.ghost_list(c.hash) == Some(FREQUENT);
        let order = if from_recent { [RECENT, FREQUENT] } else { [FREQUENT, RECENT] };
        let (id, list) = order.into_iter().find_map(|l| Some((self.live.oldest(l, VICTIM_SCAN_MAX, usable)?, l)))?;
        let node = *self.live.get(id)?;
        self.live.unlink(id);
        self.add_ghost(node.hash, node.cost, list);
        self.trim();
        Some(id)
    }

    fn seen(&mut self, _: u32) {}

    #[cfg(test)]
    fn memory_bytes(&self) -> usize {
        self.live.memory_bytes() + self.ghosts.memory_bytes() + self.ghost_of.capacity() * 9
    }
}
