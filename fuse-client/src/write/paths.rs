//! Making, removing and renaming files; making and removing directories.
//!
//! What is not asked, because it would cost a request each time and the kernel has just looked: whether a new file's name is free (its first commit is
//! conditional), and whether a file that is removed was still there.

use super::file::{FileState, Inner, Open};
use super::{Core, absent_is_none, directory, has_none, meta};
use bytes::Bytes;
use efc_backend::objects::{Condition, Metadata};
use efc_backend::tree::{Change, NewNode};
use efc_common::node::{FileKind, Node};
use efc_common::{Error, Kind, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn metadata(new: &NewNode, kind: u32) -> Metadata {
    Metadata {
        mode: Some(kind | new.mode & 0o7777),
        uid: Some(new.uid),
        gid: Some(new.gid),
        mtime: Some(meta::now()),
        ..Metadata::default()
    }
}

pub(super) fn exists() -> Error {
    Error::new(Kind::AlreadyExists, "there is something of this name")
}

fn taken(e: Error) -> Error {
    if e.is(Kind::Conflict) { exists().caused_by(e) } else { e }
}

/// Long ago: what the overlay knows at all.
fn ever() -> Instant {
    let now = Instant::now();
    now.checked_sub(Duration::from_secs(86400)).unwrap_or(now)
}

impl Core {
    /// No file that only this mount has is called so. What it has made at the store others may have removed since: for that the store is asked, by who looks before, or by the
    /// condition of the first commit.
    fn is_free(&self, dir: &Bytes, name: &[u8]) -> Result<()> {
        match self.names.find(dir, name, Instant::now()) {
            Some(Some(_)) => Err(exists()),
            _ => Ok(()),
        }
    }

    pub(super) async fn create_file(self: &Arc<Self>, dir: &Bytes, name: &[u8], new: &NewNode) -> Result<Node> {
        let locator = self.objects.child(dir, name, false)?;
        self.is_free(dir, name)?;
        self.detach_removed(&locator).await?;
        let name = Bytes::copy_from_slice(name);
        let state = FileState::made(self, &locator, (dir, &name), metadata(new, libc::S_IFREG));
        {
            let mut files = self.files.lock();
            if files.contains_key(&locator) {
                return Err(exists());
            }
            files.insert(locator, state.clone());
        }
        self.names.draft(dir, &name, state.clone());
        self.known.touch_dir(dir);
        Ok(state.node())
    }

    /// A file that is still in use here without changes, or is just being let go, and that others have removed, makes way for a new one of its name.
    async fn detach_removed(self: &Arc<Self>, locator: &Bytes) -> Result<()> {
        if self.file(locator).is_none() {
            return Ok(());
        }
        let open = self.enter(locator);
        let mut inner = open.state.inner.lock().await;
        if inner.removed {
            return Ok(());
        }
        if inner.is_dirty() || absent_is_none(self.head(locator).await)?.is_some() {
            return Err(exists());
        }
        self.nameless(&open, &mut inner);
        Ok(())
    }

    pub(super) async fn create_directory(&self, dir: &Bytes, name: &[u8], new: &NewNode) -> Result<Node> {
        let locator = self.objects.child(dir, name, true)?;
        self.is_free(dir, name)?;
        let metadata = metadata(new, libc::S_IFDIR);
        self.objects.put(&locator, Vec::new(), &metadata, &Condition::Absent).await.map_err(taken)?;
        let node = directory(&locator);
        // Listings of a directory of the same name that was here before are wrong.
        self.names.replaced(&locator);
        self.made(dir, name, node, &metadata)
    }

    pub(super) async fn create_link(&self, dir: &Bytes, name: &[u8], target: &Bytes, new: &NewNode) -> Result<Node> {
        let locator = self.objects.child(dir, name, false)?;
        self.is_free(dir, name)?;
        let metadata = metadata(new, libc::S_IFLNK);
        let body = vec![target.clone()];
        let node = self.objects.put(&locator, body, &metadata, &Condition::Absent).await.map_err(taken)?;
        self.made(dir, name, node, &metadata)
    }

    fn made(&self, dir: &Bytes, name: &[u8], node: Node, metadata: &Metadata) -> Result<Node> {
        self.known.learn(&node, metadata, true);
        self.known.touch_dir(dir);
        let node = meta::apply(node, metadata);
        self.names.there(dir, &Bytes::copy_from_slice(name), node.clone());
        Ok(node)
    }

    /// The name of a file leads nowhere any more; descriptors go on with it.
    async fn detach(&self, open: &Open, inner: &mut Inner) -> Result<()> {
        self.drop_stream(inner).await;
        if !open.state.is_shared() {
            return Ok(());
        }
        if !inner.loaded && absent_is_none(open.load(inner).await)?.is_none() {
            return Ok(());
        }
        if inner.draft.needs_base() { inner.hold(self).await } else { Ok(()) }
    }

    /// Does what takes the name of a detached file. Who takes over in the middle finds it without.
    async fn take_name<T>(&self, open: &Open, inner: &mut Inner, taking: impl Future<Output = Result<T>>) -> Result<T> {
        inner.removed = true;
        self.note_now(inner);
        let taken = taking.await;
        if taken.is_err() {
            inner.removed = false;
            open.state.show(self, inner);
        }
        taken
    }

    /// To be called when its key is removed or taken by another.
    fn nameless(&self, open: &Open, inner: &mut Inner) {
        inner.removed = true;
        open.state.show(self, inner);
        let mut files = self.files.lock();
        if files.get(&inner.locator).is_some_and(|s| Arc::ptr_eq(s, &open.state)) {
            files.remove(&inner.locator);
        }
    }

    pub(super) async fn remove_file(self: &Arc<Self>, dir: &Bytes, name: &[u8]) -> Result<()> {
        let locator = self.objects.child(dir, name, false)?;
        let known = Bytes::copy_from_slice(name);
        if self.file(&locator).is_some() {
            let open = self.enter(&locator);
            let mut inner = open.state.inner.lock().await;
            if !inner.removed {
                self.detach(&open, &mut inner).await?;
                if !inner.loaded || inner.base.is_some() || !inner.attempts.is_empty() {
                    self.take_name(&open, &mut inner, self.delete_one(dir, &locator)).await?;
                }
                self.nameless(&open, &mut inner);
                self.names.gone(dir, &known);
                return Ok(());
            }
        }
        self.delete_one(dir, &locator).await?;
        self.names.gone(dir, &known);
        Ok(())
    }

    async fn delete_one(&self, dir: &Bytes, locator: &Bytes) -> Result<()> {
        self.keep_dir(dir).await?;
        Core::deleted(self.objects.delete(std::slice::from_ref(locator)).await?)?;
        self.known.touch_dir(dir);
        Ok(())
    }

    /// Is nothing in it, here or at the store?
    pub(super) async fn is_empty(&self, dir: &Bytes) -> Result<bool> {
        let ours = self.names.all(dir, ever());
        if ours.iter().any(|(_, node)| node.is_some()) {
            return Ok(false);
        }
        let mut from = None;
        loop {
            let Some(page) = absent_is_none(self.backend.list(dir, from).await)? else { return Ok(true) };
            if !page.entries.is_empty() || !page.hidden.is_empty() {
                return Ok(false);
            }
            from = page.next;
            if from.is_none() {
                return Ok(true);
            }
        }
    }

    pub(super) async fn remove_directory(&self, dir: &Bytes, name: &[u8]) -> Result<()> {
        let locator = self.objects.child(dir, name, true)?;
        if !self.is_empty(&locator).await? {
            return Err(Error::new(Kind::NotEmpty, "the directory is not empty"));
        }
        self.delete_one(dir, &locator).await?;
        self.known.forget_dir(&locator);
        self.names.replaced(&locator);
        self.names.gone(dir, &Bytes::copy_from_slice(name));
        Ok(())
    }

    /// Attributes of a directory are its marker's.
    pub(super) async fn set_directory(&self, locator: &Bytes, change: &Change) -> Result<Node> {
        let kept = self.marker(locator).await?;
        let mut there = kept.is_some();
        let mut metadata = kept.unwrap_or_default();
        if meta::change(&mut metadata, libc::S_IFDIR, change) {
            if !locator.is_empty() {
                self.objects.put(locator, Vec::new(), &metadata, &Condition::Any).await?;
            } else if change.mode.is_some() || change.uid.is_some() || change.gid.is_some() {
                return Err(has_none("attributes of a bucket's root: mount a directory of it"));
            }
            there = true;
        }
        // Times of a bucket's root and access times are known to this mount only, for a while: tools that copy trees set them last.
        self.known.learn(&directory(locator), &metadata, there);
        Ok(meta::apply(directory(locator), &metadata))
    }

    pub(super) async fn rename(
        self: &Arc<Self>,
        from: (&Bytes, &[u8]),
        to: (&Bytes, &[u8]),
        no_replace: bool,
        is_in_doubt: bool,
    ) -> Result<Node> {
        if no_replace {
            self.is_free(to.0, to.1)?;
        }
        if self.may_be_directory(from)? {
            match self.rename_directory(from, to, no_replace).await {
                Err(e) if e.is(Kind::NotFound) => {}
                other => return other,
            }
        }
        let (source, target) = (self.objects.child(from.0, from.1, false)?, self.objects.child(to.0, to.1, false)?);
        if source == target {
            return self.enter(&source).fresh().await;
        }
        let (moved, replaced) = (self.enter(&source), self.enter(&target));
        match moved.loaded().await {
            Err(e) if e.is(Kind::NotFound) => {
                drop((moved, replaced));
                return self.rename_directory(from, to, no_replace).await;
            }
            other => other?,
        }
        // In the order of their keys, as everybody.
        let (mut inner, mut old) = if source < target {
            let first = moved.state.inner.lock().await;
            (first, replaced.state.inner.lock().await)
        } else {
            let second = replaced.state.inner.lock().await;
            (moved.state.inner.lock().await, second)
        };
        self.look_for_attempts(&mut inner).await?;
        if inner.base.is_some() && inner.is_dirty() {
            moved.commit(&mut inner).await?;
        }
        self.detach(&replaced, &mut old).await?;
        let moving = self.move_file(&moved, &mut inner, &target, no_replace, is_in_doubt);
        self.take_name(&replaced, &mut old, moving).await?;
        self.nameless(&replaced, &mut old);
        (inner.dir, inner.name) = (to.0.clone(), Bytes::copy_from_slice(to.1));
        self.moved(&source, &moved.state, &mut inner);
        self.names.gone(from.0, &Bytes::copy_from_slice(from.1));
        self.known.touch_dir(from.0);
        self.known.touch_dir(to.0);
        if !inner.is_dirty() {
            self.names.there(&inner.dir, &inner.name, inner.node(self));
        }
        Ok(inner.node(self))
    }

    /// Is the name that of a directory, as far as is known here? A file may have taken its place since.
    fn may_be_directory(&self, (dir, name): (&Bytes, &[u8])) -> Result<bool> {
        if let Some(Some(node)) = self.names.find(dir, name, ever()) {
            return Ok(node.attr.kind == FileKind::Directory);
        }
        // `a%efc-file` cannot be one.
        let Ok(below) = self.objects.child(dir, name, true) else { return Ok(false) };
        Ok(self.known.dir(&below).is_some())
    }

    /// Gives the content of a file its new key. In doubt: it may have it already, besides its old one.
    async fn move_file(
        &self,
        open: &Open,
        inner: &mut Inner,
        target: &Bytes,
        no_replace: bool,
        is_in_doubt: bool,
    ) -> Result<()> {
        let condition = if no_replace { Condition::Absent } else { Condition::Any };
        let Some(base) = inner.base.clone() else {
            if no_replace && absent_is_none(self.objects.head(target).await)?.is_some() {
                return Err(exists());
            }
            self.drop_stream(inner).await;
            inner.condition = condition;
            inner.locator = target.clone();
            return Ok(());
        };
        let from = (&base.locator, &base.version);
        let copied = self.objects.copy(from, target, None, &condition).await;
        let node = match copied.map_err(taken) {
            Err(e) if is_in_doubt && e.is(Kind::AlreadyExists) => {
                let there = absent_is_none(self.objects.head(target).await)?.map(|(node, _)| node);
                there.filter(|node| node.version == base.version).ok_or(e)?
            }
            other => other?,
        };
        self.delete_one(&inner.dir.clone(), &inner.locator.clone()).await?;
        inner.locator = target.clone();
        open.committed(inner, &node);
        inner.changed = Some(meta::now());
        Ok(())
    }

    /// A file has another key now.
    pub(super) fn moved(&self, from: &Bytes, state: &Arc<FileState>, inner: &mut Inner) {
        {
            let mut files = self.files.lock();
            if files.get(from).is_some_and(|s| Arc::ptr_eq(s, state)) {
                files.remove(from);
            }
            files.insert(inner.locator.clone(), state.clone());
        }
        state.show(self, inner);
    }
}
