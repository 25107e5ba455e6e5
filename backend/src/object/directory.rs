//! From list pages to directory pages: keys become names (`crate::names`), and names are unique over *all* pages of a directory.
//!
//! The difficulty: object `a` is called `a%efc-file` when prefix `a/` exists too, and keys between them (`a-x`, `a.txt`) may fill
//! many pages, so that one page cannot tell. Stores list in byte order, so an object `f` is in doubt exactly while the last key seen is
//! smaller than `f/`; then that last key begins with `f`, hence very few objects are in doubt at once. They are held back, travel in the
//! page's `next` token, and come out on the page that decides them. No extra request, no state between calls.
//!
//! SeaweedFS lists by path component (`d/` before `d-x`) and S3 Express in no order; the former cannot hold `a` beside `a/`.
//! S3 Express directory buckets can in principle show `a` twice: they are not supported.

use super::list::{Listing, Object};
use super::version::{Version, file_locator};
use crate::{ListPage, names};
use bytes::Bytes;
use efc_common::node::{Attr, Entry, LOCATOR_BYTES_MAX, Node, Time};
use efc_common::{Error, Kind, Result};
use std::borrow::Cow;
use std::collections::HashSet;

/// Where the next page starts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// The store's continuation token; empty on the first page.
    pub(crate) token: String,
    /// Objects of earlier pages whose names are not decided.
    pub(crate) open: Vec<Object>,
}

const LAYOUT: u8 = 2;

impl Cursor {
    /// The page token.
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = vec![LAYOUT];
        let mut push = |bytes: &[u8]| {
            out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        push(self.token.as_bytes());
        for object in &self.open {
            push(&object.key);
            push(&object.version.encode());
            push(&object.version.mtime_secs.to_le_bytes());
        }
        out.into()
    }

    /// Reads a page token, which may have come over the wire.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Cursor> {
        let bad =
            || Error::new(Kind::Invalid, "not a page token of an object store: list the directory from its start");
        let mut rest = bytes.strip_prefix(&[LAYOUT]).ok_or_else(bad)?;
        let mut pull = || {
            let (len, tail) = rest.split_first_chunk::<4>()?;
            let (piece, tail) = tail.split_at_checked(u32::from_le_bytes(*len) as usize)?;
            rest = tail;
            Some((piece, tail.is_empty()))
        };
        let (token, mut end) = pull().ok_or_else(bad)?;
        let mut cursor = Cursor { token: String::from_utf8(token.to_vec()).map_err(|_| bad())?, open: Vec::new() };
        while !end {
            let (key, _) = pull().ok_or_else(bad)?;
            let (version, _) = pull().ok_or_else(bad)?;
            let (mtime, last) = pull().ok_or_else(bad)?;
            let mtime_secs = i64::from_le_bytes(mtime.try_into().map_err(|_| bad())?);
            let version = Version { mtime_secs, ..Version::decode(version)? };
            cursor.open.push(Object { key: key.to_vec(), version });
            end = last;
        }
        Ok(cursor)
    }
}

/// The node of an object.
pub(crate) fn file_node(object: Object) -> Node {
    let version = object.version.encode();
    let mtime = Time { secs: object.version.mtime_secs, nanos: 0 };
    Node { locator: file_locator(object.key), version, attr: Attr::object(object.version.size, mtime) }
}

/// The node of a prefix; `mtime_secs` is its marker's, 0 where it is not known.
pub(crate) fn directory_node(prefix: Vec<u8>, mtime_secs: i64) -> Node {
    Node { locator: prefix.into(), version: Bytes::new(), attr: Attr::prefix(Time { secs: mtime_secs, nanos: 0 }) }
}

/// Makes the directory page of `dir` (a prefix) out of `listing` and the objects that earlier pages left open.
pub(crate) fn page(dir: &[u8], listing: Listing, open: Vec<Object>) -> ListPage {
    let Listing { objects, prefixes, next, unusable } = listing;
    let mut out =
        ListPage { hidden: unusable.into_iter().map(|(k, why)| (k.into(), why)).collect(), ..ListPage::default() };
    let beside: HashSet<&[u8]> = prefixes.iter().filter_map(|p| p.strip_suffix(b"/")).collect();
    let last = objects.iter().map(|o| &o.key).chain(&prefixes).max().cloned();
    let mut undecided = Vec::new();
    for object in open.into_iter().chain(objects) {
        if object.key == dir && object.version.size == 0 {
            continue; // the directory's marker
        }
        let beside_directory = beside.contains(&object.key[..]);
        if !beside_directory && next.is_some() && !last.as_deref().is_some_and(|l| is_past(l, &object.key)) {
            undecided.push(object);
            continue;
        }
        let end = object.key.len();
        push(&mut out, dir, end, beside_directory, file_node(object));
    }
    for prefix in prefixes {
        let end = prefix.len().saturating_sub(1);
        push(&mut out, dir, end, false, directory_node(prefix, 0));
    }
    out.next = next.map(|token| Cursor { token, open: undecided }.encode());
    out
}

/// Is `last` at or behind `key/`, so that in byte order `key/` cannot come any more?
fn is_past(last: &[u8], key: &[u8]) -> bool {
    last.iter().cmp(key.iter().chain(b"/")).is_ge()
}

/// Adds an entry; its segment is what the locator holds between `dir` and `end`.
fn push(out: &mut ListPage, dir: &[u8], end: usize, beside_directory: bool, node: Node) {
    let segment = match node.locator.get(dir.len()..end) {
        Some(s) if node.locator.starts_with(dir) && !s.contains(&b'/') => s,
        _ => return out.hidden.push((node.locator, "the server listed a key that is not in the directory")),
    };
    let name = names::encode(segment, beside_directory);
    if name.len() > names::NAME_BYTES_MAX || node.locator.len() > LOCATOR_BYTES_MAX {
        return out.hidden.push((node.locator, "the name is longer than 1,024 bytes"));
    }
    let name = match name {
        Cow::Borrowed(n) if n == segment => node.locator.slice(dir.len()..end),
        other => other.into_owned().into(),
    };
    out.entries.push(Entry { name, node });
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_common::node::FileKind;
    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn object(key: &[u8], size: u64) -> Object {
        Object { key: key.to_vec(), version: Version { size, mtime_secs: 7, etag: b"e".to_vec() } }
    }

    /// What a store answers: byte order, delimiter `/`, `max` keys and prefixes a page.
    fn serve(keys: &BTreeMap<Vec<u8>, u64>, dir: &[u8], token: &str, max: usize) -> Listing {
        let skip: usize = token.parse().unwrap_or(0);
        let mut rows: Vec<(Vec<u8>, Option<u64>)> = Vec::new();
        for (key, size) in keys.iter().filter(|(k, _)| k.starts_with(dir)) {
            match key[dir.len()..].iter().position(|b| *b == b'/') {
                Some(at) => rows.push((key[..dir.len() + at + 1].to_vec(), None)),
                None => rows.push((key.clone(), Some(*size))),
            }
        }
        rows.dedup();
        let mut listing = Listing::default();
        for (key, size) in rows.iter().skip(skip).take(max) {
            match size {
                Some(size) => listing.objects.push(object(key, *size)),
                None => listing.prefixes.push(key.clone()),
            }
        }
        listing.next = (skip + max < rows.len()).then(|| (skip + max).to_string());
        listing
    }

    fn key() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![4 => Just(b"a".to_vec()), 2 => Just(b"/".to_vec()), 2 => Just(b"-".to_vec()),
            1 => Just(b".".to_vec()), 1 => Just(b"\0".to_vec()), 1 => Just(b"%efc-file".to_vec()), 1 => Just(b"b".to_vec())];
        vec(piece, 1..6).prop_map(|v| v.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn every_key_has_one_name_over_all_pages(
            keys in btree_set(key(), 0..25), sizes in vec(0u64..2, 25), max in 1usize..5, in_a: bool,
        ) {
            let keys: BTreeMap<Vec<u8>, u64> = keys.into_iter().zip(sizes).collect();
            let dir: &[u8] = if in_a { b"a/" } else { b"" };
            let mut cursor = Cursor::default();
            let mut seen = BTreeSet::new();
            let mut expected = BTreeSet::new();
            for (key, size) in keys.iter().filter(|(k, _)| k.starts_with(dir)) {
                let below = &key[dir.len()..];
                let at = below.iter().position(|b| *b == b'/');
                let segment = below[..at.unwrap_or(below.len())].to_vec();
                let mut beside = [dir, &segment, b"/"].concat();
                let is_beside = keys.keys().any(|k| k.starts_with(&beside));
                match at {
                    Some(_) => expected.insert((segment, false, true)),
                    None if beside.pop().is_some() && *size == 0 && key == dir => false,
                    None => expected.insert((segment, is_beside, false)),
                };
            }
            loop {
                let page = page(dir, serve(&keys, dir, &cursor.token, max), std::mem::take(&mut cursor.open));
                prop_assert!(page.hidden.is_empty());
                for e in page.entries {
                    let s = names::decode(&e.name).expect("a name");
                    prop_assert!(seen.insert((s.bytes, s.beside_directory, e.node.attr.kind == FileKind::Directory)));
                }
                match page.next {
                    Some(next) => cursor = Cursor::decode(&next).expect("own token"),
                    None => break,
                }
            }
            let all: BTreeSet<_> = seen.iter().map(|(s, b, _)| names::encode(s, *b)).collect();
            prop_assert_eq!(all.len(), seen.len(), "names are unique");
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn garbage_tokens_are_refused_or_round_trip(token in vec(any::<u8>(), 0..60)) {
            if let Ok(c) = Cursor::decode(&token) {
                prop_assert_eq!(c.encode(), token);
            }
        }
    }

    #[test]
    fn what_cannot_be_shown_is_reported() {
        let long = [b"d/".to_vec(), vec![b'x'; 1025]].concat();
        let listing = Listing {
            objects: vec![object(&long, 1), object(b"e/outside", 1), object(b"d/ok", 1)],
            unusable: vec![(b"d/bad".to_vec(), "why")],
            ..Listing::default()
        };
        let page = page(b"d/", listing, Vec::new());
        assert_eq!(page.entries.iter().map(|e| &e.name[..]).collect::<Vec<_>>(), [b"ok"]);
        assert_eq!(page.hidden.len(), 3);
    }

    #[test]
    fn marker_with_content_is_an_entry_with_a_locator_of_its_own() {
        let page = page(b"d/", Listing { objects: vec![object(b"d/", 5)], ..Listing::default() }, Vec::new());
        assert_eq!((&page.entries[0].name[..], &page.entries[0].node.locator[..]), (&b"%efc-empty"[..], &b"d/\0"[..]));
    }
}
