//! What a request may believe: the leases it needs, by which keys, and the permission that it keeps until its answer was written (decision 0007).
//!
//! A directory's names, and the attributes and content of its files, are leased by the directory; attributes of a directory by itself; a file with several names by a
//! key of its own. Without leases (`consistency=ttl`) everything is permitted, and believed for the `ttl`.

use super::Shared;
use crate::lease::{LeaseGuard, Leases, Under};
use crate::namespace::{Belief, Inode, Namespace};
use bytes::Bytes;
use efc_common::id::SourceId;
use efc_common::lease::{DirKey, FileKey, GrantNumber, Mode, Scope, Want};
use efc_common::node::{Attr, FileKind, Node};
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What a request needs may turn out to be something else once it is permitted (a link was made, a directory moved); so often it begins again.
const ATTEMPTS: usize = 16;
/// Keys that are known before those are looked for that nobody needs any more.
const KEYS_MIN: usize = 4096;

/// The leases of a mount, and what they are of.
pub(super) struct Beliefs {
    pub(super) leases: Leases,
    source: SourceId,
    /// Of files with several names.
    links: SourceId,
    /// The bucket, if it is one: hints of stores name it.
    pub(super) bucket: Option<String>,
    paths: bool,
    pub(super) deadline: Duration,
    nodes: Mutex<Keyed>,
}

/// The nodes that a key stands for.
#[derive(Default)]
struct Keyed {
    by_key: HashMap<DirKey, Vec<u64>>,
    sweep_at: usize,
}

/// What the attributes and the content of a node are leased by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Own {
    /// A directory, or a file with several names.
    Key(DirKey),
    /// A file in its directory.
    In(DirKey, FileKey),
    /// Its last name was removed here: nobody else finds it.
    Nameless,
    /// Nobody knows where it is: nothing is believed.
    Lost,
}

impl Own {
    fn want(&self, mode: Mode) -> Option<Want> {
        let scope = match self {
            Own::Key(key) => Scope::Dir(key.clone()),
            Own::In(dir, file) => Scope::File(dir.clone(), file.clone()),
            Own::Nameless | Own::Lost => return None,
        };
        Some(Want { scope, mode })
    }
}

impl Beliefs {
    /// Over `leases` of a source. An operation waits at most `deadline` for what it needs.
    pub(super) fn new(
        leases: Leases,
        source: SourceId,
        bucket: Option<String>,
        paths: bool,
        deadline: Duration,
    ) -> Beliefs {
        let links = SourceId::of(&[b"links", &source.0]);
        let nodes = Mutex::new(Keyed { by_key: HashMap::new(), sweep_at: KEYS_MIN });
        Beliefs { leases, source, links, bucket, paths, deadline, nodes }
    }

    fn key_of(&self, locator: &[u8]) -> Result<DirKey> {
        if self.paths && !locator.is_empty() && !locator.ends_with(b"/") {
            return DirKey::new(self.source, &[locator, b"/"].concat());
        }
        DirKey::new(self.source, locator)
    }

    /// The key of a file with several names.
    fn link_key(&self, attr: &Attr) -> Result<Option<DirKey>> {
        let several = attr.kind != FileKind::Directory && attr.nlink > 1 && attr.fileid != 0;
        several.then(|| DirKey::new(self.links, &attr.fileid.to_be_bytes())).transpose()
    }

    /// The key of a directory, which is found by it from now on.
    pub(super) fn dir(&self, namespace: &Namespace, dir: &Inode) -> Result<DirKey> {
        let Some(state) = &dir.dir else { return Err(Error::new(Kind::NotADirectory, "not a directory")) };
        let locator = dir.locator();
        if let Some((of, key)) = &*state.lease_key.lock()
            && *of == locator
        {
            return Ok(key.clone());
        }
        let key = self.key_of(&locator)?;
        self.enter(namespace, &key, dir.id);
        *state.lease_key.lock() = Some((locator, key.clone()));
        Ok(key)
    }

    fn enter(&self, namespace: &Namespace, key: &DirKey, node: u64) {
        let mut keyed = self.nodes.lock();
        let nodes = keyed.by_key.entry(key.clone()).or_default();
        if !nodes.contains(&node) {
            nodes.push(node);
        }
        if keyed.by_key.len() > keyed.sweep_at {
            keyed.by_key.retain(|_, nodes| {
                nodes.retain(|id| namespace.get(*id).is_some());
                !nodes.is_empty()
            });
            keyed.sweep_at = (keyed.by_key.len() * 2).max(KEYS_MIN);
        }
    }

    /// The nodes that a key stands for.
    pub(super) fn nodes(&self, namespace: &Namespace, key: &DirKey) -> Vec<Arc<Inode>> {
        let ids = self.nodes.lock().by_key.get(key).cloned().unwrap_or_default();
        ids.into_iter().filter_map(|id| namespace.get(id)).collect()
    }

    /// What a node is leased by.
    pub(super) fn own(&self, namespace: &Namespace, inode: &Inode) -> Result<Own> {
        if inode.dir.is_some() {
            return Ok(Own::Key(self.dir(namespace, inode)?));
        }
        if inode.is_lost() {
            return Ok(Own::Lost);
        }
        if let Some(key) = self.link_key(&inode.now().attr)? {
            self.enter(namespace, &key, inode.id);
            return Ok(Own::Key(key));
        }
        match inode.dentry() {
            Some(d) => Ok(Own::In(self.dir(namespace, &d.parent)?, FileKey::new(d.name)?)),
            None => Ok(Own::Nameless),
        }
    }

    /// What the origin's `node` in a directory is leased by.
    fn child(&self, dir: &DirKey, name: &Bytes, node: &Node) -> Result<Want> {
        if node.attr.kind == FileKind::Directory {
            return Ok(Want::read(self.key_of(&node.locator)?));
        }
        if let Some(key) = self.link_key(&node.attr)? {
            return Ok(Want::read(key));
        }
        Ok(Want::read_file(dir.clone(), FileKey::new(name.clone())?))
    }
}

/// Permission of a request: to be kept until its answer was written to the kernel, so that a drop that follows finds what the answer entered.
pub(super) struct Permit {
    lease: Option<LeaseGuard>,
    /// Of entries in an answer.
    entries: Mutex<Vec<LeaseGuard>>,
    pub(super) belief: Belief,
    /// It runs past a lease that is on its way back.
    pub(super) passing: bool,
}

impl Permit {
    fn free(belief: Belief) -> Permit {
        Permit { lease: None, entries: Mutex::default(), belief, passing: false }
    }

    fn under(guard: LeaseGuard, ttl: Duration) -> Permit {
        let belief = match guard.how() {
            Under::Believed { .. } => Belief { ttl, max_age: Duration::ZERO, since: guard.newest() },
            Under::Uncached => Belief::NONE,
        };
        Permit { passing: guard.how() == Under::Uncached, lease: Some(guard), entries: Mutex::default(), belief }
    }

    /// For what needs none.
    pub(super) fn none() -> Permit {
        Permit::free(Belief::NONE)
    }

    pub(super) fn keep(&self, guard: LeaseGuard) {
        self.entries.lock().push(guard);
    }

    /// Makes a change at the origin while the lease permits it: neither NAS nor object stores can be told to refuse who has lost it, so what is under way is given up
    /// before the masters may give the lease to somebody else.
    ///
    /// # Errors
    /// Those of the change; [`Kind::Timeout`] when the lease ended first, and then nobody knows whether it was made.
    pub(super) async fn within<T>(&self, change: impl Future<Output = Result<T>>) -> Result<T> {
        let Some(lease) = &self.lease else { return change.await };
        tokio::select! {
            biased;
            done = change => done,
            () = lease.ended() => {
                let text = "the masters cannot be reached, and the lease ended while a change was under way; it may have been made or not";
                Err(Error::new(Kind::Timeout, text))
            }
        }
    }

    /// May nothing be remembered?
    pub(super) fn is_doubtful(&self) -> bool {
        self.belief.ttl.is_zero()
    }
}

/// Leases that a request needs, as they are at the moment.
pub(super) type Needs<'a> = dyn Fn(&Beliefs) -> Result<Vec<Want>> + Send + Sync + 'a;

impl Shared {
    /// What is permitted without leases.
    pub(super) fn all(&self) -> Permit {
        Permit::free(Belief::for_time(self.parts.ttl))
    }

    /// Are there leases, and has this node to be asked for before it is changed?
    pub(super) fn is_unplaced(&self, inode: &Inode) -> bool {
        self.beliefs.is_some() && inode.dir.is_none() && !inode.placed.load(Ordering::Acquire)
    }

    /// What can be had at once.
    pub(super) fn quick(&self, need: impl FnOnce(&Beliefs) -> Result<Option<Want>>) -> Option<Permit> {
        let Some(beliefs) = &self.beliefs else { return Some(self.all()) };
        match need(beliefs).ok()? {
            Some(want) => Some(Permit::under(beliefs.leases.try_guard(&want)?, self.parts.ttl)),
            None => None,
        }
    }

    /// To read the names of a directory, if that can be had at once.
    pub(super) fn quick_names(&self, dir: &Inode) -> Option<Permit> {
        self.quick(|b| Ok(Some(Want::read(b.dir(&self.parts.namespace, dir)?))))
    }

    /// To read a node that is known, if that can be had at once.
    pub(super) fn quick_node(&self, inode: &Inode) -> Option<Permit> {
        if self.beliefs.is_some() && inode.now().fresh_until <= Instant::now() {
            return None;
        }
        self.held(inode)
    }

    /// The lease of a node, if it is held.
    pub(super) fn held(&self, inode: &Inode) -> Option<Permit> {
        self.quick(|b| Ok(b.own(&self.parts.namespace, inode)?.want(Mode::Shared)))
    }

    /// Waits for what a request needs. `changed`: files whose place and number of names decide about that.
    pub(super) async fn permit(&self, changed: &[Arc<Inode>], needs: &Needs<'_>) -> Result<Permit> {
        let Some(beliefs) = &self.beliefs else { return Ok(self.all()) };
        for _ in 0..ATTEMPTS {
            let wants = needs(beliefs)?;
            let permit = self.wait(beliefs, wants.clone()).await?;
            for inode in changed.iter().filter(|i| self.is_unplaced(i)) {
                match self.refresh(inode, permit.belief).await {
                    Err(e) if !matches!(e.kind(), Kind::NotFound | Kind::Stale) => return Err(e),
                    _ => {}
                }
            }
            if needs(beliefs)? == wants {
                return Ok(permit);
            }
        }
        Err(Error::new(Kind::Unavailable, "it is moved faster than it can be leased"))
    }

    async fn wait(&self, beliefs: &Beliefs, wants: Vec<Want>) -> Result<Permit> {
        if wants.is_empty() {
            return Ok(self.all());
        }
        let late = |_| {
            let text =
                "the masters gave no lease in time: is a master reachable (`efc status`), does another mount hang?";
            Error::new(Kind::Timeout, text).with("seconds", beliefs.deadline.as_secs())
        };
        let guard = tokio::time::timeout(beliefs.deadline, beliefs.leases.guard(wants)).await.map_err(late)??;
        Ok(Permit::under(guard, self.parts.ttl))
    }

    /// Has a file a lease of its own, because several mounts want it?
    pub(super) fn is_contended(&self, inode: &Inode) -> bool {
        self.beliefs.as_ref().is_some_and(|b| match b.own(&self.parts.namespace, inode) {
            Ok(Own::In(dir, file)) => b.leases.has(&Scope::File(dir, file)),
            Ok(Own::Lost) => true,
            _ => false,
        })
    }

    /// To read the names of a directory.
    pub(super) async fn names(&self, dir: &Inode) -> Result<Permit> {
        self.permit(&[], &|b| Ok(vec![Want::read(b.dir(&self.parts.namespace, dir)?)])).await
    }

    /// To read or change a node, which is known as it is now, unless it is only written to.
    pub(super) async fn node(&self, inode: &Arc<Inode>, mode: Mode) -> Result<Permit> {
        let Some(beliefs) = &self.beliefs else { return Ok(self.all()) };
        let fresh = |belief: Belief| !belief.ttl.is_zero() && inode.now().fresh_until > Instant::now();
        for _ in 0..ATTEMPTS {
            let own = beliefs.own(&self.parts.namespace, inode)?;
            let permit = match own.want(mode) {
                Some(want) => self.wait(beliefs, vec![want]).await?,
                None if own == Own::Lost => Permit { passing: true, ..Permit::free(Belief::NONE) },
                None => self.all(),
            };
            let asks = match mode {
                Mode::Shared => !fresh(permit.belief),
                Mode::Exclusive => self.is_unplaced(inode) && matches!(own, Own::Key(_) | Own::In(..)),
            };
            if asks {
                self.refresh(inode, permit.belief).await?;
            }
            if beliefs.own(&self.parts.namespace, inode)? == own {
                return Ok(permit);
            }
        }
        Err(Error::new(Kind::Unavailable, "it is moved faster than it can be leased").with("path", inode.path()))
    }

    /// May the attributes of a directory's entry be believed, which was seen so? Then the permission is kept.
    pub(super) fn believes_entry(
        &self,
        permit: &Permit,
        dir: &Inode,
        (name, node): (&Bytes, &Node),
        since: GrantNumber,
    ) -> bool {
        let Some(beliefs) = &self.beliefs else { return true };
        if permit.is_doubtful() {
            return false;
        }
        let key = beliefs.dir(&self.parts.namespace, dir);
        let Ok(want) = key.and_then(|key| beliefs.child(&key, name, node)) else { return false };
        match beliefs.leases.try_guard_since(&want, Some(since)) {
            Some(guard) => {
                permit.keep(guard);
                true
            }
            None => false,
        }
    }

    /// Are the names of a listing still those that are there?
    pub(super) fn is_continuous(&self, dir: &Inode, since: GrantNumber) -> Option<Permit> {
        let Some(beliefs) = &self.beliefs else { return Some(self.all()) };
        let want = Want::read(beliefs.dir(&self.parts.namespace, dir).ok()?);
        let guard = beliefs.leases.try_guard_since(&want, Some(since))?;
        Some(Permit::under(guard, self.parts.ttl))
    }

    /// To change names in a directory.
    pub(super) fn change_names(&self, b: &Beliefs, dir: &Inode) -> Result<Want> {
        Ok(Want::change(b.dir(&self.parts.namespace, dir)?))
    }

    /// To change a node.
    pub(super) fn change_node(&self, b: &Beliefs, inode: &Inode) -> Result<Vec<Want>> {
        Ok(b.own(&self.parts.namespace, inode)?.want(Mode::Exclusive).into_iter().collect())
    }

    /// To change whatever has a name: the file of this name, and what is known of it.
    pub(super) fn change_named(&self, b: &Beliefs, dir: &Inode, name: &Bytes) -> Result<Vec<Want>> {
        let key = b.dir(&self.parts.namespace, dir)?;
        let mut wants = vec![Want::change_file(key, FileKey::new(name.clone())?)];
        if let Some(child) = self.parts.namespace.child(dir, name)
            && let Own::Key(key) = b.own(&self.parts.namespace, &child)?
        {
            wants.push(Want::change(key));
        }
        Ok(wants)
    }

    /// To move everything below a directory, where its keys are paths.
    pub(super) fn change_below(&self, b: &Beliefs, dir: &Inode, name: &Bytes) -> Result<Vec<Want>> {
        match self.parts.namespace.child(dir, name).filter(|c| c.dir.is_some() && b.paths) {
            Some(child) => Ok(vec![Want::subtree(b.dir(&self.parts.namespace, &child)?)]),
            None => Ok(Vec::new()),
        }
    }

    /// The file of a name, if the kernel knows it.
    pub(super) fn file_at(&self, dir: &Inode, name: &Bytes) -> Vec<Arc<Inode>> {
        let child = self.parts.namespace.child(dir, name).filter(|c| c.dir.is_none());
        child.filter(|_| self.beliefs.is_some()).into_iter().collect()
    }
}
