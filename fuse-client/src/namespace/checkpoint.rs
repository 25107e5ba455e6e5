//! The namespace as it is written down for a successor process: node ids must mean the same to it, because the kernel goes on using them.
//! Layout: `proto/efc/state.proto`.

use super::{Dentry, Inode, Namespace, Nodes, ROOT_ID};
use efc_common::{Error, Kind, Result};
use efc_proto::{convert, state};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

const FORMAT: u32 = 2;

/// A node as it is written down.
pub(super) fn wire(inode: &Inode) -> state::Inode {
    let now = inode.now();
    let name = |d: &Dentry| state::Name { parent: d.parent.id, name: d.name.clone() };
    let mut names: VecDeque<state::Name> = inode.names.lock().iter().map(name).collect();
    let first = names.pop_front().unwrap_or_default();
    state::Inode {
        id: inode.id,
        parent: first.parent,
        name: first.name,
        node: Some(convert::node_to_wire(&efc_common::node::Node {
            locator: now.locator.clone(),
            version: now.version.clone(),
            attr: now.attr.clone(),
        })),
        lookups: inode.lookups.load(Ordering::Acquire),
        stale: inode.stale.load(Ordering::Acquire),
        more: names.into(),
        lost: inode.is_lost(),
    }
}

fn bad(what: &'static str) -> Error {
    Error::new(Kind::Corrupt, format!("checkpoint of the predecessor: {what}"))
}

impl Namespace {
    /// Everything the kernel may still name. Nothing may change it meanwhile.
    pub fn checkpoint(&self) -> state::Checkpoint {
        let inodes = self.all().iter().map(|i| wire(i)).collect();
        state::Checkpoint {
            format: FORMAT,
            next_id: self.next_id.load(Ordering::Relaxed),
            inodes,
            ..state::Checkpoint::default()
        }
    }

    /// The namespace that a checkpoint says.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for one of another format, for ids used twice and for what cannot be.
    pub fn restore(c: &state::Checkpoint, nodes: Nodes) -> Result<Self> {
        if c.format != FORMAT {
            return Err(bad("unknown format").with("format", c.format));
        }
        let mut known: HashMap<u64, Arc<Inode>> = HashMap::with_capacity(c.inodes.len());
        let mut last = 0;
        for saved in &c.inodes {
            if saved.id <= last || saved.id >= c.next_id {
                return Err(bad("node id used twice, or out of order"));
            }
            last = saved.id;
            let node = convert::node_from_wire(saved.node.clone().ok_or_else(|| bad("node without content"))?)?;
            let inode = Inode::new(saved.id, None, node, Instant::now(), saved.lookups);
            inode.stale.store(saved.stale, Ordering::Release);
            inode.lost.store(saved.lost, Ordering::Release);
            known.insert(saved.id, Arc::new(inode));
        }
        if !known.contains_key(&ROOT_ID) {
            return Err(bad("no root"));
        }
        let ns = Namespace::empty(c.next_id, nodes);
        // In the order of ids: of several versions of one name the newest is the one to be found again.
        for saved in &c.inodes {
            let Some(inode) = known.get(&saved.id) else { continue };
            if inode.id != ROOT_ID {
                ns.place(&known, inode, saved)?;
            }
            ns.note_links(inode, &inode.attr());
            ns.insert(inode.clone());
        }
        check_depth(&known)?;
        Ok(ns)
    }

    /// Gives a node the names it had.
    fn place(&self, known: &HashMap<u64, Arc<Inode>>, inode: &Arc<Inode>, saved: &state::Inode) -> Result<()> {
        let first = Some((saved.parent, &saved.name)).filter(|(parent, _)| *parent != 0);
        let mut lost = false;
        for (parent, name) in first.into_iter().chain(saved.more.iter().map(|n| (n.parent, &n.name))) {
            // The kernel may have forgotten the directory of what it still knows: that is not found by its name again.
            let Some(parent) = known.get(&parent) else {
                lost = true;
                continue;
            };
            let Some(dir) = &parent.dir else { return Err(bad("impossible node")) };
            dir.children.lock().insert(name.clone(), inode.id);
            inode.names.lock().add(Dentry { parent: parent.clone(), name: name.clone() });
        }
        lost &= inode.is_nameless();
        let fileid = inode.attr().fileid;
        if self.follows() && (lost || inode.is_lost()) {
            inode.lost.store(true, Ordering::Release);
            if fileid != 0 {
                self.linked.lock().insert(fileid, inode.id);
            }
        }
        Ok(())
    }
}

/// No directory may be below itself.
fn check_depth(known: &HashMap<u64, Arc<Inode>>) -> Result<()> {
    let dirs = known.values().filter(|i| i.dir.is_some());
    for dir in dirs {
        let (mut at, mut steps) = (dir.dentry(), 0);
        while let Some(d) = at {
            steps += 1;
            if steps > known.len() {
                return Err(bad("a directory is below itself"));
            }
            at = d.parent.dentry();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{dir, file, seen};
    use super::*;
    use bytes::Bytes;

    #[test]
    fn a_successor_finds_the_same_nodes_under_the_same_ids() {
        let ns = Namespace::new(dir("p/"), Nodes::Versions);
        let name = |n: &'static str| Bytes::from_static(n.as_bytes());
        let d = ns.intern(&ns.root(), &name("d"), &dir("p/d/"), seen()).0;
        let old = ns.intern(&d, &name("f"), &file("p/d/f", "1"), seen()).0;
        let new = ns.intern(&d, &name("f"), &file("p/d/f", "2"), seen()).0;
        let back = Namespace::restore(&ns.checkpoint(), Nodes::Versions).expect("restore");
        assert_eq!(back.len(), ns.len());
        for i in [&d, &old, &new] {
            let j = back.get(i.id).expect("known");
            assert_eq!((j.path(), &j.now().locator, &j.now().version), (i.path(), &i.now().locator, &i.now().version));
        }
        let d2 = back.get(d.id).expect("dir");
        assert_eq!(back.intern(&d2, &name("f"), &file("p/d/f", "2"), seen()).0.id, new.id);
        assert!(back.intern(&d2, &name("g"), &file("p/d/g", "1"), seen()).0.id > new.id);
        back.forget(old.id, 1);
        assert!(back.get(old.id).is_none());
    }

    #[test]
    fn broken_checkpoints_are_refused() {
        let ns = Namespace::new(dir(""), Nodes::Versions);
        ns.intern(&ns.root(), &Bytes::from_static(b"f"), &file("f", "1"), seen());
        let good = ns.checkpoint();
        let refuse = |change: &dyn Fn(&mut state::Checkpoint)| {
            let mut c = good.clone();
            change(&mut c);
            assert!(Namespace::restore(&c, Nodes::Versions).is_err_and(|e| e.is(Kind::Corrupt)));
        };
        refuse(&|c| c.format = 9);
        refuse(&|c| c.inodes.reverse());
        refuse(&|c| c.inodes.push(c.inodes[1].clone()));
        refuse(&|c| (c.inodes[1].parent, c.inodes[1].node) = (2, c.inodes[0].node.clone()));
        refuse(&|c| c.inodes.clear());
        refuse(&|c| c.next_id = 2);
        refuse(&|c| c.inodes[1].node = None);
    }
}
