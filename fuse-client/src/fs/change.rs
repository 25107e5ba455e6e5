//! Operations that change names and attributes, on read-write mounts. Each goes to the origin first; what the origin says is then entered into the namespace,
//! and listings of the directories concerned are distrusted.

use super::Shared;
use super::belief::{Beliefs, Permit};
use super::failover::Once;
use super::open::{Opening, Parked};
use crate::kernel::{AttrOut, CreateOut, EntryOut, SetAttr, SetTime};
use crate::namespace::Inode;
use bytes::Bytes;
use efc_backend::tree::{Change, DynTree, New, NewNode, RenameMode, SetTime as OriginTime};
use efc_common::node::{FileKind, Node};
use efc_common::{Error, Kind, Result};
use efc_proto::state::attempt;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

/// Names of removed files that are still open, in their directory; never listed.
pub const PARKED_PREFIX: &[u8] = b".efc-removed-";

/// A name in a directory.
pub(super) struct At {
    pub(super) dir: Arc<Inode>,
    pub(super) name: Bytes,
}

impl Shared {
    /// Enters a node that was just made or found under a name.
    fn enter(&self, permit: &Permit, at: &At, node: &Node) -> (Arc<Inode>, EntryOut) {
        self.entry(permit, &at.dir, (&at.name, node), permit.belief.seen())
    }

    /// To make a name.
    async fn to_make(&self, at: &At) -> Result<Permit> {
        self.permit(&[], &|b| Ok(vec![self.change_names(b, &at.dir)?])).await
    }

    /// Names of `dir` were changed by us, and with them its times and link count.
    fn touched(&self, dir: &Inode) {
        self.parts.directories.changed(dir);
        dir.expire();
    }

    /// MKNOD, MKDIR, SYMLINK.
    pub(super) async fn make(&self, at: At, new: NewNode, once: Once) -> Result<(EntryOut, Permit)> {
        let permit = self.to_make(&at).await?;
        if !once.is_in_doubt() && self.asks_first() && self.is_taken(&at, &permit).await? {
            return Err(taken());
        }
        let tree = once.begin(self, None)?;
        let made = permit.within(tree.create(&at.dir.locator(), &at.name, &new)).await;
        self.touched(&at.dir);
        let mut node = made?;
        if new.what == New::File && tree.drafts() {
            // Nobody has it open, so nobody would close it.
            let file = tree.open(&node.locator, true).await?;
            node = permit.within(file.sync(false)).await?;
        }
        Ok((self.enter(&permit, &at, &node).1, permit))
    }

    /// Where new files wait here before they are at the origin, and removing is the same as having removed, the origin cannot tell whether a name is there: it is looked
    /// up first, and only a lease makes the answer last.
    fn asks_first(&self) -> bool {
        self.beliefs.is_some() && self.has_drafts()
    }

    async fn is_taken(&self, at: &At, permit: &Permit) -> Result<bool> {
        Ok(self.parts.directories.find(&at.dir, &at.name, permit.belief).await?.node.is_some())
    }

    /// CREATE: makes the file or, unless it must be new, opens the one that is there.
    pub(super) async fn create(&self, at: At, new: NewNode, how: Opening, once: Once) -> Result<(CreateOut, Permit)> {
        let permit = self.to_change_name(&at).await?;
        let must_be_new = how.flags & libc::O_EXCL != 0;
        let sure = !(once.is_in_doubt() && must_be_new);
        let is_taken = sure && self.asks_first() && self.is_taken(&at, &permit).await?;
        let tree = once.begin(self, None)?;
        let made = match is_taken {
            true => Err(taken()),
            false => permit.within(tree.create(&at.dir.locator(), &at.name, &new)).await,
        };
        self.touched(&at.dir);
        let mut node = match made {
            Err(e) if e.is(Kind::AlreadyExists) && !must_be_new => {
                let mut node = self.parts.source.lookup(&at.dir.locator(), &at.name).await?;
                if node.attr.kind == FileKind::File && how.flags & libc::O_TRUNC != 0 {
                    let cut = Change { size: Some(0), ..Change::default() };
                    node = permit.within(tree.set_attr(&node.locator, &cut)).await?;
                }
                node
            }
            other => other?,
        };
        if node.attr.kind != FileKind::File {
            return Err(Error::new(Kind::AlreadyExists, "something else has this name"));
        }
        // The mode of a new file may forbid what its creator may do: it is opened by us.
        let write = how.writes();
        let file = tree.open(&node.locator, write).await?;
        if !write && let Some(made) = file.close().await? {
            // Closing a handle that cannot write says nothing to a draft.
            node = made;
        }
        let (inode, mut entry) = self.enter(&permit, &at, &node);
        let how = Opening { direct: self.is_direct(&inode, how), ..how };
        if how.reads_directly() {
            entry.attr_ttl = Duration::ZERO;
        }
        let file = match self.files.share(inode.id, write) {
            Some(shared) => shared,
            None => file,
        };
        Ok((CreateOut { entry, open: self.opened(&inode, how, file) }, permit))
    }

    /// LINK.
    pub(super) async fn link(&self, inode: &Arc<Inode>, at: At, once: Once) -> Result<(EntryOut, Permit)> {
        let needs = |b: &Beliefs| {
            let mut wants = self.change_node(b, inode)?;
            wants.push(self.change_names(b, &at.dir)?);
            Ok(wants)
        };
        let permit = self.permit(std::slice::from_ref(inode), &needs).await?;
        let change = inode.begin();
        let (file, dir) = (inode.locator(), at.dir.locator());
        let linked = permit.within(once.begin(self, None)?.link(&file, &dir, &at.name)).await;
        self.touched(&at.dir);
        let node = linked?;
        change.finish(node.clone(), permit.belief.ttl);
        self.parts.namespace.note_links(inode, &node.attr);
        let entry = self.enter(&permit, &at, &node).1;
        if self.beliefs.is_some() {
            // With its second name it is leased by itself.
            inode.doubt();
        }
        Ok((entry, permit))
    }

    /// To change or remove what has a name, and the name.
    async fn to_change_name(&self, at: &At) -> Result<Permit> {
        let needs = |b: &Beliefs| {
            let mut wants = self.change_named(b, &at.dir, &at.name)?;
            wants.push(self.change_names(b, &at.dir)?);
            Ok(wants)
        };
        self.permit(&self.file_at(&at.dir, &at.name), &needs).await
    }

    /// To rename.
    async fn to_rename(&self, from: &At, to: &At) -> Result<Permit> {
        let needs = |b: &Beliefs| {
            let mut wants = Vec::new();
            for at in [from, to] {
                wants.push(self.change_names(b, &at.dir)?);
                wants.extend(self.change_named(b, &at.dir, &at.name)?);
                wants.extend(self.change_below(b, &at.dir, &at.name)?);
            }
            Ok(wants)
        };
        let mut files = self.file_at(&from.dir, &from.name);
        files.extend(self.file_at(&to.dir, &to.name));
        self.permit(&files, &needs).await
    }

    /// UNLINK and RMDIR.
    pub(super) async fn remove(&self, at: At, directory: bool, once: Once) -> Result<((), Permit)> {
        let permit = self.to_change_name(&at).await?;
        if !once.is_in_doubt() && self.asks_first() && !self.is_taken(&at, &permit).await? {
            return Err(Error::new(Kind::NotFound, "there is nothing of this name any more"));
        }
        let known = self.parts.namespace.child(&at.dir, &at.name);
        let open = known.as_ref().filter(|i| !directory && self.files.is_open(i.id));
        if let Some(inode) = open {
            self.keep_file(inode.id);
        }
        let tree = once.begin(self, None)?;
        let removed = match open {
            Some(inode) if !tree.keeps_removed() && inode.attr().nlink < 2 => {
                self.park(&tree, &permit, &at, inode).await
            }
            _ => permit.within(tree.remove(&at.dir.locator(), &at.name, directory)).await,
        };
        self.touched(&at.dir);
        match removed {
            // Put aside by the predecessor.
            Err(e) if e.is(Kind::NotFound) && once.is_in_doubt() => {}
            other => other?,
        }
        let gone = self.parts.namespace.removed(&at.dir, &at.name, |dir, name| tree.child(dir, name));
        if let Some(inode) = gone {
            // Its link count and change time are others now, and so may be what it is leased by.
            inode.doubt();
        }
        Ok(((), permit))
    }

    /// Removes a file that is open by giving it a hidden name, which goes with the last handle.
    async fn park(&self, tree: &DynTree, permit: &Permit, at: &At, inode: &Arc<Inode>) -> Result<()> {
        let dir = at.dir.locator();
        let parked = self.will_park(inode, &dir);
        let moved = tree.rename((&dir, &at.name), (&dir, &parked.name), RenameMode::NoReplace);
        let moved = permit.within(moved).await;
        let removed = self.parked(tree, inode, &parked, moved.is_ok()).await;
        inode.begin().finish(moved?, self.parts.ttl);
        removed
    }

    /// An open file is about to be put aside in `dir`; [`Shared::parked`] ends it.
    fn will_park(&self, inode: &Inode, dir: &Bytes) -> Parked {
        let parked = Parked { dir: dir.clone(), name: parked_name(inode.id) };
        self.files.will_park(inode.id, &parked);
        self.write_down();
        parked
    }

    /// It lies there, or may. If it was closed meanwhile it is removed at once.
    async fn parked(&self, tree: &DynTree, inode: &Inode, parked: &Parked, is_there: bool) -> Result<()> {
        if self.files.park(inode.id, parked, is_there) {
            return Ok(());
        }
        let removed = remove_parked(tree, parked).await;
        self.files.cleared(inode.id);
        removed
    }

    /// RENAME.
    pub(super) async fn rename(&self, from: At, to: At, flags: u32, once: Once) -> Result<((), Permit)> {
        let mode = match flags {
            0 => RenameMode::Replace,
            libc::RENAME_NOREPLACE => RenameMode::NoReplace,
            libc::RENAME_EXCHANGE => RenameMode::Exchange,
            _ => return Err(Error::new(Kind::Invalid, "this way of renaming is not offered")),
        };
        let permit = self.to_rename(&from, &to).await?;
        if self.was_renamed(&once) {
            self.touched(&from.dir);
            self.touched(&to.dir);
            return Ok(((), permit));
        }
        let (from_dir, to_dir) = (from.dir.locator(), to.dir.locator());
        let target = self.parts.namespace.child(&to.dir, &to.name);
        if let Some(t) = target.as_ref().filter(|_| mode == RenameMode::Replace) {
            self.keep_file(t.id);
        }
        let tree = self.begin_rename(&once, (&from, &to), mode)?;
        let kept = match &target {
            Some(t) if mode == RenameMode::Replace && !tree.keeps_removed() && self.files.is_open(t.id) => {
                self.keep_replaced(&tree, &permit, t, &to_dir).await?
            }
            _ => None,
        };
        let renamed = permit.within(tree.rename((&from_dir, &from.name), (&to_dir, &to.name), mode)).await;
        self.touched(&from.dir);
        self.touched(&to.dir);
        let node = match (renamed, kept, &target) {
            (Ok(node), Some(parked), Some(t)) => {
                self.parked(&tree, t, &parked, true).await?;
                node
            }
            (Err(e), Some(parked), Some(t)) => {
                // The second name is not needed; that it may stay until the file is closed is the lesser evil.
                let _ = remove_parked(&tree, &parked).await;
                let _ = self.parked(&tree, t, &parked, false).await;
                return Err(e);
            }
            (outcome, ..) => outcome?,
        };
        if mode == RenameMode::Exchange {
            let back = self.parts.source.lookup(&from_dir, &from.name).await?;
            self.parts.namespace.exchanged((&from.dir, &from.name, back.locator), (&to.dir, &to.name, node.locator));
        } else {
            self.parts.namespace.renamed((&from.dir, &from.name), (&to.dir, &to.name), node.locator.clone());
        }
        if let Some(t) = target {
            t.doubt();
        }
        if let Some(moved) = self.parts.namespace.child(&to.dir, &to.name) {
            // Renaming changes the change time, hence the version.
            moved.doubt();
        }
        Ok(((), permit))
    }

    /// A rename is about to be made. The predecessor's attempt was not made when this process began ([`Shared::was_renamed`]), but may have been since.
    fn begin_rename(&self, once: &Once, (from, to): (&At, &At), mode: RenameMode) -> Result<DynTree> {
        let moved = self.parts.namespace.child(&from.dir, &from.name);
        let what = attempt::Rename {
            from: from.dir.id,
            name: from.name.clone(),
            to: to.dir.id,
            new_name: to.name.clone(),
            fileid: moved.map_or(0, |i| i.attr().fileid),
            exchange: mode == RenameMode::Exchange,
        };
        once.begin(self, Some(attempt::What::Rename(what)))
    }

    /// Gives an open file that a rename is going to replace a second, hidden name.
    async fn keep_replaced(
        &self,
        tree: &DynTree,
        permit: &Permit,
        target: &Arc<Inode>,
        dir: &Bytes,
    ) -> Result<Option<Parked>> {
        let parked = self.will_park(target, dir);
        let Err(e) = permit.within(tree.link(&target.locator(), dir, &parked.name)).await else {
            return Ok(Some(parked));
        };
        // In case it was made nevertheless.
        let _ = self.parked(tree, target, &parked, false).await;
        match e.kind() {
            // Directories have no second name, and what was removed elsewhere needs none.
            Kind::NotPermitted | Kind::IsADirectory | Kind::NotFound | Kind::Unsupported => Ok(None),
            _ => Err(e),
        }
    }

    /// SETATTR.
    pub(super) async fn set_attr(&self, inode: &Arc<Inode>, set: SetAttr, once: Once) -> Result<(AttrOut, Permit)> {
        let change = Change {
            mode: set.mode.map(|m| m & 0o7777),
            uid: set.uid,
            gid: set.gid,
            size: set.size,
            atime: set.atime.map(origin_time),
            mtime: set.mtime.map(origin_time),
        };
        if change == Change::default() {
            return self.getattr(inode).await;
        }
        let waits = usize::from(change.size.is_some());
        inode.waiting_lengths.fetch_add(waits, SeqCst);
        self.crossed.notify_waiters();
        let permit = self.to_change(inode).await;
        inode.waiting_lengths.fetch_sub(waits, SeqCst);
        let permit = permit?;
        let _alone = if change.size.is_some() { self.alone(inode).await } else { None };
        let tree = once.begin(self, None)?;
        let guard = inode.begin();
        let node = match self.files.direct(inode) {
            Some(file) if file_can(&change) || inode.is_nameless() => permit.within(file.set_attr(&change)).await?,
            _ => permit.within(tree.set_attr(&inode.locator(), &change)).await?,
        };
        guard.finish(node, permit.belief.ttl);
        Ok((self.attr_out(inode, &permit), permit))
    }
}

fn taken() -> Error {
    Error::new(Kind::AlreadyExists, "there is something of this name")
}

/// Changes of the content go through the open file, so that they keep their order with its writes.
fn file_can(change: &Change) -> bool {
    change.size.is_some() || change.mtime.is_some()
}

/// Removes what was put aside. Who closes the file at that moment may have done so already, or a predecessor, after which even the directory could go.
pub(super) async fn remove_parked(tree: &DynTree, parked: &Parked) -> Result<()> {
    match tree.remove(&parked.dir, &parked.name, false).await {
        Err(e) if e.is(Kind::NotFound) || e.is(Kind::Stale) => Ok(()),
        other => other,
    }
}

fn parked_name(id: u64) -> Bytes {
    let name = [PARKED_PREFIX, format!("{id:x}-{:016x}", rand::random::<u64>()).as_bytes()].concat();
    name.into()
}

fn origin_time(t: SetTime) -> OriginTime {
    match t {
        SetTime::At(t) => OriginTime::At(t),
        SetTime::Now => OriginTime::Now,
    }
}

/// What MKNOD asks for.
///
/// # Errors
/// [`Kind::Invalid`] for a type that is none.
pub(super) fn new_special(mode: u32, rdev: u32, uid: u32, gid: u32) -> Result<NewNode> {
    let what = match mode & libc::S_IFMT {
        0 | libc::S_IFREG => New::File,
        libc::S_IFIFO => New::Fifo,
        libc::S_IFSOCK => New::Socket,
        libc::S_IFCHR => New::CharDevice(rdev),
        libc::S_IFBLK => New::BlockDevice(rdev),
        _ => return Err(Error::new(Kind::Invalid, "no such type of file")),
    };
    Ok(NewNode { what, mode: mode & 0o7777, uid, gid })
}
