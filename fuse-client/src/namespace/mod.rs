//! Inode numbers and what they name.
//!
//! A node of a file names one *version* of it, for good: locator, version and attributes never change under a node id. A file that
//! changed at the origin is a new node, as after an editor's rename-over. So the kernel's pages of one node always belong to one
//! version, an open file reads its old bytes to the end (or gets ESTALE), and nothing has to be invalidated. A directory's node names its
//! path; its attributes follow the origin.
//!
//! Life of a node: [`Namespace::intern`] hands it to the kernel and counts; FORGET counts down; at zero it goes. The kernel
//! looks only at ids it holds, so an unknown id is a bug or a late request and is answered ESTALE.
//!
//! Lock order: a directory's `children`, then a shard of the table. No lock is held across an await.

pub mod checkpoint;
pub mod listing;

use bytes::Bytes;
use efc_common::node::{Attr, FileKind, Node};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Node id of the mount's root (the FUSE protocol fixes it).
pub const ROOT_ID: u64 = 1;
const SHARDS: usize = 32;

/// What a node id names.
#[derive(Debug)]
pub struct Inode {
    /// Node id; applications see it as the inode number.
    pub id: u64,
    /// The directory it was found in; `None` for the root.
    pub parent: Option<Arc<Inode>>,
    /// Its name there; empty for the root.
    pub name: Bytes,
    /// How the backend finds it.
    pub locator: Bytes,
    /// Which content; empty for directories.
    pub version: Bytes,
    /// Type.
    pub kind: FileKind,
    attr: RwLock<Attr>,
    lookups: AtomicU64,
    stale: AtomicBool,
    /// Of a directory.
    pub dir: Option<DirState>,
    /// Sequential streams over a file, made at the first read.
    pub streams: Mutex<Option<Box<crate::read::stream::Streams>>>,
}

/// What a directory's node has beside.
#[derive(Debug, Default)]
pub struct DirState {
    children: Mutex<HashMap<Bytes, u64>>,
    /// Held by the one task that fetches the listing; the others wait for it and look again.
    pub refresh: tokio::sync::Mutex<()>,
    /// Listings made before this moment are known to be wrong.
    distrusted: Mutex<Option<Instant>>,
}

impl DirState {
    /// Listings made before now are wrong. False, and nothing changes, when that was said less than `pause` ago.
    pub fn distrust(&self, pause: Duration) -> bool {
        let mut at = self.distrusted.lock();
        if at.is_some_and(|t| t.elapsed() < pause) {
            return false;
        }
        *at = Some(Instant::now());
        true
    }

    /// How old a listing may be to be accepted: `ttl`, or less when older ones are distrusted.
    pub fn max_age(&self, ttl: Duration) -> Duration {
        self.distrusted.lock().map_or(ttl, |t| ttl.min(t.elapsed()))
    }
}

impl Inode {
    fn new(id: u64, parent: Option<Arc<Inode>>, name: Bytes, node: Node, lookups: u64) -> Self {
        let dir = (node.attr.kind == FileKind::Directory).then(DirState::default);
        Inode {
            id,
            parent,
            name,
            locator: node.locator,
            version: node.version,
            kind: node.attr.kind,
            attr: RwLock::new(node.attr),
            lookups: AtomicU64::new(lookups),
            stale: AtomicBool::new(false),
            dir,
            streams: Mutex::new(None),
        }
    }

    /// Attributes: fixed for a file, the newest seen for a directory.
    pub fn attr(&self) -> Attr {
        self.attr.read().clone()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.attr.read().size
    }

    /// Replaces a directory's attributes.
    pub fn set_attr(&self, attr: Attr) {
        debug_assert!(self.dir.is_some(), "a file's attributes belong to its version");
        *self.attr.write() = attr;
    }

    /// The origin no longer has this version: the next look-up makes a new node even if the listing looks the same. True the first time.
    pub fn mark_stale(&self) -> bool {
        !self.stale.swap(true, Ordering::AcqRel)
    }

    /// Path below the mount point, for messages; bytes that are not UTF-8 are shown as U+FFFD.
    pub fn path(&self) -> String {
        let mut parts = Vec::new();
        let mut at = self;
        while let Some(parent) = &at.parent {
            parts.push(String::from_utf8_lossy(&at.name).into_owned());
            at = parent;
        }
        parts.reverse();
        format!("/{}", parts.join("/"))
    }

    /// Is it still what `node` says?
    fn is(&self, node: &Node) -> bool {
        self.kind == node.attr.kind
            && self.locator == node.locator
            && self.version == node.version
            && !self.stale.load(Ordering::Acquire)
    }
}

/// All nodes the kernel may name.
#[derive(Debug)]
pub struct Namespace {
    shards: Vec<RwLock<HashMap<u64, Arc<Inode>>>>,
    next_id: AtomicU64,
    count: AtomicU64,
}

impl Namespace {
    /// A namespace that holds the root.
    pub fn new(root: Node) -> Self {
        let ns = Namespace::empty(ROOT_ID + 1);
        // The kernel never forgets the root.
        ns.insert(Arc::new(Inode::new(ROOT_ID, None, Bytes::new(), root, 1)));
        ns
    }

    fn empty(next_id: u64) -> Self {
        let shards = (0..SHARDS).map(|_| RwLock::default()).collect();
        Namespace { shards, next_id: AtomicU64::new(next_id), count: AtomicU64::new(0) }
    }

    fn shard(&self, id: u64) -> &RwLock<HashMap<u64, Arc<Inode>>> {
        &self.shards[id as usize % SHARDS]
    }

    fn insert(&self, inode: Arc<Inode>) {
        self.shard(inode.id).write().insert(inode.id, inode);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// The node of an id.
    pub fn get(&self, id: u64) -> Option<Arc<Inode>> {
        self.shard(id).read().get(&id).cloned()
    }

    /// The root.
    pub fn root(&self) -> Arc<Inode> {
        match self.get(ROOT_ID) {
            Some(root) => root,
            None => unreachable!("the root is inserted at construction and never forgotten"),
        }
    }

    /// Number of nodes.
    pub fn len(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Never: it holds at least the root.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The node for `name` in `dir`, which is `node` at the origin: the one the kernel knows when it still names the same thing, else a new one.
    /// Counts one look-up: to be called once for each entry that is sent to the kernel.
    pub fn intern(&self, dir: &Arc<Inode>, name: &Bytes, node: &Node) -> Arc<Inode> {
        let Some(state) = &dir.dir else {
            unreachable!("names are interned in directories only");
        };
        let mut children = state.children.lock();
        if let Some(known) = children.get(name).and_then(|id| self.get(*id))
            && known.is(node)
        {
            known.lookups.fetch_add(1, Ordering::AcqRel);
            if known.dir.is_some() {
                known.set_attr(node.attr.clone());
            }
            return known;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let inode = Arc::new(Inode::new(id, Some(dir.clone()), name.clone(), node.clone(), 1));
        self.insert(inode.clone());
        children.insert(name.clone(), id);
        inode
    }

    /// The kernel forgets `count` look-ups of a node.
    pub fn forget(&self, id: u64, count: u64) {
        if id == ROOT_ID {
            return;
        }
        let Some(inode) = self.get(id) else { return };
        // The parent's lock keeps `intern` from reviving the node between the count and the removal.
        let mut children = inode.parent.as_ref().and_then(|p| p.dir.as_ref()).map(|d| d.children.lock());
        let before = inode.lookups.fetch_sub(count, Ordering::AcqRel);
        debug_assert!(before >= count, "kernel forgot {count} of {before} look-ups of {}", inode.path());
        if before > count {
            return;
        }
        if let Some(children) = &mut children
            && children.get(&inode.name) == Some(&id)
        {
            children.remove(&inode.name);
        }
        if self.shard(id).write().remove(&id).is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn all(&self) -> Vec<Arc<Inode>> {
        let mut all: Vec<_> = self.shards.iter().flat_map(|s| s.read().values().cloned().collect::<Vec<_>>()).collect();
        all.sort_by_key(|i| i.id);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_common::node::Time;
    use proptest::prelude::*;

    pub(super) fn file(locator: &str, version: &str) -> Node {
        Node {
            locator: Bytes::copy_from_slice(locator.as_bytes()),
            version: Bytes::copy_from_slice(version.as_bytes()),
            attr: Attr::object(10, Time::default()),
        }
    }

    pub(super) fn dir(locator: &str) -> Node {
        Node {
            locator: Bytes::copy_from_slice(locator.as_bytes()),
            version: Bytes::new(),
            attr: Attr::prefix(Time::default()),
        }
    }

    #[test]
    fn the_same_version_keeps_its_node_and_a_new_one_gets_another() {
        let ns = Namespace::new(dir(""));
        let root = ns.root();
        let name = Bytes::from_static(b"f");
        let a = ns.intern(&root, &name, &file("f", "1"));
        assert_eq!(ns.intern(&root, &name, &file("f", "1")).id, a.id);
        let b = ns.intern(&root, &name, &file("f", "2"));
        assert_ne!(a.id, b.id);
        // The old node lives as long as the kernel holds it, and does not take the new one's name along.
        assert!(ns.get(a.id).is_some());
        ns.forget(a.id, 2);
        assert!(ns.get(a.id).is_none());
        assert_eq!(ns.intern(&root, &name, &file("f", "2")).id, b.id);
    }

    #[test]
    fn a_stale_node_is_replaced_even_if_the_listing_is_old() {
        let ns = Namespace::new(dir(""));
        let name = Bytes::from_static(b"f");
        let a = ns.intern(&ns.root(), &name, &file("f", "1"));
        assert!(a.mark_stale() && !a.mark_stale());
        assert_ne!(ns.intern(&ns.root(), &name, &file("f", "1")).id, a.id);
    }

    #[test]
    fn paths() {
        let ns = Namespace::new(dir(""));
        let d = ns.intern(&ns.root(), &Bytes::from_static(b"d"), &dir("d/"));
        let f = ns.intern(&d, &Bytes::from_static(b"f"), &file("d/f", "1"));
        assert_eq!((ns.root().path(), f.path()), ("/".into(), "/d/f".into()));
    }

    proptest! {
        /// Random look-ups and forgets leave exactly the nodes with a positive count.
        #[test]
        fn counts_balance(ops in proptest::collection::vec((0u8..6, 0u8..3, any::<bool>()), 0..200)) {
            let ns = Namespace::new(dir(""));
            let root = ns.root();
            let mut held: HashMap<u64, u64> = HashMap::new();
            for (n, version, forget) in ops {
                if forget {
                    if let Some((&id, &count)) = held.iter().next() {
                        ns.forget(id, count);
                        held.remove(&id);
                    }
                } else {
                    let name = Bytes::from(vec![b'a' + n]);
                    let i = ns.intern(&root, &name, &file(&format!("{n}"), &format!("{version}")));
                    *held.entry(i.id).or_default() += 1;
                }
                prop_assert_eq!(ns.len(), held.len() as u64 + 1);
                for id in held.keys() {
                    prop_assert!(ns.get(*id).is_some());
                }
            }
        }
    }
}
