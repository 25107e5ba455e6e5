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
    asked: Instant,
    fresh_until: Instant,
    bytes: u64,
}

impl Listing {
    /// A snapshot of `entries` (any order, unique names) for which the origin was asked at `asked` and which may be believed for `ttl` from then on.
    pub fn new(mut entries: Vec<Entry>, version: u64, asked: Instant, ttl: Duration) -> Self {
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let heap: usize = entries.iter().map(|e| e.name.len() + e.node.locator.len() + e.node.version.len()).sum();
        let bytes = (entries.len() * std::mem::size_of::<Entry>() + heap) as u64;
        Listing { entries, version, asked, fresh_until: asked + ttl, bytes }
    }

    /// The same entries, confirmed by the origin at `asked`.
    pub fn renewed(&self, asked: Instant, ttl: Duration) -> Self {
        let entries = self.entries.clone();
        Listing { entries, version: self.version, asked, fresh_until: asked + ttl, bytes: self.bytes }
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
        Seen { asked: self.asked, fresh_until: self.fresh_until }
    }

    /// How much longer it may be believed; zero when it is too old.
    pub fn freshness(&self) -> Duration {
        self.fresh_until.saturating_duration_since(Instant::now())
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

    #[test]
    fn finds_by_name_and_ages() {
        let entry =
            |n: &'static str| Entry { name: Bytes::from_static(n.as_bytes()), node: super::super::tests::file(n, "1") };
        let l = Listing::new(vec![entry("b"), entry("a"), entry("c-d")], 1, Instant::now(), Duration::from_secs(60));
        assert!(l.find(b"a").is_some() && l.find(b"c-d").is_some() && l.find(b"c").is_none());
        assert_eq!(l.entries()[0].name.as_ref(), b"a");
        assert!(l.freshness() > Duration::from_secs(50));
        assert_eq!(l.renewed(Instant::now(), Duration::ZERO).freshness(), Duration::ZERO);
    }
}
