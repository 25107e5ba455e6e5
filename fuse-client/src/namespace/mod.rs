//! Inode numbers and what they name.
//!
//! On a read-only mount a file's node names one *version* of it, for good: a file that changed at the origin is a new node, as after an
//! editor's rename-over. So the kernel's pages of one node always belong to one version, an open file reads its old bytes to the end (or
//! gets ESTALE), and nothing has to be invalidated. On a read-write mount ([`Nodes::Follow`]) a node names the *file*, under all its names, and its
//! version moves: by our own changes, and when the origin shows another one. A directory's node names its path.
//!
//! Life of a node: [`Namespace::intern`] hands it to the kernel and counts; FORGET counts down; at zero it is dead and goes. The kernel
//! looks only at ids it holds, so an unknown id is a bug or a late request and is answered ESTALE.
//!
//! Lock order: a directory's `children`, then a shard of the table, then what is inside a node. Of two directories the lower id first. No lock is
//! held across an await.

pub mod change;
pub mod checkpoint;
pub mod listing;

use crate::journal::Journal;
use bytes::Bytes;
use change::{Changes, Update};
use checkpoint::wire;
use efc_common::id::{ContentId, SourceId};
use efc_common::lease::{DirKey, GrantNumber};
use efc_common::node::{Attr, FileKind, Node};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Node id of the mount's root (the FUSE protocol fixes it).
pub const ROOT_ID: u64 = 1;
const SHARDS: usize = 32;

/// What the node of a file stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nodes {
    /// One version of it (read-only mounts).
    Versions,
    /// The file itself, whose version moves (read-write mounts).
    Follow {
        /// Are locators paths? Then a file has as many as names; else it has one, which no other file ever gets.
        paths: bool,
    },
}

/// What a node is at the moment: an immutable snapshot, replaced whole.
#[derive(Debug)]
pub struct Content {
    /// How the backend finds it.
    pub locator: Bytes,
    /// Which content; empty for directories.
    pub version: Bytes,
    /// Attributes.
    pub attr: Attr,
    /// Until when a following node's attributes may be believed without asking.
    pub fresh_until: Instant,
    id: OnceLock<ContentId>,
}

impl Content {
    fn new(node: Node, fresh_until: Instant) -> Arc<Content> {
        let Node { locator, version, attr } = node;
        Arc::new(Content { locator, version, attr, fresh_until, id: OnceLock::new() })
    }

    /// Its identity in the cache, computed once.
    pub fn id(&self, source: SourceId) -> ContentId {
        *self.id.get_or_init(|| ContentId::new(source, &self.locator, &self.version))
    }
}

/// A name of a node in a directory.
#[derive(Debug, Clone)]
pub struct Dentry {
    /// The directory.
    pub parent: Arc<Inode>,
    /// The name in it.
    pub name: Bytes,
}

impl Dentry {
    fn is(&self, dir: &Inode, name: &[u8]) -> bool {
        self.parent.id == dir.id && self.name == name
    }
}

/// The names a node is known by. Nearly always one, which costs no allocation.
#[derive(Debug, Default)]
struct Names {
    first: Option<Dentry>,
    more: Vec<Dentry>,
}

impl Names {
    fn add(&mut self, new: Dentry) {
        if self.iter().any(|d| d.is(&new.parent, &new.name)) {
            return;
        }
        match &self.first {
            None => self.first = Some(new),
            Some(_) => self.more.push(new),
        }
    }

    fn remove(&mut self, dir: &Inode, name: &[u8]) {
        self.more.retain(|d| !d.is(dir, name));
        if self.first.as_ref().is_some_and(|d| d.is(dir, name)) {
            self.first = self.more.pop();
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Dentry> {
        self.first.iter().chain(&self.more)
    }
}

/// What a node id names.
#[derive(Debug)]
pub struct Inode {
    /// Node id; applications see it as the inode number.
    pub id: u64,
    /// Type.
    pub kind: FileKind,
    names: Mutex<Names>,
    now: RwLock<Arc<Content>>,
    changes: Mutex<Changes>,
    lookups: AtomicU64,
    stale: AtomicBool,
    /// The kernel may hold pages of an older version: the next open does not keep them.
    pub pages_old: AtomicBool,
    /// Under leases: it was found under its name, or known by its number, since its lease is held.
    pub placed: AtomicBool,
    /// Under leases: others moved it away, and it is not known where to.
    lost: AtomicBool,
    /// Of a directory.
    pub dir: Option<DirState>,
    /// Reads that wait for a lease: the kernel holds pages for them, which are empty until they are answered.
    pub waiting_reads: Mutex<Vec<Range<u64>>>,
    /// Changes of the length that wait for a lease: the kernel writes no page until they are answered, and drops none that it has to write.
    pub waiting_lengths: AtomicUsize,
    /// Drops of its pages that the kernel is at: it writes first what was changed through a mapping, and waits for that.
    pub dropping: AtomicUsize,
    /// Held by whoever changes content under leases; shared by those who read past the kernel's pages: they see whole changes, and only such as the attributes tell of.
    pub content: tokio::sync::RwLock<()>,
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
    /// What it is leased by, and the locator that this was made of.
    pub lease_key: Mutex<Option<(Bytes, DirKey)>>,
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

    /// Names were changed by ourselves: listings made before now are wrong.
    pub fn changed(&self) {
        *self.distrusted.lock() = Some(Instant::now());
    }

    /// Was the origin asked at `asked` after everything known to have changed?
    pub fn is_newer_than_changes(&self, asked: Instant) -> bool {
        self.distrusted.lock().is_none_or(|t| asked > t)
    }

    /// How old a listing may be to be accepted: `ttl`, or less when older ones are distrusted.
    pub fn max_age(&self, ttl: Duration) -> Duration {
        self.distrusted.lock().map_or(ttl, |t| ttl.min(t.elapsed()))
    }
}

impl Inode {
    fn new(id: u64, name: Option<Dentry>, node: Node, fresh_until: Instant, lookups: u64) -> Self {
        let kind = node.attr.kind;
        Inode {
            id,
            kind,
            names: Mutex::new(Names { first: name, more: Vec::new() }),
            now: RwLock::new(Content::new(node, fresh_until)),
            changes: Mutex::default(),
            lookups: AtomicU64::new(lookups),
            stale: AtomicBool::new(false),
            pages_old: AtomicBool::new(false),
            placed: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            dir: (kind == FileKind::Directory).then(DirState::default),
            waiting_reads: Mutex::default(),
            waiting_lengths: AtomicUsize::new(0),
            dropping: AtomicUsize::new(0),
            content: tokio::sync::RwLock::default(),
            streams: Mutex::new(None),
        }
    }

    /// What it is at the moment.
    pub fn now(&self) -> Arc<Content> {
        self.now.read().clone()
    }

    /// Attributes.
    pub fn attr(&self) -> Attr {
        self.now.read().attr.clone()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.now.read().attr.size
    }

    /// How the backend finds it.
    pub fn locator(&self) -> Bytes {
        self.now.read().locator.clone()
    }

    /// The directory it is known to be in and its name there; `None` for the root and for what has no name any more.
    pub fn dentry(&self) -> Option<Dentry> {
        self.names.lock().first.clone()
    }

    /// Replaces the attributes of a directory, or of a following node.
    pub fn set_attr(&self, attr: Attr) {
        let mut now = self.now.write();
        let node = Node { locator: now.locator.clone(), version: now.version.clone(), attr };
        *now = Content::new(node, now.fresh_until);
    }

    /// Path below the mount point, for messages; bytes that are not UTF-8 are shown as U+FFFD.
    pub fn path(&self) -> String {
        let mut parts = Vec::new();
        let mut at = self.dentry();
        if at.is_none() && self.id != ROOT_ID {
            return format!("(removed node {})", self.id);
        }
        while let Some(d) = at {
            parts.push(String::from_utf8_lossy(&d.name).into_owned());
            at = d.parent.dentry();
        }
        parts.reverse();
        format!("/{}", parts.join("/"))
    }

    /// Is it still the version that `node` says?
    fn is_version(&self, node: &Node) -> bool {
        let now = self.now.read();
        self.kind == node.attr.kind
            && now.locator == node.locator
            && now.version == node.version
            && !self.stale.load(Ordering::Acquire)
    }

    /// Was it moved away by others, nobody knows where to?
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Is it the file that `node` says, in whatever version?
    pub fn is_file(&self, node: &Node) -> bool {
        let now = self.now.read();
        self.kind == node.attr.kind && now.locator == node.locator && now.attr.fileid == node.attr.fileid
    }

    /// Counts one look-up more, unless the node is dead already.
    fn revive(&self) -> bool {
        self.lookups.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n > 0).then_some(n + 1)).is_ok()
    }
}

/// What the origin said of a node, and how long it may be believed.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// When the origin was asked: changes of our own that ended later are newer.
    pub asked: Instant,
    /// Until when its word holds.
    pub fresh_until: Instant,
    /// The newest grant of the mount at that time: what is leased without a gap since then is still so.
    pub since: GrantNumber,
}

impl Seen {
    /// Asked at `asked`, believed for `ttl` from then on.
    pub fn at(asked: Instant, ttl: Duration) -> Seen {
        Seen { asked, fresh_until: asked + ttl, since: GrantNumber::default() }
    }

    /// The same word, not to be believed any longer.
    pub fn doubted(self) -> Seen {
        Seen { fresh_until: self.asked, ..self }
    }
}

/// How an answer of the origin may be used that is about to be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Belief {
    /// How long it may be believed; zero: it is not remembered, and nothing remembered is used.
    pub ttl: Duration,
    /// How old it may be already, if others asked.
    pub max_age: Duration,
    /// The newest grant of the mount, on mounts with leases.
    pub since: GrantNumber,
}

impl Belief {
    /// Of a mount without leases.
    pub fn for_time(ttl: Duration) -> Belief {
        Belief { ttl, max_age: ttl, since: GrantNumber::default() }
    }

    /// Nothing is remembered.
    pub const NONE: Belief = Belief { ttl: Duration::ZERO, max_age: Duration::ZERO, since: GrantNumber(0) };

    /// What is asked for now.
    pub fn seen(self) -> Seen {
        Seen { since: self.since, ..Seen::at(Instant::now(), self.ttl) }
    }
}

/// All nodes the kernel may name.
#[derive(Debug)]
pub struct Namespace {
    nodes: Nodes,
    shards: Vec<RwLock<HashMap<u64, Arc<Inode>>>>,
    /// Files known to have several names, by the origin's number, so that each of their names leads to the one node (following nodes only).
    linked: Mutex<HashMap<u64, u64>>,
    next_id: AtomicU64,
    count: AtomicU64,
    journal: Option<Arc<Journal>>,
}

impl Namespace {
    /// A namespace that holds the root.
    pub fn new(root: Node, nodes: Nodes) -> Self {
        let ns = Namespace::empty(ROOT_ID + 1, nodes);
        // The kernel never forgets the root.
        ns.insert(Arc::new(Inode::new(ROOT_ID, None, root, Instant::now(), 1)));
        ns
    }

    fn empty(next_id: u64, nodes: Nodes) -> Self {
        let shards = (0..SHARDS).map(|_| RwLock::default()).collect();
        Namespace {
            nodes,
            shards,
            linked: Mutex::default(),
            next_id: AtomicU64::new(next_id),
            count: AtomicU64::new(0),
            journal: None,
        }
    }

    /// From now on everything is written down there.
    pub fn write_down(&mut self, journal: Arc<Journal>) {
        self.journal = Some(journal);
    }

    /// To be held while something is changed and written down.
    fn changing(&self) -> Option<RwLockReadGuard<'_, ()>> {
        self.journal.as_ref().map(|j| j.changing())
    }

    /// What is written down of a node is no longer so.
    fn note(&self, inode: &Inode) {
        if let Some(journal) = &self.journal {
            journal.moved(&wire(inode));
        }
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

    /// Do nodes follow their files?
    pub fn follows(&self) -> bool {
        matches!(self.nodes, Nodes::Follow { .. })
    }

    /// The node for `name` in `dir`, which is `node` at the origin: the one the kernel knows when it still names the same thing, else a new one.
    /// Counts one look-up: to be called once for each entry that is sent to the kernel. True: the node is known in another version than the kernel may have pages of.
    pub fn intern(&self, dir: &Arc<Inode>, name: &Bytes, node: &Node, seen: Seen) -> (Arc<Inode>, bool) {
        let Some(state) = &dir.dir else {
            unreachable!("names are interned in directories only");
        };
        let _changing = self.changing();
        let mut children = state.children.lock();
        let known = children.get(name).and_then(|id| self.get(*id));
        if let Some(known) = known {
            let same = if self.follows() { known.is_file(node) } else { known.is_version(node) };
            if same && known.revive() {
                if let Some(journal) = &self.journal {
                    journal.seen(known.id);
                }
                let moved = match self.nodes {
                    Nodes::Follow { .. } => self.refresh(&known, node, seen) == Update::Moved,
                    Nodes::Versions => {
                        if known.dir.is_some() {
                            known.set_attr(node.attr.clone());
                        }
                        false
                    }
                };
                return (known, moved);
            }
            // The node of an old version is still open under this name.
            if self.follows() {
                known.names.lock().remove(dir, name);
                self.note(&known);
            }
        }
        if let Some(other) = self.other_name(node)
            && other.revive()
        {
            other.names.lock().add(Dentry { parent: dir.clone(), name: name.clone() });
            other.lost.store(false, Ordering::Release);
            children.insert(name.clone(), other.id);
            let moved = self.refresh(&other, node, seen) == Update::Moved;
            if let Some(journal) = &self.journal {
                journal.seen(other.id);
            }
            self.note(&other);
            return (other, moved);
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let dentry = Dentry { parent: dir.clone(), name: name.clone() };
        let inode = Arc::new(Inode::new(id, Some(dentry), node.clone(), seen.fresh_until, 1));
        self.insert(inode.clone());
        children.insert(name.clone(), id);
        if let Some(journal) = &self.journal {
            journal.node(&wire(&inode));
        }
        drop(children);
        self.note_links(&inode, &node.attr);
        (inode, false)
    }

    /// The node of a name, if the kernel knows it.
    pub fn child(&self, dir: &Inode, name: &[u8]) -> Option<Arc<Inode>> {
        let id = *dir.dir.as_ref()?.children.lock().get(name)?;
        self.get(id)
    }

    /// The nodes that the kernel knows in a directory.
    pub fn children(&self, dir: &Inode) -> Vec<Arc<Inode>> {
        let Some(state) = &dir.dir else { return Vec::new() };
        let ids: Vec<u64> = state.children.lock().values().copied().collect();
        ids.into_iter().filter_map(|id| self.get(id)).collect()
    }

    /// A node and everything the kernel knows below it.
    pub fn below(&self, top: &Arc<Inode>) -> Vec<Arc<Inode>> {
        let mut all = vec![top.clone()];
        let mut next = 0;
        while let Some(at) = all.get(next).cloned() {
            next += 1;
            all.extend(self.children(&at));
        }
        all
    }

    /// The kernel forgets `count` look-ups of a node.
    pub fn forget(&self, id: u64, count: u64) {
        self.forget_some(id, count, |known| {
            debug_assert!(known >= count, "kernel forgot {count} of {known} look-ups of node {id}");
            true
        });
    }

    /// The kernel does not hold a node that was counted `count` times: nobody will forget it. True if no look-up came in between, and it is gone.
    pub fn forget_all(&self, id: u64, count: u64) -> bool {
        self.forget_some(id, count, |known| known == count)
    }

    fn forget_some(&self, id: u64, count: u64, may: impl Fn(u64) -> bool) -> bool {
        if id == ROOT_ID {
            return false;
        }
        let Some(inode) = self.get(id) else { return false };
        let _changing = self.changing();
        let take = |n: u64| (n > 0 && may(n)).then(|| n.saturating_sub(count));
        let Ok(before) = inode.lookups.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) else { return false };
        if let Some(journal) = &self.journal {
            journal.forgotten(id, count);
        }
        if before > count {
            return true;
        }
        // Dead: `revive` refuses it from now on, so nobody can hand it out while it is taken apart.
        let names = std::mem::take(&mut *inode.names.lock());
        for d in names.iter() {
            if let Some(dir) = &d.parent.dir {
                let mut children = dir.children.lock();
                if children.get(&d.name) == Some(&id) {
                    children.remove(&d.name);
                }
            }
        }
        let fileid = inode.now.read().attr.fileid;
        let mut linked = self.linked.lock();
        if linked.get(&fileid) == Some(&id) {
            linked.remove(&fileid);
        }
        drop(linked);
        if self.shard(id).write().remove(&id).is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        true
    }

    /// The origin no longer has this version of a node: the next look-up makes a new one even if the listing looks the same. True the first time.
    pub fn mark_stale(&self, inode: &Inode) -> bool {
        let first = !inode.stale.swap(true, Ordering::AcqRel);
        if first && let Some(journal) = &self.journal {
            journal.stale(inode.id);
        }
        first
    }

    /// All of them, parents before their children.
    pub fn all(&self) -> Vec<Arc<Inode>> {
        let mut all: Vec<_> = self.shards.iter().flat_map(|s| s.read().values().cloned().collect::<Vec<_>>()).collect();
        all.sort_by_key(|i| i.id);
        all
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use efc_common::node::Time;
    use proptest::prelude::*;

    pub(crate) fn file(locator: &str, version: &str) -> Node {
        Node {
            locator: Bytes::copy_from_slice(locator.as_bytes()),
            version: Bytes::copy_from_slice(version.as_bytes()),
            attr: Attr::object(10, Time::default()),
        }
    }

    pub(crate) fn seen() -> Seen {
        Seen::at(Instant::now(), Duration::from_secs(1))
    }

    pub(crate) fn dir(locator: &str) -> Node {
        Node {
            locator: Bytes::copy_from_slice(locator.as_bytes()),
            version: Bytes::new(),
            attr: Attr::prefix(Time::default()),
        }
    }

    #[test]
    fn the_same_version_keeps_its_node_and_a_new_one_gets_another() {
        let ns = Namespace::new(dir(""), Nodes::Versions);
        let root = ns.root();
        let name = Bytes::from_static(b"f");
        let a = ns.intern(&root, &name, &file("f", "1"), seen()).0;
        assert_eq!(ns.intern(&root, &name, &file("f", "1"), seen()).0.id, a.id);
        let b = ns.intern(&root, &name, &file("f", "2"), seen()).0;
        assert_ne!(a.id, b.id);
        // The old node lives as long as the kernel holds it, and does not take the new one's name along.
        assert!(ns.get(a.id).is_some());
        ns.forget(a.id, 2);
        assert!(ns.get(a.id).is_none());
        assert_eq!(ns.intern(&root, &name, &file("f", "2"), seen()).0.id, b.id);
    }

    #[test]
    fn a_stale_node_is_replaced_even_if_the_listing_is_old() {
        let ns = Namespace::new(dir(""), Nodes::Versions);
        let name = Bytes::from_static(b"f");
        let a = ns.intern(&ns.root(), &name, &file("f", "1"), seen()).0;
        assert!(ns.mark_stale(&a) && !ns.mark_stale(&a));
        assert_ne!(ns.intern(&ns.root(), &name, &file("f", "1"), seen()).0.id, a.id);
    }

    #[test]
    fn paths() {
        let ns = Namespace::new(dir(""), Nodes::Versions);
        let d = ns.intern(&ns.root(), &Bytes::from_static(b"d"), &dir("d/"), seen()).0;
        let f = ns.intern(&d, &Bytes::from_static(b"f"), &file("d/f", "1"), seen()).0;
        assert_eq!((ns.root().path(), f.path()), ("/".into(), "/d/f".into()));
    }

    proptest! {
        /// Random look-ups and forgets leave exactly the nodes with a positive count.
        #[test]
        fn counts_balance(ops in proptest::collection::vec((0u8..6, 0u8..3, any::<bool>()), 0..200)) {
            let ns = Namespace::new(dir(""), Nodes::Versions);
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
                    let i = ns.intern(&root, &name, &file(&format!("{n}"), &format!("{version}")), seen()).0;
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
