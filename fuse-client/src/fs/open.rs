//! Open files of a read-write mount: handles, and per node the one open file at the origin that they share.
//!
//! A handle number is known to the kernel until RELEASE. A node with a writing handle is read past the caches, straight from the origin's open file, because
//! each write makes a new version and nothing cached under it would be used twice.

use crate::journal::Journal;
use crate::namespace::Inode;
use bytes::Bytes;
use efc_backend::tree::OpenFile;
use efc_common::{Error, Kind, Result};
use efc_proto::state;
use parking_lot::{Mutex, MutexGuard};
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
    /// Number of the request.
    pub unique: u64,
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
    /// Its number.
    pub fh: u64,
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
    parked: Vec<Parked>,
    /// Where it may lie as well: an attempt to put it there ended unclear.
    perhaps: Vec<Parked>,
    /// A descriptor of it is held for a successor.
    kept: bool,
}

#[derive(Default)]
struct Tables {
    handles: HashMap<u64, Arc<Handle>>,
    nodes: HashMap<u64, OpenNode>,
    /// Handles of a predecessor by the requests that opened them: those may come again.
    opened_by: HashMap<u64, u64>,
    /// Files that are being put aside, by node. Until that is over they are for who does it, whether they are open or not.
    moving: Vec<(u64, Parked)>,
}

impl Tables {
    fn enter(&mut self, handle: Handle) {
        let write = handle.writes();
        let file = &handle.file;
        let node = self.nodes.entry(handle.inode.id).or_insert_with(|| OpenNode {
            handles: 0,
            writers: 0,
            direct_readers: 0,
            file: file.clone(),
            writable: write,
            append: handle.append.clone(),
            parked: Vec::new(),
            perhaps: Vec::new(),
            kept: false,
        });
        node.handles += 1;
        node.writers += u32::from(write);
        node.direct_readers += u32::from(handle.opening.reads_directly());
        if write && !node.writable {
            (node.file, node.writable) = (file.clone(), true);
        }
        let append = node.append.clone();
        self.handles.insert(handle.fh, Arc::new(Handle { append, ..handle }));
    }
}

/// What a handle left that was the last of its node.
#[derive(Debug, Default)]
pub struct Leftover {
    /// To be removed.
    pub parked: Vec<Parked>,
    /// The node of a descriptor that is held for a successor.
    pub kept: Option<u64>,
}

/// All handles of a mount.
#[derive(Default)]
pub struct OpenFiles {
    tables: Mutex<Tables>,
    journal: Option<Arc<Journal>>,
}

impl OpenFiles {
    /// None is open. What is opened is written down in `journal`.
    pub fn new(journal: Option<Arc<Journal>>) -> OpenFiles {
        OpenFiles { tables: Mutex::default(), journal }
    }

    /// Enters what a predecessor had open, which is written down already.
    pub fn restore(&self, handle: &state::Handle, inode: Arc<Inode>, file: Arc<dyn OpenFile>) {
        let state::Handle { fh, flags, by, direct, unique, .. } = *handle;
        let opening = Opening { flags, by, direct, unique };
        let mut t = self.tables.lock();
        t.enter(Handle { fh, inode, opening, file, append: Arc::default() });
        t.opened_by.insert(unique, fh);
    }

    /// A file that a predecessor put aside, or was about to.
    pub fn restore_parked(&self, parked: &state::Parked) {
        if let Some(node) = self.tables.lock().nodes.get_mut(&parked.node) {
            node.parked.push(parked.into());
        }
    }

    /// The handle that this request has opened already, in a process that died.
    pub fn opened_by(&self, unique: u64) -> Option<Arc<Handle>> {
        let t = self.tables.lock();
        t.handles.get(t.opened_by.get(&unique)?).cloned()
    }

    /// Everything that is written down.
    pub fn checkpoint(&self) -> (Vec<state::Handle>, Vec<state::Parked>) {
        let t = self.tables.lock();
        let handles = t.handles.values().map(|h| wire(h)).collect();
        let parked = t.nodes.iter().flat_map(|(node, n)| n.parked.iter().chain(&n.perhaps).map(|p| p.wire(*node)));
        (handles, parked.chain(t.moving.iter().map(|(node, p)| p.wire(*node))).collect())
    }

    /// The open file of a node that a further handle may share, if there is one that can do what it needs.
    pub fn share(&self, node: u64, write: bool) -> Option<Arc<dyn OpenFile>> {
        let t = self.tables.lock();
        t.nodes.get(&node).filter(|n| n.writable || !write).map(|n| n.file.clone())
    }

    /// Enters a handle. `file` serves the whole node from now on if it can do more than the one there is.
    pub fn enter(&self, fh: u64, inode: Arc<Inode>, opening: Opening, file: Arc<dyn OpenFile>) {
        let handle = Handle { fh, inode, opening, file, append: Arc::default() };
        self.change(|t, journal| {
            if let Some(journal) = journal {
                journal.opened(&wire(&handle));
            }
            t.enter(handle);
        });
    }

    /// Changes something that is written down.
    fn change<T>(&self, change: impl FnOnce(&mut MutexGuard<'_, Tables>, Option<&Journal>) -> T) -> T {
        let _changing = self.journal.as_ref().map(|j| j.changing());
        change(&mut self.tables.lock(), self.journal.as_deref())
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
        (node.writers > 0 || !node.parked.is_empty() || inode.is_nameless()).then(|| node.file.clone())
    }

    /// Was it removed, and lies somewhere until it is closed?
    pub fn is_parked(&self, node: u64) -> bool {
        self.tables.lock().nodes.get(&node).is_some_and(|n| !n.parked.is_empty())
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

    /// A file that is open is about to be put there; [`OpenFiles::park`] ends it.
    pub fn will_park(&self, node: u64, parked: &Parked) {
        self.change(|t, journal| {
            t.moving.push((node, parked.clone()));
            if let Some(journal) = journal {
                journal.parked(&parked.wire(node));
            }
        });
    }

    /// A removed file lies there now, or (`!is_there`) may do so. False if it was closed meanwhile: it is the caller's to remove.
    pub fn park(&self, node: u64, parked: &Parked, is_there: bool) -> bool {
        let mut t = self.tables.lock();
        t.moving.retain(|(_, p)| p != parked);
        let Some(n) = t.nodes.get_mut(&node) else { return false };
        let places = if is_there { &mut n.parked } else { &mut n.perhaps };
        places.push(parked.clone());
        true
    }

    /// A descriptor of the node is about to be held for a successor. False if it is not open, or one is held already.
    pub fn keep(&self, node: u64) -> bool {
        self.tables.lock().nodes.get_mut(&node).is_some_and(|n| !std::mem::replace(&mut n.kept, true))
    }

    /// Ends a handle. What its node left, if this was its last handle.
    pub fn leave(&self, fh: u64) -> (Option<Arc<Handle>>, Leftover) {
        self.change(|t, journal| {
            let Some(handle) = t.handles.remove(&fh) else { return (None, Leftover::default()) };
            t.opened_by.remove(&handle.opening.unique);
            let id = handle.inode.id;
            let mut left = Leftover::default();
            if let Some(node) = t.nodes.get_mut(&id) {
                node.handles -= 1;
                node.writers -= u32::from(handle.writes());
                node.direct_readers -= u32::from(handle.opening.reads_directly());
                if node.handles == 0
                    && let Some(mut node) = t.nodes.remove(&id)
                {
                    node.parked.append(&mut node.perhaps);
                    left = Leftover { parked: node.parked, kept: node.kept.then_some(id) };
                }
            }
            if let Some(journal) = journal {
                journal.closed(fh);
            }
            (Some(handle), left)
        })
    }

    /// What a node left is gone.
    pub fn cleared(&self, node: u64) {
        if let Some(journal) = &self.journal {
            journal.unused(node);
        }
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

impl From<&state::Parked> for Parked {
    fn from(parked: &state::Parked) -> Parked {
        Parked { dir: parked.dir.clone(), name: parked.name.clone() }
    }
}

impl Parked {
    fn wire(&self, node: u64) -> state::Parked {
        state::Parked { node, dir: self.dir.clone(), name: self.name.clone() }
    }
}

fn wire(handle: &Handle) -> state::Handle {
    let Opening { flags, by, direct, unique } = handle.opening;
    let draft = handle.file.number();
    state::Handle { fh: handle.fh, node: handle.inode.id, flags, by, direct, unique, draft }
}
