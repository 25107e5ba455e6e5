//! The namespace as bytes, for a successor process: node ids must mean the same to it, because the kernel goes on using them.
//! Layout: `proto/efc/state.proto`.

use super::journal::wire;
use super::{Dentry, Inode, Namespace, Nodes, ROOT_ID};
use bytes::Bytes;
use efc_common::{Error, Kind, Result};
use efc_proto::{convert, state};
use prost::Message as _;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

const FORMAT: u32 = 1;

fn bad(what: &'static str) -> Error {
    Error::new(Kind::Corrupt, format!("checkpoint of the predecessor: {what}"))
}

impl Namespace {
    /// Everything the kernel may still name, as bytes. The caller has stopped answering requests.
    pub fn save(&self) -> Vec<u8> {
        self.checkpoint().encode_to_vec()
    }

    /// Everything the kernel may still name. Nothing may change it meanwhile.
    pub(super) fn checkpoint(&self) -> state::Checkpoint {
        let inodes = self.all().iter().map(|i| wire(i)).collect();
        state::Checkpoint { format: FORMAT, next_id: self.next_id.load(Ordering::Relaxed), inodes }
    }

    /// The namespace of a predecessor.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for bytes that are not a checkpoint of this format, for ids used twice and for children without their parent.
    pub fn load(saved: &[u8], nodes: Nodes) -> Result<Self> {
        Self::restore(&state::Checkpoint::decode(saved).map_err(|e| bad("does not decode").caused_by(e))?, nodes)
    }

    /// The namespace that a checkpoint says.
    ///
    /// # Errors
    /// As [`Namespace::load`].
    pub fn restore(c: &state::Checkpoint, nodes: Nodes) -> Result<Self> {
        if c.format != FORMAT {
            return Err(bad("unknown format").with("format", c.format));
        }
        let mut known: HashMap<u64, Arc<Inode>> = HashMap::with_capacity(c.inodes.len());
        let mut children: HashMap<u64, HashMap<Bytes, u64>> = HashMap::new();
        // A directory's id is older, hence lower, than those of what was found in it; `save` writes them in order.
        let mut last = 0;
        for saved in &c.inodes {
            if saved.id <= last {
                return Err(bad("node id used twice, or out of order"));
            }
            last = saved.id;
            let node = convert::node_from_wire(saved.node.clone().ok_or_else(|| bad("node without content"))?)?;
            // The kernel may have forgotten the directory of what it still knows: that is not found by its name again.
            let parent = known.get(&saved.parent).cloned();
            if parent.as_ref().is_some_and(|p| p.dir.is_none()) || saved.id >= c.next_id || saved.parent >= saved.id {
                return Err(bad("impossible node"));
            }
            let placed = parent.is_some();
            let dentry = parent.map(|parent| Dentry { parent, name: saved.name.clone() });
            let inode = Inode::new(saved.id, dentry, node, Instant::now(), saved.lookups);
            inode.stale.store(saved.stale, Ordering::Release);
            known.insert(saved.id, Arc::new(inode));
            // Of several versions of one name the newest, with the highest id, is the one to be found again.
            if placed {
                children.entry(saved.parent).or_default().insert(saved.name.clone(), saved.id);
            }
        }
        let root = known.remove(&ROOT_ID).ok_or_else(|| bad("no root"))?;
        let ns = Namespace::empty(c.next_id, nodes);
        for inode in known.into_values().chain([root]) {
            if let (Some(dir), Some(from)) = (&inode.dir, children.remove(&inode.id)) {
                *dir.children.lock() = from;
            }
            ns.insert(inode);
        }
        Ok(ns)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{dir, file, seen};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_successor_finds_the_same_nodes_under_the_same_ids() {
        let ns = Namespace::new(dir("p/"), Nodes::Versions);
        let name = |n: &'static str| Bytes::from_static(n.as_bytes());
        let d = ns.intern(&ns.root(), &name("d"), &dir("p/d/"), seen()).0;
        let old = ns.intern(&d, &name("f"), &file("p/d/f", "1"), seen()).0;
        let new = ns.intern(&d, &name("f"), &file("p/d/f", "2"), seen()).0;
        let back = Namespace::load(&ns.save(), Nodes::Versions).expect("restore");
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

    proptest! {
        #[test]
        fn garbage_is_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Namespace::load(&bytes, Nodes::Versions);
        }
    }

    #[test]
    fn broken_checkpoints_are_refused() {
        let ns = Namespace::new(dir(""), Nodes::Versions);
        ns.intern(&ns.root(), &Bytes::from_static(b"f"), &file("f", "1"), seen());
        let good = state::Checkpoint::decode(ns.save().as_slice()).expect("own bytes");
        let refuse = |change: &dyn Fn(&mut state::Checkpoint)| {
            let mut c = good.clone();
            change(&mut c);
            assert!(Namespace::restore(&c, Nodes::Versions).is_err_and(|e| e.is(Kind::Corrupt)));
        };
        refuse(&|c| c.format = 9);
        refuse(&|c| c.inodes.reverse());
        refuse(&|c| c.inodes.push(c.inodes[1].clone()));
        refuse(&|c| c.inodes.clear());
        refuse(&|c| c.next_id = 2);
        refuse(&|c| c.inodes[1].node = None);
    }
}
