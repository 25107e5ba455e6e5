//! Changes of a namespace whose nodes follow their files: what our own operations did, and what the origin shows.
//!
//! Answers of the origin overlap: an older one may come in later and must not undo what a newer one said. A change of ours therefore
//! begins and ends ([`Inode::begin`]); what the origin was asked *before* a change ended is not taken over afterwards, and changes of one node that overlapped
//! leave its attributes to be asked for anew.

use super::{Content, Dentry, Inode, Namespace, Nodes, Seen};
use bytes::{BufMut, Bytes, BytesMut};
use efc_common::node::{Attr, FileKind, Node};
use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Changes of a node that are under way.
#[derive(Debug, Default)]
pub(super) struct Changes {
    running: u32,
    overlapped: bool,
    /// When the last one ended.
    ended: Option<Instant>,
}

/// What became of an answer of the origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// A change of our own may be newer.
    Refused,
    /// It is the version that was known.
    Kept,
    /// The version moved: pages of the file are old.
    Moved,
}

/// A change of a node that is under way; dropping it unfinished (the change failed) leaves the attributes to be asked for anew.
#[derive(Debug)]
pub struct Change {
    inode: Arc<Inode>,
    finished: bool,
}

impl Change {
    /// The change was made, and the origin says what the node is now; believed for `ttl`.
    pub fn finish(mut self, node: Node, ttl: Duration) {
        self.finished = true;
        self.end(Some((node, ttl)));
    }

    /// There was nothing to change after all.
    pub fn nothing(mut self) {
        self.finished = true;
        let mut changes = self.inode.changes.lock();
        changes.running -= 1;
        if changes.running == 0 {
            changes.overlapped = false;
        }
    }

    fn end(&self, outcome: Option<(Node, Duration)>) {
        let mut changes = self.inode.changes.lock();
        let now = Instant::now();
        changes.running -= 1;
        changes.ended = Some(now);
        let alone = !changes.overlapped;
        if changes.running == 0 {
            changes.overlapped = false;
        }
        let mut content = self.inode.now.write();
        let next = match outcome {
            Some((mut node, ttl)) => {
                // A rename may have moved the node meanwhile; where it is now is known better here.
                node.locator = content.locator.clone();
                if !alone && node.attr.ctime < content.attr.ctime {
                    node = Node { attr: content.attr.clone(), version: content.version.clone(), ..node };
                }
                Content::new(node, if alone { now + ttl } else { now })
            }
            None => {
                let (locator, version) = (content.locator.clone(), content.version.clone());
                Content::new(Node { locator, version, attr: content.attr.clone() }, now)
            }
        };
        *content = next;
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if !self.finished {
            self.end(None);
        }
    }
}

type Children = HashMap<Bytes, u64>;

/// The children of two directories, which may be one, locked in the order of their ids.
struct Both<'a> {
    first: Option<MutexGuard<'a, Children>>,
    second: MutexGuard<'a, Children>,
}

impl<'a> Both<'a> {
    fn lock(first: (u64, &'a Mutex<Children>), second: (u64, &'a Mutex<Children>)) -> Both<'a> {
        if first.0 == second.0 {
            return Both { first: None, second: second.1.lock() };
        }
        if first.0 < second.0 {
            let low = first.1.lock();
            return Both { first: Some(low), second: second.1.lock() };
        }
        let low = second.1.lock();
        Both { first: Some(first.1.lock()), second: low }
    }

    fn first(&mut self) -> &mut Children {
        self.first.as_deref_mut().unwrap_or(&mut self.second)
    }

    fn second(&mut self) -> &mut Children {
        &mut self.second
    }
}

impl Inode {
    /// Begins a change of this node.
    pub fn begin(self: &Arc<Self>) -> Change {
        let mut changes = self.changes.lock();
        changes.running += 1;
        changes.overlapped |= changes.running > 1;
        drop(changes);
        Change { inode: self.clone(), finished: false }
    }

    /// Takes over what the origin says, unless a change of our own may be newer.
    pub(super) fn update(&self, node: &Node, seen: Seen) -> Update {
        let changes = self.changes.lock();
        if changes.ended.is_some_and(|t| seen.asked <= t) {
            return Update::Refused;
        }
        let mut now = self.now.write();
        // While a change runs it may be in this answer or not: good enough where nothing better is known.
        if changes.running > 0 && now.fresh_until > Instant::now() {
            return Update::Refused;
        }
        let fresh_until = if changes.running > 0 { seen.asked } else { seen.fresh_until };
        let moved = now.version != node.version;
        let same = !moved && now.attr == node.attr && now.locator == node.locator;
        if !same || fresh_until > now.fresh_until {
            let node = Node { locator: now.locator.clone(), ..node.clone() };
            *now = Content::new(node, fresh_until);
        }
        if moved { Update::Moved } else { Update::Kept }
    }

    /// Was it changed here less than `pause` ago? Clocks of file systems are coarse: two changes within one tick can give one version, so content is kept under a
    /// version only when the last change is longer ago.
    pub fn is_racy(&self, pause: Duration) -> bool {
        self.changes.lock().ended.is_some_and(|t| t.elapsed() < pause)
    }

    /// Has it the number that the origin gives to what `node` says?
    pub fn has_number(&self, node: &Node) -> bool {
        let fileid = self.now.read().attr.fileid;
        fileid != 0 && fileid == node.attr.fileid && self.kind == node.attr.kind
    }

    /// It is found there from now on.
    fn relocate(&self, locator: Bytes) {
        let mut now = self.now.write();
        let node = Node { locator, version: now.version.clone(), attr: now.attr.clone() };
        *now = Content::new(node, now.fresh_until);
    }

    /// Has no name any more.
    pub fn is_nameless(&self) -> bool {
        self.id != super::ROOT_ID && self.names.lock().first.is_none()
    }

    /// Its attributes are to be asked for at their next use.
    pub fn expire(&self) {
        let mut now = self.now.write();
        let node = Node { locator: now.locator.clone(), version: now.version.clone(), attr: now.attr.clone() };
        *now = Content::new(node, Instant::now());
    }

    /// Its lease goes: nothing of it may be believed any more.
    pub fn doubt(&self) {
        self.placed.store(false, Ordering::Release);
        self.expire();
    }
}

impl Namespace {
    /// Takes over what the origin says of a following node.
    pub fn refresh(&self, inode: &Arc<Inode>, node: &Node, seen: Seen) -> Update {
        let update = inode.update(node, seen);
        self.note_links(inode, &node.attr);
        update
    }

    /// A node is found there from now on.
    pub fn relocate(&self, inode: &Inode, locator: Bytes) {
        let _changing = self.changing();
        inode.relocate(locator);
        self.note(inode);
    }

    /// The name by which a node was known leads elsewhere now, by others' doing. It is found again when its file is looked up by its new name.
    pub fn lose(&self, inode: &Arc<Inode>) {
        let _changing = self.changing();
        let Some(d) = inode.dentry() else { return };
        inode.names.lock().remove(&d.parent, &d.name);
        if let Some(dir) = &d.parent.dir {
            let mut children = dir.children.lock();
            if children.get(&d.name) == Some(&inode.id) {
                children.remove(&d.name);
            }
        }
        let fileid = inode.attr().fileid;
        if inode.is_nameless() {
            inode.lost.store(true, Ordering::Release);
            if fileid != 0 {
                self.linked.lock().insert(fileid, inode.id);
            }
        }
        self.note(inode);
    }

    /// The node that has another name of the file `node`, or had one that was lost. Origins give the number of a removed file to the next one: the locator tells them
    /// apart, where it is not a path.
    pub(super) fn other_name(&self, node: &Node) -> Option<Arc<Inode>> {
        let Nodes::Follow { paths } = self.nodes else { return None };
        if node.attr.kind == FileKind::Directory || node.attr.fileid == 0 {
            return None;
        }
        let id = *self.linked.lock().get(&node.attr.fileid)?;
        let may = |i: &Arc<Inode>| i.kind == node.attr.kind && (node.attr.nlink > 1 || i.is_lost());
        self.get(id).filter(may).filter(|i| paths || i.locator() == node.locator)
    }

    /// Remembers a file that has several names.
    pub fn note_links(&self, inode: &Inode, attr: &Attr) {
        if self.follows() && attr.nlink > 1 && attr.kind != FileKind::Directory && attr.fileid != 0 {
            let before = self.linked.lock().insert(attr.fileid, inode.id);
            if before != Some(inode.id) {
                self.note(inode);
            }
        }
    }

    /// A name was removed. The node it stood for, if the kernel knows it. `locate` gives the locator of another of its names, where locators are paths.
    pub fn removed(
        &self,
        dir: &Inode,
        name: &[u8],
        locate: impl Fn(&Bytes, &[u8]) -> Option<Bytes>,
    ) -> Option<Arc<Inode>> {
        let _changing = self.changing();
        let id = dir.dir.as_ref()?.children.lock().remove(name)?;
        let inode = self.get(id)?;
        let next = {
            let mut names = inode.names.lock();
            names.remove(dir, name);
            names.first.clone()
        };
        if let Some(d) = next
            && let Some(locator) = locate(&d.parent.locator(), &d.name)
        {
            inode.relocate(locator);
        }
        self.note(&inode);
        Some(inode)
    }

    /// A name was moved, replacing what stood at its target. Nodes below a directory whose locators are paths move along.
    pub fn renamed(&self, from: (&Arc<Inode>, &[u8]), to: (&Arc<Inode>, &Bytes), locator: Bytes) {
        let _changing = self.changing();
        let (Some(from_dir), Some(to_dir)) = (&from.0.dir, &to.0.dir) else { return };
        let mut both = Both::lock((from.0.id, &from_dir.children), (to.0.id, &to_dir.children));
        let moved = both.first().remove(from.1);
        let replaced = match moved {
            Some(id) => both.second().insert(to.1.clone(), id),
            None => both.second().remove(to.1),
        };
        drop(both);
        if let Some(old) = replaced.filter(|id| Some(*id) != moved).and_then(|id| self.get(id)) {
            old.names.lock().remove(to.0, to.1);
            self.note(&old);
        }
        if let Some(inode) = moved.and_then(|id| self.get(id)) {
            {
                let mut names = inode.names.lock();
                names.remove(from.0, from.1);
                names.add(Dentry { parent: to.0.clone(), name: to.1.clone() });
            }
            self.move_tree(&inode, locator);
            self.note(&inode);
        }
    }

    /// Two names were swapped; the locators are those of the nodes that are now at `a` and at `b`.
    pub fn exchanged(&self, a: (&Arc<Inode>, &Bytes, Bytes), b: (&Arc<Inode>, &Bytes, Bytes)) {
        let _changing = self.changing();
        let (Some(a_dir), Some(b_dir)) = (&a.0.dir, &b.0.dir) else { return };
        let mut both = Both::lock((a.0.id, &a_dir.children), (b.0.id, &b_dir.children));
        let was_a = both.first().remove(a.1);
        let was_b = both.second().remove(b.1);
        if let Some(id) = was_a {
            both.second().insert(b.1.clone(), id);
        }
        if let Some(id) = was_b {
            both.first().insert(a.1.clone(), id);
        }
        drop(both);
        for (id, from, to) in [(was_a, (a.0, a.1), &b), (was_b, (b.0, b.1), &a)] {
            if let Some(inode) = id.and_then(|id| self.get(id)) {
                {
                    let mut names = inode.names.lock();
                    names.remove(from.0, from.1);
                    names.add(Dentry { parent: to.0.clone(), name: to.1.clone() });
                }
                self.move_tree(&inode, to.2.clone());
                self.note(&inode);
            }
        }
    }

    /// Gives a node its new locator, and those below it theirs where locators are paths.
    fn move_tree(&self, inode: &Arc<Inode>, locator: Bytes) {
        let old = inode.locator();
        if old == locator {
            return;
        }
        inode.relocate(locator.clone());
        let Some(state) = &inode.dir else { return };
        let below: Vec<u64> = state.children.lock().values().copied().collect();
        for child in below.into_iter().filter_map(|id| self.get(id)) {
            let at = child.locator();
            // A path that begins with the same letters is not yet below it: the child may be known by another name.
            let below = |rest: &&[u8]| old.ends_with(b"/") || rest.starts_with(b"/");
            if let Some(rest) = at.strip_prefix(&old[..]).filter(below) {
                let mut moved = BytesMut::with_capacity(locator.len() + rest.len());
                moved.put_slice(&locator);
                moved.put_slice(rest);
                self.move_tree(&child, moved.freeze());
                self.note(&child);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{dir, file, seen};
    use super::super::{Nodes, Seen};
    use super::*;
    use efc_common::node::Time;

    fn name(n: &'static str) -> Bytes {
        Bytes::from_static(n.as_bytes())
    }

    fn following() -> Namespace {
        Namespace::new(dir("/o"), Nodes::Follow { paths: true })
    }

    fn numbered(locator: &str, version: &str, fileid: u64, nlink: u32) -> Node {
        let mut node = file(locator, version);
        (node.attr.fileid, node.attr.nlink) = (fileid, nlink);
        node
    }

    const TTL: Duration = Duration::from_secs(60);

    #[test]
    fn a_node_follows_its_file_and_says_when_the_version_moved() {
        let ns = following();
        let root = ns.root();
        let (a, moved) = ns.intern(&root, &name("f"), &numbered("/o/f", "1", 7, 1), seen());
        assert!(!moved);
        let (b, moved) = ns.intern(&root, &name("f"), &numbered("/o/f", "2", 7, 1), seen());
        assert!(moved && b.id == a.id && a.now().version == "2");
        // Another file under the name is another node.
        let (c, _) = ns.intern(&root, &name("f"), &numbered("/o/f", "3", 8, 1), seen());
        assert!(c.id != a.id && a.is_nameless() && !c.is_nameless());
    }

    #[test]
    fn what_the_origin_was_asked_before_a_change_ended_does_not_undo_it() {
        let ns = following();
        let root = ns.root();
        let (f, _) = ns.intern(&root, &name("f"), &file("/o/f", "1"), seen());
        let asked_before = seen();
        let change = f.begin();
        assert!(!ns.intern(&root, &name("f"), &file("/o/f", "old"), seen()).1, "while it runs");
        change.finish(file("/o/f", "2"), TTL);
        assert!(!ns.intern(&root, &name("f"), &file("/o/f", "1"), asked_before).1);
        assert_eq!(f.now().version, "2");
        assert!(ns.intern(&root, &name("f"), &file("/o/f", "3"), Seen::at(Instant::now() + TTL, TTL)).1);
    }

    #[test]
    fn changes_that_overlap_leave_the_newest_and_no_trust() {
        let ns = following();
        let (f, _) = ns.intern(&ns.root(), &name("f"), &file("/o/f", "1"), seen());
        let at = |version: &str, secs| {
            let mut node = file("/o/f", version);
            node.attr.ctime = Time { secs, nanos: 0 };
            node
        };
        let (a, b) = (f.begin(), f.begin());
        b.finish(at("b", 20), TTL);
        a.finish(at("a", 10), TTL);
        assert_eq!(f.now().version, "b");
        assert!(f.now().fresh_until <= Instant::now());
        f.begin().finish(at("c", 30), TTL);
        assert!(f.now().fresh_until > Instant::now());
        drop(f.begin());
        assert!(f.now().fresh_until <= Instant::now(), "a change that failed may have happened");
        assert!(f.is_racy(TTL) && !f.is_racy(Duration::ZERO));
    }

    #[test]
    fn all_names_of_a_file_are_one_node() {
        let ns = following();
        let root = ns.root();
        let (d, _) = ns.intern(&root, &name("d"), &dir("/o/d"), seen());
        let (a, _) = ns.intern(&root, &name("a"), &numbered("/o/a", "1", 7, 2), seen());
        let (b, _) = ns.intern(&d, &name("b"), &numbered("/o/d/b", "1", 7, 2), seen());
        assert_eq!(a.id, b.id);
        let join = |dir: &Bytes, name: &[u8]| Some([dir, &b"/"[..], name].concat().into());
        assert_eq!(ns.removed(&root, b"a", join).map(|i| i.id), Some(a.id));
        assert_eq!((a.locator(), a.path()), (name("/o/d/b"), "/d/b".into()));
        ns.removed(&d, b"b", join);
        assert!(a.is_nameless());
        ns.forget(a.id, 2);
        assert!(ns.get(a.id).is_none());
        let (again, _) = ns.intern(&root, &name("a"), &numbered("/o/a", "9", 7, 2), seen());
        assert_ne!(again.id, a.id);
    }

    #[test]
    fn a_new_file_with_the_number_of_a_removed_one_is_another_node() {
        let ns = Namespace::new(dir("root"), Nodes::Follow { paths: false });
        let root = ns.root();
        let (old, _) = ns.intern(&root, &name("a"), &numbered("handle 7.1", "1", 7, 1), seen());
        ns.lose(&old);
        let (new, _) = ns.intern(&root, &name("b"), &numbered("handle 7.2", "1", 7, 1), seen());
        assert!(new.id != old.id && new.locator() == name("handle 7.2"));
        // Moved by others, it is found by its new name.
        ns.lose(&new);
        assert_eq!(ns.intern(&root, &name("c"), &numbered("handle 7.2", "1", 7, 1), seen()).0.id, new.id);
        // So are its further names, and not those of a file that came after it.
        assert_eq!(ns.intern(&root, &name("d"), &numbered("handle 7.2", "1", 7, 2), seen()).0.id, new.id);
        assert_ne!(ns.intern(&root, &name("e"), &numbered("handle 7.3", "1", 7, 2), seen()).0.id, new.id);
    }

    #[test]
    fn a_directory_moves_with_what_is_below() {
        let ns = following();
        let root = ns.root();
        let (d, _) = ns.intern(&root, &name("d"), &dir("/o/d"), seen());
        let (e, _) = ns.intern(&d, &name("e"), &dir("/o/d/e"), seen());
        let (f, _) = ns.intern(&e, &name("f"), &file("/o/d/e/f", "1"), seen());
        let (old, _) = ns.intern(&root, &name("x"), &dir("/o/x"), seen());
        ns.renamed((&root, b"d"), (&root, &name("x")), name("/o/x"));
        assert_eq!((f.locator(), f.path()), (name("/o/x/e/f"), "/x/e/f".into()));
        assert!(old.is_nameless() && ns.child(&root, b"d").is_none());
        assert_eq!(ns.child(&root, b"x").map(|i| i.id), Some(d.id));
        // Between directories, and a swap.
        ns.renamed((&e, b"f"), (&root, &name("g")), name("/o/g"));
        ns.exchanged((&root, &name("g"), name("/o/g")), (&root, &name("x"), name("/o/x")));
        assert_eq!((f.path(), e.path(), e.locator()), ("/x".into(), "/g/e".into(), name("/o/g/e")));
    }
}
