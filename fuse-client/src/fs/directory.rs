//! Names in directories: from a fresh snapshot if there is one, else from the workers' shared listings (object stores) or the origin
//! (NAS, `file`).
//!
//! On a read-write mount of an object store a listing is never thrown away for a change of our own: the tree's overlay corrects it, however old it is. And what a listing
//! does not tell (modes, owners, symbolic links) is asked for when a name is looked up, not for all names of a directory.

use crate::namespace::listing::Listing;
use crate::namespace::{Belief, Inode, ROOT_ID, Seen};
use crate::read::source::DataSource;
use crate::write::OWN_PREFIX;
use bytes::Bytes;
use efc_backend::tree::DynTree;
use efc_common::node::{Entry, FileKind, Node};
use efc_common::{Kind, Result};
use moka::sync::Cache;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// After a file turned out stale its directory is listed anew, but not more often than this.
const RELIST_PAUSE: Duration = Duration::from_secs(1);
/// Refreshed directories that are remembered one by one.
const REFRESHED_MAX: usize = 1024;

/// A name's answer and how long it may be believed.
pub struct Found {
    /// The node, `None`: there is no such name.
    pub node: Option<Node>,
    /// What the answer is worth.
    pub seen: Seen,
}

/// Listings of the directories in use.
pub struct Directories {
    source: Arc<DataSource>,
    tree: Option<DynTree>,
    /// Swapped for another when its size changes; whoever uses it holds the lock, so that nothing is dropped from the one and found in the other.
    cache: RwLock<Cache<u64, Kept>>,
    ttl: Duration,
    refreshed: Mutex<Vec<Refreshed>>,
}

/// A directory that was refreshed.
struct Refreshed {
    locator: Bytes,
    /// Where locators are paths: and everything below.
    below: bool,
    at: Instant,
}

impl Refreshed {
    fn covers(&self, locator: &[u8]) -> bool {
        if self.below { locator.starts_with(&self.locator) } else { locator == &self.locator[..] }
    }
}

/// A listing and the locator it is of: a directory that was renamed has another one.
type Kept = (Bytes, Arc<Listing>);

fn cache(bytes: u64) -> Cache<u64, Kept> {
    let weigh = |_: &u64, (_, l): &Kept| u32::try_from(l.bytes() + 256).unwrap_or(u32::MAX);
    Cache::builder().weigher(weigh).max_capacity(bytes).build()
}

impl Directories {
    /// A cache of at most `bytes` of listings, each believed for `ttl` after the origin was asked. `tree`: what changes the names, if the mount may.
    pub fn new(source: Arc<DataSource>, tree: Option<DynTree>, bytes: u64, ttl: Duration) -> Self {
        // Only a tree that keeps changes in this process has anything to add to listings.
        Directories {
            source,
            tree: tree.filter(|t| t.drafts()),
            cache: RwLock::new(cache(bytes)),
            ttl,
            refreshed: Mutex::default(),
        }
    }

    /// From now on at most `bytes` of listings: those there are now are asked for again.
    pub fn resize(&self, bytes: u64) {
        *self.cache.write() = cache(bytes);
    }

    /// A snapshot that may still be believed; of a tree with drafts to be corrected by [`Directories::corrected`].
    fn cached(&self, dir: &Inode) -> Option<Arc<Listing>> {
        let (locator, listing) = self.cache.read().get(&dir.id)?;
        let current = dir.locator();
        let replaced = self.tree.as_ref().and_then(|t| t.replaced(&current));
        let asked = listing.seen().asked;
        let believed = !listing.freshness().is_zero()
            && locator == current
            && replaced.is_none_or(|at| asked > at)
            && self.refreshed(&current).is_none_or(|at| asked > at)
            && dir.dir.as_ref().is_some_and(|d| d.is_newer_than_changes(asked));
        believed.then_some(listing)
    }

    /// Is the name one of EFC's own, which are not shown?
    fn is_own(&self, dir: &Inode, name: &[u8]) -> bool {
        dir.id == ROOT_ID && name.starts_with(OWN_PREFIX) && self.source.shared_listing()
    }

    /// A listing with this mount's own changes.
    fn corrected(&self, dir: &Inode, listing: Arc<Listing>) -> Arc<Listing> {
        let asked = listing.seen().asked;
        let changes = self.tree.as_ref().map_or(Vec::new(), |t| t.overlay(&dir.locator(), asked));
        let has_own = dir.id == ROOT_ID && listing.entries().iter().any(|e| self.is_own(dir, &e.name));
        if changes.is_empty() && !has_own {
            return listing;
        }
        let changes: BTreeMap<Bytes, Option<Node>> = changes.into_iter().collect();
        let kept = |e: &&Entry| !changes.contains_key(&e.name) && !self.is_own(dir, &e.name);
        let mut entries: Vec<Entry> = listing.entries().iter().filter(kept).cloned().collect();
        entries.extend(changes.into_iter().filter_map(|(name, node)| Some(Entry { name, node: node? })));
        Arc::new(Listing::new(entries, listing.version, listing.seen()))
    }

    /// The answer for a name from our own changes, or from `listing`.
    fn find_in(&self, dir: &Inode, name: &[u8], listing: &Listing) -> Found {
        let (seen, listed) = (listing.seen(), listing.find(name).map(|e| e.node.clone()));
        let node = match self.tree.as_ref().and_then(|t| t.find_overlay(&dir.locator(), name, seen.asked)) {
            // The file goes by another name where a directory has its own.
            Some(Some(ours)) if ours.attr.kind != FileKind::Directory => match listed {
                Some(listed) if listed.attr.kind == FileKind::Directory => Some(listed),
                _ => Some(ours),
            },
            Some(ours) => ours,
            None => listed,
        };
        Found { node: node.filter(|_| !self.is_own(dir, name)), seen }
    }

    /// The answer for a name if a fresh snapshot has it, and all its attributes are known.
    pub fn find_cached(&self, dir: &Inode, name: &[u8]) -> Option<Found> {
        let found = self.find_in(dir, name, &*self.cached(dir)?);
        match (&self.tree, found.node) {
            (Some(tree), Some(node)) => Some(Found { node: Some(tree.complete_now(&node)?), seen: found.seen }),
            (_, node) => Some(Found { node, seen: found.seen }),
        }
    }

    /// A snapshot with our own changes, if it may still be believed.
    pub fn snapshot(&self, dir: &Inode) -> Option<Arc<Listing>> {
        Some(self.corrected(dir, self.cached(dir)?))
    }

    /// Does a directory that is open since `asked` show what is there now?
    pub fn is_current(&self, dir: &Inode, asked: Instant) -> bool {
        self.tree.is_none() && dir.dir.as_ref().is_some_and(|d| d.is_newer_than_changes(asked))
    }

    /// The node with all attributes if they are known; `None`: the kernel has to look it up to see them.
    pub fn complete_now(&self, node: &Node) -> Option<Node> {
        self.tree.as_ref().map_or_else(|| Some(node.clone()), |t| t.complete_now(node))
    }

    async fn complete(&self, found: Found) -> Result<Found> {
        let (Some(tree), Some(node)) = (&self.tree, &found.node) else { return Ok(found) };
        let node = match tree.complete(node.clone()).await {
            Ok(node) => Some(node),
            Err(e) if e.is(Kind::NotFound) => None,
            Err(e) => return Err(e),
        };
        Ok(Found { node, seen: found.seen })
    }

    /// A fresh snapshot, fetched by one task however many ask.
    ///
    /// # Errors
    /// What workers and origin said; [`Kind::Exhausted`] for a directory too large to list.
    pub async fn list(&self, dir: &Inode, belief: Belief) -> Result<Arc<Listing>> {
        let listing = self.listed(dir, belief).await?;
        Ok(self.corrected(dir, listing))
    }

    async fn listed(&self, dir: &Inode, belief: Belief) -> Result<Arc<Listing>> {
        let Some(state) = &dir.dir else {
            return Err(efc_common::Error::new(Kind::NotADirectory, "not a directory").with("path", dir.path()));
        };
        let cached = || self.cached(dir).filter(|_| !belief.ttl.is_zero());
        if let Some(l) = cached() {
            return Ok(l);
        }
        let _only_one = state.refresh.lock().await;
        if let Some(l) = cached() {
            return Ok(l);
        }
        let locator = dir.locator();
        let known = self.cache.read().get(&dir.id).filter(|(l, _)| *l == locator).map(|(_, listing)| listing);
        let mut max_age = state.max_age(belief.max_age);
        if let Some(at) = self.tree.as_ref().and_then(|t| t.replaced(&locator)) {
            max_age = max_age.min(at.elapsed());
        }
        if let Some(at) = self.refreshed(&locator) {
            max_age = max_age.min(at.elapsed());
        }
        let listing = Arc::new(self.source.list(&locator, belief, max_age, known.as_deref()).await?);
        if !belief.ttl.is_zero() {
            self.cache.read().insert(dir.id, (locator, listing.clone()));
        }
        Ok(listing)
    }

    /// The node of a name.
    ///
    /// # Errors
    /// As [`Directories::list`]; that there is no such name is not an error.
    pub async fn find(&self, dir: &Inode, name: &[u8], belief: Belief) -> Result<Found> {
        if !belief.ttl.is_zero()
            && let Some(found) = self.find_cached(dir, name)
        {
            return Ok(found);
        }
        if self.source.shared_listing() && !belief.ttl.is_zero() {
            match self.listed(dir, belief).await {
                Ok(l) => return self.complete(self.find_in(dir, name, &l)).await,
                // Too large to hold: ask for the one name.
                Err(e) if e.is(Kind::Exhausted) => {}
                Err(e) => return Err(e),
            }
        }
        let seen = belief.seen();
        match self.source.lookup(&dir.locator(), name).await {
            Ok(node) => Ok(Found { node: Some(node), seen }),
            Err(e) if e.is(Kind::NotFound) => Ok(Found { node: None, seen }),
            Err(e) => Err(e),
        }
    }

    /// Listings of `dir` (and of what is `below`, where locators are paths) are not believed if they were made before this moment, also when the kernel forgets
    /// the nodes and they come back as others.
    pub fn refresh(&self, dir: &Inode, below: bool) {
        let new = Refreshed { locator: dir.locator(), below, at: Instant::now() };
        let mut all = self.refreshed.lock();
        all.retain(|old| old.at.elapsed() < self.ttl && !(new.covers(&old.locator) && new.below >= old.below));
        if all.len() >= REFRESHED_MAX {
            // Forgetting too much is right as well, only slower.
            all.clear();
            all.push(Refreshed { locator: Bytes::new(), below: true, ..new });
        } else {
            all.push(new);
        }
    }

    /// When listings of this directory were last said to be old.
    fn refreshed(&self, locator: &[u8]) -> Option<Instant> {
        let all = self.refreshed.lock();
        all.iter().filter(|r| r.covers(locator)).map(|r| r.at).max()
    }

    /// We changed names of `dir`: listings made before this moment are wrong, unless the tree corrects them.
    pub fn changed(&self, dir: &Inode) {
        if self.tree.is_some() {
            return;
        }
        self.forget(dir);
    }

    /// What is remembered of `dir` is not to be used any more.
    pub fn forget(&self, dir: &Inode) {
        if let Some(state) = &dir.dir {
            state.changed();
            self.cache.read().invalidate(&dir.id);
        }
    }

    /// A file of `dir` is no longer the version that was listed: the next look asks the origin.
    pub fn distrust(&self, dir: &Inode) {
        if let Some(state) = &dir.dir
            && state.distrust(RELIST_PAUSE)
        {
            self.cache.read().invalidate(&dir.id);
        }
    }
}
