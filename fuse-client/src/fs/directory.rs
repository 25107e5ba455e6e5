//! Names in directories: from a fresh snapshot if there is one, else from the workers' shared listings (object stores) or the origin
//! (NAS, `file`).

use crate::namespace::listing::Listing;
use crate::namespace::{Inode, Seen};
use crate::read::source::DataSource;
use efc_common::node::Node;
use efc_common::{Kind, Result};
use moka::sync::Cache;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// After a file turned out stale its directory is listed anew, but not more often than this.
const RELIST_PAUSE: Duration = Duration::from_secs(1);

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
    cache: Cache<u64, Arc<Listing>>,
    ttl: Duration,
}

impl Directories {
    /// A cache of at most `bytes` of listings, each believed for `ttl` after the origin was asked.
    pub fn new(source: Arc<DataSource>, bytes: u64, ttl: Duration) -> Self {
        let weigh = |_: &u64, l: &Arc<Listing>| u32::try_from(l.bytes() + 256).unwrap_or(u32::MAX);
        let cache = Cache::builder().weigher(weigh).max_capacity(bytes).build();
        Directories { source, cache, ttl }
    }

    /// A snapshot that may still be believed.
    pub fn cached(&self, dir: &Inode) -> Option<Arc<Listing>> {
        let believed = |l: &Arc<Listing>| {
            !l.freshness().is_zero() && dir.dir.as_ref().is_some_and(|d| d.is_newer_than_changes(l.seen().asked))
        };
        self.cache.get(&dir.id).filter(believed)
    }

    /// The answer for a name if a fresh snapshot has it.
    pub fn find_cached(&self, dir: &Inode, name: &[u8]) -> Option<Found> {
        let listing = self.cached(dir)?;
        Some(Found { node: listing.find(name).map(|e| e.node.clone()), seen: listing.seen() })
    }

    /// A fresh snapshot, fetched by one task however many ask.
    ///
    /// # Errors
    /// What workers and origin said; [`Kind::Exhausted`] for a directory too large to list.
    pub async fn list(&self, dir: &Inode) -> Result<Arc<Listing>> {
        let Some(state) = &dir.dir else {
            return Err(efc_common::Error::new(Kind::NotADirectory, "not a directory").with("path", dir.path()));
        };
        if let Some(l) = self.cached(dir) {
            return Ok(l);
        }
        let _only_one = state.refresh.lock().await;
        if let Some(l) = self.cached(dir) {
            return Ok(l);
        }
        let known = self.cache.get(&dir.id);
        let max_age = state.max_age(self.ttl);
        let listing = Arc::new(self.source.list(&dir.locator(), self.ttl, max_age, known.as_deref()).await?);
        self.cache.insert(dir.id, listing.clone());
        Ok(listing)
    }

    /// The node of a name.
    ///
    /// # Errors
    /// As [`Directories::list`]; that there is no such name is not an error.
    pub async fn find(&self, dir: &Inode, name: &[u8]) -> Result<Found> {
        if let Some(found) = self.find_cached(dir, name) {
            return Ok(found);
        }
        if self.source.shared_listing() {
            match self.list(dir).await {
                Ok(l) => return Ok(Found { node: l.find(name).map(|e| e.node.clone()), seen: l.seen() }),
                // Too large to hold: ask for the one name.
                Err(e) if e.is(Kind::Exhausted) => {}
                Err(e) => return Err(e),
            }
        }
        let seen = Seen::at(Instant::now(), self.ttl);
        match self.source.lookup(&dir.locator(), name).await {
            Ok(node) => Ok(Found { node: Some(node), seen }),
            Err(e) if e.is(Kind::NotFound) => Ok(Found { node: None, seen }),
            Err(e) => Err(e),
        }
    }

    /// We changed names of `dir`: listings made before this moment are wrong.
    pub fn changed(&self, dir: &Inode) {
        if let Some(state) = &dir.dir {
            state.changed();
            self.cache.invalidate(&dir.id);
        }
    }

    /// A file of `dir` is no longer the version that was listed: the next look asks the origin.
    pub fn distrust(&self, dir: &Inode) {
        if let Some(state) = &dir.dir
            && state.distrust(RELIST_PAUSE)
        {
            self.cache.invalidate(&dir.id);
        }
    }
}
