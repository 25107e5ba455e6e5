//! Who gives way in a slab: how many bytes its entries may take, and which of them go for a new one or when the tier shrinks. Table work only; what has gone is freed by its last guard.

use super::super::BypassReason;
use super::super::counters::Removal;
use super::super::policy::Candidate;
use super::super::segment::Entry;
use super::super::table::{Table, candidate, cost};
use super::{INDEX_SLACK_SLOTS, PutRequest, SLOTS_MAX, Slab};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

impl Slab {
    /// Bytes that entries in the table may take.
    pub(super) fn resident_limit(&self, s: &Table) -> u64 {
        s.limit.saturating_sub(self.reserve + self.slot_bytes(s.free.charged(None) + INDEX_SLACK_SLOTS))
    }

    /// Gives the tier another quota, in bytes. What is too much goes at once, but for what is pinned, or guarded and too much for limbo; that goes when it can.
    pub(in super::super) fn resize(&self, quota: u64) {
        let mut out = Vec::new();
        let mut guard = self.state.lock();
        let s = &mut *guard;
        self.quota.store(quota, Relaxed);
        s.limit = quota;
        s.policy.resize(quota.saturating_sub(self.reserve));
        let limit = self.resident_limit(s);
        // For nobody in particular.
        let anybody = Candidate { hash: 0, cost: 0, full: true, trial: false };
        while s.resident > limit && self.evict_one(s, anybody, &|_| true, &mut out) {}
        drop(guard);
        self.counters.removed(self.shared.tier, Removal::Capacity, out.len() as u64);
        drop(out);
        self.reclaim();
    }

    /// Evicts one of what `may_go` to make room for `c`. False if there is none.
    fn evict_one(
        &self,
        s: &mut Table,
        c: Candidate,
        may_go: &dyn Fn(&Entry) -> bool,
        out: &mut Vec<Arc<Entry>>,
    ) -> bool {
        let (slots, limbo) = (&s.slots, s.limbo);
        let mut usable = |id: u32| {
            let Some(e) = &slots[id as usize] else { return false };
            may_go(e) && (Arc::strong_count(e) == 1 || limbo + cost(e.len) <= self.reserve)
        };
        let Some(id) = s.policy.victim(c, &mut usable) else { return false };
        if let Some(entry) = s.slots[id as usize].take() {
            s.map.remove(&entry.key);
            s.forget(&entry);
            out.push(entry);
        }
        true
    }

    /// Evicts until `r` fits among the residents, and claims its room. `Ok(Some)` when the key is there already.
    pub(super) fn claim(
        &self,
        r: &PutRequest<'_>,
        may_go: &dyn Fn(&Entry) -> bool,
        out: &mut Vec<Arc<Entry>>,
    ) -> Result<Option<Arc<Entry>>, BypassReason> {
        let bytes = cost(r.len);
        let mut guard = self.state.lock();
        let s = &mut *guard;
        if let Some(entry) = s.find(&r.key) {
            return Ok(Some(entry.clone()));
        }
        let limit = self.resident_limit(s);
        let full = s.resident + bytes > limit || s.map.len() >= SLOTS_MAX as usize;
        if s.pinned + bytes > limit {
            return Err(BypassReason::Busy);
        }
        let c = Candidate { full, ..candidate(&r.key, r.len, r.trial) };
        if !r.admitted {
            s.policy.seen(c.hash);
            if !s.policy.admit(c) && !r.pinned {
                return Err(BypassReason::NotAdmitted);
            }
        }
        while s.resident + bytes > limit || s.map.len() >= SLOTS_MAX as usize {
            if !self.evict_one(s, c, may_go, out) {
                return Err(BypassReason::Busy);
            }
        }
        s.resident += bytes;
        Ok(None)
    }
}
