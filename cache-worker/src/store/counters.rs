//! What the store counts: for `CacheStat` answers and for Prometheus, in one place.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use efc_common::metrics::{Counter, counter};

use super::{BypassReason, Tier};

/// Why an entry left a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removal {
    Capacity,
    Ttl,
    Corrupt,
    Asked,
    IoError,
}

impl Removal {
    fn label(self) -> &'static str {
        match self {
            Removal::Capacity => "capacity",
            Removal::Ttl => "ttl",
            Removal::Corrupt => "corrupt",
            Removal::Asked => "asked",
            Removal::IoError => "io_error",
        }
    }
}

/// Counters of one store since it was opened.
pub(super) struct Counters {
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) corrupt: AtomicU64,
    pub(super) evictions: AtomicU64,
    pub(super) bypassed: AtomicU64,
    memory_hit: Counter,
    memory_miss: Counter,
    disk_hit: Counter,
    disk_miss: Counter,
}

impl Counters {
    pub(super) fn new() -> Self {
        let request = |tier: &'static str, outcome: &'static str| counter!("efc_cache_requests_total", "tier" => tier, "outcome" => outcome);
        Counters {
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            bypassed: AtomicU64::new(0),
            memory_hit: request("memory", "hit"),
            memory_miss: request("memory", "miss"),
            disk_hit: request("disk", "hit"),
            disk_miss: request("disk", "miss"),
        }
    }

    pub(super) fn looked_up(&self, tier: Tier, hit: bool) {
        match (tier, hit) {
            (Tier::Memory, true) => self.memory_hit.increment(1),
            (Tier::Memory, false) => self.memory_miss.increment(1),
            (Tier::Disk(_), true) => self.disk_hit.increment(1),
            (Tier::Disk(_), false) => self.disk_miss.increment(1),
        }
        if hit {
            self.hits.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn missed(&self) {
        self.misses.fetch_add(1, Relaxed);
    }

    pub(super) fn removed(&self, tier: Tier, why: Removal, count: u64) {
        if count > 0 {
            self.evictions.fetch_add(count, Relaxed);
            counter!("efc_cache_evictions_total", "tier" => tier.label(), "reason" => why.label()).increment(count);
        }
    }

    pub(super) fn corrupt(&self, tier: Tier, count: u64) {
        if count > 0 {
            self.corrupt.fetch_add(count, Relaxed);
            counter!("efc_cache_corrupt_total", "tier" => tier.label()).increment(count);
        }
    }

    pub(super) fn bypassed(&self, reason: BypassReason) {
        self.bypassed.fetch_add(1, Relaxed);
        counter!("efc_cache_bypass_total", "reason" => reason.label()).increment(1);
    }
}
