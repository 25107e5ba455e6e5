//! The consistent-hash ring: which workers own a block. Pure and immutable; a new membership is a new [`Ring`] with a higher
//! epoch, swapped in whole.
//!
//! Weighted rendezvous hashing (Thaler & Ravishankar 1998; weights after Schindelhauer & Schomaker 2005): every member
//! scores `-weight / ln(h)` with `h` a hash of (key, member) in (0,1), the highest scores own the key. It moves the
//! minimum: when a member joins, only keys it now wins move, a share of weight/total; when it leaves, exactly those go back. It is
//! O(members) per look-up (about 5 ns each), which a few hundred workers afford; no virtual nodes to tune.

use crate::block::block_of;
use crate::id::{ContentId, RingEpoch, WorkerId};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// One worker in the ring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Stable name; placement depends on it and on `weight` only.
    pub id: WorkerId,
    /// Data-plane address `host:port`.
    pub addr: String,
    /// Unix socket of the data plane for clients of the same host, empty if none.
    pub unix: String,
    /// The host the worker runs on, to decide whether `unix` can be used.
    pub host: String,
    /// Failure zone, empty if unknown.
    pub zone: String,
    /// Capacity in MiB, at least 1: the share of keys is proportional to it.
    pub weight: u64,
}

/// An immutable ring of one epoch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ring {
    epoch: RingEpoch,
    members: Vec<Member>,
    seeds: Vec<u64>,
}

impl Ring {
    /// Builds the ring. The order of `members` does not matter; of two with one id the first is kept.
    pub fn new(epoch: RingEpoch, mut members: Vec<Member>) -> Self {
        members.sort_by(|a, b| a.id.cmp(&b.id));
        members.dedup_by(|b, a| a.id == b.id);
        let seeds = members.iter().map(|m| xxh3_64(m.id.0.as_bytes())).collect();
        Ring { epoch, members, seeds }
    }

    /// The epoch under which this ring may be believed.
    pub fn epoch(&self) -> RingEpoch {
        self.epoch
    }

    /// All members, sorted by id.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Has it no members?
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The up to `n` members that own `key`, best first.
    pub fn owners(&self, key: RingKey, n: usize) -> Vec<&Member> {
        let mut best: Vec<(f64, usize)> = Vec::with_capacity(n + 1);
        for (i, (member, seed)) in self.members.iter().zip(&self.seeds).enumerate() {
            // 53 bits, moved off 0 and 1 so that the logarithm is finite and negative.
            let h = xxh3_64_with_seed(&key.0.to_le_bytes(), *seed) >> 11;
            let unit = (h as f64 + 0.5) / (1u64 << 53) as f64;
            let score = -(member.weight.max(1) as f64) / unit.ln();
            let at = best.partition_point(|(s, _)| *s >= score);
            if at < n {
                best.insert(at, (score, i));
                best.truncate(n);
            }
        }
        best.into_iter().map(|(_, i)| &self.members[i]).collect()
    }
}

/// A position on the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RingKey(pub u64);

impl RingKey {
    /// Where the 4 MiB block that holds byte `offset` of `content` lives.
    pub fn block(content: ContentId, offset: u64) -> Self {
        RingKey(xxh3_64_with_seed(&content.0, block_of(offset) as u64))
    }

    /// Where the listing of directory `locator` of a source lives.
    pub fn directory(source: crate::id::SourceId, locator: &[u8]) -> Self {
        RingKey(xxh3_64(&ContentId::of(&[b"dir", &source.0, locator]).0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn ring(weights: &[u64]) -> Ring {
        let members = weights
            .iter()
            .enumerate()
            .map(|(i, w)| Member {
                id: WorkerId(format!("w{i}")),
                addr: format!("h{i}:1"),
                unix: String::new(),
                host: String::new(),
                zone: String::new(),
                weight: *w,
            })
            .collect();
        Ring::new(RingEpoch(1), members)
    }

    fn place(r: &Ring, keys: u64) -> Vec<WorkerId> {
        (0..keys).map(|k| r.owners(RingKey(xxh3_64(&k.to_le_bytes())), 1)[0].id.clone()).collect()
    }

    #[test]
    fn a_fourth_worker_moves_a_quarter_and_leaving_gives_exactly_those_back() {
        let three = place(&ring(&[100, 100, 100]), 40_000);
        let four = place(&ring(&[100, 100, 100, 100]), 40_000);
        let moved = three.iter().zip(&four).filter(|(a, b)| a != b).count();
        assert!((8_800..11_200).contains(&moved), "{moved} of 40000 moved");
        assert!(three.iter().zip(&four).all(|(a, b)| a == b || b.0 == "w3"));
        assert_eq!(place(&ring(&[100, 100, 100]), 40_000), three);
    }

    #[test]
    fn share_follows_weight() {
        let mut count: HashMap<WorkerId, u32> = HashMap::new();
        for id in place(&ring(&[100, 200, 700]), 50_000) {
            *count.entry(id).or_default() += 1;
        }
        for (id, want) in [("w0", 5_000.0), ("w1", 10_000.0), ("w2", 35_000.0)] {
            let got = count[&WorkerId(id.into())] as f64;
            assert!((got / want - 1.0).abs() < 0.06, "{id}: {got} for {want}");
        }
    }

    proptest! {
        #[test]
        fn owners_are_distinct_and_the_second_takes_over(n in 1usize..8, key: u64) {
            let r = ring(&vec![10; n]);
            let two = r.owners(RingKey(key), 2);
            prop_assert_eq!(two.len(), n.min(2));
            if n >= 2 {
                prop_assert_ne!(&two[0].id, &two[1].id);
                let rest = r.members().iter().filter(|m| m.id != two[0].id).cloned().collect();
                let without = Ring::new(RingEpoch(2), rest);
                prop_assert_eq!(&without.owners(RingKey(key), 1)[0].id, &two[1].id);
            }
        }
    }

    #[test]
    fn empty_ring_owns_nothing() {
        assert!(Ring::default().owners(RingKey(1), 2).is_empty());
    }
}
