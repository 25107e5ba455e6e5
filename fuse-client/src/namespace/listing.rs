//! A directory's entries as an immutable snapshot: sorted by name, with the time until which it may be believed.
//! Every open directory reads the snapshot it began with, so offsets are stable whatever changes meanwhile.

use super::Seen;
use efc_common::node::Entry;
use std::time::{Duration, Instant};

/// A snapshot of a directory.
#[derive(Debug)]
pub struct Listing {
    entries: Vec<Entry>,
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
        Listing { entries, version, seen, bytes }
    }

    /// The same entries, confirmed by the origin.
    pub fn renewed(&self, seen: Seen) -> Self {
        let entries = self.entries.clone();
        Listing { entries, version: self.version, seen, bytes: self.bytes }
    }

    /// The entry of a name.
    pub fn find(&self, name: &[u8]) -> Option<&Entry> {
        self.entries.binary_search_by(|e| e.name.as_ref().cmp(name)).ok().map(|i| &self.entries[i])
    }

    /// All entries, by name.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
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
}
