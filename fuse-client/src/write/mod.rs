//! Files on an object store as a tree that can be changed ([`ObjectTree`], decision 0007): what read-write mounts of `s3://` and `oss://` change, and the view
//! of the store that they look at.
//!
//! - A file that is being written is a *draft* (`draft`: which bytes, `staging`: where they wait, `file`: its operations). It becomes an object
//!   at `close` or `fsync` (`commit`), with write-back soon after `close` (`later`); long sequential writes are uploaded behind the writer (`stream`); `ledger` has the
//!   uploads that are open.
//! - `names` are the names this mount has changed and listings do not show yet; `meta` is what is known of modes, owners and times.
//! - `kept`: what a successor of this process has to know of drafts.
//! - `paths` makes, removes and renames; `rename` moves directories, with a `journal` at the store; `view` is the store as read through all this.
//!
//! Locators are keys. A draft's version token is the mount's own and means nothing to others; an object's is the store's.
//! Lock order: a file's `inner` (two of them in the order of their keys), then the table of files, then `names`. Only `inner` is held across an await.

mod commit;
mod draft;
mod file;
mod journal;
mod kept;
mod later;
mod ledger;
mod meta;
mod names;
mod paths;
mod rename;
mod staging;
mod stream;
#[cfg(test)]
mod tests;
mod view;

pub use kept::Kept;
pub use staging::Space;

use async_trait::async_trait;
use bytes::Bytes;
use efc_backend::objects::{DynObjects, Metadata, ObjectLimits};
use efc_backend::tree::{Change, DynTree, New, NewNode, OpenFile, Pending, RenameMode, Tree};
use efc_backend::{Backend as _, DynBackend};
use efc_common::node::{FileKind, Node};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use efc_proto::state;
use file::{FileState, Inner, Open};
use later::Later;
use ledger::Ledger;
use meta::Knowledge;
use names::Overlay;
use parking_lot::Mutex;
use staging::Place;
use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::{OnceCell, Semaphore};

/// Names at the mount's root that begin so are EFC's own; never shown.
pub const OWN_PREFIX: &[u8] = b".efc";
/// For the ledger of open uploads to be taken away when the mount ends.
const GOODBYE: Duration = Duration::from_secs(2);
/// For what a predecessor has written to be brought to the store: its leases end 10 s after their last renewal.
const RESUME_PATIENCE: Duration = Duration::from_secs(4);
/// Unit of what may be on its way to the store at once, bytes.
const UPLOAD_UNIT: u64 = 1 << 20;
/// So many of these: 64 MiB.
const UPLOAD_UNITS: usize = 64;
/// Version tokens of drafts begin so, which no store's do.
const DRAFT_VERSION: &[u8] = b"\xffdraft-";

/// Is it the version of a file that its store does not have yet?
pub fn is_draft(version: &Bytes) -> bool {
    version.starts_with(DRAFT_VERSION)
}

/// What the files and directories of one mount share.
pub(crate) struct Core {
    objects: DynObjects,
    backend: DynBackend,
    root: Bytes,
    names: Overlay,
    known: Knowledge,
    files: Mutex<HashMap<Bytes, Arc<FileState>>>,
    space: Arc<Space>,
    uploads: Arc<Semaphore>,
    later: Option<Later>,
    limits: OnceCell<ObjectLimits>,
    ledger: Ledger,
    /// Of this process.
    instance: u64,
    /// Of all processes of the mount, one after the other.
    owner: u64,
    next_number: AtomicU64,
    /// Files of a predecessor, by number, until its handles are opened again.
    inherited: Mutex<HashMap<u64, Arc<FileState>>>,
}

/// The tree of an object store, and its view.
#[derive(Clone)]
pub struct ObjectTree {
    core: Arc<Core>,
    /// What it is asked to do may have been done already by a process that died.
    is_in_doubt: bool,
}

impl ObjectTree {
    /// A tree over `objects`, which `backend` reads; `root` is the mounted directory. Names and metadata are believed for `ttl`. `later`: owner of the tasks that commit
    /// closed files behind their writers; `None`: `close` waits for that. `owner`: the mount's, through all its processes.
    pub fn new(
        (objects, backend): (DynObjects, DynBackend),
        root: Bytes,
        space: Arc<Space>,
        ttl: Duration,
        later: Option<TaskGroup>,
        owner: u64,
    ) -> ObjectTree {
        let core = Core {
            objects,
            backend,
            root,
            names: Overlay::new(ttl),
            known: Knowledge::new(ttl),
            files: Mutex::default(),
            space,
            uploads: Arc::new(Semaphore::new(UPLOAD_UNITS)),
            later: later.map(Later::new),
            limits: OnceCell::new(),
            ledger: Ledger::default(),
            instance: rand::random(),
            owner,
            next_number: AtomicU64::new(1),
            inherited: Mutex::default(),
        };
        ObjectTree { core: Arc::new(core), is_in_doubt: false }
    }

    /// From now on `kept` is told of drafts. `drafts`: what a predecessor had, some of them in `files`. To be called before anything is changed; then [`ObjectTree::resume`] for
    /// each open file of the predecessor, and [`ObjectTree::resumed`].
    pub fn keep(&self, kept: Arc<Kept>, drafts: &[state::Draft], mut files: HashMap<u64, OwnedFd>) {
        let core = &self.core;
        core.space.tell(kept.clone());
        if !drafts.is_empty() {
            // Listings that were made before the predecessor's last changes are not to be believed.
            core.names.replaced(&core.root);
        }
        for draft in drafts {
            core.next_number.fetch_max(draft.number + 1, Relaxed);
            let file = files.remove(&draft.number).map(Place::File);
            match FileState::inherited(core, draft, draft.slot.map(Place::Slot).or(file)) {
                Ok(file) => {
                    if file.is_dirty() {
                        core.files.lock().insert(draft.locator.clone(), file.clone());
                        core.names.draft(&draft.dir, &draft.name, file.clone());
                    }
                    core.inherited.lock().insert(draft.number, file);
                }
                Err(e) => {
                    tracing::error!(key = %draft.locator.escape_ascii(), error = %e, "what was written to a file is lost");
                    kept.lost(draft.number);
                }
            }
        }
        files.into_keys().for_each(|number| kept.lost(number));
    }

    /// The open file that a predecessor knew by this number, if it had changes.
    pub fn resume(&self, number: u64) -> Option<Arc<dyn OpenFile>> {
        let file = self.core.inherited.lock().get(&number).cloned()?;
        Some(Arc::new(self.core.open_again(&file)))
    }

    /// The predecessor's handles are open again. Files that nobody has open go to the store; with `all` the others too, as long as the leases of the predecessor protect them: its
    /// successor begins without.
    pub async fn resumed(&self, all: bool) {
        let inherited = std::mem::take(&mut *self.core.inherited.lock());
        let (now, later): (Vec<_>, Vec<_>) = inherited.into_values().filter(|f| f.is_dirty()).partition(|_| all);
        // Without write-back it waits for who opens it, as it did before.
        later.iter().filter(|f| !f.is_open()).for_each(|f| {
            self.core.commit_later(f);
        });
        if now.is_empty() {
            return;
        }
        let files = now.len();
        match tokio::time::timeout(RESUME_PATIENCE, self.core.commit_all(now)).await {
            Ok(Ok(())) => tracing::info!(files, "files that were being written are at the store"),
            Ok(Err(e)) => tracing::warn!(error = %e, "a file that was being written is not at the store yet"),
            Err(_) => tracing::warn!(
                files,
                "files that were being written are long: others may change them before they are at the store"
            ),
        }
    }

    /// Everything that is written down.
    pub fn checkpoint(&self) -> Vec<state::Draft> {
        self.core.space.kept().map(|kept| kept.checkpoint()).unwrap_or_default()
    }

    /// The mount's number, through all its processes.
    pub fn owner(&self) -> u64 {
        self.core.owner
    }

    /// Where files are staged.
    pub fn space(&self) -> &Space {
        &self.core.space
    }

    /// The memory in which files are staged, for a successor.
    pub fn staging(&self) -> BorrowedFd<'_> {
        self.core.space.fd()
    }
}

impl Core {
    /// Writes down what a file is now.
    fn note(&self, inner: &Inner) {
        let Some(kept) = self.space.kept() else { return };
        if inner.is_dirty() || inner.removed { kept.note(inner) } else { kept.settled(inner.number) }
    }

    /// The same before something is done that a successor has to know of.
    fn note_now(&self, inner: &Inner) {
        self.note(inner);
        if let Some(kept) = self.space.kept() {
            kept.commit();
        }
    }

    async fn limits(&self) -> Result<ObjectLimits> {
        self.limits.get_or_try_init(|| self.objects.limits()).await.copied()
    }

    /// The version token of an edition of a draft.
    fn draft_version(&self, edition: u64) -> Bytes {
        let text = format!("{:016x}-{edition}", self.instance);
        [DRAFT_VERSION, text.as_bytes()].concat().into()
    }

    /// The object as it is now, with its metadata remembered.
    async fn head(&self, locator: &Bytes) -> Result<(Node, Metadata)> {
        let (node, mut metadata) = self.objects.head(locator).await?;
        if let Some(known) = self.known.get(&node.locator, &node.version) {
            // The store does not hear of an access time that is set alone.
            let with_ours = Metadata { atime: known.metadata.atime, ..metadata.clone() };
            metadata = if with_ours == known.metadata { with_ours } else { metadata };
        }
        self.known.learn(&node, &metadata, true);
        Ok((node, metadata))
    }

    /// A directory's marker; `None` where it has none.
    async fn marker(&self, dir: &Bytes) -> Result<Option<Metadata>> {
        if let Some(known) = self.known.dir(dir) {
            return Ok(known.there.then(|| known.metadata.clone()));
        }
        let found = if dir.is_empty() { None } else { absent_is_none(self.objects.head(dir).await)? };
        let (metadata, there) = found.map_or((Metadata::default(), false), |(_, m)| (m, true));
        self.known.learn(&directory(dir), &metadata, there);
        Ok(there.then_some(metadata))
    }

    /// Makes sure that a directory does not vanish with its last name: one PUT for each that had no marker.
    async fn keep_dir(&self, dir: &Bytes) -> Result<()> {
        if dir.len() <= self.root.len() || self.known.dir(dir).is_some_and(|k| k.there) {
            return Ok(());
        }
        let metadata = Metadata::default();
        let absent = efc_backend::objects::Condition::Absent;
        match self.objects.put(dir, Vec::new(), &metadata, &absent).await {
            Ok(_) => self.known.learn(&directory(dir), &metadata, true),
            Err(e) if e.is(Kind::Conflict) => {
                self.known.forget_dir(dir);
                self.marker(dir).await?;
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// The file of a key, opened.
    fn enter(self: &Arc<Self>, locator: &Bytes) -> Open {
        let mut files = self.files.lock();
        let state = files.entry(locator.clone()).or_insert_with(|| FileState::existing(self, locator)).clone();
        Open::new(self.clone(), state)
    }

    /// The file of a key, if it is open or has changes.
    fn file(&self, locator: &Bytes) -> Option<Arc<FileState>> {
        self.files.lock().get(locator).cloned()
    }

    fn deleted(mut failures: Vec<(usize, Error)>) -> Result<()> {
        match failures.pop() {
            Some((_, e)) => Err(e),
            None => Ok(()),
        }
    }
}

/// A directory of which nothing but its key is known.
fn directory(locator: &Bytes) -> Node {
    let attr = efc_common::node::Attr::prefix(Default::default());
    Node { locator: locator.clone(), version: Bytes::new(), attr }
}

/// The directory a key is in and its name there.
fn split(locator: &Bytes) -> (Bytes, Bytes) {
    let key = locator.strip_suffix(b"\0").or(locator.strip_suffix(b"/")).unwrap_or(locator);
    let at = key.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
    let name = efc_backend::names::encode(&key[at..], false).into_owned();
    (locator.slice(..at), name.into())
}

impl ObjectTree {
    async fn is_at_store(&self, dir: &Bytes, name: &[u8]) -> Result<bool> {
        let locator = self.core.objects.child(dir, name, false)?;
        Ok(absent_is_none(self.core.head(&locator).await)?.is_some())
    }

    /// Is a node what making this gives?
    async fn is_made(&self, node: &Node, new: &NewNode) -> Result<bool> {
        let kind = match &new.what {
            New::File => FileKind::File,
            New::Directory => FileKind::Directory,
            New::Symlink(target) if node.attr.kind == FileKind::Symlink => {
                return Ok(self.readlink(&node.locator).await? == *target);
            }
            _ => return Ok(false),
        };
        let owner = (node.attr.uid, node.attr.gid) == (Some(new.uid), Some(new.gid));
        let is_empty = kind == FileKind::Directory || node.attr.size == 0;
        Ok(node.attr.kind == kind && owner && is_empty && node.attr.mode == Some(new.mode & 0o7777))
    }
}

fn absent_is_none<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.is(Kind::NotFound) => Ok(None),
        Err(e) => Err(e),
    }
}

fn has_none(what: &str) -> Error {
    Error::new(Kind::NotPermitted, format!("object stores have no {what}"))
}

#[async_trait]
impl Tree for ObjectTree {
    fn keeps_removed(&self) -> bool {
        true
    }

    fn child(&self, dir: &Bytes, name: &[u8]) -> Option<Bytes> {
        self.core.objects.child(dir, name, false).ok()
    }

    fn drafts(&self) -> bool {
        true
    }

    fn in_doubt(&self) -> Option<DynTree> {
        Some(Arc::new(ObjectTree { core: self.core.clone(), is_in_doubt: true }))
    }

    fn overlay(&self, dir: &Bytes, asked: Instant) -> Vec<(Bytes, Option<Node>)> {
        self.core.names.all(dir, asked)
    }

    fn find_overlay(&self, dir: &Bytes, name: &[u8], asked: Instant) -> Option<Option<Node>> {
        self.core.names.find(dir, name, asked)
    }

    fn replaced(&self, dir: &Bytes) -> Option<Instant> {
        self.core.names.floor(dir)
    }

    fn complete_now(&self, node: &Node) -> Option<Node> {
        if is_draft(&node.version) {
            return Some(node.clone());
        }
        let known = self.core.known.get(&node.locator, &node.version)?;
        Some(meta::apply(node.clone(), &known.metadata))
    }

    async fn complete(&self, node: Node) -> Result<Node> {
        if let Some(node) = self.complete_now(&node) {
            return Ok(node);
        }
        if node.attr.kind == FileKind::Directory {
            let marker = self.core.marker(&node.locator).await?;
            return Ok(meta::apply(node, &marker.unwrap_or_default()));
        }
        let (node, metadata) = self.core.head(&node.locator).await?;
        Ok(meta::apply(node, &metadata))
    }

    async fn settle(&self, dir: &Bytes, name: Option<&[u8]>) -> Result<()> {
        self.core.commit_all(self.core.names.drafts_in(dir, name)).await
    }

    fn pending(&self) -> Vec<Pending> {
        let pending = |file: Arc<FileState>| {
            let node = file.node();
            let path = node.locator.strip_prefix(&self.core.root[..]).unwrap_or(&node.locator);
            let error = file.failed.lock().clone();
            Pending { path: Bytes::copy_from_slice(path), bytes: node.attr.size, error }
        };
        self.core.names.drafts_below(b"").into_iter().map(pending).collect()
    }

    async fn discard(&self, path: &[u8]) -> Result<()> {
        let key = [&self.core.root[..], path].concat();
        let file = self.core.names.drafts_below(b"").into_iter().find(|f| f.node().locator == key);
        let file = file.ok_or_else(|| Error::new(Kind::NotFound, "no file of this name has changes that wait"))?;
        let (dir, name) = split(&file.node().locator);
        if self.core.open_again(&file).discard().await? {
            self.core.files.lock().remove(&key[..]);
            self.core.names.gone(&dir, &name);
        }
        Ok(())
    }

    async fn settle_all(&self) -> Result<()> {
        self.core.commit_all(self.core.names.drafts_below(b"")).await?;
        // One that stays behind is found by the next mount.
        let _ = tokio::time::timeout(GOODBYE, self.core.beat_ledger()).await;
        Ok(())
    }

    async fn forget(&self, dir: &Bytes, name: Option<&[u8]>) {
        let only = name.and_then(|name| self.child(dir, name));
        self.core.known.forget(dir, only.clone());
        if name.is_none() {
            self.core.names.forget(dir);
        }
        let files: Vec<_> = self.core.files.lock().iter().map(|(key, file)| (key.clone(), file.clone())).collect();
        for (_, file) in files.iter().filter(|(key, _)| only.as_ref().map_or(key.starts_with(dir), |o| o == key)) {
            file.doubt().await;
        }
    }

    async fn create(&self, dir: &Bytes, name: &[u8], new: &NewNode) -> Result<Node> {
        if *dir == self.core.root && name.starts_with(OWN_PREFIX) {
            return Err(Error::new(
                Kind::NotPermitted,
                "names that begin with .efc are EFC's own at the root of a mount",
            ));
        }
        let made = match &new.what {
            // Where its maker died it was brought to the store since, and nobody has written to it.
            New::File if self.is_in_doubt && self.is_at_store(dir, name).await? => Err(paths::exists()),
            New::File => self.core.create_file(dir, name, new).await,
            New::Directory => self.core.create_directory(dir, name, new).await,
            New::Symlink(target) => self.core.create_link(dir, name, target, new).await,
            New::Fifo => Err(has_none("FIFOs")),
            New::Socket => Err(has_none("sockets")),
            New::CharDevice(_) | New::BlockDevice(_) => Err(has_none("device nodes")),
        };
        match made {
            Err(e) if self.is_in_doubt && e.is(Kind::AlreadyExists) => {
                let node = self.lookup(dir, name).await?;
                if self.is_made(&node, new).await? { Ok(node) } else { Err(e) }
            }
            other => other,
        }
    }

    async fn link(&self, _file: &Bytes, _dir: &Bytes, _name: &[u8]) -> Result<Node> {
        Err(has_none("hard links"))
    }

    async fn remove(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<()> {
        if directory { self.core.remove_directory(dir, name).await } else { self.core.remove_file(dir, name).await }
    }

    async fn rename(&self, from: (&Bytes, &[u8]), to: (&Bytes, &[u8]), mode: RenameMode) -> Result<Node> {
        if mode == RenameMode::Exchange {
            return Err(Error::new(Kind::Unsupported, "object stores cannot swap two names"));
        }
        if *to.0 == self.core.root && to.1.starts_with(OWN_PREFIX) {
            return Err(Error::new(
                Kind::NotPermitted,
                "names that begin with .efc are EFC's own at the root of a mount",
            ));
        }
        match self.core.rename(from, to, mode == RenameMode::NoReplace, self.is_in_doubt).await {
            Err(e) if self.is_in_doubt && e.is(Kind::NotFound) => self.lookup(to.0, to.1).await.map_err(|_| e),
            other => other,
        }
    }

    async fn set_attr(&self, locator: &Bytes, change: &Change) -> Result<Node> {
        if locator.is_empty() || locator.ends_with(b"/") {
            return self.core.set_directory(locator, change).await;
        }
        let open = self.core.enter(locator);
        open.loaded().await?;
        open.change(change, true).await
    }

    async fn set_xattr(&self, _locator: &Bytes, _name: &[u8], _value: &[u8], _flags: i32) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "object stores have no extended attributes"))
    }

    async fn remove_xattr(&self, _locator: &Bytes, _name: &[u8]) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "object stores have no extended attributes"))
    }

    async fn open(&self, locator: &Bytes, write: bool) -> Result<Arc<dyn OpenFile>> {
        let open = self.core.enter(locator);
        if write {
            open.fresh().await?;
        }
        Ok(Arc::new(open))
    }
}
