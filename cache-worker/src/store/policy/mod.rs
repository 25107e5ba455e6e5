//! Eviction policies: which entry has to go. Pure and synchronous: no I/O, no clock, no lock of their own; a slab calls them under
//! its state lock. Entries are known by their slot number, so that lists are links in one array and a hit allocates nothing.
//!
//! What must stay true: a policy names as victim only entries it was given by `insert` and that neither `remove` nor `victim` has
//! taken away; pinned entries are not given to it at all.

mod arc;
mod list;
mod lru;
mod scan;
mod sketch;
#[cfg(test)]
mod tests;

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
    pub(super) hash: u32,
    /// Bytes of room it takes.
    pub(super) cost: u32,
    /// Would something have to be evicted for it?
    pub(super) full: bool,
    /// May the policy take it in for a trial (a window)? If not, it must be worth more than what it displaces.
    pub(super) trial: bool,
}

/// The trait; see the module's text.
pub(super) trait EvictionPolicy: Send {
    /// Someone wants to store a key: is it worth its room?
    fn admit(&mut self, candidate: Candidate) -> bool;
    /// The candidate (or an entry found at start-up, or unpinned) is stored as `id`.
    fn insert(&mut self, id: u32, candidate: Candidate);
    /// `id` was asked for. False if the policy takes it for a part of the request before it.
    fn hit(&mut self, id: u32) -> bool;
    /// `id` is gone or pinned.
    fn remove(&mut self, id: u32);
    /// Chooses an entry that is `usable` to make room for `candidate`, and forgets it. Looks at a bounded number of entries.
    fn victim(&mut self, candidate: Candidate, usable: &mut dyn FnMut(u32) -> bool) -> Option<u32>;
    /// The tier may hold `capacity` bytes of entries from now on.
    fn resize(&mut self, capacity: u64);
    /// A key that is not here was asked for: it was fetched, or another tier answered.
    fn seen(&mut self, hash: u32);
    /// Memory taken.
    #[cfg(test)]
    fn memory_bytes(&self) -> usize;
}

/// How many entries `victim` looks at before it gives up.
const VICTIM_SCAN_MAX: usize = 256;

/// The policy of a tier that may hold `capacity` bytes of entries.
pub(super) fn build(policy: Policy, capacity: u64) -> Box<dyn EvictionPolicy> {
    match policy {
        Policy::ScanResistant => Box::new(scan::ScanResistant::new(capacity)),
        Policy::Arc => Box::new(arc::Arc::new(capacity)),
        Policy::Lru => Box::<lru::Lru>::default(),
    }
}
