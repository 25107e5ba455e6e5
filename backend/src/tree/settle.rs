//! Retries of what must not happen twice: create, link, remove, rename, and xattrs made or removed.
//!
//! When an attempt ended *in doubt* (the origin may have done it, the answer is lost), the next one may be refused because of what the first
//! one did: the name is there already, or gone. Then the origin is asked whether things are as they were wanted, and if so the call has
//! succeeded. Attempts that certainly did not reach the origin raise no doubt (see [`unsent`]), so a name that was there before is reported as such.
//! The caller's lease keeps other EFC clients from the directory meanwhile; a change by others between two attempts may be taken for ours, if it
//! is exactly what was wanted. NFS adds exactness where the protocol has it: CREATE with a verifier.
//!
//! Calls that another process may have made before it died begin in doubt ([`Tree::in_doubt`]). Its verifier is not ours, and it may have died between making an
//! object and giving it its owner and mode: such an object is recognised by what it has until then, and gets the rest.

use super::around::{Around, Decorated};
use super::{Change, DynTree, New, NewNode, OpenFile, RenameMode, SetTime, Tree};
use crate::DynBackend;
use crate::count::Request;
use crate::retry::{Outage, Policy};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::{FileKind, Node};
use efc_common::{Error, Kind, Result, Retry};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

/// The set-group-id bit.
const SETGID: u32 = 0o2000;
/// Owner and group of what is made, until it is given away.
const ROOT: u32 = 0;
/// Permission bits that a server may choose for a file of CREATE EXCLUSIVE, which has no room for any.
const EXCLUSIVE_MODE: u32 = 0o600;

/// Marks an error of a call that certainly was not executed: it never left, or the origin answered that it did nothing.
pub(crate) fn unsent(e: Error) -> Error {
    e.with("executed", "no")
}

/// May the origin have done what was asked, although the call failed?
fn in_doubt(e: &Error) -> bool {
    e.retry() == Retry::Later && e.context("executed") != Some("no")
}

/// The outermost decorator of a tree: retries every call, these with care.
pub(crate) struct Settled {
    inner: DynTree,
    repeated: Decorated<Policy>,
    backend: DynBackend,
    policy: Arc<Policy>,
    /// May the first attempt be a second one already?
    doubt: bool,
}

impl Settled {
    /// Retries calls of `inner`; `backend` reads the same origin, with retries of its own.
    pub(crate) fn new(inner: DynTree, backend: DynBackend, policy: Arc<Policy>) -> Settled {
        Settled { repeated: Decorated::new(inner.clone(), policy.clone()), inner, backend, policy, doubt: false }
    }

    /// Makes `call` until it is answered. A final refusal that came after doubt goes to `look`, which returns what was wanted if it is there,
    /// else the refusal.
    async fn settle<T, C, L>(
        &self,
        request: Request,
        mut call: impl FnMut() -> C + Send,
        look: impl FnOnce(Error) -> L + Send,
    ) -> Result<T>
    where
        C: Future<Output = Result<T>> + Send,
        L: Future<Output = Result<T>> + Send,
    {
        let mut outage = Outage::new(self.policy.deadline());
        let mut doubt = self.doubt;
        loop {
            let e = match outage.attempt(call()).await {
                Ok(answer) => return Ok(answer),
                Err(e) => e,
            };
            if doubt && e.retry() == Retry::Never {
                return outage.attempt(look(e)).await.map_err(|e| e.with_retry(Retry::Never));
            }
            doubt |= in_doubt(&e);
            outage.failed(&self.policy, request, e).await?;
        }
    }

    /// `node`, if it is what a create of `new` in `dir` makes.
    async fn made(&self, node: Node, dir: &Bytes, new: &NewNode) -> Result<Option<Node>> {
        let above = self.backend.getattr(dir).await?.attr;
        let inherits = above.mode.unwrap_or(0) & SETGID != 0;
        let (gid, directory) = (if inherits { above.gid } else { Some(new.gid) }, new.what == New::Directory);
        let mode = new.mode & 0o7777 | if inherits && directory { SETGID } else { 0 };
        let has_mode = !matches!(new.what, New::Symlink(_));
        let attr = &node.attr;
        let owned = if self.doubt {
            // Finished or not: the mode comes last.
            [Some(ROOT), Some(new.uid)].contains(&attr.uid)
                && [Some(ROOT), Some(new.gid), above.gid].contains(&attr.gid)
                && (!has_mode || attr.mode.is_some_and(|m| m & !(mode | EXCLUSIVE_MODE) == 0))
        } else {
            !has_mode || attr.uid == Some(new.uid) && attr.gid == gid && attr.mode == Some(mode)
        };
        if !owned || !self.is_new(&node, &new.what).await? {
            return Ok(None);
        }
        if !self.doubt {
            return Ok(Some(node));
        }
        // The times of a file of CREATE EXCLUSIVE are its verifier.
        let times = (new.what == New::File).then_some(SetTime::Now);
        let mode = has_mode.then_some(mode);
        let rest = Change { mode, uid: Some(new.uid), gid, size: None, atime: times, mtime: times };
        self.repeated.set_attr(&node.locator, &rest).await.map(Some)
    }

    /// Is `node` a new object of this type?
    async fn is_new(&self, node: &Node, what: &New) -> Result<bool> {
        let attr = &node.attr;
        Ok(match what {
            New::File => attr.kind == FileKind::File && attr.size == 0 && attr.nlink == 1,
            New::Directory => attr.kind == FileKind::Directory && self.is_empty(&node.locator).await?,
            New::Symlink(target) => {
                attr.kind == FileKind::Symlink && self.backend.readlink(&node.locator).await? == *target
            }
            New::Fifo => attr.kind == FileKind::Fifo,
            New::Socket => attr.kind == FileKind::Socket,
            New::CharDevice(n) => attr.kind == FileKind::CharDevice && attr.rdev == *n,
            New::BlockDevice(n) => attr.kind == FileKind::BlockDevice && attr.rdev == *n,
        })
    }

    async fn is_empty(&self, dir: &Bytes) -> Result<bool> {
        let mut from = None;
        loop {
            let page = self.backend.list(dir, from).await?;
            if !page.entries.is_empty() || !page.hidden.is_empty() {
                return Ok(false);
            }
            from = page.next;
            if from.is_none() {
                return Ok(true);
            }
        }
    }

    /// Swaps two names. A second attempt would swap them back, so each looks first whether it was done.
    async fn exchange(&self, from: (&Bytes, &[u8]), to: (&Bytes, &[u8])) -> Result<Node> {
        let before = self.backend.lookup(from.0, from.1).await?;
        let again = AtomicBool::new(false);
        let swap = || async {
            if again.swap(true, Relaxed) {
                let now = self.backend.lookup(to.0, to.1).await?;
                if now.attr.fileid == before.attr.fileid {
                    return Ok(now);
                }
            }
            self.inner.rename(from, to, RenameMode::Exchange).await
        };
        self.policy.around(Request::Rename, swap).await
    }
}

#[async_trait]
impl Tree for Settled {
    fn keeps_removed(&self) -> bool {
        self.inner.keeps_removed()
    }

    fn child(&self, dir: &Bytes, name: &[u8]) -> Option<Bytes> {
        self.inner.child(dir, name)
    }

    fn drafts(&self) -> bool {
        self.inner.drafts()
    }

    fn overlay(&self, dir: &Bytes, asked: Instant) -> Vec<(Bytes, Option<Node>)> {
        self.inner.overlay(dir, asked)
    }

    fn find_overlay(&self, dir: &Bytes, name: &[u8], asked: Instant) -> Option<Option<Node>> {
        self.inner.find_overlay(dir, name, asked)
    }

    fn replaced(&self, dir: &Bytes) -> Option<Instant> {
        self.inner.replaced(dir)
    }

    fn complete_now(&self, node: &Node) -> Option<Node> {
        self.inner.complete_now(node)
    }

    async fn complete(&self, node: Node) -> Result<Node> {
        self.repeated.complete(node).await
    }

    fn in_doubt(&self) -> Option<DynTree> {
        let same = Settled::new(self.inner.clone(), self.backend.clone(), self.policy.clone());
        Some(Arc::new(Settled { doubt: true, ..same }))
    }

    async fn create(&self, dir: &Bytes, name: &[u8], new: &NewNode) -> Result<Node> {
        let look = |e: Error| async move {
            if !e.is(Kind::AlreadyExists) {
                return Err(e);
            }
            let node = self.backend.lookup(dir, name).await?;
            self.made(node, dir, new).await?.ok_or(e)
        };
        self.settle(Request::Create, || self.inner.create(dir, name, new), look).await
    }

    async fn link(&self, file: &Bytes, dir: &Bytes, name: &[u8]) -> Result<Node> {
        let look = |e: Error| async move {
            if !e.is(Kind::AlreadyExists) {
                return Err(e);
            }
            let (node, file) = (self.backend.lookup(dir, name).await?, self.backend.getattr(file).await?);
            if node.attr.fileid == file.attr.fileid { Ok(node) } else { Err(e) }
        };
        self.settle(Request::Link, || self.inner.link(file, dir, name), look).await
    }

    async fn remove(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<()> {
        let look = |e: Error| async move { if e.is(Kind::NotFound) { Ok(()) } else { Err(e) } };
        self.settle(Request::Remove, || self.inner.remove(dir, name, directory), look).await
    }

    async fn rename(&self, from: (&Bytes, &[u8]), to: (&Bytes, &[u8]), mode: RenameMode) -> Result<Node> {
        if mode == RenameMode::Exchange {
            return self.exchange(from, to).await;
        }
        let look = |e: Error| async move {
            if !matches!(e.kind(), Kind::NotFound | Kind::AlreadyExists) {
                return Err(e);
            }
            match self.backend.lookup(from.0, from.1).await {
                // Moved away: it is what the target names now.
                Err(gone) if gone.is(Kind::NotFound) => self.backend.lookup(to.0, to.1).await,
                Err(other) => Err(other),
                Ok(_) => Err(e),
            }
        };
        self.settle(Request::Rename, || self.inner.rename(from, to, mode), look).await
    }

    async fn set_attr(&self, locator: &Bytes, change: &Change) -> Result<Node> {
        self.repeated.set_attr(locator, change).await
    }

    async fn set_xattr(&self, locator: &Bytes, name: &[u8], value: &[u8], flags: i32) -> Result<()> {
        let look = |e: Error| async move {
            let is_set = |all: Vec<(Bytes, Bytes)>| all.iter().any(|(n, v)| n == name && v == value);
            if e.is(Kind::AlreadyExists) && is_set(self.backend.xattrs(locator).await?) { Ok(()) } else { Err(e) }
        };
        self.settle(Request::Setattr, || self.inner.set_xattr(locator, name, value, flags), look).await
    }

    async fn remove_xattr(&self, locator: &Bytes, name: &[u8]) -> Result<()> {
        let look = |e: Error| async move { if e.is(Kind::NoData) { Ok(()) } else { Err(e) } };
        self.settle(Request::Setattr, || self.inner.remove_xattr(locator, name), look).await
    }

    async fn open(&self, locator: &Bytes, write: bool) -> Result<Arc<dyn OpenFile>> {
        self.repeated.open(locator, write).await
    }

    fn reopen(&self, fd: OwnedFd, locator: &Bytes) -> Option<Arc<dyn OpenFile>> {
        self.repeated.reopen(fd, locator)
    }
}
