//! One page of a flat, sorted key space, as every object store lists it: prefix, delimiter, start, limit. Shared by our servers.

use std::collections::BTreeMap;
use std::ops::Bound;

/// What a LIST asks for.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Only keys that start with it.
    pub prefix: Vec<u8>,
    /// Keys that share the part up to the first delimiter after the prefix become one common prefix. Empty: none.
    pub delimiter: Vec<u8>,
    /// Only names (keys or common prefixes) after it.
    pub after: Vec<u8>,
    /// At most so many names.
    pub limit: usize,
}

/// What a LIST answers.
#[derive(Debug)]
pub struct Page<'a, T> {
    /// Keys with their objects, in key order.
    pub contents: Vec<(&'a [u8], &'a T)>,
    /// Common prefixes, in order.
    pub prefixes: Vec<Vec<u8>>,
    /// The last name of a page that is not the last: the next one starts after it.
    pub next: Option<Vec<u8>>,
}

/// Cuts one page out of `objects`.
pub fn page<'a, T>(objects: &'a BTreeMap<Vec<u8>, T>, query: &Query) -> Page<'a, T> {
    let mut page = Page { contents: Vec::new(), prefixes: Vec::new(), next: None };
    let mut last: &[u8] = &[];
    let mut from = if query.after > query.prefix {
        Bound::Excluded(query.after.clone())
    } else {
        Bound::Included(query.prefix.clone())
    };
    while let Some((key, object)) = objects.range((from, Bound::Unbounded)).next() {
        if !key.starts_with(&query.prefix) {
            break;
        }
        let group = common_prefix(key, query);
        let name = group.unwrap_or(key);
        from = match group {
            Some(group) => Bound::Included(after_all_with(group)),
            None => Bound::Excluded(key.clone()),
        };
        if !query.after.is_empty() && name <= query.after.as_slice() {
            continue;
        }
        if page.contents.len() + page.prefixes.len() == query.limit {
            page.next = (query.limit > 0).then(|| last.to_vec());
            break;
        }
        match group {
            Some(group) => page.prefixes.push(group.to_vec()),
            None => page.contents.push((key, object)),
        }
        last = name;
    }
    page
}

fn common_prefix<'k>(key: &'k [u8], query: &Query) -> Option<&'k [u8]> {
    if query.delimiter.is_empty() {
        return None;
    }
    let rest = &key[query.prefix.len()..];
    let at = rest.windows(query.delimiter.len()).position(|w| w == query.delimiter)?;
    Some(&key[..query.prefix.len() + at + query.delimiter.len()])
}

/// The first key that sorts after every key starting with `prefix`.
fn after_all_with(prefix: &[u8]) -> Vec<u8> {
    let mut next = prefix.to_vec();
    while let Some(last) = next.pop() {
        if last < u8::MAX {
            next.push(last + 1);
            return next;
        }
    }
    // All bytes were 0xff: nothing sorts after them but longer runs of 0xff, which no key has (1,024 bytes is the limit).
    vec![u8::MAX; 2048]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_pages(keys: &[&str], prefix: &str, delimiter: &str, limit: usize) -> Vec<String> {
        let objects: BTreeMap<Vec<u8>, ()> = keys.iter().map(|k| (k.as_bytes().to_vec(), ())).collect();
        let mut query = Query { prefix: prefix.into(), delimiter: delimiter.into(), after: Vec::new(), limit };
        let mut names = Vec::new();
        loop {
            let page = page(&objects, &query);
            assert!(page.contents.len() + page.prefixes.len() <= limit);
            let mut here: Vec<Vec<u8>> = page.contents.iter().map(|(k, _)| k.to_vec()).collect();
            here.extend(page.prefixes);
            here.sort();
            names.extend(here.into_iter().map(|n| String::from_utf8(n).unwrap()));
            match page.next {
                Some(next) => query.after = next,
                None => return names,
            }
        }
    }

    #[test]
    fn every_page_size_gives_the_same_names() {
        let keys = ["a", "a-b", "a/1", "a/2", "a/b/3", "a0", "b//c", "b/d", "\u{ff}/x", "z"];
        for limit in 1..12 {
            assert_eq!(all_pages(&keys, "", "/", limit), ["a", "a-b", "a/", "a0", "b/", "z", "\u{ff}/"], "{limit}");
            assert_eq!(all_pages(&keys, "a/", "/", limit), ["a/1", "a/2", "a/b/"], "{limit}");
            assert_eq!(all_pages(&keys, "b/", "/", limit), ["b//", "b/d"], "{limit}");
            assert_eq!(all_pages(&keys, "a", "", limit), ["a", "a-b", "a/1", "a/2", "a/b/3", "a0"], "{limit}");
        }
    }

    #[test]
    fn limit_zero_is_an_empty_last_page() {
        let objects = BTreeMap::from([(b"a".to_vec(), ())]);
        let page = page(&objects, &Query::default());
        assert!(page.contents.is_empty() && page.next.is_none());
    }
}
