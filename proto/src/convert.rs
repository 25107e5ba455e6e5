//! Conversions between wire messages and house types; the only place that knows both.

use crate::{control, data};
use bytes::Bytes;
use efc_common::node::{Attr, Entry, FileKind, LOCATOR_BYTES_MAX, Node, Time, VERSION_BYTES_MAX};
use efc_common::policy::CachePolicy;
use efc_common::{Error, Kind, Result};

/// A dataset's cache policy; none given is the default.
pub fn cache_policy(p: Option<control::CachePolicy>) -> CachePolicy {
    let p = p.unwrap_or_default();
    let ttl = (p.ttl_seconds > 0).then(|| std::time::Duration::from_secs(p.ttl_seconds));
    CachePolicy { ttl, pin: p.pin }
}

fn kind_code(k: FileKind) -> u32 {
    match k {
        FileKind::File => 0,
        FileKind::Directory => 1,
        FileKind::Symlink => 2,
        FileKind::Fifo => 3,
        FileKind::Socket => 4,
        FileKind::CharDevice => 5,
        FileKind::BlockDevice => 6,
    }
}

/// A node for the wire.
pub fn node_to_wire(n: &Node) -> data::Node {
    data::Node {
        locator: n.locator.clone(),
        version: n.version.clone(),
        kind: kind_code(n.attr.kind),
        size: n.attr.size,
        mtime_secs: n.attr.mtime.secs,
        mtime_nanos: n.attr.mtime.nanos,
        ctime_secs: n.attr.ctime.secs,
        ctime_nanos: n.attr.ctime.nanos,
        mode: n.attr.mode,
        uid: n.attr.uid,
        gid: n.attr.gid,
        nlink: n.attr.nlink,
        fileid: n.attr.fileid,
        used: n.attr.used,
        atime_secs: n.attr.atime.map(|t| t.secs),
        atime_nanos: n.attr.atime.map_or(0, |t| t.nanos),
        rdev: n.attr.rdev,
    }
}

/// A node from the wire.
///
/// # Errors
/// [`Kind::Corrupt`] for values the house types exclude.
pub fn node_from_wire(n: data::Node) -> Result<Node> {
    let bad = |what: &'static str| Err(Error::new(Kind::Corrupt, what));
    let kind = match n.kind {
        0 => FileKind::File,
        1 => FileKind::Directory,
        2 => FileKind::Symlink,
        3 => FileKind::Fifo,
        4 => FileKind::Socket,
        5 => FileKind::CharDevice,
        6 => FileKind::BlockDevice,
        _ => return bad("node of unknown kind"),
    };
    if n.locator.len() > LOCATOR_BYTES_MAX || n.version.len() > VERSION_BYTES_MAX {
        return bad("node with an oversized locator or version");
    }
    if n.mtime_nanos >= 1_000_000_000 || n.ctime_nanos >= 1_000_000_000 || n.atime_nanos >= 1_000_000_000 {
        return bad("node with an impossible time");
    }
    let attr = Attr {
        kind,
        size: n.size,
        mtime: Time { secs: n.mtime_secs, nanos: n.mtime_nanos },
        ctime: Time { secs: n.ctime_secs, nanos: n.ctime_nanos },
        mode: n.mode,
        uid: n.uid,
        gid: n.gid,
        nlink: n.nlink,
        fileid: n.fileid,
        used: n.used,
        atime: n.atime_secs.map(|secs| Time { secs, nanos: n.atime_nanos }),
        rdev: n.rdev,
    };
    Ok(Node { locator: n.locator, version: n.version, attr })
}

/// An entry for the wire.
pub fn entry_to_wire(e: &Entry) -> data::Entry {
    data::Entry { name: e.name.clone(), node: Some(node_to_wire(&e.node)) }
}

/// An entry from the wire.
///
/// # Errors
/// [`Kind::Corrupt`] for a name that cannot be a directory entry or a bad node.
pub fn entry_from_wire(e: data::Entry) -> Result<Entry> {
    if !valid_name(&e.name) {
        return Err(Error::new(Kind::Corrupt, "entry with an impossible name"));
    }
    let node = node_from_wire(e.node.ok_or_else(|| Error::new(Kind::Corrupt, "entry without a node"))?)?;
    Ok(Entry { name: e.name, node })
}

/// May `name` stand in a directory?
pub fn valid_name(name: &Bytes) -> bool {
    !name.is_empty() && name.as_ref() != b"." && name.as_ref() != b".." && !name.iter().any(|b| *b == b'/' || *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nodes_survive(locator in proptest::collection::vec(any::<u8>(), 0..64), size: u64, secs: i64,
                         nanos in 0u32..1_000_000_000, mode: Option<u32>, kind in 0u32..4) {
            let wire = data::Node { locator: locator.into(), kind, size, mtime_secs: secs, mtime_nanos: nanos, mode,
                                    ..Default::default() };
            let node = node_from_wire(wire.clone()).expect("valid");
            prop_assert_eq!(node_to_wire(&node), wire);
        }
    }

    #[test]
    fn impossible_values_are_refused() {
        assert!(node_from_wire(data::Node { kind: 9, ..Default::default() }).is_err());
        assert!(node_from_wire(data::Node { mtime_nanos: 1_000_000_000, ..Default::default() }).is_err());
        assert!(
            node_from_wire(data::Node { locator: vec![0; LOCATOR_BYTES_MAX + 1].into(), ..Default::default() })
                .is_err()
        );
        for name in ["", ".", "..", "a/b", "a\0b"] {
            let e = data::Entry { name: Bytes::from_static(name.as_bytes()), node: Some(data::Node::default()) };
            assert!(entry_from_wire(e).is_err(), "{name:?}");
        }
    }
}
