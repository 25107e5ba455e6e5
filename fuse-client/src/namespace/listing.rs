//! A directory's entries as an immutable snapshot: sorted by name, with the time until which it may be believed.
//! Every open directory reads the snapshot it began with, so offsets are stable whatever changes meanwhile. Where names change under us, offsets are made of the names
//! themselves: so they also lead on in another snapshot, which a successor process has.

use super::Seen;
use efc_common::node::Entry;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A snapshot of a directory.
#[derive(Debug)]
pub struct Listing {
    entries: Vec<Entry>,
    /// Position of each name and its place in `entries`, in the order of positions; made when it is needed.
    by_position: OnceLock<Vec<(u64, u32)>>,
    /// Version given by the worker; 0 when the origin was asked directly.
    pub version: u64,
    seen: Seen,
    bytes: u64,
}

impl Listing {
    /// A snapshot of `entries` (any order, unique names) as the origin was seen.
    pub fn new(mut entries: Vec<Entry>, version: u64, seen: Seen) -> Self {
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let heap: usize = entries.iter().map(|e| e.name.len() + e.node.locator.len() + e.node.version.len()).sum();
        let bytes = (entries.len() * std::mem::size_of::<Entry>() + heap) as u64;
        Listing { entries, by_position: OnceLock::new(), version, seen, bytes }
    }

    /// The same entries, confirmed by the origin.
    pub fn renewed(&self, seen: Seen) -> Self {
        let entries = self.entries.clone();
        Listing { entries, by_position: OnceLock::new(), version: self.version, seen, bytes: self.bytes }
    }

    /// The entry of a name.
    pub fn find(&self, name: &[u8]) -> Option<&Entry> {
        self.entries.binary_search_by(|e| e.name.as_ref().cmp(name)).ok().map(|i| &self.entries[i])
    }

    /// All entries, by name.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entries after a position, each with its own; the first are those after 0. `by_name`: positions are made of names and are the same in all snapshots of a directory, else
    /// they count.
    pub fn after(&self, position: u64, by_name: bool) -> Box<dyn Iterator<Item = (u64, &Entry)> + '_> {
        if !by_name {
            let first = usize::try_from(position).unwrap_or(usize::MAX);
            return Box::new(self.entries.iter().enumerate().skip(first).map(|(i, e)| (i as u64 + 1, e)));
        }
        let order = self.by_position.get_or_init(|| {
            let mut all: Vec<_> = (0u32..).zip(&self.entries).map(|(i, e)| (position_of(&e.name), i)).collect();
            all.sort_unstable();
            all
        });
        let first = order.partition_point(|(p, _)| *p <= position);
        Box::new(order[first..].iter().map(|(p, i)| (*p, &self.entries[*i as usize])))
    }

    /// What the origin's word is worth.
    pub fn seen(&self) -> Seen {
        self.seen
    }

    /// How much longer it may be believed; zero when it is too old.
    pub fn freshness(&self) -> Duration {
        self.seen.fresh_until.saturating_duration_since(Instant::now())
    }

    /// Approximate heap bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// From 1 to 2^62: a file offset with room for what comes before the entries. Two names of one directory share it once in 4 billion directories of 2^15 names; of those one may be
/// passed over where a page ends between them.
fn position_of(name: &[u8]) -> u64 {
    (xxhash_rust::xxh3::xxh3_64(name) >> 2) + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::time::Duration;

    #[test]
    fn finds_by_name_and_ages() {
        let entry =
            |n: &'static str| Entry { name: Bytes::from_static(n.as_bytes()), node: super::super::tests::file(n, "1") };
        let l = Listing::new(
            vec![entry("b"), entry("a"), entry("c-d")],
            1,
            Seen::at(Instant::now(), Duration::from_secs(60)),
        );
        assert!(l.find(b"a").is_some() && l.find(b"c-d").is_some() && l.find(b"c").is_none());
        assert_eq!(l.entries()[0].name.as_ref(), b"a");
        assert!(l.freshness() > Duration::from_secs(50));
        assert_eq!(l.renewed(Seen::at(Instant::now(), Duration::ZERO)).freshness(), Duration::ZERO);
    }

    #[test]
    fn positions_of_names_lead_on_in_another_snapshot() {
        let entry = |n: usize| Entry { name: format!("f{n}").into(), node: super::super::tests::file("f", "1") };
        let seen = Seen::at(Instant::now(), Duration::ZERO);
        let all = Listing::new((0..100).map(entry).collect(), 1, seen);
        let mut first: Vec<_> = all.after(0, true).take(40).map(|(p, e)| (p, e.name.clone())).collect();
        let (position, _) = first.last().cloned().expect("forty");
        // Those that were read are removed meanwhile.
        let rest = (0..100).map(entry).filter(|e| !first.iter().any(|(_, n)| *n == e.name));
        let rest = Listing::new(rest.collect(), 2, seen);
        first.extend(rest.after(position, true).map(|(p, e)| (p, e.name.clone())));
        let mut names: Vec<_> = first.into_iter().map(|(_, n)| n).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 100);
        assert_eq!(all.after(98, false).map(|(p, _)| p).collect::<Vec<_>>(), [99, 100]);
    }
}
