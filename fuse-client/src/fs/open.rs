//! Open files of a read-write mount: handles, and per node the one open file at the origin that they share.
//!
//! A handle number is known to the kernel until RELEASE. A node with a writing handle is read past the caches, straight from the origin's open file, because
//! each write makes a new version and nothing cached under it would be used twice.

use crate::namespace::Inode;
use bytes::Bytes;
use efc_backend::tree::OpenFile;
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

/// How a file is opened, and by whom.
#[derive(Debug, Clone, Copy)]
pub struct Opening {
    /// `open(2)` flags.
    pub flags: i32,
    /// The thread that opens it, as the kernel names it.
    pub by: u32,
    /// The kernel keeps no pages of what is read and written through it.
    pub direct: bool,
}

impl Opening {
    /// Is it for writing?
    pub fn writes(self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }

    /// Does it read past the kernel's pages, and its idea of the length?
    pub fn reads_directly(self) -> bool {
        self.direct && self.flags & libc::O_ACCMODE != libc::O_WRONLY
    }
}

/// A handle the kernel holds.
pub struct Handle {
    /// The node it was opened by.
    pub inode: Arc<Inode>,
    /// How and by whom.
    pub opening: Opening,
    /// The open file of its node.
    pub file: Arc<dyn OpenFile>,
    /// Held while appending: the end must not move between finding and writing it.
    pub append: Arc<tokio::sync::Mutex<()>>,
}

impl Handle {
    /// May it write?
    pub fn writes(&self) -> bool {
        self.opening.writes()
    }

    /// Does it append?
    pub fn appends(&self) -> bool {
        self.opening.flags & libc::O_APPEND != 0
    }
}

/// Where a removed file lies that is still open, because its origin forgets files without a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parked {
    /// Locator of the directory.
    pub dir: Bytes,
    /// Its name there.
    pub name: Bytes,
}

struct OpenNode {
    handles: u32,
    writers: u32,
    direct_readers: u32,
    file: Arc<dyn OpenFile>,
    writable: bool,
    append: Arc<tokio::sync::Mutex<()>>,
    parked: Option<Parked>,
}

#[derive(Default)]
struct Tables {
    handles: HashMap<u64, Arc<Handle>>,
    nodes: HashMap<u64, OpenNode>,
}

/// All handles of a mount.
#[derive(Default)]
pub struct OpenFiles {
    tables: Mutex<Tables>,
}

impl OpenFiles {
    /// The open file of a node that a further handle may share, if there is one that can do what it needs.
    pub fn share(&self, node: u64, write: bool) -> Option<Arc<dyn OpenFile>> {
        let t = self.tables.lock();
        t.nodes.get(&node).filter(|n| n.writable || !write).map(|n| n.file.clone())
    }

    /// Enters a handle. `file` serves the whole node from now on if it can do more than the one there is.
    pub fn enter(&self, fh: u64, inode: Arc<Inode>, opening: Opening, file: Arc<dyn OpenFile>) {
        let write = opening.writes();
        let mut t = self.tables.lock();
        let node = t.nodes.entry(inode.id).or_insert_with(|| OpenNode {
            handles: 0,
            writers: 0,
            direct_readers: 0,
            file: file.clone(),
            writable: write,
            append: Arc::default(),
            parked: None,
        });
        node.handles += 1;
        node.writers += u32::from(write);
        node.direct_readers += u32::from(opening.reads_directly());
        if write && !node.writable {
            (node.file, node.writable) = (file.clone(), true);
        }
        let append = node.append.clone();
        t.handles.insert(fh, Arc::new(Handle { inode, opening, file, append }));
    }

    /// The handle of a number.
    ///
    /// # Errors
    /// [`Kind::Stale`] for one that is not open (a predecessor's).
    pub fn get(&self, fh: u64) -> Result<Arc<Handle>> {
        let t = self.tables.lock();
        t.handles.get(&fh).cloned().ok_or_else(|| Error::new(Kind::Stale, "no open file of this number"))
    }

    /// The open file of a node through which changes go: one with a writing handle, or of a node without a name.
    pub fn direct(&self, inode: &Inode) -> Option<Arc<dyn OpenFile>> {
        let t = self.tables.lock();
        let node = t.nodes.get(&inode.id)?;
        (node.writers > 0 || node.parked.is_some() || inode.is_nameless()).then(|| node.file.clone())
    }

    /// Was it removed, and lies somewhere until it is closed?
    pub fn is_parked(&self, node: u64) -> bool {
        self.tables.lock().nodes.get(&node).is_some_and(|n| n.parked.is_some())
    }

    /// Any open file of a node.
    pub fn any(&self, node: u64) -> Option<Arc<dyn OpenFile>> {
        self.tables.lock().nodes.get(&node).map(|n| n.file.clone())
    }

    /// Nodes that may be written to, with the open files that do it.
    pub fn writers(&self) -> Vec<(Arc<Inode>, Arc<dyn OpenFile>)> {
        let t = self.tables.lock();
        let mut seen = std::collections::HashSet::new();
        let writers = t.handles.values().filter(|h| h.writes() && seen.insert(h.inode.id));
        writers.filter_map(|h| Some((h.inode.clone(), t.nodes.get(&h.inode.id)?.file.clone()))).collect()
    }

    /// Is it read past the kernel's pages?
    pub fn is_read_directly(&self, node: u64) -> bool {
        self.tables.lock().nodes.get(&node).is_some_and(|n| n.direct_readers > 0)
    }

    /// Is it open?
    pub fn is_open(&self, node: u64) -> bool {
        self.tables.lock().nodes.contains_key(&node)
    }

    /// A removed file that is open lies there now. False if it was closed meanwhile.
    pub fn park(&self, node: u64, parked: Parked) -> bool {
        match self.tables.lock().nodes.get_mut(&node) {
            Some(n) => {
                n.parked = Some(parked);
                true
            }
            None => false,
        }
    }

    /// Ends a handle. What its node left to be removed, if this was its last handle.
    pub fn leave(&self, fh: u64) -> (Option<Arc<Handle>>, Option<Parked>) {
        let mut t = self.tables.lock();
        let Some(handle) = t.handles.remove(&fh) else { return (None, None) };
        let mut parked = None;
        if let Some(node) = t.nodes.get_mut(&handle.inode.id) {
            node.handles -= 1;
            node.writers -= u32::from(handle.writes());
            node.direct_readers -= u32::from(handle.opening.reads_directly());
            if node.handles == 0 {
                parked = t.nodes.remove(&handle.inode.id).and_then(|n| n.parked);
            }
        }
        (Some(handle), parked)
    }

    /// Number of open handles.
    pub fn len(&self) -> usize {
        self.tables.lock().handles.len()
    }

    /// Is nothing open?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
